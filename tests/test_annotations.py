# SPDX-License-Identifier: Apache-2.0
"""The shapes and dtypes in the signatures hold: jaxtyping and beartype check them on every call.

Every right call of `arguments` passes them, with its gradient and in half precision; every wrong
one is refused, by them or with the very error that a user gets.
"""

import importlib
import sys
from unittest import mock

import arguments
import jax
import jax.numpy as jnp
import pytest
from arguments import ARRAY, CHOICES, MORE_RIGHT, RIGHT, WRONG, call
from jaxtyping import TypeCheckError, install_import_hook


@pytest.fixture(scope="module", autouse=True)
def _checked():
    """The library is imported anew, with its annotations checked, for `call`."""
    with mock.patch.dict(sys.modules):
        for name in [name for name in sys.modules if name.partition(".")[0] == "jaxsoftmax"]:
            del sys.modules[name]
        with install_import_hook("jaxsoftmax", "beartype.beartype"):
            checked = importlib.import_module("jaxsoftmax")
        with mock.patch.object(arguments, "jaxsoftmax", checked):
            yield


@pytest.mark.parametrize("name", RIGHT)
def test_what_is_right_passes_with_its_gradient(name):
    """By the first array, in its own dtype and in bfloat16."""
    array = ARRAY[name]
    for changes in [{}, *MORE_RIGHT[name]]:
        x = jnp.asarray((RIGHT[name] | changes)[array])
        if not jnp.issubdtype(x.dtype, jnp.floating):
            call(name, **changes)
            continue

        def total(x, changes=changes):
            return sum(
                jnp.sum(leaf) for leaf in jax.tree.leaves(call(name, **changes | {array: x}))
            )

        with jax.numpy_dtype_promotion("standard"):
            for dtype in (x.dtype, jnp.bfloat16):
                step = total if name in CHOICES else jax.value_and_grad(total)
                jax.eval_shape(step, x.astype(dtype))


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_refused(name):
    by_type = 0
    for case in WRONG[name]:
        with pytest.raises((TypeCheckError, case.error)) as caught:
            call(name, **{case.argument: case.value, **case.others})
        if isinstance(caught.value, TypeCheckError):
            # A type or a choice; what shape an argument must have depends on the others.
            assert case.error is TypeError or " one of " in case.message, case
            by_type += 1
        else:
            assert str(caught.value) == f"{name}: {case.message}", case
    assert by_type > 5
