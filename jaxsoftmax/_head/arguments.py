# SPDX-License-Identifier: Apache-2.0
"""The checked arguments of the linear head, and how its losses are reduced or reshaped."""

import dataclasses
from collections.abc import Sequence
from functools import partial, reduce
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from .. import _checks
from .._numerics import accumulation_dtype
from .._options import Options, ignored_tokens, label_weights
from .._sharding import AxisName, axis_names, manual_axes, shard_count, varying
from .counted import may_count
from .layout import HeadSharding, sharding_of_head
from .products import Products, finite_if_counted

Reduction = Literal["mean", "sum"] | None


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("hidden", "kernel", "bias", "weights", "denominator", "counts", "live"),
    meta_fields=("shape", "reduction", "sharding", "axis_name", "products"),
)
@dataclasses.dataclass(frozen=True)
class Head:
    """The checked arguments of a head, as one argument of jit, with the reduction of its losses."""

    hidden: jax.Array  # [*tokens, H], or [N, H] in `rows`
    kernel: jax.Array  # [H, V], or [V, H]
    bias: jax.Array | None  # [V]
    weights: jax.Array | None  # as hidden, without H
    denominator: jax.Array | None
    shape: tuple[int, ...]  # [*tokens]
    reduction: Reduction
    sharding: HeadSharding
    axis_name: AxisName | None
    products: Products
    counts: jax.Array | None = None  # [N], what each token counts in the mean beside its weight
    live: jax.Array | None = None  # [N], which tokens count at all; None for all

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of sums and of the losses."""
        return accumulation_dtype(self.products.dtype)

    def rows(self, *others: Any) -> "Head":
        """Tokens in one axis; the mesh of `others` if the head has none."""
        sharding = self.sharding.on_mesh_of((self.bias, self.weights, others))
        hidden = sharding.resharded(self.hidden, *sharding.tokens, None)
        weights, denominator = self.weights, self.denominator
        if weights is not None:
            weights = sharding.merge_tokens(weights.astype(self.dtype))
        return dataclasses.replace(
            self,
            sharding=sharding,
            hidden=sharding.merge_tokens(hidden),
            weights=weights,
            denominator=None if denominator is None else denominator.astype(self.dtype),
        )

    def without_uncounted(
        self, ignored: jax.Array | None = None, args: Sequence[jax.Array] = ()
    ) -> tuple["Head", tuple[jax.Array, ...]]:
        """Keeps tokens that do not count out of the products, where 0 · NaN would be NaN.

        Hidden state, weight and `args` become zeros for an ignored token. So they do for a token of
        weight 0 that holds anything not finite; its weight becomes a constant 0. If all is finite,
        a weight of 0 is enough by itself, and the derivative by the weight is that of the real
        loss.
        """
        out, weights = ignored, self.weights
        live = None if ignored is None else ~ignored
        if weights is not None:
            live = may_count(weights) if live is None else live & may_count(weights)
            floating = _real(self.hidden, *args)
            finite = [jnp.all(jnp.isfinite(a), tuple(range(1, a.ndim))) for a in floating]
            broken = (weights == 0) & ~reduce(jnp.logical_and, finite)
            out = broken if out is None else out | broken
            weights = jnp.where(out, 0, weights)
        if out is None:
            return self, tuple(args)

        def zeroed(x):
            return jnp.where(jnp.expand_dims(out, tuple(range(1, x.ndim))), 0, x) if _real(x) else x

        hidden, *args = map(zeroed, (self.hidden, *args))
        return dataclasses.replace(self, hidden=hidden, weights=weights, live=live), tuple(args)

    def labelled_rows(
        self, labels: jax.Array, ignore_index: int | None, options: Options
    ) -> tuple["Head", jax.Array, Options]:
        """`rows`, with labels and options sharded to match, and what each token counts."""
        head = self.rows(labels, options)
        labels = head.sharding.merge_tokens(labels)
        # Options are the same on all devices: their derivatives are summed over them once, here.
        axes = manual_axes(*jax.tree.leaves((head.hidden, head.kernel, head.bias, labels)))
        axes = axes - axis_names(head.axis_name)
        options = jax.tree.map(lambda x: varying(x, axes), options)
        weights = head.sharding.resharded(options.class_weights, head.sharding.classes)
        counts = label_weights(labels, ignore_index, weights, head.axis_name)
        head = dataclasses.replace(head, counts=counts)
        head, _ = head.without_uncounted(ignored_tokens(labels, ignore_index))
        return head, labels, options._replace(class_weights=weights)

    @property
    def classes(self) -> int:
        """The number of classes, on all devices."""
        return self.kernel.shape[self.products.class_axis] * shard_count(self.axis_name)

    def unreduced(self, losses: jax.Array) -> jax.Array:
        """The weighted losses `[*tokens]`, of losses `[N]`."""
        return self.sharding.split_tokens(self._weighted(losses), self.shape)

    def reduced(self, losses: jax.Array) -> jax.Array:
        """The sum or the mean of the weighted losses, of losses `[N]`."""
        return self.divided(jnp.sum(self._weighted(losses)))

    def _weighted(self, losses):
        weights = self.weights
        return losses if weights is None else finite_if_counted(losses, weights) * weights

    def divided(self, total: jax.Array) -> jax.Array:
        """A sum over the tokens, or its terms, divided by the mean's divisor (by 1 for a sum)."""
        if self.reduction == "sum":
            return total
        counts = jnp.ones(self.hidden.shape[:1], total.dtype)
        for factor in (self.weights, self.counts):
            counts = counts if factor is None else counts * factor.astype(counts.dtype)
        divisor = counts.sum() if self.denominator is None else self.denominator
        # If no token counts, the total is 0 and stays so; any other division by 0 shows.
        return total / jnp.where(jnp.any(counts != 0), divisor, jnp.ones_like(divisor))


def _real(*arrays):
    """Those of the arrays that may hold NaN."""
    return [a for a in arrays if jnp.issubdtype(a.dtype, jnp.inexact)]


class TargetHead(NamedTuple):
    """The checked operands of the head that a divergence is measured from."""

    hidden: jax.Array  # [*tokens, H']
    kernel: jax.Array  # [H', V], or [V, H']
    bias: jax.Array | None


def as_target_head(
    function: str,
    head: Head,
    hidden: ArrayLike,
    kernel: ArrayLike,
    bias: ArrayLike | None,
    *,
    compute_dtype: Any,
) -> tuple[TargetHead, Products]:
    """Check a second head of the same tokens and classes, of any width."""
    products, axis = head.products, head.products.class_axis
    hidden, kernel, bias, dtype = _as_operands(
        function, "target_", hidden, kernel, bias, axis, head.axis_name, compute_dtype
    )
    tokens, name = hidden.shape[:-1], "the tokens of target_hidden"
    _checks.check_shape(function, name, tokens, head.shape, "those of hidden")
    classes, name = kernel.shape[axis : axis + 1], "the classes of target_kernel"
    _checks.check_shape(function, name, classes, head.kernel.shape[axis : axis + 1], "as kernel")
    return TargetHead(hidden, kernel, bias), products._replace(dtype=dtype)


def as_token_mask(function: str, where: ArrayLike | None, head: Head) -> jax.Array | None:
    """`where`, a mask of tokens, as an array `[*tokens]`."""
    if where is None:
        return None
    where = _checks.as_mask(function, "where", where)
    _checks.check_shape(function, "where", where.shape, head.shape, "the tokens of hidden")
    _checks.check_whole_classes(function, head.axis_name, {"where": where})
    return where


def _as_operands(  # noqa: PLR0917
    function, of, hidden, kernel, bias, class_axis, axis_name, compute_dtype
):
    """The operands of a head, whose arguments' names begin with `of`; the products' dtype."""
    names = [f"{of}{name}" for name in ("hidden", "kernel", "bias")]
    of_hidden, of_kernel, of_bias = names
    hidden = _checks.as_floating(function, of_hidden, hidden)
    kernel = _checks.as_floating(function, of_kernel, kernel)
    if hidden.ndim == 0:
        raise ValueError(f"{function}: {of_hidden} must have shape [*tokens, H]; got a scalar")
    width = hidden.shape[-1]
    if kernel.ndim != 2 or kernel.shape[1 - class_axis] != width:
        expected = f"({width}, V)" if class_axis == 1 else f"(V, {width}), as it is transposed"
        raise ValueError(
            f"{function}: {of_kernel} must have shape {expected}, with H = {width} the last axis "
            f"of {of_hidden}; got {kernel.shape}"
        )
    _checks.check_has_classes(function, of_kernel, kernel.shape, (class_axis,))
    classes = kernel.shape[class_axis]
    if compute_dtype is None:
        _checks.promoted(function, {of_hidden: hidden, of_kernel: kernel})
        dtype = jnp.promote_types(hidden.dtype, kernel.dtype)
    else:
        dtype = _checks.as_compute_dtype(function, "compute_dtype", compute_dtype)
    if bias is not None:
        bias = _checks.as_floating(function, of_bias, bias)
        meaning = f"one number for each of the {classes} classes of {of_kernel}"
        _checks.check_shape(function, of_bias, bias.shape, (classes,), meaning)
    _checks.check_sharded_classes(function, axis_name, {of_kernel: kernel, of_bias: bias})
    _checks.check_whole_classes(function, axis_name, {of_hidden: hidden})
    _checks.check_mesh(function, hidden, kernel)
    return hidden, kernel, bias, dtype


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
    transpose_kernel: bool,
    chunk_size: int | None,
    precision: Any,
    compute_dtype: Any,
) -> Head:
    """Check the arguments that all heads share."""
    class_axis = 0 if _checks.as_flag(function, "transpose_kernel", transpose_kernel) else 1
    axis_name = _checks.as_axis_name(function, axis_name)
    hidden, kernel, bias, dtype = _as_operands(
        function, "", hidden, kernel, bias, class_axis, axis_name, compute_dtype
    )
    shape = hidden.shape[:-1]
    if weights is not None:
        weights = _checks.as_inexact(function, "weights", weights)
        _checks.check_shape(function, "weights", weights.shape, shape, "the tokens of hidden")
    _checks.check_choice(function, "reduction", reduction, ("mean", "sum", None))
    if denominator is not None:
        if reduction != "mean":
            raise ValueError(
                f'{function}: denominator needs reduction="mean"; got reduction={reduction!r}'
            )
        denominator = _checks.as_scalar(function, "denominator", denominator)
    _checks.check_precision(function, precision)
    if chunk_size is not None:
        _checks.check_count(function, "chunk_size", chunk_size)
    return Head(
        hidden,
        kernel,
        bias,
        weights,
        denominator,
        shape,
        reduction,
        sharding_of_head(hidden, kernel, class_axis),
        axis_name,
        Products(dtype, tuple(precision) if isinstance(precision, list) else precision, class_axis),
    )


def as_per_token(function: str, name: str, value: ArrayLike, head: Head) -> jax.Array:
    """`value` as an array `[*tokens, ...]`."""
    value = _checks.as_array(function, name, value)
    axes = f"the first axes of {name}"
    first = value.shape[: len(head.shape)]
    _checks.check_shape(function, axes, first, head.shape, "the tokens of hidden")
    return value


def as_token_labels(
    function: str, labels: ArrayLike, head: Head, *, several: bool = False
) -> jax.Array:
    """`labels` as an array of integers `[*tokens]`; `[*tokens, K]` too if `several` are allowed."""
    labels = _checks.as_labels(function, "labels", labels)
    _checks.check_whole_classes(function, head.axis_name, {"labels": labels})
    shape, meaning = labels.shape, "the tokens of hidden"
    _checks.check_label_shape(function, shape, head.shape, meaning, several=several)
    return labels
