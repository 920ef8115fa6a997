# SPDX-License-Identifier: Apache-2.0
"""The linear head by chunks of tokens: any loss per token, its gradient while its logits exist."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._rules import instantiated
from .._sharding import (
    hidden_axis_whole,
    manual_axes,
    psum_like,
    resharded,
    resharded_like,
    varying,
)
from .closures import Closed
from .layout import HeadSharding
from .products import (
    add_product,
    as_cotangents,
    dot,
    finite_if_counted,
    perturbed,
    product,
    scale_for_float16,
    split_perturbed,
    undo_scale,
)


class Plan(NamedTuple):
    """What is fixed while tracing."""

    loss: Closed | None  # (consts, logits [c, V], *args [c, ...]) -> [c]
    size: int  # tokens in a chunk, of each shard of the tokens
    precision: Any
    sharding: HeadSharding
    weighted: bool = False  # weights may be 0, and the loss of weight 0 need not be finite


class Operands(NamedTuple):
    """What the losses are a function of; gradients come in the same structure."""

    hidden: Any  # [N, H]
    kernel: Any  # [H, V]
    bias: Any  # [V] or None
    args: Any  # each [N, ...]
    consts: Any  # what the loss closes over


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_sum(plan, operands, weights):
    """Σ weights · loss over the tokens, with `weights [N]`: a scalar."""
    return jnp.sum(_counted(plan, _over_chunks(plan, operands), weights) * weights)


# The forward pass computes the gradient: three products per chunk. The backward pass scales it.
def _weighted_sum_fwd(plan, operands, weights):
    operands, flags = split_perturbed(operands)
    weights = weights.value
    values, ds = _gradients_over_chunks(plan, operands, weights, flags)
    values = _counted(plan, values, weights)
    # The same tree, whatever is differentiated (`split_perturbed`).
    ds = jax.tree.map(lambda _, d: jnp.zeros(0) if d is None else d, operands, ds)
    return jnp.sum(values * weights), (ds, flags, values, operands, weights)


def _weighted_sum_bwd(plan, residuals, g):
    ds, flags, values, operands, weights = residuals
    g = instantiated(g)

    def scaled(flag, d):
        dtype = np.promote_types(d.dtype, g.dtype)
        return g.astype(dtype) * d.astype(dtype) if flag else None

    ds = jax.tree.map(scaled, perturbed(flags, operands), ds)
    return as_cotangents(ds, operands), psum_like(g * values, weights)


weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd, symbolic_zeros=True)


def _counted(plan, losses, weights):
    return finite_if_counted(losses, weights) if plan.weighted else losses


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def losses(plan, operands):
    """The losses `[N]`."""
    return _over_chunks(plan, operands)


def _losses_fwd(plan, operands):
    operands, flags = split_perturbed(operands)
    return _over_chunks(plan, operands, differentiated=True), (operands, flags)


# For any cotangent: the chunks are recomputed.
def _losses_bwd(plan, residuals, g):
    operands, flags = residuals
    ds = _gradients_over_chunks(plan, operands, instantiated(g), flags)[1]
    return (as_cotangents(ds, operands),)


losses.defvjp(_losses_fwd, _losses_bwd, symbolic_zeros=True)


def _over_chunks(plan, operands, *, differentiated=False):
    """The losses [N]: one product per chunk.

    If `differentiated`, they come from the loss's vjp: a loss with a `custom_vjp` has no jvp, but
    its forward rule has one, and forward mode over reverse mode needs it.
    """
    kernel, bias = _gathered(plan, operands)

    def body(_, xs):
        hidden, args = xs
        logits = product(hidden, kernel, bias, plan.precision)
        loss = lambda logits: plan.loss(operands.consts, logits, *args)  # noqa: E731
        values = jax.vjp(loss, logits)[0] if differentiated else loss(logits)
        return None, values.astype(logits.dtype)

    losses = lax.scan(body, None, chunked(plan, (operands.hidden, operands.args)))[1]
    return _unchunked(plan, losses, operands.hidden.shape[0])


def first_chunk(plan: Plan, operands: Operands) -> list[jax.Array]:
    """What the loss is called with for the first chunk: logits `[c, V]`, its part of the args."""
    kernel, bias = _gathered(plan, operands)
    hidden, args = jax.tree.map(lambda x: x[0], chunked(plan, (operands.hidden, operands.args)))
    return [product(hidden, kernel, bias, plan.precision), *args]


def _gathered(plan, operands):
    """Kernel and bias with only their classes sharded: gathered once, before the loop."""
    sharding = plan.sharding
    kernel = sharding.resharded(hidden_axis_whole(operands.kernel), None, sharding.classes)
    return kernel, sharding.resharded(operands.bias, sharding.classes)


def _gradients_over_chunks(plan, operands, g, flags):
    """The losses `[N]` and their gradients for the cotangents `g [N]`, None if not asked for.

    A chunk's d_logits is computed in float32 and then cast to the operands' dtype for the products;
    d_kernel and d_bias accumulate in float32. Where tokens are sharded, both are summed over
    devices in float32 after the loop: each device sums its part of d_kernel, and the parts are
    gathered after the cast to the kernel's dtype.
    """
    wants = perturbed(flags, operands)
    (kernel, bias), dtype, sharding = _gathered(plan, operands), g.dtype, plan.sharding
    tokens, classes = sharding.token_axes, sharding.classes
    of_kernel = sharding.spec(None, classes, unreduced=tokens)
    of_bias = sharding.spec(classes, unreduced=tokens)
    axes = manual_axes(g, *jax.tree.leaves(operands))
    of_logits = wants.hidden or wants.kernel or wants.bias

    def zeros_if(flag, array, spec):
        return resharded(varying(jnp.zeros(array.shape, dtype), axes), spec) if flag else None

    def zeros_like_if(flag, array):
        # The cotangents of `array` come summed over the axes that it does not vary over.
        if not flag:
            return None
        zeros = jnp.zeros(array.shape, np.promote_types(array.dtype, dtype))
        return resharded_like(varying(zeros, manual_axes(array)), array)

    def body(sums, xs):
        hidden, args, g = xs
        logits = product(hidden, kernel, bias, plan.precision)
        wanted = (of_logits, *wants.args, *wants.consts)
        values, d, d_args, d_of_consts = _pulled(plan, logits, args, operands.consts, g, wanted)
        d_hidden = None
        d_kernel, d_bias, d_consts = sums
        if of_logits:
            if wants.bias:
                d_bias = d_bias + lax.reduce_sum(d, (0,), out_sharding=of_bias)
            d_logits, scale = scale_for_float16(d, kernel.dtype)
            if wants.hidden:
                spec = sharding.spec(tokens, None, unreduced=classes)
                d_hidden = dot(d_logits, kernel, ((1,), (1,)), plan.precision, spec)
                d_hidden = undo_scale(d_hidden, scale)
            if wants.kernel:
                d_kernel = add_product(d_kernel, hidden, d_logits, scale, plan.precision, of_kernel)
        d_consts = tuple(
            None if total is None else total + resharded_like(own.astype(total.dtype), total)
            for total, own in zip(d_consts, d_of_consts, strict=True)
        )
        return (d_kernel, d_bias, d_consts), (values.astype(dtype), d_hidden, d_args)

    sums = (
        zeros_if(wants.kernel, kernel, of_kernel),
        None if bias is None else zeros_if(wants.bias, bias, of_bias),
        tuple(map(zeros_like_if, wants.consts, operands.consts)),
    )
    xs = chunked(plan, (operands.hidden, operands.args, g), zero_last=True)
    sums, (values, d_hidden, d_args) = lax.scan(body, sums, xs)
    n = operands.hidden.shape[0]
    d_hidden = sharding.resharded(d_hidden, None, tokens, None)
    values, d_hidden, d_args = jax.tree.map(
        partial(_unchunked, plan, n=n), (values, d_hidden, d_args)
    )
    d_kernel, d_bias, d_consts = sums
    if d_kernel is not None:
        d_kernel = hidden_axis_whole(d_kernel)
        d_kernel = resharded(d_kernel, sharding.of_summed_kernel(operands.kernel))
    d_bias = sharding.resharded(d_bias, classes)
    return values, Operands(d_hidden, d_kernel, d_bias, d_args, d_consts)


def _pulled(plan, logits, args, consts, g, wanted):  # noqa: PLR0917
    """The losses `[c]` of a chunk, and the cotangents of what is `wanted`, None for the rest."""
    primals, first = (logits, *args, *consts), 1 + len(args)
    chosen = [i for i, flag in enumerate(wanted) if flag]

    def loss(*active):
        full = list(primals)
        for i, value in zip(chosen, active, strict=True):
            full[i] = value
        return plan.loss(full[first:], *full[:first])

    values, pull = jax.vjp(loss, *(primals[i] for i in chosen))
    g = varying(g.astype(values.dtype), manual_axes(values))
    ds: list[Any] = [None] * len(primals)
    for i, d in zip(chosen, pull(g), strict=True):
        ds[i] = finite_if_counted(d, g) if plan.weighted and i < first else d
    return values, ds[0], tuple(ds[1:first]), tuple(ds[first:])


def chunked(plan: Plan, tree: Any, *, zero_last: bool = False) -> Any:
    """Arrays [N, …] as [chunks, c, …]: token i·chunks + j of each shard is the i-th of chunk j.

    Strided, so that a token axis sharded on an automatic mesh stays where it is too. Padding
    repeats the last token, so that it gives nothing (a NaN, say) that a real token would not give.
    With `zero_last` the last array of the tree, the cotangents, is padded with 0.
    """
    leaves, treedef = jax.tree.flatten(tree)
    sharding, size = plan.sharding, plan.size
    shards, tokens = math.prod(sharding.token_shards), sharding.token_axes

    def split(x, of_last):
        n, rest = x.shape[0] // shards, x.shape[1:]
        chunks, of_rest = -(-n // size), sharding.rest(x, 1)
        x = sharding.reshape(x, (shards, n, *rest), tokens, None, *of_rest)
        missing = chunks * size - n
        if missing != 0:  # or it is symbolic, in an export, and may be 0
            last = x[:, -1:] if of_last else jnp.zeros_like(x[:, -1:])
            last = jnp.broadcast_to(last, (shards, missing, *rest))
            x = jnp.concatenate([x, last], axis=1)
        x = sharding.reshape(x, (shards, size, chunks, *rest), tokens, None, None, *of_rest)
        x = jnp.moveaxis(x, 2, 0)
        return sharding.reshape(x, (chunks, shards * size, *rest), None, tokens, *of_rest)

    of_last = [True] * len(leaves)
    of_last[-1] = not zero_last
    return treedef.unflatten(map(split, leaves, of_last))


def _unchunked(plan, y, n):
    """Undoes `chunked` for one array [chunks, c, …], of `n` tokens."""
    sharding = plan.sharding
    shards, tokens = math.prod(sharding.token_shards), sharding.token_axes
    chunks, rest, of_rest = y.shape[0], y.shape[2:], sharding.rest(y, 2)
    y = sharding.reshape(y, (chunks, shards, plan.size, *rest), None, tokens, None, *of_rest)
    y = jnp.moveaxis(y, 0, 2)
    y = sharding.reshape(y, (shards, plan.size * chunks, *rest), tokens, None, *of_rest)
    return sharding.reshape(y[:, : n // shards], (n, *rest), tokens, *of_rest)
