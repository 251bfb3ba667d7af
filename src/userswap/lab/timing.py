"""Time: nanoseconds for what a map is asked, with one thread and with two.

How. A round measures every design once, one after the other, and the next round begins with the first again, so
that whatever else the machine does meets all of them. Each series below is on a fresh map, whose first growth is
in the times of swap-out as it is in life; the holders' words have their memory before. What storage remembers is read
before the clock starts. Faults, dups, puts and writebacks go in random order or in that of allocation, by
choice: order decides about cache misses, so it is part of every result.

Swapoff is one thread's work. Otherwise two threads work on one map, each on its own half of the pages, and start at
the same moment. What is about shared ids they do to the same ids in the same order, each through holders of its own.
Their figure is the time until both are done, divided by what one of them did: the same as with one thread if they
don't disturb each other, twice that if one has to wait for the other. The holder's own lock, which any fault takes
first, is not in these times.
"""

import statistics
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from userswap.lab.memory import Holders, Subject
from userswap.swap.map import ZSWAP, entry, slot

if TYPE_CHECKING:
    from userswap.swap.map import Operation

__all__ = ["LEAST_PAGES", "MANY", "OPERATIONS", "Time", "one_round"]

MANY = 300
RUN = 16
LEAST_PAGES = 1000

OPERATIONS = {
    "swap-out": "alloc, one page",
    "run": "alloc, a page of a run of 16",
    "fault": "read fault: lock and unlock the entry of an exclusive page",
    "take": "write fault: lock, unlock, last put, free",
    "put": "last put and free of an exclusive page (exit)",
    "writeback": "from zswap to a slot, asked for by storage",
    "swapoff": "empty the swap file, for each slot in use, all slots in use",
    "swapoff tenth": "empty the swap file, for each slot in use, a tenth of all pages there",
    "dup": "first dup (fork): one holder becomes two",
    "shared fault": "lock and unlock the entry of a page that two hold",
    "cache": "put a shared page into the swap cache: lock, cache, unlock",
    "cached": "find a shared page in the swap cache",
    "shared put": "two holders become one",
    f"dup at {MANY}": f"dup of a page that {MANY} hold",
    f"put at {MANY}": f"put that leaves {MANY} holders",
}


@dataclass
class Time:
    """One operation of one design: ns in each round."""

    operation: str
    text: str
    design: str
    threads: int
    samples: list[float]
    median: float = field(init=False)
    least: float = field(init=False)
    most: float = field(init=False)

    def __post_init__(self) -> None:
        self.median = statistics.median(self.samples)
        self.least, self.most = min(self.samples), max(self.samples)


class Threads:
    """So many threads that do the same thing to one map at the same time."""

    def __init__(self, threads: int) -> None:
        self.number = threads
        self.executor = ThreadPoolExecutor(threads)

    def run(
        self,
        subject: Subject,
        operation: "Operation",
        holders: list[Holders],
        *,
        entries: list[int] | None = None,
        into: list[Holders] | None = None,
        references: int = 1,
    ) -> float:
        """Return ns for each until the last thread is done."""

        def one(i: int) -> float:
            return subject.map.run(
                operation,
                holders[i],
                entries[i] if entries else 0,
                into[i] if into else None,
                references=references,
                together=self.number,
            )

        if self.number == 1:
            return one(0)
        return max(self.executor.map(one, range(self.number)))


def one_round(
    design: str, pages: int, seed: int, threads: Threads, *, shuffled: bool, words: int = 64
) -> dict[str, float]:
    """Measure every operation once."""
    # the same number in each thread, in whole runs
    each = pages // (threads.number * RUN) * RUN
    parts: list[Holders] = [np.arange(i * each, (i + 1) * each, dtype=np.uint64) for i in range(threads.number)]
    dice = np.random.default_rng(seed)
    mixed = [dice.permutation(part) if shuffled else part for part in parts]
    objects = [entry(ZSWAP, 1 + i * each) for i in range(threads.number)]
    places = [slot(0, i * each, 1) for i in range(threads.number)]
    result: dict[str, float] = {}

    def fresh(holders: int = 1) -> tuple[Subject, Callable[..., float]]:
        all_pages = each * threads.number
        subject = Subject(design, all_pages, seed, device=True, holders=holders * all_pages, words=words)
        return subject, lambda *args, **options: threads.run(subject, *args, **options)

    _, run = fresh()
    result["swap-out"] = run("alloc", parts, entries=objects)
    result["fault"] = run("fault", mixed)
    result["put"] = run("put", mixed)

    _, run = fresh()
    result["run"] = run("run", parts, entries=objects)
    result["take"] = run("take", mixed)

    subject, run = fresh()
    run("alloc", parts, entries=objects)
    result["writeback"] = run("writeback", mixed, entries=places)
    if threads.number == 1:
        left, spent = subject.map.swapoff()
        result["swapoff"] = spent / left
        subject, run = fresh()
        run("alloc", parts, entries=objects)
        subject.write_back(10)
        left, spent = subject.map.swapoff()
        result["swapoff tenth"] = spent / left

    subject, run = fresh(2)
    run("alloc", parts, entries=objects)
    seconds = [part + np.uint64(subject.pages) for part in mixed]
    result["dup"] = run("dup", mixed, into=seconds)
    # the same ids for all, through holders of their own
    firsts = np.concatenate(mixed)
    own = [firsts, firsts + np.uint64(subject.pages)][: threads.number]
    result["shared fault"] = run("fault", own)
    result["cache"] = run("cache", mixed)
    result["cached"] = run("cached", own)
    run("uncache", mixed)
    run("add", mixed, references=MANY - 2)
    result[f"dup at {MANY}"] = run("add", own)
    result[f"put at {MANY}"] = run("sub", own)
    run("sub", mixed, references=MANY - 2)
    result["shared put"] = run("put", seconds)
    return result
