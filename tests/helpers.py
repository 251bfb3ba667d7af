"""What several tests share: data of known kinds, and what must hold of a pool.

Hundreds of short programs of the tests import it, too, so what takes long to import is imported where it is used."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import userswap
from userswap.swap.map import BOUND

FOLIO = 1 << 16
LEAST = "16MiB"
DELIVERY = os.environ.get("USERSWAP_DELIVERY", "auto")


def fresh_pool(ram: str = LEAST, **options: Any) -> userswap.Pool:
    """A pool of nearly the least budget. USERSWAP_MAP in the environment names another design of the swap map,
    USERSWAP_ENCRYPT=1 encrypts swap files."""
    design = os.environ.get("USERSWAP_MAP", "on_demand")
    if "USERSWAP_ENCRYPT" in os.environ:
        options.setdefault("encrypt", os.environ["USERSWAP_ENCRYPT"] == "1")
    if design in BOUND:
        # Takes memory for every slot, so the file must not be as large as the disk is; and it can't do without one.
        options.setdefault("swap", f"{tempfile.gettempdir()}:512MiB")
        if options["swap"] == "none":
            design = "on_demand"
    return userswap.Pool(ram=ram, **{"map_design": design, **options})


def data(kind: str, n: int, seed: int) -> npt.NDArray[np.uint8]:
    """`n` bytes: incompressible, well compressible, or same-filled."""
    rng = np.random.default_rng(seed)
    if kind == "noise":
        return rng.integers(0, 256, n, dtype=np.uint8)
    if kind == "walk":
        return np.round(np.cumsum(rng.standard_normal(n // 8 + 1)), 2).view(np.uint8)[:n]
    if kind == "small":
        return rng.integers(0, 1000, n // 8 + 1).view(np.uint8)[:n]
    if kind == "same":
        return np.full(n, seed % 7, dtype=np.uint8)
    raise ValueError(kind)


def values(i: int) -> npt.NDArray[np.float64]:
    """1 MiB that compresses well, another for each number: a walk of whole steps, which are quickly drawn."""
    steps = np.random.default_rng(i).integers(-173, 174, 1 << 17, dtype=np.int16)
    return np.cumsum(steps, dtype=np.int64) / 100


def check_pool(pool: userswap.Pool) -> userswap.Stats:
    """Every invariant that can be seen from outside; the pool must be at rest."""
    states = pool._core.check()
    stats = pool.stats()
    assert states["wrong"] == 0
    assert states["ids"] == stats.swap_ids <= states["clean"] + states["swapped"], "every id is held by a word"
    # the last folio of an array may be shorter than a folio
    whole = states["clean"] + states["dirty"] - states["partial"]
    resident = stats.resident_bytes - stats.kept_bytes
    assert (whole - stats.regions) * FOLIO <= resident <= (whole + states["partial"]) * FOLIO
    assert stats.swapped_bytes <= (states["swapped"] + states["partial"]) * FOLIO
    return stats


def check_empty(pool: userswap.Pool) -> None:
    """Nothing is left of any array."""
    stats = check_pool(pool)
    assert stats.regions == stats.virtual_bytes == stats.resident_bytes - stats.kept_bytes == stats.swapped_bytes == 0
    assert stats.swap_ids == 0
    assert stats.slot_bytes == 0
    assert stats.stored_bytes == 0
    pool._core.compact()
    assert pool.stats().pool_bytes <= 1 << 20


def run_python(
    code: str, *args: str, timeout: float = 120, environment: dict[str, str] | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds the same userswap. `environment`: added to ours."""
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, **(environment or {}), "PYTHONPATH": os.pathsep.join(sys.path)},
        **options,
    )


@contextlib.contextmanager
def memory_cgroup(limit: int) -> Iterator[Path]:
    """A memory cgroup of this machine's own kind (v1 or v2), removed after; skips where none can be."""
    import pytest

    v1 = Path("/sys/fs/cgroup/memory")
    v2 = Path("/sys/fs/cgroup")
    if os.geteuid() != 0:
        pytest.skip("making a memory cgroup needs root")
    if (v1 / "memory.limit_in_bytes").exists():
        group, setting = v1 / f"userswap-test-{os.getpid()}", "memory.limit_in_bytes"
    elif (
        "memory" in (v2 / "cgroup.subtree_control").read_text().split()
        if (v2 / "cgroup.subtree_control").exists()
        else False
    ):
        group, setting = v2 / f"userswap-test-{os.getpid()}", "memory.max"
    else:
        pytest.skip("no memory cgroup controller here")
    group.mkdir()
    try:
        (group / setting).write_text(str(limit))
        yield group
    finally:
        for _ in range(100):
            with contextlib.suppress(OSError):  # the kernel takes a moment to let go of a process that has ended
                group.rmdir()
                break
            time.sleep(0.05)
