"""Real programs in a third of the memory that they need (`make examples`).

Each of programs/ is run plainly, which shows what memory it needs and what comes out, and again under `userswap run`
with a third of that; what it prints, checksums of all results among it, must be the same to the last bit. As root the
second run is in a memory cgroup: the third is then a limit for everything, the interpreter, its libraries and all
processes included, and the kernel ends what wants more. Else the budget is a third of what the data take.

What adds up floats does it in one thread, in both runs, since sums depend on how they are split among threads.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path

from rich.console import Console
from rich.table import Table

from userswap.bench.cgroup import Cgroup, new_cgroup, why_no_cgroup

PROGRAMS = Path(__file__).resolve().parent / "programs"
MIB = 1 << 20
SHARE = 3
# What userswap itself brings along, the kernel's buffers, and pages of files that are being read.
ROOM = 32 * MIB
LEAST_BUDGET = 12 * MIB
SAMPLE_SECONDS = 0.1
ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
EXIT_SAME, EXIT_DIFFERENT, EXIT_CANNOT = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Example:
    """A program: what it imports, its size (an option and its value), its arguments for no data."""

    name: str
    title: str
    needs: tuple[str, ...]
    option: str
    size: int
    bare: tuple[str, ...]

    def command(self, scale: float) -> list[str]:
        """Return the program and its arguments, with so many times its usual data; with next to none for 0."""
        size = (self.option, str(int(self.size * scale))) if scale else self.bare
        return [str(PROGRAMS / f"{self.name}.py"), *size]


EXAMPLES = (
    Example("orders", "orders joined and grouped (pandas)", ("pandas",), "--rows", 14_000_000, ("--rows", "1000")),
    Example("clusters", "k-means and boosting (scikit-learn)", ("sklearn",), "--rows", 6_000_000, ("--rows", "5000")),
    Example(
        "training",
        "a network and its loaders (PyTorch)",
        ("torch",),
        "--images",
        80_000,
        ("--images", "256"),
    ),
    Example(
        "stack",
        "cells in images (SciPy, scikit-image)",
        ("scipy", "skimage"),
        "--depth",
        80,
        ("--depth", "24", "--side", "64"),
    ),
    Example("serving", "workers that share a table (NumPy)", (), "--rows", 60_000_000, ("--rows", "10000")),
)


class ExampleError(Exception):
    """A program could not be run to its end: a sentence for the reader."""


@dataclass
class Run:
    """A program, once: what it printed, seconds, the most memory of all its processes at once, userswap's figures."""

    lines: list[str] = field(default_factory=list)
    seconds: float = 0.0
    peak: int = 0
    stats: dict[str, int] = field(default_factory=dict)


@dataclass
class Report:
    """What came of an example."""

    example: Example
    plain: Run
    swapped: Run
    limit: int | None
    budget: int

    @property
    def same(self) -> bool:
        """Whether both runs printed the same."""
        return self.plain.lines == self.swapped.lines


def processes_of(pid: int) -> list[int]:
    """Return a process and all that it started, as far as they still run."""
    found = [pid]
    for one in found:
        with suppress(OSError):
            for thread in Path(f"/proc/{one}/task").iterdir():
                found += map(int, (thread / "children").read_text().split())
    return found


def memory_of(pid: int) -> int:
    """Return what a process and all that it started have in RAM, what they share counted once."""
    total = 0
    for one in processes_of(pid):
        with suppress(OSError):
            for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
                if line.startswith("Pss:"):
                    total += int(line.split()[1]) * 1024
    return total


def run(command: list[str], what: str, console: Console, cgroup: Cgroup | None = None, *, shown: bool = True) -> Run:
    """Run a program, in a cgroup if one is given, and show what it prints."""
    result = Run()
    if cgroup is not None:
        command = ["/bin/sh", "-c", 'echo $$ > "$0" && exec "$@"', str(cgroup.procs), *command]
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors, console.status(what) as status:
        began = time.monotonic()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | ONE_THREAD
        )
        over = threading.Event()

        def watch() -> None:
            while not over.wait(SAMPLE_SECONDS):
                now = memory_of(process.pid)
                result.peak = max(result.peak, now)
                status.update(f"{what}: {time.monotonic() - began:.0f} s, {in_words(now)}")

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                result.lines.append(line.rstrip("\n"))
                if shown:
                    seconds = time.monotonic() - began
                    console.print(
                        f"  {seconds:6.1f} s  {result.lines[-1]}", highlight=False, markup=False, soft_wrap=True
                    )
            process.wait()
        finally:
            if process.poll() is None:
                for one in processes_of(process.pid):
                    os.kill(one, signal.SIGKILL)
                process.wait()
            over.set()
            watcher.join()
        result.seconds = time.monotonic() - began
        errors.seek(0)
        said = errors.read().strip()
    if process.returncode:
        code = process.returncode
        ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        if cgroup is not None and cgroup.killed():
            ended += " by the kernel, for want of memory"
        raise ExampleError(f"{what} {ended}. It said: {said or '(nothing)'}")
    return result


@contextmanager
def limited(limit: int) -> Iterator[Cgroup]:
    """A cgroup with so much memory, where the kernel ends what wants more, and has no swap of its own to give."""
    with new_cgroup() as cgroup:
        cgroup.limit(limit)
        no_swap = "memory.swap.max" if cgroup.version == 2 else "memory.swappiness"
        with suppress(OSError):
            (cgroup.path / no_swap).write_text("0")
        if cgroup.version == 1:
            (cgroup.path / "memory.oom_control").write_text("0")
        yield cgroup


def run_example(example: Example, scale: float, console: Console, *, in_cgroup: bool) -> Report:
    """Run an example plainly and under userswap.

    Raises:
        ExampleError: a run failed, or the size is so small that a third of it is no room for a program at all.
    """
    python = [sys.executable]
    # With next to no data: what interpreter and libraries take.
    bare = run([*python, *example.command(0)], f"{example.title}, without data", console, shown=False)
    plain = run([*python, *example.command(scale)], f"{example.title}, plain", console)
    if in_cgroup:
        limit = plain.peak // SHARE
        budget = limit - bare.peak - ROOM
        where = f"in {in_words(limit)}"
    else:
        limit, budget = None, (plain.peak - bare.peak) // SHARE
        where = f"with a budget of {in_words(budget)}"
    if budget < LEAST_BUDGET:
        raise ExampleError(
            f"{example.title} took {in_words(plain.peak)}, of which {in_words(bare.peak)} are interpreter and "
            "libraries: a third is no room for it. Give it more data with --scale."
        )
    console.print(f"  needs {in_words(plain.peak)}; now {where}, of which userswap's budget is {in_words(budget)}",
                  highlight=False)  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        stats = Path(directory) / "stats.json"
        command = [*python, "-m", "userswap", "run", "--ram", str(budget), "--quiet", "--stats", str(stats)]
        command += example.command(scale)
        what = f"{example.title}, under userswap"
        if limit is None:
            swapped = run(command, what, console)
        else:
            with limited(limit) as cgroup:
                swapped = run(command, what, console, cgroup)
        swapped.stats = json.loads(stats.read_text())
    return Report(example, plain, swapped, limit, budget)


def in_words(size: float) -> str:
    """Write a number of bytes for a reader."""
    return f"{size / MIB / 1024:.2f} GiB" if size >= 1024 * MIB else f"{size / MIB:.0f} MiB"


def quoted(line: str | None) -> str:
    """Write a line that a program printed, or did not."""
    return "nothing" if line is None else repr(line)


def table(reports: list[Report]) -> Table:
    """Return the table of what came out."""
    shown = Table(title="Real programs in a third of the memory that they need")
    for column in ("program", "needs", "had", "plain", "userswap", "ratio", "swapped out", "result"):
        shown.add_column(column, justify="left" if column in ("program", "result") else "right")
    for report in reports:
        stats = report.swapped.stats
        shown.add_row(
            report.example.title,
            in_words(report.plain.peak),
            in_words(report.limit) if report.limit is not None else f"{in_words(report.swapped.peak)}, no limit",
            f"{report.plain.seconds:.0f} s",
            f"{report.swapped.seconds:.0f} s",
            f"{report.swapped.seconds / report.plain.seconds:.1f} x",
            in_words(64 * 1024 * stats["swap_outs"] + 16 * 1024 * stats["part_outs"]),
            "the same" if report.same else "DIFFERENT",
            style=None if report.same else "red",
        )
    return shown


def missing(example: Example) -> list[str]:
    """Return what an example needs that is not installed."""
    return [name for name in example.needs if importlib.util.find_spec(name) is None]


def main() -> int:
    """Run what is asked for; 1 if a result differs, 2 if a program could not be run."""
    parser = ArgumentParser(description="Real programs, each plain and under userswap in a third of the memory.")
    # So that a cgroup is removed, and the program in it ended, however this ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(EXIT_CANNOT))
    parser.add_argument("programs", nargs="*", metavar="PROGRAM", help="only these (default: all)")
    parser.add_argument("--scale", type=float, default=1.0, metavar="X", help="that many times the usual data")
    options = parser.parse_args()
    names = [example.name for example in EXAMPLES]
    for name in options.programs:
        if name not in names:
            parser.error(f"there is no {name!r}, only {', '.join(names)}")
    console = Console() if sys.stdout.isatty() else Console(width=130)
    why = why_no_cgroup()
    if why is not None:
        console.print(
            f"There is no limit that the kernel keeps ({why}): userswap has its budget alone.", highlight=False
        )
    reports: list[Report] = []
    left_out, failed = [], []
    for example in EXAMPLES:
        if options.programs and example.name not in options.programs:
            continue
        if lacking := missing(example):
            left_out.append(example)
            console.print(f"{example.title}: not run, as {' and '.join(lacking)} is not installed.", highlight=False)
            continue
        console.print(f"[bold]{example.title}[/bold]", highlight=False)
        try:
            reports.append(run_example(example, options.scale, console, in_cgroup=why is None))
        except ExampleError as error:
            failed.append(example)
            console.print(str(error), highlight=False, markup=False, soft_wrap=True)
    if reports:
        console.print(table(reports))
    for report in reports:
        pairs = zip_longest(report.plain.lines, report.swapped.lines)
        for number, (plain, swapped) in enumerate(pairs, 1):
            if plain != swapped:
                console.print(f"{report.example.name}, line {number}: {quoted(plain)} plain, "
                              f"{quoted(swapped)} under userswap",
                              highlight=False, markup=False, soft_wrap=True)  # fmt: skip
    if not all(report.same for report in reports):
        console.print("A result under userswap is not the plain run's.")
        return EXIT_DIFFERENT
    if failed or not reports:
        console.print(
            f"{len(failed) or 'No'} of the programs could not be run to the end." if failed else "Nothing ran."
        )
        return EXIT_CANNOT
    also = f" ({', '.join(one.title for one in left_out)} left out)" if left_out else ""
    console.print(
        f"{len(reports)} unchanged programs gave the same results, to the last bit, in a third of the memory that they "
        f"need{also}.", highlight=False, soft_wrap=True,
    )  # fmt: skip
    return EXIT_SAME


if __name__ == "__main__":
    sys.exit(main())
