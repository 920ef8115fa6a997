# SPDX-License-Identifier: Apache-2.0
"""The time of a program on a TPU by its compiler's account: no TPU is needed.

XLA for TPUs writes into every instruction of a compiled program the cycles that it plans with.
Their sum, the body of a loop as often as it runs, estimates the program's time, with two
corrections:

* What moves or reduces data outside a fusion is estimated four to five times too high: it counts as
  the bytes it reads and writes over the chip's bandwidth, times 1.4, at most.
* Of a condition the cheapest branch counts, and a loop whose length only the run will tell counts
  nothing. Each is named in `Account.notes`. Unless it is over the tokens of a head that count, and
  their fraction is given.
"""

import math
import re
from typing import NamedTuple

from jaxsoftmax.training.tpu import hlo
from jaxsoftmax.training.tpu.hlo import BITS


class Chip(NamedTuple):
    """A generation of TPU, by its published numbers, of what JAX calls a device."""

    topology: str  # the smallest that holds one
    hertz: float
    bytes_per_s: float
    flops_per_s: float  # in bfloat16
    gigabytes: float  # of memory, in 1e9 bytes


CHIPS = {
    "v5e": Chip("v5e:2x2", 1.5e9, 819e9, 197e12, 16),
    "v5p": Chip("v5p:2x2x1", 1.75e9, 2765e9, 459e12, 95),
    "v6e": Chip("v6e:2x2", 1.75e9, 1640e9, 918e12, 32),
    "tpu7x": Chip("tpu7x:2x2x1", 2.2e9, 3690e9, 1153e12, 96),
}
MOVES = {"copy", "convert", "pad", "broadcast", "reduce", "transpose", "slice", "concatenate"}
MOVES |= {"copy-start", "dynamic-slice", "dynamic-update-slice"}
OVERHEAD = 1.4

_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
# What a head names a loop of at most so many steps, and a choice between programs of so many of its
# tokens, or chunks: the last number is that of all of them.
_COUNTED = re.compile(r"/counted_of_([\d_]+)/(?:while|cond)\"")
_SOURCE = re.compile(r'op_name="([^"]*)"')


class Cost(NamedTuple):
    """An instruction, with all the cycles that it takes."""

    cycles: float
    times: int  # iterations of the loops around it
    operation: str
    result: str
    source: str  # the JAX operation that it comes from


class Account(NamedTuple):
    """What a program takes."""

    cycles: float
    costs: list[Cost]  # the costliest first
    notes: list[str]  # what is not counted, or not in full


def account(text: str, chip: Chip, counted: float | None = None) -> Account:
    """Of a program compiled for a TPU, `compiled.as_text()`.

    `counted`: the fraction of the tokens that count, of a head of which not all may.
    """
    program, notes = hlo.parse(text), []

    def visit(name: str, times: int, share: float | None = counted) -> list[Cost]:
        body, costs = program.computations[name], []
        shapes = {instruction.name: instruction.shape for instruction in body}
        for one in body:
            called = one.called
            if one.operation == "while":
                trips, inside = program.trips(one), share
                if trips is None and (found := _counted(one, share)):
                    # Where the chunks are in groups, all in a group but the last count.
                    trips, inside = found[1], 1.0
                if trips is None:
                    notes.append(f"{_source(one)}: a loop, its length known when it runs")
                costs += visit(called["body"][0], times * (trips or 0), inside)
            elif one.operation == "conditional":
                named = [branch for role in called for branch in called[role]]
                if found := _counted(one, share):
                    sizes, number = found
                    chosen = sum(number > size for size in sizes[:-1])
                    costs += visit(named[chosen], times, share)
                    continue
                branches = [visit(branch, times, share) for branch in named]
                dearest = max(map(_sum, branches))
                notes.append(f"{_source(one)}: a branch, {dearest / 1e6:.3g} Mcycles where taken")
                costs += min(branches, key=_sum)
            elif one.operation == "call":
                costs += visit(called["to_apply"][0], times, share)
            elif cycles := _CYCLES.search(one.line):
                taken = float(cycles[1])
                if one.operation in MOVES:
                    moved = _bytes(one.shape) + sum(_bytes(shapes[x]) for x in one.operands)
                    taken = min(taken, OVERHEAD * moved / chip.bytes_per_s * chip.hertz)
                result = one.shape.partition("{")[0]
                costs.append(Cost(taken * times, times, one.operation, result, _source(one)))
        return costs

    costs = sorted(visit(program.entry, 1), reverse=True)
    return Account(_sum(costs), costs, list(dict.fromkeys(notes)))


def _counted(instruction: hlo.Instruction, share: float | None) -> tuple[list[int], int] | None:
    """The sizes that a loop or a choice over the tokens that count names, and that of the share."""
    found = _COUNTED.search(instruction.line)
    if share is None or not found:
        return None
    sizes = [int(size) for size in found[1].split("_")]
    return sizes, math.ceil(round(share * sizes[-1], 6))


def at_peak(flops: int, chip: Chip) -> float:
    """The cycles of so many operations in bfloat16 at the chip's published peak."""
    return flops / chip.flops_per_s * chip.hertz


def _sum(costs: list[Cost]) -> float:
    return sum(cost.cycles for cost in costs)


def _bytes(shape: str) -> int:
    arrays = _ARRAY.findall(shape)
    bits = (BITS.get(t, 32) * math.prod(int(n) for n in d.split(",") if n) for t, d in arrays)
    return sum(bits) // 8


def _source(instruction: hlo.Instruction) -> str:
    found = _SOURCE.search(instruction.line)
    return "/".join(found[1].split("/")[-2:]) if found else instruction.name
