# SPDX-License-Identifier: Apache-2.0
"""The statistics (m, r) of a row of logits, exactly, and what is made of them.

    m = max_k z_k        r = Σ_{k ≠ argmax} exp(z_k − m)        e_k = exp(z_k − m)

With ties `r` counts all but one of the maxima. Everything else follows: lse = m + log1p(r),
ŷ_k = e_k / (1 + r). For a label's loss m may be the label's logit instead, and r the sum over all
others. See docs/derivation.md.

Rows are the last axis here; `_rows` brings the class axes there.
"""

import functools
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from ._sharding import is_local, slice_in_loop

# XLA:CPU: up to _FEW classes go column by column; from _SOME on by whole blocks, if any divide
# them; the rest a chunk of rows at a time, from _MANY on by block (see `_on_cpu`).
# A chunk of rows of _CHUNK_BYTES stays in cache between its two passes: 1, 2, 4, 8, 16 MiB took
# 79, 67, 57, 58, 130 ms at [4096, 32000] float32 on 2 cores with 1 MiB L2 each and 32 MiB L3.
_FEW, _SOME, _MANY, _BLOCK = 16, 512, 2048, 128
_CHUNK_BYTES = 4 << 20
# A row is measured from its label only while the others sum to less than this: the loss below 16.6.
# The others are taken again, 1 MiB of rows at a time: with 4 MiB one such row costs more, with less
# many do.
_NEAR = 2.0**24
_AGAIN_BYTES = 1 << 20


# Raw logits, and scalars, to the logits whose softmax it is, each in the accumulation dtype.
Elementwise = Callable[..., jax.Array]


def accumulation_dtype(*dtypes: jnp.dtype) -> jnp.dtype:
    """The dtype sums are taken in: float32 for half precision and float32, else float64."""
    return jnp.dtype(jnp.float64 if jnp.float64 in dtypes else jnp.float32)


def upcast(x: jax.Array) -> jax.Array:
    """`x` in its accumulation dtype."""
    return x.astype(accumulation_dtype(x.dtype))


def broadcast_to(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """`x` in this shape; its cotangent is summed in the accumulation dtype and rounded once."""
    return x if x.shape == shape else _broadcast_to(x, shape)


@partial(jax.jit, static_argnames="shape")
def _broadcast_to(x, shape):
    return jnp.broadcast_to(upcast(x), shape).astype(x.dtype)


def shifted_exp(x: jax.Array, m: jax.Array) -> jax.Array:
    """e_k = exp(z_k − m), exactly 1 where z_k is m."""
    return jnp.exp(upcast(x) - m[..., None])


def max_and_remainder(
    x: jax.Array, labels: jax.Array | None = None, of: Elementwise = upcast, *scalars: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(m, r) of each row of z = of(x, *scalars) `[..., C]`, named for remat policies.

    With `labels [...]` (from `to_index`) m may be the label's logit and r the sum over all others,
    where r < 2²⁴: as good for the loss and its gradient, and found without a pass over the row.
    """
    local = is_local(*jax.tree.leaves((x, labels)))
    labels = labels if local and of is upcast else None
    rows = (x, *scalars) if labels is None else (x, *scalars, labels)
    m, r = _max_and_remainder.bind(*rows, of=of, labelled=labels is not None, local=local)
    return checkpoint_name(m, "jaxsoftmax.max"), checkpoint_name(r, "jaxsoftmax.remainder")


# A primitive of its own: a function with its derivative and its batching, which JAX never looks
# into. (JAX before 0.12 drops a `custom_jvp` from a `scan` that is differentiated twice.)
_max_and_remainder = Primitive("max_and_remainder")
_max_and_remainder.multiple_results = True


@partial(jax.jit, static_argnames=("of", "labelled", "local"))
def _compute(x, *rest, of, labelled, local):
    scalars, labels = (rest[:-1], rest[-1]) if labelled else (rest, None)
    plain = lambda x, labels, *scalars: _plain(of(x, *scalars))  # noqa: E731
    on_cpu = partial(_on_cpu, of)
    if local:
        m, r = lax.platform_dependent(x, labels, *scalars, cpu=on_cpu, default=plain)
    else:
        m, r = plain(x, labels, *scalars)
    # A NaN always reaches r, but not always XLA:CPU's max of a wide row. A row without a finite
    # maximum has a log-sum-exp, which is m, and no probabilities, which r says.
    m = jnp.where(jnp.isnan(r), r, m)
    return m, r + (m - m)  # NaN where m is not finite; no NaN written down, for `jax_debug_nans`


@_max_and_remainder.def_abstract_eval
def _abstract(x, *rest, of, labelled, local):
    del local
    scalars = rest[:-1] if labelled else rest
    return [
        out.aval for out in jax.make_jaxpr(lambda *a: _plain(of(*a)))(x, *scalars).jaxpr.outvars
    ]


def _batched(rows, axes, *, of, labelled, local):
    """A mapped axis is one more axis of rows: what no row needs is skipped, as without it."""
    bind = partial(_max_and_remainder.bind, local=local)
    (x, *scalars), labels = (rows[:-1], rows[-1]) if labelled else (rows, None)
    of_x, *of_scalars = axes[: len(rows) - labelled]
    if any(axis is not None for axis in of_scalars):
        z = jax.vmap(of, (of_x, *of_scalars))(x, *scalars)
        return bind(z, of=upcast, labelled=False), (0, 0)
    if of_x is None:  # the same rows for all labels: from their maximum
        return bind(x, *scalars, of=of, labelled=False), (None, None)
    x = jnp.moveaxis(x, of_x, 0)
    if labels is None:
        return bind(x, *scalars, of=of, labelled=False), (0, 0)
    if axes[-1] is None:
        labels = jnp.broadcast_to(labels, x.shape[:-1])
    else:
        labels = jnp.moveaxis(labels, axes[-1], 0)
    return bind(x, *scalars, labels, of=of, labelled=True), (0, 0)


# The derivative takes m for a constant: whatever is made of (x, m, r) must not depend on the shift,
# and then r = Σ e − 1 has the derivative Σ_k e_k dz_k over *every* k. That gives the right second
# derivatives at ties too, where max has none.
def _differentiated(rows, tangents, *, of, labelled, local):
    m, r = _max_and_remainder.bind(*rows, of=of, labelled=labelled, local=local)
    logits = rows[: len(rows) - labelled]
    changes = tuple(map(ad.instantiate_zeros, tangents[: len(logits)]))
    z, dz = jax.jvp(of, logits, changes)
    has_sum, z, shift = rows_with_sum(z, m)
    dr = jnp.sum(shifted_exp(z, shift) * upcast(dz), axis=-1)
    return (m, r), (jnp.zeros_like(m), jnp.where(has_sum, dr, 0))


_max_and_remainder.def_impl(_compute)
ad.primitive_jvps[_max_and_remainder] = _differentiated
batching.primitive_batchers[_max_and_remainder] = _batched
mlir.register_lowering(_max_and_remainder, mlir.lower_fun(_compute, multiple_results=True))


def rows_with_sum(x: jax.Array, m: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which rows have a log-sum-exp, and (x, m) with finite numbers in place of all others.

    A derivative of any order meets them with cotangents of 0, and 0 · NaN would be NaN.
    """
    has_sum = jnp.isfinite(m)
    return has_sum, jnp.where(has_sum[..., None], x, 0), jnp.where(has_sum, m, 0)


def _shift(m: jax.Array) -> jax.Array:
    """What the forms below subtract: r must be NaN only where a logit is."""
    return jnp.where(jnp.isinf(m), 0, m)


def _plain(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    m = jnp.max(upcast(x), axis=-1)
    return m, _remainder(x, m)


def _remainder(x: jax.Array, m: jax.Array) -> jax.Array:
    top = upcast(x) == m[..., None]
    ties = jnp.sum(top, axis=-1, dtype=m.dtype) - 1
    return jnp.sum(jnp.where(top, 0, shifted_exp(x, _shift(m))), axis=-1) + ties


def _on_cpu(
    of: Elementwise, x: jax.Array, labels: jax.Array | None, *scalars: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The same at the speed of XLA:CPU's plain log-sum-exp, or better."""
    *batch, classes = x.shape
    if not isinstance(classes, int) or classes > jnp.iinfo(jnp.int32).max:
        return _plain(of(x, *scalars))  # symbolic, in an export; or more than int32 counts
    wide = x.dtype.itemsize >= 4
    block = _whole_block(classes)
    if classes <= _FEW:
        from_maximum, others = _by_column, _others_by_column
    elif block and wide:
        from_maximum = partial(_by_whole_block, block=block)
        others = partial(_others_by_whole_block, block=block)
    else:
        from_maximum = partial(_in_chunks, _plain if classes < _MANY else _by_block)
        others = _others_in_chunks if classes < _MANY and wide else None
    x = x.reshape(math.prod(batch), classes)
    if of is not upcast:  # in chunks, so that there is no other array of the logits' size
        m, r = _in_chunks(lambda x: from_maximum(of(x, *scalars)), x)
    elif labels is None or others is None:
        m, r = from_maximum(x)
    else:
        m, r = _from_label(x, labels.reshape(x.shape[:-1]), others, from_maximum)
    return m.reshape(batch), r.reshape(batch)


def _from_label(x, labels, others, from_maximum):
    """(m, r) from the label's logit, or from the first few classes' largest where that is higher.

    From the maximum where the rest sums to too much even so. `others(x, m, index)` is r without the
    class m is of. A row whose label is out of range has no loss: it is not looked at again, and
    gets an m and r that are finite.
    """
    n, classes = x.shape
    none, index = labels < 0, jnp.maximum(labels, 0)
    m = _pick_on_cpu(x, index)
    if few := min(_BLOCK, classes // 64):
        first = upcast(x[:, :few])
        highest = jnp.max(first, axis=-1)
        index = jnp.where(highest > m, _first(first == highest[:, None]), index)
        m = jnp.where(highest > m, highest, m)
    r = others(x, m, index)
    far = ~(r < _NEAR) & ~none  # NaN too: a label at −∞, or a row with +∞ or NaN
    rows = max(1, _AGAIN_BYTES // (classes * m.dtype.itemsize))

    def all_again():
        m_max, r_max = from_maximum(x)
        return jnp.where(far, m_max, m), jnp.where(far, r_max, r)

    def some_again():
        (index,) = jnp.nonzero(far, size=n, fill_value=n)

        def chunk(i, statistics):
            at = lax.dynamic_slice_in_dim(index, i * rows, rows)
            found = from_maximum(x.at[at].get(mode="clip"))
            return tuple(
                s.at[at].set(f, mode="drop") for s, f in zip(statistics, found, strict=True)
            )

        chunks = (jnp.sum(far, dtype=jnp.int32) + (rows - 1)) // rows
        return lax.fori_loop(0, chunks, chunk, (m, r))

    # n is symbolic in an export.
    in_one = classes <= _FEW or not isinstance(n, int) or n <= rows
    m, r = lax.cond(_any(far), all_again if in_one else some_again, lambda: (m, r))
    return jnp.where(none, jnp.finfo(m.dtype).max, m), jnp.where(none, 0, r)


def _others_in_chunks(x: jax.Array, m: jax.Array, labels: jax.Array) -> jax.Array:
    """Rows of medium width: without the label's term, no maximum and no ties to count."""

    def others(x, m, labels):
        return (jnp.where(one_hot(labels, x.shape[-1]), 0, shifted_exp(x, m)),)

    return _in_chunks(partial(_written_sums, others), x, m, labels)[0]


def _any(flags: jax.Array) -> jax.Array:
    """`jnp.any`, as the sum that XLA:CPU is faster at."""
    return jnp.sum(flags, dtype=jnp.float32) > 0


def _whole_block(classes: int) -> int | None:
    """How many classes a block of `_by_whole_block` has; None where none would do.

    Measured at 512 to 256000 classes: about √(2C) at few, where a block more is read again for each
    row, and up to 256 at many; a multiple of 8, or else one of at least _BLOCK.
    """
    if classes < _SOME:
        return None
    most = min(2 * _BLOCK, math.isqrt(2 * classes))
    even = [b for b in range(16, most + 1, 8) if classes % b == 0]
    odd = [b for b in range(_BLOCK, min(_MANY, classes // 16) + 1) if classes % b == 0]
    return even[-1] if even else odd[0] if odd else None


def _by_whole_block(x: jax.Array, block: int) -> tuple[jax.Array, jax.Array]:
    """Blocks that divide the classes: plain sums of all rows, without a loop.

    The barrier keeps XLA from merging the maximum of maxima into one of whole rows, which is slow.
    """
    n, classes = x.shape
    maxima = jnp.max(x.reshape(n, classes // block, block), axis=-1) if classes >= _MANY else x
    m = jnp.max(lax.optimization_barrier(maxima), axis=-1)
    return m, _others_by_whole_block(x, _shift(m), None, block)


def _others_by_whole_block(
    x: jax.Array, m: jax.Array, labels: jax.Array | None, block: int
) -> jax.Array:
    """r, from the logit m of the label, or from the maximum.

    Where a row's exponentials sum to s ≥ 2, r = s − 1 loses nothing, ties included. Below there is
    one maximum, m, whose block is taken anew without it: the label's, or that with the largest sum.
    The barriers keep XLA from merging sums of sums into sums of whole rows, which are slower.
    """
    n, classes = x.shape
    blocks = x.reshape(n, classes // block, block)
    sums = jnp.sum(shifted_exp(blocks, m[:, None]), axis=-1)
    sums = lax.optimization_barrier(sums)
    s = _sum_in_lanes(sums)

    def without_m():
        if labels is None:
            largest = lax.optimization_barrier(jnp.max(sums, axis=-1, keepdims=True))
            at = _first(sums == largest)
        else:
            at = labels // block
        z = jnp.take_along_axis(blocks, at[:, None, None], axis=1, mode="clip")[:, 0]
        # `_remainder` would count ties, of which there are none: 40 against 26 ms at [65536, 1000].
        is_m = z == m[:, None] if labels is None else one_hot(labels % block, block)
        e = jnp.where(is_m, 0, shifted_exp(z, m))
        return _sum_without(sums, at) + jnp.sum(lax.optimization_barrier(e), axis=-1)

    confident = s < 2
    r = lax.cond(_any(confident), without_m, lambda: s)
    return jnp.where(confident, r, s - 1)


def _first(flags: jax.Array) -> jax.Array:
    """The first of each row that is True, the last if none: a tenth of XLA:CPU's argmax's time."""
    count = flags.shape[-1]
    index = jnp.arange(count, dtype=jnp.int32).reshape((1,) * (flags.ndim - 1) + (-1,))
    return jnp.min(jnp.where(flags, index, count - 1), axis=-1)


def _sum_without(terms: jax.Array, index: jax.Array) -> jax.Array:
    return _sum_in_lanes(jnp.where(one_hot(index, terms.shape[-1]), 0, terms))


def _sum_in_lanes(terms: jax.Array) -> jax.Array:
    """The sum of each row of `terms [n, k]`, eight at a time and these in pairs.

    XLA:CPU adds few terms of few rows one after the other: half an ulp more at 25 terms.
    """
    n, count = terms.shape
    terms = jnp.pad(terms, ((0, 0), (0, -count % 8)))
    lanes = lax.optimization_barrier(jnp.sum(terms.reshape(n, -(-count // 8), 8), axis=1))
    for half in (4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def _in_chunks(form, x, *numbers):
    """`form` of the rows of `x [*batch, C]`, and of numbers `[*batch]`: numbers again.

    Rows are taken a chunk at a time, so that a second pass reads from cache; the last chunk is
    moved back to end with the last row, so that any number of rows fits.
    """
    *batch, classes = x.shape
    if not isinstance(classes, int):
        return form(x, *numbers)
    n = math.prod(batch)
    x, *numbers = (a.reshape(n, *a.shape[len(batch) :]) for a in (x, *numbers))
    rows = max(1, _CHUNK_BYTES // (classes * accumulation_dtype(x.dtype).itemsize))
    if not isinstance(n, int) or n <= rows:  # n: symbolic in an export
        return tuple(s.reshape(batch) for s in form(x, *numbers))

    def chunk(i):
        start = jnp.minimum(i * rows, n - rows)
        part = slice_in_loop(x, start, rows, axis=0)
        return form(part, *(lax.dynamic_slice_in_dim(a, start, rows) for a in numbers))

    chunks = -(-n // rows)
    sums = lax.map(chunk, jnp.arange(chunks, dtype=jnp.int32))
    fresh = n - (chunks - 1) * rows  # rows of the last chunk that no other has seen

    def joined(s):
        return jnp.concatenate([s[:-1].reshape(-1), s[-1, rows - fresh :]]).reshape(batch)

    return tuple(joined(s) for s in sums)


def row_sums(
    terms: Callable[..., tuple[jax.Array, ...]], x: jax.Array, m: jax.Array, *scalars: jax.Array
) -> tuple[jax.Array, ...]:
    """The sum over each row's classes of each of `terms(x, m, *scalars)`, arrays `[..., C]`."""

    def plain(x, m, *scalars):
        return tuple(jnp.sum(t, axis=-1) for t in terms(x, m, *scalars))

    def on_cpu(x, m, *scalars):
        return _in_chunks(partial(_written_sums, lambda x, m: terms(x, m, *scalars)), x, m)

    @jax.custom_jvp
    def sums(x, m, *scalars):
        if not is_local(x):
            return plain(x, m, *scalars)
        return lax.platform_dependent(x, m, *scalars, cpu=on_cpu, default=plain)

    @sums.defjvp
    def _(primals, tangents):
        x, m, *scalars = primals
        has_sum, *finite = rows_with_sum(x, m)
        changes = jax.jvp(plain, (*finite, *scalars), tangents)[1]
        return sums(*primals), tuple(jnp.where(has_sum, change, 0) for change in changes)

    return sums(x, m, *scalars)


def _written_sums(terms, *rows):
    """The sums of `terms(*rows)`, of a chunk of rows, whose terms are written to cache first.

    XLA:CPU adds up numbers that lie there several times faster than numbers it selects on the way.
    """
    return tuple(jnp.sum(t, axis=-1) for t in lax.optimization_barrier(terms(*rows)))


def _by_column(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Few classes: elementwise over the rows, where a reduction of a short axis is slow."""
    columns = _columns(x)
    m = functools.reduce(jnp.maximum, columns)
    e = [jnp.exp(z_k - _shift(m)) for z_k in columns]
    tops = [(z_k == m).astype(m.dtype) for z_k in columns]
    others = [e_k - top for e_k, top in zip(e, tops, strict=True)]
    return m, functools.reduce(jnp.add, others) + (functools.reduce(jnp.add, tops) - 1)


def _others_by_column(x: jax.Array, m: jax.Array, labels: jax.Array) -> jax.Array:
    others = [jnp.where(labels == k, 0, jnp.exp(z - m)) for k, z in enumerate(_columns(x))]
    return functools.reduce(jnp.add, others)


def _columns(x: jax.Array) -> list[jax.Array]:
    z = lax.optimization_barrier(upcast(x))
    return [z[..., k] for k in range(x.shape[-1])]


def _by_block(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Many classes: plain sums over blocks, then the block that holds the maximum once more.

    XLA:CPU does not vectorise a wide reduction that compares, so only that block is compared.
    The barriers keep XLA from merging the reduction over blocks into the one inside them,
    which would read the row again.
    """
    n, classes = x.shape
    whole = classes // _BLOCK * _BLOCK
    parts = [upcast(x[:, :whole]).reshape(n, whole // _BLOCK, _BLOCK)]
    if whole < classes:
        parts.append(upcast(x[:, whole:])[:, None])
    parts = lax.optimization_barrier(parts)
    block_max = jnp.concatenate([jnp.max(z, axis=-1) for z in parts], axis=-1)
    block_max = lax.optimization_barrier(block_max)
    m = jnp.max(block_max, axis=-1)
    shift = _shift(m)[:, None]
    sums = jnp.concatenate([jnp.sum(shifted_exp(z, shift), axis=-1) for z in parts], axis=-1)
    top = _first(block_max == m[:, None])  # a NaN row finds none, and stays NaN
    # The last block may be short: read _BLOCK classes that end with the row, mask what is not it.
    start = jnp.minimum(top * _BLOCK, classes - _BLOCK)
    at = start[:, None] + jnp.arange(_BLOCK, dtype=jnp.int32).reshape(1, -1)
    block = upcast(jnp.take_along_axis(x, at, axis=-1, mode="clip"))
    block = jnp.where(at < (top * _BLOCK)[:, None], -jnp.inf, block)
    return m, _sum_without(sums, top) + _remainder(block, m)


def pick(x: jax.Array, labels: jax.Array) -> jax.Array:
    """The logit z_t at each row's label (from `to_index`); 0 for −1."""

    def compare(x, labels):
        return jnp.sum(jnp.where(one_hot(labels, x.shape[-1]), upcast(x), 0), axis=-1)

    at = jnp.maximum(labels, 0)
    if is_local(x, labels):
        z = lax.platform_dependent(x, at, cpu=_pick_on_cpu, default=compare)
    else:
        z = compare(x, at)
    return jnp.where(labels < 0, 0, z)


def _pick_on_cpu(x, labels):
    classes = x.shape[-1]
    if x.dtype.itemsize < 4 and isinstance(classes, int) and classes <= _FEW:
        # XLA:CPU gathers from half precision through a float32 copy: half the time of few classes.
        own = [jnp.where(labels == k, z, 0) for k, z in enumerate(_columns(x))]
        return functools.reduce(jnp.add, own)
    return upcast(jnp.take_along_axis(x, labels[..., None], axis=-1, mode="clip")[..., 0])


def one_hot(index: jax.Array, size: int) -> jax.Array:
    """A boolean [..., size]: True at the int32 index, nowhere for −1."""
    return index[..., None] == jnp.arange(size, dtype=jnp.int32).reshape((1,) * index.ndim + (-1,))


def excess(total: jax.Array, y: jax.Array, e: jax.Array, r: jax.Array) -> jax.Array:
    """(Y ŷ_i − y_i)(1 + r) = (Y e_i − y_i) − y_i r, without cancellation.

    At the maximum e_i is exactly 1, so a one-hot target leaves −r; at any other entry r ≥ e_i, so
    nothing cancels either (docs/derivation.md, equation 27).
    """
    return (total[..., None] * e - y) - y * r[..., None]


def nan_where(invalid: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """NaN there and 0 elsewhere; without a NaN while nothing is invalid, for `jax_debug_nans`."""
    return jnp.log(jnp.where(invalid, -1, 1).astype(dtype))


def log_sum_exp(m: jax.Array, r: jax.Array) -> jax.Array:
    """The log-sum-exp m + log1p(r); an infinite maximum stays itself."""
    return jnp.where(jnp.isinf(m), m, m + jnp.log1p(r))
