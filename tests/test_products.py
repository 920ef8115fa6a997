# SPDX-License-Identifier: Apache-2.0
"""How the products take their operands: `transpose_kernel` and `compute_dtype`.

`heads.check_head` holds both against the truth of the operands as they are taken; the tests of
heads, meshes and orders have the transposed kernel among their cases.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from assertions import assert_close
from cases import on_device
from heads import both_ways, check_head, head, head_truth, problem, total

import jaxsoftmax as js

DTYPES: list[Any] = [np.float16, jnp.bfloat16, np.float32]


def of_dtypes(hidden, kernel):
    arrays: Any = problem(9, 5, 130)
    return arrays[0].astype(hidden), arrays[1].astype(kernel), *arrays[2:]


anywhere = pytest.param("anywhere", marks=pytest.mark.wide)


@pytest.fixture(scope="module", params=[anywhere, "one other device"])
def platform(request):
    yield from on_device(request.param)


@both_ways
@pytest.mark.parametrize("compute", DTYPES, ids=lambda d: jnp.dtype(d).name)
@pytest.mark.parametrize(
    "operands",
    [*itertools.product(DTYPES, DTYPES)],
    ids=lambda d: "-".join(jnp.dtype(x).name for x in d),
)
def test_compute_dtype_is_that_of_the_operands_cast(platform, operands, compute, gradients):
    """The truth is that of the operands cast; each gradient is rounded to its operand's dtype.

    A float32 one is rounded to nothing less: only d_logits were, as in any product of `compute`.
    """
    options = {"compute_dtype": compute, "transpose_kernel": operands[0] == np.float32}
    chunk_size = 3 if gradients == "in_forward" else 64
    check_head(gradients, of_dtypes(*operands), chunk_size=chunk_size, **options)


@both_ways
@pytest.mark.parametrize("compute", [jnp.bfloat16, np.float16])
def test_d_kernel_of_a_float32_kernel_is_never_rounded_to_half(platform, compute, gradients):
    """One token, one of its numbers a power of two: d_kernel there is d_logits, in `compute`.

    Two tokens: their sum, which `compute` cannot hold.
    """
    hidden = np.array([[1.0], [1 / 4096]], np.float32)
    _, kernel, bias, labels = problem(2, 1, 40)
    options = {"gradients": gradients, "chunk_size": 1 if gradients == "in_forward" else 16}

    def d_kernel(n):
        given = hidden[:n], kernel, bias, labels[:n]
        _, (_, d, _) = total(*given, compute_dtype=compute, **options)
        assert d.dtype == np.float32
        return np.asarray(d)

    half = lambda a: a.astype(jnp.dtype(compute)).astype(np.float32)  # noqa: E731
    alone, both = d_kernel(1), d_kernel(2)
    if compute == jnp.bfloat16:  # float16's are times a power of two
        np.testing.assert_array_equal(alone, half(alone))
    assert np.mean(both != half(both)) > 0.9
    assert np.mean(both != alone) > 0.9


@both_ways
def test_float64_products_of_float32_operands(gradients):
    hidden, kernel, bias, labels = arrays = problem(9, 5, 130)
    with jax.enable_x64(True):
        value, ds = total(*arrays, gradients=gradients, compute_dtype="float64", chunk_size=16)
        value = np.asarray(value)
    assert value.dtype == np.float64
    losses, *expected = head_truth(hidden, kernel, bias, labels, np.ones(9))
    np.testing.assert_allclose(value, float(losses.value.sum()), rtol=1e-14)
    for d, (want, _) in zip(ds, expected, strict=True):
        assert d.dtype == np.float32
        # Rounded once: half an ulp, and float64's errors.
        np.testing.assert_allclose(d, want.astype(float), rtol=2.0**-24 * 1.001, atol=1e-15)


def test_losses_and_log_probs_come_in_the_sums_dtype():
    """Whatever the operands are, and `loss_fn` sees such logits."""
    hidden, kernel, _, labels = of_dtypes(np.float16, jnp.bfloat16)

    def loss(logits):
        assert logits.dtype == jnp.float32
        return logits[:, 0]

    assert js.linear_loss(loss, hidden, kernel, compute_dtype=jnp.float16).dtype == jnp.float32
    with pytest.raises(TypeError, match="hidden and kernel must have dtypes that JAX promotes"):
        js.linear_loss(loss, hidden, kernel)  # under conftest's strict promotion
    out = js.linear_log_probs(hidden, kernel, labels, compute_dtype=jnp.bfloat16)
    assert out.log_probs.dtype == jnp.float32
    with jax.enable_x64(True):
        hidden, kernel = (np.asarray(a, np.float64) for a in (hidden, kernel))
        f = functools.partial(head, labels=labels, compute_dtype=jnp.bfloat16)
        value, d = jax.value_and_grad(f)(hidden, kernel)
        assert (value.dtype, d.dtype) == (jnp.float32, jnp.float64)


@pytest.mark.parametrize("compute", [None, jnp.bfloat16])
def test_any_loss_and_its_second_derivative_of_a_transposed_kernel(platform, compute):
    """As of the same kernel the other way around, bit for bit but for the order of sums."""
    hidden, kernel, bias, labels = problem(9, 5, 40)
    loss = js.softmax_cross_entropy_with_integer_labels

    @functools.partial(jax.jit, static_argnames="transposed")
    def of(hidden, kernel, transposed):
        def mean(hidden, kernel):
            options: Any = {"transpose_kernel": transposed, "compute_dtype": compute}
            return js.linear_loss(loss, hidden, kernel, labels, bias=bias, chunk_size=2, **options)

        slopes = jax.grad(mean, (0, 1))
        along = jnp.cos(hidden), jnp.sin(kernel)
        return mean(hidden, kernel), *jax.jvp(slopes, (hidden, kernel), along)

    value, *ds = of(hidden, kernel, False)
    got_value, *got = of(hidden, kernel.T, True)
    got = [(d_hidden, d_kernel.T) for d_hidden, d_kernel in got]
    assert_close((got_value, got), (value, ds), of_largest=1e-5 if compute is None else 2**-7)
