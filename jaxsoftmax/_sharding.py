# SPDX-License-Identifier: Apache-2.0
"""What changes when an axis is sharded, and every difference between JAX versions."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec, reshard

# One axis of a mesh, or several, the first one slowest.
AxisName = str | tuple[str, ...]


def axis_names(axis_name: AxisName | None) -> frozenset[str]:
    """The mesh axes of a name, of several, or of None."""
    return frozenset((axis_name,) if isinstance(axis_name, str) else axis_name or ())


def is_local(*arrays: jax.Array) -> bool:
    """Whether it is certain, while tracing, that each array lies on one device.

    A loop over slices of a sharded axis would gather it. Explicit shardings can be read
    off the type; an automatic mesh cannot be seen, but it needs a second device, and a `shard_map`
    over all of its axes leaves nothing of it.
    """
    mesh = jax.sharding.get_abstract_mesh()
    manual = bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)
    return (manual or jax.device_count() == 1) and not any(
        axis for array in arrays for axis in jax.typeof(array).sharding.spec
    )


def unseen_devices() -> int:
    """Over how many devices an automatic mesh may spread an array here, which no type tells."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return jax.device_count()
    return math.prod(mesh.shape[axis] for axis in mesh.auto_axes)


def manual_axes(*arrays: Any) -> frozenset[str]:
    """The mesh axes of `shard_map` over which any of the arrays varies."""
    return frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))


def varying(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """`x` as an array that varies over these axes too; its cotangent is summed over them."""
    missing = tuple(sorted(axes - manual_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def aligned(tree: Any) -> Any:
    """Arrays that all vary over the same axes, as a custom rule's cotangents will.

    Integers have none: they stay as they are, so that sums over an axis still know that they do not
    vary over it.
    """
    axes = manual_axes(*jax.tree.leaves(tree))
    is_real = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)  # noqa: E731
    return jax.tree.map(lambda x: varying(x, axes) if is_real(x) else x, tree)


def summed_as(d: jax.Array, x: jax.Array) -> jax.Array:
    """The cotangent of `x`, summed over the axes that only the cotangent varies over."""
    extra = tuple(sorted(manual_axes(d) - manual_axes(x)))
    return lax.psum(d, extra) if extra else d


class Layout(NamedTuple):
    """How an explicit mesh shards a head: the mesh axes of each token axis, and of the classes.

    Nothing, where the mesh is automatic or there is none. A mesh axis of the tokens shards nothing
    of the kernel within: the kernel is gathered over it, as over those of its hidden axis. A mesh
    axis of one device shards nothing, and is named by the results alone.
    """

    tokens: tuple[tuple[str, ...], ...] = ()
    classes: tuple[str, ...] = ()
    token_shards: tuple[int, ...] = ()
    class_shards: int = 1
    mesh: Any = None  # None where it has no explicit axes
    named: tuple[Any, ...] = ()  # `tokens` as the arguments have them

    @property
    def sharded(self) -> bool:
        """Whether anything may be, the kernel's hidden axis as well."""
        return self.mesh is not None

    def on_mesh_of(self, tree: Any) -> "Layout":
        """The same on the first explicit mesh of these arrays, where it has none."""
        if self.sharded:
            return self
        meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree)]
        explicit = [mesh for mesh in meshes if mesh.explicit_axes]
        return self._replace(mesh=explicit[0]) if explicit else self

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The mesh axes that shard the tokens, merged into one axis."""
        return sum(self.tokens, ())

    def spec(self, *axes: Any, unreduced: tuple[str, ...] = ()) -> NamedSharding | None:
        """The sharding by the mesh axes of each array axis; None where nothing is sharded."""
        if not self.sharded:
            return None
        entries = (axis or None for axis in axes)
        return NamedSharding(self.mesh, PartitionSpec(*entries, unreduced=frozenset(unreduced)))

    def rest(self, x: jax.Array, start: int) -> list[Any]:
        """The mesh axes of the other axes of `x`, from `start` on, as far as tokens leave them."""
        if not self.sharded:
            return [None] * (x.ndim - start)
        entries = map(_mesh_axes, jax.typeof(x).sharding.spec[start:])
        return [tuple(a for a in axes if a not in self.token_axes) or None for axes in entries]

    def scattered(self, kernel: jax.Array) -> NamedSharding | None:
        """Where the sum over all tokens of d_kernel is made.

        As `kernel` is, and its hidden axis over the tokens' mesh axes as well, if its size allows.
        """
        if not self.sharded:
            return None
        hidden, classes = map(_mesh_axes, jax.typeof(kernel).sharding.spec)
        all_hidden = hidden + tuple(a for a in self.token_axes if a not in hidden + classes)
        if kernel.shape[0] % math.prod(self.mesh.shape[a] for a in all_hidden):
            all_hidden = hidden
        return self.spec(all_hidden, classes)


def layout_of(hidden: jax.Array, kernel: jax.Array) -> Layout:
    """How `hidden [*tokens, H]` and `kernel [H, V]` are sharded."""
    of_hidden, of_kernel = (jax.typeof(x).sharding for x in (hidden, kernel))
    mesh = of_kernel.mesh if of_hidden.mesh.empty else of_hidden.mesh

    def axes(entry):
        return tuple(a for a in _mesh_axes(entry) if mesh.shape[a] > 1)

    def shards(axes):
        return math.prod(mesh.shape[a] for a in axes)

    named = tuple(of_hidden.spec[:-1])
    tokens = tuple(map(axes, named))
    classes = tuple(a for a in axes(of_kernel.spec[1]) if a not in sum(tokens, ()))
    explicit = mesh if mesh.explicit_axes else None
    return Layout(tokens, classes, tuple(map(shards, tokens)), shards(classes), explicit, named)


def _mesh_axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def laid_out(x: jax.Array, spec: NamedSharding | None) -> jax.Array:
    """`x` sharded so, summed over what it was unreduced over; as it is for None."""
    return x if spec is None else reshard(x, spec)


def laid_out_like(d: jax.Array, x: jax.Array) -> jax.Array:
    """`d` sharded on an explicit mesh as `x` is, and summed over what it is unreduced over."""
    of_d, of_x = (jax.typeof(a).sharding for a in (d, x))
    mesh = of_d.mesh if of_x.mesh.empty else of_x.mesh
    return laid_out_as(d, NamedSharding(mesh, of_x.spec))


def joined(*arrays: Any) -> tuple[Any, ...]:
    """Arrays that broadcast, or None, in one layout: that of the first which is sharded, by axis.

    So a derivative meets one layout; each cotangent comes back in that of its argument.
    """
    given = [a for a in arrays if a is not None]
    shardings = [jax.typeof(a).sharding for a in given]
    if not any(axis for sharding in shardings for axis in sharding.spec):
        return arrays
    mesh = next(s.mesh for s in shardings if not s.mesh.empty)
    entries, seen = [], set()
    for axis in range(given[0].ndim):
        here = (_mesh_axes(s.spec[axis]) for s in shardings)
        chosen = next((axes for axes in here if axes and not seen & set(axes)), ())
        seen |= set(chosen)
        entries.append(chosen or None)

    def as_joined(a):
        spec = (entry if size > 1 else None for entry, size in zip(entries, a.shape, strict=True))
        return laid_out_as(a, NamedSharding(mesh, PartitionSpec(*spec)))

    return tuple(None if a is None else as_joined(a) for a in arrays)


def laid_out_as(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """`x` sharded so, if it is not yet."""
    now = jax.typeof(x).sharding
    there = now.spec == sharding.spec and now.mesh == sharding.mesh
    return x if there else reshard(x, sharding)


def merge_last(x: jax.Array, count: int) -> jax.Array:
    """The last `count` axes as one, sharded as the first of them is; the others are gathered."""
    shape = (*x.shape[:-count], math.prod(x.shape[-count:]))
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x.reshape(shape)
    *batch, first = sharding.spec[: x.ndim - count + 1]
    alone = PartitionSpec(*batch, first, *[None] * (count - 1))
    x = laid_out_as(x, NamedSharding(sharding.mesh, alone))
    merged = NamedSharding(sharding.mesh, PartitionSpec(*batch, first))
    return jnp.reshape(x, shape, out_sharding=merged)


def split_last(x: jax.Array, like: jax.Array) -> jax.Array:
    """Undoes `merge_last` of an array `like` what comes back, layout included."""
    sharding = jax.typeof(like).sharding
    if not any(sharding.spec):
        return x.reshape(like.shape)
    alone = PartitionSpec(*sharding.spec[: x.ndim], *[None] * (like.ndim - x.ndim))
    x = jnp.reshape(x, like.shape, out_sharding=NamedSharding(sharding.mesh, alone))
    return laid_out_as(x, sharding)


def sharded_first(x: jax.Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Axes in the order in which merging them gathers least."""
    return tuple(sorted(axes, key=lambda axis: not jax.typeof(x).sharding.spec[axis]))


def whole_last(x: jax.Array) -> jax.Array:
    """`x` with its last axis on every device."""
    sharding = jax.typeof(x).sharding
    if not any(sharding.spec):
        return x
    return laid_out_as(x, NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[:-1], None)))


def scaled(x: jax.Array, scale: jax.Array) -> jax.Array:
    """`x` times a scalar, in its dtype, whatever it is still to be summed over."""
    scale = scale.astype(x.dtype)
    sharding = jax.typeof(x).sharding
    if sharding.spec.unreduced:
        spec = PartitionSpec(reduced=sharding.spec.unreduced)
        scale = reshard(scale, NamedSharding(sharding.mesh, spec))
    return x * scale


def merged_tokens(layout: Layout, x: jax.Array) -> jax.Array:
    """`x [*tokens, ...]` as `[N, ...]`; shards stay where they are, so tokens change places."""
    count = len(layout.tokens)
    tokens, rest = x.shape[:count], x.shape[count:]
    n = math.prod(tokens)
    if not layout.sharded:
        return x.reshape(n, *rest)
    of_rest = layout.rest(x, count)
    x = laid_out(x, layout.spec(*layout.tokens, *of_rest))
    split = [
        (shards, size // shards) for shards, size in zip(layout.token_shards, tokens, strict=True)
    ]
    of_split = [entry for axes in layout.tokens for entry in (axes, None)]
    spec = layout.spec(*of_split, *of_rest)
    x = jnp.reshape(x, (*sum(split, ()), *rest), out_sharding=spec)
    x = jnp.transpose(x, _shards_first(count, len(rest)))
    return jnp.reshape(x, (n, *rest), out_sharding=layout.spec(layout.token_axes, *of_rest))


def unmerged_tokens(layout: Layout, x: jax.Array, tokens: tuple[int, ...]) -> jax.Array:
    """Undoes `merged_tokens` for `x [N]`."""
    if not layout.sharded:
        return x.reshape(tokens)
    count = len(layout.tokens)
    shards = layout.token_shards
    sizes = [size // s for size, s in zip(tokens, shards, strict=True)]
    spec = layout.spec(*layout.tokens, *[None] * count)
    x = jnp.reshape(x, (*shards, *sizes), out_sharding=spec)
    order = [i for axis in range(count) for i in (axis, count + axis)]
    x = jnp.transpose(x, order)
    x = jnp.reshape(x, tokens, out_sharding=layout.spec(*layout.tokens))
    return laid_out(x, layout.spec(*layout.named))


def _shards_first(count, rest):
    return [*range(0, 2 * count, 2), *range(1, 2 * count, 2), *range(2 * count, 2 * count + rest)]


def manual_axes_here() -> tuple[str, ...]:
    """The mesh axes that the enclosing `shard_map` made manual."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)


def shard_count(axis_name: AxisName | None) -> int:
    """How many devices along manual mesh axes share the classes; 1 if classes are whole."""
    return 1 if axis_name is None else lax.axis_size(axis_name)


def shard_start(axis_name: AxisName | None, size: int) -> Any:
    """The number of the first class of this device's block of `size`; 0 if classes are whole."""
    return 0 if axis_name is None else lax.axis_index(axis_name) * size


def maximum_over(axis_name: AxisName, x: jax.Array) -> jax.Array:
    """The maximum over the devices along manual mesh axes; a constant to differentiation."""
    return lax.pmax(lax.stop_gradient(x), axis_name)


def taken(vector: jax.Array, index: jax.Array) -> jax.Array:
    """`vector[index]`, laid out as the index is."""
    sharding, of_vector = (jax.typeof(x).sharding for x in (index, vector))
    if not any((*sharding.spec, *of_vector.spec)):
        return vector[index]
    mesh = of_vector.mesh if sharding.mesh.empty else sharding.mesh
    vector = reshard(vector, NamedSharding(mesh, PartitionSpec(None)))
    return vector.at[index].get(out_sharding=NamedSharding(mesh, sharding.spec))


def sum_over(axis_name: AxisName, tree: Any) -> Any:
    """The sums over the devices along manual mesh axes, of arrays of one shape, in one piece."""
    leaves, treedef = jax.tree.flatten(tree)
    return treedef.unflatten(list(lax.psum(jnp.stack(leaves), axis_name)))


def slice_in_loop(x: jax.Array, start: Any, size: int, axis: int) -> jax.Array:
    """`lax.dynamic_slice_in_dim` in a loop, without a copy of all of `x`.

    XLA:CPU of JAX 0.10 slices a bfloat16 array by making a float32 copy of it, but as integers in
    place, unless it takes that view before the loop, as a copy: the barrier keeps it inside
    ([4096, 32000], its (m, r): 224, 126 and 49 ms).
    """
    if x.dtype == jnp.bfloat16 and _on_old_cpu():
        x, start = lax.optimization_barrier((x, start))
        piece = lax.dynamic_slice_in_dim(as_bits(x), start, size, axis)
        return from_bits(piece, jnp.bfloat16)
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def as_bits(x: jax.Array) -> jax.Array:
    """`x` as XLA:CPU of JAX 0.10 updates a slice of it in place; see `slice_in_loop`."""
    if x.dtype == jnp.bfloat16 and _on_old_cpu():
        return lax.bitcast_convert_type(x, jnp.uint16)
    return x


def from_bits(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """What `as_bits` made of an array of this dtype, as such again."""
    return bits if bits.dtype == dtype else lax.bitcast_convert_type(bits, dtype)


def _on_old_cpu() -> bool:
    return jax.__version_info__ < (0, 11) and jax.default_backend() == "cpu"
