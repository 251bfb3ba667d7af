"""The lab's swap maps of 4-byte words: rules, threads, memory, what is refused, and the command that compares them."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import textwrap
import threading
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from maps import LESS, PATIENCE, Ids, drop, span, together
from support import userswap
from userswap.cli import main as command
from userswap.lab import compare, memory, resident, timing
from userswap.lab.resident import Resident
from userswap.lab.words32 import DESIGN_NAMES32, SAMPLES, Map32, limits
from userswap.swap.map import BOUND, CACHE, DEBUG, SAME, SLOT, ZSWAP, Map, entry, slot

designs = pytest.mark.parametrize("design", DESIGN_NAMES32)
COUNT_MAX = 2**32 - 1


def place(i: int) -> int:
    """The entry of slot i, as large as a folio of 64 KiB."""
    return slot(0, 16 * i)


# ---- against a dict ----

HOLDERS = 24
SPARE = 5000
"""Rooms for ids that make leaves come and go."""


class Model(RuleBasedStateMachine):
    """A map against a dict: which holders have which id, and entry, count and folio of each."""

    design = ""

    def __init__(self) -> None:
        super().__init__()
        self.map = Map32(self.design, holders=HOLDERS + SPARE)
        self.of: dict[int, dict[str, Any]] = {}
        self.bulk = 0

    def entry(self, kind: int, value: int, holder: int | None = None) -> int:
        if kind == SAME:
            return entry(SAME, 0 if self.design == "swap_table" or value % 3 == 0 else value & 0xFF)
        if kind == ZSWAP:
            return entry(ZSWAP, value)
        if self.design in BOUND:
            return place(0 if holder is None else self.map.id(holder) - 1)
        return place(value % 5000)

    def pick(self, data: st.DataObject, *, held: bool = True) -> int:
        free = [i for i in range(HOLDERS) if i not in self.of]
        return data.draw(st.sampled_from(sorted(self.of) if held else free))

    some = precondition(lambda self: self.of)
    room = precondition(lambda self: len(self.of) < HOLDERS)
    kinds = st.sampled_from([SAME, ZSWAP, SLOT])
    values = st.integers(0, 2**22)

    @room
    @rule(data=st.data(), kind=kinds, value=values)
    def alloc(self, data: st.DataObject, kind: int, value: int) -> None:
        holder = self.pick(data, held=False)
        self.map.alloc(holder, self.entry(kind, value))
        self.of[holder] = {"entry": self.entry(kind, value, holder), "count": 1, "folio": 0, "shared": False}

    @precondition(lambda self: self.of and len(self.of) < HOLDERS)
    @rule(data=st.data())
    def dup(self, data: st.DataObject) -> None:
        holder, into = self.pick(data), self.pick(data, held=False)
        self.map.dup(holder, into)
        self.of[into] = self.of[holder]
        self.of[into]["count"] += 1
        self.of[into]["shared"] = True
        assert self.map.id(into) == self.map.id(holder)

    @some
    @rule(data=st.data(), n=st.sampled_from([1, 2, 3, 13, 14, 15, 100]))
    def add(self, data: st.DataObject, n: int) -> None:
        holder = self.pick(data)
        self.map.add(holder, n)
        self.of[holder]["count"] += n
        self.of[holder]["shared"] = True

    @some
    @rule(data=st.data(), n=st.sampled_from([1, 2, 3, 13, 14, 15, 100]))
    def sub(self, data: st.DataObject, n: int) -> None:
        holder = self.pick(data)
        state = self.of[holder]
        held = sum(other is state for other in self.of.values())
        if state["count"] - n >= held:
            state["count"] -= n
            assert self.map.sub(holder, n) == state["count"]

    @some
    @rule(data=st.data())
    def put(self, data: st.DataObject) -> None:
        holder = self.pick(data)
        state = self.of.pop(holder)
        elsewhere = state["count"] - 1 - sum(other is state for other in self.of.values())
        if elsewhere == state["count"] - 1 and elsewhere:
            assert self.map.sub(holder, elsewhere) == 1  # else nobody here could put those any more
            state["count"] = 1
        state["count"] -= 1
        left, seen = self.map.put(holder)
        assert left == state["count"]
        if left == 0:
            assert seen == state["entry"]
            self.map.free(holder)

    @some
    @rule(data=st.data(), kind=kinds, value=values, fate=st.sampled_from(["entry", "cache", "uncache", "give up"]))
    def fault(self, data: st.DataObject, kind: int, value: int, fate: str) -> None:
        holder = self.pick(data)
        state = self.of[holder]
        assert self.map.lock(holder) == state["entry"]
        if state["shared"] and fate != "entry":
            state["folio"] = 0 if fate == "uncache" else value + 1
            self.map.cache(holder, state["folio"])
        state["entry"] = entry(CACHE) if fate == "give up" and state["shared"] else self.entry(kind, value, holder)
        self.map.unlock(holder, state["entry"])

    @some
    @rule(data=st.data(), kind=kinds, value=values, known=st.booleans())
    def storage(self, data: st.DataObject, kind: int, value: int, known: bool) -> None:
        holder = self.pick(data)
        state = self.of[holder]
        guess = state["entry"] if known else entry(ZSWAP, value)
        owner = self.map.owner(holder)
        done = self.map.try_owner(owner, guess)
        assert done == (guess == state["entry"])
        if done:
            assert not self.map.try_owner(owner, guess), "it is locked"
            state["entry"] = self.entry(kind, value, holder)
            self.map.unlock_owner(owner, state["entry"])

    @rule(n=st.sampled_from([1, 255, 1023, 1024, SPARE]))
    def come_and_go(self, n: int) -> None:
        if self.bulk:
            self.map.run("put", span(HOLDERS, self.bulk))
        self.bulk = 0 if self.bulk else n
        if self.bulk:
            self.map.run("alloc", span(HOLDERS, n), entry(ZSWAP, 1))

    @rule()
    def swapoff(self) -> None:
        if self.design in BOUND:
            return
        states = {id(state): state for state in self.of.values()}
        there = [state for state in states.values() if state["entry"] & 56 == SLOT << 3]
        assert self.map.swapoff()[0] == len(there)
        for holder, state in self.of.items():
            if any(state is moved for moved in there):
                state["entry"] = self.map.lock(holder)
                self.map.unlock(holder, state["entry"])
                assert state["entry"] & 56 == ZSWAP << 3

    @invariant()
    def the_same(self) -> None:
        states = {id(state) for state in self.of.values()}
        assert self.map.ids() == len(states) + self.bulk
        for holder, state in self.of.items():
            assert self.map.count(holder) == state["count"]
            assert self.map.cached(holder) == state["folio"]


@designs
def test_a_map_is_what_a_dict_is(design: str) -> None:
    model = type("Model", (Model,), {"design": design})
    run_state_machine_as_test(
        model, settings=settings(max_examples=25 // LESS + 5, stateful_step_count=50, deadline=None)
    )


# ---- words that are shared, counts and folios ----


@designs
@pytest.mark.parametrize("n", [2, 3, 4, 5, 15, 16, 17, 300, COUNT_MAX])
def test_counts_go_over_every_boundary_and_back(design: str, n: int) -> None:
    swap_map = Map32(design)
    for holder in (0, 1):
        swap_map.alloc(holder, entry(ZSWAP, 1 + holder))
    swap_map.add(0, n - 1)
    assert (swap_map.count(0), swap_map.count(1)) == (n, 1)
    if n == COUNT_MAX:
        with pytest.raises(OverflowError, match="count of 4 bytes"):
            swap_map.dup(0, 2)
        assert (swap_map.count(0), swap_map.id(2)) == (n, 0)
    with pytest.raises(ValueError, match="own reference"):
        swap_map.sub(0, n)
    if n > 2:
        assert swap_map.sub(0, n - 2) == 2
    assert swap_map.sub(0, 1) == 1
    assert [drop(swap_map, holder) for holder in (0, 1)] == [entry(ZSWAP, 1), entry(ZSWAP, 2)]


@designs
def test_an_entry_moves_and_its_count_and_folio_stay(design: str) -> None:
    swap_map = Map32(design)
    swap_map.alloc(0, entry(ZSWAP, 9))
    swap_map.dup(0, 1)
    swap_map.add(0, 3000)
    swap_map.lock(0)
    swap_map.cache(0, 4096)
    swap_map.unlock(0, entry(ZSWAP, 7))
    here = place(swap_map.id(0) - 1)
    owner = swap_map.owner(0)
    assert not swap_map.try_owner(owner, entry(ZSWAP, 9))
    assert swap_map.try_owner(owner, entry(ZSWAP, 7))
    swap_map.unlock_owner(owner, here)
    assert (swap_map.count(1), swap_map.cached(1)) == (3002, 4096)
    assert swap_map.lock(1) == here
    swap_map.unlock(1, entry(CACHE))
    assert swap_map.sub(0, 3000) == 2
    assert (swap_map.count(1), swap_map.cached(1)) == (2, 4096)
    assert swap_map.put(0) == (1, 0)
    assert drop(swap_map, 1) == entry(CACHE)
    swap_map.alloc(0, entry(ZSWAP, 1))
    swap_map.dup(0, 1)
    assert swap_map.cached(0) == 0, "the next id does not inherit the folio"


@designs
def test_storage_is_told_when_its_owner_becomes_another(design: str) -> None:
    swap_map = Map32(design)
    swap_map.alloc(0, entry(ZSWAP, 1))
    before = swap_map.owner(0)
    swap_map.dup(0, 1)
    after = swap_map.owner(0)
    assert after == swap_map.owner(1)
    assert before == after or not swap_map.try_owner(before, entry(ZSWAP, 1))
    assert swap_map.try_owner(after, entry(ZSWAP, 1))
    swap_map.unlock_owner(after, entry(ZSWAP, 5))
    assert swap_map.lock(0) == entry(ZSWAP, 5)


@designs
def test_a_count_moves_while_the_entry_is_locked(design: str) -> None:
    swap_map = Map32(design)
    swap_map.alloc(0, entry(ZSWAP, 1))
    swap_map.dup(0, 1)
    assert swap_map.lock(0) == entry(ZSWAP, 1)
    together(lambda: swap_map.dup(1, 2), lambda: swap_map.add(1, 5000))
    swap_map.unlock(0, entry(ZSWAP, 2))
    assert swap_map.count(0) == 5003
    swap_map.lock(0)
    together(lambda: swap_map.put(2), lambda: swap_map.sub(1, 5000))
    assert not swap_map.try_owner(swap_map.owner(1), entry(ZSWAP, 2))
    swap_map.unlock(0, entry(ZSWAP, 3))
    assert swap_map.put(1) == (1, 0)
    assert drop(swap_map, 0) == entry(ZSWAP, 3)


@designs
@pytest.mark.parametrize("shared", [False, True])
def test_storage_does_not_get_what_a_holder_has_locked(design: str, shared: bool) -> None:
    swap_map = Map32(design)
    swap_map.alloc(0, entry(ZSWAP, 1))
    if shared:
        swap_map.dup(0, 1)
    owner = swap_map.owner(0)
    assert swap_map.lock(0) == entry(ZSWAP, 1)
    assert not swap_map.try_owner(owner, entry(ZSWAP, 1))
    swap_map.unlock(0, entry(ZSWAP, 1))
    assert swap_map.try_owner(owner, entry(ZSWAP, 1))


@designs
def test_who_waits_for_an_entry_gets_it(design: str) -> None:
    swap_map = Map32(design)
    for i in range(20):
        swap_map.alloc(i, entry(ZSWAP, 1))
        for waiter in (1, 2):
            swap_map.dup(i, waiter * 100 + i)
        swap_map.lock(i)

    def wait(waiter: int) -> None:
        for i in range(20):
            swap_map.unlock(waiter * 100 + i, swap_map.lock(waiter * 100 + i) + 256)

    def release() -> None:
        for i in range(20):
            threading.Event().wait(0.003)  # the others sleep in the kernel by now
            swap_map.unlock(i, entry(ZSWAP, 100))

    together(lambda: wait(1), lambda: wait(2), release)
    assert {swap_map.lock(i) for i in range(20)} == {entry(ZSWAP, 102)}


@designs
def test_who_waits_for_a_holder_gets_it(design: str) -> None:
    swap_map = Map32(design)
    swap_map.alloc(0, entry(ZSWAP, 1))
    for _ in range(20):
        owner, seen = swap_map.owner(0), swap_map.lock(0)
        swap_map.unlock(0, seen)
        assert swap_map.try_owner(owner, seen)

        def release(owner: int = owner, seen: int = seen) -> None:
            threading.Event().wait(0.003)
            swap_map.unlock_owner(owner, seen + 256)

        assert together(lambda: swap_map.lock(0), release)[0] == seen + 256
        swap_map.unlock(0, seen + 256)


# ---- threads ----


@designs
@pytest.mark.parametrize("own_holders", [True, False])
@pytest.mark.parametrize(("ids", "threads", "rounds"), [(1, 2, 200_000), (8, 3, 100_000), (2000, 2, 100_000)])
def test_threads_lose_no_count_and_no_entry(
    design: str, own_holders: bool, ids: int, threads: int, rounds: int
) -> None:
    swap_map = Map32(design)
    holders = [span(10_000 * i, ids) for i in range(threads if own_holders else 1)]
    for i in range(ids):
        swap_map.alloc(i, entry(ZSWAP, i << 2))
    for mine in holders[1:]:
        swap_map.run("dup", holders[0], into=mine)
    counters = np.zeros(ids, np.int64)
    results = together(
        *[
            lambda i=i: swap_map.stress(
                holders[i if own_holders else 0], counters, 100_000 + 10_000 * i, 40, rounds // LESS, i + 1
            )
            for i in range(threads)
        ]
    )
    assert [wrong for _, wrong in results] == [0] * threads
    assert counters.sum() == sum(done for done, _ in results), "two were inside one entry's lock"
    assert all(done > rounds // LESS // 4 for done, _ in results)
    assert {swap_map.count(i) for i in range(ids)} == {len(holders)}
    assert swap_map.ids() == ids
    for mine in holders:
        swap_map.run("put", mine)
    assert swap_map.ids() == 0


@designs
@pytest.mark.parametrize("n", [3, 40_000])
def test_of_many_last_puts_one_frees(design: str, n: int) -> None:
    n = max(n // LESS, 3)
    for turn in range(max(1, 100 // LESS // n)):
        swap_map = Map32(design, holders=3 * n)
        holders = [span(n * i, n) for i in range(3)]
        swap_map.run("alloc", holders[0], entry(ZSWAP, 7))
        for mine in holders[1:]:
            swap_map.run("dup", holders[0], into=mine)
        order = np.random.default_rng(turn).permutation(n)
        together(*[partial(swap_map.run, "put", mine[order], together=3) for mine in holders])
        assert swap_map.ids() == 0


@designs
def test_lookups_while_the_map_grows_and_shrinks(design: str) -> None:
    for n in (*[1025] * 250, *([] if DEBUG else [1_100_000])):
        swap_map = Map32(design, holders=2_000_000, slots=1_200_000)
        for i in range(40):
            swap_map.alloc(i, entry(ZSWAP, i << 2))
        swap_map.run("dup", span(0, 40), into=span(100, 40))
        counters = np.zeros(40, np.int64)
        rounds = 2000 // LESS if n == 1025 else 200_000
        many = span(10_000, n)

        def grow(swap_map: Map32 = swap_map, many: Ids = many) -> None:
            some = many[::7].copy()
            swap_map.run("alloc", many, entry(ZSWAP, 1))
            swap_map.run("add", some)
            swap_map.run("sub", some)
            swap_map.run("put", many)

        def look(swap_map: Map32 = swap_map, counters: Any = counters, rounds: int = rounds) -> tuple[int, int]:
            return swap_map.stress(span(0, 40), counters, 1000, 40, rounds, 11)

        (done, wrong), _ = together(look, grow)
        assert wrong == 0
        assert counters.sum() == done
        assert {swap_map.count(i) for i in range(40)} == {2}


# ---- memory ----


@designs
def test_memory_comes_back(design: str) -> None:
    n = 300_000 // LESS
    swap_map = Map32(design, holders=2 * n, slots=n)
    empty = swap_map.metadata()
    for _ in range(2):
        swap_map.run("alloc", span(0, n), entry(ZSWAP, 1))
        swap_map.run("dup", span(0, n), into=span(n, n))
        swap_map.run("add", span(0, n), references=40)
        swap_map.run("cache", span(0, n))
        # A word or a handle and a folio each, and but for slot, whose byte was there, a count.
        assert swap_map.metadata() - empty > (8 if design == "slot" else 10) * n
        swap_map.run("sub", span(0, n), references=40)
        swap_map.run("put", span(0, n))
        swap_map.run("writeback", span(n, n), slot(0, 0))
        swap_map.run("put", span(n, n))
        # The headers' array goes up to the highest page that there was; four free pages are kept.
        assert swap_map.metadata() - empty <= 4096 * 7 + 16 * (24 * n // 4096)
    assert swap_map.ids() == 0


@designs
@pytest.mark.parametrize("pages", [2, 9, 40, 600])
def test_without_memory_calls_are_refused_and_nothing_changes(design: str, pages: int) -> None:
    swap_map = Map32(design, slots=10_000, pages=pages)
    n = 0
    try:
        while n < 9000:
            swap_map.alloc(n, entry(ZSWAP, n))
            n += 1
    except MemoryError:
        assert pages < 600
    assert swap_map.ids() == n
    shared = 0
    for holder in range(n):
        try:
            swap_map.add(holder, 100)
            shared += 1
        except MemoryError:
            assert swap_map.count(holder) == 1
        swap_map.lock(holder)
        here = place(swap_map.id(holder) - 1 if design in BOUND else holder)
        swap_map.unlock(holder, here)
        assert swap_map.lock(holder) == here
        swap_map.unlock(holder, entry(ZSWAP, holder))
    assert shared == n or pages < 600
    for holder in range(n):
        assert swap_map.lock(holder) == entry(ZSWAP, holder)
        swap_map.unlock(holder, entry(ZSWAP, holder))
        if swap_map.count(holder) > 1:
            assert swap_map.sub(holder, 100) == 1
        drop(swap_map, holder)
    assert swap_map.ids() == 0


@designs
def test_ids_are_about_half_as_long_as_with_64_bits(design: str) -> None:
    n = 200_000
    figures = []
    for make in (Map32, Map):
        swap_map = make(design, holders=n, slots=n if design in BOUND else 0)
        swap_map.run("alloc", span(0, n), entry(ZSWAP, 1))
        swap_map.run("add", span(0, n))
        figures.append(swap_map.metadata() / n)
    assert figures[0] < 25
    # vswap's and descriptor's structs are 24 bytes there: 16 is the half of them and a count that did not shrink. What
    # slot has for each slot from the start is as long as there.
    most = 0.72 if design in ("descriptor", "vswap", "slot") else 0.56
    assert 0.35 * figures[1] < figures[0] < most * figures[1] + 4.1 * (design == "on_demand")


@pytest.mark.parametrize("design", [design for design in DESIGN_NAMES32 if design in BOUND])
def test_a_swap_file_ends_where_its_slots_do(design: str) -> None:
    for slots in (0, 1, 255, 256, 1023, 1024, 5000):
        swap_map = Map32(design, slots=slots)
        n = 0
        with pytest.raises(MemoryError):
            while True:
                swap_map.alloc(n, place(0))
                n += 1
        assert n == slots
        assert sorted(swap_map.lock(i) for i in range(n)) == [place(i) for i in range(n)]
        for i in range(n):
            swap_map.unlock(i, place(swap_map.id(i) - 1))
        # What was freed is found again, wherever it is: also what is before the place of the last look.
        for first in range(3):
            freed = {swap_map.id(i) for i in range(first, n, 3)}
            for i in range(first, n, 3):
                drop(swap_map, i)
            for i in range(first, n, 3):
                swap_map.alloc(i, place(0))
            assert {swap_map.id(i) for i in range(first, n, 3)} == freed
            with pytest.raises(MemoryError):
                swap_map.alloc(n, place(0))


def test_an_unused_cluster_is_begun_before_holes_are_looked_for() -> None:
    swap_map = Map32("slot", slots=1024)
    swap_map.run("alloc", span(0, 1024), entry(ZSWAP, 1))
    assert [swap_map.id(i) for i in (0, 1023)] == [1, 1024]
    for holes in (span(5, 1), span(512, 256), span(256, 256)):
        swap_map.run("put", holes)
    swap_map.run("alloc", span(2000, 513), entry(ZSWAP, 1))
    assert [swap_map.id(2000 + i) - 1 for i in (0, 255, 256, 511, 512)] == [512, 767, 256, 511, 5]
    for hole in (900, 800):  # the second is before the place where the look for the first ended
        drop(swap_map, hole)
        swap_map.alloc(hole, entry(ZSWAP, 1))
        assert swap_map.id(hole) == hole + 1


def test_the_reverse_map_is_of_the_slots_in_use() -> None:
    n = 100_000
    swap_map = Map32("vswap", slots=n)
    swap_map.run("alloc", span(0, n), entry(ZSWAP, 1))
    before = swap_map.metadata()
    swap_map.run("writeback", span(0, n), slot(0, 0))
    assert 4 <= (swap_map.metadata() - before) / n < 4.2
    swap_map.run("put", span(0, n // 2))
    swap_map.swapoff()
    # Half of the ids are left, and none of the reverse map, whose slots were put or left.
    assert swap_map.metadata() < 0.55 * before


def test_swapoff_follows_the_reverse_map_where_there_is_one() -> None:
    """Ids come in the order of their slots: nobody looks at those that have none."""
    n = 3000
    for design in ("vswap", "sparse"):
        swap_map = Map32(design, slots=2 * n)
        swap_map.run("alloc", span(0, n), entry(ZSWAP, 1))
        some = span(0, n)[::-1][::2].copy()
        swap_map.run("writeback", some, slot(0, 16))
        assert swap_map.swapoff()[0] == len(some)
        order = [swap_map.lock(int(i)) for i in some]
        assert order == sorted(order, reverse=design == "sparse")


def test_two_ids_that_have_one_slot_both_leave_it() -> None:
    """Storage is freed before its id: whoever gets the slot meets the old id in the reverse map."""
    swap_map = Map32("vswap", slots=700)
    empty = swap_map.metadata()
    for i in range(4):
        swap_map.alloc(i, place(699 if i < 3 else 5))
    assert drop(swap_map, 0) == place(699), "the one that the reverse map has; the others are off it"
    swap_map.lock(1)
    swap_map.unlock(1, place(699))
    assert swap_map.swapoff()[0] == 3
    assert {swap_map.lock(i) & 56 for i in (1, 2, 3)} == {ZSWAP << 3}
    for i in (1, 2, 3):
        swap_map.unlock(i, entry(ZSWAP, 1))
    assert swap_map.swapoff()[0] == 0
    for i in (1, 2, 3):
        drop(swap_map, i)
    swap_map.alloc(0, place(699))  # nothing is left there of the others
    swap_map.alloc(1, place(699))
    drop(swap_map, 1)  # and who is off the map takes nothing away from who is on it
    assert swap_map.swapoff()[0] == 1
    drop(swap_map, 0)
    assert swap_map.metadata() - empty <= 4096 * 6


def test_a_redirect_is_there_for_slots_only_and_has_room_for_every_id() -> None:
    n = 100_000
    swap_map = Map32("redirect", slots=limits("redirect")["slots"])
    swap_map.run("alloc", span(0, n), entry(ZSWAP, 1))
    before = swap_map.metadata()
    swap_map.run("writeback", span(0, n), place(2**30 - 2 - n))
    assert swap_map.lock(n - 1) == place(2**30 - 3)
    assert 4 <= (swap_map.metadata() - before) / n < 4.2
    swap_map.unlock(n - 1, entry(ZSWAP, 1))
    assert swap_map.swapoff()[0] == n - 1
    assert swap_map.metadata() <= before + 4096 * 6


def test_a_folio_moves_into_a_redirects_word_and_out_of_it() -> None:
    """A page that nothing else has is in the word; one that has storage, too, is beside it."""
    n = 50_000
    swap_map = Map32("redirect", holders=2 * n)
    swap_map.run("alloc", span(0, n), entry(ZSWAP, 1))
    swap_map.run("dup", span(0, n), into=span(n, n))
    before = swap_map.metadata()
    swap_map.run("cache", span(0, n))
    assert 4 <= (swap_map.metadata() - before) / n < 4.2
    for i in range(n):
        swap_map.lock(i)
        swap_map.unlock(i, entry(CACHE))
    assert swap_map.metadata() <= before + 4096 * 6
    for i in range(0, n, 7):
        assert swap_map.cached(i) == i + 1
        for folio in (n + i, i + 1):
            assert swap_map.lock(i) == entry(CACHE)
            swap_map.cache(i, folio)
            swap_map.unlock(i, entry(CACHE))
            assert swap_map.cached(n + i) == folio
        swap_map.lock(i)
        swap_map.unlock(i, place(i))
        assert swap_map.cached(i) == i + 1
    for i in range(n):
        assert swap_map.lock(i) == (entry(CACHE) if i % 7 else place(i))
        swap_map.cache(i, 0)
        swap_map.unlock(i, entry(ZSWAP, 2))
        assert swap_map.cached(i) == 0
    assert swap_map.metadata() <= before + 4096 * 6


def test_a_continued_count_takes_a_page_for_4096_slots() -> None:
    swap_map = Map32("slot", slots=20_000)
    swap_map.run("alloc", span(0, 9000), entry(ZSWAP, 1))
    before = swap_map.metadata()
    swap_map.run("add", span(0, 9000), references=61)
    assert swap_map.metadata() == before, "62 fit into the byte"
    swap_map.run("add", span(0, 9000), references=1)
    assert swap_map.metadata() - before == 3 * 4096, "three pages of swap_map are in use"
    swap_map.add(0, 63 * 128)
    assert swap_map.metadata() - before == 4 * 4096
    assert [swap_map.count(i) for i in (0, 1, 8999)] == [63 * 129, 63, 63]
    assert swap_map.sub(0, 63 * 128) == 63
    assert swap_map.sub(0, 1) == 62
    swap_map.add(0, 2)
    assert swap_map.count(0) == 64, "digits that were in use are not read again"


# ---- what does not fit ----


@designs
def test_an_entry_that_does_not_fit_is_refused(design: str) -> None:
    most = limits(design)
    last = most["zswap_objects"] - 1
    slots = 2**20 if design in BOUND else most["slots"]
    swap_map = Map32(design, slots=slots)
    swap_map.alloc(0, entry(ZSWAP, last))
    with pytest.raises(OverflowError):
        swap_map.alloc(1, entry(ZSWAP, last + 1))
    with pytest.raises(OverflowError):
        swap_map.run("alloc", span(1, 2), entry(ZSWAP, last))
    assert (swap_map.id(1), swap_map.ids()) == (0, 1)
    swap_map.dup(0, 1)
    assert swap_map.lock(0) == entry(ZSWAP, last)
    with pytest.raises(OverflowError):
        swap_map.unlock(0, entry(ZSWAP, last + 1))
    with pytest.raises(OverflowError, match="only device"):
        swap_map.unlock(0, slot(1, 0))
    with pytest.raises(OverflowError, match="only device"):
        swap_map.unlock(0, slot(0, 3))
    swap_map.unlock(0, entry(ZSWAP, 0 if last > 2**31 else last))
    assert swap_map.lock(1) == entry(ZSWAP, 0 if last > 2**31 else last)
    if design in BOUND:
        return
    swap_map.unlock(1, place(most["slots"] - 1))
    assert swap_map.lock(0) == place(most["slots"] - 1)
    with pytest.raises(OverflowError):
        swap_map.unlock(0, place(most["slots"]))
    with pytest.raises(OverflowError, match="tell"):
        Map32(design, slots=most["slots"] + 1)
    with pytest.raises(OverflowError, match="swap file has 5 slots"):
        Map32(design, slots=5).alloc(0, place(5))


@designs
def test_values_that_repeat_fit_or_are_refused_as_limits_says(design: str) -> None:
    assert set(limits(design)["does_not_fit"]) < set(SAMPLES)
    swap_map = Map32(design)
    for i, (name, value) in enumerate(SAMPLES.items()):
        word = same(value)
        if name in limits(design)["does_not_fit"]:
            with pytest.raises(OverflowError, match="repeats"):
                swap_map.alloc(i, word)
        else:
            swap_map.alloc(i, word)
            swap_map.dup(i, 100 + i)
            assert swap_map.lock(100 + i) == word, name


def same(value: int) -> int:
    """The entry of a folio that repeats these 8 bytes."""
    low, high = value & 0xFFFFFFFF, value >> 32
    if low == high:
        return entry(SAME, low)
    return entry(SAME, 1 << 32 | low) if high == 0 else entry(SAME, 2 << 32 | high)


@designs
def test_limits_count_the_values_that_repeat(design: str) -> None:
    """Among those of the lower bits nothing else fits than what limits counts."""
    most = limits(design)
    if design == "swap_table":
        assert most["same_filled"] == 1
        return
    k = most["payload_bits"] - 2
    swap_map = Map32(design)

    def fits(value: int) -> bool:
        try:
            swap_map.alloc(0, same(value))
        except OverflowError:
            return False
        seen = swap_map.lock(0)
        swap_map.unlock(0, seen)
        assert seen == same(value)
        drop(swap_map, 0)
        return True

    rng = np.random.default_rng(1)
    halves = [0, 1, 2**k - 1, 2**k, 2**32 - 1, *(int(x) for x in rng.integers(0, 2**32, 300))]
    halves += [x * 0x10001 for x in (1, 2 ** (k - 16) - 1, 2 ** (k - 16), 0xFFFF)]
    for x in halves:
        assert fits(x << 32 | x) == (x < 2**k or x >> 16 == x & 0xFFFF), hex(x)
        assert fits(x) == (x < 2**k)
        assert fits(x << 32) == (x % 2 ** (32 - k) == 0)


def test_what_a_word_has_left_is_its_payload() -> None:
    """By hand, from the layouts in the head of words32.pyx."""
    bits = {name: limits(name)["payload_bits"] for name in DESIGN_NAMES32}
    assert bits == {
        "on_demand": 27, "sparse": 25, "two_trees": 26, "single_tree": 24, "descriptor": 27, "slot": 31,
        "swap_table": 0, "vswap": 27, "redirect": 24,
    }  # fmt: skip
    assert limits("single_tree")["file_bytes_4k"] == 64 << 30
    for design in ("slot", "swap_table", "redirect"):
        assert limits(design)["file_bytes_4k"] == (4 << 40) - 4096, "as many as ids"
    counts = {name: limits(name)["count_in_entry"] for name in DESIGN_NAMES32}
    assert counts == {
        "on_demand": 1, "sparse": 1, "two_trees": 0, "single_tree": 3, "descriptor": COUNT_MAX, "slot": 62,
        "swap_table": 15, "vswap": COUNT_MAX, "redirect": 3,
    }  # fmt: skip


@pytest.mark.parametrize(("design", "bits"), [("swap_table", 23), ("redirect", 24), ("slot", 31)])
def test_a_folio_is_a_frame_number(design: str, bits: int) -> None:
    swap_map = Map32(design)
    swap_map.alloc(0, entry(ZSWAP, 1))
    swap_map.lock(0)
    swap_map.cache(0, 2**bits - 1)
    assert swap_map.cached(0) == 2**bits - 1
    with pytest.raises(OverflowError, match=f"{bits} bits"):
        swap_map.cache(0, 2**bits)
    assert swap_map.cached(0) == 2**bits - 1


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="on_demand, sparse"):
        Map32("traced")
    with pytest.raises(ValueError, match="on_demand, sparse"):
        limits("wrong")
    for wrong in ({"holders": 2**30}, {"pages": 1}, {"slot_run": 0}):
        with pytest.raises(ValueError, match=r"holders|slot"):
            Map32("sparse", **wrong)
    swap_map = Map32("on_demand")
    with pytest.raises(ValueError, match="no id"):
        swap_map.lock(0)
    with pytest.raises(ValueError, match="entry"):
        swap_map.alloc(0, 0)
    with pytest.raises(ValueError, match="shared"):
        swap_map.alloc(0, entry(CACHE))
    swap_map.alloc(0, entry(ZSWAP, 1))
    with pytest.raises(ValueError, match="has an id"):
        swap_map.alloc(0, entry(ZSWAP, 1))
    with pytest.raises(ValueError, match="lock"):
        swap_map.cache(0, 1)
    with pytest.raises(ValueError, match="no holder"):
        swap_map.put(1 << 40)


@designs
@pytest.mark.parametrize(
    ("misuse", "rule_broken"), [("m.unlock(1, w)", "not locked"), ("m.put(2); m.free(1)", "free: locked by")]
)
def test_the_debug_build_names_the_rule_that_is_broken(design: str, misuse: str, rule_broken: str) -> None:
    program = f"""
        import resource
        from userswap.lab.words32 import Map32
        from userswap.swap.map import DEBUG, ZSWAP, entry
        if not DEBUG: raise SystemExit(77)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        w = entry(ZSWAP, 1)
        m = Map32({design!r})
        m.alloc(1, w)
        m.dup(1, 2)
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


# ---- the command ----

QUICK = [name for name, scenario in memory.SCENARIOS.items() if scenario.times == 1]


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all that one comparison of words of 32 bits wrote."""
    there = tmp_path_factory.mktemp("words32")
    files = [f"--{kind}={there / f'all.{kind}'}" for kind in ("json", "csv")]
    files.append(f"--plot={there / 'all.png'}")
    done = userswap(
        "lab", "compare", "--words", "32", "--quick", "--pages", "2000", "--rounds", "1", *files, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (there / "out").write_text(done.stdout)
    return there


@designs
def test_the_books_are_what_the_kernel_says(compared: Path, design: str) -> None:
    rows = json.loads((compared / "all.json").read_text())["resident"]
    [row] = [Resident(**row) for row in rows if row["design"] == design]
    assert row.right, row


def test_the_command_compares_words_of_32_bits(compared: Path) -> None:
    out = (compared / "out").read_text()
    for text in ("Words of 32 bits", "What fits", "64 GiB", "2^27", *DESIGN_NAMES32):
        assert text in out
    assert max(len(line) for line in out.splitlines() if not line.startswith("- ")) <= 100
    document = json.loads((compared / "all.json").read_text())
    assert document["options"]["words"] == 32
    assert document["limits"] == [limits(design) for design in DESIGN_NAMES32]
    assert {(row["scenario"], row["design"]) for row in document["memory"]} == {
        (name, design) for name in QUICK for design in DESIGN_NAMES32
    }
    assert {(row["operation"], row["design"]) for row in document["time"] if row["threads"] == 1} == {
        (name, design) for name in timing.OPERATIONS for design in DESIGN_NAMES32
    }
    assert document["pool"] is None
    with (compared / "all.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["kind"] for row in rows} == {"memory", "time", "limit"}
    bits = {row["design"]: int(row["value"]) for row in rows if row["name"] == "payload_bits"}
    assert bits == {design: limits(design)["payload_bits"] for design in DESIGN_NAMES32}
    assert (compared / "all.png").stat().st_size > 10_000


def test_words_of_32_bits_have_their_own_designs_and_limits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compare, "measure", None)
    for options, message in [
        (["--designs", "traced"], "there is no design 'traced', only on_demand, sparse, two_trees, single_tree"),
        (["--pages", "1677722"], "--pages must be 1,677,721 or less: words of 32 bits"),
        (["--quick", "--pages", "16777216"], "--pages must be 16,777,215 or less"),
    ]:
        assert command.main(["lab", "compare", "--words", "32", *options]) == 2
        assert message in capsys.readouterr().err
    assert command.main(["lab", "compare", "--words", "16"]) == 2
    assert "invalid choice: 16" in capsys.readouterr().err


def test_the_books_are_checked_at_the_width_that_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def books(design: str, seed: int, words: int) -> Resident:
        seen.append((design, words))
        return Resident(design, 1, 1, 1, 1, 1)

    monkeypatch.setattr(resident, "measure", books)
    compare.measure(compare.Options(["sparse"], 1000, 1, 1, True, "random", 32), "", lambda text: None)
    assert seen == [("sparse", 32)]
