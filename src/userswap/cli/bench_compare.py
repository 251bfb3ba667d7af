"""`userswap bench compare`: what can be wrong is looked at before anything is measured."""

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TypeVar

from userswap.cli.experiment import Action, Bar, complain, plainly, writable, writable_plot, write
from userswap.cli.main import Parser, version
from userswap.errors import BadSize, SwapPathError, UsageError
from userswap.sizes import format_size, parse_size

__all__ = ["prepare_compare"]

T = TypeVar("T")
RAM, QUICK_RAM = "256M", "64M"
SECONDS, QUICK_SECONDS = 1.0, 0.2
ROUNDS, QUICK_ROUNDS = 3, 1
LEAST_RAM = 32 << 20


def prepare_compare(arguments: list[str]) -> Action:
    """Return `userswap bench compare`. Raises UserswapError."""
    from userswap.bench.contenders import CONTENDERS
    from userswap.bench.data import KINDS
    from userswap.bench.workloads import WORKLOADS

    parser = Parser(
        prog="userswap bench compare",
        description="The same programs in the same memory: under userswap, the kernel's swap, and others. "
        "Takes about a quarter of an hour.",
    )
    parser.add_argument("--quick", action="store_true", help="two minutes' worth: less memory and work, one round")
    parser.add_argument("--workload", metavar="A,B", help=f"only these of: {', '.join(WORKLOADS)}")
    parser.add_argument("--contender", metavar="A,B", help=f"only these of: {', '.join(CONTENDERS)}")
    parser.add_argument("--overcommit", metavar="X,Y", default="2", help="array memory by RAM (default %(default)s)")
    parser.add_argument("--data", metavar="A,B", default="2:1", help=f"of {', '.join(KINDS)} (default %(default)s)")
    parser.add_argument("--threads", metavar="N,M", default="1", help="of the program (default %(default)s)")
    parser.add_argument(
        "--rounds", type=int,
        help=f"for the medians (default {ROUNDS}, but one for who is slow; quick: {QUICK_ROUNDS})",
    )  # fmt: skip
    parser.add_argument("--ram", metavar="SIZE", help=f"for the arrays (default {RAM}; quick: {QUICK_RAM})")
    parser.add_argument("--json", metavar="FILE", help="write everything there, each sample included")
    parser.add_argument("--csv", metavar="FILE", help="write a line for each run")
    parser.add_argument("--plot", metavar="FILE", help="draw it: FILE.png or FILE.svg")
    options = parser.parse_args(arguments)

    from userswap.bench import compare
    from userswap.lab import machine

    ram = parse_size(options.ram or (QUICK_RAM if options.quick else RAM), "--ram")
    if ram < LEAST_RAM:
        raise UsageError(f"--ram must be {format_size(LEAST_RAM)} or more: less says nothing.")
    rounds = options.rounds if options.rounds is not None else (QUICK_ROUNDS if options.quick else ROUNDS)
    if rounds < 1:
        raise UsageError("--rounds must be 1 or more.")
    overcommit = numbers("--overcommit", options.overcommit, float, "2 or 1.2,2,4")
    if not all(0.1 <= value <= 64 for value in overcommit):
        raise UsageError("--overcommit must be from 0.1 to 64.")
    threads = numbers("--threads", options.threads, int, "1 or 1,2")
    if not all(1 <= value <= 64 for value in threads):
        raise UsageError("--threads must be from 1 to 64.")
    needs = int(ram * max(overcommit))
    if needs * 5 // 4 > machine.available():
        raise UsageError(
            f"--ram {format_size(ram)} with --overcommit {max(overcommit):g} makes {format_size(needs)} of arrays, "
            f"which must also fit into the {format_size(machine.available())} of memory that are available here."
        )
    wanted = compare.Options(
        workloads=chosen("--workload", options.workload, WORKLOADS),
        contenders=chosen("--contender", options.contender, CONTENDERS),
        overcommit=overcommit,
        data=chosen("--data", options.data, KINDS),
        threads=threads,
        rounds=rounds,
        ram=ram,
        directory=place(4 * needs),
        seconds=QUICK_SECONDS if options.quick else SECONDS,
        every=options.rounds is not None,
    )
    files = {name: writable(f"--{name}", getattr(options, name)) for name in ("json", "csv")}
    plot = writable_plot(options.plot)

    def action() -> int:
        from userswap.bench import report
        from userswap.lab.report import console

        with Bar(compare.steps(wanted)) as bar:
            results = compare.measure(wanted, version(), bar.step)
        report.print_results(results, console())
        write(files["json"], lambda path: path.write_text(json.dumps(results.as_json(), indent=1) + "\n"))
        write(files["csv"], lambda path: report.write_csv(results, path))
        write(plot, lambda path: report.write_plot(results, path))
        failed = [f"userswap did not get through {case}: {why}." for case, why in results.failed()]
        return 130 if results.stopped else complain(failed)

    return plainly(action)


def chosen(option: str, text: str | None, there: Collection[str]) -> list[str]:
    """Return the names that an option gives of those that are there, all for None. Raises UsageError."""
    if text is None:
        return list(there)
    names = list(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in names:
        if name not in there:
            raise UsageError(f"{option}: there is no {name!r}, only {', '.join(there)}.")
    return names


def numbers(option: str, text: str, kind: Callable[[str], T], example: str) -> list[T]:
    """Return the numbers that an option gives. Raises UsageError."""
    try:
        return list(dict.fromkeys(kind(word) for word in text.split(",")))
    except ValueError:
        raise UsageError(f"{option} {text}: write for example {example}.") from None


def place(size: int) -> Path:
    """Return a directory on a disk for swap files and mapped files of `size` bytes together. Raises UsageError."""
    from userswap.swapfiles import default_places, open_swap

    refusals = []
    for path in default_places():
        try:
            opened = open_swap(f"{path}:{size}")
        except (SwapPathError, BadSize) as error:
            refusals.append(str(error).partition(": ")[0])
            continue
        assert opened is not None, "a place was named"
        found = os.fstatvfs(opened.fd)
        os.close(opened.fd)
        if found.f_bavail * found.f_frsize >= size:
            return path
        refusals.append(f"{path} has less than {format_size(size)} free")
    raise UsageError(f"There is no place for swap files ({'; '.join(refusals)}): set TMPDIR to a directory on a disk.")
