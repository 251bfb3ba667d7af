"""fork: a child reads what the parent had, wherever it was: never zeros, never another's bytes."""

from __future__ import annotations

from helpers import run_python

PRELUDE = """
import os, sys, threading, numpy as np, userswap
def values(i): return np.round(np.cumsum(np.random.default_rng(i).standard_normal(1 << 17)), 2)
def wait(pid):
    status = os.waitpid(pid, 0)[1]
    return os.waitstatus_to_exitcode(status)
"""


def test_a_child_reads_and_writes_its_own_copy_of_swapped_memory() -> None:
    code = (
        PRELUDE
        + """
pool = userswap.Pool(ram="32MiB")
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
"""
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_fork_while_other_threads_fault_and_reclaim_runs() -> None:
    code = (
        PRELUDE
        + """
pool = userswap.Pool(ram="24MiB")
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
"""
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_a_grandchild_reads_right_bytes_too() -> None:
    code = (
        PRELUDE
        + """
pool = userswap.Pool(ram="24MiB")
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
"""
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_children_read_the_parents_swap_file_while_the_parent_reuses_it() -> None:
    code = (
        PRELUDE
        + """
import time
pool = userswap.Pool(ram="16MiB")
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
"""
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_slots_stay_while_a_grandchild_lives_and_go_when_it_is_killed() -> None:
    code = (
        PRELUDE
        + """
import signal, time
pool = userswap.Pool(ram="16MiB")
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
"""
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr


def test_subprocess_and_spawned_workers_are_not_our_business() -> None:
    code = (
        PRELUDE
        + """
import subprocess, multiprocessing
pool = userswap.Pool(ram="24MiB")
array = pool.empty((32, 1 << 17))
for i in range(32): array[i] = values(i)
assert subprocess.run(["true"]).returncode == 0
assert subprocess.run(["true"], preexec_fn=lambda: None).returncode == 0
assert subprocess.check_output(["cat"], input=array[5].tobytes()) == values(5).tobytes()
assert all(np.array_equal(array[i], values(i)) for i in range(32))
"""
    )
    result = run_python(code)
    assert result.returncode == 0, result.stderr
