"""`userswap lab`: experiments with the swap layer, every design side by side. Finds the experiment."""

from collections.abc import Callable

from userswap.cli.experiment import Action, find
from userswap.cli.lab_compare import prepare_compare, prepare_upstream
from userswap.cli.lab_replay import prepare_replay
from userswap.cli.lab_system import prepare_system

__all__ = ["prepare"]

# An experiment is a line here: what it does, and what returns it when given its arguments.
COMMANDS: dict[str, tuple[str, Callable[[list[str]], Action]]] = {
    "compare": ("memory and time of every design of the swap map, in every scenario", prepare_compare),
    "upstream": ("metadata for a swap file of 32 GiB, beside what upstream published", prepare_upstream),
    "replay": ("what a recorded program asked of the swap map, asked of every design", prepare_replay),
    "system": ("whole programs under every design: time, metadata, results compared", prepare_system),
}


def prepare(arguments: list[str]) -> Action:
    """Return the experiment that `arguments` ask for. Raises UserswapError."""
    intro = "Experiments with the swap layer, every design of the swap map side by side."
    return find("lab", intro, "experiment", COMMANDS, arguments)
