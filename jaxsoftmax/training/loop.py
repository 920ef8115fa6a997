# SPDX-License-Identifier: Apache-2.0
"""A run from start to end: epochs, what is written after each, and resuming."""

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

import jaxsoftmax
from jaxsoftmax.training import checkpoint, data, model, plots, processes
from jaxsoftmax.training.errors import ProgramError
from jaxsoftmax.training.interrupts import on_interrupt
from jaxsoftmax.training.mesh import DATA, make_mesh, split, whole
from jaxsoftmax.training.step import OPTIMIZERS, State, evaluate, specs, train_epoch


@dataclasses.dataclass(frozen=True)
class Options:
    """The options of a run; the same options on the same machine give the same numbers."""

    data: str
    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: str
    hidden: tuple[int, ...]
    seed: int


class Result(NamedTuple):
    """What the summary shows."""

    options: Options
    dataset: data.Dataset
    parameters: int
    resumed_from: int
    history: list[dict[str, float]]
    seconds: float


def train(
    options: Options,
    given: Collection[str],
    folder: Path,
    *,
    resume: bool,
    mesh: Mapping[str, int] | None,
    on_epoch: Callable[[int, int, dict[str, float] | None], None],
) -> Result:
    """Trains and writes everything into `folder`.

    Several processes all call it; process 0 alone reads and writes `folder`.

    Args:
        options: what to train on and how.
        given: the names of the options that the user gave; on resuming, the others come from
            the run itself.
        folder: the output folder. Created only once the input is known to be good.
        resume: continue the run in `folder`; there must be one.
        mesh: the sizes of the mesh's axes, see `make_mesh`.
        on_epoch: called with the epochs done, the epochs wanted, and the newest metrics: once
            before training and once after each epoch.

    Returns:
        The options that were used, and the metrics of every epoch.

    Raises:
        ProgramError: with the line to show.
        KeyboardInterrupt: on Ctrl-C, at the end of the epoch; a second one takes effect at once.
    """
    _check_alike({**dataclasses.asdict(options), "resume": resume, "mesh": mesh})
    recorded = processes.from_leader(lambda: _recorded(folder, resume))
    if recorded is not None:
        options = _resumed_options(options, given, folder, recorded)
    dataset = processes.together(lambda: data.load(options.data))
    # From here on the data is known by its full path: a run resumes from any directory.
    options = dataclasses.replace(options, data=dataset.source)
    _check_data(dataset, folder, recorded)
    devices = make_mesh(mesh)
    checkpoints = processes.together(
        lambda: _opened(options, dataset, folder, recorded) if processes.leads() else None
    )
    try:
        with _interrupts_deferred() as stop_if_asked:

            def after_epoch(done: int, wanted: int, metrics: dict[str, float] | None) -> None:
                on_epoch(done, wanted, metrics)
                stop_if_asked()

            return _train(options, dataset, folder, checkpoints, mesh=devices, on_epoch=after_epoch)
    finally:
        if checkpoints:
            checkpoints.close()


def _check_alike(command: dict[str, Any]) -> None:
    """All processes have the same options; otherwise they would not train the same model."""
    first, *others = processes.exchanged(command)
    for number, other in enumerate(others, 1):
        for name, value in first.items():
            if other[name] != value:
                raise ProgramError(
                    f"--{name.replace('_', '-')}: {value} in process 0, {other[name]} in process "
                    f"{number}; start all processes with the same options"
                )


def _recorded(folder: Path, resume: bool) -> dict[str, Any] | None:
    """The configuration of the run to resume; None where there is none."""
    if not checkpoint.holds_run(folder):
        if resume:
            raise ProgramError(
                f"{folder}: holds no run to resume; choose its folder with --output, or leave "
                "--resume out to start one there"
            )
        return None
    if not resume:
        raise ProgramError(
            f"{folder}: already holds a run; add --resume to continue it, or choose another "
            "folder with --output"
        )
    return checkpoint.read_config(folder)


def _check_data(dataset: data.Dataset, folder: Path, recorded: dict[str, Any] | None) -> None:
    """Every process has the same examples, and they are those the run was started on."""
    first, *others = processes.exchanged(dataset.sha256)
    for number, other in enumerate(others, 1):
        if other != first:
            raise ProgramError(
                f"--data {dataset.source}: its arrays have sha256 {first[:12]} in process 0, "
                f"{other[:12]} in process {number}"
            )
    if recorded is not None and recorded["data_sha256"] != dataset.sha256:
        raise ProgramError(
            f"--data {dataset.source}: its arrays (sha256 {dataset.sha256[:12]}) are not those "
            f"that the run in {folder} was started on (sha256 "
            f"{str(recorded['data_sha256'])[:12]}, {recorded['options']['data']})"
        )


def _opened(
    options: Options, dataset: data.Dataset, folder: Path, recorded: dict[str, Any] | None
) -> checkpoint.Checkpoints:
    """The folder's checkpoints, with the run's configuration written beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = _config(options, dataset)
    if recorded is None:  # before anything else, so that whatever ends here can be resumed
        checkpoint.write_config(folder, config)
    checkpoints = checkpoint.Checkpoints(folder)
    try:
        done = checkpoints.latest()
        if options.epochs < done:
            raise ProgramError(
                f"--epochs {options.epochs}: the run in {folder} has already trained {done} epochs"
            )
        if recorded not in (None, config):
            checkpoint.write_config(folder, config)
    except BaseException:
        checkpoints.close()
        raise
    return checkpoints


def _train(
    options: Options,
    dataset: data.Dataset,
    folder: Path,
    checkpoints: checkpoint.Checkpoints | None,
    *,
    mesh: Mesh,
    on_epoch: Callable[[int, int, dict[str, float] | None], None],
) -> Result:
    """`checkpoints` are process 0's; the others have None and write nothing."""
    start = time.perf_counter()
    key = jax.random.key(options.seed)
    optimizer = OPTIMIZERS[options.optimizer](options.learning_rate)
    batch_size = min(options.batch_size, len(dataset.train_x))
    sizes = (dataset.train_x.shape[1], *options.hidden, dataset.classes)
    # Every random number is a function of (seed, epoch), 0 being the initialisation: a resumed
    # run needs no random state to go on as if it had never stopped, whatever the processes.
    params = model.init(jax.random.fold_in(key, 0), sizes)
    initial = State(params, optimizer.init(params))  # pyright: ignore[reportArgumentType] - a pytree
    # Kept with the parameters: without the scaling they predict nothing.
    scaling = {"mean": dataset.mean, "scale": dataset.scale}

    kept = {"state": initial, "scaling": scaling}
    history, state = processes.together(partial(_latest, folder, checkpoints, kept))
    history = processes.exchanged(history)[0]
    state = multihost_utils.broadcast_one_to_all(state)
    state = split(state, mesh, specs(optimizer, initial))
    resumed_from = len(history)
    rows = PartitionSpec(DATA)
    train_x, train_y, test_x, test_y = split(
        (dataset.train_x, dataset.train_y, dataset.test_x, dataset.test_y), mesh, rows
    )
    evaluated = partial(evaluate, classes=dataset.classes, mesh=mesh)
    on_epoch(resumed_from, options.epochs, history[-1] if history else None)
    for epoch in range(resumed_from + 1, options.epochs + 1):
        state = train_epoch(
            state,
            jax.random.fold_in(key, epoch),
            train_x,
            train_y,
            optimizer=optimizer,
            batch_size=batch_size,
            rows=len(dataset.train_y),
            classes=dataset.classes,
            mesh=mesh,
        )
        train = evaluated(state.params, train_x, train_y, rows=len(dataset.train_y))
        test = evaluated(state.params, test_x, test_y, rows=len(dataset.test_y))
        metrics = {
            "epoch": epoch,
            "train_loss": float(train.loss),
            "train_accuracy": float(train.accuracy),
            "test_loss": float(test.loss),
            "test_accuracy": float(test.accuracy),
        }
        if not all(map(math.isfinite, metrics.values())):
            raise ProgramError(
                f"training diverged in epoch {epoch}: the loss is {metrics['train_loss']} "
                f"(held out {metrics['test_loss']}); try a smaller --learning-rate than "
                f"{options.learning_rate:g}",
                exit_code=1,
            )
        history.append(metrics)
        kept["state"] = whole(state, initial)
        processes.together(partial(_write_epoch, folder, checkpoints, metrics, kept))
        on_epoch(epoch, options.epochs, metrics)
    test = evaluated(state.params, test_x, test_y, rows=len(dataset.test_y))
    predictions = whole(test.predictions, dataset.test_y)
    processes.together(partial(_draw, folder, checkpoints, history, dataset, predictions))
    return Result(
        options=options,
        dataset=dataset,
        parameters=sum(leaf.size for leaf in jax.tree.leaves(params)),
        resumed_from=resumed_from,
        history=history,
        seconds=time.perf_counter() - start,
    )


def _latest(
    folder: Path, checkpoints: checkpoint.Checkpoints | None, kept: dict[str, Any]
) -> tuple[list[dict[str, float]], State]:
    """The metrics and the state of the last checkpoint, or what a new run starts from."""
    if checkpoints is None:
        return [], kept["state"]
    epoch = checkpoints.latest()
    history = checkpoint.trim_metrics(folder, epoch)
    return history, (checkpoints.restore(epoch, kept) if epoch else kept)["state"]


def _write_epoch(
    folder: Path,
    checkpoints: checkpoint.Checkpoints | None,
    metrics: dict[str, float],
    kept: dict[str, Any],
) -> None:
    if checkpoints is None:
        return
    checkpoint.append_metrics(folder, metrics)
    checkpoints.save(int(metrics["epoch"]), kept)


def _draw(
    folder: Path,
    checkpoints: checkpoint.Checkpoints | None,
    history: list[dict[str, float]],
    dataset: data.Dataset,
    predictions: np.ndarray,
) -> None:
    if checkpoints is None:
        return
    checkpoint.write_atomically(folder / checkpoint.LOSS_PLOT, plots.loss_png(history))
    checkpoint.write_atomically(
        folder / checkpoint.CONFUSION_PLOT,
        plots.confusion_png(dataset.test_y, predictions, dataset.classes),
    )


def _config(options: Options, dataset: data.Dataset) -> dict[str, Any]:
    """What `--resume` compares with, as it reads back from JSON."""
    return {
        "jaxsoftmax": jaxsoftmax.__version__,
        "options": {**dataclasses.asdict(options), "hidden": list(options.hidden)},
        "data_sha256": dataset.sha256,
    }


def _resumed_options(
    options: Options, given: Collection[str], folder: Path, recorded: dict[str, Any]
) -> Options:
    """The run's own options, with more epochs if the user asks for them."""
    try:
        theirs = Options(**{**recorded["options"], "hidden": tuple(recorded["options"]["hidden"])})
        _ = recorded["data_sha256"]
    except (KeyError, TypeError) as error:
        raise ProgramError(
            f"{folder / checkpoint.CONFIG}: not the file this program wrote: {error}"
        ) from error
    for name in given:
        flag = "--" + name.replace("_", "-")
        ours, recorded_value = getattr(options, name), getattr(theirs, name)
        # A file may have been moved: what counts is its contents, compared by the caller.
        if name == "epochs" or (name == "data" and recorded_value != data.DIGITS):
            continue
        if ours != recorded_value:
            raise ProgramError(
                f"{flag} {_text(ours)}: the run in {folder} was started with {flag} "
                f"{_text(recorded_value)}; leave the option out, or choose another --output"
            )
    return dataclasses.replace(
        theirs, **{name: getattr(options, name) for name in ("epochs", "data") if name in given}
    )


def _text(value: Any) -> str:
    """An option's value as one would type it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)


@contextmanager
def _interrupts_deferred() -> Iterator[Callable[[], None]]:
    """Gives a function to call where Ctrl-C may take effect: it raises if Ctrl-C was pressed.

    So does leaving the context. A second Ctrl-C takes effect at once.
    """
    received = False

    def defer(at_once: Callable[[], object]) -> None:
        nonlocal received
        if received:
            at_once()
        received = True

    def stop_if_asked() -> None:
        if received:
            raise KeyboardInterrupt

    with on_interrupt(defer):
        yield stop_if_asked
    stop_if_asked()
