# SPDX-License-Identifier: Apache-2.0
"""The memory formulas of the docstrings against the compilers, by `bench.memory`."""

import contextlib
import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from cases import on_device

import jaxsoftmax
from bench import memory, timing
from bench.cases import Dtype, Head

ROOT = Path(__file__).resolve().parent.parent
MIB = 1 << 20
BLOCK = 2048
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
    Head(16384, 2048, 151936, Dtype.BFLOAT16),
    Head(32768, 4096, 128256, Dtype.FLOAT32),
]


MEASURE = """
import json, sys
from bench import contenders, memory
from bench.cases import Head
contenders.HEAD, contenders.TIED = contenders.HEAD[:2], ()  # ours
target, heads = json.loads(sys.argv[1])
print(json.dumps(memory.measure([Head(*head) for head in heads], [target])))
"""


def measured(target: str, heads: list[Head]) -> dict[tuple[Head, str], int]:
    """Compile in a process of its own: with one device, as a user would have it."""
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps([target, heads])],
        cwd=ROOT,
        env=environment | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {
        (head, name): size
        for _, head, name, size in memory.rows_of(json.loads(done.stdout))
        if size is not None and name in ("jaxsoftmax", "jaxsoftmax, recompute")
    }


def chunk(head: Head) -> int:
    """The tokens of a chunk: what 56 MiB of float32 logits hold, in chunks of equal size."""
    most = min(max(56 * MIB // (4 * head.classes), 256), 4096)
    return -(-head.tokens // -(-head.tokens // most))


def in_forward_on_cpu(head: Head) -> int:
    n, width, classes, dtype = head
    c = chunk(head)
    blocks = 8 * MIB * (max(c, width) + min(c, width)) // max(c, width)
    if dtype == "float32":
        return 4 * c * classes + 8 * n * width + blocks
    beside = max(0, 4 * c * classes - 2 * width * classes)
    return 4 * width * classes + 2 * c * classes + beside + 6 * n * width + blocks


def in_forward_on_tpu(head: Head) -> int:
    n, width, classes, dtype = head
    if dtype == "float32":
        return 4 * chunk(head) * classes + 8 * n * width + 2 * width * classes
    return 4 * width * classes + 8 * chunk(head) * classes + 6 * n * width


def recompute_on_cpu(head: Head) -> int:
    n, width, classes, dtype = head
    blocks = n * (BLOCK + classes % BLOCK)
    if dtype == "float32":
        return 4 * blocks + 4 * n * width + 8 * width * BLOCK
    size = 6 * blocks + 8 * n * width + 6 * width * BLOCK
    if dtype == "bfloat16" and jax.__version_info__ < (0, 11):
        # d_kernel as integers, until which about half of the rest lies where it will lie.
        return max(size, 2 * width * classes + size // 2)
    return size


def test_on_cpu():
    found = measured("here", CPU)
    assert len(found) == 2 * len(CPU)
    for (head, name), size in found.items():
        formula = recompute_on_cpu if "recompute" in name else in_forward_on_cpu
        assert size == pytest.approx(formula(head), rel=0.2), (head, name)


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs jax[tpu]")
def test_for_tpu():
    found = measured("v5p", TPU)
    assert len(found) == 2 * len(TPU)
    for (head, name), size in found.items():
        if "recompute" not in name:
            assert size == pytest.approx(in_forward_on_tpu(head), rel=0.2), head
        elif head.dtype != "float32":
            assert size <= 6 * head.tokens * BLOCK + 8 * head.tokens * head.hidden, head

    large = Head(8192, 2304, 256000, Dtype.BFLOAT16)  # plain optax: 8.4 GB
    assert found[large, "jaxsoftmax"] <= 3.5e9
    assert found[large, "jaxsoftmax, recompute"] <= 0.35e9


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
    with contextlib.contextmanager(on_device)("one CPU device"):
        compiled = jax.jit(jax.grad(step, (0, 1))).lower(*arguments).compile()
    logits = 4 * tokens * classes
    chunk = 4 << 20  # the rows that the forward pass holds in cache
    assert timing.temporary_bytes(compiled) <= 1.05 * logits + chunk


def test_the_last_columns_of_d_kernel_are_added_in_place():
    """XLA:CPU goes over the whole array instead where it reads what it updates as a plain slice."""
    tokens, width, classes = 512, 64, 2 * 8192 + 100  # blocks of 8192 at 256 tokens a chunk
    loss = functools.partial(jaxsoftmax.linear_softmax_cross_entropy, chunk_size=256)
    shapes = ((tokens, width), (width, classes))
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    labels = jax.ShapeDtypeStruct((tokens,), jnp.int32)
    with contextlib.contextmanager(on_device)("one CPU device"):
        compiled = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments, labels).compile()
    updates = [
        body
        for body in (compiled.as_text() or "").split("\n\n")
        if "ROOT %dynamic_update_slice" in body and f"f32[{width},{classes}]" in body
    ]
    assert len(updates) == 2, "the blocks' and the last columns'"
    assert not [body for body in updates if " slice(" in body]
