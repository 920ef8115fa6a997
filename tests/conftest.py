# SPDX-License-Identifier: Apache-2.0
"""One strict world for every test: no silent promotion, no silent broadcast, eight devices."""

import atexit
import collections
import os
import random
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


# Of a test with more cases than FEW, one in SHARE runs by default, drawn by the test's name, unless
# it is marked `every`; of the others one in RUN runs in CI, the rest is left to a run by hand. What
# is drawn runs in CI on the oldest JAX, the others on the newest.
FEW, SHARE, RUN = 6, 5, 10


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Those by default are `drawn`; the others are `wide`, and those not for CI also `rare`."""
    tests = collections.defaultdict(list)
    for item in items:
        tests[item.nodeid.partition("[")[0]].append(item)
    for name, cases in tests.items():
        by_default = [case for case in cases if not case.get_closest_marker("wide")]
        if len(by_default) > FEW and not cases[0].get_closest_marker("every"):
            kept = random.Random(name).sample(range(len(by_default)), -(-len(by_default) // SHARE))
            for i in {*range(len(by_default))} - {*kept}:
                by_default[i].add_marker(pytest.mark.wide)
            for i in kept:
                by_default[i].add_marker(pytest.mark.drawn)
        if len(cases) > FEW:
            wide = [case for case in cases if case.get_closest_marker("wide")]
            for case in random.Random(name).sample(wide, len(wide) - -(-len(wide) // RUN)):
                case.add_marker(pytest.mark.rare)


@pytest.fixture(scope="module", params=["anywhere", "one CPU device"])
def device(request):
    """Both formulations: the one for any platform or sharding, and the one for a lone CPU."""
    from cases import on_device  # noqa: PLC0415  (after JAX is configured)

    yield from on_device(request.param)
