"""The lab: all designs and scenarios are in what it says, and what it says is right."""

import csv
import io
import json
import os
import re
import sys
import threading
import time
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from rich.text import Text

from support import python, userswap
from userswap.cli import main as command
from userswap.lab import compare, memory, pool, report, resident, timing, upstream
from userswap.lab.machine import machine
from userswap.lab.resident import Resident
from userswap.swap.map import BOUND, COUNT_MAX, DEBUG, DESIGN_NAMES, SLOT, ZSWAP, Map, entry, slot

PAGES, ROUNDS = 2000, 2
OPTIONS = ("--quick", "--pages", str(PAGES), "--rounds", str(ROUNDS))
QUICK = [name for name, scenario in memory.SCENARIOS.items() if scenario.times == 1]
WITHOUT_DEVICE = [name for name in QUICK if not memory.SCENARIOS[name].device]
ALONE = [name for name in timing.OPERATIONS if not name.startswith("swapoff")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all that one comparison wrote."""
    place = tmp_path_factory.mktemp("lab")
    files = ("--json", str(place / "all.json"), "--csv", str(place / "all.csv"), "--plot", str(place / "all.png"))
    done = userswap("lab", "compare", *OPTIONS, *files, timeout=600)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    (place / "out").write_text(done.stdout)
    return place


@pytest.fixture(scope="module")
def document(place: Path) -> dict[str, Any]:
    """The JSON of that comparison."""
    document: dict[str, Any] = json.loads((place / "all.json").read_text())
    return document


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparisons in this process without the check of books and a full zswap."""
    monkeypatch.setattr(compare, "POOL_OBJECTS", (1000, 1000))
    monkeypatch.setattr(resident, "measure", lambda design, *how: Resident(design, 1, 4096, 4096, 4096, 4096))


# ---- what is written ----


def test_the_json_has_every_figure_of_every_design(document: dict[str, Any]) -> None:
    assert document["options"]["designs"] == list(DESIGN_NAMES)
    assert [(row["scenario"], row["design"]) for row in document["memory"]] == [
        (scenario, design) for scenario in QUICK for design in DESIGN_NAMES
    ]
    operations = {1: list(timing.OPERATIONS), 2: ALONE}
    assert [(row["threads"], row["operation"], row["design"]) for row in document["time"]] == [
        (threads, operation, design)
        for threads in (1, 2)
        for operation in operations[threads]
        for design in DESIGN_NAMES
    ]
    assert [row["design"] for row in document["resident"]] == list(DESIGN_NAMES)
    assert [row["design"] for row in document["everything"]] == list(DESIGN_NAMES)
    assert document["options"]["pages"] == PAGES
    assert document["options"]["seed"] == 1
    assert document["machine"]["processors"] >= 1
    assert document["machine"]["python"] == ".".join(str(part) for part in sys.version_info[:3])
    assert document["default"] == DESIGN_NAMES[0]
    assert document["bound"] == sorted(BOUND)
    assert document["findings"]


def test_the_csv_has_a_line_for_each_figure(place: Path, document: dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO((place / "all.csv").read_text())))
    kept = {(row["kind"], row["name"], row["design"], row["threads"]): row for row in rows}
    assert len(kept) == len(rows) == len(document["memory"]) + len(DESIGN_NAMES) + len(document["time"])
    for row in document["memory"]:
        line = kept["memory", row["scenario"], row["design"], ""]
        assert float(line["value"]) == row["peak"]
        assert line["given_device"] == str(row["given_device"])
        assert line["unit"] == ("bytes/page" if row["pages"] else "KiB")
        assert line["after_half"] == (str(row["left"]) if row["pages"] else "")
    for row in document["time"]:
        line = kept["time", row["operation"], row["design"], str(row["threads"])]
        assert [float(line[name]) for name in ("least", "value", "most")] == [row["least"], row["median"], row["most"]]


def test_the_tables_fit_100_columns_and_have_every_design(place: Path) -> None:
    text = (place / "out").read_text()
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    tables = re.split("^ design ", text, flags=re.MULTILINE)[1:]
    assert len(tables) == 7
    for table in tables:
        for design in DESIGN_NAMES:
            marks = re.findall(rf"^ {design} ([*+]*)", table, re.MULTILINE)
            assert len(marks) == 1, f"{design} has a line in each table"
            assert ("*" in marks[0]) == (design == DESIGN_NAMES[0])
    for table in tables[:3]:
        for design in DESIGN_NAMES:
            assert bool(re.search(rf"^ {design} \*?\+", table, re.MULTILINE)) == (design in BOUND)
    assert "Memory: " in text
    assert "Time, 2 threads: " in text


def test_the_figures_in_the_tables_are_those_of_the_json(place: Path, document: dict[str, Any]) -> None:
    text = (place / "out").read_text()
    places = re.split("^ design ", text, flags=re.MULTILINE)[1]
    for design in DESIGN_NAMES:
        line = re.search(rf"^ {design} [*+ ]*(.*)$", places, re.MULTILINE)
        assert line is not None
        shown = [float(figure) for figure in line[1].split()]
        figures = {row["scenario"]: row["peak"] for row in document["memory"] if row["design"] == design}
        assert shown == [pytest.approx(figures[name], abs=0.006) for name in report.PLACES]


def test_the_best_of_a_column_is_bold() -> None:
    rows = [("a", False, [(2.0, "2", "9-9")]), ("b", False, [(1.0, "1", "8-8")]), ("c", False, [(1.0, "1", "")])]
    cells = [cell for cell in report.table("title", ["x"], rows).columns[1].cells if isinstance(cell, Text)]
    assert [cell.plain.split("\n")[0] for cell in cells] == ["2", "1", "1"]
    assert [cell.style for cell in cells] == ["", "bold", "bold"]


def test_a_picture_is_drawn(place: Path, tmp_path: Path, quickly: None) -> None:
    path = tmp_path / "picture.svg"
    options = ["--designs", "sparse,vswap", "--rounds", "1", "--plot", str(path)]
    assert command.main(["lab", "compare", *OPTIONS, *options]) == 0
    for picture, starts in ((place / "all.png", b"\x89PNG"), (path, b"<?xml")):
        assert picture.read_bytes().startswith(starts)
        assert picture.stat().st_size > 10_000


# ---- what is measured ----


def figures(document: dict[str, Any], design: str) -> dict[str, dict[str, Any]]:
    return {row["scenario"]: row for row in document["memory"] if row["design"] == design}


@pytest.mark.parametrize("design", DESIGN_NAMES)
def test_the_memory_of_a_design_is_plausible(document: dict[str, Any], design: str) -> None:
    rows = figures(document, design)
    for name, row in rows.items():
        scenario = memory.SCENARIOS[name]
        assert row["given_device"] == (design in BOUND and not scenario.device)
        assert row["slots"] == (PAGES if scenario.device or design in BOUND else 0)
        assert 0 < row["idle_bytes"] <= row["peak_bytes"]
        assert row["left_bytes"] <= row["peak_bytes"]
        pages = {"tenth": PAGES // 10, "churn": PAGES // 4}.get(name, 0 if name.startswith("idle") else PAGES)
        assert (row["pages"], row["pages_left"]) == (pages, pages - pages // 2)
        if pages:
            assert row["peak"] == row["peak_bytes"] / pages
            assert row["left"] == row["left_bytes"] / row["pages_left"]
            # nothing that is known needs more than some words and statics, and pages of its own for few ids
            assert row["peak_bytes"] <= PAGES * 128 + (256 << 10)
        else:
            assert row["peak"] == row["peak_bytes"] / 1024
    assert rows["idle, no file"]["peak_bytes"] <= rows["idle"]["peak_bytes"] <= 64 << 10
    assert rows["shared 0 %"]["peak_bytes"] == rows["zswap"]["peak_bytes"]
    assert rows["in order"]["peak_bytes"] == rows["zswap"]["peak_bytes"]
    assert rows["written back 0 %"]["peak_bytes"] >= rows["zswap"]["peak_bytes"]
    for holders in memory.HOLDERS:
        shared = [rows[f"shared {percent} % by {holders}"]["peak_bytes"] for percent in memory.PERCENT]
        assert shared == sorted(shared)
        assert rows["zswap"]["peak_bytes"] <= shared[0]
    assert rows["swap cache"]["peak_bytes"] >= rows["shared 100 % by 2"]["peak_bytes"]


def test_an_id_costs_what_a_design_says_of_itself() -> None:
    """One word each in `sparse`, two when shared; nothing in `on_demand` until shared. Their files say so."""
    pages = 1 << 16
    of = {name: memory.SCENARIOS[name] for name in ("zswap", "shared 100 % by 2")}
    costs = {
        (name, design): memory.measure(of[name], design, pages, 1) for name in of for design in ("sparse", "on_demand")
    }
    assert costs["zswap", "sparse"].peak == pytest.approx(8.2, abs=0.2)
    assert costs["shared 100 % by 2", "sparse"].peak == pytest.approx(16.4, abs=0.3)
    assert costs["zswap", "on_demand"].peak_bytes == costs["zswap", "on_demand"].idle_bytes
    assert costs["shared 100 % by 2", "on_demand"].peak == pytest.approx(8.2, abs=0.2)


@pytest.mark.parametrize("design", DESIGN_NAMES)
def test_scenarios_do_what_they_say(design: str) -> None:
    def subject(name: str) -> memory.Subject:
        result = memory.Subject(design, 1000, 1, device=memory.SCENARIOS[name].device)
        memory.SCENARIOS[name].prepare(result)
        return result

    def types(of: memory.Subject) -> list[int]:
        found = []
        for holder in of.all.tolist():
            word = of.map.lock(holder)
            of.map.unlock(holder, word)
            found.append(word >> 3 & 7)
        return found

    assert types(subject("zswap")) == [ZSWAP] * 1000
    assert types(subject("file")) == [SLOT] * 1000
    half = types(subject("written back 50 %"))
    assert half.count(SLOT) == half.count(ZSWAP) == 500
    assert half[:500].count(SLOT) in range(200, 300), "drawn, not in order"
    shared = subject("shared 10 % by 300")
    counts = [shared.map.count(holder) for holder in range(1000)]
    assert sorted(counts) == [1] * 900 + [300] * 100
    cached = subject("swap cache")
    assert all(cached.map.cached(holder) and cached.map.count(holder) == 2 for holder in range(1000))
    ordered = subject("in order")
    ordered.leave(500, in_order=True)
    assert [bool(ordered.map.id(holder)) for holder in range(1000)] == [False] * 500 + [True] * 500
    shared.leave(1)
    assert shared.map.ids() == 1


def test_memory_figures_come_again_with_the_same_seed(document: dict[str, Any]) -> None:
    drawn = [memory.Subject("sparse", 1000, seed, device=False).some(50).tolist() for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    for name in ("churn", "written back 50 %", "shared 10 % by 8"):
        for design in DESIGN_NAMES:
            again = memory.measure(memory.SCENARIOS[name], design, PAGES, 1)
            assert figures(document, design)[name]["peak_bytes"] == again.peak_bytes
            assert figures(document, design)[name]["left_bytes"] == again.left_bytes


def test_ten_times_the_pages_is_in_a_full_run_only(quickly: None) -> None:
    options = compare.Options(list(DESIGN_NAMES), 1000, 1, 1, False, "random")
    assert [scenario.name for scenario in options.scenarios] == [*QUICK, "ten times"]
    results = compare.measure(options, "", lambda text: None)
    assert {row.pages for row in results.of("ten times").values()} == {10_000}


def test_times_are_medians_with_their_spread(document: dict[str, Any]) -> None:
    for row in document["time"]:
        assert len(row["samples"]) == ROUNDS
        assert 0 < row["least"] <= row["median"] <= row["most"]
        assert (row["least"], row["most"]) == (min(row["samples"]), max(row["samples"]))


def test_designs_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, int, int]] = []

    def one_round(
        design: str, pages: int, seed: int, threads: timing.Threads, *, shuffled: bool, words: int
    ) -> dict[str, float]:
        seen.append((design, threads.number, seed))
        return dict.fromkeys(timing.OPERATIONS, 1.0)

    monkeypatch.setattr(timing, "one_round", one_round)
    names = list(DESIGN_NAMES)
    compare.measure_time(compare.Options(names, 1000, 2, 5, True, "random"), lambda text: None)
    assert seen == [(design, threads, seed) for seed in (5, 6) for threads in (1, 2) for design in names]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shuffled", [False, True])
def test_a_round_leaves_nothing_out(threads: int, shuffled: bool) -> None:
    team = timing.Threads(threads)
    for design in DESIGN_NAMES:
        measured = timing.one_round(design, timing.LEAST_PAGES, 1, team, shuffled=shuffled)
        assert set(measured) == set(timing.OPERATIONS if threads == 1 else ALONE)
        assert all(ns > 0 for ns in measured.values())


class Recorder:
    """In place of a Subject: notes what is asked of its map, with the holders."""

    log: ClassVar[list[tuple[str, list[int], dict[str, Any]]]] = []

    def __init__(self, design: str, pages: int, seed: int, *, device: bool, holders: int, words: int) -> None:
        assert device and words == 64
        self.pages = pages
        self.map = self
        self.log.append(("fresh", [holders // pages], {}))

    def run(self, operation: str, holders: memory.Holders, entry: int, into: Any, **options: Any) -> float:
        self.log.append((operation, holders.tolist(), options | {"into": into, "entry": entry}))
        return float(holders[0])

    def swapoff(self) -> tuple[int, int]:
        return 10, 1000

    def write_back(self, percent: int) -> None:
        self.log.append(("write back", [percent], {}))


@pytest.mark.parametrize("shuffled", [False, True])
def test_what_two_threads_do(monkeypatch: pytest.MonkeyPatch, shuffled: bool) -> None:
    """Each its own half; of shared ids the same ones, through its own holders. Nobody's time is forgotten."""
    monkeypatch.setattr(timing, "Subject", Recorder)
    Recorder.log.clear()
    measured = timing.one_round("sparse", 1000, 1, timing.Threads(2), shuffled=shuffled)
    half = 1000 // 32 * 16
    calls: dict[str, list[tuple[list[int], dict[str, Any]]]] = {}
    for operation, holders, options in Recorder.log:
        if operation not in ("fresh", "write back"):
            assert options["together"] == 2
        calls.setdefault(operation, []).append((holders, options))

    def pair(operation: str, number: int = 0) -> list[list[int]]:
        return sorted((holders for holders, _ in calls[operation][2 * number : 2 * number + 2]), key=min)

    halves = [list(range(half)), list(range(half, 2 * half))]
    for operation in ("alloc", "run"):
        assert pair(operation) == halves, "swapped out in order"
    for operation in ("put", "take", "writeback", "dup", "cache"):
        assert [sorted(part) for part in pair(operation)] == halves
        assert (pair(operation) != halves) == shuffled
    assert [sorted(part) for part in pair("fault")] == halves
    for operation, number in (("fault", 1), ("cached", 0), ("add", 1), ("sub", 0)):
        one, two = pair(operation, number)
        assert sorted(one) == list(range(2 * half))
        assert two == [holder + 2 * half for holder in one], "the same ids in the same order"
    assert {options["references"] for _, options in calls["add"]} == {1, timing.MANY - 2}
    entries = sorted(options["entry"] for _, options in calls["writeback"])
    assert entries == [slot(0, 0, 1), slot(0, half, 1)]
    assert measured["swap-out"] == half, "the last to end counts, not the first"


def test_the_pool_costs_what_its_objects_cost() -> None:
    cost = pool.measure(100_000, 1)
    record = 12 + 2 / 8  # owner and length, and a bit each for allocated and young
    assert record * 0.7 <= cost.each <= record * 1.5
    assert cost.each < cost.headers < 30
    assert 0 < cost.rounding < 0.016 * cost.data, "64 classes to a doubling"
    assert 0 < cost.tables < 2
    assert cost.headers < cost.left_headers < 2 * cost.headers
    assert cost.left_tables == pytest.approx(2 * cost.tables, rel=0.01)
    assert 0 < cost.left_holes <= 0.06 * cost.data
    assert cost.beside == cost.headers + cost.tables


# ---- the check of the books ----


@pytest.mark.parametrize("design", DESIGN_NAMES)
def test_what_maps_say_is_what_is_resident(document: dict[str, Any], design: str) -> None:
    row = Resident(**next(row for row in document["resident"] if row["design"] == design))
    assert row.right
    assert row.peak_bytes > row.pages, "it had something to show"
    assert abs(row.peak_bytes - row.peak_resident) <= 0.02 * row.peak_resident
    assert abs(row.left_bytes - row.left_resident) <= 0.02 * row.left_resident + resident.SLACK


def test_wrong_books_are_said_loudly(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quickly: None
) -> None:
    def lies(design: str, seed: int, words: int = 64) -> Resident:
        return Resident(design, 1, 10 << 20, (10 << 20) + (300 << 10), 1 << 20, 1 << 20)

    assert not lies("sparse", 1).right
    assert not Resident("sparse", 1, 1 << 20, 1 << 20, 10 << 20, 9 << 20).right
    monkeypatch.setattr(resident, "measure", lies)
    assert command.main(["lab", "compare", *OPTIONS, "--designs", "sparse"]) == 1
    shown = capsys.readouterr()
    assert "sparse says it uses 10,485,760 bytes" in shown.err
    assert "Do not believe the memory figures" in shown.out


def test_a_check_that_dies_is_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert command.main(["lab", "compare", *OPTIONS, "--designs", "sparse"]) == 2
    assert "The check of sparse's memory failed" in capsys.readouterr().err


# ---- what is found ----


def results_with(peaks: dict[str, float], ns: dict[str, float]) -> compare.Results:
    """Two invented designs' figures, the same everywhere; `on_demand` is the default."""
    options = compare.Options(list(peaks), 1000, 3, 1, True, "random")
    results = compare.Results(options, machine(""), "")
    for name in QUICK:
        for design, peak in peaks.items():
            row = memory.Memory(name, "", design, 0, False, 1, 1000, int(peak * 1000), 500, int(peak * 1000))
            results.memory.append(row)
    for threads in (1, 2):
        for operation in ALONE:
            for design, median in ns.items():
                samples = [median - 1, median, median + 1]
                results.time.append(timing.Time(operation, "", design, threads, samples))
    results.pool = pool.PoolCost(1000, 1000, 10, 9, 1, 5, 20, 2, 5, 0)
    results.resident = [Resident(design, 1, 100, 100, 100, 100) for design in peaks]
    return results


def test_findings_say_where_the_default_loses() -> None:
    winning = " ".join(results_with({"on_demand": 1, "sparse": 8}, {"on_demand": 10, "sparse": 30}).findings())
    assert f"on_demand needs least in {len(QUICK)} of {len(QUICK)} scenarios." in winning
    assert f"in {len(ALONE)} of {len(ALONE)} operations." in winning
    assert "costs 12.0 bytes with on_demand, 1.0 in the map and 11.0 in the pool" in winning
    assert "within the goal of 24" in winning
    losing = " ".join(results_with({"on_demand": 20, "sparse": 8}, {"on_demand": 30, "sparse": 10}).findings())
    assert f"on_demand needs least in 0 of {len(QUICK)} scenarios; not in idle: 8.0 of sparse against 20.0" in losing
    assert f"in 0 of {len(ALONE)} operations; not in swap-out: 10.0 ns of sparse against 30.0" in losing
    assert "above the goal of 24" in losing
    close = " ".join(results_with({"on_demand": 8, "sparse": 8}, {"on_demand": 11, "sparse": 10}).findings())
    assert f"in {len(ALONE)} of {len(ALONE)} operations." in close, "the spreads overlap"


def test_findings_are_about_what_was_measured(quickly: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["lab", "compare", *OPTIONS, "--designs", "sparse", "--order", "allocation"]) == 0
    text = capsys.readouterr().out
    assert "allocation order" in text
    assert "sparse needs least" in text
    assert "on_demand" not in text
    assert ("debug build" in text) == DEBUG


# ---- upstream ----


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Any]], str]:
    """What `userswap lab upstream` writes and prints."""
    path = tmp_path_factory.mktemp("upstream") / "rows.json"
    done = python("-m", "userswap", "lab", "upstream", "--json", str(path), timeout=600, env=calm())
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def calm() -> dict[str, str]:
    """The environment without injected delays: eight million calls would take hours with them."""
    return {name: value for name, value in os.environ.items() if name != "USERSWAP_CHAOS"}


def test_upstream_has_every_design_on_both_backends(published: tuple[list[dict[str, Any]], str]) -> None:
    rows, text = published
    assert [tuple(row) for row in rows] == [("design", "backend", "use_percent", "metadata_mib")] * len(rows)
    assert [(row["design"], row["backend"], row["use_percent"]) for row in rows] == [
        (design, backend, use)
        for design in DESIGN_NAMES
        for backend in ("zswap", "disk")
        for use in (0, 25, 50, 75, 100)
    ]
    assert max(map(len, text.splitlines())) <= 100
    for design in DESIGN_NAMES:
        assert len(re.findall(rf"^ {design}\b", text, re.MULTILINE)) == 2
    assert len(re.findall("^ published: ", text, re.MULTILINE)) == 4


@pytest.mark.parametrize("design", ["swap_table", "vswap"])
def test_the_published_figures_are_reproduced(published: tuple[list[dict[str, Any]], str], design: str) -> None:
    """32 GiB of swap file, 0 to 100 % of it in use, in MB, as their authors added them up."""
    expected: dict[str, tuple[float, ...]] = {
        "swap_table": (25, 57, 89, 121, 153),
        "vswap": (0, 48.25, 96.5, 144.75, 193),
    }
    rows = [row for row in published[0] if (row["design"], row["backend"]) == (design, "zswap")]
    assert [row["metadata_mib"] for row in rows] == [
        pytest.approx(figure, rel=0.02, abs=0.25) for figure in expected[design]
    ]


def test_figures_that_are_not_as_published_are_said() -> None:
    right = upstream.Row("vswap", "zswap", 100, 193 * 1.019)
    wrong = upstream.Row("vswap", "zswap", 100, 193 * 1.021)
    assert upstream.wrong([right, upstream.Row("vswap", "zswap", 0, 0.2), upstream.Row("sparse", "disk", 0, 99)]) == []
    assert upstream.wrong([wrong]) == ["vswap with zswap at 100 %: 197.05 MiB, published 193"]
    assert len(upstream.wrong([upstream.Row("vswap", "zswap", 0, 0.3)])) == 1
    seen = upstream.off(wrong)
    assert seen is not None
    assert seen[0] == 193
    assert seen[1] == pytest.approx(0.021)
    assert upstream.off(upstream.Row("sparse", "disk", 0, 1)) is None


# ---- bad input ----


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "Say which experiment: compare, upstream"),
        (["measure"], "There is no experiment 'measure', only compare, upstream"),
        (["compare", "--designs", "sparse,radix"], "there is no design 'radix', only on_demand, sparse"),
        (["upstream", "--designs", ""], "there is no design ''"),
        (["compare", "--pages", "999"], "--pages must be 1,000 or more"),
        (["compare", "--pages", "1000000000000"], "of memory, and"),
        (["compare", "--pages", "many"], "invalid int value: 'many'"),
        (["compare", "--rounds", "0"], "--rounds must be 1 or more"),
        (["compare", "--seed", "-1"], "--seed must be 0 or more"),
        (["compare", "--order", "reverse"], "invalid choice: 'reverse'"),
        (["compare", "--plot", "picture.pdf"], "must end in .png or .svg"),
        (["compare", "--json", "/nowhere/all.json"], "--json /nowhere/all.json can't be written: No such file"),
        (["compare", "--csv", "/"], "--csv / can't be written: Is a directory"),
        (["upstream", "--json", "/nowhere/all.json"], "can't be written"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(compare, "measure", None)
    monkeypatch.setattr(upstream, "measure", None)
    assert command.main(["lab", *arguments]) == 2
    shown = capsys.readouterr()
    assert sentence in shown.err
    assert len(shown.err.splitlines()) == 1
    assert shown.out == ""
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_gets_full_is_one_sentence(quickly: None, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["lab", "compare", *OPTIONS, "--designs", "sparse", "--csv", "/dev/full"]) == 2
    assert capsys.readouterr().err == "userswap: /dev/full can't be written: No space left on device.\n"


def test_without_matplotlib_a_plot_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from userswap.cli.main import main; sys.exit(main())"
    done = python("-c", code, "lab", "compare", "--plot", str(tmp_path / "picture.png"))
    assert done.returncode == 2
    assert done.stderr == ("userswap: --plot needs matplotlib, which is not installed: pip install 'userswap[plot]'.\n")


# ---- the window's part ----


def test_references_elsewhere_come_and_go() -> None:
    for design in DESIGN_NAMES:
        swap_map = Map(design, holders=100, slots=100, slot_run=1)
        holders = np.arange(100, dtype=np.uint64)
        swap_map.run("alloc", holders, entry(ZSWAP, 1))
        swap_map.run("add", holders, references=299)
        assert [swap_map.count(holder) for holder in range(100)] == [300] * 100
        swap_map.run("sub", holders[:50], references=299)
        assert [swap_map.count(holder) for holder in (0, 49, 50)] == [1, 1, 300]
        with pytest.raises(ValueError, match="fewer references"):
            swap_map.run("sub", holders, references=2)
        assert swap_map.ids() == 100
        swap_map.run("sub", holders[50:], references=300)
        assert swap_map.ids() == 50
        assert swap_map.id(50) == 0
        with pytest.raises(MemoryError):
            swap_map.run("add", holders[:1], references=COUNT_MAX[design])
        assert swap_map.count(0) == 1


@pytest.mark.parametrize("late", [0, 1])
def test_threads_that_start_together_share_their_start(late: int) -> None:
    swap_map = Map("sparse", holders=2000)
    holders = np.arange(2000, dtype=np.uint64)
    swap_map.run("alloc", holders, entry(ZSWAP, 1))
    ns, ended = [0.0, 0.0], [0.0, 0.0]

    def run(number: int) -> None:
        if number == late:
            time.sleep(0.5)
        ns[number] = swap_map.run("fault", holders[number * 1000 : number * 1000 + 1000], together=2)
        ended[number] = time.monotonic()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(2)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert min(ended) - began >= 0.5, "nobody starts alone"
    assert all(0 < time * 1000 < 0.3e9 for time in ns), "waiting is no part of it"


def test_a_touched_table_has_its_memory_and_keeps_its_ids() -> None:
    holders = 1 << 20
    swap_map = Map("on_demand", holders=holders)
    swap_map.alloc(0, slot(0, 0))
    had = swap_map.id(0)
    before = resident.anonymous()
    swap_map.touch()
    assert resident.anonymous() - before >= holders * 8 * 0.9
    assert swap_map.id(0) == had
    assert swap_map.id(1) == 0
