"""What goes to the swap file and what stays in zswap: only what doesn't fit goes round, and what is hot comes back."""

from __future__ import annotations

import json

import pytest

from helpers import run_python
from support import only_quiet

FOLIO = 1 << 16

PROGRAM = """
import json, sys
import numpy as np, userswap
from userswap.bench.data import Filler

VALUES = 8192                                   # of a folio
folios, kind = int(sys.argv[1]), sys.argv[2]
pool = userswap.Pool(ram="48MiB", children=os.environ.get("CHILDREN", "share"))
array = pool.empty(folios * VALUES)
filler = Filler("2:1")
filler.fill(array)
wanted = np.empty(folios * VALUES)
filler.fill(wanted)
order = np.random.default_rng(5).permutation(folios)

def reads():
    return next(int(line.split()[1]) for line in open("/proc/self/io") if line.startswith("syscr"))

def update(first, last):
    for i in range(first, last):
        array[i * VALUES:(i + 1) * VALUES] += 1
        wanted[i * VALUES:(i + 1) * VALUES] += 1

def write(first, last):
    # one value of each, in an order that is no folio's neighbour: read, and then written to
    for i in order:
        if first <= i < last:
            array[i * VALUES + 5] += 1
            wanted[i * VALUES + 5] += 1

def store(first, last):
    # the same, but every fault is a write
    for i in order:
        if first <= i < last:
            array[i * VALUES + 7] = i + len(passes)
            wanted[i * VALUES + 7] = i + len(passes)

def read(first, last):
    for i in range(first, last):
        assert array[i * VALUES:(i + 1) * VALUES].sum() == wanted[i * VALUES:(i + 1) * VALUES].sum()

passes = []
def turn(work, first, last):
    before, was = pool.stats(), reads()
    work(first, last)
    after = pool.stats()
    passes.append({"writebacks": after.writebacks - before.writebacks, "reads": reads() - was,
                   "outs": after.swap_outs + after.part_outs - before.swap_outs - before.part_outs,
                   "slots": after.slot_bytes, "stored": after.stored_bytes})

BODY
assert pool._core.check()["wrong"] == 0
assert all((array[i:i + 1 << 20] == wanted[i:i + 1 << 20]).all() for i in range(0, len(wanted), 1 << 20))
print(json.dumps(passes))
"""


def passes(
    body: str, folios: int, kind: str = "", frames: str = "move", children: str = "share"
) -> list[dict[str, int]]:
    """What each `turn` of the program counted."""
    code = f"import os; os.environ |= {{'USERSWAP_FRAMES': {frames!r}, 'CHILDREN': {children!r}}}\n" + PROGRAM.replace(
        "BODY", body
    )
    result = run_python(code, str(folios), kind)
    assert result.returncode == 0, result.stderr
    counted: list[dict[str, int]] = json.loads(result.stdout)
    return counted


@only_quiet
@pytest.mark.parametrize("frames", ["move", "copy"])
@pytest.mark.parametrize("kind", ["update", "write", "store"])
def test_only_what_does_not_fit_goes_round(kind: str, frames: str) -> None:
    """Over and over the same: what was stored longest ago is what is wanted next, so the file must not take that."""
    folios = 1600  # 100 MiB, about 50 packed
    counted = passes("for _ in range(4):\n    turn(globals()[kind], 0, folios)\n", folios, kind, frames)
    # A part that is read first and then written to is read for that, and with the others once more to be stored.
    times = 2 if (kind, frames) == ("write", "move") else 1
    shares = [one["slots"] / one["stored"] for one in counted]
    for one, before, after in zip(counted[1:], shares, shares[1:], strict=False):
        assert 0.1 < after < 0.5, "some of it fits, and not all"
        # What was in the file at the start comes from there, and as much goes: a turn may begin with more than that.
        share = max(before, after)
        assert one["writebacks"] < (share + 0.15) * folios
        assert one["reads"] < times * (share + 0.1) * folios + 100
    # By chance a tenth and more in one turn; not in each. Whoever goes by age alone writes all of it, each time.
    assert sum(one["writebacks"] for one in counted[1:]) < (sum(shares[1:]) + 0.1 * len(shares[1:])) * folios
    # Not each time: while parts make room for parts, a few whole folios stay for a turn, by chance more than a tenth.
    assert sum(one["outs"] for one in counted[1:]) > 0.9 * folios * len(counted[1:]), "all of it went through"


def test_a_hot_set_that_is_in_the_file_moves_to_zswap() -> None:
    """After going round for a while, the program stays with a part of it: first writing, then only reading."""
    folios = 1600
    quarter = folios // 4
    counted = passes(
        "for _ in range(2):\n    turn(update, 0, folios)\n"
        "for _ in range(4):\n    turn(update, 0, folios // 4)\n"
        "for _ in range(4):\n    turn(read, folios // 2, folios * 3 // 4)\n",
        folios,
    )
    for kind, first in ("update", 2), ("read", 6):
        came = counted[first : first + 4]
        # What of a window lies in a row is one read.
        assert sum(one["reads"] for one in came[:3]) > quarter // 16, f"{kind}: some of it was in the file"
        assert came[3]["reads"] < quarter // 10, f"{kind}: still read from the file"
        assert came[3]["writebacks"] < quarter // 3, f"{kind}: and nothing else has to go for it"


def test_a_scan_of_more_than_fits_moves_nothing() -> None:
    """What would be gone again before it comes back is no reason to write something else to the file."""
    counted = passes("turn(update, 0, folios)\nfor _ in range(3):\n    turn(read, 0, folios)\n", 1600)
    for one in counted[2:]:
        assert one["slots"] > 0.1 * one["stored"], "a part is in the file"
        assert one["reads"] > 10, "and comes from there, what lies in a row at once"
        assert one["writebacks"] < 100
        assert one["outs"] < 100


def test_cold_ones_in_a_forked_child() -> None:
    """What was to go to the file next, goes to the file of each."""
    # Each with a budget of its own: how much goes there if they share one hangs on which of them is faster.
    body = """
turn(update, 0, folios)
turn(update, 0, folios)
child = os.fork()
for _ in range(2):
    turn(update, 0, folios)
if child == 0:
    assert pool._core.check()["wrong"] == 0
    assert (array[::4096] == wanted[::4096]).all()
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""
    counted = passes(body, 1200, children="own")
    assert counted[3]["writebacks"] < 900
