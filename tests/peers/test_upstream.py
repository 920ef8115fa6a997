# SPDX-License-Identifier: Apache-2.0
"""The patches of docs/upstream.md: they are exact, keep what holds today, and pass optax's tests.

The truth is 60-digit arithmetic. With u = 2^-24, a gap γ_k below the maximum, a remainder r of n-1
terms added in any order (d = n-1), exp good to α = 2 units of u, log and log1p to λ = 4, the
bounds are those of docs/forms.md section 11 with the roundings of these forms:

* r: γ̄ + α + d; an entry of the gradient: γ_k + γ̄ + 2 α + d + 6 (two quotients, two products and
  sums)
* the loss: as (49) where the label leads; elsewhere gap + log(r + e) is at least log 2, so that an
  absolute error of (γ̄ + α + d + 1) u of the logarithm counts 1.5 times at most
* a second derivative: a product of two such
"""

import doctest
import functools
import importlib.metadata
from typing import Any

import jax
import jax.test_util
import mpmath
import numpy as np
import optax
import pytest
from jax import numpy as jnp
from optax.losses import _classification
from packaging.version import Version
from test_optax_suite import CASES, run

from bench import upstream
from bench.cases import Dtype, Labels, Logits, Mode

# The installed versions in this range must take the patch; others may differ in its lines. Before
# 0.2.6 optax had the log-sum-exp written out.
APPLIES = {"optax": ("0.2.6", "0.2.8"), "jax": ("0.10.0", "0.12.0.1")}
PAGE = (upstream.PATCHES.parent / "upstream.md").read_text(encoding="utf-8")
INTEGER = "softmax_cross_entropy_with_integer_labels"
U = 2.0**-24
TINY = float(np.finfo(np.float32).tiny)
ALPHA, LAMBDA = 2, 4


@functools.cache
def patched(package):
    version = Version(importlib.metadata.version(package))
    first, last = map(Version, APPLIES[package])
    try:
        return upstream.patched(package)
    except upstream.DoesNotApplyError as error:
        if first <= version <= last:
            raise
        pytest.skip(f"the patch is for {package} {first} to {last}: {error}")


def integer_loss(*args, **kwargs):
    return getattr(patched("optax"), INTEGER)(*args, **kwargs)


def picked_loss(logits, labels):
    """By the patched log_softmax; its cotangent is one-hot."""
    log_probs = patched("jax").log_softmax(logits)
    return -jnp.take_along_axis(log_probs, labels[..., None], -1)[..., 0]


def dense_loss(logits, labels):
    """As optax's own line, through the patched log_softmax."""
    one_hot = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    return -(one_hot * patched("jax").log_softmax(logits)).sum(-1)


LOSSES = {"optax": integer_loss, "jax, one entry": picked_loss, "jax, one-hot": dense_loss}
losses = pytest.mark.parametrize("loss", list(LOSSES.values()), ids=list(LOSSES))


# Rows of logits with a label.


def led(gap, n=10, offset=0.0):
    z = np.full(n, offset, np.float32)
    z[3] += np.float32(gap)
    return z, 3


def rows():
    rng = np.random.default_rng(0)
    for gap in (0.0, 1.0, 5.0, 17.0, 30.0, 80.0, -1e-3, -5.0, -17.0, -60.0):
        yield f"gap {gap:g}", *led(gap)
    yield "offset", *led(17.0, offset=1000.0)
    for gap in (0, 17, 30, 80):
        z = rng.normal(size=50).astype(np.float32)
        z[7] += gap
        yield f"normal, {gap} more", z, 7
        yield f"normal, {gap} more, wrong", z, 8
    yield "a tie", np.array([2, 1, 2, -1], np.float32), 2
    yield "three ties, wrong", np.array([2, 2, 2, -1], np.float32), 3
    yield "a near tie", np.array([2, np.nextafter(np.float32(2), 0), -9], np.float32), 1
    yield "minus infinity", np.array([0, -np.inf, 20, -np.inf], np.float32), 2
    yield "one class left", np.array([-np.inf, 5, -np.inf], np.float32), 1
    yield "one class", np.array([3], np.float32), 0


ROWS = {name: (z, t) for name, z, t in rows()}
each_row = pytest.mark.parametrize(("z", "t"), list(ROWS.values()), ids=list(ROWS))


class Truth:
    def __init__(self, z, t):
        e: list[Any]
        with mpmath.workdps(60):
            logits = [mpmath.mpf(float(x)) if np.isfinite(x) else -mpmath.inf for x in z]
            m = max(logits)
            e = [mpmath.exp(x - m) if x > -mpmath.inf else mpmath.mpf(0) for x in logits]
            total = mpmath.fsum(e)
            p = [x / total for x in e]
            q = [mpmath.fsum(p[:k] + p[k + 1 :]) for k in range(len(p))]  # 1 - p
            gap = [m - x if x > -mpmath.inf else mpmath.mpf(0) for x in logits]
            j = int(np.argmax(z))
            rest = [k for k in range(len(e)) if k != j]
            r = mpmath.fsum(e[k] for k in rest)
            mean = mpmath.fsum(e[k] * gap[k] for k in rest) / r if r else 0
            to_float = functools.partial(np.array, dtype=np.float64)
            log_total = mpmath.log1p(r)
            loss: Any = gap[t] + log_total
            self.loss = float(loss)
            self.p = to_float([float(x) for x in p])
            self.gradient = self.p.copy()
            left: list[Any] = q
            self.gradient[t] = -float(left[t])
            self.hessian = -np.outer(self.p, self.p)
            np.fill_diagonal(self.hessian, [float(a * b) for a, b in zip(p, left, strict=True)])
        d, mean = len(z) - 1, float(mean)
        gaps = to_float([float(x) for x in gap])
        self.of_loss = 1.5 * (mean + ALPHA + d + 1) + LAMBDA + 3
        self.of_gradient = gaps + mean + 2 * ALPHA + d + 6


def assert_relative(got, true, units, floor=TINY):
    error = abs(np.asarray(got, np.float64) - true)
    assert (error <= units * U * abs(true) + floor).all(), (got, true, error / U)


@losses
@each_row
def test_loss_and_gradient_are_exact(loss, z, t):
    """In reverse and in forward mode, jitted or not; relative in every entry."""
    if loss is dense_loss and not np.isfinite(z).all():
        pytest.skip("0 · -inf is NaN in optax.softmax_cross_entropy, with the patch or without")
    truth, of_row = Truth(z, t), functools.partial(loss, labels=jnp.int32(t))
    assert_relative(of_row(z), truth.loss, truth.of_loss)
    if truth.loss:
        assert of_row(z) > 0
    for derivative in (jax.grad, jax.jacfwd):
        for gradient in (derivative(of_row), jax.jit(derivative(of_row))):
            assert_relative(gradient(z), truth.gradient, truth.of_gradient)


@losses
@each_row
def test_second_derivatives(loss, z, t):
    """Absolute, in all four ways; by `jax.hessian` relative where the label's class leads."""
    if not np.isfinite(z).all():
        pytest.skip("rows of finite logits")
    truth, of_row = Truth(z, t), functools.partial(loss, labels=jnp.int32(t))
    units = 2 * np.add.outer(truth.of_gradient, truth.of_gradient)
    for outer in (jax.jacfwd, jax.jacrev):
        for inner in (jax.grad, jax.jacfwd):
            hessian = np.asarray(outer(inner(of_row))(z), np.float64)
            assert (abs(hessian - truth.hessian) <= units * U).all()
    if truth.p[t] > 0.999:
        # Beyond that, what is left where terms of order 1, each rounded, cancel twice.
        assert_relative(jax.hessian(of_row)(z), truth.hessian, units, floor=U**2)


def test_what_optax_and_jax_lose_today():
    """Else there would be nothing to patch."""
    z, t = led(17.0)
    truth, label = Truth(z, t), jnp.int32(t)
    dense = lambda z, t: optax.softmax_cross_entropy(z, jax.nn.one_hot(t, 10))  # noqa: E731
    for loss in (getattr(optax, INTEGER), dense):
        assert abs(jax.grad(loss)(z, label)[t] / truth.gradient[t] - 1) > 0.03
        assert jax.grad(loss)(led(30.0)[0], label)[t] == 0
        assert loss(led(30.0)[0], label) == 0


def test_dense_labels_of_any_kind():
    """Absolute errors relative to Y p + y, which no form can do better than (section 6)."""
    rng = np.random.default_rng(1)
    z = rng.normal(size=(40, 20)).astype(np.float32)
    z[::2, 4] += 25
    y = rng.dirichlet(np.full(20, 0.3), size=40).astype(np.float32)
    y[::3] = 0.9 * np.eye(20)[4] + 0.1 / 20
    loss = lambda z: -(y * patched("jax").log_softmax(z)).sum()  # noqa: E731
    truths = [Truth(row, 4) for row in z]
    p = np.array([truth.p for truth in truths])
    total = y.sum(-1, keepdims=True, dtype=np.float64)
    exact = total * p - y
    near = np.array([-truth.gradient[4] for truth in truths])
    exact[:, 4] = (total[:, 0] - y[:, 4]) - total[:, 0] * near
    units = np.array([truth.of_gradient for truth in truths]) + 20
    error = abs(np.asarray(jax.grad(loss)(z), np.float64) - exact)
    assert (error <= units * U * (total * p + y)).all()


# What holds today: every transform, axes and masks, special values.


@pytest.mark.parametrize("package", ["optax", "jax"])
def test_axes_and_masks(package):
    """As of the rows that are taken out by hand."""
    rng = np.random.default_rng(2)
    z = rng.normal(size=(3, 5, 4)).astype(np.float32)
    z[:, 2] += 25
    mask = rng.uniform(size=z.shape) < 0.7
    mask[:, 2] = True
    mask[2, :, 3] = False
    labels = np.full((3, 4), 2)

    def loss(z, where=None):
        if package == "optax":
            return integer_loss(z, labels, axis=1, where=where)
        log_probs = patched("jax").log_softmax(z, 1, where)[:, 2]
        included = True if where is None else where.any(1)
        return jnp.where(included, -log_probs, 0)

    for where in (None, mask):
        values, gradients = loss(z, where), jax.grad(lambda z: loss(z, where).sum())(z)  # noqa: B023
        for i, k in np.ndindex(3, 4):
            kept = np.full(5, True) if where is None else where[i, :, k]
            value, gradient = values[i, k], np.asarray(gradients[i, :, k])
            np.testing.assert_array_equal(gradient[~kept], 0)
            if kept.any():
                truth = Truth(z[i, kept, k], kept[:2].sum())
                assert_relative(value, truth.loss, truth.of_loss)
                assert_relative(gradient[kept], truth.gradient, truth.of_gradient)
            else:
                assert value == 0
    if package == "optax":
        flat = integer_loss(z, np.full(3, 9), axis=(1, 2))
        np.testing.assert_array_equal(flat, integer_loss(z.reshape(3, 20), np.full(3, 9)))


@pytest.mark.parametrize(
    ("z", "t", "where"),
    [
        ([0, -np.inf, 2], 1, None),
        ([-np.inf, -np.inf, -np.inf], 0, None),
        ([np.inf, 0, 1], 0, None),
        ([np.inf, 0, 1], 1, None),
        ([np.nan, 0, 1], 1, None),
        ([1, 2, 3], -1, None),
        ([1, 2, 3], 5, None),
        ([1, 2, 99], 2, [True, True, False]),
        ([1, 2, 99], 0, [False, False, False]),
        ([1, 2, 99], 1, [False, True, False]),
    ],
)
@pytest.mark.parametrize("package", ["optax", "jax"])
def test_special_values_stay(package, z, t, where):
    """The value, and the gradient where the value is a number."""
    z, t = np.array(z, np.float32), jnp.int32(t)
    where = None if where is None else np.array(where)
    if package == "optax":
        before, after = getattr(optax, INTEGER), integer_loss
        pair = [functools.partial(f, labels=t, where=where) for f in (before, after)]
    else:
        before, after = jax.nn.log_softmax, patched("jax").log_softmax
        pair = [functools.partial(f, where=where) for f in (before, after)]
    values = [f(z) for f in pair]
    np.testing.assert_allclose(*values[::-1], rtol=4 * U, atol=4 * U)
    gradients = [jax.jacrev(f)(z) for f in pair]
    if not np.isnan(values[0]).any() and not np.isposinf(z).any():
        np.testing.assert_allclose(*gradients[::-1], rtol=8 * U, atol=8 * U)


@losses
def test_transforms(loss):
    rng = np.random.default_rng(3)
    z, t = 5 * rng.normal(size=(6, 7)).astype(np.float32), rng.integers(7, size=6)
    want = loss(z, t)
    gradient = jax.grad(lambda z: loss(z, t).sum())
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    close(jax.jit(loss)(z, t), want)
    close(jax.vmap(loss)(z, t), want)
    close(jax.vmap(jax.grad(loss))(z, t), gradient(z))
    close(jax.vmap(loss, (1, None))(np.stack([z, z], 1), t), [want, want])
    close(jax.lax.map(lambda row: loss(*row), (z, t)), want)
    close(jax.grad(lambda z: jax.checkpoint(loss)(z, t).sum())(z), gradient(z))
    _, tangent = jax.jvp(lambda z: loss(z, t), (z,), (np.ones_like(z),))
    close(tangent, np.zeros(6), atol=1e-6)
    with jax.enable_x64():
        wide = z[:2].astype(np.float64)
        jax.test_util.check_grads(lambda z: loss(z, t[:2]), (wide,), order=3, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_is_not_much_worse(dtype):
    """Than optax and JAX today, by the sum of the errors: JAX's gradient rounds more often."""
    rng = np.random.default_rng(4)
    z = jnp.asarray(4 * rng.normal(size=(64, 30)), dtype)
    t = rng.integers(30, size=64)
    truths = [Truth(np.asarray(row, np.float32), label) for row, label in zip(z, t, strict=True)]
    values = np.array([truth.loss for truth in truths])
    gradients = np.array([truth.gradient for truth in truths])
    log_probs = lambda f: lambda z, t: -jnp.take_along_axis(f(z), t[..., None], -1)[..., 0]  # noqa: E731
    for before, after in (
        (getattr(optax, INTEGER), integer_loss),
        (log_probs(jax.nn.log_softmax), log_probs(patched("jax").log_softmax)),
    ):
        errors = []
        for loss in (before, after):
            value, gradient = loss(z, t), jax.grad(lambda z: loss(z, t).sum())(z)  # noqa: B023
            assert value.dtype == gradient.dtype == dtype
            errors.append(
                [
                    abs(np.asarray(got, np.float64) - true).sum()
                    for got, true in ((value, values), (gradient, gradients))
                ]
            )
        (value_before, before_), (value_after, after_) = errors
        assert value_after <= 1.25 * value_before
        assert after_ <= (1.25 if after is integer_loss else 1.6) * before_


# optax's own tests and examples.


@pytest.fixture
def in_optax(monkeypatch, package):
    jax.clear_caches()  # of functions traced without the patch
    if package in ("optax", "both"):
        function = getattr(patched("optax"), INTEGER)
        for module in (optax, optax.losses, _classification):
            monkeypatch.setattr(module, INTEGER, function)
    if package in ("jax", "both"):
        monkeypatch.setattr(jax.nn, "log_softmax", patched("jax").log_softmax)
    yield
    jax.clear_caches()


@pytest.mark.parametrize("package", ["optax", "jax", "both"])
@pytest.mark.parametrize(("case", "name"), CASES)
@pytest.mark.usefixtures("in_optax")
def test_optax_test_passes_with_the_patch(case, name):
    assert run(case, name) == []


@pytest.mark.parametrize("package", ["optax", "jax"])
@pytest.mark.usefixtures("in_optax")
def test_optax_examples_print_the_same(package):
    functions = {"optax": getattr(patched("optax"), INTEGER), "jax": optax.softmax_cross_entropy}
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        (example,) = doctest.DocTestFinder().find(functions[package], "example", globs={})
        precision = np.get_printoptions()["precision"]
        found = doctest.DocTestRunner().run(example)
        np.set_printoptions(precision=precision)
    assert found.attempted > 5
    assert not found.failed


# The patches themselves, and the command that measures them.


@pytest.mark.parametrize("package", upstream.MODULES)
def test_context_is_short(package):
    """A patch repeats no more of a file than it takes to place it."""
    lines = (upstream.PATCHES / f"{package}.patch").read_text().splitlines()
    kept = [line for line in lines[3:] if line.startswith(("-", " "))]
    assert len(kept) <= 20
    assert all(len(line) <= 81 for line in lines)


def test_page_shows_the_patches():
    for package in upstream.MODULES:
        patch = (upstream.PATCHES / f"{package}.patch").read_text()
        assert f"```diff\n{patch}```" in PAGE
        first, last = APPLIES[package]
        assert f"{first} to {last}" in PAGE
        changed = [line for line in patch.splitlines()[2:] if line[0] in "+-"]
        added = sum(line[0] == "+" for line in changed)
        assert f"| −{len(changed) - added} +{added} |" in PAGE


@pytest.mark.parametrize("labels", Labels)
def test_cost_is_measured_of_both(labels):
    patched("optax" if labels is Labels.INTEGER else "jax")
    cost = upstream.timed(Logits(8, 16, Dtype.FLOAT32, labels), Mode.VALUE_AND_GRAD, seconds=0)
    assert cost.before > 0 < cost.after
    assert "8x16 float32" in upstream.table([cost], "ms").markdown()


@pytest.mark.parametrize("gap", [10, 17, 20, 30, 80])
def test_page_shows_what_is_lost(gap):
    z, t = led(float(gap))
    truth, label = Truth(z, t), jnp.int32(t)
    cells = [truth.loss, integer_loss(z, label)]
    cells += [truth.gradient[t], jax.grad(integer_loss)(z, label)[t]]
    loss, patched_loss, slope, patched_slope = (f"{abs(float(x)):.2e}" for x in cells)
    today = getattr(optax, INTEGER)
    lost = [today(z, label), jax.grad(today)(z, label)[t]]
    lost = [f"{float(x):.2e}".replace("-", "−", int(x < 0)) if x else "0" for x in lost]
    row = [loss, lost[0], patched_loss, f"−{slope}", lost[1], f"−{patched_slope}"]
    assert f"| {gap} | {' | '.join(row)} |" in PAGE
