"""The swap map's rules, for every design: against a model, at scale, and with threads that meet in it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
import threading
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from maps import ALMOST_NOTHING, LESS, PATIENCE, Ids, almost_nothing, alone, drop, kind_of, span, together
from userswap.swap.map import BOUND, CACHE, COUNT_MAX, DEBUG, DESIGN_NAMES, SAME, SLOT, ZSWAP, Map, entry, slot

# Linux begins an unused cluster before it gives single slots what runs have left of others.
CLUSTERS_FIRST = {"swap_table", "redirect"}

designs = pytest.mark.parametrize("design", DESIGN_NAMES)


# ---- against a model ----

HOLDERS = 4000


@dataclass(eq=False)
class Swapped:
    """What the model knows of an id: its entry, its holders, references that no holder here has, its swap cache."""

    word: int
    holders: set[int]
    more: int = 0
    folio: int = 0
    shared: bool = False  # it was, at some time: only such ids have a swap cache
    locked: int | None = None  # the holder that has it locked

    @property
    def count(self) -> int:
        return len(self.holders) + self.more


@dataclass
class Chooser:
    """Entries as backends make them: every slot is one entry's only."""

    design: str
    made: int = 0
    kinds: tuple[int, ...] = field(default=(SAME, ZSWAP, SLOT))

    def word(self, kind: int, payload: int, device: int) -> int:
        self.made += 1
        if kind == SLOT:
            return slot(0 if self.design in BOUND else device, self.made * 16)
        return entry(kind, payload % 2**34 if kind == SAME else payload)


picks = st.integers(0, 2**30)
payloads = st.one_of(st.integers(1, 2**44 - 1), st.integers(1, 9))


class Model(RuleBasedStateMachine):
    """A dict of holder to what it holds says what the map must say."""

    design = "sparse"

    def __init__(self) -> None:
        super().__init__()
        self.map = Map(self.design, holders=HOLDERS + 2000)
        self.held: dict[int, Swapped] = {}
        self.free = list(range(HOLDERS))[::-1]
        self.chooser = Chooser(self.design)
        self.empty = self.map.metadata()

    @property
    def ids(self) -> list[Swapped]:
        return list({id(s): s for s in self.held.values()}.values())

    def pick(self, number: int) -> tuple[int, Swapped] | None:
        if not self.held:
            return None
        holder = sorted(self.held)[number % len(self.held)]
        return holder, self.held[holder]

    def as_kept(self, holder: int, word: int) -> int:
        home = self.map.home(holder)
        return home if home is not None and kind_of(word) == SLOT else word

    @rule(kind=st.sampled_from([SAME, ZSWAP, SLOT]), payload=payloads, device=st.integers(0, 1))
    def alloc(self, kind: int, payload: int, device: int) -> None:
        word = self.chooser.word(kind, payload, device)
        holder = self.free.pop()
        self.map.alloc(holder, word)
        assert self.map.id(holder) > 0
        assert self.map.id(holder) not in {self.map.id(other) for other in self.held if kind_of(word) == SLOT}
        self.held[holder] = Swapped(self.as_kept(holder, word), {holder})

    @rule(n=st.integers(2, 32), payload=payloads)
    def alloc_run(self, n: int, payload: int) -> None:
        words = [self.chooser.word((ZSWAP, SAME, SLOT)[i % 3], payload + i, 0) for i in range(n)]
        self.free.sort(reverse=True)
        first = self.free[-1]
        if self.free[-n:] != list(range(first, first + n))[::-1]:
            return
        if self.map.alloc_run(first, words):
            del self.free[-n:]
            for i in range(n):
                self.held[first + i] = Swapped(self.as_kept(first + i, words[i]), {first + i})
        else:
            assert all(self.map.id(first + i) == 0 for i in range(n)), "all of them, or none"

    @rule(number=picks)
    def lock(self, number: int) -> None:
        if (picked := self.pick(number)) and picked[1].locked is None:
            holder, swapped = picked
            assert self.map.lock(holder) == swapped.word
            swapped.locked = holder

    @rule(number=picks, kind=st.sampled_from([ZSWAP, SLOT, CACHE, 0]), payload=payloads, device=st.integers(0, 1))
    def unlock(self, number: int, kind: int, payload: int, device: int) -> None:
        locked = [swapped for swapped in self.ids if swapped.locked is not None]
        if not locked:
            return
        swapped = locked[number % len(locked)]
        assert swapped.locked is not None
        word = swapped.word
        if kind == CACHE and swapped.folio and swapped.shared:
            word = entry(CACHE)
        elif kind in (ZSWAP, SLOT) and kind_of(swapped.word) != SAME:
            word = self.chooser.word(kind, payload, device)
        elif kind_of(swapped.word) == CACHE and kind == 0:
            word = self.chooser.word(SAME, payload, device)
        self.map.unlock(swapped.locked, word)
        swapped.word = self.as_kept(swapped.locked, word)
        swapped.locked = None

    @rule(number=picks, kind=st.sampled_from([ZSWAP, SLOT]), payload=payloads, device=st.integers(0, 1))
    def move(self, number: int, kind: int, payload: int, device: int) -> None:
        """From the side of storage: writeback, compaction."""
        if (picked := self.pick(number)) and kind_of(picked[1].word) in (ZSWAP, SLOT):
            holder, swapped = picked
            owner = self.map.owner(holder)
            stale = self.chooser.word(ZSWAP, (swapped.word >> 8) + 1, 0)
            assert not self.map.try_owner(owner, stale), "another entry is not the owner's"
            assert self.map.try_owner(owner, swapped.word) == (swapped.locked is None)
            if swapped.locked is None:
                assert not self.map.try_owner(owner, swapped.word), "somebody has it"
                word = self.chooser.word(kind, payload, device)
                self.map.unlock_owner(owner, word)
                swapped.word = self.as_kept(holder, word)

    @rule(number=picks)
    def dup(self, number: int) -> None:
        if (picked := self.pick(number)) and picked[1].locked != picked[0]:
            into = self.free.pop()
            self.map.dup(picked[0], into)
            picked[1].holders.add(into)
            picked[1].shared = True
            self.held[into] = picked[1]

    @rule(number=picks, n=st.sampled_from([1, 2, 61, 62, 63, 254, 255, 2046, 2047, 2048, 65535, 2**30, 2**40, 2**61]))
    def add(self, number: int, n: int) -> None:
        if (picked := self.pick(number)) and picked[1].locked != picked[0]:
            holder, swapped = picked
            if swapped.count + n <= COUNT_MAX[self.design]:
                self.map.add(holder, n)
                swapped.more += n
                swapped.shared = True
            else:
                with pytest.raises(OverflowError):
                    self.map.add(holder, n)

    @rule(number=picks, part=st.sampled_from([1, 2, 3, 0]))
    def sub(self, number: int, part: int) -> None:
        if (picked := self.pick(number)) and picked[1].more and picked[1].locked != picked[0]:
            holder, swapped = picked
            n = max(1, swapped.more // part) if part else 1
            swapped.more -= n
            assert self.map.sub(holder, n) == swapped.count

    @rule(number=picks)
    def put(self, number: int) -> None:
        if (picked := self.pick(number)) is None:
            return
        holder, swapped = picked
        if swapped.count > 1 and swapped.locked != holder:
            if len(swapped.holders) == 1:
                return  # who holds it here goes last, so that the model can ask for it
            assert self.map.put(holder) == (swapped.count - 1, 0)  # also while another holder has it locked
            swapped.holders.remove(holder)
        elif swapped.locked is None:
            self.last_put(holder, swapped)
        else:
            return
        del self.held[holder]
        self.free.append(holder)

    def last_put(self, holder: int, swapped: Swapped) -> None:
        owner = self.map.owner(holder)
        assert self.map.put(holder) == (0, swapped.word)
        assert not self.map.try_owner(owner, swapped.word)
        self.map.free(holder)
        assert self.map.id(holder) == 0

    @rule(number=picks, folio=st.integers(0, 2**48 - 1))
    def cache(self, number: int, folio: int) -> None:
        locked = [swapped for swapped in self.ids if swapped.locked is not None and swapped.shared]
        if locked:
            swapped = locked[number % len(locked)]
            assert swapped.locked is not None
            if kind_of(swapped.word) != CACHE or folio:
                self.map.cache(swapped.locked, folio)
                swapped.folio = folio

    @rule(device=st.integers(0, 1))
    def iterate(self, device: int) -> None:
        if self.design in BOUND and device:
            return
        there = [s for s in self.ids if kind_of(s.word) == SLOT and s.word >> 49 & 15 == device]
        mine = {s.word: s for s in there if s.locked is None or self.design in BOUND}
        owner, seen, passed = 0, [], 0
        while True:
            owner, word, busy = self.map.next(device, owner)
            passed += busy
            if not owner:
                break
            seen.append(word)
            same = self.map.owner(min(mine[word].holders))  # or another name for it: then what locks one locks both
            if self.design in BOUND:
                assert same == owner
            else:
                assert not self.map.try_owner(owner, word), "it is locked"
                assert not self.map.try_owner(same, word), "and it is the one that it should be"
                self.map.unlock_owner(owner, word)
                assert self.map.try_owner(same, word)
                self.map.unlock_owner(same, word)
        assert sorted(seen) == sorted(mine)
        assert passed == (0 if self.design in BOUND else len(there) - len(mine))

    @precondition(lambda self: len(self.held) < HOLDERS // 2)
    @rule(n=st.integers(1, 900))
    def burst(self, n: int) -> None:
        first, second = span(HOLDERS, n), span(HOLDERS + 1000, n)
        self.map.run("alloc", first, entry(ZSWAP, 7))
        self.map.run("dup", first, into=second)
        self.map.run("fault", first)
        self.map.run("put", second)
        self.map.run("put", first[::-1].copy())

    @invariant()
    def agree(self) -> None:
        assert self.map.ids() == len(self.ids)
        for swapped in self.ids:
            holder = min(swapped.holders)
            assert self.map.count(holder) == swapped.count
            assert self.map.cached(holder) == swapped.folio

    def teardown(self) -> None:
        for swapped in self.ids:
            if swapped.locked is not None:
                self.map.unlock(swapped.locked, swapped.word)
            last = min(swapped.holders)
            if swapped.more:
                assert self.map.sub(last, swapped.more) == len(swapped.holders)
            for left, holder in enumerate(sorted(swapped.holders - {last})):
                assert self.map.put(holder)[0] == len(swapped.holders) - 1 - left
            self.last_put(last, swapped)
        assert self.map.ids() == 0
        assert self.map.metadata() <= self.empty + almost_nothing(self.design, 1 << 18)


@designs
def test_a_map_does_what_a_dict_does(design: str) -> None:
    class Designed(Model):
        pass

    Designed.design = design
    case = Designed.TestCase
    case.settings = settings(
        max_examples=40, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
    )
    case("runTest").debug()


# ---- ids and memory ----


@designs
@pytest.mark.parametrize("n", [1, 511, 512, 513, *([9_000] if DEBUG else [262_143, 262_144, 264_000])])
def test_every_id_is_another_and_all_memory_comes_back(design: str, n: int) -> None:
    swap_map = Map(design, slots=300_000)
    empty = swap_map.metadata()
    one, two = span(0, n), span(500_000, n)
    swap_map.run("alloc", one, entry(ZSWAP, 7))
    ids = {swap_map.id(int(holder)) for holder in one}
    assert len(ids) == n and 0 not in ids
    swap_map.run("dup", one, into=two)
    assert swap_map.count(int(two[-1])) == 2
    ids = {swap_map.id(int(holder)) for holder in one}
    assert len(ids) == n and 0 not in ids
    swap_map.run("put", one)
    assert swap_map.ids() == n
    assert swap_map.count(int(two[-1])) == 1
    swap_map.run("put", two[::-1].copy())
    assert swap_map.ids() == 0
    assert swap_map.metadata() <= empty + almost_nothing(design)


@pytest.mark.parametrize(("design", "alone_bytes", "shared_bytes"), [("on_demand", 0.1, 8.25), ("sparse", 8.25, 16.5)])
def test_bytes_an_id_costs(design: str, alone_bytes: float, shared_bytes: float) -> None:
    n = 1_000_000 // LESS
    swap_map = Map(design, holders=1 << 21)
    one, two = span(0, n), span(n, n)
    for first in (entry(ZSWAP, 1), slot(0, 0)):
        swap_map.run("alloc", one, first)
        unshared = swap_map.metadata()
        assert unshared / n <= alone_bytes + (LESS > 1)
        swap_map.run("dup", one, into=two)
        assert swap_map.metadata() / n <= shared_bytes + (LESS > 1)
        swap_map.run("put", two)
        if design == "sparse":
            assert swap_map.metadata() <= unshared + ALMOST_NOTHING, "a count of one is not kept"
        swap_map.run("put", one)
        assert swap_map.metadata() <= ALMOST_NOTHING


@designs
def test_metadata_is_memory_that_the_process_has(design: str) -> None:
    program = f"""
        import numpy as np
        from userswap.swap.map import Map, ZSWAP, entry
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096
        n = 600_000
        one, two = np.arange(n, dtype=np.uint64), np.arange(n, 2 * n, dtype=np.uint64)
        even, odd, last = two[::2].copy(), two[1::2][: n // 4].copy(), two[1::2][n // 4 :].copy()
        other = Map({design!r}, holders=2 * n)                   # its code is in memory from here on
        other.run("alloc", one[:1000], entry(ZSWAP, 1))
        other.run("dup", one[:1000], into=two[:1000])
        before = resident()
        m = Map({design!r}, holders=2 * n, slots=n)
        empty = m.metadata()
        assert abs(resident() - before - empty) < 0.02 * empty + (300 << 10), (resident() - before, empty)
        words = 2 * n * 8                                        # the window's own table of holders
        m.run("alloc", one, entry(ZSWAP, 1)); m.run("dup", one, into=two)
        grown = resident() - before - words
        assert abs(grown - m.metadata()) < 0.02 * grown + (300 << 10), (grown, m.metadata())
        m.run("put", one); m.run("put", even); m.run("put", odd)
        grown = resident() - before - words
        assert abs(grown - m.metadata()) < 0.02 * grown + (300 << 10), (grown, m.metadata())
        m.run("put", last)
        assert resident() - before - words - empty < 1 << 19
    """
    alone(program)


def test_holes_are_filled_from_below() -> None:
    swap_map = Map("sparse")
    n = 300 * 512 - 1  # 300 whole leaves: id 0 is never given
    holders = span(0, n)
    swap_map.run("alloc", holders, entry(ZSWAP, 7))
    ids = np.array([swap_map.id(i) for i in range(n)], np.uint64)
    assert np.array_equal(np.sort(ids), span(1, n)), "dense, and never 0"
    rng = np.random.default_rng(3)
    gone = rng.random(n) < 0.9
    leaves = ids >> np.uint64(9)
    gone |= np.isin(leaves, rng.choice(300, 200, replace=False))  # whole leaves, too
    gone[-1] = False
    swap_map.run("put", holders[gone])
    assert swap_map.metadata() < 8.3 * n / 3 + (64 << 10), "what is empty has no memory"
    swap_map.run("alloc", holders[gone], entry(ZSWAP, 7))
    again = np.array([swap_map.id(int(i)) for i in holders[gone]], np.uint64)
    assert np.array_equal(np.sort(again), np.sort(ids[gone])), "every hole, and nothing above"
    # Leaves that exist are filled before others are made.
    first = again[: int((~gone).sum())] >> np.uint64(9)
    assert np.isin(first, np.unique(leaves[~gone])).all()


@designs
def test_churn_leaves_no_memory_behind(design: str) -> None:
    swap_map = Map(design, slots=60_000)
    empty = swap_map.metadata()
    rng = np.random.default_rng(5)
    live, spare = span(0, 50_000), span(100_000, 5000)
    swap_map.run("alloc", live, entry(ZSWAP, 1))
    swap_map.run("dup", live[:5000], into=spare)
    swap_map.run("put", spare)
    full = swap_map.metadata()
    for _ in range(30 // LESS + 1):
        rng.shuffle(live)
        swap_map.run("dup", live[:5000], into=spare)
        swap_map.run("put", live[:20_000])
        swap_map.run("put", spare)
        swap_map.run("alloc", live[:20_000], entry(ZSWAP, 1))
        assert len(live) == swap_map.ids()
    assert swap_map.metadata() - empty < 1.5 * max(full - empty, 8.5 * 55_000)
    swap_map.run("put", live)
    assert swap_map.metadata() <= empty + almost_nothing(design)


@designs
def test_no_memory_leaves_the_map_as_it_was(design: str) -> None:
    program = f"""
        import resource
        import numpy as np
        from userswap.swap.map import Map, ZSWAP, entry
        most = 1_500_000
        m = Map({design!r}, holders=2 * most, slots=most)
        empty = m.metadata()
        one, two = np.arange(most, dtype=np.uint64), np.arange(most, 2 * most, dtype=np.uint64)
        used = int(open("/proc/self/statm").read().split()[0]) * 4096
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), hard))
        try:
            m.run("alloc", one, entry(ZSWAP, 9))
        except MemoryError:
            pass
        n = m.ids()
        assert n > 100_000 and m.id(n - 1) and (n == most or not m.id(n))
        one, two = one[:n], two[:n]
        try:
            m.run("dup", one, into=two)
        except MemoryError:
            pass
        for i in range(0, n, 512):
            had = m.count(i)
            try:
                m.add(i, 2**20)
                assert m.count(i) == had + 2**20 and m.sub(i, 2**20) == had
            except MemoryError:
                assert m.count(i) == had
            word = m.lock(i)
            try:
                m.cache(i, 99)
                m.cache(i, 0)
            except MemoryError:
                pass
            m.unlock(i, word)
            assert word == entry(ZSWAP, 9 + i) and m.cached(i) == 0
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        held = np.array([m.id(int(i)) != 0 for i in two])
        assert [m.count(int(i)) for i in one] == (1 + held).tolist()
        m.run("put", one); m.run("put", two[held])
        assert m.ids() == 0 and m.metadata() <= empty + {almost_nothing(design, 1_500_000)}
        m.alloc(0, entry(ZSWAP, 1)); m.dup(0, 1)
    """
    alone(program)


@designs
def test_without_a_slot_there_is_no_id_in_a_bound_design(design: str) -> None:
    swap_map = Map(design, slots=0)
    if design in BOUND:
        with pytest.raises(MemoryError):
            swap_map.alloc(0, entry(ZSWAP, 1))
        swap_map = Map(design, slots=1000)
        with pytest.raises(MemoryError):
            swap_map.run("alloc", span(0, 1001), entry(ZSWAP, 1))
        # what per-CPU caches hold back may be a few
        assert 1000 - 256 <= swap_map.ids() <= 1000
        swap_map.run("put", span(0, 500))
        swap_map.run("alloc", span(0, 400), entry(ZSWAP, 1))
    else:
        swap_map.run("alloc", span(0, 1000), entry(ZSWAP, 1))
        assert swap_map.ids() == 1000


# ---- runs ----


@designs
def test_a_run_is_together_and_each_of_it_goes_alone(design: str) -> None:
    swap_map = Map(design)
    words = [entry(ZSWAP, 1 + i) for i in range(16)]
    assert swap_map.alloc_run(0, words)
    ids = [swap_map.id(i) for i in range(16)]
    assert ids == list(range(ids[0], ids[0] + 16)), "consecutive numbers, or entries"
    swap_map.dup(5, 100)
    assert [swap_map.count(i) for i in range(16)] == [1 + (i == 5) for i in range(16)]
    for i in range(0, 16, 2):
        assert drop(swap_map, i) == words[i]
    assert swap_map.ids() == 8, "partly dirtied: the rest is as it was"
    assert [swap_map.lock(i) for i in range(1, 16, 2)] == words[1::2]
    for i in range(1, 16, 2):
        swap_map.unlock(i, words[i])
    assert swap_map.put(5) == (1, 0)
    assert [drop(swap_map, i) for i in (1, 3, 100)] == [words[1], words[3], words[5]]


@designs
def test_runs_among_single_ids_leave_no_holes_for_long(design: str) -> None:
    n = 32_000 // LESS // 16 * 16
    swap_map = Map(design, slots=2 * n + 1000)
    empty = swap_map.metadata()
    swap_map.run("run", span(0, n), entry(ZSWAP, 1))
    packed = swap_map.metadata() - empty
    swap_map.run("put", np.concatenate([span(i, 7) for i in range(0, n, 16)]))
    swap_map.run("alloc", span(100_000, n // 16 * 7), entry(ZSWAP, 1))
    if design not in CLUSTERS_FIRST:
        more = 1.3 if design != "vswap" else 1 + 7 / 16
        assert swap_map.metadata() - empty <= more * packed + (64 << 10), "single ids go where runs left room"
    assert swap_map.ids() == n
    swap_map.run("fault", span(100_000, n // 16 * 7))


# ---- counts ----


@designs
def test_a_count_by_ones_passes_every_byte(design: str) -> None:
    swap_map = Map(design)
    swap_map.alloc(0, entry(ZSWAP, 1))
    swap_map.alloc(1, entry(ZSWAP, 2))
    for n in (255, 257, 2047, 2049, 65_535, 65_537):
        many = span(10, n - 1)
        swap_map.run("dup", np.zeros(n - 1, np.uint64), into=many)
        assert (swap_map.count(0), swap_map.count(1)) == (n, 1)
        swap_map.run("put", many)
        assert (swap_map.count(0), swap_map.count(1)) == (1, 1)
    assert drop(swap_map, 0) == entry(ZSWAP, 1)


@designs
@pytest.mark.parametrize("n", [2, 62, 63, 255, 256, 2047, 2048, 2049, 65536, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**62])
def test_no_count_is_too_large_or_it_is_refused(design: str, n: int) -> None:
    swap_map = Map(design)
    swap_map.alloc(0, entry(ZSWAP, 1))
    swap_map.alloc(1, entry(ZSWAP, 2))
    if n > COUNT_MAX[design]:
        with pytest.raises(OverflowError):
            swap_map.add(0, n - 1)
        n = COUNT_MAX[design]
    swap_map.add(0, n - 1)
    assert (swap_map.count(0), swap_map.count(1)) == (n, 1)
    if n == COUNT_MAX[design]:
        with pytest.raises(OverflowError):
            swap_map.dup(0, 2)
        assert swap_map.count(0) == n
        assert swap_map.id(2) == 0
    if n > 2:
        assert swap_map.sub(0, 1) == n - 1
        assert swap_map.sub(0, n - 2) == 1
    else:
        assert swap_map.sub(0, 1) == 1
    assert drop(swap_map, 0) == entry(ZSWAP, 1)
    assert drop(swap_map, 1) == entry(ZSWAP, 2)


@designs
def test_large_counts_and_cached_folios_leave_no_memory_behind(design: str) -> None:
    n = 512 * 200 // LESS
    swap_map = Map(design, slots=n + 1000)
    empty = swap_map.metadata()
    swap_map.run("alloc", span(0, n), entry(ZSWAP, 1))
    swap_map.run("dup", span(0, n), into=span(n, n))
    for i in range(5, n, 512):  # one in each node, so that a word that stays keeps a page
        swap_map.add(i, 5000)
        swap_map.add(i + 1, 70)
        for holder in (i, i + 2):
            word = swap_map.lock(holder)
            swap_map.cache(holder, 4096)
            swap_map.unlock(holder, word)
        assert swap_map.sub(i, 4000) == 1002
        assert swap_map.sub(i, 1000) == 2
        assert swap_map.sub(i + 1, 70) == 2
        word = swap_map.lock(i)
        swap_map.cache(i, 0)
        swap_map.unlock(i, word)
    swap_map.run("put", span(0, n))
    swap_map.run("put", span(n, n))
    assert swap_map.ids() == 0
    assert swap_map.metadata() <= empty + almost_nothing(design, n + 1000)


@designs
def test_an_entry_moves_and_its_count_and_cache_stay(design: str) -> None:
    swap_map = Map(design)
    swap_map.alloc(0, slot(0, 0))
    swap_map.dup(0, 1)
    swap_map.add(0, 3000)
    word = swap_map.lock(0)
    swap_map.cache(0, 4096)
    swap_map.unlock(0, entry(ZSWAP, 7))
    owner = swap_map.owner(0)
    assert swap_map.try_owner(owner, entry(ZSWAP, 7))
    swap_map.unlock_owner(owner, word)
    assert (swap_map.count(1), swap_map.cached(1)) == (3002, 4096)
    found, seen, _ = swap_map.next(0)
    assert seen == word
    if design in BOUND:
        assert found == owner
    else:
        assert not swap_map.try_owner(owner, word), "found is the owner, or another name for it"
        swap_map.unlock_owner(found, entry(ZSWAP, 8))
    assert (swap_map.count(1), swap_map.cached(1)) == (3002, 4096)
    swap_map.sub(0, 3000)
    assert (swap_map.count(1), swap_map.cached(1)) == (2, 4096)


# ---- locks ----


@designs
def test_who_waits_for_an_entry_gets_it(design: str) -> None:
    swap_map = Map(design)
    for i in range(20):
        swap_map.alloc(i, entry(ZSWAP, 1))
        for waiter in (1, 2, 3):
            swap_map.dup(i, waiter * 100 + i)
        swap_map.lock(i)

    def wait(waiter: int) -> None:
        for i in range(20):
            swap_map.unlock(waiter * 100 + i, swap_map.lock(waiter * 100 + i) + 256)

    def release() -> None:
        for i in range(20):
            threading.Event().wait(0.003)  # the others sleep in the kernel by now
            swap_map.unlock(i, entry(ZSWAP, 100))

    together(lambda: wait(1), lambda: wait(2), lambda: wait(3), release)
    assert {swap_map.lock(i) for i in range(20)} == {entry(ZSWAP, 103)}


@designs
def test_a_count_moves_while_the_entry_is_locked(design: str) -> None:
    """What a fork needs: no dup and no put waits for I/O, and unlock does not undo them."""
    swap_map = Map(design)
    swap_map.alloc(0, entry(ZSWAP, 1))
    swap_map.dup(0, 1)
    assert swap_map.lock(0) == entry(ZSWAP, 1)
    together(lambda: swap_map.dup(1, 2), lambda: swap_map.add(1, 5000))
    swap_map.unlock(0, entry(ZSWAP, 2))
    assert swap_map.count(0) == 5003
    assert swap_map.lock(0) == entry(ZSWAP, 2)
    together(lambda: swap_map.put(2), lambda: swap_map.sub(1, 5000))
    assert not swap_map.try_owner(swap_map.owner(0), entry(ZSWAP, 2))
    swap_map.unlock(0, entry(ZSWAP, 3))
    assert swap_map.put(1) == (1, 0)
    assert drop(swap_map, 0) == entry(ZSWAP, 3)


@designs
def test_the_last_put_waits_for_the_lock_and_sees_what_it_left(design: str) -> None:
    swap_map = Map(design)
    swap_map.alloc(0, entry(ZSWAP, 1))
    swap_map.dup(0, 1)
    swap_map.put(1)
    owner = swap_map.owner(0)
    assert swap_map.try_owner(owner, entry(ZSWAP, 1))

    def release() -> None:
        threading.Event().wait(0.02)
        swap_map.unlock_owner(owner, entry(ZSWAP, 2))

    assert together(lambda: swap_map.put(0), release)[0] == (0, entry(ZSWAP, 2))
    swap_map.free(0)


@designs
def test_storage_is_told_when_its_owner_becomes_another(design: str) -> None:
    """A dup may make the id, and so the owner, another one; from then on the old owner leads nowhere."""
    swap_map = Map(design)
    swap_map.alloc(0, entry(ZSWAP, 1))
    before = swap_map.owner(0)
    swap_map.dup(0, 1)
    after = swap_map.owner(0)
    assert after == swap_map.owner(1)
    assert before == after or not swap_map.try_owner(before, entry(ZSWAP, 1))
    assert swap_map.try_owner(after, entry(ZSWAP, 1))
    swap_map.unlock_owner(after, entry(ZSWAP, 5))
    assert swap_map.lock(0) == entry(ZSWAP, 5)


# ---- the swap cache ----


@designs
def test_what_happens_to_a_shared_folio_that_comes_back(design: str) -> None:
    """Swap-in's policy: the copy is kept, or given up for the cached folio; the others find it either way."""
    swap_map = Map(design)
    swap_map.alloc(0, entry(ZSWAP, 1))
    for other in (1, 2, 3):
        swap_map.dup(0, other)
    swap_map.lock(0)
    swap_map.cache(0, 4096)
    swap_map.unlock(0, entry(ZSWAP, 1))  # clean, the copy is kept
    assert [swap_map.cached(i) for i in range(4)] == [4096] * 4
    assert swap_map.lock(1) == entry(ZSWAP, 1)
    swap_map.unlock(1, entry(CACHE))  # the storage is given up: only the folio is left, and the count stays
    assert swap_map.cached(2) == 4096
    assert [swap_map.count(i) for i in range(4)] == [4] * 4
    assert not swap_map.try_owner(swap_map.owner(0), entry(ZSWAP, 1)), "storage that was given up has no owner"
    assert swap_map.put(0) == (3, 0)
    assert swap_map.put(1) == (2, 0)
    assert swap_map.put(2) == (1, 0)
    assert swap_map.cached(3) == 4096, "the last one needs it too"
    assert swap_map.lock(3) == entry(CACHE)
    swap_map.unlock(3, entry(SAME, 0))  # swapped out again
    swap_map.lock(3)
    swap_map.cache(3, 0)
    swap_map.unlock(3, entry(SAME, 0))
    assert swap_map.cached(3) == 0
    assert drop(swap_map, 3) == entry(SAME, 0)
    swap_map.alloc(0, entry(ZSWAP, 1))
    swap_map.dup(0, 1)
    swap_map.lock(0)
    swap_map.cache(0, 8192)
    swap_map.unlock(0, entry(CACHE))
    swap_map.put(0)
    assert drop(swap_map, 1) == entry(CACHE), "freed with the cache in place"
    swap_map.alloc(0, entry(ZSWAP, 1))
    swap_map.dup(0, 1)
    assert swap_map.cached(0) == 0, "and the next id does not inherit it"


@designs
def test_an_id_that_is_used_again_has_nothing_of_the_last_one(design: str) -> None:
    swap_map = Map(design)
    swap_map.run("alloc", span(5000, 8), entry(ZSWAP, 1))  # neighbours, so that no page empties
    for holder in range(3):
        swap_map.alloc(holder, entry(ZSWAP, 2))
        swap_map.add(holder, 1)
        swap_map.lock(holder)
        swap_map.cache(holder, 77)
        swap_map.unlock(holder, entry(ZSWAP, 2))
    swap_map.run("sub", span(0, 3), references=2)
    assert swap_map.ids() == 8
    swap_map.run("alloc", span(0, 600), entry(ZSWAP, 3))
    assert {swap_map.count(holder) for holder in range(600)} == {1}
    assert {swap_map.cached(holder) for holder in range(600)} == {0}
    swap_map.run("dup", span(0, 600), into=span(1000, 600))
    assert {swap_map.count(holder) for holder in range(600)} == {2}
    assert {swap_map.cached(holder) for holder in range(600)} == {0}


# ---- swapoff ----


@designs
def test_swapoff_empties_a_device(design: str) -> None:
    n = 5000 // LESS
    swap_map = Map(design)
    swap_map.run("alloc", span(0, n), slot(0, 0))
    swap_map.run("alloc", span(10_000, n), entry(ZSWAP, 1))
    swap_map.run("dup", span(0, n // 2), into=span(20_000, n // 2))
    assert swap_map.swapoff(0)[0] == n
    assert swap_map.next(0)[0] == 0
    if design in BOUND:
        assert swap_map.ids() == n, "who held a slot has its data in RAM now"
    else:
        assert swap_map.ids() == 2 * n
        assert {kind_of(swap_map.lock(i)) for i in range(n)} == {ZSWAP}
        assert {swap_map.count(i) for i in range(n // 2)} == {2}


@pytest.mark.parametrize("design", [name for name in DESIGN_NAMES if name not in BOUND])
def test_swapoff_misses_no_id_that_is_shared_while_it_walks(design: str) -> None:
    n = 40
    swap_map = Map(design)
    swap_map.run("alloc", span(0, n), slot(0, 0))
    found, owner = 0, 0
    for turn in range(3 * n):
        owner, word, busy = swap_map.next(0, owner)
        if owner == 0:
            break
        assert (kind_of(word), busy) == (SLOT, 0)
        swap_map.unlock_owner(owner, entry(ZSWAP, turn))
        found += 1
        if turn < 10:
            swap_map.dup(n - 1 - turn, 100 + turn)
    assert found == n
    assert {kind_of(swap_map.lock(i)) for i in range(n)} == {ZSWAP}


@pytest.mark.parametrize("design", [name for name in DESIGN_NAMES if name not in BOUND])
def test_swapoff_while_slots_come_and_go(design: str) -> None:
    """Who is found is locked, from the very moment that it can be found; and what goes meanwhile is gone."""
    swap_map = Map(design)
    done = threading.Event()
    found = 0
    swap_map.run("alloc", span(1000, 64), slot(1, 0))

    def come_and_go() -> None:
        turn = 0
        while turn < 6000 // LESS or (found < 300 and turn < 300_000):
            holder = turn % 8
            if turn >= 8:
                drop(swap_map, holder)
            swap_map.alloc(holder, slot(0, 32 * turn))
            turn += 1
        done.set()

    def empty() -> None:
        nonlocal found
        while not done.is_set():
            found += swap_map.swapoff(0)[0]

    together(come_and_go, empty)
    assert found
    assert swap_map.ids() == 64 + 8
    assert swap_map.swapoff(1)[0] == 64


@designs
def test_a_folio_that_leaves_the_swap_cache_takes_its_copy_and_is_stored_again(design: str) -> None:
    swap_map = Map(design)
    swap_map.alloc(0, entry(ZSWAP, 1))
    swap_map.dup(0, 1)
    stored = swap_map.home(0) or slot(0, 2**34)
    for again in (entry(ZSWAP, 2), stored, entry(ZSWAP, 3)):
        swap_map.lock(0)
        swap_map.cache(0, 77)
        swap_map.unlock(0, entry(CACHE))
        assert swap_map.cached(1) == 77
        assert swap_map.lock(1) == entry(CACHE)
        swap_map.cache(1, 0)
        assert swap_map.cached(1) == 0
        swap_map.unlock(1, again)
        assert swap_map.cached(0) == 0
        assert swap_map.lock(0) == again
        swap_map.unlock(0, again)


# ---- threads ----


@designs
@pytest.mark.parametrize(("shared", "threads", "rounds"), [(1, 2, 150_000), (8, 3, 75_000), (2000, 4, 25_000)])
def test_threads_lose_no_count_and_no_entry(design: str, shared: int, threads: int, rounds: int) -> None:
    swap_map = Map(design)
    holders = [span(10_000 * i, shared) for i in range(threads)]
    swap_map.run("alloc", holders[0], entry(ZSWAP, 0))
    for i in range(shared):
        swap_map.lock(i)
        swap_map.unlock(i, entry(ZSWAP, i << 2))
    for mine in holders[1:]:
        swap_map.run("dup", holders[0], into=mine)
    counters = np.zeros(shared, np.int64)
    results = together(
        *[
            lambda i=i: swap_map.stress(holders[i], counters, 100_000 + 10_000 * i, 3000, rounds // LESS, i + 1)
            for i in range(threads)
        ]
    )
    assert [wrong for _, _, wrong in results] == [0] * threads
    assert counters.sum() == sum(done for done, _, _ in results), "two were inside one entry's lock"
    assert {swap_map.count(i) for i in range(shared)} == {threads}
    assert swap_map.ids() == shared
    for mine in holders:
        swap_map.run("put", mine)
    assert swap_map.ids() == 0


@designs
@pytest.mark.parametrize(("holders", "objects"), [(2, 40), (200, 900), (4000, 12_000)])
def test_storage_moves_under_a_running_program(design: str, holders: int, objects: int) -> None:
    """Swap-outs, faults, sharing and puts above; compaction and writeback below: every fault finds its own bytes."""
    swap_map = Map(design)
    swap_map.objects_for(objects)
    results = together(
        lambda: swap_map.program(0, holders, 150_000 // LESS, 1, 200 // LESS),
        lambda: swap_map.program(holders, holders, 150_000 // LESS, 2, 200 // LESS),
        lambda: swap_map.mover(3),
        lambda: swap_map.mover(4),
    )
    assert [result[-1] for result in results] == [0] * 4
    assert all(faults > 100 for faults, _, _ in results[:2])
    assert sum(moved for moved, _ in results[2:]) > 100 // LESS
    assert swap_map.ids() == 0


@designs
def test_lookups_while_the_map_grows_and_shrinks(design: str) -> None:
    for n in (*[513] * 60, *([] if DEBUG else [263_000] * 2)):
        swap_map = Map(design, slots=300_000)
        first, second = span(0, 50), span(100, 50)
        many = span(300_000, n)
        swap_map.run("alloc", first, entry(ZSWAP, 0))
        for i in range(50):
            swap_map.lock(i)
            swap_map.unlock(i, entry(ZSWAP, i << 2))
        swap_map.run("dup", first, into=second)
        counters = np.zeros(50, np.int64)
        rounds = (2000 if n == 513 else 60_000) // LESS

        def grow(swap_map: Map = swap_map, many: Ids = many) -> None:
            swap_map.run("alloc", many, entry(ZSWAP, 1 << 30))
            swap_map.run("put", many)

        def look(swap_map: Map = swap_map, counters: Any = counters, rounds: int = rounds) -> tuple[int, int, int]:
            return swap_map.stress(span(0, 50), counters, 200_000, 400, rounds, 11)

        (done, _, wrong), _ = together(look, grow)
        assert wrong == 0
        assert counters.sum() == done
        assert {swap_map.count(i) for i in range(50)} == {2}


@designs
@pytest.mark.parametrize(("n", "threads"), [(3, 2), (1000, 3), (40_000, 2), (20_000, 4)])
@pytest.mark.parametrize("in_step", [True, False])
def test_of_many_last_puts_one_frees(design: str, n: int, threads: int, in_step: bool) -> None:
    n = max(n // LESS, 3)
    rng = np.random.default_rng(n)
    for _ in range(max(1, 100 // LESS // n)):
        swap_map = Map(design)
        empty = swap_map.metadata()
        holders = [span(100_000 * i, n) for i in range(threads)]
        swap_map.run("alloc", holders[0], entry(ZSWAP, 7))
        for mine in holders[1:]:
            swap_map.run("dup", holders[0], into=mine)
        order = rng.permutation(n)
        turns = [mine[order if in_step else rng.permutation(n)] for mine in holders]
        together(*[partial(swap_map.run, "put", mine) for mine in turns])
        assert swap_map.ids() == 0
        assert swap_map.metadata() <= empty + almost_nothing(design)


@designs
def test_counts_go_up_and_down_across_every_boundary_by_threads(design: str) -> None:
    swap_map = Map(design)
    swap_map.alloc(0, entry(ZSWAP, 1))
    holders = [span(10 + 10_000 * i, 4000 // LESS) for i in range(3)]
    for i in range(3):
        swap_map.dup(0, i + 1)

    def up_and_down(i: int) -> None:
        source = np.full(len(holders[i]), i + 1, np.uint64)
        for _ in range(30 // LESS + 1):
            swap_map.run("dup", source, into=holders[i])
            swap_map.run("put", holders[i])

    def fault() -> None:
        for _ in range(20_000 // LESS):
            word = swap_map.lock(0)
            assert word == entry(ZSWAP, 1)
            swap_map.unlock(0, word)

    together(*[lambda i=i: up_and_down(i) for i in range(3)], fault)
    assert swap_map.count(0) == 4
    for i in (1, 2, 3):
        swap_map.put(i)
    assert drop(swap_map, 0) == entry(ZSWAP, 1)


# ---- the window, and what only the debug build says ----


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="on_demand"):
        Map("no such design")
    with pytest.raises(ValueError, match="type"):
        entry(0, 1)
    with pytest.raises(ValueError, match="2\\*\\*45"):
        entry(ZSWAP, 2**45)
    with pytest.raises(ValueError, match="below 16"):
        slot(16, 0)
    swap_map = Map()
    with pytest.raises(ValueError, match="entry"):
        swap_map.alloc(0, 0)
    with pytest.raises(ValueError, match="no id"):
        swap_map.lock(0)
    swap_map.alloc(0, entry(ZSWAP, 1))
    with pytest.raises(ValueError, match="has an id"):
        swap_map.alloc(0, entry(ZSWAP, 1))
    with pytest.raises(ValueError, match="lock"):
        swap_map.cache(0, 1)
    with pytest.raises(ValueError, match="own reference"):
        swap_map.sub(0, 1)
    with pytest.raises(ValueError, match="no holder"):
        swap_map.put(1 << 40)
    with pytest.raises(ValueError, match="holder 0 has an id"):
        swap_map.run("alloc", span(0, 1), entry(ZSWAP, 1))


@designs
@pytest.mark.parametrize(
    ("misuse", "rule_broken"),
    [
        ("m.unlock(1, w)", "not locked"),
        ("m.free(1)", "has a count"),
        ("m.put(1); m.unlock(1, w)", "no count"),
    ],
)
def test_the_debug_build_names_the_rule_that_is_broken(design: str, misuse: str, rule_broken: str) -> None:
    program = f"""
        import resource
        from userswap.swap.map import DEBUG, Map, ZSWAP, entry
        if not DEBUG: raise SystemExit(77)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        w = entry(ZSWAP, 1)
        m = Map({design!r})
        for i in (0, 1):
            m.alloc(i, w)
            m.dup(i, 10 + i)
            m.put(10 + i)
        {misuse}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        check=False, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip("needs the debug build (make debug)")
    assert done.returncode < 0
    assert rule_broken in done.stderr
