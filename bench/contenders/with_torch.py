# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own losses, eager, on the same memory as the JAX arrays."""

import math
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


def kl_divergence(logits: Any, target: Any) -> Any:
    """Return one divergence per row."""
    return _kl(functional.log_softmax(logits, -1), functional.log_softmax(target, -1))


def js_divergence(logits: Any, target: Any) -> Any:
    """Take the mean of both divergences to the mixture."""
    log_q, log_p = functional.log_softmax(logits, -1), functional.log_softmax(target, -1)
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (_kl(log_m, log_p) + _kl(log_m, log_q)) / 2


def _kl(log_q: Any, log_p: Any) -> Any:
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


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


def losses_and_gradients(
    loss: Callable[..., Any], parameters: int, *inputs: Any
) -> tuple[Any, tuple[Any, ...]]:
    """As `bench.cases.losses_and_gradients`, in float64 arrays of NumPy, which has no bfloat16."""
    tensors = [torch.from_dlpack(array) for array in inputs]
    leaves = [tensor.detach().requires_grad_() for tensor in tensors[:parameters]]
    losses = loss(*leaves, *tensors[parameters:])
    gradients = torch.autograd.grad(losses.sum(), leaves)
    losses, *gradients = (tensor.detach().double().cpu().numpy() for tensor in (losses, *gradients))
    return losses, tuple(gradients)


def _computed(tensor: Any) -> Any:
    if tensor.is_cuda:
        torch.cuda.synchronize()
    return tensor
