# SPDX-License-Identifier: Apache-2.0
"""The linear head by chunks of tokens: any per-token loss, its gradient with the logits at hand."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from ._products import add_product, dot, opened, product, times, without_scale
from ._sharding import manual_axes, summed_as, varying


class Plan(NamedTuple):
    """What is fixed while tracing."""

    loss_fn: Callable[..., jax.Array]  # (logits [c, V], *args [c, ...], *consts) -> [c]
    size: int
    precision: Any


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
    return jnp.sum(_over_chunks(plan, operands) * weights)


# The gradient is made in the forward pass: three products a chunk. The backward pass scales it.
def _weighted_sum_fwd(plan, operands, weights):
    operands, live = opened(operands)
    values, gradients = _gradients_over_chunks(plan, operands, weights.value, live)
    return jnp.sum(values * weights.value), (gradients, values, operands, weights.value)


def _weighted_sum_bwd(plan, residuals, g):
    gradients, values, operands, weights = residuals
    g = _instantiated(g)
    return _cast(jax.tree.map(lambda d: g * d, gradients), operands), summed_as(g * values, weights)


weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd, symbolic_zeros=True)


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
    gradients = _gradients_over_chunks(plan, operands, _instantiated(g), live)[1]
    return (_cast(gradients, operands),)


losses.defvjp(_losses_fwd, _losses_bwd, symbolic_zeros=True)


def _over_chunks(plan, operands, *, differentiated=False):
    """The losses [N]: one product a chunk.

    Differentiated, they come from the loss's own vjp: a `custom_vjp` has no jvp, its rule has, and
    forward mode over reverse mode needs it.
    """

    def body(_, xs):
        hidden, args = xs
        logits = product(hidden, operands.kernel, operands.bias, plan.precision)
        loss_fn = lambda logits: plan.loss_fn(logits, *args, *operands.consts)  # noqa: E731
        return None, jax.vjp(loss_fn, logits)[0] if differentiated else loss_fn(logits)

    xs = _chunked((operands.hidden, operands.args), plan.size)
    return _unchunked(lax.scan(body, None, xs)[1], operands.hidden.shape[0])


def _gradients_over_chunks(plan, operands, g, live):
    """The losses and, for the cotangents `g [N]`, the gradients of the live operands, uncast.

    A chunk's d_logits is exact in float32 and then takes the operands' dtype for the products;
    d_kernel and d_bias accumulate in float32.
    """
    live = jax.tree.unflatten(jax.tree.structure(operands), live.flags)
    kernel, bias, dtype = operands.kernel, operands.bias, g.dtype
    axes = manual_axes(g, *jax.tree.leaves(operands))
    head_live = live.hidden or live.kernel or live.bias

    g, scale = without_scale(g, kernel.dtype)

    def zeros_if(flag, array):
        return varying(jnp.zeros(array.shape, dtype), axes) if flag else None

    def body(sums, xs):
        hidden, args, g = xs
        logits = product(hidden, kernel, bias, plan.precision)
        primals = (logits, *args, *operands.consts)
        flags = (head_live, *live.args, *live.consts)
        chosen = [i for i, flag in enumerate(flags) if flag]

        def loss(*active):
            full = list(primals)
            for i, value in zip(chosen, active, strict=True):
                full[i] = value
            return plan.loss_fn(*full)

        values, pull = jax.vjp(loss, *(primals[i] for i in chosen))
        g = varying(g.astype(values.dtype), manual_axes(values))
        d = dict(zip(chosen, pull(g), strict=True))
        d_hidden = None
        d_kernel, d_bias, d_consts = sums
        if head_live:
            d_logits = d[0]
            if live.bias:
                d_bias = d_bias + jnp.sum(d_logits, axis=0)
            d_logits = d_logits.astype(kernel.dtype)
            if live.hidden:
                d_hidden = dot(d_logits, kernel, (1, 1), plan.precision)
            if live.kernel:
                d_kernel = add_product(d_kernel, hidden, d_logits, plan.precision)
        first = 1 + len(args)
        d_args = tuple(d.get(1 + i) for i in range(len(args)))
        d_consts = tuple(
            None if total is None else total + d[first + i].astype(total.dtype)
            for i, total in enumerate(d_consts)
        )
        return (d_kernel, d_bias, d_consts), (values, d_hidden, d_args)

    sums = (
        zeros_if(live.kernel, kernel),
        None if bias is None else zeros_if(live.bias, bias),
        tuple(map(zeros_if, live.consts, operands.consts)),
    )
    xs = _chunked((operands.hidden, operands.args, g), plan.size, zero_last=True)
    sums, per_token = lax.scan(body, sums, xs)
    n = operands.hidden.shape[0]
    values, d_hidden, d_args = jax.tree.map(lambda y: _unchunked(y, n), per_token)
    d_kernel, d_bias, d_consts = sums
    return values, times(scale, Operands(d_hidden, d_kernel, d_bias, d_args, d_consts))


def _chunked(tree, size, *, zero_last=False):
    """[N, …] as [chunks, size, …]: token i·chunks + j is the i-th of chunk j.

    Strided, so that a sharded token axis stays where it is. Padding repeats the last token, so
    that nothing can be made of it that a real token would not give; the cotangents, last in the
    tree where there are any, are padded with 0.
    """
    leaves, treedef = jax.tree.flatten(tree)

    def split(x, mode):
        chunks = -(-x.shape[0] // size)
        pad = ((0, chunks * size - x.shape[0]), *(((0, 0),) * (x.ndim - 1)))
        x = jnp.pad(x, pad, mode=mode) if pad[0][1] else x
        return jnp.swapaxes(x.reshape(size, chunks, *x.shape[1:]), 0, 1)

    modes = ["edge"] * len(leaves)
    if zero_last:
        modes[-1] = "constant"
    return treedef.unflatten(map(split, leaves, modes))


def _unchunked(y, n):
    return jnp.swapaxes(y, 0, 1).reshape(-1, *y.shape[2:])[:n]


def _instantiated(g: Any) -> jax.Array:
    symbolic = isinstance(g, SymbolicZero)
    return jnp.zeros(g.shape, jnp.dtype(g.dtype)) if symbolic else g  # pyright: ignore


def _cast(gradients, operands):
    """Each gradient in the dtype of its operand."""
    leaves, treedef = jax.tree.flatten(operands)
    ds = jax.tree.leaves(gradients, is_leaf=lambda d: d is None)
    # A missing bias is no leaf of the operands.
    ds = ds if operands.bias is not None else [*ds[:2], *ds[3:]]
    return treedef.unflatten(
        None if d is None else summed_as(d, x).astype(x.dtype)
        for x, d in zip(leaves, ds, strict=True)
    )
