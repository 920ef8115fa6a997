# SPDX-License-Identifier: Apache-2.0
"""Every loss with every option, over tokens that do not count beside those that do, to any order.

One batch holds every kind of token that has broken a derivative: counted ones (peaked, tied, with
classes at −inf), ignored ones, with NaN inside, masked ones, and weights of exactly 0. A finite
token of weight 0 has a derivative by the weight, its loss; to a head one that holds NaN, infinity
or a label out of range is as if it were not there. `definition` is the textbook formula,
differentiated by JAX in float64; a new loss gets all of it by one line in LOSSES.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from assertions import assert_close
from cases import generator
from heads import U

import jaxsoftmax as js
from jaxsoftmax import forward_mode

WIDTH, CLASSES, IGNORED = 3, 7, -1
KINDS = (
    "counts",
    "peaked",
    "tied",
    "ignored",
    "ignored, NaN inside",
    "nothing included",
    "example masked",
    "weight 0",
    "weight 0, peaked",
    "weight 0, NaN inside",
    "weight 0, ∞ inside",
    "weight 0, −∞ inside",
)
N = len(KINDS)
inf, nan = np.inf, np.nan
BROKEN = {"weight 0, NaN inside": nan, "weight 0, ∞ inside": inf, "weight 0, −∞ inside": -inf}


def _at(*kinds: str) -> np.ndarray:
    return np.isin(KINDS, kinds)


COUNTS = 0  # the number of a token that counts
WEIGHTS = np.where(_at("weight 0", "weight 0, peaked", *BROKEN), 0, np.linspace(0.5, 1.5, N))
LABELS = generator("orders", "labels").integers(CLASSES, size=N).astype(np.int32)
LABELS[_at("ignored", "ignored, NaN inside")] = IGNORED
LABELS[LABELS == 2] = 3  # the class that is left out
MASK = generator("orders", "mask").random((N, CLASSES)) < 0.7
MASK[np.arange(N), LABELS] = True
MASK[_at("nothing included")] = False
EXAMPLES = ~_at("example masked")
MASK &= EXAMPLES[:, None]  # one mask of classes holds both
LEFT_OUT = np.arange(CLASSES) == 2
BIAS = np.where(LEFT_OUT, -inf, 0.1 * np.arange(CLASSES)).astype(np.float32)


class Loss(NamedTuple):
    name: str
    call: Callable[..., jax.Array]  # (arrays, options, labels) -> Σ weights · loss, or its mean
    on: str  # "logits" or "hidden"
    options: tuple[str, ...]
    masks: bool = False
    ignores: bool = False  # so that nothing in an ignored token matters
    weighs: bool = False  # by itself: what is not finite in a token of weight 0 is nothing
    mean: bool = False

    def __str__(self):
        return self.name

    @property
    def broken(self) -> np.ndarray:
        """Tokens that are not there."""
        return _at(*BROKEN) & self.weighs

    @property
    def nothing(self) -> np.ndarray:
        """Tokens whose loss and gradient are exactly 0."""
        return self.broken | ((LABELS == IGNORED) & self.ignores)

    @property
    def labels(self) -> np.ndarray:
        """Out of range where broken; then label smoothing has no second derivative."""
        return np.where(self.broken & ("label_smoothing" not in self.options), CLASSES, LABELS)

    def tangents(self, x):
        """As `direction`; what is not there may not move."""
        arrays, options = direction(x)
        for name in {"hidden", "targets", "weights"} & arrays.keys():
            there = ~self.broken.reshape(N, *(arrays[name].ndim - 1) * [1])
            arrays[name] = jnp.where(there, arrays[name], 0)
        return arrays, options

    def __call__(self, a, options, labels=None):
        return self.call(a, options, self.labels if labels is None else labels)


def _integer(module):
    def call(a, options, labels):
        f = module.softmax_cross_entropy_with_integer_labels
        losses = f(a["logits"], labels, where=MASK, ignore_index=IGNORED, **options)
        return jnp.sum(losses * a["weights"])

    return call


def _dense(module):
    # A class at −inf that is not masked costs infinitely much by its target.
    mask = MASK & ~LEFT_OUT

    def call(a, options, labels):
        del labels
        f = module.softmax_cross_entropy
        losses = f(a["logits"], a["targets"], where=mask, **options)
        return jnp.sum(losses * a["weights"])

    return call


def _divergence(f):
    def call(a, options, labels):
        del labels
        losses = f(a["logits"], a["targets"], where=MASK & ~LEFT_OUT, **options)
        return jnp.sum(losses * a["weights"])

    return call


def _kernel(a, fixed):
    """As `transpose_kernel` has it."""
    return a["kernel"].T if fixed.get("transpose_kernel") else a["kernel"]


def _log_probs(f, *, several=False, **fixed):
    def call(a, options, labels):
        of = (a["hidden"], _kernel(a, fixed)) if "hidden" in a else (a["logits"],)
        bias = {"bias": a["bias"]} if "hidden" in a else {}
        counts = labels != IGNORED
        labels = jnp.where(counts, labels, 0)
        if several:  # the label twice, and one out of range that is not used
            labels = jnp.stack([labels, labels, jnp.full_like(labels, CLASSES)], axis=-1)
        out = f(*of, labels, with_entropy=True, **bias, **options, **fixed)
        if several:
            out = out._replace(log_probs=jnp.mean(out.log_probs[:, :2], axis=-1))
        fields = [jnp.where(counts, field, 0) for field in out[:3]]
        return jnp.sum((fields[2] + fields[1] - 0.5 * fields[0]) * a["weights"])

    return call


def _head(**fixed):
    def call(a, options, labels):
        losses = js.linear_softmax_cross_entropy(
            a["hidden"],
            _kernel(a, fixed),
            labels,
            bias=a["bias"],
            weights=a["weights"],
            ignore_index=IGNORED,
            **options,
            **fixed,
        )
        return jnp.sum(losses)

    return call


def _any_loss(loss_fn, **fixed):
    def call(a, options, labels):
        loss = functools.partial(loss_fn, **options)
        given = {"bias": a["bias"], "weights": a["weights"], "chunk_size": 4}
        targets = a.get("targets", labels)
        kernel = _kernel(a, fixed)
        return jnp.sum(js.linear_loss(loss, a["hidden"], kernel, targets, **given, **fixed))

    return call


TRANSFORM = ("soft_cap", "temperature")
DENSE = ("label_smoothing", "z_loss", *TRANSFORM)
INTEGER = (*DENSE, "class_weights")


def _of_head(name, *, mean=False, **fixed):
    options = INTEGER[1:] if mean else INTEGER
    return Loss(name, _head(**fixed), "hidden", options, ignores=True, weighs=True, mean=mean)


def _of_any(name, loss_fn, options, *, mean=False, **fixed):
    return Loss(name, _any_loss(loss_fn, **fixed), "hidden", options, weighs=True, mean=mean)


_of_integers = functools.partial(js.softmax_cross_entropy_with_integer_labels, ignore_index=IGNORED)
_of_targets = functools.partial(js.softmax_cross_entropy, where=~LEFT_OUT[None])
TRANSPOSED = {"transpose_kernel": True}
LOSSES = [
    Loss("integer labels", _integer(js), "logits", INTEGER, masks=True, ignores=True),
    Loss("integer labels, forward mode", _integer(forward_mode), "logits", INTEGER, True, True),
    Loss("dense labels", _dense(js), "logits", DENSE, masks=True),
    Loss("dense labels, forward mode", _dense(forward_mode), "logits", DENSE, masks=True),
    Loss("divergence", _divergence(js.softmax_kl_divergence), "logits", TRANSFORM, masks=True),
    Loss("label_log_probs", _log_probs(js.label_log_probs), "logits", TRANSFORM),
    Loss("linear_log_probs", _log_probs(js.linear_log_probs, chunk_size=3), "hidden", TRANSFORM),
    *(
        Loss(f"{f.__name__}, several", _log_probs(f, several=True, **fixed), on, TRANSFORM)
        for f, on, fixed in (
            (js.label_log_probs, "logits", {}),
            (js.linear_log_probs, "hidden", {"chunk_size": 3}),
        )
    ),
    _of_head("in_forward", chunk_size=4, reduction="sum"),
    _of_head("recompute", chunk_size=3, reduction=None),
    _of_head("in_forward, mean", chunk_size=4, mean=True),
    _of_head("recompute, mean", chunk_size=3, gradients="recompute", mean=True),
    *(
        _of_head(f"{order}, transposed", chunk_size=3, gradients=order, mean=True, **TRANSPOSED)
        for order in ("in_forward", "recompute")
    ),
    _of_any("linear_loss", _of_integers, INTEGER, reduction=None),
    _of_any("linear_loss, dense labels", _of_targets, DENSE, mean=True),
]
OPTIONS: dict[str, Any] = {
    "label_smoothing": np.float32(0.1),
    "z_loss": np.float32(0.05),
    "soft_cap": np.float32(6),
    "temperature": np.float32(1.3),
    "class_weights": generator("orders", "u").uniform(0.3, 2, CLASSES).astype(np.float32),
}


def arrays(loss: Loss) -> dict[str, np.ndarray]:
    rng = generator("orders", loss.on)
    out = {"weights": WEIGHTS.astype(np.float32)}
    if "dense" in loss.name:
        targets = rng.uniform(0.1, 1, (N, CLASSES)) * ~LEFT_OUT
        targets[loss.broken] = nan
        out["targets"] = targets.astype(np.float32)
    if loss.name == "divergence":
        out["targets"] = rng.standard_normal((N, CLASSES)).astype(np.float32)
    if loss.on == "hidden":
        hidden = rng.standard_normal((N, WIDTH))
        hidden[_at("peaked", "weight 0, peaked")] *= 6
        hidden[_at("tied")] = 0
        if loss.ignores:
            hidden[_at("ignored, NaN inside")] = nan
        for kind, inside in BROKEN.items() if loss.weighs else ():
            hidden[_at(kind), 1] = inside
        kernel = rng.standard_normal((WIDTH, CLASSES))
        return out | {
            "hidden": hidden.astype(np.float32),
            "kernel": kernel.astype(np.float32),
            "bias": BIAS,
        }
    logits = rng.standard_normal((N, CLASSES)) + BIAS
    logits[_at("peaked", "weight 0, peaked"), 1] += 9
    logits[_at("tied")] = np.where(LEFT_OUT, -inf, 0.25)
    if loss.masks:
        logits[_at("nothing included", "example masked")] = nan
    if loss.ignores:
        logits[_at("ignored, NaN inside")] = nan
    return out | {"logits": logits.astype(np.float32)}


def definition(loss: Loss, a: dict[str, Any], o: dict[str, Any]) -> jax.Array:
    """Σ weights · loss from the definitions, or its mean, in the dtype of the arrays."""
    every = "dense" in loss.name or loss.name == "divergence"
    counts = np.ones(N, bool) if every else LABELS != IGNORED
    mask = MASK if loss.masks else np.ones((N, CLASSES), bool)
    counts &= mask.any(-1) & ~loss.broken
    inside = mask & ~LEFT_OUT
    if loss.on == "hidden":
        hidden = jnp.where(counts[:, None], a["hidden"], 0)
        z = hidden @ a["kernel"] + jnp.where(LEFT_OUT, 0, a["bias"])[None]
    else:
        z = jnp.where(counts[:, None] & inside, a["logits"], 0)
    z = o["soft_cap"] * jnp.tanh(z / o["soft_cap"]) / o["temperature"]
    inside |= ~counts[:, None]
    z = jnp.where(inside, z, 0)
    e = jnp.where(inside, jnp.exp(z), 0)
    lse = jnp.log(jnp.sum(e, axis=-1))
    p = e / jnp.sum(e, axis=-1, keepdims=True)
    cost = jnp.where(inside, lse[:, None] - z, 0)
    t = np.maximum(LABELS, 0)
    own = jnp.take_along_axis(cost, t[:, None], axis=-1)[:, 0]
    u = o.get("class_weights", jnp.ones(CLASSES, z.dtype))
    if loss.name == "divergence":
        y = o["soft_cap"] * jnp.tanh(a["targets"] / o["soft_cap"]) / o["temperature"]
        log_p = y - jnp.log(jnp.sum(jnp.where(inside, jnp.exp(y), 0), -1, keepdims=True))
        losses = jnp.sum(jnp.where(inside, jnp.exp(log_p) * (log_p + cost), 0), axis=-1)
    elif "log_probs" in loss.name:
        losses = jnp.sum(p * cost, axis=-1) + lse + 0.5 * own
    else:
        spread = jnp.sum(u[None] * cost, axis=-1) / inside.sum(-1).astype(z.dtype)
        if "dense" in loss.name:
            own = jnp.sum(jnp.where(counts[:, None] & inside, a["targets"], 0) * cost, axis=-1)
        else:
            own = u[t] * own
        epsilon = o.get("label_smoothing", 0)
        losses = (1 - epsilon) * own + epsilon * spread + o["z_loss"] * lse**2
    total = jnp.sum(jnp.where(counts, losses, 0) * a["weights"])
    if loss.mean:
        total /= jnp.sum(jnp.where(counts, u[t] * a["weights"], 0))
    return total


def direction(tree):
    """A fixed tangent for each array."""
    return jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), tree)


def _inner(tree, tangents):
    return sum(jnp.sum(a * t) for a, t in zip(*map(jax.tree.leaves, (tree, tangents)), strict=True))


def value_and_gradient(f, x, tangents=direction):
    del tangents
    return jax.value_and_grad(f)(x)


def forward_over_reverse(f, x, tangents=direction):
    return jax.jvp(jax.grad(f), (x,), (tangents(x),))[1]


def reverse_over_reverse(f, x, tangents=direction):
    return jax.grad(lambda x: _inner(jax.grad(f)(x), tangents(x)))(x)


def reverse_thrice(f, x, tangents=direction):
    along = lambda x: _inner(jax.grad(f)(x), tangents(x))  # noqa: E731
    return reverse_over_reverse(along, x, tangents)


def vmapped(operation):
    """Of two batches of everything."""

    def over_batches(f, x, tangents=direction):
        both = jax.tree.map(lambda a: jnp.stack([a, a * np.asarray(0.875, a.dtype)]), x)
        return jax.vmap(lambda x: operation(f, x, tangents))(both)

    over_batches.__name__ = f"vmap of {operation.__name__}"
    return over_batches


# LLVM's share of the time: of the truth, and of derivatives whose arithmetic is that of lower ones.
FAST_TO_COMPILE = {"xla_backend_optimization_level": 0}
ORDERS = [value_and_gradient, reverse_over_reverse]
HIGHER = [forward_over_reverse, vmapped(reverse_over_reverse), vmapped(reverse_thrice)]


def inputs(loss):
    return arrays(loss), {name: OPTIONS[name] for name in loss.options}


def run(operations, f, x, loss):
    """All operations on f(arrays, options) by every floating argument at once, in one program."""
    of = lambda x: [o(lambda x: f(*x), x, loss.tangents) for o in operations]  # noqa: E731
    return jax.jit(of, compiler_options=FAST_TO_COMPILE)(x)


def truth(loss, operations):
    with jax.enable_x64(True):
        x = jax.tree.map(lambda a: np.asarray(a, np.float64), inputs(loss))
        return run(operations, functools.partial(definition, loss), x, loss)


def assert_derivatives(got, want, what=""):
    """By the temperature and the cap they are sums over the logits of their derivatives times them.

    There the largest entry of all counts.
    """
    largest = max(np.abs(e).max(initial=0) for e in jax.tree.leaves(want))
    of_logits = lambda path: getattr(path[-1], "key", None) in TRANSFORM  # noqa: E731
    floor = lambda path: max(1, largest) if of_logits(path) else 1  # noqa: E731
    assert_close(got, want, of_largest=64 * U, floor=floor, name=what)


# What other lines have by default: the engine, or the mean.
WIDE = ("recompute, mean", "linear_loss")


@pytest.mark.parametrize(
    "loss",
    [pytest.param(a, id=str(a), marks=[pytest.mark.wide] * (a.name in WIDE)) for a in LOSSES],
)
def test_tokens_that_do_not_count(loss):
    """A label out of range is NaN in its token alone, in the first derivative and in the second.

    An unused one, of weight 0, is not NaN.
    """
    x = inputs(loss)

    @jax.jit
    def compiled(x, labels):
        return [o(lambda x: loss(*x, labels), x, loss.tangents) for o in ORDERS]

    expected = compiled(x, loss.labels)
    for got, want in zip(expected, truth(loss, ORDERS), strict=True):
        assert_derivatives(got, want)
    of_arrays = expected[0][1][0]
    for name in {"hidden", "logits", "targets", "weights"} & of_arrays.keys():
        assert not np.asarray(of_arrays[name])[loss.nothing].any(), name
    if not loss.ignores or loss.mean:
        return
    spoilt = loss.labels
    spoilt[[COUNTS, KINDS.index("weight 0")]] = CLASSES
    (_, first), second = compiled(x, spoilt)
    (_, first_expected), second_expected = expected
    # A linear map cannot tell what is not used.
    unused = _at("weight 0") & ("forward mode" not in loss.name)
    kept = (np.arange(N) != COUNTS) & ~_at("weight 0")
    inside = MASK[COUNTS] if loss.masks else slice(None)
    for order, bad, good in ((1, first, first_expected), (2, second, second_expected)):
        got, want = (np.asarray(arrays[loss.on]) for arrays, _ in (bad, good))
        assert np.isnan(got[COUNTS][inside]).all()
        assert order == 2 or not got[unused].any()
        np.testing.assert_allclose(got[kept], want[kept], rtol=1e-6, atol=1e-6)


@pytest.mark.wide
@pytest.mark.parametrize("operation", HIGHER, ids=lambda o: o.__name__)
@pytest.mark.parametrize("loss", LOSSES, ids=str)
def test_tokens_that_do_not_count_to_higher_orders(loss, operation):
    assert_derivatives(run([operation], loss, inputs(loss), loss), truth(loss, [operation]))


SPOILT = ["NaN inside", "infinity inside", "label out of range", "label at −∞", "square overflows"]


def _spoilt(name, kind):
    """Two tokens, of which the second has no finite loss, or no finite derivative by an option."""
    rng = generator("orders", "spoilt")
    a = {"x": rng.standard_normal((2, CLASSES)), "labels": np.array([1, 3], np.int32)}
    if "head" in name:
        a |= {"x": rng.standard_normal((2, WIDTH)), "bias": np.zeros(CLASSES)}
        a["kernel"] = rng.standard_normal((WIDTH, CLASSES))
    if kind == "label out of range":
        a["labels"][1] = CLASSES
    elif kind == "label at −∞" and "head" in name:
        a["bias"][3] = -inf
    elif kind == "label at −∞":
        a["x"][1, 3] = -inf
    else:
        value = {"NaN inside": nan, "infinity inside": inf, "square overflows": 1e25}
        a["x"][1, 2] = value[kind]
    return {n: v if n == "labels" else v.astype(np.float32) for n, v in a.items()}


def _of_used(losses, weights):
    return jnp.sum(jnp.where(weights == 0, 0, losses))


def _used(name, a, labels, options):
    """Of the first token alone."""
    weights = np.array([1, 0], np.float32)
    if name == "integer labels":
        f = js.softmax_cross_entropy_with_integer_labels
        return _of_used(f(a["x"], labels, **options), weights)
    if name == "dense labels":
        options = {n: v for n, v in options.items() if n != "class_weights"}
        y = jax.nn.one_hot(labels, CLASSES)
        return _of_used(js.softmax_cross_entropy(a["x"], y, **options), weights)
    return js.linear_softmax_cross_entropy(
        *(a["x"], a["kernel"], labels),
        bias=a["bias"],
        weights=weights,
        reduction="sum",
        gradients=name.removesuffix(" head"),
        chunk_size=1 if name.startswith("in") else None,
        **options,
    )


@pytest.mark.parametrize("chosen", [OPTIONS, ("label_smoothing", "class_weights")], ids="+".join)
@pytest.mark.parametrize(
    "name", ["integer labels", "dense labels", "in_forward head", "recompute head"]
)
def test_a_loss_that_is_not_used_gives_nothing_an_option(name, chosen):
    """Alone and together, in the first derivative and in the second: as one that is fine."""

    @jax.jit
    def both(x, labels):
        f = lambda x: _used(name, x[0], labels, x[1])  # noqa: E731
        return [operation(f, x) for operation in ORDERS]

    options = {option: OPTIONS[option] for option in chosen}
    for kind in SPOILT:
        if name == "dense labels" and kind == "label out of range":
            continue  # a target is no number of a class
        if kind == "square overflows" and "soft_cap" in options:
            options |= {"soft_cap": np.float32(3e38)}  # which does not make what is large small
        a = _spoilt(name, kind)
        fine = a | {n: a[n][[0, 0]] for n in ("x", "labels")}
        got, want = (both((x, options), x.pop("labels")) for x in (a, fine))
        for one, other in zip(got, want, strict=True):
            assert_derivatives(one, other, kind)
