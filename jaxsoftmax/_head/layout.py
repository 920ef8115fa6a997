# SPDX-License-Identifier: Apache-2.0
"""How an explicit mesh shards a head, read off its arguments; axes merged and split by shard."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from .._sharding import hidden_axis_whole, mesh_axes, resharded


class HeadSharding(NamedTuple):
    """How an explicit mesh shards a head: the mesh axes of each token axis, and of the classes.

    Empty, where the mesh is automatic or there is none. Inside the head, a mesh axis that shards
    tokens shards nothing of the kernel: the kernel is gathered over it, as over the mesh axes of
    its hidden axis. A mesh axis of one device shards nothing; only the results name it.
    """

    tokens: tuple[tuple[str, ...], ...] = ()
    classes: tuple[str, ...] = ()
    token_shards: tuple[int, ...] = ()  # of each token axis
    class_shards: int = 1
    mesh: Any = None  # None where it has no explicit axes
    named: tuple[Any, ...] = ()  # `tokens` as the arguments have them
    class_axis: int = 1  # of the kernel: `[H, V]`, or `[V, H]` for 0

    def on_mesh_of(self, tree: Any) -> "HeadSharding":
        """The same, on the first explicit mesh of these arrays if it has no mesh."""
        if self.mesh is not None:
            return self
        meshes = [jax.typeof(x).sharding.mesh for x in jax.tree.leaves(tree)]
        explicit = [mesh for mesh in meshes if mesh.explicit_axes]
        return self._replace(mesh=explicit[0]) if explicit else self

    @property
    def token_axes(self) -> tuple[str, ...]:
        """The mesh axes that shard the tokens, merged into one axis."""
        return sum(self.tokens, ())

    def spec(self, *axes: Any, unreduced: tuple[str, ...] = ()) -> NamedSharding | None:
        """The sharding with these mesh axes for each array axis; None without an explicit mesh."""
        if self.mesh is None:
            return None
        entries = (axis or None for axis in axes)
        return NamedSharding(self.mesh, PartitionSpec(*entries, unreduced=frozenset(unreduced)))

    def of_kernel(self, hidden: Any, *classes: Any) -> tuple[Any, ...]:
        """What belongs to the axes of a kernel, in their order; `classes` may be two axes."""
        return (hidden, *classes) if self.class_axis == 1 else (*classes, hidden)

    def gathered(self, kernel: jax.Array) -> jax.Array:
        """A kernel of which nothing but the classes is sharded."""
        kernel = hidden_axis_whole(kernel, 1 - self.class_axis)
        return self.resharded(kernel, *self.of_kernel(None, self.classes))

    def resharded(self, x: Any, *axes: Any, unreduced: tuple[str, ...] = ()) -> Any:
        """`x` (None stays None) sharded by these mesh axes, an entry for each array axis."""
        return None if x is None else resharded(x, self.spec(*axes, unreduced=unreduced))

    def reshape(
        self, x: Any, shape: tuple[int, ...], *axes: Any, unreduced: tuple[str, ...] = ()
    ) -> Any:
        """`x` (None stays None) in this shape, sharded by these mesh axes."""
        if x is None:
            return None
        return jnp.reshape(x, shape, out_sharding=self.spec(*axes, unreduced=unreduced))

    def rest(self, x: jax.Array, start: int) -> list[Any]:
        """The mesh axes of the axes of `x` from `start` on, without those that shard tokens."""
        if self.mesh is None:
            return [None] * (x.ndim - start)
        entries = map(mesh_axes, jax.typeof(x).sharding.spec.partitions[start:])
        return [tuple(a for a in axes if a not in self.token_axes) or None for axes in entries]

    def of_summed_kernel(self, kernel: jax.Array) -> NamedSharding | None:
        """The sharding in which d_kernel is summed over all tokens.

        That of `kernel`, with its hidden axis over the tokens' mesh axes as well if they divide it.
        """
        if self.mesh is None:
            return None
        spec = jax.typeof(kernel).sharding.spec
        hidden, classes = self.of_kernel(*map(mesh_axes, spec))
        all_hidden = hidden + tuple(a for a in self.token_axes if a not in hidden + classes)
        width = kernel.shape[1 - self.class_axis]
        if width % math.prod(self.mesh.shape[a] for a in all_hidden):
            all_hidden = hidden
        return self.spec(*self.of_kernel(all_hidden, classes))

    def merge_tokens(self, x: jax.Array) -> jax.Array:
        """`x [*tokens, …]` as `[N, …]`; shards stay on their devices, so the order changes."""
        count = len(self.tokens)
        tokens, rest = x.shape[:count], x.shape[count:]
        n = math.prod(tokens)
        if self.mesh is None:
            return x.reshape(n, *rest)
        of_rest = self.rest(x, count)
        x = self.resharded(x, *self.tokens, *of_rest)
        sizes = [(s, size // s) for s, size in zip(self.token_shards, tokens, strict=True)]
        of_split = [entry for axes in self.tokens for entry in (axes, None)]
        x = self.reshape(x, (*sum(sizes, ()), *rest), *of_split, *of_rest)
        shards_first = [*range(0, 2 * count, 2), *range(1, 2 * count, 2)]
        x = jnp.transpose(x, [*shards_first, *range(2 * count, x.ndim)])
        return self.reshape(x, (n, *rest), self.token_axes, *of_rest)

    def split_tokens(self, x: jax.Array, tokens: tuple[int, ...]) -> jax.Array:
        """Undoes `merge_tokens` for `x [N, …]`, of which the rest is not sharded."""
        rest = x.shape[1:]
        if self.mesh is None:
            return x.reshape(*tokens, *rest)
        count, shards = len(self.tokens), self.token_shards
        sizes = [size // s for size, s in zip(tokens, shards, strict=True)]
        whole = [None] * len(rest)
        x = self.reshape(x, (*shards, *sizes, *rest), *self.tokens, *[None] * count, *whole)
        order = [i for axis in range(count) for i in (axis, count + axis)]
        x = jnp.transpose(x, [*order, *range(2 * count, x.ndim)])
        x = self.reshape(x, (*tokens, *rest), *self.tokens, *whole)
        return self.resharded(x, *self.named, *whole)

    def split_classes(self, x: Any, *axes: Any, unreduced: tuple[str, ...] = ()) -> Any:
        """The last axis of `x`, classes, as [shards, classes / shards] where they are sharded."""
        count = self.class_shards
        if count == 1 or x is None:
            return x
        shape = (*x.shape[:-1], count, x.shape[-1] // count)
        return self.reshape(x, shape, *axes, self.classes, None, unreduced=unreduced)

    def merge_classes(self, x: Any, *axes: Any, unreduced: tuple[str, ...] = ()) -> Any:
        """Undoes `split_classes`, for the products, which are of matrices."""
        if self.class_shards == 1 or x is None:
            return x
        shape = (*x.shape[:-2], x.shape[-2] * x.shape[-1])
        return self.reshape(x, shape, *axes, self.classes, unreduced=unreduced)

    def split_kernel(self, x: Any, *, unreduced: tuple[str, ...] = ()) -> Any:
        """`split_classes` of the class axis of a kernel."""
        count = self.class_shards
        if count == 1 or x is None:
            return x
        width, classes = self.of_kernel(*x.shape)
        shape = self.of_kernel(width, count, classes // count)
        axes = self.of_kernel(None, self.classes, None)
        return self.reshape(x, shape, *axes, unreduced=unreduced)

    def merge_kernel(self, x: Any, *, unreduced: tuple[str, ...] = ()) -> Any:
        """Undoes `split_kernel`."""
        if self.class_shards == 1 or x is None:
            return x
        width = x.shape[0 if self.class_axis == 1 else -1]
        shape = self.of_kernel(width, x.size // width)
        return self.reshape(x, shape, *self.of_kernel(None, self.classes), unreduced=unreduced)


def sharding_of_head(hidden: jax.Array, kernel: jax.Array, class_axis: int) -> HeadSharding:
    """How `hidden [*tokens, H]` and `kernel` are sharded."""
    of_hidden, of_kernel = (jax.typeof(x).sharding for x in (hidden, kernel))
    mesh = of_kernel.mesh if of_hidden.mesh.empty else of_hidden.mesh

    def axes(entry):
        return tuple(a for a in mesh_axes(entry) if mesh.shape[a] > 1)

    def shards(axes):
        return math.prod(mesh.shape[a] for a in axes)

    named = tuple(of_hidden.spec[:-1])
    tokens = tuple(map(axes, named))
    classes = tuple(a for a in axes(of_kernel.spec[class_axis]) if a not in sum(tokens, ()))
    explicit = mesh if mesh.explicit_axes else None
    return HeadSharding(
        tokens, classes, tuple(map(shards, tokens)), shards(classes), explicit, named, class_axis
    )
