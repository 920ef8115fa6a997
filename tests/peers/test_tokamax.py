# SPDX-License-Identifier: Apache-2.0
"""tokamax's cases of its linear head, with our head: its shapes, data, dtypes and tolerances.

From its tests of the op and of the kernel, except the largest, 16384 × 4096 × 16384, which they
leave to a TPU. Its op that holds the logits is what both are compared with.
"""

import functools

import jax
import numpy as np
import pytest

import jaxsoftmax

tokamax = pytest.importorskip("tokamax", reason="the extra `peers` has tokamax")
flags = pytest.importorskip("absl.flags")
if not flags.FLAGS.is_parsed():  # which only absl's own programs do
    flags.FLAGS.mark_as_parsed()

# Tokens, width and classes; the sizes that no block divides are the kernel's own cases.
SHAPES = [
    (1024, 512, 1024),
    (1024, 512, 2048),
    (4096, 512, 2048),
    (4096, 1024, 2560),
    (4096, 1024, 2664),
    (4096, 1152, 2048),
    (4096, 1288, 2048),
    (4096, 1024, 4096),
]


@pytest.mark.parametrize("gradients", ["in_forward", "recompute"])
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        *((shape, "float32") for shape in SHAPES),
        *((SHAPES[2], d) for d in ("bfloat16", "float16")),
    ],
)
def test_its_cases(shape, dtype, reduction, gradients):
    tokens, width, classes = shape
    keys = jax.random.split(jax.random.key(42), 3)
    hidden = jax.random.normal(keys[0], (tokens, width), dtype)
    labels = jax.random.randint(keys[1], (tokens,), 0, classes)
    kernel = jax.random.normal(keys[2], (width, classes), dtype)
    theirs = functools.partial(
        tokamax.linear_softmax_cross_entropy_loss, reduction=reduction, implementation="xla"
    )
    ours = functools.partial(
        jaxsoftmax.linear_softmax_cross_entropy, reduction=reduction, gradients=gradients
    )
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        want, (d_x, d_w) = jax.value_and_grad(theirs, (0, 2))(hidden, labels, kernel)
    found, (d_hidden, d_kernel) = jax.value_and_grad(ours, (0, 1))(hidden, kernel, labels)
    # Of the op and of the kernel. In half precision they compare no gradients: theirs, whose op
    # rounds the logits, are off by 0.8, ours by 0.02.
    tolerance = 1e-4 if dtype == "float32" else 5e-2
    np.testing.assert_allclose(found, want, rtol=tolerance, atol=tolerance)
    if dtype != "float32":
        return
    for got, true in ((d_hidden, d_x), (d_kernel, d_w)):
        np.testing.assert_allclose(got, true, rtol=3e-2, atol=3e-2)
