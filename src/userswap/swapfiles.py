"""From what a user writes ("/var/tmp", "ssd=/data/swap:8G:10", "none") to open swap files.

A swap file holds a program's memory, so it is private (mode 0600), never on a file system that itself
lives in RAM, and it leaves nothing behind:

- PATH is a directory: a file without a name is made there.
- PATH does not exist: the file is created, locked, and its name removed at once, so that its space is
  free again however the program ends, SIGKILL included. The name serves messages only.
- PATH is an existing empty file of this user: it is used, locked against a second user and marked as
  holding swap; whoever closes it empties it first. If a crash prevents that, the mark lets the next run
  take it over.
- Any other existing file is refused. There is no way to force it: who wants it overwritten removes it first.

A file of its own is asked for once: two on one disk only share its bandwidth, and a second one at the same path would be
an accident.
"""

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import re
import resource
import stat
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from userswap.errors import BadSize, SwapPathError, TierError
from userswap.sizes import format_size, parse_size

__all__ = [
    "NETWORK",
    "OpenSwapFile",
    "SwapSpec",
    "default_places",
    "file_system",
    "identities",
    "open_spec",
    "open_swap",
    "parse_swap",
    "parse_swaps",
]

# The core allocates in clusters of 2 MiB: with less than one there is nothing to allocate.
LEAST_SWAP = 2 << 20
PAGE = 4096
# statfs(2): what the kernel answers as f_type.
IN_MEMORY = {0x01021994: "tmpfs", 0x858458F6: "ramfs", 0x958458F6: "hugetlbfs"}
NETWORK = {
    0x6969: "NFS", 0xFF534D42: "CIFS", 0xFE534D42: "SMB", 0x517B: "SMB", 0x01021997: "9p", 0x65735546: "FUSE",
    0x00C36400: "Ceph", 0x5346414F: "AFS",
}  # fmt: skip
MOST_PRIORITY = 1000
TIER = re.compile(r"([a-z][a-z0-9_-]*)=(.*)", re.DOTALL)
NEARLY_TIER = re.compile(r"([A-Za-z0-9_-]*)=([/~.].*)", re.DOTALL)
RESERVED = ("zswap", "none")
PRIORITY = re.compile(r"\s*([+-]?\d+)\s*")
MARK = "user.userswap"
OTHER_PLACE = "name a directory on a disk with --swap PATH, or go without swap files with --swap none"


@dataclass(frozen=True, slots=True)
class SwapSpec:
    """What a user asked for: a place (None: find one), the most bytes to use (None: what the disk has), a priority (higher
    ones are used first) and maybe a name for the tier of that priority."""

    path: str | None
    limit: int | None
    priority: int = 0
    tier: str | None = None


@dataclass(frozen=True, slots=True)
class OpenSwapFile:
    """A swap file that is ready for use.

    `fd` belongs to whoever gets this. It holds the lock; before it is closed the file must be truncated
    to nothing, which is what empties a file that existed before and does no harm to any other.
    `limit` is the most bytes the file may have, a multiple of 4096. `name` is for messages.
    `direct`: O_DIRECT works at 4096-byte alignment and is set. `network`: what kind of network file system it is on, or "".
    """

    fd: int
    limit: int
    name: str
    direct: bool
    network: str = ""


def parse_swap(text: str | os.PathLike[str] | None) -> SwapSpec | None:
    """Return what [NAME=]PATH[:SIZE[:PRIO]] asks for; None when `text` is "none": no swap file at all.

    None, or nothing said, means: find a place, use what it has. A colon that belongs to the path needs a size behind it:
    "/data/a:b:8G". A file whose name is none is "./none", and one with a = in its path "./a=b". The size may be left out
    before a priority: "/data::10".

    Raises SwapPathError for an empty path or a bad priority, TierError for a name that none can have, and BadSize for a
    bad size or one below 2 MiB.
    """
    if text is None:
        return SwapSpec(None, None)
    spec = os.fspath(text)
    if spec.strip().lower() == "none":
        return None
    tier, rest = None, spec
    named = TIER.fullmatch(spec)
    if named:
        tier, rest = named.groups()
        if tier in RESERVED:
            raise TierError(
                f"--swap {spec} calls a tier {tier}, which means something else already: choose another name."
            )
    elif NEARLY_TIER.fullmatch(spec):
        raise TierError(
            f"--swap {spec} begins with what is no name of a tier: such a name begins with a small letter and has small "
            f"letters, digits, - and _. If the = belongs to the path, write ./{spec}."
        )
    front, colon, last = rest.rpartition(":")
    middle = front.rpartition(":")[2]
    priority = 0
    if colon and PRIORITY.fullmatch(last) and ":" in front and (not middle.strip() or readable(middle)):
        priority = int(last)
        if abs(priority) > MOST_PRIORITY:
            raise SwapPathError(
                f"The priority in --swap {spec} is {priority}: it has to be between -{MOST_PRIORITY} and {MOST_PRIORITY}."
            )
        rest = front.removesuffix(":") if not middle.strip() else front
    elif colon and "/" not in last and readable(middle) and not (readable(last) and parse_size(last) >= LEAST_SWAP):
        raise SwapPathError(
            f"The priority in --swap {spec} is {last!r}, which is no whole number: write, for example, {front}:10."
        )
    path, limit = sized(spec, rest)
    if not path.strip():
        raise SwapPathError(
            f"--swap {spec!r} names no path: write PATH or PATH:SIZE, for example /var/tmp:8G, or none."
        )
    return SwapSpec(path, limit, priority, tier)


def readable(size: str) -> bool:
    """Tell whether this can be read as a size."""
    try:
        parse_size(size)
    except BadSize:
        return False
    return True


def sized(spec: str, rest: str) -> tuple[str, int | None]:
    """Return path and size of PATH[:SIZE], a part of `spec`. Raises BadSize."""
    path, colon, size = rest.rpartition(":")
    if not colon or "/" in size:
        return rest, None
    try:
        limit = parse_size(size, f"the size in --swap {spec}")
    except BadSize as error:
        raise BadSize(f"{error} If the colon belongs to the path, put a size behind it: {rest}:8G.") from None
    if limit < LEAST_SWAP:
        raise BadSize(
            f"The size in --swap {spec} is {format_size(limit)}, but a swap file needs at least "
            f"{format_size(LEAST_SWAP)}: give it more, or go without with --swap none."
        )
    return path, limit


Specs = str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None


def parse_swaps(swap: Specs) -> list[SwapSpec]:
    """Return what one or several of [NAME=]PATH[:SIZE[:PRIO]] ask for; nothing for "none".

    Raises what `parse_swap` raises, and SwapPathError for "none" together with a path, or a path that is named twice.
    """
    if swap is None or isinstance(swap, (str, os.PathLike)):
        spec = parse_swap(swap)
        return [] if spec is None else [spec]
    specs = [parse_swap(text) for text in swap]
    if None in specs and len(specs) > 1:
        raise SwapPathError("--swap none and a swap file can't both be had: leave out one of them.")
    found: list[SwapSpec] = [spec for spec in specs if spec is not None]
    seen: dict[object, str] = {}
    for spec in found:
        refuse_twice(spec, seen)
        seen |= dict.fromkeys(identities(spec), spec.path or "")
    return found


def identities(spec: SwapSpec) -> set[object]:
    """Return what a place is known by, whatever it is called: its real path, and its inode if there is something."""
    if spec.path is None:
        return set()
    path = place_of(spec.path)
    found: set[object] = set()
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        found.add(str(path.resolve()))
        status = path.stat()
        found.add((status.st_dev, status.st_ino))
    return found


def refuse_twice(spec: SwapSpec, seen: dict[object, str]) -> None:
    """Raise SwapPathError if what `spec` names is among what is used already, by what name ever."""
    for key in identities(spec):
        if key in seen:
            other = "" if seen[key] == spec.path else f" (it is {seen[key]})"
            raise SwapPathError(f"{spec.path} is a swap file of this program already{other}: name another place.")


def open_swap(text: str | os.PathLike[str] | None) -> OpenSwapFile | None:
    """Open the swap file that `text` (see `parse_swap`) asks for; None when it says "none"."""
    spec = parse_swap(text)
    return None if spec is None else open_spec(spec)


def place_of(path: str) -> Path:
    """Return the path that a user wrote, with the home directory for ~."""
    place = Path(path)
    if path.startswith("~"):
        # No home directory: then ~ is a name like any other.
        with contextlib.suppress(RuntimeError):
            place = place.expanduser()
    return place


def open_spec(spec: SwapSpec) -> OpenSwapFile:
    """Open the swap file that is asked for.

    Without a path the first of $TMPDIR and /var/tmp is taken that is on a disk, writable and not full.
    Without a size the limit is the size of the file system. The file grows as it is used: a limit beyond
    the space that is free is no error.

    Raises SwapPathError when the place is missing, not writable, full, in memory (tmpfs), in use by
    another program, or holds data.
    """
    if spec.path is not None:
        return open_at(place_of(spec.path), spec.limit, directory=spec.path.endswith("/"))
    refusals = []
    for place in default_places():
        try:
            return open_at(place, spec.limit, directory=True)
        except SwapPathError as error:
            refusals.append(str(error).partition(": ")[0])
    raise SwapPathError(f"There is no place for a swap file ({'; '.join(refusals)}): {OTHER_PLACE}.")


def default_places() -> list[Path]:
    """Return the directories that are tried when no swap path is given: $TMPDIR (if set), then /var/tmp."""
    named = os.environ.get("TMPDIR", "")
    return [*([Path(named)] if named else []), Path("/var/tmp")]


def file_system(path: Path) -> tuple[int, str]:
    """Return (f_type, name) of the file system that holds `path`, for example (0xEF53, "ext4").

    The name is the one in /proc/self/mountinfo, "" when that cannot be told. Raises OSError.
    """
    fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        kind = file_system_type(fd)
    finally:
        os.close(fd)
    best, name = -1, ""
    target = path.resolve()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").split("\n"):
            front, _, back = line.partition(" - ")
            fields = front.split(" ")
            if len(fields) < 5:
                continue
            point = Path(fields[4].replace("\\040", " "))
            # Of two mounts at one place the later one is on top.
            if target.is_relative_to(point) and len(point.parts) >= best:
                best, name = len(point.parts), back.partition(" ")[0]
    return kind, name


def file_system_type(fd: int) -> int:
    """Return the f_type that fstatfs(2) gives for `fd`. Raises OSError."""
    # struct statfs begins with f_type, a long, on the machines userswap runs on; 512 bytes are ample.
    buffer = (ctypes.c_long * 64)()
    if ctypes.CDLL(None, use_errno=True).fstatfs(fd, buffer) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(buffer[0]) & 0xFFFFFFFF


def open_at(path: Path, limit: int | None, directory: bool = False) -> OpenSwapFile:
    """Open a swap file at `path`, a directory or a file (`directory`: only that), and try it out.

    `limit` is in bytes, None for no limit. Raises SwapPathError.
    """
    name = str(path)
    try:
        if path.is_dir():
            fd = open_nameless(path)
        elif directory:
            # Not created as a file: who writes "/data/", or has a $TMPDIR, means a directory.
            what = "is not a directory" if path.exists() else "does not exist"
            raise SwapPathError(f"{path} {what}: create it (mkdir -p {path}), or {OTHER_PLACE}.")
        else:
            fd = open_named(path)
    except ValueError:
        raise SwapPathError(f"{name!r} is not a path: {OTHER_PLACE}.") from None
    except OSError as error:
        raise SwapPathError(explained(path, error)) from None
    try:
        refuse_in_memory(path, fd)
        direct = try_out(path, fd)
        room = os.fstatvfs(fd)
        # Some file systems do not count blocks at all.
        most = min(limit or sys.maxsize, room.f_blocks * room.f_frsize or sys.maxsize, file_size_limit())
        most -= most % PAGE
        if most < LEAST_SWAP:
            raise SwapPathError(
                f"No more than {format_size(most)} can be written to {name}: a swap file needs at least "
                f"{format_size(LEAST_SWAP)} (see df and ulimit -f); {OTHER_PLACE}."
            )
        return OpenSwapFile(fd, most, name, direct, NETWORK.get(file_system_type(fd), ""))
    except OSError as error:
        os.close(fd)
        raise SwapPathError(explained(path, error)) from None
    except BaseException:
        os.close(fd)
        raise


def open_nameless(directory: Path) -> int:
    """Return a file descriptor of a new file in `directory` that has no name. Raises OSError."""
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        # A file system without O_TMPFILE answers in one of these ways.
        if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL):
            raise
    import tempfile

    fd, name = tempfile.mkstemp(prefix=".userswap-", dir=directory)
    Path(name).unlink()
    return fd


def open_named(path: Path) -> int:
    """Return a locked file descriptor of the file at `path`, see the head of this file for which.

    Raises OSError, and SwapPathError for a file that must not be used.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
    try:
        fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o600)
        created = True
    except FileExistsError:
        if not path.is_file():
            nowhere = path.is_symlink() and not path.exists()
            kind = "is a link that leads nowhere" if nowhere else "is neither a file nor a directory"
            raise SwapPathError(f"{path} {kind}: {OTHER_PLACE}.") from None
        fd = os.open(path, flags)
        created = False
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SwapPathError(
                f"{path} is the swap file of another running program (or of this one's forked children): name another "
                "file, or a directory, which any number of programs can share."
            ) from None
        finally:
            if created:
                path.unlink()
        if not created:
            take_over(path, fd)
        return fd
    except BaseException:
        os.close(fd)
        raise


def take_over(path: Path, fd: int) -> None:
    """Make sure that the existing file `path`, open and locked as `fd`, may be used, and mark it as swap."""
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode):
        raise SwapPathError(f"{path} is neither a file nor a directory: {OTHER_PLACE}.")
    if status.st_uid != os.geteuid():
        raise SwapPathError(
            f"{path} belongs to another user, who could read this program's memory in it: name a file of "
            "your own, or a directory."
        )
    if status.st_nlink != 1:
        raise SwapPathError(f"{path} was removed or has a second name (hard link): name another file.")
    marked = False
    with contextlib.suppress(OSError):
        marked = os.getxattr(fd, MARK) == b"1"
    if status.st_size and not marked:
        raise SwapPathError(
            f"{path} exists and holds {format_size(status.st_size)} of data, which swap would overwrite: "
            f"name a file that does not exist yet, or a directory, or remove it first (rm {path})."
        )
    os.fchmod(fd, 0o600)
    os.ftruncate(fd, 0)
    # Without extended attributes a crash leaves a file that the next run refuses; that is safe.
    with contextlib.suppress(OSError):
        os.setxattr(fd, MARK, b"1")


def refuse_in_memory(path: Path, fd: int) -> None:
    """Raise SwapPathError when `fd` is on a file system that lives in RAM: swap there frees nothing."""
    kind = file_system_type(fd)
    if kind in IN_MEMORY:
        raise SwapPathError(f"{path} is on {IN_MEMORY[kind]}, which is itself kept in memory: {OTHER_PLACE}.")


def try_out(path: Path, fd: int) -> bool:
    """Write a page and read it back; return whether that works with O_DIRECT.

    Raises OSError when it does not work without either, SwapPathError when there is no room.
    """
    room = os.fstatvfs(fd)
    free = (room.f_bfree if os.geteuid() == 0 else room.f_bavail) * room.f_frsize
    if room.f_blocks and free < LEAST_SWAP:
        raise SwapPathError(
            f"The file system of {path} is full ({format_size(free)} free): free some space there, or {OTHER_PLACE}."
        )
    flags = fcntl.fcntl(fd, fcntl.F_GETFL) & ~os.O_NONBLOCK
    for direct in (True, False):
        try:
            fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT if direct else flags)
            with page(b"userswap") as buffer, page(b"") as copy:
                if os.pwritev(fd, [buffer], 0) != PAGE or os.preadv(fd, [copy], 0) != PAGE or copy[:] != buffer[:]:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
            return direct
        except OSError as error:
            # EINVAL: no O_DIRECT, or only at a coarser alignment than a page.
            if not direct or error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
        finally:
            os.ftruncate(fd, 0)
    raise AssertionError("the loop above returns or raises")


@contextlib.contextmanager
def page(text: bytes) -> Iterator[mmap.mmap]:
    """Give a page-aligned buffer of one page that begins with `text`."""
    with mmap.mmap(-1, PAGE) as buffer:
        buffer[: len(text)] = text
        yield buffer


def file_size_limit() -> int:
    """Return RLIMIT_FSIZE in bytes: writing beyond it would kill the program with SIGXFSZ."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def explained(path: Path, error: OSError) -> str:
    """Return the sentence for what the system said about `path`."""
    parent = path.absolute().parent
    match error.errno:
        case errno.ENOENT:
            if parent.is_dir():
                return f"No file can be created in {parent}: {OTHER_PLACE}."
            return f"{parent} does not exist: create it (mkdir -p {parent}), or {OTHER_PLACE}."
        case errno.ENOTDIR:
            return f"{path} leads through something that is not a directory: {OTHER_PLACE}."
        case errno.EACCES | errno.EPERM if not os.path.lexists(path):
            return f"{path} cannot be created by this user: {OTHER_PLACE}."
        case errno.EACCES | errno.EPERM:
            return f"{path} is not writable for this user: {OTHER_PLACE}."
        case errno.EROFS:
            return f"{path} is on a read-only file system: {OTHER_PLACE}."
        case errno.ENOSPC | errno.EDQUOT:
            return f"The file system of {path} is full ({error.strerror}): free some space, or {OTHER_PLACE}."
        case _:
            return f"{path} cannot be used for swap ({error.strerror}): {OTHER_PLACE}."
