"""What commands that measure share: finding the subcommand, files that are asked for, a progress bar, plain errors."""

import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from userswap.errors import UsageError, UserswapError

__all__ = ["Action", "Bar", "complain", "find", "plainly", "writable", "writable_plot", "write"]

Action = Callable[[], int]


def find(
    group: str, intro: str, kind: str, commands: Mapping[str, tuple[str, Callable[[list[str]], Action]]],
    arguments: list[str],
) -> Action:  # fmt: skip
    """Return the command of a group that `arguments` ask for. Raises UserswapError."""
    from userswap.cli.main import printing

    if not arguments:
        raise UsageError(f"Say which {kind}: {', '.join(commands)}; see userswap {group} --help.")
    command, *rest = arguments
    if command in ("-h", "--help", "help"):
        lines = "\n".join(f"  {name:<8} {text}" for name, (text, _) in commands.items())
        return printing(
            f"usage: userswap {group} [--help] COMMAND ...\n\n{intro}\n\ncommands:\n{lines}\n\n"
            f"userswap {group} COMMAND --help says more about each.\n"
        )
    if command not in commands:
        raise UsageError(f"There is no {kind} {command!r}, only {', '.join(commands)}: see userswap {group} --help.")
    return commands[command][1](rest)


def writable(option: str, name: str | None) -> Path | None:
    """Return the file that an option names after opening it for writing, None for None. Raises UsageError."""
    if name is None:
        return None
    path = Path(name)
    try:
        new = not path.exists()
        with path.open("ab"):
            pass
        if new:
            path.unlink()
    except OSError as error:
        raise UsageError(f"{option} {name} can't be written: {os.strerror(error.errno or 0)}.") from error
    return path


def writable_plot(name: str | None) -> Path | None:
    """Return the file of --plot, as `writable`; raises UsageError also when it could not be drawn."""
    import importlib.util

    path = writable("--plot", name)
    if path and path.suffix not in (".png", ".svg"):
        raise UsageError(f"--plot {path}: the name must end in .png or .svg.")
    if path and importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib, which is not installed: pip install 'userswap[plot]'.")
    return path


def write(path: Path | None, writer: Callable[[Path], object]) -> None:
    """Write to a file that was asked for. Raises UserswapError."""
    if path is None:
        return
    try:
        writer(path)
    except OSError as error:
        raise UserswapError(f"{path} can't be written: {error.strerror}.") from error


def plainly(action: Action) -> Action:
    """Return the action with its errors as sentences."""

    def guarded() -> int:
        try:
            return action()
        except UserswapError as error:
            print(f"userswap: {error}", file=sys.stderr)
        except MemoryError as error:
            print(f"userswap: Not enough memory to measure this: {error}.", file=sys.stderr)
        return 2

    return guarded


def complain(sentences: list[str]) -> int:
    """Say on stderr what makes the figures unbelievable, and return the exit code."""
    for sentence in sentences:
        print(f"userswap: {sentence}", file=sys.stderr)
    return 1 if sentences else 0


class Bar:
    """A progress bar on stderr, where that is a terminal."""

    def __init__(self, steps: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        to = Console(stderr=True)
        self.progress = Progress(
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=to,
            transient=True,
            disable=not to.is_terminal,
        )
        self.task = self.progress.add_task("", total=steps, completed=-1)

    def __enter__(self) -> "Bar":
        self.progress.start()
        return self

    def __exit__(self, *ignored: object) -> None:
        self.progress.stop()

    def step(self, text: str) -> None:
        """Say what comes next."""
        self.progress.update(self.task, advance=1, description=text)
