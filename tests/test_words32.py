"""The lab's swap maps of 4-byte words: rules, threads, memory, what is refused, and the command that compares them."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from support import userswap
from userswap.cli import main as command
from userswap.lab import compare, memory, timing
from userswap.lab.resident import Resident
from userswap.lab.resident import measure as check_books
from userswap.lab.words32 import DESIGN_NAMES32, SAMPLES, Map32, limits
from userswap.swap.map import BOUND, CACHE, DEBUG, SAME, SLOT, ZSWAP, Map, entry, slot

Ids = npt.NDArray[np.uint64]
designs = pytest.mark.parametrize("design", DESIGN_NAMES32)
LESS = 20 if DEBUG else 1
COUNT_MAX = 2**32 - 1
PATIENCE = 120


def span(first: int, n: int) -> Ids:
    return np.arange(first, first + n, dtype=np.uint64)


def together(*work: Callable[[], Any]) -> list[Any]:
    with ThreadPoolExecutor(len(work)) as threads:
        return [future.result(PATIENCE) for future in [threads.submit(one) for one in work]]


def place(i: int) -> int:
    """The entry of slot i, as large as a folio of 64 KiB."""
    return slot(0, 16 * i)


def drop(swap_map: Map32, holder: int) -> int:
    """The last put and free of a holder's id; its last entry."""
    left, seen = swap_map.put(holder)
    assert left == 0
    swap_map.free(holder)
    return seen


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
            return entry(SAME, 0 if self.design in BOUND else value & 0xFF)
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
        state["count"] -= 1
        left, seen = self.map.put(holder)
        assert left == state["count"]
        if left == 0:
            assert seen == state["entry"]
            self.map.free(holder)
        elif not any(other is state for other in self.of.values()):
            state["count"] += 1  # those elsewhere: one of them takes it over
            self.of[holder] = state
            self.restore(holder, state)

    def restore(self, holder: int, state: dict[str, Any]) -> None:
        """The last holder that is known has put, and others are elsewhere: they can't be reached any more."""
        del self.of[holder]
        self.lost += 1

    lost = 0

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
        assert self.map.ids() == len(states) + self.bulk + self.lost
        for holder, state in self.of.items():
            assert self.map.count(holder) == state["count"]
            assert self.map.cached(holder) == state["folio"]


@designs
def test_a_map_is_what_a_dict_is(design: str) -> None:
    model = type("Model", (Model,), {"design": design})
    run_state_machine_as_test(model, settings=settings(max_examples=60, stateful_step_count=60, deadline=None))
