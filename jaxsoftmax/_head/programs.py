# SPDX-License-Identifier: Apache-2.0
"""The linear heads as programs: one for all calls with the same shapes and options.

In every signature, the static arguments, which decide the program, come first, and those that are
traced after them. The size of a chunk of tokens is chosen outside jit: its default depends on the
backend.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from .. import _checks
from .._axes import to_index
from .._cross_entropy import LogProbs, as_log_probs
from .._options import Options, in_loop, label_index, required_statistics, token_losses
from .._sharding import (
    devices_of_automatic_mesh,
    is_local,
    manual_axes,
    unseen_devices,
    varying,
)
from .._statistics import StatisticsSpec, token_statistics
from .._transform import Transform
from . import token_chunks, vocabulary_blocks
from .arguments import Head
from .closures import Closed, closed

# Bytes of the float32 logits of one chunk, and the bounds of its number of tokens. Each chunk
# reads and writes the float32 d_kernel once (8·V·H bytes against 6·c·V·H operations): few tokens
# are enough for a CPU, an accelerator needs as many as the budget allows.
_BUDGET = {"cpu": 56 << 20, "default": 448 << 20}
_LEAST_TOKENS, _MOST_TOKENS = 256, 4096
# Classes in a block. Where an automatic mesh may shard them, each device has at least so many of a
# block: the length that a TPU gives the last axis of an array.
_BLOCK_CLASSES, _LEAST_CLASSES_PER_DEVICE = 2048, 128


def any_loss(
    loss_fn: Callable[..., Any], head: Head, args: Sequence[jax.Array], chunk_size: int | None
) -> jax.Array:
    """The losses of `loss_fn`, or their sum or mean."""
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
    """The cross-entropies of labels `[*tokens]`, or their sum or mean."""
    if not in_forward:
        return _recomputed(chunk_size, ignore_index, head, labels, options)
    size = None if 0 in head.shape else _chunk_tokens(head, chunk_size)
    return _in_forward(size, ignore_index, head, labels, options)


def log_probs(
    with_entropy: bool,
    head: Head,
    labels: jax.Array,
    transform: Transform,
    chunk_size: int | None,
) -> LogProbs:
    """The log-probabilities of labels `[*tokens]`, with log-normalizers and entropies."""
    return _log_probs(with_entropy, chunk_size, head, labels, transform)


# A loss with a custom derivative is a new one in every call: its programs must be dropped again.
@lru_cache(maxsize=16)
def _any_loss(loss, size):
    @jax.jit
    def linear_loss(head, args, consts):
        head, args = _rows(head, args)
        return _over_tokens(loss, size, head, args, consts)

    return linear_loss


def _rows(head, args):
    head = head.rows(args)
    return head.without_uncounted(args=[head.sharding.merge_tokens(a) for a in args])


@partial(jax.jit, static_argnums=(0, 1))
def _in_forward(size, ignore_index, head, labels, options):
    head, labels, options = head.labelled_rows(labels, ignore_index, options)
    if size is None:
        return _over_tokens(None, size, head, (), ())

    def loss_fn(logits, labels, weights=None):
        summed = token_statistics(required_statistics(options), head.axis_name).reverse
        index = label_index(labels, head.classes, ignore_index)
        statistics = summed(logits, index, options.transform, _of_spread(options))
        return token_losses(False, statistics, labels, weights, ignore_index, options)

    args = (labels,) if options.class_weights is None else (labels, head.counts)
    loss, consts, args = _closed(loss_fn, size, head, args, lambda *rows: rows)
    return _over_tokens(loss, size, head, args, consts)


@partial(jax.jit, static_argnums=(0, 1))
def _recomputed(chunk_size, ignore_index, head, labels, options):
    head, labels, options = head.labelled_rows(labels, ignore_index, options)
    index = label_index(labels, head.classes, ignore_index)
    spec = required_statistics(options)._replace(from_label=False)  # each block from its maximum
    of_spread = _of_spread(options)
    statistics = _statistics(spec, chunk_size, head, index, options.transform, of_spread)
    weights = None if options.class_weights is None else head.counts
    losses = token_losses(False, statistics, labels, weights, ignore_index, options)
    return head.unreduced(losses) if head.reduction is None else head.reduced(losses)


def _of_spread(options):
    return None if options.label_smoothing is None else options.class_weights


@partial(jax.jit, static_argnums=(0, 1))
def _log_probs(with_entropy, chunk_size, head, labels, transform):
    head = head.rows(labels)
    index = to_index(head.sharding.merge_tokens(labels), head.classes)
    spec = StatisticsSpec(lse=True, entropy=with_entropy)
    statistics = _statistics(spec, chunk_size, head, index, transform, None)
    return as_log_probs(jax.tree.map(head.unreduced, statistics))


def _statistics(spec, chunk_size, head, index, transform, of_spread) -> Any:  # noqa: PLR0917
    sharding, size = _class_blocks(head, chunk_size)
    plan = vocabulary_blocks.Plan(size, head.precision, spec, sharding, head.axis_name)
    operands = vocabulary_blocks.Operands(
        head.hidden, head.kernel, head.bias, transform, of_spread, index
    )
    return vocabulary_blocks.linear_statistics(plan, operands)


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
            example = token_chunks.first_chunk(plan, operands)
            with in_loop(sharded=not is_local(operands.hidden, operands.kernel)):
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
        # Inside `shard_map`, all arguments must vary over every axis that the losses vary over.
        args = [varying(a, loss.varying) if _is_real(a) else a for a in args]
        loss, consts = trace(args)
    return loss, consts, tuple(args)


def _plan_and_operands(loss, size, head, args, consts):
    plan = token_chunks.Plan(loss, size, head.precision, head.sharding, head.weights is not None)
    operands = token_chunks.Operands(head.hidden, head.kernel, head.bias, tuple(args), consts)
    return plan, operands


def _over_tokens(loss, size, head, args, consts):
    if loss is None:  # no tokens
        losses = jnp.zeros(0, head.dtype)
        return head.unreduced(losses) if head.reduction is None else head.reduced(losses)
    plan, operands = _plan_and_operands(loss, size, head, args, consts)
    if head.reduction is None:
        return head.unreduced(token_chunks.losses(plan, operands))
    if any(_is_real(c) and not loss.varying <= manual_axes(c) for c in consts):
        # Inside `shard_map`, the loss closes over a value that is the same on all devices: in the
        # forward pass its gradient would be summed over them, before each device's own cotangent.
        return head.reduced(token_chunks.losses(plan, operands))
    weights = head.weights
    if weights is None:
        ones = jnp.ones(head.hidden.shape[:1], head.dtype)
        weights = head.sharding.resharded(ones, head.sharding.token_axes)
    # The weights are divided first: so the loop's d_kernel is the result, with no pass after it.
    return token_chunks.weighted_sum(plan, operands, head.divided(weights))


def _is_real(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _chunk_tokens(head, most):
    """Tokens in a chunk, of each shard: as few chunks as `most` allows, of equal size.

    Where an automatic mesh may spread the tokens, a multiple of the number of devices: otherwise
    XLA gathers all of `hidden`, and every device computes the whole head.
    """
    sharding = head.sharding
    classes = head.kernel.shape[1] // sharding.class_shards
    n = math.prod(head.shape) // math.prod(sharding.token_shards)
    devices = unseen_devices() if sharding.mesh is None else 1
    if most is None:
        budget = _BUDGET.get(jax.default_backend(), _BUDGET["default"])
        most = min(max(budget // (4 * classes), _LEAST_TOKENS), _MOST_TOKENS)
        most = max(most, devices)
    if most < devices:
        devices = 1  # no multiple is as small
    chunks = _ceil(n, most // devices * devices)
    size = _ceil(n, chunks)
    # A single chunk of all tokens is spread as they are.
    return size if isinstance(n, int) and chunks == 1 else _ceil(size, devices) * devices


def _class_blocks(head, most):
    """How the classes are sharded, and how many classes of each shard are in a block.

    A block that cuts through a sharded axis is gathered, with all that is computed from it. On an
    automatic mesh, where shards cannot be seen, each device is assumed to hold one shard, and one
    block of each goes together. If every device holds all classes, that costs a copy of the kernel.
    """
    sharding, devices = head.sharding, devices_of_automatic_mesh()
    if sharding.mesh is not None or head.kernel.shape[1] % devices:
        return sharding, most or _BLOCK_CLASSES
    size = (most or max(_BLOCK_CLASSES, _LEAST_CLASSES_PER_DEVICE * devices)) // devices
    return sharding._replace(class_shards=devices), max(1, size)


def _ceil(n, size):
    return -(-n // size)
