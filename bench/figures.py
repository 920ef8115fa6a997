# SPDX-License-Identifier: Apache-2.0
"""Figures of committed results: cost against vocabulary."""

from collections.abc import Iterable
from typing import Any

from matplotlib.figure import Figure

from bench import contenders
from bench.cases import Mode

# Okabe and Ito's colours, which colour-blind readers can tell apart; ours thick, and blue.
STYLES: dict[str, dict[str, Any]] = {
    contenders.OURS: {"color": "#0072b2", "marker": "o", "linewidth": 3, "zorder": 4},
    "jaxsoftmax, recompute": {
        "color": "#0072b2",
        "marker": "o",
        "linewidth": 3,
        "linestyle": (0, (2, 1)),
        "markerfacecolor": "white",
        "zorder": 4,
    },
    contenders.BASELINE: {"color": "black", "marker": "s"},
    "optax, checkpointed chunks": {"color": "black", "marker": "s", "linestyle": "--"},
    "tokamax": {"color": "#e69f00", "marker": "^"},
    "jax-cce": {"color": "#009e73", "marker": "D"},
    "torch": {"color": "#d55e00", "marker": "v"},
    "torch, chunked": {"color": "#d55e00", "marker": "v", "linestyle": "--"},
}


def speed_vocabulary(section: dict[str, Any]) -> Figure:
    """Draw time of value and gradient against the number of classes."""
    cases = [case for case in section["cases"] if case["mode"] == Mode.VALUE_AND_GRAD]
    first = cases[0]
    return _against_vocabulary(
        (
            (case["classes"], row["name"], 1e3 * row["median_s"])
            for case in cases
            for row in case["contenders"]
        ),
        f"linear head, value and gradient: {first['tokens']} tokens, width {first['hidden']}, "
        f"{first['dtype']}\n{section['environment']['device']}",
        "ms",
    )


def memory_vocabulary(section: dict[str, Any]) -> Figure:
    """Draw temporary memory of value and gradient against the number of classes."""
    first = section["cases"][0]
    return _against_vocabulary(
        (
            (case["classes"], row["name"], row["temp_bytes"] / 1e6)
            for case in section["cases"]
            for row in case["contenders"]
            if row["temp_bytes"] is not None
        ),
        f"linear head, value and gradient: {first['tokens']} tokens, width {first['hidden']}, "
        f"{first['dtype']}\ncompiled for TPU {first['target']}",
        "temporary MB",
    )


def _against_vocabulary(points: Iterable[tuple[int, str, float]], title: str, unit: str) -> Figure:
    lines: dict[str, list[tuple[int, float]]] = {}
    for classes, name, value in points:
        if name in STYLES:
            lines.setdefault(name, []).append((classes, value))
    figure = Figure(figsize=(8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    # The legend is in the order of the lines at their right ends.
    for name, found in sorted(lines.items(), key=lambda line: -max(line[1])[1]):
        axes.plot(*zip(*sorted(found), strict=True), label=name, **STYLES[name])
    axes.set(xlabel="classes", ylabel=unit)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes.grid(color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, loc="left", fontsize="medium")
    figure.legend(loc="outside right center", frameon=False)
    return figure
