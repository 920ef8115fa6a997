# SPDX-License-Identifier: Apache-2.0
"""Under JAX's debugging switches nothing raises on valid input, eager or jitted.

`jax_debug_nans` and `jax_debug_infs` look at whatever leaves a compiled function; with
`jax.disable_jit` every operation is one, so that no NaN may be written down even to be selected
away. `jax_debug_infs` runs without masks, which are −inf as in jax.nn and optax, and with `jit`,
since without it `jnp.isinf` itself raises.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import generator
from test_orders import IGNORED, LABELS, LOSSES, OPTIONS, arrays, reverse_over_reverse

import jaxsoftmax as js

SWITCHES = {"nans": jax.debug_nans, "infs": jax.debug_infs}
X = generator("switches").standard_normal((3, 5)).astype(np.float32)
WHERE = np.array([[True] * 5, [False] * 5, [True, False, True, False, True]])
B = np.array([[1, 0, -0.1, 0.5, 1]] * 3, np.float32)


class Call(NamedTuple):
    name: str
    f: Any  # of one tree of floating arrays
    x: Any
    masks: bool = False

    def __str__(self):
        return self.name


def _losses():
    """With every option, over every kind of token but those that hold NaN.

    Of several labels one is out of range there, which is a NaN: `_others` has some of their own.
    """
    for loss in (loss for loss in LOSSES if not loss.mean and "several" not in loss.name):
        x = arrays(loss), {name: OPTIONS[name] for name in loss.options}
        x = jax.tree.map(lambda a: np.where(np.isfinite(a), a, np.float32(0.5)), x)
        yield Call(loss.name, lambda x, loss=loss: loss.call(*x, LABELS), x, loss.masks)


def _family():
    for module, of in ((js, ""), (js.forward_mode, ", forward mode")):
        for name in ("softmax", "log_softmax", "logsumexp"):
            f = getattr(module, name)
            yield Call(name + of, partial(f, axis=-1), X)
            yield Call(f"{name}, where{of}", partial(f, axis=-1, where=WHERE), X, masks=True)
        f = module.logsumexp
        yield Call("logsumexp, b" + of, lambda x, f=f: f(x[0], axis=-1, b=x[1]), (X, B))
        yield Call(
            "logsumexp of a scalar" + of, lambda x, f=f: f(*x[:1], b=x[1]), (X[0, 0], B[0, 0])
        )
        yield Call("softmax_jacobian" + of, module.softmax_jacobian, X)


def _others():
    labels = np.array([0, IGNORED, 2])
    integer = js.softmax_cross_entropy_with_integer_labels
    yield Call("ignored", lambda x: integer(x, labels, ignore_index=IGNORED), X)
    yield Call("integer", lambda x: integer(x, np.abs(labels)), X)
    yield Call("dense", lambda x: js.softmax_cross_entropy(x[0], x[1]), (X, np.abs(X)))
    for divergence in (js.softmax_kl_divergence, js.softmax_js_divergence):
        name = divergence.__name__
        yield Call(name, lambda x, f=divergence: f(x[0], x[1]), (X, X[::-1].copy()))
        yield Call(f"{name} of close rows", lambda x, f=divergence: f(x, 1.0001 * x), X)
    kl = partial(js.softmax_kl_divergence, where=WHERE)
    yield Call("softmax_kl_divergence, where", lambda x: kl(x, x[::-1]), X, masks=True)
    kernel, both = B.T.copy(), np.array([[0, 1], [2, 2], [1, 0]])
    yield Call("several", lambda x: js.label_log_probs(x, both).log_probs, X)
    yield Call(
        "head, several", lambda x: js.linear_log_probs(x[0], x[1], both).log_probs, (X, kernel)
    )
    for name, options in {
        "mean": {},
        "recompute": {"gradients": "recompute"},
        "unreduced": {"reduction": None},
        "weights": {"weights": np.array([0, 1, 2], np.float32)},
    }.items():
        f = partial(js.linear_softmax_cross_entropy, labels=labels, ignore_index=IGNORED, **options)
        yield Call(f"head, {name}", lambda x, f=f: f(x[0], x[1]), (X, kernel))


CALLS = [*_losses(), *_family(), *_others()]


def total(f, x):
    # Of what is finite: a sum of nothing is −inf, as it should be.
    return sum(jnp.sum(jnp.where(jnp.isinf(v), 0, v)) for v in jax.tree.leaves(f(x)))


# The functions are jitted inside: a jit around them is one more of the same.
jitted = pytest.param("jit", marks=pytest.mark.wide)


@pytest.mark.parametrize("jit", ["eager", jitted, "disable_jit"])
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_nothing_raises(call, switch, jit):
    if switch == "infs" and (call.masks or jit == "disable_jit"):
        pytest.skip("a mask is −inf; jnp.isinf compares with one")
    run = partial(jax.value_and_grad(total, 1), call.f)
    with SWITCHES[switch](True), jax.disable_jit(jit == "disable_jit"):
        value, gradient = (jax.jit(run) if jit == "jit" else run)(call.x)
    assert np.isfinite(value)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


@pytest.mark.wide
@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("call", CALLS, ids=str)
def test_nothing_raises_in_second_derivatives(call, switch):
    if switch == "infs" and call.masks:
        pytest.skip("a mask is −inf")
    with SWITCHES[switch](True):
        gradient = reverse_over_reverse(partial(total, call.f), call.x)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))
