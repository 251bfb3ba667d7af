"""The program of `userswap bench devices`, a process of its own: ``python -m userswap.bench.device_program SPEC``.

An array larger than its memory, which is ordinary memory or that of a pool: written and read, in order and anywhere, a
page at a time, and in the end compared with what was put into it. What the process that started it has to do meanwhile
it asks for by a line on standard output, and goes on after a line on standard input. Its last line is what it found.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from userswap.bench import kernelswap
from userswap.bench.data import PAGE, STEP, Array, Filler

__all__ = ["LIMIT", "OFF", "PHASES", "UNLIMIT", "Phase", "Spec"]

LIMIT, UNLIMIT, OFF = "limit", "unlimit", "off"
"""What it asks for: its memory to be limited, or no more; its swap to be turned off."""
BYTES = PAGE * 8
BATCH = 256
"""Random pages at a time; what is to be written to them is made while the clock stands."""
PHASES = {
    "write in order": "swap-out, sequential",
    "read in order": "swap-in, sequential",
    "read anywhere": "swap-in, random",
    "write anywhere": "swap-out and swap-in, random",
    "swapoff": "swapoff",
}


@dataclass(frozen=True)
class Spec:
    """What it is to do; sizes are bytes."""

    memory: str
    """kernel: ordinary memory, and the kernel swaps; userswap: a pool's."""
    data: str
    size: int
    ram: int
    """Budget of the pool."""
    swap: str
    """Its swap file."""
    encrypt: bool
    swapoff: bool
    """Whether to turn swap off once the array is in it, and nothing else."""
    seconds: float
    """For random accesses of one kind, about."""


@dataclass
class Phase:
    """What one of the phases took."""

    seconds: float
    bytes: int
    """Of the array."""
    cpu_seconds: float
    """Of the process, and of the kernel's swapping threads."""
    p50_us: float = 0.0
    """Of one access, where these were timed one by one."""
    p99_us: float = 0.0


@dataclass
class Clock:
    """Time of the clock and of the processors, as far as it runs."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what happens in a `with` block."""
        cpu, began = processor(), time.perf_counter()
        yield
        self.seconds += time.perf_counter() - began
        self.cpu_seconds += processor() - cpu


def processor() -> float:
    """Seconds of processor time so far: of this process, and of the kernel's threads that swap."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime + kernelswap.kswapd_ms() / 1e3


def ask(what: str) -> Any:
    """Have the process that started this one do something; return what it answers."""
    print(what, flush=True)
    line = sys.stdin.readline()
    if not line:
        raise SystemExit("The process that started this one is gone.")
    return json.loads(line)


@dataclass
class Content:
    """What is in the array: of each page, what it was filled with, moved round by as many values as it was written."""

    filler: Filler
    versions: np.ndarray[Any, np.dtype[np.int64]]

    def row(self, page: int) -> Array:
        """What the page holds."""
        turn, at = divmod(page * PAGE, STEP)
        level = 1 + self.filler.levels[turn % len(self.filler.levels)]
        row: Array = self.filler.moved(self.filler.pieces[turn % len(self.filler.pieces)][at : at + PAGE], level)
        return np.roll(row, self.versions[page])

    def check(self, array: Array) -> None:
        """Raise SystemExit if the array holds anything else."""
        right = np.empty(STEP)
        for turn, i in enumerate(range(0, len(array), STEP)):
            part = right[: len(array) - i]
            self.filler.piece(turn, part)
            for page in np.flatnonzero(self.versions[i // PAGE : (i + len(part)) // PAGE]) + i // PAGE:
                part[page * PAGE - i : (page + 1) * PAGE - i] = self.row(int(page))
            if not np.array_equal(array[i : i + STEP].view(np.uint64), part.view(np.uint64)):
                raise SystemExit("An array has other values than were put into it: please report this.")


@dataclass
class Program:
    """One run."""

    spec: Spec
    phases: dict[str, Phase] = field(default_factory=dict)

    def run(self) -> dict[str, Any]:
        """Do everything, and return what --json has of it."""
        spec = self.spec
        pages = spec.size // BYTES
        self.content = Content(Filler(spec.data), np.zeros(pages, np.int64))
        self.content.check(np.empty(0))
        ask(LIMIT)
        pool = None
        if spec.memory == "userswap":
            from userswap.pool import Pool

            # Without the compressed pool: it is the file that is measured.
            tiers = None if spec.swapoff else "file"
            pool = Pool(spec.ram, spec.swap, tiers=tiers, encrypt=spec.encrypt, control=False)
        array: Array = (pool or np).empty(pages * PAGE)
        with self.noted("write in order", spec.size):
            self.content.filler.fill(array)
        if spec.swapoff:
            self.swapoff(pool)
        else:
            # Once for nothing: it takes what was written last out to the file. What comes then is only read.
            self.read(array)
            with self.noted("read in order", spec.size):
                self.read(array)
            self.read_anywhere(array)
            self.write_anywhere(array)
        ask(UNLIMIT)
        self.content.check(array)
        del array
        if pool is not None:
            pool.close()
        return {name: asdict(phase) for name, phase in self.phases.items()}

    @contextmanager
    def noted(self, name: str, size: int) -> Iterator[None]:
        """Time a phase as a whole."""
        clock = Clock()
        with clock.running():
            yield
        self.phases[name] = Phase(clock.seconds, size, clock.cpu_seconds)

    def read(self, array: Array) -> None:
        """Touch every page, in order."""
        for i in range(0, len(array), STEP):
            array[i : i + STEP : PAGE].sum()

    def read_anywhere(self, array: Array) -> None:
        """Touch pages anywhere, one by one."""
        draw = np.random.default_rng(1)
        clock = Clock()
        took: list[int] = []
        while clock.seconds < self.spec.seconds:
            places = (draw.integers(0, len(array) // PAGE, BATCH) * PAGE).tolist()
            with clock.running():
                for place in places:
                    began = time.perf_counter_ns()
                    array[place]
                    took.append(time.perf_counter_ns() - began)
        p50, p99 = np.percentile(took, (50, 99)) / 1e3
        size = len(took) * BYTES
        self.phases["read anywhere"] = Phase(clock.seconds, size, clock.cpu_seconds, float(p50), float(p99))

    def write_anywhere(self, array: Array) -> None:
        """Write whole pages anywhere. Only from when what is in place has all been written to does it count."""
        draw = np.random.default_rng(2)
        versions = self.content.versions
        warm, clock, pages = self.spec.ram // BYTES, Clock(), 0
        while clock.seconds < self.spec.seconds:
            places = np.unique(draw.integers(0, len(versions), BATCH))
            versions[places] += 1
            rows = [(place * PAGE, self.content.row(place)) for place in places.tolist()]
            with clock.running():
                for place, row in rows:
                    array[place : place + PAGE] = row
            if warm > 0:
                warm -= len(rows)
                clock = Clock()
            else:
                pages += len(rows)
        self.phases["write anywhere"] = Phase(clock.seconds, pages * BYTES, clock.cpu_seconds)

    def swapoff(self, pool: Any) -> None:
        """Turn swap off while the array is in it, with room for it in RAM."""
        clock = Clock()
        if pool is None:
            ask(UNLIMIT)
            with clock.running():
                seconds = ask(OFF)
            self.phases["swapoff"] = Phase(seconds, self.spec.size, clock.cpu_seconds)
            return
        pool.evict()
        # What is packed in RAM goes to the file, too, until there is no more.
        while pool.writeback(1 << 30):
            pass
        ask(UNLIMIT)
        pool.ram = pool.ram + 2 * self.spec.size
        with clock.running():
            pool.swapoff(self.spec.swap.partition(":")[0])
        self.phases["swapoff"] = Phase(clock.seconds, self.spec.size, clock.cpu_seconds)


if __name__ == "__main__":
    found = Program(Spec(**json.loads(sys.argv[1]))).run()
    print(json.dumps(found), flush=True)
    # Nothing is left to be done that would take time.
    os._exit(0)
