"""`python -m stress`: rounds of `stress.program` under settings drawn from a seed, until the time is over.

`make stress MINUTES=60` calls it. A round that fails is named with the command that runs it again.
"""

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from userswap import _core

# A round is stopped, with the stacks of its threads, when it takes so much longer than it was given.
PATIENCE = 600
ROUND_SECONDS = 30


@dataclass(frozen=True)
class Round:
    """One run of the program: how it is called, and in which environment."""

    seed: int
    command: list[str]
    environment: dict[str, str]

    def __str__(self) -> str:
        """As it is typed in a shell."""
        settings = [f"{name}={value}" for name, value in self.environment.items()]
        return shlex.join([*settings, "python", *self.command])


def drawn(seed: int, seconds: float, directory: str) -> Round:
    """Return the round that a seed stands for."""
    rng = random.Random(seed)
    ram = int(2 ** rng.uniform(4.6, 7.4))
    size = int(ram * rng.choice((0.7, 1.2, 2, 3, 5)))
    options = ["--ram", f"{ram}M", "--quiet", "--min-array", rng.choice(("64K", "1M"))]
    environment = {}
    swap = rng.random()
    if swap < 0.2:
        options += ["--swap", "none"]
    else:
        options += ["--swap", f"{directory}/swap:{4 * size + 1024}M"]
        # Drawn by themselves: what a seed meant before there were several, it still means.
        files = random.Random(seed * 7 + 1)
        for number in range(files.choice((0, 0, 1, 3))):
            options += ["--swap", f"{directory}/swap{number}:{files.choice((4, 64, 512))}M:{files.randrange(-2, 3)}"]
        if files.random() < 0.2:
            options += ["--tiers", "file"]
        if files.random() < 0.25:
            options.append("--encrypt")
    if rng.random() < 0.2:
        options.append("--no-dedupe")
    if rng.random() < 0.15 and swap >= 0.2:
        options += ["--map", rng.choice(("sparse", "two_trees", "single_tree", "descriptor", "redirect", "vswap"))]
    if rng.random() < 0.2:
        environment["USERSWAP_FRAMES"] = "copy"
    if rng.random() < 0.2:
        environment["USERSWAP_READAHEAD"] = "0"
    if rng.random() < 0.15:
        options += ["--children", "own"]
    delivery = rng.choices(("auto", "segv", "thread"), (75, 15, 10))[0]
    # Not everywhere may faults be served by threads: such a round is one by signal then.
    if delivery != "auto" and _core.probe(delivery) == 0:
        options += ["--delivery", delivery]
    environment["MALLOC_ARENA_MAX"] = "2"
    program = ["-m", "stress.program", "--seed", str(seed), "--size", str(size), "--threads", str(rng.randrange(1, 5))]
    program += ["--seconds", f"{seconds:g}", "--directory", directory]
    return Round(seed, ["-m", "userswap", "run", *options, *program], environment)


def run(one: Round, seconds: float, log: Path) -> tuple[bool, dict[str, int]]:
    """Run a round; whether all was right, and what it did. What it printed is in `log`."""
    environment = os.environ | one.environment
    with log.open("wb") as errors:
        started = subprocess.Popen(
            [sys.executable, *one.command], env=environment, stdout=subprocess.PIPE, stderr=errors,
            stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            printed = started.communicate(timeout=seconds + PATIENCE)[0]
        except subprocess.TimeoutExpired:
            os.killpg(started.pid, signal.SIGUSR1)  # its handler prints the stacks of all threads
            time.sleep(2)
            os.killpg(started.pid, signal.SIGKILL)
            started.wait()
            errors.write(f"It had not ended {PATIENCE} s after its time.\n".encode())
            return False, {}
    try:
        figures = json.loads(printed.splitlines()[-1])
    except (IndexError, ValueError):
        figures = None
    if started.returncode or figures is None:
        # A child that is gone without a word, or one that says so on standard output, would leave nothing to go by.
        with log.open("ab") as errors:
            errors.write(printed[-4000:] + f"\nIt ended with status {started.returncode}.\n".encode())
    done = figures["done"] | {"checked": figures["checked"]} if figures else {}
    return bool(figures) and not started.returncode, done


def main() -> int:
    """Rounds until the time is over, or one that fails."""
    parser = argparse.ArgumentParser(prog="python -m stress", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=1, help="of the first round; the others count up from it")
    parser.add_argument("--rounds", type=int, default=0, help="so many, whatever the time")
    parser.add_argument("--round-seconds", type=float, default=ROUND_SECONDS)
    parser.add_argument("--directory", default="/var/tmp", help="where there is room for swap files")
    options = parser.parse_args()
    if not os.access(options.directory, os.W_OK):
        print(f"Files can't be made in {options.directory}: name another place with --directory.", file=sys.stderr)
        return 2
    console = Console(stderr=True)
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(),
        console=console, disable=not console.is_terminal,
    )  # fmt: skip
    start = time.monotonic()
    total: dict[str, int] = {}
    rounds = 0
    with bar, tempfile.TemporaryDirectory(dir=options.directory, prefix="userswap-stress-") as directory:
        task = bar.add_task("stress", total=options.rounds or options.minutes * 60)
        while rounds < options.rounds if options.rounds else time.monotonic() - start < options.minutes * 60:
            one = drawn(options.seed + rounds, options.round_seconds, directory)
            log = Path(directory) / "log"
            right, done = run(one, options.round_seconds, log)
            for name, count in done.items():
                total[name] = total.get(name, 0) + count
            rounds += 1
            gigabytes = total.get("checked", 0) / 1e9
            if not right:
                console.print(log.read_text(errors="replace")[-8000:], highlight=False, markup=False)
                print(
                    f"Round {rounds} (seed {one.seed}) failed; what it said is above. Again, with an empty directory:"
                )
                print(f"  {one}")
                return 1
            bar.update(task, completed=rounds if options.rounds else time.monotonic() - start)
            console.print(
                f"seed {one.seed}: {done['checked'] / 1e9:.1f} GB right; {' '.join(one.command[3:])}"
                f" {' '.join(f'{name}={value}' for name, value in one.environment.items())}",
                highlight=False, markup=False, soft_wrap=True,
            )  # fmt: skip
    did = ", ".join(f"{count:,} x {name}" for name, count in sorted(total.items()) if name != "checked")
    print(f"{rounds} rounds in {(time.monotonic() - start) / 60:.0f} minutes: {did}.")
    print(f"{gigabytes:.1f} GB were compared with what had been written, and no byte was wrong.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
