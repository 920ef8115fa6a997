# SPDX-License-Identifier: Apache-2.0
"""`python -m bench speed`: time of losses and divergences, on logits or with linear heads."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import geometric_mean
from typing import Annotated, Any, NamedTuple

import jax
import typer

from bench import (
    calibration,
    contenders,
    environment,
    options,
    results,
    speed_tables,
    tables,
    timing,
)
from bench import targets as by_target
from bench.cases import (
    DIVERGENCES,
    DTYPES,
    HEADS,
    LEAD,
    SHAPES,
    TWO_HEADS,
    Case,
    Head,
    Labels,
    Logits,
    Mode,
    Op,
    Size,
    TwoHeads,
    TwoLogits,
    choose,
    with_ignored,
)
from jaxsoftmax.training.tpu import cycles

PATIENCE_S = 30.0  # a contender whose first call takes longer is left out of that case
PROFILED_CALLS = 3


def command(
    context: typer.Context,
    *,
    op: Annotated[
        Op,
        typer.Option(
            help="Losses of given logits, or linear heads with their loss; KL and JS of given "
            "logits, or of two linear heads."
        ),
    ] = Op.LOGITS,
    labels: Annotated[
        Labels,
        typer.Option(help="Targets as class numbers, or as one distribution a row."),
    ] = Labels.INTEGER,
    confident: Annotated[
        bool,
        typer.Option(
            "--confident",
            metavar="",  # it takes no value
            help=f"Logits as of a trained model: the label leads by {LEAD} nats in a third of the "
            "rows.",
        ),
    ] = False,
    tokens: options.Tokens = None,
    hidden: options.Hidden = None,
    vocab: options.Vocab = None,
    dtypes: options.Dtypes = None,
    models: options.Models = None,
    size: options.TheSize = Size.REGULAR,
    modes: Annotated[
        list[Mode] | None,
        typer.Option(
            "--mode",
            help="What to compute; repeatable. The training-step is of losses, and "
            "value-and-both-grads of divergences.",
            show_default="all",
        ),
    ] = None,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Rounds a case.", show_default="by --size")
    ] = None,
    ignored: Annotated[
        list[float] | None,
        typer.Option(
            "--ignored",
            min=0,
            max=1,
            help="With --op linear: what value and gradient takes if this fraction of the tokens "
            "is ignored, over the same call without ignore_index; repeatable.",
        ),
    ] = None,
    targets: Annotated[
        list[str] | None,
        typer.Option(
            "--target",
            help="Instead of a time on this machine: the cycles on a TPU by its compiler's account "
            f"({', '.join(cycles.CHIPS)}; needs libtpu, no TPU); repeatable.",
        ),
    ] = None,
    detail: Annotated[
        bool,
        typer.Option(
            "--detail",
            metavar="",  # it takes no value
            help="With --target: also the costliest instructions of each program.",
        ),
    ] = False,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            metavar="",  # it takes no value
            help="Instead: hold that account against the times that tokamax publishes of its heads "
            f"({', '.join(calibration.MEASURED_MS)} or --target; needs libtpu and tokamax).",
        ),
    ] = False,
    device: options.Device = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Also trace a few calls of what JAX compiles, each case and contender into a "
            "folder of its own, for TensorBoard, XProf or Perfetto.",
        ),
    ] = None,
    output: options.Output = results.DEFAULT,
) -> None:
    """Time losses or divergences on logits, or with linear heads: ours and the others'.

    Every contender is compiled ahead, warmed up, and timed once a round in random order; the
    tables show medians and quartiles. Options that are repeated are all combined; without any, the
    cases of the README are measured.
    """
    environment.use(device)
    integer = labels is Labels.INTEGER
    _check_labels(op, confident=confident, integer=integer)
    if not {*(modes or ())} <= {*op.modes}:
        raise typer.BadParameter(f"expected {', '.join(op.modes)}", param_hint="--mode")
    given = options.given(context)
    if calibrate:
        if not given.keys() <= {"calibrate", "target"}:
            raise typer.BadParameter("expected no more than --target", param_hint="--calibrate")
        options.check_targets(targets or (), calibration.MEASURED_MS)
        path = results.destination(output, by_target.FILE)
        section = calibration.measure(targets or [*calibration.MEASURED_MS])
        section["command"] = results.command_line("speed", given)
        tables.show(*calibration.in_docs(section))
        results.keep(path, section, None if targets else calibration.KEY)
        return
    options.check_targets(targets or (), cycles.CHIPS)
    if targets and (repeats or profile):
        raise typer.BadParameter("nothing is run with --target", param_hint="--repeats, --profile")
    if detail and not targets:
        raise typer.BadParameter("expected --target with it", param_hint="--detail")
    if targets and (confident or not integer or Mode.TRAINING_STEP in (modes or ())):
        raise typer.BadParameter(
            "expected integer labels, forward or value-and-grad with it", param_hint="--target"
        )
    if ignored:
        _check_with_ignored(op, alone=not (modes or profile or detail))
    path = results.destination(output, by_target.FILE if targets else None)
    here = {
        Op.LOGITS: logits(labels, confident=confident),
        Op.LINEAR: HEADS[:1] if ignored else HEADS,
        Op.DIVERGENCE: DIVERGENCES,
        Op.LINEAR_DIVERGENCE: TWO_HEADS,
    }
    default = by_target.CASES if targets and not ignored else here
    cases = choose(
        default[op],
        tokens=tokens,
        hidden=hidden,
        vocab=vocab,
        dtypes=dtypes,
        models=models,
        size=size,
    )
    if ignored:
        section = (
            by_target.measure_ignored(cases, ignored, targets)
            if targets
            else measure_ignored(cases, ignored, repeats=repeats, seconds=size.seconds)
        )
        section["command"] = results.command_line("speed", given)
        tables.show(*speed_tables.ignored_in_docs(section))
        results.keep(path, section, None)
        return
    if targets:
        section = by_target.measure(cases, modes or by_target.COMPLETE[op], targets, detail=detail)
        section["command"] = results.command_line("speed", given)
        tables.show(*(by_target.details(section) if detail else ()), *by_target.in_docs(section))
        complete = given.keys() <= {"op", "target"} and {*targets} == {*cycles.CHIPS}
        results.keep(path, section, by_target.KEY.format(op) if complete else None)
        return
    section = measure(
        cases, modes or op.modes, repeats=repeats, seconds=size.seconds, profile=profile
    )
    section["command"] = results.command_line("speed", given)
    tables.show(*speed_tables.in_terminal(section))
    complete = given.keys() <= {"op", "labels", "confident"}
    kind = op if op is not Op.LOGITS else "confident" if confident else labels
    results.keep(path, section, f"speed/{kind}" if complete else None)


def _check_labels(op: Op, *, confident: bool, integer: bool) -> None:
    if op is not Op.LOGITS and not integer:
        takes = "no labels" if op.divergence else "integer labels"
        raise typer.BadParameter(f"--op {op} takes {takes}", param_hint="--labels")
    if confident and (op is not Op.LOGITS or not integer):
        raise typer.BadParameter(
            "expected logits and integer labels with it", param_hint="--confident"
        )


def _check_with_ignored(op: Op, *, alone: bool) -> None:
    if op is not Op.LINEAR:
        raise typer.BadParameter("expected --op linear with it", param_hint="--ignored")
    if not alone:
        raise typer.BadParameter(
            "value and gradient is measured with --ignored, and nothing else",
            param_hint="--mode, --profile, --detail",
        )


def logits(labels: Labels, *, confident: bool = False) -> list[Logits]:
    """Return the cases of a complete run."""
    return [
        Logits(tokens, classes, dtype, labels, confident)
        for (tokens, classes), dtype in itertools.product(SHAPES, DTYPES)
    ]


def measure(
    cases: Sequence[Case],
    modes: Sequence[Mode],
    *,
    repeats: int | None = None,
    seconds: float = Size.REGULAR.seconds,
    profile: Path | None = None,
) -> dict[str, Any]:
    """Time every contender on every case.

    Args:
        cases: all of one kind.
        modes: what to compute.
        repeats: rounds a case and mode; None for as many as fit in `seconds`.
        seconds: time for a case and mode when `repeats` is None.
        profile: a folder for traces.

    Returns:
        A section of the results file.
    """
    dtypes = dict.fromkeys(case.dtype for case in cases)
    found = {case: contenders.load(_entries(case), case.dtype) for case in cases}
    left_out = list(dict.fromkeys(line for _, lines in found.values() for line in lines))

    timed = []
    with tables.progress(len(cases) * len(modes)) as now:
        now("roofs")
        roofs = timing.roofs(dtypes)
        for case in cases:
            # One rotation of inputs at a time: the largest is near a gigabyte.
            now(str(case))
            rotation = case.inputs()
            for mode in modes:
                words = f"{case} {mode}"
                now(words)
                call = timing.caller(rotation, donated=_donated(case, mode))
                ready = _prepare(case, mode, found[case][0], rotation[0], call, left_out=left_out)
                programs = {name: one.program for name, one in ready.items()}
                timings = timing.interleave(programs, call, rounds=repeats, seconds=seconds)
                timed.append(_row(case, mode, ready, timings, roofs))
                if profile:
                    _trace(profile / environment.slug(words), ready, call)
                now(done=1)
            rotation.clear()

    tables.say(*left_out)
    return {
        "environment": environment.describe(),
        **_what(cases[0]),
        "roofs": roofs,
        "left_out": left_out,
        "cases": timed,
        "geometric_means": compare(timed),
    }


def _entries(case: Case) -> tuple[contenders.Entry, ...]:
    match case:
        case Logits():
            return contenders.LOGITS[case.labels] + contenders.TORCH_LOGITS[case.labels]
        case TwoLogits(divergence=divergence):
            return contenders.DIVERGENCES[divergence] + contenders.TORCH_DIVERGENCES[divergence]
        case TwoHeads(divergence=divergence):
            return contenders.HEAD_DIVERGENCES[divergence]
    return contenders.HEAD + contenders.OPTIONS + contenders.CHOICES


def _what(case: Case) -> dict[str, Any]:
    match case:
        case Logits():
            labels = {"labels": case.labels.value, "confident": case.confident}
            return {"op": Op.LOGITS.value, **labels}
        case TwoLogits():
            return {"op": Op.DIVERGENCE.value}
        case TwoHeads():
            return {"op": Op.LINEAR_DIVERGENCE.value}
    return {"op": Op.LINEAR.value, "labels": Labels.INTEGER.value}


def measure_ignored(
    cases: Sequence[Head],
    fractions: Sequence[float],
    *,
    repeats: int | None = None,
    seconds: float = Size.REGULAR.seconds,
) -> dict[str, Any]:
    """Time value and gradient of heads, without `ignore_index` and with some tokens ignored.

    Args:
        cases: what is measured.
        fractions: of the tokens, that are ignored.
        repeats: rounds a case; None for as many as fit in `seconds`.
        seconds: time for a case when `repeats` is None.

    Returns:
        A section of the results file; its first cases are those without `ignore_index`.
    """
    timed, left_out, fractions = [], [], list(dict.fromkeys(fractions))
    with tables.progress(len(cases)) as now:
        for case in cases:
            now(str(case))
            timed += _time_ignored(case, fractions, repeats, seconds, left_out)
            now(done=1)
    left_out = list(dict.fromkeys(left_out))
    tables.say(*left_out)
    return {
        "environment": environment.describe(),
        "op": Op.LINEAR.value,
        "left_out": left_out,
        "cases": timed,
    }


def _time_ignored(
    case: Head,
    fractions: Sequence[float],
    repeats: int | None,
    seconds: float,
    left_out: list[str],
) -> list[dict[str, Any]]:
    mode, rotation = Mode.VALUE_AND_GRAD, case.inputs()
    call = timing.caller(rotation)

    def ready(entries: Sequence[contenders.Entry]) -> dict[str, Ready]:
        found, lines = contenders.load(entries, case.dtype)
        left_out.extend(lines)
        return _prepare(case, mode, found, rotation[0], call, left_out=left_out)

    ignoring = ready(contenders.IGNORING)
    named = {None: ready(contenders.WITHOUT_IGNORING), **dict.fromkeys(fractions, ignoring)}
    programs = {
        f"{fraction} {name}": _of_labels(place, one.program)
        for place, (fraction, of_fraction) in enumerate(named.items())
        for name, one in of_fraction.items()
    }
    for i, (hidden, kernel, labels) in enumerate(rotation):
        rotation[i] = hidden, kernel, labels, *(with_ignored(labels, one) for one in fractions)
    timings = timing.interleave(programs, call, rounds=repeats, seconds=seconds)
    base = {name: timings[f"{None} {name}"].median_s for name in named[None]}

    def row(fraction: float | None, name: str, one: Ready) -> dict[str, Any]:
        taken = timings[f"{fraction} {name}"]
        return {
            "name": name,
            **taken._asdict(),
            "compile_s": one.compile_s,
            "temp_bytes": one.temp_bytes,
            "of_base": taken.median_s / base.get(name, base[contenders.OURS]),
        }

    of_case = {**case._asdict(), "shape": case.shape, "mode": mode.value}
    return [
        {
            **of_case,
            "ignored": fraction,
            "contenders": [row(fraction, name, one) for name, one in of_fraction.items()],
        }
        for fraction, of_fraction in named.items()
    ]


def _of_labels(place: int, program: timing.Program) -> timing.Program:
    """The program of `(hidden, kernel, labels)`, that takes its labels from several."""
    return lambda hidden, kernel, *labels: program(hidden, kernel, labels[place])


class Ready(NamedTuple):
    """A contender's program for a case."""

    program: timing.Program
    beside: str
    compile_s: float | None = None  # not by JAX
    temp_bytes: int | None = None


def _donated(case: Case, mode: Mode) -> int:
    return case.parameters if mode is Mode.TRAINING_STEP else 0


def _prepare(
    case: Case,
    mode: Mode,
    found: Sequence[contenders.Contender],
    arguments: tuple[Any, ...],
    call: Callable[[timing.Program], float],
    *,
    left_out: list[str],
) -> dict[str, Ready]:
    ready = {}
    for contender in found:
        name, _, entry = contender
        if entry.whole if mode is Mode.FORWARD else entry.forward:
            continue
        with contenders.may_fail(contender, f"{case} {mode}", left_out):
            program = contenders.program(contender, mode, case.parameters)
            one = Ready(program, entry.beside)
            if entry.jax:
                donated = _donated(case, mode)
                program, compile_s = timing.compile_ahead(program, arguments, donated=donated)
                one = Ready(program, entry.beside, compile_s, timing.temporary_bytes(program))
            first_s = call(program)
            if entry.module != "ours" and first_s > PATIENCE_S:
                left_out.append(f"{case} {mode}: {name}: {first_s:.0f} s a call")
            else:
                ready[name] = one
    return ready


def _row(
    case: Case,
    mode: Mode,
    ready: dict[str, Ready],
    timings: dict[str, timing.Timing],
    roofs: dict[str, Any],
) -> dict[str, Any]:
    nbytes, flops = case.bytes(mode), case.flops(mode)
    least_s = timing.least_seconds(roofs, case.dtype, nbytes=nbytes, flops=flops)
    beside = {name: one.beside for name, one in ready.items()}
    return {
        "shape": case.shape,
        "tokens": case.tokens,
        "classes": case.classes,
        "hidden": getattr(case, "hidden", None),
        "divergence": getattr(case, "divergence", None),
        "dtype": case.dtype.value,
        "mode": mode.value,
        "bytes": nbytes,
        "flops": flops,
        "contenders": [
            {
                "name": name,
                **taken._asdict(),
                "compile_s": ready[name].compile_s,
                "temp_bytes": ready[name].temp_bytes,
                "of_roof": least_s / taken.median_s,
                "ratio": timings[beside[name]].median_s / taken.median_s,
            }
            for name, taken in timings.items()
        ],
    }


def _trace(folder: Path, ready: dict[str, Ready], call: Callable[[timing.Program], float]) -> None:
    for name, one in ready.items():
        if one.compile_s is not None:
            with jax.profiler.trace(str(folder / environment.slug(name))):
                for _ in range(PROFILED_CALLS):
                    call(one.program)


def compare(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Average over the shapes our time divided by each contender's, for each dtype and mode.

    And for each divergence, if there are.
    """
    ratios: dict[tuple[str, str, str, str | None], dict[str, float]] = {}
    for case in cases:
        for row in case["contenders"]:
            if row["name"] != contenders.OURS:
                key = case["dtype"], case["mode"], row["name"], case.get("divergence")
                ratios.setdefault(key, {})[case["shape"]] = row["ratio"]
    return [
        {
            "dtype": dtype,
            "mode": mode,
            "contender": name,
            "divergence": divergence,
            "ratio": geometric_mean(by_shape.values()),
            "best": min(by_shape.values()),
            "worst": max(by_shape.values()),
            "worst_shape": max(by_shape, key=lambda shape: by_shape[shape]),
        }
        for (dtype, mode, name, divergence), by_shape in ratios.items()
    ]
