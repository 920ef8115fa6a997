# SPDX-License-Identifier: Apache-2.0
"""How large the pieces of a head are, by the platform that the program is lowered for.

Each rule is a formula of the sizes; docs/performance.md has what it was measured against.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from jax import lax

MIB = 1 << 20

# Bytes of the float32 logits of one chunk, and the bounds of its number of tokens. Each chunk reads
# the kernel once: few tokens are enough for a CPU, an accelerator wants as many as the budget
# allows, and multiples of what its matrix unit takes.
LOGITS_BYTES = {"cpu": 56 * MIB, "other": 512 * MIB}
FEWEST, MOST, MULTIPLE = 256, 4096, 256
# Classes in a block: what a CPU's caches like; elsewhere as many as the bytes of their float32
# logits allow, within bounds. Where an automatic mesh may shard them, each device has at least the
# length that a TPU gives the last axis of an array.
LEAST_BLOCK, MOST_BLOCK, BLOCK_BYTES, LEAST_PER_DEVICE = 2048, 8192, 256 * MIB, 128
# Where some tokens may not count, there are so many chunks that an eighth of the tokens fill one,
# but no chunk is cut to fewer tokens than these; and the rows that blocks of classes take at once,
# each of which adds to the block of d_kernel, to no fewer than those.
PARTS, FEWEST_IN_PARTS, FEWEST_ROWS = 8, {"cpu": 256, "other": 512}, {"cpu": 256, "other": 2048}
# Of fewer float32 logits than these bytes every platform does as a CPU: nothing is gained, and one
# program is traced in the time of two.
SMALL_BYTES = 64 * MIB


class ByPlatform(NamedTuple):
    """The same for a CPU, and for any other platform."""

    cpu: Any
    other: Any


def by_platform(run: Callable[..., Any], plans: ByPlatform, *args: Any) -> Any:
    """`run(plan, *args)`, with the plan of the platform that the program is lowered for."""
    if plans.cpu == plans.other:
        return run(plans.cpu, *args)
    cpu, other = (partial(run, plan) for plan in plans)
    return lax.platform_dependent(*args, cpu=cpu, default=other)


def is_small(tokens: Any, classes: int) -> bool:
    """Whether all logits of a device are few."""
    return isinstance(tokens, int) and 4 * tokens * classes <= SMALL_BYTES


class Chunks(NamedTuple):
    """How the tokens of a shard are cut."""

    size: Any  # tokens in a chunk
    group: int = 1  # chunks whose d_logits are kept for one product


def chunks(  # noqa: PLR0917
    tokens: Any,
    width: int,
    classes: int,
    itemsize: int,
    most: int | None,
    devices: int,
    *,
    in_parts: bool = False,
    logits: int = 1,
) -> ByPlatform:
    """The chunks of so many tokens, of hidden width and classes of one device.

    As few as `most` allows, of equal size. `itemsize`: bytes of a number in the products. On an
    automatic mesh of `devices` that may spread the tokens a multiple of their number: otherwise XLA
    gathers all of `hidden`, and every device computes the whole head. `in_parts`: some tokens may
    not count, and chunks of such tokens are left out. `logits`: the arrays of logits of a chunk.
    """

    def budget(platform):
        size = _between(LOGITS_BYTES[platform] // (4 * logits * classes), FEWEST, MOST)
        return min(size, _part(tokens, devices, FEWEST_IN_PARTS[platform])) if in_parts else size

    cpu = Chunks(_equal(tokens, most or max(devices, budget("cpu")), devices))
    size = most or max(devices, _rounded(budget("other")))
    if size < devices:
        devices = 1  # no multiple is as small
    size = size // devices * devices
    in_one = _equal(tokens, size, devices)
    if is_small(tokens, classes):
        return ByPlatform(cpu, cpu)
    if not isinstance(tokens, int) or in_one == tokens:
        return ByPlatform(cpu, Chunks(in_one))
    # With the d_logits of all tokens kept there is no float32 d_kernel beside the result: they may
    # take its memory. With those of a group there is: they may take half as much again.
    whole = 4 * width // itemsize
    group = _ceil(tokens, size) if tokens <= whole else max(1, min(whole // 2, MOST) // size)
    parts = _ceil(tokens, group * size) * group
    return ByPlatform(cpu, Chunks(_tiled(tokens, parts, devices, 1 if most else MULTIPLE), group))


def rows(tokens: Any, devices: int) -> ByPlatform:
    """The tokens of each device that blocks of classes take at once, if some may not count."""
    own = max(1, tokens // devices) if isinstance(tokens, int) else tokens

    def size(platform):
        most = min(MOST, _part(tokens, devices, FEWEST_ROWS[platform]) // devices)
        return _equal(own, most, 1)

    return ByPlatform(size("cpu"), size("other"))


def _part(tokens, devices, fewest):
    """As many tokens as are taken at once where some may not count."""
    fewest *= devices
    return max(fewest, _ceil(tokens, PARTS)) if isinstance(tokens, int) else fewest


def blocks(tokens: Any, classes: int, most: int | None, devices: int) -> ByPlatform:
    """The classes of each device that are in a block, of `devices` that share the classes."""
    if most is not None:
        size = max(1, most // devices)
        return ByPlatform(size, size)
    least = max(LEAST_BLOCK // devices, LEAST_PER_DEVICE)
    if is_small(tokens, classes) or not isinstance(tokens, int):
        return ByPlatform(least, least)
    size = _between(BLOCK_BYTES // (4 * max(1, tokens)) // devices, least, MOST_BLOCK)
    return ByPlatform(least, min(classes, _equal(classes, _rounded(size), MULTIPLE)))


def _between(size, least, most):
    return min(max(size, least), most)


def _tiled(n, parts, devices, most):
    """The size of equal parts of `n`, of which padding is at most 1/32.

    A multiple of `devices`, and of the largest power of two up to `most` that leaves no more.
    """
    size = _ceil(n, parts)
    while True:
        multiple = math.lcm(devices, most)
        padded = _ceil(size, multiple) * multiple
        if most == 1 or 32 * padded * parts <= 33 * n:
            return padded
        most //= 2


def _rounded(size):
    """The next smaller multiple of what a matrix unit takes."""
    return max(1, size // MULTIPLE) * MULTIPLE


def _equal(n, most, multiple):
    """The size of as few equal parts of `n` as `most` allows; a multiple, if there are several."""
    if most < multiple:
        multiple = 1  # no multiple is as small
    parts = _ceil(n, most // multiple * multiple)
    size = _ceil(n, parts)
    # A single part is all of it, spread as it is.
    return size if isinstance(n, int) and parts == 1 else _ceil(size, multiple) * multiple


def _ceil(n, size):
    return -(-n // size)
