# SPDX-License-Identifier: Apache-2.0
"""The command `jaxsoftmax`, as `python -m jaxsoftmax`.

Python imports the package, and with it JAX, before this file runs: until then Ctrl-C has Python's
own handler.
"""

import sys

from jaxsoftmax_command import main

if __name__ == "__main__":
    sys.exit(main())
