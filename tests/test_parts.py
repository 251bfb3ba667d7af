"""Parts of folios: where accesses go anywhere, 16 KiB come and leave by themselves; nobody can tell from the bytes."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from helpers import FOLIO, check_empty, check_pool, data, fresh_pool, run_python
from support import only_moved
from userswap import Pool
from userswap.swap.map import BOUND

pytestmark = only_moved

PART = FOLIO // 4
FOLIOS = 400  # 25 MiB in a budget of 16
KINDS = ["walk", "noise", "small", "same"]

Bytes = npt.NDArray[np.uint8]


def filled(pool: Pool, kind: str = "walk", folios: int = FOLIOS) -> tuple[Any, Bytes]:
    """An array that is swapped out, and what it holds."""
    plain = data(kind, folios * FOLIO, 1)
    memory = pool.array(plain)
    pool.evict()
    return memory, plain


def scatter(memory: Any, turns: int = 64, seed: int = 5) -> None:
    """Read here and there until the pool brings parts only; no folio is read twice."""
    order = random.Random(seed).sample(range(0, len(memory) // FOLIO - 1), turns)
    for folio in order:
        int(memory[folio * FOLIO + PART])


@contextmanager
def locked(memory: Any) -> Iterator[None]:
    """What mlock has locked can't be moved to the stage, which is not: parts are copied in, and looked at in place."""
    libc = ctypes.CDLL(None)
    where = ctypes.c_void_p(memory.ctypes.data), ctypes.c_size_t(memory.nbytes)
    libc.mlock(*where)  # may not populate; it locks
    try:
        yield
    finally:
        assert libc.munlock(*where) == 0


def partial(pool: Pool) -> int:
    return pool._core.check()["partial"]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_come_where_accesses_go_anywhere_and_hold_the_right_bytes(kind: str) -> None:
    pool = fresh_pool()
    memory, plain = filled(pool, kind)
    rng = random.Random(3)
    for _ in range(3000):
        at = rng.randrange(len(plain))
        assert memory[at] == plain[at], at
    assert partial(pool) > 0
    assert pool.stats().part_ins > 1000
    check_pool(pool)
    assert np.array_equal(memory, plain)
    check_pool(pool)
    del memory
    check_empty(pool)


@pytest.mark.parametrize("where", ["zswap", "swap file"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_to_parts_is_kept(kind: str, where: str) -> None:
    pool = fresh_pool()
    memory, plain = filled(pool, kind)
    if where == "swap file":
        pool.writeback()
    rng = random.Random(4)
    scatter(memory)
    for turn in range(4000):
        at = rng.randrange(len(plain))
        assert memory[at] == plain[at], (turn, at)
        memory[at] = plain[at] = rng.randrange(256)
        if turn % 500 == 0:
            pool.evict()
        if turn % 900 == 0 and where == "swap file":
            pool.writeback()
    stats = check_pool(pool)
    assert stats.part_ins > 1000
    if where == "zswap" and kind in ("walk", "small"):
        assert stats.part_outs > 500, "the others of a folio are not packed again"
    assert np.array_equal(memory, plain)
    pool.evict()
    assert np.array_equal(memory, plain)
    del memory
    check_empty(pool)


def test_parts_of_an_array_that_goes_are_forgotten() -> None:
    pool = fresh_pool()
    memory, _ = filled(pool, "small")
    scatter(memory)
    assert partial(pool) > 10
    del memory
    check_empty(pool)


def test_scans_still_bring_whole_folios() -> None:
    pool = fresh_pool()
    memory, plain = filled(pool)
    assert np.array_equal(memory, plain)
    assert pool.stats().part_ins == 0


def test_a_scan_ends_the_time_of_parts() -> None:
    pool = fresh_pool()
    memory, plain = filled(pool)
    scatter(memory)
    assert partial(pool) > 0
    assert np.array_equal(memory, plain)
    pool.evict()
    before = pool.stats()
    for at in range(8 * FOLIO, 24 * FOLIO, PART):
        assert memory[at] == plain[at]
    after = pool.stats()
    assert after.swap_ins - before.swap_ins >= 15
    assert after.part_ins - before.part_ins <= 2


def test_who_reads_on_within_a_folio_gets_all_of_it() -> None:
    pool = fresh_pool()
    memory, plain = filled(pool)
    scatter(memory)
    before = pool.stats()
    at = (FOLIOS - 1) * FOLIO  # not looked at by scatter
    for part in range(4):
        assert memory[at + part * PART] == plain[at + part * PART]
    after = pool.stats()
    assert (after.part_ins - before.part_ins, after.swap_ins - before.swap_ins) == (2, 1)


def test_a_part_that_was_written_to_before_the_rest_came_is_not_taken_for_clean() -> None:
    pool = fresh_pool()
    memory, plain = filled(pool)
    scatter(memory)
    at = (FOLIOS - 1) * FOLIO
    memory[at] = plain[at] = plain[at] ^ 1
    for part in range(1, 4):
        assert memory[at + part * PART] == plain[at + part * PART]
    assert pool._core.check()["wrong"] == 0
    pool.evict()
    assert memory[at] == plain[at]
    assert np.array_equal(memory, plain)


def test_a_short_last_folio_comes_whole() -> None:
    pool = fresh_pool()
    plain = data("walk", 300 * FOLIO + 5 * 4096, 1)
    memory = pool.array(plain)
    pool.evict()
    scatter(memory)
    before = pool.stats()
    for at in (len(plain) - 1, len(plain) - 17000):
        assert memory[at] == plain[at]
        memory[at] = plain[at] = plain[at] ^ 255
    assert pool.stats().part_ins == before.part_ins
    pool.evict()
    assert np.array_equal(memory, plain)


def test_system_calls_get_whole_folios(tmp_path: Any) -> None:
    pool = fresh_pool()
    memory, plain = filled(pool, "small")  # nothing has to leave meanwhile
    scatter(memory)
    written, read = random.Random(5).sample(range(0, FOLIOS - 1), 64)[-2:]  # the last that came, so in parts
    before = partial(pool)
    path = tmp_path / "file"
    path.write_bytes(bytes(range(256)) * (FOLIO // 256))
    with path.open("rb", buffering=0) as file:
        assert file.readinto(memory[written * FOLIO + 100 : (written + 1) * FOLIO - 100]) == FOLIO - 200
    got = np.frombuffer(path.read_bytes(), np.uint8)[: FOLIO - 200]
    plain[written * FOLIO + 100 : (written + 1) * FOLIO - 100] = got
    with path.open("wb", buffering=0) as file:
        assert file.write(memory[read * FOLIO : (read + 1) * FOLIO]) == FOLIO
    assert path.read_bytes() == plain[read * FOLIO : (read + 1) * FOLIO].tobytes()
    assert partial(pool) == before - 2
    check_pool(pool)
    pool.evict()
    assert np.array_equal(memory, plain)


def test_a_snapshot_of_folios_that_are_there_in_parts() -> None:
    pool = fresh_pool()
    memory, plain = filled(pool)
    scatter(memory)
    written = [(folio * FOLIO + PART + 7) for folio in random.Random(5).sample(range(0, FOLIOS - 1), 64)][::3]
    for at in written:
        memory[at] = plain[at] = plain[at] ^ 1
    assert partial(pool) > 10
    copy = pool.snapshot(memory)
    assert partial(pool) == 0
    check_pool(pool)
    for at in written:
        memory[at] ^= 3
    assert np.array_equal(copy, plain)
    for at in written:
        plain[at] ^= 3
    assert np.array_equal(memory, plain)
    check_pool(pool)
    del memory, copy
    check_empty(pool)


def test_a_part_is_stored_where_it_was_again_and_again() -> None:
    pool = fresh_pool()
    memory, plain = filled(pool)
    scatter(memory)
    rng = random.Random(6)
    before = pool.stats()
    for turn in range(12):
        for folio in random.Random(5).sample(range(0, FOLIOS - 1), 64):
            at = folio * FOLIO + PART * rng.randrange(4) + 8 * rng.randrange(PART // 8)
            memory[at : at + 8] = plain[at : at + 8] = rng.randrange(256)
        pool.evict()
        check_pool(pool)
        if turn % 4 == 3:
            pool._core.compact()
    after = pool.stats()
    stored = after.part_outs - before.part_outs
    assert stored > 500
    assert stored / 2 < after.part_updates - before.part_updates <= stored
    assert np.array_equal(memory, plain)
    del memory
    check_empty(pool)


def test_what_others_share_is_not_changed_in_place() -> None:
    """A snapshot of what is swapped out, then writes to parts of one of the two, and of the other."""
    pool = fresh_pool()
    memory, plain = filled(pool)
    scatter(memory)
    folios = random.Random(5).sample(range(0, FOLIOS - 1), 64)
    for folio in folios:
        memory[folio * FOLIO] = plain[folio * FOLIO] = 1
    pool.evict()
    copy = pool.snapshot(memory)
    kept = plain.copy()
    for turn in range(3):
        for folio in folios:
            at = folio * FOLIO + PART * turn + 9
            memory[at] = plain[at] = plain[at] ^ 255
            copy[at + 1] = kept[at + 1] = kept[at + 1] ^ 255
        pool.evict()
        check_pool(pool)
    assert np.array_equal(memory, plain)
    assert np.array_equal(copy, kept)


def test_what_is_wanted_nearly_whole_stays_without_a_copy() -> None:
    pool = fresh_pool()
    memory, plain = filled(pool, "small")  # nothing has to leave: reclaim gives up copies, too
    scatter(memory)
    before = pool.stats()
    folio = FOLIOS - 1  # not looked at by scatter
    for part in (3, 0, 2, 1):
        at = folio * FOLIO + part * PART
        assert memory[at] == plain[at]
    after = pool.stats()
    assert (after.part_ins - before.part_ins, after.swap_ins - before.swap_ins) == (2, 1)
    assert before.swap_ids - after.swap_ids == 1
    check_pool(pool)
    pool.evict()
    assert np.array_equal(memory, plain)


def resident_share(pool: Pool, memory: Any, accesses: int, seed: int) -> float:
    """Of so many accesses anywhere, which find their folio or part in place."""
    before = pool.stats().faults
    for at in np.random.default_rng(seed).integers(0, len(memory), accesses):
        int(memory[at])
    return 1 - (pool.stats().faults - before) / accesses


def test_when_most_would_fit_most_stays_in_place() -> None:
    """Reading anywhere, a part at a time, once drove out all that was in place whole: each of them was packed as well
    as in place then, and two of three accesses were faults."""
    pool = fresh_pool("64MiB")
    plain = data("walk", 76 << 20, 1)  # packed 36 MiB: of 62, 35 can be in place at best, without a copy
    memory = pool.array(plain)
    resident_share(pool, memory, 20000, 1)
    assert resident_share(pool, memory, 20000, 2) > 0.42
    check_pool(pool)
    assert np.array_equal(memory, plain)


def test_what_nobody_turns_to_any_more_makes_room_for_parts() -> None:
    pool = fresh_pool("64MiB")
    memory = pool.array(data("walk", 80 << 20, 1))
    pool.evict()
    old, new = memory[: 48 << 20], memory[48 << 20 :]
    int(old.max())  # in place now, and not looked at again
    share = [resident_share(pool, new[: 20 << 20], 20000, seed) for seed in range(12)]
    assert max(share) > 0.8, share
    check_pool(pool)


def test_shared_ids_come_whole_and_parts_leave_when_their_id_became_shared() -> None:
    """Identical folios: an id may get a second holder while the first has a part of it in place, written to."""
    pool = fresh_pool()
    memory, plain = filled(pool)
    scatter(memory)
    folios = random.Random(5).sample(range(0, FOLIOS - 1), 64)
    again = pool.array(np.concatenate([plain[f * FOLIO : (f + 1) * FOLIO] for f in folios]))
    for f in folios[::2]:
        memory[f * FOLIO + PART] ^= 1
    expected = plain.copy()
    for f in folios[::2]:
        expected[f * FOLIO + PART] ^= 1
    pool.evict()
    assert pool.stats().deduped > 0
    assert np.array_equal(memory, expected)
    for n, f in enumerate(folios):
        assert np.array_equal(again[n * FOLIO : (n + 1) * FOLIO], plain[f * FOLIO : (f + 1) * FOLIO])
    check_pool(pool)


def test_what_became_shared_while_parts_were_in_place_is_not_changed_in_place() -> None:
    """An identical folio that is stored takes the id of one that has a part in place, which is written to then."""
    pool = fresh_pool()
    memory, plain = filled(pool, "walk", 150)  # few: nothing has to leave
    order = random.Random(5).sample(range(0, 149), 64)
    for folio in order:
        int(memory[folio * FOLIO + PART])
    folios = order[40:]
    kept = np.concatenate([plain[f * FOLIO : (f + 1) * FOLIO] for f in folios])
    again = pool.array(kept)
    copy = pool.snapshot(again)  # stores what stays in place
    assert pool.stats().deduped >= len(folios) - 8
    assert partial(pool) >= len(folios) - 8
    for f in folios:
        memory[f * FOLIO + PART] = plain[f * FOLIO + PART] = plain[f * FOLIO + PART] ^ 1
    before = pool.stats()
    pool.evict()
    assert check_pool(pool).part_outs - before.part_outs >= len(folios) - 8
    assert np.array_equal(again, kept)
    assert np.array_equal(copy, kept)
    assert np.array_equal(memory, plain)
    del memory, again, copy
    check_empty(pool)


def test_a_page_that_the_program_threw_away_reads_as_zeros_and_stays_so() -> None:
    pool = fresh_pool()
    memory, plain = filled(pool, "small")  # nothing has to leave: what is not in place can't be thrown away
    scatter(memory)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    folios = random.Random(5).sample(range(0, FOLIOS - 1), 64)
    thrown = []
    for n, f in enumerate(folios[40:]):
        at = f * FOLIO + PART + 4096 * (n % 4)
        assert memory[at] == plain[at]  # in place: what is swapped out can't be thrown away so
        assert libc.madvise(memory.ctypes.data + at, 4096, 4) == 0
        plain[at : at + 4096] = 0
        thrown.append(at)
    for at in thrown[::2]:
        assert not memory[at : at + 4096].any()
    pool.evict()
    pool.evict()
    check_pool(pool)
    for at in thrown:
        assert not memory[at : at + 4096].any(), at
    assert np.array_equal(memory, plain)


def test_a_child_has_the_parts_too_and_both_go_their_own_ways() -> None:
    result = run_python("""
import os, random, sys, numpy as np
from helpers import FOLIO, data, fresh_pool
from test_parts import filled, partial, scatter
pool = fresh_pool()
memory, plain = filled(pool)
scatter(memory)
order = [f * FOLIO + FOLIO // 4 for f in random.Random(5).sample(range(399), 64)]
for at in order[::2]: memory[at] = plain[at] = plain[at] ^ 1          # written to, and the sums don't know yet
assert partial(pool) > 10
pid = os.fork()
if pid == 0:
    assert partial(pool) > 10
    for at in order[::3]: memory[at] = plain[at] = plain[at] ^ 2
    pool.evict()
    ok = np.array_equal(memory, plain) and pool._core.check()["wrong"] == 0
    os._exit(0 if ok else 3)
for at in order[::5]: memory[at] = plain[at] = plain[at] ^ 4
pool.evict()
assert np.array_equal(memory, plain) and pool._core.check()["wrong"] == 0
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
""")
    assert result.returncode == 0, result.stderr


def test_what_cannot_be_stored_goes_back_in_place() -> None:
    """Noise written into a part of a folio that compressed, no swap file: it stays, writable, and nothing is lost."""
    pool = fresh_pool("16MiB", swap="none")
    memory, plain = filled(pool, "small", 700)
    scatter(memory)
    noise = data("noise", 700 * FOLIO, 9)
    rng = random.Random(8)
    for _ in range(60):
        f, part = rng.randrange(699), rng.randrange(4)
        at = f * FOLIO + part * PART
        memory[at : at + PART] = plain[at : at + PART] = noise[at : at + PART]
        if rng.randrange(4) == 0:
            pool.evict()
    for _ in range(4):
        pool.evict()
        check_pool(pool)
    assert np.array_equal(memory, plain)


@pytest.mark.parametrize("lock", [False, True], ids=["moved", "locked"])
def test_parts_that_can_be_stored_nowhere_go_back_in_place(lock: bool) -> None:
    """Noise in two parts of a folio, a sixth of which was zeros: too little is left of those. It is never whole."""
    pool = fresh_pool("16MiB", swap="none")
    plain = data("noise", 200 * FOLIO, 1)
    plain.reshape(-1, 1024)[::6] = 0
    memory = pool.array(plain)
    pool.evict()
    scatter(memory)
    with locked(memory) if lock else nullcontext():
        noise = data("noise", FOLIO, 9)
        folios = random.Random(5).sample(range(0, 199), 64)[40:]
        for n, f in enumerate(folios):
            for at in (f * FOLIO + 3 * PART, f * FOLIO + PART):
                memory[at : at + PART] = plain[at : at + PART] = np.roll(noise, n)[at % FOLIO : at % FOLIO + PART]
        for turn in range(3):
            pool.evict()
            assert partial(pool) >= len(folios) - 4, "they are where they were (a few that follow others came whole)"
            check_pool(pool)
            for f in folios:
                memory[f * FOLIO + PART + turn] = plain[f * FOLIO + PART + turn] = turn  # can be written to as before
        assert np.array_equal(memory, plain)
    del memory
    check_empty(pool)


def test_parts_that_can_be_stored_nowhere_do_not_keep_whole_folios_in_place() -> None:
    """With so many parts in place nothing else was tried, and the budget was exceeded."""
    pool = fresh_pool("64MiB", swap="none")
    plain = data("noise", 600 * FOLIO, 1)
    plain.reshape(-1, 1024)[::6] = 0
    memory = pool.array(plain)
    pool.evict()
    scatter(memory)
    others = data("small", 30 << 20, 2)
    whole = pool.array(others)
    noise = data("noise", FOLIO, 9)
    for n, f in enumerate(random.Random(7).sample(range(0, 599), 400)):
        for at in (f * FOLIO + 3 * PART, f * FOLIO + PART):
            memory[at : at + PART] = plain[at : at + PART] = np.roll(noise, n)[at % FOLIO : at % FOLIO + PART]
    assert partial(pool) > 300
    stats = check_pool(pool)
    assert stats.over_budget == 0
    assert stats.peak_bytes <= stats.budget_bytes
    assert np.array_equal(whole, others)
    assert np.array_equal(memory, plain)


DAMAGE = """
import os, sys
from helpers import FOLIO, fresh_pool
from test_parts import FOLIOS, filled, scatter
path = sys.argv[1]
pool = fresh_pool(swap=f"{path}:64M")
memory, plain = filled(pool, "small")
scatter(memory)
while pool.stats().stored_bytes > pool.stats().slot_bytes:
    pool.writeback()
with open(path, "r+b") as file:
    size = os.path.getsize(path)
    for at in range(0, size, 4096):
        DAMAGE
print("before", flush=True)
at = (FOLIOS - 1) * FOLIO + 5   # not looked at by scatter
print("wrong bytes" if memory[at] != plain[at] else "went on", pool.stats().part_ins)
"""


@pytest.mark.parametrize(
    "damage",
    ["file.truncate(0)", "file.seek(at + 32); file.write(bytes([255]) * 64)", "file.seek(at + 3); file.write(b'\\0')"],
    ids=["cut", "offsets", "item size"],
)
def test_a_part_whose_slots_are_damaged_ends_the_program(tmp_path: Any, damage: str) -> None:
    path = tmp_path / "swap"
    path.touch()
    result = run_python(DAMAGE.replace("DAMAGE", damage), str(path))
    assert result.stdout == "before\n", result
    assert result.returncode == -signal.SIGBUS
    assert f"can't be brought back from {path}: " in result.stderr
    assert result.stderr.endswith("). The program ends here.\n")


# A byte of the last block of each chunk: its header says where that is.
LAST_BLOCK = """
        file.seek(at)
        header = file.read(48)
        if header[0] == 5 and header[4:8] == (65536).to_bytes(4, "little"):
            last = int.from_bytes(header[44:48], "little")
            file.seek(at + last)
            byte = file.read(1)
            file.seek(at + last)
            file.write(bytes([byte[0] ^ 1]))
"""


def test_a_damaged_part_is_only_missed_by_who_wants_it(tmp_path: Any) -> None:
    """Most of a folio is wanted, so all of it should come, and can't."""
    path = tmp_path / "swap"
    path.touch()
    # What is encrypted shows no blocks, and is whole or nothing.
    code = DAMAGE.replace("DAMAGE", LAST_BLOCK).replace('64M")', '64M", encrypt=False)')
    code = (
        code.split("at = (FOLIOS")[0]
        + """
at = (FOLIOS - 1) * FOLIO + 5
for part in (0, 2, 1):
    assert memory[at + part * FOLIO // 4] == plain[at + part * FOLIO // 4]
    memory[at + part * FOLIO // 4] ^= 1
assert pool._core.check()["wrong"] == 0
for part in (0, 2, 1):
    assert memory[at + part * FOLIO // 4] == plain[at + part * FOLIO // 4] ^ 1
print("and then", flush=True)
print(memory[at + 3 * FOLIO // 4])
"""
    )
    result = run_python(code, str(path))
    assert result.stdout == "before\nand then\n", result
    assert result.returncode == -signal.SIGBUS


def test_folios_of_shared_ids_come_whole() -> None:
    pool = fresh_pool()
    memory, plain = filled(pool, "small")
    scatter(memory)
    copy = pool.snapshot(memory)
    pool.evict()
    before = pool.stats()
    folios = random.Random(5).sample(range(0, FOLIOS - 1), 64)[:12]
    for f in folios:
        assert memory[f * FOLIO] == copy[f * FOLIO] == plain[f * FOLIO]
    assert pool.stats().part_ins == before.part_ins
    del copy
    pool.evict()
    for f in folios:
        assert memory[f * FOLIO] == plain[f * FOLIO]
    assert pool.stats().part_ins > before.part_ins, "they have an id for themselves again"


@pytest.mark.parametrize(("kind", "lock"), [("walk", False), ("noise", False), ("walk", True)])
def test_threads_on_parts_of_the_same_folios_never_see_a_wrong_byte(kind: str, lock: bool) -> None:
    pool = fresh_pool()
    memory, plain = filled(pool, kind)
    failures: list[str] = []
    writers = 3
    done = threading.Event()

    def work(me: int) -> None:
        rng = random.Random(me)
        for _ in range(2500):
            at = rng.randrange(len(plain) // writers) * writers + me  # bytes of its own, in everybody's pages
            if memory[at] != plain[at]:
                failures.append(f"byte {at}")
            memory[at] = plain[at] = rng.randrange(256)

    def disturb() -> None:
        rng = random.Random(99)
        while not done.is_set():
            rng.choice([pool.evict, pool.writeback, pool._core.compact])()
            folio = rng.randrange(FOLIOS)
            os.write(null, memory[folio * FOLIO : (folio + 1) * FOLIO])

    null = os.open("/dev/null", os.O_WRONLY)
    threads = [threading.Thread(target=work, args=[me]) for me in range(writers)]
    disturber = threading.Thread(target=disturb)
    with locked(memory) if lock else nullcontext():
        for thread in [*threads, disturber]:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive(), "a thread hangs"
        done.set()
        disturber.join(60)
    os.close(null)
    assert not failures, failures[:5]
    assert pool.stats().part_ins > 100
    check_pool(pool)
    assert np.array_equal(memory, plain)


def test_what_goes_cold_in_place_may_be_moved_meanwhile() -> None:
    """Who stored parts told zswap so when the entry was free again: another object could be there by then. A build with
    assertions sees it."""
    pool = fresh_pool(map_design="descriptor")
    memory, plain = filled(pool, folios=600)
    scatter(memory)
    pool.evict()
    pool.writeback(1 << 30)
    done = threading.Event()

    def work(me: int) -> None:
        rng = random.Random(me)
        for _ in range(4000):  # written to at once, so that they move from the file to zswap, and are cold there
            at = (rng.randrange(300) * 2 + me) * FOLIO + rng.randrange(FOLIO)
            memory[at] = plain[at] = rng.randrange(256)

    def disturb() -> None:
        rng = random.Random(99)
        while not done.is_set():
            pool._core.compact()
            if rng.random() < 0.3:
                pool.writeback(1 << 18)
            if rng.random() < 0.3:
                pool.evict(1 << 20)

    threads = [threading.Thread(target=work, args=[me]) for me in range(2)]
    disturber = threading.Thread(target=disturb)
    for thread in [*threads, disturber]:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a thread hangs"
    done.set()
    disturber.join(60)
    stats = check_pool(pool)
    assert stats.part_updates > 1000
    assert stats.promotions > 500
    assert np.array_equal(memory, plain)


def test_what_is_written_to_moves_from_the_file_to_zswap_with_its_other_parts() -> None:
    pool = fresh_pool()
    memory, plain = filled(pool)
    scatter(memory)
    pool.evict()
    pool.writeback(1 << 30)
    before = pool.stats()
    order = random.Random(6).sample(range(0, FOLIOS - 1), 60)
    for folio in order:
        at = folio * FOLIO + 3 * PART
        memory[at] = plain[at] = plain[at] ^ 1
    after = check_pool(pool)
    if os.environ.get("USERSWAP_MAP") not in BOUND:
        assert after.promotions - before.promotions >= 50
        assert after.slot_bytes <= before.slot_bytes - 50 * 4096
    pool.evict()
    assert np.array_equal(memory, plain)
    del memory
    check_empty(pool)


def test_a_child_moves_what_it_writes_to_out_of_the_parents_file_and_the_parent_keeps_it() -> None:
    result = run_python("""
import os, random, sys, numpy as np
from helpers import FOLIO, data, fresh_pool
from test_parts import FOLIOS, filled, scatter
pool = fresh_pool()
memory, plain = filled(pool)
scatter(memory)
pool.evict()
pool.writeback(1 << 30)
order = [f * FOLIO + 5 for f in random.Random(6).sample(range(FOLIOS - 1), 60)]
pid = os.fork()
if pid == 0:
    for at in order: memory[at] = plain[at] = plain[at] ^ 2
    pool.evict()
    ok = np.array_equal(memory, plain) and pool._core.check()["wrong"] == 0
    os._exit(0 if ok else 3)
code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
assert np.array_equal(memory, plain) and pool._core.check()["wrong"] == 0
sys.exit(code)
""")
    assert result.returncode == 0, result.stderr
