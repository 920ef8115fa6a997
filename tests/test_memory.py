# SPDX-License-Identifier: Apache-2.0
"""The formula of the heads' memory, `bench/formula.py`: docstrings and compilers against it."""

import contextlib
import functools
import math
import re

import heads
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from cases import on_device
from heads import both_ways
from layouts import tpu_devices

import jaxsoftmax
from bench import contenders, formula, memory, timing
from bench.cases import Dtype, Head, head_of

CPU = [
    Head(4096, 256, 32768, Dtype.FLOAT32),
    Head(2048, 768, 50257, Dtype.FLOAT32),
    Head(8192, 512, 8192, Dtype.FLOAT32),
    Head(4096, 256, 32768, Dtype.BFLOAT16),
    Head(2048, 768, 32768, Dtype.BFLOAT16),
    Head(1024, 2048, 20000, Dtype.BFLOAT16),
]
# Large enough that nothing of note fits the chip's own 128 MiB, which are not counted.
TPU = [
    Head(8192, 2304, 256000, Dtype.BFLOAT16),
    Head(8192, 4096, 128256, Dtype.BFLOAT16),
    Head(32768, 4096, 128256, Dtype.FLOAT32),
    Head(16384, 2048, 151936, Dtype.BFLOAT16),
]


ORDERS = contenders.VARIANTS[:1] + contenders.HEAD[1:2]
one_device = contextlib.contextmanager(on_device)


def measured(target: str, heads: list[Head], orders: int = 2) -> dict[tuple[Head, str], int]:
    """What our heads need for value and gradient, compiled as where there is one CPU device."""
    with pytest.MonkeyPatch.context() as patch, one_device("one CPU device"):
        patch.setattr(contenders, "HEAD", ORDERS[:orders])
        patch.setattr(contenders, "VARIANTS", ())
        patch.setattr(contenders, "CHOICES", ())
        section = memory.measure(heads, [target])
    return {
        (head_of(case), row["name"]): row["temp_bytes"]
        for case in section["cases"]
        for row in case["contenders"]
    }


def order_of(name: str) -> str:
    return "recompute" if "recompute" in name else "in_forward"


def every_other_wide(heads: list[Head]) -> list:
    return [pytest.param(h, marks=pytest.mark.wide if i % 2 else ()) for i, h in enumerate(heads)]


@pytest.mark.parametrize("head", CPU + TPU[2:3], ids=str)
@pytest.mark.parametrize(
    ("function", "order"),
    [(jaxsoftmax.linear_loss, "in_forward"), (jaxsoftmax.linear_log_probs, "recompute")],
)
def test_the_formula_is_that_of_the_docstring(function, order, head):
    """Where there is no CPU and no TPU: without what the sentences below the formula add."""
    kind = "float32 operands" if head.dtype == "float32" else "half precision"
    (terms,) = re.findall(rf"^ +{kind} +(\d.*)$", function.__doc__, re.MULTILINE)
    N, H, V, _ = head
    c, g = formula.chunk(head, "gpu")
    sizes = {"N": N, "H": H, "V": V, "b": formula.block(head, "gpu"), "c": c, "g": g}
    terms = [term for term in terms.split(" + ") if not (g == N and term == "4·H·V")]
    stated = sum(
        math.prod(sizes[factor] if factor in sizes else int(factor) for factor in term.split("·"))
        for term in terms
    )
    assert formula.temporary_bytes(head, order, "gpu") == stated


@pytest.mark.parametrize("head", every_other_wide(CPU), ids=str)
def test_on_cpu(head):
    found = measured("here", [head])
    assert len(found) == 2
    for (_, name), size in found.items():
        expected = formula.temporary_bytes(head, order_of(name), "cpu")
        assert size == pytest.approx(expected, rel=0.2), name


@pytest.mark.parametrize("head", every_other_wide(TPU), ids=str)
def test_for_tpu(head):
    """Recomputed in float32 is more than the formula says."""
    tpu_devices(memory.TPUS["v5p"])  # or skip
    half = head.dtype != "float32"
    in_forward, *recompute = measured("v5p", [head], 2 if half else 1).values()
    assert in_forward == pytest.approx(formula.in_forward(head, "tpu"), rel=0.2)
    blocks = 6 * head.hidden * formula.block(head, "tpu")  # of the kernel: in the chip's own memory
    assert len(recompute) == half
    assert all(size <= formula.recompute(head, "tpu") - blocks for size in recompute)
    if head == TPU[0]:  # plain optax: 8.4 GB
        assert in_forward <= 6e9
        assert recompute[0] <= 0.36e9  # a v5p's holds d_hidden twice


def choices_compiled(head: Head, k: int, device=None) -> dict[str, int]:
    """The temporary bytes of top-k, of a sample, and of a sample of the top-k."""
    calls = {
        "top-k": functools.partial(jaxsoftmax.linear_top_k, k=k),
        "sample": functools.partial(jaxsoftmax.linear_sample, np.zeros(2, np.uint32)),
        "both": functools.partial(jaxsoftmax.linear_sample, np.zeros(2, np.uint32), top_k=k),
    }
    placed = device and jax.sharding.SingleDeviceSharding(device)
    shapes = (head.tokens, head.hidden), (head.hidden, head.classes)
    arguments = [jax.ShapeDtypeStruct(s, head.dtype.value, sharding=placed) for s in shapes]
    platform = device.platform if device else "cpu"
    with one_device("one CPU device"):
        lowered = {
            name: jax.jit(f).trace(*arguments).lower(lowering_platforms=(platform,))
            for name, f in calls.items()
        }
        return {name: timing.temporary_bytes(one.compile()) for name, one in lowered.items()}


@pytest.mark.parametrize("head", [CPU[1], *every_other_wide(CPU)[3:]], ids=str)
def test_choices_on_cpu(head):
    k = 100
    found = choices_compiled(head, k)
    of_top_k, of_sample = formula.top_k(head, k, "cpu"), formula.sample(head, "cpu")
    rest = 4 * head.tokens * (head.classes % formula.block(head, "cpu"))
    for name, expected in (("top-k", of_top_k), ("sample", of_sample), ("both", of_top_k + rest)):
        assert found[name] == pytest.approx(expected, rel=0.1), name


@pytest.mark.wide
def test_choices_for_tpu():
    head = Head(4096, 2048, 131072, Dtype.BFLOAT16)
    (device,) = tpu_devices(memory.TPUS["v5p"])[:1]
    most = 32 * head.tokens * formula.block(head, "tpu")
    assert all(size <= most for size in choices_compiled(head, 256, device).values())


def test_the_formula_of_choices_is_that_of_the_docstrings():
    """Where there is no CPU."""
    head, k = CPU[1], 100
    sizes = {"N": head.tokens, "b": formula.block(head, "gpu"), "k": k}
    for function, expected in (
        (jaxsoftmax.linear_top_k, formula.top_k(head, k, "gpu")),
        (jaxsoftmax.linear_sample, formula.sample(head, "gpu")),
    ):
        (terms,) = re.findall(r"^ +any operands +(\d.*)$", function.__doc__ or "", re.MULTILINE)
        factors = [term.split("·") for term in terms.split(" + ")]
        stated = sum(
            math.prod(sizes[f] if f in sizes else int(f) for f in term) for term in factors
        )
        assert stated == expected


def test_logits_made_inside_a_program_are_overwritten_by_their_gradient():
    """Plain optax needs a second array of their size, the kept exponentials."""

    def step(hidden, kernel, labels):
        losses = jaxsoftmax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, labels)
        return losses.mean()

    tokens, width, classes = 512, 64, 8192
    arguments = [
        jax.ShapeDtypeStruct((tokens, width), jnp.float32),
        jax.ShapeDtypeStruct((width, classes), jnp.float32),
        jax.ShapeDtypeStruct((tokens,), jnp.int32),
    ]
    with one_device("one CPU device"):
        compiled = jax.jit(jax.grad(step, (0, 1))).lower(*arguments).compile()
    logits = 4 * tokens * classes
    chunk = 4 << 20  # the rows that the forward pass holds in cache
    assert timing.temporary_bytes(compiled) <= 1.05 * logits + chunk


def test_the_last_columns_of_d_kernel_are_added_in_place():
    """XLA:CPU goes over the whole array instead where it reads what it updates as a plain slice."""
    tokens, width, classes = 512, 64, 2 * 8192 + 27  # a prime, so that no block divides it
    loss = functools.partial(jaxsoftmax.linear_softmax_cross_entropy, chunk_size=256)
    shapes = ((tokens, width), (width, classes))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    with one_device("one CPU device"):
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments, labels).compile()
    updates = [
        body
        for body in (compiled.as_text() or "").split("\n\n")
        if "ROOT %dynamic_update_slice" in body and f"f32[{width},{classes}]" in body
    ]
    assert len(updates) == 2, "the blocks' and the last columns'"
    assert not [body for body in updates if " slice(" in body]


N, H, V = 1024, 128, 16_384


def compiled(gradients, dtype, *, transposed, devices=None):
    shapes = (N, H), (V, H) if transposed else (H, V), (N,)
    placed = devices and jax.sharding.SingleDeviceSharding(devices[0])
    arguments = [
        jax.ShapeDtypeStruct(shape, d, sharding=placed)
        for shape, d in zip(shapes, (dtype, dtype, jnp.int32), strict=True)
    ]
    f = functools.partial(heads.head, gradients=gradients, transpose_kernel=transposed)
    return jax.jit(jax.value_and_grad(f, (0, 1))).lower(*arguments).compile()


def copied_kernels(program):
    """The instructions that copy or transpose an array of the kernel's size."""
    found = re.findall(r"= \w+\[([\d,]*)\]\S* (?:copy|transpose)\(", program)
    return sum(math.prod(map(int, dims.split(","))) == H * V for dims in found if dims)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=lambda d: d.__name__)
@pytest.mark.parametrize("target", ["cpu", pytest.param("v5e:2x2", marks=pytest.mark.wide)])
@both_ways
def test_no_transposed_copy_is_made(target, gradients, dtype):
    """As much memory as of the kernel the other way around, and no more copies of it."""
    devices = None if target == "cpu" else tpu_devices(target)
    with one_device("one CPU device"):
        there, plain = (
            compiled(gradients, dtype, transposed=transposed, devices=devices)
            for transposed in (True, False)
        )
    texts = [program.as_text() or "" for program in (there, plain)]
    assert copied_kernels(texts[0]) <= copied_kernels(texts[1])
    most = 1.02 * timing.temporary_bytes(plain)
    old_cpu = target == "cpu" and jax.__version_info__ < (0, 11)
    if old_cpu and dtype == jnp.bfloat16 and gradients == "in_forward":
        most += 2 * H * V  # XLA:CPU of JAX 0.10 keeps d_kernel twice, rounded and not
    assert timing.temporary_bytes(there) <= most


@both_ways
def test_tokens_that_do_not_count_take_no_more_memory(gradients):
    tokens, width, classes = 2048, 64, 8192
    shapes = ((tokens, width), (width, classes))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)

    def compiled(**options):
        f = functools.partial(heads.head, gradients=gradients, **options)
        return jax.jit(jax.value_and_grad(f, (0, 1))).lower(*arguments, labels).compile()

    with one_device("one CPU device"):
        # In both as many tokens a chunk.
        size = {"chunk_size": 256} if gradients == "in_forward" else {}
        without, some = compiled(**size), compiled(ignore_index=-100, **size)
    assert timing.temporary_bytes(some) <= 1.05 * timing.temporary_bytes(without)
