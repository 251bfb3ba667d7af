"""Programs that do to memory, signals and processes what few do: nothing may be lost or killed by it."""

from __future__ import annotations

import subprocess
from pathlib import Path

from helpers import run_python

PRELUDE = """
import ctypes, os, signal, subprocess, sys, threading, time, numpy as np, userswap
from helpers import values
libc = ctypes.CDLL(None, use_errno=True)
PAGE, FOLIO = 4096, 1 << 16
def at(array): return array.__array_interface__["data"][0]
def madvise(address, length, advice):
    error = libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), advice)
    if error: raise OSError(ctypes.get_errno(), "madvise")
"""


def runs(code: str) -> None:
    result = run_python(PRELUDE + code)
    assert result.returncode == 0, f"{result.returncode}\n{result.stdout}\n{result.stderr}"


def test_folios_that_compress_leave_although_a_neighbour_does_not() -> None:
    runs("""
pool = userswap.Pool(ram="64MiB", swap="none")
array = pool.empty((256, FOLIO), dtype=np.uint8)
array[:] = 7
array[::16] = np.random.default_rng(1).integers(0, 256, (16, FOLIO), dtype=np.uint8)
kept = array[::16].copy()
for _ in range(3): pool.evict()
assert pool.stats().resident_bytes == 16 * FOLIO, pool.stats().resident_bytes // FOLIO
assert np.array_equal(array[::16], kept) and (array[1::16] == 7).all()
""")


def test_a_locked_mapping_keeps_its_folios_and_loses_no_write() -> None:
    runs("""
def whole(i): return np.floor(values(i))
pool = userswap.Pool(ram="32MiB", swap="none")
array = pool.empty((24, 1 << 17))
for i in range(24): array[i] = whole(i)
libc.mlock(ctypes.c_void_p(at(array)), ctypes.c_size_t(array.nbytes // 2))      # may not populate; it locks
for turn in range(1, 4):
    pool.evict()
    for i in range(24): assert np.array_equal(array[i], whole(i) + (turn - 1)), (turn, i)
    pool.evict()
    for i in range(24): array[i] += 1
libc.munlockall()
pool.evict()
for i in range(24): assert np.array_equal(array[i], whole(i) + 3), i
assert pool._core.check()["wrong"] == 0
del array
assert pool.stats().resident_bytes == pool.stats().swap_ids == 0
fresh = pool.empty((24, 1 << 17))
assert not fresh.any()
""")


def test_a_mapping_split_inside_a_folio_is_filled_all_the_same() -> None:
    runs("""
MADV_SEQUENTIAL = 2
pool = userswap.Pool(ram="32MiB", swap="none")
array = pool.empty((8, 1 << 17))
for i in range(8): array[i] = values(i)
pool.evict()
for k in range(3, 128, 7): madvise(at(array) + k * FOLIO + 5 * PAGE, 3 * PAGE, MADV_SEQUENTIAL)
for i in range(8): assert np.array_equal(array[i], values(i)), i
pool.evict()
for i in range(8): array[i] += 1
pool.evict()
for i in range(8): assert np.array_equal(array[i], values(i) + 1), i
fresh = pool.empty((8, 1 << 17))
madvise(at(fresh) + 5 * PAGE, 3 * PAGE, MADV_SEQUENTIAL)
fresh[:] = 3
assert (fresh == 3).all()
""")


def test_a_vforked_child_does_not_take_the_parents_sigbus_handler_away() -> None:
    runs("""
pool = userswap.Pool(ram="32MiB", swap="none")
got = []
signal.signal(signal.SIGBUS, lambda *_: got.append(1))
for turn in range(3):
    subprocess.run(["true"], check=True, close_fds=False)
    os.kill(os.getpid(), signal.SIGBUS)
    assert len(got) == turn + 1
""")


def test_a_hardware_memory_error_goes_to_the_programs_handler() -> None:
    runs("""
import platform
pool = userswap.Pool(ram="32MiB", swap="none")
array = pool.zeros(1 << 17)
array[:] = 1
got = []
signal.signal(signal.SIGBUS, lambda *_: got.append(1))
BUS_MCEERR_AR = 4
info = (ctypes.c_int * 32)()
info[0], info[1], info[2] = signal.SIGBUS, 0, BUS_MCEERR_AR
ctypes.c_uint64.from_buffer(info, 16).value = at(array)
SYS_rt_sigqueueinfo = {"x86_64": 129, "aarch64": 138}[platform.machine()]
assert libc.syscall(SYS_rt_sigqueueinfo, os.getpid(), int(signal.SIGBUS), info) == 0
for _ in range(1000): pass
assert got == [1], got
""")


def test_a_forked_child_needs_no_spare_file_descriptor() -> None:
    runs("""
import resource
pool = userswap.Pool(ram="32MiB", swap="none")
array = pool.empty((4, 1 << 17))
for i in range(4): array[i] = values(i)
pool.evict()
resource.setrlimit(resource.RLIMIT_NOFILE, (200, 200))
taken = []
try:
    while True: taken.append(os.dup(0))
except OSError: pass
pid = os.fork()
if pid == 0: os._exit(0 if all(np.array_equal(array[i], values(i)) for i in range(4)) else 3)
assert os.waitpid(pid, 0)[1] == 0
""")


def test_a_pool_may_be_closed_while_another_thread_evicts() -> None:
    runs("""
sys.setswitchinterval(1e-5)
for turn in range(60):
    pool = userswap.Pool(ram="32MiB", swap="none")
    array = pool.empty((2, 1 << 17))
    array[0] = values(1)
    core = pool._core
    del array
    go = threading.Barrier(3)
    def work(what):
        go.wait()
        try:
            for _ in range(200): what()
        except ValueError: pass
    threads = [threading.Thread(target=work, args=(f,)) for f in (lambda: core.evict(1 << 20), core.compact)]
    for t in threads: t.start()
    go.wait()
    pool.close()
    for t in threads: t.join()
""")


def test_closing_every_descriptor_does_not_turn_swapped_arrays_into_zeros() -> None:
    runs("""
pool = userswap.Pool(ram="16MiB")
array = pool.empty((32, 1 << 17))
for i in range(32): array[i] = values(i)
pool.writeback()
os.closerange(3, 4096)
for fd in range(3, 256):
    try: os.close(fd)
    except OSError: pass
for i in range(32): assert np.array_equal(array[i], values(i)), i
""")


def test_a_forked_child_that_closes_every_descriptor_keeps_its_slots() -> None:
    runs("""
import time
pool = userswap.Pool(ram="16MiB")
array = pool.empty((64, 1 << 17))
for i in range(64): array[i] = values(i)
pool.evict(); pool.writeback()
ready, go = os.pipe(), os.pipe()
pid = os.fork()
if pid == 0:
    keep = (ready[1], go[0])
    for fd in range(3, 256):
        if fd not in keep:
            try: os.close(fd)
            except OSError: pass
    os.write(ready[1], b"x")
    os.read(go[0], 1)
    os._exit(0 if all(np.array_equal(array[i], values(i)) for i in range(64)) else 3)
os.read(ready[0], 1)
for i in range(64): array[i] = values(i + 100)          # the parent gives up what the child may still read
pool.evict(); pool.writeback()
time.sleep(0.05)
for i in range(64): array[i] = values(i + 200)
pool.evict(); pool.writeback()
os.write(go[1], b"x")
assert os.waitpid(pid, 0)[1] == 0
""")


def test_growing_small_arrays_into_a_pool_gives_their_old_blocks_back() -> None:
    runs("""
def rss(): return int(open("/proc/self/statm").read().split()[1]) * PAGE
with userswap.install(ram="64MiB", swap="none", min_array="16MiB"):
    before = rss()
    for _ in range(8):
        array = np.ones(8 << 20, dtype=np.uint8)
        array.resize(17 << 20, refcheck=False)
        del array
    grown = rss() - before
assert grown < 24 << 20, grown >> 20
""")


def test_a_pool_works_after_the_wrappers_check_arena_had_sigbus() -> None:
    runs("""
from userswap.memory import _syscalls_check as check
userswap.Pool(ram="32MiB", swap="none").close()
check.start(64 << 16)
pool = userswap.Pool(ram="32MiB", swap="none")
array = pool.empty((4, 1 << 17))
for i in range(4): array[i] = values(i)
pool.evict()
assert all(np.array_equal(array[i], values(i)) for i in range(4))
""")


def test_a_page_thrown_away_while_it_is_swapped_out_loses_no_later_write() -> None:
    runs("""
import time
MADV_DONTNEED = 4
def raw_madvise(*arguments):                                    # behind the wrapper's back
    numbers = {"x86_64": 28, "aarch64": 233}
    assert libc.syscall(numbers[os.uname().machine], *map(ctypes.c_long, arguments)) == 0
pool = userswap.Pool(ram="32MiB", swap="none")
array = pool.empty((32, FOLIO), dtype=np.uint8)
for i in range(32): array[i] = values(i).view(np.uint8)[:FOLIO]
stop = threading.Event()
def evict():
    while not stop.is_set(): pool.evict()
thread = threading.Thread(target=evict)
thread.start()
bad = 0
end = time.monotonic() + 4
turn = 0
try:
    while time.monotonic() < end and not bad:
        turn += 1
        i = turn % 32
        array[i, 0] = 1                                         # resident and dirty
        raw_madvise(at(array[i]) + PAGE, 15 * PAGE, MADV_DONTNEED)
        for k in range(1, 16):
            for _ in range(turn % 50): pass
            array[i, k * PAGE + 100] = k
        for k in range(1, 16): bad += array[i, k * PAGE + 100] != k
finally:
    stop.set()
    thread.join()
assert not bad, turn
""")


def test_a_thread_that_is_cancelled_in_a_fault_finishes_the_fault_first(tmp_path: Path) -> None:
    source, library = tmp_path / "reader.c", tmp_path / "reader.so"
    source.write_text("""
        #include <pthread.h>
        #include <stddef.h>
        static volatile char *from; static size_t length;
        static volatile unsigned long sum;
        static void *work(void *arg) {
            for (;;) for (size_t i = 0; i < length; i += 4096) { sum += from[i]; pthread_testcancel(); }
        }
        int start(char *at, size_t n, pthread_t *thread) {
            from = at; length = n;
            return pthread_create(thread, NULL, work, NULL);
        }
        int stop(pthread_t thread) {
            void *result;
            pthread_cancel(thread);
            pthread_join(thread, &result);
            return result == PTHREAD_CANCELED;
        }
    """)
    subprocess.run(["gcc", "-shared", "-fPIC", "-pthread", "-o", library, source], check=True)
    runs(f"""
import time
reader = ctypes.CDLL("{library}")
reader.stop.argtypes = [ctypes.c_ulong]
pool = userswap.Pool(ram="16MiB")
noise = np.random.default_rng(1).integers(0, 256, (32, 1 << 20), dtype=np.uint8)
array = pool.array(noise)
for turn in range(40):
    thread = ctypes.c_ulong()
    assert reader.start(ctypes.c_void_p(at(array)), ctypes.c_size_t(array.nbytes), ctypes.byref(thread)) == 0
    time.sleep(0.003 + turn / 10000)
    assert reader.stop(thread)
assert pool._core.check()["wrong"] == 0         # waits for ever if somebody never left the gate
assert np.array_equal(array, noise)
""")


def test_what_a_program_throws_away_came_back_from_swap() -> None:
    runs("""
from helpers import check_empty, check_pool
MADV_DONTNEED, MADV_FREE, POPULATE_READ, POPULATE_WRITE = 4, 8, 22, 23
pool = userswap.Pool(ram="32MiB")
array = pool.empty((700, FOLIO), dtype=np.uint8)                # more than the budget, so in every state
model = np.empty((700, FOLIO), dtype=np.uint8)
rng = np.random.default_rng(1)
for i in range(700): array[i] = model[i] = values(i).view(np.uint8)[:FOLIO]
kept = pool.snapshot(array)
flat, expected = array.reshape(-1), model.reshape(-1)
before = expected.copy()
for turn in range(300):
    i = int(rng.integers(700))
    way = turn % 5
    if way == 0: array[i, 100] = model[i, 100] = 7              # DIRTY
    elif way == 1: assert array[i, 5] == model[i, 5]            # CLEAN, or PARTIAL
    elif way == 2: pool.evict(1 << 20)
    elif way == 3: pool.writeback(1 << 18)
    start = i * FOLIO + int(rng.choice([0, PAGE, 5 * PAGE]))
    length = int(rng.choice([100, PAGE, FOLIO, 3 * FOLIO, 40 * FOLIO]))
    length = min(length, len(flat) - start)
    madvise(at(array) + start, length, MADV_DONTNEED if turn % 2 else MADV_FREE)
    expected[start : start + -(-length // PAGE) * PAGE] = 0
    if turn % 7 == 0:
        madvise(at(array) + i * FOLIO, 20 * FOLIO if i < 680 else FOLIO, POPULATE_READ if turn % 2 else POPULATE_WRITE)
    if turn % 30 == 0:
        assert pool._core.check()["wrong"] == 0
        assert np.array_equal(flat, expected), turn
assert np.array_equal(flat, expected)
assert np.array_equal(kept.reshape(-1), before)
madvise(at(array), array.nbytes, MADV_DONTNEED)
stats = check_pool(pool)
assert stats.swapped_bytes <= kept.nbytes                       # what is left is the snapshot's
assert pool._core.check()["empty"] >= 700
assert not flat.any()
del array, flat, kept
check_empty(pool)
""")


def test_threads_throw_away_what_others_read() -> None:
    runs("""
from helpers import check_pool
pool = userswap.Pool(ram="32MiB")
array = pool.empty((600, FOLIO), dtype=np.uint8)
array[:] = 1
stop = threading.Event()
wrong = []
def discard(seed):
    rng = np.random.default_rng(seed)
    while not stop.is_set():
        i = int(rng.integers(600))
        madvise(at(array[i]), FOLIO, 4)
        array[i] = 1
def read(seed):
    rng = np.random.default_rng(seed)
    while not stop.is_set():
        row = array[int(rng.integers(600))]
        if (row > 1).any(): wrong.append(1)
threads = [threading.Thread(target=f, args=[k]) for k, f in enumerate((discard, discard, read, read))]
for thread in threads: thread.start()
for _ in range(60): pool.evict(8 << 20); time.sleep(.02)
stop.set()
for thread in threads: thread.join()
assert not wrong
assert (array == 1).all()
check_pool(pool)
""")
