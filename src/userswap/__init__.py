"""userswap gives a program more memory than it has: swap in user space, inside the process.

>>> import userswap
>>> with userswap.install(ram="512MiB"):   # NumPy arrays of 1 MiB and more made inside live in swap
...     ...
>>> pool = userswap.Pool(ram="256MiB")     # or a pool of one's own
>>> x = pool.zeros((1_000_000, 64), dtype="f4")

On the command line: ``userswap run --ram 512M script.py`` for any program, unchanged; ``userswap doctor`` says
what this machine can do.
"""

from userswap.errors import BadSize, BudgetError, SwapPathError, UnsupportedError, UserswapError
from userswap.pool import Installation, Pool, Stats, install

__all__ = [
    "BadSize",
    "BudgetError",
    "Installation",
    "Pool",
    "Stats",
    "SwapPathError",
    "UnsupportedError",
    "UserswapError",
    "install",
]
__version__ = "0.1.0"
