"""`userswap bench compare`: the same programs under every contender, with the same memory in all.

Every run is a process of its own, in a memory cgroup of its own where there can be one. Contenders take turns, each
round begins with another one. Results are compared with those of ordinary memory, which therefore runs first; that
run also says what the process takes before it has arrays, which is not counted.
"""

import json
import os
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import IO, Any

from userswap.bench.cgroup import Cgroup, new_cgroup
from userswap.bench.contenders import CONTENDERS, GUESS, Contender, plan
from userswap.bench.kernelswap import Pool, Swap
from userswap.bench.workloads import WORKLOADS, Run, Spec
from userswap.errors import BenchError
from userswap.lab.machine import Machine, machine

__all__ = ["Case", "NotRun", "Options", "Results", "Sample", "cases", "measure", "steps"]

WITHIN = 0.03
"""How far from T the memory of a run may be before its limit is corrected and it is repeated."""
CORRECTIONS = 3
LOOK_SECONDS = 0.02
MOST_SECONDS = 600
"""After that a run is given up."""


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
    """Most bytes at once beside those that it had before there were arrays: in place, compressed, page cache."""
    pool: int
    """What of it was compressed by the kernel."""
    limit: int
    """Of the cgroup; 0: none."""
    corrections: int
    """Runs before this one that had other memory than they should, and are not counted."""

    @property
    def figure(self) -> float:
        """GB/s, or µs an access."""
        speed = self.run.amount / self.run.seconds
        return speed / 1e9 if WORKLOADS[self.workload].unit == "GB/s" else 1e6 / speed


@dataclass(frozen=True)
class NotRun(Case):
    """A contender that could not run, and why."""

    contender: str
    why: str


@dataclass
class Results:
    """Everything that was measured, and where."""

    options: Options
    machine: Machine
    started: str
    seconds: float = 0.0
    samples: list[Sample] = field(default_factory=list)
    not_run: list[NotRun] = field(default_factory=list)

    def of(self, case: Case, contender: str) -> list[Sample]:
        """Return a contender's runs."""
        key = asdict(case)
        return [s for s in self.samples if s.contender == contender and {k: getattr(s, k) for k in key} == key]

    def seconds_of(self, case: Case, contender: str) -> float | None:
        """Return the median time, None if it was not run."""
        runs = self.of(case, contender)
        return statistics.median(s.run.seconds for s in runs) if runs else None

    def times(self, case: Case, contender: str) -> float | None:
        """Say how many times as fast as a contender userswap is."""
        theirs, ours = self.seconds_of(case, contender), self.seconds_of(case, "userswap")
        return theirs / ours if theirs and ours else None

    def why_not(self, case: Case, contender: str) -> str:
        """Say why a contender was not run."""
        key = asdict(case)
        for row in self.not_run:
            if row.contender == contender and {k: getattr(row, k) for k in key} == key:
                return row.why
        return ""

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
    return len(cases(options)) * len(options.contenders) * options.rounds


@dataclass
class Expected:
    """What the first run, in ordinary memory, says of all others of a case."""

    result: Any
    base: int


def measure(options: Options, version: str, step: Callable[[str], None]) -> Results:
    """Measure; `step` is told what comes next.

    Raises:
        BenchError: a result was wrong.
    """
    began = time.monotonic()
    results = Results(options, machine(version), time.strftime("%Y-%m-%dT%H:%M:%S%z"))
    unable = {name: CONTENDERS[name].why_not() for name in options.contenders}
    ratios: dict[str, float] = {}
    for case in cases(options):
        workload = WORKLOADS[case.workload]
        first = attempt(CONTENDERS["plain"], case, options, None, ratios)
        expected = Expected(first.run.result, first.run.base)
        out: set[str] = set()
        for turn in range(options.rounds):
            for name in turned(options.contenders, turn):
                step(f"{case}, round {turn + 1} of {options.rounds}: {name}")
                contender = CONTENDERS[name]
                why = unable[name] or ("" if contender.memory in workload.runs_on else workload.why_not)
                if contender.memory == "blosc2" and case.threads > 1:
                    why = "an NDArray is for one thread"
                if not why and name not in out:
                    try:
                        sample = first if (name, turn) == ("plain", 0) else attempt(
                            contender, case, options, expected, ratios
                        )  # fmt: skip
                    except NotPossible as error:
                        why = str(error)
                    else:
                        results.samples.append(replace(sample, round=turn))
                if why and name not in out:
                    out.add(name)
                    results.not_run.append(NotRun(**asdict(case), contender=name, why=why))
    results.seconds = time.monotonic() - began
    return results


def turned(names: Sequence[str], turn: int) -> list[str]:
    """Return names in the order of a round: each begins with another one."""
    by = turn % len(names)
    return [*names[by:], *names[:by]]


class NotPossible(BenchError):  # noqa: N818 - reads as what it is
    """A contender that can't do this; the others go on."""


def attempt(
    contender: Contender, case: Case, options: Options, expected: Expected | None, ratios: dict[str, float]
) -> Sample:
    """Run a contender once, with its limit corrected until it has the memory that it should have."""
    needs = int(options.ram * case.overcommit)
    directory = str(options.directory)
    spec = Spec(contender.memory, case.workload, needs, options.ram, case.data, case.threads, directory)
    key = f"{contender.name} {case.workload} {case.data}"
    corrections = 0
    while True:
        ratio = ratios.get(key, ratios.get(contender.name, GUESS))
        seen = once(contender, spec, options, expected, ratio)
        run = seen.run
        if expected is not None and run.result != expected.result:
            raise BenchError(f"The result of {case} under {contender.name} is wrong: please report this.")
        right = abs(seen.used - options.ram) <= WITHIN * options.ram
        if not contender.pool or right or seen.pool.holds == 0 or seen.charged or corrections == CORRECTIONS:
            break
        better = seen.pool.used / seen.pool.holds
        if abs(better - ratio) < WITHIN * ratio / 4:
            break  # the limit is as good as it gets
        ratios[key] = ratios[contender.name] = better
        corrections += 1
    return Sample(
        **asdict(case),
        contender=contender.name,
        round=0,
        run=run,
        used=seen.used,
        pool=seen.pool.used,
        limit=seen.limit,
        corrections=corrections,
    )


@dataclass
class Seen:
    """What was seen of a process from outside."""

    run: Run
    used: int
    pool: Pool
    limit: int
    charged: bool


def once(contender: Contender, spec: Spec, options: Options, expected: Expected | None, ratio: float) -> Seen:
    """Run a process under a contender, and take everything down again."""
    with ExitStack() as stack:
        cgroup = None
        try:
            cgroup = stack.enter_context(new_cgroup())
        except BenchError:
            if contender.limited:
                raise
        charged = cgroup is not None and cgroup.charges_zswap and contender.kernel == "zswap"
        divided = plan(contender, options.ram, spec.size, ratio, options.directory, charged=charged)
        try:
            swap = stack.enter_context(contender.swap(divided))
        except BenchError as error:
            raise NotPossible(str(error)) from None
        limit = 0
        if contender.limited:
            assert cgroup is not None and expected is not None
            limit = divided.limit + expected.base
            cgroup.limit(limit)
        spec = replace(spec, usage=str(cgroup.usage_file) if cgroup else "")
        return observed(spec, cgroup, swap, limit, charged)


def observed(spec: Spec, cgroup: Cgroup | None, swap: Swap, limit: int, charged: bool) -> Seen:
    """Run a process and watch its memory. Raises NotPossible."""
    command = [sys.executable, "-m", "userswap.bench.workloads", json.dumps(asdict(spec))]
    if cgroup is not None:
        # It joins before it is Python: what that maps and allocates is charged, too.
        command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(cgroup.procs), *command]
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "OMP", "MKL", "NUMEXPR")}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
            env={**os.environ, **threads},
        )  # fmt: skip
        try:
            most, pool = watch(process, cgroup, swap, charged)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
        if cgroup is not None:
            most = max(most, cgroup.peak())
        if process.returncode:
            raise NotPossible(why_ended(process.returncode, cgroup, err))
        out.seek(0)
        run = Run(**json.load(out))
    return Seen(run, most - run.base, pool, limit, charged)


def why_ended(code: int, cgroup: Cgroup | None, err: IO[str]) -> str:
    if cgroup is not None and cgroup.killed():
        return "the kernel killed it: out of memory"
    err.seek(0)
    return f"it failed: {err.read().strip().rpartition(chr(10))[2] or f'exit code {code}'}"


def watch(process: subprocess.Popen[bytes], cgroup: Cgroup | None, swap: Swap, charged: bool) -> tuple[int, Pool]:
    """Wait for a process; return the most memory it had, and the pool at that moment. Raises NotPossible."""
    most, at_most = 0, Pool(0, 0)
    status = Path(f"/proc/{process.pid}/status")
    began = time.monotonic()
    ended = os.pidfd_open(process.pid)
    try:
        while not select.select([ended], [], [], LOOK_SECONDS)[0]:
            pool = swap.pool()
            used = (cgroup.usage() if cgroup is not None else resident(status)) + (0 if charged else pool.used)
            if used > most:
                most, at_most = used, pool
            if time.monotonic() - began > MOST_SECONDS:
                raise NotPossible(f"it was not done after {MOST_SECONDS} seconds")
    finally:
        os.close(ended)
    return most, at_most


def resident(status: Path) -> int:
    """Bytes of anonymous memory of a process."""
    for line in status.read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0
