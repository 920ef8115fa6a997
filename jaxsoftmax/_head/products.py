# SPDX-License-Identifier: Apache-2.0
"""What both orders of the linear head share: the product, and which operands are differentiated."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from .. import _cpu
from .._numerics import accumulation_dtype
from .._rules import is_primal, values
from .._sharding import is_local, psum_like, resharded, resharded_like


def split_perturbed(tree: Any) -> tuple[Any, tuple[jax.Array, ...]]:
    """The values of a custom rule's arguments, and flags: which leaves are differentiated.

    The flags are residuals, as shapes of empty arrays. The tree of the residuals must not depend on
    what is differentiated: JAX keeps the tree of the rule's last trace, whatever that asked for.
    """
    leaves = jax.tree.leaves(tree, is_leaf=is_primal)
    return values(tree), tuple(jnp.zeros((0, int(p.perturbed)), bool) for p in leaves)


def perturbed(flags: tuple[jax.Array, ...], like: Any) -> Any:
    """The flags of `split_perturbed` as Python booleans, in a tree `like` the arguments."""
    return jax.tree.unflatten(jax.tree.structure(like), [flag.shape[-1] == 1 for flag in flags])


def as_cotangents(ds: Any, operands: Any) -> Any:
    """Each gradient (or None) summed over devices, in the sharding and dtype of its operand."""

    def like(x, d):
        return None if d is None else resharded_like(psum_like(d, x).astype(x.dtype), x)

    return jax.tree.map(like, operands, ds)


def dot(a, b, contract, precision, spec=None):
    """The product over the axes `contract`, in the accumulation dtype, sharded as `spec` says."""
    return lax.dot_general(
        a,
        b,
        (contract, ((), ())),
        precision=precision,
        preferred_element_type=accumulation_dtype(a.dtype),
        out_sharding=spec,
    )


def finite_if_counted(x: jax.Array, weights: jax.Array) -> jax.Array:
    """`x [N, …]`, 0 where it is not finite and the weight `[N]` is 0: 0 · NaN would be NaN."""
    unused = jnp.expand_dims(weights == 0, tuple(range(1, x.ndim)))
    return jnp.where(unused & ~jnp.isfinite(x), 0, x)


def scale_for_float16(d: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
    """Cotangents in the operands' dtype, and what they were divided by (`undo_scale`); None for 1.

    float16 has room for 6e-8 to 65504, and the slope of a loss may be anything. A power of two that
    brings the largest to between 2⁹ and 2¹⁰ keeps all digits of cotangents down to 2⁻²⁴ of it, and
    leaves room for tangents 64 times as large. Multiplying back in float32 loses nothing.
    """
    if dtype != jnp.float16:
        return d.astype(dtype), None
    size = lax.stop_gradient(jnp.abs(d))
    largest = jnp.max(jnp.where(jnp.isfinite(size), size, 0), initial=0)
    exponent = jnp.maximum(jnp.frexp(largest)[1] - 10, -126)  # of a number that is not subnormal
    scale = jnp.ldexp(jnp.ones_like(largest), exponent)
    scale = jnp.where(largest > 0, scale, jnp.ones_like(scale))
    return (d / scale).astype(dtype), scale


def undo_scale(d: jax.Array, scale: jax.Array | None) -> jax.Array:
    """`d` times what its cotangents were divided by, even if `d` is unreduced over mesh axes."""
    if scale is None:
        return d
    sharding, scale = jax.typeof(d).sharding, scale.astype(d.dtype)
    if sharding.spec.unreduced:
        reduced = PartitionSpec(reduced=sharding.spec.unreduced)
        scale = resharded(scale, NamedSharding(sharding.mesh, reduced))
    return d * scale


def product(hidden, kernel, bias, precision):
    """Logits `[N, *classes]` of `hidden [N, H]`, `kernel [H, *classes]` and `bias [*classes]`."""
    logits = dot(hidden, kernel, ((1,), (0,)), precision)
    return logits if bias is None else logits + bias.astype(logits.dtype)[None]


def add_product(  # noqa: PLR0917
    total: jax.Array, a: jax.Array, b: jax.Array, scale: Any, precision: Any, spec: Any
) -> Any:
    """`total [H, V] + scale · aᵀ b` of `a [c, H]` and `b [c, V]`, in place where XLA can."""

    def add(total, a, b):
        return total + undo_scale(dot(a, b, ((0,), (0,)), precision, spec), scale)

    by_block = partial(_cpu.add_by_block, add)
    return _cpu.or_plain(by_block, add, total, a, b, local=is_local(a, b))
