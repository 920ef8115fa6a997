# SPDX-License-Identifier: Apache-2.0
"""What the commands print with: tables to stdout, progress and notes to stderr."""

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

WIDTH = 120  # of a table in a file or a pipe

notes = Console(stderr=True, highlight=False, soft_wrap=True)


def output() -> Console:
    """Return a console on stdout, as wide as the terminal, or as `WIDTH` where there is none."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=WIDTH)


def progress() -> Progress:
    """Return a progress bar that vanishes when it is done.

    It is drawn only when told to (`refresh=True`): a thread that draws would take time from what is
    measured.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=notes,
        transient=True,
        auto_refresh=False,
    )
