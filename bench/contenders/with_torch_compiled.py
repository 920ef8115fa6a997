# SPDX-License-Identifier: Apache-2.0
"""PyTorch's own losses, compiled."""

from collections.abc import Callable
from typing import Any

import torch  # pyright: ignore[reportMissingImports]

from bench.cases import Mode
from bench.contenders import with_torch

integer_labels, dense_labels = with_torch.integer_labels, with_torch.dense_labels


def program(loss: Callable[..., Any], mode: Mode, parameters: int) -> Callable[..., Any]:
    """As `with_torch.program`; reset first, or PyTorch would go back to eager after some shapes."""
    torch.compiler.reset()
    return with_torch.program(torch.compile(loss, dynamic=False), mode, parameters)
