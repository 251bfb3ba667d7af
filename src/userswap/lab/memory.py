"""Memory: bytes of metadata for each swapped page, of every design in every scenario.

A page is 4 KiB, and so is a slot: the figures compare with the kernel's. Every measurement is on a fresh map. Pages
are swapped out in the order of their addresses; what is shared, written back and freed is drawn at random, with one
seed for all designs (one scenario frees in order instead). Bytes are what the map has allocated, statics for
the whole swap file included; `userswap.lab.resident` checks them against what the kernel says is resident.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from userswap.lab.widths import WIDTHS
from userswap.swap.map import BOUND, SLOT, ZSWAP, entry, slot

__all__ = ["HOLDERS", "PERCENT", "SCENARIOS", "Holders", "Memory", "Scenario", "Subject", "measure"]

Holders = npt.NDArray[np.uint64]

HOLDERS = (2, 8, 300)
PERCENT = (10, 50, 100)
LEVELS = (0.4, 0.9, 0.3, 0.7, 0.25)
"""Shares of all pages that are swapped out, one after the other, in the churn."""


class Subject:
    """A fresh map of one design with the pages that are to be swapped, and the dice."""

    def __init__(self, design: str, pages: int, seed: int, *, device: bool, holders: int = 0, words: int = 64) -> None:
        self.slots = pages if device or design in BOUND else 0
        self.pages = pages
        self.map = WIDTHS[words].make(design, holders=holders or pages, slots=self.slots)
        self.map.touch()
        self.dice = np.random.default_rng(seed)
        self.all: Holders = np.arange(pages, dtype=np.uint64)
        self.live = self.all
        self.references = np.ones(pages, np.int64)
        """Of each page, its own holder's and those that are elsewhere."""

    def swap_out(self, type: int = ZSWAP) -> None:
        """Swap everything out, in order, to zswap or straight to the swap file."""
        self.map.run("alloc", self.all, slot(0, 0, 1) if type == SLOT else entry(type, 1))

    def write_back(self, percent: int) -> None:
        """Move this many of all pages to the swap file."""
        self.map.run("writeback", self.some(percent), slot(0, 0, 1))

    def share(self, percent: int, holders: int) -> None:
        """Give this many of all pages more holders."""
        pages = self.some(percent)
        self.map.run("add", pages, references=holders - 1)
        self.references[pages] = holders

    def some(self, percent: int) -> Holders:
        """Return this many of all pages, drawn."""
        drawn: Holders = self.dice.permutation(self.all)[: self.pages * percent // 100]
        return drawn

    def leave(self, pages: int, *, in_order: bool = False) -> None:
        """Free all but so many pages, with whoever holds them."""
        order = self.live if in_order else self.dice.permutation(self.live)
        gone = order[: len(order) - pages]
        held = self.references[gone]
        for references in np.flatnonzero(np.bincount(held)):
            self.map.run("sub", gone[held == references], references=int(references))
        self.live = order[len(order) - pages :]

    def churn(self) -> None:
        """Let the number of swapped pages go down and up, each time others, so that holes are everywhere."""
        self.swap_out()
        for level in LEVELS:
            pages = int(self.pages * level)
            if pages < len(self.live):
                self.leave(pages)
                continue
            holes = np.ones(self.pages, bool)
            holes[self.live] = False
            empty = self.dice.permutation(self.all[holes])[: pages - len(self.live)]
            self.map.run("alloc", empty, entry(ZSWAP, 1))
            self.live = np.concatenate([self.live, empty])

    def cache(self) -> None:
        """Swap everything out, shared by two, and have all of it in the swap cache."""
        self.swap_out()
        self.share(100, 2)
        self.map.run("cache", self.dice.permutation(self.all))


@dataclass(frozen=True)
class Scenario:
    """What is done to a map before its memory is looked at."""

    name: str
    heading: str
    text: str
    prepare: Callable[[Subject], None]
    device: bool = False
    """There is a swap file with a slot for each page."""
    in_order: bool = False
    """The half that is freed at the end is the one that was swapped out first."""
    times: int = 1
    """So many times the pages of the other scenarios."""


def sharing(percent: int, holders: int) -> Callable[[Subject], None]:
    def prepare(subject: Subject) -> None:
        subject.swap_out()
        subject.share(percent, holders)

    return prepare


def writing_back(percent: int) -> Callable[[Subject], None]:
    def prepare(subject: Subject) -> None:
        subject.swap_out()
        subject.write_back(percent)

    return prepare


def tenth(subject: Subject) -> None:
    subject.swap_out()
    subject.leave(subject.pages // 10)


def scenarios() -> Iterator[Scenario]:
    yield Scenario("idle", "idle\nKiB", "a swap file, and nothing swapped", lambda subject: None, device=True)
    yield Scenario("idle, no file", "no file\nKiB", "no swap file, and nothing swapped", lambda subject: None)
    yield Scenario("file", "file\nonly", "swap file only", lambda subject: subject.swap_out(SLOT), device=True)
    yield Scenario("zswap", "zswap\nonly", "zswap only, no swap file", Subject.swap_out)
    for percent in (0, 50, 100):
        text = f"zswap in front of a swap file, {percent} % written back"
        yield Scenario(f"written back {percent} %", f"{percent} %\nin file", text, writing_back(percent), device=True)
    text = "zswap only; the half is freed in order"
    yield Scenario("in order", "freed in\norder", text, Subject.swap_out, in_order=True)
    yield Scenario("tenth", "a tenth\nleft", "zswap only, nine of ten freed: a sparse id space", tenth)
    text = "zswap only, after pages came and went: a fragmented id space"
    yield Scenario("churn", "after\nchurn", text, Subject.churn)
    yield Scenario("swap cache", "swap\ncache", "zswap only, shared by 2, all in the swap cache", Subject.cache)
    yield Scenario("shared 0 %", "0 %\nshared", "zswap only, no page shared", Subject.swap_out)
    for percent in PERCENT:
        for holders in HOLDERS:
            text = f"zswap only, {percent} % of pages shared by {holders}"
            name, heading = f"shared {percent} % by {holders}", f"{percent} %\nby {holders}"
            yield Scenario(name, heading, text, sharing(percent, holders))
    yield Scenario("ten times", "10 x\npages", "zswap only, ten times the pages", Subject.swap_out, times=10)


SCENARIOS = {scenario.name: scenario for scenario in scenarios()}


@dataclass(frozen=True)
class Memory:
    """The metadata of one design in one scenario."""

    scenario: str
    text: str
    design: str
    slots: int
    """The swap file, in pages."""
    given_device: bool
    """The scenario has no swap file, but the design can't do without: it got one as large as the pages."""
    idle_bytes: int
    pages: int
    """Swapped at the peak; 0 in the idle scenarios."""
    peak_bytes: int
    pages_left: int
    left_bytes: int
    """When half of the pages have been freed."""

    @property
    def peak(self) -> float:
        """Bytes for each swapped page at the peak; of an idle map, KiB."""
        return self.peak_bytes / (self.pages or 1024)

    @property
    def left(self) -> float:
        """The same when half of the pages have been freed."""
        return self.left_bytes / (self.pages_left or 1024)


def measure(scenario: Scenario, design: str, pages: int, seed: int, words: int = 64) -> Memory:
    """Bring a fresh map of the design into the scenario's state, and then free half of the pages."""
    subject = Subject(design, pages * scenario.times, seed, device=scenario.device, words=words)
    idle = subject.map.metadata()
    scenario.prepare(subject)
    swapped = subject.map.ids()
    peak = subject.map.metadata()
    if swapped:
        subject.leave(swapped - swapped // 2, in_order=scenario.in_order)
    return Memory(
        scenario=scenario.name,
        text=scenario.text,
        design=design,
        slots=subject.slots,
        given_device=not scenario.device and subject.slots > 0,
        idle_bytes=idle,
        pages=swapped,
        peak_bytes=peak,
        pages_left=subject.map.ids(),
        left_bytes=subject.map.metadata(),
    )
