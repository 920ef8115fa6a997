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
from .._rules import values as values_of
from .._sharding import (
    hidden_axis_whole,
    manual_axes,
    psum_like,
    resharded,
    resharded_like,
    varying,
)
from .closures import Closed
from .counted import (
    Counted,
    chunked_in_order,
    first_steps,
    in_chunks,
    of_first,
    only_counted,
    restored,
)
from .layout import HeadSharding
from .products import (
    Products,
    add_to_kernel,
    as_cotangents,
    finite_if_counted,
    in_one_scale,
    perturbed,
    scale_for_float16,
    split_perturbed,
    undo_scale,
)
from .sizes import ByPlatform, Chunks, by_platform


class Plan(NamedTuple):
    """What is fixed while tracing."""

    loss: Closed | None  # (consts, logits [c, V], *args [c, ...]) -> [c]
    chunks: Chunks
    products: Products
    sharding: HeadSharding
    pieces: int = 1  # into which an automatic mesh may cut the tokens, if only some count
    weighted: bool = False  # weights may be 0, and the loss of weight 0 need not be finite
    rounded: bool = False  # d_kernel is rounded by its product, in the forward pass

    @property
    def size(self) -> int:
        """The tokens of a shard in a chunk."""
        return self.chunks.size // self.pieces


class Operands(NamedTuple):
    """What the losses are a function of; gradients come in the same structure."""

    hidden: Any  # [N, H]
    kernel: Any  # [H, V], or [V, H] where the products say so
    bias: Any  # [V] or None
    args: Any  # each [N, ...]
    consts: Any  # what the loss closes over


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def weighted_sum(plans: ByPlatform, operands, weights, counted: Counted | None):
    """Σ weights · loss over the tokens, with `weights [N]`: a scalar."""
    losses = only_counted(partial(_values, plans, False), counted, operands)
    return jnp.sum(_counted(plans, losses, weights) * weights)


# The forward pass computes the gradient: three products per chunk. The backward pass scales it.
def _weighted_sum_fwd(plans, operands, weights, counted):
    operands, flags = split_perturbed(operands)
    weights, counted = weights.value, values_of(counted)
    values, ds = _gradients(plans, counted, operands, weights, flags)
    values = _counted(plans, values, weights)
    # The same tree, whatever is differentiated (`split_perturbed`).
    ds = jax.tree.map(lambda _, d: jnp.zeros(0) if d is None else d, operands, ds)
    return jnp.sum(values * weights), (ds, flags, values, operands, weights)


def _weighted_sum_bwd(plans, residuals, g):
    ds, flags, values, operands, weights = residuals
    g = instantiated(g)

    def scaled(flag, d):
        dtype = np.promote_types(d.dtype, g.dtype)
        return g.astype(dtype) * d.astype(dtype) if flag else None

    ds = jax.tree.map(scaled, perturbed(flags, operands), ds)
    return as_cotangents(ds, operands), psum_like(g * values, weights), None


weighted_sum.defvjp(_weighted_sum_fwd, _weighted_sum_bwd, symbolic_zeros=True)


def _counted(plans, losses, weights):
    return finite_if_counted(losses, weights) if plans.cpu.weighted else losses


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def losses(plans: ByPlatform, operands, counted: Counted | None):
    """The losses `[N]`; 0 for tokens that do not count."""
    return only_counted(partial(_values, plans, False), counted, operands)


def _losses_fwd(plans, operands, counted):
    operands, flags = split_perturbed(operands)
    counted = values_of(counted)
    values = only_counted(partial(_values, plans, True), counted, operands)
    return values, (operands, counted, flags)


# For any cotangent: the chunks are recomputed.
def _losses_bwd(plans, residuals, g):
    operands, counted, flags = residuals
    ds = _gradients(plans, counted, operands, instantiated(g), flags)[1]
    return as_cotangents(ds, operands), None


losses.defvjp(_losses_fwd, _losses_bwd, symbolic_zeros=True)


def _values(plans, differentiated, counted, operands):
    return by_platform(partial(_over_chunks, differentiated), plans, counted, operands)


def _gradients(plans, counted, operands, g, flags):
    """`_gradients_over_chunks` by the platform, of the chunks with a token that counts."""
    run = partial(by_platform, _gradients_over_chunks, plans)
    return only_counted(run, counted, operands, g, flags)


def _over_chunks(differentiated, plan, counted, operands):
    """The losses [N]: one product per chunk.

    If `differentiated`, they come from the loss's vjp: a loss with a `custom_vjp` has no jvp, but
    its forward rule has one, and forward mode over reverse mode needs it.
    """
    counted = in_chunks(counted, plan.size)
    kernel, bias = _gathered(plan, operands)

    def body(_, xs):
        hidden, args = xs
        logits = plan.products.logits(hidden, kernel, bias)
        loss = lambda logits: plan.loss(operands.consts, logits, *args)  # noqa: E731
        values = jax.vjp(loss, logits)[0] if differentiated else loss(logits)
        return None, values.astype(logits.dtype)

    xs = chunked(plan, counted, (operands.hidden, operands.args))
    losses = _scan(body, None, xs, None if counted is None else counted.steps(plan.size))[1]
    return _unchunked(plan, counted, losses, operands.hidden.shape[0])


def _scan(body, carry, xs, steps):
    """`lax.scan`; of only so many `steps` unless that is None."""
    return lax.scan(body, carry, xs) if steps is None else first_steps(body, carry, xs, steps)


def first_chunk(plan: Plan, operands: Operands) -> list[jax.Array]:
    """What the loss is called with for the first chunk: logits `[c, V]`, its part of the args."""
    kernel, bias = _gathered(plan, operands)
    hidden, args = jax.tree.map(
        lambda x: x[0], chunked(plan, None, (operands.hidden, operands.args))
    )
    return [plan.products.logits(hidden, kernel, bias), *args]


def _gathered(plan, operands):
    """Kernel and bias with only their classes sharded: gathered once, before the loop."""
    sharding = plan.sharding
    kernel = sharding.gathered(plan.products.operand(operands.kernel))
    return kernel, sharding.resharded(operands.bias, sharding.classes)


def _gradients_over_chunks(plan, counted, operands, g, flags):
    """The losses `[N]` and their gradients for the cotangents `g [N]`, None if not asked for.

    A chunk's d_logits is computed in float32 and then cast to the products' dtype. Those of a group
    of chunks are kept, and one product adds them to d_kernel, which is summed in float32, as d_bias
    is. Of a single group that product is d_kernel. Where tokens are sharded, both are summed over
    devices in float32 after the loop: each device sums its part of d_kernel, and the parts are
    gathered after the cast to the kernel's dtype.
    """
    sharding, products = plan.sharding, plan.products
    tokens, classes = sharding.token_axes, sharding.classes
    counted, gathered = in_chunks(counted, plan.size), _gathered(plan, operands)
    wants = perturbed(flags, operands)
    of_kernel = sharding.spec(*sharding.of_kernel(None, classes), unreduced=tokens)
    dtype = products.dtype if plan.rounded else g.dtype

    steps = None if counted is None else counted.steps(plan.size)

    def of_group(sums, xs, steps):
        """The sums with those of chunks `[group, c, …]`; their d_logits in one scale; the rest.

        The rest of a single chunk is `[c, …]`: d_hidden may be unreduced over the classes' devices,
        and JAX cannot differentiate the reverse of `d_hidden[None]` then.
        """
        of_chunk = partial(_gradients_of_chunk, plan, operands, gathered, wants)
        if group == 1:
            sums, (kept, out) = of_chunk(sums, jax.tree.map(lambda x: x[0], xs))
            d_logits, scale = jax.tree.map(lambda x: x[None], kept)
        else:
            sums, ((d_logits, scale), out) = _scan(of_chunk, sums, xs, steps)
        return sums, (in_one_scale(d_logits, scale), out)

    def add_group(carry, xs_and_steps):
        (d_kernel, sums), (xs, steps) = carry, xs_and_steps
        sums, (kept, out) = of_group(sums, xs, steps)
        if wants.kernel:
            d_kernel = add_to_kernel(products, d_kernel, xs[0], *kept, of_kernel)
        return (d_kernel, sums), out

    d_kernel, *sums = _zeros(plan, operands, gathered, wants, g)
    xs = chunked(plan, counted, (operands.hidden, operands.args, g), zero_last=True)
    chunks, group = xs[0].shape[0], plan.chunks.group
    one_group = isinstance(chunks, int) and chunks == group
    if one_group:
        sums, ((d_logits, scale), out) = of_group(sums, xs, steps)
        if wants.kernel:
            of_first_chunks = partial(_product, products, of_kernel, dtype)
            d_kernel = of_first(of_first_chunks, chunks, steps, xs[0], d_logits)
            d_kernel = undo_scale(d_kernel, scale)
    else:
        groups = _in_groups(plan, xs)
        steps, of_each = _steps_of_groups(steps, group, groups[0].shape[0])
        (d_kernel, sums), out = _scan(add_group, (d_kernel, sums), (groups, of_each), steps)
    d_bias, d_consts = sums
    values, d_hidden, d_args = out
    loops = (group > 1) + (not one_group)
    d_hidden = sharding.resharded(d_hidden, *[None] * loops, tokens, None)
    n = operands.hidden.shape[0]
    unchunked = partial(_unchunked, plan, counted, n=n, loops=loops)
    values, d_hidden, d_args = jax.tree.map(unchunked, (values, d_hidden, d_args))
    if d_kernel is not None:
        d_kernel = hidden_axis_whole(d_kernel, 1 - products.class_axis)
        d_kernel = resharded(d_kernel, sharding.of_summed_kernel(operands.kernel)).astype(dtype)
    d_bias = sharding.resharded(d_bias, classes)
    return values, Operands(d_hidden, d_kernel, d_bias, d_args, d_consts)


def _steps_of_groups(steps, group, groups):
    """How many groups hold a token that counts, and how many chunks of each."""
    if steps is None:
        return None, None
    of_each = jnp.clip(steps - group * jnp.arange(groups, dtype=jnp.int32), 0, group)
    return (steps + (group - 1)) // group, of_each


def _product(products, spec, dtype, count, hidden, d_logits):  # noqa: PLR0917
    """d_kernel of the first chunks."""
    return products.d_kernel(hidden[:count], d_logits[:count], spec, dtype)


def _zeros(plan, operands, gathered, wants, g):
    """What the gradients of kernel, bias and constants are added to; None if not asked for."""
    (kernel, bias), sharding, dtype = gathered, plan.sharding, g.dtype
    tokens, classes = sharding.token_axes, sharding.classes
    axes = manual_axes(g, *jax.tree.leaves(operands))

    def zeros_if(flag, array, *of_array):
        if not flag:
            return None
        zeros = varying(jnp.zeros(array.shape, dtype), axes)
        return sharding.resharded(zeros, *of_array, unreduced=tokens)

    def zeros_like_if(flag, array):
        # The cotangents of `array` come summed over the axes that it does not vary over.
        if not flag:
            return None
        zeros = jnp.zeros(array.shape, np.promote_types(array.dtype, dtype))
        return resharded_like(varying(zeros, manual_axes(array)), array)

    return (
        zeros_if(wants.kernel, kernel, *sharding.of_kernel(None, classes)),
        None if bias is None else zeros_if(wants.bias, bias, classes),
        tuple(map(zeros_like_if, wants.consts, operands.consts)),
    )


def _gradients_of_chunk(plan, operands, gathered, wants, sums, xs):  # noqa: PLR0917
    """The sums with those of a chunk; its d_logits and their scale; the rest."""
    sharding, products, (kernel, bias) = plan.sharding, plan.products, gathered
    tokens, classes = sharding.token_axes, sharding.classes
    of_logits = wants.hidden or wants.kernel or wants.bias
    hidden, args, g = xs
    logits = products.logits(hidden, kernel, bias)
    wanted = (of_logits, *wants.args, *wants.consts)
    values, d, d_args, d_of_consts = _pulled(plan, logits, args, operands.consts, g, wanted)
    d_bias, d_consts = sums
    d_hidden, kept = None, (None, None)
    if of_logits:
        if wants.bias:
            of_bias = sharding.spec(classes, unreduced=tokens)
            d_bias = d_bias + lax.reduce_sum(d, (0,), out_sharding=of_bias)
        d_logits, scale = scale_for_float16(d, products.dtype)
        if wants.hidden:
            spec = sharding.spec(tokens, None, unreduced=classes)
            d_hidden = undo_scale(products.d_hidden(d_logits, kernel, spec), scale)
        if wants.kernel:
            kept = d_logits, scale
    d_consts = tuple(
        None if total is None else total + resharded_like(own.astype(total.dtype), total)
        for total, own in zip(d_consts, d_of_consts, strict=True)
    )
    return [d_bias, d_consts], (kept, (values.astype(g.dtype), d_hidden, d_args))


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


def chunked(plan: Plan, counted: Counted | None, tree: Any, *, zero_last: bool = False) -> Any:
    """Arrays [N, …] as [chunks, c, …]: token i·chunks + j of each shard is the i-th of chunk j.

    Strided, so that a token axis sharded on an automatic mesh stays where it is too. Or, if some of
    them may not count, in order: in the first chunk the first of each shard that do. Padding
    repeats the last token, so that it gives nothing (a NaN, say) that a real token would not give.
    With `zero_last` the last array of the tree, the cotangents, is padded with 0.
    """
    leaves, treedef = jax.tree.flatten(tree)
    sharding, size, group = plan.sharding, *plan.chunks
    shards, tokens = math.prod(sharding.token_shards), sharding.token_axes

    def split(x, of_last):
        if counted is not None:
            return chunked_in_order(sharding, counted, plan.size, group, x, last=of_last)
        n, rest = x.shape[0] // shards, x.shape[1:]
        chunks, of_rest = -(-n // (size * group)) * group, sharding.rest(x, 1)
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


def _unchunked(plan, counted, y, n, loops=1):
    """Undoes `chunked` for one array `[*loops, c, …]` of `n` tokens; `loops` axes count chunks."""
    if counted is not None:
        return restored(plan.sharding, counted, y, loops)
    sharding = plan.sharding
    shards, tokens = math.prod(sharding.token_shards), sharding.token_axes
    rest, of_rest = y.shape[loops + 1 :], sharding.rest(y, loops + 1)
    chunks = math.prod(y.shape[:loops])
    y = sharding.reshape(y, (chunks, shards, plan.chunks.size, *rest), None, tokens, None, *of_rest)
    y = jnp.moveaxis(y, 0, 2)
    y = sharding.reshape(y, (shards, plan.chunks.size * chunks, *rest), tokens, None, *of_rest)
    return sharding.reshape(y[:, : n // shards], (n, *rest), tokens, *of_rest)


def _in_groups(plan, tree):
    """Arrays [chunks, c, …] as [groups, group, c, …]."""
    sharding, group = plan.sharding, plan.chunks.group

    def split(x):
        rest = sharding.rest(x, 2)
        shape = (-(-x.shape[0] // group), group, *x.shape[1:])
        return sharding.reshape(x, shape, None, None, sharding.token_axes, *rest)

    return jax.tree.map(split, tree)
