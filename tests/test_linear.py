# SPDX-License-Identifier: Apache-2.0
"""The linear head against the plain one in long double, whatever the chunks; what it computes."""

import contextlib
import functools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from assertions import assert_close
from cases import on_device, several
from heads import (
    both_ways,
    check_head,
    check_log_probs,
    check_several,
    head,
    head_truth,
    problem,
    total,
)
from jax import export

import jaxsoftmax as js
from jaxsoftmax._head import sizes

SHAPES = [(1, 3, 2), (7, 5, 1), (33, 17, 130), (64, 40, 2049), (5, 300, 257)]
CHUNKS = {(33, 17, 130): [1, 2, 3, 7, 13, 64, 1000]}


integer = js.softmax_cross_entropy_with_integer_labels


def weights_of(n):
    return np.random.default_rng(n).uniform(0, 2, n).astype(np.float32)


def plain_loss(logits, labels):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1))


@pytest.mark.parametrize("gradients", ["auto", "recompute"])
@pytest.mark.parametrize("reduction", ["mean", "sum", None])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_losses_and_gradients_whatever_the_chunks(shape, reduction, gradients):
    arrays, weights = problem(*shape), weights_of(shape[0])
    g, options = weights.astype(np.longdouble), {"reduction": reduction, "weights": weights}
    if reduction == "mean":
        g = g / g.sum()
    elif reduction is None:
        cotangent = np.random.default_rng(1).standard_normal(shape[0]).astype(np.float32)
        g, options["cotangent"] = g * cotangent, cotangent
    chunks = CHUNKS.get(shape, [3, 1000])
    for chunk, transposed in [*((chunk, False) for chunk in chunks), (chunks[0], True)]:
        layout = {"transpose_kernel": transposed}
        ds = check_head(gradients, arrays, g, chunk_size=chunk, **options, **layout)
        if shape[2] == 1:
            assert not any(np.any(d) for d in ds)


SMALL = 64 * 2**20  # bytes of all logits


def equal_parts(n, most, multiple=1):
    """The size of as few parts as `most` allows, a multiple if there are several."""
    if n <= most:
        return n
    parts = math.ceil(n / most)
    return math.ceil(n / parts / multiple) * multiple


@pytest.mark.parametrize("classes", [100, 10_000, 50_257, 1_000_000])
@pytest.mark.parametrize("devices", [1, 8, 12, 600])
def test_the_default_chunk_is_the_documented_one(monkeypatch, devices, classes):
    """What a chunk's float32 logits may hold, from 256 to 4096 tokens; one token more is two.

    Where there are more devices, multiples of their number. No CPU has multiples of 256 besides, or
    of the next smaller power of two that adds 1/32 at most.
    """
    monkeypatch.setattr(jax, "device_count", lambda: devices)

    def boundary(mebibytes, multiple):
        most = min(max(mebibytes * 2**20 // (4 * classes), 256), 4096) // multiple * multiple
        return max(most // devices, 1) * devices

    def on_cpu(tokens):
        return equal_parts(tokens, boundary(56, 1), devices)

    def elsewhere(tokens):
        if 4 * tokens * classes <= SMALL:
            return on_cpu(tokens)
        if tokens <= boundary(512, 256):
            return tokens
        multiples = [math.lcm(devices, 2**k) for k in reversed(range(9))]
        halves = [math.ceil(tokens / 2 / multiple) * multiple for multiple in multiples]
        return next((h for h in halves if 2 * h <= tokens * 33 / 32), halves[-1])

    for most in (boundary(56, 1), boundary(512, 256)):
        for tokens in (most, most + 1):
            seen = set()

            def loss(logits, seen=seen):
                seen.add(logits.shape)
                return logits[:, 0]

            hidden, kernel = symbolic(tokens, 2), symbolic(2, classes)
            jax.eval_shape(functools.partial(js.linear_loss, loss), hidden, kernel)
            assert seen == {(chunk(tokens), classes) for chunk in (on_cpu, elsewhere)}


@pytest.mark.parametrize("devices", [1, 2, 8, 12])
@pytest.mark.parametrize("tokens", [7, 100, 1543, 6000])
def test_chunk_size_is_the_most_tokens_in_a_chunk(tokens, devices):
    """And a multiple of the number of devices where it is no smaller and one is not enough."""
    for chunk_size in (1, 3, 13, 64, 100, 1000):
        for chunks in sizes.chunks(tokens, 64, 100_000, 4, chunk_size, devices):
            assert chunks.size <= chunk_size
            assert chunks.size == tokens or chunk_size < devices or chunks.size % devices == 0


@pytest.mark.parametrize(
    ("width", "chunk_size", "group"),
    [
        (64, None, 1),  # not half of 64 tokens: less than a chunk
        (4096, None, 1),  # half of 4096, in chunks of at most 1536
        (5999, None, 1),
        (6000, None, 4),  # all
        (700, 100, 3),
        (50_000, 100, 60),
    ],
)
def test_the_groups_of_chunks_are_the_documented_ones(width, chunk_size, group):
    """All tokens if their d_logits take at most 4·H·V bytes; else those that take half of that."""
    tokens, classes = 6000, 87_000  # 512 MiB: 1542 tokens
    chunks = sizes.chunks(tokens, width, classes, 4, chunk_size, 1)
    assert chunks.cpu.group == 1
    assert chunks.other.group == group
    if chunk_size is None:
        assert chunks.other.size == 1536  # a quarter, and a multiple of 256: 1/42 more
    half = sizes.chunks(tokens, width, classes, 2, chunk_size, 1).other
    assert half == sizes.chunks(tokens, 2 * width, classes, 4, chunk_size, 1).other


PLATFORMS = ("cpu", "cuda", "tpu")


def lowered(platform, f, *shapes):
    """The program for a platform, of float32 arrays but the last, of labels."""
    *real, labels = shapes
    arguments = [*(symbolic(*shape) for shape in real), symbolic(*labels, dtype=np.int32)]
    return jax.jit(f).trace(*arguments).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize(
    ("tokens", "classes"), [(5, 5000), (4096, 50_000), (40_000, 30_000)], ids=str
)
def test_the_default_block_is_the_documented_one(tokens, classes, platform):
    block = 2048
    if platform != "cpu" and 4 * tokens * classes > SMALL:
        most = min(max(256 * 2**20 // (4 * tokens), 2048), 8192) // 256 * 256
        block = equal_parts(classes, most, 256)
    assert (block == 2048) == (tokens != 4096 or platform == "cpu")
    program = lowered(platform, js.linear_log_probs, (tokens, 3), (3, classes), (tokens,))
    widths = {int(n) for n in re.findall(rf"tensor<{tokens}x(\d+)xf32>", program)} - {1, 2, 3}
    assert widths <= {block, classes % block}
    assert block in widths


@pytest.mark.parametrize("platform", PLATFORMS)
@pytest.mark.parametrize("options", [{}, {"chunk_size": 1024}, {"reduction": None}], ids=str)
@pytest.mark.parametrize("device", ["one CPU device", "several, unknown"])
def test_the_default_order_is_the_documented_one(options, platform, device):
    """Large logits on a TPU are computed again, if nobody says how large chunks are.

    Not if they may be sharded over a mesh that is not set.
    """

    def products(tokens, classes, **options):
        def total(*arguments):
            return jnp.sum(head(*arguments, **options))

        shapes = (tokens, 3), (3, classes), (tokens,)
        return lowered(platform, jax.grad(total, (0, 1)), *shapes).count("dot_general")

    with contextlib.contextmanager(on_device)(device):
        for tokens, large in ((2048, False), (2049, device == "one CPU device")):
            found = products(tokens, 8192, **options)
            if "reduction" in options or (large and platform == "tpu" and not options):
                assert found == products(tokens, 8192, **options, gradients="recompute")
            else:
                assert found == products(tokens, 8192, **options, gradients="in_forward")
                # One CPU device may add the last columns of d_kernel by themselves.
                assert found == 3 or (platform, device) == ("cpu", "one CPU device")


@pytest.mark.parametrize("chunk_size", [37, 299, 300, 999])
def test_log_probs_whatever_the_blocks(chunk_size):
    arrays, transposed = problem(33, 17, 300), chunk_size == 37
    check_log_probs(arrays, chunk_size=chunk_size, with_entropy=transposed)
    check_log_probs(arrays, chunk_size=chunk_size, transpose_kernel=transposed)
    check_several(arrays, chunk_size=chunk_size, with_entropy=not transposed)


@both_ways
@pytest.mark.parametrize("scale", [1.0, 30.0, 300.0])
def test_bfloat16_is_no_worse_than_the_plain_head_with_upcast(scale, gradients):
    hidden, kernel, bias, labels = arrays = problem(64, 40, 2049, jnp.bfloat16, scale)
    losses, *expected = head_truth(*arrays, g=np.full(64, 1 / 64))
    value, got = total(*arrays, reduction="mean", gradients=gradients, chunk_size=30)

    def plain(hidden, kernel):
        z = jnp.dot(hidden, kernel, preferred_element_type=jnp.float32)
        return plain_loss(z + bias[None], labels)

    baseline = jax.grad(plain, (0, 1))(hidden, kernel)
    np.testing.assert_allclose(value, float(losses.value.mean()), rtol=1e-5)
    for d, base, (want, _) in zip(got[:2], baseline, expected[:2], strict=True):
        assert d.dtype == jnp.bfloat16
        error, base_error = (
            np.linalg.norm(np.asarray(a, np.float64) - want) / np.linalg.norm(want)
            for a in (d, base)
        )
        assert error <= 1.05 * base_error + 2.0**-10


@pytest.mark.parametrize(("gradients", "products"), [("in_forward", 3), ("recompute", 4)])
def test_nothing_unneeded_is_computed(gradients, products):
    hidden, kernel, _, labels = problem(8, 4, 16)
    f = functools.partial(head, labels=labels, gradients=gradients)

    def count(f):
        return jax.jit(f).lower(hidden, kernel).as_text().count("dot_general")

    assert count(f) == 1
    assert count(jax.grad(f)) == products - 1
    assert count(jax.grad(f, 1)) == products - 1
    assert count(jax.grad(f, (0, 1))) == products


def test_d_kernel_is_added_up_by_block_of_columns():
    """On one CPU device in blocks of 8 MiB of the product, and the columns that are left."""
    *operands, labels = problem(7, 2048, 2 * 1024 + 3)
    labels[:3] = 0, 1024, 2050  # one in each
    with contextlib.contextmanager(on_device)("one CPU device"):
        check_head("auto", (*operands, labels), chunk_size=4)


def test_d_kernel_of_a_float32_mean_is_finished_by_the_loop():
    """The divisor goes into the weights of the tokens: no pass over d_kernel follows."""
    hidden, kernel, _, labels = problem(64, 40, 2049)
    f = functools.partial(head, hidden, labels=labels, chunk_size=16)
    program = jax.jit(jax.grad(f)).lower(kernel).compile().as_text()
    assert program
    assert re.search(r"f32\[40,2049\]\S* add\(", program)  # what such a pass would look like
    assert not re.search(r"f32\[40,2049\]\S* multiply\(", program)


@pytest.mark.wide
@both_ways
def test_vmap_of_any_operand(gradients):
    """Beside a cotangent that is not 1; `test_transforms` maps hidden states alone."""
    hidden, kernel, bias, labels = problem(7, 5, 40)
    pair = np.stack([hidden, 2 * hidden]), np.stack([kernel, -kernel])

    def step(f):
        return jax.value_and_grad(lambda h, k: 1024 * f(h, k), (0, 1))

    def plain(hidden, kernel):
        z = jnp.dot(hidden, kernel, precision="highest") + bias[None]
        return plain_loss(z, labels)

    chunked = functools.partial(head, labels=labels, bias=bias, gradients=gradients, chunk_size=3)
    for axes in ((0, None), (None, 0), (0, 0)):
        given = [a if axis == 0 else a[0] for a, axis in zip(pair, axes, strict=True)]
        got, want = (jax.vmap(step(f), axes)(*given) for f in (chunked, plain))
        assert_close(got, want, rtol=2e-4, of_largest=1e-5)


@pytest.mark.parametrize("name", ["in_forward", "recompute", "unreduced", "log_probs"])
def test_what_is_differentiated_is_asked_anew(name):
    """Of one traced head, whatever was differentiated before: calls leave no mark."""
    *operands, labels = problem(7, 5, 40)

    @jax.jit
    def f(hidden, kernel, bias, scale):
        given = hidden, kernel, labels
        if name == "log_probs":
            out = js.linear_log_probs(*given, bias=bias, temperature=scale)
            return jnp.mean(out.log_probs)
        if name == "unreduced":
            loss = lambda z, y: scale * integer(z, y)  # noqa: E731
            return jnp.mean(js.linear_loss(loss, *given, bias=bias, reduction=None))
        return head(*given, bias=bias, temperature=scale, gradients=name)

    arguments = (*operands, np.float32(1.3))
    true = jax.grad(f, range(4))(*arguments)
    for chosen in ((0,), (3,), (1, 2), (2,), (0, 3), (1,), (0, 1, 2, 3)):
        for g in (f, jax.checkpoint(f)):
            got = jax.grad(g, chosen)(*arguments)
            assert_close(got, [true[i] for i in chosen], of_largest=1e-6)


@both_ways
def test_a_bad_label_is_one_token_of_a_mean_with_class_weights(gradients):
    """Its loss and its gradient are NaN, the others' what they are with 1 for its class weight."""
    *operands, labels = problem(5, 3, 10)
    weights, class_weights = weights_of(5), np.linspace(0.5, 2, 10, dtype=np.float32)

    @jax.jit
    def step(hidden, class_weights, given):
        options = {"bias": operands[2], "weights": weights, "class_weights": class_weights}
        f = functools.partial(head, gradients=gradients, chunk_size=3)
        total = lambda h, u: f(h, operands[1], given, **options | {"class_weights": u})  # noqa: E731
        return jax.value_and_grad(total, (0, 1))(hidden, class_weights)

    others = np.arange(5) != 2
    counts = weights * np.where(others, class_weights[labels], 1)
    g = weights * class_weights[labels] / counts.sum()
    (expected, _) = head_truth(*operands, labels=labels, g=g)[1]
    for bad in (-1, 10):
        given = np.where(others, labels, bad)
        value, (d, d_weights) = step(operands[0], class_weights, given)
        assert np.isnan(value)
        np.testing.assert_allclose(d[others], expected[others].astype(float), rtol=1e-5, atol=1e-6)
        assert np.isnan(d[2]).all()
        # Of the mean's divisor each class has a share, whose derivative is that of a NaN mean.
        assert np.isnan(d_weights[labels[others]]).all()


def test_no_weight():
    hidden, kernel, _, labels = problem(5, 3, 10)
    nothing = {"weights": np.zeros(5, np.float32), "reduction": "mean", "gradients": "auto"}
    value, ds = total(hidden, kernel, np.zeros(10, np.float32), labels, **nothing)
    assert value == 0
    assert not any(np.any(d) for d in ds)


@pytest.mark.parametrize("reduction", ["sum", None])
def test_a_loss_without_a_derivative_where_the_weight_is_0(reduction):
    """The norm of logits that are 0, though all is finite: 0 · NaN is no part of d_kernel."""
    hidden, kernel, *_ = problem(5, 3, 10)
    weights = np.array([1, 0, 0.5, 2, 0], np.float32)
    used = weights != 0
    hidden[~used] = 0

    def total(hidden, kernel):
        options = {"weights": weights, "reduction": reduction, "chunk_size": 2}
        norm = lambda z: jnp.sqrt(jnp.sum(z**2, axis=-1))  # noqa: E731
        return jnp.sum(js.linear_loss(norm, hidden, kernel, **options))

    z = (hidden @ kernel).astype(np.float64)[used]
    norms = np.linalg.norm(z, axis=-1, keepdims=True)
    d = weights[used, None] * z / norms
    value, (d_hidden, d_kernel) = jax.value_and_grad(total, (0, 1))(hidden, kernel)
    assert not np.any(d_hidden[~used])
    want = weights[used] @ norms[:, 0], d @ kernel.T, hidden[used].T @ d
    assert_close((value, d_hidden[used], d_kernel), want, rtol=1e-5, atol=1e-6)


@both_ways
def test_nothing_is_added_where_every_token_counts(gradients):
    """Without weights and ignored tokens nobody looks for what is not finite."""
    hidden, kernel, _, labels = problem(5, 3, 10)

    def looks(**options):
        f = functools.partial(head, labels=labels, gradients=gradients, **options)
        return jax.jit(jax.grad(f, (0, 1))).lower(hidden, kernel).as_text().count("is_finite")

    assert looks(weights=weights_of(5)) > looks()
    # Those of the rule itself: of rows without a log-sum-exp.
    assert looks(ignore_index=-1) == looks()


def test_tokens_in_several_axes():
    hidden, kernel, _, labels = problem(64, 17, 130)
    flat = js.linear_log_probs(hidden, kernel, labels)
    folded = js.linear_log_probs(
        hidden.reshape(4, 16, 17), kernel, labels.reshape(4, 16), chunk_size=50
    )
    assert folded.log_probs.shape == (4, 16)
    np.testing.assert_allclose(folded.log_probs.reshape(-1), flat.log_probs, rtol=1e-5)
    one = head(hidden[0], kernel, labels[0], reduction=None)
    np.testing.assert_allclose(one, -flat.log_probs[0], rtol=1e-5)


@both_ways
def test_a_head_of_width_0_has_its_bias_for_logits(gradients):
    _, _, bias, labels = problem(5, 3, 10)
    nothing = np.zeros((5, 0), np.float32), np.zeros((0, 10), np.float32)
    ds = check_head(gradients, (*nothing, bias, labels), chunk_size=2)
    assert [d.shape for d in ds[:2]] == [a.shape for a in nothing]


@pytest.mark.parametrize("x64", [False, True])
def test_losses_of_any_dtype_come_in_that_of_sums(x64):
    """Whatever `loss_fn` gives, reduced or not, with and without tokens."""
    with jax.enable_x64(x64):
        hidden, kernel = (np.ones(s, np.float64 if x64 else np.float16) for s in ((5, 3), (3, 10)))
        for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
            for reduction in ("mean", None):
                for n in (5, 0):

                    def f(hidden, dtype=dtype, reduction: Any = reduction):
                        loss = lambda z: z[:, 0].astype(dtype)  # noqa: E731
                        return js.linear_loss(loss, hidden, kernel, reduction=reduction)

                    out, pull = jax.vjp(f, hidden[:n])
                    assert out.dtype == (jnp.float64 if x64 else jnp.float32)
                    assert pull(jnp.ones_like(out))[0].dtype == hidden.dtype


def symbolic(*shape, dtype: Any = np.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


HEADS: dict[str, Any] = {
    "in forward": head,
    "in forward, small chunks": functools.partial(head, chunk_size=3),
    "recompute": functools.partial(head, gradients="recompute", chunk_size=3),
    "log-probabilities": functools.partial(js.linear_log_probs, with_entropy=True),
    "several labels": lambda hidden, kernel, labels: js.linear_log_probs(
        hidden, kernel, several(labels, 10), with_predictions=True, chunk_size=3
    ),
    "any loss": functools.partial(js.linear_loss, integer, reduction=None, chunk_size=3),
}


@pytest.mark.parametrize(
    ("device", "name"),
    [("anywhere", "in forward"), *(("one CPU device", name) for name in HEADS)],
    indirect=["device"],
)
def test_value_and_gradient_exported_for_any_number_of_tokens(device, name):
    """One program for cpu, cuda and tpu, of two axes of tokens whose sizes it does not know."""

    def step(hidden, kernel, labels):
        def total(hidden, kernel):
            results = jax.tree.leaves(HEADS[name](hidden, kernel, labels))
            return sum(jnp.sum(x.astype(jnp.float32)) for x in results)

        return jax.value_and_grad(total, (0, 1))(hidden, kernel)

    tokens = export.symbolic_shape("batch, length")
    exported = export.export(jax.jit(step), platforms=["cpu", "cuda", "tpu"])(
        symbolic(*tokens, 4), symbolic(4, 10), symbolic(*tokens, dtype=np.int32)
    )
    _, kernel, *_ = problem(1, 4, 10)
    for shape in ((1, 1), (5, 7)):
        hidden, _, _, labels = problem(shape[0] * shape[1], 4, 10)
        arguments = (hidden.reshape(*shape, 4), kernel, labels.reshape(shape))
        got, want = exported.call(*arguments), jax.jit(step)(*arguments)
        assert_close(got, want, rtol=1e-5, atol=1e-5)


@both_ways
def test_only_a_mean_of_nothing_hides_a_division_by_zero(gradients):
    hidden, kernel, _, labels = problem(5, 3, 10)
    mean = functools.partial(head, hidden, kernel, labels, gradients=gradients)
    assert not np.isfinite(mean(denominator=0.0))
    assert not np.isfinite(mean(weights=np.array([1.0, -1, 0, 0, 0], np.float32)))
    assert mean(denominator=0.0, weights=np.zeros(5, np.float32)) == 0
