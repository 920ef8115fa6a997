# SPDX-License-Identifier: Apache-2.0
"""What runs on the device: one epoch of optimizer steps, and the evaluation after it."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jaxtyping import Float, Int, PRNGKeyArray

import jaxsoftmax
from jaxsoftmax.training import model

OPTIMIZERS = {
    "adamw": optax.adamw,
    "adam": optax.adam,
    "lion": optax.lion,
    "sgd": partial(optax.sgd, momentum=0.9),
}


class State(NamedTuple):
    """What an epoch changes."""

    params: model.Params
    opt_state: optax.OptState


class Evaluation(NamedTuple):
    """The mean loss and accuracy over some rows, and what was predicted for each."""

    loss: Float[Array, ""]
    accuracy: Float[Array, ""]
    predictions: Int[Array, " rows"]


def minibatches(
    key: PRNGKeyArray, rows: int, batch_size: int
) -> tuple[Int[Array, "steps batch"], Float[Array, "steps batch"]]:
    """Row numbers in a random order, and their weights.

    Every row comes exactly once with weight 1; what fills up the last minibatch has weight 0.
    """
    padding = -rows % batch_size
    order = jnp.pad(jax.random.permutation(key, rows), (0, padding))
    weights = (jnp.arange(rows + padding) < rows).astype(jnp.float32)
    return order.reshape(-1, batch_size), weights.reshape(-1, batch_size)


def mean_loss(
    params: model.Params,
    x: Float[Array, "batch features"],
    y: Int[Array, " batch"],
    weights: Float[Array, " batch"],
) -> Float[Array, ""]:
    """The cross-entropy averaged over the rows of weight 1."""
    losses = jaxsoftmax.softmax_cross_entropy_with_integer_labels(model.apply(params, x), y)
    return jnp.sum(weights * losses) / jnp.sum(weights)


@partial(jax.jit, static_argnames=("optimizer", "batch_size"), donate_argnames="state")
def train_epoch(
    state: State,
    key: PRNGKeyArray,
    x: Float[Array, "rows features"],
    y: Int[Array, " rows"],
    *,
    optimizer: optax.GradientTransformation,
    batch_size: int,
) -> State:
    """One optimizer step a minibatch, over every row once; compiled as a single program."""

    def step(state: State, batch: tuple[Array, Array]) -> tuple[State, None]:
        rows, weights = batch
        gradients = jax.grad(mean_loss)(state.params, x[rows], y[rows], weights)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, opt_state), None  # pyright: ignore[reportArgumentType] - a pytree

    return jax.lax.scan(step, state, minibatches(key, len(x), batch_size))[0]


@jax.jit
def evaluate(
    params: model.Params, x: Float[Array, "rows features"], y: Int[Array, " rows"]
) -> Evaluation:
    """The model on every row, some thousands at a time so that memory stays bounded."""

    def one(example: tuple[Array, Array]) -> tuple[Array, Array]:
        features, label = example
        logits = model.apply(params, features[None, :])[0]
        loss = jaxsoftmax.softmax_cross_entropy_with_integer_labels(logits, label)
        return loss, jnp.argmax(logits)

    losses, predictions = jax.lax.map(one, (x, y), batch_size=4096)
    accuracy = jnp.mean((predictions == y).astype(jnp.float32))
    return Evaluation(jnp.mean(losses), accuracy, predictions)
