"""Results of suites, kept as JSON, and the tables made of them: for the terminal, and docs/compatibility.md."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from compat.compare import Verdict
from compat.suites import KNOWN, SUITES

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Result", "load", "save", "table", "write_document"]

COLUMNS = ("suite", "version", "tests", "passed plain", "passed swapped", "worse", "known", "flaky", "fail in both",
           "folios out", "folios in", "time")  # fmt: skip
INTRODUCTION = """\
# Compatibility

Other people's test suites, run plain and under swapped memory; only the difference counts. `make compat` runs them
(`make compat SUITES="numpy:fft h5py"` some of them) and writes this page.

Swapped means `userswap run --ram {ram} --min-array 4K`: every array of NumPy's of a page or more is swapped memory. As
tests use small arrays, which even that budget would hold, a thread pushes 1 MiB out up to two hundred times a second,
and now and then all that is compressed on to the swap file. A crash or a hang is the outcome of the test that
was under way, and the rest is run by a new process. What differs is run twice more in both ways: *worse* is what came
out worse than it ever did plain, be it once; *flaky* is what is as bad plain now and then. *Time* is that of the
swapped run against the plain one; it says what being swapped out all the time costs, nothing about ordinary use.
"""


@dataclass(frozen=True)
class Result:
    """A suite's result."""

    suite: str
    version: str
    python: str
    tests: int
    plain: dict[str, int]
    """Outcomes, counted."""
    swapped: dict[str, int]
    plain_seconds: float
    swapped_seconds: float
    swap_outs: int
    swap_ins: int
    verdicts: tuple[Verdict, ...]
    stale: tuple[str, ...]
    both: tuple[str, ...]
    """Tests that fail plain, and the same swapped."""
    broken: tuple[str, ...]
    """Slices of which not all could be run, plain."""

    @property
    def good(self) -> bool:
        """Whether nothing counts against userswap, all was run, and what is listed as known is so."""
        return not self.stale and not self.broken and not any(verdict.fails for verdict in self.verdicts)

    def count(self, *kinds: str) -> int:
        """Return how many verdicts are of these kinds."""
        return sum(verdict.kind in kinds for verdict in self.verdicts)


def save(result: Result, directory: Path) -> None:
    """Keep a result."""
    (directory / f"{result.suite}.json").write_text(json.dumps(asdict(result), indent=1))


def load(directory: Path) -> dict[str, Result]:
    """Return what was kept, in the order of the suites."""
    results = {}
    for suite in SUITES:
        path = directory / f"{suite.name}.json"
        if path.exists():
            kept = json.loads(path.read_text())
            tuples = {name: tuple(kept[name]) for name in ("stale", "both", "broken")}
            verdicts = tuple(
                Verdict(**one | {"plain": tuple(one["plain"]), "swapped": tuple(one["swapped"])})
                for one in kept["verdicts"]
            )
            results[suite.name] = Result(**kept | tuples | {"verdicts": verdicts})
    return results


def row(result: Result) -> tuple[str, ...]:
    """Return a line of the table."""
    return (
        result.suite,
        result.version,
        f"{result.tests:,}",
        f"{result.plain.get('passed', 0):,}",
        f"{result.swapped.get('passed', 0):,}",
        f"{result.count('new', 'sometimes')}",
        f"{result.count('known')}",
        f"{result.count('flaky', 'plain')}",
        f"{len(result.both):,}",
        f"{result.swap_outs:,}",
        f"{result.swap_ins:,}",
        f"{result.swapped_seconds / max(result.plain_seconds, 1e-9):.1f} x",
    )


def table(results: Iterable[Result]) -> "Table":
    """Return the table for a terminal."""
    from rich.table import Table

    shown = Table(title="Other people's tests, plain and under swapped memory")
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column in ("suite", "version") else "right")
    for result in results:
        shown.add_row(*row(result), style=None if result.good else "red")
    return shown


def outcomes(ran: tuple[str, ...]) -> str:
    """Return the outcomes of several runs in words: "failed", or "failed, then passed 2 times"."""
    counted = Counter(ran)
    return ", ".join(f"{name} {count} of {len(ran)}" if len(counted) > 1 else name for name, count in counted.items())


def lines_about(result: Result, kinds: tuple[str, ...]) -> list[str]:
    """Return a Markdown list of the verdicts of these kinds."""
    return [
        f"- {result.suite}: `{verdict.test}`: plain {outcomes(verdict.plain)}, swapped {outcomes(verdict.swapped)}"
        for verdict in result.verdicts
        if verdict.kind in kinds
    ]


def document(results: Mapping[str, Result], ram: str) -> str:
    """Return docs/compatibility.md."""
    text = [INTRODUCTION.format(ram=ram)]
    text += ["| " + " | ".join(COLUMNS) + " |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    text += ["| " + " | ".join(row(result)) + " |" for result in results.values()]
    text += ["", "The rest of each suite's tests was skipped or failed as expected, the same in both ways.", ""]
    text += ["Python " + ", ".join(sorted({result.python for result in results.values()})) + ". What is swapped:", ""]
    text += [f"- {suite.name}: {suite.note}." for suite in SUITES if suite.name in results]
    for title, kinds, none in (
        ("Worse", ("new", "sometimes"), "Nothing."),
        ("Flaky", ("flaky", "plain"), "Nothing was."),
    ):
        text += ["", f"## {title}", ""]
        text += [line for result in results.values() for line in lines_about(result, kinds)] or [none]
    text += ["", "## Fails in both ways", ""]
    text += [f"- {result.suite}: `{test}`" for result in results.values() for test in result.both] or ["Nothing."]
    text += ["", "## Known differences", ""]
    text += [f"- {known.suite}: `{known.pattern}`: {known.reason}" for known in KNOWN] or ["There are none."]
    return "\n".join(text) + "\n"


def write_document(results: Mapping[str, Result], ram: str, path: Path) -> None:
    """Write docs/compatibility.md."""
    path.write_text(document(results, ram))
