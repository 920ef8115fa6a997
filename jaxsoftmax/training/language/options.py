# SPDX-License-Identifier: Apache-2.0
"""What a language model is trained on and how."""

import dataclasses
import enum
from typing import NamedTuple

from jaxsoftmax.training import checks
from jaxsoftmax.training.errors import ProgramError


class Size(NamedTuple):
    """Of a model."""

    width: int
    layers: int
    heads: int
    context: int


SIZES = {
    "tiny": Size(128, 4, 2, 128),
    "small": Size(512, 8, 8, 512),
    "medium": Size(1024, 16, 16, 1024),
    "large": Size(2304, 24, 18, 1024),
}


class Head(enum.StrEnum):
    """How the loss is computed from the hidden states."""

    FUSED = "fused"
    RECOMPUTE = "recompute"
    PLAIN = "plain"


class Dtype(enum.StrEnum):
    """What a model computes in; auto is float32 on a CPU, else bfloat16."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a model, and what it computes in."""

    vocab: int
    width: int
    layers: int
    heads: int
    dtype: str  # parameters are float32
    remat: bool  # whether a layer's activations are computed again on the way back


@dataclasses.dataclass(frozen=True)
class Options:
    """What to train on and how, checked: see `jaxsoftmax train-lm --help`."""

    text: tuple[str, ...]
    mask_comments: bool
    vocab: int
    width: int
    layers: int
    heads: int
    context: int
    dtype: str
    remat: bool
    head: str
    steps: int
    batch_size: int
    accumulate: int
    learning_rate: float
    warmup: int
    weight_decay: float
    clip: float
    eval_every: int
    eval_tokens: int
    seed: int

    def __post_init__(self) -> None:
        """Raise a `ProgramError` if an option is out of its range, or two do not go together."""
        for name, least in (
            ("vocab", 257),  # a token for each byte, and the end of a document
            ("width", 2),
            ("layers", 1),
            ("heads", 1),
            ("context", 2),
            ("steps", 1),
            ("batch_size", 1),
            ("accumulate", 1),
            ("warmup", 0),
            ("eval_every", 1),
            ("eval_tokens", 1),
        ):
            checks.whole_number(name, getattr(self, name), least)
        checks.one_of("dtype", self.dtype, [*Dtype])
        checks.one_of("head", self.head, [*Head])
        checks.positive("learning_rate", self.learning_rate)
        checks.positive("clip", self.clip)
        checks.positive("weight_decay", self.weight_decay, or_zero=True)
        checks.seed(self.seed)
        if self.width % (2 * self.heads):
            raise ProgramError(
                f"--width must be a multiple of twice --heads, for rotary positions; got "
                f"{self.width} and {self.heads}"
            )
        if self.batch_size % self.accumulate:
            raise ProgramError(
                f"--accumulate must divide --batch-size {self.batch_size}; got {self.accumulate}"
            )
        if self.warmup >= self.steps and self.warmup:
            raise ProgramError(
                f"--warmup must be less than --steps {self.steps}; got {self.warmup}"
            )

    @property
    def shape(self) -> Shape:
        """The sizes of the model."""
        return Shape(self.vocab, self.width, self.layers, self.heads, self.dtype, self.remat)
