# SPDX-License-Identifier: Apache-2.0
"""The command line: options in, a progress bar and a table out."""

import enum
import math
import os
import shlex
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

import jaxsoftmax
from jaxsoftmax.training.errors import ProgramError, as_line, in_words
from jaxsoftmax.training.interrupts import on_interrupt
from jaxsoftmax_command import leave

if TYPE_CHECKING:
    from jaxsoftmax.training.loop import Result

# Newer typer carries its own copy of click: this finds `UsageError` in either.
_UsageError: Any = typer.BadParameter.__bases__[0]

app = typer.Typer(
    help="Softmax cross-entropy for JAX, with exact gradients.",
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Optimizer(enum.StrEnum):
    """optax's optimizers by name."""

    ADAMW = "adamw"
    ADAM = "adam"
    LION = "lion"
    SGD = "sgd"


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
    pass  # a callback keeps `train` a subcommand although it is the only one


@app.command()
def train(  # noqa: PLR0917 - typer makes each one an option
    context: typer.Context,
    data: Annotated[
        str,
        typer.Option(
            metavar="FILE.npz",
            help="Your own examples: an npz file with the arrays [bold]x[/] (rows, features; "
            "further axes are flattened) and [bold]y[/] (one label a row, 0 to classes - 1). "
            "Left out: scikit-learn's handwritten digits.",
            show_default=False,
        ),
    ] = "digits",
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="Where everything is written.")
    ] = Path("runs/train"),
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            metavar="",  # it takes no value
            help="Continue the run in the output folder from its last checkpoint. Options left "
            "out are the run's own; only --epochs, --mesh and the processes may differ.",
        ),
    ] = False,
    epochs: Annotated[
        int, typer.Option("--epochs", "-e", metavar="N", help="How often to go over the examples.")
    ] = 20,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", metavar="N", help="Examples in one step.")
    ] = 64,
    learning_rate: Annotated[
        float, typer.Option("--learning-rate", "-l", metavar="RATE", help="Size of a step.")
    ] = 1e-3,
    optimizer: Annotated[
        Optimizer, typer.Option(help="How a gradient becomes a step (optax).")
    ] = Optimizer.ADAMW,
    hidden: Annotated[
        str,
        typer.Option(
            metavar="SIZES",
            help="Widths of the hidden layers, separated by commas; [bold]none[/] for plain "
            "softmax regression.",
        ),
    ] = "256,128",
    seed: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Initial weights and shuffling. The held-out split does not depend on it.",
        ),
    ] = 0,
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="AXES",
            help="Use all devices, such as [bold]data=4,vocab=2[/] for eight: the axis data "
            "splits every batch, vocab the classes of the last layer. The numbers stay the same "
            "to rounding. Left out: data over all devices of several processes, else one device.",
            show_default=False,
        ),
    ] = None,
    coordinator: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Train in several processes, each started with the same options but its own "
            "--process-id: the address of process 0, with a port that is free there. Only "
            "process 0 writes to the output folder.",
            show_default=False,
        ),
    ] = None,
    processes: Annotated[
        int | None,
        typer.Option(metavar="N", help="How many processes there are.", show_default=False),
    ] = None,
    process_id: Annotated[
        int | None,
        typer.Option(metavar="I", help="Which one this is, from 0.", show_default=False),
    ] = None,
) -> None:
    """Train a classifier and show how well it does on held-out examples.

    A multilayer perceptron learns from 80 % of the examples; the other 20 % are
    held out. The output folder gets [bold]metrics.jsonl[/] (a line an epoch),
    [bold]loss.png[/], [bold]confusion.png[/] and [bold]checkpoints/[/] (the last three epochs).
    """
    for option, number in (("--epochs", epochs), ("--batch-size", batch_size)):
        if number < 1:
            raise ProgramError(f"{option} must be at least 1; got {number}")
    # float32 is what the device will see: 1e-60 would be a step of size 0.
    if not 1e-38 <= learning_rate <= 1e38 or math.isnan(learning_rate):
        raise ProgramError(
            f"--learning-rate must be a positive finite number; got {learning_rate:g}"
        )
    if not 0 <= seed < 2**32:
        raise ProgramError(f"--seed must be from 0 to {2**32 - 1}; got {seed}")

    sizes = None if mesh is None else _axes(mesh)
    others = _processes(coordinator, processes, process_id)

    # Imported late: `--help` and a mistyped option should not wait for JAX and optax.
    from jaxsoftmax.training import loop  # noqa: PLC0415
    from jaxsoftmax.training.checkpoint import holds_run  # noqa: PLC0415
    from jaxsoftmax.training.processes import joined  # noqa: PLC0415

    options = loop.Options(
        data=data,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        optimizer=optimizer.value,
        hidden=_sizes(hidden),
        seed=seed,
    )
    names = ("data", "epochs", "batch_size", "learning_rate", "optimizer", "hidden", "seed")
    given = [name for name in names if _was_given(context, name)]
    console = Console(highlight=False)
    quiet = bool(process_id)  # process 0 speaks for all
    bar = console.is_terminal and not quiet
    columns = (
        TextColumn("[bold]epoch"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("{task.fields[status]}"),
        TimeRemainingColumn(),
    )

    def leave_with_hint(_: object = None) -> NoReturn:
        line = "interrupted before anything was written"
        try:
            if holds_run(output):  # what does not exist cannot be continued
                where = shlex.quote(str(output))
                line = f"interrupted; to continue: jaxsoftmax train --resume --output {where}"
            if bar:  # which hides the cursor
                os.write(sys.stdout.fileno(), b"\x1b[?25h\n")
        finally:
            leave(as_line(line))

    with on_interrupt(leave_with_hint):
        with Progress(*columns, console=console, disable=not bar) as progress:
            task = progress.add_task("", total=epochs, status="compiling")

            def on_epoch(done: int, wanted: int, metrics: dict[str, float] | None) -> None:
                status = "compiling" if metrics is None else _status(metrics)
                progress.update(task, completed=done, total=wanted, status=status)
                if metrics is not None and not quiet and not bar:
                    print(f"epoch {done}/{wanted}  {status}", flush=True)  # a log has no bar

            try:
                with joined(*others) if others else nullcontext():
                    result = loop.train(
                        options, given, output, resume=resume, mesh=sizes, on_epoch=on_epoch
                    )
            except KeyboardInterrupt:
                leave_with_hint()
        if not quiet:
            _show(console, output, result)


def _axes(text: str) -> dict[str, int]:
    """The sizes of a mesh's axes; that they fit the devices is seen to later."""
    pairs = [part.partition("=") for part in text.split(",")]
    sizes = {name: int(size) for name, _, size in pairs if size.isdecimal()}
    if len(sizes) < len(pairs) or not sizes.keys() <= {"data", "vocab"} or min(sizes.values()) < 1:
        raise ProgramError(
            "--mesh must be sizes of the axes data and vocab, such as data=4,vocab=2, or of one "
            f"of them; got {text!r}"
        )
    return sizes


def _processes(
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
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
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


def _sizes(text: str) -> tuple[int, ...]:
    if text.strip().lower() == "none":
        return ()
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = (0,)
    if min(sizes) < 1:
        raise ProgramError(
            f"--hidden must be positive whole numbers separated by commas, such as 256,128, or "
            f"none; got {text!r}"
        )
    return sizes


def _was_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def _status(metrics: dict[str, float]) -> str:
    return (
        f"loss {metrics['train_loss']:.4f}, held out {metrics['test_loss']:.4f}, "
        f"accuracy {metrics['test_accuracy']:.2%}"
    )


def _show(console: Console, folder: Path, result: "Result") -> None:
    options, dataset, history = result.options, result.dataset, result.history
    best = max(history, key=lambda metrics: metrics["test_accuracy"])
    # A row a number: six columns would not fit every terminal.
    table = Table(title="Cross-entropy (nats) and accuracy", title_justify="left")
    table.add_column(overflow="fold")
    for heading in ("last", "best"):
        table.add_column(heading, justify="right", overflow="fold")
    for name, key, form in (
        ("epoch", "epoch", "{}"),
        ("training loss", "train_loss", "{:.4f}"),
        ("training accuracy", "train_accuracy", "{:.2%}"),
        ("held-out loss", "test_loss", "{:.4f}"),
        ("held-out accuracy", "test_accuracy", "{:.2%}"),
    ):
        table.add_row(name, *(form.format(metrics[key]) for metrics in (history[-1], best)))
    print()
    console.print(table)
    layers = (dataset.train_x.shape[1], *options.hidden, dataset.classes)
    resumed = f", resumed after epoch {result.resumed_from}" if result.resumed_from else ""
    # Plain print: a path may contain what rich takes for markup, or be too long for its lines.
    print(
        f"data      {dataset.source}: {len(dataset.train_y)} rows to train on, "
        f"{len(dataset.test_y)} held out, {dataset.classes} classes"
    )
    print(f"model     {' - '.join(map(str, layers))}, {result.parameters} parameters")
    print(
        f"training  {options.optimizer}, learning rate {options.learning_rate:g}, batches of "
        f"{options.batch_size}, seed {options.seed}; {result.seconds:.1f} s{resumed}"
    )
    print(f"written   {folder}: metrics.jsonl, loss.png, confusion.png, checkpoints/")


def run(arguments: Sequence[str]) -> int:
    """Runs the command line; every foreseen end is one line on stderr and an exit code.

    Args:
        arguments: what follows the program's name.

    Returns:
        0, 1 (training failed) or 2 (bad input); on Ctrl-C it ends the process, with 130.
    """
    try:
        code = app(list(arguments) or ["--help"], prog_name="jaxsoftmax", standalone_mode=False)
    except ProgramError as error:
        return _fail(str(error), error.exit_code)
    except _UsageError as error:
        return _fail(f"{error.format_message()} (see jaxsoftmax train --help)", 2)
    except OSError as error:
        return _fail(in_words(error), 2)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    if message:
        print(as_line(message), file=sys.stderr)
    return code
