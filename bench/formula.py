# SPDX-License-Identifier: Apache-2.0
"""The temporary memory of our heads as a formula: what the docstrings of the library say, computed.

It is that of value and gradient, beyond arguments and results, in bytes, for float32 and bfloat16;
float16 may take more. `tests/test_memory.py` compares it with the compilers and the docstrings.
"""

import jax

from bench.cases import Dtype, Head

MIB = 1 << 20
# What the float32 logits of a chunk take at most; the tokens in a chunk, and in a group of chunks.
LOGITS_BYTES = {"cpu": 56 * MIB, "other": 512 * MIB}
FEWEST, MOST = 256, 4096
BLOCK, MOST_CLASSES, BLOCK_BYTES = 2048, 8192, 256 * MIB
SMALL = 64 * MIB  # of float32 logits: so few are treated alike on all platforms
TILE = 256
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


def chunk(head: Head, platform: str) -> tuple[int, int]:
    """The tokens in a chunk, and in a group of chunks whose d_logits are kept (0: in none).

    A chunk has as many as the budget allows, of equal size; a group as many as 4·H·V bytes hold,
    but at most 4096, unless they hold all.
    """
    N, H, V, dtype = head
    on_cpu = platform == "cpu" or 4 * N * V <= SMALL
    most = min(max(LOGITS_BYTES["cpu" if on_cpu else "other"] // (4 * V), FEWEST), MOST)
    if on_cpu:
        return -(-N // -(-N // most)), 0
    most -= most % TILE
    if most >= N:
        return N, N
    fit = 4 * H // (4 if dtype == Dtype.FLOAT32 else 2)
    kept = N if fit >= N else min(max(fit, most), MOST)
    group = -(-N // -(-N // kept))
    chunks = -(-group // most)
    c = -(-group // (chunks * TILE)) * TILE
    return c, c * chunks if chunks > 1 else 0


def block(head: Head, platform: str) -> int:
    """The classes in a block: as many as the budget allows, in blocks of equal size."""
    N, _, V, _ = head
    if platform == "cpu" or 4 * N * V <= SMALL:
        return min(BLOCK, V)
    most = min(max(BLOCK_BYTES // (4 * N), BLOCK), MOST_CLASSES)
    most -= most % TILE
    return min(V, -(-V // (-(-V // most) * TILE)) * TILE)
