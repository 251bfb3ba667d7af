"""Several threads at once: every page is stamped, and every read checks its stamp."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from helpers import check_empty, check_pool, data, fresh_pool

WORDS = 512  # int64 in a page
PIECE = 16 * WORDS  # a folio's worth: NumPy lets go of the GIL for these


def stamp(page: int, version: int) -> npt.NDArray[np.int64]:
    """A page's content: its number in the high half of every word, its version below, a pattern after that."""
    pattern = (np.arange(WORDS, dtype=np.int64) * (version | 1)) & 0x3FF
    result: npt.NDArray[np.int64] = (np.int64(page) << 32) | (np.int64(version & 0x3FFFFF) << 10) | pattern
    return result


def test_threads_on_the_same_and_on_different_folios_never_see_a_wrong_byte() -> None:
    threads, pages, seconds = 4, 8192, 4.0  # 32 MiB in a budget of 16
    pool = fresh_pool()
    memory: Any = pool.zeros((pages, WORDS), np.int64)
    versions = np.zeros(pages, np.int64)
    for page in range(pages):
        memory[page] = stamp(page, 0)
    stop = threading.Event()
    wrong: list[str] = []

    def work(me: int) -> None:
        rng = np.random.default_rng(me)
        while not stop.is_set():
            # pages of a folio belong to different threads: every folio is written by all of them
            page = int(rng.integers(pages // threads)) * threads + me
            if not np.array_equal(memory[page], stamp(page, int(versions[page]))):
                wrong.append(f"page {page} is not what its owner {me} wrote last")
                stop.set()
            if rng.random() < 0.4:
                versions[page] += 1
                memory[page] = stamp(page, int(versions[page]))
            start = int(rng.integers(pages - 16))
            seen = memory[start : start + 16] >> 32
            if not np.array_equal(seen, np.broadcast_to(np.arange(start, start + 16)[:, None], seen.shape)):
                wrong.append(f"pages from {start} hold words of other pages")
                stop.set()

    def disturb() -> None:
        rng = np.random.default_rng(99)
        while not stop.is_set():
            pool.evict(int(rng.integers(1, 4 << 20)))
            pool.writeback(int(rng.integers(1, 1 << 20)))
            pool._core.compact()
            time.sleep(0.001)

    def churn() -> None:
        rng = np.random.default_rng(7)
        while not stop.is_set():
            other = pool.empty(int(rng.integers(4096, 2 << 20)), np.uint8)
            other[:] = 7
            if int(other.sum(dtype=np.int64)) != 7 * len(other):
                wrong.append("a fresh array is not what was written to it")
                stop.set()

    crew = [threading.Thread(target=work, args=(i,)) for i in range(threads)]
    crew += [threading.Thread(target=disturb), threading.Thread(target=churn)]
    for thread in crew:
        thread.start()
    stop.wait(seconds)
    stop.set()
    for thread in crew:
        thread.join()
    assert not wrong, wrong[0]
    for page in range(pages):
        assert np.array_equal(memory[page], stamp(page, int(versions[page])))
    stats = check_pool(pool)
    assert stats.swap_ins > 1000
    assert stats.writebacks > 0
    assert stats.peak_bytes <= stats.budget_bytes * 1.02
    memory = None  # the last reference: `work` looks it up here
    check_empty(pool)


def test_many_threads_fault_on_one_folio_at_once() -> None:
    pool = fresh_pool()
    array = pool.empty(PIECE, np.int64)
    expected = np.arange(PIECE) * 3
    array[:] = expected
    for _ in range(200):
        pool.evict()
        pool.evict()
        barrier = threading.Barrier(6)
        right: list[bool] = []

        def look(barrier: threading.Barrier = barrier, right: list[bool] = right) -> None:
            barrier.wait()
            right.append(np.array_equal(array, expected))

        crew = [threading.Thread(target=look) for _ in range(6)]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
        assert right == [True] * 6
    check_pool(pool)


def test_a_writer_in_the_middle_of_swap_out_loses_nothing() -> None:
    """Writes race with the protect-compress-vacate of the same folio."""
    pool = fresh_pool()
    array = pool.zeros(PIECE, np.int64)
    stop = threading.Event()

    def push_out() -> None:
        while not stop.is_set():
            pool.evict()

    thread = threading.Thread(target=push_out)
    thread.start()
    try:
        count = 0
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            array += 1  # reads and writes each word while the folio comes and goes
            count += 1
        assert np.array_equal(array, np.full(PIECE, count))
    finally:
        stop.set()
        thread.join()
    assert pool.stats().swap_ins + pool.stats().part_ins > 100


def test_writebacks_of_several_threads_do_not_mix_their_bytes() -> None:
    """They all gather into one buffer."""
    pool = fresh_pool("32MiB")
    expected = [data("walk", 1 << 20, i) for i in range(16)]
    for turn in range(4):
        arrays = [pool.array(model) for model in expected]
        pool.evict()
        pool.evict()
        barrier = threading.Barrier(4)

        def push(barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            while pool.writeback(1 << 18):
                pass

        crew = [threading.Thread(target=push) for _ in range(4)]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
        stats = check_pool(pool)
        assert stats.slot_bytes == stats.stored_bytes > 0, "nothing is left in zswap"
        for i, array in enumerate(arrays):
            assert np.array_equal(array, expected[i]), (turn, i)
        del arrays, array
    check_empty(pool)


def test_who_evicted_a_folio_waits_for_it_like_all_others() -> None:
    """The thread that swapped a folio out, and meets another thread bringing it back, must not think it is its own."""
    pool = fresh_pool()
    array: Any = pool.array(np.arange(PIECE) * 3)
    expected = np.arange(PIECE) * 3
    go, ready = threading.Barrier(3), threading.Barrier(3)
    wrong: list[int] = []
    turns = 300

    def look(me: int) -> None:
        for turn in range(turns):
            if turn % 3 == me:
                pool.evict()
                pool.evict()
            go.wait()
            if not np.array_equal(array, expected):
                wrong.append(turn)
            ready.wait()

    crew = [threading.Thread(target=look, args=(i,)) for i in range(3)]
    for thread in crew:
        thread.start()
    for thread in crew:
        thread.join()
    assert not wrong
    check_pool(pool)


def test_what_is_being_stored_is_not_moved_before_it_is_whole() -> None:
    """Compaction and writeback run without a pause while objects of all sizes come and go: only whole ones may move."""
    pool = fresh_pool("48MiB")
    stop = threading.Event()
    wrong: list[int] = []

    def store(me: int) -> None:
        rng = np.random.default_rng(me)
        array: Any = pool.empty((16, 8192), np.int64)
        while not stop.is_set():
            # few distinct lengths in many size classes: nearly empty segments, which compaction likes best
            model = rng.integers(0, 1 << rng.integers(2, 40, 16)[:, None], (16, 8192))
            array[:] = model
            pool.evict(1 << 20)
            pool.evict(1 << 20)
            if not np.array_equal(array, model):
                wrong.append(me)
                stop.set()

    def move() -> None:
        while not stop.is_set():
            pool._core.compact()

    def push() -> None:
        while not stop.is_set():
            pool.writeback(1 << 16)

    crew = [threading.Thread(target=store, args=(i,)) for i in range(2)]
    crew += [threading.Thread(target=move), threading.Thread(target=push)]
    for thread in crew:
        thread.start()
    stop.wait(1.5)
    stop.set()
    for thread in crew:
        thread.join()
    assert not wrong
    check_pool(pool)
