"""Programs that fit into memory, for `userswap bench overhead`: run as a file, with and without userswap.

Ordinary programs: nothing here knows of userswap. Each works on about so many bytes of arrays, and says at the end, as
JSON, what came out, how long the work took and how much memory the process had at most, page tables included.
"""

import json
import resource
import sys
import time
from collections.abc import Callable

MIB = 1 << 20


def scan(size: int) -> float:
    """One array: filled, read and changed over and over."""
    import numpy as np

    array = np.empty(size // 8)
    array[:] = 1.5
    total = 0.0
    for _ in range(4):
        total += float(array.sum())
        array += 0.5
    return total


def matrix(size: int) -> float:
    """Products of matrices, which fit a few times into the size."""
    import numpy as np

    n = min(1600, int((size // 64) ** 0.5))
    one = np.arange(n * n, dtype=float).reshape(n, n) % 17
    for _ in range(4):
        one = (one @ one) % 17
    return float(one.sum())


def sort(size: int) -> float:
    """Random numbers, sorted in place and by index."""
    import numpy as np

    array = np.random.default_rng(1).random(size // 32)
    order = np.argsort(array[: len(array) // 4])
    array.sort()
    return float(array[::1000].sum() + order[::1000].sum())


def temporaries(size: int) -> float:
    """An expression of whole arrays, whose results come and go."""
    import numpy as np

    array = np.linspace(0, 1, size // 32)
    for _ in range(8):
        array = (array * 2 + 1) / 3
    return float(array.sum())


def churn(size: int) -> float:
    """Many arrays of 1 to 64 MiB, allocated, filled and freed."""
    import numpy as np

    rng = np.random.default_rng(1)
    live: list[np.ndarray] = []
    total = 0.0
    for i in range(min(400, size // (2 * MIB))):
        array = np.empty(int(2 ** rng.uniform(17, 23)))
        array[:] = i
        live.append(array)
        while sum(a.nbytes for a in live) > size // 2:
            total += float(live.pop(int(rng.integers(len(live))))[-1])
    return total


def groupby(size: int) -> float:
    """A data frame of pandas, grouped and joined."""
    import numpy as np
    import pandas as pd

    rng = np.random.default_rng(1)
    n = size // 128
    frame = pd.DataFrame({"key": rng.integers(0, 1000, n), "x": rng.random(n), "y": rng.random(n)})
    means = frame.groupby("key").mean().reset_index()
    joined = frame.merge(means, on="key")
    return float((joined["x_x"] - joined["x_y"]).abs().sum())


def growth(size: int) -> float:
    """A bytearray that grows by a MiB at a time, and its copy as bytes."""
    text = bytearray()
    piece = bytes(range(256)) * (MIB // 256)
    for _ in range(size // 4 // MIB):
        text += piece
    return float(sum(bytes(text)[:: MIB // 3]))


PROGRAMS: dict[str, Callable[[int], float]] = {
    "scan": scan, "matrix": matrix, "sort": sort, "temporaries": temporaries, "churn": churn, "groupby": groupby,
    "growth": growth,
}  # fmt: skip
"""By name."""


def memory() -> dict[str, int]:
    """Most bytes that were in place at once, and of page tables."""
    return {"peak": status("VmHWM"), "tables": status("VmPTE")}


def status(name: str) -> int:
    """Bytes that the kernel counts under this name."""
    with open("/proc/self/status") as file:  # noqa: PTH123 - as little as can be is imported here
        fields = dict(line.split(":", 1) for line in file)
    return int(fields[name].split()[0]) << 10


def main(name: str, size: int) -> None:
    """Run a program, and say how it was."""
    import numpy  # noqa: F401 - every program's; loading it is no part of the work

    if name == "groupby":
        import pandas  # noqa: F401
    at_first = {"anonymous": status("RssAnon"), "file": status("RssFile")}
    before = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    result = PROGRAMS[name](size)
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"result": result, "seconds": seconds, "cpu_seconds": cpu, **memory(), **at_first}))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
