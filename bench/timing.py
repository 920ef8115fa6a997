# SPDX-License-Identifier: Apache-2.0
"""How time is measured: compiled ahead, warmed up, interleaved, blocked on; and the roof."""

import itertools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from time import perf_counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bench.cases import Dtype

WARM_UP_ROUNDS = 1
FEWEST_ROUNDS = 5
MOST_ROUNDS = 300

# What the roof is measured on; not on a CPU, so much that the call itself takes none of the time.
COPY_BYTES = {"cpu": 2**28, "default": 2**32}
WIDTHS = {"cpu": 2048, "default": 8192}  # of the square matrices
ROOF_ROUNDS = 3

Program = Callable[..., Any]


class Timing(NamedTuple):
    """Seconds per call: the median and the quartiles around it."""

    median_s: float
    q1_s: float
    q3_s: float


def compile_ahead(
    function: Program, arguments: Sequence[Any], *, donated: int = 0
) -> tuple[Program, float]:
    """Trace, lower and compile for these arguments; a call consumes the first `donated` of them.

    Returns:
        The compiled program and the seconds that took.
    """
    start = perf_counter()
    jitted = jax.jit(function, donate_argnums=tuple(range(donated)))
    compiled = jitted.lower(*arguments).compile()
    return compiled, perf_counter() - start


def compile_for(platform: str, function: Program, arguments: Sequence[Any]) -> Any:
    """Compile for the devices that abstract arguments name, which need not be there."""
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,)).compile()


def temporary_bytes(compiled: Any) -> int:
    """Read what memory a compiled program needs beyond arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def caller(
    inputs: list[tuple[Any, ...]],
    *,
    donated: int = 0,
    wait: Callable[[Any], Any] = jax.block_until_ready,
) -> Callable[[Program], float]:
    """Return a function that calls a program on the next inputs, and returns the seconds it took.

    Args:
        inputs: argument lists to rotate through; one is enough if it fits in no cache.
        donated: how many leading arguments a call consumes. Such a program returns a value and the
            successors of these arguments, which replace them in `inputs`: the next call starts from
            there, so that all programs share one set of arrays and none is copied.
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
    """Time every program once per round, in a new random order each round.

    What slows the machine down for a while then slows all of them down. Each program is called
    twice and the second call is timed, so that each runs after itself: memory that another program
    has just freed takes the next call longer to get ([4096, 32000] float32, value and gradient:
    290 ms after a program that uses three times the memory, 200 after itself).

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


def roofs(dtypes: Iterable[Dtype]) -> dict[str, Any]:
    """Measure what the device can do at most: a large copy, and a large product of each dtype.

    The copy is written into memory in use: memory fresh from the system is several times slower on
    a CPU, which is the program's cost and not the device's.

    Returns:
        `bytes_per_s`, read and written; `flops_per_s` by dtype.
    """
    platform = jax.default_backend()
    size, width = (sizes.get(platform) or sizes["default"] for sizes in (COPY_BYTES, WIDTHS))
    copied = [(jnp.zeros((1024, size // 4096), jnp.float32),)]
    copy_s = _seconds(lambda x: (0.0, (x + 1,)), copied, donated=1)
    matrices = {dtype: [(jnp.ones((width, width), dtype),) * 2] for dtype in dtypes}
    return {
        "bytes_per_s": 2 * size / copy_s,
        "flops_per_s": {
            dtype.value: 2 * width**3 / _seconds(jnp.dot, pair) for dtype, pair in matrices.items()
        },
    }


def _seconds(function: Program, inputs: list[tuple[Any, ...]], *, donated: int = 0) -> float:
    compiled, _ = compile_ahead(function, inputs[0], donated=donated)
    call = caller(inputs, donated=donated)
    return interleave({"roof": compiled}, call, rounds=ROOF_ROUNDS)["roof"].median_s


def least_seconds(roofs: dict[str, Any], dtype: str, *, nbytes: int, flops: int) -> float:
    """The time for so many bytes or so many flops at the roof: the longer of the two."""
    return max(nbytes / roofs["bytes_per_s"], flops / roofs["flops_per_s"][dtype])


def roofs_in_words(roofs: dict[str, Any] | None) -> str:
    """Say the roofs in a line, for under a table; nothing where none was measured."""
    if roofs is None:
        return ""
    products = ", ".join(
        f"{flops / 1e9:.0f} GFLOP/s in {dtype}" for dtype, flops in roofs["flops_per_s"].items()
    )
    return (
        "Of the roof: the least time for the row's bytes and flops, over the time taken; the least "
        f"is that of a large copy in place ({roofs['bytes_per_s'] / 1e9:.1f} GB/s) or of a large "
        f"matrix product ({products}), whichever is longer, both measured in the same run."
    )
