# SPDX-License-Identifier: Apache-2.0
"""optax's own tests of these losses, as its wheel ships them, with our functions in optax's place.

Only what a `custom_vjp` cannot do is taken out: `check_grads` checks reverse mode only.
"""

import collections
import functools
import inspect
import types
import unittest

import jax
import jax.test_util
import numpy as np
import pytest
from optax.losses import _classification, _classification_test

import jaxsoftmax

PATCHED = ("softmax_cross_entropy", "softmax_cross_entropy_with_integer_labels")
# The test classes that use the patched functions, and how many tests each must have at least.
SUITE = {
    _classification_test.SoftmaxCrossEntropyTest: 9,
    _classification_test.SafeSoftmaxCrossEntropyTest: 4,
    _classification_test.SoftmaxCrossEntropyWithIntegerLabelsTest: 15,
    _classification_test.PolyLossTest: 25,
}
# Tests of these classes that call neither of the patched functions.
ELSEWHERE = {
    f"SafeSoftmaxCrossEntropyTest.test_{name}" for name in ("scalar", "batched", "gradient")
}


def names(case):
    return unittest.TestLoader().getTestCaseNames(case)


CASES = [pytest.param(c, n, id=f"{c.__name__}.{n}") for c in SUITE for n in names(c)]


@pytest.fixture
def calls(monkeypatch):
    """Ours in optax's place; counts their calls by name."""
    jax.clear_caches()  # a jitted function that calls ours may have been traced with optax's
    counter = collections.Counter()

    def counted(function):
        @functools.wraps(function)
        def call(*args, **kwargs):
            counter[function.__name__] += 1
            return function(*args, **kwargs)

        return call

    for name in PATCHED:
        monkeypatch.setattr(_classification, name, counted(getattr(jaxsoftmax, name)))
    reverse = functools.partial(jax.test_util.check_grads, modes=["rev"])
    only = types.SimpleNamespace(check_grads=reverse)
    monkeypatch.setattr(_classification_test, "jaxtest", only)
    return counter


def draws(case, name):
    """Whether one of optax's tests draws its numbers anew each time."""
    return "np.random" in inspect.getsource(getattr(case, name))


# Now and then a mask without a class is drawn.
DRAWN = [(c, n, seed) for c in SUITE for n in names(c) if draws(c, n) for seed in range(1, 20)]


def run(case, name, seed=0):
    """The outcome of one of optax's tests, in the world they are written for."""
    np.random.seed(seed)
    result = unittest.TestResult()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        case(name).run(result)
    assert result.testsRun == 1
    assert not result.skipped
    return [text for _, text in result.failures + result.errors]


@pytest.mark.parametrize(("case", "name"), CASES)
def test_optax_test_passes_with_ours(case, name, calls):
    assert run(case, name) == []
    assert (calls.total() > 0) == (f"{case.__name__}.{name}" not in ELSEWHERE)


@pytest.mark.wide
@pytest.mark.parametrize(("case", "name", "seed"), DRAWN)
def test_optax_test_passes_with_ours_whatever_it_draws(case, name, seed, calls):
    assert run(case, name, seed) == []
    assert calls.total() > 0


@pytest.mark.parametrize(("case", "name"), CASES)
def test_optax_test_passes_unmodified_with_forward_mode(case, name, monkeypatch):
    """Forward-mode checks included: nothing of optax's file is taken out."""
    jax.clear_caches()
    for patched in PATCHED:
        monkeypatch.setattr(_classification, patched, getattr(jaxsoftmax.forward_mode, patched))
    assert run(case, name) == []


@pytest.mark.parametrize("case", SUITE)
def test_the_suite_is_as_large_as_we_think(case):
    assert len(names(case)) >= SUITE[case]


@pytest.mark.parametrize(
    ("case", "name", "patched"),
    [
        (_classification_test.SoftmaxCrossEntropyTest, "test_batched", PATCHED[0]),
        (_classification_test.SoftmaxCrossEntropyTest, "test_gradient", PATCHED[0]),
        (
            _classification_test.SoftmaxCrossEntropyWithIntegerLabelsTest,
            "test_consistent_with_softmax_cross_entropy_batched",
            PATCHED[1],
        ),
        (
            _classification_test.SoftmaxCrossEntropyWithIntegerLabelsTest,
            "test_gradient",
            PATCHED[1],
        ),
    ],
)
def test_a_wrong_function_fails_it(case, name, patched, calls, monkeypatch):
    """A value that is 1 % off, and a derivative that is, do not pass optax's tests."""
    right = getattr(jaxsoftmax, patched)

    def wrong(*args, **kwargs):
        loss = right(*args, **kwargs)
        if name == "test_gradient":  # the right value with a derivative that is too large
            return loss + (loss - jax.lax.stop_gradient(loss)) * 0.05
        return loss * 1.01

    monkeypatch.setattr(_classification, patched, wrong)
    (failure,) = run(case, name)
    assert "AssertionError" in failure
