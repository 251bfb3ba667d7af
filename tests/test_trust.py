"""What is stored is verified: flipped bits, lost writes, writes that went astray, in the swap file and in zswap."""

from __future__ import annotations

import ctypes
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import userswap
from helpers import FOLIO, check_pool, data, fresh_pool
from support import only_moved
from userswap import DataLost

SLOT = 4096
PART = FOLIO // 4
Memory = npt.NDArray[np.uint8]


def stored(path: Path, kind: str, folios: int = 16, **options: Any) -> tuple[userswap.Pool, Memory, Memory]:
    """A pool with an array that is all in the swap file `path`, and a copy of the array."""
    path.touch()
    pool = fresh_pool(swap=f"{path}:64MiB", map_design="on_demand", **{"encrypt": False, **options})
    plain = data(kind, folios * FOLIO, 1)
    memory = pool.array(plain)
    to_file(pool)
    return pool, memory, plain


def to_file(pool: userswap.Pool) -> None:
    pool.evict()
    pool.evict()
    while pool.stats().stored_bytes > pool.stats().slot_bytes:
        pool.writeback()


def fetch(memory: Memory, folio: int) -> Memory | str:
    """The bytes of a folio, or what is said because they are lost."""
    part = memory[folio * FOLIO : (folio + 1) * FOLIO]
    part.flags.writeable = False
    try:
        with userswap.pin(part):
            return part.copy()
    except DataLost as error:
        assert error.errno == 5
        return str(error)


def lost(memory: Memory, plain: Memory) -> list[str]:
    """What is said of those folios of an array that are lost; the others have to be right."""
    said = []
    for folio in range(len(memory) // FOLIO):
        got = fetch(memory, folio)
        if isinstance(got, str):
            said.append(got)
        else:
            assert np.array_equal(got, plain[folio * FOLIO : (folio + 1) * FOLIO]), folio
    return said


def lost_to_child(memory: Memory, plain: Memory) -> list[str]:
    """The same in a forked process: in this one everything stays where it is."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, "\n".join(["what is lost:", *lost(memory, plain)]).encode())
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as pipe:
        text = pipe.read().decode()
    assert text.startswith("what is lost:"), "a byte was wrong"
    return text.splitlines()[1:]


def runs(path: Path) -> list[tuple[int, int]]:
    """First slot and number of slots of each packed folio in a file that has nothing else."""
    image = path.read_bytes()
    starts = [at for at in range(0, len(image), SLOT) if image[at] == 5 and image[at + 4 : at + 8] == b"\0\0\1\0"]
    lengths = [int.from_bytes(image[at + 12 : at + 16], "little") for at in starts]
    return [(at // SLOT, (length + 80 + SLOT - 1) // SLOT) for at, length in zip(starts, lengths, strict=True)]


@pytest.mark.parametrize("kind", ["noise", "small", "walk", "noise, encrypted", "small, encrypted"])
def test_any_flipped_bit_in_the_file_is_found(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "swap"
    pool, memory, plain = stored(path, kind.partition(",")[0], encrypt="encrypted" in kind)
    image = path.read_bytes()
    rng = random.Random(7)
    places = [rng.randrange(len(image) * 8) for _ in range(60)]
    if "noise" not in kind:
        for first, slots in runs(path)[:4]:
            end = (first + slots) * SLOT
            # header, where the blocks are, the first block, and every word of the trailer
            places += [8 * at for at in (first * SLOT, first * SLOT + 12, first * SLOT + 33, first * SLOT + 48)]
            places += [8 * at + 3 for at in range(end - 80, end, 8)]
    found = 0
    with path.open("r+b", buffering=0) as file:
        for place in places:
            at, bit = divmod(place, 8)
            file.seek(at)
            file.write(bytes([image[at] ^ 1 << bit]))
            said = lost_to_child(memory, plain)
            assert len(said) <= 1
            found += len(said)
            assert not said or f"{path}: what is there is not what was stored, bytes have changed (slot " in said[0]
            # In the zeros between a packed folio and its trailer nothing is stored.
            assert said or ("noise" not in kind and image[at] == 0), (at, bit)
            file.seek(at)
            file.write(image[at : at + 1])
    assert found > len(places) // 3
    assert lost(memory, plain) == []
    check_pool(pool)


@pytest.mark.parametrize("kind", ["noise", "small"])
def test_a_lost_write_is_found(tmp_path: Path, kind: str) -> None:
    """The file has what was in these slots before."""
    path = tmp_path / "swap"
    path.touch()
    pool = fresh_pool(swap=f"{path}:2MiB", map_design="on_demand", encrypt=False)
    memory = pool.array(data(kind, 8 * FOLIO, 1))
    to_file(pool)
    image = path.read_bytes()
    plain = data(kind, 8 * FOLIO, 2)
    for _ in range(40):
        # until these slots are used again
        memory[:] = plain
        to_file(pool)
        now = path.read_bytes()
        if now[:SLOT] != image[:SLOT] and any(now[: len(image)]):
            break
    used = [at for at in range(0, len(image), SLOT) if any(image[at : at + SLOT])]
    with path.open("r+b") as file:
        for at in used:
            file.seek(at)
            file.write(image[at : at + SLOT])
    said = lost(memory, plain)
    assert said
    if kind != "noise":  # of what does not compress nothing says what it is
        assert any("older than what was stored, a write was lost (slot " in text for text in said)


def test_folios_that_changed_places_are_found(tmp_path: Path) -> None:
    path = tmp_path / "swap"
    pool, memory, plain = stored(path, "small")
    image = path.read_bytes()
    length = max((slots for _, slots in runs(path)), key=[slots for _, slots in runs(path)].count)
    (one, _), (other, _) = [run for run in runs(path) if run[1] == length][:2]
    with path.open("r+b") as file:
        for source, target in ((one, other), (other, one)):
            file.seek(target * SLOT)
            file.write(image[source * SLOT : (source + length) * SLOT])
    said = lost(memory, plain)
    assert len(said) == 2
    for slot in (one, other):
        assert any(f"stored for another place, a write or this read went astray (slot {slot})" in text for text in said)
    del pool


def test_raw_folios_that_changed_places_are_found(tmp_path: Path) -> None:
    path = tmp_path / "swap"
    _, memory, plain = stored(path, "noise")
    image = path.read_bytes()
    with path.open("r+b") as file:
        file.seek(3 * FOLIO)
        file.write(image[5 * FOLIO : 6 * FOLIO])
        # and parts of one
        file.seek(8 * FOLIO)
        file.write(image[8 * FOLIO + 16384 : 8 * FOLIO + 32768] + image[8 * FOLIO : 8 * FOLIO + 16384])
    assert len(lost(memory, plain)) == 2


def flip(address: int) -> None:
    ctypes.c_ubyte.from_address(address).value ^= 1


def objects(pool: userswap.Pool, packed: bytes) -> int:
    """Where in zswap these bytes are."""
    start, length = pool._core.compressed()
    for segment in range(start + (2 << 20), start + length, 2 << 20):
        at = ctypes.string_at(segment, 2 << 20).find(packed)
        if at >= 0:
            return segment + at
    raise AssertionError("not there")


@pytest.mark.parametrize("kind", ["small", "walk", "tiny"])
def test_damage_in_zswap_is_found_and_not_written_to_the_file(tmp_path: Path, kind: str) -> None:
    from userswap.backends import codec

    path = tmp_path / "swap"
    path.touch()
    pool = fresh_pool(swap=f"{path}:64MiB", map_design="on_demand")
    plain = data("walk" if kind == "walk" else "small", 4 * FOLIO, 1)
    if kind == "tiny":
        plain[:] = 0
        plain[7::FOLIO] = [1, 2, 3, 4]
    memory = pool.array(plain)
    pool.evict()
    pool.evict()
    packed = next(
        bytes(packed)
        for recipe in range(9)
        if (packed := codec.compress(plain[2 * FOLIO : 3 * FOLIO].tobytes(), recipe)[1]) is not None
        and has(pool, packed)
    )
    address = objects(pool, packed)
    # the header, blocks, the last byte, sums and check
    for at in (4, 12, 33, 60, len(packed) // 2, len(packed) - 1, len(packed), len(packed) + 15):
        flip(address + at)
        said = fetch(memory, 2)
        assert isinstance(said, str), at
        assert "zswap: what is there is not what was stored" in said
        while pool.writeback():
            pass
        assert isinstance(fetch(memory, 2), str)
        flip(address + at)
    assert lost(memory, plain) == []
    check_pool(pool)


def has(pool: userswap.Pool, packed: bytes) -> bool:
    try:
        return objects(pool, packed) > 0
    except AssertionError:
        return False


def test_an_identical_folio_is_not_shared_with_a_damaged_one(tmp_path: Path) -> None:
    """Its bytes are right, but whoever reads it will be told that they are not."""
    for kind, where in (("small", "file"), ("small", "zswap"), ("noise", "file")):
        path = tmp_path / f"{kind}{where}"
        path.touch()
        pool = fresh_pool(swap=f"{path}:64MiB", map_design="on_demand", dedupe=True, encrypt=False)
        plain = data(kind, FOLIO, 1)
        one = pool.array(plain)
        pool.evict()
        pool.evict()
        if where == "file":
            to_file(pool)
            with path.open("r+b") as file:
                file.seek(runs(path)[0][1] * SLOT - 76 if kind == "small" else 100)
                file.write(b"\xaa\x55")
        else:
            chunk = objects(pool, b"\0\0\1\0\0\x40\0\0") - 4  # bytes of a folio, of a block
            flip(chunk + int.from_bytes(ctypes.string_at(chunk + 12, 4), "little"))
        other = pool.array(plain)
        pool.evict()
        pool.evict()
        assert isinstance(fetch(one, 0), str)
        assert np.array_equal(other, plain)


def test_a_part_that_is_stored_anew_does_not_make_damage_of_the_others_good() -> None:
    pool = fresh_pool("16MiB", swap="none")
    folios = 400
    plain = data("small", folios * FOLIO, 3)
    memory = pool.array(plain)
    pool.evict()
    rng = random.Random(1)
    start, length = pool._core.compressed()
    total = 0
    for _ in range(2000):
        total += memory[rng.randrange(folios) * FOLIO + rng.randrange(4) * 16384 + 5]
    # The third part of every folio is damaged while the second of this one is in place and written to.
    folio = 0
    before = pool.stats().part_ins
    at = folio * FOLIO + 16384 + 9
    memory[at] ^= 1
    assert pool.stats().part_ins > before, "it came by itself"
    for segment in range(start + (2 << 20), start + length, 2 << 20):
        image = ctypes.string_at(segment, 2 << 20)
        chunk = image.find(b"\0\0\1\0\0\x40\0\0")
        while chunk >= 0:
            begin = chunk - 4
            block = int.from_bytes(image[begin + 32 + 8 : begin + 32 + 12], "little")  # the third
            if 48 < block < FOLIO:
                flip(segment + begin + block + 1)
            chunk = image.find(b"\0\0\1\0\0\x40\0\0", chunk + 8)
    pool.evict()
    assert memory[at] == plain[at] ^ 1
    assert isinstance(fetch(memory, folio), str)


def test_the_file_of_a_parent_is_verified_in_its_child(tmp_path: Path) -> None:
    path = tmp_path / "swap"
    pool, memory, plain = stored(path, "small")
    first, slots = runs(path)[3]
    with path.open("r+b") as file:
        file.seek(first * SLOT + 100)
        file.write(bytes(8))
    child = os.fork()
    if child == 0:
        code = 1
        try:
            said = lost(memory, plain)
            code = 0 if len(said) == 1 and f"(slot {first})" in said[0] else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert len(lost(memory, plain)) == 1
    del pool, slots


@only_moved
@pytest.mark.parametrize("stored", ["in one piece", "in parts", "in place", "in place, with one sum"])
def test_a_damaged_part_that_is_carried_along_does_not_become_good(stored: str) -> None:
    """Damage that nobody but the seal can see, in a part that is kept while another one is stored anew: where it was,
    or elsewhere since it no longer fits there."""
    from userswap.backends import codec

    pool = fresh_pool("16MiB", swap="none")
    folios = 400
    plain = data("small", folios * FOLIO, 3)
    if "one sum" in stored:
        for part in range(4):
            plain[part * PART + 300 : (part + 1) * PART] = 0
    memory = pool.array(plain)
    pool.evict()
    rng = random.Random(1)
    total = 0
    for _ in range(2000):
        total += memory[rng.randrange(1, folios) * FOLIO + rng.randrange(4) * PART + 5]
    packed = next(
        bytes(packed)
        for recipe in range(9)
        if (packed := codec.compress(plain[:FOLIO].tobytes(), recipe)[1]) is not None and has(pool, packed)
    )
    third, end = (int.from_bytes(packed[32 + 4 * part : 36 + 4 * part], "little") for part in (2, 3))
    for turn in range(1 if stored == "in one piece" else 2):
        before = pool.stats().part_ins
        memory[PART : 2 * PART] = plain[PART : 2 * PART] = data(
            "noise" if turn and "parts" in stored else "same", PART, turn
        )
        assert pool.stats().part_ins == before + 1, "the second part came by itself"
        if stored == "in one piece" or turn:
            # in all copies of it that there ever were
            for address in everywhere(pool, packed[third:end]):
                flip(address + unseen(packed, third, end))
        pool.evict()
    assert isinstance(fetch(memory, 0), str)
    assert np.array_equal(memory[PART : 2 * PART], plain[PART : 2 * PART])


def unseen(packed: bytes, start: int, end: int) -> int:
    """Where a bit of a block can change and it still unpacks, to other bytes, counted from its start."""
    from userswap.backends import codec

    right = codec.decompress(packed, FOLIO)
    for at in range(start + 8, end):
        damaged = bytearray(packed)
        damaged[at] ^= 1
        try:
            if codec.decompress(bytes(damaged), FOLIO) != right:
                return at - start
        except OSError:
            pass
    raise AssertionError("none")


def everywhere(pool: userswap.Pool, what: bytes) -> list[int]:
    start, length = pool._core.compressed()
    found = []
    for segment in range(start + (2 << 20), start + length, 2 << 20):
        image = ctypes.string_at(segment, 2 << 20)
        at = image.find(what)
        while at >= 0:
            found.append(segment + at)
            at = image.find(what, at + 1)
    assert found
    return found
