"""`userswap lab`: experiments with the swap layer. A subcommand is one function here that says what to measure."""

import json
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from userswap.cli.main import Parser
from userswap.errors import UsageError, UserswapError

if TYPE_CHECKING:
    from userswap.lab.replay import Replay
    from userswap.lab.system import Measured
    from userswap.lab.trace import Trace

__all__ = ["prepare"]

COMMANDS = {
    "replay": "a recorded program under every design of the swap map",
    "system": "whole programs under every design: time and metadata",
}
HELP = """\
usage: userswap lab [--help] COMMAND ...

Experiments with the swap layer, every design of the swap map side by side.

commands:
{commands}

userswap lab COMMAND --help says more about each.
"""


def prepare(arguments: list[str]) -> Callable[[], int]:
    """Return the experiment that `arguments` ask for. Raises UserswapError."""
    from userswap.cli.main import printing

    if not arguments or arguments[0] in ("-h", "--help", "help"):
        if not arguments:
            raise UsageError(f"Say which experiment: {', '.join(COMMANDS)}; see userswap lab --help.")
        return printing(HELP.format(commands="\n".join(f"  {name:<8} {text}" for name, text in COMMANDS.items())))
    command, *rest = arguments
    if command == "replay":
        return prepare_replay(rest)
    if command == "system":
        return prepare_system(rest)
    raise UsageError(f"There is no experiment {command!r}, only {', '.join(COMMANDS)}: see userswap lab --help.")


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


# ---- replay ----


def prepare_replay(arguments: list[str]) -> Callable[[], int]:
    """Return the replay of a trace. Raises UserswapError."""
    from userswap.lab.replay import replay
    from userswap.lab.trace import find, shipped

    parser = Parser(
        prog="userswap lab replay",
        description="Replay a recorded program under every design of the swap map.",
        epilog=f"Traces that come with userswap: {', '.join(shipped())}.",
    )
    parser.add_argument("trace", help="a file that userswap run --trace made, or the name of a trace below")
    parser.add_argument("--designs", metavar="NAME,...", help="only these (default: all)")
    parser.add_argument("--rounds", type=int, default=9, help="medians are over this many (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(arguments)
    designs, rounds = chosen_designs(options.designs), positive(options.rounds)
    trace = find(options.trace)
    put = writer(options.json)

    def work() -> None:
        report = replay(trace, designs, rounds, progress)
        progress("")
        show_replay(trace, report, rounds)
        put(replay_figures(trace, report, rounds))

    return reported(work)


def replay_figures(trace: "Trace", report: "Replay", rounds: int) -> dict[str, Any]:
    """What --json writes. Times are ns an event, sizes bytes."""
    from userswap.lab.replay import spread

    designs: dict[str, Any] = {}
    for name, result in report.designs.items():
        designs[name] = (
            {"refused": result.refused}
            if result.refused
            else {
                "ns_per_event": spread(result.total),
                "ns_by_kind": {kind: spread(values) for kind, values in result.kinds.items()},
                "peak_metadata_bytes": result.peak_metadata,
                "bytes_per_id": result.bytes_per_id,
            }
        )
    return {
        "program": trace.program,
        "budget_bytes": trace.budget_bytes,
        "folio_bytes": trace.folio_bytes,
        "cut": trace.cut,
        "events": len(trace.kinds),
        "counts": report.counts,
        "peak_ids": report.peak_ids,
        "live_at_end": report.live_at_end,
        "slots": report.slots,
        "rounds": rounds,
        "replays_per_round": report.repeats,
        "designs": designs,
    }


def show_replay(trace: "Trace", report: "Replay", rounds: int) -> None:
    """Print the table."""
    from userswap.lab.replay import spread
    from userswap.sizes import format_size

    kinds = [kind for kind in report.counts if kind != "more"]
    rows: list[list[str]] = []
    refusals = ""
    for name, result in report.designs.items():
        if result.refused:
            rows.append([name, "can't"])
            refusals += f"{name} can't: {result.refused}. "
            continue
        total = spread(result.total)
        rows.append(
            [
                name,
                f"{total['median']:.1f}",
                f"{total['least']:.1f}..{total['most']:.1f}",
                *(f"{spread(result.kinds[kind])['median']:.1f}" for kind in kinds),
                f"{result.peak_metadata / 1024:,.0f}",
                f"{result.bytes_per_id:.1f}",
            ]
        )
    columns = ["design", "ns/event", "spread", *kinds, "peak KiB", "bytes/id"]
    what = ", ".join(f"{number:,} {kind}" for kind, number in report.counts.items())
    took = int(trace.times[-1]) / 1e9 if len(trace.times) else 0
    title = (
        f"{trace.program} in {format_size(trace.budget_bytes)}: {len(trace.kinds):,} events in {took:.1f} s, "
        f"at most {report.peak_ids:,} swap ids"
    )
    cut = "The recording was cut: the program went on. " if trace.cut else ""
    table(
        title,
        columns,
        rows,
        (
            f"{cut}{refusals}{what}. ns an event, medians of {rounds} rounds of {report.repeats} replays by one "
            "thread; every entry that was found was checked."
        ),
    )


# ---- the whole system ----


def prepare_system(arguments: list[str]) -> Callable[[], int]:
    """Return the measurement of whole programs. Raises UserswapError."""
    from userswap.lab import system

    parser = Parser(
        prog="userswap lab system",
        description="Run whole programs under every design of the swap map, and check their results.",
    )
    parser.add_argument("--designs", metavar="NAME,...", help="only these (default: all)")
    parser.add_argument("--rounds", type=int, help="medians are over this many (default 5, 3 with --quick)")
    parser.add_argument("--quick", action="store_true", help="smaller arrays, under a minute")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(arguments)
    designs = chosen_designs(options.designs)
    size = system.QUICK if options.quick else system.FULL
    rounds = positive((3 if options.quick else 5) if options.rounds is None else options.rounds)
    put = writer(options.json)

    def work() -> None:
        report = system.measure(designs, size, rounds, progress)
        progress("")
        show_system(report, size, rounds)
        put(system.figures(report, size, rounds))

    return reported(work)


def show_system(report: "Measured", size: Any, rounds: int) -> None:
    """Print the table."""
    from userswap.lab.replay import spread
    from userswap.sizes import format_size

    rows: list[list[str]] = []
    for design, workloads in report.items():
        for workload, runs in workloads.items():
            seconds = spread([run["seconds"] for run in runs])
            maps, all_of_it = (spread([run[name] for run in runs]) for name in ("map_bytes", "metadata_bytes"))
            ids = spread([run["swap_ids"] for run in runs])
            rows.append(
                [
                    design if workload == next(iter(workloads)) else "",
                    workload,
                    f"{seconds['median']:.3f}",
                    f"{seconds['least']:.3f}..{seconds['most']:.3f}",
                    f"{maps['median'] / 1024:,.0f}",
                    f"{all_of_it['median'] / 1024:,.0f}",
                    f"{ids['median']:,.0f}",
                ]
            )
    columns = ["design", "workload", "seconds", "spread", "map KiB", "metadata KiB", "swap ids"]
    table(
        f"{format_size(size.array)} of arrays in {format_size(size.ram)} of RAM",
        columns,
        rows,
        (
            f"Medians of {rounds} rounds, designs in turn, each in a process of its own; every result was right. "
            "Sizes and ids are the most that was seen between passes; metadata has the map's share in it."
        ),
    )


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
