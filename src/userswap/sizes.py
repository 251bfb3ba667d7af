"""Sizes as people write them: "512M", "1.5GiB", "65536", and the way back to "1.5 GiB"."""

import operator
import re
from typing import SupportsIndex

from userswap.errors import BadSize

__all__ = ["format_size", "parse_size"]

UNITS = "KMGTPE"
# off_t and every counter of the core are signed 64-bit numbers.
MOST = 2**63 - 1
# Nobody writes more digits than this, and int() of thousands of them is slow.
SIZE = re.compile(r"([0-9]{1,30})(?:\.([0-9]{0,30}))?\s*(?:([KMGTPE])I?B?|B)?", re.IGNORECASE | re.ASCII)
EXAMPLES = "write for example 512M, 2GiB or 65536 (bytes)"


def parse_size(text: str | SupportsIndex, what: str = "the size") -> int:
    """Return the number of bytes that `text` names.

    Units are powers of 1024 however they are spelled, as is usual for memory: K, KB and KiB are all
    1024 bytes, and so on for M, G, T, P and E; upper or lower case. A bare number is bytes. A
    fraction such as "1.5GiB" is allowed and rounded down to whole bytes. An integer is taken as it is.

    `what` names the size in the error, for example "--ram".

    Raises BadSize for anything else: junk, an empty text, zero, a negative number, 8 EiB or more.
    """
    if isinstance(text, bool) or not isinstance(text, (str, int)):
        # NumPy's integers have __index__; True and 2e9 are more likely slips than sizes.
        if isinstance(text, bool) or not hasattr(text, "__index__"):
            raise BadSize(f"{what}: {shown(text)} is not a size; {EXAMPLES}.")
        text = operator.index(text)
    if isinstance(text, int):
        size = text
        negative = size < 0
    else:
        stripped = text.strip()
        if not stripped:
            raise BadSize(f"{what} is empty; {EXAMPLES}.")
        negative = stripped.startswith(("-", "\N{MINUS SIGN}"))
        found = SIZE.fullmatch(stripped.removeprefix("+"))
        if found is None and not negative:
            raise BadSize(f"{what}: {shown(text)} is not a size; {EXAMPLES}.")
        size = 0
        if found is not None:
            whole, fraction, unit = found.groups()
            scale = 1024 ** (UNITS.index(unit.upper()) + 1) if unit else 1
            size = int(whole) * scale
            if fraction:
                size += int(fraction) * scale // 10 ** len(fraction)
    if negative:
        raise BadSize(f"{what}: {shown(text)} is negative; {EXAMPLES}.")
    if size == 0:
        raise BadSize(f"{what}: {shown(text)} is less than a byte; {EXAMPLES}.")
    if size > MOST:
        raise BadSize(f"{what}: {shown(text)} is more than any machine has (8 EiB); {EXAMPLES}.")
    return size


def format_size(size: int) -> str:
    """Return `size` bytes in the largest unit that fits, with at most one decimal: "1.5 GiB", "12 B"."""
    sign = "-" if size < 0 else ""
    size = abs(size)
    if size < 1024:
        return f"{sign}{size} B"
    power = 1
    # 1023.96 KiB would be written "1024 KiB": the next unit says "1 MiB".
    while power < len(UNITS) and round(size / 1024**power, 1) >= 1024:
        power += 1
    return f"{sign}{size / 1024**power:.1f}".removesuffix(".0") + f" {UNITS[power - 1]}iB"


def shown(text: object) -> str:
    """Return `text` quoted for a message, cut where it would fill the screen."""
    try:
        quoted = repr(text) if isinstance(text, str) else str(text)
    except ValueError:  # Python refuses to write out thousands of digits
        return "a number of thousands of digits"
    return quoted if len(quoted) <= 60 else f"{quoted[:40]}…{quoted[-10:]}"
