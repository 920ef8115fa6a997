# SPDX-License-Identifier: Apache-2.0
"""The two pictures of a run. Figures are objects here: no global pyplot state, no window."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

_TRAIN, _TEST = "#4c72b0", "#dd5f32"
# Beyond this many classes the numbers in the cells are too small to read.
_MOST_NUMBERS = 20


def loss_png(history: Sequence[dict[str, float]]) -> bytes:
    """Loss and accuracy by epoch, training and held out."""
    epochs = [metrics["epoch"] for metrics in history]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    losses, accuracies = figure.subplots(1, 2)
    # A single epoch is a point, which a line without a marker does not show.
    style: dict[str, Any] = {"linewidth": 1.8, "marker": "o" if len(epochs) < 40 else None}
    style["markersize"] = 3.5
    for axes, name in ((losses, "loss"), (accuracies, "accuracy")):
        for part, label, colour in (("train", "training", _TRAIN), ("test", "held out", _TEST)):
            values = [metrics[f"{part}_{name}"] for metrics in history]
            last = f"{values[-1]:.2%}" if name == "accuracy" else f"{values[-1]:.4f}"
            axes.plot(epochs, values, color=colour, label=f"{label} {last}", **style)
        axes.set_xlabel("epoch")
        axes.set_title(name.capitalize(), loc="left", fontweight="bold")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    smallest = min(min(m["train_loss"], m["test_loss"]) for m in history)
    losses.set_ylabel("mean cross-entropy (nats)")
    if smallest > 0:
        losses.set_yscale("log")
    accuracies.yaxis.set_major_formatter(PercentFormatter(1.0))
    return _png(figure)


def confusion_png(labels: np.ndarray, predictions: np.ndarray, classes: int) -> bytes:
    """How often each class (rows) was taken for each class (columns), on held-out rows."""
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (labels, predictions), 1)
    shares = counts / counts.sum(axis=1, keepdims=True)  # every class has a held-out row
    numbers = classes <= _MOST_NUMBERS
    side = 2.2 + 0.45 * max(5, min(classes, _MOST_NUMBERS))
    figure = Figure(figsize=(side + 0.9, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    accuracy = np.trace(counts) / counts.sum()
    axes.set_title(
        f"Held out: {np.trace(counts)} of {counts.sum()} right ({accuracy:.2%})",
        loc="left",
        fontweight="bold",
    )
    if numbers:
        axes.set_xticks(range(classes))
        axes.set_yticks(range(classes))
        for row, column in np.argwhere(counts):
            wrong = row != column
            axes.text(
                column,
                row,
                str(counts[row, column]),
                ha="center",
                va="center",
                color=_TEST if wrong and shares[row, column] < 0.5 else _ink(shares[row, column]),
                fontweight="bold" if wrong else "normal",
            )
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(image, ax=axes, shrink=0.85, format=PercentFormatter(1.0))
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue] - typed as a Spine or a call
    return _png(figure)


def _ink(share: float) -> str:
    return "white" if share > 0.5 else "black"


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()
