"""Results of suites, kept as JSON, and the tables made of them: for the terminal, and docs/compatibility.md."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compat.compare import Verdict, stale
from compat.suites import KNOWN, SUITES, Known

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["Result", "combined", "load", "save", "table", "write_document"]

COLUMNS = ("suite", "version", "tests", "passed plain", "passed swapped", "worse", "known", "flaky", "fail in both",
           "folios out", "folios in", "time")  # fmt: skip
SUMS = ("parts", "tests", "plain_seconds", "swapped_seconds", "swap_outs", "swap_ins", "verdicts", "both", "broken")
MODES = ("plain", "swapped")
INTRODUCTION = """\
# Compatibility

Other people's test suites, run plain and under swapped memory; only the difference counts. `make compat` runs them
(`make compat SUITES="numpy:fft h5py"` some of them) and writes this page.

Swapped means `userswap run --ram 16M --min-array 4K` (`--ram 32M` for SciPy): every array of NumPy's of a page or more
is swapped memory, and whatever else any library allocates with `malloc` and its kin from 64 KiB on, less than which
stays plain memory always. As tests use small arrays, which even that budget would hold, a thread pushes 1 MiB out up
to two hundred times a second, and now and then all that is compressed on to the swap file. A crash or a hang is the
outcome of the test that was under way, and the rest is run by a new process. What differs is run twice more in both
ways: *worse* is what came out worse than it ever did plain, be it once; *flaky* is what is as bad plain now and then.
*Time* is that of the swapped run against the plain one; it says what being swapped out all the time costs, nothing
about ordinary use.

What the budget must hold, even so: a test of SciPy's (`test_precond_inverse[poisson2d]`) solves again and again with
a matrix of 20 MB, which LAPACK copies column by column. Each column touches every folio once. Under 16 MiB that is a
fault for nearly every element, and takes longer than a test may; it is slow, not wrong. NumPy's
`test_accelerate_framework_sgemv_fix` and `test_argsort_largearrays` need more than the budget, too, and pass.
"""


@dataclass(frozen=True)
class Result:
    """The result of slices of a suite."""

    suite: str
    parts: tuple[str, ...]
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
    both: tuple[str, ...]
    """Tests that fail plain, and the same swapped."""
    broken: tuple[str, ...]
    """Slices of which not all could be run, plain."""

    @property
    def good(self) -> bool:
        """Whether all was run, nothing counts against userswap, and what is listed as known is so."""
        return not self.stale and not self.broken and not any(verdict.fails for verdict in self.verdicts)

    @property
    def stale(self) -> list[Known]:
        """What is listed as known though nothing differs there any more; told once the whole suite was run."""
        return stale(self.suite, self.verdicts, KNOWN) if not self.left_out else []

    @property
    def left_out(self) -> list[str]:
        """Slices of the suite that were not run."""
        slices = next(suite.slices for suite in SUITES if suite.name == self.suite)
        return [part.name for part in slices if part.name not in self.parts]

    def count(self, *kinds: str) -> int:
        """Return how many verdicts are of these kinds."""
        return sum(verdict.kind in kinds for verdict in self.verdicts)


def combined(results: Sequence[Result]) -> Result:
    """Return the result of several slices of a suite as one."""
    first, *rest = results
    for other in rest:
        sums: dict[str, Any] = {name: getattr(first, name) + getattr(other, name) for name in SUMS}
        for name in MODES:
            sums[name] = dict(Counter(getattr(first, name)) + Counter(getattr(other, name)))
        first = replace(other, **sums)
    return first


def save(result: Result, directory: Path) -> None:
    """Keep the result of a slice."""
    (directory / f"{result.suite}-{result.parts[0]}.json").write_text(json.dumps(asdict(result), indent=1))


def load(directory: Path) -> dict[str, Result]:
    """Return what was kept, a result for each suite."""
    results = {}
    for suite in SUITES:
        found = []
        for part in suite.slices:
            path = directory / f"{suite.name}-{part.name}.json"
            if not path.exists():
                continue
            kept = json.loads(path.read_text())
            tuples = {name: tuple(kept[name]) for name in ("parts", "both", "broken")}
            verdicts = tuple(
                Verdict(**one | {"plain": tuple(one["plain"]), "swapped": tuple(one["swapped"])})
                for one in kept["verdicts"]
            )
            found.append(Result(**kept | tuples | {"verdicts": verdicts}))
        if found:
            results[suite.name] = combined(found)
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


def file_of(test: str) -> str:
    """Return the file, or for unittest the module, that a test is in."""
    return test.partition("::")[0] if "::" in test else ".".join(test.split(".")[:-2])


def lines_about(result: Result, kinds: tuple[str, ...]) -> list[str]:
    """Return a Markdown list of the verdicts of these kinds."""
    return [
        f"- {result.suite}: `{verdict.test}`: plain {outcomes(verdict.plain)}, swapped {outcomes(verdict.swapped)}"
        for verdict in result.verdicts
        if verdict.kind in kinds
    ]


def document(results: Mapping[str, Result]) -> str:
    """Return docs/compatibility.md."""
    text = [INTRODUCTION]
    text += ["| " + " | ".join(COLUMNS) + " |", "|---|---|" + "---:|" * (len(COLUMNS) - 2)]
    text += ["| " + " | ".join(row(result)) + " |" for result in results.values()]
    text += ["", "The rest of each suite's tests was skipped or failed as expected, the same in both ways.", ""]
    text += ["Python " + ", ".join(sorted({result.python for result in results.values()})) + ". What is swapped:", ""]
    text += [f"- {suite.name}: {suite.note}." for suite in SUITES if suite.name in results]
    left_out = [f"{suite.name} (all)" for suite in SUITES if suite.name not in results]
    left_out += [f"{result.suite} {part}" for result in results.values() for part in result.left_out]
    if left_out:
        text += ["", f"Not run yet: {', '.join(left_out)}."]
    for title, kinds, none in (
        ("Worse", ("new", "sometimes"), "Nothing."),
        ("Flaky", ("flaky", "plain"), "Nothing was."),
    ):
        text += ["", f"## {title}", ""]
        text += [line for result in results.values() for line in lines_about(result, kinds)] or [none]
    text += ["", "## Fails in both ways", ""]
    both = [
        f"- {result.suite}: `{place}`: {count} of its tests"
        for result in results.values()
        for place, count in Counter(file_of(test) for test in result.both).items()
    ]
    text += both or ["Nothing."]
    text += ["", "## Known differences", ""]
    text += [f"- {known.suite}: `{known.pattern}`: {known.reason}" for known in KNOWN] or ["There are none."]
    return "\n".join(text) + "\n"


def write_document(results: Mapping[str, Result], path: Path) -> None:
    """Write docs/compatibility.md."""
    path.write_text(document(results))
