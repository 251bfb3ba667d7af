"""What figures have to be read with: the machine, the versions, and how busy it was."""

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from userswap.swap import map as swap_map

__all__ = ["Machine", "available", "busy", "machine"]


@dataclass(frozen=True)
class Machine:
    """Where and with what something was measured."""

    processor: str
    processors: int
    """Those that this process may run on."""
    memory_bytes: int
    kernel: str
    huge_pages: str
    load_before: float
    """Processes that wanted to run in the minute before."""
    python: str
    numpy: str
    userswap: str
    debug: bool
    """A build with assertions: its times mean nothing."""


def machine(version: str) -> Machine:
    """Look at this machine; `version` is userswap's own."""
    return Machine(
        processor=field("/proc/cpuinfo", "model name") or platform.machine(),
        processors=len(os.sched_getaffinity(0)),
        memory_bytes=kibibytes("MemTotal"),
        kernel=platform.release(),
        huge_pages=chosen(Path("/sys/kernel/mm/transparent_hugepage/enabled")),
        load_before=os.getloadavg()[0],
        python=platform.python_version(),
        numpy=np.__version__,
        userswap=version,
        debug=swap_map.DEBUG,
    )


def available() -> int:
    """Bytes of memory that can be used without swapping."""
    return kibibytes("MemAvailable")


def busy(seen: Machine) -> bool:
    """Say whether others wanted the processors when the measurement began."""
    return seen.load_before > seen.processors / 2


def kibibytes(name: str) -> int:
    return int((field("/proc/meminfo", name) or "0 kB").split()[0]) << 10


def field(path: str, name: str) -> str:
    """Return the first value of `name` in a file of lines "name: value", empty if there is none."""
    for line in Path(path).read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""


def chosen(path: Path) -> str:
    """Return the word in brackets, as the kernel marks what is chosen."""
    try:
        return path.read_text().partition("[")[2].partition("]")[0]
    except OSError:
        return "not there"
