# SPDX-License-Identifier: Apache-2.0
"""Manual mesh axes, arrays on explicit meshes, and what differs between JAX versions."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, reshard

# `jax.extend.core.Primitive`. That module imports Pallas, and takes as long as all of ours.
Primitive = type(lax.add_p)
# One axis of a mesh, or several, of which the first varies slowest.
AxisName = str | tuple[str, ...]


def axis_names(axis_name: AxisName | None) -> frozenset[str]:
    """The mesh axes of a name, of several, or of None."""
    return frozenset((axis_name,) if isinstance(axis_name, str) else axis_name or ())


def is_local(*arrays: jax.Array) -> bool:
    """Whether it is certain, while tracing, that each array lies on one device.

    A loop over slices of a sharded axis would gather it. The type of an array shows an explicit
    sharding, but not one on an automatic mesh; that needs a second device, though, here or in the
    mesh that is set (to compile for), and inside a `shard_map` over all axes of the mesh nothing is
    left automatic.
    """
    mesh = jax.sharding.get_abstract_mesh()
    manual = bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)
    alone = jax.device_count() == devices_of_automatic_mesh() == 1
    return (manual or alone) and not any(
        axis for array in arrays for axis in jax.typeof(array).sharding.spec
    )


def unseen_devices() -> int:
    """Over how many devices an automatic mesh may spread an array here; no type shows that."""
    unset = jax.sharding.get_abstract_mesh().empty
    return jax.device_count() if unset else devices_of_automatic_mesh()


def is_mesh_unknown() -> bool:
    """Whether arrays may be sharded over a mesh that is not set."""
    return jax.sharding.get_abstract_mesh().empty and jax.device_count() > 1


def devices_of_automatic_mesh() -> int:
    """How many devices the automatic mesh that is set has; 1 without such a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[axis] for axis in mesh.auto_axes)


def hidden_axis_whole(kernel: jax.Array, axis: int) -> jax.Array:
    """A matrix, the kernel, with its hidden axis unsharded, if an automatic mesh is set."""
    if devices_of_automatic_mesh() == 1:
        return kernel
    free = PartitionSpec.UNCONSTRAINED
    spec = PartitionSpec(*(None if i == axis else free for i in range(2)))
    return lax.with_sharding_constraint(kernel, spec)


def manual_axes(*arrays: Any) -> frozenset[str]:
    """The mesh axes of `shard_map` over which any of the arrays varies."""
    return frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))


def varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """`x` as an array that varies over these axes too; its cotangent is summed over them."""
    missing = tuple(sorted(axes - manual_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def aligned(tree: Any) -> Any:
    """Floating arrays that all vary over the same manual axes, as a custom rule's cotangents will.

    Integers have no cotangents: they stay as they are, so that sums over an axis still know that
    they do not vary over it.
    """
    axes = manual_axes(*jax.tree.leaves(tree))
    is_real = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)  # noqa: E731
    return jax.tree.map(lambda x: varying(x, axes) if is_real(x) else x, tree)


def psum_like(d: jax.Array, x: jax.Array) -> jax.Array:
    """The cotangent of `x`, summed over the axes that only the cotangent varies over."""
    extra = tuple(sorted(manual_axes(d) - manual_axes(x)))
    return lax.psum(d, extra) if extra else d


def mesh_axes(entry: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a `PartitionSpec`."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def resharded(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
    """`x` in this sharding, summed over the axes it was unreduced over; unchanged for None."""
    now = jax.typeof(x).sharding
    there = sharding is None or (now.spec == sharding.spec and now.mesh == sharding.mesh)
    return x if there else reshard(x, sharding)


def resharded_like(d: jax.Array, x: jax.Array) -> jax.Array:
    """`d` sharded on an explicit mesh as `x` is, summed over the axes it was unreduced over."""
    of_d, of_x = (jax.typeof(a).sharding for a in (d, x))
    mesh = of_d.mesh if of_x.mesh.empty else of_x.mesh
    return resharded(d, NamedSharding(mesh, of_x.spec))


def in_one_sharding(*arrays: Any) -> tuple[Any, ...]:
    """Arrays that broadcast, or None, in one sharding: for each axis the first that an array has.

    So a derivative sees one sharding; each cotangent comes back in that of its argument.
    """
    given = [a for a in arrays if a is not None]
    shardings = [jax.typeof(a).sharding for a in given]
    if not any(axis for sharding in shardings for axis in sharding.spec):
        return arrays
    mesh = next(s.mesh for s in shardings if not s.mesh.empty)
    entries, seen = [], set()
    for axis in range(given[0].ndim):
        here = (mesh_axes(s.spec[axis]) for s in shardings)
        chosen = next((axes for axes in here if axes and not seen & set(axes)), ())
        seen |= set(chosen)
        entries.append(chosen or None)

    def in_that(a):
        spec = (entry if size > 1 else None for entry, size in zip(entries, a.shape, strict=True))
        return resharded(a, NamedSharding(mesh, PartitionSpec(*spec)))

    return tuple(None if a is None else in_that(a) for a in arrays)


def merge_last(x: jax.Array, count: int) -> jax.Array:
    """The last `count` axes as one, sharded as the first of them is; the others are gathered."""
    shape = (*x.shape[:-count], math.prod(x.shape[-count:]))
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x.reshape(shape)
    *batch, first = sharding.spec[: x.ndim - count + 1]
    alone = PartitionSpec(*batch, first, *[None] * (count - 1))
    x = resharded(x, NamedSharding(sharding.mesh, alone))
    merged = NamedSharding(sharding.mesh, PartitionSpec(*batch, first))
    return jnp.reshape(x, shape, out_sharding=merged)


def split_last(x: jax.Array, like: jax.Array) -> jax.Array:
    """Undoes `merge_last`: the result has the shape and sharding of `like`."""
    sharding = jax.typeof(like).sharding
    if not any(sharding.spec):
        return x.reshape(like.shape)
    alone = PartitionSpec(*sharding.spec[: x.ndim], *[None] * (like.ndim - x.ndim))
    x = jnp.reshape(x, like.shape, out_sharding=NamedSharding(sharding.mesh, alone))
    return resharded(x, sharding)


def sharded_first(x: jax.Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    """`axes` with the sharded ones first: in this order, merging them gathers least."""
    return tuple(sorted(axes, key=lambda axis: not jax.typeof(x).sharding.spec[axis]))


def whole_last(x: jax.Array) -> jax.Array:
    """`x` with its last axis on every device."""
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x
    return resharded(x, NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:-1], None)))


def manual_axes_here() -> tuple[str, ...]:
    """The mesh axes that the enclosing `shard_map` made manual."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def shard_count(axis_name: AxisName | None) -> int:
    """How many devices along manual mesh axes share the classes; 1 if they are not sharded."""
    return 1 if axis_name is None else lax.axis_size(axis_name)


def shard_start(axis_name: AxisName | None, size: int) -> Any:
    """The number of the first class of this device's block of `size`; 0 if not sharded."""
    return 0 if axis_name is None else lax.axis_index(axis_name) * size


def maximum_over(axis_name: AxisName, x: jax.Array) -> jax.Array:
    """The maximum over the devices along manual mesh axes; a constant to differentiation."""
    return lax.pmax(lax.stop_gradient(x), axis_name)


def all_devices(axis_name: AxisName, x: jax.Array) -> jax.Array:
    """`x` of all devices along manual mesh axes, one after the other along the last axis."""
    return lax.all_gather(x, axis_name, axis=x.ndim - 1, tiled=True, to="invarying")


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
    """`lax.top_k` of rows that are whole on their device; XLA for CPUs would gather them all."""

    def rows(x):
        values, indices = lax.top_k(x, k)  # a list or a tuple, by JAX's version
        return values, indices

    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return rows(x)
    spec = PartitionSpec(*sharding.spec[:-1], None)
    local: Any = jax.shard_map(rows, mesh=sharding.mesh, in_specs=spec, out_specs=(spec, spec))
    return local(x)


def gather(vector: jax.Array, index: jax.Array) -> jax.Array:
    """`vector[index]`, sharded as the index is."""
    sharding, of_vector = (jax.typeof(x).sharding for x in (index, vector))
    if not any((*sharding.spec, *of_vector.spec)):
        return vector[index]
    mesh = of_vector.mesh if sharding.mesh.empty else sharding.mesh
    vector = reshard(vector, NamedSharding(mesh, PartitionSpec(None)))
    return vector.at[index].get(out_sharding=NamedSharding(mesh, sharding.spec))


def gathered(x: jax.Array, index: jax.Array) -> jax.Array:
    """The entry of each row of `x [..., C]` at its index, or those at its K; C may be sharded."""
    one = index.ndim < x.ndim

    def rows(x, index):
        if one:
            return jnp.take_along_axis(x, index[..., None], axis=-1, mode="clip")[..., 0]
        return jnp.take_along_axis(x, index, axis=-1, mode="clip")

    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return rows(x, index)
    of_rows = _of_rows(x, index)
    automatic: Any = jax.sharding.auto_axes(rows, out_sharding=of_rows)
    return automatic(x, resharded(index, of_rows))


def add_at(x: jax.Array, index: jax.Array, values: jax.Array) -> jax.Array:
    """`x [..., C]` and, at each row's indices but the negative, `values [..., K]`."""

    def rows(x, index, values):
        values = jnp.broadcast_to(values, index.shape)
        add = lambda x, index, values: x.at[index].add(values, mode="drop")  # noqa: E731
        for _ in x.shape[:-1]:
            add = jax.vmap(add)
        return add(x, jnp.where(index < 0, x.shape[-1], index), values)

    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return rows(x, index, values)
    automatic: Any = jax.sharding.auto_axes(rows, out_sharding=sharding)
    return automatic(x, *(resharded(a, _of_rows(x, a)) for a in (index, values)))


def _of_rows(x, index):
    """The sharding of `index [...]` or `[..., K]` beside `x [..., C]`: that of each row."""
    axes = zip(jax.typeof(x).sharding.spec[:-1], x.shape, index.shape, strict=False)
    spec = (axis if size == count else None for axis, size, count in axes)
    return NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(*spec))


def sum_over(axis_name: AxisName, tree: Any) -> Any:
    """The sums, over devices along manual mesh axes, of `[...]` or `[..., K]`: one collective."""
    leaves, treedef = jax.tree.flatten(tree)
    ndim = max(leaf.ndim for leaf in leaves)
    if all(leaf.ndim == ndim for leaf in leaves):
        return treedef.unflatten(list(lax.psum(jnp.stack(leaves), axis_name)))
    columns = [leaf if leaf.ndim == ndim else leaf[..., None] for leaf in leaves]
    ends = np.cumsum([column.shape[-1] for column in columns])[:-1]
    sums = jnp.split(lax.psum(jnp.concatenate(columns, axis=-1), axis_name), ends, axis=-1)
    pairs = zip(sums, leaves, strict=True)
    return treedef.unflatten([s.reshape(leaf.shape) for s, leaf in pairs])
