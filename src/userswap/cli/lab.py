"""`userswap lab`: experiments with the swap layer, every design side by side. Finds the experiment."""

from collections.abc import Callable

from userswap.cli.lab_compare import prepare_compare, prepare_upstream
from userswap.cli.lab_replay import prepare_replay
from userswap.cli.lab_system import prepare_system
from userswap.errors import UsageError

__all__ = ["prepare"]

# An experiment is a line here: what it does, and what returns it when given its arguments.
COMMANDS: dict[str, tuple[str, Callable[[list[str]], Callable[[], int]]]] = {
    "compare": ("memory and time of every design of the swap map, in every scenario", prepare_compare),
    "upstream": ("metadata for a swap file of 32 GiB, beside what upstream published", prepare_upstream),
    "replay": ("what a recorded program asked of the swap map, asked of every design", prepare_replay),
    "system": ("whole programs under every design: time, metadata, results compared", prepare_system),
}
HELP = """\
usage: userswap lab [--help] COMMAND ...

Experiments with the swap layer, every design of the swap map side by side.

commands:
{commands}

userswap lab COMMAND --help says more about each.
"""


def prepare(arguments: list[str]) -> Callable[[], int]:
    """Return the experiment that `arguments` ask for. Raises UserswapError."""
    from userswap.cli.main import printing

    if not arguments:
        raise UsageError(f"Say which experiment: {', '.join(COMMANDS)}; see userswap lab --help.")
    command, *rest = arguments
    if command in ("-h", "--help", "help"):
        return printing(HELP.format(commands="\n".join(f"  {name:<8} {text}" for name, (text, _) in COMMANDS.items())))
    if command not in COMMANDS:
        raise UsageError(f"There is no experiment {command!r}, only {', '.join(COMMANDS)}: see userswap lab --help.")
    return COMMANDS[command][1](rest)
