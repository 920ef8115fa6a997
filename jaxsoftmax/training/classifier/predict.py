# SPDX-License-Identifier: Apache-2.0
"""A trained classifier on the rows of a file."""

import io
import itertools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxsoftmax
from jaxsoftmax.training.checkpoint import write_atomically
from jaxsoftmax.training.classifier import data, model
from jaxsoftmax.training.classifier.task import CLASSIFIER
from jaxsoftmax.training.errors import ProgramError
from jaxsoftmax.training.run import restored

_ROWS = 4096  # at a time


class Predicted(NamedTuple):
    """What the summary shows; `right` is None where the file has no labels."""

    epoch: int
    rows: int
    shape: tuple[int, ...]
    right: int | None


def predict_file(run: Path, source: Path, output: Path, which: str) -> Predicted:
    """Classifies the rows of `source` and writes `output`.

    Raises:
        ProgramError: with the line to show.
    """
    if not output.name or output.is_dir():
        raise ProgramError(f"--output {output}: expected the name of a file; this is a folder")
    x, y = data.load_rows(str(source))
    epoch, tree = restored(CLASSIFIER, run, which)
    params, scaling = _parts(tree, run)
    features = len(scaling["mean"])
    if x.shape[1] != features:
        raise ProgramError(
            f"{source}: array 'x' has {x.shape[1]} features; the run in {run} was trained on "
            f"{features}"
        )
    classes = params[-1][1].shape[0]
    x = data.scaled(x, scaling["mean"], scaling["scale"])

    @jax.jit
    def probabilities(x):
        return jaxsoftmax.softmax(model.apply(params, x, classes))

    parts = [np.asarray(probabilities(x[i : i + _ROWS])) for i in range(0, len(x), _ROWS)]
    found = np.concatenate(parts)
    predictions = found.argmax(axis=1).astype(np.int32)
    buffer = io.BytesIO()
    np.savez(buffer, probabilities=found, classes=predictions)
    write_atomically(output, buffer.getvalue())
    right = None if y is None else int((predictions == y).sum())
    return Predicted(epoch, len(x), found.shape, right)


def _parts(tree, run):
    """The layers and the scaling, checked: a checkpoint may be anything."""
    try:
        params = [(jnp.asarray(w), jnp.asarray(b)) for w, b in tree["params"]]
        scaling = {name: np.asarray(tree["scaling"][name]) for name in ("mean", "scale")}
        if scaling["scale"].shape != scaling["mean"].shape:
            raise ValueError(f"a scale of shape {scaling['scale'].shape}")
        widths = [len(scaling["mean"]), *(len(b) for _, b in params)]
        shapes = [w.shape for w, _ in params]
        if shapes != [*itertools.pairwise(widths)] or not params:
            raise ValueError(f"layers of shapes {shapes} for {widths[0]} features")
    except (KeyError, TypeError, ValueError) as error:
        raise ProgramError(f"{run}: the checkpoint is not of a classifier: {error}") from error
    return params, scaling
