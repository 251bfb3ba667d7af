"""The programs of `userswap lab system`, and the process that runs them: ``python -m userswap.lab.workloads``.

Each fills an array, works on it for a while and says what came out, exactly, so that it can be compared. Data is a
random walk with two decimals, which compresses about 2:1. The same programs run in a pool and in ordinary memory.
"""

import json
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from userswap.bench.data import STEP, walk
from userswap.pool import Pool

__all__ = ["WORKLOADS", "run"]

Array = npt.NDArray[np.float64]
PIECES = [walk(seed, 0.8) for seed in range(4)]


class Memory:
    """Where a workload's arrays live: in a pool, or, without one, in ordinary memory."""

    def __init__(self, pool: Pool | None) -> None:
        self.pool = pool
        self.figures = {"map_bytes": 0, "metadata_bytes": 0, "swap_ids": 0}

    def filled(self, values: int) -> Array:
        """A new array: pieces of a random walk, each at another level, so that no two folios are the same."""
        array: Array = np.empty(values) if self.pool is None else self.pool.empty(values)
        for level, i in enumerate(range(0, values, STEP)):
            array[i : i + STEP] = (PIECES[level % len(PIECES)] + level)[: values - i]
        return array

    def snapshot(self, array: Array) -> Array:
        """The array as it is now, to keep."""
        return array.copy() if self.pool is None else self.pool.snapshot(array)

    def look(self) -> None:
        """Note the figures, where they are larger than before."""
        if self.pool is not None:
            stats = self.pool.stats()
            for name, most in self.figures.items():
                self.figures[name] = max(most, getattr(stats, name))


def checksum(array: Array) -> int:
    """CRC-32 of an array's bytes, a part at a time."""
    check = 0
    for i in range(0, len(array), STEP):
        check = zlib.crc32(array[i : i + STEP].tobytes(), check)
    return check


def scan(memory: Memory, array: Array) -> Any:
    """Read everything three times, in order: the worst that can happen to a clock."""
    sums = []
    for _ in range(3):
        sums.append(float(sum(array[i : i + STEP].sum() for i in range(0, len(array), STEP))))
        memory.look()
    return sums


def update(memory: Memory, array: Array) -> Any:
    """Change everything in place, twice, in order."""
    for _ in range(2):
        for i in range(0, len(array), STEP):
            array[i : i + STEP] += 1
        memory.look()
    return None


def sort(memory: Memory, array: Array) -> Any:
    """Sort in place."""
    array.sort()
    memory.look()
    return bool((array[1:STEP] >= array[: STEP - 1]).all())


def snapshots(memory: Memory, array: Array) -> Any:
    """Keep the array as it is, six times, and change another eighth of it each time; then drop every other one."""
    kept, part = [], len(array) // 8
    for turn in range(6):
        kept.append(memory.snapshot(array))
        array[turn * part : (turn + 1) * part] += 1
        memory.look()
    del kept[::2]
    array[:part] = kept[0][:part]
    memory.look()
    return [checksum(snapshot) for snapshot in kept]


WORKLOADS: dict[str, Callable[[Memory, Array], Any]] = {
    "scan": scan,
    "update": update,
    "sort": sort,
    "snapshots": snapshots,
}


def run(design: str | None, array_bytes: int, ram: int, swap: str) -> dict[str, dict[str, Any]]:
    """Run every workload, each in a pool of its own: its figures, and ``result``. Without a design: in RAM."""
    found: dict[str, dict[str, Any]] = {}
    for name, workload in WORKLOADS.items():
        pool = None if design is None else Pool(ram, swap, map_design=design)
        memory = Memory(pool)
        array = memory.filled(array_bytes // 8)
        memory.look()
        began = time.perf_counter()
        result = workload(memory, array)
        seconds = time.perf_counter() - began
        found[name] = {"seconds": seconds, "result": [result, checksum(array)], **memory.figures}
        del array, memory
        if pool is not None:
            pool.close()
    return found


if __name__ == "__main__":
    chosen, size, budget, place = sys.argv[1:]
    print(json.dumps(run(chosen or None, int(size), int(budget), place)))
