"""How faults are delivered: by signal, by thread, by segv; which of them is chosen, and what each must keep to."""

from __future__ import annotations

import os
import platform
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import run_python
from support import Result, python, userswap
from userswap import DeliveryError, Pool, _core

DELIVERIES = ("signal", "thread", "segv")
PATIENCE = 60  # a fault that nobody serves hangs
PRELUDE = """
import ctypes, faulthandler, os, signal, sys, threading, time, numpy as np, userswap
from userswap import _core
from helpers import FOLIO, check_empty, check_pool, data, fresh_pool
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def out(pool): pool.evict(); pool.evict()           # the first round clears YOUNG
def address(array): return ctypes.c_void_p(array.ctypes.data)
"""

here = {way: _core.probe(way) == 0 for way in DELIVERIES}


def run(code: str, way: str, **environment: str) -> subprocess.CompletedProcess[str]:
    if not here[way]:
        pytest.skip(f"no delivery by {way} here")
    return run_python(PRELUDE + code, timeout=PATIENCE, environment={"USERSWAP_DELIVERY": way, **environment})


def right(code: str, way: str, **environment: str) -> str:
    result = run(code, way, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


# ---- which one ----


def test_a_process_settles_on_one_delivery() -> None:
    code = """
assert _core.delivery() is None
first = userswap.Pool(ram="16MiB", swap="none", delivery="segv")
second = userswap.Pool(ram="16MiB", swap="none")
third = userswap.Pool(ram="16MiB", swap="none", delivery="segv")
assert _core.delivery() == "segv"
try:
    userswap.Pool(ram="16MiB", swap="none", delivery="thread")
except userswap.DeliveryError as error:
    print(error)
"""
    assert "by segv since its first pool" in right(code, "signal"), "what is asked for by name counts"


def test_an_unknown_delivery_is_refused() -> None:
    with pytest.raises(DeliveryError, match="only auto, signal, thread, segv"):
        Pool(ram="16MiB", swap="none", delivery="pigeon")
    result = userswap("run", "--delivery", "pigeon", "-c", "print(1)")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and "There is no delivery 'pigeon'" in result.stderr


@pytest.mark.parametrize("way", DELIVERIES)
def test_a_program_runs_under_each(way: str) -> None:
    if not here[way]:
        pytest.skip(f"no delivery by {way} here")
    code = (
        "import numpy as np\nfrom userswap import _core\n"
        "x = np.arange(8 << 20); text = bytearray(range(256)) * (64 << 10)\n"
        "print(_core.delivery(), int(x.sum()), text[-1])"
    )
    result = userswap("run", "--ram", "16M", "--swap", "none", "--delivery", way, "-c", code)
    assert (result.returncode, result.stdout) == (0, f"{way} {(8 << 20) * ((8 << 20) - 1) // 2} 255\n"), result.stderr


# Seccomp's classic filter: load the system call's number; if it is userfaultfd, fail with EPERM; else allow.
FORBID_USERFAULTFD = """
import ctypes, os, struct, sys
number = {"x86_64": 323, "aarch64": 282}[os.uname().machine]
rules = [(0x20, 0, 0, 0), (0x15, 0, 1, number), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxQ", len(rules), ctypes.addressof(code)))
libc = ctypes.CDLL(None, use_errno=True)
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, program, 0, 0) == 0
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def forbidden(*arguments: str) -> Result:
    """The command `userswap` in a container that forbids userfaultfd, and without the environment's wish."""
    environment = {name: value for name, value in os.environ.items() if name != "USERSWAP_DELIVERY"}
    return python("-c", FORBID_USERFAULTFD, "-m", "userswap", *arguments, env=environment)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "aarch64"), reason="the filter knows two machines")
def test_a_container_that_forbids_userfaultfd() -> None:
    doctor = forbidden("doctor")
    assert doctor.returncode == 0, doctor.stdout
    assert re.search(r"^note  userfaultfd .*not permitted", doctor.stdout, re.MULTILINE)
    assert "seccomp" in doctor.stdout
    assert re.search(
        r"^note  delivery +segv: userfaultfd is forbidden \(Operation not permitted\), so protected mappings",
        doctor.stdout,
        re.MULTILINE,
    )
    assert re.search(r"^ok    userswap +an array was swapped out and in, by segv", doctor.stdout, re.MULTILINE)
    assert re.search(r"^ok    large allocations", doctor.stdout, re.MULTILINE)
    code = (
        "import numpy as np, os\nfrom userswap import _core\n"
        "x = np.arange(16 << 20); x[::2] += 1\n"
        "files = [f'/proc/self/fd/{fd}' for fd in range(3, 70)]\n"
        "files = [os.readlink(file) for file in files if os.path.lexists(file)]\n"
        "assert any(file.endswith('/mem') for file in files), files\n"
        "print(_core.delivery(), [file for file in files if 'userfaultfd' in file], int(x.sum()))"
    )
    result = forbidden("run", "--ram", "32M", "--swap", "none", "-c", code)
    total = (16 << 20) * ((16 << 20) - 1) // 2 + (8 << 20)
    assert (result.returncode, result.stdout) == (0, f"segv [] {total}\n"), result.stderr
    wished = forbidden("run", "--delivery", "signal", "-c", "print(1)")
    assert (wished.returncode, wished.stdout) == (2, "")
    assert "userfaultfd is forbidden here" in wished.stderr and "Traceback" not in wished.stderr


# ---- what the kernel itself does ----

RAW = """
from os import SEEK_SET
number = {"x86_64": (0, 1), "aarch64": (63, 64)}[os.uname().machine]
def raw(which, fd, array):
    got = libc.syscall(ctypes.c_long(number[which]), ctypes.c_long(fd), address(array), ctypes.c_long(array.nbytes))
    return got if got >= 0 else os.strerror(ctypes.get_errno())
pool = fresh_pool(swap="none")
array = pool.array(data("walk", 400 * FOLIO, 1))
model = data("walk", 400 * FOLIO, 1)
file = os.memfd_create("raw")
os.write(file, data("noise", 40 * FOLIO, 2))
os.lseek(file, 0, SEEK_SET)
out(pool)
print(raw(0, file, array[77 : 77 + 40 * FOLIO]))
"""


def test_raw_system_calls_work_by_thread() -> None:
    """No import table has them, so nobody makes their buffers resident: the kernel's own faults are served."""
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("the numbers of system calls are known for two machines")
    code = (
        RAW
        + """
model[77 : 77 + 40 * FOLIO] = data("noise", 40 * FOLIO, 2)
out(pool)
other = os.memfd_create("other")
print(raw(1, other, array))                             # larger than the budget
for at in range(0, len(model), 10 * FOLIO):
    assert os.pread(other, 10 * FOLIO, at) == model[at : at + 10 * FOLIO].tobytes()
assert np.array_equal(array, model)
check_pool(pool)
"""
    )
    assert right(code, "thread").split() == [str(40 << 16), str(400 << 16)]


@pytest.mark.parametrize("way", ["signal", "segv"])
def test_raw_system_calls_get_efault_and_change_nothing(way: str) -> None:
    if platform.machine() not in ("x86_64", "aarch64"):
        pytest.skip("the numbers of system calls are known for two machines")
    assert right(RAW + "assert np.array_equal(array, model)\n", way) == "Bad address\n"


@pytest.mark.parametrize("way", ["thread", "segv"])
def test_pages_that_are_thrown_away_while_others_read_and_evict(way: str) -> None:
    """Who swaps a folio out may meet a page of it that the program has just thrown away: somebody has to serve that."""
    right(
        """
pool = fresh_pool(swap="none")
array = pool.array(data("walk", 64 * FOLIO, 1))
copy = pool.snapshot(array)                             # guarded: not moved out, but read in place
number = {"x86_64": 28, "aarch64": 233}[os.uname().machine]     # madvise: not through our wrapper
end = time.monotonic() + 2
def throw():
    random = np.random.default_rng(1)
    while time.monotonic() < end:
        place = array.ctypes.data + int(random.integers(0, 1024)) * 4096
        libc.syscall(ctypes.c_long(number), ctypes.c_void_p(place), ctypes.c_long(4096), ctypes.c_long(4))
def evict():
    while time.monotonic() < end:
        pool.evict()
        pool.snapshot(array)
threads = [threading.Thread(target=target) for target in (throw, evict, evict)]
for thread in threads: thread.start()
model = data("walk", 64 * FOLIO, 1).reshape(-1, 4096)
while time.monotonic() < end:
    pages = array.reshape(-1, 4096)
    for page, was in zip(pages, model):
        # what it was, or zeros: whole pages, if nobody threw it away in the middle of the comparison
        now = page.copy()
        assert ((now == was) | (now == 0)).all()
for thread in threads: thread.join()
assert np.array_equal(copy, data("walk", 64 * FOLIO, 1))
check_pool(pool)
""",
        way,
    )


# ---- what is not ours ----


@pytest.mark.parametrize("way", DELIVERIES)
@pytest.mark.parametrize("kind", ["null", "sent"])
def test_a_segmentation_fault_is_what_it_was(way: str, kind: str) -> None:
    crash = {"null": "ctypes.string_at(0)", "sent": "os.kill(os.getpid(), signal.SIGSEGV)"}[kind]
    code = f"pool = fresh_pool(); array = pool.array(data('walk', 4 * FOLIO, 1)); out(pool); array.sum()\n{crash}\n"
    result = run(code, way)
    assert (result.returncode, result.stderr) == (-signal.SIGSEGV, "")
    result = run("faulthandler.enable()\n" + code, way)
    assert result.returncode == -signal.SIGSEGV
    assert result.stderr.count("Segmentation fault") == 1


@pytest.mark.parametrize(("way", "ending"), [("signal", "SIGBUS"), ("thread", "SIGBUS"), ("segv", "SIGSEGV")])
def test_memory_of_an_array_that_is_gone(way: str, ending: str) -> None:
    code = """
pool = fresh_pool(); keep = pool.zeros(FOLIO, np.uint8)
array = pool.array(data('walk', 40 * FOLIO, 1)); where = array.ctypes.data + 20 * FOLIO
del array
again = pool.zeros(40 * FOLIO, np.uint8)                # takes the address space again
assert ctypes.string_at(where, 1) == b"\\0"
del again
print("now", flush=True)
ctypes.string_at(where)
"""
    result = run(code, way)
    assert (result.returncode, result.stdout) == (-getattr(signal, ending), "now\n"), result.stderr


def test_what_a_program_survives_leaves_nothing_behind() -> None:
    """By thread a stray access is answered by a poisoned page: who gets that place next must not meet it."""
    if not here["thread"] or [int(x) for x in re.findall(r"\d+", platform.release())[:2]] < [6, 6]:
        pytest.skip("pages can be poisoned from Linux 6.6 on")
    right(
        """
pool = fresh_pool(swap="none")
array = pool.array(data('walk', 40 * FOLIO, 1)); where = array.ctypes.data + 20 * FOLIO + 100
del array
def read(): return libc.syscall(ctypes.c_long(1), ctypes.c_long(2), ctypes.c_void_p(where), ctypes.c_long(8))
assert read() == -1 and os.strerror(ctypes.get_errno()) in ("Bad address", "Memory page has hardware error")
array = pool.array(data('walk', 40 * FOLIO, 1))
assert array.ctypes.data < where < array.ctypes.data + array.nbytes
out(pool)
assert np.array_equal(array, data('walk', 40 * FOLIO, 1))
""",
        "thread",
    )


C_CODE = r"""
#define _GNU_SOURCE
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
static char *guard;
static volatile int got;
static void handler(int s, siginfo_t *i, void *c) {
    if ((char *)i->si_addr < guard || (char *)i->si_addr >= guard + 4096) _exit(3);
    got++;
    mprotect(guard, 4096, PROT_READ | PROT_WRITE);
}
int touch_guarded(char *p, int ours) {
    struct sigaction a;
    memset(&a, 0, sizeof a);
    a.sa_sigaction = handler;
    a.sa_flags = SA_SIGINFO;
    if (sigaction(SIGSEGV, &a, NULL)) return -1;
    guard = ours ? p : mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mprotect(guard, 4096, PROT_NONE)) return -2;
    *(volatile char *)guard = 7;
    return got * 10 + (*guard == 7);
}
"""


@pytest.fixture(scope="module")
def guard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library of that code."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler")
    place = tmp_path_factory.mktemp("guard")
    (place / "guard.c").write_text(C_CODE)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", place / "guard.so", place / "guard.c"], check=True)
    return place / "guard.so"


@pytest.mark.parametrize("way", DELIVERIES)
@pytest.mark.parametrize("ours", [0, 1])
def test_a_programs_own_protection_reaches_its_own_handler(guard: Path, way: str, ours: int) -> None:
    right(
        f"""
pool = fresh_pool(swap="none")
array = pool.array(data("walk", 40 * FOLIO, 1)); out(pool); array.sum()
lib = ctypes.CDLL({str(guard)!r})
assert lib.touch_guarded(ctypes.c_void_p(array.ctypes.data + 8 * FOLIO), {ours}) == 11
out(pool)
array[8 * FOLIO] = 7
model = data("walk", 40 * FOLIO, 1); model[8 * FOLIO] = 7
assert np.array_equal(array, model) or {1 - ours} and np.array_equal(array[9 * FOLIO :], model[9 * FOLIO :])
""",
        way,
    )


# ---- how many mappings ----

ALTERNATE = """
pool = fresh_pool("1GiB", swap="none")
array = pool.zeros(6000 * FOLIO, np.uint8)
model = np.zeros(6000, np.uint8)
most = 0
def touch(order, add):
    global most
    for i in order:
        array[i * FOLIO + 5] += add
        model[i] += add
        most = max(most, _core.mappings())
touch(range(0, 6000, 2), 1)
touch(range(5999, 0, -3), 2)
assert np.array_equal(array[5::FOLIO], model)
copy = pool.snapshot(array)                             # every folio is protected
touch(range(1, 6000, 4), 3)
touch(np.random.default_rng(1).permutation(6000)[:1000].tolist(), 4)
out(pool)
touch(range(0, 6000, 5), 5)
assert np.array_equal(array[5::FOLIO], model)
child = os.fork()
if child == 0:
    touch(range(0, 6000, 2), 6)
    out(pool)
    touch(range(0, 6000, 7), 7)
    assert np.array_equal(array[5::FOLIO], model)
    check_pool(pool)
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
touch(range(0, 6000, 3), 8)
assert np.array_equal(array[5::FOLIO], model)
assert copy[5::FOLIO].max() == 3
check_pool(pool)
del array, copy
check_empty(pool)
"""


@pytest.mark.parametrize("limit", [200, 2000])
def test_mappings_stay_within_their_bound(limit: int) -> None:
    """Folios in place here and there take two mappings each: near the bound neighbours come and go together."""
    most = int(right(ALTERNATE + "print(most)\n", "segv", USERSWAP_MAPPINGS=str(limit)))
    # a unit that is not whole yet, of each of two threads at most
    assert limit // 4 < most <= limit + 8


def test_folios_here_and_there_with_the_kernels_own_bound() -> None:
    """3 GiB, every second folio in place: 49,152 mappings, had each its own."""
    right(
        """
pool = fresh_pool("3GiB", swap="none")
array = pool.zeros(3 << 30, np.uint8)
array[5 :: 2 * FOLIO] = 7
assert (array[5 :: 2 * FOLIO] == 7).all() and not array[FOLIO + 5 :: 2 * FOLIO].any()
assert sum(1 for _ in open("/proc/self/maps")) < 60000
""",
        "segv",
    )


def test_a_program_that_takes_all_mappings_there_are() -> None:
    """The kernel refuses every change of protection that would take one more: nothing is lost, and it goes on."""
    right(
        """
pool = fresh_pool("64MiB", swap="none")
array = pool.array(data("small", 1500 * FOLIO, 1))
model = data("small", 1500 * FOLIO, 1)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
room = 1 << 18
base = libc.mmap(None, room * 4096, 0, 0x4022, -1, 0)
taken = 0
def take_all():
    global taken
    while taken + 2 < room and libc.mprotect(base + taken * 4096, 4096, 1) == 0: taken += 2
touched = np.random.default_rng(1).permutation(1500)[:400].tolist()
for turn, i in enumerate(touched):
    if turn % 100 == 20:
        take_all()
    array[i * FOLIO + 9] += 1; model[i * FOLIO + 9] += 1
assert ctypes.get_errno() == 12 or taken > 1000
assert np.array_equal(array, model)
libc.munmap(base, room * 4096)
out(pool)
other = pool.snapshot(array)
array[::4096] += 1; model[::4096] += 1
assert np.array_equal(array, model)
check_pool(pool)
del array, other
check_empty(pool)
""",
        "segv",
    )


# One in ten changes of protection that take something away stops half way, as one of several mappings can.
HALF_WAY = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
static int hidden(char *page) {
    char byte;
    struct iovec to = {&byte, 1}, from = {page, 1};
    return process_vm_readv(getpid(), &to, 1, &from, 1, 0) != 1;
}
int mprotect(void *at, size_t length, int prot) {
    static unsigned times;
    if (length > 4096 && length < (64u << 20) && (uintptr_t)at % 65536 == 0 && !(prot & PROT_WRITE)
        && !(prot == PROT_NONE && hidden((char *)at + length - 4096)) && ++times % 10 == 0) {
        syscall(SYS_mprotect, at, (length / 2 + 4095) & ~(size_t)4095, prot);
        errno = ENOMEM;
        return -1;
    }
    return (int)syscall(SYS_mprotect, at, length, prot);
}
"""


def test_what_was_hidden_half_way_is_not_looked_at_by_who_has_it(tmp_path: Path) -> None:
    """It was, for its sum, by the thread that had the folio BUSY and then waited for itself."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler to build the library that stops half way")
    (tmp_path / "half.c").write_text(HALF_WAY)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", tmp_path / "half.so", tmp_path / "half.c"], check=True)
    right(
        """
pool = fresh_pool(swap="none")
pages, wrong = pool.zeros((400, FOLIO // 8), np.int64), []
def work(first):
    turns = {}
    for i in np.random.default_rng(first).integers(0, 100, 600).tolist():
        i = 4 * i + first
        if not (pages[i] == turns.get(i, 0) * (i + 1)).all(): wrong.append(i)
        pages[i] += i + 1
        turns[i] = turns.get(i, 0) + 1
threads = [threading.Thread(target=work, args=[first]) for first in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
out(pool)
assert not wrong and pool.stats().swap_outs > 400
check_pool(pool)
""",
        "segv",
        LD_PRELOAD=str(tmp_path / "half.so"),
    )


# Hiding is refused so many times as the program says.
REFUSED = r"""
#define _GNU_SOURCE
#include <errno.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>
int refuse;
int mprotect(void *at, size_t length, int prot) {
    if (refuse && prot == PROT_NONE && length > 4096) {
        refuse--;
        errno = ENOMEM;
        return -1;
    }
    return (int)syscall(SYS_mprotect, at, length, prot);
}
"""


def test_kept_frames_that_can_not_be_given_back_are_nobodys(tmp_path: Path) -> None:
    """Refused for a while they go later; for good, nobody gets that memory any more, nor is anything counted."""
    if not shutil.which("cc"):
        pytest.skip("no C compiler to build the library that refuses")
    library = tmp_path / "refused.so"
    (tmp_path / "refused.c").write_text(REFUSED)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, tmp_path / "refused.c"], check=True)
    right(
        """
refuse = ctypes.c_int.in_dll(ctypes.CDLL(os.environ["LD_PRELOAD"]), "refuse")
M = 1 << 20
pool = fresh_pool("128MiB", swap="none")
def kept(n):
    array = pool.full(n, 7, np.uint8)
    place = array.ctypes.data
    del array
    assert pool.stats().kept_bytes == n
    return place
def then(n, wanted):
    array = pool.zeros(n, np.uint8)
    assert not array.any(), "zeros"
    assert (array.ctypes.data == place) == wanted, "where"
    array[:] = 3
    check_pool(pool)
    del array
    refuse.value = 0
    assert pool.evict() > 0
    check_empty(pool)
place = kept(4 * M)
refuse.value = 3
pool.evict()
assert refuse.value == 0 == pool.stats().kept_bytes
then(4 * M, True)
place = kept(4 * M)
refuse.value = 1 << 20
pool.evict()
assert 0 < refuse.value < 1 << 20
refuse.value = 0
check_empty(pool)
then(4 * M, False)
place = kept(3 * M + 2 * FOLIO)                           # the same when it shall be shorter
refuse.value = 1 << 20
then(3 * M, False)
""",
        "segv",
        LD_PRELOAD=str(library),
    )


@pytest.mark.parametrize("way", DELIVERIES)
def test_kept_frames_are_cleared_for_who_wants_zeros(way: str) -> None:
    right(
        """
pool = fresh_pool("128MiB", swap="none")
for n in (1 << 20, (3 << 20) + 4096, 5 << 20):
    for before in (n, n + FOLIO, n - 4096):
        array = pool.full(before, 7, np.uint8)
        del array
        assert pool.stats().kept_bytes > 0
        assert not pool.zeros(n, np.uint8).any()
        pool.evict()
check_empty(pool)
""",
        way,
    )


# ---- fork ----


def test_a_clone_that_no_fork_handler_heard_of_does_not_write_to_its_parents_memory() -> None:
    """Its descriptor is its parent's /proc/self/mem: what it brought in overwrote what its parent had in place."""
    number = {"x86_64": 56, "aarch64": 220}.get(platform.machine())
    if number is None:
        pytest.skip("clone has another number here")
    result = run(
        f"NUMBER = {number}"
        """
pool = fresh_pool(swap="none")
array = pool.array(data("small", 64 * FOLIO, 1))
kept = pool.zeros(FOLIO, np.uint8); kept[:] = 5
out(pool); pool.evict()
unused = pool.empty(FOLIO, np.uint8)
assert kept[0] == 5
before, after = os.pipe()
child = libc.syscall(NUMBER, 17, 0, 0, 0, 0)            # SIGCHLD
if child == 0:
    os.read(before, 1)
    kept[1] = unused[0] = 6                             # what it has is its own
    os._exit(3 if kept[0] == 5 and kept[1] == 6 and int(array[0]) >= 0 else 4)
array[:] = 9; kept[:] = 8
os.write(after, b"x")
status = os.waitpid(child, 0)[1]
assert (array == 9).all() and (kept == 8).all()
print(os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGBUS)
check_pool(pool)
""",
        "segv",
    )
    assert (result.returncode, result.stdout) == (0, "True\n"), result.stderr
    assert "was swapped out when this process was cloned, without fork()" in result.stderr


@pytest.mark.parametrize("way", ["thread", "segv"])
def test_children_and_their_children_keep_the_delivery(way: str) -> None:
    right(
        """
pool = fresh_pool()
array = pool.array(data("walk", 600 * FOLIO, 1))
model = data("walk", 600 * FOLIO, 1)
def check(depth):
    array[depth :: 4096] += 1; model[depth :: 4096] += 1
    out(pool)
    assert _core.delivery() == os.environ["USERSWAP_DELIVERY"]
    if depth < 3:
        children = [os.fork(), os.fork() if depth == 0 else -1]
        if 0 in children:
            check(depth + 1)
            os._exit(0)
        array[9 :: 8192] ^= 255; model[9 :: 8192] ^= 255
        for child in children:
            assert child < 0 or os.waitpid(child, 0)[1] == 0
    assert np.array_equal(array, model)
    check_pool(pool)
check(0)
""",
        way,
    )


def test_a_child_of_a_process_that_has_dropped_its_privileges() -> None:
    """It may not open its own memory until it says that it may be looked at; and then it is as it was."""
    if os.geteuid() != 0:
        pytest.skip("has none to drop")
    right(
        """
pool = fresh_pool(swap="none")
array = pool.array(data("walk", 300 * FOLIO, 1))
os.setgroups([]); os.setgid(65534); os.setuid(65534)
assert libc.prctl(3, 0, 0, 0, 0) != 1                   # PR_GET_DUMPABLE
child = os.fork()
if child == 0:
    array[::4096] += 1
    model = data("walk", 300 * FOLIO, 1); model[::4096] += 1
    assert np.array_equal(array, model) and libc.prctl(3, 0, 0, 0, 0) != 1
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert np.array_equal(array, data("walk", 300 * FOLIO, 1))
""",
        "segv",
    )


# ---- the rest of the tests ----

# What finds a wrong transition soonest; all of them with USERSWAP_DELIVERY=... make test.
SOME = ["test_model.py", "test_faults.py"]


@pytest.mark.skipif("USERSWAP_DELIVERY" in os.environ, reason="they all run under one already")
@pytest.mark.parametrize(("way", "limit"), [("thread", ""), ("segv", ""), ("segv", "64")])
def test_other_tests_pass_under_it(way: str, limit: str) -> None:
    if not here[way]:
        pytest.skip(f"no delivery by {way} here")
    files = [str(Path(__file__).parent / name) for name in (SOME if not limit else SOME[:1])]
    environment = {**os.environ, "USERSWAP_DELIVERY": way, "USERSWAP_MAPPINGS": limit}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
