# SPDX-License-Identifier: Apache-2.0
"""Who is measured. One module per package, with a few plain functions; the tables below name them.

A function of `LOGITS` takes `(logits, labels)` and returns one loss per row; one of `DIVERGENCES`
takes `(logits, target_logits)`; one of `HEAD` takes `(hidden, kernel, labels)` and returns the mean
loss, one of `HEAD_DIVERGENCES` takes `(hidden, kernel, target_hidden, target_kernel)`. Its
module imports its package at the top, so a package that is not installed is noticed when the module
is loaded, and only then. What JAX cannot compile comes from a module with functions of its own in
place of `bench.cases.program` and `bench.cases.losses_and_gradients`.
"""

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Sharding

from bench import cases
from bench.cases import Divergence, Dtype, Labels, Mode, Op

OURS = "jaxsoftmax"
BASELINE = "optax"


class Kernel(StrEnum):
    """What a head takes as its kernel."""

    KERNEL = "[H, V] in the dtype of hidden"
    EMBEDDING = "[V, H] in the dtype of hidden"
    FLOAT32 = "[H, V] in float32"


class Entry(NamedTuple):
    """A row of the tables below."""

    name: str
    """As printed, and as the key of its results."""
    module: str
    function: str
    half_only: bool = False
    """Left out in float32, where another row computes the same."""
    whole: bool = False
    """The function returns value and gradients itself: it is left out of a forward pass."""
    forward: bool = False
    """The function has no gradient: it is left out elsewhere than in a forward pass."""
    beside: str = OURS
    """Whose time is divided by its own."""
    jax: bool = True
    """The function can be compiled by JAX."""
    kernel: Kernel = Kernel.KERNEL


class Contender(NamedTuple):
    """An entry whose package is installed."""

    name: str
    function: Callable[..., Any]
    entry: Entry


LOGITS = {
    labels: (
        Entry(OURS, "ours", f"{labels}_labels"),
        Entry(BASELINE, "with_optax", f"{labels}_labels_upcast"),
        Entry("optax, no upcast", "with_optax", f"{labels}_labels", half_only=True),
        Entry("jax.nn", "with_jax_nn", f"{labels}_labels"),
    )
    for labels in Labels
}

# Beside those of `LOGITS`; only the eager one where time is not measured.
TORCH_LOGITS = {
    labels: (
        Entry("torch", "with_torch", f"{labels}_labels", jax=False),
        Entry("torch, compiled", "with_torch_compiled", f"{labels}_labels", jax=False),
    )
    for labels in Labels
}

# optax and torch have no JS: theirs is the mean of two divergences to the mixture.
DIVERGENCES = {
    Divergence.KL: (
        Entry(OURS, "ours", "kl_divergence"),
        Entry(BASELINE, "with_optax", "kl_divergence"),
        Entry("optax, log targets", "with_optax", "kl_divergence_with_log_targets"),
        Entry("optax, generalized", "with_optax", "generalized_kl_divergence"),
        Entry("jax.nn", "with_jax_nn", "kl_divergence"),
    ),
    Divergence.JS: (
        Entry(OURS, "ours", "js_divergence"),
        Entry(BASELINE, "with_optax", "js_divergence"),
        Entry("jax.nn", "with_jax_nn", "js_divergence"),
    ),
}

HEAD_DIVERGENCES = {
    divergence: (
        Entry(OURS, "ours", f"head_{divergence}"),
        Entry(BASELINE, "with_optax", f"head_{divergence}"),
        Entry("optax, checkpointed chunks", "with_optax", f"head_{divergence}_in_chunks"),
    )
    for divergence in Divergence
}

TORCH_DIVERGENCES = {
    divergence: (Entry("torch", "with_torch", f"{divergence}_divergence", jax=False),)
    for divergence in Divergence
}

HEAD = (
    Entry(OURS, "ours", "head"),
    Entry("jaxsoftmax, recompute", "ours", "head_recompute"),
    Entry(BASELINE, "with_optax", "head"),
    Entry("optax, checkpointed chunks", "with_optax", "head_in_chunks"),
    Entry("tokamax", "with_tokamax", "head"),
    Entry("tokamax, chunked", "with_tokamax", "head_in_chunks"),
    Entry("jax-cce", "with_jax_cce", "head"),
    Entry("torch", "with_torch", "head", jax=False),
    Entry("torch, chunked", "with_torch", "head_in_chunks", jax=False),
    Entry("three products", "products", "head", whole=True),
)

# Ours again with options: what they cost. And several labels a token, beside the plain equivalent.
OPTIONS = (
    Entry("jaxsoftmax, three options", "ours", "head_with_options"),
    Entry("jaxsoftmax, several labels", "ours", "head_of_several"),
    Entry("jax.nn, several labels", "with_jax_nn", "head_of_several"),
)

# Which classes: the 64 most probable of each token, and one drawn.
CHOICES = (
    Entry("jaxsoftmax, top-k", "ours", "top_k", forward=True),
    Entry("top-k of logits", "with_jax_nn", "top_k", forward=True, beside="jaxsoftmax, top-k"),
    Entry("jaxsoftmax, sample", "ours", "sample", forward=True),
    Entry("sample of logits", "with_jax_nn", "sample", forward=True, beside="jaxsoftmax, sample"),
)

# Those that leave out the tokens that are labelled `cases.IGNORED`, and ours without that.
WITHOUT_IGNORING = HEAD[:2]
IGNORING = (
    Entry(OURS, "ours", "head_ignoring"),
    Entry("jaxsoftmax, recompute", "ours", "head_recompute_ignoring"),
    Entry(BASELINE, "with_optax", "head_ignoring"),
)

# Ours again, where programs are only compiled: as the first of `VARIANTS`.
IGNORING_VARIANTS = (Entry("jaxsoftmax, in forward", "ours", "head_in_forward_ignoring"),)

# Ours again, where programs are only compiled: the other order, and kernels of another form.
VARIANTS = (
    Entry("jaxsoftmax, in forward", "ours", "head_in_forward"),
    Entry("jaxsoftmax, tied", "ours", "tied_head", kernel=Kernel.EMBEDDING),
    Entry("jaxsoftmax, recompute, tied", "ours", "tied_head_recompute", kernel=Kernel.EMBEDDING),
    Entry(
        "jaxsoftmax, float32 kernel",
        "ours",
        "head_of_parameters",
        half_only=True,
        kernel=Kernel.FLOAT32,
    ),
)

NOTES = {
    "jaxsoftmax, tied": "with an embedding [V, H] as the kernel",
    "jaxsoftmax, float32 kernel": "multiplied in the dtype of hidden",
    "jaxsoftmax, three options": "with label smoothing, a z-loss and a soft cap",
    "jaxsoftmax, top-k": "the 64 most probable classes, which have no gradient",
    "top-k of logits": "lax.top_k of all logits, and their log-sum-exp",
    "jaxsoftmax, sample": "a class drawn for each token, which has no gradient",
    "sample of logits": "jax.random.categorical of all logits, and its log-probability",
    "jaxsoftmax, several labels": "log-probabilities of 8 labels a token, and predictions",
    "jax.nn, several labels": "the same of log_softmax and argmax of all logits",
    BASELINE: "on the logits upcast to float32",
    "optax, no upcast": "on the logits as they come (in float32 the same)",
    "optax, checkpointed chunks": "jax.checkpoint inside lax.map over 512 tokens",
    "tokamax": "its implementation for all platforms, xla",
    "tokamax, chunked": "its chunked_xla, by 1024 tokens and 2048 classes",
    "torch": "eager, on the memory of the JAX arrays",
    "torch, compiled": "the loss through torch.compile",
    "torch, chunked": "over chunks, with the options PyTorch chooses",
    "three products": "the matrix products of the plain head and nothing else",
    "jax.nn": "log_softmax of the logits as they come, then the labels' share",
}

NOTES_OF_DIVERGENCES = {
    BASELINE: "kl_divergence of log_softmax and softmax, of the logits upcast to float32",
    "optax, log targets": "the same by kl_divergence_with_log_targets",
    "optax, generalized": "the same by generalized_kl_divergence, once convex_kl_divergence",
    "jax.nn": "p · (log p − log q) of log_softmax, of the logits as they come",
    "optax, checkpointed chunks": "jax.checkpoint inside lax.map over 512 tokens",
    "torch": "kl_div of log_softmax with log_target, eager, of the logits as they come",
}
MIXTURE = "JS of others: the mean of two such divergences to the mixture."


def names(cases: Sequence[dict[str, Any]]) -> list[str]:
    """Those who were measured in any of the cases of a section of the results file."""
    return list(dict.fromkeys(row["name"] for case in cases for row in case["contenders"]))


def explain(names: Iterable[str], op: Op = Op.LOGITS) -> str:
    """Say in one line what the names stand for that do not say it themselves."""
    notes = NOTES_OF_DIVERGENCES if op.divergence else NOTES
    found = [f"{name}: {notes[name]}" for name in dict.fromkeys(names) if name in notes]
    return "; ".join(found) + "." if found else ""


def load(entries: Sequence[Entry], dtype: Dtype) -> tuple[list[Contender], list[str]]:
    """Import what can be imported.

    Returns:
        The contenders to measure in `dtype`, in the order of the table, and a line for each entry
        that is left out because its package cannot be imported.
    """
    found, left_out = [], []
    for entry in entries:
        if entry.half_only and dtype is Dtype.FLOAT32:
            continue
        try:
            module = _module(entry)
        except ImportError as error:
            # A peer may be absent; the library under test and this package may not.
            if (error.name or "").partition(".")[0] in (OURS, "bench"):
                raise
            left_out.append(f"left out: {entry.name} ({error})")
        else:
            found.append(Contender(entry.name, getattr(module, entry.function), entry))
    return found, left_out


@contextmanager
def may_fail(contender: Contender, case: object, left_out: list[str]) -> Iterator[None]:
    """Go on where a peer cannot do a case, and add a line that says so; ours must do them all."""
    try:
        yield
    except Exception as error:
        if contender.entry.module == "ours":
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        left_out.append(f"{case}: {contender.name} fails: {reason}"[:200])


def abstract_inputs(
    contender: Contender, case: cases.Case, sharding: Sharding
) -> list[jax.ShapeDtypeStruct]:
    """Describe what the contender takes, for compiling."""
    inputs = case.abstract_inputs(sharding)
    of_kernel = {
        Kernel.EMBEDDING: lambda kernel: kernel.update(shape=kernel.shape[::-1]),
        Kernel.FLOAT32: lambda kernel: kernel.update(dtype=jnp.float32),
    }
    if contender.entry.kernel in of_kernel:
        inputs[1] = of_kernel[contender.entry.kernel](inputs[1])
    return inputs


def program(contender: Contender, mode: Mode, parameters: int) -> Callable[..., Any]:
    """Turn a contender into what is timed, as `bench.cases.program`; JAX's are not yet compiled."""
    _, function, entry = contender
    if mode is Mode.BOTH_GRADS:
        mode, parameters = Mode.VALUE_AND_GRAD, 2 * parameters
    if entry.jax:
        return cases.program(function, mode, parameters, whole=entry.whole)
    return _module(entry).program(function, mode, parameters)


def losses_and_gradients(
    contender: Contender, parameters: int, *inputs: Any
) -> tuple[Any, tuple[Any, ...]]:
    """Run a contender, as `bench.cases.losses_and_gradients`."""
    module = cases if contender.entry.jax else _module(contender.entry)
    return module.losses_and_gradients(contender.function, parameters, *inputs)


def _module(entry: Entry) -> Any:
    return importlib.import_module(f"{__name__}.{entry.module}")
