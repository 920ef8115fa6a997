# SPDX-License-Identifier: Apache-2.0
"""The command line: the program's commands, and how each of them ends."""

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from typing import Annotated, Any

import typer

import jaxsoftmax
from jaxsoftmax.training.classifier import commands as classifier
from jaxsoftmax.training.errors import ProgramError, as_line, in_words, out_of_memory_in_words
from jaxsoftmax.training.language import commands as language

# Newer typer carries its own copy of click: this finds `UsageError` in either.
_UsageError: Any = typer.BadParameter.__bases__[0]

app = typer.Typer(
    help="Softmax cross-entropy for JAX, with exact gradients.",
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    classifier.train,
    classifier.predict,
    language.train_lm,
    language.evaluate,
    language.generate,
):
    app.command()(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"jaxsoftmax {jaxsoftmax.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar="",
            callback=_print_version,
            is_eager=True,
            help="Show the version.",
        ),
    ] = False,
) -> None:
    pass


def run(arguments: Sequence[str]) -> int:
    """Runs the command line; every foreseen end is one line on stderr and an exit code.

    Args:
        arguments: what follows the program's name.

    Returns:
        0, 1 (training failed) or 2 (bad input); on Ctrl-C it ends the process, with 130.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):  # a terminal may not have every character
            stream.reconfigure(errors="backslashreplace")
    try:
        with out_of_memory_in_words("this machine does not have what the command needs"):
            code = app(list(arguments) or ["--help"], prog_name="jaxsoftmax", standalone_mode=False)
            sys.stdout.flush()
    except BrokenPipeError:  # as of `| head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except ProgramError as error:
        return _fail(str(error), error.exit_code)
    except _UsageError as error:
        return _fail(f"{error.format_message()} (see jaxsoftmax {_command(arguments)}--help)", 2)
    except OSError as error:
        return _fail(in_words(error), 2)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    if message:
        with suppress(OSError):  # nobody can be told
            print(as_line(message), file=sys.stderr)
    return code


def _command(arguments: Sequence[str]) -> str:
    names = {
        command.name or command.callback.__name__.replace("_", "-")
        for command in app.registered_commands
        if command.callback
    }
    return f"{arguments[0]} " if arguments and arguments[0] in names else ""
