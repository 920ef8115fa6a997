# SPDX-License-Identifier: Apache-2.0
"""What is measured: shapes, dtypes and modes, their inputs, bytes and flops."""

import itertools
import math
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax.sharding import Sharding

# Inputs smaller than this are rotated, so that no call finds its logits in a cache: larger than
# the last-level cache of nearly every CPU and GPU.
ROTATION_BYTES = 256 * 2**20
MOST_COPIES = 512
LEARNING_RATE = 0.1  # of a training step
IGNORED = -100  # the label of a token that is ignored
LEAD, LED = 20, 3  # of confident logits: what is added to the label's, in one of LED rows


class Dtype(StrEnum):
    """The dtypes logits come in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class Mode(StrEnum):
    """What a contender is asked for."""

    FORWARD = "forward"
    VALUE_AND_GRAD = "value-and-grad"
    TRAINING_STEP = "training-step"
    BOTH_GRADS = "value-and-both-grads"  # of a divergence: by the target too


class Labels(StrEnum):
    """How the targets are given: one class number per row, or one distribution per row."""

    INTEGER = "integer"
    DENSE = "dense"


class Divergence(StrEnum):
    """Of two softmaxes: Kullback and Leibler's, or Jensen and Shannon's."""

    KL = "kl"
    JS = "js"


class Op(StrEnum):
    """What is measured: a loss or divergence of given logits, or that with its linear heads."""

    LOGITS = "logits"
    LINEAR = "linear"
    DIVERGENCE = "divergence"
    LINEAR_DIVERGENCE = "linear-divergence"

    @property
    def heads(self) -> bool:
        """Whether the logits come from linear heads."""
        return self in (Op.LINEAR, Op.LINEAR_DIVERGENCE)

    @property
    def divergence(self) -> bool:
        """Whether it is of two distributions."""
        return self in (Op.DIVERGENCE, Op.LINEAR_DIVERGENCE)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """What is measured of it by default."""
        last = Mode.BOTH_GRADS if self.divergence else Mode.TRAINING_STEP
        return Mode.FORWARD, Mode.VALUE_AND_GRAD, last


class Size(StrEnum):
    """How much is measured."""

    FAST = "fast"
    REGULAR = "regular"
    LARGE = "large"

    def tokens(self, regular: int) -> int:
        """Scale a number of tokens."""
        return {Size.FAST: max(1, regular // 16), Size.REGULAR: regular, Size.LARGE: 4 * regular}[
            self
        ]

    @property
    def seconds(self) -> float:
        """The time for a case, beyond its fewest rounds."""
        return {Size.FAST: 0.0, Size.REGULAR: 20.0, Size.LARGE: 60.0}[self]


TOKENS = 4096  # of a case that the command line gives without them

# Classes and width of the head of a model of that name: one model per vocabulary.
MODELS = {
    "llama-2": (32000, 4096),  # 7B
    "gpt-2": (50257, 768),
    "llama-3": (128256, 4096),  # 8B
    "qwen-3": (151936, 4096),  # 8B
    "gpt-oss": (201088, 2880),  # 20B
    "gemma-2": (256000, 2304),  # 2B
    "gemma-3": (262144, 1152),  # 1B
}
EVERY_MODEL = "all"


class Logits(NamedTuple):
    """A loss of given logits."""

    tokens: int
    classes: int
    dtype: Dtype
    labels: Labels = Labels.INTEGER
    confident: bool = False

    parameters = 1  # leading inputs that are differentiated

    @property
    def shape(self) -> str:
        """The shape alone."""
        return f"{self.tokens}x{self.classes}"

    def __str__(self) -> str:
        """As the tables say it."""
        return f"{self.shape} {self.dtype}"

    def bytes(self, mode: Mode) -> int:
        """The bytes that an ideal program moves; `BYTES_MODEL` says it in words."""
        arrays = 2 if self.labels is Labels.DENSE else 1
        passes = arrays if mode is Mode.FORWARD else 2 * arrays + 1
        return passes * self.tokens * self.classes * jnp.dtype(self.dtype).itemsize

    def flops(self, mode: Mode) -> int:
        """No matrix product: never what limits."""
        del mode
        return 0

    def inputs(self) -> list[tuple[Any, ...]]:
        """Draw normal logits of scale 1 and random labels, as many copies as outgrow the caches.

        Confident logits are random too, but in one of `LED` rows `LEAD` is added to the label's.

        Returns:
            Pairs `(logits, labels)`: logits `[tokens, classes]` of `dtype`; labels `[tokens]`
            int32, or `[tokens, classes]` of `dtype` whose rows are distributions.
        """
        rng = np.random.default_rng(0)
        shape = self.tokens, self.classes

        def draw() -> tuple[jax.Array, jax.Array]:
            logits = rng.standard_normal(shape, np.float32)
            if self.labels is Labels.INTEGER:
                labels = rng.integers(self.classes, size=self.tokens)
                if self.confident:
                    led = np.arange(0, self.tokens, LED)
                    logits[led, labels[led]] += LEAD
                return jnp.asarray(logits, self.dtype), jnp.asarray(labels, jnp.int32)
            weights = rng.random(shape, np.float32)
            weights /= weights.sum(axis=-1, keepdims=True)
            return jnp.asarray(logits, self.dtype), jnp.asarray(weights, self.dtype)

        size = math.prod(shape) * jnp.dtype(self.dtype).itemsize
        return _copies(draw, size)

    def abstract_inputs(self, sharding: Sharding) -> list[jax.ShapeDtypeStruct]:
        """Describe what `inputs` draws of class numbers, for compiling."""
        arrays = (((self.tokens, self.classes), self.dtype), ((self.tokens,), jnp.int32))
        return [jax.ShapeDtypeStruct(*array, sharding=sharding) for array in arrays]


class Head(NamedTuple):
    """A linear head: tokens, width and classes, and the dtype of hidden and kernel."""

    tokens: int
    hidden: int
    classes: int
    dtype: Dtype

    parameters = 2

    @property
    def shape(self) -> str:
        """The shape alone."""
        return f"{self.tokens}x{self.hidden}x{self.classes}"

    def __str__(self) -> str:
        """As the tables say it."""
        return f"{self.shape} {self.dtype}"

    def bytes(self, mode: Mode) -> int:
        """The bytes an ideal program moves; `BYTES_MODEL` says it in words."""
        operands = self.hidden * (self.tokens + self.classes) * jnp.dtype(self.dtype).itemsize
        return operands if mode is Mode.FORWARD else 2 * operands

    def flops(self, mode: Mode) -> int:
        """The operations of one matrix product, or of three."""
        product = 2 * self.tokens * self.hidden * self.classes
        return product if mode is Mode.FORWARD else 3 * product

    def inputs(self) -> list[tuple[Any, ...]]:
        """Draw `(hidden, kernel, labels)` with logits of scale 1; copies as `Logits.inputs`."""
        rng = np.random.default_rng(0)

        def draw() -> tuple[jax.Array, jax.Array, jax.Array]:
            hidden = rng.standard_normal((self.tokens, self.hidden), np.float32)
            kernel = rng.standard_normal((self.hidden, self.classes), np.float32)
            labels = rng.integers(self.classes, size=self.tokens)
            return (
                jnp.asarray(hidden, self.dtype),
                jnp.asarray(kernel / math.sqrt(self.hidden), self.dtype),
                jnp.asarray(labels, jnp.int32),
            )

        # A head's intermediate results are larger than its inputs: fewer copies are enough.
        return _copies(draw, 4 * self.bytes(Mode.FORWARD))

    def abstract_inputs(self, *shardings: Sharding) -> list[jax.ShapeDtypeStruct]:
        """Describe what `inputs` draws, for compiling: in one sharding, or one for each array."""
        shardings = shardings if len(shardings) > 1 else shardings * 3
        arrays = (
            ((self.tokens, self.hidden), self.dtype),
            ((self.hidden, self.classes), self.dtype),
            ((self.tokens,), jnp.int32),
        )
        return [
            jax.ShapeDtypeStruct(*array, sharding=sharding)
            for array, sharding in zip(arrays, shardings, strict=True)
        ]


class TwoLogits(NamedTuple):
    """A divergence of given logits, of those of the target."""

    tokens: int
    classes: int
    dtype: Dtype
    divergence: Divergence

    parameters = 1  # or 2, for `Mode.BOTH_GRADS`

    @property
    def shape(self) -> str:
        """The shape, and the divergence."""
        return f"{self.tokens}x{self.classes} {self.divergence.upper()}"

    def __str__(self) -> str:
        """As the tables say it."""
        return f"{self.shape} {self.dtype}"

    def bytes(self, mode: Mode) -> int:
        """The bytes that an ideal program moves; `BYTES_MODEL` says it in words."""
        passes = {Mode.FORWARD: 2, Mode.BOTH_GRADS: 6}.get(mode, 5)
        return passes * self.tokens * self.classes * jnp.dtype(self.dtype).itemsize

    def flops(self, mode: Mode) -> int:
        """No matrix product: never what limits."""
        del mode
        return 0

    def inputs(self) -> list[tuple[Any, ...]]:
        """Draw `(logits, target_logits)`, normal numbers whose distance is normal too."""
        rng = np.random.default_rng(0)

        def draw() -> tuple[jax.Array, jax.Array]:
            target = rng.standard_normal((self.tokens, self.classes), np.float32)
            change = rng.standard_normal(target.shape, np.float32)
            return jnp.asarray(target + change, self.dtype), jnp.asarray(target, self.dtype)

        return _copies(draw, self.bytes(Mode.FORWARD))

    def abstract_inputs(self, sharding: Sharding) -> list[jax.ShapeDtypeStruct]:
        """Describe what `inputs` draws, for compiling."""
        shape = self.tokens, self.classes
        return [jax.ShapeDtypeStruct(shape, self.dtype, sharding=sharding)] * 2


class TwoHeads(NamedTuple):
    """A divergence of two linear heads of one width."""

    tokens: int
    hidden: int
    classes: int
    dtype: Dtype
    divergence: Divergence

    parameters = 2  # or 4, for `Mode.BOTH_GRADS`

    @property
    def shape(self) -> str:
        """The shape, and the divergence."""
        return f"{self.tokens}x{self.hidden}x{self.classes} {self.divergence.upper()}"

    def __str__(self) -> str:
        """As the tables say it."""
        return f"{self.shape} {self.dtype}"

    def bytes(self, mode: Mode) -> int:
        """The bytes an ideal program moves; `BYTES_MODEL` says it in words."""
        head = Head(self.tokens, self.hidden, self.classes, self.dtype).bytes(Mode.FORWARD)
        return {Mode.FORWARD: 2, Mode.BOTH_GRADS: 4}.get(mode, 3) * head

    def flops(self, mode: Mode) -> int:
        """The operations of a product of each head, and two more of each that is differentiated."""
        product = 2 * self.tokens * self.hidden * self.classes
        return {Mode.FORWARD: 2, Mode.BOTH_GRADS: 6}.get(mode, 4) * product

    def inputs(self) -> list[tuple[Any, ...]]:
        """Draw `(hidden, kernel, target_hidden, target_kernel)`, each head as `Head.inputs`."""
        rng = np.random.default_rng(0)

        def head() -> tuple[jax.Array, jax.Array]:
            hidden = rng.standard_normal((self.tokens, self.hidden), np.float32)
            kernel = rng.standard_normal((self.hidden, self.classes), np.float32)
            return (
                jnp.asarray(hidden, self.dtype),
                jnp.asarray(kernel / math.sqrt(self.hidden), self.dtype),
            )

        return _copies(lambda: (*head(), *head()), 4 * self.bytes(Mode.FORWARD))

    def abstract_inputs(self, sharding: Sharding) -> list[jax.ShapeDtypeStruct]:
        """Describe what `inputs` draws, for compiling."""
        shapes = (self.tokens, self.hidden), (self.hidden, self.classes)
        return [jax.ShapeDtypeStruct(shape, self.dtype, sharding=sharding) for shape in shapes * 2]


def several(labels: jax.Array, classes: int) -> jax.Array:
    """Labels `[tokens]` and seven more beside each: `[tokens, 8]`."""
    return (labels[:, None] + 97 * jnp.arange(8, dtype=labels.dtype)[None]) % classes


Case = Logits | Head | TwoLogits | TwoHeads


def head_of(row: dict[str, Any]) -> Head:
    """Read the head of a row of a results file."""
    return Head(row["tokens"], row["hidden"], row["classes"], Dtype(row["dtype"]))


BYTES_MODEL = {
    Labels.INTEGER: "forward reads the logits once; value-and-grad and training-step read them "
    "twice and write as much once. Class numbers and losses are not counted.",
    Labels.DENSE: "forward reads logits and labels once; value-and-grad and training-step read "
    "both twice and write the logits' size once. Losses are not counted.",
    Op.LINEAR: "forward reads hidden and kernel once, the others write as much again; flops: one "
    "matrix product forward, three with gradients.",
    Op.DIVERGENCE: "forward reads both logits once; value-and-grad reads both twice and writes the "
    "size of one, value-and-both-grads that of both. Divergences are not counted.",
    Op.LINEAR_DIVERGENCE: "forward reads hidden and kernel of both heads once, value-and-grad "
    "writes those of one, value-and-both-grads of both; flops: a matrix product of each head "
    "forward, two more of each that is differentiated.",
}

SHAPES = ((4096, 32000), (4096, 50257), (512, 256000), (65536, 1000), (16384, 10))
DTYPES = (Dtype.FLOAT32, Dtype.BFLOAT16)
HEADS = (
    Head(4096, 256, 32768, Dtype.FLOAT32),
    Head(2048, 768, 32768, Dtype.FLOAT32),
    Head(2048, 768, 50257, Dtype.FLOAT32),
    Head(2048, 512, 131072, Dtype.BFLOAT16),
)
DIVERGENCES = (
    *(
        TwoLogits(*shape, dtype, Divergence.KL)
        for shape in ((4096, 32000), (65536, 1000), (16384, 10), (1024, 10))
        for dtype in DTYPES
    ),
    *(
        TwoLogits(*shape, Dtype.FLOAT32, Divergence.JS)
        for shape in ((4096, 32000), (65536, 1000), (16384, 10))
    ),
)
TWO_HEADS = tuple(
    TwoHeads(*shape, divergence)
    for divergence in Divergence
    for shape in (
        (4096, 256, 32768, Dtype.FLOAT32),
        (2048, 768, 32768, Dtype.FLOAT32),
        (2048, 512, 65536, Dtype.BFLOAT16),
    )
)


def with_ignored(labels: jax.Array, fraction: float) -> jax.Array:
    """Set the labels of that fraction of the tokens, chosen at random, to `IGNORED`."""
    tokens = len(labels)
    chosen = np.random.default_rng(0).permutation(tokens)[: round(fraction * tokens)]
    return labels.at[chosen].set(IGNORED)


def _copies(draw: Callable[[], tuple[Any, ...]], size: int) -> list[tuple[Any, ...]]:
    copies = min(MOST_COPIES, math.ceil(ROTATION_BYTES / size))
    return jax.block_until_ready([draw() for _ in range(copies)])


def choose(
    default: Sequence[Case],
    *,
    tokens: Sequence[int] | None = None,
    hidden: Sequence[int] | None = None,
    vocab: Sequence[int] | None = None,
    dtypes: Sequence[Dtype] | None = None,
    models: Sequence[str] | None = None,
    size: Size = Size.REGULAR,
) -> list[Any]:
    """Combine all that the command line gives, or take the default cases.

    The default cases are used if none of tokens, hidden, vocab and models is given; they decide
    whether the result is of logits or of heads. `size` scales tokens that are not given.

    Raises:
        typer.BadParameter: an option is missing or does not fit the others.
    """
    if not (tokens or hidden or vocab or models):
        scaled = [case._replace(tokens=size.tokens(case.tokens)) for case in default]
        return list(
            dict.fromkeys(
                case._replace(dtype=dtype) for case in scaled for dtype in dtypes or (case.dtype,)
            )
        )
    heads = isinstance(default[0], Head | TwoHeads)
    if hidden and not heads:
        raise typer.BadParameter("logits have no width", param_hint="--hidden")
    if not (vocab or models):
        raise typer.BadParameter(
            "expected --vocab or --model with --tokens or --hidden", param_hint="--vocab"
        )
    if vocab and heads and not hidden:
        raise typer.BadParameter("expected --hidden with --vocab", param_hint="--hidden")
    names = MODELS if EVERY_MODEL in (models or ()) else (models or ())
    unknown = [name for name in names if name not in MODELS]
    if unknown:
        raise typer.BadParameter(
            f"expected {', '.join((*MODELS, EVERY_MODEL))}; got {unknown[0]!r}",
            param_hint="--model",
        )
    shapes = [MODELS[name] for name in names] + [(classes, None) for classes in vocab or ()]
    fields = [
        {"classes": classes} | ({"hidden": width} if heads else {})
        for classes, own in shapes
        for width in hidden or [own]
    ]
    kinds = [default[0]]  # of a divergence: one of each
    if isinstance(default[0], TwoLogits | TwoHeads):
        kinds = [default[0]._replace(divergence=divergence) for divergence in Divergence]
    combined = itertools.product(kinds, tokens or [size.tokens(TOKENS)], fields, dtypes or DTYPES)
    chosen = (
        kind._replace(tokens=count, dtype=dtype, **shape) for kind, count, shape, dtype in combined
    )
    return list(dict.fromkeys(chosen))


def program(
    loss: Callable[..., jax.Array], mode: Mode, parameters: int = 1, *, whole: bool = False
) -> Callable[..., Any]:
    """Turn a contender's loss into what is timed.

    Args:
        loss: maps the parameters and labels to one loss per row, or to their mean.
        mode: `forward` keeps the losses; `value-and-grad` returns the mean loss and its gradients;
            `training-step` the mean loss and the parameters after a step of gradient descent.
        parameters: how many leading arguments are differentiated.
        whole: the loss returns value and gradients itself.

    Returns:
        A function of the inputs; all of its results must be computed.
    """
    if mode is Mode.FORWARD:
        return loss
    value_and_grad = (
        loss
        if whole
        else jax.value_and_grad(lambda *inputs: jnp.mean(loss(*inputs)), tuple(range(parameters)))
    )
    if mode is Mode.VALUE_AND_GRAD:
        return value_and_grad

    def step(*inputs: Any) -> tuple[Any, tuple[Any, ...]]:
        value, gradients = value_and_grad(*inputs)
        # A peer may return float32 gradients of half-precision parameters.
        return value, tuple(
            parameter - (LEARNING_RATE * gradient).astype(parameter.dtype)
            for parameter, gradient in zip(inputs, gradients, strict=False)
        )

    return step


@partial(jax.jit, static_argnums=(0, 1))
def losses_and_gradients(
    loss: Callable[..., jax.Array], parameters: int, *inputs: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """Run a contender's loss of logits: one loss per row, and each row's gradients of its loss.

    The gradients are by the first inputs, as many as there are `parameters`.
    """
    rest = inputs[parameters:]
    losses, pullback = jax.vjp(lambda *logits: loss(*logits, *rest), *inputs[:parameters])
    return losses, pullback(jnp.ones_like(losses))
