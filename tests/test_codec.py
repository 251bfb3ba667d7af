"""Folios packed as one chunk and in parts: every way to take them apart gives the same bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from helpers import FOLIO, data, fresh_pool
from userswap.backends import codec

PART = FOLIO // 4
RECIPES = 9


def folios(seed: int) -> list[bytes]:
    """One of each kind: numbers of all sizes, runs, text, parts that are alike, parts that do not compress."""
    rng = np.random.default_rng(seed)
    kinds: list[npt.NDArray[Any]] = [
        data("walk", FOLIO, seed),
        data("small", FOLIO, seed),
        rng.integers(0, 2, FOLIO).astype(np.uint8),
        rng.integers(0, 300, FOLIO // 2).astype(np.uint16),
        np.sort(rng.integers(0, 1 << 30, FOLIO // 4)).astype(np.int32),
        (rng.integers(0, 1 << 20, FOLIO // 8) * 16 + 0x7F0000000000),
        np.full(FOLIO, seed % 256, np.uint8),
        np.zeros(FOLIO, np.uint8),
        np.full(FOLIO // 8, np.nan),
        np.concatenate(
            [data("same", PART, 0), data("walk", PART, seed), data("noise", PART, seed), data("small", PART, 1)]
        ),
        np.frombuffer((b"the quick brown fox %d " % seed * 4000)[:FOLIO], np.uint8),
    ]
    return [kind.tobytes() for kind in kinds]


@pytest.fixture(autouse=True, scope="module")
def _pool() -> None:
    fresh_pool()  # loads Blosc2


@pytest.mark.parametrize("recipe", range(RECIPES))
def test_parts_are_cut_out_and_replaced_without_a_changed_byte(recipe: int) -> None:
    cut = tried = 0
    for seed in range(12):
        rng = np.random.default_rng(1000 * recipe + seed)
        for plain in folios(seed):
            _, packed = codec.compress(plain, recipe)
            if packed is None:
                continue
            pieces = [plain[i : i + PART] for i in range(0, FOLIO, PART)]
            assert codec.decompress(packed, FOLIO) == plain
            for _ in range(3):
                assert [codec.part(packed, i) for i in range(4)] == pieces
                mask = rng.integers(1, 16)
                fresh = folios(int(rng.integers(100)))[int(rng.integers(10))]
                given = [fresh[i * PART : (i + 1) * PART] if mask >> i & 1 else None for i in range(4)]
                pieces = [new or old for new, old in zip(given, pieces, strict=True)]
                try:
                    packed, kept = codec.replace(packed, given, recipe)
                except OSError:
                    break  # hardly compresses now
                assert codec.decompress(packed, FOLIO) == b"".join(pieces)
                cut += kept
                tried += given.count(None)
    assert tried > 30
    assert cut > tried // 2, "what was not written to is not packed again"


def test_a_damaged_folio_is_not_replaced_in_silence() -> None:
    plain = folios(3)[0]
    _, packed = codec.compress(plain, 2)
    assert packed is not None
    given: list[bytes | None] = [plain[:PART], None, None, None]
    for length in (0, 10, 40, 100, len(packed) - 1):
        with pytest.raises(OSError, match="damaged"):
            codec.replace(packed[:length], given, 2)
    parts, _ = codec.replace(packed, given, 2)
    for length in (0, 10, 40, 100, len(parts) - 1):
        with pytest.raises(OSError, match="damaged"):
            codec.replace(parts[:length], given, 2)
        with pytest.raises(OSError, match="damaged"):
            codec.decompress(parts[:length], FOLIO)


def test_of_a_folio_of_numbers_no_recipe_wins_that_is_slow_and_hardly_better() -> None:
    """Of walks, a quarter went to LZ4 alone, which then served a thousand folios: twice the time, a tenth more room."""
    walks = [data("walk", FOLIO, seed).tobytes() for seed in range(60)]
    chosen = [codec.compress(walk, -1) for walk in walks]
    names = {name for name, _ in chosen}
    assert names <= {"lz4 bitshuffle 8", "lz4 bitshuffle 8 split"}, names
