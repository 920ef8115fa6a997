# SPDX-License-Identifier: Apache-2.0
"""Every function's value against 80-digit arithmetic, over the shared cases and every option."""

import contextlib

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
    generator,
    on_device,
    promised,
    rows,
    targets_of,
    truth_of,
    x64,
)

import jaxsoftmax as js
from jaxsoftmax import _numerics

ULP = 2.0**-23


def test_the_device_fixture_chooses_what_runs(device, monkeypatch):
    calls = []
    monkeypatch.setattr(_numerics, "_by_block", lambda x: calls.append(x.shape) or (x[:, 0],) * 2)
    jax.clear_caches()
    js.logsumexp(jnp.zeros((3, 4099)), axis=-1)
    jax.clear_caches()
    assert calls == ([] if device == "anywhere" else [(3, 4099)])


def test_the_two_engines_of_the_oracle_agree():
    z = rows(Case(300, "float64")).logits
    literal, wide = (oracle.truth(z, np.float64, engine=e) for e in ("literal", "wide"))
    for name in ("p", "complement", "nll", "lse"):
        a, b = getattr(literal, name).value, getattr(wide, name).value
        np.testing.assert_array_equal(np.isinf(a), np.isinf(b))
        a, b = (np.where(np.isinf(v), 0, v) for v in (a, b))
        assert (np.abs(a - b) <= 2.0**-58 * np.abs(a)).all(), name


def on_cpu(z, labels=None):
    return _numerics._on_cpu(_numerics.upcast, z, labels)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value(device, case):
    data, t = rows(case), truth_of(case)
    targets = [targets_of(function, data) for function in FUNCTIONS]

    @jax.jit  # one program for all of them: compiling is what takes the time
    def values(z, targets):
        return [function.call(z, y) for function, y in zip(FUNCTIONS, targets, strict=True)]

    with x64(case.dtype):
        results = values(data.logits, targets)
    for function, y, got in zip(FUNCTIONS, targets, results, strict=True):
        assert_dtype(got, accumulation(case.dtype) if function.accumulates else case.dtype)
        true, bound = function.value(t, y)
        assert_within(got, true, bound, f"{function}, rows {ROW_KINDS}")


@pytest.mark.parametrize("classes", PROMISED_SIZES)
def test_the_promise_for_losses(device, classes):
    """Relative error ≤ (8 + gap/2) ulps at gaps of 0 to 80 nats, V from 2 to 1000."""
    z, labels, gap = promised(classes)
    at = np.arange(len(z))
    t = oracle.truth(z, np.float32)
    true = t.nll.value[at, labels]
    allowed = (8 + gap[at, labels] / 2) * ULP
    y = np.eye(classes, dtype=np.float32)[labels]
    results = {
        "integer": js.softmax_cross_entropy_with_integer_labels(z, labels),
        "dense": js.softmax_cross_entropy(z, y),
        "log_softmax": -js.log_softmax(z)[at, labels],
    }
    for name, got in results.items():
        assert (relative_error(got, true) <= allowed).all(), name


@pytest.mark.parametrize("confident", [True, False])
@pytest.mark.parametrize("classes", [512, 1000, 2048, 3000, 4097, 50257])
def test_the_remainder_where_the_exponentials_sum_to_about_two(classes, confident):
    """On CPU it is taken anew for rows whose exponentials sum to less than 2, if there is any.

    At 2 no accuracy is to be lost on either side, and ties stay on theirs.
    """
    assert _numerics._whole_block(classes) is not None
    rng = generator("about two", classes)
    rows = [rng.standard_normal(classes), np.zeros(classes)]
    if confident:
        for rest in (1e-30, 1e-6, 0.5, 1 - 1e-6, 1 - 1e-7, 1.0, 1 + 1e-7, 1 + 1e-6, 1.5):
            parts = rng.dirichlet(np.ones(classes - 1)) * rest
            top = rng.integers(classes)
            rows.append(np.insert(np.log(parts), top, 0.0) + 3.0)
    for places in ((0, 1), (0, classes - 1), (classes // 2, classes - 1, classes - 2)):
        ties = np.full(classes, -40.0)
        ties[list(places)] = 1.5
        rows.append(ties)
    z = np.stack(rows).astype(np.float32)
    if not confident:
        assert (np.exp(z.astype(np.float64) - z.max(-1, keepdims=True)).sum(-1) >= 2).all()
    with contextlib.contextmanager(on_device)("one CPU device"):
        m, r = jax.jit(_numerics.max_and_remainder)(z)
    np.testing.assert_array_equal(m, z.max(-1))
    # exp(z − max) exactly, of the difference as float32 rounds it; all but one maximum.
    e = np.exp((z - z.max(-1, keepdims=True)).astype(np.float64))
    e[np.arange(len(z)), z.argmax(-1)] = 0
    true = e.sum(-1)
    # An exponential of XLA's is within 2 ulps; sums of blocks, then of √(2C) numbers or fewer in
    # turn, round to within log2 of as many; s − 1 doubles both.
    assert (np.abs(r - true) <= 2 * (2 + np.log2(classes)) * ULP * true).all()


@pytest.mark.parametrize("classes", [512, 2048, 50257])
@pytest.mark.parametrize("where", ["first", "last"])
def test_what_is_not_finite_stays_in_its_row_of_whole_blocks(classes, where):
    z = np.array(generator("not finite", classes).standard_normal((6, classes)), np.float32)
    at = 0 if where == "first" else -1
    z[0, at], z[1, at], z[2] = np.nan, np.inf, -np.inf
    z[3, at], z[4, at] = np.inf, -np.inf
    z[3, 5] = np.nan
    with contextlib.contextmanager(on_device)("one CPU device"):
        m, r = jax.jit(_numerics.max_and_remainder)(z)
    np.testing.assert_array_equal(m[:4], [np.nan, np.inf, -np.inf, np.nan])
    assert np.isnan(r[:4]).all()
    assert np.isfinite(m[4:]).all()
    assert np.isfinite(r[4:]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_logits_lose_nothing_but_the_last_rounding(dtype):
    z = rows(Case(300, dtype)).logits
    for function in (js.softmax, js.log_softmax):
        wide = np.asarray(function(z.astype(np.float32)))
        np.testing.assert_array_equal(function(z), wide.astype(z.dtype))


# Axes and masks


@pytest.mark.parametrize("axis", [0, -1, (0, 2), (2, 0), None], ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
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
    axes = tuple(range(3)) if axis is None else np.atleast_1d(axis) % 3
    kept = [a for a in range(3) if a not in axes]
    order = [*kept, *axes]
    flat = z.transpose(order).reshape(int(np.prod([3, 4, 5], where=np.isin(range(3), kept))), -1)
    t = oracle.truth(flat, np.float32)
    if name == "logsumexp":
        assert_within(np.asarray(got).reshape(-1), *t.lse)
        return
    true, bound = t.p if name == "softmax" else oracle.log_probabilities(t)
    assert_within(np.asarray(got).transpose(order).reshape(flat.shape), true, bound)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
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


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_nothing_selected_as_in_jax_nn(name):
    x, where = np.ones((2, 3), np.float32), np.array([[False] * 3, [True, False, True]])
    expected = {
        "softmax": [[0, 0, 0], [0.5, 0, 0.5]],
        "log_softmax": [[-np.inf] * 3, [-np.log(2), -np.inf, -np.log(2)]],
        "logsumexp": [-np.inf, 1 + np.log(2)],
    }[name]
    got = getattr(js, name)(x, axis=-1, where=where)
    np.testing.assert_allclose(got, np.asarray(expected, np.float32), rtol=1e-6)


@pytest.mark.parametrize("axis", [0, -2, (0, 2), (2, 0), (-1, 1)], ids=str)
@pytest.mark.parametrize("where", [None, "classes", "broadcast", "examples"])
def test_losses_over_any_axis(axis, where):
    """A tuple counts classes flat, in the given order; `where` has both of optax's meanings."""
    rng = generator("losses", axis, where)
    shape = (3, 4, 5)
    z = rng.standard_normal(shape).astype(np.float32)
    y = rng.random(shape).astype(np.float32)
    axes = [int(a) % 3 for a in np.atleast_1d(axis)]
    kept = [a for a in range(3) if a not in axes]
    batch = tuple(shape[a] for a in kept)
    mask = {
        None: None,
        "classes": rng.random(shape) < 0.7,
        "broadcast": rng.random([1 if a in kept else shape[a] for a in range(3)]) < 0.7,
        "examples": rng.random(batch) < 0.5,
    }[where]
    full = np.ones(shape, bool)
    if where == "examples":
        full = np.broadcast_to(np.expand_dims(mask, axes), shape)
    elif mask is not None:
        full = np.broadcast_to(mask, shape)

    def to_rows(a):
        return a.transpose([*kept, *axes]).reshape(int(np.prod(batch)), -1)

    some = to_rows(full).any(-1)
    zr = to_rows(np.where(full, z, -np.inf))
    zr[~some] = 0
    t = oracle.truth(zr, np.float32)
    labels = rng.integers(zr.shape[-1], size=batch)
    got = js.softmax_cross_entropy_with_integer_labels(z, labels.astype(np.int32), axis, mask)
    assert got.shape == batch
    true, bound = oracle.nll(t, labels.reshape(-1))
    assert_within(np.asarray(got).reshape(-1), np.where(some, true, 0), bound, "integer")
    got = js.softmax_cross_entropy(z, y, axis, mask)
    assert got.shape == batch
    true, bound = oracle.cross_entropy(t, to_rows(np.where(full, y, 0)))
    assert_within(np.asarray(got).reshape(-1), np.where(some, true, 0), bound, "dense")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("axis", [None, 0, (2, 0)], ids=str)
def test_log_probs_over_any_axis_the_last_by_default(device, axis, dtype):
    z = generator("log-probs", axis).standard_normal((3, 4, 5)).astype(jnp.dtype(dtype))
    axes = [2] if axis is None else list(np.atleast_1d(axis))
    kept = [a for a in range(3) if a not in axes]
    batch = tuple(z.shape[a] for a in kept)
    rows = z.transpose([*kept, *axes]).reshape(int(np.prod(batch)), -1)
    labels = np.arange(np.prod(batch), dtype=np.int32).reshape(batch) % rows.shape[-1]
    got = js.label_log_probs(z, labels, **({} if axis is None else {"axis": axis}))
    t = oracle.truth(rows, np.float32)
    true, bound = oracle.nll(t, labels.reshape(-1))
    for field, want, error in ((got.log_probs, -true, bound), (got.log_normalizers, *t.lse)):
        assert field.shape == batch
        assert_within(np.asarray(field).reshape(-1), want, error)


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


# The formulation for one CPU device, called directly.


def remainder(z: np.ndarray) -> np.ndarray:
    """R as the definition has it: everything but one maximal term, in long double."""
    z = np.asarray(z, np.longdouble)
    e = np.exp(z - z.max(-1, keepdims=True))
    e[np.arange(len(z)), z.argmax(-1)] = 0
    return e.sum(-1)


CPU_CASES = [("float32", v) for v in (1, 2, 16, 17, 2047, 2048, 2049, 2176, 2177)] + [
    (dtype, v) for dtype in ("float64", "bfloat16", "float16") for v in (16, 300, 2049)
]


@pytest.mark.parametrize(("dtype", "classes"), CPU_CASES)
@pytest.mark.parametrize("n", [1, 13], ids=["one row", "ragged chunks"])
def test_cpu_statistics(monkeypatch, classes, dtype, n):
    """(m, r) of every threshold, with the last chunk of rows moved back over seen ones."""
    rng = generator("statistics", classes, dtype, n)
    z = (3 * rng.standard_normal((n, classes))).astype(jnp.dtype(dtype))
    if n > 1:
        z[1, -1] = 30  # the maximum in the last, perhaps short, block
        z[2, 0] = z[2, -1] = z[2, classes // 2] = 31  # ties in different blocks
        z[3] = -1e4
        z[4, : classes // 2] = -np.inf
        z[5] = 0
        z[6, : max(classes - 1, 0)] = -np.inf
        z[7, -1] = 90  # all other terms may underflow
    monkeypatch.setattr(_numerics, "_CHUNK_BYTES", 5 * classes * (8 if dtype == "float64" else 4))
    with x64(dtype):
        m, r = jax.jit(on_cpu)(jnp.asarray(z))
    wide = z.astype(np.float64)
    np.testing.assert_array_equal(np.asarray(m, np.float64), wide.max(-1))
    info = np.finfo(accumulation(dtype))
    true = remainder(wide)
    finite = np.where(np.isneginf(wide), 0, wide.max(-1, keepdims=True) - wide)
    e = np.exp(-finite) * np.isfinite(wide)
    e[np.arange(n), wide.argmax(-1)] = 0
    mean = (e * finite).sum(-1) / np.maximum(e.sum(-1), 1e-300)
    chain = max(10.0, classes**0.5)
    bound = (mean + 2 + chain) * float(info.eps) / 2 * true + classes * float(info.tiny)
    assert_within(r, true, bound, f"{dtype} {classes}")


@pytest.mark.parametrize(("dtype", "classes"), [*CPU_CASES, ("float32", 512), ("float64", 2176)])
@pytest.mark.parametrize("again", [1, 2, 100], ids=["row by row", "by pairs", "all rows at once"])
def test_cpu_statistics_from_the_label(monkeypatch, classes, dtype, again):
    """(m, r) from the label's logit, where that is near enough; else from the maximum.

    Equation (41) and (42) with the distances to m in place of the gaps.
    """
    rng = generator("from the label", classes, dtype)
    n = 13
    z = (3 * rng.standard_normal((n, classes))).astype(jnp.dtype(dtype))
    labels = rng.integers(0, classes, n, dtype=np.int32)
    rows = np.arange(n)
    z[1:5, 0] = 8
    z[rows[1:5], labels[1:5]] = [30, 8, -7, -11]  # leads, ties, is near, is too far
    z[5, 0], z[5, labels[5]] = 60, -60  # exp(120) is no float32
    if classes > 1:
        z[6, labels[6]] = -np.inf
    z[7] = 3e4
    z[9], z[9, labels[9]] = -1e4, 0
    z[10] = 5
    wide = z.astype(np.longdouble)
    itemsize = 8 if dtype == "float64" else 4
    monkeypatch.setattr(_numerics, "_CHUNK_BYTES", 5 * classes * itemsize)
    monkeypatch.setattr(_numerics, "_AGAIN_BYTES", again * classes * itemsize)
    with x64(dtype):
        m, r = jax.jit(on_cpu)(jnp.asarray(z), jnp.asarray(labels))
    m, r = np.asarray(m, np.longdouble), np.asarray(r)
    index, top = np.maximum(labels, 0), wide.max(-1)
    if few := min(128, classes // 64):  # or from the largest of so many classes, if that is higher
        seen = wide[:, :few].argmax(-1)
        index = np.where(wide[rows, seen] > wide[rows, index], seen, index)
    of_label = wide[rows, index]
    from_top = m == top
    assert (from_top | (m == of_label)).all()
    # The columns, the blocks and the short rows are measured from there while that is near.
    if classes <= 16 or (itemsize == z.itemsize and (classes < 2048 or classes == 2176)):
        with np.errstate(over="ignore", invalid="ignore"):
            rest = np.exp(wide - of_label[:, None]).sum(-1) - 1
        assert (m == of_label)[rest < 2.0**24 * 0.999].all()
        assert from_top[~(rest < 2.0**24 * 1.001)].all()
    taken = np.where(m == of_label, index, wide.argmax(-1))
    inside = np.isfinite(wide) & (np.arange(classes) != taken[:, None])
    distance = np.where(inside, np.abs(wide - m[:, None]), 0)
    e = np.where(inside, np.exp(np.where(inside, wide - m[:, None], 0)), 0)
    true = e.sum(-1)
    mean = (e * distance).sum(-1) / np.maximum(true, 1e-300)
    chain = max(10.0, classes**0.5)
    info = np.finfo(accumulation(dtype))
    bound = (mean + 2 + chain) * float(info.eps) / 2 * true + classes * float(info.tiny)
    assert_within(r, true, bound, f"{dtype} {classes}")


@pytest.mark.parametrize("classes", [3, 100, 2049, 4096])
@pytest.mark.parametrize("label", [0, 1])
def test_cpu_statistics_from_the_label_of_rows_that_are_not_finite(classes, label):
    z = np.zeros((11, classes), np.float32)
    z[2, classes // 2] = np.nan
    z[3, label] = np.nan
    z[4, -1] = np.nan
    z[5, label] = np.inf
    z[6, classes // 2 + 1] = np.inf
    z[7, label] = -np.inf
    z[8] = -np.inf
    labels = jnp.full(11, label, jnp.int32)
    with contextlib.contextmanager(on_device)("one CPU device"):
        m, r = (np.asarray(s) for s in jax.jit(_numerics.max_and_remainder)(z, labels))
    good = np.isin(np.arange(11), range(2, 9), invert=True)
    np.testing.assert_array_equal(m[good], 0)
    np.testing.assert_array_equal(r[good], classes - 1)
    np.testing.assert_array_equal(m[2:9], [np.nan] * 3 + [np.inf] * 2 + [0, -np.inf])
    np.testing.assert_array_equal(r[2:9], [np.nan] * 5 + [classes - 2, np.nan])


@pytest.mark.parametrize("classes", [3, 100, 4096])
def test_a_row_whose_label_is_no_class_has_finite_statistics(classes):
    """Whatever its first class is, which takes the label's place."""
    z = np.zeros((5, classes), np.float32)
    z[:4, 0] = [-100, -np.inf, np.inf, np.nan]
    labels = jnp.array([-1, -1, -1, -1, 1], jnp.int32)
    with contextlib.contextmanager(on_device)("one CPU device"):
        m, r = jax.jit(_numerics.max_and_remainder)(z, labels)
    np.testing.assert_array_equal(m, [np.finfo(np.float32).max] * 4 + [0])
    np.testing.assert_array_equal(r, [0] * 4 + [classes - 1])


@pytest.mark.parametrize("classes", [10, 100, 4096])
def test_a_mapped_axis_is_one_more_axis_of_rows(classes):
    """Nothing that a condition skips is computed under vmap: the same program, the same memory."""
    rng = generator("mapped", classes)
    z = jnp.asarray(5 * rng.standard_normal((6, 40, classes)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, classes, (6, 40)), jnp.int32)
    z = z.at[0, 0, 1].set(90)

    def together(f, z, labels):
        program = jax.jit(f).lower(z, labels).compile()
        memory = program.memory_analysis()
        assert memory is not None
        return program(z, labels), memory.temp_size_in_bytes

    def form(z, labels):
        rows = (z,) if labels is None else (z, labels)
        static = {"of": _numerics.upcast, "labelled": labels is not None, "local": True}
        return tuple(_numerics._max_and_remainder.bind(*rows, **static))

    expected, memory = together(form, z, labels)
    for mapped in (jax.vmap(form), jax.vmap(jax.vmap(form))):
        got, temporary = together(mapped, z, labels)
        jax.tree.map(np.testing.assert_array_equal, got, expected)
        assert temporary <= memory + z.nbytes // 10 + 4096
    of_second_axis = together(jax.vmap(form, in_axes=1, out_axes=1), z, labels)[0]
    jax.tree.map(np.testing.assert_array_equal, of_second_axis, expected)
    form_of_rows = together(jax.vmap(form, (0, None)), z, labels[0])[0]
    jax.tree.map(
        np.testing.assert_array_equal,
        form_of_rows,
        form(z, jnp.broadcast_to(labels[0], labels.shape)),
    )
    of_labels = jax.vmap(form, (None, 0))(z[0], labels)
    for got, expected in zip(of_labels, form(z[0], None), strict=True):
        np.testing.assert_array_equal(got, np.broadcast_to(expected, got.shape))


@pytest.mark.parametrize("classes", [3, 100, 2049, 4096])
def test_cpu_statistics_of_rows_that_are_not_finite(monkeypatch, classes):
    z = np.zeros((11, classes), np.float32)
    z[2, classes // 2] = np.nan
    z[4, -1] = np.nan
    z[6, 0] = np.inf
    z[8] = -np.inf
    monkeypatch.setattr(_numerics, "_CHUNK_BYTES", 4 * classes * 4)
    m, r = (np.asarray(s) for s in jax.jit(on_cpu)(z))
    good = np.isin(np.arange(11), [2, 4, 6, 8], invert=True)
    np.testing.assert_array_equal(m[good], 0)
    np.testing.assert_array_equal(r[good], classes - 1)
    assert m[6] == np.inf
    assert m[8] == -np.inf
    assert np.isnan(r[[2, 4]]).all()  # XLA:CPU's maximum may lose the NaN, the sum must not


@pytest.mark.parametrize("shape", [(0, 3), (0, 4096), (2, 0, 300), (2, 3, 2049), (2049,)], ids=str)
def test_cpu_statistics_of_any_batch_shape(shape):
    m, r = on_cpu(jnp.zeros(shape, jnp.float32))
    assert m.shape == r.shape == shape[:-1]
    np.testing.assert_array_equal(m, 0)
    np.testing.assert_array_equal(r, shape[-1] - 1)
