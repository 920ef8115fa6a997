# SPDX-License-Identifier: Apache-2.0
"""The linear heads as programs: one for all calls with the same shapes and options.

In every signature, the static arguments, which decide the program, come first, and those that are
traced after them.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .. import _checks
from .._axes import IGNORED, per_label, to_index
from .._cpu import in_bits
from .._cross_entropy import LogProbs, as_log_probs
from .._divergence import of_rows
from .._options import (
    Options,
    ignored_tokens,
    in_loop,
    label_index,
    required_statistics,
    token_losses,
)
from .._sharding import (
    axis_names,
    devices_of_automatic_mesh,
    is_local,
    is_mesh_unknown,
    manual_axes,
    unseen_devices,
    varying,
    whole_last,
)
from .._statistics import Statistics, StatisticsSpec, token_statistics
from .._transform import Transform
from . import sizes, token_chunks, vocabulary_blocks
from .arguments import Head, TargetHead
from .closures import closed
from .counted import counted_first
from .products import Products, logits_of
from .sizes import ByPlatform


def any_loss(
    loss_fn: Callable[..., Any], head: Head, args: Sequence[jax.Array], chunk_size: int | None
) -> jax.Array:
    """The losses of `loss_fn`, or their sum or mean."""
    if 0 in head.shape:
        return _any_loss(None, None)(head, (), ())
    chunks = _chunks(head, chunk_size, in_parts=head.weights is not None)
    losses, consts, args = _closed(loss_fn, chunks, head, args, _rows)
    return _any_loss(losses, chunks)(head, args, consts)


def cross_entropy(  # noqa: PLR0917
    gradients: str,
    ignore_index: int | None,
    head: Head,
    labels: jax.Array,
    options: Options,
    chunk_size: int | None,
) -> jax.Array:
    """The cross-entropies of labels `[*tokens]`, or their sum or mean."""
    recompute = partial(_recomputed, chunk_size, ignore_index)
    if gradients == "recompute" or head.reduction is None:
        return recompute(head, labels, options)
    in_parts = head.weights is not None or ignored_tokens(labels, ignore_index) is not None
    chunks = None if 0 in head.shape else _chunks(head, chunk_size, in_parts=in_parts)
    in_forward = partial(_in_forward, chunks, ignore_index)
    small = sizes.is_small(*_tokens_and_classes(head))
    # Classes that are sharded unseen would be gathered, block by block.
    unknown = head.sharding.mesh is None and is_mesh_unknown()
    if gradients == "in_forward" or chunk_size is not None or small or unknown:
        return in_forward(head, labels, options)
    return lax.platform_dependent(head, labels, options, tpu=recompute, default=in_forward)


def log_probs(  # noqa: PLR0917
    spec: StatisticsSpec,
    head: Head,
    labels: jax.Array,
    where: jax.Array | None,
    transform: Transform,
    chunk_size: int | None,
) -> LogProbs:
    """The log-probabilities of labels `[*tokens]` or `[*tokens, K]`, with what `spec` asks for."""
    return _log_probs(spec, chunk_size, head, labels, where, transform)


class Compared(NamedTuple):
    """What both logits of a divergence are transformed by; the weight of a Jensen–Shannon one."""

    transform: Transform
    target_transform: Transform
    weight: jax.Array | None


def divergences(  # noqa: PLR0917
    products: Products,
    head: Head,
    target: TargetHead,
    where: jax.Array | None,
    compared: Compared,
    chunk_size: int | None,
) -> jax.Array:
    """The divergences of tokens `[*tokens]`, or their sum or mean: by chunks of both logits."""
    in_parts = head.weights is not None or where is not None
    chunks = None if 0 in head.shape else _chunks(head, chunk_size, in_parts=in_parts, logits=2)
    return _divergences(chunks, products, head, target, where, compared)


# A loss with a custom derivative is a new one in every call: its programs must be dropped again.
@lru_cache(maxsize=16)
def _any_loss(losses, chunks):
    @jax.jit
    def linear_loss(head, args, consts):
        head, args = _rows(head, args)
        # The loss may send something, in every chunk.
        return _over_tokens(losses, chunks, head, args, consts, uniform=True)

    return linear_loss


def _rows(head, args):
    head = head.rows(args)
    return head.without_uncounted(args=[head.sharding.merge_tokens(a) for a in args])


@partial(jax.jit, static_argnums=(0, 1))
def _in_forward(chunks, ignore_index, head, labels, options):
    head, labels, options = head.labelled_rows(labels, ignore_index, options)
    if chunks is None:
        return _over_tokens(None, chunks, head, (), (), uniform=False)

    def loss_fn(logits, labels, weights=None):
        summed = token_statistics(required_statistics(options), head.axis_name).reverse
        index = label_index(labels, head.classes, ignore_index)
        statistics = summed(logits, index, options.transform, _of_spread(options))
        return token_losses(False, statistics, labels, weights, ignore_index, options)

    args = (labels,) if options.class_weights is None else (labels, head.counts)
    losses, consts, args = _closed(loss_fn, chunks, head, args, lambda *rows: rows)
    return _over_tokens(losses, chunks, head, args, consts, uniform=head.axis_name is not None)


@partial(jax.jit, static_argnums=(0, 1))
def _recomputed(chunk_size, ignore_index, head, labels, options):
    head, labels, options = head.labelled_rows(labels, ignore_index, options)
    index = label_index(labels, head.classes, ignore_index)
    spec, of_spread = required_statistics(options), _of_spread(options)
    statistics = _statistics(spec, chunk_size, head, index, options.transform, of_spread)
    weights = None if options.class_weights is None else head.counts
    losses = token_losses(False, statistics, labels, weights, ignore_index, options)
    return head.unreduced(losses) if head.reduction is None else head.reduced(losses)


@partial(jax.jit, static_argnums=(0, 1))
def _divergences(chunks, products, head, target, where, compared):  # noqa: PLR0917
    head = head.rows((target, where, compared))
    sharding = head.sharding
    hidden = sharding.merge_tokens(sharding.resharded(target.hidden, *sharding.tokens, None))
    excluded = None if where is None else ~sharding.merge_tokens(where)
    head, (hidden,) = head.without_uncounted(excluded, (hidden,))
    args = (hidden,)
    if excluded is not None:
        head = dataclasses.replace(head, counts=(~excluded).astype(head.dtype))
        args = (hidden, excluded)
    if chunks is None:
        return _over_tokens(None, chunks, head, (), (), uniform=False)
    # Gathered once, before the loop. Its gradient is rounded to this dtype there, before it is
    # multiplied by the cotangent of the loss: float16 has no room for that.
    kernel = target.kernel if products.dtype == jnp.float16 else products.operand(target.kernel)
    kernel = sharding.gathered(kernel)
    bias = sharding.resharded(target.bias, sharding.classes)
    # What devices share varies over them from here on, so that its derivative is summed once.
    axes = manual_axes(*jax.tree.leaves((head.hidden, head.kernel, head.bias, hidden)))
    axes = axes - axis_names(head.axis_name)
    kernel, bias, options = jax.tree.map(lambda x: varying(x, axes), (kernel, bias, compared))

    def loss_fn(logits, hidden, excluded=None):
        targets: Any = logits_of(products, sharding, hidden, kernel, bias, logits)
        losses = of_rows(logits, targets, *options, axis_name=head.axis_name)
        return losses if excluded is None else jnp.where(excluded, 0, losses)

    losses, consts, args = _closed(loss_fn, chunks, head, args, lambda *rows: rows)
    return _over_tokens(losses, chunks, head, args, consts, uniform=head.axis_name is not None)


def _of_spread(options):
    return None if options.label_smoothing is None else options.class_weights


@partial(jax.jit, static_argnums=(0, 1))
def _log_probs(spec, chunk_size, head, labels, where, transform):  # noqa: PLR0917
    head = head.rows((labels, where))
    if labels.ndim > len(head.shape):
        labels = whole_last(labels)
    index = to_index(head.sharding.merge_tokens(labels), head.classes)
    if where is not None:
        where = head.sharding.merge_tokens(where)
        index = jnp.where(per_label(where, index), index, IGNORED)
        head, _ = head.without_uncounted(~where)
    statistics = _statistics(spec, chunk_size, head, index, transform, None)
    if where is not None:
        outside = Statistics(0, 0, 0, 0, -1)
        statistics = Statistics(
            *(
                None if s is None else jnp.where(per_label(where, s), s, other)
                for s, other in zip(statistics, outside, strict=True)
            )
        )
    return as_log_probs(jax.tree.map(head.unreduced, statistics))


def _statistics(spec, chunk_size, head, index, transform, of_spread) -> Any:  # noqa: PLR0917
    plans = block_plans(spec, chunk_size, head)
    pieces = _pieces(head)
    chunks = [plan.rows * (pieces or 1) for plan in plans]
    counted = _order(head, pieces, chunks, uniform=False)
    operands = vocabulary_blocks.Operands(
        head.hidden, head.kernel, head.bias, transform, of_spread, index
    )
    return vocabulary_blocks.linear_statistics(plans, operands, counted)


def block_plans(spec: StatisticsSpec, chunk_size: int | None, head: Head) -> ByPlatform:
    """How a head goes over blocks of classes."""
    sharding, blocks = _class_blocks(head, chunk_size)
    tokens, classes = _tokens_and_classes(head)
    rows, small = sizes.rows(tokens, _pieces(head) or 1), sizes.is_small(tokens, classes)
    # A CPU reads a block's logits from its cache again: a maximum costs it nothing.
    on_cpu = spec._replace(from_label=False), in_bits(head.kernel.dtype)
    elsewhere = on_cpu if small else (spec, False)

    def plan(block, rows, in_rows, spec, in_bits):
        of_spec = head.products, spec, sharding, head.axis_name, in_bits
        return vocabulary_blocks.Plan(block, rows, in_rows, *of_spec)

    return ByPlatform(
        plan(blocks.cpu, rows.cpu, True, *on_cpu),
        plan(blocks.other, rows.other, small, *elsewhere),
    )


def _closed(
    loss_fn: Callable[..., Any],
    chunks: ByPlatform,
    head: Head,
    args: Sequence[jax.Array],
    rows: Callable[[Head, Sequence[jax.Array]], tuple[Head, Sequence[jax.Array]]],
) -> tuple[ByPlatform, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """`loss_fn` traced for a chunk of `rows(head, args)`, what it closes over, and `args`."""

    def trace(args):
        def first(head, args):
            head, args = rows(head, args)
            for chunk in dict.fromkeys(chunks):
                plan, operands = _plan(None, chunk, head), _operands(head, args, ())
                example = token_chunks.first_chunk(plan, operands)
                with in_loop(sharded=not is_local(operands.hidden, operands.kernel)):
                    loss, losses = closed(loss_fn, consts, *example)
                shape = example[0].shape
                _checks.check_losses("linear_loss", losses, shape, loss.varying, head.axis_name)
                found[chunk] = loss

        consts, found = [], {}
        jax.eval_shape(first, head, args)
        losses = ByPlatform(*(found[chunk] for chunk in chunks))
        return losses, tuple(map(jnp.asarray, consts))

    losses, consts = trace(args)
    if losses.cpu.varying:
        # Inside `shard_map`, all arguments must vary over every axis that the losses vary over.
        args = [varying(a, losses.cpu.varying) if _is_real(a) else a for a in args]
        losses, consts = trace(args)
    return losses, consts, tuple(args)


def _plan(loss, chunks, head, pieces=1, rounded=False):
    weighted = head.weights is not None
    return token_chunks.Plan(loss, chunks, head.products, head.sharding, pieces, weighted, rounded)


def _is_rounded(chunks, head):
    """Whether elsewhere than on a CPU one product is all of d_kernel, and so rounds it itself.

    XLA would cast it in a pass more. Not where devices add it up, nor in float16, which has no room
    for what the loss's cotangent still multiplies.
    """
    n, (size, group) = head.hidden.shape[0], chunks.other
    one = isinstance(n, int) and chunks.cpu != chunks.other and size * group >= n
    half = head.kernel.dtype == head.products.dtype == jnp.bfloat16
    return one and half and is_local(head.hidden, head.kernel)


def _operands(head, args, consts):
    return token_chunks.Operands(head.hidden, head.kernel, head.bias, tuple(args), consts)


def _over_tokens(losses, chunks, head, args, consts, *, uniform):
    if losses is None:  # no tokens
        none = jnp.zeros(0, head.dtype)
        return head.unreduced(none) if head.reduction is None else head.reduced(none)
    pieces = _pieces(head)
    if pieces is not None and any(chunk.size % pieces for chunk in chunks):
        pieces = None
    counted = _order(head, pieces, [chunk.size for chunk in chunks], uniform=uniform)
    pieces = 1 if counted is None or pieces is None else pieces
    rounded = _is_rounded(chunks, head)
    pairs = zip(losses, chunks, strict=True)
    plans = ByPlatform(*(_plan(*pair, head, pieces, rounded) for pair in pairs))
    operands = _operands(head, args, consts)
    if head.reduction is None:
        return head.unreduced(token_chunks.losses(plans, operands, counted))
    everywhere = losses.cpu.varying
    if any(_is_real(c) and not everywhere <= manual_axes(c) for c in consts):
        # Inside `shard_map`, the loss closes over a value that is the same on all devices: in the
        # forward pass its gradient would be summed over them, before each device's own cotangent.
        return head.reduced(token_chunks.losses(plans, operands, counted))
    weights = head.weights
    if weights is None:
        ones = jnp.ones(head.hidden.shape[:1], head.dtype)
        weights = head.sharding.resharded(ones, head.sharding.token_axes)
    # The weights are divided first: so the loop's d_kernel is the result, with no pass after it.
    return token_chunks.weighted_sum(plans, operands, head.divided(weights), counted)


def _pieces(head):
    """Into how many pieces the tokens of a shard are cut, each sorted by itself.

    An automatic mesh may cut them so, unseen. None if it would cut them otherwise.
    """
    pieces = unseen_devices() if head.sharding.mesh is None else 1
    tokens = _tokens_and_classes(head)[0]
    return pieces if pieces == 1 or (isinstance(tokens, int) and tokens % pieces == 0) else None


def _order(head, pieces, chunks, *, uniform):
    """The tokens that count first, where some may not and are in other chunks than those that do.

    `chunks`: how many tokens are in one, by platform. `uniform`: all devices are to take as
    many steps, for what they send each other in one.
    """
    tokens = _tokens_and_classes(head)[0]
    if head.live is None or pieces is None:
        return None
    if isinstance(tokens, int) and min(chunks) >= tokens:
        return None
    order = counted_first(head.live, head.sharding, pieces)
    axes = tuple(sorted(manual_axes(order.number)))
    number = lax.pmax(order.number, axes) if uniform and axes else order.number
    return order._replace(number=number)


def _is_real(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _chunks(head, most, *, in_parts, logits=1):
    """The chunks of a head's tokens, each of which holds so many arrays of logits."""
    sharding = head.sharding
    tokens, classes = _tokens_and_classes(head)
    width = head.kernel.shape[1 - sharding.class_axis]
    devices = unseen_devices() if sharding.mesh is None else 1
    itemsize = head.products.dtype.itemsize
    return sizes.chunks(
        tokens, width, classes, itemsize, most, devices, in_parts=in_parts, logits=logits
    )


def _tokens_and_classes(head):
    """Of one device, as far as an explicit mesh shows it."""
    sharding = head.sharding
    tokens = math.prod(head.shape) // math.prod(sharding.token_shards)
    return tokens, head.kernel.shape[sharding.class_axis] // sharding.class_shards


def _class_blocks(head, most):
    """How the classes are sharded, and how many classes of each shard are in a block.

    A block that cuts through a sharded axis is gathered, with all that is computed from it. On an
    automatic mesh, where shards cannot be seen, each device is assumed to hold one shard, and one
    block of each goes together. If every device holds all classes, that costs a copy of the kernel.
    """
    sharding, devices = head.sharding, devices_of_automatic_mesh()
    tokens, classes = _tokens_and_classes(head)
    if sharding.mesh is not None or classes % devices:
        devices = 1
    else:
        sharding = sharding._replace(class_shards=devices)
    return sharding, sizes.blocks(tokens, classes // devices, most, devices)
