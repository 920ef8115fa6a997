# SPDX-License-Identifier: Apache-2.0
"""The time of our programs on a TPU, over the plain ones', by its compiler's account."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import SingleDeviceSharding
from layouts import tpu_devices

import jaxsoftmax
from bench import cycles, targets, timing
from bench.cases import Dtype, Head, Logits, Mode

CHIP = "v5e"
SHAPE = (1024, 32768)
LOGITS = ("float32", "bfloat16")


@functools.cache
def taken(function, *dtypes):
    """Cycles, and temporary memory, of `function` of logits and labels or a cotangent."""
    device = SingleDeviceSharding(tpu_devices(cycles.CHIPS[CHIP].topology)[0])
    arguments = [
        jax.ShapeDtypeStruct(SHAPE[:1] if dtype == "int32" else SHAPE, dtype, sharding=device)
        for dtype in dtypes
    ]
    compiled = timing.compile_for("tpu", function, arguments)
    found = cycles.account(compiled.as_text(), cycles.CHIPS[CHIP])
    return found, timing.temporary_bytes(compiled)


def plain(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)


def ours(logits, labels):
    return jaxsoftmax.softmax_cross_entropy_with_integer_labels(logits, labels)


def value_and_gradient(logits, labels, loss):
    return jax.value_and_grad(lambda logits: jnp.mean(loss(logits, labels)))(logits)


VALUE_AND_GRADIENT = {
    loss: functools.partial(value_and_gradient, loss=loss) for loss in (plain, ours)
}


def vjp(softmax):
    return lambda logits, cotangent: jax.vjp(softmax, logits)[1](cotangent)


SOFTMAX, PLAIN_SOFTMAX = vjp(jaxsoftmax.softmax), vjp(jax.nn.softmax)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 0.71), ("bfloat16", 0.53)])
def test_forward(dtype, most):
    """From the label: one pass, and the rest is small."""
    (own, memory), (other, _) = (taken(loss, dtype, "int32") for loss in (ours, plain))
    assert own.cycles <= most * other.cycles
    assert memory < np.prod(SHAPE)  # nothing of the logits' size
    (note,) = own.notes
    assert "loop" in note


@pytest.mark.parametrize(("dtype", "most"), [("float32", 0.85), ("bfloat16", 0.74)])
def test_value_and_gradient(dtype, most):
    own, other = (taken(VALUE_AND_GRADIENT[loss], dtype, "int32")[0] for loss in (ours, plain))
    assert own.cycles <= most * other.cycles


@pytest.mark.parametrize("dtype", LOGITS)
def test_softmax_and_its_vjp(dtype):
    own, other = (taken(f, dtype, dtype)[0] for f in (SOFTMAX, PLAIN_SOFTMAX))
    assert own.cycles <= 1.02 * other.cycles


HLO = """
%body.1 (p.1: f32[8]) -> f32[8] {
  %p.1 = f32[8]{0} parameter(0)
  ROOT %f.1 = f32[8]{0} fusion(%p.1), calls=%g.1, backend_config={"estimated_cycles":"10"}
}

%cond.1 (p.2: f32[8]) -> pred[] {
  ROOT %c.1 = pred[] constant(true)
}

ENTRY %main (a.1: f32[8]) -> f32[8] {
  %a.1 = f32[8]{0} parameter(0)
  %w.1 = f32[8]{0} while(%a.1), condition=%cond.1, body=%body.1LENGTH
  ROOT %copy.1 = f32[8]{0} copy(%w.1), backend_config={"estimated_cycles":"1000"}
}
"""
KNOWN = ', backend_config={"known_trip_count":{"n":"7"}}'


@pytest.mark.parametrize(("length", "inside"), [(KNOWN, 70), ("", 0)])
def test_the_account(length, inside):
    """A body as often as it runs; what moves data by its bytes; what is not counted is named."""
    chip = cycles.Chip("", hertz=2.0, bytes_per_s=4.0, flops_per_s=1.0)
    found = cycles.account(HLO.replace("LENGTH", length), chip)
    moved = 1.4 * 64 / 4 * 2  # read and written
    assert found.cycles == pytest.approx(inside + moved)
    assert len(found.notes) == (inside == 0)
    assert found.costs[0].cycles == max(inside, moved)
    assert cycles.at_peak(6, chip) == 12


@pytest.mark.parametrize(
    "case", [Logits(64, 300, Dtype.FLOAT32), Head(64, 128, 300, Dtype.BFLOAT16)]
)
def test_the_benchmark(case):
    """Every contender that JAX compiles, with what costs most."""
    tpu_devices(cycles.CHIPS[CHIP].topology)
    section = targets.measure([case], [Mode.VALUE_AND_GRAD], [CHIP])
    (found,) = section["cases"]
    assert {"jaxsoftmax", "optax"} <= {row["name"] for row in found["contenders"]}
    for row in found["contenders"]:
        assert 0 < sum(cost["cycles"] for cost in row["costs"]) <= row["cycles"]


ROWS = [
    {"name": "jaxsoftmax", "cycles": 3e6, "temp_bytes": 2e6, "notes": ["a loop"], "costs": []},
    {"name": "optax", "cycles": 4e6, "temp_bytes": 8e6, "notes": [], "costs": []},
]
NO_MEMORY = {"name": "optax", "cycles": None, "temp_bytes": None, "error": "no memory"}


def test_its_tables():
    """Over optax's cycles; where optax does not compile, the cycles themselves."""
    fields = {"dtype": "bfloat16", "target": "v5e", "mode": "value-and-grad", "at_peak": 1e6}
    cases = [
        {**fields, "shape": "1x2x3", "contenders": ROWS},
        {**fields, "shape": "4x5x6", "contenders": [ROWS[0], NO_MEMORY]},
    ]
    environment = {"device": "CPU", "versions": {"jax": "0.12"}, "python": "3.13", "date": "today"}
    section = {"op": "linear", "cases": cases, "environment": environment, "command": "bench"}
    (table,) = targets.in_docs(section)
    assert table.rows == [
        ["jaxsoftmax", "0.75, 2 MB", "3 Mcycles, 2 MB"],
        ["optax", "1.00, 8 MB", "no memory"],
        ["the products at v5e's peak", "0.25", "1 Mcycles"],
    ]
    first, *_ = targets.details(section)
    assert first.notes == ["a loop"]
