# SPDX-License-Identifier: Apache-2.0
"""The shapes and dtypes in the signatures hold: jaxtyping and beartype check them on every call.

Every right call of `arguments` passes them, with its gradient and in half precision; every wrong
one is refused, by them or with the very error that a user gets.
"""

import sys
from pathlib import Path

from programs import run

CALLS = """
from jaxtyping import TypeCheckError, install_import_hook

with install_import_hook("jaxsoftmax", "beartype.beartype"):
    import jaxsoftmax

import jax, jax.numpy as jnp
from arguments import ARRAY, MORE_RIGHT, RIGHT, WRONG, call


def with_gradient(name, changes):
    # Of the first array, in its own dtype and in bfloat16.
    array = ARRAY[name]
    x = jnp.asarray((RIGHT[name] | changes)[array])
    if not jnp.issubdtype(x.dtype, jnp.floating):
        return call(name, **changes)
    total = lambda x: sum(jnp.sum(o) for o in jax.tree.leaves(call(name, **changes | {array: x})))
    for dtype in (x.dtype, jnp.bfloat16):
        jax.eval_shape(jax.value_and_grad(total), x.astype(dtype))


right = wrong = by_type = 0
for name in RIGHT:
    for changes in [{}, *MORE_RIGHT[name]]:
        with_gradient(name, changes)
        right += 1
    for case in WRONG[name]:
        try:
            call(name, **{case.argument: case.value, **case.others})
        except TypeCheckError:
            # A type or a choice; what shape an argument must have depends on the others.
            assert case.error is TypeError or " one of " in case.message, case
            by_type += 1
        except case.error as error:
            assert str(error) == f"{name}: {case.message}", case
        else:
            raise AssertionError(f"{name} takes {case}")
        wrong += 1
assert right > 30 and wrong > 400 and by_type > 100, (right, wrong, by_type)
print("checked")
"""


def test_annotations_agree_with_what_comes_and_goes():
    here = Path(__file__).parent
    done = run(sys.executable, "-W", "error", "-c", CALLS, cwd=here)
    assert done.stdout == "checked\n", done.stderr
