# SPDX-License-Identifier: Apache-2.0
"""What both orders of the linear head share: the product, and which operands are differentiated."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._numerics import accumulation_dtype
from ._rules import is_primal, values
from ._sharding import is_local, scaled

# XLA:CPU keeps a product apart before it is added to anything: so many bytes of it at a time.
_PRODUCT_BYTES = 8 << 20


def opened(tree: Any) -> tuple[Any, tuple[jax.Array, ...]]:
    """The values of a custom rule's arguments, and which leaves are differentiated: see `asked`.

    As residuals they are shapes of empty arrays. In the tree of the residuals nothing may depend on
    what is differentiated: JAX keeps that of the rule's last trace, whatever was asked for in it.
    """
    leaves = jax.tree.leaves(tree, is_leaf=is_primal)
    return values(tree), tuple(jnp.zeros((0, int(p.perturbed)), bool) for p in leaves)


def asked(live: tuple[jax.Array, ...]) -> tuple[bool, ...]:
    """One flag a leaf, known while tracing, so that the rest is not done."""
    return tuple(flag.shape[-1] == 1 for flag in live)


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


def finite_if_counted(x: jax.Array, weights: jax.Array) -> jax.Array:
    """`x [N, …]` with 0 for what is not finite where the weight is 0, and 0 · NaN would be NaN."""
    unused = jnp.expand_dims(weights == 0, tuple(range(1, x.ndim)))
    return jnp.where(unused & ~jnp.isfinite(x), 0, x)


def rounded(d: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """Cotangents in the operands' dtype, and what they were divided by: see `times`; None for 1.

    float16 has room for 6e-8 to 65504, and the slope of a loss may be anything. A power of two that
    brings the largest to between 2⁹ and 2¹⁰ keeps all digits of what is 2⁻²⁴ of that, and leaves
    room for tangents of 64 times it. Multiplied back in float32 nothing is lost.
    """
    if dtype != jnp.float16:
        return d.astype(dtype), None
    size = lax.stop_gradient(jnp.abs(d))
    largest = jnp.max(jnp.where(jnp.isfinite(size), size, 0), initial=0)
    exponent = jnp.maximum(jnp.frexp(largest)[1] - 10, -126)  # of a number that is not subnormal
    scale = jnp.ldexp(jnp.ones_like(largest), exponent)
    scale = jnp.where(largest > 0, scale, jnp.ones_like(scale))
    return (d / scale).astype(dtype), scale


def times(scale: jax.Array | None, d: jax.Array) -> jax.Array:
    """`d` times what its cotangents were divided by."""
    return d if scale is None else scaled(d, scale)


def product(hidden, kernel, bias, precision):
    """Logits `[N, *classes]` of `hidden [N, H]`, `kernel [H, *classes]` and `bias [*classes]`."""
    logits = dot(hidden, kernel, ((1,), (0,)), precision)
    return logits if bias is None else logits + bias.astype(logits.dtype)[None]


def add_product(  # noqa: PLR0917
    total: jax.Array, a: jax.Array, b: jax.Array, scale: Any, precision: Any, spec: Any
) -> Any:
    """`total [H, V] + scale · aᵀ b` of `a [c, H]` and `b [c, V]`, in place where XLA can."""

    def whole(total, a, b):
        return total + times(scale, dot(a, b, ((0,), (0,)), precision, spec))

    def by_block(total, a, b):
        classes = total.shape[1]
        # Of the product, and of the columns that go into it, unless an export does not know it.
        rows = max(1, *(size for size in a.shape if isinstance(size, int)))
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
