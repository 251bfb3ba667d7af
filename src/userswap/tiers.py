"""The tiers of a pool: zswap, and for each priority of swap files one, with a name. No state but names and numbers.

A policy says which of them data may be in ("zswap,ssd"); below it is a word with a bit for each: the lowest is zswap's, and
tiers of swap files get theirs in the order in which they first come up, for as long as the pool lives.
"""

from collections.abc import Iterable

from userswap.errors import TierError
from userswap.swapfiles import SwapSpec

__all__ = ["ZSWAP", "Tiers"]

ZSWAP = "zswap"
MOST = 8
ALL = (1 << (MOST + 1)) - 1


class Tiers:
    """Names for priorities, and bits for names."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._bits: dict[str, int] = {}

    def add(self, specs: Iterable[SwapSpec]) -> None:
        """Know the tiers of these swap files from now on: all of them, or none if that raises TierError."""
        named = dict(self._names)
        given: dict[int, str] = {}
        wanted = list(specs)
        for spec in wanted:
            if spec.tier is None:
                continue
            before = given.get(spec.priority, named.get(spec.priority))
            if before not in (None, spec.tier):
                raise TierError(
                    f"Priority {spec.priority} is the tier {before} already, and can't be {spec.tier}, too: swap files of "
                    "one tier have one priority. Choose another priority, or the same name."
                )
            given[spec.priority] = spec.tier
        for spec in wanted:
            named[spec.priority] = given.get(spec.priority) or named.get(spec.priority) or default_name(spec.priority)
        for priority, name in named.items():
            other = [rank for rank, known in named.items() if known == name and rank != priority]
            if other:
                raise TierError(
                    f"The tier {name} has priority {min(priority, *other)} and can't have {max(priority, *other)}, too: give "
                    "its swap files one priority, or the tiers two names."
                )
        if len(named) > MOST:
            raise TierError(f"A pool has {MOST} tiers of swap files at most: give some files the same priority.")
        self._names = named
        for name in named.values():
            self._bits.setdefault(name, len(self._bits) + 1)

    def name(self, priority: int) -> str:
        """What the tier of a priority is called."""
        return self._names[priority]

    def bit(self, priority: int) -> int:
        """The number of its bit."""
        return self._bits[self._names[priority]]

    def policy(self, text: str | None) -> int:
        """The word for a policy: names with commas between them; None: all there are, now and later.

        Raises:
            TierError: a name that is none, or no name at all.
        """
        if text is None:
            return ALL
        word = 0
        for name in (part.strip() for part in text.split(",")):
            if name != ZSWAP and name not in self._bits:
                raise TierError(
                    f"There is no tier {name!r} in tiers={text!r}, only {', '.join([ZSWAP, *self._bits])}: name some of "
                    "these, with commas between them."
                )
            word |= 1 if name == ZSWAP else 1 << self._bits[name]
        return word


def default_name(priority: int) -> str:
    """What a tier is called that nobody gave a name."""
    return f"file{priority}" if priority else "file"
