# SPDX-License-Identifier: Apache-2.0
"""What each head makes of a model's whole step: tokens a second, memory, and cycles on TPUs."""

import re
import time
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxsoftmax.training.errors import ProgramError, is_out_of_memory
from jaxsoftmax.training.language import model, task
from jaxsoftmax.training.language.batches import Batch
from jaxsoftmax.training.language.options import Options
from jaxsoftmax.training.language.step import HEADS, step
from jaxsoftmax.training.mesh import make_mesh
from jaxsoftmax.training.run import State
from jaxsoftmax.training.tpu import tpus
from jaxsoftmax.training.tpu.cycles import CHIPS, account

_ROUNDS = 7
# Of a program that is too large for its chip, two wordings.
_NEEDED = re.compile(
    r"Used ([\d.]+[KMG]) of ([\d.]+[KMG])|\(([\d.]+[KMG])\) exceeds available HBM \(([\d.]+[KMG])\)"
)


class Cost(NamedTuple):
    """A step with one of the heads; None is what is not known."""

    head: str
    gigabytes: float | None  # parameters, optimizer, and all that the step holds at once
    tokens_per_second: float | None
    cycles: float | None
    note: str = ""


def measured(options: Options) -> list[Cost]:
    """Steps of every head in turn, on this machine's first device; the median of each."""
    inputs = task.read(options, None)
    trained = task.LanguageModel(inputs, make_mesh(None, task.LANGUAGE_MODEL.axes))
    batches = [trained.next_parts() for _ in range(_ROUNDS + 1)]
    arguments = {"optimizer": trained.optimizer, "shape": inputs.options.shape}
    programs: dict[str, Any] = {}
    rates, notes = {head: [] for head in HEADS}, {}

    def try_step(head: str, state: State, batch: Batch) -> State:
        """The state after it; a new one where there is not enough memory, and a note."""
        try:
            if head not in programs:
                programs[head] = step.lower(state, batch, head=head, **arguments).compile()
            state, loss = programs[head](state, batch)
            loss.block_until_ready()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            notes[head] = "does not fit: " + str(error).partition("\n")[0]
            if any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
                return first_state(inputs.options, trained.optimizer)
        return state

    state = trained.initial  # one for all: how long a step takes does not depend on its numbers
    with jax.set_mesh(trained.mesh):
        for batch, counted in batches:
            for head in HEADS:
                begin = time.perf_counter()
                if head not in notes:
                    state = try_step(head, state, batch)
                    rates[head].append(counted / (time.perf_counter() - begin))
    return [
        Cost(head, None, None, None, notes[head])
        if head in notes
        else Cost(head, held(programs[head]), median(rates[head][1:]), None)  # the first compiles
        for head in HEADS
    ]


def compiled(options: Options, target: str) -> Iterator[Cost]:
    """The step of every head as the compiler for one TPU of a generation has it.

    Raises:
        ProgramError: there is no such compiler here.
    """
    chip = CHIPS[target]
    try:
        device = tpus(chip.topology)[0]
    except Exception as error:  # libtpu absent, or it does not know the topology
        reason = str(error).splitlines()[0]
        raise ProgramError(
            f"--target {target}: no compiler for it ({reason}); install with: pip install "
            "'jaxsoftmax[tpu]'"
        ) from error
    mesh = jax.make_mesh(
        (1,) * 3, task.LANGUAGE_MODEL.axes, (jax.sharding.AxisType.Auto,) * 3, devices=[device]
    )
    optimizer = task.optimizer(options)
    rows = options.accumulate, options.batch_size // options.accumulate, options.context
    # What is drawn has its shape only: it may be larger than this machine.
    state = jax.eval_shape(lambda: first_state(options, optimizer))
    place = NamedSharding(mesh, PartitionSpec())
    state, batch = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place),
        (state, Batch(*[jax.ShapeDtypeStruct(rows, jnp.int32)] * 4)),
    )
    for head in HEADS:
        with jax.set_mesh(mesh):
            traced = step.trace(state, batch, optimizer=optimizer, shape=options.shape, head=head)
        try:
            program = traced.lower(lowering_platforms=("tpu",)).compile()
        except jax.errors.JaxRuntimeError as error:
            found = _NEEDED.search(str(error))
            if not found:
                raise
            needed, there = filter(None, found.groups())
            note = f"does not fit: {needed}B of temporaries, {there}B there"
            yield Cost(head, None, None, None, note)
            continue
        text, gigabytes = program.as_text() or "", held(program)
        fits = gigabytes is None or gigabytes <= chip.gigabytes
        note = "" if fits else f"does not fit in {chip.gigabytes:g} GB"
        yield Cost(head, gigabytes, None, account(text, chip, counted=1.0).cycles, note)


def first_state(options: Options, optimizer: Any) -> State:
    """What training begins with."""
    params = model.drawn(options.shape, options.seed)
    return State(params, optimizer.init(params))


def held(program: Any) -> float | None:
    """All that a compiled program holds at once, in 1e9 bytes."""
    found = program.memory_analysis()
    if found is None:
        return None
    arguments_and_results = (
        found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    )
    return (arguments_and_results + found.temp_size_in_bytes) / 1e9


def rows(costs: Sequence[Cost]) -> list[tuple[str, ...]]:
    """A line of the table each, and how each compares with all logits."""
    plain = next(cost for cost in costs if cost.head == "plain")
    lines = []
    for cost in costs:
        memory = "" if cost.gigabytes is None else f"{cost.gigabytes:.3g} GB"
        if cost.gigabytes and plain.gigabytes:
            memory += f" ({cost.gigabytes / plain.gigabytes:.2f})"
        speed = ""
        if cost.tokens_per_second:
            speed = f"{cost.tokens_per_second:,.0f} tokens/s"
            if plain.tokens_per_second:
                speed += f" ({cost.tokens_per_second / plain.tokens_per_second:.2f})"
        elif cost.cycles:
            speed = f"{cost.cycles / 1e6:,.1f} Mcycles"
            if plain.cycles:
                speed += f" ({cost.cycles / plain.cycles:.2f})"
        lines.append((cost.head, ", ".join(filter(None, (memory, cost.note))), speed))
    return lines
