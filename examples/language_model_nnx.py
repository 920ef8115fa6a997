# SPDX-License-Identifier: Apache-2.0
"""A language model in Flax NNX learns this file: the loss takes its hidden states, not its logits.

The model returns hidden states; `mean_loss` gives them and the embedding to the head, instead of

    losses = optax.softmax_cross_entropy_with_integer_labels(hidden @ embedding.T, labels)
    return jnp.mean(losses, where=labels != IGNORED)

    pip install -e '.[lm]' && python examples/language_model_nnx.py
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jaxsoftmax

VOCAB, WIDTH, LAYERS, HEADS, CONTEXT, STEPS, IGNORED = 256, 64, 2, 4, 64, 60, -1


class Decoder(nnx.Module):
    """Hidden states `[lines, CONTEXT, WIDTH]`. The causal mask tells the order: no positions."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        """Draws the parameters."""
        small = nnx.initializers.normal(0.05)
        layers = range(LAYERS)
        self.embed = nnx.Embed(VOCAB, WIDTH, embedding_init=small, rngs=rngs)
        self.attentions = nnx.List(nnx.MultiHeadAttention(HEADS, WIDTH, rngs=rngs) for _ in layers)
        self.ups = nnx.List(nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs) for _ in layers)
        self.downs = nnx.List(nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs) for _ in layers)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Standardized before every part and after the last."""
        x = self.embed(inputs)
        mask = nnx.make_causal_mask(inputs)
        for attention, up, down in zip(self.attentions, self.ups, self.downs, strict=True):
            x = x + attention(jax.nn.standardize(x), mask=mask, decode=False)
            x = x + down(jax.nn.relu(up(jax.nn.standardize(x))))
        return jax.nn.standardize(x)


def mean_loss(model: Decoder, inputs: jax.Array, labels: jax.Array) -> jax.Array:
    """Over the labels that are not IGNORED; the head multiplies in bfloat16 and sums in float32."""
    return jaxsoftmax.linear_softmax_cross_entropy(
        model(inputs),
        model.embed.embedding[...],
        labels,
        transpose_kernel=True,
        ignore_index=IGNORED,
        compute_dtype=jnp.bfloat16,
    )


@nnx.jit
def step(model: Decoder, optimizer: nnx.Optimizer, inputs: jax.Array, labels: jax.Array):
    """Updates model and optimizer; the loss before."""
    loss, gradients = nnx.value_and_grad(mean_loss)(model, inputs, labels)
    optimizer.update(model, gradients)
    return loss


def main() -> tuple[float, float]:
    """Trains on all lines at once, cut or padded to one length; the first and the last loss."""
    lines = Path(__file__).read_bytes().splitlines(keepends=True)
    rows = jnp.array([list(line.ljust(CONTEXT + 1, b"\0")[: CONTEXT + 1]) for line in lines])
    inputs, labels = rows[:, :-1], jnp.where(rows[:, 1:] == 0, IGNORED, rows[:, 1:])
    model = Decoder(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adamw(5e-3), wrt=nnx.Param)
    losses = [float(step(model, optimizer, inputs, labels)) for _ in range(STEPS)]
    print(f"loss {losses[0]:.3f} at the start, {losses[-1]:.3f} at step {STEPS}")
    return losses[0], losses[-1]


if __name__ == "__main__":
    main()
