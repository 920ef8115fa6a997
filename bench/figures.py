# SPDX-License-Identifier: Apache-2.0
"""What the figures have in common: a contender's colour, axes, labels at the lines themselves."""

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench import contenders, environment

INK, FAINT = "#444444", "#888888"
# Okabe and Ito's colours, which the colour-blind tell apart. Lines that coincide stay visible: the
# later ones are narrower or broken, ours is on top.
STYLES: dict[str, dict[str, Any]] = {
    contenders.OURS: {"color": "#0072B2", "linewidth": 3.0, "zorder": 4},
    contenders.BASELINE: {"color": "#D55E00", "linewidth": 2.6},
    "optax, no upcast": {"color": "#E69F00", "linewidth": 2.0},
    "jax.nn": {"color": "#009E73", "linewidth": 2.6, "linestyle": (0, (4, 2))},
    "torch": {"color": "#CC79A7", "linewidth": 2.0, "linestyle": (3, (2, 4))},
}


def dress(axes: Axes) -> None:
    """Give axes the look that all figures share."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def legend(figure: Figure, axes: Axes) -> None:
    """Name the lines of these axes above all panels."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=len(labels),
        frameon=False,
        handlelength=2.6,
    )


def origin(figure: Figure, section: dict[str, Any]) -> None:
    """Say below all panels where, with which versions and when the section was measured."""
    words = environment.in_words(section["environment"])
    figure.supxlabel(words, x=0.01, ha="left", fontsize=8, color=FAINT)
