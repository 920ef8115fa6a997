# SPDX-License-Identifier: Apache-2.0
"""Which classes are taken for which."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxsoftmax.training.plots import TEST, png

# Beyond this many classes the numbers in the cells are too small to read.
_MOST_NUMBERS = 20


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
                color=TEST if wrong and shares[row, column] < 0.5 else _ink(shares[row, column]),
                fontweight="bold" if wrong else "normal",
            )
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    bar = figure.colorbar(image, ax=axes, shrink=0.85, format=PercentFormatter(1.0))
    bar.set_label("share of the true class")
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue] - typed as a Spine or a call
    return png(figure)


def _ink(share: float) -> str:
    return "white" if share > 0.5 else "black"
