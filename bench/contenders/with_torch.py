# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own cross-entropies, eager, on the same memory as the JAX arrays."""

from typing import Any

import jax
import numpy as np
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]


def integer_labels(logits: jax.Array, labels: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Take the logits as they come."""
    return _losses_and_gradients(logits, torch.from_dlpack(labels).long())


def dense_labels(logits: jax.Array, labels: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Take logits and labels as they come."""
    return _losses_and_gradients(logits, torch.from_dlpack(labels))


def _losses_and_gradients(logits, labels):
    z = torch.from_dlpack(logits).detach().requires_grad_()
    losses = functional.cross_entropy(z, labels, reduction="none")
    (gradients,) = torch.autograd.grad(losses.sum(), z)
    return losses.detach().double().numpy(), gradients.double().numpy()


def head(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> tuple[Any, ...]:
    """Materialise the logits."""
    return _value_and_gradients(hidden, kernel, labels, None)


def head_in_chunks(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> tuple[Any, ...]:
    """Go over chunks, with the options PyTorch chooses."""
    return _value_and_gradients(hidden, kernel, labels, torch.nn.LinearCrossEntropyOptions())


def _value_and_gradients(hidden, kernel, labels, options):
    x, w, y = (torch.from_dlpack(array) for array in (hidden, kernel.T, labels))
    x, w = (tensor.detach().requires_grad_() for tensor in (x, w))
    loss = functional.linear_cross_entropy(x, w, y.long(), options=options)
    return loss, *torch.autograd.grad(loss, (x, w))
