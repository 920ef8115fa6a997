# SPDX-License-Identifier: Apache-2.0
"""`python -m bench accuracy`: error of loss and gradient as the target's lead grows."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import typer
from rich import box
from rich.table import Table

from bench import contenders, environment, markdown, results, terminal
from bench.cases import Dtype, Labels

LEADS = (0.0, 5.0, 10.0, 15.0, 17.0, 20.0, 30.0, 50.0, 80.0)
CLASSES = 1000
ROWS = 8
DIGITS = 80

QUANTITIES = {
    "loss": "loss",
    "target": "gradient, target",
    "others": "gradient, others",
}


def command(
    *,
    dtype: Annotated[Dtype, typer.Option(help="The dtype of the logits.")] = Dtype.FLOAT32,
    labels: Annotated[
        Labels, typer.Option(help="Targets as class numbers, or one-hot.")
    ] = Labels.INTEGER,
    leads: Annotated[
        list[float] | None,
        typer.Option(
            "--lead",
            min=0.0,
            help="Nats from the target's logit down to the next; repeatable.",
            show_default=", ".join(f"{lead:g}" for lead in LEADS),
        ),
    ] = None,
    classes: Annotated[int, typer.Option(min=2, help="Classes a row.")] = CLASSES,
    rows: Annotated[int, typer.Option(min=1, help="Rows of random logits a lead.")] = ROWS,
    json: Annotated[
        Path | None,
        typer.Option(
            help="The results file; its other sections are kept.",
            show_default=results.DEFAULT,
        ),
    ] = None,
) -> None:
    """Compare loss and gradient with 80-digit arithmetic as the target pulls ahead.

    Shown is the largest relative error over all rows: of the loss, of the gradient's entry at the
    target, and of its other entries. 100 % means that zero came back.
    """
    complete = leads is None and (classes, rows) == (CLASSES, ROWS)
    path = results.destination(json, complete=complete)
    section = measure(dtype, labels, leads or LEADS, classes=classes, rows=rows)
    section["command"] = results.command_line(
        "accuracy",
        {
            "dtype": dtype if dtype != Dtype.FLOAT32 else None,
            "labels": labels if labels != Labels.INTEGER else None,
            "lead": leads,
            "classes": classes if classes != CLASSES else None,
            "rows": rows if rows != ROWS else None,
        },
    )
    terminal.output().print(as_table(section))
    if path:
        results.save(path, f"accuracy/{dtype}/{labels}", section)
        terminal.notes.print(f"written: {path}")


def measure(
    dtype: Dtype,
    labels: Labels,
    leads: Sequence[float],
    *,
    classes: int = CLASSES,
    rows: int = ROWS,
) -> dict[str, Any]:
    """Take every contender's largest relative errors at every lead.

    Args:
        dtype: of the logits.
        labels: how the targets are given; dense ones are one-hot.
        leads: nats from the target's logit down to the largest other.
        classes: length of a row.
        rows: rows of normal logits of scale 1, different ones at every lead.

    Returns:
        A section of the results file.
    """
    found, left_out = contenders.load(contenders.LOGITS[labels], dtype)
    for line in left_out:
        terminal.notes.print(line)

    rng = np.random.default_rng(0)
    errors: list[dict[str, Any]] = []
    with terminal.progress() as progress:
        for lead in progress.track(leads, description="leads"):
            logits, targets = draw(rng, lead, dtype, classes, rows)
            truth = exact(logits, targets)
            for name, loss, _ in found:
                computed = evaluate(loss, logits, targets, labels)
                worst = relative_errors(computed, truth, targets, dtype)
                errors.append({"lead": float(lead), "name": name, **worst})

    return {
        "environment": environment.describe(),
        "dtype": dtype.value,
        "labels": labels.value,
        "classes": classes,
        "rows": rows,
        "left_out": left_out,
        "errors": errors,
    }


def draw(
    rng: np.random.Generator, lead: float, dtype: Dtype, classes: int, rows: int
) -> tuple[jax.Array, np.ndarray]:
    """Draw normal logits and put a random target `lead` above the largest of the others.

    Returns:
        Logits `[rows, classes]`, rounded to `dtype`, and targets `[rows]`.
    """
    logits = rng.standard_normal((rows, classes))
    targets = rng.integers(classes, size=rows)
    at_target = np.arange(rows), targets
    logits[at_target] = -np.inf
    logits[at_target] = logits.max(axis=-1) + lead
    return jnp.asarray(logits, dtype), targets


def exact(logits: jax.Array, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute losses and gradients from the definitions, with `DIGITS` digits.

    The logits are taken as they are, so rounding them to their dtype is nobody's error.

    Returns:
        Losses `[rows]` and gradients `[rows, classes]`, rounded to float64 at the end.
    """
    losses, gradients = [], []
    with mpmath.workdps(DIGITS):
        for row, target in zip(np.asarray(logits, np.float64), targets, strict=True):
            powers = [mpmath.exp(mpmath.mpf(float(logit))) for logit in row]
            total = mpmath.fsum(powers)
            probabilities = [power / total for power in powers]
            losses.append(float(-mpmath.log(probabilities[target])))
            probabilities[target] -= 1
            gradients.append([float(entry) for entry in probabilities])
    return np.array(losses), np.array(gradients)


def evaluate(
    loss: Callable[..., jax.Array], logits: jax.Array, targets: np.ndarray, labels: Labels
) -> tuple[np.ndarray, np.ndarray]:
    """Run a contender, jitted; each row's gradient is that of its own loss."""
    arrays = jnp.asarray(targets, jnp.int32)
    if labels is Labels.DENSE:
        arrays = jax.nn.one_hot(arrays, logits.shape[-1], dtype=logits.dtype)

    def losses_and_gradients(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        losses, pullback = jax.vjp(lambda logits: loss(logits, arrays), logits)
        return losses, pullback(jnp.ones_like(losses))[0]

    losses, gradients = jax.jit(losses_and_gradients)(logits)
    return np.asarray(losses, np.float64), np.asarray(gradients, np.float64)


def relative_errors(
    computed: tuple[np.ndarray, np.ndarray],
    truth: tuple[np.ndarray, np.ndarray],
    targets: np.ndarray,
    dtype: Dtype,
) -> dict[str, float]:
    """Reduce to the largest relative error of each quantity.

    A true value below the smallest normal number of its dtype, where relative precision ends, is
    measured in units of that number.
    """
    losses, gradients = (
        np.abs(value - true) / np.maximum(np.abs(true), float(jnp.finfo(smallest).tiny))
        for value, true, smallest in zip(computed, truth, (jnp.float32, dtype), strict=True)
    )
    at_target = np.arange(len(targets)), targets
    target = gradients[at_target].max()
    gradients[at_target] = 0
    return {
        "loss": float(losses.max()),
        "target": float(target),
        "others": float(gradients.max()),
    }


def percent(error: float) -> str:
    """Write an error: a power of ten while it is small, then in percent."""
    if error < 9.5e-4:
        digits, exponent = f"{error:.0e}".split("e")
        return f"{digits}e{int(exponent)}" if error else "0"
    return f"{error * 100:.1f} %" if error < 0.0995 else f"{error * 100:.0f} %"


def _headings(section: dict[str, Any]) -> list[str]:
    leads = list(dict.fromkeys(f"{row['lead']:g}" for row in section["errors"]))
    return ["relative error of", "by", f"lead {leads[0]}", *leads[1:]]


def _rows(section: dict[str, Any]) -> list[list[str]]:
    names = list(dict.fromkeys(row["name"] for row in section["errors"]))
    return [
        [
            words if name == names[0] else "",
            name,
            *(percent(row[quantity]) for row in section["errors"] if row["name"] == name),
        ]
        for quantity, words in QUANTITIES.items()
        for name in names
    ]


def _caption(section: dict[str, Any]) -> str:
    return (
        f"Largest relative error against {DIGITS}-digit arithmetic. Logits: {section['rows']} rows "
        f"of {section['classes']} standard normal {section['dtype']} numbers, the target's raised "
        "to lead the largest other by so many nats. 100 % means that zero came back."
    )


def as_table(section: dict[str, Any]) -> Table:
    """Lay a section out for the terminal."""
    words, by, *leads = _headings(section)
    names = [row["name"] for row in section["errors"]]
    table = Table(
        title=f"{section['dtype']}, {section['labels']} labels",
        title_justify="left",
        caption=f"{_caption(section)}\n{contenders.explain(names)}\n"
        f"{environment.in_words(section['environment'])}",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column(words)
    table.add_column(by)
    for lead in leads:
        table.add_column(lead, justify="right")
    for row in _rows(section):
        if row[0]:
            table.add_section()
        table.add_row(*row, style="bold" if row[1] == contenders.OURS else None)
    return table


def as_markdown(section: dict[str, Any]) -> str:
    """Lay a section out for the README."""
    table = markdown.table(_headings(section), _rows(section))
    return f"{table}\n\n{_caption(section)}\n{markdown.origin(section)}"
