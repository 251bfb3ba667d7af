"""NumPy's allocator: which arrays live in swap, and that each is freed rightly, wherever and whenever."""

from __future__ import annotations

import gc
import threading
from pathlib import Path

import numpy as np
import pytest

import userswap
from helpers import check_empty, data, fresh_pool, run_python

MIB = 1 << 20


def test_arrays_of_the_threshold_and_more_live_in_swap() -> None:
    with userswap.install(ram="64MiB") as installation:
        pool = installation.pool
        assert pool.owns(np.zeros(MIB, np.uint8))
        assert pool.owns(np.empty((1024, 1024)))
        assert pool.owns(np.arange(1 << 20) * 2.0)
        assert not pool.owns(np.zeros(MIB - 1, np.uint8))
        assert pool.owns(np.empty(MIB, np.uint8))
        assert not pool.owns(np.empty(MIB - 1, np.uint8))
    assert not pool.owns(np.zeros(MIB, np.uint8))


def test_min_array_moves_the_threshold() -> None:
    with userswap.install(ram="64MiB", min_array="64KiB") as installation:
        assert installation.pool.owns(np.zeros(1 << 16, np.uint8))
        assert not installation.pool.owns(np.zeros((1 << 16) - 1, np.uint8))


def test_arrays_outlive_the_with_block() -> None:
    expected = data("walk", 40 * MIB, 1)
    with userswap.install(ram="16MiB") as installation:
        array = expected.copy()
        assert installation.pool.owns(array)
    assert np.array_equal(array, expected)  # and still come and go
    array[::4096] += 1
    assert np.array_equal(array[1:4096], expected[1:4096])
    del array
    gc.collect()


def test_arrays_made_before_are_freed_after_and_inside() -> None:
    before = np.ones(4 * MIB, np.uint8)
    with userswap.install(ram="64MiB"):
        other = np.ones(4 * MIB, np.uint8)
        del before
    del other


def test_the_innermost_installation_counts() -> None:
    with userswap.install(ram="64MiB") as outer:
        with userswap.install(ram="32MiB") as inner:
            array = np.zeros(MIB, np.uint8)
            assert inner.pool.owns(array)
        assert np.array_equal(array, np.zeros(MIB))
        assert outer.pool.owns(np.zeros(MIB, np.uint8))
    # and in any order
    one, two = userswap.install(ram="64MiB"), userswap.install(ram="32MiB")
    one.uninstall()
    assert two.pool.owns(np.zeros(MIB, np.uint8))
    two.uninstall()
    two.uninstall()
    assert not one.pool.owns(np.zeros(MIB, np.uint8))


def test_every_thread_is_covered_and_any_thread_frees() -> None:
    with userswap.install(ram="64MiB") as installation:
        made: list[np.ndarray] = []

        def make() -> None:
            made.append(np.full(2 * MIB, 3, np.uint8))

        crew = [threading.Thread(target=make) for _ in range(4)]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
        assert all(installation.pool.owns(array) for array in made)
        crew = [threading.Thread(target=made.pop) for _ in range(4)]
        for thread in crew:
            thread.start()
        for thread in crew:
            thread.join()
        del crew, thread
        gc.collect()
        check_empty(installation.pool)


def test_a_pools_arrays_are_ordinary_ones() -> None:
    pool = fresh_pool()
    for array in (
        pool.zeros((512, 1024)),
        pool.empty(MIB, "u1"),
        pool.full(1 << 18, 2.5),
        pool.array(np.arange(1 << 18)),
    ):
        assert type(array) is np.ndarray
        assert array.flags.owndata
        assert array.flags.writeable
        assert pool.owns(array)
    assert not pool.owns(np.zeros(MIB, np.uint8)), "and only those"
    small = pool.zeros(3)
    small[:] = 1
    assert small.sum() == 3
    del array, small
    check_empty(pool)


def test_resize_keeps_the_content_in_every_direction() -> None:
    with userswap.install(ram="64MiB") as installation:
        array = np.arange(1000)
        for n in (1000, 200_000, 2_000_000, 1_900_000, 900_000, 100, 500_000, 131_072, 131_071):
            was = array.copy()
            array.resize(n, refcheck=False)
            keep = min(n, len(was))
            assert np.array_equal(array[:keep], was[:keep])
            assert not array[keep:].any(), "what is new reads as zeros"
            assert installation.pool.owns(array) == (n * 8 >= MIB) or n == 131_071
        # NumPy's own growing of an array of unknown length goes through realloc
        grown = np.fromiter((i * 3 for i in range(400_000)), dtype=np.int64)
        assert np.array_equal(grown, np.arange(400_000) * 3)
        del array, was, grown
        check_empty(installation.pool)


def test_a_pool_ends_with_its_last_array() -> None:
    pool = fresh_pool()
    array = pool.array(data("walk", 20 * MIB, 5))
    pool.close()
    pool.close()
    assert pool.closed
    assert pool.stats().regions == 1
    with pytest.raises(ValueError, match="closed"):
        pool.zeros(10)
    assert np.array_equal(array, data("walk", 20 * MIB, 5))
    array.resize(30 * MIB, refcheck=False)
    assert np.array_equal(array[: 20 * MIB], data("walk", 20 * MIB, 5))
    del array


def test_a_pools_swap_file_and_memory_go_with_its_last_array() -> None:
    def kept() -> tuple[int, int]:
        gc.collect()
        with Path("/proc/self/maps").open() as maps:
            return len(list(Path("/proc/self/fd").iterdir())), sum(1 for _ in maps)

    def use() -> None:
        pool = fresh_pool()
        array, small = pool.array(data("noise", MIB, 5)), pool.zeros(3)
        pool.close()
        del pool, array
        small[:] = 1  # holds the allocator, and that the pool

    use()
    descriptors, mappings = kept()
    for _ in range(5):
        use()
    assert kept()[0] == descriptors
    assert kept()[1] <= mappings + 2


def test_ordinary_blocks_are_freed_too() -> None:
    """Freed and resized while installed: what is not ours goes back to where it came from."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    with userswap.install(ram="16MiB") as installation:
        before = resident()
        for _ in range(150):
            array = np.ones(900 << 10, np.uint8)
            assert not installation.pool.owns(array)
            array.resize(2 * MIB, refcheck=False)
            assert installation.pool.owns(array)
            other = np.ones(900 << 10, np.uint8)
            del array, other
        assert resident() < before + 60 * MIB, "each way would leave 130 MiB behind"


def test_more_than_the_address_space_is_a_memory_error() -> None:
    pool = fresh_pool()
    with pytest.raises(MemoryError):
        pool.zeros(1 << 60, np.uint8)
    with pytest.raises(MemoryError):
        pool.zeros(1 << 44, np.uint8)
    assert pool.stats().regions == 0


def test_many_arrays_at_once() -> None:
    pool = userswap.Pool(ram="24MiB")
    arrays = [pool.full(2048 + i, i, np.int64) for i in range(3000)]  # 48 MiB and more
    assert all((array == i).all() for i, array in enumerate(arrays))
    del arrays[::3]
    arrays += [pool.full(4096, -1, np.int64) for _ in range(500)]
    assert all((array == array[0]).all() for array in arrays)
    arrays.clear()
    check_empty(pool)


def test_a_program_ends_cleanly_with_arrays_alive() -> None:
    code = """
import numpy as np, userswap
userswap.install(ram="32MiB")
keep = [np.full(1 << 20, i) for i in range(20)]
import atexit
@atexit.register
def late(): assert (keep[3] == 3).all(); print("late")
"""
    result = run_python(code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "late\n", "")
