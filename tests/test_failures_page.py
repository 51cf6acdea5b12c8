"""docs/failures.md names tests, and each of them exists."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "failures.md").read_text()
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith(("| what ", "| **"))]


@cache
def defined_in(file: str) -> frozenset[str]:
    tree = ast.parse((ROOT / file).read_text())
    return frozenset(node.name for node in tree.body if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("row", ROWS)
def test_each_row_names_tests_that_exist(row: str) -> None:
    named = [part for part in row.rsplit("|", 2)[1].replace("<br>", " ").split() if "::" in part]
    assert named, "no test is named"
    for one in named:
        file, _, test = one.strip("`,").partition("::")
        assert test.startswith("test_")
        assert test in defined_in(file), one


def test_the_page_has_rows() -> None:
    assert len(ROWS) > 40
