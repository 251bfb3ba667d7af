"""The keyed sum that says whether a folio was written to: every kind that this processor can do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from userswap.native.sum import kinds, sum_by, used

FOLIO = 1 << 16
KIB = 1 << 10
HEADER = Path(__file__).parent.parent / "src" / "userswap" / "native" / "sum.h"


@pytest.fixture(params=kinds())
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def folio(seed: int = 0) -> bytearray:
    return bytearray(np.random.default_rng(seed).bytes(FOLIO))


def changed(kind: str, data: bytearray, first: int, new: bytes) -> None:
    """Other bytes from `first` on make another sum, and the old ones the old sum again."""
    before = sum_by(kind, data)
    old = bytes(data[first : first + len(new)])
    assert old != new
    data[first : first + len(new)] = new
    assert sum_by(kind, data) != before, first
    data[first : first + len(new)] = old
    assert sum_by(kind, data) == before


def test_the_widest_vectors_are_used() -> None:
    assert used() == kinds()[-1]
    flags = Path("/proc/cpuinfo").read_text().split()
    wide = "vpclmulqdq" in flags
    assert ("clnh 256" in kinds()) == (wide and "avx2" in flags)
    assert ("clnh 512" in kinds()) == (wide and "avx512f" in flags)
    assert kinds()[0] == "nh"


@pytest.mark.parametrize("fill", [0, 0x55, 0xFF, None])
def test_any_bit_counts(kind: str, fill: int | None) -> None:
    data = folio() if fill is None else bytearray([fill]) * FOLIO
    # Every byte of the first, a middle and the last block, and one of every word of all others; all bits in turn.
    places = {*range(KIB), *range(33 * KIB, 34 * KIB), *range(63 * KIB, 64 * KIB), *range(0, FOLIO, 8)}
    sums = {sum_by(kind, data)}
    for turn, at in enumerate(sorted(places)):
        data[at] ^= 1 << turn % 8
        sums.add(sum_by(kind, data))
        data[at] ^= 1 << turn % 8
    assert len(sums) == len(places) + 1


def test_any_byte_counts_whatever_it_becomes(kind: str) -> None:
    data = folio(1)
    for at in (0, 7, 8, 15, 16, 63, 64, 1023, 1024, 40_000, FOLIO - 1):
        for value in range(256):
            if value != data[at]:
                changed(kind, data, at, bytes([value]))


@pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 256, KIB, 4 * KIB, FOLIO // 2])
def test_places_count(kind: str, size: int) -> None:
    """Neighbours of any size that change places make another sum: words, pairs, lanes, vectors, blocks, pages."""
    data = folio(2)
    for at in range(0, FOLIO - 2 * size + 1, max(2 * size, FOLIO // 16)):
        one, other = bytes(data[at : at + size]), bytes(data[at + size : at + 2 * size])
        changed(kind, data, at, other + one)


def test_every_length_has_a_sum_of_its_own(kind: str) -> None:
    for data in (folio(3), bytearray(FOLIO)):
        sums = [sum_by(kind, memoryview(data)[:length]) for length in range(KIB, FOLIO + 1, KIB)]
        assert len(set(sums)) == len(sums)
        short = memoryview(data)[:KIB]
        for at in range(KIB):
            short[at] ^= 0x80
            assert sum_by(kind, short) != sums[0]
            short[at] ^= 0x80


def test_addresses_and_neighbours_do_not_count(kind: str) -> None:
    data = folio(4)
    room = bytearray(2 * FOLIO)
    for shift in range(0, 128, 8):
        room[:] = bytes([shift]) * len(room)
        room[shift : shift + FOLIO] = data
        assert sum_by(kind, memoryview(room)[shift : shift + FOLIO]) == sum_by(kind, data)


def test_any_length_any_address(kind: str) -> None:
    """Lengths around those of words, vectors and blocks: each byte counts, what is behind it does not, zeros do."""
    data = folio(5)
    lengths = {at + by for at in (8, 16, 32, 64, 128, 512, KIB, 2 * KIB, 5000, FOLIO) for by in (-9, -1, 0, 1, 7)}
    seen = set()
    for length in sorted(n for n in lengths if 0 < n <= FOLIO):
        view = memoryview(data)[:length]
        before = sum_by(kind, view)
        seen.add(before)
        for at in {0, length // 2, length - 1}:
            view[at] ^= 0x10
            assert sum_by(kind, view) != before, (length, at)
            view[at] ^= 0x10
        room = bytearray(length + 16)
        for shift in (1, 3, 8):
            room[:] = b"\xff" * len(room)
            room[shift : shift + length] = view
            assert sum_by(kind, memoryview(room)[shift : shift + length]) == before, (length, shift)
        if length + 1 <= FOLIO:
            assert sum_by(kind, bytes(view) + b"\0") != before, length
    assert len(seen) == len({n for n in lengths if 0 < n <= FOLIO})


def test_what_a_sum_is_bound_to_counts(kind: str) -> None:
    data = folio(6)
    words = [0, 1, 2, 1 << 16, 1 << 40, 1 << 63, (1 << 64) - 1]
    for length in (1, 40, 48, KIB, 5000):
        view = memoryview(data)[:length]
        sums = {sum_by(kind, view, one, other, True) for one in words for other in words}
        assert len(sums) == len(words) ** 2
        assert sum_by(kind, view, 3, 4, True) == sum_by(kind, view, 3, 4, True)


def test_what_it_can_not_sum_it_refuses(kind: str) -> None:
    for length in (0, FOLIO + 1):
        with pytest.raises(ValueError, match="1 byte to 64 KiB"):
            sum_by(kind, bytearray(length))
    with pytest.raises(ValueError):
        sum_by("crc", bytes(KIB))


def test_every_process_has_a_key_of_its_own() -> None:
    program = "from userswap.native.sum import *; print(*(sum_by(kind, bytes(1024)) for kind in kinds()))"
    command = [sys.executable, "-c", program]
    one, other = (subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for _ in range(2))
    assert len(one) == len(other) == len(kinds())
    assert not set(one) & set(other)


@pytest.mark.skipif(not HEADER.exists(), reason="only with the sources")
def test_other_processors_compile_it(tmp_path: Path) -> None:
    """Without the vector kinds, as on a processor that has no such instruction: it builds, and NH is what is used."""
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler")
    source = tmp_path / "sum.c"
    source.write_text(
        "#include <stdio.h>\n#define US_SUM_PORTABLE\n#include <sum.h>\n"
        "int main(void) { static uint64_t a[8192];\n"
        "  if (us_sum_start() || us_sum_kind != US_SUM_NH || us_sum_can(US_SUM_CLNH_512)) return 1;\n"
        "  uint64_t before = us_sum_by(us_sum_kind, a, sizeof a); a[8191] = 1;\n"
        "  return us_sum_by(us_sum_kind, a, sizeof a) == before; }\n"
    )
    program = str(tmp_path / "sum")
    subprocess.run([compiler, "-Wall", "-Werror", "-I", str(HEADER.parent), "-o", program, str(source)], check=True)
    subprocess.run([program], check=True)
