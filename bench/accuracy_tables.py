# SPDX-License-Identifier: Apache-2.0
"""What `python -m bench accuracy` measured: tables for terminal, README and docs, two figures."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from bench import contenders, environment, figures, tables
from bench.tables import Table

DIGITS = 80  # of the truth

# The measured leads that the tables show, and the lead at which offsets are compared: small enough
# that every contender has some digits right without an offset.
LEADS = (0.0, 5.0, 10.0, 15.0, 17.0, 20.0, 30.0, 50.0, 80.0)
TABLE_LEADS = (0.0, 10.0, 17.0, 30.0, 80.0)
README_LEADS = (0.0, 5.0, 10.0, 15.0, 20.0, 30.0)
IN_README = (contenders.OURS, contenders.BASELINE, "jax.nn")
LEAD_OF_OFFSETS = 5.0

QUANTITIES = {
    "loss": "loss",
    "target": "gradient, target",
    "others": "gradient, others",
}


def percent(error: float | None) -> str:
    """Write an error: in percent, as a power of ten while it is small, and where it is large."""
    if error is None:
        return "–"
    if error < 9.5e-4 or error >= 99.5:
        digits, exponent = f"{error:.0e}".split("e")
        return f"{digits}e{int(exponent)}" if error else "0"
    return f"{error * 100:.1f} %" if error < 0.0995 else f"{error * 100:.0f} %"


def _of(section: dict[str, Any], **wanted: Any) -> list[dict[str, Any]]:
    """The series with the `wanted` dtype, offset, …, in the order of the contenders."""
    return [one for one in section["series"] if all(one[key] == wanted[key] for key in wanted)]


def _all(section: dict[str, Any], key: str) -> list[Any]:
    """The dtypes, or the offsets, of all series."""
    return list(dict.fromkeys(one[key] for one in section["series"]))


def _shown(section: dict[str, Any], leads: Sequence[float]) -> list[int]:
    """The indices of those leads; of all measured leads if some of those are missing."""
    measured = section["leads"]
    return [measured.index(lead) for lead in (leads if {*leads} <= {*measured} else measured)]


def _place_of_offsets(section: dict[str, Any]) -> int:
    return section["leads"].index(LEAD_OF_OFFSETS) if LEAD_OF_OFFSETS in section["leads"] else 0


def _errors(
    section: dict[str, Any],
    dtype: str,
    offset: float,
    *notes: str,
    quantities: Sequence[str] = tuple(QUANTITIES),
    leads: Sequence[float] = LEADS,
) -> Table:
    """The largest errors of one dtype and offset, by quantity and contender."""
    shown = _shown(section, leads)
    first, *others = (f"{section['leads'][place]:g}" for place in shown)
    series = _of(section, dtype=dtype, offset=offset)
    rows = [
        [
            QUANTITIES[quantity] if one is series[0] else "",
            one["name"],
            *(percent(one[quantity]["max"][place]) for place in shown),
        ]
        for quantity in quantities
        for one in series
    ]
    title = f"{dtype}, {section['labels']} labels, offset {offset:g}"
    return Table(["relative error of", "by", f"lead {first}", *others], rows, notes, title)


def _drawn(section: dict[str, Any]) -> str:
    return (
        f"Logits: {section['tokens']} rows of {section['classes']} standard normal numbers, the "
        "target's raised to lead the largest other by so many nats"
    )


TRUTH = f"Largest relative error against {DIGITS}-digit arithmetic"
END = "100 % means that zero came back."


def in_terminal(section: dict[str, Any]) -> list[Table]:
    """Lay out the largest errors: one table per dtype and offset."""
    cases = itertools.product(_all(section, "dtype"), _all(section, "offset"))
    found = [_errors(section, dtype, offset) for dtype, offset in cases]
    notes = f"{TRUTH}. {_drawn(section)}. {END}", _explained(section), tables.origin(section)
    return [*found[:-1], found[-1]._replace(notes=notes)]


def in_readme(section: dict[str, Any]) -> list[Table]:
    """Lay out for the README a few of the errors in float32."""
    words, date = environment.briefly(section["environment"])
    note = f"{TRUTH}, in float32, by the nats that the label's logit leads by. {END}"
    few = section | {"series": [one for one in section["series"] if one["name"] in IN_README]}
    both = {"quantities": ("loss", "target"), "leads": README_LEADS}
    return [_errors(few, "float32", 0.0, f"{note} {words}, {date}.", **both)]


def in_docs(section: dict[str, Any]) -> list[Table]:
    """Lay out the errors in float32, then largest and median ones, by lead and by offset."""

    def cell(one: dict[str, Any], quantity: str, place: int) -> str:
        largest, median = (percent(one[quantity][which][place]) for which in ("max", "median"))
        return largest if largest == median else f"{largest} ({median})"

    def table(columns: Sequence[tuple[str, float, int]], *notes: str) -> Table:
        """For each quantity, a column for each heading, offset and place of a lead."""
        both = [*itertools.product(("loss", "target"), columns)]
        rows = []
        for first in _of(section, offset=0.0):
            who = {"dtype": first["dtype"], "name": first["name"]}
            series = {one["offset"]: one for one in _of(section, **who)}
            cells = (cell(series[offset], what, place) for what, (_, offset, place) in both)
            rows.append([*who.values(), *cells])
        headings = [f"{QUANTITIES[what]}: {heading}" for what, (heading, *_) in both]
        return Table(["dtype", "by", *headings], rows, notes)

    leads, common = section["leads"], _place_of_offsets(section)
    shown = _shown(section, TABLE_LEADS)
    return [
        _errors(section, "float32", 0.0, "Largest relative error, in float32."),
        table(
            [(f"lead {leads[place]:g}", 0.0, place) for place in shown],
            f"{TRUTH}, and the median where it differs. {_drawn(section)}, then rounded to the "
            f"dtype. {END} –: the truth is below the smallest normal number of the dtype.",
        ),
        table(
            [(f"+ {offset:g}", offset, common) for offset in _all(section, "offset")],
            "The same with a constant added to all logits of a row, at a lead of "
            f"{leads[common]:g} nats. The rounding of the sum is in the truth: it is nobody's "
            "error.",
            _explained(section),
            tables.origin(section),
        ),
    ]


def _explained(section: dict[str, Any]) -> str:
    return contenders.explain(one["name"] for one in section["series"])


# The range of errors drawn; smaller ones are drawn at LEAST, since 0 has no logarithm.
LEAST, MOST = 1e-9, 20.0
Points = list[tuple[float, int]]  # offsets, and places among the leads
# Of a dtype, contender, quantity and "max" or "median": the errors, NaN where there is none.
Errors = Callable[[str, str, str, str], np.ndarray]
_DRAWN = {"loss": "loss", "target": "gradient at the target"}


def figure(section: dict[str, Any]) -> Figure:
    """Draw loss and target's gradient against the lead, without an offset, one panel per dtype."""
    leads = np.array(section["leads"])
    points = [(0.0, place) for place in range(len(leads))]
    label = "lead of the target's logit (nats)"
    drawn, grid = panels(section, _DRAWN, label, leads, _errors_at(points, section), marker="")
    for (quantity, dtype), axes in grid.items():
        axes.set_xlim(0, leads[-1])
        held = ~np.isnan(_errors_at(points, section)(dtype, contenders.OURS, quantity, "max"))
        if not held.all():
            last = leads[held][-1] if held.any() else 0
            words = f"the truth is below {dtype}'s\nsmallest normal number"
            middle = (LEAST * MOST) ** 0.5
            figures.shade(axes, last, leads[-1], words, at=middle, va="center")
    return drawn


def figure_of_offsets(section: dict[str, Any]) -> Figure:
    """Draw loss and target's gradient against the constant added to the logits, at one lead."""
    place, offsets = _place_of_offsets(section), _all(section, "offset")
    lead, points = section["leads"][place], [(offset, place) for offset in offsets]
    label = f"constant added to all logits (lead {lead:g} nats)"
    errors = _errors_at(points, section)
    drawn, grid = panels(section, _DRAWN, label, np.arange(len(offsets)), errors, markersize=5)
    for (_, dtype), axes in grid.items():
        axes.set_xlim(-0.3, len(offsets) - 0.6)
        axes.set_xticks(range(len(offsets)), [f"{offset:g}" for offset in offsets])
        for at, offset in enumerate(offsets):
            spacing = _spacing(offset, dtype)
            if spacing > lead:
                words = f"numbers\nare {spacing:g}\napart"
                figures.shade(axes, at - 0.4, at + 0.4, words, at=1e-6, fontsize=8)
    return drawn


def _errors_at(points: Points, section: dict[str, Any]) -> Errors:
    def errors(dtype: str, name: str, quantity: str, which: str) -> np.ndarray:
        series = {one["offset"]: one for one in _of(section, dtype=dtype, name=name)}
        found = [series[offset][quantity][which][place] for offset, place in points]
        return np.array(found, np.float64)

    return errors


def panels(
    section: dict[str, Any],
    quantities: Mapping[str, str],
    label: str,
    x: np.ndarray,
    errors: Errors,
    *,
    at_one: tuple[str, str] = ("comes back as 0", "left"),
    most: float = MOST,
    **style: Any,
) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """Draw the largest error as a line and shade down to the median: one row per quantity.

    Args:
        section: of the results file.
        quantities: what is drawn, and its words.
        label: of `x`.
        x: a number for each of the errors.
        errors: finds them.
        at_one: what an error of 1 means, and at which end this is said.
        most: the upper end of the axis of errors.
        **style: of the lines.

    Returns:
        The figure, and its axes by quantity and dtype.
    """
    dtypes = _all(section, "dtype")
    drawn = Figure(figsize=(1.2 + 4 * len(dtypes), 7.4), layout="constrained")
    rows = drawn.subplots(len(quantities), len(dtypes), sharex="col", sharey=True, squeeze=False)
    grid = {}
    for (quantity, words), row in zip(quantities.items(), rows, strict=True):
        for dtype, axes in zip(dtypes, row, strict=True):
            grid[quantity, dtype] = axes
            figures.dress(axes)
            axes.axhline(1, color=figures.INK, linewidth=0.8, zorder=1)
            of_dtype = _of(section, dtype=dtype)
            for name in dict.fromkeys(one["name"] for one in of_dtype if quantity in one):
                look = figures.STYLES.get(name, {})
                largest, median = (
                    np.maximum(errors(dtype, name, quantity, which), LEAST)
                    for which in ("max", "median")
                )
                axes.plot(x, largest, label=name, **look | style)
                axes.fill_between(
                    x, median, largest, color=look.get("color"), alpha=0.15, linewidth=0
                )
            axes.set_yscale("log")
            axes.set_ylim(LEAST, most)
            ticks = [10.0**power for power in range(-8, 9, 2) if 10.0**power < most]
            axes.yaxis.set_major_locator(FixedLocator(ticks))
            axes.yaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(FuncFormatter(lambda error, _: percent(error)))
        row[0].set_ylabel(f"relative error: {words}")
        row[0].text(
            0.02 if at_one[1] == "left" else 0.98,
            1.5,
            at_one[0],
            ha=at_one[1],
            color=figures.INK,
            transform=row[0].get_yaxis_transform(),
        )
    for dtype, axes in zip(dtypes, rows[0], strict=True):
        axes.set_title(f"{dtype} logits", loc="left", fontweight="bold")
    for axes in rows[-1]:
        axes.set_xlabel(label)
    figures.legend(drawn, rows[0][-1])
    figures.origin(drawn, section)
    return drawn, grid


def _spacing(offset: float, dtype: str) -> float:
    """The distance from a number to the next larger one of a dtype."""
    return float(jnp.finfo(dtype).eps) * 2.0 ** np.floor(np.log2(offset)) if offset else 0.0
