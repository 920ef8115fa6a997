# SPDX-License-Identifier: Apache-2.0
"""The forms for a lone CPU, called directly: chunks of rows, columns, whole blocks, from the label.

That every function is right in them is what the fixture `device` of other files is for.
"""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from assertions import accumulation, assert_within
from cases import generator, on_device, x64

import jaxsoftmax as js
from jaxsoftmax import _cpu as forms
from jaxsoftmax import _row_sums as rows_of

ULP = 2.0**-23
SIZES = [("float32", v) for v in (1, 2, 16, 17, 2047, 2048, 2049, 2176, 2177)] + [
    (dtype, v) for dtype in ("float64", "bfloat16", "float16") for v in (16, 300, 2049)
]


def on_cpu(z, labels=None):
    return forms.shift_and_remainder(forms.upcast, z, labels)


def on_one_device(z, labels=None):
    """What the functions call, where there is one CPU device."""
    with contextlib.contextmanager(on_device)("one CPU device"):
        return [np.asarray(a) for a in jax.jit(rows_of.shift_and_remainder)(z, labels)]


def chunks_of(rows: int, classes: int, dtype="float32") -> int:
    """Bytes of so many rows in the accumulation dtype."""
    return rows * classes * accumulation(dtype).itemsize


def assert_remainder(r, z, m, taken, dtype):
    """The sum of all exponentials but that of the class `taken`, measured from m.

    Equations (41) and (42); measured from another class than the maximum, with the distances
    to m in place of the gaps.
    """
    classes = z.shape[-1]
    inside = np.isfinite(z) & (np.arange(classes) != np.asarray(taken)[:, None])
    difference = np.where(inside, z - m[:, None], 0)
    e = np.where(inside, np.exp(difference), 0)
    true = e.sum(-1)
    mean = (e * np.abs(difference)).sum(-1) / np.maximum(true, 1e-300)
    chain, info = max(10.0, classes**0.5), np.finfo(accumulation(dtype))
    bound = (mean + 2 + chain) * float(info.eps) / 2 * true + classes * float(info.tiny)
    assert_within(r, true, bound, f"{dtype} {classes}")


def test_the_device_fixture_chooses_what_runs(device, monkeypatch):
    calls = []
    form = lambda x, argmax: calls.append(x.shape) or (x[:, 0],) * 2  # noqa: E731
    monkeypatch.setattr(forms, "_by_block", form)
    jax.clear_caches()
    js.logsumexp(jnp.zeros((3, 4099)), axis=-1)
    jax.clear_caches()
    assert calls == ([] if device == "anywhere" else [(3, 4099)])


@pytest.mark.parametrize(("dtype", "classes"), SIZES)
@pytest.mark.parametrize("n", [1, 13], ids=["one row", "ragged chunks"])
def test_statistics(monkeypatch, classes, dtype, n):
    """(m, r) of every threshold, with the last chunk of rows moved back over seen ones."""
    rng = generator("statistics", classes, dtype, n)
    z = (3 * rng.standard_normal((n, classes))).astype(jnp.dtype(dtype))
    if n > 1:
        z[1, -1] = 30  # the maximum in the last, perhaps short, block
        z[2, 0] = z[2, -1] = z[2, classes // 2] = 31  # ties in different blocks
        z[3] = -1e4
        z[4, : classes // 2] = -np.inf
        z[5] = 0
        z[6, : max(classes - 1, 0)] = -np.inf
        z[7, -1] = 90  # all other terms may underflow
    monkeypatch.setattr(forms, "_CHUNK_BYTES", chunks_of(5, classes, dtype))
    with x64(dtype):
        m, r = jax.jit(on_cpu)(jnp.asarray(z))
    wide = z.astype(np.longdouble)
    np.testing.assert_array_equal(np.asarray(m, np.longdouble), wide.max(-1))
    assert_remainder(r, wide, wide.max(-1), wide.argmax(-1), dtype)


@pytest.mark.parametrize(("dtype", "classes"), [*SIZES, ("float32", 512), ("float64", 2176)])
@pytest.mark.parametrize("again", [1, 2, 100], ids=["row by row", "by pairs", "all rows at once"])
def test_statistics_from_the_label(monkeypatch, classes, dtype, again):
    """(m, r) from the label's logit, where that is near enough; else from the maximum."""
    rng = generator("from the label", classes, dtype)
    n = 13
    z = (3 * rng.standard_normal((n, classes))).astype(jnp.dtype(dtype))
    labels = rng.integers(0, classes, n, dtype=np.int32)
    rows = np.arange(n)
    z[1:5, 0] = 8
    z[rows[1:5], labels[1:5]] = [30, 8, -7, -11]  # leads, ties, is near, is too far
    z[5, 0], z[5, labels[5]] = 60, -60  # exp(120) is no float32
    if classes > 1:
        z[6, labels[6]] = -np.inf
    z[7] = 3e4
    z[9], z[9, labels[9]] = -1e4, 0
    z[10] = 5
    wide = z.astype(np.longdouble)
    monkeypatch.setattr(forms, "_CHUNK_BYTES", chunks_of(5, classes, dtype))
    monkeypatch.setattr(forms, "_AGAIN_BYTES", chunks_of(again, classes, dtype))
    with x64(dtype):
        m, r = jax.jit(on_cpu)(jnp.asarray(z), jnp.asarray(labels))
    m, index, top = np.asarray(m, np.longdouble), labels, wide.max(-1)
    if classes >= 2048:  # or from the largest of the first classes, if that is higher
        few = min(128, classes // 64)
        seen = wide[:, :few].argmax(-1)
        index = np.where(wide[rows, seen] > wide[rows, index], seen, index)
    of_label = wide[rows, index]
    from_top = m == top
    assert (from_top | (m == of_label)).all()
    # The columns, the blocks and the short rows are measured from there while that is near.
    upcast = accumulation(dtype) != z.dtype
    if classes <= 16 or (not upcast and (classes < 2048 or classes == 2176)):
        with np.errstate(over="ignore", invalid="ignore"):
            rest = np.exp(wide - of_label[:, None]).sum(-1) - 1
        assert (m == of_label)[rest < 2.0**24 * 0.999].all()
        assert from_top[~(rest < 2.0**24 * 1.001)].all()
    assert_remainder(r, wide, m, np.where(m == of_label, index, wide.argmax(-1)), dtype)


@pytest.mark.parametrize("shape", [(0, 3), (0, 4096), (2, 0, 300), (2, 3, 2049), (2049,)], ids=str)
def test_statistics_of_any_batch_shape(shape):
    m, r = jax.jit(on_cpu)(jnp.zeros(shape, jnp.float32))
    assert m.shape == r.shape == shape[:-1]
    np.testing.assert_array_equal(m, 0)
    np.testing.assert_array_equal(r, shape[-1] - 1)


@pytest.mark.parametrize("confident", [True, False])
@pytest.mark.parametrize("classes", [512, 1000, 2048, 3000, 4097, 50257])
def test_the_remainder_where_the_exponentials_sum_to_about_two(classes, confident):
    """It is taken anew for rows whose exponentials sum to less than 2, if there is any.

    At 2 no accuracy is to be lost on either side, and ties stay on theirs.
    """
    assert forms._whole_block(classes) is not None
    rng = generator("about two", classes)
    rows = [rng.standard_normal(classes), np.zeros(classes)]
    if confident:
        for rest in (1e-30, 1e-6, 0.5, 1 - 1e-6, 1 - 1e-7, 1.0, 1 + 1e-7, 1 + 1e-6, 1.5):
            parts = rng.dirichlet(np.ones(classes - 1)) * rest
            top = rng.integers(classes)
            rows.append(np.insert(np.log(parts), top, 0.0) + 3.0)
    for places in ((0, 1), (0, classes - 1), (classes // 2, classes - 1, classes - 2)):
        ties = np.full(classes, -40.0)
        ties[list(places)] = 1.5
        rows.append(ties)
    z = np.stack(rows).astype(np.float32)
    if not confident:
        assert (np.exp(z.astype(np.float64) - z.max(-1, keepdims=True)).sum(-1) >= 2).all()
    m, r = on_one_device(z)
    np.testing.assert_array_equal(m, z.max(-1))
    # exp(z − max) exactly, of the difference as float32 rounds it; all but one maximum.
    e = np.exp((z - z.max(-1, keepdims=True)).astype(np.float64))
    e[np.arange(len(z)), z.argmax(-1)] = 0
    true = e.sum(-1)
    # An exponential of XLA's is within 2 ulps; sums of blocks, then of √(2C) numbers or fewer in
    # turn, round to within log2 of as many; s − 1 doubles both.
    assert (np.abs(r - true) <= 2 * (2 + np.log2(classes)) * ULP * true).all()


@pytest.mark.parametrize("classes", [3, 100, 512, 2048, 2049, 4096, 50257])
@pytest.mark.parametrize("label", [None, 0, 1])
def test_rows_that_are_not_finite(monkeypatch, classes, label):
    """Each (m, r) is what it is without the others."""
    at, middle, last, nan, inf = label or 0, classes // 2, classes - 1, np.nan, np.inf
    bad: list[tuple[dict, tuple]] = [
        ({middle: nan}, (nan, nan)),
        ({at: nan}, (nan, nan)),
        ({last: nan}, (nan, nan)),
        ({at: inf}, (inf, nan)),
        ({middle: inf}, (inf, nan)),
        ({last: inf}, (inf, nan)),
        ({at: inf, last: nan}, (nan, nan)),
        ({last: inf, middle: nan}, (nan, nan)),
        (dict.fromkeys(range(classes), -inf), (-inf, nan)),
        ({at: -inf}, (0, classes - 2)),
        ({last: -inf}, (0, classes - 2)),
    ]
    z, expected = np.zeros((2 * len(bad) + 1, classes), np.float32), []
    for row, (numbers, statistics) in zip(z[1::2], bad, strict=True):
        row[list(numbers)] = list(numbers.values())
        expected += [(0, classes - 1), statistics]
    labels = None if label is None else jnp.full(len(z), label, jnp.int32)
    monkeypatch.setattr(forms, "_CHUNK_BYTES", chunks_of(4, classes))
    found = np.stack(on_one_device(z, labels), -1)
    np.testing.assert_array_equal(found, [*expected, (0, classes - 1)])


@pytest.mark.parametrize("classes", [3, 100, 4096])
def test_a_row_without_a_label_is_not_recomputed(device, classes):
    """Whatever its first class is, which takes the label's place; out of range, or ignored."""
    z = np.zeros((6, classes), np.float32)
    z[:5, 0] = [-100, -np.inf, np.inf, np.nan, -100]
    labels = jnp.array([-1, -1, -2, -2, -2, 1], jnp.int32)
    m, r = jax.jit(rows_of.shift_and_remainder)(z, labels)
    np.testing.assert_array_equal(m, [forms.UNLABELLED] * 5 + [0])
    np.testing.assert_array_equal(r, [0] * 5 + [classes - 1])


@pytest.mark.parametrize("classes", [10, 100, 4096])
def test_a_mapped_axis_is_one_more_axis_of_rows(classes):
    """Nothing that a condition skips is computed under vmap: the same program, the same memory."""
    rng = generator("mapped", classes)
    z = jnp.asarray(5 * rng.standard_normal((6, 40, classes)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, classes, (6, 40)), jnp.int32)
    z = z.at[0, 0, 1].set(90)

    def form(z, labels):
        rows = (z,) if labels is None else (z, labels)
        static = {"of": forms.upcast, "labelled": labels is not None, "local": True}
        static["argmax"] = False
        return tuple(rows_of._shift_and_remainder.bind(*rows, **static))

    def together(f, z=z, labels=labels):
        program = jax.jit(f).lower(z, labels).compile()
        memory = program.memory_analysis()
        assert memory is not None
        return program(z, labels), memory.temp_size_in_bytes

    equal = np.testing.assert_array_equal
    expected, memory = together(form)
    for mapped in (jax.vmap(form), jax.vmap(jax.vmap(form))):
        got, temporary = together(mapped)
        jax.tree.map(equal, got, expected)
        assert temporary <= memory + z.nbytes // 10 + 4096
    jax.tree.map(equal, together(jax.vmap(form, in_axes=1, out_axes=1))[0], expected)
    of_rows = together(jax.vmap(form, (0, None)), labels=labels[0])[0]
    jax.tree.map(equal, of_rows, form(z, jnp.broadcast_to(labels[0], labels.shape)))
    of_labels = jax.vmap(form, (None, 0))(z[0], labels)
    for got, one in zip(of_labels, form(z[0], None), strict=True):
        equal(got, np.broadcast_to(one, got.shape))
