# SPDX-License-Identifier: Apache-2.0
"""How the linear head is computed; `_linear` has its public functions."""
