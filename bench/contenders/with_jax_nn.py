# SPDX-License-Identifier: Apache-2.0
"""What users write with jax.nn alone: the log-softmax, then the labels' share of it."""

import jax
import jax.numpy as jnp

from bench import cases


def integer_labels(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Pick minus the label's log-probability."""
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probs, labels[:, None], axis=-1).squeeze(-1)


def dense_labels(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Sum minus the log-probabilities weighted by the labels."""
    return -jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1)


def head_of_several(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Materialise the logits in float32, for 8 labels a token and the accuracy."""
    logits = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
    several = cases.several(labels, kernel.shape[1])
    log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), several, axis=-1)
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels) - jnp.mean(log_probs)
