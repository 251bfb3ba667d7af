"""Encrypted swap files: nothing readable reaches the disk, whatever happens to the program, or into a core dump."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import userswap
from helpers import FOLIO, check_pool, data, fresh_pool, run_python
from support import small_disk
from userswap.backends import cipher

pytestmark = pytest.mark.skipif(cipher.start() is None, reason="there is no libcrypto of OpenSSL 3")

SLOT = 4096
MARK = b"this must not be seen by anybody"
HERE = Path(__file__).parent


def marked(kind: str, folios: int, seed: int = 1) -> np.ndarray:
    """Data with the mark in each page: in what does not compress, or packed in one piece."""
    plain = data("noise", folios * FOLIO, seed)
    if kind == "packed":
        plain[:] = 0
        plain[1::64] = data("noise", len(plain) // 64, seed)
    for at in range(100, len(plain), SLOT):
        plain[at : at + len(MARK)] = np.frombuffer(MARK, np.uint8)
    return plain


def to_file(pool: userswap.Pool) -> None:
    pool.evict()
    pool.evict()
    while pool.stats().stored_bytes > pool.stats().slot_bytes:
        pool.writeback()


@pytest.mark.skipif(cipher.start() != "AES-256-GCM", reason="the processor has no AES")
def test_it_is_what_it_says() -> None:
    """The first test vector of AES-256-GCM (McGrew, Viega: test case 14)."""
    out, tag = cipher.encrypt(bytes(32), 0, 0, bytes(16))
    assert out.hex() == "cea7403d4d606b6e074ec5d3baf39d18"
    assert tag.hex() == "d0d1c8a799996bf0265b98b5d48ab919"
    assert cipher.encrypt(bytes(32), 1, 0, bytes(16)) != cipher.encrypt(bytes(32), 0, 1, bytes(16)) != (out, tag)


@pytest.mark.parametrize("kind", ["raw", "packed"])
def test_the_mark_is_in_the_file_only_without_encryption(tmp_path: Path, kind: str) -> None:
    # Of what is packed, and so not to be read at a glance, the header of a chunk: bytes of a folio, of a block.
    sight = MARK[:16] if kind == "raw" else b"\0\0\1\0\0\x40\0\0"
    for encrypt in (False, True):
        path = tmp_path / f"swap{encrypt}"
        path.touch()
        with fresh_pool(swap=f"{path}:64MiB", map_design="on_demand", encrypt=encrypt, dedupe=False) as pool:
            assert pool.swaps()[0].encrypted == encrypt
            plain = marked(kind, 16)
            array = pool.array(plain)
            to_file(pool)
            image = path.read_bytes()
            assert any(image)
            assert (sight in image) == (not encrypt)
            if encrypt:
                # each page is another one: the same bytes are never the same
                pages = [image[at : at + 32] for at in range(0, len(image), SLOT) if any(image[at : at + 32])]
                assert len(set(pages)) == len(pages)
            assert np.array_equal(array, plain)
            # parts, and what moves
            for at in random.Random(1).sample(range(len(plain)), 40):
                assert array[at] == plain[at]
                array[at] = plain[at] = plain[at] ^ 1
            to_file(pool)
            assert np.array_equal(array, plain)
            assert (sight in path.read_bytes()) == (not encrypt)
            check_pool(pool)


def test_a_stamp_is_given_once(tmp_path: Path) -> None:
    """Of all that was ever written to the file the stamps, which are the nonces, are different ones."""
    path = tmp_path / "swap"
    path.touch()
    pool = fresh_pool(swap=f"{path}:256MiB", map_design="on_demand", encrypt=True, dedupe=False)
    array = pool.array(data("small", 64 * FOLIO, 1))
    stamps: set[int] = set()
    seen: dict[int, bytes] = {}
    for turn in range(4):
        array[::FOLIO] = turn + 1
        to_file(pool)
        image = path.read_bytes()
        for at in range(SLOT, len(image) + 1, SLOT):
            trailer = image[at - 32 : at]
            stamp, place, length = (int.from_bytes(trailer[i : i + 8], "little") for i in (0, 8, 16))
            if 0 < stamp < 1 << 40 and 0 < length <= FOLIO and place < 1 << 35 and seen.get(at) != trailer:
                seen[at] = trailer
                assert stamp not in stamps
                stamps.add(stamp)
    assert len(stamps) >= 128


def test_children_read_their_parents_file_and_write_one_of_their_own(tmp_path: Path) -> None:
    code = """
import os, sys, numpy as np
from helpers import FOLIO, check_pool, data, fresh_pool
from test_encrypt import to_file
pool = fresh_pool(swap=sys.argv[1], map_design="on_demand", encrypt=True)
plain = np.concatenate([data("noise", 8 * FOLIO, 1), data("walk", 8 * FOLIO, 2)])
array = pool.array(plain)
to_file(pool)
def family(depth):
    global plain
    assert np.array_equal(array, plain)
    if depth < 3:
        child = os.fork()
        if child == 0:
            array[::FOLIO // 2] ^= depth + 1
            plain[::FOLIO // 2] ^= depth + 1
            to_file(pool)
            assert all(file.encrypted for file in pool.swaps())
            assert np.array_equal(array, plain)
            family(depth + 1)
            check_pool(pool)
            os._exit(0)
        array[1::FOLIO // 2] ^= 128
        plain[1::FOLIO // 2] ^= 128
        to_file(pool)
        assert np.array_equal(array, plain)
        assert os.waitpid(child, 0)[1] == 0
family(0)
check_pool(pool)
"""
    result = run_python(code, str(tmp_path))
    assert result.returncode == 0, result.stderr


def test_what_moves_between_files_stays_encrypted(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).touch()
    pool = fresh_pool(
        swap=[f"{tmp_path}/a:64M:1", f"{tmp_path}/b:64M:0"], map_design="on_demand", encrypt=True, dedupe=False
    )
    plain = np.concatenate([marked("raw", 8), marked("packed", 8)])
    array = pool.array(plain)
    to_file(pool)
    pool.swapoff(tmp_path / "a")
    image = (tmp_path / "b").read_bytes()
    assert any(image)
    assert MARK[:16] not in image
    assert np.array_equal(array, plain)
    check_pool(pool)


KILLED = """
import os, sys, random, numpy as np
from helpers import FOLIO, fresh_pool
from test_encrypt import marked
pool = fresh_pool(swap=sys.argv[1], map_design="on_demand", encrypt=sys.argv[2] == "1")
arrays = [pool.array(marked(kind, 16, seed)) for seed in range(6) for kind in ("raw", "packed")]
print("running", flush=True)
child = os.fork()
while True:
    for array in arrays:
        array[random.randrange(len(array))] ^= 1
        pool.evict(random.randrange(1 << 20))
        try:
            pool.writeback(1 << 20)
        except OSError:
            pass
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting file systems needs root")
def test_a_kill_at_any_moment_leaves_nothing_readable(tmp_path: Path) -> None:
    rng = random.Random(3)
    for encrypt in (True, False):
        directory = tmp_path / str(encrypt)
        directory.mkdir()
        with small_disk(directory, 48) as mount:
            for turn in range(4 if encrypt else 1):
                target = mount if turn % 2 else mount / "named"
                program = subprocess.Popen(
                    [sys.executable, "-c", KILLED, str(target), "1" if encrypt else "0"],
                    stdout=subprocess.PIPE,
                    cwd=HERE,
                    start_new_session=True,
                )
                assert program.stdout is not None
                assert program.stdout.readline() == b"running\n"
                time.sleep(rng.random() * 0.3 + (0.3 if not encrypt else 0))
                os.killpg(program.pid, signal.SIGKILL)
                program.wait()
                program.stdout.close()
                # No file, and no lock: the next one may have the same name.
                assert sorted(path.name for path in mount.iterdir()) == ["lost+found"]
            os.sync()
        image = (directory / "disk.img").read_bytes()
        assert len(image.strip(b"\0")) > 1 << 20
        assert (MARK[:16] in image) == (not encrypt), "in the blocks of the disk"


DUMPED = """
import os, sys, ctypes, numpy as np
from helpers import FOLIO, fresh_pool, data
from test_encrypt import marked, to_file
pool = fresh_pool(swap=sys.argv[1], map_design="on_demand", encrypt=True)
raw = pool.array(marked("raw", 32)); packed = pool.array(data("small", 32 * FOLIO, 7))
pool.evict(); pool.evict()
for turn in range(4):
    raw[turn * FOLIO]; packed[turn * FOLIO]
    pool.evict(); pool.evict()
    pool.writeback(1 << 20)
libc = ctypes.CDLL(None)
libc.malloc_trim(0)
sys.stdout.write("ready\\n"); sys.stdout.flush()
os.abort()
"""


def written(path: Path) -> bytes:
    """What was written of a file that is mostly holes: address space that was reserved."""
    parts = []
    with path.open("rb", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        at = 0
        while at < end:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            hole = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            parts.append(os.pread(file.fileno(), hole - at, at))
            at = hole
    return b"".join(parts)


def test_a_core_dump_has_nothing_of_what_is_swapped_out(tmp_path: Path) -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    if "/" in pattern or pattern.startswith("|"):
        pytest.skip("core dumps of this machine go elsewhere")
    from userswap.backends import codec

    (tmp_path / "swap").mkdir()
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    if hard == 0:
        pytest.skip("core dumps are forbidden here")
    result = subprocess.run(
        [sys.executable, "-c", DUMPED, str(tmp_path / "swap")],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        check=False,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_CORE, (hard, hard)),
    )
    assert result.stdout == b"ready\n", result.stderr
    assert result.returncode == -signal.SIGABRT
    cores = [path for path in tmp_path.iterdir() if path.name.startswith("core")]
    if not cores:
        pytest.skip("the system wrote no core dump")
    core = written(cores[0])
    assert len(core) > 1 << 20
    assert b"userswap" in core
    # What is in folios that were swapped out, as it is and packed: pool, stage, buffers.
    plain = marked("raw", 32)
    for folio in range(4, 32):
        assert plain[folio * FOLIO + 200 : folio * FOLIO + 264].tobytes() not in core
    plain = data("small", 32 * FOLIO, 7)
    for folio in range(4, 32):
        for recipe in range(9):
            packed = codec.compress(plain[folio * FOLIO : (folio + 1) * FOLIO].tobytes(), recipe)[1]
            assert packed is None or packed[1000:1064] not in core


def flags(address: int) -> list[str]:
    """What the kernel says of the mapping that an address is in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        head = line.split()[0]
        if "-" in head and not head.endswith(":"):
            low, high = (int(part, 16) for part in head.split("-"))
            inside = low <= address < high
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError("no such mapping")


def test_keys_are_locked_in_memory_that_is_never_dumped(tmp_path: Path) -> None:
    pool = fresh_pool(swap=str(tmp_path), map_design="on_demand", encrypt=True)
    address = pool._core.key_page()
    assert "dd" in flags(address)
    assert "lo" in flags(address)
    assert "dd" in flags(pool._core.compressed()[0])
    child = os.fork()
    if child == 0:
        os._exit(0 if {"dd", "lo"} <= set(flags(address)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    pool.close()


def test_without_libcrypto_it_is_refused_in_plain_words(tmp_path: Path) -> None:
    code = """
import sys, userswap
from userswap.backends import cipher
cipher.candidates = lambda: ["libnothere.so.3"]
try:
    userswap.Pool(ram="16MiB", swap=sys.argv[1], encrypt=True)
except userswap.UnsupportedError as error:
    print(error)
with userswap.Pool(ram="16MiB", swap=sys.argv[1]) as pool:
    print(pool.swaps()[0].encrypted)
"""
    result = run_python(code, str(tmp_path))
    assert result.returncode == 0, result.stderr
    said, encrypted = result.stdout.splitlines()
    assert said.startswith("Swap files can't be encrypted here: there is no libcrypto of OpenSSL 3. Install it ")
    assert encrypted == "False"


CHILDREN = """
import ctypes, os, sys, numpy as np
from helpers import FOLIO, check_pool, data, fresh_pool
from test_encrypt import MARK, marked, to_file
place = sys.argv[1]
pool = fresh_pool(swap=place, map_design="on_demand", encrypt=True)
array = pool.array(marked("raw", 8))
to_file(pool)
def keys():
    page = ctypes.string_at(pool._core.key_page(), 4096)
    return {page[at : at + 32] for at in range(0, 4096, 32)} - {bytes(32)}
def files():
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try: name = os.readlink(f"/proc/self/fd/{fd}")
        except OSError: continue
        if name.startswith(place):
            with open(f"/proc/self/fd/{fd}", "rb") as file: found.append(file.read())
    return found
parents = keys()
assert len(parents) == 1
drawn = []
for child in range(2):
    reading, writing = os.pipe()
    if os.fork() == 0:
        array[:] = marked("raw", 8, 2)      # the same in both
        to_file(pool)
        assert len(pool.swaps()) == 1 and pool.swaps()[0].used_bytes >= 8 * FOLIO
        images = files()
        assert len(images) == 2 and all(any(image) and MARK[:16] not in image for image in images), len(images)
        own = keys() - parents
        assert len(own) == 1, len(own)
        assert np.array_equal(array, marked("raw", 8, 2))
        os.write(writing, own.pop())
        os._exit(0)
    assert os.wait()[1] == 0
    drawn.append(os.read(reading, 100))
assert drawn[0] != drawn[1], "the same nonces with the same key"
"""


def test_each_child_has_a_key_of_its_own_and_its_file_is_encrypted(tmp_path: Path) -> None:
    """Its stamps, which are nonces, go on where its parent's were, as do those of its siblings."""
    result = run_python(CHILDREN, str(tmp_path))
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("kind", ["short of a slot", "short", "packed", "gathered"])
def test_nothing_else_is_behind_what_does_not_fill_its_slots(tmp_path: Path, kind: str) -> None:
    """Buffers have what was in them before: here a folio that is plain to see."""
    path = tmp_path / "swap"
    path.touch()
    with fresh_pool(swap=f"{path}:64MiB", map_design="on_demand", encrypt=True, dedupe=False) as pool:
        seen = data("noise", 16 * FOLIO, 1)
        for at in range(0, len(seen), 512):
            seen[at : at + len(MARK)] = np.frombuffer(MARK, np.uint8)
        before = pool.array(seen, tiers="zswap,file")
        to_file(pool)
        before.flags.writeable = False
        length = {"short of a slot": FOLIO - SLOT, "short": 5 * SLOT}.get(kind, FOLIO)
        for turn in range(8):
            before[turn * FOLIO : (turn + 1) * FOLIO].sum()  # to a buffer, and from there into place
            # What goes to the file at once comes through the same buffer.
            plain = data("walk" if length == FOLIO else "noise", length * (3 if kind == "gathered" else 1), turn)
            array = pool.array(plain, tiers=None if length < FOLIO else "file")
            while pool.evict():
                pass
            assert pool.stats().slot_bytes > 16 * FOLIO
            assert MARK[:16] not in path.read_bytes()
            assert np.array_equal(array, plain)
            del array
