# SPDX-License-Identifier: Apache-2.0
"""`python -m bench report`: from committed results to the tables and figures of README and docs."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any

import matplotlib as mpl
import typer
from matplotlib.figure import Figure

from bench import (
    accuracy,
    accuracy_tables,
    calibration,
    divergence_accuracy,
    environment,
    memory,
    results,
    sharding,
    speed_tables,
    summary,
    targets,
)
from bench.cases import Dtype, Labels, Op
from bench.summary import Row
from bench.tables import Table, say
from jaxsoftmax.training.tpu import cycles

README = environment.ROOT / "README.md"
SHARDING = environment.ROOT / "docs" / "guides" / "sharding.md"
BENCHMARKS = environment.ROOT / "docs" / "benchmarks.md"
FIGURES_FOLDER = environment.ROOT / "docs" / "figures"

ACCURACY = accuracy.KEY.format(Labels.INTEGER)
OF_DIVERGENCES = accuracy.KEY.format(Op.DIVERGENCE)
SPEED_BY_MODEL = (
    "speed --op linear --tokens 512 --hidden 256 --dtype float32 --model all --mode value-and-grad"
)
SPEED_OF_MODELS = (
    "speed --op linear --dtype bfloat16 --model llama-3 --model gemma-2 --model gemma-3 "
    "--mode value-and-grad"
)
SPEED_OF_IGNORED = "speed --op linear --ignored 0 --ignored 0.5 --ignored 0.9"
SPEED_OF_LLAMA = "speed --dtype bfloat16 --model llama-3"
MEMORY_BY_MODEL = "memory --target v5e --tokens 8192 --hidden 2304 --dtype bfloat16 --model all"
ON_TPUS = f"speed {' '.join(f'--target {target}' for target in cycles.CHIPS)}"
HEADS_ON_TPUS = f"speed --op linear{ON_TPUS.removeprefix('speed')}"
DIVERGENCES_ON_TPUS = f"speed --op divergence{ON_TPUS.removeprefix('speed')}"
TWO_HEADS_ON_TPUS = f"speed --op linear-divergence{ON_TPUS.removeprefix('speed')}"
ESTIMATES = {op: targets.KEY.format(op) for op in Op}

Files = Sequence[dict[str, Any]]  # the sections of each device's results file
# What stands in a block, of all files. Other sections (other labels, dtypes) stay in the files.
Block = Callable[[Files], str]
Blocks = dict[str, Block]


Layouts = dict[str, tuple[str, Callable[[dict[str, Any]], Iterable[Table]]]]


def _of_commands(layouts: Layouts) -> Blocks:
    """Blocks by command: the section of a results file, and the function that lays it out."""
    return {name: _of_devices(name, *layout) for name, layout in layouts.items()}


def _of_devices(name: str, key: str, lay_out: Callable[[dict[str, Any]], Iterable[Table]]) -> Block:
    """The tables of every device whose file has the section."""

    def block(files: Files) -> str:
        sections, parts = sections_of(files, key, name), []
        for section in sections:
            if len(sections) > 1:
                parts.append(f"**{section['environment']['device']}**")
            parts += [table.markdown() for table in lay_out(section)]
        return "\n\n".join(parts)

    return block


# README's rows: heads whose memory and time are shown, and logits whose time is.
OF_LLAMA = "4096x4096x128256", Dtype.BFLOAT16
HEADS = (
    Row("speed/linear", "2048x768x50257", Dtype.FLOAT32, "cpu"),
    Row("speed/linear", "2048x512x131072", Dtype.BFLOAT16, "cpu"),
    Row("speed/linear", "2048x512x131072", Dtype.BFLOAT16, "gpu"),
    Row(SPEED_OF_MODELS, *OF_LLAMA, "gpu"),
    Row(ESTIMATES[Op.LINEAR], "8192x2304x256000", Dtype.BFLOAT16, "v5e"),
    Row(ESTIMATES[Op.LINEAR], *OF_LLAMA, "v5p"),
)
LOGITS_AND_HEADS = (
    Row("speed/integer", "4096x50257", Dtype.FLOAT32, "cpu"),
    HEADS[0],
    Row("speed/integer", "4096x50257", Dtype.FLOAT32, "gpu"),
    HEADS[3],
    Row(ESTIMATES[Op.LOGITS], "4096x128256", Dtype.BFLOAT16, "v5p"),
    HEADS[5],
)

DOCUMENTS: dict[Path, Blocks] = {
    README: _of_commands({"accuracy": (ACCURACY, accuracy_tables.in_readme)})
    | {
        "memory of heads": lambda files: summary.memory(files, HEADS).markdown(),
        "time": lambda files: summary.time(files, LOGITS_AND_HEADS).markdown(),
    },
    SHARDING: _of_commands(
        {
            key: (key, sharding.in_docs)
            for key in (
                "memory --mesh v5e:2x4/data=4,vocab=2 --mesh v5e:4x4/data=4,vocab=4 "
                "--tokens 8192 --hidden 1024 --vocab 131072 --dtype bfloat16",
                "memory --mesh v5p:4x4x4/data=16,vocab=4 "
                "--tokens 1048576 --hidden 8192 --vocab 1048576 --dtype bfloat16",
                "memory --mesh v5p:8x8x8/data=64,vocab=8 "
                "--tokens 1048576 --hidden 8192 --vocab 262144 --dtype bfloat16",
            )
        }
    ),
    BENCHMARKS: _of_commands(
        {
            "speed": ("speed/integer", speed_tables.logits_in_docs),
            "speed --confident": ("speed/confident", speed_tables.ratios),
            SPEED_OF_LLAMA: (SPEED_OF_LLAMA, speed_tables.ratios),
            "speed --op linear": ("speed/linear", speed_tables.heads_in_docs),
            SPEED_BY_MODEL: (SPEED_BY_MODEL, speed_tables.heads_in_docs),
            SPEED_OF_MODELS: (SPEED_OF_MODELS, speed_tables.heads_in_docs),
            SPEED_OF_IGNORED: (SPEED_OF_IGNORED, speed_tables.ignored_in_docs),
            "speed --op divergence": ("speed/divergence", speed_tables.of_divergences),
            "speed --op linear-divergence": (
                "speed/linear-divergence",
                speed_tables.of_divergences,
            ),
            DIVERGENCES_ON_TPUS: (ESTIMATES[Op.DIVERGENCE], targets.in_docs),
            TWO_HEADS_ON_TPUS: (ESTIMATES[Op.LINEAR_DIVERGENCE], targets.in_docs),
            HEADS_ON_TPUS: (ESTIMATES[Op.LINEAR], targets.heads_in_docs),
            ON_TPUS: (ESTIMATES[Op.LOGITS], targets.in_docs),
            "speed --calibrate": (calibration.KEY, calibration.in_docs),
            "memory": (memory.KEY, memory.in_docs),
            MEMORY_BY_MODEL: (MEMORY_BY_MODEL, memory.in_docs),
            "memory --peak": (memory.PEAK_KEY, memory.peaks_in_docs),
            "accuracy": (ACCURACY, accuracy_tables.in_docs),
            "accuracy --op divergence": (OF_DIVERGENCES, divergence_accuracy.in_docs),
        }
    ),
}

# The figures of docs/figures by name: the section, and the function that draws it.
FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], Figure]]] = {
    "speed_vocabulary": (SPEED_BY_MODEL, speed_tables.figure),
    "cycles_memory": (ESTIMATES[Op.LINEAR], targets.figure),
    "memory_vocabulary": (MEMORY_BY_MODEL, memory.figure),
    "accuracy": (ACCURACY, accuracy_tables.figure),
    "accuracy_offsets": (ACCURACY, accuracy_tables.figure_of_offsets),
    "accuracy_divergence": (OF_DIVERGENCES, divergence_accuracy.figure),
}


def command(
    *,
    check: Annotated[
        bool,
        typer.Option(
            "--check", metavar="", help="Write nothing; exit with 1 if a document differs."
        ),
    ] = False,
) -> None:
    """Write tables and figures of README and docs from the committed results, `bench/results`.

    Of a document, only what stands between the markers of a block is replaced.
    """
    files = committed()
    for path, blocks in DOCUMENTS.items():
        try:
            before = path.read_text(encoding="utf-8")
            after = render(before, files, blocks)
        except (OSError, ValueError) as error:
            say(f"{error}")
            raise typer.Exit(1) from None
        if before == after:
            say(f"up to date: {path}")
        elif check:
            say(f"differs from bench/results: {path}; run python -m bench report")
            raise typer.Exit(1)
        else:
            path.write_text(after, encoding="utf-8")
            say(f"written: {path}")
    if not check:
        draw(files)


def draw(files: Files) -> None:
    """Draw every figure, of the first device that has its section, as PNG and as SVG."""
    for stem, (key, figure) in FIGURES.items():
        section = sections_of(files, key, key)[0]
        # The same results give the same files.
        with mpl.rc_context({"svg.hashsalt": stem}):
            drawn = figure(section)
            drawn.savefig(FIGURES_FOLDER / f"{stem}.png", dpi=120, metadata={"Software": None})
            drawn.savefig(FIGURES_FOLDER / f"{stem}.svg", metadata={"Date": None})
        say(f"drawn: {FIGURES_FOLDER / stem}.png and .svg")


def committed() -> list[dict[str, Any]]:
    """Read every device's results file, in the order of their names."""
    return [results.load(path) for path in sorted(results.COMMITTED.glob("*.json"))]


def render(text: str, files: Files, blocks: Blocks) -> str:
    """Replace every block of a document.

    A block without a line stays so until the files have what it shows.

    Raises:
        ValueError: no file has what a block shows, or a marker is not there exactly once.
    """
    for name, block in blocks.items():
        try:
            content = block(files)
        except ValueError:
            if replace(text, name, None) != text:
                raise
        else:
            text = replace(text, name, content)
    return text


def sections_of(files: Files, key: str, name: str) -> list[dict[str, Any]]:
    """Find the section that a command measures in the files of all devices.

    Raises:
        ValueError: no file has it.
    """
    found = [file[key] for file in files if key in file]
    if not found:
        raise ValueError(f"no {key} in bench/results: run python -m bench {name}")
    return found


def replace(text: str, name: str, content: str | None) -> str:
    """Put `content` between a block's markers; None for no line at all.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    begin, end = f"<!-- bench report: {name} -->", f"<!-- /bench report: {name} -->"
    before, _, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not closed or text.count(begin) > 1 or text.count(end) > 1:
        raise ValueError(f"expected once each, in this order: {begin} and {end}")
    inside = "" if content is None else f"{content}\n"
    return f"{before}{begin}\n{inside}{end}{after}"
