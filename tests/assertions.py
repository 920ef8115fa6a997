# SPDX-License-Identifier: Apache-2.0
"""How far a result may be from the truth, and the message that says where it is further."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Wide = np.longdouble


def accumulation(dtype) -> np.dtype:
    """The dtype that sums are taken in."""
    return np.dtype(np.float64 if jnp.dtype(dtype) == np.float64 else np.float32)


def relative_error(got, true) -> np.ndarray:
    """|got − true| / |true|, and 0 where both are 0."""
    got, true = np.asarray(got).astype(Wide), np.asarray(true, Wide)
    error = np.abs(got - true)
    return np.where(error == 0, 0, error / np.where(true == 0, np.finfo(Wide).tiny, np.abs(true)))


def assert_within(got, true, bound, name: str = "") -> None:
    """`got` is a number within `bound` of `true`, rounded to its dtype at most once.

    Infinities and NaN must be where the truth has them. For float32 and float64 `bound` says it
    all. A half-precision result must be what rounding some number within `bound` of the truth
    gives: the correctly rounded truth to within one rounding, wherever that falls.
    """
    got = np.asarray(got)
    true, bound = np.broadcast_arrays(np.asarray(true, Wide), np.asarray(bound, Wide))
    assert got.shape == true.shape, f"{name}: shape {got.shape}, expected {true.shape}"
    finite = np.isfinite(true)
    value = got.astype(Wide)
    np.testing.assert_array_equal(value[~finite], true[~finite], err_msg=name)
    low, high = (np.where(finite, true + s * bound, 0) for s in (-1, 1))
    if got.dtype.itemsize < 4:
        low, high = (v.astype(np.float32).astype(got.dtype).astype(Wide) for v in (low, high))
    wrong = finite & ~((low <= value) & (value <= high))
    if wrong.any():
        excess = np.where(wrong, np.abs(value - true) / np.where(bound > 0, bound, 1), -1)
        at = np.unravel_index(np.argmax(np.where(np.isnan(excess), np.inf, excess)), got.shape)
        raise AssertionError(
            f"{name}: {wrong.sum()} of {wrong.size} outside; worst at {tuple(map(int, at))}: "
            f"got {got[at]!r}, true {true[at]!r} ± {bound[at]!r}, {float(excess[at]):.3g} bounds"
        )


def assert_close(
    got, want, *, rtol=0.0, atol=0.0, of_largest=0.0, floor: Any = 0.0, finite=True, name=""
) -> None:
    """Each leaf is close by its numbers, absolutely, and by its largest number, at least `floor`.

    That may be a function of the leaf's path. Without `finite`, infinities and NaN must be equal.
    """
    for (path, g), w in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(want), strict=True):
        where = name + jax.tree_util.keystr(path)
        kind = np.complex128 if np.iscomplexobj(w) else np.float64
        g, w = (np.asarray(a, kind) for a in (g, w))  # noqa: PLW2901
        assert g.shape == w.shape, where
        number = np.isfinite(w)
        assert not finite or number.all(), where
        least: Any = floor(path) if callable(floor) else floor
        allowed = atol + of_largest * np.abs(w[number]).max(initial=least)
        np.testing.assert_allclose(g, w, rtol=rtol, atol=allowed, err_msg=where)


def assert_dtype(got, dtype) -> None:
    assert got.dtype == jnp.dtype(dtype), f"{got.dtype}, expected {jnp.dtype(dtype)}"
