# SPDX-License-Identifier: Apache-2.0
"""The arguments of the linear head, checked, and how its losses are put back together."""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from . import _checks
from ._numerics import accumulation_dtype
from ._sharding import AxisName, Layout, laid_out, layout_of, merged_tokens, unmerged_tokens

Reduction = Literal["mean", "sum"] | None


class Head(NamedTuple):
    """The checked arguments, tokens in one axis; how to put the losses back together."""

    shape: tuple[int, ...]
    hidden: jax.Array  # [N, H]
    kernel: jax.Array  # [H, V]
    bias: jax.Array | None  # [V]
    weights: jax.Array | None  # [N]
    reduction: Reduction
    denominator: jax.Array | None
    layout: Layout
    axis_name: AxisName | None
    counts: jax.Array | None = None  # [N], what each token counts in the mean beside its weight

    def unreduced(self, losses):
        losses = losses if self.weights is None else losses * self.weights
        return unmerged_tokens(self.layout, losses, self.shape)

    def reduced(self, losses):
        return self.divided(jnp.sum(losses if self.weights is None else losses * self.weights))

    def divided(self, total):
        if self.reduction == "sum":
            return total
        counts = jnp.ones(self.hidden.shape[:1], total.dtype)
        for factor in (self.weights, self.counts):
            counts = counts if factor is None else counts * factor.astype(counts.dtype)
        divisor = counts.sum() if self.denominator is None else self.denominator
        # Where nothing counts the total is 0; any other division by 0 shows.
        return total / jnp.where(jnp.any(counts != 0), divisor, jnp.ones_like(divisor))


def as_head(
    function: str,
    hidden: ArrayLike,
    kernel: ArrayLike,
    *,
    bias: ArrayLike | None,
    weights: ArrayLike | None = None,
    reduction: Reduction = None,
    denominator: ArrayLike | None = None,
    axis_name: AxisName | None,
    chunk_size: int | None,
    precision: Any,
) -> Head:
    hidden = _checks.as_floating(function, "hidden", hidden)
    kernel = _checks.as_floating(function, "kernel", kernel)
    if hidden.ndim == 0:
        raise ValueError(f"{function}: hidden must have shape [*tokens, H]; got a scalar")
    *tokens, width = hidden.shape
    if kernel.ndim != 2 or kernel.shape[0] != width:
        raise ValueError(
            f"{function}: kernel must have shape ({width}, V), with H = {width} the last axis of "
            f"hidden; got {kernel.shape}"
        )
    _checks.check_has_classes(function, "kernel", kernel.shape, (1,))
    classes = kernel.shape[1]
    dtype = jnp.promote_types(hidden.dtype, kernel.dtype)
    shape = tuple(tokens)
    if bias is not None:
        bias = _checks.as_floating(function, "bias", bias)
        meaning = f"one number for each of the {classes} classes of kernel"
        _checks.check_shape(function, "bias", bias.shape, (classes,), meaning)
    parts, whole = {"kernel": kernel, "bias": bias}, {"hidden": hidden}
    axis_name = _checks.as_axis_name(function, axis_name, parts, whole)
    _checks.check_mesh(function, hidden, kernel)
    layout = layout_of(hidden, kernel)
    total = accumulation_dtype(dtype)
    if weights is not None:
        weights = _checks.as_inexact(function, "weights", weights)
        _checks.check_shape(function, "weights", weights.shape, shape, "the tokens of hidden")
        weights = merged_tokens(layout, weights.astype(total))
    _checks.check_choice(function, "reduction", reduction, ("mean", "sum", None))
    if denominator is not None:
        if reduction != "mean":
            raise ValueError(
                f'{function}: denominator needs reduction="mean"; got reduction={reduction!r}'
            )
        denominator = _checks.as_scalar(function, "denominator", denominator).astype(total)
    _checks.check_precision(function, precision)
    if chunk_size is not None:
        _checks.check_count(function, "chunk_size", chunk_size)
    hidden = laid_out(hidden.astype(dtype), layout.spec(*layout.tokens, None))
    rows, kernel = merged_tokens(layout, hidden), kernel.astype(dtype)
    return Head(shape, rows, kernel, bias, weights, reduction, denominator, layout, axis_name)


def as_per_token(function, name, value, head):
    value = _checks.as_array(function, name, value)
    tokens = len(head.shape)
    axes = f"the first axes of {name}"
    _checks.check_shape(function, axes, value.shape[:tokens], head.shape, "the tokens of hidden")
    return merged_tokens(head.layout, value)


def as_token_labels(function, labels, head):
    labels = _checks.as_labels(function, "labels", labels)
    _checks.as_axis_name(function, head.axis_name, {}, {"labels": labels})
    _checks.check_shape(function, "labels", labels.shape, head.shape, "the tokens of hidden")
    return merged_tokens(head.layout, labels)
