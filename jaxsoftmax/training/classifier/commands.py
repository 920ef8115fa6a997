# SPDX-License-Identifier: Apache-2.0
"""The commands `train` and `predict`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from jaxsoftmax.training import commands
from jaxsoftmax.training.classifier.options import Optimizer, Options
from jaxsoftmax.training.errors import ProgramError


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
    output: commands.Output = Path("runs/train"),
    resume: Annotated[bool, commands.resume_option("--epochs, --mesh")] = False,
    epochs: Annotated[
        int, typer.Option("--epochs", "-e", metavar="N", help="How often to go over the examples.")
    ] = 20,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", metavar="N", help="Examples in one step.")
    ] = 64,
    learning_rate: commands.LearningRate = 1e-3,
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
            help="Seed of the initial weights and the order of the examples. The held-out split "
            "does not depend on it.",
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
    coordinator: commands.Coordinator = None,
    processes: commands.Processes = None,
    process_id: commands.ProcessId = None,
) -> None:
    """Train a classifier and show how well it does on held-out examples.

    A multilayer perceptron learns from 80 % of the examples; the other 20 % are held out.

    Written: [bold]metrics.jsonl, loss.png, confusion.png, checkpoints/[/].

    Of the checkpoints, one an epoch, the last three and the best are kept.
    """  # help keeps these line breaks
    values = {
        "data": data,
        "epochs": epochs,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "optimizer": optimizer.value,
        "hidden": _sizes(hidden),
        "seed": seed,
    }
    if not resume:
        Options(**values)  # a mistake should not wait for JAX
    sizes = None if mesh is None else commands.as_axes(mesh, ("data", "vocab"))
    place = commands.as_place(coordinator, processes, process_id)

    from jaxsoftmax.training.classifier.task import CLASSIFIER  # noqa: PLC0415

    result = commands.trained(
        CLASSIFIER,
        values,
        commands.names_given(context, [*values]),
        output,
        resume=resume,
        mesh=sizes,
        place=place,
        status=_status,
    )
    if result is None:
        return
    options, dataset = result.inputs.options, result.inputs.data
    commands.show_table(
        "Cross-entropy (nats) and accuracy",
        CLASSIFIER,
        result,
        (
            ("epoch", "epoch", "{}"),
            ("training loss", "train_loss", "{:.4f}"),
            ("training accuracy", "train_accuracy", "{:.2%}"),
            ("held-out loss", "test_loss", "{:.4f}"),
            ("held-out accuracy", "test_accuracy", "{:.2%}"),
        ),
    )
    layers = (dataset.train_x.shape[1], *options.hidden, dataset.classes)
    # Plain print: a path may contain what rich takes for markup, or be too long for its lines.
    print(
        f"data      {dataset.source}: {len(dataset.train_y)} rows to train on, "
        f"{len(dataset.test_y)} held out, {dataset.classes} classes"
    )
    print(f"model     {' - '.join(map(str, layers))}, {result.parameters} parameters")
    print(
        f"training  {options.optimizer}, learning rate {options.learning_rate:g}, batches of "
        f"{options.batch_size}, seed {options.seed}; {commands.resumed_words(result, 'epoch')}"
    )
    print(f"written   {output}: metrics.jsonl, loss.png, confusion.png, checkpoints/")


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


def _status(metrics: Mapping[str, float]) -> str:
    return (
        f"loss {metrics['train_loss']:.4f}, held out {metrics['test_loss']:.4f}, "
        f"accuracy {metrics['test_accuracy']:.2%}"
    )


def predict(
    run: commands.Run,
    data: Annotated[
        Path,
        typer.Option(
            metavar="FILE.npz",
            help="The rows: an npz file with the array [bold]x[/], and [bold]y[/] to compare with "
            "if it is there.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.npz",
            help="Where [bold]probabilities[/] (rows, classes) and [bold]classes[/] (rows) are "
            "written.",
        ),
    ] = Path("predictions.npz"),
    checkpoint: commands.Which = "best",
) -> None:
    """Classify the rows of a file by a run of [bold]train[/]."""
    from jaxsoftmax.training.classifier.predict import predict_file  # noqa: PLC0415

    predicted = predict_file(run, data, output, checkpoint)
    print(f"data      {data}: {predicted.rows} rows")
    print(f"model     {run}, epoch {predicted.epoch}")
    if predicted.right is not None:
        share = predicted.right / predicted.rows
        print(f"accuracy  {share:.2%}: {predicted.right} of {predicted.rows} right")
    print(f"written   {output}: probabilities {predicted.shape}, classes")
