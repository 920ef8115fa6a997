# SPDX-License-Identifier: Apache-2.0
"""optax's losses, on the logits as they come and on logits upcast to float32.

In half precision optax accumulates in the dtype of the logits, so careful users upcast first; that
is what ours is compared with.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from bench.cases import IGNORED

CHUNK = 512

integer_labels = optax.softmax_cross_entropy_with_integer_labels
dense_labels = optax.softmax_cross_entropy


def integer_labels_upcast(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Upcast the logits, then as optax."""
    return integer_labels(logits.astype(jnp.float32), labels)


def dense_labels_upcast(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Upcast logits and labels, then as optax."""
    return dense_labels(logits.astype(jnp.float32), labels.astype(jnp.float32))


def kl_divergence(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Upcast the logits; optax takes log-probabilities, and probabilities of the target."""
    return _kl(_log_probs(logits), _log_probs(target))


def kl_divergence_with_log_targets(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Hand over the target's log-probabilities."""
    return optax.losses.kl_divergence_with_log_targets(_log_probs(logits), _log_probs(target))


def generalized_kl_divergence(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Also add `q − p`, whose sum is 0."""
    return optax.losses.generalized_kl_divergence(_log_probs(logits), jnp.exp(_log_probs(target)))


def js_divergence(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Take the mean of both divergences to the mixture."""
    log_q, log_p = _log_probs(logits), _log_probs(target)
    log_m = jnp.logaddexp(log_p, log_q) - math.log(2)
    return (_kl(log_m, log_p) + _kl(log_m, log_q)) / 2


def _kl(log_q: jax.Array, log_p: jax.Array) -> jax.Array:
    return optax.losses.kl_divergence(log_q, jnp.exp(log_p))


def _log_probs(logits: jax.Array) -> jax.Array:
    return jax.nn.log_softmax(logits.astype(jnp.float32))


def head(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Materialise the logits in float32."""
    return jnp.mean(_losses(hidden, kernel, labels))


def head_ignoring(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Materialise all logits, and leave the losses of ignored tokens out of the mean."""
    counted = labels != IGNORED
    losses = _losses(hidden, kernel, jnp.where(counted, labels, 0))
    return jnp.sum(losses, where=counted) / jnp.maximum(jnp.sum(counted, dtype=losses.dtype), 1)


def head_in_chunks(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Checkpoint each chunk of tokens, as users write by hand; the tokens must divide."""
    chunks = max(1, len(labels) // CHUNK)

    def chunk(arrays: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _losses(arrays[0], kernel, arrays[1])

    split = hidden.reshape(chunks, -1, hidden.shape[-1]), labels.reshape(chunks, -1)
    return jnp.mean(jax.lax.map(jax.checkpoint(chunk), split))


def head_kl(
    hidden: jax.Array, kernel: jax.Array, target_hidden: jax.Array, target_kernel: jax.Array
) -> jax.Array:
    """Materialise both logits in float32."""
    return jnp.mean(kl_divergence(_dot(hidden, kernel), _dot(target_hidden, target_kernel)))


def head_js(
    hidden: jax.Array, kernel: jax.Array, target_hidden: jax.Array, target_kernel: jax.Array
) -> jax.Array:
    """Materialise both logits in float32."""
    return jnp.mean(js_divergence(_dot(hidden, kernel), _dot(target_hidden, target_kernel)))


def head_kl_in_chunks(
    hidden: jax.Array, kernel: jax.Array, target_hidden: jax.Array, target_kernel: jax.Array
) -> jax.Array:
    """Checkpoint each chunk of tokens."""
    return _in_chunks(kl_divergence, hidden, kernel, target_hidden, target_kernel)


def head_js_in_chunks(
    hidden: jax.Array, kernel: jax.Array, target_hidden: jax.Array, target_kernel: jax.Array
) -> jax.Array:
    """Checkpoint each chunk of tokens."""
    return _in_chunks(js_divergence, hidden, kernel, target_hidden, target_kernel)


def _in_chunks(
    divergence: Callable[..., jax.Array],
    hidden: jax.Array,
    kernel: jax.Array,
    target_hidden: jax.Array,
    target_kernel: jax.Array,
) -> jax.Array:
    chunks = max(1, len(hidden) // CHUNK)

    def chunk(arrays: tuple[jax.Array, jax.Array]) -> jax.Array:
        return divergence(_dot(arrays[0], kernel), _dot(arrays[1], target_kernel))

    split = tuple(x.reshape(chunks, -1, x.shape[-1]) for x in (hidden, target_hidden))
    return jnp.mean(jax.lax.map(jax.checkpoint(chunk), split))


def _losses(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    return integer_labels(_dot(hidden, kernel), labels)


def _dot(hidden: jax.Array, kernel: jax.Array) -> jax.Array:
    return jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
