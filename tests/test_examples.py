# SPDX-License-Identifier: Apache-2.0
"""The examples run, as a user runs them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.wide
def test_half_precision_training(tmp_path):
    pytest.importorskip("matplotlib")
    pytest.importorskip("optax")
    script = EXAMPLES / "half_precision_training.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", script, "--steps", "20", "--out", tmp_path / "new"],
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},  # one device
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
