"""`userswap bench overhead`: what a program pays that fits into its budget, and what a start costs.

The same programs as python runs them and under `userswap run` with no flag, in turn, each in a process of its own.
What is compared is what the program itself sees: the time of its work, the processor's time with that of all threads,
and the most memory that the process had at once, page tables and what userswap loads included. Time is compared by the
least of all rounds, since others on the machine only ever add to it; how far rounds differ, in each of which the two
ran one after the other, is shown beside it.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from userswap.bench import overhead_programs
from userswap.errors import BenchError
from userswap.lab.machine import Machine, machine

__all__ = ["MEMORY_BAR", "START_BAR", "TIME_BAR", "Options", "Results", "Run", "measure", "steps"]

TIME_BAR = 0.02
MEMORY_BAR = 0.001
START_BAR = 0.06
"""Seconds that `userswap run -c pass` may take longer than python takes to import NumPy."""
MOST_SECONDS = 600.0


@dataclass(frozen=True)
class Options:
    """What is to be measured."""

    programs: list[str]
    size: int
    """Bytes of arrays of a program, about."""
    rounds: int


@dataclass(frozen=True)
class Run:
    """What a program said of itself."""

    result: float
    seconds: float
    cpu_seconds: float
    peak: int
    tables: int
    anonymous: int
    """Bytes in place before its work began, libraries loaded: of its own, and of files."""
    file: int

    @property
    def memory(self) -> int:
        """Bytes at most, page tables included."""
        return self.peak + self.tables


@dataclass
class Results:
    """Everything that was measured: (plain, under userswap), a pair a round."""

    options: Options
    machine: Machine
    pairs: dict[str, list[tuple[Run, Run]]] = field(default_factory=dict)
    starts: list[tuple[float, float]] = field(default_factory=list)
    """Seconds of a start: python and NumPy, `userswap run -c pass`."""

    def ratios(self, program: str, of: Callable[[Run], float]) -> list[float]:
        """How much more a program takes under userswap, by round: 0.01 is one per cent."""
        return [of(ours) / of(plain) - 1 for plain, ours in self.pairs[program]]

    def least(self, program: str, of: Callable[[Run], float]) -> float:
        """The same of the least of each: what others on the machine do only ever adds."""
        plain, ours = ([of(run) for run in runs] for runs in zip(*self.pairs[program], strict=True))
        return min(ours) / min(plain) - 1

    def more_memory(self, program: str) -> float:
        """Bytes more at most."""
        return statistics.median(ours.memory - plain.memory for plain, ours in self.pairs[program])

    def at_first(self, of: Callable[[Run], float]) -> float:
        """Bytes more before a program's work begins: the same for all of them, whatever they do."""
        return statistics.median(of(ours) - of(plain) for pairs in self.pairs.values() for plain, ours in pairs)

    def start(self) -> float:
        """Seconds more that a start takes."""
        return statistics.median(ours - plain for plain, ours in self.starts)

    def missed(self) -> list[str]:
        """What is not within the bars, in words."""
        said = []
        for name in self.pairs:
            cpu = self.least(name, lambda run: run.cpu_seconds)
            memory = statistics.median(self.ratios(name, lambda run: run.memory))
            if cpu > TIME_BAR:
                said.append(f"{name}: {cpu:+.1%} of CPU time")
            if memory > MEMORY_BAR:
                said.append(f"{name}: {memory:+.2%} of memory")
        if self.start() > START_BAR:
            said.append(f"start: {self.start() * 1e3:+.0f} ms")
        return said

    def as_json(self) -> dict[str, Any]:
        """Return all of it."""
        return {**asdict(self), "missed": self.missed()}


def steps(options: Options) -> int:
    """How many steps `measure` reports."""
    return (len(options.programs) + 1) * options.rounds


def measure(options: Options, version: str, step: Callable[[str], None]) -> Results:
    """Run everything. Raises BenchError when a program fails, or its result under userswap is another."""
    results = Results(options, machine(version), {name: [] for name in options.programs})
    for turn in range(options.rounds):
        for name in options.programs:
            step(f"{name}, round {turn + 1} of {options.rounds}")
            # Who is first has the caches cold, or the other's memory to reuse: in turn.
            found = {ours: program(name, options.size, ours) for ours in ((False, True) if turn % 2 else (True, False))}
            if found[False].result != found[True].result:
                raise BenchError(f"The result of {name} under userswap is wrong: please report this.")
            results.pairs[name].append((found[False], found[True]))
        step(f"start, round {turn + 1} of {options.rounds}")
        results.starts.append((started(["-c", "import numpy"]), started([*RUN, "-c", "pass"])))
    return results


RUN = ["-m", "userswap", "run", "--quiet"]


def program(name: str, size: int, ours: bool) -> Run:
    """Run a program to its end."""
    file = str(Path(overhead_programs.__file__))
    return Run(**json.loads(execute([*(RUN if ours else []), file, name, str(size)])))


def started(arguments: list[str]) -> float:
    """Seconds from start to end of a process; the fastest of three, since others run here too."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        execute(arguments)
        times.append(time.perf_counter() - began)
    return min(times)


def execute(arguments: list[str]) -> str:
    """Run python, and return what it printed. Raises BenchError."""
    threads = {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "OMP", "MKL", "NUMEXPR")}
    try:
        done = subprocess.run(
            [sys.executable, *arguments], check=False, capture_output=True, text=True, timeout=MOST_SECONDS,
            env={**os.environ, **threads}, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise BenchError(f"{' '.join(arguments)} was not done after {MOST_SECONDS:.0f} seconds.") from None
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        raise BenchError(f"{' '.join(arguments)} failed: {said}")
    return done.stdout
