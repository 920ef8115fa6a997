# SPDX-License-Identifier: Apache-2.0
"""Divergences of two linear heads: all gradients against the truth, and what is not computed."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from assertions import assert_close, assert_within
from cases import generator, on_device
from heads import U, pulled_back
from jax import export, lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from layouts import LAYOUTS, mesh_of, put
from oracle import Value, Wide
from test_orders import forward_over_reverse, reverse_over_reverse

import jaxsoftmax as js
from bench import timing
from bench.collectives import collectives
from jaxsoftmax._head import programs, sizes

HEADS = {"kl": js.linear_kl_divergence, "js": js.linear_js_divergence}
both_kinds = pytest.mark.parametrize("kind", HEADS)
BY_HAND = pytest.mark.wide, pytest.mark.rare
kl_and_wide_js = pytest.mark.parametrize("kind", ["kl", pytest.param("js", marks=pytest.mark.wide)])
STATIC = ("reduction", "chunk_size", "transpose_kernel", "compute_dtype")
OPERANDS = ("hidden", "kernel", "target_hidden", "target_kernel")
N, H, G, V = 11, 3, 5, 40


@pytest.fixture(autouse=True, scope="module")
def one_cpu_device():
    yield from on_device("one CPU device")


@pytest.fixture
def elsewhere(request):
    """Several devices, or the forms and the sizes of other platforms."""
    yield from on_device(request.param)


def problem(dtype: Any = np.float32, target_dtype: Any = None) -> dict[str, np.ndarray]:
    """The operands of two heads of different widths, whose logits have about the scale 1."""
    rng, target_dtype = generator("two heads"), dtype if target_dtype is None else target_dtype
    shapes = {"hidden": (N, H), "kernel": (H, V), "bias": V}
    shapes |= {"target_hidden": (N, G), "target_kernel": (G, V), "target_bias": V}
    arrays = {}
    for name, shape in shapes.items():
        scale = shape[0] ** -0.5 if "kernel" in name else 1
        of = target_dtype if "target" in name else dtype
        arrays[name] = (scale * rng.standard_normal(shape)).astype(jnp.dtype(of))
    return arrays


# The truth ---------------------------------------------------------------------------------------


class Logits(NamedTuple):
    """Logits of a head in long double, the error of float32, and the way back to its operands."""

    z: np.ndarray  # [N, V], capped and divided by the temperature
    error: np.ndarray  # [N, 1], of each of them
    slope: Value  # of z by the raw logits
    by_cap: Value  # of z by the soft cap


def logits(hidden, kernel, bias, cap, temperature) -> Logits:
    """As in `heads.statistics_truth`; the hyperbolic tangent and its slope have an error of 4 u."""
    h, k = (np.asarray(a).astype(Wide) for a in (hidden, kernel))
    b = np.zeros(k.shape[1], Wide) if bias is None else np.asarray(bias).astype(Wide)
    z, finite = h @ k + b, np.isfinite(b)
    size = np.abs(h) @ np.abs(k) + np.where(finite, np.abs(b), 0)
    error = (len(k) + 1) * U * size.max(-1, keepdims=True)
    slope, by_cap = (Value(np.full(z.shape, v, Wide), np.zeros(z.shape)) for v in (1, 0))
    if cap is not None:
        u = np.where(finite, z, 0) / cap
        t = np.tanh(u)
        s = 1 - t * t
        z = np.where(finite, cap * t, z)
        slope = Value(s, 4 * U + 2 * error / cap)
        by_cap = Value(t - s * u, 4 * U * (1 + np.abs(u)) + 3 * error / cap)
        error = error + 4 * U * np.abs(cap * t).max(-1, keepdims=True)
    temperature = Wide(temperature)
    slope, by_cap = (Value(*(a / temperature for a in v)) for v in (slope, by_cap))
    z = z / temperature
    size = np.where(np.isfinite(z), np.abs(z), 0).max(-1, keepdims=True)
    return Logits(z, error / temperature + U * size, slope, by_cap)


class Truth(NamedTuple):
    """The divergence of each token, and its derivatives."""

    value: Value  # [N]
    by_z: Value  # [N, V]
    by_t: Value
    by_weight: Value | None  # [N]


def log_softmax(z):
    m = z.max(-1, keepdims=True)
    return z - m - np.log(np.exp(z - m).sum(-1, keepdims=True))


def times(p, v):
    """The product p v, where 0 times infinity is 0."""
    return np.where(p == 0, 0, p * np.where(p == 0, 0, v))


def by_own(p, v, of_p, of_v) -> Value:
    """The gradient p (v − Σ p v), by the errors of p, relative to it, and of v."""
    away = np.where(p == 0, 0, np.where(p == 0, 0, v) - times(p, v).sum(-1, keepdims=True))
    of_mean = (p * of_v + of_p * np.abs(times(p, v))).sum(-1, keepdims=True)
    return Value(p * away, p * (of_p * np.abs(away) + of_v + of_mean))


def truth(a: Logits, b: Logits, weight=None) -> Truth:
    """Of two logits, with errors Δ: p and q are within 2Δ of themselves, δ within both.

    To first order a divergence changes by its derivative times Δ; the second order is their square.
    The sums over the classes, and the functions of each, are V + 16 operations more.
    """
    log_q, log_p = log_softmax(a.z), log_softmax(b.z)
    q, p = np.exp(log_q), np.exp(log_p)
    delta = np.where((q == 0) & (p == 0), 0, log_q - np.where(q == 0, 0, log_p))
    of_q, of_p = 2 * a.error + 16 * U, 2 * b.error + 16 * U
    either = of_q + of_p + 16 * U * np.where(np.isfinite(delta), np.abs(delta), 0)
    by_weight = None
    if weight is None:
        value = -times(p, delta).sum(-1)
        by_z = Value(q - p, of_q * q + of_p * p)
        by_t = by_own(p, -delta, of_p, either)
    else:
        w = Wide(weight)
        m = (1 - w) * p + w * q
        with np.errstate(divide="ignore"):
            log_m = np.log(m)
        log_m = np.where(m == 0, 0, log_m)
        v, u = (np.where(r == 0, 0, log_r) - log_m for r, log_r in ((q, log_q), (p, log_p)))
        of_z, of_t = (q * v).sum(-1), (p * u).sum(-1)
        value = w * of_z + (1 - w) * of_t
        by_z = Value(*(w * x for x in by_own(q, v, of_q, either)))
        by_t = Value(*((1 - w) * x for x in by_own(p, u, of_p, either)))
        # Σ q v by v and q, and likewise of p; the mixture is within either's error.
        size = (q * (1 + np.abs(v)) + p * (1 + np.abs(u))) * either
        by_weight = Value(of_z - of_t, 2 * size.sum(-1))
    first = (np.abs(by_z.value) * a.error + np.abs(by_t.value) * b.error).sum(-1)
    bound = first + either.max(-1) ** 2 + (V + 16) * U * value
    return Truth(Value(value, bound), by_z, by_t, by_weight)


def pulled(d: Value, a: Logits) -> Value:
    """By the raw logits."""
    (value, error), (slope, of_slope) = d, a.slope
    return Value(value * slope, error * slope + np.abs(value) * (of_slope + 2 * U * slope))


def summed(terms: list[Value], count: int) -> Value:
    """The sum of all terms of all arrays, each the sum of `count` terms in any order."""
    value, bound, size = (
        np.sum([np.sum(part) for part in parts])
        for parts in ([v for v, _ in terms], [b for _, b in terms], [np.abs(v) for v, _ in terms])
    )
    return Value(value, bound + (count + 4) * U * size)


def product(a: Value, b: Value) -> Value:
    bound = np.abs(a.value) * b.bound + np.abs(b.value) * a.bound + a.bound * b.bound
    return Value(a.value * b.value, bound)


def gradients_truth(arrays, g, *, temperature=1, soft_cap=None, target_soft_cap=None, weight=None):
    """Of Σ g · divergence by each operand, and by each option that is a number; and the losses.

    Of the target's kernel and bias, in half precision, each chunk is rounded.
    """
    names = ("hidden", "kernel", "bias")
    heads = [(arrays[of + "hidden"], arrays[of + "kernel"]) for of in ("", "target_")]
    a = logits(*heads[0], arrays.get("bias"), soft_cap, temperature)
    b = logits(*heads[1], arrays.get("target_bias"), target_soft_cap, temperature)
    t, g = truth(a, b, weight), np.asarray(g, Wide)
    of_g = Value(g[:, None], np.zeros((len(g), 1)))
    found = {}
    for of, head, each, d in (("", heads[0], a, t.by_z), ("target_", heads[1], b, t.by_t)):
        hidden, kernel = head
        ds = pulled_back(pulled(d, each), g, hidden, kernel)
        half = jnp.finfo(kernel.dtype)
        if of and half.bits < 32:
            size = np.abs(g[:, None] * d.value)
            sizes = 0, np.abs(hidden).astype(Wide).T @ size, size.sum(0)
            lost = [float(half.eps) * size + N * float(half.smallest_subnormal) for size in sizes]
            ds = [Value(v, bound + more) for (v, bound), more in zip(ds, lost, strict=True)]
        found |= {of + name: v for name, v in zip(names, ds, strict=True)}
    of_temperature = []
    for cap, d, each in (("soft_cap", t.by_z, a), ("target_soft_cap", t.by_t, b)):
        d = product(of_g, d)  # noqa: PLW2901
        z = np.where(np.isfinite(each.z), each.z, 0)
        of_temperature.append(product(d, Value(z / -Wide(temperature), each.error / temperature)))
        found[cap] = summed([product(d, each.by_cap)], N * V)
    found["temperature"] = summed(of_temperature, N * V)
    if t.by_weight is not None:
        found["weight"] = summed([product(Value(g, np.zeros(len(g))), t.by_weight)], N * V)
    return t.value, found


# Values and gradients ----------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("kind", *STATIC))
def total(kind, operands, numbers, cotangent, *, where=None, **options):
    """The divergence, and the gradients of Σ cotangent · divergence by `operands`, `numbers`."""

    def f(operands, numbers):
        first = [operands[name] for name in OPERANDS]
        rest = {name: a for name, a in operands.items() if name not in OPERANDS}
        out = HEADS[kind](*first, **rest, **numbers, where=where, **options)
        return jnp.sum(out * cotangent), out

    (_, out), ds = jax.value_and_grad(f, (0, 1), has_aux=True)(operands, numbers)
    return out, ds[0] | ds[1]


def transposed(operands):
    """With both kernels `[V, …]`."""
    return {name: a.T if "kernel" in name else a for name, a in operands.items()}


def check(kind, arrays, *, numbers=None, broken=None, cotangent: Any = 1.0, **options):
    """Values and gradients by everything.

    The truth is that of the operands as the products take them; `broken` tokens, of weight 0 or
    outside `where`, hold NaN, and their gradients are exactly 0.
    """
    numbers, broken = dict(numbers or {}), np.zeros(N, bool) if broken is None else broken
    given = with_hidden(arrays, broken, np.nan)
    arrays = with_hidden(arrays, broken, 0)
    if kind == "js":
        numbers["weight"] = np.float32(0.3)
    turn = transposed if options.get("transpose_kernel") else dict
    out, ds = total(kind, turn(given), numbers, np.float32(cotangent), **options)
    ds = turn(ds)
    assert {name: d.dtype for name, d in ds.items()} == {
        name: a.dtype for name, a in (given | numbers).items()
    }
    if "compute_dtype" in options:
        arrays = arrays | {name: arrays[name].astype(options["compute_dtype"]) for name in OPERANDS}
    reduction, where = options.get("reduction", "mean"), options.get("where", np.ones(N, bool))
    weights = given.get("weights", np.ones(N)).astype(Wide)
    divisor = options.get("denominator", (where * weights).sum()) if reduction == "mean" else 1
    g = cotangent * where / Wide(divisor)  # but for the weights
    losses, expected = gradients_truth(arrays, g * weights, **numbers)
    more = (N + 8) * U  # weights, divisor, cotangent, and the sum over tokens
    own = Value(losses.value, losses.bound + more * losses.value)
    if reduction is None:
        assert_within(out, weights * where * own.value, weights * where * own.bound, "value")
    else:
        mean = Value(*(g * weights / cotangent @ v for v in own))
        assert_within(out, *mean, "value")
        if reduction == "mean" and "denominator" not in options:  # which the weights change too
            own = Value(own.value - mean.value, own.bound + mean.bound)
    expected["weights"] = Value(g * own.value, np.abs(g) * (own.bound + more * np.abs(own.value)))
    for name, d in ds.items():
        value, bound = expected[name]
        if name in ("hidden", "target_hidden", "weights"):
            np.testing.assert_array_equal(np.asarray(d, float)[broken], 0, err_msg=name)
            d, value, bound = d[~broken], value[~broken], bound[~broken]  # noqa: PLW2901
        assert_within(d, value, bound + more * np.abs(value), f"d_{name}")


SOME = np.sin(3.0 * np.arange(N)) > -0.4
NUMBERS = {
    "temperature": np.float32(1.5),
    "soft_cap": np.float32(2),
    "target_soft_cap": np.float32(3),
}
# Biases, weights, a mask, caps and temperature, in chunks that do not divide the tokens.
EVERYTHING: dict[str, Any] = {"where": SOME, "chunk_size": 4, "numbers": NUMBERS}


def weighted(arrays):
    return arrays | {"weights": np.linspace(0.5, 2, N).astype(np.float32)}


def with_hidden(arrays, tokens, value):
    """With both hidden states of these tokens at `value`."""
    there = tokens[:, None]
    replaced = {n: np.where(there, value, arrays[n]) for n in ("hidden", "target_hidden")}
    return arrays | {n: a.astype(arrays[n].dtype) for n, a in replaced.items()}


@both_kinds
def test_everything_at_once(kind):
    check(kind, weighted(problem()), **EVERYTHING)


@both_kinds
def test_tokens_that_are_left_out(kind):
    """By the mask or by a weight of 0, whatever they hold."""
    arrays = weighted(problem())
    arrays["weights"][1] = 0
    assert SOME[1]
    check(kind, arrays, broken=~SOME | (arrays["weights"] == 0), **EVERYTHING)
    none: Any = EVERYTHING | {"where": np.zeros(N, bool)}
    numbers = none.pop("numbers") | ({"weight": np.float32(0.3)} if kind == "js" else {})
    broken = with_hidden(arrays, ~none["where"], np.nan)
    for zero in jax.tree.leaves(total(kind, broken, numbers, np.float32(1), **none)):
        np.testing.assert_array_equal(zero, 0)


@both_kinds
def test_weights_of_tokens_that_are_left_out_may_be_nan(kind):
    """As padding's are, of a division by a count of 0."""
    arrays = problem()
    operands = [arrays[name] for name in OPERANDS]
    weights = np.linspace(0.5, 2, N, dtype=np.float32)

    def step(weights):
        f = functools.partial(HEADS[kind], *operands, where=SOME, chunk_size=4)
        mean = jax.value_and_grad(lambda weights: f(weights=weights))(weights)
        return mean, f(weights=weights, reduction=None)

    assert_close(step(np.where(SOME, weights, np.nan)), step(weights), of_largest=1e-6)


@pytest.mark.parametrize("of", ["both", "target", "logits"])
@both_kinds
def test_classes_left_out_by_a_bias(kind, of):
    """Of both heads, of the target, or of the logits alone: that makes KL infinite."""
    arrays = weighted(problem())
    for name in ("bias", "target_bias"):
        if of == "both" or ("target" in name) == (of == "target"):
            arrays[name][[0, 7]] = -np.inf
    if (kind, of) == ("kl", "logits"):
        options: Any = EVERYTHING | {}
        numbers = options.pop("numbers")
        assert total(kind, arrays, numbers, np.float32(1), **options)[0] == np.inf
    else:
        check(kind, arrays, **EVERYTHING)


@kl_and_wide_js
def test_without_options(kind):
    check(kind, {name: a for name, a in problem().items() if name in OPERANDS})


@kl_and_wide_js
def test_one_for_each_token(kind):
    """For any cotangent."""
    cotangent = np.cos(np.arange(N)).astype(np.float32)
    options: Any = {"reduction": None, "chunk_size": 3, "where": SOME}
    check(kind, weighted(problem()), cotangent=cotangent, broken=~SOME, **options)


def test_transposed_kernels_in_float16_products():
    """Small cotangents lose nothing there: a power of two in the divisor is one in the gradient."""
    options: Any = {"transpose_kernel": True, "compute_dtype": "float16", "chunk_size": 4}
    check("kl", problem(), denominator=20.0, **options)
    operands = transposed(problem())
    (_, ds), (_, small) = (
        total("kl", operands, {}, np.float32(1), denominator=20.0 * by, **options)
        for by in (1, 2.0**30)
    )
    for name, d in ds.items():
        np.testing.assert_array_equal(small[name] * np.float32(2.0**30), d, err_msg=name)


@pytest.mark.wide
def test_a_sum_of_weighted_tokens():
    check("kl", weighted(problem()), reduction="sum", cotangent=np.float32(-2), chunk_size=5)


FLOAT32, BFLOAT16, FLOAT16 = np.float32, jnp.bfloat16, np.float16


@pytest.mark.parametrize(
    ("dtype", "target"),
    [
        (BFLOAT16, FLOAT16),
        *(
            pytest.param(*pair, marks=pytest.mark.wide)
            for pair in ((FLOAT32, BFLOAT16), (BFLOAT16, FLOAT32), (FLOAT16, FLOAT32))
        ),
    ],
)
def test_half_precision_of_either_head(dtype, target):
    check("kl", problem(dtype, target), chunk_size=4, numbers={"temperature": FLOAT32(0.7)})


@pytest.mark.parametrize(
    "dtype", [FLOAT32, BFLOAT16, pytest.param(FLOAT16, marks=pytest.mark.wide)]
)
def test_heads_that_are_close(dtype):
    """As exact as the divergence of logits: at δ ~ 1e-3 all logits are exact in float32.

    The target has one feature more, small multiples of 2⁻¹⁰. On logits the relative error is at
    most 16 ulp; N equal terms are added, and V of the gradient.
    """
    rng = generator("close")
    hidden = rng.integers(-2, 3, (N, H)).astype(dtype)
    kernel = rng.integers(-1, 2, (H, V)).astype(dtype)
    feature = np.full((N, 1), 2.0**-10).astype(dtype)
    target_hidden = np.concatenate([hidden, feature], 1)
    target_kernel = np.concatenate([kernel, rng.integers(-2, 3, (1, V)).astype(dtype)])
    given = (hidden, kernel, target_hidden, target_kernel)
    z, t = ((h.astype(Wide) @ k.astype(Wide)) for h, k in (given[:2], given[2:]))
    exact = [Logits(a, np.zeros((N, 1)), Value(a, a), Value(a, a)) for a in (z, t)]
    value, by_z, *_ = truth(*exact)

    def f(bias):
        return js.linear_kl_divergence(*given, bias=bias, reduction="sum", chunk_size=4)

    got, d = jax.value_and_grad(f)(np.zeros(V, np.float32))
    assert value.value.max() < 1e-5
    roundings = (32 + N) * U
    assert_within(got, value.value.sum(), roundings * value.value.sum())
    assert_within(d, by_z.value.sum(0), roundings * np.abs(by_z.value).sum(0))


@kl_and_wide_js
def test_equal_heads_are_at_0_exactly(kind):
    """And so is every gradient, with one soft cap for both."""
    arrays = problem()
    same = {f"target_{name}": arrays[name] for name in ("hidden", "kernel", "bias")}
    numbers = NUMBERS | {"target_soft_cap": NUMBERS["soft_cap"]}
    numbers |= {"weight": np.float32(0.3)} if kind == "js" else {}
    for zero in jax.tree.leaves(total(kind, arrays | same, numbers, np.float32(1), chunk_size=4)):
        np.testing.assert_array_equal(zero, 0)


@both_kinds
def test_no_tokens(kind):
    none = {name: a[:0] if "hidden" in name else a for name, a in problem().items()}
    none = {name: a for name, a in none.items() if name in OPERANDS}
    for reduction in ("mean", "sum", None):
        out, ds = total(kind, none, {}, np.float32(1), reduction=reduction)
        assert out.shape == ((0,) if reduction is None else ())
        assert out.dtype == np.float32
        for name, d in (ds | {"": out}).items():
            assert not name or d.shape == none[name].shape
            np.testing.assert_array_equal(d, 0)


# What is not computed ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("differentiated", "products", "reduction"),
    [
        *(((), 2, "sum"), ((0,), 3, "sum"), ((0, 1), 4, "sum"), ((2, 3), 4, "sum")),
        *(((0, 1, 2, 3), 6, "sum"), ((2,), 3, None)),
    ],
)
def test_the_frozen_head_costs_its_forward_product_alone(differentiated, products, reduction):
    """The products of a chunk, as the program has them."""
    arrays = problem()

    def f(*operands):
        return jnp.sum(js.linear_kl_divergence(*operands, reduction=reduction, chunk_size=4))

    step = jax.jit(jax.grad(f, differentiated) if differentiated else f)
    lowered = step.lower(*(arrays[name] for name in OPERANDS)).as_text()
    assert lowered.count("stablehlo.dot_general") == products


@kl_and_wide_js
def test_memory(kind):
    """Two arrays of logits per chunk within the budget of one; however many tokens there are.

    The plain version holds both arrays of all logits.
    """
    width, target_width, classes = 16, 32, 8192
    found = {}
    for tokens in (1792, 14_336):  # two chunks, and sixteen
        shapes = (tokens, width), (width, classes), (tokens, target_width), (target_width, classes)
        arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
        step = jax.jit(jax.value_and_grad(HEADS[kind], (0, 1)))
        found[tokens] = timing.temporary_bytes(step.lower(*arguments).compile())
        (chunk, _), _ = sizes.chunks(tokens, width, classes, 4, None, 1, logits=2)
        assert chunk == sizes.LOGITS_BYTES["cpu"] // (2 * 4 * classes)
    assert found[14_336] <= 1.05 * found[1792]
    assert found[14_336] <= 2 * 4 * 14_336 * classes / 2
    # Both logits and the gradient; of JS also what that is a product of. Beside them terms of a few
    # rows, and arrays without the classes.
    assert found[14_336] <= {"kl": 3, "js": 8}[kind] * 4 * chunk * classes + (12 << 20)


def test_only_chunks_with_a_token_that_counts_are_run(monkeypatch):
    calls, of_rows = [], programs.of_rows

    def counted(x, *args, **options):
        shape = jax.ShapeDtypeStruct((), np.float32)
        seen = lambda _: calls.append(0) or np.float32(0)  # noqa: E731
        zero = jax.pure_callback(seen, shape, lax.stop_gradient(x[0, 0]))
        return of_rows(x, *args, **options) + zero

    monkeypatch.setattr(programs, "of_rows", counted)
    jax.clear_caches()
    arrays = problem()
    first = [arrays[name] for name in OPERANDS]
    mean = jax.jit(lambda where: js.linear_kl_divergence(*first, where=where, chunk_size=2))
    for count in (0, 1, 5, N):
        calls.clear()
        where = np.random.default_rng(count).permutation(N) < count
        jax.block_until_ready(mean(where))
        assert len(calls) == -(-count // 2)
    jax.clear_caches()


# Transforms --------------------------------------------------------------------------------------


def definition(kind, x):
    """The mean of the divergences, from log-probabilities."""
    log_q, log_p = (
        jax.nn.log_softmax(x[f"{of}hidden"] @ x[f"{of}kernel"], axis=-1) for of in ("", "target_")
    )
    q, p = jnp.exp(log_q), jnp.exp(log_p)
    if kind == "kl":
        return jnp.sum(p * (log_p - log_q)) / N
    w = x["weight"]
    m = (1 - w) * p + w * q
    of_p, of_q = (jnp.sum(r * (jnp.log(r) - jnp.log(m))) for r in (p, q))
    return ((1 - w) * of_p + w * of_q) / N


@pytest.mark.parametrize(
    ("kind", "order", "reduction"),
    [
        ("kl", forward_over_reverse, "mean"),
        pytest.param("kl", reverse_over_reverse, None, marks=pytest.mark.wide),
        pytest.param("js", forward_over_reverse, None, marks=pytest.mark.wide),
        pytest.param("js", reverse_over_reverse, "mean", marks=BY_HAND),  # a minute
    ],
)
def test_second_derivatives(kind, order, reduction):
    """By all operands at once, in float64."""
    with jax.enable_x64(True):
        x = {name: np.float64(a) for name, a in problem().items() if name in OPERANDS}
        x |= {"weight": np.float64(0.3)} if kind == "js" else {}

        def ours(x):
            weight = {name: a for name, a in x.items() if name not in OPERANDS}
            first = (x[name] for name in OPERANDS)
            out = HEADS[kind](*first, reduction=reduction, chunk_size=4, **weight)
            return out if reduction == "mean" else out.sum() / N

        f = functools.partial(definition, kind)
        want, got = (jax.jit(functools.partial(order, f))(x) for f in (f, ours))
        assert_close(got, want, of_largest=1e-11)


@pytest.mark.parametrize("frozen", [0, 2])
@pytest.mark.wide
def test_mixed_second_derivatives(frozen):
    """Of the gradient by one hidden state alone, along the other, in forward mode."""
    with jax.enable_x64(True):
        given = {name: np.float64(problem()[name]) for name in OPERANDS}
        of, along = ("hidden", "target_hidden")[:: 1 if frozen else -1]

        def slope(f, x):
            gradient = jax.grad(lambda y: f(given | {along: x, of: y}))
            return gradient(given[of])

        def ours(x):
            return js.linear_kl_divergence(*(x[name] for name in OPERANDS), chunk_size=4)

        x = given[along]
        want, got = (
            jax.jit(lambda x, f=f: jax.jvp(functools.partial(slope, f), (x,), (x,))[1])(x)
            for f in (functools.partial(definition, "kl"), ours)
        )
        assert_close(got, want, of_largest=1e-11)


@kl_and_wide_js
def test_vmap(kind):
    """Of a hidden state, the target's kernel and the mask, as one by one."""
    arrays = problem()
    hidden = np.stack([arrays["hidden"], -arrays["hidden"]])
    kernels = np.stack([arrays["target_kernel"], 2 * arrays["target_kernel"]])
    masks = np.stack([SOME, ~SOME])

    def step(hidden, target_kernel, where):
        def f(hidden, kernel, target_kernel):
            given = hidden, kernel, arrays["target_hidden"], target_kernel
            return HEADS[kind](*given, where=where, chunk_size=4)

        return jax.value_and_grad(f, (0, 1, 2))(hidden, arrays["kernel"], target_kernel)

    each = jax.jit(step)
    one_by_one = [each(*given) for given in zip(hidden, kernels, masks, strict=True)]
    want = jax.tree.map(lambda *leaves: np.stack(leaves), *one_by_one)
    assert_close(jax.jit(jax.vmap(step))(hidden, kernels, masks), want, of_largest=1e-6)


@kl_and_wide_js
def test_a_program_for_any_number_of_tokens_and_platform(kind):
    arrays = problem()

    def step(hidden, kernel, target_hidden, target_kernel, where):
        mean = functools.partial(HEADS[kind], where=where, chunk_size=4)
        given = hidden, kernel, target_hidden, target_kernel
        return jax.value_and_grad(mean, (0, 1, 2, 3))(*given)

    (n,) = export.symbolic_shape("n")
    shapes = [(n, H), (H, V), (n, G), (G, V)]
    arguments = [jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes]
    arguments.append(jax.ShapeDtypeStruct((n,), bool))
    exported = export.export(jax.jit(step), platforms=["cpu", "cuda", "tpu"])(*arguments)
    given = [arrays[name] for name in OPERANDS]
    assert_close(exported.call(*given, SOME), jax.jit(step)(*given, SOME), of_largest=1e-6)


@pytest.mark.parametrize(
    ("kind", "jit"),
    [
        ("js", True),
        *(
            pytest.param(*case, marks=pytest.mark.wide)
            for case in (("kl", True), ("kl", False), ("js", False))
        ),
    ],
)
def test_nothing_raises_under_debug_nans(kind, jit):
    """Also with a class left out of both, and tokens that hold NaN and do not count."""
    arrays = weighted(problem())
    for name in ("bias", "target_bias"):
        arrays[name][3] = -np.inf
    numbers = NUMBERS | ({"weight": np.float32(0.3)} if kind == "js" else {})
    options = {name: a for name, a in EVERYTHING.items() if name != "numbers"}
    with jax.debug_nans(True), jax.disable_jit(not jit):
        out = total(kind, arrays, numbers, np.float32(1), **options)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out))


# Meshes ------------------------------------------------------------------------------------------

BATCH, SEQUENCE, WIDTH, TARGET_WIDTH, CLASSES = 8, 6, 8, 4, 32
WAYS = ("automatic", "explicit", "shard_map")


@functools.cache
def spread_problem():
    rng = generator("two heads on a mesh")
    shapes = {"hidden": (BATCH, SEQUENCE, WIDTH), "kernel": (WIDTH, CLASSES), "bias": CLASSES}
    target = {"hidden": (BATCH, SEQUENCE, TARGET_WIDTH), "kernel": (TARGET_WIDTH, CLASSES)}
    shapes |= {f"target_{name}": shape for name, shape in (target | {"bias": CLASSES}).items()}
    shapes["weights"] = BATCH, SEQUENCE
    arrays = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    arrays["where"] = rng.random((BATCH, SEQUENCE)) < 0.7
    arrays["where"][:2] = False
    arrays["temperature"] = np.float32(1.5)
    return arrays


def spread_specs(layout):
    of_head = layout.specs()
    specs = {name: of_head[name.removeprefix("target_")] for name in spread_problem()
             if name not in ("where", "temperature")}  # fmt: skip
    return specs | {"where": of_head["weights"], "temperature": P()}


def spread_total(kind, a, axis_name=None):
    first = [a[name] for name in OPERANDS]
    rest = {name: x for name, x in a.items() if name not in OPERANDS}
    return HEADS[kind](*first, **rest, reduction="sum", chunk_size=3, axis_name=axis_name)


def spread_step(f, without: Any = "where"):
    def step(a):
        floating = {name: x for name, x in a.items() if not name.startswith(without)}
        return jax.value_and_grad(lambda floating: f(a | floating))(floating)

    return jax.jit(step)


def by_hand(kind, layout):
    """In `shard_map`, with the width of the kernels gathered."""
    width, classes = layout.kernel

    def local(a):
        if width is not None:
            whole = functools.partial(lax.all_gather, axis_name=width, axis=0, tiled=True)
            a = a | {name: whole(a[name]) for name in ("kernel", "target_kernel")}
        value = spread_total(kind, a, classes)
        return lax.psum(value, layout.token_axes) if layout.token_axes else value

    return jax.shard_map(local, in_specs=(spread_specs(layout),), out_specs=P())


@functools.cache
def unspread(kind):
    return spread_step(functools.partial(spread_total, kind))(spread_problem())


SHORT = {("hybrid", "explicit", "kl"), ("vocabulary", "shard_map", "js")}
SPREAD = [
    pytest.param(*case, marks=() if case in SHORT else pytest.mark.wide)
    for case in (
        *((name, way, "kl") for name in ("data", "vocabulary", "fsdp", "hybrid") for way in WAYS),
        *((name, way, "js") for name in ("vocabulary", "hybrid") for way in WAYS[1:]),
    )
]


@pytest.mark.parametrize(("name", "way", "kind"), SPREAD)
def test_on_a_mesh(name, way, kind):
    """Values and all gradients of one device; in the loop only sums over shards of the classes."""
    layout, want = LAYOUTS[name], unspread(kind)
    mesh = mesh_of(AxisType.Explicit if way == "explicit" else AxisType.Auto)
    f = by_hand(kind, layout) if way == "shard_map" else functools.partial(spread_total, kind)
    step = spread_step(f)
    with jax.set_mesh(mesh):
        there = put(mesh, spread_specs(layout), spread_problem())
        compiled = step.lower(there).compile()
        value, ds = compiled(there)
    assert_close((value, ds), want, of_largest=64 * float(np.finfo(np.float32).eps))
    if way == "explicit":
        for of, d in ds.items():
            assert jax.typeof(d) == jax.typeof(there[of]), of
    if way == "explicit":  # gradients of a target and of options are summed in each chunk there
        with jax.set_mesh(mesh):
            compiled = spread_step(f, ("where", "target", "temperature")).lower(there).compile()
    in_loop = [one for one in collectives(compiled.as_text() or "") if one.in_loop]
    if way != "automatic":  # where XLA chooses
        assert not any(one.kind == "all-gather" for one in in_loop), in_loop
        assert layout.classes or not in_loop, in_loop


# Other forms -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("elsewhere", "kind"),
    [
        ("one other device", "kl"),
        pytest.param("one other device", "js", marks=pytest.mark.wide),
        pytest.param("anywhere", "kl", marks=pytest.mark.wide),
        pytest.param("anywhere", "js", marks=pytest.mark.wide),
    ],
    indirect=["elsewhere"],
)
def test_everything_at_once_elsewhere(elsewhere, kind):
    check(kind, weighted(problem()), **EVERYTHING)
