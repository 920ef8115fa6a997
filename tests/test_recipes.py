# SPDX-License-Identifier: Apache-2.0
"""The code of docs/recipes.md runs as it stands, and gives what it says."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from cases import generator

RECIPES = Path(__file__).parents[1] / "docs" / "recipes.md"
HIDDEN = generator("recipes", "hidden").standard_normal((3, 12, 5)).astype(np.float32)
KERNEL: np.ndarray = 2 * generator("recipes", "kernel").standard_normal((5, 40)).astype(np.float32)
LABELS = generator("recipes", "labels").integers(40, size=(3, 12)).astype(np.int32)


@cache
def recipes() -> dict[str, Any]:
    """Everything that the blocks define."""
    names: dict[str, Any] = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", RECIPES.read_text("utf-8"), re.M | re.S)
    assert len(blocks) == RECIPES.read_text("utf-8").count("```") / 2
    exec("\n".join(blocks), names)
    return names


def log_softmax(hidden: np.ndarray, kernel: np.ndarray = KERNEL) -> np.ndarray:
    z = hidden.astype(np.float64) @ kernel
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def test_labels_of_answers():
    """A prompt of two tokens, an answer of two; an answer to the end; no answer."""
    tokens = np.array([[5, 6, 7, 8, 0], [1, 2, 3, 4, 5], [9, 9, 0, 0, 0]])
    labels = recipes()["labels_of_answers"](tokens, np.array([2, 1, 2]), np.array([4, 5, 2]))
    no = -100
    assert labels.tolist() == [[no, 7, 8, no, no], [2, 3, 4, 5, no], [no] * 5]


def test_gradient_accumulation():
    """Of micro-batches with 12, 3 and no tokens that count: the mean of 15 and its gradient."""
    labels = np.full_like(LABELS, -100)
    labels[0], labels[1, 4:7] = LABELS[0], LABELS[1, 4:7]
    hidden, counts = HIDDEN.reshape(-1, 5).astype(np.float64), labels.ravel() != -100
    log_p = log_softmax(hidden)
    at = np.flatnonzero(counts), labels.ravel()[counts]
    d = np.exp(log_p) * counts[:, None]
    d[at] -= 1
    in_batches = HIDDEN[:, None], labels[:, None]
    loss, gradient = recipes()["accumulated"](KERNEL, *in_batches)
    assert loss == pytest.approx(-log_p[at].mean(), rel=1e-5)
    np.testing.assert_allclose(gradient, hidden.T @ d / counts.sum(), rtol=1e-4, atol=1e-6)
    alone = jax.grad(recipes()["mean_loss"], argnums=1)(HIDDEN, KERNEL, labels)
    np.testing.assert_allclose(gradient, alone, rtol=1e-4, atol=1e-6)


def test_evaluation():
    labels = LABELS.copy()
    labels[:, :4] = -100
    labels[0, 4] = log_softmax(HIDDEN)[0, 4].argmax()  # right once at least
    perplexity, accuracy = recipes()["perplexity_and_accuracy"](
        zip(HIDDEN, labels, strict=True), KERNEL
    )
    log_p, counts = log_softmax(HIDDEN), labels != -100
    own = np.take_along_axis(log_p, np.maximum(labels, 0)[..., None], axis=-1)[..., 0]
    assert perplexity == pytest.approx(np.exp(-own[counts].mean()), rel=1e-5)
    assert accuracy == pytest.approx((log_p.argmax(-1) == labels)[counts].mean(), rel=1e-6)
    assert accuracy > 0


def test_distillation():
    """The stored teacher is its own minimum; elsewhere the loss is the divergence."""
    of_teacher, loss = recipes()["of_teacher"], recipes()["distillation_loss"]
    teacher = KERNEL + 0.3 * np.roll(KERNEL, 1, axis=1)
    stored = of_teacher(HIDDEN, teacher, 6)
    log_p, log_q = (log_softmax(HIDDEN, k) for k in (teacher, KERNEL))
    at = np.asarray(stored[1])
    p, q = (np.exp(np.take_along_axis(a, at, axis=-1)) for a in (log_p, log_q))
    p, q = (np.concatenate([a, 1 - a.sum(-1, keepdims=True)], axis=-1) for a in (p, q))
    divergence = (p * np.log(p / q)).sum(-1).mean()
    assert loss(HIDDEN, KERNEL, *stored) == pytest.approx(divergence, rel=1e-4)
    assert abs(loss(HIDDEN, teacher, *stored)) < 1e-5
    slope = jax.grad(loss, argnums=1)
    assert np.abs(slope(HIDDEN, teacher, *stored)).max() < 1e-5
    assert np.abs(slope(HIDDEN, KERNEL, *stored)).max() > 1e-2
