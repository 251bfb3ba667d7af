"""Read the Python functions installed on this machine and write down which words and shapes each one uses.

    python read_functions.py OUTPUT.npz [--functions N]

The sources are the standard library, then the installed packages, then the tests that come with them, until
there are N functions. A function's *words* are the names and short strings in it; its *shapes* are the ways
its syntax nests (`If.test>Compare`). Both are sets of small numbers: the hash of each word or shape, modulo
the number of columns that the comparison has for it. A source file counts once, however often it is there.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import sys
import sysconfig
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

WORD_COLUMNS = 2048
SHAPE_COLUMNS = 1024
SHORTEST_FUNCTION = 6  # lines; in shorter ones, or with fewer words and shapes, two are alike by chance
FEWEST_WORDS, FEWEST_SHAPES = 5, 12
LONGEST_STRING = 40  # characters; longer strings are texts, not words
LAST_FOLDERS = {"test", "tests", "idle_test", "__pycache__", "lib2to3"}


@dataclass(frozen=True)
class Function:
    """One function: where it is, and its two sets."""

    label: str
    words: frozenset[int]
    shapes: frozenset[int]


def bucket(text: str, columns: int) -> int:
    """Return the column for a word or a shape: the same in every run and on every machine."""
    return zlib.crc32(text.encode("utf-8", "surrogatepass")) % columns


def word_of(node: ast.AST) -> str | None:
    """Return the name or short string that a node of the syntax tree carries, if any."""
    match node:
        case ast.Name(id=word) | ast.Attribute(attr=word) | ast.arg(arg=word) | ast.keyword(arg=str(word)):
            return word
        case ast.Constant(value=str(word)) if len(word) <= LONGEST_STRING:
            return word
    return None


def describe(label: str, function: ast.AST) -> Function:
    """Collect the words and shapes below one function."""
    words: set[int] = set()
    shapes: set[int] = set()
    pending = [function]
    while pending:
        node = pending.pop()
        parent = type(node).__name__
        word = word_of(node)
        if word is not None:
            words.add(bucket(word, WORD_COLUMNS))
        for field, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else (value,):
                if isinstance(child, ast.AST) and not isinstance(child, ast.expr_context):
                    shapes.add(bucket(f"{parent}.{field}>{type(child).__name__}", SHAPE_COLUMNS))
                    pending.append(child)
    return Function(label, frozenset(words), frozenset(shapes))


def functions_in(source: bytes, label: str) -> Iterator[Function]:
    """Yield the functions and methods of one file, top to bottom; inner ones belong to their outer one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return
    pending: list[tuple[str, ast.stmt]] = [("", statement) for statement in reversed(tree.body)]
    while pending:
        prefix, node = pending.pop()
        match node:
            case ast.ClassDef(name=name, body=body):
                pending += [(f"{prefix}{name}.", statement) for statement in reversed(body)]
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                if (node.end_lineno or 0) - node.lineno + 1 >= SHORTEST_FUNCTION:
                    yield describe(f"{label}:{prefix}{name}", node)


def is_big_enough(function: Function) -> bool:
    """Tell whether there is enough in a function to call it like another one."""
    return len(function.words) >= FEWEST_WORDS and len(function.shapes) >= FEWEST_SHAPES


def source_files() -> list[tuple[Path, str]]:
    """List the source files of this machine's Python and their short names, those of most interest first."""
    paths = sysconfig.get_paths()
    stdlib = Path(paths["stdlib"])
    packages = sorted({Path(paths["purelib"]), Path(paths["platlib"])})
    first: list[tuple[Path, str]] = []
    last: list[tuple[Path, str]] = []
    for root in [stdlib, *packages]:
        for path in sorted(root.rglob("*.py")):
            inside = path.relative_to(root)
            if root == stdlib and ("site-packages" in inside.parts or "dist-packages" in inside.parts):
                continue
            (last if LAST_FOLDERS & set(inside.parts) else first).append((path, str(inside)))
    return first + last


def read_functions(wanted: int) -> tuple[list[Function], int, int]:
    """Return up to `wanted` functions, and how many files and bytes of source they came from."""
    functions: list[Function] = []
    seen: set[bytes] = set()
    files = size = shown = 0
    for path, label in source_files():
        if len(functions) >= wanted:
            break
        try:
            source = path.read_bytes()
        except OSError:
            continue
        digest = hashlib.sha256(source).digest()
        if digest in seen:
            continue
        seen.add(digest)
        found = [one for one in functions_in(source, label) if is_big_enough(one)]
        if found:
            functions += found
            files += 1
            size += len(source)
        percent = min(100, 100 * len(functions) // wanted)
        if percent > shown:
            shown = percent
            print(f"reading the sources: {percent} %", flush=True)
    return functions[:wanted], files, size


def pack(sets: list[frozenset[int]]) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Put sets of numbers behind one another: all items, and where each set starts (and, last, the end)."""
    starts = np.cumsum([0] + [len(one) for one in sets]).astype(np.int64)
    items = np.fromiter((item for one in sets for item in sorted(one)), np.int32, int(starts[-1]))
    return items, starts


def main() -> int:
    """Read, describe and write; print progress as `what: N %` lines."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--functions", type=int, default=16384, metavar="N")
    options = parser.parse_args()
    functions, files, size = read_functions(options.functions)
    words, word_starts = pack([one.words for one in functions])
    shapes, shape_starts = pack([one.shapes for one in functions])
    np.savez(
        options.output,
        words=words,
        word_starts=word_starts,
        shapes=shapes,
        shape_starts=shape_starts,
        labels=np.array([one.label for one in functions], dtype=np.str_),
        columns=np.array([WORD_COLUMNS, SHAPE_COLUMNS]),
        source=np.array([files, size]),
    )
    print(f"{len(functions)} functions from {files} files, {size} bytes", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
