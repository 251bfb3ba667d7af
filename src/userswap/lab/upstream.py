"""What upstream published about the memory of two designs, and the same measured here for all of them.

A swap file of 32 GiB, cut in slots of 4 KiB, filled in order from nothing to all of it: once with every page
in zswap, once with every page in its slot. With zswap, designs that need no swap file have none, as published; the
others have their statics for all of it, in both cases. What a zswap entry itself costs is in none of these figures.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from userswap.lab.memory import Holders
from userswap.swap.map import BOUND, ZSWAP, Map, entry, slot

__all__ = ["BACKENDS", "PUBLISHED", "SLOTS", "SOURCE", "USE", "Row", "measure", "off", "wrong"]

SLOTS = (32 << 30) // 4096
USE = (0, 25, 50, 75, 100)
BACKENDS = ("zswap", "disk")
SOURCE = "[PATCH v3 00/20] Virtual Swap Space, linux-mm, February 2026"
PUBLISHED = {
    ("swap_table", "zswap"): (25.0, 57.0, 89.0, 121.0, 153.0),
    ("vswap", "zswap"): (0.0, 48.25, 96.5, 144.75, 193.0),
    ("swap_table", "disk"): (25.0, 41.0, 57.0, 73.0, 89.0),
    ("vswap", "disk"): (2.0, 66.25, 130.5, 194.75, 259.0),
}
"""MiB at each use. "Old design" there is Linux 6.19: the swap table and its statics."""
TOLERANCE = 0.02
STEP = 0.25
"""MiB that the published figures are rounded to, which is all that can be asked of those near 0."""


@dataclass(frozen=True)
class Row:
    """One figure: a design on a backend at a use."""

    design: str
    backend: str
    use_percent: int
    metadata_mib: float


def measure(designs: list[str], step: Callable[[str], None], slots: int = SLOTS) -> list[Row]:
    """Fill the swap file with each design on each backend; `step` is told what comes next."""
    rows = []
    pages: Holders = np.arange(slots, dtype=np.uint64)
    for design in designs:
        for backend in BACKENDS:
            step(f"{design}, {backend}")
            device = backend == "disk" or design in BOUND
            swap_map = Map(design, holders=slots, slots=slots if device else 0, slot_run=1)
            done = 0
            for percent in USE:
                upto = slots * percent // 100
                first = slot(0, done, 1) if backend == "disk" else entry(ZSWAP, 1 + done)
                swap_map.run("alloc", pages[done:upto], first)
                done = upto
                rows.append(Row(design, backend, percent, swap_map.metadata() / (1 << 20)))
    return rows


def off(row: Row) -> tuple[float, float] | None:
    """Return the published figure and how far the measured one is from it (1: twice as much), or None."""
    published = PUBLISHED.get((row.design, row.backend))
    if published is None:
        return None
    figure = published[USE.index(row.use_percent)]
    return figure, (row.metadata_mib - figure) / figure if figure else 0.0


def wrong(rows: list[Row]) -> list[str]:
    """Say of each figure that is not what was published, within 2 %, what it is."""
    sentences = []
    for row in rows:
        published = off(row)
        if published is None:
            continue
        figure = published[0]
        if abs(row.metadata_mib - figure) > max(TOLERANCE * figure, STEP):
            sentences.append(
                f"{row.design} with {row.backend} at {row.use_percent} %: {row.metadata_mib:.2f} MiB, "
                f"published {figure:g}"
            )
    return sentences
