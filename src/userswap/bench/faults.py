"""`userswap bench faults`: how long a fault takes, by kind, and where the time goes.

A kind is measured from outside: arrays are brought into a state in which a touch of a folio is a fault of that kind,
folios are touched once each, in random order, with a clock around each touch. What the handler says it took, from its
first instruction to its last, is subtracted to see what the kernel takes to bring the program there and back. Steps
that can be done alone are timed alone. Nothing is added to the path of a fault.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from userswap._core import FOLIO
from userswap.backends import codec
from userswap.bench.data import Filler
from userswap.lab.machine import Machine, machine
from userswap.pool import Pool

__all__ = ["Kind", "Options", "Results", "measure", "steps"]

MIB = 1 << 20
RECIPE = 1
"""Bitshuffle of 8 bytes and LZ4: what sampling finds for this data."""
CODEC_TURNS = 100
LEAST_BUDGET = 16 * MIB


@dataclass(frozen=True)
class Options:
    """What is to be measured."""

    size: int
    """Bytes of the array whose folios are touched."""
    rounds: int
    data: str
    directory: str
    delivery: str
    """Of faults: one of `pool.DELIVERIES`."""


@dataclass
class Kind:
    """Faults of one kind, ns each."""

    name: str
    text: str
    took: list[int] = field(default_factory=list)
    """The whole touch."""
    handler: list[int] = field(default_factory=list)
    """What of it was in the handler, or in the thread that served it."""
    others: int = 0
    """Touches that were no fault, or more than one: not in the figures."""

    def percentile(self, share: float) -> float:
        """Return µs that so many per cent of the faults stay within."""
        return float(np.percentile(self.took, share)) / 1e3 if self.took else 0.0

    @property
    def inside(self) -> float:
        """µs in the handler, median."""
        return statistics.median(self.handler or [0]) / 1e3

    @property
    def around(self) -> float:
        """µs outside of the handler, median: the page fault, the signal, and the way back."""
        outside = [took - inside for took, inside in zip(self.took, self.handler, strict=True)]
        return statistics.median(outside or [0]) / 1e3


@dataclass
class Results:
    """Everything that was measured."""

    options: Options
    machine: Machine
    kinds: dict[str, Kind] = field(default_factory=dict)
    evict_clean: list[float] = field(default_factory=list)
    """µs a folio, one value a round."""
    evict_dirty: list[float] = field(default_factory=list)
    compress: list[float] = field(default_factory=list)
    decompress: list[float] = field(default_factory=list)

    def breakdown(self) -> list[tuple[str, float, str]]:
        """Return (step, µs, how it was found)."""
        zswap, first, clean = (self.kinds[name] for name in ("zswap", "first touch", "write to clean"))
        packing, unpacking = statistics.median(self.compress), statistics.median(self.decompress)
        dirty, gone = statistics.median(self.evict_dirty), statistics.median(self.evict_clean)
        steps = [
            ("page fault, signal, return", zswap.around, "a touch, less its time in the handler"),
            ("look-up and a frame in place", first.inside, "the handler at a first touch"),
            ("decompress", unpacking, "alone, in the cache"),
            ("the rest of a fault from zswap", zswap.inside - first.inside - unpacking, "the difference"),
            ("unprotect, give up the copy", clean.inside, "the handler at a write to a clean folio"),
            ("compress", packing, "alone, in the cache"),
            ("evict: vacate", gone, "evicting clean folios"),
            ("evict: look for its like, store", dirty - gone - packing, "dirty ones, less the two"),
        ]
        # where frames are moved a clean folio is not protected, so that a write to it is no fault
        return [step for step in steps if step[0] != "unprotect, give up the copy" or clean.took]

    def as_json(self) -> dict[str, Any]:
        """Return all of it, without the single touches."""
        document = asdict(self)
        for name, kind in self.kinds.items():
            shares = {f"p{share:g}_us": kind.percentile(share) for share in (50, 99, 99.9)}
            for samples in ("took", "handler"):
                del document["kinds"][name][samples]
            document["kinds"][name] |= {
                "faults": len(kind.took), **shares, "handler_us": kind.inside, "around_us": kind.around
            }  # fmt: skip
        document["breakdown_us"] = {step: us for step, us, _ in self.breakdown()}
        return document


class Folios:
    """An array in a pool, to be touched folio by folio."""

    def __init__(self, pool: Pool, size: int, data: str) -> None:
        self.pool = pool
        self.array = pool.empty(size // 8)
        self.filler = Filler(data)
        self.order = np.random.default_rng(1)

    def fill(self) -> None:
        """Write all of it: every folio is dirty, and in place if there is room."""
        self.filler.fill(self.array)

    def evict(self) -> float:
        """Push everything out; return µs a folio."""
        before = self.pool.stats().resident_bytes
        began = time.perf_counter_ns()
        self.pool.evict()
        took = time.perf_counter_ns() - began
        return took / max((before - self.pool.stats().resident_bytes) / FOLIO, 1) / 1e3

    def touch(self, kind: Kind, *, writing: bool) -> None:
        """Touch each folio once, and note how long each fault takes."""
        view = self.array.data.cast("B")
        places = (self.order.permutation(len(view) // FOLIO) * FOLIO).tolist()
        clock, stats = time.perf_counter_ns, self.pool.stats
        before = stats()
        for at in places:
            if writing:
                began = clock()
                view[at] = 1
            else:
                began = clock()
                view[at]
            took = clock() - began
            after = stats()
            if after.faults - before.faults == 1:
                kind.took.append(took)
                kind.handler.append(after.fault_ns_total - before.fault_ns_total)
            else:
                kind.others += 1
            before = after


KINDS = {
    "first touch": "a folio that never was: a frame of zeros",
    "zswap": "read, from the compressed pool; room for it",
    "zswap, written": "the same, but the touch writes",
    "file": "read, from the swap file; room for it",
    "write to clean": "write to a folio that was only read; no fault where frames are moved",
    "zswap, evicting": "read; no room, so others leave, which are clean",
    "zswap, written, evicting": "write; no room, so others leave, which are dirty",
}


def steps(options: Options) -> int:
    """How many times `measure` calls `step`."""
    return options.rounds


def measure(options: Options, version: str, step: Callable[[str], None]) -> Results:
    """Measure all kinds; `step` is told what comes next.

    Raises:
        UserswapError: as `Pool`.
    """
    kinds = {name: Kind(name, text) for name, text in KINDS.items()}
    results = Results(options, machine(version), kinds)
    sample = np.empty(FOLIO // 8)
    Filler(options.data).fill(sample)
    for turn in range(options.rounds):
        step(f"round {turn + 1} of {options.rounds}")
        with Pool(2 * options.size + 32 * MIB, options.directory, delivery=options.delivery) as roomy:
            with_room(roomy, options, results)
        with Pool(max(options.size // 2, LEAST_BUDGET), options.directory, delivery=options.delivery) as tight:
            without_room(tight, options, results)
        _, packing, unpacking = codec.speed(sample.tobytes(), RECIPE, CODEC_TURNS)
        results.compress.append(FOLIO / packing / 1e3)
        results.decompress.append(FOLIO / unpacking / 1e3 if unpacking else 0.0)
    return results


def with_room(pool: Pool, options: Options, results: Results) -> None:
    """One round of the kinds in which nothing has to leave."""
    kinds, folios = results.kinds, Folios(pool, options.size, options.data)
    folios.touch(kinds["first touch"], writing=True)
    folios.fill()
    results.evict_dirty.append(folios.evict())
    folios.touch(kinds["zswap"], writing=False)
    results.evict_clean.append(folios.evict())
    folios.touch(kinds["zswap, written"], writing=True)
    folios.evict()
    pool.writeback()
    folios.touch(kinds["file"], writing=False)
    folios.touch(kinds["write to clean"], writing=True)


def without_room(pool: Pool, options: Options, results: Results) -> None:
    """One round of the kinds in which others have to leave."""
    kinds, folios = results.kinds, Folios(pool, options.size, options.data)
    folios.fill()
    warm = Kind("", "")
    folios.touch(warm, writing=False)  # from here on what is in place is clean
    folios.touch(kinds["zswap, evicting"], writing=False)
    folios.touch(warm, writing=True)
    folios.touch(kinds["zswap, written, evicting"], writing=True)
