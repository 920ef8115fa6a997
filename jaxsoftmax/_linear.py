# SPDX-License-Identifier: Apache-2.0
"""The linear head: a per-token loss of `hidden @ kernel + bias` that never holds the logits.

The public functions, their arguments, and the choice between the two orders of the same work:
_head/token_chunks.py, for any loss, and _head/vocabulary_blocks.py, for any cotangent at the
least memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from . import _checks
from ._cross_entropy import LogProbs
from ._head.arguments import Reduction, as_head, as_per_token, as_token_labels
from ._head.programs import any_loss, cross_entropy, log_probs
from ._options import as_options
from ._rules import OF_HEADS, scope
from ._sharding import AxisName
from ._transform import as_transform


def linear_loss(
    loss_fn: Callable[..., jax.Array],
    hidden: ArrayLike,
    kernel: ArrayLike,
    *token_args: ArrayLike,
    bias: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    reduction: Reduction = "mean",
    denominator: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    chunk_size: int | None = None,
    precision: Any = None,
) -> Float[Array, "..."]:
    r"""Any per-token loss of the logits `hidden @ kernel + bias`, without holding the logits.

    Goes over chunks of `c` tokens. With a reduction the gradient is made in the forward pass,
    while the chunk's logits are there: three matrix products, like the plain version. Without
    one the backward pass does the chunks again: four products, for any cotangent.

    Args:
      loss_fn: `loss_fn(logits, *args) -> losses` for a chunk: `logits [c, V]` in float32 (float64
        for float64 operands), each `args[i]` the chunk of `token_args[i]`, `losses [c]`. It must
        treat tokens independently. What it closes over may be traced: arrays of any dtype, keys;
        and differentiated. Outside `jit` all functions that trace alike are one program, compiled
        once; one with a custom derivative in it (`jax.nn.relu`, say) has it to be inside `jax.jit`
        for that, and a number that changes is to be a JAX array.
      hidden: `[*tokens, H]`, floating.
      kernel: `[H, V]`, floating. Operands of different dtypes are promoted.
      *token_args: arrays `[*tokens, ...]` that go to `loss_fn`.
      bias: `[V]`; −inf takes a class out.
      weights: `[*tokens]`, what each loss is multiplied by. A token of weight 0 gives nothing,
        whatever it holds: what is not finite in its `hidden`, `token_args`, loss or gradient is no
        part of a sum. The derivative by that weight is the loss, or 0 if anything is not finite.
        (The gradient of what `loss_fn` closes over is a sum within: where `hidden` and `token_args`
        are finite, the loss and its derivatives by that must be too.)
      reduction: "mean" is Σ weights·loss / Σ weights (0 where that is 0 / 0), "sum", or None for
        the weighted losses `[*tokens]`.
      denominator: a scalar that replaces Σ weights in the mean.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) that shards the classes of `kernel`
        and `bias`: `loss_fn` gets its device's logits and must give the losses of the whole rows,
        as the package's losses with this `axis_name` do.
      chunk_size: tokens in a chunk, `c`. By default as many as keep a chunk's float32 logits under
        56 MiB on a CPU and 448 MiB elsewhere (JAX's default backend counts), from 256 to 4096.
        Never more than asked for; any number of tokens fits. Where an explicit mesh shards tokens
        or classes, each of its devices has chunks of `c` tokens, and V counts its classes. Where an
        automatic one may, all devices together have, and `c` is a multiple of their number, unless
        fewer tokens are asked for, or all are in one chunk.
      precision: of the matrix products, as in `jax.lax.dot_general`.

    Returns:
      A scalar, or `[*tokens]` for `reduction=None`, in float32 (float64 for float64 operands).

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Differentiable in `hidden`, `kernel`, `bias`, `weights`, floating `token_args` and what
    `loss_fn` closes over, in reverse mode, to the order `loss_fn` is. What is not differentiated
    is not computed.

    Temporary memory of value and gradient, beyond arguments and results, in bytes, with N tokens
    (for the cross-entropy; another loss may keep more of a chunk):

        float32 operands   4·c·V + 8·N·H
        half precision     4·H·V + 8·c·V + 6·N·H

    The first term of half precision is d_kernel's float32 accumulator, which with float32 operands
    is the result itself. A CPU adds up to 16 MiB, and in half precision keeps a chunk's float32
    logits where d_kernel will be: `4·H·V + 2·c·V + 6·N·H + max(0, 4·c·V − 2·H·V)`. A TPU that
    multiplies float32 in bfloat16 adds a kernel in bfloat16, `2·H·V`; a CPU multiplies float16 in
    float32, with a kernel of that, `4·H·V`. float16 takes up to `4·c·V` more: its d_logits are
    divided by a power of two first, as large as they are. Each chunk reads and writes the
    accumulator: time is lost where c is far below the operations a byte of the device.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> def squared(logits, targets):
      ...     return jnp.sum((logits - targets) ** 2, axis=-1)
      >>> hidden, kernel, targets = jnp.ones((5, 2)), jnp.ones((2, 3)), jnp.ones((5, 3))
      >>> print(jaxsoftmax.linear_loss(squared, hidden, kernel, targets))
      3.0
    """
    name = "linear_loss"
    _checks.check_callable(name, "loss_fn", loss_fn)
    head = as_head(
        name,
        hidden,
        kernel,
        bias=bias,
        weights=weights,
        reduction=reduction,
        denominator=denominator,
        axis_name=axis_name,
        chunk_size=chunk_size,
        precision=precision,
    )
    args = tuple(as_per_token(name, f"token_args[{i}]", a, head) for i, a in enumerate(token_args))
    with scope(name, OF_HEADS):
        return any_loss(loss_fn, head, args, chunk_size)


def linear_softmax_cross_entropy(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    ignore_index: int | None = None,
    class_weights: ArrayLike | None = None,
    label_smoothing: ArrayLike = 0.0,
    z_loss: ArrayLike = 0.0,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    reduction: Reduction = "mean",
    denominator: ArrayLike | None = None,
    gradients: Literal["auto", "in_forward", "recompute"] = "auto",
    axis_name: AxisName | None = None,
    chunk_size: int | None = None,
    precision: Any = None,
) -> Float[Array, "..."]:
    r"""Softmax cross-entropy of `hidden @ kernel + bias` with integer labels, chunk by chunk.

    The mean is `softmax_cross_entropy_with_integer_labels(hidden @ kernel + bias, labels).mean()`
    with its exact gradient, but the logits never exist.

    Args:
      hidden: `[*tokens, H]`, floating.
      kernel: `[H, V]`, floating. Operands of different dtypes are promoted.
      labels: `[*tokens]`, integers in [0, V). One outside makes that token's loss and gradient NaN;
        in the divisor of a mean it has the class weight 1, so that other gradients stay.
      bias: `[V]`; −inf takes a class out.
      weights: `[*tokens]`, what each loss is multiplied by. A token of weight 0 gives nothing,
        whatever its `hidden` and label are. The derivative by that weight is the token's loss, or 0
        if anything of it is not finite.
      ignore_index: a Python integer: tokens with this label have loss 0 and gradient exactly 0,
        whatever their `hidden` holds, and leave the mean.
      class_weights: `[V]`: what the loss of each class is multiplied by, as in PyTorch.
      label_smoothing: ε in [0, 1]: the target becomes `(1 − ε)·y + ε/C` over the C classes that
        are not at −inf.
      z_loss: λ ≥ 0: adds `λ·lse²` with the token's log-sum-exp.
      soft_cap: replaces the logits by `soft_cap · tanh(logits / soft_cap)`; positive.
      temperature: divides the (capped) logits; positive.
      reduction: "mean" is Σ weights·loss / Σ weights over the tokens that are not ignored, each
        of the latter times its label's class weight (0 where that is 0 / 0); "sum"; or None for
        the weighted losses `[*tokens]`.
      denominator: a scalar that replaces that divisor, a global token count, say.
      gradients: "in_forward" makes the gradient in the forward pass, as `linear_loss` does: the
        fastest, for a reduced loss. "recompute" goes over blocks of the vocabulary, as
        `linear_log_probs` does: a product more, for the least memory (with `weights` or
        `ignore_index` it holds a copy of `hidden`). "auto" is "in_forward" with a reduction and
        "recompute" without.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) that shards the classes: `kernel`,
        `bias` and `class_weights` are this device's part, in the order of the devices; labels are
        global class numbers.
      chunk_size: tokens in a chunk, or classes in a block; see those functions for the default.
      precision: of the matrix products, as in `jax.lax.dot_general`.

    Returns:
      A scalar, or `[*tokens]` for `reduction=None`, in float32 (float64 for float64 operands).

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Differentiable in `hidden`, `kernel`, `bias`, `weights` and every option but `ignore_index`, in
    reverse mode, to any order; forward mode over reverse works. What is not differentiated is not
    computed.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> hidden, kernel, labels = jnp.ones((5, 2)), jnp.zeros((2, 4)), jnp.arange(5) % 4
      >>> print(jaxsoftmax.linear_softmax_cross_entropy(hidden, kernel, labels))
      1.3862944
    """
    name = "linear_softmax_cross_entropy"
    _checks.check_choice(name, "gradients", gradients, ("auto", "in_forward", "recompute"))
    head = as_head(
        name,
        hidden,
        kernel,
        bias=bias,
        weights=weights,
        reduction=reduction,
        denominator=denominator,
        axis_name=axis_name,
        chunk_size=chunk_size,
        precision=precision,
    )
    labels = as_token_labels(name, labels, head)
    if gradients == "in_forward" and reduction is None:
        raise ValueError(
            f'{name}: gradients="in_forward" needs reduction "mean" or "sum"; got None'
        )
    ignore_index = _checks.as_ignore_index(name, ignore_index)
    options = as_options(
        name,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        soft_cap=soft_cap,
        temperature=temperature,
        class_weights=class_weights,
        axis_name=axis_name,
        classes=head.kernel.shape[1],
    )
    in_forward = gradients == "in_forward" or (gradients == "auto" and reduction is not None)
    with scope(name, OF_HEADS):
        return cross_entropy(in_forward, ignore_index, head, labels, options, chunk_size)


def linear_log_probs(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    with_entropy: bool = False,
    axis_name: AxisName | None = None,
    chunk_size: int | None = None,
    precision: Any = None,
) -> LogProbs:
    r"""Log-probability of each label under `hidden @ kernel + bias`, log-normalizer and entropy.

    What `label_log_probs` gives on the logits, which never exist here. Goes over blocks of the
    vocabulary, forward and again backward: four matrix products, any cotangents.

    Args:
      hidden: `[*tokens, H]`, floating.
      kernel: `[H, V]`, floating. Operands of different dtypes are promoted.
      labels: `[*tokens]`, integers in [0, V). One outside makes that log-probability and its
        gradient NaN.
      bias: `[V]`; −inf takes a class out.
      soft_cap: replaces the logits by `soft_cap · tanh(logits / soft_cap)`; positive.
      temperature: divides the (capped) logits; positive.
      with_entropy: also compute the entropies.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) that shards the classes (see
        `linear_softmax_cross_entropy`).
      chunk_size: classes in a block, 2048 by default; of each shard where an explicit mesh shards
        them, and of all D devices together where an automatic one is set, by default at least
        128·D (docs/sharding.md). Any number of classes fits.
      precision: of the matrix products, as in `jax.lax.dot_general`.

    Returns:
      `LogProbs` of arrays `[*tokens]` in float32, or float64 for float64 operands.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Every field is differentiable in `hidden`, `kernel`, `bias`, `soft_cap` and `temperature`, with
    any cotangents, in reverse mode to any order. What is not differentiated is not computed.

    Temporary memory of value and gradient, beyond arguments and results, in bytes, with N tokens
    and blocks of b classes (on a CPU a smaller last block counts as well: b + V mod b):

        float32 operands   4·N·b + 4·N·H + 8·H·b
        half precision     6·N·b + 8·N·H + 6·H·b

    float16 takes up to `4·N·b` more (see `linear_loss`). On a CPU with JAX 0.10, bfloat16 keeps a
    copy of d_kernel, `2·H·V`, beside half of that or more.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> hidden, kernel, labels = jnp.ones((1, 2)), jnp.zeros((2, 4)), jnp.array([3])
      >>> print(jaxsoftmax.linear_log_probs(hidden, kernel, labels).log_probs)
      [-1.3862944]
    """
    name = "linear_log_probs"
    with_entropy = _checks.as_flag(name, "with_entropy", with_entropy)
    head = as_head(
        name,
        hidden,
        kernel,
        bias=bias,
        axis_name=axis_name,
        chunk_size=chunk_size,
        precision=precision,
    )
    labels = as_token_labels(name, labels, head)
    transform = as_transform(name, soft_cap, temperature)
    with scope(name, OF_HEADS):
        return log_probs(with_entropy, head, labels, transform, chunk_size)
