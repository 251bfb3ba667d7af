"""Results as people read them: tables of 100 columns, CSV, and a picture."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from userswap.lab import upstream
from userswap.lab.compare import THREADS, Results
from userswap.lab.memory import SCENARIOS
from userswap.lab.timing import OPERATIONS
from userswap.sizes import format_size
from userswap.swap.map import BOUND, DESIGN_NAMES

__all__ = ["SUFFIXES", "console", "print_results", "print_upstream", "write_csv", "write_plot"]

WIDTH = 100
SUFFIXES = (".png", ".svg")
Cell = tuple[float, str, str]
"""What decides who is best, the line that says it, and a second line."""
PLACES = ("idle", "idle, no file", "file", "zswap", "written back 0 %", "written back 50 %", "written back 100 %")
IDS = ("in order", "tenth", "churn", "swap cache", "ten times")
SHARING = tuple(name for name in SCENARIOS if name.startswith("shared"))
ALONE = ("swap-out", "run", "fault", "take", "put", "writeback", "swapoff", "swapoff tenth")
DRAWN = (*PLACES[2:4], "written back 100 %", "tenth", "churn", "swap cache", "shared 100 % by 2", "shared 100 % by 300")


def console() -> Console:
    """Where results go: at least as wide as the tables."""
    found = Console(highlight=False)
    return found if found.width >= WIDTH and found.is_terminal else Console(highlight=False, width=WIDTH)


def table(title: str, headings: Sequence[str], rows: Iterable[tuple[str, bool, list[Cell]]]) -> Table:
    """Return a table with a row for each (design, whether it was given a device, cells), the best in bold."""
    rows = list(rows)
    result = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    lines = [[heading, *(line for _, _, cells in rows for line in cells[i][1:])] for i, heading in enumerate(headings)]
    widths = [max(len(part) for line in column for part in line.split("\n")) for column in lines]
    names = max(len(design) for design, _, _ in rows) + len(" *+")
    result.padding = (0, 0, 0, int(names + sum(widths) + 2 * len(widths) < WIDTH))
    result.add_column("design", no_wrap=True)
    for heading in headings:
        result.add_column(heading, justify="right", no_wrap=True)
    best = [min((cells[i] for _, _, cells in rows), key=lambda cell: cell[0])[1] for i in range(len(headings))]
    for design, given, cells in rows:
        mark = ("*" if design == DESIGN_NAMES[0] else "") + ("+" if given else "")
        texts = []
        for cell, least in zip(cells, best, strict=True):
            text = Text(cell[1], style="bold" if cell[1] == least else "")
            texts.append(text.append(f"\n{cell[2]}", style="not bold dim") if cell[2] else text)
        result.add_row(Text(f"{design} {mark}", style="bold" if "*" in mark else ""), *texts)
    return result


def print_results(results: Results, to: Console) -> None:
    """Print all tables, and what was found."""
    options = results.options
    to.print(
        f"{options.pages:,} pages of 4 KiB, {options.rounds} rounds, {options.order} order, seed {options.seed}\n"
        f"{results.machine.processor}, {results.machine.processors} processors, Linux {results.machine.kernel}."
    )
    to.print("* the default; + needs a swap file, so it has one as large as the pages where the scenario has none.\n")
    if results.limits:
        to.print("Words of 32 bits: page tables, entries, counts, references between nodes, folios.\n")
        to.print(limits_table(results.limits))
    names = [name for name in IDS if name in {scenario.name for scenario in options.scenarios}]
    to.print(memory_table(results, "Metadata, bytes for each swapped page (below: half of them freed)", PLACES))
    everything = results.pool is not None
    title = "The same, zswap only" + ("; at last all that is not data" if everything else "")
    to.print(memory_table(results, title, names, everything=everything))
    to.print(memory_table(results, "The same, zswap only, with so many of the pages shared by so many", SHARING))
    for threads in THREADS:
        title = f"Nanoseconds, {threads} thread{'s' if threads > 1 else ''}: median (below: least to most)"
        measured = [operation for operation in OPERATIONS if results.times(operation, threads)]
        alone, rest = ([name for name in measured if (name in ALONE) == here] for here in (True, False))
        to.print(time_table(results, f"{title}, exclusive pages", alone, threads))
        to.print(time_table(results, f"{title}, shared pages", rest, threads))
    for finding in results.findings():
        to.print(f"- {finding}")
    to.print(f"\nMeasured in {results.seconds:.0f} seconds.")


def limits_table(limits: list[dict[str, Any]]) -> Table:
    """Return what fits into words of 32 bits, and below each design what does not."""
    result = Table(title="What fits", title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("design", "payload\nbits", "file of\n4K pages", "of 64K\nfolios", "zswap\nobjects", "ids",
                    "count in\nthe entry", "repeated\nvalues"):  # fmt: skip
        result.add_column(heading, justify="left" if heading == "design" else "right", no_wrap=True)
    for row in limits:
        ids = f"{power(row['ids'])}" if "ids" in row else f"{power(row['shared_ids'])} shared"
        result.add_row(
            f"{row['design']} *" if row["design"] == DESIGN_NAMES[0] else row["design"],
            str(row["payload_bits"] or "-"),
            format_size(row["file_bytes_4k"]),
            format_size(row["file_bytes_64k"]),
            power(row["zswap_objects"]),
            ids,
            power(row["count_in_entry"]) if row["count_in_entry"] else "none",
            f"{row['same_filled']:,}",
        )
    without: dict[str, list[str]] = {}
    for row in limits:
        without.setdefault(", ".join(row["does_not_fit"]), []).append(row["design"])
    lines = [f"{', '.join(designs)}: {values or 'all of them fit'}" for values, designs in without.items()]
    samples = "Of values that repeat, do not fit: "
    result.caption = samples + "; ".join(lines) + "."
    result.caption_justify = "left"
    return result


def power(number: int) -> str:
    """Write a number near a power of two as one, others in full."""
    bits = (number + 1).bit_length() - 1
    if bits < 10:
        return str(number)
    return {1 << bits: f"2^{bits}", (1 << bits) - 1: f"2^{bits} - 1"}.get(number, f"{number:,}")


def memory_table(results: Results, title: str, names: Sequence[str], *, everything: bool = False) -> Table:
    rows = []
    for design in results.options.designs:
        cells: list[Cell] = []
        given = False
        for name in names:
            row = results.of(name)[design]
            given |= row.given_device
            cells.append((row.peak, f"{row.peak:.2f}", f"{row.left:.2f}" if row.pages else ""))
        if everything:
            peak, left = results.everything(design)
            cells.append((peak, f"{peak:.2f}", f"{left:.2f}"))
        rows.append((design, given, cells))
    return table(title, [SCENARIOS[name].heading for name in names] + ["every-\nthing"] * everything, rows)


def time_table(results: Results, title: str, names: Sequence[str], threads: int) -> Table:
    rows = []
    for design in results.options.designs:
        cells: list[Cell] = []
        for name in names:
            row = results.times(name, threads)[design]
            spread = f"{digits(row.least)}-{digits(row.most)}"
            cells.append((row.median, digits(row.median), spread))
        rows.append((design, False, cells))
    return table(title, [name.replace(" ", "\n", 1) for name in names], rows)


def digits(ns: float) -> str:
    """Write ns with as many digits as can mean something."""
    return f"{ns:.0f}" if ns >= 100 else f"{ns:.1f}"


def print_upstream(rows: list[upstream.Row], to: Console) -> None:
    """Print the table of `userswap lab upstream`, for each backend the published figures first."""
    title = f"MiB of metadata for 32 GiB of swap file ({upstream.SLOTS:,} slots), by its use"
    result = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for heading in ("design", "pages in", *(f"{use} %" for use in upstream.USE)):
        result.add_column(heading, justify="right" if heading.endswith("%") else "left", no_wrap=True)
    for backend in upstream.BACKENDS:
        for (design, of), published in upstream.PUBLISHED.items():
            if of == backend:
                cells = [f"{figure:.2f}" for figure in published]
                result.add_row(f"published: {design}", backend, *cells, style="italic")
        here = [row for row in rows if row.backend == backend]
        least = {use: min(row.metadata_mib for row in here if row.use_percent == use) for use in upstream.USE}
        for design in dict.fromkeys(row.design for row in here):
            mark = ("*" if design == DESIGN_NAMES[0] else "") + ("+" if design in BOUND else "")
            figures = [
                Text(f"{row.metadata_mib:.2f}", style="bold" if row.metadata_mib == least[row.use_percent] else "")
                for row in here
                if row.design == design
            ]
            result.add_row(Text(f"{design} {mark}", style="bold" if "*" in mark else ""), backend, *figures)
        result.add_section()
    to.print(result)
    to.print("* the default; + needs a swap file for pages in zswap, too.")
    to.print(f"Published: {upstream.SOURCE};\nthe zswap entries themselves are in no figure.")
    seen = [(row.backend, abs(off[1])) for row in rows if (off := upstream.off(row)) is not None and off[0]]
    for backend in upstream.BACKENDS:
        differences = [difference for of, difference in seen if of == backend]
        if differences:
            to.print(f"{backend}: what is published for these designs is measured within {max(differences):.2%}.")


def write_csv(results: Results, path: Path) -> None:
    """Write one line for each figure."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            ["kind", "name", "design", "threads", "unit", "value", "least", "most", "after_half", "given_device"]
        )
        for row in results.memory:
            unit = "bytes/page" if row.pages else "KiB"
            after = row.left if row.pages else ""
            writer.writerow(["memory", row.scenario, row.design, "", unit, row.peak, "", "", after, row.given_device])
        for design in results.options.designs if results.pool is not None else ():
            peak, left = results.everything(design)
            writer.writerow(["memory", "everything", design, "", "bytes/page", peak, "", "", left, design in BOUND])
        for limit in results.limits:
            figures = [(name, value) for name, value in limit.items() if isinstance(value, int)]
            for name, value in figures:
                writer.writerow(["limit", name, limit["design"], "", "", value, "", "", "", False])
        for time in results.time:
            writer.writerow(
                ["time", time.operation, time.design, time.threads, "ns", time.median, time.least, time.most, "", False]
            )


def write_plot(results: Results, path: Path) -> None:
    """Draw memory in some scenarios, and the times of all operations with their spread; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 15), layout="constrained")
    panels = figure.subplots(1 + len(THREADS), 1)
    designs = results.options.designs
    width = 0.8 / len(designs)
    for i, design in enumerate(designs):
        label = f"{design} (default)" if design == DESIGN_NAMES[0] else design
        at = [x - 0.4 + (i + 0.5) * width for x in range(len(DRAWN))]
        panels[0].bar(at, [results.of(name)[design].peak for name in DRAWN], width, label=label, color=f"C{i}")
        for panel, threads in zip(panels[1:], THREADS, strict=True):
            rows = [row for row in results.time if (row.design, row.threads) == (design, threads)]
            at = [x - 0.4 + (i + 0.5) * width for x in range(len(rows))]
            spread = [[row.median - row.least for row in rows], [row.most - row.median for row in rows]]
            panel.bar(at, [row.median for row in rows], width, yerr=spread, color=f"C{i}", error_kw={"lw": 0.6})
    panels[0].set_ylabel("bytes for each swapped page (log)")
    panels[0].set_title(f"Metadata, {results.options.pages:,} pages, words of {results.options.words} bits")
    panels[0].set_xticks(range(len(DRAWN)), DRAWN)
    panels[0].legend(ncols=3, fontsize="small")
    for panel, threads in zip(panels[1:], THREADS, strict=True):
        panel.set_ylabel("ns (log)")
        panel.set_title(
            f"Time, {threads} thread{'s' if threads > 1 else ''}, median of {results.options.rounds} rounds"
        )
        names = [name for name in OPERATIONS if results.times(name, threads)]
        panel.set_xticks(range(len(names)), names, rotation=20, ha="right")
    for panel in panels:
        panel.set_yscale("log")
    figure.savefig(path)
