# SPDX-License-Identifier: Apache-2.0
"""Divergences of two softmaxes, exact however close they are: each function, then its one rule.

With q = softmax(z) of the logits z and p = softmax(t) of the target t (docs/forms.md, section 16):

    δ_k = log q_k − log p_k            from z − t, never from two log-probabilities
    KL  = Σ_k p_k (e^δ_k − 1 − δ_k)    every term ≥ 0: nothing cancels
    JS  = Σ_k (1 − w) p_k λ(m_k/p_k − 1) + w q_k λ(m_k/q_k − 1)

with the mixture m = (1 − w) p + w q and λ(x) = x − log(1 + x) ≥ 0: each sum is a KL to m.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from . import _checks
from ._axes import broadcast_mask, masked, to_rows
from ._numerics import (
    accumulation_dtype,
    exp_beyond_linear,
    log1p_near,
    log_beyond_linear,
    nan_where,
    two_difference,
    upcast,
)
from ._row_sums import row_sums
from ._rules import ON_LOGITS, Rule, in_forward_mode, instantiated, rule, scope
from ._sharding import AxisName, in_one_sharding, maximum_over, sum_over
from ._transform import Transform, as_function, as_transform, difference, transformed

Axis = int | Sequence[int] | None


def softmax_kl_divergence(
    logits: ArrayLike,
    target_logits: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    temperature: ArrayLike = 1.0,
    soft_cap: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""`KL(softmax(target_logits) ‖ softmax(logits))` of each example, in nats.

    `Σ_k p_k (log p_k − log q_k)`, p the target's probabilities: the forward divergence of
    distillation, which covers all that the target does. The reverse one, `KL(q ‖ p)`, is the call
    with the two arrays exchanged. Differentiate by either, or stop the gradient of one.

    Args:
      logits: unnormalized log-probabilities in any floating dtype.
      target_logits: those of the target, with the shape of `logits`, in any floating dtype.
      axis: the class axis, a tuple of class axes, or None for all axes.
      where: boolean, broadcasts to the shape of `logits`: the classes to include, in both. An
        example with none has divergence 0.
      temperature: divides both (capped) logits; positive. The divergence is that of the divided
        logits: multiply it by `temperature**2`, as Hinton et al. (2015) do, to keep the size of the
        gradients.
      soft_cap: replaces both logits by `soft_cap · tanh(logits / soft_cap)`; positive.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) that shards the classes: both
        logits, and `where`, are this device's part, in the order of the devices.

    Returns:
      The divergences, with the shape of `logits` without `axis`, in float32, or float64 where an
      argument is. Never negative; exactly 0 for equal logits. A class at −inf in both logits does
      not count; at −inf in the target alone it adds its q_k; at −inf in `logits` alone it makes the
      divergence +inf. A row where either holds +inf or NaN, or nothing but −inf, is NaN, and so are
      its gradients.

    Raises:
      TypeError: logits not floating, `where` not boolean, or an option of the wrong type.
      ValueError: shapes that do not match, an axis out of range, or an option out of its range (if
        its value is known: both may be traced).

    Differentiable in both logits, `temperature` and `soft_cap`, in reverse mode, to any order;
    forward mode over reverse works. The gradients are `q − p` by `logits` and `p_k (δ̄ − δ_k)` by
    the target, with `δ = log q − log p` and `δ̄ = Σ p δ`; an infinite divergence has an infinite
    gradient by the target. docs/forms.md equations (71), (74) and (75).

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> target = jnp.array([1.0, 2.0, 3.0])
      >>> logits = target + jnp.array([0.0, 0.0, 1e-4])
      >>> print(f"{jaxsoftmax.softmax_kl_divergence(logits, target):.5g}")
      1.1112e-09
    """
    return _divergence(
        "softmax_kl_divergence",
        logits,
        target_logits,
        axis,
        where,
        temperature=temperature,
        soft_cap=soft_cap,
        axis_name=axis_name,
        weight=None,
    )


def softmax_js_divergence(
    logits: ArrayLike,
    target_logits: ArrayLike,
    axis: Axis = -1,
    where: ArrayLike | None = None,
    *,
    weight: ArrayLike = 0.5,
    temperature: ArrayLike = 1.0,
    soft_cap: ArrayLike | None = None,
    axis_name: AxisName | None = None,
) -> Float[Array, "..."]:
    r"""The weighted Jensen–Shannon divergence of two softmaxes, of each example, in nats.

    `(1 − w)·KL(p ‖ m) + w·KL(q ‖ m)` with the mixture `m = (1 − w)·p + w·q`, where p is the
    softmax of `target_logits`, q that of `logits`, and w the weight. It is finite wherever each has
    a class that counts, at most `−(1 − w) log(1 − w) − w log w` (log 2 for w = ½), and the same
    with the arrays exchanged and `1 − w`. For small w it is close to `w·KL(q ‖ p)`, for w close to
    1 to `(1 − w)·KL(p ‖ q)`.

    Args:
      logits: unnormalized log-probabilities in any floating dtype.
      target_logits: those of the target, with the shape of `logits`, in any floating dtype.
      axis: the class axis, a tuple of class axes, or None for all axes.
      where: boolean, broadcasts to the shape of `logits`: the classes to include, in both. An
        example with none has divergence 0.
      weight: w, between 0 and 1 and neither.
      temperature: divides both (capped) logits; positive (see `softmax_kl_divergence`).
      soft_cap: replaces both logits by `soft_cap · tanh(logits / soft_cap)`; positive.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) that shards the classes (see
        `softmax_kl_divergence`).

    Returns:
      The divergences, with the shape of `logits` without `axis`, in float32, or float64 where an
      argument is. Never negative; exactly 0 for equal logits. A class at −inf in both logits does
      not count. A row where either holds +inf or NaN, or nothing but −inf, is NaN, and so are its
      gradients.

    Raises:
      TypeError: logits not floating, `where` not boolean, or an option of the wrong type.
      ValueError: shapes that do not match, an axis out of range, or an option out of its range (if
        its value is known: options may be traced).

    Differentiable in both logits, `weight`, `temperature` and `soft_cap`, in reverse mode, to any
    order; forward mode over reverse works. docs/forms.md equations (79) to (82).

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> logits, target = jnp.array([0.0, 1e-4]), jnp.array([0.0, 0.0])
      >>> print(f"{jaxsoftmax.softmax_js_divergence(logits, target):.5g}")
      3.125e-10
    """
    name = "softmax_js_divergence"
    return _divergence(
        name,
        logits,
        target_logits,
        axis,
        where,
        temperature=temperature,
        soft_cap=soft_cap,
        axis_name=axis_name,
        weight=_checks.as_between(name, "weight", weight),
    )


def _divergence(
    name, logits, target_logits, axis, where, *, temperature, soft_cap, axis_name, weight
):
    logits = _checks.as_floating(name, "logits", logits)
    target = _checks.as_floating(name, "target_logits", target_logits)
    axes = _checks.as_axes(name, axis, logits.ndim)
    meaning = "the shape of logits"
    _checks.check_shape(name, "target_logits", target.shape, logits.shape, meaning)
    axis_name = _checks.as_axis_name(name, axis_name)
    sharded = {"logits": logits, "target_logits": target}
    _checks.check_sharded_classes(name, axis_name, sharded)
    where = broadcast_mask(name, where, logits.shape, meaning)
    _checks.check_sharded_classes(name, axis_name, {"where": where})
    transform = as_transform(name, soft_cap, temperature)
    with scope(name, ON_LOGITS):
        if len(axes) > 1:  # before jit, as in `_cross_entropy._one_axis`
            batch = logits.ndim - len(axes)
            logits, target = to_rows(logits, axes), to_rows(target, axes)
            where = None if where is None else to_rows(where, axes)
            axes = (batch,)
        return _of_logits(
            in_forward_mode(), axis_name, axes, logits, target, where, transform, weight
        )


@partial(jax.jit, static_argnums=(0, 1, 2))
def _of_logits(  # noqa: PLR0917
    forward_mode, axis_name, axes, logits, target, where, transform, weight
):
    (logits, target, where), included = in_one_sharding(logits, target, where), None
    if where is not None:
        logits, included = masked(logits, where, axes, axis_name)
        target, _ = masked(target, where, axes, axis_name)
    x, y = to_rows(logits, axes), to_rows(target, axes)
    if x.shape[-1] == 0:
        return jnp.zeros(x.shape[:-1], accumulation_dtype(x.dtype, y.dtype))
    out = of_rows(x, y, transform, transform, weight, axis_name=axis_name, forward=forward_mode)
    return out if included is None else jnp.where(included, out, 0)


def of_rows(
    x: jax.Array,
    y: jax.Array,
    transform: Transform,
    target_transform: Transform,
    weight: jax.Array | None,
    *,
    axis_name: AxisName | None,
    forward: bool = False,
) -> jax.Array:
    """The divergence of raw logits `x [..., C]` and targets `y [..., C]`: JS if there is a weight.

    The transforms have one temperature.
    """
    dtype = accumulation_dtype(x.dtype, y.dtype)
    if dtype == jnp.float64:
        x, y = x.astype(dtype), y.astype(dtype)
    same_cap = transform is target_transform
    weight = None if weight is None else weight.astype(dtype)
    function = _rule(axis_name, same_cap).for_mode(forward)
    return function(x, y, transform, target_transform, weight)


# The rule ----------------------------------------------------------------------------------------


class _Pair(NamedTuple):
    """What is known of each row: finite numbers, also where the row has no divergence."""

    valid: Any  # whether both rows have a log-sum-exp
    m: Any  # of z, the logits, before they are divided by the temperature
    r: Any
    maxima: Any  # how many classes are at m
    m_t: Any  # of t, the target
    r_t: Any
    maxima_t: Any
    change: Any  # D = log1p(r) − log1p(r_t), without cancellation


class _Classes(NamedTuple):
    """Of each class: everything from the larger probability and the ratio to the smaller."""

    a: Any  # z − m ≤ 0, divided by the temperature
    b: Any  # t − m_t ≤ 0
    p: Any
    q: Any
    x: Any  # δ + D = (z − m) − (t − m_t)
    log_ratio: Any  # δ = log q − log p
    larger: Any
    ratio: Any  # the smaller over the larger
    below: Any  # whether q is the smaller


# Σ_k p_k e^x_k = (1 + r) / (1 + r_t), so that D is log1p(Σ p_k (e^x_k − 1)), exact for small x:
# equation (69). Far from 0 the two logarithms are far apart, and may be subtracted. D's derivative
# is theirs in any case: what is added to D is 0.
def _fwd(axis_name, same_cap, x, y, transform, target_transform, weight):  # noqa: PLR0917
    sums_of = partial(_sums, same_cap, axis_name, x, y, transform, target_transform)
    m, m_t = _maximum(axis_name, x, transform), _maximum(axis_name, y, target_transform)
    valid = jnp.isfinite(m) & jnp.isfinite(m_t)
    m, m_t = (jnp.where(valid, s, 0) for s in (m, m_t))
    zero = jnp.zeros_like(m)
    alone = _Pair(valid, m, zero, zero, m_t, zero, zero, zero)
    rest, maxima, rest_t, maxima_t, change = sums_of(_first_terms, alone, None)
    r, r_t = rest + (maxima - 1), rest_t + (maxima_t - 1)
    valid = valid & jnp.isfinite(r) & jnp.isfinite(r_t)
    r, r_t, change = (jnp.where(valid, s, 0) for s in (r, r_t, change))
    r = checkpoint_name(r, "jaxsoftmax.remainder")
    r_t = checkpoint_name(r_t, "jaxsoftmax.remainder")
    relative = change / (1 + r_t)
    near = jnp.abs(relative) <= 0.5
    apart = jnp.log1p(r) - jnp.log1p(r_t)
    exact = jnp.where(near, log1p_near(jnp.where(near, relative, 0)), apart)
    change = lax.stop_gradient(exact) + _no_value(apart)
    pair = _Pair(valid, m, r, maxima, m_t, r_t, maxima_t, change)
    (out,) = sums_of(_kl_terms if weight is None else _js_terms, pair, weight)
    # Not by the sum: what is not valid may come from any class.
    out = out + nan_where(~valid, out.dtype)
    return out, (x, y, transform, target_transform, weight, pair, out)


def _maximum(axis_name, x, transform):
    """The maximum of each row before it is divided by the temperature; a constant.

    What is computed from z − m does not depend on it. The maximum of divided logits would be a
    rounded one, and log-ratios of size δ would have errors of u times its own size.
    """
    of, scalars = as_function(transform.undivided())
    m = jnp.max(lax.stop_gradient(of(x, *scalars)), axis=-1)
    m = m if axis_name is None else maximum_over(axis_name, m)
    return checkpoint_name(m, "jaxsoftmax.shift")


def _no_value(x):
    """0, with the derivative of `x`."""
    return x - lax.stop_gradient(x)


def _sums(  # noqa: PLR0917
    same_cap, axis_name, x, y, transform, target_transform, terms, pair, weight
):
    """The sums over each row's classes of the `terms` of its classes."""
    _, scalars = as_function(transform)
    _, scalars_t = as_function(target_transform)
    known = transform, target_transform

    def of_classes(x, m, y, valid, *rest):
        numbers, scalars = rest[: len(pair) - 2], rest[len(pair) - 2 :]
        transform, target_transform, weight = _unflattened(known, scalars)
        row = _Pair(valid, m, *numbers)
        c = _compared(same_cap, x, y, transform, target_transform, row)
        return terms(c, row, weight)

    valid, m, *numbers = pair
    weights = () if weight is None else (weight,)
    rows = (x, m, y, valid, *numbers)
    sums = row_sums(of_classes, rows, *scalars, *scalars_t, *weights)
    return sums if axis_name is None else sum_over(axis_name, sums)


def _unflattened(known, scalars):
    """The transforms and the weight, of their scalars."""
    leaves = iter(scalars)
    transforms = [
        Transform(*(None if scalar is None else next(leaves) for scalar in transform))
        for transform in known
    ]
    return *transforms, next(leaves, None)


def _compared(same_cap, x, y, transform, target_transform, row):  # noqa: PLR0917
    """Everything of the classes; one at −inf in both rows has p = q = δ + D = 0."""
    x, y = (jnp.where(row.valid[..., None], a, 0) for a in (x, y))
    a, b = _gap(x, transform, row.m), _gap(y, target_transform, row.m_t)
    high, low = two_difference(row.m, row.m_t)
    shift = high[..., None], low[..., None]
    x = difference(x, y, transform, target_transform, shift, same_cap=same_cap)
    equal = a == b
    plain = jnp.where(equal, 0, a) - jnp.where(equal, 0, b)
    x = jnp.where(jnp.isfinite(x) & jnp.isfinite(a) & jnp.isfinite(b), x, plain)
    log_ratio = x - row.change[..., None]
    below = log_ratio < 0
    scale, scale_t = (1 / (1 + r)[..., None] for r in (row.r, row.r_t))
    larger = jnp.exp(jnp.where(below, b, a)) * jnp.where(below, scale_t, scale)
    ratio = jnp.exp(jnp.where(below, log_ratio, -log_ratio))
    p, q = larger * jnp.where(below, 1, ratio), larger * jnp.where(below, ratio, 1)
    return _Classes(a, b, p, q, x, log_ratio, larger, ratio, below)


def _gap(x, transform, m):
    """The logits less the maximum: divided by the temperature after that."""
    gap = upcast(transformed(x, transform.undivided())) - m[..., None]
    return transformed(gap, Transform(temperature=transform.temperature))


def _lost(c: _Classes) -> jax.Array:
    """e^−s − 1 with s = |δ|, exact however close to 0: the smaller over the larger, less 1."""
    s = jnp.where(c.below, -c.log_ratio, c.log_ratio)
    near = s < 0.5
    small = jnp.where(near, -s, 0)
    return jnp.where(near, small + exp_beyond_linear(small), c.ratio - 1)


def _excess(c: _Classes) -> jax.Array:
    """The excess q − p."""
    lost = _lost(c)
    return c.larger * jnp.where(c.below, lost, -lost)


# Of rows whose r are still 0, so that q and p are the exponentials. As (m, r) of `_numerics`, r
# counts all but one of the maxima, and its derivative is over every class.
def _first_terms(c, row, weight):
    del row, weight
    terms = []
    for gap in (c.a, c.b):
        at_max, e = gap == 0, jnp.exp(gap)
        terms += [jnp.where(at_max, _no_value(e), e), at_max.astype(e.dtype)]
    return (*terms, lax.stop_gradient(_excess(c)))


# p_k (e^δ − 1 − δ), where it is not small as (q_k − p_k) − p_k δ_k.
def _kl_terms(c, row, weight):
    del row, weight
    near = jnp.abs(c.log_ratio) < 0.5
    beyond = exp_beyond_linear(jnp.where(near, c.log_ratio, 0))
    excess = c.larger * jnp.where(c.below, c.ratio - 1, 1 - c.ratio)
    finite = jnp.where(jnp.isinf(c.log_ratio), 0, c.log_ratio)
    # A class of q_k = 0 beside p_k > 0 makes it infinite; one of p_k = 0 adds q_k.
    apart = jnp.where(c.log_ratio == -jnp.inf, jnp.inf, excess - c.p * finite)
    return (jnp.where(near, c.p * beyond, apart),)


class _Mixture(NamedTuple):
    """Of each class, m being the mixture."""

    of_larger: Any  # log(m / larger) ≤ 0
    of_smaller: Any  # log(m / smaller) ≥ 0
    cost_of_larger: Any  # larger · λ(m / larger − 1), what the class adds to KL(larger ‖ m)
    cost_of_smaller: Any


# With s = |δ| and e = e^−s − 1 the mixture is m = larger · (1 + v), v = e · the smaller's share;
# and m = smaller · (1 + u), u = (1 − e^−s) / e^−s · the larger's share: equation (80).
def _mixture(c: _Classes, weight: Any) -> _Mixture:
    s = jnp.where(c.below, -c.log_ratio, c.log_ratio)
    of_larger, of_smaller = _shares(c, weight)
    e = _lost(c)
    v = of_smaller * e
    near_v = v > -0.5
    lost = log_beyond_linear(jnp.where(near_v, v, 0))
    mixed = of_larger + of_smaller * c.ratio  # 1 + v
    log_larger = jnp.where(near_v, v - lost, jnp.log(jnp.where(near_v, 1, mixed)))
    near_u = of_larger * -e < 0.5 * c.ratio
    u = jnp.where(near_u, of_larger * -e / jnp.where(near_u, c.ratio, 1), 0)
    gained = log_beyond_linear(u)
    finite = jnp.where(s == jnp.inf, 0, s)
    log_smaller = jnp.where(near_u, u - gained, log_larger + finite)
    smaller = c.larger * c.ratio
    cost_of_larger = c.larger * jnp.where(near_v, lost, v - log_larger)
    apart = -of_larger * c.larger * e - smaller * log_smaller
    cost_of_smaller = jnp.where(near_u, smaller * gained, apart)
    return _Mixture(log_larger, log_smaller, cost_of_larger, cost_of_smaller)


def _shares(c: _Classes, weight: Any) -> tuple[jax.Array, jax.Array]:
    """The shares in the mixture of the larger probability and of the smaller."""
    rest = 1 - weight
    return jnp.where(c.below, rest, weight), jnp.where(c.below, weight, rest)


def _js_terms(c, row, weight):
    del row
    mixture = _mixture(c, weight)
    of_larger, of_smaller = _shares(c, weight)
    return (of_larger * mixture.cost_of_larger + of_smaller * mixture.cost_of_smaller,)


# Both divergences are, by a distribution p of their own, Σ p_k (− v_k) with v_k = log(other / p_k)
# and the other held constant, so that dt_k = p_k (v̄ − v_k), v̄ = Σ p v: equations (75), (82). The
# mean is taken of v less its value at the maximum, a constant, which drops out there exactly: so
# the sum over the others keeps all digits where p is confident.
def _own_terms(own, c, row, weight):
    del row
    p, v, at_max = own(c, weight)
    cost = p * v
    return jnp.where(at_max, _no_value(cost), cost), lax.stop_gradient(jnp.where(at_max, v, 0))


def _by_own(sums, r, maxima, p, v):
    others, at_max = sums
    reference = lax.stop_gradient(at_max / jnp.maximum(maxima, 1))
    mean = others - lax.stop_gradient((r - (maxima - 1)) / (1 + r)) * reference
    return p * (mean[..., None] - (v - reference[..., None]))


def _target_of_kl(c, weight):
    """p, δ + D (of classes where it is finite), and where t has its maximum."""
    del weight
    v = jnp.where(jnp.isinf(c.x), 0, c.x)
    return c.p, v, c.b == 0


def _target_of_js(c, weight):
    mixture = _mixture(c, weight)
    v = jnp.where(c.below, mixture.of_larger, mixture.of_smaller)
    return c.p, v, c.b == 0


def _logits_of_js(c, weight):
    mixture = _mixture(c, weight)
    v = jnp.where(c.below, mixture.of_smaller, mixture.of_larger)
    return c.q, v, c.a == 0


# ∂JS/∂w = KL(q ‖ m) − KL(p ‖ m): the part by m is Σ (p − q) = 0. Equation (81).
def _weight_terms(c, row, weight):
    del row
    mixture = _mixture(c, weight)
    change = mixture.cost_of_smaller - mixture.cost_of_larger
    return (jnp.where(c.below, change, -change),)


def _bwd(axis_name, same_cap, residuals, g):
    *_, pair, out = residuals
    g = instantiated(g)
    g = g + nan_where(~pair.valid & (g != 0), g.dtype)
    return _cotangents(axis_name, same_cap, residuals, g, infinite=jnp.isinf(out))


def _tangents(axis_name, same_cap, residuals, g):
    factor = jnp.ones_like(g) + nan_where(~residuals[-2].valid, g.dtype)
    return _cotangents(axis_name, same_cap, residuals, factor * g)


def _cotangents(axis_name, same_cap, residuals, g, infinite=None):
    x, y, transform, target_transform, weight, pair, _ = residuals
    sums_of = partial(_sums, same_cap, axis_name, x, y, transform, target_transform)
    z, pull = jax.vjp(transformed, x, transform)
    t, pull_t = jax.vjp(transformed, y, target_transform)
    dtypes, g_ = (z.dtype, t.dtype), g[..., None]
    c = _compared(same_cap, x, y, transform, target_transform, pair)

    def by_own(own, r, maxima):
        sums = sums_of(partial(_own_terms, own), pair, weight)
        p, v, _ = own(c, weight)
        return _by_own(sums, r, maxima, p, v)

    d_weight = None
    if weight is None:
        dz, dt = g_ * _excess(c), g_ * by_own(_target_of_kl, pair.r_t, pair.maxima_t)
        if infinite is not None:  # which a linear map cannot give
            unbounded = jnp.where((c.x == -jnp.inf) == (g_ > 0), jnp.inf, -jnp.inf)
            unbounded = jnp.where((g_ == 0) | (c.b == -jnp.inf), 0, unbounded)
            dt = jnp.where(infinite[..., None], lax.stop_gradient(unbounded), dt)
    else:
        dz = g_ * weight * by_own(_logits_of_js, pair.r, pair.maxima)
        dt = g_ * (1 - weight) * by_own(_target_of_js, pair.r_t, pair.maxima_t)
        # Of this device's classes, as what `pull` gives: both are summed after the rule.
        own_classes = partial(_sums, same_cap, None, x, y, transform, target_transform)
        (by_weight,) = own_classes(_weight_terms, pair, weight)
        d_weight = jnp.sum(g * by_weight)
    (dx, d_transform), (dy, d_target) = pull(dz.astype(dtypes[0])), pull_t(dt.astype(dtypes[1]))
    return dx, dy, d_transform, d_target, d_weight


@functools.cache
def _rule(axis_name: AxisName | None, same_cap: bool) -> Rule:
    """The rule `(x, y, transform, target_transform, weight) -> divergences`, one for each kind."""
    fwd, bwd, tangents = (partial(part, axis_name, same_cap) for part in (_fwd, _bwd, _tangents))
    return rule(fwd, bwd, linear=tangents)
