# SPDX-License-Identifier: Apache-2.0
"""A language model in plain JAX learns this file: the loss takes its hidden states, not its logits.

The model returns hidden states; `mean_loss` gives them and the embedding to the head, instead of

    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ embedding.T, labels)
    return jnp.mean(losses, where=labels != IGNORED)

    pip install -e '.[bench]' && python examples/language_model_jax.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax

import jaxsoftmax

VOCAB, WIDTH, LAYERS, HEADS, CONTEXT, STEPS, IGNORED = 256, 64, 2, 4, 64, 60, -1
optimizer = optax.adamw(5e-3)


def init(key: jax.Array) -> dict:
    """Small random matrices, those of the layers stacked."""
    shapes = {"embedding": (VOCAB, WIDTH), "qkv": (LAYERS, WIDTH, 3 * WIDTH)}
    shapes |= {"out": (LAYERS, WIDTH, WIDTH)}
    shapes |= {"up": (LAYERS, WIDTH, 4 * WIDTH), "down": (LAYERS, 4 * WIDTH, WIDTH)}
    keys = jax.random.split(key, len(shapes))
    return {n: 0.05 * jax.random.normal(k, shapes[n]) for n, k in zip(shapes, keys, strict=True)}


def decoder(params: dict, inputs: jax.Array) -> jax.Array:
    """Hidden states `[lines, CONTEXT, WIDTH]`. The causal mask tells the order: no positions."""
    x = params["embedding"][inputs]
    for i in range(LAYERS):
        heads = (jax.nn.standardize(x) @ params["qkv"][i]).reshape(*x.shape[:2], 3 * HEADS, -1)
        mixed = jax.nn.dot_product_attention(*jnp.split(heads, 3, axis=2), is_causal=True)
        x = x + mixed.reshape(x.shape) @ params["out"][i]
        x = x + jax.nn.relu(jax.nn.standardize(x) @ params["up"][i]) @ params["down"][i]
    return jax.nn.standardize(x)


def mean_loss(params: dict, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Over the labels that are not IGNORED; the head multiplies in bfloat16 and sums in float32."""
    return jaxsoftmax.linear_softmax_cross_entropy(
        decoder(params, inputs),
        params["embedding"],
        labels,
        transpose_kernel=True,
        ignore_index=IGNORED,
        compute_dtype=jnp.bfloat16,
    )


@jax.jit
def step(params: dict, state: optax.OptState, inputs: jax.Array, labels: jax.Array) -> tuple:
    """New parameters and optimizer state, and the loss before."""
    loss, gradients = jax.value_and_grad(mean_loss)(params, inputs, labels)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state, loss


def main() -> tuple[float, float]:
    """Trains on all lines at once, cut or padded to one length; the first and the last loss."""
    lines = Path(__file__).read_bytes().splitlines(keepends=True)
    rows = jnp.array([list(line.ljust(CONTEXT + 1, b"\0")[: CONTEXT + 1]) for line in lines])
    inputs, labels = rows[:, :-1], jnp.where(rows[:, 1:] == 0, IGNORED, rows[:, 1:])
    params, losses = init(jax.random.key(0)), [0.0] * STEPS
    state = optimizer.init(params)
    for i in range(STEPS):
        params, state, losses[i] = step(params, state, inputs, labels)
    print(f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at step {STEPS}")
    return float(losses[0]), float(losses[-1])


if __name__ == "__main__":
    main()
