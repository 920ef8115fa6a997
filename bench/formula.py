# SPDX-License-Identifier: Apache-2.0
"""The temporary memory of our heads as a formula: what the docstrings of the library say, computed.

It is that of value and gradient (of top-k and samples, of a call), beyond arguments and results, in
bytes, for float32 and bfloat16; float16 may take more. `tests/test_memory.py` compares it with the
compilers and the docstrings.
"""

import jax

from bench.cases import Dtype, Head
from jaxsoftmax._head import sizes

MIB = 1 << 20
PRODUCT_BYTES = 8 * MIB  # at most, of a product that a CPU adds to d_kernel at once, or its columns


def temporary_bytes(head: Head, gradients: str, platform: str) -> int:
    """The memory of a head on one device, by the order of its work."""
    return {"in_forward": in_forward, "recompute": recompute}[gradients](head, platform)


def in_forward(head: Head, platform: str) -> int:
    """By chunks of tokens: the docstring of `linear_loss`."""
    N, H, V, dtype = head
    c, g = chunk(head, platform)
    once = c >= N or g >= N
    blocks = PRODUCT_BYTES * (max(c, H) + min(c, H)) // max(c, H) if platform == "cpu" else 0
    if dtype == Dtype.FLOAT32:
        kernel = 2 * H * V if platform == "tpu" else 0  # in bfloat16, for its products
        return 4 * c * V + 4 * g * V + 8 * N * H + kernel + blocks
    if platform == "cpu":
        # Logits in float32 stand in the later memory of d_kernel, as far as they fit.
        return 4 * H * V + 2 * c * V + max(0, 4 * c * V - 2 * H * V) + 6 * N * H + blocks
    kept = 2 * g * V if once or platform != "tpu" else 4 * g * V  # a TPU's loop keeps them twice
    return (0 if once else 4 * H * V) + 8 * c * V + kept + 6 * N * H


def recompute(head: Head, platform: str) -> int:
    """By blocks of classes: the docstring of `linear_log_probs`."""
    N, H, V, dtype = head
    b = block(head, platform)
    logits = N * (b + V % b if platform == "cpu" else b)  # a smaller last block counts as well
    if dtype == Dtype.FLOAT32:
        return 4 * logits + 4 * N * H + 8 * H * b
    size = 6 * logits + 8 * N * H + 6 * H * b
    if platform == "cpu" and dtype == Dtype.BFLOAT16 and jax.__version_info__ < (0, 11):
        # d_kernel as integers is a copy; about half of the rest shares the memory of d_kernel.
        return max(size, 2 * H * V + size // 2)
    return size


def top_k(head: Head, k: int, platform: str) -> int:
    """The k most probable classes, forward alone: the docstring of `linear_top_k`."""
    N, _, V, _ = head
    b = block(head, platform)
    return 8 * N * b + 8 * N * k + (4 * N * (V % b) if platform == "cpu" else 0)


def sample(head: Head, platform: str) -> int:
    """A class for each token, forward alone: the docstring of `linear_sample`."""
    N, _, V, _ = head
    b = block(head, platform)
    return 12 * N * b + (8 * N * (V % b) if platform == "cpu" else 0)


def chunk(head: Head, platform: str) -> tuple[int, int]:
    """The tokens in a chunk, and in a group of chunks whose d_logits are kept (0: in none)."""
    N, H, V, dtype = head
    found = sizes.chunks(N, H, V, 4 if dtype == Dtype.FLOAT32 else 2, None, 1)
    size, group = found.cpu if platform == "cpu" else found.other
    if sizes.is_small(N, V) or platform == "cpu":
        return size, 0
    return size, N if group * size >= N else size * group if group > 1 else 0


def block(head: Head, platform: str) -> int:
    """The classes in a block."""
    N, _, V, _ = head
    found = sizes.blocks(N, V, None, 1)
    return min(V, found.cpu if platform == "cpu" else found.other)
