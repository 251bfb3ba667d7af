"""Freed arrays keep their frames for the next ones: these never read as what they should not, nor cost the budget."""

from __future__ import annotations

import numpy as np
import pytest

from helpers import FOLIO, check_empty, check_pool, fresh_pool, run_python
from support import only_moved

MIB = 1 << 20


def used(pool: object, n: int, kind: int = 7) -> None:
    """An array of `n` bytes that was written to, and is freed."""
    array = pool.empty(n, np.uint8)  # type: ignore[attr-defined]
    array[:] = kind
    del array


def test_the_next_array_of_the_same_length_faults_no_more() -> None:
    pool = fresh_pool("128MiB")
    used(pool, 3 * MIB + 4096)
    stats = check_pool(pool)
    assert stats.kept_bytes == 3 * MIB + 4096 == stats.resident_bytes and stats.regions == stats.virtual_bytes == 0
    array = pool.empty(3 * MIB + 4096, np.uint8)
    array[:] = 9
    after = check_pool(pool)
    assert after.faults == stats.faults and after.kept_bytes == 0 and after.resident_bytes == array.nbytes
    assert (array == 9).all()
    del array
    assert pool.evict() == 3 * MIB + 4096, "what is kept leaves, and is counted"
    check_empty(pool)
    assert pool.stats().resident_bytes == 0


@pytest.mark.parametrize("length", [MIB, MIB + 3 * 4096, 2 * MIB, 3 * MIB - 4096, 3 * MIB, 5 * MIB])
def test_zeros_are_zeros(length: int) -> None:
    """Whatever is kept: as long, longer, shorter; what was never touched, too, and what a longer one takes up."""
    for before in (length, length + 4096, length - 4096, length + FOLIO, length * 3 // 2, length * 2 // 3):
        pool = fresh_pool("128MiB")
        used(pool, before)
        assert pool.stats().kept_bytes >= before - FOLIO
        array = pool.zeros(length, np.uint8)
        assert not array.any()
        check_pool(pool)
        array[:] = 3
        del array
        assert not pool.zeros(length, np.uint8).any()
        check_pool(pool)


def test_what_is_not_touched_after_it_was_thrown_away_is_zeros() -> None:
    """madvise on an array that asked for no zeros: what comes there afterwards does not come from what is kept."""
    result = run_python("""
import ctypes, numpy as np, userswap
pool = userswap.Pool(ram="128MiB")
M = 1 << 20
arrays = [pool.full(7 * M, i, np.uint8) for i in range(2)]
array = pool.full(24 * M, 5, np.uint8)
del arrays
assert pool.stats().kept_bytes == 14 * M
assert ctypes.CDLL(None, use_errno=True).madvise(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(24 * M), 4) == 0
assert not array.any()
assert pool._core.check()["wrong"] == 0
""")
    assert (result.returncode, result.stderr) == (0, "")


def test_a_snapshot_is_what_its_array_is_wherever_that_was_never_touched() -> None:
    pool = fresh_pool("128MiB")
    used(pool, 8 * MIB)
    used(pool, 6 * MIB)
    array = pool.zeros(16 * MIB, np.uint8)
    array[MIB : 2 * MIB] = 1
    copy = pool.snapshot(array)
    assert np.array_equal(array, copy)
    del array, copy
    used(pool, 6 * MIB)
    array = pool.empty(16 * MIB, np.uint8)
    array[:MIB] = 2
    copy = pool.snapshot(array)
    assert np.array_equal(array, copy)
    del array, copy
    check_empty(pool)


@only_moved
def test_kept_windows_go_where_no_zeros_are_asked_for() -> None:
    """A longer array takes what shorter ones left, in whole windows, and the peak does not grow by it."""
    pool = fresh_pool("256MiB")
    arrays = [pool.full(6 * MIB, i, np.uint8) for i in range(3)]
    peak = pool.stats().peak_bytes
    arrays.clear()
    assert pool.stats().kept_bytes == 18 * MIB
    array = pool.empty(24 * MIB, np.uint8)
    array[: 18 * MIB] = 1
    after = check_pool(pool)
    assert after.kept_bytes == 0
    assert after.resident_bytes == 18 * MIB and after.peak_bytes <= peak + FOLIO
    assert (array[: 18 * MIB] == 1).all()


def test_what_is_kept_never_makes_the_peak_higher() -> None:
    pool = fresh_pool("256MiB")
    arrays = [pool.full(6 * MIB, i, np.uint8) for i in range(4)]
    arrays.clear()
    peak = pool.stats().peak_bytes
    assert pool.stats().kept_bytes == 24 * MIB
    arrays = [pool.full(FOLIO // 2, i % 251, np.uint8) for i in range(20 * 32)]  # too short for what is kept
    after = check_pool(pool)
    assert after.peak_bytes <= peak + 2 * MIB
    assert 0 < after.kept_bytes <= 6 * MIB, "given up little by little"
    assert all((array == i % 251).all() for i, array in enumerate(arrays))


def test_what_is_kept_leaves_before_anything_is_swapped_out() -> None:
    pool = fresh_pool("64MiB")
    arrays = [pool.full(2 * MIB, i, np.uint8) for i in range(24)]
    del arrays[:6]
    kept = pool.stats().kept_bytes
    assert kept == 8 * MIB, "no more than an eighth of the budget"
    pool.ram = "48MiB"
    while pool._core.shrink():
        pass
    after = check_pool(pool)
    assert after.resident_bytes + after.pool_bytes + after.metadata_bytes <= 48 * MIB
    assert (after.kept_bytes, after.swap_outs) == (0, 0) or after.kept_bytes > 0 == after.swap_outs
    assert after.kept_bytes < kept
    assert all((array == i).all() for i, array in enumerate(arrays, 6))


def test_long_ones_and_many_are_not_kept() -> None:
    pool = fresh_pool("1GiB")
    used(pool, 65 * MIB)
    assert pool.stats().kept_bytes == 0
    arrays = [pool.full(FOLIO, i, np.uint8) for i in range(100)]
    arrays.clear()
    assert pool.stats().kept_bytes == 64 * FOLIO
    check_empty(pool)


def test_a_closed_pool_keeps_nothing_that_another_pool_could_read() -> None:
    one, two = fresh_pool("128MiB"), fresh_pool("128MiB")
    array = one.full(4 * MIB, 5, np.uint8)
    address = array.ctypes.data
    del array
    assert one.stats().kept_bytes == 4 * MIB
    one.close()
    del one
    other = two.zeros(4 * MIB, np.uint8)
    assert other.ctypes.data == address, "the same address space, or nothing is tried"
    assert not other.any()
    del other
    check_empty(two)


def test_a_fork_keeps_nothing_and_parent_and_child_go_on() -> None:
    result = run_python("""
import os, numpy as np, userswap
pool = userswap.Pool(ram="128MiB")
M = 1 << 20
stays = pool.full(4 * M, 3, np.uint8)
def work(kind):
    for i in range(12):
        array = pool.empty((1 + i % 3) * M + 4096 * i, np.uint8)
        array[:] = kind
        zeros = pool.zeros(array.nbytes, np.uint8)
        assert not zeros.any() and (array == kind).all()
        del array, zeros
        assert pool._core.check()["wrong"] == 0
work(1)
assert pool.stats().kept_bytes > 0
pid = os.fork()
assert pool.stats().kept_bytes == 0
work(8 if pid else 9)
assert (stays == 3).all()
kept = pool.stats().kept_bytes
assert kept > 0
del stays
assert pool.stats().kept_bytes == kept + (4 * M if pid else 0), "a child does not keep what may be its parent's too"
assert pool._core.check()["wrong"] == 0
if not pid:
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
""")
    assert (result.returncode, result.stderr) == (0, "")


STORM = """
import os, sys, threading, numpy as np, numpy.random, userswap
pool = userswap.Pool(ram=sys.argv[1])
seconds, M = 2.0, 1 << 20
import time
end = time.monotonic() + seconds
wrong = []
def work(seed):
    rng = np.random.default_rng(seed)
    live = []
    while time.monotonic() < end and not wrong:
        n = int(2 ** rng.uniform(16, 22.5)) & ~7
        if rng.random() < 0.3:
            array = pool.zeros(n // 8, np.int64)
            if array.any():
                wrong.append(("zeros", n, np.flatnonzero(array)[:4], array[array != 0][:4]))
        else:
            array = pool.empty(n // 8, np.int64)
        kind = int(rng.integers(1 << 40))
        array[:] = kind
        array[:: 512] += np.arange(len(array[:: 512]))
        live.append((array, kind))
        while sum(a.nbytes for a, _ in live) > 6 * M:
            array, kind = live.pop(int(rng.integers(len(live))))
            array[:: 512] -= np.arange(len(array[:: 512]))
            if not (array == kind).all():
                wrong.append(("bytes", kind))
            del array
threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
for t in threads: t.start()
children = 0
while time.monotonic() < end:
    pid = os.fork()
    if pid == 0:
        end = time.monotonic() + 0.05
        work(99)
        os._exit(len(wrong) or pool._core.check()["wrong"])
    status = os.waitpid(pid, 0)[1]
    if status: wrong.append(("child", status))
    children += 1
    time.sleep(0.02)
for t in threads: t.join()
states = pool._core.check()
stats = pool.stats()
assert not wrong and states["wrong"] == 0, (wrong, states)
assert stats.peak_bytes <= stats.budget_bytes, stats
assert stats.regions == 0 and stats.resident_bytes == stats.kept_bytes and stats.swapped_bytes == 0, stats
print(children)
"""


@pytest.mark.parametrize("ram", ["20MiB", "64MiB"])
def test_threads_and_children_that_allocate_while_reclaim_runs(ram: str) -> None:
    result = run_python(STORM, ram, timeout=60)
    assert (result.returncode, result.stderr) == (0, "")
    assert int(result.stdout) > 3
