"""The budget is a promise about the process's real memory: measured from outside, by RSS and by a memory cgroup."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from helpers import DELIVERY, FOLIO, check_pool, data, fresh_pool, memory_cgroup, run_python

MIB = 1 << 20

RSS = """
import sys, numpy as np, userswap
def rss():
    with open("/proc/self/smaps_rollup") as f:
        return next(int(l.split()[1]) for l in f if l.startswith("Rss:")) * 1024
kind = sys.argv[1]
rng = np.random.default_rng(1)
np.round(np.cumsum(rng.standard_normal(1 << 17)), 2)        # what the interpreter and NumPy need anyway
userswap.Pool                                               # the libraries, loaded at the first use
before = rss()
pool = userswap.Pool(ram="96MiB")
array = pool.empty((256, 1 << 17))                          # 256 MiB
worst = 0
for turn in range(2):
    for i in range(256):
        if kind == "walk":
            array[i] = np.round(np.cumsum(rng.standard_normal(1 << 17)), 2)
        else:
            array[i] = rng.random(1 << 17)
        if i % 4 == 0:
            worst = max(worst, rss() - before)
    for i in rng.integers(0, 256, 256):
        array[i, :1000] += 1
        array[i].sum()
        if i % 8 == 0:
            worst = max(worst, rss() - before)
s = pool.stats()
print(worst, s.peak_bytes, s.budget_bytes, s.resident_bytes + s.pool_bytes + s.metadata_bytes, s.writebacks)
"""


@pytest.mark.parametrize("kind", ["walk", "noise"])
def test_rss_stays_within_the_budget_and_two_percent(kind: str) -> None:
    """`noise` does not compress: it all goes through the swap file."""
    result = run_python(RSS, kind)
    assert result.returncode == 0, result.stderr
    worst, peak, budget, _, writebacks = map(int, result.stdout.split())
    assert budget == 96 * MIB
    assert peak <= budget * 1.02
    # beside the pool: row buffers of 1 MiB that the program itself makes
    assert worst <= budget * 1.02 + 3 * MIB, f"{worst / MIB:.1f} MiB of RSS for a budget of {budget / MIB:.0f}"
    assert worst > budget * 0.8, "and the budget is used"
    assert writebacks > 100


SMALL = """
import sys, threading, numpy as np, userswap
ram, kind = int(sys.argv[1]), sys.argv[2]
rng = np.random.default_rng(1)
STEP, THREADS = 1 << 14, 4
blocks = [np.round(np.cumsum(rng.standard_normal(STEP)), 2) if kind == "walk" else rng.random(STEP) for _ in range(32)]
userswap.Pool                                               # the libraries, loaded at the first use
def status(name):
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) << 10 for line in f if line.startswith(name))
with open("/proc/self/clear_refs", "w") as f:
    f.write("5")                                            # forget the peak
before = status("VmRSS")
pool = userswap.Pool(ram=ram)
array = pool.empty(ram * 5 // 2 // 8 // STEP * STEP)
rows = array.reshape(-1, STEP)
wrong = []
def work(t):
    mine = range(len(rows) * t // THREADS, len(rows) * (t + 1) // THREADS)
    for turn in range(3):
        for i in mine:
            if turn == 0:
                np.add(blocks[i % 32], i, out=rows[i])
            elif turn == 1:
                np.add(rows[i], 1, out=rows[i])
            elif not np.array_equal(rows[i], blocks[i % 32] + i + 1):
                wrong.append(i)
threads = [threading.Thread(target=work, args=[t]) for t in range(THREADS)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
s = pool.stats()
faults = s.faults / (3 * len(array) / 8192)                 # for each folio and turn
print(status("VmHWM") - before, s.peak_bytes, s.over_budget, faults, s.readahead, len(wrong))
"""


@pytest.mark.parametrize("kind", ["walk", "noise"])
@pytest.mark.parametrize("ram", [32 * MIB, 64 * MIB])
def test_a_small_budget_holds_when_several_threads_bring_windows(ram: int, kind: str) -> None:
    """Windows come from 32 MiB on: what is under way of four threads and ours at once is a good part of that."""
    result = run_python(SMALL, str(ram), kind)
    assert result.returncode == 0, result.stderr
    worst, peak, over, faults, readahead, wrong = result.stdout.split()
    assert (wrong, over) == ("0", "0")
    assert float(faults) < 0.5, "windows come in one piece"
    if len(os.sched_getaffinity(0)) > 1 and DELIVERY != "segv":
        assert int(readahead) > 0
    assert int(peak) <= ram * 1.02
    # beside the pool: temporary rows and stacks of the threads
    assert int(worst) <= ram * 1.02 + 3 * MIB, f"{int(worst) / MIB:.1f} MiB of RSS for a budget of {ram / MIB:.0f}"


def run_in(group: Path, code: str, *args: str) -> subprocess.CompletedProcess[str]:
    enter = f"import os; open({str(group / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
    return run_python(enter + code, *args)


INSIDE = """
import sys, numpy as np
if sys.argv[1] == "swap":
    import userswap
    installation = userswap.install(ram="64MiB")
arrays = [np.round(np.cumsum(np.random.default_rng(i).standard_normal(1 << 20)), 2) for i in range(24)]   # 192 MiB
for i, array in enumerate(arrays):
    assert np.array_equal(array, np.round(np.cumsum(np.random.default_rng(i).standard_normal(1 << 20)), 2))
print("whole")
"""


def test_a_memory_cgroup_of_budget_and_interpreter_does_not_kill_the_program() -> None:
    with memory_cgroup((64 + 48) * MIB) as group:
        plain = run_in(group, INSIDE, "plain")
        assert plain.returncode == -9, "without userswap it is killed: the limit is real"
        swapped = run_in(group, INSIDE, "swap")
    assert swapped.returncode == 0, swapped.stderr
    assert swapped.stdout == "whole\n"


def test_the_pool_gives_memory_back_when_data_goes() -> None:
    pool = fresh_pool("64MiB")
    arrays = [pool.array(data("walk", 4 * MIB, i)) for i in range(20)]
    pool.evict()
    pool.evict()
    full = pool.stats().pool_bytes
    assert full > 8 * MIB
    del arrays[::2]
    pool._core.compact()
    half = pool.stats()
    assert half.pool_bytes < 0.6 * full
    arrays.clear()
    pool._core.compact()
    assert pool.stats().pool_bytes < MIB


def test_clean_folios_leave_without_being_compressed_again() -> None:
    pool = fresh_pool()
    array = pool.array(data("walk", 4 * MIB, 1))
    pool.evict()
    pool.evict()
    outs = pool.stats().swap_outs
    assert outs == 64
    for _ in range(3):
        array.sum()
        pool.evict()
        pool.evict()
        assert pool.stats().resident_bytes == 0
    assert pool.stats().swap_outs == outs
    array[0] ^= 1
    pool.evict()
    pool.evict()
    assert pool.stats().swap_outs == outs + 1


def test_same_filled_folios_take_no_storage() -> None:
    pool = fresh_pool()
    arrays = [pool.full(1 << 17, value) for value in (0.0, 1.0, -2.5)]
    whole = pool.full(1 << 17, 12345, np.int64)
    pool.evict()
    pool.evict()
    stats = pool.stats()
    assert stats.resident_bytes == 0
    assert stats.stored_bytes == 0
    assert stats.same_filled == 64
    for array, value in zip(arrays, (0.0, 1.0, -2.5), strict=True):
        assert np.array_equal(array, np.full(1 << 17, value))
    assert np.array_equal(whole, np.full(1 << 17, 12345))


def test_same_filled_means_every_word_and_only_values_that_an_entry_holds() -> None:
    """One word that differs, wherever it is, and 8-byte values whose two halves differ: those need storage."""
    pool = fresh_pool()
    words = FOLIO // 8
    places = [
        0,
        1,
        7,
        8,
        15,
        words // 4,
        words // 2 - 1,
        words // 2,
        words // 2 + 1,
        3 * words // 4,
        words - 2,
        words - 1,
    ]
    almost = [pool.full(words, 7, np.int64) for _ in places]
    for array, place in zip(almost, places, strict=True):
        array[place] = 8
    odd = [0.1, -1 / 3, np.nan, np.inf, -0.0, 1e300, 5e-324]
    whole = [0, 1, -1, -2, 2**31, 2**32, 2**32 + 1, 2**63 - 1, -(2**63), 0x1234567812345678, 0x1234567887654321]
    floats = [pool.full(words, value) for value in odd]
    integers = [pool.full(words, value, np.int64) for value in whole]
    for _ in range(2):
        pool.evict()
    stats = pool.stats()
    assert stats.resident_bytes == 0
    bits = [*np.array(odd).view(np.uint64).tolist(), *np.array(whole).view(np.uint64).tolist()]
    fits = [low == high or not low or not high for low, high in ((v & 0xFFFFFFFF, v >> 32) for v in bits)]
    assert 5 < sum(fits) < len(bits) - 3, "both kinds are there"
    assert stats.same_filled == sum(fits)
    for array, place in zip(almost, places, strict=True):
        model = np.full(words, 7)
        model[place] = 8
        assert np.array_equal(array, model), place
    for array, value in zip(floats, odd, strict=True):
        assert array.tobytes() == np.full(words, value).tobytes(), value
    for array, value in zip(integers, whole, strict=True):
        assert np.array_equal(array, np.full(words, value)), value


def test_the_books_of_the_budget_add_up() -> None:
    """What counts against the budget is within it, and the peak is what was really used."""
    pool = fresh_pool()
    array = pool.empty((40, 1 << 17))
    most = 0
    for i in range(40):
        array[i] = data("walk", MIB, i).view(float)
        stats = pool.stats()
        used = stats.resident_bytes + stats.pool_bytes + stats.metadata_bytes
        most = max(most, used)
        assert used <= stats.peak_bytes <= stats.budget_bytes
    assert most > 0.9 * stats.budget_bytes


def test_fault_times_agree_with_one_another() -> None:
    """Half of the faults take the median and more (within a bucket's sixteenth): so much the total must be."""
    pool = fresh_pool("32MiB", swap="none")
    array = pool.array(data("walk", 8 * MIB, 1))
    for _ in range(4):
        pool.evict()
        array[::4096].sum()
    stats = pool.stats()
    assert stats.faults >= 3 * 8
    assert 0 < stats.fault_ns_p50 <= stats.fault_ns_p99 <= stats.fault_ns_total
    assert stats.fault_ns_total >= stats.faults / 2 * stats.fault_ns_p50 * 0.93


def test_compaction_makes_room_before_the_budget_is_exceeded() -> None:
    """Without a swap file, holes in the pool are the only room that there is."""
    pool = fresh_pool("24MiB", swap="none")
    arrays = [pool.array(data("walk", FOLIO, i)) for i in range(560)]
    assert pool.stats().over_budget == 0
    pool.evict()
    full = pool.stats().pool_bytes
    assert full > 12 * MIB
    del arrays[::2]  # holes of a size that the next data does not have
    more = [pool.array(data("small", FOLIO, i)) for i in range(700)]
    stats = check_pool(pool)
    assert stats.over_budget == 0
    assert all(np.array_equal(array, data("small", FOLIO, i)) for i, array in enumerate(more))
    assert all(np.array_equal(array, data("walk", FOLIO, 2 * i + 1)) for i, array in enumerate(arrays))


def test_import_is_light() -> None:
    code = "import sys, numpy; before = set(sys.modules); import userswap; print(*sorted(set(sys.modules) - before))"
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    loaded = set(result.stdout.split())
    assert not {name for name in loaded if name.split(".")[0] in ("blosc2", "rich", "httpx", "msgpack", "numexpr")}
