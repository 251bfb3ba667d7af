"""The command line: `userswap run` is compared with plain python, `doctor` with what this machine is."""

import json
import os
import platform
import re
import signal
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from support import python, userswap

RAM = ("--ram", "128M", "--swap", "none")
FIELDS = set(
    [
        "budget_bytes",
        "peak_bytes",
        "resident_bytes",
        "pool_bytes",
        "metadata_bytes",
        "swapped_bytes",
        "stored_bytes",
        "faults",
        "swap_ins",
        "swap_outs",
        "part_ins",
        "part_outs",
        "writebacks",
        "promotions",
        "fault_ns_p50",
        "fault_ns_p99",
        "fault_ns_total",
        "virtual_bytes",
        "peak_virtual_bytes",
        "slot_bytes",
        "budget_reason",
        "seconds",
    ]
)

# What a program can see of how it was started.
PROBE = """
import sys, os, inspect
main = sys.modules["__main__"]
assert main.__dict__ is globals()
print({k: (v if isinstance(v, (str, dict, type(None))) else type(v).__name__)
       for k, v in list(globals().items()) if k.startswith("__")})
print(type(__builtins__).__name__, getattr(__spec__, "name", None), getattr(__loader__, "name", None))
print(sys.argv, sys.path, os.getcwd())
print(sys.stdin is not None, sys.gettrace(), sys.excepthook is sys.__excepthook__, __name__)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with the probe as script, module, package, link, directory and zip file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "probe.py").write_text(PROBE)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "link.py").symlink_to(tmp_path / "probe.py")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("")
    (tmp_path / "package" / "part.py").write_text(PROBE)
    (tmp_path / "package" / "__main__.py").write_text(PROBE)
    with zipfile.ZipFile(tmp_path / "app.zip", "w") as archive:
        archive.writestr("__main__.py", PROBE)
    return tmp_path


def same(*program: str, **options: str) -> subprocess.CompletedProcess[str]:
    """Run a program both ways; all that can be seen of it must be the same. Return the run under userswap."""
    with ThreadPoolExecutor() as both:  # at once: neither sees the other
        running = both.submit(python, *program, **options)
        swapped = userswap("run", "--quiet", *RAM, *program, **options)
        plain = running.result()
    assert address_free(swapped.stdout) == address_free(plain.stdout)
    assert address_free(swapped.stderr) == address_free(plain.stderr)
    assert swapped.returncode == plain.returncode
    return swapped


def address_free(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "0x…", text)


@pytest.mark.parametrize(
    "program",
    [
        ["probe.py"],
        ["probe.py", "a", "--ram", "1", "-c", "--", ""],
        ["./probe.py"],
        ["sub/../probe.py", "--help"],
        ["sub/link.py"],
        ["package"],
        ["app.zip", "x"],
        ["-m", "probe", "-m", "y"],
        ["-mprobe"],
        ["-m", "package"],
        ["-m", "package.part", "--quiet"],
        ["-m", "timeit", "-n1", "-r1", "--help"],
        ["-c", PROBE, "x", "-c"],
        ["-cprint(1)"],
    ],
)
def test_a_program_sees_what_it_sees_under_python(place: Path, program: list[str]) -> None:
    # The first run writes the bytecode that both then find.
    python(*program)
    assert same(*program).returncode == 0


def test_absolute_paths_compiled_files_and_standard_input(place: Path) -> None:
    same(str(place / "probe.py"), "x")
    same("-", "x", input=PROBE)
    python("-m", "py_compile", "probe.py")
    [compiled] = (place / "__pycache__").glob("probe.*.pyc")
    compiled.rename(place / "compiled.pyc")
    same("compiled.pyc")


@pytest.mark.parametrize(
    "code",
    [
        "1/0",
        "def f(): g()\ndef g(): raise KeyError('x')\nf()",
        "try: 1/0\nexcept ZeroDivisionError as e: raise ValueError('é') from e",
        "1 +",
        "'\\udc80'.encode()",
        "import sys; sys.exit()",
        "import sys; sys.exit(3)",
        "import sys; sys.exit('good bye')",
        "raise SystemExit((1, 2))",
        "raise KeyboardInterrupt",
        "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
        "import os, signal; os.kill(os.getpid(), signal.SIGINT)",
        "import os; os._exit(7)",
        "import os; os.abort()",
        "import sys; sys.excepthook = lambda *a: print('mine', a[0], a[2].tb_frame.f_code.co_name); 1/0",
        "import sys; sys.excepthook = lambda *a: sys.exit(5); 1/0",
        "import sys, threading\ndef f(): 1/0\nt = threading.Thread(target=f, name='t'); t.start(); t.join()",
        "import threading, time\nthreading.Thread(target=lambda: (time.sleep(.1), print('late'))).start()",
        "import atexit, sys; atexit.register(print, 'bye'); atexit.register(lambda: 1/0); sys.exit(2)",
        "import sys; sys.stdout.write('no newline'); sys.stderr.write('x')",
        "raise BaseExceptionGroup('g', [ValueError(1), KeyboardInterrupt()])",
        "from __future__ import annotations\ndef f(x: nonsense): pass\nprint(f.__annotations__)",
        "def f(x: int): pass\nprint(f.__annotations__)",
        "import sys; del sys.modules['__main__']; print('gone')",
        "def deep(n): return deep(n + 1)\ntry: deep(0)\nexcept RecursionError: print('deep')",
        "import userswap; raise userswap.UserswapError('the program\\'s own')",
    ],
)
def test_programs_end_as_under_python(place: Path, code: str) -> None:
    (place / "program.py").write_text(code)
    same("program.py")
    same("-m", "program")
    same("-c", code)


def test_a_traceback_shows_only_the_program(place: Path) -> None:
    (place / "program.py").write_text("import json\njson.loads('{')\n")
    error = userswap("run", "--quiet", *RAM, "program.py").stderr
    assert error.splitlines()[1].startswith(f'  File "{place}/program.py", line 2')
    assert "userswap" not in error


def test_ctrl_c_ends_it_by_the_signal(place: Path) -> None:
    for command in (["program.py"], ["-m", "program"]):
        (place / "program.py").write_text("import time; print('on', flush=True); time.sleep(60)")
        process = subprocess.Popen(
            [sys.executable, "-m", "userswap", "run", *RAM, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        assert process.stdout.readline() == "on\n"
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=30)
        assert process.returncode == -signal.SIGINT
        assert "KeyboardInterrupt" in error and "cli/run.py" not in error
        assert error.splitlines()[-1] != "KeyboardInterrupt", "the summary comes last"


def test_pickle_inspect_and_multiprocessing_know_main(place: Path) -> None:
    (place / "program.py").write_text(
        "import inspect, multiprocessing, pickle\n"
        "class Point:\n"
        "    def __init__(self, x): self.x = x\n"
        "def double(point): return Point(2 * point.x)\n"
        "if __name__ == '__main__':\n"
        "    assert pickle.loads(pickle.dumps(Point(3))).x == 3\n"
        "    print(inspect.getsource(double))\n"
        "    with multiprocessing.get_context('spawn').Pool(1) as pool:\n"
        "        print([p.x for p in pool.map(double, [Point(1), Point(2)])])\n"
    )
    assert "[2, 4]" in same("program.py").stdout
    assert "[2, 4]" in same("-m", "program").stdout


def test_double_dash_ends_the_options(place: Path) -> None:
    (place / "-odd.py").write_text("import sys; print(sys.argv)")
    result = userswap("run", "--quiet", *RAM, "--", "-odd.py", "--quiet")
    assert result.stdout == "['-odd.py', '--quiet']\n"


def test_output_and_exit_code_pass_through_and_the_summary_comes_last(place: Path) -> None:
    code = "import atexit, sys; atexit.register(print, 'last words', file=sys.stderr); print('out'); sys.exit(4)"
    result = userswap("run", *RAM, "-c", code)
    assert (result.returncode, result.stdout) == (4, "out\n")
    first, summary = result.stderr.splitlines()
    assert first == "last words"
    assert summary.startswith("userswap: swap was never needed: nothing was large enough")


def test_small_needs_are_said_in_one_line() -> None:
    result = userswap("run", *RAM, "-c", "import numpy as np; a = np.ones(4 << 20, 'u1'); del a")
    assert result.stderr == "userswap: swap was never needed: 4 MiB of large allocations at most, in 128 MiB of RAM.\n"


BIG = "import numpy as np; a = np.arange(25 << 20); print(int(a[::4096].sum()))"


def test_summary_and_stats_of_a_program_that_needs_swap(place: Path) -> None:
    result = userswap("run", "--ram", "64M", "--stats", "stats.json", "-c", BIG)
    assert (result.returncode, result.stdout) == (0, f"{sum(range(0, 25 << 20, 4096))}\n")
    lines = result.stderr.splitlines()
    assert lines[0] == "userswap: 200 MiB of large allocations at once in 64 MiB of RAM (3.1 times as much)"
    assert [line.split()[0] for line in lines[1:]] == ["RAM", "faults", "swap"]
    stats = json.loads((place / "stats.json").read_text())
    assert stats.keys() >= FIELDS
    assert stats["budget_bytes"] == 64 << 20
    assert stats["peak_virtual_bytes"] == 200 << 20
    assert stats["budget_reason"] is None
    assert stats["swap_outs"] > 0 and stats["faults"] > 0
    assert 0 < stats["fault_ns_p50"] <= stats["fault_ns_p99"] <= stats["fault_ns_total"]
    assert sorted(file.name for file in place.iterdir() if "stats" in file.name) == ["stats.json"]


def test_a_budget_nobody_gave_is_explained(place: Path) -> None:
    userswap("run", "--stats", "stats.json", "--swap", "none", "-c", "pass")
    stats = json.loads((place / "stats.json").read_text())
    assert "machine" in stats["budget_reason"] or "cgroup" in stats["budget_reason"]


def test_stats_are_replaced_whole_and_survive_chdir(place: Path) -> None:
    (place / "stats.json").write_text("old")
    (place / "stats.json").chmod(0o640)
    userswap("run", "--quiet", *RAM, "--stats", "stats.json", "-c", "import os; os.chdir('/')")
    assert json.loads((place / "stats.json").read_text()).keys() >= FIELDS


def test_stats_can_follow_the_output(place: Path) -> None:
    result = userswap("run", "--quiet", *RAM, "--stats", "/dev/stdout", "-c", "pass")
    assert json.loads(result.stdout).keys() >= FIELDS
    with (place / "out").open("w") as out:
        userswap(
            "run",
            "--quiet",
            *RAM,
            "--stats",
            "/dev/stdout",
            "-c",
            "print(1)",
            capture_output=False,
            stdout=out,
        )
    first, _, rest = (place / "out").read_text().partition("\n")
    assert first == "1" and json.loads(rest).keys() >= FIELDS


def test_quiet_says_nothing() -> None:
    result = userswap("run", "--quiet", *RAM, "-c", "pass")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_forked_child_leaves_the_summary_to_its_parent(place: Path) -> None:
    code = "import os, sys\nif os.fork() == 0: sys.exit(0)\nos.wait()"
    result = userswap("run", *RAM, "--stats", "stats.json", "-c", code)
    assert result.stderr.count("userswap:") == 1


def test_a_program_that_closes_stderr_still_ends_well() -> None:
    for code in ("import sys; sys.stderr.close()", "import os; os.close(2)", "import sys; sys.stderr = None"):
        assert userswap("run", *RAM, "-c", code).returncode == python("-c", code).returncode


def test_start_up_is_light() -> None:
    """Seconds are for benchmarks; what makes start-up slow is what gets imported beyond NumPy."""
    listing = (
        "import sys; print(*(m for m in sys.modules if not m.startswith(('numpy', 'userswap', '_', 'encodings'))))"
    )
    plain = set(python("-c", "import numpy; " + listing).stdout.split())
    swapped = set(userswap("run", "--quiet", *RAM, "-c", listing).stdout.split())
    heavy = {"asyncio", "blosc2", "rich", "httpx", "multiprocessing", "sqlite3", "unittest", "xml", "email", "http"}
    extra = swapped - plain
    assert not {name for name in extra if name.partition(".")[0] in heavy}
    assert len(extra) < 40, sorted(extra)


def test_the_blosc2_package_is_never_imported() -> None:
    code = "import sys; print([name for name in sys.modules if name.split('.')[0] == 'blosc2'])"
    assert userswap("run", "--quiet", *RAM, "-c", code).stdout == "[]\n"


def test_help_and_version() -> None:
    assert "doctor" in userswap("--help").stdout
    assert "--min-array" in userswap("run", "--help").stdout
    assert "--json" in userswap("doctor", "--help").stdout
    assert re.fullmatch(r"userswap \S+\n", userswap("--version").stdout)


def test_doctor_says_that_userswap_runs_here() -> None:
    result = userswap("doctor")
    assert result.returncode == 0, result.stdout
    assert result.stderr == ""
    assert result.stdout.splitlines()[-1].startswith("userswap can run here")
    for name in (
        "userfaultfd",
        "default budget",
        "default swap",
        "NumPy",
        "Blosc2",
        "delivery",
        "SIGBUS, SIGSEGV",
        "max_map_count",
    ):
        assert re.search(rf"^(ok  |note)  {name} ", result.stdout, re.MULTILINE), name


def test_doctor_for_programs() -> None:
    result = userswap("doctor", "--json")
    found = json.loads(result.stdout)
    assert (result.returncode == 0) is found["able"]
    checks = {check["name"]: check for check in found["checks"]}
    assert platform.release() in checks["Linux"]["value"]
    assert all(check["state"] == "ok" or check["mend"] for check in found["checks"])


def test_doctor_notes_what_limits() -> None:
    limited = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_AS, (1 << 44, 1 << 44)); "
    code = limited + "os.execv(sys.executable, [sys.executable, '-m', 'userswap', 'doctor'])"
    result = python("-c", code)
    assert re.search(r"^note  address space +limited to 16 TiB$", result.stdout, re.MULTILINE)
    blocked = "import os, signal, sys; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGBUS]); "
    code = blocked + "os.execv(sys.executable, [sys.executable, '-m', 'userswap', 'doctor'])"
    result = python("-c", code)
    assert re.search(r"^note  SIGBUS +blocked", result.stdout, re.MULTILINE)
    assert result.returncode in (0, 1), "whatever userswap makes of it, doctor lives to tell"


def test_doctor_for_an_ordinary_user() -> None:
    if os.geteuid() != 0:
        pytest.skip("we are one: the other tests have shown it")
    code = (
        "import os, userswap.cli.doctor as doctor\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "print([check for check in doctor.userfaultfd() if check.state == 'problem'])"
    )
    assert python("-c", code).stdout == "[]\n"
