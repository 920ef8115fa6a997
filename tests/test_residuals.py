# SPDX-License-Identifier: Apache-2.0
"""What a derivative rule keeps between the two passes: its inputs in their own dtype, and rows.

`jax.vjp` returns a pytree whose leaves are what is kept.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxsoftmax

ROWS, CLASSES = 6, 40
SHAPE = (ROWS, CLASSES)
LABELS = np.arange(ROWS, dtype=np.int32)
MASK = np.arange(ROWS * CLASSES).reshape(SHAPE) % 3 > 0
integer_labels = jaxsoftmax.softmax_cross_entropy_with_integer_labels

dense = jaxsoftmax.softmax_cross_entropy
# Each rule as a function of the logits.
RULES: dict[str, Any] = {
    "softmax": jaxsoftmax.softmax,
    "log_softmax": jaxsoftmax.log_softmax,
    "logsumexp": partial(jaxsoftmax.logsumexp, axis=-1),
    "softmax_cross_entropy_with_integer_labels": partial(integer_labels, labels=LABELS),
    "label_log_probs": partial(
        jaxsoftmax.label_log_probs, labels=LABELS, with_entropy=True, with_predictions=True
    ),
}
MASKED: dict[str, Any] = {
    name: partial(f, where=MASK) for name, f in RULES.items() if name != "label_log_probs"
}
# Of two logits.
DIVERGENCES: dict[str, Any] = {
    name: getattr(jaxsoftmax, name) for name in ("softmax_kl_divergence", "softmax_js_divergence")
}
MASKED["softmax_cross_entropy"] = lambda x: dense(x, jnp.full(SHAPE, 0.1, x.dtype), where=MASK)
# Left to JAX, because the result is larger than anything that is kept.
WITHOUT_A_RULE = {"softmax_jacobian"}

dtypes = pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
wrappers = pytest.mark.parametrize("wrapper", [lambda f: f, jax.jit], ids=["eager", "jit"])


def kept(f, *primals):
    """The distinct arrays that `jax.vjp` keeps."""
    leaves = jax.tree.leaves(jax.vjp(f, *primals)[1])
    arrays = [leaf for leaf in leaves if hasattr(leaf, "shape")]
    return list({id(a): a for a in arrays}.values())


def logits(dtype):
    return jnp.sin(jnp.arange(ROWS * CLASSES, dtype=jnp.float32)).reshape(SHAPE).astype(dtype)


@dtypes
@wrappers
@pytest.mark.parametrize("name", RULES)
def test_one_array_of_the_logits_size_in_their_dtype(name, wrapper, dtype):
    arrays = kept(wrapper(RULES[name]), logits(dtype))
    large = [a for a in arrays if a.size > ROWS]
    assert [(a.shape, a.dtype) for a in large] == [(SHAPE, dtype)]
    rows = [a for a in arrays if a.size <= ROWS]
    assert {a.shape for a in rows} == {(ROWS,)}
    labels = [a for a in rows if a.dtype == jnp.int32]
    statistics = [a for a in rows if a.dtype == jnp.float32]
    assert len(labels) <= 1
    # m and r; with labels the logit there, with the entropy its sum.
    assert len(statistics) == 2 + len(labels) + (name == "label_log_probs")
    assert len(rows) == len(labels) + len(statistics)


@dtypes
@wrappers
def test_options_keep_numbers_a_row_at_most(wrapper, dtype):
    options: Any = {"label_smoothing": 0.1, "z_loss": 0.1, "soft_cap": 9.0, "temperature": 0.5}
    arrays = kept(
        wrapper(partial(integer_labels, labels=LABELS, ignore_index=3, **options)), logits(dtype)
    )
    large = [a for a in arrays if a.size > ROWS]
    assert [(a.shape, a.dtype) for a in large] == [(SHAPE, dtype)]


@dtypes
@wrappers
def test_dense_labels_keep_logits_and_labels_in_their_dtypes(wrapper, dtype):
    y = jnp.full(SHAPE, 0.1, jnp.float16)
    arrays = kept(wrapper(dense), logits(dtype), y)
    large = sorted(str(a.dtype) for a in arrays if a.size > ROWS)
    assert large == sorted([str(jnp.dtype(dtype)), "float16"])
    assert [a.shape for a in arrays if a.size <= ROWS] == 3 * [(ROWS,)]  # m, r and Σ_k y_k


@dtypes
@pytest.mark.parametrize("options", [{}, {"soft_cap": 9.0, "temperature": 0.5}], ids=str)
@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergences_keep_both_logits_in_their_dtypes(name, options, dtype):
    """Of each row its maximum, their number and the remainder, D, the result, and a flag."""
    f = partial(DIVERGENCES[name], **options)
    for mine in ((0, 1), (0,), (1,)):  # whichever is frozen
        pair = logits(dtype), logits(jnp.float16)[::-1]
        arrays = kept(
            lambda *of: f(*(dict(zip(mine, of, strict=True)).get(i, pair[i]) for i in (0, 1))),  # noqa: B023
            *(pair[i] for i in mine),
        )
        large = sorted(str(a.dtype) for a in arrays if a.size > ROWS)
        assert large == sorted([str(jnp.dtype(dtype)), "float16"])
        rows = [a for a in arrays if a.size == ROWS]
        assert sorted(str(a.dtype) for a in rows) == ["bool"] + 8 * ["float32"]
        assert all(a.shape == () for a in arrays if a.size < ROWS)


@dtypes
def test_weights_of_logsumexp_keep_both_in_their_dtype(dtype):
    arrays = kept(lambda x, b: jaxsoftmax.logsumexp(x, -1, b), logits(dtype), logits(dtype) + 2)
    assert [a.dtype for a in arrays if a.size > ROWS] == [dtype, dtype]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@wrappers
@pytest.mark.parametrize("name", MASKED)
def test_a_mask_keeps_nothing_wide(name, wrapper, dtype):
    """Outside of a jitted step JAX also keeps the zeros of `where`; they are as narrow."""
    large = [a for a in kept(wrapper(MASKED[name]), logits(dtype)) if a.size > ROWS]
    assert {a.shape for a in large} == {SHAPE}
    assert {str(a.dtype) for a in large} == {str(jnp.dtype(dtype)), "bool"}
    inputs = 2 if name == "softmax_cross_entropy" else 1
    assert sum(a.dtype == dtype and bool(jnp.any(a != 0)) for a in large) == inputs


def test_the_value_alone_keeps_nothing():
    """Without a derivative, the compiled loss writes the losses and nothing of the logits' size."""
    x = jax.ShapeDtypeStruct((64, 512), jnp.bfloat16)
    y = jax.ShapeDtypeStruct((64,), jnp.int32)
    compiled = jax.jit(integer_labels).lower(x, y).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.output_size_in_bytes == 64 * 4


@pytest.mark.parametrize(
    "name", [*RULES, *DIVERGENCES, "softmax_cross_entropy", "softmax_jacobian"]
)
def test_an_eager_call_is_one_program(name):
    """Operation by operation it would be slower, and hold what lies between them."""
    of_both: dict[str, Any] = {"softmax_cross_entropy": lambda x: dense(x, x)}
    of_both |= {name: lambda x, f=f: f(x, x) for name, f in DIVERGENCES.items()}
    f = (RULES | of_both).get(name) or getattr(jaxsoftmax, name)
    assert [e.primitive.name for e in jax.make_jaxpr(f)(logits(jnp.float32)).eqns] == ["jit"]


def test_every_public_function_is_covered():
    covered = {*RULES, *MASKED, *DIVERGENCES, *WITHOUT_A_RULE}
    heads = {name for name in jaxsoftmax.__all__ if name.startswith("linear")}  # test_memory.py
    other = {"LogProbs", "TopK", "Sample", "check_labels"}
    assert covered == set(jaxsoftmax.__all__) - heads - other
