"""The system-call wrappers, on memory that the kernel really cannot reach.

The arena of ``_syscalls_check`` takes every folio away with its last pin, so each call here meets
missing pages. Real files, pipes and sockets throughout; what may kill the process runs in one of its own.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from userswap import _core
from userswap.memory import _syscalls_check as check
from userswap.memory import syscalls

KIB = 1024
MIB = 1024 * KIB
FOLIO = 64 * KIB
SIZE = 64 * MIB
Bytes = Any  # an array of uint8; NumPy declares the buffer protocol to type checkers from Python 3.12 only

syscalls.install()  # before anything asks for an address: what dlsym gave earlier stays libc's own
libc = ctypes.CDLL(None, use_errno=True)
for name in ("read", "write", "pread", "fread", "fwrite", "recv", "send", "recvfrom", "sendto", "getrandom"):
    getattr(libc, name).restype = ctypes.c_ssize_t


@pytest.fixture(scope="module")
def whole() -> Iterator[Bytes]:
    address = check.start(SIZE)
    memory: Any = (ctypes.c_char * SIZE).from_address(address)
    yield np.frombuffer(memory, dtype=np.uint8)
    # The arena took the place of the real one: pools of other tests in this process need theirs back.
    _core.open_arena()


@pytest.fixture
def arena(whole: Bytes) -> Iterator[Bytes]:
    check.wipe()
    yield whole
    assert check.counts()[2] == 0, "pinned and never unpinned"


def addr(x: Any) -> int:
    return int(x.ctypes.data)


def pointer(x: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(addr(x))


def pattern(n: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(n)


def put(x: Bytes, data: bytes) -> None:
    """Write by ordinary stores, then take it out of memory; the kernel alone must fail on it."""
    x[: len(data)] = np.frombuffer(data, dtype=np.uint8)
    gone(x)


def gone(x: Bytes) -> None:
    check.evict()
    ends = os.pipe()
    try:
        for offset in (0, len(x) - 1):
            assert libc.syscall(1, ends[1], ctypes.c_void_p(addr(x) + offset), 1) == -1
            assert ctypes.get_errno() == errno.EFAULT
        os.write(ends[1], b"x")
        assert libc.syscall(0, ends[0], pointer(x), 1) == -1
        assert ctypes.get_errno() == errno.EFAULT
    finally:
        os.close(ends[0])
        os.close(ends[1])


def file_with(path: Path, data: bytes) -> int:
    path.write_bytes(data)
    return os.open(path, os.O_RDWR)


def c_errno(result: int) -> int:
    assert result == -1
    return ctypes.get_errno()


def python(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# ---- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [FOLIO, 3 * FOLIO, SIZE])
@pytest.mark.parametrize("start", [0, 1, 65535, 70000])
def test_read_and_write_in_chunks(arena: Bytes, tmp_path: Path, share: int, start: int) -> None:
    check.set_share(share)
    data = pattern(1 * MIB + 17)
    x = arena[start : start + len(data)]
    fd = file_with(tmp_path / "f", data)
    gone(x)
    assert os.readv(fd, [x]) == len(data)
    assert bytes(x) == data
    gone(x)
    out = os.open(tmp_path / "g", os.O_RDWR | os.O_CREAT)
    assert os.write(out, x.data) == len(data)
    assert (tmp_path / "g").read_bytes() == data
    calls, most, _ = check.counts()
    assert most <= share
    assert calls >= 2 * len(data) // share


def test_read_through_a_file_object(arena: Bytes, tmp_path: Path) -> None:
    data = pattern(3 * MIB)
    (tmp_path / "f").write_bytes(data)
    x = arena[100 : 100 + len(data)]
    gone(x)
    with (tmp_path / "f").open("rb", buffering=0) as f:
        assert f.readinto(x.data) == len(data)
    assert bytes(x) == data


def test_short_file_gives_a_short_count_and_then_end(arena: Bytes, tmp_path: Path) -> None:
    check.set_share(FOLIO)
    fd = file_with(tmp_path / "f", pattern(200_000))
    x = arena[: 1 * MIB]
    gone(x)
    assert os.readv(fd, [x]) == 200_000
    assert os.readv(fd, [x]) == 0
    assert bytes(x[:200_000]) == pattern(200_000)
    assert not x[200_000:].any()


@pytest.mark.parametrize("name", ["pread", "pread64", "__pread64", "__pread_chk", "__pread64_chk"])
def test_pread_family(arena: Bytes, tmp_path: Path, name: str) -> None:
    check.set_share(FOLIO)
    data = pattern(1 * MIB)
    fd = file_with(tmp_path / "f", data)
    n = 500_000
    x = arena[5 : 5 + n]
    gone(x)
    call = getattr(libc, name)
    call.restype = ctypes.c_ssize_t
    args: list[Any] = [fd, pointer(x), ctypes.c_size_t(n), ctypes.c_long(1000)]
    if name.endswith("_chk"):
        args.append(ctypes.c_size_t(n))
    assert call(*args) == n
    assert bytes(x) == data[1000 : 1000 + n]
    assert os.lseek(fd, 0, os.SEEK_CUR) == 0


@pytest.mark.parametrize("name", ["pwrite", "pwrite64", "__pwrite64"])
def test_pwrite_family(arena: Bytes, tmp_path: Path, name: str) -> None:
    check.set_share(FOLIO)
    fd = file_with(tmp_path / "f", bytes(10))
    x = arena[5:300_005]
    put(x, pattern(300_000))
    call = getattr(libc, name)
    call.restype = ctypes.c_ssize_t
    assert call(fd, pointer(x), ctypes.c_size_t(300_000), ctypes.c_long(4)) == 300_000
    assert (tmp_path / "f").read_bytes() == bytes(4) + pattern(300_000)
    assert os.lseek(fd, 0, os.SEEK_CUR) == 0


def cut(arena: Bytes, lengths: list[int], gap: int) -> list[Bytes]:
    parts, at = [], 10
    for n in lengths:
        parts.append(arena[at : at + n])
        at += n + gap
    return parts


@pytest.mark.parametrize("share", [FOLIO, SIZE])
def test_vectors(arena: Bytes, tmp_path: Path, share: int) -> None:
    check.set_share(share)
    lengths = [1, 200_000, 0, 70_000, 5, 65_536]
    total = sum(lengths)
    data = pattern(total)
    fd = file_with(tmp_path / "f", data)
    plain = bytearray(lengths[3])
    parts: list[Any] = cut(arena, lengths, 30_000)
    own = [p for p in parts if len(p)]
    parts[3] = plain  # ordinary memory between ours
    pairs: list[Any] = [
        (lambda: os.readv(fd, parts), lambda out: os.writev(out, parts)),
        (lambda: os.preadv(fd, parts, 0), lambda out: os.pwritev(out, parts, 0)),
        (lambda: os.preadv(fd, parts, 0, os.RWF_HIPRI), lambda out: os.pwritev(out, parts, 0, os.RWF_SYNC)),
    ]
    for read, write in pairs:
        for p in own:
            p[:] = 0
        os.lseek(fd, 0, os.SEEK_SET)
        gone(own[1])
        assert read() == total
        assert b"".join(bytes(p) for p in parts) == data
        gone(own[1])
        (tmp_path / "g").unlink(missing_ok=True)
        out = os.open(tmp_path / "g", os.O_RDWR | os.O_CREAT)
        assert write(out) == total
        assert (tmp_path / "g").read_bytes() == data
        os.close(out)


@pytest.mark.parametrize("wide", ["", "64"])
def test_preadv2_at_the_files_own_position(arena: Bytes, tmp_path: Path, wide: str) -> None:
    check.set_share(FOLIO)
    data = pattern(400_000)
    fd = file_with(tmp_path / "f", data)
    x = arena[:300_000]
    vector = (ctypes.c_size_t * 2)(addr(x), len(x))
    reads = getattr(libc, f"preadv{wide}v2" if wide else "preadv2")
    writes = getattr(libc, f"pwritev{wide}v2" if wide else "pwritev2")
    for call in (reads, writes):
        call.restype = ctypes.c_ssize_t
        call.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_int]
    os.lseek(fd, 7, os.SEEK_SET)
    gone(x)
    assert reads(fd, vector, 1, -1, 0) == 300_000
    assert os.lseek(fd, 0, os.SEEK_CUR) == 300_007
    assert bytes(x) == data[7:300_007]
    gone(x)
    assert writes(fd, vector, 1, -1, 0) == 300_000
    assert (tmp_path / "f").read_bytes() == data[:300_007] + data[7:300_007]
    gone(x)
    assert c_errno(reads(fd, vector, 1, 0, 0x40000000)) in (errno.EOPNOTSUPP, errno.EINVAL)


def test_a_vector_that_is_itself_swapped(arena: Bytes, tmp_path: Path) -> None:
    data = pattern(200_000)
    fd = file_with(tmp_path / "f", data)
    x = arena[10 * FOLIO : 10 * FOLIO + len(data)]
    vector = arena[:16].view(np.uint64)
    vector[:] = (addr(x), len(x))
    gone(arena[:16])
    libc.readv.restype = ctypes.c_ssize_t
    assert libc.readv(fd, pointer(vector), 1) == len(data)
    assert bytes(x) == data


def test_vectors_that_the_kernel_refuses(arena: Bytes) -> None:
    fd = os.open("/dev/zero", os.O_RDWR)
    vector = (ctypes.c_size_t * 2100)(*([addr(arena), 1] * 1050))
    assert c_errno(libc.readv(fd, vector, 1050)) == errno.EINVAL
    assert c_errno(libc.readv(fd, vector, -1)) == errno.EINVAL
    huge = (ctypes.c_size_t * 4)(addr(arena), 2**62, addr(arena), 2**62 + 2**62)
    assert c_errno(libc.readv(fd, huge, 2)) == errno.EINVAL
    assert libc.readv(fd, vector, 1024) == 1024


@pytest.mark.parametrize("share", [FOLIO, 5 * FOLIO])
def test_direct_io(arena: Bytes, tmp_path: Path, share: int) -> None:
    check.set_share(share)
    data = pattern(20 * MIB)  # longer than one chunk of a file
    path = tmp_path / "f"
    path.write_bytes(data)
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    x = arena[4096 : 4096 + len(data)]
    assert addr(x) % 4096 == 0
    gone(x)
    assert os.preadv(fd, [x], 0) == len(data)
    assert bytes(x) == data
    x[:] = x[::-1].copy()
    gone(x)
    assert os.pwritev(fd, [x], 0) == len(data)
    assert path.read_bytes() == data[::-1]


def test_a_pin_that_fails_gives_its_errno(arena: Bytes, tmp_path: Path) -> None:
    check.set_share(FOLIO)
    data = pattern(10 * FOLIO)
    fd = file_with(tmp_path / "f", data)
    x = arena[: 10 * FOLIO]
    gone(x)
    check.fail(0, errno.EIO)
    with pytest.raises(OSError, match="Input/output") as caught:
        os.preadv(fd, [x], 0)
    assert caught.value.errno == errno.EIO
    check.fail(0, 0)
    check.fail(3 * FOLIO, errno.EIO)
    assert os.preadv(fd, [x], 0) == 3 * FOLIO  # what was done is said, the error comes with the next call
    assert os.pwritev(fd, [x], 0) == 3 * FOLIO
    with pytest.raises(OSError):
        os.preadv(fd, [x[3 * FOLIO :]], 0)
    assert os.preadv(fd, [x[:FOLIO], x[3 * FOLIO :]], 0) == FOLIO


def test_errors_of_the_call_itself(arena: Bytes) -> None:
    gone(arena)
    assert c_errno(libc.read(-1, pointer(arena), 100)) == errno.EBADF
    assert c_errno(libc.read(-1, pointer(arena), ctypes.c_size_t(1 << 20))) == errno.EBADF
    assert c_errno(libc.send(0, pointer(arena), ctypes.c_size_t(1 << 20), 0)) in (errno.ENOTSOCK, errno.EBADF)
    fd = os.open("/dev/null", os.O_WRONLY)
    assert libc.write(fd, pointer(arena), ctypes.c_size_t(0)) == 0
    assert c_errno(libc.write(fd, pointer(arena), ctypes.c_size_t(-5))) in (errno.EINVAL, errno.EFAULT)


def test_other_memory_is_left_alone(arena: Bytes, tmp_path: Path) -> None:
    before = check.counts()[0]
    fd = file_with(tmp_path / "f", pattern(100))
    assert os.read(fd, 1000) == pattern(100)
    os.lseek(fd, 0, os.SEEK_SET)
    assert c_errno(libc.read(fd, ctypes.c_void_p(8), 10)) == errno.EFAULT
    assert check.counts()[0] == before


def test_a_range_that_is_only_partly_ours(arena: Bytes, tmp_path: Path) -> None:
    """What lies before and behind the arena counts as pinned."""
    check.set_share(FOLIO)
    data = pattern(2 * FOLIO)
    fd = file_with(tmp_path / "f", data)
    gone(arena)
    start = addr(arena) + SIZE - FOLIO
    end = start + 2 * FOLIO
    guard = end - FOLIO  # one folio's worth, of which at least a part is mapped
    with Path("/proc/self/maps").open() as maps:
        mapped = any(int(a, 16) <= guard < int(b, 16) for a, b in (line.split()[0].split("-") for line in maps))
    n = FOLIO + (4096 if mapped else 0)
    assert libc.read(fd, ctypes.c_void_p(start), ctypes.c_size_t(n)) == n
    assert ctypes.string_at(start, n) == data[:n]


# ---- streams --------------------------------------------------------------------------------------


class Stream:
    """A C stream."""

    def __init__(self, path: Path, mode: str) -> None:
        libc.fopen.restype = ctypes.c_void_p
        self.file = ctypes.c_void_p(libc.fopen(os.fsencode(path), mode.encode()))
        assert self.file.value

    def tell(self) -> int:
        libc.ftell.restype = ctypes.c_long
        return int(libc.ftell(self.file))

    def eof(self) -> bool:
        return bool(libc.feof(self.file))

    def error(self) -> bool:
        return bool(libc.ferror(self.file))

    def close(self) -> None:
        assert libc.fclose(self.file) == 0


@pytest.mark.parametrize("name", ["fread", "fread_unlocked", "__fread_chk", "__fread_unlocked_chk"])
@pytest.mark.parametrize("shape", [(700_003, 8), (700_000, 8), (30, 7), (65536, 65536), (0, 3)])
@pytest.mark.parametrize("more", [5, 0, -1])
def test_fread_counts_items(arena: Bytes, tmp_path: Path, name: str, shape: tuple[int, int], more: int) -> None:
    check.set_share(FOLIO)
    length, size = shape
    data = pattern(length)
    path = tmp_path / "f"
    path.write_bytes(data)
    call = getattr(libc, name)
    call.restype = ctypes.c_size_t
    items = max(0, length // size + more)
    room = [ctypes.c_size_t(items * size)] if name.endswith("_chk") else []

    def run(where: ctypes.c_void_p) -> tuple[int, int, bool, bool]:
        stream = Stream(path, "r")
        n = call(where, *room, ctypes.c_size_t(size), ctypes.c_size_t(items), stream.file)
        state = (n, stream.tell(), stream.eof(), stream.error())
        stream.close()
        return state

    plain = ctypes.create_string_buffer(items * size + 1)
    expected = run(ctypes.cast(plain, ctypes.c_void_p))
    x = arena[3 : 3 + max(1, items * size)]  # an empty array has no address of its own
    gone(x)
    assert run(pointer(x)) == expected
    got = length if more > 0 else items * size
    assert expected == (got // size, got, more > 0, False)
    assert bytes(x[:got]) == data[:got]


@pytest.mark.parametrize("name", ["fwrite", "fwrite_unlocked"])
def test_fwrite(arena: Bytes, tmp_path: Path, name: str) -> None:
    check.set_share(FOLIO)
    x = arena[3 : 3 + 800_000]
    put(x, pattern(800_000))
    call = getattr(libc, name)
    call.restype = ctypes.c_size_t
    stream = Stream(tmp_path / "f", "w")
    assert call(b"ab", 1, 2, stream.file) == 2
    assert call(pointer(x), ctypes.c_size_t(8), ctypes.c_size_t(100_000), stream.file) == 100_000
    assert call(pointer(x), ctypes.c_size_t(0), ctypes.c_size_t(5), stream.file) == 0
    assert stream.tell() == 800_002
    stream.close()
    assert (tmp_path / "f").read_bytes() == b"ab" + pattern(800_000)


def test_fwrite_to_a_full_device(arena: Bytes) -> None:
    check.set_share(FOLIO)
    libc.fwrite.restype = ctypes.c_size_t
    put(arena[:MIB], pattern(MIB))
    stream = Stream(Path("/dev/full"), "w")
    ctypes.set_errno(0)
    n = libc.fwrite(pointer(arena), ctypes.c_size_t(1000), ctypes.c_size_t(1000), stream.file)
    assert ctypes.get_errno() == errno.ENOSPC
    assert n < 1000
    assert stream.error()
    libc.fclose(stream.file)


def test_a_pin_that_fails_marks_the_stream(arena: Bytes, tmp_path: Path) -> None:
    check.set_share(FOLIO)
    (tmp_path / "f").write_bytes(pattern(10 * FOLIO))
    check.fail(2 * FOLIO, errno.EIO)
    stream = Stream(tmp_path / "f", "r")
    libc.fread.restype = ctypes.c_size_t
    n = libc.fread(pointer(arena), ctypes.c_size_t(1000), ctypes.c_size_t(600), stream.file)
    assert ctypes.get_errno() == errno.EIO
    assert n == 2 * FOLIO // 1000
    assert stream.error()
    assert not stream.eof()
    stream.close()


def test_writers_of_one_stream_do_not_mix(arena: Bytes, tmp_path: Path) -> None:
    """The stream is locked across the chunks of one fwrite, as libc's own fwrite locks it."""
    check.set_share(FOLIO)
    n, writers = 20 * FOLIO, 4
    for i in range(writers):
        arena[i * n : (i + 1) * n] = i + 1
    check.evict()
    stream = Stream(tmp_path / "f", "w")

    def work(i: int) -> None:
        for _ in range(3):
            assert libc.fwrite(pointer(arena[i * n :]), ctypes.c_size_t(1), ctypes.c_size_t(n), stream.file) == n

    threads = [threading.Thread(target=work, args=(i,)) for i in range(writers)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    stream.close()
    blocks = np.fromfile(tmp_path / "f", dtype=np.uint8).reshape(-1, n)
    assert len(blocks) == 3 * writers
    assert (blocks.min(axis=1) == blocks.max(axis=1)).all()


def test_numpy_files(arena: Bytes, tmp_path: Path) -> None:
    check.set_share(FOLIO)
    x = arena[: 8 * 500_000].view(np.float64)
    x[:] = np.arange(len(x)) * 0.5
    gone(arena[: x.nbytes])
    x.tofile(tmp_path / "raw")
    np.save(tmp_path / "x.npy", x)
    with (tmp_path / "part").open("wb") as f:
        f.write(x.data)
    expected = np.arange(len(x)) * 0.5
    assert np.array_equal(np.fromfile(tmp_path / "raw"), expected)
    assert np.array_equal(np.load(tmp_path / "x.npy"), expected)
    assert np.array_equal(np.fromfile(tmp_path / "part"), expected)
    x[:] = 0
    gone(arena[: x.nbytes])
    with (tmp_path / "raw").open("rb") as f:
        assert f.readinto(x.data.cast("B")) == x.nbytes
    assert np.array_equal(x, expected)


# ---- pipes, sockets, terminals ----------------------------------------------------------------------


def test_a_pipe_gives_what_it_has(arena: Bytes) -> None:
    check.set_share(FOLIO)
    r, w = os.pipe()
    x = arena[10 : 10 + 5 * MIB]
    for n in (1, 100, 60_000):
        os.write(w, pattern(n))
        gone(x)
        assert os.readv(r, [x]) == n
        assert bytes(x[:n]) == pattern(n)
    os.close(w)
    assert os.readv(r, [x]) == 0


def test_a_pipe_is_not_read_twice(arena: Bytes) -> None:
    """Exactly as much as the first chunk holds is waiting: asking for more would block for ever."""
    check.set_share(FOLIO)
    r, w = os.pipe()
    x = arena[: 4 * FOLIO]
    os.write(w, pattern(FOLIO))
    gone(x)
    assert os.readv(r, [x]) == FOLIO
    libc.fcntl(w, 1031, 1 << 20)
    os.write(w, pattern(2 * FOLIO))
    gone(x)
    assert os.readv(r, [x]) in (FOLIO, 2 * FOLIO)


def test_blocking_and_nonblocking_pipe_writes(arena: Bytes) -> None:
    check.set_share(FOLIO)
    r, w = os.pipe()
    x = arena[5 : 5 + 3 * MIB]
    put(x, pattern(3 * MIB))
    got = bytearray()
    reader = threading.Thread(target=lambda: got.extend(Path(f"/proc/self/fd/{r}").read_bytes()))
    reader.start()
    assert os.write(w, x.data) == 3 * MIB
    os.close(w)
    reader.join()
    assert bytes(got) == pattern(3 * MIB)
    r, w = os.pipe()
    os.set_blocking(w, False)
    gone(x)
    n = os.write(w, x.data)
    assert n == 65536  # what a pipe holds
    with pytest.raises(BlockingIOError):
        os.write(w, x.data)
    assert os.read(r, 1 << 20) == pattern(3 * MIB)[:n]


def test_a_message_device_gets_its_whole_buffer(arena: Bytes) -> None:
    """eventfd wants eight bytes at once; the buffer lies across a folio's end."""
    check.set_share(FOLIO)
    fd = os.eventfd(0)
    x = arena[FOLIO - 3 : FOLIO + 5]
    put(x, struct.pack("Q", 77))
    assert os.write(fd, x.data) == 8
    x[:] = 0
    gone(x)
    assert os.readv(fd, [x]) == 8
    assert struct.unpack("Q", bytes(x)) == (77,)


def test_a_terminal_gives_a_line(arena: Bytes) -> None:
    main, side = os.openpty()
    os.write(main, b"hello\n")
    x = arena[FOLIO - 3 : 4 * FOLIO]
    gone(x)
    assert os.readv(side, [x]) == 6
    assert bytes(x[:6]) == b"hello\n"


def udp() -> tuple[socket.socket, socket.socket]:
    a, b = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    for s in (a, b):
        s.bind(("127.0.0.1", 0))
        s.settimeout(10)
    return a, b


def test_a_datagram_is_never_split(arena: Bytes) -> None:
    check.set_share(FOLIO)  # a datagram across a folio's end takes two pins
    a, b = udp()
    data = pattern(60_000)
    x, y = arena[40_000:100_000], arena[10 * FOLIO - 100 : 10 * FOLIO + 2 * MIB]
    put(x, data)
    assert a.sendto(x.data, b.getsockname()) == len(data)
    gone(y)
    n, sender = b.recvfrom_into(y.data)
    assert (n, sender) == (len(data), a.getsockname())
    assert bytes(y[:n]) == data
    gone(x)
    a.connect(b.getsockname())
    assert a.send(x.data) == len(data)
    gone(y)
    assert b.recv_into(y.data) == len(data)
    assert a.sendmsg([x[:100].data, b"plain", x[100:].data]) == len(data) + 5
    gone(y)
    n, _, _, _ = b.recvmsg_into([y[:50].data, y[50:].data])
    assert bytes(y[:n]) == data[:100] + b"plain" + data[100:]
    put(x, data)
    assert os.write(a.fileno(), x.data) == len(data)
    gone(y)
    assert os.readv(b.fileno(), [y]) == len(data)


@pytest.mark.parametrize("kind", [socket.SOCK_DGRAM, socket.SOCK_SEQPACKET])
def test_long_messages_on_local_sockets(arena: Bytes, kind: socket.SocketKind) -> None:
    check.set_share(FOLIO)
    a, b = socket.socketpair(socket.AF_UNIX, kind)
    data = pattern(150_000)
    x, y = arena[7 : 7 + len(data)], arena[20 * FOLIO + 9 : 20 * FOLIO + 9 + MIB]
    for send in (a.send, lambda v: os.write(a.fileno(), v), lambda v: a.sendmsg([v])):
        put(x, data)
        assert send(x.data) == len(data)
        gone(y)
        assert b.recv_into(y.data) == len(data)
        assert bytes(y[: len(data)]) == data


def test_a_message_that_cannot_be_pinned_whole_is_not_sent(arena: Bytes) -> None:
    check.set_share(FOLIO)
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    b.setblocking(False)
    x = arena[: 3 * FOLIO]
    put(x, pattern(3 * FOLIO))
    check.fail(2 * FOLIO, errno.EIO)
    senders: list[Any] = [a.send, lambda data: os.write(a.fileno(), data), lambda data: a.sendmsg([data])]
    for part in (x, x[FOLIO + 1 : 2 * FOLIO + 9]):
        for send in senders:
            with pytest.raises(OSError) as caught:
                send(part.data)
            assert caught.value.errno == errno.EIO
    with pytest.raises(BlockingIOError):
        b.recv(10)


def tcp() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        a = socket.create_connection(server.getsockname())
        b, _ = server.accept()
    a.settimeout(None)
    return a, b


def test_tcp(arena: Bytes) -> None:
    check.set_share(FOLIO)
    n = 6 * MIB
    data = pattern(n)
    x, y = arena[11 : 11 + n], arena[20 * MIB + 5 : 20 * MIB + 5 + n]
    for send in (
        lambda s: s.send(x.data),
        lambda s: s.sendmsg([x[:100].data, x[100 : 3 * MIB].data, data[3 * MIB : 4 * MIB], x[4 * MIB :].data]),
        lambda s: os.writev(s.fileno(), [x[:MIB], x[MIB:]]),
        lambda s: os.write(s.fileno(), x.data),
    ):
        a, b = tcp()
        put(x, data)
        y[:] = 0
        gone(y)
        sent: list[int] = []
        worker = threading.Thread(target=lambda s=send, a=a, sent=sent: (sent.append(s(a)), a.close()))
        worker.start()
        got = 0
        while True:
            check.set_share(FOLIO)
            k, _, _, _ = b.recvmsg_into([y[got : got + 10].data, y[got + 10 :].data])
            if k == 0:
                break
            got += k
        worker.join()
        assert sent == [n]
        assert got == n
        assert bytes(y) == data
        b.close()


def test_waitall_and_peek(arena: Bytes) -> None:
    check.set_share(FOLIO)
    n = 2 * MIB
    data = pattern(n)
    y = arena[5 : 5 + n]
    receivers: list[Any] = [
        lambda s: s.recv_into(y.data, 0, socket.MSG_WAITALL),
        lambda s: s.recvmsg_into([y[:100].data, y[100:].data], 0, socket.MSG_WAITALL)[0],
        lambda s: s.recvfrom_into(y.data, 0, socket.MSG_WAITALL)[0],
    ]

    def late(s: socket.socket) -> None:
        s.sendall(data[:1000])
        time.sleep(0.02)
        s.sendall(data[1000:])

    for receive in receivers:
        for a, b in (tcp(), socket.socketpair()):
            y[:] = 0
            gone(y)
            worker = threading.Thread(target=late, args=(a,))
            worker.start()
            while b.recv(1000, socket.MSG_PEEK | socket.MSG_WAITALL) != data[:1000]:
                pass
            k = b.recv_into(y.data, 0, socket.MSG_PEEK)
            assert 1000 <= k <= n
            assert bytes(y[:k]) == data[:k]
            gone(y)
            assert receive(b) == n
            worker.join()
            assert bytes(y) == data
            a.close()
            gone(y)
            assert receive(b) == 0
            b.close()


def test_peek_gives_one_chunk(arena: Bytes) -> None:
    """More is waiting than a chunk holds: peeking again would give the same bytes a second time."""
    check.set_share(FOLIO)
    a, b = socket.socketpair()
    a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    data = pattern(400_000)
    sent = a.send(data, socket.MSG_DONTWAIT)
    assert sent > 3 * FOLIO
    y = arena[: 8 * FOLIO]
    for flags in (socket.MSG_PEEK, socket.MSG_PEEK | socket.MSG_WAITALL):
        y[:] = 0
        gone(y)
        k = b.recv_into(y.data, 0, flags)
        assert FOLIO <= k < sent
        assert bytes(y[:k]) == data[:k]
        assert not y[k:].any()


def test_control_messages_end_a_long_receive(arena: Bytes) -> None:
    """The next chunk would overwrite them, so what came with the first one is returned with it."""
    check.set_share(FOLIO)
    a, b = socket.socketpair()
    b.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)  # the sender's identity with each message
    data = pattern(500_000)
    worker = threading.Thread(target=a.sendall, args=(data,))
    worker.start()
    y = arena[: len(data)]
    got = calls = 0
    while got < len(data):
        gone(arena[: len(data)])
        k, ancillary, flags, _ = b.recvmsg_into([y[got:].data], socket.CMSG_SPACE(12), socket.MSG_WAITALL)
        assert 0 < k <= 2 * FOLIO
        assert struct.unpack("iii", ancillary[0][2])[0] == os.getpid()
        assert not flags & socket.MSG_CTRUNC
        got += k
        calls += 1
    worker.join()
    assert calls >= 4
    assert bytes(y) == data


def test_descriptors_travel_once(arena: Bytes) -> None:
    """A long sendmsg in chunks: the descriptor goes with the first one, and only with it."""
    check.set_share(FOLIO)
    a, b = socket.socketpair()
    n = 500_000
    x, y = arena[:n], arena[MIB : MIB + n]
    put(x, pattern(n))
    r, w = os.pipe()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", w))]
    worker = threading.Thread(target=lambda: a.sendmsg([x.data], rights))
    worker.start()
    got, fds = 0, []
    while got < n:
        gone(y)
        k, ancillary, flags, _ = b.recvmsg_into([y[: n - got].data], socket.CMSG_SPACE(4), socket.MSG_WAITALL)
        assert bytes(y[:k]) == pattern(n)[got : got + k]
        assert not flags & socket.MSG_CTRUNC
        fds += [struct.unpack("i", c[2][:4])[0] for c in ancillary]
        got += k
    worker.join()
    assert len(fds) == 1
    os.write(fds[0], b"through")
    assert os.read(r, 100) == b"through"


def test_control_messages_that_are_sent_are_unpinned_whatever_comes(arena: Bytes) -> None:
    check.set_share(FOLIO)  # control over a folio's end takes two pins
    a, b = socket.socketpair()
    control = arena[3 * FOLIO - 16 : 3 * FOLIO + 8]
    body = arena[:4]
    put(body, b"body")
    rights = struct.pack("Qiii4x", 20, socket.SOL_SOCKET, socket.SCM_RIGHTS, a.fileno())
    put(control, rights)
    vector = (ctypes.c_size_t * 2)(addr(body), 4)
    head = (ctypes.c_size_t * 7)(0, 0, ctypes.addressof(vector), 1, addr(control), 24, 0)
    libc.sendmsg.restype = ctypes.c_ssize_t
    assert libc.sendmsg(a.fileno(), head, 0) == 4
    assert check.counts()[2] == 0
    check.fail(3 * FOLIO, errno.EIO)  # its second half
    assert c_errno(libc.sendmsg(a.fileno(), head, 0)) == errno.EIO
    assert check.counts()[2] == 0, "the first half"
    received, fds, _, _ = socket.recv_fds(b, 100, 4)
    assert (received, len(fds)) == (b"body", 1), "sent once"
    os.close(fds[0])


def test_headers_addresses_and_control_in_swapped_memory(arena: Bytes) -> None:
    a, b = udp()
    b.setsockopt(socket.IPPROTO_IP, 8, 1)  # IP_PKTINFO: a control message with each datagram
    where = arena[5 * FOLIO - 8 : 5 * FOLIO + 8]
    port = b.getsockname()[1]
    put(
        where,
        struct.pack("=H", socket.AF_INET) + struct.pack("!H", port) + socket.inet_aton("127.0.0.1") + bytes(8),
    )
    body = arena[7 * FOLIO - 10 : 7 * FOLIO + 10]
    put(body, pattern(20))
    assert libc.sendto(a.fileno(), pointer(body), ctypes.c_size_t(20), 0, pointer(where), 16) == 20
    head = arena[9 * FOLIO - 20 : 9 * FOLIO + 36]
    vector = arena[11 * FOLIO - 8 : 11 * FOLIO + 8]
    control = arena[13 * FOLIO - 8 : 13 * FOLIO + 120]
    put(vector, struct.pack("QQ", addr(body), 20))
    put(head, struct.pack("QQQQQQQ", addr(where), 16, addr(vector), 1, addr(control), 128, 0))
    body[:] = 0
    where[:] = 0
    check.evict()
    libc.recvmsg.restype = ctypes.c_ssize_t
    assert libc.recvmsg(b.fileno(), pointer(head), 0) == 20
    assert bytes(body) == pattern(20)
    assert struct.unpack("!H", bytes(where[2:4]))[0] == a.getsockname()[1]
    fields = struct.unpack("QQQQQQQ", bytes(head))
    assert (fields[1], fields[5]) == (16, 32)
    assert struct.unpack("Qii", bytes(control[:16]))[1:] == (socket.IPPROTO_IP, 8)
    # and back, all of it swapped again
    check.evict()
    put(head, struct.pack("QQQQQQQ", addr(where), 16, addr(vector), 1, 0, 0, 0))
    libc.sendmsg.restype = ctypes.c_ssize_t
    assert libc.sendmsg(b.fileno(), pointer(head), 0) == 20
    check.evict()
    length = arena[15 * FOLIO - 2 : 15 * FOLIO + 2]
    put(length, struct.pack("I", 16))
    assert libc.recvfrom(a.fileno(), pointer(body), ctypes.c_size_t(20), 0, pointer(where), pointer(length)) == 20
    assert struct.unpack("I", bytes(length)) == (16,)
    assert struct.unpack("!H", bytes(where[2:4]))[0] == port


def test_several_messages_at_once(arena: Bytes) -> None:
    check.set_share(FOLIO)
    a, b = udp()
    a.connect(b.getsockname())
    bodies = [arena[i * 2 * FOLIO - 50 : i * 2 * FOLIO + 1000] for i in range(1, 5)]
    for i, body in enumerate(bodies):
        put(body, pattern(1050, i))
    vectors = (ctypes.c_uint64 * 8)(*[v for body in bodies for v in (addr(body), 1050)])
    base = ctypes.addressof(vectors)
    raw = b"".join(struct.pack("QQQQQQQQ", 0, 0, base + 16 * i, 1, 0, 0, 0, 0) for i in range(4))
    messages = ctypes.create_string_buffer(raw, len(raw))
    assert libc.sendmmsg(a.fileno(), messages, 4, 0) == 4
    for body in bodies:
        body[:] = 0
    swapped = arena[40 * FOLIO - 100 : 40 * FOLIO - 100 + len(raw)]
    put(swapped, raw)
    limit = (ctypes.c_long * 2)(5, 0)
    assert libc.recvmmsg(b.fileno(), pointer(swapped), 4, 0, limit) == 4
    assert 4 <= limit[0] + limit[1] / 1e9 < 5
    for i, body in enumerate(bodies):
        assert bytes(body) == pattern(1050, i)
        assert struct.unpack_from("I", bytes(swapped), 64 * i + 56) == (1050,)
    check.evict()
    assert libc.sendmmsg(a.fileno(), messages, 2, 0) == 2
    put(swapped, raw)
    b.settimeout(None)
    b.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("qq", 3, 0))
    start = time.monotonic()
    assert libc.recvmmsg(b.fileno(), pointer(swapped), 4, 0x10000, None) == 2  # MSG_WAITFORONE
    assert time.monotonic() - start < 2, "it waited for a third"
    bad = (ctypes.c_long * 2)(0, 2_000_000_000)
    assert c_errno(libc.recvmmsg(b.fileno(), pointer(swapped), 4, 0, bad)) == errno.EINVAL


def test_zero_copy_is_declined(arena: Bytes) -> None:
    """The kernel would read the pages after they may have left; programs know ENOBUFS and copy."""
    a, _ = tcp()
    a.setsockopt(socket.SOL_SOCKET, 60, 1)
    put(arena[:1000], pattern(1000))
    with pytest.raises(OSError) as caught:
        a.send(arena[:1000].data, 0x4000000)
    assert caught.value.errno == errno.ENOBUFS


@pytest.mark.parametrize("name", ["__recv_chk", "__recvfrom_chk", "__read_chk", "recv", "__read"])
def test_fortified_variants(arena: Bytes, name: str) -> None:
    a, b = socket.socketpair()
    a.send(pattern(1000))
    x = arena[FOLIO - 500 : FOLIO + 500]
    gone(x)
    n = ctypes.c_size_t(1000)
    args: list[Any] = [b.fileno(), pointer(x), n]
    if name.endswith("_chk"):
        args.append(n)
    if "recv" in name:
        args.append(0)
    if "recvfrom" in name:
        args += [None, None]
    call = getattr(libc, name)
    call.restype = ctypes.c_ssize_t
    assert call(*args) == 1000
    assert bytes(x) == pattern(1000)


def test_a_fortified_overflow_still_aborts() -> None:
    done = python("""
        import ctypes
        from userswap.memory import _syscalls_check as check
        address = check.start(1 << 20)
        ctypes.CDLL(None).__read_chk(0, ctypes.c_void_p(address), ctypes.c_size_t(10), ctypes.c_size_t(9))
    """)
    assert done.returncode == -signal.SIGABRT
    assert "buffer overflow detected" in done.stderr


def test_random_bytes(arena: Bytes) -> None:
    check.set_share(FOLIO)
    x = arena[9 : 9 + MIB]
    gone(x)
    assert libc.getrandom(pointer(x), ctypes.c_size_t(len(x)), 0) == len(x)
    counts = np.bincount(x, minlength=256)
    assert counts.min() > 3000  # 4096 expected
    y = arena[FOLIO - 100 : FOLIO + 100]
    y[:] = 0
    gone(y)
    assert libc.getentropy(pointer(y), ctypes.c_size_t(200)) == 0
    assert np.count_nonzero(y) > 150
    assert c_errno(libc.getentropy(pointer(arena), ctypes.c_size_t(257))) == errno.EIO


# ---- libraries ------------------------------------------------------------------------------------


def build(path: Path, code: str, *options: str) -> Path:
    source = path.with_suffix(".c")
    source.write_text(code)
    # No sibling calls: libc looks at the return address of dlopen and dlsym, which shall be in this library.
    keep = "-fno-optimize-sibling-calls"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", keep, *options, "-o", path, source], check=True)
    return path


READER = """
#include <unistd.h>
static ssize_t (*table[])(int, void *, size_t) = { read };
ssize_t reads(int fd, void *p, size_t n) { return read(fd, p, n); }
ssize_t reads_by_table(int fd, void *p, size_t n) {
    return ((ssize_t (*volatile *)(int, void *, size_t))table)[0](fd, p, n);
}
"""


@pytest.mark.parametrize(
    "options", [["-Wl,-z,now"], ["-Wl,-z,lazy"], ["-Wl,-z,norelro"], ["-fno-plt"], ["-D_FORTIFY_SOURCE=2"]]
)
def test_a_library_loaded_later(arena: Bytes, tmp_path: Path, options: list[str]) -> None:
    lib = ctypes.CDLL(str(build(tmp_path / "later.so", READER, *options)))
    fd = file_with(tmp_path / "f", pattern(1000))
    for call in (lib.reads, lib.reads_by_table):
        os.lseek(fd, 0, os.SEEK_SET)
        x = arena[FOLIO - 500 : FOLIO + 500]
        x[:] = 0
        gone(x)
        call.restype = ctypes.c_ssize_t
        assert call(fd, pointer(x), ctypes.c_size_t(1000)) == 1000
        assert bytes(x) == pattern(1000)


def protection(address: int) -> str:
    with Path("/proc/self/maps").open() as maps:
        for line in maps:
            span, bits = line.split()[:2]
            low, high = (int(part, 16) for part in span.split("-"))
            if low <= address < high:
                return bits
    raise AssertionError("not mapped")


@pytest.mark.parametrize("binding", ["now", "lazy"])
def test_protection_of_tables_is_put_back(arena: Bytes, tmp_path: Path, binding: str) -> None:
    path = build(tmp_path / "full.so", READER + "int data = 5;", f"-Wl,-z,{binding}", "-Wl,-z,relro")
    before = syscalls.patched()
    lib = ctypes.CDLL(str(path))
    after = syscalls.patched()
    assert after.objects == before.objects + 1
    assert after.slots >= before.slots + 2
    assert after.refused == before.refused
    # The segment that the loader protects, from the file's program headers.
    image = path.read_bytes()
    start, size, n = *struct.unpack_from("Q", image, 32), *struct.unpack_from("HH", image, 54)
    headers = [struct.unpack_from("IIQQQQQQ", image, start + i * size) for i in range(n)]
    relro = next(h for h in headers if h[0] == 0x6474E552)
    with Path("/proc/self/maps").open() as maps:
        base = min(int(line.split("-")[0], 16) for line in maps if line.rstrip().endswith(str(path)))
    assert protection(base + relro[3]) == "r--p"
    assert protection(ctypes.addressof(ctypes.c_int.in_dll(lib, "data"))) == "rw-p"


def test_unloading_and_loading_at_the_same_place(arena: Bytes, tmp_path: Path) -> None:
    fd = file_with(tmp_path / "f", pattern(1000))
    places = set()
    for i in range(6):
        path = build(tmp_path / f"again{i}.so", READER)
        lib = ctypes.CDLL(str(path))
        places.add(ctypes.cast(lib.reads, ctypes.c_void_p).value)
        os.lseek(fd, 0, os.SEEK_SET)
        gone(arena)
        lib.reads.restype = ctypes.c_ssize_t
        assert lib.reads(fd, pointer(arena), ctypes.c_size_t(1000)) == 1000
        libc.dlclose(ctypes.c_void_p(lib._handle))
    assert len(places) < 6, "no library came to an earlier one's place: nothing was tried"


OUTER = """
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
void *opens(const char *name, int mode) { return dlopen(name, mode); }
void *opens_here(const char *name) { return dlmopen(LM_ID_BASE, name, RTLD_NOW); }
void *opens_apart(const char *name) { return dlmopen(LM_ID_NEWLM, name, RTLD_NOW); }
int number_of(void *library) {
    int (*f)(void) = (int (*)(void))dlsym(library, "number");
    return f ? f() : -1;
}
void *next(const char *name) { return dlsym(RTLD_NEXT, name); }
void *any(const char *name) { return dlsym(RTLD_DEFAULT, name); }
void *any_version(const char *name, const char *version) { return dlvsym(RTLD_DEFAULT, name, version); }
"""


@pytest.mark.parametrize("tags", ["--enable-new-dtags", "--disable-new-dtags"])
def test_dlopen_searches_the_callers_path(arena: Bytes, tmp_path: Path, tags: str) -> None:
    inner = tmp_path / "inner"
    inner.mkdir()
    key = f"{tmp_path.name}"
    for i, directory in enumerate((inner, tmp_path)):
        build(directory / f"libnumber-{key}.so", f"int number(void) {{ return {i + 1}; }}")
        build(directory / f"libother-{key}.so", f"int number(void) {{ return {i + 11}; }}")
    with_path = ctypes.CDLL(
        str(build(tmp_path / f"with-{key}.so", OUTER, f"-Wl,{tags},-rpath,$ORIGIN/nowhere:$ORIGIN/inner"))
    )
    without = ctypes.CDLL(str(build(tmp_path / f"without-{key}.so", OUTER)))
    for lib in (with_path, without):
        for call in (lib.opens, lib.opens_here):
            call.restype = ctypes.c_void_p
        lib.number_of.argtypes = [ctypes.c_void_p]
    name = f"libnumber-{key}.so".encode()
    libc.dlerror.restype = ctypes.c_char_p  # here: looking a function up forgets the last error
    assert without.opens(name, 2) is None  # RTLD_NOW
    assert b"cannot open shared object" in libc.dlerror()
    assert with_path.opens(name, 2 | 4) is None  # RTLD_NOLOAD
    assert with_path.number_of(with_path.opens(name, 2)) == 1
    assert libc.dlerror() is None
    assert with_path.number_of(with_path.opens(name, 2 | 4)) == 1
    assert with_path.number_of(with_path.opens_here(f"libother-{key}.so".encode())) == 11
    assert with_path.number_of(with_path.opens(f"$ORIGIN/libother-{key}.so".encode(), 2)) == 12
    assert with_path.number_of(with_path.opens(f"${{ORIGIN}}/libnumber-{key}.so".encode(), 2)) == 2
    assert with_path.opens(b"libc.so.6", 2) is not None
    assert with_path.opens(None, 2) is not None


def test_a_library_in_a_namespace_of_its_own_is_left_alone(arena: Bytes, tmp_path: Path) -> None:
    outer = ctypes.CDLL(str(build(tmp_path / "apart.so", OUTER)))
    outer.opens_apart.restype = ctypes.c_void_p
    before = syscalls.patched()
    handle = outer.opens_apart(bytes(build(tmp_path / "aparted.so", READER)))
    assert handle
    assert syscalls.patched() == before


def test_dlsym_gives_the_wrapper_but_not_to_who_asks_for_the_next(arena: Bytes, tmp_path: Path) -> None:
    lib = ctypes.CDLL(str(build(tmp_path / "asks.so", OUTER)))
    for call in (lib.next, lib.any, lib.any_version):
        call.restype = ctypes.c_void_p
    wrapper, real = lib.any(b"read"), lib.next(b"read")
    assert wrapper and real and wrapper != real
    assert lib.any_version(b"read", b"GLIBC_2.2.5" if os.uname().machine == "x86_64" else b"GLIBC_2.17") == wrapper
    assert ctypes.cast(libc.read, ctypes.c_void_p).value == wrapper
    assert lib.any(b"strlen") == lib.next(b"strlen") != 0
    assert lib.any(b"no_such_function_anywhere") is None


def test_dlsym_next_is_the_callers_next(tmp_path: Path) -> None:
    """Two libraries with one function: the first asks for the next, and must not get its own."""
    build(tmp_path / "libsecond.so", "int which(void) { return 2; }")
    build(
        tmp_path / "libfirst.so",
        """
        #define _GNU_SOURCE
        #include <dlfcn.h>
        int which(void) { return 1; }
        int asks(void) { int (*f)(void) = (int (*)(void))dlsym(RTLD_NEXT, "which"); return f ? f() : -1; }
        """,
        f"-L{tmp_path}",
        "-Wl,--no-as-needed,-lsecond",
        f"-Wl,-rpath,{tmp_path}",
    )
    done = python(
        """
        import ctypes, sys
        from userswap.memory import syscalls
        syscalls.install()
        print(ctypes.CDLL(sys.argv[1]).asks())
        """,
        str(tmp_path / "libfirst.so"),
    )
    assert done.stdout.split() == ["2"], done.stderr


LOADER = """
#include <dlfcn.h>
#include <pthread.h>
#include <stddef.h>
static const char **paths; static int count, step;
static void *run(void *start) {
    for (int i = (int)(size_t)start; i < count; i += step) dlopen(paths[i], RTLD_NOW);
    return NULL;
}
void loads(const char **p, int n, int threads) {
    pthread_t t[8];
    paths = p; count = n; step = threads;
    for (size_t i = 0; i < threads; i++) pthread_create(&t[i], NULL, run, (void *)i);
    for (int i = 0; i < threads; i++) pthread_join(t[i], NULL);
}
"""


def test_loading_from_several_threads(arena: Bytes, tmp_path: Path) -> None:
    """A library that another thread is loading is in the list before it is relocated."""
    slow = "int pad[2]; static void *p[150000] = { [0 ... 149999] = &pad[1] }; void *get(int i) { return p[i]; }"
    first = build(tmp_path / "many.so", READER + slow, "-Wl,-z,now")
    copies = [tmp_path / f"copy{i}.so" for i in range(12)]
    for copy in copies:
        copy.write_bytes(first.read_bytes())
    loader = ctypes.CDLL(str(build(tmp_path / "loader.so", LOADER, "-pthread")))
    names = (ctypes.c_char_p * len(copies))(*map(os.fsencode, copies))
    loader.loads(names, len(copies), 3)  # without the GIL
    r, w = os.pipe()
    gone(arena)
    for copy in copies:
        lib = ctypes.CDLL(str(copy))
        for call in (lib.reads, lib.reads_by_table):
            call.restype = ctypes.c_ssize_t
            os.write(w, pattern(500))
            assert call(r, pointer(arena), ctypes.c_size_t(500)) == 500, "its table was written before it was relocated"


def test_repeated_dlopen_is_cheap(arena: Bytes, tmp_path: Path) -> None:
    path = str(build(tmp_path / "cheap.so", READER)).encode()
    libc.dlopen.restype = ctypes.c_void_p
    libc.dlopen(path, 2)
    best = min(_timed(lambda: libc.dlopen(path, 2)) for _ in range(200))
    assert best < 100e-6


def _timed(work: Any) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def test_our_own_modules_are_not_patched(arena: Bytes) -> None:
    import_address = ctypes.cast(libc.read, ctypes.c_void_p).value
    assert import_address
    for path in (syscalls.__file__, check.__file__):
        with Path("/proc/self/maps").open() as maps:
            spans = [line.split() for line in maps if line.rstrip().endswith(path)]
        assert spans
        needle = struct.pack("Q", import_address)
        for fields in spans:
            low, high = (int(part, 16) for part in fields[0].split("-"))
            if path == syscalls.__file__ and "w" in fields[1]:
                continue  # its table of names has every wrapper's address
            if fields[1].startswith("r"):
                assert needle not in ctypes.string_at(low, high - low)


def test_after_a_fork_libraries_are_patched_too(arena: Bytes, tmp_path: Path) -> None:
    path = build(tmp_path / "forked.so", READER)
    before = syscalls.patched().objects
    pid = os.fork()
    if pid == 0:
        try:
            ctypes.CDLL(str(path))
            os._exit(0 if syscalls.patched().objects == before + 1 else 1)
        finally:
            os._exit(2)
    assert os.waitpid(pid, 0)[1] == 0


# ---- SIGBUS ---------------------------------------------------------------------------------------

START = """
import ctypes, faulthandler, mmap, os, signal, sys, tempfile, threading
from userswap.memory import _syscalls_check as check
def start():
    global address, memory
    address = check.start(1 << 20)
    memory = (ctypes.c_char * (1 << 20)).from_address(address)
def genuine():
    "A bus error that is nobody's: a load behind the end of a file."
    with tempfile.TemporaryFile() as f:
        f.write(b"x"); f.flush()
        view = mmap.mmap(f.fileno(), 1)
        os.ftruncate(f.fileno(), 0)
        return view[0]
libc = ctypes.CDLL(None, use_errno=True)
"""


def sigbus(code: str) -> subprocess.CompletedProcess[str]:
    return python(START + textwrap.dedent(code))


def died_of_sigbus(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == -signal.SIGBUS, (done.returncode, done.stdout, done.stderr)
    assert "went on" not in done.stdout


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "sent", ["genuine()", "os.kill(os.getpid(), signal.SIGBUS)", "signal.raise_signal(signal.SIGBUS)"]
)
def test_without_a_handler_the_process_dies(before: bool, sent: str) -> None:
    died_of_sigbus(sigbus(f"start(); memory[5]; {sent}; print('went on')"))


@pytest.mark.parametrize("order", ["start(); faulthandler.enable()", "faulthandler.enable(); start()"])
@pytest.mark.parametrize("sent", ["genuine()", "os.kill(os.getpid(), signal.SIGBUS)"])
def test_faulthandler_prints_and_the_process_dies(order: str, sent: str) -> None:
    done = sigbus(f"{order}; memory[70000]; {sent}; print('went on')")
    died_of_sigbus(done)
    assert "Bus error" in done.stderr
    assert "most recent call first" in done.stderr
    assert done.stderr.count("Bus error") == 1


def test_ignored_when_sent_but_not_when_it_is_a_fault() -> None:
    done = sigbus("""
        start()
        signal.signal(signal.SIGBUS, signal.SIG_IGN)
        os.kill(os.getpid(), signal.SIGBUS)
        print("ignored", memory[100000], flush=True)
        genuine()
        print("went on")
    """)
    died_of_sigbus(done)
    assert "ignored" in done.stdout


@pytest.mark.parametrize(
    "first", ["start(); signal.signal(signal.SIGBUS, note)", "signal.signal(signal.SIGBUS, note); start()"]
)
def test_a_python_handler_gets_what_is_sent(first: str) -> None:
    done = sigbus(f"""
        seen = []
        def note(*_): seen.append(1)
        {first}
        assert signal.getsignal(signal.SIGBUS) is note
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGBUS)
        memory[3], memory[200000]
        assert len(seen) == 3, seen
        previous = signal.signal(signal.SIGBUS, signal.SIG_DFL)
        assert previous is note
        memory[300000]
        print("fine")
    """)
    assert done.stdout.split() == ["fine"], done.stderr


HANDLERS = r"""
#define _GNU_SOURCE
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>
static sigjmp_buf back;
static volatile int calls, blocked_usr1, blocked_bus;
static void *volatile where;
static void looks(void) {
    sigset_t now; pthread_sigmask(SIG_SETMASK, NULL, &now);
    blocked_usr1 = sigismember(&now, SIGUSR1); blocked_bus = sigismember(&now, SIGBUS); calls++;
}
static void three(int s, siginfo_t *i, void *c) { looks(); where = i->si_addr; siglongjmp(back, 1); }
static void one(int s) { looks(); siglongjmp(back, 1); }
int set(int how, int flags, int with_usr1) {
    struct sigaction a, now; memset(&a, 0, sizeof a);
    a.sa_flags = flags;
    if (flags & SA_SIGINFO) a.sa_sigaction = three; else a.sa_handler = one;
    if (with_usr1) sigaddset(&a.sa_mask, SIGUSR1);
    if (how == 1) { if (signal(SIGBUS, one) == SIG_ERR) return -1; a.sa_handler = one; }
    else if (how == 2) { if (sysv_signal(SIGBUS, one) == SIG_ERR) return -1; a.sa_handler = one; }
    else if (sigaction(SIGBUS, &a, NULL)) return -1;
    if (sigaction(SIGBUS, NULL, &now)) return -2;
    return now.sa_handler == a.sa_handler ? now.sa_flags & ~0x04000000 : -3;
}
int is_default(void) {
    struct sigaction now;
    sigaction(SIGBUS, NULL, &now);
    return now.sa_handler == SIG_DFL;
}
int tells_before(void) {
    signal(SIGBUS, SIG_IGN);
    return signal(SIGBUS, one) == SIG_IGN && sysv_signal(SIGBUS, SIG_DFL) == one
        && signal(SIGBUS, one) == SIG_DFL;
}
int bad(void) { return signal(SIGBUS, SIG_ERR) == SIG_ERR; }
int try(volatile char *p, int *usr1, int *bus) {
    int before = calls;
    if (sigsetjmp(back, 1) == 0) { char c = *p; (void)c; return -1; }
    *usr1 = blocked_usr1; *bus = blocked_bus;
    return (calls - before) * 10 + (where == p);
}
int others_mask_has_bus(char *swapped) {
    static int seen; seen = -1;
    struct sigaction a, b;
    memset(&a, 0, sizeof a);
    sigfillset(&a.sa_mask);
    a.sa_handler = SIG_IGN;
    if (swapped) { memcpy(swapped, &a, sizeof a); sigaction(SIGUSR2, (struct sigaction *)swapped, NULL); }
    else sigaction(SIGUSR2, &a, NULL);
    sigaction(SIGUSR2, NULL, &b);
    return sigismember(&b.sa_mask, SIGBUS) * 2 + sigismember(&b.sa_mask, SIGUSR1);
}
"""


def test_a_c_handler_is_called_as_the_kernel_would(tmp_path: Path) -> None:
    build(tmp_path / "handlers.so", HANDLERS)
    done = sigbus(f"""
        start()
        lib = ctypes.CDLL("{tmp_path}/handlers.so")
        f = tempfile.TemporaryFile(); f.write(b"x"); f.flush()
        view = mmap.mmap(f.fileno(), 1)
        point = ctypes.addressof(ctypes.c_char.from_buffer(view))
        os.ftruncate(f.fileno(), 0)
        SIGINFO, NODEFER, RESETHAND, RESTART = 4, 0x40000000, 0x80000000 - (1 << 32), 0x10000000
        usr1, bus = ctypes.c_int(), ctypes.c_int()
        def attempt():
            r = lib.try_(ctypes.c_void_p(point), ctypes.byref(usr1), ctypes.byref(bus))
            assert memory[(attempt.n * 65536) % (1 << 20)] is not None; attempt.n += 1   # we still serve ours
            check.evict()
            return r, usr1.value, bus.value
        attempt.n = 0
        lib.try_ = lib["try"]
        assert lib.set(0, SIGINFO, 0) == SIGINFO
        assert attempt() == (11, 0, 1), "three arguments"
        assert attempt() == (11, 0, 1), "after a longjmp out of the handler"
        assert lib.set(0, SIGINFO | NODEFER, 1) == SIGINFO | NODEFER
        assert attempt() == (11, 1, 0), "its mask, and SA_NODEFER"
        assert lib.set(0, 0, 0) == 0
        assert attempt()[0] // 10 == 1, "one argument"
        assert lib.set(1, 0, 0) == RESTART
        assert attempt()[0] // 10 == 1 and bus.value == 1, "signal()"
        assert lib.set(2, 0, 0) & NODEFER
        assert attempt()[0] // 10 == 1 and bus.value == 0, "sysv_signal()"
        assert lib.is_default(), "reset by its first use"
        assert lib.set(0, SIGINFO | RESETHAND, 0) == SIGINFO | RESETHAND
        assert attempt()[0] == 11
        assert lib.is_default()
        assert lib.bad()
        assert lib.tells_before() and not lib.is_default()
        lib.set(0, 0, 0)
        assert lib.others_mask_has_bus(None) == 1
        check.evict()
        assert lib.others_mask_has_bus(ctypes.c_void_p(address + 65536 - 20)) == 1
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        print("fine", flush=True)
        attempt()
    """)
    assert done.stdout.split() == ["fine"], done.stderr
    died_of_sigbus(done)


def test_sigbus_cannot_be_blocked() -> None:
    done = sigbus("""
        start()
        everything = range(1, signal.NSIG)
        def work():
            signal.pthread_sigmask(signal.SIG_BLOCK, everything)
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
            assert signal.SIGBUS not in mask and signal.SIGUSR1 in mask, mask
            memory[5]
            old = signal.pthread_sigmask(signal.SIG_SETMASK, everything)
            assert signal.SIGBUS not in old
            memory[100000]
            signal.pthread_sigmask(signal.SIG_UNBLOCK, everything)
            assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
            full = (ctypes.c_char * 128)(*[b"\\xff"] * 128)
            for call in (libc.sigprocmask, libc.pthread_sigmask):
                new, old = address + 65536 - 60, address + 131072 - 60
                ctypes.memmove(new, full, 128)
                check.evict()
                assert call(2, ctypes.c_void_p(new), ctypes.c_void_p(old)) == 0
                assert signal.SIGBUS not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
                memory[200000], memory[300000]
            assert libc.pthread_sigmask(77, full, None) == 22
            assert libc.sigprocmask(77, full, None) == -1 and ctypes.get_errno() == 22
            done.append(1)
        done = []
        for run in (work, lambda: threading.Thread(target=work).run()):
            run()
        t = threading.Thread(target=work); t.start(); t.join()
        assert len(done) == 3
        print("fine")
    """)
    assert done.stdout.split() == ["fine"], done.stderr


def test_faults_of_many_threads_while_handlers_change() -> None:
    done = sigbus("""
        import numpy as np
        start()
        x = np.frombuffer(memory, dtype=np.uint8)
        stop = []
        def touch():
            while not stop:
                x[:: 4096].sum()
        threads = [threading.Thread(target=touch) for _ in range(3)]
        for t in threads: t.start()
        for i in range(3000):
            signal.signal(signal.SIGBUS, (lambda *_: None) if i % 2 else signal.SIG_IGN)
            os.kill(os.getpid(), signal.SIGBUS)
            check.evict()
        stop.append(1)
        for t in threads: t.join()
        print("fine")
    """)
    assert done.stdout.split() == ["fine"], done.stderr


def test_fork_while_another_thread_changes_the_handler(tmp_path: Path) -> None:
    """A child may inherit our lock from a thread that it does not have."""
    code = """
        #include <pthread.h>
        #include <signal.h>
        static volatile int stop;
        static void *run(void *p) { while (!stop) signal(SIGBUS, SIG_IGN); return p; }
        void begin(void) { static pthread_t t; pthread_create(&t, NULL, run, NULL); }
        void end(void) { stop = 1; }
    """
    build(tmp_path / "changes.so", code, "-pthread")
    done = sigbus(f"""
        start()
        lib = ctypes.CDLL("{tmp_path}/changes.so")
        lib.begin()
        for i in range(150):
            pid = os.fork()
            if pid == 0:
                signal.alarm(3)
                signal.signal(signal.SIGBUS, signal.SIG_DFL)
                os._exit(0)
            status = os.waitpid(pid, 0)[1]
            assert status == 0, (i, status)
        lib.end()
        print("fine")
    """)
    assert done.stdout.split() == ["fine"], done.stderr


def test_exit_by_sigbus_of_a_child_after_fork() -> None:
    done = sigbus("""
        start()
        faulthandler.enable()
        pid = os.fork()
        if pid == 0:
            genuine()
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    """)
    assert done.stdout.split() == [str(-signal.SIGBUS)], done.stderr


def test_mapping_of_a_file_still_works(arena: Bytes, tmp_path: Path) -> None:
    fd = file_with(tmp_path / "f", pattern(10_000))
    with mmap.mmap(fd, 10_000) as view:
        assert view[:] == pattern(10_000)
