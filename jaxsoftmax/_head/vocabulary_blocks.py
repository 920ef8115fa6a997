# SPDX-License-Identifier: Apache-2.0
"""The linear head by blocks of classes: the statistics of each token, for any cotangents."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._axes import labels_in_block
from .._cpu import as_bits, from_bits, slice_in_loop
from .._merge import NO_CLASS, BlockSums, merge_blocks, merge_shards
from .._numerics import NEAR, accumulation_dtype, one_hot
from .._rules import values, with_derivative
from .._sharding import (
    AxisName,
    is_local,
    manual_axes,
    resharded,
    resharded_like,
    shard_start,
    sum_over,
    varying,
)
from .._statistics import (
    StatisticsSpec,
    block_sums,
    known_rows,
    label_cotangents,
    nan_where_invalid,
    none_if_zero,
    outputs,
    rows_without_cotangent,
    sums_at,
    with_label,
)
from .._transform import transformed
from .counted import (
    Counted,
    chunk,
    chunked_in_order,
    first_in_order,
    first_steps,
    loop,
    of_first,
    only_counted,
    restored,
    zeros_of,
)
from .layout import HeadSharding
from .products import (
    Products,
    as_cotangents,
    perturbed,
    scale_for_float16,
    split_perturbed,
    undo_scale,
)
from .sizes import ByPlatform, by_platform

# The first classes, from the highest of which a row is measured, and how many rows are measured
# again at once where that is far below the maximum.
_FEW, _AGAIN = 256, 256


class Plan(NamedTuple):
    """What is fixed while tracing."""

    block: int  # classes in a block, of each shard of the classes
    rows: int  # tokens of each shard that are taken at once, if only some count
    in_rows: bool  # so in the gradients as well, not the first that hold them all
    products: Products
    spec: StatisticsSpec
    sharding: HeadSharding
    axis_name: AxisName | None  # the manual mesh axes that shard the classes
    in_bits: bool  # slices of kernel and d_kernel as integers (`_cpu.in_bits`)


class Operands(NamedTuple):
    """What the statistics are a function of; gradients come in the same structure."""

    hidden: Any  # [N, H]
    kernel: Any  # [H, V], or [V, H] where the products say so
    bias: Any  # [V] or None
    transform: Any
    weights: Any  # [V] or None, of the spread
    labels: Any  # [N], from `label_index`, or [N, K] where rows are measured from their maximum


# Where an explicit mesh shards the classes, or an automatic one may, the class axis becomes two,
# [shards, V / shards]: each shard goes over its own blocks, and shards are merged once, at the end.
@partial(jax.custom_vjp, nondiff_argnums=(0,))
def linear_statistics(plans: ByPlatform, operands, counted: Counted | None):
    """`token_statistics` of the rows of `hidden @ kernel + bias`; any for those not counted."""
    return _results(plans, operands, counted)[0]


def _results(plans, operands, counted):
    """The statistics, and the `BlockSums` of whole rows, each `[N]`."""
    leaves, tree = jax.tree.flatten((operands, counted))
    spec = plans.cpu.spec
    names = [name for name, wanted in _wanted(spec)._asdict().items() if wanted]

    def function(*leaves):
        return tuple(jax.tree.leaves(by_platform(_forward, plans, *tree.unflatten(leaves))))

    def at_m(m, *leaves):
        return tuple(jax.tree.leaves(by_platform(_at_m, plans, tree.unflatten(leaves)[0], m)))

    # m may be held constant: what is computed from (z, m, r) does not depend on it.
    sums = with_derivative(function, lambda found, *leaves: at_m(found[0], *leaves), *leaves)
    sums = BlockSums(**dict(zip(names, sums, strict=True)))
    return with_label(outputs(spec, sums), operands.labels), sums


def _wanted(spec):
    """Which of the sums there are."""
    spread = (spec.spread,) * 3
    return BlockSums(True, True, True, spec.entropy, *spread)._replace(top=spec.prediction)


def _forward(plan, operands, counted):
    """The `BlockSums` of whole rows."""
    # Once: what is gathered again in a loop would be sent again.
    operands = operands._replace(kernel=plan.sharding.gathered(operands.kernel))
    few = _highest_of_few(plan, operands) if plan.spec.from_label else None
    sums, far = _of_counted(plan, counted, operands, few)
    if few is not None:
        sums = _again(plan, operands, sums, far)
    if plan.sharding.class_shards > 1:
        sums = merged(sums, 1)
    return sums if plan.axis_name is None else merge_shards(plan.axis_name, sums)


def _of_counted(plan, counted, operands, few):
    """The sums, and which rows are far; 0 for rows in chunks without a token that counts."""

    def of_rows(hidden, labels, few):
        rows = operands._replace(hidden=hidden, labels=labels)
        return (_from_maximum(plan, rows), None) if few is None else _from_few(plan, rows, *few)

    rows = operands.hidden, operands.labels, few
    if counted is None:
        return of_rows(*rows)
    chunks, steps = _in_chunks(plan, counted, rows), counted.steps(plan.rows)
    found = first_steps(lambda _, rows: (None, of_rows(*rows)), None, chunks, steps)[1]
    return jax.tree.map(partial(restored, plan.sharding, counted), found)


def _in_chunks(plan, counted, tree, *, last=True):
    """Arrays `[N, …]` as [chunks, rows, …], in order."""
    split = partial(chunked_in_order, plan.sharding, counted, plan.rows, 1, last=last)
    return jax.tree.map(split, tree)


def _from_few(plan, operands, c, of_label):
    """The sums of each shard's classes, measured from the label or the first few classes.

    With c the highest of those but the label, s = Σ_{k≠t} exp(z_k − c) and z_t come from one pass,
    which needs no block of logits after its sum: docs/forms.md, section 14. And which rows are
    to be measured again: those of which c is far below the maximum.
    """
    sums = _summed_at(plan, operands, c, beside_label=True)
    s, z = sums.r, sums.z_label
    top = of_label & (z >= c)
    m = jnp.where(top, z, c)
    below = jnp.where(of_label, jnp.exp(jnp.minimum(z - c, 0)), 0)
    r = jnp.where(top, s * jnp.exp(c - m), (s - 1) + below)
    sums = sums._replace(m=m, r=r)
    if sums.costs is not None:
        sums = sums._replace(costs=sums.costs + sums.mass * (m - c))
    return sums, ~(s < NEAR)  # NaN too


def _highest_of_few(plan, operands):
    """The highest of a shard's first logits but the label's; whether the shard has the label."""
    block = _by_shard(plan, operands)
    size = block.kernel.shape[_class_axis(plan)]
    few = min(_FEW, size)
    raw = _block_logits(plan, block, plan.products.operand(block.hidden), 0, few)
    z = transformed(raw, operands.transform)
    first = _first_class(plan, block, 0)
    labels = _per_row(plan, operands.labels)
    other = ~one_hot(labels_in_block(labels, first, few), few)
    highest = jnp.max(jnp.where(other, z, -jnp.inf), axis=-1)
    return highest, labels_in_block(labels, first, size) >= 0


def _again(plan, operands, sums, far):
    """The sums, from the maximum in rows that are far: usually none, and a loop of no step."""
    n = operands.hidden.shape[0]
    rows = min(n, _AGAIN) if isinstance(n, int) else n  # n: symbolic in an export
    if rows == n or not is_local(operands.hidden, operands.kernel):

        def all_again(step, sums):
            # XLA would do it before the loop, and always.
            hidden, _ = lax.optimization_barrier((operands.hidden, step))
            found = _from_maximum(plan, operands._replace(hidden=hidden))
            return jax.tree.map(lambda s, f: jnp.where(far, f, s), sums, found)

        return lax.fori_loop(0, jnp.any(far).astype(jnp.int32), all_again, sums)
    (index,) = jnp.nonzero(far, size=-(-n // rows) * rows, fill_value=n)

    def some_again(i, sums):
        at = lax.dynamic_slice_in_dim(index, i * rows, rows)
        hidden, labels = (x.at[at].get(mode="clip") for x in (operands.hidden, operands.labels))
        found = _from_maximum(plan, operands._replace(hidden=hidden, labels=labels))
        return jax.tree.map(lambda s, f: s.at[at].set(f, mode="drop"), sums, found)

    return lax.fori_loop(0, (jnp.sum(far, dtype=jnp.int32) + (rows - 1)) // rows, some_again, sums)


def _from_maximum(plan, operands):
    """The sums of each shard's classes: blocks from their own maximum, merged one by one."""
    spec = plan.spec._replace(from_label=False)

    def merge(sums, own):
        both = jax.tree.map(lambda *pair: jnp.stack(pair), sums, own)
        return merged(both, 0)

    def of_block(raw, transform, labels, first, weights):
        return block_sums(spec, raw, transform, labels, first, weights)

    return _summed(plan, operands, of_block, merge, -jnp.inf)


def _at_m(plan, operands, m):
    """The sums over every class, from a shift m `[N]`; a derivative of them holds m constant."""
    plan = plan._replace(spec=plan.spec._replace(prediction=False))
    sums = _summed_at(plan, operands, _per_row(plan, m), beside_label=False)
    if plan.sharding.class_shards > 1:
        sums = jax.tree.map(partial(jnp.sum, axis=1), sums)
    return sums if plan.axis_name is None else sum_over(plan.axis_name, sums)


def _summed_at(plan, operands, m, *, beside_label):
    def of_block(raw, transform, labels, first, weights):
        index = labels_in_block(labels, first, raw.shape[-1])
        return sums_at(plan.spec, raw, transform, index, weights, m, beside_label=beside_label)

    return _summed(plan, operands, of_block, partial(jax.tree.map, jnp.add), 0)


def _summed(plan, operands, of_block, merge, least):
    """`of_block` of every block's raw logits, merged one after the other; m begins with `least`."""
    labels = _per_row(plan, operands.labels)

    def step(sums, raw, first, weights):
        return merge(sums, of_block(raw, operands.transform, labels, first, weights))

    sharding = plan.sharding
    axes = manual_axes(*jax.tree.leaves(operands))
    shards = (sharding.class_shards,) if sharding.class_shards > 1 else ()
    shape = (operands.hidden.shape[0], *shards)
    zeros = varying(jnp.zeros(shape, accumulation_dtype(plan.products.dtype)), axes)
    zeros = sharding.resharded(zeros, sharding.token_axes, *_of_shards(plan))
    none = BlockSums(*(zeros if wanted else None for wanted in _wanted(plan.spec)))
    if labels.ndim > zeros.ndim:
        several = (*zeros.shape, labels.shape[-1])
        none = none._replace(z_label=jnp.broadcast_to(zeros[..., None], several))
    if plan.spec.prediction:
        none = none._replace(top=zeros.astype(jnp.int32) + NO_CLASS)
    return over_logits(plan, operands, step, none._replace(m=zeros + least))


def over_logits(
    plan: Plan, operands: Operands, step: Callable[..., Any], carry: Any, apart: int = 0
) -> Any:
    """`step(carry, raw, first, weights)` of every block's raw logits, one after the other.

    `first` is the number of the block's first class (of each shard), `weights` its part of them.
    The first `apart` classes of a shard, or all, are a block of their own, before the loop.
    """
    operands = _by_shard(plan, operands)
    hidden = plan.products.operand(operands.hidden)

    def of_block(carry, start, size):
        raw = _block_logits(plan, operands, hidden, start, size)
        weights = _part(operands.weights, start, size)
        return step(carry, raw, _first_class(plan, operands, start), weights)

    apart = min(apart, operands.kernel.shape[_class_axis(plan)])
    carry = of_block(carry, 0, apart) if apart else carry
    return _over_blocks(plan, of_block, carry, operands, apart)


def merged(sums: BlockSums, axis: int) -> BlockSums:
    """Merges the blocks along an axis of the sums."""
    max_over = partial(jnp.max, axis=axis, keepdims=True)
    return merge_blocks(sums, max_over, partial(jax.tree.map, partial(jnp.sum, axis=axis)))


def _linear_statistics_fwd(plans, operands, counted):
    operands, flags = split_perturbed(operands)
    counted = values(counted)
    out, sums = _results(plans, operands, counted)
    return out, (operands, counted, sums._replace(costs=None, top=None), flags)


def _linear_statistics_bwd(plans, residuals, cotangents):
    given, counted, sums, flags = residuals
    g = nan_where_invalid(none_if_zero(cotangents), given.labels)
    unused = rows_without_cotangent(g, known_rows(sums, given.labels))
    run = partial(by_platform, _gradients, plans)
    return only_counted(run, counted, given, sums, g, unused, flags), None


def _gradients(plan, counted, given, sums, g, unused, flags):  # noqa: PLR0917
    """The cotangents of the operands, block by block."""
    wants, sharding = perturbed(flags, given), plan.sharding
    operands = _by_shard(plan, given)
    everywhere = partial(varying, axes=manual_axes(*jax.tree.leaves((operands, g))))
    # So its cotangents are summed over devices once, at the end, not by every block's derivative.
    transform = jax.tree.map(everywhere, operands.transform)
    per_row = _per_row(plan, (operands.labels, sums, g, unused))
    rows = plan.products.operand(operands.hidden), *per_row
    symbolic = not isinstance(given.hidden.shape[0], int)
    # A chunk of d_hidden could not be added to without summing it over the shards, in every step.
    apart = sharding.class_shards > 1
    run = partial(_over_classes, plan, operands._replace(transform=transform), wants, everywhere)
    if counted is None or (apart and symbolic):
        d_hidden, *sums = run(None, rows)
    elif symbolic or (plan.in_rows and not apart):
        *rest, g, unused = rows
        chunks = (
            *_in_chunks(plan, counted, rest),
            _in_chunks(plan, counted, g, last=False),
            _in_chunks(plan, counted, unused),
        )
        d_hidden, *sums = run(counted.steps(plan.rows), chunks)
        d_hidden = None if d_hidden is None else restored(sharding, counted, d_hidden)
    else:

        def of_first_rows(count, rows):
            first = jax.tree.map(partial(first_in_order, sharding, counted, count), rows)
            d_hidden, *sums = run(None, first)
            if d_hidden is not None:
                d_hidden = restored(sharding, counted, d_hidden, 0)
                if manual_axes(d_hidden) <= manual_axes(given.hidden):
                    # Nothing is to be added to it: of a condition each result is an array.
                    d_hidden = d_hidden.astype(given.hidden.dtype)
            return d_hidden, *sums

        n, number = counted.order.shape[1], counted.number
        d_hidden, *sums = of_first(of_first_rows, n, number, rows)
    return as_cotangents(Operands(d_hidden, *sums, labels=None), given)


def _over_classes(plan, operands, wants, everywhere, steps, rows):  # noqa: PLR0917
    """The cotangents, but of labels, for these rows, or chunks of rows of which `steps` count."""
    sharding, axis = plan.sharding, _class_axis(plan)
    tokens, classes = sharding.token_axes, sharding.classes
    kernel, bias, weights = operands.kernel, operands.bias, operands.weights
    hidden, dtype = rows[0], rows[2].m.dtype
    chunks = [None] * (hidden.ndim - 2)
    whole = sharding.of_kernel(None, *_of_shards(plan), None)
    # An unreduced array has no bits.
    as_slices = as_bits if plan.in_bits and sharding.mesh is None else lambda x: x
    of_rows = partial(_of_rows, plan, operands, wants)
    written = partial(lax.dynamic_update_slice_in_dim, axis=-1)

    def step(carry, start, size):
        d_hidden, d_kernel, d_bias, d_transform, d_weights = carry
        found = _of_block(steps, partial(of_rows, start, size), rows, d_hidden)
        d_hidden, (of_kernel, of_bias, of_transform, of_weights) = found
        if wants.kernel:
            d = as_slices(of_kernel.astype(kernel.dtype))
            d = sharding.split_kernel(d, unreduced=tokens)
            d_kernel = lax.dynamic_update_slice_in_dim(d_kernel, d, start, axis)
        if wants.bias:
            d_bias = written(d_bias, of_bias.astype(bias.dtype), start)
        if of_weights is not None:
            d_weights = written(d_weights, of_weights, start)
        d_transform = jax.tree.map(jnp.add, d_transform, of_transform)
        return d_hidden, d_kernel, d_bias, d_transform, d_weights

    of_hidden = sharding.spec(*chunks, tokens, None, unreduced=classes)
    of_kernel = sharding.spec(*whole, unreduced=tokens)
    of_bias = sharding.spec(*_of_shards(plan), None, unreduced=tokens)
    start = (
        resharded(jnp.zeros(hidden.shape, dtype), of_hidden) if wants.hidden else None,
        resharded(as_slices(jnp.zeros_like(kernel)), of_kernel) if wants.kernel else None,
        resharded(jnp.zeros_like(bias), of_bias) if wants.bias else None,
        jax.tree.map(jnp.zeros_like, operands.transform),
        None if weights is None else resharded_like(jnp.zeros_like(weights), weights),
    )
    carry = _over_blocks(plan, step, jax.tree.map(everywhere, start), operands)
    d_hidden, d_kernel, d_bias, d_transform, d_weights = carry
    d_hidden = sharding.resharded(d_hidden, *chunks, tokens, None)  # summed in float32
    d_kernel = None if d_kernel is None else from_bits(d_kernel, kernel.dtype)
    d_kernel = sharding.merge_kernel(d_kernel, unreduced=tokens)
    d_bias = sharding.merge_classes(d_bias, unreduced=tokens)
    return d_hidden, d_kernel, d_bias, d_transform, sharding.merge_classes(d_weights)


def _of_block(steps, of_rows, rows, total) -> Any:
    """`total` with all rows' d_hidden by a block's classes, and what else `of_rows` sums."""
    if steps is None:
        d_hidden, sums = of_rows(rows)
        return None if d_hidden is None else total + d_hidden, sums

    def step(i, carry):
        total, sums = carry
        d_hidden, own = of_rows(chunk(rows, i))
        if d_hidden is not None:
            d_hidden = chunk(total, i) + d_hidden
            total = lax.dynamic_update_index_in_dim(total, d_hidden, i, 0)
        return total, jax.tree.map(jnp.add, sums, own)

    hidden, *_ = rows
    sums = zeros_of(lambda: of_rows(chunk(rows, 0))[1])
    return loop(steps, hidden.shape[0], step, (total, sums))


def _of_rows(plan, operands, wants, start, size, rows) -> Any:  # noqa: PLR0917
    """By a block's classes: some rows' d_hidden, and the block's part of the sums over rows."""
    sharding, products, transform = plan.sharding, plan.products, operands.transform
    tokens, classes = sharding.token_axes, sharding.classes
    hidden, labels, sums, g, unused = rows
    raw = _block_logits(plan, operands, hidden, start, size)
    z, pull = jax.vjp(transformed, raw, transform)
    index = labels_in_block(labels, _first_class(plan, operands, start), size)
    weights = _part(operands.weights, start, size)
    dz, d_weights = label_cotangents(z, index, weights, sums, g, unused)
    d_raw, d_transform = pull(dz)
    d_hidden, d_kernel, d_bias = None, None, None
    if wants.bias:
        of_bias = sharding.spec(*_of_shards(plan), None, unreduced=tokens)
        d_bias = lax.reduce_sum(d_raw, (0,), out_sharding=of_bias)
    d_raw, scale = scale_for_float16(d_raw, products.dtype)
    d_raw = sharding.merge_classes(d_raw, tokens)
    if wants.kernel:
        spec = sharding.spec(*sharding.of_kernel(None, classes), unreduced=tokens)
        d_kernel = undo_scale(products.d_kernel(hidden, d_raw, spec), scale)
    if wants.hidden:
        block = sharding.merge_kernel(_block(plan, operands, start, size))
        spec = sharding.spec(tokens, None, unreduced=classes)
        d_hidden = undo_scale(products.d_hidden(d_raw, block, spec), scale)
    return d_hidden, (d_kernel, d_bias, d_transform, d_weights)


linear_statistics.defvjp(_linear_statistics_fwd, _linear_statistics_bwd, symbolic_zeros=True)


def _by_shard(plan, operands):
    """Operands with the classes as [shards, V / shards], and nothing else of the kernel sharded."""
    sharding = plan.sharding

    def split(x):
        return sharding.split_classes(sharding.resharded(x, sharding.classes))

    return operands._replace(
        kernel=sharding.split_kernel(sharding.gathered(operands.kernel)),
        bias=split(operands.bias),
        weights=split(operands.weights),
    )


def _class_axis(plan):
    """The axis of a kernel with the classes of a shard."""
    return -1 if plan.products.class_axis == 1 else -2


def _of_shards(plan):
    """The mesh axes of the array axis that counts shards, where there is one."""
    return () if plan.sharding.class_shards == 1 else (plan.sharding.classes,)


def _per_row(plan, tree):
    """Numbers per row `[N]` as `[N, 1]` where there is an axis of shards."""
    return tree if plan.sharding.class_shards == 1 else jax.tree.map(lambda s: s[:, None], tree)


def _first_class(plan, operands, start):
    """The number of the class that a block begins with; of each shard's block, `[1, shards]`."""
    shards, size = plan.sharding.class_shards, operands.kernel.shape[_class_axis(plan)]
    first = shard_start(plan.axis_name, shards * size) + start
    if shards == 1:
        return first
    of_shards = size * jnp.arange(shards, dtype=jnp.int32)[None]
    return first + plan.sharding.resharded(of_shards, None, plan.sharding.classes)


def _over_blocks(plan, step, carry, operands, begin=0):
    """`step(carry, start, size)` over a shard's classes: full blocks in a loop, then the rest."""
    whole, rest = divmod(operands.kernel.shape[_class_axis(plan)] - begin, plan.block)
    if whole:
        carry = lax.scan(
            lambda carry, i: (step(carry, begin + i * plan.block, plan.block), None),
            carry,
            jnp.arange(whole, dtype=jnp.int32),
        )[0]
    return step(carry, begin + whole * plan.block, rest) if rest else carry


def _block_logits(plan, operands, hidden, start, size):
    """The raw logits of a block, `[N, size]`; `[N, shards, size]` where there is such an axis."""
    sharding = plan.sharding
    block = sharding.merge_kernel(_block(plan, operands, start, size))
    logits = plan.products.logits(hidden, block, None)
    logits = sharding.split_classes(logits, sharding.token_axes)
    bias = _part(operands.bias, start, size)
    return logits if bias is None else logits + bias.astype(logits.dtype)[None]


def _block(plan, operands, start, size):
    """A block of the kernel's classes."""
    sliced = slice_in_loop if plan.in_bits else lax.dynamic_slice_in_dim
    return sliced(operands.kernel, start, size, _class_axis(plan))


def _part(vector, start, size):
    return None if vector is None else lax.dynamic_slice_in_dim(vector, start, size, axis=-1)
