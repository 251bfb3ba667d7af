"""The programs of `userswap bench compare`, and the process that runs one: ``python -m userswap.bench.workloads``.

A program makes its data, works on it while the clock runs, and afterwards says what came out, so that it can be
compared with the same program's result in ordinary memory. It is written once: whether its arrays live in ordinary
memory, in userswap, in a mapped file or in Blosc2 is the contender's business (`Memory`). Threads share the work.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from userswap.bench import kernelswap
from userswap.bench.data import STEP, Filler, digest

__all__ = ["WORKLOADS", "Run", "Spec", "Workload", "run"]

Array = npt.NDArray[np.float64]
BATCH = 4096
"""Random accesses asked for at once."""
RECORD = 128
"""Values in a record of the Zipf workload: 1 KiB."""
THETA = 0.99
FOLIO = 1 << 16
CHUNK = 1 << 16
"""Values that an NDArray compresses together, in 16 blocks: 512 KiB."""


@dataclass(frozen=True)
class Spec:
    """What a process is to do."""

    memory: str
    """Where arrays live: plain, userswap, memmap, blosc2."""
    workload: str
    size: int
    """Bytes of arrays."""
    ram: int
    """Budget of userswap."""
    data: str = "2:1"
    threads: int = 1
    directory: str = "/var/tmp"
    """Where files may be made: of memmap, and userswap's swap file."""
    usage: str = ""
    """File that says how much memory the process's cgroup uses; empty: there is none."""


@dataclass
class Run:
    """What a process found. Seconds, CPU and swapping are of the timed part alone."""

    base: int
    """Bytes in use before there was any array."""
    seconds: float
    amount: float
    """How much was done, in bytes or accesses."""
    cpu_seconds: float
    kernel_seconds: float
    """CPU time of the kernel's own swapping threads."""
    swapped_in: int
    """Bytes."""
    swapped_out: int
    prepare_seconds: float
    result: Any
    figures: dict[str, int] = field(default_factory=dict)
    """What userswap says of itself."""


class Memory:
    """Where a workload's arrays live."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.files: list[Path] = []
        self.pool: Any = None

    def empty(self, values: int) -> Array:
        """Return a new array of float64, not set to anything."""
        if self.spec.memory == "memmap":
            self.files.append(Path(self.spec.directory) / f"userswap-bench-{os.getpid()}-{len(self.files)}.map")
            # Its blocks are there before the clock runs, as a swap file's are.
            with self.files[-1].open("xb") as file:
                os.posix_fallocate(file.fileno(), 0, values * 8)
            return np.memmap(self.files[-1], np.float64, "r+", shape=(values,))
        if self.spec.memory == "blosc2":
            import blosc2

            blosc2.set_nthreads(1)
            shape = {"chunks": (CHUNK,), "blocks": (CHUNK // 16,)}
            stored: Array = blosc2.empty((values,), np.float64, **shape, cparams=compression())
            return stored
        return np.empty(values)

    def swapped(self) -> tuple[int, int]:
        """Bytes that were swapped in and out so far, by userswap or by the kernel."""
        if self.pool is not None:
            stats = self.pool.stats()
            return stats.swap_ins * FOLIO, stats.swap_outs * FOLIO
        counted = kernelswap.counters()
        return counted["pages_in"] * kernelswap.PAGE, counted["pages_out"] * kernelswap.PAGE


def compression() -> dict[str, Any]:
    """Compression as userswap does it."""
    import blosc2

    return {"codec": blosc2.Codec.LZ4, "clevel": 1, "filters": [blosc2.Filter.BITSHUFFLE], "nthreads": 1}


class Workload(NamedTuple):
    """A program: what it makes, what it does while the clock runs, what came out."""

    text: str
    unit: str
    """What a figure of it is: GB/s, or µs an access."""
    prepare: Callable[[Memory], Any]
    work: Callable[[Memory, Any], float]
    """Returns how much was done: bytes or accesses."""
    result: Callable[[Any], Any]
    runs_on: tuple[str, ...]
    why_not: str = ""
    """Why it does not run on the others."""


EVERYWHERE = ("plain", "userswap", "memmap", "blosc2")


# ---- parts ----


def in_threads(memory: Memory, work: Callable[[int], Any]) -> list[Any]:
    """Do `work(i)` in as many threads as there are to be, and return what they returned."""
    threads = memory.spec.threads
    results: list[Any] = [None] * threads
    errors: list[BaseException] = []

    def one(i: int) -> None:
        try:
            results[i] = work(i)
        except BaseException as error:
            errors.append(error)

    if threads == 1:
        return [work(0)]
    started = [Thread(target=one, args=(i,)) for i in range(threads)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    if errors:
        raise errors[0]
    return results


def part(memory: Memory, length: int, i: int, unit: int = STEP) -> range:
    """Return where the i-th thread's pieces of `unit` values begin."""
    pieces = -(-length // unit)
    threads = memory.spec.threads
    return range(pieces * i // threads * unit, min(pieces * (i + 1) // threads * unit, length), unit)


def filled(memory: Memory) -> Array:
    """Return an array that takes all the bytes there are."""
    array = memory.empty(memory.spec.size // 8)
    Filler(memory.spec.data).fill(array)
    return array


# ---- fill ----


def fill_prepare(memory: Memory) -> dict[str, Any]:
    return {"filler": Filler(memory.spec.data)}


def fill_work(memory: Memory, state: dict[str, Any]) -> float:
    array = state["array"] = memory.empty(memory.spec.size // 8)

    def one(i: int) -> None:
        pieces = part(memory, len(array), i)
        state["filler"].fill(array[pieces.start : pieces.stop], pieces.start // STEP)

    if memory.spec.threads == 1:
        state["filler"].fill(array)
    else:
        in_threads(memory, one)
    return len(array) * 8.0


# ---- scan, update ----

PASSES = 3


def scan_work(memory: Memory, state: dict[str, Any]) -> float:
    array = state["array"]
    sums = [
        sum(in_threads(memory, lambda n: sum(float(array[i : i + STEP].sum()) for i in part(memory, len(array), n))))
        for _ in range(PASSES)
    ]
    state["sums"] = sums
    return len(array) * 8.0 * PASSES


def update_work(memory: Memory, state: dict[str, Any]) -> float:
    array = state["array"]

    def one(n: int) -> None:
        for i in part(memory, len(array), n):
            array[i : i + STEP] += 1

    in_threads(memory, one)
    return len(array) * 8.0


def array_prepare(memory: Memory) -> dict[str, Any]:
    return {"array": filled(memory)}


# ---- random accesses ----


def batches(memory: Memory, places: Callable[[np.random.Generator, int], npt.NDArray[np.int64]]) -> list[list[Any]]:
    """Return, for each thread, batches of places: one access for each two pages."""
    number = max(memory.spec.size // 8192 // BATCH // memory.spec.threads, 2)
    generators = [np.random.default_rng(100 + n) for n in range(memory.spec.threads)]
    return [[places(generator, BATCH) for _ in range(number)] for generator in generators]


def random_prepare(memory: Memory) -> dict[str, Any]:
    length = memory.spec.size // 8
    return {
        "places": batches(memory, lambda generator, n: generator.integers(0, length, n)),
        "array": filled(memory),
    }


def zipf_prepare(memory: Memory) -> dict[str, Any]:
    records = memory.spec.size // 8 // RECORD
    # Popularity by rank; which record has which rank is drawn, so that popular ones are everywhere.
    until = np.cumsum(1 / np.arange(1, records + 1) ** THETA)
    order = np.random.default_rng(7).permutation(records)

    def places(generator: np.random.Generator, n: int) -> npt.NDArray[np.int64]:
        ranks = np.minimum(np.searchsorted(until, generator.random(n) * until[-1]), records - 1)
        found: npt.NDArray[np.int64] = order[ranks] * RECORD + generator.integers(0, RECORD, n)
        return found

    drawn = batches(memory, places)
    return {"places": drawn, "array": filled(memory)}


def read_work(memory: Memory, state: dict[str, Any]) -> float:
    array, places = state["array"], state["places"]
    sums = in_threads(memory, lambda n: sum(float(array[batch].sum()) for batch in places[n]))
    state["sums"] = sums
    return float(sum(len(batch) for batch in places for batch in batch))


def write_work(memory: Memory, state: dict[str, Any]) -> float:
    array, places = state["array"], state["places"]

    def one(n: int) -> None:
        for batch in places[n]:
            # The value says its place, so that it does not matter who of two threads was first.
            array[batch] = batch

    in_threads(memory, one)
    return float(sum(len(batch) for batch in places for batch in batch))


# ---- what came out ----


def sums(state: dict[str, Any]) -> Any:
    """Sums of what was read, and a digest: reading must not have changed anything."""
    return [state["sums"], digest(state["array"])]


def content(state: dict[str, Any]) -> Any:
    """A digest of the array."""
    return digest(state["array"])


WORKLOADS: dict[str, Workload] = {
    "fill": Workload("write an array for the first time", "GB/s", fill_prepare, fill_work, content, EVERYWHERE),
    "scan": Workload("read everything in order, three times", "GB/s", array_prepare, scan_work, sums, EVERYWHERE),
    "random read": Workload("read single values anywhere", "µs", random_prepare, read_work, sums, EVERYWHERE),
    "random write": Workload("write single values anywhere", "µs", random_prepare, write_work, content, EVERYWHERE),
    "zipf read": Workload("read values, some far more often", "µs", zipf_prepare, read_work, sums, EVERYWHERE),
    "update": Workload("add one to everything, in place", "GB/s", array_prepare, update_work, content, EVERYWHERE),
}


# ---- the process ----


def in_use(spec: Spec) -> int:
    """Bytes that the process, or its cgroup, uses now."""
    if spec.usage:
        return int(Path(spec.usage).read_text())
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["RssAnon"].split()[0]) << 10


@contextmanager
def place(memory: Memory) -> Iterator[None]:
    """Have arrays where the spec wants them."""
    if memory.spec.memory != "userswap":
        try:
            yield
        finally:
            for file in memory.files:
                file.unlink(missing_ok=True)
        return
    import userswap

    with userswap.install(ram=memory.spec.ram, swap=memory.spec.directory) as installed:
        memory.pool = installed.pool
        yield


def run(spec: Spec) -> Run:
    """Run a workload in this process."""
    workload = WORKLOADS[spec.workload]
    memory = Memory(spec)
    base = in_use(spec)
    with place(memory):
        began = time.perf_counter()
        state = workload.prepare(memory)
        prepared = time.perf_counter() - began
        swapped, used = memory.swapped(), resource.getrusage(resource.RUSAGE_SELF)
        kernel = kernelswap.kswapd_ms()
        began = time.perf_counter()
        amount = workload.work(memory, state)
        seconds = time.perf_counter() - began
        kernel = kernelswap.kswapd_ms() - kernel
        after, spent = memory.swapped(), resource.getrusage(resource.RUSAGE_SELF)
        figures = memory.pool.stats().as_dict() if memory.pool is not None else {}
        return Run(
            base=base,
            seconds=seconds,
            amount=amount,
            cpu_seconds=spent.ru_utime + spent.ru_stime - used.ru_utime - used.ru_stime,
            kernel_seconds=kernel / 1000,
            swapped_in=after[0] - swapped[0],
            swapped_out=after[1] - swapped[1],
            prepare_seconds=prepared,
            result=workload.result(state),
            figures=figures,
        )


if __name__ == "__main__":
    print(json.dumps(asdict(run(Spec(**json.loads(sys.argv[1]))))))
