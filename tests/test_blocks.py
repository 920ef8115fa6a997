# SPDX-License-Identifier: Apache-2.0
"""A head's rows measured from their first classes or the label, and again where that is far off.

The form of platforms that are no CPU, taken on one. `test_platforms` has the tests of other files
in it; here are rows that are far from what they are measured from, and how often they are measured.
"""

import contextlib
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import test_orders
import test_sharding
from assertions import assert_within, relative_error
from cases import generator, on_device, promised
from heads import U, check_head, head, head_truth, problem
from jax.sharding import AxisType
from layouts import LAYOUTS, mesh_of

from jaxsoftmax._head import vocabulary_blocks

FEW, AGAIN = vocabulary_blocks._FEW, vocabulary_blocks._AGAIN
N, WIDTH, CLASSES = 600, 3, 300
LAST = CLASSES - 1  # not among the first few


@pytest.fixture
def one_device():
    yield from on_device("one other device")


@pytest.fixture
def again(monkeypatch, one_device) -> list[int]:
    """Of how many rows each step of the loop over far rows was."""
    steps = []
    from_maximum = vocabulary_blocks._from_maximum

    def counted(plan, operands):
        sums = from_maximum(plan, operands)

        def count(m):
            steps.append(len(m))
            return np.asarray(m)

        return sums._replace(m=jax.pure_callback(count, jax.typeof(sums.m), sums.m))

    monkeypatch.setattr(vocabulary_blocks, "_from_maximum", counted)
    return steps


def with_far_rows(far: np.ndarray, labels: np.ndarray | None = None) -> Any:
    """A head's arrays: of the rows at `far` the last class is 40 nats above all others."""
    hidden, kernel, bias, drawn = problem(len(far), WIDTH, CLASSES)
    hidden[:, 0], kernel[0] = 40 * far, 0
    kernel[0, LAST] = 1
    return hidden, kernel, bias, np.where(drawn == LAST, 0, drawn) if labels is None else labels


@pytest.mark.parametrize("count", [0, 1, AGAIN - 1, AGAIN, AGAIN + 1, N])
def test_only_rows_that_are_far_are_measured_again(again, count):
    """A chunk of them at a time, wherever they are."""
    far = generator("far", count).permutation(N) < count
    check_head("recompute", with_far_rows(far), chunk_size=128)
    assert again == [AGAIN] * -(-count // AGAIN)


def test_few_rows_are_all_measured_again(again):
    for count in (0, 1):
        check_head("recompute", with_far_rows(np.arange(9) < count), chunk_size=128)
        assert again == [9] * count


def test_a_label_that_is_the_highest_is_never_far(again):
    """The form measures from it, wherever it is; then no row is looked at twice."""
    labels = np.where(np.arange(9) < 5, LAST, 3).astype(np.int32)
    check_head("recompute", with_far_rows(labels == LAST, labels), chunk_size=128)
    assert not again


@pytest.mark.parametrize("classes", [2, 3, FEW - 1, FEW, FEW + 1, 1000])
def test_the_promise(again, classes):
    """Of a head whose logits are exact: (8 + gap/2) ulps of each entry, at leads of 0 to 80."""
    z, labels, gap = promised(classes)
    n = len(z)

    @jax.jit
    def results(z):
        f = lambda z: head(jnp.eye(n), z, labels, gradients="recompute", reduction=None)  # noqa: E731
        losses, pull = jax.vjp(f, z)
        return losses, pull(jnp.ones(n))[0]

    t = oracle.truth(z, np.float32)
    losses, d = results(z)
    allowed = (8 + gap / 2) * 2 * U
    at = np.arange(n), labels
    assert (relative_error(losses, t.nll.value[at]) <= allowed[at]).all()
    true, _ = oracle.nll_gradient(t, labels, np.ones(n, np.float32))
    assert (relative_error(d, true) <= allowed).all()
    assert not again


# What is in a row, and what its loss and gradient are.
BEYOND = FEW + 20
KINDS: dict[str, tuple[Any, int]] = {  # number of the hidden state that is not finite; label
    "counts": (None, 7),
    "counts, label beyond the first": (None, BEYOND),
    "ignored": (None, -1),
    "ignored, NaN inside": (np.nan, -1),
    "out of range": (None, CLASSES),
    "far below the range": (None, -(2**30)),
    "NaN inside": (np.nan, 7),
    "infinity inside": (np.inf, BEYOND),
    "−∞ inside": (-np.inf, 7),
}
IGNORED = -1
LEFT_OUT = {
    "none": [],
    "two": [5, BEYOND + 1],
    "the first": [*range(FEW)],
    "the first few but one": [i for i in range(FEW) if i != 7],
    "the others": [*range(FEW, CLASSES)],
}


@partial(jax.jit, static_argnames="reduction")
def with_gradients(operands, labels, g, reduction):
    """Of the losses, for the cotangent g; or of their sum, with g for weights."""

    def f(hidden, kernel, bias):
        return head(
            *(hidden, kernel, labels),
            bias=bias,
            weights=None if reduction is None else g,
            ignore_index=IGNORED,
            gradients="recompute",
            reduction=reduction,
            chunk_size=128,
        )

    out, pull = jax.vjp(f, *operands)
    return out, pull(g if reduction is None else jnp.ones_like(out))


@pytest.mark.parametrize("rows", [len(KINDS) * 2, N])
@pytest.mark.parametrize("left_out", LEFT_OUT)
def test_any_kind_of_row_near_and_far(one_device, left_out, rows):
    """Beside each other: a bad one is NaN, alone; without weight it is not there."""
    kinds = [*KINDS] * (rows // len(KINDS))
    n = len(kinds)
    far = np.arange(n) >= n // 2
    hidden, kernel, bias, _ = with_far_rows(far, np.zeros(n, np.int32))
    labels = np.array([KINDS[kind][1] for kind in kinds], np.int32)
    out = np.isin(np.arange(CLASSES), LEFT_OUT[left_out])
    bias[out] = -np.inf
    for i, kind in enumerate(kinds):
        if KINDS[kind][0] is not None:
            hidden[i, 1] = KINDS[kind][0]
    known = (labels >= 0) & (labels < CLASSES)
    finite = np.isfinite(hidden).all(-1)
    at_infinity = known & out[np.where(known, labels, 0)]
    good = finite & known & ~at_infinity
    ignored = labels == IGNORED
    bad = ~ignored & ~(finite & known)
    g = np.linspace(0.5, 2, n).astype(np.float32)

    losses, (d_hidden, *_) = with_gradients((hidden, kernel, bias), labels, g, None)
    inside = np.cumsum(~out) - 1  # the number of each class among those that are left
    left = hidden[good], kernel[:, ~out], bias[~out], inside[labels[good]]
    value, *ds = head_truth(*left, g[good])
    assert_within(losses[good], *value)
    assert_within(d_hidden[good], *ds[0])
    assert not losses[ignored].any()
    assert not d_hidden[ignored].any()
    assert np.isnan(losses[bad]).all()
    assert np.isnan(d_hidden[bad]).all()
    at_infinity &= finite
    assert (losses[at_infinity] == np.inf).all()
    assert np.isfinite(d_hidden[at_infinity]).all()

    weights = np.where(good, g, 0)
    total, ds = with_gradients((hidden, kernel, bias), labels, weights, "sum")
    bound = g[good] @ (value.bound + (n + 1) * U * value.value)
    assert_within(total, g[good] @ value.value, bound)
    value, *expected = head_truth(*left, g[good])
    for d, (want, error), axis in zip(ds, expected, (0, 1, 0), strict=True):
        there = good if d.shape == hidden.shape else ~out
        assert_within(np.compress(there, d, axis), want, error)
        assert not np.compress(~there, d, axis).any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_of_nothing_but_infinities_is_nan(one_device, bad):
    _, kernel, bias, labels = problem(2, WIDTH, CLASSES)
    losses = head(np.ones((2, WIDTH)), kernel, labels, bias=bias * 0 + bad, reduction=None)
    assert np.isnan(losses).all()


def test_one_class(one_device):
    check_head("recompute", problem(5, WIDTH, 1))


# Every option and every order, where a third of the rows is far: small sizes have it all.


some_or_all = [
    pytest.param(5, id="some again"),
    pytest.param(256, id="all again", marks=pytest.mark.wide),
]


@pytest.fixture(params=some_or_all)
def mostly_far(monkeypatch, request, one_device):
    few_and_far(monkeypatch, request.param)


def few_and_far(monkeypatch, again):
    monkeypatch.setattr(vocabulary_blocks, "_FEW", 2)
    monkeypatch.setattr(vocabulary_blocks, "_AGAIN", again)
    monkeypatch.setattr(vocabulary_blocks, "NEAR", 1.5)


# Smoothing and class weights together are measured from the maximum.
OF_BLOCKS = [
    loss._replace(options=tuple(o for o in loss.options if loss.mean or o != "class_weights"))
    for loss in test_orders.LOSSES
    if "recompute" in loss.name
]
of_blocks = pytest.mark.parametrize("loss", OF_BLOCKS, ids=str)


@of_blocks
def test_tokens_that_do_not_count(mostly_far, loss):
    test_orders.test_tokens_that_do_not_count(loss)


@of_blocks
@pytest.mark.parametrize("operation", test_orders.HIGHER, ids=lambda o: o.__name__)
def test_higher_orders(mostly_far, loss, operation):
    test_orders.test_tokens_that_do_not_count_to_higher_orders(loss, operation)


LAYOUTS_OF_CLASSES = ("vocabulary", "vocabulary over two axes", "data and vocabulary", "hybrid")


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("way", ["automatic", "explicit", "shard_map"])
@pytest.mark.parametrize("name", ["data", *LAYOUTS_OF_CLASSES])
def test_each_device_looks_at_its_own_far_rows(monkeypatch, name, way, transposed):
    """A label is on one of the devices, the highest class maybe on another."""
    layout, (hidden, kernel, bias, labels) = LAYOUTS[name], problem(24, 4, 40)
    hidden[::5] *= 30
    arrays = {"hidden": hidden.reshape(4, 6, 4), "bias": bias, "labels": labels.reshape(4, 6)}
    arrays["kernel"] = kernel.T if transposed else kernel

    def total(a, axis_name=None):
        return head(
            *(a["hidden"], a["kernel"], a["labels"]),
            bias=a["bias"],
            label_smoothing=0.1,
            z_loss=0.01,
            gradients="recompute",
            reduction="sum",
            axis_name=axis_name,
            transpose_kernel=transposed,
            chunk_size=6,
        )

    true = test_sharding.stepped(total)(arrays)
    kind = AxisType.Explicit if way == "explicit" else AxisType.Auto
    on_mesh = test_sharding.in_shard_map(total, layout, transposed=transposed)
    with contextlib.contextmanager(on_device)("other devices"):
        few_and_far(monkeypatch, 5)
        program = on_mesh if way == "shard_map" else total
        specs = layout.specs(transposed=transposed)
        test_sharding.check(program, mesh_of(kind), specs, arrays=arrays, true=true)
