"""`userswap bench overhead`: what a program pays that fits into its budget."""

import importlib.util
import json

from userswap.cli.bench_compare import chosen
from userswap.cli.experiment import Action, Bar, plainly, writable, write
from userswap.cli.main import Parser, version
from userswap.errors import UsageError
from userswap.sizes import format_size, parse_size

__all__ = ["prepare_overhead"]

LEAST = 64 << 20


def prepare_overhead(arguments: list[str]) -> Action:
    """Return `userswap bench overhead`. Raises UserswapError."""
    from userswap.bench import overhead
    from userswap.bench.overhead_programs import PROGRAMS
    from userswap.lab import machine

    parser = Parser(
        prog="userswap bench overhead",
        description="What a program pays that fits into its budget: time and memory under `userswap run` by those "
        "without, and the time of a start.",
    )
    parser.add_argument("--program", metavar="A,B", help=f"only these of: {', '.join(PROGRAMS)}")
    parser.add_argument("--size", default="1G", help="of a program's arrays, about (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="for the medians (default %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write everything there, each run included")
    options = parser.parse_args(arguments)
    size = parse_size(options.size, "--size")
    if size < LEAST:
        raise UsageError(f"--size must be {format_size(LEAST)} or more: less says nothing.")
    if size * 2 > machine.available():
        raise UsageError(
            f"--size {format_size(size)} may take twice that, but only {format_size(machine.available())} of memory "
            "are available here: say less."
        )
    if options.rounds < 1:
        raise UsageError("--rounds must be 1 or more.")
    names = chosen("--program", options.program, PROGRAMS)
    if importlib.util.find_spec("pandas") is None and "groupby" in names:
        if options.program is not None:
            raise UsageError("--program groupby needs pandas, which is not installed: pip install pandas.")
        names.remove("groupby")
    wanted = overhead.Options(names, size, options.rounds)
    path = writable("--json", options.json)

    def action() -> int:
        from userswap.bench import report
        from userswap.lab.report import console

        with Bar(overhead.steps(wanted)) as bar:
            results = overhead.measure(wanted, version(), bar.step)
        report.print_overhead(results, console())
        write(path, lambda path: path.write_text(json.dumps(results.as_json(), indent=1) + "\n"))
        return 0

    return plainly(action)
