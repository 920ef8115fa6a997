# SPDX-License-Identifier: Apache-2.0
"""The options of the losses: plain arithmetic on one number a token, around the one rule."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from . import _checks
from ._numerics import to_index
from ._statistics import Statistics, Transform, as_transform


class Options(NamedTuple):
    """Checked options; None where an option is off."""

    transform: Transform
    label_smoothing: jax.Array | None
    z_loss: jax.Array | None
    class_weights: jax.Array | None = None


def as_options(
    function: str,
    *,
    label_smoothing: ArrayLike,
    z_loss: ArrayLike,
    soft_cap: ArrayLike | None,
    temperature: ArrayLike,
    class_weights: ArrayLike | None = None,
    classes: int = 0,
) -> Options:
    """Check what is the same for every loss."""
    if class_weights is not None:
        class_weights = _checks.as_inexact(function, "class_weights", class_weights)
        meaning = "one weight a class"
        _checks.check_shape(function, "class_weights", class_weights.shape, (classes,), meaning)
    return Options(
        as_transform(function, soft_cap, temperature),
        _unless_zero(function, "label_smoothing", label_smoothing, 1.0),
        _unless_zero(function, "z_loss", z_loss, float("inf")),
        class_weights,
    )


def _unless_zero(function, name, value, most):
    if isinstance(value, (int, float)) and value == 0 and value is not False:
        return None
    return _checks.as_fraction(function, name, value, most)


def ignored_tokens(labels: jax.Array, ignore_index: int | None) -> jax.Array | None:
    """Which tokens are ignored; None where none can be."""
    limits = jnp.iinfo(labels.dtype)
    if ignore_index is None or not limits.min <= ignore_index <= limits.max:
        return None
    return labels == jnp.asarray(ignore_index, labels.dtype)


def label_weights(
    labels: jax.Array, ignore_index: int | None, class_weights: jax.Array | None
) -> jax.Array | None:
    """What each token counts in a mean: its class's weight, 0 if ignored; None for 1 each."""
    ignored = ignored_tokens(labels, ignore_index)
    if class_weights is None:
        return None if ignored is None else (~ignored).astype(jnp.float32)
    weights = _taken(class_weights, labels)
    return weights if ignored is None else jnp.where(ignored, 0, weights)


def token_losses(
    statistics: Statistics, labels: jax.Array, ignore_index: int | None, options: Options
) -> jax.Array:
    """Losses of tokens with integer labels: exactly 0, with gradient 0, where ignored."""
    ignored = ignored_tokens(labels, ignore_index)
    if ignored is not None:
        statistics = Statistics(*(jnp.where(ignored, 0, s) for s in statistics))
    loss = statistics.loss
    if options.class_weights is not None:
        weights: Any = label_weights(labels, ignore_index, options.class_weights)
        loss = loss * weights.astype(loss.dtype)
    return target_losses(statistics._replace(loss=loss), options)


def target_losses(statistics: Statistics, options: Options) -> jax.Array:
    """(1 − ε) · loss + ε · spread + λ · lse²."""
    loss, dtype = statistics.loss, statistics.loss.dtype
    if options.label_smoothing is not None:
        epsilon = options.label_smoothing.astype(dtype)
        loss = (1 - epsilon) * loss + epsilon * statistics.spread
    if options.z_loss is not None:
        loss = loss + options.z_loss.astype(dtype) * statistics.lse**2
    return loss


def _taken(class_weights, labels):
    """Each label's class weight; NaN for a label that is no class."""
    index = to_index(labels, class_weights.shape[0])
    return jnp.where(index < 0, jnp.nan, class_weights[jnp.maximum(index, 0)])
