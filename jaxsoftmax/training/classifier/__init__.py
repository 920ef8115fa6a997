# SPDX-License-Identifier: Apache-2.0
"""What `jaxsoftmax train` trains: a multilayer perceptron on rows of numbers."""
