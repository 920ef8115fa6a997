# SPDX-License-Identifier: Apache-2.0
"""A multilayer perceptron in plain JAX: the parameters are a list of (weights, bias)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec
from jaxtyping import Float, PRNGKeyArray

from jaxsoftmax.training.mesh import VOCAB

Layer = tuple[Array, Array]
Params = list[Layer]


def init(key: PRNGKeyArray, sizes: Sequence[int]) -> Params:
    """He initialisation, which keeps the variance through ReLU layers.

    Args:
        key: a random key.
        sizes: features, the hidden widths, classes.

    Returns:
        One `(weights [in, out], bias [out])` per layer, float32.
    """
    he = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        (he(layer_key, (inputs, outputs), jnp.float32), jnp.zeros(outputs, jnp.float32))
        for layer_key, inputs, outputs in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def specs(params: Params) -> list[tuple[PartitionSpec, PartitionSpec]]:
    """How the parameters are split over a mesh: the last layer's classes over the axis `vocab`."""
    copied = (PartitionSpec(), PartitionSpec())
    return [*[copied] * (len(params) - 1), (PartitionSpec(None, VOCAB), PartitionSpec(VOCAB))]


def apply(
    params: Params, x: Float[Array, "rows features"], classes: int
) -> Float[Array, "rows padded_classes"]:
    """The logits: ReLU between layers, nothing after the last.

    A last layer that was padded to more than `classes` has the logit −inf there, with which a
    class has probability 0 and gradient 0.
    """
    *hidden, (weights, bias) = params
    for w, b in hidden:
        x = jax.nn.relu(x @ w + b[None, :])
    logits = x @ weights + bias[None, :]
    if logits.shape[1] == classes:
        return logits
    return jnp.where(jnp.arange(logits.shape[1])[None, :] < classes, logits, -jnp.inf)
