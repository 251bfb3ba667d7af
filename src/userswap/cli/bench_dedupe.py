"""`userswap bench dedupe`: what storing identical folios once costs, and what it saves."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from userswap.cli.lab_programs import positive, progress, reported, table, writer
from userswap.cli.main import Parser

if TYPE_CHECKING:
    from userswap.bench.dedupe import Figures

__all__ = ["prepare_dedupe"]

MIB = 1 << 20


def prepare_dedupe(arguments: list[str]) -> Callable[[], int]:
    """Return the measurement of dedupe. Raises UserswapError."""
    from userswap.bench import dedupe

    parser = Parser(
        prog="userswap bench dedupe",
        description="Measure what storing identical folios once costs where there are none, and saves where there are.",
    )
    parser.add_argument("--rounds", type=int, help="medians are over this many (default 9, 5 with --quick)")
    parser.add_argument("--quick", action="store_true", help="smaller arrays, some ten seconds")
    parser.add_argument("--swap", default=None, help="as for userswap run")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(arguments)
    size = dedupe.QUICK if options.quick else dedupe.FULL
    rounds = positive((5 if options.quick else 9) if options.rounds is None else options.rounds)
    put = writer(options.json)

    def work() -> None:
        figures = dedupe.measure(size, rounds, options.swap, progress)
        progress("")
        show(figures)
        put(figures.as_json())

    return reported(work)


def show(figures: "Figures") -> None:
    """Print cost and gain, a table each."""
    from userswap.lab.replay import spread
    from userswap.sizes import format_size

    size = figures.size
    rows: list[list[str]] = []
    for dedupe, updates in figures.updates.items():
        speed, cpu = spread(figures.speed(dedupe)), spread(updates.cpu_seconds)
        rows.append(
            [
                "on" if dedupe else "off",
                f"{speed['median']:.3f}",
                f"{speed['least']:.3f}..{speed['most']:.3f}",
                f"{cpu['median']:.3f}",
                f"{cpu['least']:.3f}..{cpu['most']:.3f}",
                f"{updates.swap_outs / figures.rounds:,.0f}",
            ]
        )
    time, cpu = figures.cost("seconds"), figures.cost("cpu_seconds")
    table(
        f"Cost: update of {format_size(size.array)} in {format_size(size.ram)}, nothing identical in it",
        ["dedupe", "GB/s", "spread", "CPU seconds", "spread", "swap-outs"],
        rows,
        (
            f"Medians of {figures.rounds} rounds, in turn. Within a round dedupe takes {time['median']:+.1%} of time "
            f"({time['least']:+.1%} to {time['most']:+.1%}), {cpu['median']:+.1%} of CPU time "
            f"({cpu['least']:+.1%} to {cpu['most']:+.1%})."
        ),
    )
    table(
        f"Gain: {size.copies} copies of {format_size(size.copied)} in {format_size(size.copies_ram)}, swapped out",
        ["dedupe", "packed MiB", "zswap MiB", "swap file MiB", "swap ids", "found stored"],
        [
            ["on" if dedupe else "off"]
            + [f"{number / MIB:,.1f}" for number in (stored.packed, stored.zswap, stored.file)]
            + [f"{stored.swap_ids:,}", f"{stored.deduped:,}"]
            for dedupe, stored in figures.stored.items()
        ],
        "Packed: compressed bytes, wherever they are. Found stored: swap-outs that took no storage of their own.",
    )
