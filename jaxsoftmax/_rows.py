# SPDX-License-Identifier: Apache-2.0
"""Arguments as rows: the class axes as the last one, and back; labels as numbers in it."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp


def to_rows(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Moves `axes` to the end, in the given order, and merges them into one."""
    x = jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))
    batch = x.shape[: x.ndim - len(axes)]
    return x if len(axes) == 1 else x.reshape(*batch, math.prod(x.shape[len(batch) :]))


def from_rows(rows: jax.Array, axes: Sequence[int], shape: Sequence[int]) -> jax.Array:
    """Undoes `to_rows` for an array of the given `shape`."""
    ndim = len(shape)
    rows = rows.reshape(*rows.shape[:-1], *(shape[a] for a in axes)) if len(axes) != 1 else rows
    return jnp.moveaxis(rows, range(ndim - len(axes), ndim), axes)


def to_index(labels: jax.Array, classes: int) -> jax.Array:
    """Labels of any integer dtype as int32, with −1 for every label outside [0, C)."""
    last = min(classes - 1, jnp.iinfo(labels.dtype).max)
    valid = (labels >= 0) & (labels <= last)
    return jnp.where(valid, jnp.where(valid, labels, 0).astype(jnp.int32), -1)
