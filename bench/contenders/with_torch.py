# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own losses, eager, on the same memory as the JAX arrays."""

from collections.abc import Callable
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from torch.nn import functional  # pyright: ignore[reportMissingImports]

from bench.cases import LEARNING_RATE, Mode


def integer_labels(logits: Any, labels: Any) -> Any:
    """Return one loss per row."""
    return functional.cross_entropy(logits, labels.long(), reduction="none")


def dense_labels(logits: Any, labels: Any) -> Any:
    """Return one loss per row."""
    return functional.cross_entropy(logits, labels, reduction="none")


def head(hidden: Any, kernel: Any, labels: Any) -> Any:
    """Materialise the logits."""
    return functional.linear_cross_entropy(hidden, kernel.T, labels.long())


def head_in_chunks(hidden: Any, kernel: Any, labels: Any) -> Any:
    """Go over chunks, with the options PyTorch chooses."""
    options = torch.nn.LinearCrossEntropyOptions()
    return functional.linear_cross_entropy(hidden, kernel.T, labels.long(), options=options)


def program(loss: Callable[..., Any], mode: Mode, parameters: int) -> Callable[..., Any]:
    """As `bench.cases.program`; a training step writes into the memory that it was handed."""

    def run(*inputs: Any) -> Any:
        tensors = [torch.from_dlpack(array) for array in inputs]
        if mode is Mode.FORWARD:
            with torch.no_grad():
                return _computed(loss(*tensors))
        leaves = [tensor.detach().requires_grad_() for tensor in tensors[:parameters]]
        value = loss(*leaves, *tensors[parameters:]).mean()
        gradients = torch.autograd.grad(value, leaves)
        if mode is Mode.VALUE_AND_GRAD:
            return _computed(value.detach()), gradients
        for tensor, gradient in zip(tensors, gradients, strict=False):
            tensor.sub_(gradient, alpha=LEARNING_RATE)
        return _computed(value.detach()), inputs[:parameters]

    return run


def losses_and_gradients(loss: Callable[..., Any], logits: Any, labels: Any) -> tuple[Any, Any]:
    """As `bench.cases.losses_and_gradients`, in float64 arrays of NumPy, which has no bfloat16."""
    leaf = torch.from_dlpack(logits).detach().requires_grad_()
    losses = loss(leaf, torch.from_dlpack(labels))
    (gradients,) = torch.autograd.grad(losses.sum(), leaf)
    losses, gradients = (tensor.detach().double().cpu().numpy() for tensor in (losses, gradients))
    return losses, gradients


def _computed(tensor: Any) -> Any:
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return tensor
