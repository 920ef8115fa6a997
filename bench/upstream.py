# SPDX-License-Identifier: Apache-2.0
"""`python -m bench.upstream`: what the patches of docs/upstream.md cost optax and `jax.nn`.

A patch is applied to a copy of the installed module, which is imported beside the original; both
are timed or compiled side by side, on the logits as they come.
"""

import importlib.metadata
import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Annotated, NamedTuple

import jax
import optax
import typer
from jax.sharding import SingleDeviceSharding

from bench import cases, environment, options, tables, timing
from bench.cases import Dtype, Labels, Logits, Mode
from bench.tables import Table
from jaxsoftmax.training.tpu import cycles

PATCHES = Path(__file__).parents[1] / "docs" / "upstream"
MODULES = {"optax": "losses/_classification.py", "jax": "_src/nn/functions.py"}
MODES = (Mode.FORWARD, Mode.VALUE_AND_GRAD)
CASES = tuple(
    Logits(tokens, classes, dtype, labels)
    for labels in (Labels.INTEGER, Labels.DENSE)
    for tokens, classes in ((4096, 32000), (65536, 1000))
    for dtype in (Dtype.FLOAT32, Dtype.BFLOAT16)
)
SECONDS = 20.0  # a case and mode
NAMES = {
    Labels.INTEGER: "softmax_cross_entropy_with_integer_labels, optax patched",
    Labels.DENSE: "softmax_cross_entropy, JAX patched",
}

Loss = Callable[[jax.Array, jax.Array], jax.Array]


class DoesNotApplyError(Exception):
    """The installed version differs in the lines of a patch."""


@cache
def patched(package: str) -> ModuleType:
    """The patched module of an installed package, as a module of its own.

    Raises:
        DoesNotApplyError: the installed version differs in these lines.
    """
    found = importlib.util.find_spec(package)
    assert found is not None
    assert found.origin is not None
    relative = MODULES[package]
    original = Path(found.origin).parent / relative
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve() / package / relative
        place.parent.mkdir(parents=True)
        place.write_bytes(original.read_bytes())
        apply(package, place.parents[relative.count("/") + 1])
        spec = importlib.util.spec_from_file_location(f"{package}_patched", place)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return module


def apply(package: str, folder: Path) -> None:
    """Apply a package's patch to the copy in a folder."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    outside["GIT_CEILING_DIRECTORIES"] = str(folder.parent)  # whatever repository it may lie in
    command = ["git", "apply", str(PATCHES / f"{package}.patch")]
    done = subprocess.run(
        command, cwd=folder, env=outside, capture_output=True, text=True, check=False
    )
    if done.returncode:
        version = importlib.metadata.version(package)
        raise DoesNotApplyError(f"{package} {version}: {done.stderr.strip()}")


def losses(labels: Labels) -> dict[str, Loss]:
    """The loss of logits and labels as it is, and with the patch."""
    if labels is Labels.INTEGER:
        name = "softmax_cross_entropy_with_integer_labels"
        return {"before": getattr(optax, name), "after": getattr(patched("optax"), name)}
    log_softmax = patched("jax").log_softmax
    # That is all that optax's own line does with log_softmax.
    return {
        "before": optax.softmax_cross_entropy,
        "after": lambda logits, labels: -(labels * log_softmax(logits)).sum(-1),
    }


class Cost(NamedTuple):
    """What a case and mode takes with the patch, over what it takes without."""

    case: Logits
    mode: Mode
    where: str
    before: float  # milliseconds, or millions of cycles
    after: float
    before_bytes: int
    after_bytes: int


def timed(case: Logits, mode: Mode, seconds: float = SECONDS) -> Cost:
    """Run both in turns, and take the medians."""
    rotation = case.inputs()
    programs = {
        name: timing.compile_ahead(cases.program(loss, mode), rotation[0])[0]
        for name, loss in losses(case.labels).items()
    }
    timings = timing.interleave(programs, timing.caller(rotation), seconds=seconds)
    before, after = (timings[name].median_s * 1e3 for name in programs)
    sizes = map(timing.temporary_bytes, programs.values())
    return Cost(case, mode, environment.device_name(), before, after, *sizes)


def compiled(case: Logits, mode: Mode, target: str) -> Cost:
    """Compile both for a TPU, and take its compiler's account."""
    chip = cycles.CHIPS[target]
    inputs = case.abstract_inputs(SingleDeviceSharding(environment.tpu(chip.topology)))
    if case.labels is Labels.DENSE:
        inputs = inputs[:1] * 2
    programs = [
        timing.compile_for("tpu", cases.program(loss, mode), inputs)
        for loss in losses(case.labels).values()
    ]
    before, after = (cycles.account(one.as_text(), chip).cycles / 1e6 for one in programs)
    return Cost(case, mode, target, before, after, *map(timing.temporary_bytes, programs))


def table(costs: Sequence[Cost], unit: str) -> Table:
    """Lay the costs out for docs/upstream.md."""
    headings = ["loss", "logits", "mode", "on", f"before, {unit}", f"after, {unit}", "ratio"]
    rows = [
        [
            NAMES[cost.case.labels],
            f"{cost.case.shape} {cost.case.dtype}",
            cost.mode.value,
            cost.where,
            f"{cost.before:.4g}",
            f"{cost.after:.4g}",
            f"{cost.after / cost.before:.2f}",
            f"{cost.before_bytes / 2**20:.0f}",
            f"{cost.after_bytes / 2**20:.0f}",
        ]
        for cost in costs
    ]
    headings += ["temporary before, MiB", "after, MiB"]
    return Table(headings, rows, words=4)


def main(
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            help=f"Nothing is run, but compiled for a TPU: {', '.join(cycles.CHIPS)}; repeatable.",
        ),
    ] = None,
    seconds: Annotated[float, typer.Option(help="Time for a case and mode.")] = SECONDS,
) -> None:
    """Measure what the patches of docs/upstream.md cost; the table goes to stdout."""
    options.check_targets(targets or (), cycles.CHIPS)
    work = [(case, mode, where) for case in CASES for where in targets or [""] for mode in MODES]
    costs = []
    with tables.progress(len(work)) as now:
        for case, mode, where in work:
            now(f"{where or 'here'}: {case} {case.labels} {mode}")
            costs.append(compiled(case, mode, where) if where else timed(case, mode, seconds))
            now(done=1)
    typer.echo(table(costs, "Mcycles" if targets else "ms").markdown())


if __name__ == "__main__":
    typer.run(main)
