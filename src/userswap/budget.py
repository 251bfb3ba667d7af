"""How much RAM a program may have when nobody says: what its cgroups or the machine leave.

Container limits live in the cgroup file system, version 1 or 2 or both at once (hybrid). The limit that
counts is that of the process's own cgroup or of any cgroup above it, whichever leaves least. Every file
may be missing, and paths as the kernel writes them need not exist inside a container.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from userswap.errors import BudgetError
from userswap.reclaim import watch
from userswap.sizes import format_size

__all__ = ["Budget", "Limit", "counting_limit", "default_budget", "memory_limits", "total_ram", "watched_levels"]

MIB = 1 << 20
# With less than this a default makes no sense; who wants less asks for it with --ram.
LEAST_BUDGET = 16 * MIB
# cgroup v1 writes "no limit" as the largest multiple of a page; any number this large means it.
UNLIMITED = 1 << 60


class Budget(NamedTuple):
    """A RAM budget in bytes, and one sentence that says where it comes from."""

    bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Limit:
    """A cgroup that limits memory: its limit, and what of it cannot be given back (all in bytes)."""

    cgroup: str
    file: str
    limit: int
    used: int

    @property
    def reserve(self) -> int:
        """Bytes of the limit to leave to the interpreter and to page cache."""
        return watch.reserve(self.limit)

    @property
    def left(self) -> int:
        """Bytes of the limit that a budget may take; negative when there is not even the reserve."""
        return self.limit - self.used - self.reserve


def total_ram(root: Path = Path("/")) -> int:
    """Return the bytes of RAM this machine has (MemTotal).

    `root` is where the tree that holds proc/ and sys/ begins; only tests change it.
    Raises BudgetError when /proc cannot be read.
    """
    return meminfo(root)["MemTotal"]


def default_budget(root: Path = Path("/")) -> Budget:
    """Return the budget for a program that was given none, with the reason.

    It is the smallest of what is left under every memory limit of the process's cgroups (limit, less
    what is used and cannot be reclaimed, less a reserve of 64 MiB or 10 % for the interpreter) and of
    75 % of the machine's MemAvailable.

    Raises BudgetError when that is under 16 MiB, or /proc cannot be read.
    """
    available = available_ram(root)
    budget = Budget(
        available * watch.MACHINE_SHARE // 100,
        f"{watch.MACHINE_SHARE} % of the {format_size(available)} of RAM this machine has available",
    )
    limit = counting_limit(root)
    if limit is not None:
        budget = Budget(
            max(limit.left, 0),
            f"cgroup {limit.cgroup} limits memory to {format_size(limit.limit)} ({limit.file}), of which "
            f"{format_size(limit.used)} is in use and {format_size(limit.reserve)} is the interpreter's",
        )
    if budget.bytes < LEAST_BUDGET:
        raise BudgetError(
            f"Only {format_size(budget.bytes)} of RAM is left for a budget: {budget.reason}. "
            "Raise the limit or free memory, or say how much to use, for example --ram 64M."
        )
    return budget


def counting_limit(root: Path = Path("/")) -> Limit | None:
    """Return the limit that the default budget comes from: the one that leaves least, if the machine leaves more.

    Raises BudgetError when /proc/meminfo cannot be read.
    """
    tightest = min(memory_limits(root), key=lambda limit: limit.left, default=None)
    if tightest is None or tightest.left >= available_ram(root) * watch.MACHINE_SHARE // 100:
        return None
    return tightest


def available_ram(root: Path) -> int:
    """Return the bytes of RAM that this machine has available."""
    memory = meminfo(root)
    return memory.get("MemAvailable", memory.get("MemFree", 0) + memory.get("Cached", 0))


def memory_limits(root: Path = Path("/")) -> list[Limit]:
    """Return every memory limit on this process, its own cgroup's first, then those of the cgroups above.

    Limits that cannot bind, because the machine has no more RAM than that, are left out.
    Raises BudgetError when /proc/meminfo cannot be read.
    """
    most = min(total_ram(root), UNLIMITED)
    limits = []
    for version, top, mounted_from, cgroup in memory_hierarchies(root):
        directory = inside(top, mounted_from, cgroup)
        for level in upwards(top, directory):
            limit = watch.read_level(version, str(level), most)
            if limit is not None:
                # Named as seen from here: below the mount point.
                name = "/" + "/".join(level.relative_to(top).parts)
                limits.append(Limit(name, *limit))
    return limits


def watched_levels(root: Path = Path("/")) -> list[tuple[int, str]]:
    """Return version and directory of every memory cgroup that this process is in, its own first.

    Also those without a limit: it may get one while the program runs.
    """
    levels = []
    for version, top, mounted_from, cgroup in memory_hierarchies(root):
        levels += [(version, str(level)) for level in upwards(top, inside(top, mounted_from, cgroup))]
    return levels


def upwards(top: Path, directory: Path) -> Iterator[Path]:
    """Yield `directory` and those above it, up to `top`."""
    while directory != top:
        yield directory
        directory = directory.parent
    yield top


def memory_hierarchies(root: Path) -> Iterator[tuple[int, Path, str, str]]:
    """Yield (version, mount point, directory of the hierarchy mounted there, own cgroup)."""
    own: dict[int, str] = {}
    for line in lines(root / "proc/self/cgroup"):
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            own[2] = path
        elif "memory" in controllers.split(","):
            own[1] = path
    seen = set()
    for line in lines(root / "proc/self/mountinfo"):
        # 36 35 98:0 /root /mount/point options [optional fields] - type source super-options
        front, separator, back = line.partition(" - ")
        fields, kind = front.split(" "), back.split(" ")
        if not separator or len(fields) < 6 or len(kind) < 3:
            continue
        version = {"cgroup2": 2, "cgroup": 1}.get(kind[0], 0)
        if version == 1 and "memory" not in kind[2].split(","):
            continue
        if version in own and version not in seen:
            mount = root / unescaped(fields[4]).lstrip("/")
            if mount.is_dir():
                seen.add(version)
                yield version, mount, unescaped(fields[3]), own[version]


def inside(top: Path, mounted_from: str, cgroup: str) -> Path:
    """Return the deepest directory under the mount point `top` that stands for `cgroup`.

    Only the part of the hierarchy below `mounted_from` is visible there. A cgroup outside of it (a
    namespace writes "/../other") or one that is not visible is represented by the nearest one above it.
    """
    below = cgroup
    if mounted_from != "/":
        if cgroup != mounted_from and not cgroup.startswith(mounted_from + "/"):
            return top
        below = cgroup[len(mounted_from) :]
    parts = [part for part in below.split("/") if part]
    if ".." in parts:
        return top
    directory = top
    for part in parts:
        if not (directory / part).is_dir():
            break
        directory /= part
    return directory


def meminfo(root: Path) -> dict[str, int]:
    """Return /proc/meminfo in bytes."""
    sizes = {}
    for line in lines(root / "proc/meminfo"):
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdecimal():
            sizes[name] = int(words[0]) * (1024 if words[1:] == ["kB"] else 1)
    if "MemTotal" not in sizes:
        raise BudgetError(
            "How much RAM this machine has cannot be told, because /proc/meminfo cannot be read. "
            "Mount /proc, or say how much to use, for example --ram 512M."
        )
    return sizes


def number(file: Path) -> int | None:
    """Return the number a file holds; None for "max", and for a file that cannot be read."""
    text = "".join(lines(file)[:1]).strip()
    return int(text) if text.isdecimal() else None


def lines(file: Path) -> list[str]:
    """Return a file's lines; none when it cannot be read."""
    try:
        return file.read_text(errors="surrogateescape").split("\n")
    except OSError:
        return []


def unescaped(path: str) -> str:
    """Undo the octal escapes that mountinfo uses for space, tab, newline and backslash."""
    return re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), path)
