"""A swap map that records what it is asked, for ``userswap run --trace``."""

from typing import Final

EVENTS: Final[tuple[str, ...]]
MOST_RECORDS: Final[int]
