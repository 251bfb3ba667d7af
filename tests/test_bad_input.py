"""Bad input, all of it: exit code 2, one plain sentence on stderr, and the program never runs."""

import fcntl
import os
from pathlib import Path

import pytest

from support import fill, mounted, small_disk, userswap

PROGRAM = ["-c", "open('it-ran', 'w')"]


def refused(*arguments: str) -> str:
    """Run a command that cannot be carried out; return its sentence."""
    result = userswap(*arguments)
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    [sentence] = result.stderr.splitlines()
    assert sentence.startswith("userswap: ")
    assert sentence.endswith(".")
    assert not Path("it-ran").exists()
    return sentence


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "data").write_text("mine")
    (tmp_path / "secret.py").write_text("print(1)")
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "Say what to do"),
        ([""], "no command"),
        (["frobnicate"], "no command 'frobnicate'"),
        (["script.py"], "userswap run script.py"),
        (["--frobnicate"], "no option --frobnicate"),
        (["doctor", "--frobnicate"], "--frobnicate"),
        (["doctor", "me"], "me"),
        (["run"], "Say what to run"),
        (["run", ""], "Say what to run"),
        (["run", "--ram", "1G"], "Say what to run"),
        (["run", "--"], "Say what to run"),
        (["run", "--ram"], "--ram"),
        (["run", "--frobnicate", "x.py"], "--frobnicate"),
        (["run", "--ra", "1G", "x.py"], "--ra"),
        (["run", "-m"], "Nothing follows -m"),
        (["run", "-c"], "Nothing follows -c"),
        (["run", "missing.py"], "There is no program 'missing.py'"),
        (["run", "python", "x.py"], "leave out the word python"),
        (["run", "python3", "x.py"], "leave out the word python"),
        (["run", "empty"], "without a __main__.py"),
        (["run", "data/x.py"], "Not a directory"),
        (["run", "a\nb"], "There is no program"),
        (["run", "x" * 5000], "name too long"),
        (["run", "--swap", "none", "-m", "no_such_module"], "No module named no_such_module"),
        (["run", "--swap", "none", "-m", "os.path.nothing"], "os.path.nothing"),
        (["run", "--swap", "none", "-m", "email"], "cannot be directly executed"),
        (["run", "--stats", "/nonexistent/stats.json", *PROGRAM], "No such file or directory"),
        (["run", "--stats", "empty", *PROGRAM], "is a directory"),
        (["run", "--stats", "", *PROGRAM], "is a directory"),
        (["run", "--stats", "data/x", *PROGRAM], "Not a directory"),
    ],
)
def test_command_lines(arguments: list[str], says: str) -> None:
    assert says in refused(*arguments)


@pytest.mark.parametrize("size", ["", "12Q", "-1G", "0", "1e9", "lots", "9" * 40, "1.5.5G", "½G", "99999999T"])
@pytest.mark.parametrize("option", ["--ram", "--min-array"])
def test_sizes(option: str, size: str) -> None:
    sentence = refused("run", f"{option}={size}", *PROGRAM)
    assert sentence.startswith(f"userswap: {option}")
    assert "write for example 512M" in sentence


@pytest.mark.parametrize("ram", ["1", "4K", "1M"])
def test_a_budget_too_small_to_run_says_the_least_that_works(ram: str) -> None:
    sentence = refused("run", "--ram", ram, "--swap", "none", *PROGRAM)
    assert "least that works" in sentence
    least = sentence.partition("least that works is ")[2].partition(":")[0].partition(". ")[0].replace(" ", "")
    assert userswap("run", "--quiet", "--ram", least, "--swap", "none", "-c", "pass").returncode == 0


@pytest.mark.parametrize(
    ("swap", "says"),
    [
        ("", "names no path"),
        (":8G", "names no path"),
        ("/nonexistent/swap", "does not exist"),
        ("/nonexistent/", "does not exist"),
        ("/var/tmp:x", "is not a size"),
        ("/var/tmp:0", "less than a byte"),
        ("/var/tmp:-1G", "negative"),
        ("/var/tmp:1K", "at least 2 MiB"),
        ("data", "holds 4 B of data"),
        ("data/x", "not a directory"),
        ("/dev/null", "neither a file nor a directory"),
        ("/proc", "No file can be created"),
    ],
)
def test_swap_places(swap: str, says: str, place: Path) -> None:
    assert says in refused("run", "--ram", "128M", f"--swap={swap}", *PROGRAM)
    assert (place / "data").read_text() == "mine"


def test_a_swap_file_in_use(place: Path) -> None:
    with (place / "swap").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another running program" in refused("run", "--ram", "128M", "--swap", "swap", *PROGRAM)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting file systems needs root")
def test_swap_on_tmpfs(place: Path) -> None:
    with mounted(place / "ram", "-t", "tmpfs", "tmpfs") as ram:
        assert "tmpfs" in refused("run", "--ram", "128M", "--swap", str(ram), *PROGRAM)
        assert "tmpfs" in refused("run", "--ram", "128M", "--swap", f"{ram}/swap:8M", *PROGRAM)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting file systems needs root")
def test_swap_on_a_full_disk(place: Path) -> None:
    with small_disk(place, 16) as disk:
        fill(disk)
        assert "is full" in refused("run", "--ram", "128M", "--swap", str(disk), *PROGRAM)


def test_what_is_not_text_in_arguments() -> None:
    odd = os.fsdecode(b"\xff\xfe.py")
    assert "There is no program" in refused("run", odd)
    assert "is not a size" in refused("run", "--ram", odd, *PROGRAM)
