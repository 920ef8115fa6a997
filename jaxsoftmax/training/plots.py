# SPDX-License-Identifier: Apache-2.0
"""The picture of a run. Figures are objects here: no global pyplot state, no window."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

TRAIN, TEST = "#4c72b0", "#dd5f32"


def loss_png(
    history: Sequence[dict[str, float]], unit: str, references: Mapping[str, float] | None = None
) -> bytes:
    """Loss and accuracy by epoch or step, training and held out; `references` are other losses."""
    done = [metrics[unit] for metrics in history]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    # A single round is a point, which a line without a marker does not show.
    style: dict[str, Any] = {"linewidth": 1.8, "marker": "o" if len(done) < 40 else None}
    style["markersize"] = 3.5
    for axes, name in ((losses, "loss"), (accuracies, "accuracy")):
        for part, label, colour in (("train", "training", TRAIN), ("test", "held out", TEST)):
            if f"{part}_{name}" not in history[0]:
                continue
            values = [metrics[f"{part}_{name}"] for metrics in history]
            last = f"{values[-1]:.2%}" if name == "accuracy" else f"{values[-1]:.4f}"
            axes.plot(done, values, color=colour, label=f"{label} {last}", **style)
        axes.set_xlabel(unit)
        axes.set_title(name.capitalize(), loc="left", fontweight="bold")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for name, loss in (references or {}).items():
        losses.axhline(loss, color="grey", linestyle="--", label=f"{name} {loss:.4f}")
    for axes in (losses, accuracies):
        axes.legend(frameon=False)
    smallest = min(min(m["train_loss"], m["test_loss"]) for m in history)
    losses.set_ylabel("mean cross-entropy (nats)")
    if smallest > 0 and not references:
        losses.set_yscale("log")
    accuracies.yaxis.set_major_formatter(PercentFormatter(1.0))
    return png(figure)


def png(figure: Figure) -> bytes:
    """As the contents of a file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
