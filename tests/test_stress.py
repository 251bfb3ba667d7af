"""`make stress`: it finds a wrong byte when there is one, a seed stands for one round, and a short round passes."""

import random
from pathlib import Path

import numpy as np
import pytest
from stress.__main__ import Round, drawn, run
from stress.content import KINDS, WrongByte, bytes_of, cut

from support import python


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrong_byte_is_found_whatever_was_done_to_a_piece(kind: str) -> None:
    rng = random.Random(5)
    piece = cut(np.zeros(100_000, "u1"), "array", rng)[0]
    for step in range(20):
        rng.choice((piece.write, piece.poke, piece.peek, lambda _: piece.add(77)))(rng)
        if step == 10:
            piece.kind, piece.seed, piece.added, piece.pokes = kind, 9, 0, {}
            piece.memory[:] = bytes_of(kind, 9, len(piece.memory))
        assert piece.check() == len(piece.memory)
        place = rng.randrange(len(piece.memory))
        piece.memory[place] ^= 1
        with pytest.raises(WrongByte, match=rf"1 of {len(piece.memory)} bytes are wrong, from {place} to {place}"):
            piece.check()
        piece.memory[place] ^= 1


def test_a_seed_stands_for_one_round() -> None:
    rounds = [drawn(seed, 10, "/nowhere") for seed in range(50)]
    assert rounds == [drawn(seed, 10, "/nowhere") for seed in range(50)]
    said = [str(one) for one in rounds]
    for setting in (
        "--swap none",
        "--tiers file",
        "--encrypt",
        "--no-dedupe",
        "--map",
        "USERSWAP_FRAMES=copy",
        "--threads 1",
        "--threads 4",
    ):
        assert 0 < sum(setting in one for one in said) < 50


def test_a_short_round_passes_and_one_that_fails_says_so(tmp_path: Path) -> None:
    one = Round(3, [*drawn(3, 3, str(tmp_path)).command], {})
    right, done = run(one, 3, tmp_path / "log")
    assert right, (tmp_path / "log").read_text()
    assert done["checked"] > 0
    wrong = Round(3, ["-c", 'import sys; print(\'{"done": {}, "checked": 1}\'); sys.exit(1)'], {})
    assert run(wrong, 3, tmp_path / "log") == (False, {"checked": 1})
    assert not run(Round(3, ["-c", "import os; os.abort()"], {}), 3, tmp_path / "log")[0]


def test_what_failed_is_named_with_the_command_that_runs_it_again(tmp_path: Path) -> None:
    where = Path(__file__).parents[1]
    result = python("-m", "stress", "--rounds", "1", "--directory", str(tmp_path / "missing"), cwd=where)
    assert result.returncode == 2
    assert result.stderr.startswith("Files can't be made in")
    code = f"""
import sys, pathlib
import stress.__main__ as driver
def run(one, seconds, log):
    log.write_text("why")
    return False, {{}}
driver.run = run
sys.argv[1:] = ["--rounds", "2", "--directory", {str(tmp_path)!r}]
sys.exit(driver.main())
"""
    result = python("-c", code, cwd=where)
    assert result.returncode == 1, result.stderr
    assert "Round 1 (seed 1) failed" in result.stdout
    assert "-m stress.program --seed 1" in result.stdout
    assert "why" in result.stderr
    assert not list(tmp_path.glob("userswap-stress-*"))
