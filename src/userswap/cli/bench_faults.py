"""`userswap bench faults`: how long a fault takes, by kind, and where the time goes."""

import json

from userswap.cli.bench_compare import place
from userswap.cli.experiment import Action, Bar, plainly, writable, write
from userswap.cli.main import Parser, version
from userswap.errors import UsageError
from userswap.sizes import format_size, parse_size

__all__ = ["prepare_faults"]

LEAST = 32 << 20


def prepare_faults(arguments: list[str]) -> Action:
    """Return `userswap bench faults`. Raises UserswapError."""
    from userswap.bench import faults
    from userswap.bench.data import KINDS
    from userswap.pool import choose_delivery

    parser = Parser(
        prog="userswap bench faults", description="How long a fault takes, by kind, and where the time goes."
    )
    parser.add_argument("--size", default="64M", help="array whose folios are touched (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=10, help="touch all of them this often (default %(default)s)")
    parser.add_argument("--data", default="2:1", help=f"one of {', '.join(KINDS)} (default %(default)s)")
    parser.add_argument("--delivery", default="auto", help="of faults: signal, thread or segv (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures there, too")
    options = parser.parse_args(arguments)
    size = parse_size(options.size, "--size")
    if size < LEAST:
        raise UsageError(f"--size must be {format_size(LEAST)} or more: less fits into the smallest budget.")
    if options.rounds < 1:
        raise UsageError("--rounds must be 1 or more.")
    if options.data not in KINDS:
        raise UsageError(f"--data: there is no {options.data!r}, only {', '.join(KINDS)}.")
    wanted = faults.Options(size, options.rounds, options.data, str(place(4 * size)), choose_delivery(options.delivery))
    path = writable("--json", options.json)

    def action() -> int:
        from userswap.bench import report
        from userswap.lab.report import console

        with Bar(faults.steps(wanted)) as bar:
            results = faults.measure(wanted, version(), bar.step)
        report.print_faults(results, console())
        write(path, lambda path: path.write_text(json.dumps(results.as_json(), indent=1) + "\n"))
        return 0

    return plainly(action)
