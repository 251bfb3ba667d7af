"""What the experiments with programs share: their options, what they say on the way, tables."""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from userswap.errors import UsageError, UserswapError

__all__ = ["chosen_designs", "positive", "progress", "reported", "table", "writer"]


def chosen_designs(text: str | None) -> tuple[str, ...]:
    """Return the designs that --designs names, all by default. Raises UsageError."""
    from userswap.swap.map import DESIGN_NAMES

    if text is None:
        return DESIGN_NAMES
    designs = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in designs:
        if name not in DESIGN_NAMES:
            raise UsageError(f"There is no design {name!r} of the swap map, only {', '.join(DESIGN_NAMES)}.")
    return designs


def positive(rounds: int) -> int:
    """Return `rounds`. Raises UsageError."""
    if rounds < 1:
        raise UsageError("--rounds must be 1 or more.")
    return rounds


def writer(name: str | None) -> Callable[[dict[str, Any]], None]:
    """Return what writes the figures to the --json file, which was tried out. Raises UsageError."""
    if name is None:
        return lambda figures: None
    path = Path(name)
    try:
        with path.open("a"):
            pass
    except OSError as error:
        raise UsageError(f"--json {name!r} cannot be written ({error.strerror}): name another file.") from None
    return lambda figures: write(path, figures)


def write(path: Path, figures: dict[str, Any]) -> None:
    """Write figures as JSON. Raises UsageError."""
    try:
        path.write_text(json.dumps(figures, indent=2) + "\n")
    except OSError as error:
        raise UsageError(f"--json {str(path)!r} cannot be written ({error.strerror}).") from None


def reported(work: Callable[[], None]) -> Callable[[], int]:
    """Return the action that does `work`, and says in one sentence what went wrong in it."""

    def action() -> int:
        try:
            work()
        except UserswapError as error:
            progress("")
            print(f"userswap: {error}", file=sys.stderr)
            return 2
        return 0

    return action


def progress(text: str) -> None:
    """Say on a terminal's stderr what is going on; an empty text wipes it."""
    with suppress(OSError, AttributeError):
        if sys.stderr.isatty():
            print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> None:
    """Print a table; the first column is text, the others are figures. Not on a terminal, it is as wide as it needs."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    shown = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    for i, column in enumerate(columns):
        shown.add_column(column, justify="left" if i == 0 or column == "workload" else "right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
