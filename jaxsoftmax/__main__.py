# SPDX-License-Identifier: Apache-2.0
"""The command `jaxsoftmax`, as `python -m jaxsoftmax`.

Python imports the package, and so JAX, before this file: until then Ctrl-C is Python's own.
"""

import sys

from jaxsoftmax_command import main

if __name__ == "__main__":
    sys.exit(main())
