# SPDX-License-Identifier: Apache-2.0
"""Reads our docstrings' one example as what Griffe calls "Examples"."""

import re

import griffe


class Docstrings(griffe.Extension):
    """Renames the section."""

    def on_object(self, *, obj, **_):
        """Called for each object of the package."""
        if obj.docstring:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = text
