# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own linear cross-entropy, eager, on the same memory as the JAX arrays."""

from typing import Any

import jax
import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]


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
