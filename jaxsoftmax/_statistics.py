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
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike

from . import _checks
from ._numerics import (
    accumulation_dtype,
    excess,
    log_sum_exp,
    max_and_remainder,
    one_hot,
    pick,
    row_sums,
    shifted_exp,
    upcast,
)
from ._rules import rule


class Statistics(NamedTuple):
    """One number a token each; or their cotangents, None where symbolically zero."""

    loss: Any
    lse: Any
    entropy: Any
    spread: Any


class Rows(NamedTuple):
    """What the derivative needs of each row; None where no live cotangent asks for it."""

    m: jax.Array
    r: jax.Array
    z_label: Any  # z_t [...]; NaN where the label is no class, None for dense targets
    mean_gap: jax.Array | None  # Σ_k ŷ_k (m − z_k), for the entropy
    classes: jax.Array | None  # n, for the spread
    mass: jax.Array | None  # Σ_k u_k over those classes
    used: jax.Array | None = None


class Transform(NamedTuple):
    """What is done to raw logits: scalars, or None for nothing at all."""

    soft_cap: jax.Array | None = None
    temperature: jax.Array | None = None


def as_transform(function: str, soft_cap: ArrayLike | None, temperature: ArrayLike) -> Transform:
    """Check both."""
    if soft_cap is not None:
        soft_cap = _checks.as_positive(function, "soft_cap", soft_cap)
    if isinstance(temperature, (int, float)) and temperature == 1 and temperature is not True:
        return Transform(soft_cap)
    return Transform(soft_cap, _checks.as_positive(function, "temperature", temperature))


def transformed(x: jax.Array, transform: Transform) -> jax.Array:
    """The logits z = soft_cap · tanh(x / soft_cap) / temperature; without either, `x` as it came.

    An infinity stays one: a class left out is not brought back by the cap.
    """
    soft_cap, temperature = transform
    if soft_cap is not None:
        x = upcast(x)
        cap = soft_cap.astype(x.dtype)
        x = jnp.where(jnp.isinf(x), x, cap * jnp.tanh(jnp.where(jnp.isinf(x), 0, x) / cap))
    if temperature is not None:
        x = upcast(x)
        x = x / temperature.astype(x.dtype)
    return x


# Integer labels. `token_statistics` of raw logits `x [..., C]`, `labels [...]` from `to_index`, a
# `Transform` and `weights [C]`, the u_k of the spread (1 where None). Nothing unused is computed:
# jit drops outputs that are not read, and a cotangent that is symbolically zero adds no term.
#
#     loss = (m − z_t) + log1p(r)
def _token_fwd(x, labels, transform, weights):
    z = transformed(x, transform)
    m, r = max_and_remainder(z)
    z_label = pick(z, labels)
    out = _outputs(z, m, r, (m - z_label) + jnp.log1p(r), weights)
    return out, (x, labels, transform, weights, m, r, z_label)


def _token_bwd(residuals, cotangents):
    g = poisoned(live(cotangents), residuals[1])
    return _token_linear(residuals, g, used_rows(g))


def _token_linear(residuals, g, used=None):
    x, labels, transform, weights, m, r, z_label = residuals
    z, pull = jax.vjp(transformed, x, transform)
    rows = _rows(z, m, r, z_label, weights, g, used)
    dz, d_weights = label_cotangents(z, labels, weights, rows, g)
    dx, d_transform = pull(dz)
    return dx, None, d_transform, d_weights


def _token_tangents(residuals, g):
    factor = jnp.where(residuals[1] >= 0, jnp.ones_like(g.loss), jnp.nan)
    return _token_linear(residuals, g._replace(loss=factor * g.loss))


token_statistics = rule(_token_fwd, _token_bwd, linear=_token_tangents)


# The same with a target `y [..., C]` in place of labels: loss = Σ_k y_k (m − z_k) + Y log1p(r)
def _target_fwd(x, y, transform):
    dtype = accumulation_dtype(x.dtype, y.dtype)
    z = transformed(x, transform)
    m, r = (s.astype(dtype) for s in max_and_remainder(z))
    z, y_ = z.astype(dtype), y.astype(dtype)
    gap = m[..., None] - z
    # A gap of ∞ is a logit of −inf, where 0 · ∞ counts as 0; a NaN gap stays NaN.
    cost = jnp.where((y_ == 0) & (gap == jnp.inf), 0, y_ * gap)
    loss = jnp.sum(cost, axis=-1) + jnp.sum(y_, axis=-1) * jnp.log1p(r)
    return _outputs(z, m, r, loss, None), (x, y, transform, m, r)


def _target_bwd(residuals, cotangents):
    g = live(cotangents)
    return _target_linear(residuals, g, used_rows(g))


# dy_k = g (lse − z_k) = g ((m − z_k) + log1p(r))
def _target_linear(residuals, g, used=None):
    x, y, transform, m, r = residuals
    z, pull = jax.vjp(transformed, x, transform)
    z_, y_ = z.astype(m.dtype), y.astype(m.dtype)
    dy = jnp.zeros_like(y)
    targets = []
    if g.loss is not None:
        targets = [(g.loss, partial(excess, jnp.sum(y_, axis=-1), y_))]
        dy = (g.loss[..., None] * ((m[..., None] - z_) + jnp.log1p(r)[..., None])).astype(y.dtype)
    dz, _ = _cotangents(z_, targets, None, _rows(z_, m, r, None, None, g, used), g)
    dx, d_transform = pull(dz.astype(z.dtype))
    return dx, dy, d_transform


target_statistics = rule(_target_fwd, _target_bwd, linear=_target_linear)


def live(cotangents: Statistics) -> Statistics:
    """Cotangents with None for a symbolic zero."""
    return Statistics(*(None if isinstance(c, SymbolicZero) else c for c in cotangents))


def poisoned(g: Statistics, labels: jax.Array) -> Statistics:
    """NaN where a label is no class, unless that token's loss is not used."""
    if g.loss is None:
        return g
    return g._replace(loss=jnp.where((labels >= 0) | (g.loss == 0), g.loss, jnp.nan))


def used_rows(g: Statistics) -> jax.Array | None:
    """Rows of which anything is used: what is not used has no gradient, whatever is in it."""
    asked = [c != 0 for c in g if c is not None]
    return functools.reduce(jnp.logical_or, asked) if asked else None


def label_cotangents(
    z: jax.Array, labels: Any, weights: Any, rows: Rows, g: Statistics
) -> tuple[jax.Array, Any]:
    """Cotangents in `z`, in its dtype, and in `weights`; labels of −1 are in another block.

    Every entry as if it were not the label's, then the label's own in its place: one number a row,
    so that the loop over all classes holds no more than a select (XLA:CPU, [4096, 32000] float32,
    in place: 34 ms with the label's form inside it, 28 so; 25 with a scatter, which would keep
    logits that are not an argument, and so twice their memory).
    """
    targets = [] if g.loss is None else [(g.loss, lambda e, _: e)]
    dz, d_weights = _cotangents(z, targets, weights, rows, g)
    if g.loss is None:
        return dz, d_weights
    own_weight = None if weights is None else weights[jnp.maximum(labels, 0)][..., None]
    targets = [(g.loss, lambda e, r: (e - 1) - r[..., None])]
    own, _ = _cotangents(rows.z_label[..., None], targets, own_weight, rows, g)
    at_label = one_hot(labels, z.shape[-1])
    return jnp.where(at_label, own.astype(z.dtype), dz), d_weights


# dz_i = Σ g (Y ŷ_i − y_i) over targets and spread + g_lse ŷ_i + g_entropy ŷ_i ((m − z_i) − μ)
def _cotangents(z, targets, weights, rows, g):
    m, r, _, mean_gap, classes, mass, used = rows
    scale = 1 / (1 + r)
    e = shifted_exp(z, m)
    terms = []
    d_weights = None
    if g.spread is not None:
        inside, gap, u = _inside(z, m, weights)
        share = g.spread / classes
        targets = [*targets, (share, partial(excess, mass, u))]
        if weights is not None:
            cost = jnp.where(inside, gap + jnp.log1p(r)[..., None], 0)
            cost = _where_used(used, share[..., None] * cost)
            d_weights = jnp.sum(cost.reshape(-1, z.shape[-1]), axis=0).astype(weights.dtype)
    for share, beyond in targets:
        terms.append((share * scale)[..., None] * beyond(e, r))
    if g.lse is not None:
        terms.append((g.lse * scale)[..., None] * e)
    if g.entropy is not None:
        _, gap, _ = _inside(z, m, None)
        terms.append((g.entropy * scale)[..., None] * e * (gap - mean_gap[..., None]))
    if not terms:
        return jnp.zeros_like(z), d_weights
    return _where_used(used, functools.reduce(jnp.add, terms)).astype(z.dtype), d_weights


def _where_used(used, d):
    return d if used is None else jnp.where(used[..., None], d, 0)


def _outputs(z, m, r, loss, weights):
    log1p_r = jnp.log1p(r)
    classes, mass, spread = spread_sums(z, m, weights)
    return Statistics(
        loss,
        log_sum_exp(m, r),
        log1p_r + gap_sum(z, m) / (1 + r),
        (spread + mass * log1p_r) / classes,
    )


def _rows(z, m, r, z_label, weights, g, used):  # noqa: PLR0917
    mean_gap = None if g.entropy is None else gap_sum(z, m) / (1 + r)
    classes, mass = (None, None) if g.spread is None else spread_sums(z, m, weights)[:2]
    return Rows(m, r, z_label, mean_gap, classes, mass, used)


def gap_sum(z: jax.Array, m: jax.Array) -> jax.Array:
    """Σ_k e_k (m − z_k) of each row; a logit of −inf gives 0."""

    def terms(z, m):
        return (shifted_exp(z, m) * _inside(z, m, None)[1],)

    return row_sums(terms, z, m)[0]


def spread_sums(z: jax.Array, m: jax.Array, weights: jax.Array | None) -> tuple[jax.Array, ...]:
    """Over each row's classes that are not at −inf: their number, Σ u_k, and Σ u_k (m − z_k)."""
    if weights is None:

        def terms(z, m):
            _, gap, one = _inside(z, m, None)
            return one, gap

        classes, costs = row_sums(terms, z, m)
        return classes, classes, costs
    inside, gap, u = _inside(z, m, weights)
    classes = jnp.sum(inside, axis=-1, dtype=m.dtype)
    return classes, jnp.sum(u, axis=-1), jnp.sum(u * gap, axis=-1)


def _inside(z, m, weights):
    """Which classes are not at −inf; their m − z_k and u_k, 0 for the others."""
    z = upcast(z)
    inside = z != -jnp.inf
    gap = m[..., None] - z
    u = jnp.ones((), gap.dtype) if weights is None else weights.astype(gap.dtype)
    u = jnp.expand_dims(u, tuple(range(z.ndim - u.ndim)))
    return inside, jnp.where(inside, gap, 0), jnp.where(inside, u, 0)
