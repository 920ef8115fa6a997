# SPDX-License-Identifier: Apache-2.0
"""Values and gradients on a mesh are those of one device: any layout, any way to say it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from layouts import LAYOUTS, mesh_of, names, put

import jaxsoftmax

BATCH, SEQUENCE, WIDTH, CLASSES = 4, 6, 8, 24
IGNORED = -100
rng = np.random.default_rng(5)
ARRAYS = {
    "hidden": rng.normal(size=(BATCH, SEQUENCE, WIDTH)).astype(np.float32),
    "kernel": rng.normal(size=(WIDTH, CLASSES)).astype(np.float32),
    "bias": rng.normal(size=CLASSES).astype(np.float32),
    "labels": rng.integers(0, CLASSES, (BATCH, SEQUENCE)).astype(np.int32),
    "weights": rng.uniform(0.5, 1.5, (BATCH, SEQUENCE)).astype(np.float32),
    "logits": 4 * rng.normal(size=(BATCH, SEQUENCE, CLASSES)).astype(np.float32),
}
ARRAYS["labels"][0, :2] = IGNORED, CLASSES - 1
ARRAYS["bias"][3] = -np.inf  # a class left out
# Each result sums at most BATCH · SEQUENCE · CLASSES numbers of its own size in another order.
TOLERANCE = 64 * float(np.finfo(np.float32).eps)

integer_labels = jaxsoftmax.softmax_cross_entropy_with_integer_labels
head = jaxsoftmax.linear_softmax_cross_entropy


def in_forward(a, reduced, axis_name):
    total = head(
        a["hidden"],
        a["kernel"],
        a["labels"],
        bias=a["bias"],
        weights=a["weights"],
        ignore_index=IGNORED,
        label_smoothing=0.1,
        reduction="sum",
        chunk_size=3,
        axis_name=axis_name,
    )
    return reduced(total)


def recompute(a, reduced, axis_name):
    losses = head(
        a["hidden"],
        a["kernel"],
        a["labels"],
        bias=a["bias"],
        class_weights=jnp.exp(jnp.where(a["bias"] > -jnp.inf, a["bias"], 0)),
        ignore_index=IGNORED,
        label_smoothing=0.1,
        z_loss=1e-2,
        reduction=None,
        chunk_size=5,
        axis_name=axis_name,
    )
    return reduced(jnp.sum(losses * a["weights"]))


def any_loss(a, reduced, axis_name):
    def log_probs(z, labels):
        out = jaxsoftmax.label_log_probs(z, jnp.maximum(labels, 0), axis_name=axis_name)
        return out.log_probs * jnp.where(labels == IGNORED, 0, out.log_normalizers)

    losses = jaxsoftmax.linear_loss(
        log_probs, a["hidden"], a["kernel"], a["labels"], reduction=None, axis_name=axis_name
    )
    return reduced(jnp.sum(losses * a["weights"]))


def log_probs(a, reduced, axis_name):
    labels = jnp.maximum(a["labels"], 0)
    out = jaxsoftmax.linear_log_probs(
        a["hidden"], a["kernel"], labels, with_entropy=True, soft_cap=5.0, axis_name=axis_name
    )
    assert out.entropies is not None
    fields = jnp.stack([out.log_probs, out.log_normalizers, out.entropies])
    return reduced(jnp.sum(fields * a["weights"][None]))


def logits_level(a, reduced, axis_name):
    z, w = a["logits"], a["weights"]
    options = {"label_smoothing": 0.1, "z_loss": 1e-2, "axis_name": axis_name}
    losses = integer_labels(z, a["labels"], ignore_index=IGNORED, **options)
    dense = jaxsoftmax.softmax_cross_entropy(z, jnp.exp(-z), where=z > -6, **options)
    labels = jnp.maximum(a["labels"], 0)
    out = jaxsoftmax.label_log_probs(z, labels, with_entropy=True, axis_name=axis_name)
    assert out.entropies is not None
    fields = [losses, dense, out.log_probs, out.log_normalizers, out.entropies]
    return reduced(jnp.sum(jnp.stack(fields) * w[None]))


def softmax_family(a, reduced, axis_name):
    z, w = a["logits"], a["weights"]
    if axis_name is not None:  # these take whole rows
        z = lax.all_gather(z, axis_name, axis=2, tiled=True)
    terms = jaxsoftmax.softmax(z) ** 2 + 0.1 * jaxsoftmax.log_softmax(z)
    total = jnp.sum((jnp.sum(terms, axis=-1) + jnp.asarray(jaxsoftmax.logsumexp(z, axis=-1))) * w)
    return reduced(total if axis_name is None else total / lax.axis_size(axis_name))


PROGRAMS = {
    f.__name__: f
    for f in (in_forward, recompute, any_loss, log_probs, logits_level, softmax_family)
}
FLOATING = [name for name in ARRAYS if name != "labels"]


def value_and_gradients(program, arrays):
    """Of the scalar `program(arrays)`, in every floating array."""

    def loss(floating):
        return program(arrays | floating)

    return jax.value_and_grad(loss)({name: arrays[name] for name in FLOATING})


@functools.cache
def unsharded(name):
    program = functools.partial(PROGRAMS[name], reduced=lambda x: x, axis_name=None)
    return jax.jit(lambda a: value_and_gradients(program, a))(ARRAYS)


def in_shard_map(name, layout):
    """The same program of global arrays, each device on its part; the kernel's width gathered."""
    width, classes = layout.kernel
    together = layout.token_axes

    def body(a):
        if width is not None:
            a = a | {"kernel": lax.all_gather(a["kernel"], width, axis=0, tiled=True)}
        if classes != layout.classes:
            a = a | {
                "kernel": lax.all_gather(a["kernel"], classes, axis=1, tiled=True),
                "bias": lax.all_gather(a["bias"], classes, axis=0, tiled=True),
            }

        def reduced(x):
            # A gathered array counts as different everywhere: each device's part of the same.
            axes = tuple(jax.typeof(x).manual_axis_type.varying)
            same = [axis for axis in axes if axis not in (*together, *names(layout.classes))]
            return lax.psum(x, axes) / lax.axis_size(tuple(same)) if axes else x

        return PROGRAMS[name](a, reduced, layout.classes)

    return jax.shard_map(body, in_specs=(layout.specs(),), out_specs=P())


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("way", ["automatic", "explicit", "shard_map"])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=list(LAYOUTS))
def test_values_and_gradients_are_those_of_one_device(layout, way, name):
    mesh = mesh_of(AxisType.Explicit if way == "explicit" else AxisType.Auto)
    with jax.set_mesh(mesh):
        arrays = put(mesh, layout, ARRAYS)
        program = functools.partial(PROGRAMS[name], reduced=lambda x: x, axis_name=None)
        if way == "shard_map":
            program = in_shard_map(name, layout)
        value, gradients = jax.jit(lambda a: value_and_gradients(program, a))(arrays)
    true_value, true_gradients = unsharded(name)
    np.testing.assert_allclose(value, true_value, rtol=TOLERANCE)
    for array in FLOATING:
        got, true = (np.asarray(g[array]) for g in (gradients, true_gradients))
        np.testing.assert_allclose(
            got, true, rtol=0, atol=TOLERANCE * np.abs(true).max(), err_msg=array
        )
        if way == "explicit":
            assert jax.typeof(gradients[array]) == jax.typeof(arrays[array]), array
