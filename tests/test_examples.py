# SPDX-License-Identifier: Apache-2.0
"""The examples run, as a user runs them."""

import json
import math
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from programs import run

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str, *arguments: object) -> str:
    """What it prints, without the devices that conftest asks for: there is one."""
    asked = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")
    environment = {key: value for key, value in os.environ.items() if key not in asked}
    script = EXAMPLES / f"{name}.py"
    done = run(sys.executable, "-W", "error", script, *arguments, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", ["vocab_sharded", "shard_map_head"])
def test_a_sharded_head_on_any_machine(name):
    *said, loss, difference = example(name).splitlines()
    sharded, alone = map(float, re.findall(r"\d+\.\d+", loss))
    assert sharded == pytest.approx(alone, abs=2e-6)
    # Entries are of the size 1 / CLASSES or less, and sums of 512 numbers in another order.
    assert float(difference.split()[-1]) < 512 * 6e-8 / 1024
    if name == "vocab_sharded":
        assert [line.split()[-1] for line in said] == [
            "float32[512@data,64]",
            "float32[64@data,1024@vocab]",
        ]


def test_evaluation_from_one_call():
    """As on all logits, with less memory than these take."""
    ours, theirs = (
        [float(number) for number in re.findall(r"\d+\.?\d*", line)]
        for line in example("evaluation").splitlines()
    )
    assert ours[:3] == pytest.approx(theirs[:3], rel=1e-4)
    assert 3 * ours[3] < theirs[3]


@pytest.mark.parametrize(
    ("framework", "package"), [("nnx", "flax"), ("equinox", "equinox"), ("jax", "optax")]
)
def test_a_language_model_learns(framework, package):
    """From no idea of the next byte to a fair one of the file that it was trained on."""
    pytest.importorskip(package)
    start, end = map(float, re.findall(r"\d+\.\d+", example(f"language_model_{framework}")))
    assert start == pytest.approx(math.log(256), abs=0.5)
    assert end < start / 2


@pytest.mark.wide
def test_half_precision_training(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("optax")
    name, folder = "half_precision_training", tmp_path / "new"
    example(name, "--steps", 5, "--output", folder)
    assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folder / f"{name}.json").read_text())
    languages = [runs for runs in results.values() if isinstance(runs, dict)]
    assert len(languages) == 2
    for runs in languages:
        steps = runs.pop("steps")
        assert steps == list(range(6))
        assert len(runs) == 4
        for name, one in runs.items():
            assert np.isfinite(one["excess_loss"] + one["gradient_error"]).all()
            assert len(one["excess_loss"]) == len(one["gradient_error"]) == len(steps)
            assert 0 < one["excess_loss"][-1] < one["excess_loss"][0] < 12
            assert max(one["gradient_error"]) < (0.1 if "bfloat16" in name else 1e-5)


@pytest.mark.wide
def test_distillation(tmp_path):
    """The divergence falls to where float32 logits end, and is known all the way; not optax's."""
    pytest.importorskip("matplotlib")
    pytest.importorskip("optax")
    pytest.importorskip("sklearn")
    example("distillation", "--output", tmp_path)
    assert (tmp_path / "distillation.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((tmp_path / "distillation.json").read_text())
    for optimizer in ("Adam", "L-BFGS"):
        ours, theirs = (results[f"{name}, {optimizer}"] for name in ("jaxsoftmax", "optax"))
        exact, reported = (np.array(ours[curve]) for curve in ("exact", "reported"))
        assert exact[-1] < 1e-11
        assert reported.min() > 0
        # A logit of 10 is rounded by 5e-7, and δ by as much: 1e-5 where the divergence is 1e-10.
        known = exact > 1e-10
        np.testing.assert_allclose(reported[known], exact[known], rtol=0.1)
        assert abs(theirs["reported"][-1]) > 1e-10
        assert min(theirs["reported"]) < 0
        assert ours["accuracy"] == theirs["accuracy"] == results["teacher"]["accuracy"] > 0.9
        assert ours["agreement"] == 1
    assert results["optax, L-BFGS"]["exact"][-1] > 1e-10
