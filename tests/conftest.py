# SPDX-License-Identifier: Apache-2.0
"""One strict world for every test: no silent promotion, no silent broadcast, eight devices."""

import atexit
import os
import shutil
import tempfile

# The last one counts: a number of devices asked for outside stays.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get(
    "XLA_FLAGS", ""
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# What is compiled once stays, also over tests that clear JAX's own caches.
os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jaxsoftmax-tests-")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

import jax
import pytest

import jaxsoftmax._row_sums

# Arrays of any size are measured from their labels: the tests' are small.
jaxsoftmax._row_sums._MANY = 0

atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="module", params=["anywhere", "one CPU device"])
def device(request):
    """Both formulations: the one for any platform or sharding, and the one for a lone CPU."""
    from cases import on_device  # noqa: PLC0415  (after JAX is configured)

    yield from on_device(request.param)
