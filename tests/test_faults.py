"""Faults that no model meets: pages thrown away, damaged swap files, foreign bus errors, signals in between."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from helpers import run_python

PRELUDE = """
import ctypes, faulthandler, os, sys, tempfile, mmap, numpy as np, userswap
from helpers import FOLIO, check_empty, check_pool, data, fresh_pool
libc = ctypes.CDLL(None, use_errno=True)
def out(pool): pool.evict(); pool.evict()           # the first round clears YOUNG
def throw_away(array):
    assert libc.madvise(ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes), 4) == 0
"""
PATIENCE = 60  # a broken transition often hangs


def right(code: str, *args: str) -> None:
    result = run_python(PRELUDE + code, *args, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr


def test_pages_that_the_program_throws_away_read_as_zeros() -> None:
    """madvise(MADV_DONTNEED) promises zeros, whatever state the folio is in; its other pages stay."""
    right("""
pool = fresh_pool(swap="none")
array = pool.empty(4 * FOLIO, np.uint8)
model = data("walk", 4 * FOLIO, 1)
for state in ("dirty", "clean", "leaving", "clean and leaving"):
    model[:] = data("walk", 4 * FOLIO, 1)
    array[:] = model
    if "clean" in state:
        out(pool)
        array.sum()
    throw_away(array[FOLIO + 8192 : FOLIO + 12288])
    model[FOLIO + 8192 : FOLIO + 12288] = 0
    if "leaving" in state and "clean" not in state:
        out(pool)               # swap-out itself meets the missing page
    if "leaving" not in state or "clean" not in state:
        assert np.array_equal(array, model), state
    out(pool)
    if "leaving" not in state or "clean" not in state:
        # a clean folio's copy is older than its page: the fault has to give it up
        assert np.array_equal(array, model), state
    check_pool(pool)
del array
check_empty(pool)
""")


def test_a_write_to_a_clean_folio_survives_every_page_of_it() -> None:
    """Each page of a folio that came back by a read is protected: a missed one would lose its write."""
    right("""
pool = fresh_pool(swap="none")
array = pool.array(data("walk", 4 * FOLIO, 1))
for page in range(0, 4 * FOLIO, 4096):
    out(pool)
    array.sum()
    array[page] ^= 255
    out(pool)
    assert array[page] == data("walk", 4 * FOLIO, 1)[page] ^ 255
    check_pool(pool)
""")


DAMAGE = """
path = sys.argv[1]
pool = fresh_pool(swap=f"{path}:64M")
array = pool.array(data("small", 16 * FOLIO, 1))
out(pool)
while pool.stats().stored_bytes > pool.stats().slot_bytes:
    pool.writeback()
assert pool.stats().slot_bytes
DAMAGE
print("before", flush=True)
if not np.array_equal(array, data("small", 16 * FOLIO, 1)): print("wrong bytes", flush=True)
print("went on", flush=True)
"""


CUT = "os.truncate(path, 0)"


@pytest.mark.parametrize(
    "damage",
    [
        CUT,
        "open(path, 'r+b').write(os.urandom(os.path.getsize(path)))",
        "open(path, 'r+b').write(bytes(os.path.getsize(path)))",
        # a whole Blosc2 chunk, but of other bytes: a shorter folio
        "from userswap.backends import codec\n"
        "packed = codec.compress(data('small', 4096, 1).tobytes())[1]\n"
        "size = os.path.getsize(path); file = open(path, 'r+b')\n"
        "for at in range(0, size, 4096): file.seek(at); file.write(packed)\n"
        "file.close()",
        # and one that says to be longer than its slots
        "size = os.path.getsize(path); file = open(path, 'r+b')\n"
        "for at in range(0, size, 4096): file.seek(at + 12); file.write((1 << 30).to_bytes(4, 'little'))\n"
        "file.close()",
        # a header that is right before offsets that are not
        "size = os.path.getsize(path); file = open(path, 'r+b')\n"
        "for at in range(0, size, 4096): file.seek(at + 32); file.write(bytes([255]) * 64)\n"
        "file.close()",
    ],
    ids=["cut", "noise", "zeros", "another length", "too long", "the middle"],
)
def test_a_damaged_swap_file_ends_the_program_and_never_returns_wrong_bytes(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "swap"
    path.touch()  # a file that was there before keeps its name
    result = run_python(PRELUDE + DAMAGE.replace("DAMAGE", damage), str(path), timeout=PATIENCE)
    assert result.stdout == "before\n", result
    assert result.returncode == -signal.SIGBUS
    assert "userswap: folio " in result.stderr
    reason = "Input/output error" if damage == CUT else "what is there is not what was stored, bytes have changed"
    assert f"can't be brought back from {path}: {reason} (slot " in result.stderr
    assert result.stderr.endswith("). The program ends here.\n")


def test_a_bus_error_that_is_not_ours_is_what_it_was(tmp_path: Path) -> None:
    code = """
pool = fresh_pool()
array = pool.array(data("walk", 4 * FOLIO, 1))
out(pool); array.sum()
with tempfile.TemporaryFile() as f:
    f.write(b"x"); f.flush()
    view = mmap.mmap(f.fileno(), 1)
    os.ftruncate(f.fileno(), 0)
    view[0]
print("went on")
"""
    result = run_python(PRELUDE + code, timeout=PATIENCE)
    assert (result.returncode, result.stdout) == (-signal.SIGBUS, "")
    result = run_python(PRELUDE + "faulthandler.enable()\n" + code, timeout=PATIENCE)
    assert result.returncode == -signal.SIGBUS
    assert result.stderr.count("Bus error") == 1


C_CODE = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <signal.h>
#include <string.h>
#include <sys/time.h>
int errno_after_read(volatile char *p) { errno = 77; (void)*p; return errno; }
int errno_after_write(volatile char *p) { errno = 78; *p = 1; return errno; }
static volatile char *base;
static long bytes;
static volatile long alarms, sum;
static void touch(int s) {
    for (long i = 0; i < bytes; i += 4096) sum += base[i];
    alarms++;
}
void alarm_reads(char *p, long n, int us) {
    struct sigaction a;
    struct itimerval t = {{0, us}, {0, us}};
    base = p; bytes = n;
    memset(&a, 0, sizeof a);
    a.sa_handler = touch;
    a.sa_flags = SA_RESTART;
    if (n) sigaction(SIGALRM, &a, NULL);
    setitimer(ITIMER_REAL, &t, NULL);
}
long alarms_seen(void) { return alarms; }
"""


@pytest.fixture(scope="module")
def in_c(tmp_path_factory: pytest.TempPathFactory) -> str:
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    directory = tmp_path_factory.mktemp("c")
    (directory / "touch.c").write_text(C_CODE)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", directory / "touch.so", directory / "touch.c"], check=True)
    return str(directory / "touch.so")


def test_a_fault_leaves_errno_alone(in_c: str) -> None:
    right(
        """
lib = ctypes.CDLL(sys.argv[1])
pool = fresh_pool()
array = pool.zeros(8 * FOLIO, np.uint8)
at = lambda i: ctypes.c_void_p(array.ctypes.data + i * FOLIO)
assert (lib.errno_after_read(at(0)), lib.errno_after_write(at(1))) == (77, 78)      # first touch
array[:] = data("noise", 8 * FOLIO, 1)
out(pool)
assert (lib.errno_after_read(at(2)), lib.errno_after_write(at(3))) == (77, 78)      # swapped
assert lib.errno_after_write(at(2)) == 78                                           # clean
""",
        in_c,
    )


def test_a_signal_handler_that_reads_swapped_memory_may_come_at_any_moment(in_c: str) -> None:
    """In the middle of a transition it would wait for its own thread: the code there blocks signals."""
    right(
        """
import time
lib = ctypes.CDLL(sys.argv[1])
lib.alarm_reads.argtypes = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int]
pool = fresh_pool(swap="none")
array = pool.array(data("walk", 16 * FOLIO, 1))
lib.alarm_reads(array.ctypes.data, array.nbytes, 700)
end = time.monotonic() + 1.0
turns = 0
while time.monotonic() < end or lib.alarms_seen() < 100:
    pool.evict()
    array[:: 4096] += 1
    turns += 1
lib.alarm_reads(0, 0, 0)
model = data("walk", 16 * FOLIO, 1)
model[:: 4096] += np.uint8(turns % 256)
assert np.array_equal(array, model)
check_pool(pool)
""",
        in_c,
    )
