# SPDX-License-Identifier: Apache-2.0
"""The options of the losses: plain arithmetic on one number per token, around the one rule."""

import contextlib
import functools
from collections.abc import Iterator
from contextvars import ContextVar
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from . import _checks
from ._axes import IGNORED, labels_in_block, to_index
from ._numerics import upcast
from ._rules import instantiated, rule
from ._sharding import AxisName, gather, shard_count, shard_start, sum_over
from ._statistics import Statistics, StatisticsSpec
from ._transform import Transform, as_transform


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
    axis_name: AxisName | None = None,
    classes: int = 0,
) -> Options:
    """Check the options that all losses share."""
    if class_weights is not None:
        class_weights = upcast(_checks.as_inexact(function, "class_weights", class_weights))
        meaning = "one weight per class"
        _checks.check_shape(function, "class_weights", class_weights.shape, (classes,), meaning)
        _checks.check_sharded_classes(function, axis_name, {"class_weights": class_weights})
    return Options(
        as_transform(function, soft_cap, temperature),
        _unless_zero(function, "label_smoothing", label_smoothing, 1.0),
        _unless_zero(function, "z_loss", z_loss, float("inf")),
        class_weights,
    )


def _unless_zero(function, name, value, most):
    if isinstance(value, (int, float)) and value == 0 and value is not False:
        return None
    return upcast(_checks.as_bounded(function, name, value, most))


def required_statistics(options: Options) -> StatisticsSpec:
    """The statistics that `target_losses` needs for these options, beside the loss."""
    lse, spread = options.z_loss is not None, options.label_smoothing is not None
    # Not where the spread may be all of one class, for which m would have to be that class's logit.
    one_class = spread and options.class_weights is not None
    return StatisticsSpec(lse, False, spread, not (one_class or _in_sharded_loop.get()))


_in_sharded_loop = ContextVar("jaxsoftmax.in_sharded_loop", default=False)


@contextlib.contextmanager
def in_loop(sharded: bool) -> Iterator[None]:
    """Within, rows that may be sharded are measured from their maximum.

    Whether any row is far from its label would be one more number to send, in every iteration.
    """
    token = _in_sharded_loop.set(sharded)
    try:
        yield
    finally:
        _in_sharded_loop.reset(token)


def ignored_tokens(labels: jax.Array, ignore_index: int | None) -> jax.Array | None:
    """Which tokens are ignored; None where none can be."""
    limits = jnp.iinfo(labels.dtype)
    if ignore_index is None or not limits.min <= ignore_index <= limits.max:
        return None
    return labels == jnp.asarray(ignore_index, labels.dtype)


def label_index(labels: jax.Array, classes: int, ignore_index: int | None) -> jax.Array:
    """Labels as int32: OUT_OF_RANGE, which makes the loss NaN, or IGNORED, which does not."""
    index = to_index(labels, classes)
    ignored = ignored_tokens(labels, ignore_index)
    return index if ignored is None else jnp.where(ignored, IGNORED, index)


def label_weights(
    labels: jax.Array,
    ignore_index: int | None,
    class_weights: jax.Array | None,
    axis_name: AxisName | None = None,
) -> jax.Array | None:
    """What each token counts in a mean: its label's class weight, 0 if ignored; None for 1 each.

    A label out of range counts 1: the token's loss is NaN whatever it is divided by.
    """
    ignored = ignored_tokens(labels, ignore_index)
    if class_weights is None:
        return None if ignored is None else (~ignored).astype(jnp.float32)
    classes = class_weights.shape[0]
    index = label_index(labels, classes * shard_count(axis_name), ignore_index)
    here = labels_in_block(index, shard_start(axis_name, classes), classes)
    weights = jnp.where(here < 0, 0, gather(class_weights, jnp.maximum(here, 0)))
    if axis_name is not None:
        weights = sum_over(axis_name, weights)
    weights = jnp.where(index < 0, 1, weights)
    return weights if ignored is None else jnp.where(ignored, 0, weights)


def token_losses(  # noqa: PLR0917
    forward_mode: bool,
    statistics: Statistics,
    labels: jax.Array,
    weights: jax.Array | None,
    ignore_index: int | None,
    options: Options,
    included: jax.Array | None = None,
) -> jax.Array:
    """Losses of tokens with integer labels: exactly 0, with gradient 0, where ignored.

    `weights`: the class weights of the labels, from `label_weights`; None for 1 each.
    """
    ignored = ignored_tokens(labels, ignore_index)
    if ignored is not None:
        included = ~ignored if included is None else included & ~ignored
    return target_losses(forward_mode, statistics, options, included, weights)


def target_losses(
    forward_mode: bool,
    statistics: Statistics,
    options: Options,
    included: jax.Array | None = None,
    weights: jax.Array | None = None,
) -> jax.Array:
    """The losses with all options; exactly 0 where not included."""
    if included is not None:
        statistics = jax.tree.map(lambda s: jnp.where(included, s, 0), statistics)
    mixed = (weights, options.label_smoothing, options.z_loss)
    if all(option is None for option in mixed):
        return statistics.loss
    return _MIX.for_mode(forward_mode)(statistics, *mixed)


def _mix(statistics, weights, epsilon, z_loss):
    """(1 − ε) · weights · loss + ε · spread + λ · lse², one number per token."""
    loss, dtype = statistics.loss, statistics.loss.dtype
    if weights is not None:
        loss = _times(weights.astype(dtype), loss)
    if epsilon is not None:
        epsilon = epsilon.astype(dtype)
        loss = _times(1 - epsilon, loss) + epsilon * statistics.spread
    if z_loss is not None:
        loss = loss + z_loss.astype(dtype) * statistics.lse**2
    return loss


def _times(share: jax.Array, loss: jax.Array) -> jax.Array:
    """`share * loss`, where 0 · ∞ counts as 0."""
    return share * jnp.where((share == 0) & (loss == jnp.inf), 0, loss)


def _mix_fwd(*args):
    return _mix(*args), args


def _mix_linear(args, g):
    return jax.vjp(_mix, *args)[1](g)


def _mix_bwd(args, g):
    """A loss that is not used adds nothing to the options' gradients: 0 · NaN would be NaN."""
    g, (statistics, *options) = instantiated(g), args
    finite = [jnp.isfinite(s) for s in (_mix(*args), *jax.tree.leaves(statistics))]
    unused = (g == 0) & ~functools.reduce(jnp.logical_and, finite)
    statistics = jax.tree.map(lambda s: jnp.where(unused, 0, s), statistics)
    return _mix_linear((statistics, *options), g)


_MIX = rule(_mix_fwd, _mix_bwd, linear=_mix_linear)
