"""What a swapped page costs in zswap beside its data and beside the map: measured in the real pool.

Objects as long as compressed pages are stored twice: with lengths that fill their size class exactly, which shows what
the pool needs for each object whatever is in it (headers: owner, length, bits for allocated and young, ends of
segments that no object fits), and as they come, which adds the rounding up to a size class, a share of the data.
Tables are the pool's memory outside its segments. Then half of the objects are freed at random: the pool is compacted
as reclaim does it, which leaves holes, a share of the data too, and then as far as it goes. The handle is in the map's
entry, the clock's link is a bit in the header.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from userswap.backends.zswap import ZswapPool, size_classes

__all__ = ["CHECKSUM", "KERNEL_BYTES", "PoolCost", "measure"]

PAGE = 4096
SHORTEST, LONGEST = 256, 3072
COMPACT_PERCENT = 6
"""Waste that reclaim lets be."""
CHECKSUM = 0
"""Bytes of a checksum for each object: zswap keeps none."""
KERNEL_BYTES = 48 + 11
"""What it is in Linux, as published: a zswap_entry, and 3 static and 8 dynamic bytes of swap layer."""


@dataclass(frozen=True)
class PoolCost:
    """Bytes for each object, at the peak and when half of the objects were freed."""

    objects: int
    data: float
    """Mean length."""
    headers: float
    each: float
    """What of the headers grows with each object; the rest is ends of segments, some for each size class."""
    tables: float
    rounding: float
    left_headers: float
    left_tables: float
    left_rounding: float
    left_holes: float
    """What compaction lets be."""
    checksum: int = CHECKSUM

    @property
    def beside(self) -> float:
        """What an object costs whatever its length."""
        return self.headers + self.tables + self.checksum

    @property
    def left_beside(self) -> float:
        """The same after freeing half."""
        return self.left_headers + self.left_tables + self.checksum


def measure(objects: int, seed: int) -> PoolCost:
    """Fill two pools with as many objects and look at what they take."""
    dice = np.random.default_rng(seed)
    lengths = dice.integers(SHORTEST, LONGEST + 1, objects)
    classes = np.array(size_classes())
    exact = classes[np.searchsorted(classes, lengths)]
    gone = dice.permutation(objects)[: objects // 2]
    fixed, whole = waste(exact, gone), waste(lengths, gone)
    return PoolCost(
        objects=objects,
        data=float(lengths.mean()),
        headers=fixed.peak,
        each=fixed.each,
        tables=whole.tables,
        rounding=whole.peak - fixed.peak,
        left_headers=fixed.left,
        left_tables=whole.left_tables,
        left_rounding=whole.left - fixed.left,
        left_holes=whole.holes,
    )


@dataclass(frozen=True)
class Waste:
    """Bytes for each object that are not data."""

    peak: float
    each: float
    tables: float
    left: float
    left_tables: float
    holes: float


def waste(lengths: npt.NDArray[np.int64], gone: npt.NDArray[np.int64]) -> Waste:
    """Store objects of these lengths, free some, and look at what the pool takes beside them."""
    objects, half = len(lengths), 0
    pool = ZswapPool(4 * int(lengths.sum()) + (1 << 30), objects)
    for i, length in enumerate(lengths.tolist()):
        if i == objects // 2:
            half = pool.bytes - pool.stored
        pool.fill(i + 1, length)
    each = (pool.bytes - pool.stored - half) / (objects - objects // 2)
    peak, tables = (pool.bytes - pool.stored) / objects, pool.metadata / objects
    for i in gone.tolist():
        pool.discard(i + 1)
    pool.compact(COMPACT_PERCENT)
    kept = pool.bytes
    while pool.compact(0):
        pass
    left = pool.objects
    holes = (kept - pool.bytes) / left
    return Waste(peak, each, tables, (pool.bytes - pool.stored) / left, pool.metadata / left, holes)
