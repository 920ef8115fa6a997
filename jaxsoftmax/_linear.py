# SPDX-License-Identifier: Apache-2.0
"""The linear head: a per-token loss of `hidden @ kernel + bias` that never holds the logits.

The public functions, their arguments, and the choice between two orders of the same work: by chunks
of tokens (_head/token_chunks.py), for any loss, or by blocks of classes
(_head/vocabulary_blocks.py), for any cotangent with the least memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import jax
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from . import _checks
from ._cross_entropy import LogProbs, of_log_probs
from ._head.arguments import (
    Reduction,
    as_head,
    as_per_token,
    as_target_head,
    as_token_labels,
    as_token_mask,
)
from ._head.choices import Sample, TopK, sample, top_k_classes
from ._head.programs import Compared, any_loss, cross_entropy, divergences, log_probs
from ._options import as_options
from ._rules import OF_HEADS, scope
from ._sharding import AxisName
from ._transform import as_transform, as_transforms


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
    transpose_kernel: bool = False,
    chunk_size: int | None = None,
    precision: Any = None,
    compute_dtype: Any = None,
) -> Float[Array, "..."]:
    r"""Any per-token loss of the logits `hidden @ kernel + bias`, without holding the logits.

    Works on one chunk of `c` tokens at a time. With a reduction, the gradient is computed in the
    forward pass, while the chunk's logits exist: three matrix products, as in the plain version.
    Without one, the backward pass recomputes every chunk: four products, for any cotangent.

    Args:
      loss_fn: `loss_fn(logits, *args) -> losses` for a chunk: `logits [c, V]` in float32 (float64
        for float64 products), each `args[i]` the chunk of `token_args[i]`, `losses [c]`. It must
        treat tokens independently. It may close over arrays of any dtype and keys; they may be
        traced and differentiated. Outside `jit`, functions with the same trace share one compiled
        program. A custom derivative (as in `jax.nn.relu`) prevents that unless it is called inside
        a `jax.jit` of yours, and so does a Python number that changes: make it a JAX array.
      hidden: `[*tokens, H]`, floating.
      kernel: `[H, V]`, floating. Operands of different dtypes are promoted, or cast to
        `compute_dtype`.
      *token_args: arrays `[*tokens, ...]` that are passed to `loss_fn`.
      bias: `[V]`; −inf excludes a class.
      weights: `[*tokens]`, the factor of each loss. A token of weight 0 contributes nothing: NaN or
        infinity in its `hidden`, `token_args`, loss or gradient never enters a sum. The derivative
        by that weight is the token's loss, or 0 if anything of the token is not finite. (The
        gradient of what `loss_fn` closes over is summed over tokens by `loss_fn`'s own derivative:
        where `hidden` and `token_args` are finite, the loss and that derivative must be too.) Such
        tokens cost nothing: chunks without a token that counts are not computed, unless the
        weights are differentiated.
      reduction: "mean" is Σ weights·loss / Σ weights (0 if every weight is 0), "sum", or None for
        the weighted losses `[*tokens]`.
      denominator: a scalar that replaces Σ weights in the mean. Where nothing counts the mean is 0,
        whatever it is.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) that shards the classes of `kernel`
        and `bias`: `loss_fn` gets this device's part of the logits and must return the losses of
        whole rows, as the package's losses with this `axis_name` do.
      transpose_kernel: whether `kernel` is `[V, H]`, as an embedding table or PyTorch's weight; its
        gradient is `[V, H]` too. No transposed copy is made.
      chunk_size: the most tokens in a chunk, `c`; chunks have equal sizes, and any number of tokens
        fits. By default as many as keep a chunk's float32 logits under 56 MiB where the program is
        lowered for a CPU, and 512 MiB elsewhere, but from 256 to 4096; elsewhere several chunks are
        multiples of 256, or of a smaller power of two where that would add 1/32 to the tokens. With
        `weights`, an eighth of the tokens at most, unless that is less than 256 (512 elsewhere).
        Where an explicit mesh shards tokens or classes, `c` counts the tokens, and V the classes,
        of one device. Where an automatic mesh may shard them, `c` counts the tokens of all devices,
        and is a multiple of the number of devices, unless `chunk_size` is smaller or one chunk
        holds all tokens.
      precision: of the matrix products, as in `jax.lax.dot_general`.
      compute_dtype: the dtype of the matrix products, such as bfloat16 beside float32 parameters;
        by default that of the operands, promoted. The products are summed in float32 (float64 for
        float64), and each gradient is rounded once, to the dtype of its operand.

    Returns:
      A scalar, or `[*tokens]` for `reduction=None`, in float32 (float64 for float64 products).

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Differentiable in `hidden`, `kernel`, `bias`, `weights`, floating `token_args` and what
    `loss_fn` closes over, in reverse mode, to the same order as `loss_fn`. Gradients that are not
    asked for are not computed.

    Where the program is lowered for no CPU, the logits' cotangents of a group of chunks are kept in
    the dtype of the products, and one product adds them to d_kernel: of all N tokens if they take
    at most `4·H·V` bytes, else of g tokens that take half as much, at most 4096. On a CPU, and
    where all logits take less than 64 MiB in float32, each chunk adds to it, and g is 0; it is 0
    too where a group is one chunk of several.

    Temporary memory of value and gradient, beyond arguments and results, in bytes, with N tokens
    (for the cross-entropy; another loss may keep more per chunk):

        float32 operands   4·c·V + 4·g·V + 8·N·H
        half precision     4·H·V + 8·c·V + 2·g·V + 6·N·H

    The first term of half precision is the float32 accumulator of d_kernel, which is not there if
    g = N; with a float32 kernel the result itself is the accumulator. Operands that are cast to
    `compute_dtype` add their copies, `2·H·V + 2·N·H` in half precision. A CPU adds up to 16 MiB; in
    half precision it keeps a chunk's float32 logits in the later memory of d_kernel, which makes
    the sum `4·H·V + 2·c·V + 6·N·H + max(0, 4·c·V − 2·H·V)`. A TPU keeps the cotangents of several
    groups twice; one that multiplies float32 in bfloat16 adds a copy of the kernel in bfloat16,
    `2·H·V`; a CPU multiplies float16 in float32 and adds a copy in float32, `4·H·V`. float16 takes
    up to `4·c·V` more: its d_logits are first divided by a power of two of about their size.

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
        transpose_kernel=transpose_kernel,
        chunk_size=chunk_size,
        precision=precision,
        compute_dtype=compute_dtype,
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
    transpose_kernel: bool = False,
    chunk_size: int | None = None,
    precision: Any = None,
    compute_dtype: Any = None,
) -> Float[Array, "..."]:
    r"""Softmax cross-entropy of `hidden @ kernel + bias` with integer labels, chunk by chunk.

    The mean is `softmax_cross_entropy_with_integer_labels(hidden @ kernel + bias, labels).mean()`
    with its exact gradient, but only the logits of one chunk exist at a time.

    Args:
      hidden: `[*tokens, H]`, floating.
      kernel: `[H, V]`, floating. Operands of different dtypes are promoted, or cast to
        `compute_dtype`.
      labels: `[*tokens]`, integers in [0, V). A label out of range makes that token's loss and
        gradient NaN, and with it the gradients of `kernel` and `bias`; a mean's divisor counts it
        with the class weight 1, so that the gradients of other tokens' `hidden` stay.
      bias: `[V]`; −inf excludes a class.
      weights: `[*tokens]`, the factor of each loss. A token of weight 0 contributes nothing,
        whatever its `hidden` and label are. The derivative by that weight is the token's loss, or 0
        if anything of the token is not finite. Such tokens cost nothing, as ignored ones, unless
        the weights are differentiated.
      ignore_index: a Python integer: tokens with this label have loss 0 and gradient exactly 0,
        whatever their `hidden` holds, and do not count in the mean. Such tokens cost nothing:
        chunks without a token that counts are not computed (docs/performance.md).
      class_weights: `[V]`, the factor of the loss of each class, as in PyTorch.
      label_smoothing: ε in [0, 1]: the target becomes `(1 − ε)·y + ε/C` over the C classes that
        are not at −inf.
      z_loss: λ ≥ 0: adds `λ·lse²`, with lse the token's log-sum-exp.
      soft_cap: replaces the logits by `soft_cap · tanh(logits / soft_cap)`; positive.
      temperature: divides the (capped) logits; positive.
      reduction: "mean" is Σ weights·loss / Σ weights·class_weights[label], both over the tokens
        that are not ignored (0 if every term of the divisor is 0); "sum"; or None for the weighted
        losses `[*tokens]`.
      denominator: a scalar that replaces the mean's divisor, such as a global token count. Where
        nothing counts the mean is 0, whatever it is.
      gradients: "in_forward" computes the gradient in the forward pass, as `linear_loss` does:
        faster on CPUs and GPUs, for a reduced loss only. "recompute" works on blocks of the
        vocabulary and recomputes their logits in the backward pass, as `linear_log_probs` does: one
        product more, for the least memory (with `weights` or `ignore_index` it holds a copy of
        `hidden`).
        "auto" is "recompute" without a reduction, and in a program lowered for TPUs if all logits
        take more than 64 MiB in float32, no `chunk_size` is given, and, where JAX has several
        devices, their mesh is set or explicit; else "in_forward".
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) that shards the classes: `kernel`,
        `bias` and `class_weights` are this device's part, in the order of the devices; labels are
        global class numbers.
      transpose_kernel: whether `kernel` is `[V, H]` (see `linear_loss`).
      chunk_size: tokens in a chunk (see `linear_loss`; smaller with `ignore_index` as with
        `weights`), or in "recompute" classes in a block (see `linear_log_probs`).
      precision: of the matrix products, as in `jax.lax.dot_general`.
      compute_dtype: the dtype of the matrix products (see `linear_loss`).

    Returns:
      A scalar, or `[*tokens]` for `reduction=None`, in float32 (float64 for float64 products).

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Differentiable in `hidden`, `kernel`, `bias`, `weights` and every option but `ignore_index`, in
    reverse mode, to any order; forward mode over reverse works. Gradients that are not asked for
    are not computed.

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
        transpose_kernel=transpose_kernel,
        chunk_size=chunk_size,
        precision=precision,
        compute_dtype=compute_dtype,
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
        classes=head.kernel.shape[head.products.class_axis],
    )
    with scope(name, OF_HEADS):
        return cross_entropy(gradients, ignore_index, head, labels, options, chunk_size)


def linear_log_probs(
    hidden: ArrayLike,
    kernel: ArrayLike,
    labels: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    where: ArrayLike | None = None,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    with_entropy: bool = False,
    with_predictions: bool = False,
    axis_name: AxisName | None = None,
    transpose_kernel: bool = False,
    chunk_size: int | None = None,
    precision: Any = None,
    compute_dtype: Any = None,
) -> LogProbs:
    r"""Log-probability of each label under `hidden @ kernel + bias`, log-normalizer and entropy.

    The results of `label_log_probs` on these logits, of which only one block of classes exists at a
    time. The backward pass recomputes every block: four matrix products, for any cotangents.

    Args:
      hidden: `[*tokens, H]`, floating.
      kernel: `[H, V]`, floating. Operands of different dtypes are promoted, or cast to
        `compute_dtype`.
      labels: `[*tokens]`, integers in [0, V), or `[*tokens, K]`, K for each token. A label out of
        range makes that log-probability and its token's gradient NaN.
      bias: `[V]`; −inf excludes a class.
      where: `[*tokens]`, boolean: the tokens to include. Those of others are 0 in every field, −1
        in `predictions`, with gradient exactly 0, whatever their `hidden` and labels are, and cost
        nothing (see `linear_softmax_cross_entropy`).
      soft_cap: replaces the logits by `soft_cap · tanh(logits / soft_cap)`; positive.
      temperature: divides the (capped) logits; positive.
      with_entropy: also compute the entropies.
      with_predictions: also find the most likely class of each token.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) that shards the classes (see
        `linear_softmax_cross_entropy`).
      transpose_kernel: whether `kernel` is `[V, H]` (see `linear_loss`).
      chunk_size: classes in a block. By default 2048 where the program is lowered for a CPU or all
        logits take less than 64 MiB in float32; elsewhere as many as keep a block's float32 logits
        under 256 MiB, from 2048 to 8192, in blocks of equal size that are multiples of 256. Where
        an explicit mesh shards the classes, it counts those of one shard. Where an automatic mesh
        of D devices is set, it counts those of all devices, by default at least 128·D
        (docs/guides/sharding.md). Any number of classes fits.
      precision: of the matrix products, as in `jax.lax.dot_general`.
      compute_dtype: the dtype of the matrix products (see `linear_loss`).

    Returns:
      `LogProbs` in float32, or float64 for float64 products. Log-probabilities have the shape of
      the labels, the rest `[*tokens]`.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Every field is differentiable in `hidden`, `kernel`, `bias`, `soft_cap` and `temperature`
    (predictions are integers), with any cotangents, in reverse mode to any order. Gradients that
    are not asked for are not computed.

    Temporary memory of value and gradient, beyond arguments and results, in bytes, with N tokens
    and blocks of b classes (on a CPU a smaller last block counts as well: N·(b + V mod b) for N·b):

        float32 operands   4·N·b + 4·N·H + 8·H·b
        half precision     6·N·b + 8·N·H + 6·H·b

    float16 takes up to `4·N·b` more (see `linear_loss`). On a CPU with JAX 0.10, bfloat16 also
    keeps a copy of d_kernel: at least `2·H·V` plus half of the sum above.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> hidden, kernel, labels = jnp.ones((1, 2)), jnp.zeros((2, 4)), jnp.array([3])
      >>> print(jaxsoftmax.linear_log_probs(hidden, kernel, labels).log_probs)
      [-1.3862944]
    """
    name = "linear_log_probs"
    spec = of_log_probs(name, with_entropy, with_predictions)
    head = as_head(
        name,
        hidden,
        kernel,
        bias=bias,
        axis_name=axis_name,
        transpose_kernel=transpose_kernel,
        chunk_size=chunk_size,
        precision=precision,
        compute_dtype=compute_dtype,
    )
    labels = as_token_labels(name, labels, head, several=True)
    where = as_token_mask(name, where, head)
    transform = as_transform(name, soft_cap, temperature)
    with scope(name, OF_HEADS):
        return log_probs(spec, head, labels, where, transform, chunk_size)


def linear_kl_divergence(
    hidden: ArrayLike,
    kernel: ArrayLike,
    target_hidden: ArrayLike,
    target_kernel: ArrayLike,
    *,
    bias: ArrayLike | None = None,
    target_bias: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reduction: Reduction = "mean",
    denominator: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    soft_cap: ArrayLike | None = None,
    target_soft_cap: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    transpose_kernel: bool = False,
    chunk_size: int | None = None,
    precision: Any = None,
    compute_dtype: Any = None,
) -> Float[Array, "..."]:
    r"""`KL(target ‖ softmax(hidden @ kernel + bias))` of two heads, chunk by chunk.

    The mean is that of `softmax_kl_divergence(hidden @ kernel + bias, target_hidden @ target_kernel
    + target_bias)`, with its exact gradient, but only the logits of one chunk of tokens exist at a
    time, of either head. A target that is not differentiated costs its one product. The reverse
    divergence is the call with the heads exchanged.

    Args:
      hidden: `[*tokens, H]`, floating: the student's, or the policy's.
      kernel: `[H, V]`, floating. Operands of different dtypes are promoted, or cast to
        `compute_dtype`.
      target_hidden: `[*tokens, G]`, floating: the teacher's, or the reference's, of any width.
      target_kernel: `[G, V]`, floating.
      bias: `[V]`; −inf excludes a class: see `target_bias`.
      target_bias: `[V]`. A class at −inf in both does not count (a padded vocabulary); in the
        target alone it adds its q_k; in `bias` alone it makes the divergence +inf, and gradients by
        the target's operands infinite or NaN.
      weights: `[*tokens]`, the factor of each divergence. A token of weight 0 contributes nothing,
        whatever its hidden states are (see `linear_loss`).
      where: `[*tokens]`, boolean: the tokens to include. The others have divergence 0 and gradient
        exactly 0, whatever their hidden states hold, do not count in the mean, and cost nothing:
        chunks without a token that counts are not computed.
      reduction: "mean" is Σ weights·divergence / Σ weights over the tokens that are included (0 if
        there is none), "sum", or None for the weighted divergences `[*tokens]`.
      denominator: a scalar that replaces the mean's divisor, such as a global token count. Where
        nothing counts the mean is 0, whatever it is.
      temperature: divides both (capped) logits; positive. Multiply the divergence by
        `temperature**2` to keep the size of the gradients.
      soft_cap: replaces the logits by `soft_cap · tanh(logits / soft_cap)`; positive.
      target_soft_cap: the same of the target's logits.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) that shards the classes: kernels
        and biases are this device's part, in the order of the devices.
      transpose_kernel: whether both kernels are `[V, …]` (see `linear_loss`).
      chunk_size: the most tokens in a chunk (see `linear_loss`). By default as many as keep both
        arrays of float32 logits together under the bytes that one has there.
      precision: of the matrix products, as in `jax.lax.dot_general`.
      compute_dtype: the dtype of the matrix products (see `linear_loss`).

    Returns:
      A scalar, or `[*tokens]` for `reduction=None`, in float32; float64 where the products of the
      first head are float64.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Differentiable in the operands of both heads, `weights`, `temperature` and the soft caps, in
    reverse mode, to any order; forward mode over reverse works. docs/forms.md equations (71), (74)
    and (75). Gradients that are not asked for are not computed.

    Gradients of the target's operands are rounded to the products' dtype in each chunk, before the
    loss's cotangent multiplies them, and those of its kernel and bias then added in float32: to
    train a target in float16, give it float32 operands and `compute_dtype`. On an explicit mesh
    these are summed over the devices of the tokens in each chunk, not once.

    There is one matrix product more than in `linear_loss` for the target, or three if it is
    differentiated. The temporary memory is that of `linear_loss` with chunks of half as many
    tokens, but for the logits of a chunk of c tokens: there are three arrays of `4·c·V` bytes, both
    logits and the gradient, or some eight for the Jensen–Shannon divergence.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> hidden, kernel = jnp.ones((5, 2)), jnp.array([[0.0, 1e-4, 0.0], [0.0, 0.0, 0.0]])
      >>> target = hidden, jnp.zeros((2, 3))
      >>> print(f"{jaxsoftmax.linear_kl_divergence(hidden, kernel, *target):.5g}")
      1.1111e-09
    """
    return _linear_divergence(
        "linear_kl_divergence",
        (hidden, kernel, bias),
        (target_hidden, target_kernel, target_bias),
        where,
        None,
        (temperature, soft_cap, target_soft_cap),
        weights=weights,
        reduction=reduction,
        denominator=denominator,
        axis_name=axis_name,
        transpose_kernel=transpose_kernel,
        chunk_size=chunk_size,
        precision=precision,
        compute_dtype=compute_dtype,
    )


def linear_js_divergence(
    hidden: ArrayLike,
    kernel: ArrayLike,
    target_hidden: ArrayLike,
    target_kernel: ArrayLike,
    *,
    weight: ArrayLike = 0.5,
    bias: ArrayLike | None = None,
    target_bias: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    where: ArrayLike | None = None,
    reduction: Reduction = "mean",
    denominator: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    soft_cap: ArrayLike | None = None,
    target_soft_cap: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    transpose_kernel: bool = False,
    chunk_size: int | None = None,
    precision: Any = None,
    compute_dtype: Any = None,
) -> Float[Array, "..."]:
    r"""The weighted Jensen–Shannon divergence of the softmaxes of two heads, chunk by chunk.

    `softmax_js_divergence(hidden @ kernel + bias, target_hidden @ target_kernel + target_bias)` of
    each token, and its mean; no more than the logits of one chunk of tokens exist at a time.

    Args:
      hidden: `[*tokens, H]`, floating.
      kernel: `[H, V]`, floating.
      target_hidden: `[*tokens, G]`, floating.
      target_kernel: `[G, V]`, floating.
      weight: w, the share of the first head's distribution in the mixture, between 0 and 1 and
        neither.
      bias: `[V]`; −inf excludes a class.
      target_bias: `[V]`; −inf excludes a class.
      weights: `[*tokens]`, the factor of each divergence (see `linear_kl_divergence`).
      where: `[*tokens]`, boolean: the tokens to include (see `linear_kl_divergence`).
      reduction: "mean", "sum" or None (see `linear_kl_divergence`).
      denominator: a scalar that replaces the mean's divisor. Where nothing counts the mean is 0.
      temperature: divides both (capped) logits; positive.
      soft_cap: replaces the logits by `soft_cap · tanh(logits / soft_cap)`; positive.
      target_soft_cap: the same of the target's logits.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) that shards the classes.
      transpose_kernel: whether both kernels are `[V, …]`.
      chunk_size: the most tokens in a chunk (see `linear_kl_divergence`).
      precision: of the matrix products, as in `jax.lax.dot_general`.
      compute_dtype: the dtype of the matrix products (see `linear_loss`).

    Returns:
      A scalar, or `[*tokens]` for `reduction=None`, in float32; float64 where the products of the
      first head are float64.

    Raises:
      TypeError: an argument of the wrong type or dtype.
      ValueError: an argument of the wrong shape or value.

    Differentiable in all that `linear_kl_divergence` is, and in `weight`, in reverse mode, to any
    order; forward mode over reverse works. docs/forms.md equations (79) to (82).

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> hidden, kernel = jnp.ones((5, 2)), jnp.array([[0.0, 1e-4], [0.0, 0.0]])
      >>> target = hidden, jnp.zeros((2, 2))
      >>> print(f"{jaxsoftmax.linear_js_divergence(hidden, kernel, *target):.5g}")
      3.125e-10
    """
    name = "linear_js_divergence"
    return _linear_divergence(
        name,
        (hidden, kernel, bias),
        (target_hidden, target_kernel, target_bias),
        where,
        _checks.as_between(name, "weight", weight),
        (temperature, soft_cap, target_soft_cap),
        weights=weights,
        reduction=reduction,
        denominator=denominator,
        axis_name=axis_name,
        transpose_kernel=transpose_kernel,
        chunk_size=chunk_size,
        precision=precision,
        compute_dtype=compute_dtype,
    )


def _linear_divergence(  # noqa: PLR0917
    name, operands, target, where, weight, transforms, *, chunk_size, compute_dtype, **others
):
    hidden, kernel, bias = operands
    shared = {"chunk_size": chunk_size, "compute_dtype": compute_dtype}
    head = as_head(name, hidden, kernel, bias=bias, **shared, **others)
    target, products = as_target_head(name, head, *target, compute_dtype=compute_dtype)
    where = as_token_mask(name, where, head)
    transform = as_transforms(name, *transforms)
    with scope(name, OF_HEADS):
        compared = Compared(*transform, weight)
        return divergences(products, head, target, where, compared, chunk_size)


def linear_top_k(
    hidden: ArrayLike,
    kernel: ArrayLike,
    k: int,
    *,
    bias: ArrayLike | None = None,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    axis_name: AxisName | None = None,
    transpose_kernel: bool = False,
    chunk_size: int | None = None,
    precision: Any = None,
    compute_dtype: Any = None,
) -> TopK:
    r"""The k most probable classes of each token under `hidden @ kernel + bias`, highest first.

    The classes are those of `jax.lax.top_k` of these logits, in its order: of equal logits the
    lower class number comes first. `log_probs = (z − m) − log1p(r)` are normalized over all
    classes. Only one block of logits exists at a time; there is one matrix product.

    Args:
      hidden: `[*tokens, H]`, floating.
      kernel: `[H, V]`, floating. Operands of different dtypes are promoted, or cast to
        `compute_dtype`.
      k: how many classes, from 1 to V (on all devices).
      bias: `[V]`; −inf excludes a class: it comes last, with the log-probability −inf.
      soft_cap: replaces the logits by `soft_cap · tanh(logits / soft_cap)`; positive.
      temperature: divides the (capped) logits; positive.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) that shards the classes (see
        `linear_softmax_cross_entropy`); the labels found are global class numbers.
      transpose_kernel: whether `kernel` is `[V, H]` (see `linear_loss`).
      chunk_size: classes in a block (see `linear_log_probs`); the first block has k at least.
      precision: of the matrix product, as in `jax.lax.dot_general`.
      compute_dtype: the dtype of the matrix product (see `linear_loss`).

    Returns:
      `TopK` of arrays `[*tokens, k]`, `log_probs` in float32 (float64 for float64 products), and
      `labels` in int32. A token with NaN or +inf among its logits, or all of them at −inf, has the
      labels of `jax.lax.top_k` (which takes NaN for the highest) and the log-probabilities NaN.

    Raises:
      TypeError: an argument of the wrong type or dtype, or a derivative is asked for.
      ValueError: an argument of the wrong shape or value.

    Not differentiable, in any mode: give it `jax.lax.stop_gradient` of its arguments, and take
    `linear_log_probs` of the labels found.

    Temporary memory, beyond arguments and results, in bytes, with N tokens and blocks of b classes:

        any operands   8·N·b + 8·N·k

    On a CPU a smaller last block adds `4·N·(V mod b)`. A TPU sorts, and takes up to `32·N·b`.

    Example:
      >>> import jax.numpy as jnp, jaxsoftmax
      >>> hidden, kernel = jnp.ones((1, 1)), jnp.log(jnp.array([[1.0, 4.0, 2.0, 1.0]]))
      >>> found = jaxsoftmax.linear_top_k(hidden, kernel, 3)
      >>> print(found.labels, jnp.exp(found.log_probs))
      [[1 2 0]] [[0.5   0.25  0.125]]
    """
    name = "linear_top_k"
    head = as_head(
        name,
        hidden,
        kernel,
        bias=bias,
        axis_name=axis_name,
        transpose_kernel=transpose_kernel,
        chunk_size=chunk_size,
        precision=precision,
        compute_dtype=compute_dtype,
    )
    _checks.check_classes(name, "k", k, head.classes)
    transform = as_transform(name, soft_cap, temperature)
    with jax.named_scope(f"jaxsoftmax.{name}"):
        return top_k_classes(int(k), head, transform, chunk_size)


def linear_sample(
    key: ArrayLike,
    hidden: ArrayLike,
    kernel: ArrayLike,
    *,
    top_k: int | None = None,
    bias: ArrayLike | None = None,
    soft_cap: ArrayLike | None = None,
    temperature: ArrayLike = 1.0,
    axis_name: AxisName | None = None,
    transpose_kernel: bool = False,
    chunk_size: int | None = None,
    precision: Any = None,
    compute_dtype: Any = None,
) -> Sample:
    r"""One class for each token, drawn from the softmax of `hidden @ kernel + bias`.

    The class of the highest logit with Gumbel noise, `argmax_k z_k − log E_k` with exponentially
    distributed `E_k`: class k comes out with its probability. Only one block of logits exists at a
    time; there is one matrix product.

    The noise of a class is a function of the key, the token's number in `[*tokens]` (row by row)
    and the class number, on any mesh and however the work is cut: `E_k = −log1p(−u)`, where u
    consists of the 64 bits that Threefry-2x32 makes of (token, class) under two words drawn from
    the key. So a key gives the same sample for any chunk size, layout and platform, unless two
    classes are so near to each other that the rounding of their logits decides. The probability of
    a class is right to the rounding of `z_k − log E_k`, about 1e-7 times its size, as long as it is
    above 2⁻⁶⁴.

    Args:
      key: one key of `jax.random`, of any kind. Inside `jax.shard_map` tokens are numbered from 0
        on every device: where it shards tokens, give each device a key of its own, such as
        `jax.random.fold_in(key, jax.lax.axis_index("data"))`; along `axis_name` the key must be the
        same. Under `jax.vmap` too, each call needs its own key.
      hidden: `[*tokens, H]`, floating.
      kernel: `[H, V]`, floating. Operands of different dtypes are promoted, or cast to
        `compute_dtype`.
      top_k: draw from this many most probable classes (those of `linear_top_k`) alone; None for
        all.
      bias: `[V]`; −inf excludes a class: it is never drawn.
      soft_cap: replaces the logits by `soft_cap · tanh(logits / soft_cap)`; positive.
      temperature: divides the (capped) logits; positive.
      axis_name: inside `jax.shard_map`, the mesh axis (or axes) that shards the classes (see
        `linear_softmax_cross_entropy`); the labels drawn are global class numbers.
      transpose_kernel: whether `kernel` is `[V, H]` (see `linear_loss`).
      chunk_size: classes in a block (see `linear_log_probs`).
      precision: of the matrix product, as in `jax.lax.dot_general`.
      compute_dtype: the dtype of the matrix product (see `linear_loss`).

    Returns:
      `Sample` of arrays `[*tokens]`, `labels` in int32, and their `log_probs` in float32 (float64
      for float64 products) in the distribution they are drawn from, that is with the soft cap, the
      temperature and, with `top_k`, normalized over those classes. A token with NaN or +inf among
      its logits, or all of them at −inf, has no distribution: label −1, log-probability NaN.

    Raises:
      TypeError: an argument of the wrong type or dtype, or a derivative is asked for.
      ValueError: an argument of the wrong shape or value.

    Not differentiable, in any mode: give it `jax.lax.stop_gradient` of its arguments, and take
    `linear_log_probs` of the labels drawn.

    Temporary memory, beyond arguments and results, in bytes, with N tokens and blocks of b classes:

        any operands   12·N·b

    On a CPU a smaller last block adds `8·N·(V mod b)`. With `top_k` it is that of `linear_top_k`,
    and as much for the last block.

    Example:
      >>> import jax, jax.numpy as jnp, jaxsoftmax
      >>> hidden, kernel = jnp.ones((4, 1)), jnp.log(jnp.array([[0.5, 0.0, 0.5]]))
      >>> drawn = jaxsoftmax.linear_sample(jax.random.key(0), hidden, kernel)
      >>> print(drawn.labels, jnp.exp(drawn.log_probs))
      [2 0 0 2] [0.5 0.5 0.5 0.5]
    """
    name = "linear_sample"
    key = _checks.as_key(name, "key", key)
    head = as_head(
        name,
        hidden,
        kernel,
        bias=bias,
        axis_name=axis_name,
        transpose_kernel=transpose_kernel,
        chunk_size=chunk_size,
        precision=precision,
        compute_dtype=compute_dtype,
    )
    _checks.check_whole_classes(name, head.axis_name, {"key": key})
    if top_k is not None:
        _checks.check_classes(name, "top_k", top_k, head.classes)
        top_k = int(top_k)
    transform = as_transform(name, soft_cap, temperature)
    with jax.named_scope(f"jaxsoftmax.{name}"):
        return sample(top_k, head, transform, key, chunk_size)
