# SPDX-License-Identifier: Apache-2.0
"""The program `jaxsoftmax train`: a classifier trained through this library's loss.

Nothing in the library imports this package; it needs `pip install 'jaxsoftmax[train]'`.
"""
