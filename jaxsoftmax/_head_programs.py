# SPDX-License-Identifier: Apache-2.0
"""The linear heads as programs: one for all calls with the same shapes and options.

What decides the program comes first in every signature, the arguments of jit after it. How many
tokens or classes go together is decided outside, where the default depends on the device.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from . import _checks, _token_chunks, _vocabulary_blocks
from ._closures import Closed, closed
from ._cross_entropy import LogProbs, as_log_probs
from ._head import Head
from ._options import (
    MIXED,
    Options,
    ignored_tokens,
    label_index,
    label_weights,
    token_losses,
    wanted_by,
)
from ._rows import to_index
from ._sharding import (
    axis_names,
    laid_out,
    manual_axes,
    merged_tokens,
    shard_count,
    unseen_devices,
    varying,
)
from ._statistics import Wanted, token_statistics
from ._transform import Transform

# Bytes of the float32 logits of one chunk, and the bounds of its number of tokens. Each chunk
# reads and writes the float32 d_kernel once (8·V·H bytes against 6·c·V·H operations): few tokens
# suffice a CPU, an accelerator wants as many as the budget allows.
_BUDGET = {"cpu": 56 << 20, "default": 448 << 20}
_LEAST, _MOST = 256, 4096
_BLOCK = 2048


def any_loss(
    loss_fn: Callable[..., Any], head: Head, args: Sequence[jax.Array], chunk_size: int | None
) -> jax.Array:
    """The losses of `loss_fn`, or what they are reduced to."""
    if 0 in head.shape:
        return _any_loss(None, None)(head, (), ())
    size = _chunk_tokens(head, chunk_size)
    loss, consts, args = _closed(loss_fn, size, head, args, _rows)
    return _any_loss(loss, size)(head, args, consts)


def cross_entropy(  # noqa: PLR0917
    in_forward: bool,
    ignore_index: int | None,
    head: Head,
    labels: jax.Array,
    options: Options,
    chunk_size: int | None,
) -> jax.Array:
    """The cross-entropies of labels `[*tokens]`, or what they are reduced to."""
    if not in_forward:
        return _recomputed(chunk_size or _BLOCK, ignore_index, head, labels, options)
    size = None if 0 in head.shape else _chunk_tokens(head, chunk_size)
    return _in_forward(size, ignore_index, head, labels, options)


def log_probs(
    with_entropy: bool,
    head: Head,
    labels: jax.Array,
    transform: Transform,
    chunk_size: int | None,
) -> LogProbs:
    """Of labels `[*tokens]`."""
    return _log_probs(with_entropy, chunk_size or _BLOCK, head, labels, transform)


# Losses with a custom derivative of their own are each time another: their programs must go again.
@lru_cache(maxsize=16)
def _any_loss(loss, size):
    @jax.jit
    def linear_loss(head, args, consts):
        head, args = _rows(head, args)
        return _over_tokens(loss, size, head, args, consts)

    return linear_loss


def _rows(head, args):
    head = head.rows(args)
    return head.without_uncounted(args=[merged_tokens(head.layout, a) for a in args])


@partial(jax.jit, static_argnums=(0, 1))
def _in_forward(size, ignore_index, head, labels, options):
    head, labels, options = _labelled_rows(ignore_index, head, labels, options)
    if size is None:
        return _over_tokens(None, size, head, (), ())
    wanted = wanted_by(options, head.axis_name)

    def loss_fn(logits, labels, weights=None):
        summed = token_statistics(wanted).reverse
        index = label_index(labels, _classes(head), ignore_index)
        statistics = summed(logits, index, options.transform, _of_spread(options))
        return token_losses(MIXED.reverse, statistics, labels, weights, ignore_index, options)

    args = (labels,) if options.class_weights is None else (labels, head.counts)
    loss, consts, args = _closed(loss_fn, size, head, args, lambda *rows: rows)
    return _over_tokens(loss, size, head, args, consts)


@partial(jax.jit, static_argnums=(0, 1))
def _recomputed(size, ignore_index, head, labels, options):
    head, labels, options = _labelled_rows(ignore_index, head, labels, options)
    wanted, of_spread = wanted_by(options, head.axis_name), _of_spread(options)
    index = label_index(labels, _classes(head), ignore_index)
    statistics: Any = _statistics(wanted, size, head, index, options.transform, of_spread)
    weights = None if options.class_weights is None else head.counts
    losses = token_losses(MIXED.reverse, statistics, labels, weights, ignore_index, options)
    return head.unreduced(losses) if head.reduction is None else head.reduced(losses)


def _labelled_rows(ignore_index, head, labels, options):
    head = head.rows(labels, options)
    labels = merged_tokens(head.layout, labels)
    # The derivative of what is the same on all devices is summed over them once, here.
    axes = manual_axes(*jax.tree.leaves((head.hidden, head.kernel, head.bias, labels)))
    axes = axes - axis_names(head.axis_name)
    options = jax.tree.map(lambda x: varying(x, axes), options)
    if options.class_weights is not None:
        of_classes = head.layout.spec(head.layout.classes)
        options = options._replace(class_weights=laid_out(options.class_weights, of_classes))
    counts = label_weights(labels, ignore_index, options.class_weights, head.axis_name)
    head = dataclasses.replace(head, counts=counts)
    head, _ = head.without_uncounted(ignored_tokens(labels, ignore_index))
    return head, labels, options


def _of_spread(options):
    return None if options.label_smoothing is None else options.class_weights


@partial(jax.jit, static_argnums=(0, 1))
def _log_probs(with_entropy, size, head, labels, transform):
    head = head.rows(labels)
    labels = merged_tokens(head.layout, labels)
    wanted = Wanted(lse=True, entropy=with_entropy, axis_name=head.axis_name)
    index = to_index(labels, _classes(head))
    statistics = _statistics(wanted, size, head, index, transform, None)
    return as_log_probs(jax.tree.map(head.unreduced, statistics))


def _classes(head):
    return head.kernel.shape[1] * shard_count(head.axis_name)


def _statistics(wanted, size, head, index, transform, of_spread):  # noqa: PLR0917
    return _vocabulary_blocks.linear_statistics(
        _vocabulary_blocks.Plan(size, head.precision, wanted, head.layout),
        _vocabulary_blocks.Operands(
            head.hidden, head.kernel, head.bias, transform, of_spread, index
        ),
    )


def _closed(
    loss_fn: Callable[..., Any],
    size: int,
    head: Head,
    args: Sequence[jax.Array],
    rows: Callable[[Head, Sequence[jax.Array]], tuple[Head, Sequence[jax.Array]]],
) -> tuple[Closed, tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """`loss_fn` traced for a chunk of `rows(head, args)`, what it closes over, and `args`."""

    def trace(args):
        def first(head, args):
            plan, operands = _plan_and_operands(None, size, *rows(head, args), ())
            example = _token_chunks.first_chunk(plan, operands)
            loss, consts, losses = closed(loss_fn, *example)
            shape = example[0].shape
            _checks.check_losses("linear_loss", losses, shape, loss.varying, head.axis_name)
            found.append((loss, consts))

        found = []
        jax.eval_shape(first, head, args)
        loss, consts = found[0]
        return loss, tuple(map(jnp.asarray, consts))

    loss, consts = trace(args)
    if loss.varying:
        # In `shard_map` all that the losses are made of varies over what they vary over.
        args = [varying(a, loss.varying) if _is_real(a) else a for a in args]
        loss, consts = trace(args)
    return loss, consts, tuple(args)


def _plan_and_operands(loss, size, head, args, consts):
    plan = _token_chunks.Plan(loss, size, head.precision, head.layout, head.weights is not None)
    operands = _token_chunks.Operands(head.hidden, head.kernel, head.bias, tuple(args), consts)
    return plan, operands


def _over_tokens(loss, size, head, args, consts):
    if loss is None:  # no tokens
        losses = jnp.zeros(0, head.dtype)
        return head.unreduced(losses) if head.reduction is None else head.reduced(losses)
    plan, operands = _plan_and_operands(loss, size, head, args, consts)
    if head.reduction is None:
        return head.unreduced(_token_chunks.losses(plan, operands))
    if any(_is_real(c) and not loss.varying <= manual_axes(c) for c in consts):
        # In `shard_map`, of what is the same on all devices: its cotangents come summed over them,
        # too late for another factor on each.
        return head.reduced(_token_chunks.losses(plan, operands))
    layout, weights = head.layout, head.weights
    if weights is None:
        ones = jnp.ones(head.hidden.shape[:1], head.dtype)
        weights = laid_out(ones, layout.spec(layout.token_axes))
    # Divided first, d_kernel is finished by the loop and handed out where it lies.
    return _token_chunks.weighted_sum(plan, operands, head.divided(weights))


def _is_real(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _chunk_tokens(head, most):
    """Tokens in a chunk, of each shard: as few chunks as `most` allows, of equal size.

    Where an automatic mesh may spread the tokens, a multiple of its devices: otherwise XLA gathers
    all of `hidden`, and every device does the whole head.
    """
    layout = head.layout
    classes = head.kernel.shape[1] // layout.class_shards
    n = math.prod(head.shape) // math.prod(layout.token_shards)
    devices = 1 if layout.sharded else unseen_devices()
    if most is None:
        budget = _BUDGET.get(jax.default_backend(), _BUDGET["default"])
        most = max(min(max(budget // (4 * classes), _LEAST), _MOST), devices)
    if most < devices:
        devices = 1  # it cannot be
    chunks = _ceil(n, most // devices * devices)
    size = _ceil(n, chunks)
    # All tokens at once are spread as they come.
    return size if isinstance(n, int) and chunks == 1 else _ceil(size, devices) * devices


def _ceil(n, size):
    return -(-n // size)
