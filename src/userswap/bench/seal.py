"""What sealing and encrypting a folio costs, beside what writing it to a swap file and reading it does."""

import contextlib
import fcntl
import mmap
import os
import time
from dataclasses import dataclass
from pathlib import Path

from userswap.backends import cipher
from userswap.errors import BenchError
from userswap.native.sum import sum_speed, used
from userswap.swapfiles import default_places

__all__ = ["Cost", "measure"]

FOLIO = 1 << 16
PART = 1 << 14
BATCH = 1 << 20


@dataclass(frozen=True)
class Cost:
    """Nanoseconds of processor time (of a file: of the clock) for each folio of 64 KiB."""

    what: str
    ns: float

    @property
    def gb_per_second(self) -> float:
        """Bytes of folios for each nanosecond."""
        return FOLIO / self.ns


def measure(directory: str | None, megabytes: int, rounds: int) -> list[Cost]:
    """The least of `rounds`, taken in turn, of each step. Raises BenchError."""
    name = cipher.start()
    place = Path(directory) if directory else next((p for p in default_places() if p.is_dir()), Path("/var/tmp"))
    try:
        fd = os.open(place, os.O_TMPFILE | os.O_RDWR, 0o600)
    except OSError as error:
        raise BenchError(f"No file can be made in {place} ({error.strerror}): name a directory on a disk.") from None
    best: dict[str, float] = {}

    def note(what: str, ns: float) -> None:
        best[what] = min(ns, best.get(what, ns))

    try:
        # A file system without: then it is the page cache that is measured.
        with contextlib.suppress(OSError):
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
        with mmap.mmap(-1, BATCH) as buffer:
            buffer[:] = os.urandom(BATCH)
            for _ in range(rounds):
                note(f"sum ({used()})", 4 * sum_speed(PART, 4000))
                if name is not None:
                    encrypt, decrypt = cipher.speed(PART, 1000)
                    note(f"encrypt ({name})", 4 * encrypt)
                    note(f"decrypt ({name})", 4 * decrypt)
                folios = megabytes * 16
                for what, call in (("write to the file", os.pwritev), ("read from the file", os.preadv)):
                    started = time.perf_counter_ns()
                    for at in range(0, megabytes * BATCH, BATCH):
                        if call(fd, [buffer], at) != BATCH:
                            raise BenchError(f"{place} has no room for {megabytes} MiB: name another directory.")
                    note(what, (time.perf_counter_ns() - started) / folios)
    except OSError as error:
        raise BenchError(f"The file in {place} can't be used ({error.strerror}): name another directory.") from None
    finally:
        os.close(fd)
    return [Cost(what, ns) for what, ns in best.items()]
