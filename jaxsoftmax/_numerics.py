# SPDX-License-Identifier: Apache-2.0
"""The mathematics of a row of logits z: no platform, no mesh. Derived in docs/derivation.md.

    m = max_k z_k        e_k = exp(z_k − m)        r = Σ_{k ≠ argmax} e_k

With ties `r`, the remainder, counts all but one of the maxima. Everything else follows:

    lse = m + log1p(r)        ŷ_k = e_k / (1 + r)        Y ŷ_k − y_k = numerator / (1 + r)

For a label's loss m, the shift, may be another class's logit in place of the maximum, mostly the
label's, and r the sum over all other classes. A row is the last axis; `_axes` moves the class axes
there. `_row_sums` computes the same in the forms that are fast.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

# A function of raw logits and scalars: the logits of the softmax, in the accumulation dtype.
Elementwise = Callable[..., jax.Array]

# A row is measured from its label only if r is less than this: log1p(r), the loss, below 16.64
# (docs/forms.md, section 13).
NEAR = 2.0**24
# The shift, with r = 0, of a row that has no label and is asked for nothing but its loss: every
# exponential is 0, sums of its gaps over the classes and the square of its lse are finite.
UNLABELLED = 2.0**60


def accumulation_dtype(*dtypes: jnp.dtype) -> jnp.dtype:
    """The dtype sums are taken in: float32 for half precision and float32, else float64."""
    return jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)


def upcast(x: jax.Array) -> jax.Array:
    """`x` in its accumulation dtype."""
    return x.astype(accumulation_dtype(x.dtype))


def broadcast_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`x` in this shape; its cotangent is summed in the accumulation dtype and rounded once."""
    return x if x.shape == shape else _broadcast_to(x, shape)


@partial(jax.jit, static_argnames="shape")
def _broadcast_to(x, shape):
    return jnp.broadcast_to(upcast(x), shape).astype(x.dtype)


def shifted_exp(x: jax.Array, m: jax.Array) -> jax.Array:
    """e_k = exp(z_k − m), exactly 1 where z_k is m."""
    return jnp.exp(upcast(x) - m[..., None])


def max_and_remainder(x: jax.Array, *, argmax: bool = False) -> tuple[jax.Array, ...]:
    """(m, r) of each row; r is NaN where a logit is NaN or +∞, and only there.

    With `argmax` the index of the first maximum too.
    """
    m = jnp.max(upcast(x), axis=-1)
    r = remainder(x, m)
    return (m, r, first(upcast(x) == m[..., None])) if argmax else (m, r)


def remainder(x: jax.Array, m: jax.Array) -> jax.Array:
    """The remainder r of each row, from its maximum."""
    at_max = upcast(x) == m[..., None]
    ties = jnp.sum(at_max, axis=-1, dtype=m.dtype) - 1
    return jnp.sum(jnp.where(at_max, 0, shifted_exp(x, finite_shift(m))), axis=-1) + ties


def remainder_beside(x: jax.Array, m: jax.Array, index: jax.Array) -> jax.Array:
    """The remainder r of each row from the logit m of the class at `index`, in one pass."""
    return jnp.sum(jnp.where(one_hot(index, x.shape[-1]), 0, shifted_exp(x, m)), axis=-1)


def first(flags: jax.Array) -> jax.Array:
    """The index of the first True of each row, the last if none: on a CPU a tenth of `argmax`.

    Of more classes than int32 counts, the index of *a* True: indices wrap here and in `one_hot`.
    """
    index = jnp.arange(flags.shape[-1], dtype=jnp.int32)
    index = index.reshape((1,) * (flags.ndim - 1) + (-1,))
    return jnp.min(jnp.where(flags, index, index[..., -1:]), axis=-1)


def finite_shift(m: jax.Array) -> jax.Array:
    """What is subtracted from a row with the maximum m: 0 for an infinite m, or r would be NaN."""
    return jnp.where(jnp.isinf(m), 0, m)


def remainder_tangent(x: jax.Array, dx: jax.Array, m: jax.Array) -> jax.Array:
    """The derivative Σ_k e_k dz_k of r, over *every* k, with m a constant.

    What is computed from (z, m, r) does not depend on the shift m: so m may be held constant, and
    r = Σ e − 1. That gives the right second derivatives at ties too, where the maximum has none.
    """
    has_sum, x, m = rows_with_sum(x, m)
    return jnp.where(has_sum, jnp.sum(shifted_exp(x, m) * upcast(dx), axis=-1), 0)


def rows_with_sum(x: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which rows have a finite log-sum-exp, and (x, m) with zeros in all other rows.

    Derivatives of any order multiply those rows by cotangents of 0, and 0 · NaN would be NaN.
    """
    has_sum = jnp.isfinite(m)
    return has_sum, jnp.where(has_sum[..., None], x, 0), jnp.where(has_sum, m, 0)


def log_sum_exp(m: jax.Array, r: jax.Array) -> jax.Array:
    """The log-sum-exp m + log1p(r); an infinite maximum stays itself."""
    return jnp.where(jnp.isinf(m), m, m + jnp.log1p(r))


def gradient_numerator(total: jax.Array, y: jax.Array, e: jax.Array, r: jax.Array) -> jax.Array:
    """(Y ŷ_k − y_k)(1 + r) = (Y e_k − y_k) − y_k r, without cancellation; `total` is Y.

    At the maximum e_k is exactly 1, so a one-hot target leaves −r; at any other entry r ≥ e_k, so
    nothing cancels either (docs/derivation.md, equation 27). Of an integer label it is e_k beside
    the label and (e_t − 1) − r at it: `_statistics.label_cotangents` takes it in these two parts.
    """
    return (total[..., None] * e - y) - y * r[..., None]


def one_hot(index: jax.Array, size: int) -> jax.Array:
    """A boolean [..., size]: True at the int32 index, nowhere for −1."""
    return index[..., None] == jnp.arange(size, dtype=jnp.int32).reshape((1,) * index.ndim + (-1,))


def selected(x: jax.Array, index: jax.Array) -> jax.Array:
    """The logit of each row at its index, by comparison: a linear map, in every sharding."""
    return jnp.sum(jnp.where(one_hot(index, x.shape[-1]), upcast(x), 0), axis=-1)


def nan_where(invalid: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """NaN where `invalid`, else 0; no NaN is formed if nothing is invalid, for `jax_debug_nans`."""
    infinite = jnp.where(invalid, jnp.inf, 0).astype(dtype)
    return infinite - infinite


def two_difference(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The difference rounded, and what that lost: they add up to a − b exactly (Knuth, 1969)."""
    high = a - b
    of_b = high - a
    return high, (a - (high - of_b)) - (b + of_b)


def exp_beyond_linear(x: jax.Array) -> jax.Array:
    """e^x − 1 − x for |x| ≤ ½, to full relative accuracy: its Taylor series x²/2 (1 + x/3 + …)."""
    count = 8 if x.dtype == jnp.float32 else 15
    series = jnp.ones_like(x)
    for n in range(count + 1, 2, -1):
        series = 1 + x / n * series
    return 0.5 * x * x * series


def log_beyond_linear(x: jax.Array) -> jax.Array:
    """The rest x − log(1 + x) for |x| ≤ ½, to full relative accuracy.

    With y = x / (2 + x), log(1 + x) is 2 artanh y and x is 2y + x y: so it is the difference of x y
    and 2 y³ (1/3 + y²/5 + …), of which the second is less than a fifth of the first.
    """
    y = x / (2 + x)
    square = y * y
    count = 7 if x.dtype == jnp.float32 else 16
    series = jnp.full_like(x, 1 / (2 * count + 1))
    for n in range(count - 1, 0, -1):
        series = 1 / (2 * n + 1) + square * series
    return x * y - 2 * y * square * series


def log1p_near(x: jax.Array) -> jax.Array:
    """log(1 + x) for |x| ≤ ½; XLA's log1p in float64 is wrong by 2e-14 of it in JAX 0.10."""
    return x - log_beyond_linear(x)
