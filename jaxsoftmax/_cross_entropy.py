# SPDX-License-Identifier: Apache-2.0
"""Losses and log-probabilities on logits: each function, with what it compiles below it.

`_statistics` has the rules of their derivatives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from . import _checks
from ._axes import broadcast_mask, masked, to_index, to_rows
from ._numerics import accumulation_dtype, broadcast_to
from ._options import (
    as_options,
    ignored_tokens,
    label_index,
    label_weights,
    required_statistics,
    target_losses,
    token_losses,
)
from ._rules import ON_LOGITS, in_forward_mode, scope
from ._sharding import AxisName, in_one_sharding, shard_count, whole_last
from ._statistics import Statistics, StatisticsSpec, target_statistics, token_statistics
from ._transform import as_transform


def softmax_cross_entropy_with_integer_labels(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | Sequence[int] = -1,
    where: ArrayLike | None = None,
    *,
    ignore_index: int | None = None,
    class_weights: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""Cross-entropy `−log softmax(logits)[label]` of each example; a drop-in for optax's.

    Args:
      logits: unnormalized log-probabilities in any floating dtype.
      labels: integers in [0, C) of any integer dtype, with the shape of `logits` without
        `axis`. A label out of range makes that example's loss and gradient NaN.
      axis: the class axis, or a tuple of class axes: C is then the product of their sizes, and
        labels number the classes in the given order of the axes, the last one fastest.
      where: boolean. With as many axes as `logits` (and a shape that broadcasts to theirs): the
        classes to include. The others have probability 0 and gradient exactly 0; an example whose
        label is excluded has the loss +inf, one with no class left the loss 0. With the shape of
        `labels`: the examples to include; the others have loss 0 and gradient 0.
      ignore_index: a Python integer: examples with this label have loss 0 and gradient exactly 0.
      class_weights: `[C]`, the factor of the loss of each class; with `label_smoothing` also of
        each class's share of the smoothing, as in `torch.nn.functional.cross_entropy`.
      label_smoothing: ε in [0, 1]: the target becomes `(1 − ε)·y + ε/C`, over the C classes that
        are neither masked nor at −inf.
      z_loss: λ ≥ 0: adds `λ·lse²`, with lse the log-sum-exp of the example.
      soft_cap: replaces the logits by `soft_cap · tanh(logits / soft_cap)`; positive.
      temperature: divides the (capped) logits; positive.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) that shards the classes: `logits`,
        `class_weights` and a class mask `where` are this device's part, in the order of the
        devices; labels are global class numbers.

    Returns:
      The losses, with the shape of `labels`, in float32, or float64 for float64 logits. A row that
      holds +inf or NaN, or nothing but −inf, has a NaN loss and gradient.

    Raises:
      TypeError: logits not floating, labels not integers, `where` not boolean, or an option of
        the wrong type.
      ValueError: shapes that do not match, an axis out of range, no classes, or an option out of
        its range (if its value is known: all options but `ignore_index` may be traced).

    Differentiable in `logits` and in every option but `ignore_index`, in reverse mode, to any
    order; forward mode over reverse works. The gradient is `ŷ − y`, accurate even where `ŷ` is
    close to `y`: docs/derivation.md equation (27).

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> logits, label = jnp.array([30.0, 0.0, 0.0]), jnp.array(0)
      >>> loss = jaxsoftmax.softmax_cross_entropy_with_integer_labels
      >>> print(jax.grad(loss)(logits, label))
      [-1.8715246e-13  9.3576229e-14  9.3576229e-14]
    """
    name = "softmax_cross_entropy_with_integer_labels"
    logits, labels, axes = _logits_and_labels(name, logits, labels, axis)
    axis_name = _checks.as_axis_name(name, axis_name)
    _checks.check_sharded_classes(name, axis_name, {"logits": logits})
    _checks.check_whole_classes(name, axis_name, {"labels": labels})
    where = _class_mask(name, where, logits.shape, axes, axis_name)
    ignore_index = _checks.as_ignore_index(name, ignore_index)
    options = as_options(
        name,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        soft_cap=soft_cap,
        temperature=temperature,
        class_weights=class_weights,
        axis_name=axis_name,
        classes=math.prod(logits.shape[a] for a in axes),
    )
    with scope(name, ON_LOGITS):
        (logits, where), axes = _one_axis(axes, logits, where)
        spec = required_statistics(options)
        return _integer_labels(
            in_forward_mode(), spec, axis_name, axes, ignore_index, logits, labels, where, options
        )


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))
def _integer_labels(  # noqa: PLR0917
    forward_mode, spec, axis_name, axes, ignore_index, logits, labels, where, options
):
    logits, labels, where = in_one_sharding(logits, jnp.expand_dims(labels, axes), where)
    labels, included = jnp.squeeze(labels, axes), None
    if where is not None:
        logits, included = masked(logits, where, axes, axis_name)
        labels = jnp.where(included, labels, 0)
    rows = to_rows(logits, axes)
    index = label_index(labels, rows.shape[-1] * shard_count(axis_name), ignore_index)
    ignored = ignored_tokens(labels, ignore_index)
    if ignored is not None and forward_mode:
        # The tangent map is linear and cannot tell that a token is ignored: 0 · NaN would be NaN.
        rows = jnp.where(ignored[..., None], 0, rows)
    weights = options.class_weights
    summed = token_statistics(spec, axis_name).for_mode(forward_mode)
    statistics = summed(rows, index, options.transform, weights if spec.spread else None)
    if weights is not None:
        weights = label_weights(labels, ignore_index, weights, axis_name)
    return token_losses(forward_mode, statistics, labels, weights, ignore_index, options, included)


def softmax_cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | Sequence[int] | None = -1,
    where: ArrayLike | None = None,
    *,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""Cross-entropy `−Σ_k y_k log softmax(logits)_k` of each example; a drop-in for optax's.

    Args:
      logits: unnormalized log-probabilities in any floating dtype.
      labels: target weights `y` that broadcast to the shape of `logits`, floating, integer or
        boolean. They need not sum to 1: the gradient is `Y ŷ − y` with `Y = Σ_k y_k`. A label
        of 0 at a logit of −inf adds 0 to the loss.
      axis: the class axis, a tuple of class axes, or None for all axes.
      where: boolean. With as many axes as `logits` (and a shape that broadcasts to theirs): the
        classes to include; logits and labels of the others are ignored. With the shape of `logits`
        without `axis`: the examples to include. An example with nothing included, or with no
        classes at all, has loss 0 and gradient 0.
      label_smoothing: ε in [0, 1]: the target becomes `(1 − ε)·y + ε/C`, over the C classes that
        are neither masked nor at −inf.
      z_loss: λ ≥ 0: adds `λ·lse²`, with lse the log-sum-exp of the example.
      soft_cap: replaces the logits by `soft_cap · tanh(logits / soft_cap)`; positive.
      temperature: divides the (capped) logits; positive.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) that shards the classes: `logits`,
        `labels` and a class mask `where` are this device's part, in the order of the devices.

    Returns:
      The losses, with the shape of `logits` without `axis`, in float32, or float64 where logits
      or labels are float64. A row that holds +inf or NaN, or nothing but −inf, has a NaN loss
      and gradient.

    Raises:
      TypeError: logits not floating, labels not real, `where` not boolean, or an option of the
        wrong type.
      ValueError: shapes that do not match, an axis out of range, or an option out of its range
        (if its value is known: options may be traced).

    Differentiable in `logits`, in floating `labels` (`lse − z_k`) and in the options, in reverse
    mode, to any order; forward mode over reverse works. docs/derivation.md equations (26), (27).

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
    axis_name = _checks.as_axis_name(name, axis_name)
    _checks.check_sharded_classes(name, axis_name, {"logits": logits, "labels": labels})
    _checks.check_broadcasts(name, "labels", labels.shape, logits.shape, "the shape of logits")
    where = _class_mask(name, where, logits.shape, axes, axis_name)
    options = as_options(
        name,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        soft_cap=soft_cap,
        temperature=temperature,
    )
    with scope(name, ON_LOGITS):
        labels = broadcast_to(labels, logits.shape)
        (logits, labels, where), axes = _one_axis(axes, logits, labels, where)
        return _dense_labels(in_forward_mode(), axis_name, axes, logits, labels, where, options)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _dense_labels(  # noqa: PLR0917
    forward_mode, axis_name, axes, logits, labels, where, options
):
    (logits, labels, where), included = in_one_sharding(logits, labels, where), None
    if where is not None:
        logits, included = masked(logits, where, axes, axis_name)
        labels = jnp.where(where, labels, 0)
    rows, targets = to_rows(logits, axes), to_rows(labels, axes)
    if rows.shape[-1] == 0:
        return jnp.zeros(rows.shape[:-1], accumulation_dtype(rows.dtype, targets.dtype))
    summed = target_statistics(required_statistics(options), axis_name).for_mode(forward_mode)
    statistics = summed(rows, targets, options.transform)
    return target_losses(forward_mode, statistics, options, included)


class LogProbs(NamedTuple):
    """What `label_log_probs` and `linear_log_probs` return.

    Attributes:
      log_probs: log-probability of each label, in the shape of the labels.
      log_normalizers: log-sum-exp of each row of logits.
      entropies: entropy of each row's distribution, in nats; None unless asked for.
      predictions: the most likely class of each row as int32; None unless asked for. Of equal
        logits the first class, as `jnp.argmax`; −1 in a row with NaN.
    """

    log_probs: Float[Array, "..."]
    log_normalizers: Float[Array, "..."]
    entropies: Float[Array, "..."] | None
    predictions: Int[Array, "..."] | None = None


def label_log_probs(
    logits: ArrayLike,
    labels: ArrayLike,
    axis: int | Sequence[int] = -1,
    *,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    with_entropy: bool = False,
    with_predictions: bool = False,
    axis_name: AxisName | None = None,
) -> LogProbs:
    r"""Log-probability of each label, log-normalizer and entropy of each row of logits.

    Args:
      logits: unnormalized log-probabilities in any floating dtype.
      labels: integers in [0, C) with the shape of `logits` without `axis`, or with one more axis at
        the end: K labels for each row. A label out of range makes that log-probability and its
        row's gradient NaN.
      axis: the class axis, or a tuple of class axes (see the cross-entropy).
      soft_cap: replaces the logits by `soft_cap · tanh(logits / soft_cap)`; positive.
      temperature: divides the (capped) logits; positive. The results are those of the divided
        logits.
      with_entropy: also compute the entropies.
      with_predictions: also find the most likely class of each row.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) that shards the classes (see the
        cross-entropy).

    Returns:
      `LogProbs` in float32, or float64 for float64 logits.

    Raises:
      TypeError: logits not floating, labels not integers, an option that is not a real scalar.
      ValueError: shapes that do not match, an axis out of range, no classes, or an option that
        is not positive.

    Every field is differentiable in `logits`, `soft_cap` and `temperature` (predictions are
    integers), with any cotangents, in reverse mode to any order; forward mode over reverse works.
    docs/derivation.md equation (27); docs/forms.md equations (33) and (66).

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> out = jaxsoftmax.label_log_probs(jnp.zeros((1, 4)), jnp.array([2]), with_entropy=True)
      >>> print(out.log_probs, out.log_normalizers, out.entropies)
      [-1.3862944] [1.3862944] [1.3862944]
    """
    name = "label_log_probs"
    logits, labels, axes = _logits_and_labels(name, logits, labels, axis, several=True)
    axis_name = _checks.as_axis_name(name, axis_name)
    _checks.check_sharded_classes(name, axis_name, {"logits": logits})
    _checks.check_whole_classes(name, axis_name, {"labels": labels})
    transform = as_transform(name, soft_cap, temperature)
    spec = of_log_probs(name, with_entropy, with_predictions)
    with scope(name, ON_LOGITS):
        (logits,), axes = _one_axis(axes, logits)
        return _label_log_probs(in_forward_mode(), spec, axis_name, axes, logits, labels, transform)


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _label_log_probs(  # noqa: PLR0917
    forward_mode, spec, axis_name, axes, logits, labels, transform
):
    if labels.ndim == logits.ndim:  # K for each row
        labels = jnp.expand_dims(whole_last(labels), axes)
        logits, labels = in_one_sharding(logits[..., None], labels)
        logits = logits[..., 0]
    else:
        logits, labels = in_one_sharding(logits, jnp.expand_dims(labels, axes))
    labels = jnp.squeeze(labels, axes)
    rows = to_rows(logits, axes)
    index = to_index(labels, rows.shape[-1] * shard_count(axis_name))
    summed = token_statistics(spec, axis_name).for_mode(forward_mode)
    return as_log_probs(summed(rows, index, transform, None))


def as_log_probs(statistics: Statistics) -> LogProbs:
    """`Statistics` as the public `LogProbs`."""
    loss, lse, entropy, _, prediction = statistics
    return LogProbs(-loss, lse, entropy, prediction)


def of_log_probs(function: str, with_entropy: bool, with_predictions: bool) -> StatisticsSpec:
    """The statistics of a `LogProbs` with these fields."""
    entropy = _checks.as_flag(function, "with_entropy", with_entropy)
    prediction = _checks.as_flag(function, "with_predictions", with_predictions)
    return StatisticsSpec(lse=True, entropy=entropy, prediction=prediction)


def _logits_and_labels(name, logits, labels, axis, *, several=False):
    logits = _checks.as_floating(name, "logits", logits)
    labels = _checks.as_labels(name, "labels", labels)
    axes = _checks.as_axes(name, axis, logits.ndim, _checks.SOME_AXES)
    _checks.check_has_classes(name, "logits", logits.shape, axes)
    _checks.check_labels_fit(name, logits.shape, axes)
    meaning = f"the shape of logits without axis {axis}"
    batch = _batch_shape(logits.shape, axes)
    _checks.check_label_shape(name, labels.shape, batch, meaning, several=several)
    return logits, labels, axes


def _batch_shape(shape, axes):
    return tuple(size for axis, size in enumerate(shape) if axis not in axes)


def _one_axis(axes: tuple[int, ...], *arrays: Any) -> tuple[Sequence[Any], tuple[int, ...]]:
    """Merges several class axes into one, before jit.

    A row's sums are then taken in the same order, with the same result, wherever its axes were.
    """
    if len(axes) == 1:
        return arrays, axes
    batch_ndim = arrays[0].ndim - len(axes)
    return [None if a is None else to_rows(a, axes) for a in arrays], (batch_ndim,)


def _class_mask(function, where, shape, axes, axis_name):
    """`where` in either of optax's two meanings, as a mask of the logits' shape."""
    if where is None:
        return None
    where = _checks.as_mask(function, "where", where)
    if where.ndim == len(shape):
        _checks.check_sharded_classes(function, axis_name, {"where": where})
    else:
        meaning = f"one value per example, or have the {len(shape)} axes of logits"
        batch = _batch_shape(shape, axes)
        _checks.check_shape(function, "where", where.shape, batch, meaning)
        _checks.check_whole_classes(function, axis_name, {"where": where})
        where = jnp.expand_dims(where, axes)
    return broadcast_mask(function, where, shape, "the shape of logits")
