"""What holds for every test, however the tests were started; and which may run at the same time (`make test`)."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling

# Started in the background of a shell they would ignore Ctrl-C, and so would every program that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)

# All tests of files that have the same word here run in one process, one after another.
TOGETHER = {
    # They set up the kernel's own swap, and look at what is left of that on the machine.
    "test_bench.py": "kernel's swap",
    "test_bench_devices.py": "kernel's swap",
    "test_lab.py": "lab",  # one comparison is what many of them look at
    "test_words32.py": "words32",  # the same
    "test_syscalls.py": "syscalls",  # their arena is in the place of the real one, from the first to the last of them
}


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Each process gets one test after another, and those files whole, first, as they take longest.

    Not by marks (xdist's loadgroup): with pytest 9.2 xdist 3.8 passes over them without a word."""
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):  # type: ignore[misc]  # xdist has no types
        def _split_scope(self, nodeid: str) -> str:
            return TOGETHER.get(nodeid.partition("::")[0].rpartition("/")[2], nodeid)

    return Scheduling(config, log)
