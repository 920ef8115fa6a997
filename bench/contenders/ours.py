# SPDX-License-Identifier: Apache-2.0
"""This library."""

import jax

import jaxsoftmax

integer_labels = jaxsoftmax.softmax_cross_entropy_with_integer_labels
dense_labels = jaxsoftmax.softmax_cross_entropy


def head_in_forward(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Make the gradient in the forward pass."""
    return jaxsoftmax.linear_softmax_cross_entropy(hidden, kernel, labels, gradients="in_forward")


def head_with_options(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Smooth the labels, hold the normalizers down, cap the logits."""
    return jaxsoftmax.linear_softmax_cross_entropy(
        hidden, kernel, labels, label_smoothing=0.1, z_loss=1e-4, soft_cap=30.0
    )


def head_recompute(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Recompute the logits, block by block, in the backward pass."""
    return jaxsoftmax.linear_softmax_cross_entropy(hidden, kernel, labels, gradients="recompute")
