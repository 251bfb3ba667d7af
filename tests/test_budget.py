"""The default budget: real cgroups where they can be made, trees in a directory for every other layout."""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from userswap.budget import counting_limit, default_budget, memory_hierarchies, memory_limits, total_ram
from userswap.errors import BudgetError

MIB = 1 << 20
GIB = 1 << 30
NO_LIMIT_V1 = str(0x7FFFFFFFFFFFF000)


class Tree:
    """A fake machine: /proc and cgroup mounts in a directory."""

    def __init__(self, root: Path, total: int = 16 * GIB, available: int = 8 * GIB) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: {total // 1024} kB\nMemAvailable: {available // 1024} kB\n")

    def write(self, file: str, text: str | int) -> None:
        path = self.root / file.lstrip("/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")

    def self(self, cgroup: str, mountinfo: str) -> None:
        self.write("proc/self/cgroup", cgroup)
        self.write("proc/self/mountinfo", mountinfo)


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


V2_MOUNT = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"


def test_no_cgroups_at_all(tree: Tree) -> None:
    budget = default_budget(tree.root)
    assert budget.bytes == 6 * GIB
    assert budget.reason == "75 % of the 8 GiB of RAM this machine has available"
    assert total_ram(tree.root) == 16 * GIB


def test_version_2_limit_less_use_less_reserve(tree: Tree) -> None:
    tree.self("0::/", V2_MOUNT)
    tree.write("/sys/fs/cgroup/memory.max", 2 * GIB)
    tree.write("/sys/fs/cgroup/memory.current", 300 * MIB)
    budget = default_budget(tree.root)
    assert budget.bytes == 2 * GIB - 300 * MIB - 2 * GIB // 10
    assert "limits memory to 2 GiB (memory.max), of which 300 MiB is in use" in budget.reason


def test_page_cache_is_not_in_use_unless_it_is_mapped(tree: Tree) -> None:
    tree.self("0::/", V2_MOUNT)
    tree.write("/sys/fs/cgroup/memory.max", 1 * GIB)
    tree.write("/sys/fs/cgroup/memory.current", 800 * MIB)
    stat = f"inactive_file {500 * MIB}\nactive_file {200 * MIB}\nfile_mapped {50 * MIB}"
    tree.write("/sys/fs/cgroup/memory.stat", stat)
    assert memory_limits(tree.root)[0].used == 150 * MIB


def test_memory_high_counts_too(tree: Tree) -> None:
    tree.self("0::/", V2_MOUNT)
    tree.write("/sys/fs/cgroup/memory.max", "max")
    tree.write("/sys/fs/cgroup/memory.high", 512 * MIB)
    budget = default_budget(tree.root)
    assert budget.bytes == (512 - 64) * MIB
    assert "(memory.high)" in budget.reason


def test_the_ancestor_that_leaves_least_counts(tree: Tree) -> None:
    tree.self("0::/kubepods/pod1/box", V2_MOUNT)
    tree.write("/sys/fs/cgroup/kubepods/pod1/box/memory.max", 4 * GIB)
    tree.write("/sys/fs/cgroup/kubepods/pod1/memory.max", 3 * GIB)
    tree.write("/sys/fs/cgroup/kubepods/pod1/memory.current", 2 * GIB)
    tree.write("/sys/fs/cgroup/kubepods/memory.max", "max")
    budget = default_budget(tree.root)
    assert budget.bytes == 3 * GIB - 2 * GIB - 3 * GIB // 10
    assert "/kubepods/pod1 " in budget.reason
    assert [limit.cgroup for limit in memory_limits(tree.root)] == ["/kubepods/pod1/box", "/kubepods/pod1"]
    counts = counting_limit(tree.root)
    assert counts is not None
    assert counts.cgroup == "/kubepods/pod1"
    tree.write("proc/meminfo", f"MemTotal: {16 * GIB // 1024} kB\nMemAvailable: {GIB // 2048} kB\n")
    assert counting_limit(tree.root) is None, "the machine leaves less"


def test_version_1_as_docker_mounts_it(tree: Tree) -> None:
    tree.self(
        "12:cpu,cpuacct:/docker/abc\n5:hugetlb,memory:/docker/abc\n1:name=systemd:/docker/abc",
        "1 0 0:1 /docker/abc /sys/fs/cgroup/cpu,cpuacct ro - cgroup cgroup rw,cpu,cpuacct\n"
        "2 0 0:2 /docker/abc /sys/fs/cgroup/memory ro - cgroup cgroup rw,hugetlb,memory",
    )
    tree.write("/sys/fs/cgroup/memory/memory.limit_in_bytes", 1 * GIB)
    tree.write("/sys/fs/cgroup/memory/memory.usage_in_bytes", 200 * MIB)
    tree.write(
        "/sys/fs/cgroup/memory/memory.stat",
        f"total_inactive_file {150 * MIB}\nhierarchical_memory_limit {GIB}",
    )
    [limit] = memory_limits(tree.root)
    assert (limit.limit, limit.used, limit.cgroup) == (GIB, 50 * MIB, "/")


def test_version_1_tells_of_invisible_ancestors(tree: Tree) -> None:
    tree.self("5:memory:/docker/abc", "2 0 0:2 /docker/abc /cg ro - cgroup cgroup rw,memory")
    tree.write("/cg/memory.limit_in_bytes", NO_LIMIT_V1)
    tree.write("/cg/memory.stat", f"hierarchical_memory_limit {256 * MIB}")
    assert memory_limits(tree.root)[0].limit == 256 * MIB


def test_no_limit_in_version_1_is_no_limit(tree: Tree) -> None:
    tree.self("5:memory:/", "2 0 0:2 / /cg ro - cgroup cgroup rw,memory")
    tree.write("/cg/memory.limit_in_bytes", NO_LIMIT_V1)
    assert memory_limits(tree.root) == []


def test_a_limit_beyond_the_machine_is_no_limit(tree: Tree) -> None:
    tree.self("0::/", V2_MOUNT)
    tree.write("/sys/fs/cgroup/memory.max", 64 * GIB)
    assert memory_limits(tree.root) == []
    assert "machine" in default_budget(tree.root).reason


def test_hybrid_with_spaces_in_paths(tree: Tree) -> None:
    tree.self(
        "4:memory:/my app\n0::/my app",
        "1 0 0:1 / /cg\\040v1 rw - cgroup cgroup rw,memory\n2 0 0:2 / /cg\\040v2 rw - cgroup2 none rw",
    )
    tree.write("/cg v1/my app/memory.limit_in_bytes", 700 * MIB)
    tree.write("/cg v2/my app/cgroup.procs", 1)
    assert [(limit.limit, limit.cgroup) for limit in memory_limits(tree.root)] == [(700 * MIB, "/my app")]


@pytest.mark.parametrize("cgroup", ["/../other", "/elsewhere", "/gone/deep", "/a/../../b", "/"])
def test_paths_that_are_not_there_lead_to_what_is(tree: Tree, cgroup: str) -> None:
    tree.self(f"0::{cgroup}", V2_MOUNT)
    tree.write("/sys/fs/cgroup/memory.max", 900 * MIB)
    assert [limit.limit for limit in memory_limits(tree.root)] == [900 * MIB]


def test_a_mount_of_another_part_of_the_hierarchy(tree: Tree) -> None:
    tree.self("0::/a/b", "30 23 0:26 /a/bc /cg rw - cgroup2 cgroup2 rw")
    tree.write("/cg/memory.max", 900 * MIB)
    assert [limit.limit for limit in memory_limits(tree.root)] == [900 * MIB]


@pytest.mark.parametrize("text", ["", "junk", "0:", "a:b:c:d", "1 2 3 - x", " - - - ", "\x00\xff"])
def test_junk_in_proc_is_passed_over(tree: Tree, text: str) -> None:
    tree.self(text, text)
    assert list(memory_hierarchies(tree.root)) == []
    assert default_budget(tree.root).bytes == 6 * GIB


def test_junk_in_limits_is_passed_over(tree: Tree) -> None:
    tree.self("0::/", V2_MOUNT)
    tree.write("/sys/fs/cgroup/memory.max", "lots")
    tree.write("/sys/fs/cgroup/memory.stat", "inactive_file\nx y z\nactive_file -3")
    assert memory_limits(tree.root) == []


def test_nothing_left_is_said_with_the_way_out(tree: Tree) -> None:
    tree.self("0::/", V2_MOUNT)
    tree.write("/sys/fs/cgroup/memory.max", 100 * MIB)
    tree.write("/sys/fs/cgroup/memory.current", 90 * MIB)
    with pytest.raises(BudgetError, match=r"^Only 0 B .* limits memory to 100 MiB .* --ram 64M\.$"):
        default_budget(tree.root)


def test_no_proc(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="/proc/meminfo"):
        default_budget(tmp_path)


def test_this_machine() -> None:
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert abs(total_ram() - pages) < 64 * MIB
    assert 16 * MIB <= default_budget().bytes < total_ram()


@contextlib.contextmanager
def real_cgroups() -> Iterator[tuple[Path, str]]:
    """Make a cgroup inside another, below this process's own; give the inner one and its file to write."""
    for version, mount, _, own in memory_hierarchies(Path("/")):
        file = "memory.max" if version == 2 else "memory.limit_in_bytes"
        outer = mount / own.lstrip("/") / f"userswap-test-{os.getpid()}"
        inner = outer / "inner"
        try:
            inner.mkdir(parents=True)
            if not (inner / file).exists():
                raise PermissionError
        except OSError:
            for directory in (inner, outer):
                with contextlib.suppress(OSError):
                    directory.rmdir()
            continue
        try:
            yield inner, file
        finally:
            for directory in (inner, outer):
                for _ in range(100):
                    try:
                        directory.rmdir()
                        break
                    except OSError:
                        time.sleep(0.05)
        return
    pytest.skip("no memory cgroup can be made here: needs root and a writable cgroup file system")


def budget_in(cgroup: Path) -> dict[str, int | str]:
    """Return the default budget of a process that runs in `cgroup`."""
    code = "import json; from userswap.budget import *; print(json.dumps(default_budget()._asdict()))"
    shell = f'echo $$ > "{cgroup}/cgroup.procs" && exec "$0" "$@"'
    command = ["sh", "-c", shell, sys.executable, "-c", code]
    result = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    answer: dict[str, int | str] = json.loads(result.stdout)
    return answer


def test_a_real_cgroup() -> None:
    with real_cgroups() as (cgroup, file):
        (cgroup / file).write_text(str(400 * MIB))
        budget = budget_in(cgroup)
    assert 200 * MIB < int(budget["bytes"]) <= (400 - 64) * MIB
    assert "limits memory to 400 MiB" in str(budget["reason"])


def test_a_real_cgroup_above_a_roomier_one() -> None:
    with real_cgroups() as (cgroup, file):
        (cgroup.parent / file).write_text(str(300 * MIB))
        (cgroup / file).write_text(str(300 * MIB))
        with contextlib.suppress(OSError):
            (cgroup / file).write_text(str(2 * GIB))
        budget = budget_in(cgroup)
    assert 100 * MIB < int(budget["bytes"]) <= (300 - 64) * MIB
    assert "limits memory to 300 MiB" in str(budget["reason"])
