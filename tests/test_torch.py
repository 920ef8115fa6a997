# SPDX-License-Identifier: Apache-2.0
"""Agreement with `torch.nn.functional.cross_entropy`: weights, ignored labels, smoothing, means."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax

torch = pytest.importorskip("torch")

N, H, V = 23, 7, 31
CASES = list(itertools.product([0.0, 0.1, 1.0], [False, True], ["mean", "sum", "none"]))


@pytest.mark.parametrize("path", ["logits", "in_forward", "recompute"])
@pytest.mark.parametrize(("smoothing", "weighted", "reduction"), CASES)
def test_values_and_gradients(smoothing, weighted, reduction, path):
    ours = {"mean": "mean", "sum": "sum", "none": None}[reduction]
    if (path == "logits") != (ours is None) and path != "recompute":
        pytest.skip("losses of logits are not reduced; in_forward needs a reduction")
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
    want = torch.nn.functional.cross_entropy(
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


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_divergences(dtype):
    """Of logits that differ by about 1, where logarithms of probabilities are good enough."""
    z, t = (2 * np.random.default_rng(1).standard_normal((2, N, V))).astype(dtype)
    g = np.random.default_rng(2).standard_normal(N).astype(dtype)
    of_z, of_t = (torch.tensor(a, requires_grad=True) for a in (z, t))
    log_q, log_p = (torch.log_softmax(a, -1) for a in (of_z, of_t))
    divergence = torch.nn.functional.kl_div
    kl = divergence(log_q, log_p, log_target=True, reduction="none").sum(-1)
    log_m = torch.logaddexp(log_q, log_p) - np.log(2)
    halves = [
        divergence(log_m, a, log_target=True, reduction="none").sum(-1) for a in (log_p, log_q)
    ]
    u = 64 * float(np.finfo(dtype).eps)  # sums of 31 terms, of logarithms below 10
    for want, ours in (
        (kl, jaxsoftmax.softmax_kl_divergence),
        ((halves[0] + halves[1]) / 2, jaxsoftmax.softmax_js_divergence),
    ):
        gradients = torch.autograd.grad(want, (of_z, of_t), torch.tensor(g), retain_graph=True)
        with jax.enable_x64(dtype == np.float64):
            value, pull = jax.vjp(ours, z, t)
            found = value, *pull(g)
        for got, true in zip(found, (want, *gradients), strict=True):
            np.testing.assert_allclose(got, true.detach().numpy(), rtol=u, atol=u)
