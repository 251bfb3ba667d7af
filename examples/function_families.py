"""Compare every Python function with every other one and find families of copies: a plain NumPy program.

    python function_families.py FUNCTIONS.npz [--json RESULT.json]

FUNCTIONS.npz comes from read_functions.py. The program counts, for all pairs of functions, how many words and
how many shapes of syntax they share; two square matrices hold the counts. The likeness of two functions is
the share of what both have in what either has (the Jaccard index). From the matrices come
  - how alike two functions are in general: a histogram over all pairs,
  - for each function, the one most like it,
  - for each function, the one built alike from different words: copied, then renamed,
  - the tree of single-linkage clustering (a maximum spanning tree), and by cutting it the families of copies.
Nothing in this file knows about swapping: with N functions it simply needs some 8 N² bytes of memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]

BLOCK_ROWS = 512  # rows of a matrix that are multiplied at a time
CACHED_ROWS = 4  # rows that are looked at at a time, so that what is derived from them stays in the processor's cache
FAMILY_LIKENESS = 0.8  # functions at least this alike are linked into one family
RENAMED_SHAPES, RENAMED_WORDS = 0.9, 0.3  # at least as alike in shapes, at most as alike in words
HISTOGRAM_STEPS = 50


@dataclass(frozen=True)
class Sets:
    """Sets of small numbers behind one another; set i is `items[starts[i]:starts[i + 1]]`."""

    items: Ints
    starts: NDArray[np.int64]
    columns: int

    @property
    def sizes(self) -> Ints:
        """How many items each set has."""
        return np.diff(self.starts).astype(np.int32)


@dataclass(frozen=True)
class Result:
    """What was found, and how much memory its arrays took."""

    functions: int
    array_bytes: int
    histogram: list[int]
    nearest: list[int]
    nearest_likeness: list[float]
    renamed: list[int]
    renamed_likeness: list[float]
    families: list[list[int]]
    matrix_digests: dict[str, str]
    digest: str = ""


class Progress:
    """Prints `what: N %` whenever a whole percent is reached."""

    def __init__(self, what: str, total: int) -> None:
        self.what = what
        self.total = max(total, 1)
        self.shown = -1
        self.reach(0)

    def reach(self, done: int) -> None:
        """Say that `done` of the total is done."""
        percent = 100 * done // self.total
        if percent > self.shown:
            self.shown = percent
            print(f"{self.what}: {percent} %", flush=True)


def incidence_of(sets: Sets) -> NDArray[np.float32]:
    """Return a matrix with a row for each number, a column for each set, 1 where the set has the number."""
    matrix = np.zeros((sets.columns, len(sets.sizes)), dtype=np.float32)
    matrix[sets.items, np.repeat(np.arange(len(sets.sizes)), sets.sizes)] = 1
    return matrix


def count_shared(incidence: NDArray[np.float32], what: str) -> Ints:
    """Return for all pairs of sets how many numbers they share. Exact: sums of ones stay far below 2²⁴."""
    n = incidence.shape[1]
    shared = np.empty((n, n), dtype=np.int32)
    product = np.empty((min(BLOCK_ROWS, n), n), dtype=np.float32)
    progress = Progress(what, n)
    for i in range(0, n, BLOCK_ROWS):
        rows = incidence[:, i : i + BLOCK_ROWS].T.copy()
        np.matmul(rows, incidence, out=product[: len(rows)])
        shared[i : i + BLOCK_ROWS] = product[: len(rows)]
        progress.reach(min(i + BLOCK_ROWS, n))
    return shared


def jaccard(shared: Ints, sizes: Ints, others: Ints) -> Floats:
    """Turn counts of shared items into likenesses between 0 and 1."""
    either = sizes + others - shared
    likeness: Floats = shared / np.maximum(either, 1)
    return likeness


def survey(
    words: Ints, shapes: Ints, word_sizes: Ints, shape_sizes: Ints
) -> tuple[NDArray[np.int64], Ints, Floats, Ints, Floats]:
    """Look at all pairs once: the histogram, each function's nearest, and its nearest with other words."""
    n = len(words)
    sizes = word_sizes + shape_sizes
    histogram = np.zeros(HISTOGRAM_STEPS + 1, dtype=np.int64)
    nearest, renamed = np.zeros((2, n), dtype=np.int32)
    nearest_likeness, renamed_likeness = np.zeros((2, n))
    progress = Progress("looking at all pairs", n)
    for i in range(0, n, CACHED_ROWS):
        rows = np.arange(i, min(i + CACHED_ROWS, n))
        own = np.arange(len(rows))
        shared_words, shared_shapes = words[rows[0] : rows[-1] + 1], shapes[rows[0] : rows[-1] + 1]
        likeness = jaccard(shared_words + shared_shapes, sizes[rows, None], sizes)
        likeness[own, rows] = 0
        steps = (likeness * HISTOGRAM_STEPS).astype(np.int32)
        histogram += np.bincount(steps.ravel(), minlength=HISTOGRAM_STEPS + 1)
        nearest[rows] = best = likeness.argmax(axis=1)
        nearest_likeness[rows] = likeness[own, best]
        alike_words = jaccard(shared_words, word_sizes[rows, None], word_sizes)
        alike_shapes = jaccard(shared_shapes, shape_sizes[rows, None], shape_sizes)
        alike_shapes[alike_words > RENAMED_WORDS] = 0
        renamed[rows] = best = alike_shapes.argmax(axis=1)
        renamed_likeness[rows] = alike_shapes[own, best]
        progress.reach(int(rows[-1]) + 1)
    return histogram, nearest, nearest_likeness, renamed, renamed_likeness


def spanning_tree(words: Ints, shapes: Ints, sizes: Ints) -> tuple[Ints, Floats]:
    """Return the maximum spanning tree of likeness (Prim's algorithm): each node's parent and their likeness.

    Rows are read in the order in which the tree grows, which is any order.
    """
    n = len(words)
    parent = np.zeros(n, dtype=np.int32)
    best = np.full(n, -1.0)
    weight = np.zeros(n)
    outside = np.ones(n, dtype=np.bool_)
    node = 0
    progress = Progress("growing the tree", n)
    for step in range(1, n + 1):
        outside[node] = False
        weight[node] = best[node]
        best[node] = -2.0
        likeness = jaccard(words[node] + shapes[node], sizes[node : node + 1], sizes)
        closer = outside & (likeness > best)
        best[closer] = likeness[closer]
        parent[closer] = node
        node = int(best.argmax())
        progress.reach(step)
    return parent, weight


def cut_into_families(parent: Ints, weight: Floats) -> list[list[int]]:
    """Cut the tree where functions are less alike than a family is; return the parts of two or more."""
    group = list(range(len(parent)))

    def top(i: int) -> int:
        while group[i] != i:
            group[i] = group[group[i]]
            i = group[i]
        return i

    for child in np.flatnonzero(weight >= FAMILY_LIKENESS).tolist():
        group[top(child)] = top(int(parent[child]))
    members: dict[int, list[int]] = {}
    for i in range(len(parent)):
        members.setdefault(top(i), []).append(i)
    return sorted(family for family in members.values() if len(family) > 1)


def digest_of(matrix: Ints, what: str) -> str:
    """Return the SHA-256 of every byte of a matrix."""
    sha = hashlib.sha256()
    progress = Progress(what, len(matrix))
    for i in range(0, len(matrix), BLOCK_ROWS):
        sha.update(matrix[i : i + BLOCK_ROWS].data)
        progress.reach(min(i + BLOCK_ROWS, len(matrix)))
    return sha.hexdigest()


def compare(word_sets: Sets, shape_sets: Sets) -> Result:
    """Do it all; both matrices are alive from when they are made until the end."""
    incidence = incidence_of(word_sets)
    words = count_shared(incidence, "counting shared words")
    incidence = incidence_of(shape_sets)
    shapes = count_shared(incidence, "counting shared shapes")
    block_bytes = min(BLOCK_ROWS, len(words)) * (len(words) + shape_sets.columns) * 4
    array_bytes = words.nbytes + shapes.nbytes + incidence.nbytes + block_bytes
    del incidence
    histogram, nearest, nearest_likeness, renamed, renamed_likeness = survey(
        words, shapes, word_sets.sizes, shape_sets.sizes
    )
    parent, weight = spanning_tree(words, shapes, word_sets.sizes + shape_sets.sizes)
    digests = {
        "words": digest_of(words, "taking the digest of the words"),
        "shapes": digest_of(shapes, "taking the digest of the shapes"),
        "tree": hashlib.sha256(parent.tobytes() + weight.tobytes()).hexdigest(),
    }
    return Result(
        functions=len(words),
        array_bytes=array_bytes,
        histogram=histogram.tolist(),
        nearest=nearest.tolist(),
        nearest_likeness=nearest_likeness.tolist(),
        renamed=renamed.tolist(),
        renamed_likeness=renamed_likeness.tolist(),
        families=cut_into_families(parent, weight),
        matrix_digests=digests,
    )


def sealed(result: Result) -> dict[str, Any]:
    """Return the result as plain data, with a digest over all of it."""
    data = asdict(result)
    text = json.dumps(data, sort_keys=True)
    data["digest"] = hashlib.sha256(text.encode()).hexdigest()
    return data


def main() -> int:
    """Read the sets, compare, write the result."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("functions", type=Path)
    parser.add_argument("--json", type=Path, help="write the whole result here")
    options = parser.parse_args()
    with np.load(options.functions) as data:
        word_columns, shape_columns = data["columns"].tolist()
        word_sets = Sets(data["words"], data["word_starts"], word_columns)
        shape_sets = Sets(data["shapes"], data["shape_starts"], shape_columns)
    result = sealed(compare(word_sets, shape_sets))
    if options.json:
        options.json.write_text(json.dumps(result))
    print(f"{result['functions']} functions, {len(result['families'])} families, digest {result['digest']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
