# SPDX-License-Identifier: Apache-2.0
"""Every block of Python in README and docs runs, and prints what stands below it."""

import ast

import pytest
from pages import ROOT, blocks, names_of

DOCS = ROOT / "docs"
NAMES = ["README", *sorted(f"{p.relative_to(DOCS).with_suffix('')}" for p in DOCS.rglob("*.md"))]
PAGES = [name for name in NAMES if blocks(name)]


@pytest.mark.every
@pytest.mark.parametrize("page", PAGES)
def test_its_code_runs(page, eval_example):
    names_of(page, eval_example)


@pytest.mark.parametrize("block", [b for page in PAGES for b in blocks(page)], ids=str)
@pytest.mark.every
def test_output_stands_below_a_print(block):
    """Elsewhere nothing would compare it."""
    calls = [n for n in ast.walk(ast.parse(block.source)) if isinstance(n, ast.Call)]
    said = {n.end_lineno for n in calls if ast.unparse(n.func) == "print"}
    for number, line in enumerate(block.source.splitlines(), start=1):
        if line.lstrip().startswith("#> "):
            assert number - 1 in said, line
            said.add(number)
