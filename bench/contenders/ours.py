# SPDX-License-Identifier: Apache-2.0
"""This library."""

import jaxsoftmax

integer_labels = jaxsoftmax.softmax_cross_entropy_with_integer_labels
dense_labels = jaxsoftmax.softmax_cross_entropy
