# SPDX-License-Identifier: Apache-2.0
"""Arguments as rows: the class axes as one last axis, and back; labels as indices into it."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from . import _checks
from ._sharding import AxisName, merge_last, split_last, sum_over


def to_rows(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Moves `axes` to the end, in the given order, and merges them; no axes are one class."""
    if not axes:
        return x[..., None]
    x = _moved(x, axes)
    return x if len(axes) == 1 else merge_last(x, len(axes))


def from_rows(rows: jax.Array, axes: Sequence[int], x: jax.Array) -> jax.Array:
    """Undoes `to_rows`: rows of an array with the shape of `x` as such an array."""
    if not axes:
        return rows[..., 0]
    if len(axes) != 1:
        rows = split_last(rows, _moved(x, axes))
    return jnp.moveaxis(rows, range(x.ndim - len(axes), x.ndim), axes)


def _moved(x, axes):
    return jnp.moveaxis(x, axes, range(x.ndim - len(axes), x.ndim))


# What stands for a label that is no class: out of range (the loss is NaN), or ignored (it is 0).
OUT_OF_RANGE, IGNORED = -1, -2


def to_index(labels: jax.Array, classes: int) -> jax.Array:
    """Labels of any integer dtype as int32; OUT_OF_RANGE for a label outside [0, classes)."""
    last = min(jnp.iinfo(jnp.int32).max, jnp.iinfo(labels.dtype).max)
    fits = (labels >= 0) & (labels <= last)
    index = jnp.where(fits, labels, 0).astype(jnp.int32)
    return jnp.where(fits & (index < classes), index, OUT_OF_RANGE)


def per_label(number: Any, labels: jax.Array) -> Any:
    """A number, or one per row `[...]`, beside one label per row or several, `[..., K]`."""
    return number[..., None] if 0 < jnp.ndim(number) < labels.ndim else number


def labels_in_block(labels: jax.Array, start: Any, size: int) -> jax.Array:
    """Labels as indices into the block of `size` classes from `start`; −1 for those of others."""
    shifted = labels - per_label(start, labels)
    return jnp.where((labels >= 0) & (shifted >= 0) & (shifted < size), shifted, -1)


def broadcast_mask(
    function: str, where: ArrayLike | None, shape: Sequence[int], meaning: str
) -> jax.Array | None:
    """`where` as a boolean mask of `shape`, which `meaning` explains; None stays None."""
    if where is None:
        return None
    where = _checks.as_mask(function, "where", where)
    _checks.check_broadcasts(function, "where", where.shape, shape, meaning)
    return jnp.broadcast_to(where, shape)


def masked(
    x: jax.Array, where: jax.Array, axes: Sequence[int], axis_name: AxisName | None = None
) -> tuple[jax.Array, jax.Array]:
    """`x` with −inf outside `where`, and which rows have any class included.

    A row without any becomes zeros, so that everything computed from it is finite until discarded.
    """
    included = jnp.any(where, axis=axes)
    if axis_name is not None:
        included = sum_over(axis_name, included.astype(jnp.int32)) > 0
    if not np.isinf(np.asarray(-np.inf).astype(x.dtype).astype(np.float32)):
        x = x.astype(jnp.bfloat16)  # exact: some formats of 8 bits and fewer have no infinity
    outside = jnp.where(included, -jnp.inf, 0).astype(x.dtype)
    return jnp.where(where, x, jnp.expand_dims(outside, axes)), included
