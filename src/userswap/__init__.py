"""userswap gives a program more memory than it has: swap in user space, inside the process.

>>> import userswap
>>> with userswap.install(ram="512MiB"):  # NumPy arrays of 1 MiB and more made inside live in swap
...     ...
>>> pool = userswap.Pool(ram="256MiB")  # or a pool of one's own
>>> x = pool.zeros((1_000_000, 64), dtype="f4")

On the command line: ``userswap run --ram 512M script.py`` for any program, unchanged; ``userswap doctor``
says what this machine can do.
"""

from userswap.errors import (
    BadSize,
    BudgetError,
    DataLost,
    DeliveryError,
    MapDesignError,
    SwapOffError,
    SwapPathError,
    TierError,
    UnsupportedError,
    UserswapError,
)

# As typing has it; that module takes milliseconds, which `userswap run` would pay twice.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from userswap.pins import Pin, pin
    from userswap.pool import Installation, Pool, Stats, SwapFileStats, install, snapshot

__all__ = [
    "BadSize",
    "BudgetError",
    "DataLost",
    "DeliveryError",
    "Installation",
    "MapDesignError",
    "Pin",
    "Pool",
    "Stats",
    "SwapFileStats",
    "SwapOffError",
    "SwapPathError",
    "TierError",
    "UnsupportedError",
    "UserswapError",
    "install",
    "pin",
    "snapshot",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Load the core (and NumPy with it) at the first use, so that `userswap doctor` runs where the core can't."""
    if name not in ("Installation", "Pin", "Pool", "Stats", "SwapFileStats", "install", "pin", "snapshot"):
        raise AttributeError(f"module 'userswap' has no attribute {name!r}")
    try:
        from userswap import pins, pool
    except ImportError as error:
        # In the words of CPython and of Cython. There is one fault handler for a process.
        if "subinterpreters" in str(error) or "Interpreter change" in str(error):
            raise UnsupportedError(
                "userswap can only be used from a process's main interpreter, not from a sub-interpreter. What a "
                "sub-interpreter allocates is swapped all the same under `userswap run`."
            ) from None
        raise
    return getattr(pins if name in ("Pin", "pin") else pool, name)
