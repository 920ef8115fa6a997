# SPDX-License-Identifier: Apache-2.0
"""What the device can do at most, measured in the run it is compared with: bytes and flops."""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from bench import timing
from bench.cases import Dtype

# Elsewhere so much that the call itself takes no part of the time.
COPY_BYTES = {"cpu": 2**28, "default": 2**32}
WIDTHS = {"cpu": 2048, "default": 8192}  # of the square matrices
ROUNDS = 3


def measure(dtypes: Iterable[Dtype]) -> dict[str, Any]:
    """Time a large copy, and a large matrix product of each dtype.

    The copy is written into memory that is there: memory fresh from the system is several times
    slower on a CPU, which is the program's cost and not the device's.

    Returns:
        `bytes_per_s`, read and written; `flops_per_s` by dtype.
    """
    platform = jax.default_backend()
    size, width = (sizes.get(platform) or sizes["default"] for sizes in (COPY_BYTES, WIDTHS))
    copied = [(jnp.zeros((1024, size // 4096), jnp.float32),)]
    copy_s = _seconds(lambda x: (0.0, (x + 1,)), copied, donated=1)
    matrices = {dtype: [(jnp.ones((width, width), dtype),) * 2] for dtype in dtypes}
    return {
        "bytes_per_s": 2 * size / copy_s,
        "flops_per_s": {
            dtype.value: 2 * width**3 / _seconds(jnp.dot, pair) for dtype, pair in matrices.items()
        },
    }


def _seconds(function: timing.Program, inputs: list[tuple[Any, ...]], *, donated: int = 0) -> float:
    compiled, _ = timing.compile_ahead(function, inputs[0], donated=donated)
    call = timing.caller(inputs, donated=donated)
    return timing.interleave({"roof": compiled}, call, rounds=ROUNDS)["roof"].median_s


def least_seconds(roofs: dict[str, Any], dtype: str, *, nbytes: int, flops: int) -> float:
    """What moving so many bytes, or so many flops, takes at the roof: the longer of the two."""
    return max(nbytes / roofs["bytes_per_s"], flops / roofs["flops_per_s"][dtype])


def in_words(roofs: dict[str, Any] | None) -> str:
    """Say the roofs in a line, for under a table."""
    if roofs is None:
        return ""
    products = ", ".join(
        f"{flops / 1e9:.0f} GFLOP/s in {dtype}" for dtype, flops in roofs["flops_per_s"].items()
    )
    return (
        "Of the roof: the least time for the row's bytes and flops, over the time taken; the least "
        f"is that of a large copy in place ({roofs['bytes_per_s'] / 1e9:.1f} GB/s) or of a large "
        f"matrix product ({products}), whichever is longer, both measured in the same run."
    )
