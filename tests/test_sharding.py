# SPDX-License-Identifier: Apache-2.0
"""Values and gradients on a mesh are those of one device: any layout, any way to say it."""

import functools
from typing import Any

import assertions
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import on_device, several
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from layouts import LAYOUTS, mesh_of, names, put

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
# In every other row two maxima, of two shards.
ARRAYS["logits"][:, ::2, [5, 20]] = ARRAYS["logits"][:, ::2].max(-1, keepdims=True)
FINITE_BIAS = np.abs(ARRAYS["bias"])
ARRAYS["bias"][3] = -np.inf  # a class left out
# Each result sums at most BATCH · SEQUENCE · CLASSES numbers of its own size in another order.
TOLERANCE = 64 * float(np.finfo(np.float32).eps)

DATA_AND_VOCABULARY = LAYOUTS["data and vocabulary"]

integer_labels = jaxsoftmax.softmax_cross_entropy_with_integer_labels
head = jaxsoftmax.linear_softmax_cross_entropy
both_orders = pytest.mark.parametrize("gradients", ["in_forward", "recompute"])


def operands(a):
    return a["hidden"], a["kernel"], a["labels"]


def of_head(a):
    """Operands whose labels are all in range."""
    return *operands(a)[:2], jnp.maximum(a["labels"], 0)


def mean(gradients, **options):
    """Of a dictionary of arrays; those of these names that it holds are arguments too."""

    def program(a):
        given = {n: a[n] for n in ("bias", "weights", "class_weights") if n in a}
        return head(*of_head(a), gradients=gradients, chunk_size=5, **given, **options)

    return program


def weighted(losses, a):
    """Σ weights · losses, which come in the layout of their tokens."""
    assert jax.typeof(losses).sharding == jax.typeof(a["weights"]).sharding
    return jnp.sum(losses * a["weights"])


def in_forward(a, axis_name=None, **layout):
    return head(
        *operands(a),
        bias=a["bias"],
        weights=a["weights"],
        ignore_index=IGNORED,
        label_smoothing=0.1,
        reduction="sum",
        chunk_size=3,
        axis_name=axis_name,
        **layout,
    )


def recompute(a, axis_name=None, **layout):
    losses = head(
        *operands(a),
        bias=a["bias"],
        class_weights=jnp.exp(jnp.where(a["bias"] > -jnp.inf, a["bias"], 0)),
        ignore_index=IGNORED,
        label_smoothing=0.1,
        z_loss=1e-2,
        reduction=None,
        chunk_size=5,
        axis_name=axis_name,
        **layout,
    )
    return weighted(losses, a)


def any_loss(a, axis_name=None, **layout):
    def log_probs(z, labels):
        out = jaxsoftmax.label_log_probs(z, jnp.maximum(labels, 0), axis_name=axis_name)
        return out.log_probs * jnp.where(labels == IGNORED, 0, out.log_normalizers)

    options = {"reduction": None, "axis_name": axis_name, **layout}
    return weighted(jaxsoftmax.linear_loss(log_probs, *operands(a), **options), a)


def log_probs(a, axis_name=None, **layout):
    options = {"with_entropy": True, "soft_cap": 5.0, "axis_name": axis_name, **layout}
    out = jaxsoftmax.linear_log_probs(*of_head(a), **options)
    hidden, kernel, labels = of_head(a)
    every = several(labels, CLASSES)
    more = jaxsoftmax.linear_log_probs(hidden, kernel, every, with_predictions=True, **options)
    return sum(weighted(field, a) for field in out[:3]) + of_several(more, a)


def of_several(out, a):
    """Of log-probabilities of several labels, with predictions: all fields."""
    fields = [out.log_probs[..., k] for k in range(out.log_probs.shape[-1])]
    predicted = out.predictions.astype(jnp.float32) / CLASSES
    fields = [*fields, out.log_normalizers, out.entropies, predicted]
    return sum((k + 1) * weighted(field, a) for k, field in enumerate(fields))


def logits_level(a, axis_name=None):
    z, labels = a["logits"], jnp.maximum(a["labels"], 0)
    options = {"label_smoothing": 0.1, "z_loss": 1e-2, "axis_name": axis_name}
    losses = integer_labels(z, a["labels"], ignore_index=IGNORED, **options)
    dense = jaxsoftmax.softmax_cross_entropy(z, jnp.exp(-z), where=z > -6, **options)
    out = jaxsoftmax.label_log_probs(z, labels, with_entropy=True, axis_name=axis_name)
    more = jaxsoftmax.label_log_probs(
        z,
        several(labels, CLASSES),
        with_entropy=True,
        with_predictions=True,
        axis_name=axis_name,
    )
    return sum(weighted(field, a) for field in (losses, dense, *out[:3])) + of_several(more, a)


def divergences(a, axis_name=None):
    z, options = a["logits"], {"axis_name": axis_name, "temperature": 2.0}
    far, near = jnp.sin(z), z + 1e-2 * jnp.cos(z)
    kl = jaxsoftmax.softmax_kl_divergence(z, far, where=z > -6, **options)
    close = jaxsoftmax.softmax_kl_divergence(near, z, **options)
    mixed = jaxsoftmax.softmax_js_divergence(z, far, weight=0.3, **options)
    return weighted(kl + 1e4 * close + mixed, a)


def softmax_family(a, axis_name=None):
    z = a["logits"]
    if axis_name is not None:  # these take whole rows
        z = lax.all_gather(z, axis_name, axis=2, tiled=True)
    terms = jaxsoftmax.softmax(z) ** 2 + 0.1 * jaxsoftmax.log_softmax(z)
    total = weighted(jnp.sum(terms, axis=-1) + jnp.asarray(jaxsoftmax.logsumexp(z, axis=-1)), a)
    return total if axis_name is None else total / lax.axis_size(axis_name)


def tied(a, axis_name=None):
    """Every head with the kernel as its transpose."""
    heads: Any = [PROGRAMS[name] for name in HEADS]
    return sum(f(a, axis_name, transpose_kernel=True) for f in heads)


PROGRAMS = {
    f.__name__: f
    for f in (in_forward, recompute, any_loss, log_probs, logits_level, softmax_family, divergences)
}
HEADS = ["in_forward", "recompute", "any_loss", "log_probs"]


def stepped(program):
    """The value of `program(arrays)` and its gradients by every floating array, compiled."""

    def step(arrays):
        floating = {n: a for n, a in arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}
        return jax.value_and_grad(lambda floating: program(arrays | floating))(floating)

    return jax.jit(step)


@functools.cache
def unsharded(program):
    return stepped(program)(ARRAYS)


assert_close = functools.partial(assertions.assert_close, of_largest=TOLERANCE)


def check(program, mesh, specs, *, arrays=ARRAYS, true=None):
    """The program on the mesh is `true`, which it is without; gradients come as their arrays."""
    step = stepped(program)
    with jax.set_mesh(mesh):
        there = put(mesh, specs, arrays)
        value, gradients = step(there)
    assert_close((value, gradients), step(arrays) if true is None else true)
    if AxisType.Explicit in mesh.axis_types:
        for name, gradient in gradients.items():
            assert jax.typeof(gradient) == jax.typeof(there[name]), name


def in_shard_map(program, layout, *, transposed=False):
    """The same program of global arrays, each device on its part; the kernel's width gathered."""
    width, classes = layout.kernel
    together, class_axis = layout.token_axes, 0 if transposed else 1

    def body(a):
        if width is not None:
            a = a | {"kernel": lax.all_gather(a["kernel"], width, axis=1 - class_axis, tiled=True)}
        if classes != layout.classes:
            a = a | {
                "kernel": lax.all_gather(a["kernel"], classes, axis=class_axis, tiled=True),
                "bias": lax.all_gather(a["bias"], classes, axis=0, tiled=True),
            }
        x = program(a, layout.classes)
        # A gathered array counts as different everywhere: each device's part of the same.
        axes = varying(x)
        same = [axis for axis in axes if axis not in (*together, *names(layout.classes))]
        return lax.psum(x, axes) / lax.axis_size(tuple(same)) if axes else x

    specs = layout.specs(transposed=transposed)
    return lambda a: jax.shard_map(
        body, in_specs=({name: specs[name] for name in a},), out_specs=P()
    )(a)


def varying(x):
    """The manual axes over which a value differs."""
    return tuple(jax.typeof(x).manual_axis_type.varying)


# Variations of the others.
WIDE = (
    "data over two axes",
    "sequence",
    "vocabulary over two axes",
    "fsdp, tokens replicated",
    "fsdp along the vocabulary",
)
# Of the logits alone, those of FSDP are others with another name for an axis; of a divergence the
# layouts of its classes matter.
IN_EVERY_LAYOUT = [
    pytest.param(layout, name, id=f"{layout}-{name}", marks=[pytest.mark.wide] * (layout in WIDE))
    for layout in LAYOUTS
    for name in PROGRAMS
    if name in HEADS or not layout.startswith("fsdp")
    if name != "divergences" or layout in {"vocabulary", "data and vocabulary"}
]
# Where XLA decides, the layout changes nothing in the program.
automatic = pytest.param("automatic", marks=pytest.mark.wide)


in_every_way = pytest.mark.parametrize("way", [automatic, "explicit", "shard_map"])


def check_layout(name, layout, way):
    mesh = mesh_of(AxisType.Explicit if way == "explicit" else AxisType.Auto)
    on_mesh = in_shard_map(PROGRAMS[name], layout) if way == "shard_map" else PROGRAMS[name]
    check(on_mesh, mesh, layout.specs(), true=unsharded(PROGRAMS[name]))


@in_every_way
@pytest.mark.parametrize(("layout_name", "name"), IN_EVERY_LAYOUT)
def test_values_and_gradients_are_those_of_one_device(layout_name, name, way):
    check_layout(name, LAYOUTS[layout_name], way)


@in_every_way
@pytest.mark.parametrize(
    "layout_name",
    [pytest.param(n, marks=[pytest.mark.wide] * (n != "fsdp and vocabulary")) for n in LAYOUTS],
)
def test_a_kernel_that_is_used_as_its_transpose(layout_name, way):
    """Every head, in every layout by role: that of the classes, that of the width."""
    layout = LAYOUTS[layout_name]
    mesh = mesh_of(AxisType.Explicit if way == "explicit" else AxisType.Auto)
    on_mesh = in_shard_map(tied, layout, transposed=True) if way == "shard_map" else tied
    values, gradients = zip(*(unsharded(PROGRAMS[name]) for name in HEADS), strict=True)
    summed: Any = {name: sum(d[name] for d in gradients) for name in gradients[0]}
    true = sum(values), summed | {"kernel": summed["kernel"].T}
    arrays = ARRAYS | {"kernel": ARRAYS["kernel"].T}
    check(on_mesh, mesh, layout.specs(transposed=True), arrays=arrays, true=true)


@pytest.fixture
def other_devices():
    yield from on_device("other devices")


@in_every_way
@pytest.mark.parametrize("name", ["in_forward", "any_loss", "log_probs"])
@pytest.mark.parametrize("layout_name", ["data", "data and vocabulary", "fsdp", "hybrid"])
def test_in_the_forms_of_other_platforms(other_devices, layout_name, name, way):
    """Groups of chunks, of the tokens of each device; blocks of any size."""
    check_layout(name, LAYOUTS[layout_name], way)


@pytest.mark.parametrize("way", ["automatic", "explicit", "shard_map"])
def test_predictions_of_shards_that_are_tied(way):
    """Integers, so that a tie is one in every layout: the first class of all shards."""
    layout = LAYOUTS["vocabulary over two axes"]
    hidden, kernel = (np.round(ARRAYS[name]) for name in ("hidden", "kernel"))
    kernel[:, [4, 11, 22]] = kernel[:, :1]
    arrays = {"hidden": hidden, "kernel": kernel, "labels": ARRAYS["labels"]}

    def predictions(a, axis_name=None):
        options = {"with_predictions": True, "axis_name": axis_name, "chunk_size": 4}
        return jaxsoftmax.linear_log_probs(*of_head(a), **options).predictions

    specs = {name: layout.specs()[name] for name in arrays}
    mesh, program = mesh_of(AxisType.Explicit if way == "explicit" else AxisType.Auto), predictions
    if way == "shard_map":
        local = functools.partial(predictions, axis_name=layout.classes)
        program = jax.shard_map(local, mesh=mesh, in_specs=(specs,), out_specs=specs["labels"])
    with jax.set_mesh(mesh):
        got = jax.jit(program)(put(mesh, specs, arrays))
    z = hidden @ kernel
    assert ((z == z.max(-1, keepdims=True)).sum(-1) > 1).sum() > 3
    np.testing.assert_array_equal(got, z.argmax(-1))


@both_orders
def test_an_automatic_mesh_told_its_layout(gradients):
    """One line around the head: the layout is known, as on an explicit mesh."""
    arrays = {name: ARRAYS[name] for name in ("hidden", "kernel", "labels")}
    every = LAYOUTS["fsdp and vocabulary"].specs()
    specs = {name: every[name] for name in arrays}
    program = mean(gradients)
    told = jax.sharding.explicit_axes(program, in_sharding=(specs,))
    true = stepped(program)(arrays)
    check(told, mesh_of(AxisType.Auto), specs, arrays=arrays, true=true)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@both_orders
def test_half_precision_on_an_explicit_mesh(gradients, dtype):
    """One rounding of the unsharded gradient, and of float16's small ones none to 0."""
    halves = ("hidden", "kernel")
    arrays = {name: ARRAYS[name].astype(dtype) for name in halves} | {"labels": ARRAYS["labels"]}
    step, mesh = stepped(mean(gradients, denominator=1e5)), mesh_of(AxisType.Explicit)
    _, true = step(arrays)
    with jax.set_mesh(mesh):
        _, got = step(put(mesh, LAYOUTS["fsdp and vocabulary"].specs(), arrays))
    for name in halves:
        g, t = (np.asarray(d[name], np.float32) for d in (got, true))
        # d_logits and the result are rounded, and in recompute each device's part of d_kernel.
        bound = 4 * float(jnp.finfo(dtype).eps) * np.abs(t).max()
        np.testing.assert_allclose(g, t, rtol=0, atol=bound)
        assert np.all((g != 0) | (np.abs(t) <= bound))


def test_reverse_over_reverse_on_an_explicit_mesh():
    """Of one chunk and of several: not every operation on unreduced arrays has a reverse."""
    specs, names = LAYOUTS["hybrid"].specs(), ("hidden", "kernel", "labels")

    def program(a):
        def total(hidden, kernel):
            of = hidden, kernel, jnp.maximum(a["labels"], 0)
            return sum(head(*of, gradients="in_forward", chunk_size=size) for size in (None, 2))

        return sum(jnp.sum(d**2) for d in jax.grad(total, (0, 1))(*operands(a)[:2]))

    arrays, mesh = {name: ARRAYS[name] for name in names}, mesh_of(AxisType.Explicit)
    check(program, mesh, {name: specs[name] for name in names}, arrays=arrays)


def test_compiling_for_an_automatic_mesh_on_a_host_with_one_device(monkeypatch):
    """The mesh that is set may spread arrays, however few devices are here."""
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    shapes = ((1024, 8), np.float32), ((8, 1 << 15), np.float32), ((1024,), np.int32)
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        arrays = (jax.ShapeDtypeStruct(*shape) for shape in shapes)
        jax.jit(jax.grad(head)).trace(*arrays).lower(lowering_platforms=("tpu",))


def in_parts(f, of, result, layout=DATA_AND_VOCABULARY):
    """`f` in a `shard_map`, of the arguments of these names."""
    specs = layout.specs()
    out_specs = specs.get(result, P())
    in_specs = tuple(specs.get(name, P()) for name in of)
    return jax.shard_map(f, mesh=mesh_of(AxisType.Auto), in_specs=in_specs, out_specs=out_specs)


def test_forward_mode_with_axis_name():
    """The tangents of a row whose classes are spread over devices."""
    logits = ARRAYS["logits"]
    tangent = np.cos(np.arange(logits.size, dtype=np.float32)).reshape(logits.shape)
    loss = jaxsoftmax.forward_mode.softmax_cross_entropy_with_integer_labels

    def pushed(z, dz, labels, axis_name=None):
        f = lambda z: loss(z, jnp.maximum(labels, 0), axis_name=axis_name)  # noqa: E731
        return jax.jvp(f, (z,), (dz,))

    local = functools.partial(pushed, axis_name="vocab")
    arguments = (logits, tangent, ARRAYS["labels"])
    got = jax.jit(in_parts(local, ("logits", "logits", "labels"), "labels"))(*arguments)
    assert_close(got, pushed(*arguments))


def test_second_derivatives_with_axis_name():
    def total(z, labels, axis_name=None):
        losses = integer_labels(z, jnp.maximum(labels, 0), axis_name=axis_name, z_loss=0.1)
        return jnp.sum(losses**2)

    def local(z, labels):
        return lax.psum(total(z, labels, "vocab"), "data")

    def second(f):
        def slope(z):
            return jnp.sum(jax.grad(f)(z, ARRAYS["labels"]) ** 2)

        return jax.jit(jax.grad(slope))(ARRAYS["logits"])

    assert_close(second(in_parts(local, ("logits", "labels"), None)), second(total))


@pytest.mark.parametrize("name", ["hidden", "logits"])
def test_bad_labels_and_rows_with_axis_name(name):
    """A label that is out of range on any device, and a row with NaN on one: NaN, no other."""
    labels = np.maximum(ARRAYS["labels"], 0)
    labels[1, 1], labels[2, 2] = CLASSES, -1
    logits = ARRAYS["logits"].copy()
    logits[3, 3, CLASSES - 1] = np.nan

    def local(z, hidden, kernel, y):
        if name == "logits":
            return integer_labels(z, y, axis_name="vocab")
        return head(hidden, kernel, y, reduction=None, axis_name="vocab")

    of = ("logits", "hidden", "kernel", "labels")
    sharded = jax.jit(in_parts(local, of, None, LAYOUTS["vocabulary"]))
    losses = np.asarray(sharded(logits, ARRAYS["hidden"], ARRAYS["kernel"], labels))
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
}
OF_WHOLE_ROWS = {
    "what a loss closes over": lambda a, t, **_: jaxsoftmax.linear_loss(
        lambda z: jnp.sum((z * t) ** 2, axis=-1), *operands(a)[:2], reduction="sum"
    ),
    "an argument of tokens": lambda a, t, **_: jaxsoftmax.linear_loss(
        lambda z, y: jnp.sum(z, axis=-1) * y,
        *operands(a)[:2],
        jnp.broadcast_to(t, a["labels"].shape),
        reduction="sum",
    ),
}


@pytest.mark.parametrize(
    ("layout_name", "name"),
    [
        *(
            (layout, name)
            for layout in ("data", "vocabulary", "data and vocabulary")
            for name in SHARED
        ),
        *(("data", name) for name in OF_WHOLE_ROWS),
    ],
)
def test_what_all_devices_share_is_differentiated_once(layout_name, name):
    """In `shard_map`, a number that does not vary over the devices that share the tokens."""
    layout, f = LAYOUTS[layout_name], (SHARED | OF_WHOLE_ROWS)[name]
    arrays = ARRAYS | {"bias": FINITE_BIAS}

    def local(a, t):
        total = f(a, t, reduction="sum", axis_name=layout.classes)
        return lax.psum(total, layout.token_axes) if layout.token_axes else total

    in_specs = (layout.specs(), P())
    mesh = mesh_of(AxisType.Auto)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=P())
    got, true = (
        jax.jit(jax.value_and_grad(lambda t, of=of: of(arrays, t)))(jnp.float32(1.3))
        for of in (sharded, functools.partial(f, reduction="sum"))
    )
    assert_close(got, true)


@both_orders
@pytest.mark.parametrize("alone", ["labels", "bias", "weights", "class_weights", "nothing set"])
def test_sharded_as_nothing_else_is(alone, gradients):
    """On an explicit mesh: one argument sharded and no other, or on no mesh; or no mesh set."""
    mesh = mesh_of(AxisType.Explicit)
    of = "hidden", "kernel", "labels", "bias", "weights", "class_weights"
    given = ARRAYS | {"bias": FINITE_BIAS, "class_weights": FINITE_BIAS + 1}
    given = {name: given[name] for name in of}
    specs: dict[str, P] = dict.fromkeys(of, P())
    if alone == "nothing set":
        specs |= LAYOUTS["fsdp and vocabulary"].specs()
    else:
        specs[alone] = P("data") if alone in {"labels", "weights"} else P("vocab")
    step = stepped(mean(gradients, label_smoothing=0.1))
    true, there = step(given), put(mesh, specs, given)
    if alone == "nothing set":
        assert_close(step(there), true)
    else:
        with jax.set_mesh(mesh):
            assert_close(step(there), true)
        assert_close(step(given | {alone: there[alone]}), true)


# Of the mesh ("data", "fsdp", "vocab"), with axes that a larger machine has more devices along.
ONE_DEVICE_AXES = [
    pytest.param((4, 1, 2), "hybrid", id="fsdp of 1"),
    pytest.param((1, 4, 1), "hybrid", id="data and vocab of 1"),
    pytest.param((1, 1, 2), "hybrid", id="all but vocab of 1"),
    pytest.param((4, 1, 2), "data and sequence", id="sequence of 1"),
    pytest.param((1, 1, 1), "hybrid", id="all of 1"),
    pytest.param((4, 1, 1), "vocabulary over two axes", id="classes of 1", marks=pytest.mark.wide),
]


ON_THEM = {
    **{name: PROGRAMS[name] for name in HEADS[1:]},
    "mean": mean("in_forward"),
    "mean, recomputed": mean("recompute"),
}


@pytest.mark.parametrize("name", ON_THEM)
@pytest.mark.parametrize(("shape", "layout_name"), ONE_DEVICE_AXES)
def test_mesh_axes_of_one_device(shape, layout_name, name):
    """`weighted` sees that losses name them too, alone or in a tuple, as their tokens do."""
    program, mesh = ON_THEM[name], mesh_of(AxisType.Explicit, shape)
    check(program, mesh, LAYOUTS[layout_name].specs(), true=unsharded(program))


@pytest.mark.parametrize("classes", [12, 100, 1024])
def test_labels_sharded_over_one_device_beside_whole_logits(monkeypatch, classes):
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    mesh = mesh_of(AxisType.Explicit, (1, 1, 1))
    with jax.set_mesh(mesh):
        labels = put(mesh, P("data"), np.zeros(8, np.int32))
        losses = integer_labels(jnp.zeros((8, classes)), labels)
        np.testing.assert_allclose(losses, np.full(8, np.log(classes)), rtol=1e-6)


def test_a_mesh_that_is_partly_automatic_is_refused():
    """JAX itself sums wrongly over an explicit axis there."""
    kinds = (AxisType.Explicit, AxisType.Auto)
    mesh = jax.make_mesh((4, 2), ("data", "vocab"), axis_types=kinds)
    said = r"^linear_softmax_cross_entropy: the mesh must be explicit or automatic along all axes"
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=said):
        head(*of_head(ARRAYS | {"hidden": jax.device_put(ARRAYS["hidden"], P("data"))}))


def partly_manual(name, layout, manual):
    """The program in a `shard_map` over these axes; the others stay the mesh's."""

    def only(spec):
        axes = (names(entry) for entry in spec)
        kept = (tuple(a for a in entry if a in manual) for entry in axes)
        return P(*(entry or None for entry in kept))

    def body(a):
        x = PROGRAMS[name](a, layout.classes if layout.classes in manual else None)
        return lax.psum(x, varying(x)) if varying(x) else x

    specs = {name: only(spec) for name, spec in layout.specs().items()}
    return jax.shard_map(body, in_specs=(specs,), out_specs=P(), axis_names=set(manual))


@pytest.mark.parametrize("name", ["in_forward", "recompute", "any_loss"])
@pytest.mark.parametrize("manual", [("vocab",), ("data",), ("data", "vocab")], ids=str)
def test_a_shard_map_over_some_axes_of_an_automatic_mesh(manual, name):
    program = partly_manual(name, DATA_AND_VOCABULARY, manual)
    specs = DATA_AND_VOCABULARY.specs()
    check(program, mesh_of(AxisType.Auto), specs, true=unsharded(PROGRAMS[name]))


@pytest.mark.parametrize("name", HEADS)
def test_a_shard_map_over_some_axes_of_an_explicit_mesh_is_refused(name):
    """XLA would end the process."""
    mesh = mesh_of(AxisType.Explicit)
    said = (
        r"^linear_\w+: inside shard_map the mesh must be manual or automatic along all axes \(name"
    )
    program = partly_manual(name, DATA_AND_VOCABULARY, ("vocab",))
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=said):
        program(put(mesh, DATA_AND_VOCABULARY.specs(), ARRAYS))


@pytest.mark.parametrize("name", HEADS)
def test_a_shard_map_without_jit(name):
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        arrays = put(mesh, DATA_AND_VOCABULARY.specs(), ARRAYS)
        value = in_shard_map(PROGRAMS[name], DATA_AND_VOCABULARY)(arrays)
    assert_close(value, unsharded(PROGRAMS[name])[0])


SUMMED = lambda z: jnp.sum(z, axis=-1)  # noqa: E731
NEEDS = {
    "whole logits": (
        lambda a: integer_labels(a["logits"], a["labels"], axis_name="vocab"),
        {"logits": P()},
        r"logits must vary over axis_name 'vocab', .*; got one that varies over \(\)",
    ),
    "no such axis": (
        lambda a: integer_labels(a["logits"], a["labels"], axis_name="model"),
        {},
        r"axis_name must name axes that an enclosing shard_map .*"
        r"\('data', 'fsdp', 'vocab'\), each once; got 'model'",
    ),
    "a loss of a part of the row": (
        lambda a: jaxsoftmax.linear_loss(SUMMED, *of_head(a)[:2], axis_name="vocab"),
        {},
        r"loss_fn must give the losses of whole rows, summed over axis_name 'vocab'; got",
    ),
    "tokens over the same axis": (
        lambda a: head(*of_head(a), axis_name="vocab"),
        {"hidden": P(None, "vocab"), "labels": P(None, "vocab")},
        r"hidden must be the same on all devices along axis_name 'vocab', which shards the",
    ),
}


@pytest.mark.parametrize("name", NEEDS)
def test_what_axis_name_needs_is_said(name):
    f, otherwise, said = NEEDS[name]
    specs = LAYOUTS["vocabulary"].specs() | otherwise
    mesh = mesh_of(AxisType.Auto)
    with pytest.raises(ValueError, match=said):
        jax.shard_map(f, mesh=mesh, in_specs=(specs,), out_specs=P())(ARRAYS)


def test_wide_token_arguments_stay_sharded():
    """Dense targets as wide as the logits, and their gradient: nothing of them is gathered."""
    of = ("hidden", "kernel", "logits")
    arrays = {name: ARRAYS[name] for name in of} | {"logits": np.exp(-np.abs(ARRAYS["logits"]))}

    def program(a):
        return jaxsoftmax.linear_loss(
            jaxsoftmax.softmax_cross_entropy, *(a[name] for name in of), chunk_size=5
        )

    specs, mesh = DATA_AND_VOCABULARY.specs(), mesh_of(AxisType.Explicit)
    check(program, mesh, specs, arrays=arrays)
    with jax.set_mesh(mesh):
        compiled = stepped(program).lower(put(mesh, specs, arrays)).compile()
    found = collectives(compiled.as_text() or "")
    wide = [one for one in found for dims in one.dims if CLASSES // 2 in dims and one.in_loop]
    gathers = [one for one in found if one.kind == "all-gather" and (WIDTH, 12) not in one.dims]
    assert not wide
    assert not gathers
