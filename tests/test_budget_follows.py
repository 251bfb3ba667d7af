"""A budget that nobody gave follows what the machine leaves while the program runs; any can be changed by hand."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import userswap
from helpers import check_empty, check_pool, data, fresh_pool, memory_cgroup, run_python
from userswap.budget import default_budget, memory_limits, watched_levels
from userswap.errors import BadSize, BudgetError
from userswap.reclaim import watch
from userswap.reclaim.watch import Reader

MIB = 1 << 20
GIB = 1 << 30
SECOND = 10**9


# ---- a budget that is changed by hand ----


def test_more_can_be_used_at_once_and_less_is_in_use_at_once() -> None:
    pool = fresh_pool("32MiB")
    arrays = [pool.array(data("walk", 8 * MIB, i)) for i in range(12)]
    assert pool.stats().resident_bytes < 32 * MIB
    pool.ram = "256MiB"
    assert pool.ram == 256 * MIB
    for i, array in enumerate(arrays):
        assert np.array_equal(array, data("walk", 8 * MIB, i))
        array[0] ^= 1
    assert pool.stats().resident_bytes == 96 * MIB, "all of it is in place now"
    pool.ram = 24 * MIB
    stats = pool.stats()
    assert stats.resident_bytes + stats.pool_bytes + stats.metadata_bytes <= 24 * MIB
    assert stats.over_budget == 0
    for i, array in enumerate(arrays):
        array[0] ^= 1
        assert np.array_equal(array, data("walk", 8 * MIB, i))
    stats = check_pool(pool)
    assert stats.resident_bytes + stats.pool_bytes + stats.metadata_bytes <= 24 * MIB
    del array
    arrays.clear()
    check_empty(pool)


def test_what_the_stage_keeps_shrinks_with_the_budget() -> None:
    """Real memory, and not only the books: frames that are kept for what comes next are given back."""
    code = """
import numpy as np, userswap
def rss():
    return int(open("/proc/self/statm").read().split()[1]) << 12
pool = userswap.Pool(ram="512MiB")
array = pool.empty((48, 1 << 20))
for row in array:
    row[:] = np.round(np.cumsum(np.random.default_rng(1).standard_normal(1 << 20)), 2)
for row in array:
    row += 1
del row
before = rss()
pool.ram = "32MiB"
stats = pool.stats()
print(before - rss(), stats.resident_bytes + stats.pool_bytes + stats.metadata_bytes)
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    gone, used = map(int, result.stdout.split())
    assert used <= 32 * MIB
    assert gone >= 384 * MIB - 32 * MIB - 2 * MIB


@pytest.mark.parametrize(
    ("size", "error", "text"),
    [(4096, BudgetError, "the least that works is"), ("lots", BadSize, "budget"), (-1, BadSize, "budget")],
)
def test_a_budget_that_is_none_changes_nothing(size: int | str, error: type[Exception], text: str) -> None:
    pool = fresh_pool("32MiB")
    with pytest.raises(error, match=text):
        pool.ram = size
    assert pool.ram == 32 * MIB
    pool.close()
    with pytest.raises(ValueError, match="closed"):
        pool.ram = "64MiB"


def test_the_budget_changes_under_threads_and_forks() -> None:
    """Up and down across the sizes at which windows and turns begin, while threads read and write and children come."""
    pool = fresh_pool("64MiB")
    arrays = [pool.array(data("walk", 24 * MIB, i)) for i in range(3)]
    ended = threading.Event()
    wrong: list[int] = []

    def work(i: int) -> None:
        rng = np.random.default_rng(i)
        model = data("walk", 24 * MIB, i)
        while not ended.is_set():
            at = int(rng.integers(0, 23 * MIB))
            if not np.array_equal(arrays[i][at : at + MIB], model[at : at + MIB]):
                wrong.append(i)
            arrays[i][at] ^= 1
            model[at] ^= 1

    threads = [threading.Thread(target=work, args=[i]) for i in range(3)]
    for thread in threads:
        thread.start()
    try:
        for turn, mib in enumerate([20, 200, 30, 100, 160, 24, 33, 127, 129, 16, 64] * 2):
            pool.ram = mib * MIB
            if turn % 5 == 0:
                child = os.fork()
                if child == 0:
                    os._exit(int(pool.ram != mib * MIB))
                assert os.waitpid(child, 0)[1] == 0
    finally:
        ended.set()
        for thread in threads:
            thread.join()
    assert not wrong
    pool.ram = "16MiB"
    stats = check_pool(pool)
    assert stats.resident_bytes + stats.pool_bytes + stats.metadata_bytes <= 16 * MIB


# ---- what the watch reads ----


class Tree:
    """A fake machine of 16 GiB, 12 of them available, in a directory: a cgroup and the one above it."""

    def __init__(self, root: Path, version: int) -> None:
        self.root, self.version = root, version
        self.available(12 * GIB)
        self.pressure(0)
        self.levels = [(version, str(root / "outer/inner")), (version, str(root / "outer"))]

    def write(self, file: str, text: str | int) -> None:
        path = self.root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    def available(self, size: int) -> None:
        self.write("meminfo", f"MemTotal: {16 * GIB // 1024} kB\nMemAvailable: {size // 1024} kB")

    def pressure(self, microseconds: int) -> None:
        line = f"some avg10=0.00 avg60=0.00 avg300=0.00 total={microseconds}\nfull avg10=0.00 total=7"
        self.write("pressure/memory", line)
        if self.version == 2:
            self.write("outer/inner/memory.pressure", line)

    def cgroup(self, name: str, limit: int | None, usage: int, cache: int = 0, events: int = 0) -> None:
        if self.version == 2:
            self.write(f"{name}/memory.max", "max" if limit is None else limit)
            self.write(f"{name}/memory.high", "max")
            self.write(f"{name}/memory.current", usage)
            self.write(f"{name}/memory.stat", f"anon 5\nfile_mapped 0\ninactive_file {cache}\nactive_file 0")
            self.write(f"{name}/memory.events", f"low 9\nhigh {events}\nmax 0\noom 0")
        else:
            self.write(f"{name}/memory.limit_in_bytes", 0x7FFFFFFFFFFFF000 if limit is None else limit)
            self.write(f"{name}/memory.usage_in_bytes", usage)
            self.write(f"{name}/memory.stat", f"inactive_file 1\ntotal_inactive_file {cache}\ntotal_active_file 0")
            self.write(f"{name}/memory.failcnt", events)

    def reader(self) -> Reader:
        return Reader(self.levels, str(self.root))


@pytest.fixture(params=[1, 2])
def tree(tmp_path: Path, request: pytest.FixtureRequest) -> Tree:
    tree = Tree(tmp_path, request.param)
    tree.cgroup("outer", None, 0)
    tree.cgroup("outer/inner", 2 * GIB, 500 * MIB)
    return tree


def test_what_others_use_is_not_ours(tree: Tree) -> None:
    reader = tree.reader()
    left = 2 * GIB - 2 * GIB // 10
    assert reader.look(300 * MIB, SECOND)[0] == left - 200 * MIB
    tree.cgroup("outer/inner", 2 * GIB, 1500 * MIB)
    assert reader.look(1300 * MIB, 2 * SECOND)[0] == left - 200 * MIB, "only what we use has grown"
    tree.cgroup("outer/inner", 2 * GIB, 1500 * MIB)
    assert reader.look(300 * MIB, 3 * SECOND)[0] == left - 1200 * MIB, "only what others use has grown"
    tree.cgroup("outer/inner", 2 * GIB, 1500 * MIB, cache=1000 * MIB)
    assert reader.look(300 * MIB, 4 * SECOND)[0] == left - 200 * MIB, "page cache can go"


def test_a_limit_may_come_and_go_at_any_level(tree: Tree) -> None:
    reader = tree.reader()
    assert reader.look(0, SECOND)[0] == 2 * GIB - 2 * GIB // 10 - 500 * MIB
    tree.cgroup("outer", GIB, 700 * MIB)
    assert reader.look(0, 2 * SECOND)[0] == GIB - GIB // 10 - 700 * MIB
    tree.cgroup("outer", None, 700 * MIB)
    tree.cgroup("outer/inner", None, 500 * MIB)
    assert reader.look(0, 3 * SECOND)[0] == 9 * GIB, "three quarters of what the machine has available"
    tree.available(2 * GIB)
    assert reader.look(10 * GIB, 4 * SECOND)[0] == 9 * GIB, "what we use is not available, but ours"


def test_the_less_is_left_the_sooner_it_looks_again(tree: Tree) -> None:
    reader = tree.reader()
    pauses: list[int] = []
    for usage in (500, 1900, 1980, 2030, 2047):
        tree.cgroup("outer/inner", 2 * GIB, usage * MIB)
        pauses.append(reader.look(0, SECOND * len(pauses) + SECOND)[1])
    assert pauses[0] >= 250
    assert pauses == sorted(pauses, reverse=True)
    assert 1 <= pauses[-1] <= 10


def test_a_quick_look_sees_what_has_moved(tree: Tree) -> None:
    """Between two looks at everything, by the number alone."""
    reader = tree.reader()
    before = reader.look(0, SECOND)[0]
    tree.cgroup("outer/inner", 2 * GIB, 900 * MIB)
    assert reader.look(0, SECOND + SECOND // 100)[0] == before - 400 * MIB


def test_pressure_takes_more_as_long_as_it_lasts(tree: Tree) -> None:
    tree.cgroup("outer/inner", 2 * GIB, 1800 * MIB)
    reader = tree.reader()
    calm = reader.look(1300 * MIB, SECOND)[0]
    budgets = []
    for turn in range(2, 8):
        tree.pressure(turn * 500_000)  # half of each second
        budgets.append(reader.look(1300 * MIB, turn * SECOND)[0])
    assert calm > budgets[0] > budgets[1] > budgets[2]
    assert min(budgets) >= calm * 3 // 4 - 1
    for turn in range(8, 30):
        after = reader.look(1300 * MIB, turn * SECOND)[0]
    assert after > calm * 0.99
    tree.cgroup("outer/inner", 2 * GIB, 600 * MIB)
    roomy = reader.look(100 * MIB, 30 * SECOND)[0]
    tree.pressure(60_000_000)
    assert reader.look(100 * MIB, 31 * SECOND)[0] >= roomy, "there is much left: it is about others"


def test_coming_to_the_limit_takes_more(tree: Tree) -> None:
    tree.cgroup("outer/inner", 2 * GIB, 2000 * MIB, events=5)
    reader = tree.reader()
    calm = reader.look(1500 * MIB, SECOND)[0]
    tree.cgroup("outer/inner", 2 * GIB, 2000 * MIB, events=8)
    assert reader.look(1500 * MIB, SECOND + 1000)[0] < calm


def test_the_reserve_of_no_limit_was_no_number() -> None:
    assert [watch.reserve(limit) for limit in (1 << 60, (1 << 60) - 1, 10**12 + 99)] == [
        limit // 10 for limit in (1 << 60, (1 << 60) - 1, 10**12 + 99)
    ]


def test_files_that_go_away_or_say_nothing_are_passed_over(tree: Tree) -> None:
    reader = tree.reader()
    reader.look(0, SECOND)
    for file in sorted((tree.root / "outer").rglob("memory.*")):
        file.write_text("junk\n\0\xff 12 x")
    assert reader.look(0, 2 * SECOND)[0] == 9 * GIB
    with pytest.raises(OSError):
        Reader([], str(tree.root / "nowhere"))


def test_on_this_machine_it_says_what_the_default_says() -> None:
    """Two ways to the same files: once when a pool is made, and again and again."""
    limits = memory_limits()
    again = Reader(watched_levels(), "/proc").look(0)[0]
    assert again == pytest.approx(default_budget().bytes, rel=0.1, abs=64 * MIB), limits


# ---- the real thing: programs in a cgroup, with no flag but `userswap run` ----


START = """
import mmap, sys, time
import numpy as np
rng = np.random.default_rng(1)
noise = np.round(np.cumsum(rng.standard_normal(1 << 19)), 2)
def row(i):
    return np.roll(noise, 1000 * i) + i
"""
ARRAYS = (
    START
    + """
rows = []
for i in range(int(sys.argv[1])):                               # 4 MiB each
    rows.append(np.empty(1 << 19))
    rows[-1][:] = row(i)
"""
)
CHECK = """
for i, r in enumerate(rows):
    assert np.array_equal(r, row(i)), i
print("whole")
"""


def start(group: Path, code: str, *args: str, watch: bool = True) -> subprocess.Popen[str]:
    """`userswap run` of a program, in a cgroup."""
    return subprocess.Popen(
        ["sh", "-c", f'echo $$ > "{group}/cgroup.procs" && exec "$@"', "sh",
         sys.executable, "-m", "userswap", "run", "--quiet", "-c", code, *args],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1",
             "USERSWAP_WATCH": "1" if watch else "0"},
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture
def group() -> Iterator[Path]:
    with memory_cgroup(256 * MIB) as group:
        yield group


def test_a_program_runs_in_a_limit_well_under_its_arrays(group: Path) -> None:
    """512 MiB of arrays in a cgroup of 256: it is killed without, and whole with nothing but `userswap run`."""
    enter = f"open({str(group / 'cgroup.procs')!r}, 'w').write('0')\n"
    assert run_python(enter + ARRAYS + CHECK, "128").returncode == -9, "the limit is real"
    assert ended(start(group, ARRAYS + CHECK, "128")) == (0, "whole\n", "")


def test_a_budget_that_had_to_shrink_grows_again(group: Path) -> None:
    """Other memory comes, and goes: the budget is what it was, and is used."""
    code = f"""
open({str(group / "cgroup.procs")!r}, "w").write("0")
import time, numpy as np, userswap
pool = userswap.Pool()
before = pool.ram
def settled(what):
    until = time.monotonic() + 20
    while not what() and time.monotonic() < until:
        time.sleep(0.01)
    return what()
held = bytearray(100 << 20)
print(settled(lambda: pool.ram < before - (60 << 20)))
del held
print(settled(lambda: pool.ram > before - (16 << 20)))
array = pool.empty(before - (32 << 20), np.uint8)
array[:] = 1
print(pool.stats().resident_bytes > before - (40 << 20))
"""
    result = run_python(code)
    assert (result.returncode, result.stdout) == (0, "True\nTrue\nTrue\n"), result.stderr


def test_what_a_forked_child_uses_is_no_reason_to_shrink(group: Path) -> None:
    """It is the family's, which divides it: the budget is for all of them."""
    code = f"""
open({str(group / "cgroup.procs")!r}, "w").write("0")
import os, time, numpy as np, userswap
pool = userswap.Pool()
before = pool.ram
array = pool.zeros(32 << 20, np.uint8)
array[:] = 1
tell, hear = os.pipe(), os.pipe()
child = os.fork()
if child == 0:
    own = pool.empty(before // 2, np.uint8)
    own[:] = 2
    os.write(tell[1], b"x")
    os.read(hear[0], 1)
    os._exit(0)
os.read(tell[0], 1)
# Until it has looked many times.
until = time.monotonic() + 3
least = before
while time.monotonic() < until:
    least = min(least, pool.ram)
    time.sleep(0.01)
print(before - least)
print(before // 2 > 64 << 20)
os.write(hear[1], b"x")
print(os.waitpid(child, 0)[1])
"""
    result = run_python(code)
    assert result.returncode == 0, result.stderr
    shrunk, much, status = result.stdout.split()
    assert (much, status) == ("True", "0")
    assert int(shrunk) < 48 * MIB, "it uses twice that and more"


PLAIN = """
held = []
for i in range(30):                                             # 120 MiB that are no array of ours, at 200 MB/s
    held.append(mmap.mmap(-1, 4 << 20))
    for at in range(0, 4 << 20, 4096):
        held[-1][at] = 1
    time.sleep(0.02)
"""


@pytest.mark.parametrize("watch", [True, False])
def test_other_memory_grows_beside_the_arrays(group: Path, watch: bool) -> None:
    """More than the reserve: without the watch the kernel kills the program."""
    code, out, err = ended(start(group, ARRAYS + PLAIN + CHECK, "64", watch=watch))
    if watch:
        assert (code, out, err) == (0, "whole\n", "")
    else:
        assert code in (-9, 137), "what this is about is real"


GO_ON = """
print("ready", flush=True)
while not sys.stdin.readline().startswith("done"):
    pass
"""


def lower(group: Path, goal: int, seconds: float) -> bool:
    """Lower the limit of a cgroup step by step, each when there is room for it; whether it got there.

    In one step version 1 would refuse, and version 2 kill the program at once, whatever it did."""
    limit, usage = group / "memory.limit_in_bytes", group / "memory.usage_in_bytes"
    if not limit.exists():
        limit, usage = group / "memory.max", group / "memory.current"
    now = int(limit.read_text())
    until = time.monotonic() + seconds
    while now > goal and time.monotonic() < until:
        step = max(goal, now - 16 * MIB)
        if int(usage.read_text()) + 32 * MIB < step:
            limit.write_text(str(step))
            now = step
        else:
            time.sleep(0.02)
    return now == goal


@pytest.mark.parametrize("watch", [True, False])
def test_the_limit_is_lowered_while_the_program_runs(watch: bool) -> None:
    with memory_cgroup(512 * MIB) as group:
        process = start(group, ARRAYS + GO_ON + CHECK, "160", watch=watch)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        lowered = lower(group, 224 * MIB, seconds=60 if watch else 3)
        assert lowered == watch, "what is in place stays there unless the budget follows"
        assert ended_by(process, "done\n") == (0, "whole\n", "")


def ended_by(process: subprocess.Popen[str], said: str) -> tuple[int, str, str]:
    out, err = process.communicate(said, timeout=120)
    return process.returncode, out, err


def test_a_budget_that_was_given_is_not_changed(group: Path) -> None:
    code = f"""
open({str(group / "cgroup.procs")!r}, "w").write("0")
import time, userswap
mine, followed = userswap.Pool(ram="48MiB"), userswap.Pool()
before = followed.ram
held = bytearray(100 << 20)
until = time.monotonic() + 20
while followed.ram > before - (60 << 20) and followed.ram > 16 << 20 and time.monotonic() < until:
    time.sleep(0.01)
print(mine.ram >> 20, before > followed.ram)
followed.ram = "40MiB"
del held
time.sleep(0.6)
print(followed.ram >> 20)
"""
    result = run_python(code)
    assert (result.returncode, result.stdout) == (0, "48 True\n40\n"), result.stderr
    assert userswap.Pool(ram="32MiB").budget_reason is None
