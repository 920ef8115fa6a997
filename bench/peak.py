# SPDX-License-Identifier: Apache-2.0
"""`python -m bench memory --peak`: resident memory of real runs on a CPU, a process each."""

import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jax
import typer
from rich.table import Table

from bench import contenders, environment, markdown, terminal, timing
from bench.cases import HEADS, Dtype, Head, Mode, head_of

KEY = "memory/peak"
CASES = HEADS
PROCESS = Path("/proc/self")  # Linux's account of this process
MEANING = (
    "By how much the resident memory of a process rises at most during its first call of value "
    "and gradient, compiled before: temporaries and results, beyond the arguments."
)


def measure(cases: Sequence[Head]) -> dict[str, Any]:
    """Run every contender on every case, each in a process of its own.

    Returns:
        A section of the results file.

    Raises:
        typer.BadParameter: this machine does not tell.
    """
    if not (PROCESS / "clear_refs").exists() or jax.default_backend() != "cpu":
        raise typer.BadParameter("expected a CPU, on Linux", param_hint="--peak")
    found, left_out = contenders.load(contenders.HEAD, Dtype.BFLOAT16)
    measured = []
    with terminal.progress() as progress:
        task = progress.add_task("", total=len(cases) * len(found))
        for case in cases:
            rows = []
            for name, _, _ in found:
                progress.update(task, description=f"{case} {name}", refresh=True)
                try:
                    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                        rows.append({"name": name, "bytes": pool.submit(rise, case, name).result()})
                except Exception as error:  # a peer that cannot do a case must not end the run
                    left_out.append(contenders.failure(case, name, error))
                progress.advance(task)
            measured.append({**case._asdict(), "contenders": rows})
    for line in left_out:
        terminal.notes.print(line)
    return {"environment": environment.describe(), "left_out": left_out, "cases": measured}


def rise(case: Head, name: str) -> int:
    """Call one contender once in this process, and return by how many bytes its memory rose."""
    found, _ = contenders.load([one for one in contenders.HEAD if one.name == name], case.dtype)
    program = contenders.program(found[0], Mode.VALUE_AND_GRAD, case.parameters)
    arguments = case.inputs()[0]
    if found[0].entry.jax:
        program, _ = timing.compile_ahead(program, arguments)
    (PROCESS / "clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _resident("VmRSS")
    jax.block_until_ready(program(*arguments))
    return _resident("VmHWM") - before


def _resident(which: str) -> int:
    found = re.search(rf"^{which}:\s+(\d+) kB$", (PROCESS / "status").read_text(), re.MULTILINE)
    assert found
    return 1024 * int(found[1])


def _rows(section: dict[str, Any]) -> list[list[str]]:
    cases = section["cases"]
    names = dict.fromkeys(row["name"] for case in cases for row in case["contenders"])
    by_case = [{row["name"]: row["bytes"] for row in case["contenders"]} for case in cases]
    return [[name, *(markdown.megabytes(found.get(name)) for found in by_case)] for name in names]


def _headings(section: dict[str, Any]) -> list[str]:
    return [str(head_of(case)) for case in section["cases"]]


def table(section: dict[str, Any]) -> Table:
    """Lay a section out for the terminal."""
    out = Table(
        title="peak resident MB of value and gradient",
        caption=f"{MEANING}\n{environment.in_words(section['environment'])}",
    )
    out.add_column("who")
    for heading in _headings(section):
        out.add_column(heading, justify="right")
    for row in _rows(section):
        out.add_row(*row, style="bold" if row[0] == contenders.OURS else None)
    return out


def as_markdown(section: dict[str, Any]) -> str:
    """Lay a section out for docs/benchmarks.md."""
    rows = markdown.table(["peak resident MB", *_headings(section)], _rows(section), words=1)
    return "\n".join([rows, "", MEANING, markdown.origin(section)])
