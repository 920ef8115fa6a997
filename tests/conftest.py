# SPDX-License-Identifier: Apache-2.0
"""One strict world for every test: no silent promotion, no silent broadcast, eight devices."""

import os

# The last one counts: a number of devices asked for outside stays.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get(
    "XLA_FLAGS", ""
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def _compiled(tmp_path_factory):
    """A folder for what programs compile, one for all workers; `programs.program` uses it."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    os.environ["JAXSOFTMAX_TESTS_COMPILED"] = str(folder / "compiled")


@pytest.fixture(scope="module", params=["anywhere", "one CPU device"])
def device(request):
    """Both formulations: the one for any platform or sharding, and the one for a lone CPU."""
    from cases import on_device  # noqa: PLC0415  (after JAX is configured)

    yield from on_device(request.param)
