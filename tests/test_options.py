# SPDX-License-Identifier: Apache-2.0
"""Every option of the losses, alone and together, against NumPy in float64 from the definitions."""

from functools import partial
from typing import Any

import assertions
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from heads import WAYS, U, both_ways, head, problem

import jaxsoftmax as js

integer = js.softmax_cross_entropy_with_integer_labels
N, H, V = 13, 5, 37
HIDDEN, KERNEL, BIAS, LABELS = problem(N, H, V, scale=2)
WEIGHTS = np.random.default_rng(7).uniform(0, 2, N).astype(np.float32)
CLASS_WEIGHTS = {"class_weights": np.random.default_rng(8).uniform(0.2, 2, V).astype(np.float32)}
# Of the largest entry: sums of a few hundred terms of that size.
assert_close = partial(assertions.assert_close, of_largest=800 * U, floor=1)
SETS: list[dict[str, Any]] = [
    {},
    {"label_smoothing": 0.1},
    {"z_loss": 0.3},
    {"soft_cap": 3.0},
    {"temperature": 0.7},
    CLASS_WEIGHTS,
    CLASS_WEIGHTS | {"label_smoothing": 0.2},
    CLASS_WEIGHTS | {"ignore_index": -100, "z_loss": 0.3},
    CLASS_WEIGHTS
    | {
        "ignore_index": 5,
        "label_smoothing": 0.1,
        "z_loss": 0.05,
        "soft_cap": 4.0,
        "temperature": 1.7,
    },
]


def labels_for(options):
    """Some tokens get the ignored label."""
    labels = LABELS.copy()
    if "ignore_index" in options:
        labels[[2, 7]] = options["ignore_index"]
    return labels


def truth(raw, labels, options: Any, g):
    """Losses, what each token counts, and gradients of Σ g · loss, of raw logits and options."""
    raw, g = raw.astype(np.float64), np.asarray(g, np.float64)
    cap, t = options.get("soft_cap"), options.get("temperature", 1.0)
    epsilon, lam = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    u = options.get("class_weights")
    u = np.ones(raw.shape[-1]) if u is None else np.asarray(u, np.float64)
    ignored = labels == options.get("ignore_index", None)
    tanh = np.tanh(raw / cap) if cap else np.zeros_like(raw)
    capped = raw if cap is None else np.where(np.isinf(raw), raw, cap * tanh)
    z = capped / t
    inside = z > -np.inf
    n = inside.sum(-1, keepdims=True)
    m = z.max(-1, keepdims=True)
    e = np.exp(z - m)
    p = e / e.sum(-1, keepdims=True)
    lse = m + np.log(e.sum(-1, keepdims=True))
    cost = np.where(inside, lse - np.where(inside, z, 0), 0)
    rows = np.arange(len(z))
    index = np.where(ignored, 0, labels)
    y = np.zeros_like(z)
    y[rows, index] = 1
    w = u[index][:, None]
    share = np.where(inside, u, 0) / n
    nll, spread = (lse[:, 0] - z[rows, index]), (share * cost).sum(-1)
    losses = (1 - epsilon) * w[:, 0] * nll + epsilon * spread + lam * lse[:, 0] ** 2
    losses = np.where(ignored, 0, losses)
    g = np.where(ignored, 0, g)[:, None]
    target = (1 - epsilon) * w * y + epsilon * share
    dz = g * (target.sum(-1, keepdims=True) * p - target + 2 * lam * lse * p)
    finite_z = np.where(inside, z, 0)
    d_raw = dz / t if cap is None else np.where(inside, dz * (1 - tanh**2) / t, 0)
    gradients = {
        "logits": d_raw,
        "temperature": -(dz * finite_z).sum() / t,
        "label_smoothing": (g[:, 0] * (spread - w[:, 0] * nll)).sum(),
        "z_loss": (g * lse**2).sum(),
        "class_weights": (g * ((1 - epsilon) * y * nll[:, None] + epsilon / n * cost)).sum(0),
    }
    if cap is not None:
        finite = np.where(inside, raw, 0)
        slope = np.where(inside, tanh - finite / cap * (1 - tanh**2), 0)
        gradients["soft_cap"] = (dz * slope / t).sum()
    return losses, np.where(ignored, 0, w[:, 0]), gradients


def differentiable(options) -> dict[str, Any]:
    return {k: np.asarray(v, np.float32) for k, v in options.items() if k != "ignore_index"}


over_paths = pytest.mark.parametrize("path", ["logits", *WAYS])


def assert_gradients(got, want):
    """Of each option; of class weights in a mean not, whose part in the divisor `truth` has not."""
    assert_close(got, {name: want[name] for name in got})


def _on_logits(raw, labels, g, options, axis=-1):
    """(losses, gradients of Σ g · loss by logits and options); labels have the shape of g."""
    ignore = {"ignore_index": options.get("ignore_index")}

    @jax.jit
    def run(logits, free):
        losses = lambda z, free: integer(z, labels, axis, **ignore, **free)  # noqa: E731
        out, pull = jax.vjp(losses, logits, free)
        return out, pull(g)

    return run(raw, differentiable(options))


@pytest.mark.parametrize("options", SETS, ids=lambda options: "+".join(options) or "none")
def test_values_and_gradients_of_every_option(options):
    labels, raw = labels_for(options), HIDDEN.astype(np.float64) @ KERNEL + BIAS

    logits = raw.astype(np.float32)
    g = np.random.default_rng(1).standard_normal(N).astype(np.float32)
    out, (d, d_free) = _on_logits(logits, labels, g, options)
    losses, _, want = truth(logits, labels, options, g)
    assert_close((out, d), (losses, want["logits"]))
    assert_gradients(d_free, want)

    _, counts, _ = truth(raw, labels, options, np.ones(N))
    divisor = (WEIGHTS * counts).sum()
    losses, _, want = truth(raw, labels, options, WEIGHTS / divisor)
    d = want["logits"]
    expected = (
        (WEIGHTS * losses).sum() / divisor,
        (d @ KERNEL.T.astype(np.float64), HIDDEN.T.astype(np.float64) @ d, d.sum(0)),
    )
    free = differentiable(options)
    fixed = {k: free.pop(k) for k in ("class_weights",) if k in free}

    @partial(jax.jit, static_argnames="path")
    def of_head(hidden, kernel, bias, free, path):
        def mean(hidden, kernel, bias, free: Any):
            return head(
                *(hidden, kernel, labels),
                bias=bias,
                weights=WEIGHTS,
                gradients=path,
                chunk_size=4 if path == "in_forward" else 16,
                ignore_index=options.get("ignore_index"),
                **free,
                **fixed,
            )

        return jax.value_and_grad(mean, (0, 1, 2, 3))(hidden, kernel, bias, free)

    for path in WAYS:
        value, (*ds, d_free) = of_head(HIDDEN, KERNEL, BIAS, free, path)
        assert_close((value, tuple(ds)), expected, name=path)
        assert_gradients(d_free, want)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_every_option_over_two_batch_axes(axis):
    options, n = SETS[-1] | {"ignore_index": V}, 12
    labels, raw = labels_for(options)[:n], (HIDDEN @ KERNEL + BIAS)[:n]
    g = np.random.default_rng(3).standard_normal(n).astype(np.float32)
    losses, _, want = truth(raw, labels, options, g)

    logits = np.moveaxis(raw.reshape(3, 4, V), -1, axis)
    out, (d, d_free) = _on_logits(logits, labels.reshape(3, 4), g.reshape(3, 4), options, axis)
    assert_close(out.reshape(n), losses)
    assert_close(jnp.moveaxis(d, axis, -1).reshape(n, V), want["logits"])
    assert_gradients(d_free, want)


@both_ways
def test_a_padded_vocabulary_with_every_option(gradients):
    """Blocks with a class that is left out, and one of nothing else."""
    options = {"label_smoothing": 0.1, "z_loss": 0.1, "soft_cap": 3.0, "temperature": 1.3}

    @jax.jit
    def step(kernel, bias, class_weights):
        def mean(hidden, kernel, bias, class_weights):
            given: Any = {"bias": bias, "class_weights": class_weights, **options}
            return head(hidden, kernel, LABELS, gradients=gradients, chunk_size=16, **given)

        return jax.value_and_grad(mean, (0, 1, 2, 3))(HIDDEN, kernel, bias, class_weights)

    arrays = KERNEL, BIAS, CLASS_WEIGHTS["class_weights"]
    padded = [
        np.pad(a, [(0, 0)] * (a.ndim - 1) + [(0, 30)], constant_values=value)
        for a, value in zip(arrays, (9, -np.inf, 5), strict=True)
    ]
    want, want_d = step(*arrays)
    got, got_d = step(*padded)
    assert_close(got, want, of_largest=40 * U)
    assert_close([got_d[0], *(d[..., :V] for d in got_d[1:])], list(want_d))
    for d in got_d[1:]:
        np.testing.assert_array_equal(np.asarray(d)[..., V:], 0)


@pytest.mark.parametrize("gap", [0.0, 5.0, 17.0, 30.0, 60.0])
def test_options_keep_the_loss_exact_where_the_model_is_confident(gap):
    # One class leads by `gap` after the cap and the temperature: −r/(1 + r) at the label.
    rng = np.random.default_rng(int(gap))
    logits = rng.standard_normal(50).astype(np.float32)
    logits[11] = logits.max() + 2 * gap

    def loss(logits):
        return integer(logits, np.int32(11), soft_cap=1e4, temperature=2.0)

    value, d = jax.value_and_grad(loss)(jnp.asarray(logits))
    raw = logits.astype(np.float64)
    z = 1e4 * np.tanh(raw / 1e4) / 2
    e = np.exp(z - z[11])
    e[11] = 0
    r = e.sum()
    slope = (1 - np.tanh(raw / 1e4) ** 2) / 2
    p = e / (1 + r)
    p[11] = -r / (1 + r)
    # z is rounded after the cap and after the division: a few ulps of the largest |z|.
    tolerance = (16 + 4 * np.abs(z).max()) * 2.0**-23
    np.testing.assert_allclose(value, np.log1p(r), rtol=tolerance)
    np.testing.assert_allclose(d, p * slope, rtol=tolerance)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@over_paths
def test_half_precision_options_are_summed_in_float32_and_rounded_once(path, dtype):
    """Of more tokens than half precision counts; in blocks and chunks of few."""
    n = 9000
    options = {
        "label_smoothing": np.asarray(0.1),
        "z_loss": np.asarray(0.05),
        "soft_cap": np.asarray(4),
        "temperature": np.asarray(1.5),
        "class_weights": np.linspace(0.5, 1, 3),
    }
    options = {name: value.astype(jnp.dtype(dtype)) for name, value in options.items()}
    rng = np.random.default_rng(5)
    hidden = rng.standard_normal((n, 2)).astype(np.float32)
    kernel = rng.standard_normal((2, 3)).astype(np.float32)
    labels = rng.integers(3, size=n)

    @jax.jit
    def gradient(options):
        if path == "logits":
            return jax.grad(lambda o: integer(hidden @ kernel, labels, **o).sum())(options)
        size: Any = {"gradients": path, "chunk_size": 2 if path == "recompute" else 512}
        of_sum = partial(head, hidden, kernel, labels, reduction="sum", **size)
        return jax.grad(lambda o: of_sum(**o))(options)

    wide = {name: value.astype(np.float64) for name, value in options.items()}
    raw = hidden.astype(np.float64) @ kernel
    want = truth(raw, labels, wide, np.ones(n))[2]
    for name, d in gradient(options).items():
        assert d.dtype == dtype
        true = want[name]
        ulp = np.maximum(jnp.finfo(dtype).eps * np.abs(true), 1e-4)
        assert (np.abs(np.asarray(d, np.float64) - true) <= ulp).all(), (name, d, true)


@over_paths
def test_nothing_of_an_infinite_loss_is_nothing(path):
    """A label at −inf with nothing of its loss left: by smoothing of 1, by a class weight of 0."""
    x = np.array([[0, -np.inf, 1], [2, 0, 1]], np.float32)
    labels, weights = np.array([1, 2]), np.array([1, 0, 2], np.float32)

    def losses(**options):
        if path == "logits":
            return integer(x, labels, **options)
        return jnp.stack([_row_through_head(path, x[i], labels[i], options) for i in range(2)])

    z = x.astype(np.float64)
    lse = np.log(np.exp(z).sum(-1))
    smoothed = [(2 * lse[0] - 1) / 2, lse[1] - 1]
    np.testing.assert_allclose(losses(label_smoothing=1.0), smoothed, rtol=1e-6)
    np.testing.assert_allclose(losses(class_weights=weights), [0, 2 * (lse[1] - 1)], rtol=1e-6)
    assert np.isposinf(losses()[0])


def _row_through_head(path, x, label, options):
    """Hidden states of the one number 1; a class at −inf by the bias."""
    return head(
        np.ones((1, 1), np.float32),
        np.where(np.isfinite(x), x, 0)[None],
        label[None],
        bias=np.where(np.isfinite(x), np.float32(0), x),
        reduction="sum",
        gradients=path,
        **options,
    )


@pytest.mark.parametrize("cap", [3e38, 1e30, 1e6])
def test_a_soft_cap_far_above_the_logits_changes_nothing(cap):
    logits = np.array([[0.0, 1, 2, 3], [3e-3, 0, -5, 1]], np.float32)
    labels = np.array([0, 1])
    capped = lambda x, cap: integer(x, labels, soft_cap=cap).sum()  # noqa: E731
    got = jax.value_and_grad(capped, (0, 1))(logits, cap)
    want = jax.value_and_grad(lambda x: integer(x, labels).sum())(logits)
    np.testing.assert_array_equal(got[0], want[0])
    np.testing.assert_allclose(got[1][0], want[1], rtol=1e-6)
    assert abs(got[1][1]) < 1e-12
