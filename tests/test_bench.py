# SPDX-License-Identifier: Apache-2.0
"""The benchmark's commands run end to end on tiny shapes; its arithmetic is checked by hand."""

import functools
import inspect
import itertools
import json
import math
import platform
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
import typer
from typer.testing import CliRunner

from bench import (
    accuracy,
    accuracy_tables,
    calibration,
    cases,
    contenders,
    divergence_accuracy,
    environment,
    figures,
    memory,
    report,
    results,
    sharding,
    speed,
    speed_tables,
    summary,
    tables,
    targets,
    timing,
)
from bench.__main__ import COMMANDS, app
from bench.cases import (
    Case,
    Divergence,
    Dtype,
    Head,
    Labels,
    Logits,
    Mode,
    Op,
    Size,
    TwoHeads,
    TwoLogits,
    choose,
)
from bench.summary import Row
from bench.tables import Table

ROOT = Path(__file__).resolve().parent.parent
INTEGER, FLOAT32, BFLOAT16 = Labels.INTEGER, Dtype.FLOAT32, Dtype.BFLOAT16


@pytest.fixture(scope="module", autouse=True)
def little():
    """Measure on little: the tests run everything, and believe no time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cases, "MOST_COPIES", 16)
        patch.setattr(timing, "COPY_BYTES", {"cpu": 2**22})
        patch.setattr(timing, "WIDTHS", {"cpu": 64})
        yield


CONTENDERS = {"jaxsoftmax": (3, 2), "optax": (4, 8), "tokamax": (5, 0), "three products": (2, 8)}


def estimated(op: Op, case: Case) -> dict[str, Any]:
    """A section of speed --target: of each contender, Mcycles and MB."""
    rows = [
        {"name": name, "cycles": 1e6 * taken, "temp_bytes": 1e6 * memory, "notes": []}
        for name, (taken, memory) in CONTENDERS.items()
    ]
    every = itertools.product(("v5e", "v6e"), targets.MODES)
    of_case = {**case._asdict(), "shape": case.shape, "at_peak": 1e6, "contenders": rows}
    found = [of_case | {"target": target, "mode": mode} for target, mode in every]
    return {"environment": environment.describe(runs=False), "op": op, "cases": found}


def calibrated() -> dict[str, Any]:
    """A section of speed --calibrate: of the program at place i, i + 1 Mcycles in 1 ms."""
    rows = [
        {"name": name, "cycles": 1e6 * taken, "ms": 1.0}
        for taken, name in enumerate(calibration.PROGRAMS, start=1)
    ]
    of_case = {**Head(4, 3, 5, BFLOAT16)._asdict(), "shape": "4x3x5", "contenders": rows}
    found = [of_case | {"target": target} for target in ("v5p", "v6e")]
    return {"environment": environment.describe(runs=False), "cases": found}


@pytest.fixture(scope="module")
def sections() -> dict[str, Any]:
    """Measure, on tiny shapes, what a results file of one device holds; and the estimates."""
    logits = [Logits(4, 8, FLOAT32), Logits(2, 5, FLOAT32), Logits(4, 8, BFLOAT16)]
    heads = [Head(8, 4, 16, FLOAT32), Head(4, 3, 5, BFLOAT16)]
    modes = [Mode.FORWARD, Mode.VALUE_AND_GRAD]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contenders, "HEAD", contenders.HEAD[:3] + contenders.HEAD[-1:])
        patch.setattr(contenders, "VARIANTS", contenders.VARIANTS[1:2])
        patch.setattr(contenders, "OPTIONS", ())
        ignored = speed.measure_ignored(heads[:1], [0.0, 0.5], repeats=2)
        timed = speed.measure(heads, modes, repeats=2)
        compiled = memory.measure(heads, [memory.HERE])
    everything = list(Dtype), INTEGER, [1.0, 30.0], [0.0, 1e4]
    divergences = divergence_accuracy.measure(list(Dtype), [1e-7, 0.1], tokens=2, classes=5)
    return {
        key: section | {"command": f"python -m bench {command}"}
        for key, command, section in (
            ("speed/integer", "speed", speed.measure(logits, modes, repeats=2)),
            ("accuracy/integer", "accuracy", accuracy.measure(*everything, tokens=1, classes=5)),
            (report.OF_DIVERGENCES, "accuracy --op divergence", divergences),
            ("speed/linear", "speed --op linear", timed),
            ("memory", "memory", compiled),
            (report.SPEED_OF_IGNORED, report.SPEED_OF_IGNORED, ignored),
            (report.SPEED_BY_MODEL, report.SPEED_BY_MODEL, timed),
            (report.MEMORY_BY_MODEL, report.MEMORY_BY_MODEL, compiled),
            ("cycles/linear", report.HEADS_ON_TPUS, estimated(Op.LINEAR, heads[1])),
            ("cycles/logits", report.ON_TPUS, estimated(Op.LOGITS, logits[2])),
            (calibration.KEY, "speed --calibrate", calibrated()),
        )
    }


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Callable[..., Any]:
    """Run a command in a folder of its own, as if the packages `without` were not installed."""
    monkeypatch.chdir(tmp_path)

    def invoke(command: str, *, without: Any = (), columns: Any = 200, code: int = 0) -> Any:
        for name in [name for name in vars(contenders) if name.startswith("with_")]:
            monkeypatch.delattr(contenders, name)  # to be imported again
            monkeypatch.delitem(sys.modules, f"bench.contenders.{name}")
        for package in without:
            monkeypatch.setitem(sys.modules, package, None)
        width = {"COLUMNS": columns and f"{columns}"}
        done = CliRunner().invoke(app, shlex.split(command), env=width, catch_exceptions=False)
        assert done.exit_code == code, done.output
        return done

    return invoke


def as_a_process(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The program as a user starts it, in a folder of its own."""
    place = programs.environment() | {"PYTHONPATH": f"{ROOT}"}
    return programs.run(sys.executable, "-m", "bench", *command.split(), cwd=folder, env=place)


def sections_in(folder: Path) -> dict[str, Any]:
    return results.load(results.destination(folder))


def f64(array: Any) -> np.ndarray:
    return np.asarray(array, np.float64)


def names_of(case: dict[str, Any]) -> list[str]:
    return [row["name"] for row in case["contenders"]]


# The commands.


def test_speed_writes_every_case_and_prints_every_contender(bench, tmp_path):
    chosen = (
        "--tokens 8 --vocab 16 --vocab 33 --dtype bfloat16 "
        "--mode forward --mode training-step --repeats 3"
    )
    done = bench(f"speed {chosen} --device cpu --output deep/results")
    found = sections_in(tmp_path / "deep" / "results")
    (section,) = found.values()
    assert list(found) == [f"speed {chosen}"]
    assert section["command"] == f"python -m bench speed {chosen}"
    assert [line for line in section["left_out"] if "torch" not in line] == []
    rates = section["roofs"]["bytes_per_s"], *section["roofs"]["flops_per_s"].values()
    assert set(section["roofs"]["flops_per_s"]) == {"bfloat16"}
    assert min(rates) > 1e8
    assert section["environment"]["versions"]["jax"] == jax.__version__
    assert {"device", "platform", "cpus", "python", "commit", "date"} < set(section["environment"])

    assert [
        (case["tokens"], case["classes"], case["dtype"], case["mode"]) for case in section["cases"]
    ] == [*itertools.product([8], [16, 33], ["bfloat16"], ["forward", "training-step"])]
    of_shapes: dict[tuple[str, ...], dict[str, float]] = {}
    for case in section["cases"]:
        assert [name for name in names_of(case) if "torch" not in name] == [
            *("jaxsoftmax", "optax", "optax, no upcast", "jax.nn")
        ]
        passes = 1 if case["mode"] == "forward" else 3
        assert case["bytes"] == passes * 2 * case["tokens"] * case["classes"]
        ours = case["contenders"][0]["median_s"]
        for row in case["contenders"]:
            assert 0 < row["q1_s"] <= row["median_s"] <= row["q3_s"]
            assert ("torch" in row["name"]) == (row["compile_s"] is None)
            assert row["ratio"] == pytest.approx(ours / row["median_s"])
            least = case["bytes"] / section["roofs"]["bytes_per_s"]
            assert row["of_roof"] == pytest.approx(least / row["median_s"])
            key = case["dtype"], case["mode"], row["name"]
            of_shapes.setdefault(key, {})[case["shape"]] = row["ratio"]

    for mean in section["geometric_means"]:
        by_shape = of_shapes[mean["dtype"], mean["mode"], mean["contender"]]
        assert set(by_shape) == {"8x16", "8x33"}
        assert mean["ratio"] == pytest.approx(math.sqrt(math.prod(by_shape.values())))
        assert (mean["best"], mean["worst"]) == (min(by_shape.values()), max(by_shape.values()))
        assert by_shape[mean["worst_shape"]] == mean["worst"]

    for words in (
        *("forward, bfloat16", "training-step, bfloat16", "optax, no upcast", "8x16", "of roof"),
        *("Of the roof: ", "GB/s: what must be done", "temp MB: ", "geometric mean"),
    ):
        assert words in done.stdout


def test_accuracy_prints_every_lead_and_keeps_other_sections(bench, tmp_path):
    path = results.destination(tmp_path / results.DEFAULT)
    path.write_text('{"speed/integer": {"kept": true}}')
    chosen = "--tokens 2 --vocab 20 --dtype float32 --lead 1 --lead 30 --offset 100"
    done = bench(f"accuracy {chosen}", columns=None)
    assert 80 < max(map(len, done.stdout.splitlines())) <= tables.WIDTH

    found = sections_in(tmp_path / results.DEFAULT)
    assert found["speed/integer"] == {"kept": True}
    section = found[f"accuracy {chosen}"]
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

    assert section["command"] == f"python -m bench accuracy {chosen}"
    for words in ("lead 1 ", " 30 ", "loss", "gradient, target", "gradient, others", "100 %"):
        assert words in done.stdout
    section["series"] = [one | {"offset": 0.0} for one in section["series"]]
    (short,) = accuracy_tables.in_readme(section)
    table, *_, last = accuracy_tables.in_docs(section)
    assert short.headings == table.headings == ["relative error of", "by", "lead 1", "30"]
    assert len(table.rows) == 3 * len(section["series"])
    assert short.rows == [row for row in table.rows if row[1] != "torch"][:6]
    assert short.notes[0].endswith(f"{', '.join(environment.briefly(section['environment']))}.")
    origin = last.notes[-1]
    assert origin.startswith(f"Measured by `{section['command']}` on ")
    for version in ("jaxsoftmax", "jax", "optax"):
        assert f"{version} {section['environment']['versions'][version]}" in origin
    assert section["environment"]["date"] in origin


@pytest.mark.parametrize(
    ("arguments", "more"),
    [
        ("speed --tokens 8 --vocab 16 --repeats 1 --mode forward", ["torch, compiled"]),
        ("accuracy --lead 1 --vocab 5 --tokens 1 --dtype bfloat16", []),
    ],
    ids=["speed", "accuracy"],
)
def test_a_missing_peer_is_left_out_with_a_line(bench, arguments, more, tmp_path):
    done = bench(arguments, without=["optax", "torch"], columns=60)
    assert max(map(len, done.stdout.splitlines())) <= 60
    assert "…" not in done.stdout
    lines = [line for line in done.stderr.splitlines() if line.startswith("left out: ")]
    assert sorted(line.partition(" (")[0] for line in lines) == [
        f"left out: {peer}" for peer in ("optax", "optax, no upcast", "torch", *more)
    ]
    (section,) = sections_in(tmp_path / results.DEFAULT).values()
    assert section["left_out"] == lines
    rows = section.get("series") or [row for case in section["cases"] for row in case["contenders"]]
    assert {row["name"] for row in rows} == {"jaxsoftmax", "jax.nn"}
    assert "jax.nn" in done.stdout


def test_our_own_import_errors_are_not_swallowed(monkeypatch):
    monkeypatch.delitem(sys.modules, "bench.contenders.ours", raising=False)
    monkeypatch.setitem(sys.modules, "jaxsoftmax", None)
    with pytest.raises(ModuleNotFoundError, match="jaxsoftmax"):
        contenders.load(contenders.LOGITS[INTEGER], FLOAT32)


class BrokenError(Exception):
    pass


def broken(*arguments: Any) -> jax.Array:
    raise BrokenError("not today\nnor tomorrow")


def measured_by_speed() -> tuple[list[str], list[str]]:
    section = speed.measure([Head(4, 3, 5, FLOAT32)], [Mode.FORWARD], repeats=1)
    return names_of(section["cases"][0]), section["left_out"]


def measured_by_accuracy() -> tuple[list[str], list[str]]:
    section = accuracy.measure([BFLOAT16], INTEGER, [1.0], [0.0], tokens=1, classes=5)
    return [one["name"] for one in section["series"]], section["left_out"]


def test_the_calibration_needs_tokamax(bench):
    assert "tokamax" in bench("speed --calibrate", without=["tokamax"], code=2).output


def test_a_peer_that_fails_is_left_out_but_ours_must_not(monkeypatch):
    for measured, theirs, ours, first, line in (
        (
            *(measured_by_speed, "with_optax.head", "head_recompute"),
            ["jaxsoftmax", "jaxsoftmax, recompute"],
            "4x3x5 float32 forward: optax fails: BrokenError: not today",
        ),
        (
            *(measured_by_accuracy, "with_jax_nn.integer_labels", "integer_labels"),
            ["jaxsoftmax", "optax", "optax, no upcast"],
            "bfloat16: jax.nn fails: BrokenError: not today",
        ),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(f"bench.contenders.{theirs}", broken)
            names, left_out = measured()
            assert names[: len(first)] == first
            assert not [name for name in names if f" {name} fails" in line]
            assert line in left_out
            patch.setattr(f"bench.contenders.ours.{ours}", broken)
            with pytest.raises(BrokenError):
                measured()


def test_a_peer_that_takes_too_long_is_left_out(monkeypatch):
    monkeypatch.setattr(speed, "PATIENCE_S", 0.0)
    names, _ = measured_by_speed()
    ours = ("", ", recompute", ", three options", ", several labels", ", top-k", ", sample")
    assert names == [f"jaxsoftmax{which}" for which in ours]


def test_a_profile_has_a_folder_a_case_and_contender(tmp_path, monkeypatch):
    monkeypatch.setitem(contenders.LOGITS, INTEGER, contenders.LOGITS[INTEGER][:2])
    case = Logits(8, 16, FLOAT32)
    speed.measure([case], [Mode.TRAINING_STEP], repeats=1, profile=tmp_path)
    assert {
        path.relative_to(tmp_path).parts[:2]
        for path in tmp_path.glob("*/*/plugins/profile/*/*.xplane.pb")
    } == {("8x16-float32-training-step", name) for name in ("jaxsoftmax", "optax")}


def test_heads_over_a_mesh_of_this_machine(monkeypatch):
    three = {name: sharding.LAYOUTS[name] for name in ("data", "vocabulary", "FSDP, vocabulary")}
    monkeypatch.setattr(sharding, "LAYOUTS", three)
    case = Head(512, 64, 4096, FLOAT32)
    devices = sharding.parse("here/data=4,vocab=2")
    assert str(devices) == "here/data=4,vocab=2"
    rows = sharding.measure(case, devices)["rows"]
    found = {(row["layout"], row["gradients"]): row for row in rows}
    assert len(found) == 2 * len(three)
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


on_linux = pytest.mark.skipif(not (memory.PROCESS / "clear_refs").exists(), reason="needs Linux")


@on_linux
def test_peak_memory_is_that_of_a_run_in_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(contenders, "HEAD", contenders.HEAD[1:3])
    case = Head(512, 16, 32768, FLOAT32)
    section: dict[str, Any] = memory.measure_peaks([case]) | {
        "command": "python -m bench memory --peak"
    }
    assert section["left_out"] == []
    ours, optax = section["cases"][0]["contenders"]
    assert (ours["name"], optax["name"]) == ("jaxsoftmax, recompute", "optax")
    logits = 4 * case.tokens * case.classes
    assert logits <= optax["bytes"] <= 3 * logits
    assert ours["bytes"] < optax["bytes"] / 2
    (table,) = memory.peaks_in_docs(section)
    tables.show(table)
    assert table.rows[1] == ["optax", f"{optax['bytes'] / 1e6:.0f}"]


@on_linux
def test_peak_memory_counts_what_is_given_back(monkeypatch):
    size = 2**27

    def program(*_: object) -> int:
        return np.ones(size, np.uint8)[-1]

    monkeypatch.setattr(contenders, "program", lambda *_: program)
    monkeypatch.setattr(timing, "compile_ahead", lambda program, _: (program, 0.0))
    rise = memory.rise(Head(2, 2, 2, FLOAT32), "optax")
    assert rise == pytest.approx(size, rel=0.1)  # Linux counts pages in batches


# What a command line asks for, and where it goes.

WRONG = {
    "speed --hidden 8 --vocab 9": "logits have no width",
    "speed --tokens 8": "expected --vocab or --model",
    "memory --vocab 9": "expected --hidden with --vocab",
    "speed --model gpt-9": "expected llama-2, gpt-2, .*, all; got 'gpt-9'",
    "speed --size huge": "'huge' is not one of 'fast', 'regular', 'large'",
    "accuracy --op linear": "expected logits or divergence",
    "accuracy --op divergence --lead 1": "expected --delta with --op divergence",
    "accuracy --op divergence --labels dense": "expected --delta with --op divergence",
    "accuracy --delta 1": "expected --op divergence with it",
    "speed --op linear --labels dense": "takes integer labels",
    "speed --op divergence --labels dense": "takes no labels",
    "speed --op divergence --confident": "expected logits and integer labels with it",
    "speed --op divergence --mode training-step": "expected forward, value-and-grad, value-and-bo",
    "speed --mode value-and-both-grads": "expected forward, value-and-grad, training-step",
    "speed --op divergence --hidden 8 --vocab 9": "logits have no width",
    "speed --op linear-divergence --vocab 9": "expected --hidden with --vocab",
    "speed --op linear-divergence --ignored 0.5": "expected --op linear with it",
    "speed --op linear --confident": "expected logits and integer labels with it",
    "speed --ignored 0.5": "expected --op linear with it",
    "speed --op linear --ignored 1.5": "'--ignored': .*(0<=x<=1|less than or equal to 1)",
    "speed --op linear --ignored 0.5 --mode forward": "is measured with --ignored, and",
    "speed --op linear --ignored 0.5 --target v5e --detail": "is measured with --ignored, and",
    "speed --op linear --ignored 0.5 --target v5e --repeats 3": "nothing is run with --target",
    "speed --op linear --ignored 0.5 --profile x": "is measured with --ignored, and nothing",
    "speed --op linear --ignored 0.5 --detail": "expected --target with it",
    "speed --calibrate --ignored 0.5": "expected no more than --target",
    "speed --target v9": "expected v5e, v5p, v6e, tpu7x; got 'v9'",
    "speed --target v5e --labels dense": "expected integer labels",
    "speed --target v5e --repeats 3": "nothing is run with --target",
    "speed --detail": "expected --target with it",
    "speed --calibrate --op linear": "expected no more than --target",
    "speed --calibrate --target v5e": "expected v5p, v6e, tpu7x; got 'v5e'",
    "speed --target v5e --mode training-step": "expected integer labels, forward or value-and-grad",
    "memory --target v9": "expected here, v5e, v5p, v6e; got 'v9'",
    "memory --peak --target here": "expected one of them",
    "memory --mesh here/data=1,vocab=1 --model all": "expected one head; got 14",
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.items(), ids=WRONG)
def test_wrong_options_are_named(bench, arguments, message):
    done = bench(arguments, code=2)
    assert re.search(message, " ".join(done.output.replace("│", " ").split())), done.output


def test_a_device_that_is_not_there_is_named(tmp_path):
    done = as_a_process("speed --device gpu --tokens 8 --vocab 9 --repeats 1", tmp_path)
    if done.returncode == 0:
        pytest.skip("it is there")
    assert done.returncode == 2
    assert "Invalid value for --device: JAX finds no gpu." in done.stderr


def test_options_are_combined():
    half = Dtype.FLOAT16
    given = {"tokens": [8, 9], "vocab": [5], "models": ["gpt-2"], "hidden": [4], "dtypes": [half]}
    assert choose(cases.HEADS, **given) == [Head(n, 4, v, half) for n in (8, 9) for v in (50257, 5)]
    by_size = choose(cases.HEADS, models=["gpt-2"], size=Size.FAST)
    assert by_size == [Head(256, 768, 50257, dtype) for dtype in cases.DTYPES]
    both = choose(cases.DIVERGENCES, tokens=[8], vocab=[5], dtypes=[half])
    assert both == [TwoLogits(8, 5, half, divergence) for divergence in Divergence]
    by_model = choose(speed.logits(Labels.DENSE), tokens=[3], models=["all"], dtypes=[half])
    every = 32000, 50257, 128256, 151936, 201088, 256000, 262144
    assert by_model == [Logits(3, v, half, Labels.DENSE) for v in every]


def test_without_options_the_default_cases_scale_with_the_size():
    assert choose(cases.HEADS) == list(cases.HEADS)
    large = choose(cases.HEADS, size=Size.LARGE)
    assert large == [case._replace(tokens=4 * case.tokens) for case in cases.HEADS]
    half = choose(speed.logits(INTEGER), dtypes=[Dtype.FLOAT16])
    assert half == [Logits(*shape, Dtype.FLOAT16) for shape in cases.SHAPES]


@pytest.mark.parametrize("content", ["not json", "[1]"])
def test_a_file_of_something_else_is_refused_before_measuring(tmp_path, content):
    path = results.destination(tmp_path)
    assert path == tmp_path / f"{environment.slug(environment.device_name())}.json"
    path.write_text(content)
    with pytest.raises(typer.BadParameter, match=re.escape(path.name)):
        results.destination(tmp_path)
    assert path.read_text() == content
    with pytest.raises(typer.BadParameter, match=re.escape(path.name)):
        results.destination(path)


def test_nothing_that_is_tracked_is_written_unless_asked():
    """Of every command that measures: all have the option, and one default, which git ignores."""
    commands = {name: command for name, command in COMMANDS.items() if name != "report"}
    assert len(commands) == 3
    for command in commands.values():
        parameters = inspect.signature(command).parameters
        assert parameters["output"].default == results.DEFAULT
    ignored = (ROOT / ".gitignore").read_text().splitlines()
    assert f"{results.DEFAULT.parts[0]}/" in ignored
    assert not results.DEFAULT.is_absolute()


def test_rows_that_a_run_removes_are_said(sections, tmp_path, capsys):
    """Of sections of every kind: without a contender, without a case, and with both again."""
    for key, section in (report.committed()[0] | sections).items():
        everything = [*results.rows(section)]
        assert len({*everything}) == len(everything) > 0, key
    for key, section in sections.items():
        path = tmp_path / f"{environment.slug(key)}.json"
        results.keep(path, section, key)
        assert "removed" not in capsys.readouterr().err
        fewer = json.loads(json.dumps(section))
        rows = fewer.get("series") or fewer["cases"][0]["contenders"]
        gone = rows.pop()["name"]
        results.keep(path, fewer, key)
        assert f"did not measure: 1 of {gone} (of " in " ".join(capsys.readouterr().err.split())
        results.keep(path, section, key)
        assert "removed" not in capsys.readouterr().err
        if "cases" in section:
            results.keep(path, section | {"cases": section["cases"][1:]}, key)
            line = " ".join(capsys.readouterr().err.split())
            for row in section["cases"][0]["contenders"]:
                assert f"1 of {row['name']}" in line


# What is measured, and how.


def assert_all_agree(
    case: Case, entries: Sequence[contenders.Entry], mode: Mode, rtol: float, atol: float
) -> list[str]:
    """Every contender's results are those of the first; who is left out."""
    found, left_out = contenders.load(entries, case.dtype)
    expected: list[Any] = []
    for one in found:
        got = contenders.program(one, mode, case.parameters)(*case.inputs()[0])
        leaves = jax.tree.leaves(got)
        expected = expected or leaves
        for mine, theirs in zip(expected, leaves, strict=True):
            np.testing.assert_allclose(f64(theirs), f64(mine), rtol, atol, err_msg=one.name)
    return left_out


@pytest.mark.parametrize("labels", Labels)
# Two contenders accumulate in bfloat16, so agreement there is coarse.
@pytest.mark.parametrize(
    ("dtype", "rtol", "atol"), [(FLOAT32, 1e-5, 1e-7), (BFLOAT16, 0.05, 1e-3)], ids=cases.DTYPES
)
@pytest.mark.parametrize("mode", Op.LOGITS.modes)
def test_contenders_compute_the_same(labels, dtype, rtol, atol, mode):
    case = Logits(6, 37, dtype, labels)
    assert assert_all_agree(case, contenders.LOGITS[labels], mode, rtol, atol) == []


def test_the_heads_of_all_contenders_agree():
    by_jax = [entry for entry in contenders.HEAD if entry.jax and not entry.whole]
    optax_first = sorted(by_jax, key=lambda entry: entry.name != "optax")
    assert_all_agree(Head(6, 5, 37, FLOAT32), optax_first, Mode.VALUE_AND_GRAD, 2e-4, 1e-6)


@pytest.mark.parametrize("divergence", Divergence)
@pytest.mark.parametrize("mode", Op.LINEAR_DIVERGENCE.modes)
def test_divergences_of_all_contenders_agree(divergence, mode):
    """Value and gradients, of logits and of heads, where δ is of size 1."""
    logits, heads = (
        TwoLogits(6, 37, FLOAT32, divergence),
        TwoHeads(6, 5, 37, FLOAT32, divergence),
    )
    of_logits = contenders.DIVERGENCES[divergence] + contenders.TORCH_DIVERGENCES[divergence]
    for case, entries in ((logits, of_logits), (heads, contenders.HEAD_DIVERGENCES[divergence])):
        left_out = assert_all_agree(case, entries, mode, 2e-4, 1e-6)
        assert not [line for line in left_out if "torch" not in line]
        one = contenders.load(entries[:1], FLOAT32)[0][0]
        got = contenders.program(one, mode, case.parameters)(*case.inputs()[0])
        differentiated = {Mode.FORWARD: 0, Mode.BOTH_GRADS: 2}.get(mode, 1) * case.parameters
        assert len(jax.tree.leaves(got)) == 1 + differentiated


@pytest.mark.parametrize(
    ("op", "shape"),
    [("divergence", ""), ("linear-divergence", " --hidden 3")],
    ids=["logits", "heads"],
)
def test_divergences_are_timed_in_every_mode(bench, tmp_path, op, shape):
    """Both of them, and where they are laid out."""
    chosen = f"--op {op} --tokens 4{shape} --vocab 9 --dtype float32 --repeats 1"
    done = bench(f"speed {chosen}", without=["torch"])
    ((key, section),) = sections_in(tmp_path / results.DEFAULT).items()
    assert (key, section["op"]) == (f"speed {chosen}", op)
    size = "4x3x9" if shape else "4x9"
    found = [(case["shape"], case["divergence"], case["mode"]) for case in section["cases"]]
    modes = "forward", "value-and-grad", "value-and-both-grads"
    assert found == [(f"{size} {d.upper()}", d, mode) for d in ("kl", "js") for mode in modes]
    for case in section["cases"]:
        assert names_of(case)[:2] == ["jaxsoftmax", "optax"]
        assert case["bytes"] > 0
    assert "divergence of " in done.stdout
    (table,) = speed_tables.of_divergences(section)
    assert table.headings[2:] == [f"{mode}, ms" for mode in modes]
    first = {row["name"]: row for row in section["cases"][0]["contenders"]}
    ours, optax = first["jaxsoftmax"], first["optax"]
    assert table.rows[0][:2] == [f"{size} KL float32", "jaxsoftmax"]
    assert f", {ours['median_s'] / optax['median_s']:.2f}" in table.rows[0][2]
    assert ", 1.00" in table.rows[1][2]
    means = {
        (one["mode"], one["contender"], one["divergence"]): one["ratio"]
        for one in section["geometric_means"]
    }
    assert means["forward", "optax", "kl"] == pytest.approx(ours["median_s"] / optax["median_s"])


def test_the_heads_that_ignore_tokens_compute_what_the_others_compute():
    """All of them value and gradients of optax's head over the tokens that are left."""
    hidden, kernel, labels = Head(6, 5, 37, FLOAT32).inputs()[0]
    labels = cases.with_ignored(labels, 0.5)
    left = np.flatnonzero(labels != cases.IGNORED)
    assert len(left) == 3
    plain, *_ = contenders.load(contenders.HEAD[2:3], FLOAT32)[0]
    of_left = contenders.program(plain, Mode.VALUE_AND_GRAD, 2)
    loss, (d_hidden, d_kernel) = of_left(hidden[left], kernel, labels[left])
    d_hidden = jnp.zeros_like(hidden).at[left].set(d_hidden)
    entries = contenders.IGNORING + contenders.IGNORING_VARIANTS
    for one in contenders.load(entries, FLOAT32)[0]:
        got = contenders.program(one, Mode.VALUE_AND_GRAD, 2)(hidden, kernel, labels)
        for mine, theirs in zip(jax.tree.leaves(got), (loss, d_hidden, d_kernel), strict=True):
            np.testing.assert_allclose(f64(mine), f64(theirs), 2e-4, 1e-6, err_msg=one.name)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own, as it compiles
@pytest.mark.parametrize("mode", Op.LOGITS.modes)
def test_torch_computes_the_same(mode):
    pytest.importorskip("torch")
    heads = tuple(entry for entry in contenders.HEAD if not entry.jax)
    logits, of_torch = contenders.LOGITS, contenders.TORCH_LOGITS
    for case, entries in (
        (Logits(6, 37, FLOAT32), logits[INTEGER][:1] + of_torch[INTEGER]),
        (
            Logits(6, 37, FLOAT32, Labels.DENSE),
            logits[Labels.DENSE][:1] + of_torch[Labels.DENSE][:1],
        ),
        (Head(6, 5, 37, FLOAT32), contenders.HEAD[:1] + heads),
    ):
        assert assert_all_agree(case, entries, mode, 2e-4, 1e-6) == []


def test_small_inputs_rotate_and_dense_labels_are_distributions():
    pairs = Logits(64, 100, BFLOAT16, Labels.DENSE).inputs()
    assert len(pairs) == cases.MOST_COPIES
    assert not jnp.array_equal(pairs[0][0], pairs[1][0])
    logits, labels = pairs[-1]
    assert logits.dtype == labels.dtype == jnp.bfloat16
    np.testing.assert_allclose(f64(labels).sum(-1), 1, rtol=0.01)


def test_the_labels_of_confident_logits_lead_in_a_third_of_the_rows():
    logits, labels = Logits(300, 50, FLOAT32, confident=True).inputs()[0]
    share = f64(jax.nn.softmax(logits))[np.arange(300), labels]
    assert (share[::3] > 0.999).all()
    assert np.delete(share, np.s_[::3]).max() < 0.5


def test_what_counts_as_bytes_and_operations():
    case, size = Logits(8, 16, BFLOAT16, Labels.DENSE), 8 * 16 * 2
    assert case.bytes(Mode.FORWARD) == 2 * size
    assert case.bytes(Mode.VALUE_AND_GRAD) == 5 * size
    head, forward = Head(8, 4, 16, FLOAT32), Mode.FORWARD
    assert head.flops(Mode.VALUE_AND_GRAD) == 3 * head.flops(forward) == 3 * 2 * 8 * 4 * 16
    assert head.bytes(Mode.VALUE_AND_GRAD) == 2 * head.bytes(forward) == 2 * 4 * 4 * (8 + 16)
    two = TwoLogits(8, 16, BFLOAT16, Divergence.KL)
    modes = Op.DIVERGENCE.modes
    assert [two.bytes(mode) // size for mode in modes] == [2, 5, 6]
    heads = TwoHeads(8, 4, 16, FLOAT32, Divergence.JS)
    assert [heads.flops(mode) // head.flops(forward) for mode in modes] == [2, 4, 6]
    assert [heads.bytes(mode) // head.bytes(forward) for mode in modes] == [2, 3, 4]


def test_every_call_runs_twice_a_round_in_changing_order_on_fresh_inputs():
    calls = []
    named = {
        name: lambda argument, name=name: calls.append((name, argument)) for name in ("a", "b", "c")
    }
    call = timing.caller([(0,), (1,), (2,), (3,)])
    taken = timing.interleave(named, call, rounds=20)
    assert [argument for _, argument in calls] == [i % 4 for i in range(len(calls))]
    measured = [name for name, _ in calls[3 * timing.WARM_UP_ROUNDS :]]
    assert measured[::2] == measured[1::2]  # after itself, so no neighbour has an influence
    rounds = [tuple(measured[i : i + 6 : 2]) for i in range(0, len(measured), 6)]
    assert len(rounds) == 20
    assert all(sorted(order) == ["a", "b", "c"] for order in rounds)
    assert len(set(rounds)) > 1
    assert list(taken) == ["a", "b", "c"]


def test_a_round_budget_in_seconds_has_a_floor_and_a_ceiling():
    for seconds, rounds in ((0.0, timing.FEWEST_ROUNDS), (60.0, timing.MOST_ROUNDS)):
        calls = []
        timing.interleave({"a": calls.append}, timing.caller([(0,)]), seconds=seconds)
        assert len(calls) == timing.WARM_UP_ROUNDS + 2 * rounds


def test_a_training_step_descends_and_writes_where_it_read():
    case = Head(6, 5, 16, FLOAT32)
    rotation = case.inputs()[:2]
    hidden, kernel, labels = rotation[0]
    found, _ = contenders.load(contenders.HEAD[:2], FLOAT32)
    gradients = contenders.program(found[0], Mode.VALUE_AND_GRAD, 2)(hidden, kernel, labels)[1]
    expected = [
        np.asarray(array - cases.LEARNING_RATE * gradient)
        for array, gradient in zip((hidden, kernel), gradients, strict=True)
    ]
    steps: dict[str, Any] = {
        contender.name: timing.compile_ahead(
            contenders.program(contender, Mode.TRAINING_STEP, 2), rotation[0], donated=2
        )[0]
        for contender in found
    }
    call = timing.caller(rotation, donated=2)
    call(steps["jaxsoftmax"])
    for new, right in zip(rotation[0], expected, strict=False):
        np.testing.assert_allclose(new, right, rtol=1e-6)
    assert hidden.is_deleted()
    assert kernel.is_deleted()
    assert rotation[0][2] is labels
    timing.interleave(steps, call, rounds=2)  # each goes on from what the other left
    after = gradients[0], *rotation[0]
    assert not any(array.is_deleted() for array in after)
    for step in steps.values():
        assert step.memory_analysis().alias_size_in_bytes >= 4 * 5 * (6 + 16)


def test_a_training_step_keeps_the_dtype_of_its_parameters():
    """Where a head hands out float32 gradients of bfloat16, the next one gets bfloat16 again."""

    def head(hidden, kernel, labels) -> Any:
        wide = hidden.astype(jnp.float32), kernel.astype(jnp.float32)
        return jnp.sum(wide[0]) + jnp.sum(labels.astype(jnp.float32)), wide

    case = Head(6, 5, 16, BFLOAT16)
    step = cases.program(head, Mode.TRAINING_STEP, 2, whole=True)
    before = case.inputs()[0]
    after = step(*before)[1]
    assert [a.dtype for a in after] == [a.dtype for a in before[:2]]
    for new, old in zip(after, before, strict=False):
        expected = (1 - cases.LEARNING_RATE) * np.asarray(old, np.float64)
        np.testing.assert_allclose(np.asarray(new, np.float64), expected, rtol=2**-7)


def test_the_roof_is_the_nearer_of_two():
    found = {"bytes_per_s": 10.0, "flops_per_s": {"float32": 100.0}}
    assert timing.least_seconds(found, "float32", nbytes=20, flops=100) == 2
    assert timing.least_seconds(found, "float32", nbytes=20, flops=300) == 3
    assert "0.0 GB/s" in timing.roofs_in_words(found)


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
    found = accuracy.relative_errors(computed, truth, targets, FLOAT32)
    assert found["loss"] == pytest.approx({"max": 0.25, "median": 0.1})
    # No float32 is near 1e-50: nobody's error.
    assert found["target"] == pytest.approx({"max": 0.2, "median": 0.1})
    assert found["others"] == pytest.approx({"max": 0.2, "median": 0.1})
    second, true = ((losses[1:2], gradients[1:2]) for losses, gradients in (computed, truth))
    alone = accuracy.relative_errors(second, true, targets[1:2], FLOAT32)
    assert alone["loss"] == pytest.approx({"max": 0.25, "median": 0.25})
    assert alone["target"] is alone["others"] is None


@pytest.mark.parametrize("dtype", Dtype)
def test_the_target_leads_by_what_was_asked(dtype):
    logits, targets = accuracy.draw(dtype, 17.0, 0.0, 4, 50)
    assert logits.dtype == jnp.dtype(dtype)
    ordered = np.sort(f64(logits), axis=-1)
    rounding = 32 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(ordered[:, -1] - ordered[:, -2], 17, atol=rounding)
    assert (np.argmax(logits, axis=-1) == targets).all()
    same, _ = accuracy.draw(dtype, 3.0, 0.0, 4, 50)
    assert ((f64(same) != f64(logits)).sum(axis=-1) == 1).all()  # only the target is another


def test_an_offset_is_rounded_with_the_logits_and_the_truth_is_of_what_is_left():
    logits, targets = accuracy.draw(BFLOAT16, 5.0, 1e4, 4, 50)
    assert (f64(logits) == 9984).all()  # bfloat16 numbers are 64 apart there
    losses, gradients = accuracy.exact(logits, targets)
    np.testing.assert_allclose(losses, math.log(50), rtol=1e-14)
    np.testing.assert_allclose(gradients[np.arange(4), targets], -0.98, rtol=1e-14)


def test_torch_differentiates_each_loss_by_itself():
    pytest.importorskip("torch")
    logits, targets = accuracy.draw(FLOAT32, 1.0, 0.0, 3, 5)
    for labels in Labels:
        (contender,), _ = contenders.load(contenders.TORCH_LOGITS[labels][:1], FLOAT32)
        computed = accuracy.evaluate(contender, logits, targets, labels)
        for got, true in zip(computed, accuracy.exact(logits, targets), strict=True):
            np.testing.assert_allclose(got, true, rtol=1e-5)


def test_the_exact_divergences_are_exact_far_beyond_float64():
    """Of two classes: where KL is a²/2 and JS a²/8 to all digits of float64, and by hand."""
    a = 1e-7
    near = divergence_accuracy.exact(np.array([[a, -a]]), np.zeros((1, 2)))
    np.testing.assert_allclose(near["kl"], a**2 / 2, rtol=1e-13)
    np.testing.assert_allclose(near["js"], a**2 / 8, rtol=1e-13)
    np.testing.assert_allclose(near["by_logits"], [[a / 2, -a / 2]], rtol=1e-13)
    np.testing.assert_allclose(near["by_target"], [[-a / 2, a / 2]], rtol=1e-13)
    # p = (1/4, 3/4), q = (1/2, 1/2), by hand.
    far = divergence_accuracy.exact(np.zeros((1, 2)), np.array([[0.0, math.log(3)]]))
    kl = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    js = (0.25 * math.log(2 / 3) + 0.75 * math.log(1.2) + 0.5 * math.log(4 / 3 * 0.8)) / 2
    by_target = [0.25 * (math.log(0.5) - kl), 0.75 * (math.log(1.5) - kl)]
    np.testing.assert_allclose(far["kl"], kl, rtol=1e-14)
    np.testing.assert_allclose(far["js"], js, rtol=1e-14)
    np.testing.assert_allclose(far["by_logits"], [[0.25, -0.25]], rtol=1e-14)
    np.testing.assert_allclose(far["by_target"], [by_target], rtol=1e-14)


def test_errors_of_divergences_are_of_rows():
    reduce = divergence_accuracy.relative_errors
    true = np.array([2.0, 4.0, 1.0, 0.0])
    found = reduce(np.array([2.0, 5.0, -0.1, 7.0]), true, FLOAT32)
    assert found == pytest.approx({"max": 1.1, "median": 0.25, "negative": 1})
    true = np.array([[3.0, -4.0, 0.0], [0.0, 1e-50, 0.0]])  # no float32 is near 1e-50
    assert reduce(true + np.array([0.3, 0.4, 0.0]), true, FLOAT32) == pytest.approx(
        {"max": 0.1, "median": 0.1}
    )
    assert reduce(true, 1e-50 * true, FLOAT32) is None


@pytest.mark.parametrize("dtype", Dtype)
def test_the_logits_are_as_far_from_the_target_as_was_asked(dtype):
    logits, target = divergence_accuracy.draw(dtype, 0.5, 4, 500)
    assert logits.dtype == target.dtype == jnp.dtype(dtype)
    assert np.std(f64(logits) - f64(target)) == pytest.approx(0.5, rel=0.1)
    _, same = divergence_accuracy.draw(dtype, 1e-3, 4, 500)
    np.testing.assert_array_equal(f64(same), f64(target))


@pytest.mark.parametrize("divergence", Divergence)
@pytest.mark.parametrize("dtype", Dtype)
def test_divergences_of_all_contenders_agree_where_they_are_far_from_0(divergence, dtype):
    """To what each computes in: some in the dtype of the logits."""
    entries = contenders.DIVERGENCES[divergence] + contenders.TORCH_DIVERGENCES[divergence]
    found, left_out = contenders.load(entries, dtype)
    assert not [line for line in left_out if "torch" not in line]
    pair = divergence_accuracy.draw(dtype, 2.0, 3, 50)
    truth = divergence_accuracy.exact(*pair)
    for one in found:
        for quantity, computed in divergence_accuracy.evaluate(divergence, one, *pair).items():
            error = divergence_accuracy.relative_errors(computed, truth[quantity], dtype)
            assert error
            assert error["max"] < 32 * float(jnp.finfo(dtype).eps), (one.name, quantity)


# Tables.


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (speed_tables.milliseconds, 1.2344, "1230"),
        (speed_tables.milliseconds, 0.5, "500"),
        (speed_tables.milliseconds, 0.0999999, "100"),
        (speed_tables.milliseconds, 0.0123, "12.3"),
        (speed_tables.milliseconds, 4.2e-5, "0.042"),
        (accuracy_tables.percent, 0, "0"),
        (accuracy_tables.percent, 6e-8, "6e-8"),
        (accuracy_tables.percent, 0.048, "4.8 %"),
        (accuracy_tables.percent, 0.12, "12 %"),
        (accuracy_tables.percent, 1, "100 %"),
        (accuracy_tables.percent, 99, "9900 %"),
        (accuracy_tables.percent, 99.5, "1e2"),
        (timing.summarize, [5.0, 1.0, 2.0, 3.0, 4.0], (3.0, 2.0, 4.0)),
    ],
)
def test_numbers_are_written_short(write, value, text):
    assert write(value) == text


def test_a_table_is_one_for_a_terminal_and_for_a_document(capsys):
    table = Table(["of", "by", "s"], [["a", "x", "1"], ["", "y", "2"]], ["", "below"], "above")
    assert table.markdown().splitlines() == [
        *("| of | by | s |", "| --- | --- | --: |", "| a | x | 1 |", "|  | y | 2 |", "", "below")
    ]
    tables.show(table)
    printed = [line.split() for line in capsys.readouterr().out.splitlines()]
    words = [line for line in printed if line and "─" not in line[0]]
    assert words == [["above"], ["of", "by", "s"], ["a", "x", "1"], ["y", "2"], ["below"]]


def test_tables_print_again_from_a_file(capsys, monkeypatch):
    for case, words in (
        (Logits(4, 8, FLOAT32, Labels.DENSE), "dense labels"),
        (Logits(4, 8, FLOAT32, confident=True), "integer labels, confident"),
    ):
        monkeypatch.setitem(contenders.LOGITS, case.labels, contenders.LOGITS[case.labels][:1])
        section = speed.measure([case], [Mode.FORWARD], repeats=2) | {"command": "python -m bench"}
        again = json.loads(json.dumps(section))
        tables.show(*speed_tables.in_terminal(again))
        printed = " ".join(capsys.readouterr().out.split())
        assert f"forward, float32, {words} logits " in printed
        assert ("both twice" in printed) == (case.labels is Labels.DENSE)


LAYOUTS: dict[str, Callable[[dict[str, Any]], list[Table]]] = {
    report.OF_DIVERGENCES: divergence_accuracy.in_docs,
    "accuracy": accuracy_tables.in_terminal,
    report.SPEED_OF_IGNORED: speed_tables.ignored_in_docs,
    "speed": speed_tables.in_terminal,
    "memory/peak": memory.peaks_in_docs,
    "memory --mesh": sharding.in_docs,
    "memory": memory.in_docs,
}


@pytest.mark.parametrize(
    "columns", [80, 20, *(pytest.param(c, marks=pytest.mark.wide) for c in (200, 50))]
)
def test_tables_are_whole_at_any_width(columns, capsys, monkeypatch):
    """Those of the committed results: nothing is cut off, and at usual widths no number broken."""
    monkeypatch.setenv("COLUMNS", f"{columns}")
    for key, section in report.committed()[0].items():
        lay_out = next(lay_out for begin, lay_out in LAYOUTS.items() if key.startswith(begin))
        for table in lay_out(section):
            tables.show(table)
            printed = capsys.readouterr().out
            assert max(map(len, printed.splitlines())) <= columns
            assert "…" not in printed
            cells = itertools.chain(*(row[table.words :] for row in table.rows))
            numbers = [part for cell in cells for part in cell.split()]
            if columns < 50:
                numbers, printed = "".join(numbers), " ".join(printed)
            assert Counter(numbers) <= Counter(printed.split()), table.title


def test_the_speed_table_holds_every_ratio(sections):
    """Those of the contenders that JAX compiles, in the README's modes, whatever else was there."""
    section = sections["speed/integer"]
    named = {entry.name for entry in contenders.LOGITS[INTEGER]}
    table, _ = speed_tables.logits_in_docs(section)
    found = {
        (shape, dtype, heading): cell
        for shape, dtype, *cells in table.rows
        for heading, cell in zip(table.headings[2:], cells, strict=True)
        if cell != "–"
    }
    ratios = [
        (case["shape"], case["dtype"], case["mode"], row["name"], row["ratio"])
        for case in section["cases"]
        for row in case["contenders"]
    ] + [
        ("**geometric mean**", *(mean[key] for key in ("dtype", "mode", "contender", "ratio")))
        for mean in section["geometric_means"]
    ]
    assert found == {
        (shape, dtype, f"{mode} ÷ {name}"): f"{ratio:.2f}"
        for shape, dtype, mode, name, ratio in ratios
        if name in named - {contenders.OURS}
    }
    assert {shape for shape, *_ in found} == {"4x8", "2x5", "**geometric mean**"}
    assert [row[1] for row in table.rows] == ["float32"] * 3 + ["bfloat16"] * 2
    assert not table.notes
    (again,) = speed_tables.ratios(section)
    assert (again.headings, again.rows) == (table.headings, table.rows)
    explained, origin = again.notes
    assert explained.startswith("optax: ")
    where = environment.in_words(section["environment"])
    assert origin.startswith(f"Measured by `python -m bench speed` on {where}.")


def test_the_tables_of_the_heads_hold_every_contender(sections):
    timed, compiled = sections["speed/linear"], sections["memory"]
    ratios, detailed = speed_tables.heads_in_docs(timed)
    assert [detailed] == speed_tables.details(timed)
    for section, table in ((timed, ratios), (compiled, memory.in_docs(compiled)[0])):
        shown = [case for case in section["cases"] if case.get("mode") in (None, "value-and-grad")]
        assert [row[0] for row in table.rows] == names_of(shown[0])
        assert all(len(row) == 1 + len(shown) for row in table.rows)
        assert names_of(shown[0])[:3] == ["jaxsoftmax", "jaxsoftmax, recompute", "optax"]
    forward, gradients = timed["cases"][:2]
    assert "three products" not in names_of(forward)
    by_name = {row["name"]: row for row in gradients["contenders"]}
    ratio = by_name["jaxsoftmax"]["median_s"] / by_name["optax"]["median_s"]
    megabytes = tables.megabytes(by_name["jaxsoftmax"]["temp_bytes"])
    assert ratios.markdown().count(f"| jaxsoftmax | {ratio:.2f}, {megabytes} MB |") == 1


def test_the_detailed_tables_hold_every_median_and_the_roof(sections):
    for section in (sections["speed/integer"], sections["speed/linear"]):
        (table,) = speed_tables.details(section)
        cells = [cell for row in table.rows for cell in row[2:] if cell != "–"]
        expected = [
            (speed_tables.milliseconds(row["median_s"]), speed_tables.of_the_roof(row))
            for case in section["cases"]
            for row in case["contenders"]
        ]
        found = [(cell.split(" ± ")[0], cell.split(", ")[1]) for cell in cells]
        assert sorted(found) == sorted(expected)
        assert any("Of the roof: " in note for note in table.notes)
        assert section["command"] in table.notes[-1]


def test_ignored_tokens_are_timed_by_their_fraction(bench, monkeypatch, tmp_path):
    """Of one program each, on labels of which that fraction is ignored; over ours without."""
    seen: list[int] = []

    def compile_ahead(program, arguments, **_: Any):
        def run(*inputs: Any) -> Any:
            seen.append(int(jnp.sum(inputs[2] == cases.IGNORED)))
            return program(*inputs)

        return run, 1.0

    def interleave(programs, call, **_: Any):
        seen.clear()
        for program in programs.values():
            call(program)
        return {name: timing.Timing(2.0 + i, 2.0, 3.0) for i, name in enumerate(programs)}

    monkeypatch.setattr(timing, "compile_ahead", compile_ahead)
    monkeypatch.setattr(timing, "temporary_bytes", lambda _: 3e6)
    monkeypatch.setattr(timing, "interleave", interleave)
    labels = jnp.arange(40)
    for fraction, count in ((0.0, 0), (0.5, 20), (0.9, 36), (1.0, 40)):
        assert jnp.sum(cases.with_ignored(labels, fraction) == cases.IGNORED) == count
    chosen = (
        "--op linear --tokens 8 --hidden 4 --vocab 16 --dtype float32 --ignored 0 --ignored 0.5"
    )
    done = bench(f"speed {chosen}")
    ((key, section),) = sections_in(tmp_path / results.DEFAULT).items()
    assert key == f"speed {chosen}"
    assert [case["ignored"] for case in section["cases"]] == [None, 0.0, 0.5]
    assert seen == [0] * 2 + [0] * 3 + [4] * 3
    ours = ["jaxsoftmax", "jaxsoftmax, recompute"]
    assert [names_of(case) for case in section["cases"]] == [ours, *[[*ours, "optax"]] * 2]
    over = [[row["of_base"] for row in case["contenders"]] for case in section["cases"]]
    assert over == [[1, 1], [4 / 2, 5 / 3, 6 / 2], [7 / 2, 8 / 3, 9 / 2]]
    for words in ("no ignore_index", "50 % ignored", "4.50, 3 MB", "2000 ± 50 %, 1.00, 3 MB"):
        assert words in done.stdout


def test_the_tables_of_ignored_tokens(sections):
    section = sections[report.SPEED_OF_IGNORED]
    (table,) = speed_tables.ignored_in_docs(section)
    assert table.headings == ["head", "by", "no ignore_index", "0 % ignored", "50 % ignored"]
    assert [row[:2] for row in table.rows] == [
        ["8x4x16 float32", "jaxsoftmax"],
        *(["", name] for name in ("jaxsoftmax, recompute", "optax")),
    ]
    for place, case in enumerate(section["cases"]):
        for row, shown in zip(case["contenders"], table.rows, strict=False):
            over = f"{row['of_base']:.2f}, {tables.megabytes(row['temp_bytes'])} MB"
            taken = f"{speed_tables.milliseconds(row['median_s'])} ± "
            assert shown[2 + place].startswith(taken)
            assert shown[2 + place].endswith(over)
    assert table.rows[-1][2] == "–"


def test_the_table_of_ignored_tokens_by_an_account():
    """Cycles in place of times; where a program does not fit, why."""

    def case(fraction: float | None, target: str, *rows: dict[str, Any]) -> dict[str, Any]:
        fields = {**Head(4, 3, 5, BFLOAT16)._asdict(), "shape": "4x3x5", "target": target}
        return fields | {"ignored": fraction, "contenders": rows}

    def row(name: str, **taken: Any) -> dict[str, Any]:
        return {"name": name, "temp_bytes": 2e6} | taken

    first = {"cycles": 8e6, "of_base": 1.0}
    found = [
        case(None, "v5e", row("jaxsoftmax", **first)),
        case(0.9, "v5e", row("jaxsoftmax", cycles=2e6, of_base=0.25)),
        case(None, "v6e", row("jaxsoftmax", **first)),
        case(0.9, "v6e", row("optax", cycles=None, error="no memory")),
    ]
    where = {"environment": environment.describe(runs=False), "command": "python -m bench speed"}
    (table,) = speed_tables.ignored_in_docs(where | {"cases": found})
    assert table.headings == ["head", "by", "no ignore_index", "90 % ignored"]
    assert table.rows == [
        ["4x3x5 bfloat16, v5e", "jaxsoftmax", "8, 1.00, 2 MB", "2, 0.25, 2 MB"],
        ["4x3x5 bfloat16, v6e", "jaxsoftmax", "8, 1.00, 2 MB", "–"],
        ["", "optax", "–", "no memory"],
    ]
    assert table.notes[-1].startswith("Estimated by `python -m bench speed` with ")


def test_the_tables_of_estimates(sections):
    """Over the cycles of optax; where optax does not compile, the cycles themselves."""
    section = json.loads(json.dumps(sections["cycles/linear"]))
    *_, table = targets.in_docs(section)
    assert table.headings == ["v6e, value-and-grad", "4x3x5 bfloat16"]
    assert table.rows == [
        ["jaxsoftmax", "0.75, 2 MB"],
        ["optax", "1.00, 8 MB"],
        ["tokamax", "1.25, 0 MB"],
        ["three products", "0.50, 8 MB"],
        ["the products at v6e's peak", "0.25"],
    ]
    assert targets.NOT_COUNTED not in table.notes
    assert table.notes[-1].startswith(f"Estimated by `{section['command']}` with ")

    larger = json.loads(json.dumps(section["cases"][-1])) | {"shape": "4x3x6"}
    ours, optax, *_ = larger["contenders"]
    ours |= {"notes": ["a loop"], "cycles": 12e6, "temp_bytes": 9e6}
    section["cases"].append(larger)
    *_, table = targets.in_docs(section)
    assert table.rows[0] == ["jaxsoftmax", "0.75, 2 MB", "3.00†, 9 MB"]
    assert targets.NOT_COUNTED in table.notes
    short, *others = targets.heads_in_docs(section)
    assert others == targets.in_docs(section)
    assert short.headings == ["value and gradient, estimated", "v5e", "v6e", "temporary MB"]
    assert short.rows[:2] == [
        ["jaxsoftmax", "0.75", "1.50†", "2 to 9"],
        ["optax", "1.00", "1.00", "8 to 8"],
    ]
    assert "over 4x3x5 bfloat16, 4x3x6 bfloat16" in short.notes[0]

    optax |= {"cycles": None, "temp_bytes": None, "error": "no memory"}
    *_, table = targets.in_docs(section)
    assert table.rows[:2] == [
        ["jaxsoftmax", "0.75, 2 MB", "12 Mcycles†, 9 MB"],
        ["optax", "1.00, 8 MB", "no memory"],
    ]
    assert table.rows[-1] == ["the products at v6e's peak", "0.25", "1 Mcycles"]
    short = targets.means(section)
    assert short.rows[0] == ["jaxsoftmax", "0.75", "0.75", "2 to 9"]

    of_heads = TwoHeads(4, 3, 5, BFLOAT16, Divergence.KL)
    of_logits = TwoLogits(4, 5, BFLOAT16, Divergence.JS)
    for op, case in ((Op.LINEAR_DIVERGENCE, of_heads), (Op.DIVERGENCE, of_logits)):
        *_, table = targets.in_docs(estimated(op, case) | {"command": "python -m bench"})
        assert table.headings == ["v6e, value-and-grad", f"{case}"]
        assert table.rows[0] == ["jaxsoftmax", "0.75, 2 MB"]
        assert (table.rows[-1][0] == "the products at v6e's peak") == op.heads
        assert contenders.MIXTURE in table.notes

    ours["costs"] = [{"cycles": 3e6, "times": 7, "operation": "a", "result": "b", "source": "c"}]
    (detail,) = targets.details({"cases": [larger | {"contenders": [ours]}]})
    assert detail.notes == ["a loop"]
    assert detail.rows == [["3.000", "25 %", "7", "a", "b", "c"]]


def test_the_tables_of_the_calibration(sections):
    first, _, rates, ratios = calibration.in_docs(sections[calibration.KEY])
    assert first.headings == ["v5p: Mcycles, ms, cycles/ns", "4x3x5"]
    assert first.rows[1] == ["xla, vjp", "2.0, 1.00, 2.00"]
    assert rates.rows[:2] == [
        ["v5p", "all programs", "1.00", "2.50", "4.00"],
        ["", "xla, forward", *["1.00"] * 3],
    ]
    # 3 / 1, 4 / 2 and (3 + 4) / (1 + 2) by the account, over 1 as measured.
    assert [row[2] for row in ratios.rows[:3]] == ["3.00", "2.00", "2.33"]


# README and docs.


def test_readme_and_docs_show_the_committed_results():
    if not report.committed():
        pytest.skip("no results are committed")
    report.command(check=True)  # exits where a table differs
    for stem in report.FIGURES:
        assert (report.FIGURES_FOLDER / f"{stem}.png").stat().st_size > 10_000
        assert (report.FIGURES_FOLDER / f"{stem}.svg").exists()


def test_the_account_is_as_good_as_is_said():
    committed = [file[calibration.KEY] for file in report.committed() if calibration.KEY in file]
    assert "within 25 %" in targets.ESTIMATE
    for section in committed:
        *_, ratios = calibration.in_docs(section)
        both = [row[2:] for row in ratios.rows if row[1] == "both together"]
        assert len(both) == len(calibration.MEASURED_MS)
        assert all(0.75 <= float(ratio) <= 1.25 for three in both for ratio in three)


def test_captions_name_a_jax_that_pip_does_not_install():
    if platform.python_version().startswith(f"{environment.PYTHON}."):
        # With a newer one, the tables are to be measured again.
        assert jax.__version_info__ <= tuple(map(int, environment.JAX.split(".")))
    captions = [
        line
        for path in report.DOCUMENTS
        for line in path.read_text(encoding="utf-8").splitlines()
        if line.startswith(("Measured by `python -m bench ", "Estimated by `python -m bench "))
    ]
    assert len(captions) > 10
    for line in captions:
        others = f" jax {environment.JAX}," not in line
        assert (f"pip installs jax {environment.JAX}:" in line) == others


@pytest.mark.parametrize(
    ("key", "command", "along", "places"),
    [
        (report.ACCURACY, "accuracy --offset 0", "lead", [0.0, 5.0, 20.0]),
        (report.OF_DIVERGENCES, "accuracy --op divergence", "delta", [1e-5, 0.01, 3.0]),
    ],
    ids=["losses", "divergences"],
)
def test_the_committed_accuracy_is_that_of_the_code(tmp_path, key, command, along, places):
    """A little of it measured again, on the machine and with the JAX of the committed results."""
    done = as_a_process(command + "".join(f" --{along} {place:g}" for place in places), tmp_path)
    assert done.returncode == 0, done.stderr
    (new,) = sections_in(tmp_path / results.DEFAULT).values()
    here = environment.device_name(), jax.__version__
    measured = [file[key] for file in report.committed() if key in file]
    committed = [
        section
        for section in measured
        if here == (section["environment"]["device"], section["environment"]["versions"]["jax"])
    ]
    if not committed:
        pytest.skip("measured elsewhere, or with another JAX")
    (old,) = committed

    def errors(section: dict[str, Any], dtype: Dtype) -> dict[tuple[str, str], list[float | None]]:
        (one,) = (
            one
            for one in section["series"]
            if (one["name"], one["dtype"], one.get("offset", 0)) == (contenders.OURS, dtype, 0)
        )
        shown = [section[f"{along}s"].index(place) for place in places]
        return {
            (quantity, which): [found[place] for place in shown]
            for quantity, of_quantity in one.items()
            if isinstance(of_quantity, dict)
            for which, found in of_quantity.items()
        }

    for dtype in Dtype:
        assert errors(new, dtype) == errors(old, dtype), (
            f"{dtype}: the numerics have changed since {key} was measured; run "
            f"{old['command']} --output bench/results (see CONTRIBUTING.md)"
        )


def test_every_figure_shown_is_drawn_by_a_command():
    by_examples = {"half_precision_training", "distillation", "language_model"}
    without_numbers = {"modules", "call_of_a_head", "call_of_a_loss"}
    for document in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")):
        shown = re.findall(r"figures/(\w+)\.", document.read_text(encoding="utf-8"))
        assert {*shown} <= {*report.FIGURES} | by_examples | without_numbers, document


FEW = (
    Row("speed/linear", "8x4x16", FLOAT32, "cpu"),
    Row("speed/integer", "4x8", BFLOAT16, "cpu"),
    Row("cycles/linear", "4x3x5", BFLOAT16, "v6e"),
)


def test_the_summaries_show_the_rows_asked_for(sections):
    """Of sections in files of several devices, a contender that was not measured as –."""
    timed, integer, estimates = (json.loads(json.dumps(sections[row.section])) for row in FEW)
    estimates["cases"][-1]["contenders"][0]["notes"] = ["a loop"]
    timed["environment"] |= {"date": "2026-01-02"}
    on_gpu = timed | {"environment": timed["environment"] | {"platform": "gpu", "device": "GPU 1"}}
    files = [
        {"speed/linear": on_gpu},
        {"speed/linear": timed, "speed/integer": integer},
        {"cycles/linear": estimates},
    ]
    gpu = FEW[0]._replace(platform="gpu")

    table = summary.time(files, [*FEW, gpu])
    assert table.headings == ["time ÷ optax's", *summary.COLUMNS]
    rows = {where: dict(zip(summary.COLUMNS, cells, strict=True)) for where, *cells in table.rows}
    assert [*rows] == [
        "CPU, head 8x4x16 float32",
        "CPU, logits 4x8 bfloat16",
        "TPU v6e, head 4x3x5 bfloat16",
        "GPU 1, head 8x4x16 float32",
    ]
    on_cpu, logits, on_tpu, again = rows.values()
    assert on_cpu == again
    (case,) = (
        case
        for case in timed["cases"]
        if (case["shape"], case["mode"]) == ("8x4x16", "value-and-grad")
    )
    medians = {row["name"]: row["median_s"] for row in case["contenders"]}
    assert on_cpu == {
        name: f"{medians[name] / medians['optax']:.2f}" if name in medians else "–"
        for name in summary.COLUMNS
    }
    assert logits["optax"] == "1.00"
    assert logits["tokamax"] == "–"
    assert on_tpu == dict.fromkeys(summary.COLUMNS, "–") | {
        "jaxsoftmax": "0.75†",
        "optax": "1.00",
        "tokamax": "1.25",
    }
    (note,) = table.notes
    assert targets.NOT_COUNTED in note
    words, today = environment.briefly(integer["environment"])
    assert f"{words}, 2026-01-02 and {today}; XLA for TPUs, jaxsoftmax " in note
    assert note.count("GPU 1, jaxsoftmax ") == 1
    assert targets.NOT_COUNTED not in summary.time(files, FEW[:1]).notes[0]

    table = summary.memory(files, FEW[-1:])
    assert table.rows == [["TPU v6e, head 4x3x5 bfloat16", "2", "–", "8", "–", "0", "–"]]
    with pytest.raises(ValueError, match="no 8x4x17 float32 on gpu in speed/linear"):
        summary.memory(files, [gpu._replace(shape="8x4x17")])


def test_report_writes_the_readme_between_the_markers(sections, tmp_path, monkeypatch):
    readme = tmp_path / "README.md"
    readme.write_text(report.README.read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(report, "DOCUMENTS", {readme: report.DOCUMENTS[report.README]})
    monkeypatch.setattr(report, "FIGURES", {})
    monkeypatch.setattr(report, "HEADS", FEW[::2])
    monkeypatch.setattr(report, "LOGITS_AND_HEADS", FEW)
    monkeypatch.setattr(results, "COMMITTED", tmp_path)
    for name, section in sections.items():
        results.save(tmp_path / "a.json", name, section)

    def outside() -> list[str]:
        text = readme.read_text(encoding="utf-8")
        return re.split(r"(?s)(?<=<!-- bench report: ).*?(?=<!-- /bench report: )", text)

    before = outside()
    assert len(before) == 4
    readme.write_text(report.replace(readme.read_text("utf-8"), "time", "stale"), "utf-8")
    with pytest.raises(typer.Exit, match="1"):
        report.command(check=True)
    assert "stale" in readme.read_text("utf-8")
    report.command()
    assert "stale" not in readme.read_text("utf-8")
    assert outside() == before
    report.command(check=True)


def test_the_readme_is_short():
    """One that is read: three tables of at most six rows."""
    text = report.README.read_text(encoding="utf-8")
    shown = re.findall(r"(?s)<!-- bench report: .*?<!-- /bench report", text)
    rows = [re.findall(r"^\| (?!---)", block, re.MULTILINE) for block in shown]
    assert [len(of_block) - 1 for of_block in rows] == [6, 6, 6]
    assert len(text.splitlines()) <= 180


def test_every_device_has_its_block_and_a_missing_section_is_named(sections):
    ignored = report.SPEED_OF_IGNORED
    names = "accuracy", "speed", "speed --op linear", "memory", report.HEADS_ON_TPUS, ignored
    blocks = {name: report.DOCUMENTS[report.BENCHMARKS][name] for name in names}
    stale = "\n".join(
        f"<!-- bench report: {name} -->\nstale\n<!-- /bench report: {name} -->" for name in names
    )
    one, other = sections, {}
    for name, section in one.items():
        if section["environment"]["device"]:  # of the estimates there is one section
            other[name] = section | {"environment": section["environment"] | {"device": "Another"}}
    device = one["speed/integer"]["environment"]["device"]
    render = functools.partial(report.render, blocks=blocks)
    both = render(stale, [one, other])
    assert "stale" not in both
    assert both.count(f"\n**{device}**\n") == both.count("\n**Another**\n") == 5
    alone = render(stale, [one, {}])
    assert "\n**" not in alone
    assert render(both, [one]) == alone
    with pytest.raises(ValueError, match=r"accuracy/integer.*python -m bench accuracy"):
        render(stale, [{"speed/integer": one["speed/integer"]}])
    without = [{name: section for name, section in one.items() if name != ignored}]
    with pytest.raises(ValueError, match=f"no {ignored} in bench/results"):
        render(both, without)
    empty = report.replace(both, ignored, None)
    assert report.replace(render(empty, without), ignored, "x") == report.replace(
        alone, ignored, "x"
    )
    assert f"{ignored} -->\n<!-- /" in render(empty, without)


def test_markers_that_are_not_there_once_are_refused():
    begin, end = "<!-- bench report: x -->", "<!-- /bench report: x -->"
    for text in ("", begin, end + begin, begin + begin + end):
        with pytest.raises(ValueError, match="expected once each"):
            report.replace(text, "x", "content")


def test_figures_draw_every_contender(sections):
    for draw, key, unit in (
        (speed_tables.figure, report.SPEED_BY_MODEL, "ms"),
        (memory.figure, report.MEMORY_BY_MODEL, "temporary MB"),
    ):
        (axes,) = draw(sections[key]).axes
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("classes", unit)
        lines = {line.get_label(): line for line in axes.get_lines()}
        assert {"jaxsoftmax", "jaxsoftmax, recompute", "optax"} <= set(lines)
        assert list(np.asarray(lines["jaxsoftmax"].get_xdata())) == [5, 16]
    panels = targets.figure(sections["cycles/linear"]).axes
    assert [axes.get_title(loc="left") for axes in panels[:2]] == ["v5e", "v6e"]
    for axes in panels[:2]:
        points = {line.get_label(): np.ravel(line.get_xydata()) for line in axes.lines[1:]}
        # Memory, no less than 1 MB, and cycles over those of optax.
        expected = {
            name: (max(mb, 1), taken / 4)
            for name, (taken, mb) in CONTENDERS.items()
            if name not in targets.NOT_DRAWN
        }
        assert {name: tuple(point) for name, point in points.items()} == expected
    section = sections["accuracy/integer"]
    by_lead, by_offset = accuracy_tables.figure(section), accuracy_tables.figure_of_offsets(section)
    for axes, dtype in zip(by_lead.axes + by_offset.axes, [*Dtype] * 4, strict=True):
        series = {(one["dtype"], one["name"]): one["name"] for one in section["series"]}
        names = [name for (of, _), name in series.items() if of == dtype]
        assert len(axes.lines) == 1 + len(names)  # 100 %
        assert [line.get_label() for line in axes.lines[1:]] == names
        assert [line.get_color() for line in axes.lines[1:]] == [
            figures.STYLES[name]["color"] for name in names
        ]
    titles = [axes.get_title(loc="left") for axes in by_lead.axes[:3] + by_offset.axes[:3]]
    assert titles == [f"{dtype} logits" for dtype in [*Dtype] * 2]
    (optax,) = (line for line in by_lead.axes[0].lines if line.get_label() == "optax")
    np.testing.assert_array_equal(optax.get_xdata(), [1, 30])
    assert np.max(optax.get_ydata()) == 1
    divergences = json.loads(json.dumps(sections[report.OF_DIVERGENCES]))
    grid = divergence_accuracy.figure(divergences).axes
    assert [axes.get_title(loc="left") for axes in grid[:3]] == titles[:3]
    for axes in grid:
        drawn = {line.get_label(): f64(line.get_ydata()) for line in axes.lines[1:]}
        ours, optax = drawn["jaxsoftmax"], drawn["optax"]
        assert ours[1] < optax[1] * 1.1
        assert {"optax, log targets", "optax, generalized", "jax.nn"} < {*drawn}
    assert grid[1].texts[0].get_text() == "equal logits"
    for one in divergences["series"]:
        one["kl"]["max"] = [1e-7, 1e-7]
    grid = divergence_accuracy.figure(divergences).axes
    assert "below float16's" in grid[5].texts[0].get_text()
    assert "below float16's" in by_lead.axes[5].texts[0].get_text()
    assert "numbers\nare 64\napart" in by_offset.axes[1].texts[0].get_text()


def test_the_same_results_draw_the_same_files(sections, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FIGURES_FOLDER", tmp_path)
    report.draw([sections])
    drawn = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(drawn) == {f"{stem}.{kind}" for stem in report.FIGURES for kind in ("png", "svg")}
    again = {stem: report.FIGURES[stem] for stem in ("speed_vocabulary", "accuracy_offsets")}
    monkeypatch.setattr(report, "FIGURES", again)
    report.draw([sections])
    assert drawn == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
