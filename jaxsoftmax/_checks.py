# SPDX-License-Identifier: Apache-2.0
"""Every argument check of the library and the text of every error.

A message names the function, the argument, what was expected with its numbers,
and what came.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from ._sharding import AxisName, axis_names, manual_axes, manual_axes_here


def _describe(value: object) -> str:
    """What came, short enough for one line: a dtype and shape, or a repr."""
    if hasattr(value, "shape") and hasattr(value, "dtype"):
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"  # pyright: ignore[reportAttributeAccessIssue]
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _typed(value: object) -> str:
    """What came, with its type first."""
    return f"{type(value).__name__} {_describe(value)}"


def _untraced(value: object) -> str:
    """What came in place of a static value, and the remedy if it is traced."""
    remedy = ", which is traced: name it in static_argnames of jax.jit, or bind it with partial"
    return _typed(value) + (remedy if isinstance(value, Tracer) else "")


def _no_array(function: str, name: str, value: object) -> TypeError:
    return TypeError(f"{function}: {name} must be an array or a scalar; got {_typed(value)}")


def as_array(function: str, name: str, value: ArrayLike) -> jax.Array:
    """`value` as a JAX array; lists and other containers are refused, as in `jax.numpy`."""
    if isinstance(value, (list, tuple, dict, set, str, bytes)) or value is None:
        raise _no_array(function, name, value)
    try:
        return jnp.asarray(value)
    except OverflowError as error:
        raise ValueError(
            f"{function}: {name} must fit {jnp.asarray(0).dtype} as a Python integer; "
            f"got {_describe(value)}"
        ) from error
    except (TypeError, ValueError) as error:
        raise _no_array(function, name, value) from error


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
    if jnp.issubdtype(array.dtype, jnp.floating):
        return array
    if array.dtype != jnp.bool_ and not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{function}: {name} must have a real dtype; got {array.dtype}")
    return array.astype(jax.eval_shape(jnp.exp, array).dtype)


def promoted(function: str, values: Mapping[str, ArrayLike]) -> jnp.dtype:
    """The dtype to which JAX promotes these arguments, given by name."""
    try:
        return jnp.result_type(*values.values())
    except ValueError as error:  # JAX's TypePromotionError
        dtypes = ", ".join(str(jnp.result_type(value)) for value in values.values())
        raise TypeError(
            f"{function}: {' and '.join(values)} must have dtypes that JAX promotes to one; "
            f"got {dtypes}"
        ) from error


def as_labels(function: str, name: str, value: ArrayLike) -> jax.Array:
    """`value` as an integer array; numbers that JAX would cut to 32 bits are refused."""
    array = as_array(function, name, value)
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{function}: {name} must have an integer dtype; got {array.dtype}")
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype != array.dtype:
        limits = np.iinfo(array.dtype)
        if np.any((value < limits.min) | (value > limits.max)):
            raise ValueError(
                f"{function}: {name} must fit {array.dtype}, which JAX makes of {value.dtype} "
                f"without jax_enable_x64; got values from {value.min()} to {value.max()}"
            )
    return array


def as_mask(function: str, name: str, value: ArrayLike) -> jax.Array:
    """`value` as a boolean array."""
    array = as_array(function, name, value)
    if array.dtype != jnp.bool_:
        raise TypeError(f"{function}: {name} must have dtype bool; got {array.dtype}")
    return array


ONE_AXIS = "an integer"
SOME_AXES = "an integer or a tuple of integers"
ANY_AXES = "an integer, a tuple of integers or None"


def _one_axis(function: str, axis: object, ndim: int, allowed: str) -> int:
    if isinstance(axis, bool) or not isinstance(axis, (int, np.integer)):
        raise TypeError(f"{function}: axis must be {allowed}; got {_untraced(axis)}")
    if not -ndim <= axis < ndim:
        raise ValueError(
            f"{function}: axis must be in [{-ndim}, {ndim}) for an array with {ndim} axes; "
            f"got {axis}"
        )
    return int(axis) % ndim


def as_axes(
    function: str, axis: int | Sequence[int] | None, ndim: int, allowed: str = ANY_AXES
) -> tuple[int, ...]:
    """`axis` as a tuple of distinct non-negative axes, in the caller's order."""
    if axis is None and allowed == ANY_AXES:
        return tuple(range(ndim))
    if allowed == ONE_AXIS or not isinstance(axis, (tuple, list)):
        return (_one_axis(function, axis, ndim, allowed),)
    axes = tuple(_one_axis(function, a, ndim, allowed) for a in axis)
    if len(set(axes)) != len(axes):
        raise ValueError(f"{function}: axis must name distinct axes; got {tuple(axis)}")
    return axes


def check_has_classes(function: str, name: str, shape: Sequence[int], axes: Sequence[int]) -> None:
    """There is at least one class: the softmax of no classes is not defined."""
    if any(shape[a] == 0 for a in axes):
        raise ValueError(
            f"{function}: {name} must have at least one class along axis "
            f"{axes[0] if len(axes) == 1 else tuple(axes)}; got shape {tuple(shape)}"
        )


def check_labels_fit(function: str, shape: Sequence[int], axes: Sequence[int]) -> None:
    """There are no more classes than int32, the dtype of the library's labels, can number."""
    classes = math.prod(shape[a] for a in axes)
    if isinstance(classes, int) and classes > jnp.iinfo(jnp.int32).max:
        raise ValueError(
            f"{function}: logits must have at most {jnp.iinfo(jnp.int32).max} classes, the largest "
            f"label of int32; got shape {tuple(shape)} with {classes} along axis {tuple(axes)}"
        )


def check_shape(
    function: str, name: str, shape: Sequence[int], expected: Sequence[int], meaning: str
) -> None:
    """`shape` is exactly `expected`, which `meaning` explains."""
    if tuple(shape) != tuple(expected):
        raise ValueError(
            f"{function}: {name} must have shape {tuple(expected)}, {meaning}; got {tuple(shape)}"
        )


def check_label_shape(
    function: str, shape: Sequence[int], expected: Sequence[int], meaning: str, *, several: bool
) -> None:
    """The shape of labels is `expected`, or has one more axis if `several` of each are allowed."""
    if several and len(shape) > len(expected) and tuple(shape[:-1]) == tuple(expected):
        return
    if several:
        more = str((*expected, "K")).replace("'", "")
        meaning = f"{meaning}, or {more} for K labels each"
    check_shape(function, "labels", shape, expected, meaning)


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


def as_scalar(function: str, name: str, value: ArrayLike) -> jax.Array:
    """A real floating scalar; a boolean is refused: it is a flag, not a number."""
    array = as_array(function, name, _as_float(value))
    if array.dtype == jnp.bool_:
        raise TypeError(f"{function}: {name} must be a real number; got {_describe(value)}")
    array = as_inexact(function, name, array)
    if array.ndim:
        raise ValueError(f"{function}: {name} must be a scalar; got shape {array.shape}")
    return array


def _as_float(value: ArrayLike) -> ArrayLike:
    """A Python integer as a float: it may be more than an integer dtype holds."""
    if not isinstance(value, int) or isinstance(value, bool):
        return value
    try:
        return float(value)
    except OverflowError:
        return np.inf


def _known(value: ArrayLike, array: jax.Array) -> float | None:
    """`value` rounded to the dtype of `array` (1e-60 is 0 in float32); None if traced."""
    if isinstance(value, Tracer):
        return None
    with np.errstate(over="ignore", under="ignore"):
        return float(np.asarray(_as_float(value)).astype(array.dtype))


def as_positive(function: str, name: str, value: ArrayLike) -> jax.Array:
    """A real floating scalar; positive and finite where its value is known."""
    array = as_scalar(function, name, value)
    known = _known(value, array)
    if known is not None and not 0 < known < np.inf:
        raise ValueError(f"{function}: {name} must be positive and finite; got {value}")
    return array


def as_between(function: str, name: str, value: ArrayLike) -> jax.Array:
    """A real floating scalar; in (0, 1) where its value is known."""
    array = as_scalar(function, name, value)
    known = _known(value, array)
    if known is not None and not 0 < known < 1:
        raise ValueError(f"{function}: {name} must be between 0 and 1, and neither; got {value}")
    return array


def as_bounded(function: str, name: str, value: ArrayLike, most: float) -> jax.Array:
    """A real floating, finite scalar; in [0, most] where its value is known."""
    array = as_scalar(function, name, value)
    known = _known(value, array)
    if known is not None and not (0 <= known <= most and known < np.inf):
        expected = "at least 0 and finite" if most == np.inf else f"in [0, {most:g}]"
        raise ValueError(f"{function}: {name} must be {expected}; got {value}")
    return array


def as_ignore_index(function: str, value: object) -> int | None:
    """A Python integer, or None."""
    if value is None or (isinstance(value, (int, np.integer)) and not isinstance(value, bool)):
        return None if value is None else int(value)
    raise TypeError(f"{function}: ignore_index must be an integer or None; got {_untraced(value)}")


def as_axis_name(function: str, value: object) -> AxisName | None:
    """Manual mesh axes that shard the classes, or None."""
    if value is None:
        return None
    names = (value,) if isinstance(value, str) else value
    if not (isinstance(names, tuple) and names and all(isinstance(n, str) for n in names)):
        raise TypeError(
            f"{function}: axis_name must be the name of a mesh axis, a tuple of such, or None; "
            f"got {_typed(value)}"
        )
    here = manual_axes_here()
    if not set(names) <= set(here) or len(set(names)) < len(names):
        raise ValueError(
            f"{function}: axis_name must name axes that an enclosing shard_map makes manual, here "
            f"{here}, each once; got {value!r}"
        )
    return value  # pyright: ignore[reportReturnType] - a str or a tuple of them


def check_sharded_classes(
    function: str, axis_name: AxisName | None, arrays: Mapping[str, Any]
) -> None:
    """Each array (or None) is this device's part of the classes."""
    for name, array in arrays.items():
        if array is not None and not axis_names(axis_name) <= manual_axes(array):
            raise ValueError(
                f"{function}: {name} must vary over axis_name {axis_name!r}, as what in_specs "
                f"shard does in a shard_map with check_vma=True; got {_varying(array)}"
            )


def check_whole_classes(
    function: str, axis_name: AxisName | None, arrays: Mapping[str, Any]
) -> None:
    """Each array is the same on all devices that share the classes."""
    for name, array in arrays.items():
        if axis_names(axis_name) & manual_axes(array):
            raise ValueError(
                f"{function}: {name} must be the same on all devices along axis_name "
                f"{axis_name!r}, which shards the classes; got {_varying(array)}"
            )


def _varying(array: jax.Array) -> str:
    return f"one that varies over {tuple(sorted(manual_axes(array)))}"


def check_mesh(function: str, *arrays: jax.Array) -> None:
    """No mesh is partly explicit: JAX's sums are wrong there, or XLA ends the process."""
    for mesh in (jax.typeof(array).sharding.mesh for array in arrays):
        if mesh.explicit_axes and mesh.manual_axes:
            raise ValueError(
                f"{function}: inside shard_map the mesh must be manual or automatic along all axes "
                f"(name the others in axis_names as well); got {mesh.manual_axes} manual and "
                f"{mesh.explicit_axes} explicit"
            )
        if mesh.explicit_axes and mesh.auto_axes:
            raise ValueError(
                f"{function}: the mesh must be explicit or automatic along all axes (see "
                f"jax.sharding.explicit_axes without axes=); got {mesh.explicit_axes} explicit and "
                f"{mesh.auto_axes} automatic"
            )


def check_choice(function: str, name: str, value: object, choices: Sequence[str | None]) -> None:
    """`value` is one of `choices`."""
    if not (value is None or isinstance(value, str)) or value not in choices:
        listed = ", ".join(map(repr, choices))
        came = _describe(value)
        if None in choices and isinstance(value, str) and value.lower() == "none":
            came += ", a string in place of None itself"
        raise ValueError(f"{function}: {name} must be one of {listed}; got {came}")


def as_flag(function: str, name: str, value: object) -> bool:
    """A Python boolean: it decides what is computed."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{function}: {name} must be True or False; got {_untraced(value)}")
    return bool(value)


def check_precision(function: str, value: Any) -> None:
    """`value` is what `jax.lax.dot_general` takes."""
    one = jax.ShapeDtypeStruct((1, 1), jnp.float32)
    try:
        jax.eval_shape(lambda a: jax.lax.dot(a, a, precision=value), one)
    except (TypeError, ValueError) as error:
        kind = ValueError if isinstance(error, ValueError) else TypeError
        raise kind(
            f"{function}: precision must be as in jax.lax.dot_general; got {_typed(value)}"
        ) from error


def as_compute_dtype(function: str, name: str, value: Any) -> jnp.dtype:
    """`value`, a floating dtype of at least 16 bits that JAX has here, as a dtype."""
    try:
        dtype = jnp.dtype(value)
    except TypeError as error:
        raise TypeError(f"{function}: {name} must be a dtype; got {_typed(value)}") from error
    if not jnp.issubdtype(dtype, jnp.floating) or dtype.itemsize < 2:
        raise TypeError(
            f"{function}: {name} must be a real floating-point dtype of at least 16 bits; "
            f"got {dtype}"
        )
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{function}: {name} {dtype} needs jax_enable_x64")
    return dtype


def check_callable(function: str, name: str, value: object) -> None:
    """`value` is a function."""
    if not callable(value):
        raise TypeError(f"{function}: {name} must be callable; got {_typed(value)}")


def check_losses(
    function: str,
    losses: Any,
    logits: Sequence[int],
    varying: frozenset[str],
    axis_name: AxisName | None,
) -> None:
    """`losses`, the result of `loss_fn` for logits of that shape, are one floating loss per token.

    `varying`: the manual mesh axes over which they vary. A loss of a whole row does not vary over
    `axis_name`.
    """
    if getattr(losses, "shape", None) != logits[:1]:
        raise ValueError(
            f"{function}: loss_fn must return one loss a token, shape {logits[:1]} for logits "
            f"{logits}; got {_describe(losses)}"
        )
    if not jnp.issubdtype(losses.dtype, jnp.floating):
        raise TypeError(f"{function}: loss_fn must return a floating dtype; got {losses.dtype}")
    if axis_names(axis_name) & varying:
        raise ValueError(
            f"{function}: loss_fn must give the losses of whole rows, summed over axis_name "
            f"{axis_name!r}; got losses that vary over it"
        )


def check_count(function: str, name: str, value: object) -> None:
    """`value` is a Python integer of at least 1."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{function}: {name} must be an integer; got {_untraced(value)}")
    if value < 1:
        raise ValueError(f"{function}: {name} must be at least 1; got {value}")


def check_classes(function: str, name: str, value: object, classes: int) -> None:
    """`value` is a number of classes, of so many."""
    check_count(function, name, value)
    if value > classes:  # pyright: ignore[reportOperatorIssue] - an integer
        raise ValueError(
            f"{function}: {name} must be at most the number of classes, {classes}; got {value}"
        )


def as_key(function: str, name: str, value: Any) -> jax.Array:
    """One key of `jax.random`, typed or of the old kind, as a typed one."""
    array = as_array(function, name, value)
    typed = jnp.issubdtype(array.dtype, jax.dtypes.prng_key)
    if not typed and array.dtype != jnp.uint32:
        raise TypeError(f"{function}: {name} must be a key of jax.random; got {_describe(array)}")
    try:
        key = array if typed else jax.random.wrap_key_data(array)
    except TypeError:
        key = None
    if key is None or key.ndim:
        raise ValueError(f"{function}: {name} must be one key; got {_describe(array)}")
    return key


def check_labels(labels: ArrayLike, num_classes: int, *, ignore_index: int | None = None) -> None:
    """Refuse labels out of range [0, num_classes), for which the losses would be NaN.

    Args:
      labels: integers of any shape, whose values are known: not inside `jit`.
      num_classes: the number of classes.
      ignore_index: a label that is allowed as well.

    Returns:
      Nothing.

    Raises:
      TypeError: labels not integers or traced, or an argument of the wrong type.
      ValueError: labels out of range; the message says how many, the first one and its index.

    Example:
      >>> import numpy as np, jaxsoftmax
      >>> jaxsoftmax.check_labels(np.array([0, 2, -100]), 3, ignore_index=-100)
      >>> print("labels are fine")
      labels are fine
    """
    name = "check_labels"
    check_count(name, "num_classes", num_classes)
    ignore_index = as_ignore_index(name, ignore_index)
    if isinstance(labels, Tracer):
        raise TypeError(
            f"{name}: labels must be known, not traced (outside jit); got {_describe(labels)}"
        )
    # NumPy keeps 64 bits, which JAX would cut off without x64.
    if not isinstance(labels, (np.ndarray, np.generic, int)):
        labels = as_labels(name, "labels", labels)
    whole = isinstance(labels, int) and not isinstance(labels, bool)  # of any size
    array = np.asarray(labels, object if whole else None)
    if not whole and not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{name}: labels must have an integer dtype; got {array.dtype}")
    wrong = (array < 0) | (array >= num_classes)
    if ignore_index is not None:
        wrong &= array != ignore_index
    if wrong.any():
        first = tuple(int(i) for i in np.argwhere(wrong)[0])
        allowed = "" if ignore_index is None else f" or be {ignore_index}"
        raise ValueError(
            f"{name}: labels must be in [0, {num_classes}){allowed}; got {int(wrong.sum())} that "
            f"are not, the first {array[first]} at index {first}"
        )
