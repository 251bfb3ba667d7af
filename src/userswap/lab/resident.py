"""The check of the books: what a map says it has allocated, against what the kernel says is resident.

Runs in a process of its own for each design, `python -m userswap.lab.resident DESIGN SEED WORDS`, because a process
that did other things before has memory that comes and goes. Half of the pages are shared and half are written back, so
that every design has something to show. It is looked at twice: at the peak and when half of the pages have been freed.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from userswap.errors import UserswapError
from userswap.lab.memory import Holders
from userswap.lab.widths import WIDTHS
from userswap.swap.map import ZSWAP, entry, slot

__all__ = ["PAGES", "Resident", "measure"]

PAGES = 500_000
PAGE = 4096
TOLERANCE = 0.02
SLACK = 32 << 10
"""Bytes that Python's own memory may move by."""


@dataclass(frozen=True)
class Resident:
    """Bytes of one design: what it says, and by how much the process grew."""

    design: str
    pages: int
    peak_bytes: int
    peak_resident: int
    left_bytes: int
    left_resident: int

    @property
    def right(self) -> bool:
        """Whether both figures agree, both times."""
        pairs = ((self.peak_bytes, self.peak_resident), (self.left_bytes, self.left_resident))
        return all(abs(said - seen) <= TOLERANCE * seen + SLACK for said, seen in pairs)


def measure(design: str, seed: int, words: int = 64) -> Resident:
    """Check one design in a process of its own. Raises UserswapError when that fails."""
    # Injected delays, where a debug build is asked for them, would only take time here.
    environment = {name: value for name, value in os.environ.items() if name != "USERSWAP_CHAOS"}
    done = subprocess.run(
        [sys.executable, "-m", "userswap.lab.resident", design, str(seed), str(words)],
        capture_output=True,
        text=True,
        check=False,
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    if done.returncode:
        why = (done.stderr.strip() or "it was killed").splitlines()[-1]
        raise UserswapError(f"The check of {design}'s memory failed: {why}.")
    return Resident(**json.loads(done.stdout))


def anonymous() -> int:
    """Bytes of anonymous memory that are resident, counted by the kernel page by page."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("/proc/self/smaps_rollup has no line Anonymous")


def check(design: str, seed: int, words: int) -> Resident:
    """Measure here, in a process that has done nothing else."""
    # Once for nothing, so that what Python keeps for itself is there.
    work(design, 1000, seed, words)
    return work(design, PAGES, seed, words)


def work(design: str, pages: int, seed: int, words: int) -> Resident:
    dice = np.random.default_rng(seed)
    everything: Holders = np.arange(pages, dtype=np.uint64)
    shared, moved = (dice.permutation(everything)[: pages // 2] for _ in range(2))
    gone = everything[: pages // 2]  # in order, so that there is memory to give back
    both, single = np.intersect1d(shared, gone), np.setdiff1d(gone, shared)
    table = -(-pages * WIDTHS[words].holder_bytes // PAGE) * PAGE
    before = anonymous() + table
    swap_map = WIDTHS[words].make(design, holders=pages, slots=pages)
    swap_map.touch()
    swap_map.run("alloc", everything, entry(ZSWAP, 1))
    swap_map.run("add", shared)
    swap_map.run("writeback", moved, slot(0, 0, 1))
    said, seen = swap_map.metadata(), anonymous() - before
    swap_map.run("sub", both, references=2)
    swap_map.run("sub", single)
    left, left_seen = swap_map.metadata(), anonymous() - before
    return Resident(design, pages, said, seen, left, left_seen)


if __name__ == "__main__":
    print(json.dumps(asdict(check(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))))
