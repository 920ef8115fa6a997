# SPDX-License-Identifier: Apache-2.0
"""This library."""

import jax

import jaxsoftmax
from bench.cases import IGNORED

integer_labels = jaxsoftmax.softmax_cross_entropy_with_integer_labels
dense_labels = jaxsoftmax.softmax_cross_entropy


def head(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Take the gradient in the order that is best where the program runs."""
    return jaxsoftmax.linear_softmax_cross_entropy(hidden, kernel, labels)


def head_in_forward(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Make the gradient in the forward pass."""
    return jaxsoftmax.linear_softmax_cross_entropy(hidden, kernel, labels, gradients="in_forward")


def head_recompute(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Recompute the logits, block by block, in the backward pass."""
    return jaxsoftmax.linear_softmax_cross_entropy(hidden, kernel, labels, gradients="recompute")


def head_ignoring(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Leave ignored tokens out of the mean."""
    return jaxsoftmax.linear_softmax_cross_entropy(hidden, kernel, labels, ignore_index=IGNORED)


def head_in_forward_ignoring(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Leave ignored tokens out of the mean, with the gradient made in the forward pass."""
    return jaxsoftmax.linear_softmax_cross_entropy(
        hidden, kernel, labels, ignore_index=IGNORED, gradients="in_forward"
    )


def head_recompute_ignoring(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Leave ignored tokens out of the mean, block by block."""
    return jaxsoftmax.linear_softmax_cross_entropy(
        hidden, kernel, labels, ignore_index=IGNORED, gradients="recompute"
    )


def head_with_options(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Smooth the labels, hold the normalizers down, cap the logits."""
    return jaxsoftmax.linear_softmax_cross_entropy(
        hidden, kernel, labels, label_smoothing=0.1, z_loss=1e-4, soft_cap=30.0
    )


def tied_head(hidden: jax.Array, embedding: jax.Array, labels: jax.Array) -> jax.Array:
    """Use an embedding `[V, H]` as the kernel."""
    return jaxsoftmax.linear_softmax_cross_entropy(hidden, embedding, labels, transpose_kernel=True)


def tied_head_recompute(hidden: jax.Array, embedding: jax.Array, labels: jax.Array) -> jax.Array:
    """Use an embedding `[V, H]`, block by block."""
    return jaxsoftmax.linear_softmax_cross_entropy(
        hidden, embedding, labels, transpose_kernel=True, gradients="recompute"
    )


def head_of_parameters(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Multiply a float32 kernel in the dtype of hidden."""
    return jaxsoftmax.linear_softmax_cross_entropy(
        hidden, kernel, labels, compute_dtype=hidden.dtype
    )
