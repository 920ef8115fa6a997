# SPDX-License-Identifier: Apache-2.0
"""The output folder: configuration, metrics and checkpoints, each written atomically.

The metrics of a round are written first, its checkpoint second, while training goes on. The
checkpoint is what counts: on resuming, a line of metrics that is newer than it is cut off. So a run
killed between any two instructions resumes from its last checkpoint with nothing missing and
nothing twice.
"""

import json
import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from jaxsoftmax.training.errors import ProgramError, in_words

CONFIG = "config.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
LOSS_PLOT = "loss.png"
_KEPT = 3
_STATE, _POSITION = "state", "position"


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Writes the whole file or nothing: first under another name, then renamed."""
    beside = path.with_name(f".{path.name}.tmp")
    try:
        beside.write_bytes(contents.encode() if isinstance(contents, str) else contents)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
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
        raise ProgramError(
            f"{folder}: cannot resume: {CONFIG} is missing; choose another --output"
        ) from error
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
    with open(folder / METRICS, "a") as file:
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
        if not all(type(value) in (int, float) for line in history for value in line.values()):
            raise ValueError("a metric that is no number")
        if any({*line} != {unit, *names} for line in history):
            raise ValueError(f"a line has other metrics than {', '.join([unit, *sorted(names)])}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ProgramError(f"{path}: not the file this program wrote: {error}") from error
    if found != [*done]:
        raise ProgramError(
            f"{path}: the checkpoint is of {unit} {done[-1]}, but the file has {len(found)} of its "
            f"{len(done)} lines; choose another --output"
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
        score: Callable[[Mapping[str, float]], float],
        *,
        read_only: bool = False,
    ) -> None:
        """Opens, or creates, the checkpoints of an output folder; for process 0 alone.

        The best one has the highest score of its metrics, the last of those that tie.
        """
        self._folder = folder / CHECKPOINTS
        if not read_only:
            self._folder.mkdir(exist_ok=True)
        # orbax warns of an old checkpoint that a killed run had half deleted: nobody needs it.
        logging.getLogger("absl").setLevel(logging.ERROR)
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
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ProgramError(
                f"{self._folder}: not what this program wrote: {type(error).__name__}: {error}"
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
        self._manager.wait_until_finished()

    def save(self, done: int, kept: Kept, metrics: Mapping[str, float]) -> None:
        """Begins to write; orbax writes aside and renames."""
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(kept.state), position=ocp.args.JsonSave(kept.position)
        )
        if not self._manager.save(done, args=items, metrics=dict(metrics)):
            raise ProgramError(f"{self._folder}: {done} was not written", exit_code=1)

    def restore(self, done: int, like: Any = None) -> Kept:
        """A checkpoint; `like` gives the structure, shapes and dtypes of its state, if known."""
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        items = ocp.args.Composite(
            state=ocp.args.StandardRestore(shapes), position=ocp.args.JsonRestore()
        )
        try:
            return Kept(**self._manager.restore(done, args=items))
        # What orbax raises for files that are missing, damaged or of another shape.
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ProgramError(
                f"{self._folder / str(done)}: cannot be restored: {error}; remove it to resume "
                "from the checkpoint before it"
            ) from error

    def close(self) -> None:
        """Waits for what is being written, and releases what the manager holds."""
        self._manager.close()
