# SPDX-License-Identifier: Apache-2.0
"""optax's losses, on the logits as they come and on logits upcast to float32.

In half precision optax accumulates in the dtype of the logits, so careful users upcast first; that
is what ours is compared with.
"""

import jax
import jax.numpy as jnp
import optax

integer_labels = optax.softmax_cross_entropy_with_integer_labels
dense_labels = optax.softmax_cross_entropy


def integer_labels_upcast(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Upcast the logits, then as optax."""
    return integer_labels(logits.astype(jnp.float32), labels)


def dense_labels_upcast(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Upcast logits and labels, then as optax."""
    return dense_labels(logits.astype(jnp.float32), labels.astype(jnp.float32))
