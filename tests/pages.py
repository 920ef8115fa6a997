# SPDX-License-Identifier: Apache-2.0
"""The code of README and of the pages below docs/, as a reader runs it: block by block.

`pytest --update-examples tests/test_pages.py` writes what the blocks print below their `print`s.
"""

import contextlib
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
import pytest
from pytest_examples import CodeExample, EvalExample, find_examples

ROOT = Path(__file__).parents[1]
# Their optimizers promote integers to floats, and Flax's biases are broadcast.
LENIENT = (
    "getting-started",
    *(f"guides/{name}" for name in ("half-precision", "language-model", "linear-head", "migrate")),
)
NAMES: dict[str, dict[str, Any]] = {}


def path(page: str) -> Path:
    """Of a page by its name: "README", or the path below docs/ without its suffix."""
    return ROOT / f"{page}.md" if page == "README" else ROOT / "docs" / f"{page}.md"


def blocks(page: str) -> list[CodeExample]:
    """The page's blocks of Python."""
    return [*find_examples(path(page))]


def names_of(page: str, evaluate: EvalExample) -> dict[str, Any]:
    """Everything that a page defines, after its blocks ran and printed what the page says."""
    if page not in NAMES:
        evaluate.set_config(line_length=100)
        check = evaluate.run_print_update if evaluate.update_examples else evaluate.run_print_check
        names: dict[str, Any] = {}
        with contextlib.ExitStack() as stack:
            # The plugin makes each block `__main__`.
            stack.enter_context(patch.dict(sys.modules))
            if page in LENIENT:
                stack.enter_context(jax.numpy_dtype_promotion("standard"))
                stack.enter_context(jax.numpy_rank_promotion("allow"))
            for block in blocks(page):
                names, failed = _run(check, block, names)
                if failed:
                    pytest.fail(failed, pytrace=False)
        NAMES[page] = names
    return NAMES[page]


def _run(check: Any, block: CodeExample, names: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The names after a block, and how it failed: in words, as the traceback breaks pytest's."""
    try:
        return check(block, module_globals=names), ""
    except Exception as error:
        frames = traceback.walk_tb(error.__traceback__)
        lines = [line for frame, line in frames if frame.f_code.co_filename == f"{block.path}"]
        return names, f"{block.path}:{lines[0] if lines else block.start_line}: {error!r}"
