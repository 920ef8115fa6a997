# SPDX-License-Identifier: Apache-2.0
"""A user's function with what it closes over as arguments, so that its program can be found again.

Equal traces share one program, whichever Python functions they come from: a function that is
created again in every call is compiled once, and one that closes over another number than before
is not mistaken for the earlier one.
"""

from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np


class Closed:
    """A traced function of its constants and arguments; equal to another with the same trace.

    `at`: where in the constants that it is given its own are.
    """

    def __init__(self, traced: Any, at: Sequence[int]):
        self._jaxpr = _core().ClosedJaxpr(traced.jaxpr, [None] * len(traced.consts))
        self._at = tuple(at)
        self._key = (_key(self._jaxpr, {}), self._at)
        self._hash = hash(self._key)
        types = (aval.manual_axis_type for aval in traced.out_avals)
        self.varying = frozenset().union(*(t.varying for t in types))  # over manual mesh axes

    def __call__(self, consts: Any, *args: Any) -> Any:
        """The function's one result, for these constants and arguments."""
        core = _core()
        closed = core.ClosedJaxpr(self._jaxpr.jaxpr, [consts[i] for i in self._at])
        return core.jaxpr_as_fun(closed)(*args)[0]

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Closed) and self._key == other._key)

    def __hash__(self) -> int:
        return self._hash


def closed(function: Callable[..., Any], consts: list[Any], *example: Any) -> tuple[Closed, Any]:
    """The function traced for these arguments, and its result's shape.

    All arrays that it closes over, traced or not, become arguments: integers, booleans and keys as
    well, which `jax.closure_convert` leaves inside. Those that `consts` lacks are appended.
    """
    # A new `partial` is in no cache: the values it closes over may differ from the last call's.
    traced, shape = jax.make_jaxpr(partial(function), return_shape=True)(*example)
    at = []
    for const in traced.consts:
        known = [i for i, other in enumerate(consts) if other is const]
        at.append(known[0] if known else len(consts))
        if not known:
            consts.append(const)
    return Closed(traced, at), shape


def _key(jaxpr: Any, seen: dict[int, int]) -> Hashable:
    """All that a jaxpr computes, to be compared by value; `seen`: the jaxprs met before it."""
    if id(jaxpr) in seen:
        return seen[id(jaxpr)]
    seen[id(jaxpr)] = len(seen)
    inside, consts = getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())
    numbers: dict[int, int] = {}

    def atom(v):
        if isinstance(v, _core().Literal):
            return (v.aval, _data(v.val, seen))
        return numbers.setdefault(id(v), len(numbers))

    inputs = tuple((atom(v), v.aval) for v in (*inside.constvars, *inside.invars))
    equations = tuple(
        (
            e.primitive,
            e.ctx,
            tuple((name, _data(value, seen)) for name, value in sorted(e.params.items())),
            tuple(map(atom, e.invars)),
            tuple((atom(v), v.aval) for v in e.outvars),
        )
        for e in inside.eqns
    )
    return (inputs, tuple(map(_Same, consts)), equations, tuple(map(atom, inside.outvars)))


def _data(value: Any, seen: dict[int, int]) -> Hashable:
    core = _core()
    if isinstance(value, (core.Jaxpr, core.ClosedJaxpr)):
        return _key(value, seen)
    if isinstance(value, (tuple, list)):
        return (type(value), tuple(_data(v, seen) for v in value))
    if isinstance(value, (int, float, complex, np.ndarray, np.generic)):
        array = np.asarray(value)  # bit by bit: −0 is not 0, and NaN is NaN
        return (type(value), array.dtype, array.shape, array.tobytes())
    if callable(value) and not isinstance(value, type):
        return _Same(value)  # a custom derivative's, say
    try:
        hash(value)
    except TypeError:
        return _Same(value)
    return value


def _core() -> Any:
    """JAX's module of jaxprs, when it is needed: it imports Pallas, which takes as long as ours."""
    from jax.extend import core  # noqa: PLC0415

    return core


class _Same:
    """Equal where it is the very same object."""

    def __init__(self, value: Any):
        self._value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._value is other._value

    def __hash__(self) -> int:
        return id(self._value)
