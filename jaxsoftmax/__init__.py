# SPDX-License-Identifier: Apache-2.0
"""Softmax and softmax cross-entropy for JAX, with derivatives that stay exact."""

from importlib.metadata import version as _version

from . import forward_mode as forward_mode
from ._checks import check_labels as check_labels
from ._cross_entropy import LogProbs as LogProbs
from ._cross_entropy import label_log_probs as label_log_probs
from ._cross_entropy import softmax_cross_entropy as softmax_cross_entropy
from ._cross_entropy import (
    softmax_cross_entropy_with_integer_labels as softmax_cross_entropy_with_integer_labels,
)
from ._divergence import softmax_js_divergence as softmax_js_divergence
from ._divergence import softmax_kl_divergence as softmax_kl_divergence
from ._head.choices import Sample as Sample
from ._head.choices import TopK as TopK
from ._linear import linear_js_divergence as linear_js_divergence
from ._linear import linear_kl_divergence as linear_kl_divergence
from ._linear import linear_log_probs as linear_log_probs
from ._linear import linear_loss as linear_loss
from ._linear import linear_sample as linear_sample
from ._linear import linear_softmax_cross_entropy as linear_softmax_cross_entropy
from ._linear import linear_top_k as linear_top_k
from ._softmax import log_softmax as log_softmax
from ._softmax import logsumexp as logsumexp
from ._softmax import softmax as softmax
from ._softmax import softmax_jacobian as softmax_jacobian

__version__ = _version("jaxsoftmax")

__all__ = [
    "LogProbs",
    "Sample",
    "TopK",
    "check_labels",
    "label_log_probs",
    "linear_js_divergence",
    "linear_kl_divergence",
    "linear_log_probs",
    "linear_loss",
    "linear_sample",
    "linear_softmax_cross_entropy",
    "linear_top_k",
    "log_softmax",
    "logsumexp",
    "softmax",
    "softmax_cross_entropy",
    "softmax_cross_entropy_with_integer_labels",
    "softmax_jacobian",
    "softmax_js_divergence",
    "softmax_kl_divergence",
]
