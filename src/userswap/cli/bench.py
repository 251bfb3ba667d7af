"""`userswap bench`: measurements that anyone can repeat. Finds the measurement."""

from collections.abc import Callable

from userswap.cli.bench_compare import prepare_compare
from userswap.cli.bench_dedupe import prepare_dedupe
from userswap.cli.bench_devices import prepare_devices
from userswap.cli.bench_faults import prepare_faults
from userswap.cli.bench_overhead import prepare_overhead
from userswap.cli.bench_seal import prepare_seal
from userswap.cli.experiment import Action, find

__all__ = ["prepare"]

# A measurement is a line here: what it does, and what returns it when given its arguments.
COMMANDS: dict[str, tuple[str, Callable[[list[str]], Action]]] = {
    "compare": ("the same programs in the same memory: userswap, the kernel's swap, and others", prepare_compare),
    "faults": ("how long a fault takes, by kind, and where the time goes", prepare_faults),
    "overhead": ("what a program pays that fits into its budget, and what a start costs", prepare_overhead),
    "dedupe": ("what storing identical folios once costs, and what it saves", prepare_dedupe),
    "devices": ("swap files beside the kernel's: in order, anywhere, swapoff", prepare_devices),
    "seal": ("what checksums and encryption of swap files cost", prepare_seal),
}


def prepare(arguments: list[str]) -> Action:
    """Return the measurement that `arguments` ask for. Raises UserswapError."""
    return find("bench", "Measure userswap on this machine.", "measurement", COMMANDS, arguments)
