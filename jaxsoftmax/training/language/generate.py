# SPDX-License-Identifier: Apache-2.0
"""Text, token by token: each drawn by `jaxsoftmax.linear_sample`, without the logits."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray
from tokenizers import Tokenizer

import jaxsoftmax
from jaxsoftmax.training.language import model
from jaxsoftmax.training.language.options import Options, Shape
from jaxsoftmax.training.language.task import read_run
from jaxsoftmax.training.language.tokens import END

_NO_CHARACTER = "\N{REPLACEMENT CHARACTER}"  # what bytes that make none are decoded to


@partial(jax.jit, static_argnames=("shape", "top_k"))
def next_token(
    params: dict,
    window: Int[Array, " context"],
    length: Int[Array, ""],
    key: PRNGKeyArray,
    temperature: Float[Array, ""],
    *,
    shape: Shape,
    top_k: int | None,
) -> Int[Array, ""]:
    """One token, drawn after the first `length` tokens of a window."""
    network = model.with_parameters(shape, params)
    positions = jnp.arange(len(window), dtype=jnp.int32)[None]
    segments = (positions < length).astype(jnp.int32)
    hidden = network(window[None], segments, positions)[0, length - 1]
    return jaxsoftmax.linear_sample(
        key,
        hidden,
        network.embedding[...],
        top_k=top_k,
        temperature=temperature,
        transpose_kernel=True,
        compute_dtype=hidden.dtype,
    ).labels


class Writer(NamedTuple):
    """A trained model that writes."""

    options: Options
    params: dict
    tokenizer: Tokenizer

    @classmethod
    def of_run(cls, run: Path, which: str) -> "Writer":
        """From the folder of a run."""
        trained = read_run(run, which)
        return cls(trained.options, jax.device_put(trained.params), trained.tokenizer)

    def after(
        self, prompt: str, *, count: int, temperature: float, top_k: int | None, seed: int
    ) -> Iterator[str]:
        """Up to `count` tokens of text after the prompt, or up to the end of a document.

        Each is drawn from all tokens that fit in the context, computed anew: the oldest leave
        first. It comes as text when its characters are whole.
        """
        context, key = self.options.context, jax.random.key(seed)
        recent = [END, *self.tokenizer.encode(prompt).ids][-context:]
        pending: list[int] = []  # what may end within a character
        for number in range(count):
            window = np.zeros(context, np.int32)
            window[: len(recent)] = recent
            token = int(
                next_token(
                    self.params,
                    window,
                    np.int32(len(recent)),
                    jax.random.fold_in(key, number),
                    np.float32(temperature),
                    shape=self.options.shape,
                    top_k=top_k,
                )
            )
            if token == END:
                break
            recent = [*recent, token][-context:]
            pending.append(token)
            part = self.tokenizer.decode(pending)
            if not part.endswith(_NO_CHARACTER):
                yield part
                pending = []
        yield self.tokenizer.decode(pending)
