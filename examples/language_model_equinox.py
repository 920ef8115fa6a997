# SPDX-License-Identifier: Apache-2.0
"""A language model in Equinox learns this file: the loss takes its hidden states, not its logits.

The model returns hidden states; `mean_loss` gives them and the embedding to the head, instead of

    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ embedding.T, labels)
    return jnp.mean(losses, where=labels != IGNORED)

    pip install -e '.[bench]' equinox && python examples/language_model_equinox.py
"""

from pathlib import Path

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import jaxsoftmax

VOCAB, WIDTH, LAYERS, HEADS, CONTEXT, STEPS, IGNORED = 256, 64, 2, 4, 64, 60, -1
optimizer = optax.adamw(5e-3)


class Decoder(eqx.Module):
    """Hidden states `[CONTEXT, WIDTH]` of a line. The causal mask tells the order: no positions."""

    embed: eqx.nn.Embedding
    attentions: list[eqx.nn.MultiheadAttention]
    mlps: list[eqx.nn.MLP]

    def __init__(self, key: jax.Array) -> None:
        """Draws the parameters."""
        one, two, three = jax.random.split(key, (3, LAYERS))
        self.embed = eqx.nn.Embedding(weight=0.05 * jax.random.normal(one[0], (VOCAB, WIDTH)))
        self.attentions = [eqx.nn.MultiheadAttention(HEADS, WIDTH, key=k) for k in two]
        self.mlps = [eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, depth=1, key=k) for k in three]

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Standardized before every part and after the last."""
        x = jax.vmap(self.embed)(inputs)
        for attention, mlp in zip(self.attentions, self.mlps, strict=True):
            y = jax.nn.standardize(x)
            x = x + attention(y, y, y, mask=jnp.tri(CONTEXT, dtype=bool))
            x = x + jax.vmap(mlp)(jax.nn.standardize(x))
        return jax.nn.standardize(x)


def mean_loss(model: Decoder, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Over the labels that are not IGNORED; only the model is under `vmap`."""
    hidden, embedding = jax.vmap(model)(inputs), model.embed.weight
    return jaxsoftmax.linear_softmax_cross_entropy(
        hidden, embedding, labels, transpose_kernel=True, ignore_index=IGNORED
    )


@eqx.filter_jit
def step(model: Decoder, state: optax.OptState, inputs: jax.Array, labels: jax.Array) -> tuple:
    """New model and optimizer state, and the loss before."""
    loss, gradients = eqx.filter_value_and_grad(mean_loss)(model, inputs, labels)
    updates, state = optimizer.update(gradients, state, eqx.filter(model, eqx.is_array))
    return eqx.apply_updates(model, updates), state, loss


def main() -> tuple[float, float]:
    """Trains on all lines at once, cut or padded to one length; the first and the last loss."""
    lines = Path(__file__).read_bytes().splitlines(keepends=True)
    rows = jnp.array([list(line.ljust(CONTEXT + 1, b"\0")[: CONTEXT + 1]) for line in lines])
    inputs, labels = rows[:, :-1], jnp.where(rows[:, 1:] == 0, IGNORED, rows[:, 1:])
    model, losses = Decoder(jax.random.key(0)), [0.0] * STEPS
    state = optimizer.init(eqx.filter(model, eqx.is_array))
    for i in range(STEPS):
        model, state, losses[i] = step(model, state, inputs, labels)
    print(f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at step {STEPS}")
    return float(losses[0]), float(losses[-1])


if __name__ == "__main__":
    main()
