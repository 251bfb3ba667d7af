"""Snapshots: arrays that share what is swapped out, and go their own ways from there."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

import userswap
from helpers import FOLIO, check_empty, check_pool, data, fresh_pool, run_python


def test_a_snapshot_keeps_what_was_there_and_both_diverge() -> None:
    pool = fresh_pool()
    x = pool.array(data("walk", 40 * FOLIO + 5000, 1))
    plain = x.copy()
    s = pool.snapshot(x)
    assert s.shape == x.shape and s.dtype == x.dtype and pool.owns(s)
    check_pool(pool)
    x[::777] ^= 255
    assert np.array_equal(s, plain)
    s[5::999] ^= 255
    expected = plain.copy()
    expected[::777] ^= 255
    assert np.array_equal(x, expected)
    expected = plain.copy()
    expected[5::999] ^= 255
    assert np.array_equal(s, expected)
    check_pool(pool)
    del x
    assert np.array_equal(s, expected)
    del s
    check_empty(pool)


@pytest.mark.parametrize(
    "where", ["in place, dirty", "in place, clean", "swapped", "in the swap file", "untouched", "mixed"]
)
@pytest.mark.parametrize("kind", ["walk", "noise", "same"])
def test_a_snapshot_of_folios_in_every_state(where: str, kind: str) -> None:
    pool = fresh_pool()
    n = 24 * FOLIO + 4096
    x = pool.zeros(n, np.uint8)
    if where != "untouched":
        x[:] = data(kind, n, 3)
    plain = x.copy() if where != "untouched" else np.zeros(n, np.uint8)
    if where in ("in place, clean", "swapped", "in the swap file"):
        pool.evict()
    if where == "in place, clean":
        assert x.sum() == plain.sum(dtype=x.sum().dtype)
    if where == "in the swap file" and kind == "walk":
        assert pool.writeback() > 0
    if where == "mixed":
        pool.evict()
        x[: 4 * FOLIO] ^= 1
        plain[: 4 * FOLIO] ^= 1
        x[6 * FOLIO : 9 * FOLIO].sum()
    snapshots = [pool.snapshot(x) for _ in range(4)]
    check_pool(pool)
    x[::FOLIO] ^= 7
    for i, s in enumerate(snapshots):
        s[FOLIO * i : FOLIO * i + 10] ^= 9
    pool.evict()
    for i, s in enumerate(snapshots):
        expected = plain.copy()
        expected[FOLIO * i : FOLIO * i + 10] ^= 9
        assert np.array_equal(s, expected)
    plain[::FOLIO] ^= 7
    assert np.array_equal(x, plain)
    check_pool(pool)
    del snapshots, s, x
    check_empty(pool)


def test_a_hundred_snapshots_of_twice_the_budget() -> None:
    """The whole of it: 100 snapshots of a 256 MiB array in a 128 MiB budget, each diverging."""
    pool = fresh_pool("128MiB")
    rng = np.random.default_rng(1)
    n = (256 << 20) // 8
    x = pool.empty(n)
    for at in range(0, n, n // 8):
        x[at : at + n // 8] = np.round(np.cumsum(rng.standard_normal(n // 8)), 2)
    step = FOLIO // 8 * 3 + 11
    before = x[::step].copy()
    snapshots = []
    for i in range(100):
        s = pool.snapshot(x)
        x[i * step] = -i - 0.5
        s[n - 1 - i * step] = i + 0.25
        snapshots.append(s)
    stats = check_pool(pool)
    assert stats.virtual_bytes >= 101 * (256 << 20)
    assert stats.peak_bytes <= stats.budget_bytes
    assert stats.swap_ids < 4096 + 3 * 100 + 4096, "what none of them wrote to is stored once"
    for i in (0, 1, 50, 98, 99):
        seen = snapshots[i][::step].copy()
        expected = before.copy()
        expected[:i] = -np.arange(i) - 0.5
        own = (n - 1 - i * step) / step
        if own == int(own):
            expected[int(own)] = i + 0.25
        assert np.array_equal(seen, expected)
        assert snapshots[i][n - 1 - i * step] == i + 0.25
    whole = [float(s[: n // 4].sum()) for s in snapshots[-2:]]
    assert whole[1] == pytest.approx(whole[0] + (-98 - 0.5) - before[98])
    check_pool(pool)
    del snapshots[::2]
    gc.collect()
    check_pool(pool)
    assert snapshots[0][n - 1 - step] == 1.25
    del snapshots, s, x
    gc.collect()
    check_empty(pool)


def test_a_second_snapshot_costs_no_compression() -> None:
    pool = fresh_pool()
    x = pool.array(data("walk", 60 * FOLIO, 1))
    first = pool.snapshot(x)
    outs = pool.stats().swap_outs
    assert outs >= 60
    resident = pool.stats().resident_bytes
    second = pool.snapshot(x)
    assert pool.stats().swap_outs == outs, "what is clean has its copy already"
    assert pool.stats().resident_bytes == resident, "and x stays where it is"
    assert np.array_equal(first, second)
    del first, second, x
    check_empty(pool)


def test_snapshots_of_views_and_other_layouts() -> None:
    pool = fresh_pool()
    x = pool.array(np.arange(300 * 1000, dtype=np.float64).reshape(300, 1000))
    fortran = pool.empty((300, 1000), np.float64, order="F")
    fortran[:] = x
    record = pool.zeros(5000, dtype=[("a", "i4"), ("b", "f8", (3,))])
    record["b"][17] = 3.5
    for array in (x, x[3:200:2, ::-7], x.T, fortran, fortran[::-1], record, record["b"]):
        s = pool.snapshot(array)
        assert s.shape == array.shape and s.dtype == array.dtype and s.strides == array.strides
        assert np.array_equal(s, array)
        s[...] = np.zeros(1, s.dtype)[0]
        assert array.tobytes().count(0) < array.nbytes


def test_a_snapshot_of_a_snapshot_and_shared_folios_come_from_each_other() -> None:
    pool = fresh_pool("64MiB")
    x = pool.array(data("walk", 50 * FOLIO, 1))
    plain = x.copy()
    chain = [x]
    for i in range(20):
        chain.append(pool.snapshot(chain[-1]))
        chain[-1][i] ^= 1
        plain_i = plain.copy()
        plain_i[: i + 1] ^= 1
        assert np.array_equal(chain[-1], plain_i)
    pool.evict()
    hits = pool.stats().cache_hits
    for array in chain[5:10]:
        assert array[FOLIO:].sum() == plain[FOLIO:].sum()
    assert pool.stats().cache_hits > hits + 100, "who comes second copies it from who has it in place"
    check_pool(pool)
    pool.evict()
    assert check_pool(pool).resident_bytes == 0
    for array in chain[10:]:
        assert np.array_equal(array[FOLIO:], plain[FOLIO:])
    del chain, array, x
    check_empty(pool)


def test_what_cannot_be_snapshot_is_refused() -> None:
    pool, other = fresh_pool(), fresh_pool()
    x = pool.zeros(100_000)
    for array in (np.zeros(100_000), other.zeros(100_000), pool.zeros(8)):
        with pytest.raises(ValueError, match="does not live in this pool"):
            pool.snapshot(array)
    with pytest.raises(ValueError, match="Python objects"):
        pool.snapshot(pool.empty(5000, object))
    with pytest.raises(ValueError, match="installed"):
        userswap.snapshot(x)
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        pool.snapshot(x)


def test_userswap_snapshot_is_the_installed_pool_s() -> None:
    with userswap.install(ram="16MiB") as installed:
        x = np.arange(1 << 20)
        s = userswap.snapshot(x)
        assert installed.pool.owns(s)
        x[0] = 5
        assert s[0] == 0 and np.array_equal(s[1:], x[1:])


def test_snapshots_while_threads_write_read_and_reclaim() -> None:
    """Every folio of a snapshot is one that the array had: each is stamped as a whole, under a lock of its own."""
    pool = fresh_pool()
    folios, rounds = 500, 12
    x = pool.zeros((folios, FOLIO // 8), np.int64)
    x[:] = np.arange(folios)[:, None] << 32
    stop = threading.Event()
    locks = [threading.Lock() for _ in range(folios)]
    failed: list[str] = []

    def write(seed: int) -> None:
        rng = np.random.default_rng(seed)
        turn = 0
        while not stop.is_set():
            turn += 1
            i = int(rng.integers(folios))
            with locks[i]:
                x[i] = (i << 32) + turn * 2 + seed

    def press() -> None:
        while not stop.is_set():
            pool.evict("1MiB")
            pool.writeback("256KiB") if seed_of_press[0] % 3 == 0 else pool._core.compact()
            seed_of_press[0] += 1

    seed_of_press = [0]
    threads = [threading.Thread(target=write, args=(s,)) for s in (0, 1)] + [threading.Thread(target=press)]
    for thread in threads:
        thread.start()
    try:
        kept = []
        for turn in range(rounds):
            with_locks = turn % 2 == 0
            if with_locks:
                for lock in locks:
                    lock.acquire()
            s = pool.snapshot(x)
            if with_locks:
                if not np.array_equal(s, x):
                    failed.append("a snapshot differs from an array that nobody wrote to")
                for lock in locks:
                    lock.release()
            kept.append((s, s[:, 0].copy() if with_locks else None))
            if (s[:, 0] >> 32 != np.arange(folios)).any():
                failed.append("a snapshot has another folio's data")
            if len(kept) > 4:
                kept.pop(turn % 3)
        for s, first in kept:
            if first is not None and not (s == first[:, None]).all():
                failed.append("a snapshot changed")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not failed
    check_pool(pool)
    del kept, s
    x = np.empty(0, np.int64)
    check_empty(pool)


def test_forks_with_snapshots() -> None:
    code = """if True:
        import os
        import numpy as np
        import userswap
        from helpers import fresh_pool
        pool = fresh_pool()
        n = 300 * 8192
        x = pool.array(np.round(np.cumsum(np.random.default_rng(1).standard_normal(n)), 2))
        plain = x.copy()
        s = [pool.snapshot(x) for _ in range(3)]
        s[1][::9000] = 1
        one = plain.copy(); one[::9000] = 1
        for turn in range(3):
            child = os.fork()
            if child == 0:
                t = pool.snapshot(s[1])
                s[0][:] = turn
                ok = (np.array_equal(x, plain) and np.array_equal(t, one) and (s[0] == turn).all()
                      and pool._core.check()["wrong"] == 0)
                del t, s
                ok = ok and np.array_equal(x, plain) and pool._core.check()["wrong"] == 0
                os._exit(0 if ok else 1)
            s[2][turn] = turn
            _, status = os.waitpid(child, 0)
            assert status == 0, turn
            assert np.array_equal(s[0], plain) and np.array_equal(s[1], one) and s[2][turn] == turn
        assert pool._core.check()["wrong"] == 0
        print("right")
    """
    done = run_python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "right"


def test_a_snapshot_of_a_folio_that_a_system_call_writes_to(tmp_path: object) -> None:
    """Pinned folios can't be protected: they are copied, and the call goes on."""
    import os

    pool = fresh_pool()
    x = pool.zeros(20 * FOLIO, np.uint8)
    x[:] = 1
    receiving, sending = os.pipe()
    taken: list[int] = []

    def read() -> None:
        with os.fdopen(receiving, "rb", buffering=0) as file:
            taken.append(file.readinto(x.data) or 0)

    thread = threading.Thread(target=read)
    thread.start()
    threading.Event().wait(0.1)  # the read waits in the kernel, its buffer pinned
    s = pool.snapshot(x)
    assert (s == 1).all()
    os.write(sending, b"\x05" * 3000)
    os.close(sending)
    thread.join()
    assert taken == [3000]
    assert (x[:3000] == 5).all() and (x[3000:] == 1).all()
    assert (s == 1).all()
    check_pool(pool)


def test_snapshots_by_threads_and_faults_did_not_wait_for_each_other_s_workers() -> None:
    """A snapshot that waited for a locked folio with a worker in its hand, whose owner waited for that worker."""
    code = """if True:
        import threading, time
        import numpy as np
        import userswap.pool
        from helpers import check_pool, fresh_pool
        userswap.pool.MOST_WORKERS = 1
        pool = fresh_pool()
        x = pool.zeros((60, 8192), np.int64)
        x[:] = np.arange(60)[:, None] * 1000 + np.arange(8192) % 7
        end = time.monotonic() + 1
        wrong = []

        def shoot():
            while time.monotonic() < end:
                wrong.extend(np.flatnonzero(pool.snapshot(x)[:, 7] != np.arange(60) * 1000))

        def touch():
            while time.monotonic() < end:
                pool.evict()
                x.sum()

        threads = [threading.Thread(target=work) for work in (shoot, touch, shoot, touch)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        check_pool(pool)
    """
    done = run_python(code, timeout=30)
    assert done.returncode == 0, done.stderr


def test_a_folio_that_could_not_be_stored_was_copied_while_threads_wrote_to_it() -> None:
    """Nothing is half in a snapshot: it has each folio as it was at one moment, also where there is no room for it."""
    pool = userswap.Pool(ram="16MiB", swap="none")
    folios = 40
    x = pool.array(np.random.default_rng(1).integers(0, 1 << 62, (folios, FOLIO // 8)))
    x[:, 0] = x[:, -1] = 0
    stop = threading.Event()

    def write() -> None:
        turn = 0
        while not stop.is_set():
            turn += 1
            for i in range(folios):
                x[i, 0] = turn
                x[i, -1] = turn

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(60):
            s = pool.snapshot(x)
            first, last = s[:, 0], s[:, -1]
            assert ((first == last) | (first == last + 1)).all(), "what was written first is there first"
    finally:
        stop.set()
        thread.join()
