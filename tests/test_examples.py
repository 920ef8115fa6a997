# SPDX-License-Identifier: Apache-2.0
"""The examples run, as a user runs them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def as_a_user() -> dict[str, str]:
    """The environment without the devices that conftest asks for: there is one."""
    asked = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    return {name: value for name, value in os.environ.items() if name not in asked}


@pytest.mark.parametrize("name", ["vocab_sharded", "shard_map_head"])
def test_a_sharded_head_on_any_machine(name):
    done = subprocess.run(
        [sys.executable, "-W", "error", EXAMPLES / f"{name}.py"],
        env=as_a_user(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    *said, loss, difference = done.stdout.splitlines()
    sharded, alone = map(float, re.findall(r"\d+\.\d+", loss))
    assert sharded == pytest.approx(alone, abs=2e-6)
    # Entries are of the size 1 / CLASSES or less, and sums of 512 numbers in another order.
    assert float(difference.split()[-1]) < 512 * 6e-8 / 1024
    if name == "vocab_sharded":
        assert [line.split()[-1] for line in said] == [
            "float32[512@data,64]",
            "float32[64@data,1024@vocab]",
        ]


@pytest.mark.wide
def test_half_precision_training(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("optax")
    script = EXAMPLES / "half_precision_training.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", script, "--steps", "20", "--output", tmp_path / "new"],
        env=as_a_user(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "new" / f"{script.stem}.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "new" / f"{script.stem}.json").read_text())
    languages = [runs for runs in results.values() if isinstance(runs, dict)]
    assert len(languages) == 2
    for runs in languages:
        steps = runs.pop("steps")
        assert steps == list(range(21))
        assert len(runs) == 4
        for name, run in runs.items():
            assert np.isfinite(run["excess_loss"] + run["gradient_error"]).all()
            assert len(run["excess_loss"]) == len(run["gradient_error"]) == len(steps)
            assert 0 < run["excess_loss"][-1] < run["excess_loss"][0] < 12
            assert max(run["gradient_error"]) < (0.1 if "bfloat16" in name else 1e-5)
