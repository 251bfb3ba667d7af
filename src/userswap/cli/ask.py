"""`userswap set`, `swapon`, `swapoff`: ask a program that runs to do something.

What is wrong with the command line ends with exit code 2; what can't be done in the program, with its sentence and 1.
"""

import os
import re
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from userswap.cli.main import Parser
from userswap.errors import ControlError, UsageError
from userswap.sizes import format_size

if TYPE_CHECKING:
    from userswap.control.client import Line

__all__ = ["prepare_set", "prepare_swapoff", "prepare_swapon"]

PROCESS = "PID, or PID/N where a process has several pools: see userswap ps"


def prepare_set(arguments: list[str]) -> Callable[[], int]:
    """Return `userswap set`. Raises UsageError."""
    parser = Parser(
        prog="userswap set",
        description="Change settings of a program while it runs.",
        epilog="ram=SIZE: its budget, at once; what is too much is swapped out. hard=yes|no: end the program rather "
        "than exceed the budget when swap is full. For example: userswap set 4711 ram=1G hard=no",
    )
    parser.add_argument("process", metavar="PID", help=PROCESS)
    parser.add_argument("values", metavar="KEY=VALUE", nargs="+", help="ram=SIZE, hard=yes|no")
    options = parser.parse_args(arguments)
    pid, pool = process_of(options.process)
    values = {}
    for text in options.values:
        key, sign, value = text.partition("=")
        if not key or not sign or not value:
            raise UsageError(f"{text!r} is not KEY=VALUE: write for example ram=1G.")
        if key in values:
            raise UsageError(f"{key} is there twice: say once what it is to be.")
        values[key] = value

    def carry_out() -> None:
        from userswap.control.client import ask, reach

        answer = ask(reach(pid), {"do": "set", "pool": pool, "values": values})
        changes = ", ".join(
            f"{key} is {said(key, value)} now (was {said(key, answer['was'].get(key))})"
            for key, value in answer["now"].items()
        )
        used = answer["resident_bytes"] + answer["pool_bytes"] + answer["metadata_bytes"]
        print(f"{options.process}: {changes}; {format_size(used)} of RAM in use.")

    return plainly(carry_out)


def prepare_swapon(arguments: list[str]) -> Callable[[], int]:
    """Return `userswap swapon`. Raises UserswapError."""
    from userswap.swapfiles import parse_swap

    parser = Parser(
        prog="userswap swapon",
        description="Give a program that runs one more swap file.",
        epilog="[NAME=]PATH[:SIZE[:PRIO]] as in userswap run --swap; higher priorities are used first.",
    )
    parser.add_argument("process", metavar="PID", help=PROCESS)
    parser.add_argument("spec", metavar="SPEC", help="[NAME=]PATH[:SIZE[:PRIO]]")
    options = parser.parse_args(arguments)
    pid, pool = process_of(options.process)
    spec = parse_swap(options.spec)
    if spec is None or spec.path is None:
        raise UsageError("swapon of none is nothing to do: name a directory or a file, for example /var/tmp:8G.")
    # Where the program is, the same words would mean another place.
    tier = "" if spec.tier is None else f"{spec.tier}="
    whole = f"{tier}{absolute(spec.path)}:{'' if spec.limit is None else spec.limit}:{spec.priority}"

    def carry_out() -> None:
        from userswap.control.client import ask, reach

        swap = ask(reach(pid), {"do": "swapon", "pool": pool, "spec": whole})["swap"]
        size = f"up to {format_size(swap['limit_bytes'])}, priority {swap['priority']}, tier {swap['tier']}"
        print(f"{options.process}: {swap['name']} is in use ({size}).")

    return plainly(carry_out)


def prepare_swapoff(arguments: list[str]) -> Callable[[], int]:
    """Return `userswap swapoff`. Raises UsageError."""
    parser = Parser(
        prog="userswap swapoff",
        description="Empty a swap file of a program that runs, and do without it.",
        epilog="What is in it moves to other swap files and RAM while the program runs. Ctrl-C stops that: the file "
        "is in use again. userswap ps --swaps shows which there are.",
    )
    parser.add_argument("process", metavar="PID", help=PROCESS)
    parser.add_argument("path", metavar="PATH", help="as it was given to the program, or another name of the place")
    options = parser.parse_args(arguments)
    pid, pool = process_of(options.process)
    if not options.path or "\0" in options.path:
        raise UsageError("Say which swap file: userswap ps --swaps shows them.")
    path = absolute(options.path)

    def carry_out() -> None:
        from userswap.control.client import reach

        line = reach(pid)
        try:
            line.send({"do": "swapoff", "pool": pool, "path": path})
            await_empty(line, options.path)
        finally:
            line.close()
        print(f"{options.process}: {options.path} is not used any more.")

    return plainly(carry_out)


def absolute(path: str) -> str:
    """A path that means the same to a program elsewhere."""
    return os.path.abspath(os.path.expanduser(path))  # noqa: PTH100, PTH111 - links stay, and so do their names


def await_empty(line: "Line", path: str) -> None:
    """Show how far a swapoff is until it ends; Ctrl-C asks the program to stop. Raises ControlError."""
    from userswap.control.client import PATIENCE, checked, silent

    begun, shown, stopping = time.monotonic(), 0.0, False
    patience: float | None = PATIENCE
    bar = sys.stderr.isatty()
    while True:
        try:
            answer = line.next(patience)
        except TimeoutError:
            patience = None
            print(f"userswap: {silent(line.pid)}", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            if stopping:
                raise
            stopping = True
            line.no_more()
            print("\nuserswap: Stopping; once more Ctrl-C to wait no longer.", file=sys.stderr)
            continue
        if "progress" not in answer:
            break
        done, total = answer["progress"]
        now = time.monotonic()
        if bar and not stopping:
            width = 30 * done // max(total, 1)
            left = (now - begun) * (total - done) / done if done else 0
            text = f"{'█' * width}{'░' * (30 - width)} {format_size(done)} of {format_size(total)}, {left:.0f} s left"
            print(f"\r{path}: {text}\x1b[K", end="", file=sys.stderr, flush=True)
        elif not bar and now - shown >= 1:
            shown = now
            print(f"{path}: {format_size(done)} of {format_size(total)}", file=sys.stderr, flush=True)
    if bar and not stopping:
        print("\r\x1b[K", end="", file=sys.stderr)
    try:
        checked(answer)
    except ControlError as error:
        if stopping:
            print(f"userswap: {error}", file=sys.stderr)
            raise Stopped from None
        raise


class Stopped(Exception):  # noqa: N818 - no error: it was asked for
    """Ctrl-C, and the program has stopped what it was at, and said so."""


def said(key: str, value: Any) -> str:
    """A setting for a person."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return format_size(value) if key == "ram" and isinstance(value, int) else str(value)


def process_of(text: str) -> tuple[int, int | None]:
    """The process and pool that PID or PID/N names. Raises UsageError."""
    found = re.fullmatch(r"([1-9][0-9]{0,9})(?:/([1-9][0-9]{0,9}))?", text, re.ASCII)
    if found is None:
        raise UsageError(f"{text!r} is no process: write {PROCESS}.")
    return int(found[1]), int(found[2]) if found[2] else None


def plainly(carry_out: Callable[[], None]) -> Callable[[], int]:
    """Return the action, with what can't be done as a sentence."""

    def action() -> int:
        try:
            carry_out()
        except ControlError as error:
            print(f"userswap: {error}", file=sys.stderr)
            return 1
        except OSError as error:
            print(f"userswap: The program could not be asked ({error}).", file=sys.stderr)
            return 1
        except Stopped:
            return 130
        except KeyboardInterrupt:
            print("userswap: Nobody waits any more; the program may still do it.", file=sys.stderr)
            return 130
        return 0

    return action
