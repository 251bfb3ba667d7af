"""`userswap.pin`: what is pinned stays in place, for raw system calls and devices, and the budget knows of it."""

import ctypes
import gc
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import userswap
from userswap import BudgetError, Pool

MIB = 1 << 20
EFAULT = 14
# Found once, through ctypes: no import table leads to it, so no wrapper either.
raw_syscall = ctypes.CDLL(None, use_errno=True).syscall
raw_syscall.restype = ctypes.c_long
x86 = pytest.mark.skipif(os.uname().machine != "x86_64", reason="knows the numbers of x86-64's system calls")


@pytest.fixture
def pool() -> Iterator[Pool]:
    with Pool(ram="64MiB", swap="none", min_array="4KiB") as made:
        yield made


def kernel_reads(array: np.ndarray[Any, Any]) -> bool:
    """Whether the kernel can read all of an array's memory by a raw write(2)."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    try:
        start, left = array.__array_interface__["data"][0], array.nbytes
        while left:
            done = raw_syscall(1, write_end, ctypes.c_void_p(start), ctypes.c_size_t(min(left, 4096)))
            if done < 0:
                assert ctypes.get_errno() == EFAULT
                return False
            assert os.read(read_end, done) == ctypes.string_at(start, done)
            start, left = start + done, left - done
        return True
    finally:
        os.close(read_end)
        os.close(write_end)


def ends_well(fork: Callable[[], int], in_child: Callable[[], None]) -> None:
    """A child, made by `fork`, does something; nothing it asserts may be false."""
    child = fork()
    if child == 0:
        status = 1
        try:
            in_child()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


@x86
def test_the_kernel_reaches_what_is_pinned_and_not_what_is_swapped_out(pool: Pool) -> None:
    x = pool.array(np.arange(MIB, dtype="u8"))
    pool.evict()
    assert not kernel_reads(x), "what is swapped out gives EFAULT, never other bytes"
    with userswap.pin(x) as held:
        assert held.bytes == x.nbytes
        pool.evict()
        assert kernel_reads(x)
        y = pool.empty(80 * MIB, "u1")
        y[:] = np.resize(np.random.default_rng(1).integers(0, 9, 1 << 20, "u1"), y.shape)  # pushes everything else out
        assert kernel_reads(x)
    assert held.bytes == 0
    pool.evict()
    assert not kernel_reads(x)
    assert (x == np.arange(MIB, dtype="u8")).all()


@x86
def test_the_kernel_writes_into_what_was_clean_or_shared_with_a_snapshot(pool: Pool) -> None:
    x = pool.array(np.arange(MIB // 8, dtype="u8"))
    before = pool.snapshot(x)
    pool.evict()
    assert x[0] == 0  # clean now
    with userswap.pin(x):
        read_end, write_end = os.pipe()
        os.write(write_end, b"\xff" * 4096)
        start = x.__array_interface__["data"][0]
        assert raw_syscall(0, read_end, ctypes.c_void_p(start + 65536), ctypes.c_size_t(4096)) == 4096
        os.close(read_end)
        os.close(write_end)
        pool.evict()
    pool.evict()
    assert (x[8192 : 8192 + 512] == 2**64 - 1).all()
    assert (before == np.arange(MIB // 8, dtype="u8")).all()
    rest = np.r_[0:8192, 8704 : MIB // 8]
    assert (x[rest] == rest).all()


def test_views_dates_bytes_and_memory_that_is_not_ours(pool: Pool) -> None:
    x = pool.zeros((1024, 1024), "u1")
    cases: list[tuple[object, int]] = [
        (x[::-1], MIB),
        (x[:, 0], 1023 * 1024 + 1),
        (x[10:20], 10 * 1024),
        (x[5:5], 0),
        (x.view("M8[s]"), MIB),
        (x.view("M8[s]").T[3:5], 1023 * 1024 + 16),
        (x.data, MIB),
        (np.zeros(MIB), 0),
        (b"plain", 0),
        (bytearray(10), 0),
        (pool.array(np.float64(1)), 0),
    ]
    for array, size in cases:
        with userswap.pin(array) as held:
            assert held.bytes == size, array
    with userswap.pin(x, x[::2], x[0]) as held:  # the same folios, more than once
        assert held.bytes == MIB + 1023 * 1024 - 1024 + 1024 + 1024
    with userswap.pin() as held:
        assert held.bytes == 0
    assert pool.evict() == MIB, "nothing is pinned any more"


def test_what_can_not_be_pinned(pool: Pool) -> None:
    x = pool.zeros(40 * MIB, "u1")
    y = pool.zeros(40 * MIB, "u1")
    x[:] = 1
    with userswap.pin(x), pytest.raises(BudgetError, match=r"40 MiB can't be pinned.* 64 MiB another 4 MiB may"):
        userswap.pin(y[: 4 * MIB], y).__enter__()
    assert pool.evict() >= 40 * MIB
    with userswap.pin(y[: 4 * MIB], y[4 * MIB :]):
        pass
    with pytest.raises(TypeError, match="Only arrays and buffers can be pinned, not 'int'"), userswap.pin(x, 3):
        pass
    held = userswap.pin(x)
    with held, pytest.raises(ValueError, match="in use already"), held:
        pass
    with held:
        assert held.bytes == x.nbytes
    assert pool.evict() >= 40 * MIB, "every pin that failed is undone"


def test_an_array_that_is_forgotten_while_pinned_lives_as_long_as_the_pin(pool: Pool) -> None:
    held = userswap.pin(pool.array(np.full(MIB, 7, "u1")))
    with held:
        gc.collect()
        assert pool.stats().virtual_bytes == MIB
    del held
    gc.collect()
    assert pool.stats().virtual_bytes == 0
    forgotten = userswap.pin(pool.array(np.full(MIB, 7, "u1")))
    forgotten.__enter__()
    del forgotten
    gc.collect()
    assert pool.stats().virtual_bytes == 0


@x86
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_has_the_pins_of_its_parent_and_lets_them_go_for_itself(pool: Pool) -> None:
    x = pool.array(np.arange(MIB, dtype="u8"))
    held = userswap.pin(x)
    with held:

        def in_child() -> None:
            pool.evict()
            assert kernel_reads(x)
            held.__exit__(None, None, None)
            pool.evict()
            assert not kernel_reads(x)
            assert (x == np.arange(MIB, dtype="u8")).all()
            assert pool._core.check()["wrong"] == 0

        ends_well(os.fork, in_child)
        pool.evict()
        assert kernel_reads(x)
    assert pool._core.check()["wrong"] == 0


@x86
def test_a_child_that_was_forked_behind_pythons_back_does_not_let_go_what_it_has_not(pool: Pool) -> None:
    x = pool.array(np.arange(MIB, dtype="u8"))
    with userswap.pin(x) as held:

        def in_child() -> None:
            held.__exit__(None, None, None)
            pool.evict()
            assert (x == np.arange(MIB, dtype="u8")).all()
            assert pool._core.check()["wrong"] == 0

        ends_well(ctypes.PyDLL(None).fork, in_child)


def test_threads_pin_and_let_go_while_others_evict(pool: Pool) -> None:
    x = pool.array(np.arange(4 * MIB, dtype="u8"))
    y = pool.zeros(8 * MIB, "u8")
    end = threading.Event()
    wrong: list[str] = []

    def pins(seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not end.is_set():
            start = int(rng.integers(0, len(x) - 70000))
            with userswap.pin(x[start : start + 70000]) as held:
                if held.bytes != 560000 or (x[start : start + 70000] != np.arange(start, start + 70000)).any():
                    wrong.append("bytes")
                if os.uname().machine == "x86_64" and not kernel_reads(x[start : start + 1024]):
                    wrong.append("not in place")

    threads = [threading.Thread(target=pins, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(10):
        y += 1
        pool.evict()
    end.set()
    for thread in threads:
        thread.join()
    assert not wrong
    assert (y == 10).all()
    assert pool._core.check()["wrong"] == 0
    x_and_y = x.nbytes + y.nbytes
    pool.evict()
    assert pool.stats().swapped_bytes == x_and_y
