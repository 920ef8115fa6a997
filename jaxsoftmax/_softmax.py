# SPDX-License-Identifier: Apache-2.0
"""softmax, log_softmax, logsumexp and the softmax Jacobian: each function, its rule below it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from . import _checks
from ._axes import broadcast_mask, from_rows, masked, to_rows
from ._numerics import (
    broadcast_to,
    first,
    gradient_numerator,
    log1p_near,
    log_sum_exp,
    nan_where,
    one_hot,
    shifted_exp,
    upcast,
)
from ._row_sums import row_sums, shift_and_remainder
from ._rules import ON_LOGITS, in_forward_mode, rule, scope
from ._sharding import in_one_sharding, sharded_first, whole_last

Axis = int | Sequence[int] | None


def softmax(x: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None) -> Float[Array, "..."]:
    r"""Softmax: `exp(x_k) / Σ_j exp(x_j)` along `axis`; a drop-in for `jax.nn.softmax`.

    Args:
      x: logits of any shape; integers are promoted to floating point.
      axis: the class axis, a tuple of class axes, or None for all axes.
      where: boolean, broadcasts to the shape of `x`: the classes to include. The others get
        probability 0 and gradient exactly 0.

    Returns:
      Probabilities with the shape and dtype of `x`, computed in float32 or wider. A row that
      holds +inf or NaN, or nothing but −inf, is NaN; a row with no class included is all zeros;
      without classes the result is empty.

    Raises:
      TypeError: `x` is not real or `where` not boolean.
      ValueError: an axis out of range, or a mask that does not broadcast.

    Differentiable in `x` in reverse mode, to any order; forward mode over reverse works.
    For a cotangent g the gradient is `ŷ_i (g_i − Σ_k g_k ŷ_k)`. A reference value, subtracted from
    g first, keeps it accurate where the model is confident: docs/forms.md equation (31).

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> print(jaxsoftmax.softmax(jnp.array([0.0, 0.0, -jnp.inf])))
      [0.5 0.5 0. ]
    """
    x, axes, where = _prepare("softmax", x, axis, where)
    with scope("softmax", ON_LOGITS):
        return _masked_apply(_softmax, in_forward_mode(), 0, x, axes, where)


def _softmax_fwd(x):
    m, r = shift_and_remainder(x)
    return (shifted_exp(x, m) / (1 + r)[..., None]).astype(x.dtype), (x, m, r)


# ∂ŷ_j/∂z_i = ŷ_i (δ_ij − ŷ_j), so dz_i = ŷ_i ((g_i − c) − Σ_k (g_k − c) ŷ_k) for any number c.
# A confident row (r < 1) takes c = g at its one maximum, whose own term in the sum is then exactly
# 0: Σ_k (g_k − c) e_k = A − c r, with A = Σ g_k e_k over all other classes. There e = 1 at the
# maximum and nowhere else, and ⌊e⌋ picks it without a comparison.
def _softmax_bwd(residuals, g):
    x, m, r = residuals
    at_max, others = row_sums(_cotangent_terms, (x, m, g))
    c = jnp.where(r < 1, at_max, 0)
    mean = (others + jnp.where(r < 1, -c * r, at_max)) / (1 + r)
    dz = shifted_exp(x, m) / (1 + r)[..., None] * ((upcast(g) - c[..., None]) - mean[..., None])
    return (dz.astype(x.dtype),)


def _cotangent_terms(x, m, g):
    g, e = upcast(g), shifted_exp(x, m)
    at_max = jnp.floor(e)
    return g * at_max, g * (e - at_max)


_softmax = rule(_softmax_fwd, _softmax_bwd)


def log_softmax(
    x: ArrayLike, axis: Axis = -1, where: ArrayLike | None = None
) -> Float[Array, "..."]:
    r"""Logarithm of the softmax, `x_k − log Σ_j exp(x_j)`; a drop-in for `jax.nn.log_softmax`.

    Args:
      x: logits of any shape; integers are promoted to floating point.
      axis: the class axis, a tuple of class axes, or None for all axes.
      where: boolean, broadcasts to the shape of `x`: the classes to include. The others get
        −inf and gradient exactly 0.

    Returns:
      Log-probabilities with the shape and dtype of `x`, computed in float32 or wider. The largest
      one is `−log1p(r)`, accurate however close to 0 it is; r is the sum of `exp(x_k − max x)` over
      the other classes.

    Raises:
      TypeError: `x` is not real or `where` not boolean.
      ValueError: an axis out of range, or a mask that does not broadcast.

    Differentiable in `x` in reverse mode, to any order; forward mode over reverse works. For a
    cotangent g the gradient is `g_i − ŷ_i Σ_k g_k`: docs/derivation.md equation (30).

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> print(jaxsoftmax.log_softmax(jnp.array([30.0, 0.0]))[0])
      -9.357623e-14
    """
    x, axes, where = _prepare("log_softmax", x, axis, where)
    with scope("log_softmax", ON_LOGITS):
        return _masked_apply(_log_softmax, in_forward_mode(), -jnp.inf, x, axes, where)


def _log_softmax_fwd(x):
    m, r = shift_and_remainder(x)
    shifted = upcast(x) - m[..., None]
    return (shifted - jnp.log1p(r)[..., None]).astype(x.dtype), (x, m, r)


# dz_i = g_i − ŷ_i Σ_k g_k = −(Y ŷ_i − y_i) with the cotangent g in place of the target y.
def _log_softmax_bwd(residuals, g):
    x, m, r = residuals
    g = upcast(g)
    d = gradient_numerator(jnp.sum(g, axis=-1), g, shifted_exp(x, m), r) / (1 + r)[..., None]
    return ((-d).astype(x.dtype),)


_log_softmax = rule(_log_softmax_fwd, _log_softmax_bwd)


def logsumexp(  # noqa: PLR0917  (the signature of jax.nn.logsumexp)
    a: ArrayLike,
    axis: Axis = None,
    b: ArrayLike | None = None,
    keepdims: bool = False,
    return_sign: bool = False,
    where: ArrayLike | None = None,
) -> Float[Array, "..."] | tuple[Float[Array, "..."], Float[Array, "..."]]:
    r"""`log Σ_k b_k exp(a_k)`; a drop-in for `jax.nn.logsumexp` on real numbers.

    Args:
      a: exponents of any shape; integers are promoted to floating point.
      axis: the axis, axes, or None (the default) for all axes to sum over.
      b: weights that broadcast with `a`; 1 if not given. They may be negative or 0.
      keepdims: keep the summed axes with size 1.
      return_sign: also return the sign of the sum, and the logarithm of its absolute value.
      where: boolean, broadcasts to the shape of `a`: the terms to include.

    Returns:
      The logarithm in the promoted dtype of `a` and `b`, computed in float32 or wider; with
      `return_sign` a pair (logarithm, sign). An empty sum gives −inf; a negative sum without
      `return_sign` gives NaN.

    Raises:
      TypeError: `a` or `b` is not real, `where` not boolean, or a flag not True or False.
      ValueError: an axis out of range, or shapes that do not broadcast.

    Differentiable in `a` and `b` in reverse mode, to any order; forward mode over reverse
    works. `d/da_k = b_k exp(a_k)/S` and `d/db_k = exp(a_k)/S` with S the sum.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> print(jaxsoftmax.logsumexp(jnp.zeros(70_000, jnp.float16)))
      11.16
    """
    given, a = {"a": a, "b": b}, _checks.as_inexact("logsumexp", "a", a)
    if b is not None:
        b = _checks.as_inexact("logsumexp", "b", b)
        dtype = _checks.promoted("logsumexp", given)
        if not jnp.issubdtype(dtype, jnp.floating):  # two arrays of integers
            dtype = _checks.promoted("logsumexp", {"a": a, "b": b})
        try:
            shape = jnp.broadcast_shapes(a.shape, b.shape)
        except ValueError:
            raise ValueError(
                f"logsumexp: b must have a shape that broadcasts with {a.shape}, "
                f"the shape of a; got {b.shape}"
            ) from None
        a, b = (broadcast_to(v.astype(dtype), shape) for v in (a, b))
    axes = _checks.as_axes("logsumexp", axis, a.ndim)
    keepdims = _checks.as_flag("logsumexp", "keepdims", keepdims)
    return_sign = _checks.as_flag("logsumexp", "return_sign", return_sign)
    where = broadcast_mask("logsumexp", where, a.shape, "the shape of a")
    with scope("logsumexp", ON_LOGITS):
        out, sign = _logsumexp_axes(in_forward_mode(), a, b, where, axes)
        if keepdims:
            out, sign = jnp.expand_dims(out, axes), jnp.expand_dims(sign, axes)
        if return_sign:
            return out, sign
        return out if b is None else out + nan_where(sign < 0, out.dtype)


@partial(jax.jit, static_argnames=("forward", "axes"))
def _logsumexp_axes(forward, a, b, where, axes):
    dtype, included = a.dtype, None
    axes = sharded_first(a, axes)
    a, b, where = in_one_sharding(a, b, where)
    if where is not None:
        a, included = masked(a, where, axes)
        b = None if b is None else jnp.where(where, b, 0)
    rows = to_rows(a, axes)
    if rows.shape[-1] == 0:
        out = jnp.full(rows.shape[:-1], -jnp.inf, dtype)
        return out, jnp.zeros_like(out)
    if b is None:
        out = _row_logsumexp.for_mode(forward)(rows)
        out = out if included is None else jnp.where(included, out, -jnp.inf)
        sign = jnp.where(out == -jnp.inf, 0, jnp.where(jnp.isnan(out), out, 1))
    else:
        out, sign = _weighted_logsumexp.for_mode(forward)(rows, to_rows(b, axes))
    return out.astype(dtype), jax.lax.stop_gradient(sign).astype(dtype)


def _row_logsumexp_fwd(x):
    m, r = shift_and_remainder(x)
    return log_sum_exp(m, r), (x, m, r)


# d lse / dz_i = ŷ_i
def _row_logsumexp_bwd(residuals, g):
    x, m, r = residuals
    return ((shifted_exp(x, m) * (g / (1 + r))[..., None]).astype(x.dtype),)


_row_logsumexp = rule(_row_logsumexp_fwd, _row_logsumexp_bwd)


# S = b_j + Σ_{k≠j} b_k e_k with x_j the largest x where b ≠ 0. With σ = sign b_j and
# q = (|b_j| − 1) + σ Σ_{k≠j} b_k e_k, |S| = |1 + q|: log1p(q) keeps the digits that log|S| loses
# near 1; where q < −1/2, log|S| keeps those that q loses (docs/forms.md, equation 40).
def _weighted_logsumexp_fwd(x, b):
    live = b != 0
    z, w = upcast(x), upcast(b)
    m = jnp.max(jnp.where(live, z, -jnp.inf), axis=-1)
    shift = jax.lax.stop_gradient(jnp.where(jnp.isfinite(m), m, 0))
    e = jnp.exp(jnp.where(live, z, -jnp.inf) - shift[..., None])
    at_top = one_hot(first(jnp.where(live, z, -jnp.inf) == m[..., None]), x.shape[-1])
    terms = jnp.where(live, w * e, 0)
    top = jnp.sum(jnp.where(at_top, terms, 0), axis=-1)
    rest = jnp.sum(jnp.where(at_top, 0, terms), axis=-1)
    total = top + rest
    sign = jnp.sign(total)
    q = (jnp.abs(top) - 1) + jnp.sign(top) * rest
    near, above = jnp.abs(q) <= 0.5, q > 0.5
    log_abs = jnp.where(above, jnp.log1p(jnp.where(above, q, 0)), jnp.log(jnp.abs(total)))
    log_abs = jnp.where(near, log1p_near(jnp.where(near, q, 0)), log_abs)
    return (shift + log_abs, sign), (x, b, shift, total)


# d log|S| / dx_k = b_k e_k / S ;  d log|S| / db_k = e_k / S
def _weighted_logsumexp_bwd(residuals, cotangents):
    x, b, shift, total = residuals
    scale = (cotangents[0] / total)[..., None]
    e = shifted_exp(x, shift)
    dx = jnp.where(b != 0, upcast(b) * e * scale, 0)
    return dx.astype(x.dtype), (e * scale).astype(b.dtype)


_weighted_logsumexp = rule(_weighted_logsumexp_fwd, _weighted_logsumexp_bwd)


def softmax_jacobian(x: ArrayLike, axis: int = -1) -> Float[Array, "*batch classes classes"]:
    r"""The Jacobian of the softmax, `J[..., i, j] = ∂ŷ_i/∂x_j = ŷ_i (δ_ij − ŷ_j)`.

    Args:
      x: logits of any shape; integers are promoted to floating point.
      axis: the class axis.

    Returns:
      `[*batch, C, C]` in the dtype of `x`, where `batch` is the shape of `x` without `axis`.
      In the diagonal `ŷ_i (1 − ŷ_i)`, nothing cancels.

    Raises:
      TypeError: `x` is not real, or `axis` not an integer.
      ValueError: `axis` is out of range.

    Differentiable in `x` in every mode. docs/derivation.md equation (29).

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> print(jaxsoftmax.softmax_jacobian(jnp.array([30.0, 0.0])))
      [[ 9.357623e-14 -9.357623e-14]
       [-9.357623e-14  9.357623e-14]]
    """
    x = _checks.as_inexact("softmax_jacobian", "x", x)
    axes = _checks.as_axes("softmax_jacobian", axis, x.ndim, _checks.ONE_AXIS)
    with scope("softmax_jacobian", ON_LOGITS):
        return _softmax_jacobian(x, axes)


@partial(jax.jit, static_argnames="axes")
def _softmax_jacobian(x, axes):
    rows = upcast(to_rows(x, axes))  # here: the cotangents of two uses are added, then cast once
    if rows.shape[-1] == 0:
        return jnp.zeros((*rows.shape, 0), x.dtype)
    m, r = shift_and_remainder(rows)
    e, r = shifted_exp(rows, m), r[..., None]
    probabilities = e / (1 + r)
    complement = ((1 - e) + r) / (1 + r)  # 1 − ŷ_i
    diagonal = jnp.eye(e.shape[-1], dtype=bool).reshape((1,) * (e.ndim - 1) + (e.shape[-1],) * 2)
    one, other = (whole_last(p)[..., None, :] for p in (complement, probabilities))
    factor = jnp.where(diagonal, one, -other)
    return (probabilities[..., :, None] * factor).astype(x.dtype)


def _prepare(function, x, axis, where):
    x = _checks.as_inexact(function, "x", x)
    axes = _checks.as_axes(function, axis, x.ndim)
    return x, axes, broadcast_mask(function, where, x.shape, "the shape of x")


@partial(jax.jit, static_argnames=("rule", "forward", "excluded", "axes"))
def _masked_apply(rule, forward, excluded, x, axes, where):  # noqa: PLR0917
    """`rule` on the rows of `x`; outside `where` its input is −inf and the result `excluded`."""
    dtype = x.dtype
    axes = sharded_first(x, axes)
    if where is not None:
        x, where = in_one_sharding(x, where)
        x, _ = masked(x, where, axes)
    rows = to_rows(x, axes)
    out = from_rows(rows if rows.shape[-1] == 0 else rule.for_mode(forward)(rows), axes, x).astype(
        dtype
    )
    return out if where is None else jnp.where(where, out, excluded)
