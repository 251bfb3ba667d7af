"""Data for benchmarks: arrays of float64 that compress about 1:1, 2:1 or 6:1 with Blosc2, the same ones each time."""

import numpy as np
import numpy.typing as npt

__all__ = ["KINDS", "STEP", "Array", "Filler", "digest", "update", "walk"]

STEP = 1 << 19
"""Values handled at a time: 4 MiB."""
PIECES = 4
LEVELS = 1 << 12
PAGE = 512  # values

Array = npt.NDArray[np.float64]


def walk(seed: int, spread: float) -> Array:
    """Return STEP values of a random walk with two decimals, as sensors and prices are: compresses about 2:1."""
    steps = np.random.default_rng(seed).standard_normal(STEP) * spread
    values: Array = np.round(np.cumsum(steps), 2).astype(np.float64, copy=False)
    return values


def noise(seed: int) -> Array:
    """Return values with nothing in common: compresses as good as not at all."""
    generator = np.random.default_rng(seed)
    values: Array = np.where(generator.random(STEP) < 0.5, -1.0, 1.0) * 2.0 ** generator.uniform(-10, 10, STEP)
    return values


def counts(seed: int) -> Array:
    """Return small whole numbers, as counts and categories are: compresses about 6:1."""
    return np.random.default_rng(seed).integers(0, 250, STEP).astype(np.float64)


KINDS = {"1:1": noise, "2:1": lambda seed: walk(seed, 0.8), "6:1": counts}


class Filler:
    """Fills arrays: a few pieces over and over, each time moved to another level, so that no two folios are equal."""

    def __init__(self, kind: str) -> None:
        self.pieces = [KINDS[kind](seed) for seed in range(PIECES)]
        # Adding to values of which no bit is like another would make them alike.
        self.moved = np.multiply if kind == "1:1" else np.add
        self.levels = np.random.default_rng(PIECES).permutation(LEVELS)

    def piece(self, turn: int, into: Array) -> None:
        """Write the data of the turn-th STEP of an array; `into` may be shorter."""
        level = 1 + self.levels[turn % len(self.levels)]
        self.moved(self.pieces[turn % PIECES][: len(into)], level, out=into)

    def fill(self, array: Array, first: int = 0) -> None:
        """Fill an array; `first` is the turn that it begins with."""
        buffer = None if type(array) in (np.ndarray, np.memmap) else np.empty(STEP)
        for turn, i in enumerate(range(0, len(array), STEP)):
            end = min(i + STEP, len(array))
            if buffer is None:
                self.piece(first + turn, array[i:end])
            else:
                self.piece(first + turn, buffer[: end - i])
                array[i:end] = buffer[: end - i]


def digest(array: Array) -> int:
    """Return a number that changes with any byte of an array, and when any two pages change places."""
    found = 0
    for i in range(0, len(array), STEP):
        words = np.ascontiguousarray(array[i : i + STEP]).view(np.uint64)
        whole = len(words) // PAGE * PAGE
        pages = words[:whole].reshape(-1, PAGE).sum(axis=1, dtype=np.uint64)
        places = np.arange(i // PAGE, i // PAGE + len(pages), dtype=np.uint64) * np.uint64(2) + np.uint64(1)
        found += int((pages * places).sum(dtype=np.uint64)) + int(words[whole:].sum(dtype=np.uint64))
    return found % (1 << 64)


def update(array: Array) -> None:
    """Read and write everything once, in order."""
    for i in range(0, len(array), STEP):
        array[i : i + STEP] += 1
