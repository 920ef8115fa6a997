# SPDX-License-Identifier: Apache-2.0
"""The commands `train-lm`, `evaluate` and `generate`."""

import dataclasses
import enum
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from jaxsoftmax.training import checks, commands
from jaxsoftmax.training.errors import ProgramError
from jaxsoftmax.training.language.options import SIZES, Dtype, Head, Options, Size

if TYPE_CHECKING:
    from jaxsoftmax.training.language.generate import Writer

_SIZES = "; ".join(
    f"[bold]{name}[/] {s.width} wide, {s.layers} layers, {s.heads} heads, context {s.context}"
    for name, s in SIZES.items()
)


class Named(enum.StrEnum):
    """A size by name."""

    TINY = "tiny"
    SMALL = "small"
    MEDIUM = "medium"
    LARGE = "large"


class Target(enum.StrEnum):
    """A generation of TPU to compile for."""

    V5E = "v5e"
    V5P = "v5p"
    V6E = "v6e"


_TEXT = typer.Option(
    "--text",
    metavar="PATH",
    help="Text to evaluate on instead: a file, a folder or a pattern such as "
    "[bold]'docs/**/*.md'[/]; repeatable.",
    show_default=False,
)


def train_lm(  # noqa: PLR0917 - typer makes each one an option
    context_of_command: typer.Context,
    text: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATH",
            help="UTF-8 text: a file, a folder or a pattern such as [bold]'docs/**/*.md'[/]; "
            "repeatable. A tenth of the files, by a hash of their names, is held out. Default: "
            "Python's own standard library.",
            show_default=False,
        ),
    ] = None,
    mask_comments: Annotated[
        bool,
        typer.Option(
            "--mask-comments",
            metavar="",
            help="For text that is Python: what stands in comments is not predicted, and the head "
            "skips it.",
        ),
    ] = False,
    output: commands.Output = Path("runs/train-lm"),
    resume: Annotated[
        bool, commands.resume_option("--text (of the same contents), --mesh")
    ] = False,
    size: Annotated[
        Named,
        typer.Option(
            help=f"The model's size: {_SIZES}. --width, --layers, --heads and --context change "
            "one number of it."
        ),
    ] = Named.TINY,
    width: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Width of the hidden states: a multiple of twice --heads. Default: by --size.",
            show_default=False,
        ),
    ] = None,
    layers: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Number of layers, each attention and an MLP. Default: by --size.",
            show_default=False,
        ),
    ] = None,
    heads: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Number of attention heads in a layer. Default: by --size.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="The most tokens that the model sees at once, the length of a row. Default: by "
            "--size.",
            show_default=False,
        ),
    ] = None,
    vocab: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Number of different tokens, at least 257: a byte-level BPE trained on the text.",
        ),
    ] = 16384,
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="What the model computes in: auto is float32 on a CPU, else bfloat16. Parameters "
            "are float32."
        ),
    ] = Dtype.AUTO,
    remat: Annotated[
        bool,
        typer.Option(
            "--remat",
            metavar="",
            help="Compute each layer again on the way back: less memory, a third more time.",
        ),
    ] = False,
    head: Annotated[
        Head,
        typer.Option(
            help="fused: this library's, the logits are never held; recompute: its other order, "
            "with less memory still; plain: optax on all logits. The same numbers to rounding."
        ),
    ] = Head.FUSED,
    steps: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Steps of the optimizer. The learning rate decays over them, so a run cannot be "
            "made longer later.",
        ),
    ] = 300,
    batch_size: Annotated[
        int, typer.Option("--batch-size", "-b", metavar="N", help="Rows of tokens in one step.")
    ] = 16,
    accumulate: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Go over a batch in so many parts, one after the other: less memory. It divides "
            "--batch-size.",
        ),
    ] = 1,
    learning_rate: commands.LearningRate = 2e-3,
    warmup: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Steps until the learning rate is reached, fewer than --steps; then it decays to "
            "a tenth, along a cosine. Default: a tenth of --steps.",
            show_default=False,
        ),
    ] = None,
    weight_decay: Annotated[
        float,
        typer.Option(metavar="RATE", help="AdamW's decay of the model's matrices; 0 for none."),
    ] = 0.1,
    clip: Annotated[
        float,
        typer.Option(
            metavar="NORM", help="A gradient whose norm is larger is scaled down to this norm."
        ),
    ] = 1.0,
    eval_every: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Steps from one evaluation to the next. Each writes a line of metrics and a "
            "checkpoint; the last three checkpoints and the best are kept.",
        ),
    ] = 50,
    eval_tokens: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="About how many held-out tokens an evaluation looks at. [bold]jaxsoftmax "
            "evaluate[/] looks at all.",
        ),
    ] = 32768,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N",
            help="Seed of the first weights, the order of the text and the text shown at the end. "
            "The held-out split does not depend on it.",
        ),
    ] = 0,
    prompt: Annotated[
        str, typer.Option(metavar="TEXT", help="What the text shown at the end begins with.")
    ] = "def ",
    mesh: Annotated[
        str | None,
        typer.Option(
            metavar="AXES",
            help="Use all devices, such as [bold]data=2,fsdp=2,vocab=2[/] for eight: data splits "
            "every batch, fsdp the batch and the parameters, vocab the classes of the head. The "
            "numbers stay the same to rounding. Default: data over all devices of several "
            "processes, else one device.",
            show_default=False,
        ),
    ] = None,
    coordinator: commands.Coordinator = None,
    processes: commands.Processes = None,
    process_id: commands.ProcessId = None,
    compare_heads: Annotated[
        bool,
        typer.Option(
            "--compare-heads",
            metavar="",
            help="Train nothing: show memory and speed of this model's step with each head.",
        ),
    ] = False,
    target: Annotated[
        list[Target] | None,
        typer.Option(
            help="With --compare-heads: compile for a TPU instead, none is needed; repeatable.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Train a small language model on text, through the linear head.

    A transformer learns to predict the next token; [bold]generate[/] writes text by it.

    Written: [bold]metrics.jsonl, loss.png, tokenizer.json, checkpoints/[/].
    """  # help keeps these line breaks
    of_size = SIZES[size.value]
    values = {
        "text": tuple(text or ()),
        "mask_comments": mask_comments,
        "vocab": vocab,
        "width": of_size.width if width is None else width,
        "layers": of_size.layers if layers is None else layers,
        "heads": of_size.heads if heads is None else heads,
        "context": of_size.context if context is None else context,
        "dtype": dtype.value,
        "remat": remat,
        "head": head.value,
        "steps": steps,
        "batch_size": batch_size,
        "accumulate": accumulate,
        "learning_rate": learning_rate,
        "warmup": steps // 10 if warmup is None else warmup,
        "weight_decay": weight_decay,
        "clip": clip,
        "eval_every": eval_every,
        "eval_tokens": eval_tokens,
        "seed": seed,
    }
    if not resume:
        Options(**values)  # a mistake should not wait for JAX
    _check_prompt(prompt)
    if target and not compare_heads:
        raise ProgramError("--target goes with --compare-heads")
    sizes = None if mesh is None else commands.as_axes(mesh, ("data", "fsdp", "vocab"))
    place = commands.as_place(coordinator, processes, process_id)

    if compare_heads:
        if mesh is not None or place is not None or resume:
            raise ProgramError(
                "--compare-heads: on one device, without --mesh, --coordinator and --resume"
            )
        _compare(Options(**values), [one.value for one in target or ()])
        return
    from jaxsoftmax.training.language.task import LANGUAGE_MODEL  # noqa: PLC0415

    given = {*commands.names_given(context_of_command, [*values, "size"])}
    if "size" in given:
        given |= {*Size._fields}
    given.discard("size")
    if dtype == Dtype.AUTO:  # of a run: its own
        given.discard("dtype")
    result = commands.trained(
        LANGUAGE_MODEL,
        values,
        given,
        output,
        resume=resume,
        mesh=sizes,
        place=place,
        status=_status,
    )
    if result is not None:
        _show(result, output, prompt)


def _check_prompt(prompt: str) -> None:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ProgramError(f"--prompt must be UTF-8 text; got {prompt!r}") from error


def _status(metrics: Mapping[str, float]) -> str:
    held_out = ""
    if "test_loss" in metrics:
        held_out = (
            f", held out {metrics['test_loss']:.4f} ({metrics['test_bits_per_byte']:.3f} bits per "
            f"byte), accuracy {metrics['test_accuracy']:.2%}"
        )
    rate = metrics["tokens_per_second"]
    return f"loss {metrics['train_loss']:.4f}{held_out}, {rate:,.0f} tokens/s"


_ROWS = (
    ("held-out loss, nats a token", "test_loss", "{:.4f}"),
    ("perplexity", "test_perplexity", "{:,.1f}"),
    ("bits per byte", "test_bits_per_byte", "{:.3f}"),
    ("accuracy of the next token", "test_accuracy", "{:.2%}"),
)


def _show(result: Any, output: Path, prompt: str) -> None:
    from jaxsoftmax.training.language.generate import Writer  # noqa: PLC0415
    from jaxsoftmax.training.language.task import LANGUAGE_MODEL  # noqa: PLC0415

    options, data = result.inputs.options, result.inputs.data
    commands.show_table(
        "Next token",
        LANGUAGE_MODEL,
        result,
        (("step", "step", "{}"), ("training loss", "train_loss", "{:.4f}"), *_ROWS),
    )
    train, held_out = data.train, data.held_out
    print(f"unigram   held-out loss {result.task.unigram:.4f} nats: token frequencies alone")
    print(
        f"data      {result.inputs.source}: {_files(len(train.inputs))} and {train.counted:,} "
        f"tokens to train on, {len(held_out.inputs)} and {held_out.counted:,} held out, "
        f"{options.vocab} different ones"
    )
    _print_left_out(data.left_out)
    print(
        f"model     width {options.width}, {options.layers} layers, {options.heads} heads, context "
        f"{options.context}, {options.dtype}; {result.parameters:,} parameters"
    )
    print(
        f"training  {options.head} head, {options.steps} steps of {options.batch_size} rows, "
        f"learning rate {options.learning_rate:g}, seed {options.seed}; "
        f"{result.history[-1]['tokens_per_second']:,.0f} tokens/s; "
        f"{commands.resumed_words(result, 'step')}"
    )
    print(f"written   {output}: metrics.jsonl, loss.png, tokenizer.json, checkpoints/")
    writer = Writer.of_run(output, "best")
    print()
    _print_text(writer, prompt, count=80, temperature=0.7, top_k=40, seed=options.seed)


def _print_left_out(lines: list[str]) -> None:
    if lines:
        first, *others = lines
        print(f"left out  {first}" + (f", and {len(others)} more files" if others else ""))


def _files(count: int) -> str:
    return f"{count} file{'s' * (count != 1)}"


def _compare(options: "Options", targets: list[str]) -> None:
    import jax  # noqa: PLC0415

    from jaxsoftmax.training.language import compare, task  # noqa: PLC0415

    def show(where: str, costs: list[compare.Cost]) -> None:
        table = Table(title=f"A training step on {where}", title_justify="left")
        for heading in ("head", "memory (of plain)", "speed (of plain)"):
            table.add_column(heading, overflow="fold")
        for line in compare.rows(costs):
            table.add_row(*line)
        console.print(table)

    console = Console(highlight=False)
    if targets:
        dtype = "bfloat16" if options.dtype == Dtype.AUTO else options.dtype
        options = dataclasses.replace(options, dtype=dtype)
        for target in targets:
            show(
                f"one TPU {target}, by its compiler's account", [*compare.compiled(options, target)]
            )
    else:
        options = task.with_dtype(options)
        where = jax.devices()[0].device_kind
        show(f"{where}, medians of steps in turn", compare.measured(options))
    print(
        f"model  width {options.width}, {options.layers} layers, {options.vocab} classes, "
        f"{options.dtype}; {options.batch_size} rows of {options.context} tokens"
    )
    print(
        f"with   JAX {jax.__version__}, Python {platform.python_version()}, "
        f"{datetime.now(UTC).date()}"
    )


def evaluate(
    run: commands.Run,
    text: Annotated[list[str] | None, _TEXT] = None,
    checkpoint: commands.Which = "best",
) -> None:
    """Evaluate a run of [bold]train-lm[/] on all its held-out text, or on all of other text."""
    from jaxsoftmax.training.language.evaluation import of_run  # noqa: PLC0415

    found = of_run(run, tuple(text or ()), checkpoint)
    table = Table(title=f"Next token, after step {found.step}", title_justify="left")
    table.add_column(overflow="fold")
    table.add_column(justify="right", overflow="fold")
    for name, key, form in _ROWS:
        table.add_row(name, form.format(found.metrics[key]))
    Console(highlight=False).print(table)
    print(f"unigram   loss {found.unigram:.4f} nats: token frequencies of the training text alone")
    print(f"data      {found.source}: {_files(found.files)}, {found.labels:,} tokens")
    _print_left_out(found.left_out)


def generate(  # noqa: PLR0917 - typer makes each one an option
    run: commands.Run,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What the text begins with.")] = "",
    tokens: Annotated[int, typer.Option(metavar="N", help="The most tokens to write.")] = 200,
    temperature: Annotated[
        float,
        typer.Option(
            metavar="T", help="Below 1 tokens that are likely become likelier, above 1 the others."
        ),
    ] = 0.7,
    top_k: Annotated[
        int | None,
        typer.Option(
            metavar="K", help="Draw from the K most likely tokens only.", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Seed of the text: another number, another text.")
    ] = 0,
    checkpoint: commands.Which = "best",
) -> None:
    """Write text by a run of [bold]train-lm[/]: the prompt and what follows."""
    checks.whole_number("tokens", tokens, 1)
    checks.whole_number("top_k", 1 if top_k is None else top_k, 1)
    if not 1e-6 <= temperature <= 1e6:
        raise ProgramError(f"--temperature must be from 1e-6 to 1e6; got {temperature:g}")
    checks.seed(seed)
    _check_prompt(prompt)
    from jaxsoftmax.training.language.generate import Writer  # noqa: PLC0415

    writer = Writer.of_run(run, checkpoint)
    if top_k is not None and top_k > writer.options.vocab:
        raise ProgramError(
            f"--top-k must be at most the run's {writer.options.vocab} tokens; got {top_k}"
        )
    _print_text(writer, prompt, count=tokens, temperature=temperature, top_k=top_k, seed=seed)


def _print_text(writer: "Writer", prompt: str, **how: Any) -> None:
    """The prompt and what follows it, as it is drawn."""
    print(prompt, end="", flush=True)
    for part in writer.after(prompt, **how):
        print(part, end="", flush=True)
    print()
