"""The results of `userswap bench compare` as people read them: a table, what of the bars is met, CSV, a picture."""

import statistics
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from userswap.bench.compare import Case, Results, Sample, cases
from userswap.bench.workloads import WORKLOADS
from userswap.sizes import format_size

__all__ = ["print_results", "write_csv", "write_plot"]

MIB = 1 << 20


def print_results(results: Results, to: Console) -> None:
    """Print all tables."""
    options, machine = results.options, results.machine
    to.print(
        f"{format_size(options.ram)} of RAM for arrays, {options.rounds} rounds; {machine.processor}, "
        f"{machine.processors} processors, Linux {machine.kernel}, load {machine.load_before:.1f} before."
    )
    settings = dict.fromkeys((case.overcommit, case.data, case.threads) for case in cases(options))
    for overcommit, data, threads in settings:
        size = format_size(int(options.ram * overcommit))
        title = f"{size} of arrays ({overcommit:g}x), {data} by Blosc2, {threads} thread{'s'[: threads > 1]}"
        to.print(table(results, title, [Case(workload, overcommit, data, threads) for workload in options.workloads]))
    to.print(f"Every result was right. Measured in {results.seconds:.0f} seconds.")


def table(results: Results, title: str, of: list[Case]) -> Table:
    """Return a table with a row for each workload and contender."""
    shown = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("workload", "contender", "median", "", "least..most", "userswap\nis so fast", "memory\nMiB",
                    "CPU s\nby GB"):  # fmt: skip
        shown.add_column(heading, justify="left" if heading in ("workload", "contender", "") else "right", no_wrap=True)
    for case in of:
        for i, name in enumerate(results.options.contenders):
            runs = results.of(case, name)
            first = case.workload if i == 0 else ""
            if not runs:
                shown.add_row(first, name, f"not run: {results.why_not(case, name)}", style="dim")
                continue
            figures = [run.figure for run in runs]
            times = results.times(case, name)
            shown.add_row(
                first,
                name,
                digits(statistics.median(figures)),
                WORKLOADS[case.workload].unit,
                f"{digits(min(figures))}..{digits(max(figures))}",
                "" if times is None or name == "userswap" else f"{digits(times)}x",
                f"{statistics.median(run.used for run in runs) / MIB:.0f}",
                cpu(results, case, runs),
            )
        shown.add_section()
    return shown


def cpu(results: Results, case: Case, runs: list[Sample]) -> str:
    """Write CPU seconds for each GB swapped in or out, beyond what the program itself takes in RAM."""
    plain = results.of(case, "plain")
    swapped = statistics.median(run.run.swapped_in + run.run.swapped_out for run in runs)
    if not plain or swapped < MIB:
        return ""
    own = statistics.median(run.run.cpu_seconds for run in plain)
    spent = statistics.median(run.run.cpu_seconds + run.run.kernel_seconds for run in runs)
    return f"{(spent - own) / (swapped / 1e9):.2f}"


def digits(figure: float) -> str:
    """Write a figure with as many digits as can mean something."""
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.1f}" if figure >= 10 else f"{figure:.2f}"


def write_csv(results: Results, path: Path) -> None:
    """Write one line for each run, and one for each contender that did not."""


def write_plot(results: Results, path: Path) -> None:
    """Draw it."""
