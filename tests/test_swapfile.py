"""Swap files as devices: runs of slots, holes, limits, full file systems, broken transfers, threads."""

import ctypes
import errno
import mmap
import os
import shutil
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from userswap.backends.swapfile import SwapDevice

SLOT = 4096
CLUSTER = 512
MIB = 1 << 20


def device(path: Path, limit: int, flags: int = 0) -> SwapDevice:
    return SwapDevice(os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o600), limit, str(path))


def pages(n: int, byte: int = 0) -> mmap.mmap:
    """A buffer of whole pages, aligned."""
    buffer = mmap.mmap(-1, n * SLOT)
    buffer[:] = bytes([byte]) * (n * SLOT)
    return buffer


def blocks(path: Path) -> int:
    """Bytes that the file takes on its file system."""
    return path.stat().st_blocks * 512


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "swap"


# ---- runs ----


def test_name_and_limits(path: Path) -> None:
    swap = device(path, 10 * MIB)
    assert swap.name == str(path)
    assert swap.used == 0
    for n in (0, -1, CLUSTER + 1):
        with pytest.raises(OSError, match="Invalid argument"):
            swap.alloc(n)
    for limit in (0, SLOT - 1, 1 << 63):
        with pytest.raises(ValueError, match="limit"):
            SwapDevice(0, limit)


def test_runs_follow_one_another_and_leave_holes_alone_while_there_is_room(path: Path) -> None:
    swap = device(path, 8 * MIB)
    first = [swap.alloc(8) for _ in range(64)]
    assert first == list(range(0, 512, 8))
    for slot in first[:32]:
        swap.free(slot, 8)
    later = [swap.alloc(8) for _ in range(64 * 3)]
    assert later == list(range(512, 2048, 8))
    holes = [swap.alloc(8) for _ in range(32)]
    assert holes == first[:32]
    assert swap.used == 2048


def test_a_run_never_crosses_a_cluster(path: Path) -> None:
    swap = device(path, 64 * MIB)
    for _ in range(300):
        slot = swap.alloc(17)
        assert slot // CLUSTER == (slot + 16) // CLUSTER


def test_the_limit_is_exact_and_every_slot_of_it_can_be_used(path: Path) -> None:
    swap = device(path, 4 * MIB + 7 * SLOT + 100)
    taken = [swap.alloc(8) for _ in range(128)]
    with pytest.raises(OSError, match="No space") as full:
        swap.alloc(8)
    assert full.value.errno == errno.ENOSPC
    assert full.value.filename == str(path)
    assert swap.alloc(7) == 1024
    assert swap.used == 1031
    with pytest.raises(OSError, match="No space"):
        swap.alloc(1)
    swap.free(taken[10] + 3, 2)  # a part of a run
    assert swap.alloc(2) == taken[10] + 3
    with pytest.raises(ValueError, match="no run"):
        swap.free(1030, 2)


def test_whole_clusters_can_be_had(path: Path) -> None:
    swap = device(path, 6 * MIB)
    assert [swap.alloc(512) for _ in range(3)] == [0, 512, 1024]
    swap.free(512, 512)
    assert swap.alloc(512) == 512


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_slots_against_a_model(data: st.DataObject) -> None:
    limit = data.draw(st.sampled_from([3, 512, 700, 1024, 1500]))
    swap = SwapDevice(os.memfd_create("swap"), limit * SLOT)
    runs: dict[int, int] = {}
    taken: set[int] = set()
    sizes = data.draw(st.sampled_from([st.integers(1, 3), st.integers(1, 17), st.integers(1, 512)]))
    for _ in range(data.draw(st.integers(1, 150))):
        if runs and data.draw(st.integers(0, 9)) < data.draw(st.sampled_from([2, 7])):
            slot = data.draw(st.sampled_from(sorted(runs)))
            n = runs.pop(slot)
            part = data.draw(st.integers(1, n))  # the rest of a run stays
            swap.free(slot, part)
            taken -= set(range(slot, slot + part))
            if part < n:
                runs[slot + part] = n - part
        else:
            n = data.draw(sizes)
            try:
                slot = swap.alloc(n)
            except OSError as error:
                assert error.errno == errno.ENOSPC
                for start in range(limit - n + 1):  # there really is no such run
                    same = start // CLUSTER == (start + n - 1) // CLUSTER
                    assert not same or not taken.isdisjoint(range(start, start + n))
                continue
            run = set(range(slot, slot + n))
            assert slot // CLUSTER == (slot + n - 1) // CLUSTER
            assert 0 <= slot <= limit - n
            assert not run & taken
            taken |= run
            runs[slot] = n
        assert swap.used == len(taken)


def touched(swap: SwapDevice) -> int:
    """Bytes of the mappings of bitmaps and seals that have memory."""
    libc = ctypes.CDLL(None)
    pages = 0
    for address, length in (swap.mapping, swap.sealing):
        count = (length + SLOT - 1) // SLOT
        resident = ctypes.create_string_buffer(count)
        assert libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(count * SLOT), resident) == 0
        pages += sum(byte & 1 for byte in resident.raw)
    return pages * SLOT


def test_metadata_is_what_is_touched(path: Path) -> None:
    swap = device(path, 1 << 40)
    assert swap.metadata <= 2 * SLOT
    for _ in range(2000):
        swap.alloc(512)
    assert swap.metadata == touched(swap)


def test_metadata_left_out_clusters_whose_slots_a_map_had_chosen(path: Path) -> None:
    """In bound designs slots are not allocated here but taken, and their bitmaps were in no budget."""
    swap = device(path, 1 << 40)
    for i in range(2000):
        swap.take(512 * i + 5, 16)
    assert swap.metadata == touched(swap) > 30 * SLOT
    swap.free(512 * 1999 + 5, 16)
    assert swap.metadata == touched(swap)


# ---- transfers ----


@pytest.mark.parametrize("flags", [0, os.O_DIRECT], ids=["buffered", "direct"])
def test_what_is_written_is_read(path: Path, flags: int) -> None:
    try:
        swap = device(path, 64 * MIB, flags)
    except OSError:
        pytest.skip(f"{path.parent} is on a file system without O_DIRECT")
    runs = [(swap.alloc(n), n) for n in (1, 17, 16, 512, 3, 511)]
    for slot, n in runs:
        swap.write(slot, pages(n, slot % 251))
    for slot, n in runs:
        buffer = pages(n)
        swap.read(slot, buffer)
        assert buffer[:] == bytes([slot % 251]) * (n * SLOT)
    assert path.stat().st_size == (4 * CLUSTER - 1) * SLOT  # grown by writes, as far as they went


def test_a_file_that_was_cut_short_is_an_error_and_not_zeros(path: Path) -> None:
    swap = device(path, 8 * MIB)
    slot = swap.alloc(16)
    swap.write(slot, pages(16, 7))
    for size in (10 * SLOT, 10 * SLOT + 100, 0):
        os.truncate(path, size)
        with pytest.raises(OSError, match="Input/output") as short:
            swap.read(slot, pages(16))
        assert short.value.errno == errno.EIO


def test_errors_of_the_system_come_through(path: Path) -> None:
    path.touch()
    swap = SwapDevice(os.open(path, os.O_RDONLY), 8 * MIB)
    with pytest.raises(OSError, match="Bad file") as bad:
        swap.write(swap.alloc(1), pages(1))
    assert bad.value.errno == errno.EBADF


SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <sys/types.h>
/* Every transfer is interrupted, then cut short (inside a slot), then let through. */
static int turn, mode = -1;
#define TRANSFER(name, pointer) \
ssize_t name(int fd, pointer buffer, size_t n, off_t at) { \
    ssize_t (*real)(int, pointer, size_t, off_t) = dlsym(RTLD_NEXT, #name); \
    if (mode < 0) mode = atoi(getenv("SHIM")); \
    if (mode == 2) { errno = EINTR; return -1; } \
    switch (turn++ % 3) { \
    case 0: errno = EINTR; return -1; \
    case 1: return real(fd, buffer, n > 4096 ? n / 2 + 700 : n, at); \
    default: return real(fd, buffer, n, at); } }
TRANSFER(pread, void *)
TRANSFER(pread64, void *)
TRANSFER(pwrite, const void *)
TRANSFER(pwrite64, const void *)
#define FALLOCATE(name) \
int name(int fd, int mode, off_t at, off_t n) { \
    int (*real)(int, int, off_t, off_t) = dlsym(RTLD_NEXT, #name); \
    if (turn++ % 2 == 0) { errno = EINTR; return -1; } \
    return real(fd, mode, at, n); }
FALLOCATE(fallocate)
FALLOCATE(fallocate64)
"""

INTERRUPTED = """
    import ctypes, mmap, os, sys
    from userswap.backends.swapfile import SwapDevice
    path = sys.argv[1]
    swap = SwapDevice(os.open(path, os.O_RDWR | os.O_CREAT), 8 << 20)
    runs = [(swap.alloc(n), n) for n in (1, 16, 17, 300, 512)]
    try:
        for slot, n in runs:
            buffer = mmap.mmap(-1, n * 4096)
            buffer[:] = os.urandom(n * 4096)
            swap.write(slot, buffer)
            back = mmap.mmap(-1, n * 4096)
            swap.read(slot, back)
            assert back[:] == buffer[:]
    except OSError as error:
        sys.exit(f"errno {error.errno}")
    for slot, n in runs:
        swap.free(slot, n)
    os.fsync(os.open(path, os.O_RDWR))
    assert os.stat(path).st_blocks == 0, os.stat(path).st_blocks
    print("whole")
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler to build the interrupting library with")
def test_interrupted_and_short_transfers_are_finished(tmp_path: Path) -> None:
    (tmp_path / "shim.c").write_text(SHIM)
    shim = tmp_path / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, tmp_path / "shim.c", "-ldl"], check=True)

    def run(mode: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", textwrap.dedent(INTERRUPTED), str(tmp_path / "swap")],
            env={**os.environ, "LD_PRELOAD": str(shim), "SHIM": mode},
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    result = run("1")
    assert (result.stdout, result.returncode) == ("whole\n", 0), result.stderr
    # A transfer that never gets anywhere is an error, not an endless loop.
    assert f"errno {errno.EINTR}" in run("2").stderr


# ---- holes ----


def test_an_empty_cluster_gives_its_blocks_back(path: Path) -> None:
    swap = device(path, 64 * MIB)
    runs = [swap.alloc(16) for _ in range(32 * 8)]
    for slot in runs:
        swap.write(slot, pages(16, 1))
    os.sync()
    full = blocks(path)
    assert full >= 16 * MIB
    for slot in runs[32 : 32 * 4]:
        swap.free(slot, 16)
    assert blocks(path) <= full - 6 * MIB
    assert path.stat().st_size == 16 * MIB  # holes, no truncation
    for slot in runs[33 * 4 : 32 * 8 - 1]:
        swap.free(slot, 16)
    buffer = pages(16)
    swap.read(runs[0], buffer)
    assert buffer[:] == b"\1" * 16 * SLOT
    for slot in [*runs[:32], *runs[32 * 4 : 33 * 4], runs[-1]]:
        swap.free(slot, 16)
    assert swap.used == 0
    assert blocks(path) == 0


def test_a_cluster_is_used_again_after_its_hole(path: Path) -> None:
    swap = device(path, 4 * MIB)
    for turn in range(1, 20):
        runs = [swap.alloc(16) for _ in range(64)]
        assert sorted(runs) == list(range(0, 1024, 16))
        for slot in runs:
            swap.write(slot, pages(16, turn))
        buffer = pages(16)
        for slot in runs:
            swap.read(slot, buffer)
            assert buffer[:] == bytes([turn]) * 16 * SLOT
            swap.free(slot, 16)
    assert blocks(path) == 0


@pytest.mark.parametrize(
    ("most", "live", "turns", "homes"),
    [(300, 32, 1200, 0), (512, 2, 4000, 0), (20, 2, 8000, 0), (16, 1, 4000, 4), (16, 32, 1500, 4)],
)
def test_no_hole_is_punched_where_others_write(path: Path, most: int, live: int, turns: int, homes: int) -> None:
    """Clusters empty and fill again in several threads: a late hole would wipe what another wrote.

    With homes every run has its place, as where an id is a slot: then nobody looks for a cluster without a hole.
    """
    swap = device(path, 8 * MIB)
    errors: list[int] = []

    def work(seed: int) -> None:
        errors.append(swap.stress(seed, turns, most, live, homes))

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert errors == [0] * 4
    assert swap.used == 0
    assert blocks(path) == 0
    if not homes:  # it is one or the other
        assert [swap.alloc(512) for _ in range(4)]  # nothing was lost
        assert swap.used == 2048


SLOW = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <sys/types.h>
#include <unistd.h>
/* A hole is punched long after it was decided. */
#define FALLOCATE(name) \\
int name(int fd, int mode, off_t at, off_t n) { \\
    int (*real)(int, int, off_t, off_t) = dlsym(RTLD_NEXT, #name); \\
    write(1, "punching\\n", 9); \\
    usleep(300000); \\
    return real(fd, mode, at, n); }
FALLOCATE(fallocate)
FALLOCATE(fallocate64)
"""

TAKEN = """
    import mmap, os, sys, threading
    from userswap.backends.swapfile import SwapDevice
    out, real = os.pipe()
    os.dup2(real, 1)                                # where the slow hole says that it has begun
    swap = SwapDevice(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT), 8 << 20)
    swap.take(0, 16)
    puncher = threading.Thread(target=swap.free, args=(0, 16))
    puncher.start()
    assert os.read(out, 9) == b"punching\\n"
    buffer = mmap.mmap(-1, 16 * 4096)
    buffer[:] = os.urandom(16 * 4096)
    swap.take(32, 16)
    swap.write(32, buffer)
    puncher.join()
    back = mmap.mmap(-1, 16 * 4096)
    swap.read(32, back)
    assert back[:] == buffer[:]
"""


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler to build the slow library with")
def test_a_place_is_not_taken_while_its_cluster_is_being_punched(tmp_path: Path) -> None:
    (tmp_path / "slow.c").write_text(SLOW)
    shim = tmp_path / "slow.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", shim, tmp_path / "slow.c", "-ldl"], check=True)
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(TAKEN), str(tmp_path / "swap")],
        env={**os.environ, "LD_PRELOAD": str(shim)},
        check=True,
        timeout=60,
    )


# ---- a file system that is full ----


def mounted(where: Path, what: str, *options: str) -> bool:
    return subprocess.run(["mount", *options, what, where], capture_output=True, check=False).returncode == 0


@pytest.fixture(params=["tmpfs", "ext4"])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A file system of about 4 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    where = tmp_path / "mounted"
    where.mkdir()
    if request.param == "tmpfs":
        done = mounted(where, "tmpfs", "-t", "tmpfs", "-o", "size=4M")
    else:
        image = tmp_path / "image"
        image.touch()
        os.truncate(image, 4 * MIB)
        if not shutil.which("mkfs.ext4"):
            pytest.skip("there is no mkfs.ext4")
        subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", image], check=True)
        done = mounted(where, str(image), "-o", "loop")
    if not done:
        pytest.skip(f"{request.param} cannot be mounted here")
    yield where
    subprocess.run(["umount", "-l", where], check=True)


def test_a_full_file_system_is_an_error_that_loses_nothing(small: Path) -> None:
    swap = device(small / "swap", 64 * MIB)
    written = []
    with pytest.raises(OSError, match="No space") as full:
        while True:
            slot = swap.alloc(16)
            swap.write(slot, pages(16, slot // 16 % 251))
            written.append(slot)
    assert full.value.errno == errno.ENOSPC
    assert len(written) >= 40
    swap.free(slot, 16)
    buffer = pages(16)
    for slot in written:
        swap.read(slot, buffer)
        assert buffer[:] == bytes([slot // 16 % 251]) * 16 * SLOT
    for slot in written[:32]:  # a whole cluster, so its blocks are there again
        swap.free(slot, 16)
    again = swap.alloc(16)
    swap.write(again, pages(16, 3))
    swap.read(again, buffer)
    assert buffer[:] == b"\3" * 16 * SLOT
