# SPDX-License-Identifier: Apache-2.0
"""Softmax cross-entropy on logits: each loss, its rule below it."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from . import _checks
from ._numerics import (
    accumulation_dtype,
    excess,
    max_and_remainder,
    pick,
    put,
    shifted_exp,
    to_index,
    to_rows,
)


def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
) -> Float[Array, "..."]:
    r"""Cross-entropy `−log softmax(logits)[label]` of each example; a drop-in for optax's.

    Args:
      logits: unnormalized log-probabilities in any floating dtype.
      labels: integers in [0, C) of any integer dtype, with the shape of `logits` without
        `axis`. A label outside gives NaN in that example's loss and gradient.
      axis: the class axis. With a tuple of axes C is the product of their sizes and a label
        counts through them in the given order, the last one fastest.
      where: boolean. With the number of axes of `logits` (and a shape that broadcasts to it): the
        classes to include; the others have probability 0 and gradient exactly 0, a label among
        them has the loss +inf, and an example with none has the loss 0. With the shape of
        `labels`: the examples to include; the others have loss 0 and gradient 0.

    Returns:
      The losses, with the shape of `labels`: float32, or float64 for float64 logits. A row that
      holds +inf or NaN, or nothing but −inf, has a NaN loss and gradient.

    Raises:
      TypeError: logits not floating, labels not integers, or `where` not boolean.
      ValueError: shapes that do not match, an axis out of range, or no classes.

    Differentiable in `logits` in reverse mode, to any order; forward mode over reverse works.
    The gradient is `ŷ − y`, exact where `ŷ` is close to `y`: docs/derivation.md equation (27).

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> logits, label = jnp.array([30.0, 0.0, 0.0]), jnp.array(0)
      >>> loss = jaxsoftmax.softmax_cross_entropy_with_integer_labels
      >>> print(jax.grad(loss)(logits, label))
      [-1.8715246e-13  9.3576229e-14  9.3576229e-14]
    """
    name = "softmax_cross_entropy_with_integer_labels"
    logits = _checks.as_floating(name, "logits", logits)
    labels = _checks.as_labels(name, "labels", labels)
    if axis is None:
        raise TypeError(f"{name}: axis must be an integer or a tuple of integers; got None")
    axes = _checks.as_axes(name, axis, logits.ndim)
    _checks.check_has_classes(name, "logits", logits.shape, axes)
    batch = _batch_shape(logits.shape, axes)
    _checks.check_shape(
        name, "labels", labels.shape, batch, f"the shape of logits without axis {axis}"
    )
    where = _class_mask(name, where, logits.shape, axes)
    with jax.named_scope(f"jaxsoftmax.{name}"):
        (logits, where), axes = _one_axis(axes, logits, where)
        return _integer_labels(logits, labels, where, axes)


@partial(jax.jit, static_argnames="axes")
def _integer_labels(logits, labels, where, axes):
    if where is not None:
        logits = jnp.where(where, logits, -jnp.inf)
    rows = to_rows(logits, axes)
    losses = _negative_log_likelihood(rows, to_index(labels, rows.shape[-1]))
    return _zero_where_nothing(losses, where, axes)


@jax.custom_vjp
def _negative_log_likelihood(x: jax.Array, labels: jax.Array) -> jax.Array:
    return _negative_log_likelihood_fwd(x, labels)[0]


# nll_t = (m − z_t) + log1p(r)
def _negative_log_likelihood_fwd(x, labels):
    m, r = max_and_remainder(x)
    return (m - pick(x, labels)) + jnp.log1p(r), (x, labels, m, r)


# dz_i = g ŷ_i, but at the label g (ŷ_t − 1) = g ((e_t − 1) − r) / (1 + r), which does not cancel.
# A label that is no class makes the row NaN, unless its loss is not used.
def _negative_log_likelihood_bwd(residuals, g):
    x, labels, m, r = residuals
    scale = jnp.where((labels >= 0) | (g == 0), g, jnp.nan) / (1 + r)
    e_label = jnp.where(labels >= 0, jnp.exp(pick(x, labels) - m), 0)
    at_label = ((e_label - 1) - r) * scale
    others = shifted_exp(x, m) * scale[..., None]
    return put(others.astype(x.dtype), labels, at_label.astype(x.dtype)), None


_negative_log_likelihood.defvjp(_negative_log_likelihood_fwd, _negative_log_likelihood_bwd)


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None,
) -> Float[Array, "..."]:
    r"""Cross-entropy `−Σ_k y_k log softmax(logits)_k` of each example; a drop-in for optax's.

    Args:
      logits: unnormalized log-probabilities in any floating dtype.
      labels: target weights `y` that broadcast to the shape of `logits`, floating, integer or
        boolean. They need not sum to 1: the gradient is `Y ŷ − y` with `Y = Σ_k y_k`. A label
        of 0 at a logit of −inf counts as 0.
      axis: the class axis, a tuple of class axes, or None for all axes.
      where: boolean. With the number of axes of `logits` (and a shape that broadcasts to it): the
        classes to include; logits and labels of the others do not count. With the shape of
        `logits` without `axis`: the examples to include. The loss of an example with nothing
        included is 0, its gradient 0.

    Returns:
      The losses, with the shape of `logits` without `axis`: float32, or float64 where logits
      or labels are float64. A row that holds +inf or NaN, or nothing but −inf, has a NaN loss
      and gradient.

    Raises:
      TypeError: logits not floating, labels not real, or `where` not boolean.
      ValueError: shapes that do not match, an axis out of range, or no classes.

    Differentiable in `logits` and in floating `labels` (`lse − z_k`) in reverse mode, to any
    order; forward mode over reverse works. docs/derivation.md equations (16) and (27).

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> logits, labels = jnp.array([30.0, 0.0, 0.0]), jnp.array([1.0, 0.0, 0.0])
      >>> print(jax.grad(jaxsoftmax.softmax_cross_entropy)(logits, labels))
      [-1.8715246e-13  9.3576229e-14  9.3576229e-14]
    """
    name = "softmax_cross_entropy"
    logits = _checks.as_floating(name, "logits", logits)
    labels = _checks.as_inexact(name, "labels", labels)
    axes = _checks.as_axes(name, axis, logits.ndim)
    _checks.check_has_classes(name, "logits", logits.shape, axes)
    _checks.check_broadcasts(name, "labels", labels.shape, logits.shape, "the shape of logits")
    where = _class_mask(name, where, logits.shape, axes)
    with jax.named_scope(f"jaxsoftmax.{name}"):
        labels = jnp.broadcast_to(labels, logits.shape)
        (logits, labels, where), axes = _one_axis(axes, logits, labels, where)
        return _dense_labels(logits, labels, where, axes)


@partial(jax.jit, static_argnames="axes")
def _dense_labels(logits, labels, where, axes):
    if where is not None:
        logits = jnp.where(where, logits, -jnp.inf)
        labels = jnp.where(where, labels, 0)
    losses = _cross_entropy(to_rows(logits, axes), to_rows(labels, axes))
    return _zero_where_nothing(losses, where, axes)


@jax.custom_vjp
def _cross_entropy(x: jax.Array, y: jax.Array) -> jax.Array:
    return _cross_entropy_fwd(x, y)[0]


# loss = Σ_k y_k (m − z_k) + Y log1p(r)
def _cross_entropy_fwd(x, y):
    dtype = accumulation_dtype(x.dtype, y.dtype)
    m, r = (s.astype(dtype) for s in max_and_remainder(x))
    gap = m[..., None] - x.astype(dtype)
    y_ = y.astype(dtype)
    # A gap of ∞ is a logit of −inf, where 0 · ∞ counts as 0; a NaN gap stays NaN.
    cost = jnp.where((y_ == 0) & (gap == jnp.inf), 0, y_ * gap)
    total = jnp.sum(y_, axis=-1)
    return jnp.sum(cost, axis=-1) + total * jnp.log1p(r), (x, y, m, r)


# dz_i = g (Y ŷ_i − y_i) ;  dy_i = g (lse − z_i) = g ((m − z_i) + log1p(r))
def _cross_entropy_bwd(residuals, g):
    x, y, m, r = residuals
    y_ = y.astype(m.dtype)
    z = x.astype(m.dtype)
    d = excess(jnp.sum(y_, axis=-1), y_, shifted_exp(z, m), r)
    dy = g[..., None] * ((m[..., None] - z) + jnp.log1p(r)[..., None])
    return (g[..., None] * d).astype(x.dtype), dy.astype(y.dtype)


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def _batch_shape(shape, axes):
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def _one_axis(axes: tuple[int, ...], *arrays: Any) -> tuple[Sequence[Any], tuple[int, ...]]:
    """Several class axes merged into one, before jit.

    So a row's sums are taken in the same order, and come out the same, wherever its axes were.
    """
    if len(axes) == 1:
        return arrays, axes
    batch_ndim = arrays[0].ndim - len(axes)
    return [None if a is None else to_rows(a, axes) for a in arrays], (batch_ndim,)


def _class_mask(function, where, shape, axes):
    """`where` in either of optax's two meanings, as a mask of the logits' shape."""
    if where is None:
        return None
    where = _checks.as_mask(function, "where", where)
    if where.ndim != len(shape):
        _checks.check_shape(
            function,
            "where",
            where.shape,
            _batch_shape(shape, axes),
            f"one value per example, or have the {len(shape)} axes of logits",
        )
        where = jnp.expand_dims(where, axes)
    _checks.check_broadcasts(function, "where", where.shape, shape, "the shape of logits")
    return jnp.broadcast_to(where, shape)


def _zero_where_nothing(losses, where, axes):
    return losses if where is None else jnp.where(jnp.any(where, axis=axes), losses, 0)
