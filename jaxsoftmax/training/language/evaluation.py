# SPDX-License-Identifier: Apache-2.0
"""A trained language model on text."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from jaxsoftmax.training.errors import ProgramError
from jaxsoftmax.training.language import batches, text, tokens
from jaxsoftmax.training.language.task import (
    LANGUAGE_MODEL,
    evaluated,
    fingerprint,
    read_run,
)
from jaxsoftmax.training.language.tokens import Tokens
from jaxsoftmax.training.mesh import make_mesh
from jaxsoftmax.training.run import Metrics


class Found(NamedTuple):
    """What the summary shows."""

    step: int
    metrics: Metrics
    unigram: float
    source: str
    files: int
    labels: int
    left_out: list[str]


def of_run(run: Path, sources: tuple[str, ...], which: str) -> Found:
    """Evaluates a checkpoint on all of some text, or on all that the run held out.

    Raises:
        ProgramError: with the line to show.
    """
    trained = read_run(run, which)
    options = trained.options
    corpus = text.read(text.full_paths(sources or options.text))
    if not sources and fingerprint(corpus, trained.tokenizer_text) != trained.sha256:
        raise ProgramError(
            f"{run}: its text or tokenizer has changed since it was trained, so that what was held "
            "out is not known; give --text"
        )
    documents = corpus.documents if sources else text.split(corpus.documents)[1]
    found = Tokens(trained.tokenizer, documents, mask_comments=options.mask_comments)
    rows = options.batch_size // options.accumulate
    metrics = evaluated(
        trained.params,
        batches.held_out(found, options.context, rows, None),
        options.shape,
        make_mesh(None, LANGUAGE_MODEL.axes),
        found.text_bytes / found.counted,
    )
    return Found(
        step=trained.step,
        metrics=metrics,
        unigram=tokens.unigram_loss(trained.token_counts, np.concatenate(found.labels)),
        source=", ".join(sources or options.text) or str(text.standard_library()),
        files=len(documents),
        labels=found.counted,
        left_out=corpus.left_out,
    )
