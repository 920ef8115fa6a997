# SPDX-License-Identifier: Apache-2.0
"""How time is taken: compiled ahead, warmed up, interleaved, and blocked on."""

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import jax
import numpy as np

WARM_UP_ROUNDS = 1
FEWEST_ROUNDS = 5
MOST_ROUNDS = 300

Program = Callable[..., Any]


class Timing(NamedTuple):
    """Seconds a call: the median and the quartiles around it."""

    median_s: float
    q1_s: float
    q3_s: float


def compile_ahead(
    function: Program, arguments: Sequence[Any], *, donated: int = 0
) -> tuple[Program, float]:
    """Trace, lower and compile for these arguments, whose first `donated` a call consumes.

    Returns:
        The compiled program and the seconds that took.
    """
    start = perf_counter()
    jitted = jax.jit(function, donate_argnums=tuple(range(donated)))
    compiled = jitted.lower(*arguments).compile()
    return compiled, perf_counter() - start


def temporary_bytes(compiled: Any) -> int:
    """Read what memory a compiled program needs beyond arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def caller(
    inputs: list[tuple[Any, ...]],
    *,
    donated: int = 0,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> Callable[[Program], float]:
    """Return what calls a program on the next inputs, and says how many seconds that took.

    Args:
        inputs: argument lists to rotate through; one is enough when it fits no cache.
        donated: how many leading arguments a call consumes. A program that does returns a value
            and their successors, which take their place in `inputs`: whoever is called next goes on
            from there, so that all share one set of arrays and none is copied.
        wait: blocks until all of a call's results are there.
    """
    turns = itertools.cycle(range(len(inputs)))

    def call(program: Program) -> float:
        turn = next(turns)
        arguments = inputs[turn]
        start = perf_counter()
        results = wait(program(*arguments))
        taken = perf_counter() - start
        if donated:
            inputs[turn] = (*results[1], *arguments[donated:])
        return taken  # the results are dropped here, outside the measured time

    return call


def interleave(
    programs: Mapping[str, Program],
    call: Callable[[Program], float],
    *,
    rounds: int | None = None,
    seconds: float = 10.0,
) -> dict[str, Timing]:
    """Time every program once a round, in a new random order each round.

    What slows the machine down for a while then slows all of them down. Each program is called
    twice and the second call is timed, so that everybody runs after themselves: memory that a
    neighbour has just given back costs the next call more to get ([4096, 32000] float32, value and
    gradient: 290 ms after one that uses three times the memory, 200 after itself).

    Args:
        programs: what to time, by name.
        call: from `caller`.
        rounds: how many rounds; by default as many as fit in `seconds`, within
            `FEWEST_ROUNDS` and `MOST_ROUNDS`.
        seconds: the time to spend when `rounds` is None.
    """
    order = list(programs)
    shuffle = random.Random(0).shuffle
    for name in order * WARM_UP_ROUNDS:
        call(programs[name])

    samples: dict[str, list[float]] = {name: [] for name in programs}
    begin = perf_counter()
    for done in itertools.count():
        late = perf_counter() - begin > seconds
        if done == (rounds or MOST_ROUNDS) or (not rounds and late and done >= FEWEST_ROUNDS):
            break
        shuffle(order)
        for name in order:
            call(programs[name])
            samples[name].append(call(programs[name]))

    return {name: summarize(taken) for name, taken in samples.items()}


def summarize(samples: Sequence[float]) -> Timing:
    """Reduce samples to their median and quartiles."""
    q1, median, q3 = (float(quartile) for quartile in np.percentile(samples, (25, 50, 75)))
    return Timing(median, q1, q3)
