# SPDX-License-Identifier: Apache-2.0
"""What is measured: shapes, dtypes and modes, the inputs they need and the bytes they move."""

import math
from collections.abc import Callable
from enum import StrEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer

# Inputs smaller than this are rotated, so that no call finds its logits in a cache: larger than
# the last-level cache of nearly every CPU and GPU.
ROTATION_BYTES = 256 * 2**20
MOST_COPIES = 512


class Dtype(StrEnum):
    """The dtypes logits come in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Mode(StrEnum):
    """What a contender is asked for."""

    FORWARD = "forward"
    VALUE_AND_GRAD = "value-and-grad"


class Labels(StrEnum):
    """How the targets are given: a class number a row, or a distribution a row."""

    INTEGER = "integer"
    DENSE = "dense"


class Op(StrEnum):
    """What is measured: a loss of given logits, or a linear head with its loss."""

    LOGITS = "logits"
    LINEAR = "linear"


class Shape(NamedTuple):
    """Rows and classes of the logits."""

    tokens: int
    classes: int

    def __str__(self) -> str:
        """Write the shape as the command line takes it."""
        return f"{self.tokens}x{self.classes}"


SHAPES = (
    Shape(4096, 32000),
    Shape(4096, 50257),
    Shape(512, 256000),
    Shape(65536, 1000),
    Shape(16384, 10),
)


class Case(NamedTuple):
    """One line of questions: every contender is timed on it, in turn."""

    shape: Shape
    dtype: Dtype
    mode: Mode
    labels: Labels

    @property
    def bytes(self) -> int:
        """The bytes an ideal program moves; `BYTES_MODEL` says it in words."""
        arrays = 2 if self.labels is Labels.DENSE else 1
        passes = arrays if self.mode is Mode.FORWARD else 2 * arrays + 1
        return passes * math.prod(self.shape) * jnp.dtype(self.dtype).itemsize


BYTES_MODEL = {
    Labels.INTEGER: "forward reads the logits once; value-and-grad reads them twice and writes "
    "the gradient once. Class numbers and losses are not counted.",
    Labels.DENSE: "forward reads logits and labels once; value-and-grad reads both twice and "
    "writes the gradient once. Losses are not counted.",
}


def parse_shape(text: str) -> Shape:
    """Read `4096x32000`.

    Raises:
        typer.BadParameter: the text is not two positive integers around an `x`.
    """
    tokens, _, classes = text.lower().partition("x")
    if not (tokens.isdecimal() and classes.isdecimal() and int(tokens) and int(classes)):
        raise typer.BadParameter(f"expected TOKENSxCLASSES such as 4096x32000; got {text!r}")
    return Shape(int(tokens), int(classes))


def inputs(shape: Shape, dtype: Dtype, labels: Labels, *, seed: int = 0) -> list[tuple[Any, Any]]:
    """Draw normal logits of scale 1 and random labels, as many copies as outgrow the caches.

    Returns:
        Pairs `(logits, labels)`: logits `[tokens, classes]` of `dtype`; labels `[tokens]` int32, or
        `[tokens, classes]` of `dtype` whose rows are distributions.
    """
    rng = np.random.default_rng(seed)
    size = math.prod(shape) * jnp.dtype(dtype).itemsize
    copies = min(MOST_COPIES, math.ceil(ROTATION_BYTES / size))

    def draw() -> tuple[jax.Array, jax.Array]:
        logits = jnp.asarray(rng.standard_normal(shape, np.float32), dtype)
        if labels is Labels.INTEGER:
            targets = jnp.asarray(rng.integers(shape.classes, size=shape.tokens), jnp.int32)
        else:
            weights = rng.random(shape, np.float32)
            weights /= weights.sum(axis=-1, keepdims=True)
            targets = jnp.asarray(weights, dtype)
        return logits, targets

    return jax.block_until_ready([draw() for _ in range(copies)])


def program(loss: Callable[..., jax.Array], mode: Mode) -> Callable[..., Any]:
    """Turn a contender's loss into what is timed.

    Args:
        loss: maps logits and labels to one loss a row.
        mode: `forward` keeps the losses; `value-and-grad` returns the mean loss and its gradient
            with respect to the logits.

    Returns:
        A function of logits and labels, all of whose results are to be computed.
    """
    if mode is Mode.FORWARD:
        return loss
    return jax.value_and_grad(lambda logits, labels: jnp.mean(loss(logits, labels)))
