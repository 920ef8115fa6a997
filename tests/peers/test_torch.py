# SPDX-License-Identifier: Apache-2.0
"""Agreement with PyTorch's `cross_entropy` and `kl_div`, over their options."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax

torch = pytest.importorskip("torch", reason="the extra `peers` has torch")

torch_functions = torch.nn.functional
N, H, V = 23, 7, 31
# Losses of logits are not reduced, and with `in_forward` all are.
PATHS = {
    "logits": ["none"],
    "in_forward": ["mean", "sum"],
    "recompute": ["mean", "sum", "none"],
}
CASES = [
    (path, reduction, smoothing, weighted)
    for path, reductions in PATHS.items()
    for reduction, smoothing, weighted in itertools.product(
        reductions, [0.0, 0.1, 1.0], [False, True]
    )
]


@pytest.mark.parametrize(("path", "reduction", "smoothing", "weighted"), CASES)
def test_values_and_gradients(path, reduction, smoothing, weighted):
    ours = {"mean": "mean", "sum": "sum", "none": None}[reduction]
    rng = np.random.default_rng(0)
    hidden, kernel, bias = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((N, H), (H, V), (V,))
    )
    labels = rng.integers(0, V, N)
    labels[[3, 10]] = -100
    class_weights = rng.uniform(0.2, 2, V).astype(np.float32) if weighted else None

    tensors = [torch.tensor(a, requires_grad=True) for a in (hidden, kernel, bias)]
    logits = tensors[0] @ tensors[1] + tensors[2]
    logits.retain_grad()
    want = torch_functions.cross_entropy(
        logits,
        torch.tensor(labels),
        weight=None if class_weights is None else torch.tensor(class_weights),
        ignore_index=-100,
        label_smoothing=smoothing,
        reduction=reduction,
    )
    g = rng.standard_normal(want.shape).astype(np.float32)
    want.backward(torch.tensor(g))

    options = {
        "ignore_index": -100,
        "class_weights": class_weights,
        "label_smoothing": smoothing,
    }
    labels = labels.astype(np.int32)
    if path == "logits":
        out, pull = jax.vjp(
            lambda z: jaxsoftmax.softmax_cross_entropy_with_integer_labels(z, labels, **options),
            jnp.asarray(logits.detach().numpy()),
        )
        gradients = [logits.grad]
    else:
        out, pull = jax.vjp(
            lambda hidden, kernel, bias: jaxsoftmax.linear_softmax_cross_entropy(
                hidden,
                kernel,
                labels,
                bias=bias,
                reduction=ours,
                gradients=path,
                chunk_size=5,
                **options,
            ),
            *map(jnp.asarray, (hidden, kernel, bias)),
        )
        gradients = [tensor.grad for tensor in tensors]
    # float32 sums of at most 31 or 23 terms of size below 20, in two orders.
    np.testing.assert_allclose(out, want.detach().numpy(), rtol=1e-5, atol=1e-5)
    for got, gradient in zip(pull(jnp.asarray(g)), gradients, strict=True):
        np.testing.assert_allclose(got, gradient.numpy(), rtol=1e-4, atol=1e-4)


def u(dtype) -> float:
    """Sums of at most 31 terms, of numbers below 10, in two orders."""
    return 64 * float(np.finfo(dtype).eps)


def assert_same(ours, want, tensors, g):
    """The value and the gradients of ours are torch's, at these tensors, in their dtype."""
    arrays = [tensor.detach().numpy() for tensor in tensors]
    dtype = arrays[0].dtype
    gradients = torch.autograd.grad(want, tensors, torch.tensor(g), retain_graph=True)
    with jax.enable_x64(dtype == np.float64):
        value, pull = jax.vjp(ours, *arrays)
        found = value, *pull(jnp.asarray(g))
    for got, true in zip(found, (want, *gradients), strict=True):
        np.testing.assert_allclose(got, true.detach().numpy(), rtol=u(dtype), atol=u(dtype))


dtypes = pytest.mark.parametrize("dtype", [np.float32, np.float64])


@dtypes
@pytest.mark.parametrize("shape", [(V,), (N, V), (3, V, 5), (2, V, 3, 4)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("targets", ["labels", "probabilities"])
def test_any_axes_and_targets_of_both_kinds(shape, targets, smoothing, dtype):
    """In torch the classes are axis 1, or axis 0 of one example."""
    rng = np.random.default_rng(3)
    axis = min(1, len(shape) - 1)
    batch = shape[:axis] + shape[axis + 1 :]
    z = (2 * rng.standard_normal(shape)).astype(dtype)
    if targets == "labels":
        target = rng.integers(0, V, batch)
        loss = jaxsoftmax.softmax_cross_entropy_with_integer_labels
        ours = target.astype(np.int32)
    else:
        target = ours = rng.dirichlet(np.ones(V), batch).astype(dtype)
        target = ours = np.moveaxis(target, -1, axis)
        loss = jaxsoftmax.softmax_cross_entropy
    logits = torch.tensor(z, requires_grad=True)
    want = torch_functions.cross_entropy(
        logits, torch.tensor(target), label_smoothing=smoothing, reduction="none"
    )
    g = np.asarray(rng.standard_normal(batch), dtype)
    f = partial(loss, labels=ours, axis=axis, label_smoothing=smoothing)
    assert_same(f, want, [logits], g)


@dtypes
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("reduction", ["none", "batchmean", "sum"])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_divergence(reduction, log_target, temperature, dtype):
    """Of logits that differ by about 1, where logarithms of probabilities are good enough.

    torch's temperature is a division of the logits before. Its "mean", which is one over classes
    too, it warns of and will change.
    """
    rng = np.random.default_rng(1)
    z, t = (2 * rng.standard_normal((2, N, V))).astype(dtype)
    tensors = [torch.tensor(a, requires_grad=True) for a in (z, t)]
    log_q, log_p = (torch.log_softmax(a / temperature, -1) for a in tensors)
    target = log_p if log_target else log_p.exp()
    want = torch_functions.kl_div(log_q, target, log_target=log_target, reduction=reduction)
    want = want.sum(-1) if reduction == "none" else want

    def ours(z, t):
        rows = jaxsoftmax.softmax_kl_divergence(z, t, temperature=temperature)
        return {"none": rows, "sum": rows.sum(), "batchmean": rows.mean()}[reduction]

    g = np.asarray(rng.standard_normal(want.shape), dtype)
    assert_same(ours, want, tensors, g)


@dtypes
def test_js_divergence(dtype):
    z, t = (2 * np.random.default_rng(1).standard_normal((2, N, V))).astype(dtype)
    g = np.random.default_rng(2).standard_normal(N).astype(dtype)
    tensors = [torch.tensor(a, requires_grad=True) for a in (z, t)]
    log_q, log_p = (torch.log_softmax(a, -1) for a in tensors)
    log_m = torch.logaddexp(log_q, log_p) - np.log(2)
    halves = [
        torch_functions.kl_div(log_m, a, log_target=True, reduction="none").sum(-1)
        for a in (log_p, log_q)
    ]
    want = (halves[0] + halves[1]) / 2
    assert_same(jaxsoftmax.softmax_js_divergence, want, tensors, g)
