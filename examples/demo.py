"""The demo: an unchanged NumPy program runs in a quarter of the memory that its arrays need (`make demo`).

The program is function_families.py: it compares every function of the installed Python sources with every
other. It runs twice, plainly and under `userswap run`; both results must be the same to the last bit, and a
part of them is computed in another way too, with integers as sets. No network, no root, no swap partition.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

import numpy as np

HERE = Path(__file__).resolve().parent
PROGRAM = HERE / "function_families.py"
READER = HERE / "read_functions.py"
MIB = 1 << 20
GIB = 1 << 30
SAMPLES = 100  # functions whose row of both matrices is computed again, one by one
SLACK = 1.02  # of the budget that the peak may reach
ROOM = 256 * MIB  # for the interpreter and its libraries, beside the arrays
BAR_CELLS = 30
PROGRESS_LINE = re.compile(r"^(.+): (\d+) %$")
EXIT_SAME, EXIT_DIFFERENT, EXIT_CANNOT = 0, 1, 2


class DemoError(Exception):
    """Something that ends the demo: a sentence for the reader, and the exit code."""

    def __init__(self, sentence: str, code: int = EXIT_DIFFERENT) -> None:
        super().__init__(sentence)
        self.code = code


class Bar:
    """A progress bar for one stage after the other; off a terminal, a line for each finished stage."""

    def __init__(self) -> None:
        self.live = sys.stdout.isatty()
        self.stage = ""
        self.began = 0.0
        self.seconds: dict[str, float] = {}

    def show(self, stage: str, percent: int) -> None:
        """Show how far a stage is; a stage of another name ends the one before it."""
        if stage != self.stage:
            self.finish()
            self.stage, self.began = stage, time.monotonic()
        if self.live:
            done = BAR_CELLS * percent // 100
            cells = "█" * done + "░" * (BAR_CELLS - done)
            elapsed = time.monotonic() - self.began
            print(f"\r  {stage:<32} {cells} {percent:3d} % {elapsed:6.1f} s", end="", flush=True)

    def finish(self) -> None:
        """End the stage that is being shown."""
        if not self.stage:
            return
        self.seconds[self.stage] = elapsed = time.monotonic() - self.began
        if self.live:
            self.show(self.stage, 100)
            print(flush=True)
        else:
            print(f"  {self.stage:<32} {elapsed:6.1f} s", flush=True)
        self.stage = ""


@dataclass
class Run:
    """One finished subprocess."""

    seconds: float
    max_rss: int
    errors: str
    last_line: str = ""
    stages: dict[str, float] = field(default_factory=dict)


def run(command: list[str], what: str) -> Run:
    """Run a program that prints progress lines, show them as a bar, and return what it took."""
    bar = Bar()
    last = ""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        began = time.monotonic()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                progress = PROGRESS_LINE.match(line)
                if progress:
                    bar.show(progress[1], int(progress[2]))
                else:
                    last = line.strip() or last
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            if process.returncode is None:
                process.kill()
                process.wait()
        seconds = time.monotonic() - began
        bar.finish()
        said = read_all(errors)
    if process.returncode:
        code = process.returncode
        ended = f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
        raise DemoError(f"{what} {ended}. It said:\n{said.strip() or '(nothing)'}", EXIT_CANNOT)
    return Run(seconds, usage.ru_maxrss * 1024, said, last, bar.seconds)


def read_all(file: IO[str]) -> str:
    """Return the whole text of an open file."""
    file.seek(0)
    return file.read()


def size(count: float) -> str:
    """Write a number of bytes for a reader."""
    return f"{count / GIB:.2f} GiB" if count >= GIB else f"{count / MIB:.0f} MiB"


def free_memory() -> int:
    """Return how many bytes can still be used here, by what the machine and the container say."""
    free = sys.maxsize
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    for limit, used in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        for entry in Path("/proc/self/cgroup").read_text().splitlines():
            inner = entry.split(":", 2)[2].lstrip("/")
            for root in ("/sys/fs/cgroup", "/sys/fs/cgroup/memory"):
                for folder in {Path(root), Path(root, inner)}:
                    try:
                        most = int((folder / limit).read_text())  # "max" is no number: no limit
                        free = min(free, most - int((folder / used).read_text()))
                    except (OSError, ValueError):
                        continue
    return max(free, 0)


@dataclass(frozen=True)
class Sources:
    """The functions for the independent check: each set is an integer with a bit for each item."""

    labels: list[str]
    words: list[int]
    shapes: list[int]

    @classmethod
    def load(cls, path: Path) -> Sources:
        """Read what read_functions.py wrote."""
        with np.load(path) as data:
            words = as_bits(data["words"].tolist(), data["word_starts"].tolist())
            shapes = as_bits(data["shapes"].tolist(), data["shape_starts"].tolist())
            return cls(data["labels"].tolist(), words, shapes)


def as_bits(items: list[int], starts: list[int]) -> list[int]:
    """Turn sets of small numbers into integers that have these bits set."""
    return [sum(1 << item for item in items[a:b]) for a, b in pairwise(starts)]


def jaccard(first: int, second: int) -> float:
    """Return the share of what both sets have in what either has."""
    return (first & second).bit_count() / max((first | second).bit_count(), 1)


def check_rows(sources: Sources, result: dict[str, Any], bar: Bar) -> int:
    """Compute some functions' nearest and renamed copies again, pair by pair; return how many pairs."""
    count = len(sources.words)
    whole = [word | shape << 4096 for word, shape in zip(sources.words, sources.shapes, strict=True)]
    chosen = sorted({count * k // SAMPLES for k in range(SAMPLES)})
    for done, i in enumerate(chosen):
        likeness = [jaccard(whole[i], other) for other in whole]
        likeness[i] = 0.0
        renamed = [
            jaccard(sources.shapes[i], shape) if jaccard(sources.words[i], word) <= 0.3 else 0.0
            for word, shape in zip(sources.words, sources.shapes, strict=True)
        ]
        for name, mine in (("nearest", likeness), ("renamed", renamed)):
            best = max(mine)
            theirs = (result[name][i], result[f"{name}_likeness"][i])
            if theirs != (mine.index(best), best):
                raise DemoError(
                    f"The result is wrong: for {sources.labels[i]} the program says that '{name}' is "
                    f"function {theirs[0]} at {theirs[1]}, but it is function {mine.index(best)} at {best}."
                )
        bar.show("checking pairs with Python's sets", 100 * (done + 1) // len(chosen))
    return len(chosen) * count


def families_by_prefixes(sources: Sources, bar: Bar) -> list[list[int]]:
    """Find the families without any matrix: two sets that are 4/5 alike share one of their rarest items.

    (Prefix filtering: of n items, the n - ⌈4n/5⌉ + 1 rarest suffice.) Pairs that do are compared exactly.
    """
    whole = [word | shape << 4096 for word, shape in zip(sources.words, sources.shapes, strict=True)]
    items = [bits_of(one) for one in whole]
    frequency = Counter(item for one in items for item in one)
    posted: defaultdict[int, list[int]] = defaultdict(list)
    group = list(range(len(whole)))

    def top(i: int) -> int:
        while group[i] != i:
            group[i] = i = group[group[i]]
        return i

    order = sorted(range(len(whole)), key=lambda i: len(items[i]))
    for done, i in enumerate(order):
        length = len(items[i])
        rarest = sorted(items[i], key=lambda item: (frequency[item], item))[: length - -(-4 * length // 5) + 1]
        candidates = {j for item in rarest for j in posted[item] if 5 * len(items[j]) >= 4 * length}
        for j in candidates:
            both = (whole[i] & whole[j]).bit_count()
            if 5 * both >= 4 * (length + len(items[j]) - both):
                group[top(i)] = top(j)
        for item in rarest:
            posted[item].append(i)
        bar.show("finding the families another way", 100 * (done + 1) // len(order))
    members: defaultdict[int, list[int]] = defaultdict(list)
    for i in range(len(whole)):
        members[top(i)].append(i)
    return sorted(family for family in members.values() if len(family) > 1)


def bits_of(number: int) -> list[int]:
    """Return which bits of an integer are set."""
    return [i for i, bit in enumerate(reversed(f"{number:b}")) if bit == "1"]


def tell(sources: Sources, result: dict[str, Any]) -> None:
    """Print what the program found."""
    labels = sources.labels
    histogram = result["histogram"]
    steps = len(histogram) - 1
    below = next(k for k in range(steps + 1) if sum(histogram[: k + 1]) * 2 >= sum(histogram))
    families = result["families"]
    print("\nWhat it found")
    print(f"  Half of all pairs of functions are less than {100 * (below + 1) // steps} % alike.")
    print(
        f"  {sum(map(len, families)):,} functions are in {len(families):,} families of near copies "
        "(linked by 80 % likeness)."
    )
    wide = sorted(families, key=lambda one: (-len({labels[i].split(":")[0] for i in one}), -len(one), one))
    for family in wide[:3]:
        files = {labels[i].split(":")[0] for i in family}
        some = ", ".join(labels[i] for i in family[:2])
        print(f"    {len(family)} functions in {len(files)} files: {some}{', …' if len(family) > 2 else ''}")
    pairs = []
    for i, (j, likeness) in enumerate(zip(result["renamed"], result["renamed_likeness"], strict=True)):
        if likeness >= 0.9 and labels[i].split(":")[0] != labels[j].split(":")[0]:
            pairs.append((-sources.shapes[i].bit_count(), *sorted((i, j))))
    print("  Built alike from different words:")
    told: set[int] = set()
    for _, i, j in sorted(set(pairs)):
        if len(told) < 6 and not told & {i, j}:
            told |= {i, j}
            print(f"    {labels[i]}  and  {labels[j]}")


def compare_results(plain: dict[str, Any], swapped: dict[str, Any]) -> None:
    """Raise if two results differ anywhere, and say where first."""
    for name, value in plain.items():
        if name != "digest" and value != swapped.get(name):
            raise DemoError(f"The results differ: '{name}' is not what the plain run computed.")
    if plain["digest"] != swapped["digest"]:
        raise DemoError("The results differ: their digests are not the same.")


def check_stats(stats: dict[str, Any], swapped: Run, array_bytes: int) -> None:
    """Raise if the program did not stay within its budget, or never swapped though it had to."""
    budget, peak = stats["budget_bytes"], stats["peak_bytes"]
    if peak > SLACK * budget:
        raise DemoError(f"The budget did not hold: {size(peak)} were used, {size(budget)} were given.")
    if array_bytes > budget and not stats["swap_ins"]:
        raise DemoError(f"Nothing was swapped, though {size(array_bytes)} of arrays had {size(budget)} of memory.")
    if array_bytes > budget + 2 * ROOM and swapped.max_rss >= array_bytes:
        raise DemoError(f"Nothing was saved: the process held {size(swapped.max_rss)} of memory.")


def show_stages(plain: Run | None, swapped: Run) -> None:
    """Print how long each stage took in both runs."""
    if plain is None:
        return
    print(f"\n  {'seconds':<32} {'plain':>8} {'userswap':>9}")
    for stage, seconds in swapped.stages.items():
        print(f"  {stage:<32} {plain.stages.get(stage, 0):8.1f} {seconds:9.1f}")
    print(f"  {'in all':<32} {plain.seconds:8.1f} {swapped.seconds:9.1f}")


def demo(ram: str, wanted: int, folder: Path) -> None:
    """Do it all, in a folder for what is written on the way."""
    functions = folder / "functions.npz"
    print("1. Reading the Python functions installed here", flush=True)
    run([sys.executable, str(READER), str(functions), "--functions", str(wanted)], "Reading the sources")
    with np.load(functions) as data:
        count, (files, source_bytes) = len(data["word_starts"]) - 1, data["source"].tolist()
    if count < 2:
        raise DemoError("No Python sources are installed here, so there is nothing to compare.", EXIT_CANNOT)
    print(f"   {count:,} functions from {files:,} files, {source_bytes / 1e6:.1f} MB of source text")
    if count < wanted:
        print(f"   (there are no more: {wanted:,} were wanted, so the matrices are smaller than they could be)")

    print("\n2. The program in as much memory as it likes", flush=True)
    needed = 8 * count * count + ROOM
    free = free_memory()
    plain: Run | None = None
    plain_result: dict[str, Any] = {}
    command = [str(PROGRAM), str(functions), "--json"]
    if free < needed:
        print(f"   left out: it needs {size(needed)} and this machine has {size(free)} free;")
        print("   the result is checked by the other computation alone")
    else:
        plain = run([sys.executable, *command, str(folder / "plain.json")], "The plain run")
        plain_result = json.loads((folder / "plain.json").read_text())

    print(f"\n3. The same program, unchanged, in {ram}", flush=True)
    stats_file, swapped_file = folder / "stats.json", folder / "swapped.json"
    userswap = [sys.executable, "-m", "userswap", "run", "--ram", ram, "--stats", str(stats_file)]
    swapped = run([*userswap, *command, str(swapped_file)], "The program under userswap")
    if swapped.errors.strip():
        print("\n".join(f"   {line}" for line in swapped.errors.strip().splitlines()))
    stats = json.loads(stats_file.read_text())
    result = json.loads(swapped_file.read_text())

    print("\n4. Checking", flush=True)
    check_stats(stats, swapped, result["array_bytes"])
    if plain is not None:
        compare_results(plain_result, result)
        print(f"  same as the plain run, every byte of both matrices: SHA-256 {result['digest'][:16]}…")
    sources = Sources.load(functions)
    bar = Bar()
    pairs = check_rows(sources, result, bar)
    families = families_by_prefixes(sources, bar)
    bar.finish()
    if families != result["families"]:
        raise DemoError("The result is wrong: another way of finding the families finds other ones.")
    print(f"  {pairs:,} pairs and all {len(families):,} families are what another computation says")
    tell(sources, result)
    show_stages(plain, swapped)

    against = f"{plain.seconds:.1f} s plain" if plain else "no plain run, for which this machine has too little memory"
    print(
        f"\nCompared all {count * (count - 1) // 2:,} pairs of {count:,} Python functions "
        f"with {size(stats['peak_bytes'])} of memory for arrays (budget {size(stats['budget_bytes'])}; "
        f"the whole process, Python and its libraries included, at most {size(swapped.max_rss)}) "
        f"where the arrays need {size(result['array_bytes'])}, in {swapped.seconds:.1f} s against {against}."
    )


def main() -> int:
    """Run the demo; end with a plain sentence whatever happens."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--ram", default="512M", help="memory for the program's arrays (default 512M)")
    parser.add_argument(
        "--size",
        type=int,
        default=16384,
        metavar="N",
        help="functions to compare; arrays take 8 N² bytes (default 16384)",
    )
    options = parser.parse_args()
    if options.size < 2:
        parser.error("--size must be 2 or more: there is nothing to compare in less")
    try:
        with tempfile.TemporaryDirectory(prefix="userswap-demo-") as folder:
            demo(options.ram, options.size, Path(folder))
    except DemoError as error:
        print(f"\nThe demo failed. {error}", file=sys.stderr)
        return error.code
    except OSError as error:
        print(f"\nThe demo failed. {error}", file=sys.stderr)
        return EXIT_CANNOT
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    return EXIT_SAME


if __name__ == "__main__":
    sys.exit(main())
