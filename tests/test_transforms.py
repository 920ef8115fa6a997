# SPDX-License-Identifier: Apache-2.0
"""Every public function under every transform, in the numbers of its definition.

`FUNCTIONS` is the one list: a new function gets every transform by one entry. An entry's
`definition` is the textbook formula without the maximum, differentiated by JAX in float64. It is
smooth at ties, where `max` is not. Derivatives are of `Σ w · f(arguments)` with a non-uniform w,
taken in all floating arguments at once, so that mixed second derivatives are seen too.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import assertions
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_orders
from arguments import DIFFERENTIABLE
from cases import on_device, several, stacked
from jax import export

import jaxsoftmax as js
from jaxsoftmax import _cpu

# Formulation and number of classes. On one CPU device (`is_local`) the reductions are by column,
# plain or by block, according to the number of classes; elsewhere there is one form.
WORLDS = [("anywhere", 5), ("one CPU device", 3000)]
MORE_CLASSES = [("one CPU device", 5), ("one CPU device", 40)]


class Function(NamedTuple):
    name: str
    call: Callable[..., Any]
    definition: Callable[..., jax.Array]
    arguments: Callable[[int], tuple[np.ndarray, ...]]  # each with a leading axis of rows


def _logits(classes: int) -> np.ndarray:
    """Rows of scale 1: generic, three maxima (in two blocks of 128), all equal, peaked."""
    x = np.random.default_rng(classes).normal(size=(4, classes)).astype(np.float32)
    x[1, [0, 2, -1]] = x[1].max()
    x[2] = 0.25
    x[3, 1] += 15
    return x


def _targets(classes: int) -> np.ndarray:
    """Targets with other sums than 1, one exact zero in each row."""
    y = np.random.default_rng(classes + 1).uniform(0.1, 1, size=(4, classes)).astype(np.float32)
    y[:, 3] = 0
    return y


def _target_logits(classes: int) -> np.ndarray:
    """Rows a tenth, a thousandth and 1 from the logits, and equal ones."""
    distance = np.array([[0.1], [1e-3], [0], [1]])
    change = np.random.default_rng(classes + 3).normal(size=(4, classes))
    return (_logits(classes) + distance * change).astype(np.float32)


def _labels(classes: int) -> np.ndarray:
    return np.array([classes - 2, 2, 0, 1], np.int32)


def _several(classes: int) -> np.ndarray:
    return several(_labels(classes), classes)


def _mask(classes: int) -> np.ndarray:
    """About half of the classes: every label above, one of the ties not."""
    mask = np.random.default_rng(classes + 2).integers(2, size=(4, classes)).astype(bool)
    mask[:, _labels(classes)] = True
    mask[:, -1] = False
    return mask


def _log_normalizer(x, where):
    return jnp.log(jnp.sum(jnp.where(where, jnp.exp(x), 0), keepdims=True))


def _everywhere(x):
    return jnp.ones(x.shape, bool)


def _log_probabilities(x, where=None):
    return x - _log_normalizer(x, _everywhere(x) if where is None else where)


def _jacobian_of_definition(x):
    p = jnp.exp(_log_probabilities(x))
    return jnp.diag(p) - jnp.outer(p, p)


def _log_probs_of_definition(x, labels):
    log_p = _log_probabilities(x)
    entropy = -jnp.sum(jnp.exp(log_p) * log_p)
    return jnp.r_[log_p[labels], jnp.log(jnp.sum(jnp.exp(x))), entropy]


def _hidden() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(4, 3)).astype(np.float32)


def _kernel(hidden):
    """Three by seven, in the dtype of `hidden`."""
    return jnp.sin(jnp.arange(21, dtype=hidden.dtype)).reshape(3, 7)


def _rows(*made):
    """Arrays of a number of classes."""
    return lambda classes: tuple(make(classes) for make in made)


def _integer(x, label, where=None):
    return js.softmax_cross_entropy_with_integer_labels(x, label, where=where)


def _nll(x, label, where=None):
    return -_log_probabilities(x, where)[label]


def _label_log_probs(x, labels):
    return stacked(js.label_log_probs(x, labels, with_entropy=True))


def _linear_log_probs(h, labels):
    return stacked(js.linear_log_probs(h, _kernel(h), labels, with_entropy=True, chunk_size=3))


def _of_hidden(definition):
    return lambda h, target: definition(h @ _kernel(h), target)


def _cross_entropy(x, y):
    return -jnp.sum(y * _log_probabilities(x))


def _kl_divergence(x, target):
    log_q, log_p = _log_probabilities(x), _log_probabilities(target)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q))


_hidden_and_labels = _rows(lambda _: _hidden(), lambda _: _labels(7))
FUNCTIONS = [
    Function("softmax", js.softmax, lambda x: jnp.exp(_log_probabilities(x)), _rows(_logits)),
    Function(
        "softmax-where",
        lambda x, where: js.softmax(x, where=where),
        lambda x, where: jnp.where(where, jnp.exp(_log_probabilities(x, where)), 0),
        _rows(_logits, _mask),
    ),
    Function("log_softmax", js.log_softmax, _log_probabilities, _rows(_logits)),
    Function(
        "logsumexp",
        lambda x: js.logsumexp(x, axis=-1),
        lambda x: jnp.log(jnp.sum(jnp.exp(x))),
        _rows(_logits),
    ),
    Function(
        "logsumexp-b",
        lambda x, b: js.logsumexp(x, axis=-1, b=b),
        lambda x, b: jnp.log(jnp.sum(b * jnp.exp(x))),
        _rows(_logits, lambda c: _targets(c) + np.float32(0.1)),
    ),
    Function(
        "softmax_jacobian",
        js.softmax_jacobian,
        _jacobian_of_definition,
        _rows(lambda c: _logits(min(c, 200))),  # C² numbers a row
    ),
    Function(
        "softmax_cross_entropy",
        js.softmax_cross_entropy,
        _cross_entropy,
        _rows(_logits, _targets),
    ),
    Function("softmax_cross_entropy_with_integer_labels", _integer, _nll, _rows(_logits, _labels)),
    Function(
        "softmax_cross_entropy_with_integer_labels-where",
        _integer,
        _nll,
        _rows(_logits, _labels, _mask),
    ),
    Function(
        "label_log_probs",
        _label_log_probs,
        _log_probs_of_definition,
        _rows(_logits, _labels),
    ),
    Function(
        "label_log_probs-several",
        _label_log_probs,
        _log_probs_of_definition,
        _rows(_logits, _several),
    ),
    Function(
        "softmax_kl_divergence",
        js.softmax_kl_divergence,
        _kl_divergence,
        _rows(_logits, _target_logits),
    ),
    Function(
        "linear_log_probs",
        _linear_log_probs,
        _of_hidden(_log_probs_of_definition),
        _hidden_and_labels,
    ),
    Function(
        "linear_log_probs-several",
        _linear_log_probs,
        _of_hidden(_log_probs_of_definition),
        _rows(lambda _: _hidden(), lambda _: _several(7)),
    ),
    Function(
        "linear_log_probs-transposed",
        lambda h, label: stacked(
            js.linear_log_probs(
                h, _kernel(h).T, label, with_entropy=True, transpose_kernel=True, chunk_size=3
            )
        ),
        _of_hidden(_log_probs_of_definition),
        _hidden_and_labels,
    ),
    Function(
        "linear_loss",
        lambda h, y: js.linear_loss(
            js.softmax_cross_entropy, h, _kernel(h), y, reduction=None, chunk_size=2
        ),
        _of_hidden(_cross_entropy),
        _rows(lambda _: _hidden(), lambda _: _targets(7)),
    ),
    Function(
        "linear_softmax_cross_entropy",
        lambda h, label: js.linear_softmax_cross_entropy(
            h, _kernel(h), label, reduction=None, chunk_size=3
        ),
        _of_hidden(_nll),
        _hidden_and_labels,
    ),
    Function(
        "linear_softmax_cross_entropy-transposed",
        lambda h, label: js.linear_softmax_cross_entropy(
            h, _kernel(h).T, label, reduction=None, transpose_kernel=True, chunk_size=3
        ),
        _of_hidden(_nll),
        _hidden_and_labels,
    ),
]


def _world(world):
    return f"{world[0]}-{world[1]}"


every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.name)


def in_worlds(*worlds, wide=()):
    """A linear head has its own classes: more of them would be the same test again."""
    marks = {world: pytest.mark.wide if world in wide else () for world in (*worlds, *wide)}
    return pytest.mark.parametrize(
        ("classes", "function"),
        [
            pytest.param(world, function, id=f"{_world(world)}-{function.name}", marks=mark)
            for world, mark in marks.items()
            for function in FUNCTIONS
            if world in WORLDS or not function.name.startswith("linear_")
        ],
        indirect=["classes"],
    )


in_every_world = in_worlds(*WORLDS, *MORE_CLASSES)


@pytest.fixture(scope="module", params=WORLDS, ids=_world)
def classes(request):
    formulation, classes = request.param
    with contextlib.contextmanager(on_device)(formulation):
        yield classes


def row(arguments, index):
    return tuple(a[index] for a in arguments)


def floating(arguments) -> tuple[int, ...]:
    return tuple(i for i, a in enumerate(arguments) if jnp.issubdtype(a.dtype, jnp.floating))


def weighted(f, *arguments):
    """Σ w · f(arguments): a scalar whose cotangent w is not uniform."""
    out = f(*arguments)
    w = np.sin(np.arange(1, out.size + 1)).reshape(out.shape).astype(out.dtype)
    return jnp.sum(out * w)


def of_floating(operation):
    """An operation on a scalar of a tree, as one on `f` by all its floating arguments."""

    def apply(f, *arguments):
        at = floating(arguments)

        def total(values):
            replaced = dict(zip(at, values, strict=True))
            return weighted(f, *(replaced.get(i, a) for i, a in enumerate(arguments)))

        return operation(total, tuple(arguments[i] for i in at))

    return apply


gradients = of_floating(lambda f, x: jax.grad(f)(x))
forward_over_reverse = of_floating(test_orders.forward_over_reverse)
reverse_over_reverse = of_floating(test_orders.reverse_over_reverse)
reverse_thrice = of_floating(test_orders.reverse_thrice)


@functools.cache
def truth(function, operation, classes):
    """`operation` on the definition in float64, for each row: stacked."""
    return _wide(jax.vmap(functools.partial(operation, function.definition)), function, classes)


def _wide(compute, function, classes):
    with jax.enable_x64(True):
        arguments = function.arguments(classes)
        wide = [a.astype(np.float64) if a.dtype == np.float32 else a for a in arguments]
        return jax.tree.map(np.asarray, jax.jit(compute)(*wide))


def at(tree, index):
    return jax.tree.map(lambda leaf: leaf[index], tree)


def assert_close(actual, expected, ulps=16, size=0.0):
    """Within some ulps of the truth and of the largest number of its row, at least `size`."""
    error = ulps * 2**-23
    assertions.assert_close(actual, expected, rtol=error, of_largest=error, floor=size)


def value(f, *arguments):
    return f(*arguments)


def tolerated(function):
    """The size that ulps refer to where a formula cancels: 1, the largest probability."""
    return float(function.name == "softmax_jacobian")


@pytest.mark.wide
@every_function
def test_vmap_over_every_choice_of_arguments(function, classes):
    arguments = function.arguments(classes)
    both = jax.jit(lambda f, *a: (f(*a), gradients(f, *a)), static_argnums=0)
    for mapped in itertools.product([False, True], repeat=len(arguments)):
        if sum(mapped) not in (1, len(mapped)):
            continue
        in_axes = tuple(0 if m else None for m in mapped)
        taken = tuple(a if m else a[1] for a, m in zip(arguments, mapped, strict=True))
        actual = jax.vmap(functools.partial(both, function.call), in_axes)(*taken)
        if all(mapped):
            expected = tuple(truth(function, o, classes) for o in (value, gradients))
        else:
            pairs = list(zip(taken, mapped, strict=True))
            rows = [tuple(a[i] if m else a for a, m in pairs) for i in range(4)]
            results = (both(function.call, *one) for one in rows)
            expected = jax.tree.map(lambda *leaves: np.stack(leaves), *results)
        assert_close(actual, expected, size=tolerated(function))


@pytest.mark.wide
@every_function
def test_vmap_along_another_axis_and_twice(function, classes):
    arguments = function.arguments(classes)
    expected = truth(function, value, classes)
    last = tuple(np.moveaxis(a, 0, -1) for a in arguments)
    mapped = jax.jit(jax.vmap(function.call, in_axes=-1, out_axes=-1))(*last)
    assert_close(mapped, np.moveaxis(expected, 0, -1))
    square = tuple(a.reshape(2, 2, *a.shape[1:]) for a in arguments)
    twice = jax.jit(jax.vmap(jax.vmap(function.call)))(*square)
    assert_close(twice, expected.reshape(2, 2, *expected.shape[1:]))


def second_derivatives(f, *arguments):
    return forward_over_reverse(f, *arguments), reverse_over_reverse(f, *arguments)


@in_every_world
def test_second_derivatives(function, classes):
    """A second derivative is a difference: within ulps of what is subtracted.

    That is of size 1 (the tangents), and in a confident row as large as a sum over the classes.
    """
    arguments = function.arguments(classes)
    compute = jax.jit(functools.partial(second_derivatives, function.call))
    expected = truth(function, forward_over_reverse, classes)
    for i, size in enumerate([1, 1, 1, max(1, classes / 4)]):
        for actual in compute(*row(arguments, i)):
            assert_close(actual, at(expected, i), size=size)


@in_every_world
def test_many_rows_at_once(function, classes, monkeypatch):
    """Rows as the caller gives them, taken three at a time where the form has chunks."""
    monkeypatch.setattr(_cpu, "_CHUNK_BYTES", 3 * 4 * function.arguments(classes)[0].shape[-1])
    jax.clear_caches()
    arguments = function.arguments(classes)
    assert_close(
        function.call(*arguments), truth(function, value, classes), size=tolerated(function)
    )

    def total(*values):
        out = function.call(*values)
        w = np.sin(np.arange(1, out[0].size + 1)).reshape(1, *out.shape[1:]).astype(out.dtype)
        return jnp.sum(out * w)

    actual = jax.jit(jax.grad(total, floating(arguments)))(*arguments)
    assert_close(actual, truth(function, gradients, classes), size=tolerated(function))


def hessian(f, *arguments):
    return jax.hessian(functools.partial(weighted, f))(*arguments)


@pytest.mark.wide
@every_function
@pytest.mark.parametrize("operation", [hessian, reverse_thrice])
def test_vmap_of_hessian_and_third_derivative(function, classes, operation):
    if classes > 5:
        pytest.skip("C³ numbers; many classes have their second derivatives above")
    compute = jax.jit(jax.vmap(functools.partial(operation, function.call)))
    expected = truth(function, operation, classes)
    assert_close(compute(*function.arguments(classes)), expected, size=1)


@every_function
def test_checkpoint(function, classes):
    one = row(function.arguments(classes), 1)
    names = ("jaxsoftmax.shift", "jaxsoftmax.remainder")
    policies = (None, jax.checkpoint_policies.save_only_these_names(*names))

    @jax.jit
    def compute(*one):
        remats = (jax.checkpoint(function.call, policy=policy) for policy in policies)
        return [gradients(remat, *one) for remat in remats]

    for actual in compute(*one):
        assert_close(actual, at(truth(function, gradients, classes), 1))


@every_function
def test_scan(function, classes):
    """In a loop, with the gradient inside; and the gradient of the loop."""
    arguments = function.arguments(classes)

    def step(total, one):
        return total + weighted(function.call, *one), gradients(function.call, *one)

    def loop(*arguments):
        return jax.lax.scan(step, np.float32(0), arguments)

    through, inside = jax.jit(jax.grad(loop, floating(arguments), has_aux=True))(*arguments)
    expected = truth(function, gradients, classes)
    assert_close(inside, expected, size=tolerated(function))
    assert_close(through, expected, size=tolerated(function))


@in_worlds(WORLDS[1], wide=(WORLDS[0], *MORE_CLASSES))
def test_second_derivatives_of_a_scan(function, classes):
    """JAX before 0.12 drops a `custom_jvp` from a loop that is differentiated twice."""
    if function.name == "softmax_jacobian" and classes > 5:
        pytest.skip("C² numbers; JAX differentiates it")
    arguments = function.arguments(classes)

    def loop(f, *arguments):
        def step(total, one):
            return total + weighted(f, *one), None

        return jax.lax.scan(step, jnp.zeros((), arguments[0].dtype), arguments)[0]

    twice = functools.partial(forward_over_reverse, functools.partial(loop, function.definition))
    expected = _wide(twice, function, classes)
    looped = functools.partial(loop, function.call)
    for actual in jax.jit(functools.partial(second_derivatives, looped))(*arguments):
        assert_close(actual, expected, size=max(1, classes / 4))  # as above


def exported(f, *specifications, platforms=("cpu", "cuda", "tpu")):
    return export.export(jax.jit(f), platforms=platforms)(*specifications)


@every_function
def test_export(function, classes):
    """Lowering succeeds for each platform; what is meant for the CPU gives the same numbers."""
    arguments = function.arguments(classes)

    @jax.jit
    def compute(*arguments):
        f = jax.vmap(function.call)
        return f(*arguments), gradients(f, *arguments)

    for platform in ("cuda", "tpu", "cpu"):
        program = exported(compute, *map(jax.typeof, arguments), platforms=[platform])
        assert list(program.platforms) == [platform]
    assert_close(jax.jit(program.call)(*arguments), compute(*arguments), ulps=4)


@pytest.mark.wide
@every_function
@pytest.mark.parametrize("symbols", ["rows", "rows, classes"])
def test_export_with_symbolic_sizes(function, classes, symbols):
    """Value and gradient, for all platforms in one; a label counts from the first class."""
    of_classes = symbols != "rows"
    if of_classes and function.name.startswith("linear"):
        pytest.skip("a linear head has its own classes")
    arguments = function.arguments(classes)
    rows, *size = export.symbolic_shape(symbols)
    whole = arguments[0].shape if of_classes else None
    specifications = [
        jax.ShapeDtypeStruct((rows, *(size if a.shape == whole else a.shape[1:])), a.dtype)
        for a in arguments
    ]

    def compute(*arguments):
        f = lambda *arguments: jnp.sum(jnp.sin(function.call(*arguments)))  # noqa: E731
        return function.call(*arguments), jax.grad(f, floating(arguments))(*arguments)

    program = exported(compute, *specifications)
    cases = [function.arguments(c) for c in {classes, *((7, 40) if of_classes else ())}]
    ulps = 64 if of_classes else 4
    for taken in (*cases, tuple(a[:1] for a in arguments)):
        (value, slopes), (true, true_slopes) = program.call(*taken), compute(*taken)
        assert_close(value, true, ulps, size=float(of_classes))
        assert_close(slopes, true_slopes, ulps, size=1)  # differences of cotangents of size 1


def test_export_of_all_axes_with_symbolic_sizes():
    """`logsumexp(x)` of an array of any size."""
    both = jax.value_and_grad(js.logsumexp)
    sizes = export.symbolic_shape("rows, classes")
    program = exported(both, jax.ShapeDtypeStruct(sizes, jnp.float32))
    for classes in (5, 40):
        x = _logits(classes)
        assert_close(program.call(x), both(x), ulps=64)


def test_the_jacobian_has_forward_mode_too(classes):
    x = _logits(min(classes, 6))[1]
    with jax.enable_x64(True):
        expected = np.asarray(jax.jacfwd(_jacobian_of_definition)(x.astype(np.float64)))
    assert_close(jax.jacfwd(js.softmax_jacobian)(x), expected)
    tangent = np.cos(np.arange(x.size, dtype=np.float32))
    change = jax.jvp(js.softmax_jacobian, (x,), (tangent,))[1]
    assert_close(change, expected @ tangent)


def test_every_public_function_is_in_the_list():
    """But for those without a derivative: test_choices.py has their transforms.

    Of the divergences KL is here; test_divergence.py and test_linear_divergence.py have the others.
    """
    others = {"softmax_js_divergence", "linear_kl_divergence", "linear_js_divergence"}
    assert {f.name.partition("-")[0] for f in FUNCTIONS} == set(DIFFERENTIABLE) - others
