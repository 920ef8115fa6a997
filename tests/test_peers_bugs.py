# SPDX-License-Identifier: Apache-2.0
"""Bugs that other implementations shipped, in the order of our list of them.

Most are inputs of a test that does more; `ELSEWHERE` says which. The others have a test each here,
whose numbers are held against the definitions in long double (`oracle.truth`), within its bounds.
"""

import math
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_memory
from assertions import assert_within
from cases import generator
from heads import (
    WAYS,
    U,
    both_ways,
    check_head,
    head_truth,
    log_probs_and_gradients,
    problem,
    pulled_back,
    statistics_truth,
    total,
)
from jax import export
from oracle import Wide

import jaxsoftmax as js
from bench import formula
from bench.cases import Dtype, Head
from jaxsoftmax._head import token_chunks, vocabulary_blocks

integer = js.softmax_cross_entropy_with_integer_labels
head = js.linear_softmax_cross_entropy

HEADS = "test_linear::test_losses_and_gradients_whatever_the_chunks"
VALUES = "test_values::test_value_and_gradient"
ELSEWHERE = {
    "01 padded columns count as exp(0), where no block divides V (tokamax twice, verl)": HEADS,
    "02 the running maximum starts at 0: logits below −100 (verl)": VALUES,
    "03 label −100 wraps or is clipped: another class is trained (optax, jax-cce, ejkernel)": (
        "test_options::test_values_and_gradients_of_every_option"
    ),
    "05 the probability is rounded before 1 is subtracted (Liger, TransformerEngine)": (
        "test_half_precision::test_confident_columns_of_d_kernel_keep_relative_accuracy"
    ),
    "06 of an unreduced loss's cotangents only the first is used (Liger, for 19 months)": HEADS,
    "07 cotangents of further outputs are dropped (T5X, MaxText, axlearn)": (
        "test_linear::test_log_probs_whatever_the_blocks"
    ),
    "12 the soft cap is not differentiated at the label (Levanter keeps a test)": (
        "test_options::test_values_and_gradients_of_every_option"
    ),
    "14 the bias is taken once for every block of a wide hidden state (Apple CCE #52)": HEADS,
    "15 0 · −inf in dense labels and in the entropy (optax, TRL)": (
        "test_hostile::test_jit_gives_the_definition_and_its_gradient"
    ),
    "16 exp(z − lse) loses 5e-4 at an offset of 10 000 (measured)": VALUES,
    "17 where() leaves the label out: a negative loss (optax)": (
        "test_values::test_losses_and_gradients_over_any_axis"
    ),
    "18 a custom_vjp in a shard_map that checks varying axes (many)": (
        "test_sharding::test_values_and_gradients_are_those_of_one_device"
    ),
    "19 a sharded kernel is gathered again and again (Levanter)": (
        "test_collectives::test_an_explicit_mesh_of_cpus"
    ),
}


def test_every_bug_has_its_test():
    here = Path(__file__)
    for where in ELSEWHERE.values():
        file, _, name = where.partition("::")
        assert f"\ndef {name}(" in here.with_name(f"{file}.py").read_text(encoding="utf-8"), where
    numbers = re.findall(r"^def test_(\d\d)_", here.read_text(encoding="utf-8"), re.M)
    assert sorted([*numbers, *(bug[:2] for bug in ELSEWHERE)]) == [f"{n:02}" for n in range(1, 23)]


@pytest.mark.parametrize("bad", [-1, -100, 130])
def test_04_a_bad_label_has_a_nan_gradient_as_well_as_a_nan_loss(bad):
    """By optax: a label outside [0, C): NaN loss, but a finite gradient."""
    hidden, kernel, bias, labels = problem(9, 5, 130)
    labels[3] = bad
    g = np.ones(9, np.float32)
    out, (d_log_probs, *_) = log_probs_and_gradients(hidden, kernel, bias, labels, g)
    found = [(out.log_probs, d_log_probs[0])]
    for way in WAYS:
        value, (d_hidden, *_) = total(hidden, kernel, bias, labels, gradients=way, weights=g)
        found.append((np.where(np.arange(9) == 3, value, 0), d_hidden))
    for loss, d in found:
        np.testing.assert_array_equal(np.isnan(loss), np.arange(9) == 3)
        np.testing.assert_array_equal(np.isnan(d).all(-1), np.arange(9) == 3)
        np.testing.assert_array_equal(np.isnan(d).any(-1), np.arange(9) == 3)


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


def products(jaxpr, times=1) -> Iterator[tuple[int, int]]:
    """(trips of the loops around it, operations in all of them) of each matrix product."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
            yield times, times * 2 * depth * eqn.outvars[0].aval.size
        for inner in jax.tree.leaves(eqn.params, is_leaf=lambda p: hasattr(p, "eqns")):
            if hasattr(inner, "eqns"):
                trips = times * eqn.params.get("length", 1)
                yield from products(getattr(inner, "jaxpr", inner), trips)


@both_ways
@pytest.mark.parametrize(("platform", "padding"), [("cpu", 0), ("other", 1 / 32)])
def test_13_awkward_sizes_take_no_smaller_blocks(gradients, platform, padding, monkeypatch):
    """By marin #8960: blocks that divide the sizes: 26× slower where N and V are prime."""

    def on_platform(run, plans, *args):
        return run(getattr(plans, platform), *args)

    monkeypatch.setattr(token_chunks, "by_platform", on_platform)
    monkeypatch.setattr(vocabulary_blocks, "by_platform", on_platform)

    def work(n, classes):
        labels = jnp.zeros(n, jnp.int32)
        f = partial(jax.value_and_grad(head, (0, 1)), labels=labels, gradients=gradients)
        jaxpr = jax.make_jaxpr(f)(jnp.zeros((n, 8)), jnp.zeros((8, classes)))
        trips, flops = zip(*products(jaxpr.jaxpr), strict=True)
        return max(trips), sum(flops)

    trips, flops = work(4096, 32768)
    assert trips > (5 if platform == "cpu" else 1)
    for n, classes in ((4093, 32749), (4099, 32771), (4096, 32771), (4099, 32768)):
        prime_trips, prime_flops = work(n, classes)
        assert abs(prime_trips - trips) <= 1
        # Padding is less than one token a chunk on a CPU, and of so many tokens elsewhere.
        rose = prime_flops / flops / (n * classes / (4096 * 32768))
        assert 0.99 <= rose <= 1.01 + padding


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
    for name in ("jaxsoftmax, in forward", "jaxsoftmax, recompute"):
        expected = formula.temporary_bytes(shape, test_memory.order_of(name), "cpu")
        assert found[shape, name] == pytest.approx(expected, rel=0.2), name
