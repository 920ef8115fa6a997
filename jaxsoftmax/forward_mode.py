# SPDX-License-Identifier: Apache-2.0
"""The functions on logits again, for forward mode: `jax.jvp`, `jax.jacfwd`, `jax.linearize`.

The same names, arguments and results, with the derivative as a `custom_jvp`. Reverse mode works too
and saves the same residuals. The functions of the package itself have a `custom_vjp`, which JAX
cannot differentiate in forward mode. Two differences, since a linear map cannot tell which losses
are used: a label out of range (and not ignored) makes its row's gradient NaN even where the loss is
not used; and infinite derivatives are left out, by a dense label at a logit of −inf, and by the
target of an infinite divergence.

Example:
  >>> import jax, jax.numpy as jnp
  >>> from jaxsoftmax import forward_mode
  >>> loss = forward_mode.softmax_cross_entropy_with_integer_labels
  >>> logits, label = jnp.array([30.0, 0.0, 0.0]), jnp.array(0)
  >>> print(jax.jacfwd(loss)(logits, label))
  [-1.8715246e-13  9.3576229e-14  9.3576229e-14]
"""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from . import _cross_entropy, _divergence, _rules, _softmax

P = ParamSpec("P")
T = TypeVar("T")


def _in_forward_mode(function: Callable[P, T]) -> Callable[P, T]:
    @functools.wraps(function)
    def in_forward_mode(*args: P.args, **kwargs: P.kwargs) -> T:
        with _rules.forward_mode():
            return function(*args, **kwargs)

    in_forward_mode.__module__ = __name__  # where `pickle` looks for it
    return in_forward_mode


softmax = _in_forward_mode(_softmax.softmax)
log_softmax = _in_forward_mode(_softmax.log_softmax)
logsumexp = _in_forward_mode(_softmax.logsumexp)
softmax_jacobian = _in_forward_mode(_softmax.softmax_jacobian)
softmax_cross_entropy = _in_forward_mode(_cross_entropy.softmax_cross_entropy)
softmax_cross_entropy_with_integer_labels = _in_forward_mode(
    _cross_entropy.softmax_cross_entropy_with_integer_labels
)
label_log_probs = _in_forward_mode(_cross_entropy.label_log_probs)
softmax_kl_divergence = _in_forward_mode(_divergence.softmax_kl_divergence)
softmax_js_divergence = _in_forward_mode(_divergence.softmax_js_divergence)
