# SPDX-License-Identifier: Apache-2.0
"""`python -m bench accuracy`: error of loss and gradient as the target's lead grows."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import typer
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from rich import box
from rich.table import Table

from bench import contenders, environment, figures, markdown, options, results, terminal
from bench.cases import Dtype, Labels

KEY = "accuracy/{}"  # by labels
LEADS = (
    *(0.0, 2.0, 5.0, 8.0, 10.0, 12.0, 14.0, 15.0, 16.0, 17.0, 18.0, 20.0, 25.0),
    *(30.0, 35.0, 40.0, 50.0, 60.0, 70.0, 75.0, 80.0, 82.0, 84.0, 86.0, 88.0, 90.0),
)
OFFSETS = (0.0, 10.0, 100.0, 1000.0, 10000.0)
TOKENS = 8
CLASSES = 1000
DIGITS = 80

# Of what was measured, what the tables show, and the lead at which offsets are compared: small
# enough that everybody has some digits right without one.
README_LEADS = (0.0, 5.0, 10.0, 15.0, 17.0, 20.0, 30.0, 50.0, 80.0)
TABLE_LEADS = (0.0, 10.0, 17.0, 30.0, 80.0)
LEAD_OF_OFFSETS = 5.0

QUANTITIES = {
    "loss": "loss",
    "target": "gradient, target",
    "others": "gradient, others",
}


def command(
    *,
    tokens: Annotated[int, typer.Option(min=1, help="Rows of random logits.")] = TOKENS,
    vocab: Annotated[int, typer.Option(min=2, help="Number of classes.")] = CLASSES,
    dtypes: Annotated[
        list[Dtype] | None,
        typer.Option("--dtype", help="A dtype of the logits; repeatable.", show_default="all"),
    ] = None,
    labels: Annotated[
        Labels, typer.Option(help="Targets as class numbers, or one-hot.")
    ] = Labels.INTEGER,
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
    device: options.Device = None,
    json: options.Json = None,
) -> None:
    """Compare loss and gradient with 80-digit arithmetic as the target pulls ahead.

    Shown is the largest relative error over all rows: of the loss, of the gradient's entry at the
    target, and of its other entries; the file has the medians too. 100 % means that zero came
    back. A complete run takes about two minutes.
    """
    environment.use(device)
    chosen = {
        "tokens": tokens if tokens != TOKENS else None,
        "vocab": vocab if vocab != CLASSES else None,
        "dtype": dtypes,
        "lead": leads,
        "offset": offsets,
    }
    complete = not any(chosen.values())
    path = results.destination(json, complete=complete)
    section = measure(
        dtypes or list(Dtype),
        labels,
        leads or LEADS,
        offsets or OFFSETS,
        tokens=tokens,
        classes=vocab,
    )
    what = {"labels": labels if labels is not Labels.INTEGER else None}
    section["command"] = results.command_line("accuracy", what | chosen)
    console = terminal.output()
    for table in tables(section):
        console.print(table, "")
    if path:
        key = KEY.format(labels) if complete else results.key(section)
        results.save(path, key, section)
        terminal.notes.print(f"written: {path}")


def measure(
    dtypes: Sequence[Dtype],
    labels: Labels,
    leads: Sequence[float],
    offsets: Sequence[float],
    *,
    tokens: int = TOKENS,
    classes: int = CLASSES,
) -> dict[str, Any]:
    """Take every contender's largest and median relative errors at every lead and offset.

    Args:
        dtypes: of the logits.
        labels: how the targets are given; dense ones are one-hot.
        leads: nats from the target's logit down to the largest other.
        offsets: what is added to all logits, before they are rounded to their dtype.
        tokens: rows of normal logits of scale 1, the same everywhere but for lead and rounding.
        classes: length of a row.

    Returns:
        A section of the results file. A series has an error, or None, for each lead.
    """
    entries = contenders.LOGITS[labels] + contenders.TORCH_LOGITS[labels][:1]
    found = {dtype: _load(entries, dtype, labels, tokens, classes) for dtype in dtypes}
    left_out = list(dict.fromkeys(line for _, lines in found.values() for line in lines))
    for line in left_out:
        terminal.notes.print(line)

    series = []
    with terminal.progress() as progress:
        task = progress.add_task("", total=len(dtypes) * len(offsets) * len(leads))
        for dtype in dtypes:
            for offset in offsets:
                progress.update(task, description=f"{dtype}, offset {offset:g}", refresh=True)
                seen: dict[str, list[Any]] = {one.name: [] for one in found[dtype][0]}
                for lead in leads:
                    logits, targets = draw(dtype, lead, offset, tokens, classes)
                    truth = exact(logits, targets)
                    for one in found[dtype][0]:
                        computed = evaluate(one, logits, targets, labels)
                        seen[one.name].append(relative_errors(computed, truth, targets, dtype))
                    progress.advance(task)
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
    """As `contenders.load`, without those that cannot do it: PyTorch may lack our device."""
    found, left_out = contenders.load(entries, dtype)
    logits, targets = draw(dtype, 0.0, 0.0, tokens, classes)
    able = []
    for one in found:
        try:
            evaluate(one, logits, targets, labels)
        except Exception as error:  # a peer that cannot do a case must not end the run
            if one.entry.module == "ours":
                raise
            left_out.append(contenders.failure(dtype, one.name, error))
        else:
            able.append(one)
    return able, left_out


def _by_lead(errors: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        quantity: {
            which: [error[quantity] and float(f"{error[quantity][which]:.2g}") for error in errors]
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

    The logits are taken as they are, so rounding them to their dtype is nobody's error.

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
    losses, gradients = contenders.losses_and_gradients(contender)(logits, arrays)
    return np.asarray(losses, np.float64), np.asarray(gradients, np.float64)


def relative_errors(
    computed: tuple[np.ndarray, np.ndarray],
    truth: tuple[np.ndarray, np.ndarray],
    targets: np.ndarray,
    dtype: Dtype,
) -> dict[str, dict[str, float] | None]:
    """Reduce to the largest and the median relative error of each quantity.

    Relative precision ends at the smallest normal number of a dtype, so a true value below it does
    not count: losses are held to float32, gradients to `dtype`. None where no value counts.
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


def percent(error: float | None) -> str:
    """Write an error: a power of ten while it is small, then in percent."""
    if error is None:
        return "–"
    if error < 9.5e-4:
        digits, exponent = f"{error:.0e}".split("e")
        return f"{digits}e{int(exponent)}" if error else "0"
    return f"{error * 100:.1f} %" if error < 0.0995 else f"{error * 100:.0f} %"


def _of(section: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    """The series of a dtype, of an offset, …, in the order of the contenders."""
    return [one for one in section["series"] if all(one[key] == wanted[key] for key in wanted)]


def _offsets(section: dict[str, Any]) -> list[float]:
    return list(dict.fromkeys(one["offset"] for one in section["series"]))


def _dtypes(section: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(one["dtype"] for one in section["series"]))


def _shown(section: dict[str, Any], leads: Sequence[float]) -> list[int]:
    """The places of those leads in a complete run, of all in a selection."""
    measured = section["leads"]
    return [measured.index(lead) for lead in (leads if measured == [*LEADS] else measured)]


def _place_of_offsets(section: dict[str, Any]) -> int:
    return section["leads"].index(LEAD_OF_OFFSETS) if LEAD_OF_OFFSETS in section["leads"] else 0


def _headings(section: dict[str, Any], shown: Sequence[int]) -> list[str]:
    first, *others = (f"{section['leads'][place]:g}" for place in shown)
    return ["relative error of", "by", f"lead {first}", *others]


def _rows(series: Sequence[dict[str, Any]], shown: Sequence[int]) -> list[list[str]]:
    return [
        [
            words if one is series[0] else "",
            one["name"],
            *(percent(one[quantity]["max"][place]) for place in shown),
        ]
        for quantity, words in QUANTITIES.items()
        for one in series
    ]


def _drawn(section: dict[str, Any]) -> str:
    return (
        f"Logits: {section['tokens']} rows of {section['classes']} standard normal numbers, the "
        "target's raised to lead the largest other by so many nats"
    )


END = "100 % means that zero came back."


def tables(section: dict[str, Any]) -> list[Table]:
    """Lay a section out for the terminal: the largest errors, a table a dtype and offset."""
    shown = _shown(section, README_LEADS)
    words, by, *leads = _headings(section, shown)
    found = []
    for dtype in _dtypes(section):
        for offset in _offsets(section):
            table = Table(
                title=f"{dtype}, {section['labels']} labels, offset {offset:g}",
                title_justify="left",
                box=box.SIMPLE_HEAD,
                padding=(0, 1, 0, 0),
            )
            table.add_column(words)
            table.add_column(by)
            for lead in leads:
                table.add_column(lead, justify="right")
            for row in _rows(_of(section, dtype=dtype, offset=offset), shown):
                if row[0]:
                    table.add_section()
                table.add_row(*row, style="bold" if row[1] == contenders.OURS else None)
            found.append(table)
    names = [one["name"] for one in section["series"]]
    found[-1].caption = (
        f"Largest relative error against {DIGITS}-digit arithmetic. {_drawn(section)}. {END}\n"
        f"{contenders.explain(names)}\n{environment.in_words(section['environment'])}"
    )
    found[-1].caption_justify = "left"
    return found


def as_markdown(section: dict[str, Any]) -> str:
    """Lay out the errors in float32 without an offset, for the README."""
    shown = _shown(section, README_LEADS)
    rows = _rows(_of(section, dtype="float32", offset=0.0), shown)
    table = markdown.table(_headings(section, shown), rows)
    return (
        f"{table}\n\nLargest relative error against {DIGITS}-digit arithmetic, in float32. "
        f"{_drawn(section)}. {END}\n{markdown.origin(section)}"
    )


def in_all_dtypes(section: dict[str, Any]) -> str:
    """Lay out largest and median errors in every dtype, by lead and by offset, for the docs."""

    def cell(one: dict[str, Any], quantity: str, place: int) -> str:
        largest, median = (percent(one[quantity][which][place]) for which in ("max", "median"))
        return largest if largest == median else f"{largest} ({median})"

    shown = _shown(section, TABLE_LEADS)
    leads = [f"{section['leads'][place]:g}" for place in shown]
    quantities = [quantity for quantity in QUANTITIES if quantity != "others"]
    by_lead = markdown.table(
        [
            "dtype",
            "by",
            *(f"{QUANTITIES[quantity]}: lead {lead}" for quantity in quantities for lead in leads),
        ],
        [
            [
                one["dtype"],
                one["name"],
                *(cell(one, quantity, place) for quantity in quantities for place in shown),
            ]
            for one in _of(section, offset=0.0)
        ],
    )
    place = _place_of_offsets(section)
    offsets = _offsets(section)
    by_offset = markdown.table(
        [
            "dtype",
            "by",
            *(
                f"{QUANTITIES[quantity]}: + {extra:g}"
                for quantity in quantities
                for extra in offsets
            ),
        ],
        [
            [
                dtype,
                first["name"],
                *(
                    cell(one, quantity, place)
                    for quantity in quantities
                    for offset in offsets
                    for one in _of(section, dtype=dtype, name=first["name"], offset=offset)
                ),
            ]
            for dtype in _dtypes(section)
            for first in _of(section, dtype=dtype, offset=0.0)
        ],
    )
    names = [one["name"] for one in section["series"]]
    return (
        f"{by_lead}\n\nLargest relative error against {DIGITS}-digit arithmetic, and the median "
        f"where it differs. {_drawn(section)}, then rounded to the dtype. {END} –: the truth is "
        f"below the smallest normal number of the dtype.\n\n{by_offset}\n\nThe same with a "
        f"constant added to all logits of a row, at a lead of {section['leads'][place]:g} nats. "
        f"The rounding of the sum is in the truth: it is nobody's error.\n"
        f"{contenders.explain(names)}\n{markdown.origin(section)}"
    )


# Errors are drawn from here on; those below are drawn here, for what is exact has no logarithm.
LEAST, MOST = 1e-9, 20.0


def figure(section: dict[str, Any]) -> Figure:
    """Draw loss and target's gradient against the lead, without an offset, a panel a dtype."""
    leads = np.array(section["leads"])

    def errors(dtype: str, name: str, quantity: str, which: str) -> np.ndarray:
        (one,) = _of(section, dtype=dtype, name=name, offset=0.0)
        return np.array(one[quantity][which], np.float64)

    drawn, grid = _panels(section, leads, errors, marker="")
    for (quantity, dtype), axes in grid.items():
        axes.set_xlim(0, leads[-1])
        held = ~np.isnan(errors(dtype, contenders.OURS, quantity, "max"))
        if not held.all():
            last = leads[held][-1] if held.any() else 0
            axes.axvspan(last, leads[-1], color="0.94", zorder=0)
            axes.text(
                (last + leads[-1]) / 2,
                (LEAST * MOST) ** 0.5,
                f"the truth is below {dtype}'s\nsmallest normal number",
                ha="center",
                va="center",
                color=figures.FAINT,
            )
    for axes in drawn.axes[-len(_dtypes(section)) :]:
        axes.set_xlabel("lead of the target's logit (nats)")
    return drawn


def figure_of_offsets(section: dict[str, Any]) -> Figure:
    """Draw loss and target's gradient against the constant added to the logits, at one lead."""
    place, offsets = _place_of_offsets(section), _offsets(section)

    def errors(dtype: str, name: str, quantity: str, which: str) -> np.ndarray:
        series = _of(section, dtype=dtype, name=name)
        return np.array([one[quantity][which][place] for one in series], np.float64)

    lead = section["leads"][place]
    drawn, grid = _panels(section, np.arange(len(offsets)), errors, markersize=5)
    for (_, dtype), axes in grid.items():
        axes.set_xlim(-0.3, len(offsets) - 0.6)
        axes.set_xticks(range(len(offsets)), [f"{offset:g}" for offset in offsets])
        for at, offset in enumerate(offsets):
            spacing = _spacing(offset, dtype)
            if spacing > lead:
                axes.axvspan(at - 0.4, at + 0.4, color="0.94", zorder=0)
                axes.text(
                    at,
                    1e-6,
                    f"numbers\nare {spacing:g}\napart",
                    ha="center",
                    fontsize=8,
                    color=figures.FAINT,
                )
    for axes in drawn.axes[-len(_dtypes(section)) :]:
        axes.set_xlabel(f"constant added to all logits (lead {lead:g} nats)")
    return drawn


def _panels(
    section: dict[str, Any],
    x: np.ndarray,
    errors: Callable[[str, str, str, str], np.ndarray],
    **style: Any,
) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """Draw the largest error as a line and shade down to the median: a row a quantity.

    Args:
        section: of the results file.
        x: where `errors` belong.
        errors: from dtype, contender, quantity, and "max" or "median"; NaN where there is none.
        **style: of the lines.

    Returns:
        The figure, and its axes by quantity and dtype.
    """
    dtypes = _dtypes(section)
    quantities = {"loss": "loss", "target": "gradient at the target"}
    drawn = Figure(figsize=(1.2 + 4 * len(dtypes), 7.4), layout="constrained")
    rows = drawn.subplots(len(quantities), len(dtypes), sharex="col", sharey=True, squeeze=False)
    grid = {}
    for (quantity, words), row in zip(quantities.items(), rows, strict=True):
        for dtype, axes in zip(dtypes, row, strict=True):
            grid[quantity, dtype] = axes
            figures.dress(axes)
            axes.axhline(1, color=figures.INK, linewidth=0.8, zorder=1)
            for one in _of(section, dtype=dtype, offset=_offsets(section)[0]):
                look = figures.STYLES.get(one["name"], {})
                largest, median = (
                    np.maximum(errors(dtype, one["name"], quantity, which), LEAST)
                    for which in ("max", "median")
                )
                axes.plot(x, largest, label=one["name"], **look | style)
                axes.fill_between(
                    x, median, largest, color=look.get("color"), alpha=0.15, linewidth=0
                )
            axes.set_yscale("log")
            axes.set_ylim(LEAST, MOST)
            axes.yaxis.set_major_locator(FixedLocator([1e-8, 1e-6, 1e-4, 1e-2, 1]))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda error, _: percent(error)))
        row[0].set_ylabel(f"relative error: {words}")
        row[0].text(
            0.02,
            1.5,
            "comes back as 0",
            color=figures.INK,
            transform=row[0].get_yaxis_transform(),
        )
    for dtype, axes in zip(dtypes, rows[0], strict=True):
        axes.set_title(f"{dtype} logits", loc="left", fontweight="bold")
    figures.legend(drawn, rows[0][-1])
    figures.origin(drawn, section)
    return drawn, grid


def _spacing(offset: float, dtype: str) -> float:
    """The distance from a number to the next larger one of a dtype."""
    return float(jnp.finfo(dtype).eps) * 2.0 ** np.floor(np.log2(offset)) if offset else 0.0
