# SPDX-License-Identifier: Apache-2.0
"""What runs on the device: one epoch of optimizer steps, and the evaluation after it."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int, PRNGKeyArray

import jaxsoftmax
from jaxsoftmax.training.classifier import model
from jaxsoftmax.training.mesh import DATA
from jaxsoftmax.training.run import State

OPTIMIZERS = {
    "adamw": optax.adamw,
    "adam": optax.adam,
    "lion": optax.lion,
    "sgd": partial(optax.sgd, momentum=0.9),
}


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
    classes: int,
) -> Float[Array, ""]:
    """The cross-entropy averaged over the rows of weight 1."""
    logits = model.apply(params, x, classes)
    losses = jaxsoftmax.softmax_cross_entropy_with_integer_labels(logits, y)
    return jnp.sum(weights * losses) / jnp.sum(weights)


@partial(
    jax.jit,
    static_argnames=("optimizer", "batch_size", "rows", "classes", "mesh"),
    donate_argnames="state",
)
def train_epoch(
    state: State,
    key: PRNGKeyArray,
    x: Float[Array, "padded_rows features"],
    y: Int[Array, " padded_rows"],
    *,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    rows: int,
    classes: int,
    mesh: Mesh,
) -> State:
    """One optimizer step per minibatch, over every row once; compiled as a single program.

    The minibatches are the same on any mesh: a device takes its share of each, from wherever
    those rows lie.
    """
    share = NamedSharding(mesh, PartitionSpec(DATA))
    padding = -batch_size % mesh.shape[DATA]

    def step(state: State, batch: tuple[Array, Array]) -> tuple[State, None]:
        rows, weights = batch
        batch_x, batch_y = jax.lax.with_sharding_constraint((x[rows], y[rows]), share)
        gradients = jax.grad(mean_loss)(state.params, batch_x, batch_y, weights, classes)
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return State(params, opt_state), None  # pyright: ignore[reportArgumentType] - a pytree

    batches = jax.tree.map(
        lambda a: jnp.pad(a, ((0, 0), (0, padding))), minibatches(key, rows, batch_size)
    )
    return jax.lax.scan(step, state, batches)[0]


@partial(jax.jit, static_argnames=("rows", "classes", "mesh"))
def evaluate(
    params: model.Params,
    x: Float[Array, "padded_rows features"],
    y: Int[Array, " padded_rows"],
    *,
    rows: int,
    classes: int,
    mesh: Mesh,
) -> Evaluation:
    """The model on every row, some thousands at a time so that memory stays bounded."""

    def one(example: tuple[Array, Array]) -> tuple[Array, Array]:
        features, label = example
        logits = model.apply(params, features[None, :], classes)[0]
        loss = jaxsoftmax.softmax_cross_entropy_with_integer_labels(logits, label)
        return loss, jnp.argmax(logits)

    # Each device goes over its own rows.
    shares = mesh.shape[DATA]
    by_share = jax.tree.map(lambda a: a.reshape(shares, -1, *a.shape[1:]), (x, y))
    results = jax.vmap(lambda share: jax.lax.map(one, share, batch_size=4096))(by_share)
    losses, predictions = (a.reshape(-1)[:rows] for a in results)
    accuracy = jnp.mean((predictions == y[:rows]).astype(jnp.float32))
    return Evaluation(jnp.mean(losses), accuracy, predictions)
