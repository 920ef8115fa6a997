# SPDX-License-Identifier: Apache-2.0
"""`python -m bench accuracy`: error of loss and gradient as the target's lead grows.

And of divergences as two softmaxes come closer: `divergence_accuracy`.
"""

from collections.abc import Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import typer

from bench import (
    accuracy_tables,
    contenders,
    divergence_accuracy,
    environment,
    options,
    results,
    tables,
)
from bench.accuracy_tables import DIGITS, QUANTITIES
from bench.cases import Dtype, Labels, Op
from bench.divergence_accuracy import DELTAS

KEY = "accuracy/{}"  # by labels, or of divergences
LEADS = (
    *(0.0, 2.0, 5.0, 8.0, 10.0, 12.0, 14.0, 15.0, 16.0, 17.0, 18.0, 20.0, 25.0),
    *(30.0, 35.0, 40.0, 50.0, 60.0, 70.0, 75.0, 80.0, 82.0, 84.0, 86.0, 88.0, 90.0),
)
OFFSETS = (0.0, 10.0, 100.0, 1000.0, 10000.0)
TOKENS = 8
CLASSES = 1000


def command(
    context: typer.Context,
    *,
    op: Annotated[
        Op, typer.Option(help="Losses of given logits, or divergences of two softmaxes.")
    ] = Op.LOGITS,
    labels: Annotated[
        Labels, typer.Option(help="Targets as class numbers, or one-hot.")
    ] = Labels.INTEGER,
    tokens: Annotated[int, typer.Option(min=1, help="Rows of random logits.")] = TOKENS,
    vocab: Annotated[int, typer.Option(min=2, help="Number of classes.")] = CLASSES,
    dtypes: Annotated[
        list[Dtype] | None,
        typer.Option("--dtype", help="A dtype of the logits; repeatable.", show_default="all"),
    ] = None,
    leads: Annotated[
        list[float] | None,
        typer.Option(
            "--lead",
            min=0.0,
            help="Nats from the target's logit down to the next; repeatable.",
            show_default=f"{len(LEADS)} from {LEADS[0]:g} to {LEADS[-1]:g}",
        ),
    ] = None,
    offsets: Annotated[
        list[float] | None,
        typer.Option(
            "--offset",
            help="What is added to all logits of a row, before they are rounded; repeatable.",
            show_default=", ".join(f"{offset:g}" for offset in OFFSETS),
        ),
    ] = None,
    deltas: Annotated[
        list[float] | None,
        typer.Option(
            "--delta",
            min=0.0,
            help="With --op divergence: the logits are those of the target plus so many times "
            "normal numbers; repeatable.",
            show_default=f"{len(DELTAS)} from {DELTAS[0]:g} to {DELTAS[-1]:g}",
        ),
    ] = None,
    device: options.Device = None,
    output: options.Output = results.DEFAULT,
) -> None:
    """Compare loss and gradient with 80-digit arithmetic as the target pulls ahead.

    Shown is the largest relative error over all rows: of the loss, of the gradient's entry at the
    target, and of its other entries; the file has the medians too. 100 % means that zero came
    back. A complete run takes about two minutes, and one of --op divergence (KL, its gradients by
    the logits and by the target, and JS) about one.
    """
    environment.use(device)
    given = options.given(context)
    if op not in (Op.LOGITS, Op.DIVERGENCE):
        raise typer.BadParameter("expected logits or divergence", param_hint="--op")
    if op is Op.DIVERGENCE and given.keys() & {"labels", "lead", "offset"}:
        raise typer.BadParameter(
            "expected --delta with --op divergence", param_hint="--labels, --lead, --offset"
        )
    if op is Op.LOGITS and deltas:
        raise typer.BadParameter("expected --op divergence with it", param_hint="--delta")
    path = results.destination(output)
    if op is Op.DIVERGENCE:
        section = divergence_accuracy.measure(
            dtypes or list(Dtype), deltas or DELTAS, tokens=tokens, classes=vocab
        )
        section["command"] = results.command_line("accuracy", given)
        tables.show(*divergence_accuracy.in_docs(section))
        results.keep(path, section, KEY.format(op) if given.keys() <= {"op"} else None)
        return
    section = measure(
        dtypes or list(Dtype),
        labels,
        leads or LEADS,
        offsets or OFFSETS,
        tokens=tokens,
        classes=vocab,
    )
    section["command"] = results.command_line("accuracy", given)
    tables.show(*accuracy_tables.in_terminal(section))
    results.keep(path, section, KEY.format(labels) if given.keys() <= {"labels"} else None)


def measure(
    dtypes: Sequence[Dtype],
    labels: Labels,
    leads: Sequence[float],
    offsets: Sequence[float],
    *,
    tokens: int = TOKENS,
    classes: int = CLASSES,
) -> dict[str, Any]:
    """Measure every contender's largest and median relative errors at every lead and offset.

    The logits are the same everywhere, except for the target's lead, the offset and the rounding.

    Returns:
        A section of the results file. A series has an error, or None, for each lead.
    """
    entries = contenders.LOGITS[labels] + contenders.TORCH_LOGITS[labels][:1]
    found = {dtype: _load(entries, dtype, labels, tokens, classes) for dtype in dtypes}
    left_out = list(dict.fromkeys(line for _, lines in found.values() for line in lines))
    tables.say(*left_out)

    series = []
    with tables.progress(len(dtypes) * len(offsets) * len(leads)) as now:
        for dtype in dtypes:
            for offset in offsets:
                now(f"{dtype}, offset {offset:g}")
                seen: dict[str, list[Any]] = {one.name: [] for one in found[dtype][0]}
                for lead in leads:
                    logits, targets = draw(dtype, lead, offset, tokens, classes)
                    truth = exact(logits, targets)
                    for one in found[dtype][0]:
                        computed = evaluate(one, logits, targets, labels)
                        seen[one.name].append(relative_errors(computed, truth, targets, dtype))
                    now(done=1)
                series += [
                    {"dtype": dtype.value, "offset": offset, "name": name, **_by_lead(errors)}
                    for name, errors in seen.items()
                ]

    return {
        "environment": environment.describe(),
        "labels": labels.value,
        "tokens": tokens,
        "classes": classes,
        "leads": list(leads),
        "left_out": left_out,
        "series": series,
    }


def _load(
    entries: Sequence[contenders.Entry], dtype: Dtype, labels: Labels, tokens: int, classes: int
) -> tuple[list[contenders.Contender], list[str]]:
    """As `contenders.load`, without contenders that fail here: PyTorch may lack our device."""
    found, left_out = contenders.load(entries, dtype)
    logits, targets = draw(dtype, 0.0, 0.0, tokens, classes)
    able = []
    for one in found:
        with contenders.may_fail(one, dtype, left_out):
            evaluate(one, logits, targets, labels)
            able.append(one)
    return able, left_out


def _by_lead(errors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        quantity: {
            which: [error[quantity] and results.short(error[quantity][which]) for error in errors]
            for which in ("max", "median")
        }
        for quantity in QUANTITIES
    }


def draw(
    dtype: Dtype, lead: float, offset: float, tokens: int, classes: int
) -> tuple[jax.Array, np.ndarray]:
    """Draw normal logits and put a random target `lead` above the largest of the others.

    Returns:
        Logits `[tokens, classes]`, rounded to `dtype`, and targets `[tokens]`.
    """
    rng = np.random.default_rng(0)
    logits = rng.standard_normal((tokens, classes))
    targets = rng.integers(classes, size=tokens)
    at_target = np.arange(tokens), targets
    logits[at_target] = -np.inf
    logits[at_target] = logits.max(axis=-1) + lead
    return jnp.asarray(logits + offset, dtype), targets


def exact(logits: jax.Array, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Compute losses and gradients from the definitions, with `DIGITS` digits.

    It starts from the rounded logits, so their rounding does not count as an error.

    Returns:
        Losses `[tokens]` and gradients `[tokens, classes]`, rounded to float64 at the end.
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
    contender: contenders.Contender, logits: jax.Array, targets: np.ndarray, labels: Labels
) -> tuple[np.ndarray, np.ndarray]:
    """Run a contender; each row's gradient is that of its own loss."""
    arrays = jnp.asarray(targets, jnp.int32)
    if labels is Labels.DENSE:
        arrays = jax.nn.one_hot(arrays, logits.shape[-1], dtype=logits.dtype)
    losses, (gradients,) = contenders.losses_and_gradients(contender, 1, logits, arrays)
    return np.asarray(losses, np.float64), np.asarray(gradients, np.float64)


def relative_errors(
    computed: tuple[np.ndarray, np.ndarray],
    truth: tuple[np.ndarray, np.ndarray],
    targets: np.ndarray,
    dtype: Dtype,
) -> dict[str, dict[str, float] | None]:
    """Reduce to the largest and the median relative error of each quantity.

    Relative precision ends at the smallest normal number of a dtype, so a true value below it does
    not count: that of float32 for losses, that of `dtype` for gradients. None if no value counts.
    """
    at_target = np.zeros(truth[1].shape, bool)
    at_target[np.arange(len(targets)), targets] = True
    losses, gradients = zip(computed, truth, strict=True)

    def reduce(pair: Sequence[np.ndarray], smallest: Any) -> dict[str, float] | None:
        value, true = pair
        counts = np.abs(true) >= float(jnp.finfo(smallest).tiny)
        if not counts.any():
            return None
        errors = np.abs(value - true)[counts] / np.abs(true)[counts]
        return {"max": float(errors.max()), "median": float(np.median(errors))}

    return {
        "loss": reduce(losses, jnp.float32),
        "target": reduce([array[at_target] for array in gradients], dtype),
        "others": reduce([array[~at_target] for array in gradients], dtype),
    }
