# SPDX-License-Identifier: Apache-2.0
"""Every function's value and gradient against 80-digit arithmetic, entry by entry."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from assertions import accumulation, assert_dtype, assert_within, relative_error
from cases import (
    CASES,
    FUNCTIONS,
    PROMISED_SIZES,
    ROW_KINDS,
    Case,
    class_rows,
    cotangent_of,
    generator,
    promised,
    rows,
    several,
    targets_of,
    truth_of,
    x64,
)

import jaxsoftmax as js

ULP = 2.0**-23
integer = js.softmax_cross_entropy_with_integer_labels
every_one = pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])


def test_the_two_engines_of_the_oracle_agree():
    # Long double has no exp of the huge ones.
    z = rows(Case(300, "float64")).logits[np.array(ROW_KINDS) != "huge"]
    literal, wide = (oracle.truth(z, np.float64, engine=e) for e in ("literal", "wide"))
    for name in ("p", "complement", "nll", "lse"):
        a, b = getattr(literal, name).value, getattr(wide, name).value
        np.testing.assert_array_equal(np.isinf(a), np.isinf(b))
        a, b = (np.where(np.isinf(v), 0, v) for v in (a, b))
        assert (np.abs(a - b) <= 2.0**-58 * np.abs(a)).all(), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradient(device, case):
    """In the logits, and in the targets where the function has such a derivative.

    Where the function does not change when a row is shifted, a row of the gradient sums to zero.
    A class at −inf, and a row whose cotangent is 0, have gradient exactly 0.
    """
    data, t = rows(case), truth_of(case)
    functions = [function for function in FUNCTIONS if function.of(case)]
    targets = [targets_of(function, data) for function in functions]
    wide = accumulation(case.dtype)
    truths = [f.value(t, y) for f, y in zip(functions, targets, strict=True)]
    dtypes = [wide if function.accumulates else case.dtype for function in functions]
    cotangents = [cotangent_of(v.value.shape, d) for v, d in zip(truths, dtypes, strict=True)]

    @jax.jit  # one program for all of them: compiling is what takes the time
    def results(z, targets, cotangents):
        out = []
        for function, y, g in zip(functions, targets, cotangents, strict=True):
            value, pull = jax.vjp(lambda z, f=function, y=y: f.f(z, y), z)
            dy = None
            if function.label_gradient:
                dy = jax.vjp(lambda y, f=function: f.f(z, y), y)[1](g)[0]
            out.append((value, pull(g)[0], dy))
        return out

    with x64(case.dtype):
        found = results(data.logits, targets, cotangents)
    for function, y, expected, g, dtype, (value, dz, dy) in zip(
        functions, targets, truths, cotangents, dtypes, found, strict=True
    ):
        name, g64 = f"{function}, rows {ROW_KINDS}", g.astype(np.float64)
        assert_dtype(value, dtype)
        assert_within(value, *expected, name=name)
        assert_dtype(dz, case.dtype)
        true, bound = function.gradient(t, y, g64)
        assert_within(dz, true, bound, name)
        unused = np.flatnonzero((g64 == 0).reshape(len(g), -1).all(-1))
        assert len(unused) == 1
        assert not np.asarray(dz)[unused].any()
        if function.invariant and case.dtype in ("float32", "float64"):
            assert (np.abs(np.asarray(dz, np.longdouble).sum(-1)) <= bound.sum(-1)).all(), name
        if function.label_gradient and y is not None:
            assert_dtype(dy, y.dtype)
            true, bound = function.label_gradient(t, y, g64)
            # A class at −inf costs infinitely much, and 0 · ∞ is no number.
            used = np.isfinite(data.logits) & (g64 != 0)[:, None]
            info = np.finfo(accumulation(y.dtype))
            rounding = info.eps / 2 * np.abs(np.where(used, true, 0)) + info.tiny * (
                info.tiny > t.tiny
            )
            assert_within(np.where(used, dy, 0), np.where(used, true, 0), bound + rounding, name)


def pullback(f, x, g):
    """The gradient of `f` at `x` for the cotangent `g`, in one compiled program."""
    return jax.jit(lambda x, g: jax.vjp(f, x)[1](g)[0])(x, g)


@pytest.mark.parametrize("classes", PROMISED_SIZES)
def test_the_promise(device, classes):
    """Every loss and every entry of a gradient within (8 + gap/2) ulps of itself.

    At gaps of 0 to 80 nats, V from 2 to 1000.
    """
    z, labels, gap = promised(classes)
    at, ones = np.arange(len(z)), np.ones(len(z), np.float32)
    t = oracle.truth(z, np.float32)
    true, allowed = t.nll.value[at, labels], (8 + gap / 2) * ULP
    true_gradient, _ = oracle.nll_gradient(t, labels, ones)
    y = np.eye(classes, dtype=np.float32)[labels]
    functions = {
        "integer": lambda z: integer(z, labels),
        "dense": lambda z: js.softmax_cross_entropy(z, y),
        "log_softmax": lambda z: -js.log_softmax(z)[at, labels],
        # The same label twice, and one that is not used.
        "several labels": lambda z: (
            -jnp.mean(js.label_log_probs(z, several(labels, classes)).log_probs[:, ::2], axis=-1)
        ),
    }

    @jax.jit
    def results(z):
        return [(f(z), pullback(f, z, ones)) for f in functions.values()]

    for name, (value, gradient) in zip(functions, results(z), strict=True):
        assert (relative_error(value, true) <= allowed[at, labels]).all(), name
        assert (relative_error(gradient, true_gradient) <= allowed).all(), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_logits_lose_nothing_but_the_last_rounding(dtype):
    z = rows(Case(300, dtype)).logits
    for function in (js.softmax, js.log_softmax):
        wide = np.asarray(function(z.astype(np.float32)))
        np.testing.assert_array_equal(function(z), wide.astype(z.dtype))


def test_float16_logsumexp_of_70000_zeros_has_finite_gradients():
    zeros = jnp.zeros(70_000, jnp.float16)
    for f in (js.logsumexp, lambda x: js.logsumexp(x, b=jnp.ones_like(x))):
        np.testing.assert_array_equal(jax.grad(f)(zeros), np.float16(1 / 70_000))


# Axes and masks


@pytest.mark.parametrize("axis", [0, -1, (0, 2), (2, 0), None], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@every_one
def test_axis_and_where_as_in_jax_nn(name, axis, masked):
    rng = generator("axis", axis, masked)
    x = rng.standard_normal((3, 4, 5)).astype(np.float32)
    where = rng.random((3, 4, 5)) < 0.6 if masked else None
    if where is not None:
        where[..., 0] = True  # rows with nothing selected have their own test
        where[:, 1] = True
    got = getattr(js, name)(x, axis=axis, where=where)
    # The same, moved to rows for the oracle; and jax.nn for the meaning of the arguments.
    expected = np.asarray(getattr(jax.nn, name)(x, axis=axis, where=where))
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)
    z = x if where is None else np.where(where, x, -np.inf)
    t = oracle.truth(class_rows(z, axis), np.float32)
    truths = {"softmax": t.p, "log_softmax": oracle.log_probabilities(t), "logsumexp": t.lse}
    got = np.ravel(got) if name == "logsumexp" else class_rows(np.asarray(got), axis)
    assert_within(got, *truths[name])


@every_one
@pytest.mark.parametrize(
    "shape", [(), (1,), (4, 1, 5), (1, 1, 1), (5,)], ids=lambda shape: f"where {shape}"
)
def test_a_mask_broadcasts_as_in_jax_nn(name, shape):
    rng = generator("broadcast mask", shape)
    x = rng.standard_normal((4, 3, 5)).astype(np.float32)
    where = rng.random(shape) < 0.6
    with jax.numpy_rank_promotion("allow"):
        got = getattr(js, name)(x, axis=-1, where=where)
        # jax.nn.logsumexp of 0.10 wants the full shape.
        full = np.broadcast_to(where, x.shape)
        expected = getattr(jax.nn, name)(x, axis=-1, where=full)
    np.testing.assert_allclose(got, expected, rtol=2e-6, atol=2e-6)


@every_one
@pytest.mark.parametrize("axis", [0, (2, 0), None], ids=str)
def test_masked_classes_have_gradient_zero_and_the_others_their_own(name, axis):
    rng = generator("masked gradient", name, axis)
    x = rng.standard_normal((3, 4, 5)).astype(np.float32)
    where = rng.random(x.shape) < 0.6
    where[0] = True
    f = getattr(js, name)
    masked = np.where(where, x, -np.inf).astype(np.float32)
    g = rng.standard_normal(jax.eval_shape(lambda x: f(x, axis=axis), x).shape).astype(np.float32)
    if name == "log_softmax":
        g *= where  # the others are constants
    got = pullback(lambda x: f(x, axis=axis, where=where), x, g)
    assert not np.asarray(got)[~where].any()
    expected = pullback(lambda x: f(x, axis=axis), masked, g if name == "logsumexp" else g * where)
    np.testing.assert_allclose(np.asarray(got)[where], np.asarray(expected)[where], rtol=1e-6)


@every_one
def test_nothing_selected_as_in_jax_nn(name):
    x, where = np.ones((2, 3), np.float32), np.array([[False] * 3, [True, False, True]])
    expected = {
        "softmax": [[0, 0, 0], [0.5, 0, 0.5]],
        "log_softmax": [[-np.inf] * 3, [-np.log(2), -np.inf, -np.log(2)]],
        "logsumexp": [-np.inf, 1 + np.log(2)],
    }[name]
    got = getattr(js, name)(x, axis=-1, where=where)
    np.testing.assert_allclose(got, np.asarray(expected, np.float32), rtol=1e-6)


@pytest.mark.parametrize("axis", [0, 1, -2, (0, 2), (2, 0), (-1, 1)], ids=str)
@pytest.mark.parametrize("where", [None, "classes", "broadcast", "examples"])
def test_losses_and_gradients_over_any_axis(axis, where):
    """A tuple counts classes flat, in the given order; `where` has both of optax's meanings.

    What is left out may hold anything, and have any label.
    """
    rng = generator("losses", axis, where)
    shape = (3, 4, 5)
    z = rng.standard_normal(shape).astype(np.float32)
    y = rng.random(shape).astype(np.float32)
    batch = z.sum(axis).shape
    mask = {
        None: None,
        "classes": rng.random(shape) < 0.7,
        "broadcast": (rng.random(shape) < 0.7).any(axis=_others(axis), keepdims=True),
        "examples": rng.random(batch) < 0.5,
    }[where]
    full = np.ones(shape, bool) if mask is None else mask
    if where == "examples":
        full = np.expand_dims(full, axis)
    full = np.broadcast_to(full, shape)
    included = class_rows(full, axis)
    some = np.any(included, axis=-1)
    zr = np.where(included, class_rows(z, axis), -np.inf)
    zr[~some] = 0
    t = oracle.truth(zr, np.float32)
    labels = rng.integers(zr.shape[-1], size=batch).astype(np.int32)
    z[~full] = np.resize(np.array([np.nan, np.inf, -np.inf, 1e30], np.float32), (~full).sum())
    given = np.where(some.reshape(batch), labels, -1)
    g = rng.standard_normal(batch).astype(np.float32)
    flat, g_rows, y_rows = labels.ravel(), g.ravel(), class_rows(np.where(full, y, 0), axis)
    for f, targets, value, gradient in (
        (integer, given, oracle.nll(t, flat), oracle.nll_gradient(t, flat, g_rows)),
        (
            js.softmax_cross_entropy,
            y,
            oracle.cross_entropy(t, y_rows),
            oracle.cross_entropy_gradient(t, y_rows, g_rows),
        ),
    ):
        got, pull = jax.vjp(lambda z: f(z, targets, axis, mask), z)  # noqa: B023
        d = np.asarray(pull(g)[0])
        assert got.shape == batch
        true, bound = value
        assert_within(np.asarray(got).ravel(), np.where(some, true, 0), bound, f.__name__)
        assert not d[~full].any()
        true, bound = gradient
        used = some[:, None] & included
        assert_within(class_rows(d, axis), np.where(used, true, 0), bound, f.__name__)


def _others(axis):
    return tuple(set(range(3)) - {int(a) % 3 for a in np.atleast_1d(axis)})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axis", [None, 0, (2, 0)], ids=str)
def test_log_probs_over_any_axis_the_last_by_default(device, axis, dtype):
    z = generator("log-probs", axis).standard_normal((3, 4, 5)).astype(jnp.dtype(dtype))
    given: Any = {} if axis is None else {"axis": axis}
    rows = class_rows(z, **given)
    labels = np.arange(len(rows), dtype=np.int32) % rows.shape[-1]
    batch = z.sum(**({"axis": -1} | given)).shape
    got = js.label_log_probs(z, labels.reshape(batch), **given)
    t = oracle.truth(rows, np.float32)
    true, bound = oracle.nll(t, labels)
    for field, want, error in ((got.log_probs, -true, bound), (got.log_normalizers, *t.lse)):
        assert field.shape == batch
        assert_within(np.asarray(field).ravel(), want, error)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_program_is_no_longer_for_more_classes(device, dtype):
    """Few rows of many classes: what goes class by class is for few classes."""

    def lines(classes):
        z, y = jax.ShapeDtypeStruct((4, classes), dtype), jax.ShapeDtypeStruct((4,), np.int32)
        loss = jax.value_and_grad(lambda z, y: jnp.sum(js.label_log_probs(z, y).log_probs))
        return jax.jit(loss).lower(z, y).as_text().count("\n")

    assert lines(500) == lines(300)
    assert lines(2000) == lines(1000)


def test_dense_labels_over_all_axes_and_broadcast_labels():
    z = generator("all axes").standard_normal((3, 4)).astype(np.float32)
    y = generator("all labels").random((1, 4)).astype(np.float32)
    t = oracle.truth(z.reshape(1, -1), np.float32)
    true, bound = oracle.cross_entropy(t, np.broadcast_to(y, z.shape).reshape(1, -1))
    assert_within(js.softmax_cross_entropy(z, y, axis=None), true[0], bound[0])
    t = oracle.truth(z, np.float32)
    true, bound = oracle.cross_entropy(t, np.broadcast_to(y, z.shape))
    assert_within(js.softmax_cross_entropy(z, y), true, bound)


@pytest.mark.parametrize("dtype", [bool, np.int8, np.int32, np.float16, jnp.bfloat16])
def test_dense_labels_of_any_dtype(dtype):
    z = generator("label dtypes").standard_normal((3, 4)).astype(np.float32)
    true, bound = oracle.nll(oracle.truth(z, np.float32), np.arange(3))
    assert_within(js.softmax_cross_entropy(z, np.eye(4, dtype=dtype)[:3]), true, bound)


# The Jacobian of softmax


CONFIDENT = np.array([[30, 0, 0, 1], [0, 80, -1, 2], [-5, 0, 0, 9], [1e4, 1e4 - 20, 0, 0]])


@pytest.mark.parametrize(
    "z",
    [CONFIDENT, np.array([[1.0, 2, 3, 4], [0, 0, 0, 0], [5, 5, -5, -np.inf]]), np.ones((2, 1))],
    ids=["confident", "spread", "one class"],
)
def test_jacobian(device, z):
    """Relative to each entry: ŷ_i ŷ_j is a product, and the diagonal keeps 1 − ŷ_i."""
    z = z.astype(np.float32)
    true, bound = oracle.jacobian(oracle.truth(z, np.float32))
    assert_within(js.softmax_jacobian(z), true, bound)
    # A row of the Jacobian by the vjp: a cotangent that is 1 in one place never cancels.
    rows_of = jax.jit(jax.vmap(jax.jacrev(js.softmax)))(z)
    error = np.abs(np.asarray(rows_of, np.longdouble) - true)
    gap = np.where(np.isfinite(z), z.max(-1, keepdims=True) - z, 0)
    factor = 40 + gap[:, :, None] + 2 * gap[:, None, :]
    assert (error <= factor * 2.0**-24 * np.abs(true) + 1.2e-38).all()


def test_jacobian_along_any_axis():
    z = generator("jacobian").standard_normal((2, 3, 4)).astype(np.float32)
    for axis in (0, 1, 2, -2):
        expected = js.softmax_jacobian(np.moveaxis(z, axis, -1))
        np.testing.assert_array_equal(js.softmax_jacobian(z, axis=axis), expected)


# logsumexp's own arguments


def weights(kind: str, shape) -> np.ndarray:
    rng = generator("weights", kind)
    b = rng.standard_normal(shape).astype(np.float32)
    return {
        "signed": b,
        "positive": np.abs(b) + 0.1,
        "negative": -np.abs(b) - 0.1,
        "some zero": np.where(rng.random(shape) < 0.5, 0, b),
        "tiny": np.full(shape, 1e-10, np.float32),
        "huge": np.full(shape, -1e10, np.float32),
        "near one": np.where(np.arange(shape[-1]) == 0, np.float32(1), np.float32(1e-12)) + 0 * b,
    }[kind].astype(np.float32)


WEIGHTS = ("signed", "positive", "negative", "some zero", "tiny", "huge", "near one")


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("scale", [0, 1, 30])
def test_weighted_logsumexp(kind, scale):
    """The error is that of the sum's terms over |S|, plus a rounding of the result's parts."""
    rng = generator("weighted", kind, scale)
    a = np.sort(scale * rng.standard_normal((5, 9)).astype(np.float32))[:, ::-1]
    b = weights(kind, a.shape)
    out, sign = js.logsumexp(a, axis=-1, b=b, return_sign=True)
    nan_if_negative = np.asarray(js.logsumexp(a, axis=-1, b=b))
    u = 2.0**-24
    for row in range(len(a)):
        true, true_sign, _, _, condition = oracle.weighted_logsumexp(a[row], b[row])
        m = float(a[row][b[row] != 0].max())
        mean = float(np.ptp(a[row]))
        # S has the relative error (16 + γ) u times its condition number; m + log|S| is rounded.
        log_s = abs(true - m)
        bound = u * ((16 + mean) * condition + 4 * log_s + abs(true))
        assert_within(out[row], true, bound, f"{kind} {row}")
        assert sign[row] == true_sign
        assert np.isnan(nan_if_negative[row]) == (true_sign < 0)
        if true_sign > 0:
            assert nan_if_negative[row] == out[row]


def test_weights_near_one_keep_the_remainder():
    """log(1 + 1e-12) is 1e-12, not 0; a weight of 0 in front of them changes nothing."""
    a, b = np.array([5, 0, 0], np.float32), np.array([0, 1, 1e-12], np.float32)
    true, *_ = oracle.weighted_logsumexp(a, b)
    assert relative_error(js.logsumexp(a, b=b), true) <= 4 * ULP
    true, *_ = oracle.weighted_logsumexp(a, -b)
    out, sign = js.logsumexp(a, b=-b, return_sign=True)
    assert relative_error(out, true) <= 4 * ULP
    assert sign == -1


def test_weights_of_both_signs_in_float64():
    """log(1 − c) within two roundings: XLA's log1p in JAX 0.10 is wrong by 2e-14 there."""
    c = np.linspace(0.01, 0.49, 97)
    b = np.stack([np.ones_like(c), -c], -1)
    with jax.enable_x64(True):
        out = np.asarray(js.logsumexp(np.zeros_like(b), axis=-1, b=b))
    true = np.log1p(-c.astype(np.longdouble))
    assert np.max(np.abs(out - true) / np.abs(true)) <= 2.0**-51


@pytest.mark.parametrize("signs", ["positive", "negative", "mixed", "some zero"])
def test_weighted_logsumexp_gradients(signs):
    rng = generator("weighted gradients", signs)
    a = rng.standard_normal((4, 7)).astype(np.float32)
    b = np.abs(rng.standard_normal((4, 7))).astype(np.float32) + np.float32(0.1)
    b *= {"positive": 1, "negative": -1}.get(signs, np.where(rng.random(b.shape) < 0.3, -1, 1))
    if signs == "some zero":
        b[:, ::3] = 0
    b = b.astype(np.float32)
    g = rng.standard_normal(4).astype(np.float32)

    def f(a, b):
        return js.logsumexp(a, axis=-1, b=b, return_sign=True)[0]

    da, db = jax.jit(lambda a, b, g: jax.vjp(f, a, b)[1](g))(a, b, g)
    for i in range(4):
        _, _, true_a, true_b, condition = oracle.weighted_logsumexp(a[i], b[i])
        relative = 2.0**-24 * ((16 + np.ptp(a[i])) * (1 + condition))
        assert_within(da[i], g[i] * true_a, relative * np.abs(g[i] * true_a), "a")
        assert_within(db[i], g[i] * true_b, relative * np.abs(g[i] * true_b), "b")
    assert not np.asarray(da)[b == 0].any()


@pytest.mark.parametrize("axis", [0, -1, (1, 0), None], ids=str)
@pytest.mark.parametrize("keepdims", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_logsumexp_arguments_as_in_jax_nn(axis, keepdims, weighted, masked):
    rng = generator("arguments")
    a = rng.standard_normal((3, 4)).astype(np.float32)
    options = {
        "axis": axis,
        "keepdims": keepdims,
        "return_sign": True,
        "b": weights("some zero", (3, 4)) if weighted else None,
        "where": rng.random((3, 4)) < 0.8 if masked else None,
    }
    got, expected = js.logsumexp(a, **options), jax.nn.logsumexp(a, **options)
    assert isinstance(got, tuple)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("row", [[-np.inf] * 2, [np.inf, 1], [np.inf, -np.inf], [np.nan, 1]])
@pytest.mark.parametrize("b", [None, [1, 1], [-1, 1], [0, 1], [0, 0]], ids=str)
def test_logsumexp_of_what_is_not_finite_as_in_jax_nn(row, b):
    a = np.array([row], np.float32)
    b = None if b is None else np.array([b], np.float32)
    got = js.logsumexp(a, axis=-1, b=b, return_sign=True)
    expected = jax.nn.logsumexp(a, axis=-1, b=b, return_sign=True)
    np.testing.assert_array_equal(got, expected)
    np.testing.assert_array_equal(js.logsumexp(a, axis=-1, b=b), jax.nn.logsumexp(a, axis=-1, b=b))


def test_logsumexp_of_nothing_and_of_float16_zeros():
    for shape in ((3, 0), (0, 3)):
        out = js.logsumexp(np.zeros(shape, np.float32), axis=-1)
        np.testing.assert_array_equal(out, np.full(shape[:1], -np.inf))
    out = js.logsumexp(np.zeros(70_000, np.float16))
    assert_dtype(out, np.float16)
    assert out == np.float16(np.log(70_000))
