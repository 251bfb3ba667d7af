"""The command `userswap`: finds the subcommand, and turns userswap's own errors into one plain sentence.

A subcommand is prepared first and then carried out. Only what goes wrong in preparing is reported here
(stderr, exit code 2); `run` carries out somebody else's program, whose errors are none of our business.
"""

import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from typing import NoReturn

from userswap.errors import UsageError, UserswapError

__all__ = ["Parser", "main"]

COMMANDS = {
    "run": "run a Python program in less memory than it needs",
    "ps": "which programs of yours run with userswap, and what each has in RAM and in swap",
    "set": "change settings of one that runs: userswap set PID ram=1G",
    "swapon": "give one that runs a swap file more: userswap swapon PID /data:50G",
    "swapoff": "empty a swap file of one that runs, and do without it: userswap swapoff PID /data",
    "bench": "measure it here: userswap bench compare, faults, dedupe, seal",
    "lab": "experiments with the swap layer: userswap lab compare, upstream, replay, system",
    "doctor": "say what this machine can do, what it can't, and how to mend it",
}
HELP = """\
usage: userswap [--help] [--version] COMMAND ...

More memory than you have: swap in user space for Python programs on large arrays.

commands:
{commands}

userswap COMMAND --help says more about each.
"""


class Parser(ArgumentParser):
    """An argument parser that raises UsageError, one sentence, where the standard one prints and exits."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError for a command line that makes no sense."""
        raise UsageError(f"{message[:1].upper()}{message[1:]}: see {self.prog} --help.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry out `arguments` (default: the command line) and return the exit code.

    0 is success, 1 a problem that doctor found, 2 a command that could not be carried out. Under `run`
    the exit code is the program's, and its exceptions, SystemExit included, pass through.
    """
    try:
        action = prepare(sys.argv[1:] if arguments is None else list(arguments))
    except UserswapError as error:
        print(f"userswap: {error}", file=sys.stderr)
        return 2
    return action()


def prepare(arguments: list[str]) -> Callable[[], int]:
    """Return what remains to be done once everything that can be wrong has been looked at.

    Raises UserswapError.
    """
    if not arguments:
        raise UsageError(
            "Say what to do, for example userswap run --ram 512M script.py, or userswap doctor: see userswap --help."
        )
    if arguments[0] in ("-h", "--help", "help"):
        commands = "\n".join(f"  {name:<8} {text}" for name, text in COMMANDS.items())
        return printing(HELP.format(commands=commands))
    command, *rest = arguments
    if command in ("-V", "--version"):
        return printing(f"userswap {version()}\n")
    if command == "run":
        from userswap.cli import run

        return run.prepare(rest)
    if command == "ps":
        from userswap.cli import ps

        return ps.prepare(rest)
    if command in ("set", "swapon", "swapoff"):
        from userswap.cli import ask

        prepare = {"set": ask.prepare_set, "swapon": ask.prepare_swapon, "swapoff": ask.prepare_swapoff}
        return prepare[command](rest)
    if command == "bench":
        from userswap.cli import bench

        return bench.prepare(rest)
    if command == "lab":
        from userswap.cli import lab

        return lab.prepare(rest)
    if command == "doctor":
        from userswap.cli import doctor

        return doctor.prepare(rest)
    if command.startswith("-"):
        raise UsageError(f"There is no option {command}: see userswap --help.")
    if command.endswith(".py"):
        raise UsageError(f"There is no command {command!r}: to run a program, write userswap run {command}.")
    raise UsageError(f"There is no command {command!r}, only {', '.join(COMMANDS)}: see userswap --help.")


def printing(text: str) -> Callable[[], int]:
    """Return an action that prints `text`."""

    def action() -> int:
        print(text, end="")
        return 0

    return action


def version() -> str:
    """Return the installed version, "unknown" when userswap runs from a source tree."""
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed("userswap")
    except PackageNotFoundError:
        return "unknown"
