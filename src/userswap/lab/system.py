"""The whole system under each design: real work in arrays that are larger than their RAM, results compared.

A design runs in a process of its own, all workloads in it one after the other. Designs take turns, each round begins
with another one. What the results must be comes from the same work in ordinary memory, which also is
the first row: what the work takes where nothing is swapped.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from userswap.errors import LabError, SwapPathError
from userswap.swapfiles import default_places, open_swap

__all__ = ["FULL", "IN_RAM", "QUICK", "Measured", "Size", "figures", "measure"]

IN_RAM = "in RAM"
# By design, by workload: the figures of each round.
Measured = dict[str, dict[str, list[dict[str, Any]]]]


@dataclass(frozen=True)
class Size:
    """How much array memory in how much RAM, bytes."""

    array: int
    ram: int


def swap_file(size: Size) -> str:
    """Return the --swap that every design gets, since some can't do without: twice as large as the arrays.

    Raises LabError: there is no place for it.
    """
    refusals = []
    for place in default_places():
        spec = f"{place}:{2 * size.array}"
        try:
            opened = open_swap(spec)
        except SwapPathError as error:
            refusals.append(str(error).partition(": ")[0])
            continue
        assert opened is not None, "a place was named"
        os.close(opened.fd)
        return spec
    raise LabError(f"There is no place for a swap file ({'; '.join(refusals)}): set TMPDIR to a directory on a disk.")


QUICK = Size(24 << 20, 16 << 20)
FULL = Size(160 << 20, 48 << 20)


def measure(designs: Sequence[str], size: Size, rounds: int, progress: Callable[[str], None]) -> Measured:
    """Run every workload under every design.

    Raises:
        LabError: a result was wrong, or a process could not do its work.
    """
    names = [IN_RAM, *designs]
    swap = swap_file(size)
    report: Measured = {name: {} for name in names}
    right: dict[str, Any] = {}
    for turn in range(rounds):
        # Ordinary memory comes first of all, since it says what is right.
        for name in names if turn == 0 else names[turn % len(names) :] + names[: turn % len(names)]:
            progress(f"round {turn + 1} of {rounds}, {name}")
            for workload, run in child("" if name == IN_RAM else name, size, swap).items():
                if right.setdefault(workload, run["result"]) != run.pop("result"):
                    raise LabError(f"The result of {workload} under {name} is wrong: please report this.")
                report[name].setdefault(workload, []).append(run)
    return report


def child(design: str, size: Size, swap: str) -> dict[str, dict[str, Any]]:
    """Run the workloads in a process. Raises LabError."""
    command = [sys.executable, "-m", "userswap.lab.workloads", design, str(size.array), str(size.ram), swap]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    except ValueError:
        said = done.stderr.strip().rpartition("\n")[2] or f"exit code {done.returncode}"
        raise LabError(f"The workloads could not run under {design or IN_RAM} ({said}).") from None
    return found


def figures(report: Measured, size: Size, rounds: int) -> dict[str, Any]:
    """What --json writes: seconds and bytes."""
    from userswap.lab.replay import spread

    return {
        "size": asdict(size),
        "rounds": rounds,
        "designs": {
            design: {
                workload: {name: spread([run[name] for run in runs]) for name in runs[0]}
                for workload, runs in workloads.items()
            }
            for design, workloads in report.items()
        },
    }
