# SPDX-License-Identifier: Apache-2.0
"""How close can a student come to its teacher? Distillation to a divergence of 1e-10 and below.

The teacher is softmax regression on scikit-learn's digits (their 40 principal components); the
student has its form, so that it can equal it. It starts at random and minimizes
KL(teacher ‖ student) over all training images at once in float32: as
`jaxsoftmax.softmax_kl_divergence`, and as optax's `kl_divergence` of a log-softmax, by Adam and by
L-BFGS, whose line search compares losses (and which takes a fifth of the steps). All are judged
alike, by optax in float64 at a run's parameters: the exact divergence, and the gradient's error
|g − exact| / |exact|.

    pip install -e '.[train]' && python examples/distillation.py

Figure and numbers go to runs/distillation; `--output docs/figures` replaces README's.
"""

import argparse
import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

import jaxsoftmax

NAME = "distillation"
TRAINING, WIDTH, CLASSES = 1437, 40, 10  # the other 360 images are held out
TEACHER_STEPS, PENALTY = 500, 1e-2
LEARNING_RATE = 0.1


def optax_divergence(logits: Array, target_logits: Array) -> Array:
    """KL(teacher ‖ student), as it is usually written."""
    return optax.losses.kl_divergence(jax.nn.log_softmax(logits), jax.nn.softmax(target_logits))


LOSSES = {"optax": optax_divergence, "jaxsoftmax": jaxsoftmax.softmax_kl_divergence}
OPTIMIZERS: dict[str, Callable[[int], Any]] = {
    "Adam": lambda steps: optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, steps)),
    "L-BFGS": lambda _: optax.lbfgs(),
}
SHARE = {"Adam": 1, "L-BFGS": 5}  # one step of so many
COLORS = {"optax": "#dd5f32", "jaxsoftmax": "#4c72b0"}

Params = Any  # a dictionary of arrays: optax has a type of its own


def digits(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """`[1797, WIDTH]` float32, and their labels; the first `TRAINING` are to train on."""
    images, labels = map(np.asarray, load_digits(return_X_y=True))
    order = np.random.default_rng(seed).permutation(len(labels))
    components = PCA(WIDTH, whiten=True, svd_solver="full").fit(images[order[:TRAINING]])
    return components.transform(images[order]).astype(np.float32), labels[order]


def init(key: Array) -> Params:
    """Initial parameters, in float32."""
    kernel = jax.random.normal(key, (WIDTH, CLASSES), jnp.float32) / WIDTH**0.5
    return {"kernel": kernel, "bias": jnp.zeros(CLASSES, jnp.float32)}


def logits_of(params: Params, images: Any) -> Array:
    """`[images, CLASSES]`, in the parameters' dtype."""
    kernel, bias = params["kernel"], params["bias"]
    return jnp.asarray(images, kernel.dtype) @ kernel + bias


def norm(tree: Params) -> Array:
    """Of all arrays together."""
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))


@jax.jit
def teacher(params: Params, images: Any, labels: Any) -> Params:
    """Trained on the labels, with a penalty that keeps it from being certain."""
    optimizer = optax.adam(optax.cosine_decay_schedule(LEARNING_RATE, TEACHER_STEPS))

    def objective(params):
        loss = jaxsoftmax.softmax_cross_entropy_with_integer_labels
        return loss(logits_of(params, images), labels).mean() + PENALTY * norm(params) ** 2

    def step(state, _):
        updates, opt_state = optimizer.update(jax.grad(objective)(state[0]), state[1])
        return (optax.apply_updates(state[0], updates), opt_state), None

    return jax.lax.scan(step, (params, optimizer.init(params)), length=TEACHER_STEPS)[0][0]


def mean_divergence(params: Params, target: Params, images: Any, *, loss: Callable) -> Array:
    """Of the student from the teacher, in the parameters' dtype."""
    return loss(logits_of(params, images), logits_of(target, images)).mean()


@partial(jax.jit, static_argnames=("steps", "loss", "optimizer"))
def train(
    params: Params, target: Params, images: Any, *, steps: int, loss: Callable, optimizer: str
) -> tuple[Params, tuple[Array, Array, Array]]:
    """The trained student, and before each step the loss, the exact one, the gradient's error."""
    method = OPTIMIZERS[optimizer](steps)
    reported = partial(mean_divergence, target=target, images=images, loss=loss)
    wide = partial(jax.tree.map, lambda leaf: leaf.astype(jnp.float64))
    exact = partial(mean_divergence, target=wide(target), images=images, loss=optax_divergence)

    def step(state, _):
        params, opt_state = state
        value, gradient = jax.value_and_grad(reported)(params)
        truth, true_gradient = jax.value_and_grad(exact)(wide(params))
        off = jax.tree.map(jnp.subtract, wide(gradient), true_gradient)
        more = {"value": value, "grad": gradient, "value_fn": reported}
        extended = optax.with_extra_args_support(method)
        updates, opt_state = extended.update(gradient, opt_state, params, **more)
        seen = value, truth, norm(off) / norm(true_gradient)
        return (optax.apply_updates(params, updates), opt_state), seen

    (params, _), seen = jax.lax.scan(step, (params, method.init(params)), length=steps)
    return params, seen


def experiment(steps: int, seed: int) -> dict[str, Any]:
    """One teacher, four students from the same start."""
    images, labels = digits(seed)
    held_out = slice(TRAINING, None)
    keys = jax.random.split(jax.random.key(seed))
    target = teacher(init(keys[0]), images[:TRAINING], labels[:TRAINING])

    def predicted(params):
        return np.argmax(logits_of(params, images[held_out]), axis=-1)

    def accuracy(params):
        return float(f"{np.mean(predicted(params) == labels[held_out]):.4g}")

    results: dict[str, Any] = {"teacher": {"accuracy": accuracy(target)}}
    for optimizer in OPTIMIZERS:
        for name, loss in LOSSES.items():
            how: Any = {"steps": steps // SHARE[optimizer], "loss": loss, "optimizer": optimizer}
            params, seen = train(init(keys[1]), target, images[:TRAINING], **how)
            curves = ([float(f"{x:.4g}") for x in curve] for curve in map(np.asarray, seen))
            run: dict[str, Any] = dict(
                zip(("reported", "exact", "gradient_error"), curves, strict=True)
            )
            run["accuracy"] = accuracy(params)
            run["agreement"] = float(np.mean(predicted(params) == predicted(target)))
            results[f"{name}, {optimizer}"] = run
            print(
                f"{name}, {optimizer}: divergence {run['exact'][-1]:.2g}, reported "
                f"{run['reported'][-1]:.2g}, accuracy {run['accuracy']:.2%}",
                flush=True,
            )
    return results


def plot(results: dict[str, Any]) -> Figure:
    """What is reported and what is true, by each optimizer; the gradient's error."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    *panels, errors = figure.subplots(1, 3)
    for axes, optimizer in zip(panels, OPTIMIZERS, strict=True):
        for name, color in COLORS.items():
            run = results[f"{name}, {optimizer}"]
            steps, reported = np.arange(len(run["exact"])), np.asarray(run["reported"])
            axes.plot(steps, run["exact"], color=color, label=f"{name}: exact divergence")
            for sign, marker, text in ((1, ".", "as reported"), (-1, "x", "reported negative")):
                at = sign * reported > 0
                if at.any():
                    style: Any = {"color": color, "markersize": 4, "alpha": 0.6}
                    label = f"{name}: {text}"
                    axes.plot(steps[at], abs(reported[at]), marker, label=label, **style)
        axes.set_ylabel("KL(teacher ‖ student), nats")
        axes.set_title(optimizer, loc="left", fontweight="bold")
    for name, color in COLORS.items():
        errors.plot(results[f"{name}, Adam"]["gradient_error"], color=color, label=name)
    errors.set_ylabel("relative error of the gradient")
    errors.set_title("Adam, gradient", loc="left", fontweight="bold")
    for axes in (*panels, errors):
        axes.set_xlabel("step")
        axes.set_yscale("log")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    """Trains, and writes the figure and its numbers."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--steps", type=int, default=300, help="optimizer steps of Adam; L-BFGS takes a fifth"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split and the parameters")
    folder = {"default": Path("runs") / NAME, "help": "folder to write to (default: %(default)s)"}
    parser.add_argument("--output", type=Path, **folder)
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)  # for the judge; everything else states its dtype
    results: dict[str, Any] = {"jax": jax.__version__, "optax": optax.__version__}
    results |= {"steps": options.steps, "seed": options.seed}
    results |= experiment(options.steps, options.seed)
    options.output.mkdir(parents=True, exist_ok=True)
    plot(results).savefig(options.output / f"{NAME}.png", dpi=110)
    text = json.dumps(results, indent=1)
    text = re.sub(r"\[[^]]*\]", lambda curve: " ".join(curve[0].split()), text)  # a line each
    (options.output / f"{NAME}.json").write_text(text + "\n", encoding="utf-8")
    print(f"written: {options.output}")


if __name__ == "__main__":
    main()
