# SPDX-License-Identifier: Apache-2.0
"""The one list of cases, and the one list of functions that every property runs over.

A case is a number of classes and a dtype; its logits are one array whose rows are all the kinds of
row that have broken a loss somewhere, each kind twice: with its largest class and with a random
class for the label. A function that is added to `functions_of` gets every property.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from assertions import accumulation

import jaxsoftmax
from jaxsoftmax._head import sizes

# Around 16, 512 and 2048 the CPU formulation changes, and by whether blocks divide the classes, as
# they do 512, 2048 and 50257; 128 is the block where they do not. The others are awkward.
SIZES = (1, 2, 16, 17, 127, 130, 300, 512, 2048, 2049, 50257)
DTYPES = ("float32", "float64", "bfloat16", "float16")


class Case(NamedTuple):
    classes: int
    dtype: str

    def __str__(self) -> str:
        return f"{self.dtype}-{self.classes}"


CASES = [
    *(Case(classes, "float32") for classes in SIZES),
    *(Case(c, dtype) for dtype in DTYPES for c in (1, 17, 130, 2049) if dtype != "float32"),
    Case(70_000, "float16"),  # more than float16 can count
]


class Rows(NamedTuple):
    """One case's data; NumPy, so that a test makes JAX arrays under its own configuration."""

    logits: np.ndarray  # [R, V] in the case's dtype
    labels: np.ndarray  # [R] int32, never at −inf
    one_hot: np.ndarray  # [R, V] float32
    targets: np.ndarray  # [R, V] float32, non-negative, sums other than 1, 0 at −inf
    target_logits: np.ndarray  # [R, V] in the case's dtype, beside the logits, −inf where they are


def generator(*key: object) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(repr(key).encode()))


def _scale_one(rng, v):
    return rng.standard_normal(v)


def _peaked(gap):
    def make(rng, v):
        z = rng.standard_normal(v)
        z[rng.integers(v)] = z.max() + gap
        return z

    return make


def _ties_at_the_top(rng, v):
    z = rng.standard_normal(v)
    z[rng.integers(v, size=3)] = 4.0
    return z


def _minus_infinities(rng, v):
    z = rng.standard_normal(v)
    z[rng.random(v) < 0.4] = -np.inf
    z[rng.integers(v)] = 1.0
    return z


def _one_finite(rng, v):
    z = np.full(v, -np.inf)
    z[-1] = 3.0
    return z


KINDS: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "scale 1": _scale_one,
    "peaked by 17": _peaked(17),
    "peaked by 40": _peaked(40),
    "peaked at 0": lambda rng, v: (z := _peaked(25)(rng, v)) - z.max(),
    "peaked by 60": _peaked(60),
    "wide": lambda rng, v: 30 * rng.standard_normal(v),
    # Long double, the truth about many classes, has no exp of 12 000.
    "huge": lambda rng, v: (1e4 if v <= oracle.LITERAL_UP_TO else 1e3) * rng.standard_normal(v),
    "tiny": lambda rng, v: 1e-3 * rng.standard_normal(v),
    "tinier": lambda rng, v: 1e-30 * rng.standard_normal(v),
    "negative": lambda rng, v: rng.standard_normal(v) - 1e4,
    "offset": lambda rng, v: rng.standard_normal(v) + 1e4,
    "ties at the top": _ties_at_the_top,
    "ties": lambda rng, v: np.round(rng.standard_normal(v)),
    "zeros of both signs": lambda rng, v: rng.choice([0.0, -0.0], v),
    "all equal": lambda rng, v: np.full(v, -0.5),
    "some −inf": _minus_infinities,
    "all −inf but the last": _one_finite,
}


ROW_KINDS = [kind for kind in KINDS for _ in range(2)]


@cache
def rows(case: Case) -> Rows:
    rng = generator("rows", *case)
    logits = np.stack([KINDS[kind](rng, case.classes) for kind in ROW_KINDS])
    logits = logits.astype(jnp.dtype(case.dtype))
    z = logits.astype(np.float64)
    labels = z.argmax(-1)
    for i in range(1, len(z), 2):
        labels[i] = rng.choice(np.flatnonzero(np.isfinite(z[i])))
    return with_targets(logits, labels, rng)


def with_targets(logits: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> Rows:
    n, v = logits.shape
    one_hot = np.zeros((n, v), np.float32)
    one_hot[np.arange(n), labels] = 1
    targets = rng.random((n, v)) * (rng.random((n, v)) < 0.7) * rng.uniform(0.2, 3, (n, 1))
    targets = np.where(np.isneginf(logits.astype(np.float64)), 0, targets).astype(np.float32)
    # Rows between a thousandth and a few nats from the logits.
    near = logits + 10 ** rng.uniform(-3, 0.5, (n, 1)) * rng.standard_normal((n, v))
    return Rows(logits, labels.astype(np.int32), one_hot, targets, near.astype(logits.dtype))


PROMISED_SIZES = (2, 3, 10, 16, 17, 128, 300, 1000)


def promised(classes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits of scale 1, the target's above the largest of the rest by each gap; float32.

    A triple (logits, labels, gap): the own gap of each class to the target, from the rounded
    logits; for the target itself, that of the rest, at the mean that section 11 takes.
    """
    rng = generator("promised", classes)
    gaps = np.arange(0, 81, 1 if classes < 100 else 5)
    z = rng.standard_normal((len(gaps), classes))
    labels = rng.integers(classes, size=len(gaps))
    at = np.arange(len(gaps))
    z[at, labels] = -np.inf
    z[at, labels] = z.max(axis=-1) + gaps
    z = z.astype(np.float32)
    gap = z[at, labels].astype(np.float64)[:, None] - z
    assert (gap >= 0).all()
    assert (gap < 87.3).all()
    weight = np.exp(-gap)
    weight[at, labels] = 0
    gap[at, labels] = (weight * gap).sum(-1) / weight.sum(-1)
    return z, labels.astype(np.int32), gap


@dataclasses.dataclass(frozen=True, eq=False)
class Function:
    """A public function on logits [R, V], next to its truth."""

    name: str
    f: Callable  # (logits, targets, **options) -> result, of the fields of a tuple a last axis
    value: Callable  # (Truth, targets) -> oracle.Value
    gradient: Callable  # (Truth, targets, cotangent) -> oracle.Value
    targets: str | None = None  # the field of Rows that the function takes, if any
    options: str = "where"  # keywords that leave everything out
    label_gradient: Callable | None = None  # (Truth, targets, cotangent) -> oracle.Value

    def __str__(self) -> str:
        return self.name

    @property
    def accumulates(self) -> bool:
        """The result comes in the accumulation dtype, not in the logits' dtype."""
        return self.targets is not None

    @property
    def invariant(self) -> bool:
        """Under a shift of the row: its gradient sums to zero."""
        return self.name != "logsumexp" and "log_probs" not in self.name

    def of(self, case: Case) -> bool:
        """The Jacobian of many classes is large; test_divergence.py has other sizes of its own."""
        if "divergence" in self.name:
            return case.classes in {1, 17, 2049}
        return self.name != "softmax_jacobian" or case.classes <= 130


def alone(f):
    """Of what has no targets."""
    return lambda of, _, *g, **options: f(of, *g, **options)


def _at_one(f):
    """Of one-hot targets."""
    return lambda t, y, *g: f(t, y.argmax(-1), *g)


def several(y: Any, classes: int) -> Any:
    """Labels beside `y [*tokens]`, of which one is repeated: `[*tokens, 3]`."""
    of = jnp if isinstance(y, jax.Array) else np
    return of.stack([of.asarray(y), (of.asarray(y) + 1) % classes, of.asarray(y)], -1)


def stacked(log_probs):
    """The real fields of log-probabilities in a last axis, K numbers of K labels."""
    fields = [a if a.ndim > log_probs[1].ndim else a[..., None] for a in log_probs[:3]]
    return jnp.concatenate(fields, axis=-1)


def of_several(f):
    """A truth of one label for each row, as that of `several`."""
    return lambda t, y, *g: f(t, several(y, t.p.value.shape[-1]), *g)


def _of_pair(f):
    """Of two rows of logits: what is true of both."""
    return lambda t, y, *g: f(oracle.pair(t.z, y, t.accumulate), *g)


LOSS, GRADIENT = oracle.nll, oracle.nll_gradient


def functions_of(module: Any, prefix: str = "") -> list[Function]:
    """Every function on logits that `jaxsoftmax` and `forward_mode` have."""
    dense, integer = module.softmax_cross_entropy, "softmax_cross_entropy_with_integer_labels"

    def log_probs(z, labels):
        return stacked(module.label_log_probs(z, labels, with_entropy=True))

    family: list[Any] = [
        ("softmax", lambda t: t.p, oracle.softmax_gradient),
        ("log_softmax", oracle.log_probabilities, oracle.log_softmax_gradient),
        ("logsumexp", lambda t: t.lse, oracle.lse_gradient),
        ("softmax_jacobian", oracle.jacobian, oracle.jacobian_gradient),
    ]
    of_logits = [
        Function(
            name, alone(partial(getattr(module, name), axis=-1)), alone(value), alone(gradient)
        )
        for name, value, gradient in family
    ]
    of_logits[-1] = dataclasses.replace(of_logits[-1], options="")
    of_targets = [
        Function(integer, getattr(module, integer), LOSS, GRADIENT, "labels", "where ignore_index"),
        Function("one-hot labels", dense, _at_one(LOSS), _at_one(GRADIENT), "one_hot"),
        Function(
            "softmax_cross_entropy",
            dense,
            oracle.cross_entropy,
            oracle.cross_entropy_gradient,
            "targets",
            label_gradient=oracle.cross_entropy_label_gradient,
        ),
        Function(
            "softmax_kl_divergence",
            module.softmax_kl_divergence,
            _of_pair(oracle.kl_divergence),
            _of_pair(oracle.kl_gradient),
            "target_logits",
            label_gradient=_of_pair(oracle.kl_target_gradient),
        ),
        Function(
            "label_log_probs", log_probs, oracle.log_probs, oracle.log_probs_gradient, "labels", ""
        ),
        Function(
            "label_log_probs, several",
            lambda z, y: log_probs(z, several(y, z.shape[-1])),
            of_several(oracle.log_probs),
            of_several(oracle.log_probs_gradient),
            "labels",
            "",
        ),
    ]
    return [dataclasses.replace(f, name=prefix + f.name) for f in of_logits + of_targets]


FUNCTIONS = functions_of(jaxsoftmax)


def targets_of(function: Function, data: Rows) -> np.ndarray | None:
    return getattr(data, function.targets) if function.targets else None


def cotangent_of(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Non-uniform, of both signs, one row exactly 0; representable in half precision."""
    g = np.sin(np.arange(1, np.prod(shape, dtype=int) + 1)).reshape(shape)
    if g.ndim:
        g[4] = 0
    return g.astype(jnp.bfloat16).astype(jnp.dtype(dtype))


def class_rows(a: np.ndarray, axis=-1) -> np.ndarray:
    """[R, V]: one row for each example; the class axes, in the given order, as one."""
    axes = range(a.ndim) if axis is None else [int(i) % a.ndim for i in np.atleast_1d(axis)]
    kept = [i for i in range(a.ndim) if i not in axes]
    batch = [a.shape[i] for i in kept]
    return a.transpose([*kept, *axes]).reshape(int(np.prod(batch)), -1)


def x64(dtype):
    """The context in which arrays of `dtype` exist."""
    return jax.enable_x64(np.dtype(jnp.dtype(dtype)) == np.float64)


@cache
def truth_of(case: Case) -> oracle.Truth:
    return oracle.truth(rows(case).logits, accumulation(case.dtype))


# In place of the constants of `sizes`.
SMALL = {
    "SMALL_BYTES": 0,
    "LOGITS_BYTES": {"cpu": 2048, "other": 2048},
    "FEWEST": 2,
    "MULTIPLE": 3,
    "LEAST_BLOCK": 16,
    "MOST_BLOCK": 64,
    "BLOCK_BYTES": 2048,
    "LEAST_PER_DEVICE": 4,
}


def on_device(name: str) -> Iterator[str]:
    """Run what follows as on one CPU device, or as anywhere else, on however many devices.

    "one other device" and "other devices" take a TPU's forms, with sizes that cut small problems as
    the real ones cut large ones. Which formulation a function takes is decided while tracing, so
    traces must not survive.
    """
    with pytest.MonkeyPatch.context() as patch:
        if name.startswith("one "):
            patch.setattr(jax, "device_count", lambda: 1)
        if "other device" in name:
            form = lambda *args, default, cpu=None, tpu=None: (tpu or default)(*args)  # noqa: E731
            patch.setattr(jax.lax, "platform_dependent", form)
            for constant, value in SMALL.items():
                patch.setattr(sizes, constant, value)
        jax.clear_caches()
        yield name
    jax.clear_caches()
