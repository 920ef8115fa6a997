# SPDX-License-Identifier: Apache-2.0
"""The program `jaxsoftmax` as a user runs it, and what a run left in its folder."""

import json
import os
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxsoftmax.training import cli

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MODULE, FUNCTION = PROJECT["project"]["scripts"]["jaxsoftmax"].split(":")

# Seconds that nothing takes but on a machine that does much else.
SLOW = 300
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


def run(*line: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """A process to its end, and what it wrote."""
    given = {"capture_output": True, "text": True, "timeout": SLOW} | options
    return subprocess.run([*map(str, line)], check=False, **given)


def program(*arguments: object, devices: int = 1) -> subprocess.CompletedProcess[str]:
    """A run to its end: what one compiles the next need not, as nobody kills it on the way."""
    kept = {"JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"]}
    return run(*command(*arguments), env=environment(devices) | kept)


def wait_until(
    condition: Callable[[], object], *running: subprocess.Popen[Any], seconds: float = SLOW
) -> None:
    """Looks again and again, for as long as these processes run; if it takes too long they end."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert all(process.poll() is None for process in running), "ended by itself"
        late = time.monotonic() > deadline
        for process in running * late:
            process.kill()
        assert not late
        time.sleep(0.005)


def trained(*arguments: object, devices: int = 1) -> str:
    done = program("train", *arguments, devices=devices)
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def here(*arguments: object) -> int:
    """The exit code, where the start of a process is not the question.

    There are conftest's eight devices, of which a run without --mesh uses one; optax needs the
    promotions of a user.
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        return cli.run([*map(str, arguments)])


def train_here(*arguments: object) -> int:
    return here("train", *arguments)


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def newest(folder: Path) -> int:
    """The number of epochs, or steps, of the last checkpoint."""
    names = [path.name for path in (folder / "checkpoints").glob("[0-9]*")]
    return max((int(name) for name in names if name.isdecimal()), default=0)


def parameters(folder: Path, epoch: int) -> list[np.ndarray]:
    names = ("state", "position")
    with ocp.CheckpointManager((folder / "checkpoints").resolve(), item_names=names) as manager:
        assert epoch in manager.all_steps()
        items = ocp.args.Composite(state=ocp.args.StandardRestore())
        restored = manager.restore(epoch, args=items)["state"]
    return [np.asarray(leaf) for leaf in jax.tree.leaves(restored)]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that `train` ends in."""
    return refused_by(capsys, "train", *arguments)


def refused_by(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command ends in; in this process, since nothing is trained."""
    assert here(*arguments) == 2
    captured = capsys.readouterr()
    assert not captured.out
    assert captured.err.count("\n") == 1
    return captured.err


def assert_refused(
    capsys: pytest.CaptureFixture[str], folder: Path, *arguments: object, words: Iterable[str]
) -> None:
    """In a line with these words, before anything is written."""
    line = refused(capsys, "--output", folder, *arguments)
    for word in words:
        assert word in line, line
    assert not folder.exists()
