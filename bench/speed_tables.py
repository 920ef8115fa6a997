# SPDX-License-Identifier: Apache-2.0
"""What `python -m bench speed` measured: tables for the terminal, README and docs, a figure."""

from collections.abc import Iterator
from typing import Any

from matplotlib.figure import Figure

from bench import contenders, figures, tables, timing
from bench.cases import BYTES_MODEL, Labels, Mode, Op
from bench.tables import Table

OURS, BASELINE = contenders.OURS, contenders.BASELINE
IN_RATIOS = (Mode.FORWARD, Mode.VALUE_AND_GRAD)


def in_terminal(section: dict[str, Any]) -> list[Table]:
    """Lay out everything: one table per dtype and mode, then the geometric means."""
    head = Op(section["op"]).heads
    rate = "GFLOP/s" if head else "GB/s"
    headings = [
        *("head" if head else "logits", "who"),
        *("ms", "±", rate, "of roof", "temp MB", "ours ÷", "compile s"),
    ]
    groups: dict[tuple[str, str], list[list[str]]] = {}
    for case in section["cases"]:
        groups.setdefault((case["dtype"], case["mode"]), []).extend(_everything(case))
    found = [
        Table(headings, rows, title=f"{mode}, {dtype}, {_what(section)}")
        for (dtype, mode), rows in groups.items()
    ]
    if len({case["shape"] for case in section["cases"]}) > 1:
        found.append(_summary(section))
    notes = (
        f"{'tokens x hidden x classes' if head else 'tokens x classes'}. ms: the median of calls, "
        "all contenders in turn; ±: the quartile farther from it. "
        f"ours ÷: the median of {OURS} over this one: below 1, {OURS} is faster "
        "(of choices of classes, the same choice by ours).",
        f"{rate}: what must be done at least, over the time. {_model(section)}",
        timing.roofs_in_words(section["roofs"]),
        "temp MB: what the compiled program allocates beyond its arguments and results.",
        _explained(section),
        tables.origin(section),
    )
    return [*found[:-1], found[-1]._replace(notes=notes)]


def _everything(case: dict[str, Any]) -> Iterator[list[str]]:
    work = case["flops"] or case["bytes"]
    for row in case["contenders"]:
        yield [
            case["shape"] if row is case["contenders"][0] else "",
            row["name"],
            milliseconds(row["median_s"]),
            _spread(row),
            f"{work / row['median_s'] / 1e9:.1f}",
            of_the_roof(row),
            tables.megabytes(row["temp_bytes"]),
            "" if row["name"] == OURS else f"{row['ratio']:.2f}",
            "–" if row["compile_s"] is None else f"{row['compile_s']:.2f}",
        ]


def _summary(section: dict[str, Any]) -> Table:
    rows = [
        [
            *(row[key] for key in ("dtype", "mode")),
            f"{row['contender']}, {row['divergence'].upper()}"
            if row.get("divergence")
            else row["contender"],
            *(f"{row[key]:.2f}" for key in ("ratio", "best", "worst")),
            row["worst_shape"],
        ]
        for row in section["geometric_means"]
    ]
    headings = ("dtype", "mode", "theirs", "geometric mean", "best", "worst", "at")
    title = f"{OURS}'s time ÷ theirs (below 1: {OURS} is faster)"
    return Table(headings, rows, title=title, words=3)


def ratios(section: dict[str, Any]) -> list[Table]:
    """Lay out the ratios of logits, with the geometric means below each dtype."""
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
        for mode in IN_RATIOS
        for name in names
        if name != OURS and (mode, name) in measured
    ]
    headings = ["logits", "dtype", *(f"{mode} ÷ {name}" for mode, name in columns)]
    rows = [
        [shape, dtype, *(f"{row[at]:.2f}" if at in row else "–" for at in columns)]
        for group in dict.fromkeys(dtype for _, dtype in found)
        for (shape, dtype), row in found.items()
        if dtype == group
    ]
    explained = contenders.explain(name for _, name in columns)
    return [Table(headings, rows, [explained, tables.origin(section)])]


def over_baseline(section: dict[str, Any]) -> Table:
    """Lay out heads: time of value and gradient over optax's, temporary memory."""

    def cell(row: dict[str, Any], case: dict[str, Any]) -> str:
        if BASELINE not in case:
            return "–"
        ratio = f"{row['median_s'] / case[BASELINE]['median_s']:.2f}"
        memory = row["temp_bytes"]
        return ratio if memory is None else f"{ratio}, {tables.megabytes(memory)} MB"

    cases = _with_gradients(section)
    headings = ["value and gradient", *(f"{case['shape']} {case['dtype']}" for case in cases)]
    note = f"Each cell: the time over that of {BASELINE}, temporary memory."
    return Table(headings, tables.by_contender(cases, cell), [note], words=1)


def ignored_in_docs(section: dict[str, Any]) -> list[Table]:
    """Lay out what heads take whose tokens are ignored, with what it is over those without."""

    def cell(row: dict[str, Any], _: dict[str, Any]) -> str:
        if "error" in row:
            return row["error"]
        first = (
            f"{row['cycles'] / 1e6:.3g}"
            if "cycles" in row
            else f"{milliseconds(row['median_s'])} ± {_spread(row)}"
        )
        return f"{first}, {row['of_base']:.2f}, {tables.megabytes(row['temp_bytes'])} MB"

    groups: dict[str, dict[str, dict[str, Any]]] = {}
    for case in section["cases"]:
        fraction, target = case["ignored"], case.get("target")
        head = f"{case['shape']} {case['dtype']}" + (f", {target}" if target else "")
        column = "no ignore_index" if fraction is None else f"{100 * fraction:g} % ignored"
        groups.setdefault(head, {})[column] = case
    rows = [
        ["" if place else head, *row]
        for head, columns in groups.items()
        for place, row in enumerate(tables.by_contender([*columns.values()], cell))
    ]
    runs = section["environment"]["device"]
    first = "the median in ms, the quartile farther from it, " if runs else "Mcycles, "
    notes = (
        f"Each cell: {first}{'the time' if runs else 'the cycles'} of value and "
        f"gradient over that without ignore_index (of {BASELINE}: over that of {OURS}), temporary "
        "memory. The ignored tokens are chosen at random.",
        "" if runs else "Not a measured time: the cycles that XLA for TPUs plans with.",
        contenders.explain(contenders.names(section["cases"])),
        tables.origin(section),
    )
    return [Table(["head", "by", *next(iter(groups.values()))], rows, notes)]


def logits_in_docs(section: dict[str, Any]) -> list[Table]:
    """Lay logits out for docs/benchmarks.md: the ratios, then every median."""
    return [ratios(section)[0]._replace(notes=()), *details(section)]


def heads_in_docs(section: dict[str, Any]) -> list[Table]:
    """Lay heads out for docs/benchmarks.md: over optax's, then every median."""
    return [over_baseline(section), *details(section)]


def details(section: dict[str, Any]) -> list[Table]:
    """Lay a section out for docs/benchmarks.md: every median, with its fraction of the roof."""
    modes = list(dict.fromkeys(case["mode"] for case in section["cases"]))
    found: dict[str, dict[str, dict[str, str]]] = {}
    for case in section["cases"]:
        of_case = found.setdefault(f"{case['shape']} {case['dtype']}", {})
        for row in case["contenders"]:
            of_case.setdefault(row["name"], {})[case["mode"]] = (
                f"{milliseconds(row['median_s'])} ± {_spread(row)}, {of_the_roof(row)}"
            )
    rows = [
        [shape if name == next(iter(of_case)) else "", name, *(cells.get(m, "–") for m in modes)]
        for shape, of_case in found.items()
        for name, cells in of_case.items()
    ]
    notes = (
        "Each cell: the median, the quartile farther from it, the fraction of the roof. "
        + _model(section),
        timing.roofs_in_words(section["roofs"]),
        contenders.explain(contenders.names(section["cases"])),
        tables.origin(section),
    )
    kind = "head" if section["op"] == Op.LINEAR else "logits"
    return [Table([kind, "by", *(f"{mode}, ms" for mode in modes)], rows, notes)]


def of_divergences(section: dict[str, Any]) -> list[Table]:
    """Lay divergences out for docs/benchmarks.md: time, that over optax's, temporary memory."""
    modes = list(dict.fromkeys(case["mode"] for case in section["cases"]))
    found: dict[str, dict[str, dict[str, str]]] = {}
    for case in section["cases"]:
        of_case = found.setdefault(f"{case['shape']} {case['dtype']}", {})
        base = {row["name"]: row["median_s"] for row in case["contenders"]}.get(BASELINE)
        for row in case["contenders"]:
            parts = [
                f"{milliseconds(row['median_s'])} ± {_spread(row)}",
                f"{row['median_s'] / base:.2f}" if base else "",
                f"{tables.megabytes(row['temp_bytes'])} MB" if row["temp_bytes"] else "",
            ]
            cell = ", ".join(filter(None, parts))
            of_case.setdefault(row["name"], {})[case["mode"]] = cell
    rows = [
        [shape if name == next(iter(of_case)) else "", name, *(cells.get(m, "–") for m in modes)]
        for shape, of_case in found.items()
        for name, cells in of_case.items()
    ]
    notes = (
        "Each cell: the median in ms, the quartile farther from it, the median over that of "
        f"{BASELINE}, temporary memory if any. value-and-grad is by the logits"
        f"{' (by hidden and kernel of the first head)' if Op(section['op']).heads else ''}, "
        "value-and-both-grads by the target too.",
        f"{_explained(section)} {contenders.MIXTURE}",
        tables.origin(section),
    )
    kind = "heads" if Op(section["op"]).heads else "logits"
    return [Table([kind, "by", *(f"{mode}, ms" for mode in modes)], rows, notes)]


def figure(section: dict[str, Any]) -> Figure:
    """Draw heads' time of value and gradient against the number of classes."""
    return figures.against_vocabulary(
        section,
        (
            (case["classes"], row["name"], 1e3 * row["median_s"])
            for case in _with_gradients(section)
            for row in case["contenders"]
        ),
        "ms",
    )


def _explained(section: dict[str, Any]) -> str:
    return contenders.explain(contenders.names(section["cases"]), Op(section["op"]))


def _model(section: dict[str, Any]) -> str:
    op = Op(section["op"])
    return "Bytes: " + BYTES_MODEL[Labels(section["labels"]) if op is Op.LOGITS else op]


def _what(section: dict[str, Any]) -> str:
    op = Op(section["op"])
    if op.divergence:
        return "divergence of two linear heads" if op.heads else "divergence of logits"
    if op.heads:
        return "linear head"
    return f"{section['labels']} labels" + (", confident" if section["confident"] else "")


def _with_gradients(section: dict[str, Any]) -> list[dict[str, Any]]:
    return [case for case in section["cases"] if case["mode"] == Mode.VALUE_AND_GRAD]


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
