# SPDX-License-Identifier: Apache-2.0
"""The temporary memory of our heads as a formula: what the docstrings of the library say, computed.

It is that of value and gradient, beyond arguments and results, in bytes, for float32 and bfloat16;
float16 may take more. `tests/test_memory.py` compares it with the compilers and the docstrings.
"""

import jax

from bench.cases import Dtype, Head

MIB = 1 << 20
# What the float32 logits of a chunk take at most, by JAX's default backend; the tokens in a chunk.
LOGITS_BYTES = {"cpu": 56 * MIB, "default": 448 * MIB}
FEWEST, MOST = 256, 4096
BLOCK = 2048  # classes
PRODUCT_BYTES = 8 * MIB  # at most, of a product that a CPU adds to d_kernel at once, or its columns


def temporary_bytes(head: Head, gradients: str, platform: str) -> int:
    """The memory of a head on one device, by the order of its work."""
    return {"in_forward": in_forward, "recompute": recompute}[gradients](head, platform)


def in_forward(head: Head, platform: str) -> int:
    """By chunks of tokens: the docstring of `linear_loss`."""
    N, H, V, dtype = head
    c = chunk(head)
    blocks = PRODUCT_BYTES * (max(c, H) + min(c, H)) // max(c, H) if platform == "cpu" else 0
    if dtype == Dtype.FLOAT32:
        kernel = 2 * H * V if platform == "tpu" else 0  # in bfloat16, for its products
        return 4 * c * V + 8 * N * H + kernel + blocks
    # A CPU keeps a chunk's float32 logits in the later memory of d_kernel, as far as they fit.
    logits = 2 * c * V + max(0, 4 * c * V - 2 * H * V) if platform == "cpu" else 8 * c * V
    return 4 * H * V + logits + 6 * N * H + blocks


def recompute(head: Head, platform: str) -> int:
    """By blocks of classes: the docstring of `linear_log_probs`."""
    N, H, V, dtype = head
    b = min(BLOCK, V)
    logits = N * (b + V % b if platform == "cpu" else b)  # a smaller last block counts as well
    if dtype == Dtype.FLOAT32:
        return 4 * logits + 4 * N * H + 8 * H * b
    size = 6 * logits + 8 * N * H + 6 * H * b
    if platform == "cpu" and dtype == Dtype.BFLOAT16 and jax.__version_info__ < (0, 11):
        # d_kernel as integers is a copy; about half of the rest shares the memory of d_kernel.
        return max(size, 2 * H * V + size // 2)
    return size


def chunk(head: Head) -> int:
    """The tokens in a chunk: as many as the budget allows, in chunks of equal size."""
    budget = LOGITS_BYTES.get(jax.default_backend(), LOGITS_BYTES["default"])
    most = min(max(budget // (4 * head.classes), FEWEST), MOST)
    return -(-head.tokens // -(-head.tokens // most))
