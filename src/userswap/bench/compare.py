"""`userswap bench compare`: the same programs under every contender, with the same memory in all.

Every run is a process of its own, in a memory cgroup of its own where there can be one. Contenders take turns, each
round begins with another one. Results are compared with those of ordinary memory, which therefore runs first. Whoever
is slow does less of a work that is a repetition: two contenders are compared at what both have done.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from userswap.bench.contenders import CONTENDERS
from userswap.bench.runs import Expected, NotPossible, Runner, Seen, Stop, Stopped, alone, warm
from userswap.bench.workloads import WORKLOADS, Run, Spec
from userswap.lab.machine import Machine, machine

__all__ = ["Case", "NotRun", "Options", "Results", "Sample", "cases", "measure", "steps"]

LEAST_SWAPPED = 1 << 24
"""Bytes; CPU time for less can't be told from none."""
SLOW = 5.0
"""Seconds; whoever takes longer for a run has no other in the rounds that follow, unless that is asked for."""
TURNS = 4
"""Where everything fits, differences are small: so often plain and userswap take turns in a round."""


@dataclass(frozen=True)
class Options:
    """What is to be measured."""

    workloads: list[str]
    contenders: list[str]
    overcommit: list[float]
    """Bytes of arrays by T."""
    data: list[str]
    threads: list[int]
    rounds: int
    ram: int
    """T, bytes."""
    directory: Path
    """Where swap files and mapped files are made."""
    seconds: float = 0.0
    """Work that is a repetition ends with the step that takes it beyond this."""
    every: bool = True
    """Whether slow contenders run in every round, too."""


@dataclass(frozen=True)
class Case:
    """One program with its circumstances: what is compared with each other."""

    workload: str
    overcommit: float
    data: str
    threads: int

    def __str__(self) -> str:
        return f"{self.workload}, {self.overcommit:g}x, {self.data}, {self.threads} thread{'s'[: self.threads > 1]}"


@dataclass(frozen=True)
class Sample(Case):
    """What one process did."""

    contender: str
    round: int
    run: Run
    used: int
    """Bytes, as `Seen.used`."""
    pool: int
    """What of it was compressed by the kernel."""
    limit: int
    corrections: int
    killed: int
    lifted: int
    capped: bool
    """Whether the pool was held below the least limit that the kernel knows."""

    @classmethod
    def of(cls, case: Case, contender: str, turn: int, seen: Seen) -> "Sample":
        """Return what was seen of a contender in a round."""
        return cls(
            **asdict(case), contender=contender, round=turn, run=seen.run, used=seen.used, pool=seen.pool.used,
            limit=seen.limit, corrections=seen.corrections, killed=seen.killed,
            lifted=seen.lifted, capped=seen.capped,
        )  # fmt: skip

    @property
    def figure(self) -> float:
        """What it did, in the workload's unit."""
        return WORKLOADS[self.workload].figure(self.run.amount, self.run.seconds)


@dataclass(frozen=True)
class NotRun(Case):
    """A contender that could not run, and why."""

    contender: str
    why: str
    missing: bool = True
    """Whether it can't run here or can't do this; False: it was tried."""


@dataclass
class Results:
    """Everything that was measured, and where."""

    options: Options
    machine: Machine
    started: str
    seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)
    stopped: bool = False
    """By a signal, before everything was measured."""

    def of(self, case: Case, contender: str) -> list[Sample]:
        """Return a contender's runs."""
        key = asdict(case)
        return [s for s in self.samples if s.contender == contender and {k: getattr(s, k) for k in key} == key]

    def compared(self, one: tuple[Case, str], other: tuple[Case, str]) -> list[float]:
        """Return by how much longer one took than the other for the same work, by turns; empty if one was not run.

        Who ran less often is compared with the median of its runs.
        """
        runs, others = self.of(*one), self.of(*other)
        if not runs or not others:
            return []
        # Steps double, and not all do as many.
        units = str(min(s.run.units for s in (*runs, *others)))
        mine, theirs = ([s.run.marks[units] for s in found] for found in (runs, others))
        if len(mine) != len(theirs):
            mine, theirs = [statistics.median(mine)], [statistics.median(theirs)]
        return [a / b for a, b in zip(mine, theirs, strict=True)]

    def times(self, case: Case, contender: str) -> float | None:
        """Say how many times as fast as a contender userswap is."""
        found = self.compared((case, contender), (case, "userswap"))
        return statistics.median(found) if found else None

    def cpu_by_gb(self, case: Case, contender: str) -> float | None:
        """CPU seconds for each GB swapped in or out, beyond what the program itself takes; None: too little to tell."""
        runs, plain = self.of(case, contender), self.of(case, "plain")
        swapped = statistics.median(s.run.swapped_in + s.run.swapped_out for s in runs) if runs else 0
        if not plain or swapped < LEAST_SWAPPED:
            return None
        # Not all do as much of the same.
        own = statistics.median(s.run.cpu_seconds / s.run.amount for s in plain)
        spent = statistics.median(s.run.cpu_seconds + s.run.kernel_seconds - own * s.run.amount for s in runs)
        # What the machine did beside it may be more than what there is to tell.
        return spent / (swapped / 1e9) if spent > 0 else None

    def why_not(self, case: Case, contender: str) -> str:
        """Say why a contender was not run."""
        key = asdict(case)
        for row in self.not_run:
            if row.contender == contender and {k: getattr(row, k) for k in key} == key:
                return row.why
        return ""

    def failed(self) -> list[tuple[Case, str]]:
        """Return where userswap itself failed, and why: that is no circumstance, but an error."""
        return [
            (Case(row.workload, row.overcommit, row.data, row.threads), row.why)
            for row in self.not_run
            if (row.contender, row.missing) == ("userswap", False)
        ]

    def as_json(self) -> dict[str, Any]:
        """Return all of it, each sample included."""
        document = asdict(self)
        document["options"]["directory"] = str(self.options.directory)
        for row, sample in zip(document["samples"], self.samples, strict=True):
            row |= {"figure": sample.figure, "unit": WORKLOADS[sample.workload].unit}
        return document


def cases(options: Options) -> list[Case]:
    """Return everything to be compared."""
    return [
        Case(workload, overcommit, data, threads)
        for overcommit in options.overcommit
        for data in options.data
        for threads in options.threads
        for workload in options.workloads
    ]


def steps(options: Options) -> int:
    """How many times `measure` calls `step`."""
    return sum(len(turns(options, case, turn)) for case in cases(options) for turn in range(options.rounds))


def measure(options: Options, version: str, step: Callable[[str], None]) -> Results:
    """Measure; `step` is told what comes next. A signal ends it early, with what there is.

    Raises:
        BenchError: a result was wrong.
    """
    results = Results(options, machine(version), time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    began = time.monotonic()
    with Stop() as stop:
        try:
            with alone(stop):
                began = time.monotonic()
                measure_all(results, stop, step)
        except Stopped:
            results.stopped = True
    results.seconds = time.monotonic() - began
    return results


def measure_all(results: Results, stop: Stop, step: Callable[[str], None]) -> None:
    """Measure every case, round after round, every contender in each."""
    options = results.options
    unable = {name: CONTENDERS[name].why_not() for name in options.contenders}
    runner = Runner(options.directory, stop)
    warm(["userswap.bench.workloads", *sorted({name for w in options.workloads for name in WORKLOADS[w].needs})])
    for case in cases(options):
        spec = Spec(
            "plain", case.workload, int(options.ram * case.overcommit), options.ram, case.data, case.threads,
            str(options.directory), options.seconds,
        )  # fmt: skip
        first = runner.attempt(CONTENDERS["plain"], replace(spec, reference=True), None)
        expected = Expected(first.run.results, first.run.units, first.used)
        spec = replace(spec, most=expected.units)
        unused = [first]
        out: set[str] = set()
        slow: set[str] = set()
        for turn in range(options.rounds):
            for name in turns(options, case, turn):
                step(f"{case}, round {turn + 1} of {options.rounds}: {name}")
                stop.heed()
                if name in out or (turn > 0 and name in slow):
                    continue
                contender = CONTENDERS[name]
                why = unable[name] or contender.why_not_this(WORKLOADS[case.workload], case.threads)
                missing = why is not None
                if not missing:
                    try:
                        if name == "plain" and unused:
                            seen = unused.pop()
                        else:
                            own = replace(spec, memory=contender.memory, readahead=contender.readahead)
                            seen = runner.attempt(contender, own, expected)
                            if seen.took > SLOW and not options.every:
                                slow.add(name)
                        results.samples.append(Sample.of(case, name, turn, seen))
                    except NotPossible as error:
                        why = str(error)
                if why is not None:
                    out.add(name)
                    results.not_run.append(NotRun(**asdict(case), contender=name, why=why, missing=missing))


def turns(options: Options, case: Case, turn: int) -> list[str]:
    """Return who runs in a round, in this order."""
    names = turned(options.contenders, turn)
    if case.overcommit < 1:
        often = [name for name in ("plain", "userswap") if name in names]
        names += [name for again in range(TURNS - 1) for name in turned(often, again)] if often else []
    return names


def turned(names: Sequence[str], turn: int) -> list[str]:
    """Return names in the order of a round: each begins with another one."""
    by = turn % len(names)
    return [*names[by:], *names[:by]]
