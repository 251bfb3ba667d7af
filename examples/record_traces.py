"""Record the traces that userswap comes with once more: the programs in traced/, each in little RAM.

    python examples/record_traces.py [NAME ...]

A trace is what a program asked of the swap layer; `userswap lab replay NAME` asks it of every design. Programs are
deterministic, but for the times.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAMS = HERE / "traced"
TRACES = HERE.parent / "src" / "userswap" / "lab" / "traces"
RAM = "48M"


def record(name: str, place: str) -> int:
    """Run a program under `userswap run --trace`; the exit code."""
    trace = TRACES / f"{name}.trace"
    command = [sys.executable, "-m", "userswap", "run", "--ram", RAM, "--swap", f"{place}:1G", "--trace", str(trace)]
    return subprocess.run([*command, str(PROGRAMS / f"{name}.py")], check=False).returncode


def main() -> int:
    """Record the traces that the command line names, all by default."""
    names = sys.argv[1:] or sorted(path.stem for path in PROGRAMS.glob("*.py"))
    TRACES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        for name in names:
            code = record(name, place)
            if code:
                print(f"{name} could not be recorded: exit code {code}", file=sys.stderr)
                return code
            print(f"{name}: {(TRACES / f'{name}.trace').stat().st_size:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
