# SPDX-License-Identifier: Apache-2.0
"""The program `jaxsoftmax` as a user runs it, and what a run left in its folder."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxsoftmax.training import cli

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MODULE, FUNCTION = PROJECT["project"]["scripts"]["jaxsoftmax"].split(":")

SMALL = ("--hidden", "16", "--batch-size", "50")


def environment(devices: int = 1) -> dict[str, str]:
    # JAX's defaults, as a user has them, whatever conftest asks of this process.
    ours = ("XLA_FLAGS", "JAX_COMPILATION_CACHE_DIR")
    users = {name: value for name, value in os.environ.items() if name not in ours}
    return users | {"JAX_NUM_CPU_DEVICES": str(devices)}


def command(*arguments: object, first: str = "pass") -> list[str]:
    """The program's command line as pip's script has it; `first` runs just before the program."""
    script = f"import os, sys, {MODULE}; {first}; sys.exit({MODULE}.{FUNCTION}())"
    return [sys.executable, "-c", script, *map(str, arguments)]


def program(*arguments: object, devices: int = 1) -> subprocess.CompletedProcess[str]:
    """A run to its end: what one compiles the next need not, as nobody kills it on the way."""
    kept = {"JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"]}
    return subprocess.run(
        command(*arguments),
        env=environment(devices) | kept,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def trained(*arguments: object, devices: int = 1) -> str:
    run = program("train", *arguments, devices=devices)
    assert run.returncode == 0, run.stderr
    assert not run.stderr
    return run.stdout


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def parameters(folder: Path, epoch: int) -> list[np.ndarray]:
    with ocp.CheckpointManager((folder / "checkpoints").resolve()) as manager:
        assert epoch in manager.all_steps()
        restored = manager.restore(epoch, args=ocp.args.StandardRestore())
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restored)]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that `train` ends in; in this process, since nothing is trained."""
    assert cli.run(["train", *arguments]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.count("\n") == 1
    return captured.err
