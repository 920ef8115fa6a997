# SPDX-License-Identifier: Apache-2.0
"""What both orders of the linear head share: its products, and what is differentiated."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from .. import _cpu
from .._numerics import accumulation_dtype
from .._rules import instantiated, is_primal, values
from .._sharding import is_local, psum_like, resharded, resharded_like
from .layout import HeadSharding


class Products(NamedTuple):
    """How the matrix products of a head are computed.

    The kernel is `[H, V]`, or `[V, H]` where its class axis is 0. Operands are cast to `dtype`;
    sums and results are in its accumulation dtype, unless another one is named.
    """

    dtype: Any
    precision: Any
    class_axis: int

    def operand(self, x: jax.Array) -> jax.Array:
        """`x` as the products take it."""
        return x.astype(self.dtype)

    def logits(self, hidden: jax.Array, kernel: jax.Array, bias: jax.Array | None) -> jax.Array:
        """Logits `[N, V]` of `hidden [N, H]`."""
        logits = self._dot(hidden, kernel, (1,), (1 - self.class_axis,))
        return logits if bias is None else logits + bias.astype(logits.dtype)[None]

    def d_hidden(self, d_logits: jax.Array, kernel: jax.Array, spec: Any) -> jax.Array:
        """The cotangent `[N, H]` of hidden, sharded as `spec` says."""
        return self._dot(d_logits, kernel, (1,), (self.class_axis,), spec)

    def d_kernel(
        self, hidden: jax.Array, d_logits: jax.Array, spec: Any, dtype: Any = None
    ) -> jax.Array:
        """The cotangent of kernel, of `hidden [*n, H]` and `d_logits [*n, V]`."""
        pair = (hidden, d_logits) if self.class_axis == 1 else (d_logits, hidden)
        tokens = tuple(range(hidden.ndim - 1))
        return self._dot(*pair, tokens, tokens, spec, dtype)

    def _dot(self, a, b, of_a, of_b, spec=None, dtype=None):  # noqa: PLR0917
        return lax.dot_general(
            self.operand(a),
            self.operand(b),
            ((of_a, of_b), ((), ())),
            precision=self.precision,
            preferred_element_type=accumulation_dtype(self.dtype) if dtype is None else dtype,
            out_sharding=spec,
        )


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


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def logits_of(  # noqa: PLR0917
    products: Products, sharding: HeadSharding, hidden: Any, kernel: Any, bias: Any, beside: Any
):
    """`products.logits`, for a loss: its derivative multiplies in the products' dtype as well.

    `beside`, the head's own logits, has no part in it. But where the head is differentiated by
    those, this rule is taken too, and so leaves nothing that forward mode over it cannot take.
    """
    del sharding, beside
    return products.logits(hidden, kernel, bias)


def _logits_fwd(products, sharding, hidden, kernel, bias, beside):  # noqa: PLR0917
    del sharding, beside
    operands, flags = split_perturbed((hidden, kernel, bias))
    return products.logits(*operands), (operands, flags)


def _logits_bwd(products, sharding, residuals, g):
    operands, flags = residuals
    (hidden, kernel, bias), wants = operands, perturbed(flags, operands)
    tokens, classes = sharding.token_axes, sharding.classes
    g = instantiated(g)
    d_logits, scale = scale_for_float16(g, products.dtype)
    d_hidden = d_kernel = d_bias = None
    if wants[0]:
        spec = sharding.spec(tokens, None, unreduced=classes)
        d_hidden = undo_scale(products.d_hidden(d_logits, kernel, spec), scale)
    if wants[1]:
        spec = sharding.spec(*sharding.of_kernel(None, classes), unreduced=tokens)
        d_kernel = undo_scale(products.d_kernel(hidden, d_logits, spec), scale)
    if bias is not None and wants[2]:
        d_bias = lax.reduce_sum(g, (0,), out_sharding=sharding.spec(classes, unreduced=tokens))
    return *as_cotangents((d_hidden, d_kernel, d_bias), operands), None


logits_of.defvjp(_logits_fwd, _logits_bwd, symbolic_zeros=True)


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


def in_one_scale(d: Any, scales: Any) -> tuple[Any, Any]:
    """`d [chunks, …]`, divided by a scale each, divided by the largest of them instead.

    What of a chunk is below 2⁻²⁴ of the largest cotangent of all of them is lost, as in one chunk.
    A chunk of nothing but 0 has the scale 1, whatever the size of the others: it does not count.
    """
    if scales is None:
        return d, None
    if len(scales) == 1:
        return d, scales[0]
    rest = tuple(range(1, d.ndim))
    counts = jnp.any((d != 0) & jnp.isfinite(d), axis=rest)
    largest = jnp.max(jnp.where(counts, scales, 0))
    largest = jnp.where(largest > 0, largest, jnp.ones_like(largest))
    ratios = jnp.expand_dims(scales / largest, rest)
    return (d.astype(ratios.dtype) * ratios).astype(d.dtype), largest


def undo_scale(d: jax.Array, scale: jax.Array | None) -> jax.Array:
    """`d` times what its cotangents were divided by, even if `d` is unreduced over mesh axes."""
    if scale is None:
        return d
    sharding, scale = jax.typeof(d).sharding, scale.astype(d.dtype)
    if sharding.spec.unreduced:
        reduced = PartitionSpec(reduced=sharding.spec.unreduced)
        scale = resharded(scale, NamedSharding(sharding.mesh, reduced))
    return d * scale


def add_to_kernel(  # noqa: PLR0917
    products: Products,
    total: jax.Array,
    hidden: jax.Array,
    d_logits: jax.Array,
    scale: Any,
    spec: Any,
) -> Any:
    """`total` and the cotangent of kernel of these tokens, in place where XLA can."""

    def add(total, hidden, d_logits):
        return total + undo_scale(products.d_kernel(hidden, d_logits, spec), scale)

    def by_block(total, hidden, d_logits):
        hidden, d_logits = (x.reshape(-1, x.shape[-1]) for x in (hidden, d_logits))
        return _cpu.add_by_block(add, products.class_axis, total, hidden, d_logits)

    return _cpu.or_plain(by_block, add, total, hidden, d_logits, local=is_local(hidden, d_logits))
