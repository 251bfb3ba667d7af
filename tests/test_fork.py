"""fork: a child reads what the parent had, wherever it was: never zeros, never another's bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers import run_python
from userswap.swap.map import BOUND

PRELUDE = """
import os, sys, threading, numpy as np, userswap
from helpers import fresh_pool, values
def wait(pid):
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status)
"""


def ends_well(program: str) -> str:
    """The program, which forks, ends with status 0 in a process of its own; what it wrote to stderr."""
    result = run_python(PRELUDE + program)
    assert result.returncode == 0, result.stderr
    return result.stderr


def test_a_child_reads_and_writes_its_own_copy_of_swapped_memory() -> None:
    ends_well("""
pool = fresh_pool("32MiB")
array = pool.empty((48, 1 << 17))               # 48 MiB: most of it is swapped, some is clean, some dirty
for i in range(48): array[i] = values(i)
for i in range(0, 48, 5): array[i].sum()        # clean
array[7, :10] += 1                              # dirty
pid = os.fork()
if pid == 0:
    ok = all(np.array_equal(array[i], values(i)) for i in range(48) if i != 7)
    ok &= array[7, 0] == values(7)[0] + 1
    for i in range(48): array[i] = values(i + 100)          # the child's own from here on
    ok &= all(np.array_equal(array[i], values(i + 100)) for i in range(48))
    ok &= pool._core.check()["wrong"] == 0
    os._exit(0 if ok else 3)
for i in range(0, 48, 3): array[i] = values(i + 200)        # at the same time in the parent
code = wait(pid)
assert all(np.array_equal(array[i], values(i + 200 if i % 3 == 0 else i)) for i in range(48) if i != 7)
assert pool._core.check()["wrong"] == 0
sys.exit(code)
""")


def test_fork_while_other_threads_fault_and_reclaim_runs() -> None:
    ends_well("""
pool = fresh_pool("24MiB")
array = pool.empty((32, 1 << 17))
for i in range(32): array[i] = values(i)
stop = threading.Event()
def work(me):
    rng = np.random.default_rng(me)
    while not stop.is_set():
        i = int(rng.integers(32)); array[i] = values(i)
threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
for t in threads: t.start()
bad = 0
for turn in range(25):
    pid = os.fork()
    if pid == 0:
        # a row may be half written by a thread that is not here; every value is from its own row all the same
        ok = all(np.array_equal(array[i], values(i)) for i in range(turn % 4, 32, 4))
        os._exit(0 if ok else 3)
    bad += wait(pid) != 0
stop.set()
for t in threads: t.join()
assert bad == 0, bad
assert pool._core.check()["wrong"] == 0
""")


def test_a_grandchild_reads_right_bytes_too() -> None:
    ends_well("""
pool = fresh_pool("24MiB")
array = pool.empty((32, 1 << 17))
for i in range(32): array[i] = values(i)
pid = os.fork()
if pid == 0:
    array[3] = 5
    pid = os.fork()
    if pid == 0:
        ok = all(np.array_equal(array[i], values(i)) for i in range(32) if i != 3) and (array[3] == 5).all()
        os._exit(0 if ok else 3)
    os._exit(wait(pid))
sys.exit(wait(pid))
""")


def test_children_read_the_parents_swap_file_while_the_parent_reuses_it() -> None:
    complaints = ends_well("""
import time
pool = fresh_pool("16MiB")
array = pool.empty((40, 1 << 17))
for i in range(40): array[i] = values(i)
assert pool.stats().slot_bytes > 4 << 20
children = []
for k in range(3):
    pid = os.fork()
    if pid == 0:
        for turn in range(2):
            time.sleep(0.05)
            for i in range(40):
                if not np.array_equal(array[i], values(i)): os._exit(3)
        for i in range(k, 40, 2): array[i] = values(i + 500)        # needs a swap file of the child's own
        for i in range(40):
            if not np.array_equal(array[i], values(i + 500 if (i - k) % 2 == 0 and i >= k else i)): os._exit(4)
        if pool._core.check()["wrong"]: os._exit(5)
        os._exit(0 if pool.stats().over_budget == 0 else 6)
    children.append(pid)
for turn in range(4):                                               # frees and rewrites slots all the time
    for i in range(40): array[i] = values(i + 1000 * turn)
assert all(np.array_equal(array[i], values(i + 3000)) for i in range(40))
assert [wait(pid) for pid in children] == [0, 0, 0]
held = pool.stats().slot_bytes
time.sleep(0.02)
for i in range(40): array[i] = values(i)
pool.evict()
assert pool.stats().slot_bytes < 50 << 20, "what was kept for the children is free again"
assert all(np.array_equal(array[i], values(i)) for i in range(40))
del array
from helpers import check_empty
check_empty(pool)
""")
    assert complaints == ""


def test_slots_stay_while_a_grandchild_lives_and_go_when_it_is_killed() -> None:
    ends_well("""
import signal, time
pool = fresh_pool("16MiB")
array = pool.empty((40, 1 << 17))
for i in range(40): array[i] = values(i)
used = pool.stats().slot_bytes
ask, answer = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    grandchild = os.fork()
    if grandchild:
        os.write(answer[1], str(grandchild).encode() + b"\\n")
        os._exit(0)
    os.read(ask[0], 1)
    ok = all(np.array_equal(array[i], values(i)) for i in range(40))
    os.write(answer[1], b"ok" if ok else b"no")
    time.sleep(100)
assert wait(child) == 0
grandchild = int(os.read(answer[0], 20))
for i in range(40): array[i] = 0                # every slot is freed here
assert pool.stats().slot_bytes >= used, "but kept: the grandchild may still read them"
for i in range(40): array[i] = values(i + 100)
os.write(ask[1], b"x")
assert os.read(answer[0], 2) == b"ok"
os.kill(grandchild, signal.SIGKILL)
time.sleep(0.1)
array[:] = 0
for i in range(40): array[i] = values(i)
del array
from helpers import check_empty
check_empty(pool)
""")


def test_subprocess_and_spawned_workers_are_not_our_business() -> None:
    ends_well("""
import subprocess, multiprocessing
pool = fresh_pool("24MiB")
array = pool.empty((32, 1 << 17))
for i in range(32): array[i] = values(i)
assert subprocess.run(["true"]).returncode == 0
assert subprocess.run(["true"], preexec_fn=lambda: None).returncode == 0
assert subprocess.check_output(["cat"], input=array[5].tobytes()) == values(5).tobytes()
assert all(np.array_equal(array[i], values(i)) for i in range(32))
""")


def test_a_child_may_write_to_what_was_clean_in_every_pool() -> None:
    """Write protection is not inherited: what is clean by that would drop the child's writes at eviction."""
    ends_well("""
from helpers import check_pool, check_empty
def out(pool): pool.evict(); pool.evict()
pools = [fresh_pool("16MiB", swap="none") for _ in range(3)]
arrays = [pool.empty((4, 1 << 17)) for pool in pools]
for a in arrays:
    for i in range(4): a[i] = values(i)
for pool, a in zip(pools, arrays): out(pool); a.sum()
assert all(pool._core.check()["clean"] == 64 for pool in pools)
pid = os.fork()
if pid == 0:
    for pool, a in zip(pools, arrays):
        assert pool._core.check()["clean"] == 64           # by their sums
        a[:, ::512] += 1                                # a word of every page
        check_pool(pool)                                # and no id is left of what was clean
        out(pool)
        for i in range(4):
            expected = values(i); expected[::512] += 1
            assert np.array_equal(a[i], expected)
        check_pool(pool)
    arrays.clear(); del a
    for pool in pools: check_empty(pool)
    os._exit(0)
code = wait(pid)
for pool, a in zip(pools, arrays):
    out(pool)
    assert all(np.array_equal(a[i], values(i)) for i in range(4))
sys.exit(code)
""")


def test_a_child_frees_what_it_inherited_and_the_parents_swap_file_stays_whole() -> None:
    """The slots, their blocks on disk and the file's length are the parent's, whatever the child ends."""
    ends_well("""
import gc
pool = fresh_pool("16MiB")
noise = lambda i: np.random.default_rng(i).random(1 << 17)
array = pool.empty((32, 1 << 17))
for i in range(32): array[i] = noise(i)
assert pool.stats().slot_bytes > 12 << 20
pid = os.fork()
if pid == 0:
    for i in range(24): array[i] = i                    # gives slots back, whole clusters of them
    del array
    pool.close(); del pool
    gc.collect()
    os._exit(0)
assert wait(pid) == 0
assert all(np.array_equal(array[i], noise(i)) for i in range(32))
""")


def test_a_child_reads_on_when_the_parents_pool_has_ended() -> None:
    ends_well("""
import gc
pool = fresh_pool("16MiB")
noise = lambda i: np.random.default_rng(i).random(1 << 17)
array = pool.empty((24, 1 << 17))
for i in range(24): array[i] = noise(i)
go = os.pipe()
pid = os.fork()
if pid == 0:
    os.read(go[0], 1)
    os._exit(0 if all(np.array_equal(array[i], noise(i)) for i in range(24)) else 3)
del array
pool.close(); del pool
gc.collect()
os.write(go[1], b"x")
sys.exit(wait(pid))
""")


def test_pins_of_the_parents_threads_do_not_hold_memory_in_the_child() -> None:
    ends_well("""
import time
from helpers import check_pool
pool = fresh_pool("16MiB", swap="none")
array = pool.empty((4, 1 << 17))
for i in range(4): array[i] = values(i)
ends = os.pipe()
thread = threading.Thread(target=lambda: os.readv(ends[0], [array[1]]), daemon=True)
thread.start()
time.sleep(0.2)                                         # it waits in the kernel, holding its buffer
pool.evict(); pool.evict()
assert pool.stats().resident_bytes >= 1 << 16, "or nothing is tried"
pid = os.fork()
if pid == 0:
    pool.evict(); pool.evict()
    left = pool.stats().resident_bytes
    check_pool(pool)
    os._exit(0 if left == 0 and np.array_equal(array[1], values(1)) else 3)
code = wait(pid)
os.write(ends[1], b"x" * 8)
thread.join()
assert array[1].tobytes()[:8] == b"x" * 8
sys.exit(code)
""")


def test_a_pool_that_has_ended_is_no_business_of_a_fork() -> None:
    ends_well("""
import ctypes, gc
ctypes.CDLL(None).mallopt(-6, 0xA5)                     # M_PERTURB: freed memory is garbage
pools = [fresh_pool("16MiB", swap="none") for _ in range(4)]
arrays = [pool.full((4, 1 << 17), k) for k, pool in enumerate(pools)]
for k in (0, 2): pools[k].close(); pools[k] = arrays[k] = None
gc.collect()
pid = os.fork()
if pid == 0:
    os._exit(0 if (arrays[1] == 1).all() and (arrays[3] == 3).all() else 3)
sys.exit(wait(pid))
""")


def test_forks_leave_no_descriptor_behind() -> None:
    """From the first fork on each process has two more: the file of locks, and what holds its own."""
    ends_well("""
os.environ["USERSWAP_CONTROL"] = "0"                     # whose socket a child has not
pool = fresh_pool("16MiB")
array = pool.empty((28, 1 << 17))
for i in range(28): array[i] = values(i)
assert pool.stats().slot_bytes
count = lambda: len(os.listdir("/proc/self/fd"))
before = count() + 2
def fork(hold=None):
    pid = os.fork()
    if pid: return pid
    if hold is not None: os.read(hold, 1)
    os._exit(0 if count() == before else 3)
for _ in range(40): assert wait(fork()) == 0
go = os.pipe()
before += 2
children = [fork(go[0]) for _ in range(5)]
assert count() == before
os.write(go[1], b"x" * 5)
assert [wait(pid) for pid in children] == [0] * 5
assert wait(fork()) == 0
assert count() == before
""")


def test_slots_kept_for_one_child_are_not_another_childs_to_free() -> None:
    """A child forked while the parent keeps slots for an earlier one has a file, and slot numbers, of its own."""
    ends_well("""
idle = [fresh_pool("16MiB", swap="none")]
pool = fresh_pool("16MiB")
idle.append(fresh_pool("16MiB", swap="none"))            # pools without slots, earlier and later
noise = lambda i: np.random.default_rng(i).random(1 << 17)
array = pool.empty((24, 1 << 17))
for i in range(24): array[i] = noise(i)
go = os.pipe()
first = os.fork()
if first == 0:
    os.read(go[0], 1)
    os._exit(0 if all(np.array_equal(array[i], noise(i)) for i in range(24)) else 3)
used = pool.stats().slot_bytes
for i in range(24): array[i] = noise(i + 100)
assert pool.stats().slot_bytes > used + (8 << 20), "kept for the first child"
second = os.fork()
if second == 0:
    for turn in range(200, 600, 100):
        for i in range(24): array[i] = noise(i + turn)
        if not all(np.array_equal(array[i], noise(i + turn)) for i in range(24)): os._exit(4)
    os._exit(5 if pool._core.check()["wrong"] else 0)
assert wait(second) == 0
for i in range(24): array[i] = noise(i + 1000)
os.write(go[1], b"x")
assert wait(first) == 0
assert all(np.array_equal(array[i], noise(i + 1000)) for i in range(24))
""")


@pytest.mark.parametrize("design", ["on_demand", "redirect", *sorted(BOUND)])
def test_ids_that_are_slots_are_kept_with_them_and_end_in_a_child(
    design: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is kept for one child is not used again before it ends; another child has no use for it from the start."""
    monkeypatch.setenv("USERSWAP_MAP", design)
    ends_well(
        f"place = {str(tmp_path)!r}"
        + """
import time
from helpers import check_empty, check_pool
from userswap.swap.map import BOUND
noise = lambda i: np.frombuffer(np.random.default_rng(i).bytes(1 << 20), np.int64)
pool = fresh_pool("16MiB", swap=place + ":72MiB")     # so small that every slot has its turn
bound = os.environ["USERSWAP_MAP"] in BOUND
array = pool.empty((24, 1 << 17), np.int64)
def fill(first):
    for i in range(24): array[i] = noise(first + i)
    while pool.evict(): pass
def right(first): return all(np.array_equal(array[i], noise(first + i)) for i in range(24))
fill(0)
before = check_pool(pool)
assert before.slot_bytes == array.nbytes and before.swap_ids == 384
go = os.pipe()
first = os.fork()
if first == 0:
    os.close(go[1])                                             # it ends with its parent, however that ends
    os.read(go[0], 1)
    os._exit(0 if right(0) and check_pool(pool).swap_ids <= 384 else 3)
fill(100)
kept = pool.stats()
assert kept.slot_bytes == 2 * array.nbytes, "the first child may read them"
assert kept.swap_ids == (768 if bound else 384)
more = kept.metadata_bytes - kept.map_bytes - (before.metadata_bytes - before.map_bytes)
assert more >= 384 * 16, "what is kept counts"
second = os.fork()
if second == 0:
    if check_pool(pool).swap_ids != 384: os._exit(4)            # not those that are kept in its parent
    if not right(100): os._exit(5)
    del array
    if pool.stats().swap_ids != 0 or pool.stats().map_bytes > kept.map_bytes: os._exit(6)
    other = pool.empty((8, 1 << 17), np.int64)                  # gets ids that its parent has too
    for turn in range(6):
        for i in range(8): other[i] = noise(500 + i)
        while pool.evict(): pass
    os._exit(0 if all(np.array_equal(other[i], noise(500 + i)) for i in range(8)) else 7)
assert wait(second) == 0
assert right(100)
fill(200)                                                       # and some more
os.write(go[1], b"x")
assert wait(first) == 0
time.sleep(0.02)
fill(300)                                                       # gives back all that was kept
assert right(300)
while pool.evict(): pass
after = check_pool(pool)
assert (after.slot_bytes, after.swap_ids) == (array.nbytes, 384)
del array
check_empty(pool)
"""
    )


@pytest.mark.parametrize("design", ["on_demand", *sorted(BOUND)])
def test_what_was_kept_for_a_child_is_room_for_new_data_once_it_has_ended(
    design: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also for a program that gives nothing back meanwhile: the file must not be taken for full."""
    monkeypatch.setenv("USERSWAP_MAP", design)
    ends_well(
        f"place = {str(tmp_path)!r}"
        + """
import time
pool = fresh_pool("16MiB", swap=place + ":40MiB")
noise = lambda i: np.frombuffer(np.random.default_rng(i).bytes(16 << 20), np.int64)
def out():
    while pool.evict(): pass
array = pool.array(noise(1))
out()
go = os.pipe()
child = os.fork()
if child == 0:
    os.close(go[1])
    os.read(go[0], 1)
    os._exit(0 if np.array_equal(array, noise(1)) else 3)
array[:] = noise(2)
out()
assert pool.stats().slot_bytes == 32 << 20, "the child's and ours"
os.write(go[1], b"x")
assert wait(child) == 0
time.sleep(0.02)
other, new = pool.empty(2 << 20, np.int64), noise(3)
for at in range(0, 2 << 20, 8192): other[at:at + 8192] = new[at:at + 8192]      # a folio, and it is not touched again
out()
stats = pool.stats()
assert (stats.resident_bytes, stats.slot_bytes) == (0, 32 << 20)
assert np.array_equal(array, noise(2)) and np.array_equal(other, new)
"""
    )


def test_slots_are_not_kept_for_a_child_that_became_another_program() -> None:
    ends_well("""
import signal, time
from helpers import check_empty
pool = fresh_pool("16MiB")
array = pool.empty((28, 1 << 17))
for i in range(28): array[i] = values(i)
assert pool.stats().slot_bytes
pid = os.fork()
if pid == 0: os.execvp("sleep", ["sleep", "100"])
end = time.monotonic() + 20
while os.readlink(f"/proc/{pid}/exe") == os.readlink("/proc/self/exe") and time.monotonic() < end: time.sleep(0.01)
time.sleep(0.03)
del array
check_empty(pool)
os.kill(pid, signal.SIGKILL)
""")


def test_more_children_than_are_counted_still_read_what_they_had() -> None:
    """Past a few hundred at once there is no pipe for a child: then its slots are kept for good, not lost."""
    ends_well("""
pool = fresh_pool("16MiB")
noise = lambda i: np.random.default_rng(i).random(1 << 17)
array = pool.empty((20, 1 << 17))
for i in range(20): array[i] = noise(i)
pool.evict(); pool.evict()                      # little to copy for so many children
go, go_last = os.pipe(), os.pipe()
children = []
for k in range(260):
    pid = os.fork()
    if pid == 0:
        os.read((go if k < 259 else go_last)[0], 1)
        os._exit(0 if k < 259 or all(np.array_equal(array[i], noise(i)) for i in range(20)) else 3)
    children.append(pid)
last = children.pop()
os.write(go[1], b"x" * 259)
assert [wait(pid) for pid in children] == [0] * 259
for i in range(20): array[i] = noise(i + 100)           # uses slots again that nobody is counted for
os.write(go_last[1], b"x")
assert wait(last) == 0
assert all(np.array_equal(array[i], noise(i + 100)) for i in range(20))
""")


def test_threads_of_a_child_share_the_one_swap_file_that_it_opens() -> None:
    """It is opened when the first of them needs it; a second one must not take its place."""
    ends_well("""
pool = fresh_pool("32MiB")
array = pool.empty((24, 1 << 17))
for i in range(24): array[i] = values(i)
pool.evict(); pool.evict()
codes = []
for turn in range(8):
    pid = os.fork()
    if pid == 0:
        barrier = threading.Barrier(4)
        def push():
            barrier.wait()
            while pool.writeback(1 << 17): pass
        threads = [threading.Thread(target=push) for _ in range(4)]
        for t in threads: t.start()
        for t in threads: t.join()
        if not pool.stats().writebacks: os._exit(4)
        os._exit(0 if all(np.array_equal(array[i], values(i)) for i in range(0, 24, 2)) else 3)
    codes.append(wait(pid))
assert codes == [0] * 8, codes
""")


def test_python_warned_of_a_fork_because_of_our_threads() -> None:
    """Python 3.12 counts the threads of a process that forks, and warns; the program has none but ours."""
    ends_well("""
import os, warnings
def tasks(): return len(os.listdir("/proc/self/task"))
seen = []
os.register_at_fork(before=lambda: seen.append(tasks()))        # before what userswap registers, so called after it
warnings.simplefilter("error")
if os.fork() == 0: os._exit(0)                                  # NumPy's BLAS ends its own threads then
os.wait()
seen.clear()
alone = tasks()
small, watched = userswap.Pool(ram="48MiB"), userswap.Pool()
array = small.array(np.arange(12_000_000))
other = watched.array(np.arange(1_000_000))
def scan(): assert np.array_equal(array, np.arange(12_000_000)), "wrong bytes"
with_ours = tasks()
assert with_ours > alone, "there is nothing to see"
for i in range(5):
    scan()
    pid = os.fork()
    if pid == 0:
        ok = False
        try:
            scan()
            pid = os.fork()                                     # with the child's own thread
            if pid == 0:
                os._exit(0)
            ok = os.waitpid(pid, 0)[1] == 0 and seen[-1] == 1
        finally:
            os._exit(0 if ok else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert tasks() == with_ours, "they go on"
assert seen == [alone] * 5, seen
before = small.stats().readahead
for _ in range(5): scan()
if len(os.sched_getaffinity(0)) > 1:
    assert small.stats().readahead > before
""")
