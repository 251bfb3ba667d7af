"""What userswap aims at, and whether what was measured gets there. Bars that were not run are left out."""

from collections.abc import Iterator, Sequence
from statistics import median, quantiles
from typing import NamedTuple

from userswap.bench.compare import Case, Results, cases
from userswap.bench.contenders import CONTENDERS

__all__ = ["Verdict", "verdicts"]

OVERCOMMIT, DATA = 2.0, "2:1"
"""Where most bars are."""
FASTER = {
    "scan": 20.0,
    "update": 6.0,
    "random read": 1 / 0.7,
    "random write": 1 / 0.8,
    "zipf read": 1 / 0.8,
    "sort": 4.0,
    "k-means": 3.0,
    "groupby": 3.0,
    "product": 3.0,
}
"""How many times as fast as zswap."""
OF_LIMIT = 0.8
TWO_THREADS = 1.6
FITS = 1.02
TAIL = 4.0
SWAPPING = ("scan", "random read", "random write", "zipf read", "update")
"""Workloads that do little but swap, so that the CPU time of swapping can be told from their own."""
KERNEL = [name for name, contender in CONTENDERS.items() if contender.kernel]


class Verdict(NamedTuple):
    """One bar."""

    what: str
    bar: str
    measured: str
    met: bool | None
    """None: the figures vary too much to tell."""


def verdicts(results: Results) -> list[Verdict]:
    """Judge all bars that the figures say something about."""
    return [
        *against_zswap(results),
        *against_limit(results),
        *against_kernel(results),
        *two_threads(results),
        *when_it_fits(results),
        *tail(results),
        *processor(results),
    ]


def against_zswap(results: Results) -> Iterator[Verdict]:
    for workload, least in FASTER.items():
        times = results.times(Case(workload, OVERCOMMIT, DATA, 1), "zswap")
        if times is not None:
            yield Verdict(f"{workload}, by zswap", f">= {least:.3g}x", f"{times:.3g}x", times >= least)


def against_limit(results: Results) -> Iterator[Verdict]:
    times = results.times(Case("scan", OVERCOMMIT, DATA, 1), "decompress")
    if times is not None:
        yield Verdict("scan, of what Blosc2 decompresses", f">= {OF_LIMIT:.0%}", f"{times:.0%}", times >= OF_LIMIT)


def against_kernel(results: Results) -> Iterator[Verdict]:
    """No workload slower than the best that the kernel does, at any overcommit."""
    worst: tuple[float, str] | None = None
    for case in cases(results.options):
        times = [times for name in KERNEL if (times := results.times(case, name)) is not None]
        if times and case.overcommit > 1:
            worst = min(worst or (float("inf"), ""), (min(times), str(case)))
    if worst is not None:
        what = f"nothing slower than the kernel's best; worst: {worst[1]}"
        yield Verdict(what, ">= 1x", f"{worst[0]:.3g}x", worst[0] >= 1)


def two_threads(results: Results) -> Iterator[Verdict]:
    one, two = ((Case("scan", OVERCOMMIT, DATA, threads), "userswap alone") for threads in (1, 2))
    found = results.compared(one, two)
    if found:
        times = median(found)
        what = "scan with 2 threads, by 1, no readahead"
        yield Verdict(what, f">= {TWO_THREADS}x", f"{times:.2f}x", times >= TWO_THREADS)


def when_it_fits(results: Results) -> Iterator[Verdict]:
    """A program whose arrays fit into RAM, with room to spare."""
    for case in cases(results.options):
        found = results.compared((case, "userswap"), (case, "plain"))
        if case.overcommit < 1 and found:
            times = median(found)
            measured = f"{times:.3f}x ({min(found):.2f}..{max(found):.2f})"
            met = None if abs(times - FITS) <= uncertain(found) else times <= FITS
            yield Verdict(f"{case}: time, by plain", f"<= {FITS}x", measured, met)


def uncertain(found: Sequence[float]) -> float:
    """How far the median of ratios may well be off (twice its error, from the quartiles)."""
    if len(found) < 4:
        return float("inf")
    low, _, high = quantiles(found, n=4)
    # Of a normal distribution: the error of the median is 1.25 sigma / sqrt(n), the quartiles are 1.35 sigma apart.
    return 2 * 1.25 / 1.35 * (high - low) / float(len(found) ** 0.5)


def tail(results: Results) -> Iterator[Verdict]:
    """Faults of the scan alone. The p50 is a window that was ready and is moved in, the p99 one that had to be made."""
    case = Case("scan", OVERCOMMIT, DATA, 1)
    runs = [s.run.figures for s in results.of(case, "userswap")]
    if runs:
        worst = max(figures["fault_ns_p99"] / max(figures["fault_ns_p50"], 1) for figures in runs)
        yield Verdict("scan, p99 of a fault, by its p50", f"<= {TAIL:.0f}x", f"{worst:.1f}x", worst <= TAIL)


def processor(results: Results) -> Iterator[Verdict]:
    """CPU seconds for each GB swapped, at most the kernel's least."""
    for case in cases(results.options):
        ours = results.cpu_by_gb(case, "userswap")
        theirs = [spent for name in KERNEL if (spent := results.cpu_by_gb(case, name)) is not None]
        here = (case.overcommit, case.data, case.threads) == (OVERCOMMIT, DATA, 1) and case.workload in SWAPPING
        if here and ours is not None and theirs:
            yield Verdict(f"{case.workload}, CPU s by GB", f"<= {min(theirs):.2f}", f"{ours:.2f}", ours <= min(theirs))
