# SPDX-License-Identifier: Apache-2.0
"""The results file: one per device, and one of estimates for TPUs; one section per command.

    {"speed/integer": {"command": …, "environment": {…}, "cases": […], …}, "accuracy/…": {…}}

The section of a selection is named by its command.

Each section says where and when it was measured, so a file may hold sections of several days; a
command replaces its own section and keeps the others. README and docs show the sections of the
folder `COMMITTED`, which a command writes to only when told.
"""

import json
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from bench import environment
from bench.tables import say

COMMITTED = Path(__file__).resolve().parent / "results"
DEFAULT = Path("runs/bench")
PROGRAM = "python -m bench"
# The keys that tell two rows of a section apart, where present; `name` is the contender.
_ROW = (
    *("target", "devices", "shape", "tokens", "hidden", "classes", "dtype", "mode", "offset"),
    *("ignored", "gradients", "layout", "name"),
)


def destination(folder: Path, name: str | None = None) -> Path:
    """Return the file of a name in a folder, and check before a run that it can be written.

    Args:
        folder: is made if it is not there.
        name: by default this device's.

    Raises:
        typer.BadParameter: the file holds something else, or the folder cannot be made.
    """
    path = folder / f"{name or environment.slug(environment.device_name())}.json"
    try:
        load(path)
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(f"{path}: {error}", param_hint="--output") from None
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
    """Put a section into the file and keep its other sections; each list of numbers on one line."""
    sections = load(path) | {name: section}
    partial = path.with_name(path.name + ".partial")
    text = json.dumps(sections, indent=1, sort_keys=True)
    text = re.sub(r'\[[^]["{]+\]', lambda numbers: " ".join(numbers[0].split()), text)
    partial.write_text(text + "\n")
    os.replace(partial, path)


def short(number: float) -> float:
    """Keep two digits of an error."""
    return float(f"{number:.2g}")


def command_line(name: str, options: dict[str, Any]) -> str:
    """Write the command that measures a section again; its option is repeated for a list."""
    words = [*shlex.split(PROGRAM), name]
    for option, value in options.items():
        if value is True:
            words.append(f"--{option}")
        else:
            for one in value if isinstance(value, list | tuple) else [value]:
                words += [f"--{option}", f"{one:g}" if isinstance(one, float) else str(one)]
    return shlex.join(words)


def keep(path: Path, section: dict[str, Any], name: str | None) -> None:
    """Save what a command measured; say so, and which rows of before are no longer there.

    `name` is the name of a complete run's section; a selection is named by its command.
    """
    key = name or section["command"].removeprefix(f"{PROGRAM} ")
    before = load(path).get(key, {})
    save(path, key, section)
    say(f"written: {path}")
    now = {*rows(section)}
    lost = Counter(dict(row).get("name", "ours") for row in rows(before) if row not in now)
    if lost:
        counts = ", ".join(f"{count} of {who}" for who, count in lost.items())
        when = before.get("environment", {}).get("date")
        say(f"rows removed from it, which this run did not measure: {counts} (of {when})")


def rows(section: Any, above: tuple[tuple[str, Any], ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield what identifies each row of a section: the case, and the contender."""
    if isinstance(section, list):
        for one in section:
            yield from rows(one, above)
    elif isinstance(section, dict):
        found = ((key, section.get(key)) for key in _ROW)
        here = (*above, *(pair for pair in found if isinstance(pair[1], str | int | float)))
        if "name" in section or "layout" in section:
            yield here
        for value in section.values():
            yield from rows(value, here)
