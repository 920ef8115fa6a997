# SPDX-License-Identifier: Apache-2.0
"""Values and gradients on a mesh are those of one device: any layout, any way to say it."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from layouts import AXES, LAYOUTS, mesh_of, names, put

import jaxsoftmax
from bench.collectives import collectives

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


# Variations of the others.
WIDE = (
    "data over two axes",
    "sequence",
    "vocabulary over two axes",
    "fsdp, tokens replicated",
    "fsdp along the vocabulary",
)
every_layout = [
    pytest.param(layout, id=name, marks=[pytest.mark.wide] if name in WIDE else [])
    for name, layout in LAYOUTS.items()
]


# Where XLA decides, the layout changes nothing in the program.
automatic = pytest.param("automatic", marks=pytest.mark.wide)


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("way", [automatic, "explicit", "shard_map"])
@pytest.mark.parametrize("layout", every_layout)
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


@pytest.mark.parametrize("gradients", ["in_forward", "recompute"])
def test_an_automatic_mesh_told_its_layout(gradients):
    """One line around the head: the layout is known, as on an explicit mesh."""
    layout = LAYOUTS["fsdp and vocabulary"]
    specs = layout.specs()
    names_of = ("hidden", "kernel", "labels")

    def mean(hidden, kernel, labels):
        options = {"ignore_index": IGNORED, "gradients": gradients}
        return head(hidden, kernel, labels, **options)

    told = jax.sharding.explicit_axes(mean, in_sharding=tuple(specs[name] for name in names_of))
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        arrays = put(mesh, layout, ARRAYS)
        step = jax.jit(jax.value_and_grad(told, argnums=(0, 1)))
        got = step(*(arrays[name] for name in names_of))
    true = jax.value_and_grad(mean, argnums=(0, 1))(*(ARRAYS[name] for name in names_of))
    for g, t in zip(jax.tree.leaves(got), jax.tree.leaves(true), strict=True):
        np.testing.assert_allclose(g, t, rtol=0, atol=TOLERANCE * np.abs(t).max())


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("gradients", ["in_forward", "recompute"])
def test_half_precision_on_an_explicit_mesh(gradients, dtype):
    """One rounding of the unsharded gradient, and of float16's small ones none to 0."""
    layout = LAYOUTS["fsdp and vocabulary"]
    names_of = ("hidden", "kernel")

    def mean(hidden, kernel, labels):
        labels = jnp.maximum(labels, 0)
        return head(hidden, kernel, labels, denominator=1e5, gradients=gradients, chunk_size=5)

    arrays = {k: v.astype(dtype) if k in names_of else v for k, v in ARRAYS.items()}
    step = jax.jit(jax.grad(mean, argnums=(0, 1)))
    true = step(*(arrays[name] for name in (*names_of, "labels")))
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        there = put(mesh, layout, arrays)
        got = step(*(there[name] for name in (*names_of, "labels")))
    for result, expected in zip(got, true, strict=True):
        g, t = (np.asarray(x, np.float32) for x in (result, expected))
        # d_logits and the result are rounded, and in recompute each device's part of d_kernel.
        bound = 4 * float(jnp.finfo(dtype).eps) * np.abs(t).max()
        np.testing.assert_allclose(g, t, rtol=0, atol=bound)
        assert np.all((g != 0) | (np.abs(t) <= bound))


def test_forward_mode_with_axis_name():
    """The tangents of a row whose classes are spread over devices."""
    layout = LAYOUTS["data and vocabulary"]
    specs = layout.specs()
    tangent = np.cos(np.arange(ARRAYS["logits"].size, dtype=np.float32))
    tangent = tangent.reshape(ARRAYS["logits"].shape)
    loss = jaxsoftmax.forward_mode.softmax_cross_entropy_with_integer_labels

    def local(z, dz, labels):
        return jax.jvp(lambda z: loss(z, jnp.maximum(labels, 0), axis_name="vocab"), (z,), (dz,))

    in_specs = (specs["logits"], specs["logits"], specs["labels"])
    sharded = jax.shard_map(
        local, mesh=mesh_of(AxisType.Auto), in_specs=in_specs, out_specs=specs["labels"]
    )
    got = jax.jit(sharded)(ARRAYS["logits"], tangent, ARRAYS["labels"])
    labels = np.maximum(ARRAYS["labels"], 0)
    true = jax.jvp(lambda z: loss(z, labels), (ARRAYS["logits"],), (tangent,))
    for g, t in zip(got, true, strict=True):
        np.testing.assert_allclose(g, t, rtol=0, atol=TOLERANCE * np.abs(t).max())


def test_second_derivatives_with_axis_name():
    layout = LAYOUTS["data and vocabulary"]
    specs = layout.specs()

    def total(z, labels, axis_name):
        losses = integer_labels(z, jnp.maximum(labels, 0), axis_name=axis_name, z_loss=0.1)
        return jnp.sum(losses**2)

    def local(z, labels):
        return lax.psum(total(z, labels, "vocab"), "data")

    in_specs = (specs["logits"], specs["labels"])
    sharded = jax.shard_map(local, mesh=mesh_of(AxisType.Auto), in_specs=in_specs, out_specs=P())

    def second(f):
        def slope(z):
            return jnp.sum(jax.grad(f)(z, ARRAYS["labels"]) ** 2)

        return jax.jit(jax.grad(slope))(ARRAYS["logits"])

    got, true = second(sharded), second(lambda z, labels: total(z, labels, None))
    np.testing.assert_allclose(got, true, rtol=0, atol=TOLERANCE * np.abs(true).max())


@pytest.mark.parametrize("name", ["hidden", "logits"])
def test_bad_labels_and_rows_with_axis_name(name):
    """A label that is no class, of any device, and a row with NaN on one device: NaN, no other."""
    layout = LAYOUTS["vocabulary"]
    specs = layout.specs()
    labels = np.maximum(ARRAYS["labels"], 0)
    labels[1, 1], labels[2, 2] = CLASSES, -1
    logits = ARRAYS["logits"].copy()
    logits[3, 3, CLASSES - 1] = np.nan

    def local(a, y):
        if name == "logits":
            return integer_labels(a["logits"], y, axis_name="vocab")
        return head(a["hidden"], a["kernel"], y, reduction=None, axis_name="vocab")

    mesh = mesh_of(AxisType.Auto)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(specs, specs["labels"]), out_specs=P())
    losses = np.asarray(jax.jit(sharded)(ARRAYS | {"logits": logits}, labels))
    expected = np.zeros(labels.shape, bool)
    expected[[1, 2], [1, 2]] = True
    expected[3, 3] = name == "logits"
    np.testing.assert_array_equal(np.isnan(losses), expected)


SHARED = {
    "temperature": lambda a, t, **given: head(*of_head(a), temperature=t, **given),
    "soft cap, recomputed": lambda a, t, **given: head(
        *of_head(a), soft_cap=t, gradients="recompute", **given
    ),
    "smoothing and class weights": lambda a, t, **given: head(
        *of_head(a), label_smoothing=t / 10, class_weights=jnp.abs(a["bias"]) + t, **given
    ),
    "what a loss closes over": lambda a, t, **given: jaxsoftmax.linear_loss(
        lambda z: jnp.sum((z * t) ** 2, axis=-1), a["hidden"], a["kernel"], reduction="sum"
    ),
    "an argument of tokens": lambda a, t, **given: jaxsoftmax.linear_loss(
        lambda z, y: jnp.sum(z, axis=-1) * y,
        a["hidden"],
        a["kernel"],
        jnp.broadcast_to(t, a["labels"].shape),
        reduction="sum",
    ),
}


def of_head(a):
    return a["hidden"], a["kernel"], jnp.maximum(a["labels"], 0)


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("layout_name", ["data", "vocabulary", "data and vocabulary"])
def test_what_all_devices_share_is_differentiated_once(layout_name, name):
    """In `shard_map`, a number that does not vary over the devices that share the tokens."""
    layout = LAYOUTS[layout_name]
    if layout.classes and name in {"what a loss closes over", "an argument of tokens"}:
        pytest.skip("a loss of its own, which takes whole rows")
    specs, f = layout.specs(), SHARED[name]
    arrays = ARRAYS | {"bias": np.abs(np.where(np.isinf(ARRAYS["bias"]), 1, ARRAYS["bias"]))}

    def local(a, t):
        total = f(a, t, reduction="sum", axis_name=layout.classes)
        return lax.psum(total, layout.token_axes) if layout.token_axes else total

    mesh = mesh_of(AxisType.Auto)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=(specs, P()), out_specs=P())
    t = jnp.float32(1.3)
    got = jax.jit(jax.value_and_grad(lambda t: sharded(arrays, t)))(t)
    given = {"reduction": "sum"}
    true = jax.jit(jax.value_and_grad(lambda t: f(arrays, t, **given)))(t)
    np.testing.assert_allclose(got, true, rtol=TOLERANCE)


@pytest.mark.parametrize("gradients", ["in_forward", "recompute"])
@pytest.mark.parametrize("alone", ["labels", "bias", "weights", "class_weights", "nothing set"])
def test_sharded_as_nothing_else_is(alone, gradients):
    """On an explicit mesh: one argument sharded and no other, or on no mesh; or no mesh set."""
    mesh = mesh_of(AxisType.Explicit)
    names = "hidden", "kernel", "labels", "bias", "weights", "class_weights"
    specs: dict[str, P] = dict.fromkeys(names, P())
    if alone == "nothing set":
        specs |= LAYOUTS["fsdp and vocabulary"].specs()
    else:
        specs[alone] = P("data") if alone in {"labels", "weights"} else P("vocab")
    bias = np.where(np.isinf(ARRAYS["bias"]), 1, ARRAYS["bias"])
    arrays = ARRAYS | {"bias": bias, "class_weights": np.abs(bias) + 1}

    def mean(a, labels):
        given = {name: a[name] for name in ("bias", "weights", "class_weights")}
        return head(
            a["hidden"],
            a["kernel"],
            jnp.maximum(labels, 0),
            label_smoothing=0.1,
            gradients=gradients,
            chunk_size=5,
            **given,
        )

    step = jax.jit(jax.value_and_grad(mean))
    given = {n: arrays[n] for n in names}
    there = {n: jax.device_put(a, NamedSharding(mesh, specs[n])) for n, a in given.items()}

    def run(a):
        return step({n: x for n, x in a.items() if n != "labels"}, a["labels"])

    if alone == "nothing set":
        results = [run(there)]
    else:
        with jax.set_mesh(mesh):
            results = [run(there)]
        results.append(run(given | {alone: there[alone]}))
    true = run(given)
    for got in results:
        for g, t in zip(jax.tree.leaves(got), jax.tree.leaves(true), strict=True):
            np.testing.assert_allclose(g, t, rtol=0, atol=TOLERANCE * np.abs(t).max())


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (1, 2)])
@pytest.mark.parametrize("gradients", ["in_forward", "recompute"])
def test_a_mesh_axis_of_one_device(gradients, shape):
    devices = jax.devices()[: shape[0] * shape[1]]
    kinds = (AxisType.Explicit,) * 2
    mesh = jax.make_mesh(shape, ("data", "vocab"), axis_types=kinds, devices=devices)
    hidden, kernel = ARRAYS["hidden"].reshape(24, WIDTH), ARRAYS["kernel"]
    labels = np.maximum(ARRAYS["labels"], 0).reshape(24)

    def mean(hidden, kernel, labels):
        return head(hidden, kernel, labels, gradients=gradients, chunk_size=5)

    step = jax.jit(jax.value_and_grad(mean, argnums=(0, 1)))
    true = step(hidden, kernel, labels)
    with jax.set_mesh(mesh):
        arrays = [
            jax.device_put(hidden, P("data", None)),
            jax.device_put(kernel, P("data", "vocab")),
            jax.device_put(labels, P("data")),
        ]
        got = step(*arrays)
    assert [jax.typeof(g) for g in got[1]] == [jax.typeof(a) for a in arrays[:2]]
    for g, t in zip(jax.tree.leaves(got), jax.tree.leaves(true), strict=True):
        np.testing.assert_allclose(g, t, rtol=0, atol=TOLERANCE * np.abs(t).max())


UNREDUCED = {
    "recompute": lambda a: head(*of_head(a), reduction=None, chunk_size=5),
    "any loss": lambda a: jaxsoftmax.linear_loss(
        integer_labels, *of_head(a), reduction=None, chunk_size=3
    ),
    "log-probabilities": lambda a: jaxsoftmax.linear_log_probs(*of_head(a)).log_probs,
}
# Of the mesh ("data", "fsdp", "vocab"), with axes that a larger machine has more devices along.
ONE_DEVICE_AXES = [
    pytest.param((4, 1, 2), "hybrid", id="fsdp of 1"),
    pytest.param((1, 4, 1), "hybrid", id="data and vocab of 1"),
    pytest.param((4, 1, 2), "data and sequence", id="sequence of 1"),
    pytest.param((1, 1, 1), "hybrid", id="all of 1", marks=pytest.mark.wide),
    pytest.param((4, 1, 1), "vocabulary over two axes", id="classes of 1", marks=pytest.mark.wide),
]


@pytest.mark.parametrize("name", UNREDUCED)
@pytest.mark.parametrize(("shape", "layout_name"), ONE_DEVICE_AXES)
def test_results_name_every_mesh_axis_of_their_tokens(shape, layout_name, name):
    """Of one device as well, alone or in a tuple: otherwise `losses * weights` raises."""
    devices = jax.devices()[: math.prod(shape)]
    mesh = jax.make_mesh(shape, AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices)
    names_of = ("hidden", "kernel", "labels", "weights")

    def weighted(arrays):
        losses = UNREDUCED[name](arrays)
        return jnp.sum(losses * arrays["weights"]), losses

    @jax.jit
    def step(floating, labels):
        f = lambda floating: weighted(floating | {"labels": labels})  # noqa: E731
        return jax.value_and_grad(f, has_aux=True)(floating)

    def run(a):
        return step({name: a[name] for name in names_of if name != "labels"}, a["labels"])

    true = run(ARRAYS)
    with jax.set_mesh(mesh):
        arrays = put(mesh, LAYOUTS[layout_name], {name: ARRAYS[name] for name in names_of})
        (total, losses), gradients = run(arrays)
    assert jax.typeof(losses).sharding == jax.typeof(arrays["weights"]).sharding
    for name_of, gradient in gradients.items():
        assert jax.typeof(gradient) == jax.typeof(arrays[name_of])
    for g, t in zip(*map(jax.tree.leaves, (((total, losses), gradients), true)), strict=True):
        np.testing.assert_allclose(g, t, rtol=0, atol=TOLERANCE * np.abs(t).max())


@pytest.mark.parametrize("classes", [12, 100, 1024])
def test_labels_sharded_over_one_device_beside_whole_logits(monkeypatch, classes):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    mesh = jax.make_mesh((1,), ("data",), (AxisType.Explicit,), devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        labels = jax.device_put(np.zeros(8, np.int32), NamedSharding(mesh, P("data")))
        losses = jaxsoftmax.softmax_cross_entropy_with_integer_labels(
            jnp.zeros((8, classes)), labels
        )
        np.testing.assert_allclose(losses, np.full(8, np.log(classes)), rtol=1e-6)


def test_a_mesh_that_is_partly_automatic_is_refused():
    """JAX itself sums wrongly over an explicit axis there."""
    kinds = (AxisType.Explicit, AxisType.Auto)
    mesh = jax.make_mesh((4, 2), ("data", "vocab"), axis_types=kinds)
    labels = np.maximum(ARRAYS["labels"], 0)
    said = r"^linear_softmax_cross_entropy: the mesh must be explicit or automatic along all axes"
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=said):
        head(jax.device_put(ARRAYS["hidden"], P("data")), ARRAYS["kernel"], labels)


def partly_manual(name, layout, manual):
    """The program in a `shard_map` over these axes; the others stay the mesh's."""

    def only(spec):
        axes = (names(entry) for entry in spec)
        kept = (tuple(a for a in entry if a in manual) for entry in axes)
        return P(*(entry or None for entry in kept))

    def body(a):
        def reduced(x):
            axes = tuple(jax.typeof(x).manual_axis_type.varying)
            return lax.psum(x, axes) if axes else x

        classes = layout.classes if layout.classes in manual else None
        return PROGRAMS[name](a, reduced, classes)

    specs = {name: only(spec) for name, spec in layout.specs().items()}
    return jax.shard_map(body, in_specs=(specs,), out_specs=P(), axis_names=set(manual))


@pytest.mark.parametrize("name", ["in_forward", "recompute", "any_loss"])
@pytest.mark.parametrize("manual", [("vocab",), ("data",), ("data", "vocab")], ids=str)
def test_a_shard_map_over_some_axes_of_an_automatic_mesh(manual, name):
    layout = LAYOUTS["data and vocabulary"]
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        arrays = put(mesh, layout, ARRAYS)
        program = partly_manual(name, layout, manual)
        value, gradients = jax.jit(lambda a: value_and_gradients(program, a))(arrays)
    true_value, true_gradients = unsharded(name)
    np.testing.assert_allclose(value, true_value, rtol=TOLERANCE)
    for array in FLOATING:
        got, true = (np.asarray(g[array]) for g in (gradients, true_gradients))
        np.testing.assert_allclose(got, true, rtol=0, atol=TOLERANCE * np.abs(true).max())


@pytest.mark.parametrize("name", ["in_forward", "recompute", "any_loss", "log_probs"])
def test_a_shard_map_over_some_axes_of_an_explicit_mesh_is_refused(name):
    """XLA would end the process."""
    layout = LAYOUTS["data and vocabulary"]
    mesh = mesh_of(AxisType.Explicit)
    said = (
        r"^linear_\w+: inside shard_map the mesh must be manual or automatic along all axes \(name"
    )
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=said):
        partly_manual(name, layout, ("vocab",))(put(mesh, layout, ARRAYS))


@pytest.mark.parametrize("name", ["in_forward", "recompute", "any_loss", "log_probs"])
def test_a_shard_map_without_jit(name):
    layout = LAYOUTS["data and vocabulary"]
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        value = in_shard_map(name, layout)(put(mesh, layout, ARRAYS))
    np.testing.assert_allclose(value, unsharded(name)[0], rtol=TOLERANCE)


def test_what_axis_name_needs_is_said():
    specs = LAYOUTS["vocabulary"].specs()
    mesh = mesh_of(AxisType.Auto)

    def run(function, in_specs, *arrays):
        jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=P())(*arrays)

    z, labels = ARRAYS["logits"], np.maximum(ARRAYS["labels"], 0)
    whole = r"logits must vary over axis_name 'vocab', .*; got one that varies over \(\)"
    with pytest.raises(ValueError, match=whole):
        run(lambda z, y: integer_labels(z, y, axis_name="vocab"), (P(), P()), z, labels)
    here = (
        r"axis_name must name axes that an enclosing shard_map .*\('data', 'fsdp', 'vocab'\), each"
    )
    with pytest.raises(ValueError, match=here + r" once; got 'model'"):
        run(lambda z, y: integer_labels(z, y, axis_name="model"), (P(), P()), z, labels)
    unsummed = r"loss_fn must give the losses of whole rows, summed over axis_name 'vocab'; got"
    with pytest.raises(ValueError, match=unsummed):
        run(
            lambda h, k: jaxsoftmax.linear_loss(
                lambda z: jnp.sum(z, axis=-1), h, k, axis_name="vocab"
            ),
            (P(), specs["kernel"]),
            ARRAYS["hidden"],
            ARRAYS["kernel"],
        )
    part = r"hidden must be the same on all devices along axis_name 'vocab', which shards the"
    with pytest.raises(ValueError, match=part):
        run(
            lambda h, k, y: head(h, k, y, axis_name="vocab"),
            (P(None, "vocab"), specs["kernel"], P(None, "vocab")),
            ARRAYS["hidden"],
            ARRAYS["kernel"],
            labels,
        )


def test_wide_token_arguments_stay_sharded():
    """Dense targets as wide as the logits, and their gradient: nothing of them is gathered."""
    layout = LAYOUTS["data and vocabulary"]
    targets = np.exp(-np.abs(ARRAYS["logits"]))

    def mean(hidden, kernel, targets):
        return jaxsoftmax.linear_loss(
            jaxsoftmax.softmax_cross_entropy, hidden, kernel, targets, chunk_size=5
        )

    step = jax.jit(jax.value_and_grad(mean, argnums=(0, 1, 2)))
    true = step(ARRAYS["hidden"], ARRAYS["kernel"], targets)
    mesh = mesh_of(AxisType.Explicit)
    with jax.set_mesh(mesh):
        arrays = put(mesh, layout, ARRAYS | {"logits": targets})
        arguments = [arrays[name] for name in ("hidden", "kernel", "logits")]
        got = step(*arguments)
        found = collectives(step.lower(*arguments).compile().as_text() or "")
    for g, t in zip(jax.tree.leaves(got), jax.tree.leaves(true), strict=True):
        np.testing.assert_allclose(g, t, rtol=0, atol=TOLERANCE * np.abs(t).max())
    assert [jax.typeof(g) for g in got[1]] == [jax.typeof(a) for a in arguments]
    wide = [one for one in found for dims in one.dims if CLASSES // 2 in dims and one.in_loop]
    gathers = [one for one in found if one.kind == "all-gather" and (WIDTH, 12) not in one.dims]
    assert not wide
    assert not gathers
