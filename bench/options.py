# SPDX-License-Identifier: Apache-2.0
"""The options that the commands share, and what a command line asks for."""

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from bench import environment
from bench.cases import DTYPES, EVERY_MODEL, MODELS, TOKENS, Dtype, Size

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


def check_targets(targets: Iterable[str], known: Collection[str]) -> None:
    """Refuse a --target that is not known."""
    for target in targets:
        if target not in known:
            raise typer.BadParameter(
                f"expected {', '.join(known)}; got {target!r}", param_hint="--target"
            )


# Where a run is measured and where its results go: no part of the command that is recorded.
_NOT_SAID = {"device", "output", "profile"}


def given(context: typer.Context) -> dict[str, Any]:
    """What a command line asks for beyond the defaults, by the options without their dashes."""
    values = {
        parameter.opts[0].removeprefix("--"): context.params[parameter.name]
        for parameter in context.command.params
        if parameter.name in context.params.keys() - _NOT_SAID
        and context.params[parameter.name] != parameter.default
    }
    return {option: value for option, value in values.items() if value}
