# SPDX-License-Identifier: Apache-2.0
"""The linear heads as programs: one for all calls with the same shapes and options.

What decides the program comes first in every signature, the arguments of jit after it. How many
tokens or classes go together is decided outside, where the default depends on the device.
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
from .._options import Options, label_index, required_statistics, token_losses
from .._sharding import devices_of_automatic_mesh, manual_axes, unseen_devices, varying
from .._statistics import StatisticsSpec, token_statistics
from .._transform import Transform
from . import token_chunks, vocabulary_blocks
from .arguments import Head
from .closures import Closed, closed

# Bytes of the float32 logits of one chunk, and the bounds of its number of tokens. Each chunk
# reads and writes the float32 d_kernel once (8·V·H bytes against 6·c·V·H operations): few tokens
# suffice a CPU, an accelerator wants as many as the budget allows.
_BUDGET = {"cpu": 56 << 20, "default": 448 << 20}
_LEAST_TOKENS, _MOST_TOKENS = 256, 4096
# Classes in a block. Where an automatic mesh may shard them, each device has at least so many of a
# block: the length that a TPU gives the last axis of an array.
_BLOCK_CLASSES, _LEAST_CLASSES_PER_DEVICE = 2048, 128


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
    """Of labels `[*tokens]`."""
    return _log_probs(with_entropy, chunk_size, head, labels, transform)


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
    return head.without_uncounted(args=[head.sharding.merge_tokens(a) for a in args])


@partial(jax.jit, static_argnums=(0, 1))
def _in_forward(size, ignore_index, head, labels, options):
    head, labels, options = head.labelled_rows(labels, ignore_index, options)
    if size is None:
        return _over_tokens(None, size, head, (), ())
    spec = required_statistics(options)

    def loss_fn(logits, labels, weights=None):
        summed = token_statistics(spec, head.axis_name).reverse
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
    spec, of_spread = required_statistics(options), _of_spread(options)
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
        # In `shard_map`, of what is the same on all devices: its cotangents come summed over them,
        # too late for another factor on each.
        return head.reduced(token_chunks.losses(plan, operands))
    weights = head.weights
    if weights is None:
        ones = jnp.ones(head.hidden.shape[:1], head.dtype)
        weights = head.sharding.resharded(ones, head.sharding.token_axes)
    # Divided first, d_kernel is finished by the loop and handed out where it lies.
    return token_chunks.weighted_sum(plan, operands, head.divided(weights))


def _is_real(x):
    return jnp.issubdtype(x.dtype, jnp.inexact)


def _chunk_tokens(head, most):
    """Tokens in a chunk, of each shard: as few chunks as `most` allows, of equal size.

    Where an automatic mesh may spread the tokens, a multiple of its devices: otherwise XLA gathers
    all of `hidden`, and every device does the whole head.
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
        devices = 1  # it cannot be
    chunks = _ceil(n, most // devices * devices)
    size = _ceil(n, chunks)
    # All tokens at once are spread as they come.
    return size if isinstance(n, int) and chunks == 1 else _ceil(size, devices) * devices


def _class_blocks(head, most):
    """How the classes are sharded, and how many of each shard are in a block.

    A block that cuts through a sharded axis is gathered, with all that is made of it. On an
    automatic mesh, where shards cannot be seen, each device is taken to hold one: as many blocks go
    together as there are devices. Where they hold whole classes that costs a copy of the kernel.
    """
    sharding, devices = head.sharding, devices_of_automatic_mesh()
    if sharding.mesh is not None or head.kernel.shape[1] % devices:
        return sharding, most or _BLOCK_CLASSES
    size = (most or max(_BLOCK_CLASSES, _LEAST_CLASSES_PER_DEVICE * devices)) // devices
    return sharding._replace(class_shards=devices), max(1, size)


def _ceil(n, size):
    return -(-n // size)
