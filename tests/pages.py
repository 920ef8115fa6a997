# SPDX-License-Identifier: Apache-2.0
"""The code of README and of the pages below docs/, as a reader runs it: block by block.

`pytest --update-examples tests/test_pages.py` writes what the blocks print below their `print`s.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import jax
from pytest_examples import CodeExample, EvalExample, find_examples

ROOT = Path(__file__).parents[1]
# Flax adds biases to arrays of more axes, and optax's scalars to arrays.
LENIENT = ("guides/language-model", "guides/linear-head", "guides/half-precision")
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
                names = check(block, module_globals=names)
        NAMES[page] = names
    return NAMES[page]
