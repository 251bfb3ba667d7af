"""`userswap bench compare`: the same results everywhere, memory divided as it should be, nothing left behind."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import python, userswap
from userswap.bench import bars, compare, contenders, data, faults, kernelswap, report, runs, workloads
from userswap.bench.compare import Case, NotRun, Results, Sample
from userswap.bench.contenders import CONTENDERS, plan
from userswap.bench.fault_times import percentile
from userswap.bench.workloads import WORKLOADS, Spec
from userswap.cli import main
from userswap.lab.machine import machine

MIB = 1 << 20
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="the kernel's swap is set up by root only")
ZSWAP = Path("/sys/module/zswap/parameters")


def left_behind() -> dict[str, Any]:
    """What a comparison might leave on the machine."""
    return {
        "swap": [line for line in Path("/proc/swaps").read_text().splitlines() if "userswap-bench" in line],
        "zram": sorted(path.name for path in Path("/sys/block").glob("zram*")),
        "cgroups": [*map(str, Path("/sys/fs/cgroup").glob("**/userswap-bench-*"))]
        if Path("/sys/fs/cgroup").is_dir()
        else [],
        "files": sorted(map(str, Path(os.environ.get("TMPDIR", "/var/tmp")).glob("userswap-bench-*"))),
        "zswap": {file.name: file.read_text() for file in ZSWAP.iterdir()} if ZSWAP.is_dir() else {},
    }


@pytest.fixture
def nothing_stays() -> Iterator[None]:
    """Look before and after, while no other comparison on this machine has its own things set up."""
    with runs.alone(runs.Stop()):
        before = left_behind()
    yield
    with runs.alone(runs.Stop()):
        assert left_behind() == before


# ---- data ----


def test_a_digest_sees_bytes_and_places() -> None:
    array = np.arange(3 * data.STEP + 100.0)
    found = data.digest(array)
    assert found == data.digest(array.copy())
    for i in (0, data.STEP, len(array) - 1):
        changed = array.copy()
        changed.view(np.uint8)[i * 8] ^= 1
        assert data.digest(changed) != found
    swapped = array.copy()
    swapped[:512], swapped[data.STEP : data.STEP + 512] = array[data.STEP : data.STEP + 512], array[:512]
    assert data.digest(swapped) != found


@pytest.mark.parametrize(("kind", "least", "most"), [("1:1", 1.0, 1.15), ("2:1", 1.9, 2.2), ("6:1", 5.5, 7.0)])
def test_data_compresses_as_its_name_says(kind: str, least: float, most: float) -> None:
    stored = workloads.Packed(6 * data.STEP)
    data.Filler(kind).fill(stored)  # type: ignore[arg-type]
    assert least < stored.values * 8 / sum(map(len, stored.chunks.values())) < most
    pieces = [stored[i : i + data.STEP] for i in range(0, stored.values, data.STEP)]
    assert len({piece.tobytes()[:65536] for piece in pieces}) == len(pieces), "no folio is another one's copy"


# ---- programs ----


EVERY_PROGRAM = """
import importlib.util, json, sys
from dataclasses import asdict, replace
from userswap.bench import workloads
for name, workload in workloads.WORKLOADS.items():
    if not all(map(importlib.util.find_spec, workload.needs)):
        continue
    for threads in (1, 2):
        # Two steps of what has steps; no step takes so long.
        spec = workloads.Spec("", name, 18 << 20, 20 << 20, "2:1", threads, sys.argv[1], seconds=1e9, most=2)
        for memory in workload.runs_on:
            if threads == 1 or memory not in ("blosc2", "packed"):
                this = replace(spec, memory=memory, reference=memory == "plain")
                print(json.dumps([name, threads, memory, asdict(workloads.run(this))]))
        if threads == 2:
            continue
        print(json.dumps([name, threads, "one step", asdict(workloads.run(replace(spec, memory="plain", most=1)))]))
        print(json.dumps([name, threads, "other", asdict(workloads.run(replace(spec, memory="plain", data="6:1")))]))
"""


@pytest.fixture(scope="module")
def every_program() -> dict[tuple[str, int], dict[str, Any]]:
    """What each program found everywhere, by (name, threads) and memory; in a process whose BLAS has one thread."""
    done = python("-c", EVERY_PROGRAM, "/var/tmp", env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}, timeout=400)
    assert done.returncode == 0, done.stderr
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for name, threads, memory, run in map(json.loads, done.stdout.splitlines()):
        found.setdefault((name, threads), {})[memory] = run
    return found


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", WORKLOADS)
def test_a_program_does_the_same_everywhere(
    name: str, threads: int, every_program: dict[tuple[str, int], dict[str, Any]]
) -> None:
    if name == "groupby":
        pytest.importorskip("pandas")
    found = dict(every_program[name, threads])
    plain = found["plain"]
    units = min(WORKLOADS[name].most, 2)
    assert list(plain["results"]) == [*map(str, range(1, units + 1))]
    assert plain["results"][str(units)] == plain["result"]
    if threads == 1:
        other, one_step = found.pop("other"), found.pop("one step")
        assert plain["results"]["1"] == one_step["result"]
        assert units == 1 or one_step["result"] != plain["result"], "a step less is seen"
        assert name == "suffix ranks" or other["result"] != plain["result"], "the result depends on the data"
    assert {"plain", "userswap"} <= set(found)
    for memory, run in found.items():
        assert run["result"] == plain["result"], memory
        assert run["seconds"] > 0
        assert run["amount"] == plain["amount"] > 0
        assert run["units"] == units
        assert run["marks"][str(units)] == run["seconds"]
        assert sorted(run["marks"].values()) == [*run["marks"].values()]
    ours = found["userswap"]["figures"]
    assert 0 <= ours["fault_ns_p50"] <= ours["fault_ns_p90"] <= ours["fault_ns_p99"] <= ours["fault_ns_p99.9"]
    assert found["userswap"]["figures"]["peak_virtual_bytes"] > 14 * MIB, "its arrays are in the pool"


# ---- dividing memory ----


def test_pool_and_limit_together_are_the_total() -> None:
    zram = CONTENDERS["zram lz4"]
    fits = plan(zram, 100 * MIB, 150 * MIB, 0.5, Path("/"), charged=False)
    assert fits.beside == 50 * MIB
    assert 100 * MIB - fits.beside + (150 * MIB - 50 * MIB) * 0.5 == 100 * MIB
    assert fits.holds > 150 * MIB, "nothing has to go to the file"
    ends = plan(zram, 100 * MIB, 400 * MIB, 0.5, Path("/"), charged=False)
    assert ends.beside == ends.pool == 50 * MIB
    assert ends.holds == 2 * ends.pool
    for name in ("swap file", "memmap"):
        assert plan(CONTENDERS[name], 100 * MIB, 400 * MIB, 0.5, Path("/"), charged=False).beside == 0
    assert plan(CONTENDERS["zswap"], 100 * MIB, 400 * MIB, 0.5, Path("/"), charged=True).beside == 0


def test_zswap_is_limited_in_whole_per_cents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contenders, "kibibytes", lambda name: 10_000 * MIB)
    some = plan(CONTENDERS["zswap"], 512 * MIB, 2048 * MIB, 0.6, Path("/"), charged=False)
    assert (some.percent, some.pool, some.beside, some.most) == (2, 200 * MIB, 200 * MIB, 0)
    least = plan(CONTENDERS["zswap"], 64 * MIB, 256 * MIB, 0.6, Path("/"), charged=False)
    assert (least.percent, least.beside, least.most) == (1, 32 * MIB, 32 * MIB), "the kernel can't be told: we hold it"


def test_the_limit_follows_the_pool() -> None:
    class Fake:
        def __init__(self) -> None:
            self.limits: list[int] = []

        def try_limit(self, size: int) -> bool:
            self.limits.append(size)
            return True

    fake: Any = Fake()
    watched = runs.Watched(fake, kernelswap.Swap(), 64 * MIB, base=MIB, limit=33 * MIB, follows=32 * MIB)
    watched.follow(40 * MIB, 72 * MIB)
    assert fake.limits == [25 * MIB], "too much: at once"
    watched.lately = watched.looks = 0
    for _ in range(runs.LOOKS - 1):
        watched.follow(20 * MIB, 44 * MIB)
    assert len(fake.limits) == 1, "too little: not at once"
    watched.follow(20 * MIB, 44 * MIB)
    assert fake.limits[1:] == [27 * MIB], "in small steps"
    watched.follow(64 * MIB, 98 * MIB)
    assert fake.limits[2:] == [9 * MIB], "something is left in place"


def test_zswap_is_held_to_less_than_the_kernel_can_be_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "enabled").write_text("Y")
    monkeypatch.setattr(kernelswap, "ZSWAP", tmp_path)
    swap = kernelswap.ZswapSwap(100)
    for used, enabled in ((99, "Y"), (100, "N"), (95, "N"), (89, "Y"), (95, "Y")):
        monkeypatch.setattr(swap, "pool", lambda used=used: kernelswap.Pool(used, 0))
        swap.keep()
        assert (tmp_path / "enabled").read_text() == enabled, used


# ---- the command ----


def tiny(*more: str) -> list[str]:
    return ["bench", "compare", "--ram", "32M", "--rounds", "1", *more]


def test_contenders_take_turns() -> None:
    options = compare.Options([], ["zswap", "plain", "userswap"], [], [], [], 1, 1, Path("/"))
    case = Case("scan", 2.0, "2:1", 1)
    assert compare.turns(options, case, 1) == ["plain", "userswap", "zswap"]
    found = compare.turns(options, replace(case, overcommit=0.5), 0)
    assert found == [
        "zswap", "plain", "userswap", "plain", "userswap", "userswap", "plain", "plain", "userswap"
    ], "plain and userswap in turns"  # fmt: skip
    assert [compare.turned(["a", "b", "c"], turn) for turn in (0, 1, 5)] == [
        ["a", "b", "c"],
        ["b", "c", "a"],
        ["c", "a", "b"],
    ]


def test_a_comparison(tmp_path: Path, capsys: Any, nothing_stays: None) -> None:
    files = [tmp_path / name for name in ("found.json", "found.csv", "found.png")]
    options = [word for file in files for word in (f"--{file.suffix[1:].replace('png', 'plot')}", str(file))]
    chosen = ["plain", "userswap", "zram lz4", "decompress"]
    code = main.main(tiny("--workload", "scan,fill", "--contender", ",".join(chosen), *options))
    shown = capsys.readouterr().out
    assert code == 0, shown
    told = json.loads(files[0].read_text())
    by = {(s["workload"], s["contender"]): s for s in told["samples"]}
    assert {("scan", "plain"), ("scan", "userswap"), ("fill", "userswap"), ("scan", "decompress")} <= set(by)
    assert {(n["workload"], n["contender"]): n["why"] for n in told["not_run"]}["fill", "decompress"]
    for s in by.values():
        assert s["figure"] == pytest.approx(s["run"]["amount"] / s["run"]["seconds"] / 1e9)
        plain = by[s["workload"], "plain"]["run"]
        assert s["run"]["result"] == plain["results"][str(s["run"]["units"])] is not None
    plain, ours = by["scan", "plain"], by["scan", "userswap"]
    assert 64 * MIB < plain["used"] < 100 * MIB
    assert ours["used"] < 40 * MIB
    assert ours["run"]["swapped_in"] > 30 * MIB * ours["run"]["units"], "each pass is over twice the memory"
    assert ours["run"]["figures"]["fault_ns_p99.9"] > 0
    if os.geteuid() == 0:
        theirs = by.get(("scan", "zram lz4"))
        if theirs:
            assert theirs["used"] == pytest.approx(32 * MIB, rel=0.15)
            assert theirs["pool"] > MIB
            assert theirs["run"]["swapped_in"] > 30 * MIB * theirs["run"]["units"]
        else:
            assert "Not run: zram lz4 (all):" in shown
    assert "Not run: decompress (fill): it is the limit of a scan alone" in " ".join(shown.split())
    assert "scan, of what Blosc2 decompresses" in shown
    with files[1].open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(told["samples"]) + len(told["not_run"])
    assert float(rows[0]["seconds"]) == told["samples"][0]["run"]["seconds"]
    assert files[2].read_bytes().startswith(b"\x89PNG")


@needs_root
@pytest.mark.parametrize("name", ["zswap", "swap file", "memmap", "zram lzo-rle"])
def test_contenders_that_need_root(name: str, capsys: Any, nothing_stays: None) -> None:
    runner = runs.Runner(Path("/var/tmp"), runs.Stop())
    spec = Spec("plain", "update", 64 * MIB, 32 * MIB)
    first = runner.attempt(CONTENDERS["plain"], replace(spec, reference=True), None)
    contender = CONTENDERS[name]
    expected = runs.Expected(first.run.results, first.run.units, first.used)
    try:
        with runs.alone(runner.stop):
            seen = runner.attempt(contender, replace(spec, memory=contender.memory), expected)
    except runs.NotPossible as error:
        pytest.skip(f"not on this machine: {error}")
    assert seen.run.result == first.run.results[str(seen.run.units)]
    assert seen.limit > 0
    assert seen.used == pytest.approx(32 * MIB, rel=0.2)
    assert seen.capped == (name == "zswap" and machine("0").memory_bytes > 100 * 16 * MIB)
    if name == "memmap":
        assert seen.run.swapped_in == 0
    else:
        assert seen.run.swapped_in > 16 * MIB


def test_without_root_what_needs_it_is_shown_as_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, nothing_stays: None
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert main.main(["bench", "compare", "--ram", "32M", "--rounds", "1", "--workload", "update"]) == 0
    shown = capsys.readouterr().out
    names = "zswap, zram lz4, zram lzo-rle, swap file, memmap"
    assert f"Not run: {names} (all): needs root" in " ".join(shown.split())
    for name in names.split(", "):
        assert any(name in line and line.rstrip().endswith("not run") for line in shown.splitlines()), name
    for name in ("plain", "userswap", "blosc2"):
        assert any(name in line and "GB/s" in line for line in shown.splitlines()), name


def test_a_wrong_result_ends_it(monkeypatch: pytest.MonkeyPatch, capsys: Any, nothing_stays: None) -> None:
    right = runs.Runner.process

    def wrong(self: runs.Runner, spec: Spec, watched: Any) -> workloads.Run:
        run = right(self, spec, watched)
        return replace(run, result=run.result + 1) if spec.memory == "userswap" else run

    monkeypatch.setattr(runs.Runner, "process", wrong)
    assert main.main(tiny("--workload", "fill", "--contender", "plain,userswap")) == 2
    assert capsys.readouterr().err == "userswap: The result of fill under userswap is wrong: please report this.\n"


@needs_root
def test_a_program_that_fails_leaves_nothing(nothing_stays: None) -> None:
    runner = runs.Runner(Path("/var/tmp"), runs.Stop())
    spec = Spec("plain", "no such program", 32 * MIB, 32 * MIB)
    for name in ("zram lz4", "zswap"):
        with runs.alone(runner.stop), pytest.raises(runs.NotPossible, match=r"no such program|needs|kernel"):
            runner.attempt(CONTENDERS[name], spec, runs.Expected({}, 1, 32 * MIB))


def test_userswap_that_fails_is_not_passed_over(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    right = runs.Runner.process

    def failing(self: runs.Runner, spec: Spec, watched: Any) -> workloads.Run:
        if spec.memory == "userswap":
            raise runs.NotPossible("it failed: exit code -7")
        return right(self, spec, watched)

    monkeypatch.setattr(runs.Runner, "process", failing)
    assert main.main(tiny("--workload", "fill", "--contender", "plain,userswap")) == 1
    out, err = capsys.readouterr()
    assert "Not run: userswap (all): it failed: exit code -7" in out
    assert "exit code -7" in err


@needs_root
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_nothing(number: signal.Signals, nothing_stays: None) -> None:
    words = ["--contender", "swap file,zswap", "--workload", "scan", "--ram", "64M", "--rounds", "50"]
    process = subprocess.Popen(
        [sys.executable, "-m", "userswap", "bench", "compare", *words], stdout=subprocess.PIPE, text=True
    )
    until = time.monotonic() + 60
    while not left_behind()["swap"] and process.poll() is None:
        assert time.monotonic() < until
        time.sleep(0.02)
    if process.poll() is not None:
        pytest.skip("no swap file can be made here")
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Stopped by a signal" in out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--workload", "none"], "--workload: there is no 'none', only fill, scan"),
        (["--contender", "zfs"], "--contender: there is no 'zfs'"),
        (["--data", "3:1"], "--data: there is no '3:1'"),
        (["--overcommit", "x"], "--overcommit x: write for example"),
        (["--overcommit", "0"], "--overcommit must be"),
        (["--threads", "0"], "--threads must be"),
        (["--rounds", "0"], "--rounds must be 1 or more"),
        (["--ram", "1M"], "--ram must be 32 MiB or more"),
        (["--ram", "900G"], "must also fit into"),
        (["--json", "/nowhere/x"], "--json /nowhere/x can't be written"),
    ],
)
def test_bad_options(words: list[str], said: str, capsys: Any) -> None:
    assert main.main(["bench", "compare", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("userswap: ")
    assert said in err


def test_which_measurement() -> None:
    assert "compare" in userswap("bench", "--help").stdout
    assert "There is no measurement 'scan', only compare, faults, overhead, dedupe" in userswap("bench", "scan").stderr


# ---- what is said of the figures ----


def made_up(**seconds: float) -> Results:
    """Results of a scan, in so many seconds each."""
    options = compare.Options(["scan"], list(seconds), [2.0], ["2:1"], [1], 1, 32 * MIB, Path("/"))
    results = Results(options, machine("0"), "now")
    case = Case("scan", 2.0, "2:1", 1)
    for name, time_taken in seconds.items():
        figures: dict[str, int] = {"fault_ns_p50": 10, "fault_ns_p99": 50}
        run = workloads.Run(
            time_taken, 1e9, time_taken / 2, 0.0, 10**9, 10**9, 0.0, 1, 1, {"1": time_taken}, figures=figures
        )
        none, zswap = kernelswap.Pool(0, 0), name == "zswap"
        seen = runs.Seen(run, 32 * MIB, none, none, 0, killed=int(zswap), lifted=2 * int(zswap))
        results.samples.append(Sample.of(case, name, 0, seen))
    return results


def test_bars_are_judged() -> None:
    def judged(results: Results) -> dict[str, tuple[str, bool | None]]:
        return {verdict.what: (verdict.measured, verdict.met) for verdict in bars.verdicts(results)}

    met = judged(made_up(plain=0.1, userswap=1.0, zswap=21.0, decompress=0.9))
    assert met["scan, by zswap"] == ("21x", True)
    assert met["scan, of what Blosc2 decompresses"] == ("90%", True)
    assert met["scan, p99 of a fault, by its p50"] == ("5.0x", False)
    assert met["scan, CPU s by GB"] == ("0.23", True)  # (0.5 - 0.05) s by 2 GB
    assert met["nothing slower than the kernel's best; worst: scan, 2x, 2:1, 1 thread"] == ("21x", True)
    missed = judged(made_up(plain=0.1, userswap=1.0, zswap=0.5, decompress=0.5))
    assert missed["scan, by zswap"] == ("0.5x", False)
    assert missed["scan, of what Blosc2 decompresses"] == ("50%", False)
    assert missed["scan, CPU s by GB"][1] is False
    assert missed["nothing slower than the kernel's best; worst: scan, 2x, 2:1, 1 thread"] == ("0.5x", False)
    assert not judged(made_up(plain=0.1))


@pytest.mark.parametrize(
    ("ratios", "measured", "met"),
    [
        ([1.0, 1.001, 0.999, 1.0, 1.002], "1.000x (1.00..1.00)", True),
        ([1.2, 1.21, 1.19, 1.2, 1.2], "1.200x (1.19..1.21)", False),
        ([0.9, 1.1, 1.0, 0.95, 1.2], "1.000x (0.90..1.20)", None),
        ([1.0, 1.0, 1.0], "1.000x (1.00..1.00)", None),
    ],
)
def test_a_small_difference_is_told_only_where_it_can_be(ratios: list[float], measured: str, met: bool | None) -> None:
    results = made_up()
    for ratio in ratios:
        for sample in made_up(plain=1.0, userswap=ratio).samples:
            results.samples.append(replace(sample, overcommit=0.5))
    results.options.overcommit[:] = [0.5]
    [verdict] = bars.when_it_fits(results)
    assert (verdict.measured, verdict.met) == (measured, met)


def test_two_are_compared_at_what_both_have_done() -> None:
    results = made_up(userswap=1.0, zswap=21.0)
    ours = results.samples[0]
    # Slow at first, and fast later on: of no help where the other has done one unit.
    marks = {"1": 1.0, "2": 1.1, "4": 1.2}
    results.samples[0] = replace(ours, run=replace(ours.run, seconds=1.2, amount=4e9, units=4, marks=marks))
    assert results.times(Case("scan", 2.0, "2:1", 1), "zswap") == 21.0


def test_processor_time_is_that_beyond_the_program_s_own_for_as_much() -> None:
    results = made_up(plain=0.4, userswap=1.0)
    plain = results.samples[0]
    results.samples[0] = replace(plain, run=replace(plain.run, amount=4e9, units=4, marks={"1": 0.1, "4": 0.4}))
    # 0.5 s for 1 GB of work, of which the program itself takes a quarter of 0.2 s; 2 GB were swapped.
    assert results.cpu_by_gb(Case("scan", 2.0, "2:1", 1), "userswap") == pytest.approx(0.225)


def test_percentiles() -> None:
    times = [0] * 320
    times[5], times[16], times[17] = 50, 49, 1
    assert [percentile(times, share) for share in (50, 90, 99, 99.9)] == [5, 17, 17, 19]
    assert percentile([0] * 320, 50) == 0


def test_what_the_table_has_no_room_for_is_said() -> None:
    results = made_up(plain=0.1, userswap=1.0, zswap=21.0)
    assert any("Killed by the kernel" in note and "zswap 1 in scan" in note for note in report.notes(results))
    assert any("limit lifted: zswap 2 times in scan" in note for note in report.notes(results))
    assert not any("could not be held" in note or "less of the same" in note for note in report.notes(results))
    results.samples[-1] = replace(results.samples[-1], used=40 * MIB)
    assert any("could not be held to it: zswap in scan (1.25 of it)" in note for note in report.notes(results))
    results.samples[-1] = replace(results.samples[-1], capped=True)
    assert any("off and on again" in note for note in report.notes(results))
    of = results.samples[-1].run
    results.samples[-1] = replace(results.samples[-1], run=replace(of, units=2, marks={"1": 21.0, "2": 22.0}))
    assert any("less of the same" in note for note in report.notes(results))
    results.samples[-1] = replace(results.samples[-1], used=20 * MIB, pool=MIB)
    assert any(
        note.startswith("Had less than they might: zswap in scan (0.62 of it)") for note in report.notes(results)
    )
    results.not_run.append(NotRun("scan", 2.0, "2:1", 1, "memmap", "needs root"))
    assert results.why_not(Case("scan", 2.0, "2:1", 1), "memmap") == "needs root"
    assert json.loads(json.dumps(results.as_json()))["not_run"][0] == asdict(results.not_run[0])


# ---- faults ----


def test_faults_by_kind(tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    done = userswap("bench", "faults", "--size", "32M", "--rounds", "1", "--json", str(file))
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert set(found["kinds"]) == set(faults.KINDS)
    for name, kind in found["kinds"].items():
        if name == "write to clean" and kind["faults"] == 0:
            continue  # frames that were moved are not protected: no fault
        assert 0 < kind["handler_us"] < kind["p50_us"] + kind["around_us"]
        assert kind["p50_us"] <= kind["p99_us"] <= kind["p99.9_us"]
        assert kind["faults"] + kind["others"] == 512, "32 MiB of folios"
        assert kind["faults"] > (0 if "evicting" in name else 480)
        assert f" {report.digits(kind['p50_us'])} " in done.stdout
    assert set(found["breakdown_us"]) == {line for line in found["breakdown_us"] if line in done.stdout}


def test_bad_options_of_faults(capsys: Any) -> None:
    for words, said in (
        (["--size", "1M"], "--size must be 32 MiB or more"),
        (["--rounds", "0"], "--rounds must be 1 or more"),
        (["--data", "x"], "--data: there is no 'x'"),
    ):
        assert main.main(["bench", "faults", *words]) == 2
        assert said in capsys.readouterr().err


# ---- overhead ----


def test_overhead_of_programs_and_of_a_start(tmp_path: Path) -> None:
    file = tmp_path / "overhead.json"
    programs = "scan,matrix,sort,temporaries,churn,growth"
    done = userswap(
        "bench", "overhead", "--program", programs, "--size", "64M", "--rounds", "1", "--json", str(file)
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert list(found["pairs"]) == programs.split(",")
    for [plain, ours] in (pair for [pair] in found["pairs"].values()):
        assert plain["result"] == ours["result"] != 0
        assert min(plain["cpu_seconds"], ours["cpu_seconds"], plain["peak"]) > 0
    [[plain, ours]] = found["pairs"]["scan"]
    assert 64 * MIB < plain["peak"] < ours["peak"] < plain["peak"] + 32 * MIB
    assert all(name in done.stdout for name in programs.split(","))
    assert "Bars: 2% of CPU time, 0.1% of memory, 60 ms of start" in done.stdout
    [[numpy, start]] = found["starts"]
    assert 0 < numpy < start


def test_bad_options_of_overhead(capsys: Any) -> None:
    for words, said in (
        (["--size", "1M"], "--size must be 64 MiB or more"),
        (["--size", "9T"], "say less"),
        (["--rounds", "0"], "--rounds must be 1 or more"),
        (["--program", "dance"], "there is no 'dance', only scan, matrix"),
    ):
        assert main.main(["bench", "overhead", *words]) == 2
        assert said in capsys.readouterr().err
