"""The whole system against a plain NumPy model: random sequences of everything that can happen to memory."""

from __future__ import annotations

import os
import tempfile
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers import check_empty, check_pool, data, fresh_pool

MIB = 1 << 20
MOST = 48 * MIB
KINDS = st.sampled_from(["noise", "walk", "small", "same"])


class Memory(RuleBasedStateMachine):
    """Arrays in a pool of 16 MiB beside the same arrays in ordinary memory."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = fresh_pool()
        self.files = 0
        self.arrays: list[tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]] = []

    @initialize(kinds=st.lists(KINDS, min_size=4, max_size=5), seed=st.integers(0, 1000))
    def overcommit(self, kinds: list[str], seed: int) -> None:
        """More than fits from the start, so that every later step finds most folios elsewhere."""
        for kind in kinds:
            self.new(6 * MIB - 5000, zeros=False)
            self.fill(len(self.arrays) - 1, kind, seed)

    def total(self) -> int:
        return sum(model.nbytes for _, model in self.arrays)

    def pick(self, which: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        return self.arrays[which % len(self.arrays)]

    @rule(
        size=st.integers(4096, 6 * MIB), zeros=st.booleans(), tiers=st.sampled_from([None, None, "zswap,file", "file"])
    )
    def new(self, size: int, zeros: bool, tiers: str | None = None) -> None:
        if self.total() + size > MOST:
            return
        array: npt.NDArray[Any] = (self.pool.zeros if zeros else self.pool.empty)(size, np.uint8, tiers=tiers)
        assert self.pool.owns(array)
        # What is empty may hold what was freed before: whatever it is, it has to stay.
        self.arrays.append((array, np.zeros(size, np.uint8) if zeros else array.copy()))

    @precondition(lambda self: self.arrays)
    @rule(which=st.integers(0, 99), start=st.floats(0, 1), length=st.integers(1, 2 * MIB), kind=KINDS,
          seed=st.integers(0, 1000))  # fmt: skip
    def write(self, which: int, start: float, length: int, kind: str, seed: int) -> None:
        array, model = self.pick(which)
        at = int(start * (len(model) - 1))
        piece = data(kind, min(length, len(model) - at), seed)
        array[at : at + len(piece)] = piece
        model[at : at + len(piece)] = piece

    @precondition(lambda self: self.arrays)
    @rule(which=st.integers(0, 99), kind=KINDS, seed=st.integers(0, 1000))
    def fill(self, which: int, kind: str, seed: int) -> None:
        array, model = self.pick(which)
        model[:] = data(kind, len(model), seed)
        array[:] = model

    @precondition(lambda self: self.arrays)
    @rule(which=st.integers(0, 99), start=st.floats(0, 1), length=st.integers(1, 2 * MIB))
    def read(self, which: int, start: float, length: int) -> None:
        array, model = self.pick(which)
        at = int(start * (len(model) - 1))
        assert np.array_equal(array[at : at + length], model[at : at + length])

    @precondition(lambda self: self.arrays)
    @rule(
        which=st.integers(0, 99),
        places=st.lists(st.floats(0, 1), min_size=1, max_size=30),
        value=st.integers(0, 255),
    )
    def scatter(self, which: int, places: list[float], value: int) -> None:
        array, model = self.pick(which)
        index = np.array([int(p * (len(model) - 1)) for p in places])
        array[index] = value
        model[index] = value

    @precondition(lambda self: len(self.arrays) > 1)
    @rule(which=st.integers(0, 99), other=st.integers(0, 99))
    def copy(self, which: int, other: int) -> None:
        (a, model_a), (b, model_b) = self.pick(which), self.pick(other)
        n = min(len(model_a), len(model_b))
        if which % len(self.arrays) != other % len(self.arrays):
            a[:n] = b[:n]
            model_a[:n] = model_b[:n]

    @rule(mib=st.integers(1, 16))
    def evict(self, mib: int) -> None:
        self.pool.evict(mib * MIB)

    @rule(mib=st.integers(1, 8))
    def writeback(self, mib: int) -> None:
        assert self.pool.writeback(mib * MIB) >= 0

    @precondition(lambda self: not self.pool._bound and len(self.pool.swaps()) < 5)
    @rule(mib=st.sampled_from([2, 6, 64]), priority=st.integers(-1, 1))
    def swapon(self, mib: int, priority: int) -> None:
        self.files += 1
        self.pool.swapon(f"{tempfile.gettempdir()}/userswap-model-{os.getpid()}-{self.files}:{mib}M:{priority}")

    @precondition(lambda self: not self.pool._bound)
    @rule(which=st.integers(0, 9))
    def swapoff(self, which: int) -> None:
        files = self.pool.swaps()
        gone = files[which % len(files)]
        # What may be in one tier only has to have somewhere to go, or the budget can't be kept.
        if not any(file.limit_bytes >= 64 * MIB and file.priority == 0 for file in files if file is not gone):
            return
        self.pool.swapoff(gone.name)
        assert gone.name not in [file.name for file in self.pool.swaps()]

    @rule()
    def compact(self) -> None:
        self.pool._core.compact()

    @precondition(lambda self: self.arrays)
    @rule(which=st.integers(0, 99))
    def free(self, which: int) -> None:
        array, model = self.arrays.pop(which % len(self.arrays))
        assert np.array_equal(array, model)

    @precondition(lambda self: self.arrays)
    @rule(which=st.integers(0, 99), size=st.integers(4096, 4 * MIB))
    def resize(self, which: int, size: int) -> None:
        at = which % len(self.arrays)
        array, model = self.arrays[at]
        if self.total() + size > MOST:
            return
        del self.arrays[at]
        array.resize(size, refcheck=False)  # NumPy's realloc; what is new reads as zeros
        model = (
            np.resize(model, size)
            if size <= len(model)
            else np.concatenate([model, np.zeros(size - len(model), np.uint8)])
        )
        self.arrays.append((array, model))

    @invariant()
    def holds(self) -> None:
        stats = check_pool(self.pool)
        assert stats.peak_bytes <= stats.budget_bytes * 1.02
        assert stats.over_budget == 0

    def teardown(self) -> None:
        while self.arrays:
            assert np.array_equal(*self.arrays.pop())
        check_empty(self.pool)
        self.pool.close()


TestMemory = Memory.TestCase
TestMemory.settings = settings(
    max_examples=35, stateful_step_count=50, deadline=None, suppress_health_check=list(HealthCheck)
)
