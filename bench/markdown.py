# SPDX-License-Identifier: Apache-2.0
"""Tables as README and docs show them."""

from collections.abc import Iterable, Sequence
from typing import Any

from bench import environment

WORDS = 2  # leading columns that hold words; the others hold numbers, to the right


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, words: int = WORDS) -> str:
    """Write a pipe table whose first `words` columns hold words."""
    rule = ["---" if column < words else "--:" for column in range(len(headings))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (headings, rule, *rows))


def origin(section: dict[str, Any]) -> str:
    """Say how, where, with which versions and when a section was measured."""
    where = environment.in_words(section["environment"])
    line = f"Measured by `{section['command']}` on {where}."
    if section["environment"]["versions"]["jax"] != environment.JAX:
        line += (
            f" README's commands install jax {environment.JAX} on Python {environment.PYTHON}; "
            "there the numbers may differ."
        )
    return line


def megabytes(count: float | None) -> str:
    """Write bytes as MB; – where nobody can tell."""
    return "–" if count is None else f"{count / 1e6:.0f}"
