"""Every design of the swap map under the whole system: random programs, checked against plain NumPy."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import userswap
from helpers import FOLIO, check_empty, check_pool, data
from maps import together
from userswap.swap.map import BOUND, DESIGN_NAMES

MIB = 1 << 20
KINDS = ("walk", "noise", "small", "same")
MOST_ARRAYS = 9

Bytes = npt.NDArray[np.uint8]


class Program:
    """Arrays of a pool beside the same arrays in ordinary memory, and steps that change both alike."""

    def __init__(self, design: str, directory: Path, seed: int) -> None:
        self.design = design
        # a limit, because designs whose ids are slots take memory for each of them
        self.pool = userswap.Pool(ram="16MiB", swap=f"{directory}:256MiB", map_design=design)
        self.random = np.random.default_rng(seed)
        self.arrays: list[tuple[Bytes, Bytes]] = []

    def pick(self) -> tuple[Bytes, Bytes]:
        return self.arrays[self.random.integers(len(self.arrays))]

    def piece(self, model: Bytes) -> tuple[int, int]:
        """Start and end of a part of an array: anywhere, or its last folio, which is a short one."""
        if self.random.integers(4) == 0:
            return len(model) // FOLIO * FOLIO, len(model)
        at = int(self.random.integers(len(model)))
        return at, min(len(model), at + int(self.random.integers(1, 20 * FOLIO)))

    def new(self) -> None:
        if len(self.arrays) >= MOST_ARRAYS:
            self.free()
        # 1 to 15 pages in the last folio
        size = int(self.random.integers(10, 60)) * FOLIO + int(self.random.integers(1, 15 * 4096))
        model = data(KINDS[self.random.integers(4)], size, int(self.random.integers(3)))
        self.arrays.append((self.pool.array(model), model))

    def free(self) -> None:
        array, model = self.arrays.pop(self.random.integers(len(self.arrays)))
        assert np.array_equal(array, model)

    def write(self) -> None:
        array, model = self.pick()
        at, end = self.piece(model)
        new = data(KINDS[self.random.integers(4)], end - at, int(self.random.integers(3)))
        array[at:end] = new
        model[at:end] = new

    def scatter(self) -> None:
        array, model = self.pick()
        places = self.random.integers(0, len(model), 20)
        array[places] ^= 1
        model[places] = array[places]

    def read(self) -> None:
        array, model = self.pick()
        at, end = self.piece(model)
        assert np.array_equal(array[at:end], model[at:end])

    def copy(self) -> None:
        """What becomes alike is stored once: folio by folio, at the same place in its folio."""
        (a, model_a), (b, model_b) = self.pick(), self.pick()
        n = min(len(a), len(b)) // 2 // FOLIO * FOLIO
        a[:n] = b[-n - len(b) % FOLIO :][:n] if self.random.integers(2) else b[:n]
        model_a[:n] = a[:n]
        assert np.array_equal(b, model_b)

    def snapshot(self) -> None:
        if len(self.arrays) >= MOST_ARRAYS:
            self.free()
        array, model = self.pick()
        self.arrays.append((self.pool.snapshot(array), model.copy()))

    def evict(self) -> None:
        self.pool.evict(int(self.random.integers(1, 12)) * MIB)

    def writeback(self) -> None:
        assert self.pool.writeback(int(self.random.integers(1, 8)) * MIB) >= 0

    def compact(self) -> None:
        self.pool._core.compact()

    def all_right(self, kin: bool = False) -> None:
        """`kin`: there may be slots that are kept for a child; where ids are slots, these are kept too."""
        for array, model in self.arrays:
            assert np.array_equal(array, model)
        if kin and self.design in BOUND:
            states = self.pool._core.check()
            assert states["wrong"] == 0
            assert states["ids"] <= self.pool.stats().swap_ids
        else:
            check_pool(self.pool)

    def fork(self) -> None:
        """Child and parent go their own ways from here."""
        child = os.fork()
        if child == 0:
            status = 1
            try:
                self.random = np.random.default_rng(7)
                self.go(5, ("write", "copy", "snapshot", "evict", "scatter", "free"))
                self.all_right()
                status = 0
            finally:
                os._exit(status)
        self.go(5, ("write", "copy", "evict", "scatter", "writeback"))
        deadline = time.monotonic() + 60
        while (done := os.waitpid(child, os.WNOHANG))[0] == 0:
            assert time.monotonic() < deadline, "the child ends"
            time.sleep(0.001)
        assert done[1] == 0, "the child found its memory as it was at the fork"

    def go(self, steps: int, kinds: tuple[str, ...]) -> None:
        for _ in range(steps):
            if not self.arrays:
                self.new()
            getattr(self, kinds[self.random.integers(len(kinds))])()


STEPS = ("new", "write", "write", "scatter", "read", "copy", "snapshot", "evict", "writeback", "compact", "free")


@pytest.mark.parametrize("design", DESIGN_NAMES)
def test_a_random_program(design: str, tmp_path: Path) -> None:
    program = Program(design, tmp_path, 1)
    for _ in range(5):
        program.new()
    for _ in range(3):
        program.go(25, STEPS)
        program.pool.evict()
        program.fork()
        program.all_right(kin=True)
    stats = program.pool.stats()
    assert stats.cache_hits and stats.deduped and stats.runs and stats.writebacks, "all of it happened"
    while program.arrays:
        program.free()
    time.sleep(0.02)  # slots are kept for a child until it is seen to be gone
    last: Any = program.pool.array(data("noise", 4 * FOLIO, 1))
    program.pool.evict()
    del last
    check_empty(program.pool)


@pytest.mark.parametrize("forks", [False, True])
@pytest.mark.parametrize("design", ["on_demand", *sorted(BOUND)])
def test_slots_that_go_from_thread_to_thread_keep_their_bytes(design: str, forks: bool, tmp_path: Path) -> None:
    """A file that is nearly full: what one thread gives back is another's at once, clusters empty and fill.

    With forks, slots are kept for a moment, and then given back by several threads at once.
    """
    size, threads = 4 * MIB, 3
    room = 20 * MIB if forks else size * threads + 4 * FOLIO
    pool = userswap.Pool(ram="16MiB", swap=f"{tmp_path}:{room}", map_design=design, dedupe=False)
    stop = time.monotonic() + 1

    def work(me: int) -> None:
        array = pool.zeros(size, np.uint8)
        noise = data("noise", 2 * size, me)
        turn = 0
        while time.monotonic() < stop or turn < 3:
            at = turn * FOLIO % size
            array[:] = noise[at : at + size]
            pool.evict(size * threads)
            assert np.array_equal(array, noise[at : at + size])
            turn += 1

    def fork() -> None:
        while time.monotonic() < stop:
            child = os.fork()
            if child == 0:
                time.sleep(0.005)
                os._exit(0)
            os.waitpid(child, 0)
            time.sleep(0.015)

    together(*[lambda me=me: work(me) for me in range(threads)], *([fork] if forks else []))
    time.sleep(0.02)  # slots are kept for a child until it is seen to be gone
    last: Any = pool.array(data("noise", 4 * FOLIO, 1))
    pool.evict()
    del last
    check_empty(pool)
