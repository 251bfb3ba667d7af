"""What `make compat` makes of outcomes: what counts against userswap, what does not, and that nothing is hidden."""

import dataclasses
import os
import sys
import threading
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from compat import report, runner
from compat.compare import Outcome, Verdict, failing_both, judge, stale
from compat.report import Result, combined, document, load, save
from compat.suites import SUITES, Known, Slice


def runs(*outcomes: str) -> list[dict[str, Outcome]]:
    """One test, in several runs; "" is a run that does not have it."""
    return [{"t": Outcome(outcome)} if outcome else {} for outcome in outcomes]


def verdicts(plain: str, swapped: str, *known: Known) -> list[str]:
    """Kinds of verdict for outcomes, one word a run."""
    found = judge("s", runs(*plain.split(" ")), runs(*swapped.split(" ")), known)
    return [verdict.kind for verdict in found]


@pytest.mark.parametrize(
    ("plain", "swapped", "kind"),
    [
        ("passed passed passed", "failed failed failed", "new"),
        ("passed passed passed", "error failed failed", "new"),
        ("passed passed passed", "crash crash crash", "new"),
        ("passed passed passed", "timeout crash timeout", "new"),
        ("passed passed passed", "crash passed passed", "sometimes"),
        ("passed passed passed", "failed passed failed", "sometimes"),
        ("passed passed passed", "skipped skipped skipped", "new"),
        ("xfailed xfailed xfailed", "failed failed failed", "new"),
        ("failed failed failed", "crash crash crash", "new"),
        ("passed passed passed", "  ", "new"),
        ("passed failed passed", "failed failed passed", "flaky"),
        ("passed failed passed", "crash passed passed", "sometimes"),
        ("failed passed passed", "passed passed passed", "flaky"),
        ("failed failed failed", "passed passed passed", "plain"),
    ],
)
def test_a_verdict_for_every_way_in_which_runs_differ(plain: str, swapped: str, kind: str) -> None:
    assert verdicts(plain, swapped) == [kind]
    counts = Verdict("t", kind, (), ()).fails
    assert counts == (kind in ("new", "sometimes"))


@pytest.mark.parametrize("both", ["passed", "failed", "skipped", "xfailed", "crash"])
def test_no_verdict_where_nothing_differs(both: str) -> None:
    assert verdicts(both, both) == []
    assert verdicts("passed", "xpassed") == []


def test_a_failure_in_both_ways_is_told() -> None:
    outcomes = {"a": Outcome("failed"), "b": Outcome("passed"), "c": Outcome("error")}
    assert failing_both(outcomes, outcomes | {"c": Outcome("crash")}) == ["a"]


def test_a_known_difference_excuses_a_failure_but_no_crash_and_is_stale_once_it_is_gone() -> None:
    known = Known("s", "t*", "it counts the bytes of malloc")
    assert verdicts("passed passed", "failed failed", known) == ["known"]
    assert verdicts("passed passed", "crash crash", known) == ["new"]
    assert verdicts("passed passed", "failed failed", Known("other", "t*", "")) == ["new"]
    failed = judge("s", runs("passed"), runs("failed"), [known])
    assert stale("s", failed, [known]) == []
    assert stale("s", judge("s", runs("passed"), runs("passed"), [known]), [known]) == [known]
    assert stale("other", [], [known]) == []


TESTS = """
import os, signal, time, unittest

class Tests(unittest.TestCase):
    def test_1_good(self): pass
    def test_2_bad(self): self.fail("no")
    def test_3_crash(self): os.kill(os.getpid(), signal.SIGSEGV)
    def test_4_hang(self): time.sleep(600)
    def test_5_skip(self): self.skipTest("not here")
    def test_6_good(self): pass
"""
ENDLESS = """
import os, pathlib, time, unittest

class Tests(unittest.TestCase):
    def test_1(self): pathlib.Path({pid!r}).write_text(str(os.getpid()))
    def test_2(self): time.sleep(600)
"""
PYTEST = """
import os, signal, pytest

@pytest.mark.parametrize("value", [object(), object()])
def test_1_good(value): pass
def test_2_bad(): assert False
def test_3_crash(): os.kill(os.getpid(), signal.SIGSEGV)
@pytest.fixture
def broken(): raise OSError
def test_4_error(broken): pass
@pytest.mark.xfail
def test_5_expected(): assert False
def test_6_swapped():
    import sys, userswap
    import numpy as np
    assert userswap.pool._installed[-1].pool.owns(np.ones(1024))
"""


def test_a_crash_and_a_hang_are_outcomes_of_their_tests_and_the_rest_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests_of_others.py").write_text(TESTS)
    monkeypatch.setattr(runner, "STUCK_SECONDS", 3.0)
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(runner, "HERE", with_tests(tmp_path))
    begin = time.monotonic()
    run = runner.run_slice(
        Slice("s", "unittest", ("tests_of_others",)), "plain", Path(sys.executable), log=tmp_path / "log", told=told
    )
    assert time.monotonic() - begin < 300
    assert [(name.rpartition(".")[2], one.outcome) for name, one in run.outcomes.items()] == [
        ("test_1_good", "passed"), ("test_2_bad", "failed"), ("test_3_crash", "crash"), ("test_4_hang", "timeout"),
        ("test_5_skip", "skipped"), ("test_6_good", "passed"),
    ]  # fmt: skip
    assert run.outcomes["tests_of_others.Tests.test_3_crash"].text == "ended with SIGSEGV"
    assert "test_4_hang" in (tmp_path / "log").read_text(), "the fault handler says where it hung"


def with_tests(directory: Path) -> Path:
    """A stand-in for the compat directory, whose cpython/ has the tests."""
    fake = directory / "compat"
    fake.mkdir()
    (fake / "child.py").symlink_to(runner.HERE / "child.py")
    (fake / "cpython").symlink_to(directory)
    return fake


def test_ctrl_c_ends_what_is_under_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tests_of_others.py").write_text(ENDLESS.format(pid=str(tmp_path / "pid")))
    monkeypatch.setattr(runner, "HERE", with_tests(tmp_path))
    stopping = threading.Event()
    monkeypatch.setattr(runner, "stopping", stopping)

    def stop(count: int) -> None:
        if count:
            stopping.set()

    with pytest.raises(runner.Stopped):
        runner.run_slice(
            Slice("s", "unittest", ("tests_of_others",)), "plain", Path(sys.executable), log=tmp_path / "log", told=stop
        )
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def told(count: int) -> None:
    """Progress: nobody looks."""


def test_pytest_under_userswap_is_recorded_test_by_test_with_swapped_arrays(tmp_path: Path) -> None:
    (tmp_path / "test_others.py").write_text(PYTEST)
    part = Slice("s", "pytest", (str(tmp_path / "test_others.py"),))
    run = runner.run_slice(part, "userswap", Path(sys.executable), log=tmp_path / "log", told=told)
    names = [name.rpartition("::")[2] for name in run.outcomes]
    assert list(zip(names, (one.outcome for one in run.outcomes.values()), strict=True)) == [
        ("test_1_good[value0]", "passed"), ("test_1_good[value1]", "passed"), ("test_2_bad", "failed"),
        ("test_3_crash", "crash"), ("test_4_error", "error"), ("test_5_expected", "xfailed"),
        ("test_6_swapped", "passed"),
    ]  # fmt: skip
    assert run.stats["faults"] > 0
    again = runner.run_slice(
        part, "userswap", Path(sys.executable), log=tmp_path / "log", told=told, only=[*run.outcomes][2:3]
    )
    assert [one.outcome for one in again.outcomes.values()] == ["failed"]


def result(part: str, **changes: object) -> Result:
    """A slice's result."""
    of_it = Result(
        suite="numpy", parts=(part,), version="2.0", python="3.11", tests=7, plain={"passed": 7},
        swapped={"passed": 6, "crash": 1}, plain_seconds=1.0, swapped_seconds=3.0, swap_outs=5, swap_ins=4,
        verdicts=(Verdict("a::b", "sometimes", ("passed", "passed"), ("crash", "passed"), "text"),), both=("x::y",),
        broken=(),
    )  # fmt: skip
    return dataclasses.replace(of_it, **changes)  # type: ignore[arg-type]


def test_results_of_slices_are_kept_and_the_page_says_what_came_out(tmp_path: Path) -> None:
    one, other = result("fft"), result("linalg", verdicts=(), swapped={"passed": 7}, both=())
    save(one, tmp_path)
    save(other, tmp_path)
    both = load(tmp_path)["numpy"]
    assert both == combined([other, one])
    assert (both.tests, both.plain, both.swapped) == (14, {"passed": 14}, {"passed": 13, "crash": 1})
    assert (both.parts, both.swapped_seconds, both.verdicts) == (("linalg", "fft"), 6.0, one.verdicts)
    assert other.good
    assert not one.good
    assert not both.good
    page = document(load(tmp_path))
    assert "`a::b`: plain passed, swapped crash 1 of 2, passed 1 of 2" in page
    assert "- numpy: `x`: 1 of its tests" in page
    left_out = page.partition("Not run yet: ")[2].partition("\n")[0]
    assert "numpy lib" in left_out
    assert "h5py (all)" in left_out
    assert "numpy fft" not in left_out
    assert not result("fft", verdicts=(), broken=("fft",)).good


def test_what_is_known_and_does_not_differ_fails_a_whole_suite(monkeypatch: pytest.MonkeyPatch) -> None:
    known = Known("numpy", "a::*", "it counts the bytes of malloc")
    monkeypatch.setattr(report, "KNOWN", (known,))
    whole = next(suite for suite in SUITES if suite.name == "numpy")
    fine = combined([result(part.name, verdicts=()) for part in whole.slices])
    assert fine.stale == [known]
    assert not fine.good
    assert result("fft", verdicts=()).good, "what was left out may have it"
    differs = dataclasses.replace(fine, verdicts=(Verdict("a::b", "known", ("passed",), ("failed",)),))
    assert differs.stale == []
    assert differs.good
