"""Windows and readahead: scans bring 2 MiB at a time, made ready by a thread of ours, while everything else goes on.

The budgets are the least for which whole windows are moved, and the least that is not small. Every word of the array
says where it belongs and which write it is from, so a folio of another place or another time is noticed.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from helpers import FOLIO, check_empty, check_pool, data, fresh_pool, run_python
from support import only_moved, only_quiet
from userswap import UserswapError
from userswap.swap.map import BOUND

SMALL, RAM = "32MiB", "128MiB"
FOLIOS = 2560  # 160 MiB
WORDS = FOLIO // 8
WINDOW = 32

Array = npt.NDArray[np.int64]
Pages = Any


def stamp(folios: Array, versions: Array) -> Array:
    """What folios hold after so many writes."""
    inside = np.arange(WORDS, dtype=np.int64)
    result: Array = (folios[:, None] << 40) | (versions[:, None] << 20) | inside
    return result


@pytest.fixture(params=[SMALL, RAM])
def pool(request: pytest.FixtureRequest) -> Any:
    return fresh_pool(request.param)


def filled(pool: Any) -> Pages:
    memory = pool.empty((FOLIOS, WORDS), np.int64)
    for first in range(0, FOLIOS, WINDOW):
        memory[first : first + WINDOW] = stamp(np.arange(first, first + WINDOW), np.zeros(WINDOW, np.int64))
    return memory


def scan(memory: Pages, versions: Array, first: int = 0, last: int = FOLIOS) -> None:
    for at in range(first, last, WINDOW):
        folios = np.arange(at, min(at + WINDOW, last))
        assert np.array_equal(memory[at : at + len(folios)], stamp(folios, versions[folios])), at


def together(*parts: Callable[[], None]) -> None:
    """Run them in threads; what fails in one fails here."""
    failures: list[BaseException] = []

    def one(part: Callable[[], None]) -> None:
        try:
            part()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=one, args=[part]) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive(), "a thread hangs"
    if failures:
        raise failures[0]


def out(pool: Any) -> None:
    pool.evict()
    pool.evict()


@only_moved
def test_a_scan_finds_windows_ready_and_right(pool: Any) -> None:
    memory, versions = filled(pool), np.zeros(FOLIOS, np.int64)
    out(pool)
    before = pool.stats()
    scan(memory, versions)
    after = pool.stats()
    assert after.faults - before.faults < FOLIOS // 4, "windows come in one piece"
    assert after.readahead_hits > 0
    assert after.readahead >= after.readahead_hits
    out(pool)
    stored = pool.stats().swap_outs - before.swap_outs
    assert stored <= after.resident_bytes // FOLIO, "what was only read is not stored again, unless it was to stay"
    check_pool(pool)
    del memory
    check_empty(pool)


def test_a_write_between_windows_is_not_undone_by_what_was_made_ready(pool: Any) -> None:
    """A folio of a window that is READY is changed and leaves again: the ready one is of yesterday."""
    memory, versions = filled(pool), np.zeros(FOLIOS, np.int64)
    for turn in range(1, 6):
        out(pool)
        scan(memory, versions, 0, 4 * WINDOW)
        time.sleep(0.02)  # the windows behind are being made, or are ready
        for folio in (4 * WINDOW + turn, 5 * WINDOW + 31, 6 * WINDOW):
            versions[folio] += 1
            memory[folio] = stamp(np.array([folio]), versions[folio : folio + 1])[0]
            memory[folio + 1][0] = memory[folio + 1][0]  # read, and written as it was
        if turn % 2:
            pool._core.evict(1 << 20)
        scan(memory, versions, 4 * WINDOW, 8 * WINDOW)
    scan(memory, versions)
    check_pool(pool)


def test_scans_and_writes_by_threads_with_reclaim_beside_them(pool: Any) -> None:
    memory, versions = filled(pool), np.zeros(FOLIOS, np.int64)
    half = FOLIOS // 2
    stop = threading.Event()

    def scans(memory: Pages, first: int, last: int, turns: int) -> None:
        try:
            for turn in range(turns):
                scan(memory, versions, first, last)
                rng = np.random.default_rng(turn + first)
                for folio in rng.integers(first, last, 40):
                    versions[folio] += 1
                    memory[folio] = stamp(np.array([folio]), versions[folio : folio + 1])[0]
        finally:
            stop.set()

    def disturb() -> None:
        rng = np.random.default_rng(9)
        while not stop.is_set():
            pool.evict(int(rng.integers(1, 8 << 20)))
            pool.writeback(int(rng.integers(1, 1 << 20)))
            time.sleep(0.01)

    together(partial(scans, memory, 0, half, 4), partial(scans, memory, half, FOLIOS, 4), disturb)
    scan(memory, versions)
    check_pool(pool)
    del memory
    check_empty(pool)


def test_an_array_can_be_freed_while_its_windows_are_made(pool: Any) -> None:
    kept, versions = filled(pool), np.zeros(FOLIOS, np.int64)
    for _ in range(6):
        memory = pool.array(kept[: 16 * WINDOW])
        out(pool)
        scan(memory, versions, 0, 8 * WINDOW)
        del memory  # its next windows are asked for, being made, or ready
    check_pool(pool)
    scan(kept, versions)


def test_a_child_has_no_windows_that_its_parent_made_ready(pool: Any) -> None:
    memory, versions = filled(pool), np.zeros(FOLIOS, np.int64)
    for turn in range(4):
        out(pool)
        scan(memory, versions, 0, (4 + turn) * WINDOW)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                scan(memory, versions)
                memory[7] = 0
                scan(memory, versions, WINDOW)
                check_pool(pool)
                code = 0
            finally:
                os._exit(code)
        scan(memory, versions, (4 + turn) * WINDOW)
        assert os.waitpid(child, 0)[1] == 0
        scan(memory, versions)
    check_pool(pool)


def test_a_snapshot_of_what_is_being_made_ready(pool: Any) -> None:
    memory, versions = filled(pool), np.zeros(FOLIOS, np.int64)
    out(pool)
    scan(memory, versions, 0, 4 * WINDOW)
    old = pool.snapshot(memory)
    before = versions.copy()
    folios = np.arange(0, FOLIOS, 5)
    versions[folios] += 1
    for at in range(0, len(folios), 16):
        memory[folios[at : at + 16]] = stamp(folios[at : at + 16], versions[folios[at : at + 16]])
    together(partial(scan, memory, versions), partial(scan, old, before))
    check_pool(pool)


def test_what_is_ready_counts_in_the_budget_and_can_go(pool: Any) -> None:
    memory, versions = filled(pool), np.zeros(FOLIOS, np.int64)
    out(pool)
    scan(memory, versions, 0, 4 * WINDOW)
    time.sleep(0.05)
    stats = pool.stats()
    assert stats.resident_bytes + stats.pool_bytes + stats.metadata_bytes <= stats.peak_bytes <= stats.budget_bytes
    out(pool)
    assert check_pool(pool).resident_bytes == 0


def test_a_written_folio_that_nobody_noticed_is_stored_when_it_leaves(pool: Any) -> None:
    """A read brings it in, without protection: the write after it makes no fault, and only the sum tells."""
    memory = pool.array(data("walk", 64 * FOLIO, 1).view(np.int64).reshape(64, WORDS))
    model = np.array(memory)
    for turn in range(3):
        out(pool)
        assert np.array_equal(memory, model)
        faults = pool.stats().faults
        model[turn::7, turn] += 1
        memory[turn::7, turn] += 1
        assert pool.stats().faults == faults
        out(pool)
    assert np.array_equal(memory, model)
    check_pool(pool)


def test_a_process_that_ends_while_windows_are_made_ends_well() -> None:
    result = run_python(
        "import numpy as np, userswap\n"
        "pool = userswap.Pool(ram='128MiB')\n"
        "x = pool.array(np.arange(20 << 20))\n"
        "pool.evict(); pool.evict()\n"
        "print(x[: 1 << 21].sum())\n"
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert int(result.stdout) == (1 << 21) * ((1 << 21) - 1) // 2


def test_frames_are_copied_where_they_may_not_be_moved() -> None:
    """As on kernels before 6.8: the same answers, with a fault for each folio."""
    result = run_python(
        "import os; os.environ |= {'USERSWAP_FRAMES': 'copy', 'USERSWAP_DELIVERY': 'signal'}\n"
        "import numpy as np, userswap\n"
        "pool = userswap.Pool(ram='128MiB')\n"
        "x = pool.array(np.arange(4 << 20))\n"
        "pool.evict(); pool.evict()\n"
        "x[1000] += 1; total = x.sum(); s = pool.stats()\n"
        "print(total == (4 << 20) * ((4 << 20) - 1) // 2 + 1, s.faults >= 512, s.readahead)\n"
    )
    assert (result.returncode, result.stderr, result.stdout) == (0, "", "True True 0\n")


def test_a_pool_without_memory_for_windows_says_nothing_and_works() -> None:
    """The least budget: no windows, no readahead."""
    small = fresh_pool(swap="none")
    memory = small.array(data("small", 200 * FOLIO, 1))
    model = data("small", 200 * FOLIO, 1)
    for _ in range(3):
        out(small)
        assert np.array_equal(memory, model)
    assert small.stats().readahead == 0
    with pytest.raises(UserswapError):
        fresh_pool("1MiB")


def test_background_reclaim_starved_a_program_that_nothing_could_leave() -> None:
    """Over the budget, with nowhere to go: it threw out all that the program worked with, again and again."""
    program = (
        "import numpy as np, userswap\n"
        "a = np.cumsum(np.random.default_rng(1).integers(-9, 10, 3_000_000)) / 100\n"
        "pool = userswap.Pool(ram='16MiB', swap='none', dedupe=False)\n"
        "x = pool.array(a)\n"
        "x.sort()\n"
        "a.sort()\n"
        "print(np.array_equal(a, x), pool.stats().faults < 20_000)\n"
    )
    result = run_python(program)
    assert (result.returncode, result.stdout) == (0, "True True\n"), result.stderr


def test_a_page_thrown_away_under_a_check_of_its_copy_can_be_written_again() -> None:
    """A clean folio that stays is summed in place; a page that is missing must not come back protected for ever."""
    program = (
        "import ctypes, numpy as np, userswap\n"
        "libc = ctypes.CDLL(None, use_errno=True)\n"
        "pool = userswap.Pool(ram='16MiB', swap='none')\n"
        "x = pool.array(np.arange(1 << 17))\n"
        "for turn in range(8):\n"
        "    pool.evict(); pool.evict()\n"
        "    for folio in (9, 5, 2):\n"
        "        x[folio << 13]\n"
        "        page = x[(folio << 13) + 1024 : (folio << 13) + 1536]\n"
        "        assert libc.madvise(ctypes.c_void_p(page.ctypes.data), 4096, 4) == 0\n"
        "    pool.evict(1)\n"
        "    for folio in (9, 5, 2):\n"
        "        x[(folio << 13) + 1024 : (folio << 13) + 1536] += turn + 1\n"
        "        assert (x[(folio << 13) + 1024 : (folio << 13) + 1536] == turn + 1).all()\n"
        "        assert x[(folio << 13) + 1536] == (folio << 13) + 1536\n"
    )
    result = run_python(program)
    assert (result.returncode, result.stderr) == (0, "")


def test_what_lies_behind_a_short_last_folio_was_not_filled() -> None:
    """The last window was moved as a whole though its last folio is short: its bytes were charged and never given back,
    and the page behind the array's end was still there when another array began to use it."""
    pool = fresh_pool(RAM)
    size = 3 * WINDOW * FOLIO
    for _ in range(2):
        memory = pool.empty(size - 4096, np.uint8)
        for first in range(0, len(memory), FOLIO):
            memory[first : first + FOLIO] = 7
        for _ in range(3):
            out(pool)
            assert all((memory[first : first + FOLIO] == 7).all() for first in range(0, len(memory), FOLIO))
        del memory
        check_empty(pool)
    assert not pool.zeros(size, np.uint8).any()


def test_an_array_was_freed_while_another_thread_gave_its_ready_windows_back(pool: Any) -> None:
    """Who gave them back did so after the job was free, and looked at a region that had gone meanwhile."""
    kept, versions = filled(pool), np.zeros(FOLIOS, np.int64)
    stop = threading.Event()

    def comes_and_goes() -> None:
        try:
            for turn in range(1, 101):
                memory = pool.full((4 * WINDOW, WORDS), turn)
                pool.evict(16 << 20)
                ready = pool.stats().readahead
                for folio in range(WINDOW + 1):
                    assert memory[folio, 0] == turn
                end = time.monotonic() + 0.005
                while pool.stats().readahead == ready and time.monotonic() < end:
                    pass
                del memory
        finally:
            stop.set()

    def evicts() -> None:
        while not stop.is_set():
            pool.evict(1)

    together(comes_and_goes, evicts)
    scan(kept, versions)
    check_pool(pool)
    del kept
    check_empty(pool)


def test_a_folio_that_could_not_be_moved_away_was_protected_no_more() -> None:
    """Two holders have its id, so it is taken for clean without a look. A page of its neighbour is missing: what
    had been moved came back, and a write to it before it left made no fault and was lost."""
    pool = fresh_pool("32MiB", swap="none")
    memory = pool.array(data("walk", WINDOW * FOLIO, 1).view(np.int64).reshape(WINDOW, WORDS))
    libc = ctypes.CDLL(None)
    go, done = [0], [0]

    def writes() -> None:
        for turn in range(1, 81):
            while go[0] != turn:
                if go[0] < 0:
                    return
                time.sleep(0)
            for _ in range(turn * 3):
                pass
            memory[turn % WINDOW, :16] = turn
            done[0] = turn

    def evicts() -> None:
        try:
            for turn in range(1, 81):
                memory.sum()
                snapshot = pool.snapshot(memory)
                page = ctypes.c_void_p(memory[WINDOW - 1, -512:].ctypes.data)
                assert libc.madvise(page, ctypes.c_size_t(4096), 4) == 0
                go[0] = turn
                pool._core.evict(WINDOW * FOLIO)
                while done[0] != turn:
                    time.sleep(0)
                assert (memory[turn % WINDOW, :16] == turn).all(), turn
                del snapshot
        finally:
            go[0] = -1

    together(writes, evicts)
    check_pool(pool)


def test_two_threads_come_for_one_window_at_once(pool: Any) -> None:
    """Who finds a folio of a READY window taken leaves the window alone."""
    memory, versions = filled(pool), np.zeros(FOLIOS, np.int64)
    for turn in range(12):
        out(pool)
        scan(memory, versions, 0, 3 * WINDOW)
        time.sleep(0.004)
        pair = np.array([3 * WINDOW + turn, 3 * WINDOW + 31 - turn])
        versions[pair] += 1
        fresh = stamp(pair, versions[pair])
        barrier = threading.Barrier(2)

        def comes(i: int, pair: Array = pair, fresh: Array = fresh, barrier: threading.Barrier = barrier) -> None:
            barrier.wait()
            memory[pair[i]] = fresh[i]

        together(partial(comes, 0), partial(comes, 1))
        scan(memory, versions, 3 * WINDOW, 4 * WINDOW)
        check_pool(pool)


def test_ids_that_end_beside_a_scan(pool: Any) -> None:
    """Whether a neighbour's id is shared was asked before the neighbour was held: it may be nobody's by then."""
    memory, versions = filled(pool), np.zeros(FOLIOS, np.int64)
    part = memory[: 8 * WINDOW]
    stop = threading.Event()

    def scans() -> None:
        try:
            for _ in range(6):
                pool.evict(32 << 20)
                scan(memory, versions, 0, 8 * WINDOW)
        finally:
            stop.set()

    def snapshots() -> None:
        while not stop.is_set():
            old = pool.snapshot(part)
            for folio in range(0, 8 * WINDOW, 3):
                memory[folio, 0] = memory[folio, 0]
            del old

    together(scans, snapshots)
    check_pool(pool)


def test_what_nobody_needs_yet_does_not_exceed_the_budget() -> None:
    """There is room for the folio that is wanted, and not for the window that it is in."""
    pool = fresh_pool(RAM, swap="none")
    memory = pool.empty(160 << 20, np.uint8)
    stats = pool.stats()
    room = (stats.budget_bytes - stats.resident_bytes - stats.pool_bytes - stats.metadata_bytes) // FOLIO
    noise = data("noise", FOLIO, 1)
    before = [pool.array(noise) for _ in range((room - WINDOW // 2) % WINDOW)]
    for folio in range((room - len(before)) // WINDOW * WINDOW + 2):
        memory[folio * FOLIO : (folio + 1) * FOLIO] = noise
    assert pool.stats().over_budget == 0
    check_pool(pool)


def test_a_write_anywhere_in_a_folio_is_noticed(pool: Any) -> None:
    """Folios that came by a read are told from their copies by their sums: every byte counts, and where it is."""
    memory = pool.array(data("walk", 3 * WINDOW * FOLIO, 2).reshape(3 * WINDOW, FOLIO))
    out(pool)
    model = np.array(memory)
    faults = pool.stats().faults
    for folio in range(64):
        at = folio * 1024 + folio * 37 % 1024  # in every KiB, and in every word of four
        for array in (memory, model):
            array[folio, at] ^= 1 << folio % 8
    for array in (memory, model):
        array[64, :2048] = np.roll(array[64, :2048], 1024)  # two blocks of the sum, exchanged
        array[65, 1024:1056] = np.roll(array[65, 1024:1056], 16)
    assert pool.stats().faults == faults, "no write was noticed by its fault"
    out(pool)
    assert np.array_equal(memory, model)
    check_pool(pool)


# ---- windows of which something is in a swap file ----

FAR = """
import os, sys
kind, cpus = sys.argv[1], int(sys.argv[2])
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cpus])
from pathlib import Path
import numpy as np
sys.path.insert(0, sys.argv[3])
from helpers import check_empty, check_pool, data, fresh_pool

WINDOW, FOLIO, FOLIOS, SPARED = 32, 1 << 16, 256, 5

def reads():
    return int(Path("/proc/self/io").read_text().split("syscr: ")[1].split()[0])

def right(first):
    # Of mixed sizes: the pool, and so the file, has them in another order than the array.
    kinds = ["small", "walk"] if kind == "mixed" else [kind, kind]
    rows = np.stack([data(kinds[folio % 2], FOLIO, folio) for folio in range(first, first + WINDOW)])
    for i in range(WINDOW):
        if (first + i) % SPARED == 0:
            rows[i] = i + 1
    return rows

pool = fresh_pool("128MiB")
memory = pool.empty((FOLIOS, FOLIO), np.uint8)
for first in range(0, FOLIOS, WINDOW):
    memory[first : first + WINDOW] = right(first)
for turn in range(2):
    pool.evict()
    pool.evict()
    if turn == 0:
        pool.writeback(1 << 30)
        for folio in range(3, FOLIOS, 16):
            # Written, not read before: it leaves a gap in the file, which is not worth a request more.
            memory[folio, 0] = right(folio - folio % WINDOW)[folio % WINDOW, 0]
        pool.evict()
        pool.evict()
    stats, before, wrong = pool.stats(), reads(), []
    assert stats.resident_bytes == 0 and stats.slot_bytes > 0
    for first in range(0, FOLIOS, WINDOW):
        if not np.array_equal(memory[first : first + WINDOW], right(first)):
            wrong.append(first)
    asked = reads() - before
    assert not wrong, wrong
    check_pool(pool)
print(asked, pool.stats().readahead > 0)
del memory
check_empty(pool)
"""


def far(kind: str, cpus: int, **environment: str) -> int:
    """Requests that a scan takes of 190 folios or more in a swap file, among others that are not."""
    result = run_python(FAR, kind, str(cpus), str(Path(__file__).parent), environment=environment)
    assert (result.returncode, result.stderr) == (0, "")
    asked, ahead = result.stdout.split()
    assert ahead == str(cpus > 1)
    return int(asked)


@only_quiet
@pytest.mark.parametrize("cpus", [1, 2])
@pytest.mark.parametrize(("kind", "most"), [("small", 40), ("mixed", 78), ("noise", 65)])
def test_what_lies_together_in_the_file_is_read_together(kind: str, most: int, cpus: int) -> None:
    if len(os.sched_getaffinity(0)) < cpus:
        pytest.skip("readahead needs a second processor")
    # The first windows come folio by folio: faults follow each other before they are whole.
    # Where ids are slots, a folio has its place in the file for good, whatever left before it.
    assert far(kind, cpus) <= (100 if os.environ.get("USERSWAP_MAP") in BOUND else most)


SHORT = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <stdlib.h>
#include <sys/types.h>
#include <sys/uio.h>
/* What should be read by one request is not, or only in part; and what was read up to there is nothing to rely on. */
static ssize_t cut(int fd, const struct iovec *parts, int n, off_t at) {
    for (int i = 0; i < n; i++)
        for (size_t j = 0; j < parts[i].iov_len; j++) ((char *)parts[i].iov_base)[j] = 0x5a;
    if (getenv("SHORT")[0] == 'e') { errno = EIO; return -1; }
    return n > 1 ? preadv2(fd, parts, n - 1, at, 0) : 0;
}
ssize_t preadv(int fd, const struct iovec *parts, int n, off_t at) { return cut(fd, parts, n, at); }
ssize_t preadv64(int fd, const struct iovec *parts, int n, off64_t at) { return cut(fd, parts, n, at); }
"""


@only_moved
@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler to build the library that cuts requests short")
def test_what_can_not_be_read_together_is_read_one_by_one(tmp_path: Path) -> None:
    (tmp_path / "short.c").write_text(SHORT)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "short.so", tmp_path / "short.c"], check=True)
    cpus = min(2, len(os.sched_getaffinity(0)))
    for kind, how in (("small", "short"), ("noise", "error")):
        assert far(kind, cpus, LD_PRELOAD=str(tmp_path / "short.so"), SHORT=how) >= 190


def test_what_was_made_ready_is_used(pool: Any) -> None:
    """A scan that comes while its window is made finds all of it, and need not make it once more."""
    memory, versions = filled(pool), np.zeros(FOLIOS, np.int64)
    for _ in range(4):
        out(pool)
        scan(memory, versions)
    stats = pool.stats()
    if stats.readahead == 0:
        pytest.skip("readahead needs a second processor")
    assert stats.readahead_hits > 0.97 * stats.readahead


def test_the_folio_that_a_window_came_for_has_no_copy_any_more_if_it_was_written_to(pool: Any) -> None:
    memory, versions = filled(pool), np.zeros(FOLIOS, np.int64)
    out(pool)
    for turn in range(4):  # by readahead or not: whatever comes first
        at = turn * 8 * WINDOW
        out(pool)  # what was dirty before, too: a small budget may have room for one of the two only
        scan(memory, versions, at, at + 5 * WINDOW)
        before = pool._core.check()["dirty"]
        assert before == 0
        versions[at + 5 * WINDOW] = 1
        memory[at + 5 * WINDOW, 0] = stamp(np.array([at + 5 * WINDOW]), np.array([1]))[0, 0]
        assert pool._core.check()["dirty"] == before + 1
        memory[at + 5 * WINDOW] = stamp(np.array([at + 5 * WINDOW]), np.array([1]))[0]
    scan(memory, versions)


def test_a_window_that_could_not_be_read_is_not_ready(tmp_path: Path) -> None:
    """The swap file lost its end: what is there comes, and not a wrong byte of what is not."""
    path = tmp_path / "swap"
    path.touch()
    result = run_python(
        """
import os, sys, time, numpy as np
from helpers import fresh_pool
import test_readahead as t
path = sys.argv[1]
pool = fresh_pool(t.RAM, swap=f"{path}:512M")
memory, versions = t.filled(pool), np.zeros(t.FOLIOS, np.int64)
t.out(pool)
while pool.stats().stored_bytes > pool.stats().slot_bytes:
    pool.writeback()
os.truncate(path, os.path.getsize(path) // 2)
last = 0
try:
    for at in range(0, t.FOLIOS, t.WINDOW):
        print(at, flush=True)
        time.sleep(0.005)               # readahead is faster
        t.scan(memory, versions, at, at + t.WINDOW)
except AssertionError:
    print("wrong bytes", flush=True)
print("went on", flush=True)
""",
        str(path),
    )
    assert result.returncode == -signal.SIGBUS, result
    assert "wrong" not in result.stdout and "went on" not in result.stdout
    assert int(result.stdout.split()[-1]) > 0, "what is there came"
    assert "Input/output error (slot " in result.stderr


@only_moved
def test_a_scan_downwards_brings_whole_windows() -> None:
    """A partition of a sort reads from both ends: what came from above must not pass for access anywhere."""
    pool = fresh_pool(RAM)
    memory = filled(pool)
    out(pool)
    before = pool.stats()
    expected = stamp(np.arange(FOLIOS), np.zeros(FOLIOS, np.int64))
    for folio in range(FOLIOS - 1, -1, -1):
        assert memory[folio, -1] == expected[folio, -1]
        assert memory[folio, 0] == expected[folio, 0]
    after = pool.stats()
    assert after.part_ins == before.part_ins
    assert after.faults - before.faults < FOLIOS // 8
    scan(memory, np.zeros(FOLIOS, np.int64))
    check_pool(pool)


def test_a_scan_from_both_ends_to_the_middle() -> None:
    pool = fresh_pool(RAM)
    memory = filled(pool)
    out(pool)
    before = pool.stats()
    versions = np.zeros(FOLIOS, np.int64)
    for low in range(FOLIOS // 2):
        for folio in (low, FOLIOS - 1 - low):
            memory[folio] += 1 << 20
            versions[folio] += 1
    assert pool.stats().part_ins == before.part_ins
    out(pool)
    scan(memory, versions)
    check_pool(pool)


STALE = """
import os, sys
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])    # no thread: faults make windows
import numpy as np
sys.path.insert(0, sys.argv[2])
from helpers import FOLIO, check_pool, data, fresh_pool
path, window, read = sys.argv[1], 32, 6 * 32
pool = fresh_pool("128MiB", swap=f"{path}:64M")
plain = data("walk", 2560 * FOLIO, 1)
memory = pool.array(plain)
pool.evict()
pool.writeback(20 << 20)
assert memory[: read * FOLIO].sum() == plain[: read * FOLIO].sum()
pool.evict()                            # so they left a moment ago: what comes now is hot
blocks = range(0, os.path.getsize(path), 1 << 20)
with open(path, "r+b") as file:
    for at in blocks:                   # each of one folio
        file.seek(at)
        file.write(bytes(4096))
damaged = wrong = 0
out = os.open(sys.argv[1] + ".out", os.O_RDWR | os.O_CREAT)
for folio in range(read):
    try:
        os.pwrite(out, memory[folio * FOLIO : (folio + 1) * FOLIO], 0)
    except OSError:
        damaged += 1
        continue
    wrong += os.pread(out, FOLIO, 0) != plain[folio * FOLIO : (folio + 1) * FOLIO].tobytes()
print(len(blocks), damaged, wrong, pool.stats().promotions, pool._core.check()["wrong"])
"""


def test_a_window_that_came_to_nothing_after_folios_moved_to_zswap_uses_their_new_ids(tmp_path: Path) -> None:
    """Its words were remembered from before: their slots were free by then, or somebody else's."""
    path = tmp_path / "swap"
    path.touch()
    result = run_python(STALE, str(path), str(Path(__file__).parent))
    assert result.returncode == 0, result.stderr
    blocks, damaged, wrong, promotions, counts = (int(word) for word in result.stdout.split())
    assert (wrong, counts) == (0, 0)
    assert 1 <= damaged <= blocks, "only those that are damaged can't be had"
    if os.environ.get("USERSWAP_MAP") not in BOUND:
        assert promotions > 50


def passes(pool: Any, memory: Pages, folios: range, count: int) -> list[int]:
    """How many folios come in each time these are read in order."""
    came = []
    for _ in range(count):
        before = pool.stats().swap_ins
        scan(memory, np.zeros(FOLIOS, np.int64), folios.start, folios.stop)
        came.append(pool.stats().swap_ins - before)
    return came


@only_moved
def test_of_what_is_gone_over_again_and_again_a_part_stays() -> None:
    """Whoever lets go what was used longest ago lets go what is wanted next, and brings all of it, each time."""
    pool = fresh_pool("128MiB")
    memory, versions = filled(pool), np.zeros(FOLIOS, np.int64)  # 160 MiB, packed 24
    out(pool)
    came = passes(pool, memory, range(FOLIOS), 6)
    assert min(came[3:]) > 0, "not all of it fits"
    assert max(came[3:]) < 0.7 * FOLIOS, came
    check_pool(pool)
    for turn in (1, 2):  # and written to: what stays is not packed
        versions[:] = turn
        for i in range(0, FOLIOS, WINDOW):
            memory[i : i + WINDOW] = stamp(np.arange(i, i + WINDOW), versions[i : i + WINDOW])
        scan(memory, versions)
    check_pool(pool)
    del memory
    check_empty(pool)


@only_moved
def test_what_is_dead_does_not_stay_for_ever_while_others_go_round() -> None:
    pool = fresh_pool("128MiB")
    memory = filled(pool)
    out(pool)
    passes(pool, memory, range(FOLIOS), 3)
    alive = range(FOLIOS // 4, FOLIOS)  # 120 MiB: just more than can be in place
    came = passes(pool, memory, alive, 30)
    assert max(came[20:]) < 0.4 * len(alive), came
    came = passes(pool, memory, range(FOLIOS // 4, FOLIOS // 2), 12)
    assert min(came) < FOLIOS // 16, "what would fit is in place in the end"
    check_pool(pool)


def test_windows_that_pass_may_go_with_their_array() -> None:
    pool = fresh_pool("128MiB")
    memory, versions = filled(pool), np.zeros(FOLIOS, np.int64)
    out(pool)
    for turn in range(3):
        other = pool.array(data("walk", 96 << 20, turn))
        scan(memory, versions)
        assert int(other[::4096].max()) <= 255
        scan(memory, versions, 0, FOLIOS // 2)
        check_pool(pool)
        del other
        scan(memory, versions)
    check_pool(pool)
    del memory
    check_empty(pool)
