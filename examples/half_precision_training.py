# SPDX-License-Identifier: Apache-2.0
"""Does the loss function matter for training in half precision? The same model, trained four times.

A network with one hidden layer learns with Adam which of 2048 words follows a word, 128 words a
step: through `jaxsoftmax.softmax_cross_entropy_with_integer_labels` and through optax's function of
that name as it comes, each on bfloat16 and on float32 logits. The initial parameters (float32) and
the batches are the same. Words are as frequent as Zipf's law says and followed by a fixed
successor: always (the model grows confident), or four times in five. The curves compare models,
not roundings of losses: all are judged alike, by optax in float64 on words drawn anew. The loss is
what exceeds the lowest possible, the gradient's error |g − exact| / |exact| at a run's parameters.

    pip install -e '.[train]' && python examples/half_precision_training.py

Figure and numbers go to runs/half_precision_training; `--output docs/figures` replaces README's.
"""

import argparse
import itertools
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure

import jaxsoftmax

NAME = "half_precision_training"
WORDS, WIDTH, BATCH, HELD_OUT = 2048, 64, 128, 512
LEARNING_RATE = 3e-3
LOOKS = 50  # at each run, evenly spaced
# The chance that the next word is any word instead of the successor, and what it is called.
LANGUAGES = {"one word in five at random": 0.2, "every word predictable": 0.0}
LOSSES = {
    "optax": optax.losses.softmax_cross_entropy_with_integer_labels,
    "jaxsoftmax": jaxsoftmax.softmax_cross_entropy_with_integer_labels,
}
DTYPES = {"bfloat16": jnp.bfloat16, "float32": jnp.float32}
# Under the dashed float32 curves, which come last, the others stay visible.
STYLES: dict[str, dict[str, Any]] = {
    "optax, bfloat16": {"color": "#dd5f32", "linewidth": 2.2},
    "jaxsoftmax, bfloat16": {"color": "#4c72b0", "linewidth": 2.2},
    "optax, float32": {"color": "black", "linewidth": 1.2, "linestyle": (0, (4, 4))},
    "jaxsoftmax, float32": {"color": "#8fb2e8", "linewidth": 1.2, "linestyle": (4, (4, 4))},
}

Params = dict[str, Array]


class Language(NamedTuple):
    """Pairs of words: the first from Zipf's law, then its own successor or any word again."""

    zipf: np.ndarray  # [WORDS], how frequent each word is
    successor: np.ndarray  # [WORDS]
    chance: float  # that the second word is drawn from Zipf's law too

    def pairs(self, rng: np.random.Generator, *shape: int) -> tuple[np.ndarray, np.ndarray]:
        """Words and what follows each, two arrays of this shape."""
        words, drawn = rng.choice(WORDS, (2, *shape), p=self.zipf).astype(np.int32)
        return words, np.where(rng.random(shape) < self.chance, drawn, self.successor[words])

    def next_word(self, words: np.ndarray) -> np.ndarray:
        """`[len(words), WORDS]`: the true probabilities, in float64."""
        p = np.tile(self.chance * self.zipf, (len(words), 1))
        p[np.arange(len(words)), self.successor[words]] += 1 - self.chance
        return p


def language(rng: np.random.Generator, chance: float) -> Language:
    """A language in which every word succeeds one other."""
    frequency = 1 / np.arange(1, WORDS + 1)
    successor = rng.permutation(WORDS).astype(np.int32)
    return Language(frequency / frequency.sum(), successor, chance)


def init(key: Array) -> Params:
    """The initial parameters, in float32."""
    embedding, inner, kernel = jax.random.split(key, 3)
    normal = partial(jax.random.normal, dtype=jnp.float32)
    return {
        "embedding": normal(embedding, (WORDS, WIDTH)),
        "inner": normal(inner, (WIDTH, WIDTH)) * (2 / WIDTH) ** 0.5,
        "kernel": normal(kernel, (WIDTH, WORDS)) / WIDTH**0.5,
    }


def mean_loss(
    params: Params, words: Array, labels: Array, *, loss: Callable[..., Array], dtype: Any
) -> Array:
    """The hidden layer in the parameters' dtype, the logits in `dtype`, the loss as it comes."""
    hidden = jax.nn.relu(params["embedding"][words] @ params["inner"])
    logits = hidden.astype(dtype) @ params["kernel"].astype(dtype)
    return loss(logits, labels).mean()


@partial(jax.jit, static_argnames=("loss", "dtype", "optimizer"), donate_argnames="state")
def train(state: Any, batches: Any, *, loss: Callable, dtype: Any, optimizer: Any) -> Any:
    """The state after a step for each batch."""

    def step(state, batch):
        params, opt_state = state
        gradient = jax.grad(mean_loss)(params, *batch, loss=loss, dtype=dtype)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return (optax.apply_updates(params, updates), opt_state), None

    return jax.lax.scan(step, state, batches)[0]


def norm(tree: Params) -> Array:
    """Of all arrays together."""
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


@partial(jax.jit, static_argnames=("loss", "dtype"))
def judge(
    params: Params, words: Array, labels: Array, truth: Array, *, loss: Callable, dtype: Any
) -> tuple[Array, Array]:
    """In float64: the expected loss of a model, and how wrong its run's gradient is."""
    exactly = {"loss": LOSSES["optax"], "dtype": jnp.float64}
    wide = jax.tree.map(lambda p: p.astype(jnp.float64), params)
    exact = jax.grad(mean_loss)(wide, words, labels, **exactly)
    gradient = jax.grad(mean_loss)(params, words, labels, loss=loss, dtype=dtype)
    off = jax.tree.map(lambda a, b: a.astype(b.dtype) - b, gradient, exact)
    exactly["loss"] = optax.losses.softmax_cross_entropy
    return mean_loss(wide, words, truth, **exactly), norm(off) / norm(exact)


def experiment(steps: int, seed: int, chance: float) -> dict[str, Any]:
    """Trains four times; what was seen at each look, by run."""
    rng = np.random.default_rng(seed)
    spoken = language(rng, chance)
    batches = spoken.pairs(rng, steps, BATCH)
    words, labels = spoken.pairs(rng, HELD_OUT)
    truth = spoken.next_word(words)
    lowest = -np.sum(truth * np.log(np.where(truth > 0, truth, 1)), axis=1).mean()
    optimizer = optax.adam(LEARNING_RATE)
    looks = np.unique(np.linspace(0, steps, LOOKS + 1).astype(int)).tolist()
    runs: dict[str, Any] = {"steps": looks}
    for run in STYLES:
        name, dtype = run.split(", ")
        how = {"loss": LOSSES[name], "dtype": DTYPES[dtype]}
        params = init(jax.random.key(seed))
        state = params, optimizer.init(params)
        seen = [judge(state[0], words, labels, truth, **how)]
        for start, stop in itertools.pairwise(looks):
            chunk = [b[start:stop] for b in batches]
            state = train(state, chunk, optimizer=optimizer, **how)
            seen.append(judge(state[0], words, labels, truth, **how))
        expected, off = np.transpose(seen)
        excess, errors = ([float(f"{x:.4g}") for x in row] for row in (expected - lowest, off))
        runs[run] = {"excess_loss": excess, "gradient_error": errors}
        print(f"{run} logits: loss {excess[-1]:.3g}, gradient error {errors[-1]:.2g}", flush=True)
    return runs


def plot(results: dict[str, Any]) -> Figure:
    """The loss in both languages, and the error of the gradient in the predictable one."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    *losses, errors = figure.subplots(1, 3)
    panels = [(a, text, "excess_loss") for a, text in zip(losses, LANGUAGES, strict=True)]
    panels.append((errors, list(LANGUAGES)[-1], "gradient_error"))
    for axes, text, what in panels:
        runs = results[text]
        for run, style in STYLES.items():
            axes.plot(runs["steps"], runs[run][what], label=f"{run} logits", **style)
        axes.set_title(f"{text[0].upper()}{text[1:]}", loc="left", fontweight="bold")
        axes.set_xlabel("step")
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    losses[0].set_ylabel("loss above the lowest possible (nats)")
    losses[1].set_ylabel("loss (nats)")
    errors.set_ylabel("relative error of the gradient")
    losses[0].legend(frameon=False)
    return figure


def main() -> None:
    """Trains, and writes the figure and its numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps of each run")
    parser.add_argument("--seed", type=int, default=0, help="of words, batches and parameters")
    folder = {"default": Path("runs") / NAME, "help": "folder to write to (default: %(default)s)"}
    parser.add_argument("--output", type=Path, **folder)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)  # for the judge; everything else states its dtype
    results: dict[str, Any] = {"jax": jax.__version__, "optax": optax.__version__}
    results |= {"steps": options.steps, "seed": options.seed}
    for text, chance in LANGUAGES.items():
        print(f"{text}:")
        results[text] = experiment(options.steps, options.seed, chance)
    options.output.mkdir(parents=True, exist_ok=True)
    plot(results).savefig(options.output / f"{NAME}.png", dpi=110)
    text = json.dumps(results, indent=1)
    text = re.sub(r"\[[^]]*\]", lambda curve: " ".join(curve[0].split()), text)  # a line each
    (options.output / f"{NAME}.json").write_text(text + "\n", encoding="utf-8")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
