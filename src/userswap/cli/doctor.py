"""`userswap doctor`: tries out what userswap needs on this machine, as this user, and says how to mend it.

Every answer is a probe, not a guess from a version number, where there is something to probe. Nothing
here imports NumPy or userswap's compiled part until the last check, so that it can report on them.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import platform
import resource
import signal
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fcntl import ioctl
from pathlib import Path

from userswap.budget import counting_limit, default_budget, memory_limits, watched_levels
from userswap.cli.main import Parser
from userswap.control.places import complaint, places, usable_place
from userswap.errors import BudgetError, SwapPathError
from userswap.sizes import format_size
from userswap.swapfiles import NETWORK, file_system, open_swap

__all__ = ["Check", "examine", "prepare"]

# linux/userfaultfd.h
SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282, "riscv64": 282}
UFFD_USER_MODE_ONLY = 1
UFFD_API = 0xAA
UFFDIO_API = 0xC018AA3F
UFFDIO_REGISTER = 0xC020AA00
USERFAULTFD_IOC_NEW = 0xAA00
REGISTER_MISSING_AND_WP = 3
NEEDED = {"PAGEFAULT_FLAG_WP": 1 << 0, "SIGBUS": 1 << 7}
USEFUL = {"WP_UNPOPULATED": 1 << 13, "WP_ASYNC": 1 << 15, "MOVE": 1 << 16}
# Delivery by segv takes mappings for what is in place here and there; with fewer, more has to come and go together.
LEAST_MAPS = 65530
NOT_KERNEL_MODE = "that takes CAP_SYS_PTRACE, vm.unprivileged_userfaultfd=1 or access to /dev/userfaultfd"
# What the last check runs.
TRIAL = """
import userswap, userswap._core
with userswap.Pool(ram="64MiB", swap="none") as pool:
    array = pool.zeros(1 << 18, dtype="u1")
    array[:] = 7
    pool.evict()
    if int(array.sum()) != 7 << 18:
        raise SystemExit("An array came back with other bytes than it had.")
    del array
    print(userswap._core.delivery())
"""
TRIAL_OF_MALLOC = """
from userswap import malloc_hook
if not malloc_hook.owns(bytearray(4 << 20)):
    raise SystemExit("Memory that Python asked for is not in swap.")
"""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. `state`: "ok", "note" (works, but see `mend`), "problem" (can't run)."""

    name: str
    state: str
    value: str
    mend: str = ""


def prepare(arguments: list[str]) -> Callable[[], int]:
    """Return the action that examines this machine and prints what it found.

    Its exit code is 0 when userswap can run here, else 1. Raises UsageError for a bad command line.
    """
    parser = Parser(
        prog="userswap doctor",
        description="Say what this machine can do, what it can't, and how to mend it.",
        epilog="The exit code is 0 when userswap can run here, 1 when it can't.",
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print the findings as JSON")
    as_json = parser.parse_args(arguments).json

    def action() -> int:
        checks = examine()
        able = all(check.state != "problem" for check in checks)
        if as_json:
            import json

            findings = {
                "able": able,
                "verdict": verdict(checks),
                "checks": [asdict(check) for check in checks],
            }
            print(json.dumps(findings, indent=2))
        else:
            print(table(checks))
        return 0 if able else 1

    return action


def examine() -> list[Check]:
    """Look at everything, in the order in which it is shown."""
    return [
        linux(),
        page_size(),
        *userfaultfd(),
        kernel_mode(),
        delivery(),
        fault_signals(),
        overcommit(),
        address_space(),
        max_map_count(),
        huge_pages(),
        *limits(),
        budget(),
        swap_place(),
        control_place(),
        numpy_version(),
        blosc2_library(),
        encryption(),
        compiled_part(),
        large_allocations(),
    ]


def verdict(checks: list[Check]) -> str:
    """Return the one sentence that sums it up."""
    problems = [check.name for check in checks if check.state == "problem"]
    notes = [check.name for check in checks if check.state == "note"]
    if problems:
        return f"userswap can't run here: mend {', '.join(problems)} first."
    if notes:
        return f"userswap can run here; see the notes on {', '.join(notes)}."
    return "userswap can run here."


def table(checks: list[Check]) -> str:
    """Return the findings for a person: aligned, with how to mend each problem below it."""
    width = max(len(check.name) for check in checks)
    mark = {"ok": "ok  ", "note": "note", "problem": "FAIL"}
    lines = []
    for check in checks:
        lines.append(f"{mark[check.state]}  {check.name:<{width}}  {check.value}")
        if check.mend:
            lines.append(f"      {'':<{width}}  -> {check.mend}")
    return "\n".join([*lines, "", verdict(checks)])


def linux() -> Check:
    """The kernel and the machine."""
    value = f"{platform.release()} on {platform.machine()}"
    numbers = [int(part) for part in platform.release().split("-")[0].split(".")[:2] if part.isdecimal()]
    if platform.machine() not in SYS_USERFAULTFD:
        return Check("Linux", "note", value, "userswap is tried on x86_64 and aarch64 only")
    if numbers < [5, 11]:
        return Check("Linux", "problem", value, "use Linux 5.11 or newer")
    return Check("Linux", "ok", value)


def page_size() -> Check:
    """The hardware page: the core is built for 4 KiB."""
    size = mmap.PAGESIZE
    if size != 4096:
        return Check("page size", "problem", format_size(size), "boot a kernel with pages of 4 KiB")
    return Check("page size", "ok", format_size(size))


def userfaultfd() -> list[Check]:
    """What the kernel lets this user do about page faults: open, features, a registered range."""
    name = "userfaultfd"
    try:
        with uffd() as fd:
            features = struct.unpack("QQQ", ioctl(fd, UFFDIO_API, struct.pack("QQQ", UFFD_API, 0, 0)))[1]
    except OSError as error:
        return [Check(name, "note", f"user-mode faults: {error.strerror}", mend_userfaultfd(error))]
    missing = [feature for feature, bit in NEEDED.items() if not features & bit]
    if missing:
        return [Check(name, "note", f"without {', '.join(missing)}", "use Linux 5.11 or newer")]
    try:
        register()
    except OSError as error:
        return [Check(name, "note", f"a range can't be registered: {error.strerror}", mend_userfaultfd(error))]
    who = "root" if os.geteuid() == 0 else "this user, without privilege"
    absent = [feature for feature, bit in USEFUL.items() if not features & bit]
    has = ", ".join(feature for feature, bit in (NEEDED | USEFUL).items() if features & bit)
    checks = [Check(name, "ok", f"works for {who}: {has}")]
    if "MOVE" in absent:
        checks.append(
            Check(
                "UFFDIO_MOVE",
                "note",
                "absent: pages are copied, which is slower",
                "Linux 6.8 or newer has it",
            )
        )
    return checks


@contextlib.contextmanager
def uffd(flags: int = UFFD_USER_MODE_ONLY) -> Iterator[int]:
    """Give a new userfaultfd, for faults from user mode unless `flags` say otherwise. Raises OSError."""
    number = SYS_USERFAULTFD.get(platform.machine())
    if number is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    fd = libc.syscall(ctypes.c_long(number), ctypes.c_long(os.O_CLOEXEC | os.O_NONBLOCK | flags))
    if fd < 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))
    try:
        yield fd
    finally:
        os.close(fd)


def register() -> None:
    """Arm a page of memory as the core does, with signal delivery. Raises OSError."""
    with uffd() as fd, mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        ioctl(fd, UFFDIO_API, struct.pack("QQQ", UFFD_API, sum(NEEDED.values()), 0))
        start = ctypes.addressof(holder := ctypes.c_char.from_buffer(page))
        # The buffer must be let go before the page can be unmapped.
        del holder
        ioctl(fd, UFFDIO_REGISTER, struct.pack("QQQQ", start, mmap.PAGESIZE, REGISTER_MISSING_AND_WP, 0))


def mend_userfaultfd(error: OSError) -> str:
    """Return what to do about an error of userfaultfd."""
    filtered = status("Seccomp") == "2"
    if error.errno == errno.ENOSYS and not filtered:
        return "use a kernel built with CONFIG_USERFAULTFD=y"
    if error.errno == errno.EINVAL:
        return "use Linux 5.11 or newer, which has UFFD_USER_MODE_ONLY"
    if error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS):
        if filtered:
            return (
                "a seccomp filter forbids it: allow the userfaultfd system call in its profile, or start the "
                "container with --security-opt seccomp=unconfined (Kubernetes: seccompProfile Unconfined)"
            )
        return "a security module forbids it (SELinux, AppArmor): allow userfaultfd to this user"
    return "see what the kernel log says (dmesg)"


def kernel_mode() -> Check:
    """Whether faults from inside system calls could be served too; userswap runs without."""
    ways = ways_to_kernel_mode()
    value = f"allowed ({', '.join(ways)}): with --delivery thread raw system calls work on swapped memory, too"
    return Check("kernel-mode faults", "ok", value if ways else "not allowed, and not needed")


def ways_to_kernel_mode() -> list[str]:
    """Return what allows a userfaultfd for faults of the kernel; it is tried out."""
    ways = []
    with contextlib.suppress(OSError):
        fd = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        try:
            os.close(ioctl(fd, USERFAULTFD_IOC_NEW, os.O_CLOEXEC))
            ways.append("/dev/userfaultfd")
        finally:
            os.close(fd)
    with contextlib.suppress(OSError), uffd(0):
        # Bit 19 is CAP_SYS_PTRACE.
        if int(status("CapEff") or "0", 16) & 1 << 19:
            ways.append("CAP_SYS_PTRACE")
        else:
            ways.append("vm.unprivileged_userfaultfd=1")
    return ways


def delivery() -> Check:
    """How page faults will reach userswap, and why so."""
    name = "delivery"
    wish = os.environ.get("USERSWAP_DELIVERY") or "auto"
    asked = "" if wish == "auto" else " (USERSWAP_DELIVERY asks for it)"
    forbidden = refusal_of_userfaultfd()
    if wish == "auto":
        wish = "segv" if forbidden else "signal"
    if wish == "signal":
        if forbidden:
            return Check(name, "problem", f"signal{asked}, but {forbidden}", "leave out USERSWAP_DELIVERY")
        return Check(name, "ok", f"signal{asked}: userfaultfd works, and a fault comes to the thread that has it")
    if wish == "thread":
        if not ways_to_kernel_mode():
            return Check(name, "problem", f"thread{asked}, but {NOT_KERNEL_MODE}", "leave out USERSWAP_DELIVERY")
        return Check(name, "ok", f"thread{asked}: threads serve faults, those of the kernel too")
    if wish != "segv":
        return Check(name, "problem", f"{wish}{asked}: there is no such", "use auto, signal, thread or segv")
    reason = asked or f": {forbidden}, so protected mappings and SIGSEGV do its work"
    refused = refusal_of_memory_file()
    if refused:
        mend = "allow the userfaultfd system call, or writes to /proc/self/mem (proc_mem.force_override)"
        return Check(name, "problem", f"segv{reason}; but {refused}", mend)
    return Check(
        name,
        "ok" if asked else "note",
        f"segv{reason}",
        "it works, but is slower: memory that is swapped is copied, not moved, and nothing is read ahead",
    )


def refusal_of_userfaultfd() -> str:
    """Return why faults can't be delivered by signal; "" if they can."""
    try:
        register()
    except OSError as error:
        forbidden = error.errno in (errno.EPERM, errno.EACCES)
        return f"userfaultfd {'is forbidden' if forbidden else 'does not work'} ({error.strerror})"
    return ""


def refusal_of_memory_file() -> str:
    """Return why faults can't be delivered by segv; "" if they can."""
    pattern = b"userswap"
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    with mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as page:
        start = ctypes.addressof(holder := ctypes.c_char.from_buffer(page))
        # The buffer must be let go before the page can be unmapped.
        del holder
        if libc.mprotect(start, mmap.PAGESIZE, 0) != 0:
            return f"memory can't be protected ({os.strerror(ctypes.get_errno())})"
        try:
            fd = os.open("/proc/self/mem", os.O_RDWR | os.O_CLOEXEC)
            try:
                if os.pwrite(fd, pattern, start) == len(pattern) and os.pread(fd, len(pattern), start) == pattern:
                    return ""
            finally:
                os.close(fd)
        except OSError as error:
            return f"a process can't write to its own memory through /proc/self/mem ({error.strerror})"
    return "what a process writes to its own memory through /proc/self/mem does not arrive there"


def fault_signals() -> Check:
    """The signals by which faults arrive must not be blocked."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, []) & {signal.SIGBUS, signal.SIGSEGV}
    if blocked:
        names = " and ".join(sorted(signal.Signals(number).name for number in blocked))
        return Check(
            names,
            "note",
            "blocked in this thread, by whatever started it",
            f"start userswap from a process that does not block {names}: a fault would end the program",
        )
    return Check("SIGBUS, SIGSEGV", "ok", "not blocked")


def overcommit() -> Check:
    """Strict overcommit counts memory that is only reserved."""
    name, mode = "overcommit_memory", read("/proc/sys/vm/overcommit_memory")
    if mode == "2":
        return Check(
            name,
            "note",
            "2 (strict): the kernel may refuse large arrays",
            "sysctl vm.overcommit_memory=0",
        )
    return Check(name, "ok", {"0": "0 (heuristic)", "1": "1 (always)"}.get(mode, mode or "unknown"))


def address_space() -> Check:
    """RLIMIT_AS limits arrays even when they are swapped out."""
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        return Check("address space", "note", f"limited to {format_size(limit)}", "ulimit -v unlimited")
    return Check("address space", "ok", "unlimited")


def max_map_count() -> Check:
    """How many mappings a process may have."""
    text = read("/proc/sys/vm/max_map_count")
    if text.isdecimal() and int(text) < LEAST_MAPS:
        return Check("max_map_count", "note", text, f"sysctl vm.max_map_count={LEAST_MAPS}")
    return Check("max_map_count", "ok", text or "unknown")


def huge_pages() -> Check:
    """Transparent huge pages: of use, not needed."""
    modes = read("/sys/kernel/mm/transparent_hugepage/enabled")
    mode = modes.partition("[")[2].partition("]")[0]
    return Check("huge pages", "ok", mode or "not available, and not needed")


def limits() -> list[Check]:
    """The memory limits of this process's cgroups."""
    try:
        found, counts = memory_limits(), counting_limit()
    except BudgetError as error:
        return [Check("cgroup limit", "note", str(error))]
    if not found:
        return [Check("cgroup limit", "ok", "none")]
    return [
        Check(
            "cgroup limit",
            "ok",
            f"{format_size(limit.limit)}, {format_size(limit.used)} used ({limit.file} of {limit.cgroup})"
            + (": this one counts" if counts is not None and limit.cgroup == counts.cgroup else ""),
        )
        for limit in found
    ]


def budget() -> Check:
    """What a program gets without --ram."""
    try:
        found = default_budget()
    except BudgetError as error:
        return Check("default budget", "note", "none", str(error))
    levels = len(watched_levels())
    watched = f"{levels} cgroup{'s'[: levels != 1]} and what the machine has available" if levels else "the machine"
    return Check(
        "default budget", "ok", f"{format_size(found.bytes)}: {found.reason} (followed while a program runs: {watched})"
    )


def swap_place() -> Check:
    """Where swap goes without --swap; tried out for real."""
    name = "default swap"
    try:
        file = open_swap(None)
    except SwapPathError as error:
        return Check(name, "note", "no place", str(error))
    # No path asked for, so there is one or an error.
    assert file is not None
    try:
        room = os.fstatvfs(file.fd)
    finally:
        os.close(file.fd)
    kind, label = file_system(Path(file.name))
    free = room.f_bavail * room.f_frsize
    direct = "O_DIRECT" if file.direct else "no O_DIRECT: the page cache keeps a second copy for a while"
    value = f"{file.name} on {label or hex(kind)}, {format_size(free)} free, {direct}"
    if kind in NETWORK:
        return Check(name, "note", value, f"{NETWORK[kind]} may be slow: name a local disk with --swap PATH")
    if free < 1 << 30:
        return Check(name, "note", value, "free some space there, or name a larger disk with --swap PATH")
    return Check(name, "ok", value)


def control_place() -> Check:
    """Where programs listen for `userswap ps`, `set`, `swapon` and `swapoff`."""
    name = "control sockets"
    if os.environ.get("USERSWAP_CONTROL") == "0":
        return Check(name, "ok", "none, as USERSWAP_CONTROL=0 says")
    try:
        return Check(name, "ok", f"in {usable_place()}")
    except OSError:
        found = places(os.geteuid())
        why = "; ".join(
            f"{place} {complaint(place, os.geteuid()) or 'lies in a directory of others'}" for place in found
        )
        return Check(
            name, "note", f"no place ({why or 'USERSWAP_CONTROL_DIR is too long'}): programs can't be seen or changed",
            "make one of these directories yours alone (mode 0700), or name another with USERSWAP_CONTROL_DIR",
        )  # fmt: skip


def numpy_version() -> Check:
    """NumPy, looked up without importing it."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        found = version("numpy")
    except PackageNotFoundError:
        return Check("NumPy", "problem", "not installed", "pip install 'numpy>=1.25'")
    return Check("NumPy", "ok", found)


def blosc2_library() -> Check:
    """The compression library in the blosc2 wheel, loaded without its Python package."""
    from importlib.util import find_spec

    spec = find_spec("blosc2")
    if spec is None or spec.origin is None:
        return Check("Blosc2", "problem", "not installed", "pip install 'blosc2>=4.1'")
    found = sorted((Path(spec.origin).parent / "lib").glob("libblosc2.so*"))
    if not found:
        return Check(
            "Blosc2",
            "problem",
            f"no library in {Path(spec.origin).parent}",
            "install the wheel: pip install --force-reinstall --only-binary :all: blosc2",
        )
    try:
        library = ctypes.CDLL(str(found[-1]))
        library.blosc2_get_version_string.restype = ctypes.c_char_p
        version = library.blosc2_get_version_string().decode()
    except (OSError, AttributeError) as error:
        return Check("Blosc2", "problem", str(error), "pip install --force-reinstall blosc2")
    return Check("Blosc2", "ok", f"{version} ({found[-1]})")


def encryption() -> Check:
    """Whether swap files can be encrypted."""
    try:
        from userswap.backends import cipher

        name = cipher.start()
    except ImportError:
        name = None  # the next check says so
    if name is not None:
        return Check("encryption", "ok", f"{name}, by libcrypto (--encrypt)")
    return Check(
        "encryption",
        "note",
        "no libcrypto of OpenSSL 3: swap files can't be encrypted",
        "for --encrypt install it: on Debian and Ubuntu, apt-get install libssl3",
    )


def compiled_part() -> Check:
    """Userswap itself: everything set up for real, with a small array that is pushed out and read back.

    In a process of its own, so that even a crash becomes a finding.
    """
    name = "userswap"
    mend = "mend what is reported above; if nothing is, install userswap again, else report this as a bug"
    try:
        result = subprocess.run([sys.executable, "-c", TRIAL], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check(name, "problem", str(error), mend)
    if result.returncode < 0:
        return Check(name, "problem", f"ended by {signal.Signals(-result.returncode).name}", mend)
    if result.returncode:
        return Check(name, "problem", (result.stderr.strip().splitlines() or ["it failed"])[-1], mend)
    way = result.stdout.strip()
    return Check(name, "ok", f"an array was swapped out and in, by {way} (Python {platform.python_version()})")


def large_allocations() -> Check:
    """Whether `userswap run` can put itself before malloc: tried out with memory of Python's own."""
    name = "large allocations"
    command = [sys.executable, "-m", "userswap", "run", "--ram", "64M", "--swap", "none", "-c", TRIAL_OF_MALLOC]
    mend = "userswap run works for NumPy's arrays all the same"
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check(name, "note", str(error), mend)
    if result.returncode:
        lines = [line.removeprefix("userswap: ") for line in result.stderr.strip().splitlines()]
        # What keeps the library out is the first line; it is followed by the trial that failed.
        return Check(name, "note", lines[0] if lines else f"the trial ended with exit code {result.returncode}", mend)
    return Check(name, "ok", "userswap run serves those of any library that calls malloc")


def read(file: str) -> str:
    """Return what a file of /proc or /sys says; "" when it cannot be read."""
    try:
        return Path(file).read_text().strip()
    except OSError:
        return ""


def status(field: str) -> str:
    """Return a field of /proc/self/status; "" when it is not there."""
    for line in read("/proc/self/status").splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return value.strip()
    return ""
