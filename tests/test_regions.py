"""Regions, their page tables and several pools side by side."""

from __future__ import annotations

import numpy as np

from helpers import FOLIO, check_empty, check_pool, data, fresh_pool

MIB = 1 << 20


def test_the_clock_hand_does_not_follow_a_freed_region_into_another_pool() -> None:
    """A freed region's address space is used again, maybe by another pool: one pool must not evict the other's."""
    one, two = fresh_pool(), fresh_pool()
    keep = one.array(data("walk", 4 * FOLIO, 1))
    gone = one.array(data("walk", 64 * FOLIO, 2))
    address = gone.ctypes.data
    one.evict(2 * FOLIO)  # once around, and the hand stops in the middle of `gone`
    assert FOLIO <= one._core.check()["swapped"] * FOLIO < 64 * FOLIO
    del gone
    other = two.array(data("walk", 64 * FOLIO, 3))
    assert other.ctypes.data == address, "the same address space, or nothing is tried"
    for _ in range(3):
        one.evict()
    assert check_pool(two).swap_outs == 0
    assert check_pool(one).resident_bytes == 0
    assert np.array_equal(other, data("walk", 64 * FOLIO, 3))
    assert np.array_equal(keep, data("walk", 4 * FOLIO, 1))
    del other, keep
    check_empty(one)
    check_empty(two)


def test_page_tables_count_as_metadata_and_no_longer_than_their_region_lives() -> None:
    pool = fresh_pool()
    before = pool.stats().metadata_bytes
    folios = 0
    for _ in range(3):
        arrays = [pool.zeros(n * FOLIO, np.uint8) for n in (1, 100, 5000)]
        folios = 1 + 100 + 5000
        # a word and an owner for each folio
        assert pool.stats().metadata_bytes >= before + 16 * folios
        arrays.clear()
        assert pool.stats().metadata_bytes == before
