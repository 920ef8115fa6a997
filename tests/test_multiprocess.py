# SPDX-License-Identifier: Apache-2.0
"""The program over several devices, and over several processes on this machine."""

import contextlib
import re
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from programs import (
    ROOT,
    SMALL,
    assert_refused,
    command,
    environment,
    here,
    metrics,
    newest,
    parameters,
    train_here,
    wait_until,
)

from jaxsoftmax.training import mesh as meshes
from jaxsoftmax.training.classifier import step
from jaxsoftmax.training.classifier.task import CLASSIFIER, Options
from jaxsoftmax.training.run import state_specs

LOST = "jaxsoftmax: a process of the run stopped, or cannot be reached; start all of them again"
# JAX gives a process up after 30 seconds of silence; the rest is for a slow machine.
BOUNDED = 90
# gloo, which carries JAX's messages between CPUs, says when it is connected; the devices of a
# process say it at the same time, and the parts of their lines mix.
GLOO = re.compile(
    r"\[Gloo\] Rank|is connected to|peer ranks\."
    r"|Expected number of connected peer ranks is :|\d+|\s+"
)


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def started(
    commands: Sequence[Sequence[object]], port: int, devices: int = 1, trains: str = "train"
) -> Iterator[list[subprocess.Popen[str]]]:
    """One process of a run for each of these command lines."""
    with contextlib.ExitStack() as stack:
        running = []
        for number, arguments in enumerate(commands):
            place = ("--coordinator", f"localhost:{port}", "--processes", len(commands))
            process = subprocess.Popen(
                command(trains, *place, "--process-id", number, *arguments),
                env=environment(devices),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            running.append(process)
        yield running


def trained_together(*arguments: object, devices: int = 1, trains: str = "train") -> list[str]:
    """What two processes print."""
    with started([arguments] * 2, free_port(), devices, trains) as both:
        outputs = [process.communicate(timeout=BOUNDED) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    assert [errors for _, errors in outputs] == ["", ""]
    return [output for output, _ in outputs]


def assert_same_numbers(folder: Path, whole: Path, epochs: int, steps: int) -> None:
    """To the rounding of sums in another order: an ulp of the largest number a step."""
    rounding = steps * float(np.finfo(np.float32).eps)
    lines, expected = metrics(folder), metrics(whole)
    assert [line["epoch"] for line in lines] == list(range(1, epochs + 1))
    for line, other in zip(lines, expected[:epochs], strict=True):
        for name, value in line.items():
            # A row whose two best classes are as good as equal may fall either way.
            slack = 1.5 / 359 if name.endswith("accuracy") else rounding * other[name]
            assert value == pytest.approx(other[name], rel=0, abs=slack), (name, line, other)
    ours, theirs = parameters(folder, epochs), parameters(whole, epochs)
    assert len(ours) > 4
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=rounding * np.abs(b).max())


@pytest.mark.wide
def test_processes_and_meshes_give_the_numbers_of_one_device(tmp_path):
    # Neither the 1438 rows, nor the batches of 50, nor the 10 classes divide evenly by four
    # or eight.
    steps = 29  # an epoch
    one, two, mesh = (tmp_path / name for name in ("one", "two", "mesh"))
    assert train_here("--output", one, "--epochs", 3, *SMALL) == 0
    leader, other = trained_together("--output", two, "--epochs", 2, *SMALL, devices=2)
    assert "epoch 2/2" in leader
    assert f"written   {two}" in leader
    assert not GLOO.sub("", other), other
    assert_same_numbers(two, one, 2, 2 * steps)
    assert {path.name for path in two.iterdir()} == {path.name for path in one.iterdir()}
    # Other devices go on where these stopped.
    assert train_here("--resume", "--output", two, "--epochs", 3, "--mesh", "vocab=8") == 0
    assert_same_numbers(two, one, 3, 3 * steps)
    assert train_here("--output", mesh, "--epochs", 3, *SMALL, "--mesh", "data=4,vocab=2") == 0
    assert_same_numbers(mesh, one, 3, 3 * steps)


def test_two_processes_train_a_language_model_as_one_does(tmp_path):
    """Each makes all batches and takes its own rows."""
    model = ("--vocab", 300, "--width", 16, "--layers", 1, "--heads", 2, "--context", 32)
    text = ("--text", ROOT / "docs" / "*.md", "--eval-tokens", 500, "--prompt", "The ")
    steps = ("--steps", 4, "--eval-every", 2, "--batch-size", 4)
    arguments = (*model, *text, *steps)
    leader, other = trained_together("--output", tmp_path / "two", *arguments, trains="train-lm")
    assert "step 4/4" in leader
    assert not GLOO.sub("", other), other
    assert here("train-lm", "--output", tmp_path / "one", *arguments) == 0
    for line, expected in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        for name in ("step", "train_loss", "test_loss"):
            assert line[name] == pytest.approx(expected[name], rel=1e-5)


@pytest.mark.parametrize(
    "stops",
    [
        [(0, signal.SIGKILL)],
        pytest.param([(1, signal.SIGKILL), (1, signal.SIGINT)], marks=pytest.mark.wide),
    ],
    ids=["the first", "another, twice"],
)
def test_a_run_ends_with_any_of_its_processes_and_resumes(tmp_path, stops):
    folder, whole = tmp_path / "stopped", tmp_path / "whole"
    options = ("--hidden", "none", "--batch-size", "1000", "--optimizer", "sgd")
    last = 0
    for victim, stop in stops:
        resume = ["--resume"] if last else []
        arguments = (*resume, "--output", folder, "--epochs", 50000, *options)
        with started([arguments] * 2, free_port()) as both:
            wait_until(lambda last=last: newest(folder) >= last + 2, *both, seconds=BOUNDED)
            both[victim].send_signal(stop)
            errors = [process.communicate(timeout=BOUNDED)[1] for process in both]
        assert both[victim].returncode == (130 if stop == signal.SIGINT else -stop), errors
        assert both[1 - victim].returncode not in {0, None}
        if stop == signal.SIGINT:
            (line,) = errors[victim].splitlines()
            assert line.startswith("jaxsoftmax: interrupted")
        # JAX may report what it saw, before that or after.
        (line,) = [line for line in errors[1 - victim].splitlines() if line.startswith(LOST)]
        assert "--resume" in line
        last = newest(folder)
        assert len(metrics(folder)) in {last, last + 1}
    # Of two stops, both processes resumed after the first; one ends what they began.
    epochs = last + 1
    assert train_here("--resume", "--output", folder, "--epochs", epochs) == 0
    assert train_here("--output", whole, "--epochs", epochs, *options) == 0
    assert_same_numbers(folder, whole, epochs, 2 * epochs)


def test_what_one_process_finds_wrong_all_say(tmp_path):
    folder, port = tmp_path / "run", free_port()
    common = ("--output", folder, *SMALL)

    def said(*commands: Sequence[object]) -> set[str]:
        with started(commands, port) as both:
            lines = {process.communicate(timeout=BOUNDED)[1] for process in both}
        assert [process.returncode for process in both] == [2, 2], lines
        return lines

    assert said(common, (*common, "--seed", 5)) == {
        "jaxsoftmax: --seed: 0 in process 0, 5 in process 1; start all processes with the same "
        "options\n"
    }
    folder.write_text("no folder")
    assert said(common, common) == {
        f"jaxsoftmax: process 0: --output {folder}: expected the name of a folder; this is a file\n"
    }


def test_processes_that_do_not_meet(tmp_path):
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        with started([("--output", tmp_path / "run")] * 2, port) as (leader, other):
            other.kill()
            errors = leader.communicate(timeout=BOUNDED)[1]
    assert leader.returncode != 0
    # JAX speaks first; depending on its version it raises an error or crashes.
    line = errors.splitlines()[-1]
    assert line.startswith("jaxsoftmax: process 0 did not meet the other 1 at --coordinator local")
    assert not (tmp_path / "run").exists()


def test_ctrl_c_while_waiting_for_the_others(tmp_path):
    port = free_port()
    with started([("--output", tmp_path / "run")] * 2, port) as (leader, other):
        other.kill()
        wait_until(lambda: listening(port), leader, seconds=BOUNDED)  # the leader waits there
        leader.send_signal(signal.SIGINT)
        _, errors = leader.communicate(timeout=BOUNDED)
    assert leader.returncode == 130, errors
    assert errors == "jaxsoftmax: interrupted before anything was written\n"


def listening(port: int) -> bool:
    """Whether somebody answers at a port of this machine."""
    with contextlib.suppress(OSError):
        socket.create_connection(("localhost", port), timeout=1).close()
        return True
    return False


def test_a_device_holds_its_share():
    """Of the examples and of the last layer, in memory as well as in the compiled program."""
    options = Options("digits", 1, 50, 1e-3, "sgd", (8,), 0)
    mesh = meshes.make_mesh({"data": 4, "vocab": 2}, CLASSIFIER.axes)
    inputs = CLASSIFIER.read(options, None)
    digits, task = inputs.data, CLASSIFIER.task(inputs, mesh)
    state = meshes.split(task.initial, mesh, state_specs(task))
    x, y = meshes.split((digits.train_x, digits.train_y), mesh, PartitionSpec(meshes.DATA))
    assert [shard.data.shape for shard in x.addressable_shards] == [(360, 64)] * 8
    for leaf in jax.tree.leaves(state.params[-1]):
        assert {shard.data.shape[-1] for shard in leaf.addressable_shards} == {5}
    moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape == (8, 10)]
    assert [leaf.sharding.spec for leaf in moments] == [PartitionSpec(None, "vocab")]
    compiled = step.train_epoch.lower(
        state,
        jax.random.key(1),
        x,
        y,
        optimizer=task.optimizer,
        batch_size=50,
        rows=len(digits.train_y),
        classes=digits.classes,
        mesh=mesh,
    ).compile()
    program = compiled.as_text() or ""
    assert "f32[360,64]" in program
    assert "f32[1440,64]" not in program
    assert "f32[8,10]" not in program


@pytest.mark.parametrize("sizes", [{"data": 4}, {"vocab": 4}, {"data": 2, "vocab": 3}])
def test_what_is_split_comes_back_whole(sizes):
    random = np.random.default_rng(0)
    whole = [random.normal(size=(7, 10)).astype(np.float32), np.float32(3.0), np.arange(5)]
    specs = [PartitionSpec("data", "vocab"), PartitionSpec(), PartitionSpec("data")]
    devices = np.prod(list(sizes.values()))
    mesh = jax.make_mesh(
        (sizes.get("data", 1), sizes.get("vocab", 1)),
        ("data", "vocab"),
        (jax.sharding.AxisType.Auto,) * 2,
        devices=jax.devices()[:devices],
    )
    split = meshes.split(whole, mesh, specs)
    assert len(split[0].addressable_shards) == devices
    for a, b in zip(meshes.whole(split, whole), whole, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *[
            (("--mesh", mesh), ("--mesh", "data=4,vocab=2", repr(mesh)))
            for mesh in ("", "data", "4", "data=0", "data=-4", "rows=8", "data=2,data=4", "data=4,")
        ],
        (("--mesh", "data=3"), ("--mesh data=3", "devices, 8 (cpu)", "got 3")),
        (("--mesh", "data=4,vocab=4"), ("--mesh data=4,vocab=4", "8", "got 16")),
        (("--coordinator", "localhost:1234"), ("--processes and --process-id are missing",)),
        (("--processes", "2", "--process-id", "0"), ("--coordinator is missing",)),
        *[
            (
                ("--coordinator", place, "--processes", "2", "--process-id", "0"),
                ("--coordinator", "HOST:PORT", repr(place)),
            )
            for place in ("localhost", ":1234", "localhost:", "localhost:port", "localhost:65536")
        ],
        (
            ("--coordinator", "localhost:1234", "--processes", "0", "--process-id", "0"),
            ("--processes", "at least 1", "got 0"),
        ),
        *[
            (
                ("--coordinator", "localhost:1234", "--processes", "2", "--process-id", number),
                ("--process-id", "from 0 to 1", f"got {number}"),
            )
            for number in ("2", "-1")
        ],
    ],
)
def test_bad_options(tmp_path, capsys, arguments, words):
    assert_refused(capsys, tmp_path / "run", *arguments, words=words)
