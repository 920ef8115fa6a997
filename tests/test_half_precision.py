# SPDX-License-Identifier: Apache-2.0
"""bfloat16 and float16: each result is the truth about the given numbers, rounded once.

Losses come in float32 and are within its bounds. `assert_within` allows a half-precision number
what rounding anything within the float32 bounds gives. `test_values` has the functions of logits.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from assertions import assert_dtype, assert_within
from cases import Case, cotangent_of, rows, truth_of
from heads import (
    TINY,
    U,
    both_ways,
    check_head,
    check_log_probs,
    check_several,
    head_truth,
    problem,
    total,
)

import jaxsoftmax as js

SCALES = (1e-3, 1, 30, 1e3, 1e4)
CLASSES, MANY = 130, 70_000
integer = js.softmax_cross_entropy_with_integer_labels
dtypes = pytest.mark.parametrize("dtype", ["bfloat16", "float16"])


@dtypes
def test_forward_mode(dtype):
    data, t = rows(case := Case(CLASSES, dtype)), truth_of(case)
    g = np.where(np.isneginf(data.logits), 0, cotangent_of(data.logits.shape, dtype))
    f = js.forward_mode.softmax_cross_entropy_with_integer_labels
    value, change = jax.jvp(lambda z: f(z, data.labels), (data.logits,), (g,))
    assert_within(value, *oracle.nll(t, data.labels))
    d, bound = oracle.nll_gradient(t, data.labels, np.ones(len(g)))
    g = g.astype(oracle.Wide)
    error = ((bound + (t.chain + 2) * U * np.abs(d)) * np.abs(g)).sum(-1)
    assert_within(change, (d * g).sum(-1), error)


OPTIONS: list[dict[str, Any]] = [
    {"label_smoothing": 0.1},
    {"z_loss": 1e-4},
    {"soft_cap": 30.0},
    {"temperature": 0.7},
    {"class_weights": np.linspace(0.5, 2, CLASSES).astype(np.float32)},
]
OPTIONS.append({k: v for options in OPTIONS for k, v in options.items()})


@dtypes
def test_options_are_those_of_float32_rounded_once(dtype):
    """The bound is what two float32 computations may differ by: a few roundings of z, twice."""
    data = rows(Case(CLASSES, dtype))
    g = cotangent_of(data.labels.shape, np.float32)

    @jax.jit
    def results(z):
        pairs = [
            jax.vjp(lambda z, options=options: integer(z, data.labels, **options), z)
            for options in OPTIONS
        ]
        return [(loss, pull(g)[0]) for loss, pull in pairs]

    half, full = (results(z) for z in (data.logits, data.logits.astype(np.float32)))
    z = data.logits.astype(np.float32)
    size = np.abs(np.where(np.isfinite(z), z, 0)).max(-1) / 0.7
    slack = (32 + 4 * size)[:, None] * U
    for (loss, d), (loss32, d32) in zip(half, full, strict=True):
        assert_dtype(loss, np.float32)
        assert_dtype(d, dtype)
        assert_within(loss, loss32, slack[:, 0] * np.abs(loss32) + TINY)
        assert_within(d, d32, slack * np.abs(d32) + TINY)


@dtypes
def test_heads(dtype):
    """Products add up in float32, ŷ − y is rounded once and each gradient once: `pulled_back`."""
    for scale in SCALES:
        arrays: Any = problem(9, 5, 130, dtype, scale)
        check_head("in_forward", arrays, chunk_size=4)
        check_head("recompute", arrays, chunk_size=64)
        check_log_probs(arrays)
        check_several(arrays)
        for gradients, chunk_size in (("in_forward", 4), ("recompute", 64)):
            check_head(gradients, arrays, chunk_size=chunk_size, transpose_kernel=True)
        losses, pull = dense_by_token(*arrays)
        for got, want in zip((losses, *pull), head_truth(*arrays, g=np.ones(9)), strict=True):
            assert_within(got, *want, f"scale {scale}")


@jax.jit
def dense_by_token(hidden, kernel, bias, labels):
    def f(*operands):
        y = jax.nn.one_hot(labels, 130)
        options: Any = {"bias": operands[2], "reduction": None, "chunk_size": 4}
        return js.linear_loss(js.softmax_cross_entropy, *operands[:2], y, **options)

    losses, pull = jax.vjp(f, hidden, kernel, bias)
    return losses, pull(jnp.ones_like(losses))


@dtypes
@both_ways
def test_confident_columns_of_d_kernel_keep_relative_accuracy(dtype, gradients):
    """One token a class, so that the label's entry of a column is nothing but h (ŷ_t − 1)."""
    gaps = np.array([0, 5, 17, 40])
    hidden = (4 * np.eye(4)).astype(jnp.dtype(dtype))
    kernel = np.diag(gaps / 4).astype(jnp.dtype(dtype))
    labels = np.arange(4, dtype=np.int32)
    _, d_kernel, _ = check_head(gradients, (hidden, kernel, np.zeros(4, np.float32), labels))
    if dtype == "bfloat16":
        r = 3 * np.exp(-np.diag(kernel).astype(float) * 4)
        true = -4 * np.linspace(0.5, 2, 4).astype(np.float32) * r / (1 + r)
        # ŷ − y rounded, the gradient rounded; float32's errors are 60 u.
        np.testing.assert_allclose(np.diag(d_kernel).astype(float), true, rtol=2 * 2**-8 + 1e-5)


@both_ways
@pytest.mark.parametrize("how", ["denominator", "weights"])
def test_a_small_cotangent_loses_nothing_in_float16(gradients, how):
    """A mean over 16 384 tokens, 9 of them here: ŷ/16 384 would be of the size of subnormals."""
    arrays: Any = problem(9, 5, 130, np.float16)
    small = np.float32(2**-14)
    options: Any = {"reduction": "sum", "weights": np.full(9, small)}
    if how == "denominator":
        options = {"reduction": "mean", "denominator": 1 / small}
    value, ds = total(*arrays, gradients=gradients, **options)
    losses, *expected = head_truth(*arrays, g=np.ones(9))
    assert_within(value, losses.value.sum() * small, losses.bound.sum() * small + 1e-12)
    for d, (true, bound) in zip(ds, expected, strict=True):
        assert_within(d, small * true, small * bound)


@both_ways
def test_heads_of_more_classes_than_float16_can_count(gradients):
    hidden, kernel, _, labels = problem(3, 2, MANY, np.float16)
    bias = np.zeros(MANY, np.float32)
    labels[0] = MANY - 1
    ds = check_head(gradients, (hidden, kernel, bias, labels))
    check_head(gradients, (0 * hidden, kernel, bias, labels))
    assert all(np.isfinite(d).all() for d in ds)


# Slopes of all sizes: the head in float16 is that in float32, its d_logits rounded once. Hidden
# states and kernel are diagonal, so that every gradient's entry is one product.
H16 = np.float16
STEEP: dict[str, dict[str, Any]] = {
    "class weights": {"class_weights": np.full(4, 1e4, np.float32)},
    "larger class weights": {"class_weights": np.full(4, 1e30, np.float32), "denominator": 1e30},
    "overflow": {"class_weights": np.full(4, 1e7, np.float32), "reduction": "sum"},
    "half class weights": {"class_weights": np.full(4, 6e4, H16), "label_smoothing": H16(0.1)},
    "z-loss": {"z_loss": H16(1e4)},
    "temperature": {"temperature": np.float32(1e-4)},
    "half temperature": {"temperature": H16(1e-4)},
    "half soft cap": {"soft_cap": H16(1e-3), "class_weights": np.full(4, 6e4, H16)},
    "flat": {"denominator": np.float32(1e12), "weights": np.full(4, 1e6, np.float32)},
    "half denominator": {"denominator": H16(6e4)},
}


def assert_rounded_once_and_cast(got, want):
    """Twice half an ulp, of products of one term; what float16 cannot hold is infinite."""
    for x, true in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        # The largest that rounds to 65504: the next, 65536, would be infinity.
        large = (np.abs(true) >= 65520) & (x.dtype == H16)
        held = np.where(large, np.copysign(np.inf, true), true)
        np.testing.assert_allclose(x.astype(np.float32), held, rtol=2**-9, atol=2.0**-24)


@pytest.mark.parametrize("name", STEEP)
def test_float16_heads_take_slopes_of_all_sizes(name):
    hidden = np.eye(4, dtype=H16)
    kernel = np.diag([0.5, -1, 2, 0.25])
    labels = np.arange(4, dtype=np.int32)

    @partial(jax.jit, static_argnames="gradients")
    def run(hidden, kernel, options, gradients):
        fixed = {k: v for k, v in STEEP[name].items() if k == "reduction"}

        def f(hidden, kernel, options):
            return js.linear_softmax_cross_entropy(
                *(hidden, kernel, labels), gradients=gradients, chunk_size=2, **options, **fixed
            )

        return jax.grad(f, (0, 1, 2))(hidden, kernel, options)

    options = {k: np.asarray(v) for k, v in STEEP[name].items() if k != "reduction"}
    wide = {k: v.astype(np.float32) for k, v in options.items()}
    want = run(hidden.astype(np.float32), kernel.astype(np.float32), wide, "recompute")
    for gradients in ("in_forward", "recompute"):
        assert_rounded_once_and_cast(run(hidden, kernel.astype(H16), options, gradients), want)


@pytest.mark.parametrize("reduction", ["mean", None])
@pytest.mark.parametrize("slope", [1e-6, 1.0, 1e4, 1e30])
def test_any_loss_of_any_slope_in_float16(reduction, slope):
    """d_kernel = slope/2 · 2 l · h: the slope is taken back by the weights, after the loss."""
    hidden, kernel = np.array([[1], [0.5]], H16), np.array([[5000, 3]], H16)

    def total(hidden, kernel):
        def loss(z):
            return slope * jnp.sum(z**2, axis=-1)

        weights = np.full(2, 1e-4 / slope, np.float32)
        options = {"weights": weights, "reduction": reduction}
        if reduction == "mean":
            options["denominator"] = 1
        return jnp.sum(js.linear_loss(loss, hidden, kernel, **options))

    d_hidden, d_kernel = jax.grad(total, (0, 1))(hidden, kernel)
    h, k = (a.astype(np.float64) for a in (hidden, kernel))
    d = 2e-4 * (h @ k)
    np.testing.assert_allclose(d_hidden.astype(float), d @ k.T, rtol=2**-9)
    np.testing.assert_allclose(d_kernel.astype(float), h.T @ d, rtol=2**-9)


@both_ways
def test_second_derivatives_of_float16_heads(gradients):
    """A tangent of d_logits has the scale of d_logits, and room for 64 times that."""
    hidden, kernel, bias, labels = problem(5, 3, 7, H16)

    def slopes(hidden):
        def f(h):
            return js.linear_softmax_cross_entropy(
                h, kernel.astype(h.dtype), labels, bias=bias, gradients=gradients, chunk_size=2
            )

        return jax.grad(f)(hidden)

    tangent = np.cos(np.arange(hidden.size)).reshape(hidden.shape).astype(H16)
    got = jax.jvp(slopes, (hidden,), (tangent,))[1]
    want = jax.jvp(slopes, (hidden.astype(np.float32),), (tangent.astype(np.float32),))[1]
    np.testing.assert_allclose(
        got.astype(np.float32), want, rtol=0, atol=2**-8 * np.abs(want).max()
    )
