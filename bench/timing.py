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


class Timing(NamedTuple):
    """Seconds a call: the median and the quartiles around it."""

    median_s: float
    q1_s: float
    q3_s: float


def compile_ahead(
    function: Callable[..., Any], arguments: Sequence[Any]
) -> tuple[Callable[..., Any], float]:
    """Trace, lower and compile for these arguments.

    Returns:
        The compiled program and the seconds that took.
    """
    start = perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled, perf_counter() - start


def temporary_bytes(compiled: Any) -> int:
    """Read what memory a compiled program needs beyond arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def interleave(
    calls: Mapping[str, Callable[..., Any]],
    inputs: Sequence[Sequence[Any]],
    *,
    rounds: int | None = None,
    seconds: float = 10.0,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> dict[str, Timing]:
    """Time every call once a round, in a new random order each round.

    What slows the machine down for a while then slows all of them down. Each call is made twice and
    the second is timed, so that everybody runs after themselves: memory that a neighbour has just
    given back costs the next call more to get ([4096, 32000] float32, value and gradient: 290 ms
    after one that uses three times the memory, 200 after itself). Each call gets the next inputs
    in rotation; its results are dropped before the next call, outside the measured time.

    Args:
        calls: what to time, by name.
        inputs: argument lists to rotate through; one is enough when it fits no cache.
        rounds: how many rounds; by default as many as fit in `seconds`, within
            `FEWEST_ROUNDS` and `MOST_ROUNDS`.
        seconds: the time to spend when `rounds` is None.
        wait: blocks until all of a call's results are there.
    """
    order = list(calls)
    shuffle = random.Random(0).shuffle
    supply = itertools.cycle(inputs)
    for name in order * WARM_UP_ROUNDS:
        wait(calls[name](*next(supply)))

    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin = perf_counter()
    for done in itertools.count():
        late = perf_counter() - begin > seconds
        if done == (rounds or MOST_ROUNDS) or (not rounds and late and done >= FEWEST_ROUNDS):
            break
        shuffle(order)
        for name in order:
            wait(calls[name](*next(supply)))
            arguments = next(supply)
            start = perf_counter()
            results = wait(calls[name](*arguments))
            samples[name].append(perf_counter() - start)
            del results

    return {name: summarize(taken) for name, taken in samples.items()}


def summarize(samples: Sequence[float]) -> Timing:
    """Reduce samples to their median and quartiles."""
    q1, median, q3 = (float(quartile) for quartile in np.percentile(samples, (25, 50, 75)))
    return Timing(median, q1, q3)
