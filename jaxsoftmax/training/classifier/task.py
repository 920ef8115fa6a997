# SPDX-License-Identifier: Apache-2.0
"""A classifier as a run trains it: epochs of steps, evaluated on held-out rows after each."""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

from jaxsoftmax.training.checkpoint import LOSS_PLOT
from jaxsoftmax.training.classifier import data, model
from jaxsoftmax.training.classifier.options import Options
from jaxsoftmax.training.classifier.plots import confusion_png
from jaxsoftmax.training.classifier.step import OPTIMIZERS, evaluate, train_epoch
from jaxsoftmax.training.mesh import DATA, VOCAB, split, whole
from jaxsoftmax.training.plots import loss_png
from jaxsoftmax.training.run import Inputs, Kind, Metrics, State

CONFUSION_PLOT = "confusion.png"


def read(options: Options, _: dict[str, str] | None) -> Inputs:
    """The examples."""
    dataset = data.load(options.data)
    options = dataclasses.replace(options, data=dataset.source)
    return Inputs(options, "--data", dataset.source, dataset.sha256, {}, dataset)


class Classifier:
    """A multilayer perceptron and its examples; the attributes are `run.Task`'s."""

    every = 1

    def __init__(self, inputs: Inputs, mesh: Mesh) -> None:
        """Splits the examples over the mesh and draws the first parameters."""
        options, dataset = inputs.options, inputs.data
        self.total = options.epochs
        self.mesh = mesh
        self.optimizer = OPTIMIZERS[options.optimizer](options.learning_rate)
        # Every random number is a function of (seed, epoch), 0 being the initialisation: a resumed
        # run needs no random state to go on as if it had never stopped, whatever the processes.
        self._key = jax.random.key(options.seed)
        sizes = (dataset.train_x.shape[1], *options.hidden, dataset.classes)
        params = model.init(jax.random.fold_in(self._key, 0), sizes)
        self.initial = State(params, self.optimizer.init(params))  # pyright: ignore[reportArgumentType] - a pytree
        self.specs = model.specs(params)
        # Kept with the parameters: without the scaling they predict nothing.
        self.constants = {"scaling": {"mean": dataset.mean, "scale": dataset.scale}}
        self._batch_size = min(options.batch_size, len(dataset.train_x))
        self._dataset = dataset
        rows = PartitionSpec(DATA)
        self._train = split((dataset.train_x, dataset.train_y), mesh, rows)
        self._test = split((dataset.test_x, dataset.test_y), mesh, rows)

    def position(self) -> dict[str, Any]:
        """Nothing: an epoch's order is a function of its number."""
        return {}

    def go_to(self, position: dict[str, Any]) -> None:
        """Nothing to do."""

    def train(
        self, state: State, units: range, tick: Callable[[int, Metrics], None]
    ) -> tuple[State, Metrics]:
        """An epoch."""
        del tick
        (epoch,) = units
        state = train_epoch(
            state,
            jax.random.fold_in(self._key, epoch),
            *self._train,
            optimizer=self.optimizer,
            batch_size=self._batch_size,
            rows=len(self._dataset.train_y),
            classes=self._dataset.classes,
            mesh=self.mesh,
        )
        return state, {}

    def evaluate(self, state: State) -> Metrics:
        """Of the rows that are trained on, and of those held out."""
        train, test = self._evaluated(state, self._train), self._evaluated(state, self._test)
        return {
            "train_loss": float(train.loss),
            "train_accuracy": float(train.accuracy),
            "test_loss": float(test.loss),
            "test_accuracy": float(test.accuracy),
        }

    def pictures(self, state: State, history: list[Metrics]) -> dict[str, Callable[[], bytes]]:
        """The metrics by epoch, and which class is taken for which."""
        labels = self._dataset.test_y
        predictions = whole(self._evaluated(state, self._test).predictions, labels)
        return {
            LOSS_PLOT: partial(loss_png, history, "epoch"),
            CONFUSION_PLOT: partial(confusion_png, labels, predictions, self._dataset.classes),
        }

    def _evaluated(self, state, examples):
        rows = self._dataset.train_y if examples is self._train else self._dataset.test_y
        return evaluate(
            state.params,
            *examples,
            rows=len(rows),
            classes=self._dataset.classes,
            mesh=self.mesh,
        )


CLASSIFIER = Kind(
    name="classifier",
    command="train",
    unit="epoch",
    options=Options,
    axes=(DATA, VOCAB),
    free=frozenset({"epochs", "data"}),
    less_memory="try a smaller --batch-size or --hidden, or fewer examples",
    metrics=frozenset({"train_loss", "train_accuracy", "test_loss", "test_accuracy"}),
    score=lambda metrics: metrics["test_accuracy"],
    files=(),
    pictures=(LOSS_PLOT, CONFUSION_PLOT),
    read=read,
    task=Classifier,
)
