# SPDX-License-Identifier: Apache-2.0
"""Every public function on hostile inputs: eager, jitted, differentiated, vmapped.

A line of FUNCTIONS is a function of logits (`cases.functions_of`), or a head that has exactly those
logits, with its truth. A head's hidden states are the identity, so that its product is exact, its
kernel is the logits, and d_kernel is the gradient with respect to the logits; a class at −inf is a
bias of −inf. Every mode must be within the bound of docs/forms.md section 11 of the definition
at 80 digits (tests/oracle.py), so no two modes differ by more than twice that.

A bad row is NaN, and every other row is what it is without it. Below are infinities, NaN, labels
out of range, masks, empty inputs and every kind of input array.
"""

import dataclasses
from functools import cache, partial
from typing import Any, NamedTuple

import cases
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from assertions import accumulation, assert_within
from cases import (
    ROW_KINDS,
    Case,
    Rows,
    cotangent_of,
    functions_of,
    generator,
    of_several,
    rows,
    several,
    stacked,
    targets_of,
    with_targets,
)
from oracle import Value, Wide

import jaxsoftmax as js
from jaxsoftmax import forward_mode

inf, nan = np.inf, np.nan
MIDDLE, DOUBLE = Case(17, "float32"), Case(17, "float64")
FINITE = [i for i, kind in enumerate(ROW_KINDS) if "inf" not in kind][1:]
N = len(FINITE)  # odd: no chunk divides it
BAD = FINITE.index(ROW_KINDS.index("negative"))  # the row that is spoilt has one sign
WEIGHTS = np.linspace(0.25, 1.75, N).astype(np.float32)


class Data(NamedTuple):
    rows: Rows  # [N, C]; a class left out is at −inf, and no label
    kernel: np.ndarray  # [N, C] the logits, but finite
    bias: np.ndarray  # [C] −inf for the classes left out


@cache
def data(case: Case, left_out: bool = False) -> Data:
    rng, every = generator("hostile", case.classes, left_out), rows(case)
    kernel, labels = every.logits[FINITE], every.labels[FINITE]
    out = (rng.random(case.classes) < 0.4) & left_out
    out[-1] = False
    bias = np.where(out, -inf, 0).astype(kernel.dtype)
    labels = np.where(out[labels], case.classes - 1, labels)
    return Data(with_targets(np.where(out, bias, kernel), labels, rng), kernel, bias)


@cache
def truth(case: Case, left_out: bool) -> oracle.Truth:
    return oracle.truth(data(case, left_out).rows.logits, accumulation(case.dtype))


# Truths of sums, and of blocks of the vocabulary


def merged(t):
    """Blocks of the vocabulary: each of up to 4 merges costs r another 5 u."""
    p, complement, nll = (oracle.rounded(v, t, 20) for v in (t.p, t.complement, t.nll))
    lse = Value(t.lse.value, t.lse.bound + 20 * t.u * t.nll.value[np.arange(N), t.top])
    return t._replace(p=p, complement=complement, nll=nll, lse=lse)


def weighted_sum(t, y) -> Value:
    loss, w = oracle.nll(t, y), WEIGHTS.astype(Wide)
    return Value((w * loss.value).sum(), (w * (loss.bound + N * t.u * loss.value)).sum())


def weighted_mean(t, y) -> Value:
    divisor = WEIGHTS.astype(Wide).sum()
    return oracle.rounded(Value(*(a / divisor for a in weighted_sum(t, y))), t, 2 * N)


def gradient_of_sum(t, y, g) -> Value:
    return oracle.rounded(oracle.nll_gradient(t, y, g * WEIGHTS.astype(Wide)), t, 3)


def gradient_of_mean(t, y, g) -> Value:
    return oracle.rounded(gradient_of_sum(t, y, g / WEIGHTS.astype(Wide).sum()), t, 2 * N)


# The functions


@dataclasses.dataclass(frozen=True, eq=False)
class Function(cases.Function):
    """A function of logits, or a head with its keywords."""

    fixed: dict = dataclasses.field(default_factory=dict)
    head: bool = False

    def arguments(self, case=MIDDLE, left_out=False):
        d = data(case, left_out)
        return d.kernel if self.head else d.rows.logits, targets_of(self, d.rows), d.bias

    def on_hidden(self, hidden, kernel, y, bias, **options):
        keywords = self.fixed | options
        if "weights" in keywords:
            keywords["weights"] = WEIGHTS[: len(hidden)] if hidden.ndim == 2 else WEIGHTS[0]
        return self.f(hidden, kernel, y, bias=bias, **keywords)

    def __call__(self, x, y, bias, **options):
        if self.head:
            return self.on_hidden(jnp.eye(len(x), dtype=x.dtype), x, y, bias, **options)
        return self.f(x, y, **options)


def _in_blocks(f):
    return lambda t, *args: f(merged(t), *args)


def _on_logits(module, prefix=""):
    return [Function(**vars(function)) for function in functions_of(module, prefix)]


def _of_kernel(name, f, y, value, gradient, **fixed):
    options = "ignore_index" if "cross_entropy" in name else ""
    return Function(name, f, value, gradient, y, options, fixed=fixed, head=True)


def _loss(name):
    return partial(js.linear_loss, getattr(js, name))


def _head_log_probs(*operands, **options):
    return stacked(js.linear_log_probs(*operands, with_entropy=True, **options))


HEAD = js.linear_softmax_cross_entropy
INTEGER = "softmax_cross_entropy_with_integer_labels"
CE = oracle.cross_entropy, oracle.cross_entropy_gradient
BLOCKS = [_in_blocks(f) for f in (weighted_mean, gradient_of_mean)]
ROW_BLOCKS = [_in_blocks(f) for f in (oracle.nll, oracle.nll_gradient)]
PROBS = [_in_blocks(f) for f in (oracle.log_probs, oracle.log_probs_gradient)]
MEAN = {"weights": WEIGHTS, "reduction": "mean"}
SUM = MEAN | {"reduction": "sum", "chunk_size": 4}
ROW = {"reduction": None}
NAME = "linear_softmax_cross_entropy-"
FORWARD = _on_logits(forward_mode, "forward_mode.")
FUNCTIONS = [
    *_on_logits(js),
    _of_kernel("linear_loss", _loss("softmax_cross_entropy"), "targets", *CE, chunk_size=4, **ROW),
    _of_kernel("linear_loss-sum", _loss(INTEGER), "labels", weighted_sum, gradient_of_sum, **SUM),
    _of_kernel(
        NAME + "in_forward", HEAD, "labels", weighted_mean, gradient_of_mean, chunk_size=4, **MEAN
    ),
    _of_kernel(
        NAME + "recompute", HEAD, "labels", *BLOCKS, gradients="recompute", chunk_size=5, **MEAN
    ),
    _of_kernel(NAME + "unreduced", HEAD, "labels", *ROW_BLOCKS, chunk_size=5, **ROW),
    _of_kernel(
        "linear_log_probs",
        _head_log_probs,
        "labels",
        *PROBS,
        chunk_size=5,
    ),
    _of_kernel(
        "linear_log_probs, several",
        lambda h, k, y, **options: _head_log_probs(h, k, several(y, k.shape[-1]), **options),
        "labels",
        *map(of_several, PROBS),
        chunk_size=5,
    ),
]
HEADS = [f for f in FUNCTIONS if f.head]
OF_LABELS = [f for f in FUNCTIONS if f.targets == "labels"]


def over(functions):
    return pytest.mark.parametrize("function", functions, ids=str)


def both(f, x, y, bias, g, **options):
    """Value, and gradient in x for the cotangent g."""
    value, pull = jax.vjp(lambda x: f(x, y, bias, **options), x)
    return value, pull(g)[0]


compiled = cache(lambda function: jax.jit(partial(both, function)))


def cotangent(f, *arguments):
    out = jax.eval_shape(f, *arguments)
    return cotangent_of(out.shape, out.dtype)


class Checked(NamedTuple):
    """A function on a case, and its truth there."""

    function: Function
    case: Case = MIDDLE
    left_out: bool = False

    def value(self, got):
        t, (_, y, _) = truth(self.case, self.left_out), self.function.arguments(*self[1:])
        assert_within(got, *self.function.value(t, y), name=f"value, left out: {self.left_out}")

    def gradient(self, got, g):
        t, (x, y, _) = truth(self.case, self.left_out), self.function.arguments(*self[1:])
        expected = self.function.gradient(t, y, np.asarray(g, np.float64))
        assert_within(got, *expected, name=f"gradient, left out: {self.left_out}")
        assert got.dtype == x.dtype


@pytest.mark.parametrize(
    ("function", "case"),
    [
        *((f, c) for f in HEADS for c in (Case(1, "float32"), MIDDLE, DOUBLE)),
        *((f, MIDDLE) for f in FORWARD),
    ],
    ids=str,
)
def test_jit_gives_the_definition_and_its_gradient(function, case):
    """Functions of logits have more cases in `test_values`, heads others in `test_linear`."""
    with jax.enable_x64(case.dtype == "float64"):
        for left_out in (False, True):
            given = function.arguments(case, left_out)
            g = cotangent(function, *given)
            value, gradient = compiled(function)(*given, g)
            Checked(function, case, left_out).value(value)
            Checked(function, case, left_out).gradient(gradient, g)


@pytest.mark.wide
@over(FUNCTIONS)
def test_eager_and_vmap_give_it_too(function):
    given = function.arguments()
    g = cotangent(function, *given)
    Checked(function).value(function(*given))
    pair = jax.tree.map(lambda *a: np.stack(a), given, function.arguments(left_out=True))
    mapped = jax.jit(jax.vmap(partial(both, function), in_axes=(0, 0, 0, None)))
    for left_out, value, gradient in zip((False, True), *mapped(*pair, g), strict=True):
        Checked(function, MIDDLE, left_out).value(value)
        Checked(function, MIDDLE, left_out).gradient(gradient, g)


@over(HEADS)
def test_gradients_of_hidden_and_bias(function):
    """dh_ij = Σ_k dz_ik w_jk and db_k = Σ_i dz_ik: the error of dz, and a rounding each term."""
    kernel, y, bias = function.arguments()
    hidden, g = np.eye(N, dtype=np.float32), cotangent(function, kernel, y, bias)

    @jax.jit
    def run(hidden, bias):
        return jax.vjp(lambda h, b: function.on_hidden(h, kernel, y, b), hidden, bias)[1](g)

    t, wide = truth(MIDDLE, False), kernel.astype(Wide)
    dz, bound = function.gradient(t, y, g.astype(np.float64))
    bound = bound + (MIDDLE.classes + 1) * t.u * np.abs(dz)
    d_hidden, d_bias = run(hidden, bias)
    underflow = t.tiny * MIDDLE.classes
    assert_within(d_hidden, dz @ wide.T, bound @ np.abs(wide).T + underflow, "hidden")
    assert_within(d_bias, dz.sum(0), bound.sum(0), "bias")


@over(OF_LABELS)
def test_a_label_left_out_costs_infinity_and_has_the_gradient_of_any_other(function):
    x, y, bias = function.arguments(left_out=True)
    y = np.where(np.arange(N) % 3 == 0, np.argmax(bias == -inf), y).astype(np.int32)
    g, t = cotangent(function, x, y, bias), truth(MIDDLE, True)
    value, gradient = compiled(function)(x, y, bias, g)
    assert_within(gradient, *function.gradient(t, y, np.asarray(g, np.float64)))
    if value.ndim:
        assert_within(value, *function.value(t, y))
    else:
        assert value == inf


def _spoilt(function):
    """(f, x, the other arguments, each x with one bad row); of a head x is the hidden states."""
    x, y, bias = function.arguments()
    row = (np.arange(N) == BAD)[:, None]
    if function.head:
        hidden = np.eye(N, dtype=x.dtype)
        bad = [np.where(row & (hidden == 1), v, hidden) for v in (nan, inf, -inf)]
        return (lambda h, y, bias: function.on_hidden(h, x, y, bias)), hidden, (y, bias), bad
    rows = (np.r_[nan, x[BAD, 1:]], np.r_[x[BAD, 1:], inf], np.full(x.shape[1], -inf))
    return function, x, (y, bias), [np.where(row, a, x) for a in rows]


@over(FUNCTIONS + FORWARD)
def test_a_bad_row_leaves_every_other_bit_for_bit(function):
    f, good, rest, bad = _spoilt(function)
    xs = np.stack([good, *bad]).astype(good.dtype)
    g = cotangent(f, good, *rest)
    run = partial(both, f)
    if function.head:
        mapped = jax.jit(jax.vmap(run, in_axes=(0, None, None, None)))
        results = zip(*mapped(xs, *rest, g), strict=True)
    else:
        results = [compiled(function)(x, *rest, g) for x in xs]
    (value, gradient), *others = jax.tree.map(np.asarray, list(results))
    kept = np.arange(N) != BAD
    assert np.isfinite(value).all()
    assert np.isfinite(gradient).all()
    for bad_value, bad_gradient in others:
        np.testing.assert_array_equal(bad_gradient[kept], gradient[kept])
        assert np.isnan(bad_gradient[BAD]).any()
        if value.ndim:
            np.testing.assert_array_equal(bad_value[kept], value[kept])
        assert not np.isfinite(bad_value[BAD] if value.ndim else bad_value).all()


# The two losses and the softmax family on rows of numbers: sizes around the thresholds of the CPU
# formulation, where every NaN, infinity and label has its own way to get lost.

SIZES = (3, 40, 2050)
B, SPOILT = 5, np.arange(5) == 2
integer, dense = js.softmax_cross_entropy_with_integer_labels, js.softmax_cross_entropy


def _of_one_hot(z, labels, **options):
    return dense(z, jax.nn.one_hot(labels, z.shape[-1]), **options)


LOSSES = {"integer": integer, "dense": _of_one_hot}
FAMILY = {
    "softmax": lambda z, _: js.softmax(z),
    "log_softmax": lambda z, _: js.log_softmax(z),
    "logsumexp": lambda z, _: js.logsumexp(z, axis=-1),
}
every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)


def normal(classes: int) -> np.ndarray:
    return generator("edges", classes).standard_normal((B, classes)).astype(np.float32)


def of_sum(f):
    """(value, gradient of the sum by the first argument), in one program."""

    @jax.jit
    def run(x, *rest):
        value, pull = jax.vjp(lambda x: f(x, *rest), x)
        return value, pull(jnp.ones_like(value))[0]

    return lambda *arguments: jax.tree.map(np.asarray, run(*arguments))


BAD_ROWS = {
    "NaN first": lambda c: np.r_[nan, np.zeros(c - 1)],
    "NaN last": lambda c: np.r_[np.zeros(c - 1), nan],
    "+inf first": lambda c: np.r_[inf, np.zeros(c - 1)],
    "+inf last": lambda c: np.r_[np.zeros(c - 1), inf],
    "two +inf": lambda c: np.r_[inf, np.zeros(c - 2), inf],
    "+inf and −inf": lambda c: np.r_[inf, np.zeros(c - 2), -inf],
    "NaN and −inf": lambda c: np.r_[nan, np.full(c - 1, -inf)],
    "NaN and +inf": lambda c: np.r_[nan, np.zeros(c - 2), inf],
    "all NaN": lambda c: np.full(c, nan),
    "all +inf": lambda c: np.full(c, inf),
    "all −inf": lambda c: np.full(c, -inf),
}


@pytest.mark.parametrize("classes", SIZES)
@pytest.mark.parametrize("name", LOSSES | FAMILY)
def test_every_kind_of_bad_row_stays_in_it(device, name, classes):
    """Of a loss all is NaN there; the softmax family has jax.nn's values."""
    z, run = normal(classes), of_sum((LOSSES | FAMILY)[name])
    primal, theirs = (
        jax.jit((LOSSES | FAMILY)[name]),
        jax.jit(lambda z: getattr(jax.nn, name)(z, axis=-1)),
    )
    failed = []
    for label in {0, 1, classes - 1} if name in LOSSES else {0}:
        labels = np.array([0, 1, label, 2, 0])
        good = run(z, labels)
        assert all(np.isfinite(a).all() for a in good)
        for kind, row in BAD_ROWS.items():
            bad = np.where(SPOILT[:, None], row(classes), z).astype(np.float32)
            value, gradient = run(bad, labels)
            what = f"{kind}, label {label}"
            for got, want in zip((value, gradient), good, strict=True):
                np.testing.assert_array_equal(got[~SPOILT], want[~SPOILT], err_msg=what)
            assert np.isnan(gradient[SPOILT]).any(), what
            if name in FAMILY:
                for got in (value, primal(bad, labels)):
                    np.testing.assert_array_equal(got[2], theirs(bad)[2], err_msg=what)
            elif not np.isnan(value[2]):
                failed.append(f"{what}: loss {value[2]}")
            elif not np.isnan(gradient[2]).all():
                failed.append(f"{what}: gradient {gradient[2][:3]} … {gradient[2][-1]}")
    assert not failed, "\n".join(failed)


# −inf: a class that cannot be


def test_a_target_at_minus_infinity_costs_infinity():
    z = np.array([[0, -inf, 1], [0, 2, 1]], np.float32)
    for f in LOSSES.values():
        value, gradient = of_sum(f)(z, np.array([1, 1]))
        assert value[0] == inf
        assert np.isfinite(value[1])
        # ŷ − y is still what it is.
        p = 1 / (1 + np.e)
        np.testing.assert_allclose(gradient[0], [p, -1, 1 - p], rtol=1e-6)
    # Any positive weight does, and none does not.
    y = np.array([[0.5, 1e-30, 0.5], [0, 0, 1]], np.float32)
    assert dense(z, y)[0] == inf
    y[0, 1] = 0
    assert np.isfinite(dense(z, y)).all()


def test_an_unused_loss_has_no_gradient_by_labels_at_minus_infinity():
    z = np.array([[0, -inf, 1], [2, 0, 1]], np.float32)
    y = np.array([[0, 0, 1], [0.5, 0.5, 0]], np.float32)
    d = jax.grad(lambda y: dense(z, y)[1])(y)
    np.testing.assert_array_equal(d[0], 0)
    used = np.asarray(jax.grad(lambda y: dense(z, y).sum())(y))
    np.testing.assert_array_equal(used[1], d[1])
    assert used[0, 1] == inf


@pytest.mark.parametrize("value", [-3e38, 3e38])
def test_logits_at_the_end_of_float32(value):
    z = np.array([[value, 0, value], [0, value, -value]], np.float32)
    for f in LOSSES.values():
        loss, gradient = of_sum(f)(z, np.array([1, 1]))
        assert not np.isnan(loss).any()
        assert np.isfinite(gradient).all()
        np.testing.assert_allclose(gradient.sum(-1), 0, atol=1e-6)


# Labels out of range, and of any dtype

INTEGERS = ("int8", "uint8", "int16", "int32", "uint32", "int64", "uint64")


@pytest.mark.parametrize("classes", [3, 300])
@pytest.mark.parametrize("dtype", INTEGERS)
def test_a_label_out_of_range_is_nan_in_its_row_alone(device, classes, dtype):
    """Whatever its dtype can hold: nothing wraps, also where C is more than the dtype's range."""
    z, run = normal(classes), of_sum(integer)
    info = np.iinfo(dtype)
    wrong = [-1, -100, classes, -classes, info.min, info.max, 2**32, 2**32 + 1, -(2**32)]
    wrong = sorted({w for w in wrong if info.min <= w <= info.max and not 0 <= w < classes})
    labels = (np.arange(B) % min(classes, info.max)).astype(dtype)

    def with_label(label):
        labels[SPOILT] = label
        return run(z, labels)

    with jax.enable_x64("64" in dtype):
        good = with_label(0)
        assert all(np.isfinite(a).all() for a in good)
        for label in wrong:
            for got, want in zip(with_label(label), good, strict=True):
                assert np.isnan(got[SPOILT]).all(), label
                np.testing.assert_array_equal(got[~SPOILT], want[~SPOILT])
        for label in {0, 1, 2, min(classes - 1, info.max)}:
            value = with_label(label)[0]
            np.testing.assert_array_equal(value, integer(z, labels.astype(np.int32)))


OF_EACH = ("int8", "uint8", "int16", "uint32", "int64", "uint64", "int8", "int64", "int16")


@pytest.mark.parametrize(("function", "dtype"), [*zip(OF_LABELS, OF_EACH, strict=True)], ids=str)
def test_labels_of_any_integer_dtype(function, dtype):
    """One for each function; all for the cross-entropy on logits above."""
    x, y, bias = function.arguments()
    g = cotangent(function, x, y, bias)
    expected = compiled(function)(x, y, bias, g)
    with jax.enable_x64(dtype == "uint64"):
        got = compiled(function)(x, y.astype(dtype), bias, g)
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_int64_labels_outside_int32_without_x64():
    """JAX would cut them to 32 bits, and 2³² to class 0."""
    z, labels = np.eye(2, dtype=np.float32), np.array([0, 1], np.int64)
    np.testing.assert_allclose(integer(z, labels), np.log1p(np.exp(-1)), rtol=1e-6)
    said = r"labels must fit u?int32, which JAX makes of u?in"
    for wide in (labels + 2**32, labels - 2**31 - 1, labels.astype(np.uint64) + np.uint64(2**63)):
        for ignore_index in (None, int(wide[0])):
            with pytest.raises(ValueError, match=said):
                integer(z, wide, ignore_index=ignore_index)


@pytest.mark.parametrize("label", [-1, -100, 4])
def test_an_unused_loss_has_gradient_zero_whatever_its_label(device, label):
    """A caller who selects away a bad token gets no NaN; a cotangent of exactly 0 is no use."""
    z, labels = normal(4), np.where(np.arange(B) == 1, label, np.array([0, 0, 1, 2, 3]))
    used = labels != label
    gradient = np.asarray(jax.grad(lambda z: jnp.sum(jnp.where(used, integer(z, labels), 0)))(z))
    assert not gradient[~used].any()
    expected = jax.grad(lambda z: integer(z, np.clip(labels, 0, 3))[used].sum())(z)
    np.testing.assert_array_equal(gradient, expected)


@over([f for f in FUNCTIONS + FORWARD if f.targets == "labels"])
def test_integer_labels_have_float0_cotangents(function):
    x, y, bias = function.arguments()
    g = cotangent(function, x, y, bias)

    @jax.jit
    def run(x, y):
        d, d_labels, _ = jax.vjp(function, x, y, bias)[1](g)
        total = lambda x, y: jnp.sum(function(x, y, bias) * g)  # noqa: E731
        alone = jax.grad(total, 1, allow_int=True)(x, y)
        beside = jax.grad(total, (0, 1), allow_int=True)(x, y)[1]
        for zero in (d_labels, alone, beside):
            assert (zero.shape, zero.dtype) == (y.shape, jax.dtypes.float0)
        return d

    Checked(function).gradient(run(x, y), g)


# Masks


@over([f for f in FUNCTIONS + FORWARD if f.options])
def test_everything_left_out_is_exactly_zero_whatever_is_in_it(function):
    x, y, bias = function.arguments()
    g = cotangent(function, x, y, bias)
    nothing = -inf if "log" in function.name else 0
    for option in function.options.split():
        mask = np.zeros(x.shape, bool) if option == "where" else -100
        labels = y if option == "where" else np.full(N, -100, np.int32)
        run = jax.jit(partial(both, function, **{option: mask}))
        for inside in (x, np.full_like(x, nan)):
            value, gradient = run(inside, labels, bias, g)
            np.testing.assert_array_equal(value, np.full(value.shape, nothing))
            np.testing.assert_array_equal(gradient, np.zeros_like(x))


@pytest.mark.parametrize("shape", [(1, 1), (B,)])
def test_masked_dense_labels_have_gradient_zero(shape):
    mask = np.zeros(shape, bool)
    for f in (
        lambda y: dense(normal(4), y, where=mask),
        lambda z: dense(z, jnp.ones_like(z), where=mask),
    ):
        assert not any(a.any() for a in of_sum(f)(np.ones((B, 4), np.float32)))


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz"])
def test_masks_of_logits_in_8_bits(name):
    """Some of these dtypes have no −inf."""
    z, labels = jnp.asarray(np.round(normal(5)), name), np.zeros(B, int)
    where = np.arange(5) != 2
    got, d = of_sum(partial(integer, where=where[None]))(z, labels)
    want, d_want = of_sum(integer)(z[:, where], labels)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(d[:, where], d_want)
    assert d.dtype == z.dtype
    assert not d[:, 2].any()
    p = js.softmax(z, where=where[None])
    assert p.dtype == z.dtype
    np.testing.assert_array_equal(p[:, where], js.softmax(z[:, where]))


# Sizes


def _tokens(function, n, dtype: type = np.float32, width=3):
    """(f, its arguments) of so many tokens; of a head, tokens that are all ones."""
    x, y, bias = function.arguments()
    y = None if y is None else y[:n]
    if not function.head:
        return function, (x[:n].astype(dtype), y, bias)
    return function.on_hidden, (np.ones((n, width), np.float32), x[:width].astype(dtype), y, bias)


@over(FUNCTIONS + FORWARD)
def test_zero_tokens(function):
    """The shape and dtype of one token's result, without the token; no gradient."""
    one = jax.eval_shape(_tokens(function, 1)[0], *_tokens(function, 1)[1])
    f, none = _tokens(function, 0)

    @jax.jit
    def run(*none):
        value, pull = jax.vjp(f, *none)
        return value, [d for d in pull(jnp.ones_like(value)) if getattr(d, "size", 0)]

    value, gradients = run(*none)
    assert (value.shape, value.dtype) == ((0, *one.shape[1:]) if one.shape else (), one.dtype)
    assert not np.any(value)
    assert len(gradients) == (2 if function.head else 1)
    assert not any(np.any(d) for d in gradients)


@pytest.mark.parametrize("batch", [(0,), (2, 0), (0, 2)], ids=str)
def test_zero_tokens_of_any_number_of_classes(device, batch):
    labels, functions = np.zeros(batch, np.int32), LOSSES | FAMILY

    @jax.jit
    def run(z):
        pairs = [jax.vjp(lambda z, f=f: f(z, labels), z) for f in functions.values()]
        return [(value, pull(value)[0]) for value, pull in pairs]

    for classes in (1, 3, 300, 4096):
        z = np.zeros((*batch, classes), np.float32)
        for name, (value, gradient) in zip(functions, run(z), strict=True):
            assert value.shape == (z.shape if "softmax" in name else batch), name
            assert gradient.shape == z.shape, name


@over(HEADS)
def test_zero_tokens_have_the_dtype_of_any_number(function):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        for n in (0, 1):
            f, given = _tokens(function, n, np.float64)
            assert jax.eval_shape(f, *given).dtype == np.float64


@over(HEADS)
def test_hidden_states_of_width_zero_leave_the_bias(function):
    hidden, kernel, y = _tokens(function, N, width=0)[1][:3]
    bias = data(MIDDLE).kernel[0]
    t = oracle.truth(np.broadcast_to(bias, (N, MIDDLE.classes)), np.float32)
    assert_within(function.on_hidden(hidden, kernel, y, bias), *function.value(t, y))


def test_one_class():
    z, labels = np.array([[3.0], [-1e4], [0]], np.float32), np.zeros(3, int)
    for name, f in (LOSSES | FAMILY).items():
        value, gradient = of_sum(f)(z, labels)
        expected = {"softmax": np.ones_like(z), "logsumexp": z[:, 0]}.get(name, 0)
        np.testing.assert_array_equal(value, np.broadcast_to(expected, value.shape))
        assert (gradient == (name == "logsumexp")).all()
    assert not np.asarray(js.softmax_jacobian(z)).any()


@pytest.mark.parametrize("axis", [-1, 0, (0, 1), (1, 2), None], ids=str)
def test_zero_classes_are_as_in_jax_nn_and_optax(axis):
    z = np.zeros((0, 3) if axis == 0 else (2, 0) if axis in (-1, None) else (2, 0, 3), np.float32)
    options: Any = {"label_smoothing": 0.1, "z_loss": 0.1, "soft_cap": 3.0, "temperature": 2.0}
    for module in (js, forward_mode):
        for name in ("softmax", "log_softmax"):
            expected = getattr(jax.nn, name)(z, axis)
            for where in (None, np.ones(z.shape, bool)):
                f = partial(getattr(module, name), axis=axis, where=where)
                value, gradient = of_sum(f)(z)
                assert value.shape == expected.shape == gradient.shape
                assert value.dtype == expected.dtype
        f = partial(module.softmax_cross_entropy, labels=z, axis=axis, **options)
        value, gradient = of_sum(f)(z)
        np.testing.assert_array_equal(value, optax.losses.softmax_cross_entropy(z, z, axis))
        assert gradient.shape == z.shape
    if isinstance(axis, int):
        classes_last = np.moveaxis(z, axis, -1).shape
        assert js.softmax_jacobian(z, axis).shape == (*classes_last, 0)


@pytest.mark.parametrize("module", [js, forward_mode])
def test_no_axes_are_one_class(module):
    x = normal(4)
    mask, y = x > 0, np.zeros(x.shape, np.int32)
    for name in FAMILY:
        for where in (None, mask):
            ours, theirs = (
                of_sum(partial(getattr(m, name), axis=(), where=where))(x) for m in (module, jax.nn)
            )
            np.testing.assert_array_equal(ours[0], theirs[0])
            np.testing.assert_array_equal(ours[1], np.nan_to_num(theirs[1]))
    for f in (
        lambda x: module.softmax_cross_entropy_with_integer_labels(x, y, axis=(), where=mask),
        lambda x: module.softmax_cross_entropy(x, mask, axis=()),
        lambda x: module.label_log_probs(x, y, axis=()).log_probs,
    ):
        value, gradient = of_sum(f)(x)
        assert value.shape == x.shape
        assert not value.any()
        assert not gradient.any()


def test_more_classes_than_int32_counts(device):
    """Shapes and programs; nobody here has the memory for the numbers."""
    z = jax.ShapeDtypeStruct((70_001, 32_003), jnp.bfloat16)
    for f in (
        js.logsumexp,
        lambda z: js.softmax(z, None).astype(jnp.float32).sum(),
        lambda z: js.log_softmax(z, None).astype(jnp.float32).sum(),
        lambda z: js.logsumexp(z, b=z),
        lambda z: js.softmax_cross_entropy(z, z, None),
    ):
        assert jax.eval_shape(jax.grad(f, allow_int=True), z).shape == z.shape
        jax.jit(f).lower(z)
    with pytest.raises(ValueError, match=r"at most 2147483647 classes.*2240242003 along axis"):
        jax.eval_shape(lambda z: integer(z, 0, (0, 1)), z)


# What comes in


@over([f for f in FUNCTIONS if f.targets and "weights" not in f.fixed])
def test_a_scalar_label_and_logits_without_a_batch(function):
    x, y, bias = function.arguments()
    f = function.on_hidden if function.head else function
    one = (np.eye(1, N, dtype=np.float32)[0], x) if function.head else (x[0],)
    expected = Value(*(a[0] for a in function.value(truth(MIDDLE, False), y)))
    kinds = [int] if function.targets == "labels" else [np.asarray]
    if function.targets == "labels" and not function.head:
        kinds += [np.int8, np.uint64, jnp.asarray]
    for kind in kinds:
        got = f(*one, kind(y[0]), bias)
        assert_within(got, *expected)
        assert got.dtype == x.dtype


def test_a_scalar_is_a_row_of_no_axes():
    """As in jax.nn."""
    assert js.logsumexp(2.0) == jax.nn.logsumexp(2.0)
    assert js.logsumexp(np.float32(2)) == 2
    assert js.softmax(np.zeros(2, np.float32), axis=None).tolist() == [0.5, 0.5]


def _strided(a):
    """Neither contiguous nor forward nor writeable."""
    wide = np.zeros([3 * size for size in a.shape], a.dtype)
    view = wide[(slice(None, None, -3),) * a.ndim]
    view[:] = a
    view.setflags(write=False)
    return view


@over(FUNCTIONS)
def test_numpy_arrays_of_any_layout(function):
    x, y, bias = function.arguments()
    for layout in (_strided,) if function.head else (_strided, np.asfortranarray):
        Checked(function).value(function(*jax.tree.map(layout, (x, y, bias))))


@pytest.mark.parametrize("name", FAMILY)
@pytest.mark.parametrize("dtype", ["int32", "int8", "bool", "uint8"])
def test_integers_count_as_float32(name, dtype):
    x = np.array([[0, 1, 1], [1, 0, 0]], dtype)
    got = getattr(js, name)(x, axis=-1)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, getattr(js, name)(x.astype(np.float32), axis=-1))


@over(FUNCTIONS)
@pytest.mark.parametrize("x64", [False, True])
def test_weakly_typed_logits_have_the_dtypes_of_others(function, x64):
    _, y, bias = function.arguments()
    with jax.enable_x64(x64):
        weak = jnp.broadcast_to(jnp.asarray(0.5), (N, MIDDLE.classes))
        assert weak.aval.weak_type
        g = cotangent(function, np.asarray(weak), y, bias)
        run = partial(both, function)
        kinds = [jax.eval_shape(run, x, y, bias, g) for x in (weak, np.asarray(weak))]
        assert [a.dtype for a in kinds[0]] == [a.dtype for a in kinds[1]]


def test_weak_types():
    """A weakly typed array alone is float32; next to a half-precision one it changes nothing."""
    weak = jnp.asarray([1.0, 2.0]) * 1.0
    scalars = jnp.stack([jnp.asarray(1.0), jnp.asarray(2.0)])
    assert integer(weak, 0).dtype == integer(scalars, 0).dtype == jnp.float32
    full = jnp.full((3,), 2.0)
    assert dense(full, full / 6).dtype == jnp.float32
    half = jnp.ones(3, jnp.bfloat16)
    for b in (jnp.asarray(2.0), 2.0):  # weak: jax.nn.logsumexp keeps bfloat16
        with jax.numpy_rank_promotion("allow"):
            got = jnp.asarray(js.logsumexp(half, b=b))
            assert got.dtype == jax.nn.logsumexp(half, b=b).dtype == jnp.bfloat16
    for b in (2, np.arange(1, 4), np.ones(3, np.int8), np.ones(3, bool)):
        with jax.numpy_dtype_promotion("standard"):
            got = jnp.asarray(js.logsumexp(half, b=b))
            assert got.dtype == jax.nn.logsumexp(half, b=b).dtype == half.dtype
            assert jnp.asarray(js.logsumexp(np.ones(3, np.int32), b=b)).dtype == jnp.float32
    assert jax.grad(js.logsumexp)(jnp.asarray(1.5)) == 1
