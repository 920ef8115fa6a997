# SPDX-License-Identifier: Apache-2.0
"""`python -m bench speed --target`: time on TPUs by their compiler's account, and memory."""

from collections.abc import Iterator, Sequence
from typing import Any

import typer
from jax.sharding import SingleDeviceSharding

from bench import contenders, cycles, environment, tables, timing
from bench.cases import Case, Dtype, Head, Labels, Logits, Mode, Op
from bench.tables import Table

KEY = "cycles/{}"  # of the results file, by op
MODES = (Mode.FORWARD, Mode.VALUE_AND_GRAD)
LOGITS = (
    Logits(8192, 50304, Dtype.FLOAT32),
    Logits(8192, 50304, Dtype.BFLOAT16),
    Logits(4096, 128256, Dtype.BFLOAT16),
    Logits(65536, 1000, Dtype.FLOAT32),
)
HEADS = (
    Head(8192, 2304, 256000, Dtype.BFLOAT16),
    Head(4096, 4096, 128256, Dtype.BFLOAT16),
    Head(4096, 2880, 201088, Dtype.BFLOAT16),
    Head(16384, 1152, 262144, Dtype.BFLOAT16),
    Head(2048, 1024, 32768, Dtype.BFLOAT16),
)
SHOWN = 8  # instructions of a program
ACCOUNT = (
    "The cycles that XLA for TPUs plans with, over optax's: an estimate, good to 10 to 20 %, not a "
    "measured time. What moves data outside of fusions counts by its bytes; a branch that is "
    "rarely taken and a loop whose length only the run tells (rows far from their label) do not."
)


def measure(cases: Sequence[Case], modes: Sequence[Mode], targets: Sequence[str]) -> dict[str, Any]:
    """Compile every JAX contender for every case and target: a section of the results file.

    Raises:
        typer.BadParameter: there is no compiler for a target.
    """
    head = isinstance(cases[0], Head)
    entries = contenders.HEAD if head else contenders.LOGITS[Labels.INTEGER]
    found = {case.dtype: contenders.load(entries, case.dtype) for case in cases}
    left_out = list(dict.fromkeys(line for _, lines in found.values() for line in lines))
    measured = []
    with tables.progress(len(targets) * len(cases) * len(modes)) as now:
        for target in targets:
            chip = cycles.CHIPS[target]
            device = SingleDeviceSharding(_device(target))
            for case in cases:
                for mode in modes:
                    now(f"{target}: {case} {mode}")
                    rows = [
                        {"name": one.name, **_compile(one, case, mode, device, chip)}
                        for one in found[case.dtype][0]
                        if one.entry.jax and not (one.entry.whole and mode is Mode.FORWARD)
                    ]
                    at_peak = cycles.at_peak(case.flops(mode), chip)
                    fields = {**case._asdict(), "shape": case.shape, "target": target, "mode": mode}
                    measured.append({**fields, "at_peak": at_peak or None, "contenders": rows})
                    now(done=1)
    tables.say(*left_out)
    op = Op.LINEAR if head else Op.LOGITS
    return {
        "environment": environment.describe(),
        "op": op.value,
        "left_out": left_out,
        "cases": measured,
    }


def _device(target: str) -> Any:
    try:
        return environment.tpus(cycles.CHIPS[target].topology)[0]
    except Exception as error:  # libtpu absent, or it does not know the topology
        reason = str(error).splitlines()[0][:120]
        raise typer.BadParameter(f"{target}: {reason}", param_hint="--target") from None


def _compile(
    contender: contenders.Contender,
    case: Case,
    mode: Mode,
    device: SingleDeviceSharding,
    chip: cycles.Chip,
) -> dict[str, Any]:
    program = contenders.program(contender, mode, case.parameters)
    try:
        compiled = timing.compile_for("tpu", program, case.abstract_inputs(device))
    except Exception as error:  # too large for the chip, or not for it at all
        if contender.entry.module == "ours":
            raise
        reason = "no memory" if "RESOURCE_EXHAUSTED" in str(error) else type(error).__name__
        return {"cycles": None, "temp_bytes": None, "error": reason}
    found = cycles.account(compiled.as_text(), chip)
    return {
        "cycles": found.cycles,
        "temp_bytes": timing.temporary_bytes(compiled),
        "notes": found.notes,
        "costs": [cost._asdict() for cost in found.costs[:SHOWN]],
    }


def in_docs(section: dict[str, Any]) -> list[Table]:
    """Lay a section out for the terminal and docs/benchmarks.md: a table per target and mode."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in section["cases"]:
        groups.setdefault((case["target"], case["mode"]), []).append(case)
    found = []
    for (target, mode), cases in groups.items():
        rows = tables.by_contender(cases, _cell)
        if section["op"] == Op.LINEAR:
            peak = [_ratio(case["at_peak"], _baseline(case)) for case in cases]
            rows.append([f"the products at {target}'s peak", *peak])
        headings = [f"{target}, {mode}", *(f"{case['shape']} {case['dtype']}" for case in cases)]
        found.append(Table(headings, rows, words=1))
    notes = "Each cell: cycles over optax's, temporary MB. " + ACCOUNT, tables.origin(section)
    return [*found[:-1], found[-1]._replace(notes=notes)]


def details(section: dict[str, Any]) -> Iterator[Table]:
    """Lay out the costliest instructions of every program."""
    headings = ["Mcycles", "share", "iterations", "operation", "result", "from"]
    for case in section["cases"]:
        for row in case["contenders"]:
            if row["cycles"] is not None:
                rows = [
                    [
                        f"{cost['cycles'] / 1e6:.3f}",
                        f"{100 * cost['cycles'] / row['cycles']:.0f} %",
                        *(str(cost[key]) for key in ("times", "operation", "result", "source")),
                    ]
                    for cost in row["costs"]
                ]
                title = f"{case['target']}: {case['shape']} {case['dtype']} {case['mode']}, "
                title += f"{row['name']}: {row['cycles'] / 1e6:.3f} Mcycles"
                yield Table(headings, rows, row["notes"], title)


def _cell(row: dict[str, Any], case: dict[str, Any]) -> str:
    if row["cycles"] is None:
        return row["error"]
    baseline = case.get(contenders.BASELINE, {}).get("cycles")
    return f"{_ratio(row['cycles'], baseline)}, {tables.megabytes(row['temp_bytes'])} MB"


def _ratio(taken: float, baseline: float | None) -> str:
    """Over the baseline's; where it does not compile, the cycles themselves."""
    return f"{taken / baseline:.2f}" if baseline else f"{taken / 1e6:.4g} Mcycles"


def _baseline(case: dict[str, Any]) -> float | None:
    return {row["name"]: row["cycles"] for row in case["contenders"]}.get(contenders.BASELINE)
