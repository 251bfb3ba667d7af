"""What is special in the designs of trees and descriptors; tests/test_swap_map.py has what all designs share."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from maps import LESS, almost_nothing, alone, drop, kind_of, span, together
from userswap.swap.map import CACHE, COUNT_MAX, DEBUG, SLOT, ZSWAP, Map, entry, slot

DESIGNS = ("single_tree", "two_trees", "descriptor", "vswap")
designs = pytest.mark.parametrize("design", DESIGNS)


def each(work: Callable[[int], Any], threads: int) -> list[Any]:
    """work(0), work(1) .. in threads that start together; what they return."""
    return together(*[partial(work, thread) for thread in range(threads)])


def walk(swap_map: Map, device: int = 0) -> tuple[list[int], int]:
    """The slots that `next` finds, each unlocked again as it was, and how many were passed over."""
    words: list[int] = []
    passed, owner = 0, 0
    while True:
        owner, word, busy = swap_map.next(device, owner)
        passed += busy
        if not owner:
            return words, passed
        words.append(word)
        swap_map.unlock_owner(owner, word)


# ---- counts of stored ids and of cached pages ----


@designs
@pytest.mark.parametrize("before", [1, 2, 1024, 1025, 2046, 2047, 2048, 5000])
@pytest.mark.parametrize("after", [1, 2, 1024, 1025, 2047, 2048, 6000])
def test_a_count_goes_with_its_page_into_the_swap_cache_and_back(design: str, before: int, after: int) -> None:
    """Stored, cached with its copy, cached alone, stored again: a count on the way in, and another on the way out."""
    swap_map = Map(design)
    empty = swap_map.metadata()
    swap_map.alloc(0, entry(ZSWAP, 1))
    swap_map.alloc(1, entry(ZSWAP, 2))  # a neighbour that nothing may happen to

    def check(count: int, folio: int) -> None:
        assert (swap_map.count(0), swap_map.cached(0)) == (count, folio)
        assert (swap_map.count(1), swap_map.cached(1)) == (1, 0)

    def change(old: int, new: int) -> None:
        if new > old:
            swap_map.add(0, new - old)
        elif new < old:
            assert swap_map.sub(0, old - new) == new

    change(1, before)
    swap_map.lock(0)
    swap_map.cache(0, 2**48 - 1)
    swap_map.unlock(0, entry(ZSWAP, 1))
    check(before, 2**48 - 1)
    assert swap_map.lock(0) == entry(ZSWAP, 1)
    swap_map.unlock(0, entry(CACHE))
    check(before, 2**48 - 1)
    change(before, after)
    check(after, 2**48 - 1)
    assert swap_map.lock(0) == entry(CACHE)
    swap_map.unlock(0, entry(CACHE))  # looked at, and left as it is
    swap_map.lock(0)
    swap_map.cache(0, 4096)
    swap_map.unlock(0, entry(CACHE))  # migrated to another folio
    check(after, 4096)
    assert swap_map.lock(0) == entry(CACHE)
    swap_map.unlock(0, slot(1, 2**35 - 16))
    check(after, 4096)
    change(after, before)
    check(before, 4096)
    assert swap_map.lock(0) == slot(1, 2**35 - 16)
    swap_map.unlock(0, entry(CACHE))
    swap_map.lock(0)
    swap_map.cache(0, 0)
    swap_map.unlock(0, entry(ZSWAP, 3))  # swapped out, and the folio is gone
    check(before, 0)
    change(before, 1)
    assert drop(swap_map, 0) == entry(ZSWAP, 3)
    assert drop(swap_map, 1) == entry(ZSWAP, 2)
    assert swap_map.metadata() <= empty + almost_nothing(design)


@designs
@pytest.mark.parametrize("count", [1, 2, 3000])
@pytest.mark.parametrize("how", ["stored", "copy", "page"])
def test_the_last_put_takes_everything_with_it(design: str, count: int, how: str) -> None:
    swap_map = Map(design)
    for _ in range(3):
        swap_map.alloc(0, entry(ZSWAP, 1))
        assert (swap_map.count(0), swap_map.cached(0)) == (1, 0), "nothing is inherited"
        if count > 1:
            swap_map.add(0, count - 1)
        if how != "stored":
            swap_map.lock(0)
            swap_map.cache(0, 64)
            swap_map.unlock(0, entry(ZSWAP, 1) if how == "copy" else entry(CACHE))
        if count > 1:
            assert swap_map.sub(0, count - 1) == 1
        assert drop(swap_map, 0) == (entry(CACHE) if how == "page" else entry(ZSWAP, 1))
    assert swap_map.ids() == 0


@designs
def test_counts_move_while_pages_enter_and_leave_the_swap_cache(design: str) -> None:
    """dup and put across every boundary against a thread that makes the id a cached page and a stored one again."""
    swap_map = Map(design)
    swap_map.alloc(0, entry(ZSWAP, 1))
    swap_map.alloc(1, entry(ZSWAP, 1))
    for other in (10, 11, 12):
        swap_map.dup(0, other)
        swap_map.dup(1, other + 10)
    sizes = (3, 1500 // LESS, 2500 // LESS)
    done = threading.Event()

    def up_and_down(thread: int) -> None:
        holders = [span(1000 + 10_000 * (2 * thread + k), sizes[thread]) for k in range(2)]
        for _ in range(60 // LESS + 1):
            for k in range(2):
                swap_map.run("dup", np.full(sizes[thread], 10 + 10 * k + thread, np.uint64), into=holders[k])
            for k in range(2):
                swap_map.run("put", holders[k])

    def in_and_out() -> int:
        turns = 0
        while not done.is_set():
            for holder in range(2):
                word = swap_map.lock(holder)
                assert kind_of(word) == ZSWAP
                swap_map.cache(holder, 4096 + holder)
                swap_map.unlock(holder, word if turns & 1 else entry(CACHE))
                assert swap_map.cached(holder) == 4096 + holder
                assert swap_map.count(holder) >= 4
                assert swap_map.lock(holder) == (word if turns & 1 else entry(CACHE))
                swap_map.unlock(holder, entry(ZSWAP, turns + 1))
                assert swap_map.cached(holder) == 4096 + holder
                if turns & 2:
                    swap_map.lock(holder)
                    swap_map.cache(holder, 0)
                    swap_map.unlock(holder, entry(ZSWAP, turns + 1))
            turns += 1
        return turns

    def all_of_them() -> None:
        try:
            each(up_and_down, 3)
        finally:
            done.set()

    assert each(lambda thread: in_and_out() if thread else all_of_them(), 2)[1] > 10
    for holder in range(2):
        assert swap_map.count(holder) == 4
        for other in (10, 11, 12):
            swap_map.put(other + 10 * holder)
        drop(swap_map, holder)


@designs
def test_counts_and_the_swap_cache_read_right_at_every_moment(design: str) -> None:
    """No reader may see a count or a folio on its way from one place to another."""
    swap_map = Map(design)
    swap_map.alloc(0, entry(ZSWAP, 1))
    for other in range(1, 5):
        swap_map.dup(0, other)
    swap_map.lock(0)
    swap_map.cache(0, 4096)
    swap_map.unlock(0, entry(ZSWAP, 1))
    counts = {5, 7, 3005, 3007}
    rounds = 3000 // (4 if DEBUG else 1)
    done = threading.Event()

    def jump(holder: int, more: int) -> None:
        for _ in range(rounds):
            swap_map.add(holder, more)
            assert swap_map.sub(holder, more) in counts

    def in_and_out(holder: int) -> None:
        turn = 0
        while not done.is_set():
            turn += 1
            swap_map.lock(holder)
            swap_map.cache(holder, 4096)
            swap_map.unlock(holder, entry(CACHE))
            assert swap_map.lock(holder) == entry(CACHE)
            if holder:
                swap_map.cache(holder, 0)
            swap_map.unlock(holder, entry(ZSWAP, turn))

    def read() -> None:
        while not done.is_set():
            assert swap_map.count(3) in counts
            assert swap_map.cached(3) == 4096

    def jumps() -> None:
        try:
            each(lambda thread: jump(1 + thread, (2, 3000)[thread]), 2)
        finally:
            done.set()

    swap_map.alloc(9, entry(ZSWAP, 1))  # a neighbour, for what the two have in one leaf
    swap_map.add(9, 1)
    each(lambda thread: (jumps, lambda: in_and_out(0), lambda: in_and_out(9), read, read)[thread](), 5)
    assert swap_map.count(0) == 5
    for other in range(1, 5):
        swap_map.put(other)
    drop(swap_map, 0)


@designs
@pytest.mark.parametrize("how", ["copy", "page", "many", "many pages"])
def test_ids_that_go_leave_nothing_beside_the_tree(design: str, how: str) -> None:
    n = 100 * 512
    swap_map = Map(design)
    empty = swap_map.metadata()
    swap_map.run("alloc", span(0, n), entry(ZSWAP, 1))
    ids = range(0, n, 256)  # in every leaf
    for i in ids:
        swap_map.lock(i)
        swap_map.cache(i, 64)
        swap_map.unlock(i, entry(CACHE) if "page" in how else entry(ZSWAP, 1))
        if "many" in how:
            swap_map.add(i, 3000)
            assert swap_map.sub(i, 1500) == 1501
            assert swap_map.sub(i, 1500) == 1
    swap_map.run("put", span(0, n))
    assert swap_map.ids() == 0
    assert swap_map.metadata() <= empty + almost_nothing(design)


@designs
def test_one_past_the_largest_count_is_refused_to_all_threads(design: str) -> None:
    swap_map = Map(design)
    most = COUNT_MAX[design]
    assert most == (2**32 - 1 if design in ("descriptor", "vswap") else 2**62)
    for _ in range(200 // LESS + 1):
        swap_map.alloc(0, entry(ZSWAP, 1))
        swap_map.alloc(1, entry(ZSWAP, 2))
        for holder in (2, 3, 4):
            swap_map.dup(0, holder)
        swap_map.add(0, most - 4 - 2)  # two more are possible

        def take(holder: int) -> int:
            taken = 0
            for _ in range(2):
                try:
                    swap_map.add(holder, 1)
                except OverflowError:
                    continue
                taken += 1
            return taken

        assert sum(each(lambda thread: take(2 + thread), 3)) == 2
        assert (swap_map.count(0), swap_map.count(1)) == (most, 1)
        with pytest.raises(OverflowError):
            swap_map.add(0, 2**61)
        assert swap_map.sub(0, most - 4) == 4
        for holder in (2, 3, 4):
            swap_map.put(holder)
        drop(swap_map, 0)
        drop(swap_map, 1)


def test_what_an_id_costs_in_each_design_and_state() -> None:
    """Bytes an id: alone, with its copy in the swap cache, as a cached page, and the same shared; leaves are full."""
    n = 16 * 512 - 1
    leaf = 4160 / 512  # a page and its header
    descs = 4160 / 170
    cluster = (3 * 4096 + 4096 / 21) / 512
    expected = {
        "single_tree": [leaf, 2 * leaf, leaf, leaf, 2 * leaf, 2 * leaf],
        "two_trees": [2 * leaf, 3 * leaf, 2 * leaf, 2 * leaf, 3 * leaf, 2 * leaf],
        "descriptor": [leaf + descs] * 6,
        "vswap": [cluster] * 6,
    }
    for design, bytes_expected in expected.items():
        found = []
        for shared in (False, True):
            swap_map = Map(design)
            empty = swap_map.metadata()
            swap_map.run("alloc", span(0, n), entry(ZSWAP, 1))
            if shared:
                swap_map.run("dup", span(0, n), into=span(n, n))
            found.append((swap_map.metadata() - empty) / n)
            swap_map.run("cache", span(0, n))
            found.append((swap_map.metadata() - empty) / n)
            for i in range(n):
                swap_map.lock(i)
                swap_map.unlock(i, entry(CACHE))
            found.append((swap_map.metadata() - empty) / n)
        # Less than 7 free pages, interior nodes and the last chunks, which are not full
        slack = (20 * 4096 + 2 * 12_288) / n
        for at, (has, should) in enumerate(zip(found, bytes_expected, strict=True)):
            assert should * 0.99 <= has <= should + slack, (design, at, found, bytes_expected)


@pytest.mark.parametrize("design", ["single_tree", "two_trees"])
def test_without_memory_a_page_leaves_the_swap_cache_all_the_same(design: str) -> None:
    """unlock cannot fail: a folio that finds no place beside the entry is forgotten, and counts stay right."""
    program = f"""
        import resource
        import numpy as np
        from userswap.swap.map import Map, CACHE, ZSWAP, entry
        n, most = 20_000, 3_000_000
        m = Map({design!r}, holders=2 * most)
        one, two = np.arange(n, dtype=np.uint64), np.arange(n, 2 * n, dtype=np.uint64)
        m.run("alloc", one, entry(ZSWAP, 1))
        half = n // 2                                            # which shares no leaf of a side tree with the rest
        m.run("dup", one[:half], into=two[:half])
        for i in range(n):
            m.lock(i); m.cache(i, 64 + i); m.unlock(i, entry(CACHE))
        used = int(open("/proc/self/statm").read().split()[0]) * 4096
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        rest = np.arange(2 * n, most, dtype=np.uint64)
        resource.setrlimit(resource.RLIMIT_AS, (used + (40 << 20), hard))
        try:
            m.run("alloc", rest, entry(ZSWAP, 9))
            raise SystemExit("there was memory for all")
        except MemoryError:
            pass
        forgotten = 0
        for i in range(n):
            assert m.lock(i) == entry(CACHE)
            m.unlock(i, entry(ZSWAP, 5 + i))
            assert m.count(i) == 1 + (i < half)
            assert m.cached(i) in (0, 64 + i)
            forgotten += m.cached(i) == 0
        assert forgotten >= n // 3, forgotten
        assert {design!r} == "two_trees" or all(m.cached(i) == 64 + i for i in range(half)), "places were changed"
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        for i in range(n):
            assert m.lock(i) == entry(ZSWAP, 5 + i)
            m.unlock(i, entry(ZSWAP, 5 + i))
        m.run("put", one); m.run("put", two[:half])
        m.run("put", rest[[m.id(int(i)) != 0 for i in rest]])
        assert m.ids() == 0
    """
    alone(program)


# ---- descriptors ----


def test_pages_of_descriptors_that_empty_go_back() -> None:
    swap_map = Map("descriptor")
    empty = swap_map.metadata()
    n = 170 * 512
    swap_map.run("alloc", span(0, n), entry(ZSWAP, 1))
    full = swap_map.metadata() - empty
    sparse = span(0, n)[::170]  # one in each page: the rest of the page stays
    rest = np.setdiff1d(span(0, n), sparse)
    swap_map.run("put", np.random.default_rng(1).permutation(rest))
    assert swap_map.metadata() - empty >= 0.9 * full * 24 / 33, "nobody moves descriptors"
    assert {swap_map.lock(int(holder)) for holder in sparse} == {entry(ZSWAP, 1 + int(i)) for i in sparse}
    for holder in sparse:
        swap_map.unlock(int(holder), entry(ZSWAP, 1 + int(holder)))
    swap_map.run("alloc", rest, entry(ZSWAP, 7))
    assert swap_map.metadata() - empty <= full + almost_nothing("descriptor"), "holes are filled first"
    swap_map.run("put", span(0, n // 2))
    assert swap_map.metadata() - empty <= 0.8 * full
    swap_map.run("put", span(n // 2, n - n // 2))
    assert swap_map.metadata() <= empty + almost_nothing("descriptor")


def test_storage_that_remembers_a_descriptor_finds_it_wherever_next_did() -> None:
    swap_map = Map("descriptor")
    swap_map.alloc(0, slot(0, 16))
    by_storage = swap_map.owner(0)
    by_device, word, _ = swap_map.next(0)
    assert word == slot(0, 16)
    assert not swap_map.try_owner(by_storage, word)
    swap_map.unlock_owner(by_storage, entry(ZSWAP, 1))
    assert swap_map.try_owner(by_device, entry(ZSWAP, 1))
    swap_map.unlock_owner(by_device, entry(ZSWAP, 2))
    assert swap_map.lock(0) == entry(ZSWAP, 2)
    swap_map.alloc(1, slot(0, 32))
    assert swap_map.next(0, by_storage)[1] == slot(0, 32), "and next() goes on from either"


def test_without_memory_for_a_run_its_descriptors_are_free_again() -> None:
    alone(f"""
        import resource
        import numpy as np
        from userswap.swap.map import Map, ZSWAP, entry
        m = Map("descriptor", holders=2_000_000)
        empty = m.metadata()
        holders = np.arange(2_000_000, dtype=np.uint64)
        used = int(open("/proc/self/statm").read().split()[0]) * 4096
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + (8 << 20), hard))
        try:
            m.run("alloc", holders, entry(ZSWAP, 9))
        except MemoryError:
            pass
        n = m.ids()
        assert 100_000 < n < 2_000_000
        last = holders[n - 2 : n]
        m.run("put", last)
        run = [entry(ZSWAP, 1)] * 4
        for _ in range(100):
            assert not m.alloc_run(n - 2, run)
        m.run("alloc", last, entry(ZSWAP, 1))
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        m.run("put", holders[:n])
        assert m.ids() == 0 and m.metadata() <= empty + {almost_nothing("descriptor")}
    """)


# ---- vswap: clusters ----


def test_a_cluster_serves_one_order_and_runs_are_aligned() -> None:
    swap_map = Map("vswap")
    holder = itertools.count()
    clusters: dict[int, set[int]] = {}
    for order in range(6):
        for _ in range(40):
            n = 1 << order
            first = next(holder)
            for _ in range(n - 1):
                next(holder)
            if n == 1:
                swap_map.alloc(first, entry(ZSWAP, 1))
            else:
                assert swap_map.alloc_run(first, [entry(ZSWAP, 1)] * n)
            ids = [swap_map.id(first + i) for i in range(n)]
            assert ids[0] % n == 0 and ids == list(range(ids[0], ids[0] + n))
            clusters.setdefault(ids[0] >> 9, set()).add(order)
            assert ids[-1] >> 9 == ids[0] >> 9
    assert all(len(orders) == 1 for orders in clusters.values())
    assert 0 not in clusters, "id 0 names nothing"


def test_partly_free_clusters_are_filled_before_there_are_more() -> None:
    swap_map = Map("vswap")
    n = 64 * 512
    swap_map.run("alloc", span(0, n), entry(ZSWAP, 1))
    full = swap_map.metadata()
    assert len({swap_map.id(i) >> 9 for i in range(n)}) <= 64 + 2
    gone = np.random.default_rng(2).permutation(n)[: n // 3].astype(np.uint64)
    for _ in range(3):
        swap_map.run("put", gone)
        swap_map.run("alloc", gone, entry(ZSWAP, 1))
        assert swap_map.metadata() <= full + almost_nothing("vswap")
    assert len({swap_map.id(i) for i in range(n)}) == n


def test_clusters_come_and_go_under_lookups_of_others() -> None:
    """Numbers and memory of clusters are used again at once: what a CPU looked up last must not be the one before."""
    swap_map = Map("vswap", holders=1 << 20)
    n = 512 * 3
    rounds = 300 // LESS

    def churn(thread: int) -> int:
        mine = span(100_000 * thread, n)
        wrong = 0
        for turn in range(rounds):
            first = 1 + ((thread << 40) | (turn << 20))
            swap_map.run("alloc", mine, entry(ZSWAP, first))
            swap_map.run("fault", mine)
            for i in (0, n // 2, n - 1):
                word = swap_map.lock(int(mine[i]))
                wrong += word != entry(ZSWAP, first + i)
                swap_map.unlock(int(mine[i]), word)
            swap_map.run("take", mine if turn & 1 else mine[::-1].copy())
        return wrong

    assert each(churn, 4) == [0] * 4
    assert swap_map.ids() == 0


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")
@pytest.mark.parametrize("other_way", [False, True])
def test_no_cpu_finds_a_cluster_where_it_was_before(other_way: bool) -> None:
    """A cluster's number comes again with another's memory, while a CPU has it looked up as it was."""
    cpus = os.sched_getaffinity(0)
    here, there = sorted(cpus, reverse=other_way)[:2]
    swap_map = Map("vswap")
    try:
        os.sched_setaffinity(0, {here})
        swap_map.run("alloc", span(0, 4 * 512), entry(ZSWAP, 1))
        clusters: dict[int, list[int]] = {}
        for i in range(4 * 512):
            clusters.setdefault(swap_map.id(i) >> 9, []).append(i)
        first, second = list(clusters)[1:3]
        os.sched_setaffinity(0, {there})
        swap_map.unlock(clusters[second][0], swap_map.lock(clusters[second][0]))
        os.sched_setaffinity(0, {here})
        for number in (first, second):
            swap_map.run("put", np.array(clusters[number], np.uint64))
        swap_map.run("alloc", span(5000, 1024), entry(ZSWAP, 10_000))
        os.sched_setaffinity(0, {there})
        again = [i for i in range(1024) if swap_map.id(5000 + i) >> 9 == second]
        assert again, "the number is used again"
        for i in again:
            assert swap_map.lock(5000 + i) == entry(ZSWAP, 10_000 + i)
    finally:
        os.sched_setaffinity(0, cpus)


def test_a_full_cluster_without_a_place_for_a_run_is_found_again() -> None:
    """Single ids of it were freed: it was looked at in vain, and must be listed again when there is a place."""
    swap_map = Map("vswap")
    run = [entry(ZSWAP, 1)] * 4

    def fill(first: int) -> None:
        for i in range(128):
            assert swap_map.alloc_run(first + 4 * i, run)

    fill(0)
    fill(1000)
    for i in range(128):
        drop(swap_map, 4 * i)
    fill(2000)  # the first one has no place for a run of four
    fill(3000)
    full = swap_map.metadata()
    for i in range(128):
        for j in range(1, 4 if i else 3):
            drop(swap_map, 4 * i + j)
    for i in range(127):
        assert swap_map.alloc_run(4000 + 4 * i, run)
    assert swap_map.metadata() == full
    assert {swap_map.id(4000 + i) >> 9 for i in range(4 * 127)} == {swap_map.id(3) >> 9}


# ---- vswap: the reverse map ----


def test_next_starts_anew_in_the_table_after_one_that_has_emptied() -> None:
    """A later table has a lower id: it is not taken for one that next() has passed."""
    swap_map = Map("vswap")
    swap_map.alloc(0, slot(0, 512))
    swap_map.alloc(1, slot(0, 0))
    assert swap_map.id(0) < swap_map.id(1)
    assert swap_map.swapoff(0)[0] == 2


def test_next_goes_on_from_an_id_that_left_among_neighbours_in_any_order() -> None:
    swap_map = Map("vswap", slot_run=1)
    offsets = np.random.default_rng(3).permutation(200)
    for holder, offset in enumerate(offsets):
        swap_map.alloc(holder, slot(0, int(offset), slots=1))
    found, owner, stayed = [], 0, 0
    while True:
        owner, word, busy = swap_map.next(0, owner)
        assert busy == 0
        if not owner:
            break
        found.append(word)
        leaves = len(found) % 3 == 0
        swap_map.unlock_owner(owner, entry(ZSWAP, len(found)) if leaves else word)
        stayed += not leaves
        if leaves:
            holder = int(np.flatnonzero(offsets == (word >> 8) % 2**35)[0])
            drop(swap_map, holder)  # even its id is gone
    assert sorted(found) == sorted(slot(0, int(offset), slots=1) for offset in offsets)
    assert len(walk(swap_map)[0]) == stayed


def test_a_slot_given_away_before_its_old_id_has_left_it_is_found() -> None:
    """Storage is freed before its id is: for a moment two ids have the same slot, and neither may be lost."""
    swap_map = Map("vswap")
    swap_map.alloc(0, slot(0, 32))
    swap_map.lock(0)
    swap_map.alloc(1, slot(0, 32))  # the second finds its place in the reverse map taken
    assert walk(swap_map) == ([slot(0, 32)], 1), "one locked, one found"
    swap_map.unlock(0, entry(ZSWAP, 1))
    assert walk(swap_map) == ([slot(0, 32)], 0)
    assert swap_map.put(0) == (0, entry(ZSWAP, 1))
    swap_map.free(0)
    assert walk(swap_map) == ([slot(0, 32)], 0)
    assert swap_map.owner(1) == swap_map.next(0)[0]
    swap_map.unlock_owner(swap_map.owner(1), slot(0, 64))  # it moves, and has a place again
    swap_map.alloc(0, slot(0, 32))
    assert walk(swap_map) == ([slot(0, 32), slot(0, 64)], 0)
    assert swap_map.put(0) == (0, slot(0, 32))
    swap_map.alloc(2, slot(0, 32))  # freed storage, an id that is about to go
    assert walk(swap_map) == ([slot(0, 64), slot(0, 32)], 1)
    swap_map.free(0)
    assert walk(swap_map) == ([slot(0, 64), slot(0, 32)], 0)
    assert drop(swap_map, 2) == slot(0, 32)
    assert walk(swap_map) == ([slot(0, 64)], 0)


def test_the_last_slots_of_the_largest_device_are_found_too() -> None:
    """Their place in an owner stands for: not in the reverse map."""
    swap_map = Map("vswap")
    for holder in range(1200):
        swap_map.alloc(holder, slot(3, 2**35 - 1 - holder % 40, slots=1) if holder % 30 == 0 else entry(ZSWAP, 1))
    assert len(walk(swap_map, 3)[0]) == 40
    assert walk(swap_map, 2) == ([], 0)
    assert swap_map.swapoff(3)[0] == 40
    assert walk(swap_map, 3) == ([], 0)
    assert {kind_of(swap_map.lock(holder)) for holder in range(1200)} == {ZSWAP}


def test_without_memory_for_the_reverse_map_swapoff_finds_all_the_same() -> None:
    program = """
        import resource
        import numpy as np
        from userswap.swap.map import Map, ZSWAP, entry, slot
        n, most = 30_000, 3_000_000
        m = Map("vswap", holders=most)
        one = np.arange(n, dtype=np.uint64)
        m.run("alloc", one, entry(ZSWAP, 1))
        m.run("writeback", one[:100], slot(0, 0))                # these are in the reverse map
        empty = m.metadata()
        used = int(open("/proc/self/statm").read().split()[0]) * 4096
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), hard))
        for i in range(100, n):
            owner = m.owner(i)
            assert m.try_owner(owner, entry(ZSWAP, 1 + i))
            m.unlock_owner(owner, slot(0, 512 * i))              # each needs a table of its own
        assert m.metadata() - empty < 2 << 20, "there was memory for all"
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        assert m.swapoff(1)[0] == 0
        assert m.swapoff(0)[0] == n
        assert m.next(0)[0] == 0
        m.run("put", one)
        assert m.ids() == 0
    """
    alone(program)


class Slots:
    """A swap file's slots, given and taken under a lock: who gives one back may still have an id that names it."""

    def __init__(self, n: int) -> None:
        self.lock = threading.Lock()
        self.free = list(range(n))

    def take(self) -> int:
        with self.lock:
            return self.free.pop()

    def give(self, offset: int) -> None:
        with self.lock:
            self.free.append(offset)


@pytest.mark.parametrize("threads", [2, 4])
def test_the_reverse_map_stays_right_under_writeback_compaction_free_and_swapoff(threads: int) -> None:
    """Threads move ids between zswap and slots that they pass to one another; another walks the device meanwhile."""
    swap_map = Map("vswap", slot_run=1)
    per_thread, rounds = 60, 6000 // LESS
    slots = Slots(per_thread * threads + threads)
    finished = threading.Event()
    model: list[dict[int, int]] = [{} for _ in range(threads)]  # holder -> entry

    def program(thread: int) -> None:
        rng = np.random.default_rng(thread)
        mine = model[thread]
        for turn in range(rounds):
            holder = thread * per_thread + int(rng.integers(per_thread))
            kind = rng.integers(4)
            word = mine.get(holder)
            if word is None:
                mine[holder] = slot(0, slots.take(), slots=1) if kind & 1 else entry(ZSWAP, turn + 1)
                swap_map.alloc(holder, mine[holder])
            elif kind == 0:
                left, seen = swap_map.put(holder)
                assert (left, seen) == (0, word)
                if kind_of(word) == SLOT:
                    slots.give((word >> 8) % 2**35)  # and only then is the id freed
                swap_map.free(holder)
                del mine[holder]
            else:
                if kind == 1:
                    assert swap_map.lock(holder) == word
                else:  # from the side of storage, if no walker is at it
                    owner = swap_map.owner(holder)
                    if not swap_map.try_owner(owner, word):
                        continue
                mine[holder] = slot(0, slots.take(), slots=1) if rng.integers(2) else entry(ZSWAP, turn + 1)
                if kind_of(word) == SLOT:
                    slots.give((word >> 8) % 2**35)
                if kind == 1:
                    swap_map.unlock(holder, mine[holder])
                else:
                    swap_map.unlock_owner(owner, mine[holder])

    def walker() -> int:
        found = 0
        while not finished.is_set():
            words, _ = walk(swap_map)
            assert all(kind_of(word) == SLOT and word >> 49 & 15 == 0 for word in words)
            found += len(words)
        return found

    def programs() -> None:
        try:
            each(program, threads)
        finally:
            finished.set()

    _, found = each(lambda thread: walker() if thread else programs(), 2)
    assert found > 100 // LESS
    there = sorted(word for mine in model for word in mine.values() if kind_of(word) == SLOT)
    assert len(there) > threads
    words, passed = walk(swap_map)
    assert (sorted(words), passed) == (there, 0)
    assert swap_map.swapoff(0)[0] == len(there)
    assert walk(swap_map) == ([], 0)


Holders = npt.NDArray[np.uint64]


@designs
def test_writebacks_and_compactions_at_full_speed_leave_every_entry_where_it_belongs(design: str) -> None:
    swap_map = Map(design, slot_run=1)
    n, threads = 3000 // LESS, 3

    def mover(thread: int) -> None:
        mine: Holders = span(10_000 * thread, n)
        for turn in range(40 // LESS + 1):
            swap_map.run("alloc", mine, entry(ZSWAP, 1))
            for place in range(3):
                swap_map.run("writeback", mine, slot(0, (thread * 3 + place) * n, slots=1))
                if (turn + place) % 2:
                    swap_map.run("writeback", mine, entry(ZSWAP, 1 << 30))
            swap_map.run("put", mine if turn % 3 else mine[::-1].copy())
        swap_map.run("alloc", mine, slot(0, thread * n, slots=1))

    each(mover, threads)
    words, passed = walk(swap_map)
    assert (sorted(words), passed) == ([slot(0, i, slots=1) for i in range(threads * n)], 0)
    for thread in range(threads):
        swap_map.run("put", span(10_000 * thread, n))
    assert walk(swap_map) == ([], 0)
    assert swap_map.ids() == 0
