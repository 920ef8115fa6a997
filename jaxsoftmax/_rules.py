# SPDX-License-Identifier: Apache-2.0
"""One derivative, two decorations: `custom_vjp`, and `custom_jvp` for `jaxsoftmax.forward_mode`."""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.interpreters import ad, batching, mlir

from ._sharding import Primitive, aligned

_forward_mode = ContextVar("jaxsoftmax.forward_mode", default=False)


@contextlib.contextmanager
def forward_mode() -> Iterator[None]:
    """Within, `in_forward_mode` is true."""
    token = _forward_mode.set(True)
    try:
        yield
    finally:
        _forward_mode.reset(token)


def in_forward_mode() -> bool:
    """Whether forward mode is asked for. A static argument of `jit`: its cache cannot see it."""
    return _forward_mode.get()


@contextlib.contextmanager
def scope(function: str, remedy: str) -> Iterator[None]:
    """Names a public function in profiles; adds `remedy` to JAX's error about forward mode."""
    with jax.named_scope(f"jaxsoftmax.{function}"):
        try:
            yield
        except TypeError as error:
            if "custom_vjp" in str(error):
                error.add_note(f"{function}: {remedy}")
            raise


# What `scope` says of functions on logits, and of heads.
ON_LOGITS = "jaxsoftmax.forward_mode has this function for jvp, jacfwd and linearize"
OF_HEADS = "forward mode works over reverse mode here: jax.jvp of jax.grad, jax.hessian"


class Rule(NamedTuple):
    """The same function twice, with the same derivative."""

    reverse: Callable[..., Any]
    forward: Callable[..., Any]

    def for_mode(self, forward: bool) -> Callable[..., Any]:
        """The one for forward mode, or else for reverse mode."""
        return self.forward if forward else self.reverse


def rule(
    fwd: Callable[..., Any],
    bwd: Callable[..., Any],
    *,
    linear: Callable[..., Any] | None = None,
) -> Rule:
    """Decorate a function both ways.

    Args:
      fwd: arguments to (result, residuals).
      bwd: (residuals, cotangent) to the cotangents of the arguments, None for integers.
      linear: `bwd` without what is not linear in the cotangent. If it is given, `bwd` gets symbolic
        zeros for cotangents that are 0, as `defvjp(symbolic_zeros=True)` passes them.
    """

    def function(*args):
        return fwd(*args)[0]

    reverse = jax.custom_vjp(function)
    if linear is None:
        reverse.defvjp(fwd, bwd)
    else:
        reverse.defvjp(lambda *args: fwd(*values(args)), bwd, symbolic_zeros=True)

    # The tangent map is the transpose of `bwd` (or `linear`), which is linear in the cotangent.
    # Under checkpoint its residuals are those of reverse mode.
    def jvp(primals, tangents):
        out, residuals = fwd(*primals)
        real = jax.tree.map(lambda x: x if jnp.issubdtype(x.dtype, jnp.inexact) else None, out)

        def tangent_map(residuals, tangents):
            pull = partial(linear or bwd, residuals)
            ds = jax.eval_shape(pull, real)
            kept = [i for i, d in enumerate(ds) if jax.tree.leaves(d)]
            transposed = jax.linear_transpose(lambda g: tuple(pull(g)[i] for i in kept), real)
            return transposed(tuple(tangents[i] for i in kept))[0]

        changes = jax.checkpoint(tangent_map, prevent_cse=False)(residuals, tangents)
        of_integer = lambda x, dx: np.zeros(x.shape, jax.dtypes.float0) if dx is None else dx  # noqa: E731
        return out, jax.tree.map(of_integer, out, changes)

    # Inside `shard_map`, a rule's cotangents vary over every axis that any argument varies over.
    forward = jax.custom_jvp(function)
    forward.defjvp(jvp)
    return Rule(lambda *args: reverse(*aligned(args)), lambda *args: forward(*aligned(args)))


def with_derivative(
    function: Callable[..., tuple[jax.Array, ...]],
    same: Callable[..., tuple[jax.Array, ...]],
    *args: jax.Array,
    control: int = 0,
) -> tuple[jax.Array, ...]:
    """`function(*args)`, with the derivative of `same(results, *args)` for constant results.

    It has that of the first results; any more are integers.

    A primitive: JAX's transformations never look inside, so there may be loops of any length.
    (JAX before 0.12 drops a `custom_jvp` from a `scan` that is differentiated twice.)

    `control`: of how many of the first arguments only the control flow depends, which `same` does
    not need. Where `jax.vmap` maps them, `same(None, *args)` is computed: it would select, in each
    step, what of the carry is to stay, and compute every branch.
    """
    bind = _with_derivative.bind
    return tuple(bind(*args, function=function, same=same, control=control))


_with_derivative = Primitive("with_derivative")
_with_derivative.multiple_results = True


def _run(*args, function, same, control):
    """Compiled under `jax.disable_jit` too, as any primitive."""
    del same, control
    with jax.disable_jit(False):
        return jax.jit(function)(*args)


def _called(*args, function, same, control):
    del same, control
    return function(*args)


def _abstract(*args, function, same, control):
    del same, control
    return jax.make_jaxpr(function)(*args).out_avals


def _differentiated(args, tangents, *, function, same, control):
    results = with_derivative(function, same, *args, control=control)
    real = [jnp.issubdtype(x.dtype, jnp.inexact) for x in args]
    active = [i for i, t in enumerate(tangents) if real[i] and not isinstance(t, ad.Zero)]

    def of_active(*values):
        full = list(args)
        for i, value in zip(active, values, strict=True):
            full[i] = value
        return same(results, *full)

    primals, changes = ([x[i] for i in active] for x in (args, tangents))
    changes = jax.jvp(of_active, primals, changes)[1]
    none = (ad.Zero(jax.typeof(x).to_tangent_aval()) for x in results[len(changes) :])
    return results, (*changes, *none)


def _batched(args, axes, *, function, same, control):
    if any(axis is not None for axis in axes[:control]):
        function, control = partial(same, None), 0
    function = jax.vmap(function, in_axes=axes)
    same = jax.vmap(same, in_axes=(0, *axes))
    results = with_derivative(function, same, *args, control=control)
    return results, (0,) * len(results)


_with_derivative.def_impl(_run)
_with_derivative.def_abstract_eval(_abstract)
ad.primitive_jvps[_with_derivative] = _differentiated
batching.primitive_batchers[_with_derivative] = _batched
mlir.register_lowering(_with_derivative, mlir.lower_fun(_called, multiple_results=True))


def instantiated(g: Any) -> jax.Array:
    """A cotangent of `symbolic_zeros` as an array."""
    symbolic = isinstance(g, SymbolicZero)
    return jnp.zeros(g.shape, jnp.dtype(g.dtype)) if symbolic else g  # pyright: ignore


def values(tree: Any) -> Any:
    """The values of the primals that `symbolic_zeros` wraps."""
    return jax.tree.map(lambda p: p.value, tree, is_leaf=is_primal)


def is_primal(leaf: Any) -> bool:
    """Whether `symbolic_zeros` wrapped this."""
    return hasattr(leaf, "perturbed")
