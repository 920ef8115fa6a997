# SPDX-License-Identifier: Apache-2.0
"""Several labels for each token, and predictions: what no other list of cases has of them."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import Case, generator, rows, several

import jaxsoftmax as js
from jaxsoftmax import forward_mode

inf, nan = np.inf, np.nan


def first_maxima(z) -> np.ndarray:
    """As `jnp.argmax`, but −1 in a row with NaN."""
    z = np.asarray(z, np.float64)
    return np.where(np.isnan(z).any(-1), -1, np.where(np.isnan(z), 0, z).argmax(-1))


def with_bad_rows(z) -> np.ndarray:
    """NaN, both infinities and equal maxima at either end."""
    z, classes = z.copy(), z.shape[-1]
    ends = [0, -1, classes // 2]
    for row, (last, more) in enumerate([(nan, 0), (inf, 0), (inf, nan), (-inf, inf), (99, 99)]):
        z[row, ends] = more
        z[row, -1] = last
    z[5] = -inf
    z[6, : classes // 2] = -inf
    return z


SIZES = (1, 2, 17, 130, 300, 512, 1000, 2048, 2050, 4096)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("classes", SIZES)
def test_predictions_are_the_first_maxima(device, classes, dtype):
    """Of rows of every kind, in every form; beside them nothing else changes."""
    z, labels = rows(Case(classes, dtype)).logits, rows(Case(classes, dtype)).labels
    z = with_bad_rows(z)

    @partial(jax.jit, static_argnums=0)
    def outputs(module, z):
        asked, plain = (
            module.label_log_probs(z, labels, with_predictions=wanted) for wanted in (True, False)
        )
        return asked, plain

    for module in (js, forward_mode):
        asked, plain = outputs(module, z)
        assert asked.predictions.dtype == jnp.int32
        np.testing.assert_array_equal(asked.predictions, first_maxima(z))
        jax.tree.map(np.testing.assert_array_equal, asked._replace(predictions=None), plain)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("chunk_size", [1, 5, 16, 40])
def test_predictions_of_a_head(device, chunk_size, transposed):
    """Integers, so that ties are ties: within blocks and across them, classes left out, bad rows.

    A head's logits at ±∞ come from its bias, which every row has; NaN from a hidden state.
    """
    rng = generator("predictions", chunk_size)
    hidden = rng.integers(-1, 2, (64, 2)).astype(np.float32)
    hidden[3] = nan
    kernel = rng.integers(-2, 3, (2, 40)).astype(np.float32)
    bias = np.where(rng.random(40) < 0.3, -inf, 0).astype(np.float32)
    z = hidden @ kernel + bias
    assert (np.sum(z == z.max(-1, keepdims=True), axis=-1) > 1).mean() > 0.5
    labels = np.zeros(64, np.int32)
    given = kernel.T if transposed else kernel
    options: Any = {"chunk_size": chunk_size, "transpose_kernel": transposed}
    options["with_predictions"] = True
    log_probs = jax.jit(partial(js.linear_log_probs, **options))
    out = log_probs(hidden, given, labels, bias=bias)
    np.testing.assert_array_equal(out.predictions, first_maxima(z))
    for infinite in (inf, -inf):
        bias[[7, 33]], bias[:7] = infinite, -inf
        if infinite < 0:
            bias[:] = -inf
        out = log_probs(hidden, given, labels, bias=bias)
        np.testing.assert_array_equal(out.predictions, first_maxima(hidden @ kernel + bias))


def test_predictions_of_capped_logits_are_theirs():
    """Logits that the cap makes equal are ties."""
    z = np.array([[90.0, 400.0, 300.0], [0.0, 1.0, 2.0]], np.float32)
    out = js.label_log_probs(z, np.zeros(2, int), soft_cap=3.0, with_predictions=True)
    np.testing.assert_array_equal(out.predictions, [0, 2])


def test_predictions_have_no_derivative():
    """They pass through every transform, and their cotangents are of no dtype."""
    z, labels = rows(Case(17, "float32")).logits, rows(Case(17, "float32")).labels
    eye = np.eye(len(z), dtype=np.float32)
    head = partial(js.linear_log_probs, eye, chunk_size=5)
    functions = {"logits": js.label_log_probs, "forward": forward_mode.label_log_probs}
    z = np.where(np.isfinite(z), z, 0)
    for name, f in (functions | {"head": head}).items():
        asked = partial(f, with_predictions=True)
        total = lambda z, f=f: jnp.sum(f(z, labels).log_probs)  # noqa: E731
        of_asked = lambda z, f=asked: (jnp.sum(f(z, labels).log_probs), f(z, labels).predictions)  # noqa: E731
        d, found = jax.jit(jax.grad(of_asked, has_aux=True))(z)
        np.testing.assert_array_equal(found, first_maxima(z), err_msg=name)
        np.testing.assert_array_equal(d, jax.jit(jax.grad(total))(z), err_msg=name)
        out, pull = jax.vjp(lambda z, f=asked: f(z, labels), z)
        no = np.zeros(len(z), jax.dtypes.float0)
        (d,) = pull(out._replace(log_probs=jnp.ones(len(z)), predictions=no))
        assert d.shape == z.shape
        along = jax.jvp(jax.grad(lambda z, f=asked: jnp.sum(f(z, labels).log_probs)), (z,), (z,))
        assert np.isfinite(along[1]).all()
    _, change = jax.jvp(
        lambda z: functions["forward"](z, labels, with_predictions=True), (z,), (z,)
    )
    assert change.predictions.dtype == jax.dtypes.float0


def test_a_label_out_of_range_among_several():
    """NaN at that entry; in the row's gradient only if that entry is used."""
    z = rows(Case(17, "float32")).logits[:2]
    labels = np.array([[3, 17, 4], [-1, 5, 5]])
    assert np.isnan(js.label_log_probs(z, labels).log_probs).tolist() == [
        [False, True, False],
        [True, False, False],
    ]

    def of_head(z, labels):
        return js.linear_log_probs(z, np.eye(17, dtype=np.float32), labels, chunk_size=5)

    fine = np.where((labels < 0) | (labels > 16), 0, labels)
    for f in (js.label_log_probs, of_head):

        def slope(g, labels, f=f):
            return jax.grad(lambda z: jnp.sum(jnp.where(g != 0, g * f(z, labels)[0], 0)))(z)

        unused = np.array([[1, 0, 2], [0, 1, -3]], np.float32)
        np.testing.assert_array_equal(slope(unused, labels), slope(unused, fine))
        used = np.array([[1, 0, 2], [0.5, 1, -3]], np.float32)
        d = np.asarray(slope(used, labels))
        assert np.isnan(d[1]).all()
        np.testing.assert_array_equal(d[0], slope(used, fine)[0])


@pytest.mark.parametrize("count", [0, 1])
def test_no_labels_and_one(count):
    """No label is none; one in an axis of its own is that label."""
    z, labels = rows(Case(17, "float32")).logits, rows(Case(17, "float32")).labels
    eye = np.eye(len(z), dtype=np.float32)
    z = np.where(np.isfinite(z), z, 0)
    for f in (js.label_log_probs, partial(js.linear_log_probs, eye, chunk_size=5)):

        @jax.jit
        def both(z, labels, f=f):
            fields = lambda z: jax.tree.leaves(f(z, labels, with_entropy=True))  # noqa: E731
            return fields(z), jax.grad(lambda z: sum(jnp.sum(a) for a in fields(z)))(z)

        (got, *more), d = both(z, labels[:, None][:, :count])
        (one, *others), d_one = both(z, labels)
        assert got.shape == (len(z), count)
        np.testing.assert_array_equal(got, one[:, None][:, :count])
        jax.tree.map(np.testing.assert_array_equal, more, others)
        if count:
            np.testing.assert_allclose(d, d_one, rtol=1e-5, atol=1e-6)


def test_several_labels_over_class_axes():
    """K comes last, whichever axes are the classes."""
    z = generator("several, axes").standard_normal((3, 4, 5)).astype(np.float32)
    for axis in (0, 1, (2, 0), (0, 1, 2), ()):
        axes = axis if isinstance(axis, tuple) else (axis,)
        batch = [i for i in range(3) if i not in axes]
        flat = z.transpose(*batch, *axes).reshape(*(z.shape[i] for i in batch), -1)
        labels = several(np.zeros(flat.shape[:-1], int) + flat.shape[-1] // 2, flat.shape[-1])
        got = js.label_log_probs(z, labels, axis, with_predictions=True)
        want = np.take_along_axis(np.asarray(jax.nn.log_softmax(flat)), labels, axis=-1)
        np.testing.assert_allclose(got.log_probs, want, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(got.predictions, flat.argmax(-1))


def _flops(f, *shapes) -> float:
    *real, labels = (jax.ShapeDtypeStruct(*shape) for shape in shapes)

    def step(*real_and_labels):
        *real, labels = real_and_labels
        return jax.value_and_grad(lambda *real: jnp.sum(f(*real, labels)[0]), (*range(len(real)),))(
            *real
        )

    analysis: Any = jax.jit(step).lower(*real, labels).compile().cost_analysis()
    return analysis["flops"]


@pytest.mark.parametrize("name", ["logits", "head"])
def test_work_of_the_logits_size_does_not_grow_with_the_labels(device, name):
    """By the compiler's count, of value and gradient: not an operation more for each class."""
    n, classes, count = 32, 4096, 64
    real = [((n, classes), np.float32)]
    f: Any = js.label_log_probs
    if name == "head":
        real = [((n, 4), np.float32), ((4, classes), np.float32)]
        f = partial(js.linear_log_probs, chunk_size=classes)
    one, many = (_flops(f, *real, ((n, k), np.int32)) for k in (1, count))
    assert one > 10 * n * classes
    assert many - one < n * (count - 1) * classes / 16
