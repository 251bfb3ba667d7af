"""A program that does everything at once with large arrays, from a seed, and checks every byte: threads, forks, files,
sockets, resizing, snapshots, eviction. Runs plain as well as under `userswap run`; `python -m stress` runs it.

The seed says what each thread does. How threads come between each other it can't say, so a failure that hangs on that
may need several runs to come again.
"""

import argparse
import ctypes
import faulthandler
import json
import os
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np

from stress.content import Memory, Piece, WrongByte, bytes_of, cut

if TYPE_CHECKING:
    from userswap import Pool

MIB = 1 << 20
# How much of a program's time each thing gets, about.
WEIGHTS = {
    "scan": 4, "update": 6, "write": 8, "poke": 12, "peek": 12, "check": 10, "copy": 4, "file": 4, "pipe": 2,
    "renew": 1, "grow": 1, "snapshot": 1, "evict": 2, "pin": 1, "fork": 1, "budget": 1, "swapon": 2, "swapoff": 2,
}  # fmt: skip


class Program:
    """Arrays cut into pieces, and what may be done to them. Any thread may take any piece whose lock is free."""

    def __init__(self, seed: int, size: int, seconds: float, directory: str) -> None:
        self.seed = seed
        self.end = time.monotonic() + seconds
        self.directory = directory
        self.pool: Pool | None = None
        if "userswap" in sys.modules:
            from userswap import pool

            if pool._installed:
                self.pool = pool._installed[-1].pool
        rng = random.Random(seed)
        self.arrays: list[list[Piece]] = []
        while size > 0:
            length = min(int(2 ** rng.uniform(18, 26)) + rng.randrange(8), max(size, 1 << 18))
            self.arrays.append(cut(np.zeros(length, np.uint8), f"array {len(self.arrays)}", rng))
            size -= length
        self.locks = [threading.Lock() for _ in self.arrays]
        self.failures: list[str] = []
        self.done: Counter[str] = Counter()
        self.checked = 0

    # ---- what may be done; each takes the locks it needs and no more ----

    def take(self, rng: random.Random) -> Piece:
        """Return a piece that nobody has; the caller has its lock then."""
        while True:
            piece = rng.choice(rng.choice(self.arrays))
            if piece.lock.acquire(blocking=False):
                return piece
            time.sleep(0)

    def one(self, rng: random.Random, work: Callable[[Piece], Any]) -> None:
        """Do something to one piece."""
        piece = self.take(rng)
        try:
            work(piece)
        finally:
            piece.lock.release()

    def check(self, rng: random.Random) -> None:
        """Compare a piece with what must be in it."""
        self.one(rng, lambda piece: self.count(piece.check()))

    def count(self, length: int) -> None:
        """Count what was compared."""
        self.checked += length

    def write(self, rng: random.Random) -> None:
        """Fill a piece."""
        self.one(rng, lambda piece: piece.write(rng))

    def poke(self, rng: random.Random) -> None:
        """Write single bytes, of many pieces."""
        for _ in range(8):
            self.one(rng, lambda piece: piece.poke(rng))

    def peek(self, rng: random.Random) -> None:
        """Read single bytes, of many pieces."""
        for _ in range(32):
            self.one(rng, lambda piece: piece.peek(rng))

    def scan(self, rng: random.Random, work: Callable[[Piece], Any] | None = None) -> None:
        """Go over an array from one end to the other; who is at a piece is passed over."""
        pieces = rng.choice(self.arrays)
        for piece in pieces if rng.random() < 0.8 else pieces[::-1]:
            if time.monotonic() > self.end or self.failures:
                return
            if piece.lock.acquire(blocking=False):
                try:
                    if work is not None:
                        work(piece)
                    else:
                        self.count(piece.check())
                finally:
                    piece.lock.release()

    def update(self, rng: random.Random) -> None:
        """Add to everything in an array."""
        self.scan(rng, lambda piece: piece.add(rng.randrange(256)))

    def copy(self, rng: random.Random) -> None:
        """Copy a piece into another one of the same length or longer, memory to memory."""
        source = self.take(rng)
        try:
            target = self.take(rng)
            try:
                if len(target.memory) == len(source.memory):
                    target.memory[:] = source.memory
                    target.kind, target.seed, target.added = source.kind, source.seed, source.added
                    target.pokes = dict(source.pokes)
                else:
                    target.check(np.copy(target.memory), "copied")
            finally:
                target.lock.release()
        finally:
            source.lock.release()

    def file(self, rng: random.Random) -> None:
        """Write a piece to a file, read another content from there into it."""
        piece = self.take(rng)
        try:
            way = rng.randrange(4)
            with tempfile.TemporaryFile(dir=self.directory, buffering=rng.choice((0, -1))) as file:
                if way == 0:
                    piece.memory.tofile(file)
                elif way == 1:
                    written = 0
                    while written < len(piece.memory):
                        written += os.pwrite(file.fileno(), piece.memory[written:].data, written)
                elif way == 2:
                    half = len(piece.memory) // 2
                    os.writev(file.fileno(), [piece.memory[:half].data, piece.memory[half:].data])
                else:
                    file.write(piece.memory.data)
                file.flush()
                size = os.fstat(file.fileno()).st_size
                self.count(piece.check(np.frombuffer(os.pread(file.fileno(), size, 0), np.uint8), "in a file"))
                piece.draw(rng)
                file.seek(0)
                file.write(piece.expected().tobytes())
                file.flush()
                file.seek(0)
                if way == 0:
                    got = 0
                    while got < len(piece.memory):
                        got += file.readinto(piece.memory[got:].data)  # type: ignore[attr-defined]
                elif way == 1:
                    got = os.preadv(file.fileno(), [piece.memory[:1].data, piece.memory[1:].data], 0)
                else:
                    piece.memory[:] = np.fromfile(file, np.uint8)
        finally:
            piece.lock.release()

    def pipe(self, rng: random.Random) -> None:
        """Send a piece through a socket into another piece of memory."""
        piece = self.take(rng)
        try:
            left, right = socket.socketpair()
            with left, right:
                sender = threading.Thread(target=left.sendall, args=(piece.memory.data,))
                sender.start()
                target = np.empty(len(piece.memory), np.uint8)
                got = 0
                while got < len(target):
                    got += right.recv_into(target[got:].data)
                sender.join()
            self.count(piece.check(target, "through a socket"))
        finally:
            piece.lock.release()

    def renew(self, rng: random.Random) -> None:
        """Free an array and make another one in its place."""
        index = rng.randrange(len(self.arrays))
        if not self.locks[index].acquire(blocking=False):
            return
        held = []
        try:
            pieces = self.arrays[index]
            for piece in pieces:
                piece.lock.acquire()
                held.append(piece)
                if rng.random() < 0.2:
                    self.count(piece.check())
            length = max(1 << 18, sum(len(piece.memory) for piece in pieces) + rng.randrange(-MIB, MIB))
            # Whoever waits for one of the old pieces finds the old array whole: it is freed with the last of them.
            self.arrays[index] = cut(np.zeros(length, np.uint8), f"array {index}", rng)
        finally:
            for piece in held:
                piece.lock.release()
            self.locks[index].release()

    def grow(self, rng: random.Random) -> None:
        """Python's own large bytes, resized and copied about."""
        text = bytearray()
        parts = []
        for _ in range(rng.randrange(2, 9)):
            part = bytes_of(rng.choice(("noise", "walk", "text")), rng.randrange(1 << 48), rng.randrange(1, 2 * MIB))
            parts.append(part)
            text += part.tobytes()
        if rng.random() < 0.5:
            last = rng.randrange(len(text) // 2, len(text))
            del text[last:]
        expected = np.concatenate(parts)[: len(text)]
        if not np.array_equal(np.frombuffer(text, np.uint8), expected) or bytes(text) != expected.tobytes():
            raise WrongByte(f"a bytearray of {len(text)} bytes that grew holds something else")
        self.count(2 * len(text))

    def snapshot(self, rng: random.Random) -> None:
        """A snapshot of an array, which stays as it was while the array changes."""
        if self.pool is None:
            return
        pieces = rng.choice(self.arrays)
        held = [piece for piece in pieces if piece.lock.acquire(blocking=False)]
        try:
            whole: Memory = pieces[0].memory.base  # type: ignore[assignment]
            if held and self.pool.owns(whole):
                start = whole.__array_interface__["data"][0]
                copy = self.pool.snapshot(whole)
                then = []
                for piece in held:
                    at = piece.memory.__array_interface__["data"][0] - start
                    then.append(piece.like(copy[at : at + len(piece.memory)], f"snapshot of {piece.name}"))
                for piece in held:
                    if rng.random() < 0.3:
                        piece.add(1)
                for piece in then:
                    if rng.random() < 0.5:
                        piece.add(3)
                    self.count(piece.check())
                for piece in held:
                    self.count(piece.check())
        finally:
            for piece in held:
                piece.lock.release()

    def evict(self, rng: random.Random) -> None:
        """Push out, on to the swap file, give back."""
        if self.pool is not None:
            way = rng.randrange(3)
            if way == 0:
                self.pool.evict(rng.choice((1 << 16, MIB, 32 * MIB)))
            elif way == 1:
                with suppress(OSError):  # there is no swap file, or it is full: that is this round's setting
                    self.pool.writeback(rng.choice((1 << 16, MIB, 32 * MIB)))
            else:
                self.pool._core.compact()

    def budget(self, rng: random.Random) -> None:
        """Another budget, while everything goes on."""
        if self.pool is not None:
            self.pool.ram = rng.randrange(24, 160) * MIB

    def swapon(self, rng: random.Random) -> None:
        """A swap file more, of some priority, maybe in a tier with others."""
        if self.pool is not None and not self.pool._bound and len(self.pool.swaps()) < 6:
            from userswap.errors import SwapPathError

            # Its name may be in use just now, as another thread's; or all numbers are, of a family of processes.
            with suppress(SwapPathError):
                size, priority = rng.choice((8, 64, 1024)), rng.choice((-1, 0, 1, 2))
                self.pool.swapon(f"{self.directory}/more-{self.seed}-{rng.randrange(8)}:{size}M:{priority}")

    def swapoff(self, rng: random.Random) -> None:
        """One of the swap files less, if what is in it has room elsewhere; or tried, and given up in the middle."""
        if self.pool is None or self.pool._bound:
            return
        from userswap.errors import SwapOffError, SwapPathError

        class Enough(Exception):  # noqa: N818 - no error
            pass

        def stop(done: int, total: int) -> None:
            if patience < done / max(total, 1) < 1:
                raise Enough

        files = self.pool.swaps()
        patience = rng.choice((1.0, 1.0, 0.3))
        # The first ones of a round are left, as otherwise there is nowhere to go; but for now and then.
        files = [file for file in files if "/more-" in file.name or rng.random() < 0.05]
        if files:
            with suppress(SwapOffError, SwapPathError, Enough):
                self.pool.swapoff(rng.choice(files).name, stop)

    def pin(self, rng: random.Random) -> None:
        """A raw system call on a pinned piece."""
        if self.pool is None or SYS_WRITE is None:
            return
        import userswap

        piece = self.take(rng)
        try:
            with userswap.pin(piece.memory), tempfile.TemporaryFile(dir=self.directory, buffering=0) as file:
                start, length = piece.memory.__array_interface__["data"][0], len(piece.memory)
                if raw_write(file.fileno(), start, length) != length:
                    raise WrongByte(f"{piece.name} is pinned, and the kernel could not read it")
                self.count(piece.check(np.frombuffer(os.pread(file.fileno(), length, 0), np.uint8), "written raw"))
        finally:
            piece.lock.release()

    def fork(self, rng: random.Random) -> None:
        """A child that has memory as it was, changes its own, and may be killed in the middle of it."""
        held: list[Piece] = []
        for pieces in rng.sample(self.arrays, min(len(self.arrays), 3)):
            held += [piece for piece in pieces if rng.random() < 0.5 and piece.lock.acquire(blocking=False)]
        seed, killed = rng.randrange(1 << 48), rng.random() < 0.3
        child = os.fork()
        if child == 0:
            # Only what this thread holds, nothing that takes a lock: the other threads are gone, with theirs.
            os._exit(self.as_child(held, random.Random(seed)))
        for piece in held:
            if rng.random() < 0.5:
                piece.add(5)
            piece.lock.release()
        if killed:
            time.sleep(rng.random() * 0.2)
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if status != (signal.SIGKILL if killed else 0) and not (killed and status == 0):
            raise WrongByte(f"a forked child ended with status {status}")

    def as_child(self, held: list[Piece], rng: random.Random, depth: int = 0) -> int:
        """What a child does; its exit status."""
        try:
            for piece in held:
                piece.check()
                way = rng.randrange(3)
                if way == 0:
                    piece.add(rng.randrange(256))
                elif way == 1:
                    piece.write(rng)
            if depth < 2 and rng.random() < 0.3:
                seed = rng.randrange(1 << 48)
                child = os.fork()
                if child == 0:
                    os._exit(self.as_child(held, random.Random(seed), depth + 1))
                for piece in held:
                    piece.poke(rng)
                if os.waitpid(child, 0)[1]:
                    return 4
            for piece in held:
                piece.check()
        except BaseException:
            os.write(2, traceback.format_exc().encode())
            return 3
        return 0

    # ---- the whole ----

    def work(self, number: int) -> None:
        """One thread: things drawn one after the other until the time is over."""
        rng = random.Random(self.seed * 64 + number)
        names, weights = list(WEIGHTS), list(WEIGHTS.values())
        try:
            while time.monotonic() < self.end and not self.failures:
                name = rng.choices(names, weights)[0]
                getattr(self, name)(rng)
                self.done[name] += 1
        except BaseException:
            self.failures.append(f"thread {number}:\n{traceback.format_exc()}")

    def run(self, threads: int) -> None:
        """Threads, until the time is over; then everything is compared once more."""
        started = [threading.Thread(target=self.work, args=(number,)) for number in range(threads)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
        for pieces in self.arrays:
            for piece in pieces:
                if not self.failures:
                    self.count(piece.check())
        if self.pool is not None and not self.failures:
            found = self.pool._core.check()
            if found["wrong"]:
                self.failures.append(f"words, counts and sums don't agree: {found}")


def raw_write(descriptor: int, start: int, length: int) -> int:
    """write(2) as no wrapper sees it; the bytes written, less if the kernel can't read them."""
    done = 0
    while done < length:
        got = raw_syscall(SYS_WRITE, descriptor, ctypes.c_void_p(start + done), ctypes.c_size_t(length - done))
        if got <= 0:
            break
        done += got
    return done


SYS_WRITE = {"x86_64": 1, "aarch64": 64}.get(os.uname().machine)
raw_syscall = ctypes.CDLL(None, use_errno=True).syscall
raw_syscall.restype = ctypes.c_long


def main() -> int:
    """Run it as the command line says; print what was done as one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--size", type=int, default=256, help="MiB of arrays")
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--threads", type=int, default=3)
    parser.add_argument("--directory", default="/var/tmp", help="for its files")
    parser.add_argument("--without", default="", help="what not to do: names of WEIGHTS with commas between")
    options = parser.parse_args()
    for name in filter(None, options.without.split(",")):
        del WEIGHTS[name]
    # Whoever waits for the program sends this when it takes too long.
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    program = Program(options.seed, options.size * MIB, options.seconds, options.directory)
    program.run(options.threads)
    for failure in program.failures:
        print(failure, file=sys.stderr)
    print(json.dumps({"checked": program.checked, "done": dict(program.done)}))
    return 1 if program.failures else 0


if __name__ == "__main__":
    sys.exit(main())
