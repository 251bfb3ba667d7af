"""`userswap set`: asks a program that runs to do something.

What is wrong with the command line ends with exit code 2; what can't be done in the program, with its sentence and 1.
"""

import re
import sys
from collections.abc import Callable
from typing import Any

from userswap.cli.main import Parser
from userswap.errors import ControlError, UsageError
from userswap.sizes import format_size

__all__ = ["prepare_set"]

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
        except KeyboardInterrupt:
            print("userswap: Nobody waits any more; the program may still do it.", file=sys.stderr)
            return 130
        return 0

    return action
