# SPDX-License-Identifier: Apache-2.0
"""A decoder-only transformer in Flax NNX, up to its last hidden states: the head is the loss's."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxsoftmax.training.language.options import Shape
from jaxsoftmax.training.mesh import FSDP, VOCAB

_ROTATION = 10_000.0  # the longest wavelength of a rotary position, over 2 π


def inner_width(width: int) -> int:
    """Of a gated layer: 8/3 of the width, as it has three matrices, in multiples of 64."""
    return 64 * -(-8 * width // (3 * 64))


class Attention(nnx.Module):
    """Causal attention within segments, with rotary positions."""

    def __init__(self, shape: Shape, rngs: nnx.Rngs) -> None:
        """Draws the parameters."""
        self.heads = shape.heads
        self.qkv = _linear(shape, shape.width, 3 * shape.width, rngs)
        self.out = _linear(shape, shape.width, shape.width, rngs)

    def __call__(
        self,
        x: Float[Array, "rows context width"],
        segments: Int[Array, "rows context"],
        positions: Int[Array, "rows context"],
    ) -> Float[Array, "rows context width"]:
        """What each token takes from those before it."""
        rows, context, width = x.shape
        parts = self.qkv(x).reshape(rows, context, 3 * self.heads, width // self.heads)
        q, k, v = jnp.split(parts, 3, axis=2)
        same = segments[:, None, :, None] == segments[:, None, None, :]
        mixed = jax.nn.dot_product_attention(
            rotated(q, positions), rotated(k, positions), v, mask=same, is_causal=True
        )
        return self.out(mixed.reshape(x.shape))


class Block(nnx.Module):
    """Attention and a gated layer (SwiGLU), each added to what it reads."""

    def __init__(self, shape: Shape, rngs: nnx.Rngs) -> None:
        """Draws the parameters."""
        inner = inner_width(shape.width)
        self.before_attention = _norm(shape, rngs)
        self.attention = Attention(shape, rngs)
        self.before_gate = _norm(shape, rngs)
        self.gate = _linear(shape, shape.width, inner, rngs)
        self.up = _linear(shape, shape.width, inner, rngs)
        self.down = _linear(shape, inner, shape.width, rngs)

    def __call__(
        self,
        x: Float[Array, "rows context width"],
        segments: Int[Array, "rows context"],
        positions: Int[Array, "rows context"],
    ) -> Float[Array, "rows context width"]:
        """The tokens after this layer."""
        x = x + self.attention(self.before_attention(x), segments, positions)
        y = self.before_gate(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


class Transformer(nnx.Module):
    """Tokens in, hidden states out; the embedding is the head's kernel too, `[vocab, width]`."""

    def __init__(self, shape: Shape, rngs: nnx.Rngs) -> None:
        """Draws the parameters."""
        initial = nnx.initializers.normal(shape.width**-0.5)
        self.embedding = nnx.Param(initial(rngs.params(), (shape.vocab, shape.width), jnp.float32))
        self.blocks = _stacked(shape, jax.random.split(rngs.params(), shape.layers))
        self.norm = _norm(shape, rngs)
        self.scale = shape.width**0.5  # of the inputs: the rows of a head's kernel are short
        self.dtype, self.remat = jnp.dtype(shape.dtype), shape.remat

    def __call__(
        self,
        inputs: Int[Array, "rows context"],
        segments: Int[Array, "rows context"],
        positions: Int[Array, "rows context"],
    ) -> Float[Array, "rows context width"]:
        """The hidden states."""
        # Rows are looked up first, rounded then: no copy of the embedding in another dtype.
        x = (self.embedding[...][inputs] * self.scale).astype(self.dtype)
        # One program for all layers, whose parameters are stacked.
        graph, layers = nnx.split(self.blocks)

        def apply(x, layer):
            return nnx.merge(graph, layer)(x, segments, positions), None

        return self.norm(jax.lax.scan(jax.checkpoint(apply) if self.remat else apply, x, layers)[0])


def rotated(
    x: Float[Array, "rows context heads size"], positions: Int[Array, "rows context"]
) -> Float[Array, "rows context heads size"]:
    """Rotary positions (Su et al., 2021): pairs of numbers turned by angles ∝ the position."""
    half = x.shape[-1] // 2
    speeds = _ROTATION ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = positions[:, :, None, None].astype(jnp.float32) * speeds[None, None, None]
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = (part.astype(jnp.float32) for part in jnp.split(x, 2, axis=-1))
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1).astype(x.dtype)


def drawn(shape: Shape, seed: int) -> dict[str, Any]:
    """First parameters, float32, as nested dictionaries of arrays."""
    model = Transformer(shape, nnx.Rngs(seed))
    return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def with_parameters(shape: Shape, params: dict[str, Any]) -> Transformer:
    """The model with these parameters, arrays or tracers."""
    graph, state = nnx.split(nnx.eval_shape(lambda: Transformer(shape, nnx.Rngs(0))))
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def is_matrix(name: str) -> bool:
    """Whether the parameter of this name is a matrix, or one of each layer."""
    return name in ("embedding", "kernel")


def by_name(function: Callable[[str, jax.Array], Any], params: dict[str, Any]) -> dict[str, Any]:
    """`function` of the last part of each parameter's name, and of the parameter."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(path[-1].key, leaf), params)


def specs(params: dict[str, Any]) -> dict[str, Any]:
    """How they are split: the embedding's rows over `vocab`, all matrices over `fsdp`."""

    def of(name: str, _: jax.Array) -> PartitionSpec:
        if name == "embedding":
            return PartitionSpec(VOCAB, FSDP)
        return PartitionSpec(None, FSDP) if is_matrix(name) else PartitionSpec()

    return by_name(of, params)


@partial(nnx.vmap, in_axes=(None, 0))
def _stacked(shape: Shape, key: PRNGKeyArray) -> Block:
    return Block(shape, nnx.Rngs(key))


def _linear(shape: Shape, inputs: int, outputs: int, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        dtype=jnp.dtype(shape.dtype),
        kernel_init=nnx.initializers.normal(0.5 * inputs**-0.5),
        rngs=rngs,
    )


def _norm(shape: Shape, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(shape.width, dtype=jnp.dtype(shape.dtype), rngs=rngs)
