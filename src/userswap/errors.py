"""The errors userswap raises itself. Each message is a plain sentence: what happened, to what, what to do.

They all derive from `UserswapError`, so that one `except` catches them; the command line prints the
sentence and ends with exit code 2. Errors of the program that userswap runs are never among them.
"""

__all__ = [
    "BadSize",
    "BenchError",
    "BudgetError",
    "ControlError",
    "DataLost",
    "DeliveryError",
    "LabError",
    "MapDesignError",
    "SwapOffError",
    "SwapPathError",
    "TierError",
    "TraceError",
    "UnsupportedError",
    "UsageError",
    "UserswapError",
]


class UserswapError(Exception):
    """Base of everything userswap raises; `str(error)` is the sentence for the user."""


class BadSize(UserswapError, ValueError):  # noqa: N818 - reads as what it is: "bad size"
    """A size that cannot be read as a number of bytes, or that makes no sense where it is used."""


class BudgetError(UserswapError, ValueError):
    """The RAM budget is too small to work with, or none could be worked out."""


class ControlError(UserswapError):
    """A running program can't be reached, or can't do what was asked of it; or was sent what is no message of ours."""


class DataLost(UserswapError, OSError):  # noqa: N818 - what happened, as in "data lost"
    """Data that was swapped out can't be brought back: the device failed, or what is there is not what was stored.

    `errno` is EIO. What the program gets where no exception can be raised, at a load or store, is a bus error.
    """


class DeliveryError(UserswapError, ValueError):
    """There is no such way to deliver faults, or the process has settled on another one."""


class MapDesignError(UserswapError, ValueError):
    """There is no such design of the swap map, or it can't work without a swap file and there is none."""


class SwapPathError(UserswapError):
    """The place named for swap cannot be used: missing, not writable, full, in use, on tmpfs."""


class SwapOffError(UserswapError):
    """A swap file can't be emptied: there is no room elsewhere, or what is in it can't be read. It is in use as
    before."""

    def __init__(self, sentence: str, missing_bytes: int = 0) -> None:
        super().__init__(sentence)
        self.missing_bytes = missing_bytes
        """Of what is still in it, how much found no room."""


class TierError(UserswapError, ValueError):
    """Tiers of swap that can't be told apart, or a policy that names one that there is not."""


class UnsupportedError(UserswapError):
    """This kernel, container or machine lacks something userswap needs, such as userfaultfd."""


class UsageError(UserswapError):
    """A command line that says something impossible."""


class TraceError(UserswapError):
    """A trace that can't be read, or that can't be replayed."""


class LabError(UserswapError):
    """An experiment that could not be carried out, or whose results are wrong."""


class BenchError(UserswapError):
    """A contender of a benchmark that can't be set up here, or whose result is wrong."""
