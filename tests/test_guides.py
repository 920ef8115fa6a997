# SPDX-License-Identifier: Apache-2.0
"""The functions of the guides give what these say, on other data: the very code of the pages."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import generator
from pages import names_of, path

import jaxsoftmax

HIDDEN = generator("recipes", "hidden").standard_normal((3, 12, 5)).astype(np.float32)
KERNEL: np.ndarray = 2 * generator("recipes", "kernel").standard_normal((5, 40)).astype(np.float32)
LABELS = generator("recipes", "labels").integers(40, size=(3, 12)).astype(np.int32)


@pytest.fixture
def masked_tokens(eval_example):
    return names_of("guides/masked-tokens", eval_example)


@pytest.fixture
def evaluation(eval_example):
    return names_of("guides/evaluation", eval_example)


@pytest.fixture
def distillation(eval_example):
    return names_of("guides/distillation", eval_example)


@pytest.fixture
def reinforcement_learning(eval_example):
    return names_of("guides/reinforcement-learning", eval_example)


def log_softmax(z: np.ndarray) -> np.ndarray:
    """From the definition in float64, of logits below 700."""
    z = z.astype(np.float64)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def of_head(hidden: np.ndarray, kernel: np.ndarray = KERNEL) -> np.ndarray:
    """The log-probabilities of its logits."""
    return log_softmax(hidden.astype(np.float64) @ kernel)


def test_labels_of_answers(masked_tokens):
    """A prompt of two tokens, an answer of two; an answer to the end; no answer."""
    tokens = np.array([[5, 6, 7, 8, 0], [1, 2, 3, 4, 5], [9, 9, 0, 0, 0]])
    labels = masked_tokens["labels_of_answers"](tokens, np.array([2, 1, 2]), np.array([4, 5, 2]))
    no = -100
    assert labels.tolist() == [[no, 7, 8, no, no], [2, 3, 4, 5, no], [no] * 5]


def test_gradient_accumulation(masked_tokens):
    """Of micro-batches with 12, 3 and no tokens that count: the mean of 15 and its gradient."""
    labels = np.full_like(LABELS, -100)
    labels[0], labels[1, 4:7] = LABELS[0], LABELS[1, 4:7]
    hidden, counts = HIDDEN.reshape(-1, 5).astype(np.float64), labels.ravel() != -100
    log_p = of_head(hidden)
    at = np.flatnonzero(counts), labels.ravel()[counts]
    d = np.exp(log_p) * counts[:, None]
    d[at] -= 1
    in_batches = HIDDEN[:, None], labels[:, None]
    loss, gradient = masked_tokens["accumulated"](KERNEL, *in_batches)
    assert loss == pytest.approx(-log_p[at].mean(), rel=1e-5)
    np.testing.assert_allclose(gradient, hidden.T @ d / counts.sum(), rtol=1e-4, atol=1e-6)
    alone = jax.grad(masked_tokens["mean_loss"], argnums=1)(HIDDEN, KERNEL, labels)
    np.testing.assert_allclose(gradient, alone, rtol=1e-4, atol=1e-6)


def test_evaluation(evaluation):
    labels = LABELS.copy()
    labels[:, :4] = -100
    labels[0, 4] = of_head(HIDDEN)[0, 4].argmax()  # right once at least
    perplexity, accuracy = evaluation["perplexity_and_accuracy"](
        zip(HIDDEN, labels, strict=True), KERNEL
    )
    log_p, counts = of_head(HIDDEN), labels != -100
    own = np.take_along_axis(log_p, np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    assert perplexity == pytest.approx(np.exp(-own[counts].mean()), rel=1e-5)
    assert accuracy == pytest.approx((log_p.argmax(-1) == labels)[counts].mean(), rel=1e-6)
    assert accuracy > 0


def divergence(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    """Σ p (log p − log q) in float64."""
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)


def slope(function, x: np.ndarray) -> np.ndarray:
    """Of a function of float64, by central differences: their error is some 1e-9."""
    step, out = 1e-5, np.empty(x.size)
    for i in range(x.size):
        e = step * (np.arange(x.size) == i).reshape(x.shape)
        out[i] = (function(x + e) - function(x - e)) / (2 * step)
    return out.reshape(x.shape)


def test_online_distillation(distillation):
    """The loss and its gradient; nothing goes to the teacher."""
    width = 7
    teacher_hidden = generator("recipes", "of teacher").standard_normal((3, 12, width))
    teacher_kernel = generator("recipes", "teacher").standard_normal((width, 40))
    labels = LABELS.copy()
    labels[:, :4] = -100
    at = np.nonzero(labels != -100)
    log_p = of_head(teacher_hidden, teacher_kernel / 2)[at]

    def by_definition(kernel):
        nll = -of_head(HIDDEN, kernel)[(*at, labels[at])]
        soft = divergence(log_p, of_head(HIDDEN, kernel / 2)[at])
        return 0.7 * nll.mean() + 0.3 * 4 * soft.mean()

    teacher = teacher_hidden.astype(np.float32), teacher_kernel.astype(np.float32)
    of_all = jax.value_and_grad(distillation["online_loss"], argnums=(1, 3, 4))
    loss, (d, *of_teacher) = of_all(HIDDEN, KERNEL, labels, *teacher, share=0.3)
    assert loss == pytest.approx(by_definition(KERNEL.astype(np.float64)), rel=1e-5)
    want = slope(by_definition, KERNEL.astype(np.float64))
    np.testing.assert_allclose(d, want, rtol=1e-4, atol=1e-6)
    assert not any(np.any(x) for x in of_teacher)


@pytest.mark.parametrize("scale", [1, 6])
def test_stored_teachers(scale, distillation):
    """The stored teacher is its own minimum; elsewhere the loss is the divergence.

    With logits six times as large, the rest of a token is as rare as 1e-9.
    """
    of_teacher, loss = distillation["of_teacher"], distillation["distillation_loss"]
    kernel = scale * KERNEL
    teacher = kernel + 0.01 * np.roll(kernel, 1, axis=1)
    stored = of_teacher(HIDDEN, teacher, 6)
    at = np.asarray(stored[1])

    def with_rest(kernel):
        log_p = of_head(HIDDEN, kernel.astype(np.float64))
        rest = np.exp(log_p)
        np.put_along_axis(rest, at, 0, axis=-1)
        log_rest = np.log(rest.sum(-1, keepdims=True))
        return np.concatenate([np.take_along_axis(log_p, at, axis=-1), log_rest], axis=-1)

    log_p = with_rest(teacher)
    assert log_p[..., -1].min() < -6 * scale**0.8
    # Logits of up to 20 · scale, of which each has a product's rounding.
    np.testing.assert_allclose(stored[0], log_p, rtol=1e-5, atol=1e-5 * scale)
    of_definition = lambda k: divergence(log_p, with_rest(k)).mean()  # noqa: E731
    value, d = jax.value_and_grad(loss, argnums=1)(HIDDEN, kernel, *stored)
    assert value == pytest.approx(of_definition(kernel), rel=1e-3)
    want = slope(of_definition, kernel.astype(np.float64))
    np.testing.assert_allclose(d, want, rtol=1e-3, atol=1e-3 * np.abs(want).max())
    assert 0 <= loss(HIDDEN, teacher, *stored) < 1e-10
    # A token of two classes, filled up with its first.
    log_p, labels = (x.copy() for x in map(np.asarray, stored))
    log_p[0, 0, 2:6], labels[0, 0, 2:] = -np.inf, labels[0, 0, 0]
    fewer = distillation["divergence"](HIDDEN @ kernel, labels, log_p)
    two = distillation["divergence"](HIDDEN @ kernel, labels[..., :2], log_p[..., [0, 1, 6]])
    np.testing.assert_allclose(fewer[0, 0], two[0, 0], rtol=1e-6)


def test_the_k_classes_alone(distillation):
    log_p, labels = (np.asarray(x) for x in distillation["of_teacher"](HIDDEN, KERNEL[:, ::-1], 6))
    loss = distillation["cross_entropy_of_k"]
    p = np.exp(log_p[..., :-1].astype(np.float64))

    def by_definition(kernel):
        log_q = np.take_along_axis(of_head(HIDDEN, kernel), labels, axis=-1)
        return -(p * log_q).sum(-1).mean()

    kernel = KERNEL.astype(np.float64)
    value, d = jax.value_and_grad(loss, argnums=1)(HIDDEN, KERNEL, log_p, labels)
    assert value == pytest.approx(by_definition(kernel), rel=1e-5)
    np.testing.assert_allclose(d, slope(by_definition, kernel), rtol=1e-4, atol=1e-5)


def test_policy_gradient(reinforcement_learning):
    """Loss and gradient against the definitions, with ratios inside and outside of the clip."""
    rng = generator("recipes", "policy")
    actions = LABELS.copy()
    actions[:, :4] = -100
    answer = actions != -100
    at = np.nonzero(answer)
    old_kernel, reference = (KERNEL + s * rng.standard_normal((5, 40)) for s in (0.1, 0.2))
    old = np.full(actions.shape, np.nan)
    old[at] = of_head(HIDDEN, old_kernel)[(*at, actions[at])]
    advantages = rng.standard_normal(actions.shape)

    def by_definition(kernel):
        log_p = of_head(HIDDEN, kernel)[at]
        ratio = np.exp(log_p[np.arange(len(log_p)), actions[at]] - old[at])
        gain = np.minimum(ratio * advantages[at], np.clip(ratio, 0.8, 1.2) * advantages[at])
        entropy = -(np.exp(log_p) * log_p).sum(-1)
        kl = divergence(log_p, of_head(HIDDEN, reference)[at])
        assert (np.abs(ratio - 1) > 0.2).any()
        return (0.01 * kl - gain - 0.001 * entropy).mean()

    arguments = [x.astype(np.float32) for x in (old, advantages, HIDDEN, reference)]
    loss = jax.value_and_grad(reinforcement_learning["policy_loss"], argnums=1)
    value, d = loss(HIDDEN, KERNEL, actions, *arguments)
    kernel = KERNEL.astype(np.float64)
    assert value == pytest.approx(by_definition(kernel), rel=1e-4)
    np.testing.assert_allclose(d, slope(by_definition, kernel), rtol=1e-3, atol=1e-5)


def test_what_the_rest_loses_as_a_difference(distillation):
    """Of 32000 classes, of which the 8 most likely lead the others."""
    rng, n, k = generator("recipes", "rest"), 100, 8
    for lead, rest, error in ((14, 1e-4, 6e-4), (18, 2e-6, 0.03), (22, 4e-8, 1)):
        z = rng.standard_normal((n, 32000)).astype(np.float32)
        labels = np.argsort(-z, axis=-1)[:, :k]
        rows = np.arange(n)[:, None]
        z[rows, labels] += np.float32(lead)
        e = np.exp(z - z.max(-1, keepdims=True).astype(np.float64))
        total = e.sum(-1)
        e[rows, labels] = 0
        truth = e.sum(-1) / total
        assert np.median(truth) == pytest.approx(rest, rel=0.5)
        log_q = jaxsoftmax.label_log_probs(z, labels).log_probs
        difference = 1 - np.sum(np.exp(log_q), axis=-1)
        assert error / 2 < np.median(np.abs(difference / truth - 1)) < error * 2
        assert np.mean(difference <= 0) <= 0.05 or error == 1
        np.testing.assert_allclose(np.exp(distillation["log_rest"](z, labels)), truth, rtol=1e-5)
    assert np.mean(difference <= 0) > 0.5


def test_what_k3_loses():
    """The page's table, and whose gradient it is."""
    rng, n, classes = generator("recipes", "k3"), 1000, 4000
    z = 2 * rng.standard_normal((n, classes)).astype(np.float32)
    change = rng.standard_normal((n, classes))
    log_p = log_softmax(z)
    actions = (np.exp(log_p).cumsum(-1) < rng.random((n, 1))).sum(-1).clip(max=classes - 1)
    at = np.arange(n), actions
    rows = re.findall(
        r"^ +\| ([\de.-]+) \|(.*)\|$",
        path("guides/reinforcement-learning").read_text("utf-8"),
        re.M,
    )
    assert len(rows) == 4
    for distance, row in rows:
        reference = (z + float(distance) * change).astype(np.float32)
        log_r = log_softmax(reference)
        ratio = log_r - log_p
        truth = np.expm1(ratio) - ratio  # to 1e-15 · ratio: no worse than 2e-11 of it
        exact = np.sum(np.exp(log_p) * truth, axis=-1)
        own, other = (jaxsoftmax.label_log_probs(x, actions).log_probs for x in (z, reference))
        k3 = np.asarray(jnp.exp(other - own) - (other - own) - 1)
        of_expm1 = np.asarray(jnp.expm1(other - own) - (other - own))
        ours = np.asarray(jaxsoftmax.softmax_kl_divergence(reference, z))
        got = (
            exact.mean(),
            np.median(np.abs(k3 / truth[at] - 1)),
            np.mean(k3 == 0),
            np.median(np.abs(of_expm1 / truth[at] - 1)),
            np.abs(ours / exact - 1).max(),
        )
        said = [float(x.replace(" %", "e-2")) for x in row.split("|")]
        # Said to one digit; another JAX rounds otherwise.
        np.testing.assert_allclose(got, said, rtol=0.5, err_msg=distance)
        assert truth[at].std() / truth[at].mean() == pytest.approx(1.4, abs=0.05)
    # Σ_a π_a ∇k3_a with ∇ of log π_a by z alone, against the gradients of both divergences.
    with jax.enable_x64(True):
        x, y = (2 * jnp.asarray(rng.standard_normal(9)) for _ in range(2))
        p = jax.nn.softmax(x)

        def mean_k3(x):
            d = jax.nn.log_softmax(y) - jax.nn.log_softmax(x)
            return jnp.sum(p * (jnp.exp(d) - d - 1))

        kl = jaxsoftmax.softmax_kl_divergence
        np.testing.assert_allclose(jax.grad(mean_k3)(x), jax.grad(kl)(x, y), rtol=1e-9)
        assert np.abs(jax.grad(mean_k3)(x) - jax.grad(kl, argnums=1)(y, x)).max() > 0.1


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("weighted", [False, True])
class TestCrossEntropyOfPyTorch:
    """With all options at once."""

    z, labels = (HIDDEN @ KERNEL).reshape(-1, 40), LABELS.ravel().copy()
    labels[:4] = -100
    of_class = generator("recipes", "weights").uniform(0.2, 2, 40).astype(np.float32)

    @pytest.fixture
    def found(self, weighted, reduction, eval_example):
        function = names_of("guides/migrate", eval_example)["cross_entropy"]
        options = {"weight": self.of_class if weighted else None, "label_smoothing": 0.1}
        with jax.numpy_dtype_promotion("standard"):
            return np.asarray(function(self.z, self.labels, reduction=reduction, **options))

    def test_by_definition(self, weighted, reduction, found):
        w = self.of_class.astype(np.float64) if weighted else np.ones(40)
        at, counts = np.maximum(self.labels, 0), self.labels != -100
        target = 0.9 * np.eye(40)[at] + 0.1 / 40
        losses = counts * -(target * w * log_softmax(self.z)).sum(-1)
        want = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / w[at[counts]].sum()}
        np.testing.assert_allclose(found, want[reduction], rtol=1e-5)

    def test_by_pytorch(self, weighted, reduction, found):
        torch = pytest.importorskip("torch")
        theirs = torch.nn.functional.cross_entropy(
            torch.tensor(self.z),
            torch.tensor(self.labels, dtype=torch.int64),
            weight=torch.tensor(self.of_class) if weighted else None,
            reduction=reduction,
            label_smoothing=0.1,
        )
        np.testing.assert_allclose(found, theirs.numpy(), rtol=1e-5)

    def test_other_axis(self, weighted, reduction, found, eval_example):
        """Classes on PyTorch's axis, `[N, C, d]`."""
        function = names_of("guides/migrate", eval_example)["cross_entropy"]
        options = {"weight": self.of_class if weighted else None, "label_smoothing": 0.1}
        z, labels = self.z.reshape(12, 3, 40).swapaxes(1, 2), self.labels.reshape(12, 3)
        with jax.numpy_dtype_promotion("standard"):
            moved = function(z, labels, reduction=reduction, axis=1, **options)
        np.testing.assert_allclose(np.ravel(moved), np.ravel(found), rtol=1e-5)


@pytest.mark.parametrize("shape", [(6, 40), (2, 3, 40)])
def test_kl_div_of_pytorch(shape):
    """What the guide writes for its reductions."""
    torch = pytest.importorskip("torch")
    q, p = (generator("recipes", name).standard_normal(shape).astype(np.float32) for name in "qp")
    ours = jaxsoftmax.softmax_kl_divergence(q, p)
    log_q, log_p = (torch.log_softmax(torch.tensor(x), -1) for x in (q, p))
    for reduction, found in (
        ("batchmean", ours.sum() / shape[0]),
        ("sum", ours.sum()),
        ("mean", ours.mean() / 40),
    ):
        theirs = torch.nn.functional.kl_div(log_q, log_p, reduction=reduction, log_target=True)
        assert float(found) == pytest.approx(float(theirs), rel=1e-5)
