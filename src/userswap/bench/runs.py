"""Running a program under a contender: a process in a cgroup of its own, with the memory that it should have, watched.

Everything that is set up for a run is taken down after it. Signals are heeded only where that can be done.
"""

import fcntl
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from userswap.bench.cgroup import Cgroup, new_cgroup
from userswap.bench.contenders import GUESS, Contender, plan
from userswap.bench.kernelswap import Pool, Swap
from userswap.bench.workloads import ARRAYS, CLOCK, DONE, Run, Spec
from userswap.errors import BenchError, UserswapError
from userswap.lab import machine

__all__ = ["WITHIN", "Expected", "NotPossible", "Runner", "Seen", "Stop", "Stopped", "alone", "warm"]

WITHIN = 0.05
"""How far from T the memory of a run may be before that is said."""
FAR = 0.1
"""And how far above T before the run is repeated."""
CORRECTIONS = 1
LOOK_SECONDS = 0.01
STEP = 64
"""A limit that follows the pool is changed by no less than one in so many bytes of T."""
LOOKS = 10
"""After so many it is raised, if less than T was used in all that time."""
LEAST = 8
"""Where the limit follows the pool, one in so many bytes of T stays in place."""
MOST_SECONDS = 30.0
"""After that a run with little memory is given up; with more it has more, in proportion."""
SECONDS_BY_BYTE = 90 / (1 << 30)
MOST_KILLED = 3
"""Times that the kernel may kill a contender for want of memory before it is given up."""
MOST_LIFTED = 250
LOCK = Path("/run/userswap-bench.lock")


class Stopped(UserswapError):  # noqa: N818 - reads as what it is
    """A signal asked for the end."""


class Stop:
    """Ctrl-C and its like, for the time of a `with` block: noted, and heeded where everything can be taken down."""

    def __init__(self) -> None:
        self.asked = False

    def __enter__(self) -> "Stop":
        if threading.current_thread() is threading.main_thread():
            signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
            self.before = {number: signal.signal(number, self.note) for number in signals}
        else:
            self.before = {}
        return self

    def __exit__(self, *ignored: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def note(self, *ignored: object) -> None:
        """Remember that a signal came."""
        self.asked = True

    def heed(self) -> None:
        """Raise Stopped if a signal came."""
        if self.asked:
            raise Stopped("Stopped.")


@contextmanager
def alone(stop: Stop) -> Iterator[None]:
    """Wait until no other comparison uses the kernel's swap. Only root does, so only root waits."""
    if os.geteuid() != 0:
        yield
        return
    with LOCK.open("ab") as file:
        waiting = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    print("Waiting for another userswap bench to end.", file=sys.stderr)
                    waiting = True
                stop.heed()
                time.sleep(0.2)
        yield


class NotPossible(BenchError):  # noqa: N818 - reads as what it is
    """A contender that can't do this; the others go on."""


class Killed(NotPossible):
    """The kernel killed a process because its cgroup was out of memory."""


@dataclass
class Expected:
    """What the first run, in ordinary memory, says of all others of a case."""

    results: dict[str, Any]
    """What comes out, by the units that were done."""
    units: int
    """Most that others do."""
    used: int
    """Most bytes that it has beside those that it had before there were arrays: a little more than its arrays."""


@dataclass
class Seen:
    """What was seen of a process."""

    run: Run
    used: int
    """Most bytes at once while the clock ran, beside those that it had before there were arrays: in place, compressed,
    page cache."""
    pool: Pool
    """The kernel's compressed pool at that moment."""
    largest: Pool
    """And when it was largest."""
    limit: int
    """Of the cgroup, at the end; 0: none."""
    corrections: int = 0
    """Other runs, which were farther off the memory that it should have, and are not counted."""
    killed: int = 0
    """Other runs that the kernel killed for want of memory."""
    lifted: int = 0
    """Times that it found no memory, although there was swap, and went on because the limit was lifted for a moment."""
    capped: bool = False
    """Whether the pool was held below the least limit that the kernel knows."""
    took: float = 0.0
    """Seconds that all of it took, corrections too."""


@dataclass
class Runner:
    """Runs programs under contenders, and learns how far the kernel compresses them."""

    directory: Path
    """Where swap files are made."""
    stop: Stop
    ratios: dict[str, float] = field(default_factory=dict)
    """Compressed by plain bytes, by contender and workload, and by contender alone."""
    totals: dict[str, int] = field(default_factory=dict)
    """What to give it so that it has T, by contender and workload; what did not come nearer is not tried again."""

    def attempt(self, contender: Contender, spec: Spec, expected: Expected | None) -> Seen:
        """Run a program once; if it had another total of memory than it should have, once more with that corrected.

        Raises:
            NotPossible: it can't be done.
            BenchError: the result was wrong.
            Stopped: a signal came.
        """
        began = time.monotonic()
        like = f"{contender.name} {spec.data}"
        key = f"{like} {spec.workload} {spec.size} {spec.threads}"
        killed = 0
        tried: list[tuple[int, int, Seen]] = []
        corrections = 0 if key in self.totals or not contender.held else CORRECTIONS
        while True:
            total = self.totals.get(key, spec.ram)
            try:
                seen = self.once(contender, spec, expected, self.ratios.get(key, self.ratios.get(like, GUESS)), total)
            except Killed as error:
                # Under the kernel's swap that is so at times: counted and shown, not passed over.
                killed += 1
                if killed == MOST_KILLED or not contender.kernel:
                    raise NotPossible(f"{error}{f', {killed} times' if killed > 1 else ''}") from None
                continue
            except NotPossible:
                if tried and contender.kernel:
                    break  # what was seen before is farther off, but right
                raise
            if expected is not None and seen.run.result != expected.results[str(seen.run.units)]:
                raise BenchError(f"The result of {spec.workload} under {contender.name} is wrong: please report this.")
            if seen.largest.holds:
                self.ratios[key] = self.ratios[like] = seen.largest.used / seen.largest.holds
            more = seen.used - spec.ram
            tried.append((abs(more), total, seen))
            if more <= FAR * spec.ram or len(tried) > corrections:
                break
            self.totals[key] = max(total - more, spec.ram // 2)
        # What came nearest counts, and later rounds begin there.
        _, self.totals[key], seen = min(tried, key=lambda one: one[0])
        seen.corrections, seen.killed, seen.took = len(tried) - 1, killed, time.monotonic() - began
        return seen

    def once(self, contender: Contender, spec: Spec, expected: Expected | None, ratio: float, total: int) -> Seen:
        """Set everything up for a total of memory, run a process, and take everything down again."""
        with ExitStack() as stack:
            cgroup = None
            try:
                cgroup = stack.enter_context(new_cgroup())
            except BenchError as error:
                if contender.limited:
                    raise NotPossible(str(error)) from None
            charged = cgroup is not None and cgroup.charges_zswap and contender.kernel == "zswap"
            needs = expected.used if expected is not None else spec.size
            divided = plan(contender, total, needs, ratio, self.directory, charged=charged)
            try:
                swap = stack.enter_context(contender.swap(divided))
            except BenchError as error:
                raise NotPossible(str(error)) from None
            watched = Watched(
                cgroup, swap, total if contender.limited else 0, pool_is_charged=charged,
                follows=divided.beside,
            )  # fmt: skip
            run = self.process(replace(spec, ram=total) if contender.memory == "userswap" else spec, watched)
            return Seen(
                run,
                watched.most,
                watched.pool,
                watched.largest,
                watched.limit,
                lifted=watched.lifted,
                capped=contender.kernel == "zswap" and divided.most > 0,
            )

    def process(self, spec: Spec, watched: "Watched") -> Run:
        """Run a process to its end."""
        hear, tell = os.pipe()
        go, let = os.pipe()
        spec = replace(spec, tell=tell, go=go)
        command = [sys.executable, "-m", "userswap.bench.workloads", json.dumps(asdict(spec))]
        cgroup = watched.cgroup
        if cgroup is not None:
            command = cgroup.entering(command)
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "OMP", "MKL", "NUMEXPR")}
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            try:
                process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
                    env={**os.environ, **threads}, pass_fds=(tell, go),
                )  # fmt: skip
                try:
                    self.wait(process, watched, hear, let, max(MOST_SECONDS, SECONDS_BY_BYTE * spec.size))
                finally:
                    if process.poll() is None:
                        process.kill()
                    process.wait()
            finally:
                for fd in (hear, tell, go, let):
                    os.close(fd)
            if process.returncode:
                if cgroup is not None and cgroup.killed():
                    raise Killed("the kernel killed it, out of memory")
                err.seek(0)
                said = err.read().strip().rpartition("\n")[2] or f"exit code {process.returncode}"
                raise NotPossible(f"it failed: {said}")
            out.seek(0)
            return Run(**json.load(out))

    def wait(self, process: subprocess.Popen[bytes], watched: "Watched", hear: int, let: int, most: float) -> None:
        """Wait for a process, `most` seconds; look at its memory meanwhile, and hear how far it is."""
        began = time.monotonic()
        ended = os.pidfd_open(process.pid)
        try:
            while ended not in (ready := select.select([ended, hear], [], [], LOOK_SECONDS)[0]):
                if hear in ready:
                    watched.hear(os.read(hear, 1), process.pid)
                    os.write(let, b".")
                watched.look(process.pid)
                self.stop.heed()
                if watched.lifted > MOST_LIFTED:
                    raise NotPossible("it found no memory, over and over")
                if time.monotonic() - began > most:
                    raise NotPossible(f"it was not done after {most:.0f} seconds")
        finally:
            os.close(ended)


def warm(packages: Sequence[str]) -> None:
    """Have the files of packages in the page cache, so that no cgroup of ours is charged for them."""
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    subprocess.run([sys.executable, "-c", code, *packages], capture_output=True, check=False, start_new_session=True)


@dataclass
class Watched:
    """The memory of a process: what its cgroup uses, or else it itself, and what the kernel has compressed.

    It is limited from the moment when it makes arrays until the clock has stopped; what it has before is not counted.
    Where the kernel compresses beside the limit, the limit follows the pool: both together are the total.
    """

    cgroup: Cgroup | None
    swap: Swap
    total: int
    """Bytes for arrays; 0: no limit."""
    pool_is_charged: bool = False
    """Whether what the cgroup uses has the pool in it."""
    follows: int = 0
    """Bytes of `total` that are left to the pool at first, from where the limit follows it; 0: it does not."""
    base: int = 0
    """Bytes that the process had before there were arrays."""
    limit: int = 0
    """Of the cgroup now; 0: none."""
    timed: bool = False
    """Whether the clock runs."""
    most: int = 0
    """Most at once while it did, without `base`."""
    lifted: int = 0
    lately: int = 0
    """Most at once since the limit was last reconsidered, so many looks ago."""
    looks: int = 0
    pool: Pool = field(default_factory=lambda: Pool(0, 0))
    """When `most` was reached."""
    largest: Pool = field(default_factory=lambda: Pool(0, 0))

    def hear(self, what: bytes, pid: int) -> None:
        """Do what is to be done when the process is so far."""
        if what == ARRAYS:
            self.base = self.used(pid)
            if self.cgroup is not None and self.total:
                self.limit = self.base + self.total - self.follows
                self.cgroup.limit(self.limit)
        elif what == CLOCK:
            self.timed = True
            if self.cgroup is not None:
                self.cgroup.forget_peak()
        elif what == DONE:
            self.look(pid)
            if self.cgroup is not None and not self.follows:
                self.most = max(self.most, self.cgroup.peak() - self.base)
            self.timed = False
            if self.limit and self.cgroup is not None:
                # What came out is looked at with all the memory there is: that takes no time that counts.
                self.cgroup.unlimit()
                self.total = 0

    def used(self, pid: int) -> int:
        """Bytes that the process uses now, without a pool that is beside the limit."""
        return self.cgroup.usage() if self.cgroup is not None else anonymous(pid)

    def look(self, pid: int) -> None:
        """Note what is in use, if it is more than before, and have the limit follow the pool."""
        self.swap.keep()
        pool = self.swap.pool()
        used = self.used(pid) - self.base + (0 if self.pool_is_charged else pool.used)
        if self.timed and used > self.most:
            self.most, self.pool = used, pool
        if pool.used > self.largest.used:
            self.largest = pool
        if self.cgroup is None or not self.limit or not self.total:
            return
        if self.follows:
            self.follow(pool.used, used)
        if self.cgroup.let_go_on(self.limit):
            self.lifted += 1

    def follow(self, pool: int, used: int) -> None:
        """Have less in place at once when the total is too much, and more when it was too little for a while."""
        assert self.cgroup is not None
        self.lately = max(self.lately, used)
        self.looks += 1
        wanted = self.limit
        if used > self.total:
            wanted = min(self.base + max(self.total - pool, self.total // LEAST), self.limit)
        elif self.looks >= LOOKS:
            # In small steps: a pool that shrank grows again faster than the kernel takes back what is in place.
            wanted += min((self.total - self.lately) // 2, self.total // STEP * 2)
        if self.looks >= LOOKS:
            self.lately = self.looks = 0
        if abs(wanted - self.limit) >= self.total // STEP and self.cgroup.try_limit(wanted):
            self.limit = wanted


def anonymous(pid: int) -> int:
    """Bytes of anonymous memory that a process has in place; 0 once it has ended."""
    try:
        return int((machine.field(f"/proc/{pid}/status", "RssAnon") or "0 kB").split()[0]) << 10
    except (FileNotFoundError, ProcessLookupError):
        return 0
