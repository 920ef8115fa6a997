# SPDX-License-Identifier: Apache-2.0
"""The output folder: configuration, metrics and checkpoints, each written atomically.

An epoch's metrics are written first, its checkpoint second. The checkpoint is what counts: on
resuming, a line of metrics that is newer than it is cut off. So a run killed between any two
instructions resumes from its last checkpoint with nothing missing and nothing twice.
"""

import json
import logging
import os
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxsoftmax.training.errors import ProgramError

CONFIG = "config.json"
METRICS = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
LOSS_PLOT = "loss.png"
CONFUSION_PLOT = "confusion.png"
_KEPT = 3


def holds_run(folder: Path) -> bool:
    """Whether anything of a run is in the folder."""
    return any(
        (folder / name).exists()
        for name in (CONFIG, METRICS, CHECKPOINTS, LOSS_PLOT, CONFUSION_PLOT)
    )


def write_atomically(path: Path, contents: str | bytes) -> None:
    """Writes the whole file or nothing: first under another name, then renamed."""
    beside = path.with_name(f".{path.name}.tmp")
    beside.write_bytes(contents.encode() if isinstance(contents, str) else contents)
    os.replace(beside, path)


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
    except ValueError as error:  # not UTF-8 or not JSON
        raise ProgramError(f"{path}: not the file this program wrote: {error}") from error
    if not isinstance(config, dict):
        raise ProgramError(f"{path}: not the file this program wrote: no JSON object")
    return config


def append_metrics(folder: Path, metrics: dict[str, float]) -> None:
    """Adds one epoch's line."""
    with open(folder / METRICS, "a") as file:
        file.write(json.dumps(metrics) + "\n")


def trim_metrics(folder: Path, epochs: int) -> list[dict[str, float]]:
    """Cuts the metrics back to the first `epochs` lines and returns them."""
    path = folder / METRICS
    text = path.read_text() if path.exists() else ""
    lines = text.splitlines()[:epochs]
    try:
        history = [json.loads(line) for line in lines]
        found = [metrics["epoch"] for metrics in history]
    except (ValueError, KeyError, TypeError) as error:
        raise ProgramError(f"{path}: not the file this program wrote: {error}") from error
    if found != list(range(1, epochs + 1)):
        raise ProgramError(
            f"{path}: the checkpoint is of epoch {epochs}, but the file has {len(found)} of its "
            "lines; choose another --output"
        )
    kept = "".join(line + "\n" for line in lines)
    if kept != text:
        write_atomically(path, kept)
    return history


class Checkpoints:
    """The last few epochs' states, by number of epochs trained."""

    def __init__(self, folder: Path) -> None:
        """Opens, or creates, the checkpoints of an output folder; for process 0 alone."""
        self._folder = folder / CHECKPOINTS
        self._folder.mkdir(exist_ok=True)
        # orbax warns of an old checkpoint that a killed run had half deleted: nobody needs it.
        logging.getLogger("absl").setLevel(logging.ERROR)
        self._manager = ocp.CheckpointManager(
            self._folder.resolve(),
            options=ocp.CheckpointManagerOptions(
                max_to_keep=_KEPT,
                cleanup_tmp_directories=True,  # what a killed run left half-written
                enable_async_checkpointing=False,  # when `save` returns it is on disk
                create=False,  # orbax does not create a folder that not all processes see
                multiprocessing_options=ocp.options.MultiprocessingOptions(active_processes={0}),
            ),
        )

    def latest(self) -> int:
        """The number of epochs the newest checkpoint has been trained for; 0 if there is none."""
        return self._manager.latest_step() or 0

    def save(self, epoch: int, state: Any) -> None:
        """Writes the state after an epoch; orbax writes aside and renames."""
        if not self._manager.save(epoch, args=ocp.args.StandardSave(state)):
            raise ProgramError(f"{self._folder}: epoch {epoch} was not written", exit_code=1)

    def restore(self, epoch: int, like: Any) -> Any:
        """The state after an epoch; `like` gives its structure, shapes and dtypes."""
        shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        try:
            return self._manager.restore(epoch, args=ocp.args.StandardRestore(shapes))
        # What orbax raises for files that are missing, damaged or of another shape.
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ProgramError(
                f"{self._folder / str(epoch)}: cannot be restored: {error}; remove it to resume "
                "from the checkpoint before it"
            ) from error

    def close(self) -> None:
        """Releases what the manager holds."""
        self._manager.close()
