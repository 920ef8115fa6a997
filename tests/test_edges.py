# SPDX-License-Identifier: Apache-2.0
"""Infinities, NaN, labels that are no class, masks, empty inputs, and every kind of input array.

A bad row is NaN and every other row is what it is without it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import generator

import jaxsoftmax as js
from jaxsoftmax import forward_mode

inf, nan = np.inf, np.nan
integer = js.softmax_cross_entropy_with_integer_labels
dense = js.softmax_cross_entropy

# Around the thresholds of the CPU formulation.
SIZES = (3, 40, 2050)
ROWS = 5


def one_hot(labels, classes):
    return np.eye(classes, dtype=np.float32)[labels]


def _integer(z, labels):
    return integer(z, labels)


def _dense(z, labels):
    return dense(z, jnp.asarray(one_hot(labels, z.shape[-1])))


LOSSES = {"integer": _integer, "dense": _dense}
FAMILY = {
    "softmax": js.softmax,
    "log_softmax": js.log_softmax,
    "logsumexp": lambda z: js.logsumexp(z, axis=-1),
}


def both_of(f, z, labels):
    value, pull = jax.vjp(lambda z: f(z, labels), z)
    return value, pull(jnp.ones_like(value))[0]


def both(f, z):
    """(value, gradient of the sum), computed in one program; NumPy."""
    value, gradient = jax.jit(lambda z: both_of(lambda z, _: f(z), z, None))(z)
    return np.asarray(value), np.asarray(gradient)


def logits(classes: int) -> np.ndarray:
    return generator("edges", classes).standard_normal((ROWS, classes)).astype(np.float32)


BAD_ROWS = {
    "NaN first": lambda c: np.r_[nan, np.zeros(c - 1)],
    "NaN last": lambda c: np.r_[np.zeros(c - 1), nan],
    "+inf first": lambda c: np.r_[inf, np.zeros(c - 1)],
    "+inf last": lambda c: np.r_[np.zeros(c - 1), inf],
    "two +inf": lambda c: np.r_[inf, np.zeros(c - 2), inf],
    "+inf and −inf": lambda c: np.r_[inf, np.zeros(c - 2), -inf],
    "NaN and −inf": lambda c: np.r_[nan, np.full(c - 1, -inf)],
    "NaN and +inf": lambda c: np.r_[nan, np.zeros(c - 2), inf],
    "all NaN": lambda c: np.full(c, nan),
    "all +inf": lambda c: np.full(c, inf),
    "all −inf": lambda c: np.full(c, -inf),
}


@pytest.mark.parametrize("classes", SIZES)
@pytest.mark.parametrize("name", LOSSES)
def test_a_bad_row_has_nan_loss_and_nan_gradient_alone(device, name, classes):
    z = logits(classes)
    targets = {"integer": np.asarray, "dense": lambda labels: one_hot(labels, classes)}[name]
    loss = {"integer": integer, "dense": dense}[name]
    f = jax.jit(lambda z, y: both_of(loss, z, y))
    good = np.arange(ROWS) != 2
    failed = []
    for label in {0, 1, classes - 1}:
        y = targets(np.array([0, 1, label, 2, 0]))
        value, gradient = map(np.asarray, f(z, y))
        assert np.isfinite(value).all()
        assert np.isfinite(gradient).all()
        for kind, row in BAD_ROWS.items():
            bad = z.copy()
            bad[2] = row(classes)
            bad_value, bad_gradient = map(np.asarray, f(bad, y))
            what = f"{kind}, label {label}"
            np.testing.assert_array_equal(bad_value[good], value[good], err_msg=what)
            np.testing.assert_array_equal(bad_gradient[good], gradient[good], err_msg=what)
            if not np.isnan(bad_value[2]):
                failed.append(f"{what}: loss {bad_value[2]}")
            if not np.isnan(bad_gradient[2]).all():
                failed.append(f"{what}: gradient {bad_gradient[2][:3]} … {bad_gradient[2][-1]}")
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("classes", SIZES)
@pytest.mark.parametrize("name", FAMILY)
def test_a_bad_row_of_the_softmax_family_is_as_in_jax_nn(device, name, classes):
    z = logits(classes)
    f = jax.jit(FAMILY[name])
    nn = getattr(jax.nn, name)
    expected = jax.jit(lambda z: nn(z, axis=-1))
    good = np.arange(ROWS) != 2
    value = np.asarray(f(z))
    for kind, row in BAD_ROWS.items():
        bad = z.copy()
        bad[2] = row(classes)
        got = np.asarray(f(bad))
        np.testing.assert_array_equal(got[good], value[good], err_msg=kind)
        np.testing.assert_array_equal(got[2], np.asarray(expected(bad))[2], err_msg=kind)


@pytest.mark.parametrize("name", FAMILY)
def test_the_gradient_of_a_bad_row_of_the_softmax_family_stays_in_it(name):
    z = logits(40)
    f = jax.jit(lambda z: both_of(lambda z, _: FAMILY[name](z), z, None))
    _, gradient = f(z)
    good = np.arange(ROWS) != 2
    for kind, row in BAD_ROWS.items():
        bad = z.copy()
        bad[2] = row(40)
        got = np.asarray(f(bad)[1])
        np.testing.assert_array_equal(got[good], np.asarray(gradient)[good], err_msg=kind)
        assert np.isnan(got[2]).any(), kind


# −inf: a class that cannot be


@pytest.mark.parametrize("classes", SIZES)
def test_minus_infinity_is_a_class_with_probability_and_gradient_zero(device, classes):
    z, labels = logits(classes), np.zeros(ROWS, np.int32)
    out = np.zeros(z.shape, bool)
    out[:, 1::2] = True
    masked = np.where(out, -inf, z).astype(np.float32)
    kept = z[:, ::2]
    for f in LOSSES.values():
        value, gradient = both(lambda z, f=f: f(z, labels), masked)
        true, true_gradient = both(lambda z, f=f: f(z, labels), kept)
        np.testing.assert_allclose(value, true, rtol=4e-6)
        assert not gradient[out].any()
        np.testing.assert_allclose(gradient[:, ::2], true_gradient, rtol=4e-6)
    p, gradient = both(js.softmax, masked)
    assert not p[out].any()
    assert not gradient[out].any()
    assert (np.asarray(js.log_softmax(masked))[out] == -inf).all()
    jacobian = np.asarray(js.softmax_jacobian(masked[:, :3]))
    assert not jacobian[:, 1].any()
    assert not jacobian[:, :, 1].any()
    assert np.isfinite(jacobian).all()


def test_a_target_at_minus_infinity_costs_infinity():
    z = np.array([[0, -inf, 1], [0, 2, 1]], np.float32)
    for f in LOSSES.values():
        value, gradient = both(lambda z, f=f: f(z, np.array([1, 1])), z)
        assert value[0] == inf
        assert np.isfinite(value[1])
        # ŷ − y is still what it is.
        p = 1 / (1 + np.e)
        np.testing.assert_allclose(gradient[0], [p, -1, 1 - p], rtol=1e-6)
    # Any positive weight does, and none does not.
    y = np.array([[0.5, 1e-30, 0.5], [0, 0, 1]], np.float32)
    assert dense(z, y)[0] == inf
    y[0, 1] = 0
    assert np.isfinite(dense(z, y)).all()


def test_zero_times_minus_infinity_counts_as_zero_for_dense_labels():
    z = np.array([[2, -inf, 0, -inf]], np.float32)
    y = np.array([[0.25, 0, 0.5, 0]], np.float32)
    value, gradient = both(lambda z: dense(z, y), z)
    lse = np.log(np.exp(2.0) + 1)
    np.testing.assert_allclose(value, [0.25 * (lse - 2) + 0.5 * lse], rtol=1e-6)
    p = np.exp(2 - lse)
    np.testing.assert_allclose(gradient, [[0.75 * p - 0.25, 0, 0.75 * (1 - p) - 0.5, 0]], rtol=1e-6)


def test_a_row_of_minus_infinity():
    z = np.full((1, 4), -inf, np.float32)
    assert np.isnan(integer(z, np.array([0]))).all()
    assert np.isnan(dense(z, one_hot([0], 4))).all()
    np.testing.assert_array_equal(js.logsumexp(z, axis=-1), [-inf])
    out, sign = js.logsumexp(z, axis=-1, return_sign=True)
    assert (out.tolist(), sign.tolist()) == ([-inf], [0])
    assert np.isnan(js.softmax(z)).all()
    assert np.isnan(js.log_softmax(z)).all()


@pytest.mark.parametrize("value", [-3e38, 3e38])
def test_logits_at_the_end_of_float32(value):
    z = np.array([[value, 0, value], [0, value, -value]], np.float32)
    for f in LOSSES.values():
        loss, gradient = both(lambda z, f=f: f(z, np.array([1, 1])), z)
        assert not np.isnan(loss).any()
        assert np.isfinite(gradient).all()
        np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-6)


# Labels that are no class


@pytest.mark.parametrize("classes", [3, 300])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "int64", "uint64"])
def test_a_label_that_is_no_class_is_nan_in_its_row_alone(device, classes, dtype):
    """Whatever its dtype can hold: nothing wraps, also where C is more than the dtype's range."""
    z = logits(classes)
    info = np.iinfo(dtype)
    wrong = [-1, -100, classes, -classes, info.min, info.max, 2**32, 2**32 + 1, -(2**32)]
    wrong = sorted({w for w in wrong if info.min <= w <= info.max and not 0 <= w < classes})
    with jax.enable_x64("64" in dtype):
        f = jax.jit(lambda z, labels: both_of(integer, z, labels))
        labels = (np.arange(ROWS) % min(classes, info.max)).astype(dtype)
        value, gradient = map(np.asarray, f(z, labels))
        assert np.isfinite(value).all()
        good = np.arange(ROWS) != 3
        for label in wrong:
            bad = labels.copy()
            bad[3] = label
            got, got_gradient = map(np.asarray, f(z, bad))
            assert np.isnan(got[3]), label
            assert np.isnan(got_gradient[3]).all(), label
            np.testing.assert_array_equal(got[good], value[good])
            np.testing.assert_array_equal(got_gradient[good], gradient[good])
        for label in {0, 1, 2, min(classes - 1, info.max)}:
            bad = labels.copy()
            bad[3] = label
            expected = integer(z, bad.astype(np.int32))
            np.testing.assert_array_equal(f(z, bad)[0], expected)


def test_int64_labels_outside_int32_without_x64():
    """JAX would cut them to 32 bits, and 2³² to class 0."""
    labels = np.array([0, 1], np.int64)
    value = integer(np.eye(2, dtype=np.float32), labels)
    np.testing.assert_allclose(value, np.log1p(np.exp(-1)), rtol=1e-6)
    for wide in (labels + 2**32, labels - 2**31 - 1, labels.astype(np.uint64) + np.uint64(2**63)):
        for ignore_index in (None, int(wide[0])):
            with pytest.raises(
                ValueError, match=r"labels must fit u?int32, which JAX makes of u?in"
            ):
                integer(np.eye(2, dtype=np.float32), wide, ignore_index=ignore_index)


@pytest.mark.parametrize("label", [-1, -100, 4])
def test_an_unused_loss_has_gradient_zero_whatever_its_label(device, label):
    """A caller who selects away a bad token gets no NaN; a cotangent of exactly 0 is no use."""
    z = logits(4)
    labels = np.array([0, label, 1, 2, 3])
    used = labels == np.clip(labels, 0, 3)

    def f(z):
        return jnp.sum(jnp.where(used, integer(z, labels), 0))

    gradient = np.asarray(jax.grad(f)(z))
    assert not gradient[~used].any()
    expected = jax.grad(lambda z: integer(z, np.clip(labels, 0, 3))[used].sum())(z)
    np.testing.assert_array_equal(gradient, expected)


# Masks


@pytest.mark.parametrize("name", LOSSES)
def test_masked_classes_do_not_count(name):
    z, labels = logits(6), np.zeros(ROWS, np.int32)
    where = np.ones((1, 6), bool)
    where[0, [2, 5]] = False
    y = one_hot(labels, 6)
    y[:, 2] = 7  # dense labels of masked classes do not count either
    targets = labels if name == "integer" else y
    f = integer if name == "integer" else dense
    value, gradient = both(lambda z: f(z, targets, where=where), z)
    for poison in (nan, inf, -inf, 1e30):
        other = np.where(where, z, poison).astype(np.float32)
        value_, gradient_ = both(lambda z: f(z, targets, where=where), other)
        np.testing.assert_array_equal(value_, value)
        np.testing.assert_array_equal(gradient_, gradient)
    assert not gradient[:, ~where[0]].any()
    kept = z[:, where[0]]
    expected, expected_gradient = both(lambda z: LOSSES[name](z, labels), kept)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[:, where[0]], expected_gradient, rtol=2e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_masked_examples_have_loss_and_gradient_zero(name):
    z, labels = logits(6), np.arange(ROWS, dtype=np.int32)
    z[1], z[2, 0], labels[3] = nan, inf, -1 if name == "integer" else 3
    where = np.array([True, False, False, False, True])
    targets = labels if name == "integer" else one_hot(labels, 6)
    f = integer if name == "integer" else dense
    value, gradient = both(lambda z: f(z, targets, where=where), z)
    assert not value[~where].any()
    assert not gradient[~where].any()
    expected, expected_gradient = both(lambda z: LOSSES[name](z, labels[where]), z[where])
    np.testing.assert_allclose(value[where], expected, rtol=1e-6)
    np.testing.assert_allclose(gradient[where], expected_gradient, rtol=1e-6)


def test_everything_masked():
    z = logits(4)
    for f in (
        lambda z: integer(z, np.zeros(ROWS, np.int32), where=np.zeros((ROWS, 4), bool)),
        lambda z: dense(z, np.ones((ROWS, 4), np.float32), where=np.zeros((1, 1), bool)),
    ):
        value, gradient = both(f, z)
        assert not value.any()
        assert not gradient.any()
    value, gradient = both(lambda y: dense(z, y, where=np.zeros(ROWS, bool)), np.ones_like(z))
    assert not value.any()
    assert not gradient.any()
    for name in ("softmax", "log_softmax"):
        f = getattr(js, name)
        _, gradient = both(lambda z, f=f: f(z, where=np.zeros((ROWS, 4), bool)), z)
        assert not gradient.any(), name
    _, gradient = both(lambda z: js.logsumexp(z, axis=-1, where=np.zeros((ROWS, 4), bool)), z)
    assert not gradient.any()


def test_a_label_among_the_masked_classes_costs_infinity():
    where = np.array([[True, True, False]])
    value = integer(logits(3)[:2], np.array([2, 0]), where=where)
    assert value[0] == inf
    assert np.isfinite(value[1])


def test_an_unused_loss_has_no_gradient_by_labels_at_minus_infinity():
    z = np.array([[0, -inf, 1], [2, 0, 1]], np.float32)
    y = np.array([[0, 0, 1], [0.5, 0.5, 0]], np.float32)
    d = jax.grad(lambda y: dense(z, y)[1])(y)
    np.testing.assert_array_equal(d[0], 0)
    used = np.asarray(jax.grad(lambda y: dense(z, y).sum())(y))
    np.testing.assert_array_equal(used[1], d[1])
    assert used[0, 1] == inf


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz"])
def test_masks_of_logits_in_8_bits(name):
    """Some of these dtypes have no −inf."""
    z = jnp.asarray(np.round(logits(5)), name)
    where = np.arange(5) != 2
    f = lambda z, **mask: integer(z, np.zeros(ROWS, int), **mask)  # noqa: E731
    got, d = both(lambda z: f(z, where=where[None]), z)
    want, d_want = both(f, z[:, where])
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(d[:, where], d_want)
    assert d.dtype == z.dtype
    assert not d[:, 2].any()
    p = js.softmax(z, where=where[None])
    assert p.dtype == z.dtype
    np.testing.assert_array_equal(p[:, where], js.softmax(z[:, where]))


# Sizes


@pytest.mark.parametrize("classes", [1, 3, 300, 4096])
@pytest.mark.parametrize("batch", [(0,), (2, 0), (0, 2)], ids=str)
def test_zero_tokens(device, batch, classes):
    z, labels = np.zeros((*batch, classes), np.float32), np.zeros(batch, np.int32)
    for f, shape in (
        (lambda z: integer(z, labels), batch),
        (lambda z: dense(z, z), batch),
        (js.softmax, z.shape),
        (js.log_softmax, z.shape),
        (lambda z: js.logsumexp(z, axis=-1), batch),
    ):
        value, gradient = both(f, z)
        assert value.shape == shape
        assert gradient.shape == z.shape


def test_one_class():
    z = np.array([[3.0], [-1e4], [0]], np.float32)
    for f in LOSSES.values():
        value, gradient = both(lambda z, f=f: f(z, np.zeros(3, int)), z)
        assert not value.any()
        assert not gradient.any()
    assert js.softmax(z).tolist() == [[1.0]] * 3
    assert not np.asarray(js.log_softmax(z)).any()
    np.testing.assert_array_equal(js.logsumexp(z, axis=-1), z[:, 0])
    assert not np.asarray(js.softmax_jacobian(z)).any()


def test_a_single_row_and_no_batch():
    z = np.array([1.0, 2, 3], np.float32)
    assert integer(z, 2).shape == ()
    np.testing.assert_array_equal(integer(z, 2), integer(z[None], np.array([2]))[0])
    assert dense(z, one_hot(2, 3)).shape == ()


@pytest.mark.parametrize("axis", [-1, 0, (0, 1), (1, 2), None], ids=str)
def test_zero_classes_are_as_in_jax_nn_and_optax(axis):
    z = np.zeros((0, 3) if axis == 0 else (2, 0) if axis in (-1, None) else (2, 0, 3), np.float32)
    mask = np.ones(z.shape, bool)
    for module in (js, forward_mode):
        for name in ("softmax", "log_softmax"):
            expected = getattr(jax.nn, name)(z, axis)
            for where in (None, mask):
                f = lambda z, name=name, where=where: getattr(module, name)(z, axis, where)  # noqa: E731, B023
                value, gradient = both(f, z)
                assert value.shape == expected.shape == gradient.shape
                assert value.dtype == expected.dtype
        options: Any = {"label_smoothing": 0.1, "z_loss": 0.1, "soft_cap": 3.0, "temperature": 2.0}
        value, gradient = both(lambda z: module.softmax_cross_entropy(z, z, axis, **options), z)  # noqa: B023
        expected = optax.losses.softmax_cross_entropy(z, z, axis)
        np.testing.assert_array_equal(value, expected)
        assert gradient.shape == z.shape
    if isinstance(axis, int):
        classes_last = np.moveaxis(z, axis, -1).shape
        assert js.softmax_jacobian(z, axis).shape == (*classes_last, 0)


@pytest.mark.parametrize("module", [js, forward_mode])
def test_no_axes_are_one_class(module):
    x = logits(4)
    mask = x > 0
    for name in ("softmax", "log_softmax", "logsumexp"):
        ours, theirs = (getattr(m, name) for m in (module, jax.nn))
        for where in (None, mask):
            value, gradient = both(lambda x: ours(x, axis=(), where=where), x)  # noqa: B023
            expected = both(lambda x: theirs(x, axis=(), where=where), x)  # noqa: B023
            np.testing.assert_array_equal(value, expected[0])
            np.testing.assert_array_equal(gradient, np.nan_to_num(expected[1]))
    y = np.zeros(x.shape, np.int32)
    for f in (
        lambda x: module.softmax_cross_entropy_with_integer_labels(x, y, axis=(), where=mask),
        lambda x: module.softmax_cross_entropy(x, mask, axis=()),
        lambda x: module.label_log_probs(x, y, axis=()).log_probs,
    ):
        value, gradient = both(f, x)
        assert value.shape == x.shape
        assert not value.any()
        assert not gradient.any()


def test_zero_classes_have_no_label():
    with pytest.raises(ValueError, match="at least one class"):
        integer(np.zeros((2, 0), np.float32), np.zeros(2, np.int32))


def test_more_classes_than_int32_counts(device):
    """Shapes and programs; nobody here has the memory for the numbers."""
    z = jax.ShapeDtypeStruct((70_001, 32_003), jnp.bfloat16)
    for f in (
        js.logsumexp,
        lambda z: js.softmax(z, None).astype(jnp.float32).sum(),
        lambda z: js.log_softmax(z, None).astype(jnp.float32).sum(),
        lambda z: js.logsumexp(z, b=z),
        lambda z: js.softmax_cross_entropy(z, z, None),
    ):
        assert jax.eval_shape(jax.grad(f, allow_int=True), z).shape == z.shape
        jax.jit(f).lower(z)
    with pytest.raises(ValueError, match=r"at most 2147483647 classes.*2240242003 along axis"):
        jax.eval_shape(lambda z: integer(z, 0, (0, 1)), z)


# What comes in


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "int32", "uint32", "int64", "uint64"])
def test_labels_of_any_integer_dtype(dtype):
    z = logits(40)
    labels = np.array([0, 39, 5, 1, 17])
    expected = integer(z, labels.astype(np.int32))
    with jax.enable_x64("64" in dtype):
        np.testing.assert_array_equal(integer(z, labels.astype(dtype)), expected)
        np.testing.assert_array_equal(integer(z, jnp.asarray(labels.astype(dtype))), expected)


def test_numpy_and_python_scalars():
    z = np.array([1, 2], np.float32)
    assert integer(z, 0).dtype == jnp.float32
    assert integer(z, np.int8(1)) == integer(z, jnp.asarray(1)) == integer(z, 1)
    # A scalar is a row of no axes for logsumexp, as in jax.nn.
    assert js.logsumexp(2.0) == jax.nn.logsumexp(2.0)
    assert js.logsumexp(np.float32(2)) == 2
    assert js.softmax(np.zeros(2, np.float32), axis=None).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
@pytest.mark.parametrize("dtype", ["int32", "int8", "bool", "uint8"])
def test_integers_count_as_float32(name, dtype):
    x = np.array([[0, 1, 1], [1, 0, 0]], dtype)
    got = getattr(js, name)(x, axis=-1)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, getattr(js, name)(x.astype(np.float32), axis=-1))


def test_weak_types():
    """A weakly typed array alone is float32; next to a half-precision one it changes nothing."""
    weak = jnp.asarray([1.0, 2.0]) * 1.0
    scalars = jnp.stack([jnp.asarray(1.0), jnp.asarray(2.0)])
    assert integer(weak, 0).dtype == integer(scalars, 0).dtype == jnp.float32
    full = jnp.full((3,), 2.0)
    assert dense(full, full / 6).dtype == jnp.float32
    half = jnp.ones(3, jnp.bfloat16)
    for b in (jnp.asarray(2.0), 2.0):  # weak: jax.nn.logsumexp keeps bfloat16
        with jax.numpy_rank_promotion("allow"):
            got = jnp.asarray(js.logsumexp(half, b=b))
            assert got.dtype == jax.nn.logsumexp(half, b=b).dtype == jnp.bfloat16
    for b in (2, np.arange(1, 4), np.ones(3, np.int8), np.ones(3, bool)):
        with jax.numpy_dtype_promotion("standard"):
            got = jnp.asarray(js.logsumexp(half, b=b))
            assert got.dtype == jax.nn.logsumexp(half, b=b).dtype == half.dtype
            assert jnp.asarray(js.logsumexp(np.ones(3, np.int32), b=b)).dtype == jnp.float32
    weak_scalar = jnp.asarray(1.5)
    assert jax.grad(js.logsumexp)(weak_scalar) == 1


def test_numpy_arrays_that_are_not_contiguous():
    base = generator("strides").standard_normal((8, 12)).astype(np.float32)
    view = base[::-2, ::3]
    big_endian_free = base.T[1:6:2]
    labels = np.arange(8)[::2][:4] % 4
    np.testing.assert_array_equal(integer(view, labels), integer(view.copy(), labels.copy()))
    np.testing.assert_array_equal(js.softmax(big_endian_free), js.softmax(big_endian_free.copy()))
    y = np.asfortranarray(np.abs(view))
    np.testing.assert_array_equal(dense(view, y), dense(view.copy(), y.copy()))
    frozen = view.copy()
    frozen.setflags(write=False)
    np.testing.assert_array_equal(js.log_softmax(frozen), js.log_softmax(view))
