# SPDX-License-Identifier: Apache-2.0
"""The linear head: its cases, and `python -m bench speed --op linear`."""

import math
from collections.abc import Callable, Iterator, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import typer
from rich.table import Table

from bench import contenders, environment, markdown, results, terminal, timing
from bench.cases import ROTATION_BYTES, Dtype

KEY = "speed/linear"
PATIENCE_S = 30.0  # a contender whose first call takes longer is left out of that case


class Head(NamedTuple):
    """Tokens, width and classes of a head, and the dtype of its operands."""

    tokens: int
    hidden: int
    classes: int
    dtype: Dtype

    def __str__(self) -> str:
        """Write the case as the command line takes it."""
        return f"{self.tokens}x{self.hidden}x{self.classes}:{self.dtype}"

    @property
    def flops(self) -> int:
        """The operations of three products."""
        return 3 * 2 * self.tokens * self.hidden * self.classes


CASES = (
    Head(4096, 256, 32768, Dtype.FLOAT32),
    Head(2048, 768, 32768, Dtype.FLOAT32),
    Head(2048, 768, 50257, Dtype.FLOAT32),
    Head(2048, 512, 131072, Dtype.BFLOAT16),
)


def parse(text: str) -> Head:
    """Read `4096x256x32768` or `4096x256x32768:bfloat16`.

    Raises:
        typer.BadParameter: the text is not three positive integers and perhaps a dtype.
    """
    shape, _, dtype = text.lower().partition(":")
    numbers = shape.split("x")
    known = dtype in ("", *Dtype)
    if len(numbers) != 3 or not known or not all(n.isdecimal() and int(n) for n in numbers):
        raise typer.BadParameter(
            f"expected TOKENSxHIDDENxCLASSES[:DTYPE] such as {CASES[0]}; got {text!r}"
        )
    tokens, hidden, classes = map(int, numbers)
    return Head(tokens, hidden, classes, Dtype(dtype or Dtype.FLOAT32))


def inputs(case: Head) -> list[tuple[jax.Array, jax.Array, jax.Array]]:
    """Draw `(hidden, kernel, labels)` with logits of scale 1; copies as `bench.cases.inputs`."""
    rng = np.random.default_rng(0)
    size = case.hidden * (case.tokens + case.classes) * jnp.dtype(case.dtype).itemsize

    def draw() -> tuple[jax.Array, jax.Array, jax.Array]:
        hidden = rng.standard_normal((case.tokens, case.hidden), np.float32)
        kernel = rng.standard_normal((case.hidden, case.classes), np.float32)
        labels = rng.integers(case.classes, size=case.tokens)
        return (
            jnp.asarray(hidden, case.dtype),
            jnp.asarray(kernel / math.sqrt(case.hidden), case.dtype),
            jnp.asarray(labels, jnp.int32),
        )

    copies = 1 if size > ROTATION_BYTES // 4 else 4
    return jax.block_until_ready([draw() for _ in range(copies)])


def program(contender: contenders.Contender) -> Callable[..., Any]:
    """Turn a contender into what is measured: value and gradients in hidden and kernel."""
    if contender.entry.whole:
        return contender.function
    return jax.value_and_grad(contender.function, (0, 1))


def measure(
    cases: Sequence[Head], *, repeats: int | None = None, seconds: float = 30.0
) -> dict[str, Any]:
    """Time value and gradient of every contender on every case.

    Args:
        cases: the heads.
        repeats: rounds a case; None for as many as fit in `seconds`.
        seconds: time for a case when `repeats` is None.

    Returns:
        A section of the results file.
    """
    found, left_out = contenders.load(contenders.HEAD, Dtype.BFLOAT16)
    timed = []
    with terminal.progress() as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case), refresh=True)
            timed.append(_time(case, found, repeats, seconds, left_out))
            progress.advance(task)
    for line in left_out:
        terminal.notes.print(line)
    return {
        "environment": environment.describe(),
        "left_out": left_out,
        "cases": timed,
        "geometric_means": _compare(timed),
    }


def _time(
    case: Head,
    found: Sequence[contenders.Contender],
    repeats: int | None,
    seconds: float,
    left_out: list[str],
) -> dict[str, Any]:
    rotation = inputs(case)
    programs, compile_s, temporary = {}, {}, {}
    for contender in found:
        name = contender.name
        try:
            if contender.entry.jax:
                compiled, compile_s[name] = timing.compile_ahead(program(contender), rotation[0])
                temporary[name] = timing.temporary_bytes(compiled)
                programs[name] = compiled
            else:
                programs[name] = program(contender)
            start = perf_counter()
            jax.block_until_ready(programs[name](*rotation[0]))
            first_s = perf_counter() - start
        except Exception as error:  # a peer that cannot do a case must not end the run
            if contender.entry.module == "ours":
                raise
            left_out.append(f"{case}: {name} fails: {type(error).__name__}: {error}"[:200])
            programs.pop(name, None)
        else:
            if first_s > PATIENCE_S:
                left_out.append(f"{case}: {name} left out: {first_s:.0f} s a call")
                programs.pop(name)
    timings = timing.interleave(programs, rotation, rounds=repeats, seconds=seconds)
    ours = timings[contenders.OURS].median_s
    return {
        **case._asdict(),
        "flops": case.flops,
        "contenders": [
            {
                "name": name,
                **taken._asdict(),
                "compile_s": compile_s.get(name),
                "temp_bytes": temporary.get(name),
                "ratio": ours / taken.median_s,
            }
            for name, taken in timings.items()
        ],
    }


def _compare(cases: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    ratios: dict[str, list[float]] = {}
    for case in cases:
        for row in case["contenders"]:
            if row["name"] != contenders.OURS:
                ratios.setdefault(row["name"], []).append(row["ratio"])
    return [
        {
            "contender": name,
            "ratio": results.geometric_mean(found),
            "best": min(found),
            "worst": max(found),
        }
        for name, found in ratios.items()
    ]


def tables(section: dict[str, Any]) -> Iterator[Table]:
    """Yield a section's table, and the summary."""
    table = Table(title="linear head, value and gradient", title_justify="left")
    table.add_column("tokens x hidden x classes")
    table.add_column("who")
    headings = "median ms", "quartiles", "GFLOP/s", "temporary MB", f"{contenders.OURS} ÷ this"
    for heading in headings:
        table.add_column(heading, justify="right")
    for case in section["cases"]:
        for row in case["contenders"]:
            first = row is case["contenders"][0]
            table.add_row(
                _words(case) if first else "",
                row["name"],
                f"{1e3 * row['median_s']:.0f}",
                f"{1e3 * row['q1_s']:.0f} – {1e3 * row['q3_s']:.0f}",
                f"{case['flops'] / row['median_s'] / 1e9:.0f}",
                megabytes(row["temp_bytes"]),
                "" if row["name"] == contenders.OURS else f"{row['ratio']:.2f}",
                style="bold" if row["name"] == contenders.OURS else None,
            )
        table.add_section()
    yield table
    names = [row["name"] for case in section["cases"] for row in case["contenders"]]
    summary = Table(
        title=f"{contenders.OURS}'s time ÷ theirs (below 1: {contenders.OURS} is faster)",
        title_justify="left",
        caption=f"Ratios of medians. GFLOP/s from the operations of three products.\n"
        f"{contenders.explain(names)}\n{environment.in_words(section['environment'])}",
        caption_justify="left",
    )
    summary.add_column("theirs")
    for heading in ("geometric mean", "best", "worst"):
        summary.add_column(heading, justify="right")
    for row in section["geometric_means"]:
        summary.add_row(
            row["contender"], *(f"{row[key]:.2f}" for key in ("ratio", "best", "worst"))
        )
    yield summary


def megabytes(count: float | None) -> str:
    """Write bytes as MB; – where nobody can tell."""
    return "–" if count is None else f"{count / 1e6:.0f}"


def as_markdown(section: dict[str, Any]) -> str:
    """Lay a section out for the README: time over optax's, and temporary memory."""
    cases = section["cases"]
    rows = []
    for name in dict.fromkeys(row["name"] for case in cases for row in case["contenders"]):
        cells = []
        for case in cases:
            by_name = {row["name"]: row for row in case["contenders"]}
            row, base = by_name.get(name), by_name.get(contenders.BASELINE)
            if row is None or base is None:
                cells.append("–")
            else:
                memory = "" if row["temp_bytes"] is None else f", {megabytes(row['temp_bytes'])} MB"
                cells.append(f"{row['median_s'] / base['median_s']:.2f}{memory}")
        rows.append([name, *cells])
    table = markdown.table(["value and gradient", *map(_words, cases)], rows, words=1)
    explained = contenders.explain(row[0] for row in rows)
    return "\n".join([table, "", *filter(None, [explained]), markdown.origin(section)])


def _words(case: dict[str, Any]) -> str:
    return f"{case['tokens']}x{case['hidden']}x{case['classes']} {case['dtype']}"
