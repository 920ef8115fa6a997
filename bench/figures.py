# SPDX-License-Identifier: Apache-2.0
"""What the figures have in common: each contender's style, axes, legends, the numbers' origin."""

from collections.abc import Iterable
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import contenders, environment

INK, FAINT = "#444444", "#888888"

_OURS = {"color": "#0072b2", "marker": "o", "linewidth": 3.2, "zorder": 4}
_OPTAX = {"color": "#d55e00", "marker": "s", "linewidth": 2.4}
_TOKAMAX = {"color": "black", "marker": "^", "linewidth": 1.6}
_TORCH = {"color": "#cc79a7", "marker": "v", "linewidth": 2.0}
_VARIANT = {"linestyle": (0, (3, 1.2)), "markerfacecolor": "white"}
# Okabe and Ito's colours, which the colour-blind can tell apart: one per package, ours blue, thick
# and on top. Lines that coincide stay visible: the later ones are narrower or broken.
STYLES: dict[str, dict[str, Any]] = {
    contenders.OURS: _OURS,
    "jaxsoftmax, recompute": _OURS | _VARIANT,
    contenders.BASELINE: _OPTAX,
    "optax, no upcast": _OPTAX | {"color": "#e69f00", "linewidth": 2.0},
    "optax, checkpointed chunks": _OPTAX | _VARIANT,
    "optax, log targets": _OPTAX | {"color": "#e69f00", "linestyle": (0, (1, 2))},
    "optax, generalized": _OPTAX | {"color": "#56b4e9", "linewidth": 1.6},
    "jax.nn": {"color": "#009e73", "marker": "^", "linewidth": 2.4, "linestyle": (0, (4, 2))},
    "torch": _TORCH | {"linestyle": (3, (2, 4))},
    "torch, chunked": _TORCH | _VARIANT,
    "tokamax": _TOKAMAX,
    "tokamax, chunked": _TOKAMAX | _VARIANT,
    "jax-cce": {"color": "#56b4e9", "marker": "D", "linewidth": 1.6},
}


def dress(axes: Axes) -> None:
    """Give axes the look that all figures share."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def shade(axes: Axes, begin: float, end: float, words: str, *, at: float, **style: Any) -> None:
    """Grey the range from `begin` to `end`, with words in its middle that say why."""
    axes.axvspan(begin, end, color="0.94", zorder=0)
    middle = (begin * end) ** 0.5 if axes.get_xscale() == "log" else (begin + end) / 2
    axes.text(middle, at, words, ha="center", color=FAINT, **style)


def legend(figure: Figure, axes: Axes, *, beside: bool = False) -> None:
    """Name the lines of these axes above all panels, or in a column beside them."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside right center" if beside else "outside upper left",
        ncols=1 if beside else len(labels),
        frameon=False,
        handlelength=2.6,
    )


def origin(figure: Figure, section: dict[str, Any]) -> None:
    """Say below all panels where, with which versions and when the section was measured."""
    words = environment.in_words(section["environment"])
    figure.supxlabel(words, x=0.01, ha="left", fontsize=8, color=FAINT)


def against_vocabulary(
    section: dict[str, Any], points: Iterable[tuple[int, str, float]], unit: str, where: str = ""
) -> Figure:
    """Draw the cost of heads against their number of classes, both axes from zero.

    A point is (classes, contender, cost); contenders without a style are not drawn.
    """
    lines: dict[str, list[tuple[int, float]]] = {}
    for classes, name, value in points:
        if name in STYLES:
            lines.setdefault(name, []).append((classes, value))
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    axes = figure.add_subplot()
    dress(axes)
    # The legend is in the order of the lines at their right ends.
    for name, found in sorted(lines.items(), key=lambda line: -max(line[1])[1]):
        axes.plot(*zip(*sorted(found), strict=True), label=name, **STYLES[name])
    axes.set(xlabel="classes", ylabel=unit)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    first = section["cases"][0]
    title = f"{first['tokens']} tokens, width {first['hidden']}, {first['dtype']}{where}"
    axes.set_title(f"linear head, value and gradient: {title}", loc="left", fontweight="bold")
    legend(figure, axes, beside=True)
    origin(figure, section)
    return figure
