"""`userswap lab compare` and `upstream`: what can be wrong is looked at before anything is measured."""

import json
from collections.abc import Sequence

from userswap.cli.experiment import Action, Bar, complain, plainly, writable, writable_plot, write
from userswap.cli.main import Parser, version
from userswap.errors import UsageError
from userswap.sizes import format_size

__all__ = ["prepare_compare", "prepare_upstream"]

QUICK_PAGES, QUICK_ROUNDS = 100_000, 3
PAGES, ROUNDS = 1_000_000, 5


def prepare_compare(arguments: list[str]) -> Action:
    """Return `userswap lab compare`. Raises UserswapError."""
    parser = Parser(
        prog="userswap lab compare", description="Memory and time of every swap map design in every scenario."
    )
    add_designs(parser)
    parser.add_argument("--quick", action="store_true", help="a minute's worth: fewer pages, fewer rounds")
    parser.add_argument("--pages", type=int, help=f"swapped pages (default {PAGES:,}; quick: {QUICK_PAGES:,})")
    parser.add_argument("--rounds", type=int, help=f"for the medians (default {ROUNDS}; quick: {QUICK_ROUNDS})")
    parser.add_argument(
        "--order",
        choices=["random", "allocation"],
        default="random",
        help="of faults, dups, puts and writebacks (default %(default)s)",
    )
    parser.add_argument(
        "--words", type=int, choices=[64, 32], default=64, help="bits of every word (default %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=1, help="of everything drawn (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write everything there, each sample included")
    parser.add_argument("--csv", metavar="FILE", help="write a line for each figure")
    parser.add_argument("--plot", metavar="FILE", help="draw it: FILE.png or FILE.svg")
    options = parser.parse_args(arguments)

    from userswap.lab import compare, machine, timing
    from userswap.lab.widths import WIDTHS

    pages = options.pages if options.pages is not None else (QUICK_PAGES if options.quick else PAGES)
    rounds = options.rounds if options.rounds is not None else (QUICK_ROUNDS if options.quick else ROUNDS)
    if pages < timing.LEAST_PAGES:
        raise UsageError(f"--pages must be {timing.LEAST_PAGES:,} or more: fewer say nothing.")
    if rounds < 1:
        raise UsageError("--rounds must be 1 or more.")
    if options.seed < 0:
        raise UsageError("--seed must be 0 or more.")
    chosen = designs(options.designs, WIDTHS[options.words].designs)
    wanted = compare.Options(chosen, pages, rounds, options.seed, options.quick, options.order, options.words)
    most = compare.most_pages(wanted)
    if most is not None and pages > most:
        raise UsageError(f"--pages must be {most:,} or less: words of {options.words} bits can't tell more apart.")
    if compare.need(wanted) > machine.available():
        raise UsageError(
            f"--pages {pages} takes up to {format_size(compare.need(wanted))} of memory, and "
            f"{format_size(machine.available())} are available: choose fewer, or --quick."
        )
    files = {name: writable(f"--{name}", getattr(options, name)) for name in ("json", "csv")}
    plot = writable_plot(options.plot)

    def action() -> int:
        from userswap.lab import report

        with Bar(compare.steps(wanted)) as bar:
            results = compare.measure(wanted, version(), bar.step)
        report.print_results(results, report.console())
        write(files["json"], lambda path: path.write_text(json.dumps(results.as_json(), indent=1) + "\n"))
        write(files["csv"], lambda path: report.write_csv(results, path))
        write(plot, lambda path: report.write_plot(results, path))
        return complain([f"{sentence}." for sentence in results.wrong()])

    return plainly(action)


def prepare_upstream(arguments: list[str]) -> Action:
    """Return `userswap lab upstream`. Raises UserswapError."""
    parser = Parser(
        prog="userswap lab upstream",
        description="Metadata for a swap file of 32 GiB, beside the figures that upstream published.",
    )
    add_designs(parser)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)

    from userswap.lab import upstream
    from userswap.swap.map import DESIGN_NAMES

    wanted = designs(options.designs, DESIGN_NAMES)
    path = writable("--json", options.json)

    def action() -> int:
        from dataclasses import asdict

        from userswap.lab import report

        with Bar(len(wanted) * len(upstream.BACKENDS)) as bar:
            rows = upstream.measure(wanted, bar.step)
        report.print_upstream(rows, report.console())
        write(path, lambda path: path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n"))
        return complain([f"Not as published: {sentence}." for sentence in upstream.wrong(rows)])

    return plainly(action)


def add_designs(parser: Parser) -> None:
    """Add the option that every subcommand has."""
    parser.add_argument("--designs", metavar="A,B", help="only these designs (default: all)")


def designs(text: str | None, there: Sequence[str]) -> list[str]:
    """Return the designs that `--designs` names of those that are there, all for None. Raises UsageError."""
    if text is None:
        return list(there)
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in there:
            raise UsageError(f"--designs: there is no design {name!r}, only {', '.join(there)}.")
    return list(dict.fromkeys(names))
