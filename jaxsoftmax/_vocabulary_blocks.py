# SPDX-License-Identifier: Apache-2.0
"""The linear head by blocks of the vocabulary: log-probabilities, for any cotangents."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from ._numerics import accumulation_dtype
from ._products import asked, dot, opened, product, rounded, times
from ._sharding import (
    Layout,
    as_bits,
    from_bits,
    laid_out,
    laid_out_like,
    manual_axes,
    shard_start,
    slice_in_loop,
    summed_as,
    varying,
)
from ._statistics import (
    Rows,
    Wanted,
    block_rows,
    combined,
    label_cotangents,
    live,
    local,
    outputs,
    over_shards,
    poisoned,
    unused_rows,
    with_label,
)
from ._transform import transformed


class Plan(NamedTuple):
    """What is fixed while tracing."""

    block: int  # classes in a block, of each shard of the classes
    precision: Any
    wanted: Wanted
    layout: Layout


class Operands(NamedTuple):
    """What the statistics are a function of; gradients come in the same shape."""

    hidden: Any  # [N, H]
    kernel: Any  # [H, V]
    bias: Any  # [V] or None
    transform: Any
    weights: Any  # [V] or None, of the spread
    labels: Any  # [N], from `to_index`


# Where an explicit mesh shards the classes, they are two axes within, [shards, V / shards]: each
# shard goes over its own blocks, and all are put together once, at the end.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_statistics(plan, operands):
    """`token_statistics` of the rows of `hidden @ kernel + bias`."""
    return with_label(outputs(plan.wanted, _forward(plan, operands)), operands.labels)


def _forward(plan, operands):
    wanted, layout = plan.wanted, plan.layout
    operands = _by_shard(plan, operands)
    labels = _of_rows(plan, operands.labels)
    axes = manual_axes(*jax.tree.leaves(operands))
    shape = (operands.hidden.shape[0], *operands.kernel.shape[1:-1])
    zeros = varying(jnp.zeros(shape, accumulation_dtype(operands.hidden.dtype)), axes)
    zeros = laid_out(zeros, layout.spec(layout.token_axes, *_of_shards(plan)))

    def step(rows, start, size):
        raw = _block_logits(plan, operands, start, size)
        weights = _part(operands.weights, start, size)
        first = _first_class(plan, operands, start)
        own = block_rows(wanted, raw, operands.transform, labels, first, weights)
        both = jax.tree.map(lambda *pair: jnp.stack(pair), rows, own)
        return combined(both, partial(jnp.max, axis=0, keepdims=True), _sums(0))

    none = Rows(zeros - jnp.inf, zeros, zeros)
    if wanted.entropy:
        none = none._replace(gaps=zeros)
    if wanted.spread:
        none = none._replace(classes=zeros, mass=zeros, costs=zeros)
    rows = _over_blocks(plan, step, none, operands.kernel.shape[-1])
    if layout.class_shards > 1:
        rows = combined(rows, partial(jnp.max, axis=1, keepdims=True), _sums(1))
    if wanted.axis_name is not None:
        rows = over_shards(wanted.axis_name, rows)
    return rows


def _sums(axis):
    return lambda tree: jax.tree.map(lambda s: jnp.sum(s, axis=axis), tree)


def _linear_statistics_fwd(plan, operands):
    operands, live_operands = opened(operands)
    rows = _forward(plan, operands)
    out = with_label(outputs(plan.wanted, rows), operands.labels)
    return out, (operands, rows._replace(costs=None), live_operands)


def _linear_statistics_bwd(plan, residuals, cotangents):
    given, rows, flags = residuals
    wants = jax.tree.unflatten(jax.tree.structure(given), asked(flags))
    layout = plan.layout
    tokens, classes = layout.token_axes, layout.classes
    operands = _by_shard(plan, given)
    hidden, kernel, bias, transform, weights, labels = operands
    g = poisoned(live(cotangents), labels)
    unused = unused_rows(g, jnp.isfinite(rows.r))
    rows, g, unused, labels = _of_rows(plan, (rows, g, unused, labels))
    dtype = rows.m.dtype
    everywhere = partial(varying, axes=manual_axes(*jax.tree.leaves((operands, g))))
    # Its cotangents are added up here, not by every block's derivative.
    transform = jax.tree.map(everywhere, transform)
    of_hidden = layout.spec(tokens, None, unreduced=classes)
    of_kernel = layout.spec(None, *_of_shards(plan), None, unreduced=tokens)
    of_bias = layout.spec(*_of_shards(plan), None, unreduced=tokens)
    as_slices = as_bits if not layout.sharded else lambda x: x  # no bits of a sum to come

    def step(carry, start, size):
        d_hidden, d_kernel, d_bias, d_transform, d_weights = carry
        raw = _block_logits(plan, operands, start, size)
        z, pull = jax.vjp(transformed, raw, transform)
        index = local(labels, _first_class(plan, operands, start), size)
        dz, d = label_cotangents(z, index, _part(weights, start, size), rows, g, unused)
        if d is not None:
            d_weights = lax.dynamic_update_slice_in_dim(d_weights, d, start, axis=-1)
        d_raw, d = pull(dz)
        d_transform = jax.tree.map(jnp.add, d_transform, d)
        if wants.bias:
            d = lax.reduce_sum(d_raw, (0,), out_sharding=of_bias)
            d_bias = lax.dynamic_update_slice_in_dim(d_bias, d.astype(bias.dtype), start, axis=-1)
        d_raw, scale = rounded(d_raw, kernel.dtype)
        d_raw = _joined(plan, d_raw, layout.spec(tokens, classes))
        if wants.kernel:
            spec = layout.spec(None, classes, unreduced=tokens)
            d = dot(hidden, d_raw, ((0,), (0,)), plan.precision, spec)
            d = as_slices(times(scale, d).astype(kernel.dtype))
            d = _split(plan, d, of_kernel)
            d_kernel = lax.dynamic_update_slice_in_dim(d_kernel, d, start, axis=-1)
        if wants.hidden:
            block = _joined(
                plan, slice_in_loop(kernel, start, size, axis=-1), layout.spec(None, classes)
            )
            d = dot(d_raw, block, ((1,), (1,)), plan.precision, of_hidden)
            d_hidden = d_hidden + times(scale, d)
        return d_hidden, d_kernel, d_bias, d_transform, d_weights

    start = (
        laid_out(jnp.zeros(hidden.shape, dtype), of_hidden) if wants.hidden else None,
        laid_out(as_slices(jnp.zeros_like(kernel)), of_kernel) if wants.kernel else None,
        laid_out(jnp.zeros_like(bias), of_bias) if wants.bias else None,
        jax.tree.map(jnp.zeros_like, transform),
        None if weights is None else laid_out_like(jnp.zeros_like(weights), weights),
    )
    sums = _over_blocks(plan, step, jax.tree.map(everywhere, start), kernel.shape[-1])
    d_hidden, d_kernel, d_bias, d_transform, d_weights = sums
    d_kernel = None if d_kernel is None else from_bits(d_kernel, kernel.dtype)
    d_kernel = _joined(plan, d_kernel, layout.spec(None, classes, unreduced=tokens))
    d_bias = _joined(plan, d_bias, layout.spec(classes, unreduced=tokens))
    d_weights = _joined(plan, d_weights, layout.spec(classes))
    ds = Operands(d_hidden, d_kernel, d_bias, d_transform, d_weights, None)
    return (jax.tree.map(lambda x, d: None if d is None else _cast(d, x), given, ds),)


def _cast(d, x):
    """A cotangent as its operand is: summed over devices, in its layout and dtype."""
    return summed_as(laid_out_like(d, x), x).astype(x.dtype)


linear_statistics.defvjp(_linear_statistics_fwd, _linear_statistics_bwd, symbolic_zeros=True)


def _by_shard(plan, operands):
    """Operands with the classes as [shards, V / shards], and nothing else of the kernel sharded."""
    layout = plan.layout

    def split(x, *before):
        x = laid_out(x, layout.spec(*before, layout.classes))
        return _split(plan, x, layout.spec(*before, layout.classes, None))

    return operands._replace(
        kernel=split(operands.kernel, None),
        bias=None if operands.bias is None else split(operands.bias),
        weights=None if operands.weights is None else split(operands.weights),
    )


def _of_shards(plan):
    """The mesh axes of the axis of shards, where there is one."""
    return () if plan.layout.class_shards == 1 else (plan.layout.classes,)


def _of_rows(plan, tree):
    """Numbers a row `[N]`, for every shard."""
    return tree if plan.layout.class_shards == 1 else jax.tree.map(lambda s: s[:, None], tree)


def _split(plan, x, spec):
    """The last axis, classes, as [shards, classes / shards]."""
    shards = plan.layout.class_shards
    if shards == 1:
        return x
    return jnp.reshape(x, (*x.shape[:-1], shards, x.shape[-1] // shards), out_sharding=spec)


def _joined(plan, d, spec):
    """Undoes `_split`: products are of matrices."""
    if d is None or plan.layout.class_shards == 1:
        return d
    return jnp.reshape(d, (*d.shape[:-2], d.shape[-2] * d.shape[-1]), out_sharding=spec)


def _first_class(plan, operands, start):
    """The number of the class that a block begins with; that of each shard, `[1, shards]`."""
    shards, size = plan.layout.class_shards, operands.kernel.shape[-1]
    first = shard_start(plan.wanted.axis_name, shards * size) + start
    if shards == 1:
        return first
    of_shards = size * jnp.arange(shards, dtype=jnp.int32)[None]
    return first + laid_out(of_shards, plan.layout.spec(None, plan.layout.classes))


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
    layout = plan.layout
    of_classes = layout.spec(None, layout.classes)
    block = _joined(plan, slice_in_loop(operands.kernel, start, size, axis=-1), of_classes)
    logits = product(operands.hidden, block, None, plan.precision)
    logits = _split(plan, logits, layout.spec(layout.token_axes, layout.classes, None))
    bias = _part(operands.bias, start, size)
    return logits if bias is None else logits + bias.astype(logits.dtype)[None]


def _part(vector, start, size):
    return None if vector is None else lax.dynamic_slice_in_dim(vector, start, size, axis=-1)
