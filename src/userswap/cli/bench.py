"""`userswap bench`: measurements that anyone can repeat: `scan`, and `dedupe`, which has a file of its own."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from userswap.cli.bench_dedupe import prepare_dedupe
from userswap.cli.main import Parser
from userswap.errors import UsageError, UserswapError
from userswap.sizes import format_size, parse_size

__all__ = ["prepare"]


def prepare(arguments: list[str]) -> Callable[[], int]:
    """Return the measurement that `arguments` ask for. Raises UserswapError."""
    if arguments[:1] == ["dedupe"]:
        return prepare_dedupe(arguments[1:])
    parser = Parser(prog="userswap bench", description="Measure userswap on this machine.")
    parser.add_argument(
        "name",
        choices=["scan", "dedupe"],
        help="scan: get through 1 GiB of arrays in 512 MiB, in order, with the options below; dedupe: what storing "
        "identical folios once costs and saves (bench dedupe --help)",
    )
    parser.add_argument("--size", default="1G", help="array memory (default %(default)s)")
    parser.add_argument("--ram", default="512M", help="budget of RAM (default %(default)s)")
    parser.add_argument("--swap", default=None, help="as for userswap run")
    parser.add_argument("--rounds", type=int, default=5, help="medians are over this many (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(arguments)
    size, ram = parse_size(options.size, "--size"), parse_size(options.ram, "--ram")
    if options.rounds < 1:
        raise UsageError("--rounds must be 1 or more.")
    if size < 8 << 20:
        raise UsageError("--size must be 8M or more: a smaller scan says nothing.")

    def action() -> int:
        from userswap.bench import scan

        try:
            figures = scan.measure(size, ram, options.rounds, progress, options.swap)
        except UserswapError as error:
            print(f"\nuserswap: {error}", file=sys.stderr)
            return 2
        progress("")
        size_text, ram_text = format_size(figures.size), format_size(ram)
        print(f"{size_text} of float64 in {ram_text}, compressed {figures.ratio:.2f} : 1, one thread")
        print(f"{'':18}{'GB/s':>7}{'least':>8}{'most':>8}    of {options.rounds} rounds")
        for name, median, least, most in figures.rows():
            print(f"{name:<18}{median:7.2f}{least:8.2f}{most:8.2f}")
        stats = figures.stats
        assert stats is not None
        print(
            f"peak {stats.peak_bytes / (1 << 20):.1f} MiB of {stats.budget_bytes / (1 << 20):.0f}; "
            f"faults p50 {stats.fault_ns_p50 / 1e3:.0f} µs, p99 {stats.fault_ns_p99 / 1e3:.0f} µs; "
            f"{format_size(stats.slot_bytes)} in the swap file"
        )
        if options.json:
            Path(options.json).write_text(json.dumps(asdict(figures), indent=2) + "\n")
        return 0

    return action


def progress(text: str) -> None:
    """Say on a terminal's stderr what is going on; an empty text wipes it."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)
