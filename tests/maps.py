"""What the tests of swap maps share: holders in a row, threads that start together, what a map may keep."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from userswap.lab.words32 import Map32
from userswap.swap.map import DEBUG, Map

Ids = npt.NDArray[np.uint64]
ALMOST_NOTHING = 64 << 10  # what a map that was used may keep beyond an empty one
CHAOS = int(os.environ.get("USERSWAP_CHAOS", "0")) if DEBUG else 0  # about every N-th transition is delayed; 0: none
# One thread alone needs 75 s for a quarter of a million ids when every third step is delayed.
PATIENCE = 600.0 if 0 < CHAOS < 20 else 120.0
LESS = 20 if CHAOS else 1  # with delays at transitions few rounds meet as often as many

# vswap's clusters: one of each order stays with a CPU that allocates from it, and no order takes room from another.
CLUSTER = 512 * 24
ORDERS = 6


def almost_nothing(design: str, slots: int = 0) -> int:
    """What a map may keep for good: Linux 6.3 its continuation pages, 8 for 4096 slots at most, until swapoff."""
    more = {"slot": (slots // 4096 + 1) * 8 * 4096, "vswap": ORDERS * CLUSTER * (os.cpu_count() or 1)}
    return ALMOST_NOTHING + more.get(design, 0)


def span(first: int, n: int) -> Ids:
    return np.arange(first, first + n, dtype=np.uint64)


def kind_of(word: int) -> int:
    return (word >> 3) & 7


def drop(swap_map: Map | Map32, holder: int) -> int:
    """Put the last reference and free the id; the entry that it had."""
    left, word = swap_map.put(holder)
    assert left == 0
    swap_map.free(holder)
    return word


def together(*work: Callable[[], Any]) -> list[Any]:
    """Run each in a thread of its own, all starting at once. What fails in one, or hangs, fails here."""
    results: list[Any] = [None] * len(work)
    failed: list[BaseException] = []
    start = threading.Barrier(len(work))

    def run(i: int) -> None:
        start.wait()
        try:
            results[i] = work[i]()
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive(), "a thread waits for a lock that nobody will give it"
    if failed:
        raise failed[0]
    return results


def alone(program: str) -> None:
    """Run a program about memory in a process of its own, without injected delays."""
    environment = os.environ | {"USERSWAP_CHAOS": "0"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    subprocess.run(command, check=True, timeout=PATIENCE, env=environment)
