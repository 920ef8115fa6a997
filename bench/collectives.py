# SPDX-License-Identifier: Apache-2.0
"""What a compiled program sends between devices, read from its HLO text."""

import math
import re
from typing import NamedTuple

from jaxsoftmax.training.tpu import hlo
from jaxsoftmax.training.tpu.hlo import BITS

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")

_OPERATION = re.compile(rf"= (.*?) ({'|'.join(KINDS)})(-start)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_GROUPS = re.compile(r"replica_groups=(\{\{([\d,]*)\}|\[\d+,(\d+)\]|mesh\[(.*?)\] ?\{(.*?)\})")


class Collective(NamedTuple):
    """One collective operation of a program, on each device."""

    kind: str
    dims: tuple[tuple[int, ...], ...]  # of each of its results
    bytes: int  # of its results
    group: int  # devices that take part
    in_loop: bool
    times: int  # the loop's iterations

    @property
    def wire_bytes(self) -> float:
        """The bytes that a device sends in all by the ring algorithm, which sends the fewest."""
        share = (self.group - 1) / self.group
        once = {
            "all-gather": self.bytes * share,
            "all-reduce": 2 * self.bytes * share,
            "reduce-scatter": self.bytes * (self.group - 1),
            "all-to-all": self.bytes * share,
            "collective-permute": self.bytes,
        }
        return self.times * once[self.kind]


def collectives(text: str) -> list[Collective]:
    """The collectives of a compiled program, from its `compiled.as_text()`.

    On TPU a reduce-scatter is a computation "all-reduce-scatter" around an all-reduce: that counts
    as a reduce-scatter.
    """
    program = hlo.parse(text)
    found = []
    for computation, times in program.walk():
        for instruction in program.computations[computation]:
            if operation := _OPERATION.search(instruction.line):
                found.append(_read(operation, instruction.line, computation, times))
    return found


def _read(operation: re.Match[str], line: str, computation: str, times: int) -> Collective:
    kind, parts = operation[2], _SHAPE.findall(operation[1])
    if operation[3] and len(parts) > 1:  # a start returns (operands, results)
        parts = parts[len(parts) // 2 :]
    dims = tuple(tuple(int(n) for n in part[1].split(",") if n) for part in parts)
    bits = sum(BITS[part[0]] * math.prod(d) for part, d in zip(parts, dims, strict=True))
    group = _group(line)
    size = bits // 8
    if computation.startswith("all-reduce-scatter"):
        kind, size = "reduce-scatter", size // group
    return Collective(kind, dims, size, group, times > 0, max(times, 1))


def _group(line: str) -> int:
    """How many devices take part, from any of the forms in which HLO writes it."""
    groups = _GROUPS.search(line)
    if groups is None:
        return 1
    if groups[2] is not None:
        return len(groups[2].split(","))
    if groups[3] is not None:
        return int(groups[3])
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", groups[4])}
    return math.prod(sizes[name] for name in re.findall(r"'([^']+)'", groups[5]))
