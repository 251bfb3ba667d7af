"""The results of `userswap bench compare` as people read them: a table, what of the bars is met, CSV, a picture."""

import csv
import statistics
from dataclasses import fields
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from userswap.bench import bars, faults, overhead
from userswap.bench.compare import Case, Results, Sample, cases
from userswap.bench.contenders import CONTENDERS
from userswap.bench.runs import WITHIN
from userswap.bench.workloads import WORKLOADS
from userswap.sizes import format_size

__all__ = ["print_faults", "print_overhead", "print_results", "write_csv", "write_plot"]

MIB = 1 << 20


def print_results(results: Results, to: Console) -> None:
    """Print all tables."""
    options, machine = results.options, results.machine
    to.print(
        f"{format_size(options.ram)} of RAM for arrays, {options.rounds} rounds; {machine.processor}, "
        f"{machine.processors} processors, Linux {machine.kernel}, load {machine.load_before:.1f} before."
    )
    for title, here in settings(results).items():
        to.print(table(results, title, here))
    for line in notes(results):
        to.print(line)
    verdicts = bars.verdicts(results)
    if verdicts:
        to.print(bars_table(verdicts))
    if results.stopped:
        to.print("[bold]Stopped by a signal:[/bold] what is above is what there was by then.")
    to.print(f"Every result was right. Measured in {results.seconds:.0f} seconds.")


def settings(results: Results) -> dict[str, list[Case]]:
    """Return what was measured under the same circumstances, by what these are."""
    found: dict[str, list[Case]] = {}
    for case in cases(results.options):
        size = format_size(int(results.options.ram * case.overcommit))
        threads = f"{case.threads} thread{'s'[: case.threads > 1]}"
        found.setdefault(f"{size} of arrays ({case.overcommit:g}x), {case.data} by Blosc2, {threads}", []).append(case)
    return found


def notes(results: Results) -> list[str]:
    """Say what the table has no room for."""
    said = ["memory: most at once, in place, compressed and page cache together, without what the process had before."]
    ram = results.options.ram
    for what, where in (
        ("Had more, since they could not be held to it", [s for s in held(results) if s.used > ram * (1 + WITHIN)]),
        ("Had less than they might", [s for s in held(results) if s.pool and s.used < ram * (1 - 2 * WITHIN)]),
    ):
        rows = dict.fromkeys(f"{s.contender} in {s.workload} ({s.used / ram:.2f} of it)" for s in where)
        if rows:
            said.append(f"{what}: {', '.join(rows)}.")
    if any(CONTENDERS[s.contender].kernel == "zswap" and s.capped for s in results.samples):
        said.append(
            "zswap: the kernel's own limit of its pool, in whole per cents of RAM, is too coarse for this size; it was "
            "held to less by turning it off and on again (see docs/benchmarks.md)."
        )
    if any(s.run.units != t.run.units for s in results.samples for t in results.samples if same(s, t)):
        said.append("Who is slow has done less of the same; two are compared at the amount that both have done.")
    said += not_run(results)
    killed = [f"{s.contender} {s.killed} in {s.workload}" for s in results.samples if s.killed]
    if killed:
        said.append(f"Killed by the kernel for want of memory, and run again: {', '.join(killed)}.")
    lifted = [f"{s.contender} {s.lifted} times in {s.workload}" for s in results.samples if s.lifted]
    if lifted:
        said.append(f"Found no memory although there was swap, and had their limit lifted: {', '.join(lifted)}.")
    return said


def held(results: Results) -> list[Sample]:
    """Return the runs of those who were to have T."""
    return [s for s in results.samples if CONTENDERS[s.contender].held and s.overcommit > 1]


def same(one: Sample, other: Sample) -> bool:
    """Whether two runs are of the same case."""
    return all(getattr(one, f.name) == getattr(other, f.name) for f in fields(Case))


def not_run(results: Results) -> list[str]:
    """Say which contenders were not run where, and why."""
    where: dict[tuple[str, str], list[str]] = {}
    for row in results.not_run:
        where.setdefault((row.why, row.contender), []).append(row.workload)
    who: dict[tuple[str, str], list[str]] = {}
    for (why, contender), workloads in where.items():
        names = list(dict.fromkeys(workloads))
        of = "all" if len(names) == len(results.options.workloads) else ", ".join(names)
        who.setdefault((why, of), []).append(contender)
    return [f"Not run: {', '.join(contenders)} ({of}): {why}." for (why, of), contenders in who.items()]


def bars_table(verdicts: list[bars.Verdict]) -> Table:
    """Return the table of what was aimed at."""
    shown = Table(title="The bars", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("", "bar", "measured", ""):
        shown.add_column(heading, justify="left" if heading in ("", "bar") else "right")
    for verdict in verdicts:
        judged = {True: "met", False: "[bold]missed[/bold]", None: "can't be told"}[verdict.met]
        shown.add_row(verdict.what, verdict.bar, verdict.measured, judged)
    return shown


def table(results: Results, title: str, of: list[Case]) -> Table:
    """Return a table with a row for each workload and contender."""
    shown = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("workload", "contender", "median", "", "least..most", "userswap\nis so fast", "memory\nMiB",
                    "CPU s\nby GB"):  # fmt: skip
        shown.add_column(heading, justify="left" if heading in ("workload", "contender", "") else "right", no_wrap=True)
    # A signal may have come before the last ones.
    for case in (case for case in of if results.of(case, "plain") or not results.stopped):
        for i, name in enumerate(results.options.contenders):
            runs = results.of(case, name)
            first = case.workload if i == 0 else ""
            if not runs:
                shown.add_row(first, name, "not run" if results.why_not(case, name) else "", style="dim")
                continue
            figures = [run.figure for run in runs]
            times = results.times(case, name)
            shown.add_row(
                first,
                name,
                digits(statistics.median(figures)),
                WORKLOADS[case.workload].unit,
                f"{digits(min(figures))}..{digits(max(figures))}" if len(figures) > 1 else "1 run",
                "" if times is None or name == "userswap" else f"{digits(times)}x",
                f"{statistics.median(run.used for run in runs) / MIB:.0f}",
                cpu(results, case, name),
            )
        shown.add_section()
    return shown


def cpu(results: Results, case: Case, name: str) -> str:
    """Write CPU seconds for each GB swapped in or out, beyond what the program itself takes in RAM."""
    spent = results.cpu_by_gb(case, name)
    return "" if spent is None else f"{spent:.2f}"


def digits(figure: float) -> str:
    """Write a figure with as many digits as can mean something."""
    return f"{figure:.0f}" if figure >= 100 else f"{figure:.1f}" if figure >= 10 else f"{figure:.2f}"


def print_faults(results: faults.Results, to: Console) -> None:
    """Print what `userswap bench faults` found."""
    machine, options = results.machine, results.options
    to.print(
        f"{options.rounds} rounds over {format_size(options.size)}, {options.data} by Blosc2, delivered by "
        f"{options.delivery}; {machine.processor}, "
        f"{machine.processors} processors, Linux {machine.kernel}, load {machine.load_before:.1f} before."
    )
    shown = Table(
        title="µs for a touch that faults", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False
    )
    for heading in ("kind", "p50", "p99", "p99.9", "in the\nhandler", "around\nit", "faults", "what happens"):
        shown.add_column(heading, justify="left" if heading in ("kind", "what happens") else "right")
    for kind in results.kinds.values():
        if not kind.took:
            shown.add_row(kind.name, *[""] * 5, "none", kind.text)
            continue
        figures = [*(kind.percentile(share) for share in (50, 99, 99.9)), kind.inside, kind.around]
        shown.add_row(kind.name, *map(digits, figures), f"{len(kind.took):,}", kind.text)
    to.print(shown)
    shown = Table(title="Where it goes", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("step", "µs", "found by"):
        shown.add_column(heading, justify="right" if heading == "µs" else "left")
    for step, us, how in results.breakdown():
        shown.add_row(step, digits(us), how)
    to.print(shown)


def print_overhead(results: overhead.Results, to: Console) -> None:
    """Print what `userswap bench overhead` found."""
    machine, options = results.machine, results.options
    to.print(
        f"{options.rounds} rounds, {format_size(options.size)} of arrays; {machine.processor}, {machine.processors} "
        f"processors, Linux {machine.kernel}, huge pages {machine.huge_pages}, load {machine.load_before:.1f} before."
    )
    shown = Table(
        title="Under userswap run, by without", title_justify="left", title_style="bold", box=SIMPLE_HEAD,
        pad_edge=False,
    )  # fmt: skip
    for heading in ("program", "seconds", "time", "CPU", "CPU by round", "memory", "more", "memory by"):
        shown.add_column(heading, justify="left" if heading == "program" else "right", no_wrap=True)
    for name, pairs in results.pairs.items():
        cpu = results.ratios(name, lambda run: run.cpu_seconds)
        shown.add_row(
            name,
            f"{min(plain.seconds for plain, _ in pairs):.2f}",
            f"{results.least(name, lambda run: run.seconds):+.1%}",
            f"{results.least(name, lambda run: run.cpu_seconds):+.1%}",
            f"{min(cpu):+.0%} {statistics.median(cpu):+.0%} {max(cpu):+.0%}",
            format_size(int(statistics.median(plain.memory for plain, _ in pairs))),
            f"{results.more_memory(name) / MIB:+.1f} MiB",
            f"{statistics.median(results.ratios(name, lambda run: run.memory)):+.2%}",
        )
    to.print(shown)
    plain, ours = (statistics.median(times) * 1e3 for times in zip(*results.starts, strict=True))
    to.print(
        f"Start: python with NumPy {plain:.0f} ms, userswap run -c pass {ours:.0f} ms ({results.start() * 1e3:+.0f})."
    )
    to.print(
        f"Memory before a program's work begins: {results.at_first(lambda run: run.anonymous) / MIB:+.1f} MiB of the "
        f"process's own, {results.at_first(lambda run: run.file) / MIB:+.1f} MiB of files, which processes share."
    )
    missed, start = results.missed(), overhead.START_BAR * 1e3
    to.print(
        f"Bars: {overhead.TIME_BAR:.0%} of CPU time, {overhead.MEMORY_BAR:.1%} of memory, {start:.0f} ms of start. "
        f"{'Missed: ' + '; '.join(missed) + '.' if missed else 'All are met.'}"
    )


def write_csv(results: Results, path: Path) -> None:
    """Write one line for each run, and one for each contender that did not run."""
    columns = ("workload", "overcommit", "data", "threads", "contender", "round", "figure", "unit", "seconds",
               "cpu_seconds", "kernel_seconds", "swapped_in", "swapped_out", "used_bytes", "pool_bytes", "limit_bytes",
               "units", "corrections", "killed", "lifted", "not_run")  # fmt: skip
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for s in results.samples:
            run, unit = s.run, WORKLOADS[s.workload].unit
            writer.writerow([
                s.workload, s.overcommit, s.data, s.threads, s.contender, s.round, s.figure, unit, run.seconds,
                run.cpu_seconds, run.kernel_seconds, run.swapped_in, run.swapped_out, s.used, s.pool, s.limit,
                run.units, s.corrections, s.killed, s.lifted, "",
            ])  # fmt: skip
        for n in results.not_run:
            row = [n.workload, n.overcommit, n.data, n.threads, n.contender]
            writer.writerow([*row, *[""] * (len(columns) - len(row) - 1), n.why])


def write_plot(results: Results, path: Path) -> None:
    """Draw how long each contender takes, userswap being 1, a panel for each setting; needs matplotlib."""
    from matplotlib.figure import Figure

    of = settings(results)
    names = results.options.contenders
    figure = Figure(figsize=(14, 1 + 4 * len(of)), layout="constrained")
    panels = figure.subplots(len(of), 1, squeeze=False)[:, 0]
    width = 0.8 / len(names)
    for panel, (title, here) in zip(panels, of.items(), strict=True):
        for i, name in enumerate(names):
            at, tops, spread = [], [], []
            for x, case in enumerate(here):
                taken = results.compared((case, name), (case, "userswap"))
                if taken:
                    at.append(x - 0.4 + (i + 0.5) * width)
                    tops.append(statistics.median(taken))
                    spread.append((tops[-1] - min(taken), max(taken) - tops[-1]))
            if at:
                bars = list(zip(*spread, strict=True))
                panel.bar(at, tops, width, yerr=bars, label=name, color=f"C{i}", error_kw={"lw": 0.6})
        panel.axhline(1, color="black", lw=0.6)
        panel.set_yscale("log")
        panel.set_ylabel("time, userswap = 1 (log)")
        panel.set_title(title)
        panel.set_xticks(range(len(here)), [case.workload for case in here])
    panels[0].legend(ncols=5, fontsize="small")
    figure.savefig(path)
