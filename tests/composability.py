"""docs/composability.md, from the marks of the tests: `python tests/composability.py` writes it.

A test that is marked `composes(feature, outcome)` shows what a feature of PyTorch does with fusedres. All rows of a
feature have one outcome; the tests that show it stand beside it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "composability.md"
OUTCOMES = ("works", "steps aside", "refused")
HEAD = """\
# What it composes with

What a training script does with a model, and what fusedres does then. Each row is shown by the tests that it names
(`pytest tests/FILE -k NAME`); this page is written from their marks by `python tests/composability.py`, and a test
fails where the two differ.

- **works**: the fused passes run, or PyTorch's own operations where those are what the feature needs; results are those
  of the model as it was, within rounding.
- **steps aside**: blocks run their own forward, with PyTorch's results.
- **refused**: an error says so, and what to do, before anything has been changed.

Backend: where the test runs. *both* is plain PyTorch and the Triton kernels, on a CPU in Triton's interpreter.

| feature | what happens | backend | shown by |
|---|---|---|---|
"""


class Row(NamedTuple):
    """One mark on one test."""

    feature: str
    outcome: str
    backend: str
    test: str


def rows() -> list[Row]:
    """The marks of all tests, by feature."""
    found = [row for path in sorted(TESTS.glob("test_*.py")) for row in _rows_of(path)]
    return sorted(found, key=lambda row: row.feature.strip("`").lower())


def _rows_of(path: Path) -> Iterator[Row]:
    tree = ast.parse(path.read_text())
    everywhere = [
        mark
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
        for mark in _names(node.value)
    ]
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef):
            continue
        marks = [*everywhere, *(name for each in node.decorator_list for name in _names(each))]
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and ast.unparse(call.func) == "pytest.mark.composes":
                feature, outcome = map(ast.literal_eval, call.args)
                yield Row(feature, outcome, _backend(marks), f"{path.name}::{node.name}")


def _names(expression: ast.expr) -> list[str]:
    """The names of the marks in it."""
    return [
        n.attr
        for n in ast.walk(expression)
        if isinstance(n, ast.Attribute) and ast.unparse(n.value) == "pytest.mark"
    ]


def _backend(marks: list[str]) -> str:
    if {"kernels", "interpreter"} & set(marks):
        return "Triton"
    if "compiler" in marks:
        return "Triton, compiled"
    return "plain PyTorch" if "once" in marks else "both"


def page() -> str:
    """The page as it should be."""
    lines, found = [], rows()
    for feature, outcome in dict.fromkeys((row.feature, row.outcome) for row in found):
        shown = [row for row in found if (row.feature, row.outcome) == (feature, outcome)]
        backends = ", ".join(dict.fromkeys(row.backend for row in shown))
        tests = ", ".join(f"`{row.test}`" for row in shown)
        lines.append(f"| {feature} | {outcome} | {backends} | {tests} |\n")
    return HEAD + "".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page())
