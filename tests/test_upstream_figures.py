"""What kernel developers published about the memory of their designs comes out of memory really allocated here."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

# MiB of metadata of a 32 GiB swap file in front of which zswap takes everything, at 0 / 25 / 50 / 75 / 100 % use.
PUBLISHED = [("swap_table", (25, 57, 89, 121, 153))]


@pytest.mark.parametrize(("design", "mib"), PUBLISHED)
def test_metadata_of_a_32_gib_swap_file_as_published(design: str, mib: tuple[int, ...]) -> None:
    program = f"""
        import numpy as np
        from userswap.swap.map import Map, ZSWAP, entry
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096
        slots = 8_388_608
        step = slots // 4
        Map({design!r}, slots=512, slot_run=1).run("alloc", np.arange(512, dtype=np.uint64), entry(ZSWAP, 1))
        holders = np.arange(step, dtype=np.uint64)
        before = resident()
        m = Map({design!r}, holders=slots, slots=slots, slot_run=1)
        for i, mib in enumerate({mib!r}):
            if i:
                m.run("alloc", holders, entry(ZSWAP, 1 + i * step))
                holders += np.uint64(step)
            words = i * step * 8                                # the window's own table of holders
            for name, found in ("metadata", m.metadata()), ("resident", resident() - before - words):
                assert abs(found / 2**20 - mib) <= 0.02 * mib, (name, i, found / 2**20, mib)
        assert m.ids() == slots
    """
    environment = os.environ | {"USERSWAP_CHAOS": "0"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=300, env=environment)
