"""The swap map's rules, for every design: against a model, at scale, and with threads that meet in it."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from userswap.swap.map import DEBUG, DESIGN_NAMES, SAME, SLOT, ZSWAP, Map, entry

Ids = npt.NDArray[np.uint64]
ALMOST_NOTHING = 32 << 10  # what an empty map may keep
PATIENCE = 60.0
LESS = 20 if DEBUG else 1  # the debug build sleeps at transitions: few rounds meet as often as many

designs = pytest.mark.parametrize("design", DESIGN_NAMES)


def fill(swap_map: Map, n: int, word: int | None = None) -> Ids:
    ids = np.empty(n, np.uint64)
    swap_map.run("alloc", ids, entry(ZSWAP, 7) if word is None else word)
    return ids


def drop(swap_map: Map, swap_id: int) -> int:
    """Put the last reference and free the id; the entry that it had."""
    left, word = swap_map.put(swap_id)
    assert left == 0
    swap_map.free(swap_id)
    return word


def together(*work: Callable[[], Any]) -> list[Any]:
    """Run each in a thread of its own, all starting at once. A thread that hangs fails the test."""
    results: list[Any] = [None] * len(work)
    start = threading.Barrier(len(work))

    def run(i: int) -> None:
        start.wait()
        results[i] = work[i]()

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread waits for a lock that nobody will give it"
    return results


def alone(program: str) -> None:
    """Run a program about memory in a process of its own, without injected delays."""
    environment = os.environ | {"USERSWAP_CHAOS": "0"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    subprocess.run(command, check=True, timeout=PATIENCE, env=environment)


# ---- against a model ----

words = st.builds(entry, st.sampled_from([SAME, ZSWAP, SLOT]), st.integers(0, 2**56 - 1))


class Model(RuleBasedStateMachine):
    """A dict of id to [entry, count, locked] says what the map must say."""

    design = "sparse"
    live = Bundle("live")

    def __init__(self) -> None:
        super().__init__()
        self.map = Map(self.design)
        self.model: dict[int, list[Any]] = {}
        self.most = 0

    @rule(target=live, word=words)
    def alloc(self, word: int) -> int:
        swap_id = self.map.alloc(word)
        assert swap_id > 0
        assert swap_id not in self.model
        self.model[swap_id] = [word, 1, False]
        self.most = max(self.most, len(self.model))
        assert swap_id >> 9 <= self.most >> 9, "ids are dense: the lowest leaf first"
        return swap_id

    @rule(swap_id=live)
    def lock(self, swap_id: int) -> None:
        if swap_id in self.model and not self.model[swap_id][2]:
            assert self.map.lock(swap_id) == self.model[swap_id][0]
            self.model[swap_id][2] = True

    @rule(swap_id=live)
    def trylock(self, swap_id: int) -> None:
        if swap_id in self.model:
            word, _, locked = self.model[swap_id]
            assert self.map.trylock(swap_id) == (None if locked else word)
            self.model[swap_id][2] = True

    @rule(swap_id=live, word=words)
    def unlock(self, swap_id: int, word: int) -> None:
        if swap_id in self.model and self.model[swap_id][2]:
            self.map.unlock(swap_id, word)
            self.model[swap_id][::2] = [word, False]

    @rule(swap_id=live)
    def dup(self, swap_id: int) -> None:
        if swap_id in self.model:
            self.map.dup(swap_id)
            self.model[swap_id][1] += 1

    @rule(swap_id=live, n=st.sampled_from([0, 1, 254, 255, 65535, 2**32, 2**40, 2**61, -1, -255, -(2**32)]))
    def add(self, swap_id: int, n: int) -> None:
        if swap_id in self.model:
            count = self.model[swap_id][1]
            if 1 <= count + n <= 2**62:
                self.map.add(swap_id, n)
                self.model[swap_id][1] += n
            else:
                with pytest.raises(OverflowError):
                    self.map.add(swap_id, n)

    @rule(swap_id=live)
    def put(self, swap_id: int) -> None:
        if swap_id not in self.model:
            return
        word, count, locked = self.model[swap_id]
        if count > 1:
            assert self.map.put(swap_id) == (count - 1, 0)  # also while somebody has it locked
            self.model[swap_id][1] -= 1
        elif not locked:
            self.last_put(swap_id, word)

    @rule(swap_id=consumes(live))
    def drop(self, swap_id: int) -> None:
        if swap_id in self.model:
            word, count, locked = self.model[swap_id]
            if locked:
                self.map.unlock(swap_id, word)
            self.map.add(swap_id, 1 - count)
            self.last_put(swap_id, word)

    def last_put(self, swap_id: int, word: int) -> None:
        assert self.map.put(swap_id) == (0, word)
        assert self.map.count(swap_id) == 0
        assert self.map.trylock(swap_id) is None
        self.map.free(swap_id)
        del self.model[swap_id]

    @precondition(lambda self: self.model)
    @rule(n=st.integers(1, 1500))
    def burst(self, n: int) -> None:
        ids = fill(self.map, n)
        self.most = max(self.most, len(self.model) + n)
        assert not set(ids.tolist()) & set(self.model)
        self.map.run("dup", ids)
        self.map.run("put", ids)
        self.map.run("drop", ids)

    @invariant()
    def agree(self) -> None:
        assert self.map.ids() == len(self.model)
        for swap_id, (_, count, _) in self.model.items():
            assert self.map.count(swap_id) == count

    def teardown(self) -> None:
        for swap_id, (word, count, locked) in list(self.model.items()):
            if locked:
                self.map.unlock(swap_id, word)
            self.map.add(swap_id, 1 - count)
            self.last_put(swap_id, word)
        assert self.map.ids() == 0
        assert self.map.metadata() <= ALMOST_NOTHING


@designs
def test_a_map_does_what_a_dict_does(design: str) -> None:
    class Designed(Model):
        pass

    Designed.design = design
    case = Designed.TestCase
    case.settings = settings(
        max_examples=60, stateful_step_count=60, deadline=None, suppress_health_check=list(HealthCheck)
    )
    case("runTest").debug()


# ---- ids and memory ----


@designs
@pytest.mark.parametrize("n", [1, 511, 512, 513, 264_000, *([] if DEBUG else [262_143, 262_144])])
def test_ids_are_dense_at_every_height_and_all_memory_comes_back(design: str, n: int) -> None:
    swap_map = Map(design)
    ids = fill(swap_map, n)
    assert np.array_equal(np.sort(ids), np.arange(1, n + 1, dtype=np.uint64)), "each once, never 0"
    swap_map.run("dup", ids)
    assert swap_map.count(int(ids[-1])) == 2
    swap_map.run("drop", ids)
    assert swap_map.ids() == n
    swap_map.run("drop", ids[::-1].copy())
    assert swap_map.ids() == 0
    assert swap_map.metadata() <= ALMOST_NOTHING


def test_bytes_an_id_costs() -> None:
    n = 1_000_000 // LESS
    swap_map = Map("sparse")
    ids = fill(swap_map, n)
    unshared = swap_map.metadata()
    assert unshared / n <= 8.25 + (LESS > 1)
    swap_map.run("dup", ids)
    assert swap_map.metadata() / n <= 16.5 + (LESS > 1), "a shared id has a count word"
    swap_map.run("put", ids)
    assert swap_map.metadata() <= unshared + ALMOST_NOTHING, "and when it is not shared any more it has none"
    swap_map.run("drop", ids)
    assert swap_map.metadata() <= ALMOST_NOTHING


@designs
def test_metadata_is_memory_that_the_process_has(design: str) -> None:
    program = f"""
        import numpy as np
        from userswap.swap.map import Map, ZSWAP, entry
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096
        ids = np.ones(600_000, np.uint64)
        every = np.arange(1, len(ids) + 1, dtype=np.uint64)
        keep, rest = every[every % 1536 < 512], every[every % 1536 >= 512]
        m = Map({design!r})
        before = resident()
        m.run("alloc", ids, entry(ZSWAP, 1)); m.run("dup", ids)
        grown = resident() - before
        assert abs(grown - m.metadata()) < 0.01 * grown, (grown, m.metadata())
        m.run("drop", ids); m.run("drop", rest)
        assert abs(resident() - before - m.metadata()) < 0.02 * grown, (resident() - before, m.metadata())
        assert m.metadata() < 0.4 * 8.25 * len(ids)
        m.run("drop", keep)
        assert resident() - before < 1 << 19
    """
    alone(program)


@designs
def test_holes_are_filled_from_below(design: str) -> None:
    swap_map = Map(design)
    n = 300 * 512 - 1  # 300 whole leaves: id 0 is never given
    ids = np.sort(fill(swap_map, n))
    rng = np.random.default_rng(3)
    gone = rng.random(n) < 0.9
    leaves = ids >> np.uint64(9)
    gone |= np.isin(leaves, rng.choice(300, 200, replace=False))  # whole leaves, too
    gone[-1] = False
    swap_map.run("drop", ids[gone])
    assert swap_map.metadata() < 8.3 * n / 3 + (64 << 10), "what is empty has no memory"
    again = fill(swap_map, int(gone.sum()))
    assert np.array_equal(np.sort(again), ids[gone]), "every hole, and nothing above"
    # Leaves that exist are filled before others are made.
    first = again[: int((~gone).sum())] >> np.uint64(9)
    assert np.isin(first, np.unique(leaves[~gone])).all()
    assert set(swap_map.trylock(int(i)) for i in ids[~gone][:1000]) == {entry(ZSWAP, 7)}


def test_churn_leaves_no_memory_behind() -> None:
    swap_map = Map("sparse")
    rng = np.random.default_rng(5)
    live = fill(swap_map, 50_000)
    for _ in range(30 // LESS + 1):
        rng.shuffle(live)
        swap_map.run("dup", live[:5000])
        swap_map.run("drop", live[:20_000])
        swap_map.run("drop", live[:5000])
        live[:20_000] = fill(swap_map, 20_000)
        assert len(np.unique(live)) == len(live) == swap_map.ids()
        assert int(live.max()) < 52_000
        assert swap_map.metadata() < 8.25 * 52_000 + (64 << 10)
    swap_map.run("drop", live)
    assert swap_map.metadata() <= ALMOST_NOTHING


@designs
def test_no_memory_leaves_the_map_as_it_was(design: str) -> None:
    program = f"""
        import resource
        import numpy as np
        from userswap.swap.map import Map, ZSWAP, entry
        ids = np.zeros(3_000_000, np.uint64)
        m = Map({design!r})
        used = int(open("/proc/self/statm").read().split()[0]) * 4096
        hard = resource.getrlimit(resource.RLIMIT_AS)[1]
        resource.setrlimit(resource.RLIMIT_AS, (used + (12 << 20), hard))
        try:
            m.run("alloc", ids, entry(ZSWAP, 9))
            raise SystemExit("no limit")
        except MemoryError:
            pass
        n = int(np.count_nonzero(ids))
        assert 500_000 < n < 2_000_000 and m.ids() == n
        ids = ids[:n]
        # One node is free, a first count far up needs three: it takes none of them.
        leaf = ids[3 * 512 - 1:4 * 512 - 1]
        assert int(leaf[0]) == 3 * 512 and m.count(500_000) == 1
        m.run("drop", leaf)
        for _ in range(2):
            try:
                m.dup(500_000)
                raise SystemExit("no limit")
            except MemoryError:
                pass
        m.dup(1)
        m.put(1)
        m.run("alloc", leaf, entry(ZSWAP, 9))
        try:
            m.run("dup", ids)
            raise SystemExit("no limit")
        except MemoryError:
            pass
        shared = n
        before = m.metadata()
        failed = 0
        for k in range(0, n, 512):      # every leaf of counts that could be missing
            i = int(ids[k])
            try:
                if m.count(i) == 1:
                    m.dup(i)
                    m.put(i)
            except MemoryError:
                failed += 1
                assert m.count(i) == 1 and m.lock(i) == entry(ZSWAP, 9)
                m.unlock(i, entry(ZSWAP, 9))
        assert failed > 20 and m.metadata() == before
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
        counts = [m.count(int(i)) for i in ids]
        shared = sum(counts) - n
        assert counts == [2] * shared + [1] * (n - shared)
        m.run("drop", ids[:shared]); m.run("drop", ids)
        assert m.ids() == 0 and m.metadata() <= {ALMOST_NOTHING}
        m.dup(m.alloc(entry(ZSWAP, 1)))
    """
    alone(program)


# ---- counts ----


@designs
def test_a_count_by_ones_passes_every_byte(design: str) -> None:
    swap_map = Map(design)
    swap_id = swap_map.alloc(entry(SLOT, 1))
    many = np.full(70_000, swap_id, np.uint64)
    for n in (255, 257, 65_535, 65_537):
        swap_map.run("dup", many[: n - 1])
        assert swap_map.count(swap_id) == n
        swap_map.run("put", many[: n - 1])
        assert swap_map.count(swap_id) == 1
    assert drop(swap_map, swap_id) == entry(SLOT, 1)


@designs
@pytest.mark.parametrize("n", [2, 255, 256, 65536, 2**31, 2**32, 2**32 + 1, 2**62])
def test_no_count_is_too_large(design: str, n: int) -> None:
    swap_map = Map(design)
    swap_id, other = swap_map.alloc(entry(SLOT, 1)), swap_map.alloc(entry(SLOT, 2))
    swap_map.add(swap_id, n - 1)
    assert (swap_map.count(swap_id), swap_map.count(other)) == (n, 1)
    if n == 2**62:
        with pytest.raises(OverflowError):
            swap_map.dup(swap_id)
        assert swap_map.count(swap_id) == n
    assert swap_map.put(swap_id) == (n - 1, 0)
    swap_map.add(swap_id, 2 - n)
    with pytest.raises(OverflowError):
        swap_map.add(swap_id, -1)
    assert drop(swap_map, swap_id) == entry(SLOT, 1)
    assert drop(swap_map, other) == entry(SLOT, 2)


# ---- locks ----


@designs
def test_who_waits_for_an_entry_gets_it(design: str) -> None:
    swap_map = Map(design)
    ids = [swap_map.alloc(entry(ZSWAP, 0)) for _ in range(20)]
    for swap_id in ids:
        swap_map.lock(swap_id)

    def wait() -> None:
        for swap_id in ids:
            swap_map.unlock(swap_id, swap_map.lock(swap_id) + 256)

    def release() -> None:
        for swap_id in ids:
            threading.Event().wait(0.003)  # the others sleep in the kernel by now
            swap_map.unlock(swap_id, entry(ZSWAP, 100))

    together(wait, wait, wait, release)
    assert {swap_map.lock(swap_id) for swap_id in ids} == {entry(ZSWAP, 103)}


@designs
def test_a_count_moves_while_the_entry_is_locked(design: str) -> None:
    """What a fork needs: no dup and no put waits for I/O, and unlock does not undo them."""
    swap_map = Map(design)
    swap_id = swap_map.alloc(entry(ZSWAP, 1))
    assert swap_map.lock(swap_id) == entry(ZSWAP, 1)
    together(lambda: swap_map.dup(swap_id))
    swap_map.unlock(swap_id, entry(ZSWAP, 2))
    assert swap_map.count(swap_id) == 2
    assert swap_map.lock(swap_id) == entry(ZSWAP, 2)
    together(lambda: swap_map.put(swap_id))
    assert swap_map.trylock(swap_id) is None
    swap_map.unlock(swap_id, entry(ZSWAP, 3))
    assert drop(swap_map, swap_id) == entry(ZSWAP, 3)


@designs
def test_the_last_put_waits_for_the_lock_and_sees_what_it_left(design: str) -> None:
    swap_map = Map(design)
    swap_id = swap_map.alloc(entry(ZSWAP, 1))
    swap_map.lock(swap_id)

    def release() -> None:
        threading.Event().wait(0.02)
        swap_map.unlock(swap_id, entry(SLOT, 2))

    assert together(lambda: swap_map.put(swap_id), release)[0] == (0, entry(SLOT, 2))
    swap_map.free(swap_id)


# ---- threads ----


@designs
@pytest.mark.parametrize(("shared", "threads", "rounds"), [(1, 2, 400_000), (8, 3, 200_000), (2000, 4, 60_000)])
def test_threads_lose_no_count_and_no_entry(design: str, shared: int, threads: int, rounds: int) -> None:
    swap_map = Map(design)
    ids = fill(swap_map, shared, entry(ZSWAP, 0))
    held = np.zeros((threads, shared), np.int64)
    results = together(
        *[lambda i=i: swap_map.stress(ids, held[i], rounds // LESS, i + 1, 300 // LESS) for i in range(threads)]
    )
    assert [wrong for _, wrong in results] == [0] * threads
    assert [swap_map.count(int(i)) for i in ids] == (1 + held.sum(axis=0)).tolist()
    payloads = sum(swap_map.lock(int(i)) >> 8 for i in ids)
    assert payloads == sum(done for done, _ in results)
    assert swap_map.ids() == shared


@designs
def test_lookups_while_the_tree_grows_and_shrinks(design: str) -> None:
    for height in (*[1] * 100, 2, 2):
        swap_map = Map(design)
        ids = fill(swap_map, 50, entry(ZSWAP, 0))
        held = np.zeros(50, np.int64)
        many = np.empty(513 if height == 1 else 263_000, np.uint64)
        rounds = 3000 if height == 1 else 100_000

        def grow(swap_map: Map = swap_map, many: Ids = many) -> None:
            swap_map.run("alloc", many, entry(SLOT, 1))
            swap_map.run("drop", many)

        def look(swap_map: Map = swap_map, ids: Ids = ids, held: Any = held, rounds: int = rounds) -> tuple[int, int]:
            return swap_map.stress(ids, held, rounds // LESS, 11, 300 // LESS)

        (done, wrong), _ = together(look, grow)
        assert wrong == 0
        assert sum(swap_map.lock(int(i)) >> 8 for i in ids) == done
        assert [swap_map.count(int(i)) for i in ids] == (1 + held).tolist()


@designs
@pytest.mark.parametrize("in_step", [True, False])
@pytest.mark.parametrize(("n", "threads"), [(3, 2), (1000, 3), (40_000, 2), (20_000, 4)])
def test_of_many_last_puts_one_frees(design: str, n: int, threads: int, in_step: bool) -> None:
    n = max(n // LESS, 3)
    seeds = [1 if in_step else i + 1 for i in range(threads)]
    for turn in range(max(1, 200 // LESS // n)):
        swap_map = Map(design)
        ids = fill(swap_map, n)
        for _ in range(threads - 1):
            swap_map.run("dup", ids)
        storage = np.ones(n, np.uint8)
        results = together(
            *[
                lambda i=i: swap_map.drain(ids, storage, turn * 10 + seeds[i])  # noqa: B023
                for i in range(threads)
            ]
        )
        assert sum(freed for freed, _, _ in results) == n
        assert sum(wrong for _, _, wrong in results) == 0
        assert not storage.any()
        assert swap_map.ids() == 0
        assert swap_map.metadata() <= ALMOST_NOTHING


# ---- the window, and what only the debug build says ----


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="sparse"):
        Map("no such design")
    with pytest.raises(ValueError, match="type"):
        entry(0, 1)
    with pytest.raises(ValueError, match="2\\*\\*56"):
        entry(ZSWAP, 2**56)
    with pytest.raises(ValueError, match="entry"):
        Map().alloc(0)


@designs
@pytest.mark.parametrize(
    ("misuse", "rule_broken"),
    [
        ("m.unlock(i, w)", "not locked"),
        ("m.free(i)", "has a count"),
        ("m.put(i); m.free(i); m.free(i)", "free"),
        ("m.put(i); m.unlock(i, w)", "no count"),
        ("m.put(i); m.dup(i)", "no count"),
        ("m.put(i); m.put(i)", "no count"),
        ("m.put(i); m.free(i); m.lock(i)", "free"),
    ],
)
def test_the_debug_build_names_the_rule_that_is_broken(design: str, misuse: str, rule_broken: str) -> None:
    program = f"""
        import resource
        from userswap.swap.map import DEBUG, Map, ZSWAP, entry
        if not DEBUG: raise SystemExit(77)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        w = entry(ZSWAP, 1)
        m = Map({design!r})
        other, i = m.alloc(w), m.alloc(w)
        {misuse}
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        check=False, capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    if done.returncode == 77:
        pytest.skip("needs the debug build (make debug)")
    assert done.returncode < 0
    assert rule_broken in done.stderr
