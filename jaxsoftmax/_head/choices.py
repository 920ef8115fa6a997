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
from .._sharding import all_devices
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
    """The best classes so far `[..., k]`, best first; of equal ones the lower number first."""

    scores: Any
    labels: Any
    logits: Any  # None where they are the scores


def top_k_classes(k: int, head: Head, transform: Transform, chunk_size: int | None) -> TopK:
    """The k classes of the highest logits, for tokens `[*tokens]`."""
    return TopK(*_top_k_classes(k, chunk_size, head, transform))


@partial(jax.jit, static_argnums=(0, 1))
def _top_k_classes(k, chunk_size, head, transform):
    def function(plan, operands, _):
        sums, best = _best(k, plan, operands, None)
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
        sums, best = _best(1, plan, operands, noise)
        return best.labels[:, 0], _log_probs(best.logits, sums)[:, 0]

    def of_top_k(plan, operands, noise):
        _, best = _best(k, plan, operands, None)
        m, logits = best.scores[:, :1], best.scores
        sums = BlockSums(m[:, 0], jnp.sum(jnp.exp(logits[:, 1:] - m), axis=-1))
        noisy = logits + gumbel(noise, best.labels, logits.dtype)
        first = jnp.iinfo(jnp.int32).max
        at_top = noisy == jnp.max(noisy, axis=-1, keepdims=True)
        label = jnp.min(jnp.where(at_top, best.labels, first), axis=-1)
        drawn = jnp.where(best.labels == label[:, None], logits, -jnp.inf)
        return label, _log_probs(jnp.max(drawn, axis=-1, keepdims=True), sums)[:, 0]

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


def _best(k, plan, operands, noise):
    """The `BlockSums` of whole rows, and the best k classes by logits, or by noisy logits."""
    sharding, axis_name = plan.sharding, plan.axis_name
    operands = operands._replace(kernel=sharding.gathered(operands.kernel))

    def step(found, raw, first, _):
        sums = block_sums(plan.spec, raw, operands.transform, None, 0, None)
        z = upcast(transformed(raw, operands.transform))
        first = jnp.asarray(first, jnp.int32)
        first = jnp.expand_dims(first, tuple(range(first.ndim, z.ndim)))
        if found is None:
            return sums, _with_block(k, None, z, first, noise)
        both = jax.tree.map(lambda *pair: jnp.stack(pair), found[0], sums)
        return merged(both, 0), _with_block(k, found[1], z, first, noise)

    sums, best = over_logits(plan, operands, step, None, apart=max(k, plan.block))
    if sharding.class_shards > 1:
        sums = merged(sums, 1)
        best = jax.tree.map(lambda x: sharding.merge_classes(x, sharding.token_axes), best)
        best = jax.tree.map(lambda x: sharding.resharded(x, sharding.token_axes, None), best)
        best = _best_of_parts(k, best)
    if axis_name is not None:
        sums = merge_shards(axis_name, sums)
        best = _best_of_parts(k, jax.tree.map(partial(all_devices, axis_name), best))
    return sums, best


def _with_block(k, best, z, first, noise):
    """The best k, or all, of those so far (None at first) and of a block of higher numbers."""
    scores = z
    if noise is not None:
        numbers = jnp.arange(z.shape[-1], dtype=jnp.int32)
        numbers = first + jnp.expand_dims(numbers, tuple(range(z.ndim - 1)))
        scores = z + gumbel(noise, numbers, z.dtype)
    if best is None:
        scores, at = lax.top_k(scores, min(k, z.shape[-1]))
        return Best(scores, first + at, None if noise is None else _at(z, at))
    # Those so far come first, so they stay first among equal ones.
    count = best.scores.shape[-1]
    scores, at = lax.top_k(jnp.concatenate([best.scores, scores], axis=-1), count)
    kept, own = at < count, at - count
    labels = jnp.where(kept, _at(best.labels, at), first + own)
    logits = None if noise is None else jnp.where(kept, _at(best.logits, at), _at(z, own))
    return Best(scores, labels, logits)


def _best_of_parts(k, parts):
    """The best k of those of all parts of the classes, one after the other."""
    scores, at = lax.top_k(parts.scores, min(k, parts.scores.shape[-1]))
    return Best(scores, *(None if x is None else _at(x, at) for x in parts[1:]))


def _at(x, index):
    """The entries of each row at the nearest index that there is."""
    return jnp.take_along_axis(x, index, axis=-1, mode="clip")


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
