# SPDX-License-Identifier: Apache-2.0
"""What changes when an axis is sharded, and every difference between JAX versions."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def is_local(*arrays: jax.Array) -> bool:
    """Whether it is certain, while tracing, that each array lies on one device.

    A loop over slices of a sharded axis would gather it. Explicit shardings can be read
    off the type; an automatic mesh cannot be seen, but it needs a second device.
    """
    return jax.device_count() == 1 and not any(
        axis for array in arrays for axis in jax.typeof(array).sharding.spec
    )


def manual_axes(*arrays: jax.Array) -> frozenset[str]:
    """The mesh axes of `shard_map` over which any of the arrays varies."""
    return frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))


def varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """`x` as an array that varies over these axes too; its cotangent is summed over them."""
    missing = tuple(sorted(axes - manual_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def aligned(tree: Any) -> Any:
    """Arrays that all vary over the same axes, as a custom rule's cotangents will."""
    axes = manual_axes(*jax.tree.leaves(tree))
    return jax.tree.map(lambda x: varying(x, axes), tree)


def summed_as(d: jax.Array, x: jax.Array) -> jax.Array:
    """The cotangent of `x`, summed over the axes that only the cotangent varies over."""
    extra = tuple(sorted(manual_axes(d) - manual_axes(x)))
    return lax.psum(d, extra) if extra else d


def sliceable(x: jax.Array) -> jax.Array:
    """`x` in a form that XLA:CPU slices, and updates a slice of, in place; see `restored`.

    XLA:CPU of JAX 0.10 slices a bfloat16 array by making a float32 copy of all of it; a copy
    as integers is half of that ([4096, 32000]: 125 ms against 208; 60 with JAX 0.12).
    """
    on_old_cpu = jax.__version_info__ < (0, 11) and jax.default_backend() == "cpu"
    if x.dtype == jnp.bfloat16 and on_old_cpu:
        return lax.bitcast_convert_type(x, jnp.uint16)
    return x


def restored(piece: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """A slice of what `sliceable` gave, in the dtype the array had."""
    return piece if piece.dtype == dtype else lax.bitcast_convert_type(piece, dtype)
