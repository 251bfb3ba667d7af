"""What `make examples` runs: the programs that need nothing but NumPy and pandas, small; and what its runner says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from rich.console import Console

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import real_programs  # noqa: E402
from real_programs import Example, ExampleError, run_example  # noqa: E402

CONSOLE = Console(width=130)
# Has 64 MiB for longer than a look at its memory is apart from the next, and then does what it is told.
PROGRAM = """
import os, signal, sys, time
data = bytearray(int(sys.argv[2]))
data[::4096] = b"x" * len(data[::4096])
print("begins", flush=True)
time.sleep(0.5)
swapped = "userswap" in sys.modules
{}
"""


@pytest.mark.parametrize(("name", "scale"), [("orders", 0.06), ("serving", 0.25)])
def test_results_are_the_same_in_a_third_of_the_memory(name: str, scale: float) -> None:
    example = next(one for one in real_programs.EXAMPLES if one.name == name)
    report = run_example(example, scale, CONSOLE, in_cgroup=False)
    assert report.plain.lines == report.swapped.lines
    assert len(report.plain.lines) >= 4
    assert 3 * report.budget < report.plain.peak
    assert report.swapped.stats["budget_bytes"] == report.budget
    assert report.swapped.stats["swap_outs"] > 100


def made_up(directory: Path, monkeypatch: pytest.MonkeyPatch, code: str, needs: tuple[str, ...] = ()) -> Example:
    """Put a program where the examples are."""
    (directory / "made_up.py").write_text(PROGRAM.format(code))
    example = Example("made_up", "a program", needs, "--bytes", 64 << 20, ("--bytes", "1"))
    monkeypatch.setattr(real_programs, "PROGRAMS", directory)
    monkeypatch.setattr(real_programs, "EXAMPLES", (example,))
    monkeypatch.setattr(real_programs, "why_no_cgroup", lambda: "a test")
    monkeypatch.setattr(sys, "argv", ["real_programs.py"])
    return example


def test_another_result_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up(tmp_path, monkeypatch, "print('result', swapped)")
    assert real_programs.main() == real_programs.EXIT_DIFFERENT
    said = capsys.readouterr().out
    assert "made_up, line 2: 'result False' plain, 'result True' under userswap" in said
    assert "DIFFERENT" in said


def test_a_line_that_is_missing_is_another_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up(tmp_path, monkeypatch, "swapped or print('the end')")
    assert real_programs.main() == real_programs.EXIT_DIFFERENT
    assert "made_up, line 2: 'the end' plain, nothing under userswap" in capsys.readouterr().out


def test_a_program_that_dies_under_userswap_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up(tmp_path, monkeypatch, "swapped and os.kill(os.getpid(), signal.SIGKILL)")
    assert real_programs.main() == real_programs.EXIT_CANNOT
    said = capsys.readouterr().out
    assert "a program, under userswap was ended by signal 9" in said
    assert "1 of the programs could not be run to the end." in said


def test_what_is_not_installed_is_left_out_and_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made_up(tmp_path, monkeypatch, "pass", ("a_module_that_is_not_there",))
    assert real_programs.main() == real_programs.EXIT_CANNOT
    assert "a program: not run, as a_module_that_is_not_there is not installed." in capsys.readouterr().out


def test_too_little_data_for_a_third_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = made_up(tmp_path, monkeypatch, "pass")
    with pytest.raises(ExampleError, match=r"a third is no room for it\. Give it more data with --scale"):
        run_example(example, 0.1, CONSOLE, in_cgroup=False)
