"""The demo's program, at a small size, against a naive computation with Python's sets."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
sys.path.insert(0, str(EXAMPLES))

import demo  # noqa: E402
import function_families as program  # noqa: E402
import read_functions as reader  # noqa: E402


def likeness(first: frozenset[int], second: frozenset[int]) -> float:
    either = len(first | second)
    return len(first & second) / either if either else 0.0


def made_up(count: int, seed: int) -> list[reader.Function]:
    """Random functions, a third of them near copies of earlier ones."""
    draw = random.Random(seed)
    functions: list[reader.Function] = []
    for i in range(count):
        if functions and draw.random() < 0.35:
            old = draw.choice(functions)
            words, shapes = set(old.words), set(old.shapes)
            if draw.random() < 0.3:
                words = set(draw.sample(range(reader.WORD_COLUMNS), len(words)))
            words ^= set(draw.sample(range(60), draw.randrange(3)))
        else:
            words = set(draw.sample(range(300), draw.randrange(1, 30)))
            shapes = set(draw.sample(range(100), draw.randrange(1, 60)))
        words.add(draw.randrange(300))
        functions.append(reader.Function(f"file{i % 7}.py:f{i}", frozenset(words), frozenset(shapes)))
    return functions


def as_sets(functions: list[reader.Function]) -> tuple[program.Sets, program.Sets]:
    words = program.Sets(*reader.pack([one.words for one in functions]), reader.WORD_COLUMNS)
    shapes = program.Sets(*reader.pack([one.shapes for one in functions]), reader.SHAPE_COLUMNS)
    return words, shapes


def as_sources(functions: list[reader.Function]) -> demo.Sources:
    words, shapes = as_sets(functions)
    word_bits, shape_bits = (demo.as_bits(one.items.tolist(), one.starts.tolist()) for one in (words, shapes))
    return demo.Sources([one.label for one in functions], word_bits, shape_bits)


@pytest.mark.parametrize(("count", "seed"), [(2, 0), (5, 1), (300, 2), (701, 3)])
def test_against_naive(count: int, seed: int) -> None:
    functions = made_up(count, seed)
    result = program.compare(*as_sets(functions))
    both = [one.words | {-1 - shape for shape in one.shapes} for one in functions]
    histogram = [0] * (program.HISTOGRAM_STEPS + 1)
    links: dict[int, set[int]] = {i: set() for i in range(count)}
    for i in range(count):
        row = [likeness(both[i], other) if i != j else 0.0 for j, other in enumerate(both)]
        assert (result.nearest[i], result.nearest_likeness[i]) == (row.index(max(row)), max(row))
        for value in row:
            histogram[int(value * program.HISTOGRAM_STEPS)] += 1
        links[i] = {j for j, value in enumerate(row) if value >= program.FAMILY_LIKENESS}
        other_words = [
            likeness(functions[i].shapes, other.shapes)
            if likeness(functions[i].words, other.words) <= program.RENAMED_WORDS
            else 0.0
            for other in functions
        ]
        best = max(other_words)
        assert (result.renamed[i], result.renamed_likeness[i]) == (other_words.index(best), best)
    assert result.histogram == histogram

    families, seen = [], set()
    for i in range(count):
        if i not in seen and links[i]:
            family, pending = {i}, [i]
            while pending:
                new = links[pending.pop()] - family
                family |= new
                pending += new
            seen |= family
            families.append(sorted(family))
    assert result.families == sorted(families)

    matrix = [[len(a.words & b.words) for b in functions] for a in functions]
    digest = hashlib.sha256(np.array(matrix, dtype=np.int32).tobytes()).hexdigest()
    assert result.matrix_digests["words"] == digest


def test_the_demo_checks_notice_a_wrong_result() -> None:
    functions = made_up(300, 4)
    sources = as_sources(functions)
    result = program.sealed(program.compare(*as_sets(functions)))
    bar = demo.Bar()
    assert demo.check_rows(sources, result, bar) == 100 * 300
    families = demo.families_by_prefixes(sources, bar)
    assert len(families) > 5
    assert families == result["families"]
    wrong = json.loads(json.dumps(result))
    wrong["nearest_likeness"][3 * 33] += 1e-12
    demo.compare_results(result, json.loads(json.dumps(result)))
    with pytest.raises(demo.DemoError, match="nearest_likeness"):
        demo.compare_results(result, wrong)
    with pytest.raises(demo.DemoError, match="wrong"):
        demo.check_rows(sources, wrong, bar)


def test_it_says_how_much_memory_its_arrays_take() -> None:
    sets = as_sets(made_up(3000, 5))
    tracemalloc.start()
    try:
        result = program.compare(*sets)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert abs(peak - result.array_bytes) < 0.1 * result.array_bytes
    assert result.array_bytes > 8 * 3000**2


def test_reading_functions() -> None:
    source = b'''
class Shop:
    def price(self, amount):
        """What it costs."""
        total = amount * self.rate
        if total > 10:
            total = round(total, ndigits=2)
        return {"total": total}

    def short(self):
        return 1

async def outer(first):
    def inner(second):
        return second.thing


    await inner(first)
'''
    found = list(reader.functions_in(source, "shop.py"))
    assert [one.label for one in found] == ["shop.py:Shop.price", "shop.py:outer"]
    words = ["self", "amount", "total", "rate", "round", "ndigits", "What it costs."]
    assert found[0].words == {reader.bucket(word, reader.WORD_COLUMNS) for word in words}
    assert reader.bucket("If.test>Compare", reader.SHAPE_COLUMNS) in found[0].shapes
    assert reader.bucket("thing", reader.WORD_COLUMNS) in found[1].words
    assert list(reader.functions_in(b"def broken(:\n", "broken.py")) == []


def test_from_the_command_line(tmp_path: Path) -> None:
    functions, output = tmp_path / "functions.npz", tmp_path / "result.json"
    for command in (
        ["read_functions.py", str(functions), "--functions", "600"],
        ["function_families.py", str(functions), "--json", str(output)],
    ):
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / command[0]), *command[1:]],
            capture_output=True,
            text=True,
            check=True,
        )
        assert ": 100 %" in done.stdout
    result = json.loads(output.read_text())
    sources = demo.Sources.load(functions)
    assert result["functions"] == len(sources.labels) == 600
    demo.check_rows(sources, result, demo.Bar())
    assert demo.families_by_prefixes(sources, demo.Bar()) == result["families"]
    assert result["digest"] in done.stdout
