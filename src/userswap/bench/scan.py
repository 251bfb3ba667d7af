"""Scan: how fast a program gets through more array memory than it has RAM, one thread, against two limits.

In every round, one after the other: the same scan of an ordinary array, of an array in a pool, an update in
place of both, and Blosc2 decompressing the same data memory to memory on one core: what no swap
that compresses so can beat without a second core. Medians over rounds; every sum is checked.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from userswap.backends import codec
from userswap.pool import Pool, Stats, start

STEP = 1 << 19  # float64 values handled at a time: 4 MiB
FOLIO = 1 << 16
BITSHUFFLE_8 = 1  # the recipe that sampling finds for float64 walks

Array = npt.NDArray[np.float64]


@dataclass
class Figures:
    """What was measured: GB/s of array memory, one value a round."""

    size: int
    ram: int
    ratio: float = 0.0
    """Array bytes by compressed bytes."""
    fill: float = 0.0
    """GB/s of the first fill, making the data included."""
    plain_scan: list[float] = field(default_factory=list)
    scan: list[float] = field(default_factory=list)
    limit: list[float] = field(default_factory=list)
    plain_update: list[float] = field(default_factory=list)
    update: list[float] = field(default_factory=list)
    stats: Stats | None = None

    def rows(self) -> list[tuple[str, float, float, float]]:
        """Return (name, median, least, most) of each series, GB/s."""
        series = {
            "scan, in RAM": self.plain_scan,
            "scan, userswap": self.scan,
            "Blosc2 alone": self.limit,
            "update, in RAM": self.plain_update,
            "update, userswap": self.update,
        }
        return [(name, statistics.median(v), min(v), max(v)) for name, v in series.items()]


def walk(seed: int, spread: float) -> Array:
    """Return STEP values of a random walk with two decimals, as sensors and prices are: compresses about 2:1."""
    steps = np.random.default_rng(seed).standard_normal(STEP) * spread
    values: Array = np.round(np.cumsum(steps), 2).astype(np.float64, copy=False)
    return values


def measure(size: int, ram: int, rounds: int, progress: Callable[[str], None], swap: str | None = None) -> Figures:
    """Measure `size` bytes of arrays in `ram` bytes of budget.

    Raises:
        AssertionError: a sum was wrong.
        UserswapError: as `Pool`.
    """
    figures = Figures(size // (STEP * 8) * STEP * 8, ram)
    start()
    pool = Pool(ram, swap)
    chunks = figures.size // (STEP * 8)
    swapped, plain = pool.empty(chunks * STEP), np.empty(chunks * STEP)
    began = time.perf_counter()
    for i in range(chunks):
        progress(f"filling {i + 1} of {chunks}")
        swapped[i * STEP : (i + 1) * STEP] = walk(i, 0.8)
    figures.fill = figures.size / (time.perf_counter() - began) / 1e9
    for i in range(chunks):
        plain[i * STEP : (i + 1) * STEP] = swapped[i * STEP : (i + 1) * STEP]
    sample = plain[: FOLIO // 8].tobytes()
    for turn in range(rounds):
        progress(f"round {turn + 1} of {rounds}")
        one = timed(lambda: scan(plain), figures.plain_scan, figures.size)
        two = timed(lambda: scan(swapped), figures.scan, figures.size)
        assert one == two, "the sums differ"
        figures.limit.append(codec.speed(sample, BITSHUFFLE_8, 2000)[2])
    figures.ratio = pool.stats().swapped_bytes / max(pool.stats().stored_bytes, 1)
    figures.stats = pool.stats()
    for turn in range(rounds):
        progress(f"update, round {turn + 1} of {rounds}")
        timed(lambda: update(plain), figures.plain_update, figures.size)
        timed(lambda: update(swapped), figures.update, figures.size)
    assert scan(plain) == scan(swapped), "the sums differ"
    return figures


def scan(array: Array) -> float:
    """Read everything once, in order."""
    return float(sum(array[i : i + STEP].sum() for i in range(0, len(array), STEP)))


def update(array: Array) -> float:
    """Read and write everything once, in order."""
    for i in range(0, len(array), STEP):
        array[i : i + STEP] += 1
    return 0.0


def timed(work: Callable[[], float], into: list[float], size: int) -> float:
    """Do `work` over `size` bytes and note its GB/s."""
    began = time.perf_counter()
    result = work()
    into.append(size / (time.perf_counter() - began) / 1e9)
    return result
