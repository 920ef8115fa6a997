# SPDX-License-Identifier: Apache-2.0
"""`jaxsoftmax.forward_mode`: the same numbers, and tangents where a `custom_vjp` has none."""

import inspect
import pickle
from functools import partial

import assertions
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import several

import jaxsoftmax
from jaxsoftmax import forward_mode

ROWS, CLASSES = 4, 9
LABELS = np.array([1, 3, 0, 8], np.int32)
WEIGHTS = np.linspace(0.5, 2, CLASSES, dtype=np.float32)
OPTIONS = {"label_smoothing": 0.1, "z_loss": 0.2, "soft_cap": 4.0, "temperature": 0.7}


def logits(dtype=jnp.float32):
    x = np.random.default_rng(0).standard_normal((ROWS, CLASSES))
    x[0, 1] += 20  # right and sure of it
    x[2, [0, 5]] = x[2].max()
    return jnp.asarray(x, dtype)


def targets():
    y = np.random.default_rng(1).uniform(0, 1, (ROWS, CLASSES))
    return jnp.asarray(y, jnp.float32)


CALLS = {
    "softmax": lambda m, x: m.softmax(x),
    "log_softmax": lambda m, x: m.log_softmax(x),
    "logsumexp": lambda m, x: m.logsumexp(x, axis=-1),
    "logsumexp, weighted": lambda m, x: m.logsumexp(x, axis=-1, b=targets()),
    "softmax_jacobian": lambda m, x: m.softmax_jacobian(x),
    "softmax_cross_entropy": lambda m, x: m.softmax_cross_entropy(x, targets(), **OPTIONS),
    "softmax_cross_entropy_with_integer_labels": lambda m, x: (
        m.softmax_cross_entropy_with_integer_labels(x, LABELS)
    ),
    "softmax_cross_entropy_with_integer_labels, options": lambda m, x: (
        m.softmax_cross_entropy_with_integer_labels(
            x, LABELS, class_weights=WEIGHTS, ignore_index=3, **OPTIONS
        )
    ),
    "label_log_probs": lambda m, x: m.label_log_probs(x, LABELS, with_entropy=True),
    "softmax_kl_divergence": lambda m, x: m.softmax_kl_divergence(x, x[::-1]),
    "softmax_kl_divergence, options": lambda m, x: m.softmax_kl_divergence(
        x, x[::-1] + 1e-3 * targets(), soft_cap=4.0, temperature=0.7
    ),
    "softmax_js_divergence": lambda m, x: m.softmax_js_divergence(x, x[::-1], weight=0.3),
    "label_log_probs, several": lambda m, x: m.label_log_probs(x, several(LABELS, CLASSES)),
}
every_call = pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
# Two orders of the same sums of nine terms, each below 20 in size.
assert_close = partial(assertions.assert_close, rtol=1e-5, atol=2e-6)


def test_every_name_on_logits_is_there():
    other = {"LogProbs", "TopK", "Sample", "check_labels"}
    names = {n for n in jaxsoftmax.__all__ if "linear" not in n} - other
    assert names == {call.partition(",")[0] for call in CALLS}
    for name in names:
        ours, theirs = getattr(forward_mode, name), getattr(jaxsoftmax, name)
        assert inspect.signature(ours) == inspect.signature(theirs)
        assert ours.__doc__ == theirs.__doc__


@every_call
def test_values_and_jacobians_are_those_of_reverse_mode(call):
    x = logits()

    @jax.jit
    def together(x):
        ours, theirs = (lambda x, m=m: call(m, x) for m in (forward_mode, jaxsoftmax))
        return (ours(x), jax.jacfwd(ours)(x), jax.jacrev(ours)(x)), theirs(x), jax.jacrev(theirs)(x)

    found, value, jacobian = together(x)
    assert_close(found, (value, jacobian, jacobian))
    assert_close(jax.jacfwd(lambda x: call(forward_mode, x))(x), jacobian)


@pytest.mark.wide
@every_call
def test_linearize_and_second_derivatives(call):
    x, v = logits(), jnp.cos(jnp.arange(ROWS * CLASSES, dtype=jnp.float32)).reshape(ROWS, CLASSES)
    _out, tangents = jax.linearize(lambda x: call(forward_mode, x), x)
    assert_close(tangents(v), jax.jvp(lambda x: call(forward_mode, x), (x,), (v,))[1])

    def total(module, x):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(call(module, x)))

    hvp = jax.jvp(jax.grad(lambda x: total(jaxsoftmax, x)), (x,), (v,))[1]
    for outer in (jax.grad, jax.jacfwd):
        got = jax.jvp(outer(lambda x: total(forward_mode, x)), (x,), (v,))[1]
        np.testing.assert_allclose(got, hvp, rtol=1e-4, atol=1e-5)


def test_tangents_in_labels_and_options():
    x, y = logits(), targets()
    dense = jax.jacrev(lambda y: jaxsoftmax.softmax_cross_entropy(x, y).sum())(y)
    got = jax.jvp(lambda y: forward_mode.softmax_cross_entropy(x, y).sum(), (y,), (y,))[1]
    np.testing.assert_allclose(got, jnp.vdot(dense, y), rtol=1e-5)

    def loss(module, weights, options):
        return module.softmax_cross_entropy_with_integer_labels(
            x, LABELS, class_weights=weights, **options
        ).sum()

    primals = (jnp.asarray(WEIGHTS), jax.tree.map(jnp.float32, OPTIONS))
    tangents = jax.tree.map(jnp.cos, primals)
    gradient = jax.grad(lambda *p: loss(jaxsoftmax, *p), (0, 1))(*primals)
    want = sum(
        jnp.vdot(a, b) for a, b in zip(*map(jax.tree.leaves, (gradient, tangents)), strict=True)
    )
    got = jax.jvp(lambda *p: loss(forward_mode, *p), primals, tangents)[1]
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize(
    "name", ["softmax", "log_softmax", "softmax_cross_entropy_with_integer_labels"]
)
def test_what_is_kept_is_what_reverse_mode_keeps(name, dtype):
    def kept(module):
        leaves = jax.tree.leaves(jax.vjp(lambda x: CALLS[name](module, x), logits(dtype))[1])
        arrays = {id(a): a for a in leaves if getattr(a, "size", 1) > 1}
        return sorted((a.shape, str(a.dtype)) for a in arrays.values())

    assert kept(forward_mode) == kept(jaxsoftmax)


def test_a_bad_label_is_nan_and_an_ignored_one_zero():
    x = logits()
    labels = LABELS.copy()
    labels[2] = -100

    def jacobian(**ignore):
        loss = forward_mode.softmax_cross_entropy_with_integer_labels
        return np.asarray(jax.jacfwd(lambda x: loss(x, labels, **ignore))(x))

    assert np.isnan(jacobian()[2, 2]).all()
    loss = forward_mode.softmax_cross_entropy_with_integer_labels
    assert np.isnan(jax.grad(lambda x: loss(x, labels)[:2].sum())(x)[2]).all()  # though not used
    ignored = jacobian(ignore_index=-100)
    assert np.isfinite(ignored).all()
    assert not ignored[2].any()


def test_the_package_itself_has_no_jvp():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(jaxsoftmax.softmax, (logits(),), (logits(),))


def test_the_modes_do_not_share_a_cache():
    x = logits()
    for module in (jaxsoftmax, forward_mode, jaxsoftmax, forward_mode):
        jax.grad(lambda x, m=module: m.softmax_cross_entropy(x, targets()).sum())(x)
    jax.jvp(lambda x: forward_mode.softmax_cross_entropy(x, targets()), (x,), (x,))


def test_the_functions_can_be_pickled():
    for name in ("softmax", "softmax_cross_entropy", "label_log_probs"):
        f = getattr(forward_mode, name)
        assert pickle.loads(pickle.dumps(f)) is f
