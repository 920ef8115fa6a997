# SPDX-License-Identifier: Apache-2.0
"""The forms of heads for platforms that are no CPU, taken on a CPU: groups of chunks, other sizes.

They are plain JAX. The tests of other files again, with `cases.SMALL` for the constants of sizes;
on meshes they are in test_sharding.py. Then what only these forms do.
"""

from functools import partial
from typing import Any

import numpy as np
import pytest
import test_half_precision
import test_linear
import test_orders
from assertions import assert_within
from cases import on_device
from heads import check_head, head_truth, problem, total

from jaxsoftmax._head import sizes


@pytest.fixture(scope="module", autouse=True)
def one_other_device():
    yield from on_device("one other device")


SAME: list[Any] = [
    test_linear.test_losses_and_gradients_whatever_the_chunks,
    test_linear.test_log_probs_whatever_the_blocks,
    test_linear.test_vmap_of_any_operand,
    test_linear.test_a_bad_label_is_one_token_of_a_mean_with_class_weights,
    test_linear.test_no_weight,
    test_linear.test_a_loss_without_a_derivative_where_the_weight_is_0,
    test_linear.test_a_head_of_width_0_has_its_bias_for_logits,
    test_linear.test_losses_of_any_dtype_come_in_that_of_sums,
    test_half_precision.test_heads,
    test_half_precision.test_a_small_cotangent_loses_nothing_in_float16,
    test_half_precision.test_float16_heads_take_slopes_of_all_sizes,
    test_half_precision.test_any_loss_of_any_slope_in_float16,
    test_half_precision.test_second_derivatives_of_float16_heads,
]
globals().update({test.__name__: test for test in SAME})

of_heads = pytest.mark.parametrize(
    "loss", [loss for loss in test_orders.LOSSES if loss.on == "hidden"], ids=str
)


@of_heads
def test_tokens_that_do_not_count(loss):
    test_orders.test_tokens_that_do_not_count(loss)


@pytest.mark.wide
@of_heads
@pytest.mark.parametrize("operation", test_orders.HIGHER, ids=lambda o: o.__name__)
def test_tokens_that_do_not_count_to_higher_orders(loss, operation):
    test_orders.test_tokens_that_do_not_count_to_higher_orders(loss, operation)


def test_the_problems_have_groups_with_a_rest():
    """Of those above: several groups, padding, and all in one."""
    cut = partial(sizes.chunks, itemsize=4, devices=1)
    assert cut(33, 17, 130, most=2).other == (2, 4)
    assert 33 % (2 * 4)
    assert cut(33, 17, 130, most=None).other == (3, 2)
    assert cut(5, 300, 257, most=3).other == (3, 2)
    blocks = sizes.blocks(33, 130, None, 1).other
    assert 130 // blocks > 1
    assert 130 % blocks


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_several_groups_with_a_rest(dtype):
    """Always, whatever is drawn of the sweeps above."""
    check_head("in_forward", problem(33, 17, 130, dtype), chunk_size=2)


STEPS = {
    "of one size": np.ones(3),
    "one larger": np.array([1, 1e3, 1]),
    "far apart": np.array([1e-3, 1, 1e-6]),
    "one of nothing": np.array([1, 0, 1]),
    "two of nothing": np.array([0, 0, 1]),
    "nothing": np.zeros(3),
}


@pytest.mark.parametrize("name", STEPS)
def test_float16_chunks_of_a_group_have_one_scale(name):
    """Each chunk's d_logits have its own scale in d_hidden; in d_kernel they take the largest.

    There what is below 2⁻³⁴ of the largest cotangent may be 0: half a subnormal, where the largest
    is at least 2⁹. Token i is of chunk i mod 3, and all three are of one group.
    """
    arrays: Any = problem(9, 5, 40, np.float16)
    assert sizes.chunks(9, 5, 40, 2, 3, 1).other == (3, 3)
    g = np.tile(STEPS[name], 3).astype(np.float32)
    options: dict[str, Any] = {"reduction": "sum", "gradients": "in_forward", "chunk_size": 3}
    losses, *expected = head_truth(*arrays, g=g)
    largest = 2.0**-34 * g.max() * np.abs(arrays[0].astype(float)).sum(0)[:, None]
    for size in np.array([1, 1e-10, 1e10], np.float32):
        value, ds = total(*arrays, weights=g * size, cotangent=1 / size, **options)
        assert_within(value, g @ losses.value, 2 * g @ losses.bound + 1e-6 * g @ losses.value)
        for d, (true, bound), lost in zip(ds, expected, (0, largest, 0), strict=True):
            scaled = 2.0**-22 * np.abs(true)  # times the size, and divided by it
            assert_within(d, true, bound + lost + scaled, f"size {size}")
