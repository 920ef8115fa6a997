# SPDX-License-Identifier: Apache-2.0
"""Batches of tokens by grain: documents cut into pieces, shuffled, and packed into rows."""

from typing import Any, NamedTuple

import grain
import numpy as np

from jaxsoftmax.training.language.tokens import IGNORED, Tokens


class Batch(NamedTuple):
    """Rows of tokens, `[rows, context]` int32 each.

    Attributes:
        inputs: the tokens.
        labels: what follows each; IGNORED where it does not count, and where a row is not filled.
        segments: which of the row's pieces a token is of, from 1; 0 where the row is not filled.
        positions: of each token in its piece, from 0.
    """

    inputs: Any
    labels: Any
    segments: Any
    positions: Any


class Batches:
    """Batches without end, in an order that is a function of the seed: all processes see the same.

    Documents are cut into pieces of at most `context` tokens. Of each pass over them all pieces
    come once, in a new order, and the short ones share rows.
    """

    def __init__(self, tokens: Tokens, context: int, rows: int, seed: int) -> None:
        """Starts at the first batch."""
        pieces = grain.MapDataset.source(_pieces(tokens, context)).seed(seed).shuffle().repeat()
        self._iterator = iter(_packed(pieces.to_iter_dataset(), context, rows))

    def __next__(self) -> Batch:
        """The next batch."""
        return _batch(next(self._iterator))

    def position(self) -> dict[str, Any]:
        """Where it is, for `go_to`."""
        return self._iterator.get_state()

    def go_to(self, position: dict[str, Any]) -> None:
        """Goes on as after `position`."""
        self._iterator.set_state(position)


def held_out(tokens: Tokens, context: int, rows: int, labels: int | None) -> list[Batch]:
    """Batches that hold every piece once, or about so many labels from pieces all over the text.

    The rows that the last one lacks are not filled.
    """
    pieces = [p for p in _pieces(tokens, context) if (p["labels"] != IGNORED).any()]
    if labels is not None:
        pieces = pieces[:: max(1, tokens.counted // labels)]
    dataset = grain.MapDataset.source(pieces).to_iter_dataset()
    batches = [_batch(batch) for batch in _packed(dataset, context, rows)]
    missing = rows - len(batches[-1].inputs)
    if missing:
        nothing = Batch(inputs=0, labels=IGNORED, segments=0, positions=0)
        batches[-1] = Batch(
            *(
                np.pad(array, ((0, missing), (0, 0)), constant_values=value)
                for array, value in zip(batches[-1], nothing, strict=True)
            )
        )
    return batches


def _pieces(tokens: Tokens, context: int) -> list[dict[str, np.ndarray]]:
    return [
        {"inputs": inputs[i : i + context], "labels": labels[i : i + context]}
        for inputs, labels in zip(tokens.inputs, tokens.labels, strict=True)
        for i in range(0, len(inputs), context)
    ]


def _packed(dataset: grain.IterDataset, context: int, rows: int) -> grain.IterDataset:
    packed = grain.experimental.FirstFitPackIterDataset(
        dataset,
        length_struct={"inputs": context, "labels": context},
        num_packing_bins=rows,
    )
    return packed.batch(rows, drop_remainder=False)


def _batch(packed: dict[str, np.ndarray]) -> Batch:
    segments = packed["inputs_segment_ids"]
    return Batch(
        inputs=packed["inputs"],
        labels=np.where(segments == 0, np.int32(IGNORED), packed["labels"]),
        segments=segments,
        positions=packed["inputs_positions"],
    )
