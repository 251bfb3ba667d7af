"""The command's first step: for `userswap run`, the library that stands in front of malloc is put into the process.

That can only be done by the loader, before anything has run: so the interpreter is executed once more, as it was
called, with the library in LD_PRELOAD. What that takes twice is kept small: nothing is imported here that need not be.

The environment is put back before anything of the program runs. What the program starts is started without
userswap (`--ram` is this process's), and would only carry a library that nobody asks for anything; and a program's
own LD_PRELOAD stays what it was.
"""

import os
import sys

__all__ = ["MARK", "main", "split", "why_not"]

# Set while the interpreter is executed anew: what LD_PRELOAD was, with a letter before it; empty if it was not set.
MARK = "_USERSWAP_PRELOADED"
OPTIONS_WITH_VALUE = (
    "--ram",
    "--swap",
    "--tiers",
    "--min-array",
    "--map",
    "--children",
    "--delivery",
    "--stats",
    "--trace",
)
# What LD_PRELOAD was, once the interpreter was executed anew.
_before: list[str] = []


def main() -> int:
    """Carry out the command line, and return the exit code."""
    if MARK in os.environ:
        put_back()
    elif sys.argv[1:2] == ["run"] and wanted(split(sys.argv[2:])[0]):
        execute()
    from userswap.cli.main import main

    return main()


def split(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Return the options of `userswap run` itself, and the program (a name, -m or -c) with its arguments."""
    at = 0
    while at < len(arguments):
        argument = arguments[at]
        if argument == "--":
            return arguments[:at], arguments[at + 1 :]
        if argument == "-" or not argument.startswith("-") or argument[:2] in ("-m", "-c"):
            break
        at += 2 if argument in OPTIONS_WITH_VALUE else 1
    return arguments[:at], arguments[at:]


def wanted(options: list[str]) -> bool:
    """Whether what other libraries allocate is to live in swap."""
    return not any(option in ("--only-numpy", "-h", "--help") for option in options)


def library() -> str:
    """The path of the library."""
    return __file__.removesuffix("cli/preload.py") + "native/shim.so"


def why_not() -> str:
    """What keeps the library out, as a part of a sentence."""
    path = library()
    if not os.path.exists(path):  # noqa: PTH110 - pathlib takes time that every start would pay
        return f"{path} is missing; install userswap again"
    if any(sign in path for sign in ": "):
        return f"the loader can't take a library whose path has a space or colon, as {path} has; install it elsewhere"
    if not sys.executable or not sys.orig_argv:
        return "this interpreter does not say how it was started; use the command userswap"
    outer = outermost()
    if outer:
        return f"{outer} was started first, and would start once more; put userswap first: userswap run -m {outer} ..."
    if not _before:
        return "main() of userswap.cli.main was called by a program; use the command userswap"
    return f"the loader did not put {path} before the C library; it does not for programs that run with privileges"


def outermost() -> str:
    """The module that was started (python -m) and runs userswap now, for instance a profiler; "" if it is userswap."""
    arguments = iter(sys.orig_argv[1:])
    for argument in arguments:
        if argument in ("-X", "-W"):
            next(arguments, None)
        elif not argument.startswith("-") or argument.startswith("--") or "c" in argument:
            break  # a script or code, such as the command itself
        elif "m" in argument:
            module = argument.partition("m")[2] or next(arguments, "")
            return "" if module.partition(".")[0] == "userswap" else module
    return ""


def execute() -> None:
    """Execute this interpreter again, with the library; returns if that can't be."""
    path = library()
    if not sys.executable or not sys.orig_argv or not os.path.exists(path) or any(sign in path for sign in ": "):  # noqa: PTH110
        return
    if outermost():
        return
    before = os.environ.get("LD_PRELOAD")
    environment = {
        # Arrow brings allocators with it that take their memory from the kernel by themselves.
        "ARROW_DEFAULT_MEMORY_POOL": "system",
        **os.environ,
        MARK: "" if before is None else f"={before}",
        # First: behind us another allocator serves what we don't.
        "LD_PRELOAD": f"{path}:{before}" if before else path,
    }
    try:
        os.execve(sys.executable, sys.orig_argv, environment)
    except OSError:
        return


def put_back() -> None:
    """Make the environment what it was before `execute`."""
    _before.append(os.environ.pop(MARK))
    os.environ.pop("LD_PRELOAD", None)
    if _before[0]:
        os.environ["LD_PRELOAD"] = _before[0][1:]
