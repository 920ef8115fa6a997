# SPDX-License-Identifier: Apache-2.0
"""The linear head by blocks of classes: the statistics of each token, for any cotangents."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._axes import labels_in_block
from .._cpu import as_bits, from_bits, slice_in_loop
from .._merge import BlockSums, merge_blocks, merge_shards
from .._numerics import accumulation_dtype
from .._sharding import (
    AxisName,
    hidden_axis_whole,
    manual_axes,
    resharded,
    resharded_like,
    shard_start,
    varying,
)
from .._statistics import (
    StatisticsSpec,
    block_sums,
    label_cotangents,
    nan_where_invalid,
    none_if_zero,
    outputs,
    rows_without_cotangent,
    with_label,
)
from .._transform import transformed
from .layout import HeadSharding
from .products import (
    as_cotangents,
    dot,
    perturbed,
    product,
    scale_for_float16,
    split_perturbed,
    undo_scale,
)


class Plan(NamedTuple):
    """What is fixed while tracing."""

    block: int  # classes in a block, of each shard of the classes
    precision: Any
    spec: StatisticsSpec
    sharding: HeadSharding
    axis_name: AxisName | None  # the manual mesh axes that shard the classes


class Operands(NamedTuple):
    """What the statistics are a function of; gradients come in the same structure."""

    hidden: Any  # [N, H]
    kernel: Any  # [H, V]
    bias: Any  # [V] or None
    transform: Any
    weights: Any  # [V] or None, of the spread
    labels: Any  # [N], from `label_index`


# Where an explicit mesh shards the classes, or an automatic one may, the class axis becomes two,
# [shards, V / shards]: each shard goes over its own blocks, and shards are merged once, at the end.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_statistics(plan, operands):
    """`token_statistics` of the rows of `hidden @ kernel + bias`."""
    return with_label(outputs(plan.spec, _forward(plan, operands)), operands.labels)


def _forward(plan, operands):
    """The `BlockSums` of whole rows, each `[N]`."""
    spec, sharding = plan.spec, plan.sharding
    operands = _by_shard(plan, operands)
    labels = _per_row(plan, operands.labels)
    axes = manual_axes(*jax.tree.leaves(operands))
    shape = (operands.hidden.shape[0], *operands.kernel.shape[1:-1])
    zeros = varying(jnp.zeros(shape, accumulation_dtype(operands.hidden.dtype)), axes)
    zeros = sharding.resharded(zeros, sharding.token_axes, *_of_shards(plan))

    def step(sums, start, size):
        raw = _block_logits(plan, operands, start, size)
        weights = _part(operands.weights, start, size)
        first = _first_class(plan, operands, start)
        own = block_sums(spec, raw, operands.transform, labels, first, weights)
        both = jax.tree.map(lambda *pair: jnp.stack(pair), sums, own)
        return _merged(both, 0)

    none = BlockSums(zeros - jnp.inf, zeros, zeros)
    if spec.entropy:
        none = none._replace(gaps=zeros)
    if spec.spread:
        none = none._replace(classes=zeros, mass=zeros, costs=zeros)
    sums = _over_blocks(plan, step, none, operands.kernel.shape[-1])
    if sharding.class_shards > 1:
        sums = _merged(sums, 1)
    return sums if plan.axis_name is None else merge_shards(plan.axis_name, sums)


def _merged(sums, axis):
    """Merges the blocks along an axis of the sums."""
    max_over = partial(jnp.max, axis=axis, keepdims=True)
    return merge_blocks(sums, max_over, partial(jax.tree.map, partial(jnp.sum, axis=axis)))


def _linear_statistics_fwd(plan, operands):
    operands, flags = split_perturbed(operands)
    sums = _forward(plan, operands)
    out = with_label(outputs(plan.spec, sums), operands.labels)
    return out, (operands, sums._replace(costs=None), flags)


def _linear_statistics_bwd(plan, residuals, cotangents):
    given, sums, flags = residuals
    wants, sharding = perturbed(flags, given), plan.sharding
    tokens, classes = sharding.token_axes, sharding.classes
    operands = _by_shard(plan, given)
    hidden, kernel, bias, transform, weights, labels = operands
    g = nan_where_invalid(none_if_zero(cotangents), labels)
    unused = rows_without_cotangent(g, jnp.isfinite(sums.r))
    sums, g, unused, labels = _per_row(plan, (sums, g, unused, labels))
    dtype = sums.m.dtype
    everywhere = partial(varying, axes=manual_axes(*jax.tree.leaves((operands, g))))
    # So its cotangents are summed over devices once, at the end, not by every block's derivative.
    transform = jax.tree.map(everywhere, transform)
    of_hidden = sharding.spec(tokens, None, unreduced=classes)
    of_kernel = sharding.spec(None, *_of_shards(plan), None, unreduced=tokens)
    of_bias = sharding.spec(*_of_shards(plan), None, unreduced=tokens)
    as_slices = as_bits if sharding.mesh is None else lambda x: x  # an unreduced array has no bits

    def step(carry, start, size):
        d_hidden, d_kernel, d_bias, d_transform, d_weights = carry
        raw = _block_logits(plan, operands, start, size)
        z, pull = jax.vjp(transformed, raw, transform)
        index = labels_in_block(labels, _first_class(plan, operands, start), size)
        dz, d = label_cotangents(z, index, _part(weights, start, size), sums, g, unused)
        if d is not None:
            d_weights = lax.dynamic_update_slice_in_dim(d_weights, d, start, axis=-1)
        d_raw, d = pull(dz)
        d_transform = jax.tree.map(jnp.add, d_transform, d)
        if wants.bias:
            d = lax.reduce_sum(d_raw, (0,), out_sharding=of_bias)
            d_bias = lax.dynamic_update_slice_in_dim(d_bias, d.astype(bias.dtype), start, axis=-1)
        d_raw, scale = scale_for_float16(d_raw, kernel.dtype)
        d_raw = sharding.merge_classes(d_raw, tokens)
        if wants.kernel:
            spec = sharding.spec(None, classes, unreduced=tokens)
            d = undo_scale(dot(hidden, d_raw, ((0,), (0,)), plan.precision, spec), scale)
            d = sharding.split_classes(as_slices(d.astype(kernel.dtype)), None, unreduced=tokens)
            d_kernel = lax.dynamic_update_slice_in_dim(d_kernel, d, start, axis=-1)
        if wants.hidden:
            block = sharding.merge_classes(slice_in_loop(kernel, start, size, axis=-1), None)
            d = dot(d_raw, block, ((1,), (1,)), plan.precision, of_hidden)
            d_hidden = d_hidden + undo_scale(d, scale)
        return d_hidden, d_kernel, d_bias, d_transform, d_weights

    start = (
        resharded(jnp.zeros(hidden.shape, dtype), of_hidden) if wants.hidden else None,
        resharded(as_slices(jnp.zeros_like(kernel)), of_kernel) if wants.kernel else None,
        resharded(jnp.zeros_like(bias), of_bias) if wants.bias else None,
        jax.tree.map(jnp.zeros_like, transform),
        None if weights is None else resharded_like(jnp.zeros_like(weights), weights),
    )
    carry = _over_blocks(plan, step, jax.tree.map(everywhere, start), kernel.shape[-1])
    d_hidden, d_kernel, d_bias, d_transform, d_weights = carry
    d_hidden = sharding.resharded(d_hidden, tokens, None)  # summed in float32
    d_kernel = None if d_kernel is None else from_bits(d_kernel, kernel.dtype)
    d_kernel = sharding.merge_classes(d_kernel, None, unreduced=tokens)
    d_bias = sharding.merge_classes(d_bias, unreduced=tokens)
    ds = Operands(d_hidden, d_kernel, d_bias, d_transform, sharding.merge_classes(d_weights), None)
    return (as_cotangents(ds, given),)


linear_statistics.defvjp(_linear_statistics_fwd, _linear_statistics_bwd, symbolic_zeros=True)


def _by_shard(plan, operands):
    """Operands with the classes as [shards, V / shards], and nothing else of the kernel sharded."""
    sharding = plan.sharding

    def split(x, *before):
        x = sharding.resharded(x, *before, sharding.classes)
        return sharding.split_classes(x, *before)

    return operands._replace(
        kernel=split(hidden_axis_whole(operands.kernel), None),
        bias=split(operands.bias),
        weights=split(operands.weights),
    )


def _of_shards(plan):
    """The mesh axes of the array axis that counts shards, where there is one."""
    return () if plan.sharding.class_shards == 1 else (plan.sharding.classes,)


def _per_row(plan, tree):
    """Numbers per row `[N]` as `[N, 1]` where there is an axis of shards."""
    return tree if plan.sharding.class_shards == 1 else jax.tree.map(lambda s: s[:, None], tree)


def _first_class(plan, operands, start):
    """The number of the class that a block begins with; of each shard's block, `[1, shards]`."""
    shards, size = plan.sharding.class_shards, operands.kernel.shape[-1]
    first = shard_start(plan.axis_name, shards * size) + start
    if shards == 1:
        return first
    of_shards = size * jnp.arange(shards, dtype=jnp.int32)[None]
    return first + plan.sharding.resharded(of_shards, None, plan.sharding.classes)


def _over_blocks(plan, step, carry, classes):
    """`step(carry, start, size)` over a shard's classes: full blocks in a loop, then the rest."""
    whole, rest = divmod(classes, plan.block)
    if whole:
        carry = lax.scan(
            lambda carry, i: (step(carry, i * plan.block, plan.block), None),
            carry,
            jnp.arange(whole, dtype=jnp.int32),
        )[0]
    return step(carry, whole * plan.block, rest) if rest else carry


def _block_logits(plan, operands, start, size):
    """The raw logits of a block, `[N, size]`; `[N, shards, size]` where there is such an axis."""
    sharding = plan.sharding
    block = sharding.merge_classes(slice_in_loop(operands.kernel, start, size, axis=-1), None)
    logits = product(operands.hidden, block, None, plan.precision)
    logits = sharding.split_classes(logits, sharding.token_axes)
    bias = _part(operands.bias, start, size)
    return logits if bias is None else logits + bias.astype(logits.dtype)[None]


def _part(vector, start, size):
    return None if vector is None else lax.dynamic_slice_in_dim(vector, start, size, axis=-1)
