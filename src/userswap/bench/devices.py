"""Swap files as devices: userswap's beside the kernel's, of the same size, on the same disk, in the same memory.

Each run is a process in a memory cgroup of its own (`device_program`); userswap's keeps to a budget that leaves it a
part of the same limit for itself. Contenders take turns. Only the swap file is measured: neither has anything
compressed in RAM, except in the last phase, where swap is turned off with room for everything in RAM.
"""

import json
import os
import select
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from userswap import __version__
from userswap.bench import kernelswap
from userswap.bench.cgroup import Cgroup, new_cgroup, why_no_cgroup
from userswap.bench.device_program import LIMIT, OFF, PHASES, UNLIMIT, Phase, Spec
from userswap.bench.kernelswap import Swap
from userswap.bench.runs import Stop, alone, warm
from userswap.errors import BenchError
from userswap.lab.machine import Machine, available, machine
from userswap.sizes import format_size
from userswap.swapfiles import default_places

__all__ = ["CONTENDERS", "FULL", "QUICK", "Options", "Results", "Verdict", "measure"]

CONTENDERS = {"kernel": "kernel swap file", "userswap": "userswap", "encrypt": "userswap, encrypted"}
OWN = 16
"""One in so many bytes of the limit is not in userswap's budget: what its process needs beside it."""
LOOK_SECONDS = 0.01
MOST_SECONDS = 900.0
FASTER = {"1:1": 1.0, "2:1": 2.0}
OFF_FASTER = 5.0


@dataclass(frozen=True)
class Options:
    """What is measured; sizes are bytes."""

    size: int
    ram: int
    seconds: float
    """For random accesses of one kind."""
    data: Sequence[str] = ("1:1", "2:1", "6:1")
    rounds: int = 1
    directory: str | None = None


FULL = Options(size=1152 << 20, ram=128 << 20, seconds=5.0)
"""After the array is made, 1 GiB of it is in the swap file."""
QUICK = Options(size=288 << 20, ram=32 << 20, seconds=1.0)


class Case(NamedTuple):
    """One row: a phase of a run over data of one kind."""

    data: str
    phase: str


class Verdict(NamedTuple):
    """What was aimed at."""

    what: str
    bar: float
    times: float
    """As fast as the kernel."""

    @property
    def met(self) -> bool:
        """Whether that is fast enough."""
        return self.times >= self.bar


@dataclass
class Results:
    """What was found, by contender and case, a phase for each round."""

    options: Options
    place: Path
    machine: Machine
    phases: dict[str, dict[Case, list[Phase]]] = field(default_factory=dict)
    not_run: dict[str, str] = field(default_factory=dict)
    """Why, by contender."""

    def median(self, contender: str, case: Case, of: Callable[[Phase], float]) -> float | None:
        """The median of a figure; None: it was not run."""
        found = self.phases.get(contender, {}).get(case)
        return statistics.median(map(of, found)) if found else None

    def times(self, contender: str, case: Case) -> float | None:
        """How many times as fast as the kernel: the median of the rounds' ratios."""
        ours, theirs = (self.phases.get(name, {}).get(case, []) for name in (contender, "kernel"))
        pairs = list(zip(ours, theirs, strict=False))
        return statistics.median(speed(a) / speed(b) for a, b in pairs) if pairs else None

    def verdicts(self) -> Iterator[Verdict]:
        """Judge what is aimed at, as far as it was run."""
        for data in self.options.data:
            for phase, text in PHASES.items():
                times = self.times("userswap", Case(data, phase))
                bar = OFF_FASTER if phase == "swapoff" else FASTER.get(data)
                if times is not None and bar is not None:
                    yield Verdict(f"{data}, {text}", bar, times)

    def as_json(self) -> dict[str, Any]:
        """What --json writes."""
        return {
            "options": asdict(self.options),
            "machine": asdict(self.machine),
            "not_run": self.not_run,
            "phases": [
                {"contender": name, "data": case.data, "phase": case.phase, "rounds": [asdict(one) for one in found]}
                for name, cases in self.phases.items()
                for case, found in cases.items()
            ],
        }


def speed(phase: Phase) -> float:
    """Bytes a second."""
    return phase.bytes / phase.seconds


def measure(options: Options, contenders: Sequence[str], progress: Callable[[str], None]) -> Results:
    """Measure everything.

    Raises:
        BenchError: there is no room, a result was wrong, or userswap can't run; the text says why.
        Stopped: a signal came.
    """
    place = Path(options.directory) if options.directory else next((p for p in default_places() if p.is_dir()), None)
    if place is None or not place.is_dir():
        raise BenchError(f"{place or 'No place for swap files'} is no directory: name one on a disk with --swap.")
    needed = 2 * options.size
    if (room := shutil.disk_usage(place).free) < needed:
        raise BenchError(
            f"{place} has {format_size(room)} left, and {format_size(needed)} are needed: name another with --swap."
        )
    if (left := available()) < needed:
        raise BenchError(
            f"{format_size(needed)} of RAM are needed, since swap is turned off in the end, and {format_size(left)} "
            "are left: measure with --quick."
        )
    results = Results(options, place, machine(__version__))
    why = why_no_cgroup()
    if why is not None:
        results.not_run["kernel"] = why
    with Stop() as stop, alone(stop):
        warm(["userswap.bench.device_program", "userswap.pool"])
        for turn in range(options.rounds):
            for data in options.data:
                for swapoff in (False, True):
                    for name in contenders:
                        if name in results.not_run:
                            continue
                        progress(f"round {turn + 1} of {options.rounds}: {data}, {CONTENDERS[name]}")
                        try:
                            found = once(results, name, data, stop, swapoff=swapoff, limited=why is None)
                        except BenchError as error:
                            if name == "userswap":
                                raise
                            results.not_run[name] = str(error)
                            continue
                        for phase, one in found.items():
                            if (phase == "swapoff") == swapoff:
                                results.phases.setdefault(name, {}).setdefault(Case(data, phase), []).append(one)
    return results


def once(results: Results, name: str, data: str, stop: Stop, *, swapoff: bool, limited: bool) -> dict[str, Phase]:
    """Run a process under a contender and return its phases."""
    options = results.options
    file = results.place / f"userswap-bench-{os.getpid()}.swap"
    spec = Spec(
        "kernel" if name == "kernel" else "userswap", data, options.size, options.ram - options.ram // OWN,
        f"{file}:{2 * options.size}", name == "encrypt", swapoff, options.seconds,
    )  # fmt: skip
    with ExitStack() as stack:
        cgroup = stack.enter_context(new_cgroup()) if limited else None
        swap = stack.enter_context(kernelswap.swap_file(file, 2 * options.size)) if name == "kernel" else None
        return process(spec, Watched(cgroup, swap, options.ram), stop)


@dataclass
class Watched:
    """What is done for a process when it asks for it."""

    cgroup: Cgroup | None
    swap: Swap | None
    ram: int
    limit: int = 0
    """Of the cgroup now; 0: none."""

    def hear(self, what: str) -> object:
        """Do what it asks for, and return the answer."""
        if what == LIMIT and self.cgroup is not None:
            self.limit = self.cgroup.usage() + self.ram
            self.cgroup.limit(self.limit)
        elif what == UNLIMIT and self.cgroup is not None:
            self.limit = 0
            self.cgroup.unlimit()
        elif what == OFF and self.swap is not None:
            return self.swap.off()
        return 0

    def look(self) -> None:
        """Wake a process that waits for memory."""
        if self.cgroup is not None and self.limit:
            self.cgroup.let_go_on(self.limit)


def process(spec: Spec, watched: Watched, stop: Stop) -> dict[str, Phase]:
    """Run a process to its end."""
    command = [sys.executable, "-m", "userswap.bench.device_program", json.dumps(asdict(spec))]
    if watched.cgroup is not None:
        command = watched.cgroup.entering(command)
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, start_new_session=True
        )
        try:
            last = talk(process, watched, stop)
        finally:
            process.kill()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
            process.wait()
        if last is None:
            said.seek(0)
            why = said.read().strip().rpartition("\n")[2] or f"it ended with {process.returncode}"
            if watched.cgroup is not None and watched.cgroup.killed():
                why = "the kernel killed it, out of memory"
            raise BenchError(f"The run failed: {why}")
    return {name: Phase(**phase) for name, phase in json.loads(last).items()}


def talk(process: "subprocess.Popen[bytes]", watched: Watched, stop: Stop) -> str | None:
    """Do what a process asks for, until its last line, which is returned; None: it ended before that."""
    assert process.stdin is not None
    assert process.stdout is not None
    until = time.monotonic() + MOST_SECONDS
    lines = process.stdout
    while True:
        if select.select([lines], [], [], LOOK_SECONDS)[0]:
            # One line at a time is all it says before it waits for an answer.
            line = lines.readline().decode().strip()
            if not line:
                return None
            if line.startswith("{"):
                return line
            answer = json.dumps(watched.hear(line)) + "\n"
            process.stdin.write(answer.encode())
            process.stdin.flush()
        watched.look()
        stop.heed()
        if time.monotonic() > until:
            raise BenchError(f"It was not done after {MOST_SECONDS:.0f} seconds.")
