# SPDX-License-Identifier: Apache-2.0
"""The best classes of each token, block by block: the highest logits, or those of a sample.

A sample is the highest of logits with Gumbel noise, z_k − log E_k with exponentially distributed
E_k: the class k comes out with the probability ŷ_k, as the smallest of E_k exp(−z_k) is that of k.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from .._merge import BlockSums, merge_shards
from .._numerics import upcast
from .._rules import with_derivative
from .._sharding import all_devices, top_k
from .._statistics import StatisticsSpec, block_sums
from .._transform import Transform, transformed
from .arguments import Head
from .programs import block_plans
from .sizes import by_platform
from .vocabulary_blocks import Operands, merged, over_logits


class TopK(NamedTuple):
    """What `linear_top_k` returns: arrays `[*tokens, k]`, the highest first.

    Attributes:
      log_probs: log-probabilities, normalized over all classes.
      labels: the classes, int32.
    """

    log_probs: Float[Array, "*tokens k"]
    labels: Int[Array, "*tokens k"]


class Sample(NamedTuple):
    """What `linear_sample` returns: arrays `[*tokens]`.

    Attributes:
      labels: the classes drawn, int32; −1 for a token that has no distribution.
      log_probs: their log-probabilities in the distribution that they are drawn from.
    """

    labels: Int[Array, "*tokens"]
    log_probs: Float[Array, "*tokens"]


class Noise(NamedTuple):
    """What the noise of a class is a function of, beside its number."""

    words: jax.Array  # [2], from the key
    tokens: jax.Array  # [N], their numbers


class Best(NamedTuple):
    """Classes `[..., k]`: the best first, of equal ones the lower number first."""

    scores: Any
    labels: Any
    logits: Any = None  # where they are not the scores


def top_k_classes(k: int, head: Head, transform: Transform, chunk_size: int | None) -> TopK:
    """The k classes of the highest logits, for tokens `[*tokens]`."""
    return TopK(*_top_k_classes(k, chunk_size, head, transform))


@partial(jax.jit, static_argnums=(0, 1))
def _top_k_classes(k, chunk_size, head, transform):
    def function(plan, operands, _):
        sums, best = _highest(k, plan, operands)
        return _log_probs(best.scores, sums), best.labels

    return _constant("linear_top_k", function, chunk_size, head.rows(), transform, None)


def sample(
    k: int | None, head: Head, transform: Transform, key: jax.Array, chunk_size: int | None
) -> Sample:
    """A class for each token `[*tokens]`, of all or of the k of the highest logits."""
    return Sample(*_sample(k, chunk_size, head, transform, key))


@partial(jax.jit, static_argnums=(0, 1))
def _sample(k, chunk_size, head, transform, key):
    rows = head.rows()
    count = rows.hidden.shape[0]
    tokens = jnp.arange(count, dtype=jnp.uint32).reshape(head.shape)
    noise = Noise(jax.random.bits(key, (2,), jnp.uint32), rows.sharding.merge_tokens(tokens))

    def of_all(plan, operands, noise):
        def with_block(best, z, first):
            numbers = jnp.arange(z.shape[-1], dtype=jnp.int32)
            numbers = first + jnp.expand_dims(numbers, tuple(range(z.ndim - 1)))
            # Made once, not by each of the reductions.
            scores = lax.optimization_barrier(z + gumbel(noise, numbers, z.dtype))
            own = _first(Best(scores, numbers, z))
            return own if best is None else _first(_joined(best, own))

        sums, best = _over_classes(plan, operands, with_block, _first, apart=plan.block)
        return best.labels[:, 0], _log_probs(best.logits, sums)[:, 0]

    def of_top_k(plan, operands, noise):
        _, (z, labels, _) = _highest(k, plan, operands)
        sums = BlockSums(z[:, 0], jnp.sum(jnp.exp(z[:, 1:] - z[:, :1]), axis=-1))
        best = _first(Best(z + gumbel(noise, labels, z.dtype), labels, z))
        return best.labels[:, 0], _log_probs(best.logits, sums)[:, 0]

    def function(*args):
        labels, log_probs = (of_all if k is None else of_top_k)(*args)
        return jnp.where(jnp.isnan(log_probs), -1, labels), log_probs

    return _constant("linear_sample", function, chunk_size, rows, transform, noise)


def _log_probs(logits, sums):
    return (logits - sums.m[:, None]) - jnp.log1p(sums.r)[:, None]


def _constant(name, function, chunk_size, head, transform, noise):  # noqa: PLR0917
    """The results `[N, …]` of `function(plan, operands, noise)` as `[*tokens, …]`.

    They have no derivative: to ask for one is an error.
    """
    plans = block_plans(StatisticsSpec(), chunk_size, head)
    operands = Operands(head.hidden, head.kernel, head.bias, transform, None, None)
    leaves, tree = jax.tree.flatten((operands, noise))

    def run(*leaves):
        return by_platform(function, plans, *tree.unflatten(leaves))

    def refused(*_):
        raise TypeError(
            f"{name}: there is no derivative by its arguments; take that of linear_log_probs at "
            "the labels found, and call this function with jax.lax.stop_gradient of the arguments"
        )

    results = with_derivative(run, refused, *leaves)
    return [head.sharding.split_tokens(x, head.shape) for x in results]


def _over_classes(plan, operands, with_block, of_parts, apart):
    """The `BlockSums` of whole rows, and the best classes.

    `with_block(best, z, first)`: those so far (None at first) and of a block of higher numbers.
    `of_parts(best)`: of those of all parts of the classes, one after the other.
    """
    sharding = plan.sharding
    operands = operands._replace(kernel=sharding.gathered(operands.kernel))

    def step(found, raw, first, _):
        sums = block_sums(plan.spec, raw, operands.transform, None, 0, None)
        z = upcast(transformed(raw, operands.transform))
        first = jnp.asarray(first, jnp.int32)
        first = jnp.expand_dims(first, tuple(range(first.ndim, z.ndim)))
        if found is None:
            return sums, with_block(None, z, first)
        both = jax.tree.map(lambda *pair: jnp.stack(pair), found[0], sums)
        return merged(both, 0), with_block(found[1], z, first)

    sums, best = over_logits(plan, operands, step, None, apart)
    if sharding.class_shards > 1:
        tokens = sharding.token_axes
        sums = merged(sums, 1)
        best = jax.tree.map(lambda x: sharding.merge_classes(x, tokens), best)
        best = of_parts(jax.tree.map(lambda x: sharding.resharded(x, tokens, None), best))
    if plan.axis_name is not None:
        sums = merge_shards(plan.axis_name, sums)
        best = of_parts(jax.tree.map(partial(all_devices, plan.axis_name), best))
    return sums, best


def _highest(k, plan, operands):
    """The `BlockSums` of whole rows, and the k classes of the highest logits."""

    def with_block(best, z, first):
        if best is None:
            scores, at = top_k(z, min(k, z.shape[-1]))
            return Best(scores, first + at)
        # Those so far come first, so they stay first among equal ones.
        count = best.scores.shape[-1]
        scores, at = top_k(jnp.concatenate([best.scores, z], axis=-1), count)
        labels = jnp.where(at < count, _at(best.labels, at), first + (at - count))
        return Best(scores, labels)

    def of_parts(best):
        scores, at = top_k(best.scores, min(k, best.scores.shape[-1]))
        return Best(scores, _at(best.labels, at))

    return _over_classes(plan, operands, with_block, of_parts, apart=max(k, plan.block))


def _at(x, index):
    """The entries of each row at the nearest index that there is."""
    return jnp.take_along_axis(x, index, axis=-1, mode="clip")


def _joined(*parts):
    return jax.tree.map(lambda *x: jnp.concatenate(x, axis=-1), *parts)


def _first(best):
    """The one of the highest score; of equal ones that of the lowest number.

    By plain reductions, of which XLA makes several at once where an array is sharded. (Of a row
    with NaN there is none: its r is NaN.)
    """
    score = jnp.max(best.scores, axis=-1, keepdims=True)
    last = jnp.iinfo(jnp.int32).max
    labels = jnp.where(best.scores == score, best.labels, last)
    label = jnp.min(labels, axis=-1, keepdims=True)
    logits = jnp.where(best.labels == label, best.logits, -jnp.inf)
    return Best(score, label, jnp.max(logits, axis=-1, keepdims=True))


# Of one counter for each token and class, so that nothing depends on how the classes are cut.
def gumbel(noise: Noise, classes: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The Gumbel noise −log E of each token's `classes [N or 1, …]`."""
    tokens = jnp.expand_dims(noise.tokens, tuple(range(1, classes.ndim)))
    high, low = _threefry(noise.words, tokens, classes.astype(jnp.uint32))
    u = high.astype(dtype) * 2.0**-32 + (low.astype(dtype) * 2.0**-64 + 2.0**-65)
    u = jnp.minimum(u, 1 - jnp.finfo(dtype).epsneg)
    return -jnp.log(-jnp.log1p(-u))


_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def _threefry(key, *counter):
    """Threefry-2x32 in 20 rounds (Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3).

    jax.random has it, but not of counters of one's own.
    """
    keys = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA))
    a, b = counter[0] + keys[0], counter[1] + keys[1]
    for i in range(5):
        for r in _ROTATIONS[i % 2]:
            a = a + b
            b = ((b << np.uint32(r)) | (b >> np.uint32(32 - r))) ^ a
        a = a + keys[(i + 1) % 3]
        b = b + keys[(i + 2) % 3] + np.uint32(i + 1)
    return a, b
