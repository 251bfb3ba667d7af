"""Runs one slice of a suite in a process of its own and writes down, test by test, how each came out.

It is run as a script, under python or under `userswap run`, by an interpreter that has the suite but not this
package: so it imports nothing of it. Each line of the events file is written at once, so that after a crash the
last test that was begun and not ended is the one that crashed.

While the tests run, a thread pushes what is in place out again and again, and now and then to the swap file: test
suites use small arrays, of which the least budget would hold all. A plain run has the thread too, with nothing to push.
"""

from __future__ import annotations

import functools
import json
import os
import re
import signal
import sys
import threading
import time
import unittest
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import pytest

ADDRESS = re.compile(r"0x[0-9a-f]{4,}")
PUSH_SECONDS = 0.005
# More at a time would only add to the swapping of tests that need more than the budget anyway.
PUSH_BYTES = 1 << 20
WRITEBACK_EVERY = 8
TEXT_MOST = 20_000
# What CPython's tests of gigabytes are run with (it tries them with 5147 itself, where there is no memory): bytes of it
# are memory that `userswap run` takes, and a list of it is megabytes.
BIG = 300_007


class Events:
    """The events file. Ids are made the same in every run: without addresses, and numbered where they repeat."""

    def __init__(self, path: str) -> None:
        self.file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self.process = os.getpid()

    def write(self, **event: Any) -> None:
        """Write one event; a forked child's are its parent's to tell."""
        if os.getpid() == self.process:
            os.write(self.file, (json.dumps(event) + "\n").encode())

    def start(self, test: str) -> None:
        """A test begins."""
        self.write(event="start", id=test)

    def end(self, test: str, outcome: str, text: str = "") -> None:
        """A test has ended."""
        self.write(event="end", id=test, outcome=outcome, text=text[-TEXT_MOST:])


class Names:
    """Names of tests that are the same in every run."""

    def __init__(self) -> None:
        self.seen: dict[str, int] = {}

    def name(self, raw: str) -> str:
        """Return the name for the next test called `raw`."""
        name = ADDRESS.sub("0x", raw)
        count = self.seen[name] = self.seen.get(name, 0) + 1
        return name if count == 1 else f"{name}#{count}"


class Plan:
    """Which tests to run: those that are listed, or all but those that are."""

    def __init__(self, only: str | None, done: str | None) -> None:
        self.only = None if only is None else set(Path(only).read_text().splitlines())
        self.done = set() if done is None else set(Path(done).read_text().splitlines())

    def wants(self, test: str) -> bool:
        """Tell whether to run it."""
        return test not in self.done and (self.only is None or test in self.only)


class Recorder:
    """A pytest plugin: chooses tests by the plan, and writes down what becomes of them."""

    def __init__(self, events: Events, plan: Plan) -> None:
        self.events = events
        self.plan = plan
        self.names: dict[int, str] = {}
        self.current = ""
        self.outcome = "passed"
        self.text = ""

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """Keep what the plan wants."""
        names = Names()
        keep: list[pytest.Item] = []
        drop: list[pytest.Item] = []
        for item in items:
            name = names.name(item.nodeid)
            self.names[id(item)] = name
            (keep if self.plan.wants(name) else drop).append(item)
        if drop:
            config.hook.pytest_deselected(items=drop)
        items[:] = keep
        self.events.write(event="collected", count=len(keep))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """A file that can't be imported is a test that failed."""
        name = f"{report.nodeid}::<collect>"
        if report.failed and self.plan.wants(name):
            self.events.start(name)
            self.events.end(name, "error", report.longreprtext)

    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        """A test begins; going on is pytest's."""
        self.current, self.outcome, self.text = self.names.get(id(item), item.nodeid), "passed", ""
        self.events.start(self.current)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """One of its phases is over."""
        expected = hasattr(report, "wasxfail")
        if report.failed:
            self.outcome = "failed" if report.when == "call" else "error"
            self.text += report.longreprtext
        elif report.skipped and self.outcome == "passed":
            self.outcome = "xfailed" if expected else "skipped"
            self.text += str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)
        elif report.when == "call" and expected:
            self.outcome = "xpassed"

    def pytest_runtest_logfinish(self) -> None:
        """It is over."""
        self.events.end(self.current, self.outcome, self.text)


class Result(unittest.TestResult):
    """The same for unittest."""

    def __init__(self, events: Events, names: dict[int, str]) -> None:
        super().__init__()
        self.events = events
        self.names = names
        self.outcome = "passed"
        self.text = ""

    def startTest(self, test: unittest.TestCase) -> None:
        """A test begins."""
        super().startTest(test)
        self.outcome, self.text = "passed", ""
        self.events.start(self.names[id(test)])

    def stopTest(self, test: unittest.TestCase) -> None:
        """It is over."""
        super().stopTest(test)
        self.events.end(self.names[id(test)], self.outcome, self.text)

    def worse(self, outcome: str, test: Any, error: Any) -> None:
        """It, or what surrounds a class or module of them, has failed."""
        text = self._exc_info_to_string(error, test)  # type: ignore[attr-defined]
        if isinstance(test, unittest.TestCase) and id(test) in self.names:
            self.outcome = outcome
            self.text += text
        else:
            self.events.start(str(test))
            self.events.end(str(test), outcome, text)

    def addError(self, test: Any, err: Any) -> None:
        """It raised."""
        super().addError(test, err)
        self.worse("error", test, err)

    def addFailure(self, test: Any, err: Any) -> None:
        """It failed."""
        super().addFailure(test, err)
        self.worse("failed", test, err)

    def addSubTest(self, test: Any, subtest: Any, err: Any) -> None:
        """A part of it is over."""
        super().addSubTest(test, subtest, err)
        if err is not None:
            self.worse("failed", test, err)

    def addSkip(self, test: Any, reason: str) -> None:
        """It says it can't run here; a whole class that does is not a test."""
        super().addSkip(test, reason)
        self.outcome, self.text = "skipped", reason

    def addExpectedFailure(self, test: Any, err: Any) -> None:
        """It failed as it should."""
        super().addExpectedFailure(test, err)
        self.outcome = "xfailed"

    def addUnexpectedSuccess(self, test: Any) -> None:
        """It should have failed."""
        super().addUnexpectedSuccess(test)
        self.outcome = "xpassed"


def run_pytest(events: Events, plan: Plan, arguments: list[str]) -> None:
    """Run tests with pytest."""
    import pytest

    options = ["-q", "-p", "no:cacheprovider", "--continue-on-collection-errors", "--tb=short", "--no-header"]
    status = pytest.main([*options, *arguments], plugins=[Recorder(events, plan)])
    if status in (pytest.ExitCode.INTERNAL_ERROR, pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERRUPTED):
        sys.exit(f"pytest ended with {status!r}")


def run_unittest(events: Events, plan: Plan, modules: list[str]) -> None:
    """Run tests with unittest, as CPython's own runner does for each of its files."""
    from test import support

    # As CPython's own runner has it without options: nothing that takes long, or gigabytes of disk.
    support.use_resources = []
    # Tests of thread pools sleep that long, five minutes as it is, if a task begins before its pool is ended.
    support.LONG_TIMEOUT = 20.0
    support.bigmemtest = big(support.bigmemtest)
    suite = unittest.TestLoader().loadTestsFromNames(modules)
    names = Names()
    by_test: dict[int, str] = {}

    def choose(tests: unittest.TestSuite) -> unittest.TestSuite:
        """Copy the suite with what the plan wants: the nesting is kept, as fixtures hang on it."""
        copy = unittest.TestSuite()
        for one in tests:
            if isinstance(one, unittest.TestSuite):
                copy.addTest(choose(one))
                continue
            name = by_test[id(one)] = names.name(one.id())
            if plan.wants(name):
                copy.addTest(one)
        return copy

    chosen = choose(suite)
    events.write(event="collected", count=chosen.countTestCases())
    chosen.run(Result(events, by_test))


def big(bigmemtest: Callable[..., Any]) -> Callable[..., Any]:
    """Return CPython's decorator of tests of gigabytes, with BIG as the size of those that take any."""

    def decorated(size: int, memuse: float, dry_run: bool = True) -> Callable[..., Any]:
        if not dry_run:
            return bigmemtest(size, memuse, dry_run)  # type: ignore[no-any-return]

        def decorator(test: Callable[[unittest.TestCase, int], None]) -> Callable[[unittest.TestCase], None]:
            @functools.wraps(test)
            def run(case: unittest.TestCase) -> None:
                test(case, BIG)

            # Some tests read what size they were meant for.
            run.size, run.memuse = size, memuse  # type: ignore[attr-defined]
            return run

        return decorator

    return decorated


def push(stop: threading.Event) -> None:
    """Push swapped memory out, and sometimes to the file, until told to stop."""
    userswap = sys.modules.get("userswap")
    pool = userswap.pool._installed[-1].pool if userswap is not None and userswap.pool._installed else None
    rounds = 0
    while not stop.wait(PUSH_SECONDS):
        if pool is not None:
            pool.evict(PUSH_BYTES)
            rounds += 1
            if rounds % WRITEBACK_EVERY == 0:
                pool.writeback()


def main(arguments: list[str]) -> None:
    """Run a slice: EVENTS pytest|unittest ONLY|- DONE|- PUSH ARGUMENT ..."""
    path, kind, only, done, pushed, *rest = arguments
    # This directory is no place to import from, for programs that are not ours.
    sys.path.pop(0)
    # A shell's background job ignores it, and tests send it to themselves.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    events = Events(path)
    plan = Plan(None if only == "-" else only, None if done == "-" else done)
    stop = threading.Event()
    thread = threading.Thread(target=push, args=(stop,), daemon=True)
    if pushed == "push":
        thread.start()
    begin = time.monotonic()
    try:
        (run_pytest if kind == "pytest" else run_unittest)(events, plan, rest)
    finally:
        stop.set()
        if pushed == "push":
            thread.join()
    stats: dict[str, int] = {}
    if (userswap := sys.modules.get("userswap")) is not None and userswap.pool._installed:
        stats = userswap.pool._installed[-1].pool.stats().as_dict()
    events.write(event="finish", seconds=time.monotonic() - begin, stats=stats)


if __name__ == "__main__":
    main(sys.argv[1:])
