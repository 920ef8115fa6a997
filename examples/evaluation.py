# SPDX-License-Identifier: Apache-2.0
"""Perplexity and accuracy of a language model's head from one call, batch by batch.

No logits are held: the predictions come from the pass that makes the log-probabilities. Tokens
with the label −100 (prompts, padding) do not count.

    python examples/evaluation.py
"""

import jax
import jax.numpy as jnp

import jaxsoftmax

BATCHES, TOKENS, WIDTH, CLASSES, IGNORED = 4, 256, 64, 8192, -100


@jax.jit
def evaluate(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """Sums over the tokens that count: −log-probability, right predictions, 1."""
    counts = labels != IGNORED
    inside = jnp.where(counts, labels, 0)
    out = jaxsoftmax.linear_log_probs(hidden, kernel, inside, with_predictions=True)
    right = out.predictions == labels
    numbers = -out.log_probs, right, counts
    return jnp.stack([jnp.sum(x, where=counts, dtype=jnp.float32) for x in numbers])


@jax.jit
def on_logits(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
    """The same of all logits at once."""
    counts, logits = labels != IGNORED, hidden @ kernel
    inside = jnp.where(counts, labels, 0)[:, None]
    nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), inside, axis=-1)[:, 0]
    right = jnp.argmax(logits, axis=-1) == labels
    numbers = nll, right, counts
    return jnp.stack([jnp.sum(x, where=counts, dtype=jnp.float32) for x in numbers])


def temporary_mb(function, *arguments: jax.Array) -> float:
    """What the compiled program holds beside arguments and results."""
    return function.lower(*arguments).compile().memory_analysis().temp_size_in_bytes / 1e6


def main() -> None:
    """A head that has learned something: each hidden state leans to its label's column."""
    keys = jax.random.split(jax.random.key(0), 3)
    kernel = jax.random.normal(keys[0], (WIDTH, CLASSES)) / WIDTH**0.5
    labels = jax.random.randint(keys[1], (BATCHES, TOKENS), 0, CLASSES)
    hidden = 8 * kernel.T[labels] + jax.random.normal(keys[2], (BATCHES, TOKENS, WIDTH))
    labels = labels.at[:, : TOKENS // 4].set(IGNORED)  # prompts

    for name, function in (("evaluate", evaluate), ("on_logits", on_logits)):
        sums = [function(h, kernel, y) for h, y in zip(hidden, labels, strict=True)]
        nll, right, count = jnp.sum(jnp.stack(sums), axis=0)
        held = temporary_mb(function, hidden[0], kernel, labels[0])
        print(
            f"{name}: perplexity {jnp.exp(nll / count):.4f}, "
            f"accuracy {right / count:.4f} of {count:.0f} tokens, {held:.1f} MB"
        )


if __name__ == "__main__":
    main()
