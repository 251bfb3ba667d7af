"""Signals, debuggers, profilers, event loops, sub-interpreters: swapped memory breaks none, and none changes a byte."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support import python, userswap

# Goes round until it is told to end: faults all the time, in NumPy's loops and in Python's own.
BUSY = """
import os, signal, sys
import numpy as np
x = np.arange(12_000_000)
rounds, ended = 0, []
signal.signal(signal.SIGTERM, lambda *_: ended.append(1))
print("started", flush=True)
while not ended:
    x += 1
    text = bytearray(20_000_000)
    text[::4096] = bytes([rounds % 256]) * len(text[::4096])
    rounds += 1
    print(rounds, flush=True)
assert (x == np.arange(12_000_000) + rounds).all()
assert text.count(bytes([(rounds - 1) % 256])) in (len(text[::4096]), len(text))
print("right")
"""


@contextmanager
def busy() -> Iterator[subprocess.Popen[str]]:
    """A program that faults all the time; must be right in the end, and end by itself."""
    with subprocess.Popen(
        [sys.executable, "-m", "userswap", "run", "--ram", "48M", "--quiet", "-c", BUSY],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as started:  # fmt: skip
        assert started.stdout is not None
        try:
            assert started.stdout.readline() == "started\n", started.communicate()[1]
            assert started.stdout.readline() == "1\n"
            yield started
            started.send_signal(signal.SIGTERM)
            out, errors = started.communicate(timeout=120)
            assert (started.returncode, errors) == (0, "")
            assert out.endswith("right\n")
        finally:
            started.kill()


@pytest.mark.skipif(not shutil.which("gdb"), reason="there is no gdb here")
def test_a_debugger_comes_and_goes() -> None:
    with busy() as started:
        for _ in range(3):
            seen = subprocess.run(
                ["gdb", "-nx", "-batch", "-p", str(started.pid), "-ex", "bt 3", "-ex", "info threads"],
                capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
            if "ptrace: Operation not permitted" in seen.stderr:
                pytest.skip("gdb may not attach here")
            assert "detached" in seen.stdout, seen.stderr


@pytest.mark.parametrize("native", [[], ["--native"]])
def test_py_spy_looks_on(native: list[str]) -> None:
    program = Path(sys.executable).parent / "py-spy"
    with busy() as started:
        for _ in range(3):
            seen = subprocess.run(
                [program, "dump", *native, "--pid", str(started.pid)],
                capture_output=True,
                text=True,
                timeout=120,
                check=False,
            )
            if "Permission denied" in seen.stderr or "not permitted" in seen.stderr:
                pytest.skip("py-spy may not look into processes here")
            assert "<module> (<string>:" in seen.stdout, seen.stderr


@pytest.mark.parametrize("inside", [True, False])
def test_memray_records_it(tmp_path: Path, inside: bool) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import numpy as np\nx = np.arange(12_000_000)\nfor i in range(2):\n    x += 1\n"
        "b = bytearray(40_000_000)\nb[::4096] = b'x' * len(b[::4096])\n"
        "assert (x == np.arange(12_000_000) + 2).all() and b.count(b'x') == len(b[::4096])\nprint('right')\n"
    )
    memray = ["-m", "memray", "run", "-q", "-o", str(tmp_path / "record.bin")]
    swapped = ["run", "--ram", "48M"]
    result = (
        userswap(*swapped, *memray, str(script)) if inside else python(*memray, "-m", "userswap", *swapped, str(script))
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "right\n"
    assert "as much)" in result.stderr
    # Started first, it would be started once more: then it is NumPy's arrays alone, and that is said.
    assert ("put userswap first: userswap run -m memray" in result.stderr) != inside
    shown = python("-m", "memray", "stats", str(tmp_path / "record.bin"))
    assert "Total memory allocated" in shown.stdout, shown.stderr


def test_control_c_in_the_middle_of_faults_is_a_keyboard_interrupt() -> None:
    code = """
import os, signal, threading, time
import numpy as np
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with SIGINT ignored
x = np.arange(12_000_000)
seen = 0
added = 0
def interrupt():
    for _ in range(20):
        time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)
thread = threading.Thread(target=interrupt)
thread.start()
while True:
    try:
        while thread.is_alive():
            x[:] = x  # an interrupt comes before or after it, but what it does is whole
        break
    except KeyboardInterrupt:
        seen += 1
signal.signal(signal.SIGINT, signal.SIG_IGN)
assert seen, "no interrupt was seen"
assert (x == np.arange(12_000_000)).all()
print("right", flush=True)
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.raise_signal(signal.SIGINT)
"""
    result = userswap("run", "--ram", "48M", "--quiet", "-c", code)
    assert result.stdout == "right\n", result.stderr
    assert result.stderr.rstrip().endswith("KeyboardInterrupt")
    assert result.returncode == python("-c", "import signal; signal.raise_signal(signal.SIGINT)").returncode


def test_timers_interrupt_faults_a_thousand_times_a_second() -> None:
    code = """
import signal
import numpy as np
x = np.arange(12_000_000)
y = np.ones(3_000_000)
ticks = 0
def tick(*_):
    global ticks
    ticks += 1
    y[ticks % 3_000_000 :: 65_536] += 1  # faults itself, between two lines of the program
signal.signal(signal.SIGALRM, tick)
signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
for i in range(10):
    for start in range(0, 12_000_000, 500_000):
        x[start : start + 500_000] += 1
signal.setitimer(signal.ITIMER_REAL, 0)
assert ticks > 50, ticks
expected = np.ones(3_000_000)
for i in range(1, ticks + 1):
    expected[i % 3_000_000 :: 65_536] += 1
assert (y == expected).all()
assert (x == np.arange(12_000_000) + 10).all()
print("right")
"""
    result = userswap("run", "--ram", "48M", "--quiet", "-c", code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "right\n", "")


@pytest.mark.parametrize(
    ("how", "ends"),
    [
        ("ctypes.string_at(8)", -signal.SIGSEGV),
        ("os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV),
        ("os.kill(os.getpid(), signal.SIGBUS)", -signal.SIGBUS),
        ("os.abort()", -signal.SIGABRT),
        ("mapped[5000]", -signal.SIGBUS),
    ],
)
def test_a_genuine_crash_is_the_crash_that_it_would_be(how: str, ends: int, tmp_path: Path) -> None:
    (tmp_path / "short").touch()
    code = f"""
import ctypes, mmap, os, resource, signal
import numpy as np
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
x = np.arange(8_000_000)
assert x.sum() == 8_000_000 * 7_999_999 // 2
fd = os.open({str(tmp_path / "short")!r}, os.O_RDWR)
os.ftruncate(fd, 8192)
mapped = mmap.mmap(fd, 8192)
os.ftruncate(fd, 100)
{how}
"""
    for options in ([], ["-X", "faulthandler"]):
        plain = python(*options, "-c", code)
        swapped = python(*options, "-m", "userswap", "run", "--ram", "48M", "-c", code)
        assert plain.returncode == swapped.returncode == ends, swapped.stderr
        assert ("Fatal Python error" in swapped.stderr) == bool(options), swapped.stderr


def test_event_loops_send_and_receive_swapped_memory() -> None:
    code = """
import asyncio, hashlib
import numpy as np
data = np.random.default_rng(1).integers(0, 9, 60_000_000, np.uint8)
expected = hashlib.sha1(data).hexdigest()

async def main():
    got = bytearray()
    async def serve(reader, writer):
        while block := await reader.read(1 << 20):
            got.extend(block)
            writer.write(block[:1])
        writer.close()
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    for start in range(0, len(data), 16 << 20):
        writer.write(data[start : start + (16 << 20)].data)
        await writer.drain()
    writer.write_eof()
    await reader.read()
    writer.close()
    server.close()
    assert hashlib.sha1(got).hexdigest() == expected
    process = await asyncio.create_subprocess_exec("sha1sum", stdin=-1, stdout=-1)
    out, _ = await process.communicate(data.data)
    assert out.split()[0].decode() == expected
    sums = await asyncio.gather(*(asyncio.to_thread(data[i::4].sum, dtype="u8") for i in range(4)))
    assert sum(sums) == data.sum(dtype="u8")

asyncio.run(main())
print("right")
"""
    result = userswap("run", "--ram", "48M", "--quiet", "-c", code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "right\n", "")


def test_a_sub_interpreter_is_told_so_and_its_memory_is_swapped() -> None:
    code = '''
import sys
try:
    import _interpreters as interpreters
except ImportError:
    import _xxsubinterpreters as interpreters
inner = interpreters.create()
failed = interpreters.run_string(inner, """
import userswap
try:
    userswap.Pool(ram="64M")
except userswap.UnsupportedError as error:
    print(error, flush=True)
text = bytearray(100 << 20)
text[::4096] = b"x" * len(text[::4096])
assert text.count(b"x") == 25600
print("right", flush=True)
""")
interpreters.destroy(inner)
assert failed is None, failed
'''
    result = userswap("run", "--ram", "48M", "-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("userswap can only be used from a process's main interpreter")
    assert result.stdout.endswith("right\n")
    assert "100 MiB of large allocations at once in 48 MiB" in result.stderr


def test_a_thread_that_masks_every_signal_lives_through_its_faults() -> None:
    code = """
import ctypes, signal, threading
import numpy as np
libc = ctypes.CDLL(None)
x = np.arange(12_000_000)
right = []
def masked(by):
    by()
    right.append(int(x.sum()) == 12_000_000 * 11_999_999 // 2)
    after = threading.Thread(target=lambda: right.append(int(x[::7].sum()) == int(np.arange(0, 12_000_000, 7).sum())))
    after.start()  # inherits the mask
    after.join()
every = (ctypes.c_ubyte * 128)(*[255] * 128)
for by in (
    lambda: signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals()),
    lambda: signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32)),
    lambda: libc.sigprocmask(0, every, None),
    lambda: libc.pthread_sigmask(2, every, None),
):
    thread = threading.Thread(target=masked, args=(by,))
    thread.start()
    thread.join()
assert right == [True] * 8, right
print("right")
"""
    result = userswap("run", "--ram", "48M", "--quiet", "-c", code)
    assert (result.returncode, result.stdout, result.stderr) == (0, "right\n", "")
