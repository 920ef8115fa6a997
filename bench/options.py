# SPDX-License-Identifier: Apache-2.0
"""The options that the commands share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from bench import environment
from bench.cases import DTYPES, EVERY_MODEL, MODELS, TOKENS, Case, Dtype, Size, choose

Tokens = Annotated[
    list[int] | None,
    typer.Option(min=1, help="Tokens; repeatable.", show_default=f"{TOKENS}, by --size"),
]
Hidden = Annotated[
    list[int] | None,
    typer.Option(min=1, help="Width of a head; repeatable.", show_default="the model's"),
]
Vocab = Annotated[list[int] | None, typer.Option(min=1, help="Number of classes; repeatable.")]
Dtypes = Annotated[
    list[Dtype] | None,
    typer.Option(
        "--dtype",
        help="Of the logits, or of a head's hidden and kernel; repeatable.",
        show_default=", ".join(DTYPES),
    ),
]
Models = Annotated[
    list[str] | None,
    typer.Option(
        "--model",
        metavar="NAME",
        help="In place of --vocab, and of --hidden unless given: "
        + ", ".join(f"{name} ({classes}, {width})" for name, (classes, width) in MODELS.items())
        + f", or {EVERY_MODEL}; repeatable.",
    ),
]
TheSize = Annotated[
    Size,
    typer.Option(
        "--size",
        help="fast: 1/16 of the tokens and five rounds, a look in a minute or two; large: four "
        "times the tokens, and a minute a case. --tokens is taken as it is.",
    ),
]
Device = Annotated[
    environment.Device | None,
    typer.Option(help="What to measure on.", show_default="JAX's choice"),
]
Output = Annotated[
    Path,
    typer.Option(
        "--output",
        "-o",
        metavar="FOLDER",
        help="Where the results go: into the device's file, whose other sections are kept. "
        "README and docs show those of bench/results.",
    ),
]


class Selection(NamedTuple):
    """The cases that a command line asks for."""

    tokens: list[int] | None
    hidden: list[int] | None
    vocab: list[int] | None
    dtypes: list[Dtype] | None
    models: list[str] | None
    size: Size

    def given(self) -> dict[str, Any]:
        """What `results.command_line` writes; None for what was left out."""
        return {
            "tokens": self.tokens,
            "hidden": self.hidden,
            "vocab": self.vocab,
            "dtype": self.dtypes,
            "model": self.models,
            "size": self.size if self.size is not Size.REGULAR else None,
        }

    def cases(self, default: Sequence[Case]) -> list[Any]:
        """See `choose`."""
        return choose(default, **self._asdict())
