"""Pieces of memory that know what must be in them: from a seed, not from a second copy. Knows nothing of userswap."""

import random
import threading
from dataclasses import dataclass, field

import numpy as np
from numpy.random import SFC64, Generator  # now: NumPy would import it at the first use, and that may be in a child
from numpy.typing import NDArray

Memory = NDArray[np.uint8]

__all__ = ["KINDS", "Memory", "Piece", "WrongByte", "bytes_of", "cut"]

# What memory is made of, from what can't be compressed to what takes no storage at all.
KINDS = ("noise", "walk", "small", "text", "constant", "zeros")
MOST_POKES = 64


class WrongByte(AssertionError):  # noqa: N818 - reads as what it is
    """Memory does not hold what was last written to it."""


def bytes_of(kind: str, seed: int, length: int) -> Memory:
    """Return the bytes that a kind and a seed stand for."""
    rng = Generator(SFC64(seed))
    if kind == "noise":
        return rng.integers(0, 256, length, np.uint8)
    if kind == "walk":
        made = np.cumsum(rng.integers(-3, 4, length // 8 + 1)).view(np.uint8)
    elif kind == "small":
        made = rng.integers(0, 1000, length // 4 + 1, np.int32).view(np.uint8)
    elif kind == "text":
        made = np.resize(rng.integers(97, 123, 700, np.uint8), length)
    elif kind == "constant":
        made = np.full(length // 8 + 1, seed, np.int64).view(np.uint8)
    else:
        made = np.zeros(length, np.uint8)
    return made[:length]


@dataclass(eq=False)
class Piece:
    """A part of an array: its memory, and what must be in it. Whoever touches either has the lock."""

    memory: Memory
    name: str
    lock: threading.Lock = field(default_factory=threading.Lock)
    kind: str = "zeros"
    seed: int = 0
    added: int = 0
    """What was added to every byte since."""
    pokes: dict[int, int] = field(default_factory=dict)
    """Single bytes that were written after that."""

    def expected(self) -> Memory:
        """Return what must be in it."""
        made = bytes_of(self.kind, self.seed, len(self.memory))
        if self.added:
            made += np.uint8(self.added & 255)
        for place, value in self.pokes.items():
            made[place] = value
        return made

    def check(self, found: Memory | None = None, where: str = "in memory") -> int:
        """Compare the memory, or what came out of it, with what must be there; return the bytes compared.

        Raises:
            WrongByte: it is something else.
        """
        found = self.memory if found is None else found
        expected = self.expected()
        if not np.array_equal(found, expected):
            places = np.flatnonzero(found != expected) if len(found) == len(expected) else np.arange(1)
            first, last = int(places[0]), int(places[-1])
            raise WrongByte(
                f"{self.name} ({self.kind}, seed {self.seed}, {self.added} added, {len(self.pokes)} pokes) {where}: "
                f"{len(places)} of {len(expected)} bytes are wrong, from {first} to {last}: "
                f"{bytes(found[first : first + 16]).hex()} where {bytes(expected[first : first + 16]).hex()} was put"
            )
        return len(expected)

    def write(self, rng: random.Random) -> None:
        """Fill it with something new."""
        self.draw(rng)
        self.memory[:] = self.expected()

    def draw(self, rng: random.Random) -> None:
        """Say that something new is in it: the caller puts it there."""
        self.kind, self.seed, self.added, self.pokes = rng.choice(KINDS), rng.randrange(1 << 48), 0, {}

    def add(self, number: int) -> None:
        """Add a number to every byte, in place."""
        self.memory += np.uint8(number & 255)
        self.added += number
        self.pokes = {place: value + number & 255 for place, value in self.pokes.items()}

    def poke(self, rng: random.Random) -> None:
        """Write single bytes here and there."""
        if len(self.pokes) >= MOST_POKES:
            self.check()
            self.write(rng)
        for _ in range(rng.randrange(1, 9)):
            place, value = rng.randrange(len(self.memory)), rng.randrange(256)
            self.memory[place] = value
            self.pokes[place] = value

    def peek(self, rng: random.Random) -> None:
        """Read single bytes; of those that were poked, as only they are known without making all of them."""
        for place in rng.sample(list(self.pokes), min(len(self.pokes), 8)):
            if self.memory[place] != self.pokes[place]:
                raise WrongByte(f"{self.name}: byte {place} is {self.memory[place]}, {self.pokes[place]} was written")

    def like(self, memory: Memory, name: str) -> "Piece":
        """Return a piece that must hold the same."""
        return Piece(memory, name, kind=self.kind, seed=self.seed, added=self.added, pokes=dict(self.pokes))


def cut(array: Memory, name: str, rng: random.Random) -> list[Piece]:
    """Cut an array into pieces of 1 byte to 2 MiB, at places that have nothing to do with pages or folios."""
    pieces, start = [], 0
    while start < len(array):
        length = min(int(2 ** rng.uniform(10, 21)), len(array) - start)
        pieces.append(Piece(array[start : start + length], f"{name}[{start}:{start + length}]"))
        start += length
    return pieces
