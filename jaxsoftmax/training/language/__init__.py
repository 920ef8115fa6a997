# SPDX-License-Identifier: Apache-2.0
"""What `jaxsoftmax train-lm` trains: a small transformer on text, through the linear head."""
