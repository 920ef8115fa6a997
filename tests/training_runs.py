# SPDX-License-Identifier: Apache-2.0
"""Runs of `jaxsoftmax train` in the tests' own process, and how far a run has come."""

from pathlib import Path

import jax

from jaxsoftmax.training import cli


def train_here(*arguments: object) -> int:
    """The exit code, where the start of a process is not the question.

    There are conftest's eight devices, of which a run without --mesh uses one; optax needs the
    promotions of a user.
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return cli.run(["train", *map(str, arguments)])


def newest(folder: Path) -> int:
    """The number of epochs of the last checkpoint."""
    names = [path.name for path in (folder / "checkpoints").glob("[0-9]*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)
