"""`userswap run`: runs a Python program in this process, with its large arrays and other allocations in swap.

The program must not notice: it gets a `__main__` module, sys.argv, sys.path[0], exit code, tracebacks and
a death by Ctrl-C exactly like those of `python script.py`. What userswap has to say, it says on stderr,
before the program starts or after it has ended.
"""

import atexit
import contextlib
import errno
import io
import os
import sys
import time
from argparse import BooleanOptionalAction, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

from userswap.cli import preload
from userswap.cli.main import Parser
from userswap.errors import UnsupportedError, UsageError
from userswap.sizes import format_size, parse_size

if TYPE_CHECKING:
    from userswap import Stats

__all__ = ["prepare"]

USAGE = """\
userswap run [--ram SIZE] [--swap [NAME=]PATH[:SIZE[:PRIO]]|none]... [--tiers NAMES] [--min-array SIZE]
                    [--only-numpy] [--hard] [--no-dedupe] [--encrypt] [--children share|own] [--map NAME]
                    [--delivery NAME] [--quiet] [--stats FILE] [--trace FILE]
                    (SCRIPT | -m MODULE | -c CODE) [ARGUMENT ...]"""
EPILOG = """\
Sizes are like 512M, 1.5GiB or 65536 (bytes); units are powers of 1024. SCRIPT may also be a directory or
zip file with a __main__.py, or - for standard input. Everything after it belongs to the program.
The exit code is the program's, or 2 when it could not be started. While it runs, userswap ps shows it, and userswap
set, swapon and swapoff change it, through a socket (USERSWAP_CONTROL=0 in the environment: none)."""
# What --stats writes, in this order. All sizes are bytes, all times nanoseconds.
FIELDS = (
    "budget_bytes",
    "peak_bytes",
    "resident_bytes",
    "pool_bytes",
    "metadata_bytes",
    "virtual_bytes",
    "peak_virtual_bytes",
    "swapped_bytes",
    "stored_bytes",
    "slot_bytes",
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
)


@dataclass(frozen=True, slots=True)
class Program:
    """What to run: `kind` is "script", "directory" (or zip file), "stdin", "module" or "code"."""

    kind: str
    target: str
    arguments: list[str]
    source: bytes = b""


def prepare(arguments: list[str]) -> Callable[[], int]:
    """Check everything that can be checked, set up swap, and return the action that runs the program.

    Raises UserswapError for a bad command line, a program that is missing, a --stats file that cannot be
    written, and whatever keeps userswap from working here.
    """
    options, rest = preload.split(arguments)
    parser = Parser(
        prog="userswap run",
        usage=USAGE,
        epilog=EPILOG,
        description="Run a Python program in less memory than it needs.",
        allow_abbrev=False,
    )
    parser.add_argument("--ram", metavar="SIZE", help="RAM for what lives in swap (default: what the machine leaves)")
    parser.add_argument(
        "--swap",
        metavar="SPEC",
        action="append",
        help="file or directory for what does not fit compressed, or none; repeat it for several: those with a higher "
        "PRIO are used first, those with the same (0, if you don't say) by turns",
    )
    parser.add_argument(
        "--tiers", metavar="NAMES", help="swap out to these only: zswap (RAM, compressed), and NAMEs of swap files"
    )
    parser.add_argument(
        "--min-array", metavar="SIZE", default="1M", help="allocations from this size on live in swap (default 1M)"
    )
    parser.add_argument(
        "--only-numpy", action="store_true", help="only NumPy's arrays live in swap, not what other libraries allocate"
    )
    parser.add_argument(
        "--hard", action="store_true", help="end the program rather than exceed --ram when swap is full"
    )
    parser.add_argument("--no-dedupe", action="store_true", help="store identical folios as often as there are")
    parser.add_argument(
        "--encrypt",
        action=BooleanOptionalAction,
        default=None,
        help="encrypt swap files, with keys that are in the program's memory only",
    )
    parser.add_argument(
        "--children",
        choices=("share", "own"),
        default="share",
        help="forked processes share the budget (share, the default), or each has a whole one (own)",
    )
    parser.add_argument("--map", metavar="NAME", help="design of the swap map (default: on_demand)")
    parser.add_argument(
        "--delivery", metavar="NAME", default="auto", help="of page faults: signal, thread or segv (default: auto)"
    )
    parser.add_argument("--quiet", action="store_true", help="no summary at the end")
    parser.add_argument("--stats", metavar="FILE", help="write the figures to FILE, as JSON")
    parser.add_argument(
        "--trace", metavar="FILE", help="record what is asked of the swap map, for userswap lab replay FILE"
    )
    chosen = parser.parse_args(options)
    program = find(rest)
    ram = None if chosen.ram is None else parse_size(chosen.ram, "--ram")
    min_array = parse_size(chosen.min_array, "--min-array")
    report = None if chosen.stats is None else writable(chosen.stats, "--stats")
    tape = None if chosen.trace is None else writable(chosen.trace, "--trace")
    if tape is not None and chosen.map is not None:
        raise UsageError("--trace records under a design of its own, so that any can replay it: leave out --map.")
    if tape is not None and tape == report:
        raise UsageError("--stats and --trace name the same file: name two.")
    summary = Summary(install(ram, min_array, chosen), report, chosen.quiet, tape, program)

    def action() -> int:
        # Registered before the program registers anything, so that it is called last.
        atexit.register(summary.finish)
        return execute(program, summary)

    return action


def find(rest: list[str]) -> Program:
    """Return the program that `rest`, what follows userswap's options, names. Raises UsageError."""
    if not rest or not rest[0]:
        raise UsageError("Say what to run: userswap run script.py, or -m module, or -c code.")
    first, *arguments = rest
    if first[:2] in ("-m", "-c"):
        # Like python, take "-mtimeit" as well as "-m timeit".
        if not first[2:] and not arguments:
            raise UsageError(f"Nothing follows {first}: write -m module or -c code.")
        target, arguments = (first[2:], arguments) if first[2:] else (arguments[0], arguments[1:])
        return Program("module" if first[:2] == "-m" else "code", target, arguments)
    if first == "-":
        return Program("stdin", first, arguments)
    path = Path(first)
    try:
        if path.is_dir():
            if not any((path / f"__main__.{ending}").is_file() for ending in ("py", "pyc")):
                raise UsageError(f"{first} is a directory without a __main__.py: name the script in it to run.")
            return Program("directory", first, arguments)
        with io.open_code(os.path.abspath(first)) as file:  # noqa: PTH100 - open_code wants it so
            source = file.read()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        hint = "name the script to run"
        if first.startswith("python"):
            hint = "leave out the word python, as in userswap run script.py"
        raise UsageError(f"There is no program {first!r} to run ({reason}): {hint}.") from None
    # A zip file begins so; python looks for a __main__.py in it.
    if source[:4] == b"PK\x03\x04":
        return Program("directory", first, arguments)
    return Program("script", first, arguments, source)


def writable(name: str, option: str) -> Path:
    """Return the absolute path of the file of an option, whose directory was tried out. Raises UsageError."""
    # Absolute, since the program may change its working directory.
    path = Path(name).absolute()
    mend = f"name another file with {option}"
    try:
        if replaceable(path):
            # A link stays; what it leads to is replaced.
            path = path.resolve()
        if path.is_dir() or not name:
            raise UsageError(f"{option} {name!r} is a directory, not a file: {mend}.")
        if path.exists() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        if replaceable(path):
            draft = draft_of(path)
            draft.touch(exist_ok=False)
            draft.unlink()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{option} {name!r} cannot be written ({reason}): {mend}.") from None
    return path


def replaceable(path: Path) -> bool:
    """Tell whether `path` is, or would be, a regular file of its own, not a pipe or /dev/stdout."""
    return path.parts[1:2] not in (("dev",), ("proc",)) and (path.is_file() or not path.exists())


def draft_of(path: Path) -> Path:
    """Return the name under which the new `path` is written, to be put in its place in one step."""
    return path.with_name(f".{path.name[:200]}.{os.getpid()}.new")


def install(ram: int | None, min_array: int, chosen: Namespace) -> Any:
    """Set up swap for large allocations and return the handle. Raises UserswapError."""
    try:
        import userswap
        from userswap import malloc_hook
        from userswap.swap.map import DESIGN_NAMES, TRACED

        design = DESIGN_NAMES[0] if chosen.map is None else chosen.map
        if chosen.trace is not None:
            design = TRACED
        elif design == TRACED:
            raise UsageError("To record what is asked of the swap map, write --trace FILE instead of --map traced.")
        handle = userswap.install(
            ram=ram,
            swap=chosen.swap,
            tiers=chosen.tiers,
            min_array=min_array,
            hard=chosen.hard,
            dedupe=not chosen.no_dedupe,
            encrypt=chosen.encrypt,
            map_design=design,
            children=chosen.children,
            delivery=chosen.delivery,
        )
        if not chosen.only_numpy and not malloc_hook.install(handle.pool._core, handle.min_array) and not chosen.quiet:
            say(f"userswap: only NumPy's arrays live in swap: {preload.why_not()}.\n")
        return handle
    except ImportError as error:
        raise UnsupportedError(
            f"A part of userswap cannot be loaded ({error}): install it again, for example with "
            "pip install --force-reinstall userswap, and see userswap doctor."
        ) from error


def execute(program: Program, summary: "Summary") -> int:
    """Run the program as `__main__`; what it raises passes through, without a trace of our frames."""
    # The interpreter expects a __main__ for as long as it runs the old one.
    previous = sys.modules["__main__"]
    try:
        start(program)
    except SystemExit as end:
        complaint = complaint_of_runpy(program, end)
        if complaint is None:
            raise
        summary.cancel()
        print(f"userswap: {complaint}", file=sys.stderr)
        return 2
    except BaseException as error:
        hide_frames(error)
        raise
    finally:
        del previous
    return 0


def start(program: Program) -> None:
    """Make the `__main__` module and everything around it as python does, and run the program in it."""
    import builtins
    from importlib.machinery import BuiltinImporter, SourceFileLoader, SourcelessFileLoader

    namespace: dict[str, Any] = {"__name__": "__main__", "__doc__": None, "__package__": None}
    loader: Any = BuiltinImporter
    file = os.path.join(os.getcwd(), program.target)  # noqa: PTH109, PTH118 - python keeps "./" and ".." too
    compiled = program.kind == "script" and program.target.endswith(".pyc")
    if program.kind == "script":
        loader = (SourcelessFileLoader if compiled else SourceFileLoader)("__main__", file)
    namespace |= {"__loader__": loader, "__spec__": None}
    if sys.version_info < (3, 14):
        namespace["__annotations__"] = {}
    namespace["__builtins__"] = builtins
    if program.kind in ("script", "stdin"):
        namespace["__file__"] = file if program.kind == "script" else "<stdin>"
        if sys.version_info < (3, 15):
            namespace["__cached__"] = None
    module = ModuleType("__main__")
    module.__dict__.clear()
    module.__dict__.update(namespace)
    sys.modules["__main__"] = module

    sys.argv[:] = [{"module": "-m", "code": "-c"}.get(program.kind, program.target), *program.arguments]
    if program.kind == "directory":
        import_from(file)
    elif program.kind == "script":
        import_from(str(Path(program.target).resolve().parent))
    else:
        import_from(os.getcwd() if program.kind == "module" else "")  # noqa: PTH109

    if program.kind in ("module", "directory"):
        import runpy

        # What `python -m` itself calls; its frames are in python's own tracebacks too.
        if program.kind == "module":
            runpy._run_module_as_main(program.target)  # type: ignore[attr-defined]
        else:
            runpy._run_module_as_main("__main__", False)  # type: ignore[attr-defined]
        return
    code: Any
    if compiled:
        import marshal

        code = marshal.loads(program.source[16:])
    elif program.kind == "script":
        code = compile(program.source, file, "exec", dont_inherit=True)
    elif program.kind == "stdin":
        code = compile(sys.stdin.buffer.read(), "<stdin>", "exec", dont_inherit=True)
    else:
        text = program.target
        if sys.version_info >= (3, 14):
            import textwrap

            text = textwrap.dedent(text)
        code = compile(text, "<string>", "exec", dont_inherit=True)
        show_source(code, text)
    exec(code, module.__dict__)


def show_source(code: CodeType, text: str) -> None:
    """Let tracebacks show the lines of what -c was given, as those of Python 3.13 and newer do."""
    if sys.version_info >= (3, 13):
        import linecache

        # Python's own way, which has no public name. Without it the lines are missing, no more.
        register = getattr(linecache, "_register_code", None)
        if register is not None:
            register(code if sys.version_info >= (3, 14) else "<string>", text, "<string>")


def import_from(first: str) -> None:
    """Put `first` where python puts the program's directory: in the place of userswap's own."""
    if not sys.flags.safe_path:
        sys.path[0] = first
    elif first and Path(first).exists() and not Path(first).is_dir():
        sys.path.insert(0, first)


def complaint_of_runpy(program: Program, end: SystemExit) -> str | None:
    """Return the sentence for a module that does not exist; None when the program itself raised `end`."""
    trace = end.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None or trace.tb_frame.f_code.co_name != "_run_module_as_main":
        return None
    # "/usr/bin/python3: No module named x": python's name is not the culprit's.
    reason = str(end.code).removeprefix(f"{sys.executable}: ")
    mend = "check the name after -m" if program.kind == "module" else "name the script to run"
    return f"{reason}: {mend}."


def hide_frames(error: BaseException) -> None:
    """See to it that the traceback of `error`, which ends the program, begins with the program's own frames.

    On its way out the exception still collects our frames. The interpreter must see it leave, to end as it
    would have (after Ctrl-C by a signal, for instance), so the frames are cut off when it is printed.
    """
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    hook = sys.excepthook

    def print_program_error(kind: type[BaseException], value: BaseException, _trace: TracebackType | None) -> None:
        sys.excepthook = hook
        if value is error:
            value.__traceback__ = sys.last_traceback = trace
        hook(kind, value, value.__traceback__)

    sys.excepthook = print_program_error


class Summary:
    """What is said when the program has ended: a few lines on stderr, the figures in a file, the trace in another."""

    def __init__(self, handle: Any, report: Path | None, quiet: bool, tape: Path | None, program: Program) -> None:
        self.handle = handle
        self.report = report
        self.quiet = quiet
        self.tape = tape
        self.program = program
        self.process = os.getpid()
        self.begin = time.monotonic()

    def cancel(self) -> None:
        """Say nothing: the program never ran."""
        atexit.unregister(self.finish)

    def finish(self) -> None:
        """Print and write what was asked for; called when the interpreter exits."""
        # A forked child runs the same exit functions; the figures are its parent's to tell.
        if os.getpid() != self.process:
            return
        stats = self.handle.pool.stats()
        reason = self.handle.pool.budget_reason
        if self.report is not None:
            try:
                write_report(self.report, stats, reason, time.monotonic() - self.begin)
            except OSError as error:
                say(f"userswap: --stats {self.report} could not be written ({error.strerror}).\n")
        traced = "" if self.tape is None else self.write_trace(self.tape)
        if not self.quiet:
            say(described(stats, reason) + traced)

    def write_trace(self, path: Path) -> str:
        """Write what was recorded to `path`, and return a line about it."""
        from userswap import malloc_hook
        from userswap.lab.trace import Trace

        pool = self.handle.pool
        target = self.program.target
        name = {"code": "-c", "stdin": "-", "module": target}.get(self.program.kind, Path(target).name)
        try:
            trace = Trace.recorded(pool, name)
            # From here on all memory is ordinary: there is nothing left to record.
            malloc_hook.install(None, 0)
            self.handle.uninstall()
            put_in_place(path, trace.encode())
        except OSError as error:
            say(f"userswap: --trace {path} could not be written ({error.strerror}).\n")
            return ""
        except MemoryError:
            say("userswap: there is no memory to write what --trace recorded.\n")
            return ""
        cut = ", cut: there was no room for more" if trace.cut else ""
        return f"  {'trace':<10} {len(trace.kinds):,} events{cut}\n"


def say(text: str) -> None:
    """Write to the process's stderr, wherever the program has sent sys.stderr; never fail."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        sys.__stderr__.write(text)  # type: ignore[union-attr]
        sys.__stderr__.flush()  # type: ignore[union-attr]


def write_report(path: Path, stats: "Stats", reason: str | None, seconds: float) -> None:
    """Write the figures to `path` as JSON, in one step where it is a regular file. Raises OSError."""
    import json

    figures: dict[str, Any] = {name: getattr(stats, name) for name in FIELDS}
    figures |= {"budget_reason": reason, "seconds": round(seconds, 3)}
    put_in_place(path, (json.dumps(figures, indent=2) + "\n").encode())


def put_in_place(path: Path, content: bytes) -> None:
    """Write a file in one step where it is, or will be, a regular one. Raises OSError."""
    if not replaceable(path):
        # Behind /dev/stdout may be a file with the program's output: add to it, in the right order.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            sys.stdout.flush()
        with path.open("ab") as file:
            file.write(content)
        return
    draft = draft_of(path)
    try:
        with draft.open("xb") as file:
            file.write(content)
        draft.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            draft.unlink()
        raise


def described(stats: "Stats", reason: str | None) -> str:
    """Return the summary for a person, a few lines."""
    memory, budget = format_size(stats.peak_virtual_bytes), format_size(stats.budget_bytes)
    because = f"  {'budget':<10} {reason}\n" if reason else ""
    # First touches are faults too; nothing was swapped as long as nothing went out.
    if not stats.swap_outs:
        if not stats.peak_virtual_bytes:
            return f"userswap: swap was never needed: nothing was large enough (RAM budget {budget}).\n"
        return f"userswap: swap was never needed: {memory} of large allocations at most, in {budget} of RAM.\n"
    ratio = stats.peak_virtual_bytes / max(stats.budget_bytes, 1)
    text = f"userswap: {memory} of large allocations at once in {budget} of RAM ({ratio:.1f} times as much)\n{because}"
    text += f"  {'RAM used':<10} {format_size(stats.peak_bytes)} at most\n"
    text += (
        f"  {'faults':<10} {stats.faults:,} in {format_time(stats.fault_ns_total)}"
        f" (p50 {format_time(stats.fault_ns_p50)}, p99 {format_time(stats.fault_ns_p99)})\n"
    )
    if stats.slot_bytes or stats.writebacks:
        text += f"  {'swap file':<10} {format_size(stats.slot_bytes)} on disk, {stats.writebacks:,} writebacks\n"
    else:
        text += f"  {'swap file':<10} not needed: everything fitted compressed in RAM\n"
    return text


def format_time(nanoseconds: float) -> str:
    """Return a time in the unit that suits it: "18 µs", "1.2 ms", "3.4 s"."""
    for unit, scale in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if nanoseconds >= scale:
            value = nanoseconds / scale
            return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"
    return f"{nanoseconds:.0f} ns"
