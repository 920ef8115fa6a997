# SPDX-License-Identifier: Apache-2.0
"""`python -m bench memory`: temporary memory of the compiled linear head, TPUs without a TPU."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import typer
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from rich.table import Table

from bench import contenders, environment, head, markdown, results, sharding, terminal, timing
from bench.cases import Dtype

HERE = "here"
# Generations of TPU, each by a topology of it: one of its chips is compiled for.
TPUS = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1"}
CASES = (
    head.Head(8192, 2304, 256000, Dtype.BFLOAT16),
    head.Head(4096, 4096, 128256, Dtype.BFLOAT16),
    head.Head(2048, 768, 50257, Dtype.FLOAT32),
)


def command(
    *,
    cases: Annotated[
        list[head.Head] | None,
        typer.Option(
            "--shape",
            parser=head.parse,
            metavar="TOKENSxHIDDENxCLASSES[:DTYPE]",
            help="A head; repeatable.",
            show_default=", ".join(map(str, CASES)),
        ),
    ] = None,
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
    json: Annotated[
        Path | None,
        typer.Option(help="The results file; its other sections are kept.", show_default="none"),
    ] = None,
) -> None:
    """Compile value and gradient of every JAX head, and read what memory it needs.

    Nothing is run, so shapes may be larger than this machine.
    """
    unknown = [target for target in targets or () if target not in (HERE, *TPUS)]
    if unknown:
        raise typer.BadParameter(
            f"expected {', '.join((HERE, *TPUS))}; got {unknown[0]!r}", param_hint="--target"
        )
    if meshes:
        _over_meshes(cases or [], meshes, json)
        return
    path = results.destination(json, complete=not (cases or targets))
    section = measure(cases or CASES, targets or (HERE, *TPUS))
    section["command"] = results.command_line("memory", {"shape": cases, "target": targets})
    console = terminal.output()
    console.print(table(section), "")
    if path:
        results.save(path, "memory", section)
        terminal.notes.print(f"written: {path}")


def _over_meshes(
    cases: Sequence[head.Head], meshes: Sequence[sharding.Devices], json: Path | None
) -> None:
    if len(cases) != 1:
        raise typer.BadParameter(f"--mesh needs one head; got {len(cases)}", param_hint="--shape")
    path = results.destination(json, complete=True)
    section = {
        "environment": environment.describe(),
        "head": str(cases[0]),
        "command": results.command_line("memory", {"shape": cases, "mesh": meshes}),
        "meshes": [sharding.measure(cases[0], devices) for devices in meshes],
    }
    terminal.output().print(sharding.table(section), "")
    if path:
        results.save(path, sharding.KEY.format(cases[0]), section)
        terminal.notes.print(f"written: {path}")


def measure(cases: Sequence[head.Head], targets: Sequence[str]) -> dict[str, Any]:
    """Compile every JAX contender for every case and target.

    Returns:
        A section of the results file.
    """
    found, left_out = contenders.load(contenders.HEAD + contenders.TIED, Dtype.BFLOAT16)
    measured = []
    for target in targets:
        try:
            device = _device(target)
        except Exception as error:  # libtpu absent, or it does not know the topology
            left_out.append(f"left out: {target} ({str(error).splitlines()[0][:120]})")
            continue
        for case in cases:
            rows = []
            for contender in found:
                if contender.entry.jax and not (contender.entry.whole and target != HERE):
                    rows.append({"name": contender.name, **_compile(contender, case, device)})
            measured.append({**case._asdict(), "target": target, "contenders": rows})
    for line in left_out:
        terminal.notes.print(line)
    return {"environment": environment.describe(), "left_out": left_out, "cases": measured}


def _device(target: str) -> Any:
    if target == HERE:
        return jax.devices()[0]
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    return topologies.get_topology_desc(TPUS[target], platform="tpu").devices[0]


def _compile(contender: contenders.Contender, case: head.Head, device: Any) -> dict[str, Any]:
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
    try:
        traced = jax.jit(head.program(contender)).trace(*arguments)
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
        title_justify="left",
        caption=environment.in_words(section["environment"]),
        caption_justify="left",
    )
    headings, rows = _columns(section)
    out.add_column("who")
    for heading in headings:
        out.add_column(heading, justify="right")
    for name, cells in rows.items():
        out.add_row(name, *cells, style="bold" if name == contenders.OURS else None)
    return out


def as_markdown(section: dict[str, Any]) -> str:
    """Lay a section out for the README."""
    headings, rows = _columns(section)
    lines = [[name, *cells] for name, cells in rows.items()]
    text = markdown.table(["temporary MB", *headings], lines, words=1)
    return "\n".join([text, "", markdown.origin(section)])


def _columns(section: dict[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    cases = section["cases"]
    names = dict.fromkeys(row["name"] for case in cases for row in case["contenders"])
    rows: dict[str, list[str]] = {name: [] for name in names}
    for case in cases:
        found = {row["name"]: row["temp_bytes"] for row in case["contenders"]}
        for name, cells in rows.items():
            cells.append(head.megabytes(found.get(name)))
    headings = [
        f"{_target(case, section)}: {case['tokens']}x{case['hidden']}x{case['classes']} "
        f"{case['dtype']}"
        for case in cases
    ]
    return headings, rows


def _target(case: dict[str, Any], section: dict[str, Any]) -> str:
    return section["environment"]["platform"] if case["target"] == HERE else case["target"]


def rows_of(section: dict[str, Any]) -> Iterator[tuple[str, head.Head, str, int | None]]:
    """Yield every number of a section: target, head, contender, bytes."""
    for case in section["cases"]:
        shape = head.Head(case["tokens"], case["hidden"], case["classes"], Dtype(case["dtype"]))
        for row in case["contenders"]:
            yield case["target"], shape, row["name"], row["temp_bytes"]
