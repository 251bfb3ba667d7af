"""`python -m compat`: runs suites in both ways, two slices at once, and says what differs. `make compat` calls it."""

import importlib.metadata
import platform
import sys
from argparse import ArgumentParser
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from compat.compare import Outcome, differing, failing_both, judge
from compat.report import Result, combined, load, save, table, write_document
from compat.runner import MODES, Run, interpreter, packages, run_slice, stopping
from compat.suites import KNOWN, SUITES, Slice, Suite

AT_ONCE = 2
# The version of what is not installed.
MISSING = "?"
RETRIES = 2


class Display:
    """Runs slices, and shows progress on stderr: bars on a terminal, else a line for each slice that is over."""

    def __init__(self, python: Path, logs: Path) -> None:
        self.python = python
        self.logs = logs
        self.console = Console(stderr=True)
        self.lock = Lock()
        self.progress = Progress(
            TextColumn("{task.description:<44}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.whole = self.progress.add_task("slices", total=0)

    def run(self, suite: Suite, part: Slice, mode: str, only: list[str] | None = None) -> Run:
        """Run a slice and show how far it is."""
        again = "" if only is None else ", again"
        name = f"{suite.name} {part.name} {mode}{again}"
        task = self.progress.add_task(name, total=None if only is None else len(only))
        log = self.logs / f"{suite.name}-{part.name}-{mode}{again.replace(', ', '-')}.log"
        run = run_slice(
            part, mode, self.python, log=log, told=lambda count: self.progress.update(task, completed=count), only=only
        )
        self.progress.remove_task(task)
        self.progress.advance(self.whole)
        counts = Counter(outcome.outcome for outcome in run.outcomes.values())
        said = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
        self.console.print(f"{name}: {said}; {run.seconds:.0f} s", highlight=False, soft_wrap=True)
        return run


def run_all(parts: list[tuple[Suite, Slice]], display: Display, pool: ThreadPoolExecutor) -> Iterator[Result]:
    """Run slices in both ways, and at the end what differs again; yield the results as they come."""
    display.progress.update(display.whole, total=2 * len(parts))
    jobs = [[pool.submit(display.run, suite, part, mode) for mode in MODES] for suite, part in parts]
    later = []
    for (suite, part), both in zip(parts, jobs, strict=True):
        runs = [job.result() for job in both]
        # What is not a test can't be run again alone.
        chosen = [test for test in differing(*(run.outcomes for run in runs)) if not test.startswith("<")]
        if not chosen:
            yield result_of(suite, part, display.python, [[run] for run in runs], chosen)
            continue
        again = [[pool.submit(display.run, suite, part, mode, chosen) for mode in MODES] for _ in range(RETRIES)]
        later.append((suite, part, runs, chosen, again))
    for suite, part, runs, chosen, again in later:
        by_mode = [[run, *(turn[way].result() for turn in again)] for way, run in enumerate(runs)]
        yield result_of(suite, part, display.python, by_mode, chosen)


def result_of(suite: Suite, part: Slice, python: Path, runs: list[list[Run]], chosen: list[str]) -> Result:
    """Return the result of a slice from its runs, plain and swapped, of which later ones have `chosen` alone."""
    plain, swapped = (run[0] for run in runs)
    outcomes = [retried([run.outcomes for run in way], chosen) for way in runs]
    return Result(
        suite=suite.name,
        parts=(part.name,),
        version=version_of(suite, python),
        python=platform.python_version(),
        tests=len(set(plain.outcomes) | set(swapped.outcomes)),
        plain=dict(Counter(one.outcome for one in plain.outcomes.values())),
        swapped=dict(Counter(one.outcome for one in swapped.outcomes.values())),
        plain_seconds=plain.seconds,
        swapped_seconds=swapped.seconds,
        swap_outs=swapped.stats.get("swap_outs", 0) + swapped.stats.get("part_outs", 0),
        swap_ins=swapped.stats.get("swap_ins", 0) + swapped.stats.get("part_ins", 0),
        verdicts=tuple(judge(suite.name, outcomes[0], outcomes[1], KNOWN)),
        both=tuple(failing_both(plain.outcomes, swapped.outcomes)),
        broken=(part.name,) if any(test.startswith("<") for test in plain.outcomes) else (),
    )


def retried(runs: list[dict[str, Outcome]], chosen: list[str]) -> list[dict[str, Outcome]]:
    """Return the runs, later ones completed by the first's outcomes of what could not be run again."""
    fixed = {test: outcome for test, outcome in runs[0].items() if test not in chosen}
    return [runs[0], *(fixed | run for run in runs[1:])]


def version_of(suite: Suite, python: Path) -> str:
    """Return the version of a suite's library in the environment where it runs."""
    if not suite.distribution:
        return platform.python_version()
    found = next(iter(importlib.metadata.distributions(name=suite.distribution, path=[str(packages(python))])), None)
    return MISSING if found is None else found.version


def main() -> int:
    """Run what is asked for; 1 if something is worse under userswap than plain."""
    parser = ArgumentParser(prog="python -m compat", description="Other people's test suites under swapped memory.")
    parser.add_argument("suites", nargs="*", metavar="SUITE[:SLICE]", help="only these (default: all)")
    parser.add_argument("--environment", type=Path, default=Path(".venv-compat"), help="where they are installed")
    parser.add_argument("--results", type=Path, default=Path("build/compat"), help="where logs and results are kept")
    options = parser.parse_args()
    names = {suite.name: suite for suite in SUITES}
    for wanted in options.suites:
        suite, _, part = wanted.partition(":")
        if suite not in names or (part and part not in [one.name for one in names[suite].slices]):
            there = ", ".join(names) if suite not in names else ", ".join(one.name for one in names[suite].slices)
            parser.error(f"there is no {wanted!r}, only {there}")
    python = interpreter(options.environment)
    options.results.mkdir(parents=True, exist_ok=True)
    display = Display(python, options.results)
    asked = [one.partition(":") for one in options.suites]
    parts = [
        (suite, part)
        for suite in SUITES
        for part in suite.slices
        if not asked or any(one[0] == suite.name and one[2] in ("", part.name) for one in asked)
    ]
    for suite in dict.fromkeys(suite for suite, _ in parts):
        if version_of(suite, python) == MISSING:
            parts = [(other, part) for other, part in parts if other != suite]
            display.console.print(f"{suite.name} is not installed: its suite was not run.", highlight=False)
    found: list[Result] = []
    with display.progress, ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for result in run_all(parts, display, pool):
                found.append(result)
                save(result, options.results)
        except KeyboardInterrupt:
            stopping.set()
            pool.shutdown(cancel_futures=True)
            return 130
    results = [
        combined([result for result in found if result.suite == suite.name])
        for suite in SUITES
        if any(result.suite == suite.name for result in found)
    ]
    console = Console() if sys.stdout.isatty() else Console(width=140)
    console.print(table(results))
    for result in results:
        for verdict in result.verdicts:
            console.print(
                f"{verdict.kind}: {result.suite} {verdict.test}: plain {', '.join(verdict.plain)}; "
                f"swapped {', '.join(verdict.swapped)}",
                markup=False, highlight=False, soft_wrap=True,
            )  # fmt: skip
        for part in result.broken:
            console.print(f"could not be run plain: {result.suite} {part}", highlight=False)
        for old in result.stale:
            console.print(f"stale: {result.suite} {old.pattern}", markup=False, highlight=False, soft_wrap=True)
    if results:
        write_document(load(options.results), Path("docs/compatibility.md"))
    good = all(result.good for result in results)
    said = "Nothing came out worse under swapped memory than plain." if good else f"Logs are in {options.results}."
    print(said)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
