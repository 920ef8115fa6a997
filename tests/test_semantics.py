# SPDX-License-Identifier: Apache-2.0
"""Each row of docs/semantics.md, by its name, on the smallest input that shows it.

The other files go through these questions with every size, dtype and transform.
"""

import math
import re
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jaxsoftmax

PAGE = Path(__file__).parents[1] / "docs" / "semantics.md"
ROWS: dict[str, str] = {}  # row of a table: name of its test

dense = jaxsoftmax.softmax_cross_entropy
integer = jaxsoftmax.softmax_cross_entropy_with_integer_labels
head = jaxsoftmax.linear_softmax_cross_entropy
kl, js = jaxsoftmax.softmax_kl_divergence, jaxsoftmax.softmax_js_divergence
head_kl, head_js = jaxsoftmax.linear_kl_divergence, jaxsoftmax.linear_js_divergence

Z = np.array([[1.0, -2.0, 0.5, 3.0], [0.0, 4.0, 4.0, -1.0]])
LABELS = np.array([3, 0])
X = jnp.asarray(Z, jnp.float32)
INF = float("inf")
ULPS = 2e-6  # float32: a handful of roundings of numbers below 10


def row(question):
    """Says which row of the page a test is about."""

    def register(test):
        assert question not in ROWS
        ROWS[question] = test.__name__
        return test

    return register


def truth(z: Any = Z, labels: Any = LABELS) -> np.ndarray:
    """−log softmax at the labels in float64, from the definition."""
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    return -np.log(p[np.arange(len(z)), labels])


def gradient(function, x):
    """Of the sum of the results."""
    return np.asarray(jax.grad(lambda x: function(x).sum())(x))


def test_every_row_has_its_test():
    questions = re.findall(r"^\| (.+?) \| ", PAGE.read_text("utf-8"), re.M)
    assert set(questions) - {"question", "---"} == set(ROWS)


@row("a mask of tokens in a head")
def test_a_mask_of_tokens_in_a_head():
    hidden, kernel = X, jnp.eye(4, dtype=jnp.float32)
    with pytest.raises(TypeError, match="where"):
        cast(Any, head)(hidden, kernel, LABELS, where=np.array([True, False]))
    weighted = head(hidden, kernel, LABELS, weights=np.array([1.0, 0.0], np.float32))
    ignored = head(hidden, kernel, np.array([3, -1]), ignore_index=-1)
    np.testing.assert_allclose([weighted, ignored], truth()[0], rtol=ULPS)
    where = np.array([True, False])
    log_probs = jaxsoftmax.linear_log_probs(hidden, kernel, LABELS, where=where).log_probs
    np.testing.assert_allclose(log_probs, [-truth()[0], 0], rtol=ULPS)
    both = head_kl(hidden, kernel, hidden[::-1], kernel, where=where, reduction=None)
    assert both[0] > 0
    assert both[1] == 0


@row("dtypes")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_dtypes(dtype):
    x = X.astype(dtype)
    assert integer(x, LABELS).dtype == jnp.float32
    assert jaxsoftmax.softmax(x).dtype == x.dtype
    assert jax.grad(lambda x: integer(x, LABELS).sum())(x).dtype == x.dtype
    with jax.enable_x64(True):
        assert integer(jnp.asarray(Z), LABELS).dtype == jnp.float64


@row("what is saved for the backward pass")
def test_what_is_saved_for_the_backward_pass():
    x = X.astype(jnp.bfloat16)
    _, pull = jax.vjp(lambda x: integer(x, LABELS), x)
    kept = {id(a): a for a in jax.tree.leaves(pull) if hasattr(a, "shape")}.values()
    assert [a.dtype for a in kept if a.size == x.size] == [jnp.bfloat16]
    assert sum(a.size == 2 and a.dtype == jnp.float32 for a in kept) <= 3


@row("`where`")
def test_where():
    classes = np.array([[True, False, True, True], [False] * 4])
    got = integer(X, LABELS, where=classes)
    np.testing.assert_allclose(got, [truth(Z[:1, [0, 2, 3]], [2])[0], 0], rtol=ULPS)
    d = gradient(lambda x: integer(x, LABELS, where=classes), X)
    assert (d[~classes] == 0).all()
    assert (d[0, classes[0]] != 0).all()
    examples = np.array([False, True])
    np.testing.assert_allclose(integer(X, LABELS, where=examples), [0, truth()[1]], rtol=ULPS)


@row("a label that is masked out")
def test_a_label_that_is_masked_out():
    mask = np.array([[True, True, True, False]] * 2)
    assert integer(X, LABELS, where=mask)[0] == INF
    one_hot = jnp.eye(4, dtype=jnp.float32)[LABELS]
    assert dense(X, one_hot, where=mask)[0] == 0


@row("−inf logits")
def test_minus_infinite_logits():
    x = X.at[0, 0].set(-INF)
    want = truth(Z[:1, 1:], [2])[0]
    np.testing.assert_allclose(integer(x, LABELS)[0], want, rtol=ULPS)
    assert gradient(lambda x: integer(x, LABELS), x)[0, 0] == 0
    one_hot = jnp.eye(4, dtype=jnp.float32)[LABELS]
    np.testing.assert_allclose(dense(x, one_hot)[0], want, rtol=ULPS)
    assert integer(x, np.array([0, 0]))[0] == INF


@row("+inf or NaN in a row, or a whole row at −inf")
@pytest.mark.parametrize("bad", [[INF, 0, 0, 0], [math.nan, 0, 0, 0], [-INF] * 4])
def test_a_bad_row(bad):
    x = jnp.stack([jnp.asarray(bad, jnp.float32), X[1]])
    loss, d = integer(x, LABELS), gradient(lambda x: integer(x, LABELS), x)
    assert np.isnan(loss[0])
    assert np.isnan(d[0]).all()
    assert loss[1] == integer(X, LABELS)[1]
    np.testing.assert_array_equal(d[1], gradient(lambda x: integer(x, LABELS), X)[1])
    np.testing.assert_array_equal(jaxsoftmax.logsumexp(x, axis=-1), jax.nn.logsumexp(x, axis=-1))


@row("label outside [0, C)")
@pytest.mark.parametrize("label", [-1, 4, -100])
def test_label_outside(label):
    labels = np.array([label, 0])
    assert np.isnan(integer(X, labels)[0])
    assert np.isnan(gradient(lambda x: integer(x, labels), X)[0]).all()
    used = gradient(lambda x: integer(x, labels)[1:], X)
    assert (used[0] == 0).all()
    np.testing.assert_array_equal(used[1], gradient(lambda x: integer(x, LABELS), X)[1])
    for options in ({}, {"class_weights": jnp.ones(4)}):
        mean = lambda x, options=options: head(x, jnp.eye(4), labels, **options)  # noqa: E731
        assert np.isnan(mean(X))
        d = gradient(mean, X)
        assert np.isnan(d[0]).all()
        np.testing.assert_allclose(d[1], used[1] / 2, rtol=ULPS)


@row("`soft_cap`, `temperature`")
def test_soft_cap_and_temperature():
    z = 2.0 * np.tanh(Z / 2.0) / 0.5
    got = integer(X, LABELS, soft_cap=2.0, temperature=0.5)
    np.testing.assert_allclose(got, truth(z), rtol=ULPS)
    x = X.at[0, 0].set(-INF)
    np.testing.assert_allclose(
        integer(x, LABELS, soft_cap=2.0)[0],
        truth(2.0 * np.tanh(Z[:1, 1:] / 2.0), [2])[0],
        rtol=ULPS,
    )


@row("`label_smoothing` ε")
def test_label_smoothing():
    spread = np.mean([truth(labels=[k, k]) for k in range(4)], axis=0)
    got = integer(X, LABELS, label_smoothing=0.1)
    np.testing.assert_allclose(got, 0.9 * truth() + 0.1 * spread, rtol=ULPS)
    x = X.at[:, 0].set(-INF)
    labels = np.array([3, 1])
    spread = np.mean([truth(Z[:, 1:], [k, k]) for k in range(3)], axis=0)
    want = 0.9 * truth(Z[:, 1:], labels - 1) + 0.1 * spread
    np.testing.assert_allclose(integer(x, labels, label_smoothing=0.1), want, rtol=ULPS)


@row("`class_weights`, and with smoothing")
def test_class_weights():
    weights = np.array([0.5, 2.0, 0.0, 1.5])
    nll = np.stack([truth(labels=[k, k]) for k in range(4)], axis=-1)
    got = integer(X, LABELS, class_weights=weights.astype(np.float32), label_smoothing=0.2)
    want = 0.8 * (weights * nll)[[0, 1], LABELS] + 0.2 * (weights * nll).sum(-1) / 4
    np.testing.assert_allclose(got, want, rtol=ULPS)
    mean = head(X, jnp.eye(4), LABELS, class_weights=weights.astype(np.float32))
    np.testing.assert_allclose(
        mean, (weights[LABELS] * truth()).sum() / weights[LABELS].sum(), rtol=ULPS
    )


@row("`z_loss` λ")
def test_z_loss():
    lse = np.log(np.exp(Z).sum(-1))
    np.testing.assert_allclose(integer(X, LABELS, z_loss=0.01), truth() + 0.01 * lse**2, rtol=ULPS)


@row("`ignore_index`")
def test_ignore_index():
    x = X.at[1].set(math.nan)
    labels = np.array([3, -100])
    loss = integer(x, labels, ignore_index=-100)
    np.testing.assert_allclose(loss, [truth()[0], 0], rtol=ULPS)
    assert (gradient(lambda x: integer(x, labels, ignore_index=-100), x)[1] == 0).all()
    mean = head(X, jnp.eye(4), labels, ignore_index=-100)
    np.testing.assert_allclose(mean, truth()[0], rtol=ULPS)
    d = jax.grad(lambda k: head(x, k, labels, ignore_index=-100))(jnp.eye(4))
    assert np.isfinite(d).all()


@row("`weights` of a head")
def test_weights_of_a_head():
    def mean(w, x, kernel=None):
        return head(x, jnp.eye(4) if kernel is None else kernel, LABELS, weights=w)

    w = jnp.array([2.0, 0.0])
    np.testing.assert_allclose(mean(w, X), truth()[0], rtol=ULPS)
    # (w₀ l₀ + w₁ l₁) / (w₀ + w₁), by w₁ at w₁ = 0
    np.testing.assert_allclose(jax.grad(mean)(w, X)[1], (truth()[1] - truth()[0]) / 2, rtol=ULPS)
    broken = X.at[1].set(math.nan)
    np.testing.assert_allclose(mean(w, broken), truth()[0], rtol=ULPS)
    d = jax.grad(mean, (0, 1, 2))(w, broken, jnp.eye(4))
    assert all(np.isfinite(x).all() for x in d)
    assert d[0][1] == 0
    assert (d[1][1] == 0).all()


@row("`compute_dtype` of a head")
def test_compute_dtype_of_a_head():
    kernel = np.eye(4, dtype=np.float32) * np.float32(1.01)

    def mean(x, k, **options):
        return head(x, k, LABELS, **options)

    given = X.astype(jnp.bfloat16), kernel
    want = truth(Z * float(jnp.bfloat16(1.01))).mean()
    value, ds = jax.value_and_grad(partial(mean, compute_dtype=jnp.bfloat16), (0, 1))(*given)
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, want, rtol=ULPS)
    assert [d.dtype for d in ds] == [jnp.bfloat16, jnp.float32]
    assert (ds[1] != ds[1].astype(jnp.bfloat16).astype(jnp.float32)).any()
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose(mean(*given), truth(Z * float(kernel[0, 0])).mean(), rtol=ULPS)


@row("`transpose_kernel` of a head")
def test_transpose_kernel_of_a_head():
    kernel = np.arange(20, dtype=np.float32).reshape(4, 5) % 7 / 7
    step = jax.value_and_grad(lambda k, **options: head(X, k, LABELS, **options))
    (value, d), (want, want_d) = step(kernel.T, transpose_kernel=True), step(kernel)
    assert d.shape == (5, 4)
    np.testing.assert_allclose(value, want, rtol=ULPS)
    np.testing.assert_allclose(d.T, want_d, rtol=0, atol=ULPS)
    np.testing.assert_allclose(want, truth(Z @ kernel).mean(), rtol=ULPS)


@row("several labels `[*tokens, K]` of `label_log_probs`, `linear_log_probs`")
def test_several_labels():
    several = np.array([[0, 2, 2], [3, 1, 4]])
    want = np.stack([-truth(labels=k) for k in np.minimum(several, 3).T], axis=-1)
    want[1, 2] = np.nan  # out of range
    eye = jnp.eye(2, dtype=jnp.float32)
    for out in (
        jaxsoftmax.label_log_probs(X, several),
        jaxsoftmax.label_log_probs(X.T, several, axis=0),
        jaxsoftmax.linear_log_probs(eye, X, several),
    ):
        np.testing.assert_allclose(out.log_probs, want, rtol=ULPS)
        assert out.log_normalizers.shape == (2,)
    log_probs = lambda x: jaxsoftmax.label_log_probs(x, several).log_probs  # noqa: E731
    assert np.isnan(gradient(log_probs, X)).tolist() == [[False] * 4, [True] * 4]
    assert np.isfinite(gradient(lambda x: log_probs(x)[:, :2], X)).all()


@row("`with_predictions`")
def test_with_predictions():
    x = jnp.concatenate([X, X[:1].at[0, 2].set(jnp.nan), X[:1].at[0, 1].set(INF)])
    out = jaxsoftmax.label_log_probs(x, np.zeros(4, int), with_predictions=True)
    assert out.predictions is not None
    assert out.predictions.dtype == jnp.int32
    assert out.predictions.tolist() == [3, 1, -1, 1]  # the second row has two maxima
    assert jaxsoftmax.label_log_probs(x, np.zeros(4, int)).predictions is None


@row("`where` of `linear_log_probs`")
def test_where_of_linear_log_probs():
    hidden = np.array([[1.0, 2.0], [np.nan, 0.0]], np.float32)
    where, kernel = np.array([True, False]), np.ones((2, 3), np.float32)

    def fields(hidden):
        options: Any = {"where": where, "with_entropy": True, "with_predictions": True}
        return jaxsoftmax.linear_log_probs(hidden, kernel, np.array([1, 99]), **options)

    out = fields(hidden)
    assert [float(field[1]) for field in out if field is not None] == [0, 0, 0, -1]
    assert float(out.log_probs[0]) == pytest.approx(-np.log(3))
    d = jax.grad(lambda hidden: jnp.sum(fields(hidden).log_normalizers))(hidden)
    assert d[1].tolist() == [0, 0]


@row("which options may be traced and differentiated")
def test_which_options_may_be_traced_and_differentiated():
    values = {"label_smoothing": 0.1, "z_loss": 0.01, "soft_cap": 5.0, "temperature": 0.7}
    primals = jax.tree.map(jnp.float32, values)
    weights = jnp.array([0.5, 2.0, 0.3, 1.5])

    def mean(options, weights):
        return integer(X, LABELS, class_weights=weights, **options).mean()

    got = jax.jit(jax.grad(mean, (0, 1)))(primals, weights)
    with jax.enable_x64(True):  # central differences: an error of 1e-10 in float64
        step = 1e-5
        x = jnp.asarray(Z)

        def at(options, weights):
            return float(integer(x, LABELS, class_weights=weights, **options).mean())

        wide = np.asarray(weights, np.float64)
        for name, value in values.items():
            up, down = ({**values, name: value + s} for s in (step, -step))
            slope = (at(up, wide) - at(down, wide)) / (2 * step)
            np.testing.assert_allclose(got[0][name], slope, rtol=1e-5, err_msg=name)
        for k in range(4):
            up, down = (wide + s * np.eye(4)[k] for s in (step, -step))
            slope = (at(values, up) - at(values, down)) / (2 * step)
            np.testing.assert_allclose(got[1][k], slope, rtol=1e-5)
    with pytest.raises(TypeError, match="ignore_index"):
        jax.jit(lambda i: integer(X, LABELS, ignore_index=i))(3)


@row("order of `linear_top_k`")
def test_order_of_top_k():
    found = jaxsoftmax.linear_top_k(X, jnp.eye(4), 4)
    np.testing.assert_array_equal(found.labels, [[3, 0, 2, 1], [1, 2, 0, 3]])
    want = np.stack([-truth(labels=found.labels[:, i]) for i in range(4)], axis=-1)
    np.testing.assert_allclose(found.log_probs, want, rtol=ULPS)
    left_out = jaxsoftmax.linear_top_k(X, jnp.eye(4), 4, bias=jnp.array([0, -INF, -INF, 0]))
    np.testing.assert_array_equal(left_out.labels, [[3, 0, 1, 2], [0, 3, 1, 2]])
    assert (left_out.log_probs[:, 2:] == -INF).all()
    for bad in (INF, math.nan):
        bias = jnp.array([0, 0, 0, bad])
        assert np.isnan(jaxsoftmax.linear_top_k(X, jnp.eye(4), 2, bias=bias).log_probs).all()


@row("what `linear_sample` draws from")
def test_what_a_sample_is_drawn_from():
    n = 4000
    x = jnp.broadcast_to(X[1], (n, 4))
    draw: Any = partial(jaxsoftmax.linear_sample, jax.random.key(0), x, jnp.eye(4))
    for options, z in (
        ({}, Z[1]),
        ({"temperature": 4.0}, Z[1] / 4),
        ({"top_k": 2}, np.where([False, True, True, False], Z[1], -INF)),
    ):
        p = np.exp(z) / np.exp(z).sum()
        drawn = draw(**options)
        share = np.bincount(drawn.labels, minlength=4) / n
        assert (np.abs(share - p) <= 4 * np.sqrt(p * (1 - p) / n)).all()  # one key in 5000 fails
        np.testing.assert_allclose(drawn.log_probs, np.log(p[drawn.labels]), rtol=ULPS, atol=ULPS)
    for bad in (jnp.array([0, 0, 0, INF]), jnp.array([math.nan, 0, 0, 0]), jnp.full(4, -INF)):
        drawn = draw(bias=bad)
        assert (drawn.labels == -1).all()
        assert np.isnan(drawn.log_probs).all()


@row("derivative of `linear_top_k` and `linear_sample`")
def test_derivative_of_top_k_and_sample():
    calls: list[Any] = [
        partial(jaxsoftmax.linear_top_k, k=2),
        partial(jaxsoftmax.linear_sample, jax.random.key(0)),
    ]
    for call in calls:
        with pytest.raises(TypeError, match="linear_log_probs"):
            jax.grad(lambda x, call=call: call(x, jnp.eye(4)).log_probs.sum())(X)

        def log_prob(x, call=call):
            labels = call(jax.lax.stop_gradient(x), jnp.eye(4)).labels.reshape(2, -1)[:, 0]
            return jaxsoftmax.linear_log_probs(x, jnp.eye(4), labels).log_probs.sum()

        assert (jax.grad(log_prob)(X) != 0).all()


@row("dense labels")
def test_dense_labels():
    y = np.array([0.5, 0.0, 1.0, 2.0])  # for both examples
    nll = np.stack([truth(labels=[k, k]) for k in range(4)], axis=-1)
    labels = jnp.asarray(y, jnp.float32)[None]
    np.testing.assert_allclose(dense(X, labels), nll @ y, rtol=ULPS)
    p = np.exp(-nll)
    d = gradient(lambda x: dense(x, labels), X)
    np.testing.assert_allclose(d, y.sum() * p - y, rtol=0, atol=4 * ULPS)
    np.testing.assert_allclose(gradient(lambda y: dense(X, y), labels)[0], nll.sum(0), rtol=ULPS)


def divergence(z: Any, t: Any) -> Any:
    """Σ p (log p − log q) in float64, from the definition; 0 · −∞ is 0."""
    log_q, log_p = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (z, t))
    return np.sum(np.exp(log_p) * np.where(log_p == -INF, 0, log_p - log_q), axis=-1)


def js_divergence(z: Any, t: Any, w: float = 0.5) -> Any:
    """From the definition, by the logits of the mixture."""
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (t, z))
    m = np.log((1 - w) * p + w * q)
    return (1 - w) * divergence(m, t) + w * divergence(m, z)


@row("direction of a divergence")
def test_direction_of_a_divergence():
    forward, reverse = divergence(Z[0], Z[1]), divergence(Z[1], Z[0])
    assert abs(forward - reverse) > 0.1
    np.testing.assert_allclose(kl(X[0], X[1]), forward, rtol=ULPS)
    np.testing.assert_allclose(kl(X[1], X[0]), reverse, rtol=ULPS)
    for w in (0.5, 0.2):
        want = js_divergence(Z[0], Z[1], w)
        np.testing.assert_allclose(js(X[0], X[1], weight=w), want, rtol=ULPS)
        np.testing.assert_allclose(js(X[1], X[0], weight=1 - w), want, rtol=ULPS)
    eye = jnp.eye(4)
    np.testing.assert_allclose(head_kl(X[:1], eye, X[1:], eye), forward, rtol=ULPS)
    np.testing.assert_allclose(head_js(X[:1], eye, X[1:], eye), js_divergence(*Z), rtol=ULPS)


@row("`temperature` of a divergence")
def test_temperature_of_a_divergence():
    z, t = (2.0 * np.tanh(z / 2.0) / 3.0 for z in Z)
    options: Any = {"temperature": 3.0, "soft_cap": 2.0}
    np.testing.assert_allclose(kl(*X, **options), divergence(z, t), rtol=ULPS)
    np.testing.assert_allclose(js(*X, **options), js_divergence(z, t), rtol=ULPS)


@row("equal logits")
@pytest.mark.parametrize("function", [kl, js])
def test_equal_logits(function):
    assert function(X, X).tolist() == [0, 0]
    for d in jax.grad(lambda x, y: function(x, y).sum(), (0, 1))(X, X):
        assert (d == 0).all()
    close = Z * (1 + np.geomspace(1e-7, 1, 300)[:, None, None])
    assert (function(close.astype(np.float32), np.tile(X, (300, 1, 1))) >= 0).all()


@row("−inf logits of a divergence")
def test_minus_infinite_logits_of_a_divergence():
    (z, t), (x, y) = Z, X
    gone, left_out = x.at[0].set(-INF), y.at[0].set(-INF)
    np.testing.assert_allclose(kl(gone, left_out), divergence(z[1:], t[1:]), rtol=ULPS)
    np.testing.assert_allclose(js(gone, left_out), js_divergence(z[1:], t[1:]), rtol=ULPS)
    # Σ_k p_k (log p_k − log q_k) + q_k − p_k, class by class; of p_k = 0 it is q_k.
    only_p = np.where(np.arange(4) == 0, -INF, t)
    q, p = (np.exp(a) / np.exp(a).sum() for a in (z, only_p))
    others = np.sum(p[1:] * np.log(p[1:] / q[1:]) + q[1:] - p[1:])
    np.testing.assert_allclose(kl(x, left_out), others + q[0], rtol=ULPS)
    assert kl(gone, y) == INF
    small = p.min() / 2  # finite: at most log 2
    for pair in ((x, left_out), (gone, y)):
        assert small < js(*pair) < math.log(2)


@row("a row of a divergence with NaN, +inf or nothing but −inf, in either logits")
@pytest.mark.parametrize("bad", [[INF, 0, 0, 0], [math.nan, 0, 0, 0], [-INF] * 4])
@pytest.mark.parametrize("function", [kl, js])
def test_a_bad_row_of_a_divergence(function, bad):
    right = X, X[::-1]
    broken = jnp.stack([jnp.asarray(bad, jnp.float32), X[1]])
    gradients = jax.grad(lambda x, y: function(x, y).sum(), (0, 1))
    for pair in ((broken, right[1]), (right[1], broken)):
        good = (X, X[::-1]) if pair[0] is broken else (X[::-1], X)
        got, want = function(*pair), function(*good)
        assert np.isnan(got[0])
        assert got[1] == want[1]
        for d, unbroken in zip(gradients(*pair), gradients(*good), strict=True):
            assert np.isnan(d[0]).all()
            np.testing.assert_array_equal(d[1], unbroken[1])


@row("`where` of a divergence")
def test_where_of_a_divergence():
    classes = np.array([[True, False, True, True], [False] * 4])
    kept = [0, 2, 3]
    for function, definition in ((kl, divergence), (js, js_divergence)):
        masked = partial(function, where=classes)
        want = definition(Z[0, kept], Z[1, kept])
        np.testing.assert_allclose(masked(X, X[::-1]), [want, 0], rtol=ULPS)
        for d in jax.grad(lambda x, y, f=masked: f(x, y).sum(), (0, 1))(X, X[::-1]):
            assert (d[~classes] == 0).all()
            assert (d[classes] != 0).all()
        of_examples = function(X, X[::-1], where=np.array([[False], [True]]))
        np.testing.assert_allclose(of_examples, [0, definition(Z[1], Z[0])], rtol=ULPS)


@row("`weight` of a JS divergence")
def test_weight_of_a_js_divergence():
    for w in (0.0, 1.0, -0.5):
        with pytest.raises(ValueError, match="weight must be between 0 and 1, and neither"):
            js(*X, weight=w)
        assert not js(*X, weight=1e-6) < 0
    # The next term is smaller by w times the ratio of the probabilities, below 400 here.
    np.testing.assert_allclose(js(*X, weight=1e-6), 1e-6 * divergence(Z[1], Z[0]), rtol=1e-3)
    last = np.float32(1 - 1e-6)  # 1 − 17 · 2⁻²⁴
    want = (1 - float(last)) * divergence(Z[0], Z[1])
    np.testing.assert_allclose(js(*X, weight=last), want, rtol=1e-3)


@row("`where` of `linear_kl_divergence`, `linear_js_divergence`")
def test_where_of_linear_divergences():
    broken = jnp.stack([X[0], jnp.full(4, math.nan)])
    where, eye = np.array([True, False]), jnp.eye(4)
    for function, definition in ((head_kl, divergence), (head_js, js_divergence)):
        of_heads = partial(function, where=where)
        want = definition(Z[0], Z[1])
        args = broken, eye, broken.at[0].set(X[1]), eye
        np.testing.assert_allclose(of_heads(*args), want, rtol=ULPS)
        each = of_heads(*args, reduction=None)
        np.testing.assert_allclose(each, [want, 0], rtol=ULPS)
        d = jax.grad(of_heads, (0, 1, 2, 3))(*args)
        assert all(np.isfinite(x).all() for x in d)
        assert (d[0][1] == 0).all()
        assert (d[2][1] == 0).all()
        bias = jnp.array([0, -INF, 0, 0])
        kept = [0, 2, 3]
        want = definition(Z[0, kept], Z[1, kept])
        got = of_heads(*args, bias=bias, target_bias=bias)
        np.testing.assert_allclose(got, want, rtol=ULPS)


@row("`axis_name`")
def test_axis_name():
    mesh = jax.make_mesh((2,), ("vocab",), devices=jax.devices()[:2], axis_types=(AxisType.Auto,))
    local = partial(integer, axis_name="vocab")
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(P(None, "vocab"), P()), out_specs=P())
    np.testing.assert_allclose(jax.jit(sharded)(X, LABELS), truth(), rtol=ULPS)


@row("tuple of axes")
def test_tuple_of_axes():
    x = X.reshape(2, 2, 2)
    np.testing.assert_array_equal(integer(x, LABELS, axis=(1, 2)), integer(X, LABELS))
    swapped = jnp.swapaxes(x, 1, 2)
    np.testing.assert_array_equal(integer(swapped, LABELS, axis=(2, 1)), integer(X, LABELS))


@row("empty input")
def test_empty_input():
    assert integer(X[:0], LABELS[:0]).shape == (0,)
    assert jaxsoftmax.softmax(X[:, :0]).shape == (2, 0)
    np.testing.assert_array_equal(dense(X[:, :0], X[:, :0]), [0, 0])
    with pytest.raises(ValueError, match="at least one class"):
        integer(X[:, :0], LABELS)
    with pytest.raises(ValueError, match="at least one class"):
        head(X, X.T[:, :0], LABELS)


@row("wrong type, dtype or shape")
def test_wrong_type_dtype_or_shape():
    function = "softmax_cross_entropy_with_integer_labels"
    with pytest.raises(TypeError, match=rf"^{function}: logits must have .* got int"):
        integer(LABELS[None], LABELS)
    with pytest.raises(ValueError, match=rf"^{function}: labels must have shape \(2,\).* \(2, 1\)"):
        integer(X, LABELS[:, None])
