# SPDX-License-Identifier: Apache-2.0
"""Functions of logits on an explicit mesh, in every layout of every argument.

Numbers are those without a mesh; a gradient comes in the layout of its argument.
"""

from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from assertions import assert_close
from cases import generator
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from layouts import AXES, mesh_of, put

import jaxsoftmax as js

integer = js.softmax_cross_entropy_with_integer_labels
dense = js.softmax_cross_entropy
X = generator("sharded logits").standard_normal((4, 6, 8)).astype(np.float32)
LABELS = np.array([3, 0, 5, 47], np.int32)
WHERE = generator("sharded logits", "where").random(X.shape) < 0.8


@pytest.fixture
def mesh():
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        yield mesh


@cache
def with_gradients(f):
    """Compiled once for all layouts that are none."""

    @jax.jit
    def both(*arrays):
        out, pull = jax.vjp(f, *arrays)
        weights = jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)
        return out, pull(jax.sharding.reshard(weights, jax.typeof(out).sharding))

    return both


def check(f, arrays, specs, mesh):
    """A function and its gradients by arrays in these layouts, and with nothing sharded."""
    both, sharded = with_gradients(f), put(mesh, specs, arrays)
    got, expected = both(*sharded), both(*arrays)
    number = lambda a: None if a.dtype == jax.dtypes.float0 else a  # noqa: E731
    got_numbers, numbers = (jax.tree.map(number, t) for t in (got, expected))
    assert_close(got_numbers, numbers, rtol=2e-6, atol=2e-6, finite=False)
    for d, a in zip(got[1], sharded, strict=True):
        if d.dtype != jax.dtypes.float0:
            assert jax.typeof(d).sharding.spec == jax.typeof(a).sharding.spec


LAYOUTS = [P("data", None, "vocab"), P("data", "vocab", None), P(None, "fsdp", "vocab"), P("data")]
FAMILY = {
    "softmax": js.softmax,
    "log_softmax": js.log_softmax,
    "logsumexp": js.logsumexp,
    "logsumexp, b": lambda x, axis: js.logsumexp(x, axis, b=x * x),
    "softmax, where": lambda x, axis: js.softmax(x, axis, where=WHERE),
    "logsumexp, where": lambda x, axis: js.logsumexp(x, axis, where=WHERE[:1]),
    "dense, where": lambda x, axis: dense(x, x, axis, where=WHERE),
}


@pytest.mark.parametrize("axis", [(1, 2), None], ids=str)
def test_class_axes_of_any_layout(axis, mesh):
    """Every function in one program."""

    def sum_of_all(x):
        return jnp.stack([jnp.mean(f(x, axis)) for f in FAMILY.values()]).sum()[None]

    check(sum_of_all, [X], [LAYOUTS[0]], mesh)


@pytest.mark.wide
@pytest.mark.parametrize("axis", [(1, 2), (2, 1), None, (0, 2), 2, 1], ids=str)
@pytest.mark.parametrize("name", FAMILY)
def test_class_axes_of_any_number_and_every_layout(name, axis, mesh):
    f = partial(FAMILY[name], axis=axis)
    for spec in LAYOUTS:
        check(f, [X], [spec], mesh)


@pytest.mark.parametrize(
    "spec", [LAYOUTS[0], *(pytest.param(s, marks=pytest.mark.wide) for s in LAYOUTS[1:])], ids=str
)
def test_integer_labels_over_two_class_axes(spec, mesh):
    """Labels count through the axes in the given order, whichever is sharded."""
    for f in (
        lambda x, y: integer(x, y, (1, 2)),
        lambda x, y: integer(x, y, (2, 1), where=WHERE, ignore_index=3),
        lambda x, y: js.label_log_probs(x, y, (1, 2)).log_probs,
    ):
        for of_labels in (P(None), P("data")):
            check(f, [X, LABELS], [spec, of_labels], mesh)


@pytest.mark.parametrize(
    "of_logits", [P("data", "vocab"), P("data"), P(None, "vocab"), P()], ids=str
)
def test_dense_labels_in_any_layout(of_logits, mesh):
    z, y = X[0], np.abs(X[1])
    for of_labels in (P("data"), P(), P("fsdp"), P(None, "vocab"), P("data", "vocab"), P("vocab")):
        check(dense, [z, y], [of_logits, of_labels], mesh)
    for small, spec in ((y[0], P()), (y[0], P("vocab")), (y[:, :1], P("data")), (y[:1], P())):
        check(dense, [z, small], [of_logits, spec], mesh)


@pytest.mark.wide
@pytest.mark.parametrize("of_labels", [P(), P("data"), P("fsdp")], ids=str)
def test_integer_labels_in_any_layout(of_labels, mesh):
    labels = np.arange(6, dtype=np.int32)
    options: Any = {
        "label_smoothing": 0.1,
        "class_weights": np.linspace(0.5, 2, 8, dtype="float32"),
    }
    for f in (integer, partial(integer, **options)):
        for of_logits in (P("data", "vocab"), P("data"), P(None, "vocab"), P()):
            check(f, [X[0], labels], [of_logits, of_labels], mesh)


@pytest.mark.parametrize(
    ("of_logits", "of_target"),
    [
        (LAYOUTS[0], P(None, "fsdp", "vocab")),
        pytest.param(P(), P("vocab"), marks=pytest.mark.wide),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("name", "axis"),
    [("kl", (1, 2)), pytest.param("js", -1, marks=pytest.mark.wide)],
)
def test_divergences_of_logits_in_two_layouts(name, axis, of_logits, of_target, mesh):
    f = partial(getattr(js, f"softmax_{name}_divergence"), axis=axis)
    check(f, [X, X[::-1].copy()], [of_logits, of_target], mesh)


@pytest.mark.parametrize("axis", [-1, 0])
def test_the_jacobian_of_sharded_classes(axis, mesh):
    f = partial(js.softmax_jacobian, axis=axis)
    for spec in (P("data", "vocab"), P(None, "vocab"), P("data")):
        check(f, [X[0]], [spec], mesh)


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto])
def test_within_a_shard_map_over_all_axes_arrays_are_local(kind):
    """The forms of one CPU device serve there; over some axes, what shards the rest is open."""
    z, y = np.zeros((8, 600), np.float32), np.zeros(8, np.int32)
    whole = mesh_of(kind)

    def forms(**axes):
        f = jax.shard_map(
            integer, mesh=whole, in_specs=(P("data"), P("data")), out_specs=P("data"), **axes
        )
        return str(jax.make_jaxpr(f)(z, y))

    with jax.set_mesh(whole):
        z, y = put(whole, (P("data"), P("data")), (z, y))
        assert "local=True" in forms()
        if kind == AxisType.Auto:
            assert "local=False" in forms(axis_names={"data"})
        assert "local=False" in str(jax.make_jaxpr(integer)(z, y))


@pytest.mark.wide
@pytest.mark.parametrize("classes", [10, 40, 600, 4096, 2050])
def test_the_forms_of_one_device_within_shard_map(classes):
    """Every CPU form, with rows far from their label and confident ones, vmapped too."""
    z = generator("local forms", classes).standard_normal((16, classes)).astype(np.float32)
    y = np.arange(16, dtype=np.int32) % classes
    z[3, y[3]], z[5, 7], z[9, y[9]] = -40, 40, 30
    whole = mesh_of(AxisType.Auto)
    spec = P(AXES)
    f = jax.shard_map(integer, mesh=whole, in_specs=(spec, spec), out_specs=spec)
    twice = np.stack([z, z]), np.stack([y, y])
    with jax.set_mesh(whole):
        got, want = (
            jax.jit(lambda z, y, f=f: (f(z, y), jax.grad(lambda z: f(z, y).sum())(z)))(z, y)
            for f in (f, integer)
        )
        mapped = jax.jit(jax.vmap(f))(*twice)
    assert_close((*got, mapped[1]), (*want, want[0]), rtol=2e-6, atol=1e-37)
