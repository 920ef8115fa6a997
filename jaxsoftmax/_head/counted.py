# SPDX-License-Identifier: Apache-2.0
"""The tokens that count before those that do not, so that only chunks with such a token are run.

Each shard of the tokens is sorted by itself. The number of chunks is known only when the program
runs: a loop of so many steps, which JAX cannot differentiate in reverse mode. Its derivative is
that of the loop over all chunks, to which the other tokens add exactly 0.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from .._rules import with_derivative
from .._sharding import manual_axes, resharded, varying
from .layout import HeadSharding


class Counted(NamedTuple):
    """The tokens of each shard in the order of the work: first those that count."""

    order: jax.Array  # [shards, n]: which token of the shard comes at each place
    place: jax.Array  # [shards, n]: the place of each token
    number: jax.Array  # []: how many tokens count, the most of any shard

    def steps(self, size: int) -> jax.Array:
        """How many chunks of `size` tokens of each shard hold a token that counts."""
        return (self.number + (size - 1)) // size


def may_count(weights: jax.Array) -> jax.Array:
    """Which tokens may count: those of a weight that is not exactly 0.

    All of them, where a derivative by the weights is taken: that by a weight of 0 is the loss.
    """
    return _may_count(weights) != 0


@jax.custom_jvp
def _may_count(weights):
    return (weights != 0).astype(weights.dtype)


@_may_count.defjvp
def _all_may_count(weights, _):
    return jnp.ones_like(weights[0]), jnp.zeros_like(weights[0])


def counted_first(live: jax.Array, sharding: HeadSharding, pieces: int) -> Counted:
    """The order of tokens `[N]` of which those that are `live` count.

    `pieces`: into how many an automatic mesh is taken to cut the tokens.
    """
    shards = math.prod(sharding.token_shards) * pieces
    tokens = sharding.token_axes
    live = sharding.reshape(live, (shards, live.shape[0] // shards), tokens, None)
    order = jnp.argsort(~live, axis=1, stable=True)
    place = jnp.argsort(order, axis=1)
    number = jnp.max(jnp.sum(live, axis=1, dtype=jnp.int32))
    return Counted(order.astype(jnp.int32), place.astype(jnp.int32), number)


def in_chunks(counted: Counted | None, size: int) -> Counted | None:
    """The same; None where a chunk of `size` tokens of each shard holds all of them."""
    if counted is None:
        return None
    n = counted.order.shape[1]
    return None if isinstance(n, int) and n <= size else counted


def first_in_order(sharding: HeadSharding, counted: Counted, count: int, x: jax.Array) -> jax.Array:
    """The first `count` tokens of each shard of `x [N, …]`: `[shards · count, …]`."""
    shards, of_rest = counted.order.shape[0], sharding.rest(x, 1)
    x = _taken(sharding, x, counted.order[:, :count], padded=False)
    shape = (shards * count, *x.shape[2:])
    return sharding.reshape(x, shape, sharding.token_axes, *of_rest)


def chunked_in_order(
    sharding: HeadSharding, counted: Counted, size: int, group: int, x: jax.Array, *, last: bool
) -> jax.Array:
    """`x [N, …]` as [chunks, shards · size, …], in whole groups of chunks.

    Padding repeats the last token of a shard, or is 0.
    """
    shards, n = counted.order.shape
    tokens, of_rest = sharding.token_axes, sharding.rest(x, 1)
    chunks = -(-n // (size * group)) * group
    place = jnp.minimum(jnp.arange(chunks * size, dtype=jnp.int32), n - 1)
    x = _taken(sharding, x, counted.order[:, place], padded=False)
    if not last:
        inside = jnp.arange(chunks * size, dtype=jnp.int32) < n
        x = jnp.where(jnp.expand_dims(inside, (0, *range(2, x.ndim))), x, 0)
    rest = x.shape[2:]
    x = sharding.reshape(x, (shards, chunks, size, *rest), tokens, None, None, *of_rest)
    x = jnp.moveaxis(x, 1, 0)
    return sharding.reshape(x, (chunks, shards * size, *rest), None, tokens, *of_rest)


def restored(sharding: HeadSharding, counted: Counted, y: jax.Array, loops: int = 1) -> jax.Array:
    """Undoes `chunked_in_order` for `y [*loops, shards · size, …]`: `[N, …]`.

    And `first_in_order`, without loops: other tokens are 0.
    """
    shards, n = counted.order.shape
    tokens, of_rest = sharding.token_axes, sharding.rest(y, loops + 1)
    rest, chunks = y.shape[loops + 1 :], math.prod(y.shape[:loops])
    size = y.shape[loops] // shards
    y = sharding.reshape(y, (chunks, shards, size, *rest), None, tokens, None, *of_rest)
    y = jnp.moveaxis(y, 0, 1)
    y = sharding.reshape(y, (shards * chunks * size, *rest), tokens, *of_rest)
    y = _taken(sharding, y, counted.place, padded=not loops)
    return sharding.reshape(y, (shards * n, *rest), tokens, *of_rest)


def _taken(sharding, x, index, *, padded):
    """Of `x [shards · n, …]` the tokens at `index [shards, k]` of each shard: `[shards, k, …]`.

    Where `padded`, those beyond the last are 0.
    """
    shards, tokens = index.shape[0], sharding.token_axes

    def take(x, index):
        if x.shape[1] == 0:
            zeros = jnp.zeros((*index.shape, *x.shape[2:]), x.dtype)
            return varying(zeros, manual_axes(x, index))
        mode: Any = "fill" if padded else "promise_in_bounds"
        return jax.vmap(lambda x, i: x.at[i].get(mode=mode, fill_value=0))(x, index)

    of_rest, rest = sharding.rest(x, 1), x.shape[1:]
    x = sharding.reshape(x, (shards, x.shape[0] // shards, *rest), tokens, None, *of_rest)
    spec = sharding.spec(tokens, None, *of_rest)
    if spec is None:
        return take(x, index)
    automatic: Any = jax.sharding.auto_axes(take, out_sharding=spec)
    return automatic(x, index)


def chunk(tree: Any, i: Any) -> Any:
    """The i-th of each array's first axis."""
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def first_steps(
    body: Callable[[Any, Any], tuple[Any, Any]], carry: Any, xs: Any, steps: Any
) -> tuple[Any, Any]:
    """`lax.scan`, of which only so many `steps` are taken: what the others would give is 0."""

    def step(i, state):
        carry, ys = state
        carry, y = body(carry, chunk(xs, i))
        write = lambda ys, y: lax.dynamic_update_index_in_dim(ys, y, i, 0)  # noqa: E731
        return carry, jax.tree.map(write, ys, y)

    length = jax.tree.leaves(xs)[0].shape[0]
    ys = zeros_of(lambda: body(carry, chunk(xs, 0))[1], length)
    return loop(steps, length, step, (carry, ys))


def loop(steps: Any, most: Any, step: Callable[[Any, Any], Any], carry: Any) -> Any:
    """`lax.fori_loop` of so many steps, of `most`, which profiles and compiled programs name."""
    with jax.named_scope(f"counted_of_{most}"):
        return lax.fori_loop(0, steps, step, carry)


def of_first(run: Callable[..., Any], n: int, number: Any, *operands: Any) -> Any:
    """`run(count, *operands)` with as few of `n` as hold the `number` that count; None for all.

    One of several programs: that of 0, 1, 2, 3, 5 or 8 eighths of `n`.
    """
    if number is None:
        return run(n, *operands)
    counts = sorted({-(-eighths * n // 8) for eighths in (0, 1, 2, 3, 5, 8)})
    which = jnp.sum(number > jnp.asarray(counts[:-1], number.dtype), dtype=jnp.int32)
    with jax.named_scope(f"counted_of_{'_'.join(map(str, counts))}"):
        return lax.switch(which, [partial(run, count) for count in counts], *operands)


def zeros_of(function: Callable[[], Any], *lead: Any) -> Any:
    """Zeros like the results of `function`, with these axes before theirs."""
    traced, shapes = jax.make_jaxpr(function, return_shape=True)()

    def zeros(aval):
        spec = aval.sharding.spec
        unreduced = {"unreduced": spec.unreduced} if spec.unreduced else {}
        spec = jax.sharding.PartitionSpec(*[None] * len(lead), *spec.partitions, **unreduced)
        sharding = jax.sharding.NamedSharding(aval.sharding.mesh, spec)
        x = resharded(jnp.zeros((*lead, *aval.shape), aval.dtype), sharding)
        return varying(x, aval.manual_axis_type.varying)

    return jax.tree.unflatten(jax.tree.structure(shapes), map(zeros, traced.out_avals))


def only_counted(run: Callable[..., Any], counted: Counted | None, *args: Any) -> Any:
    """`run(counted, *args)`, with the derivative of `run(None, *args)`, to which it is equal."""
    if counted is None:
        return run(None, *args)
    leaves, tree = jax.tree.flatten((counted, args))
    structures = []

    def function(*leaves):
        counted, args = tree.unflatten(leaves)
        results, structure = jax.tree.flatten(run(counted, *args))
        structures.append(structure)
        return tuple(results)

    def same(_, *leaves):
        return tuple(jax.tree.leaves(run(None, *tree.unflatten(leaves)[1])))

    results = with_derivative(function, same, *leaves, control=len(counted))
    return structures[0].unflatten(results)
