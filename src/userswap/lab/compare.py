"""`userswap lab compare`: every design over every scenario, and what was found."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from userswap.lab import memory, pool, resident, timing, words32
from userswap.lab.machine import Machine, busy, machine
from userswap.lab.memory import SCENARIOS, Memory
from userswap.lab.pool import KERNEL_BYTES, PoolCost
from userswap.lab.resident import Resident
from userswap.lab.timing import OPERATIONS, Time
from userswap.lab.widths import WIDTHS
from userswap.swap.map import BOUND, DESIGN_NAMES

__all__ = ["GOAL_BYTES", "Options", "Results", "measure", "most_pages", "need", "steps"]

GOAL_BYTES = 24
"""What a swapped page may cost beside its data, everything counted."""
POOL_OBJECTS = (100_000, 250_000)
"""Least and most that zswap is filled with: what it needs once is shared by all of them."""
THREADS = (1, 2)
BYTES_A_PAGE = 160
"""Most that the lab itself and a map take for each page, generously."""
SAME = 1.01
"""Metadata within this factor counts as the same."""
NEAR = 1.05
"""A time within this factor, or within the spread, can't be told from another."""


@dataclass(frozen=True)
class Options:
    """What is to be measured."""

    designs: list[str]
    pages: int
    rounds: int
    seed: int
    quick: bool
    order: str
    """Of faults, dups, puts and writebacks: "random", or "allocation"."""
    words: int = 64
    """Bits of a word, one of `WIDTHS`."""

    @property
    def scenarios(self) -> list[memory.Scenario]:
        """The one with many more pages takes as long as all others: not in a quick run."""
        return [scenario for scenario in SCENARIOS.values() if scenario.times == 1 or not self.quick]


@dataclass
class Results:
    """Everything that was measured, and where."""

    options: Options
    machine: Machine
    started: str
    seconds: float = 0.0
    memory: list[Memory] = field(default_factory=list)
    time: list[Time] = field(default_factory=list)
    pool: PoolCost | None = None
    resident: list[Resident] = field(default_factory=list)
    limits: list[dict[str, Any]] = field(default_factory=list)
    """What words of 32 bits leave to each design."""

    @property
    def default(self) -> str:
        """The design that the findings are about: userswap's default, or else the first one."""
        return DESIGN_NAMES[0] if DESIGN_NAMES[0] in self.options.designs else self.options.designs[0]

    def of(self, scenario: str) -> dict[str, Memory]:
        """Return what each design needed in a scenario."""
        return {row.design: row for row in self.memory if row.scenario == scenario}

    def times(self, operation: str, threads: int) -> dict[str, Time]:
        """Return how long each design took."""
        return {row.design: row for row in self.time if (row.operation, row.threads) == (operation, threads)}

    def everything(self, design: str) -> tuple[float, float]:
        """Return what a page in zswap costs beside its data, map and pool, at the peak and after freeing half."""
        assert self.pool is not None
        row = self.of("zswap")[design]
        return row.peak + self.pool.beside, row.left + self.pool.left_beside

    def wrong(self) -> list[str]:
        """Say which designs' books are not what the kernel says."""
        return [
            f"{row.design} says it uses {row.peak_bytes:,} bytes, then {row.left_bytes:,}; resident are "
            f"{row.peak_resident:,}, then {row.left_resident:,}"
            for row in self.resident
            if not row.right
        ]

    def as_json(self) -> dict[str, Any]:
        """Return all of it, each sample included."""
        document = asdict(self)
        for row, source in zip(document["memory"], self.memory, strict=True):
            row |= {"peak": source.peak, "left": source.left, "unit": "bytes/page" if source.pages else "KiB"}
        document["default"] = self.default
        document["bound"] = sorted(BOUND & set(self.options.designs))
        if self.pool is not None:
            document["everything"] = [
                dict(zip(("design", "peak", "left"), (design, *self.everything(design)), strict=True))
                for design in self.options.designs
            ]
        document["kernel_published_bytes"] = KERNEL_BYTES
        document["findings"] = list(self.findings())
        return document

    # ---- what was found ----

    def findings(self) -> Iterator[str]:
        """Say in sentences what the figures say."""
        yield self.found_memory()
        if self.pool is not None:
            yield self.found_everything()
        for threads in THREADS:
            yield self.found_time(threads)
        if self.wrong():
            yield f"Do not believe the memory figures: {'; '.join(self.wrong())}."
        elif self.resident:
            yield f"What each map says it uses is what the kernel says is resident, within {self.worst():.1%}."
        if self.machine.debug:
            yield "This is a debug build, with assertions: its times mean nothing."
        if busy(self.machine):
            yield (
                f"The machine was busy (load {self.machine.load_before:.1f} on {self.machine.processors} processors): "
                f"believe no difference in time that is within the spread."
            )

    def found_memory(self) -> str:
        """Where the default needs least metadata, and where another design needs less."""
        rivals: list[str] = []
        least = 0
        for scenario in self.options.scenarios:
            rows = self.of(scenario.name)
            mine, best = rows[self.default], min(rows.values(), key=lambda row: row.peak)
            if mine.peak <= best.peak * SAME:
                least += 1
            else:
                rivals.append(f"{scenario.name}: {best.peak:.1f} of {best.design} against {mine.peak:.1f}")
        text = f"Memory: {self.default} needs least in {least} of {len(self.options.scenarios)} scenarios"
        return f"{text}; not in {'; '.join(rivals)}." if rivals else f"{text}."

    def found_everything(self) -> str:
        """What a page in zswap costs beside its data."""
        assert self.pool is not None
        whole = self.everything(self.default)[0]
        verdict = "within" if whole <= GOAL_BYTES else "above"
        pool, map = self.pool, whole - self.pool.beside
        return (
            f"Beside its data a page in zswap costs {whole:.1f} bytes with {self.default}, {map:.1f} in the map and "
            f"{pool.beside:.1f} in the pool (of {pool.objects:,} objects; {pool.each:.1f} for each further one): "
            f"{verdict} the goal of {GOAL_BYTES}; Linux, as published, {KERNEL_BYTES}. No checksum is in it, as zswap "
            f"keeps none, and no rounding up to size classes, {pool.rounding / pool.data:.1%} of the data."
        )

    def found_time(self, threads: int) -> str:
        """Where the default is fastest, or cannot be told from the fastest."""
        slower: list[str] = []
        for operation in OPERATIONS:
            rows = self.times(operation, threads)
            if not rows:
                continue
            mine, best = rows[self.default], min(rows.values(), key=lambda row: row.median)
            if mine.least > best.most and mine.median > best.median * NEAR:
                slower.append(f"{operation}: {best.median:.1f} ns of {best.design} against {mine.median:.1f}")
        most = sum(1 for operation in OPERATIONS if self.times(operation, threads))
        text = (
            f"Time, {threads} thread{'s' if threads > 1 else ''}: {self.default} is fastest, or can't be told from "
            f"the fastest, in {most - len(slower)} of {most} operations"
        )
        return f"{text}; not in {'; '.join(slower)}." if slower else f"{text}."

    def worst(self) -> float:
        """Return the largest difference between what a map says and what is resident."""
        return max(
            abs(said - seen) / max(seen, 1)
            for row in self.resident
            for said, seen in ((row.peak_bytes, row.peak_resident), (row.left_bytes, row.left_resident))
        )


def steps(options: Options) -> int:
    """How many times `measure` calls `step`."""
    return 1 + len(options.designs) * (1 + len(options.scenarios) + options.rounds * len(THREADS))


def need(options: Options) -> int:
    """Bytes of memory that the measurement takes, at most."""
    return BYTES_A_PAGE * options.pages * max(scenario.times for scenario in options.scenarios)


def most_pages(options: Options) -> int | None:
    """Return how many pages the words of every design can tell from each other in every scenario; None: any."""
    most = [pages for design in options.designs if (pages := WIDTHS[options.words].most_pages(design)) is not None]
    return min(most) // max(scenario.times for scenario in options.scenarios) if most else None


def measure(options: Options, version: str, step: Callable[[str], None]) -> Results:
    """Measure; `step` is told what comes next.

    Raises:
        UserswapError: a design's memory could not be checked.
    """
    began = time.monotonic()
    results = Results(options, machine(version), time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    for design in options.designs:
        step(f"checking {design}'s books")
        results.resident.append(resident.measure(design, options.seed, options.words))
    if options.words == 64:
        step("filling zswap")
        least, most = POOL_OBJECTS
        results.pool = pool.measure(min(max(options.pages, least), most), options.seed)
    else:
        # The pool is made for words of 64 bits: what it would take here nobody has built.
        step("computing limits")
        results.limits = [words32.limits(design) for design in options.designs]
    for scenario in options.scenarios:
        for design in options.designs:
            step(f"memory, {scenario.name}: {design}")
            results.memory.append(memory.measure(scenario, design, options.pages, options.seed, options.words))
    results.time = measure_time(options, step)
    results.seconds = time.monotonic() - began
    return results


def measure_time(options: Options, step: Callable[[str], None]) -> list[Time]:
    """Round after round, every design in each."""
    teams = {threads: timing.Threads(threads) for threads in THREADS}
    samples: dict[tuple[int, str, str], list[float]] = {}
    for turn in range(options.rounds):
        for threads, team in teams.items():
            for design in options.designs:
                step(f"time, round {turn + 1} of {options.rounds}, {threads} threads: {design}")
                seed = options.seed + turn
                shuffled = options.order == "random"
                measured = timing.one_round(design, options.pages, seed, team, shuffled=shuffled, words=options.words)
                for operation, ns in measured.items():
                    samples.setdefault((threads, operation, design), []).append(ns)
    return [
        Time(operation, OPERATIONS[operation], design, threads, samples[threads, operation, design])
        for threads in THREADS
        for operation in OPERATIONS
        for design in options.designs
        if (threads, operation, design) in samples
    ]
