# SPDX-License-Identifier: Apache-2.0
"""`python -m bench memory --mesh`: a head over many devices, its memory and what they send."""

import math
import os
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from rich.table import Table

import jaxsoftmax
from bench import environment, markdown, timing
from bench.cases import Head
from bench.collectives import collectives

ORDERS = ("in_forward", "recompute")
COLUMNS = ("MB a chip", "formula", "of it", "MB sent", "least", "of it", "in the loop")


class Devices(NamedTuple):
    """Devices that need not be there, as a mesh of two axes."""

    topology: str  # such as v5e:2x4; "here" for this machine's
    data: int
    vocab: int

    def __str__(self) -> str:
        """As `parse` reads it."""
        return f"{self.topology}/data={self.data},vocab={self.vocab}"


def parse(text: str | Devices) -> Devices:
    """Read TOPOLOGY/data=N,vocab=M."""
    if isinstance(text, Devices):  # a default
        return text
    found = re.fullmatch(r"([\w:]+)/data=(\d+),vocab=(\d+)", text)
    if not found:
        raise typer.BadParameter(f"expected TOPOLOGY/data=N,vocab=M; got {text!r}")
    return Devices(found[1], int(found[2]), int(found[3]))


def layouts() -> dict[str, tuple[Any, Any, Any]]:
    """By name, the mesh axes of the tokens, and of the kernel's hidden and class axes."""
    every = ("data", "vocab")
    return {
        "data": (every, None, None),
        "vocabulary": (None, None, every),
        "data, vocabulary": ("data", None, "vocab"),
        "FSDP": (every, every, None),
        "FSDP, vocabulary": ("data", "data", "vocab"),
    }


def measure(case: Head, devices: Devices) -> dict[str, Any]:
    """Compile value and gradient of a head for every layout; nothing is run.

    Returns:
        A part of a section of the results file.
    """
    mesh = _mesh(devices)
    rows = []
    for name, layout in layouts().items():
        for gradients in ORDERS:
            rows.append(
                {"layout": name, "gradients": gradients, **_row(case, mesh, layout, gradients)}
            )
    return {"devices": str(devices), "rows": rows}


def _mesh(devices: Devices) -> Mesh:
    if devices.topology == "here":
        found = jax.devices()
    else:
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
        found = topologies.get_topology_desc(devices.topology, platform="tpu").devices
    if len(found) != devices.data * devices.vocab:
        raise typer.BadParameter(
            f"{devices} has {len(found)} devices, its mesh {devices.data * devices.vocab}"
        )
    grid = np.array(found).reshape(devices.data, devices.vocab)
    return Mesh(grid, ("data", "vocab"), axis_types=(AxisType.Explicit,) * 2)


def _row(case: Head, mesh: Mesh, layout: tuple[Any, Any, Any], gradients: Any) -> dict[str, Any]:
    tokens, width, classes = layout

    def loss(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> jax.Array:
        return jaxsoftmax.linear_softmax_cross_entropy(hidden, kernel, labels, gradients=gradients)

    with jax.set_mesh(mesh):
        arguments = [
            jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec)))
            for shape, dtype, spec in (
                ((case.tokens, case.hidden), case.dtype, (tokens, None)),
                ((case.hidden, case.classes), case.dtype, (width, classes)),
                ((case.tokens,), jnp.int32, (tokens,)),
            )
        ]
        traced = jax.jit(jax.value_and_grad(loss, (0, 1))).trace(*arguments)
        platform = mesh.devices.flat[0].platform
        compiled = traced.lower(lowering_platforms=(platform,)).compile()
    found = collectives(compiled.as_text() or "")
    shards = _Shards(*(math.prod(mesh.shape[a] for a in _axes(entry)) for entry in layout))
    return {
        "temp_bytes": timing.temporary_bytes(compiled),
        "formula_bytes": _formula(case, shards, gradients),
        "wire_bytes": sum(one.wire_bytes for one in found),
        "least_wire_bytes": _least_wire(case, shards, gradients),
        "loop_wire_bytes": sum(one.wire_bytes for one in found if one.in_loop),
    }


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


class _Shards(NamedTuple):
    """How many devices share the tokens, the kernel's hidden axis and its classes."""

    tokens: int
    width: int
    classes: int


def _formula(case: Head, shards: _Shards, gradients: str) -> float:
    """The docstrings' formulas on one device's sizes, and what sharding adds.

    That is the kernel gathered where its hidden axis is sharded; and, in recompute, where tokens
    are sharded, d_kernel before it is summed.
    """
    tokens, width, classes = shards
    n, h, v = case.tokens / tokens, case.hidden, case.classes / classes
    size = jnp.dtype(case.dtype).itemsize
    gathered = size * h * v if width > 1 else 0
    if gradients == "recompute":
        block = 2048
        own = (
            (4 * n * block + 4 * n * h + 8 * h * block)
            if size == 4
            else (6 * n * block + 8 * n * h + 6 * h * block)
        )
        return own + gathered + (size * h * v if tokens > 1 else 0)
    most = min(max((56 << 20) // (4 * v), 256), 4096)
    chunk = math.ceil(n / math.ceil(n / most))
    own = 4 * chunk * v + 8 * n * h if size == 4 else 4 * h * v + 8 * chunk * v + 6 * n * h
    return own + gathered


def _least_wire(case: Head, shards: _Shards, gradients: str) -> float:
    """What a device must send at least, by rings.

    The kernel gathered once, d_kernel scattered while it is summed (in float32, or in recompute in
    the kernel's dtype) and gathered where every device wants all of it, d_hidden summed in float32
    over the vocabulary; and four numbers a token there.
    """
    tokens, width, classes = shards
    n, h, v = case.tokens / tokens, case.hidden, case.classes / classes
    size = jnp.dtype(case.dtype).itemsize
    kernel, ring = h * v, lambda devices: (devices - 1) / devices
    sums = 4 if gradients == "in_forward" else size
    least = size * kernel * ring(width) + sums * kernel * ring(tokens)
    if width == 1:
        least += size * kernel * ring(tokens)
    return least + 2 * 4 * n * (h + 4) * ring(classes)


def table(section: dict[str, Any]) -> Table:
    """Lay a section out for the terminal."""
    out = Table(
        title=f"value and gradient of {section['head']}, compiled",
        caption=environment.in_words(section["environment"]),
    )
    for heading in ("mesh", "sharded by", "gradients"):
        out.add_column(heading)
    for heading in COLUMNS:
        out.add_column(heading, justify="right")
    for cells in _cells(section):
        out.add_row(*cells)
    return out


def as_markdown(section: dict[str, Any]) -> str:
    """Lay a section out for docs/sharding.md."""
    text = markdown.table(
        ["mesh", "sharded by", "gradients", *COLUMNS], list(_cells(section)), words=3
    )
    return "\n".join([text, "", markdown.origin(section)])


def _cells(section: dict[str, Any]) -> Sequence[list[str]]:
    return [
        [
            part["devices"],
            row["layout"],
            row["gradients"],
            markdown.megabytes(row["temp_bytes"]),
            markdown.megabytes(row["formula_bytes"]),
            f"{row['temp_bytes'] / row['formula_bytes']:.2f}",
            markdown.megabytes(row["wire_bytes"]),
            markdown.megabytes(row["least_wire_bytes"]),
            f"{row['wire_bytes'] / row['least_wire_bytes']:.2f}",
            f"{row['loop_wire_bytes'] / 1e6:.1f}",
        ]
        for part in section["meshes"]
        for row in part["rows"]
    ]
