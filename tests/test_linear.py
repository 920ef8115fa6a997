# SPDX-License-Identifier: Apache-2.0
"""The linear head against the plain one in float64, whatever the chunks; and what it computes."""

import contextlib
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import on_device
from jax import export

import jaxsoftmax

SHAPES = [(1, 3, 2), (7, 5, 1), (33, 17, 130), (64, 40, 2049), (5, 300, 257)]
CHUNKS = {(33, 17, 130): [1, 2, 3, 7, 13, 64, 1000]}


def problem(n, width, classes, dtype=jnp.float32, scale=1.0):
    rng = np.random.default_rng(n * width + classes)
    hidden = rng.standard_normal((n, width)) * scale
    kernel = rng.standard_normal((width, classes)) / np.sqrt(width)
    bias = rng.standard_normal(classes)
    weights = rng.uniform(0, 2, n)
    labels = rng.integers(0, classes, n).astype(np.int32)
    arrays = (jnp.asarray(a, dtype) for a in (hidden, kernel, bias))
    return *arrays, jnp.asarray(weights, jnp.float32), jnp.asarray(labels)


def truth(hidden, kernel, bias, labels, cotangents):
    """Losses and gradients of Σ cotangent · loss, from the definitions in float64."""
    h, k, b, g = (np.asarray(a, np.float64) for a in (hidden, kernel, bias, cotangents))
    z = h @ k + b
    m = z.max(-1, keepdims=True)
    e = np.exp(z - m)
    p = e / e.sum(-1, keepdims=True)
    rows = np.arange(len(z))
    losses = (m[:, 0] + np.log(e.sum(-1))) - z[rows, labels]
    d = p.copy()
    d[rows, labels] = 0
    d[rows, labels] = -d.sum(-1)
    d *= g[:, None]
    return losses, (d @ k.T, h.T @ d, d.sum(0))


def assert_close(got, expected, magnitude, ulps):
    """Errors in float32 ulps of `magnitude`, the sum of the absolute terms or an upper bound."""
    error = np.abs(np.asarray(got, np.float64) - expected).max()
    assert error <= ulps * 2.0**-23 * magnitude, (error, magnitude)


def magnitudes(hidden, kernel, g):
    """Of what is summed in each gradient: |d_logits| ≤ 2 |g| in each row's sum."""
    h, k, g = (np.abs(np.asarray(a, np.float64)) for a in (hidden, kernel, g))
    return (2 * g.max() * k.max(), 2 * (g.sum() * h.max()), 2 * g.sum())


@pytest.mark.parametrize("gradients", ["auto", "recompute"])
@pytest.mark.parametrize("reduction", ["mean", "sum", None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_and_gradients_whatever_the_chunks(shape, reduction, gradients):
    hidden, kernel, bias, weights, labels = problem(*shape)
    w = np.asarray(weights, np.float64)
    cotangents = np.random.default_rng(1).standard_normal(shape[0])
    if reduction is None:
        outer = jnp.asarray(cotangents, jnp.float32)
        g = w * np.asarray(outer, np.float64)
    else:
        outer = jnp.float32(1)
        g = w / w.sum() if reduction == "mean" else w
    losses, expected = truth(hidden, kernel, bias, labels, g)

    for chunk in CHUNKS.get(shape, [3, 1000]):

        def total(hidden, kernel, bias, chunk=chunk):
            out = jaxsoftmax.linear_softmax_cross_entropy(
                hidden,
                kernel,
                labels,
                bias=bias,
                weights=weights,
                reduction=reduction,
                gradients=gradients,
                chunk_size=chunk,
            )
            return jnp.sum(out * outer)

        value, got = jax.jit(jax.value_and_grad(total, (0, 1, 2)))(hidden, kernel, bias)
        # float32 products of width H: an error of about √H ulps in logits of size < 20.
        tolerance = 40 * np.sqrt(shape[1])
        assert_close(value, np.sum(g * losses), np.abs(g * (losses + 1)).sum(), tolerance)
        for d, expected_d, size in zip(got, expected, magnitudes(hidden, kernel, g), strict=True):
            if shape[2] == 1:
                assert not np.any(d)
            assert_close(d, expected_d, size, tolerance)


@pytest.mark.parametrize(("backend", "mebibytes"), [("cpu", 56), ("gpu", 448), ("tpu", 448)])
@pytest.mark.parametrize("classes", [100, 10_000, 50_257, 1_000_000])
@pytest.mark.parametrize("devices", [1, 8, 12, 600])
def test_the_default_chunk_is_the_documented_one(monkeypatch, devices, classes, backend, mebibytes):
    """What a chunk's float32 logits may hold, from 256 to 4096 tokens; one token more is two.

    Where there are more devices, multiples of their number.
    """
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "device_count", lambda: devices)
    most = min(max(mebibytes * 2**20 // (4 * classes), 256), 4096)
    most = max(most // devices, 1) * devices
    half = -(-(most + 1) // 2)
    for tokens, chunk in ((most, most), (most + 1, -(-half // devices) * devices)):
        seen = set()

        def loss(logits, seen=seen):
            seen.add(logits.shape)
            return logits[:, 0]

        hidden, kernel = (jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, 2), (2, classes)))
        jax.eval_shape(lambda h, k, loss=loss: jaxsoftmax.linear_loss(loss, h, k), hidden, kernel)
        assert seen == {(chunk, classes)}


def test_the_default_block_is_the_documented_one():
    hidden, kernel, _, _, labels = problem(5, 3, 5000)

    def program(chunk_size):
        def f(hidden, kernel):
            return jaxsoftmax.linear_log_probs(hidden, kernel, labels, chunk_size=chunk_size)

        return jax.jit(f).lower(hidden, kernel).as_text()

    assert program(None) == program(2048)
    assert program(None) != program(2049)


@pytest.mark.parametrize("gradients", ["auto", "recompute"])
def test_weights_are_differentiable(gradients):
    hidden, kernel, bias, weights, labels = problem(33, 17, 130)
    losses, _ = truth(hidden, kernel, bias, labels, weights)

    def mean(weights):
        return jaxsoftmax.linear_softmax_cross_entropy(
            hidden, kernel, labels, bias=bias, weights=weights, gradients=gradients, chunk_size=7
        )

    w = np.asarray(weights, np.float64)
    expected = (losses - (w * losses).sum() / w.sum()) / w.sum()
    assert_close(jax.grad(mean)(weights), expected, 20 / w.sum(), 40)


def test_any_loss_its_arguments_and_what_it_closes_over():
    hidden, kernel, bias, _, _ = problem(5, 300, 257)
    targets = jnp.asarray(np.random.default_rng(0).standard_normal((5, 257)), jnp.float32)

    def head(scale, targets, hidden, reduction):
        def squared(logits, targets):
            return jnp.mean((scale * logits - targets) ** 2, axis=-1)

        out = jaxsoftmax.linear_loss(
            squared, hidden, kernel, targets, bias=bias, reduction=reduction, chunk_size=2
        )
        return jnp.mean(out)

    def plain(scale, targets, hidden):
        logits = jnp.dot(hidden, kernel, precision="highest") + bias[None]
        return jnp.mean((scale * logits - targets) ** 2)

    arguments = (jnp.float32(1.3), targets, hidden)
    expected, expected_d = jax.value_and_grad(plain, (0, 1, 2))(*arguments)
    for reduction in ("mean", None):
        value, d = jax.value_and_grad(head, (0, 1, 2))(*arguments, reduction)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        for got, want in zip(d, expected_d, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize(("soft_cap", "temperature"), [(None, 1.0), (5.0, 0.7)])
def test_log_probs_agree_with_those_of_the_logits(soft_cap, temperature):
    hidden, kernel, bias, _, labels = problem(33, 17, 300)
    rng = np.random.default_rng(2)
    cotangents = [jnp.asarray(rng.standard_normal(33), jnp.float32) for _ in range(3)]

    def weighted(out):
        return sum(jnp.sum(g * o) for g, o in zip(cotangents, out, strict=True))

    def head(hidden, kernel, bias, temperature, chunk):
        return jaxsoftmax.linear_log_probs(
            hidden,
            kernel,
            labels,
            bias=bias,
            soft_cap=soft_cap,
            temperature=temperature,
            with_entropy=True,
            chunk_size=chunk,
        )

    def plain(hidden, kernel, bias, temperature):
        z = jnp.dot(hidden, kernel, precision="highest") + bias[None]
        z = z if soft_cap is None else soft_cap * jnp.tanh(z / soft_cap)
        log_p = jax.nn.log_softmax(z / temperature)
        entropies = -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
        label = jnp.take_along_axis(log_p, labels[:, None], axis=-1)[:, 0]
        return label, jax.nn.logsumexp(z / temperature, axis=-1), entropies

    operands: Any = (hidden, kernel, bias, jnp.float32(temperature))
    expected = plain(*operands)
    expected_d = jax.grad(lambda *o: weighted(plain(*o)), (0, 1, 2, 3))(*operands)
    for chunk in (37, 299, 300, 999):
        out = head(*operands, chunk=chunk)
        for got, want in zip(jax.tree.leaves(out), expected, strict=True):
            np.testing.assert_allclose(got, want, rtol=2e-5, atol=2e-6)
        d = jax.grad(lambda *o, c=chunk: weighted(head(*o, chunk=c)), (0, 1, 2, 3))(*operands)
        for got, want in zip(d, expected_d, strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("gradients", ["in_forward", "recompute"])
@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_bfloat16_is_no_worse_than_the_plain_head_with_upcast(scale, gradients):
    hidden, kernel, bias, _, labels = problem(64, 40, 2049, jnp.bfloat16, scale)
    losses, expected = truth(hidden, kernel, bias, labels, np.full(64, 1 / 64))

    def head(hidden, kernel):
        return jaxsoftmax.linear_softmax_cross_entropy(
            hidden, kernel, labels, bias=bias, gradients=gradients, chunk_size=30
        )

    def plain(hidden, kernel):
        z = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
        log_p = jax.nn.log_softmax(z + bias.astype(jnp.float32)[None])
        return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=-1))

    value, got = jax.value_and_grad(head, (0, 1))(hidden, kernel)
    _, baseline = jax.value_and_grad(plain, (0, 1))(hidden, kernel)
    np.testing.assert_allclose(value, losses.mean(), rtol=1e-5)
    for d, base, want in zip(got, baseline, expected[:2], strict=True):
        assert d.dtype == jnp.bfloat16
        error, base_error = (
            np.linalg.norm(np.asarray(a, np.float64) - want) / np.linalg.norm(want)
            for a in (d, base)
        )
        assert error <= 1.05 * base_error + 2.0**-10


@pytest.mark.parametrize("gradients", ["in_forward", "recompute"])
def test_confident_columns_of_d_kernel_keep_bfloat16_accuracy(gradients):
    # One token a class, logits 20 at the label and about 0 elsewhere: p = 1 − 1e-6.
    n = 32
    hidden = (20 * jnp.eye(n)).astype(jnp.bfloat16)
    noise = np.random.default_rng(0).standard_normal((n, n)) / 64
    kernel = jnp.asarray(np.eye(n) + noise, jnp.bfloat16)
    labels = jnp.arange(n, dtype=jnp.int32)
    _, (_, expected, _) = truth(hidden, kernel, jnp.zeros(n), labels, np.full(n, 1.0))

    def head(kernel):
        return jaxsoftmax.linear_softmax_cross_entropy(
            hidden, kernel, labels, reduction="sum", gradients=gradients
        )

    got = np.asarray(jax.grad(head)(kernel), np.float64)
    np.testing.assert_allclose(np.diag(got), np.diag(expected), rtol=0.01)


@pytest.mark.parametrize(("gradients", "products"), [("in_forward", 3), ("recompute", 4)])
def test_nothing_unneeded_is_computed(gradients, products):
    hidden, kernel, _, _, labels = problem(8, 4, 16)

    def head(hidden, kernel):
        return jaxsoftmax.linear_softmax_cross_entropy(hidden, kernel, labels, gradients=gradients)

    def count(f):
        return jax.jit(f).lower(hidden, kernel).as_text().count("dot_general")

    assert count(head) == 1
    assert count(jax.grad(head)) == products - 1
    assert count(jax.grad(head, 1)) == products - 1
    assert count(jax.grad(head, (0, 1))) == products


def test_d_kernel_is_added_up_by_block_of_columns():
    """On one CPU device in blocks of 8 MiB of the product, and the columns that are left."""
    hidden, kernel, bias, _, labels = problem(7, 2048, 2 * 1024 + 3)
    labels = labels.at[:3].set(jnp.asarray([0, 1024, 2050]))  # one in each

    def total(hidden, kernel, bias):
        return jaxsoftmax.linear_softmax_cross_entropy(
            hidden, kernel, labels, bias=bias, reduction="sum", chunk_size=4
        )

    with contextlib.contextmanager(on_device)("one CPU device"):
        got = jax.jit(jax.grad(total, (0, 1, 2)))(hidden, kernel, bias)
    g = np.ones(7)
    _, expected = truth(hidden, kernel, bias, labels, g)
    for d, expected_d, size in zip(got, expected, magnitudes(hidden, kernel, g), strict=True):
        assert_close(d, expected_d, size, 40 * np.sqrt(2048))


def test_d_kernel_of_a_float32_mean_is_finished_by_the_loop():
    """The divisor goes into the weights of the tokens: no pass over d_kernel follows."""
    hidden, kernel, _, _, labels = problem(64, 40, 2049)

    def head(kernel):
        return jaxsoftmax.linear_softmax_cross_entropy(hidden, kernel, labels, chunk_size=16)

    program = jax.jit(jax.grad(head)).lower(kernel).compile().as_text()
    assert program
    assert re.search(r"f32\[40,2049\]\S* add\(", program)  # what such a pass would look like
    assert not re.search(r"f32\[40,2049\]\S* multiply\(", program)


@pytest.mark.wide
@pytest.mark.parametrize("gradients", ["in_forward", "recompute"])
def test_transforms(gradients):
    hidden, kernel, bias, _, labels = problem(7, 5, 40)

    def head(hidden, kernel):
        return jaxsoftmax.linear_softmax_cross_entropy(
            hidden, kernel, labels, bias=bias, gradients=gradients, chunk_size=3
        )

    def plain(hidden, kernel):
        log_p = jax.nn.log_softmax(jnp.dot(hidden, kernel, precision="highest") + bias[None])
        return -jnp.mean(jnp.take_along_axis(log_p, labels[:, None], axis=-1))

    def check(transform):
        got, want = transform(head), transform(plain)
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(g, w, rtol=2e-4, atol=1e-5 * np.abs(w).max())

    v = jnp.ones_like(hidden)
    both = (jnp.stack([hidden, 2 * hidden]), jnp.stack([kernel, -kernel]))
    check(lambda f: jax.vmap(f, (0, None))(both[0], kernel))
    check(lambda f: jax.vmap(jax.grad(f, (0, 1)), (None, 0))(hidden, both[1]))
    check(lambda f: jax.vmap(jax.grad(f, (0, 1)))(*both))
    check(lambda f: jax.jvp(jax.grad(f), (hidden, kernel), (v, jnp.ones_like(kernel)))[1])
    check(lambda f: jax.grad(lambda h: jnp.vdot(jax.grad(f)(h, kernel), v))(hidden))
    check(lambda f: jax.grad(jax.checkpoint(f), (0, 1))(hidden, kernel))
    check(lambda f: jax.grad(lambda h, k: 1024 * f(h, k), (0, 1))(hidden, kernel))


@pytest.mark.parametrize("name", ["in_forward", "recompute", "unreduced", "log_probs"])
def test_what_is_differentiated_is_asked_anew(name):
    """Of one traced head, whatever was differentiated before: calls leave no mark."""
    hidden, kernel, bias, _, labels = problem(7, 5, 40)
    integer = jaxsoftmax.softmax_cross_entropy_with_integer_labels

    @jax.jit
    def head(hidden, kernel, bias, scale):
        if name == "log_probs":
            out = jaxsoftmax.linear_log_probs(hidden, kernel, labels, bias=bias, temperature=scale)
            return jnp.mean(out.log_probs)
        if name == "unreduced":
            loss = lambda z, y: scale * integer(z, y)  # noqa: E731
            return jnp.mean(
                jaxsoftmax.linear_loss(loss, hidden, kernel, labels, bias=bias, reduction=None)
            )
        return jaxsoftmax.linear_softmax_cross_entropy(
            hidden, kernel, labels, bias=bias, temperature=scale, gradients=name
        )

    arguments = (hidden, kernel, bias, jnp.float32(1.3))
    every = range(len(arguments))
    true = jax.grad(head, every)(*arguments)
    for chosen in ((0,), (3,), (1, 2), (2,), (0, 3), (1,), (0, 1, 2, 3)):
        for f in (head, jax.checkpoint(head)):
            for got, i in zip(jax.grad(f, chosen)(*arguments), chosen, strict=True):
                largest = np.abs(true[i]).max()
                np.testing.assert_allclose(got, true[i], rtol=0, atol=1e-6 * largest)


def test_microbatches_with_a_shared_denominator():
    hidden, kernel, _, weights, labels = problem(64, 17, 130)

    def head(hidden, kernel, labels, weights):
        return jaxsoftmax.linear_softmax_cross_entropy(
            hidden, kernel, labels, weights=weights, denominator=denominator
        )

    denominator = jnp.sum(weights)
    whole = jax.value_and_grad(head, 1)(hidden, kernel, labels, weights)

    def step(total, batch):
        h, y, w = batch
        return jax.tree.map(jnp.add, total, jax.value_and_grad(head, 1)(h, kernel, y, w)), None

    batches = jax.tree.map(lambda a: a.reshape(4, 16, *a.shape[1:]), (hidden, labels, weights))
    start = (jnp.zeros(()), jnp.zeros_like(kernel))
    total, _ = jax.lax.scan(step, start, batches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), total, whole)


@pytest.mark.parametrize("gradients", ["in_forward", "recompute"])
def test_a_bad_label_is_nan_in_its_token_only(gradients):
    hidden, kernel, _, _, labels = problem(5, 3, 10)
    for bad in (-1, 10, -100):

        def head(hidden, bad=bad):
            return jaxsoftmax.linear_softmax_cross_entropy(
                hidden, kernel, labels.at[2].set(bad), reduction="sum", gradients=gradients
            )

        value, d = jax.value_and_grad(head)(hidden)
        assert np.isnan(value)
        np.testing.assert_array_equal(np.isnan(d).all(-1), np.arange(5) == 2)
        assert np.isnan(d).sum() == 3


@pytest.mark.parametrize("gradients", ["in_forward", "recompute"])
def test_classes_left_out_by_a_bias_of_minus_infinity(gradients):
    hidden, kernel, bias, _, labels = problem(33, 17, 130)
    padded = jnp.pad(kernel, ((0, 0), (0, 126)), constant_values=9.0)
    out = jnp.pad(bias, (0, 126), constant_values=-jnp.inf)

    def head(hidden, kernel, bias):
        return jaxsoftmax.linear_softmax_cross_entropy(
            hidden, kernel, labels, bias=bias, gradients=gradients, chunk_size=16
        )

    want = jax.value_and_grad(head, (0, 1, 2))(hidden, kernel, bias)
    value, (d_hidden, d_kernel, d_bias) = jax.value_and_grad(head, (0, 1, 2))(hidden, padded, out)
    np.testing.assert_allclose(value, want[0], rtol=1e-6)
    np.testing.assert_allclose(d_hidden, want[1][0], rtol=1e-4, atol=1e-7)
    assert not np.any(d_kernel[:, 130:])
    assert not np.any(d_bias[130:])


def test_no_tokens_and_no_weight():
    hidden, kernel, _, _, labels = problem(5, 3, 10)
    head: Any = jaxsoftmax.linear_softmax_cross_entropy
    for reduction, shape in (("mean", ()), ("sum", ()), (None, (0,))):
        for gradients in ("auto", "recompute"):
            out = head(hidden[:0], kernel, labels[:0], reduction=reduction, gradients=gradients)
            assert out.shape == shape
            assert not np.any(out)

    def unweighted(hidden, kernel):
        return head(hidden, kernel, labels, weights=jnp.zeros(5))

    value, d = jax.value_and_grad(unweighted, (0, 1))(hidden, kernel)
    assert value == 0
    assert not any(np.any(g) for g in d)


def test_tokens_in_several_axes():
    hidden, kernel, _, _, labels = problem(64, 17, 130)
    flat = jaxsoftmax.linear_log_probs(hidden, kernel, labels)
    folded = jaxsoftmax.linear_log_probs(
        hidden.reshape(4, 16, 17), kernel, labels.reshape(4, 16), chunk_size=50
    )
    assert folded.log_probs.shape == (4, 16)
    np.testing.assert_allclose(folded.log_probs.reshape(-1), flat.log_probs, rtol=1e-5)
    one = jaxsoftmax.linear_softmax_cross_entropy(hidden[0], kernel, labels[0], reduction=None)
    np.testing.assert_allclose(one, -flat.log_probs[0], rtol=1e-5)


@pytest.mark.parametrize("gradients", ["in_forward", "recompute"])
def test_a_head_of_width_0_has_its_bias_for_logits(gradients):
    _, _, bias, _, labels = problem(5, 3, 10)

    def head(hidden, kernel, bias):
        return jaxsoftmax.linear_softmax_cross_entropy(
            hidden, kernel, labels, bias=bias, gradients=gradients, chunk_size=2
        )

    losses, (_, _, d) = truth(np.zeros((5, 1)), np.zeros((1, 10)), bias, labels, np.full(5, 0.2))
    nothing = np.zeros((5, 0), np.float32), np.zeros((0, 10), np.float32)
    value, got = jax.value_and_grad(head, (0, 1, 2))(*nothing, bias)
    np.testing.assert_allclose(value, losses.mean(), rtol=1e-6)
    np.testing.assert_allclose(got[2], d, rtol=1e-5, atol=1e-7)
    assert [g.shape for g in got[:2]] == [a.shape for a in nothing]


@pytest.mark.parametrize("gradients", ["in_forward", "recompute"])
@pytest.mark.parametrize("bad", [-1, 10])
def test_a_bad_label_is_one_token_of_a_mean_with_class_weights(gradients, bad):
    """Its loss and its gradient are NaN, the others' what they are with 1 for its class weight."""
    hidden, kernel, bias, weights, labels = problem(5, 3, 10)
    class_weights = jnp.linspace(0.5, 2, 10)

    def head(hidden, class_weights, labels):
        return jaxsoftmax.linear_softmax_cross_entropy(
            *(hidden, kernel, labels),
            bias=bias,
            weights=weights,
            class_weights=class_weights,
            gradients=gradients,
            chunk_size=3,
        )

    step = jax.value_and_grad(head, (0, 1))
    value, (d, d_weights) = step(hidden, class_weights, labels.at[2].set(bad))
    assert np.isnan(value)
    w, u = (np.asarray(a, np.float64) for a in (weights, class_weights))
    counts = w * np.where(np.arange(5) == 2, 1, u[labels])
    _, (expected, _, _) = truth(hidden, kernel, bias, labels, w * u[labels] / counts.sum())
    others = np.arange(5) != 2
    np.testing.assert_allclose(d[others], expected[others], rtol=1e-5, atol=1e-6)
    assert np.isnan(d[2]).all()
    # Of the mean's divisor each class has a share, whose derivative is that of a NaN mean.
    assert np.isnan(d_weights[labels[others]]).all()


@pytest.mark.parametrize("x64", [False, True])
def test_losses_of_any_dtype_come_in_that_of_sums(x64):
    """Whatever `loss_fn` gives, reduced or not, with and without tokens."""
    with jax.enable_x64(x64):
        hidden, kernel = (np.ones(s, np.float64 if x64 else np.float16) for s in ((5, 3), (3, 10)))
        for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
            for reduction in ("mean", None):
                for n in (5, 0):

                    def f(hidden, dtype=dtype, reduction: Any = reduction):
                        loss = lambda z: z[:, 0].astype(dtype)  # noqa: E731
                        return jaxsoftmax.linear_loss(loss, hidden, kernel, reduction=reduction)

                    out, pull = jax.vjp(f, hidden[:n])
                    assert out.dtype == (jnp.float64 if x64 else jnp.float32)
                    assert pull(jnp.ones_like(out))[0].dtype == hidden.dtype


def symbolic(*shape, dtype: Any = np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


_head = jaxsoftmax.linear_softmax_cross_entropy
HEADS: dict[str, Any] = {
    "in forward": _head,
    "in forward, small chunks": functools.partial(_head, chunk_size=3),
    "recompute": functools.partial(_head, gradients="recompute", chunk_size=3),
    "log-probabilities": functools.partial(jaxsoftmax.linear_log_probs, with_entropy=True),
    "any loss": functools.partial(
        jaxsoftmax.linear_loss,
        jaxsoftmax.softmax_cross_entropy_with_integer_labels,
        reduction=None,
        chunk_size=3,
    ),
}


@pytest.mark.parametrize(
    ("device", "name"),
    [("anywhere", "in forward"), *(("one CPU device", name) for name in HEADS)],
    indirect=["device"],
)
def test_value_and_gradient_exported_for_any_number_of_tokens(device, name):
    """One program for cpu, cuda and tpu, of two axes of tokens whose sizes it does not know."""

    def step(hidden, kernel, labels):
        def total(hidden, kernel):
            return sum(jnp.sum(x) for x in jax.tree.leaves(HEADS[name](hidden, kernel, labels)))

        return jax.value_and_grad(total, (0, 1))(hidden, kernel)

    batch, length = export.symbolic_shape("batch, length")
    tokens = (batch, length)
    exported = export.export(jax.jit(step), platforms=["cpu", "cuda", "tpu"])(
        symbolic(*tokens, 4), symbolic(4, 10), symbolic(*tokens, dtype=np.int32)
    )
    _, kernel, *_ = problem(1, 4, 10)
    for shape in ((1, 1), (5, 7)):
        hidden, _, _, _, labels = problem(shape[0] * shape[1], 4, 10)
        arguments = (hidden.reshape(*shape, 4), kernel, labels.reshape(shape))
        got, want = exported.call(*arguments), jax.jit(step)(*arguments)
        for x, true in zip(*map(jax.tree.leaves, (got, want)), strict=True):
            np.testing.assert_allclose(x, true, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradients", ["in_forward", "recompute"])
def test_only_a_mean_of_nothing_hides_a_division_by_zero(gradients):
    hidden, kernel, _, _, labels = problem(5, 3, 10)

    def mean(**options):
        return jaxsoftmax.linear_softmax_cross_entropy(
            hidden, kernel, labels, gradients=gradients, **options
        )

    assert not np.isfinite(mean(denominator=0.0))
    assert not np.isfinite(mean(weights=np.array([1.0, -1, 0, 0, 0], np.float32)))
    assert mean(denominator=0.0, weights=np.zeros(5, np.float32)) == 0
