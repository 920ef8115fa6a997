# SPDX-License-Identifier: Apache-2.0
"""The output folder: configuration, metrics and checkpoints, each written atomically.

The metrics of a round are written first, its checkpoint second, while training goes on. The
checkpoint is what counts: on resuming, a line of metrics that is newer than it is cut off. So a run
killed between any two instructions resumes from its last checkpoint with nothing missing and
nothing twice.
"""

import hashlib
import itertools
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from jaxsoftmax.training.errors import ProgramError, in_words

CONFIG = "config.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
LOSS_PLOT = "loss.png"
_KEPT = 3
_STATE, _POSITION = "state", "position"
_DIGEST = "sha256"  # beside the position: of it and of the state


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """The folder for one run at a time; one that is killed leaves it free."""
    try:
        import fcntl  # noqa: PLC0415  (Windows has none)
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ProgramError(
                f"{folder}: another run writes there now; choose another folder with --output"
            ) from error
        yield
    finally:
        os.close(descriptor)


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Writes the whole file or nothing: first under another name, then renamed."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        with _named(beside):
            beside.write_bytes(contents.encode() if isinstance(contents, str) else contents)
            os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Gives an error of the system the file's name; a full disk's has none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Records what a run is made of, for `--resume` to compare with."""
    write_atomically(folder / CONFIG, json.dumps(config, indent=2) + "\n")


def read_config(folder: Path) -> dict[str, Any]:
    """What `write_config` wrote."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ProgramError(f"{folder}: is no run of this program: {CONFIG} is missing") from error
    except (ValueError, RecursionError) as error:  # not UTF-8 or not JSON
        raise ProgramError(f"{path}: not the file this program wrote: {error}") from error
    if not isinstance(config, dict):
        raise ProgramError(f"{path}: not the file this program wrote: no JSON object")
    return config


def read_file(path: Path) -> str:
    """What was written beside the configuration."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ProgramError(f"{path}: not the file this program wrote: {error}") from error
    except OSError as error:
        raise ProgramError(in_words(error)) from error


def append_metrics(folder: Path, metrics: Mapping[str, float]) -> None:
    """Adds the line of one round."""
    with _named(folder / METRICS), open(folder / METRICS, "a") as file:
        file.write(json.dumps(metrics) + "\n")


def trim_metrics(
    folder: Path, unit: str, names: Collection[str], done: Sequence[int]
) -> list[dict[str, float]]:
    """Cuts the metrics, of these names, back to the lines of the rounds that ended at `done`."""
    path = folder / METRICS
    try:
        text = path.read_text() if path.exists() else ""
        lines = text.splitlines()[: len(done)]
        history = [json.loads(line) for line in lines]
        found = [metrics[unit] for metrics in history]
        for line in history:
            if {*line} != {unit, *names}:
                wanted = ", ".join([unit, *sorted(names)])
                raise ValueError(f"a line has other metrics than {wanted}")
            for name, value in line.items():
                largest = 1 if name.endswith("accuracy") else math.inf
                if type(value) not in (int, float) or not -math.inf < float(value) < math.inf:
                    raise ValueError(f"{name}: no finite number")
                if value > largest:
                    raise ValueError(f"{name}: {value}, more than {largest}")
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError) as e:
        raise ProgramError(f"{path}: not the file this program wrote: {e}") from e
    for number, (line, expected) in enumerate(itertools.zip_longest(found, done), 1):
        if line != expected:
            raise ProgramError(
                f"{path}: line {number}: expected {unit} {expected}, as the checkpoint is of "
                f"{done[-1]}; got {'nothing' if line is None else line}"
            )
    kept = "".join(line + "\n" for line in lines)
    if kept != text:
        write_atomically(path, kept)
    return history


class Kept(NamedTuple):
    """What a checkpoint holds."""

    state: Any  # a tree of arrays
    position: dict[str, Any]  # where in its data a run is: anything that JSON holds


class Checkpoints:
    """The states after the last few rounds and after the best one, by the units trained."""

    def __init__(
        self,
        folder: Path,
        run: str,
        score: Callable[[Mapping[str, float]], float],
        *,
        read_only: bool = False,
    ) -> None:
        """Opens, or creates, the checkpoints of an output folder; for process 0 alone.

        They go with what `run` says of the run: with anything else they cannot be restored. The
        best one has the highest score of its metrics, the last of those that tie.
        """
        self._run = run
        self._folder = folder / CHECKPOINTS
        if not read_only:
            self._folder.mkdir(exist_ok=True)
        # orbax tells at length what is raised too, or that a killed run had half deleted one.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        policies = ocp.checkpoint_managers
        try:
            self._manager = ocp.CheckpointManager(
                self._folder.resolve(),
                item_names=(_STATE, _POSITION),
                options=ocp.CheckpointManagerOptions(
                    best_fn=score,
                    preservation_policy=policies.AnyPreservationPolicy(
                        [policies.LatestN(_KEPT), policies.BestN(get_metric_fn=score, n=1)]
                    ),
                    read_only=read_only,
                    cleanup_tmp_directories=not read_only,  # what a killed run left half-written
                    create=False,  # orbax does not create a folder that not all processes see
                    multiprocessing_options=ocp.options.MultiprocessingOptions(
                        active_processes={0}
                    ),
                ),
            )
            self._manager.best_step()  # reads the metrics of all
        except Exception as error:  # orbax's own, of any class: the folder may hold anything
            raise ProgramError(
                f"{self._folder}: not what this program wrote: {_reason(error)}"
            ) from error

    def latest(self) -> int:
        """The units that the newest checkpoint has been trained for; 0 if there is none."""
        return self._manager.latest_step() or 0

    def best(self) -> int:
        """The units of the best checkpoint; 0 if there is none."""
        return self._manager.best_step() or 0

    def all(self) -> list[int]:
        """The units of every checkpoint."""
        return sorted(self._manager.all_steps())

    def wait(self) -> None:
        """Until the checkpoint that is being written is on disk."""
        with self._writing():
            self._manager.wait_until_finished()

    def save(self, done: int, kept: Kept, metrics: Mapping[str, float]) -> None:
        """Begins to write; orbax writes aside and renames."""
        position = {_POSITION: kept.position, _DIGEST: self._digest(kept)}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(kept.state), position=ocp.args.JsonSave(position)
        )
        with self._writing():
            if not self._manager.save(done, args=items, metrics=dict(metrics)):
                raise ProgramError(f"{self._folder}: {done} was not written", exit_code=1)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except ProgramError:
            raise
        except Exception as error:  # of a full disk orbax's is a ValueError
            raise ProgramError(
                f"{self._folder}: cannot be written: {_reason(error)}", exit_code=1
            ) from error

    def _digest(self, kept: Kept) -> str:
        """Of the run, the position and the state, in whatever containers its arrays are."""
        digest = hashlib.sha256(json.dumps([self._run, kept.position], sort_keys=True).encode())
        arrays = [np.ascontiguousarray(leaf) for leaf in jax.tree.leaves(kept.state)]
        for one in sorted(hashlib.sha256(array.data).digest() for array in arrays):
            digest.update(one)
        return digest.hexdigest()

    def restore(self, done: int, like: Any = None) -> Kept:
        """A checkpoint; `like` gives the structure, shapes and dtypes of its state, if known."""
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(shapes), position=ocp.args.JsonRestore()
        )
        try:
            with _one_error():
                found = self._manager.restore(done, args=items)
            kept = Kept(found[_STATE], found[_POSITION][_POSITION])
            if found[_POSITION][_DIGEST] != self._digest(kept):
                raise ValueError(f"it was damaged, or {CONFIG} or a file beside it was changed")
        # What orbax raises for files that are missing, damaged or of another shape is of any class.
        except Exception as error:
            advice = "" if like is None else "; remove it to resume from the checkpoint before it"
            raise ProgramError(
                f"{self._folder / str(done)}: cannot be restored: {_reason(error)}{advice}"
            ) from error
        return kept

    def close(self) -> None:
        """Waits for what is being written, and releases what the manager holds."""
        with self._writing():
            self._manager.close()


@contextmanager
def _one_error() -> Iterator[None]:
    """When one array cannot be read, those read beside it find orbax's loop closed, each aloud."""
    outer = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            outer(unraisable)

    sys.unraisablehook = hook
    yield
    sys.unraisablehook = outer  # not after an error: they go on


def _reason(error: Exception) -> str:
    """What an error says, or its class where that is nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
