# SPDX-License-Identifier: Apache-2.0
"""How a head may be spread over a mesh: one list for all tests of sharding."""

import importlib.util
import math
from typing import Any, NamedTuple

import jax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxsoftmax.training.tpu import tpus

AXES = ("data", "fsdp", "vocab")


class Layout(NamedTuple):
    """The mesh axes that shard each axis of `hidden [batch, sequence, H]` and of the kernel."""

    tokens: tuple[Any, Any] = (None, None)
    kernel: tuple[Any, Any] = (None, None)

    @property
    def token_axes(self) -> tuple[str, ...]:
        """Those of both token axes together."""
        return names(self.tokens[0]) + names(self.tokens[1])

    @property
    def classes(self) -> Any:
        """The mesh axis of the logits' classes."""
        return None if self.kernel[1] in self.token_axes else self.kernel[1]

    def specs(self, *, transposed: bool = False) -> dict[str, P]:
        """By argument of `arguments`; the kernel's as `transpose_kernel` has it."""
        tokens, (width, classes) = self.tokens, self.kernel
        return {
            "hidden": P(*tokens, None),
            "kernel": P(classes, width) if transposed else P(width, classes),
            "bias": P(classes),
            "labels": P(*tokens),
            "weights": P(*tokens),
            "logits": P(*tokens, self.classes),
        }


def names(axes: Any) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec."""
    return () if axes is None else (axes,) if isinstance(axes, str) else axes


LAYOUTS = {
    "replicated": Layout(),
    "data": Layout(tokens=("data", None)),
    "data over two axes": Layout(tokens=(("data", "fsdp"), None)),
    "data and sequence": Layout(tokens=("data", "fsdp")),
    "sequence": Layout(tokens=(None, "data")),
    "vocabulary": Layout(kernel=(None, "vocab")),
    "vocabulary over two axes": Layout(tokens=("data", None), kernel=(None, ("fsdp", "vocab"))),
    "data and vocabulary": Layout(tokens=("data", None), kernel=(None, "vocab")),
    "fsdp": Layout(tokens=("fsdp", None), kernel=("fsdp", None)),
    "fsdp, tokens replicated": Layout(kernel=("fsdp", None)),
    "fsdp along the vocabulary": Layout(tokens=("data", None), kernel=(None, "data")),
    "fsdp and vocabulary": Layout(tokens=("fsdp", None), kernel=("fsdp", "vocab")),
    "hybrid": Layout(tokens=(("data", "fsdp"), None), kernel=("fsdp", "vocab")),
}


def mesh_of(kind: AxisType, shape: tuple[int, int, int] = (2, 2, 2)) -> jax.sharding.Mesh:
    """Eight devices, two along each axis, if `shape` does not say otherwise."""
    devices = jax.devices()[: math.prod(shape)]
    return jax.make_mesh(shape, AXES, axis_types=(kind,) * 3, devices=devices)


def put(mesh: jax.sharding.Mesh, specs: Any, arrays: Any) -> Any:
    """The arrays as the specs have them: a tuple of each, or by name."""
    if isinstance(arrays, dict):
        return {name: put(mesh, specs[name], a) for name, a in arrays.items()}
    if isinstance(arrays, tuple | list):
        return [put(mesh, spec, a) for spec, a in zip(specs, arrays, strict=True)]
    return jax.device_put(arrays, NamedSharding(mesh, specs))


def tpu_devices(topology: str) -> list[Any]:
    """Devices of a TPU topology such as "v5e:2x4", to compile for; skips without its compiler."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs jax[tpu]")
    return [*tpus(topology)]
