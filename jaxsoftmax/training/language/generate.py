# SPDX-License-Identifier: Apache-2.0
"""Text, token by token: each drawn by `jaxsoftmax.linear_sample`, without the logits."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray
from tokenizers import Tokenizer

import jaxsoftmax
from jaxsoftmax.training.language import model
from jaxsoftmax.training.language.task import Options, read_run
from jaxsoftmax.training.language.tokens import END


@partial(jax.jit, static_argnames=("shape", "context", "count", "top_k"))
def continued(
    params: dict,
    prompt: Int[Array, " context"],
    length: Int[Array, ""],
    key: PRNGKeyArray,
    *,
    temperature: float,
    shape: model.Shape,
    context: int,
    count: int,
    top_k: int | None,
) -> Int[Array, " count"]:
    """Up to `count` tokens after the first `length` of a prompt; END after the end of the document.

    Each is drawn from all tokens that fit in `context`, computed anew: the oldest leave first.
    """
    network = model.with_parameters(shape, params)
    embedding = network.embedding[...]
    positions = jnp.arange(context, dtype=jnp.int32)[None]

    def goes_on(carry):
        i, *_, ended = carry
        return (i < count) & ~ended

    def draw(carry):
        i, window, length, drawn, _ = carry
        segments = (positions < length).astype(jnp.int32)
        hidden = network(window[None], segments, positions)[0, length - 1]
        token = jaxsoftmax.linear_sample(
            jax.random.fold_in(key, i),
            hidden,
            embedding,
            top_k=top_k,
            temperature=temperature,
            transpose_kernel=True,
            compute_dtype=hidden.dtype,
        ).labels
        full = length == context
        window = jnp.where(full, jnp.roll(window, -1), window)
        at = jnp.where(full, context - 1, length)
        length = jnp.minimum(length + 1, context)
        return i + 1, window.at[at].set(token), length, drawn.at[i].set(token), token == END

    drawn = jnp.full(count, END, jnp.int32)
    first = jnp.int32(0), prompt, length, drawn, jnp.bool_(False)
    return jax.lax.while_loop(goes_on, draw, first)[3]


class Writer(NamedTuple):
    """A trained model that writes."""

    options: Options
    params: dict
    tokenizer: Tokenizer

    @classmethod
    def of_run(cls, run: Path, which: str) -> "Writer":
        """From the folder of a run."""
        trained = read_run(run, which)
        return cls(trained.options, trained.params, trained.tokenizer)

    def after(
        self, prompt: str, *, count: int, temperature: float, top_k: int | None, seed: int
    ) -> str:
        """The prompt and up to `count` tokens after it, or up to the end of a document."""
        context = self.options.context
        recent = [END, *self.tokenizer.encode(prompt).ids][-context:]
        window = np.zeros(context, np.int32)
        window[: len(recent)] = recent
        drawn = continued(
            self.params,
            window,
            np.int32(len(recent)),
            jax.random.key(seed),
            temperature=temperature,
            shape=self.options.shape,
            context=context,
            count=count,
            top_k=top_k,
        )
        new = [int(token) for token in drawn]
        new = new[: new.index(END)] if END in new else new
        return prompt + self.tokenizer.decode(new)
