"""The programs of `userswap bench compare`, and the process that runs one: ``python -m userswap.bench.workloads``.

A program makes its data, works on it while the clock runs, and afterwards says what came out, so that it can be
compared with the same program's result in ordinary memory. It is written once: whether its arrays live in ordinary
memory, in userswap, in a mapped file or in Blosc2 is the contender's business (`Memory`). Threads share the work.

Work that is a repetition is done in steps, each as much as all before it, until enough time has passed: 1, 2, 4, 8 ..
units. So whoever is slow does less, and there are amounts at which any two can be compared.
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
from userswap.bench.fault_times import fault_times, percentile

__all__ = ["ARRAYS", "CLOCK", "DONE", "WORKLOADS", "Run", "Spec", "Workload", "run"]

Array = npt.NDArray[np.float64]
BATCH = 4096
"""Random accesses asked for at once, at most."""
UNITS = 64
"""In so many units a random workload makes one access for each two pages."""
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
    seconds: float = 0.0
    """Work that is a repetition ends with the step that takes it beyond this."""
    most: int = 0
    """Units at most; 0: as many as the workload has."""
    reference: bool = False
    """Whether to say what comes out after any number of steps."""
    tell: int = -1
    """File descriptor where the harness is told how far the process is (`told`); -1: there is none."""
    go: int = -1
    """And where it says that it has done its part."""
    readahead: bool = True
    """Whether userswap has its thread."""


@dataclass
class Run:
    """What a process found. Seconds, CPU and swapping are of the timed part alone."""

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
    units: int
    marks: dict[str, float]
    """Seconds after each step, by the units that were done by then."""
    results: dict[str, Any] = field(default_factory=dict)
    """Of a reference: what comes out after so many units."""
    figures: dict[str, int] = field(default_factory=dict)
    """What userswap says of itself; `fault_ns_p...` are of the timed part."""


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
    work: Callable[[Memory, Any, range], float]
    """Does these units, and returns how much that was: bytes or accesses."""
    result: Callable[[Any], Any]
    runs_on: tuple[str, ...]
    why_not: str = ""
    """Why it does not run on memmap and blosc2, if it does not."""

    needs: tuple[str, ...] = ()
    """Packages beyond those that userswap needs."""
    most: int = 1
    """Units; 1: it is done as a whole."""
    warm: Callable[[Memory, Any], Any] | None = None
    """What is done before the clock runs, so that all begin alike."""
    draw: Callable[[Memory, Any, range], None] | None = None
    """What of a step is done while the clock stands."""

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


def fill_work(memory: Memory, state: dict[str, Any], units: range) -> float:
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

SCANS, UPDATES = 64, 8
"""Passes at most."""


def scan_work(memory: Memory, state: dict[str, Any], units: range) -> float:
    array = state["array"]
    for _ in units:
        if isinstance(array, Packed):
            array.decompress()
            state["passes"] = units.stop
        else:
            state.setdefault("sums", []).append(scan(memory, array))
    return len(array) * 8.0 * len(units)


def scan(memory: Memory, array: Array) -> float:
    """Read everything once, in order."""
    found = in_threads(memory, lambda n: sum(float(array[i : i + STEP].sum()) for i in part(memory, len(array), n)))
    return float(sum(found))


def scan_warm(memory: Memory, state: dict[str, Any]) -> None:
    """One pass, in which what was made is stored for the first time: the scan is what comes then."""
    if not isinstance(state["array"], Packed):
        scan(memory, state["array"])


def update_work(memory: Memory, state: dict[str, Any], units: range) -> float:
    array = state["array"]

    def one(n: int) -> None:
        for i in part(memory, len(array), n):
            array[i : i + STEP] += 1

    for _ in units:
        in_threads(memory, one)
    return len(array) * 8.0 * len(units)


def array_prepare(memory: Memory) -> dict[str, Any]:
    return {"array": filled(memory)}


# ---- random accesses ----


Places = Callable[[np.random.Generator, int], npt.NDArray[np.int64]]


def random_prepare(memory: Memory) -> dict[str, Any]:
    length = memory.spec.size // 8
    return access_prepare(memory, lambda generator, n: generator.integers(0, length, n))


def zipf_prepare(memory: Memory) -> dict[str, Any]:
    records = memory.spec.size // 8 // RECORD
    # Popularity by rank; which record has which rank is drawn, so that popular ones are everywhere.
    until = np.cumsum(1 / np.arange(1, records + 1) ** THETA)
    order = np.random.default_rng(7).permutation(records)

    def places(generator: np.random.Generator, n: int) -> npt.NDArray[np.int64]:
        ranks = np.minimum(np.searchsorted(until, generator.random(n) * until[-1]), records - 1)
        found: npt.NDArray[np.int64] = order[ranks] * RECORD + generator.integers(0, RECORD, n)
        return found

    return access_prepare(memory, places)


def access_prepare(memory: Memory, places: Places) -> dict[str, Any]:
    generators = [np.random.default_rng(100 + n) for n in range(memory.spec.threads)]
    return {"draw": places, "generators": generators, "array": filled(memory)}


def access_draw(memory: Memory, state: dict[str, Any], units: range) -> None:
    """Draw the places of a step: for each thread, batches of them."""
    number = max(memory.spec.size // 8192 // UNITS // memory.spec.threads, 2) * len(units)
    drawn = [state["draw"](generator, number) for generator in state["generators"]]
    state["places"] = [[some[i : i + BATCH] for i in range(0, number, BATCH)] for some in drawn]


def read_work(memory: Memory, state: dict[str, Any], units: range) -> float:
    array, places = state["array"], state["places"]
    sums = in_threads(memory, lambda n: sum(float(array[batch].sum()) for batch in places[n]))
    state.setdefault("sums", []).append(sums)
    return float(sum(len(batch) for batch in places for batch in batch))


def write_work(memory: Memory, state: dict[str, Any], units: range) -> float:
    array, places = state["array"], state["places"]

    def one(n: int) -> None:
        for batch in places[n]:
            # The value says its place, so that it does not matter who of two threads was first.
            array[batch] = batch

    in_threads(memory, one)
    return float(sum(len(batch) for batch in places for batch in batch))


# ---- sort ----


def sort_work(memory: Memory, state: dict[str, Any], units: range) -> float:
    array = state["array"]

    def one(n: int) -> None:
        pieces = part(memory, len(array), n)
        array[pieces.start : pieces.stop].sort()

    in_threads(memory, one)
    return len(array) * 8.0


# ---- blocked matrix product: a panel of rows times a large square matrix, in tiles that lie together ----

TILE = 256
PANELS = 4


def product_result(state: dict[str, Any]) -> Any:
    return [digest(state["product"][: state["panels"]].reshape(-1)), digest(state["square"].reshape(-1))]


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


def product_work(memory: Memory, state: dict[str, Any], units: range) -> float:
    square, panel, product = state["square"], state["panel"], state["product"]
    tiles = len(square)

    def one(n: int) -> None:
        found, partial = np.empty((TILE, TILE)), np.empty((TILE, TILE))
        for i in units:
            for j in part(memory, tiles, n, 1):
                found[:] = 0
                for k in range(tiles):
                    # The square is stored by columns of tiles, in the order in which they are needed.
                    np.matmul(panel[i, k], square[j, k], out=partial)
                    np.add(found, partial, out=found)
                product[i, j] = found

    in_threads(memory, one)
    state["panels"] = units.stop
    return float(len(units) * square.nbytes)


# ---- k-means ----

DIMENSIONS = 16
CENTERS = 8
ITERATIONS = 4
"""At most."""
ROWS = 1 << 13


def kmeans_prepare(memory: Memory) -> dict[str, Any]:
    array = memory.empty(memory.spec.size // 8 // DIMENSIONS * DIMENSIONS)
    Filler(memory.spec.data).fill(array)
    return {"points": array.reshape(-1, DIMENSIONS)}


def kmeans_work(memory: Memory, state: dict[str, Any], units: range) -> float:
    points = state["points"]
    centers = state["centers"] if units.start else np.array(points[:: len(points) // CENTERS][:CENTERS])
    for _ in units:

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
    return float(len(units) * points.nbytes)


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


def groupby_work(memory: Memory, state: dict[str, Any], units: range) -> float:
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
    lengths = generator.integers(3, 11, 5000)
    starts = np.cumsum(lengths) - lengths
    letters = generator.integers(1, 27, lengths.sum(), dtype=np.uint8)
    letters[starts + lengths - 1] = 0
    written = 0
    while written < length:
        drawn = np.minimum(generator.zipf(1.3, ROWS), len(lengths)) - 1
        long = lengths[drawn]
        # Where each letter comes from: the start of its word, and so many on.
        some = letters[np.repeat(starts[drawn] - np.cumsum(long) + long, long) + np.arange(long.sum())]
        some = some[: length - written]
        text[written : written + len(some)] = some
        written += len(some)
    return {"text": text, "ranks": ranks, "keys": memory.empty(length).view(np.int64)}


def suffix_work(memory: Memory, state: dict[str, Any], units: range) -> float:
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
        one = sum(float(array[i : i + STEP].sum()) for i in range(0, len(array), STEP))
        return [[one] * state["passes"], digest(array)]  # type: ignore[arg-type]
    return [list(state["sums"]), digest(array)]


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
    "scan": Workload(
        "read everything in order, over and over",
        "GB/s",
        array_prepare,
        scan_work,
        sums,
        PACKED,
        most=SCANS,
        warm=scan_warm,
    ),
    "random read": Workload(
        "read single values anywhere",
        "µs",
        random_prepare,
        read_work,
        sums,
        EVERYWHERE,
        most=8 * UNITS,
        draw=access_draw,
    ),
    "random write": Workload(
        "write single values anywhere",
        "µs",
        random_prepare,
        write_work,
        content,
        EVERYWHERE,
        most=8 * UNITS,
        draw=access_draw,
    ),
    "zipf read": Workload(
        "read values, some far more often",
        "µs",
        zipf_prepare,
        read_work,
        sums,
        EVERYWHERE,
        most=8 * UNITS,
        draw=access_draw,
    ),
    "update": Workload(
        "add one to everything, in place", "GB/s", array_prepare, update_work, content, EVERYWHERE, most=UPDATES
    ),
    "sort": Workload("sort in place", "GB/s", array_prepare, sort_work, content, MAPPED, NOT_STORED),
    "product": Workload(
        "multiply matrices in blocks",
        "GB/s",
        product_prepare,
        product_work,
        product_result,
        MAPPED,
        NOT_STORED,
        most=PANELS,
    ),
    "k-means": Workload(
        "iterations of k-means",
        "GB/s",
        kmeans_prepare,
        kmeans_work,
        lambda state: [state["centers"].tolist(), digest(state["points"].reshape(-1))],
        MAPPED,
        NOT_STORED,
        most=ITERATIONS,
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


ARRAYS, CLOCK, DONE = b"a", b"c", b"d"
"""What the harness is told: arrays come now; the clock runs now; it has stopped. Each time it does something first."""


def told(spec: Spec, what: bytes) -> None:
    """Tell the harness how far this process is, and wait until it has done what it does then."""
    if spec.tell >= 0:
        os.write(spec.tell, what)
        os.read(spec.go, 1)


@contextmanager
def place(memory: Memory) -> Iterator[None]:
    """Have arrays where the spec wants them."""
    if memory.spec.memory != "userswap":
        yield
        return
    import userswap

    if not memory.spec.readahead:
        os.environ["USERSWAP_READAHEAD"] = "0"
    with userswap.install(ram=memory.spec.ram, swap=memory.spec.directory) as installed:
        memory.pool = installed.pool
        yield


def steps(most: int) -> Iterator[range]:
    """Return the units of each step."""
    begin, end = 0, 1
    while begin < most:
        yield range(begin, end)
        begin, end = end, min(2 * end, most)


def run(spec: Spec) -> Run:
    """Run a workload in this process."""
    workload = WORKLOADS[spec.workload]
    memory = Memory(spec)
    for package in (*workload.needs, *NEEDED_BY.get(spec.memory, ())):
        importlib.import_module(package)
    told(spec, ARRAYS)
    with place(memory):
        began = time.perf_counter()
        state = workload.prepare(memory)
        memory.settle()
        if workload.warm is not None:
            workload.warm(memory, state)
        prepared = time.perf_counter() - began
        told(spec, CLOCK)
        found = timed(memory, workload, state)
        told(spec, DONE)
        results = {}
        result = workload.result(state)
        if spec.reference:
            results = every_result(memory, workload, state, found["units"]) | {str(found["units"]): result}
        return Run(**found, prepare_seconds=prepared, result=result, results=results)


def timed(memory: Memory, workload: Workload, state: Any) -> dict[str, Any]:
    """Work, with the clock running, and return what is measured (`Run`)."""
    most = min(memory.spec.most or workload.most, workload.most)
    seconds = amount = 0.0
    marks = {}
    pool = memory.pool
    times = fault_times(pool._core) if pool is not None else []
    swapped, used, kernel = memory.swapped(), resource.getrusage(resource.RUSAGE_SELF), kernelswap.kswapd_ms()
    for units in steps(most):
        if workload.draw is not None:
            workload.draw(memory, state, units)
        began = time.perf_counter()
        amount += workload.work(memory, state, units)
        seconds += time.perf_counter() - began
        marks[str(units.stop)] = seconds
        if seconds >= memory.spec.seconds:
            break
    kernel = kernelswap.kswapd_ms() - kernel
    after, spent = memory.swapped(), resource.getrusage(resource.RUSAGE_SELF)
    figures = {}
    if pool is not None:
        times = [now - before for now, before in zip(fault_times(pool._core), times, strict=True)]
        figures = pool.stats().as_dict()
        figures |= {f"fault_ns_p{share:g}": percentile(times, share) for share in (50, 90, 99, 99.9)}
    return {
        "seconds": seconds,
        "amount": amount,
        "cpu_seconds": spent.ru_utime + spent.ru_stime - used.ru_utime - used.ru_stime,
        "kernel_seconds": kernel / 1000,
        "swapped_in": after[0] - swapped[0],
        "swapped_out": after[1] - swapped[1],
        "units": units.stop,
        "marks": marks,
        "figures": figures,
    }


def every_result(memory: Memory, workload: Workload, state: Any, most: int) -> dict[str, Any]:
    """Do it all again, and return what comes out after each step."""
    results: dict[str, Any] = {}
    if most == 1:
        return results
    state.clear()
    state |= workload.prepare(memory)
    for units in steps(most):
        if workload.draw is not None:
            workload.draw(memory, state, units)
        workload.work(memory, state, units)
        results[str(units.stop)] = workload.result(state)
    return results


if __name__ == "__main__":
    print(json.dumps(asdict(run(Spec(**json.loads(sys.argv[1]))))))
