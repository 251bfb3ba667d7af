"""The figures that vswap's authors give for their metadata, from memory that was really allocated here."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import numpy as np
import pytest

from userswap.swap.map import ZSWAP, Map, entry, slot

IDS = 8_388_608  # a swap file of 32 GiB, in pages of 4 KiB
PUBLISHED = {25: 48.25, 50: 96.5, 75: 144.75, 100: 193.0}  # MiB at so many per cent in use, all of it in zswap


def test_metadata_of_a_swap_file_of_32_gib_is_what_the_authors_say() -> None:
    program = f"""
        import os
        os.environ["USERSWAP_CHAOS"] = "0"
        import numpy as np
        from userswap.swap.map import Map, ZSWAP, entry
        def resident():
            return int(open("/proc/self/statm").read().split()[1]) * 4096
        ids, mib = {IDS}, 1 << 20
        other = Map("vswap", slots=0, slot_run=1)                # its code is in memory from here on
        other.run("alloc", np.arange(1000, dtype=np.uint64), entry(ZSWAP, 1))
        m = Map("vswap", holders=ids, slots=0, slot_run=1)
        holders = np.arange(ids, dtype=np.uint64)
        holders[:] += 0
        empty, before = m.metadata(), resident()
        assert empty <= 16384, "nothing of it is static"
        done = 0
        for percent, published in {PUBLISHED}.items():
            n = ids * percent // 100
            m.run("alloc", holders[done:n], entry(ZSWAP, 1))
            done = n
            dynamic = m.metadata() - empty
            assert abs(dynamic / mib - published) <= 0.02 * published, (percent, dynamic / mib)
            grown = resident() - before - 8 * n                  # without the window's own table of holders
            assert abs(grown - dynamic) <= 0.02 * dynamic, (percent, grown, dynamic)
        m.run("put", holders)
        assert m.metadata() - empty <= 2 * mib, "and it goes back"
        assert resident() - before - 8 * ids <= 4 * mib
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=300)


def test_a_swap_file_has_two_bits_a_slot_from_the_start_and_8_bytes_a_slot_in_use() -> None:
    without = Map("vswap", slots=0, slot_run=1).metadata()
    with_file = Map("vswap", holders=1 << 18, slots=IDS, slot_run=1)
    static = with_file.metadata()
    assert static - without == 2 * IDS // 8
    n = 1 << 18
    holders = np.arange(n, dtype=np.uint64)
    with_file.run("alloc", holders, entry(ZSWAP, 1))
    virtual = with_file.metadata()
    with_file.run("writeback", holders, slot(0, 0, slots=1))
    assert (with_file.metadata() - virtual) / n == pytest.approx(8, rel=0.02)
    with_file.run("writeback", holders, entry(ZSWAP, 1))
    assert with_file.metadata() - virtual <= 64 << 10, "tables without a slot in use go"
