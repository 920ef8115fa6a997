# SPDX-License-Identifier: Apache-2.0
"""The benchmark's commands run end to end on tiny shapes; its arithmetic is checked by hand."""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import typer

from bench import (
    accuracy,
    contenders,
    environment,
    figures,
    head,
    memory,
    overtraining,
    report,
    results,
    sharding,
    speed,
    terminal,
    timing,
)
from bench.cases import Case, Dtype, Labels, Mode, Shape, inputs, parse_shape, program
from jaxsoftmax.training import model

ROOT = Path(__file__).resolve().parent.parent

# A name that is None in sys.modules cannot be imported: as if the package were not installed.
WITHOUT_PEERS = """
import runpy, sys
sys.modules["optax"] = sys.modules["torch"] = None
runpy.run_module("bench", run_name="__main__", alter_sys=True)
"""


def bench(*arguments: str, without_peers: bool = False) -> subprocess.CompletedProcess[str]:
    start = ["-c", WITHOUT_PEERS] if without_peers else ["-m", "bench"]
    return subprocess.run(
        [sys.executable, *start, *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "COLUMNS": "200"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_speed_writes_every_case_and_prints_every_contender(tmp_path: Path):
    path = tmp_path / "deep" / "results.json"
    done = bench(
        "speed", "--shape", "8x16", "--shape", "4x33", "--repeats", "3", "--json", f"{path}"
    )
    assert done.returncode == 0, done.stderr

    sections = json.loads(path.read_text())
    assert list(sections) == ["speed/integer"]
    section = sections["speed/integer"]
    assert section["command"] == "python -m bench speed --shape 8x16 --shape 4x33 --repeats 3"
    assert section["left_out"] == []
    assert section["environment"]["versions"]["jax"] == jax.__version__
    assert {"device", "platform", "cpus", "python", "commit", "date"} < set(section["environment"])

    float32, half = (
        ["jaxsoftmax", "optax", "jax.nn"],
        [
            "jaxsoftmax",
            "optax",
            "optax, no upcast",
            "jax.nn",
        ],
    )
    asked = [
        (tokens, classes, dtype, mode, names)
        for tokens, classes in ((8, 16), (4, 33))
        for dtype, names in (("float32", float32), ("bfloat16", half))
        for mode in ("forward", "value-and-grad")
    ]
    assert asked == [
        (
            case["tokens"],
            case["classes"],
            case["dtype"],
            case["mode"],
            [row["name"] for row in case["contenders"]],
        )
        for case in section["cases"]
    ]
    for case in section["cases"]:
        passes = 1 if case["mode"] == "forward" else 3
        itemsize = 4 if case["dtype"] == "float32" else 2
        assert case["bytes"] == passes * itemsize * case["tokens"] * case["classes"]
        ours = case["contenders"][0]["median_s"]
        for row in case["contenders"]:
            assert 0 < row["q1_s"] <= row["median_s"] <= row["q3_s"]
            assert row["compile_s"] > 0
            assert row["ratio"] == pytest.approx(ours / row["median_s"])

    for mean in section["geometric_means"]:
        of_shapes = [
            row["ratio"]
            for case in section["cases"]
            for row in case["contenders"]
            if (case["dtype"], case["mode"], row["name"])
            == (mean["dtype"], mean["mode"], mean["contender"])
        ]
        assert mean["ratio"] == pytest.approx(math.sqrt(math.prod(of_shapes)))
        assert (mean["best"], mean["worst"]) == (min(of_shapes), max(of_shapes))
        assert mean["worst_shape"] in ("8x16", "4x33")
    assert len(section["geometric_means"]) == 2 * 2 + 2 * 3

    for words in ("forward, float32", "value-and-grad, bfloat16", "optax, no upcast", "8x16"):
        assert words in done.stdout
    assert "geometric mean" in done.stdout


def test_accuracy_prints_every_lead_and_keeps_other_sections(tmp_path: Path):
    path = tmp_path / "results.json"
    path.write_text('{"speed/integer": {"kept": true}}')
    chosen = "--dtype float32 --lead 1 --lead 30 --offset 100 --classes 20 --rows 2"
    arguments = shlex.split(chosen)
    done = bench("accuracy", *arguments, "--json", f"{path}")
    assert done.returncode == 0, done.stderr

    sections = json.loads(path.read_text())
    assert sections["speed/integer"] == {"kept": True}
    section = sections["accuracy/integer"]
    assert [
        (one["name"], one["dtype"], one["offset"])
        for one in section["series"]
        if one["name"] != "torch"
    ] == [(name, "float32", 100.0) for name in ("jaxsoftmax", "optax", "jax.nn")]
    assert section["leads"] == [1.0, 30.0]
    ours, optax, *_ = section["series"]
    assert optax["target"]["max"][1] == 1  # the gradient is 0 where it should be 1e-12
    assert max(optax["others"]["max"]) < 1e-4
    assert max(ours["loss"]["max"]) < 1e-6
    assert max(ours["target"]["max"]) < 1e-5

    assert section["command"] == f"python -m bench accuracy {' '.join(arguments)}"
    for words in ("lead 1 ", " 30 ", "loss", "gradient, target", "gradient, others", "100 %"):
        assert words in done.stdout
    section["series"] = [one | {"offset": 0.0} for one in section["series"]]
    lines = accuracy.as_markdown(section).splitlines()
    assert lines[0] == "| relative error of | by | lead 1 | 30 |"
    assert len([line for line in lines if line.startswith("|")]) == 2 + 3 * len(section["series"])
    assert lines[-1].startswith(f"Measured by `{section['command']}` on ")
    for version in ("jaxsoftmax", "jax", "optax"):
        assert f"{version} {section['environment']['versions'][version]}" in lines[-1]
    assert section["environment"]["date"] in lines[-1]


@pytest.mark.parametrize(
    "arguments",
    [
        ("speed", "--shape", "8x16", "--repeats", "1", "--mode", "forward"),
        ("accuracy", "--lead", "1", "--classes", "5", "--rows", "1", "--dtype", "bfloat16"),
    ],
    ids=["speed", "accuracy"],
)
def test_a_missing_peer_is_left_out_with_a_line(arguments: tuple[str, ...], tmp_path: Path):
    path = tmp_path / "results.json"
    done = bench(*arguments, "--json", f"{path}", without_peers=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("left out: ")]
    peers = ["optax", "optax, no upcast", *["torch"] * (arguments[0] == "accuracy")]
    assert [line.partition(" (")[0] for line in lines] == [f"left out: {peer}" for peer in peers]
    (section,) = json.loads(path.read_text()).values()
    assert section["left_out"] == lines
    rows = section.get("series") or [row for case in section["cases"] for row in case["contenders"]]
    assert {row["name"] for row in rows} == {"jaxsoftmax", "jax.nn"}
    assert "jax.nn" in done.stdout


def test_our_own_import_errors_are_not_swallowed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "bench.contenders.ours", raising=False)
    monkeypatch.setitem(sys.modules, "jaxsoftmax", None)
    with pytest.raises(ModuleNotFoundError, match="jaxsoftmax"):
        contenders.load(contenders.LOGITS[Labels.INTEGER], Dtype.FLOAT32)


@pytest.mark.parametrize("shape", ["4096", "x", "0x5", "4x-1", "axb", "1x2x3"])
def test_a_bad_shape_is_named(shape: str):
    with pytest.raises(typer.BadParameter, match=f"TOKENSxCLASSES.*'{shape}'"):
        parse_shape(shape)


def test_a_shape_reads_back():
    assert parse_shape("4096X32000") == Shape(4096, 32000)
    assert parse_shape(str(Shape(3, 4))) == Shape(3, 4)


@pytest.mark.parametrize("content", ["not json", "[1]"])
def test_a_file_of_something_else_is_refused_before_measuring(tmp_path: Path, content: str):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(typer.BadParameter, match=r"notes\.txt"):
        results.destination(path, complete=True)
    assert path.read_text() == content


def test_a_selection_is_kept_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    assert results.destination(None, complete=False) is None
    path = results.destination(None, complete=True)
    assert path is not None
    assert path.parent == tmp_path
    assert path.name == environment.slug(environment.device_name()) + ".json"


@pytest.mark.parametrize("labels", Labels)
@pytest.mark.parametrize("dtype", [Dtype.FLOAT32, Dtype.BFLOAT16])
@pytest.mark.parametrize("mode", Mode)
def test_contenders_compute_the_same(labels: Labels, dtype: Dtype, mode: Mode):
    (logits, targets), *_ = inputs(Shape(6, 37), dtype, labels)
    found, left_out = contenders.load(contenders.LOGITS[labels], dtype)
    assert left_out == []
    ours, *others = (program(loss, mode)(logits, targets) for _, loss, _ in found)
    # Two contenders accumulate in bfloat16, so agreement there is coarse.
    rtol, atol = (1e-5, 1e-7) if dtype is Dtype.FLOAT32 else (0.05, 1e-3)
    for other in others:
        for mine, theirs in zip(jax.tree.leaves(ours), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(f64(mine), f64(theirs), rtol=rtol, atol=atol)


def f64(array: jax.Array) -> np.ndarray:
    return np.asarray(array, np.float64)


def test_small_inputs_rotate_and_dense_labels_are_distributions():
    pairs = inputs(Shape(64, 100), Dtype.BFLOAT16, Labels.DENSE)
    assert len(pairs) == 512
    assert not jnp.array_equal(pairs[0][0], pairs[1][0])
    logits, labels = pairs[-1]
    assert logits.dtype == labels.dtype == jnp.bfloat16
    np.testing.assert_allclose(f64(labels).sum(-1), 1, rtol=0.01)


def test_dense_labels_count_as_bytes():
    def passes(mode: Mode) -> float:
        return Case(Shape(8, 16), Dtype.BFLOAT16, mode, Labels.DENSE).bytes / (8 * 16 * 2)

    assert passes(Mode.FORWARD) == 2
    assert passes(Mode.VALUE_AND_GRAD) == 5


def test_every_call_runs_twice_a_round_in_changing_order_on_fresh_inputs():
    calls = []
    named = {
        name: lambda argument, name=name: calls.append((name, argument)) for name in ("a", "b", "c")
    }
    taken = timing.interleave(named, [(0,), (1,), (2,), (3,)], rounds=20)
    assert [argument for _, argument in calls] == [i % 4 for i in range(len(calls))]
    measured = [name for name, _ in calls[3 * timing.WARM_UP_ROUNDS :]]
    assert measured[::2] == measured[1::2]  # after itself, so no neighbour has an influence
    rounds = [tuple(measured[i : i + 6 : 2]) for i in range(0, len(measured), 6)]
    assert len(rounds) == 20
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1
    assert list(taken) == ["a", "b", "c"]


def test_a_round_budget_in_seconds_has_a_floor_and_a_ceiling():
    calls = []
    timing.interleave({"a": calls.append}, [(0,)], seconds=0.0)
    assert len(calls) == timing.WARM_UP_ROUNDS + 2 * timing.FEWEST_ROUNDS
    calls.clear()
    timing.interleave({"a": calls.append}, [(0,)], seconds=60.0)
    assert len(calls) == timing.WARM_UP_ROUNDS + 2 * timing.MOST_ROUNDS


def test_quartiles_and_geometric_mean():
    assert timing.summarize([5.0, 1.0, 2.0, 3.0, 4.0]) == (3.0, 2.0, 4.0)
    assert results.geometric_mean([0.5, 2.0]) == pytest.approx(1)
    assert results.geometric_mean([0.4, 0.9]) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(1.2344, "1234"), (0.5, "500"), (0.0999999, "100"), (0.0123, "12.3"), (4.2e-5, "0.042")],
)
def test_milliseconds(seconds: float, text: str):
    assert speed.milliseconds(seconds) == text.replace("1234", "1230")


@pytest.mark.parametrize(
    ("error", "text"), [(0, "0"), (6e-8, "6e-8"), (0.048, "4.8 %"), (0.12, "12 %"), (1, "100 %")]
)
def test_percent(error: float, text: str):
    assert accuracy.percent(error) == text


def test_the_exact_values_are_exact_far_beyond_float64():
    logits = jnp.array([[0.0, 80.0], [0.0, 0.5]])
    losses, gradients = accuracy.exact(logits, np.array([1, 0]))
    tail, p = math.exp(-80), 1 / (1 + math.exp(0.5))
    np.testing.assert_allclose(losses, [tail, -math.log(p)], rtol=1e-14)
    np.testing.assert_allclose(gradients, [[tail, -tail], [p - 1, 1 - p]], rtol=1e-14)


def test_errors_are_told_apart_by_entry():
    targets = np.array([1, 0, 0])
    truth = (
        np.array([2.0, 4.0, 1.0]),
        np.array([[0.5, -0.5], [-1e-50, 1e-50], [-0.25, 0.25]]),
    )
    computed = np.array([2.0, 5.0, 1.1]), np.array([[0.6, -0.5], [0.0, 1.0], [-0.2, 0.25]])
    found = accuracy.relative_errors(computed, truth, targets, Dtype.FLOAT32)
    assert found["loss"] == pytest.approx({"max": 0.25, "median": 0.1})
    # No float32 is near 1e-50: nobody's error.
    assert found["target"] == pytest.approx({"max": 0.2, "median": 0.1})
    assert found["others"] == pytest.approx({"max": 0.2, "median": 0.1})
    second, true = ((losses[1:2], gradients[1:2]) for losses, gradients in (computed, truth))
    alone = accuracy.relative_errors(second, true, targets[1:2], Dtype.FLOAT32)
    assert alone["loss"] == pytest.approx({"max": 0.25, "median": 0.25})
    assert alone["target"] is alone["others"] is None


@pytest.mark.parametrize("dtype", Dtype)
def test_the_target_leads_by_what_was_asked(dtype: Dtype):
    logits, targets = accuracy.draw(dtype, 17.0, 0.0, 50, 4)
    assert logits.dtype == jnp.dtype(dtype)
    ordered = np.sort(f64(logits), axis=-1)
    rounding = 32 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(ordered[:, -1] - ordered[:, -2], 17, atol=rounding)
    assert (np.argmax(logits, axis=-1) == targets).all()
    same, _ = accuracy.draw(dtype, 3.0, 0.0, 50, 4)
    assert ((f64(same) != f64(logits)).sum(axis=-1) == 1).all()  # only the target is another


def test_an_offset_is_rounded_with_the_logits_and_the_truth_is_of_what_is_left():
    logits, targets = accuracy.draw(Dtype.BFLOAT16, 5.0, 1e4, 50, 4)
    assert (f64(logits) == 9984).all()  # bfloat16 numbers are 64 apart there
    losses, gradients = accuracy.exact(logits, targets)
    np.testing.assert_allclose(losses, math.log(50), rtol=1e-14)
    np.testing.assert_allclose(gradients[np.arange(4), targets], -0.98, rtol=1e-14)


def test_torch_differentiates_each_loss_by_itself():
    pytest.importorskip("torch")
    (contender,), _ = contenders.load(contenders.EAGER[Labels.INTEGER], Dtype.FLOAT32)
    logits, targets = accuracy.draw(Dtype.FLOAT32, 1.0, 0.0, 5, 3)
    for labels in Labels:
        (contender,), _ = contenders.load(contenders.EAGER[labels], Dtype.FLOAT32)
        computed = accuracy.evaluate(contender, logits, targets, labels)
        for got, true in zip(computed, accuracy.exact(logits, targets), strict=True):
            np.testing.assert_allclose(got, true, rtol=1e-5)


def test_overtraining_records_what_the_losses_say_and_what_is_so(
    monkeypatch: pytest.MonkeyPatch,
):
    two = contenders.LOGITS[Labels.INTEGER][:2]
    monkeypatch.setattr(contenders, "LOGITS", {Labels.INTEGER: two})
    section = overtraining.measure(60, looks=4)
    runs = {run["name"]: run for run in section["runs"]}
    assert list(runs) == ["jaxsoftmax", "optax"]
    assert section["steps"][0] == 0
    assert section["steps"][-1] == 60
    for run in runs.values():
        assert all(
            len(run[key]) == len(section["steps"])
            for key in run
            if key != "name" and isinstance(run[key], list)
        )
        np.testing.assert_allclose(run["loss"], run["exact_loss"], rtol=1e-4)
        assert run["accuracy"][0] < 0.5
        assert run["accuracy"][-1] > 0.99
        assert (run["loss_zero"], run["gradient_zero"]) == (-1, -1)
    table = overtraining.as_markdown(section | {"command": "python -m bench overtraining"})
    assert "| optax | never | never |" in table


def test_overtraining_holds_a_loss_against_float64():
    """Two examples, by hand: a linear classifier whose targets lead by 20 and by 40 nats."""
    weights = jnp.diag(jnp.array([20.0, 40.0]))
    params = [(weights, jnp.zeros(2))]
    x, y = jnp.eye(2), jnp.array([0, 1])
    tails = np.exp([-20.0, -40.0]) / (1 + np.exp([-20.0, -40.0]))
    dz = np.array([[-tails[0], tails[0]], [tails[1], -tails[1]]]) / 2
    norm = np.linalg.norm(np.concatenate([dz.ravel(), dz.sum(axis=0)]))
    for name, loss, _ in contenders.load(contenders.LOGITS[Labels.INTEGER], Dtype.FLOAT32)[0]:
        found = overtraining.judge(params, x, y, loss=loss)
        assert found["exact_loss"] == pytest.approx(np.log1p(np.exp([-20, -40])).mean(), rel=1e-12)
        assert found["exact_gradient_norm"] == pytest.approx(norm, rel=1e-6)
        assert found["smallest_lead"] == 20
        assert found["accuracy"] == 1
        if name == contenders.OURS:
            assert found["loss"] == pytest.approx(found["exact_loss"], rel=1e-6)
            assert found["gradient_error"] < 1e-6
        else:
            # The target's entries are lost, the others are right: half of dz, and of its sums.
            kept = np.where(dz > 0, dz, 0)
            lost = np.concatenate([(kept - dz).ravel(), (kept - dz).sum(axis=0)])
            assert found["loss"] == 0
            assert found["gradient_error"] == pytest.approx(np.linalg.norm(lost) / norm, rel=1e-3)


def test_overtraining_steps_are_adams():
    optax = pytest.importorskip("optax")
    x, y = jax.random.normal(jax.random.key(1), (6, 4)), jnp.arange(6) % 3
    state = overtraining.initial((4, 5, 3))
    params = state.params
    loss = overtraining.OURS
    optimizer = optax.adam(overtraining.LEARNING_RATE)
    slots = optimizer.init(params)
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(5):
            gradient = jax.grad(lambda p: loss(model.apply(p, x, 3), y).mean())(params)
            updates, slots = optimizer.update(gradient, slots)
            params = optax.apply_updates(params, updates)
    taken = overtraining.train(state, x, y, 5, loss=loss).params
    for mine, theirs in zip(jax.tree.leaves(taken), jax.tree.leaves(params), strict=True):
        np.testing.assert_allclose(f64(mine), f64(theirs), rtol=1e-5, atol=1e-7)


def test_overtraining_notices_zero_at_its_step():
    def loss(logits: jax.Array, labels: jax.Array) -> jax.Array:
        return jnp.where(labels == 0, jnp.maximum(logits[:, 0], 0), 0)

    state = overtraining.initial((1, 2))
    params = [(jnp.zeros((1, 2)), jnp.array([2.5 * overtraining.LEARNING_RATE, 0.0]))]
    x, y = jnp.zeros((3, 1)), jnp.zeros(3, jnp.int32)
    # Adam's first steps are of one size, so the bias is below 0 after three.
    state = overtraining.train(state._replace(params=params), x, y, 10, loss=loss)
    assert (int(state.step), int(state.loss_zero), int(state.gradient_zero)) == (10, 3, 3)


def test_tables_print_again_from_a_file(capsys: pytest.CaptureFixture[str]):
    section = speed.measure([Shape(4, 8)], [Dtype.FLOAT32], [Mode.FORWARD], Labels.DENSE, repeats=2)
    again = json.loads(json.dumps(section))
    for table in speed.tables(again):
        terminal.output().print(table)
    printed = capsys.readouterr().out
    assert "forward, float32, dense labels" in printed
    assert "both twice" in printed


def test_the_readme_shows_the_committed_results():
    files = report.committed()
    if not files:
        pytest.skip("no results are committed")
    readme = report.README.read_text(encoding="utf-8")
    assert readme == report.render(readme, files)
    sharding = report.SHARDING.read_text(encoding="utf-8")
    assert sharding == report.render(sharding, files, report.MESH_BLOCKS)
    benchmarks = report.BENCHMARKS.read_text(encoding="utf-8")
    assert benchmarks == report.render(benchmarks, files, report.BENCHMARKS_BLOCKS)
    for stem in report.FIGURES:
        assert f"(figures/{stem}.png)" in benchmarks
        for kind in ("png", "svg"):
            assert (report.FIGURES_FOLDER / f"{stem}.{kind}").is_file()


@pytest.fixture(scope="module")
def sections() -> dict[str, Any]:
    """Measure, on tiny shapes, what a results file of one device holds."""
    timed = speed.measure(
        [Shape(4, 8), Shape(2, 5)], speed.DTYPES, speed.MODES, Labels.INTEGER, repeats=2
    )
    exact = accuracy.measure(
        list(Dtype), Labels.INTEGER, [1.0, 30.0], [0.0, 1e4], classes=5, rows=1
    )
    heads = [head.Head(8, 4, 16, Dtype.FLOAT32), head.Head(4, 3, 5, Dtype.BFLOAT16)]
    return {
        "speed/integer": timed | {"command": "python -m bench speed"},
        "accuracy/integer": exact | {"command": "python -m bench accuracy"},
        "speed/linear": head.measure(heads, repeats=2)
        | {"command": "python -m bench speed --op linear"},
        "memory": memory.measure(heads, [memory.HERE]) | {"command": "python -m bench memory"},
    }


def test_heads_over_a_mesh_of_this_machine():
    case = head.Head(512, 64, 4096, Dtype.FLOAT32)
    devices = sharding.parse("here/data=4,vocab=2")
    assert str(devices) == "here/data=4,vocab=2"
    rows = sharding.measure(case, devices)["rows"]
    found = {(row["layout"], row["gradients"]): row for row in rows}
    assert len(found) == 2 * len(sharding.layouts())
    for (layout, _), row in found.items():
        # Nothing but a maximum and a few sums a token in the loops, and only with a vocabulary.
        assert row["loop_wire_bytes"] <= ("vocabulary" in layout) * 2 * 4 * 4 * case.tokens
        assert row["wire_bytes"] > 0
    # Data: d_kernel summed and, in forward, scattered to be gathered: once around a ring each.
    kernel = 4 * case.hidden * case.classes
    recomputed = found["data", "recompute"]["wire_bytes"]
    assert recomputed == pytest.approx(2 * kernel * 7 / 8, rel=0.01)
    for wrong in ("here", "here/data=4", "v5e:2x4/data=a,vocab=2", "here/vocab=2,data=4"):
        with pytest.raises(typer.BadParameter, match="expected TOPOLOGY/data=N,vocab=M"):
            sharding.parse(wrong)
    with pytest.raises(typer.BadParameter, match="has 8 devices, its mesh 6"):
        sharding.measure(case, sharding.Devices("here", 3, 2))


def test_report_writes_the_readme_between_the_markers(
    sections: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    readme = tmp_path / "README.md"
    readme.write_text(report.README.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(report, "README", readme)
    monkeypatch.setattr(report, "MESH_BLOCKS", {})
    monkeypatch.setattr(report, "BENCHMARKS_BLOCKS", {})
    monkeypatch.setattr(report, "FIGURES_FOLDER", tmp_path)
    left = {stem: report.FIGURES[stem] for stem in ("accuracy", "overtraining")}
    monkeypatch.setattr(report, "FIGURES", left)  # of these, one has its section
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for name, section in sections.items():
        results.save(tmp_path / "a.json", name, section)

    def outside() -> list[str]:
        text = readme.read_text(encoding="utf-8")
        return re.split(r"(?s)(?<=<!-- bench report: ).*?(?=<!-- /bench report: )", text)

    before = outside()
    assert len(before) == 5
    readme.write_text(report.replace(readme.read_text("utf-8"), "speed", "stale"), "utf-8")
    with pytest.raises(typer.Exit, match="1"):
        report.command(check=True)
    assert "stale" in readme.read_text("utf-8")
    report.command()
    assert "stale" not in readme.read_text("utf-8")
    assert outside() == before
    drawn = {path.name: path.read_bytes() for path in tmp_path.glob("*.*g")}
    assert sorted(drawn) == ["accuracy.png", "accuracy.svg"]
    report.draw(report.committed())
    assert drawn == {path.name: path.read_bytes() for path in tmp_path.glob("*.*g")}
    report.command(check=True)


def test_the_speed_table_holds_every_ratio(sections: dict[str, Any]):
    section = sections["speed/integer"]
    table, explained, origin = speed.as_markdown(section).rsplit("\n", 2)
    headings, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line]
    found = {
        (shape, dtype, heading): cell
        for shape, dtype, *cells in rows
        for heading, cell in zip(headings[2:], cells, strict=True)
        if cell != "–"
    }
    expected = {
        (f"{case['tokens']}x{case['classes']}", case["dtype"], f"{case['mode']} ÷ {row['name']}"): (
            f"{row['ratio']:.2f}"
        )
        for case in section["cases"]
        for row in case["contenders"]
        if row["name"] != contenders.OURS
    } | {
        ("**geometric mean**", mean["dtype"], f"{mean['mode']} ÷ {mean['contender']}"): (
            f"{mean['ratio']:.2f}"
        )
        for mean in section["geometric_means"]
    }
    assert found == expected
    assert [row[1] for row in rows] == ["float32"] * 3 + ["bfloat16"] * 3
    assert explained.startswith("optax: ")
    where = environment.in_words(section["environment"])
    assert origin == f"Measured by `python -m bench speed` on {where}."


def test_the_tables_of_the_heads_hold_every_contender(sections: dict[str, Any]):
    for section, text in (
        (sections["speed/linear"], head.as_markdown(sections["speed/linear"])),
        (sections["memory"], memory.as_markdown(sections["memory"])),
    ):
        rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:1] == "|"][2:]
        names = [row["name"] for row in section["cases"][0]["contenders"]]
        assert [row[0] for row in rows] == names
        assert all(len(row) == 1 + len(section["cases"]) for row in rows)
        assert names[:3] == ["jaxsoftmax", "jaxsoftmax, recompute", "optax"]
    timed = sections["speed/linear"]["cases"][0]
    by_name = {row["name"]: row for row in timed["contenders"]}
    ratio = by_name["jaxsoftmax"]["median_s"] / by_name["optax"]["median_s"]
    megabytes = head.megabytes(by_name["jaxsoftmax"]["temp_bytes"])
    assert f"| jaxsoftmax | {ratio:.2f}, {megabytes} MB |" in head.as_markdown(
        sections["speed/linear"]
    )
    assert timed["flops"] == 3 * 2 * 8 * 4 * 16


def test_the_heads_of_all_contenders_agree():
    case = head.Head(6, 5, 37, Dtype.FLOAT32)
    (arguments, *_) = head.inputs(case)
    found, _ = contenders.load(contenders.HEAD, Dtype.FLOAT32)
    results = {
        contender.name: head.program(contender)(*arguments)
        for contender in found
        if not contender.entry.whole
    }
    expected = jax.tree.leaves(results["optax"])
    for name, result in results.items():
        for mine, theirs in zip(jax.tree.leaves(result), expected, strict=True):
            np.testing.assert_allclose(f64(mine), f64(theirs), rtol=2e-4, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("text", ["4x5", "4x5x0", "4x5x6:int8", "axbxc", ""])
def test_a_bad_head_is_named(text: str):
    with pytest.raises(typer.BadParameter, match=f"TOKENSxHIDDENxCLASSES.*'{text}'"):
        head.parse(text)


def test_a_head_reads_back():
    case = head.Head(4, 5, 6, Dtype.FLOAT16)
    assert head.parse(str(case)) == case
    assert head.parse("4X5X6") == case._replace(dtype=Dtype.FLOAT32)


def test_options_that_mean_nothing_for_a_head_are_refused():
    done = bench("speed", "--op", "linear", "--dtype", "bfloat16")
    assert done.returncode == 2
    assert "a dtype is part of --shape" in " ".join(done.stderr.split())
    done = bench("memory", "--target", "v9")
    assert done.returncode == 2
    assert "got 'v9'" in " ".join(done.stderr.split())


def test_every_device_has_its_block_and_a_missing_section_is_named(sections: dict[str, Any]):
    readme = report.README.read_text(encoding="utf-8")
    one, other = sections, {}
    for name, section in one.items():
        other[name] = section | {"environment": section["environment"] | {"device": "Another"}}
    device = one["speed/integer"]["environment"]["device"]
    both = report.render(readme, [one, other])
    assert both.count(f"\n**{device}**\n") == both.count("\n**Another**\n") == 4
    alone = report.render(readme, [one, {}])
    assert "\n**" not in alone.partition("<!-- bench report: speed")[2].partition("<!-- /")[0]
    assert report.render(both, [one]) == alone
    with pytest.raises(ValueError, match=r"accuracy/integer.*python -m bench accuracy"):
        report.render(readme, [{"speed/integer": one["speed/integer"]}])


def test_the_figures_of_accuracy_draw_every_contender(sections: dict[str, Any]):
    section = sections["accuracy/integer"]
    names: dict[Dtype, list[str]] = {dtype: [] for dtype in Dtype}
    for one in section["series"]:
        if one["offset"] == 0:
            names[Dtype(one["dtype"])].append(one["name"])
    for figure in (accuracy.figure(section), accuracy.figure_of_offsets(section)):
        assert [axes.get_title(loc="left") for axes in figure.axes[:3]] == [
            f"{dtype} logits" for dtype in Dtype
        ]
        for axes, dtype in zip(figure.axes, [*Dtype] * 2, strict=True):
            lines = {line.get_label(): line for line in axes.lines}
            for name in names[dtype]:
                assert lines.pop(name).get_color() == figures.STYLES[name]["color"]
            assert len(lines) == 1  # 100 %
    by_lead, by_offset = accuracy.figure(section), accuracy.figure_of_offsets(section)
    (optax,) = (line for line in by_lead.axes[0].lines if line.get_label() == "optax")
    np.testing.assert_array_equal(optax.get_xdata(), [1, 30])
    assert np.max(optax.get_ydata()) == 1
    assert "below float16's" in by_lead.axes[5].texts[0].get_text()
    assert "numbers\nare 64\napart" in by_offset.axes[1].texts[0].get_text()


def test_an_exact_zero_is_drawn_and_the_step_of_a_zero_loss_is_marked():
    numbers = {
        "loss": [1.0, 1e-6, 0.0],
        "exact_loss": [1.0, 1e-6, 1e-9],
        "gradient_norm": [1.0, 1e-6, 1e-9],
        "exact_gradient_norm": [1.0, 1e-6, 2e-9],
        "gradient_error": [0.0, 1e-3, 0.5],
        "accuracy": [0.1, 1.0, 1.0],
        "smallest_lead": [-1.0, 5.0, 20.0],
    }
    section = {
        "environment": environment.describe(),
        "steps": [0, 100, 1000],
        "runs": [{"name": "optax", "loss_zero": 123, "gradient_zero": -1} | numbers],
    }
    loss, norm, error = overtraining.figure(section).axes
    for axes in (loss, error):
        assert np.min(axes.lines[0].get_ydata()) == overtraining.LEAST
    assert loss.yaxis.get_major_formatter()(overtraining.LEAST, 0) == "0"
    assert "optax: exactly 0,\nfirst at step 123" in [text.get_text() for text in loss.texts]
    assert not any("exactly 0" in text.get_text() for text in norm.texts)
    np.testing.assert_array_equal(norm.lines[-1].get_xdata(), 100)  # every example is right


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<!-- bench report: x -->",
        "<!-- /bench report: x --><!-- bench report: x -->",
        "<!-- bench report: x --><!-- bench report: x --><!-- /bench report: x -->",
    ],
    ids=["none", "not closed", "wrong order", "twice"],
)
def test_markers_that_are_not_there_once_are_refused(text: str):
    with pytest.raises(ValueError, match="expected once each"):
        report.replace(text, "x", "content")
