"""What `userswap bench dedupe` says comes from what pools did, and a wrong array is not passed over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from userswap.bench import dedupe
from userswap.bench.data import Array
from userswap.cli import main
from userswap.errors import LabError

TINY = dedupe.Size(20 << 20, 16 << 20, 4 << 20, 6, 16 << 20)
FOLIOS = TINY.copied >> 16


def test_the_command_measures_cost_and_gain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    monkeypatch.setattr(dedupe, "QUICK", TINY)
    written = tmp_path / "figures.json"
    assert main.main(["bench", "dedupe", "--quick", "--rounds", "3", "--json", str(written)]) == 0
    shown = capsys.readouterr().out
    told = json.loads(written.read_text())
    assert told["rounds"] == 3
    for updates in told["update"].values():
        assert len(updates["seconds"]) == len(updates["cpu_seconds"]) == 3
        assert min(updates["seconds"]) > 0
        assert updates["swap_outs"] > 100, "an update that fits would say nothing"
    ratios = [
        on / off - 1 for on, off in zip(told["update"]["on"]["seconds"], told["update"]["off"]["seconds"], strict=True)
    ]
    assert told["cost"]["seconds"] == {"median": sorted(ratios)[1], "least": min(ratios), "most": max(ratios)}
    on, off = told["copies"]["on"], told["copies"]["off"]
    assert (on["swap_ids"], on["deduped"]) == (FOLIOS, 5 * FOLIOS)
    assert (off["swap_ids"], off["deduped"]) == (6 * FOLIOS, 0)
    assert off["packed"] == pytest.approx(6 * on["packed"], rel=0.01)
    assert on["packed"] <= on["zswap"] + on["file"]
    for text in ("20 MiB in 16 MiB", "6 copies of 4 MiB in 16 MiB", f"{on['packed'] / 2**20:.1f}"):
        assert text in shown


def test_what_changed_an_array_is_not_passed_over(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def wrong(array: Array) -> float:
        array += 1
        array[12345] = np.nextafter(array[12345], 0)
        return 0.0

    monkeypatch.setattr(dedupe, "QUICK", TINY)
    monkeypatch.setattr(dedupe, "update", wrong)
    with pytest.raises(LabError, match="other values"):
        dedupe.measure(TINY, 1, None, lambda text: None)
    assert main.main(["bench", "dedupe", "--quick", "--rounds", "1"]) == 2
    assert capsys.readouterr().err == "userswap: An array has other values than were put into it: please report this.\n"


def test_what_makes_no_sense_is_refused(capsys: Any) -> None:
    for arguments in (["--rounds", "0"], ["--json", "/nowhere/at/all"], ["extra"]):
        assert main.main(["bench", "dedupe", *arguments]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("userswap: ")
