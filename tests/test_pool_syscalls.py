"""System calls on a pool's own memory: pins against reclaim, and what the kernel writes is never lost.

test_syscalls.py tries the wrappers on an arena that ignores states; here are CLEAN folios, budgets and eviction.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers import FOLIO, check_pool, data, fresh_pool
from userswap import Pool

MIB = 1 << 20


def out(pool: Pool) -> None:
    """Evict everything that may leave: the first round clears YOUNG."""
    pool.evict()
    pool.evict()


def blocked(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    """Start a call that waits in the kernel, and wait until it does."""
    result: list[Any] = []
    thread = threading.Thread(target=lambda: result.append(call()), daemon=True)
    thread.start()
    state, deadline = "", time.monotonic() + 20
    while state != "S" and time.monotonic() < deadline:
        time.sleep(0.02)
        state = Path(f"/proc/self/task/{thread.native_id}/stat").read_text().rpartition(")")[2].split()[0]
    return thread, result


@pytest.fixture
def pipe() -> Any:
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def test_the_kernel_writes_into_a_clean_folio_and_it_is_not_lost(tmp_path: Path) -> None:
    """A clean folio is write-protected (the kernel would fail), and dropped at eviction (the bytes would be gone)."""
    pool = fresh_pool()
    array: Any = pool.array(data("walk", 8 * FOLIO, 1))
    fresh = data("walk", 8 * FOLIO, 2)
    (tmp_path / "f").write_bytes(fresh.tobytes())
    for reads in (lambda f: os.readv(f.fileno(), [array]), lambda f: f.readinto(array.data)):
        array[:] = data("walk", 8 * FOLIO, 1)
        out(pool)
        array.sum()
        assert pool._core.check()["clean"] == 8
        with (tmp_path / "f").open("rb", buffering=0) as f:
            assert reads(f) == 8 * FOLIO
        out(pool)
        assert np.array_equal(array, fresh)
    # and through a C stream, with which NumPy reads
    libc = ctypes.CDLL(None)
    libc.fopen.restype = ctypes.c_void_p
    libc.fread.restype = ctypes.c_size_t
    array[:] = data("walk", 8 * FOLIO, 1)
    out(pool)
    array.sum()
    stream = ctypes.c_void_p(libc.fopen(os.fsencode(tmp_path / "f"), b"r"))
    assert (
        libc.fread(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(1), ctypes.c_size_t(8 * FOLIO), stream)
        == 8 * FOLIO
    )
    libc.fclose(stream)
    out(pool)
    assert np.array_equal(array, fresh)
    check_pool(pool)


def test_a_folio_under_a_system_call_stays_and_leaves_after_it(pipe: tuple[int, int]) -> None:
    pool = fresh_pool()
    array: Any = pool.array(data("walk", 4 * FOLIO, 1))
    piece = array[FOLIO : FOLIO + 1000]
    thread, result = blocked(lambda: os.readv(pipe[0], [piece]))
    out(pool)
    assert pool.stats().resident_bytes == FOLIO, "the one that the kernel is about to write to"
    os.write(pipe[1], b"x" * 1000)
    thread.join(20)
    assert result == [1000]
    assert bytes(piece) == b"x" * 1000
    out(pool)
    assert pool.stats().resident_bytes == 0, "no pin is left"
    assert bytes(piece) == b"x" * 1000
    assert np.array_equal(array[:FOLIO], data("walk", 4 * FOLIO, 1)[:FOLIO])
    check_pool(pool)


def test_as_many_pins_as_a_word_holds_and_not_one_more(pipe: tuple[int, int]) -> None:
    """One folio has 9 bits of pins. The call that would be the 512th fails; none reaches into the swap id."""
    pool = fresh_pool()
    array: Any = pool.array(data("walk", FOLIO, 1))
    reads = [partial(os.readv, pipe[0], [array[i : i + 1] for i in range(n)]) for n in (256, 255)]
    calls = [blocked(read) for read in reads]
    os.set_blocking(pipe[0], False)  # so that a call that is let through is seen, and does not wait
    with pytest.raises(OSError) as full:
        os.readv(pipe[0], [array[:1]])
    os.set_blocking(pipe[0], True)
    assert full.value.errno == errno.ENOMEM
    out(pool)
    assert pool._core.check() == {"empty": 0, "dirty": 1, "clean": 0, "partial": 0, "swapped": 0, "ids": 0, "wrong": 0}
    for _ in calls:
        os.write(pipe[1], b"y" * 200)
        time.sleep(0.02)
    for thread, result in calls:
        thread.join(20)
        assert result == [200]
    out(pool)
    assert pool.stats().resident_bytes == 0
    assert bytes(array[:200]) == b"y" * 200
    assert np.array_equal(array[200:], data("walk", FOLIO, 1)[200:])


def test_a_call_reads_as_much_as_it_asked_for(tmp_path: Path) -> None:
    pool = fresh_pool()
    array: Any = pool.zeros(4 * FOLIO, np.uint8)
    (tmp_path / "f").write_bytes(b"z" * 4 * FOLIO)
    with (tmp_path / "f").open("rb", buffering=0) as f:
        assert f.readinto(array[10:1010].data) == 1000
        assert f.tell() == 1000
        assert os.preadv(f.fileno(), [array[2 * FOLIO - 5 : 2 * FOLIO + 5]], 0) == 10
    assert array.sum() == (1000 + 10) * ord("z")


def test_a_buffer_larger_than_the_budget_is_read_and_written_within_it(tmp_path: Path) -> None:
    pool = fresh_pool()
    expected = data("walk", 40 * MIB, 3)
    expected.tofile(tmp_path / "f")
    array: Any = pool.empty(40 * MIB, np.uint8)
    with (tmp_path / "f").open("rb", buffering=0) as f:
        assert f.readinto(array.data) == 40 * MIB
    assert np.array_equal(array, expected)
    with (tmp_path / "g").open("wb", buffering=0) as f:
        assert f.write(array.data) == 40 * MIB
    assert np.array_equal(np.fromfile(tmp_path / "g", np.uint8), expected)
    stats = check_pool(pool)
    assert stats.over_budget == 0
    assert stats.peak_bytes <= stats.budget_bytes * 1.02


def test_threads_that_read_much_do_not_hold_the_budget(tmp_path: Path) -> None:
    """A call pins a share of the budget at a time: more would leave nothing for the others."""
    pool = fresh_pool()
    data("noise", 8 * MIB, 3).tofile(tmp_path / "f")
    arrays = [pool.empty(8 * MIB, np.uint8) for _ in range(4)]
    start = threading.Barrier(4)

    def read(array: Any) -> None:
        for _ in range(3):
            with (tmp_path / "f").open("rb", buffering=0) as f:
                start.wait()
                f.readinto(array.data)

    threads = [threading.Thread(target=read, args=(array,)) for array in arrays]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(array, data("noise", 8 * MIB, 3)) for array in arrays)
    stats = check_pool(pool)
    assert stats.over_budget == 0
    assert stats.peak_bytes <= stats.budget_bytes * 1.02


def test_a_buffer_that_cannot_be_brought_back_fails_the_call(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Not the program: it gets EIO, a plain sentence, and everything else goes on."""
    (tmp_path / "swap").touch()  # a file that was there before keeps its name
    pool = fresh_pool(swap=f"{tmp_path}/swap:64M")
    array: Any = pool.array(data("noise", 4 * FOLIO, 1))
    other: Any = pool.array(data("walk", 4 * FOLIO, 2))
    out(pool)
    assert pool.stats().slot_bytes == 4 * FOLIO
    os.truncate(tmp_path / "swap", 0)
    before = pool.stats()
    with (tmp_path / "g").open("wb", buffering=0) as f:
        for _ in range(3):
            with pytest.raises(OSError) as failed:
                f.write(array.data)
            assert failed.value.errno == errno.EIO
        assert (tmp_path / "g").stat().st_size == 0
        assert f.write(other.data) == 4 * FOLIO
    assert np.array_equal(np.fromfile(tmp_path / "g", np.uint8), data("walk", 4 * FOLIO, 2))
    text = capfd.readouterr().err
    assert "folio 0 of the region at 0x" in text
    assert f"can't be brought back from {tmp_path}/swap: Input/output error (slot 0). The call fails." in text
    after = check_pool(pool)
    assert after.resident_bytes == before.resident_bytes + 4 * FOLIO, "only `other` is in place"
    assert after.swapped_bytes == 4 * FOLIO
    assert after.swap_ins == before.swap_ins + 4


def test_control_messages_arrive_in_a_clean_folio() -> None:
    """The buffer of a control message is one more that the kernel writes to."""
    pool = fresh_pool()
    array: Any = pool.array(data("walk", 2 * FOLIO, 1))
    out(pool)
    array.sum()
    assert pool._core.check()["clean"] == 2
    a, b = socket.socketpair()
    a.sendmsg([b"body"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", a.fileno()))])
    body = ctypes.create_string_buffer(4)
    vector = (ctypes.c_size_t * 2)(ctypes.addressof(body), 4)
    at = array.ctypes.data + FOLIO + 4096
    head = (ctypes.c_size_t * 7)(0, 0, ctypes.addressof(vector), 1, at, 24, 0)
    assert ctypes.CDLL(None).recvmsg(b.fileno(), head, 0) == 4
    out(pool)
    _, level, kind, fd = struct.unpack("Qiii", bytes(array[FOLIO + 4096 : FOLIO + 4096 + 20]))
    assert (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
    assert os.path.samestat(os.fstat(fd), os.fstat(a.fileno()))
    os.close(fd)
    a.close()
    b.close()
    check_pool(pool)


def test_what_a_system_call_reads_lost_its_pins_when_storage_moved_or_was_shared(pipe: Any) -> None:
    pool = fresh_pool()
    plain = data("walk", 8 * FOLIO, 1)
    x: Any = pool.array(plain)
    pool.evict()
    assert np.array_equal(x, plain)  # in place, clean, with its copies
    r, w = pipe
    writer, _ = blocked(lambda: os.write(w, x))
    pool.writeback()
    pool._core.compact()
    s = pool.snapshot(x)
    y = pool.array(plain)
    pool.evict()
    pool.evict()
    assert pool.stats().resident_bytes == x.nbytes, "x stays while it is written, the others leave"
    seen = b"".join(os.read(r, FOLIO) for _ in range(8))
    while len(seen) < plain.nbytes:
        seen += os.read(r, FOLIO)
    writer.join(10)
    assert seen == plain.tobytes()
    pool.evict()
    pool.evict()
    assert check_pool(pool).resident_bytes == 0, "and leaves when that is done"
    assert np.array_equal(x, plain) and np.array_equal(s, plain) and np.array_equal(y, plain)


def test_a_snapshot_protected_what_a_system_call_was_about_to_write(pipe: Any) -> None:
    pool = fresh_pool()
    plain = data("walk", 2 * FOLIO, 1)
    x: Any = pool.array(plain)
    r, w = pipe
    reader, got = blocked(lambda: os.readv(r, [x]))
    s = pool.snapshot(x)
    os.write(w, b"\x07" * 4096)
    reader.join(10)
    assert got == [4096]
    assert (x[:4096] == 7).all() and np.array_equal(x[4096:], plain[4096:])
    assert np.array_equal(s, plain)
    check_pool(pool)
