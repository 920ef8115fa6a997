# SPDX-License-Identifier: Apache-2.0
"""What the commands print: tables to stdout, lines and progress to stderr; tables of documents."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from rich import box
from rich.cells import cell_len
from rich.console import Console, Group
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as RichTable
from rich.text import Text

from bench import contenders, environment

WIDTH = 120  # of a table in a file or a pipe, unless COLUMNS is set

_stderr = Console(stderr=True, highlight=False, soft_wrap=True)


class Table(NamedTuple):
    """What was measured, laid out once, for a terminal and for README and docs."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    """Where the first cell is empty, the row belongs to the one above."""
    notes: Sequence[str] = ()
    """Lines below; empty ones are left out."""
    title: str = ""
    """A line above, in a terminal only: documents have their own."""
    words: int = 2
    """Leading columns that hold words; the others hold numbers, to the right."""

    def markdown(self) -> str:
        """Write a pipe table, and the notes below it."""
        rule = ["---" if column < self.words else "--:" for column in range(len(self.headings))]
        lines = [f"| {' | '.join(line)} |" for line in (self.headings, rule, *self.rows)]
        notes = [*filter(None, self.notes)]
        return "\n".join([*lines, "", *notes] if notes else lines)

    def rich(self, console: Console) -> Group:
        """Lay it out for a console; nothing is cut off if it is wider than the console.

        Words are wrapped first; then the last columns go below, with the leading columns repeated.
        """
        parts: list[Any] = [Text(self.title, style="table.title")] if self.title else []
        for columns in self._groups(console):
            widths = self._widths(columns, self._room(columns, console))
            parts.append(self._columns(dict(zip(columns, widths, strict=True))))
        notes = "\n".join(filter(None, self.notes))
        return Group(*parts, *([Text(notes, style="table.caption")] if notes else []))

    def _groups(self, console: Console) -> Iterator[list[int]]:
        """Yield the columns that fit together: words, to the left, and some of the numbers."""
        words = [*range(self.words)]
        group = words
        for column in range(self.words, len(self.headings)):
            wider = [*group, column]
            fits = sum(map(self._least, wider)) <= self._room(wider, console)
            if len(group) > len(words) and not fits:
                yield group
                wider = [*words, column]
            group = wider
        yield group

    def _columns(self, widths: dict[int, int]) -> RichTable:
        """These columns, each of its width."""
        part = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for column, width in widths.items():
            justify = "left" if column < self.words else "right"
            part.add_column(self.headings[column], justify=justify, width=width, overflow="fold")
        grouped = not all(row[0] for row in self.rows)
        for row in self.rows:
            if grouped and row[0]:
                part.add_section()
            bold = "bold" if contenders.OURS in row else None
            part.add_row(*(row[column] for column in widths), style=bold)
        return part

    def _room(self, columns: Sequence[int], console: Console) -> int:
        """How many characters of a line are left for the cells themselves."""
        narrow = self._columns(dict.fromkeys(columns, 1))
        return console.width - (console.measure(narrow).maximum - len(columns))

    def _widths(self, columns: Sequence[int], room: int) -> list[int]:
        """The width of each column: the widest shrink first, and those of numbers last."""
        widths = [max(map(cell_len, self._texts(column))) for column in columns]
        unbroken = [self._least(column) for column in columns]
        numbers = [self._least(column) if column >= self.words else 1 for column in columns]
        for floors in (unbroken, numbers, [1] * len(columns)):
            while sum(widths) > room:
                shrinkable = [i for i, floor in enumerate(floors) if widths[i] > floor]
                if not shrinkable:
                    break
                widths[max(shrinkable, key=widths.__getitem__)] -= 1
        return widths

    def _least(self, column: int) -> int:
        """The least width at which no word is broken and no number is wrapped."""
        heading, *cells = self._texts(column)
        whole = cells if column >= self.words else " ".join(cells).split()
        return max(map(cell_len, [*heading.split(), *whole, ""]))

    def _texts(self, column: int) -> list[str]:
        return [self.headings[column], *(row[column] for row in self.rows)]


def by_contender(
    cases: Sequence[dict[str, Any]], cell: Callable[[dict[str, Any], dict[str, Any]], str]
) -> list[list[str]]:
    """Write a row for each contender, with a cell for each case; – where it was not measured.

    A cell is written from the contender's results and, by name, from those of everyone.
    """
    found = [{row["name"]: row for row in case["contenders"]} for case in cases]
    return [
        [name, *(cell(case[name], case) if name in case else "–" for case in found)]
        for name in contenders.names(cases)
    ]


def megabytes(count: float | None) -> str:
    """Write bytes as MB; – where they are not known."""
    return "–" if count is None else f"{count / 1e6:.0f}"


def origin(section: dict[str, Any]) -> str:
    """Say how, where, with which versions and when a section was measured, or estimated."""
    how = ("Measured", "on") if section["environment"]["device"] else ("Estimated", "with")
    where = environment.in_words(section["environment"])
    line = f"{how[0]} by `{section['command']}` {how[1]} {where}."
    if section["environment"]["versions"]["jax"] != environment.JAX:
        line += (
            f" On Python {environment.PYTHON}, pip installs jax {environment.JAX}: "
            "there the numbers may differ."
        )
    return line


def show(*tables: Table) -> None:
    """Print tables on stdout."""
    console = Console(highlight=False, width=shutil.get_terminal_size((WIDTH, 24)).columns)
    for table in tables:
        console.print(table.rich(console))


def say(*lines: str) -> None:
    """Print lines on stderr."""
    for line in lines:
        _stderr.print(line, markup=False)


@contextmanager
def progress(total: int) -> Iterator[Callable[..., None]]:
    """Show a progress bar that vanishes when it is done.

    Yields:
        A function that draws it: what is measured now, and how many more of `total` are done. A
        thread that draws by itself would take time from what is measured.
    """
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    bar = Progress(
        *columns, TimeElapsedColumn(), console=_stderr, transient=True, auto_refresh=False
    )
    with bar:
        task = bar.add_task("", total=total)

        def now(words: str | None = None, done: int = 0) -> None:
            bar.update(task, description=words, advance=done, refresh=True)

        yield now
