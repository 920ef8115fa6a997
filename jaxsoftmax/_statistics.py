# SPDX-License-Identifier: Apache-2.0
"""The per-token numbers every loss and log-probability is made of, and their one derivative.

With z the transformed logits, (m, r) of a row, lse = m + log1p(r) and ŷ = e / (1 + r):

    loss     Σ_k y_k (lse − z_k)              the cross-entropy with the target y
    lse      m + log1p(r)
    entropy  log1p(r) + μ                     with the mean gap μ = Σ_k ŷ_k (m − z_k)
    spread   (1/n) Σ_k u_k (lse − z_k)        over the n classes that are not at −inf

The first and the last are cross-entropies, so one form of their derivative, Y ŷ − y, serves both.
"""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from ._numerics import (
    accumulation_dtype,
    excess,
    log_sum_exp,
    max_and_remainder,
    nan_where,
    one_hot,
    pick,
    row_sums,
    rows_with_sum,
    shifted_exp,
    upcast,
)
from ._rules import Rule, rule
from ._sharding import AxisName, laid_out_like, maximum_over, shard_start, sum_over
from ._transform import Transform, as_function, transformed


class Statistics(NamedTuple):
    """One number a token each, None where not wanted; or their cotangents, None where zero."""

    loss: Any
    lse: Any
    entropy: Any
    spread: Any


class Wanted(NamedTuple):
    """Which statistics beside the loss, and of what; fixed while tracing."""

    lse: bool = False
    entropy: bool = False
    spread: bool = False
    axis_name: AxisName | None = None  # the manual mesh axes that shard the classes


class Rows(NamedTuple):
    """What blocks of classes are put together by, one number a row; None where not wanted.

    Labels and whole rows are spread over blocks: each holds its part of every sum, relative to its
    own maximum. Whole rows whose loss alone is wanted may have their label's logit for m.
    """

    m: Any
    r: Any
    z_label: Any = None  # z_t; 0 where the label is in another block
    gaps: Any = None  # Σ e (m − z), for the entropy
    classes: Any = None  # those not at −inf, for the spread
    mass: Any = None  # Σ u over those
    costs: Any = None  # Σ u (m − z)


# Integer labels. The rule takes raw logits `x [..., C]`, global `labels [...]` from `to_index`, a
# `Transform` and `weights [C]`, the u_k of the spread (1 where None).
#
#     loss = (m − z_t) + log1p(r)
def _token_fwd(wanted, x, labels, transform, weights):
    if wanted == Wanted():
        of, scalars = as_function(transform)
        z_label = transformed(pick(x, labels), transform)
        rows = Rows(*max_and_remainder(x, labels, of, *scalars), z_label)
    else:
        start = shard_start(wanted.axis_name, x.shape[-1])
        rows = block_rows(wanted, x, transform, labels, start, weights)
    if wanted.axis_name is not None:
        rows = over_shards(wanted.axis_name, rows)
    out = with_label(outputs(wanted, rows), labels)
    return out, (x, labels, transform, weights, rows._replace(costs=None))


def _token_bwd(wanted, residuals, cotangents):
    _, labels, *_, rows = residuals
    g = poisoned(live(cotangents), labels)
    # Measured from a label that is no class, (m, r) say nothing of the row.
    known = jnp.isfinite(rows.r) & (labels >= 0)
    return _token_linear(wanted, residuals, g, unused_rows(g, known))


def _token_linear(wanted, residuals, g, unused=None):
    x, labels, transform, weights, rows = residuals
    z, pull = jax.vjp(transformed, x, transform)
    index = local(labels, shard_start(wanted.axis_name, z.shape[-1]), z.shape[-1])
    dz, d_weights = label_cotangents(z, index, weights, rows, g, unused)
    dx, d_transform = pull(dz)
    d_weights = None if d_weights is None else laid_out_like(d_weights, weights)
    return dx, None, d_transform, d_weights


def _token_tangents(wanted, residuals, g):
    factor = jnp.ones_like(g.loss) + nan_where(residuals[1] < 0, g.loss.dtype)
    return _token_linear(wanted, residuals, g._replace(loss=factor * g.loss))


@functools.cache
def token_statistics(wanted: Wanted) -> Rule:
    """The rule `(x, labels, transform, weights) -> Statistics`, one object for each `wanted`."""
    parts = (_token_fwd, _token_bwd, _token_tangents)
    fwd, bwd, tangents = (partial(part, wanted) for part in parts)
    return rule(fwd, bwd, linear=tangents)


# The same with a target `y [..., C]` in place of labels: loss = Σ_k y_k (m − z_k) + Y log1p(r)
def _target_fwd(wanted, x, y, transform):
    dtype = accumulation_dtype(x.dtype, y.dtype)
    z = transformed(x, transform)
    rows = block_rows(wanted, x, transform, None, 0, None)
    rows = jax.tree.map(lambda s: s.astype(dtype), rows)
    z, y_ = z.astype(dtype), y.astype(dtype)

    def target_sums(m):
        gap = m[..., None] - z
        # 0 · ∞ counts as 0; what a row without a log-sum-exp costs, log1p(r) says.
        nothing = ((y_ == 0) & (gap == jnp.inf)) | ~jnp.isfinite(m)[..., None]
        cost = y_ * jnp.where(nothing, 0, gap)
        return jnp.sum(cost, axis=-1), jnp.sum(y_, axis=-1)

    if wanted.axis_name is None:
        cost, total = target_sums(rows.m)
    else:
        rows, (cost, total) = over_shards(wanted.axis_name, rows, target_sums)
    out = outputs(wanted, rows)._replace(loss=cost + total * jnp.log1p(rows.r))
    return out, (x, y, transform, total, rows._replace(costs=None))


def _target_bwd(wanted, residuals, cotangents):
    g = live(cotangents)
    *_, total, rows = residuals
    return _target_linear(wanted, residuals, g, unused_rows(g, jnp.isfinite(rows.r + total)))


# dy_k = g (lse − z_k) = g ((m − z_k) + log1p(r))
def _target_linear(wanted, residuals, g, unused=None):
    del wanted
    x, y, transform, total, rows = residuals
    z, pull = jax.vjp(transformed, x, transform)
    z_, y_ = z.astype(rows.m.dtype), y.astype(rows.m.dtype)
    if unused is not None:
        rows, z_ = without_rows(unused, rows, z_)
        total, y_ = jnp.where(unused, 0, total), jnp.where(unused[..., None], 0, y_)
    m, r = rows.m, rows.r
    dy = jnp.zeros_like(y)
    targets = []
    if g.loss is not None:
        targets = [(g.loss, partial(excess, total, y_))]
        g_ = g.loss[..., None]
        gap = m[..., None] - z_
        far = gap == jnp.inf
        dy = g_ * (jnp.where(far, 0, gap) + jnp.log1p(r)[..., None])
        if unused is not None:  # an infinite cost, of which a linear map can make nothing
            infinite = jnp.where(g_ < 0, -jnp.inf, jnp.where(g_ > 0, jnp.inf, g_))
            dy = jnp.where(far, jax.lax.stop_gradient(infinite), dy)
        dy = dy.astype(y.dtype)
    dz, _ = _cotangents(z_, targets, None, rows, g)
    dx, d_transform = pull(dz.astype(z.dtype))
    return dx, dy, d_transform


@functools.cache
def target_statistics(wanted: Wanted) -> Rule:
    """The rule `(x, y, transform) -> Statistics`, one object for each `wanted`."""
    parts = (_target_fwd, _target_bwd, _target_linear)
    fwd, bwd, tangents = (partial(part, wanted) for part in parts)
    return rule(fwd, bwd, linear=tangents)


def block_rows(  # noqa: PLR0917
    wanted: Wanted, x: jax.Array, transform: Transform, labels: Any, start: Any, weights: Any
) -> Rows:
    """Of raw logits `x [..., C]`, a block of the classes that begins at number `start`."""
    of, scalars = as_function(transform)
    m, r = max_and_remainder(x, None, of, *scalars)
    rows = Rows(m, r)
    if labels is not None:
        own = pick(x, local(labels, start, x.shape[-1]))
        rows = rows._replace(z_label=transformed(own, transform))
    if wanted.entropy:
        rows = rows._replace(gaps=_gap_sum(of, x, m, *scalars))
    if wanted.spread:
        classes, mass, costs = _spread_sums(weights, of, x, m, *scalars)
        rows = rows._replace(classes=classes, mass=mass, costs=costs)
    return rows


def combined(
    rows: Rows,
    highest: Callable[[Any], Any],
    total: Callable[[Any], Any],
    more: Callable[[Any], Any] = lambda _: (),
) -> Any:
    """Blocks of classes as one, by the maximum over them and the sums.

    Of an axis of blocks, `highest` keeps it with size 1 and `total` takes it away. A block that
    reaches the common maximum gives its r, any other all of its (1 + r) e^(m_b − m); of those that
    reach it one maximum is counted. A block of nothing but −inf gives nothing, unless all are such;
    its r is NaN, as that of a block with +inf or NaN, which the whole row takes on.
    `more(m)` is summed along.
    """
    m = highest(rows.m)
    reached = rows.m == m
    empty = (rows.m == -jnp.inf) & ~reached
    rise = jnp.where(empty | reached | ~jnp.isfinite(m), 0, m - rows.m)
    scale = jnp.where(empty, 0, jnp.exp(-rise))
    # Nothing of an empty block enters a product, whose derivative would be NaN.
    r = jnp.where(empty, 0, rows.r)
    moved = rows._replace(m=None, r=jnp.where(reached, r, (1 + r) * scale))
    if rows.gaps is not None:
        gaps = jnp.where(empty, 0, rows.gaps)
        moved = moved._replace(gaps=scale * (gaps + rise * (1 + r)))
    if rows.costs is not None:
        moved = moved._replace(costs=rows.costs + rise * rows.mass)
    tops, moved, extra = total((reached.astype(r.dtype), moved, more(m)))
    rows = moved._replace(m=m.reshape(tops.shape), r=moved.r + (tops - 1))
    return (rows, extra) if extra else rows


def over_shards(axis_name: AxisName, rows: Rows, more: Callable[[Any], Any] = lambda _: ()) -> Any:
    """The blocks of all devices along a manual mesh axis as one: one maximum and one sum."""
    return combined(rows, partial(maximum_over, axis_name), partial(sum_over, axis_name), more)


def local(labels: jax.Array, start: Any, size: int) -> jax.Array:
    """Labels as numbers within a block of classes; −1 for those of other blocks."""
    shifted = labels - start
    return jnp.where((labels >= 0) & (shifted >= 0) & (shifted < size), shifted, -1)


def with_label(statistics: Statistics, labels: jax.Array) -> Statistics:
    """The loss is NaN where the label is out of range."""
    loss = statistics.loss
    return statistics._replace(loss=loss + nan_where(labels < 0, loss.dtype))


def outputs(wanted: Wanted, rows: Rows) -> Statistics:
    """The statistics of whole rows; the loss of a label, where there is one."""
    m, r, z_label, gaps, classes, mass, costs = rows
    log1p_r = jnp.log1p(r)
    return Statistics(
        None if z_label is None else (m - z_label) + log1p_r,
        log_sum_exp(m, r) if wanted.lse else None,
        None if gaps is None else log1p_r + gaps / (1 + r),
        None if classes is None else (costs + mass * log1p_r) / classes,
    )


def live(cotangents: Statistics) -> Statistics:
    """Cotangents with None for a symbolic zero."""
    return Statistics(*(None if isinstance(c, SymbolicZero) else c for c in cotangents))


def poisoned(g: Statistics, labels: jax.Array) -> Statistics:
    """NaN where a label is out of range, unless that token's loss is not used."""
    if g.loss is None:
        return g
    invalid = (labels < 0) & (g.loss != 0)
    return g._replace(loss=g.loss + nan_where(invalid, g.loss.dtype))


def unused_rows(g: Statistics, known: jax.Array) -> jax.Array | None:
    """Rows without a known log-sum-exp of which nothing is used: their gradient is 0, not NaN.

    Other rows need no such care, and must have none: 0 times a finite gradient is 0, but its
    derivative by the cotangent is not.
    """
    asked = [c != 0 for c in g if c is not None]
    return ~known & ~functools.reduce(jnp.logical_or, asked) if asked else None


def without_rows(unused: jax.Array, rows: Rows, z: jax.Array) -> tuple[Rows, jax.Array]:
    """Finite numbers in place of all that is in these rows."""
    rows = jax.tree.map(lambda s: jnp.where(unused, 0, s), rows)
    if rows.classes is not None:
        rows = rows._replace(classes=jnp.where(unused, 1, rows.classes))
    return rows, jnp.where(unused[..., None], 0, z)


def label_cotangents(  # noqa: PLR0917
    z: jax.Array, labels: Any, weights: Any, rows: Rows, g: Statistics, unused: Any
) -> tuple[jax.Array, Any]:
    """Cotangents in `z`, in its dtype, and in `weights`; labels of −1 are in another block.

    Every entry as if it were not the label's, then the label's own in its place: one number a row,
    so that the loop over all classes holds no more than a select (XLA:CPU, [4096, 32000] float32,
    in place: 34 ms with the label's form inside it, 28 so; 25 with a scatter, which would keep
    logits that are not an argument, and so twice their memory). Rounded once, at the end: selected
    in bfloat16, a training step in place of [16384, 10] takes 2.5 times as long.
    """
    dtype = z.dtype
    if unused is not None:
        rows, z = without_rows(unused, rows, z)
    targets = [] if g.loss is None else [(g.loss, lambda e, _: e)]
    dz, d_weights = _cotangents(z, targets, weights, rows, g)
    if g.loss is None:
        return dz.astype(dtype), d_weights
    own_weight = None
    if weights is not None:
        own_weight = pick(jnp.broadcast_to(_as_row(weights, z.ndim), z.shape), labels)[..., None]
    targets = [(g.loss, lambda e, r: (e - 1) - r[..., None])]
    own, _ = _cotangents(rows.z_label[..., None], targets, own_weight, rows, g)
    at_label = one_hot(labels, z.shape[-1])
    return jnp.where(at_label, own, dz).astype(dtype), d_weights


# dz_i = Σ g (Y ŷ_i − y_i) over targets and spread + g_lse ŷ_i + g_entropy ŷ_i ((m − z_i) − μ)
# with the mean gap μ = Σ_k ŷ_k (m − z_k)
def _cotangents(z, targets, weights, rows, g):
    m, r = rows.m, rows.r
    scale = 1 / (1 + r)
    e = shifted_exp(z, m)
    terms = []
    d_weights = None
    if g.spread is not None:
        inside, gap, u = _inside(z, m, weights)
        share = g.spread / rows.classes
        targets = [*targets, (share, partial(excess, rows.mass, u))]
        if weights is not None:
            cost = share[..., None] * jnp.where(inside, gap + jnp.log1p(r)[..., None], 0)
            d_weights = jnp.sum(cost, axis=tuple(range(cost.ndim - weights.ndim))).astype(
                weights.dtype
            )
    for share, beyond in targets:
        terms.append((share * scale)[..., None] * beyond(e, r))
    if g.lse is not None:
        terms.append((g.lse * scale)[..., None] * e)
    if g.entropy is not None:
        _, gap, _ = _inside(z, m, None)
        mean_gap = rows.gaps * scale
        terms.append((g.entropy * scale)[..., None] * e * (gap - mean_gap[..., None]))
    if not terms:
        return jnp.zeros_like(upcast(z)), d_weights
    return functools.reduce(jnp.add, terms), d_weights


def _gap_sum(of, x, m, *scalars):
    """Σ_k e_k (m − z_k) of each row of z = of(x); a logit of −inf gives 0."""

    def terms(x, m, *scalars):
        z = of(x, *scalars)
        return (shifted_exp(z, m) * _inside(z, m, None)[1],)

    return row_sums(terms, x, m, *scalars)[0]


def _spread_sums(weights, of, x, m, *scalars):
    """Over each row's classes that are not at −inf: their number, Σ u_k, and Σ u_k (m − z_k)."""
    if weights is None:

        def terms(x, m, *scalars):
            _, gap, one = _inside(of(x, *scalars), m, None)
            return one, gap

        classes, costs = row_sums(terms, x, m, *scalars)
        return classes, classes, costs
    z = of(x, *scalars)
    inside, _, u = _inside(z, m, weights)
    has_sum, z, m = rows_with_sum(z, m)  # that another row is NaN, its r says
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
