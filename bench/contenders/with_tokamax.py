# SPDX-License-Identifier: Apache-2.0
"""tokamax's op, by its two implementations that run everywhere."""

import jax
import tokamax  # pyright: ignore[reportMissingImports]
from absl import flags, logging

# tokamax reads its settings from absl's flags, which only absl's own programs parse.
if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
logging.set_verbosity(logging.ERROR)  # it warns of every shape that nobody has tuned it for


def head(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Hold the logits."""
    return tokamax.linear_softmax_cross_entropy_loss(
        hidden, labels, kernel, reduction="mean", implementation="xla"
    )


def head_in_chunks(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Loop over blocks of tokens and of classes, forward and backward, of its default sizes."""
    return tokamax.linear_softmax_cross_entropy_loss(
        hidden, labels, kernel, reduction="mean", implementation="chunked_xla"
    )
