"""`userswap ps`: which programs of this user run with userswap, and what each has in RAM and in swap."""

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from userswap.cli.main import Parser
from userswap.sizes import format_size

__all__ = ["prepare"]

PERIOD = 1.0
SILENT = "(does not answer: busy or stopped)"
HEADS = ("PID", "BUDGET", "ALLOWED", "RESIDENT", "POOL", "SWAP FILES", "RATIO")
EPILOG = """\
BUDGET: RAM for what lives in swap. ALLOWED: what of it the process may use now (forked processes share one).
RESIDENT: in place. POOL: compressed, in RAM. SWAP FILES: of them in use. RATIO: how much smaller what is swapped out
is stored. A process with several pools has a line for each: PID/1, PID/2. Forked processes stand below their parent."""


@dataclass
class Process:
    """One that was reached: its pools, or None if it did not answer."""

    pid: int
    command: str
    pools: list[dict[str, Any]] | None
    children: list["Process"] = field(default_factory=list)
    parent: int | None = None

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        answers = self.pools is not None
        who = {"pid": self.pid, "parent": self.parent, "command": self.command}
        return {**who, "answers": answers, "pools": self.pools or []}


def prepare(arguments: list[str]) -> Callable[[], int]:
    """Return `userswap ps`. Raises UsageError."""
    parser = Parser(prog="userswap ps", description="Programs of yours that run with userswap.", epilog=EPILOG)
    parser.add_argument("--json", action="store_true", help="figures in bytes, as a JSON list")
    parser.add_argument("--watch", action="store_true", help="again every second, with faults a second, until Ctrl-C")
    parser.add_argument("--swaps", action="store_true", help="show each pool's swap files, too")
    options = parser.parse_args(arguments)

    def action() -> int:
        if not options.watch:
            show(look(), {}, options.json, swaps=options.swaps, watching=False)
            return 0
        with contextlib.suppress(KeyboardInterrupt, BrokenPipeError):
            watch(options.json, options.swaps)
        return 0

    return action


def watch(as_json: bool, swaps: bool) -> None:
    """Show the processes again and again."""
    before: dict[tuple[int, int], tuple[float, int]] = {}
    while True:
        processes = look()
        now = time.monotonic()
        rates = {}
        faults = {(process.pid, pool["pool"]): pool["faults"] for process in processes for pool in process.pools or []}
        for key, count in faults.items():
            if key in before:
                then, counted = before[key]
                rates[key] = (count - counted) / (now - then)
        before = {key: (now, count) for key, count in faults.items()}
        if sys.stdout.isatty() and not as_json:
            print("\x1b[H\x1b[2J", end="")
        show(processes, rates, as_json, swaps=swaps, watching=True)
        sys.stdout.flush()
        time.sleep(PERIOD)


def look() -> list[Process]:
    """All processes that can be reached and have a pool, parents before their children."""
    from userswap.control.client import all_lines, gather, printable

    found = {}
    for pid, answer in gather(list(all_lines()), {"do": "ps"}).items():
        pools = None if answer is None else answer.get("pools")
        if pools != []:
            found[pid] = Process(pid, printable(command_of(pid)), pools if isinstance(pools, list) else None)
    top: list[Process] = []
    for process in found.values():
        process.parent = nearest(process.pid, found)
        (top if process.parent is None else found[process.parent].children).append(process)
    ordered: list[Process] = []

    def add(processes: list[Process]) -> None:
        for process in sorted(processes, key=lambda process: process.pid):
            ordered.append(process)
            add(process.children)

    add(top)
    return ordered


def nearest(pid: int, among: dict[int, Process]) -> int | None:
    """The nearest process above that is among these."""
    for _ in range(64):
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            return None
        if pid in among:
            return pid
        if pid <= 1:
            return None
    return None


def command_of(pid: int) -> str:
    """What a process was started as; from the word userswap on, where that is the command."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").rstrip("\0").split("\0")
    except OSError:
        return ""
    for at, word in enumerate(words[:4]):
        if Path(word).name == "userswap" and words[at + 1 : at + 2] == ["run"]:
            return " ".join(["userswap", *words[at + 1 :]])
    return " ".join([Path(words[0]).name, *words[1:]])


def show(
    processes: list[Process], rates: dict[tuple[int, int], float], as_json: bool, *, swaps: bool, watching: bool
) -> None:
    """Print them."""
    if as_json:
        print(json.dumps([process.as_json() for process in processes], indent=None if watching else 1))
        return
    if not processes:
        print("No program of yours can be reached that runs with userswap.")
        return
    heads = (*HEADS, "FAULTS/S") if watching else HEADS
    depths: dict[int, int] = {}
    rows: list[tuple[list[str], str, list[str]]] = []
    for process in processes:
        depths[process.pid] = depth = 0 if process.parent is None else depths[process.parent] + 1
        command = "  " * (depth - 1) + "└ " * (depth > 0) + process.command
        if process.pools is None:
            rows.append(([str(process.pid), *[""] * (len(heads) - 1)], f"{command} {SILENT}", []))
        for pool in process.pools or []:
            name = f"{process.pid}/{pool['pool']}" if len(process.pools or []) > 1 else str(process.pid)
            cells = [name, *cells_of(pool)]
            if watching:
                rate = rates.get((process.pid, pool["pool"]))
                cells.append("" if rate is None else f"{rate:,.0f}")
            rows.append((cells, command, [described(swap) for swap in pool["swaps"]] if swaps else []))
    widths = [max(len(head), *(len(cells[at]) for cells, _, _ in rows)) for at, head in enumerate(heads)]
    most = shutil.get_terminal_size().columns if sys.stdout.isatty() else 1 << 16
    for cells, command, files in [([*heads], "COMMAND", []), *rows]:
        line = "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))
        print("\n".join(text[:most] for text in [f"{line}  {command}", *files]))


def described(swap: dict[str, Any]) -> str:
    """A swap file for a person."""
    from userswap.control.client import printable

    use = f"{format_size(swap['used_bytes'])} of {format_size(swap['limit_bytes'])}"
    return f"    {printable(swap['name'])}: {use}, priority {swap['priority']}, tier {swap['tier']}, {swap['state']}"


def cells_of(pool: dict[str, Any]) -> list[str]:
    """The figures of a pool for a person."""
    stored, swapped = pool["stored_bytes"], pool["swapped_bytes"]
    sizes = ("budget_bytes", "allowed_bytes", "resident_bytes", "pool_bytes", "slot_bytes")
    return [*(format_size(pool[size]) for size in sizes), f"{swapped / stored:.1f}" if stored else "-"]
