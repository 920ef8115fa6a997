# SPDX-License-Identifier: Apache-2.0
"""What a compiled program sends between devices, read from its HLO text."""

import math
import re
from typing import NamedTuple

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "s8": 8, "u8": 8, "u16": 16}
BITS |= {"s16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(body|condition|to_apply|calls|branch_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_OPERATION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


class Collective(NamedTuple):
    """One collective operation of a program, on each device."""

    kind: str
    dims: tuple[tuple[int, ...], ...]  # of each of its results
    dtype: str
    bytes: int
    in_loop: bool


def collectives(text: str) -> list[Collective]:
    """Those of a compiled program, `compiled.as_text()`; a reduce-scatter may be called a fusion.

    TPU keeps an all-reduce whose result is cut at once as a computation "all-reduce-scatter": it
    counts as a reduce-scatter.
    """
    lines: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[2]
            entry = name if found[1] else entry
            lines[name] = []
        elif name:
            lines[name].append(line)
    in_loop: dict[str, bool] = {}

    def visit(computation, inside):
        if in_loop.get(computation, -1) >= inside:
            return
        in_loop[computation] = inside
        for line in lines[computation]:
            for role, names in _CALLED.findall(line):
                for called in re.findall(r"[\w.\-]+", names):
                    if called in lines:
                        visit(called, inside or role == "body")

    visit(entry, False)
    found = []
    for computation, inside in in_loop.items():
        for line in lines[computation]:
            operation = _OPERATION.search(line)
            if not operation:
                continue
            shapes, kind = operation[1], operation[2]
            if computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            parts = _SHAPE.findall(shapes)
            if operation[3] and len(parts) > 1:  # a start returns (operands, results)
                parts = parts[len(parts) // 2 :]
            dims = tuple(tuple(int(n) for n in part[1].split(",") if n) for part in parts)
            bits = sum(BITS[part[0]] * math.prod(d) for part, d in zip(parts, dims, strict=True))
            found.append(Collective(kind, dims, parts[0][0], bits // 8, inside))
    return found
