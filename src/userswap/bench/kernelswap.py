"""Swap as the kernel has it: swap files, zswap, zram. Each is on for the time of a `with` block; needs root.

Whatever is changed is put back at the end, however the block is left. Settings that are not named here (swappiness,
readahead, zswap's compressor) are those of the machine.
"""

import ctypes
import errno
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from userswap.errors import BenchError
from userswap.lab.machine import kibibytes

__all__ = ["Pool", "Swap", "counters", "swap_file", "zram", "zswap"]

ZSWAP = Path("/sys/module/zswap/parameters")
ZRAM = Path("/sys/class/zram-control")
SWAP_FLAG_PREFER = 0x8000
FIRST, SECOND = 0x7FFF, 0x7FFE
"""Priorities: before any swap that the machine has."""
PAGE = 4096
OFF_SECONDS = 120
libc = ctypes.CDLL(None, use_errno=True)


class StillOn(BenchError):  # noqa: N818 - reads as what it is
    """Swap that could not be turned off."""


@dataclass(frozen=True)
class Pool:
    """What is stored compressed in RAM: bytes that it takes, and bytes that it holds."""

    used: int
    holds: int


class On:
    """A file or device that is swapped to."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.on = True

    def off(self) -> None:
        """Stop swapping to it. Raises BenchError."""
        if self.on:
            off(self.path)
            self.on = False


class Swap:
    """Swap that is on. Without a compressed pool it is a file."""

    def __init__(self, file: On | None = None) -> None:
        self.file = file

    def off(self) -> float:
        """Turn the file off before its time, and return the seconds that took. Raises BenchError."""
        assert self.file is not None
        began = time.perf_counter()
        self.file.off()
        return time.perf_counter() - began

    def pool(self) -> Pool:
        """The compressed pool now."""
        return Pool(0, 0)

    def keep(self) -> None:
        """Keep the pool within a limit that the kernel can't be told."""


class ZramSwap(Swap):
    """Swap on a zram device."""

    def __init__(self, block: Path) -> None:
        super().__init__()
        self.mm_stat = block / "mm_stat"

    def pool(self) -> Pool:
        """See `Swap`."""
        numbers = [int(word) for word in self.mm_stat.read_text().split()]
        return Pool(numbers[2], numbers[0])


class ZswapSwap(Swap):
    """Swap files with zswap before them."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self.most = most
        """Bytes that the pool may take, where that is less than the kernel can be told; 0: it was told."""
        self.takes = True

    def keep(self) -> None:
        """See `Swap`. As the kernel's own limit: above it nothing is stored, below nine tenths again."""
        if not self.most:
            return
        used = self.pool().used
        takes = used < self.most if self.takes else used < self.most * 9 // 10
        if takes != self.takes:
            (ZSWAP / "enabled").write_text("Y" if takes else "N")
            self.takes = takes

    def pool(self) -> Pool:
        """See `Swap`."""
        return Pool(kibibytes("Zswap"), kibibytes("Zswapped"))


def counters() -> dict[str, int]:
    """Return what the kernel has counted of swapping since it started: pages in and out, seconds of kswapd (ms)."""
    found = {"pages_in": 0, "pages_out": 0, "kswapd_ms": kswapd_ms()}
    for line in Path("/proc/vmstat").read_text().splitlines():
        name, _, value = line.partition(" ")
        if name in ("pswpin", "zswpin"):
            found["pages_in"] += int(value)
        elif name in ("pswpout", "zswpout"):
            found["pages_out"] += int(value)
    return found


def kswapd_ms() -> int:
    """Milliseconds of processor time that the kernel's swapping threads have used: kswapd, and those of zswap."""
    ticks = 0
    for directory in Path("/proc").iterdir():
        if not directory.name.isdecimal():
            continue
        try:
            name, _, rest = (directory / "stat").read_text().rpartition(")")
        except OSError:
            continue
        if "(kswapd" in name or "zswap" in name:
            fields = rest.split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks * 1000 // os.sysconf("SC_CLK_TCK")


@contextmanager
def setting(file: Path, value: str) -> Iterator[None]:
    """Have `value` in a file of settings, then what was there before."""
    before = file.read_text().strip()
    try:
        file.write_text(value)
        yield
    finally:
        file.write_text(before)


def run(*command: str) -> None:
    """Run a tool that Ctrl-C does not reach. Raises BenchError."""
    path = shutil.which(command[0], path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if path is None:
        raise BenchError(f"needs {command[0]}, which is not installed")
    done = subprocess.run([path, *command[1:]], capture_output=True, text=True, check=False, start_new_session=True)
    if done.returncode:
        raise BenchError(f"{command[0]} failed: {done.stderr.strip().rpartition(chr(10))[2]}")


@contextmanager
def switched_on(path: Path, priority: int) -> Iterator[On]:
    """Swap on a file or device that mkswap has prepared."""
    if libc.swapon(bytes(path), ctypes.c_int(SWAP_FLAG_PREFER | priority)):
        raise BenchError(f"the kernel does not take {path} for swap: {os.strerror(ctypes.get_errno())}")
    on = On(path)
    try:
        yield on
    finally:
        on.off()


def off(path: Path) -> None:
    """Stop swapping to a file or device. Raises BenchError."""
    until = time.monotonic() + OFF_SECONDS
    while libc.swapoff(bytes(path)):
        error = ctypes.get_errno()
        # Swap is the machine's: a process of somebody else in a limited cgroup may have memory in it that it has no
        # room for now. And a signal interrupts us.
        if error not in (errno.ENOMEM, errno.EINTR) or time.monotonic() > until:
            raise StillOn(
                f"Swap to {path} could not be turned off ({os.strerror(error)}), most often because another process, "
                f"in a cgroup with a limit, has memory there: when it has ended, run swapoff {path} and remove that."
            )
        time.sleep(0.05)


@contextmanager
def prepared_file(path: Path, size: int) -> Iterator[Path]:
    """Make a file that can be swapped to, not yet in use."""
    try:
        try:
            with path.open("xb") as file:
                os.fchmod(file.fileno(), 0o600)
                os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise BenchError(f"no swap file can be made in {path.parent}: {error.strerror}") from None
        run("mkswap", str(path))
        yield path
    except StillOn:
        raise
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    path.unlink(missing_ok=True)


@contextmanager
def no_zswap() -> Iterator[None]:
    """Have zswap off, whatever the machine has."""
    with setting(ZSWAP / "enabled", "N") if ZSWAP.is_dir() else ExitStack():
        yield


@contextmanager
def swap_file(path: Path, size: int) -> Iterator[Swap]:
    """Swap on a file alone."""
    with no_zswap(), prepared_file(path, size), switched_on(path, FIRST) as on:
        yield Swap(on)


@contextmanager
def zswap(path: Path, size: int, percent: int, most: int) -> Iterator[Swap]:
    """Swap on a file with zswap before it, which takes at most `percent` of the machine's memory.

    If `most` is not 0, it takes at most so many bytes: whoever looks at the process calls `keep`.
    """
    if not ZSWAP.is_dir():
        raise BenchError("this kernel has no zswap")
    with ExitStack() as stack:
        stack.enter_context(prepared_file(path, size))
        stack.enter_context(setting(ZSWAP / "max_pool_percent", str(percent)))
        stack.enter_context(setting(ZSWAP / "enabled", "Y"))
        stack.enter_context(switched_on(path, FIRST))
        yield ZswapSwap(most)


def zswap_compressor() -> str:
    """The name of the compressor that zswap is set to."""
    return (ZSWAP / "compressor").read_text().strip()


@contextmanager
def zram(algorithm: str, disk: int, path: Path, size: int) -> Iterator[Swap]:
    """Swap on a zram device that holds `disk` bytes of pages; what it has no room for goes to a file."""
    if not ZRAM.is_dir():
        run("modprobe", "zram")
    try:
        number = int((ZRAM / "hot_add").read_text())
    except OSError as error:
        raise BenchError(f"this kernel gives no zram device: {error.strerror}") from None
    block, device = Path(f"/sys/block/zram{number}"), Path(f"/dev/zram{number}")
    made = False
    try:
        try:
            (block / "comp_algorithm").write_text(algorithm)
        except OSError:
            raise BenchError(f"this kernel's zram has no {algorithm}") from None
        (block / "disksize").write_text(str(disk // PAGE * PAGE))
        if not device.exists():
            major, minor = map(int, (block / "dev").read_text().split(":"))
            os.mknod(device, 0o600 | 0o060000, os.makedev(major, minor))
            made = True
        run("mkswap", str(device))
        with no_zswap(), prepared_file(path, size), switched_on(device, FIRST), switched_on(path, SECOND):
            yield ZramSwap(block)
    finally:
        release(block, number)
        if made:
            device.unlink(missing_ok=True)


def release(block: Path, number: int) -> None:
    """Remove a zram device; whoever looks at new devices may still have it open for a moment."""
    for attempt in range(100):
        try:
            (block / "reset").write_text("1")
            (ZRAM / "hot_remove").write_text(str(number))
            return
        except OSError:
            if attempt == 99:
                raise
            time.sleep(0.02)
