# SPDX-License-Identifier: Apache-2.0
"""The program `jaxsoftmax train`: as a user runs it where its process matters, else in ours."""

import errno
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from programs import (
    MODULE,
    PROJECT,
    SLOW,
    SMALL,
    assert_refused,
    command,
    environment,
    here,
    metrics,
    newest,
    parameters,
    program,
    refused,
    refused_by,
    run,
    train_here,
    trained,
    wait_until,
)

import jaxsoftmax
from jaxsoftmax.training import checkpoint, cli
from jaxsoftmax.training import run as training_run
from jaxsoftmax.training.classifier import data, step
from jaxsoftmax.training.classifier.plots import confusion_png
from jaxsoftmax.training.classifier.task import CLASSIFIER


def assert_same_run(folder: Path, other: Path, epochs: int) -> None:
    assert [line["epoch"] for line in metrics(folder)] == list(range(1, epochs + 1))
    assert (folder / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    ours, theirs = parameters(folder, epochs), parameters(other, epochs)
    assert len(ours) > 4
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a, b)


def start_and_stop_after(
    epochs: int, signal_number: int, *arguments: object, folder: Path, times: int = 1
) -> str:
    """Starts a run too long to end by itself, signals it once it wrote some epochs."""
    with subprocess.Popen(
        command("train", "--output", folder, *arguments),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_until(lambda: newest(folder) >= epochs, process)
        for _ in range(times):
            process.send_signal(signal_number)
            time.sleep(0.001)
        _, errors = process.communicate(timeout=SLOW)
    expected = 130 if signal_number == signal.SIGINT else -signal_number
    assert process.returncode == expected, errors
    return errors


def test_digits_are_learned_and_everything_is_written(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    folder = tmp_path / "new" / "run"
    output = trained("--output", folder, "--epochs", 8)
    table = [line for line in output.splitlines() if line.startswith("│")]
    assert len(table) == 5
    assert max(map(len, table)) <= 40
    assert "…" not in output
    lines = metrics(folder)
    assert [line["epoch"] for line in lines] == list(range(1, 9))
    assert lines[-1]["test_accuracy"] >= 0.97
    assert f"{lines[-1]['test_accuracy']:.2%}" in output
    for name in ("loss.png", "confusion.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    # The last few checkpoints, and nothing half-written.
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"6", "7", "8"}
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "metrics.jsonl", "loss.png", "confusion.png", "checkpoints")
    }


@pytest.mark.wide
def test_seed_decides_the_numbers(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        options = ("--epochs", 2, "--seed", seed, *SMALL)
        assert train_here("--output", tmp_path / name, *options) == 0
    assert_same_run(tmp_path / "a", tmp_path / "b", 2)
    assert metrics(tmp_path / "a") != metrics(tmp_path / "c")


def test_whatever_stops_a_run_it_resumes_with_the_numbers_of_an_uninterrupted_one(tmp_path):
    folder, whole = tmp_path / "it's", tmp_path / "whole"
    done = 0
    # Killed; interrupted, which ends it after the epoch; and more than once, at once.
    for stop, times in ((signal.SIGKILL, 1), (signal.SIGINT, 1), (signal.SIGINT, 5)):
        options = ("--epochs", 5000, *SMALL, *(["--resume"] if done else []))
        errors = start_and_stop_after(done + 2, stop, *options, folder=folder, times=times)
        with ocp.CheckpointManager((folder / "checkpoints").resolve()) as manager:
            oldest, *_, done = sorted(manager.all_steps())
        if stop == signal.SIGKILL:
            # What a kill between the two writes of an epoch leaves, and one inside the first.
            with open(folder / "metrics.jsonl", "a") as file:
                file.write('{"epoch": 9999, "train_loss": 1.0}\n{"epoch": 10000, "tr')
            # And one while the oldest checkpoint was deleted.
            (folder / "checkpoints" / str(oldest) / "_CHECKPOINT_METADATA").unlink()
        else:
            (line,) = errors.splitlines()
            assert "--resume" in line
            # An epoch is written wholly or not at all; at once, its line may be there already.
            assert len(metrics(folder)) in range(done, done + times)
    epochs = done + 1
    resumed = ["train", "--output", f"{folder}", "--resume", "--epochs", f"{epochs}"]
    before = f"from jaxsoftmax.training import cli; assert cli.run({resumed}) == 0"
    at_once = command("train", "--output", whole, "--epochs", epochs, *SMALL, first=before)
    both = run(*at_once, env=environment())
    assert both.returncode == 0, both.stderr
    assert_same_run(folder, whole, epochs)


MOMENTS = [*np.arange(0, 1.2, 0.08), *np.arange(1.2, 3, 0.3)]


@pytest.mark.parametrize(
    "moments", [[0.1, 0.4, 1.0], pytest.param(MOMENTS, marks=pytest.mark.wide)], ids=len
)
def test_ctrl_c_at_any_moment(tmp_path, moments):
    """While everything is imported, read, compiled, …: in the same folder, which stays whole."""
    folder = tmp_path / "run"
    begun = 0
    for moment in moments:
        resume = ["--resume"] if folder.exists() and any(folder.iterdir()) else []
        process = subprocess.Popen(
            command(
                *("train", "--output", folder, "--epochs", 5000, *SMALL, *resume),
                first="os.write(1, b'.')",
            ),
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        time.sleep(moment)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=SLOW)
        if not output.startswith("."):  # Python itself had not begun, and ends in its own way
            assert process.returncode
            continue
        begun += 1
        assert process.returncode == 130, (moment, errors)
        assert len(errors.splitlines()) == 1, (moment, errors)
    assert begun >= len(moments) / 2


def test_ctrl_c_is_ignored_in_the_background(tmp_path):
    """As a shell starts it there; also while the program would have a handler of its own."""
    output, ready = tmp_path / "run", tmp_path / "ready"
    ignoring = ("sh", "-c", 'trap "" INT; : > "$0"; exec "$@"', ready)
    with subprocess.Popen(
        [*ignoring, *command("train", "--output", output, "--epochs", 5000, "--hidden", "none")],
        env=environment(),
        stdout=subprocess.DEVNULL,
    ) as process:

        def trains_on() -> bool:
            process.send_signal(signal.SIGINT)
            return newest(output) >= 3

        wait_until(ready.exists, process)
        wait_until(trains_on, process)
        process.kill()


def test_run_is_neither_overwritten_nor_mixed_with_another(tmp_path, capsys):
    folder, examples = tmp_path / "run", save(tmp_path / "own.npz")
    line = refused(capsys, "--resume", "--output", folder)
    assert f"{folder}: holds no run to resume" in line
    assert not folder.exists()
    assert train_here("--output", folder, "--epochs", 2, *SMALL) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for arguments, words in (
        ((), ("already holds a run", "--resume", "--output")),
        (("--resume", "--learning-rate", "0.5"), ("--learning-rate 0.5", "0.001")),
        (("--resume", "--hidden", "8"), ("--hidden 8", "--hidden 16")),
        (("--resume", "--epochs", "1"), ("--epochs 1", "2 epochs")),
        (("--resume", "--data", examples), ("--data", "own.npz", "digits")),
    ):
        line = refused(capsys, "--output", folder, *arguments)
        assert all(word in line for word in words), line
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_whatever_ends_a_run_first_it_can_be_resumed(tmp_path, capsys, monkeypatch):
    def ended(*_: object) -> None:
        raise OSError("ended here")

    monkeypatch.setattr(checkpoint.Checkpoints, "__init__", ended)
    for resume in ([], ["--resume"]):
        assert "ended here" in refused(capsys, "--output", tmp_path / "run", *resume)
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def save(path: Path, x: object = None, y: object = None) -> Path:
    """An npz of four blurred points in the plane; `x` and `y` replace its arrays."""
    random = np.random.RandomState(1)
    labels = np.arange(103) % 4
    points = 1e4 + 100.0 * np.eye(4)[labels][:, :, None] + random.normal(size=(103, 4, 2))
    np.savez(
        path,
        x=np.asarray(points if x is None else x),
        y=np.asarray(labels if y is None else y),
    )
    return path


def test_own_data(tmp_path, capsys):
    # Three axes, far from zero, and a batch larger than the data.
    examples = save(tmp_path / "own.npz")
    folder = tmp_path / "own"
    options = ("--epochs", 15, "--batch-size", 1000, "-l", 0.1)
    assert train_here("--data", examples, "--output", folder, *options) == 0
    assert metrics(folder)[-1]["test_accuracy"] == 1.0
    # The contents count, not the place.
    moved = examples.rename(tmp_path / "moved.npz")
    assert train_here("--data", moved, "--output", folder, "--epochs", 16, "--resume") == 0
    assert len(metrics(folder)) == 16
    capsys.readouterr()
    changed = save(moved, y=(np.arange(103) + 1) % 4)
    assert "--data" in refused(capsys, "--data", changed, "--output", folder, "--resume")


def test_predict(tmp_path, capsys):
    examples = save(tmp_path / "own.npz")
    folder, found = tmp_path / "run", tmp_path / "found.npz"
    options = ("--epochs", 15, "--batch-size", 1000, "-l", 0.1)
    assert train_here("--data", examples, "--output", folder, *options) == 0
    capsys.readouterr()
    for which in ((), ("--checkpoint", "last"), ("--checkpoint", "14")):
        assert here("predict", folder, "--data", examples, "--output", found, *which) == 0
        assert "accuracy  100.00%: 103 of 103 right" in capsys.readouterr().out
    with np.load(found) as arrays:
        np.testing.assert_array_equal(arrays["classes"], np.arange(103) % 4)
        assert arrays["probabilities"].dtype == np.float32
        np.testing.assert_allclose(arrays["probabilities"].sum(1), 1, rtol=1e-6)
        np.testing.assert_array_equal(arrays["probabilities"].argmax(1), arrays["classes"])
    with np.load(examples) as arrays:
        x = arrays["x"]
    np.savez(tmp_path / "rows.npz", x=x[:1])
    assert here("predict", folder, "--data", tmp_path / "rows.npz", "--output", found) == 0
    shown = capsys.readouterr().out
    assert "accuracy" not in shown
    assert "1 rows" in shown
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    config = json.loads((damaged / "config.json").read_text())
    for options in ({"batch_size": 0}, {"optimizer": "none"}, {"hidden": [0]}, {"seed": -1}):
        changed = config | {"options": config["options"] | options}
        (damaged / "config.json").write_text(json.dumps(changed))
        assert "config.json" in refused(capsys, "--output", damaged, "--resume")
    found.unlink()
    np.savez(tmp_path / "narrow.npz", x=x[:, :1])
    np.savez(tmp_path / "labels.npz", y=np.arange(3))
    for arguments, words in (
        ((folder, "--data", tmp_path / "narrow.npz"), ("narrow.npz", "2 features", "8")),
        ((folder, "--data", tmp_path / "labels.npz"), ("labels.npz", "no array 'x'")),
        ((folder, "--data", tmp_path / "missing.npz"), ("missing.npz", "No such file")),
        ((tmp_path, "--data", examples), ("config.json",)),
        ((folder, "--data", examples, "--checkpoint", "1"), ("--checkpoint", "best, last or one")),
    ):
        line = refused_by(capsys, "predict", *arguments, "--output", found)
        assert all(word in line for word in words), line
    assert not found.exists()


def test_the_best_epoch_is_kept(tmp_path, monkeypatch):
    """The last of those that are as good, beside the last three."""
    accuracies = iter([0.5, 0.9, 0.9, 0.6, 0.7, 0.8, 0.7])

    def evaluated(*_: object) -> dict[str, float]:
        return {"train_loss": 1.0, "test_loss": 1.0} | dict.fromkeys(
            ("train_accuracy", "test_accuracy"), next(accuracies)
        )

    monkeypatch.setattr(CLASSIFIER.task, "evaluate", evaluated)
    assert train_here("--output", tmp_path / "run", "--epochs", 7, *SMALL) == 0
    names = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert names == {"3", "5", "6", "7"}


def test_a_folder_is_for_one_run_at_a_time(tmp_path, capsys):
    folder = tmp_path / "run"
    assert train_here("--output", folder, "--epochs", 2, *SMALL) == 0
    capsys.readouterr()
    with checkpoint.alone(folder):
        assert "another run" in refused(capsys, "--output", folder, "--resume", "--epochs", 3)
    # Two that start at once, both of which find the folder free.
    folder = tmp_path / "new"
    with subprocess.Popen(
        command("train", "--output", folder, "--epochs", 100_000, *SMALL),
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        wait_until(lambda: newest(folder) >= 1, process)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(training_run, "holds_run", lambda *_: False)
            assert "another run" in refused(capsys, "--output", folder, *SMALL)
        process.kill()


def test_what_changed_since_it_was_written_is_not_restored(tmp_path, capsys):
    """A bit of the parameters, or an option that made them."""
    folder, examples = tmp_path / "run", save(tmp_path / "own.npz")
    options = ("--epochs", 2, "--hidden", "64,64", "--data", examples)
    assert train_here("--output", folder, *options) == 0
    predict = ("--data", examples, "--output", tmp_path / "found.npz", "--checkpoint", "2")
    assert here("predict", folder, *predict) == 0
    config = folder / "config.json"
    kept = config.read_text()
    config.write_text(kept.replace('"seed": 0', '"seed": 1'))
    capsys.readouterr()
    with np.load(tmp_path / "found.npz") as arrays:
        probabilities = arrays["probabilities"]
    assert "config.json" in refused_by(capsys, "predict", folder, *predict)
    config.write_text(kept)
    files = (folder / "checkpoints" / "2" / "state").rglob("*")
    largest = max((path for path in files if path.is_file()), key=lambda path: path.stat().st_size)
    whole = largest.read_bytes()
    random = np.random.RandomState(0)
    for place in random.randint(len(whole), size=12):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << random.randint(8)
        largest.write_bytes(damaged)
        code = here("predict", folder, *predict)
        shown = capsys.readouterr()
        assert shown.err.count("\n") == (code == 2)
        if code != 2:  # a byte that nothing reads
            with np.load(tmp_path / "found.npz") as arrays:
                np.testing.assert_array_equal(arrays["probabilities"], probabilities)
    largest.write_bytes(whole)
    assert here("predict", folder, *predict) == 0


def test_a_disk_that_is_full(tmp_path, capsys, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    assert train_here("--output", tmp_path / "run", "--epochs", 2, *SMALL) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}/run/checkpoints: cannot be written" in line
    assert "No space left" in line


def test_the_confusion_of_very_many_classes():
    """Its memory does not grow with their square."""
    labels = np.arange(100_000, dtype=np.int32)
    picture = confusion_png(labels, np.roll(labels, 1), len(labels))
    assert picture.startswith(b"\x89PNG")


def test_what_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        checkpoint.write_atomically(tmp_path / "folder", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_divergence_is_said(tmp_path, capsys):
    options = ("--optimizer", "sgd", "--learning-rate", "1e30")
    assert train_here("--output", tmp_path / "run", *options) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "diverged in epoch 1" in line
    assert "--learning-rate" in line


ROWS = np.arange(103)
X = np.ones((103, 3))
Y = ROWS % 4


def with_value(array: np.ndarray, index: object, value: object) -> np.ndarray:
    changed = array.copy()
    changed[index] = value  # pyright: ignore[reportArgumentType, reportCallIssue]
    return changed


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [
        (with_value(X, (7, 2), np.nan), Y, ("'x'", "row 7", "nan", "feature 2")),
        (with_value(X, (9, 0), -np.inf), Y, ("'x'", "row 9", "-inf")),
        (with_value(X, (5, 1), 1e300), Y, ("'x'", "row 5", "1e+300")),
        (X[:, 0], Y, ("'x'", "(103,)")),
        (X[:0], Y[:0], ("'x'", "(0, 3)")),
        (X.astype(str), Y, ("'x'", "<U")),
        (X.astype(complex), Y, ("'x'", "complex128")),
        (X.astype(object), Y, ("'x'", "objects")),
        (X, Y.astype(object), ("'y'", "objects")),
        (X, Y[:-3], ("'y'", "(103,)", "(100,)")),
        (X, Y[:, None], ("'y'", "(103,)", "(103, 1)")),
        (X, with_value(Y, 11, -1), ("'y'", "row 11", "-1")),
        (X, with_value(Y.astype(float), 13, 0.5), ("'y'", "row 13", "0.5", "float64")),
        (X, with_value(Y.astype(float), 13, np.nan), ("'y'", "row 13", "nan")),
        (X, Y.astype("U3"), ("'y'", "row 0", "'0'", "<U3")),
        (X, Y + (Y > 1), ("'y'", "row 2", "label 2")),
        (X, Y + 1, ("'y'", "row 0", "label 0")),
        (X, with_value(Y.astype(np.uint64), 17, 2**64 - 1), ("'y'", "row 17", "label 4")),
        (X, 0 * Y, ("'y'", "row 0", "label 0")),
        (X, with_value(Y, 21, 4), ("'y'", "row 21", "label 4")),
    ],
)
def test_bad_arrays(tmp_path, capsys, x, y, words):
    path = save(tmp_path / "bad.npz", x, y)
    assert_refused(capsys, tmp_path / "run", "--data", path, words=("bad.npz", *words))


def test_labels_of_any_kind_are_renumbered_as_the_error_says(tmp_path, capsys):
    for labels in (
        *(Y - 7, 3 * Y, 1 + Y, Y / 2, 2.0 * Y, (Y + 5).astype(np.int8)),
        *(Y.astype("U3"), Y.astype("U3").astype(object)),
    ):
        path = save(tmp_path / "labels.npz", X, labels)
        line = refused(capsys, "--data", path, "--output", tmp_path / "run")
        remedy = line.rpartition(": ")[2].partition(" numbers")[0]
        assert remedy == "np.unique(y, return_inverse=True)[1]"
        renumbered = eval(remedy, {"np": np, "y": labels})
        np.testing.assert_array_equal(renumbered, Y)
        assert data.load(str(save(tmp_path / "good.npz", X, renumbered))).classes == 4


def test_bad_files(tmp_path, capsys):
    good = save(tmp_path / "good.npz").read_bytes()
    index = good.index(b"PK\1\2")
    contents = {
        "empty.npz": (b"", "not an npz"),
        "text.npz": (b"hello\n", "not an npz"),
        **{f"cut {end}.npz": (good[:end], "truncated npz file") for end in (4, 100, 2000, -1)},
        "damaged.npz": (good[:300] + b"\0" * 64 + good[364:], "array 'x' cannot be read"),
        "version.npz": (good[: index + 6] + b"\xff" + good[index + 7 :], "damaged or"),
    }
    for name, (content, _) in contents.items():
        (tmp_path / name).write_bytes(content)
    np.save(tmp_path / "array.npy", X)
    np.savez(tmp_path / "other.npz", images=X, y=Y)
    np.savez(tmp_path / "nothing.npz")
    expected = {
        **{name: words for name, (_, words) in contents.items()},
        "array.npy": "not an npz",
        "other.npz": "no array 'x'",
        "nothing.npz": "it has nothing",
        "missing.npz": "No such file",
        ".": "directory",
    }
    for name, words in expected.items():
        path = tmp_path / name
        assert_refused(capsys, tmp_path / "run", "--data", path, words=(str(path), words))


@pytest.mark.parametrize(
    "arguments",
    [
        *[("--epochs", value) for value in ("0", "-1", "two", "1.5")],
        *[("--batch-size", value) for value in ("0", "x")],
        *[("--learning-rate", value) for value in ("0", "-1", "nan", "inf", "1e-60", "fast")],
        *[("--hidden", value) for value in ("0", "8,-1", "8;8", "")],
        *[("--seed", value) for value in ("-1", "4294967296")],
        ("--optimizer", "newton"),
        ("--epoch", "3"),
    ],
)
def test_bad_options(tmp_path, capsys, arguments):
    assert_refused(capsys, tmp_path / "run", *arguments, words=arguments[:1])


def test_bad_output_folder(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        assert str(folder) in refused(capsys, "--output", folder)


def test_bad_input_as_a_process(tmp_path):
    done = program("train", "--data", "nowhere.npz", "--output", tmp_path / "run")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "jaxsoftmax: nowhere.npz: cannot be read: No such file or directory\n"
    assert not (tmp_path / "run").exists()


def test_closed_streams():
    line = command("predict", "nowhere", "--data", "nothing.npz")
    done = subprocess.run(
        ["sh", "-c", '"$@" >&- 2>&-', "sh", *line], check=False, timeout=SLOW, capture_output=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


def test_help(capsys):
    assert cli.run(["train", "--help"]) == 0
    text = capsys.readouterr().out
    for option in (
        *("--data", "--output", "--resume", "--epochs", "--batch-size", "--learning-rate"),
        *("--optimizer", "--hidden", "--seed", "--mesh", "--coordinator", "--processes"),
        "--process-id",
    ):
        assert option in text
    assert re.search(r"--resume +Continue the run", text)  # and no value
    assert cli.run([]) == 0
    text = capsys.readouterr().out
    assert "train" in text
    assert re.search(r"--version +Show the version", text)


def test_without_the_extra():
    hide = "sys.modules.update(dict.fromkeys(('optax', 'typer')))"
    for argument, code, said, words in (
        ("train", 2, "", "pip install 'jaxsoftmax[train]'"),
        ("--version", 0, f"jaxsoftmax {jaxsoftmax.__version__}\n", ""),
    ):
        done = run(*command(argument, first=hide), env=environment())
        assert (done.returncode, done.stdout) == (code, said)
        assert words in done.stderr
        assert done.stderr.count("\n") == (code == 2)


def test_the_wheel_has_the_module_that_the_script_imports():
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    assert included == ["jaxsoftmax", f"{MODULE}.py"]


def test_python_runs_the_package_too():
    done = run(sys.executable, "-m", "jaxsoftmax", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"jaxsoftmax {jaxsoftmax.__version__}\n"


@pytest.mark.parametrize(("rows", "batch_size"), [(10, 4), (8, 4), (3, 3), (7, 1)])
def test_minibatches_take_every_row_once(rows, batch_size):
    order, weights = step.minibatches(jax.random.key(0), rows, batch_size)
    assert order.shape == weights.shape == (-(-rows // batch_size), batch_size)
    assert sorted(np.asarray(order)[np.asarray(weights) == 1].tolist()) == list(range(rows))


def test_padding_does_not_change_the_gradient():
    params = [(jnp.arange(6.0).reshape(2, 3) / 7, jnp.zeros(3))]
    x, y = jnp.asarray([[1.0, 2.0], [0.5, -1.0]]), jnp.asarray([0, 2])
    padded_x, padded_y = jnp.concatenate([x, x[:1]]), jnp.concatenate([y, y[:1]])
    plain = jax.grad(step.mean_loss)(params, x, y, jnp.ones(2), 3)
    padded = jax.grad(step.mean_loss)(params, padded_x, padded_y, jnp.asarray([1.0, 1.0, 0.0]), 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), plain, padded)


def test_split_holds_out_a_fifth_of_every_class():
    digits = data.load("digits")
    total = np.bincount(digits.train_y) + np.bincount(digits.test_y)
    assert (np.abs(np.bincount(digits.test_y) - 0.2 * total) <= 0.5).all()
    assert len(digits.train_y) + len(digits.test_y) == 1797
    np.testing.assert_allclose(digits.train_x.mean(axis=0), 0, atol=1e-5)
