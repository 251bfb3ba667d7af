"""Swap files: where they may be, what is refused, and that nothing is left behind."""

import errno
import fcntl
import os
import resource
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from support import fill, mounted, small_disk
from userswap.errors import BadSize, SwapPathError
from userswap.swapfiles import OpenSwapFile, SwapSpec, default_places, file_system, open_swap, parse_swap

MIB = 1 << 20
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounting file systems needs root")


def opened(text: str | os.PathLike[str] | None) -> OpenSwapFile:
    """Open a swap file that cannot be none."""
    file = open_swap(text)
    assert file is not None
    return file


@pytest.mark.parametrize(
    ("text", "spec"),
    [
        (None, SwapSpec(None, None)),
        ("none", None),
        ("NONE", None),
        ("./none", SwapSpec("./none", None)),
        ("/var/tmp", SwapSpec("/var/tmp", None)),
        ("/var/tmp:8G", SwapSpec("/var/tmp", 8 << 30)),
        ("/a:b:2M", SwapSpec("/a:b", 2 << 20)),
        ("/a:b/c", SwapSpec("/a:b/c", None)),
        ("/a b :16 MiB", SwapSpec("/a b ", 16 << 20)),
        (Path("/var/tmp"), SwapSpec("/var/tmp", None)),
    ],
)
def test_parse(text: str | None, spec: SwapSpec | None) -> None:
    assert parse_swap(text) == spec


@pytest.mark.parametrize("text", ["/tmp:", "/tmp:x", "/tmp:-1G", "/tmp:0", "/tmp:1M", "/a:b"])
def test_bad_sizes(text: str) -> None:
    with pytest.raises(BadSize, match="--swap"):
        parse_swap(text)


@pytest.mark.parametrize("text", ["", " ", ":8G"])
def test_no_path(text: str) -> None:
    with pytest.raises(SwapPathError, match="names no path"):
        parse_swap(text)


def test_none_opens_nothing() -> None:
    assert open_swap("none") is None


def test_a_directory_gets_a_private_file_without_a_name(tmp_path: Path) -> None:
    file = opened(f"{tmp_path}:64M")
    try:
        status = os.fstat(file.fd)
        assert list(tmp_path.iterdir()) == []
        assert stat.S_IMODE(status.st_mode) == 0o600
        assert (status.st_nlink, status.st_size) == (0, 0)
        assert file.limit == 64 * MIB
        assert file.name == str(tmp_path)
        assert not os.get_inheritable(file.fd)
        assert bool(fcntl.fcntl(file.fd, fcntl.F_GETFL) & os.O_DIRECT) == file.direct
    finally:
        os.close(file.fd)


def test_without_o_tmpfile_the_file_is_unlinked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.open

    def without(path: str, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if flags & os.O_TMPFILE == os.O_TMPFILE:
            raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))
        return real(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", without)
    file = opened(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert stat.S_IMODE(os.fstat(file.fd).st_mode) == 0o600
    os.close(file.fd)


def test_without_a_size_the_limit_is_the_file_systems(tmp_path: Path) -> None:
    file = opened(tmp_path)
    os.close(file.fd)
    room = os.statvfs(tmp_path)
    assert file.limit == room.f_blocks * room.f_frsize // 4096 * 4096


def test_a_new_file_leaves_no_name_behind(tmp_path: Path) -> None:
    path = tmp_path / "swap"
    file = opened(f"{path}:16M")
    try:
        assert not path.exists()
        assert stat.S_IMODE(os.fstat(file.fd).st_mode) == 0o600
        assert file.name == str(path)
    finally:
        os.close(file.fd)


def test_an_empty_file_is_used_made_private_and_locked(tmp_path: Path) -> None:
    path = tmp_path / "swap"
    path.touch(0o644)
    file = opened(path)
    try:
        assert os.fstat(file.fd).st_ino == path.stat().st_ino
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert path.stat().st_size == 0
        with pytest.raises(SwapPathError, match="another running program"):
            open_swap(path)
    finally:
        os.close(file.fd)
    os.close(opened(path).fd)


def test_a_file_with_data_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "thesis.txt"
    path.write_text("years of work")
    with pytest.raises(SwapPathError, match=r"holds 13 B of data.*rm "):
        open_swap(path)
    assert path.read_text() == "years of work"


def test_what_a_crash_left_in_an_existing_file_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "swap"
    path.touch()
    file = opened(path)
    os.pwrite(file.fd, b"", 0)
    os.ftruncate(file.fd, MIB)
    os.close(file.fd)
    try:
        os.getxattr(path, "user.userswap")
    except OSError:
        pytest.skip("this file system has no extended attributes to mark the file with")
    file = opened(path)
    assert path.stat().st_size == 0
    os.close(file.fd)


def test_links_and_odd_files(tmp_path: Path) -> None:
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    with pytest.raises(SwapPathError, match="leads nowhere"):
        open_swap(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "fifo")
    for odd in (tmp_path / "fifo", Path("/dev/null")):
        with pytest.raises(SwapPathError, match="neither a file nor a directory"):
            open_swap(odd)
    (tmp_path / "one").touch()
    (tmp_path / "two").hardlink_to(tmp_path / "one")
    with pytest.raises(SwapPathError, match="second name"):
        open_swap(tmp_path / "two")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    os.close(opened(tmp_path / "link").fd)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("/nonexistent/place", r"/nonexistent does not exist: create it \(mkdir -p /nonexistent\)"),
        ("/nonexistent/", "does not exist"),
        ("/etc/passwd/", "is not a directory"),
        ("/etc/passwd/x", "not a directory"),
        ("/proc", "No file can be created"),
        ("/proc/x", "No file can be created"),
        ("/tmp/\0", "is not a path"),
        ("x" * 300, "name too long"),
    ],
)
def test_places_that_are_none(text: str, says: str) -> None:
    with pytest.raises(SwapPathError, match=says) as caught:
        open_swap(text)
    assert str(caught.value).endswith("--swap none.")


def test_home_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    file = opened("~:4M")
    os.close(file.fd)
    assert file.name == str(tmp_path)


def test_default_is_tmpdir_then_var_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert default_places() == [tmp_path, Path("/var/tmp")]
    file = opened(None)
    os.close(file.fd)
    assert file.name == str(tmp_path)
    # A $TMPDIR that does not exist is passed over, not created as a file.
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    assert opened(None).name == "/var/tmp"
    assert not (tmp_path / "missing").exists()
    monkeypatch.setenv("TMPDIR", "")
    assert default_places() == [Path("/var/tmp")]


def test_no_default_place_names_each_and_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("userswap.swapfiles.default_places", lambda: [tmp_path / "a", tmp_path / "b"])
    with pytest.raises(SwapPathError, match=r"no place.*/a does not exist; .*/b does not exist.*--swap none\.$"):
        open_swap(None)


def test_the_file_size_limit_is_kept(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8 * MIB + 100, before[1]))
        file = opened(tmp_path)
        os.close(file.fd)
        assert file.limit == 8 * MIB
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, before[1]))
        with pytest.raises(SwapPathError, match="ulimit -f"):
            open_swap(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_descriptor_is_lost_on_refusal(tmp_path: Path) -> None:
    (tmp_path / "full").write_text("x")
    before = sorted(Path("/proc/self/fd").iterdir())
    for text in (tmp_path / "full", "/dev/null", "/proc", f"{tmp_path}/missing/", "/dev/shm"):
        with pytest.raises(SwapPathError):
            open_swap(text)
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_two_programs_share_a_directory_and_a_name(tmp_path: Path) -> None:
    files = [opened(tmp_path), opened(tmp_path), opened(tmp_path / "swap"), opened(tmp_path / "swap")]
    assert len({os.fstat(file.fd).st_ino for file in files}) == 4
    for file in files:
        os.close(file.fd)


@needs_root
def test_tmpfs_is_refused_as_directory_as_file_and_as_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with mounted(tmp_path / "ram", "-t", "tmpfs", "tmpfs") as ram:
        assert file_system(ram) == (0x01021994, "tmpfs")
        for text in (str(ram), f"{ram}/swap", f"{ram}:8M"):
            with pytest.raises(SwapPathError, match="on tmpfs, which is itself kept in memory"):
                open_swap(text)
        assert list(ram.iterdir()) == []
        monkeypatch.setenv("TMPDIR", str(ram))
        file = opened(None)
        os.close(file.fd)
        assert file.name == "/var/tmp"


@needs_root
def test_a_small_disk_gives_its_size_and_may_be_promised_more(tmp_path: Path) -> None:
    with small_disk(tmp_path, 32) as disk:
        file = opened(disk)
        assert 16 * MIB < file.limit <= 32 * MIB
        os.close(file.fd)
        # It grows as it is used: the limit is a promise of the user's.
        file = opened(f"{disk}/swap:1G")
        assert file.limit <= 32 * MIB
        os.close(file.fd)


@needs_root
def test_a_full_disk_is_refused(tmp_path: Path) -> None:
    with small_disk(tmp_path, 16) as disk:
        (disk / "mine").touch()
        fill(disk)
        for text in (disk, disk / "swap", disk / "mine"):
            with pytest.raises(SwapPathError, match="is full"):
                open_swap(text)
        assert not (disk / "swap").exists()
        (disk / "filler").unlink()
        os.close(opened(disk).fd)


@needs_root
def test_a_read_only_file_system_is_refused(tmp_path: Path) -> None:
    with small_disk(tmp_path, 16) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        for text in (disk, disk / "swap"):
            with pytest.raises(SwapPathError, match="read-only"):
                open_swap(text)


def as_nobody(code: str) -> str:
    """Run code after becoming an ordinary user (if we are root) and return what it prints."""
    before = "import os; from userswap.swapfiles import open_swap\nfrom userswap.errors import SwapPathError\n"
    drop = "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n" if os.geteuid() == 0 else ""
    result = subprocess.run(
        [sys.executable, "-c", before + drop + code], capture_output=True, text=True, check=True, timeout=60
    )
    return result.stdout


@pytest.fixture
def open_tmp_path() -> Iterator[Path]:
    """A temporary directory that every user can reach and write to (pytest's own are private)."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:
        Path(name).chmod(0o777)
        yield Path(name)


def test_an_ordinary_user(open_tmp_path: Path) -> None:
    def tried(path: str) -> str:
        return as_nobody(f"try: print(open_swap({path!r}).direct)\nexcept SwapPathError as error: print(error)")

    assert tried(str(open_tmp_path)).strip() in ("True", "False")
    assert "this user" in tried("/etc")
    assert "cannot be created by this user" in tried("/etc/userswap-test")
    assert "neither" not in tried("/etc/passwd") and "not writable" in tried("/etc/passwd")
    if os.geteuid() == 0:
        (open_tmp_path / "roots").touch(0o666)
        (open_tmp_path / "roots").chmod(0o666)
        assert "belongs to another user" in tried(str(open_tmp_path / "roots"))
