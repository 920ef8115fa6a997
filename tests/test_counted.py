# SPDX-License-Identifier: Apache-2.0
"""Tokens that do not count: ignored, of weight 0, or outside `where`. Their chunks are left out."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from assertions import assert_close
from cases import on_device
from heads import both_ways, check_head, head, problem
from jax import export, lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from layouts import LAYOUTS, mesh_of, put

import jaxsoftmax as js
from bench.collectives import collectives
from jaxsoftmax._head import sizes
from jaxsoftmax._head.counted import counted_first
from jaxsoftmax._head.layout import HeadSharding

IGNORED = -7
N, H, V = 24, 3, 40
FEW = {"cpu": 2, "other": 3}
# Which of 24 tokens count: some of every shard, of one alone, of several pieces, all and none.
MASKS = {
    "none": np.zeros(N, bool),
    "one": np.arange(N) == 13,
    "some": np.sin(3.0 * np.arange(N)) > 0.3,
    "the first": np.arange(N) < 9,
    "all": np.ones(N, bool),
}


@pytest.fixture(
    scope="module",
    params=[pytest.param("anywhere", marks=pytest.mark.wide), "one CPU device", "one other device"],
)
def device(request):
    """With chunks so small that there are several."""
    with pytest.MonkeyPatch.context() as patch:
        for constant in ("FEWEST_IN_PARTS", "FEWEST_ROWS"):
            patch.setattr(sizes, constant, FEW)
        yield from on_device(request.param)


def broken(arrays, counts):
    """NaN in the hidden state of what does not count, and a label out of range."""
    hidden, kernel, bias, labels = arrays
    hidden = np.where(counts[:, None], hidden, np.nan).astype(hidden.dtype)
    return hidden, kernel, bias, np.where(counts, labels, V + 3).astype(np.int32)


def check_counted(device, gradients, mask, given, dtype=np.float32, **options):
    # Not whole chunks: of one device, or of each of eight pieces.
    n = N if device == "anywhere" else N - 1
    counts = MASKS[mask][:n]
    arrays = problem(n, H, V, dtype)
    hidden, kernel, bias, labels = broken(arrays, counts)
    g = np.where(counts, np.linspace(0.5, 2, n), 0).astype(np.float32)
    if given == "ignored":  # whose weights may be anything
        labels, weights = np.where(counts, labels, IGNORED), np.where(counts, g, np.float32(np.nan))
    else:
        weights = g
    # The truth of what does not count is 0 times anything finite.
    hidden_of_truth = np.where(counts[:, None], hidden, 0).astype(hidden.dtype)
    truth = hidden_of_truth, kernel, bias, arrays[3]
    options = {"chunk_size": 2 if gradients == "in_forward" else 16} | options
    options["ignore_index"] = IGNORED if given == "ignored" else None
    given_arrays = {"given": labels, "given_hidden": hidden}
    ds = check_head(gradients, truth, g, weights=weights, **given_arrays, **options)
    np.testing.assert_array_equal(np.asarray(ds[0], np.float32)[~counts], 0)


@both_ways
@pytest.mark.parametrize("given", ["ignored", "of weight 0"])
@pytest.mark.parametrize("mask", MASKS)
def test_values_and_gradients(device, mask, given, gradients):
    """With NaN in whatever does not count."""
    check_counted(device, gradients, mask, given)


@both_ways
@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_half_precision(device, dtype, gradients):
    check_counted(device, gradients, "some", "ignored", dtype)


def plain(hidden, kernel, bias, labels, weights):
    """The sum of the weighted losses from the definition; those of ignored labels are 0."""
    z = hidden @ kernel + bias[None]
    picked = jnp.take_along_axis(z, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]
    losses = jnp.log(jnp.sum(jnp.exp(z), axis=1)) - picked
    return jnp.sum(jnp.where(labels == IGNORED, 0, weights * losses))


def doubles(mask, given):
    arrays = problem(N, H, V)
    hidden, kernel, bias = (a.astype(np.float64) for a in arrays[:3])
    labels = np.where(MASKS[mask], arrays[3], IGNORED) if given == "ignored" else arrays[3]
    weights = np.linspace(0.5, 2, N)
    weights = weights if given == "ignored" else np.where(MASKS[mask], weights, 0)
    return (hidden, kernel, bias), labels.astype(np.int32), weights


def along(tree):
    return jax.tree.map(jnp.cos, tree)


def forward_over_reverse(f, x):
    return jax.jvp(jax.grad(f), (x,), (along(x),))[1]


def reverse_over_reverse(f, x):
    def slope(x):
        pairs = zip(jax.grad(f)(x), along(x), strict=True)
        return sum(jnp.vdot(d, v) for d, v in pairs)

    return jax.grad(slope)(x)


@both_ways
@pytest.mark.parametrize("given", ["ignored", "of weight 0"])
@pytest.mark.parametrize("order", [jax.grad, forward_over_reverse, reverse_over_reverse])
@pytest.mark.parametrize("of_weights", [False, True], ids=["", "weights too"])
def test_derivatives_of_any_order(device, order, given, gradients, of_weights):
    """In float64. That by a weight of 0 is the token's loss; by hidden and it, the loss's slope."""
    with jax.enable_x64(True):
        operands, labels, weights = doubles("some", given)
        x = (*operands, weights) if of_weights else operands

        options: Any = {"chunk_size": 2 if gradients == "in_forward" else 16, "reduction": "sum"}
        options |= {"ignore_index": IGNORED} if given == "ignored" else {}

        def ours(x):
            hidden, kernel, bias, w = x if of_weights else (*x, weights)
            given = {"bias": bias, "weights": w, "gradients": gradients}
            return head(hidden, kernel, labels, **given, **options)

        def definition(x):
            hidden, kernel, bias, w = x if of_weights else (*x, weights)
            return plain(hidden, kernel, bias, labels, w)

        apply = lambda f: order(f, x) if order is not jax.grad else jax.grad(f)(x)  # noqa: E731
        got, want = (jax.jit(functools.partial(apply, f))() for f in (ours, definition))
        assert_close(got, want, rtol=1e-11, of_largest=1e-11, floor=1)


@both_ways
def test_vmap_checkpoint_and_one_program_for_every_mask(device, gradients):
    hidden, kernel, bias, labels = problem(N, H, V)
    chunk_size = 2 if gradients == "in_forward" else 16
    options: Any = {"gradients": gradients, "chunk_size": chunk_size, "ignore_index": IGNORED}

    traces = []

    @jax.jit
    def step(labels):
        traces.append(1)

        def mean(hidden, kernel):
            return head(hidden, kernel, labels, bias=bias, **options)

        return jax.value_and_grad(mean, (0, 1))(hidden, kernel)

    masked = jnp.stack([np.where(mask, labels, IGNORED) for mask in MASKS.values()])
    one_by_one = [step(each) for each in masked]
    assert len(traces) == 1
    want = jax.tree.map(lambda *leaves: np.stack(leaves), *one_by_one)
    assert_close(jax.jit(jax.vmap(step))(masked), want, of_largest=1e-6)

    def kept(hidden, kernel, labels):
        return jax.checkpoint(functools.partial(head, bias=bias, **options))(hidden, kernel, labels)

    got = jax.jit(jax.value_and_grad(kept, (0, 1)))(hidden, kernel, masked[2])
    assert_close(got, one_by_one[2], of_largest=1e-6)
    with jax.disable_jit():
        assert_close(step(masked[2]), one_by_one[2], of_largest=1e-6)


@both_ways
def test_a_program_for_any_number_of_tokens(device, gradients):
    chunk_size = 2 if gradients == "in_forward" else 16
    options: Any = {"gradients": gradients, "chunk_size": chunk_size, "ignore_index": IGNORED}

    def step(hidden, kernel, labels):
        mean = functools.partial(head, labels=labels, **options)
        return jax.value_and_grad(mean, (0, 1))(hidden, kernel)

    (n,) = export.symbolic_shape("n")
    shapes = (n, H), (H, V), (n,)
    kinds = (np.float32, np.float32, np.int32)
    arguments = [jax.ShapeDtypeStruct(*pair) for pair in zip(shapes, kinds, strict=True)]
    exported = export.export(jax.jit(step), platforms=["cpu", "cuda", "tpu"])(*arguments)
    hidden, kernel, _, labels = problem(N, H, V)
    for count in (1, 7, N):
        masked = np.where(MASKS["some"], labels, IGNORED)[:count]
        given = hidden[:count], kernel, masked
        assert_close(exported.call(*given), step(*given), of_largest=1e-6)


def test_only_chunks_with_a_token_that_counts_are_run(device):
    """As the loss itself sees it: it is called once a chunk."""
    calls = []

    def loss(z, labels):
        seen = jax.pure_callback(
            lambda first: calls.append(0) or np.float32(0),
            jax.ShapeDtypeStruct((), np.float32),
            lax.stop_gradient(z[0, 0]),
        )
        return js.softmax_cross_entropy_with_integer_labels(z, labels) + seen

    hidden, kernel, _, labels = problem(N, H, V)
    called = {}
    for mask, counts in MASKS.items():
        calls.clear()
        weights = counts.astype(np.float32)
        mean = functools.partial(js.linear_loss, loss, weights=weights, chunk_size=8)
        value = jax.jit(lambda h, mean=mean: mean(h, kernel, labels))(hidden)
        jax.block_until_ready(value)
        called[mask] = len(calls)
    if device == "one CPU device":
        assert called == {m: -(-int(counts.sum()) // 8) for m, counts in MASKS.items()}
    assert called["none"] == 0
    assert called["one"] <= called["some"] <= called["all"]
    assert called["one"] < called["all"]


@pytest.mark.parametrize("shards", [1, 3])
def test_the_order_is_that_of_a_stable_sort(shards):
    counts = MASKS["some"]
    order = counted_first(jnp.asarray(counts), HeadSharding(token_shards=(shards,)), 1)
    pieces = counts.reshape(shards, -1)
    expected = np.argsort(~pieces, axis=1, kind="stable")
    np.testing.assert_array_equal(order.order, expected)
    np.testing.assert_array_equal(
        np.take_along_axis(expected, np.asarray(order.place), 1), [np.arange(N // shards)] * shards
    )
    assert order.number == pieces.sum(1).max()


FEWER = ("data", "fsdp and vocabulary")
SHARDED = {
    name: () if name in FEWER else pytest.mark.wide
    for name in (*FEWER, "data and sequence", "vocabulary", "data and vocabulary", "fsdp", "hybrid")
}
WAYS = ["automatic", "explicit", "shard_map"]


def sharded(layout, way, gradients):
    """The sum of the losses, its gradients, and the program that computes them, on a mesh."""
    chunk_size = 2 if gradients == "in_forward" else 8
    options: Any = {"gradients": gradients, "chunk_size": chunk_size, "ignore_index": IGNORED}

    def total(hidden, kernel, labels, axis_name=None):
        return head(hidden, kernel, labels, reduction="sum", axis_name=axis_name, **options)

    def by_hand(hidden, kernel, labels):
        specs = layout.specs()

        def local(hidden, kernel, labels):
            width, _ = layout.kernel
            if width is not None:
                kernel = lax.all_gather(kernel, width, axis=0, tiled=True)
            value = total(hidden, kernel, labels, layout.classes)
            return lax.psum(value, layout.token_axes) if layout.token_axes else value

        names = ("hidden", "kernel", "labels")
        of_each = tuple(specs[name] for name in names)
        return jax.shard_map(local, in_specs=of_each, out_specs=P())(hidden, kernel, labels)

    return jax.jit(jax.value_and_grad(by_hand if way == "shard_map" else total, (0, 1)))


@both_ways
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [pytest.param(n, marks=mark) for n, mark in SHARDED.items()])
def test_each_shard_leaves_out_its_own(monkeypatch, name, way, gradients):
    """Also where one shard has nothing to do, with no more sent than one number."""
    for constant in ("FEWEST_IN_PARTS", "FEWEST_ROWS"):
        monkeypatch.setattr(sizes, constant, FEW)
    jax.clear_caches()
    layout = LAYOUTS[name]
    batch, sequence, width, classes = 8, 6, 8, 32
    hidden, kernel, _, labels = problem(batch * sequence, width, classes)
    hidden, labels = hidden.reshape(batch, sequence, width), labels.reshape(batch, sequence)
    counts = np.sin(3.0 * np.arange(batch * sequence)).reshape(labels.shape) > 0.3
    counts[: batch // 2] = False
    masked = np.where(counts, labels, IGNORED).astype(np.int32)
    arrays = {"hidden": hidden, "kernel": kernel, "labels": masked}
    flat = hidden.reshape(-1, width), kernel, jnp.zeros(classes), masked.reshape(-1), np.ones(48)
    want = jax.value_and_grad(plain, (0, 1))(*flat)
    want = want[0], (want[1][0].reshape(hidden.shape), want[1][1])
    mesh = mesh_of(AxisType.Explicit if way == "explicit" else AxisType.Auto)
    with jax.set_mesh(mesh):
        step = sharded(layout, way, gradients)
        there = put(mesh, layout.specs(), arrays)
        given = there["hidden"], there["kernel"], there["labels"]
        assert_close(step(*given), want, of_largest=1e-5)
        sent = collectives(step.lower(*given).compile().as_text() or "")
    jax.clear_caches()
    in_loop = [one for one in sent if one.in_loop]
    # On an automatic mesh XLA chooses, in the same way as without ignored tokens.
    if way != "automatic" and (not layout.classes or gradients == "recompute"):
        assert not in_loop, in_loop
    # Tokens are never gathered.
    tokens = [d for one in sent if one.kind == "all-gather" for d in one.dims if 48 in d]
    assert not tokens or not layout.token_axes, sent


def test_log_probs_outside_where_are_0(device):
    """In every field, whatever the hidden state and the label; those of the others are theirs."""
    counts = MASKS["some"]
    arrays = problem(N, H, V)
    hidden, kernel, bias, labels = broken(arrays, counts)

    def pulled(where, hidden, kernel, bias, labels):
        def fields(hidden, kernel, bias):
            options: Any = {"bias": bias, "where": where, "with_entropy": True, "chunk_size": 16}
            out = js.linear_log_probs(hidden, kernel, labels, **options)
            return jnp.stack(jax.tree.leaves(out))

        values, pull = jax.vjp(fields, hidden, kernel, bias)
        g = np.where(counts[None], np.cos(np.arange(3 * N)).reshape(3, N), 0)
        return values, pull(g.astype(np.float32))

    values, ds = jax.jit(functools.partial(pulled, counts))(hidden, kernel, bias, labels)
    np.testing.assert_array_equal(np.asarray(values)[:, ~counts], 0)
    np.testing.assert_array_equal(np.asarray(ds[0])[~counts], 0)
    want, expected = jax.jit(functools.partial(pulled, None))(*arrays)
    assert_close(values[:, counts], want[:, counts], of_largest=1e-6)
    assert_close(ds, expected, of_largest=1e-6)
