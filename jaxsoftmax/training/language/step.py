# SPDX-License-Identifier: Apache-2.0
"""What runs on the device: one optimizer step, and the evaluation of a batch."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

import jaxsoftmax
from jaxsoftmax.training.language import model
from jaxsoftmax.training.language.batches import Batch
from jaxsoftmax.training.language.options import Shape
from jaxsoftmax.training.language.tokens import IGNORED
from jaxsoftmax.training.run import State

Z_LOSS = 1e-4


def fused(gradients, hidden, embedding, labels, denominator, dtype):  # noqa: PLR0917
    """Our head: no logits."""
    return jaxsoftmax.linear_softmax_cross_entropy(
        hidden,
        embedding,
        labels,
        transpose_kernel=True,
        ignore_index=IGNORED,
        z_loss=Z_LOSS,
        denominator=denominator,
        compute_dtype=dtype,
        gradients=gradients,
    )


def plain(hidden, embedding, labels, denominator, dtype):
    """All logits, and optax's loss."""
    kernel = embedding.astype(dtype)
    logits = jnp.einsum("bth,vh->btv", hidden, kernel, preferred_element_type=jnp.float32)
    counted = labels != IGNORED
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.where(counted, labels, 0))
    losses = losses + Z_LOSS * jax.nn.logsumexp(logits, axis=-1) ** 2
    return jnp.sum(jnp.where(counted, losses, 0)) / denominator


HEADS: dict[str, Callable[..., Array]] = {
    "fused": partial(fused, "in_forward"),
    "recompute": partial(fused, "recompute"),
    "plain": plain,
}


def mean_loss(
    params: dict,
    batch: Batch,
    denominator: Float[Array, ""],
    shape: Shape,
    head: str,
) -> Float[Array, ""]:
    """The losses of the labels that count, summed, over a denominator."""
    network = model.with_parameters(shape, params)
    hidden = network(batch.inputs, batch.segments, batch.positions)
    embedding = network.embedding[...]
    return HEADS[head](hidden, embedding, batch.labels, denominator, hidden.dtype)


@partial(jax.jit, static_argnames=("optimizer", "shape", "head"), donate_argnames="state")
def step(
    state: State,
    batches: Batch,
    *,
    optimizer: optax.GradientTransformation,
    shape: Shape,
    head: str,
) -> tuple[State, Float[Array, ""]]:
    """One optimizer step over `[parts, rows, context]`, a part at a time; and the mean loss.

    Every part is divided by the number of labels that count in all of them, so that the sum is the
    mean over the batch however it is parted.
    """
    denominator = jnp.maximum(jnp.sum(batches.labels != IGNORED), 1).astype(jnp.float32)

    def of_part(batch):
        return jax.value_and_grad(mean_loss)(state.params, batch, denominator, shape, head)

    def add(total, batch):
        return jax.tree.map(jnp.add, total, of_part(batch)), None

    if len(batches.labels) == 1:  # without a second array of all gradients
        loss, gradients = of_part(jax.tree.map(lambda a: a[0], batches))
    else:
        nothing = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params)
        (loss, gradients), _ = jax.lax.scan(add, nothing, batches)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    return State(optax.apply_updates(state.params, updates), opt_state), loss


class Evaluation(NamedTuple):
    """Sums over the labels that count."""

    loss: Float[Array, ""]  # in nats
    right: Int[Array, ""]
    counted: Int[Array, ""]


@partial(jax.jit, static_argnames="shape")
def evaluate(params: dict, batch: Batch, *, shape: Shape) -> Evaluation:
    """Of one batch, from one pass over blocks of the vocabulary."""
    network = model.with_parameters(shape, params)
    hidden = network(batch.inputs, batch.segments, batch.positions)
    counted = batch.labels != IGNORED
    found = jaxsoftmax.linear_log_probs(
        hidden,
        network.embedding[...],
        jnp.where(counted, batch.labels, 0),
        where=counted,
        transpose_kernel=True,
        compute_dtype=hidden.dtype,
        with_entropy=False,
        with_predictions=True,
    )
    right = counted & (found.predictions == batch.labels)
    return Evaluation(
        loss=-jnp.sum(jnp.where(counted, found.log_probs, 0)),
        right=jnp.sum(right, dtype=jnp.int32),
        counted=jnp.sum(counted, dtype=jnp.int32),
    )
