# SPDX-License-Identifier: Apache-2.0
"""`python -m bench speed --calibrate`: the account of `training.tpu` against measured times.

tokamax publishes with its autotuning tables how long its own heads took on TPUs. Here the same
programs are compiled: where the account is right, all take the same cycles a nanosecond.
"""

import importlib
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
import typer
from jax.sharding import SingleDeviceSharding

from bench import environment, tables, timing
from bench.cases import Dtype, Head
from bench.tables import Table
from jaxsoftmax.training.tpu import cycles

KEY = "cycles/calibration"  # of the results file
HEADS = {"xla": "head", "chunked_xla": "head_in_chunks"}  # of bench.contenders.with_tokamax
PROGRAMS = [f"{name}, {part}" for name in HEADS for part in ("forward", "vjp")]
# Milliseconds of each of PROGRAMS, by tokens, width and classes: the medians of tokamax 0.0.17's
# data/autotuning/{tpu_v5,tpu_v6_lite,tpu7x}, of the mean loss of bfloat16. A vjp makes the logits
# again; both loops go over 1024 tokens and 2048 classes at a time.
MEASURED_MS = {
    "v5p": {
        (1024, 4096, 128256): (2.682, 7.500, 4.117, 11.362),
        (4096, 4096, 128256): (10.901, 29.686, 13.935, 36.365),
        (4096, 5120, 151936): (16.857, 43.855, 20.170, 53.092),
        (4096, 2880, 201088): (13.517, 32.532, 18.012, 45.150),
        (8192, 2880, 201088): (26.453, 65.193, 35.619, 87.129),
        (4096, 2560, 262144): (14.013, 37.815, 18.575, 47.864),
    },
    "v6e": {
        (1024, 4096, 151936): (2.185, 7.609, 4.085, 18.870),
        (4096, 4096, 128256): (7.629, 20.350, 9.204, 37.148),
        (4096, 4096, 151936): (8.733, 24.026, 10.914, 44.262),
        (4096, 2880, 201088): (9.466, 20.079, 11.437, 37.686),
        (8192, 2880, 201088): (18.265, 41.172, 21.342, 70.164),
        (4096, 2560, 262144): (9.530, 24.899, 11.216, 46.260),
    },
    "tpu7x": {
        (1024, 4096, 151936): (1.851, 5.422, 2.699, 13.036),
        (4096, 4096, 128256): (6.485, 17.115, 7.082, 23.653),
        (4096, 4096, 151936): (7.540, 20.200, 8.449, 28.200),
        (4096, 2880, 201088): (7.943, 18.478, 8.610, 25.091),
        (8192, 2880, 201088): (16.742, 37.872, 16.471, 47.744),
        (4096, 2560, 262144): (8.064, 19.788, 9.872, 30.784),
    },
}
MEASURED = (
    "Measured: the times that tokamax 0.0.17 publishes with its autotuning tables (bfloat16, mean "
    "loss); a vjp makes the logits again, chunked_xla loops over 1024 tokens and 2048 classes at a "
    "time. The account is as good as the cycles a nanosecond of one chip are alike."
)


def measure(targets: Sequence[str]) -> dict[str, Any]:
    """Compile tokamax's programs for every target: a section of the results file.

    Raises:
        typer.BadParameter: tokamax is not installed, or there is no compiler for a target.
    """
    try:
        package = importlib.import_module("bench.contenders.with_tokamax")
    except ImportError as error:
        raise typer.BadParameter(f"{error}", param_hint="--calibrate") from None
    heads = [getattr(package, function) for function in HEADS.values()]
    found = []
    with tables.progress(sum(len(MEASURED_MS[target]) for target in targets)) as now:
        for target in targets:
            chip = cycles.CHIPS[target]
            device = SingleDeviceSharding(environment.tpu(chip.topology))
            for shape, times in MEASURED_MS[target].items():
                case = Head(*shape, Dtype.BFLOAT16)
                now(f"{target}: {case}")
                compiled = [one for head in heads for one in _forward_and_vjp(head, case, device)]
                rows = [
                    {"name": name, "cycles": cycles.account(one.as_text(), chip).cycles, "ms": ms}
                    for name, one, ms in zip(PROGRAMS, compiled, times, strict=True)
                ]
                fields = {**case._asdict(), "shape": case.shape, "target": target}
                found.append({**fields, "contenders": rows})
                now(done=1)
    return {"environment": environment.describe(runs=False), "cases": found}


def _forward_and_vjp(
    head: Callable[..., jax.Array], case: Head, device: SingleDeviceSharding
) -> Iterator[Any]:
    """Compile a head, and its vjp alone: a program of what the head's forward pass keeps for it."""

    def kept(hidden: jax.Array, kernel: jax.Array, labels: jax.Array) -> Any:
        return jax.vjp(lambda *parameters: head(*parameters, labels), hidden, kernel)[1]

    inputs = case.abstract_inputs(device)
    yield timing.compile_for("tpu", head, inputs)
    vjp, cotangent = jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=device),
        (jax.eval_shape(kept, *inputs), jax.ShapeDtypeStruct((), jnp.float32)),
    )
    yield timing.compile_for("tpu", lambda vjp, cotangent: vjp(cotangent), (vjp, cotangent))


def in_docs(section: dict[str, Any]) -> list[Table]:
    """Lay a section out for the terminal and docs/benchmarks.md: every program, and the spread."""
    by_target: dict[str, list[dict[str, Any]]] = {}
    for case in section["cases"]:
        by_target.setdefault(case["target"], []).append(case)
    found, rates, ratios = [], [], []
    for target, cases in by_target.items():
        headings = [f"{target}: Mcycles, ms, cycles/ns", *(case["shape"] for case in cases)]
        found.append(Table(headings, tables.by_contender(cases, _cell), words=1))
        rates += _spread(target, {name: _rates(cases, *names) for name, names in _RATES.items()})
        ratios += _spread(target, {name: _ratios(cases, names) for name, names in _PARTS.items()})
    headings = ["least", "median", "most"]
    return [
        *found,
        Table(["chip", "cycles/ns of", *headings], rates),
        Table(
            ["chip", "chunked_xla ÷ xla, estimated over measured, of", *headings],
            ratios,
            [MEASURED, tables.origin(section)],
        ),
    ]


_RATES = {"all programs": PROGRAMS} | {name: [name] for name in PROGRAMS}
_PARTS = {"forward": ["forward"], "vjp": ["vjp"], "both together": ["forward", "vjp"]}


def _spread(target: str, groups: dict[str, list[float]]) -> Iterator[list[str]]:
    for place, (name, values) in enumerate(groups.items()):
        three = (f"{pick(values):.2f}" for pick in (min, median, max))
        yield ["" if place else target, name, *three]


def _rates(cases: Sequence[dict[str, Any]], *names: str) -> list[float]:
    rows = (row for case in cases for row in case["contenders"])
    return [_rate(row) for row in rows if row["name"] in names]


def _ratios(cases: Sequence[dict[str, Any]], parts: Sequence[str]) -> list[float]:
    """How much slower the loop is, by the account over as measured, of each shape."""

    def rate(case: dict[str, Any], name: str) -> float:
        rows = [row for row in case["contenders"] if row["name"] in [f"{name}, {p}" for p in parts]]
        return _rate({key: sum(row[key] for row in rows) for key in ("cycles", "ms")})

    return [rate(case, "chunked_xla") / rate(case, "xla") for case in cases]


def _rate(row: dict[str, Any]) -> float:
    return row["cycles"] / row["ms"] / 1e6


def _cell(row: dict[str, Any], case: dict[str, Any]) -> str:
    del case
    return f"{row['cycles'] / 1e6:.1f}, {row['ms']:.2f}, {_rate(row):.2f}"
