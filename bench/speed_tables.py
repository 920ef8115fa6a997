# SPDX-License-Identifier: Apache-2.0
"""What `python -m bench speed` measured: tables for the terminal, README and docs, a figure."""

from collections.abc import Iterator
from typing import Any

from matplotlib.figure import Figure
from rich import box
from rich.table import Table

from bench import contenders, environment, figures, markdown, roofs
from bench.cases import BYTES_MODEL, Labels, Mode, Op

OURS, BASELINE = contenders.OURS, contenders.BASELINE
IN_README = (Mode.FORWARD, Mode.VALUE_AND_GRAD)


def tables(section: dict[str, Any]) -> Iterator[Table]:
    """Yield a section's tables for the terminal: one a dtype and mode, then the summary."""
    head = section["op"] == Op.LINEAR
    groups = dict.fromkeys((case["dtype"], case["mode"]) for case in section["cases"])
    for dtype, mode in groups:
        table = Table(title=f"{mode}, {dtype}, {_what(section)}", box=box.SIMPLE_HEAD)
        table.add_column("head" if head else "logits")
        table.add_column("who")
        rate = "GFLOP/s" if head else "GB/s"
        for heading in ("ms", "±", rate, "of roof", "temp MB", "ours ÷", "compile s"):
            table.add_column(heading, justify="right")
        for case in section["cases"]:
            if (case["dtype"], case["mode"]) == (dtype, mode):
                _add_case(table, case)
        yield table
    if len({case["shape"] for case in section["cases"]}) > 1:
        yield _summary(section)


def _add_case(table: Table, case: dict[str, Any]) -> None:
    work = case["flops"] or case["bytes"]
    for row in case["contenders"]:
        ours = row["name"] == OURS
        table.add_row(
            case["shape"] if row is case["contenders"][0] else "",
            row["name"],
            milliseconds(row["median_s"]),
            _spread(row),
            f"{work / row['median_s'] / 1e9:.1f}",
            of_the_roof(row),
            markdown.megabytes(row["temp_bytes"]),
            "" if ours else f"{row['ratio']:.2f}",
            "–" if row["compile_s"] is None else f"{row['compile_s']:.2f}",
            style="bold" if ours else None,
        )
    table.add_section()


def _summary(section: dict[str, Any]) -> Table:
    summary = Table(
        title=f"{OURS}'s time ÷ theirs (below 1: {OURS} is faster)",
        box=box.SIMPLE_HEAD,
    )
    for heading in ("dtype", "mode", "theirs"):
        summary.add_column(heading)
    for heading in ("geometric mean", "best", "worst", "at"):
        summary.add_column(heading, justify="right")
    for row in section["geometric_means"]:
        summary.add_row(
            *(row[key] for key in ("dtype", "mode", "contender")),
            *(f"{row[key]:.2f}" for key in ("ratio", "best", "worst")),
            row["worst_shape"],
        )
    return summary


def notes(section: dict[str, Any]) -> str:
    """Say what the tables for the terminal show."""
    head = section["op"] == Op.LINEAR
    lines = (
        f"{'tokens x hidden x classes' if head else 'tokens x classes'}. ms: the median of calls, "
        "all contenders in turn; ±: the quartile farther from it. "
        f"ours ÷: the median of {OURS} over this one: below 1, {OURS} is faster.",
        f"{'GFLOP/s' if head else 'GB/s'}: what must be done at least, over the time. "
        + _model(section),
        roofs.in_words(section["roofs"]),
        "temp MB: what the compiled program allocates beyond its arguments and results.",
        contenders.explain(_names(section["cases"])),
        environment.in_words(section["environment"]),
    )
    return "\n".join(filter(None, lines))


def ratios(section: dict[str, Any]) -> str:
    """Lay logits out for the README: only the ratios, the geometric means under each dtype."""
    found: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    for case in section["cases"]:
        row = found.setdefault((case["shape"], case["dtype"]), {})
        for contender in case["contenders"]:
            row[case["mode"], contender["name"]] = contender["ratio"]
    for mean in section["geometric_means"]:
        row = found.setdefault(("**geometric mean**", mean["dtype"]), {})
        row[mean["mode"], mean["contender"]] = mean["ratio"]

    measured = {column for row in found.values() for column in row}
    names = [entry.name for entry in contenders.LOGITS[Labels(section["labels"])]]
    columns = [
        (mode.value, name)
        for mode in IN_README
        for name in names
        if name != OURS and (mode, name) in measured
    ]
    table = markdown.table(
        ["logits", "dtype", *(f"{mode} ÷ {name}" for mode, name in columns)],
        [
            [shape, dtype, *(f"{row[at]:.2f}" if at in row else "–" for at in columns)]
            for group in dict.fromkeys(dtype for _, dtype in found)
            for (shape, dtype), row in found.items()
            if dtype == group
        ],
    )
    explained = contenders.explain(name for _, name in columns)
    return "\n".join([table, "", *filter(None, [explained]), markdown.origin(section)])


def over_baseline(section: dict[str, Any]) -> str:
    """Lay heads out for the README: time of value and gradient over optax's, temporary memory."""
    cases = [case for case in section["cases"] if case["mode"] == Mode.VALUE_AND_GRAD]
    rows = []
    for name in _names(cases):
        cells = []
        for case in cases:
            by_name = {row["name"]: row for row in case["contenders"]}
            row, base = by_name.get(name), by_name.get(BASELINE)
            if row is None or base is None:
                cells.append("–")
            else:
                memory = row["temp_bytes"]
                cell = f"{row['median_s'] / base['median_s']:.2f}"
                cells.append(cell if memory is None else f"{cell}, {markdown.megabytes(memory)} MB")
        rows.append([name, *cells])
    headings = [f"{case['shape']} {case['dtype']}" for case in cases]
    table = markdown.table(["value and gradient", *headings], rows, words=1)
    explained = contenders.explain(_names(cases))
    return "\n".join([table, "", *filter(None, [explained]), markdown.origin(section)])


def details(section: dict[str, Any]) -> str:
    """Lay a section out for docs/benchmarks.md: every median, with its fraction of the roof."""
    modes = list(dict.fromkeys(case["mode"] for case in section["cases"]))
    rows: dict[tuple[str, str], dict[str, str]] = {}
    for case in section["cases"]:
        for row in case["contenders"]:
            rows.setdefault((f"{case['shape']} {case['dtype']}", row["name"]), {})[case["mode"]] = (
                f"{milliseconds(row['median_s'])} ± {_spread(row)}, {of_the_roof(row)}"
            )
    shown: set[str] = set()
    lines = []
    for (shape, name), cells in rows.items():
        lines.append(
            ["" if shape in shown else shape, name, *(cells.get(mode, "–") for mode in modes)]
        )
        shown.add(shape)
    kind = "head" if section["op"] == Op.LINEAR else "logits"
    table = markdown.table([kind, "by", *(f"{mode}, ms" for mode in modes)], lines)
    notes = (
        "Each cell: the median, the quartile farther from it, the fraction of the roof. "
        + _model(section),
        roofs.in_words(section["roofs"]),
        contenders.explain(_names(section["cases"])),
        markdown.origin(section),
    )
    return "\n".join([table, "", *filter(None, notes)])


def figure(section: dict[str, Any]) -> Figure:
    """Draw heads' time of value and gradient against the number of classes."""
    cases = [case for case in section["cases"] if case["mode"] == Mode.VALUE_AND_GRAD]
    first = cases[0]
    return figures.against_vocabulary(
        section,
        (
            (case["classes"], row["name"], 1e3 * row["median_s"])
            for case in cases
            for row in case["contenders"]
        ),
        title="linear head, value and gradient: "
        f"{first['tokens']} tokens, width {first['hidden']}, {first['dtype']}",
        unit="ms",
    )


def _model(section: dict[str, Any]) -> str:
    head = section["op"] == Op.LINEAR
    return "Bytes: " + BYTES_MODEL[Op.LINEAR if head else Labels(section["labels"])]


def _what(section: dict[str, Any]) -> str:
    if section["op"] == Op.LINEAR:
        return "linear head"
    return f"{section['labels']} labels" + (", confident" if section["confident"] else "")


def _names(cases: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(row["name"] for case in cases for row in case["contenders"]))


def _spread(row: dict[str, Any]) -> str:
    farther = max(row["q3_s"] - row["median_s"], row["median_s"] - row["q1_s"])
    return f"{100 * farther / row['median_s']:.0f} %"


def of_the_roof(row: dict[str, Any]) -> str:
    """Write a row's fraction of the roof."""
    return "–" if row["of_roof"] is None else f"{100 * row['of_roof']:.0f} %"


def milliseconds(seconds: float) -> str:
    """Write a time in milliseconds: three digits, at most three of them decimals."""
    value = float(f"{seconds * 1e3:.3g}")
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{decimals}f}"
