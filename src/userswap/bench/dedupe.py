"""Dedupe: what it costs to look for identical folios where there are none, and what it saves where there are.

Cost: one array larger than its budget is updated in place, so that each folio leaves with new content and is hashed
for nothing: in a pool that looks for identical folios, and in one that does not. Both are there all the time and take
turns, each round begins with the other one. The cost of a round is a ratio within it, so what slows down a whole
round cancels. Gain: copies of one array in a budget that holds fewer, all swapped out. Every array is checked.
Touches nothing but its own pools and their swap files.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from userswap.bench.data import STEP, Array, update, walk
from userswap.errors import LabError
from userswap.pool import Pool

__all__ = ["FULL", "QUICK", "Figures", "Size", "Stored", "measure"]


@dataclass(frozen=True)
class Size:
    """How much is measured, bytes."""

    array: int
    """Of the array that is updated in `ram` ..."""
    ram: int
    copied: int
    """... and of the one that there are `copies` of in `copies_ram`."""
    copies: int
    copies_ram: int


FULL = Size(320 << 20, 192 << 20, 32 << 20, 6, 64 << 20)
QUICK = Size(96 << 20, 60 << 20, 12 << 20, 6, 24 << 20)


@dataclass
class Updates:
    """Updates of the whole array, one value a round."""

    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    """Of all threads, the kernel's part included."""
    swap_outs: int = 0


@dataclass(frozen=True)
class Stored:
    """What the copies take when all of them are swapped out, bytes."""

    packed: int
    """Compressed bytes, wherever they are."""
    zswap: int
    """RAM of the compressed pool."""
    file: int
    """In use in the swap file."""
    swap_ids: int
    deduped: int
    """Swap-outs that found their folio stored already."""


@dataclass
class Figures:
    """What was measured, by whether identical folios were looked for."""

    size: Size
    rounds: int
    updates: dict[bool, Updates] = field(default_factory=lambda: {True: Updates(), False: Updates()})
    stored: dict[bool, Stored] = field(default_factory=dict)

    def speed(self, dedupe: bool) -> list[float]:
        """GB/s of array memory, a value a round."""
        return [self.size.array / seconds / 1e9 for seconds in self.updates[dedupe].seconds]

    def cost(self, what: str) -> dict[str, float]:
        """By how much of it `what` (``seconds``, ``cpu_seconds``) grows with dedupe: median, least and most."""
        pairs = zip(getattr(self.updates[True], what), getattr(self.updates[False], what), strict=True)
        ratios = [on / off - 1 for on, off in pairs]
        return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)}

    def as_json(self) -> dict[str, Any]:
        """What --json writes."""
        names = {True: "on", False: "off"}
        return {
            "size": asdict(self.size),
            "rounds": self.rounds,
            "update": {names[dedupe]: asdict(updates) for dedupe, updates in self.updates.items()},
            "cost": {what: self.cost(what) for what in ("seconds", "cpu_seconds")},
            "copies": {names[dedupe]: asdict(stored) for dedupe, stored in self.stored.items()},
        }


def measure(size: Size, rounds: int, swap: str | None, progress: Callable[[str], None]) -> Figures:
    """Measure cost and gain.

    Raises:
        LabError: an array has other values than it should.
        UserswapError: as `Pool`.
    """
    figures = Figures(size, rounds)
    measure_cost(figures, swap, progress)
    for dedupe in (True, False):
        progress(f"copies, {said(dedupe)}")
        figures.stored[dedupe] = measure_gain(size, swap, dedupe)
    return figures


def measure_cost(figures: Figures, swap: str | None, progress: Callable[[str], None]) -> None:
    """Update an array in a pool with dedupe and in one without, in turn."""
    size = figures.size
    pools: dict[bool, Pool] = {}
    try:
        arrays: dict[bool, Array] = {}
        for dedupe in (True, False):
            progress(f"filling, {said(dedupe)}")
            pools[dedupe] = Pool(size.ram, swap, dedupe=dedupe)
            arrays[dedupe] = filled(pools[dedupe], size.array)
        # The first update, not counted, is the one that finds the codec's recipes and fills the swap file.
        for turn in range(figures.rounds + 1):
            for dedupe in (True, False) if turn % 2 else (False, True):
                progress(f"round {turn} of {figures.rounds}, {said(dedupe)}" if turn else f"warming up, {said(dedupe)}")
                before = pools[dedupe].stats().swap_outs
                wall, cpu = time.perf_counter(), time.process_time()
                update(arrays[dedupe])
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                if turn:
                    updates = figures.updates[dedupe]
                    updates.seconds.append(wall)
                    updates.cpu_seconds.append(cpu)
                    updates.swap_outs += pools[dedupe].stats().swap_outs - before
        for dedupe, array in arrays.items():
            progress(f"checking, {said(dedupe)}")
            check(array, figures.rounds + 1)
        del array
        arrays.clear()
    finally:
        for pool in pools.values():
            pool.close()


def measure_gain(size: Size, swap: str | None, dedupe: bool) -> Stored:
    """Make the copies, swap all of them out, look, and check them."""
    pool = Pool(size.copies_ram, swap, dedupe=dedupe)
    try:
        copies = [filled(pool, size.copied) for _ in range(size.copies)]
        pool.evict()
        stats = pool.stats()
        for copy in copies:
            check(copy, 0)
        copies.clear()
        del copy
    finally:
        pool.close()
    return Stored(stats.stored_bytes, stats.pool_bytes, stats.slot_bytes, stats.swap_ids, stats.deduped)


def filled(pool: Pool, size: int) -> Array:
    """Make an array of `size` bytes in which no two folios are the same."""
    array: Array = pool.empty(size // 8)
    for i in range(0, len(array), STEP):
        array[i : i + STEP] = walk(i // STEP, 0.8)[: len(array) - i]
    return array


def check(array: Array, updates: int) -> None:
    """Compare an array with what it was filled with and `updates` made of it. Raises LabError."""
    for i in range(0, len(array), STEP):
        right = walk(i // STEP, 0.8)[: len(array) - i]
        for _ in range(updates):
            right += 1
        if not np.array_equal(array[i : i + STEP], right):
            raise LabError("An array has other values than were put into it: please report this.")


def said(dedupe: bool) -> str:
    """Say it as the tables do."""
    return "dedupe on" if dedupe else "dedupe off"
