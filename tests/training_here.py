# SPDX-License-Identifier: Apache-2.0
"""`jaxsoftmax train` in the tests' own process, where the start of a process is not the question.

It has conftest's eight devices, of which a run without --mesh uses one.
"""

import jax

from jaxsoftmax.training import cli


def train_here(*arguments: object) -> int:
    """The exit code, with the promotions of a user: optax needs them."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return cli.run(["train", *map(str, arguments)])
