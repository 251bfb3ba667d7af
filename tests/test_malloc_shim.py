"""Large allocations of any library under `userswap run`: real programs in a fraction of the memory that they use."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from support import Result, python, userswap
from userswap.cli import preload

# Before each program. `pool`: what its memory lives in; `block`: malloc and kin, by address.
PRELUDE = """
import ctypes, os, random, sys, threading
from userswap import malloc_hook
from userswap.pool import _installed
pool = _installed[-1].pool
owns = malloc_hook.owns
C = ctypes.CDLL(None, use_errno=True)
SIZE, POINTER = ctypes.c_size_t, ctypes.c_void_p
for name, kinds in {"malloc": [SIZE], "calloc": [SIZE, SIZE], "realloc": [POINTER, SIZE], "valloc": [SIZE],
                    "pvalloc": [SIZE], "reallocarray": [POINTER, SIZE, SIZE], "aligned_alloc": [SIZE, SIZE],
                    "memalign": [SIZE, SIZE], "strdup": [POINTER], "free": [POINTER],
                    "malloc_usable_size": [POINTER], "posix_memalign": [POINTER, SIZE, SIZE]}.items():
    getattr(C, name).argtypes = kinds
    getattr(C, name).restype = POINTER
C.free.restype = None
C.malloc_usable_size.restype = SIZE
C.posix_memalign.restype = ctypes.c_int
M = 1 << 20
def at(address, size):
    return (ctypes.c_char * size).from_address(address)
def zero(address, size):
    return not at(address, size).raw.strip(bytes(1))
def evict():
    # Not until nothing is left: with this threshold the interpreter's map of its arenas may be swapped memory too
    # (128 KiB, made where an arena comes to lie far from the others), and comes back with every object freed.
    for _ in range(20):
        if not pool.evict():
            break
def ours(address):
    return owns(at(address, 1))
def pattern(seed, size):
    return random.Random(seed).randbytes(4099) * (size // 4099 + 1)
def put(address, seed, size):
    ctypes.memmove(address, pattern(seed, size), size)
def holds(address, seed, size):
    return C.memcmp(POINTER(address), pattern(seed, size), SIZE(size)) == 0
def sound():
    states = pool._core.check()
    assert states["wrong"] == 0, states
"""


def run(code: str, *options: str, ram: str = "16M", **more: Any) -> Result:
    return userswap("run", "--quiet", "--ram", ram, *options, "-c", PRELUDE + code, **more)


def check(code: str, *options: str, **more: Any) -> None:
    """The program says "done", and nothing else, and its end is as clean."""
    result = run(code + "\nprint('done')", *options, **more)
    assert result.stderr == ""
    assert (result.stdout, result.returncode) == ("done\n", 0)


def test_what_python_itself_makes() -> None:
    check("""
import array, hashlib
blocks, digests = [], []
for i in range(12):
    blocks += [random.Random(i).randbytes(M) * 2, bytearray(b"%02d" % i) * M, array.array("q", range(i, i + M // 4))]
    digests += [hashlib.sha256(block).digest() for block in blocks[-3:]]
assert all(owns(block) for block in blocks)
for i, block in enumerate(blocks[1::3]):
    assert block[M // 2:M // 2 + 2] == b"%02d" % i
    block[M // 2] = 255
for i, block in enumerate(blocks[1::3]):
    assert block[M // 2] == 255 and block.count(255) == 1
    block[M // 2] = ord("0") + i // 10
for block, digest in zip(blocks, digests):
    assert hashlib.sha256(block).digest() == digest
assert pool.stats().swap_ins > 500
sound()
del block, blocks
assert pool.stats().regions == pool.stats().swap_ids == 0
""")


def test_what_grows() -> None:
    check("""
grown, piece = bytearray(), random.Random(1).randbytes(99_991)
for i in range(400):
    grown += piece
assert owns(grown)
assert bytes(grown) == piece * 400
joined = b"".join([piece] * 300)
numbers = []
for i in range(M):
    numbers.append(i)                          # its pointers: a list is realloced every few items
assert numbers[::77777] == list(range(0, M, 77777))
del grown[3 * M:]
assert bytes(grown) == (piece * 400)[:3 * M]
assert joined == piece * 300
sound()
""")


def test_realloc_of_folios_in_every_state() -> None:
    """Grows and shrinks with folios in place, written to, clean, in parts, swapped out and never touched."""
    check(
        """
for trial in range(40):
    chance = random.Random(trial)
    size = chance.randrange(M // 8, 5 * M)
    block = C.malloc(size)
    assert ours(block)
    put(block, trial, size)
    for step in range(5):
        kind = chance.randrange(6)
        if kind > 1:
            evict()
        if kind == 3:
            at(block, size)[size // 3 : size // 2]                                     # clean
        elif kind == 4:
            for _ in range(60):
                at(block, size)[chance.randrange(size)]                                # here and there: parts
        elif kind == 5:
            where = chance.randrange(size - 4)
            at(block, size)[where : where + 4] = pattern(trial, size)[where : where + 4]   # written to
        longer = size * chance.choice([1, 2, 5, 9]) // chance.choice([1, 2, 3, 4]) + chance.randrange(9)
        longer = max(min(longer, 12 * M), 70_000)
        block = C.realloc(block, longer)
        assert ours(block)
        assert C.malloc_usable_size(block) >= longer
        assert holds(block, trial, min(size, longer)), (trial, step, kind, size, longer)
        if chance.random() < 0.7:
            put(block, trial, longer)
            size = longer
        else:
            size = min(size, longer)           # what follows was never touched
        if chance.random() < 0.3:
            sound()
    C.free(block)
assert pool.stats().regions == 0
sound()
""",
        "--min-array",
        "64K",
        ram="32M",
    )


def test_what_is_resized_is_not_read() -> None:
    """A block of swapped folios gets a place of its own, or more room behind it, with all of them where they were."""
    check("""
size = 32 * M
block = C.malloc(size)
for i in range(0, size, 4 * M):
    put(block + i, i, 4 * M)
evict()
ins, faults = pool.stats().swap_ins, pool.stats().faults
longer = C.realloc(block, 3 * size)
assert longer != block
assert pool.stats().swap_ins == ins
assert pool.stats().faults - faults < 8
assert C.malloc_usable_size(longer) >= 3 * size
moved = C.realloc(longer, 5 * size + M)
assert moved != longer
assert C.realloc(moved, 5 * size + 2 * M) == moved     # there is address space behind it
assert pool.stats().swap_ins == ins
for i in range(0, size, 4 * M):
    assert holds(moved + i, i, 4 * M)
assert zero(moved + size, 4 * size + 2 * M)
sound()
""")


def test_realloc_across_the_threshold() -> None:
    check("""
small = C.malloc(1000)
put(small, 1, 1000)
large = C.realloc(small, 2 * M)
assert not ours(small) and ours(large) and holds(large, 1, 1000)
put(large, 2, 2 * M)
small = C.realloc(large, 5000)
assert not ours(small) and holds(small, 2, 5000)
assert ours(C.realloc(None, M)) and ours(C.reallocarray(None, 1024, 1024))
assert ours(large := C.reallocarray(small, 3, M)) and holds(large, 2, 5000)
assert C.reallocarray(large, 1 << 33, 1 << 33) is None and ctypes.get_errno() == 12 and holds(large, 2, 5000)
assert C.realloc(large, 1 << 60) is None and holds(large, 2, 5000)             # nobody has it
assert C.realloc(large, 0) is None
assert C.malloc(1 << 60) is None
sound()
""")


def test_calloc_is_zeros_where_something_was() -> None:
    check("""
for i in range(30):
    block = C.malloc(3 * M)
    put(block, i, 3 * M)
    C.free(block)
    block = C.calloc(3, M)
    assert ours(block)
    assert zero(block, 3 * M)
    C.free(block)
assert C.calloc(1 << 33, 1 << 33) is None and ctypes.get_errno() == 12
assert pool.stats().regions == 0
""")


def test_alignment() -> None:
    check(
        """
where = POINTER()
for shift in range(3, 24):
    blocks = []
    for size in (M, 3 * M + 5):
        assert C.posix_memalign(ctypes.byref(where), 1 << shift, size) == 0
        blocks.append((where.value, size))
        blocks.append((C.aligned_alloc(1 << shift, size), size))
        blocks.append((C.memalign(1 << shift, size), size))
    for i, (block, size) in enumerate(blocks):
        assert ours(block) and block % (1 << shift) == 0
        assert C.malloc_usable_size(block) >= size
        put(block, i, size)
    for i, (block, size) in enumerate(blocks):
        longer = C.realloc(block, 9 * M)
        assert ours(longer) and holds(longer, i, size)
        C.free(longer)
assert pool.stats().regions == 0
assert C.posix_memalign(ctypes.byref(where), 24, M) == 22
assert C.valloc(M) % 4096 == C.pvalloc(M + 1) % 4096 == 0
assert C.malloc_usable_size(C.pvalloc(M + 1)) >= M + 4096
for block in (C.malloc(10), C.malloc(M)):
    ctypes.set_errno(77)
    C.free(block)
    assert ctypes.get_errno() == 77
ctypes.set_errno(77)
C.malloc(M)
assert ctypes.get_errno() == 77
""",
        ram="48M",
    )


def test_threads_allocate_free_and_resize_at_random() -> None:
    check(
        """
import queue
passed_on, errors = queue.Queue(), []
def work(seed):
    chance, mine = random.Random(seed), []
    try:
        for step in range(60):
            what = chance.randrange(4)
            if what == 0 or len(mine) < 2:
                size = chance.randrange(64 << 10, M)
                mine.append((C.malloc(size), step, size))
                put(*mine[-1])
            elif what == 1:
                block, content, size = mine.pop(chance.randrange(len(mine)))
                longer = chance.randrange(64 << 10, 2 * M)
                block = C.realloc(block, longer)
                assert holds(block, content, min(size, longer))
                put(block, step, longer)
                mine.append((block, step, longer))
            elif what == 2:
                passed_on.put(mine.pop(chance.randrange(len(mine))))
            elif not passed_on.empty():
                block = passed_on.get()
                assert holds(*block)
                C.free(block[0])
        for block in mine:
            assert holds(*block)
            C.free(block[0])
    except BaseException as error:
        errors.append(error)
threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not errors, errors
while not passed_on.empty():
    block = passed_on.get()
    assert holds(*block)
    C.free(block[0])
assert pool.stats().regions == 0
sound()
""",
        "--min-array",
        "64K",
        # No arenas of the interpreter's own: their map is of this size, and would be one more region at the end.
        env={**os.environ, "PYTHONMALLOC": "malloc"},
    )


def test_fork() -> None:
    check("""
blocks = [C.malloc(2 * M) for _ in range(16)]
for i, block in enumerate(blocks):
    put(block, i, 2 * M)
child = os.fork()
if child == 0:
    for i, block in enumerate(blocks):
        assert holds(block, i, 2 * M)
        if i % 3 == 0:
            C.free(block)
        elif i % 3 == 1:
            longer = C.realloc(block, 3 * M)
            assert holds(longer, i, 2 * M)
        else:
            put(block, -i, 2 * M)
    fresh = C.calloc(3, M)
    assert ours(fresh) and zero(fresh, 3 * M)
    assert all(holds(block, -i, 2 * M) for i, block in enumerate(blocks) if i % 3 == 2)
    sound()
    os._exit(5)
for i, block in reversed([*enumerate(blocks)]):        # those first that are in place
    block = C.realloc(block, 5 * M)            # pages that the child shares can't be moved
    assert holds(block, i, 2 * M)
    C.free(block)
assert os.waitpid(child, 0)[1] == 5 << 8
sound()
""")


def test_fork_handlers_of_other_libraries(tmp_path: Path) -> None:
    """They may allocate, free and read in every phase of a fork, even those that were there before userswap was."""
    (tmp_path / "sitecustomize.py").write_text("""
import ctypes
ACTIONS, KIND = [], ctypes.CFUNCTYPE(None)
HANDLERS = [KIND(lambda phase=phase: [action(phase) for action in ACTIONS]) for phase in range(3)]
ctypes.CDLL(None).__register_atfork(*HANDLERS, None)
""")
    check(
        """
import sitecustomize
blocks = {phase: C.malloc(2 * M) for phase in range(3)}
kept = C.malloc(4 * M)
put(kept, 1, 4 * M)
def action(phase):
    C.free(blocks[phase])
    blocks[phase] = C.malloc(2 * M)
    put(blocks[phase], phase, 2 * M)
    assert ours(blocks[phase]) and holds(kept, 1, 4 * M)
    seen.append(phase)
seen = []
sitecustomize.ACTIONS.append(action)
evict()
child = os.fork()
if child == 0:
    assert seen == [0, 2], seen
    assert holds(blocks[0], 0, 2 * M) and holds(blocks[2], 2, 2 * M)
    os._exit(5)
assert seen == [0, 1], seen
assert os.waitpid(child, 0)[1] == 5 << 8
sound()
""",
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        timeout=60,
    )


def test_freed_after_the_pool_is_closed_and_when_the_process_ends() -> None:
    result = run("""
block = C.malloc(2 * M)
put(block, 1, 2 * M)
last = C.malloc(2 * M)
put(last, 2, 2 * M)
at(last, 2 * M)[:6] = b"ended\\0"
alive = bytearray(9 * M)                       # never freed
# What libc calls at the very end, after Python, the last first: reads it, and frees it.
C.__cxa_atexit(ctypes.cast(C.free, POINTER), POINTER(last), None)
C.__cxa_atexit(ctypes.cast(C.puts, POINTER), POINTER(last), None)
evict()
malloc_hook.install(None, 0)
_installed[-1].uninstall()
assert holds(block, 1, 2 * M) and ours(block)
longer = C.realloc(block, 3 * M)
assert not ours(longer) and holds(longer, 1, 2 * M)
assert not owns(bytearray(4 * M)) and owns(alive)
print("done", flush=True)
""")
    assert (result.stdout, result.stderr, result.returncode) == ("done\nended\n", "", 0)


@pytest.mark.parametrize("wrong", ["C.free(block); C.free(block)", "C.free(block + 4096)"])
def test_a_wrong_free_ends_the_program_as_in_libc(wrong: str) -> None:
    result = run(f"block = C.malloc(M)\n{wrong}\nprint('done')")
    assert result.returncode == -signal.SIGABRT
    assert result.stdout == ""
    assert "free(): invalid pointer" in result.stderr


def test_libc_keeps_what_is_its_own() -> None:
    """What libc allocates for itself it gives to the kernel itself: nobody would see to it that it is in place."""
    check("""
text = C.malloc(3 * M)
ctypes.memset(text, ord("x"), 3 * M)
at(text, 3 * M)[3 * M - 1] = b"\\0"
assert ours(text)
copy = C.strdup(text)
assert not ours(copy) and C.strlen(POINTER(copy)) == 3 * M - 1
""")


def test_system_calls(tmp_path: Path) -> None:
    check(
        """
import io, socket, sqlite3, ssl, zlib
blocks = [bytearray(random.Random(i).randbytes(M) * 3) for i in range(8)]
assert all(map(owns, blocks))
with open("file", "wb") as file:
    for block in blocks:
        assert file.write(block) == len(block)
back = bytearray(len(blocks[0]))
with open("file", "rb", buffering=0) as file:
    for block in blocks:
        assert file.readinto(back) == len(back) and back == block
content = open("file", "rb").read()
assert owns(content) and content == b"".join(blocks)
fd = os.open("file", os.O_RDWR)
assert os.preadv(fd, [back, bytearray(100)], 3 * M) == 3 * M + 100 and back == blocks[1]
assert os.pwritev(fd, [blocks[2], blocks[3]], 0) == 6 * M
assert os.pread(fd, 3 * M, 0) == blocks[2] and os.pread(fd, 3 * M, 3 * M) == blocks[3]
one, other = socket.socketpair()
sender = threading.Thread(target=one.sendall, args=(blocks[4],))
sender.start()
got = other.recv(3 * M, socket.MSG_WAITALL)
sender.join()
assert got == blocks[4]
database = sqlite3.connect("database")
database.execute("create table t (n, b)")
database.executemany("insert into t values (?, ?)", enumerate(blocks))
database.commit()
assert all(b == blocks[n] for n, b in database.execute("select n, b from t"))
assert all(zlib.decompress(zlib.compress(block, 1)) == block for block in blocks[:2])
inside = ssl.MemoryBIO()
inside.write(blocks[5])
assert inside.read() == blocks[5]
buffered = io.BufferedWriter(io.FileIO("buffered", "w"), 4 * M)
buffered.write(blocks[6])
buffered.close()
assert open("buffered", "rb").read() == blocks[6]
sound()
""",
        cwd=tmp_path,
    )


AREA = r"""
area = C.malloc(4 * M)
assert ours(area)
def lay(offset, content):
    at(area, 4 * M)[offset:offset + len(content)] = content
    return POINTER(area + offset)
def succeeds(result):
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
"""


def test_what_the_kernel_reads_besides_buffers(tmp_path: Path) -> None:
    """Paths, structs, addresses and stdio's buffers may lie in swapped memory, and be swapped out."""
    check(
        AREA
        + r"""
import socket, struct
path = lay(0, b"name of a file\0")
evict()
fd = succeeds(C.open(path, os.O_CREAT | os.O_RDWR, 0o600))
os.write(fd, b"12345")
status = lay(70_000, b"")
for call in (lambda: C.fstat(fd, status), lambda: C.stat(path, status)):
    lay(70_000, bytes(144))
    evict()
    succeeds(call())
    assert struct.unpack_from("q", at(area, 4 * M), 70_048)[0] == 5
other = lay(200_000, b"other\0")
evict()
succeeds(C.rename(path, other))
evict()
assert C.access(path, 0) == -1 and ctypes.get_errno() == 2
assert os.stat("other").st_size == 5

server = socket.socket(socket.AF_UNIX)
server.bind("socket")
server.listen()
address = lay(300_000, struct.pack("H", socket.AF_UNIX) + b"socket\0")
evict()
client = socket.socket(socket.AF_UNIX)
succeeds(C.connect(client.fileno(), address, 9))
polled = lay(400_000, struct.pack("ihh", server.fileno(), 1, 0))
evict()
assert C.poll(polled, 1, 0) == 1
assert struct.unpack_from("ihh", at(area, 4 * M), 400_000)[2] == 1

C.fdopen.restype = POINTER
stream = POINTER(C.fdopen(os.open("stream", os.O_CREAT | os.O_RDWR), b"w+"))
assert C.setvbuf(stream, POINTER(C.malloc(2 * M)), 0, SIZE(2 * M)) == 0
text = C.calloc(24, M)                         # libc reads all of it first, to know how long it is
ctypes.memset(text, ord("t"), 24 * M - 1)
for _ in range(2):
    evict()
    assert C.fputs(POINTER(text), stream) >= 0
    evict()
    assert C.fputs(b"end\n", stream) >= 0
evict()
assert C.fclose(stream) == 0
assert open("stream").read() == ("t" * (24 * M - 1) + "end\n") * 2
sound()
""",
        cwd=tmp_path,
    )


def test_exec_with_arguments_in_swapped_memory() -> None:
    check(
        AREA
        + r"""
import subprocess
def listed(offset, *strings):
    '''A list and its strings, each in another folio.'''
    pointers = [lay(offset + 70_000 * (i + 1), string + b"\0").value for i, string in enumerate(strings)]
    return lay(offset, b"".join(pointer.to_bytes(8, "little") for pointer in [*pointers, 0]))
script = b"import os, sys; sys.exit(7 if (sys.argv[1:], os.environ['NAME']) == (['x' * 50_000], 'value') else 1)"
given = listed(0, b"python", b"-Ic", script, b"x" * 50_000)
environment = listed(M, b"NAME=value")
path = lay(2 * M, sys.executable.encode() + b"\0")
evict()
assert C.posix_spawn(lay(3 * M, b""), path, None, None, given, environment) == 0
child = ctypes.c_int.from_address(area + 3 * M).value
assert os.waitpid(child, 0)[1] == 7 << 8
evict()
child = os.fork()
if child == 0:
    evict()
    C.execve(path, given, environment)
    os._exit(99)
assert os.waitpid(child, 0)[1] == 7 << 8
assert C.execve(lay(0, b"/none\0"), given, environment) == -1 and ctypes.get_errno() == 2

# so many that the list of them is a large allocation; subprocess uses vfork
long = [str(i) for i in range(60_000)]
before = pool.stats().faults
code = "import sys; print(len(sys.argv), sys.argv[-1])"
assert subprocess.run([sys.executable, "-c", code, *long], capture_output=True).stdout == b"60001 59999\n"
assert pool.stats().faults > before
sound()
""",
        "--min-array",
        "64K",
    )


def test_threads_processes_and_faulthandler(tmp_path: Path) -> None:
    program = r"""
import faulthandler, multiprocessing, subprocess
from concurrent.futures import ProcessPoolExecutor
def total(block):
    return sum(block[::4096])
if __name__ == "__main__":
    faulthandler.enable()
    blocks = [bytearray(random.Random(i).randbytes(4099)) * 500 for i in range(16)]
    assert all(map(owns, blocks))
    right = [total(bytes(block)) for block in blocks]
    for method in ("fork", "spawn", "forkserver"):
        with ProcessPoolExecutor(2, multiprocessing.get_context(method)) as workers:
            assert list(workers.map(total, blocks)) == right, method
    text = subprocess.run(["cat"], input=blocks[3], capture_output=True).stdout
    assert text == blocks[3] and owns(text)
    with open("trace", "w") as file:
        faulthandler.dump_traceback(file)
    assert "program.py" in open("trace").read()
    sound()
    print("done")
"""
    # Workers that are started anew import the program, and there is no pool in them.
    (tmp_path / "program.py").write_text(
        PRELUDE.replace("_installed[-1].pool", "_installed and _installed[-1].pool") + program
    )
    result = userswap("run", "--quiet", "--ram", "16M", "program.py", cwd=tmp_path)
    assert (result.stdout, result.stderr, result.returncode) == ("done\n", "", 0)


def test_numpy_arrays_are_counted_once(tmp_path: Path) -> None:
    code = "import numpy as np; a = np.zeros(8 << 20, 'u1'); a += 1; b = np.ones(9 << 20, 'u1'); del a, b"
    result = userswap("run", "--quiet", "--ram", "32M", "--stats", "stats.json", "-c", code, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert json.loads((tmp_path / "stats.json").read_text())["peak_virtual_bytes"] == 17 << 20
    check(
        """
import numpy as np
before = pool.stats().virtual_bytes
small = np.empty(20_000, "u1")                 # less than any other library's would have to be
assert owns(small) and pool.stats().virtual_bytes - before == 20480
large = np.arange(3 * M)
large.resize(5 * M, refcheck=False)
assert pool.stats().virtual_bytes - before - 20480 == 40 * M
assert (large[: 3 * M] == np.arange(3 * M)).all() and not large[3 * M :].any()
""",
        "--min-array",
        "4K",
        ram="64M",
    )


def test_children_started_anew_know_nothing_of_it(tmp_path: Path) -> None:
    code = "import os; print({n: v for n, v in os.environ.items() if 'PRELOAD' in n})"
    child = f"import subprocess, sys; {code}; sys.stdout.flush(); subprocess.run([sys.executable, '-c', {code!r}])"
    assert run(child).stdout == "{}\n{}\n"
    # The program's own stays; and it is loaded, behind ours.
    other = tmp_path / "other.so"
    shutil.copy(preload.library(), other)
    for given in ("", str(other)):
        result = run(child, env={**os.environ, "LD_PRELOAD": given})
        assert result.stdout == f"{ {'LD_PRELOAD': given} }\n" * 2, result.stderr
    maps = run(
        "print(sum('other.so' in line for line in open('/proc/self/maps')))", env={**os.environ, "LD_PRELOAD": given}
    )
    assert int(maps.stdout) > 0
    assert run("print(os.environ['ARROW_DEFAULT_MEMORY_POOL'])").stdout == "system\n"
    chosen = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "mimalloc"}
    assert run("print(os.environ['ARROW_DEFAULT_MEMORY_POOL'])", env=chosen).stdout == "mimalloc\n"


def test_it_can_be_left_out() -> None:
    check(
        "import numpy as np\nassert owns(np.zeros(M)) and not owns(bytearray(4 * M)) and not malloc_hook.preloaded()",
        "--only-numpy",
    )


def test_without_the_library_numpy_is_served_and_it_is_said() -> None:
    code = PRELUDE + "import numpy as np\nassert owns(np.zeros(M)) and not owns(bytearray(4 * M))\nprint('done')"
    # as if the loader had refused: marked as tried, but not preloaded
    result = userswap("run", "--ram", "16M", "-c", code, env={**os.environ, preload.MARK: ""})
    assert result.stdout == "done\n"
    assert "userswap: only NumPy's arrays live in swap: the loader did not put" in result.stderr
    assert python("-c", "import userswap.malloc_hook as m; assert not m.install(None, 0)").returncode == 0


def test_the_interpreter_is_called_as_it_was() -> None:
    """Options of python itself, its standard input and its arguments survive the second start."""
    code = "import sys; print(sys.flags.optimize, sys.warnoptions, sys.stdin.read(), sys.argv)"
    command = ["-O", "-W", "error", "-m", "userswap", "run", "--quiet", "--ram", "16M", "-c", code, "a b", ""]
    result = python(*command, input="given")
    assert result.stdout == "1 ['error'] given ['-c', 'a b', '']\n", result.stderr


def test_arrow(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    check(
        """
import pyarrow as pa, pyarrow.compute as pc, pyarrow.parquet as parquet
assert pa.default_memory_pool().backend_name == "system"
table = pa.table({"n": pa.array(range(2 * M)), "s": pa.array([f"row {i}" for i in range(M // 2)] * 4)})
buffers = [buffer for column in table.columns for chunk in column.chunks for buffer in chunk.buffers() if buffer]
assert any(owns(buffer) for buffer in buffers)
parquet.write_table(table, "table.parquet")
back = parquet.read_table("table.parquet")
assert back.equals(table)
assert pc.sum(back["n"]).as_py() == M * (2 * M - 1)
sound()
""",
        ram="32M",
        cwd=tmp_path,
    )


def test_stacks_stay_in_place() -> None:
    """A thread whose stack is swapped memory, and a signal stack: they can't take the signal of their own fault."""
    check(
        AREA
        + r"""
import signal
START = ctypes.CFUNCTYPE(POINTER, POINTER)
depth = []
@START
def work(argument):
    evict()
    depth.append(sum(range(1000)))
    evict()
    return 5
attributes, thread, result = ctypes.create_string_buffer(56), ctypes.c_ulong(), POINTER()
assert C.pthread_attr_init(attributes) == 0
assert C.pthread_attr_setstack(attributes, POINTER(area), SIZE(M)) == 0
assert C.pthread_create(ctypes.byref(thread), attributes, work, None) == 0
assert C.pthread_join(thread, ctypes.byref(result)) == 0
assert result.value == 5 and depth == [499500]

# struct stack_t, struct sigaction
stack = b"".join(number.to_bytes(8, "little") for number in (area + 2 * M, 0, M))
succeeds(C.sigaltstack(stack, None))
HANDLER = ctypes.CFUNCTYPE(None, ctypes.c_int)
inside = []
@HANDLER
def handler(number):
    here = ctypes.c_int()
    evict()
    inside.append(number)
action = ctypes.cast(handler, POINTER).value.to_bytes(8, "little") + bytes(128)
action += (0x08000000).to_bytes(4, "little") + bytes(12)           # SA_ONSTACK
succeeds(C.sigaction(signal.SIGUSR1, action, None))
evict()
succeeds(C.pthread_kill(ctypes.c_ulong(threading.get_ident()), signal.SIGUSR1))
assert inside == [signal.SIGUSR1]
"""
    )


def test_doctor_tries_it_out(tmp_path: Path) -> None:
    def finding(**more: str) -> dict[str, str]:
        text = userswap("doctor", "--json", env={**os.environ, **more}, cwd=tmp_path).stdout
        findings: list[dict[str, str]] = json.loads(text)["checks"]
        return next(check for check in findings if check["name"] == "large allocations")

    assert finding()["state"] == "ok"
    assert finding(**{preload.MARK: ""})["state"] == "ok"  # nothing of a parent's start is left over
    # the same package, as it would be without the library
    package = Path(preload.library()).parents[1]
    for room in (package, package / "native"):
        here = tmp_path / "userswap" / room.relative_to(package)
        here.mkdir()
        for entry in room.iterdir():
            if entry.name not in ("native", "shim.so"):
                (here / entry.name).symlink_to(entry)
    found = finding()
    assert (found["state"], found["mend"]) == ("note", "userswap run works for NumPy's arrays all the same")
    assert found["value"].endswith("shim.so is missing; install userswap again.")


def test_calloc_is_zeros_also_of_memory_that_was_freed() -> None:
    check(
        """
for size in (2 * M, 3 * M + 4096, 8 * M, 20 * M):
    block = C.malloc(size)
    put(block, 1, size)
    C.free(block)
    assert pool.stats().kept_bytes >= size - 65536
    for size in (size, size - 12288, size * 9 // 8):
        block = C.calloc(size // 4096, 4096)
        assert ours(block) and zero(block, size // 4096 * 4096)
        put(block, 2, size // 4096 * 4096)
        C.free(block)
sound()
""",
        ram="256M",
    )
