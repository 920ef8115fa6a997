# SPDX-License-Identifier: Apache-2.0
"""The shapes and dtypes in the signatures hold: jaxtyping and beartype check them on every call."""

import subprocess
import sys

CALLS = """
from jaxtyping import install_import_hook

with install_import_hook("jaxsoftmax", "beartype.beartype"):
    import jaxsoftmax as js

import jax, jax.numpy as jnp, numpy as np

for dtype in (jnp.float32, jnp.bfloat16):
    x = jnp.zeros((3, 4), dtype)
    labels = np.array([0, 1, 2], np.int8)
    mask = np.ones((3, 4), bool)
    for axis in (-1, 0, (0, 1), None):
        js.softmax(x, axis)
        js.log_softmax(x, axis, where=mask)
        js.logsumexp(x, axis, b=2.0, return_sign=True)
    js.softmax_jacobian(x, axis=0)
    js.softmax_cross_entropy(x, jax.nn.one_hot(labels, 4), where=mask)
    js.softmax_cross_entropy_with_integer_labels(x, labels, where=np.ones(3, bool))
    js.softmax_cross_entropy_with_integer_labels(x, 5, axis=(0, 1))
    jax.grad(lambda x: js.softmax_cross_entropy(x, x).sum())(x)
print("checked")
"""


def test_annotations_agree_with_what_comes_and_goes():
    done = subprocess.run(
        [sys.executable, "-c", CALLS], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.stdout == "checked\n", done.stderr
