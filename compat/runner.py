"""Runs a slice in a process of its own, plain or under userswap, sees when it crashes or hangs, and goes on behind."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from compat.compare import Outcome
from compat.suites import Slice

__all__ = ["MODES", "Run", "interpreter", "packages", "run_slice", "stopping"]

HERE = Path(__file__).resolve().parent
MODES = ("plain", "userswap")
# The least array that swapped memory is made for.
LEAST_ARRAY = "4K"
# Plain, no test takes a tenth of this; a few that need thrice the budget take minutes under userswap.
STUCK_SECONDS = 600.0
CRASHES_MOST = 25
COLLECTING = "<collecting>"
ENDING = "<end of the process>"
GIVEN_UP = "<too many crashes: the rest was not run>"


stopping = threading.Event()
"""Set when nothing more shall be run: what is under way ends with Stopped."""


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    """A slice was not run to its end, as somebody pressed Ctrl-C."""


@dataclass
class Run:
    """A slice, once, in one way: its tests in the order they ran, seconds, and userswap's figures."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    seconds: float = 0.0
    stats: dict[str, int] = field(default_factory=dict)


@dataclass
class Reading:
    """What an events file said so far."""

    path: Path
    told: Callable[[int], None]
    outcomes: dict[str, Outcome] = field(default_factory=dict)
    current: str | None = None
    collected: bool = False
    finish: dict[str, Any] | None = None
    read: int = 0
    rest: bytes = b""

    def update(self) -> bool:
        """Read what is new, and tell how many tests are over; return whether there was anything."""
        if not self.path.exists():
            return False
        with self.path.open("rb") as file:
            file.seek(self.read)
            fresh = file.read()
        self.read += len(fresh)
        *lines, self.rest = (self.rest + fresh).split(b"\n")
        for line in lines:
            event = json.loads(line)
            match event["event"]:
                case "start":
                    self.current = event["id"]
                case "end":
                    self.outcomes[event["id"]] = Outcome(event["outcome"], event["text"])
                    self.current = None
                case "collected":
                    self.collected = True
                case "finish":
                    self.finish = event
        self.told(len(self.outcomes))
        return bool(fresh)


def command(part: Slice, mode: str, python: Path, arguments: list[str]) -> list[str]:
    """Return the command line that runs the child."""
    child = [str(HERE / "child.py"), *arguments]
    if mode == "plain":
        return [str(python), *child]
    return [str(python), "-m", "userswap", "run", "--ram", part.ram, "--min-array", LEAST_ARRAY, *child]


def run_slice(
    part: Slice, mode: str, python: Path, *, log: Path, told: Callable[[int], None], only: Iterable[str] | None = None
) -> Run:
    """Run a slice (or `only` these of its tests) and return how its tests came out.

    `told` is called with the number of tests that are over.
    """
    run = Run()
    wanted = None if only is None else list(only)
    with tempfile.TemporaryDirectory(prefix="uc-", ignore_cleanup_errors=True) as directory, log.open("wb") as output:
        place = Path(directory)
        if wanted is not None:
            (place / "only").write_text("\n".join(wanted))
        for _ in range(CRASHES_MOST + 1):
            before = len(run.outcomes)
            (place / "done").write_text("\n".join(run.outcomes))
            arguments = [part.kind, str(place / "only") if wanted is not None else "-", str(place / "done"), "push"]
            reading = Reading(place / "events", lambda n, before=before: told(before + n))  # type: ignore[misc]
            child = command(part, mode, python, [str(reading.path), *arguments, *part.arguments, *root(part, python)])
            status, stuck = run_once(child, place / "work", reading, output)
            run.outcomes |= reading.outcomes
            if reading.finish is not None:
                run.seconds += reading.finish["seconds"]
                run.stats = {name: run.stats.get(name, 0) + n for name, n in reading.finish["stats"].items()}
            if reading.finish is not None and status == 0 and not stuck:
                break
            culprit = reading.current or (ENDING if reading.collected else COLLECTING)
            how = f"made no progress for {STUCK_SECONDS:.0f} s" if stuck else f"ended with {described(status)}"
            run.outcomes[culprit] = Outcome("timeout" if stuck else "crash", how)
            if reading.current is None:
                break
        else:
            run.outcomes[GIVEN_UP] = Outcome("crash")
    return run


def root(part: Slice, python: Path) -> list[str]:
    """Return what makes pytest's names of tests the same wherever it runs."""
    if part.kind != "pytest" or "--rootdir" in part.arguments:
        return []
    return ["--rootdir", str(packages(python))]


def described(status: int) -> str:
    """Return an exit status in words."""
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def run_once(child: list[str], work: Path, reading: Reading, output: BinaryIO) -> tuple[int, bool]:
    """Run a process in a directory that is made for it; return its status, and whether it hung."""
    work.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "USERSWAP"))}
    environment |= {
        # NumPy builds extensions in its tests, with tools that it finds by name.
        "PATH": f"{Path(child[0]).parent}:{os.environ['PATH']}",
        "TMPDIR": str(work),
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE / "cpython"), os.environ.get("PYTHONPATH")])),
        "PYTHONFAULTHANDLER": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    process = subprocess.Popen(
        child, cwd=work, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
    )
    stuck, last = False, time.monotonic()
    try:
        while process.poll() is None:
            if stopping.is_set():
                raise Stopped
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.5)
            if reading.update():
                last = time.monotonic()
            elif time.monotonic() - last > STUCK_SECONDS:
                stuck = True
                # The interpreter's fault handler writes to the log where every thread is.
                process.send_signal(signal.SIGABRT)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(20)
                break
    finally:
        # Also what it left behind.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reading.update()
    reading.path.unlink(missing_ok=True)
    shutil.rmtree(work, ignore_errors=True)
    return process.returncode, stuck


def packages(python: Path) -> Path:
    """Return where the packages of an interpreter's virtual environment are."""
    return next((python.parent.parent / "lib").glob("python*/site-packages"))


def interpreter(environment: Path) -> Path:
    """Return the python of a virtual environment; ends the program where there is none."""
    python = environment.absolute() / "bin" / "python"
    if not python.exists():
        sys.exit(f"There is no {python}: make compat sets it up.")
    return python
