# SPDX-License-Identifier: Apache-2.0
"""Each wrong argument of each public function, and the whole text of its error."""

import functools

import jax
import numpy as np
import pytest

import jaxsoftmax

X = np.zeros((8, 16), np.float32)
LABELS = np.zeros(8, np.int32)
MASK = np.ones((8, 16), bool)
WIDE = np.ones((2, 8, 16), np.float32)
EMPTY = np.zeros((8, 0), np.float32)

softmax, log_softmax = jaxsoftmax.softmax, jaxsoftmax.log_softmax
logsumexp, softmax_jacobian = jaxsoftmax.logsumexp, jaxsoftmax.softmax_jacobian
softmax_cross_entropy = jaxsoftmax.softmax_cross_entropy
integer_labels = jaxsoftmax.softmax_cross_entropy_with_integer_labels

AXIS = "axis must be an integer, a tuple of integers or None"
RANGE = "axis must be in [-2, 2) for an array with 2 axes"
REAL = "must have a real dtype; got complex64"
FLOATING = "logits must have a real floating-point dtype"
SCALAR = "must be an array or a scalar"
PER_EXAMPLE = "where must have shape (8,), one value per example, or have the 2 axes of logits"
INTEGER = "softmax_cross_entropy_with_integer_labels"


def wrong_for_all(function, name, *rest):
    """What every function refuses of its first array, called `name`, and of the axis."""

    def call(value, **options):
        return functools.partial(function, value, *rest, **options)

    own = function.__name__
    yield call([1.0, 2.0]), TypeError, f"{own}: {name} {SCALAR}; got list [1.0, 2.0]"
    yield call((1.0, 2.0)), TypeError, f"{own}: {name} {SCALAR}; got tuple (1.0, 2.0)"
    yield call(None), TypeError, f"{own}: {name} {SCALAR}; got NoneType None"
    yield call("text"), TypeError, f"{own}: {name} {SCALAR}; got str 'text'"
    yield call(X, axis=2), ValueError, f"{own}: {RANGE}; got 2"
    yield call(X, axis=-3), ValueError, f"{own}: {RANGE}; got -3"


def wrong_for_masked(function, name, *rest):
    """What every function with a mask and several axes refuses of them."""
    call = functools.partial(functools.partial, function, X, *rest)
    own = function.__name__
    yield call(axis=1.5), TypeError, f"{own}: {AXIS}; got float 1.5"
    yield call(axis="a"), TypeError, f"{own}: {AXIS}; got str 'a'"
    yield call(axis=True), TypeError, f"{own}: {AXIS}; got bool True"
    yield call(axis=(0, 5)), ValueError, f"{own}: {RANGE}; got 5"
    yield call(axis=(0, -2)), ValueError, f"{own}: axis must name distinct axes; got (0, -2)"
    yield call(where=X), TypeError, f"{own}: where must have dtype bool; got float32"
    yield call(where=[True]), TypeError, f"{own}: where {SCALAR}; got list [True]"
    broadcast = f"where must broadcast to (8, 16), the shape of {name}; got (3, 16)"
    yield call(where=MASK[:3]), ValueError, f"{own}: {broadcast}"


def wrong_for_family(function, name):
    own = function.__name__
    yield functools.partial(function, X.astype(np.complex64)), TypeError, f"{own}: {name} {REAL}"
    yield (
        functools.partial(function, X, where=WIDE > 0),
        ValueError,
        f"{own}: where must broadcast to (8, 16), the shape of {name}; got (2, 8, 16)",
    )


def wrong_for_losses(function, labels):
    call = functools.partial(functools.partial, function)
    own = function.__name__
    yield call(LABELS[None], labels), TypeError, f"{own}: {FLOATING}; got int32"
    yield call(X > 0, labels), TypeError, f"{own}: {FLOATING}; got bool"
    yield call(X.astype(np.complex64), labels), TypeError, f"{own}: {FLOATING}; got complex64"
    yield call(X, [1]), TypeError, f"{own}: labels {SCALAR}; got list [1]"
    yield call(X, None), TypeError, f"{own}: labels {SCALAR}; got NoneType None"
    yield call(X, labels, where=MASK[:3, 0]), ValueError, f"{own}: {PER_EXAMPLE}; got (3,)"
    yield call(X, labels, where=WIDE > 0), ValueError, f"{own}: {PER_EXAMPLE}; got (2, 8, 16)"
    yield (
        call(EMPTY, EMPTY if labels is X else labels),
        ValueError,
        f"{own}: logits must have at least one class along axis 1; got shape (8, 0)",
    )


def _cases():
    yield from wrong_for_all(softmax, "x")
    yield from wrong_for_all(log_softmax, "x")
    yield from wrong_for_all(logsumexp, "a")
    yield from wrong_for_all(softmax_jacobian, "x")
    yield from wrong_for_all(softmax_cross_entropy, "logits", X)
    yield from wrong_for_all(integer_labels, "logits", LABELS)
    yield from wrong_for_masked(softmax, "x")
    yield from wrong_for_masked(log_softmax, "x")
    yield from wrong_for_masked(logsumexp, "a")
    yield from wrong_for_masked(softmax_cross_entropy, "logits", X)
    yield from wrong_for_family(softmax, "x")
    yield from wrong_for_family(log_softmax, "x")
    yield from wrong_for_family(logsumexp, "a")
    yield from wrong_for_losses(softmax_cross_entropy, X)
    yield from wrong_for_losses(integer_labels, LABELS)

    for f in (softmax, log_softmax):
        expected = f"{f.__name__}: x must have at least one class along axis 1; got shape (8, 0)"
        yield functools.partial(f, EMPTY), ValueError, expected
        expected = f"{f.__name__}: axis must be in [0, 0) for an array with 0 axes; got -1"
        yield functools.partial(f, np.float32(1)), ValueError, expected


def wrong_for_one():
    """What only one function has to refuse."""
    call = functools.partial(functools.partial, logsumexp, X)
    yield call(b=[1.0]), TypeError, f"logsumexp: b {SCALAR}; got list [1.0]"
    yield call(b=X.astype(np.complex64)), TypeError, f"logsumexp: b {REAL}"
    expected = "b must have a shape that broadcasts with (8, 16), the shape of a; got (3, 16)"
    yield call(b=X[:3]), ValueError, f"logsumexp: {expected}"

    call = functools.partial(functools.partial, softmax_jacobian)
    yield call(X.astype(np.complex64)), TypeError, f"softmax_jacobian: x {REAL}"
    for axis in (None, (0, 1), 1.5, "a"):
        expected = f"softmax_jacobian: axis must be an integer; got {axis!r}"
        yield call(X, axis=axis), TypeError, expected
    expected = "softmax_jacobian: x must have at least one class along axis 1; got shape (8, 0)"
    yield call(EMPTY), ValueError, expected

    call = functools.partial(functools.partial, softmax_cross_entropy, X)
    expected = "softmax_cross_entropy: labels must broadcast to (8, 16), the shape of logits"
    yield call(X[:3]), ValueError, f"{expected}; got (3, 16)"
    yield call(WIDE), ValueError, f"{expected}; got (2, 8, 16)"
    yield call(X.astype(np.complex64)), TypeError, f"softmax_cross_entropy: labels {REAL}"

    call = functools.partial(functools.partial, integer_labels, X)
    expected = f"{INTEGER}: labels must have an integer dtype"
    yield call(LABELS.astype(np.float32)), TypeError, f"{expected}; got float32"
    yield call(LABELS > 0), TypeError, f"{expected}; got bool"
    expected = f"{INTEGER}: labels must have shape (8,), the shape of logits without axis -1"
    yield call(LABELS[:, None]), ValueError, f"{expected}; got (8, 1)"
    yield call(LABELS[:3]), ValueError, f"{expected}; got (3,)"
    expected = f"{INTEGER}: labels must have shape (16,), the shape of logits without axis 0"
    yield call(LABELS, axis=0), ValueError, f"{expected}; got (8,)"
    expected = f"{INTEGER}: labels must have shape (), the shape of logits without axis (0, 1)"
    yield call(LABELS, axis=(0, 1)), ValueError, f"{expected}; got (8,)"
    expected = f"{INTEGER}: axis must be an integer or a tuple of integers; got None"
    yield call(LABELS, axis=None), TypeError, expected
    expected = f"{INTEGER}: axis must name distinct axes; got (1, 1)"
    yield call(LABELS, axis=(1, 1)), ValueError, expected
    expected = f"{INTEGER}: where must have dtype bool; got float32"
    yield call(LABELS, where=X), TypeError, expected
    expected = f"{INTEGER}: where must broadcast to (8, 16), the shape of logits; got (3, 16)"
    yield call(LABELS, where=MASK[:3]), ValueError, expected
    cube = functools.partial(integer_labels, np.zeros((8, 16, 32), np.float32))
    expected = f"{INTEGER}: labels must have shape (8, 16), the shape of logits without axis -1"
    yield functools.partial(cube, LABELS[:, None]), ValueError, f"{expected}; got (8, 1)"


@pytest.mark.parametrize(("call", "error", "message"), [*_cases(), *wrong_for_one()])
def test_the_whole_message(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value) == message


@pytest.mark.parametrize("transform", [jax.jit, jax.grad, jax.vmap, jax.checkpoint])
def test_the_same_inside_a_transform(transform):
    with pytest.raises(ValueError, match=r"^softmax_cross_entropy: labels must broadcast to "):
        transform(lambda x: softmax_cross_entropy(x, np.zeros((3, 5), np.float32)))(X)


def test_a_long_argument_is_cut():
    with pytest.raises(TypeError) as caught:
        softmax(list(range(1000)))  # pyright: ignore[reportArgumentType]
    assert str(caught.value).endswith("...")
    assert len(str(caught.value)) < 130


@pytest.mark.parametrize("function", [softmax, log_softmax])
def test_no_rows_are_no_error(function):
    assert function(EMPTY.T).shape == (0, 8)
