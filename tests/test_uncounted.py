# SPDX-License-Identifier: Apache-2.0
"""Tokens that do not count give a head nothing, whatever is in them; a finite one its loss.

An ignored token, and one of weight 0 that holds NaN or infinities, is as if it were not there: in
the value, in every gradient and in second derivatives. The truth is the textbook formula over the
others, differentiated by JAX in float64. A weight of 0 at a token that is finite has the derivative
that it says: that token's loss.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from assertions import assert_close
from cases import generator

import jaxsoftmax as js

KINDS = ("counts", "broken", "weight 0", "counts", "ignored", "counts", "broken")  # padding: broken
N, WIDTH, CLASSES, IGNORED = len(KINDS), 3, 7, -1
RNG = generator("uncounted")
LABELS = RNG.integers(CLASSES, size=N).astype(np.int32)
ARRAYS = {
    "hidden": RNG.standard_normal((N, WIDTH)).astype(np.float32),
    "kernel": RNG.standard_normal((WIDTH, CLASSES)).astype(np.float32),
    "bias": RNG.standard_normal(CLASSES).astype(np.float32),
    "weights": np.linspace(0.5, 1.5, N).astype(np.float32),
    "targets": RNG.standard_normal((N, CLASSES)).astype(np.float32),
    "scale": np.float32(1.3),
}


def _at(*kinds):
    return np.isin(KINDS, kinds)


ARRAYS["weights"][_at("broken", "weight 0")] = 0


class Head(NamedTuple):
    name: str
    call: Callable[..., jax.Array]  # (arrays, labels) -> the reduced loss, or all
    loss: str = "cross-entropy"
    reduction: Any = "mean"

    def __str__(self):
        return self.name

    @property
    def broken(self):
        """Tokens that are not there."""
        return _at("broken", "ignored") if self.loss == "cross-entropy" else _at("broken")


def _cross_entropy(**options):
    def call(a, labels):
        given = {name: a[name] for name in ("bias", "weights")}
        options.setdefault("chunk_size", 3)
        return js.linear_softmax_cross_entropy(
            *(a["hidden"], a["kernel"], labels), ignore_index=IGNORED, temperature=a["scale"],
            **given, **options,
        )  # fmt: skip

    return call


def _squared(reduction):
    def call(a, labels):
        del labels

        def loss(logits, targets):
            return jnp.mean((a["scale"] * logits - targets) ** 2, axis=-1)

        given = {name: a[name] for name in ("bias", "weights")}
        arguments = (a["hidden"], a["kernel"], a["targets"])
        return js.linear_loss(loss, *arguments, reduction=reduction, chunk_size=3, **given)

    return call


HEADS = [
    Head("in forward", _cross_entropy()),
    Head("in forward, sum", _cross_entropy(reduction="sum"), reduction="sum"),
    Head("recompute", _cross_entropy(gradients="recompute")),
    Head("unreduced", _cross_entropy(reduction=None), reduction=None),
    Head("any loss", _squared("mean"), "squared"),
    Head("any loss, unreduced", _squared(None), "squared", None),
]


def definition(head, a, labels):
    there = ~head.broken
    h, w, t = a["hidden"][there], a["weights"][there], a["targets"][there]
    z = h @ a["kernel"] + a["bias"][None]
    if head.loss == "squared":
        losses = jnp.mean((a["scale"] * z - t) ** 2, axis=-1)
    else:
        log_p = jax.nn.log_softmax(z / a["scale"])
        losses = -log_p[np.arange(len(h)), labels[there]]
    if head.reduction is None:
        return jnp.zeros(N, losses.dtype).at[there].set(losses * w)
    return jnp.sum(losses * w) / (jnp.sum(w) if head.reduction == "mean" else 1)


def results(f, a, labels, tangents):
    """The value, all gradients, and second derivatives in two ways."""

    def total(a):
        out = f(a, labels)
        g = jnp.sin(jnp.arange(1, out.size + 1).reshape(out.shape).astype(out.dtype))
        return jnp.sum(g * out), out

    def gradients(a):
        return jax.grad(total, has_aux=True)(a)[0]

    def along(a):
        return sum(map(jnp.vdot, jax.tree.leaves(gradients(a)), jax.tree.leaves(tangents)))

    second = jax.jvp(gradients, (a,), (tangents,))[1]
    return total(a)[1], gradients(a), second, jax.grad(along)(a)


def tangents_of(a):
    """Of all that is there: what is not may not move either."""
    t = {name: np.cos(np.arange(x.size).reshape(x.shape)).astype(x.dtype) for name, x in a.items()}
    for name in ("hidden", "targets", "weights"):
        t[name][_at("broken", "ignored")] = 0
    return t


@functools.cache
def truth(head):
    with jax.enable_x64(True):
        a = {name: x.astype(np.float64) for name, x in ARRAYS.items()}
        f = functools.partial(definition, head)
        run = jax.jit(lambda a, tangents: results(f, a, LABELS, tangents))
        return jax.tree.map(np.asarray, run(a, tangents_of(a)))


WIDE = ("in forward, sum", "recompute", "any loss, unreduced")


@pytest.mark.parametrize(
    "head",
    [pytest.param(h, id=h.name, marks=[pytest.mark.wide] * (h.name in WIDE)) for h in HEADS],
)
def test_whatever_is_in_them(head):
    run = jax.jit(lambda a, labels: results(head.call, a, labels, tangents_of(ARRAYS)))
    for inside in (np.nan, np.inf, -np.inf):
        a = {name: x.copy() for name, x in ARRAYS.items()}
        a["hidden"][head.broken, 1] = inside
        a["targets"][head.broken] = inside
        labels = np.where(_at("ignored"), IGNORED, np.where(_at("broken"), CLASSES, LABELS))
        got = run(a, labels)
        # Sums of some ten terms, of third powers at most, of numbers up to 3.
        assert_close(got, truth(head), 64, name=f"{inside} inside: ")
        for gradient in (got[1]["hidden"], got[1]["targets"], got[1]["weights"]):
            assert not np.asarray(gradient)[head.broken].any()


@pytest.mark.parametrize("reduction", ["sum", None])
def test_a_loss_without_a_derivative_where_the_weight_is_0(reduction):
    """The norm of logits that are 0, though all is finite: 0 · NaN is no part of d_kernel."""
    hidden = ARRAYS["hidden"] * (ARRAYS["weights"] != 0)[:, None]

    def total(hidden, kernel):
        options = {"weights": ARRAYS["weights"], "reduction": reduction, "chunk_size": 3}
        norm = lambda z, t: jnp.sqrt(jnp.sum(z**2, axis=-1)) * t  # noqa: E731
        return jnp.sum(js.linear_loss(norm, hidden, kernel, jnp.ones(N), **options))

    def of_others(hidden, kernel):
        z = hidden[ARRAYS["weights"] != 0] @ kernel
        return jnp.vdot(jnp.sqrt(jnp.sum(z**2, axis=-1)), ARRAYS["weights"][ARRAYS["weights"] != 0])

    arguments = (hidden, ARRAYS["kernel"])
    got = jax.value_and_grad(total, (0, 1))(*arguments)
    for x, want in zip(
        *map(jax.tree.leaves, (got, jax.value_and_grad(of_others, (0, 1))(*arguments))), strict=True
    ):
        np.testing.assert_allclose(x, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("gradients", ["in_forward", "recompute"])
def test_nothing_is_added_where_every_token_counts(gradients):
    """Without weights and ignored tokens nobody looks for what is not finite."""

    def program(**options):
        def f(hidden, kernel):
            return js.linear_softmax_cross_entropy(
                hidden, kernel, LABELS, gradients=gradients, reduction="sum", **options
            )

        a = (ARRAYS["hidden"], ARRAYS["kernel"])
        return jax.jit(jax.grad(f, (0, 1))).lower(*a).as_text().count("is_finite")

    assert program(weights=ARRAYS["weights"]) > program()
    # Those of the rule itself: of rows without a log-sum-exp.
    assert program(ignore_index=IGNORED) == program()
