# SPDX-License-Identifier: Apache-2.0
"""What users write with JAX alone: the log-softmax, then the labels' share of it; a choice."""

import math

import jax
import jax.numpy as jnp

from bench import cases

TOP = 64  # classes of each token


def integer_labels(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Pick minus the label's log-probability."""
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probs, labels[:, None], axis=-1).squeeze(-1)


def dense_labels(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Sum minus the log-probabilities weighted by the labels."""
    return -jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1)


def kl_divergence(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Sum the difference of the log-probabilities, weighted by the target's."""
    return _kl(jax.nn.log_softmax(logits), jax.nn.log_softmax(target))


def js_divergence(logits: jax.Array, target: jax.Array) -> jax.Array:
    """Take the mean of both divergences to the mixture."""
    log_q, log_p = jax.nn.log_softmax(logits), jax.nn.log_softmax(target)
    log_m = jnp.logaddexp(log_p, log_q) - math.log(2)
    return (_kl(log_m, log_p) + _kl(log_m, log_q)) / 2


def _kl(log_q: jax.Array, log_p: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def top_k(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Find the most probable classes."""
    del labels
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    highest, classes = jax.lax.top_k(logits, min(TOP, kernel.shape[1]))
    return highest - jax.nn.logsumexp(logits, axis=-1, keepdims=True), classes


def sample(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draw a class by a key that is made of a label."""
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    drawn = jax.random.categorical(jax.random.key(labels[0]), logits)
    return drawn, -integer_labels(logits, drawn)


def head_of_several(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Materialise the logits in float32, for 8 labels a token and the accuracy."""
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    several = cases.several(labels, kernel.shape[1])
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), several, axis=-1)
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels) - jnp.mean(log_probs)
