# SPDX-License-Identifier: Apache-2.0
"""The program `jaxsoftmax`: a classifier or a language model trained through this library's losses.

A run (`run`, `checkpoint`, `processes`, `mesh`) is the same for both; `classifier` and `language`
say what is trained. Nothing in the library imports this package; it needs the extras
`jaxsoftmax[train]` and `jaxsoftmax[lm]`.
"""
