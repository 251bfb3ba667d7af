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
from userswap.bench.contenders import GUESS, IN_PLACE, Contender, plan
from userswap.bench.kernelswap import Pool, Swap
from userswap.bench.workloads import Run, Spec, anonymous
from userswap.errors import BenchError, UserswapError

__all__ = ["WITHIN", "Expected", "NotPossible", "Runner", "Seen", "Stop", "Stopped", "alone", "warm"]

WITHIN = 0.03
"""How far from T the memory of a run may be before its limit is corrected and it is repeated."""
CORRECTIONS = 3
LOOK_SECONDS = 0.02
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

    result: Any
    base: int
    """Bytes that the process has before there are arrays."""
    used: int
    """Most that it has beside these: a little more than the arrays of its work."""


@dataclass
class Seen:
    """What was seen of a process."""

    run: Run
    used: int
    """Most bytes at once beside those that it had before there were arrays: in place, compressed, page cache."""
    pool: Pool
    """The kernel's compressed pool at that moment."""
    limit: int
    """Of the cgroup; 0: none."""
    least: bool = False
    """Whether the limit is as low as it may be."""
    corrections: int = 0
    """Other runs, which were farther off the memory that it should have, and are not counted."""
    killed: int = 0
    """Other runs that the kernel killed for want of memory."""
    lifted: int = 0
    """Times that it found no memory, although there was swap, and went on because the limit was lifted for a moment."""


@dataclass
class Runner:
    """Runs programs under contenders, and learns how far the kernel compresses them."""

    directory: Path
    """Where swap files are made."""
    stop: Stop
    ratios: dict[str, float] = field(default_factory=dict)
    """Compressed by plain bytes, by contender and workload, and by contender alone."""
    totals: dict[str, int] = field(default_factory=dict)
    """What to divide so that T is used, by contender and workload."""

    def attempt(self, contender: Contender, spec: Spec, expected: Expected | None) -> Seen:
        """Run a program once, with its limit corrected until it has the memory that it should have.

        Raises:
            NotPossible: it can't be done.
            BenchError: the result was wrong.
            Stopped: a signal came.
        """
        like = f"{contender.name} {spec.data}"
        key = f"{like} {spec.workload}"
        killed = 0
        tried: list[tuple[int, float, int, Seen]] = []
        while True:
            ratio = self.ratios.get(key, self.ratios.get(like, GUESS))
            total = self.totals.get(key, spec.ram)
            try:
                seen = self.once(contender, spec, expected, ratio, total)
            except Killed as error:
                # Under the kernel's swap that is so at times: counted and shown, not passed over.
                killed += 1
                if killed == MOST_KILLED or not contender.kernel:
                    raise NotPossible(f"{error}{f', {killed} times' if killed > 1 else ''}") from None
                continue
            if expected is not None and seen.run.result != expected.result:
                raise BenchError(f"The result of {spec.workload} under {contender.name} is wrong: please report this.")
            off = abs(seen.used - spec.ram)
            tried.append((off, ratio, total, seen))
            if not contender.pool or off <= WITHIN * spec.ram or seen.pool.holds == 0 or len(tried) > CORRECTIONS:
                break
            better = seen.pool.used / seen.pool.holds
            if abs(better - ratio) > WITHIN * ratio:
                self.ratios[key] = self.ratios[like] = better
            elif seen.used < spec.ram or not seen.least:
                # The ratio is right and the total isn't: the program needs more, or less, than was thought.
                self.totals[key] = total + spec.ram - seen.used
            else:
                break  # no less is possible
        # What came nearest counts, and later rounds begin there.
        _, ratio, self.totals[key], seen = min(tried, key=lambda one: one[0])
        self.ratios[key] = ratio
        seen.corrections, seen.killed = len(tried) - 1, killed
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
            limit = 0
            if contender.limited:
                assert cgroup is not None and expected is not None
                limit = divided.limit + expected.base
                cgroup.limit(limit)
            spec = replace(spec, usage=str(cgroup.usage_file) if cgroup else "")
            watched = Watched(cgroup, swap, limit, pool_is_charged=charged)
            run = self.process(spec, watched)
            least = divided.limit <= total // IN_PLACE
            return Seen(run, watched.most - run.base, watched.pool, limit, least, lifted=watched.lifted)

    def process(self, spec: Spec, watched: "Watched") -> Run:
        """Run a process to its end."""
        command = [sys.executable, "-m", "userswap.bench.workloads", json.dumps(asdict(spec))]
        cgroup = watched.cgroup
        if cgroup is not None:
            # It joins before it is Python: what that maps and allocates is charged, too.
            command = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(cgroup.procs), *command]
        threads = {f"{name}_NUM_THREADS": "1" for name in ("OPENBLAS", "OMP", "MKL", "NUMEXPR")}
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True,
                env={**os.environ, **threads},
            )  # fmt: skip
            try:
                self.wait(process, watched, max(MOST_SECONDS, SECONDS_BY_BYTE * spec.size))
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
            if process.returncode:
                if cgroup is not None and cgroup.killed():
                    raise Killed("the kernel killed it, out of memory")
                err.seek(0)
                said = err.read().strip().rpartition("\n")[2] or f"exit code {process.returncode}"
                raise NotPossible(f"it failed: {said}")
            if cgroup is not None:
                watched.most = max(watched.most, cgroup.peak())
            out.seek(0)
            return Run(**json.load(out))

    def wait(self, process: subprocess.Popen[bytes], watched: "Watched", most: float) -> None:
        """Wait for a process, `most` seconds, and look at its memory meanwhile."""
        began = time.monotonic()
        ended = os.pidfd_open(process.pid)
        try:
            while not select.select([ended], [], [], LOOK_SECONDS)[0]:
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
    """The memory of a process: what its cgroup uses, or else it itself, and what the kernel has compressed."""

    cgroup: Cgroup | None
    swap: Swap
    limit: int
    pool_is_charged: bool
    """Whether what the cgroup uses has the pool in it."""
    most: int = 0
    lifted: int = 0
    pool: Pool = field(default_factory=lambda: Pool(0, 0))

    def look(self, pid: int) -> None:
        """Note what is in use, if it is more than before."""
        pool = self.swap.pool()
        used = self.cgroup.usage() if self.cgroup is not None else anonymous(pid)
        used += 0 if self.pool_is_charged else pool.used
        if used > self.most:
            self.most, self.pool = used, pool
        if self.cgroup is not None and self.limit and self.cgroup.let_go_on(self.limit):
            self.lifted += 1
