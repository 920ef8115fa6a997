# SPDX-License-Identifier: Apache-2.0
"""What users write with jax.nn alone: the log-softmax, then the labels' share of it."""

import jax
import jax.numpy as jnp


def integer_labels(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Pick minus the label's log-probability."""
    log_probs = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_probs, labels[:, None], axis=-1).squeeze(-1)


def dense_labels(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Sum minus the log-probabilities weighted by the labels."""
    return -jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1)
