# SPDX-License-Identifier: Apache-2.0
"""The numbers per token that every loss and log-probability is made of, and their derivative.

With z the transformed logits, (m, r) of a row, lse = m + log1p(r) and ŷ = e / (1 + r):

    loss     Σ_k y_k (lse − z_k)              the cross-entropy with the target y
    lse      m + log1p(r)
    entropy  log1p(r) + μ                     with the mean gap μ = Σ_k ŷ_k (m − z_k)
    spread   (1/n) Σ_k u_k (lse − z_k)        over the n classes that are not at −inf, for smoothing

u_k are the class weights, or 1. The first and the last are cross-entropies, so one form of their
derivative, Y ŷ − y, serves both.
"""

import functools
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from ._axes import OUT_OF_RANGE, labels_in_block, per_label
from ._merge import BlockSums, merge_shards
from ._numerics import (
    accumulation_dtype,
    gradient_numerator,
    log_sum_exp,
    nan_where,
    one_hot,
    rows_with_sum,
    shifted_exp,
    upcast,
)
from ._row_sums import pick, row_sums, shift_and_remainder
from ._rules import Rule, rule
from ._sharding import AxisName, add_at, resharded_like, shard_start
from ._transform import Transform, as_function, transformed


class StatisticsSpec(NamedTuple):
    """Which statistics are asked for beside the loss; fixed while tracing."""

    lse: bool = False
    entropy: bool = False
    spread: bool = False
    from_label: bool = False  # whether rows may be measured from their labels
    prediction: bool = False


class Statistics(NamedTuple):
    """One number per token each, None where not asked for; or their cotangents, None where zero."""

    loss: Any  # of K labels per token [..., K]
    lse: Any
    entropy: Any
    spread: Any
    prediction: Any = None  # an integer, which has no cotangent


# Integer labels. The rule takes raw logits `x [..., C]`, global `labels [...]` from `label_index`,
# or K for each row `[..., K]` (then rows are measured from their maximum), a `Transform` and
# `weights [C]`, the u_k of the spread (1 where None).
#
#     loss = (m − z_t) + log1p(r)
def _token_fwd(spec, axis_name, x, labels, transform, weights):  # noqa: PLR0917
    if axis_name is not None:
        spec = spec._replace(from_label=False)  # the label is on one of the devices
    start = shard_start(axis_name, x.shape[-1])
    sums = block_sums(spec, x, transform, labels, start, weights)
    if axis_name is not None:
        sums = merge_shards(axis_name, sums)
    out = with_label(outputs(spec, sums), labels)
    return out, (x, labels, transform, weights, sums._replace(costs=None, top=None))


def _token_bwd(axis_name, residuals, cotangents):
    _, labels, *_, sums = residuals
    g = nan_where_invalid(none_if_zero(cotangents), labels)
    unused = rows_without_cotangent(g, known_rows(sums, labels))
    return _token_linear(axis_name, residuals, g, unused)


def _token_linear(axis_name, residuals, g, unused=None):
    x, labels, transform, weights, sums = residuals
    z, pull = jax.vjp(transformed, x, transform)
    index = labels_in_block(labels, shard_start(axis_name, z.shape[-1]), z.shape[-1])
    dz, d_weights = label_cotangents(z, index, weights, sums, g, unused)
    dx, d_transform = pull(dz)
    d_weights = None if d_weights is None else resharded_like(d_weights, weights)
    return dx, None, d_transform, d_weights


def _token_tangents(axis_name, residuals, g):
    factor = jnp.ones_like(g.loss) + nan_where(residuals[1] == OUT_OF_RANGE, g.loss.dtype)
    return _token_linear(axis_name, residuals, g._replace(loss=factor * g.loss))


@functools.cache
def token_statistics(spec: StatisticsSpec, axis_name: AxisName | None = None) -> Rule:
    """The rule `(x, labels, transform, weights) -> Statistics`, one object for each kind.

    `axis_name`: the manual mesh axes that shard the classes.
    """
    bwd, tangents = (partial(part, axis_name) for part in (_token_bwd, _token_tangents))
    return rule(partial(_token_fwd, spec, axis_name), bwd, linear=tangents)


# The same with a target `y [..., C]` in place of labels: loss = Σ_k y_k (m − z_k) + Y log1p(r)
def _target_fwd(spec, axis_name, x, y, transform):
    dtype = accumulation_dtype(x.dtype, y.dtype)
    z = transformed(x, transform)
    sums = block_sums(spec, x, transform, None, 0, None)
    sums = jax.tree.map(lambda s: s.astype(dtype), sums)
    z, y_ = z.astype(dtype), y.astype(dtype)

    def target_sums(m):
        gap = m[..., None] - z
        # 0 · ∞ counts as 0. Where m is not finite, log1p(r) makes the loss NaN.
        nothing = ((y_ == 0) & (gap == jnp.inf)) | ~jnp.isfinite(m)[..., None]
        cost = y_ * jnp.where(nothing, 0, gap)
        return jnp.sum(cost, axis=-1), jnp.sum(y_, axis=-1)

    if axis_name is None:
        cost, total = target_sums(sums.m)
    else:
        sums, (cost, total) = merge_shards(axis_name, sums, target_sums)
    out = outputs(spec, sums)._replace(loss=cost + total * jnp.log1p(sums.r))
    return out, (x, y, transform, total, sums._replace(costs=None))


def _target_bwd(residuals, cotangents):
    g = none_if_zero(cotangents)
    *_, total, sums = residuals
    return _target_linear(residuals, g, rows_without_cotangent(g, jnp.isfinite(sums.r + total)))


# dy_k = g (lse − z_k) = g ((m − z_k) + log1p(r))
def _target_linear(residuals, g, unused=None):
    x, y, transform, total, sums = residuals
    z, pull = jax.vjp(transformed, x, transform)
    z_, y_ = z.astype(sums.m.dtype), y.astype(sums.m.dtype)
    if unused is not None:
        sums, z_ = without_rows(unused, sums, z_)
        total, y_ = jnp.where(unused, 0, total), jnp.where(unused[..., None], 0, y_)
    m, r = sums.m, sums.r
    dy = jnp.zeros_like(y)
    targets = []
    if g.loss is not None:
        targets = [(g.loss, partial(gradient_numerator, total, y_))]
        g_ = g.loss[..., None]
        gap = m[..., None] - z_
        far = gap == jnp.inf
        dy = g_ * (jnp.where(far, 0, gap) + jnp.log1p(r)[..., None])
        if unused is not None:  # an infinite derivative, which a linear map cannot give
            infinite = jnp.where(g_ < 0, -jnp.inf, jnp.where(g_ > 0, jnp.inf, g_))
            dy = jnp.where(far, jax.lax.stop_gradient(infinite), dy)
        dy = dy.astype(y.dtype)
    dz, _ = _cotangents(z_, targets, None, sums, g)
    dx, d_transform = pull(dz.astype(z.dtype))
    return dx, dy, d_transform


@functools.cache
def target_statistics(spec: StatisticsSpec, axis_name: AxisName | None = None) -> Rule:
    """The rule `(x, y, transform) -> Statistics`, one object for each kind."""
    return rule(partial(_target_fwd, spec, axis_name), _target_bwd, linear=_target_linear)


def block_sums(  # noqa: PLR0917
    spec: StatisticsSpec, x: jax.Array, transform: Transform, labels: Any, start: Any, weights: Any
) -> BlockSums:
    """The sums of raw logits `x [..., C]`, a block of classes that begins at number `start`."""
    of, scalars = as_function(transform)
    of_label = labels if spec.from_label else None
    m, r, *top = shift_and_remainder(x, of_label, of, *scalars, argmax=spec.prediction)
    sums = BlockSums(m, r)
    if top:
        sums = sums._replace(top=jnp.where(top[0] < 0, top[0], start + top[0]))
    if labels is not None:
        # From the label rows are whole, and XLA finds that it is picked already.
        index = labels if spec.from_label else labels_in_block(labels, start, x.shape[-1])
        sums = sums._replace(z_label=transformed(pick(x, index), transform))
    if spec.entropy:
        sums = sums._replace(gaps=_gap_sum(of, x, m, *scalars))
    if spec.spread:
        classes, mass, costs = _spread_sums(weights, of, x, m, *scalars)
        sums = sums._replace(classes=classes, mass=mass, costs=costs)
    return sums


def sums_at(  # noqa: PLR0917
    spec: StatisticsSpec,
    x: jax.Array,
    transform: Transform,
    index: jax.Array,
    weights: Any,
    m: jax.Array,
    *,
    beside_label: bool,
) -> BlockSums:
    """The sums of raw logits `x [..., C]` from a given shift m, which adds nothing to them itself.

    r is the sum over all classes, and 0 where m is not finite; or, `beside_label`, over all but
    that at `index`, whatever m is.
    """
    of, scalars = as_function(transform)
    z = of(x, *scalars)
    if beside_label:
        # Both of one reading: XLA makes them the end of a product.
        at_label = one_hot(index, x.shape[-1])
        r = jnp.sum(jnp.where(at_label, 0, shifted_exp(z, m)), axis=-1)
        z_label = jnp.sum(jnp.where(at_label, z, 0), axis=-1)
    else:
        has_sum, z, shift = rows_with_sum(z, m)
        r = jnp.where(has_sum, jnp.sum(shifted_exp(z, shift), axis=-1), 0)
        z_label = transformed(pick(x, index), transform)
    gaps = _gap_sum(of, x, m, *scalars) if spec.entropy else None
    spread = _spread_sums(weights, of, x, m, *scalars) if spec.spread else (None,) * 3
    return BlockSums(jnp.zeros_like(m), r, z_label, gaps, *spread)


def with_label(statistics: Statistics, labels: jax.Array) -> Statistics:
    """The loss is NaN where the label is out of range."""
    loss = statistics.loss
    return statistics._replace(loss=loss + nan_where(labels == OUT_OF_RANGE, loss.dtype))


def outputs(spec: StatisticsSpec, sums: BlockSums) -> Statistics:
    """The statistics of whole rows; the loss of a label, where there is one."""
    m, r, z_label, gaps, classes, mass, costs, top = sums
    log1p_r = jnp.log1p(r)
    loss = None
    if z_label is not None:
        loss = (per_label(m, z_label) - z_label) + per_label(log1p_r, z_label)
    return Statistics(
        loss,
        log_sum_exp(m, r) if spec.lse else None,
        None if gaps is None else log1p_r + gaps / (1 + r),
        None if classes is None else (costs + mass * log1p_r) / classes,
        top,
    )


def none_if_zero(cotangents: Statistics) -> Statistics:
    """The cotangents, with None in place of a symbolic zero."""
    real = cotangents._replace(prediction=None)
    return Statistics(*(None if isinstance(c, SymbolicZero) else c for c in real))


def nan_where_invalid(g: Statistics, labels: jax.Array) -> Statistics:
    """The cotangents: NaN for a loss whose label is out of range, unless that loss is not used."""
    if g.loss is None:
        return g
    invalid = (labels == OUT_OF_RANGE) & (g.loss != 0)
    return g._replace(loss=g.loss + nan_where(invalid, g.loss.dtype))


def known_rows(sums: BlockSums, labels: jax.Array) -> jax.Array:
    """Which rows have finite sums. From a label that is not there, (m, r) say nothing of a row."""
    finite = jnp.isfinite(sums.r)
    return finite if labels.ndim > finite.ndim else finite & (labels >= 0)


def rows_without_cotangent(g: Statistics, known: jax.Array) -> jax.Array | None:
    """Rows that are not `known` (finite) and of which nothing is used: gradient 0, not NaN.

    Other rows need no such care, and must have none: 0 times a finite gradient is 0, but its
    derivative by the cotangent is not.
    """
    asked = [c != 0 for c in g if c is not None]
    asked = [jnp.any(a, axis=-1) if a.ndim > known.ndim else a for a in asked]
    return ~known & ~functools.reduce(jnp.logical_or, asked) if asked else None


def without_rows(unused: jax.Array, sums: BlockSums, z: jax.Array) -> tuple[BlockSums, jax.Array]:
    """`sums` and `z` with finite numbers in place of all that these rows hold."""
    sums = jax.tree.map(lambda s: jnp.where(per_label(unused, s), 0, s), sums)
    if sums.classes is not None:
        sums = sums._replace(classes=jnp.where(unused, 1, sums.classes))
    return sums, jnp.where(unused[..., None], 0, z)


def label_cotangents(  # noqa: PLR0917
    z: jax.Array, labels: Any, weights: Any, sums: BlockSums, g: Statistics, unused: Any
) -> tuple[jax.Array, Any]:
    """Cotangents of `z [..., C]`, in its dtype, and of `weights`; −1: a label of another block.

    Every entry is computed as if it were not the label's. The label's own, one number per row, is
    then selected in its place, so that the loop over all classes holds only a select (XLA:CPU,
    [4096, 32000] float32, in place: 34 ms with the label's form inside the loop, 28 with the
    select; 25 with a scatter, but that would keep logits that are not an argument, and so take
    twice their memory). All is rounded once, at the end: with the select in bfloat16, a training
    step in place of [16384, 10] takes 2.5 times as long.
    """
    dtype = z.dtype
    if unused is not None:
        sums, z = without_rows(unused, sums, z)
    if labels.ndim == z.ndim:
        dz, d_weights = _several_cotangents(z, labels, weights, sums, g)
        return dz.astype(dtype), d_weights
    # `gradient_numerator` of a one-hot target, beside the label and at it: equation (27).
    targets = [] if g.loss is None else [(g.loss, lambda e, _: e)]
    dz, d_weights = _cotangents(z, targets, weights, sums, g)
    if g.loss is None:
        return dz.astype(dtype), d_weights
    own_weight = None
    if weights is not None:
        own_weight = pick(jnp.broadcast_to(_as_row(weights, z.ndim), z.shape), labels)[..., None]
    targets = [(g.loss, lambda e, r: (e - 1) - r[..., None])]
    own, _ = _cotangents(sums.z_label[..., None], targets, own_weight, sums, g)
    at_label = one_hot(labels, z.shape[-1])
    return jnp.where(at_label, own, dz).astype(dtype), d_weights


# Several labels per row: with G = Σ_k g_k, and Γ_i the sum over the labels that are class i,
#
#     dz_i = G ŷ_i − Γ_i = R ŷ_i + (T ŷ_i − Γ_i)        minus equation (65)
#
# where T is the part of the labels at the row's maximum, if that holds more than half of the
# probability, and R that of all others. At the maximum Γ_i is T, and T (ŷ_i − 1) comes from r,
# equation (66); any other ŷ_i is at most 1/2, and Γ_i may be subtracted as it is. That is K entries
# per row: work of the logits' size does not grow with K.
def _several_cotangents(z, labels, weights, sums, g):
    if g.loss is None:
        return _cotangents(z, [], weights, sums, g)
    top = (sums.z_label == sums.m[..., None]) & (sums.r < 1)[..., None]
    of_top = jnp.sum(jnp.where(top, g.loss, 0), axis=-1)
    of_others = jnp.sum(jnp.where(top, 0, g.loss), axis=-1)
    class_of_top = jnp.max(jnp.where(top, labels, -1), axis=-1, initial=-1)
    at_top = one_hot(class_of_top, z.shape[-1]).astype(of_top.dtype)

    def beside_top(e, r):
        # −r at the top, where e is 1, up to how z was recomputed; the derivative is that of e.
        return (e - at_top * lax.stop_gradient(e)) - at_top * r[..., None]

    targets = [(of_top, beside_top), (of_others, lambda e, _: e)]
    dz, d_weights = _cotangents(z, targets, weights, sums, g)
    return add_at(dz, labels, jnp.where(top, 0, -g.loss)), d_weights


# dz_i = Σ g (Y ŷ_i − y_i) over targets and spread + g_lse ŷ_i + g_entropy ŷ_i ((m − z_i) − μ)
# with the mean gap μ = Σ_k ŷ_k (m − z_k); `targets`: pairs of g and (Y ŷ − y)(1 + r) by (e, r).
def _cotangents(z, targets, weights, sums, g):
    m, r = sums.m, sums.r
    scale = 1 / (1 + r)
    e = shifted_exp(z, m)
    terms = []
    d_weights = None
    if g.spread is not None:
        inside, gap, u = _inside(z, m, weights)
        share = g.spread / sums.classes
        targets = [*targets, (share, partial(gradient_numerator, sums.mass, u))]
        if weights is not None:
            cost = share[..., None] * jnp.where(inside, gap + jnp.log1p(r)[..., None], 0)
            d_weights = jnp.sum(cost, axis=tuple(range(cost.ndim - weights.ndim))).astype(
                weights.dtype
            )
    for share, numerator in targets:
        terms.append((share * scale)[..., None] * numerator(e, r))
    if g.lse is not None:
        terms.append((g.lse * scale)[..., None] * e)
    if g.entropy is not None:
        _, gap, _ = _inside(z, m, None)
        mean_gap = sums.gaps * scale
        # In this order the product with a cotangent below 1 does not underflow before it must.
        terms.append((g.entropy * scale)[..., None] * (gap - mean_gap[..., None]) * e)
    if not terms:
        return jnp.zeros_like(upcast(z)), d_weights
    return functools.reduce(jnp.add, terms), d_weights


def _gap_sum(of, x, m, *scalars):
    """Σ_k e_k (m − z_k) of each row of z = of(x); a logit of −inf gives 0."""

    def terms(x, m, *scalars):
        z = of(x, *scalars)
        return (shifted_exp(z, m) * _inside(z, m, None)[1],)

    return row_sums(terms, (x, m), *scalars)[0]


def _spread_sums(weights, of, x, m, *scalars):
    """Over each row's classes that are not at −inf: their number, Σ u_k, and Σ u_k (m − z_k)."""
    if weights is None:

        def terms(x, m, *scalars):
            _, gap, one = _inside(of(x, *scalars), m, None)
            return one, gap

        classes, costs = row_sums(terms, (x, m), *scalars)
        return classes, classes, costs
    z = of(x, *scalars)
    inside, _, u = _inside(z, m, weights)
    has_sum, z, m = rows_with_sum(z, m)  # the other rows are NaN by their r
    costs = jnp.sum(u * _inside(z, m, None)[1], axis=-1)
    mass = jnp.where(has_sum, jnp.sum(u, axis=-1), 0)
    return jnp.sum(inside, axis=-1, dtype=m.dtype), mass, jnp.where(has_sum, costs, 0)


def _inside(z, m, weights):
    """Which classes are not at −inf; their m − z_k and u_k, 0 for the others."""
    z = upcast(z)
    inside = z != -jnp.inf
    gap = m[..., None] - z
    u = jnp.ones((), gap.dtype) if weights is None else weights.astype(gap.dtype)
    u = _as_row(u, z.ndim)
    return inside, jnp.where(inside, gap, 0), jnp.where(inside, u, 0)


def _as_row(u, ndim):
    return jnp.expand_dims(u, tuple(range(ndim - u.ndim)))
