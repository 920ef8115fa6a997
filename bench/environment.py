# SPDX-License-Identifier: Apache-2.0
"""Where results come from: the device, the versions, the commit, the date."""

import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax
import typer

from jaxsoftmax.training.tpu import tpus

ROOT = Path(__file__).resolve().parent.parent
# What pip installs on the oldest Python; captions of tables of another JAX say so.
PYTHON, JAX = "3.11", "0.10.2"
PACKAGES = ("jaxsoftmax", "jax", "jaxlib", "libtpu", "optax", "tokamax", "jax-cce", "torch")


class Device(StrEnum):
    """What to measure on."""

    CPU = "cpu"
    GPU = "gpu"
    TPU = "tpu"


def use(device: Device | None) -> None:
    """Make everything run on this kind of device; None leaves the choice to JAX.

    Raises:
        typer.BadParameter: JAX finds no such device.
    """
    if device:
        jax.config.update("jax_platforms", "cuda" if device is Device.GPU else device.value)
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # JAX asserts where a plugin is missing
        found = f"JAX finds no {device or 'device'}. {error}".splitlines()[0]
        raise typer.BadParameter(found, param_hint="--device") from None


def tpu(topology: str) -> Any:
    """One of them.

    Raises:
        typer.BadParameter: there is no compiler for it.
    """
    try:
        return tpus(topology)[0]
    except Exception as error:  # libtpu absent, or it does not know the topology
        reason = str(error).splitlines()[0][:120]
        raise typer.BadParameter(f"{topology}: {reason}", param_hint="--target") from None


def describe(*, runs: bool = True) -> dict[str, Any]:
    """Return what a reader needs to compare two results; a package not installed is None.

    So is the device where nothing runs: what is compiled there would be the same elsewhere.
    """
    return {
        "device": device_name() if runs else None,
        "platform": jax.default_backend(),
        "cpus": cpu_count(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "commit": commit(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def in_words(environment: dict[str, Any]) -> str:
    """Say an environment in one line, for under a table."""
    versions = [f"{name} {number}" for name, number in environment["versions"].items() if number]
    parts = [environment["device"], *versions, f"Python {environment['python']}"]
    return ", ".join([*filter(None, parts), environment["date"]])


def briefly(environment: dict[str, Any]) -> tuple[str, str]:
    """Say where a section is from, with the versions that matter most, and the date."""
    versions = environment["versions"]
    named = [f"{name} {versions[name]}" for name in ("jaxsoftmax", "jax", "optax")]
    return ", ".join([environment["device"] or "XLA for TPUs", *named]), environment["date"]


def device_name() -> str:
    """Name the default device: `AMD EPYC, 2 cores`, `NVIDIA H200`."""
    if jax.default_backend() == "cpu":
        return f"{_cpu_model()}, {cpu_count()} cores"
    return jax.devices()[0].device_kind


def slug(name: str) -> str:
    """Turn a device's name into a file's: `amd-epyc-2-cores`."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def cpu_count() -> int:
    """Count the cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def commit() -> str | None:
    """Return the commit of this checkout, with `+` when the library or bench differs from it."""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--", "jaxsoftmax", "bench/*.py")
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed else "")


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    model = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return model[1].strip() if model else platform.processor() or platform.machine()
