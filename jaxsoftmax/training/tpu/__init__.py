# SPDX-License-Identifier: Apache-2.0
"""Programs compiled for TPUs without one: what they take, by their compiler's account.

Needs the extra `jaxsoftmax[tpu]`.
"""

import os
from collections.abc import Sequence
from typing import Any

from jax.experimental import topologies

# Without them libtpu looks for the TPU, at length and aloud, and lets one process in at a time.
_NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}


def tpus(topology: str) -> Sequence[Any]:
    """The devices of a TPU topology such as v5e:2x4, to compile for; none needs to be there."""
    for name, value in _NO_TPU.items():
        os.environ.setdefault(name, value)
    return topologies.get_topology_desc(topology, platform="tpu").devices
