"""Who is compared: what each is, why it can't run here, and how its memory is limited to the same total.

The total T is what a program's arrays may take in RAM, however they are kept: in place, compressed, in the page cache.
userswap has T as its budget. The kernel limits what is in place, and not what zram or zswap (in a version 1 cgroup)
store compressed; so their limit is, at any moment, what T leaves beside the pool (`runs.Watched`).
"""

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from userswap.bench import kernelswap
from userswap.bench.cgroup import why_no_cgroup
from userswap.bench.kernelswap import Swap
from userswap.bench.workloads import NEEDED_BY, WORKLOADS, Workload
from userswap.lab.machine import kibibytes

__all__ = ["CONTENDERS", "Contender", "Plan", "plan"]

IN_PLACE = 2
"""One in so many bytes of T stays in place where everything together does not fit compressed."""
GUESS = 0.6
"""Compressed by plain bytes, before anything was seen."""


@dataclass(frozen=True)
class Plan:
    """How the kernel's swap is set up for T, bytes. What the pool does not take is in place."""

    pool: int
    """What the compressed pool may take."""
    holds: int
    """Pages that fit into it."""
    file: int
    directory: Path
    beside: int
    """What of T is left to the pool at first; 0: it is no matter of the limit."""

    @property
    def percent(self) -> int:
        """The pool as zswap's limit is written: whole per cents of RAM, no less than one."""
        return max(self.pool * 100 // kibibytes("MemTotal"), 1)

    @property
    def most(self) -> int:
        """The pool's limit, where that is less than one per cent of RAM; else 0."""
        return self.pool if self.pool * 100 < kibibytes("MemTotal") else 0


@dataclass(frozen=True)
class Contender:
    """A way to have more array memory than RAM, or something to compare these with."""

    name: str
    text: str
    memory: str = "plain"
    """Where its arrays live, for `workloads`."""
    kernel: str = ""
    """What the kernel swaps to: file, zswap, or zram with an algorithm."""
    readahead: bool = True
    """Whether userswap has its thread."""
    limited: bool = False
    """Whether it runs in a cgroup that is limited to T."""

    @property
    def pool(self) -> bool:
        """Whether the kernel compresses for it, beside the limit."""
        return self.kernel not in ("", "file")

    @property
    def held(self) -> bool:
        """Whether it is to have T, and neither more nor less."""
        return self.limited or self.memory == "userswap"

    def why_not(self) -> str | None:
        """Say why it can't run here, None if it can."""
        if any(importlib.util.find_spec(package) is None for package in NEEDED_BY.get(self.memory, ())):
            return "its package is not installed"
        return why_no_cgroup() if self.limited else None

    def why_not_this(self, workload: Workload, threads: int) -> str | None:
        """Say why it can't run a workload, None if it can."""
        if self.memory == "packed" and "packed" not in workload.runs_on:
            return "it is the limit of a scan alone"
        if not self.readahead and workload is not WORKLOADS["scan"]:
            return "it shows how threads share a scan"
        if self.memory in ("blosc2", "packed") and threads > 1:
            return "an NDArray is for one thread" if self.memory == "blosc2" else "it is the limit of one core"
        if self.memory not in workload.runs_on:
            return workload.why_not
        missing = [name for name in workload.needs if importlib.util.find_spec(name) is None]
        return f"{missing[0]} is not installed: pip install 'userswap[bench]'" if missing else None

    def swap(self, plan: Plan) -> AbstractContextManager[Swap]:
        """Have the kernel's swap set up. Raises BenchError."""
        file = plan.directory / f"userswap-bench-{os.getpid()}.swap"
        if self.kernel == "file":
            return kernelswap.swap_file(file, plan.file)
        if self.kernel == "zswap":
            return kernelswap.zswap(file, plan.file, plan.percent, plan.most)
        if self.kernel:
            return kernelswap.zram(self.kernel.split()[1], plan.holds, file, plan.file)
        return nullcontext(Swap())


CONTENDERS = {
    contender.name: contender
    for contender in (
        Contender("plain", "everything in RAM, no limit"),
        Contender("userswap", "userswap.install(ram=T)", "userswap"),
        Contender("userswap alone", "the same without a thread that works ahead", "userswap", readahead=False),
        Contender("zswap", "kernel swap through zswap", kernel="zswap", limited=True),
        Contender("zram lz4", "kernel swap on zram, LZ4", kernel="zram lz4", limited=True),
        Contender("zram lzo-rle", "kernel swap on zram, LZO-RLE", kernel="zram lzo-rle", limited=True),
        Contender("swap file", "kernel swap on a file", kernel="file", limited=True),
        Contender("memmap", "numpy.memmap on a file", "memmap", limited=True),
        Contender("blosc2", "blosc2.NDArray: no limit, all of it compressed", "blosc2"),
        Contender("decompress", "Blosc2 decompressing on one core, and nothing else: the limit", "packed"),
    )
}


def plan(contender: Contender, total: int, needs: int, ratio: float, directory: Path, *, charged: bool) -> Plan:
    """Divide `total` bytes for a program that needs `needs`.

    `ratio` is what a byte takes compressed; `charged`: the limit covers the pool.
    """
    file = 2 * needs
    if not contender.pool or charged:
        return Plan(total, needs, file, directory, 0)
    # What is not in place is in the pool: limit + (needs - limit) * ratio = total.
    limit = int((total - needs * ratio) / (1 - ratio)) if ratio < 1 else 0
    if limit >= total // IN_PLACE:
        # The pool gets room to spare: how large it becomes is the limit's doing.
        return Plan(2 * total, 2 * needs, file, directory, max(total - limit, 1))
    # It does not fit compressed: the pool has an end, and the rest goes to the file.
    pool = total - total // IN_PLACE
    if contender.kernel == "zswap":
        step = kibibytes("MemTotal") // 100
        pool = pool // step * step or pool
    return Plan(pool, int(pool / ratio), file, directory, pool)
