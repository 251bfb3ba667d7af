"""Memory cgroups of ours, versions 1 and 2: one is made, limited, read, and removed. Needs root."""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from userswap.budget import memory_hierarchies, number
from userswap.errors import BenchError

__all__ = ["Cgroup", "new_cgroup", "why_no_cgroup"]

LIFT = 1 << 18


@dataclass(frozen=True)
class Cgroup:
    """A memory cgroup that only our measurement is in."""

    version: int
    path: Path

    @property
    def procs(self) -> Path:
        """Who writes its process id there is in."""
        return self.path / "cgroup.procs"

    @property
    def usage_file(self) -> Path:
        """Bytes in use: memory and page cache."""
        return self.path / ("memory.current" if self.version == 2 else "memory.usage_in_bytes")

    @property
    def charges_zswap(self) -> bool:
        """Whether the limit covers what zswap stores compressed; of zram no version knows anything."""
        return self.version == 2

    def entering(self, command: list[str]) -> list[str]:
        """The command, as a process that joins before it is Python: what that maps and allocates is charged, too."""
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.procs), *command]

    def usage(self) -> int:
        """Bytes in use now."""
        return number(self.usage_file) or 0

    def peak(self) -> int:
        """Most bytes that were in use at once; 0 if this kernel doesn't say."""
        return number(self.path / ("memory.peak" if self.version == 2 else "memory.max_usage_in_bytes")) or 0

    def killed(self) -> int:
        """How many processes the kernel killed in it for want of memory."""
        file = self.path / ("memory.events" if self.version == 2 else "memory.oom_control")
        return int(dict(line.split() for line in file.read_text().splitlines()).get("oom_kill", 0))

    def limit(self, size: int) -> None:
        """Limit memory and page cache. In version 1 nobody is killed: who finds no memory waits (see `let_go_on`)."""
        (self.path / ("memory.max" if self.version == 2 else "memory.limit_in_bytes")).write_text(str(size))
        if self.version == 1:
            (self.path / "memory.oom_control").write_text("1")

    def try_limit(self, size: int) -> bool:
        """Change the limit; False: what is in use can't be brought below it now."""
        try:
            self.limit(size)
        except OSError:
            return False
        return True

    def unlimit(self) -> None:
        """Have no limit any more."""
        (self.path / ("memory.max" if self.version == 2 else "memory.limit_in_bytes")).write_text(
            "max" if self.version == 2 else "-1"
        )

    def forget_peak(self) -> None:
        """Have `peak` begin anew, where the kernel can."""
        if self.version == 1:
            (self.path / "memory.max_usage_in_bytes").write_text("0")

    def let_go_on(self, limit: int) -> bool:
        """Wake who waits for memory, by lifting the limit for a moment; say whether somebody did."""
        if self.version == 2 or "under_oom 1" not in (self.path / "memory.oom_control").read_text():
            return False
        self.limit(limit + LIFT)
        # The kernel may need more than one attempt to get below it again.
        with suppress(OSError):
            self.limit(limit)
        return True


def hierarchy() -> tuple[int, Path]:
    """Return version and mount point of a memory hierarchy that can be used.

    Raises:
        BenchError: there is none, or it may not be written to; the text says why.
    """
    if os.geteuid() != 0:
        raise BenchError("needs root")
    for version, top, _, _ in memory_hierarchies(Path("/")):
        if version == 2 and "memory" not in (top / "cgroup.controllers").read_text().split():
            continue
        if os.access(top, os.W_OK):
            return version, top
    raise BenchError("no memory cgroup can be made here: the cgroup file system is missing or read-only")


def why_no_cgroup() -> str | None:
    """Say why no cgroup can be made, None if one can."""
    try:
        with new_cgroup():
            return None
    except BenchError as error:
        return str(error)


@contextmanager
def new_cgroup() -> Iterator[Cgroup]:
    """Make a memory cgroup for the time of a `with` block. All its processes must be gone at the end.

    Raises:
        BenchError: it can't be made; the text says why.
    """
    version, top = hierarchy()
    cgroup = Cgroup(version, top / f"userswap-bench-{os.getpid()}")
    enabled = False
    try:
        control = top / "cgroup.subtree_control"
        if version == 2 and "memory" not in control.read_text().split():
            control.write_text("+memory")
            enabled = True
        cgroup.path.mkdir(exist_ok=True)
    except OSError as error:
        raise BenchError(f"no memory cgroup can be made here: {error.strerror}") from None
    try:
        yield cgroup
    finally:
        remove(cgroup.path)
        if enabled:
            control.write_text("-memory")


def remove(path: Path) -> None:
    """Remove a cgroup; the kernel takes a moment to let go of a process that has ended."""
    for _ in range(200):
        try:
            path.rmdir()
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.01)
    path.rmdir()
