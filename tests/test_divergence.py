# SPDX-License-Identifier: Apache-2.0
"""Divergences of two softmaxes on logits, however close: against 80 digits, entry by entry.

The two lists of functions, in cases.py and test_transforms.py, hold them too. Here is what only two
rows of logits have: their distance δ = log q − log p on every scale, a side that is frozen, and
classes that only one of them has.
"""

import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from assertions import accumulation, assert_close, assert_dtype, assert_within
from cases import class_rows, cotangent_of, generator, promised, x64
from jax import export
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from layouts import mesh_of
from test_orders import FAST_TO_COMPILE, reverse_over_reverse, value_and_gradient

import jaxsoftmax as js
from jaxsoftmax import forward_mode

inf, nan = np.inf, np.nan
kl, jsd = js.softmax_kl_divergence, js.softmax_js_divergence
both = pytest.mark.parametrize("f", [kl, jsd], ids=["KL", "JS"])
# JS takes twice the time to compile.
kl_at_least = pytest.mark.parametrize(
    "f", [pytest.param(kl, id="KL"), pytest.param(jsd, id="JS", marks=pytest.mark.wide)]
)

SCALES = (1e-7, 1e-5, 1e-3, 0.1, 1, 10, 40, 80)
OFFSETS = (0, 1e4)
PEAKS = (0, 5, 20, 60)  # from uniform to all but one-hot


def pairs(
    classes: int, dtype: Any, scales=SCALES, offsets=OFFSETS, peaks=PEAKS
) -> tuple[np.ndarray, np.ndarray]:
    """Rows (z, t): the largest |z − t| of each scale, offsets of z, and the peak of t; 0 is flat.

    The last two are equal, and equal but for an offset.
    """
    rng, rows = generator("pairs", classes, str(np.dtype(dtype))), []
    for scale, offset, peak in itertools.product(scales, offsets, peaks):
        t, change = rng.standard_normal((2, classes))
        t *= peak > 0
        t[rng.integers(classes)] += peak
        t = t.astype(dtype)
        change *= scale / np.abs(change).max()
        rows.append(((t + change + offset).astype(dtype), t))
    t = rows[-1][1]
    rows += [(t, t), (np.round(t) + 64, np.round(t))]
    return np.stack([z for z, _ in rows]), np.stack([t for _, t in rows])


WEIGHTS = (0.5, 0.01, 0.9)


def weighted_js(z, t, weights):
    """With a weight for each row, so that each has its own derivative."""
    return jax.vmap(lambda z, t, w: jsd(z, t, weight=w))(z, t, weights)


@jax.jit
def every_result(z, t, weights, g):
    """Of KL and JS the value, and the gradient by every argument."""
    out = []
    for f, arguments in ((kl, (z, t)), (weighted_js, (z, t, weights))):
        value, pull = jax.vjp(f, *arguments)
        out.append((value, *pull(g)))
    return out


def check_pairs(z, t):
    """Every value and entry of a gradient within the oracle's bounds."""
    wide = accumulation(z.dtype)
    weights = np.resize(np.array(WEIGHTS, wide), len(z))
    g = cotangent_of((len(z),), wide)
    with x64(wide):
        (value, dz, dt), (js_value, js_dz, js_dt, dw) = every_result(z, t, weights, g)
    pair = oracle.pair(z, t, wide)
    assert_dtype(value, wide)
    assert_within(value, *oracle.kl_divergence(pair), "KL")
    assert_within(dz, *oracle.kl_gradient(pair, g), "KL by logits")
    assert_within(dt, *oracle.kl_target_gradient(pair, g), "KL by target")
    assert_dtype(js_value, wide)
    assert_within(js_value, *oracle.js_divergence(pair, weights), "JS")
    assert_within(js_dz, *oracle.js_gradient(pair, weights, g), "JS by logits")
    assert_within(js_dt, *oracle.js_target_gradient(pair, weights, g), "JS by target")
    assert_within(dw, *oracle.js_weight_gradient(pair, weights, g), "JS by weight")
    for d, a in ((dz, z), (dt, t), (js_dz, z), (js_dt, t), (dw, weights)):
        assert_dtype(d, a.dtype)
    return value, js_value, pair


def test_the_two_engines_of_the_oracle_agree():
    z, t = pairs(300, "float32")
    literal, other = (oracle.pair(z, t, np.float32, engine=e) for e in ("literal", "long double"))
    for f in (oracle.kl_divergence, partial(oracle.js_divergence, weight=0.3)):
        a, b = (f(pair).value for pair in (literal, other))
        # At δ ~ 1e-7 both x and D have the roundings of numbers of size 60.
        np.testing.assert_allclose(b.astype(float), a.astype(float), rtol=2.0**-30)


@pytest.mark.parametrize(
    ("classes", "dtype"),
    [
        *((classes, "float32") for classes in (2, 300, 2049)),
        *((classes, "float64") for classes in (2, 300)),
    ],
)
def test_values_and_gradients_on_every_scale(device, classes, dtype):
    """Within the oracle's bounds, and each value within (16 + ½ max(|δ|, γ)) ulps of itself.

    γ is the largest gap of the target: a probability e^−γ has its relative error.
    """
    z, t = pairs(classes, dtype)
    value, js_value, pair = check_pairs(z, t)
    weights = np.resize(np.array(WEIGHTS, dtype), len(z))
    size = np.maximum(np.abs(pair.delta), t.max(-1, keepdims=True) - t).max(-1)
    for got, true in (
        (value, oracle.kl_divergence(pair).value),
        (js_value, oracle.js_divergence(pair, weights).value),
    ):
        promise = (16 + size / 2) * 2 * pair.u * true
        assert_within(got, true, promise + pair.floor, "(16 + ½ max(|δ|, γ)) ulps")


@pytest.mark.wide
@pytest.mark.parametrize("classes", [50257, pytest.param(262144, marks=pytest.mark.rare)])
def test_many_classes(classes):
    check_pairs(*pairs(classes, "float32", (1e-7, 1e-3, 1, 80), offsets=(1e4,), peaks=(5,)))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.wide)])
def test_half_precision_is_float32_rounded_once(dtype):
    """Differences are taken in float32: the value is that of the same numbers in float32."""
    z, t = (a.astype(jnp.dtype(dtype)) for a in pairs(300, "float32", offsets=(0,)))
    value, _, pair = check_pairs(z, t)
    assert (np.asarray(value)[pair.delta.any(-1)] > 0).all()
    wide = (a.astype(np.float32) for a in (z, t))
    np.testing.assert_array_equal(value, jax.jit(kl)(*wide))


def test_dtypes_that_differ():
    """Each gradient in the dtype of its argument; the value as of the wider."""
    z, t = pairs(17, "float32", offsets=(0,))
    half = t.astype(jnp.bfloat16)
    value, pull = jax.vjp(kl, z, half)
    dz, dt = pull(jnp.ones_like(value))
    assert (value.dtype, dz.dtype, dt.dtype) == (np.float32, np.float32, jnp.bfloat16)
    np.testing.assert_array_equal(value, kl(z, half.astype(np.float32)))


# Equal rows, and never negative


ROWS = 125_000  # at a time, of 8 classes


@pytest.mark.parametrize(
    "dtype",
    [
        "float32",
        *(pytest.param(d, marks=pytest.mark.wide) for d in ("float64", "bfloat16", "float16")),
    ],
)
def test_a_million_random_divergences_are_never_negative(dtype):
    """From the very close to the far apart; and exactly 0 where the rows differ by a shift."""

    @jax.jit
    def extremes(key):
        keys = jax.random.split(key, 4)
        t = 4 * jax.random.normal(keys[0], (ROWS, 8), dtype)
        scale = jnp.exp2(jax.random.uniform(keys[1], (ROWS, 1), dtype, -30, 4))
        z = t + scale * jax.random.normal(keys[2], (ROWS, 8), dtype)
        # Integers below 100, so that a shift by one rounds nothing in any dtype.
        whole, shift = jnp.round(t), jax.random.randint(keys[3], (ROWS, 1), -64, 65)
        found = [(f(z, t), f(whole + shift.astype(dtype), whole)) for f in (kl, jsd)]
        values, equal = map(jnp.stack, zip(*found, strict=True))
        return jnp.min(values), jnp.max(jnp.abs(equal)), jnp.max(values)

    with x64(dtype):
        least, equal, most = jax.lax.map(extremes, jax.random.split(jax.random.key(0), 8))
    assert (np.asarray(least) >= 0).all()
    assert not np.asarray(equal).any()
    assert (np.asarray(most) > 10).all()


@kl_at_least
def test_equal_rows_have_divergence_and_gradients_0(f):
    t = (30 * generator("equal").standard_normal((7, 300))).astype(np.float32)
    t[0], t[1, :5], t[2, 1:] = 0.25, -inf, -inf
    for found in value_and_gradients(f, t, t, temperature=0.7, soft_cap=50.0):
        assert not found.any()


# Classes at −inf, and rows without a log-sum-exp


def value_and_gradients(f, z, t, **options):
    """In one program: the values, and the gradients of their sum by both."""
    z, t = (np.asarray(a, np.float32) for a in (z, t))

    @jax.jit
    def run(z, t):
        value, pull = jax.vjp(partial(f, **options), z, t)
        return value, *pull(jnp.ones_like(value))

    return [np.asarray(a) for a in run(z, t)]


def probabilities(a):
    e = np.exp(a - np.max(a, -1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


Z, T = np.array([[1.0, 2, 0, -1]]), np.array([[0.0, 3, 1, 2]])


@kl_at_least
def test_a_class_at_minus_infinity_in_both_does_not_count(f):
    z, t = Z.copy(), T + np.array([0, 0, 0, 0.25])  # no q_k = p_k: that is the next test
    kept = [0, 1, 3]
    want = value_and_gradients(f, z[:, kept], t[:, kept])
    z[:, 2], t[:, 2] = -inf, -inf
    got = value_and_gradients(f, z, t)
    assert_close([got[0], *(d[:, kept] for d in got[1:])], want, rtol=1e-6)
    assert not any(d[:, 2].any() for d in got[1:])


def test_a_class_of_equal_probabilities_beside_one_that_does_not_count():
    """By chance both rows give it the same: a gradient of 0, to a rounding of its probability."""
    z, t = Z.copy(), T.copy()
    z[:, 2], t[:, 2] = -inf, -inf
    _, dz, _ = value_and_gradients(kl, z, t)
    assert abs(dz[0, 1]) <= 2.0**-24


def test_a_class_at_minus_infinity_in_the_target_alone():
    """KL is Σ p log(p / q) over the others, to which its q adds in Σ p (e^δ − 1 − δ)."""
    t = np.where(np.arange(4) == 2, -inf, T)
    q, p = probabilities(Z), probabilities(t)
    log_ratio = np.log(np.where(p > 0, p, 1) / q)
    value, dz, dt = value_and_gradients(kl, Z, t)
    np.testing.assert_allclose(value, (p * log_ratio).sum(-1), rtol=1e-6)
    np.testing.assert_allclose(dz, q - p, rtol=1e-6)
    np.testing.assert_allclose(dt, p * (log_ratio - value[:, None]), rtol=1e-5, atol=1e-7)
    assert dt[0, 2] == 0
    # Of a row where nothing else differs, q_2 is most of it: with e^−20 there, its log1p.
    far = np.array([[0.0, 0, -20]]), np.array([[0.0, 0, -inf]])
    np.testing.assert_allclose(kl(*far), [np.log1p(np.exp(-20) / 2)], rtol=1e-6)


@pytest.mark.parametrize("classes", [2, 300])
def test_from_a_one_hot_target_it_is_the_cross_entropy(classes):
    """With its accuracy, to gaps of 80: Σ q of the others beside a term of second order."""
    z, labels, gap = promised(classes)
    at = np.arange(len(z)), labels
    t = np.full_like(z, -inf)
    t[at] = 3
    value, dz, _ = value_and_gradients(kl, z, t)
    truth = oracle.truth(z, np.float32)
    true = truth.nll.value[at]
    assert_within(value, true, (8 + gap[at] / 2) * 2.0**-23 * true)
    assert_within(dz, *oracle.nll_gradient(truth, labels, np.ones(len(z))))


def test_a_class_at_minus_infinity_in_the_logits_alone():
    """KL is +inf: of the gradients q − p still is what it is, and the target's has no bound."""
    z = np.where(np.arange(4) == 2, -inf, Z)
    t = np.where(np.arange(4) == 0, -inf, T)
    value, dz, dt = value_and_gradients(kl, z, t)
    assert value == inf
    np.testing.assert_allclose(dz, probabilities(z) - probabilities(t), rtol=1e-6)
    np.testing.assert_array_equal(dt, [[0, -inf, inf, -inf]])
    # Where it is not used nothing is infinite, nor in a row beside it.
    two = np.concatenate([z, Z]).astype(np.float32), np.concatenate([t, T]).astype(np.float32)
    unused = jax.grad(lambda *a: kl(*a)[1], (0, 1))(*two)
    assert_close([d[1:] for d in unused], value_and_gradients(kl, Z, T)[1:], rtol=1e-6)
    assert not any(np.asarray(d)[0].any() for d in unused)


@pytest.mark.parametrize("weight", [0.25, pytest.param(0.5, marks=pytest.mark.wide)])
def test_js_is_finite_wherever_classes_are_lost(weight):
    """At most the entropy of the weight, reached where the two have no class in common."""
    z = np.array([[1.0, 2, -inf, -inf], [1, 2, -inf, 0], [-inf, 0, 1, 2]])
    t = np.array([[-inf, -inf, 0.0, 3], [-inf, 3, 1, 0], [0, 1, 2, -inf]])
    value, dz, dt = value_and_gradients(jsd, z, t, weight=weight)
    q, p = probabilities(z), probabilities(t)
    m = (1 - weight) * p + weight * q

    def to_mixture(a):
        return np.log(np.where(a > 0, a, 1) / np.where(a > 0, m, 1))

    of_p, of_q = ((a * to_mixture(a)).sum(-1) for a in (p, q))
    want = (1 - weight) * of_p + weight * of_q
    np.testing.assert_allclose(value, want, rtol=1e-6)
    most = -(1 - weight) * np.log(1 - weight) - weight * np.log(weight)
    np.testing.assert_allclose(value[0], most, rtol=1e-6)
    by_z = weight * q * (to_mixture(q) - of_q[:, None])
    by_t = (1 - weight) * p * (to_mixture(p) - of_p[:, None])
    assert_close([dz, dt], [by_z, by_t], rtol=1e-5, atol=1e-7)


BAD_ROWS = ([nan, 0, 0, 0], [0, 0, 0, inf], [inf, 0, 0, -inf], [-inf] * 4, [nan, inf, -inf, 0])


@both
@pytest.mark.parametrize("forward", [False, True])
def test_a_bad_row_is_nan_in_value_and_both_gradients_and_alone(f, forward):
    f = getattr(forward_mode, f.__name__) if forward else f
    z, t = (np.repeat(a, 2 * len(BAD_ROWS) + 1, 0) for a in (Z, T))
    good = value_and_gradients(f, z, t)
    for i, row in enumerate(BAD_ROWS):
        z[2 * i], t[2 * i + 1] = row, row
    for got, want in zip(value_and_gradients(f, z, t), good, strict=True):
        assert np.isnan(got[:-1]).all()
        np.testing.assert_array_equal(got[-1], want[-1])


@kl_at_least
def test_logits_at_the_end_of_float32(f):
    z, t = np.array([[3e38, -3e38, 0], [3e38, 3e38, -3e38]]), np.array([[3e38, -3e38, 1e38]] * 2)
    value, dz, dt = value_and_gradients(f, z, t)
    assert not np.isnan(value).any()
    assert value[0] == 0
    assert not np.isnan([dz, dt]).any()


# Axes, masks, sizes


@pytest.mark.parametrize("axis", [0, (0, 2), (2, 0), None], ids=str)
@both
def test_axes_and_where(f, axis):
    """Of what is left out nothing matters; a row of nothing is 0, with gradients 0."""
    rng = generator("divergence", "axes", axis)
    z, t = rng.standard_normal((2, 3, 4, 5)).astype(np.float32)
    where = rng.random(z.shape) < 0.7
    where[:, 1] = axis is None  # rows of nothing
    got = value_and_gradients(
        f, np.where(where, z, nan), np.where(where, t, inf), axis=axis, where=where
    )
    used = class_rows(where, axis)
    some = used.any(-1)
    rows = [np.where(used, class_rows(a, axis), -inf)[some] for a in (z, t)]
    value, *gradients = value_and_gradients(f, *rows)
    assert got[0].shape == z.sum(axis).shape
    np.testing.assert_allclose(np.ravel(got[0])[some], value, rtol=1e-5, atol=1e-7)
    assert not np.ravel(got[0])[~some].any()
    for d, want in zip(got[1:], gradients, strict=True):
        d_rows = class_rows(d, axis)
        np.testing.assert_allclose(d_rows[some], want, rtol=1e-5, atol=1e-6)
        assert not d_rows[~used].any()


@kl_at_least
def test_a_mask_of_examples(f):
    z, t = generator("divergence", "masks").standard_normal((2, 3, 4)).astype(np.float32)
    whole = value_and_gradients(f, z, t)
    examples = np.array([True, False, True])
    got = value_and_gradients(f, np.where(examples[:, None], z, nan), t, where=examples[:, None])
    for a, b in zip(got, whole, strict=True):
        np.testing.assert_array_equal(a[examples], b[examples])
        assert not a[1].any()


@kl_at_least
def test_no_rows_no_classes_and_one_class(f):
    for shape in ((0, 5), (3, 0), (0, 0), (3, 1)):
        z = np.ones(shape)
        value, *gradients = value_and_gradients(f, z, 2 * z)
        assert value.shape == shape[:1]
        assert not value.any()
        assert [d.shape for d in gradients] == [shape, shape]
        assert not any(d.any() for d in gradients)
    assert f(np.float32(1), np.float32(2), axis=()) == 0


# Options


def test_kl_of_divided_logits():
    """A power of two divides exactly: the divergence of the divided logits, gradients over T."""
    z, t = pairs(17, "float32", offsets=(0,))
    got = value_and_gradients(kl, z, t, temperature=2.0)
    value, dz, dt = value_and_gradients(kl, z / 2, t / 2)
    assert_close(got, [value, dz / 2, dt / 2], rtol=2e-6, atol=1e-37)


@pytest.mark.parametrize("offsets", [(0, 0), (3000, 3000), (0, 3000)], ids=str)
@kl_at_least
def test_close_rows_stay_exact_under_a_temperature_with_offsets(f, offsets):
    """As without one: the maxima are of undivided logits, and each gap is divided once.

    Of z / T and t / T every one has a rounding of its own size, 3000 u: the value was 1e-4 wrong.
    """
    z, t = pairs(40, "float32", scales=(1e-3, 0.1, 1), offsets=(0,), peaks=(0, 5))
    z, t = (np.float32(a + offset) for a, offset in zip((z, t), offsets, strict=True))
    temperature = np.float32(0.7)
    value, dz, dt = value_and_gradients(f, z, t, temperature=temperature)
    z, t = (
        (a.astype(float) - a.max(-1, keepdims=True).astype(float)) / float(temperature)
        for a in (z, t)
    )
    pair = oracle.pair(z, t, np.float32)
    true = (oracle.kl_divergence(pair) if f is kl else oracle.js_divergence(pair, 0.5)).value
    size = np.maximum(np.abs(pair.delta), -t).max(-1)
    assert_within(value, true, (16 + size / 2) * 2 * pair.u * true + pair.floor)
    # A gap has two roundings, its own and the quotient's, for one that the bounds count.
    g = np.full(len(z), 1 / float(temperature))
    if f is kl:
        gradients = oracle.kl_gradient(pair, g), oracle.kl_target_gradient(pair, g)
    else:
        gradients = oracle.js_gradient(pair, 0.5, g), oracle.js_target_gradient(pair, 0.5, g)
    assert_within(dz, gradients[0].value, 2 * gradients[0].bound, "by logits")
    assert_within(dt, gradients[1].value, 2 * gradients[1].bound, "by target")


def test_a_small_temperature_leaves_one_class():
    z, t = np.array([3, 1], np.float32), np.array([2.9, 1], np.float32)
    for temperature in (1e-2, 1e-7, 1e-30):
        for f in (kl, jsd):
            value, ds = jax.value_and_grad(partial(f, temperature=temperature), (0, 1))(z, t)
            assert value <= 1e-38
            assert all(np.abs(d).max() <= 1e-38 for d in ds)


@kl_at_least
def test_close_rows_stay_exact_under_a_cap_and_a_temperature(f):
    """(24 + ½ max(|δ|, γ)) ulps: tanh a − tanh b, in eight operations, makes 8 ulps of δ's square.

    The truth is of capped logits in float64, which changes 1e-7 by 1e-8 of itself: another ulp.
    """
    z, t = pairs(300, "float32", offsets=(0,), peaks=(0, 5, 20))
    cap, temperature = 30.0, np.float32(1.7)
    value = jax.jit(partial(f, soft_cap=cap, temperature=temperature))(z, t)
    z, t = (cap * np.tanh(a.astype(float) / cap) / float(temperature) for a in (z, t))
    pair = oracle.pair(z, t, np.float32)
    true = (oracle.kl_divergence(pair) if f is kl else oracle.js_divergence(pair, 0.5)).value
    size = np.maximum(np.abs(pair.delta), t.max(-1, keepdims=True) - t).max(-1)
    assert_within(value, true, (25 + size / 2) * 2 * pair.u * true + pair.floor)


def textbook(z, t, temperature=1.0, soft_cap=None, weight=None):
    """For δ ~ 1 in float64."""
    if soft_cap is not None:
        z, t = (soft_cap * jnp.tanh(a / soft_cap) for a in (z, t))
    log_q, log_p = (jax.nn.log_softmax(a / temperature) for a in (z, t))
    p, q = jnp.exp(log_p), jnp.exp(log_q)
    if weight is None:
        return jnp.sum(p * (log_p - log_q))
    log_m = jnp.log((1 - weight) * p + weight * q)
    return (1 - weight) * jnp.sum(p * (log_p - log_m)) + weight * jnp.sum(q * (log_q - log_m))


@both
@pytest.mark.parametrize(
    "operation", [value_and_gradient, pytest.param(reverse_over_reverse, marks=pytest.mark.wide)]
)
def test_derivatives_by_every_argument_at_once(f, operation):
    """Of logits, temperature, cap and weight together, in float64; at equal logits too."""
    options = {"temperature": 1.7, "soft_cap": 4.0} | ({"weight": 0.3} if f is jsd else {})
    options = {name: np.float64(value) for name, value in options.items()}
    rng = generator("derivatives")
    t = rng.standard_normal((3, 5))
    z = t + np.array([[0], [1e-3], [2]]) * rng.standard_normal((3, 5))

    def derivative(f):
        def of_row(z, t):
            return operation(lambda x: f(*x[:2], **x[2]), (z, t, options))

        return jax.jit(jax.vmap(of_row), compiler_options=FAST_TO_COMPILE)

    with jax.enable_x64(True):
        got, want = (derivative(g)(z, t) for g in (f, textbook))
    # The textbook's logarithms cancel: to u times a few tens, of numbers of size 1.
    assert_close(got, want, rtol=1e-9, atol=1e-12)


def test_equal_to_optax():
    """Of rows that differ by about 1, where logarithms of probabilities are good enough."""
    z, t = 2 * generator("optax").standard_normal((2, 9, 31))
    with jax.enable_x64(True):
        log_q, p = jax.nn.log_softmax(z), jax.nn.softmax(t)
        np.testing.assert_allclose(kl(z, t), optax.losses.kl_divergence(log_q, p), rtol=1e-13)
        m = (jax.nn.softmax(z) + p) / 2
        halves = (optax.losses.kl_divergence(jnp.log(m), a) for a in (p, jax.nn.softmax(z)))
        np.testing.assert_allclose(jsd(z, t), sum(halves) / 2, rtol=1e-13)


def test_js_exchanged_has_the_other_weight():
    z, t = pairs(17, "float32", offsets=(0,))
    values = jsd(z, t, weight=0.25), jsd(t, z, weight=0.75)
    np.testing.assert_allclose(*values, rtol=1e-5, atol=1e-37)
    # For a small weight it is that times the reverse KL, to first order.
    small = slice(0, 12)  # |δ| ≤ 1e-3
    by_kl = 1e-4 * np.asarray(kl(t, z))[small]
    np.testing.assert_allclose(jsd(z, t, weight=1e-4)[small], by_kl, rtol=2e-4, atol=1e-37)


# The side that is frozen


@kl_at_least
def test_a_frozen_side_costs_nothing(f):
    """No arithmetic of its gradient, whether it is not asked for or has its gradient stopped."""
    shape = jax.ShapeDtypeStruct((64, 2049), np.float32)

    def flops(*by, stopped=()):
        def total(*pair):
            pair = (jax.lax.stop_gradient(a) if i in stopped else a for i, a in enumerate(pair))
            return jnp.sum(f(*pair))

        compiled = jax.jit(jax.value_and_grad(total, by)).lower(shape, shape).compile()
        return (compiled.cost_analysis() or {})["flops"]

    student, teacher = flops(0), flops(1)
    assert max(student, teacher) < 0.9 * flops(0, 1)
    assert flops(0, 1, stopped=(1,)) == student


# JS under the transforms; KL is in test_transforms.py


@pytest.mark.wide
def test_js_under_every_transform():
    """Each against the call itself, whose numbers are checked above."""
    z, t = (a[::3] for a in pairs(40, "float32", offsets=(0,)))
    total = lambda z, t: jnp.sum(jsd(z, t))  # noqa: E731
    by_both = jax.jit(lambda z, t: (jsd(z, t), *jax.grad(total, (0, 1))(z, t)))
    want = by_both(z, t)

    def of_row(z, t):
        value, pull = jax.vjp(jsd, z, t)
        return value, *pull(jnp.ones_like(value))

    def scanned(z, t):
        return jax.lax.scan(lambda c, pair: (c, jsd(*pair)), None, (z, t))[1]

    def checkpointed(z, t):
        return jax.vjp(jax.checkpoint(jsd), z, t)[1](jnp.ones(len(z)))

    rows = export.symbolic_shape("rows, 40")
    shape = jax.ShapeDtypeStruct(rows, np.float32)
    exported = export.export(by_both, platforms=("cpu", "cuda", "tpu"))(shape, shape)
    checks = {
        "vmap": (jax.vmap(of_row), want),
        "scan": (jax.grad(lambda *pair: scanned(*pair).sum(), (0, 1)), want[1:]),
        "checkpoint": (checkpointed, want[1:]),
        "export": (exported.call, want),
    }
    for name, (run, expected) in checks.items():
        # Sums in another order: KL's errors above, twice.
        assert_close(jax.jit(run)(z, t), expected, rtol=1e-5, atol=1e-12, name=name)
    of_one = jax.vmap(of_row, (0, None))(z, t[1])
    alone = [by_both(z, np.broadcast_to(t[1], t.shape))[i] for i in (0, 1)]
    assert_close(list(of_one[:2]), alone, rtol=1e-5, atol=1e-12)


# Classes that are sharded


@kl_at_least
def test_sharded_classes_as_whole_ones(f):
    """Value and gradients in `shard_map`, of close and far rows, lost classes and bad rows."""
    z, t = pairs(16, "float32", peaks=(5,))
    z[:3, 2], t[:2, 2], t[3, 9] = -inf, -inf, -inf
    z[5, 15], t[6, 0] = nan, inf
    where = generator("sharded").random(z.shape) < 0.9
    where[[2, 5, 6], [2, 15, 0]] = True
    g = cotangent_of((len(z),), np.float32)

    def results(z, t, where, axis_name=None):
        value, pull = jax.vjp(lambda z, t: f(z, t, where=where, axis_name=axis_name), z, t)
        return value, *pull(jnp.asarray(g))

    mesh, spec = mesh_of(AxisType.Auto), P(None, "vocab")
    sharded: Any = jax.shard_map(
        partial(results, axis_name="vocab"),
        mesh=mesh,
        in_specs=(spec,) * 3,
        out_specs=(P(), spec, spec),
    )
    run: Any = jax.jit(lambda *of: (sharded(*of), results(*of)))
    got, want = jax.tree.map(np.asarray, run(z, t, where))
    finite = np.isfinite(want[0])
    kept, target_kept = (np.where(where, a, -inf)[finite] for a in (z, t))
    pair = oracle.pair(kept, target_kept, np.float32)
    if f is kl:
        value, of = oracle.kl_divergence(pair), (pair, g[finite])
        gradients: Any = oracle.kl_gradient, oracle.kl_target_gradient
    else:
        value, of = oracle.js_divergence(pair, 0.5), (pair, 0.5, g[finite])
        gradients = oracle.js_gradient, oracle.js_target_gradient
    truths = value, *(gradient(*of) for gradient in gradients)
    for a, b, true in zip(got, want, truths, strict=True):
        np.testing.assert_allclose(a[~finite], b[~finite], rtol=1e-5)
        assert_within(a[finite], true.value, true.bound)
    assert (~finite).sum() == (3 if f is kl else 2)
