# SPDX-License-Identifier: Apache-2.0
"""`python -m bench overtraining`: what is left of loss and gradient far past 100 % accuracy."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax import Array
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter
from rich import box
from rich.table import Table

import jaxsoftmax
from bench import (
    accuracy_tables,
    contenders,
    environment,
    figures,
    markdown,
    options,
    results,
    terminal,
)
from bench.cases import Dtype, Labels
from jaxsoftmax.training import data, model

KEY = "overtraining"
OURS = jaxsoftmax.softmax_cross_entropy_with_integer_labels
STEPS = 30_000
WIDTH = 64
LEARNING_RATE = 1e-2
DECAY, DECAY_SQUARES, EPSILON = 0.9, 0.999, 1e-8  # of Adam, as optax has them
LOOKS = 240  # at each run, evenly spaced on a logarithmic axis

HEADINGS = (
    "by",
    "first loss of exactly 0",
    "first gradient of exactly 0",
    "loss",
    "loss in float64",
    "its lowest",
    "gradient norm",
    "gradient norm in float64",
    "largest error of the gradient",
    "smallest lead (nats)",
)


def command(
    *,
    steps: Annotated[int, typer.Option(min=1, help="Steps of each run.")] = STEPS,
    device: options.Device = None,
    output: options.Output = results.DEFAULT,
) -> None:
    """Train a small classifier of digits long after it has every training example right.

    The same initial parameters and the same steps, by Adam on all examples at once, through each
    contender's loss in float32. A complete run takes about a minute and a half on two cores.
    """
    environment.use(device)
    complete = steps == STEPS
    path = results.destination(output)
    section = measure(steps)
    chosen = {"steps": None if complete else steps}
    section["command"] = results.command_line("overtraining", chosen)
    terminal.show(as_table(section))
    results.keep(path, section, KEY if complete else None)


class State(NamedTuple):
    """What a step changes."""

    params: model.Params
    mean: model.Params
    """Of the gradients, as Adam weights them."""
    mean_square: model.Params
    step: Array
    loss_zero: Array
    """The first step whose loss was exactly 0; −1 until there is one."""
    gradient_zero: Array
    """The first step whose gradient was 0 in every entry; −1 until there is one."""


def measure(steps: int, *, looks: int = LOOKS) -> dict[str, Any]:
    """Train once through every contender's loss.

    Args:
        steps: of each run.
        looks: how many steps to record, at most.

    Returns:
        A section of the results file.
    """
    found, left_out = contenders.load(contenders.LOGITS[Labels.INTEGER], Dtype.FLOAT32)
    for line in left_out:
        terminal.notes.print(line)
    digits = data.load(data.DIGITS)
    examples = jnp.asarray(digits.train_x), jnp.asarray(digits.train_y)
    sizes = (digits.train_x.shape[1], WIDTH, digits.classes)
    at = np.unique(np.geomspace(1, steps + 1, looks).astype(int) - 1).tolist()
    runs = []
    with terminal.progress() as progress:
        task = progress.add_task("", total=len(found) * len(at))
        for name, loss, _ in found:
            state = initial(sizes)
            seen: list[dict[str, float]] = []
            for step in at:
                progress.update(task, description=f"{name}, step {step}", refresh=True)
                state = train(state, *examples, step, loss=loss)
                seen.append(judge(state.params, *examples, loss=loss))
                progress.advance(task)
            runs.append(
                {
                    "name": name,
                    "loss_zero": int(state.loss_zero),
                    "gradient_zero": int(state.gradient_zero),
                }
                | {key: [float(f"{look[key]:.3g}") for look in seen] for key in seen[0]}
            )
    return {
        "environment": environment.describe(),
        "left_out": left_out,
        "examples": len(digits.train_y),
        "sizes": sizes,
        "learning_rate": LEARNING_RATE,
        "steps": at,
        "runs": runs,
    }


def initial(sizes: Sequence[int]) -> State:
    """The state before the first step, the same for everyone."""
    params = model.init(jax.random.key(0), sizes)
    zeros, never = jax.tree.map(jnp.zeros_like, params), jnp.asarray(-1)
    return State(params, zeros, zeros, jnp.asarray(0), never, never)


@partial(jax.jit, static_argnames="loss")
def train(state: State, x: Array, y: Array, until: int, *, loss: Callable[..., Array]) -> State:
    """Take steps on all examples at once until there are so many."""

    def step(state: State) -> State:
        value, gradient = jax.value_and_grad(
            lambda p: _mean(model.apply(p, x, p[-1][1].size), y, loss)
        )(state.params)
        mean, mean_square = (
            jax.tree.map(lambda m, g, d=decay, p=power: d * m + (1 - d) * g**p, average, gradient)
            for average, decay, power in (
                (state.mean, DECAY, 1),
                (state.mean_square, DECAY_SQUARES, 2),
            )
        )
        taken = (state.step + 1).astype(jnp.float32)
        rate = LEARNING_RATE / (1 - DECAY**taken)
        scale = 1 / (1 - DECAY_SQUARES**taken)
        params = jax.tree.map(
            lambda p, m, v: p - rate * m / (jnp.sqrt(scale * v) + EPSILON),
            state.params,
            mean,
            mean_square,
        )
        zero = jnp.all(jnp.stack([jnp.all(leaf == 0) for leaf in jax.tree.leaves(gradient)]))

        def first(seen: Array, happens: Array) -> Array:
            return jnp.where((seen < 0) & happens, state.step, seen)

        return State(
            params,
            mean,
            mean_square,
            state.step + 1,
            first(state.loss_zero, value == 0),
            first(state.gradient_zero, zero),
        )

    return jax.lax.while_loop(lambda state: state.step < until, step, state)


def _mean(logits: Array, y: Array, loss: Callable[..., Array]) -> Array:
    return loss(logits, y).mean()


def judge(
    params: model.Params, x: Array, y: Array, *, loss: Callable[..., Array]
) -> dict[str, float]:
    """What a loss says of these parameters, and what is so: ours, of the same logits in float64.

    The float32 network is nobody's error: what differs is the loss and its gradient at the logits,
    and both gradients go back through the network alike.
    """
    logits, pullback = jax.vjp(lambda p: model.apply(p, x, p[-1][1].size), params)
    computed, gradient = jax.value_and_grad(_mean)(logits, y, loss)
    with jax.enable_x64(True):
        wide = jnp.asarray(np.asarray(logits, np.float64))
        exact, truth = jax.value_and_grad(_mean)(wide, y, OURS)
    got, true = (
        np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])
        for tree in (pullback(gradient), pullback(jnp.asarray(np.asarray(truth, np.float32))))
    )
    others = np.array(logits)
    at_target = np.arange(len(y)), np.asarray(y)
    others[at_target] = -np.inf
    leads = np.asarray(logits)[at_target] - others.max(axis=-1)
    return {
        "loss": float(computed),
        "exact_loss": float(exact),
        "gradient_norm": float(np.linalg.norm(got)),
        "exact_gradient_norm": float(np.linalg.norm(true)),
        "gradient_error": float(np.linalg.norm(got - true) / np.linalg.norm(true)),
        "accuracy": float(np.mean(leads > 0)),
        "smallest_lead": float(leads.min()),
    }


def _all_right(section: dict[str, Any]) -> int:
    """The first recorded step from which on every run has every example right."""
    right = np.all([run["accuracy"] for run in section["runs"]] == np.float64(1), axis=0)
    return section["steps"][len(right) - int(np.argmin([*right[::-1], False]))]


def _rows(section: dict[str, Any]) -> list[list[str]]:
    def step(number: int) -> str:
        return "never" if number < 0 else f"step {number}"

    return [
        [
            run["name"],
            step(run["loss_zero"]),
            step(run["gradient_zero"]),
            f"{run['loss'][-1]:.2g}",
            f"{run['exact_loss'][-1]:.2g}",
            f"{min(run['exact_loss']):.2g}",
            f"{run['gradient_norm'][-1]:.2g}",
            f"{run['exact_gradient_norm'][-1]:.2g}",
            accuracy_tables.percent(max(run["gradient_error"])),
            f"{run['smallest_lead'][-1]:.1f}",
        ]
        for run in section["runs"]
    ]


def _caption(section: dict[str, Any]) -> str:
    sizes = "-".join(map(str, section["sizes"]))
    return (
        f"A {sizes} perceptron on scikit-learn's digits, {section['examples']} examples in one "
        f"batch, float32, Adam with learning rate {section['learning_rate']:g}, the same initial "
        f"parameters. Every example is right from step {_all_right(section)} on at the latest. "
        f"Numbers are those after {section['steps'][-1]} steps; in float64 means: our loss of the "
        "same logits in float64. The gradient's error is |g − exact| / |exact|, over all "
        "parameters; its largest and the lowest loss are of the recorded steps."
    )


def as_table(section: dict[str, Any]) -> Table:
    """Lay a section out for the terminal."""
    table = Table(
        caption=f"{_caption(section)}\n{environment.in_words(section['environment'])}",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == HEADINGS[0] else "right")
    for row in _rows(section):
        table.add_row(*row, style="bold" if row[0] == contenders.OURS else None)
    return table


def as_markdown(section: dict[str, Any]) -> str:
    """Lay a section out for the docs."""
    table = markdown.table(HEADINGS, _rows(section), words=1)
    return f"{table}\n\n{_caption(section)}\n{markdown.origin(section)}"


LEAST = 1e-12  # drawn in the place of 0, which has no logarithm
FIRST_STEP = 50  # drawn


def figure(section: dict[str, Any]) -> Figure:
    """Draw loss, gradient norm and the gradient's error by step; dotted lines are in float64."""
    drawn = Figure(figsize=(14, 5.4), layout="constrained")
    panels = drawn.subplots(1, 3)
    titles = {
        "loss": "Loss (nats)",
        "gradient_norm": "Gradient norm",
        "gradient_error": "Relative error of the gradient",
    }
    right = _all_right(section)
    for axes, (key, title) in zip(panels, titles.items(), strict=True):
        figures.dress(axes)
        for run in section["runs"]:
            look = figures.STYLES[run["name"]] | {"marker": ""}
            axes.plot(section["steps"], np.maximum(run[key], LEAST), label=run["name"], **look)
            if run["name"] != contenders.OURS and f"exact_{key}" in run:
                axes.plot(
                    section["steps"],
                    run[f"exact_{key}"],
                    label=f"{run['name']}, in float64",
                    color=look["color"],
                    linewidth=1.6,
                    linestyle=(0, (1, 1.5)),
                )
        axes.set_xscale("log")
        axes.set_yscale("log")
        if any(0 in run[key] for run in section["runs"]):
            powers = [float(f"1e{exponent}") for exponent in range(-10, 1, 2)]
            axes.yaxis.set_major_locator(FixedLocator([LEAST, *powers]))
            axes.yaxis.set_major_formatter(
                FuncFormatter(lambda number, _: "0" if number == LEAST else f"{number:.0e}")
            )
        axes.set_xlim(FIRST_STEP, max(section["steps"][-1], 2 * FIRST_STEP))
        axes.set_xlabel("step")
        axes.set_title(title, loc="left", fontweight="bold")
        axes.axvline(right, color=figures.FAINT, linewidth=1, zorder=0)
        foot = axes.get_xaxis_transform()
        axes.text(right, 0.97, " every example right", transform=foot, color=figures.FAINT)
        for run in section["runs"]:
            zero = run.get(f"{key.removesuffix('_norm')}_zero", -1)
            if zero >= FIRST_STEP:
                axes.annotate(
                    f"{run['name']}: exactly 0,\nfirst at step {zero}",
                    (zero, LEAST),
                    (zero / 2, LEAST),
                    ha="right",
                    va="bottom",
                    color=figures.STYLES[run["name"]]["color"],
                    arrowprops={"arrowstyle": "->", "color": figures.STYLES[run["name"]]["color"]},
                )
    panels[2].yaxis.set_major_formatter(
        FuncFormatter(lambda error, _: accuracy_tables.percent(error))
    )
    figures.legend(drawn, panels[0])
    figures.origin(drawn, section)
    return drawn
