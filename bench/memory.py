# SPDX-License-Identifier: Apache-2.0
"""`python -m bench memory`: temporary memory of the compiled linear head, TPUs without a TPU."""

import os
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from matplotlib.figure import Figure
from rich.table import Table

from bench import (
    contenders,
    environment,
    figures,
    markdown,
    options,
    peak,
    results,
    sharding,
    terminal,
    timing,
)
from bench.cases import Dtype, Head, Mode, Size, head_of

KEY = "memory"
HERE = "here"
# Generations of TPU, each by a topology of it: one of its chips is compiled for.
TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
CASES = (
    Head(8192, 2304, 256000, Dtype.BFLOAT16),
    Head(4096, 4096, 128256, Dtype.BFLOAT16),
    Head(2048, 768, 50257, Dtype.FLOAT32),
)


def command(
    *,
    tokens: options.Tokens = None,
    hidden: options.Hidden = None,
    vocab: options.Vocab = None,
    dtypes: options.Dtypes = None,
    models: options.Models = None,
    size: options.TheSize = Size.REGULAR,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            help=f"{HERE!r} or a TPU generation ({', '.join(TPUS)}, needs libtpu); repeatable.",
            show_default="all",
        ),
    ] = None,
    meshes: Annotated[
        list[sharding.Devices] | None,
        typer.Option(
            "--mesh",
            parser=sharding.parse,
            metavar="TOPOLOGY/data=N,vocab=M",
            help="Instead: our heads, by layout, over a TPU topology (or 'here'); repeatable.",
        ),
    ] = None,
    peaks: Annotated[
        bool,
        typer.Option(
            "--peak",
            metavar="",  # it takes no value
            help="Instead: run every head, PyTorch's too, on this machine's CPU, each in a process "
            "of its own, and read how far its resident memory rises.",
        ),
    ] = False,
    device: options.Device = None,
    output: options.Output = results.DEFAULT,
) -> None:
    """Compile value and gradient of every JAX head, and read what memory it needs.

    Nothing is run but with --peak, so shapes may be larger than this machine.
    """
    environment.use(device)
    unknown = [target for target in targets or () if target not in (HERE, *TPUS)]
    if unknown:
        raise typer.BadParameter(
            f"expected {', '.join((HERE, *TPUS))}; got {unknown[0]!r}", param_hint="--target"
        )
    if sum(map(bool, (targets, meshes, peaks))) > 1:
        raise typer.BadParameter("expected one of them", param_hint="--target, --mesh, --peak")
    selection = options.Selection(tokens, hidden, vocab, dtypes, models, size)
    chosen = selection.given()
    what = {"target": targets, "mesh": meshes, "peak": peaks}
    complete = not (any(chosen.values()) or targets or meshes)
    path = results.destination(output)
    cases = selection.cases(peak.CASES if peaks else CASES)
    if meshes:
        if len(cases) != 1:
            raise typer.BadParameter(f"expected one head; got {len(cases)}", param_hint="--mesh")
        section = {
            "environment": environment.describe(),
            "head": str(cases[0]),
            "meshes": [sharding.measure(cases[0], mesh) for mesh in meshes],
        }
    elif peaks:
        section = peak.measure(cases)
    else:
        section = measure(cases, targets or (HERE, *TPUS))
    section["command"] = results.command_line("memory", what | chosen)
    layout = sharding.table if meshes else peak.table if peaks else table
    terminal.show(layout(section))
    key = peak.KEY if peaks else KEY
    results.keep(path, section, key if complete else None)


def measure(cases: Sequence[Head], targets: Sequence[str]) -> dict[str, Any]:
    """Compile every JAX contender for every case and target.

    Returns:
        A section of the results file.
    """
    found, left_out = contenders.load(contenders.HEAD + contenders.TIED, Dtype.BFLOAT16)
    found = [contender for contender in found if contender.entry.jax]
    measured = []
    with terminal.progress() as progress:
        task = progress.add_task("", total=len(targets) * len(cases) * len(found))
        for target in targets:
            try:
                device = _device(target)
            except Exception as error:  # libtpu absent, or it does not know the topology
                left_out.append(f"left out: {target} ({str(error).splitlines()[0][:120]})")
                progress.advance(task, len(cases) * len(found))
                continue
            for case in cases:
                rows = []
                for contender in found:
                    progress.update(
                        task, description=f"{target}: {case} {contender.name}", refresh=True
                    )
                    if target == HERE or not contender.entry.whole:
                        compiled = _compile(contender, case, device)
                        rows.append({"name": contender.name, **compiled})
                    progress.advance(task)
                measured.append({**case._asdict(), "target": target, "contenders": rows})
    for line in left_out:
        terminal.notes.print(line)
    return {"environment": environment.describe(), "left_out": left_out, "cases": measured}


def _device(target: str) -> Any:
    if target == HERE:
        return jax.devices()[0]
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    return topologies.get_topology_desc(TPUS[target], platform="tpu").devices[0]


def _compile(contender: contenders.Contender, case: Head, device: Any) -> dict[str, Any]:
    sharding = SingleDeviceSharding(device)
    kernel = (case.hidden, case.classes)
    if contender.entry in contenders.TIED:
        kernel = kernel[::-1]
    arguments = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for shape, dtype in (
            ((case.tokens, case.hidden), case.dtype),
            (kernel, case.dtype),
            ((case.tokens,), jnp.int32),
        )
    ]
    program = contenders.program(contender, Mode.VALUE_AND_GRAD, case.parameters)
    try:
        traced = jax.jit(program).trace(*arguments)
        compiled = traced.lower(lowering_platforms=(device.platform,)).compile()
    except Exception as error:  # too large for the device, or not for it at all
        if contender.entry.module == "ours":
            raise
        return {"temp_bytes": None, "error": f"{type(error).__name__}: {error}"[:200]}
    return {"temp_bytes": timing.temporary_bytes(compiled)}


def table(section: dict[str, Any]) -> Table:
    """Lay a section out for the terminal: one column a case and target."""
    out = Table(
        title="temporary MB of value and gradient, compiled",
        caption=environment.in_words(section["environment"]),
    )
    headings, rows = _columns(section)
    out.add_column("who")
    for heading in headings:
        out.add_column(heading, justify="right")
    for name, cells in rows.items():
        out.add_row(name, *cells, style="bold" if name == contenders.OURS else None)
    return out


def as_markdown(section: dict[str, Any]) -> str:
    """Lay a section out for docs/benchmarks.md: a table a target."""
    parts = []
    for target in dict.fromkeys(case["target"] for case in section["cases"]):
        parts += [_markdown(_only(section, target)), ""]
    return "\n".join([*parts, markdown.origin(section)])


def in_readme(section: dict[str, Any]) -> str:
    """Lay a section out for the README: this machine and one TPU."""
    return f"{_markdown(_only(section, HERE, 'v5e'))}\n\n{markdown.origin(section)}"


def figure(section: dict[str, Any]) -> Figure:
    """Draw temporary memory on the first target against the number of classes."""
    first = section["cases"][0]
    section = _only(section, first["target"])
    return figures.against_vocabulary(
        section,
        (
            (head.classes, name, count / 1e6)
            for _, head, name, count in rows_of(section)
            if count is not None
        ),
        title=f"linear head, value and gradient: {first['tokens']} tokens, "
        f"width {first['hidden']}, {first['dtype']}, compiled for {_target(first, section)}",
        unit="temporary MB",
    )


def _only(section: dict[str, Any], *targets: str) -> dict[str, Any]:
    return section | {"cases": [case for case in section["cases"] if case["target"] in targets]}


def _markdown(section: dict[str, Any]) -> str:
    headings, rows = _columns(section)
    lines = [[name, *cells] for name, cells in rows.items()]
    return markdown.table(["temporary MB", *headings], lines, words=1)


def _columns(section: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    cases = section["cases"]
    names = dict.fromkeys(row["name"] for case in cases for row in case["contenders"])
    rows: dict[str, list[str]] = {name: [] for name in names}
    for case in cases:
        found = {row["name"]: row["temp_bytes"] for row in case["contenders"]}
        for name, cells in rows.items():
            cells.append(markdown.megabytes(found.get(name)))
    headings = [f"{_target(case, section)}: {head_of(case)}" for case in cases]
    return headings, rows


def _target(case: dict[str, Any], section: dict[str, Any]) -> str:
    return section["environment"]["platform"] if case["target"] == HERE else case["target"]


def rows_of(section: dict[str, Any]) -> Iterator[tuple[str, Head, str, int | None]]:
    """Yield every number of a section: target, head, contender, bytes."""
    for case in section["cases"]:
        for row in case["contenders"]:
            yield case["target"], head_of(case), row["name"], row["temp_bytes"]
