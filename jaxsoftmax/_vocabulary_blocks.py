# SPDX-License-Identifier: Apache-2.0
"""The linear head by blocks of the vocabulary: log-probabilities, for any cotangents."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._cross_entropy import (
    Rows,
    Statistics,
    gap_sum,
    live_cotangents,
    logit_cotangents,
    transformed,
)
from ._numerics import accumulation_dtype, log_sum_exp, max_and_remainder, merge, pick
from ._products import dot, opened, product
from ._sharding import restored, sliceable


class Plan(NamedTuple):
    """What is fixed while tracing."""

    block: int
    precision: Any
    with_entropy: bool = False


class Operands(NamedTuple):
    """What the statistics are a function of; gradients come in the same shape."""

    hidden: Any  # [N, H]
    kernel: Any  # [H, V]
    bias: Any  # [V] or None
    scalars: Any  # (soft_cap, temperature)
    labels: Any  # [N], from `to_index`


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_statistics(plan, operands):
    """`token_statistics` of the rows of `hidden @ kernel + bias`."""
    return _forward(plan, operands)[0]


def _forward(plan, operands):
    n = operands.hidden.shape[0]
    dtype = accumulation_dtype(operands.hidden.dtype)

    def step(carry, start, size):
        m, r, gaps, z_label = carry
        z = transformed(_block_logits(plan, operands, start, size), operands.scalars)
        local = _local(operands.labels, start, size)
        m_block, r_block = max_and_remainder(z)
        m_new, r_new, scale, scale_block = merge(m, r, m_block, r_block)
        if plan.with_entropy:
            # Σ e (M − z) of a block: its own sum, moved from its maximum to the common one.
            def moved(gaps, r, m, scale):
                return jnp.where(scale == 0, 0, scale * (gaps + (m_new - m) * (1 + r)))

            own = gap_sum(z, m_block)
            gaps = moved(gaps, r, m, scale) + moved(own, r_block, m_block, scale_block)
        z_label = jnp.where(local >= 0, pick(z, local), z_label)
        return m_new, r_new, gaps, z_label

    start = (
        jnp.full(n, -jnp.inf, dtype),
        jnp.full(n, jnp.nan, dtype),
        jnp.zeros(n, dtype),
        jnp.full(n, jnp.nan, dtype),
    )
    m, r, gaps, z_label = _over_blocks(plan, step, start, operands.kernel.shape[1])
    mean_gap = gaps / (1 + r)
    log1p_r = jnp.log1p(r)
    out = Statistics((m - z_label) + log1p_r, log_sum_exp(m, r), log1p_r + mean_gap)
    return out, Rows(m, r, mean_gap)


def _linear_statistics_fwd(plan, operands):
    operands, live = opened(operands)
    out, rows = _forward(plan, operands)
    return out, (operands, rows, live)


def _linear_statistics_bwd(plan, residuals, cotangents):
    operands, rows, live = residuals
    live = jax.tree.unflatten(jax.tree.structure(operands), live.flags)
    hidden, kernel, bias, scalars, labels = operands
    g = live_cotangents(cotangents, labels)
    dtype = rows.m.dtype

    def step(carry, start, size):
        d_hidden, d_kernel, d_bias, d_scalars = carry
        raw = _block_logits(plan, operands, start, size)
        z, pull = jax.vjp(transformed, raw, scalars)
        dz = logit_cotangents(z, _local(labels, start, size), rows, g)
        d_raw, d_scalars_block = pull(dz)
        d_scalars = jax.tree.map(jnp.add, d_scalars, d_scalars_block)
        if live.bias:
            d = jnp.sum(d_raw, axis=0).astype(bias.dtype)
            d_bias = lax.dynamic_update_slice_in_dim(d_bias, d, start, axis=0)
        d_raw = d_raw.astype(kernel.dtype)
        if live.kernel:
            d = sliceable(dot(hidden, d_raw, (0, 0), plan.precision).astype(kernel.dtype))
            d_kernel = lax.dynamic_update_slice_in_dim(d_kernel, d, start, axis=1)
        if live.hidden:
            block = _columns(kernel, start, size)
            d_hidden = d_hidden + dot(d_raw, block, (1, 1), plan.precision)
        return d_hidden, d_kernel, d_bias, d_scalars

    start = (
        jnp.zeros(hidden.shape, dtype) if live.hidden else None,
        sliceable(jnp.zeros_like(kernel)) if live.kernel else None,
        jnp.zeros_like(bias) if live.bias else None,
        jax.tree.map(jnp.zeros_like, scalars),
    )
    d_hidden, d_kernel, d_bias, d_scalars = _over_blocks(plan, step, start, kernel.shape[1])
    d_hidden = None if d_hidden is None else d_hidden.astype(hidden.dtype)
    d_kernel = None if d_kernel is None else restored(d_kernel, kernel.dtype)
    return (Operands(d_hidden, d_kernel, d_bias, d_scalars, None),)


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
    bias = operands.bias
    bias = None if bias is None else lax.dynamic_slice_in_dim(bias, start, size)
    return product(operands.hidden, block, bias, plan.precision)


def _columns(kernel, start, size):
    block = lax.dynamic_slice_in_dim(sliceable(kernel), start, size, axis=1)
    return restored(block, kernel.dtype)


def _local(labels, start, size):
    """Labels as numbers within a block; −1 for those of other blocks."""
    local = labels - start
    return jnp.where((labels >= 0) & (local >= 0) & (local < size), local, -1)
