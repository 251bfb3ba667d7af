"""How a test came out plain and under userswap, over several runs of each, and what to make of it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from compat.suites import Known

__all__ = ["DIED", "MISSING", "Outcome", "Verdict", "differing", "failing_both", "judge", "rank", "stale"]

MISSING = "missing"
DIED = ("crash", "timeout")
# From what is as good as can be to the worst. An expected failure that comes is as good as a pass.
RANKS = {"passed": 0, "xfailed": 0, "xpassed": 0, "skipped": 1, MISSING: 2, "failed": 3, "error": 3} | dict.fromkeys(
    DIED, 4
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a test came out once; `text` is what there is to read about it."""

    outcome: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to make of a test whose outcomes were not all the same.

    `kind` is "new" (worse under userswap each time), "sometimes" (worse than it ever was plain, but not each time: a
    failure as well), "known", "flaky" (plain, it is now and then as bad), or "plain" (it failed only plain).
    """

    test: str
    kind: str
    plain: tuple[str, ...]
    swapped: tuple[str, ...]
    text: str = ""
    reason: str = ""

    @property
    def fails(self) -> bool:
        """Whether it counts against userswap."""
        return self.kind in ("new", "sometimes")


def rank(outcome: str) -> int:
    """Return how bad an outcome is."""
    return RANKS[outcome]


def outcome_of(run: Mapping[str, Outcome], test: str) -> Outcome:
    """Return a test's outcome in a run; that it is not there is one, too."""
    return run.get(test, Outcome(MISSING))


def differing(plain: Mapping[str, Outcome], swapped: Mapping[str, Outcome]) -> list[str]:
    """Return the tests to run again, in both ways: those whose outcome is better or worse than plain."""
    tests = list(dict.fromkeys([*plain, *swapped]))
    return [test for test in tests if rank(outcome_of(plain, test).outcome) != rank(outcome_of(swapped, test).outcome)]


def failing_both(plain: Mapping[str, Outcome], swapped: Mapping[str, Outcome]) -> list[str]:
    """Return the tests that fail, and are no worse under userswap than plain."""
    failed = rank("failed")
    return [
        test for test, one in plain.items() if failed <= rank(one.outcome) == rank(outcome_of(swapped, test).outcome)
    ]


def judge(
    suite: str,
    plain: Sequence[Mapping[str, Outcome]],
    swapped: Sequence[Mapping[str, Outcome]],
    known: Iterable[Known],
) -> list[Verdict]:
    """Return the verdicts on all tests that differ in the first run of each way; later runs have these tests alone."""
    verdicts = []
    for test in differing(plain[0], swapped[0]):
        ways = [[outcome_of(run, test) for run in runs] for runs in (plain, swapped)]
        best, worst = (([rank(one.outcome) for one in way]) for way in ways)
        bad = max(ways[1], key=lambda one: rank(one.outcome))
        reason = ""
        if max(worst) <= max(best):
            kind = "plain" if min(best) > max(worst) else "flaky"
        else:
            kind = "new" if min(worst) > max(best) else "sometimes"
            excuses = [one.reason for one in known if one.suite == suite and fnmatchcase(test, one.pattern)]
            if excuses and bad.outcome not in DIED:
                kind, reason = "known", excuses[0]
        outcomes = [tuple(one.outcome for one in way) for way in ways]
        verdicts.append(Verdict(test, kind, outcomes[0], outcomes[1], bad.text, reason))
    return verdicts


def stale(suite: str, verdicts: Iterable[Verdict], known: Iterable[Known]) -> list[Known]:
    """Return what is listed as known of a suite though nothing differs there any more."""
    differ = [verdict.test for verdict in verdicts if verdict.kind == "known"]
    return [one for one in known if one.suite == suite and not any(fnmatchcase(test, one.pattern) for test in differ)]
