# SPDX-License-Identifier: Apache-2.0
"""jax-cce's scan over blocks of the vocabulary, with its own block size."""

import jax
import jax_cce  # pyright: ignore[reportMissingImports]


def head(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Hand over the kernel as jax-cce lays it out, `[V, H]`."""
    return jax_cce.linear_cross_entropy(hidden, kernel.T, labels)
