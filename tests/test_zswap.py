"""The zswap pool: contents, waste, what the kernel says is resident, moves, the clock, threads."""

import bisect
import ctypes
import random
import threading
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from userswap.backends.zswap import ZswapPool, class_for, size_classes

PAGE = 4096
SEGMENT = 2 << 20
SLACK = 65536
LARGEST = 69632

libc = ctypes.CDLL(None, use_errno=True)
libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]


def resident(pool: ZswapPool) -> int:
    """Bytes of the pool's mapping that the kernel has in RAM."""
    address, length = pool.mapping
    pages = ctypes.create_string_buffer(length // PAGE)
    assert libc.mincore(address, length, pages) == 0
    return sum(byte & 1 for byte in pages.raw) * PAGE


def books(pool: ZswapPool) -> None:
    pool.check()
    assert pool.bytes == resident(pool)


def waste(pool: ZswapPool) -> float:
    return (pool.bytes - pool.stored) / pool.stored


def sizes_folio(r: random.Random) -> int:
    return r.randint(8 << 10, 40 << 10)


def sizes_tiny(r: random.Random) -> int:
    return r.randint(64, 2000)


def sizes_mixed(r: random.Random) -> int:
    kind = r.random()
    if kind < 0.1:
        return r.randint(64, 2000)
    if kind < 0.2:
        return r.choice([LARGEST, 65568, 65536])
    return min(LARGEST, max(64, int(r.gauss(20000, 9000))))


def sizes_one(r: random.Random) -> int:
    return 13000


DISTRIBUTIONS = pytest.mark.parametrize(
    ("sizes", "volume"),
    [(sizes_folio, 48 << 20), (sizes_tiny, 24 << 20), (sizes_mixed, 48 << 20), (sizes_one, 16 << 20)],
    ids=["folio", "tiny", "mixed", "one"],
)
Sizes = Callable[[random.Random], int]


def filled(sizes: Sizes, volume: int, r: random.Random) -> tuple[ZswapPool, list[int]]:
    pool = ZswapPool(1 << 32, 60000)
    owners: list[int] = []
    while pool.stored < volume:
        owners.append(len(owners) + 1)
        pool.fill(owners[-1], sizes(r))
    return pool, owners


# ---- sizes ----


def test_every_length_gets_the_smallest_class_that_holds_it() -> None:
    classes = size_classes()
    assert classes == sorted(set(classes))
    assert classes[0] == 64
    assert classes[-1] == LARGEST
    for length in range(1, LARGEST + 1):
        assert class_for(length) == classes[bisect.bisect_left(classes, length)]


def test_rounding_up_wastes_less_than_a_sixtieth() -> None:
    assert all((class_for(length) - length) / length < 1 / 60 for length in range(1024, LARGEST))


@pytest.mark.parametrize("length", [0, LARGEST + 1])
def test_other_lengths_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match="1 to 69632"):
        ZswapPool(1 << 24, 1).store(1, bytes(length))


# ---- contents ----


def test_the_pages_that_an_object_grows_onto_are_counted() -> None:
    """One object of each class: nothing behind it has touched them."""
    grown = 0
    for length in range(33000, 57000, 512):
        pool = ZswapPool(8 << 20, 10)
        pool.store(1, b"x" * length)
        before = pool.bytes
        longer = length
        while class_for(longer + 1) == class_for(length):
            longer += 1
        assert pool.rewrite(1, b"y" * longer)
        books(pool)
        assert pool.bytes >= longer
        grown += pool.bytes > before
    assert grown


def test_an_object_is_rewritten_in_its_room_and_nowhere_else() -> None:
    r = random.Random(4)
    pool = ZswapPool(2 << 30, 1000)
    model = {owner: r.randbytes(r.randint(64, 40000)) for owner in range(1, 400)}
    for owner, content in model.items():
        pool.store(owner, content)
    rewritten = 0
    for owner in list(model)[::2] * 3:
        handle, length = pool.handle(owner), len(model[owner])
        content = r.randbytes(min(LARGEST, max(1, length + r.randint(-600, 600))))
        fits = class_for(len(content)) == class_for(length)
        assert pool.rewrite(owner, content) == fits
        if fits:
            model[owner] = content
            rewritten += 1
            assert pool.handle(owner) == handle
    assert 50 < rewritten < 590
    books(pool)
    assert pool.stored == sum(map(len, model.values()))
    for owner in list(model)[::3]:
        pool.discard(owner)
        del model[owner]
    pool.compact(0)
    books(pool)
    assert all(pool.load(owner) == content for owner, content in model.items())


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_a_pool_is_a_dictionary(data: st.DataObject) -> None:
    owners = 24
    pool = ZswapPool(256 << 20, owners)
    model: dict[int, bytes] = {}
    lengths = st.one_of(st.integers(1, 300), st.integers(2000, 9000), st.integers(60000, LARGEST))
    for turn in range(data.draw(st.integers(1, 60))):
        owner = data.draw(st.integers(1, owners))
        action = data.draw(st.sampled_from(["store", "store", "discard", "compact", "coldest"]))
        if action == "store":
            model[owner] = random.Random(turn).randbytes(data.draw(lengths))
            assert 0 < pool.store(owner, model[owner]) < 1 << 44
        elif action == "discard":
            pool.discard(owner)
            model.pop(owner, None)
        elif action == "compact":
            pool.compact(0)
        else:
            for handle, cold in pool.coldest(3):
                assert handle == pool.handle(cold)
                pool.release(cold)
        assert pool.stored == sum(map(len, model.values()))
        assert pool.objects == len(model)
    books(pool)
    assert {owner: pool.load(owner) for owner in model} == model


@DISTRIBUTIONS
def test_churn_keeps_every_byte_and_little_waste(sizes: Sizes, volume: int) -> None:
    r = random.Random(1)
    pool, owners = filled(sizes, volume, r)
    for turn in range(len(owners)):
        owner = r.choice(owners)
        pool.fill(owner, sizes(r), turn)
        if turn % 500 == 0:
            pool.compact(10, 4 << 20)
    books(pool)
    pool.compact(5)
    books(pool)
    assert waste(pool) <= 0.06
    assert pool.intact() == len(owners)


@DISTRIBUTIONS
def test_freeing_most_objects_at_random_leaves_little_waste(sizes: Sizes, volume: int) -> None:
    r = random.Random(2)
    pool, owners = filled(sizes, volume, r)
    kept = [owner for owner in owners if r.random() > 0.7]
    for owner in set(owners) - set(kept):
        pool.discard(owner)
    before = pool.bytes
    assert waste(pool) > 1
    given_back = pool.compact(5)
    assert given_back == before - pool.bytes
    books(pool)
    # A size class costs some 8 KiB, however little it holds: 1 MiB for 124 classes of tiny objects.
    limits: dict[Sizes, float] = {sizes_tiny: 0.15, sizes_mixed: 0.10}
    assert waste(pool) <= limits.get(sizes, 0.06)
    assert pool.intact() == len(kept)


def test_sizes_that_shift_over_time_leave_little_waste() -> None:
    r = random.Random(3)
    pool = ZswapPool(1 << 32, 3000)
    for turn in range(12000):
        middle = 8000 + 32000 * turn // 12000
        pool.fill(r.randint(1, 3000), r.randint(middle - 4000, middle + 4000), turn)
        if turn % 100 == 0:
            pool.compact(10, 1 << 20)
    assert waste(pool) <= 0.15
    pool.compact(10)
    books(pool)
    assert waste(pool) <= 0.11
    assert pool.intact() == pool.objects


@DISTRIBUTIONS
def test_a_pool_shrinks_to_nothing(sizes: Sizes, volume: int) -> None:
    pool, owners = filled(sizes, volume // 4, random.Random(4))
    for owner in owners:
        pool.discard(owner)
    assert pool.bytes <= SEGMENT  # the one spare segment
    books(pool)
    pool.compact(10)
    books(pool)
    assert pool.bytes <= SLACK
    assert (pool.stored, pool.objects) == (0, 0)
    for owner in owners:  # and it can be used again
        pool.fill(owner, 30000)
    books(pool)
    assert pool.intact() == len(owners)


def test_untouched_pages_cost_nothing() -> None:
    pool = ZswapPool(1 << 34, 2)
    assert resident(pool) == pool.bytes == 0
    pool.store(1, b"x" * 100)
    assert pool.bytes == resident(pool) <= 6 * PAGE
    pool.store(2, b"y" * 60000)
    assert pool.bytes == resident(pool) <= 23 * PAGE


def test_metadata_covers_what_is_touched() -> None:
    pool = ZswapPool(1 << 36, 4000)
    empty = pool.metadata
    for owner in range(1, 4001):
        pool.fill(owner, LARGEST)
    assert empty <= pool.metadata <= pool.bytes // 1000
    assert empty <= 64 << 10


def test_holes_are_used_again_before_new_pages() -> None:
    pool = ZswapPool(1 << 30, 1000)
    for owner in range(1, 1001):
        pool.fill(owner, 20000)
    full = pool.bytes
    for owner in range(1, 1001, 2):
        pool.discard(owner)
    for owner in range(1, 1001, 2):
        pool.fill(owner, 20000)
    assert pool.bytes == full
    books(pool)


def test_without_address_space_an_object_is_refused_and_nothing_else() -> None:
    pool = ZswapPool(4 << 20, 400)
    stored = 0
    with pytest.raises(MemoryError):
        for owner in range(1, 400):
            pool.fill(owner, 30000)
            stored += 1
    assert stored == pool.objects == pool.intact() >= 2 * 65
    pool.discard(1)
    pool.fill(1, 30000)
    books(pool)


# ---- compaction ----


def test_compaction_stays_near_its_effort() -> None:
    r = random.Random(5)
    pool, owners = filled(sizes_folio, 32 << 20, r)
    for owner in owners:
        if r.random() < 0.5:
            pool.discard(owner)
    calls = 0
    while given_back := pool.compact(5, 512 << 10):
        assert given_back <= 6 << 20  # what was begun with a segment is finished
        calls += 1
        books(pool)
    assert calls >= 4
    assert waste(pool) <= 0.08


def test_compaction_is_not_begun_below_the_goal() -> None:
    pool, owners = filled(sizes_one, 4 << 20, random.Random(6))
    pool.discard(owners[5])
    before = pool.bytes
    assert pool.compact(10) == 0
    assert pool.bytes == before


def test_compaction_with_nothing_to_gain_moves_nothing() -> None:
    r = random.Random(7)
    pool, _ = filled(sizes_folio, 4 << 20, r)
    pool.compact(0)  # more waste than allowed, and nothing that could be done about it
    before = pool.bytes
    assert not any(pool.compact(0) for _ in range(10000))
    assert pool.bytes == before


def test_objects_of_locked_owners_and_of_nobody_do_not_move() -> None:
    pool = ZswapPool(1 << 30, 300)
    for owner in range(1, 301):
        pool.fill(owner, 9000)
    nobody = pool.handle(299)
    pool.set_owner(nobody, 0)
    for owner in range(1, 300):
        if owner % 10 != 9:
            pool.discard(owner)
    held = list(range(9, 299, 10))
    handles = {owner: pool.handle(owner) for owner in held}
    for owner in held:
        pool.hold(owner)
    pool.compact(0)
    assert {owner: pool.handle(owner) for owner in held} == handles
    for owner in held:
        pool.release(owner)
    pool.compact(0)  # with no allocation in between: a look that was blocked is repeated
    assert {owner: pool.handle(owner) for owner in held} != handles
    assert pool.handle(299) == nobody
    assert pool.intact() == len(held) + 2
    pool.set_owner(nobody, 299)
    books(pool)


# ---- the clock ----


def test_the_coldest_come_in_order_and_once() -> None:
    pool = ZswapPool(1 << 30, 500)
    for owner in range(1, 501):
        pool.fill(owner, 20000)
    taken = []
    while cold := pool.coldest(16):
        taken += [owner for _, owner in cold]
    assert taken == list(range(1, 501))  # all are locked now
    for owner in taken:
        pool.release(owner)


def test_what_was_used_gets_a_second_chance() -> None:
    pool = ZswapPool(1 << 30, 200)
    for owner in range(1, 201):
        pool.fill(owner, 30000)
    for _, owner in pool.coldest(1):
        pool.release(owner)
    used = set(range(50, 150, 3))
    for owner in used:
        pool.load(owner)
    cold = [owner for _, owner in pool.coldest(199 - len(used))]
    assert len(cold) == 199 - len(used)
    assert not used & set(cold)
    for owner in cold:
        pool.release(owner)


def test_coldest_keeps_to_its_bytes_and_skips_what_is_locked_or_nobodys() -> None:
    pool = ZswapPool(1 << 30, 60)
    for owner in range(1, 61):
        pool.fill(owner, 9000)  # 12 KiB, rounded
    pool.set_owner(pool.handle(2), 0)
    pool.hold(3)
    cold = [owner for _, owner in pool.coldest(50, 5 * 12288 + 4000)]
    assert cold == [1, 4, 5, 6, 7]
    assert [owner for _, owner in pool.coldest(1)] == [8]  # what did not fit was not passed by
    assert pool.coldest(50, 12287) == []
    for owner in [*cold, 3, 8]:
        pool.release(owner)
    books(pool)


def test_young_and_old_survive_a_move() -> None:
    pool = ZswapPool(1 << 30, 300)
    for owner in range(1, 301):
        pool.fill(owner, 12000)
    cold = [owner for _, owner in pool.coldest(1)]
    pool.release(cold[0])
    for owner in range(1, 301):
        if owner % 5:
            pool.discard(owner)
    young = [owner for owner in range(5, 301, 5) if owner % 2]
    for owner in young:
        pool.load(owner)
    before = {owner: pool.handle(owner) for owner in range(5, 301, 5)}
    pool.compact(0)
    assert sum(before[owner] != pool.handle(owner) for owner in before) > 20
    cold = [owner for _, owner in pool.coldest(30)]
    assert sorted(cold) == [owner for owner in range(5, 301, 5) if owner % 2 == 0]
    for owner in cold:
        pool.release(owner)


# ---- cold from the start ----


def cold_ones(pool: ZswapPool, n: int) -> list[int]:
    """Owners of the coldest objects, unlocked again."""
    owners = [owner for _, owner in pool.coldest(n)]
    for owner in owners:
        pool.release(owner)
    return owners


def test_what_stays_is_never_among_the_coldest() -> None:
    pool = ZswapPool(1 << 30, 400)
    for owner in range(1, 401):
        pool.fill(owner, 20000)
    for owner in range(1, 301):
        pool.stay(owner)
    pool.check()
    pool.cool(301)
    for owner in (*range(1, 100, 3), 310):
        pool.discard(owner)
    assert pool.compact(0) > 0
    pool.check()
    taken = []
    while cold := pool.coldest(16):
        taken += [owner for _, owner in cold]
    assert taken[0] == 301
    assert sorted(taken) == [*range(301, 310), *range(311, 401)]
    for owner in taken:
        pool.release(owner)
    for owner in range(1, 401):
        pool.discard(owner)
    pool.check()


def test_what_is_cold_comes_first_and_the_clock_stays() -> None:
    pool = ZswapPool(1 << 30, 100)
    for owner in range(1, 101):
        pool.fill(owner, 20000)
    assert cold_ones(pool, 3) == [1, 2, 3]
    for owner in (70, 20, 90):
        pool.cool(owner)
    assert cold_ones(pool, 10) == [70, 20, 90]
    assert cold_ones(pool, 3) == [4, 5, 6]
    pool.cool(50)
    pool.cool(60)
    assert cold_ones(pool, 1) == [50]
    assert cold_ones(pool, 1) == [60]
    books(pool)


def test_cold_ones_keep_to_the_bytes() -> None:
    pool = ZswapPool(1 << 30, 60)
    for owner in range(1, 61):
        pool.fill(owner, 9000)  # 12 KiB, rounded
        if owner > 50:
            pool.cool(owner)
    first = [owner for _, owner in pool.coldest(50, 5 * 12288 + 4000)]
    assert first == [51, 52, 53, 54, 55]
    assert cold_ones(pool, 50) == [56, 57, 58, 59, 60]
    for owner in first:
        pool.release(owner)


def test_what_was_asked_for_freed_or_stored_anew_is_cold_no_more() -> None:
    pool = ZswapPool(1 << 30, 200)
    for owner in range(1, 101):
        pool.fill(owner, 20000)
    assert cold_ones(pool, 1) == [1]  # nothing is young now
    for owner in (10, 20, 30, 40, 50):
        pool.cool(owner)
    pool.load(10)
    place = pool.handle(20)
    pool.discard(20)
    pool.fill(120, 20000)
    assert pool.handle(120) == place
    pool.fill(30, 20000)
    pool.fill(40, 500)
    assert cold_ones(pool, 100)[0] == 50
    assert pool.cold == 0
    first = cold_ones(pool, 60)
    assert first[:4] == [2, 3, 4, 5]
    assert not {10, 30, 40, 120} & set(first)


def test_cold_ones_of_a_segment_that_is_gone() -> None:
    pool = ZswapPool(1 << 30, 300)
    for owner in range(1, 301):
        pool.fill(owner, 20000)
        pool.cool(owner)
    for owner in range(1, 301):
        pool.discard(owner)
    pool.compact(0)
    before = pool.bytes
    for owner in (7, 8):
        pool.fill(owner, 100)
    books(pool)
    assert set(cold_ones(pool, 10)) == {7, 8}  # by the clock, which finds nothing else
    assert pool.cold == 0
    assert pool.bytes <= before + 3 * PAGE
    books(pool)


def test_who_is_locked_stays_cold() -> None:
    pool = ZswapPool(1 << 30, 20)
    for owner in range(1, 21):
        pool.fill(owner, 20000)
    pool.cool(5)
    pool.cool(6)
    pool.hold(5)
    assert cold_ones(pool, 5) == [6]
    pool.release(5)
    assert cold_ones(pool, 5) == [5]


def test_cold_survives_a_move() -> None:
    pool = ZswapPool(1 << 30, 300)
    for owner in range(1, 301):
        pool.fill(owner, 12000)
    for owner in range(1, 301):
        if owner % 5:
            pool.discard(owner)
    cold = list(range(150, 301, 5))
    for owner in cold:
        pool.cool(owner)
    before = {owner: pool.handle(owner) for owner in cold}
    pool.compact(0)
    assert sum(before[owner] != pool.handle(owner) for owner in cold) > 20
    assert cold_ones(pool, 100) == cold
    books(pool)


def test_more_cold_ones_than_are_remembered() -> None:
    pool = ZswapPool(1 << 30, 600)
    for owner in range(1, 601):
        pool.fill(owner, 3000)
        pool.cool(owner)
    remembered = pool.cold
    assert 0 < remembered < 600
    taken = [owner for _, owner in pool.coldest(250)]
    assert taken == list(range(601 - remembered, 601))[:250]
    while more := [owner for _, owner in pool.coldest(250)]:
        taken += more
    assert sorted(taken) == list(range(1, 601))
    for owner in taken:
        pool.release(owner)
    books(pool)


# ---- threads ----


@pytest.mark.parametrize(("low", "high", "owners"), [(64, 2000, 4000), (8 << 10, 40 << 10, 1500), (16, LARGEST, 700)])
@pytest.mark.parametrize("threads", [2, 4])
def test_threads_together(low: int, high: int, owners: int, threads: int) -> None:
    pool = ZswapPool(1 << 32, owners)
    errors: list[int] = []

    def work(seed: int) -> None:
        for part in range(6):  # crowded and empty by turns, so that segments come and go
            live = owners // 20 if part % 2 else owners * 3 // 4
            errors.append(pool.stress(seed * 100 + part, 24000 // threads, low, high, live))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert errors == [0] * 6 * threads
    assert pool.intact() == pool.objects
    pool.check()
    assert pool.bytes == resident(pool)
    pool.compact(5)
    books(pool)
    assert pool.intact() == pool.objects
    assert pool.bytes - pool.stored <= pool.stored * 0.10 + 2 * SEGMENT
    for owner in range(1, owners + 1):
        pool.discard(owner)
    pool.compact(5)
    books(pool)
    assert pool.objects == 0
    assert pool.bytes <= SLACK


def test_compactions_against_readers() -> None:
    """One thread loads objects without pause while others move them."""
    pool = ZswapPool(1 << 30, 1200)
    r = random.Random(8)
    contents = {owner: r.randbytes(r.randint(2000, 9000)) for owner in range(1, 1201)}
    for owner, content in contents.items():
        pool.store(owner, content)
    stop = threading.Event()
    wrong: list[int] = []

    def read() -> None:
        mine = random.Random(9)
        while not stop.is_set():
            owner = mine.choice(kept)
            if pool.load(owner) != contents[owner]:
                wrong.append(owner)

    kept = [owner for owner in contents if owner % 3 == 0]
    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for owner in contents:
        if owner % 3:
            pool.discard(owner)
        pool.compact(0, 20000)
    while pool.compact(0, 20000):
        pass
    stop.set()
    for reader in readers:
        reader.join()
    assert not wrong
    books(pool)
