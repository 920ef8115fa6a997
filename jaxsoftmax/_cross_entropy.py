# SPDX-License-Identifier: Apache-2.0
"""Softmax cross-entropy on logits: each loss, its rule below it."""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from . import _checks
from ._numerics import (
    accumulation_dtype,
    excess,
    log_sum_exp,
    max_and_remainder,
    pick,
    put,
    shifted_exp,
    to_index,
    to_rows,
    upcast,
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
    logits, labels, axes = _logits_and_labels(name, logits, labels, axis)
    where = _class_mask(name, where, logits.shape, axes)
    with jax.named_scope(f"jaxsoftmax.{name}"):
        (logits, where), axes = _one_axis(axes, logits, where)
        return _integer_labels(logits, labels, where, axes)


@partial(jax.jit, static_argnames="axes")
def _integer_labels(logits, labels, where, axes):
    if where is not None:
        logits = jnp.where(where, logits, -jnp.inf)
    rows = to_rows(logits, axes)
    losses = token_statistics(rows, to_index(labels, rows.shape[-1]), (None, None)).nll
    return _zero_where_nothing(losses, where, axes)


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


class LogProbs(NamedTuple):
    """What `label_log_probs` and `linear_log_probs` return, each with the shape of the labels.

    Attributes:
      log_probs: log-probability of each label.
      log_normalizers: log-sum-exp of each row of logits.
      entropies: entropy of each row's distribution, in nats; None unless asked for.
    """

    log_probs: Float[Array, "..."]
    log_normalizers: Float[Array, "..."]
    entropies: Float[Array, "..."] | None


def label_log_probs(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | Sequence[int] = -1,
    *,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    with_entropy: bool = False,
) -> LogProbs:
    r"""Log-probability of each label, log-normalizer and entropy of each row of logits.

    Args:
      logits: unnormalized log-probabilities in any floating dtype.
      labels: integers in [0, C) with the shape of `logits` without `axis`. A label outside gives
        NaN in that log-probability and its gradient.
      axis: the class axis, or a tuple of class axes (see the cross-entropy).
      soft_cap: replaces the logits by `soft_cap · tanh(logits / soft_cap)`; positive.
      temperature: divides the (capped) logits; positive. The results are those of the divided
        logits.
      with_entropy: also compute the entropies.

    Returns:
      `LogProbs` in float32, or float64 for float64 logits.

    Raises:
      TypeError: logits not floating, labels not integers, an option that is not a real scalar.
      ValueError: shapes that do not match, an axis out of range, no classes, or an option that
        is not positive.

    Every field is differentiable in `logits`, `soft_cap` and `temperature`, with any cotangents,
    in reverse mode to any order; forward mode over reverse works. docs/derivation.md equations
    (27) and (33).

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> out = jaxsoftmax.label_log_probs(jnp.zeros((1, 4)), jnp.array([2]), with_entropy=True)
      >>> print(out.log_probs, out.log_normalizers, out.entropies)
      [-1.3862944] [1.3862944] [1.3862944]
    """
    name = "label_log_probs"
    logits, labels, axes = _logits_and_labels(name, logits, labels, axis)
    scalars = transform_scalars(name, soft_cap, temperature)
    with jax.named_scope(f"jaxsoftmax.{name}"):
        (logits,), axes = _one_axis(axes, logits)
        return _label_log_probs(logits, labels, scalars, axes, bool(with_entropy))


@partial(jax.jit, static_argnames=("axes", "with_entropy"))
def _label_log_probs(logits, labels, scalars, axes, with_entropy):
    rows = to_rows(logits, axes)
    out = token_statistics(rows, to_index(labels, rows.shape[-1]), scalars)
    return as_log_probs(out, with_entropy)


class Statistics(NamedTuple):
    """The per-token numbers every loss and log-probability is made of."""

    nll: jax.Array
    lse: jax.Array
    entropy: jax.Array


class Rows(NamedTuple):
    """What the derivative needs of each row; the mean gap Σ_k ŷ_k (m − z_k) for entropies only."""

    m: jax.Array
    r: jax.Array
    mean_gap: jax.Array | None


def as_log_probs(statistics: Statistics, with_entropy: bool) -> LogProbs:
    """The public face of `Statistics`."""
    entropies = statistics.entropy if with_entropy else None
    return LogProbs(-statistics.nll, statistics.lse, entropies)


Scalars = tuple[jax.Array | None, jax.Array | None]


def transform_scalars(function: str, soft_cap: ArrayLike | None, temperature: ArrayLike) -> Scalars:
    """(soft_cap, temperature) as scalars; None stands for no transform at all."""
    if soft_cap is not None:
        soft_cap = _checks.as_positive(function, "soft_cap", soft_cap)
    if isinstance(temperature, (int, float)) and temperature == 1:
        return soft_cap, None
    return soft_cap, _checks.as_positive(function, "temperature", temperature)


def transformed(x: jax.Array, scalars: Scalars) -> jax.Array:
    """Logits z = soft_cap · tanh(x / soft_cap) / temperature; without either, `x` as it came."""
    soft_cap, temperature = scalars
    if soft_cap is not None:
        x = upcast(x)
        cap = soft_cap.astype(x.dtype)
        x = cap * jnp.tanh(x / cap)
    if temperature is not None:
        x = upcast(x)
        x = x / temperature.astype(x.dtype)
    return x


# The one rule of everything with integer labels. Nothing unused is computed: jit drops outputs
# that are not read, and a cotangent that is symbolically zero adds no term.
@jax.custom_vjp
def token_statistics(x: jax.Array, labels: jax.Array, scalars: Scalars) -> Statistics:
    """Statistics of the rows of raw logits `x [..., C]`; labels come from `to_index`."""
    return _statistics(x, labels, scalars)[0]


# nll = (m − z_t) + log1p(r) ;  entropy = log1p(r) + μ  with the mean gap μ = Σ_k ŷ_k (m − z_k)
def _statistics(x, labels, scalars):
    z = transformed(x, scalars)
    m, r = max_and_remainder(z)
    mean_gap = gap_sum(z, m) / (1 + r)
    nll = (m - pick(z, labels)) + jnp.log1p(r)
    return Statistics(nll, log_sum_exp(m, r), jnp.log1p(r) + mean_gap), m, r


def _statistics_fwd(x, labels, scalars):
    x, labels, scalars = jax.tree.map(lambda p: p.value, (x, labels, scalars), is_leaf=_is_primal)
    out, m, r = _statistics(x, labels, scalars)
    return out, (x, labels, scalars, m, r)


def _statistics_bwd(residuals, cotangents):
    x, labels, scalars, m, r = residuals
    z, pull = jax.vjp(transformed, x, scalars)
    g = live_cotangents(cotangents, labels)
    mean_gap = None if g.entropy is None else gap_sum(z, m) / (1 + r)
    dz = logit_cotangents(z, labels, Rows(m, r, mean_gap), g)
    dx, dscalars = pull(dz.astype(z.dtype))
    return dx, None, dscalars


token_statistics.defvjp(_statistics_fwd, _statistics_bwd, symbolic_zeros=True)


def live_cotangents(cotangents: Statistics, labels: jax.Array) -> Statistics:
    """Cotangents with None for a symbolic zero, and NaN where a used label is no class."""
    g = Statistics(*(None if isinstance(c, SymbolicZero) else c for c in cotangents))
    if g.nll is None:
        return g
    return g._replace(nll=jnp.where((labels >= 0) | (g.nll == 0), g.nll, jnp.nan))


def _is_primal(leaf):
    return hasattr(leaf, "perturbed")


def gap_sum(z: jax.Array, m: jax.Array) -> jax.Array:
    """Σ_k e_k (m − z_k) of each row; a logit of −inf gives 0."""
    e = shifted_exp(z, m)
    return jnp.sum(jnp.where(e == 0, 0, e * (m[..., None] - upcast(z))), axis=-1)


# dz_i = g_nll (ŷ_i − y_i) + g_lse ŷ_i + g_entropy ŷ_i ((m − z_i) − μ). At the label the first term
# is g_nll ((e_t − 1) − r) / (1 + r), which does not cancel.
def logit_cotangents(z: jax.Array, labels: jax.Array, rows: Rows, g: Statistics) -> jax.Array:
    """The rows' cotangents in `z`, in its dtype; labels of −1 are in another block, or nowhere."""
    m, r, mean_gap = rows
    zero = jnp.zeros_like(m)
    g_nll = zero if g.nll is None else g.nll
    g_lse = zero if g.lse is None else g.lse

    def of_probability(z_i, m, mean_gap, g_lse, g_entropy):
        """What ŷ_i is multiplied by, the nll apart."""
        if g_entropy is None:
            return g_lse
        gap = m - z_i
        return g_lse + g_entropy * (jnp.where(gap == jnp.inf, 0, gap) - mean_gap)

    scale = 1 / (1 + r)
    e = shifted_exp(z, m)
    if g.entropy is None:
        others = e * ((g_nll + g_lse) * scale)[..., None]
    else:
        rest = of_probability(
            upcast(z), m[..., None], mean_gap[..., None], g_lse[..., None], g.entropy[..., None]
        )
        others = e * scale[..., None] * (g_nll[..., None] + rest)
    if g.nll is None:
        return others.astype(z.dtype)
    z_label = jnp.where(labels < 0, m, pick(z, labels))
    e_label = jnp.exp(z_label - m)
    rest = of_probability(z_label, m, mean_gap, g_lse, g.entropy)
    at_label = (g_nll * ((e_label - 1) - r) + e_label * rest) * scale
    return put(others.astype(z.dtype), labels, at_label.astype(z.dtype))


def _logits_and_labels(name, logits, labels, axis):
    logits = _checks.as_floating(name, "logits", logits)
    labels = _checks.as_labels(name, "labels", labels)
    if axis is None:
        raise TypeError(f"{name}: axis must be an integer or a tuple of integers; got None")
    axes = _checks.as_axes(name, axis, logits.ndim)
    _checks.check_has_classes(name, "logits", logits.shape, axes)
    meaning = f"the shape of logits without axis {axis}"
    _checks.check_shape(name, "labels", labels.shape, _batch_shape(logits.shape, axes), meaning)
    return logits, labels, axes


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
