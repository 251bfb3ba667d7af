"""Traces: what is recorded is what happened, a file holds it whole or is refused, and every design can do it again."""

from __future__ import annotations

import json
import os
import re
import threading
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import userswap
from helpers import data, fresh_pool, run_python
from support import python
from support import userswap as command
from userswap.cli import main
from userswap.errors import MapDesignError, TraceError
from userswap.lab import trace as traces
from userswap.lab.replay import once, replay, slots_for
from userswap.lab.trace import Trace
from userswap.swap.map import BOUND, CACHE, DEBUG, DESIGN_NAMES, SAME, SLOT, TRACED, ZSWAP, Map, entry, slot
from userswap.swap.traced import EVENTS

Event = tuple[str, int, int, int, int]
LESS = 20 if DEBUG else 1  # the debug build sleeps at transitions
designs = pytest.mark.parametrize("design", DESIGN_NAMES)
SORT = """
import numpy as np
a = np.cumsum(np.random.default_rng(1).integers(-9, 10, 3_000_000)) / 100
a.sort()
print(a[::500000], a.sum())
"""


def recorded(swap_map: Map) -> Trace:
    """End the recording of a window."""
    found = swap_map.trace()
    assert found is not None
    return Trace.of_columns(*found, "window", 1 << 20)


def events(trace: Trace) -> list[Event]:
    """Kind, ref, types before and after, value."""
    columns = zip(trace.kinds, trace.refs, trace.types, trace.values, strict=True)
    return [(EVENTS[kind], int(ref), int(types & 15), int(types >> 4), int(v)) for kind, ref, types, v in columns]


def made(*given: Event) -> Trace:
    """A trace of events by hand."""
    kinds = np.array([EVENTS.index(event[0]) for event in given], np.uint8)
    types = np.array([event[2] | event[3] << 4 for event in given], np.uint8)
    refs, values = np.array([event[1] for event in given], np.uint32), np.array([event[4] for event in given], np.int64)
    times = np.arange(len(given), dtype=np.int64) * 1000
    return Trace("hand.py", 1 << 25, 1 << 16, False, kinds, types, np.zeros(len(given), np.uint16), refs, times, values)


def again(trace: Trace, design: str) -> dict[str, Any]:
    """Replay, with the checks of a replay."""
    return dict(once(trace, design, slots_for(trace), "memory"))


HAND = made(
    ("alloc", 0, 0, ZSWAP, 0),
    ("run", 1, 0, SLOT, 32 | 15 << 35),
    ("more", 2, 0, SAME, 0),
    ("more", 3, 0, ZSWAP, 0),
    ("fault", 0, ZSWAP, ZSWAP, 0),
    ("dup", 0, 0, 0, 3),
    ("writeback", 0, ZSWAP, SLOT, 64 | 3 << 35),
    ("cache", 0, SLOT, SLOT, 64 | 3 << 35),
    ("cached", 0, 0, 0, 0),
    ("count", 0, 0, 0, 0),
    ("put", 0, 0, 0, 2),
    ("fault", 0, SLOT, SLOT, 64 | 3 << 35),
    ("uncache", 0, SLOT, SLOT, 64 | 3 << 35),
    ("move", 3, ZSWAP, ZSWAP, 0),
    ("fault", 3, ZSWAP, ZSWAP, 0),
    ("free", 0, 0, 0, 2),
    ("free", 2, 0, 0, 1),
    ("alloc", 0, 0, SAME, 0),
)


# ---- recording ----


def test_calls_become_events() -> None:
    swap_map = Map(TRACED, holders=100)
    swap_map.alloc(40, entry(ZSWAP, 7))
    assert swap_map.alloc_run(50, [entry(SAME), slot(2, 96, 3), entry(ZSWAP, 9)])
    swap_map.lock(40)
    swap_map.cache(40, 123)
    swap_map.unlock(40, entry(CACHE))
    swap_map.lock(40)
    swap_map.cache(40, 0)
    swap_map.unlock(40, entry(ZSWAP, 8))
    swap_map.lock(40)
    swap_map.cache(40, 5)
    swap_map.cache(40, 0)
    swap_map.unlock(40, entry(ZSWAP, 8))
    swap_map.dup(40, 41)
    with pytest.raises(OverflowError):
        swap_map.add(40, 1 << 62)
    assert (swap_map.count(40), swap_map.cached(40)) == (2, 0)
    owner = swap_map.owner(40)
    assert not swap_map.try_owner(owner, entry(ZSWAP, 7)), "what fails is no event"
    assert swap_map.try_owner(owner, entry(ZSWAP, 8))
    swap_map.put(41)
    swap_map.unlock_owner(owner, slot(0, 160, 2, False))
    assert swap_map.next(2)[0]
    swap_map.unlock_owner(swap_map.owner(51), entry(ZSWAP, 5))
    assert swap_map.try_owner(swap_map.owner(52), entry(ZSWAP, 9))
    swap_map.unlock_owner(swap_map.owner(52), entry(ZSWAP, 9))
    swap_map.put(40)
    swap_map.free(40)
    swap_map.alloc(70, entry(ZSWAP, 1))
    swap_map.lock(70)
    assert events(recorded(swap_map)) == [
        ("alloc", 0, 0, ZSWAP, 0),
        ("run", 1, 0, SAME, 0),
        ("more", 2, 0, SLOT, 96 | 2 << 35 | 1 << 40 | 2 << 41),
        ("more", 3, 0, ZSWAP, 0),
        ("cache", 0, ZSWAP, CACHE, 0),
        ("uncache", 0, CACHE, ZSWAP, 0),
        ("cache", 0, ZSWAP, ZSWAP, 0),
        ("uncache", 0, ZSWAP, ZSWAP, 0),
        ("dup", 0, 0, 0, 1),
        ("count", 0, 0, 0, 0),
        ("cached", 0, 0, 0, 0),
        ("put", 0, 0, 0, 1),
        ("writeback", 0, ZSWAP, SLOT, 160 | 1 << 35),
        ("move", 2, SLOT, ZSWAP, 0),
        ("free", 0, 0, 0, 1),
        ("alloc", 0, 0, ZSWAP, 0),
    ]


def test_nothing_is_recorded_after_the_end_and_all_works_on() -> None:
    swap_map = Map(TRACED)
    swap_map.alloc(0, entry(ZSWAP, 1))
    assert len(recorded(swap_map).kinds) == 1
    swap_map.alloc(1, entry(ZSWAP, 2))
    assert swap_map.alloc_run(2, [entry(SAME)] * 2)
    assert swap_map.lock(1) == entry(ZSWAP, 2)
    assert len(recorded(swap_map).kinds) == 1
    assert swap_map.ids() == 4


def test_other_designs_record_nothing() -> None:
    for design in DESIGN_NAMES:
        assert Map(design).trace() is None
    pool = fresh_pool()
    assert pool._core.trace() is None
    pool.close()


FULL = """
import numpy as np
from userswap.lab.trace import Trace, decode
from userswap.swap.map import TRACED, ZSWAP, Map, entry
from userswap.swap.traced import MOST_RECORDS

swap_map = Map(TRACED)
holders = np.arange(1 << 18, dtype=np.uint64)
swap_map.run("alloc", holders, entry(ZSWAP, 1))
for _ in range(MOST_RECORDS // (2 << 18) + 1):
    swap_map.run("fault", holders)
swap_map.run("take", holders)
assert swap_map.ids() == 0
columns, cut = swap_map.trace()
assert cut
trace = Trace.of_columns(columns, cut, "full", 1 << 20)
assert trace.live_at_end == len(holders)
assert trace.counts["fault"] == (MOST_RECORDS - len(holders)) // 2
assert decode(trace.encode(), "x").cut
found = Map(holders=len(holders)).replay(trace.kinds, trace.types, trace.refs, trace.values)
assert found["ids"] == len(holders)
"""


def test_a_full_tape_ends_the_recording_but_not_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USERSWAP_CHAOS", "0")  # millions of calls, none of them delayed
    done = run_python(FULL)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_forked_child_does_not_record() -> None:
    swap_map = Map(TRACED)
    swap_map.alloc(0, entry(ZSWAP, 1))
    child = os.fork()
    if child == 0:
        swap_map.alloc(1, entry(ZSWAP, 2))
        right = swap_map.lock(0) == entry(ZSWAP, 1) and len(recorded(swap_map).kinds) == 0
        os._exit(0 if right else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    swap_map.alloc(2, entry(ZSWAP, 3))
    assert len(recorded(swap_map).kinds) == 2


def test_a_trace_agrees_with_the_figures_of_the_pool(tmp_path: Path) -> None:
    pool = userswap.Pool("16MiB", f"{tmp_path}:256MiB", map_design=TRACED, dedupe=False)
    kept = [pool.array(data(kind, 6 << 20, i)) for i, kind in enumerate(("walk", "noise", "same", "walk", "small"))]
    for turn in range(2):
        for array in kept:
            array[::65536] += 1
            assert array.sum(dtype=np.int64) >= turn
    pool.writeback("2MiB")
    del kept[1]
    pool._core.compact()
    stats = pool.stats()
    trace = Trace.recorded(pool, "test")
    counts = trace.counts
    begun = counts["alloc"] + counts["run"] + counts["more"]
    assert stats.swap_outs == begun > 200
    assert stats.runs == counts["run"] > 0
    assert stats.swap_ins == counts["fault"] > 200
    assert stats.swap_ids == trace.live_at_end == begun - counts["free"] > 100
    stored = int(((trace.types & 15 == 0) & (trace.types >> 4 == SLOT)).sum())
    assert stats.writebacks == counts["writeback"] + stored > counts["writeback"] > 0
    assert stats.same_filled == int(((trace.types & 15 == 0) & (trace.types >> 4 == SAME)).sum()) > 50
    assert trace.budget_bytes == 16 << 20
    assert (np.diff(trace.times) >= 0).all()
    for design in DESIGN_NAMES:
        assert again(trace, design)["ids"] == stats.swap_ids
    for i, kind in enumerate(("walk", "same", "walk", "small")):
        right = data(kind, 6 << 20, (0, 2, 3, 4)[i])
        right[::65536] += 2
        assert (kept[i] == right).all()
    del kept
    pool.close()


def test_sharing_is_in_the_trace() -> None:
    pool = fresh_pool(map_design=TRACED)
    first = pool.array(data("walk", 4 << 20, 1))
    pool.evict()
    copy, kept = pool.array(first), pool.snapshot(first)
    pool.evict()
    assert (copy == kept).all()
    first += 1
    assert (copy == kept).all()
    pool.evict()
    stats = pool.stats()
    trace = Trace.recorded(pool, "test")
    counts = trace.counts
    duplicates = int(trace.values[trace.kinds == EVENTS.index("dup")].sum())
    assert duplicates == counts["dup"] == stats.deduped + len(first) // 65536 > 100
    assert counts["cache"] > 0
    assert counts["put"] > 50
    assert stats.swap_ids < trace.live_at_end + counts["dup"]
    assert trace.live_at_end == len(first) // 65536 * 2
    for design in DESIGN_NAMES:
        assert again(trace, design)["ids"] == trace.live_at_end
    del first, copy, kept
    pool.close()


# ---- threads that meet in a traced map: what they did in some order can be done again in that of the trace ----


def together(*work: Callable[[], Any]) -> list[Any]:
    results: list[Any] = [None] * len(work)

    def run(i: int) -> None:
        results[i] = work[i]()

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(work))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive()
    return results


def test_threads_that_share_ids_leave_a_trace_that_can_be_replayed() -> None:
    swap_map = Map(TRACED)
    n, workers = 12, 3
    base: npt.NDArray[np.uint64] = np.arange(n, dtype=np.uint64)
    for i in range(n):
        swap_map.alloc(i, entry(ZSWAP, i << 2))
    holders = [base + np.uint64(1000 * t) for t in range(workers)]
    for t in range(1, workers):
        swap_map.run("dup", base, into=holders[t])
    counters = np.zeros(n, np.int64)
    rounds = 60_000 // LESS

    def worker(t: int) -> Callable[[], Any]:
        return lambda: swap_map.stress(holders[t], counters, 10_000 + t * 1000, 500, rounds, t + 1)

    results = together(*(worker(t) for t in range(workers)))
    assert all(wrong == 0 for _, _, wrong in results)
    trace = recorded(swap_map)
    assert not trace.cut
    assert len(np.unique(trace.threads)) == workers + 1
    assert trace.live_at_end == swap_map.ids() == n
    assert (np.diff(trace.times) >= 0).all()
    for design in DESIGN_NAMES:
        assert again(trace, design)["ids"] == n


def test_the_last_of_two_puts_is_the_one_that_ends_the_id() -> None:
    swap_map = Map(TRACED)
    rounds, n = 500, 4
    mine, yours = (np.arange(rounds * n, dtype=np.uint64) + np.uint64(rounds * n * i) for i in range(2))
    swap_map.run("alloc", mine, entry(ZSWAP, 1))
    swap_map.run("dup", mine, into=yours)
    meet = threading.Barrier(2)

    def puts(holders: npt.NDArray[np.uint64]) -> None:
        for i in range(0, len(holders), n):
            meet.wait(60)
            swap_map.run("put", holders[i : i + n])
            swap_map.run("alloc", holders[i : i + n], entry(ZSWAP, 1))  # the ids are used again at once

    together(lambda: puts(mine), lambda: puts(yours))
    trace = recorded(swap_map)
    assert trace.counts == {"alloc": rounds * n * 3, "dup": rounds * n, "put": rounds * n, "free": rounds * n}
    for design in DESIGN_NAMES:
        assert again(trace, design)["ids"] == rounds * n * 2


def test_a_recording_that_ends_while_threads_are_at_work_is_whole() -> None:
    for turn in range(30):
        swap_map = Map(TRACED)
        holders = np.arange(2000, dtype=np.uint64)
        swap_map.run("alloc", holders, entry(ZSWAP, 1))
        rows = np.arange(4000, 4800, dtype=np.uint64)

        def runs(swap_map: Map = swap_map, rows: Any = rows) -> None:
            for _ in range(5):
                swap_map.run("run", rows, entry(SAME))
                swap_map.run("take", rows)

        def end(swap_map: Map = swap_map, turn: int = turn) -> Trace:
            time.sleep(turn / 10_000)
            return recorded(swap_map)

        def faults(swap_map: Map = swap_map, holders: Any = holders) -> None:
            for _ in range(5):
                swap_map.run("fault", holders)

        trace, _, _ = together(end, faults, runs)
        assert not trace.cut
        assert set(trace.counts) <= {"alloc", "run", "more", "fault", "free"}
        assert trace.counts.get("more", 0) == 15 * trace.counts.get("run", 0)
        for design in DESIGN_NAMES:
            assert again(trace, design)["ids"] == trace.live_at_end


def test_programs_and_movers_leave_a_trace_that_can_be_replayed() -> None:
    swap_map = Map(TRACED)
    swap_map.objects_for(400)
    rounds = 60_000 // LESS
    results = together(
        lambda: swap_map.program(0, 100, rounds, 1),
        lambda: swap_map.program(100, 100, rounds, 2),
        lambda: swap_map.mover(3),
        lambda: swap_map.mover(4),
    )
    assert all(result[-1] == 0 for result in results)
    trace = recorded(swap_map)
    moved = sum(result[0] for result in results[2:])
    assert trace.counts.get("move", 0) + trace.counts.get("writeback", 0) == moved > 0
    assert trace.counts["alloc"] == sum(result[1] for result in results[:2])
    for design in DESIGN_NAMES:
        assert again(trace, design)["ids"] == 0


# ---- files ----


def test_a_file_holds_a_trace() -> None:
    decoded = traces.decode(HAND.encode(), "x")
    assert events(decoded) == events(HAND)
    for name in ("program", "budget_bytes", "folio_bytes", "cut", "live_at_end", "peak_ids", "slots_end", "counts"):
        assert getattr(decoded, name) == getattr(HAND, name)
    assert (decoded.times == HAND.times).all()
    empty = traces.decode(made().encode(), "x")
    assert (len(empty.kinds), empty.live_at_end, empty.peak_ids, empty.slots_end) == (0, 0, 0, 0)
    late = replace(HAND, times=HAND.times * 5_000_000, threads=np.arange(18, dtype=np.uint16) * 500)
    decoded = traces.decode(late.encode(), "x")
    assert (decoded.times == late.times).all()
    assert (decoded.threads == late.threads).all()


def refused(content: bytes, tmp_path: Path) -> str:
    """What the command says of a file."""
    path = tmp_path / "some.trace"
    path.write_bytes(content)
    with pytest.raises(TraceError) as error:
        traces.read(path)
    assert "some.trace" in str(error.value)
    return str(error.value)


def test_a_cut_off_file_is_refused(tmp_path: Path) -> None:
    whole = HAND.encode()
    for length in [*range(1, 40), *range(40, len(whole), 7), len(whole) - 1]:
        assert "is cut off" in refused(whole[:length], tmp_path), length


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    whole = HAND.encode()
    body = whole.index(b"}\n") + 2
    for at in [*range(body, len(whole), 5), len(whole) - 1]:
        assert "is damaged" in refused(whole[:at] + bytes([whole[at] ^ 16]) + whole[at + 1 :], tmp_path)
    assert "is damaged" in refused(whole + b"x", tmp_path)
    assert "is damaged" in refused(whole.replace(b'"events": 18', b'"events": 19'), tmp_path)
    for wrong in (b"{", b"{}", b"[]", b'{"bytes": "many", "events": 1}'):
        assert "is damaged" in refused(b"userswap trace 1\n" + wrong + b"\n" + whole[body:], tmp_path)


def test_a_file_that_contradicts_itself_is_refused(tmp_path: Path) -> None:
    def resealed(old: bytes, new: bytes, whole: bytes) -> bytes:
        assert old in whole
        whole = whole[:-4].replace(old, new)
        return whole + zlib.crc32(whole).to_bytes(4, "little")

    whole = HAND.encode()
    assert traces.decode(resealed(b"hand.py", b"head.py", whole), "x").program == "head.py"
    for old, new in (
        (b'"events": 18', b'"events": 17'),
        (b'"live_at_end": 3', b'"live_at_end": 4'),
        (b'"peak_ids": 4', b'"peak_ids": 9'),
        (b'"dup": 1', b'"dup": 2'),
        (b'"tick_ns": 1000', b'"tick_ns": "x"'),
    ):
        assert "is damaged" in refused(resealed(old, new, whole), tmp_path)
    for wrong in (replace(HAND, refs=HAND.refs + 100), replace(HAND, kinds=HAND.kinds + 100)):
        assert "is damaged" in refused(wrong.encode() if wrong.kinds is HAND.kinds else unsafe(wrong), tmp_path)


def unsafe(trace: Trace) -> bytes:
    """A file with kinds that don't exist."""
    kinds = trace.kinds
    whole = HAND.encode()
    header = whole[: whole.index(b"}\n") + 2]
    body = zlib.decompress(whole[len(header) : -4])
    packed = zlib.compress(kinds.tobytes() + body[len(kinds) :], 9)
    header = re.sub(rb'"bytes": \d+', b'"bytes": %d' % len(packed), header)
    return header + packed + zlib.crc32(header + packed).to_bytes(4, "little")


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "is no trace" in refused(b"", tmp_path)
    assert "is no trace" in refused(b"\x89PNG\r\n", tmp_path)
    newer = HAND.encode().replace(b"userswap trace 1\n", b"userswap trace 2\n")
    assert "is of version 2" in refused(newer, tmp_path)
    with pytest.raises(TraceError, match="cannot be read"):
        traces.find(str(tmp_path))
    with pytest.raises(TraceError, match=r"name a file, or one of .*sort"):
        traces.find("nothing")


def test_the_command_says_what_is_wrong_with_a_trace(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(HAND.encode()[:-9])
    for arguments, sentence in (
        ([str(tmp_path / "bad")], r"The trace .*bad' is cut off: copy it again, or record it again\."),
        (["nothing"], r"There is no trace 'nothing': name a file, or one of .*sort.*\."),
        (["sort", "--designs", "sparse,wrong"], r"There is no design 'wrong' of the swap map, only .*sparse.*\."),
        (["sort", "--rounds", "0"], r"--rounds must be 1 or more\."),
        (["sort", "--json", "/nowhere/x"], r"--json '/nowhere/x' cannot be written .*"),
        ([], r"The following arguments are required: trace: see userswap lab replay --help\."),
    ):
        done = command("lab", "replay", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(f"userswap: {sentence}\n", done.stderr)
    assert command("lab").returncode == 2
    assert "There is no experiment" in command("lab", "wrong").stderr
    assert "replay" in command("lab", "--help").stdout


# ---- replay ----


@designs
def test_events_made_by_hand(design: str) -> None:
    found = again(HAND, design)
    assert found["ids"] == found["peak_ids"] - 1 == 3
    assert found["peak_metadata"] >= found["metadata_at_peak"] > 0


@designs
def test_the_shipped_traces(design: str) -> None:
    assert set(traces.shipped()) == {"groupby", "snapshots", "sort"}
    for name, path in traces.shipped().items():
        assert path.stat().st_size < 150_000
        trace = traces.find(name)
        assert not trace.cut
        assert trace.program == f"{name}.py"
        assert len(trace.kinds) > 10_000
        found = again(trace, design)
        assert (found["ids"], found["peak_ids"]) == (trace.live_at_end, trace.peak_ids)


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ([("fault", 0, ZSWAP, ZSWAP, 0)], "event 0: the holder has no id"),
        ([("alloc", 0, 0, ZSWAP, 0)] * 2, "event 1: the holder has an id"),
        ([("alloc", 0, 0, 0, 0)], "event 0: the entry is of no type"),
        ([("alloc", 0, 0, CACHE, 0)], "event 0: the entry is of no type"),
        ([("alloc", 0, 0, ZSWAP, 0), ("fault", 0, SAME, SAME, 0)], "event 1: the entry is another one"),
        ([("alloc", 0, 0, ZSWAP, 0), ("fault", 0, ZSWAP, 0, 0)], "event 1: the entry is of no type"),
        ([("alloc", 0, 0, ZSWAP, 0), ("fault", 0, ZSWAP, 5, 0)], "event 1: the entry is of no type"),
        ([("alloc", 0, 0, ZSWAP, 0), ("writeback", 0, ZSWAP, ZSWAP, 0)], "event 1: the entry is another one"),
        ([("alloc", 0, 0, ZSWAP, 0), ("move", 0, SAME, ZSWAP, 0)], "event 1: the entry is another one"),
        ([("alloc", 0, 0, ZSWAP, 0), ("put", 0, 0, 0, 1)], "event 1: there are not so many references"),
        ([("alloc", 0, 0, ZSWAP, 0), ("free", 0, 0, 0, 2)], "event 1: there are not so many references"),
        ([("alloc", 0, 0, ZSWAP, 0), ("dup", 0, 0, 0, 0)], "event 1: there are not so many references"),
        ([("run", 0, 0, ZSWAP, 0), ("more", 2, 0, ZSWAP, 0)], "event 0: a run is"),
        ([("alloc", 0, 0, ZSWAP, 0), ("more", 1, 0, ZSWAP, 0)], "event 0: a run is"),
        ([("more", 0, 0, ZSWAP, 0)], "event 0: the holder has no id"),
        ([("run", 0, 0, ZSWAP, 0)] + [("more", i, 0, ZSWAP, 0) for i in range(1, 33)], "event 0: a run is"),
        ([("fault", 1 << 31, ZSWAP, ZSWAP, 0)], "more than there are holders"),
    ],
)
def test_events_that_make_no_sense(given: list[Event], what: str) -> None:
    trace = made(*given)
    with pytest.raises(ValueError, match=what):
        Map(holders=100).replay(trace.kinds, trace.types, trace.refs, trace.values)


def test_a_replay_needs_a_fresh_map_and_whole_columns() -> None:
    swap_map = Map()
    columns = (HAND.kinds, HAND.types, HAND.refs, HAND.values)
    swap_map.replay(*columns)
    with pytest.raises(ValueError, match="fresh"):
        swap_map.replay(*columns)
    with pytest.raises(ValueError, match="one length"):
        Map().replay(HAND.kinds, HAND.types, HAND.refs[1:], HAND.values)
    with pytest.raises(ValueError, match="of no kind"):
        Map().replay(HAND.kinds + np.uint8(100), HAND.types, HAND.refs, HAND.values)


def test_a_replay_reports_every_kind_and_every_round() -> None:
    seen: list[str] = []
    report = replay(HAND, DESIGN_NAMES, 2, seen.append)
    assert len(seen) == 3 * len(DESIGN_NAMES)
    for result in report.designs.values():
        assert result.refused == ""
        assert len(result.total) == 2
        assert all(0 < ns < 1e6 for ns in result.total)
        assert set(result.kinds) == set(HAND.counts) - {"more"}
        assert all(len(values) == 2 and sum(values) >= 0 for values in result.kinds.values())
        assert result.bytes_per_id * 4 <= result.peak_metadata


def test_a_design_that_cannot_replay_says_so(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    most = made(("alloc", 0, 0, ZSWAP, 0), ("dup", 0, 0, 0, (1 << 63) - 1))
    report = replay(most, DESIGN_NAMES, 1, lambda text: None)
    assert all("event 1: a swap count of" in result.refused for result in report.designs.values())
    monkeypatch.setattr("userswap.lab.trace.find", lambda name: most)
    assert main.main(["lab", "replay", "x", "--rounds", "1"]) == 0
    assert "sparse can't: event 1: a swap count of sparse goes to" in " ".join(capsys.readouterr().out.split())


def test_a_wrong_replay_ends_in_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    wrong = made(("alloc", 0, 0, ZSWAP, 0), ("fault", 0, SAME, SAME, 0))
    monkeypatch.setattr("userswap.lab.trace.find", lambda name: wrong)
    assert main.main(["lab", "replay", "x"]) == 2
    said = "userswap: The trace of hand.py can't be replayed under on_demand: event 1: the entry is another one.\n"
    assert capsys.readouterr().err == said
    missing = replace(HAND, program="p.py")
    object.__setattr__(missing, "live", HAND.live + 1)
    with pytest.raises(TraceError, match="has 3 ids at the end, the trace has 4"):
        replay(missing, ["sparse"], 1, lambda text: None)


def test_lab_replay_writes_figures(tmp_path: Path) -> None:
    figures = tmp_path / "figures.json"
    done = command("lab", "replay", "groupby", "--rounds", "1", "--designs", "sparse", "--json", str(figures))
    assert (done.returncode, done.stderr) == (0, "")
    assert "groupby.py in 48 MiB" in done.stdout
    assert "on_demand" not in done.stdout
    told = json.loads(figures.read_text())
    trace = traces.find("groupby")
    assert told["counts"] == trace.counts
    assert told["events"] == sum(trace.counts.values())
    [(name, design)] = told["designs"].items()
    assert name == "sparse"
    assert set(design["ns_by_kind"]) == set(trace.counts) - {"more"}
    assert design["peak_metadata_bytes"] >= design["bytes_per_id"] * told["peak_ids"] > 8 * told["peak_ids"]
    assert f"{design['ns_per_event']['median']:.1f}" in done.stdout


# ---- userswap run ----


def test_a_traced_program_prints_the_same(tmp_path: Path) -> None:
    program, trace_file, stats_file = tmp_path / "sorter.py", tmp_path / "out.trace", tmp_path / "stats"
    program.write_text(SORT)
    plain = python(str(program))
    options = ["--ram", "16M", "--swap", "none", "--no-dedupe", "--trace", str(trace_file), "--stats", str(stats_file)]
    traced = command("run", *options, str(program))
    assert (traced.stdout, traced.returncode) == (plain.stdout, 0)
    trace, stats = traces.read(trace_file), json.loads(stats_file.read_text())
    assert f"trace      {len(trace.kinds):,} events\n" in traced.stderr
    assert (trace.program, trace.budget_bytes, trace.cut) == ("sorter.py", 16 << 20, False)
    allocs = sum(trace.counts[kind] for kind in ("alloc", "run", "more"))
    assert 100 < stats["swap_outs"] <= allocs <= stats["swap_outs"] + stats["part_outs"]
    assert trace.counts["fault"] >= stats["swap_ins"] + stats["part_ins"] > 100
    assert 0 < trace.times[-1] < (stats["seconds"] + 1) * 1e9
    for design in DESIGN_NAMES:
        assert again(trace, design)["ids"] == trace.live_at_end


FORKS = """
import os, sys, threading
import numpy as np
parts = [np.full(1 << 19, i) + np.arange(1 << 19) for i in range(6)]
def work(i):
    for _ in range(3):
        parts[i] += i
threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
for thread in threads: thread.start()
sys.stdout.flush()
children = []
for i in range(2):
    children.append(os.fork())
    if children[-1] == 0:
        print(i, int(np.sort(np.arange(1 << 21)[::-1]).sum()), flush=True)
        sys.exit(3)
    os.waitpid(children[-1], 0)
for thread in threads: thread.join()
print([int(part.sum()) for part in parts])
"""


def test_threads_and_forks_while_tracing(tmp_path: Path) -> None:
    trace_file = tmp_path / "out.trace"
    plain = python("-c", FORKS)
    traced = command("run", "--ram", "16M", "--quiet", "--trace", str(trace_file), "-c", FORKS)
    assert (traced.stdout, traced.stderr, traced.returncode) == (plain.stdout, "", 0)
    trace = traces.read(trace_file)
    assert trace.program == "-c"
    assert len(np.unique(trace.threads)) > 2
    assert [path.name for path in tmp_path.iterdir()] == ["out.trace"]
    for design in DESIGN_NAMES:
        again(trace, design)


@pytest.fixture(scope="module")
def sorted_plainly() -> str:
    """What SORT prints under plain Python."""
    plain = python("-c", SORT)
    assert plain.returncode == 0
    return plain.stdout


@designs
def test_programs_run_under_every_design(sorted_plainly: str, design: str) -> None:
    swapped = command("run", "--ram", "16M", "--swap", "/var/tmp:64M", "--map", design, "-c", SORT)
    assert (swapped.stdout, swapped.returncode) == (sorted_plainly, 0)
    assert "at once in 16 MiB of RAM" in swapped.stderr


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    same = str(tmp_path / "same")
    for options, sentence in (
        (["--map", "wrong"], f"There is no design 'wrong' of the swap map, only {', '.join(DESIGN_NAMES)}."),
        (["--map", ""], f"There is no design '' of the swap map, only {', '.join(DESIGN_NAMES)}."),
        (
            ["--map", "sparse", "--trace", same],
            "--trace records under a design of its own, so that any can replay it: leave out --map.",
        ),
        (
            ["--map", "traced"],
            "To record what is asked of the swap map, write --trace FILE instead of --map traced.",
        ),
        (["--stats", same, "--trace", same], "--stats and --trace name the same file: name two."),
        (
            ["--trace", "/nowhere/x"],
            "--trace '/nowhere/x' cannot be written (No such file or directory): name another file with --trace.",
        ),
    ):
        done = command("run", *options, "-c", "print('never')")
        assert (done.stdout, done.stderr, done.returncode) == ("", f"userswap: {sentence}\n", 2)


def test_a_design_whose_ids_are_slots_needs_a_swap_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("userswap.pool.BOUND", frozenset([*BOUND, "sparse"]))
    for make in (userswap.Pool, userswap.install):
        with pytest.raises(MapDesignError, match=r"In the design sparse swap ids are slots of a swap file.*on_demand"):
            make("16MiB", "none", map_design="sparse")
    userswap.Pool("16MiB", "/var/tmp:64M", map_design="sparse").close()


def test_a_full_disk_costs_the_trace_only(tmp_path: Path) -> None:
    done = command("run", "--ram", "128M", "--trace", "/dev/full", "-c", "print(1)")
    assert (done.stdout, done.returncode) == ("1\n", 0)
    assert "userswap: --trace /dev/full could not be written (No space left on device).\n" in done.stderr
