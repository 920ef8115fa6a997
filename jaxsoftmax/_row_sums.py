# SPDX-License-Identifier: Apache-2.0
"""What is summed or picked along each row of logits, in the form that is fast where it runs.

The forms of `_cpu` where an array lies on one CPU device, the plain ones of `_numerics` elsewhere.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.interpreters import ad, batching, mlir

from . import _cpu
from ._numerics import (
    NEAR,
    UNLABELLED,
    Elementwise,
    max_and_remainder,
    remainder_beside,
    remainder_tangent,
    rows_with_sum,
    selected,
    upcast,
)
from ._sharding import Primitive, gathered, is_local


def shift_and_remainder(
    x: jax.Array,
    labels: jax.Array | None = None,
    of: Elementwise = upcast,
    *scalars: jax.Array,
    argmax: bool = False,
) -> Any:
    """(m, r) of each row of z = of(x, *scalars) `[..., C]`, named for remat policies.

    Without labels m is the maximum. With `labels [...]` (from `label_index`) m may be another
    class's logit, mostly the label's, and r < 2²⁴ the sum over all other classes: as good for the
    loss and its gradient, and no pass over the row has to find m. A row whose label is negative
    gets (`UNLABELLED`, 0): a loss that is NaN or 0 needs no more.

    With `argmax`, without labels: (m, r, index), the first class at the maximum as int32; −1 in a
    row with NaN.
    """
    local = is_local(*jax.tree.leaves((x, labels)))
    rows = (x, *scalars) if labels is None else (x, *scalars, labels)
    labelled = labels is not None
    m, r, *index = _shift_and_remainder.bind(
        *rows, of=of, labelled=labelled, local=local, argmax=argmax
    )
    m, r = checkpoint_name(m, "jaxsoftmax.shift"), checkpoint_name(r, "jaxsoftmax.remainder")
    return m, r, *index


# A primitive with its own derivative and batching rules: JAX's transformations never look inside.
# (JAX before 0.12 drops a `custom_jvp` from a `scan` that is differentiated twice.)
_shift_and_remainder = Primitive("shift_and_remainder")
_shift_and_remainder.multiple_results = True


@partial(jax.jit, static_argnames=("of", "labelled", "local", "argmax"))
def _compute(x, *rest, of, labelled, local, argmax):
    scalars, labels = (rest[:-1], rest[-1]) if labelled else (rest, None)
    forms = _plain, _cpu.shift_and_remainder
    plain, on_cpu = (partial(form, of, argmax=argmax) for form in forms)
    m, r, *index = _cpu.or_plain(on_cpu, plain, x, labels, *scalars, local=local)
    # A NaN always reaches r, but not always XLA:CPU's max of a wide row. A row whose maximum is
    # infinite has a log-sum-exp, m, but no probabilities: its r is NaN.
    m = jnp.where(jnp.isnan(r), r, m)
    index = [jnp.where(jnp.isnan(m), -1, i) for i in index]
    # NaN where m is not finite; no NaN as a constant, for `jax_debug_nans`.
    return m, r + (m - m), *index


# Fewer logits than this are measured from their maximum. On an H200 the loop below takes 65 µs even
# where it has no step; a pass saved is as much time at 2²⁵ to 2²⁶ logits.
_MANY = 1 << 25


def _plain(of, x, labels, *scalars, argmax):
    """(m, r) from the label in one pass, in two more where a row is far; or from the maximum.

    Far rows are not gathered: rows may be sharded. All are recomputed, and what is near stays. A
    loop of one step at most is the condition: for a branch of `lax.cond` a TPU lays `x` out anew.
    """
    if labels is None or (isinstance(x.size, int) and x.size < _MANY):
        return max_and_remainder(of(x, *scalars), argmax=argmax)
    m = of(gathered(x, jnp.maximum(labels, 0)), *scalars)
    m = jnp.where(labels < 0, UNLABELLED, m)
    r = remainder_beside(of(x, *scalars), m, labels)
    r = jnp.where(labels < 0, 0, r)
    far = ~(r < NEAR)  # NaN too: a label at −∞, or a row with +∞ or NaN

    def again(step, near):
        rows, _ = lax.optimization_barrier((x, step))  # or XLA would do it before the loop, always
        from_maximum = max_and_remainder(of(rows, *scalars))
        return tuple(jnp.where(far, *pair) for pair in zip(from_maximum, near, strict=True))

    return lax.fori_loop(0, jnp.any(far).astype(jnp.int32), again, (m, r))


def _run(*rows, **static):
    """Compiled under `jax.disable_jit` too, as any primitive: on the way, numbers may overflow."""
    with jax.disable_jit(False):
        return _compute(*rows, **static)


@_shift_and_remainder.def_abstract_eval
def _abstract(x, *rest, of, labelled, local, argmax):
    del local
    scalars = rest[:-1] if labelled else rest
    plain = jax.make_jaxpr(lambda *a: max_and_remainder(of(*a), argmax=argmax))(x, *scalars)
    return [out.aval for out in plain.jaxpr.outvars]


def _differentiated(rows, tangents, *, of, labelled, **static):
    m, r, *index = _shift_and_remainder.bind(*rows, of=of, labelled=labelled, **static)
    logits = rows[: len(rows) - labelled]
    changes = tuple(map(ad.instantiate_zeros, tangents[: len(logits)]))
    z, dz = jax.jvp(of, logits, changes)
    none = (ad.Zero(jax.typeof(i).to_tangent_aval()) for i in index)
    return (m, r, *index), (jnp.zeros_like(m), remainder_tangent(z, dz, m), *none)


def _batched(rows, axes, *, of, labelled, **static):
    """A mapped axis is one more axis of rows, so a branch that no row needs is still skipped."""
    bind = partial(_shift_and_remainder.bind, **static)
    mapped = (0,) * (3 if static["argmax"] else 2)
    (x, *scalars), labels = (rows[:-1], rows[-1]) if labelled else (rows, None)
    of_x, *of_scalars = axes[: len(rows) - labelled]
    if any(axis is not None for axis in of_scalars):
        z = jax.vmap(of, (of_x, *of_scalars))(x, *scalars)
        return bind(z, of=upcast, labelled=False), mapped
    if of_x is None:  # the labels alone are mapped: the same rows for all, from their maximum
        return bind(x, *scalars, of=of, labelled=False), (None, None)
    x = jnp.moveaxis(x, of_x, 0)
    if labels is None:
        return bind(x, *scalars, of=of, labelled=False), mapped
    if axes[-1] is None:
        labels = jnp.broadcast_to(labels, x.shape[:-1])
    else:
        labels = jnp.moveaxis(labels, axes[-1], 0)
    return bind(x, *scalars, labels, of=of, labelled=True), mapped


_shift_and_remainder.def_impl(_run)
ad.primitive_jvps[_shift_and_remainder] = _differentiated
batching.primitive_batchers[_shift_and_remainder] = _batched
mlir.register_lowering(_shift_and_remainder, mlir.lower_fun(_compute, multiple_results=True))


def pick(x: jax.Array, labels: jax.Array) -> jax.Array:
    """The logit z_t at each row's label, or at its K labels `[..., K]`; 0 for a negative one."""
    z = _cpu.or_plain(_cpu.pick, _gathered, x, jnp.maximum(labels, 0), local=is_local(x, labels))
    return jnp.where(labels < 0, 0, z)


@jax.custom_jvp
def _gathered(x, index):
    return upcast(gathered(x, index))


@_gathered.defjvp
def _(primals, tangents):
    (x, index), dx = primals, tangents[0]
    return _gathered(x, index), selected(dx, index) if index.ndim < x.ndim else _gathered(dx, index)


def row_sums(
    terms: Callable[..., tuple[jax.Array, ...]], rows: tuple[jax.Array, ...], *scalars: jax.Array
) -> tuple[jax.Array, ...]:
    """The sum over each row's classes of each of `terms(*rows, *scalars)`, arrays `[..., C]`.

    `rows`: x `[..., C]`, its m `[...]`, and whatever else there is of each row.
    """

    def plain(rows, scalars):
        return tuple(jnp.sum(t, axis=-1) for t in terms(*rows, *scalars))

    @jax.custom_jvp
    def sums(rows, scalars):
        on_cpu = partial(_cpu.row_sums, terms)
        return _cpu.or_plain(on_cpu, plain, rows, scalars, local=is_local(*rows))

    @sums.defjvp
    def _(primals, tangents):
        (x, m, *more), scalars = primals
        has_sum, x, m = rows_with_sum(x, m)
        changes = jax.jvp(plain, ((x, m, *more), scalars), tangents)[1]
        return sums(*primals), tuple(jnp.where(has_sum, change, 0) for change in changes)

    return sums(rows, scalars)
