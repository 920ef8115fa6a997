# SPDX-License-Identifier: Apache-2.0
"""What a classifier is trained on and how."""

import dataclasses
import enum

from jaxsoftmax.training import checks
from jaxsoftmax.training.errors import ProgramError


class Optimizer(enum.StrEnum):
    """optax's optimizers by name."""

    ADAMW = "adamw"
    ADAM = "adam"
    LION = "lion"
    SGD = "sgd"


@dataclasses.dataclass(frozen=True)
class Options:
    """What to train on and how, checked: see `jaxsoftmax train --help`."""

    data: str
    epochs: int
    batch_size: int
    learning_rate: float
    optimizer: str
    hidden: tuple[int, ...]
    seed: int

    def __post_init__(self) -> None:
        """Raise a `ProgramError` if an option is out of its range."""
        checks.whole_number("epochs", self.epochs, 1)
        checks.whole_number("batch_size", self.batch_size, 1)
        checks.positive("learning_rate", self.learning_rate)
        checks.one_of("optimizer", self.optimizer, [*Optimizer])
        if min(self.hidden, default=1) < 1:
            raise ProgramError(
                f"--hidden must be positive whole numbers; got {','.join(map(str, self.hidden))}"
            )
        checks.seed(self.seed)
