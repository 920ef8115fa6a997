# SPDX-License-Identifier: Apache-2.0
"""The linear head by chunks of tokens: any per-token loss, its gradient with the logits at hand."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._closures import Closed
from ._products import add_product, asked, dot, finite_if_counted, opened, product, rounded, times
from ._rules import instantiated
from ._sharding import Layout, laid_out, laid_out_like, manual_axes, summed_as, varying


class Plan(NamedTuple):
    """What is fixed while tracing."""

    loss: Closed | None  # (consts, logits [c, V], *args [c, ...]) -> [c]
    size: int  # tokens in a chunk, of each shard of the tokens
    precision: Any
    layout: Layout
    weighted: bool = False  # weights may be 0, and then the loss need not be finite


class Operands(NamedTuple):
    """What the losses are a function of; gradients come in the same shape."""

    hidden: Any
    kernel: Any
    bias: Any
    args: Any
    consts: Any


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_sum(plan, operands, weights):
    """Σ weights · loss over the tokens: one number."""
    return jnp.sum(_counted(plan, _over_chunks(plan, operands), weights) * weights)


# The gradient is made in the forward pass: three products a chunk. The backward pass scales it.
def _weighted_sum_fwd(plan, operands, weights):
    operands, live = opened(operands)
    weights = weights.value
    values, ds = _gradients_over_chunks(plan, operands, weights, live)
    values = _counted(plan, values, weights)
    ds = [jnp.zeros(0) if d is None else d for d in ds]  # one tree, whatever is differentiated
    return jnp.sum(values * weights), (ds, live, values, operands, weights)


def _weighted_sum_bwd(plan, residuals, g):
    ds, live, values, operands, weights = residuals
    g = instantiated(g)

    def scaled(d):
        dtype = np.promote_types(d.dtype, g.dtype)
        return g.astype(dtype) * d.astype(dtype)

    ds = [scaled(d) if flag else None for d, flag in zip(ds, asked(live), strict=True)]
    return _as_operands(ds, operands), summed_as(g * values, weights)


weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd, symbolic_zeros=True)


def _counted(plan, losses, weights):
    return finite_if_counted(losses, weights) if plan.weighted else losses


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def losses(plan, operands):
    """The losses `[N]`."""
    return _over_chunks(plan, operands)


def _losses_fwd(plan, operands):
    operands, live = opened(operands)
    return _over_chunks(plan, operands, differentiated=True), (operands, live)


# Any cotangent: the chunks are done again.
def _losses_bwd(plan, residuals, g):
    operands, live = residuals
    ds = _gradients_over_chunks(plan, operands, instantiated(g), live)[1]
    return (_as_operands(ds, operands),)


losses.defvjp(_losses_fwd, _losses_bwd, symbolic_zeros=True)


def _over_chunks(plan, operands, *, differentiated=False):
    """The losses [N]: one product a chunk.

    Differentiated, they come from the loss's own vjp: a `custom_vjp` has no jvp, its rule has, and
    forward mode over reverse mode needs it.
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
    """What the loss gets of a chunk: its logits, and its part of the arguments."""
    kernel, bias = _gathered(plan, operands)
    hidden, args = jax.tree.map(lambda x: x[0], chunked(plan, (operands.hidden, operands.args)))
    return [product(hidden, kernel, bias, plan.precision), *args]


def _gathered(plan, operands):
    """Kernel and bias with nothing but their classes sharded: once, before the loop."""
    layout = plan.layout
    kernel = laid_out(operands.kernel, layout.spec(None, layout.classes))
    bias = operands.bias
    return kernel, None if bias is None else laid_out(bias, layout.spec(layout.classes))


def _gradients_over_chunks(plan, operands, g, live):
    """The losses and, for the cotangents `g [N]`, a gradient a leaf: uncast, None if not live.

    A chunk's d_logits is exact in float32 and then takes the operands' dtype for the products;
    d_kernel and d_bias accumulate in float32. Where tokens are sharded, they are summed over
    devices in float32 after the loop, each device its part of d_kernel, which is gathered once it
    has the kernel's dtype.
    """
    live = jax.tree.unflatten(jax.tree.structure(operands), asked(live))
    (kernel, bias), dtype, layout = _gathered(plan, operands), g.dtype, plan.layout
    tokens, classes = layout.token_axes, layout.classes
    of_kernel, of_bias = (layout.spec(*a, unreduced=tokens) for a in ((None, classes), (classes,)))
    axes = manual_axes(g, *jax.tree.leaves(operands))
    head_live = live.hidden or live.kernel or live.bias

    def zeros_if(flag, array, spec):
        return laid_out(varying(jnp.zeros(array.shape, dtype), axes), spec) if flag else None

    def zeros_like_if(flag, array):
        # Its cotangents come summed over the axes that it does not vary over.
        if not flag:
            return None
        zeros = jnp.zeros(array.shape, np.promote_types(array.dtype, dtype))
        return laid_out_like(varying(zeros, manual_axes(array)), array)

    def body(sums, xs):
        hidden, args, g = xs
        logits = product(hidden, kernel, bias, plan.precision)
        flags = (head_live, *live.args, *live.consts)
        values, d, d_args, d_of_consts = _pulled(plan, logits, args, operands.consts, g, flags)
        d_hidden = None
        d_kernel, d_bias, d_consts = sums
        if head_live:
            if live.bias:
                d_bias = d_bias + lax.reduce_sum(d, (0,), out_sharding=of_bias)
            d_logits, scale = rounded(d, kernel.dtype)
            if live.hidden:
                spec = layout.spec(tokens, None, unreduced=classes)
                d_hidden = times(scale, dot(d_logits, kernel, ((1,), (1,)), plan.precision, spec))
            if live.kernel:
                d_kernel = add_product(d_kernel, hidden, d_logits, scale, plan.precision, of_kernel)
        d_consts = tuple(
            None if total is None else total + laid_out_like(own.astype(total.dtype), total)
            for total, own in zip(d_consts, d_of_consts, strict=True)
        )
        return (d_kernel, d_bias, d_consts), (values.astype(dtype), d_hidden, d_args)

    sums = (
        zeros_if(live.kernel, kernel, of_kernel),
        None if bias is None else zeros_if(live.bias, bias, of_bias),
        tuple(map(zeros_like_if, live.consts, operands.consts)),
    )
    xs = chunked(plan, (operands.hidden, operands.args, g), zero_last=True)
    sums, (values, d_hidden, d_args) = lax.scan(body, sums, xs)
    n = operands.hidden.shape[0]
    if d_hidden is not None:
        d_hidden = laid_out(d_hidden, layout.spec(None, tokens, None))
    values, d_hidden, d_args = jax.tree.map(
        partial(_unchunked, plan, n=n), (values, d_hidden, d_args)
    )
    d_kernel, d_bias, d_consts = sums
    if d_kernel is not None:
        d_kernel = laid_out(d_kernel, layout.scattered(operands.kernel))
    if d_bias is not None:
        d_bias = laid_out(d_bias, layout.spec(classes))
    of_head = [d_hidden, d_kernel] if bias is None else [d_hidden, d_kernel, d_bias]
    return values, [*of_head, *d_args, *d_consts]


def _pulled(plan, logits, args, consts, g, flags):  # noqa: PLR0917
    """The losses of a chunk, and of all flagged that they are made of the cotangents, else None."""
    primals, first = (logits, *args, *consts), 1 + len(args)
    chosen = [i for i, flag in enumerate(flags) if flag]

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
    """[N, …] as [chunks, c, …]: of each shard, token i·chunks + j is the i-th of chunk j.

    Strided, so that a token axis that is sharded unseen stays where it is too. Padding repeats the
    last token, so that nothing can be made of it that a real token would not give; the cotangents,
    last in the tree where there are any, are padded with 0.
    """
    leaves, treedef = jax.tree.flatten(tree)
    layout, size = plan.layout, plan.size
    shards = math.prod(layout.token_shards)

    def split(x, of_last):
        n, rest = x.shape[0] // shards, x.shape[1:]
        chunks, of_rest = -(-n // size), layout.rest(x, 1)
        spec = layout.spec(layout.token_axes, None, *of_rest)
        x = jnp.reshape(x, (shards, n, *rest), out_sharding=spec)
        missing = chunks * size - n
        if missing != 0:  # or it is symbolic, in an export, and may be 0
            last = x[:, -1:] if of_last else jnp.zeros_like(x[:, -1:])
            last = jnp.broadcast_to(last, (shards, missing, *rest))
            x = jnp.concatenate([x, last], axis=1)
        spec = layout.spec(layout.token_axes, None, None, *of_rest)
        x = jnp.moveaxis(jnp.reshape(x, (shards, size, chunks, *rest), out_sharding=spec), 2, 0)
        spec = layout.spec(None, layout.token_axes, *of_rest)
        return jnp.reshape(x, (chunks, shards * size, *rest), out_sharding=spec)

    of_last = [True] * len(leaves)
    of_last[-1] = not zero_last
    return treedef.unflatten(map(split, leaves, of_last))


def _unchunked(plan, y, n):
    layout = plan.layout
    shards = math.prod(layout.token_shards)
    rest, of_rest = y.shape[2:], layout.rest(y, 2)
    spec = layout.spec(None, layout.token_axes, None, *of_rest)
    chunks = y.shape[0]
    y = jnp.reshape(y, (chunks, shards, plan.size, *rest), out_sharding=spec)
    y = jnp.moveaxis(y, 0, 2)
    spec = layout.spec(layout.token_axes, None, *of_rest)
    y = jnp.reshape(y, (shards, plan.size * chunks, *rest), out_sharding=spec)[:, : n // shards]
    return jnp.reshape(y, (n, *rest), out_sharding=layout.spec(layout.token_axes, *of_rest))


def _as_operands(ds, operands):
    """Each gradient as its operand is: summed over devices, in its dtype and layout."""
    leaves, treedef = jax.tree.flatten(operands)
    return treedef.unflatten(
        None if d is None else laid_out_like(summed_as(d, x).astype(x.dtype), x)
        for x, d in zip(leaves, ds, strict=True)
    )
