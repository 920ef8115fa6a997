# SPDX-License-Identifier: Apache-2.0
"""JAX's own tests of `softmax`, `log_softmax` and `logsumexp`, as cases in our words.

What `tests/nn_test.py` and `tests/lax_scipy_test.py` of JAX 0.10 ask of its functions, with its
shapes and tolerances.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import scipy.special

import jaxsoftmax

# Each with the mode in which JAX's checks differentiate it.
PACKAGES = {
    "jaxsoftmax": (jaxsoftmax, "rev"),
    "forward_mode": (jaxsoftmax.forward_mode, "fwd"),
}
X = np.array([5.5, 1.3, -4.2, 0.9], np.float32)
MASK = np.array([True, False, True, True])

package = pytest.mark.parametrize("package", PACKAGES)
name = pytest.mark.parametrize("name", ["softmax", "log_softmax"])


@pytest.fixture(autouse=True)
def _as_jax_is():
    """Its tests are written for its own defaults."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def function(package, name):
    return getattr(PACKAGES[package][0], name)


@package
@name
def test_of_no_classes(package, name):
    x = jnp.array([], float)
    np.testing.assert_array_equal(function(package, name)(x), x)


@package
@name
def test_all_classes_masked(package, name):
    found = function(package, name)(X, where=np.zeros(4, bool))
    np.testing.assert_array_equal(found, np.full(4, 0 if name == "softmax" else -np.inf))


@package
@name
def test_masked_classes_do_not_count(package, name):
    f = function(package, name)
    found = f(X, where=MASK)
    np.testing.assert_allclose(found[MASK], f(X[MASK]), rtol=1e-6)
    total = (found if name == "softmax" else jnp.exp(found)).sum()
    np.testing.assert_allclose(total, 1, rtol=1e-6)


@package
@name
@pytest.mark.parametrize("where", [None, MASK], ids=["whole", "masked"])
def test_derivatives_of_two_orders(package, name, where):
    """By finite differences, in float64: where classes may be masked, of those that are not."""
    kept = np.flatnonzero(np.full(4, True) if where is None else where)

    @jax.jit
    def f(x):
        return function(package, name)(x, where=where)[kept]

    with jax.enable_x64(True):
        x = X.astype(np.float64)
        jax.test_util.check_grads(f, (x,), order=2, modes=[PACKAGES[package][1]], atol=5e-3)


@package
@name
def test_a_masked_class_has_no_gradient(package, name):
    x = jnp.array([36.0, 10000.0])
    gradient = jax.grad(lambda x, where: function(package, name)(x, where=where)[0])(x, x < 1000)
    np.testing.assert_array_equal(gradient, np.zeros(2))


@package
@name
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_dtype_is_that_of_the_logits(package, name, dtype):
    assert function(package, name)(jnp.zeros(3, dtype)).dtype == dtype


@package
@name
def test_no_tracer_leaks_from_a_scan(package, name):
    @jax.jit
    def run():
        row = jnp.ones(2)
        return jax.lax.scan(lambda h, _: (function(package, name)(h + row), None), row, length=2)

    with jax.checking_leaks():
        run()


# Shapes of the numbers and of their factors, which broadcast against each other.
GROUPS = [[(), ()], [(4,), (3, 4)], [(3, 1), (1, 4)], [(2, 3, 4), (2, 1, 4)]]
CASES = [
    (shapes, axis, keepdims, return_sign)
    for group in GROUPS
    for shapes in itertools.chain(((shape,) for shape in group), itertools.product(group, group))
    for axis in range(-max(map(len, shapes)), max(map(len, shapes)))
    for keepdims, return_sign in itertools.product([False, True], repeat=2)
]
TOLERANCE = {"float32": 1e-6, "float64": 1e-14, "float16": 1e-3, "bfloat16": 1e-2}


def drawn(rng, shape, dtype):
    """Numbers of a few units, as JAX's tests draw them."""
    return np.asarray(3 * rng.standard_normal(shape)).astype(jnp.dtype(dtype))


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=TOLERANCE["float32"], atol=TOLERANCE["float32"])


@package
@pytest.mark.parametrize("dtype", [*TOLERANCE, "int32"])
def test_logsumexp_is_scipys(package, dtype):
    """Ten of all cases, as many as JAX's test draws by default: another ten of each dtype."""
    rng = np.random.default_rng([*TOLERANCE, "int32"].index(dtype))
    real = "float32" if dtype == "int32" else dtype
    for i in rng.choice(len(CASES), 10, replace=False):
        shapes, axis, keepdims, return_sign = CASES[i]
        arrays = [drawn(rng, shape, dtype) for shape in shapes]
        options = {"axis": axis, "keepdims": keepdims, "return_sign": return_sign}
        a, *b = (array.astype(np.float64) for array in arrays)
        with np.errstate(invalid="ignore", divide="ignore"):
            want: Any = scipy.special.logsumexp(a, b=b[0] if b else None, **options)
        f = jax.jit(functools.partial(function(package, "logsumexp"), **options))
        with jax.enable_x64(dtype == "float64"):
            found = f(arrays[0], b=arrays[1] if b else None)
        if return_sign:
            np.testing.assert_array_equal(found[1], want[1])
            found, want = found[0], want[0]
        assert found.dtype == real
        tolerance = TOLERANCE[real]
        found = np.asarray(found, np.float64)
        np.testing.assert_allclose(found, want, rtol=tolerance, atol=tolerance, err_msg=str(i))


@package
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4)])
def test_logsumexp_of_what_a_mask_leaves(package, shape):
    rng = np.random.default_rng(0)
    a, where = drawn(rng, shape, "float32"), rng.random(shape) < 0.5
    with np.errstate(divide="ignore"):
        want = scipy.special.logsumexp(np.where(where, a.astype(np.float64), -np.inf), axis=-1)
    close(function(package, "logsumexp")(a, axis=-1, where=where), want)


@package
def test_logsumexp_of_a_factor_0_at_the_largest(package):
    f = function(package, "logsumexp")
    a, b = np.array([-1000, -2]), np.array([1, 0])
    np.testing.assert_array_equal(f(a, b=b), -1000)
    np.testing.assert_array_equal(jax.jit(f)(a, b=b), -1000)


@package
def test_logsumexp_of_ones_makes_no_infinity(package):
    with jax.debug_infs(True):
        close(function(package, "logsumexp")(np.ones(4, np.float32)), 1 + np.log(4))


@package
@pytest.mark.parametrize("b", [None, 1.0])
def test_logsumexp_of_a_number_makes_no_nan(package, b):
    with jax.debug_nans(True), jax.disable_jit():
        np.testing.assert_array_equal(function(package, "logsumexp")(1.0, b=b), 1)
