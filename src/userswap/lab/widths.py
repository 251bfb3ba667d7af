"""How long a word is: the maps that the lab compares for each width, and what an instrument has to offer for that."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from userswap.lab.words32 import DESIGN_NAMES32, Map32, limits
from userswap.swap.map import DESIGN_NAMES, Map

if TYPE_CHECKING:
    from userswap.swap.map import Holders, Operation

__all__ = ["WIDTHS", "MapLike", "Width"]


class MapLike(Protocol):
    """What the lab asks of a map's window, whatever the width of its words."""

    def id(self, holder: int) -> int:
        """Return the id that a holder has."""

    def lock(self, holder: int) -> int:
        """Lock a holder and the entry of its id; the entry."""

    def unlock(self, holder: int, entry: int) -> None:
        """Unlock both, with the entry as it shall be."""

    def count(self, holder: int) -> int:
        """How many references an id has."""

    def cached(self, holder: int) -> int:
        """Return the folio that has the bytes of a holder's id."""

    def ids(self) -> int:
        """How many ids are live."""

    def metadata(self) -> int:
        """Bytes of memory that the map uses."""

    def touch(self) -> None:
        """Give every holder its memory."""

    def run(
        self,
        op: "Operation",
        holders: "Holders",
        entry: int = 0,
        into: "Holders | None" = None,
        *,
        references: int = 1,
        together: int = 1,
    ) -> float:
        """Do something for every holder: ns for each."""

    def swapoff(self) -> tuple[int, int]:
        """Empty the swap file: ids that left it, and ns."""


def make64(design: str, *, holders: int, slots: int) -> MapLike:
    return Map(design, holders=holders, slots=slots, slot_run=1)


def make32(design: str, *, holders: int, slots: int) -> MapLike:
    return Map32(design, holders=holders, slots=slots, slot_run=1)


class Make(Protocol):
    """Makes a fresh map whose folios are pages."""

    def __call__(self, design: str, *, holders: int, slots: int) -> MapLike:
        """Return a map of the design."""


@dataclass(frozen=True)
class Width:
    """Words of so many bits."""

    bits: int
    designs: tuple[str, ...]
    make: Make
    most_pages: Callable[[str], int | None]
    """How many pages the words of a design can tell from each other; None: more than anybody has."""

    @property
    def holder_bytes(self) -> int:
        """What a page-table word takes."""
        return self.bits // 8


WIDTHS = {
    64: Width(64, DESIGN_NAMES, make64, lambda design: None),
    32: Width(32, DESIGN_NAMES32, make32, lambda design: int(limits(design)["zswap_objects"]) - 1),
}
