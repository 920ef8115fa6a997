# SPDX-License-Identifier: Apache-2.0
"""`linear_top_k` and `linear_sample`: which classes, in which order, with which log-probabilities.

Operands are small integers, whose products are exact in every dtype: the logits are known to the
bit, with many ties.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from assertions import assert_dtype, assert_within
from cases import generator, on_device, x64
from heads import U
from jax import export, lax
from jax.extend.random import threefry_2x32
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from layouts import LAYOUTS, mesh_of, put
from oracle import Value, Wide
from scipy import stats

import jaxsoftmax as js
from jaxsoftmax._head import choices

KEY = jax.random.key(5)
N, H, V = 9, 5, 130  # V: no multiple of any block below
BLOCKS = (1, 7, None)
DTYPES = ("float32", "float64", "bfloat16", "float16")

platform = pytest.fixture(scope="module", params=["anywhere", "one CPU device", "other devices"])


@platform
def device(request):
    yield from on_device(request.param)


def operands(n=N, width=H, classes=V, dtype: Any = "float32") -> tuple[np.ndarray, np.ndarray]:
    rng = generator("choices", n, width, classes)
    shapes = (n, width), (width, classes)
    hidden, kernel = (rng.integers(-2, 3, shape).astype(jnp.dtype(dtype)) for shape in shapes)
    return hidden, kernel


def logits_of(hidden, kernel, bias=None) -> np.ndarray:
    z = np.asarray(hidden, np.float64) @ np.asarray(kernel, np.float64)
    return z if bias is None else z + np.asarray(bias, np.float64)


def order_of(z) -> np.ndarray:
    """Class numbers by falling logits, equal ones by number."""
    return np.argsort(-z, axis=-1, kind="stable")


def log_probs_of(z, labels, dtype=np.float32, merges=V) -> Value:
    """At `labels [N, k]`; each merge of blocks costs r five roundings more."""
    out = np.isneginf(z)
    t = oracle.truth(z, dtype)
    value, bound = (np.take_along_axis(np.asarray(v), labels, -1) for v in t.nll)
    bound = bound + 5 * merges * t.u
    return Value(-value, np.where(np.take_along_axis(out, labels, -1), 0, bound))


def check_top_k(found, z, k, dtype: Any = np.float32) -> None:
    labels = order_of(z)[:, :k]
    np.testing.assert_array_equal(found.labels, labels)
    assert_dtype(found.labels, "int32")
    assert_dtype(found.log_probs, dtype)
    assert_within(found.log_probs, *log_probs_of(z, labels, dtype))


@pytest.mark.parametrize("k", [1, 3, 70, V])
def test_top_k_whatever_the_blocks(device, k):
    """Also of k that is more than a block holds, and of blocks and shards that do not divide V."""
    hidden, kernel = operands()
    z = logits_of(hidden, kernel)
    assert (np.diff(np.sort(z, -1)) == 0).any(-1).all()
    for block in BLOCKS:
        check_top_k(js.linear_top_k(hidden, kernel, k, chunk_size=block), z, k)
    transposed = js.linear_top_k(hidden, kernel.T, k, chunk_size=7, transpose_kernel=True)
    check_top_k(transposed, z, k)


@pytest.mark.parametrize("dtype", DTYPES)
def test_top_k_of_every_dtype(device, dtype):
    with x64(dtype):
        hidden, kernel = operands(dtype=dtype)
        found = js.linear_top_k(hidden, kernel, 20, chunk_size=33)
        check_top_k(found, logits_of(hidden, kernel), 20, oracle_dtype(dtype))
        wide = [a.astype(np.float32) for a in (hidden, kernel)]
        if dtype != "float64":
            other = js.linear_top_k(wide[0], wide[1], 20, chunk_size=33, compute_dtype=dtype)
            jax.tree.map(np.testing.assert_array_equal, other, found)


def oracle_dtype(dtype):
    return np.float64 if dtype == "float64" else np.float32


BIASES = {
    "offset": np.float32(1e4) + np.zeros(V, np.float32),
    "negative": np.float32(-1e4) + np.zeros(V, np.float32),
    "padded": np.where(np.arange(V) < 100, 0, -np.inf).astype(np.float32),
    "the first blocks left out": np.where(np.arange(V) < 100, -np.inf, 0).astype(np.float32),
    "one class": np.where(np.arange(V) == 71, 0, -np.inf).astype(np.float32),
    "confident": np.where(np.arange(V) == 71, 60, 0).astype(np.float32),
}


@pytest.mark.parametrize("name", BIASES)
def test_top_k_with_a_bias(device, name):
    hidden, kernel = operands()
    z = logits_of(hidden, kernel, BIASES[name])
    for block in (7, 64, None):
        for k in (5, V):
            found = js.linear_top_k(hidden, kernel, k, bias=BIASES[name], chunk_size=block)
            check_top_k(found, z, k)


def test_top_k_of_real_logits_is_that_of_the_product():
    """Of any numbers, as `lax.top_k` of the same product; zeros of both signs too."""
    rng = generator("real logits")
    kernel = rng.standard_normal((H, V)).astype(np.float32)
    hidden = rng.standard_normal((N, H)).astype(np.float32)
    kernel[:, 3::5] = np.copysign(0, rng.standard_normal((H, 26)))
    hidden[0] = -0.0
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        pair = hidden.astype(dtype), kernel.astype(dtype)
        z = jnp.dot(*pair, preferred_element_type=jnp.float32)
        _, labels = lax.top_k(z, V)
        found = js.linear_top_k(*pair, V, chunk_size=V)
        np.testing.assert_array_equal(found.labels, labels)


def test_options_come_before_the_choice():
    hidden, kernel = operands()
    z = 3 * np.tanh(logits_of(hidden, kernel) / 3) / 0.5
    found = js.linear_top_k(hidden, kernel, 4, soft_cap=3.0, temperature=0.5, chunk_size=50)
    want = np.log(np.exp(z) / np.exp(z).sum(-1, keepdims=True))
    # Of logits up to 6, with a handful of roundings each; three blocks are merged.
    of_labels, highest = np.take_along_axis(want, np.asarray(found.labels), -1), -np.sort(-want)
    for expected in (of_labels, highest[:, :4]):
        np.testing.assert_allclose(found.log_probs, expected, rtol=0, atol=64 * U)


# Samples


def noise_of(key, n, classes) -> np.ndarray:
    """The documented noise `[n, classes]` in long double, by JAX's own Threefry."""
    words = jax.random.bits(key, (2,), jnp.uint32)
    token, label = (a.reshape(-1).astype(np.uint32) for a in np.indices((n, classes)))
    bits = np.asarray(threefry_2x32(words, jnp.asarray(np.concatenate([token, label]))))
    high, low = bits.astype(Wide).reshape(2, n, classes)
    return -np.log(-np.log1p(-(high / 2**32 + (low + 0.5) / Wide(2) ** 64)))


def plain_sample(key, z) -> np.ndarray:
    """The argmax of logits with noise; no two are as near as the rounding of their sum."""
    scores = np.where(np.isneginf(z), -np.inf, z + noise_of(key, *z.shape))
    best = -np.sort(-scores, axis=-1)[:, :2]
    if z.shape[-1] > 1:
        assert (best[:, 0] - best[:, 1] > 8 * U * (1 + np.abs(z[np.isfinite(z)]).max())).all()
    return scores.argmax(-1)


def check_sample(drawn, z, labels, dtype: Any = np.float32) -> None:
    np.testing.assert_array_equal(drawn.labels, labels)
    assert_dtype(drawn.labels, "int32")
    assert_dtype(drawn.log_probs, dtype)
    value, bound = log_probs_of(z, labels[:, None], dtype)
    assert_within(drawn.log_probs, value[:, 0], bound[:, 0])


def test_a_sample_is_the_plain_gumbel_argmax_whatever_the_blocks(device):
    hidden, kernel = operands()
    z = logits_of(hidden, kernel)
    labels = plain_sample(KEY, z)
    for block in BLOCKS:
        for k in (None, V):
            drawn = js.linear_sample(KEY, hidden, kernel, chunk_size=block, top_k=k)
            check_sample(drawn, z, labels)
    drawn = js.linear_sample(KEY, hidden, kernel.T, chunk_size=7, transpose_kernel=True)
    check_sample(drawn, z, labels)
    other = js.linear_sample(jax.random.key(6), hidden, kernel)
    check_sample(other, z, plain_sample(jax.random.key(6), z))
    assert (other.labels != labels).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sample_of_every_dtype(dtype):
    with x64(dtype):
        hidden, kernel = operands(dtype=dtype)
        z = logits_of(hidden, kernel)
        drawn = js.linear_sample(KEY, hidden, kernel, chunk_size=33)
        check_sample(drawn, z, plain_sample(KEY, z), oracle_dtype(dtype))


@pytest.mark.parametrize("name", BIASES)
def test_a_sample_with_a_bias(device, name):
    hidden, kernel = operands()
    z = logits_of(hidden, kernel, BIASES[name])
    drawn = js.linear_sample(KEY, hidden, kernel, bias=BIASES[name], chunk_size=7)
    assert not np.isneginf(z[np.arange(N), drawn.labels]).any()
    if np.abs(z[np.isfinite(z)]).max() < 100:
        check_sample(drawn, z, plain_sample(KEY, z))


@pytest.mark.parametrize("k", [1, 4, 50])
def test_a_sample_of_the_top_k(device, k):
    """Of those classes alone, with the noise that they have among all, normalized over them."""
    hidden, kernel = operands()
    z = logits_of(hidden, kernel)
    kept = np.zeros(z.shape, bool)
    np.put_along_axis(kept, order_of(z)[:, :k], True, -1)
    z = np.where(kept, z, -np.inf)
    drawn = js.linear_sample(KEY, hidden, kernel, top_k=k, chunk_size=20)
    check_sample(drawn, z, plain_sample(KEY, z))


def chi_squared(drawn, p) -> float:
    """How likely a worse fit to the probabilities is; rare classes count as one."""
    expected = p * len(drawn)
    common = expected >= 5
    counts = np.bincount(drawn, minlength=len(p))
    seen, wanted = ([*a[common], a[~common].sum()] for a in (counts, expected))
    assert counts[p == 0].sum() == 0
    if wanted[-1] == 0:
        seen, wanted = seen[:-1], wanted[:-1]
    return float(stats.chisquare(seen, np.array(wanted) * (sum(seen) / sum(wanted))).pvalue)


@pytest.mark.parametrize("case", ["all", "top_k", "offset", "rbg"])
def test_a_hundred_thousand_samples_have_their_probabilities(case):
    """From 0.3 to 1e-6, and 0. A right function fails one key in ten thousand."""
    n, classes = 100_000, 40
    bias = np.linspace(0, -13, classes).astype(np.float32)
    bias[[5, 39]] = -np.inf
    options: dict[str, Any] = {"top_k": 7} if case == "top_k" else {}
    z = bias + np.float32(1e4 * (case == "offset"))
    key = jax.random.key(1, impl="rbg") if case == "rbg" else KEY
    hidden, kernel = np.zeros((n, 1), np.float32), np.zeros((1, classes), np.float32)
    drawn = js.linear_sample(key, hidden, kernel, bias=z, temperature=1.0, **options)
    p = np.exp(z.astype(np.float64) - z.max())
    p[order_of(z)[options.get("top_k", classes) :]] = 0
    p /= p.sum()
    assert chi_squared(np.asarray(drawn.labels), p) > 1e-4
    finite = p > 0
    want = np.log(p, where=finite, out=np.full(classes, -np.inf))[drawn.labels]
    np.testing.assert_allclose(drawn.log_probs, want, rtol=1e-5, atol=1e-6)


def test_a_sample_with_an_old_key_is_that_of_the_typed_one():
    pair = operands()
    old, new = (js.linear_sample(key(5), *pair) for key in (jax.random.PRNGKey, jax.random.key))
    jax.tree.map(np.testing.assert_array_equal, old, new)


def test_the_noise_has_all_its_digits_at_both_ends(monkeypatch):
    """The tail that decides rare classes: −log E for E from 2⁻⁶⁵ to where float32 ends."""
    words = np.array([[0, 0], [0, 2**32 - 1], [1, 0], [2**31, 5], [2**32 - 1] * 2], np.uint32)
    monkeypatch.setattr(choices, "_threefry", lambda *_: words.T)
    got = choices.gumbel(choices.Noise(*[jnp.zeros(1, jnp.uint32)] * 2), jnp.zeros(5), jnp.float32)
    high, low = words[:4].T.astype(Wide)
    want = -np.log(-np.log1p(-(high / 2**32 + (low + 0.5) / Wide(2) ** 64)))
    np.testing.assert_allclose(got[:4], want.astype(float), rtol=4 * U, atol=4 * U)
    np.testing.assert_allclose(got[4], -np.log(24 * np.log(2)), rtol=4 * U)


def test_the_noise_is_distributed_as_gumbel():
    tokens = jnp.arange(1000, dtype=jnp.uint32)
    noise = choices.Noise(jax.random.bits(KEY, (2,), jnp.uint32), tokens)
    drawn = choices.gumbel(noise, jnp.arange(1000, dtype=jnp.int32)[None], jnp.float32)
    assert stats.kstest(np.asarray(drawn, np.float64).ravel(), stats.gumbel_r.cdf).pvalue > 1e-4


# What may go wrong


@pytest.mark.parametrize("bad", ["nan", "inf", "all −inf"])
def test_a_token_without_a_distribution(device, bad):
    """NaN and no label; another token is what it is without it."""
    hidden, kernel = operands()
    broken, bias = hidden.copy(), None
    if bad == "all −inf":
        bias, kernel = np.full(V, -np.inf, np.float32), np.abs(kernel)
    else:
        broken[2] = {"nan": np.nan, "inf": np.inf}[bad]
        kernel[kernel == 0] = 1
        kernel = np.abs(kernel)
    for options in ({}, {"top_k": 5}):
        draw = functools.partial(js.linear_sample, KEY, bias=bias, chunk_size=33, **options)
        drawn, without = draw(broken, kernel), draw(hidden, kernel)
        wrong = np.arange(N) == 2 if bias is None else np.ones(N, bool)
        np.testing.assert_array_equal(np.isnan(drawn.log_probs), wrong)
        np.testing.assert_array_equal(np.asarray(drawn.labels) == -1, wrong)
        if bias is None:
            np.testing.assert_array_equal(drawn.labels[~wrong], without.labels[~wrong])
    found = js.linear_top_k(broken, kernel, 5, bias=bias, chunk_size=33)
    z = jnp.dot(broken, kernel) + (0 if bias is None else bias[None])
    np.testing.assert_array_equal(found.labels, lax.top_k(z, 5)[1])
    np.testing.assert_array_equal(np.isnan(found.log_probs), np.stack([wrong] * 5, -1))


def test_nan_in_one_logit_comes_first():
    hidden, kernel = operands()
    bias = np.where(np.arange(V) == 101, np.nan, 0).astype(np.float32)
    found = js.linear_top_k(hidden, kernel, 3, bias=bias, chunk_size=20)
    assert (found.labels[:, 0] == 101).all()
    assert np.isnan(found.log_probs).all()


CALLS: dict[str, Any] = {
    "linear_top_k": functools.partial(js.linear_top_k, k=4, chunk_size=33),
    "linear_sample": functools.partial(js.linear_sample, KEY, chunk_size=33),
    "linear_sample-top_k": functools.partial(js.linear_sample, KEY, top_k=4, chunk_size=33),
}
every_call = pytest.mark.parametrize("name", CALLS)


def total(name, *args):
    return jnp.sum(CALLS[name](*args).log_probs)


@every_call
@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit, jax.checkpoint, jax.vmap])
def test_a_derivative_is_refused(name, wrap):
    hidden, kernel = operands()
    said = rf"^{name.partition('-')[0]}: there is no derivative .* linear_log_probs at the labels"
    hidden = hidden[None] if wrap is jax.vmap else hidden
    f = wrap(lambda h: total(name, h, kernel))
    for operation in (jax.grad, jax.jacfwd, jax.hessian):
        with pytest.raises(TypeError, match=said):
            operation(lambda h: jnp.sum(f(h)))(hidden)
    with pytest.raises(TypeError, match=said):
        jax.grad(lambda k: total(name, operands()[0], k))(kernel)
    with pytest.raises(TypeError, match=said):
        jax.jit(jax.grad(lambda t: jnp.sum(CALLS[name](*operands(), temperature=t).log_probs)))(1.5)


@every_call
def test_the_arguments_may_be_held_constant(name):
    """And the labels be given to `linear_log_probs`, which has the derivative."""
    hidden, kernel = operands()
    found = CALLS[name](hidden, kernel)

    @jax.jit
    def log_prob(hidden):
        labels = CALLS[name](lax.stop_gradient(hidden), kernel).labels.reshape(N, -1)[:, 0]
        return jnp.sum(js.linear_log_probs(hidden, kernel, labels).log_probs), labels

    (value, labels), d = jax.value_and_grad(log_prob, has_aux=True)(hidden)
    np.testing.assert_array_equal(labels, found.labels.reshape(N, -1)[:, 0])
    if name != "linear_sample-top_k":  # which are normalized over the four
        np.testing.assert_allclose(value, found.log_probs.reshape(N, -1)[:, 0].sum(), rtol=1e-6)
    assert np.any(d != 0)


def same(got, want) -> None:
    """To the rounding of sums in another order; the labels exactly."""
    np.testing.assert_array_equal(got.labels, want.labels)
    np.testing.assert_allclose(got.log_probs, want.log_probs, rtol=1e-5, atol=1e-5)


@every_call
def test_transforms(name):
    """Every way to call it gives what a call gives; tokens in any number of axes."""
    hidden, kernel = operands(n=8)
    call = CALLS[name]
    want = call(hidden, kernel)
    assert want.labels.shape[0] == 8
    for f in (jax.jit(call), jax.checkpoint(call)):
        same(f(hidden, kernel), want)
    with jax.disable_jit():
        same(call(hidden, kernel), want)
    folded = call(hidden.reshape(2, 4, H), kernel)
    same(jax.tree.map(lambda x: x.reshape(8, *x.shape[2:]), folded), want)
    one = call(hidden[0], kernel)
    same(one, jax.tree.map(lambda x: x[0], want))
    none = call(hidden[:0], kernel)
    assert [x.shape for x in none] == [(0, *x.shape[1:]) for x in want]
    pair = np.stack([kernel, -kernel])
    for axes in ((None, 0), (0, None), (0, 0)):
        given = hidden if axes[0] is None else np.stack([hidden, 2 * hidden])
        given = given, (kernel if axes[1] is None else pair)
        each = [
            call(*(a if x is None else a[i] for a, x in zip(given, axes, strict=True)))
            for i in range(2)
        ]
        same(jax.vmap(call, axes)(*given), jax.tree.map(lambda *x: jnp.stack(x), *each))

    def step(carry, kernel):
        return carry, call(hidden, kernel)

    looped = lax.scan(step, None, pair)[1]
    same(jax.tree.map(lambda x: x[0], looped), want)


def test_vmap_over_keys_is_a_call_for_each():
    hidden, kernel = operands()
    keys = jax.random.split(KEY, 3)
    draw = lambda key: js.linear_sample(key, hidden, kernel, chunk_size=33)  # noqa: E731
    each = jax.tree.map(lambda *x: jnp.stack(x), *map(draw, keys))
    same(jax.vmap(draw)(keys), each)


@every_call
def test_exported_for_any_number_of_tokens(name):
    tokens = export.symbolic_shape("batch, length")
    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((*tokens, H), (H, V))]
    call = lambda *arguments: tuple(CALLS[name](*arguments))  # noqa: E731
    exported = export.export(jax.jit(call), platforms=["cpu", "cuda", "tpu"])(*shapes)
    for batch, length in ((1, 1), (2, 7)):
        hidden, kernel = operands(n=batch * length)
        hidden = hidden.reshape(batch, length, H)
        want = CALLS[name](hidden, kernel)
        same(type(want)(*exported.call(hidden, kernel)), want)


@every_call
@pytest.mark.parametrize("jit", [True, False])
def test_under_debugging_switches(name, jit):
    """A first block that holds nothing makes no NaN that anybody sees."""
    hidden, kernel = operands()
    bias = BIASES["the first blocks left out"]
    with jax.debug_nans(True), jax.disable_jit(not jit):
        assert np.isfinite(CALLS[name](hidden, kernel, bias=bias).log_probs).all()
    if jit:
        with jax.debug_infs(True):
            assert np.isfinite(CALLS[name](hidden, kernel).log_probs).all()


# On meshes

BATCH, SEQUENCE, WIDTH, CLASSES = 4, 6, 8, 24


def spread() -> dict[str, np.ndarray]:
    hidden, kernel = operands(BATCH * SEQUENCE, WIDTH, CLASSES)
    bias = np.where(np.arange(CLASSES) == 3, -np.inf, np.arange(CLASSES) % 3).astype(np.float32)
    return {"hidden": hidden.reshape(BATCH, SEQUENCE, WIDTH), "kernel": kernel, "bias": bias}


def chosen(a, axis_name=None, key=KEY, **layout):
    """Of all: k more than a device has classes of its own, and blocks that do not divide them."""
    options = {"bias": a["bias"], "chunk_size": 5, "axis_name": axis_name, **layout}
    pair = a["hidden"], a["kernel"]
    return [
        js.linear_top_k(*pair, 9, **options),
        js.linear_sample(key, *pair, **options),
        js.linear_sample(key, *pair, top_k=4, **options),
    ]


@pytest.mark.parametrize("way", ["automatic", "explicit", "shard_map"])
@pytest.mark.parametrize("transposed", [False, pytest.param(True, marks=pytest.mark.wide)])
@pytest.mark.parametrize("name", LAYOUTS)
def test_on_a_mesh_as_on_one_device(name, transposed, way):
    """The same classes, and the same sample of the same key."""
    layout, arrays = LAYOUTS[name], spread()
    want = chosen(arrays)
    given = arrays | {"kernel": arrays["kernel"].T} if transposed else arrays
    specs = layout.specs(transposed=transposed)
    f = functools.partial(chosen, transpose_kernel=transposed)
    if way == "shard_map":
        f = in_shard_map(f, layout, specs, 0 if transposed else 1)
    mesh = mesh_of(AxisType.Explicit if way == "explicit" else AxisType.Auto)
    with jax.set_mesh(mesh):
        got = jax.jit(f)(put(mesh, specs, given))
    for one, other in zip(got, want, strict=True):
        if way == "shard_map" and isinstance(one, js.Sample) and layout.token_axes:
            continue  # of the tokens of each device, numbered there: below
        same(one, other)
    if way == "explicit":
        for leaf in jax.tree.leaves(got):
            spec = jax.typeof(leaf).sharding.spec
            assert spec == P(*layout.tokens, *[None] * (leaf.ndim - 2))


def in_shard_map(f, layout, specs, class_axis):
    """`f` of each device's part, with what it needs of the kernel gathered."""
    width, classes = layout.kernel

    def body(a):
        gathered = functools.partial(lax.all_gather, tiled=True, to="invarying")
        if width is not None:
            a = a | {"kernel": gathered(a["kernel"], width, axis=1 - class_axis)}
        if classes != layout.classes:
            a = a | {
                "kernel": gathered(a["kernel"], classes, axis=class_axis),
                "bias": gathered(a["bias"], classes, axis=0),
            }
        return f(a, layout.classes)

    return jax.shard_map(body, in_specs=(given_of(specs),), out_specs=results_of(layout))


def given_of(specs):
    return {name: specs[name] for name in ("hidden", "kernel", "bias")}


def results_of(layout):
    tokens: Any = P(*layout.tokens)
    of_top_k: Any = P(*layout.tokens, None)
    return [js.TopK(of_top_k, of_top_k), js.Sample(tokens, tokens), js.Sample(tokens, tokens)]


def test_in_shard_map_each_device_draws_by_a_key_of_its_own():
    """As the docstring says: with the key that it folds its index into, of its tokens alone."""
    layout, arrays = LAYOUTS["data and vocabulary"], spread()

    def local(a):
        key = jax.random.fold_in(KEY, lax.axis_index("data"))
        return chosen(a, "vocab", key)[1:]

    mesh, specs = mesh_of(AxisType.Auto), layout.specs()
    f = jax.shard_map(
        local, mesh=mesh, in_specs=(given_of(specs),), out_specs=results_of(layout)[1:]
    )
    got = jax.jit(f)(arrays)
    for i, rows in enumerate((slice(0, 2), slice(2, 4))):
        part = arrays | {"hidden": arrays["hidden"][rows]}
        for one, want in zip(got, chosen(part, key=jax.random.fold_in(KEY, i))[1:], strict=True):
            same(jax.tree.map(lambda x, rows=rows: x[rows], one), want)


def test_a_key_that_differs_along_axis_name_is_refused():
    layout, arrays = LAYOUTS["vocabulary"], spread()

    def local(a):
        return chosen(a, "vocab", jax.random.fold_in(KEY, lax.axis_index("vocab")))

    mesh, specs = mesh_of(AxisType.Auto), layout.specs()
    f = jax.shard_map(local, mesh=mesh, in_specs=(given_of(specs),), out_specs=results_of(layout))
    with pytest.raises(ValueError, match=r"^linear_sample: key must be the same on all devices"):
        f(arrays)
