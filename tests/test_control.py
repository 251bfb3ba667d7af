"""The control socket: `userswap ps` and `userswap set`, and what becomes of bad messages and clients."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from support import userswap

BEGIN = """
import os, signal, sys, threading, time
import numpy as np
import userswap
MiB = 1 << 20
def wait_for_end():
    print("ready", flush=True)
    sys.stdin.readline()
"""
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture(autouse=True)
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory for the sockets of this test alone; a short one, as names of sockets may not be long."""
    runtime = Path(tempfile.mkdtemp(prefix="us-", dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    # Nor is anything else seen that runs with userswap just now.
    monkeypatch.setenv("USERSWAP_CONTROL_DIR", str(runtime / "userswap"))
    monkeypatch.delenv("USERSWAP_CONTROL", raising=False)
    yield runtime / "userswap"
    shutil.rmtree(runtime)


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a program and waits until it says that it is ready; ends them all by closing their standard input."""
    programs = []

    def begin(code: str, *options: str, **environment: str) -> subprocess.Popen[str]:
        how = ["-m", "userswap", "run", *options] if options else []
        program = subprocess.Popen(
            [sys.executable, *how, "-c", BEGIN + code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **environment},
        )
        programs.append(program)
        assert program.stdout is not None
        first = program.stdout.readline()
        assert first == "ready\n", (first, program.communicate()[1])
        return program

    yield begin
    for program in programs:
        with contextlib.suppress(OSError, ValueError):
            program.send_signal(signal.SIGCONT)
            program.communicate(timeout=20)
        program.kill()


def end(program: subprocess.Popen[str]) -> tuple[str, str]:
    """Let a program go on to its end, which is to be a good one; what it wrote meanwhile."""
    out, err = program.communicate("go on\n", timeout=60)
    assert program.returncode == 0, err
    return out, err


def listed() -> dict[int, Any]:
    """What `userswap ps --json` says, by process."""
    result = userswap("ps", "--json")
    assert (result.returncode, result.stderr) == (0, "")
    return {process["pid"]: process for process in json.loads(result.stdout)}


def count(program: subprocess.Popen[str], what: str) -> int:
    """Its threads ("task") or descriptors ("fd")."""
    return len(list(Path(f"/proc/{program.pid}/{what}").iterdir()))


def names(place: Path) -> list[str]:
    return [path.name for path in place.iterdir()]


def connect(place: Path, program: subprocess.Popen[str]) -> socket.socket:
    line = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    line.connect(str(place / str(program.pid)))
    line.settimeout(20)
    return line


def answer_to(line: socket.socket, text: bytes) -> Any:
    """What the program says to that, read to the end of the connection."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        line.sendall(text)
    answer = b""
    with contextlib.suppress(ConnectionResetError):
        while more := line.recv(1 << 16):
            answer += more
    line.close()
    assert answer.endswith(b"\n")
    return json.loads(answer)


ASK = b'{"userswap": 1, "do": "ps"}\n'
ARRAY = """
pool = userswap.Pool(ram=64 * MiB, swap="none")
array = pool.array(np.arange(12_000_000) // 100)
wait_for_end()
assert array.sum() == (np.arange(12_000_000) // 100).sum()
"""


# Until somebody writes a byte.
HOLD_THE_GIL = """
print("ready", flush=True)
ctypes.PyDLL(None).read(0, ctypes.create_string_buffer(1), 1)
wait_for_end()
"""


# ---- ps ----


def test_ps_shows_what_the_pool_says_itself(start: Start) -> None:
    program = start("""
pool = userswap.Pool(ram=64 * MiB, swap="none")
array = pool.array(np.arange(12_000_000) // 100)
wait_for_end()
import json
print(json.dumps(pool.stats().as_dict()))
""")
    shown = listed()[program.pid]
    table = userswap("ps")
    own = json.loads(end(program)[0])
    assert shown["answers"] is True
    assert shown["parent"] is None
    (pool,) = shown["pools"]
    steady = ("budget_bytes", "allowed_bytes", "virtual_bytes", "resident_bytes", "swapped_bytes", "faults")
    assert {key: pool[key] for key in steady} == {key: own[key] for key in steady}
    assert pool["swapped_bytes"] > 0
    head, row = table.stdout.splitlines()
    assert head.split()[:6] == ["PID", "BUDGET", "ALLOWED", "RESIDENT", "POOL", "SWAP"]
    ratio = f"{own['swapped_bytes'] / own['stored_bytes']:.1f}"
    assert row.split()[:3] == [str(program.pid), "64", "MiB"]
    assert f" {ratio}  " in row


def test_ps_lists_every_pool_under_a_number_and_none_that_is_closed_or_private(start: Start) -> None:
    program = start("""
pools = [userswap.Pool(ram=n * MiB, control=n != 48) for n in (32, 40, 48, 56)]
pools.pop(0).close()
wait_for_end()
""")
    hidden = start("pool = userswap.Pool(ram=32 * MiB)\nwait_for_end()", USERSWAP_CONTROL="0")
    closed = start("userswap.Pool(ram=32 * MiB).close()\nwait_for_end()")
    shown = listed()
    assert [(pool["pool"], pool["budget_bytes"] >> 20) for pool in shown[program.pid]["pools"]] == [(2, 40), (3, 56)]
    assert hidden.pid not in shown
    assert closed.pid not in shown
    names = [row.split()[0] for row in userswap("ps").stdout.splitlines()[1:]]
    assert names == [f"{program.pid}/2", f"{program.pid}/3"]


def test_ps_says_so_if_there_is_nothing(place: Path) -> None:
    result = userswap("ps")
    assert (result.returncode, result.stdout) == (0, "No program of yours can be reached that runs with userswap.\n")
    assert userswap("ps", "--json").stdout == "[]\n"


def test_ps_shows_the_command_without_what_a_terminal_obeys(start: Start) -> None:
    start("wait_for_end() # \x1b[2J", "--ram", "48M", "--quiet")
    shown = userswap("ps").stdout
    row = shown.removesuffix("\n").split("\n", 1)[1]
    assert "userswap run --ram 48M --quiet -c" in row
    assert "wait_for_end() # ?[2J" in row
    assert row.isprintable(), "one line, too"


def test_ps_watches_and_counts_faults(start: Start) -> None:
    program = start("""
pool = userswap.Pool(ram=64 * MiB, swap="none")
array = pool.array(np.arange(12_000_000) // 100)
stop = threading.Event()
def go():
    while not stop.is_set(): array.sum()
worker = threading.Thread(target=go)
worker.start()
wait_for_end()
stop.set()
""")
    with subprocess.Popen(
        [sys.executable, "-m", "userswap", "ps", "--watch"], stdout=subprocess.PIPE, text=True
    ) as watching:
        assert watching.stdout is not None
        lines = [watching.stdout.readline() for _ in range(4)]
        watching.send_signal(signal.SIGINT)
        watching.communicate(timeout=20)
    assert watching.returncode == 0
    assert "FAULTS/S" in lines[2]
    assert lines[3].split()[0] == str(program.pid)
    rate = lines[3].split("userswap")[0].split(" -c ")[0].split()[-2]
    assert int(rate.replace(",", "")) > 0, lines


def test_forked_children_have_a_socket_of_their_own_once_they_use_swapped_memory(start: Start, place: Path) -> None:
    program = start("""
pool = userswap.Pool(ram=64 * MiB, swap="none")
array = pool.array(np.arange(12_000_000) // 100)
hold, let_go = os.pipe()
said, say = os.pipe()
def child(does):
    pid = os.fork()
    if pid == 0:
        os.close(let_go)
        try:
            does()
            time.sleep(0.01)                   # a pending call is made between two instructions
            os.write(say, b"x")
            os.read(hold, 1)
        finally:
            os._exit(0)
    return pid
uses = child(lambda: array.sum())
idle = child(lambda: None)
makes = child(lambda: globals().update(second=userswap.Pool(ram=32 * MiB)))
os.close(say)
for _ in range(3): os.read(said, 1)
print("ready", flush=True)
print(uses, idle, makes, flush=True)
sys.stdin.readline()
os.close(let_go)
for pid in (uses, idle, makes): assert os.waitpid(pid, 0)[1] == 0
""")
    assert program.stdout is not None
    uses, idle, makes = map(int, program.stdout.readline().split())
    shown = listed()
    assert sorted(shown) == sorted([program.pid, uses, makes])
    assert shown[uses]["parent"] == shown[makes]["parent"] == program.pid
    assert [pool["pool"] for pool in shown[makes]["pools"]] == [1, 2]
    rows = userswap("ps").stdout.splitlines()[1:]
    assert rows[0].split()[0] == str(program.pid), "the parent first"
    assert all("└" in row for row in rows[1:])
    # the parent's is not served by anybody else
    for _ in range(8):
        assert answer_to(connect(place, program), ASK)["pid"] == program.pid
    assert userswap("set", f"{uses}", "ram=48M").returncode == 0
    shown = listed()
    assert shown[uses]["pools"][0]["budget_bytes"] == 48 << 20
    assert shown[program.pid]["pools"][0]["budget_bytes"] == 64 << 20
    assert idle not in shown
    end(program)


def test_a_child_does_not_keep_its_parents_socket(start: Start, place: Path) -> None:
    program = start("""
pool = userswap.Pool(ram=64 * MiB)
if os.fork() == 0:
    sys.stdin.readline()
    os._exit(0)
wait_for_end()
""")
    program.kill()
    program.wait()
    assert listed() == {}, "nobody listens to it, though the child lives"
    assert names(place) == []


# ---- set ----


def test_a_budget_is_lowered_and_raised_while_the_program_runs(start: Start) -> None:
    program = start("""
pool = userswap.Pool(ram=160 * MiB, swap="none")
array = pool.array(np.arange(16_000_000) // 100)
stop, wrong = threading.Event(), []
def go():
    at = 0
    while not stop.is_set():
        at = (at + 1) % 160
        part = array[at * 100_000 : at * 100_000 + 100_000]
        if part.sum() != at * 100_000_000 + 49_950_000: wrong.append(at)
worker = threading.Thread(target=go)
worker.start()
wait_for_end()
stop.set()
worker.join()
assert not wrong, wrong
""")

    def used() -> int:
        (pool,) = listed()[program.pid]["pools"]
        return int(pool["resident_bytes"] + pool["pool_bytes"] + pool["metadata_bytes"])

    assert used() > 120 << 20
    begun = time.monotonic()
    result = userswap("set", str(program.pid), "ram=48M")
    print(f"{time.monotonic() - begun:.2f} s with the start of the command")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{program.pid}: ram is 48 MiB now (was 160 MiB); ")
    assert used() <= 50 << 20
    assert userswap("set", f"{program.pid}/1", "ram=200M").returncode == 0
    (pool,) = listed()[program.pid]["pools"]
    assert pool["budget_bytes"] == 200 << 20
    for _ in range(100):
        if used() > 120 << 20:
            break
        time.sleep(0.1)
    assert used() > 120 << 20, "there is room, and what is used comes back"
    end(program)


def test_set_changes_all_or_nothing(start: Start) -> None:
    program = start(ARRAY)
    for values, sentence in (
        (["hard=yes", "ram=1"], "A budget of 1 B is too small to run: the least that works is"),
        (["hard=yes", "ram=lots"], "the budget (ram): 'lots' is not a size; write for example 512M"),
        (["hard=yes", "ram=-1"], "the budget (ram): '-1' is negative"),
        (["ram=48M", "hard=maybe"], "'maybe' is neither yes nor no: nothing was set."),
        (["ram=48M", "rum=1G"], "'rum' can't be set while a program runs; these can: ram, hard. Nothing was set."),
    ):
        result = userswap("set", str(program.pid), *values)
        assert result.returncode == 1
        assert result.stdout == ""
        assert result.stderr.startswith(f"userswap: {sentence}")
        assert result.stderr.count("\n") == 1
        (pool,) = listed()[program.pid]["pools"]
        assert (pool["budget_bytes"], pool["hard"]) == (64 << 20, False)
    result = userswap("set", str(program.pid), "ram=72M", "hard=yes")
    assert result.returncode == 0
    (pool,) = listed()[program.pid]["pools"]
    assert (pool["budget_bytes"], pool["hard"]) == (72 << 20, True)
    end(program)


def test_set_wants_to_know_which_of_several_pools(start: Start) -> None:
    program = start("pools = [userswap.Pool(ram=n * MiB) for n in (32, 40)]\nwait_for_end()")
    pid = program.pid
    result = userswap("set", str(pid), "ram=64M")
    assert result.returncode == 1
    assert result.stderr == f"userswap: Process {pid} has 2 pools: say which one, of {pid}/1, {pid}/2.\n"
    result = userswap("set", f"{pid}/3", "ram=64M")
    assert result.stderr == f"userswap: Process {pid} has no pool 3, only {pid}/1, {pid}/2.\n"
    assert userswap("set", f"{pid}/2", "ram=64M").returncode == 0
    assert [pool["budget_bytes"] >> 20 for pool in listed()[pid]["pools"]] == [32, 64]


@pytest.mark.parametrize(
    ("arguments", "code", "sentence"),
    [
        (["set"], 2, "The following arguments are required: PID, KEY=VALUE"),
        (["set", "ram=1G", "4711"], 2, "'ram=1G' is no process: write PID, or PID/N"),
        (["set", "4711/", "ram=1G"], 2, "'4711/' is no process"),
        (["set", "4711", "ram"], 2, "'ram' is not KEY=VALUE: write for example ram=1G."),
        (["set", "4711", "ram="], 2, "'ram=' is not KEY=VALUE"),
        (["set", "4711", "ram=1G", "ram=2G"], 2, "ram is there twice"),
        (["set", "9999999999", "ram=1G"], 1, "There is no process 9999999999 (any more)"),
        (["ps", "4711"], 2, "Unrecognized arguments: 4711"),
    ],
)
def test_command_lines_that_say_nothing_sensible(arguments: list[str], code: int, sentence: str) -> None:
    result = userswap(*arguments)
    assert (result.returncode, result.stdout) == (code, "")
    assert result.stderr.startswith(f"userswap: {sentence}")
    assert result.stderr.count("\n") == 1


def test_a_process_that_is_not_ours_to_ask(start: Start) -> None:
    plain = start("wait_for_end()")
    result = userswap("set", str(plain.pid), "ram=1G")
    assert result.returncode == 1
    assert result.stderr.startswith(f"userswap: Process {plain.pid} does not run under userswap, or has no pool yet, ")


# ---- swapon, swapoff ----

SWAPPED = """
pool = userswap.Pool(ram=48 * MiB, swap=PLACE)
array = pool.array(np.random.default_rng(1).random(8_000_000))
wait_for_end()
assert array.sum() == np.random.default_rng(1).random(8_000_000).sum()
print([(file.name, file.priority, file.tier) for file in pool.swaps()])
"""
# A swapoff that takes as long as somebody waits for it.
SLOW = """
def slow(pool, path, progress=None):
    try:
        for i in range(100000):
            progress(i << 20, 100000 << 20)
            time.sleep(0.01)
    finally:
        print("undone", flush=True)
userswap.Pool.swapoff = slow
pool = userswap.Pool(ram=48 * MiB)
wait_for_end()
"""


def test_swap_files_are_exchanged_while_the_program_runs(start: Start, tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    program = start(SWAPPED.replace("PLACE", repr(f"{first}:200M")))
    pid = str(program.pid)
    (pool,) = listed()[program.pid]["pools"]
    assert [(swap["name"], swap["state"]) for swap in pool["swaps"]] == [(str(first), "on")]
    assert pool["swaps"][0]["used_bytes"] > 10 << 20
    (tmp_path / "elsewhere").mkdir()
    result = userswap("swapon", pid, "fast=../second:200M:5", cwd=tmp_path / "elsewhere")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{pid}: {second} is in use (up to 200 MiB, priority 5, tier fast).\n"
    shown = userswap("ps", "--swaps").stdout
    assert f"    {second}: 0 B of 200 MiB, priority 5, tier fast, on\n" in shown
    result = userswap("swapoff", pid, "../first", cwd=tmp_path / "elsewhere")
    assert (result.returncode, result.stdout) == (0, f"{pid}: ../first is not used any more.\n")
    assert result.stderr == "" or " of " in result.stderr
    (pool,) = listed()[program.pid]["pools"]
    assert [swap["name"] for swap in pool["swaps"]] == [str(second)]
    assert pool["swaps"][0]["used_bytes"] > 10 << 20
    assert end(program) == (f"[({str(second)!r}, 5, 'fast')]\n", "")


def test_what_a_program_says_of_swapon_and_swapoff_is_said_here(start: Start, tmp_path: Path) -> None:
    program = start(SWAPPED.replace("PLACE", repr(f"{tmp_path}:200M")))
    pid = str(program.pid)
    for arguments, sentence in (
        (["swapoff", pid, str(tmp_path)], f"{tmp_path} can't be emptied"),
        (["swapoff", pid, "/nowhere"], "/nowhere is no swap file of this p"),
        (["swapon", pid, "/nowhere/at/all"], "/nowhere/at"),
        (["swapon", pid, f"{tmp_path}:1G"], f"{tmp_path}"),
    ):
        result = userswap(*arguments)
        assert (result.returncode, result.stdout) == (1, "")
        last = result.stderr.splitlines()[-1]
        assert last.startswith("userswap: ")
        assert sentence in last
        assert "Traceback" not in result.stderr
        (pool,) = listed()[program.pid]["pools"]
        assert [(swap["name"], swap["state"]) for swap in pool["swaps"]] == [(str(tmp_path), "on")]
    for arguments, sentence in (
        (["swapon", pid, "none"], "swapon of none is nothing to do"),
        (["swapon", pid, "/tmp:1"], "The size in --swap /tmp:1 is 1 B"),
        (["swapon", pid, "/tmp:1G:5000"], "The priority in --swap /tmp:1G:5000 is 5000"),
        (["swapoff", pid, ""], "Say which swap file"),
        (["swapoff", pid], "The following arguments are required: PATH"),
    ):
        result = userswap(*arguments)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(f"userswap: {sentence}"), result.stderr
    end(program)


def test_ctrl_c_has_a_swapoff_undone_and_meanwhile_the_program_answers(start: Start) -> None:
    program = start(SLOW)
    with subprocess.Popen(
        [sys.executable, "-m", "userswap", "swapoff", str(program.pid), "/some/file"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as client:
        assert client.stderr is not None
        assert client.stderr.readline() == "/some/file: 0 B of 97.7 GiB\n"
        assert listed()[program.pid]["answers"]
        assert userswap("set", str(program.pid), "ram=40M").returncode == 0
        assert client.poll() is None
        client.send_signal(signal.SIGINT)
        out, err = client.communicate(timeout=20)
    assert (client.returncode, out) == (130, "")
    assert "userswap: Stopped: /some/file is in use again; what has left it stays where it is now.\n" in err
    assert program.stdout is not None
    assert program.stdout.readline() == "undone\n"
    end(program)


def test_a_swapoff_is_undone_when_its_client_dies_or_its_program_ends(start: Start, place: Path) -> None:
    program = start(SLOW)
    assert program.stdout is not None
    ask = json.dumps({"userswap": 1, "do": "swapoff", "path": "/some/file"}).encode() + b"\n"
    line = connect(place, program)
    line.sendall(ask)
    assert json.loads(line.recv(1000).splitlines()[0]) == {"progress": [0, 100000 << 20]}
    line.close()
    assert program.stdout.readline() == "undone\n"
    line = connect(place, program)
    line.sendall(ask)
    assert line.recv(1000)
    out, err = end(program)
    assert (out, err) == ("undone\n", "")
    last = b""
    while more := line.recv(1 << 16):
        last += more
    assert json.loads(last.splitlines()[-1])["error"].startswith("Stopped: ")


def test_a_socket_says_who_listens_to_it(start: Start, place: Path) -> None:
    """What has the name of a process but is another's is not talked to; nor removed, as somebody listens."""
    plain = start("wait_for_end()")
    place.mkdir(mode=0o700)
    others = []
    for number in (plain.pid, 4999999):  # the second is no process here, but may be one elsewhere
        others.append(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
        others[-1].bind(str(place / str(number)))
        others[-1].listen()
    start(ARRAY)
    assert sorted(names(place), key=int)[-1] == "4999999"
    assert plain.pid not in listed()
    assert {str(plain.pid), "4999999"} < set(names(place))
    result = userswap("set", str(plain.pid), "ram=1G")
    assert result.returncode == 1
    assert (
        f"it is not process {plain.pid} that listens there, but {os.getpid()} of user {os.geteuid()}" in result.stderr
    )
    for other in others:
        other.close()


# ---- messages and clients that are not as they should be ----


def test_what_is_no_message_of_ours_does_nothing(start: Start, place: Path) -> None:
    program = start(ARRAY)
    set_ram = {"userswap": 1, "do": "set", "pool": None, "values": {"ram": "48M"}}
    for text, sentence in (
        (b"GET / HTTP/1.1\r\n\r\n", "This is no message of userswap's: nothing was done."),
        (bytes(range(256)) + b"\n", "This is no message of userswap's: nothing was done."),
        (b"\n", "This is no message of userswap's: nothing was done."),
        (b"[" * 20000 + b"\n", "This is no message of userswap's: nothing was done."),
        (b"[1, 2]\n", "This is no message of userswap's: nothing was done."),
        (b"1" * 6000 + b"\n", "This is no message of userswap's: nothing was done."),
        (b'{"do": "ps"}\n', "This is no message of userswap's: nothing was done."),
        (b'{"userswap": 2, "do": "ps"}\n', "The program speaks version 1 of userswap's messages, and was sent"),
        (
            b'{"userswap": 1, "do": "eval"}\n',
            "There is nothing called 'eval' to do here, only ps, set, ",
        ),
        (b'{"userswap": 1, "do": ["ps"]}\n', "There is nothing called ['ps'] to do here"),
        (b'{"userswap": 1}\n', "There is nothing called None to do here"),
        (b'{"userswap": 1, "do": "set"}\n', "Say what to set: there are ram, hard"),
        (b'{"userswap": 1, "do": "set", "values": {"ram": 5}}\n', "ram is to be a text such as 1G: nothing was set."),
        (b'{"userswap": 1, "do": "set", "values": ["ram"]}\n', "Say what to set"),
        (json.dumps(set_ram | {"pool": "1"}).encode() + b"\n", f"Process {program.pid} has no pool '1', only"),
        (json.dumps(set_ram | {"pool": [1]}).encode() + b"\n", f"Process {program.pid} has no pool [1], only"),
        (json.dumps(set_ram | {"pool": True}).encode() + b"\n", f"Process {program.pid} has no pool True, only"),
        (b"x" * 40000 + b"\n", "The message is longer than 32 KiB: nothing was done."),
        (b"x" * (32 << 10), "The message is longer than 32 KiB: nothing was done."),
    ):
        assert answer_to(connect(place, program), text)["error"].startswith(sentence), text[:60]
    (pool,) = listed()[program.pid]["pools"]
    assert pool["budget_bytes"] == 64 << 20
    assert end(program) == ("", "")


def test_a_message_may_come_in_pieces_but_must_come_to_its_end(start: Start, place: Path) -> None:
    program = start(ARRAY)
    line = connect(place, program)
    for byte in ASK[:-1]:
        line.send(bytes([byte]))
    assert answer_to(line, ASK[-1:])["pid"] == program.pid
    half = connect(place, program)
    half.send(b'{"userswap": 1, "do": "set", "values": {"ram": "48M"}}')
    half.shutdown(socket.SHUT_WR)
    assert answer_to(half, b"")["error"] == "The message ended before its line did: nothing was done."
    (pool,) = listed()[program.pid]["pools"]
    assert pool["budget_bytes"] == 64 << 20
    end(program)


def test_clients_that_hang_or_go_away_keep_nobody_from_being_served(start: Start, place: Path) -> None:
    program = start(ARRAY)
    descriptors = count(program, "fd")
    threads = count(program, "task")
    for _ in range(20):  # ask, and go away at once
        line = connect(place, program)
        line.sendall(ASK)
        line.close()
    idle = []
    for number in range(20):  # more than there are places for: some say nothing, some half a line
        idle.append(connect(place, program))
        idle[-1].sendall(ASK[: number % 2 * 9] or b"")
        if number == 10:
            assert listed()[program.pid]["answers"]
    assert listed()[program.pid]["answers"]
    assert answer_to(idle[0], b"")["error"].startswith("No whole message came within five seconds"), "made room"
    # the others are let go after a while
    assert answer_to(idle[-1], b"")["error"] == "No whole message came within five seconds: nothing was done."
    for line in idle[1:-1]:
        line.close()
    for _ in range(100):
        if count(program, "task") == threads:
            break
        time.sleep(0.05)
    assert count(program, "task") == threads
    assert count(program, "fd") == descriptors
    end(program)


def test_a_program_that_does_not_let_go_of_the_gil_or_is_stopped_keeps_ps_waiting_for_nobody(start: Start) -> None:
    well = start(ARRAY)
    busy = start("import ctypes\n" + ARRAY.replace("wait_for_end()", HOLD_THE_GIL))
    stopped = start(ARRAY)
    stopped.send_signal(signal.SIGSTOP)
    shown = listed()
    assert [shown[program.pid]["answers"] for program in (well, busy, stopped)] == [True, False, False]
    assert userswap("ps").stdout.count("(does not answer: busy or stopped)") == 2
    stopped.send_signal(signal.SIGCONT)
    assert busy.stdin is not None and busy.stdout is not None
    busy.stdin.write("x")
    busy.stdin.flush()
    assert busy.stdout.readline() == "ready\n"
    assert all(listed()[program.pid]["answers"] for program in (well, busy, stopped))
    for program in (well, busy, stopped):
        end(program)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_only_the_same_user_and_root_may_ask(start: Start, place: Path) -> None:
    program = start(ARRAY)
    assert (place.stat().st_mode & 0o7777, (place / str(program.pid)).stat().st_mode & 0o7777) == (0o700, 0o600)
    code = f"""
import os, socket, sys
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
line = socket.socket(socket.AF_UNIX)
try:
    line.connect({str(place / str(program.pid))!r})
except PermissionError:
    print("no way in")
    sys.exit()
try:
    line.sendall({ASK!r})
except (BrokenPipeError, ConnectionResetError):
    pass                # it has hung up already
print(line.recv(1000).decode(), end="")
"""
    other = [sys.executable, "-c", code]
    assert subprocess.run(other, capture_output=True, text=True, check=True).stdout == "no way in\n"
    for path in (place.parent, place):
        path.chmod(0o755)
    (place / str(program.pid)).chmod(0o666)
    refused = subprocess.run(other, capture_output=True, text=True, check=True).stdout
    assert json.loads(refused) == {"error": "This program belongs to another user."}
    place.chmod(0o700)
    # The command as that user does not even look.
    as_other = "import os\nfrom userswap.control.client import reach\n"
    as_other += "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
    as_other += f"reach({program.pid})"
    result = subprocess.run([sys.executable, "-c", as_other], capture_output=True, text=True, check=False)
    assert f"Process {program.pid} belongs to root: only root or root may do that." in result.stderr
    end(program)


def test_a_directory_that_others_can_enter_is_not_used(start: Start, place: Path) -> None:
    place.mkdir(mode=0o755)
    place.chmod(0o755)
    code = """
from userswap.control import listener, places
places.places = lambda uid: [os.environ["XDG_RUNTIME_DIR"] + "/userswap"]       # nor is any other
pool = userswap.Pool(ram=32 * MiB)
wait_for_end()
print(listener.path())
"""
    program = start(code)
    assert list(place.iterdir()) == []
    assert program.pid not in listed()
    result = subprocess.run(
        [sys.executable, "-c", f"from userswap.control.client import reach\nreach({program.pid})"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert end(program) == ("None\n", ""), "the program goes on without"
    assert "may be entered by others (mode 0755, and it should be 0700)" in result.stderr
    place.rmdir()
    (place.parent / "elsewhere").mkdir(mode=0o700)
    place.symlink_to(place.parent / "elsewhere")
    program = start(code)
    assert list(place.iterdir()) == [], "not where a link leads, either"
    assert end(program) == ("None\n", "")
    place.unlink()


# ---- the program notices nothing ----


def test_the_program_sees_no_thread_of_ours(start: Start, place: Path) -> None:
    program = start(
        """
wait_for_end()
for _ in range(100):                        # the last answer is sent before its thread has gone
    if len(sys._current_frames()) == 1: break
    time.sleep(0.05)
assert threading.enumerate() == [threading.main_thread()] and threading.active_count() == 1
assert list(sys._current_frames()) == [threading.main_thread().ident]
print(sorted({"json", "socket", "select"} & set(sys.modules)))
""",
        "--ram",
        "48M",
        "--quiet",
    )
    before = count(program, "task")
    for _ in range(10):
        answer_to(connect(place, program), ASK)
    for _ in range(100):
        if count(program, "task") == before:
            break
        time.sleep(0.05)
    assert end(program)[0] == "['json']\n"


def test_nothing_is_imported_as_long_as_nobody_asks(start: Start) -> None:
    program = start(
        """
wait_for_end()
print(sorted({"json", "socket", "select", "userswap.control.answers"} & set(sys.modules)))
""",
        "--ram",
        "48M",
        "--quiet",
    )
    assert end(program)[0] == "[]\n"


def test_a_program_that_closes_every_descriptor_and_changes_its_directory_is_still_reached(start: Start) -> None:
    program = start("""
pool = userswap.Pool(ram=64 * MiB)
os.closerange(3, 4096)
os.chdir("/")
for _ in range(10): os.dup2(os.open("/dev/null", os.O_RDONLY), 17)
wait_for_end()
""")
    assert userswap("set", str(program.pid), "ram=48M").returncode == 0
    end(program)


def test_a_daemon_is_reached_by_its_own_number(start: Start, place: Path) -> None:
    program = start("""
pool = userswap.Pool(ram=64 * MiB, swap="none")
array = pool.array(np.arange(12_000_000) // 100)
hold, let_go = os.pipe()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.close(let_go)
        os.chdir("/")
        array.sum()
        time.sleep(0.01)
        print("ready", flush=True)
        print(os.getpid(), flush=True)
        os.read(hold, 1)
        os._exit(0)
    os._exit(0)
os.wait()
sys.stdin.readline()
os.close(let_go)
""")
    assert program.stdout is not None
    daemon = int(program.stdout.readline())
    assert set(listed()) == {program.pid, daemon}
    assert userswap("set", str(daemon), "ram=48M").returncode == 0
    end(program)


def test_what_is_left_of_a_killed_or_replaced_process_is_removed(start: Start, place: Path) -> None:
    killed, replaced, lives = start(ARRAY), start(ARRAY), start(ARRAY)
    again = start("""
pool = userswap.Pool(ram=32 * MiB)
print("ready", flush=True)
sys.stdin.readline()
os.execv("/bin/sleep", ["sleep", "60"])
""")
    killed.kill()
    killed.wait()
    assert again.stdin is not None
    again.stdin.write("\n")
    again.stdin.flush()
    while "sleep" not in Path(f"/proc/{again.pid}/cmdline").read_text():
        time.sleep(0.01)
    end(replaced)
    assert sorted(map(int, names(place))) == sorted([killed.pid, lives.pid, again.pid]), "others"
    (place / "notes.txt").write_text("not ours")
    assert set(listed()) == {lives.pid}
    assert sorted(names(place)) == sorted([str(lives.pid), "notes.txt"])
    result = userswap("set", str(again.pid), "ram=1G")
    assert result.stderr.startswith(f"userswap: Process {again.pid} does not run under userswap")
    again.kill()
    # A new process cleans up, too; what listens it leaves.
    killed = start(ARRAY)
    killed.kill()
    killed.wait()
    other = start(ARRAY)
    assert sorted(names(place)) == sorted([str(lives.pid), str(other.pid), "notes.txt"])
    end(lives)
    end(other)


def test_a_fork_has_no_thread_of_ours_beside_it_even_while_messages_come(start: Start, place: Path) -> None:
    """Python 3.12 would warn. And no fork waits for a message, nor a message for a fork, for ever."""
    program = start("""
pool = userswap.Pool(ram=64 * MiB, swap="none")
array = pool.array(np.arange(4_000_000))
print("ready", flush=True)
right = 0
end = threading.Event()
reader = threading.Thread(target=lambda: (sys.stdin.readline(), end.set()))
reader.start()
while not end.is_set() or right <= 10:
    pid = os.fork()
    if pid == 0:
        os._exit(0 if array[::4096].sum() == np.arange(0, 4_000_000, 4096).sum() else 1)
    assert os.waitpid(pid, 0)[1] == 0
    right += 1
""")
    for _ in range(200):
        assert answer_to(connect(place, program), ASK)["pid"] == program.pid
    end(program)


def test_the_interpreter_ends_well_while_messages_come(start: Start, place: Path) -> None:
    """Neither a crash nor a wait; the exit functions of the program are called, and it has its own exit code."""
    for _ in range(3):
        program = start(
            """
import atexit
atexit.register(lambda: print("last words"))
print("ready", flush=True)
time.sleep(0.1)
sys.exit(7)
""",
            "--ram",
            "48M",
            "--quiet",
        )
        with contextlib.suppress(OSError):
            while True:
                line = connect(place, program)
                line.sendall(ASK)
                line.recv(1)
                line.close()
        out, err = program.communicate(timeout=20)
        assert (program.returncode, out, err) == (7, "last words\n", "")
        assert list(place.iterdir()) == []


def test_doctor_says_where_sockets_are_and_why_there_is_no_place(
    start: Start, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def said() -> dict[str, str]:
        checks = json.loads(userswap("doctor", "--json").stdout)["checks"]
        found: dict[str, str] = next(check for check in checks if check["name"] == "control sockets")
        return found

    program = start("pool = userswap.Pool(ram=32 * MiB)\nwait_for_end()")
    assert (said()["state"], said()["value"]) == ("ok", f"in {place}")
    assert (place / str(program.pid)).is_socket()
    place.chmod(0o755)
    assert said()["state"] == "note"
    assert f"{place} may be entered by others (mode 0755" in said()["value"]
    monkeypatch.setenv("USERSWAP_CONTROL", "0")
    assert said()["value"] == "none, as USERSWAP_CONTROL=0 says"
