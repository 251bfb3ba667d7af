"""`python -m compat`: runs suites in both ways, two slices at once, and says what differs. `make compat` calls it."""

import importlib.metadata
import platform
import sys
from argparse import ArgumentParser
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from compat.compare import Outcome, Verdict, differing, failing_both, judge, stale
from compat.report import Result, load, save, table, write_document
from compat.runner import MODES, RAM, Run, interpreter, packages, run_slice, stopping
from compat.suites import KNOWN, SUITES, Slice, Suite

AT_ONCE = 2
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


def run_suite(suite: Suite, parts: tuple[Slice, ...], display: Display, pool: ThreadPoolExecutor) -> Result:
    """Run slices of a suite in both ways, and what differs again."""
    display.progress.update(display.whole, total=(display.progress.tasks[0].total or 0) + 2 * len(parts))
    jobs = {(part.name, mode): pool.submit(display.run, suite, part, mode) for part in parts for mode in MODES}
    first = {key: job.result() for key, job in jobs.items()}
    verdicts: list[Verdict] = []
    for part in parts:
        runs = {mode: [first[part.name, mode].outcomes] for mode in MODES}
        again = differing(runs["plain"][0], runs["userswap"][0])
        # What is not a test can't be run again alone.
        chosen = [test for test in again if not test.startswith("<")]
        for _ in range(RETRIES if chosen else 0):
            both = [pool.submit(display.run, suite, part, mode, chosen) for mode in MODES]
            for mode, job in zip(MODES, both, strict=True):
                runs[mode].append(job.result().outcomes)
        verdicts += judge(suite.name, retried(runs["plain"], chosen), retried(runs["userswap"], chosen), KNOWN)
    old = (
        [f"{one.pattern}: {one.reason}" for one in stale(suite.name, verdicts, KNOWN)] if parts == suite.slices else []
    )
    counts = {
        mode: dict(Counter(one.outcome for part in parts for one in first[part.name, mode].outcomes.values()))
        for mode in MODES
    }
    swapped = [first[part.name, "userswap"] for part in parts]
    return Result(
        suite=suite.name,
        version=version_of(suite, display.python),
        python=platform.python_version(),
        tests=sum(len(set(first[part.name, "plain"].outcomes) | set(first[part.name, "userswap"].outcomes))
                  for part in parts),
        plain=counts["plain"],
        swapped=counts["userswap"],
        plain_seconds=sum(first[part.name, "plain"].seconds for part in parts),
        swapped_seconds=sum(run.seconds for run in swapped),
        swap_outs=sum(run.stats.get("swap_outs", 0) + run.stats.get("part_outs", 0) for run in swapped),
        swap_ins=sum(run.stats.get("swap_ins", 0) + run.stats.get("part_ins", 0) for run in swapped),
        verdicts=tuple(verdicts),
        stale=tuple(old),
        broken=tuple(
            part.name for part in parts if any(test.startswith("<") for test in first[part.name, "plain"].outcomes)
        ),
        both=tuple(
            test for part in parts for test in failing_both(*(first[part.name, mode].outcomes for mode in MODES))
        ),
    )  # fmt: skip


def retried(runs: list[dict[str, Outcome]], chosen: list[str]) -> list[dict[str, Outcome]]:
    """Return the runs, later ones completed by the first's outcomes of what could not be run again."""
    fixed = {test: outcome for test, outcome in runs[0].items() if test not in chosen}
    return [runs[0], *(fixed | run for run in runs[1:])]


def version_of(suite: Suite, python: Path) -> str:
    """Return the version of a suite's library in the environment where it runs."""
    if not suite.distribution:
        return platform.python_version()
    found = next(iter(importlib.metadata.distributions(name=suite.distribution, path=[str(packages(python))])), None)
    return "?" if found is None else found.version


def main() -> int:
    """Run what is asked for; 1 if something is worse under userswap than plain."""
    parser = ArgumentParser(prog="python -m compat", description="Other people's test suites under swapped memory.")
    parser.add_argument("suites", nargs="*", metavar="SUITE[:SLICE]", help="only these (default: all)")
    parser.add_argument("--environment", type=Path, default=Path(".venv-compat"), help="where they are installed")
    parser.add_argument("--results", type=Path, default=Path("build/compat"), help="where logs and results are kept")
    options = parser.parse_args()
    names = {suite.name: suite for suite in SUITES}
    for asked in options.suites:
        suite, _, part = asked.partition(":")
        if suite not in names or (part and part not in [one.name for one in names[suite].slices]):
            there = ", ".join(names) if suite not in names else ", ".join(one.name for one in names[suite].slices)
            parser.error(f"there is no {asked!r}, only {there}")
    python = interpreter(options.environment)
    options.results.mkdir(parents=True, exist_ok=True)
    display = Display(python, options.results)
    results: list[Result] = []
    with display.progress, ThreadPoolExecutor(AT_ONCE) as pool:
        try:
            for suite in SUITES:
                asked = [one.partition(":")[2] for one in options.suites if one.partition(":")[0] == suite.name]
                if options.suites and not asked:
                    continue
                parts = tuple(part for part in suite.slices if not any(asked) or part.name in asked)
                result = run_suite(suite, parts, display, pool)
                results.append(result)
                if parts == suite.slices:
                    save(result, options.results)
        except KeyboardInterrupt:
            stopping.set()
            pool.shutdown(cancel_futures=True)
            return 130
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
            console.print(f"stale: {result.suite} {old}", markup=False, highlight=False, soft_wrap=True)
    kept = load(options.results)
    if len(kept) == len(SUITES):
        write_document(kept, RAM, Path("docs/compatibility.md"))
    else:
        print("docs/compatibility.md stays as it is until every suite was run whole.")
    good = all(result.good for result in results)
    said = "Nothing came out worse under swapped memory than plain." if good else f"Logs are in {options.results}."
    print(said)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
