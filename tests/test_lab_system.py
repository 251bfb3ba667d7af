"""The whole system under each design: every design is run, results are compared, and a wrong one is not passed over."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from userswap.cli import main
from userswap.errors import LabError
from userswap.lab import system, workloads
from userswap.swap.map import DESIGN_NAMES

TINY = system.Size(18 << 20, 16 << 20)


def test_every_design_does_real_work() -> None:
    seen: list[str] = []
    report = system.measure(DESIGN_NAMES, TINY, 1, seen.append)
    assert list(report) == [system.IN_RAM, *DESIGN_NAMES]
    assert len(seen) == len(report)
    for design, found in report.items():
        assert list(found) == list(workloads.WORKLOADS)
        for runs in found.values():
            [run] = runs
            assert run["seconds"] > 0
            if design == system.IN_RAM:
                assert run["map_bytes"] == run["metadata_bytes"] == run["swap_ids"] == 0
            else:
                assert 20 < run["swap_ids"] <= TINY.array // 65536 * 4
                assert 4096 <= run["map_bytes"] < run["metadata_bytes"] < TINY.ram


def test_a_workload_is_the_same_in_a_pool_and_in_ram(tmp_path: Path) -> None:
    plain = workloads.run(None, TINY.array, TINY.ram, "")
    swapped = workloads.run(DESIGN_NAMES[0], TINY.array, TINY.ram, f"{tmp_path}:64M")
    for name, run in plain.items():
        assert run["result"] == swapped[name]["result"]
    assert len({run["result"][1] for run in plain.values()}) == len(plain), "each does something else to its array"
    assert plain["sort"]["result"][0] is True
    assert len(set(plain["scan"]["result"][0])) == 1, "each scan finds the same sum"
    assert len(set(plain["snapshots"]["result"][0])) == 3, "each snapshot is of another moment"


class Children:
    """Stands in for the processes: what they would print, and the order in which they are asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.wrong_under: str | None = None
        self.prints: str | None = None

    def __call__(self, command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        assert command[1:3] == ["-m", "userswap.lab.workloads"]
        self.asked.append(command[3])
        result = [1, 2 if command[3] == self.wrong_under else 3]
        seconds = float(len(self.asked))
        runs = {"scan": {"seconds": seconds, "result": result, "map_bytes": 1, "metadata_bytes": 2, "swap_ids": 3}}
        text = json.dumps(runs) if self.prints is None else self.prints
        return subprocess.CompletedProcess(command, 1, text, "Traceback:\nSwapError: the last line\n")


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> Children:
    stand_in = Children()
    monkeypatch.setattr(subprocess, "run", stand_in)
    return stand_in


def test_designs_take_turns(children: Children) -> None:
    report = system.measure(["a", "b"], TINY, 3, lambda text: None)
    assert children.asked == ["", "a", "b", "a", "b", "", "b", "", "a"]
    assert [run["seconds"] for run in report["a"]["scan"]] == [2, 4, 9]
    figures = system.figures(report, TINY, 3)
    assert figures["designs"]["a"]["scan"]["seconds"] == {"median": 4, "least": 2, "most": 9}
    assert figures["size"] == {"array": TINY.array, "ram": TINY.ram}


def test_a_wrong_result_is_not_passed_over(children: Children) -> None:
    children.wrong_under = "b"
    with pytest.raises(LabError, match="result of scan under b is wrong"):
        system.measure(["a", "b"], TINY, 1, lambda text: None)


def test_a_process_that_fails_is_named(children: Children) -> None:
    children.prints = ""
    with pytest.raises(LabError, match=r"could not run under in RAM \(SwapError: the last line\)"):
        system.measure(["a"], TINY, 1, lambda text: None)


def test_no_place_for_a_swap_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(system, "default_places", lambda: [Path("/proc"), Path("/nowhere/at/all")])
    with pytest.raises(LabError, match=r"no place for a swap file \(.*; /nowhere.*\): set TMPDIR"):
        system.measure(["sparse"], TINY, 1, lambda text: None)


def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(system, "QUICK", TINY)
    written = tmp_path / "figures.json"
    arguments = ["--quick", "--rounds", "1", "--designs", "sparse", "--json", str(written)]
    assert main.main(["lab", "system", *arguments]) == 0
    shown = capsys.readouterr().out
    told = json.loads(written.read_text())
    assert list(told["designs"]) == [system.IN_RAM, "sparse"]
    assert told["rounds"] == 1
    assert "18 MiB of arrays in 16 MiB of RAM" in shown
    for name, figures in told["designs"]["sparse"].items():
        assert re.search(rf"{name} +│ +{figures['seconds']['median']:.3f} ", shown)
        assert f" {figures['map_bytes']['median'] / 1024:,.0f} " in shown


def test_the_command_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, children: Children, capsys: Any) -> None:
    children.wrong_under = "sparse"
    assert main.main(["lab", "system", "--quick"]) == 2
    assert capsys.readouterr() == ("", "userswap: The result of scan under sparse is wrong: please report this.\n")
    for arguments in (["--rounds", "0"], ["--designs", "wrong"], ["--designs", ""], ["extra"]):
        assert main.main(["lab", "system", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("userswap: ")
