# SPDX-License-Identifier: Apache-2.0
"""What both orders of the linear head share: the product, and which operands are differentiated."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._numerics import accumulation_dtype
from ._rules import is_primal, values
from ._sharding import is_local, scaled

# XLA:CPU keeps a product apart before it is added to anything: so many bytes of it at a time.
_PRODUCT_BYTES = 8 << 20


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Live:
    """Which operands are differentiated, one flag a leaf; static, so that the rest is not done."""

    flags: tuple[bool, ...]


def opened(tree):
    """The values of a custom rule's arguments, and which of them are differentiated."""
    leaves = jax.tree.leaves(tree, is_leaf=is_primal)
    return values(tree), Live(tuple(p.perturbed for p in leaves))


def dot(a, b, contract, precision, spec=None):
    """The product over some axes of each, in the accumulation dtype; laid out as `spec` says."""
    return lax.dot_general(
        a,
        b,
        (contract, ((), ())),
        precision=precision,
        preferred_element_type=accumulation_dtype(a.dtype),
        out_sharding=spec,
    )


def without_scale(g: Any, dtype: jnp.dtype) -> tuple[Any, jax.Array | None]:
    """Cotangents for operands of `dtype`, and what they were divided by: see `times`; None for 1.

    A power of two that leaves the largest between 8 and 16: float16, to which d_logits is rounded,
    has no room below 6e-8, where ŷ over a mean's number of tokens would be 0. Multiplied back in
    float32 nothing is lost.
    """
    if dtype != jnp.float16:
        return g, None
    finite = [jnp.where(jnp.isfinite(x), jnp.abs(x), 0) for x in jax.tree.leaves(g)]
    largest = functools.reduce(jnp.maximum, [jnp.max(x, initial=0) for x in finite])
    scale = jnp.ldexp(jnp.ones_like(largest), jnp.frexp(largest)[1] - 4)
    scale = lax.stop_gradient(jnp.where(largest > 0, scale, jnp.ones_like(scale)))
    return jax.tree.map(lambda x: x / scale, g), scale


def times(scale: jax.Array | None, tree: Any) -> Any:
    """`tree` times the scale that its cotangents were divided by."""
    return tree if scale is None else jax.tree.map(lambda d: scaled(d, scale), tree)


def product(hidden, kernel, bias, precision):
    """Logits `[N, *classes]` of `hidden [N, H]`, `kernel [H, *classes]` and `bias [*classes]`."""
    logits = dot(hidden, kernel, ((1,), (0,)), precision)
    return logits if bias is None else logits + bias.astype(logits.dtype)[None]


def add_product(total: jax.Array, a: jax.Array, b: jax.Array, precision: Any, spec: Any) -> Any:
    """`total [H, V] + aᵀ b` of `a [c, H]` and `b [c, V]`, in place where XLA can."""

    def whole(total, a, b):
        return total + dot(a, b, ((0,), (0,)), precision, spec)

    def by_block(total, a, b):
        classes = total.shape[1]
        rows = max(1, *a.shape)  # of the product, and of the columns that go into it
        size = min(classes, max(1, _PRODUCT_BYTES // (rows * total.dtype.itemsize)))

        def step(start, size, total):
            columns = lax.dynamic_slice_in_dim(b, start, size, axis=1)
            sums = whole(lax.dynamic_slice_in_dim(total, start, size, axis=1), a, columns)
            return lax.dynamic_update_slice_in_dim(total, sums, start, axis=1)

        blocks, rest = divmod(classes, size)
        total = lax.fori_loop(0, blocks, lambda i, total: step(i * size, size, total), total)
        if not rest:
            return total
        # Of a start that XLA knows it makes a plain slice, and then goes over all of `total`.
        return step(lax.optimization_barrier(jnp.int32(blocks * size)), rest, total)

    if is_local(a, b):
        return lax.platform_dependent(total, a, b, cpu=by_block, default=whole)
    return whole(total, a, b)
