# SPDX-License-Identifier: Apache-2.0
"""The results file: one a device, one section a command.

    {"speed/integer": {"command": …, "environment": {…}, "cases": […], …}, "accuracy/…": {…}}

The section of a selection is named by its command.

A section says by itself where and when it was measured, so a file may hold sections of several
days; a command replaces its own section and keeps the others.
"""

import json
import math
import os
import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer

from bench import environment, terminal

RESULTS = Path(__file__).resolve().parent / "results"
PROGRAM = "python -m bench"
DEFAULT = "bench/results/DEVICE.json for a complete run, none for a selection"


def destination(path: Path | None, *, complete: bool) -> Path | None:
    """Say where a run is kept, and find out before it starts whether it can be.

    Args:
        path: what `--json` was given.
        complete: whether the run measures everything its command measures by default.

    Returns:
        `path`; without one the device's file in `bench/results` for a complete run, and None for a
        selection, which must not replace what a complete run found.

    Raises:
        typer.BadParameter: the file holds something else, or its folder cannot be made.
    """
    if path is None:
        if not complete:
            return None
        path = RESULTS / f"{environment.slug(environment.device_name())}.json"
    try:
        load(path)
        path.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path}: {error}", param_hint="--json") from None
    return path


def load(path: Path) -> dict[str, Any]:
    """Read the sections of a file; a file that does not exist has none.

    Raises:
        ValueError: the file is not a JSON object.
    """
    if not path.exists():
        return {}
    sections = json.loads(path.read_text())
    if not isinstance(sections, dict):
        raise ValueError("expected a JSON object of sections, one a command")
    return sections


def save(path: Path, name: str, section: dict[str, Any]) -> None:
    """Put a section into the file and keep its other sections; a list of numbers is one line."""
    sections = load(path) | {name: section}
    partial = path.with_name(path.name + ".partial")
    text = json.dumps(sections, indent=1, sort_keys=True)
    text = re.sub(r'\[[^]["{]+\]', lambda numbers: " ".join(numbers[0].split()), text)
    partial.write_text(text + "\n")
    os.replace(partial, path)


def command_line(name: str, options: dict[str, Any]) -> str:
    """Write the command that measures a section again.

    Args:
        name: of the command.
        options: by their name without dashes. None and False are left out, True stands alone, a
            list repeats the option.
    """
    words = [*shlex.split(PROGRAM), name]
    for option, value in options.items():
        if value is True:
            words.append(f"--{option}")
        elif value is not None and value is not False:
            for one in value if isinstance(value, list) else [value]:
                words += [f"--{option}", f"{one:g}" if isinstance(one, float) else str(one)]
    return shlex.join(words)


def keep(path: Path | None, section: dict[str, Any], name: str | None) -> None:
    """Save what a command measured, and say so; nothing without a path.

    Args:
        path: from `destination`.
        section: with its command.
        name: of a complete run's section; None for a selection, which its command names:
            `memory --peak --model gpt-2`.
    """
    if path:
        save(path, name or section["command"].removeprefix(f"{PROGRAM} "), section)
        terminal.notes.print(f"written: {path}")


def geometric_mean(numbers: Iterable[float]) -> float:
    """Average ratios, so that the mean of a ratio and its inverse is 1."""
    logs = [math.log(number) for number in numbers]
    return math.exp(math.fsum(logs) / len(logs))
