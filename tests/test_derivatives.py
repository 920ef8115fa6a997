# SPDX-License-Identifier: Apache-2.0
"""Every function's gradient against 80-digit arithmetic, entry by entry."""

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
    cotangent_of,
    generator,
    promised,
    rows,
    targets_of,
    truth_of,
    x64,
)

import jaxsoftmax as js

ULP = 2.0**-23


def pullback(f, x, g):
    """The gradient of `f` at `x` for the cotangent `g`, in one compiled program."""
    return jax.jit(lambda x, g: jax.vjp(f, x)[1](g)[0])(x, g)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_gradient(device, case):
    """In the logits, and in the targets where the function has such a derivative.

    Where the function does not change when a row is shifted, a row of the gradient sums to zero.
    """
    data, t = rows(case), truth_of(case)
    targets = [targets_of(function, data) for function in FUNCTIONS]
    wide = accumulation(case.dtype)
    cotangents = [cotangent_of(f, data, wide if f.accumulates else case.dtype) for f in FUNCTIONS]

    @jax.jit  # one program for all of them: compiling is what takes the time
    def gradients(z, targets, cotangents):
        results = []
        for function, y, g in zip(FUNCTIONS, targets, cotangents, strict=True):
            dz = jax.vjp(lambda z, f=function, y=y: f.call(z, y), z)[1](g)[0]
            dy = None
            if function.label_gradient:
                dy = jax.vjp(lambda y, f=function: f.call(z, y), y)[1](g)[0]
            results.append((dz, dy))
        return results

    with x64(case.dtype):
        results = gradients(data.logits, targets, cotangents)
    for function, y, g, (dz, dy) in zip(FUNCTIONS, targets, cotangents, results, strict=True):
        name = f"{function}, rows {ROW_KINDS}"
        g64 = g.astype(np.float64)
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
            rounding = np.finfo(y.dtype).eps / 2 * np.abs(np.where(used, true, 0))
            assert_within(np.where(used, dy, 0), np.where(used, true, 0), bound + rounding, name)


@pytest.mark.parametrize("classes", PROMISED_SIZES)
def test_the_promise_for_gradients(device, classes):
    """Every entry within (8 + gap/2) ulps of itself, gaps of 0 to 80 nats, V from 2 to 1000."""
    z, labels, gap = promised(classes)
    y = np.eye(classes, dtype=np.float32)[labels]
    ones = np.ones(len(z), np.float32)
    true, _ = oracle.nll_gradient(oracle.truth(z, np.float32), labels, ones)
    allowed = (8 + gap / 2) * ULP
    integer = js.softmax_cross_entropy_with_integer_labels

    @jax.jit
    def gradients(z, y):
        return {
            "integer": pullback(lambda z: integer(z, labels), z, ones),
            "dense": pullback(lambda z: js.softmax_cross_entropy(z, y), z, ones),
            "log_softmax": pullback(js.log_softmax, z, -y),
        }

    for name, got in gradients(z, y).items():
        assert (relative_error(got, true) <= allowed).all(), name


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("classes", [2, 300])
def test_half_precision_gradients_are_the_rounded_truth(device, classes, dtype):
    """Within one rounding: one of the two neighbours of the truth, at every gap."""
    z, labels, _ = promised(classes)
    z = z.astype(jnp.dtype(dtype))
    ones = np.ones(len(z), np.float32)
    true, _ = oracle.nll_gradient(oracle.truth(z, np.float32), labels, ones)
    y = np.eye(classes, dtype=z.dtype)[labels]
    integer = js.softmax_cross_entropy_with_integer_labels

    @jax.jit
    def gradients(z, y):
        return (
            pullback(lambda z: integer(z, labels), z, ones),
            pullback(lambda z: js.softmax_cross_entropy(z, y), z, ones),
        )

    for got in gradients(z, y):
        error = np.abs(np.asarray(got).astype(np.longdouble) - true)
        # The distance to the next number; below the smallest normal one, XLA may give 0.
        info = jnp.finfo(dtype)
        exponent = np.floor(np.log2(np.maximum(np.abs(true), float(info.tiny)).astype(float)))
        assert (error <= np.exp2(exponent - info.nmant)).all()


def test_float16_logsumexp_of_70000_zeros_has_finite_gradients():
    zeros = jnp.zeros(70_000, jnp.float16)
    for f in (js.logsumexp, lambda x: js.logsumexp(x, b=jnp.ones_like(x))):
        np.testing.assert_array_equal(jax.grad(f)(zeros), np.float16(1 / 70_000))


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
    true = np.stack([oracle.jacobian(row) for row in z])
    t = oracle.truth(z, np.float32)
    got = js.softmax_jacobian(z)
    p, bound = t.p
    q, q_bound = t.complement
    allowed = p[:, :, None] * bound[:, None, :] + bound[:, :, None] * p[:, None, :]
    every = np.arange(z.shape[-1])
    allowed[:, every, every] = p * q_bound + bound * q
    allowed += 2.0**-23 * np.abs(true) + 1.2e-38
    assert_within(got, true, allowed)
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


# logsumexp with weights


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


@pytest.mark.parametrize("name", ["logsumexp", "softmax", "log_softmax"])
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


@pytest.mark.parametrize("axis", [0, 1, (0, 2), (2, 0)], ids=str)
@pytest.mark.parametrize("where", [None, "classes", "examples"])
def test_loss_gradients_over_any_axis(axis, where):
    rng = generator("loss gradients", axis, where)
    shape = (3, 4, 5)
    z = rng.standard_normal(shape).astype(np.float32)
    axes = [int(a) for a in np.atleast_1d(axis)]
    kept = [a for a in range(3) if a not in axes]
    batch = tuple(shape[a] for a in kept)
    n = int(np.prod(batch))

    def to_rows(a):
        return a.transpose([*kept, *axes]).reshape(n, -1)

    classes = to_rows(z).shape[-1]
    mask = None
    full = np.ones(shape, bool)
    if where == "classes":
        mask = full = rng.random(shape) < 0.8
        mask[0, :, 0] = True
    elif where == "examples":
        mask = rng.random(batch) < 0.5
        full = np.broadcast_to(np.expand_dims(mask, axes), shape)
    included = to_rows(full)
    some = np.any(included, axis=-1)
    labels = np.array(
        [rng.choice(np.flatnonzero(row) if row.any() else classes) for row in included]
    )
    y = rng.random(shape).astype(np.float32)
    g = rng.standard_normal(batch).astype(np.float32)
    zr = np.where(included, to_rows(z), -np.inf)
    zr[~some] = 0
    t = oracle.truth(zr, np.float32)
    where_rows = np.expand_dims(some, -1) & included
    integer = js.softmax_cross_entropy_with_integer_labels
    shaped = labels.reshape(batch).astype(np.int32)
    for got, (true, bound) in (
        (
            pullback(lambda z: integer(z, shaped, axis, mask), z, g),
            oracle.nll_gradient(t, labels, g.reshape(-1)),
        ),
        (
            pullback(lambda z: js.softmax_cross_entropy(z, y, axis, mask), z, g),
            oracle.cross_entropy_gradient(t, to_rows(np.where(full, y, 0)), g.reshape(-1)),
        ),
    ):
        assert not np.asarray(got)[~full].any()
        assert_within(to_rows(np.asarray(got)), np.where(where_rows, true, 0), bound)
