# SPDX-License-Identifier: Apache-2.0
"""A run from start to end, whatever is trained: rounds, what is written after each, and resuming.

A `Kind` says what is trained, in five parts: options, inputs, and a `Task` of both.
"""

import dataclasses
import json
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args, get_origin, get_type_hints

import jax
import optax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, PartitionSpec

import jaxsoftmax
from jaxsoftmax.training import checkpoint, processes
from jaxsoftmax.training.checkpoint import Checkpoints, Kept
from jaxsoftmax.training.checks import flag
from jaxsoftmax.training.errors import ProgramError, in_words
from jaxsoftmax.training.interrupts import on_interrupt
from jaxsoftmax.training.mesh import make_mesh, split, whole

Metrics = dict[str, float]


class State(NamedTuple):
    """What training changes."""

    params: Any
    opt_state: optax.OptState


class Inputs(NamedTuple):
    """What is read before anything is trained, by every process.

    Attributes:
        options: with full paths, so that a run resumes from any directory.
        option: the one that named the inputs.
        source: where they come from, in a few words.
        sha256: a fingerprint: of the same inputs, everything else is the same.
        files: what to keep beside the configuration, by name.
        data: what the task makes of them.
    """

    options: Any
    option: str
    source: str
    sha256: str
    files: dict[str, str]
    data: Any


class Task(Protocol):
    """What is trained, evaluated and drawn.

    Attributes:
        total: how many units, epochs or steps, a run trains.
        every: after how many it is evaluated and written: a round.
        initial: the state before them: whole arrays, the same in every process.
        mesh: the devices.
        specs: how the parameters are split over them.
        optimizer: what makes the steps.
        constants: arrays that are kept with the state: without them it predicts nothing.
    """

    total: int
    every: int
    initial: State
    mesh: Mesh
    specs: Any
    optimizer: optax.GradientTransformation
    constants: dict[str, Any]

    def position(self) -> dict[str, Any]:
        """Where in the data the task is; anything that JSON holds."""
        ...

    def go_to(self, position: dict[str, Any]) -> None:
        """Goes on from what `position` gave."""
        ...

    def train(
        self, state: State, units: range, tick: Callable[[int, Metrics], None]
    ) -> tuple[State, Metrics]:
        """One round; `tick` is called after each unit but the last, and may end the run.

        Raises:
            DivergedError: if a loss is not finite.
        """
        ...

    def evaluate(self, state: State) -> Metrics:
        """The metrics after a round, `test_loss` among them."""
        ...

    def pictures(self, state: State, history: list[Metrics]) -> dict[str, Callable[[], bytes]]:
        """What is drawn at the end, by the name of the file; all processes call it."""
        ...


class Kind(NamedTuple):
    """A kind of task.

    Attributes:
        name: as the configuration has it.
        command: of the program that trains it.
        unit: what its units are called in the metrics.
        options: a frozen dataclass of JSON's values and tuples of them, which checks them.
        axes: of its meshes.
        free: the options that may be others when a run is resumed.
        less_memory: what to try where it is not enough.
        metrics: the names of all that a round gives.
        score: how good they are: the best checkpoint has the highest.
        files: the names of `Inputs.files`.
        pictures: the names of `Task.pictures`.
        read: the inputs, from the options and the files of the run to resume, if there is one.
        task: of inputs and a mesh.
    """

    name: str
    command: str
    unit: str
    options: type[Any]
    axes: tuple[str, ...]
    free: frozenset[str]
    less_memory: str
    metrics: frozenset[str]
    score: Callable[[Mapping[str, float]], float]
    files: tuple[str, ...]
    pictures: tuple[str, ...]
    read: Callable[[Any, dict[str, str] | None], Inputs]
    task: Callable[[Inputs, Mesh], Task]


class DivergedError(Exception):
    """A loss that is not finite."""

    def __init__(self, unit: int, losses: str) -> None:
        """Takes the unit after which it was seen, and a word on the losses."""
        super().__init__(losses)
        self.unit = unit


class Result(NamedTuple):
    """What the summary shows."""

    inputs: Inputs
    task: Task
    resumed_from: int
    history: list[Metrics]
    seconds: float

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.task.initial.params))


class Progress(Protocol):
    """Is told how far a run is, and with what metrics, if there are any yet.

    `written`: whether the metrics are those of a round.
    """

    def __call__(  # noqa: D102
        self, done: int, total: int, metrics: Mapping[str, float] | None, *, written: bool
    ) -> None: ...


def train(
    kind: Kind,
    values: Mapping[str, Any],
    given: Collection[str],
    folder: Path,
    *,
    resume: bool,
    mesh: Mapping[str, int] | None,
    progress: Progress,
) -> Result:
    """Trains and writes everything into `folder`.

    Several processes all call it; process 0 alone reads and writes `folder`.

    Args:
        kind: what to train.
        values: of all its options, by name: what to train on and how. The same on the same
            machine give the same numbers.
        given: the names of those that the user gave; on resuming, the others come from the run
            itself.
        folder: the output folder. Created only once the input is known to be good.
        resume: continue the run in `folder`; there must be one.
        mesh: the sizes of the mesh's axes, see `make_mesh`.
        progress: called once before training and after each unit.

    Returns:
        The options that were used, and the metrics of every round.

    Raises:
        ProgramError: with the line to show.
        KeyboardInterrupt: on Ctrl-C, at the end of the unit; a second one takes effect at once.
    """
    alike = {"--resume": resume, "--mesh": mesh, "the options that are given": sorted(given)}
    _check_alike({flag(name): value for name, value in values.items()} | alike)
    recorded = processes.from_leader(lambda: _recorded(kind, folder, resume))
    files = None
    if recorded is None:
        options = kind.options(**values)
    else:
        ours = {name: values[name] for name in given}
        options = _resumed_options(kind, ours, folder, recorded)
        files = processes.from_leader(lambda: read_files(kind, folder))
    inputs = processes.together(lambda: kind.read(options, files))
    _check_inputs(inputs, folder, recorded)
    task = kind.task(inputs, make_mesh(mesh, kind.axes))
    with ExitStack() as to_close:

        def opened() -> Checkpoints | None:
            if not processes.leads():
                return None
            return _opened(kind, inputs, task, folder, recorded=recorded, to_close=to_close)

        checkpoints = processes.together(opened)
        with _interrupts_deferred() as stop_if_asked:

            def told(
                done: int, total: int, metrics: Mapping[str, float] | None, *, written: bool
            ) -> None:
                progress(done, total, metrics, written=written)
                stop_if_asked()

            return _train(kind, inputs, task, folder, checkpoints, progress=told)


def _check_alike(command: dict[str, Any]) -> None:
    """All processes have the same options; otherwise they would not train the same model."""
    first, *others = processes.exchanged(command)
    for number, other in enumerate(others, 1):
        for name, value in first.items():
            if other[name] != value:
                raise ProgramError(
                    f"{name}: {value} in process 0, {other[name]} in process "
                    f"{number}; start all processes with the same options"
                )


def _recorded(kind: Kind, folder: Path, resume: bool) -> dict[str, Any] | None:
    """The configuration of the run to resume; None where there is none."""
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise ProgramError(f"--output {folder}: expected a name in UTF-8") from error
    if folder.exists() and not folder.is_dir():
        raise ProgramError(f"--output {folder}: expected the name of a folder; this is a file")
    if not holds_run(kind, folder):
        if resume:
            raise ProgramError(
                f"{folder}: holds no run to resume; choose its folder with --output, or leave "
                "--resume out to start one there"
            )
        return None
    if not resume:
        raise _taken(folder)
    return recorded_run(kind, folder)


def _taken(folder: Path) -> ProgramError:
    return ProgramError(
        f"{folder}: already holds a run; add --resume to continue it, or choose another folder "
        "with --output"
    )


def holds_run(kind: Kind, folder: Path) -> bool:
    """Whether anything that such a run writes is in the folder."""
    ours = (checkpoint.CONFIG, checkpoint.METRICS, checkpoint.CHECKPOINTS)
    return any((folder / name).exists() for name in (*ours, *kind.files, *kind.pictures))


def recorded_run(kind: Kind, folder: Path) -> dict[str, Any]:
    """The configuration of a run of this kind."""
    recorded = checkpoint.read_config(folder)
    found = recorded.get("task")
    if found != kind.name:
        raise ProgramError(
            f"{folder}: expected the run of a {kind.name} (jaxsoftmax {kind.command}); "
            f"its {checkpoint.CONFIG} is of a {found}"
        )
    return recorded


def _check_inputs(inputs: Inputs, folder: Path, recorded: dict[str, Any] | None) -> None:
    """Every process has the same inputs, and they are those the run was started on."""
    first, *others = processes.exchanged(inputs.sha256)
    for number, other in enumerate(others, 1):
        if other != first:
            raise ProgramError(
                f"{inputs.option} {inputs.source}: its contents have sha256 {first[:12]} in "
                f"process 0, {other[:12]} in process {number}"
            )
    if recorded is not None and recorded["data_sha256"] != inputs.sha256:
        raise ProgramError(
            f"{inputs.option} {inputs.source}: its contents (sha256 {inputs.sha256[:12]}) are not "
            f"those that the run in {folder} was started on (sha256 "
            f"{str(recorded['data_sha256'])[:12]}, {recorded['data']})"
        )


def _opened(
    kind: Kind,
    inputs: Inputs,
    task: Task,
    folder: Path,
    *,
    recorded: dict[str, Any] | None,
    to_close: ExitStack,
) -> Checkpoints:
    """The folder's checkpoints, with the run's configuration written beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    to_close.enter_context(checkpoint.alone(folder))
    config = _config(kind, inputs)
    if recorded is None:  # before anything else, so that whatever ends here can be resumed
        if holds_run(kind, folder):  # by now
            raise _taken(folder)
        for name, text in inputs.files.items():
            checkpoint.write_atomically(folder / name, text)
        checkpoint.write_config(folder, config)
    checkpoints = Checkpoints(folder, _identity(kind, config, inputs.files), kind.score)
    to_close.callback(checkpoints.close)
    done = checkpoints.latest()
    if task.total < done:
        raise ProgramError(
            f"--{kind.unit}s {task.total}: the run in {folder} has already trained {done} "
            f"{kind.unit}s"
        )
    if recorded not in (None, config):
        checkpoint.write_config(folder, config)
    return checkpoints


def _train(
    kind: Kind,
    inputs: Inputs,
    task: Task,
    folder: Path,
    checkpoints: Checkpoints | None,
    *,
    progress: Progress,
) -> Result:
    """`checkpoints` are process 0's; the others have None and write nothing."""
    start = time.perf_counter()
    history, kept = processes.together(lambda: _latest(kind, task, folder, checkpoints))
    history, position = processes.exchanged((history, kept.position))[0]
    state = State(**multihost_utils.broadcast_one_to_all(kept.state._asdict()))
    state = split(state, task.mesh, state_specs(task))
    if history:
        task.go_to(position)
    done = resumed_from = int(history[-1][kind.unit]) if history else 0
    progress(done, task.total, history[-1] if history else None, written=bool(history))
    while done < task.total:
        end = min(done + task.every, task.total)

        def tick(unit: int, metrics: Metrics) -> None:
            progress(unit, task.total, metrics, written=False)

        try:
            state, trained = task.train(state, range(done + 1, end + 1), tick)
            metrics = {kind.unit: end, **trained, **task.evaluate(state)}
            if not all(map(math.isfinite, metrics.values())):
                raise DivergedError(
                    end, f"{metrics['train_loss']} (held out {metrics['test_loss']})"
                )
        except DivergedError as error:
            last = f"the last good checkpoint is of {kind.unit} {done}" if done else "no checkpoint"
            raise ProgramError(
                f"training diverged in {kind.unit} {error.unit}: the loss is {error}; {last}; try "
                f"a smaller --learning-rate than {inputs.options.learning_rate:g}",
                exit_code=1,
            ) from error
        done = end
        history.append(metrics)
        kept = Kept(whole(state, task.initial), task.position())
        processes.together(
            partial(_write_round, task, folder, checkpoints, metrics, done=done, kept=kept)
        )
        progress(done, task.total, metrics, written=True)
    pictures = task.pictures(state, history)
    processes.together(lambda: _draw(folder, checkpoints, pictures))
    return Result(
        inputs=inputs,
        task=task,
        resumed_from=resumed_from,
        history=history,
        seconds=time.perf_counter() - start,
    )


def state_specs(task: Task) -> State:
    """How a state is split over a mesh: what belongs to a parameter as the parameter is."""
    opt_state = optax.tree_map_params(
        task.optimizer,
        lambda _, spec: spec,
        task.initial.opt_state,
        task.specs,
        transform_non_params=lambda _: PartitionSpec(),
    )
    return State(task.specs, opt_state)  # pyright: ignore[reportArgumentType] - a pytree


def tree_of(state: State, task: Task) -> dict[str, Any]:
    """What is kept of a state: what the arrays of a checkpoint are called."""
    return {**state._asdict(), **task.constants}


def restored(kind: Kind, folder: Path, which: str) -> tuple[int, Any]:
    """A checkpoint of a run to use: after how many units, and what `tree_of` gave, unchecked.

    Args:
        kind: of the run.
        folder: its output folder.
        which: "best", "last" or a number.

    Raises:
        ProgramError: there is no such run or checkpoint, or it cannot be read.
    """
    recorded = recorded_run(kind, folder)
    recorded_options(kind, folder, recorded)
    if not (folder / checkpoint.CHECKPOINTS).is_dir():
        raise ProgramError(f"{folder}: has no checkpoint yet")
    run = _identity(kind, recorded, read_files(kind, folder))
    checkpoints = Checkpoints(folder, run, kind.score, read_only=True)
    try:
        numbers = checkpoints.all()
        if not numbers:
            raise ProgramError(f"{folder}: has no checkpoint yet")
        by_name = {"best": checkpoints.best(), "last": checkpoints.latest()}
        number = by_name.get(which, int(which) if which.isdecimal() and len(which) < 20 else 0)
        if number not in numbers:
            raise ProgramError(
                f"--checkpoint must be best, last or one of {', '.join(map(str, numbers))}; "
                f"got {which!r}"
            )
        return number, checkpoints.restore(number).state
    finally:
        checkpoints.close()


def _latest(
    kind: Kind, task: Task, folder: Path, checkpoints: Checkpoints | None
) -> tuple[list[Metrics], Kept]:
    """The metrics and what the last checkpoint holds, or what a new run starts from."""
    done = checkpoints.latest() if checkpoints else 0
    if checkpoints:
        ends = [*range(task.every, done, task.every), done] if done else []
        history = checkpoint.trim_metrics(folder, kind.unit, kind.metrics, ends)
    else:
        history = []
    if not done or not checkpoints:
        return history, Kept(task.initial, {})
    kept = checkpoints.restore(done, tree_of(task.initial, task))
    return history, kept._replace(state=State(kept.state["params"], kept.state["opt_state"]))


def _write_round(
    task: Task,
    folder: Path,
    checkpoints: Checkpoints | None,
    metrics: Metrics,
    *,
    done: int,
    kept: Kept,
) -> None:
    if checkpoints is None:
        return
    checkpoints.wait()  # so that the metrics are at most one line ahead
    with _failing_while_training():
        checkpoint.append_metrics(folder, metrics)
    checkpoints.save(done, kept._replace(state=tree_of(kept.state, task)), metrics)


def _draw(
    folder: Path, checkpoints: Checkpoints | None, pictures: dict[str, Callable[[], bytes]]
) -> None:
    if checkpoints is None:
        return
    with _failing_while_training():
        for name, draw in pictures.items():
            checkpoint.write_atomically(folder / name, draw())


@contextmanager
def _failing_while_training() -> Iterator[None]:
    """What the system refuses now is not the user's input."""
    try:
        yield
    except OSError as error:
        raise ProgramError(in_words(error), exit_code=1) from error


def _config(kind: Kind, inputs: Inputs) -> dict[str, Any]:
    """What `--resume` compares with, as it reads back from JSON."""
    options = {
        name: [*value] if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(inputs.options).items()
    }
    return {
        "jaxsoftmax": jaxsoftmax.__version__,
        "task": kind.name,
        "options": options,
        "data": inputs.source,
        "data_sha256": inputs.sha256,
    }


def read_files(kind: Kind, folder: Path) -> dict[str, str]:
    """What a run kept beside its configuration."""
    return {name: checkpoint.read_file(folder / name) for name in kind.files}


def _identity(kind: Kind, config: Mapping[str, Any], files: Mapping[str, str]) -> str:
    """What a run's checkpoints go with: all but the options that may change."""
    fixed = {name: value for name, value in config["options"].items() if name not in kind.free}
    return json.dumps([fixed, config["data_sha256"], dict(files)], sort_keys=True)


def recorded_options(kind: Kind, folder: Path, recorded: dict[str, Any]) -> Any:
    """A run's own options."""
    try:
        theirs = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in recorded["options"].items()
        }
        for name, hint in get_type_hints(kind.options).items():
            expected, value = get_origin(hint) or hint, theirs[name]
            # Of a tuple, all are of one type.
            if type(value) is not expected or (
                expected is tuple and any(type(part) is not get_args(hint)[0] for part in value)
            ):
                raise TypeError(f"{name}: expected {hint}; got {value!r}")
        options = kind.options(**theirs)
        _ = recorded["data_sha256"], recorded["data"]
    except (AttributeError, KeyError, TypeError, ProgramError) as error:
        raise ProgramError(
            f"{folder / checkpoint.CONFIG}: not the file this program wrote: {error}"
        ) from error
    return options


def _resumed_options(
    kind: Kind, given: dict[str, Any], folder: Path, recorded: dict[str, Any]
) -> Any:
    """The run's own options, with the free ones that the user gives."""
    theirs = recorded_options(kind, folder, recorded)
    for name, ours in given.items():
        recorded_value = getattr(theirs, name)
        if name not in kind.free and ours != recorded_value:
            raise ProgramError(
                f"{flag(name)} {_text(ours)}: the run in {folder} was started with {flag(name)} "
                f"{_text(recorded_value)}; leave the option out, or choose another --output"
            )
    return dataclasses.replace(theirs, **{name: given[name] for name in kind.free & {*given}})


def _text(value: Any) -> str:
    """An option's value as one would type it."""
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


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
