# SPDX-License-Identifier: Apache-2.0
"""Bugs that other implementations shipped, one test each, in the order of our list of them.

Numbers are held against the definitions in long double (`oracle.truth`), within its bounds.
"""

import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import test_memory
from assertions import assert_within
from cases import generator
from heads import (
    WAYS,
    U,
    both_ways,
    check_head,
    check_log_probs,
    head_truth,
    log_probs_and_gradients,
    problem,
    pulled_back,
    statistics_truth,
    total,
)
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from oracle import Wide

import jaxsoftmax as js
from bench import formula
from bench.cases import Dtype, Head
from bench.collectives import collectives

integer = js.softmax_cross_entropy_with_integer_labels
logsumexp: Any = js.logsumexp
head = js.linear_softmax_cross_entropy


@partial(jax.jit, static_argnames=("ignore_index",))
def pulled(z, labels, g, **options):
    """The losses on logits, and the gradient of Σ g · loss."""
    loss, pull = jax.vjp(lambda z: integer(z, labels, **options), z)
    return loss, pull(g)[0]


def check_logits(z, labels):
    """The integer loss and its gradient, for a cotangent that is not uniform."""
    g = np.linspace(-1, 2, len(z)).astype(np.float32)
    t = oracle.truth(z, np.float32)
    loss, d = pulled(z, labels, g)
    assert_within(loss, *oracle.nll(t, labels), "loss")
    assert_within(d, *oracle.nll_gradient(t, labels, g), "gradient")


def test_01_padded_vocabulary_columns_do_not_count(device):
    """Twice tokamax, verl: V not a multiple of the block, logits of scale 1: +0.6 in the loss."""
    for classes in (130, 2050):
        z = generator("padded", classes).standard_normal((3, classes)).astype(np.float32)
        check_logits(z, np.array([0, classes - 1, 7], np.int32))
    check_head("in_forward", problem(7, 5, 130), chunk_size=3)
    check_head("recompute", problem(7, 5, 130), chunk_size=128)


def test_02_the_running_maximum_does_not_start_at_zero(device):
    """By verl: every logit below −100."""
    z = generator("low").standard_normal((3, 2050)) - np.array([[150], [1e3], [1e4]])
    check_logits(z.astype(np.float32), z.argmax(-1).astype(np.int32))
    hidden, kernel, bias, labels = problem(7, 5, 130)
    check_head("in_forward", (hidden, kernel, bias - 150, labels), chunk_size=3)
    check_head("recompute", (hidden, kernel, bias - 150, labels), chunk_size=128)


@both_ways
@pytest.mark.parametrize(("label", "weighted"), [(-100, False), (-1, True), (130, True)])
def test_03_an_ignored_label_never_wraps_and_is_never_clipped(gradients, label, weighted):
    """By optax (−1), jax-cce, ejkernel (with weights): label −100: another class is trained."""
    arrays = problem(9, 5, 130)
    labels = arrays[-1]
    given = np.where(np.arange(9) % 4 == 2, np.int32(label), labels)
    options: Any = {"ignore_index": label}
    g = np.ones(9, np.float32)
    if weighted:
        options["class_weights"] = np.linspace(0.5, 2, 130).astype(np.float32)
        g = options["class_weights"][labels]
    g[given == label] = 0
    d_hidden, *_ = check_head(gradients, arrays, g, given=given, **options)
    assert not np.any(np.asarray(d_hidden)[given == label])
    z = arrays[0] @ arrays[1]
    loss, d = pulled(z, given, np.ones(9, np.float32), **options)
    t = oracle.truth(z, np.float32)
    true, bound = oracle.nll(t, labels)
    assert_within(loss, g * true, g * (bound + U * true))
    assert_within(d, *oracle.nll_gradient(t, labels, g))


@pytest.mark.parametrize("bad", [-1, -100, 130])
def test_04_a_bad_label_has_a_nan_gradient_as_well_as_a_nan_loss(bad):
    """By optax: a label outside [0, C): NaN loss, but a finite gradient."""
    hidden, kernel, bias, labels = problem(9, 5, 130)
    labels[3] = bad
    g = np.ones(9, np.float32)
    out, (d_log_probs, *_) = log_probs_and_gradients(hidden, kernel, bias, labels, g)
    found = [(out.log_probs, d_log_probs[0]), pulled(hidden @ kernel, labels, g)]
    for way in WAYS:
        value, (d_hidden, *_) = total(hidden, kernel, bias, labels, gradients=way, weights=g)
        found.append((np.where(np.arange(9) == 3, value, 0), d_hidden))
    for loss, d in found:
        np.testing.assert_array_equal(np.isnan(loss), np.arange(9) == 3)
        np.testing.assert_array_equal(np.isnan(d).all(-1), np.arange(9) == 3)
        np.testing.assert_array_equal(np.isnan(d).any(-1), np.arange(9) == 3)


@pytest.mark.parametrize("p", [0.99, 0.999, 1 - 1e-6])
def test_05_the_probability_is_not_rounded_before_one_is_subtracted(p):
    """By Liger, TransformerEngine: bfloat16 and a confident row: 100 % off at 0.999."""
    z = (np.log(3 * p / (1 - p)) * np.eye(4)).astype(jnp.bfloat16)
    labels = np.arange(4, dtype=np.int32)
    check_logits(z, labels)  # to one rounding of the truth about the rounded logits
    for way in WAYS:
        check_head(way, (z, np.eye(4).astype(z.dtype), np.zeros(4, np.float32), labels))


def test_06_unreduced_losses_take_a_cotangent_each():
    """By Liger, for 19 months: cotangents that are not uniform: only the first one was used."""
    hidden, kernel, bias, labels = problem(9, 5, 130)
    g = np.linspace(-1, 2, 9).astype(np.float32)
    check_logits(hidden @ kernel, labels)
    by_block = partial(head, chunk_size=64)
    by_token = partial(js.linear_loss, integer, chunk_size=4)
    expected = head_truth(hidden, kernel, bias, labels, g)
    for f in (by_block, by_token):
        of = jax.jit(lambda h, k, b, f=f: f(h, k, labels, bias=b, reduction=None))
        losses, pull = jax.vjp(of, hidden, kernel, bias)
        for got, want in zip((losses, *pull(g)), expected, strict=True):
            assert_within(got, *want)


def test_07_the_cotangent_of_every_output_counts():
    """By T5X, MaxText, axlearn: differentiate the log-normalizer, the entropy, the z-loss."""
    arrays = hidden, kernel, _, _ = problem(9, 5, 130)
    check_log_probs(arrays)
    # (ŷ − y) + 2 λ lse ŷ
    (_, (d, error)), (lse, (p, p_error)), _ = statistics_truth(*arrays).values()
    factor, off = (0.2 * a[:, None] for a in lse)
    d, error = d + factor * p, error + np.abs(factor) * (p_error + 4 * U * p) + off * p
    g = np.linspace(-1, 2, 9).astype(np.float32)
    for way in WAYS:
        _, ds = total(*arrays, gradients=way, z_loss=np.float32(0.1), weights=g)
        for got, want in zip(ds, pulled_back((d, error), g, hidden, kernel), strict=True):
            assert_within(got, *want)


@both_ways
def test_08_both_passes_see_the_same_logits(gradients):
    """By marin #8217: bfloat16 logits forward, float32 backward: at |z| = 640, 86 % off."""
    # Logits of 640 and halves around it, where bfloat16 has steps of 4.
    rng = generator("peaked")
    hidden = np.stack([np.full(8, 32), rng.integers(1, 3, 8)], axis=1)
    kernel = np.stack([np.full(64, 20), rng.integers(-6, 6, 64) / 2])
    labels = rng.integers(64, size=8).astype(np.int32)
    halves = (a.astype(jnp.bfloat16) for a in (hidden, kernel))
    check_head(gradients, (*halves, np.zeros(64, np.float32), labels), chunk_size=16)


@both_ways
@pytest.mark.parametrize(("dtype", "short"), [(jnp.bfloat16, "bf16"), (jnp.float16, "f16")])
def test_09_every_product_takes_half_precision_operands(gradients, dtype, short):
    """By marin #8367, nmoe: float32 ŷ − y makes the backward products float32, 2-13× slower."""
    text = total.lower(*problem(24, 16, 320, dtype), gradients=gradients, chunk_size=8).as_text()
    products = re.findall(r"dot_general.*: \((.*)\) -> (.*)\n", text)
    assert len(products) >= 3
    for operands, result in products:
        assert re.fullmatch(rf"tensor<\w+x{short}>, tensor<\w+x{short}>", operands)
        assert re.fullmatch(r"tensor<\w+xf32>", result)


@both_ways
def test_10_the_kernel_is_never_upcast_as_a_whole(gradients):
    """By jax-cce, TRL: a float32 copy of a half-precision kernel."""
    arrays = problem(24, 16, 320, jnp.bfloat16)
    text = total.lower(*arrays, gradients=gradients, chunk_size=8).as_text()
    upcasts = re.findall(r"convert.*\(tensor<(\w+)xbf16>\) -> tensor<\w+xf32>", text)
    assert not {"16x320", "320x16"} & set(upcasts)


@both_ways
def test_11_the_mean_is_over_the_valid_tokens(gradients):
    """By torch, TransformerEngine, transformers: all ignored; microbatches with other masks."""
    hidden, kernel, bias, labels = problem(12, 5, 130)
    valid = np.array([1, 0, 0, 0, 1, 1, 1, 1, 1, 0, 1, 0], bool)
    given = np.where(valid, labels, -100)

    def mean(part, **options):
        options |= {"gradients": gradients, "reduction": "mean", "ignore_index": -100}
        value, ds = total(hidden[part], kernel, bias, given[part], **options)
        return value, ds[1]

    g = valid / Wide(valid.sum())
    losses, _, d_kernel, _ = head_truth(hidden, kernel, bias, labels, g)
    true, bound = g @ losses.value, g @ (losses.bound + 16 * U * losses.value)
    value, d = mean(slice(None))
    assert_within(value, true, bound)
    assert_within(d, *d_kernel)
    count = np.float32(valid.sum())
    parts = [mean(slice(i, i + 4), denominator=count) for i in (0, 4, 8)]
    value, d = (sum(np.asarray(v).astype(Wide) for v in vs) for vs in zip(*parts, strict=True))
    assert (np.abs(value - true) <= bound).all()
    assert (np.abs(d - d_kernel.value) <= d_kernel.bound).all()
    given[:] = -100
    value, d = mean(slice(None))
    assert value == 0
    assert not np.any(d)


def test_12_the_soft_cap_is_differentiated_at_the_label_too():
    """By Levanter, which keeps a test: logits of the cap's size, the label's among them."""
    raw = np.linspace(-5, 5, 44).reshape(4, 11).astype(np.float32)
    labels = np.array([0, 5, 10, 10], np.int32)
    tanh = np.tanh(raw.astype(Wide) / 3)
    d, bound = oracle.nll_gradient(oracle.truth(3 * tanh, np.float32), labels, np.ones(4))
    # tanh to 8 u makes z wrong by 24 u, twice of which counts, and 1 − tanh² by 16 u absolutely.
    error = (bound + (48 + 4) * U * np.abs(d)) * (1 - tanh**2) + 16 * U * np.abs(d)
    found = [pulled(raw, labels, np.ones(4, np.float32), soft_cap=np.float32(3))[1]]
    eye, zeros = np.eye(11, dtype=np.float32), np.zeros(11, np.float32)  # exact products
    for way in WAYS:
        _, ds = total(raw, eye, zeros, labels, gradients=way, soft_cap=np.float32(3))
        found.append(ds[0])
    for got in found:
        assert_within(got, d * (1 - tanh**2), error)


def products(jaxpr, times=1) -> Iterator[tuple[int, int]]:
    """(trips of the loops around it, operations in all of them) of each matrix product."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            ((contracted,), _), _ = eqn.params["dimension_numbers"]
            depth = eqn.invars[0].aval.shape[contracted]
            yield times, times * 2 * depth * eqn.outvars[0].aval.size
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner, "eqns"):
                trips = times * eqn.params.get("length", 1)
                yield from products(getattr(inner, "jaxpr", inner), trips)


@both_ways
def test_13_awkward_sizes_take_no_smaller_blocks(gradients):
    """By marin #8960: blocks that divide the sizes: 26× slower where N and V are prime."""

    def work(n, classes):
        labels = jnp.zeros(n, jnp.int32)
        f = partial(jax.value_and_grad(head, (0, 1)), labels=labels, gradients=gradients)
        jaxpr = jax.make_jaxpr(f)(jnp.zeros((n, 8)), jnp.zeros((8, classes)))
        trips, flops = zip(*products(jaxpr.jaxpr), strict=True)
        return max(trips), sum(flops)

    trips, flops = work(4096, 32768)
    assert trips > 5
    for n, classes in ((4093, 32749), (4099, 32771), (4096, 32771), (4099, 32768)):
        prime_trips, prime_flops = work(n, classes)
        assert abs(prime_trips - trips) <= 1
        # Padding is less than one token a chunk.
        assert prime_flops / flops == pytest.approx(n * classes / (4096 * 32768), rel=0.01)


@both_ways
def test_14_the_bias_counts_once(gradients):
    """By Apple CCE #52: hidden wider than one block, with a bias: taken once for every block."""
    check_head(gradients, problem(9, 600, 130), chunk_size=4 if gradients == "in_forward" else 32)


def test_15_zero_times_minus_infinity_is_zero():
    """By optax, TRL: −inf logits: NaN in the loss of dense labels and in the entropy."""
    hidden, kernel, bias, labels = problem(9, 5, 130)
    out = np.arange(130) % 3 == 1
    bias[out], labels, g = -np.inf, labels // 3 * 3, np.ones(9, np.float32)
    # The truth is that of the classes that are left.
    z = hidden @ kernel + bias
    y = np.where(out, 0, generator("dense").random((9, 130))).astype(np.float32)
    t = oracle.truth(z[:, ~out], np.float32)
    losses, pull = jax.vjp(js.softmax_cross_entropy, z, y)
    assert_within(losses, *oracle.cross_entropy(t, y[:, ~out]))
    d, d_labels = pull(g)
    assert_within(d[:, ~out], *oracle.cross_entropy_gradient(t, y[:, ~out], g))
    assert not np.any(d[:, out])
    assert (np.asarray(d_labels)[:, out] == np.inf).all()  # lse − z
    kept = (hidden, kernel[:, ~out])
    value, derivative = statistics_truth(*kept, bias[~out], labels // 3 * 2)["entropy"]
    got, (*_, ds) = log_probs_and_gradients(hidden, kernel, bias, labels, g)
    assert_within(got.entropies, *value)
    assert_within(js.label_log_probs(z, labels, with_entropy=True).entropies, *value)
    found = (ds[0], ds[1][:, ~out], ds[2][~out])
    for d, want in zip(found, pulled_back(derivative, g, *kept), strict=True):
        assert_within(d, *want)
    assert not any(np.any(d[..., out]) for d in ds[1:])


def test_16_probabilities_do_not_go_through_the_log_sum_exp():
    """Measured: exp(z − lse) loses 5e-4 at an offset of 10 000."""
    z = (1e4 + generator("offset").standard_normal((9, 130))).astype(np.float32)
    t = oracle.truth(z, np.float32)
    assert t.p.bound.max() < 1e-6
    assert_within(js.softmax(z), *t.p)
    assert_within(js.log_softmax(z), *oracle.log_probabilities(t))
    assert_within(jax.grad(lambda z: logsumexp(z, -1).sum())(z), *t.p)
    check_logits(z, z.argsort(-1)[:, -2].astype(np.int32))


def test_17_masking_the_label_gives_no_negative_loss():
    """By optax: where() leaves the label out, whose share of the loss was still subtracted."""
    z = generator("mask").standard_normal((9, 130)).astype(np.float32)
    where, labels = np.arange(130)[None] % 3 > 0, np.arange(9, dtype=np.int32)
    z[labels, labels] = 20
    t = oracle.truth(np.where(where, z, -np.inf), np.float32)
    loss = np.asarray(integer(z, labels, where=where))
    assert_within(loss, *oracle.nll(t, labels))
    assert (loss[labels % 3 == 0] == np.inf).all()
    y = np.eye(130, dtype=np.float32)[:9] + np.float32(0.01)
    loss = np.asarray(js.softmax_cross_entropy(z, y, where=where))
    assert_within(loss, *oracle.cross_entropy(t, np.where(where, y, 0)))
    assert (loss > 0).all()


OPTIONS: Any = {
    "ignore_index": 7,
    "class_weights": np.linspace(0.5, 2, 40).astype(np.float32),
    "label_smoothing": 0.1,
    "z_loss": 0.1,
    "soft_cap": 3.0,
    "temperature": 0.7,
}


def summed(f, *arguments):
    return sum(jax.tree.map(jnp.sum, jax.tree.leaves(f(*arguments))))


# Sums over a shard's tokens, of hidden [n, H], kernel [H, V] and labels [n].
unreduced = partial(head, reduction=None)
log_probs = partial(js.label_log_probs, with_entropy=True)
SHARDED = {
    "dense": lambda h, k, y: summed(js.softmax_cross_entropy, h @ k, jax.nn.one_hot(y, 40)),
    "integer": lambda h, k, y: summed(integer, h @ k, y),
    "integer, options": lambda h, k, y: summed(partial(integer, **OPTIONS), h @ k, y),
    "softmax": lambda h, k, y: js.softmax(h @ k)[:, 0].sum(),
    "log_softmax": lambda h, k, y: js.log_softmax(h @ k)[:, 0].sum(),
    "logsumexp": lambda h, k, y: logsumexp(h @ k, axis=-1).sum(),
    "log-probs": lambda h, k, y: summed(log_probs, h @ k, y),
    "in forward": partial(head, reduction="sum"),
    "in forward, options": partial(head, reduction="sum", **OPTIONS),
    "recompute": partial(summed, partial(unreduced, chunk_size=16)),
    "recompute, options": partial(summed, partial(unreduced, **OPTIONS)),
    "linear_loss": lambda h, k, y: js.linear_loss(integer, h, k, y, reduction=None).sum(),
    "linear log-probs": partial(summed, partial(js.linear_log_probs, with_entropy=True)),
}


def data_mesh(kind=AxisType.Auto):
    return jax.make_mesh((8,), ("data",), axis_types=(kind,))


@pytest.mark.parametrize("name", SHARDED)
def test_18_shard_map_that_checks_varying_axes(name):
    """By many a custom_vjp: tokens sharded, kernel replicated, check_vma=True."""
    hidden, kernel, _, labels = problem(16, 5, 40)
    specs, f = (P("data"), P(), P("data")), SHARDED[name]
    local = lambda *operands: jax.lax.psum(f(*operands), "data")  # noqa: E731
    sharded = jax.shard_map(local, mesh=data_mesh(), in_specs=specs, out_specs=P(), check_vma=True)
    got, want = (
        jax.tree.leaves(jax.jit(jax.value_and_grad(g, (0, 1)))(hidden, kernel, labels))
        for g in (sharded, f)
    )
    # Both add at most N, H and V terms, each within 40 u and at most 4 times (class weights over
    # temperature) a loss of 8, or 2 ≥ Σ |ŷ − y| times an entry of kernel or hidden.
    sizes = (4 * 8 * 16, 4 * 2 * np.abs(kernel).max(), 4 * np.abs(hidden).sum(0).max())
    for a, b, size in zip(got, want, sizes, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=2 * (16 + 5 + 40 + 40) * U * size)


@both_ways
@pytest.mark.parametrize("spec", [P("data", None), P(None, "data")], ids=["H", "V"])
def test_19_an_fsdp_kernel_is_gathered_once(spec, gradients):
    """By Levanter: a sharded kernel gathered again and again: −5.6 % of training throughput."""
    specs, arrays = (P("data"), spec, P(), P("data")), problem(64, 16, 512)
    mesh = data_mesh(AxisType.Explicit)
    with jax.set_mesh(mesh):
        arrays = [
            jax.device_put(a, NamedSharding(mesh, s)) for a, s in zip(arrays, specs, strict=True)
        ]
        check_head(gradients, arrays, chunk_size=4 if gradients == "in_forward" else 128)
        compiled: Any = total.lower(*arrays, gradients=gradients, chunk_size=4).compile()
    gathers = [c for c in collectives(compiled.as_text()) if c.kind == "all-gather"]
    assert not any(c.in_loop for c in gathers)
    passes = 1 if gradients == "in_forward" else 2
    assert len([c for c in gathers if (16, 512) in c.dims]) <= passes


@both_ways
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_20_every_platform_runs_plain_xla(gradients, platform):
    """Kernels of others ran out of fast memory at odd shapes, and are not partitioned."""
    chunk = 13 if gradients == "in_forward" else 1000
    step = jax.jit(partial(total, gradients=gradients, chunk_size=chunk))
    arrays = problem(33, 17, 2049, jnp.bfloat16)
    assert "custom_call" not in export.export(step, platforms=[platform])(*arrays).mlir_module()


def test_21_parameters_that_a_loss_closes_over_do_not_leak():
    """By MaxText: a traced parameter in the closure of a loss, inside scan."""
    hidden, kernel, _, labels = problem(12, 5, 40)
    scale = np.float32(1.3)

    def f(scale, hidden):
        def step(sum_, one):
            loss = lambda logits, labels: integer(scale * logits, labels)  # noqa: E731
            return sum_ + js.linear_loss(loss, one[0], kernel, one[1], chunk_size=3), None

        xs = (hidden.reshape(2, 6, 5), labels.reshape(2, 6))
        return jax.lax.scan(step, jnp.float32(0), xs)[0]

    with jax.checking_leaks():
        d_scale, d_hidden = jax.jit(jax.grad(f, (0, 1)))(scale, hidden)
    # d/ds = Σ (ŷ − y) z / 6; the product with the scale is rounded once more, at most by δ.
    k, z = scale.astype(Wide) * kernel, hidden.astype(Wide) @ kernel
    size = np.abs(hidden) @ np.abs(kernel)
    d, error = statistics_truth(hidden, k, np.zeros(40), labels)["loss"].derivative
    error = error + 4 * U * size.max(-1, keepdims=True) * np.abs(d)
    bound = (error * np.abs(z) + 64 * U * np.abs(d) * size).sum() / 6
    assert_within(d_scale, (d * z).sum() / 6, bound)
    assert_within(d_hidden, *pulled_back((d, error), np.full(12, 1 / 6), hidden, k)[0])


def test_22_memory_is_the_formula():
    """Docs that promised more than the code ("32 MB at any N"); a shape that nothing divides."""
    shape = Head(3001, 517, 40009, Dtype.FLOAT32)
    found = test_memory.measured("here", [shape])
    for name in ("jaxsoftmax", "jaxsoftmax, recompute"):
        expected = formula.temporary_bytes(shape, test_memory.order_of(name), "cpu")
        assert found[shape, name] == pytest.approx(expected, rel=0.2), name
