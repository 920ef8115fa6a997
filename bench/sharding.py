# SPDX-License-Identifier: Apache-2.0
"""`python -m bench memory --mesh`: a head over many devices, its memory and what they send."""

import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxsoftmax
from bench import formula, timing
from bench.cases import Head
from bench.collectives import collectives
from bench.tables import Table, megabytes, origin
from jaxsoftmax.training.tpu import tpus

ORDERS = ("in_forward", "recompute")
EVERY = ("data", "vocab")
# By name: the mesh axes of the tokens, of the kernel's hidden axis and of its classes.
LAYOUTS: dict[str, tuple[Any, Any, Any]] = {
    "data": (EVERY, None, None),
    "vocabulary": (None, None, EVERY),
    "data, vocabulary": ("data", None, "vocab"),
    "FSDP": (EVERY, EVERY, None),
    "FSDP, vocabulary": ("data", "data", "vocab"),
}
HEADINGS = (
    *("mesh", "sharded by", "gradients"),
    *("MB a chip", "formula", "of it", "MB sent", "least", "of it", "in the loop"),
)


class Devices(NamedTuple):
    """Devices, which need not be there, as a mesh of two axes."""

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


def measure(case: Head, devices: Devices) -> dict[str, Any]:
    """Compile value and gradient of a head for every layout: a part of a section of results."""
    mesh = _mesh(devices)
    rows = [
        {"layout": name, "gradients": gradients, **_row(case, mesh, layout, gradients)}
        for name, layout in LAYOUTS.items()
        for gradients in ORDERS
    ]
    return {"devices": str(devices), "rows": rows}


def _mesh(devices: Devices) -> Mesh:
    here = devices.topology == "here"
    found = jax.devices() if here else tpus(devices.topology)
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

    platform = mesh.devices.flat[0].platform
    specs = (tokens, None), (width, classes), (tokens,)
    with jax.set_mesh(mesh):
        arguments = case.abstract_inputs(
            *(NamedSharding(mesh, PartitionSpec(*spec)) for spec in specs)
        )
        compiled = timing.compile_for(platform, jax.value_and_grad(loss, (0, 1)), arguments)
    found = collectives(compiled.as_text() or "")
    shards = _Shards(*(math.prod(mesh.shape[a] for a in _axes(entry)) for entry in layout))
    part = case._replace(
        tokens=case.tokens // shards.tokens, classes=case.classes // shards.classes
    )
    return {
        "temp_bytes": timing.temporary_bytes(compiled),
        "formula_bytes": _formula(part, shards, gradients, platform),
        "wire_bytes": sum(one.wire_bytes for one in found),
        "least_wire_bytes": _least_wire(part, shards, gradients),
        "loop_wire_bytes": sum(one.wire_bytes for one in found if one.in_loop),
    }


def _axes(entry: Any) -> tuple[str, ...]:
    return () if entry is None else (entry,) if isinstance(entry, str) else entry


class _Shards(NamedTuple):
    """How many devices share the tokens, the kernel's hidden axis and its classes."""

    tokens: int
    width: int
    classes: int


def _formula(part: Head, shards: _Shards, gradients: str, platform: str) -> float:
    """The formula for one device's part of the head, and what sharding adds.

    Sharding adds the gathered kernel where its hidden axis is sharded and, in recompute where
    tokens are sharded, d_kernel before it is summed.
    """
    kernels = (shards.width > 1) + (gradients == "recompute" and shards.tokens > 1)
    return formula.temporary_bytes(part, gradients, platform) + kernels * _kernel_bytes(part)


def _least_wire(part: Head, shards: _Shards, gradients: str) -> float:
    """What a device must send at least, by rings.

    The kernel gathered once, d_kernel scattered while it is summed (in float32, or in recompute in
    the kernel's dtype) and gathered where every device needs all of it; over the vocabulary's
    devices, d_hidden summed in float32 and four numbers per token.
    """
    tokens, width, classes = ((devices - 1) / devices for devices in shards)
    kernel = _kernel_bytes(part)
    summed = 4 * part.hidden * part.classes if gradients == "in_forward" else kernel
    gathered = kernel * (width if shards.width > 1 else tokens)
    return gathered + summed * tokens + 2 * 4 * part.tokens * (part.hidden + 4) * classes


def _kernel_bytes(part: Head) -> int:
    return part.hidden * part.classes * jnp.dtype(part.dtype).itemsize


def in_docs(section: dict[str, Any]) -> list[Table]:
    """Lay a section out for the terminal and docs/guides/sharding.md."""
    rows = [
        [
            part["devices"],
            row["layout"],
            row["gradients"],
            megabytes(row["temp_bytes"]),
            megabytes(row["formula_bytes"]),
            _share(row["temp_bytes"], row["formula_bytes"]),
            megabytes(row["wire_bytes"]),
            megabytes(row["least_wire_bytes"]),
            _share(row["wire_bytes"], row["least_wire_bytes"]),
            f"{row['loop_wire_bytes'] / 1e6:.1f}",
        ]
        for part in section["meshes"]
        for row in part["rows"]
    ]
    title = f"value and gradient of {section['head']}, compiled"
    return [Table(HEADINGS, rows, [origin(section)], title, words=3)]


def _share(found: float, expected: float) -> str:
    return f"{found / expected:.2f}" if expected else "–"
