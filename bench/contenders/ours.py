# SPDX-License-Identifier: Apache-2.0
"""This library."""

import jax
import jax.numpy as jnp

import jaxsoftmax
from bench import cases

TOP = 64  # classes of each token

integer_labels = jaxsoftmax.softmax_cross_entropy_with_integer_labels
dense_labels = jaxsoftmax.softmax_cross_entropy
kl_divergence = jaxsoftmax.softmax_kl_divergence
js_divergence = jaxsoftmax.softmax_js_divergence


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
    return jaxsoftmax.linear_softmax_cross_entropy(
        hidden, kernel, labels, ignore_index=cases.IGNORED
    )


def head_in_forward_ignoring(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Leave ignored tokens out of the mean, with the gradient made in the forward pass."""
    return jaxsoftmax.linear_softmax_cross_entropy(
        hidden, kernel, labels, ignore_index=cases.IGNORED, gradients="in_forward"
    )


def head_recompute_ignoring(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Leave ignored tokens out of the mean, block by block."""
    return jaxsoftmax.linear_softmax_cross_entropy(
        hidden, kernel, labels, ignore_index=cases.IGNORED, gradients="recompute"
    )


def head_with_options(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Smooth the labels, hold the normalizers down, cap the logits."""
    return jaxsoftmax.linear_softmax_cross_entropy(
        hidden, kernel, labels, label_smoothing=0.1, z_loss=1e-4, soft_cap=30.0
    )


def head_of_several(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Take 8 labels a token, and the accuracy from the same pass."""
    out = jaxsoftmax.linear_log_probs(
        hidden, kernel, cases.several(labels, kernel.shape[1]), with_predictions=True
    )
    return jnp.mean(out.predictions == labels) - jnp.mean(out.log_probs)


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


def head_kl(
    hidden: jax.Array, kernel: jax.Array, target_hidden: jax.Array, target_kernel: jax.Array
) -> jax.Array:
    """Take KL through both heads."""
    return jaxsoftmax.linear_kl_divergence(hidden, kernel, target_hidden, target_kernel)


def head_js(
    hidden: jax.Array, kernel: jax.Array, target_hidden: jax.Array, target_kernel: jax.Array
) -> jax.Array:
    """Take JS through both heads."""
    return jaxsoftmax.linear_js_divergence(hidden, kernel, target_hidden, target_kernel)


def top_k(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jaxsoftmax.TopK:
    """Find the most probable classes."""
    del labels
    return jaxsoftmax.linear_top_k(hidden, kernel, min(TOP, kernel.shape[1]))


def sample(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jaxsoftmax.Sample:
    """Draw a class by a key that is made of a label, so that nothing is known before the call."""
    return jaxsoftmax.linear_sample(jax.random.key(labels[0]), hidden, kernel)
