# SPDX-License-Identifier: Apache-2.0
"""Which device holds what: a mesh with named axes, and arrays split over it.

The axis `data` splits the examples and every batch, `vocab` the classes of the last layer, `fsdp`
both the batch and the parameters. What does not divide evenly is padded with zeros, which a
classifier never counts; a language model refuses such a mesh.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxsoftmax.training.errors import ProgramError

DATA, FSDP, VOCAB = "data", "fsdp", "vocab"


def make_mesh(sizes: Mapping[str, int] | None, axes: Sequence[str]) -> Mesh:
    """A mesh over all devices of all processes.

    Args:
        sizes: by axis; an axis that is left out has size 1. None stands for `data` over all
            devices of several processes, and for the first device of a single one.
        axes: the names of all axes.

    Raises:
        ProgramError: the sizes do not multiply to the number of devices.
    """
    devices = jax.devices() if sizes or jax.distributed.is_initialized() else jax.devices()[:1]
    sizes = sizes or {DATA: len(devices)}
    if math.prod(sizes.values()) != len(devices):
        wanted = ",".join(f"{name}={size}" for name, size in sizes.items())
        raise ProgramError(
            f"--mesh {wanted}: the sizes must multiply to the number of devices, {len(devices)} "
            f"({devices[0].platform}); got {math.prod(sizes.values())}"
        )
    shape = tuple(sizes.get(axis, 1) for axis in axes)
    return jax.make_mesh(shape, tuple(axes), (AxisType.Auto,) * len(axes), devices=devices)


def shares(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    """In how many parts these axes of the mesh split an array."""
    axes = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[axis] for axis in axes)


def split(tree: Any, mesh: Mesh, specs: Any) -> Any:
    """Global arrays, of which each process holds the parts that are on its own devices.

    Args:
        tree: the same whole arrays in every process.
        mesh: what `make_mesh` gave.
        specs: a `PartitionSpec` for each array, or one for all.

    Returns:
        The arrays, each axis that is split padded with zeros to divide evenly.
    """

    def one(x: Any, spec: PartitionSpec) -> jax.Array:
        x = np.asarray(x)
        names = (*spec, *[None] * (x.ndim - len(spec)))
        padding = [
            (0, -size % shares(mesh, name)) for size, name in zip(x.shape, names, strict=True)
        ]
        x = np.pad(x, padding) if any(map(any, padding)) else x
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, spec), x.__getitem__)

    if isinstance(specs, PartitionSpec):
        return jax.tree.map(lambda x: one(x, specs), tree)
    return jax.tree.map(one, tree, specs)


def whole(tree: Any, like: Any) -> Any:
    """The arrays that `split` was given, in every process; `like` has their shapes.

    In memory of their own: a later step may donate that of `tree`.
    """
    gathered = multihost_utils.process_allgather(tree, tiled=True)
    return jax.tree.map(lambda x, y: np.array(x[(..., *map(slice, np.shape(y)))]), gathered, like)
