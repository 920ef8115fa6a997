# SPDX-License-Identifier: Apache-2.0
"""README's tables of memory and time: a few rows of those in docs/benchmarks.md, of all devices."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bench import contenders, environment, tables, targets
from bench.cases import Mode, Op
from bench.tables import Table

COLUMNS = (
    contenders.OURS,
    "jaxsoftmax, recompute",
    contenders.BASELINE,
    "optax, checkpointed chunks",
    "tokamax",
    "jax-cce",
)


class Row(NamedTuple):
    """The case of a section that a row shows."""

    section: str
    shape: str
    dtype: str
    platform: str
    """What JAX calls it: cpu, gpu; or the target that the case is compiled for."""


def memory(files: Sequence[dict[str, Any]], rows: Sequence[Row]) -> Table:
    """Lay out the temporary memory of value and gradient."""

    def cell(row: dict[str, Any], _: dict[str, Any]) -> str:
        return tables.megabytes(row["temp_bytes"])

    note = "Of value and gradient beyond arguments and results, at tokens x width x classes."
    return _table("temporary MB", files, rows, cell, note)


def time(files: Sequence[dict[str, Any]], rows: Sequence[Row]) -> Table:
    """Lay out the time of value and gradient over optax's."""

    def cell(row: dict[str, Any], baseline: dict[str, Any]) -> str:
        key = "cycles" if "cycles" in row else "median_s"
        return f"{row[key] / baseline[key]:.2f}" + "†" * bool(row.get("notes"))

    note = (
        "Time of value and gradient over that of optax on all logits, upcast to float32. TPU: "
        f"{targets.ESTIMATE[0].lower()}{targets.ESTIMATE[1:]}"
    )
    table = _table("time ÷ optax's", files, rows, cell, note)
    marked = any("†" in cell for line in table.rows for cell in line)
    return table._replace(notes=[f"{table.notes[0]} {targets.NOT_COUNTED * marked}".strip()])


def _table(
    what: str,
    files: Sequence[dict[str, Any]],
    rows: Sequence[Row],
    cell: Callable[[dict[str, Any], dict[str, Any]], str],
    note: str,
) -> Table:
    lines, origins = [], {}
    for row in rows:
        section, case = _find(files, row)
        found = {one["name"]: one for one in case["contenders"]}
        baseline = found[contenders.BASELINE]
        cells = (cell(found[name], baseline) if name in found else "–" for name in COLUMNS)
        kind = "head" if Op(section["op"]).heads else "logits"
        lines.append([f"{_where(section, case)}, {kind} {row.shape} {row.dtype}", *cells])
        words, date = environment.briefly(section["environment"])
        origins.setdefault(words, set()).add(date)
    origin = "; ".join(f"{words}, {' and '.join(sorted(o))}" for words, o in origins.items())
    return Table([what, *COLUMNS], lines, [f"{note} {origin}."], words=1)


def _find(files: Sequence[dict[str, Any]], row: Row) -> tuple[dict[str, Any], dict[str, Any]]:
    for section in (file[row.section] for file in files if row.section in file):
        for case in section["cases"]:
            where = case.get("target") or section["environment"]["platform"]
            found = row.section, case["shape"], case["dtype"], where
            if case["mode"] == Mode.VALUE_AND_GRAD and found == row:
                return section, case
    raise ValueError(f"no {row.shape} {row.dtype} on {row.platform} in {row.section}")


def _where(section: dict[str, Any], case: dict[str, Any]) -> str:
    if "target" in case:
        return f"TPU {case['target']}"
    where = section["environment"]
    return "CPU" if where["platform"] == "cpu" else where["device"]
