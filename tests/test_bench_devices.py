"""What `userswap bench devices` says comes from what processes did; a wrong byte is not passed over; nothing stays."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support import needs_root, nothing_stays
from userswap import pool as pools
from userswap.bench import device_program, devices, runs
from userswap.bench.data import PAGE, Filler
from userswap.bench.device_program import PHASES, Content, Phase
from userswap.bench.devices import Case, Results
from userswap.cli import main
from userswap.errors import BenchError
from userswap.lab.machine import machine

__all__ = ["nothing_stays"]

MIB = 1 << 20
TINY = replace(devices.QUICK, size=48 * MIB, ram=16 * MIB, seconds=0.05)


def test_the_command_measures_every_phase_of_all_three(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any, nothing_stays: None
) -> None:
    monkeypatch.setattr(devices, "QUICK", TINY)
    written = tmp_path / "figures.json"
    assert main.main(["bench", "devices", "--quick", "--data", "2:1", "--json", str(written)]) == 0
    shown = capsys.readouterr().out
    told = json.loads(written.read_text())
    contenders = set(devices.CONTENDERS) - set(told["not_run"])
    assert "userswap" in contenders
    assert ("kernel" in contenders) == (os.geteuid() == 0), told["not_run"]
    by = {(one["contender"], one["phase"]): one["rounds"] for one in told["phases"]}
    assert by.keys() == {(name, phase) for name in contenders for phase in PHASES}
    for (name, phase), rounds in by.items():
        assert len(rounds) == 1
        assert rounds[0]["seconds"] > 0, (name, phase)
        assert rounds[0]["bytes"] >= 200 * 4096, (name, phase)
        assert (rounds[0]["p99_us"] >= rounds[0]["p50_us"] > 0) == (phase == "read anywhere")
        if phase.endswith("in order"):
            assert rounds[0]["cpu_seconds"] > 0, (name, phase)
    ours = by["userswap", "read in order"][0]
    assert f"{ours['bytes'] / ours['seconds'] / 1e6:,.0f}" in shown
    if "kernel" in contenders:
        assert shown.count("by the kernel's") == 0
        assert shown.count("the kernel's, ") == len(PHASES), "a bar for each phase at 2:1"
    assert any(what.startswith("sum") for what in told["ns_for_each_folio"])
    assert "Every byte was right." in shown


def test_a_run_really_goes_through_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were the array kept compressed in RAM, or in place, the figures would be those of memory."""
    made: list[pools.Pool] = []
    seen: list[Any] = []

    class Noted(pools.Pool):
        def __init__(self, *words: Any, **options: Any) -> None:
            super().__init__(*words, **options)
            made.append(self)

    def answer(what: str) -> int:
        if made:
            seen.append((made[0].stats(), made[0].swaps()[0]))
        return 0

    monkeypatch.setattr(pools, "Pool", Noted)
    monkeypatch.setattr(device_program, "ask", answer)
    swap = f"/var/tmp/userswap-bench-{os.getpid()}.test:96M"
    spec = device_program.Spec("userswap", "2:1", TINY.size, TINY.ram, swap, False, False, 0.05)
    phases = device_program.Program(spec).run()
    assert phases.keys() == PHASES.keys() - {"swapoff"}
    stats, file = seen[0]
    assert stats.pool_bytes < MIB, "nothing is compressed in RAM"
    assert stats.resident_bytes <= TINY.ram
    assert file.used_bytes > (TINY.size - TINY.ram) // 4


def test_a_wrong_byte_ends_it(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    content = Content(Filler("1:1"), np.zeros(3000, np.int64))
    array = np.empty(3000 * PAGE)
    content.filler.fill(array)
    content.check(array)
    content.versions[[7, 2500]] = 1, 3
    with pytest.raises(SystemExit, match="other values"):
        content.check(array)
    for page in (7, 2500):
        array[page * PAGE : (page + 1) * PAGE] = content.row(page)
    content.check(array)
    array[1234567] = np.nextafter(array[1234567], 0)
    with pytest.raises(SystemExit, match="other values"):
        content.check(array)


def test_a_run_that_fails_says_why() -> None:
    spec = device_program.Spec("userswap", "9:1", TINY.size, TINY.ram, "/var/tmp:96M", False, False, 0.05)
    with pytest.raises(BenchError, match=r"The run failed: KeyError: '9:1'"):
        devices.process(spec, devices.Watched(None, None, TINY.ram), runs.Stop())


@needs_root
def test_a_signal_in_a_run_leaves_nothing(monkeypatch: pytest.MonkeyPatch, nothing_stays: None) -> None:
    looked: list[int] = []

    def stopping(self: runs.Stop) -> None:
        looked.append(1)
        if len(looked) > 40:
            raise runs.Stopped("Stopped.")

    monkeypatch.setattr(runs.Stop, "heed", stopping)
    with pytest.raises(runs.Stopped):
        devices.measure(replace(TINY, data=("1:1",), seconds=30.0), ["kernel"], lambda text: None)
    assert len(looked) > 40


def results(kernel: list[float], ours: list[float], phase: str) -> Results:
    """As if measured: seconds for the same work."""
    found = Results(replace(TINY, data=("2:1",)), Path("/"), machine("0"))
    case = Case("2:1", phase)
    found.phases = {
        name: {case: [Phase(seconds, MIB, 0.1) for seconds in all_of]}
        for name, all_of in (("kernel", kernel), ("userswap", ours))
    }
    return found


@pytest.mark.parametrize(
    ("phase", "kernel", "ours", "met"),
    [
        ("read in order", [2.0, 8.0, 4.0], [1.0, 2.0, 2.0], True),
        ("read in order", [1.9], [1.0], False),
        ("swapoff", [4.9], [1.0], False),
        ("swapoff", [5.1], [1.0], True),
    ],
)
def test_bars_are_judged_by_rounds(phase: str, kernel: list[float], ours: list[float], met: bool) -> None:
    verdicts = list(results(kernel, ours, phase).verdicts())
    assert [verdict.met for verdict in verdicts] == [met]
    assert verdicts[0].times == pytest.approx(sorted(a / b for a, b in zip(kernel, ours, strict=True))[len(ours) // 2])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "9:1"], "there are 1:1, 2:1, 6:1"),
        (["--rounds", "0"], "--rounds must be 1 or more"),
        (["--swap", "/nowhere/at/all"], "is no directory"),
        (["--json", "/nowhere/at/all"], "cannot be written"),
    ],
)
def test_what_makes_no_sense_is_refused(words: list[str], said: str, capsys: Any) -> None:
    assert main.main(["bench", "devices", *words]) == 2
    assert said in capsys.readouterr().err


def test_what_has_no_room_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(devices, "available", lambda: 5 * MIB)
    assert main.main(["bench", "devices", "--quick"]) == 2
    assert "of RAM are needed" in capsys.readouterr().err
    monkeypatch.undo()
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=MIB))
    assert main.main(["bench", "devices", "--quick"]) == 2
    assert "has 1 MiB left, and 576 MiB are needed" in capsys.readouterr().err


@pytest.fixture(autouse=True)
def none_of_the_machines_places(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(devices, "default_places", lambda: [Path("/var/tmp")])
    yield
