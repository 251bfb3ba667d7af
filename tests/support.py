"""What several test files share: running the command, and places that only root can make."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from userswap.bench import runs

# Where frames are copied there are no parts of folios, and nothing is read ahead.
only_moved = pytest.mark.skipif(
    os.environ.get("USERSWAP_DELIVERY") == "segv", reason="frames can't be moved under this delivery"
)
# Threads that serve faults read them, and a process's reads are what such a test counts.
only_quiet = pytest.mark.skipif(
    os.environ.get("USERSWAP_DELIVERY") in ("segv", "thread"), reason="reads are counted, and windows are wanted"
)

Result = subprocess.CompletedProcess[str]


def python(*arguments: str, **options: Any) -> Result:
    """Run plain Python and return what it printed."""
    options = {"capture_output": True, "text": True, "timeout": 120, "stdin": subprocess.DEVNULL} | options
    if "input" in options:
        del options["stdin"]
    return subprocess.run([sys.executable, *arguments], check=False, **options)


def userswap(*arguments: str, **options: Any) -> Result:
    """Run the command `userswap` and return what it printed."""
    return python("-m", "userswap", *arguments, **options)


@contextmanager
def mounted(point: Path, *mount: str) -> Iterator[Path]:
    """Mount something at `point` (made if missing) for the time of a `with` block; root only."""
    point.mkdir(exist_ok=True)
    subprocess.run(["mount", *mount, str(point)], check=True, capture_output=True)
    try:
        yield point
    finally:
        subprocess.run(["umount", "--lazy", str(point)], check=True, capture_output=True)


@contextmanager
def small_disk(directory: Path, megabytes: int) -> Iterator[Path]:
    """Mount an ext4 file system of a few megabytes, with nothing reserved for root; root only."""
    image = directory / "disk.img"
    with image.open("wb") as file:
        file.truncate(megabytes << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", "-m", "0", str(image)], check=True, capture_output=True)
    with mounted(directory / "disk", "-o", "loop", str(image)) as point:
        yield point


def fill(directory: Path) -> None:
    """Fill a (small) file system until nothing more fits."""
    with (directory / "filler").open("wb", buffering=0) as file:
        for size in (1 << 20, 4096):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass
        os.sync()


# ---- what benchmarks set up ----

ZSWAP = Path("/sys/module/zswap/parameters")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="the kernel's swap is set up by root only")


def left_behind() -> dict[str, Any]:
    """What a comparison might leave on the machine."""
    return {
        "swap": [line for line in Path("/proc/swaps").read_text().splitlines() if "userswap-bench" in line],
        "zram": sorted(path.name for path in Path("/sys/block").glob("zram*")),
        "cgroups": [*map(str, Path("/sys/fs/cgroup").glob("**/userswap-bench-*"))]
        if Path("/sys/fs/cgroup").is_dir()
        else [],
        "files": sorted(map(str, Path(os.environ.get("TMPDIR", "/var/tmp")).glob("userswap-bench-*"))),
        "zswap": {file.name: file.read_text() for file in ZSWAP.iterdir()} if ZSWAP.is_dir() else {},
    }


@pytest.fixture
def nothing_stays() -> Iterator[None]:
    """Look before and after, while no other comparison on this machine has its own things set up."""
    with runs.alone(runs.Stop()):
        before = left_behind()
    yield
    with runs.alone(runs.Stop()):
        assert left_behind() == before
