# SPDX-License-Identifier: Apache-2.0
"""What the compiled heads send between devices: the least there is, for CPUs and for TPUs.

The kernel is gathered at most once a pass, d_kernel is summed once, and a loop over chunks holds
nothing but sums of one number a token.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from layouts import AXES, LAYOUTS, Layout, mesh_of, names, tpu_devices

import jaxsoftmax
from bench.collectives import Collective, collectives
from jaxsoftmax._head import sizes as head_sizes

# Each kind of axis has a prime of its own, so that an array's size says what it is.
TOKEN, WIDTH, CLASS = 13, 7, 11
ROLES = ("logits", "hidden", "kernel", "numbers")
SMALL = (8, 4 * TOKEN, 8 * WIDTH, 64 * CLASS)  # batch, sequence, H, V
LARGE = (8, 512 * TOKEN, 128 * WIDTH, 4096 * CLASS)
# XLA for TPUs takes minutes to compile a large sort.
MIDDLE = (8, 64 * TOKEN, 128 * WIDTH, 512 * CLASS)
PASSES = {"in_forward": 1, "recompute": 2}
both_ways = pytest.mark.parametrize("gradients", PASSES)
# Each kind of axis at least once; the others are left to the wide run.
KEPT = {"vocabulary over two axes", "fsdp along the vocabulary", "fsdp and vocabulary", "hybrid"}
FEW = ("data", "vocabulary", "fsdp", "fsdp and vocabulary")


def over(names_of_layouts, kept=KEPT):
    """Over these layouts by name, of which those in `kept` are not left to the wide run."""
    marks = {name: () if name in kept else pytest.mark.wide for name in names_of_layouts}
    return [pytest.param(name, marks=mark) for name, mark in marks.items()]


def compiled_for(mesh, layout, function, sizes, dtype):
    """`function` of hidden [batch, sequence, H], kernel and labels, for the mesh's devices."""
    batch, sequence, width, classes = sizes
    shapes = ((batch, sequence, width), (width, classes), (batch, sequence))
    kinds = (dtype, dtype, jnp.int32)
    with jax.set_mesh(mesh):
        arguments = [
            jax.ShapeDtypeStruct(shape, kind, sharding=NamedSharding(mesh, spec))
            for shape, kind, spec in zip(shapes, kinds, specs(layout), strict=True)
        ]
        traced = jax.jit(jax.value_and_grad(function, argnums=(0, 1))).trace(*arguments)
        return traced.lower(lowering_platforms=(mesh.devices.flat[0].platform,)).compile()


def specs(layout):
    every = layout.specs()
    return tuple(every[name] for name in ("hidden", "kernel", "labels"))


def found_in(mesh, layout, function, sizes):
    dtype = jnp.bfloat16 if mesh.devices.flat[0].platform == "tpu" else jnp.float32
    return collectives(compiled_for(mesh, layout, function, sizes, dtype).as_text() or "")


def found_in_choices(mesh, layout, sizes, name):
    """Of `CHOICES[name]` of hidden and kernel, which has no gradient."""
    dtype = jnp.bfloat16 if mesh.devices.flat[0].platform == "tpu" else jnp.float32
    batch, sequence, width, classes = sizes
    with jax.set_mesh(mesh):
        arguments = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
            for shape, spec in zip(
                ((batch, sequence, width), (width, classes)), specs(layout)[:2], strict=True
            )
        ]
        traced = jax.jit(CHOICES[name]).trace(*arguments)
        program = traced.lower(lowering_platforms=(mesh.devices.flat[0].platform,)).compile()
    return collectives(program.as_text() or "")


CHOICES: dict[str, Any] = {
    "top-k": functools.partial(jaxsoftmax.linear_top_k, k=3),
    "sample": functools.partial(jaxsoftmax.linear_sample, np.zeros(2, np.uint32)),
    "sample of the top-k": functools.partial(
        jaxsoftmax.linear_sample, np.zeros(2, np.uint32), top_k=3
    ),
}
every_choice = pytest.mark.parametrize("choice", CHOICES)


def check_choices(mesh, name, sizes, choice):
    """The kernel gathered once where it must be; of tokens no more than a few numbers, once."""
    layout = LAYOUTS[name]
    found = found_in_choices(mesh, layout, sizes, choice)
    listed = "\n".join(map(str, found))
    found = [one for one in found if one.kind != "collective-permute" or one.bytes > 16]
    assert not any(one.in_loop for one in found), listed
    roles = [role(dims) for one in found for dims in one.dims]
    width, classes = layout.kernel
    assert roles.count("kernel") <= bool(width or classes != layout.classes), listed
    assert set(roles) <= {"kernel", "numbers"}, listed
    tokens, shards = math.prod(sizes[:2]), mesh.size
    most = 4 * tokens * 3 * shards  # k candidates of each shard
    assert all(one.bytes <= 3 * most for one in found if role(one.dims[0]) != "kernel"), listed
    # Sums and candidates, where the classes are sharded; nothing at all of tokens elsewhere.
    assert ("numbers" in roles) == bool(layout.classes), listed


def role(dims: tuple[int, ...]) -> str:
    """What an array is; TPU may pad the width of the kernel."""
    size = math.prod(dims)
    if size % (TOKEN * CLASS) == 0:
        return "logits"
    if size % (TOKEN * WIDTH) == 0:
        return "hidden"
    return "kernel" if size % CLASS == 0 and len(dims) > 1 else "numbers"


def check(
    found: list[Collective], layout: Layout, *, chunk: int, passes: int, branches: int = 1
) -> None:
    """No more than the layout needs; the message lists all of them.

    `branches`: of a condition, one of which is taken, that d_hidden is computed in.
    """
    listed = "\n".join(map(str, found))
    counts = {(kind, role): 0 for kind in ("gather", "sum") for role in ROLES}
    for one in found:
        if one.in_loop:
            assert layout.classes, f"in the loop: {one}\nof\n{listed}"
            # Several numbers a token may come in one piece, [numbers, chunk].
            sizes = [dims[-1] for dims in one.dims]
            assert max(sizes) <= chunk, (
                f"more than a number a token in the loop: {one}\nof\n{listed}"
            )
        if one.kind == "collective-permute" and one.bytes <= 16:
            continue  # how TPUs wait for each other
        assert one.kind in {"all-gather", "all-reduce", "reduce-scatter"}, listed
        for dims in one.dims:
            counts["gather" if one.kind == "all-gather" else "sum", role(dims)] += 1
    for what in ("hidden", "logits", "numbers"):
        assert counts["gather", what] == 0, f"{what} gathered:\n{listed}"
    # The kernel, once a pass; and d_kernel, from where its parts were summed to where it belongs.
    width, classes = layout.kernel
    gathered = passes if width or classes != layout.classes else 0
    scattered = passes == 1 and not set(layout.token_axes) <= {width, classes}
    assert counts["gather", "kernel"] <= gathered + scattered, f"kernel gathered:\n{listed}"
    assert counts["sum", "kernel"] == bool(layout.token_axes), f"sums of d_kernel:\n{listed}"
    assert counts["sum", "hidden"] == bool(layout.classes) * branches, (
        f"sums of d_hidden:\n{listed}"
    )
    assert counts["sum", "logits"] == 0, f"logits summed:\n{listed}"


def in_shard_map(loss, layout):
    """The same mean, by hand: the kernel's width gathered, the classes over a manual axis."""
    width, classes = layout.kernel

    def local(hidden, kernel, labels):
        if width is not None:
            kernel = lax.all_gather(kernel, width, axis=0, tiled=True)
        total = loss(hidden, kernel, labels, reduction="sum", axis_name=classes)
        return lax.psum(total, layout.token_axes) if layout.token_axes else total

    total = jax.shard_map(local, in_specs=specs(layout), out_specs=P())
    return lambda hidden, kernel, labels: total(hidden, kernel, labels) / labels.size


def check_head(mesh, layout, gradients, *, chunk, sizes, by_hand=False, **options):
    """What the head's value and gradients send, in chunks of so many tokens."""
    head = jaxsoftmax.linear_softmax_cross_entropy
    program = functools.partial(head, gradients=gradients, chunk_size=chunk, **options)
    program = in_shard_map(program, layout) if by_hand else program
    # With ignored tokens and sharded classes recompute has a program for 1, 2, 3, 5 and 8 eighths.
    branches = 5 if options and gradients == "recompute" else 1
    found = found_in(mesh, layout, program, sizes)
    check(found, layout, chunk=chunk, passes=PASSES[gradients], branches=branches)


@both_ways
@pytest.mark.parametrize("name", over(LAYOUTS))
def test_an_explicit_mesh_of_cpus(name, gradients):
    check_head(mesh_of(AxisType.Explicit), LAYOUTS[name], gradients, chunk=TOKEN, sizes=SMALL)


IGNORING: Any = {"ignore_index": -100}


@both_ways
@pytest.mark.parametrize("name", over(LAYOUTS, {"fsdp and vocabulary"}))
def test_ignored_tokens_on_an_explicit_mesh_of_cpus(monkeypatch, name, gradients):
    """How many count is one number; no token leaves its device, and none of it is in the loop."""
    few = {"cpu": TOKEN, "other": TOKEN}
    monkeypatch.setattr(head_sizes, "FEWEST_ROWS", few)
    jax.clear_caches()
    mesh, layout = mesh_of(AxisType.Explicit), LAYOUTS[name]
    check_head(mesh, layout, gradients, chunk=TOKEN, sizes=SMALL, **IGNORING)
    jax.clear_caches()


@both_ways
@pytest.mark.wide
@pytest.mark.parametrize("name", ["data", "fsdp and vocabulary"])
def test_ignored_tokens_on_an_explicit_mesh_of_tpus(name, gradients):
    layout, mesh = LAYOUTS[name], tpu_mesh("v5e:2x4")
    check_head(mesh, layout, gradients, chunk=32 * TOKEN, sizes=LARGE, **IGNORING)


@both_ways
@pytest.mark.parametrize("name", over(FEW))
def test_shard_map_on_cpus(name, gradients):
    mesh, layout = mesh_of(AxisType.Auto), LAYOUTS[name]
    check_head(mesh, layout, gradients, chunk=TOKEN, sizes=SMALL, by_hand=True)


@every_choice
@pytest.mark.parametrize("name", over(LAYOUTS))
def test_choices_on_an_explicit_mesh_of_cpus(name, choice):
    check_choices(mesh_of(AxisType.Explicit), name, SMALL, choice)


@functools.cache
def tpu_mesh(topology, kind=AxisType.Explicit):
    devices = tpu_devices(topology)
    shape = (2, 2, len(devices) // 4)
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(kind,) * 3)


@both_ways
@pytest.mark.parametrize("name", over([*FEW, "hybrid"], {"fsdp and vocabulary"}))
def test_an_explicit_mesh_of_tpus(name, gradients):
    topology = "v5e:4x4" if name == "hybrid" else "v5e:2x4"
    check_head(tpu_mesh(topology), LAYOUTS[name], gradients, chunk=32 * TOKEN, sizes=LARGE)


@pytest.mark.parametrize(
    "choice",
    [pytest.param(c, marks=[pytest.mark.wide] * (c != "sample of the top-k")) for c in CHOICES],
)
@pytest.mark.parametrize("name", over(FEW, {"fsdp and vocabulary"}))
def test_choices_on_meshes_of_tpus(name, choice):
    """Explicit and automatic."""
    for kind in (AxisType.Explicit, AxisType.Auto):
        check_choices(tpu_mesh("v5e:2x4", kind), name, MIDDLE, choice)


def test_data_and_vocabulary_on_an_automatic_mesh_of_tpus():
    """Nothing can be read off its types; XLA itself does as well, but sums d_hidden by chunks."""
    chunk, mesh = 32 * TOKEN, tpu_mesh("v5e:2x4", AxisType.Auto)
    head = functools.partial(jaxsoftmax.linear_softmax_cross_entropy, chunk_size=chunk)
    found = found_in(mesh, LAYOUTS["data and vocabulary"], head, LARGE)
    d_hidden = chunk * LARGE[2]
    assert all(math.prod(dims) <= d_hidden for one in found if one.in_loop for dims in one.dims)
    d_kernel = [one for one in found for dims in one.dims if role(dims) == "kernel"]
    assert [one.kind for one in d_kernel] == ["all-reduce"]
    assert not d_kernel[0].in_loop


def operations(mesh, layout, sizes, chunk_size, *, told=False):
    """How many times a device's share of the three products one device does, of the whole loop."""
    batch, sequence, width, classes = sizes
    chunks = set()

    def loss(logits, labels):
        chunks.add(logits.shape[0])
        return jaxsoftmax.softmax_cross_entropy_with_integer_labels(logits, labels)

    head: Any = functools.partial(jaxsoftmax.linear_loss, loss, chunk_size=chunk_size)
    if told:
        head = jax.sharding.explicit_axes(head, in_sharding=specs(layout))
    compiled = compiled_for(mesh, layout, head, sizes, jnp.bfloat16)
    (chunk,) = chunks
    tokens = batch * sequence
    axes = (*layout.token_axes, *names(layout.classes))
    shards = math.prod(mesh.shape[axis] for axis in layout.token_axes) if told else 1
    loops = -(-tokens // (chunk * shards))  # of which XLA counts one
    share = 6 * tokens * width * classes / math.prod(mesh.shape[axis] for axis in axes)
    return loops * (compiled.cost_analysis() or {})["flops"] / share


def log_probs(hidden, kernel, labels):
    every = jaxsoftmax.linear_log_probs(hidden, kernel, labels, with_entropy=True)
    return sum(jnp.mean(field) for field in every if field is not None)


def unreduced(hidden, kernel, labels):
    losses = jaxsoftmax.linear_softmax_cross_entropy(hidden, kernel, labels, reduction=None)
    return losses.mean()


HEAD: Any = jaxsoftmax.linear_softmax_cross_entropy
AUTOMATIC = {gradients: functools.partial(HEAD, gradients=gradients) for gradients in PASSES} | {
    "unreduced": unreduced,
    "log-probabilities": log_probs,
}
DEFAULT = {
    ("vocabulary", "log-probabilities"),
    ("fsdp", "in_forward"),
    ("fsdp and vocabulary", "recompute"),
}


@pytest.mark.parametrize(
    ("name", "program"),
    [
        pytest.param(name, program, marks=() if (name, program) in DEFAULT else pytest.mark.wide)
        for name in ("vocabulary", "fsdp", "fsdp and vocabulary")
        for program in AUTOMATIC
    ],
)
def test_an_automatic_mesh_of_tpus(name, program):
    """The kernel gathered once, before the loop, and every part of d_kernel summed once."""
    layout = LAYOUTS[name]
    found = found_in(tpu_mesh("v5e:2x4", AxisType.Auto), layout, AUTOMATIC[program], LARGE)
    listed = "\n".join(map(str, found))
    gathered = [one for one in found if one.kind == "all-gather"]
    assert not any(one.in_loop for one in gathered), listed
    width, classes = layout.kernel
    assert [role(dims) for one in gathered for dims in one.dims] == ["kernel"] * (width is not None)
    # A device's classes of d_kernel, all of them or by block, before they are scattered.
    shards = math.prod(tpu_mesh("v5e:2x4").shape[axis] for axis in names(classes))
    summed = [
        (one.times * math.prod(dims), one.in_loop)
        for one in found
        for dims in one.dims
        if one.kind in {"all-reduce", "reduce-scatter"} and dims[:1] == LARGE[2:3] and len(dims) > 1
    ]
    once = LARGE[2] * LARGE[3] // shards if layout.token_axes else 0
    assert sum(size for size, _ in summed) == once, listed
    if program == "in_forward":
        assert not any(in_loop for _, in_loop in summed), listed


SPREAD = Layout(tokens=(AXES, None))
UNTOLD = {
    "data over all devices": SPREAD,
    "data over two axes and vocabulary": Layout((("data", "fsdp"), None), (None, "vocab")),
}


@pytest.mark.parametrize("chunk_size", [250, pytest.param(400, marks=pytest.mark.wide)])
@pytest.mark.parametrize("layout", UNTOLD.values(), ids=list(UNTOLD))
def test_each_device_does_its_share_on_an_automatic_mesh_of_cpus(layout, chunk_size):
    """Of any number of tokens, 8 times 211, which no chunk divides."""
    sizes = (8, 211, 256, 2048)
    # The softmax and the padding are a few hundredths beside products of width 256.
    assert operations(mesh_of(AxisType.Auto), layout, sizes, chunk_size) < 1.1


def test_each_device_does_its_share_where_the_sequence_is_sharded():
    """Which an automatic mesh cannot, unless it is told."""
    layout, mesh = Layout(tokens=("data", ("fsdp", "vocab"))), mesh_of(AxisType.Auto)
    sizes = (8, 212, 256, 2048)
    assert operations(mesh, layout, sizes, 50, told=True) < 1.1
    assert operations(mesh, layout, sizes, 400) > 2


@pytest.mark.parametrize("layout", UNTOLD.values(), ids=list(UNTOLD))
def test_each_device_does_its_share_on_an_automatic_mesh_of_tpus(layout):
    mesh = tpu_mesh("v5e:2x4", AxisType.Auto)
    assert operations(mesh, layout, (8, 1021, 1024, 16000), 3670) < 1.05
