# SPDX-License-Identifier: Apache-2.0
"""`python -m bench memory`: memory of the linear head, compiled (TPUs without a TPU) or run."""

import re
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated, Any

import jax
import typer
from jax.sharding import SingleDeviceSharding
from matplotlib.figure import Figure

from bench import (
    contenders,
    environment,
    figures,
    options,
    results,
    sharding,
    tables,
    timing,
)
from bench.cases import HEADS, Dtype, Head, Mode, Size, choose, head_of
from bench.tables import Table
from jaxsoftmax.training.tpu import cycles, tpus

KEY, PEAK_KEY = "memory", "memory/peak"
HERE = "here"
# Generations of TPU: one chip of each is compiled for.
TPUS = {target: cycles.CHIPS[target].topology for target in ("v5e", "v5p", "v6e")}
CASES = (
    Head(8192, 2304, 256000, Dtype.BFLOAT16),
    Head(4096, 4096, 128256, Dtype.BFLOAT16),
    Head(2048, 768, 50257, Dtype.FLOAT32),
)
PROCESS = Path("/proc/self")  # Linux's account of this process
PEAK = (
    "By how much the resident memory of a process rises at most during its first call of value "
    "and gradient, compiled before: temporaries and results, beyond the arguments."
)


def command(
    context: typer.Context,
    *,
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
    tokens: options.Tokens = None,
    hidden: options.Hidden = None,
    vocab: options.Vocab = None,
    dtypes: options.Dtypes = None,
    models: options.Models = None,
    size: options.TheSize = Size.REGULAR,
    device: options.Device = None,
    output: options.Output = results.DEFAULT,
) -> None:
    """Compile value and gradient of every JAX head, and read what memory it needs.

    Nothing is run but with --peak, so shapes may be larger than this machine.
    """
    environment.use(device)
    options.check_targets(targets or (), (HERE, *TPUS))
    if sum(map(bool, (targets, meshes, peaks))) > 1:
        raise typer.BadParameter("expected one of them", param_hint="--target, --mesh, --peak")
    path = results.destination(output)
    default = HEADS if peaks else CASES
    cases = choose(
        default, tokens=tokens, hidden=hidden, vocab=vocab, dtypes=dtypes, models=models, size=size
    )
    if meshes:
        if len(cases) != 1:
            raise typer.BadParameter(f"expected one head; got {len(cases)}", param_hint="--mesh")
        section = {
            "environment": environment.describe(),
            "head": str(cases[0]),
            "meshes": [sharding.measure(cases[0], mesh) for mesh in meshes],
        }
    elif peaks:
        section = measure_peaks(cases)
    else:
        section = measure(cases, targets or (HERE, *TPUS))
    given = options.given(context)
    section["command"] = results.command_line("memory", given)
    tables.show(*(sharding.in_docs if meshes else peaks_in_docs if peaks else in_docs)(section))
    results.keep(path, section, (PEAK_KEY if peaks else KEY) if given.keys() <= {"peak"} else None)


def measure(cases: Sequence[Head], targets: Sequence[str]) -> dict[str, Any]:
    """Compile every JAX contender for every case and target: a section of the results file."""
    entries = contenders.HEAD + contenders.VARIANTS + contenders.CHOICES
    found, left_out = contenders.load(entries, Dtype.BFLOAT16)
    found = [contender for contender in found if contender.entry.jax]
    measured = []
    with tables.progress(len(targets) * len(cases) * len(found)) as now:
        for target in targets:
            try:
                device = jax.devices()[0] if target == HERE else tpus(TPUS[target])[0]
            except Exception as error:  # libtpu absent, or it does not know the topology
                left_out.append(f"left out: {target} ({str(error).splitlines()[0][:120]})")
                now(done=len(cases) * len(found))
                continue
            for case in cases:
                rows = []
                for contender in found:
                    now(f"{target}: {case} {contender.name}")
                    if target == HERE or not contender.entry.whole:
                        compiled = _compile(contender, case, device)
                        rows.append({"name": contender.name, **compiled})
                    now(done=1)
                measured.append({**case._asdict(), "target": target, "contenders": rows})
    tables.say(*left_out)
    return {"environment": environment.describe(), "left_out": left_out, "cases": measured}


def _compile(contender: contenders.Contender, case: Head, device: Any) -> dict[str, Any]:
    inputs = contenders.abstract_inputs(contender, case, SingleDeviceSharding(device))
    mode = Mode.FORWARD if contender.entry.forward else Mode.VALUE_AND_GRAD
    program = contenders.program(contender, mode, case.parameters)
    try:
        compiled = timing.compile_for(device.platform, program, inputs)
    except Exception as error:  # too large for the device, or not for it at all
        if contender.entry.module == "ours":
            raise
        return {"temp_bytes": None, "error": f"{type(error).__name__}: {error}"[:200]}
    return {"temp_bytes": timing.temporary_bytes(compiled)}


def measure_peaks(cases: Sequence[Head]) -> dict[str, Any]:
    """Run every contender on every case, each in its own process: a section of the results file.

    Raises:
        typer.BadParameter: this machine does not report resident memory.
    """
    if not (PROCESS / "clear_refs").exists() or jax.default_backend() != "cpu":
        raise typer.BadParameter("expected a CPU, on Linux", param_hint="--peak")
    found, left_out = contenders.load(contenders.HEAD, Dtype.BFLOAT16)
    measured = []
    with tables.progress(len(cases) * len(found)) as now:
        for case in cases:
            rows = []
            for one in found:
                now(f"{case} {one.name}")
                pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
                with contenders.may_fail(one, case, left_out), pool:
                    rose = pool.submit(rise, case, one.name).result()
                    rows.append({"name": one.name, "bytes": rose})
                now(done=1)
            measured.append({**case._asdict(), "contenders": rows})
    tables.say(*left_out)
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


def in_docs(section: dict[str, Any]) -> list[Table]:
    """Lay a section out for the terminal and docs/benchmarks.md: one table per target."""
    targets = dict.fromkeys(case["target"] for case in section["cases"])
    found = [_table("temporary MB", "temp_bytes", _only(section, target)) for target in targets]
    return [*found[:-1], found[-1]._replace(notes=[tables.origin(section)])]


def peaks_in_docs(section: dict[str, Any]) -> list[Table]:
    """Lay a section of --peak out for the terminal and docs/benchmarks.md."""
    return [_table("peak resident MB", "bytes", section, PEAK, tables.origin(section))]


def _table(what: str, key: str, section: dict[str, Any], *notes: str) -> Table:
    headings = [
        f"{_target(case, section)}: {head_of(case)}" if "target" in case else str(head_of(case))
        for case in section["cases"]
    ]
    rows = tables.by_contender(section["cases"], lambda row, _: tables.megabytes(row[key]))
    title = f"{what} of value and gradient{', compiled' if key == 'temp_bytes' else ''}"
    return Table([what, *headings], rows, notes, title, words=1)


def figure(section: dict[str, Any]) -> Figure:
    """Draw temporary memory on the first target against the number of classes."""
    first = section["cases"][0]
    return figures.against_vocabulary(
        section,
        (
            (case["classes"], row["name"], row["temp_bytes"] / 1e6)
            for case in _only(section, first["target"])["cases"]
            for row in case["contenders"]
            if row["temp_bytes"] is not None
        ),
        "temporary MB",
        f", compiled for {_target(first, section)}",
    )


def _only(section: dict[str, Any], *targets: str) -> dict[str, Any]:
    return section | {"cases": [case for case in section["cases"] if case["target"] in targets]}


def _target(case: dict[str, Any], section: dict[str, Any]) -> str:
    return section["environment"]["platform"] if case["target"] == HERE else case["target"]
