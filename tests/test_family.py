"""A family of forked processes: a slot is theirs until the last of them has freed it, and they share one budget."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from helpers import run_python
from support import only_moved

PRELUDE = """
import os, select, signal, sys, time, numpy as np, userswap
from helpers import check_empty, check_pool, fresh_pool, values
def noise(i): return np.frombuffer(np.random.default_rng(i).bytes(1 << 20), np.int64)
def wait(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
def right(array, first, n): return all(np.array_equal(array[i], noise(first + i)) for i in range(n))
def out(pool):
    while pool.evict(): pass
def files(place):
    "What each swap file there takes on disk, of those that this process has open; the oldest first."
    found = {}
    for fd in map(int, os.listdir("/proc/self/fd")):
        try: name = os.readlink(f"/proc/self/fd/{fd}")
        except OSError: continue
        if name.startswith(place): found[fd] = os.fstat(fd).st_blocks * 512
    return [found[fd] for fd in sorted(found)]
def settled(what, seconds=20):
    "Whether it comes to be true: that a process is gone is known some milliseconds later."
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end: time.sleep(0.02)
    return what()
class Way:
    "A signal between processes."
    def __init__(self): self.ends = os.pipe()
    def tell(self, n=1): os.write(self.ends[1], b"x" * n)
    def hear(self):
        end = time.monotonic() + 60
        while not select.select([self.ends[0]], [], [], 0.1)[0]:
            assert time.monotonic() < end, "nobody says anything"
            try: ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError: continue
            # Who would have said it can't any more: that is no reason to wait for a minute.
            assert ended is None or ended.si_status in (0, signal.SIGKILL), f"a child ended with {ended.si_status}"
        os.read(self.ends[0], 1)
"""


def ends_well(program: str, place: Path) -> None:
    """The program, whose swap files are in `place`, ends with status 0 in a process of its own."""
    result = run_python(PRELUDE + f"place = {str(place)!r}\n" + program)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


# ---- slots ----


def test_a_child_that_lives_on_keeps_only_what_it_still_refers_to(tmp_path: Path) -> None:
    """Its parent kept every slot that it freed for as long as any child lived, whatever that had freed itself."""
    ends_well(
        """
pool = fresh_pool("16MiB", swap=place)
array = pool.empty((40, 1 << 17), np.int64)
for i in range(40): array[i] = noise(i)
out(pool)
heard, go, done = Way(), Way(), Way()
child = os.fork()
if child == 0:
    array[:20] = 0                              # frees half of what it inherited
    out(pool)
    heard.tell(); go.hear()
    if not all(np.array_equal(array[i], noise(i)) for i in range(20, 40)): os._exit(3)
    del array
    done.tell(); go.hear(); os._exit(0)
heard.hear()
array[:] = 1
out(pool)
assert settled(lambda: (pool.writeback(1), pool.stats().slot_bytes)[1] <= 20 << 20), pool.stats().slot_bytes
assert pool.stats().slot_bytes == 20 << 20, "and the other half stays"
for i in range(40): array[i] = noise(i + 100)
out(pool)
go.tell(); done.hear()
array[:] = 1
out(pool)
assert settled(lambda: (pool.writeback(1), pool.stats().slot_bytes)[1] == 0), "the child lives, and has nothing"
del array
check_empty(pool)
assert sum(files(place)) == 0
go.tell()
sys.exit(wait(child))
""",
        tmp_path,
    )


def test_what_a_child_freed_its_own_child_still_has(tmp_path: Path) -> None:
    """A grandchild's bits are copied from its parent's when it is born, whatever that does afterwards."""
    ends_well(
        """
pool = fresh_pool("16MiB", swap=place)
array = pool.empty((32, 1 << 17), np.int64)
for i in range(32): array[i] = noise(i)
out(pool)
freed, go, end = Way(), Way(), Way()
child = os.fork()
if child == 0:
    grandchild = os.fork()
    if grandchild == 0:
        go.hear()
        os._exit(0 if right(array, 0, 32) else 3)
    del array
    freed.tell(); end.hear()
    os._exit(wait(grandchild))
freed.hear()
array[:] = 0
time.sleep(0.05)
pool.writeback(1)
assert pool.stats().slot_bytes == 32 << 20, "the grandchild's, to the last slot"
for turn in range(1, 4):
    for i in range(32): array[i] = noise(i + 100 * turn)
    out(pool)
go.tell(); end.tell()
assert wait(child) == 0
assert right(array, 300, 32)
del array
assert settled(lambda: (pool.writeback(1), pool.stats().slot_bytes)[1] == 0)
check_empty(pool)
""",
        tmp_path,
    )


def test_slots_are_held_while_births_and_deaths_go_on(tmp_path: Path) -> None:
    """A line of children, each the child of the one before, which ends at once: the last one's slots are never free."""
    ends_well(
        """
pool = fresh_pool("16MiB", swap=place)
array = pool.empty((20, 1 << 17), np.int64)
for i in range(20): array[i] = noise(i)
out(pool)
done = os.pipe()
child = os.fork()
if child == 0:
    for k in range(60):
        if os.fork(): os._exit(0)
    os.write(done[1], b"y" if right(array, 0, 20) else b"n")
    os._exit(0)
os.close(done[1])
turn = 0
wait(child)
os.set_blocking(done[0], False)
while True:
    turn += 1
    for i in range(20): array[i] = noise(i + 100 * turn)
    try: answer = os.read(done[0], 1)
    except BlockingIOError: continue
    break
assert answer == b"y", answer
assert right(array, 100 * turn, 20)
del array
assert settled(lambda: (pool.writeback(1), pool.stats().slot_bytes)[1] == 0)
check_empty(pool)
""",
        tmp_path,
    )


def test_a_row_that_is_used_again_says_nothing_of_who_had_it_before(tmp_path: Path) -> None:
    """Neither the bits of one that is gone, nor that it lives because another one does that has its place."""
    ends_well(
        """
pool = fresh_pool("16MiB", swap=place)
array = pool.empty((24, 1 << 17), np.int64)
for i in range(24): array[i] = noise(i)
out(pool)
go = Way()
def idle():
    pid = os.fork()
    if pid == 0: go.hear(); os._exit(0)
    return pid
one = idle()
os.kill(one, signal.SIGKILL); wait(one)
for i in range(24): array[i] = noise(i + 100)            # before anybody asked whether the first one lives
out(pool)
two = idle()                                            # which has its place, and refers to other slots
array[:] = 0
out(pool)
assert settled(lambda: (pool.writeback(1), pool.stats().slot_bytes)[1] == 24 << 20), pool.stats().slot_bytes
os.kill(two, signal.SIGKILL); wait(two)
assert settled(lambda: (pool.writeback(1), pool.stats().slot_bytes)[1] == 0), pool.stats().slot_bytes
""",
        tmp_path,
    )


def test_the_last_who_frees_gives_the_disk_back_when_the_owner_is_gone(tmp_path: Path) -> None:
    """Also what only a killed one referred to, and what only the owner did."""
    ends_well(
        """
heard, go, done = Way(), Way(), Way()
owner = os.fork()
if owner == 0:
    pool = fresh_pool("16MiB", swap=place)
    array = pool.empty((24, 1 << 17), np.int64)
    for i in range(24): array[i] = noise(i)
    out(pool)
    if os.fork() == 0:                          # a first one, who will be killed with all that it has
        signal.pause()
    victim = max(int(line) for line in open("/proc/self/task/%d/children" % os.getpid()).read().split())
    if os.fork() == 0:
        heard.tell(); go.hear()                                 # now the owner is gone
        if not right(array, 0, 24): os.write(done.ends[1], b"1"); os._exit(1)
        array[:6] = 0                           # the first one still has them
        out(pool)
        if files(place)[0] < 24 << 20: os.write(done.ends[1], b"2"); os._exit(1)
        os.kill(victim, signal.SIGKILL)
        time.sleep(0.2)
        array[6:7] = 0
        out(pool)
        if not files(place)[0] <= (17 << 20) + 65536: os.write(done.ends[1], b"3"); os._exit(1)
        if not all(np.array_equal(array[i], noise(i)) for i in range(7, 24)): os.write(done.ends[1], b"4"); os._exit(1)
        del array
        os.write(done.ends[1], b"y" if files(place)[0] == 0 else b"5")
        os._exit(0)
    heard.hear()
    more = pool.empty((8, 1 << 17), np.int64)   # only the owner refers to these
    for i in range(8): more[i] = noise(i + 50)
    out(pool)
    os._exit(0)
assert wait(owner) == 0
time.sleep(0.1)
go.tell()
answer = os.read(done.ends[0], 1)
assert answer == b"y", answer
""",
        tmp_path,
    )


def test_a_pool_that_was_closed_leaves_its_file_to_who_still_reads_it(tmp_path: Path) -> None:
    ends_well(
        """
import gc
pool = fresh_pool("16MiB", swap=place)
array = pool.empty((24, 1 << 17), np.int64)
for i in range(24): array[i] = noise(i)
out(pool)
heard, go = Way(), Way()
child = os.fork()
if child == 0:
    array[:12] = 0
    out(pool)
    heard.tell(); go.hear()
    ok = files(place)[0] <= 13 << 20 and all(np.array_equal(array[i], noise(i)) for i in range(12, 24))
    del array
    os._exit(0 if ok and files(place)[0] == 0 else 3)
heard.hear()
del array
pool.close(); del pool
gc.collect()
assert files(place) == []
go.tell()
sys.exit(wait(child))
""",
        tmp_path,
    )


def test_a_fork_takes_none_of_the_descriptors_that_a_program_counts_on(tmp_path: Path) -> None:
    """Who had closed its standard input got the family's locks in its place, and wrote over them by dup2()."""
    ends_well(
        """
pool = fresh_pool("16MiB", swap=place)
array = pool.empty((24, 1 << 17), np.int64)
for i in range(24): array[i] = noise(i)
out(pool)
heard, go = Way(), Way()
os.close(0)
child = os.fork()
if child == 0:
    null = os.open("/dev/null", os.O_RDWR)
    if null != 0: os._exit(4)
    for fd in range(3, 16):
        if fd not in heard.ends + go.ends: os.dup2(null, fd)
    heard.tell(); go.hear()
    os._exit(0 if right(array, 0, 24) else 3)
heard.hear()
for turn in range(1, 4):
    for i in range(24): array[i] = noise(i + 100 * turn)
    out(pool)
    time.sleep(0.02)
go.tell()
sys.exit(wait(child))
""",
        tmp_path,
    )


RANDOM = """
import random
seed = int(sys.argv[1])
complaints, turns = os.pipe(), 60
os.setpgid(0, 0)
def complain(text):
    os.write(complaints[1], (text + chr(10)).encode())
    os._exit(1)
def live(me, depth, rng, pool, arrays, expected, turns):
    "Writes, reads, frees, forks and kills as it comes. `expected`: by array and row, the number of what is in it."
    children, serial = [], 0
    for turn in range(turns):
        what, a = rng.randrange(12), rng.randrange(len(arrays))
        i = rng.randrange(len(arrays[a]))
        if what < 4:
            serial += 1
            expected[a][i] = hash((me, serial)) & 0xffffff
            arrays[a][i] = noise(expected[a][i])
        elif what < 8:
            if not np.array_equal(arrays[a][i], noise(expected[a][i])): complain(f"{me}: wrong bytes at {turn}")
        elif what == 8:
            arrays[a] = None
            arrays[a] = pool.empty((5, 1 << 17), np.int64)
            for i in range(5):
                expected[a][i] = expected[a - 1][i]
                arrays[a][i] = noise(expected[a][i])
        elif what == 9:
            if rng.randrange(2): pool.evict(4 << 20); pool.writeback(2 << 20)
            else:
                arrays[a] = pool.snapshot(arrays[a - 1])
                expected[a] = list(expected[a - 1])
        elif what == 10 and depth < 3 and len(children) < 3:
            pid = os.fork()
            if pid == 0:
                other = random.Random(f"{seed} {me} {turn}")
                live(f"{me}.{turn}", depth + 1, other, pool, arrays, expected, turns // 2)
                os._exit(0)
            children.append(pid)
        elif children:
            pid = children.pop(rng.randrange(len(children)))
            if rng.randrange(2): time.sleep(rng.random() / 50); os.kill(pid, signal.SIGKILL)
            if wait(pid) not in (0, -signal.SIGKILL): complain(f"{me}: a child ended badly")
    for a, array in enumerate(arrays):
        for i in range(len(array)):
            if not np.array_equal(array[i], noise(expected[a][i])): complain(f"{me}: wrong bytes at the end")
    if rng.randrange(2) or depth == 0:
        for pid in children:
            if wait(pid) not in (0, -signal.SIGKILL): complain(f"{me}: a child ended badly at the end")
    if pool._core.check()["wrong"]: complain(f"{me}: counts are wrong")
pool = fresh_pool("16MiB", swap=place)
arrays = [pool.empty((5, 1 << 17), np.int64) for _ in range(6)]
expected = [[10 * a + i for i in range(5)] for a in range(6)]
for a in range(6):
    for i in range(5): arrays[a][i] = noise(expected[a][i])
live("root", 0, random.Random(seed), pool, arrays, expected, turns)
os.close(complaints[1])
said = b""
while more := os.read(complaints[0], 4096): said += more         # until the last of them has ended
assert not said, said.decode()
out(pool)
assert settled(lambda: (pool.writeback(1), pool.stats().slot_bytes)[1] <= 30 << 20), pool.stats().slot_bytes
for a in range(6):
    for i in range(5): assert np.array_equal(arrays[a][i], noise(expected[a][i]))
check_pool(pool)
arrays.clear()
assert settled(lambda: (pool.writeback(1), pool.stats().slot_bytes)[1] == 0), pool.stats().slot_bytes
check_empty(pool)
assert sum(files(place)) == 0
"""


@pytest.mark.parametrize("seed", range(4))
def test_any_family_tree_reads_what_it_wrote_and_leaves_nothing(seed: int, tmp_path: Path) -> None:
    result = run_python(PRELUDE + f"place = {str(tmp_path)!r}\n" + RANDOM, str(seed))
    assert result.returncode == 0, result.stderr


# ---- the budget ----

BUDGET = """
MiB = 1 << 20
def pss(pid):
    for line in open(f"/proc/{pid}/smaps_rollup"):
        if line.startswith("Pss:"): return int(line.split()[1]) << 10
"""


@pytest.mark.parametrize("children", ["share", "own"])
def test_workers_that_rewrite_a_table_of_two_budgets_share_one(children: str, tmp_path: Path) -> None:
    """Each had a whole budget for itself: four workers and their parent used five."""
    ends_well(
        BUDGET
        + f"children = {children!r}\n"
        + """
ram = 64 * MiB
pool = userswap.Pool(ram, swap=place, children=children)
array = pool.empty((128, 1 << 17))
for i in range(128): array[i] = values(i)
alone = pss(os.getpid()) - sum(pool._core.stats()[k] for k in ("resident_bytes", "pool_bytes", "metadata_bytes"))
done, go, workers = Way(), Way(), []
for k in range(4):
    pid = os.fork()
    if pid == 0:
        for i in range(128): array[i] += (k + 1)
        ok = all(np.array_equal(array[i], values(i) + (k + 1)) for i in range(128))
        done.tell(); go.hear()
        os._exit(0 if ok and pool._core.check()["wrong"] == 0 else 3)
    workers.append(pid)
for _ in workers: done.hear()
total = sum(map(pss, [os.getpid(), *workers])) - 5 * max(alone, 0)
go.tell(4)
assert [wait(pid) for pid in workers] == [0] * 4
if children == "share":
    # A worker has half of an equal share, but no less than the smallest pool; what the parent has is counted once.
    assert total < ram + 4 * 16 * MiB, total / MiB
else:
    assert total > 2.5 * ram, total / MiB          # or the test above shows nothing
assert all(np.array_equal(array[i], values(i)) for i in range(128))
""",
        tmp_path,
    )


def test_who_never_touches_the_pool_costs_nobody_anything(tmp_path: Path) -> None:
    ends_well(
        BUDGET
        + """
import subprocess
pool = userswap.Pool(64 * MiB, swap=place)
array = pool.empty((96, 1 << 17))
for i in range(96): array[i] = values(i)
go = Way()
idle = os.fork()
if idle == 0: go.hear(); os._exit(0)
other = os.fork()
if other == 0: os.execvp("sleep", ["sleep", "100"])
third = subprocess.Popen(["sleep", "100"], preexec_fn=lambda: None)
for turn in range(2):
    for i in range(96): array[i].sum()
    assert pool.stats().allowed_bytes == 64 * MiB
go.tell()
assert wait(idle) == 0
os.kill(other, signal.SIGKILL); wait(other)
third.kill(); third.wait()
""",
        tmp_path,
    )


def test_a_worker_that_wants_more_gets_its_share_and_leaves_it_when_killed(tmp_path: Path) -> None:
    ends_well(
        BUDGET
        + """
pool = userswap.Pool(96 * MiB, swap=place)
array = pool.empty((128, 1 << 17))
for i in range(128): array[i] = values(i)
worker = os.fork()
if worker == 0:
    own = pool.empty((128, 1 << 17))
    while True:
        for i in range(128): own[i] = array[i % 8]
def read(): return [array[i].sum() for i in range(128)], pool.stats().allowed_bytes
assert settled(lambda: read()[1] <= 56 * MiB), "half of it is the worker's"
stats = pool.stats()
assert settled(lambda: (read(), sum(pool._core.stats()[k] for k in ("resident_bytes", "pool_bytes", "metadata_bytes"))
                        )[1] <= 60 * MiB), "and the parent gives it up"
assert pool.stats().over_budget == 0
os.kill(worker, signal.SIGKILL)
wait(worker)
assert settled(lambda: read()[1] == 96 * MiB), "all of it is the parent's again"
assert all(np.array_equal(array[i], values(i)) for i in range(128))
""",
        tmp_path,
    )


def test_who_is_short_of_memory_gets_an_equal_share_from_who_has_all_of_it(tmp_path: Path) -> None:
    """From the first look on: not a bit at a time, as each of the two happens to stay below what it may use."""
    ends_well(
        BUDGET
        + """
pool = userswap.Pool(96 * MiB, swap=place)
array = pool.empty((128, 1 << 17))
for i in range(128): array[i] = values(i)
heard = Way()
worker = os.fork()
if worker == 0:
    own = pool.empty((128, 1 << 17))
    for i in range(128): own[i] = values(i + 1000)
    heard.tell()
    while True:
        for i in range(128): own[i] += 1
heard.hear()                                    # all the while the parent had what it had before
array[0].sum()
time.sleep(0.02)
array[1].sum(); array[2].sum()
allowed = pool.stats().allowed_bytes
os.kill(worker, signal.SIGKILL); wait(worker)
assert allowed == 48 * MiB, allowed / MiB
""",
        tmp_path,
    )


def test_a_child_of_one_that_had_no_pool_just_then_shares_too(tmp_path: Path) -> None:
    """Born while its parent had none, it was none of the family, and never could be: its children had whole budgets."""
    ends_well(
        BUDGET
        + """
import gc
pool = fresh_pool("16MiB", swap=place)
child = os.fork()
if child == 0: os._exit(0)
wait(child)
pool.close(); del pool
gc.collect()
child = os.fork()
if child == 0:
    pool = userswap.Pool(64 * MiB, swap=place)
    array = pool.empty((96, 1 << 17))
    for i in range(96): array[i] = values(i)
    worker = os.fork()
    if worker == 0:
        own = pool.empty((96, 1 << 17))
        while True:
            for i in range(96): own[i] = array[i % 8]
    ok = settled(lambda: ([array[i].sum() for i in range(96)], pool.stats().allowed_bytes)[1] <= 48 * MiB)
    os.kill(worker, signal.SIGKILL); wait(worker)
    os._exit(0 if ok else 3)
sys.exit(wait(child))
""",
        tmp_path,
    )


def test_how_children_share_is_one_of_two_words() -> None:
    result = run_python("import userswap; userswap.Pool('64MiB', children='some')")
    assert "ValueError: children is 'some'" in result.stderr
    run = [sys.executable, "-m", "userswap", "run", "--children", "some", "-c", "pass"]
    result = run_python(f"import subprocess, sys; sys.exit(subprocess.run({run!r}).returncode)")
    assert result.returncode == 2
    assert "--children" in result.stderr


@only_moved
def test_a_forked_child_reads_ahead_once_it_has_use_for_it(tmp_path: Path) -> None:
    """It had no thread for that: it was its parent's, and a fault's handler can't make one."""
    ends_well(
        BUDGET
        + """
if os.cpu_count() == 1: sys.exit()                     # no thread at all
os.environ["USERSWAP_CONTROL"] = "0"                    # nor any but that one
pool = userswap.Pool(64 * MiB, swap=place)
array = pool.empty((128, 1 << 17))
for i in range(128): array[i] = values(i)
threads = lambda: len(os.listdir("/proc/self/task"))
def scan(): return all(np.array_equal(array[i], values(i)) for i in range(128))
assert scan()
idle = os.fork()
if idle == 0: os._exit(threads() - 1)                   # who does nothing has none, but those that serve faults
serve = wait(idle)
assert serve == 0 or userswap._core.delivery() == "thread"
child = os.fork()
if child == 0:
    before = pool.stats().readahead_hits
    if threads() != 1 + serve: os._exit(3)
    ok = scan() and settled(lambda: scan() and threads() == 2 + serve and pool.stats().readahead_hits > before)
    grandchild = os.fork()
    if grandchild == 0: os._exit(0 if threads() == 1 + serve and scan() and scan() else 4)
    os._exit(wait(grandchild) if ok else 5)
sys.exit(wait(child))
""",
        tmp_path,
    )


# ---- what programs really use; the module is one that processes which are started anew import too ----

WORKERS = """
import os, sys, multiprocessing, concurrent.futures
import numpy as np
import userswap

def noise(i): return np.frombuffer(np.random.default_rng(i).bytes(1 << 20), np.int64)
def own(i):
    "Works in a pool of the worker's own, if it has none yet."
    global pool
    if "pool" not in globals() or os.getpid() != made: start()
    array = pool.empty((24, 1 << 17), np.int64)
    for k in range(24): array[k] = noise(i + k)
    return [int(array[k].sum()) for k in range(24)] == [int(noise(i + k).sum()) for k in range(24)]
def start():
    global pool, made
    pool, made = userswap.Pool("16MiB", swap=PLACE), os.getpid()
def inherited(i): return int(table[i].sum()), table[i].tobytes()[:64]
def through(queue, back):
    while (array := queue.get()) is not None: back.put(array + 1)
def shared(name, n):
    memory = multiprocessing.shared_memory.SharedMemory(name)
    np.frombuffer(memory.buf, np.int64)[:n] += 1
    memory.close()
"""

REAL = """
import userswap_workers as w, multiprocessing.shared_memory
if __name__ == "__main__":
    kind = sys.argv[1]
    context = multiprocessing.get_context(kind)
    handle = userswap.install("24MiB", swap=w.PLACE)
    table = w.table = np.empty((40, 1 << 17), np.int64)
    for i in range(40): table[i] = w.noise(i)
    truth = [(int(w.noise(i).sum()), w.noise(i).tobytes()[:64]) for i in range(40)]
    with context.Pool(2) as workers:
        if kind == "fork": assert workers.map(w.inherited, range(40)) == truth
        assert all(workers.map(w.own, [100, 200, 300, 400]))
        # arrays of ours as arguments and results, through pipes
        assert [int(x) for x in workers.map(np.sum, [table[i] for i in range(8)])] == [t[0] for t in truth[:8]]
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as workers:
        if kind == "fork": assert list(workers.map(w.inherited, range(40), chunksize=5)) == truth
        assert all(workers.map(w.own, [500, 600]))
        table[0] = 7                                    # while they live
    queue, back = context.Queue(), context.Queue()
    process = context.Process(target=w.through, args=(queue, back))
    process.start()
    for i in range(1, 12): queue.put(table[i])
    for i in range(1, 12): assert np.array_equal(back.get(), w.noise(i) + 1)
    queue.put(None)
    process.join()
    assert process.exitcode == 0
    memory = multiprocessing.shared_memory.SharedMemory(create=True, size=table[1].nbytes)
    seen = np.frombuffer(memory.buf, np.int64)[: 1 << 17]
    seen[:] = table[1]
    process = context.Process(target=w.shared, args=(memory.name, 1 << 17))
    process.start()
    process.join()
    assert process.exitcode == 0 and np.array_equal(seen, w.noise(1) + 1)
    del seen
    memory.close()
    memory.unlink()
    with context.Manager() as manager:
        kept = manager.dict()
        kept["row"] = table[2]
        assert np.array_equal(kept["row"], w.noise(2))
    assert all(np.array_equal(table[i], w.noise(i)) for i in range(1, 40)) and (table[0] == 7).all()
    assert handle.pool._core.check()["wrong"] == 0
"""


@pytest.mark.parametrize("kind", ["fork", "forkserver", "spawn"])
def test_multiprocessing_and_its_pools_work_on_swapped_arrays(kind: str, tmp_path: Path) -> None:
    (tmp_path / "swap").mkdir()
    (tmp_path / "userswap_workers.py").write_text(WORKERS + f"PLACE = {str(tmp_path / 'swap')!r}\n")
    script = tmp_path / "script.py"
    script.write_text("import os, sys, multiprocessing, concurrent.futures, numpy as np, userswap\n" + REAL)
    code = f"import sys, runpy; sys.argv = ['script.py', {kind!r}]; sys.path.insert(0, {str(tmp_path)!r});"
    result = run_python(f"{code} runpy.run_path({str(script)!r}, run_name='__main__')")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""


def test_loky_workers_take_swapped_arrays(tmp_path: Path) -> None:
    """They are started anew, by fork and exec, and get arrays by pipe or as memory maps."""
    pytest.importorskip("joblib")
    ends_well(
        """
from joblib import Parallel, delayed
handle = userswap.install("24MiB", swap=place)
table = np.empty((40, 1 << 17), np.int64)
for i in range(40): table[i] = noise(i)
sums = Parallel(n_jobs=2)(delayed(np.sum)(table[i]) for i in range(0, 40, 4))
assert [int(x) for x in sums] == [int(noise(i).sum()) for i in range(0, 40, 4)]
assert all(np.array_equal(table[i], noise(i)) for i in range(40))
""",
        tmp_path,
    )


def test_forks_while_threads_fault_evict_write_back_and_take_snapshots(tmp_path: Path) -> None:
    """Each child, and a child of it, finds whole rows that are what somebody wrote there, and its counts are right."""
    ends_well(
        """
import threading
pool = fresh_pool("32MiB", swap=place)
array = pool.empty((32, 1 << 17), np.int64)
locks = [threading.Lock() for _ in range(32)]
numbers = list(range(32))
for i in range(32): array[i] = noise(i)
stop = threading.Event()
def write(seed):
    rng = np.random.default_rng(seed)
    while not stop.is_set():
        i, n = int(rng.integers(32)), int(rng.integers(1000))
        with locks[i]:
            numbers[i] = -1                             # half of it is there
            array[i] = noise(n)
            numbers[i] = n
def push():
    while not stop.is_set(): pool.evict(2 << 20); pool.writeback(1 << 20)
def shoot():
    while not stop.is_set(): pool.snapshot(array)
threads = [threading.Thread(target=write, args=(k,)) for k in range(2)]
threads += [threading.Thread(target=push), threading.Thread(target=shoot)]
for t in threads: t.start()
def sound():
    whole = [i for i in range(32) if numbers[i] >= 0]
    return len(whole) > 24 and all(np.array_equal(array[i], noise(numbers[i])) for i in whole)
codes = []
for turn in range(10):
    pid = os.fork()
    if pid == 0:
        if not sound() or pool._core.check()["wrong"]: os._exit(3)
        for i in range(turn % 4, 32, 4): array[i] = noise(i); numbers[i] = i
        pid = os.fork()
        if pid == 0: os._exit(0 if sound() and pool._core.check()["wrong"] == 0 else 4)
        os._exit(wait(pid) if sound() else 5)
    codes.append(wait(pid))
stop.set()
for t in threads: t.join()
assert codes == [0] * 10, codes
assert sound() and pool._core.check()["wrong"] == 0
del array
assert settled(lambda: (pool.writeback(1), pool.stats().slot_bytes)[1] == 0)
check_empty(pool)
""",
        tmp_path,
    )


def test_each_fault_of_a_child_looked_at_everything_in_vain(tmp_path: Path) -> None:
    """What others left a child was less than it could do with, as its data does not compress and there is no swap file:
    no fault remembered that the one before had tried that. Took minutes, where it takes seconds."""
    ends_well(
        """
signal.alarm(100)
pool = fresh_pool("72MiB", swap="none")
small = np.resize(np.arange(0, 120_000, dtype=np.uint32), 1 << 18).view(np.uint8)
plain = noise(1).view(np.uint8)
array = pool.empty((90, 1 << 20), np.uint8)
def value(i, depth): return np.roll(plain if i % 3 else small, i * 7 + depth)
def descend(depth):
    for i in range(90): array[i] = value(i, depth)
    if depth < 3:
        child = os.fork()
        if child == 0:
            ok = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)            # a warning, as it can't keep to the budget
            signal.alarm(100)
            try: ok = descend(depth + 1)
            finally: os._exit(0 if ok else 1)
        if wait(child): return False
    return all(np.array_equal(array[i], value(i, depth)) for i in range(90))
os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
assert descend(0)
""",
        tmp_path,
    )
