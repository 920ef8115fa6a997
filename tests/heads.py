# SPDX-License-Identifier: Apache-2.0
"""The truth about linear heads, from the definitions in long double, with its error bounds."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from assertions import assert_within
from cases import generator, several
from oracle import Value, Wide

import jaxsoftmax as js

U = 2.0**-24  # unit roundoff of float32
TINY = 2.0**-126  # XLA may give 0 for anything smaller
WAYS = ("in_forward", "recompute")
both_ways = pytest.mark.parametrize("gradients", WAYS)
head = js.linear_softmax_cross_entropy


def problem(n: int, width: int, classes: int, dtype: Any = np.float32, scale: float = 1) -> tuple:
    """Operands, bias and labels of a head, whose logits have about the scale, or that of bias."""
    rng = generator("head", n, width, classes)
    root = np.sqrt(scale)
    hidden = (root * rng.standard_normal((n, width))).astype(jnp.dtype(dtype))
    kernel = (root / width**0.5 * rng.standard_normal((width, classes))).astype(jnp.dtype(dtype))
    bias = rng.standard_normal(classes).astype(np.float32)
    return hidden, kernel, bias, rng.integers(classes, size=n).astype(np.int32)


class Statistic(NamedTuple):
    """A number a token, and its derivative by the logits."""

    value: Value
    derivative: Value


def statistics_truth(hidden, kernel, bias, labels) -> dict[str, Statistic]:
    """What a head makes of each token, and the error that float32 may make.

    n products added in float32, in any order, are within n·u of the sum of their sizes, so each
    logit is within δ. That changes a loss by 2 (1 − ŷ_t) δ at most, lse by δ, and every entry of
    ŷ and ŷ − y by a factor e^±2δ. Merging blocks, and weights, are 16 operations more.
    """
    h, k, b = (np.asarray(a).astype(Wide) for a in (hidden, kernel, bias))
    z, rows = h @ k + b, np.arange(len(h))
    delta = (len(k) + 1) * U * (np.abs(h) @ np.abs(k) + np.abs(b)).max(-1)
    # Long double has no exp of 12 000.
    t = oracle.truth(z, np.float32, engine="wide" if np.ptp(z) < 1e4 else "literal")
    slack, wide = 2 * delta + 16 * U, (2 * delta + 16 * U)[:, None]
    (p, p_error), (nll, nll_error) = t.p, t.nll
    p_error, nll_error = p_error + wide * p, nll_error + wide * (1 + nll)
    loss, error = oracle.nll(t, labels)
    error = error + slack * np.minimum(t.complement.value[rows, labels], loss)
    d, d_error = oracle.nll_gradient(t, labels, np.ones(len(h)))
    entropy = (p * nll).sum(-1)  # terms of one sign
    entropy_error = (p * nll_error + p_error * nll).sum(-1) + (z.shape[-1] + 1) * U * entropy
    size = nll + entropy[:, None]
    size_error = p_error * size + p * (nll_error + entropy_error[:, None] + 16 * U * size)
    lse, lse_error = t.lse
    return {
        "loss": Statistic(Value(loss, error), Value(d, d_error + wide * np.abs(d))),
        "lse": Statistic(Value(lse, lse_error + slack * (1 + np.abs(lse))), Value(p, p_error)),
        "entropy": Statistic(
            Value(entropy, entropy_error), Value(p * (nll - entropy[:, None]), size_error)
        ),
    }


def pulled_back(derivative, g, hidden, kernel) -> list[Value]:
    """The gradients of Σ g · statistic by hidden, kernel and bias.

    Half-precision operands take the derivative rounded once: by its roundoff or half a subnormal.
    """
    h, k = (np.asarray(a).astype(Wide) for a in (hidden, kernel))
    d, error = (np.asarray(v) * np.asarray(g).astype(Wide)[:, None] for v in derivative)
    error, size, half = np.abs(error), np.abs(d), jnp.finfo(np.asarray(hidden).dtype)
    roundoff, subnormal = float(half.eps) / 2, float(half.smallest_subnormal) / 2
    rounded = error + roundoff * size + max(subnormal, TINY) if half.bits < 32 else error
    n, classes = d.shape
    return [
        Value(d @ k.T, (rounded + (classes + 1) * U * size) @ np.abs(k).T + TINY),
        Value(h.T @ d, np.abs(h).T @ (rounded + (n + 1) * U * size) + TINY),
        Value(d.sum(0), (error + (n + 1) * U * size).sum(0) + TINY),
    ]


def head_truth(hidden, kernel, bias, labels, g) -> list[Value]:
    """Losses, and the gradients of Σ g · loss by hidden, kernel and bias; operands of any dtype."""
    value, derivative = statistics_truth(hidden, kernel, bias, labels)["loss"]
    return [value, *pulled_back(derivative, g, hidden, kernel)]


STATIC = ("gradients", "chunk_size", "ignore_index", "reduction")


@partial(jax.jit, static_argnames=(*STATIC, "transpose_kernel", "compute_dtype"))
def total(hidden, kernel, bias, labels, *, cotangent=1, reduction: Any = "sum", **options):
    """The head's reduced loss and its gradients, compiled once for all tests of a shape."""

    def f(hidden, kernel, bias):
        losses = head(hidden, kernel, labels, bias=bias, reduction=reduction, **options)
        return jnp.sum(losses * cotangent)

    return jax.value_and_grad(f, (0, 1, 2))(hidden, kernel, bias)


def check_head(gradients, arrays, g=None, *, given=None, given_hidden=None, **options) -> Any:
    """Σ g · loss and its gradients; g are the tokens' weights, if `options` do not make it so.

    The truth is that of the operands as the products take them; `given` are the labels, and
    `given_hidden` the hidden state, in place of those of the truth.
    """
    hidden, kernel, bias, labels = arrays
    transposed = options.get("transpose_kernel", False)
    if g is None:
        g = options["weights"] = np.linspace(0.5, 2, len(labels)).astype(np.float32)
    given = labels if given is None else given
    stored = kernel.T if transposed else kernel
    taken = hidden if given_hidden is None else given_hidden
    value, ds = total(taken, stored, bias, given, gradients=gradients, **options)
    assert [(d.shape, d.dtype) for d in ds] == [(a.shape, a.dtype) for a in (hidden, stored, bias)]
    ds = ds[0], ds[1].T if transposed else ds[1], ds[2]
    if "compute_dtype" in options:
        hidden, kernel = (a.astype(options["compute_dtype"]) for a in (hidden, kernel))
    losses, *expected = head_truth(hidden, kernel, bias, labels, g)
    size = np.abs(g) @ (losses.bound + (len(g) + 1) * U * losses.value)
    assert_within(value, g.astype(Wide) @ losses.value, size, "value")
    for name, d, want in zip(("hidden", "kernel", "bias"), ds, expected, strict=True):
        assert_within(d, *want, f"d_{name}")
    return ds


def check_log_probs(arrays, **options) -> None:
    """Each result of `linear_log_probs`, and the gradients of each alone by all operands."""
    hidden, kernel, bias, labels = arrays
    transposed = options.get("transpose_kernel", False)
    g = np.linspace(-1, 2, len(labels)).astype(np.float32)
    stored = kernel.T if transposed else kernel
    out, ds = log_probs_and_gradients(hidden, stored, bias, labels, g, **options)
    assert (out.entropies is None) == (len(ds) == 2) == (not options.get("with_entropy", True))
    if transposed:
        ds = [(d_hidden, d_kernel.T, d_bias) for d_hidden, d_kernel, d_bias in ds]
    for i, truth in enumerate([*statistics_truth(*arrays).values()][: len(ds)]):
        assert_within(-out[0] if i == 0 else out[i], *truth.value)
        expected = pulled_back(truth.derivative, g, hidden, kernel)
        for d, (value, bound) in zip(ds[i], expected, strict=True):
            assert_within(-d if i == 0 else d, value, bound)


def check_several(arrays, **options) -> None:
    """Log-probabilities of several labels a token, and the gradients of Σ g · log-probability."""
    hidden, kernel, bias, labels = arrays
    every = several(labels, kernel.shape[1])
    g = np.linspace(-1, 2, every.size).astype(np.float32).reshape(every.shape)
    out, (ds, *_) = log_probs_and_gradients(hidden, kernel, bias, every, g, **options)
    losses = [statistics_truth(hidden, kernel, bias, one)["loss"] for one in every.T]
    values = zip(*(loss.value for loss in losses), strict=True)
    value, bound = (np.stack(a, axis=-1) for a in values)
    assert_within(-out[0], value, bound)
    parts = [
        pulled_back(t.derivative, of_one, hidden, kernel)
        for t, of_one in zip(losses, g.T, strict=True)
    ]
    for d, terms in zip(ds, zip(*parts, strict=True), strict=True):
        value, bound = (sum(a) for a in zip(*terms, strict=True))
        assert_within(-d, value, bound)


@partial(jax.jit, static_argnames=("chunk_size", "transpose_kernel", "with_entropy"))
def log_probs_and_gradients(hidden, kernel, bias, labels, g, *, chunk_size=64, **options: Any):
    options = {"with_entropy": True, "chunk_size": chunk_size} | options

    def f(hidden, kernel, bias):
        return js.linear_log_probs(hidden, kernel, labels, bias=bias, **options)

    out, pull = jax.vjp(f, hidden, kernel, bias)
    fields = [field for field in out if field is not None]
    rest = (None,) * (3 - len(fields))
    of_each = [jnp.broadcast_to(g, a.shape) if a.ndim == g.ndim else g[:, 0] for a in fields]
    alone = (
        [g_a if i == j else jnp.zeros_like(g_a) for j, g_a in enumerate(of_each)]
        for i in range(len(fields))
    )
    return out, [pull(js.LogProbs(*one, *rest)) for one in alone]
