"""The command's end of the control socket: finds programs, asks them, and says in plain words what is in the way."""

import contextlib
import json
import os
import pwd
import select
import socket
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from userswap.control.places import LONGEST, VERSION, complaint, numbers, places
from userswap.errors import ControlError

__all__ = ["Line", "all_lines", "ask", "gather", "reach", "state_of"]

Message = dict[str, Any]

# Seconds without a word from a program that has been asked.
PATIENCE = 30.0
LOOK_PATIENCE = 2.0
LONGEST_ANSWER = 1 << 20


class Line:
    """A connection to a program, for one message."""

    def __init__(self, pid: int, path: str, uid: int) -> None:
        """Connect. Raises OSError, ConnectionRefusedError if nobody is there any more."""
        self.pid = pid
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(LOOK_PATIENCE)
        self.read = b""
        try:
            self._connect(path)
            credentials = self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            there, owner, _group = struct.unpack("3i", credentials)
            if (there, owner) != (pid, uid):
                raise PermissionError(f"it is not process {pid} that listens there, but {there} of user {owner}")
        except BaseException:
            self.socket.close()
            raise

    def _connect(self, path: str) -> None:
        until = time.monotonic() + LOOK_PATIENCE
        while True:
            try:
                return self.socket.connect(path)
            except BlockingIOError:  # more wait to be taken than the kernel keeps
                if time.monotonic() > until:
                    raise TimeoutError("too many others wait") from None
                time.sleep(0.01)

    def send(self, message: Message) -> None:
        """Send a message. What a program says about one that it did not read to its end is heard all the same."""
        line = json.dumps({"userswap": VERSION, **message}).encode() + b"\n"
        if len(line) > LONGEST:
            raise ControlError(f"That is too long to be asked of a program: at most {LONGEST // 1024} KiB.")
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.socket.sendall(line)

    def no_more(self) -> None:
        """Say that nobody waits for what was asked."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def next(self, patience: float | None) -> Message:
        """The next line of the answer.

        Raises:
            TimeoutError: none has come in so many seconds.
            ControlError: none will come, or it is none of ours.
        """
        until = None if patience is None else time.monotonic() + patience
        while b"\n" not in self.read:
            self.socket.settimeout(None if until is None else max(until - time.monotonic(), 0.001))
            try:
                more = self.socket.recv(1 << 16)
            except ConnectionResetError:
                more = b""
            if not more:
                raise ControlError(
                    f"Process {self.pid} ended, or another program took its place, before it answered: see userswap ps."
                )
            self.read += more
            if len(self.read) > LONGEST_ANSWER:
                break
        line, _, self.read = self.read.partition(b"\n")
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise ControlError(f"What process {self.pid} answered is not to be understood: is it another version?")
        return answer

    def close(self) -> None:
        """Hang up."""
        self.socket.close()


def state_of(pid: int) -> str:
    """The kernel's letter for what a process does; "" if there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def user_name(uid: int) -> str:
    """A user, as people call them."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def reach(pid: int) -> Line:
    """A connection to that process. Raises ControlError, which says why there is none."""
    if state_of(pid) in ("", "Z"):
        raise ControlError(f"There is no process {pid} (any more): userswap ps lists those that can be reached.")
    uid = Path(f"/proc/{pid}").stat().st_uid
    if os.geteuid() not in (0, uid):
        raise ControlError(f"Process {pid} belongs to {user_name(uid)}: only {user_name(uid)} or root may do that.")
    why = "does not run under userswap, or has no pool yet, or was started with USERSWAP_CONTROL=0"
    for place in places(uid):
        path = f"{place}/{pid}"
        wrong = complaint(place, uid)
        if wrong is not None:
            if os.path.lexists(place):
                why = f"can't have its socket in {place}, which {wrong}"
            continue
        try:
            return Line(pid, path, uid)
        except FileNotFoundError:
            continue
        except ConnectionRefusedError:
            why = "does not listen any more"
        except OSError as error:
            why = f"did not take a connection ({error})"
    raise ControlError(f"Process {pid} {why}: userswap ps lists those that can be reached.")


def ask(line: Line, message: Message) -> Message:
    """Send a message and return the last line of the answer. Raises ControlError, also for what the program says."""
    try:
        line.send(message)
        return checked(line.next(PATIENCE))
    except TimeoutError:
        raise ControlError(silent(line.pid)) from None
    finally:
        line.close()


def checked(answer: Message) -> Message:
    """An answer that is no error. Raises ControlError."""
    if "error" in answer:
        raise ControlError(printable(str(answer["error"])))
    return answer


def silent(pid: int) -> str:
    """A sentence about a process that does not answer."""
    if state_of(pid) in ("T", "t"):
        return f"Process {pid} is stopped: it will do that when it is continued (kill -CONT {pid})."
    return (
        f"Process {pid} has not answered for {PATIENCE:.0f} seconds: it is busy with something that lets no other "
        "thread run Python (or is at its end). It will do that as soon as it can."
    )


def printable(text: str) -> str:
    """What others wrote, without what a terminal might do something by."""
    return "".join(c if c.isprintable() else "?" for c in text)


def all_lines() -> Iterator[Line]:
    """A connection to each process of this user that can be reached; sockets that nobody listens to are removed."""
    uid = os.geteuid()
    seen: set[int] = set()
    for place in places(uid):
        if complaint(place, uid) is not None:
            continue
        for name, pid in sorted(numbers(place).items(), key=lambda found: found[1]):
            path = f"{place}/{name}"
            with contextlib.suppress(OSError):
                before = os.lstat(path)
                if not stat.S_ISSOCK(before.st_mode) or (name.startswith(".") and state_of(pid)):
                    continue
                try:
                    line = Line(pid, path, uid)
                except ConnectionRefusedError:
                    now = os.lstat(path)
                    if (now.st_dev, now.st_ino) == (before.st_dev, before.st_ino):
                        Path(path).unlink()
                    continue
                if name.startswith(".") or pid in seen:
                    line.close()
                    continue
                seen.add(pid)
                yield line


def gather(lines: list[Line], message: Message, patience: float = LOOK_PATIENCE) -> dict[int, Message | None]:
    """Ask several programs at once, and return what each answered in that many seconds; None: nothing."""
    answers: dict[int, Message | None] = {}
    poll = select.poll()
    waiting = {}
    for line in lines:
        answers[line.pid] = None
        with contextlib.suppress(OSError):
            line.send(message)
        poll.register(line.socket, select.POLLIN)
        waiting[line.socket.fileno()] = line
    until = time.monotonic() + patience
    while waiting and time.monotonic() < until:
        for descriptor, _ in poll.poll(max(until - time.monotonic(), 0) * 1000):
            line = waiting.pop(descriptor)
            poll.unregister(descriptor)
            try:
                answers[line.pid] = line.next(LOOK_PATIENCE)
            except ControlError:
                del answers[line.pid]  # it has ended meanwhile
            except OSError:
                pass
    for line in lines:
        line.close()
    return answers
