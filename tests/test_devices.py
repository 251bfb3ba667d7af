"""Several swap files: priorities, turns, tiers, and swapon and swapoff while everything goes on."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

import userswap
from helpers import FOLIO, check_pool, data, fresh_pool, run_python
from support import mounted
from userswap.backends.swapfile import inject
from userswap.errors import BadSize, MapDesignError, SwapOffError, SwapPathError, TierError
from userswap.swap.map import BOUND
from userswap.swapfiles import SwapSpec, parse_swap, parse_swaps
from userswap.tiers import Tiers

MIB = 1 << 20
Array = npt.NDArray[np.uint8]
DESIGN = os.environ.get("USERSWAP_MAP", "on_demand")
unbound = pytest.mark.skipif(DESIGN in BOUND, reason="this design has one swap file")


# ---- what is written on a command line ----


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        ("/d:8G:5", SwapSpec("/d", 8 << 30, 5)),
        ("/d:8G:-5", SwapSpec("/d", 8 << 30, -5)),
        ("/d::10", SwapSpec("/d", None, 10)),
        ("ssd=/d", SwapSpec("/d", None, 0, "ssd")),
        ("slow-2=/a:b:4M:-1", SwapSpec("/a:b", 4 << 20, -1, "slow-2")),
        ("./a=b:4M", SwapSpec("./a=b", 4 << 20)),
        ("/a=b", SwapSpec("/a=b", None)),
        ("/a:1G/b:4M:1000", SwapSpec("/a:1G/b", 4 << 20, 1000)),
    ],
)
def test_specs(text: str, spec: SwapSpec) -> None:
    assert parse_swap(text) == spec


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("/d:8G:1001", SwapPathError, "between -1000 and 1000"),
        ("/d:8G:high", SwapPathError, "'high', which is no whole number"),
        ("/d:8G:1.5", SwapPathError, "no whole number"),
        ("zswap=/d", TierError, "means something else"),
        ("none=/d", TierError, "means something else"),
        ("SSD=/d", TierError, "no name of a tier.*small letter"),
        ("=/d", TierError, "no name of a tier"),
        ("ssd=", SwapPathError, "names no path"),
        ("ssd=:8G:1", SwapPathError, "names no path"),
        ("/d:1M:1", BadSize, "at least"),
    ],
)
def test_bad_specs(text: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        parse_swap(text)


def test_several_specs(tmp_path: Path) -> None:
    assert [spec.path for spec in parse_swaps([f"{tmp_path}/a", f"{tmp_path}/b:8M:1"])] == [
        f"{tmp_path}/a",
        f"{tmp_path}/b",
    ]
    assert parse_swaps("none") == parse_swaps(["none"]) == parse_swaps([]) == []
    with pytest.raises(SwapPathError, match="can't both be had"):
        parse_swaps(["none", str(tmp_path)])
    (tmp_path / "here").mkdir()
    (tmp_path / "there").symlink_to(tmp_path / "here")
    for one, other in (("here", "here"), ("here", "there"), ("here/swap", "there/swap"), ("new", "./new")):
        with pytest.raises(SwapPathError, match="swap file of this program already"):
            parse_swaps([f"{tmp_path}/{one}", f"{tmp_path}/{other}:8M:3"])
    (tmp_path / "one").touch()
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    with pytest.raises(SwapPathError, match=rf"it is {tmp_path}/one"):
        parse_swaps([tmp_path / "one", tmp_path / "two"])


def test_names_of_tiers() -> None:
    tiers = Tiers()
    tiers.add(
        [SwapSpec("/a", None), SwapSpec("/b", None, 10), SwapSpec("/c", None, 10, "fast"), SwapSpec("/d", None, -2)]
    )
    assert [tiers.name(priority) for priority in (0, 10, -2)] == ["file", "fast", "file-2"]
    assert tiers.policy(None) == 511
    assert tiers.policy("zswap") == 1
    assert tiers.policy("zswap, fast") == 1 | 1 << tiers.bit(10)
    for text in ("", "slow", "zswap,", "zswap,slow"):
        with pytest.raises(TierError, match="only zswap, file, fast, file-2"):
            tiers.policy(text)
    with pytest.raises(TierError, match="Priority 10 is the tier fast already"):
        tiers.add([SwapSpec("/e", None, 10, "ssd")])
    with pytest.raises(TierError, match="The tier fast has priority 3 and can't have 10, too"):
        tiers.add([SwapSpec("/e", None, 3, "fast")])
    with pytest.raises(TierError, match="8 tiers"):
        tiers.add([SwapSpec("/e", None, priority) for priority in range(20, 26)])
    tiers.add([SwapSpec("/e", None, 3)])
    assert tiers.name(3) == "file3"


def test_a_bad_one_of_several_leaves_nothing_open(tmp_path: Path) -> None:
    fresh_pool(swap="none" if DESIGN not in BOUND else str(tmp_path)).close()
    (tmp_path / "mine").write_text("years of work")
    before = sorted(path.name for path in Path("/proc/self/fd").iterdir())
    with pytest.raises(SwapPathError, match="holds 13 B"):
        userswap.Pool(ram="32MiB", swap=[f"{tmp_path}/a:8M", f"{tmp_path}/mine:8M"])
    assert sorted(path.name for path in Path("/proc/self/fd").iterdir()) == before
    assert (tmp_path / "mine").read_text() == "years of work"


def test_designs_with_one_swap_file_say_so(tmp_path: Path) -> None:
    design = sorted(BOUND)[0]
    with pytest.raises(MapDesignError, match="one, and no more"):
        userswap.Pool(ram="32MiB", swap=[f"{tmp_path}/a:8M", f"{tmp_path}/b:8M"], map_design=design)
    pool = userswap.Pool(ram="32MiB", swap=f"{tmp_path}/a:8M", map_design=design)
    for change in (lambda: pool.swapon(f"{tmp_path}/b:8M"), lambda: pool.swapoff(f"{tmp_path}/a")):
        with pytest.raises(MapDesignError, match="one swap file"):
            change()
    assert [file.state for file in pool.swaps()] == ["on"]


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting file systems needs root")
def test_tmpfs_is_refused_and_a_network_warned_of(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with mounted(tmp_path / "ram", "-t", "tmpfs", "tmpfs") as ram, pytest.raises(SwapPathError, match="kept in memory"):
        fresh_pool(swap=[f"{tmp_path}:8M", f"{ram}:8M"])
    from userswap import swapfiles

    kind = swapfiles.file_system(tmp_path)[0]
    monkeypatch.setitem(swapfiles.NETWORK, kind, "NFS")
    fresh_pool(swap=f"{tmp_path}:64M").close()
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and f"{tmp_path} is on a network file system (NFS)" in said


# ---- where data goes ----


def noise(pool: userswap.Pool, folios: int, seed: int = 1, **options: Any) -> Array:
    """Incompressible folios, all of them out."""
    array = pool.array(data("noise", folios * FOLIO, seed), **options)
    while pool.evict():
        pass
    return array


def used(pool: userswap.Pool) -> dict[str, int]:
    """Bytes in use, by the last part of the path."""
    return {Path(file.name).name: file.used_bytes for file in pool.swaps()}


def places(directory: Path, *specs: str) -> list[str]:
    """Swap files with these names, sizes and priorities."""
    return [f"{directory}/{spec}" for spec in specs]


@unbound
def test_higher_priorities_first_then_the_next(tmp_path: Path) -> None:
    with fresh_pool(swap=places(tmp_path, "low:64M:-1", "high:4M:5", "middle:4M")) as pool:
        assert [Path(file.name).name for file in pool.swaps()] == ["high", "middle", "low"]
        array = noise(pool, 32)
        assert used(pool) == {"high": 2 * MIB, "middle": 0, "low": 0}
        more = noise(pool, 112, 2)
        assert used(pool) == {"high": 4 * MIB, "middle": 4 * MIB, "low": MIB}
        assert (array == data("noise", len(array), 1)).all()
        assert (more == data("noise", len(more), 2)).all()
        check_pool(pool)
        while pool.evict():
            pass
        del array, more
        assert used(pool) == {"high": 0, "middle": 0, "low": 0}


@unbound
def test_equal_ones_by_turns_a_batch_at_a_time(tmp_path: Path) -> None:
    with fresh_pool(swap=places(tmp_path, "a:64M", "b:64M", "c:64M")) as pool:
        arrays = [noise(pool, 16, seed) for seed in range(12)]  # 1 MiB each
        assert used(pool) == {"a": 4 * MIB, "b": 4 * MIB, "c": 4 * MIB}
        one = arrays[0].__array_interface__["data"][0]
        assert one, "it has a place"
        written = [file.written_bytes for file in pool.swaps()]
        assert written == [4 * MIB] * 3
        for seed, array in enumerate(arrays):
            assert (array == data("noise", len(array), seed)).all()
        assert sum(file.read_bytes for file in pool.swaps()) >= 12 * MIB
        check_pool(pool)


@unbound
def test_what_is_written_back_is_gathered_to_a_mebibyte(tmp_path: Path) -> None:
    """A trace of system calls would be better, and is not always allowed: io counts them."""

    def writes() -> int:
        return next(int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines() if "syscw" in line)

    with fresh_pool("256MiB", swap=places(tmp_path, "a:256M")) as pool:
        array = pool.array(data("small", 64 * MIB, 1))
        while pool.evict():
            pass
        packed = pool.stats().pool_bytes
        assert pool.stats().writebacks == 0 and packed > 4 * MIB
        before = writes()
        pool.writeback()
        assert used(pool)["a"] >= packed * 0.9
        assert writes() - before <= -(-used(pool)["a"] // MIB) + 2, "a mebibyte a write"
        assert (array == data("small", len(array), 1)).all()


# ---- tiers ----


@unbound
def test_policies(tmp_path: Path) -> None:
    specs = ["ssd=" + str(tmp_path / "s") + ":64M:1", "hdd=" + str(tmp_path / "h") + ":64M"]
    with fresh_pool("32MiB", swap=specs) as pool:
        ram = pool.array(data("walk", 4 * MIB, 1), tiers="zswap")
        ssd = pool.array(data("walk", 4 * MIB, 2), tiers="ssd")
        hdd = pool.array(data("walk", 4 * MIB, 3), tiers="hdd")
        both = pool.array(data("walk", 4 * MIB, 4), tiers="zswap,hdd")
        while pool.evict():
            pass
        first = used(pool)
        assert 0 < first["s"] < 4 * MIB and 0 < first["h"] < 4 * MIB, "packed, straight to their tiers"
        pool._core.compact()
        in_zswap = pool.stats().pool_bytes
        pool.writeback()
        pool._core.compact()
        then = used(pool)
        assert then["s"] == first["s"]
        assert then["h"] > first["h"] * 1.8, "and what may be in both has moved"
        assert in_zswap * 0.4 < pool.stats().pool_bytes < in_zswap * 0.6, "what may be in zswap only has not"
        check_pool(pool)
        copy = pool.snapshot(hdd)
        copy[::FOLIO] += 1
        while pool.evict():
            pass
        assert used(pool)["h"] > then["h"] + first["h"] * 0.8, "a snapshot keeps to the tiers of its array"
        for _ in range(3):  # what comes back often would be promoted to zswap
            assert (ssd == data("walk", len(ssd), 2)).all()
            while pool.evict():
                pass
        assert used(pool)["s"] == first["s"] and pool.stats().promotions == 0
        for array, seed in ((ram, 1), (ssd, 2), (hdd, 3), (both, 4)):
            assert (array == data("walk", len(array), seed)).all()
        check_pool(pool)


@unbound
def test_identical_folios_of_different_policies_are_not_shared(tmp_path: Path) -> None:
    with fresh_pool("32MiB", swap=[f"ssd={tmp_path}/s:64M"]) as pool:
        one = pool.array(data("walk", 2 * MIB, 1), tiers="zswap")
        pool.evict()
        pool.evict()
        two = pool.array(data("walk", 2 * MIB, 1), tiers="ssd")
        while pool.evict():
            pass
        stats = pool.stats()
        assert stats.deduped == 0 and stats.slot_bytes > 0 and stats.pool_bytes > 0
        three = pool.array(data("walk", 2 * MIB, 1), tiers="ssd")
        while pool.evict():
            pass
        assert pool.stats().deduped == 32
        assert (one == two).all() and (two == three).all()
        check_pool(pool)


@unbound
def test_a_pool_of_zswap_alone_never_writes(tmp_path: Path) -> None:
    with fresh_pool("32MiB", swap=f"{tmp_path}/s:64M", tiers="zswap") as pool:
        array = pool.array(data("walk", 24 * MIB, 1))
        while pool.evict():
            pass
        assert pool.writeback() == 0, "nothing is tried in vain"
        assert pool.swaps()[0].written_bytes == 0
        assert (array == data("walk", len(array), 1)).all()


@unbound
@pytest.mark.parametrize("kind", ["noise", "walk"])
def test_a_tier_that_is_nearly_full_moves_its_oldest_down(tmp_path: Path, kind: str) -> None:
    with fresh_pool("48MiB", swap=places(tmp_path, "fast:32M:1", "slow:256M")) as pool:
        length = 30 * MIB if kind == "noise" else 60 * MIB
        array = pool.array(data(kind, length, 1), tiers="file1,file")
        while pool.evict():
            pass
        assert used(pool)["fast"] > 32 * MIB * 0.75
        deadline = time.monotonic() + 20
        while used(pool)["fast"] > 32 * MIB * 0.81 and time.monotonic() < deadline:
            array[-8 * FOLIO :: 4096] += 0  # faults are what asks the thread
            pool.evict()
        assert 32 * MIB * 0.65 < used(pool)["fast"] <= 32 * MIB * 0.81
        assert used(pool)["slow"] > 2 * MIB
        assert pool.stats().demotions > 0
        while pool.evict():
            pass
        before = pool.stats().demotions
        # what was written first is what has gone, and by number it was the first cluster
        slow = pool.swaps()[1].read_bytes
        assert array[8 * FOLIO] == data(kind, len(array), 1)[8 * FOLIO]
        assert pool.swaps()[1].read_bytes > slow
        assert (array == data(kind, len(array), 1)).all()
        assert pool.stats().demotions >= before
        check_pool(pool)


@unbound
@pytest.mark.parametrize("encrypt", [False, True])
@pytest.mark.parametrize(("kind", "step"), [("noise", 1), ("walk", 1), ("walk", 4096)])
def test_what_is_wanted_again_and_again_moves_up_to_the_fast_file(
    tmp_path: Path, kind: str, step: int, encrypt: bool
) -> None:
    specs = places(tmp_path, "fast:32M:1", "slow:256M")
    with fresh_pool("16MiB", swap=specs, tiers="file1,file", encrypt=encrypt) as pool:
        expected = data(kind, (80 if kind == "noise" else 160) * MIB, 1)
        array = pool.array(expected)
        while pool.evict():
            pass
        deadline = time.monotonic() + 20
        while used(pool)["fast"] > 32 * MIB * 0.81 and time.monotonic() < deadline:
            array[-8 * FOLIO :: 4096] += 0
            pool.evict()
        assert pool.stats().demotions > 0
        hot = slice(0, 14 * MIB, step)  # more than fits in ram, and what went down first
        passes = []
        for _ in range(8):
            before = pool.swaps()[1].read_bytes
            assert (array[hot] == expected[hot]).all()
            passes.append(pool.swaps()[1].read_bytes - before)
        assert passes[0] > MIB and passes[-1] < passes[0] / 10, "it is read from the fast file now"
        assert pool.stats().promotions > 0
        fast = used(pool)["fast"]
        assert (array == expected).all()
        assert used(pool)["fast"] <= max(fast, 32 * MIB * 0.92), "what comes once stays where it is"
        check_pool(pool)
        while pool.evict():
            pass
        del array
        assert set(used(pool).values()) == {0}


@unbound
def test_nothing_moves_up_to_a_tier_that_may_not_be_used_or_is_full(tmp_path: Path) -> None:
    specs = places(tmp_path, "fast:8M:1", "slow:256M")
    with fresh_pool("12MiB", swap=specs) as pool:
        full = pool.array(data("noise", 8 * MIB, 2), tiers="file1")
        while pool.evict():
            pass
        for tiers in ("file", "file1,file"):
            array = pool.array(data("noise", 14 * MIB, 1), tiers=tiers)
            while pool.evict():
                pass
            for _ in range(4):
                assert (array == data("noise", len(array), 1)).all()
            stats = pool.stats()
            assert stats.promotions == 0, tiers
            del array
        assert (full == data("noise", len(full), 2)).all()
        check_pool(pool)


# ---- swapon and swapoff ----


@unbound
def test_swapon_where_there_was_none(tmp_path: Path) -> None:
    with fresh_pool(swap="none") as pool:
        assert pool.swaps() == []
        array = pool.array(data("walk", 12 * MIB, 1))
        while pool.evict():
            pass
        with pytest.raises(OSError):
            pool.writeback()
        file = pool.swapon(f"ssd={tmp_path}/s:64M:3")
        assert (file.name, file.tier, file.priority, file.limit_bytes, file.used_bytes, file.state) == (
            f"{tmp_path}/s", "ssd", 3, 64 * MIB, 0, "on",
        )  # fmt: skip
        assert pool.writeback() > 0
        assert used(pool)["s"] > 4 * MIB
        (tmp_path / "link").symlink_to(tmp_path)
        with pytest.raises(SwapPathError, match="already"):
            pool.swapon(f"{tmp_path}/s:32M")
        with pytest.raises(SwapPathError, match="already"):
            pool.swapon(f"{tmp_path}/link/s:32M")
        with pytest.raises(TierError):
            pool.swapon(f"hdd={tmp_path}/t:32M:3")
        with pytest.raises(SwapPathError, match="nothing to do"):
            pool.swapon("none")
        assert len(pool.swaps()) == 1
        assert (array == data("walk", len(array), 1)).all()
        check_pool(pool)


@unbound
def test_swapoff_to_another_file_and_on_again(tmp_path: Path) -> None:
    with fresh_pool(swap=places(tmp_path, "a:64M:1", "b:64M")) as pool:
        packed = pool.array(data("walk", 8 * MIB, 1))
        raw = noise(pool, 160, 2)
        pool.writeback()
        before = used(pool)
        assert before["a"] > 12 * MIB and before["b"] == 0
        writes = pool.swaps()[1].written_bytes
        told: list[tuple[int, int]] = []
        pool.swapoff(f"{tmp_path}/a", lambda done, total: told.append((done, total)))
        assert used(pool) == {"b": before["a"]}
        assert pool.swaps()[0].written_bytes - writes == before["a"], "nothing is written twice"
        assert told[-1] == (before["a"], before["a"]) and told == sorted(told) and len(told) > 5
        check_pool(pool)
        assert pool.swapon(f"{tmp_path}/a:64M:1").used_bytes == 0
        assert (packed == data("walk", len(packed), 1)).all()
        assert (raw == data("noise", len(raw), 2)).all()
        check_pool(pool)
        pool.swapoff(tmp_path / "b")
        assert list(used(pool)) == ["a"]
        assert (raw == data("noise", len(raw), 2)).all()
        with pytest.raises(SwapPathError, match=rf"b is no swap file of this program. It has: {tmp_path}/a\."):
            pool.swapoff(f"{tmp_path}/b")


@unbound
def test_swapoff_of_the_last_file_into_the_budget(tmp_path: Path) -> None:
    with fresh_pool("48MiB", swap=f"{tmp_path}/a:64M") as pool:
        packed = pool.array(data("walk", 8 * MIB, 1))
        raw = noise(pool, 64, 2)
        pool.writeback()
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        pool.swapoff(f"{tmp_path}/a")
        assert pool.swaps() == [] and pool.stats().slot_bytes == 0
        assert len(list(Path("/proc/self/fd").iterdir())) == descriptors - 1
        stats = check_pool(pool)
        assert stats.peak_bytes <= 48 * MIB + MIB
        assert (packed == data("walk", len(packed), 1)).all()
        assert (raw == data("noise", len(raw), 2)).all()


@unbound
def test_swapoff_without_room_says_how_much_and_leaves_it_in_use(tmp_path: Path) -> None:
    with fresh_pool(swap=places(tmp_path, "a:128M:1", "b:4M")) as pool:
        raw = noise(pool, 1024, 2)  # 64 MiB, in a budget of 16
        with pytest.raises(SwapOffError, match=r"a can't be emptied: .* find no room .*in use as before") as caught:
            pool.swapoff(f"{tmp_path}/a")
        left = used(pool)
        assert 60 * MIB - 16 * MIB < caught.value.missing_bytes <= left["a"] <= 60 * MIB
        assert left["b"] == 4 * MIB, "what moved stays moved"
        assert pool.swaps()[0].state == "on"
        more = noise(pool, 16, 3)
        assert used(pool)["a"] > left["a"], "it is in use again"
        check_pool(pool)
        pool.swapon(f"{tmp_path}/c:128M")
        pool.swapoff(f"{tmp_path}/a")
        assert (raw == data("noise", len(raw), 2)).all()
        assert (more == data("noise", len(more), 3)).all()
        check_pool(pool)


@unbound
def test_swapoff_keeps_to_policies(tmp_path: Path) -> None:
    specs = [f"ssd={tmp_path}/s:64M:1", f"hdd={tmp_path}/h:64M"]
    with fresh_pool("64MiB", swap=specs) as pool:
        array = pool.array(data("walk", 4 * MIB, 1), tiers="ssd")
        while pool.evict():
            pass
        with pytest.raises(SwapOffError):
            pool.swapoff(f"{tmp_path}/s")
        assert used(pool)["h"] == 0 and used(pool)["s"] > 0
        pool.swapon(f"{tmp_path}/t:64M:1")
        pool.swapoff(f"{tmp_path}/s")
        assert used(pool)["t"] > 0 and used(pool)["h"] == 0
        assert (array == data("walk", len(array), 1)).all()


@unbound
def test_an_interrupted_swapoff_is_undone(tmp_path: Path) -> None:
    with fresh_pool(swap=places(tmp_path, "a:64M:1", "b:64M")) as pool:
        raw = noise(pool, 256, 2)

        def stop(done: int, total: int) -> None:
            assert pool.swaps()[0].state == "draining"
            with pytest.raises(SwapPathError, match="being emptied already"):
                pool.swapoff(f"{tmp_path}/a")
            if done > total // 2:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            pool.swapoff(f"{tmp_path}/a", stop)
        assert pool.swaps()[0].state == "on"
        assert used(pool)["a"] + used(pool)["b"] == 16 * MIB
        assert MIB < used(pool)["a"] < 15 * MIB
        check_pool(pool)
        pool.swapoff(f"{tmp_path}/a")
        assert used(pool) == {"b": 16 * MIB}
        assert (raw == data("noise", len(raw), 2)).all()


@unbound
def test_a_pool_that_is_closed_in_the_middle(tmp_path: Path) -> None:
    pool = fresh_pool(swap=places(tmp_path, "a:64M:1", "b:64M"))
    raw = noise(pool, 128, 2)
    pool.swapoff(f"{tmp_path}/a", lambda done, total: pool.close())
    assert (raw == data("noise", len(raw), 2)).all()
    del raw
    with pytest.raises(ValueError, match="closed"):
        pool.swaps()
    with pytest.raises(ValueError, match="closed"):
        pool.swapon(f"{tmp_path}/c")


@unbound
def test_a_slot_that_can_not_be_read_stays_and_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.touch()
    with fresh_pool(swap=[f"{path}:64M:1", f"{tmp_path}/b:64M"]) as pool:
        raw = noise(pool, 64, 2)
        os.truncate(path, 2 * MIB)  # what another program can do to a file with a name
        with pytest.raises(SwapOffError, match=r"can't be read \(Input/output error\)"):
            pool.swapoff(path)
        assert used(pool) == {"a": 2 * MIB, "b": 2 * MIB}
        assert (raw[: 2 * MIB] == data("noise", len(raw), 2)[: 2 * MIB]).all()


@unbound
def test_two_at_once_and_only_what_is_in_use_costs(tmp_path: Path) -> None:
    with fresh_pool(swap=places(tmp_path, "a:10G:1", "b:10G:1", "c:64M")) as pool:
        raw = noise(pool, 256, 2)
        failures: list[BaseException] = []

        def off(name: str) -> None:
            try:
                pool.swapoff(tmp_path / name)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=off, args=(name,)) for name in "ab"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert used(pool) == {"c": 16 * MIB}
        assert (raw == data("noise", len(raw), 2)).all()
        check_pool(pool)


@unbound
def test_everything_at_once(tmp_path: Path) -> None:
    """Threads that read and write, snapshots, frees and forks, while files come and go: every byte is right."""
    pool = fresh_pool("24MiB", swap=places(tmp_path, "keep:256M:-1", "s0:32M:1"))
    end = time.monotonic() + 5
    failures: list[str] = []

    def work(number: int) -> None:
        rng = np.random.default_rng(number)
        kinds = ["noise", "walk", "small"]
        tiers = [None, "zswap,file-1", "file1,file-1", "file-1"]
        mine: list[tuple[Array, Array]] = []
        try:
            while time.monotonic() < end and not failures:
                if len(mine) < 4:
                    model = data(kinds[rng.integers(3)], int(rng.integers(1, 3 * MIB)), int(rng.integers(1000)))
                    mine.append((pool.array(model, tiers=tiers[rng.integers(4)]), model.copy()))
                array, model = mine[rng.integers(len(mine))]
                at = int(rng.integers(len(model)))
                what = rng.integers(8)
                if what < 3:
                    assert (array == model).all(), "whole"
                elif what == 3:
                    array[at : at + FOLIO] += 1
                    model[at : at + FOLIO] += 1
                elif what == 4:
                    copy = pool.snapshot(array)
                    array[at::999] ^= 5
                    assert (copy == model).all(), "snapshot"
                    model[at::999] ^= 5
                elif what == 5:
                    pool.evict(4 * MIB)
                elif what == 6:
                    mine.pop(int(rng.integers(len(mine))))
                else:
                    assert array[at] == model[at], "one"
            for array, model in mine:
                assert (array == model).all(), "at the end"
        except BaseException as error:
            failures.append(f"thread {number}: {error!r}")

    def admin() -> None:
        rng = np.random.default_rng(99)
        turns = 0
        try:
            while time.monotonic() < end and not failures:
                names = [Path(file.name).name for file in pool.swaps()]
                name = f"s{rng.integers(3)}"
                if name in names:
                    pool.swapoff(tmp_path / name)
                else:
                    pool.swapon(f"{tmp_path / name}:{rng.integers(8, 32)}M:{rng.choice([1, 1, 7])}")
                turns += 1
                if turns % 4 == 0:
                    child = os.fork()
                    if child == 0:
                        os._exit(0)
                    assert os.waitpid(child, 0)[1] == 0
            assert turns > 4
        except BaseException as error:
            failures.append(f"admin: {error!r}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    threads.append(threading.Thread(target=admin))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    check_pool(pool)
    # What is kept for children that have ended goes some milliseconds later, with whatever is freed then.
    deadline = time.monotonic() + 20
    while pool.stats().slot_bytes != sum(file.used_bytes for file in pool.swaps()) and time.monotonic() < deadline:
        time.sleep(0.02)
        noise(pool, 1)
    assert pool.stats().slot_bytes == sum(file.used_bytes for file in pool.swaps())
    pool.close()


# ---- fork ----

FORK = """
import os, sys, time
import numpy as np, userswap
from pathlib import Path
MIB = 1 << 20
here = sys.argv[1]
def noise(n, seed): return np.random.default_rng(seed).integers(0, 256, n, dtype=np.uint8)
def out(pool):
    while pool.evict(): pass
def used(pool): return {Path(f.name).name: f.used_bytes for f in pool.swaps()}
def child(work):
    pid = os.fork()
    if pid: return pid
    try: work()
    except BaseException:
        import traceback; traceback.print_exc(); os._exit(1)
    os._exit(0)
def end(pid): assert os.waitpid(pid, 0)[1] == 0
"""


def fork_program(body: str, directory: Path) -> None:
    """Run it; its own assertions are what is tested."""
    result = run_python(FORK + body, str(directory))
    assert result.returncode == 0, result.stdout + result.stderr


@unbound
def test_a_child_has_files_of_its_own_with_the_same_priorities(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    fork_program(
        """
pool = userswap.Pool(ram="24MiB", swap=[f"{here}/x:4M:1", f"{here}/y:64M"], children="own")
first = pool.array(noise(8 * MIB, 1))
out(pool)
assert used(pool) == {"x": 4 * MIB, "y": 4 * MIB}
def work():
    assert used(pool) == {"x": 0, "y": 0}
    own = pool.array(noise(6 * MIB, 2))
    out(pool)
    assert used(pool) == {"x": 4 * MIB, "y": 2 * MIB}, used(pool)
    assert (first == noise(8 * MIB, 1)).all() and (own == noise(6 * MIB, 2)).all()
    assert pool._core.check()["wrong"] == 0
    def grandchild():
        assert (first == noise(8 * MIB, 1)).all() and (own == noise(6 * MIB, 2)).all()
        more = pool.array(noise(6 * MIB, 3))
        out(pool)
        assert used(pool) == {"x": 4 * MIB, "y": 2 * MIB}, used(pool)
        pool.swapoff(f"{here}/x")
        assert used(pool) == {"y": 6 * MIB}
        assert (more == noise(6 * MIB, 3)).all() and (own == noise(6 * MIB, 2)).all()
        assert (first == noise(8 * MIB, 1)).all()
    end(child(grandchild))
    assert (own == noise(6 * MIB, 2)).all()
end(child(work))
assert (first == noise(8 * MIB, 1)).all()
""",
        tmp_path,
    )


@unbound
def test_swapoff_of_a_file_that_a_child_still_reads(tmp_path: Path) -> None:
    """The parent is done with it, its descriptor closed; the child keeps the file until it is done with it, too."""
    fork_program(
        """
pool = userswap.Pool(ram="24MiB", swap=[f"{here}/a:64M:1", f"{here}/b:64M"], children="own")
first = pool.array(noise(16 * MIB, 1))
out(pool)
assert used(pool) == {"a": 16 * MIB, "b": 0}
ready, go = os.pipe()
def work():
    os.close(go)
    os.read(ready, 1)
    for _ in range(2):
        assert (first == noise(16 * MIB, 1)).all()
        out(pool)
    first[:] = 7
    out(pool)
    assert (first == 7).all()
pid = child(work)
descriptors = len(os.listdir("/proc/self/fd"))
pool.swapoff(f"{here}/a")
assert used(pool) == {"b": 16 * MIB}
assert len(os.listdir("/proc/self/fd")) == descriptors - 1
assert pool._core.check()["wrong"] == 0
# the same path is free: the file that was there had lost its name long ago
pool.swapon(f"{here}/a:64M:1")
other = pool.array(noise(8 * MIB, 5))
out(pool)
assert used(pool)["a"] == 8 * MIB
os.close(ready); os.close(go)
end(pid)
assert (first == noise(16 * MIB, 1)).all() and (other == noise(8 * MIB, 5)).all()
""",
        tmp_path,
    )


@unbound
def test_slots_kept_for_a_child_are_not_in_the_way_of_a_swapoff(tmp_path: Path) -> None:
    """What the parent freed and a child still reads belongs to no id of the parent's: there is nothing to move."""
    fork_program(
        """
pool = userswap.Pool(ram="24MiB", swap=[f"{here}/a:64M:1", f"{here}/b:64M"], children="own")
first, second = pool.array(noise(8 * MIB, 1)), pool.array(noise(8 * MIB, 2))
out(pool)
ready, go = os.pipe()
def work():
    os.close(go)
    os.read(ready, 1)
    assert (first == noise(8 * MIB, 1)).all() and (second == noise(8 * MIB, 2)).all()
pid = child(work)
first[:] = 3            # the slots that it had are kept for the child
out(pool)
assert pool._core.check()["wrong"] == 0
third = pool.array(noise(4 * MIB, 3))
out(pool)
assert used(pool)["a"] == 12 * MIB, used(pool)
pool.swapoff(f"{here}/a")
assert used(pool) == {"b": 12 * MIB}, used(pool)
assert (third == noise(4 * MIB, 3)).all() and (first == 3).all()
os.close(ready); os.close(go)
end(pid)
""",
        tmp_path,
    )


@unbound
def test_numbers_of_files_are_given_back(tmp_path: Path) -> None:
    """An entry has 16 of them: chains of forks that let go of what they inherited never run out."""
    fork_program(
        """
pool = userswap.Pool(ram="24MiB", swap=[f"{here}:64M:{n}" if n == 3 else f"{here}/{n}:2M:{n}" for n in range(4)],
                     children="own")
def generation(depth):
    array = pool.array(noise(8 * MIB, depth))
    out(pool)
    assert used(pool) == {"3": 0, "2": 0} | used(pool)
    assert sum(used(pool).values()) == 8 * MIB, (depth, used(pool))
    if depth:
        def work():
            assert (array == noise(8 * MIB, depth)).all()
            array[:] = 1
            out(pool)
            generation(depth - 1)
        end(child(work))
    assert (array == noise(8 * MIB, depth)).all()
generation(0)
def deep(depth, inherited):
    inherited.clear()       # the last that refers to its ancestors' files
    a = pool.array(noise(3 * MIB, depth))
    out(pool)
    assert sum(used(pool).values()) == 3 * MIB, (depth, used(pool))
    assert (a == noise(3 * MIB, depth)).all()
    out(pool)
    if depth:
        mine = [a]
        del a
        end(child(lambda: deep(depth - 1, mine)))
deep(20, [])
""".replace('assert used(pool) == {"3": 0, "2": 0} | used(pool)\n    ', ""),
        tmp_path,
    )


@unbound
def test_a_fork_in_the_middle_of_a_swapoff(tmp_path: Path) -> None:
    fork_program(
        """
pool = userswap.Pool(ram="24MiB", swap=[f"{here}/a:64M:1", f"{here}/b:64M"], children="own")
first = pool.array(noise(16 * MIB, 1))
out(pool)
pids = []
def work():
    assert [f.name[-1] for f in pool.swaps()] == ["b"]
    assert (first == noise(16 * MIB, 1)).all()
    first[::4096] += 1
    out(pool)
    assert (first[1:4096] == noise(16 * MIB, 1)[1:4096]).all()
    assert pool._core.check()["wrong"] == 0
def tell(done, total):
    if len(pids) < 3 and done > total * len(pids) // 4:
        pids.append(child(work))
pool.swapoff(f"{here}/a", tell)
assert len(pids) == 3 and used(pool) == {"b": 16 * MIB}
for pid in pids: end(pid)
assert (first == noise(16 * MIB, 1)).all()
assert pool._core.check()["wrong"] == 0
""",
        tmp_path,
    )


# ---- the command ----


def test_the_command_takes_several(tmp_path: Path) -> None:
    code = "import userswap.pool as p; print([(f.tier, f.limit_bytes >> 20) for f in p._installed[-1].pool.swaps()])"
    from support import userswap as command

    result = command(
        "run", "--ram", "64M", "--swap", f"fast={tmp_path}/a:64M:5", "--swap", f"{tmp_path}/b:32M", "--tiers",
        "zswap,fast", "-c", code,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[('fast', 64), ('file', 32)]\n"
    for wrong, says in (
        (["--swap", f"{tmp_path}/a", "--swap", f"{tmp_path}/../{tmp_path.name}/a"], "already"),
        (["--swap", "none", "--swap", str(tmp_path)], "can't both be had"),
        (["--swap", f"{tmp_path}:8G:x"], "no whole number"),
        (["--swap", str(tmp_path), "--tiers", "zswap,tape"], "There is no tier 'tape'"),
        (["--swap", f"a={tmp_path}/a:8M:1", "--swap", f"b={tmp_path}/b:8M:1"], "Priority 1 is the tier a already"),
    ):
        result = command("run", "--ram", "64M", *wrong, "-c", "1")
        assert result.returncode == 2 and says in result.stderr and "Traceback" not in result.stderr, result.stderr


# ---- freed room goes back to the disk ----


@unbound
@pytest.mark.parametrize("refused", [None, errno.EINTR, errno.EIO])
@pytest.mark.parametrize("turn", [1, -1], ids=["forwards", "backwards"])
def test_room_between_what_stays_goes_back(tmp_path: Path, refused: int | None, turn: int) -> None:
    """Though the file system refuses to take anything of the first cluster back, whatever order the program goes in:
    what libc copies it copies backwards at times, as the addresses lie."""
    path = tmp_path / "named"
    path.touch()
    with fresh_pool("24MiB", swap=f"{path}:256M") as pool:
        arrays = [noise(pool, 2, seed) for seed in range(256)]
        full = path.stat().st_blocks * 512
        assert full >= 32 * MIB
        keep = arrays[::8]
        if refused:
            inject("punch", 0, refused, 2)
        del arrays  # of each 1 MiB 128 KiB stay
        deadline = time.monotonic() + 20
        while path.stat().st_blocks * 512 > 12 * MIB and time.monotonic() < deadline:
            scratch = pool.empty(8 * MIB, np.uint8)
            for at in range(0, 8 * MIB, FOLIO)[::turn]:  # faults are what asks the thread
                scratch[at] = 1
            pool.evict(MIB)
            del scratch
        assert inject(None) == (2 if refused else 0)
        assert path.stat().st_blocks * 512 <= 12 * MIB
        for seed, array in zip(range(0, 256, 8), keep, strict=True):
            assert (array == data("noise", len(array), seed)).all()
        check_pool(pool)


def test_signals_are_heeded_between_pieces(tmp_path: Path) -> None:
    """Ctrl-C during a swapoff comes as KeyboardInterrupt soon."""
    if DESIGN in BOUND:
        pytest.skip("this design has one swap file")
    with fresh_pool(swap=places(tmp_path, "a:64M:1", "b:64M")) as pool:
        raw = noise(pool, 256, 2)
        # Whoever starts the tests in the background has it ignored.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        with pytest.raises(KeyboardInterrupt):
            pool.swapoff(tmp_path / "a", lambda done, total: os.kill(os.getpid(), signal.SIGINT))
        signal.signal(signal.SIGINT, before)
        assert pool.swaps()[0].state == "on"
        assert (raw == data("noise", len(raw), 2)).all()


def test_nothing_is_left_of_any_by_a_kill(tmp_path: Path) -> None:
    if DESIGN in BOUND:
        pytest.skip("this design has one swap file")
    code = """
import sys, numpy as np, userswap
pool = userswap.Pool(ram="24MiB", swap=[f"{sys.argv[1]}/a:64M", f"{sys.argv[1]}/b:64M:1"])
x = pool.array(np.random.default_rng(1).integers(0, 256, 40 << 20, dtype=np.uint8))
print("ready", flush=True)
sys.stdin.read()
"""
    import sys

    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    ) as program:
        assert program.stdout is not None and program.stdout.readline() == b"ready\n"
        program.kill()
    assert list(tmp_path.iterdir()) == []


def test_what_is_in_use_was_asked_of_a_file_that_was_just_taken_away(tmp_path: Path) -> None:
    """By a swapon as it ended, and by the thread that follows the machine: a crash, if a swapoff was done meanwhile."""
    code = """
import sys, threading, time
import userswap
pool = userswap.Pool(swap="none")                   # its budget is followed
array = pool.empty(1 << 20, "u1")
array[:] = 1
end = time.monotonic() + 4
turns = []
def comes_and_goes(number):
    place = f"{sys.argv[1]}/swap{number}"
    n = 0
    while time.monotonic() < end:
        pool.swapon(f"{place}:64M")
        pool.swapoff(place)
        n += 1
    turns.append(n)
threads = [threading.Thread(target=comes_and_goes, args=[i]) for i in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(turns), pool.swaps(), int(array.sum()))
"""
    result = run_python(code, str(tmp_path))
    assert (result.returncode, result.stdout) == (0, "4 [] 1048576\n"), result.stderr


def test_two_threads_that_swapped_out_to_a_file_wrote_folio_by_folio() -> None:
    """Whoever came second found the buffer taken, and had a write for each folio: two thirds of all writes."""
    code = """
import threading
import numpy as np
import userswap
def writes():
    return int(dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())["syscw"])
pool = userswap.Pool(ram="160M", swap="/var/tmp", tiers="file", control=False)
piece = np.cumsum(np.random.default_rng(1).standard_normal(1 << 17)).round(2)
arrays = [pool.empty(128 << 17) for _ in range(2)]
def fill(array):
    for i in range(0, len(array), len(piece)):
        np.add(piece, i, out=array[i : i + len(piece)])
before = writes()
threads = [threading.Thread(target=fill, args=(array,)) for array in arrays]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(pool.stats().swap_outs, writes() - before)
for array in arrays:
    for i in range(0, len(array), len(piece)):
        assert np.array_equal(array[i : i + len(piece)], piece + i)
"""
    result = run_python(code, environment={"USERSWAP_READAHEAD": "0"})
    assert result.returncode == 0, result.stderr
    folios, calls = map(int, result.stdout.split())
    assert folios > 1000
    assert calls < folios // 10
