# SPDX-License-Identifier: Apache-2.0
"""The sums of a row in the forms that XLA:CPU is fast at, and the ways around its weak points.

The mathematics is that of `_numerics`, and so are the results, to rounding. docs/performance.md has
a table of the forms and what each was measured against.
"""

import functools
import itertools
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._axes import per_label
from ._numerics import (
    NEAR,
    UNLABELLED,
    Elementwise,
    accumulation_dtype,
    finite_shift,
    first,
    max_and_remainder,
    one_hot,
    remainder,
    shifted_exp,
    upcast,
)
from ._sharding import gathered

# Rows of up to _FEW classes go column by column; from _SOME on by whole blocks, if they divide the
# classes; the rest a chunk of rows at a time, from _MANY on by block (see `shift_and_remainder`).
# A chunk of rows of _CHUNK_BYTES stays in cache between its two passes: 1, 2, 4, 8, 16 MiB took
# 79, 67, 57, 58, 130 ms at [4096, 32000] float32 on 2 cores with 1 MiB L2 each and 32 MiB L3.
_FEW, _SOME, _MANY, _BLOCK = 16, 512, 2048, 128
_CHUNK_BYTES = 4 << 20
# Rows far from their label are recomputed from their maximum, 1 MiB of rows at a time: with 4 MiB a
# single such row costs more, with less than 1 MiB many of them do.
_AGAIN_BYTES = 1 << 20
# XLA:CPU writes a matrix product to memory before it adds it to anything: so many bytes at a time.
_PRODUCT_BYTES = 8 << 20


def or_plain(form: Callable[..., Any], plain: Callable[..., Any], *args: Any, local: bool) -> Any:
    """`form(*args)` on a CPU if each array is known to lie on one device, else `plain(*args)`."""
    if not local:
        return plain(*args)
    return lax.platform_dependent(*args, cpu=form, default=plain)


def shift_and_remainder(
    of: Elementwise,
    x: jax.Array,
    labels: jax.Array | None,
    *scalars: jax.Array,
    argmax: bool = False,
) -> tuple[jax.Array, ...]:
    """(m, r) of each row of of(x, *scalars) `[..., C]`, from the label if `labels [...]` are given.

    With `argmax` the index of the first maximum too. At least as fast as XLA:CPU's plain
    log-sum-exp.
    """
    *batch, classes = x.shape
    if not isinstance(classes, int) or classes > jnp.iinfo(jnp.int32).max:
        # Symbolic, in an export; or more than int32 counts.
        return max_and_remainder(of(x, *scalars), argmax=argmax)
    wide = x.dtype.itemsize >= 4
    block = _whole_block(classes)
    if classes <= _FEW:
        from_maximum, others = partial(_by_column, argmax=argmax), _others_by_column
    elif block and wide:
        from_maximum = partial(_by_whole_block, block=block, argmax=argmax)
        others = partial(_others_by_whole_block, block=block)
    else:
        medium = _by_class if argmax else max_and_remainder
        form = medium if classes < _MANY else partial(_by_block, argmax=argmax)
        from_maximum = partial(_in_chunks, form)
        others = _others_in_chunks if classes < _MANY and wide else None
    x = x.reshape(math.prod(batch), classes)
    if of is not upcast:  # in chunks, so that there is no second array of the logits' size
        found = _in_chunks(lambda x: from_maximum(of(x, *scalars)), x)
    elif labels is None or others is None:
        found = from_maximum(x)
    else:
        found = _from_label(x, labels.reshape(x.shape[:-1]), others, from_maximum)
    return tuple(number.reshape(batch) for number in found)


def _from_label(x, labels, others, from_maximum):
    """(m, r) of `x [n, C]` from the label's logit, or the highest of the first few if that is more.

    From the maximum where r is still too large. `others(x, m, index)` sums over all classes but
    `index`, whose logit is m. A row with a negative label is not recomputed.
    """
    n, classes = x.shape
    none, index = labels < 0, jnp.maximum(labels, 0)
    m = pick(x, index)
    if classes >= _MANY:  # in a shorter row, looking at the first few is not cheap enough
        few = min(_BLOCK, classes // 64)
        z = upcast(x[:, :few])
        highest = jnp.max(z, axis=-1)
        index = jnp.where(highest > m, first(z == highest[:, None]), index)
        m = jnp.where(highest > m, highest, m)
    r = others(x, m, index)
    far = ~(r < NEAR) & ~none  # NaN too: a label at −∞, or a row with +∞ or NaN
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
    return jnp.where(none, UNLABELLED, m), jnp.where(none, 0, r)


def _others_in_chunks(x: jax.Array, m: jax.Array, labels: jax.Array) -> jax.Array:
    """The r of rows of medium width: without the label's term; no maximum, no ties to count."""

    def others(x, m, labels):
        return (jnp.where(one_hot(labels, x.shape[-1]), 0, shifted_exp(x, m)),)

    return _in_chunks(partial(_written_sums, others), x, m, labels)[0]


def _any(flags: jax.Array) -> jax.Array:
    """`jnp.any`, as the sum that XLA:CPU is faster at."""
    return jnp.sum(flags, dtype=jnp.float32) > 0


def _whole_block(classes: int) -> int | None:
    """How many classes a block of `_by_whole_block` has; None if no good size divides them.

    The best at 512 to 256000 classes, measured: about √(2C) at few, since one block of each row is
    read a second time, up to 256 at many; a multiple of 8, or else any size of at least _BLOCK.
    """
    if classes < _SOME:
        return None
    most = min(2 * _BLOCK, math.isqrt(2 * classes))
    even = [b for b in range(16, most + 1, 8) if classes % b == 0]
    odd = [b for b in range(_BLOCK, min(_MANY, classes // 16) + 1) if classes % b == 0]
    return even[-1] if even else odd[0] if odd else None


def _by_whole_block(x: jax.Array, block: int, argmax: bool) -> tuple[jax.Array, ...]:
    """(m, r) of `x [n, C]` by blocks that divide the classes: plain sums of all rows, no loop.

    The barrier keeps XLA from merging the maximum of maxima into one of whole rows, which is slow.
    """
    n, classes = x.shape
    blocks = x.reshape(n, classes // block, block)
    maxima = jnp.max(blocks, axis=-1) if classes >= _MANY or argmax else x
    maxima = lax.optimization_barrier(maxima)
    m = jnp.max(maxima, axis=-1)
    r = _others_by_whole_block(x, finite_shift(m), None, block)
    if not argmax:
        return m, r
    top = first(maxima == m[:, None])
    z = jnp.take_along_axis(blocks, top[:, None, None], axis=1, mode="clip")[:, 0]
    return m, r, top * block + first(z == m[:, None])


def _others_by_whole_block(
    x: jax.Array, m: jax.Array, labels: jax.Array | None, block: int
) -> jax.Array:
    """The r of `x [n, C]`; m is the logit of class `labels [n]`, or the maximum without them.

    Where a row's exponentials sum to s ≥ 2, r = s − 1 loses no digits and counts ties. Below 2 only
    m itself is a maximum, and its block is recomputed without it: that of `labels`, or that with
    the largest sum.
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
            at = first(sums == largest)
        else:
            at = labels // block
        z = jnp.take_along_axis(blocks, at[:, None, None], axis=1, mode="clip")[:, 0]
        # `remainder` would count ties, of which there are none: 40 against 26 ms at [65536, 1000].
        is_m = z == m[:, None] if labels is None else one_hot(labels % block, block)
        e = jnp.where(is_m, 0, shifted_exp(z, m))
        return _sum_without(sums, at) + jnp.sum(lax.optimization_barrier(e), axis=-1)

    confident = s < 2
    r = lax.cond(_any(confident), without_m, lambda: s)
    return jnp.where(confident, r, s - 1)


def _by_class(x: jax.Array) -> tuple[jax.Array, ...]:
    """(m, r) of rows of medium width, and the index of the first maximum.

    The index as a float, written before its minimum is taken: XLA:CPU vectorises that (rows of
    1000: 1.33 of the time without an index, as an integer 1.48).
    """
    m, r = max_and_remainder(x)
    index = jnp.arange(x.shape[-1], dtype=jnp.float32)[None]
    at = jnp.where(upcast(x) == m[:, None], index, x.shape[-1] - 1)
    return m, r, jnp.min(lax.optimization_barrier(at), axis=-1).astype(jnp.int32)


def _by_block(x: jax.Array, argmax: bool) -> tuple[jax.Array, ...]:
    """(m, r) of many classes: sums over blocks, then the block that holds the maximum once more.

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
    shift = finite_shift(m)[:, None]
    sums = jnp.concatenate([jnp.sum(shifted_exp(z, shift), axis=-1) for z in parts], axis=-1)
    top = first(block_max == m[:, None])  # a row with NaN finds none, and stays NaN
    # The last block may be short: read the row's last _BLOCK classes, and mask those before it.
    start = jnp.minimum(top * _BLOCK, classes - _BLOCK)
    at = start[:, None] + jnp.arange(_BLOCK, dtype=jnp.int32).reshape(1, -1)
    block = upcast(jnp.take_along_axis(x, at, axis=-1, mode="clip"))
    block = jnp.where(at < (top * _BLOCK)[:, None], -jnp.inf, block)
    r = _sum_without(sums, top) + remainder(block, m)
    if not argmax:
        return m, r
    return m, r, jnp.min(jnp.where(block == m[:, None], at, classes - 1), axis=-1)


def _by_column(x: jax.Array, argmax: bool) -> tuple[jax.Array, ...]:
    """(m, r) of few classes, elementwise over the rows: a reduction of a short axis is slow."""
    columns = _columns(x)
    m = functools.reduce(jnp.maximum, columns)
    e = [jnp.exp(z_k - finite_shift(m)) for z_k in columns]
    tops = [(z_k == m).astype(m.dtype) for z_k in columns]
    others = [e_k - top for e_k, top in zip(e, tops, strict=True)]
    r = functools.reduce(jnp.add, others) + (functools.reduce(jnp.add, tops) - 1)
    if not argmax:
        return m, r
    last = len(columns) - 1
    indices = [jnp.where(z_k == m, k, last) for k, z_k in enumerate(columns)]
    return m, r, functools.reduce(jnp.minimum, indices).astype(jnp.int32)


def _others_by_column(x: jax.Array, m: jax.Array, labels: jax.Array) -> jax.Array:
    others = [jnp.where(labels == k, 0, jnp.exp(z - m)) for k, z in enumerate(_columns(x))]
    return functools.reduce(jnp.add, others)


def _columns(x: jax.Array) -> list[jax.Array]:
    z = lax.optimization_barrier(upcast(x))
    return [z[..., k] for k in range(x.shape[-1])]


def _sum_without(terms: jax.Array, index: jax.Array) -> jax.Array:
    return _sum_in_lanes(jnp.where(one_hot(index, terms.shape[-1]), 0, terms))


def _sum_in_lanes(terms: jax.Array) -> jax.Array:
    """The sum of each row of `terms [n, k]`; of a small array eight terms at a time, then in pairs.

    XLA:CPU adds the terms of a small array (up to about 5000 numbers) one after the other, with
    twice the error at 64 rows of 25 terms.
    """
    n, count = terms.shape
    if not isinstance(n, int) or n * count > 8192:  # n: symbolic in an export
        return jnp.sum(terms, axis=-1)
    terms = jnp.pad(terms, ((0, 0), (0, -count % 8)))
    lanes = lax.optimization_barrier(jnp.sum(terms.reshape(n, -(-count // 8), 8), axis=1))
    for half in (4, 2, 1):
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


def _in_chunks(form, x, *numbers):
    """`form` of the rows of `x [*batch, C]` and `numbers [*batch, …]`: a tuple of `[*batch]`.

    It gets one chunk of rows at a time, so that its second pass reads from cache; the last chunk is
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
    fresh = n - (chunks - 1) * rows  # rows of the last chunk that are in no other chunk

    def joined(s):
        return jnp.concatenate([s[:-1].reshape(-1), s[-1, rows - fresh :]]).reshape(batch)

    return tuple(joined(s) for s in sums)


def _written_sums(terms, *rows):
    """The row sums of each of `terms(*rows)`, of a chunk of rows; terms are written to cache first.

    XLA:CPU adds numbers in cache several times faster than numbers it selects while it adds. But
    what is a chain of plain arithmetic it moves behind the barrier again, into a slow kernel: so
    each term ends with a selection (JS of [512, 32000] on JAX 0.10: 84 against 175 ms).
    """
    written = (jnp.where(t == 0, 0, t) for t in terms(*rows))
    return tuple(jnp.sum(t, axis=-1) for t in lax.optimization_barrier((*written,)))


def pick(x: jax.Array, labels: jax.Array) -> jax.Array:
    """The logit of each row at its label, or at its K labels."""
    classes = x.shape[-1]
    if x.dtype.itemsize < 4 and isinstance(classes, int) and classes <= _FEW:
        # XLA:CPU gathers from half precision through a float32 copy, half the time at few classes.
        own = [jnp.where(labels == k, per_label(z, labels), 0) for k, z in enumerate(_columns(x))]
        return functools.reduce(jnp.add, own)
    return upcast(gathered(x, labels))


def row_sums(
    terms: Callable[..., tuple[jax.Array, ...]], rows: tuple[jax.Array, ...], scalars: Any
) -> tuple[jax.Array, ...]:
    """The sums over each row's classes of `terms(*rows, *scalars)`, by chunks of rows.

    Of few classes one class at a time, elementwise over the rows: a reduction of a short axis is
    slow.
    """
    classes = rows[0].shape[-1]
    if isinstance(classes, int) and 0 < classes <= _FEW:
        return _sums_by_class(terms, rows, scalars)
    return _in_chunks(partial(_written_sums, lambda *rows: terms(*rows, *scalars)), *rows)


def _sums_by_class(terms, rows, scalars):
    per_class = [a.ndim == rows[0].ndim for a in rows]
    columns = [jnp.moveaxis(a, -1, 0)[..., None] for a in itertools.compress(rows, per_class)]

    def of_class(columns):
        left = iter(columns)
        parts = [next(left) if flag else a for a, flag in zip(rows, per_class, strict=True)]
        return [term[..., 0] for term in terms(*parts, *scalars)]

    def add(sums, columns):
        return [s + term for s, term in zip(sums, of_class(columns), strict=True)], None

    first_class = of_class([column[0] for column in columns])
    return tuple(lax.scan(add, first_class, [column[1:] for column in columns])[0])


def add_by_block(
    add: Callable[..., jax.Array], class_axis: int, total: jax.Array, a: jax.Array, b: jax.Array
) -> jax.Array:
    """`add(total, a, b)` in place, by blocks of classes.

    `total`, `[H, V]` or `[V, H]` by its `class_axis`, gets a product of `a [c, H]` and `b [c, V]`.
    """
    classes = total.shape[class_axis]
    # XLA would compute the columns of the last step from what b is computed from.
    b = lax.optimization_barrier(b)
    # Of the product and of the columns of b; a size that is symbolic, in an export, does not count.
    rows = max(1, *(size for size in a.shape if isinstance(size, int)))
    size = min(classes, max(1, _PRODUCT_BYTES // (rows * total.dtype.itemsize)))
    size = next((s for s in range(size, size // 2, -1) if classes % s == 0), size)

    def step(start, size, total):
        columns = lax.dynamic_slice_in_dim(b, start, size, axis=1)
        sums = add(lax.dynamic_slice_in_dim(total, start, size, axis=class_axis), a, columns)
        return lax.dynamic_update_slice_in_dim(total, sums, start, axis=class_axis)

    blocks, rest = divmod(classes, size)
    total = lax.fori_loop(0, blocks, lambda i, total: step(i * size, size, total), total)
    if not rest:
        return total
    # From a start that XLA knows it makes a plain slice, and then it goes over all of `total`.
    return step(lax.optimization_barrier(jnp.int32(blocks * size)), rest, total)


def slice_in_loop(x: jax.Array, start: Any, size: int, axis: int) -> jax.Array:
    """`lax.dynamic_slice_in_dim` in a loop, without a copy of all of `x`.

    XLA:CPU of JAX 0.10 makes a float32 copy of a bfloat16 array to slice it ((m, r) of
    [4096, 32000]: 224 ms). As integers it is sliced in place, but XLA may move the view as integers
    before the loop, as a copy (126 ms): the barrier keeps it inside (49 ms).
    """
    if in_bits(x.dtype):
        x, start = lax.optimization_barrier((x, start))
        piece = lax.dynamic_slice_in_dim(as_bits(x), start, size, axis)
        return from_bits(piece, x.dtype)
    return lax.dynamic_slice_in_dim(x, start, size, axis)


def in_bits(dtype: jnp.dtype) -> bool:
    """Whether XLA:CPU of this JAX slices, or updates a slice of, such an array as integers only."""
    return dtype == jnp.bfloat16 and jax.__version_info__ < (0, 11)


def as_bits(x: jax.Array) -> jax.Array:
    """`x` of 16 bits as integers."""
    return lax.bitcast_convert_type(x, jnp.uint16)


def from_bits(bits: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Undoes `as_bits` for an array of this dtype."""
    return bits if bits.dtype == dtype else lax.bitcast_convert_type(bits, dtype)
