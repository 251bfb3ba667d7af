"""The programs of `userswap bench compare`, and the process that runs one: ``python -m userswap.bench.workloads``.

A program makes its data, works on it while the clock runs, and afterwards says what came out, so that it can be
compared with the same program's result in ordinary memory. It is written once: whether its arrays live in ordinary
memory, in userswap, in a mapped file or in Blosc2 is the contender's business (`Memory`). Threads share the work.
"""

import importlib
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
from userswap.lab import machine

__all__ = ["WORKLOADS", "Run", "Spec", "Workload", "anonymous", "run"]

Array = npt.NDArray[np.float64]
BATCH = 4096
"""Random accesses asked for at once."""
RECORD = 128
"""Values in a record of the Zipf workload: 1 KiB."""
THETA = 0.99
FOLIO, PART = 1 << 16, 1 << 14
PACK = 1 << 17
"""Values that `Packed` compresses together: 1 MiB, the fastest of several."""
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
        self.mapped: list[Any] = []
        self.pool: Any = None

    def empty(self, values: int) -> Array:
        """Return a new array of float64, not set to anything."""
        if self.spec.memory == "memmap":
            path = Path(self.spec.directory) / f"userswap-bench-{os.getpid()}.map"
            with path.open("x+b") as file:
                path.unlink()  # however the process ends
                # Its blocks are there before the clock runs, as a swap file's are.
                os.posix_fallocate(file.fileno(), 0, values * 8)
                mapped: Array = np.memmap(file, np.float64, "r+", shape=(values,))
            self.mapped.append(mapped)
            return mapped
        if self.spec.memory == "blosc2":
            import blosc2

            blosc2.set_nthreads(1)
            shape = {"chunks": (CHUNK,), "blocks": (CHUNK // 16,)}
            stored: Array = blosc2.empty((values,), np.float64, **shape, cparams=compression())
            return stored
        if self.spec.memory == "packed":
            return Packed(values)  # type: ignore[return-value]
        return np.empty(values)

    def settle(self) -> None:
        """Have on disk what goes there anyway, before the clock runs: what is read then is not also written."""
        for array in self.mapped:
            array.flush()

    def swapped(self) -> tuple[int, int]:
        """Bytes that were swapped in and out so far, by userswap or by the kernel."""
        if self.pool is not None:
            stats = self.pool.stats()
            return (
                stats.swap_ins * FOLIO + stats.part_ins * PART,
                stats.swap_outs * FOLIO + stats.part_outs * PART,
            )
        counted = kernelswap.counters()
        return counted["pages_in"] * kernelswap.PAGE, counted["pages_out"] * kernelswap.PAGE


class Packed:
    """An array that is there only compressed, to see how fast Blosc2 decompresses. Written and read in whole chunks."""

    def __init__(self, values: int) -> None:
        self.values = values
        self.chunks: dict[int, bytes] = {}
        self.plain = np.empty(PACK)

    def __len__(self) -> int:
        return self.values

    def __setitem__(self, where: slice, values: Array) -> None:
        import blosc2

        for i in range(where.start, where.stop, PACK):
            some = values[i - where.start : i - where.start + PACK]
            self.chunks[i] = blosc2.compress2(some, **compression(), typesize=8, blocksize=1 << 16)

    def __getitem__(self, where: slice) -> Array:
        stop = min(where.stop, self.values)
        return np.concatenate([self.one(i).copy() for i in range(where.start, stop, PACK)])

    def one(self, i: int) -> Array:
        """Decompress the chunk that begins with the i-th value; the array that is returned is always the same."""
        import blosc2

        plain = self.plain[: min(PACK, self.values - i)]
        blosc2.decompress2(self.chunks[i], dst=plain, nthreads=1)
        return plain

    def decompress(self) -> None:
        """Decompress everything, in order."""
        for i in self.chunks:
            self.one(i)


def compression() -> dict[str, Any]:
    """Compression as userswap does it."""
    import blosc2

    return {"codec": blosc2.Codec.LZ4, "clevel": 1, "filters": [blosc2.Filter.BITSHUFFLE], "nthreads": 1}


class Workload(NamedTuple):
    """A program: what it makes, what it does while the clock runs, what came out."""

    text: str
    unit: str
    """What a figure of it is: GB/s, MB/s, or µs an access."""
    prepare: Callable[[Memory], Any]
    work: Callable[[Memory, Any], float]
    """Returns how much was done: bytes or accesses."""
    result: Callable[[Any], Any]
    runs_on: tuple[str, ...]
    why_not: str = ""
    """Why it does not run on memmap and blosc2, if it does not."""

    needs: tuple[str, ...] = ()
    """Packages beyond those that userswap needs."""

    def figure(self, amount: float, seconds: float) -> float:
        """Return what was done in so many seconds, in its unit."""
        return seconds / amount * 1e6 if self.unit == "µs" else amount / seconds / {"GB/s": 1e9, "MB/s": 1e6}[self.unit]


IN_RAM = ("plain", "userswap")
MAPPED = (*IN_RAM, "memmap")
EVERYWHERE = (*MAPPED, "blosc2")
PACKED = (*EVERYWHERE, "packed")
NEEDED_BY = {"blosc2": ("blosc2",), "packed": ("blosc2",)}
NOT_STORED = "it works on arrays in memory, not on stored ones"


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
    if isinstance(array, Packed):
        for _ in range(PASSES):
            array.decompress()
        return len(array) * 8.0 * PASSES
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


# ---- sort ----


def sort_work(memory: Memory, state: dict[str, Any]) -> float:
    array = state["array"]

    def one(n: int) -> None:
        pieces = part(memory, len(array), n)
        array[pieces.start : pieces.stop].sort()

    in_threads(memory, one)
    return len(array) * 8.0


# ---- blocked matrix product: a panel of rows times a large square matrix, in tiles that lie together ----

TILE = 256
PANELS = 4


def product_prepare(memory: Memory) -> dict[str, Any]:
    # tiles * tiles of the square, PANELS * tiles of each panel
    number = memory.spec.size // (TILE * TILE * 8)
    tiles = max(int((PANELS * PANELS + number) ** 0.5) - PANELS, memory.spec.threads)
    shapes = {"square": (tiles, tiles), "panel": (PANELS, tiles), "product": (PANELS, tiles)}
    state = {}
    filler = Filler(memory.spec.data)
    for turn, (name, shape) in enumerate(shapes.items()):
        array = memory.empty(shape[0] * shape[1] * TILE * TILE)
        if name != "product":
            filler.fill(array, turn)
        state[name] = array.reshape(*shape, TILE, TILE)
    return state


def product_work(memory: Memory, state: dict[str, Any]) -> float:
    square, panel, product = state["square"], state["panel"], state["product"]
    tiles = len(square)

    def one(n: int) -> None:
        found, partial = np.empty((TILE, TILE)), np.empty((TILE, TILE))
        for i in range(PANELS):
            for j in part(memory, tiles, n, 1):
                found[:] = 0
                for k in range(tiles):
                    # The square is stored by columns of tiles, in the order in which they are needed.
                    np.matmul(panel[i, k], square[j, k], out=partial)
                    np.add(found, partial, out=found)
                product[i, j] = found

    in_threads(memory, one)
    return float(PANELS * square.nbytes)


# ---- k-means ----

DIMENSIONS = 16
CENTERS = 8
ITERATIONS = 3
ROWS = 1 << 13


def kmeans_prepare(memory: Memory) -> dict[str, Any]:
    array = memory.empty(memory.spec.size // 8 // DIMENSIONS * DIMENSIONS)
    Filler(memory.spec.data).fill(array)
    return {"points": array.reshape(-1, DIMENSIONS)}


def kmeans_work(memory: Memory, state: dict[str, Any]) -> float:
    points = state["points"]
    centers = np.array(points[:: len(points) // CENTERS][:CENTERS])
    for _ in range(ITERATIONS):

        def one(n: int, centers: Array = centers) -> tuple[Array, Array]:
            total, number = np.zeros((CENTERS, DIMENSIONS)), np.zeros(CENTERS)
            for i in part(memory, len(points), n, ROWS):
                some = points[i : i + ROWS]
                nearest = ((centers**2).sum(axis=1) - 2 * (some @ centers.T)).argmin(axis=1)
                belongs = (nearest[:, None] == np.arange(CENTERS)).astype(np.float64)
                total += belongs.T @ some
                number += belongs.sum(axis=0)
            return total, number

        found = in_threads(memory, one)
        total, number = (sum(parts[i] for parts in found) for i in (0, 1))
        centers = total / np.maximum(number, 1)[:, None]
    state["centers"] = centers
    return float(ITERATIONS * points.nbytes)


# ---- pandas groupby ----

GROUPS = 1000
COLUMNS = 3
# Bytes for each row: keys, columns, and what pandas makes of them on the way.
BYTES_A_ROW = 8 * (1 + COLUMNS) + 16


def groupby_prepare(memory: Memory) -> dict[str, Any]:
    rows = memory.spec.size // BYTES_A_ROW
    keys = memory.empty(rows).view(np.int64)
    generator = np.random.default_rng(3)
    for i in range(0, rows, ROWS):
        keys[i : i + ROWS] = generator.integers(0, GROUPS, min(ROWS, rows - i))
    columns = [memory.empty(rows) for _ in range(COLUMNS)]
    filler = Filler(memory.spec.data)
    for turn, column in enumerate(columns):
        filler.fill(column, turn * -(-rows // STEP))
    return {"keys": keys, "columns": columns}


def groupby_work(memory: Memory, state: dict[str, Any]) -> float:
    import pandas as pd

    keys, columns = state["keys"], state["columns"]

    def one(n: int) -> Array:
        rows = part(memory, len(keys), n)
        here = slice(rows.start, rows.stop)
        frame = pd.DataFrame(
            {"key": keys[here], **{f"c{i}": column[here] for i, column in enumerate(columns)}}, copy=False
        )
        found: Array = frame.groupby("key").agg(["mean", "max"]).to_numpy()
        return found

    state["found"] = in_threads(memory, one)
    return float(len(keys) * 8 * (1 + COLUMNS))


# ---- suffixes of a text: all sorted by their first letters, then ranks of a bucket of them ----

LETTERS = 7
LETTER_BITS = 5
PLACE_BITS = 28
BUCKETS = 256
"""Of one in so many suffixes the rank is written: suffix sorters go on bucket by bucket."""
SUFFIX_BYTES = 1 + 8 + 4
"""For each letter: itself, its suffix's key and place, its rank."""


def suffix_prepare(memory: Memory) -> dict[str, Any]:
    length = min(memory.spec.size // SUFFIX_BYTES, 1 << PLACE_BITS)
    text = memory.empty(-(-length // 8)).view(np.uint8)[:length]
    ranks = memory.empty(-(-length // 2)).view(np.int32)[:length]
    # Words from a vocabulary, some far more often, with a space (0) between.
    generator = np.random.default_rng(5)
    words = [generator.integers(1, 27, n, dtype=np.uint8) for n in generator.integers(2, 10, 5000)]
    words = [np.append(word, np.uint8(0)) for word in words]
    written = 0
    while written < length:
        drawn = np.minimum(generator.zipf(1.3, ROWS), len(words)) - 1
        some = np.concatenate([words[i] for i in drawn])[: length - written]
        text[written : written + len(some)] = some
        written += len(some)
    return {"text": text, "ranks": ranks, "keys": memory.empty(length).view(np.int64)}


def suffix_work(memory: Memory, state: dict[str, Any]) -> float:
    text, keys, ranks = state["text"], state["keys"], state["ranks"]

    def one(n: int) -> None:
        """Each thread has a text of its own."""
        places = part(memory, len(text), n)
        mine, mine_keys, mine_ranks = (array[places.start : places.stop] for array in (text, keys, ranks))
        last = len(mine) - LETTERS + 1  # the last suffixes are too short: they come first
        mine_keys[last:] = np.arange(last, len(mine))
        mine_ranks[:] = 0
        for i in range(0, last, CHUNK):
            end = min(i + CHUNK, last)
            key = np.zeros(end - i, np.int64)
            for letter in range(LETTERS):
                key = key << LETTER_BITS | mine[i + letter : end + letter]
            mine_keys[i:end] = key << PLACE_BITS | np.arange(i, end)
        mine_keys.sort()
        first = len(mine_keys) // 2
        bucket = mine_keys[first : first + len(mine_keys) // BUCKETS]
        for i in range(0, len(bucket), BATCH):
            some = bucket[i : i + BATCH]
            mine_ranks[some & ((1 << PLACE_BITS) - 1)] = np.arange(first + i, first + i + len(some))

    in_threads(memory, one)
    return float(len(text))


# ---- what came out ----


def sums(state: dict[str, Any]) -> Any:
    """Sums of what was read, and a digest: reading must not have changed anything."""
    array = state["array"]
    if isinstance(array, Packed):
        state["sums"] = [sum(float(array[i : i + STEP].sum()) for i in range(0, len(array), STEP))] * PASSES
    return [state["sums"], digest(array)]


def content(state: dict[str, Any]) -> Any:
    """A digest of the array."""
    return digest(state["array"])


def suffixes(state: dict[str, Any]) -> Any:
    """A digest of ranks and keys."""
    return [digest(whole_words(state["ranks"])), digest(state["keys"])]


def whole_words(array: Any) -> Any:
    """Return an array of smaller values, without the last ones, as float64 of the same bytes."""
    values = 8 // array.itemsize
    return array[: len(array) // values * values].view(np.float64)


WORKLOADS: dict[str, Workload] = {
    "fill": Workload("write an array for the first time", "GB/s", fill_prepare, fill_work, content, EVERYWHERE),
    "scan": Workload("read everything in order, three times", "GB/s", array_prepare, scan_work, sums, PACKED),
    "random read": Workload("read single values anywhere", "µs", random_prepare, read_work, sums, EVERYWHERE),
    "random write": Workload("write single values anywhere", "µs", random_prepare, write_work, content, EVERYWHERE),
    "zipf read": Workload("read values, some far more often", "µs", zipf_prepare, read_work, sums, EVERYWHERE),
    "update": Workload("add one to everything, in place", "GB/s", array_prepare, update_work, content, EVERYWHERE),
    "sort": Workload("sort in place", "GB/s", array_prepare, sort_work, content, MAPPED, NOT_STORED),
    "product": Workload(
        "multiply matrices in blocks",
        "GB/s",
        product_prepare,
        product_work,
        lambda state: [digest(state["product"].reshape(-1)), digest(state["square"].reshape(-1))],
        MAPPED,
        NOT_STORED,
    ),
    "k-means": Workload(
        "three rounds of k-means",
        "GB/s",
        kmeans_prepare,
        kmeans_work,
        lambda state: [state["centers"].tolist(), digest(state["points"].reshape(-1))],
        MAPPED,
        NOT_STORED,
    ),
    "groupby": Workload(
        "mean and most of columns by a key, with pandas",
        "GB/s",
        groupby_prepare,
        groupby_work,
        lambda state: [[found.tolist() for found in state["found"]], *map(digest, state["columns"])],
        IN_RAM,
        "pandas makes its own arrays, in RAM",
        ("pandas",),
    ),
    "suffix ranks": Workload(
        "sort all suffixes of a text by their first letters, and write ranks",
        "MB/s",
        suffix_prepare,
        suffix_work,
        suffixes,
        MAPPED,
        NOT_STORED,
    ),
}


# ---- the process ----


def in_use(spec: Spec) -> int:
    """Bytes that the process, or its cgroup, uses now."""
    return int(Path(spec.usage).read_text()) if spec.usage else anonymous(os.getpid())


def anonymous(pid: int) -> int:
    """Bytes of anonymous memory that a process has in place; 0 once it has ended."""
    try:
        return int((machine.field(f"/proc/{pid}/status", "RssAnon") or "0 kB").split()[0]) << 10
    except (FileNotFoundError, ProcessLookupError):
        return 0


@contextmanager
def place(memory: Memory) -> Iterator[None]:
    """Have arrays where the spec wants them."""
    if memory.spec.memory != "userswap":
        yield
        return
    import userswap

    with userswap.install(ram=memory.spec.ram, swap=memory.spec.directory) as installed:
        memory.pool = installed.pool
        yield


def run(spec: Spec) -> Run:
    """Run a workload in this process."""
    workload = WORKLOADS[spec.workload]
    memory = Memory(spec)
    for package in (*workload.needs, *NEEDED_BY.get(spec.memory, ())):
        importlib.import_module(package)
    base = in_use(spec)
    with place(memory):
        began = time.perf_counter()
        state = workload.prepare(memory)
        memory.settle()
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
