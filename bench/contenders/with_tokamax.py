# SPDX-License-Identifier: Apache-2.0
"""tokamax's op, by its implementation that runs everywhere and holds the logits."""

import jax
import tokamax  # pyright: ignore[reportMissingImports]
from absl import flags

# tokamax reads its settings from absl's flags, which only absl's own programs parse.
if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()


def head(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Hold the logits."""
    return tokamax.linear_softmax_cross_entropy_loss(
        hidden, labels, kernel, reduction="mean", implementation="xla"
    )
