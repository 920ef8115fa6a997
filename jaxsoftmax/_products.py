# SPDX-License-Identifier: Apache-2.0
"""What both orders of the linear head share: the product, and which operands are differentiated."""

import dataclasses

import jax
from jax import lax

from ._numerics import accumulation_dtype


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Live:
    """Which operands are differentiated, one flag a leaf; static, so that the rest is not done."""

    flags: tuple[bool, ...]


def opened(tree):
    """The values of a custom rule's arguments, and which of them are differentiated."""
    is_leaf = lambda leaf: hasattr(leaf, "perturbed")  # noqa: E731
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_leaf)
    return treedef.unflatten([p.value for p in leaves]), Live(tuple(p.perturbed for p in leaves))


def dot(a, b, contract, precision):
    """The product over one axis of each, in the accumulation dtype."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    dtype = accumulation_dtype(a.dtype)
    return lax.dot_general(a, b, dimensions, precision=precision, preferred_element_type=dtype)


def product(hidden, kernel, bias, precision):
    logits = dot(hidden, kernel, (1, 0), precision)
    return logits if bias is None else logits + bias.astype(logits.dtype).reshape(1, -1)
