"""What is special to the designs of the kernel's: digits of a count, arrays of a cluster, slots that end, redirects."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from maps import CHAOS, LESS, Ids, alone, drop, kind_of, span, together
from userswap.swap.map import CACHE, COUNT_MAX, SAME, SLOT, ZSWAP, Map, entry, slot

PAGE = 4096
IDLE = 4 * PAGE  # pages that a map may keep though they hold nothing
LOW, DIGIT = 63, 128  # what the lowest digit of a count in Linux's swap_map is worth, and each after it

clustered = pytest.mark.parametrize("design", ["slot", "swap_table", "redirect"])
bound = pytest.mark.parametrize("design", ["slot", "swap_table"])


def until(done: threading.Event, work: Callable[[], None]) -> None:
    while not done.is_set():
        work()


# ---- counts that do not fit ----

BOUNDARIES = [62, 63, 64, 511, 512, 513, *(LOW * DIGIT**i + j for i in range(1, 8) for j in (-1, 0, 1))]


@clustered
@pytest.mark.parametrize("boundary", BOUNDARIES)
def test_a_count_crosses_each_boundary_and_its_neighbours_stay(design: str, boundary: int) -> None:
    swap_map = Map(design)
    counts = [1, 62, 63, boundary, 64, LOW * DIGIT, 2, boundary - 1, 1]
    for i, count in enumerate(counts):
        swap_map.alloc(i, entry(ZSWAP, 1 + i))
        if count > 1:
            swap_map.add(i, count - 1)
    now = counts.copy()

    def step(n: int) -> None:
        if n > 0:
            swap_map.add(3, n)
        else:
            assert swap_map.sub(3, -n) == now[3] + n
        now[3] += n
        assert [swap_map.count(i) for i in range(len(now))] == now

    for n in (-1, -1, 1, 1, 1, -1, 62, -62, 63, -63, 64, -64, LOW * DIGIT, -LOW * DIGIT, 1 - boundary, boundary - 1):
        if n:
            step(n)
    assert [swap_map.lock(i) for i in range(len(now))] == [entry(ZSWAP, 1 + i) for i in range(len(now))]


@clustered
def test_counts_are_numbers_whatever_their_digits(design: str) -> None:
    swap_map = Map(design)
    rng = np.random.default_rng(7)
    counts = [1] * 6
    for i in range(6):
        swap_map.alloc(i, entry(ZSWAP, 1))
    for _ in range(3000 // LESS):
        i = int(rng.integers(6))
        size = 1 << int(rng.integers(1, 62))
        n = int(rng.integers(1, size)) if size > 1 else 1
        if rng.random() < 0.5 and counts[i] > 1:
            n = min(n, counts[i] - 1)
            counts[i] -= n
            assert swap_map.sub(i, n) == counts[i]
        elif counts[i] + n <= COUNT_MAX[design]:
            swap_map.add(i, n)
            counts[i] += n
        else:
            with pytest.raises(OverflowError):
                swap_map.add(i, n)
        assert [swap_map.count(j) for j in range(6)] == counts


@clustered
@pytest.mark.parametrize("base", [60, 509, LOW * DIGIT - 2, LOW * DIGIT**2 - 2, LOW * DIGIT**7 - 2])
def test_two_threads_duplicate_an_id_across_a_boundary(design: str, base: int) -> None:
    """One goes up and down by ones, one by more; whoever looks meanwhile sees a count that there was."""
    swap_map = Map(design)
    swap_map.alloc(0, entry(ZSWAP, 1))
    swap_map.alloc(5, entry(ZSWAP, 2))
    swap_map.dup(0, 1)
    swap_map.dup(0, 2)
    swap_map.add(0, base - 3)
    swap_map.add(5, base)
    done = threading.Event()
    least, most = base, base

    def up_and_down(holder: int, n: int) -> None:
        for _ in range(4000 // LESS):
            swap_map.add(holder, n)
            swap_map.sub(holder, n)

    def look() -> None:
        nonlocal least, most
        count = swap_map.count(2)
        least, most = min(least, count), max(most, count)

    def both() -> None:
        together(lambda: up_and_down(0, 1), lambda: up_and_down(1, 3))
        done.set()

    together(both, lambda: until(done, look))
    assert base <= least <= most <= base + 4
    assert swap_map.count(0) == base
    assert swap_map.count(5) == base + 1


def test_continuation_pages_come_one_by_one_and_stay() -> None:
    swap_map = Map("slot")
    holders = span(0, 4096 + 2)  # the last ones have their counts on another page of swap_map
    swap_map.run("alloc", holders, entry(ZSWAP, 1))
    for i in holders:
        if swap_map.id(int(i)) > 4096:
            far = int(i)
    base = swap_map.metadata()

    def pages() -> int:
        return (swap_map.metadata() - base) // PAGE

    swap_map.add(0, 61)
    assert pages() == 0, "0x3e fits its byte"
    swap_map.add(0, 1)
    assert pages() == 1
    swap_map.add(1, 62)
    swap_map.add(2, LOW * DIGIT - 2)
    assert pages() == 1, "all of the page of swap_map share it"
    swap_map.add(2, 1)
    assert pages() == 2
    swap_map.add(far, 62)
    assert pages() == 3
    swap_map.add(3, LOW * DIGIT**7 - 1)
    assert pages() == 9, "eight digits"
    assert [swap_map.sub(i, swap_map.count(i) - 1) for i in (0, 1, 2, 3, far)] == [1] * 5
    assert pages() == 9, "kept until swapoff, as in the kernel"
    assert swap_map.count(4) == 1


def test_without_memory_for_a_digit_the_count_stays() -> None:
    program = """
        import mmap, resource
        from userswap.swap.map import Map, ZSWAP, entry
        m = Map("slot", slots=1000)
        m.alloc(0, entry(ZSWAP, 1))
        m.add(0, 63)                                            # one digit more
        empty = m.metadata()
        used = int(open("/proc/self/statm").read().split()[0]) * 4096
        resource.setrlimit(resource.RLIMIT_AS, (used, resource.RLIM_INFINITY))
        kept = []
        for n in (2**20, 2**40, 2**60):
            try:
                while True:
                    kept.append(mmap.mmap(-1, 4096))            # what is left below the limit
            except OSError:
                pass
            try:
                m.add(0, n)
                raise SystemExit("there was memory")
            except MemoryError:
                assert m.count(0) == 64 and m.metadata() == empty
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        m.add(0, 2**60)
        assert m.count(0) == 64 + 2**60
    """
    alone(program)


@pytest.mark.parametrize(("design", "fits"), [("swap_table", 62), ("redirect", 511)])
def test_a_cluster_gets_an_array_for_counts_that_overflow(design: str, fits: int) -> None:
    swap_map = Map(design)
    clusters = 20
    swap_map.run("alloc", span(0, clusters * 512), entry(ZSWAP, 1))
    base = swap_map.metadata()
    for i in range(clusters):
        swap_map.add(i * 512 + i, fits - 1)
    assert swap_map.metadata() == base, "they fit"
    for i in range(clusters):
        swap_map.add(i * 512 + i, 1)
        assert swap_map.metadata() == base + (i + 1) * PAGE
        swap_map.add(i * 512 + 100, 2**40)
        assert swap_map.metadata() == base + (i + 1) * PAGE, "one for the cluster"
    for i in range(clusters):
        assert swap_map.sub(i * 512 + i, 1) == fits
        assert swap_map.count(i * 512 + 100) == 2**40 + 1
        assert swap_map.sub(i * 512 + 100, 2**40) == 1
    assert swap_map.metadata() <= base + IDLE, "no count needs it"
    for i in range(clusters):
        swap_map.add(i * 512 + i, 5)
        assert swap_map.sub(i * 512 + i, fits + 4) == 1
    swap_map.run("put", span(0, clusters * 512))


# ---- slots ----


@bound
@pytest.mark.parametrize("slots", [1, 255, 256, 257, 511, 513, 1000, 5000])
def test_every_slot_can_be_had_and_no_more(design: str, slots: int) -> None:
    swap_map = Map(design, slots=slots)
    for _ in range(3):
        for i in range(slots):
            swap_map.alloc(i, entry(ZSWAP, 1 + i))
        assert sorted(swap_map.id(i) for i in range(slots)) == list(range(1, slots + 1))
        with pytest.raises(MemoryError):
            swap_map.alloc(slots, entry(ZSWAP, 1))
        assert not swap_map.alloc_run(slots, [entry(ZSWAP, 1)] * 2)
        assert swap_map.ids() == slots
        for i in range(slots):
            assert drop(swap_map, i) == entry(ZSWAP, 1 + i)
        assert swap_map.ids() == 0
    swap_map.alloc(0, slot(0, 0))
    assert swap_map.lock(0) == swap_map.home(0)


@bound
def test_threads_share_the_last_slots(design: str) -> None:
    slots = 3000 // LESS
    swap_map = Map(design, slots=slots)
    for _ in range(6):
        had: list[list[int]] = [[], [], []]

        def take(thread: int, had: list[list[int]] = had) -> None:
            holder = thread * 10_000
            while True:
                try:
                    swap_map.alloc(holder, entry(ZSWAP, 1 + holder))
                except MemoryError:
                    return
                had[thread].append(holder)
                holder += 1

        def give(thread: int, had: list[list[int]] = had) -> None:
            for holder in had[thread]:
                assert drop(swap_map, holder) == entry(ZSWAP, 1 + holder)

        together(*[lambda i=i: take(i) for i in range(3)])
        ids = [swap_map.id(holder) for holders in had for holder in holders]
        assert sorted(ids) == list(range(1, slots + 1)), "each slot once, and none is left over"
        together(*[lambda i=i: give(i) for i in range(3)])
        assert swap_map.ids() == 0


@bound
def test_there_is_a_slot_for_everybody_as_long_as_one_is_free(design: str) -> None:
    """Who finds a cluster or a cache of slots in another's hands looks again, and does not give up."""
    each = 300
    swap_map = Map(design, slots=3 * each)

    def come_and_go(thread: int) -> None:
        holders = span(thread * 1000, each)
        for _ in range(400 // LESS):
            swap_map.run("alloc", holders, entry(ZSWAP, 1))
            swap_map.run("put", holders)

    failed = []

    def noted(thread: int) -> None:
        try:
            come_and_go(thread)
        except MemoryError as error:
            failed.append(error)

    together(*[lambda i=i: noted(i) for i in range(3)])
    assert not failed
    assert swap_map.ids() == 0


@clustered
def test_neighbours_come_move_and_go_at_once(design: str) -> None:
    """The use of a page is counted right when threads are at its words at the same time."""
    n = 512 * 12
    swap_map = Map(design, slots=n)
    empty = swap_map.metadata()
    swap_map.run("alloc", span(0, n), entry(ZSWAP, 1))

    def move(holders: Ids) -> None:
        for _ in range(40 // LESS + 1):
            swap_map.run("writeback", holders, slot(0, 0))
            swap_map.run("cache", holders)
            swap_map.run("uncache", holders)
            swap_map.run("put", holders)
            swap_map.run("alloc", holders, entry(ZSWAP, 1))

    together(*[lambda i=i: move(span(0, n)[i::2].copy()) for i in range(2)])
    assert {swap_map.lock(i) for i in range(n)} == {entry(ZSWAP, 1 + i) for i in range(n // 2)}
    for i in range(n):
        swap_map.unlock(i, entry(ZSWAP, 1))
    swap_map.run("put", span(0, n))
    assert swap_map.metadata() <= empty + IDLE + (4 * PAGE if design == "redirect" else 0)


@clustered
def test_storage_locks_the_entry_that_it_means(design: str) -> None:
    """The entry goes to and fro while storage tries to lock one of its two states: what it locks is that one."""
    swap_map = Map(design)
    words = [slot(0, 16), slot(0, 32)] if design == "redirect" else [entry(ZSWAP, 1), entry(ZSWAP, 2)]
    swap_map.alloc(0, words[0])
    swap_map.dup(0, 1)
    owner = swap_map.owner(0)
    done = threading.Event()
    now = swap_map.lock(0)
    swap_map.unlock(0, now)
    wrong = []
    locked = 0

    def change() -> None:
        nonlocal now
        turn = 0
        # Delays are what makes it aim long enough for the entry to have gone and come back.
        while turn < 3000 or (locked < (1500 if CHAOS else 30) and turn < 1_000_000):
            swap_map.lock(0)
            now = words[turn % 2]
            swap_map.unlock(0, now)
            turn += 1
        done.set()

    def aim() -> None:
        nonlocal locked
        if swap_map.try_owner(owner, words[0]):
            locked += 1
            if now != words[0]:
                wrong.append(now)
            swap_map.unlock_owner(owner, now)

    together(change, lambda: until(done, aim))
    assert not wrong
    assert locked
    assert swap_map.lock(1) == now


@clustered
def test_who_is_about_to_sleep_is_not_forgotten(design: str) -> None:
    """Each entry is unlocked once, at about the time when its only waiter finds it locked."""
    n = 3000
    swap_map = Map(design)
    for i in range(n):
        swap_map.alloc(i, entry(ZSWAP, 1))
        swap_map.dup(i, 10_000 + i)
        swap_map.lock(i)
    reached = -1

    def wait() -> None:
        nonlocal reached
        for i in range(n):
            reached = i
            swap_map.unlock(10_000 + i, swap_map.lock(10_000 + i))

    def release() -> None:
        for i in range(n):
            while reached < i:
                pass
            swap_map.unlock(i, entry(ZSWAP, 2))

    together(wait, release)
    assert {swap_map.lock(i) for i in range(n)} == {entry(ZSWAP, 2)}


@bound
def test_a_full_swap_file_is_used_again_wherever_slots_are_freed(design: str) -> None:
    slots = 4000 // LESS
    swap_map = Map(design, slots=slots)
    rng = np.random.default_rng(11)
    holders = span(0, slots)
    swap_map.run("alloc", holders, entry(ZSWAP, 1))
    for _ in range(20):
        gone = rng.permutation(holders)[: slots // 3]
        ids = {swap_map.id(int(i)) for i in gone}
        swap_map.run("put", gone)
        assert swap_map.ids() == slots - slots // 3
        swap_map.run("alloc", gone, entry(ZSWAP, 1))
        assert {swap_map.id(int(i)) for i in gone} == ids
        with pytest.raises(MemoryError):
            swap_map.alloc(slots, entry(ZSWAP, 1))


@bound
def test_memory_of_the_swap_file_is_taken_at_swapon(design: str) -> None:
    """3 bytes and a bit for each slot, and little for clusters; nothing without a swap file."""
    assert Map(design, slots=0).metadata() < 64 << 10
    sizes = [Map(design, slots=slots).metadata() for slots in (1 << 20, 1 << 21)]
    per_slot = (sizes[1] - sizes[0]) / (1 << 20)
    assert 3.125 <= per_slot <= 3.125 + (0.1 if design == "slot" else 0.05)
    program = f"""
        from userswap.swap.map import Map
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096
        Map({design!r}, slots=1000)
        before = resident()
        m = Map({design!r}, slots=4 << 20, slot_run=1)
        assert abs(resident() - before - m.metadata()) < 0.02 * m.metadata(), (resident() - before, m.metadata())
    """
    alone(program)


@bound
@pytest.mark.parametrize("slot_run", [1, 16, 32])
def test_an_id_is_a_place_on_the_device(design: str, slot_run: int) -> None:
    swap_map = Map(design, slots=600, slot_run=slot_run)
    swap_map.run("alloc", span(0, 600), slot(0, 0))
    for i in range(600):
        home = slot(0, (swap_map.id(i) - 1) * slot_run, slot_run)
        assert swap_map.home(i) == home == swap_map.lock(i)
        swap_map.unlock(i, entry(ZSWAP, 5) if i % 3 else slot(3, 77))
    found = []
    owner, word, busy = swap_map.next(0)
    while owner:
        found.append((owner, word))
        owner, word, busy = swap_map.next(0, owner)
        assert busy == 0
    expected = sorted((swap_map.id(i), swap_map.home(i)) for i in range(0, 600, 3))
    assert found == expected
    assert swap_map.next(1) == (0, 0, 0)
    assert swap_map.put(0) == (0, swap_map.home(0))
    left = []
    owner = 0
    while owner := swap_map.next(0, owner)[0]:
        left.append(owner)
    assert left == [owner for owner, _ in expected if owner != swap_map.id(0)], "who is gone holds nothing"
    swap_map.free(0)


@clustered
@pytest.mark.parametrize("n", [2, 3, 16, 31, 32])
def test_ids_of_a_run_are_in_a_row_among_all_others(design: str, n: int) -> None:
    swap_map = Map(design, slots=20_000)
    rng = np.random.default_rng(n)
    singles, runs = span(0, 3000), span(100_000, 100 * n)
    swap_map.run("alloc", singles, entry(ZSWAP, 1))
    swap_map.run("put", rng.permutation(singles)[:1500])
    taken = {swap_map.id(int(i)) for i in singles}
    for first in range(100_000, 100_000 + 100 * n, n):
        assert swap_map.alloc_run(first, [entry(ZSWAP, first + i) for i in range(n)])
        ids = [swap_map.id(first + i) for i in range(n)]
        assert ids == list(range(ids[0], ids[0] + n))
        assert not taken & set(ids)
        taken |= set(ids)
        if first % 3 == 0:
            swap_map.put(first + 1)
            taken.remove(ids[1])
            swap_map.free(first + 1)
    for holder in runs:
        if swap_map.id(int(holder)):
            assert drop(swap_map, int(holder)) == entry(ZSWAP, int(holder))


def test_a_run_goes_where_it_fits_or_nowhere() -> None:
    swap_map = Map("swap_table", slots=1024)
    words = [entry(ZSWAP, 1)] * 32
    for i in range(0, 1024, 32):
        assert swap_map.alloc_run(i, words)
    assert not swap_map.alloc_run(2000, words)
    for i in range(40, 40 + 31):
        drop(swap_map, i)
    assert not swap_map.alloc_run(2000, words), "31 in a row"
    assert [swap_map.id(2000 + i) for i in range(32)] == [0] * 32
    drop(swap_map, 71)
    assert swap_map.alloc_run(2000, words)
    assert [swap_map.id(2000 + i) for i in range(32)] == list(range(41, 73))
    drop(swap_map, 900)
    swap_map.alloc(900, entry(ZSWAP, 1))
    assert swap_map.id(900) == 901, "a single slot, when nothing else is left"


def test_an_empty_cluster_has_no_table() -> None:
    swap_map = Map("swap_table", slots=100_000)
    empty = swap_map.metadata()
    swap_map.run("alloc", span(0, 51_200), entry(ZSWAP, 1))
    assert swap_map.metadata() == empty + 200 * PAGE, "a table and a page of zswap's tree for each of 100"
    for i in range(100):
        swap_map.lock(i * 512)
        swap_map.unlock(i * 512, slot(0, 0))
    assert swap_map.metadata() == empty + 200 * PAGE
    for i in range(51_200):
        if i % 512:
            swap_map.lock(i)
            swap_map.unlock(i, slot(0, 0))
    assert empty + 100 * PAGE <= swap_map.metadata() <= empty + 100 * PAGE + IDLE
    swap_map.run("put", span(0, 51_200))
    assert swap_map.metadata() <= empty + IDLE


@clustered
def test_an_id_that_comes_and_goes_keeps_its_pages(design: str) -> None:
    """Else each time would cost system calls."""
    swap_map = Map(design)
    swap_map.alloc(0, slot(0, 0))
    swap_map.lock(0)
    swap_map.cache(0, 9)
    swap_map.unlock(0, entry(ZSWAP, 1))
    drop(swap_map, 0)
    once = swap_map.metadata()
    for _ in range(200):
        swap_map.alloc(0, slot(0, 0))
        swap_map.lock(0)
        swap_map.cache(0, 9)
        swap_map.unlock(0, entry(ZSWAP, 1))
        drop(swap_map, 0)
    assert swap_map.metadata() == once > Map(design).metadata() + PAGE


@bound
def test_same_filled_folios_are_a_bit_or_a_word(design: str) -> None:
    swap_map = Map(design, slots=100_000)
    many = span(0, 50_000)
    empty = swap_map.metadata()
    swap_map.run("alloc", many, entry(SAME, 0))
    zeros = swap_map.metadata() - empty
    assert zeros <= (50_000 * 8 if design == "swap_table" else 0) + 2 * PAGE
    assert {swap_map.lock(i) for i in range(200)} == {entry(SAME, 0)}
    for i in range(200):
        swap_map.unlock(i, entry(SAME, 0))
    swap_map.run("put", many)
    swap_map.run("alloc", many, entry(SAME, 3 << 32 | 7))
    assert swap_map.metadata() - empty > zeros + 50_000 * 8 - IDLE
    assert {swap_map.lock(i) for i in range(200)} == {entry(SAME, 3 << 32 | 7)}


# ---- redirects ----


def test_what_moves_to_a_device_has_four_bytes_more() -> None:
    swap_map = Map("redirect")
    empty = swap_map.metadata()
    n = 512 * 40
    swap_map.run("alloc", span(0, n), entry(ZSWAP, 1))
    base = swap_map.metadata()
    assert base - empty <= 8 * n + 4 * PAGE, "8 bytes, and the structs of a chunk of clusters"
    swap_map.run("writeback", span(0, 1), slot(0, 16))
    assert swap_map.metadata() == base + PAGE, "the array comes with the first"
    swap_map.run("writeback", span(1, n - 1), slot(0, 32))
    assert swap_map.metadata() == base + 4 * n
    assert [swap_map.lock(i) for i in (0, 1, 600)] == [slot(0, 16), slot(0, 32), slot(0, 32 + 599 * 16)]
    for i in (0, 1, 600):
        swap_map.unlock(i, entry(ZSWAP, 4))
    assert swap_map.swapoff(0)[0] == n - 3
    assert swap_map.metadata() <= base + IDLE, "and goes with the last"
    swap_map.run("writeback", span(0, n), slot(5, 0))
    swap_map.run("put", span(0, n))
    assert swap_map.metadata() < 64 << 10


FAR = [slot(device, offset, run, raw) for device in (0, 1, 15) for offset in (0, 2**32 - 1, 2**32, 2**35 - 1)
       for run in (1, 16, 32) for raw in (False, True)]  # fmt: skip


@pytest.mark.parametrize("design", ["redirect"])
def test_a_redirect_and_its_word_have_every_bit_of_a_slot(design: str) -> None:
    swap_map = Map(design)
    for i, word in enumerate(FAR):
        swap_map.alloc(2 * i, word)
        swap_map.alloc(2 * i + 1, entry(ZSWAP, 2**45 - 1))
    for i, word in enumerate(FAR):
        assert swap_map.lock(2 * i) == word
        swap_map.unlock(2 * i, FAR[i - 1])
        assert swap_map.try_owner(swap_map.owner(2 * i), FAR[i - 1])
        swap_map.unlock_owner(swap_map.owner(2 * i), FAR[i - 1])
        for other in FAR:
            assert other == FAR[i - 1] or not swap_map.try_owner(swap_map.owner(2 * i), other)
        assert swap_map.lock(2 * i + 1) == entry(ZSWAP, 2**45 - 1)
        swap_map.unlock(2 * i + 1, word)
    for device in (0, 1, 15):
        owner, seen = 0, []
        while True:
            owner, word, _ = swap_map.next(device, owner)
            if not owner:
                break
            seen.append(word)
            swap_map.unlock_owner(owner, word)
        assert sorted(seen) == sorted(2 * [word for word in FAR if word >> 49 & 15 == device])


# ---- the swap cache ----

TRANSITIONS = [entry(CACHE), entry(ZSWAP, 3), slot(0, 2**34), entry(CACHE), slot(0, 2**33), entry(ZSWAP, 2**45 - 1)]


@clustered
def test_who_looks_always_finds_the_cached_folio(design: str) -> None:
    """The entry goes through all of its kinds while the folio stays; a reader without a lock never misses it."""
    swap_map = Map(design)
    folio = 2**48 - 1
    for i in (0, 1):
        swap_map.alloc(i, entry(ZSWAP, 3))
        swap_map.dup(i, i + 10)
        swap_map.lock(i)
        swap_map.cache(i, folio - i)
        swap_map.unlock(i, entry(ZSWAP, 3))
    done = threading.Event()
    missed = []

    def look() -> None:
        if (swap_map.cached(10), swap_map.cached(11)) != (folio, folio - 1):
            missed.append((swap_map.cached(10), swap_map.cached(11)))

    def change() -> None:
        word = entry(ZSWAP, 3)
        for turn in range(600):
            assert swap_map.lock(0) == word
            word = TRANSITIONS[turn % len(TRANSITIONS)]
            swap_map.unlock(0, word)
            home = swap_map.home(0)
            word = home if home is not None and kind_of(word) == SLOT else word
        done.set()

    together(change, lambda: until(done, look))
    assert not missed
    swap_map.lock(0)
    swap_map.cache(0, 5)
    swap_map.cache(0, 0)
    swap_map.unlock(0, entry(ZSWAP, 9))
    assert (swap_map.cached(0), swap_map.cached(1)) == (0, folio - 1)


@clustered
def test_folios_of_the_swap_cache_leave_no_memory(design: str) -> None:
    swap_map = Map(design, slots=20_480)  # so that every slot is used again
    one, two = span(0, 20_480), span(100_000, 20_480)
    swap_map.run("alloc", one, entry(ZSWAP, 1))
    swap_map.run("dup", one, into=two)
    base = swap_map.metadata()
    swap_map.run("cache", one)
    cached = swap_map.metadata()
    assert (cached > base) == (design != "swap_table"), "there the word has room"
    for i in range(20_480):
        swap_map.lock(i)
        swap_map.unlock(i, entry(CACHE))
    assert swap_map.metadata() <= {"slot": cached, "swap_table": base, "redirect": base}[design] + IDLE
    for i in range(20_480):
        swap_map.lock(i)
        swap_map.unlock(i, entry(ZSWAP, 1))
    assert swap_map.metadata() <= cached + IDLE
    swap_map.run("uncache", one)
    assert swap_map.metadata() <= base + IDLE
    swap_map.run("put", one)
    swap_map.run("cache", two)
    swap_map.run("put", two)
    again = span(0, 20_480)
    swap_map.run("alloc", again, entry(ZSWAP, 1))
    assert not any(swap_map.cached(i) for i in range(0, 20_480, 7)), "no id inherits a folio"
