# SPDX-License-Identifier: Apache-2.0
"""Every argument check of the library and the text of every error.

A message names the function, the argument, what was expected with its numbers,
and what came.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def _describe(value: object) -> str:
    """What came, short enough for one line: a dtype and shape, or a repr."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"  # pyright: ignore[reportAttributeAccessIssue]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def as_array(function: str, name: str, value: ArrayLike) -> jax.Array:
    """`value` as a JAX array; lists and other containers are refused, as in `jax.numpy`."""
    if isinstance(value, (list, tuple, dict, set, str, bytes)) or value is None:
        raise TypeError(
            f"{function}: {name} must be an array or a scalar; "
            f"got {type(value).__name__} {_describe(value)}"
        )
    try:
        return jnp.asarray(value)
    except TypeError as error:
        raise TypeError(
            f"{function}: {name} must be an array or a scalar; "
            f"got {type(value).__name__} {_describe(value)}"
        ) from error


def as_floating(function: str, name: str, value: ArrayLike) -> jax.Array:
    """`value` as a real floating-point array."""
    array = as_array(function, name, value)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{function}: {name} must have a real floating-point dtype; got {array.dtype}"
        )
    return array


def as_inexact(function: str, name: str, value: ArrayLike) -> jax.Array:
    """`value` as a real floating-point array; integers and booleans are promoted as in jax.nn."""
    array = as_array(function, name, value)
    if jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise TypeError(f"{function}: {name} must have a real dtype; got {array.dtype}")
    if not jnp.issubdtype(array.dtype, jnp.floating):
        array = array.astype(jax.eval_shape(jnp.exp, array).dtype)
    return array


def as_labels(function: str, name: str, value: ArrayLike) -> jax.Array:
    """`value` as an array of integers."""
    array = as_array(function, name, value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{function}: {name} must have an integer dtype; got {array.dtype}")
    return array


def as_mask(function: str, name: str, value: ArrayLike) -> jax.Array:
    """`value` as a boolean array."""
    array = as_array(function, name, value)
    if array.dtype != jnp.bool_:
        raise TypeError(f"{function}: {name} must have dtype bool; got {array.dtype}")
    return array


def _one_axis(function: str, axis: object, ndim: int) -> int:
    if isinstance(axis, (bool, np.bool_)) or not isinstance(axis, (int, np.integer)):
        raise TypeError(
            f"{function}: axis must be an integer, a tuple of integers or None; "
            f"got {type(axis).__name__} {_describe(axis)}"
        )
    if not -ndim <= axis < ndim:
        raise ValueError(
            f"{function}: axis must be in [{-ndim}, {ndim}) for an array with {ndim} axes; "
            f"got {axis}"
        )
    return int(axis) % ndim


def as_axes(function: str, axis: int | Sequence[int] | None, ndim: int) -> tuple[int, ...]:
    """`axis` as a tuple of distinct non-negative axes, in the caller's order."""
    if axis is None:
        return tuple(range(ndim))
    if not isinstance(axis, (tuple, list)):
        return (_one_axis(function, axis, ndim),)
    axes = tuple(_one_axis(function, a, ndim) for a in axis)
    if len(set(axes)) != len(axes):
        raise ValueError(f"{function}: axis must name distinct axes; got {tuple(axis)}")
    return axes


def check_has_classes(function: str, name: str, shape: Sequence[int], axes: Sequence[int]) -> None:
    """At least one class: the softmax of nothing is not defined."""
    if any(shape[a] == 0 for a in axes):
        raise ValueError(
            f"{function}: {name} must have at least one class along axis "
            f"{axes[0] if len(axes) == 1 else tuple(axes)}; got shape {tuple(shape)}"
        )


def check_shape(
    function: str, name: str, shape: Sequence[int], expected: Sequence[int], meaning: str
) -> None:
    """`shape` is exactly `expected`, which `meaning` explains."""
    if tuple(shape) != tuple(expected):
        raise ValueError(
            f"{function}: {name} must have shape {tuple(expected)}, {meaning}; got {tuple(shape)}"
        )


def check_broadcasts(
    function: str, name: str, shape: Sequence[int], target: Sequence[int], meaning: str
) -> None:
    """`shape` broadcasts to `target` without growing it."""
    try:
        fits = jnp.broadcast_shapes(tuple(shape), tuple(target)) == tuple(target)
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"{function}: {name} must broadcast to {tuple(target)}, {meaning}; got {tuple(shape)}"
        )


def as_positive(function: str, name: str, value: ArrayLike) -> jax.Array:
    """A real floating scalar; greater than 0 where its value is known."""
    array = as_inexact(function, name, value)
    if array.ndim:
        raise ValueError(f"{function}: {name} must be a scalar; got shape {array.shape}")
    if not isinstance(array, jax.core.Tracer) and not (array > 0 and jnp.isfinite(array)):
        raise ValueError(f"{function}: {name} must be positive and finite; got {array}")
    return array


def check_choice(function: str, name: str, value: object, choices: Sequence[object]) -> None:
    """`value` is one of `choices`."""
    if not any(value is choice or value == choice for choice in choices):
        listed = ", ".join(map(repr, choices))
        raise ValueError(f"{function}: {name} must be one of {listed}; got {_describe(value)}")


def check_count(function: str, name: str, value: object) -> None:
    """`value` is a Python integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(
            f"{function}: {name} must be an integer; got {type(value).__name__} {_describe(value)}"
        )
    if value < 1:
        raise ValueError(f"{function}: {name} must be at least 1; got {value}")
