# SPDX-License-Identifier: Apache-2.0
"""What the commands share: options, their checks, and a run with a progress bar.

JAX and what trains are imported late: `--help` and a mistyped option should not wait for them.
"""

import os
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from jaxsoftmax.training.errors import ProgramError, as_line, out_of_memory_in_words
from jaxsoftmax.training.interrupts import on_interrupt
from jaxsoftmax_command import leave

if TYPE_CHECKING:
    from jaxsoftmax.training.run import Kind, Result

Output = Annotated[
    Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where everything is written.")
]
LearningRate = Annotated[
    float, typer.Option("--learning-rate", "-l", metavar="RATE", help="Size of a step.")
]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="The output folder of a run.")]
Which = Annotated[
    str,
    typer.Option(
        "--checkpoint",
        metavar="WHICH",
        help="[bold]best[/] on held-out data, [bold]last[/], or the number of an epoch or step "
        "that the run has kept.",
    ),
]
Coordinator = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Train in several processes, each started with the same options but its own "
        "--process-id: the address of process 0, with a port that is free there. Only "
        "process 0 writes to the output folder.",
        show_default=False,
    ),
]
Processes = Annotated[
    int | None,
    typer.Option(metavar="N", help="How many processes there are.", show_default=False),
]
ProcessId = Annotated[
    int | None,
    typer.Option(metavar="I", help="Which one this is, from 0.", show_default=False),
]


def resume_option(free: str) -> Any:
    """The type of `--resume`, which says which options may differ."""
    return typer.Option(
        "--resume",
        metavar="",  # it takes no value
        help="Continue the run in the output folder from its last checkpoint. Options left "
        f"out are the run's own; only {free} and the processes may differ.",
    )


def as_axes(text: str, names: Sequence[str]) -> dict[str, int]:
    """The sizes of a mesh's axes; that they fit the devices is seen to later."""
    pairs = [part.partition("=") for part in text.split(",")]
    sizes = {name: int(size) for name, _, size in pairs if size.isdecimal() and len(size) < 10}
    if len(sizes) < len(pairs) or not {*sizes} <= {*names} or min(sizes.values()) < 1:
        raise ProgramError(
            f"--mesh must be sizes of the axes {' and '.join(names)}, such as data=4,vocab=2, or "
            f"of some of them; got {text!r}"
        )
    return sizes


def as_place(
    coordinator: str | None, processes: int | None, process_id: int | None
) -> tuple[str, int, int] | None:
    """The three options that go together; None if none is given."""
    given = {"--coordinator": coordinator, "--processes": processes, "--process-id": process_id}
    if coordinator is None or processes is None or process_id is None:
        missing = [option for option, value in given.items() if value is None]
        if len(missing) == len(given):
            return None
        raise ProgramError(
            f"{', '.join(given)} go together; {' and '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} missing"
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or len(port) > 5 or not 0 < int(port) < 2**16:
        raise ProgramError(
            f"--coordinator must be HOST:PORT, such as 10.0.0.1:1234; got {coordinator!r}"
        )
    if processes < 1:
        raise ProgramError(f"--processes must be at least 1; got {processes}")
    if not 0 <= process_id < processes:
        raise ProgramError(
            f"--process-id must be from 0 to {processes - 1} for --processes {processes}; got "
            f"{process_id}"
        )
    return coordinator, processes, process_id


def names_given(context: typer.Context, names: Sequence[str]) -> list[str]:
    """Those of the options that the user gave."""
    sources = {name: context.get_parameter_source(name) for name in names}
    return [name for name, source in sources.items() if source and source.name != "DEFAULT"]


def trained(
    kind: "Kind",
    values: Mapping[str, Any],
    given: Collection[str],
    output: Path,
    *,
    resume: bool,
    mesh: Mapping[str, int] | None,
    place: tuple[str, int, int] | None,
    status: Callable[[Mapping[str, float]], str],
) -> "Result | None":
    """A run with a progress bar, or a line a round in a log.

    `values` are of all options by name, `given` names those that the user gave; `status` words the
    metrics. None in the processes that do not speak for all.
    """
    from jaxsoftmax.training import run  # noqa: PLC0415
    from jaxsoftmax.training.processes import joined  # noqa: PLC0415

    console = Console(highlight=False)
    quiet = place is not None and place[2] > 0  # process 0 speaks for all
    bar = console.is_terminal and not quiet
    columns = (
        TextColumn(f"[bold]{kind.unit}"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )

    def leave_with_hint(_: object = None) -> NoReturn:
        line = "interrupted before anything was written"
        try:
            if run.holds_run(kind, output):  # what does not exist cannot be continued
                where = shlex.quote(str(output))
                line = (
                    f"interrupted; to continue: jaxsoftmax {kind.command} --resume --output {where}"
                )
            if bar:  # which hides the cursor
                os.write(sys.stdout.fileno(), b"\x1b[?25h\n")
        finally:
            leave(as_line(line))

    progress = Progress(*columns, console=console)
    with on_interrupt(leave_with_hint), progress if bar else nullcontext():
        task = progress.add_task("", total=None, status="compiling")

        def tell(
            done: int, total: int, metrics: Mapping[str, float] | None, *, written: bool
        ) -> None:
            words = "compiling" if metrics is None else status(metrics)
            progress.update(task, completed=done, total=total, status=words)
            if written and not quiet and not bar:
                print(f"{kind.unit} {done}/{total}  {words}", flush=True)  # a log has no bar

        try:
            with (
                out_of_memory_in_words(kind.less_memory),
                joined(*place) if place else nullcontext(),
            ):
                result = run.train(
                    kind, values, given, output, resume=resume, mesh=mesh, progress=tell
                )
        except KeyboardInterrupt:
            leave_with_hint()
    return None if quiet else result


def show_table(
    title: str, kind: "Kind", result: "Result", rows: Sequence[tuple[str, str, str]]
) -> None:
    """The last and the best of a run; a row is a name, a key of the metrics and a format."""
    history = result.history
    best = max(reversed(history), key=kind.score)  # the last of those that tie
    # A row a number: six columns would not fit every terminal.
    table = Table(title=title, title_justify="left")
    table.add_column(overflow="fold")
    for heading in ("last", "best"):
        table.add_column(heading, justify="right", overflow="fold")
    for name, key, form in rows:
        table.add_row(name, *(form.format(metrics[key]) for metrics in (history[-1], best)))
    print()
    Console(highlight=False).print(table)


def resumed_words(result: "Result", unit: str) -> str:
    """The seconds, and from where."""
    resumed = f", resumed after {unit} {result.resumed_from}" if result.resumed_from else ""
    return f"{result.seconds:.1f} s{resumed}"
