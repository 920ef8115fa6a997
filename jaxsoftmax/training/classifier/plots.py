# SPDX-License-Identifier: Apache-2.0
"""Which classes are taken for which."""

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from jaxsoftmax.training.plots import TEST, png

# Beyond so many classes the numbers in the cells are too small to read, or the cells to see.
_MOST_NUMBERS = 20
_MOST_CELLS = 500


def confusion_png(labels: np.ndarray, predictions: np.ndarray, classes: int) -> bytes:
    """How often each class (rows) was taken for each class (columns), on held-out rows.

    Of very many classes a cell is a block of neighbours.
    """
    cells = min(classes, _MOST_CELLS)
    counts = np.zeros((cells, cells), int)
    np.add.at(counts, tuple(c.astype(int) * cells // classes for c in (labels, predictions)), 1)
    right = int((labels == predictions).sum())
    shares = counts / counts.sum(axis=1, keepdims=True)  # every class has a held-out row
    numbers = classes <= _MOST_NUMBERS
    side = 2.2 + 0.45 * max(5, min(classes, _MOST_NUMBERS))
    figure = Figure(figsize=(side + 0.9, side), layout="constrained")
    axes = figure.subplots()
    last = classes - 0.5
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, extent=(-0.5, last, last, -0.5))
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    axes.set_title(
        f"Held out: {right} of {len(labels)} right ({right / len(labels):.2%})",
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
