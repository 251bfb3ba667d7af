"""Replay: what a recorded program asked of the swap layer, asked of every design.

Each replay is on a fresh map, in recorded order, by one thread (``Map.replay`` says how, and what it checks:
every entry that is found is the one that was left). Designs take turns, each round begins with another one, and
figures are medians over rounds. A round replays a short trace many times, so that it takes long enough to be timed.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from userswap.errors import TraceError
from userswap.lab.trace import Trace
from userswap.swap.map import Map
from userswap.swap.traced import EVENTS

if TYPE_CHECKING:
    from userswap.swap.map import Replayed

__all__ = ["Replay", "Result", "replay"]

EVENTS_PER_ROUND = 400_000
MOST_REPEATS = 100
FOLIO_SLOTS = 16


@dataclass
class Result:
    """What a design needed. Times are ns for each event, one value a round."""

    refused: str = ""
    """Why the design can't do what the program did; empty: it can."""
    total: list[float] = field(default_factory=list)
    kinds: dict[str, list[float]] = field(default_factory=dict)
    peak_metadata: int = 0
    """Bytes."""
    bytes_per_id: float = 0.0
    """Metadata by live ids when these were most."""


@dataclass
class Replay:
    """A trace under several designs."""

    counts: dict[str, int]
    peak_ids: int
    live_at_end: int
    slots: int
    """The swap file that designs whose ids are slots got, in slots as large as a folio."""
    repeats: int
    """Replays a round."""
    designs: dict[str, Result]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and most."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def replay(trace: Trace, designs: Sequence[str], rounds: int, progress: Callable[[str], None]) -> Replay:
    """Replay a trace under each of the designs.

    Raises:
        TraceError: the trace makes no sense, or a design did what it must not; the text says where.
    """
    slots = slots_for(trace)
    repeats = min(max(1, EVENTS_PER_ROUND // max(len(trace.kinds), 1)), MOST_REPEATS)
    report = Replay(trace.counts, trace.peak_ids, trace.live_at_end, slots, repeats, {d: Result() for d in designs})
    for design, result in report.designs.items():
        progress(f"memory, {design}")
        try:
            found = once(trace, design, slots, "memory")
        except (MemoryError, OverflowError) as error:
            result.refused = str(error)
            continue
        result.peak_metadata = found["peak_metadata"]
        result.bytes_per_id = found["metadata_at_peak"] / max(found["peak_ids"], 1)
    able = [design for design in designs if not report.designs[design].refused]
    for turn in range(rounds):
        for design in able[turn % len(able) :] + able[: turn % len(able)] if able else []:
            progress(f"round {turn + 1} of {rounds}, {design}")
            result = report.designs[design]
            total, kinds = 0, [0] * len(EVENTS)
            for _ in range(repeats):
                total += once(trace, design, slots, None)["ns"]
                kinds = [a + b for a, b in zip(kinds, once(trace, design, slots, "kinds")["kinds"], strict=True)]
            result.total.append(total / repeats / max(len(trace.kinds), 1))
            for name, ns in zip(EVENTS, kinds, strict=True):
                if name != "more" and name in trace.counts:
                    number = trace.counts[name] + (trace.counts.get("more", 0) if name == "run" else 0)
                    result.kinds.setdefault(name, []).append(ns / repeats / number)
    return report


def slots_for(trace: Trace) -> int:
    """A swap file for a trace, in slots as large as a folio: twice what was live at once, and all that was used."""
    return max(2 * trace.peak_ids, -(-trace.slots_end // FOLIO_SLOTS), 512)


def once(trace: Trace, design: str, slots: int, watch: Literal["kinds", "memory"] | None) -> "Replayed":
    """Replay a trace on a fresh map, and check what is left."""
    holders = int(trace.refs.max()) + 1 if len(trace.refs) else 1
    swap_map = Map(design, holders=holders, slots=slots, slot_run=FOLIO_SLOTS)
    try:
        found = swap_map.replay(trace.kinds, trace.types, trace.refs, trace.values, watch=watch)
    except ValueError as error:
        raise TraceError(f"The trace of {trace.program} can't be replayed under {design}: {error}.") from None
    if found["ids"] != trace.live_at_end:
        raise TraceError(
            f"The design {design} has {found['ids']:,} ids at the end, the trace has {trace.live_at_end:,}."
        )
    return found
