# SPDX-License-Identifier: Apache-2.0
"""The linear head by blocks of the vocabulary: log-probabilities, for any cotangents."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._numerics import accumulation_dtype, log_sum_exp, max_and_remainder, merge, pick
from ._products import dot, opened, product, times, without_scale
from ._sharding import manual_axes, restored, sliceable, summed_as, varying
from ._statistics import (
    Rows,
    Statistics,
    gap_sum,
    label_cotangents,
    live,
    poisoned,
    spread_sums,
    transformed,
    used_rows,
)


class Plan(NamedTuple):
    """What is fixed while tracing."""

    block: int
    precision: Any
    with_entropy: bool = False
    with_spread: bool = False


class Operands(NamedTuple):
    """What the statistics are a function of; gradients come in the same shape."""

    hidden: Any  # [N, H]
    kernel: Any  # [H, V]
    bias: Any  # [V] or None
    transform: Any
    weights: Any  # [V] or None, of the spread
    labels: Any  # [N], from `to_index`


class _Sums(NamedTuple):
    """What is merged over blocks, beside (m, r): each relative to the maximum so far."""

    gaps: Any  # Σ e (m − z)
    classes: Any  # those not at −inf
    mass: Any  # Σ u
    costs: Any  # Σ u (m − z)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_statistics(plan, operands):
    """`token_statistics` of the rows of `hidden @ kernel + bias`."""
    return _forward(plan, operands)[0]


def _forward(plan, operands):
    n = operands.hidden.shape[0]
    dtype = accumulation_dtype(operands.hidden.dtype)
    axes = manual_axes(*jax.tree.leaves(operands))
    zeros = varying(jnp.zeros(n, dtype), axes)

    def step(carry, start, size):
        m, r, sums, z_label = carry
        z = transformed(_block_logits(plan, operands, start, size), operands.transform)
        local = _local(operands.labels, start, size)
        m_block, r_block = max_and_remainder(z)
        m_new, r_new, scale, scale_block = merge(m, r, m_block, r_block)
        own = _Sums(zeros, zeros, zeros, zeros)
        if plan.with_entropy:
            own = own._replace(gaps=gap_sum(z, m_block))
        if plan.with_spread:
            classes, mass, costs = spread_sums(z, m_block, _part(operands.weights, start, size))
            own = own._replace(classes=classes, mass=mass, costs=costs)
        sums = jax.tree.map(
            jnp.add,
            _moved(sums, r, m_new - m, scale),
            _moved(own, r_block, m_new - m_block, scale_block),
        )
        z_label = jnp.where(local >= 0, pick(z, local), z_label)
        return m_new, r_new, sums, z_label

    start = (
        zeros - jnp.inf,
        zeros + jnp.nan,
        _Sums(zeros, zeros, zeros, zeros),
        zeros + jnp.nan,
    )
    m, r, sums, z_label = _over_blocks(plan, step, start, operands.kernel.shape[1])
    mean_gap = sums.gaps / (1 + r)
    log1p_r = jnp.log1p(r)
    out = Statistics(
        (m - z_label) + log1p_r,
        log_sum_exp(m, r),
        log1p_r + mean_gap,
        (sums.costs + sums.mass * log1p_r) / sums.classes,
    )
    return out, Rows(m, r, z_label, mean_gap, sums.classes, sums.mass)


def _moved(sums, r, rise, scale):
    """A block's sums, from its maximum to one that is higher by `rise`.

    Of a block of nothing but −inf, nothing enters a product, whose derivative would be NaN.
    """
    empty = scale == 0
    gaps, up, r = (jnp.where(empty, 0, a) for a in (sums.gaps, rise, r))
    costs = sums.costs + jnp.where(sums.mass == 0, 0, rise) * sums.mass
    return sums._replace(gaps=scale * (gaps + up * (1 + r)), costs=costs)


def _linear_statistics_fwd(plan, operands):
    operands, live_operands = opened(operands)
    out, rows = _forward(plan, operands)
    return out, (operands, rows, live_operands)


def _linear_statistics_bwd(plan, residuals, cotangents):
    operands, rows, flags = residuals
    asked = jax.tree.unflatten(jax.tree.structure(operands), flags.flags)
    hidden, kernel, bias, transform, weights, labels = operands
    g, scale = without_scale(poisoned(live(cotangents), labels), kernel.dtype)
    rows = rows._replace(used=used_rows(g))
    dtype = rows.m.dtype

    def step(carry, start, size):
        d_hidden, d_kernel, d_bias, d_transform, d_weights = carry
        raw = _block_logits(plan, operands, start, size)
        z, pull = jax.vjp(transformed, raw, transform)
        local = _local(labels, start, size)
        dz, d = label_cotangents(z, local, _part(weights, start, size), rows, g)
        if d is not None:
            d_weights = lax.dynamic_update_slice_in_dim(d_weights, d, start, axis=0)
        d_raw, d = pull(dz)
        d_transform = jax.tree.map(jnp.add, d_transform, d)
        if asked.bias:
            d = times(scale, jnp.sum(d_raw, axis=0)).astype(bias.dtype)
            d_bias = lax.dynamic_update_slice_in_dim(d_bias, d, start, axis=0)
        d_raw = d_raw.astype(kernel.dtype)
        if asked.kernel:
            d = sliceable(
                times(scale, dot(hidden, d_raw, (0, 0), plan.precision)).astype(kernel.dtype)
            )
            d_kernel = lax.dynamic_update_slice_in_dim(d_kernel, d, start, axis=1)
        if asked.hidden:
            block = _columns(kernel, start, size)
            d_hidden = d_hidden + dot(d_raw, block, (1, 1), plan.precision)
        return d_hidden, d_kernel, d_bias, d_transform, d_weights

    start = (
        jnp.zeros(hidden.shape, dtype) if asked.hidden else None,
        sliceable(jnp.zeros_like(kernel)) if asked.kernel else None,
        jnp.zeros_like(bias) if asked.bias else None,
        jax.tree.map(jnp.zeros_like, transform),
        None if weights is None else jnp.zeros_like(weights),
    )
    axes = manual_axes(*jax.tree.leaves((operands, g)))
    start = jax.tree.map(lambda x: varying(x, axes), start)
    sums = _over_blocks(plan, step, start, kernel.shape[1])
    d_hidden, d_kernel, d_bias, d_transform, d_weights = sums
    d_hidden, d_transform, d_weights = times(scale, (d_hidden, d_transform, d_weights))
    d_hidden = None if d_hidden is None else d_hidden.astype(hidden.dtype)
    d_kernel = None if d_kernel is None else restored(d_kernel, kernel.dtype)
    ds = Operands(d_hidden, d_kernel, d_bias, d_transform, d_weights, None)
    return (jax.tree.map(lambda x, d: None if d is None else summed_as(d, x), operands, ds),)


linear_statistics.defvjp(_linear_statistics_fwd, _linear_statistics_bwd, symbolic_zeros=True)


def _over_blocks(plan, step, carry, classes):
    """`step(carry, start, size)` over the vocabulary: whole blocks in a loop, then the rest."""
    whole, rest = divmod(classes, plan.block)
    if whole:
        carry = lax.scan(
            lambda carry, i: (step(carry, i * plan.block, plan.block), None),
            carry,
            jnp.arange(whole, dtype=jnp.int32),
        )[0]
    return step(carry, whole * plan.block, rest) if rest else carry


def _block_logits(plan, operands, start, size):
    block = _columns(operands.kernel, start, size)
    bias = _part(operands.bias, start, size)
    return product(operands.hidden, block, bias, plan.precision)


def _part(vector, start, size):
    return None if vector is None else lax.dynamic_slice_in_dim(vector, start, size)


def _columns(kernel, start, size):
    block = lax.dynamic_slice_in_dim(sliceable(kernel), start, size, axis=1)
    return restored(block, kernel.dtype)


def _local(labels, start, size):
    """Labels as numbers within a block; −1 for those of other blocks."""
    local = labels - start
    return jnp.where((labels >= 0) & (local >= 0) & (local < size), local, -1)
