# SPDX-License-Identifier: Apache-2.0
"""`python -m bench speed`: time of softmax cross-entropy on logits; the command for heads too."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from bench import contenders, environment, head, markdown, results, terminal, timing
from bench.cases import (
    BYTES_MODEL,
    SHAPES,
    Case,
    Dtype,
    Labels,
    Mode,
    Op,
    Shape,
    inputs,
    parse_shape,
    program,
)

DTYPES = (Dtype.FLOAT32, Dtype.BFLOAT16)
MODES = (Mode.FORWARD, Mode.VALUE_AND_GRAD)
SECONDS = 20.0
QUICK_FRACTION, QUICK_ROUNDS = 16, 5


def command(
    *,
    op: Annotated[
        Op, typer.Option(help="Losses of given logits, or linear heads with their loss.")
    ] = Op.LOGITS,
    shapes: Annotated[
        list[str] | None,
        typer.Option(
            "--shape",
            metavar="TOKENSxCLASSES",
            help="A shape of the logits, or a head as TOKENSxHIDDENxCLASSES[:DTYPE]; repeatable.",
            show_default=", ".join(map(str, (*SHAPES, *head.CASES))),
        ),
    ] = None,
    dtypes: Annotated[
        list[Dtype] | None,
        typer.Option(
            "--dtype",
            help="A dtype of the logits; repeatable.",
            show_default=", ".join(DTYPES),
        ),
    ] = None,
    modes: Annotated[
        list[Mode] | None,
        typer.Option("--mode", help="What to compute; repeatable.", show_default="both"),
    ] = None,
    labels: Annotated[
        Labels,
        typer.Option(help="Targets as class numbers, or as one distribution a row."),
    ] = Labels.INTEGER,
    repeats: Annotated[
        int | None,
        typer.Option(
            min=1, help="Rounds a case.", show_default=f"as many as fit in {SECONDS:.0f} seconds"
        ),
    ] = None,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help=f"A look, not a measurement: 1/{QUICK_FRACTION} of the tokens, "
            f"{QUICK_ROUNDS} rounds.",
        ),
    ] = False,
    json: Annotated[
        Path | None,
        typer.Option(
            help="The results file; its other sections are kept.",
            show_default=results.DEFAULT,
        ),
    ] = None,
) -> None:
    """Time the losses on logits, or the linear heads: ours and the others'.

    Every contender is compiled ahead, warmed up, and timed once a round in random order; the
    tables show medians and quartiles. A complete run takes about eight minutes on two cores, the
    linear heads several times that.
    """
    integer = labels == Labels.INTEGER
    options = {
        "op": op if op != Op.LOGITS else None,
        "shape": shapes,
        "dtype": dtypes,
        "mode": modes,
        "labels": None if integer else labels,
        "repeats": repeats,
        "quick": quick,
    }
    chooses = any(options[name] for name in ("shape", "dtype", "mode", "repeats", "quick"))
    path = results.destination(json, complete=not chooses)
    fraction = QUICK_FRACTION if quick else 1
    repeats = repeats or (QUICK_ROUNDS if quick else None)
    if op == Op.LINEAR:
        if dtypes or modes or not integer:
            raise typer.BadParameter(
                "--op linear takes value and gradient with integer labels; a dtype is part of "
                "--shape",
                param_hint="--dtype, --mode, --labels",
            )
        heads = [head.parse(shape) for shape in shapes] if shapes else head.CASES
        heads = [case._replace(tokens=max(1, case.tokens // fraction)) for case in heads]
        key, section = head.KEY, head.measure(heads, repeats=repeats)
        printed = head.tables(section)
    else:
        chosen = [parse_shape(shape) for shape in shapes] if shapes else SHAPES
        chosen = [Shape(max(1, tokens // fraction), classes) for tokens, classes in chosen]
        key = f"speed/{labels}"
        section = measure(chosen, dtypes or DTYPES, modes or MODES, labels, repeats=repeats)
        printed = tables(section)
    section["command"] = results.command_line("speed", options)
    console = terminal.output()
    for table in printed:
        console.print(table, "")
    if path:
        results.save(path, key, section)
        terminal.notes.print(f"written: {path}")


def measure(
    shapes: Sequence[Shape],
    dtypes: Sequence[Dtype],
    modes: Sequence[Mode],
    labels: Labels,
    *,
    repeats: int | None = None,
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """Time every contender on every case.

    Args:
        shapes: of the logits.
        dtypes: of the logits.
        modes: what to compute.
        labels: how the targets are given.
        repeats: rounds a case; None for as many as fit in `seconds`.
        seconds: time for a case when `repeats` is None.

    Returns:
        A section of the results file.
    """
    entries = contenders.LOGITS[labels]
    found = {dtype: contenders.load(entries, dtype) for dtype in dtypes}
    left_out = list(dict.fromkeys(line for _, lines in found.values() for line in lines))
    for line in left_out:
        terminal.notes.print(line)

    cases = []
    with terminal.progress() as progress:
        task = progress.add_task("", total=len(shapes) * len(dtypes) * len(modes))
        for shape, dtype in itertools.product(shapes, dtypes):
            progress.update(task, description=f"{shape} {dtype}", refresh=True)
            # One rotation of inputs at a time: the largest is near a gigabyte.
            rotation = inputs(shape, dtype, labels)
            for mode in modes:
                case = Case(shape, dtype, mode, labels)
                progress.update(task, description=f"{shape} {dtype} {mode}", refresh=True)
                cases.append(_time(case, found[dtype][0], rotation, repeats, seconds))
                progress.advance(task)
            del rotation

    return {
        "environment": environment.describe(),
        "labels": labels.value,
        "left_out": left_out,
        "cases": cases,
        "geometric_means": compare(cases),
    }


def _time(
    case: Case,
    found: Sequence[contenders.Contender],
    rotation: Sequence[tuple[Any, Any]],
    repeats: int | None,
    seconds: float,
) -> dict[str, Any]:
    programs, compile_s = {}, {}
    for name, loss, _ in found:
        programs[name], compile_s[name] = timing.compile_ahead(
            program(loss, case.mode), rotation[0]
        )
    timings = timing.interleave(programs, rotation, rounds=repeats, seconds=seconds)
    ours = timings[contenders.OURS].median_s
    return {
        "tokens": case.shape.tokens,
        "classes": case.shape.classes,
        "dtype": case.dtype.value,
        "mode": case.mode.value,
        "bytes": case.bytes,
        "contenders": [
            {
                "name": name,
                **taken._asdict(),
                "compile_s": compile_s[name],
                "ratio": ours / taken.median_s,
            }
            for name, taken in timings.items()
        ],
    }


def compare(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average our time over each other contender's, over the shapes, for each dtype and mode."""
    ratios: dict[tuple[str, str, str], dict[str, float]] = {}
    for case in cases:
        shape = str(Shape(case["tokens"], case["classes"]))
        for row in case["contenders"]:
            if row["name"] != contenders.OURS:
                key = case["dtype"], case["mode"], row["name"]
                ratios.setdefault(key, {})[shape] = row["ratio"]
    return [
        {
            "dtype": dtype,
            "mode": mode,
            "contender": name,
            "ratio": results.geometric_mean(by_shape.values()),
            "best": min(by_shape.values()),
            "worst": max(by_shape.values()),
            "worst_shape": max(by_shape, key=lambda shape: by_shape[shape]),
        }
        for (dtype, mode, name), by_shape in ratios.items()
    ]


def tables(section: dict[str, Any]) -> Iterator[Table]:
    """Yield a section's tables: one a dtype and mode, then the summary."""
    labels = Labels(section["labels"])
    groups = list(dict.fromkeys((case["dtype"], case["mode"]) for case in section["cases"]))
    for dtype, mode in groups:
        table = Table(title=f"{mode}, {dtype}, {labels} labels", title_justify="left")
        table.add_column("logits")
        table.add_column("who")
        headings = "median ms", "quartiles", "GB/s", f"{contenders.OURS} ÷ this", "compile s"
        for heading in headings:
            table.add_column(heading, justify="right")
        for case in section["cases"]:
            if (case["dtype"], case["mode"]) == (dtype, mode):
                _add_case(table, case)
        yield table

    names = [row["name"] for case in section["cases"] for row in case["contenders"]]
    summary = Table(
        title=f"{contenders.OURS}'s time ÷ theirs (below 1: {contenders.OURS} is faster)",
        title_justify="left",
        caption=f"Ratios of medians. GB/s from the bytes that must move: {BYTES_MODEL[labels]}\n"
        f"{contenders.explain(names)}\n{environment.in_words(section['environment'])}",
        caption_justify="left",
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
    yield summary


def _add_case(table: Table, case: dict[str, Any]) -> None:
    shape = str(Shape(case["tokens"], case["classes"]))
    for row in case["contenders"]:
        ours = row["name"] == contenders.OURS
        table.add_row(
            shape if row is case["contenders"][0] else "",
            row["name"],
            milliseconds(row["median_s"]),
            f"{milliseconds(row['q1_s'])} – {milliseconds(row['q3_s'])}",
            f"{case['bytes'] / row['median_s'] / 1e9:.1f}",
            "" if ours else f"{row['ratio']:.2f}",
            f"{row['compile_s']:.2f}",
            style="bold" if ours else None,
        )
    table.add_section()


def as_markdown(section: dict[str, Any]) -> str:
    """Lay a section out for the README: only the ratios, the geometric means under each dtype."""
    ratios: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    for case in section["cases"]:
        row = ratios.setdefault((str(Shape(case["tokens"], case["classes"])), case["dtype"]), {})
        for contender in case["contenders"]:
            row[case["mode"], contender["name"]] = contender["ratio"]
    for mean in section["geometric_means"]:
        row = ratios.setdefault(("**geometric mean**", mean["dtype"]), {})
        row[mean["mode"], mean["contender"]] = mean["ratio"]

    measured = {column for row in ratios.values() for column in row}
    names = [entry.name for entry in contenders.LOGITS[Labels(section["labels"])]]
    columns = [
        (mode, name)
        for mode in dict.fromkeys(case["mode"] for case in section["cases"])
        for name in names
        if name != contenders.OURS and (mode, name) in measured
    ]
    table = markdown.table(
        ["logits", "dtype", *(f"{mode} ÷ {name}" for mode, name in columns)],
        [
            [shape, dtype, *(f"{row[at]:.2f}" if at in row else "–" for at in columns)]
            for group in dict.fromkeys(dtype for _, dtype in ratios)
            for (shape, dtype), row in ratios.items()
            if dtype == group
        ],
    )
    explained = contenders.explain(name for _, name in columns)
    return "\n".join([table, "", *filter(None, [explained]), markdown.origin(section)])


def milliseconds(seconds: float) -> str:
    """Write a time in milliseconds: three digits, at most three of them decimals."""
    value = float(f"{seconds * 1e3:.3g}")
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:.{decimals}f}"
