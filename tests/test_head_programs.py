# SPDX-License-Identifier: Apache-2.0
"""Each head is one program for all calls alike, and what a loss closes over is its argument."""

import functools
import gc
import json
import os
import sys
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from assertions import assert_close
from programs import run

import jaxsoftmax as js

integer = js.softmax_cross_entropy_with_integer_labels
HIDDEN = np.sin(np.arange(10, dtype=np.float32)).reshape(5, 2)
KERNEL = np.cos(np.arange(6, dtype=np.float32)).reshape(2, 3)
LABELS = np.array([0, 1, 2, 0, 1], np.int32)
CALLS = 100

# Eager calls on one device, as a user has it: programs compiled and megabytes kept by CALLS more.
MEASURE = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
import jaxsoftmax as js
from test_head_programs import HIDDEN, KERNEL, LABELS, CALLS, EAGER

compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, *_, **__: compiled.append(name) if "backend_compile" in name else None
)

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

found = {}
for name, call in EAGER.items():
    for _ in range(3):
        call()
    compiled.clear()
    before = resident()
    for _ in range(CALLS):
        call()
    found[name] = len(compiled), resident() - before
print(json.dumps(found))
"""


def _head(**options):
    return functools.partial(js.linear_softmax_cross_entropy, HIDDEN, KERNEL, LABELS, **options)


def _gradient(**options):
    f = functools.partial(js.linear_softmax_cross_entropy, labels=LABELS, **options)
    return lambda: jax.grad(lambda h, k: jnp.sum(f(h, k)), (0, 1))(HIDDEN, KERNEL)


def _any_loss(loss_of):
    """Of a loss that is made anew in every call."""
    return lambda: js.linear_loss(loss_of(), HIDDEN, KERNEL, LABELS)


def _scaled(scale):
    return lambda z, y: integer(scale * z, y)


OPTIONS: dict[str, Any] = {
    "bias": np.ones(3, np.float32),
    "weights": np.ones(5, np.float32),
    "ignore_index": -1,
    "class_weights": np.ones(3, np.float32),
    "label_smoothing": 0.1,
    "z_loss": 0.1,
    "soft_cap": 3.0,
    "temperature": 2.0,
}
EAGER = {
    "in forward": _head(),
    "recompute": _head(gradients="recompute"),
    "unreduced": _head(reduction=None),
    "every option": _head(**OPTIONS),
    "gradient": _gradient(),
    "gradient, recompute": _gradient(gradients="recompute"),
    "gradient, unreduced": _gradient(reduction=None),
    "log-probabilities": lambda: js.linear_log_probs(HIDDEN, KERNEL, LABELS, with_entropy=True),
    "any loss": _any_loss(lambda: integer),
    "a new function": _any_loss(lambda: lambda z, y: integer(2 * z, y)),
    "a new closure": _any_loss(lambda: _scaled(jnp.full((1, 1), 2.0))),
    "in a new loop": _any_loss(lambda: lambda z, y: jax.lax.map(lambda a: integer(*a) + 1, (z, y))),
}


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="Linux tells the memory held")
def test_eager_calls_compile_once_and_keep_nothing():
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = run(sys.executable, "-c", MEASURE, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == set(EAGER)
    for name, (programs, megabytes) in found.items():
        assert programs == 0, name
        assert megabytes < 8, name


def test_programs_that_no_call_finds_again_are_dropped():
    """A custom derivative of the loss's own is another function in every trace."""
    kept = []
    for _ in range(20):

        @jax.custom_jvp
        def doubled(z):
            return 2 * z

        doubled.defjvp(lambda z, dz: (2 * z[0], 2 * dz[0]))
        js.linear_loss(lambda z, y, f=doubled: integer(f(z), y), HIDDEN, KERNEL, LABELS)
        kept.append(weakref.ref(doubled))
        del doubled
    gc.collect()
    assert sum(ref() is not None for ref in kept) <= 16


# What a loss closes over


def _reduced(reduction, loss, x, *args):
    out = js.linear_loss(loss, x, KERNEL, *args, reduction=reduction, chunk_size=2)
    return jnp.mean(out)


both_orders = pytest.mark.parametrize("reduction", ["mean", None])
KEY = jax.random.key(0)
CLOSED_OVER = {
    "a key": (KEY, lambda z, key: z * jax.random.uniform(key, (1, 3))),
    "integers": (np.array([2, 0, 1]), lambda z, order: z[:, order] * order[None].astype(z.dtype)),
    "booleans": (np.array([True, False, True]), lambda z, mask: jnp.where(mask[None], z, 0)),
    "floats": (np.array([0.5, 2, 1], np.float32), lambda z, scale: z * scale[None]),
    "complex": (np.complex64(1 + 2j), lambda z, c: jnp.abs(z.astype(c.dtype) * c + c**2)),
}


def _scanned(f):
    def g(x, closed_over):
        step = lambda total, _: (total + f(x, closed_over), None)  # noqa: E731
        return jax.lax.scan(step, jnp.float32(0), None, length=2)[0] / 2

    return g


def _mapped(f):
    return lambda x, closed_over: jnp.mean(jax.vmap(f, (0, None))(jnp.stack([x, x]), closed_over))


def _mapped_over(f):
    both = lambda c: jax.tree.map(lambda c: jnp.stack([c, c]), c)  # noqa: E731
    return lambda x, c: jnp.mean(jax.vmap(f, (None, 0))(x, both(jnp.asarray(c))))


WRAPPED = {
    "jit": jax.jit,
    "checkpoint": jax.checkpoint,
    "scan": _scanned,
    "vmap": _mapped,
    "vmap of what it closes over": _mapped_over,
    "jit, checkpoint, scan": lambda f: jax.jit(jax.checkpoint(_scanned(f))),
    "scan, checkpoint, jit": lambda f: _scanned(jax.checkpoint(jax.jit(f))),
    "jit of the gradient": lambda f: f,
}


FEW = ("jit", "scan, checkpoint, jit")


@both_orders
@pytest.mark.parametrize("name", CLOSED_OVER)
def test_what_a_loss_closes_over(name, reduction):
    """Traced, of any dtype; with its gradient where it has one."""
    check_closed_over(name, reduction, FEW)


@pytest.mark.parametrize(
    "compiled", [jax.jit, pytest.param(lambda f: f, id="eager", marks=pytest.mark.wide)]
)
@pytest.mark.parametrize("reduction", ["mean", pytest.param(None, marks=pytest.mark.wide)])
def test_a_key_closed_over_in_any_transform(reduction, compiled):
    """All in one program, which compiles faster, or each alone."""
    check_closed_over("a key", reduction, WRAPPED.keys() - {*FEW}, compiled)


def kind(array):
    return array.shape, array.dtype


def check_closed_over(name, reduction, ways, compiled=lambda f: f):
    closed_over, made_of = CLOSED_OVER[name]

    def head(x, c):
        return _reduced(reduction, lambda z, y: integer(made_of(z, c), y), x, LABELS)

    def plain(x, c):
        z = jnp.dot(x, KERNEL, precision="highest")
        log_p = jax.nn.log_softmax(made_of(z, c))
        return -jnp.mean(log_p[np.arange(5), LABELS])

    numbers = (0, 1) if name in ("floats", "complex") else 0
    c = jnp.asarray(closed_over)
    want = jax.value_and_grad(plain, numbers)(HIDDEN, c)

    @compiled
    def results(x, c):
        return {how: jax.value_and_grad(WRAPPED[how](head), numbers)(x, c) for how in ways}

    for how, got in results(HIDDEN, c).items():
        assert jax.tree.map(kind, got) == jax.tree.map(kind, want), how
        assert_close(got, want, rtol=1e-5, atol=1e-6)


@both_orders
def test_second_derivatives_beside_what_it_closes_over(reduction):
    closed_over, made_of = CLOSED_OVER["a key"]

    def head(x, s, key):
        return _reduced(reduction, lambda z: jnp.sum(jnp.sin(s * made_of(z, key)), -1), x)

    def plain(x, s, key):
        z = jnp.dot(x, KERNEL, precision="highest")
        return jnp.mean(jnp.sum(jnp.sin(s * made_of(z, key)), -1))

    arguments = (HIDDEN, jnp.float32(1.3), closed_over)
    for f in (jax.hessian, lambda f, n: jax.jacrev(jax.grad(f, n), n)):
        got, want = (jax.jit(f(g, (0, 1)))(*arguments) for g in (head, plain))
        assert_close(got, want, rtol=1e-4, atol=1e-5)


def test_what_it_closes_over_may_be_another_in_the_next_call():
    """Of one function, and of a method: a Python number, an array, a tracer and again a number."""

    class Scaled:
        scale: Any = 1.0

        def loss(self, z):
            return jnp.sum(z**2, axis=-1) / self.scale

    of = Scaled()
    expected = np.mean(np.sum((HIDDEN @ KERNEL) ** 2, -1))
    for scale in (1.0, -0.0, 0.0, 2.0, np.float32(3), np.array(4, np.float32), 1.0, np.nan):
        of.scale = scale
        got = js.linear_loss(of.loss, HIDDEN, KERNEL)
        with np.errstate(divide="ignore"):
            np.testing.assert_allclose(got, expected / np.float32(scale), rtol=1e-5)

        def traced(scale):
            of.scale = scale
            return js.linear_loss(of.loss, HIDDEN, KERNEL)

        slope = jax.grad(traced)(3.0), jax.jit(jax.grad(traced))(3.0)
        np.testing.assert_allclose(slope, -expected / 9, rtol=1e-5)


def test_losses_that_differ_are_told_apart():
    """By a literal, a parameter of an operation, a dtype, the order, or a function within."""
    z = np.asarray(HIDDEN @ KERNEL, np.float64)
    losses = [
        (lambda z: jnp.sum(z * 2, -1), (2 * z).sum(-1)),
        (lambda z: jnp.sum(z * 3, -1), (3 * z).sum(-1)),
        (lambda z: jnp.sum(2 * z, -1), (2 * z).sum(-1)),
        (lambda z: jnp.sum(z**2, -1), (z**2).sum(-1)),
        (lambda z: jnp.sum(z**3, -1), (z**3).sum(-1)),
        (lambda z: jnp.max(z, -1), z.max(-1)),
        (lambda z: z[:, 0] - z[:, 1], z[:, 0] - z[:, 1]),
        (lambda z: z[:, 1] - z[:, 0], z[:, 1] - z[:, 0]),
        (lambda z: z[:, 1] - z[:, 2], z[:, 1] - z[:, 2]),
        (jax.jit(lambda z: z[:, 0]), z[:, 0]),
        (jax.jit(lambda z: z[:, 1]), z[:, 1]),
        (lambda z: jax.lax.map(lambda r: r[0], z), z[:, 0]),
        (lambda z: jax.lax.map(lambda r: r[1], z), z[:, 1]),
        (lambda z: jax.nn.relu(z)[:, 2], np.maximum(z, 0)[:, 2]),
        (lambda z: jax.nn.leaky_relu(z)[:, 2], np.where(z > 0, z, 0.01 * z)[:, 2]),
    ]
    for _ in range(2):
        for loss, true in losses:
            got = js.linear_loss(loss, HIDDEN, KERNEL, reduction=None)
            np.testing.assert_allclose(got, true, rtol=1e-5, atol=1e-6)


def test_what_a_token_argument_may_be():
    """Keys, complex numbers and arrays of no width are per-token arguments too."""
    keys = jax.random.split(KEY, 5)
    numbers = (1 + 1j) * np.arange(5, dtype=np.float32)

    def draw(key):
        return jax.random.normal(key, (3,))

    def head(x, numbers, empty):
        def loss(z, keys, c, empty):
            return jnp.sum(z * jax.vmap(draw)(keys), -1) + jnp.abs(c) * z[:, 0] + empty.sum(-1)

        return js.linear_loss(loss, x, KERNEL, keys, numbers, empty, chunk_size=2)

    def plain(x, numbers, empty):
        z = jnp.dot(x, KERNEL, precision="highest")
        noise = jnp.sum(z * jax.vmap(draw)(keys), -1)
        return jnp.mean(noise + jnp.abs(numbers) * z[:, 0]) + empty.sum()

    arguments = (HIDDEN, numbers.astype(np.complex64) + 1, np.zeros((5, 0), np.float32))
    got, want = (jax.value_and_grad(f, (0, 1, 2))(*arguments) for f in (head, plain))
    assert jax.tree.map(kind, got) == jax.tree.map(kind, want)
    assert_close(got, want, rtol=1e-5, atol=1e-6)
