"""Identical folios are stored once, and large folios leave together."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from helpers import FOLIO, check_empty, check_pool, data, fresh_pool, run_python


@pytest.mark.parametrize("kind", ["walk", "noise", "small"])
@pytest.mark.parametrize("dedupe", [True, False])
def test_copies_are_stored_once(kind: str, dedupe: bool) -> None:
    pool = fresh_pool(dedupe=dedupe)
    n = 30 * FOLIO
    plain = data(kind, n, 1)
    x = pool.array(plain)
    pool.evict()
    once = pool.stats()
    copies = [pool.array(plain) for _ in range(5)]
    pool.evict()
    stats = check_pool(pool)
    if dedupe:
        assert stats.deduped == 150
        assert stats.swap_ids == once.swap_ids == 30
        assert stats.stored_bytes == once.stored_bytes
        assert stats.deduped_bytes == pytest.approx(5 * once.stored_bytes, rel=0.01)
    else:
        assert stats.deduped == stats.deduped_bytes == 0
        assert stats.swap_ids == 180
        assert stats.stored_bytes == pytest.approx(6 * once.stored_bytes, rel=0.01)
    for i, copy in enumerate(copies):
        copy[i * FOLIO + 7] ^= 1
        expected = plain.copy()
        expected[i * FOLIO + 7] ^= 1
        assert np.array_equal(copy, expected)
    assert np.array_equal(x, plain)
    pool.evict()
    check_pool(pool)
    del x
    pool.evict()
    for i, copy in enumerate(copies):
        assert copy[i * FOLIO + 7] == plain[i * FOLIO + 7] ^ 1
    del copies, copy
    check_empty(pool)


def test_copies_of_what_went_to_the_swap_file_or_was_moved() -> None:
    pool = fresh_pool()
    plain = data("walk", 40 * FOLIO, 2)
    x = pool.array(plain)
    pool.evict()
    assert pool.writeback() > 0
    y = pool.array(plain)
    pool.evict()
    stats = check_pool(pool)
    assert stats.deduped == 40, "read back and compared"
    assert stats.slot_bytes > 0 and stats.swap_ids == 40
    del x
    assert np.array_equal(y, plain)
    del y
    check_empty(pool)


def test_more_folios_than_the_index_has_room_for() -> None:
    """What is in it is a hint: it forgets, and what it says may have changed since."""
    pool = fresh_pool()
    rng = np.random.default_rng(1)
    plain = np.zeros((3000, FOLIO // 8), np.int64)
    plain[:, ::512] = rng.integers(0, 1 << 60, (3000, FOLIO // 8 // 512))
    x, y = pool.empty(plain.shape, np.int64), pool.empty(plain.shape, np.int64)
    for i in range(0, 3000, 100):
        x[i : i + 100] = plain[i : i + 100]
        pool.evict()
        x[i : i + 100 : 3, 2] = 6  # who had it has something else by now
        y[i : i + 100] = plain[i : i + 100]
        y[i : i + 100 : 2, 1] = 5
        pool.evict()
    stats = check_pool(pool)
    assert 900 <= stats.deduped <= 2000, "two thirds; of a half that changes, those that left before they changed"
    for i in range(0, 3000, 100):
        left, right = plain[i : i + 100].copy(), plain[i : i + 100].copy()
        left[::3, 2] = 6
        right[::2, 1] = 5
        assert np.array_equal(x[i : i + 100], left)
        assert np.array_equal(y[i : i + 100], right)


def test_folios_that_become_alike_and_different_by_threads() -> None:
    pool = fresh_pool()
    folios = 400
    x = pool.zeros((folios, FOLIO // 8), np.int64)
    faces = np.random.default_rng(1).integers(0, 1000, (5, FOLIO // 8))
    wears = np.zeros(folios, np.int64)
    x[:] = faces[0]
    wrong: list[int] = []

    def work(mine: range, seed: int) -> None:
        rng = np.random.default_rng(seed)
        for turn in range(4000):
            i = int(rng.choice(mine))
            if not np.array_equal(x[i], faces[wears[i]]):
                wrong.append(i)
            if turn % 3:
                wears[i] = rng.integers(5)
                x[i] = faces[wears[i]]
            if turn % 100 == seed:
                pool.evict("2MiB")
            if turn % 500 == seed:
                pool.writeback("1MiB")

    threads = [threading.Thread(target=work, args=(range(t, folios, 3), t)) for t in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    pool.evict()
    stats = check_pool(pool)
    assert stats.deduped > 300
    for i in range(folios):
        assert np.array_equal(x[i], faces[wears[i]])
    x = np.empty(0, np.int64)
    check_empty(pool)


def test_two_pools_do_not_share() -> None:
    one, two = fresh_pool(), fresh_pool()
    plain = data("walk", 10 * FOLIO, 1)
    x, y = one.array(plain), two.array(plain)
    one.evict()
    two.evict()
    assert one.stats().deduped == two.stats().deduped == 0
    del x
    # its address space, and so its holders, may go to the other pool
    z = two.array(data("walk", 10 * FOLIO, 9))
    two.evict()
    w = one.array(data("walk", 10 * FOLIO, 9))
    one.evict()
    assert np.array_equal(y, plain) and np.array_equal(z, w)
    check_pool(one)
    check_pool(two)


def test_a_holder_whose_address_went_to_another_pool_was_asked() -> None:
    """What pool `one` remembers is a word that has a number of pool `two` by now, and means nothing to `one`."""
    one, two = fresh_pool(), fresh_pool()
    plain = data("walk", 10 * FOLIO, 1)
    x = one.array(plain)
    one.evict()
    place = x.ctypes.data
    del x
    y = two.array(data("walk", 10 * FOLIO, 2))
    assert y.ctypes.data == place
    s = two.snapshot(y)
    two.evict()
    z = one.array(plain)
    one.evict()
    assert one.stats().deduped == 0
    assert np.array_equal(z, plain)
    assert np.array_equal(y, data("walk", 10 * FOLIO, 2)) and np.array_equal(s, y)
    check_pool(one)
    check_pool(two)


def test_incompressible_neighbours_leave_as_one_large_folio() -> None:
    pool = fresh_pool(dedupe=False)
    plain = data("noise", 64 * FOLIO + 8192, 1)
    x = pool.array(plain)
    pool.evict()
    stats = check_pool(pool)
    assert pool._core.stats()["runs"] >= 3
    assert stats.slot_bytes == 64 * FOLIO + 12288
    x[3 * FOLIO] = plain[3 * FOLIO] ^ 1  # a write to one of a run: the others' slots stay
    plain[3 * FOLIO] ^= 1
    assert check_pool(pool).slot_bytes == 63 * FOLIO + 12288
    for i in (12, 11, 10):  # not forwards: each comes alone, and dirty
        plain[i * FOLIO] ^= 1
        x[i * FOLIO] = plain[i * FOLIO]
    assert check_pool(pool).slot_bytes == 60 * FOLIO + 12288
    assert np.array_equal(x, plain)
    pool.evict()
    assert np.array_equal(x, plain)
    del x
    check_empty(pool)


def test_a_large_folio_with_a_page_that_was_thrown_away() -> None:
    """The kernel can't fault while it writes a run: then its folios go one by one."""
    code = """if True:
        import ctypes
        import numpy as np
        import userswap
        from helpers import fresh_pool
        libc = ctypes.CDLL(None, use_errno=True)
        pool = fresh_pool()
        plain = np.random.default_rng(1).integers(0, 256, 32 << 16, dtype=np.uint8)
        x = pool.array(plain)
        hole = x.ctypes.data + 5 * 65536 + 8192
        assert libc.madvise(ctypes.c_void_p(hole), ctypes.c_size_t(4096), 4) == 0
        plain[5 * 65536 + 8192 : 5 * 65536 + 12288] = 0
        pool.evict()
        assert pool.stats().resident_bytes == 0
        assert np.array_equal(x, plain)
        print(pool._core.check()["wrong"])
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0"


def test_a_large_folio_that_finds_no_run_of_slots(tmp_path: Path) -> None:
    pool = fresh_pool(swap=f"{tmp_path}:6MiB", dedupe=False)
    plain = data("noise", 90 * FOLIO, 1)
    x = pool.array(plain)
    pool.evict()
    x[:: 2 * FOLIO] ^= 1  # every second one leaves its slots: holes of 64 KiB
    plain[:: 2 * FOLIO] ^= 1
    y = pool.array(data("noise", 40 * FOLIO, 2))
    pool.evict()
    assert np.array_equal(x, plain)
    assert np.array_equal(y, data("noise", 40 * FOLIO, 2))
    check_pool(pool)


def test_all_folios_of_a_large_one_can_be_written_back() -> None:
    """Storage knows the holder of each: with the first one's for all, only the first could ever move."""
    pool = fresh_pool(dedupe=False)
    plain = data("walk", 32 * FOLIO, 1)
    x = pool.array(plain)
    pool.evict()
    assert pool.stats().runs >= 2
    for _ in range(2):  # the first time may only make them old
        pool.writeback()
    assert pool.stats().writebacks == 32
    assert np.array_equal(x, plain)
    check_pool(pool)
