# SPDX-License-Identifier: Apache-2.0
"""The time of our programs on a TPU, over the plain ones', by its compiler's account."""

import functools

import jax
import pytest
from jax.sharding import SingleDeviceSharding
from layouts import tpu_devices

import jaxsoftmax
from bench import contenders, targets, timing
from bench.cases import Divergence, Dtype, Head, Labels, Logits, Mode, TwoHeads, TwoLogits
from jaxsoftmax.training.tpu import cycles

CHIP = "v5e"
OURS, IN_FORWARD, RECOMPUTE = contenders.OURS, "jaxsoftmax, in forward", "jaxsoftmax, recompute"
LOGITS = [Logits(1024, 32768, dtype) for dtype in (Dtype.FLOAT32, Dtype.BFLOAT16)]
HEAD = Head(1024, 512, 32768, Dtype.BFLOAT16)
DIVERGENCE = TwoLogits(8192, 1000, Dtype.FLOAT32, Divergence.KL)
TWO_HEADS = TwoHeads(2048, 256, 32768, Dtype.BFLOAT16, Divergence.KL)
# The cycles of ours over those of optax, at most: forward, and value and gradient.
BOUNDS = {
    LOGITS[0]: {OURS: (0.71, 0.85)},
    LOGITS[1]: {OURS: (0.53, 0.74)},
    HEAD: {IN_FORWARD: (1.03, 1.04), RECOMPUTE: (0.58, 0.87)},
    DIVERGENCE: {OURS: (0.95, 0.73)},
    TWO_HEADS: {OURS: (0.92, 0.78)},
}


@pytest.fixture(autouse=True)
def _uncached():
    """A program for a TPU cannot be read back from JAX's cache here; two contenders may be one."""
    option = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, option)
    jax.config.update(option, 1e9)
    yield
    jax.config.update(option, before)


@functools.cache
def compiled(case):
    """Ours and optax, by mode and name."""
    tpu_devices(cycles.CHIPS[CHIP].topology)
    integer = Labels.INTEGER
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(contenders.LOGITS, integer, contenders.LOGITS[integer][:2])
        patch.setattr(contenders, "HEAD", contenders.HEAD[1:3])
        patch.setattr(contenders, "VARIANTS", contenders.VARIANTS[:1])
        for name in ("DIVERGENCES", "HEAD_DIVERGENCES"):
            every = getattr(contenders, name)
            patch.setattr(contenders, name, {kind: some[:2] for kind, some in every.items()})
        section = targets.measure([case], targets.MODES, [CHIP])
    return {
        found["mode"]: {row["name"]: row for row in found["contenders"]}
        for found in section["cases"]
    }


@pytest.mark.parametrize("case", BOUNDS, ids=str)
def test_cycles_over_optax(case):
    for name, bounds in BOUNDS[case].items():
        for mode, most in zip(targets.MODES, bounds, strict=True):
            rows = compiled(case)[mode]
            ratio = rows[name]["cycles"] / rows[contenders.BASELINE]["cycles"]
            assert ratio <= most, f"{name}, {mode}"


@pytest.mark.parametrize("case", LOGITS, ids=str)
def test_forward_is_one_pass(case):
    """From the label; the rest is small."""
    own = compiled(case)[Mode.FORWARD][OURS]
    assert own["temp_bytes"] < case.tokens * case.classes  # nothing of the logits' size
    (note,) = own["notes"]
    assert "loop" in note


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_softmax_and_its_vjp(dtype):
    device = SingleDeviceSharding(tpu_devices(cycles.CHIPS[CHIP].topology)[0])
    logits = jax.ShapeDtypeStruct((1024, 32768), dtype, sharding=device)

    def taken(softmax):
        def vjp(logits, cotangent):
            return jax.vjp(softmax, logits)[1](cotangent)

        text = timing.compile_for("tpu", vjp, [logits, logits]).as_text()
        return cycles.account(text, cycles.CHIPS[CHIP]).cycles

    assert taken(jaxsoftmax.softmax) <= 1.02 * taken(jax.nn.softmax)


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
    chip = cycles.Chip("", hertz=2.0, bytes_per_s=4.0, flops_per_s=1.0, gigabytes=1)
    found = cycles.account(HLO.replace("LENGTH", length), chip)
    moved = 1.4 * 64 / 4 * 2  # read and written
    assert found.cycles == pytest.approx(inside + moved)
    assert len(found.notes) == (inside == 0)
    assert found.costs[0].cycles == max(inside, moved)
    assert cycles.at_peak(6, chip) == 12


@pytest.mark.parametrize(
    ("share", "steps", "branch"), [(None, 0, 1), (0.0, 0, 1), (0.1, 1, 2), (0.5, 2, 2), (1.0, 4, 4)]
)
def test_the_account_of_tokens_that_count(share, steps, branch):
    """The steps of a loop, and the program of the least size, that so many tokens need."""
    where = ', metadata={op_name="jit(f)/counted_of_%s/%s"}'
    others = [
        f"%branch.{i} (p.{i}: f32[8]) -> f32[8] {{\n"
        f"  %p.{i} = f32[8]{{0}} parameter(0)\n"
        f"  ROOT %b.{i} = f32[8]{{0}} fusion(%p.{i}), calls=%g.1, "
        f'backend_config={{"estimated_cycles":"{10**i}"}}\n}}\n'
        for i in (3, 4, 5)
    ]
    choice = (
        "\n  %k.1 = f32[8]{0} conditional(%s.1, %a.1, %a.1, %a.1), "
        "branch_computations={%branch.3, %branch.4, %branch.5}" + where % ("0_2_4", "cond")
    )
    text = HLO.replace("LENGTH", where % ("4", "while") + choice)
    chip = cycles.Chip("", hertz=2.0, bytes_per_s=4.0, flops_per_s=1.0, gigabytes=1)
    found = cycles.account("\n".join(others) + text, chip, share)
    moved = 1.4 * 64 / 4 * 2
    assert found.cycles == pytest.approx(10 * steps + 10 ** {1: 3, 2: 4, 4: 5}[branch] + moved)
    assert len(found.notes) == (2 if share is None else 0)


@pytest.mark.wide
def test_ignored_tokens_take_no_cycles(monkeypatch):
    """Both orders, of a head whose tokens make several chunks; what is left is small."""
    tpu_devices(cycles.CHIPS[CHIP].topology)
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # with more, an unknown mesh has a part
    monkeypatch.setattr(contenders, "WITHOUT_IGNORING", contenders.WITHOUT_IGNORING[1:])
    monkeypatch.setattr(contenders, "IGNORING", contenders.IGNORING[1:2])
    head = Head(4096, 128, 16384, Dtype.BFLOAT16)
    section = targets.measure_ignored([head], [0.0, 0.5, 1.0], [CHIP])
    assert [case["ignored"] for case in section["cases"]] == [None, 0.0, 0.5, 1.0]
    _, none, half, every = (
        {row["name"]: row for row in case["contenders"]} for case in section["cases"]
    )
    for name in (IN_FORWARD, RECOMPUTE):
        assert none[name]["of_base"] < 1.03
        assert 0.4 < half[name]["cycles"] / none[name]["cycles"] < 0.75
        assert every[name]["cycles"] < 0.15 * none[name]["cycles"]


@pytest.mark.parametrize(
    "case", [Logits(64, 300, Dtype.FLOAT32), Head(64, 128, 300, Dtype.BFLOAT16)]
)
def test_the_benchmark(case):
    """Every contender that JAX compiles, with what costs most."""
    tpu_devices(cycles.CHIPS[CHIP].topology)
    section = targets.measure([case], [Mode.VALUE_AND_GRAD], [CHIP], detail=True)
    (found,) = section["cases"]
    assert {"jaxsoftmax", "optax"} <= {row["name"] for row in found["contenders"]}
    for row in found["contenders"]:
        assert 0 < sum(cost["cycles"] for cost in row["costs"]) <= row["cycles"]
