"""Every I/O of a swap file fails once, in each way that it can: nothing is lost that is not lost on the medium."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import userswap
from helpers import FOLIO, check_pool, data, fresh_pool, run_python
from support import small_disk
from userswap import DataLost
from userswap.backends.swapfile import inject
from userswap.errors import SwapOffError

MIB = 1 << 20

# Each kind of system call, with what it may say. Writes lose nothing whatever they say, neither do reads said once.
FAILURES = [
    *(("write", error) for error in (errno.EIO, errno.ENOSPC, errno.EINTR, errno.EDQUOT, "short")),
    *(("read", error) for error in (errno.EIO, errno.EINTR, "short", "flipped")),
    *(("scatter", error) for error in (errno.EIO, errno.EINTR, "short", "flipped")),
    *(("punch", error) for error in (errno.EIO, errno.EOPNOTSUPP, errno.EINTR)),
]


def named(case: tuple[str, int | str]) -> str:
    kind, error = case
    return f"{kind} {errno.errorcode[error] if isinstance(error, int) else error}"


def play(path: Path, encrypt: bool) -> None:
    """A bit of everything that a swap file is used for; every byte is checked."""
    with fresh_pool("16MiB", swap=f"{path}:8MiB", map_design="on_demand", encrypt=encrypt) as pool:
        kinds = {kind: data(kind, 12 * FOLIO, 1) for kind in ("noise", "small", "walk")}
        arrays = {kind: pool.array(plain) for kind, plain in kinds.items()}
        short = data("noise", FOLIO + 12288, 2)
        arrays["short"], kinds["short"] = pool.array(short), short
        for turn in range(3):
            pool.evict()
            pool.evict()
            try:
                while pool.writeback():
                    pass
            except OSError as error:
                assert error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EINTR)
            check_pool(pool)
            for kind, array in arrays.items():
                if turn == 1:
                    # what is stored once more, some of it as what is stored already
                    array[3 * 4096] ^= 1
                    kinds[kind][3 * 4096] ^= 1
                assert np.array_equal(array, kinds[kind]), (kind, turn)
        copy = pool.snapshot(arrays["walk"])
        pool.evict()
        assert np.array_equal(copy, kinds["walk"])
        del copy
        # backwards: nothing comes together
        pool.evict()
        for at in reversed(range(0, 12 * FOLIO, FOLIO)):
            for kind, array in arrays.items():
                assert array[at % len(array)] == kinds[kind][at % len(array)]
        check_pool(pool)


def scan(path: Path, encrypt: bool) -> None:
    """Windows that are read by one call."""
    with fresh_pool("64MiB", swap=f"{path}:64MiB", map_design="on_demand", encrypt=encrypt) as pool:
        kinds = {kind: data(kind, 3 * 32 * FOLIO, 1) for kind in ("noise", "walk")}
        arrays = {kind: pool.array(plain) for kind, plain in kinds.items()}
        for turn in range(2):
            pool.evict()
            pool.evict()
            while pool.writeback():
                pass
            for kind, array in arrays.items():
                assert np.array_equal(array, kinds[kind]), (kind, turn)
        check_pool(pool)


@pytest.mark.parametrize("encrypt", [False, True], ids=["plain", "encrypted"])
@pytest.mark.parametrize("case", FAILURES, ids=named)
def test_every_call_fails_once_and_nothing_is_lost(
    tmp_path: Path, case: tuple[str, int | str], encrypt: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    kind, error = case
    turn = fired = 0
    while True:
        inject(kind, turn, error)
        try:
            (scan if kind == "scatter" else play)(tmp_path / f"swap{turn}", encrypt)
        finally:
            did = inject(None)
        text = capfd.readouterr().err
        # One warning, of a device that failed, and none of one that is full, or was read once more.
        assert text.count("has failed") == (case == ("write", errno.EIO) and did > 0), text
        if not did:
            break
        fired += 1
        # every one of the first calls, then some
        turn += 1 if turn < (3 if encrypt else 12) else 7
    assert fired >= (1 if kind == "punch" else 3), "the test does not reach what it tests"


def stored(path: Path, kind: str = "walk") -> tuple[userswap.Pool, np.ndarray, np.ndarray]:
    path.touch()
    pool = fresh_pool(swap=f"{path}:64MiB", map_design="on_demand")
    plain = data(kind, 16 * FOLIO, 1)
    array = pool.array(plain)
    to_file(pool)
    return pool, array, plain


def to_file(pool: userswap.Pool) -> None:
    pool.evict()
    pool.evict()
    while pool.stats().stored_bytes > pool.stats().slot_bytes:
        pool.writeback()


@pytest.mark.parametrize("kind", ["noise", "walk"])
@pytest.mark.parametrize("error", [errno.EIO, "flipped", "short"])
def test_a_device_that_can_not_be_read_is_retired_and_what_comes_back_is_right(
    tmp_path: Path, kind: str, error: int | str, capfd: pytest.CaptureFixture[str]
) -> None:
    pool, array, plain = stored(tmp_path / "swap", kind)
    array.flags.writeable = False
    inject("read", 0, error, 1000)
    if error == "short":
        # no failure: the rest is read by another call
        assert np.array_equal(array, plain)
        assert inject(None) > 0
        return
    with (
        pytest.raises(DataLost, match=r"can't be brought back from .*swap: .*\(slot \d+\)") as lost,
        userswap.pin(array),
    ):
        pass
    assert lost.value.errno == errno.EIO
    with (tmp_path / "out").open("wb", buffering=0) as out, pytest.raises(OSError) as failed:
        out.write(array.data)
    assert failed.value.errno == errno.EIO
    assert inject(None) > 2, "each is tried twice"
    text = capfd.readouterr().err
    assert text.count("has failed") == 1
    assert f"the swap file {tmp_path}/swap has failed" in text
    # The device is readable again: nothing is lost, and nothing more goes there.
    used = pool.stats().slot_bytes
    assert np.array_equal(array, plain)
    more = pool.array(data("noise", 8 * FOLIO, 3))
    pool.evict()
    pool.evict()
    with pytest.raises(OSError):
        pool.writeback()
    assert pool.stats().slot_bytes <= used
    assert np.array_equal(more, data("noise", 8 * FOLIO, 3))
    check_pool(pool)


def test_room_on_the_disk_may_come_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import time

    for error in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EINTR):
        pool = fresh_pool(swap=f"{tmp_path}/{error}:64MiB", map_design="on_demand")
        array = pool.array(data("walk", 16 * FOLIO, 1))
        pool.evict()
        pool.evict()
        inject("write", 0, error, 100000)
        with pytest.raises(OSError) as failed:
            pool.writeback()
        assert failed.value.errno == error
        assert inject(None) > 0
        time.sleep(0.15)
        assert pool.writeback() > 0
        assert np.array_equal(array, data("walk", 16 * FOLIO, 1))
        pool.close()
    assert "has failed" not in capfd.readouterr().err


def test_a_child_that_gets_no_swap_file_goes_on(tmp_path: Path) -> None:
    code = """
import errno, os, sys, numpy as np
from helpers import FOLIO, check_pool, data, fresh_pool
from userswap.backends.swapfile import inject
pool = fresh_pool(swap=sys.argv[1], map_design="on_demand")
plain = data("walk", 16 * FOLIO, 1)
array = pool.array(plain)
for error in (errno.EMFILE, errno.EACCES, errno.ENOSPC, errno.EIO):
    if os.fork() == 0:
        inject("open", 0, error, 2)
        array[:] = plain
        pool.evict(); pool.evict()
        try:
            pool.writeback()
            raise SystemExit("written?")
        except OSError as failed:
            assert failed.errno in (error, errno.ENOSPC), failed
        assert np.array_equal(array, plain)
        assert inject(None) == 1
        check_pool(pool)
        os._exit(0)
    assert os.wait()[1] == 0
"""
    result = run_python(code, str(tmp_path))
    assert result.returncode == 0, result.stderr


def test_a_file_that_is_cut_from_outside_loses_what_was_cut_alone(tmp_path: Path) -> None:
    path = tmp_path / "swap"
    pool, array, plain = stored(path, "noise")
    array.flags.writeable = False
    size = path.stat().st_size
    os.truncate(path, size // 2)
    lost = 0
    for at in range(0, len(plain), FOLIO):
        try:
            with userswap.pin(array[at : at + FOLIO]):
                assert np.array_equal(array[at : at + FOLIO], plain[at : at + FOLIO])
        except DataLost as error:
            lost += 1
            assert "Input/output error" in str(error)
    assert lost == 8
    check_pool(pool)


def test_a_file_that_is_removed_underneath_is_still_there_for_us(tmp_path: Path) -> None:
    path = tmp_path / "swap"
    pool, array, plain = stored(path)
    path.unlink()
    assert np.array_equal(array, plain)
    array[:] = data("noise", len(plain), 4)
    to_file(pool)
    assert np.array_equal(array, data("noise", len(plain), 4))


def test_a_limit_on_the_size_of_files_is_like_a_full_disk(tmp_path: Path) -> None:
    pool = fresh_pool(swap=f"{tmp_path}/swap:64MiB", map_design="on_demand")
    array = pool.array(data("noise", 64 * FOLIO, 1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20 * FOLIO, hard))
    try:
        pool.evict()
        pool.evict()
        assert 0 < pool.stats().slot_bytes <= 20 * FOLIO
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert np.array_equal(array, data("noise", 64 * FOLIO, 1))
    check_pool(pool)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting file systems needs root")
def test_a_disk_that_fills_up_in_the_middle_of_a_write(tmp_path: Path) -> None:
    with small_disk(tmp_path, 16) as mount:
        pool = fresh_pool("16MiB", swap=str(mount), map_design="on_demand")
        arrays = [pool.array(data("noise" if i % 2 else "walk", MIB, i)) for i in range(40)]
        for _ in range(2):
            for i, array in enumerate(arrays):
                assert np.array_equal(array, data("noise" if i % 2 else "walk", MIB, i))
        check_pool(pool)
        del arrays, array
        pool.close()


def test_signals_do_not_disturb_transfers(tmp_path: Path) -> None:
    """A timer that fires all the time, without SA_RESTART, while everything goes to the file and comes back."""
    code = """
import signal, sys, numpy as np
from helpers import FOLIO, check_pool, data, fresh_pool
ticks = 0
def tick(*_):
    global ticks
    ticks += 1
signal.signal(signal.SIGALRM, tick)
signal.siginterrupt(signal.SIGALRM, True)
pool = fresh_pool(swap=sys.argv[1] + ":64MiB", map_design="on_demand")
kinds = ("noise", "walk", "small")
arrays = [pool.array(data(kind, 32 * FOLIO, 1)) for kind in kinds]
signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
for turn in range(6):
    pool.evict(); pool.evict()
    while pool.stats().stored_bytes > pool.stats().slot_bytes:
        pool.writeback()
    for kind, array in zip(kinds, arrays):
        assert np.array_equal(array, data(kind, 32 * FOLIO, 1)), (kind, turn)
        array[0] ^= 0
signal.setitimer(signal.ITIMER_REAL, 0)
assert ticks > 20, ticks
check_pool(pool)
"""
    result = run_python(code, f"{tmp_path}/swap")
    assert result.returncode == 0, result.stderr


def test_where_no_exception_can_be_raised_the_message_names_the_damage(tmp_path: Path) -> None:
    code = """
import sys
from helpers import FOLIO, data, fresh_pool
from test_io_errors import stored
from pathlib import Path
pool, array, plain = stored(Path(sys.argv[1]))
image = Path(sys.argv[1]).read_bytes()
with open(sys.argv[1], "r+b") as file:
    file.seek(0x50); file.write(bytes(16))
print("before", hex(array.ctypes.data), flush=True)
array.sum()
print("went on")
"""
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "swap")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parent,
        check=False,
    )
    assert result.stdout.startswith("before 0x")
    assert "went on" not in result.stdout
    assert result.returncode == -7
    address = result.stdout.split()[1]
    said = result.stderr.splitlines()[-1]
    assert f"bytes from {address} on" in said
    assert f"{tmp_path}/swap: what is there is not what was stored, bytes have changed (slot 0)" in said
    assert said.endswith("The program ends here.")


@pytest.mark.parametrize("encrypt", [False, True], ids=["plain", "encrypted"])
@pytest.mark.parametrize("way", ["raw", "raw together", "written back", "gathered", "alone", "moved"])
def test_what_one_device_refuses_goes_to_the_next_as_it_is(
    tmp_path: Path, way: str, encrypt: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the same call, and not as the one that refused it had made it: sealed for another place, or encrypted."""
    for name in "abc":
        (tmp_path / name).touch()
    places = [f"{tmp_path}/a:64M:3", f"{tmp_path}/b:64M:2", f"{tmp_path}/c:64M:1"]
    with fresh_pool("32MiB", swap=places, map_design="on_demand", encrypt=encrypt, dedupe=False) as pool:
        folios = 1 if way in ("raw", "alone") else 8
        plain = data("noise" if "raw" in way else "walk", folios * FOLIO, 1)
        # of those that go by themselves one that fills its slots but for the last
        plain = plain[: FOLIO - 4096] if way == "raw" else plain
        array = pool.array(plain, tiers="file3,file2,file1" if way in ("gathered", "alone") else None)
        if way == "moved":
            to_file(pool)
        elif way == "written back":
            pool.evict()
            pool.evict()
        inject("write", 0, errno.EIO)
        if way == "moved":
            pool.swapoff(tmp_path / "a")
        elif way == "written back":
            assert pool.writeback() > 0
        else:
            pool.evict()
            pool.evict()
        assert inject(None) == 1
        in_use = {Path(file.name).name: file.used_bytes for file in pool.swaps()}
        refused, taken = ("b", "c") if way == "moved" else ("a", "b")
        assert (in_use[refused], in_use[taken] > 0) == (0, True)
        assert pool.stats().swapped_bytes == array.nbytes
        assert f"{tmp_path}/{refused} has failed" in capfd.readouterr().err
        assert np.array_equal(array, plain)
        check_pool(pool)


def test_a_device_that_refused_once_gets_nothing_more_and_the_others_all(tmp_path: Path) -> None:
    import time

    for name in "ab":
        (tmp_path / name).touch()
    places = [f"{tmp_path}/a:64M:1", f"{tmp_path}/b:64M"]
    with fresh_pool("32MiB", swap=places, map_design="on_demand", dedupe=False) as pool:
        arrays = []
        inject("write", 0, errno.EIO)
        for turn in range(3):
            plain = data("noise", 4 * FOLIO, turn)
            arrays.append((pool.array(plain), plain))
            to_file(pool)
            time.sleep(0.15)  # longer than what has failed for want of room rests
        assert inject(None) == 1
        assert [file.used_bytes for file in pool.swaps()] == [0, 12 * FOLIO]
        assert all(np.array_equal(array, plain) for array, plain in arrays)
        check_pool(pool)


def test_a_swapoff_that_could_not_read_for_want_of_memory_fails_no_device(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        (tmp_path / name).touch()
    places = [f"{tmp_path}/a:64M:1", f"{tmp_path}/b:64M"]
    with fresh_pool(swap=places, map_design="on_demand") as pool:
        plain = data("noise", 8 * FOLIO, 1)
        array = pool.array(plain)
        to_file(pool)
        inject("read", 0, errno.ENOMEM, 1000)
        with pytest.raises(SwapOffError, match="can't be read"):
            pool.swapoff(tmp_path / "a")
        assert inject(None) > 2
        assert "has failed" not in capfd.readouterr().err
        pool.swapoff(tmp_path / "a")
        assert np.array_equal(array, plain)
        check_pool(pool)
