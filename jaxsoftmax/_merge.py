# SPDX-License-Identifier: Apache-2.0
"""Blocks of classes, of a loop or of devices, merged into one: docs/derivation.md, section 9."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp

from . import _sharding
from ._sharding import AxisName

# The `top` of a block that does not reach the maximum: more than any class's number.
NO_CLASS = jnp.iinfo(jnp.int32).max


class BlockSums(NamedTuple):
    """The sums over a block of classes, one number per row each; None where not asked for.

    They are relative to the block's own maximum m. If the block is the whole row and only the loss
    is asked for, m may be another class's logit, such as the label's (`_row_sums`).
    """

    m: Any
    r: Any
    z_label: Any = None  # z_t, or those of K labels, [..., K]; 0 for a label in another block
    gaps: Any = None  # Σ e (m − z), for the entropy
    classes: Any = None  # the number of those not at −inf, for the spread
    mass: Any = None  # Σ u over those
    costs: Any = None  # Σ u (m − z) over those
    top: Any = None  # the number of the first class at the maximum; −1 in a row with NaN


def merge_blocks(
    sums: BlockSums,
    max_over: Callable[[Any], Any],
    sum_over: Callable[[Any], Any],
    extra: Callable[[Any], Any] = lambda _: (),
) -> Any:
    """Merges blocks of classes into one, by a maximum and a sum over the blocks.

    If an array axis counts the blocks, `max_over` keeps it with size 1 and `sum_over` removes it. A
    block that reaches the common maximum m adds its r, any other all of its (1 + r) e^(m_b − m); of
    the maxima of the blocks that reach m, all but one are added. A block of nothing but −inf has
    r = NaN and adds nothing, unless all blocks are such. A block with +inf or NaN has r = NaN too,
    and makes the whole row's r NaN. `extra(m)` is summed over the blocks in the same sum.
    """
    m = max_over(sums.m)
    reached = sums.m == m
    empty = (sums.m == -jnp.inf) & ~reached
    rise = jnp.where(empty | reached | ~jnp.isfinite(m), 0, m - sums.m)
    scale = jnp.where(empty, 0, jnp.exp(-rise))
    # No number of an empty block enters a product: the product's derivative would be NaN.
    r = jnp.where(empty, 0, sums.r)
    moved = sums._replace(m=None, top=None, r=jnp.where(reached, r, (1 + r) * scale))
    if sums.gaps is not None:
        gaps = jnp.where(empty, 0, sums.gaps)
        moved = moved._replace(gaps=scale * (gaps + rise * (1 + r)))
    if sums.costs is not None:
        moved = moved._replace(costs=sums.costs + rise * sums.mass)
    maxima, moved, more = sum_over((reached.astype(r.dtype), moved, extra(m)))
    merged = moved._replace(m=m.reshape(maxima.shape), r=moved.r + (maxima - 1))
    if sums.top is not None:
        least = -max_over(-jnp.where(reached | (sums.top < 0), sums.top, NO_CLASS))
        merged = merged._replace(top=least.reshape(maxima.shape))
    return (merged, more) if more else merged


def merge_shards(
    axis_name: AxisName, sums: BlockSums, extra: Callable[[Any], Any] = lambda _: ()
) -> Any:
    """Merges the blocks of all devices along a manual mesh axis: one maximum and one sum."""
    max_over = partial(_sharding.maximum_over, axis_name)
    return merge_blocks(sums, max_over, partial(_sharding.sum_over, axis_name), extra)
