# SPDX-License-Identifier: Apache-2.0
"""What is done to raw logits before anything else: soft cap and temperature."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from . import _checks
from ._numerics import Elementwise, two_difference, upcast


class Transform(NamedTuple):
    """What is done to raw logits: scalars, or None for nothing at all.

    At least float32, as all options, so that their gradients are summed in it and rounded once.
    """

    soft_cap: jax.Array | None = None
    temperature: jax.Array | None = None

    def undivided(self) -> Transform:
        """Without the temperature."""
        return self._replace(temperature=None)


def as_transform(function: str, soft_cap: ArrayLike | None, temperature: ArrayLike) -> Transform:
    """Check both."""
    if soft_cap is not None:
        soft_cap = upcast(_checks.as_positive(function, "soft_cap", soft_cap))
    if isinstance(temperature, (int, float)) and temperature == 1 and temperature is not True:
        return Transform(soft_cap)
    return Transform(soft_cap, upcast(_checks.as_positive(function, "temperature", temperature)))


def as_transforms(
    function: str, temperature: ArrayLike, soft_cap: ArrayLike | None, target: ArrayLike | None
) -> tuple[Transform, Transform]:
    """Of two logits with one temperature and soft caps of their own."""
    transform = as_transform(function, soft_cap, temperature)
    if target is not None:
        target = upcast(_checks.as_positive(function, "target_soft_cap", target))
    return transform, transform._replace(soft_cap=target)


def transformed(x: jax.Array, transform: Transform) -> jax.Array:
    """The logits z = soft_cap · tanh(x / soft_cap) / temperature; without either, `x` unchanged.

    An infinity stays one: the cap does not bring back a class that is excluded by −inf.
    """
    soft_cap, temperature = transform
    if soft_cap is None and temperature is None:
        return x
    x = upcast(x)
    # Selected before and after, so that no derivative of any order multiplies an infinity by 0. A
    # `custom_jvp` would not do: JAX drops it from a `scan` that is differentiated more than once.
    finite = jnp.isfinite(x)
    z = jnp.where(finite, x, 0)
    if soft_cap is not None:
        z = _capped(z, soft_cap.astype(x.dtype))
    if temperature is not None:
        z = z / temperature.astype(x.dtype)
    return jnp.where(finite, z, x)


def difference(
    x: jax.Array,
    y: jax.Array,
    of_x: Transform,
    of_y: Transform,
    less: tuple[jax.Array, jax.Array],
    *,
    same_cap: bool,
) -> jax.Array:
    """The capped `x − y`, less a constant that two numbers add up to, over the temperature.

    Without a soft cap only the result is rounded, and the quotient if there is a temperature, which
    both share. With `same_cap` the difference has a relative error of a few roundings before
    anything is subtracted from it, however small it is. 0 stands for an infinity.
    """
    x, y = (jnp.where(jnp.isfinite(a), upcast(a), 0) for a in (x, y))
    cap, cap_y = (jax.tree.map(lambda c: c.astype(x.dtype), of.soft_cap) for of in (of_x, of_y))
    if same_cap and cap is not None:
        # tanh a − tanh b = tanh(a − b) (1 − tanh a tanh b)
        high = _capped(x - y, cap) * (1 - jnp.tanh(x / cap) * jnp.tanh(y / cap))
        low = jnp.zeros_like(high)
    else:
        x, y = (a if of is None else _capped(a, of) for a, of in ((x, cap), (y, cap_y)))
        high, low = x - y, lax.stop_gradient(two_difference(x, y)[1])
    x = (high - less[0]) + (low - less[1])
    if of_x.temperature is None:
        return x
    return x / of_x.temperature.astype(x.dtype)


def as_function(transform: Transform) -> tuple[Elementwise, tuple[jax.Array, ...]]:
    """`transformed` as a function of raw logits and scalars (one object per kind); the scalars."""
    names = tuple(name for name, scalar in transform._asdict().items() if scalar is not None)
    return _function_of(names), tuple(jax.tree.leaves(transform))


@functools.cache
def _function_of(names):
    if not names:
        return upcast
    return lambda x, *scalars: transformed(x, Transform(**dict(zip(names, scalars, strict=True))))


@jax.custom_jvp
def _capped(x: jax.Array, cap: jax.Array) -> jax.Array:
    u = x / cap
    linear = jnp.abs(u) < 2**-12 if x.dtype == jnp.float32 else jnp.abs(u) < 2**-27
    return jnp.where(linear, x, cap * jnp.tanh(u))  # u²/3 is below rounding, and u may underflow


# The derivative by x comes from the result alone, so that neither x nor the hyperbolic tangent has
# to be kept beside it: docs/derivation.md equations (52) and (53).
@_capped.defjvp
def _capped_jvp(primals, tangents):
    (x, cap), (dx, dcap) = primals, tangents
    z = _capped(x, cap)
    t = z / cap
    slope = (1 - t) * (1 + t)
    return z, slope * dx + (t - slope * (x / cap)) * dcap
