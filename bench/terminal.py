# SPDX-License-Identifier: Apache-2.0
"""What the commands print with: tables to stdout, progress and notes to stderr."""

import shutil
from collections.abc import Iterator, Sequence

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table

WIDTH = 120  # of a table in a file or a pipe, unless COLUMNS says another

notes = Console(stderr=True, highlight=False, soft_wrap=True)


def output() -> Console:
    """Return the console on stdout."""
    return Console(highlight=False, width=shutil.get_terminal_size((WIDTH, 24)).columns)


def show(table: Table) -> None:
    """Print a table on stdout, whole: nothing is cut off where it is wider than the console.

    Words are wrapped first; then the last columns go below, beside the leading columns again.
    """
    console = output()
    if table.title:
        console.print(table.title, style="table.title", markup=False)
    for columns in _groups(table, console):
        console.print(_with(table, columns, _widths(columns, _room(table, columns, console))))
    if table.caption:
        console.print(table.caption, style="table.caption", markup=False)


def _groups(table: Table, console: Console) -> Iterator[list[Column]]:
    """Yield the columns that fit together: words, to the left, and some of the numbers."""
    is_number = [column.justify == "right" for column in table.columns]
    first = is_number.index(True)
    words, numbers = table.columns[:first], table.columns[first:]
    group = [*words]
    for column in numbers:
        wider = [*group, column]
        if len(group) > len(words) and sum(map(_least, wider)) > _room(table, wider, console):
            yield group
            wider = [*words, column]
        group = wider
    yield group


def _with(table: Table, columns: Sequence[Column], widths: Sequence[int]) -> Table:
    """The rows of a table in some of its columns."""
    part = Table(box=table.box, padding=table.padding)
    for column, width in zip(columns, widths, strict=True):
        part.add_column(column.header, justify=column.justify, width=width, overflow="fold")
    for row, *cells in zip(table.rows, *(column.cells for column in columns), strict=True):
        part.add_row(*cells, style=row.style, end_section=row.end_section)
    return part


def _room(table: Table, columns: Sequence[Column], console: Console) -> int:
    """How many characters are left for the cells themselves."""
    around = console.measure(_with(table, columns, [1] * len(columns))).maximum - len(columns)
    return console.width - around


def _widths(columns: Sequence[Column], room: int) -> list[int]:
    """What each column gets: the widest give way first, and numbers last of all."""
    widths = [max(map(cell_len, _texts(column))) for column in columns]
    unbroken = [_least(column) for column in columns]
    numbers = [_least(column) if column.justify == "right" else 1 for column in columns]
    for floors in (unbroken, numbers, [1] * len(columns)):
        while sum(widths) > room:
            shrinkable = [i for i, floor in enumerate(floors) if widths[i] > floor]
            if not shrinkable:
                break
            widths[max(shrinkable, key=widths.__getitem__)] -= 1
    return widths


def _least(column: Column) -> int:
    """The width from which on no word is broken, and no number has to be wrapped."""
    heading, *cells = _texts(column)
    whole = cells if column.justify == "right" else " ".join(cells).split()
    return max(map(cell_len, [*heading.split(), *whole, ""]))


def _texts(column: Column) -> list[str]:
    return [str(text) for text in (column.header, *column.cells)]


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
