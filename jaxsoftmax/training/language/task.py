# SPDX-License-Identifier: Apache-2.0
"""A language model as a run trains it: rounds of steps, evaluated on held-out text after each."""

import dataclasses
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, PartitionSpec
from tokenizers import Tokenizer

from jaxsoftmax.training.checkpoint import LOSS_PLOT, read_file
from jaxsoftmax.training.errors import ProgramError
from jaxsoftmax.training.language import batches, model, text, tokens
from jaxsoftmax.training.language.batches import Batch, Batches
from jaxsoftmax.training.language.options import Dtype, Options, Shape
from jaxsoftmax.training.language.step import Evaluation, evaluate, step
from jaxsoftmax.training.language.text import Corpus
from jaxsoftmax.training.language.tokens import Tokens
from jaxsoftmax.training.mesh import DATA, FSDP, VOCAB, shares, split
from jaxsoftmax.training.plots import loss_png
from jaxsoftmax.training.run import (
    DivergedError,
    Inputs,
    Kind,
    Metrics,
    State,
    recorded_options,
    recorded_run,
    restored,
)

EVALUATED = ("test_loss", "test_perplexity", "test_bits_per_byte", "test_accuracy")
ROWS = (DATA, FSDP)  # the axes of the mesh that share the rows of a batch


class Text(NamedTuple):
    """What a model is trained and evaluated on."""

    left_out: list[str]
    tokenizer: Tokenizer
    train: Tokens
    held_out: Tokens


def read(options: Options, kept: dict[str, str] | None) -> Inputs:
    """The documents as tokens, by a tokenizer of their own, or that of the run to resume."""
    options = dataclasses.replace(with_dtype(options), text=text.full_paths(options.text))
    corpus = text.read(options.text)
    sides = text.split(corpus.documents)
    if kept is None:
        tokenizer = tokens.trained(sides[0], options.vocab)
        kept = {tokens.TOKENIZER: tokenizer.to_str()}
    else:
        tokenizer = tokens.parsed(kept[tokens.TOKENIZER], options.vocab, tokens.TOKENIZER)
    train, held_out = (
        Tokens(tokenizer, documents, mask_comments=options.mask_comments) for documents in sides
    )
    rows = options.batch_size
    for side, found, least in (
        ("to train on", train, options.context * rows),
        ("held out", held_out, options.context),
    ):
        if found.counted < least:
            raise ProgramError(
                f"--context {options.context} --batch-size {rows}: the text {side} has "
                f"{found.counted} tokens, a {'batch' if found is train else 'row'} {least}; choose "
                "smaller ones, or more text"
            )
    source = ", ".join(options.text) or str(text.standard_library())
    data = Text(corpus.left_out, tokenizer, train, held_out)
    return Inputs(
        options, "--text", source, fingerprint(corpus, kept[tokens.TOKENIZER]), kept, data
    )


def with_dtype(options: Options) -> Options:
    """The options for the devices here."""
    if options.dtype != Dtype.AUTO:
        return options
    here = Dtype.FLOAT32 if jax.default_backend() == "cpu" else Dtype.BFLOAT16
    return dataclasses.replace(options, dtype=here.value)


def fingerprint(corpus: Corpus, tokenizer: str) -> str:
    """Of the text and what cuts it into tokens."""
    return hashlib.sha256(f"{corpus.sha256} {tokenizer}".encode()).hexdigest()


class LanguageModel:
    """A transformer and its text; the attributes are `run.Task`'s."""

    def __init__(self, inputs: Inputs, mesh: Mesh) -> None:
        """Draws the first parameters."""
        options, data = inputs.options, inputs.data
        check_mesh(options, mesh)
        self.total, self.every = options.steps, options.eval_every
        self.mesh = mesh
        self.optimizer = optimizer(options)
        self._options = options
        with jax.set_mesh(mesh):
            params = model.drawn(options.shape, options.seed)
        self.initial = State(params, self.optimizer.init(params))
        self.specs = model.specs(params)
        # Kept with the parameters, for the loss of a model that knows nothing else.
        counts = data.train.counts(options.vocab)
        self.constants = {"token_counts": counts}
        self._batches = Batches(data.train, options.context, options.batch_size, options.seed)
        self.held_out = batches.held_out(
            data.held_out,
            options.context,
            options.batch_size // options.accumulate,
            options.eval_tokens,
        )
        labels = np.concatenate([batch.labels.reshape(-1) for batch in self.held_out])
        self.unigram = tokens.unigram_loss(counts, labels)
        # Of all held-out text: a part has about as many.
        self.bytes_per_label = data.held_out.text_bytes / data.held_out.counted

    def position(self) -> dict[str, Any]:
        """Of the next batch. All else that is random is a function of the seed."""
        return self._batches.position()

    def go_to(self, position: dict[str, Any]) -> None:
        """Goes on with that batch."""
        try:
            self._batches.go_to(position)
            next(self._batches)  # a position that is none may show only now
            self._batches.go_to(position)
        except Exception as error:  # grain's own, of any class: the position may be anything
            raise ProgramError(
                f"the checkpoint's position in the data is not one: {type(error).__name__}: {error}"
            ) from error

    def next_parts(self) -> tuple[Batch, int]:
        """The next batch, in parts and on the devices, and how many of its labels count."""
        batch = next(self._batches)
        counted = int((batch.labels != tokens.IGNORED).sum())
        parts = Batch(*(a.reshape(self._options.accumulate, -1, a.shape[-1]) for a in batch))
        return split(parts, self.mesh, PartitionSpec(None, ROWS)), counted

    def train(
        self, state: State, units: range, tick: Callable[[int, Metrics], None]
    ) -> tuple[State, Metrics]:
        """Some steps. A loss is looked at while the next step runs."""
        options, losses, counted = self._options, [], 0
        begin = time.perf_counter()
        running: list[jax.Array] = []

        def looked_at(unit: int) -> None:
            losses.append(float(running.pop(0)))
            if not math.isfinite(losses[-1]):
                raise DivergedError(unit, f"{losses[-1]}")

        for unit in units:
            parts, labels = self.next_parts()
            counted += labels
            with jax.set_mesh(self.mesh):
                state, loss = step(
                    state,
                    parts,
                    optimizer=self.optimizer,
                    shape=options.shape,
                    head=options.head,
                )
            running.append(loss)
            if len(running) > 1:
                looked_at(unit - 1)
                rate = counted / (time.perf_counter() - begin)
                if unit != units[-1]:
                    tick(unit, {"train_loss": losses[-1], "tokens_per_second": rate})
        looked_at(units[-1])
        seconds = time.perf_counter() - begin
        return state, {
            "train_loss": float(np.mean(losses)),
            "tokens_per_second": counted / seconds,
        }

    def evaluate(self, state: State) -> Metrics:
        """Of the held-out text, or a fixed part of it."""
        return evaluated(
            state.params, self.held_out, self._options.shape, self.mesh, self.bytes_per_label
        )

    def pictures(self, state: State, history: list[Metrics]) -> dict[str, Callable[[], bytes]]:
        """The metrics by step."""
        del state
        return {LOSS_PLOT: partial(loss_png, history, "step", {"unigram": self.unigram})}


class Trained(NamedTuple):
    """A checkpoint of a run."""

    step: int
    options: Options
    params: dict[str, Any]
    token_counts: np.ndarray
    tokenizer: Tokenizer
    tokenizer_text: str
    sha256: str  # the fingerprint of what it was trained on


def read_run(run: Path, which: str) -> Trained:
    """One of the run's checkpoints, checked: it may be anything.

    Raises:
        ProgramError: with the line to show.
    """
    recorded = recorded_run(LANGUAGE_MODEL, run)
    options = with_dtype(recorded_options(LANGUAGE_MODEL, run, recorded))
    path = run / tokens.TOKENIZER
    contents = read_file(path)
    tokenizer = tokens.parsed(contents, options.vocab, str(path))
    number, tree = restored(LANGUAGE_MODEL, run, which)
    tree = tree if isinstance(tree, dict) else {}
    params = jax.eval_shape(lambda: model.drawn(options.shape, 0))
    counts = jax.ShapeDtypeStruct((options.vocab,), jnp.int32)
    found, wanted = (
        jax.tree.map(lambda a: (np.shape(a), np.result_type(a)), pair)
        for pair in ([tree.get("params"), tree.get("token_counts")], [params, counts])
    )
    if found != wanted:
        raise ProgramError(
            f"{run}: the parameters of step {number} are not those of the model in config.json"
        )
    return Trained(
        step=number,
        options=options,
        params=tree["params"],
        token_counts=tree["token_counts"],
        tokenizer=tokenizer,
        tokenizer_text=contents,
        sha256=str(recorded["data_sha256"]),
    )


def check_mesh(options: Options, mesh: Mesh) -> None:
    """Raise a `ProgramError` where an axis does not divide what it splits."""
    for axes, size, what in (
        (VOCAB, options.vocab, f"--vocab {options.vocab}"),
        (FSDP, options.width, f"--width {options.width}"),
        (FSDP, model.inner_width(options.width), f"the inner width of --width {options.width}"),
        (
            ROWS,
            options.batch_size // options.accumulate,
            f"--batch-size {options.batch_size} over --accumulate {options.accumulate}",
        ),
    ):
        if size % shares(mesh, axes):
            names = " times ".join(axes if isinstance(axes, tuple) else (axes,))
            raise ProgramError(f"--mesh: {names} = {shares(mesh, axes)} must divide {what}")


def optimizer(options: Options) -> optax.GradientTransformation:
    """AdamW with warm-up and cosine decay to a tenth, after clipping; matrices decay."""
    rate = optax.warmup_cosine_decay_schedule(
        init_value=0.0 if options.warmup else options.learning_rate,
        peak_value=options.learning_rate,
        warmup_steps=options.warmup,
        decay_steps=max(options.steps, options.warmup + 1),
        end_value=options.learning_rate / 10,
    )
    return optax.chain(
        optax.clip_by_global_norm(options.clip),
        optax.adamw(
            rate,
            b2=0.95,
            weight_decay=options.weight_decay,
            mask=partial(model.by_name, lambda name, _: model.is_matrix(name)),
        ),
    )


def evaluated(
    params: Any,
    held_out: Sequence[Batch],
    shape: Shape,
    mesh: Mesh,
    bytes_per_label: float,
) -> Metrics:
    """Loss, perplexity, bits per byte and accuracy of the next token."""
    sums: list[Evaluation] = []
    for batch in held_out:
        with jax.set_mesh(mesh):
            sums.append(evaluate(params, split(batch, mesh, PartitionSpec(ROWS)), shape=shape))
    loss, right, counted = (
        float(np.sum(jnp.stack(s), dtype=float)) for s in zip(*sums, strict=True)
    )
    mean = loss / counted
    perplexity, bits = math.exp(min(mean, 700.0)), mean / math.log(2) / bytes_per_label
    return dict(zip(EVALUATED, (mean, perplexity, bits, right / counted), strict=True))


LANGUAGE_MODEL = Kind(
    name="language model",
    command="train-lm",
    unit="step",
    options=Options,
    axes=(DATA, FSDP, VOCAB),
    free=frozenset({"text"}),
    less_memory="try --accumulate, --remat, --head recompute, or a smaller --size or --batch-size",
    metrics=frozenset({"train_loss", "tokens_per_second", *EVALUATED}),
    score=lambda metrics: -metrics["test_loss"],
    files=(tokens.TOKENIZER,),
    pictures=(LOSS_PLOT,),
    read=read,
    task=LanguageModel,
)
