"""A table that several worker processes answer questions from: made before they are forked, so all share it. NumPy.

Each worker takes batches of keys from a pipe and sends back, for each, the sum of what the table has between the keys.
"""

import hashlib
import multiprocessing
from argparse import ArgumentParser
from multiprocessing.connection import Connection, wait

import numpy as np

WORKERS = 3
BATCH = 2000
BLOCK = 1024
WIDEST = 3000
ROWS_PER_BATCH = 600_000


class Table:
    """Ascending keys and the values that belong to them, with a directory of every 1024th key."""

    def __init__(self, rows: int, chance: np.random.Generator) -> None:
        self.keys = np.cumsum(chance.integers(1, 50, rows, dtype=np.int64))
        self.values = np.cumsum(chance.integers(-9, 10, rows, dtype=np.int64))
        self.directory = self.keys[::BLOCK].copy()

    def find(self, wanted: np.ndarray) -> list[int]:
        """Return for each wanted key how many keys are less."""
        blocks = (np.searchsorted(self.directory, wanted) - 1).clip(0) * BLOCK
        return [
            int(block + np.searchsorted(self.keys[block : block + BLOCK], key))
            for block, key in zip(blocks.tolist(), wanted.tolist(), strict=True)
        ]

    def answer(self, questions: np.ndarray) -> np.ndarray:
        """Return for each question, a range of keys, the sum of its values and the last of its keys."""
        begins, ends = self.find(questions[:, 0]), self.find(questions[:, 1])
        pairs = zip(begins, ends, strict=True)
        return np.array([(self.values[begin:end].sum(), self.keys[max(end - 1, 0)]) for begin, end in pairs])


def digest(array: np.ndarray) -> str:
    """Return a checksum of all of an array."""
    return hashlib.sha256(array.data).hexdigest()[:16]


def serve(table: Table, pipe: Connection) -> None:
    """A worker: answer until there are no more questions."""
    while (batch := pipe.recv()) is not None:
        number, questions = batch
        pipe.send((number, table.answer(questions)))


def main() -> None:
    """Print what came out, step by step."""
    parser = ArgumentParser()
    parser.add_argument("--rows", type=int, default=60_000_000)
    rows = parser.parse_args().rows
    batches = max(rows // ROWS_PER_BATCH, 1)
    chance = np.random.default_rng(6)
    table = Table(rows, chance)
    last = int(table.keys[-1])
    print(f"{rows:,} rows, keys up to {last:,}, values add up to {table.values.sum():,}", flush=True)

    context = multiprocessing.get_context("fork")
    pipes: list[Connection] = []
    workers = []
    for _ in range(WORKERS):
        mine, its = context.Pipe()
        worker = context.Process(target=serve, args=(table, its))
        worker.start()
        its.close()
        pipes.append(mine)
        workers.append(worker)
    print(f"{WORKERS} workers share the table", flush=True)

    # Most questions are about what lies near a place that wanders through the table; some are about anything.
    answers: dict[int, np.ndarray] = {}
    asked = 0

    def ask(pipe: Connection) -> None:
        nonlocal asked
        if asked == batches:
            pipe.send(None)
            return
        near = chance.normal(last * (asked + 0.5) / batches, last / 200, BATCH)
        far = chance.random(BATCH) * last
        first = np.where(chance.random(BATCH) < 0.98, near, far).clip(0, last).astype(np.int64)
        pipe.send((asked, np.stack([first, first + chance.integers(1, 50 * WIDEST, BATCH)], axis=1)))
        asked += 1

    for pipe in pipes:
        ask(pipe)
    waiting = list(pipes)
    while waiting:
        for ready in wait(waiting):
            pipe = next(one for one in waiting if one is ready)
            try:
                number, found = pipe.recv()
            except EOFError:
                waiting.remove(pipe)
                continue
            answers[number] = found
            ask(pipe)
    for worker in workers:
        worker.join()
    ended = sorted({worker.exitcode for worker in workers}, key=str)
    found = np.concatenate([answers[number] for number in range(batches)])
    print(f"{batches * BATCH:,} questions answered, workers ended with {ended}: {digest(found)}")
    # The table is what it was, whatever the workers did.
    print(f"keys {digest(table.keys)}, values {digest(table.values)}")


if __name__ == "__main__":
    main()
