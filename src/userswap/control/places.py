"""Where control sockets are: a directory of the user's own, a socket for each process, named by its number.

Both ends use this: the program when its first pool is made (so nothing is imported here that need not be), the command
when it looks for programs. A directory is used only if nobody else can write there: it belongs to the user and has mode
0700, and so does, where it is not /tmp, what it lies in.
"""

import contextlib
import errno
import os
import stat

__all__ = ["LONGEST", "VERSION", "complaint", "dead", "draft_of", "numbers", "places", "sweep", "usable_place"]

VERSION = 1
# Bytes of a request: a path, of which each byte may be written as six.
LONGEST = 32 << 10
# sockaddr_un.sun_path, less the ending zero and "/.4194304.new".
LONGEST_PLACE = 107 - 14


def places(uid: int) -> list[str]:
    """Every directory where sockets of that user's programs may be, the preferred one first."""
    named = os.environ.get("USERSWAP_CONTROL_DIR", "")
    if uid == os.geteuid() and named.startswith("/"):
        return [named.rstrip("/")] if len(os.fsencode(named)) <= LONGEST_PLACE else []
    found = []
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    if uid == os.geteuid() and runtime.startswith("/"):
        found.append(f"{runtime.rstrip('/')}/userswap")
    found += [f"/run/user/{uid}/userswap", f"/tmp/userswap-{uid}"]
    return list(dict.fromkeys(place for place in found if len(os.fsencode(place)) <= LONGEST_PLACE))


def complaint(place: str, uid: int) -> str | None:
    """What is wrong with a directory, as the end of a sentence; None: it is that user's alone."""
    try:
        seen = os.lstat(place)
    except OSError as error:
        return f"can't be looked at ({error.strerror})"
    if not stat.S_ISDIR(seen.st_mode):
        return "is no directory"
    if seen.st_uid != uid:
        return f"belongs to another user ({seen.st_uid})"
    if seen.st_mode & 0o077:
        return f"may be entered by others (mode {stat.S_IMODE(seen.st_mode):04o}, and it should be 0700)"
    return None


def usable_place() -> str:
    """The directory for this process's socket, made if need be.

    Raises:
        OSError: there is none that is this user's alone.
    """
    uid = os.geteuid()
    for place in places(uid):
        above = place.rpartition("/")[0]
        with contextlib.suppress(OSError):
            if above != "/tmp" and complaint(above, uid) is not None:
                continue
            with contextlib.suppress(FileExistsError):
                os.mkdir(place, 0o700)  # noqa: PTH102 - pathlib takes time that every start would pay
            if complaint(place, uid) is None:
                return place
    raise PermissionError(errno.EACCES, "no directory for a control socket")


def draft_of(place: str, number: int) -> str:
    """The name of a socket that nobody listens to yet."""
    return f"{place}/.{number}.new"


def numbers(place: str) -> dict[str, int]:
    """Names in a directory, and of which process each is; not those of files that are not ours."""
    found = {}
    with contextlib.suppress(OSError):
        for name in os.listdir(place):  # noqa: PTH208
            number = name.removeprefix(".").removesuffix(".new") if name.startswith(".") else name
            if number.isascii() and number.isdecimal() and len(number) <= 10:
                found[name] = int(number)
    return found


def dead(path: str) -> bool:
    """Whether nobody listens to a socket any more."""
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line:
        line.setblocking(False)
        try:
            line.connect(path)
        except ConnectionRefusedError:
            return True
        except OSError:
            return False
    return False


def sweep(place: str) -> None:
    """Remove the sockets of processes that are gone. Numbers are seen from here: elsewhere a process with a number that
    is nobody's here may live and listen, so it is asked."""
    for name, number in numbers(place).items():
        if not os.path.exists(f"/proc/{number}"):  # noqa: PTH110
            path = f"{place}/{name}"
            with contextlib.suppress(OSError):
                if stat.S_ISSOCK(os.lstat(path).st_mode) and dead(path):
                    os.unlink(path)  # noqa: PTH108
