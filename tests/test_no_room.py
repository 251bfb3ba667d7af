"""When there is nowhere to go: a full disk, no swap file, `hard`. Nothing is lost, and the user is told once."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from helpers import FOLIO, check_pool, data, fresh_pool, run_python
from support import small_disk
from userswap import _core, numpy_hook
from userswap.swap.map import BOUND

MIB = 1 << 20

# in runs of slots that are looked for, and in those that are ids
by_home = pytest.mark.parametrize("design", ["on_demand", *sorted(BOUND)])


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting file systems needs root")
def test_a_full_disk_loses_nothing_warns_once_and_writeback_resumes(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with small_disk(tmp_path, 24) as mount:
        ballast = mount / "ballast"
        ballast.write_bytes(b"x" * (12 * MIB))
        pool = fresh_pool("16MiB", swap=str(mount))
        arrays = [pool.array(data("noise", MIB, i)) for i in range(40)]
        for i, array in enumerate(arrays):
            assert np.array_equal(array, data("noise", MIB, i))
        full = check_pool(pool)
        assert full.over_budget > 0
        assert full.resident_bytes > 16 * MIB
        text = capfd.readouterr().err
        assert text.count("userswap:") == 1
        assert "No space left on device" in text
        assert "nothing is lost" in text
        ballast.unlink()
        os.sync()
        time.sleep(0.3)
        for _ in range(3):
            pool.zeros(FOLIO, np.uint8)[0] = 1  # a fault, in case all of the arrays are in place
            for i, array in enumerate(arrays):
                assert np.array_equal(array, data("noise", MIB, i))
        after = check_pool(pool)
        assert after.slot_bytes > full.slot_bytes, "there is room again, and it is used"
        del arrays, array
        pool.close()


def test_without_a_swap_file_the_budget_is_exceeded_with_one_warning(
    capfd: pytest.CaptureFixture[str],
) -> None:
    pool = fresh_pool("16MiB", swap="none")
    arrays = [pool.array(data("noise", MIB, i)) for i in range(32)]
    mixed = [pool.array(data("walk", MIB, i)) for i in range(8)]
    for i, array in enumerate(arrays):
        assert np.array_equal(array, data("noise", MIB, i))
    for i, array in enumerate(mixed):
        assert np.array_equal(array, data("walk", MIB, i))
    assert capfd.readouterr().err.count("userswap:") == 1
    check_pool(pool)


def test_hard_ends_the_program_with_a_clear_message() -> None:
    code = """
import numpy as np, userswap
pool = userswap.Pool(ram="16MiB", swap="none", hard=True)
arrays = [pool.array(np.random.default_rng(i).bytes(1 << 20)) for i in range(32)]
arrays = [pool.array(np.random.default_rng(i).integers(0, 255, 1 << 20, dtype="u1")) for i in range(32)]
print("not reached")
"""
    result = run_python(code)
    assert result.returncode == 137
    assert result.stdout == ""
    assert "--hard" in result.stderr
    assert "Traceback" not in result.stderr


FAILING = """
import errno, os, resource, time, numpy as np, userswap
from helpers import FOLIO, check_empty, check_pool, data, fresh_pool
def most(size):
    "From here on no write may go beyond this offset of any file."
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size if size >= 0 else hard, hard))
def out(pool): pool.evict(); pool.evict()
"""


@by_home
def test_a_failed_writeback_leaves_everything_where_it_was(design: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In zswap, readable, movable, with no slot taken; and it works again when the device does."""
    monkeypatch.setenv("USERSWAP_MAP", design)
    code = (
        FAILING
        + """
pool = fresh_pool()
arrays = [pool.array(data("walk", 4 * FOLIO, i)) for i in range(16)]
out(pool)
before = pool.stats()
most(3 * 4096)
for turn in range(2):
    try:
        pool.writeback()
        raise SystemExit("written?")
    except OSError as error:
        assert error.errno in ((errno.EFBIG,) if turn == 0 else (errno.ENOSPC, errno.EFBIG)), error
after = check_pool(pool)
assert (after.slot_bytes, after.stored_bytes, after.writebacks) == (0, before.stored_bytes, 0)
for i, array in enumerate(arrays):
    assert np.array_equal(array, data("walk", 4 * FOLIO, i))
    array[0] ^= 1                                       # and the copy can be given up
out(pool)
pool._core.compact()                                    # and moved
most(-1)
time.sleep(0.15)                                        # a device that failed is left alone for a moment
assert pool.writeback() > 0
assert check_pool(pool).slot_bytes > 0
for i, array in enumerate(arrays):
    expected = data("walk", 4 * FOLIO, i); expected[0] ^= 1
    assert np.array_equal(array, expected)
arrays.clear(); del array
check_empty(pool)
"""
    )
    result = run_python(code, timeout=60)
    assert result.returncode == 0, result.stderr


@by_home
def test_a_folio_that_cannot_be_stored_stays_in_place_writable(design: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USERSWAP_MAP", design)
    code = (
        FAILING
        + """
pool = fresh_pool()
array = pool.array(data("noise", 16 * FOLIO, 1))
most(5 * 16 * 4096)                                     # five incompressible folios fit
out(pool)
time.sleep(0.15)
out(pool)
stats = check_pool(pool)
assert stats.slot_bytes == stats.stored_bytes == stats.swapped_bytes, stats
assert stats.resident_bytes == array.nbytes - stats.slot_bytes > 8 * FOLIO
array ^= 255
assert np.array_equal(array, data("noise", 16 * FOLIO, 1) ^ 255)
most(-1)
time.sleep(0.15)
out(pool)
assert check_pool(pool).resident_bytes == 0
assert np.array_equal(array, data("noise", 16 * FOLIO, 1) ^ 255)
del array
check_empty(pool)
"""
    )
    result = run_python(code, timeout=60)
    assert result.returncode == 0, result.stderr


def test_writeback_takes_the_short_runs_that_are_left(tmp_path: Path) -> None:
    """A file in pieces: no run is as long as writeback likes best, yet there is room."""
    pool = fresh_pool(swap=f"{tmp_path}:2M")
    arrays = [pool.array(data("noise", FOLIO, i)) for i in range(32)]
    for _ in range(2):
        pool.evict()
    assert pool.stats().slot_bytes == 2 * MIB
    del arrays[0::4], arrays[0::3]  # two of four
    packed = [pool.array(data("walk", FOLIO, i)) for i in range(60)]
    for _ in range(2):
        pool.evict()
    free = 2 * MIB - pool.stats().slot_bytes
    assert free == MIB
    assert pool.writeback(free // 2) >= free // 2
    assert all(np.array_equal(array, data("walk", FOLIO, i)) for i, array in enumerate(packed))
    check_pool(pool)


def test_what_zswap_has_no_address_space_for_goes_to_slots_packed(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_TMPFILE | os.O_RDWR)
    core = _core.Core(
        limit=64 * MIB, design="sparse", address_space=2 * MIB, slots_bytes=0, hard=False, encrypt=False, dedupe=True,
        background=False, apart=False,
    )  # fmt: skip
    core.swapon(fd, 64 * MIB, "here", "", 0, 1)
    handler = numpy_hook.new_handler(core)
    model = data("walk", 12 * MIB, 1)
    array = numpy_hook.call_with_handler(handler, 0, np.array, model)
    for _ in range(2):
        core.evict(1 << 62)
    stats = core.stats()
    assert stats["resident_bytes"] == 0
    assert 0 < stats["pool_bytes"] <= 2 * MIB
    # 6 MiB packed, of which zswap's segment holds some 64 folios of 192: which, depends on their sizes
    assert 3 * MIB < stats["slot_bytes"] < 8 * MIB, "packed, in as few slots as they need"
    assert np.array_equal(array, model)
    del array
    assert core.stats()["slot_bytes"] == core.stats()["stored_bytes"] == 0


@pytest.mark.parametrize("frames", ["move", "copy"])
def test_an_instruction_that_needs_two_folios_never_had_both(frames: str) -> None:
    """Nothing but these two could leave, so each came at the price of the other, for ever."""
    code = """
import sys, time
from ctypes import memmove
import numpy as np, userswap
pool = userswap.Pool(ram="16MiB", swap="none")
rng = np.random.default_rng(1)
walk = pool.array(np.arange(64 << 13))
packed = pool.empty((1024, 1 << 16), np.uint8)      # 2:1, takes most of the budget
for i in range(len(packed)):
    packed[i] = rng.integers(0, 16, 1 << 16, np.uint8)
    if i % 4 == 3:
        while pool.evict(): pass
        s = pool.stats()
        if s.resident_bytes + s.pool_bytes + s.metadata_bytes > pool.ram - (10 << 16): break
noise = pool.empty((12, 1 << 16), np.uint8)         # can leave for nowhere
edge = walk.ctypes.data + 31 * 65536
into = np.zeros(8)
most = 0
for row in noise:
    row[:] = rng.integers(0, 256, 1 << 16, np.uint8)
    time.sleep(0.05)                                # so that reclaim does not rest
    before = pool.stats().faults
    for turn in range(8):
        memmove(into.ctypes.data, edge - 21, 64)
    most = max(most, pool.stats().faults - before)
print(most, pool._core.check()["wrong"], pool.stats().swap_ins > 1)
"""
    prefix = f"import os, faulthandler\nos.environ['USERSWAP_FRAMES'] = {frames!r}\n"
    result = run_python(prefix + "faulthandler.dump_traceback_later(60, exit=True)\n" + code)
    assert result.returncode == 0, result.stderr
    most, wrong, came = result.stdout.split()
    assert (wrong, came) == ("0", "True")
    assert int(most) <= 32, "each time both come, at most"
