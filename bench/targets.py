# SPDX-License-Identifier: Apache-2.0
"""`python -m bench speed --target`: time on TPUs by their compiler's account, and memory."""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from statistics import geometric_mean
from typing import Any

from jax.sharding import SingleDeviceSharding
from matplotlib.figure import Figure

from bench import contenders, environment, figures, tables, timing
from bench.cases import (
    Case,
    Divergence,
    Dtype,
    Head,
    Labels,
    Logits,
    Mode,
    Op,
    TwoHeads,
    TwoLogits,
)
from bench.tables import Table
from jaxsoftmax.training.tpu import cycles

FILE = "tpus-estimated"
KEY = "cycles/{}"  # of this file, by op
MODES = (Mode.FORWARD, Mode.VALUE_AND_GRAD)
COMPLETE = {  # what is compiled by default
    Op.LOGITS: MODES,
    Op.LINEAR: MODES[1:],
    Op.DIVERGENCE: Op.DIVERGENCE.modes,
    Op.LINEAR_DIVERGENCE: Op.LINEAR_DIVERGENCE.modes[1:],
}
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
DIVERGENCES = (
    TwoLogits(8192, 50304, Dtype.FLOAT32, Divergence.KL),
    TwoLogits(8192, 50304, Dtype.BFLOAT16, Divergence.KL),
    TwoLogits(65536, 1000, Dtype.FLOAT32, Divergence.KL),
    TwoLogits(8192, 50304, Dtype.FLOAT32, Divergence.JS),
)
TWO_HEADS = (
    TwoHeads(4096, 4096, 128256, Dtype.BFLOAT16, Divergence.KL),
    TwoHeads(4096, 2880, 201088, Dtype.BFLOAT16, Divergence.KL),
    TwoHeads(2048, 1024, 32768, Dtype.BFLOAT16, Divergence.KL),
    TwoHeads(2048, 1024, 32768, Dtype.BFLOAT16, Divergence.JS),
)
CASES = {
    Op.LOGITS: LOGITS,
    Op.LINEAR: HEADS,
    Op.DIVERGENCE: DIVERGENCES,
    Op.LINEAR_DIVERGENCE: TWO_HEADS,
}
# In the figure: the programs that `figures.STYLES` does not have. Others are in the tables alone,
# and so is "jaxsoftmax, recompute": on TPUs it is the program of "jaxsoftmax".
OTHER_STYLES = {
    "jaxsoftmax, in forward": {"color": "#0072b2", "marker": "P"},
    "three products": {"color": figures.FAINT, "marker": "*"},
}
NOT_DRAWN = {"jaxsoftmax, recompute"}
SHOWN = 8  # instructions of a program
ESTIMATE = (
    "Not a measured time: the cycles that XLA for TPUs plans with, over those of optax. Of heads "
    "whose times are published, such a ratio of value and gradient is within 25 % of the measured."
)
NOT_COUNTED = (
    "†: without a branch that is rarely taken, or a loop whose length only the run tells (rows far "
    "from their label)."
)


def measure(
    cases: Sequence[Case], modes: Sequence[Mode], targets: Sequence[str], *, detail: bool = False
) -> dict[str, Any]:
    """Compile every JAX contender for every case and target: a section of the results file.

    Args:
        cases: all of one kind.
        modes: what to compute.
        targets: of `cycles.CHIPS`.
        detail: also keep the costliest instructions.

    Raises:
        typer.BadParameter: there is no compiler for a target.
    """
    found = {case: contenders.load(_entries(case)[1], case.dtype) for case in cases}
    left_out = list(dict.fromkeys(line for _, lines in found.values() for line in lines))
    measured = []
    with tables.progress(len(targets) * len(cases) * len(modes)) as now:
        for target in targets:
            chip = cycles.CHIPS[target]
            device = SingleDeviceSharding(environment.tpu(chip.topology))
            for case in cases:
                for mode in modes:
                    now(f"{target}: {case} {mode}")
                    rows = [
                        _compile(one, case, mode, device, chip)[0]
                        for one in found[case][0]
                        if one.entry.jax and not (one.entry.whole and mode is Mode.FORWARD)
                    ]
                    if not detail:
                        for row in rows:
                            row.pop("costs", None)
                    at_peak = cycles.at_peak(case.flops(mode), chip)
                    fields = {**case._asdict(), "shape": case.shape, "target": target, "mode": mode}
                    measured.append({**fields, "at_peak": at_peak or None, "contenders": rows})
                    now(done=1)
    tables.say(*left_out)
    return {
        "environment": environment.describe(runs=False),
        "op": _entries(cases[0])[0].value,
        "left_out": left_out,
        "cases": measured,
    }


def _entries(case: Case) -> tuple[Op, tuple[contenders.Entry, ...]]:
    match case:
        case Logits():
            return Op.LOGITS, contenders.LOGITS[Labels.INTEGER]
        case TwoLogits(divergence=divergence):
            return Op.DIVERGENCE, contenders.DIVERGENCES[divergence]
        case TwoHeads(divergence=divergence):
            return Op.LINEAR_DIVERGENCE, contenders.HEAD_DIVERGENCES[divergence]
    return Op.LINEAR, contenders.HEAD + contenders.VARIANTS


def _compile(
    contender: contenders.Contender,
    case: Case,
    mode: Mode,
    device: SingleDeviceSharding,
    chip: cycles.Chip,
    *,
    counted: Sequence[float | None] = (None,),
) -> list[dict[str, Any]]:
    """Compile a contender once: a row for each fraction of the tokens that may count."""
    inputs = contenders.abstract_inputs(contender, case, device)
    program = contenders.program(contender, mode, case.parameters)
    try:
        compiled = timing.compile_for("tpu", program, inputs)
    except Exception as error:  # too large for the chip, or not for it at all
        if contender.entry.module == "ours":
            raise
        reason = "no memory" if "RESOURCE_EXHAUSTED" in str(error) else type(error).__name__
        row = {"name": contender.name, "cycles": None, "temp_bytes": None, "error": reason}
        return [dict(row) for _ in counted]
    text = compiled.as_text()
    return [
        {
            "name": contender.name,
            "cycles": found.cycles,
            "temp_bytes": timing.temporary_bytes(compiled),
            "notes": found.notes,
            "costs": [cost._asdict() for cost in found.costs[:SHOWN]],
        }
        for found in (cycles.account(text, chip, share) for share in counted)
    ]


def measure_ignored(
    cases: Sequence[Head], fractions: Sequence[float], targets: Sequence[str]
) -> dict[str, Any]:
    """Compile what `speed.measure_ignored` times: a section of the results file, laid out alike."""
    measured, left_out, fractions = [], [], list(dict.fromkeys(fractions))
    with tables.progress(len(targets) * len(cases)) as now:
        for target, case in itertools.product(targets, cases):
            now(f"{target}: {case}")
            measured += _ignored(case, fractions, target, left_out)
            now(done=1)
    left_out = list(dict.fromkeys(left_out))
    tables.say(*left_out)
    return {
        "environment": environment.describe(runs=False),
        "op": Op.LINEAR.value,
        "left_out": left_out,
        "cases": measured,
    }


def _ignored(
    case: Head, fractions: Sequence[float], target: str, left_out: list[str]
) -> list[dict[str, Any]]:
    chip, mode = cycles.CHIPS[target], Mode.VALUE_AND_GRAD
    device = SingleDeviceSharding(environment.tpu(chip.topology))

    def rows(entries: Sequence[contenders.Entry], counted: Sequence[float | None]) -> list[Any]:
        found, lines = contenders.load(entries, case.dtype)
        left_out.extend(lines)
        compiled = (_compile(one, case, mode, device, chip, counted=counted) for one in found)
        return list(zip(*compiled, strict=True))

    without = rows(contenders.WITHOUT_IGNORING + contenders.VARIANTS[:1], [None])
    ignoring = contenders.IGNORING + contenders.IGNORING_VARIANTS
    by_fraction = without + rows(ignoring, [1 - fraction for fraction in fractions])
    base = {row["name"]: row["cycles"] for row in without[0]}
    for row in itertools.chain(*by_fraction):
        row.pop("costs", None)
        if row["cycles"] is not None:
            row["of_base"] = row["cycles"] / (base.get(row["name"]) or base[contenders.OURS])
    of_case = {**case._asdict(), "shape": case.shape, "mode": mode.value, "target": target}
    return [
        {**of_case, "ignored": fraction, "contenders": list(of_fraction)}
        for fraction, of_fraction in zip([None, *fractions], by_fraction, strict=True)
    ]


def in_docs(section: dict[str, Any]) -> list[Table]:
    """Lay a section out for the terminal and docs/benchmarks.md: a table per target and mode."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for case in section["cases"]:
        groups.setdefault((case["target"], case["mode"]), []).append(case)
    found = []
    for (target, mode), cases in groups.items():
        rows = tables.by_contender(cases, _cell)
        if Op(section["op"]).heads:
            peak = [_ratio(case["at_peak"], _baseline(case)) for case in cases]
            rows.append([f"the products at {target}'s peak", *peak])
        headings = [f"{target}, {mode}", *(f"{case['shape']} {case['dtype']}" for case in cases)]
        found.append(Table(headings, rows, words=1))
    notes = (
        f"Each cell: cycles over those of optax, temporary MB. {ESTIMATE}",
        _not_counted(row for case in section["cases"] for row in case["contenders"]),
        contenders.explain(contenders.names(section["cases"]), Op(section["op"])),
        contenders.MIXTURE if Op(section["op"]).divergence else "",
        tables.origin(section),
    )
    return [*found[:-1], found[-1]._replace(notes=notes)]


def heads_in_docs(section: dict[str, Any]) -> list[Table]:
    """Lay heads out for docs/benchmarks.md: the means over the shapes, then every shape."""
    return [means(section), *in_docs(section)]


def means(section: dict[str, Any]) -> Table:
    """Lay out the mean over the shapes of the ratios of value and gradient.

    Shapes where a program does not fit into the chip's memory are left out of its mean.
    """
    programs = _with_gradients(section)
    shapes, targets = (
        list(dict.fromkeys(one[key] for one in programs)) for key in ("on", "target")
    )
    rows = []
    for name in dict.fromkeys(one["name"] for one in programs):
        own = [one for one in programs if one["name"] == name]
        memory = [tables.megabytes(pick(one["temp_bytes"] for one in own)) for pick in (min, max)]
        rows.append([name, *(_mean(own, target) for target in targets), " to ".join(memory)])
    note = f"The geometric mean over {', '.join(shapes)}, where memory is enough."
    headings = ["value and gradient, estimated", *targets, "temporary MB"]
    return Table(headings, rows, [note], words=1)


def _mean(programs: Sequence[dict[str, Any]], target: str) -> str:
    here = [one for one in programs if one["target"] == target and one["ratio"]]
    mark = "†" * any(one["notes"] for one in here)
    return f"{geometric_mean(one['ratio'] for one in here):.2f}{mark}" if here else "–"


def figure(section: dict[str, Any]) -> Figure:
    """Draw cycles of value and gradient against memory: a panel per chip, a point per program."""
    programs = _with_gradients(section)
    targets = list(dict.fromkeys(one["target"] for one in programs))
    drawn = Figure(figsize=(9, 7.4), layout="constrained")
    panels = drawn.subplots(2, -(-len(targets) // 2), sharex=True, sharey=True, squeeze=False)
    known = (figures.STYLES | OTHER_STYLES).items()
    styles = {name: style for name, style in known if name not in NOT_DRAWN}
    for target, axes in zip(targets, panels.flat, strict=False):
        figures.dress(axes)
        axes.set_title(target, loc="left", fontweight="bold")
        axes.set_xscale("log")
        axes.axhline(1, color=figures.FAINT, linewidth=1)
        points: dict[str, list[tuple[float, float]]] = {}
        for one in programs:
            if one["target"] == target and one["ratio"]:
                point = max(one["temp_bytes"] / 1e6, 1), one["ratio"]
                points.setdefault(one["name"], []).append(point)
        for name, found in points.items():
            if name in styles:
                marks = {"linestyle": "none", "markersize": 7, "markeredgewidth": 1}
                axes.plot(*zip(*found, strict=True), label=name, **styles[name] | marks)
    for axes in panels[-1]:
        axes.set_xlabel("temporary MB, at least 1")
    for axes in panels[:, 0]:
        axes.set_ylabel("cycles over those of optax")
    title = "linear head, value and gradient: estimated"
    drawn.suptitle(title, x=0.01, ha="left", fontweight="bold")
    figures.legend(drawn, panels[0, 0], beside=True)
    figures.origin(drawn, section)
    return drawn


def _with_gradients(section: dict[str, Any]) -> list[dict[str, Any]]:
    """Every program of value and gradient that fits, with its ratio where optax fits too."""
    return [
        row
        | {"target": case["target"], "on": f"{case['shape']} {case['dtype']}"}
        | {"ratio": row["cycles"] / baseline if (baseline := _baseline(case)) else None}
        for case in section["cases"]
        if case["mode"] == Mode.VALUE_AND_GRAD
        for row in case["contenders"]
        if row["cycles"] is not None
    ]


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
    mark = "†" * bool(row["notes"])
    return f"{_ratio(row['cycles'], baseline)}{mark}, {tables.megabytes(row['temp_bytes'])} MB"


def _ratio(taken: float, baseline: float | None) -> str:
    """Over the baseline's; where it does not compile, the cycles themselves."""
    return f"{taken / baseline:.2f}" if baseline else f"{taken / 1e6:.4g} Mcycles"


def _baseline(case: dict[str, Any]) -> float | None:
    return {row["name"]: row["cycles"] for row in case["contenders"]}.get(contenders.BASELINE)


def _not_counted(rows: Iterable[dict[str, Any]]) -> str:
    return NOT_COUNTED if any(row.get("notes") for row in rows) else ""
