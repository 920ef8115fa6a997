# SPDX-License-Identifier: Apache-2.0
"""A compiled program's HLO text, `compiled.as_text()`, as computations and their instructions."""

import re
from collections.abc import Iterator
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "s8": 8, "u8": 8, "u16": 16}
BITS |= {"s16": 16, "s32": 32, "u32": 32, "s64": 64, "u64": 64}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|[^ ]+) ([a-z][\w\-]*)\(")
_CALLED = re.compile(
    r"(body|condition|to_apply|calls|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    shape: str  # of its result, with the layout
    operation: str
    called: dict[str, tuple[str, ...]]  # computations, by what they are to the instruction
    line: str

    @property
    def operands(self) -> list[str]:
        """The names of its operands."""
        arguments = self.line.partition(f" {self.operation}(")[2].partition(")")[0]
        return re.findall(r"%([\w.\-]+)", arguments)


class Program(NamedTuple):
    """A module: the instructions of each computation, in the order they are scheduled."""

    entry: str
    computations: dict[str, list[Instruction]]

    def trips(self, loop: Instruction) -> int | None:
        """The iterations of a `while`; None if only the run will tell.

        Where XLA does not say, a counted loop's is the number that its counter is compared with.
        """
        if known := _TRIPS.search(loop.line):
            return int(known[1])
        (condition,) = loop.called["condition"]
        numbers = [
            int(number)
            for instruction in self.computations[condition]
            for number in re.findall(r"s32\[\]\S* constant\((\d+)\)", instruction.line)
        ]
        return max(numbers, default=None)

    def walk(self) -> Iterator[tuple[str, int]]:
        """Each computation that runs, and in how many iterations of loops (0 outside of them)."""
        found: dict[str, int] = {}

        def visit(name: str, times: int) -> None:
            if found.get(name, -1) >= times:
                return
            found[name] = times
            for instruction in self.computations[name]:
                for role, called in instruction.called.items():
                    inside = times
                    if role == "body":
                        inside = max(times, 1) * (self.trips(instruction) or 1)
                    for one in called:
                        visit(one, inside)

        visit(self.entry, 0)
        yield from found.items()


def parse(text: str) -> Program:
    """Read the text of a compiled program."""
    lines: dict[str, list[str]] = {}
    name = entry = ""
    for line in text.splitlines():
        if opened := _COMPUTATION.match(line):
            name = opened[2]
            entry = name if opened[1] else entry
            lines[name] = []
        elif name:
            lines[name].append(line)
    return Program(entry, {name: _instructions(body, lines) for name, body in lines.items()})


def _instructions(body: list[str], computations: dict[str, list[str]]) -> list[Instruction]:
    found = []
    for line in body:
        if matched := _INSTRUCTION.match(line):
            called = {
                role: tuple(n for n in re.findall(r"[\w.\-]+", names) if n in computations)
                for role, names in _CALLED.findall(line)
            }
            name, shape, operation = matched.groups()
            found.append(Instruction(name, shape, operation, called, line))
    return found
