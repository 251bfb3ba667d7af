"""`userswap lab system`: whole programs under every design of the swap map."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from userswap.cli.lab_programs import chosen_designs, positive, progress, reported, table, writer
from userswap.cli.main import Parser

if TYPE_CHECKING:
    from userswap.lab.system import Measured, Size

__all__ = ["prepare_system"]


def prepare_system(arguments: list[str]) -> Callable[[], int]:
    """Return the measurement of whole programs. Raises UserswapError."""
    from userswap.lab import system

    parser = Parser(
        prog="userswap lab system",
        description="Run whole programs under every design of the swap map, and check their results.",
    )
    parser.add_argument("--designs", metavar="NAME,...", help="only these (default: all)")
    parser.add_argument("--rounds", type=int, help="medians are over this many (default 3, 2 with --quick)")
    parser.add_argument("--quick", action="store_true", help="smaller arrays: within half a minute")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(arguments)
    designs = chosen_designs(options.designs)
    size = system.QUICK if options.quick else system.FULL
    rounds = positive((2 if options.quick else 3) if options.rounds is None else options.rounds)
    put = writer(options.json)

    def work() -> None:
        report = system.measure(designs, size, rounds, progress)
        progress("")
        show_system(report, size, rounds)
        put(system.figures(report, size, rounds))

    return reported(work)


def show_system(report: "Measured", size: "Size", rounds: int) -> None:
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
