"""When there is nowhere to go: a full disk, no swap file, `hard`. Nothing is lost, and the user is told once."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from helpers import check_pool, data, fresh_pool, run_python

MIB = 1 << 20


@contextlib.contextmanager
def small_disk(tmp_path: Path, mib: int) -> Iterator[Path]:
    """A real file system of its own, so that it can be filled."""
    if os.geteuid() != 0:
        pytest.skip("mounting a file system needs root")
    image, mount = tmp_path / "disk", tmp_path / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(mib * MIB)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", image], check=True)
    if subprocess.run(["mount", "-o", "loop", image, mount], check=False).returncode != 0:
        pytest.skip("loop mounts are not allowed here")
    try:
        yield mount
    finally:
        subprocess.run(["umount", "-l", mount], check=True)


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
        import time

        time.sleep(0.3)
        for _ in range(3):
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
