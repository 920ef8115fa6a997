# SPDX-License-Identifier: Apache-2.0
"""Every block of Python in README and docs runs, and prints what stands below it."""

import pytest
from pages import ROOT, blocks, names_of

DOCS = ROOT / "docs"
PAGES = ["README", *sorted(f"{p.relative_to(DOCS).with_suffix('')}" for p in DOCS.rglob("*.md"))]


@pytest.mark.every
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)])
def test_its_code_runs(page, eval_example):
    names_of(page, eval_example)
