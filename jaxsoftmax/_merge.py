# SPDX-License-Identifier: Apache-2.0
"""Blocks of classes, of a loop or of devices, as one: docs/derivation.md, section 9."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from . import _sharding
from ._sharding import AxisName


class BlockSums(NamedTuple):
    """What blocks of classes are merged by, one number per row; None where not asked for.

    Labels and whole rows are spread over blocks: each holds its part of every sum, relative to its
    own maximum. Whole rows whose loss alone is asked for may have their label's logit for m.
    """

    m: Any
    r: Any
    z_label: Any = None  # z_t; 0 where the label is in another block
    gaps: Any = None  # Σ e (m − z), for the entropy
    classes: Any = None  # those not at −inf, for the spread
    mass: Any = None  # Σ u over those
    costs: Any = None  # Σ u (m − z)


def merge_blocks(
    sums: BlockSums,
    max_over: Callable[[Any], Any],
    sum_over: Callable[[Any], Any],
    extra: Callable[[Any], Any] = lambda _: (),
) -> Any:
    """Blocks of classes as one, by the maximum over them and the sums.

    Of an axis of blocks, `max_over` keeps it with size 1 and `sum_over` takes it away. A block that
    reaches the common maximum gives its r, any other all of its (1 + r) e^(m_b − m); of those that
    reach it one maximum is counted. A block of nothing but −inf gives nothing, unless all are such;
    its r is NaN, as that of a block with +inf or NaN, which the whole row takes on.
    `extra(m)` is summed along.
    """
    m = max_over(sums.m)
    reached = sums.m == m
    empty = (sums.m == -jnp.inf) & ~reached
    rise = jnp.where(empty | reached | ~jnp.isfinite(m), 0, m - sums.m)
    scale = jnp.where(empty, 0, jnp.exp(-rise))
    # Nothing of an empty block enters a product, whose derivative would be NaN.
    r = jnp.where(empty, 0, sums.r)
    moved = sums._replace(m=None, r=jnp.where(reached, r, (1 + r) * scale))
    if sums.gaps is not None:
        gaps = jnp.where(empty, 0, sums.gaps)
        moved = moved._replace(gaps=scale * (gaps + rise * (1 + r)))
    if sums.costs is not None:
        moved = moved._replace(costs=sums.costs + rise * sums.mass)
    maxima, moved, more = sum_over((reached.astype(r.dtype), moved, extra(m)))
    merged = moved._replace(m=m.reshape(maxima.shape), r=moved.r + (maxima - 1))
    return (merged, more) if more else merged


def merge_shards(
    axis_name: AxisName, sums: BlockSums, extra: Callable[[Any], Any] = lambda _: ()
) -> Any:
    """The blocks of all devices along a manual mesh axis as one: one maximum and one sum."""
    max_over = partial(_sharding.maximum_over, axis_name)
    return merge_blocks(sums, max_over, partial(_sharding.sum_over, axis_name), extra)
