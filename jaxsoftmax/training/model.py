# SPDX-License-Identifier: Apache-2.0
"""A multilayer perceptron in plain JAX: the parameters are a list of (weights, bias)."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, PRNGKeyArray

Layer = tuple[Array, Array]
Params = list[Layer]


def init(key: PRNGKeyArray, sizes: Sequence[int]) -> Params:
    """He initialisation, which keeps the variance through ReLU layers.

    Args:
        key: a random key.
        sizes: features, the hidden widths, classes.

    Returns:
        One `(weights [in, out], bias [out])` a layer, float32.
    """
    he = jax.nn.initializers.he_normal()
    keys = jax.random.split(key, len(sizes) - 1)
    return [
        (he(layer_key, (inputs, outputs), jnp.float32), jnp.zeros(outputs, jnp.float32))
        for layer_key, inputs, outputs in zip(keys, sizes[:-1], sizes[1:], strict=True)
    ]


def apply(params: Params, x: Float[Array, "rows features"]) -> Float[Array, "rows classes"]:
    """The logits: ReLU between layers, nothing after the last."""
    *hidden, (weights, bias) = params
    for w, b in hidden:
        x = jax.nn.relu(x @ w + b[None, :])
    return x @ weights + bias[None, :]
