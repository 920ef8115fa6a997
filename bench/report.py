# SPDX-License-Identifier: Apache-2.0
"""`python -m bench report`: from the committed results to tables and figures of README and docs."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import matplotlib
import typer
from matplotlib.figure import Figure

from bench import (
    accuracy,
    environment,
    head,
    memory,
    overtraining,
    results,
    sharding,
    speed,
    terminal,
)

README = environment.ROOT / "README.md"
SHARDING = environment.ROOT / "docs" / "sharding.md"
BENCHMARKS = environment.ROOT / "docs" / "benchmarks.md"
FIGURES_FOLDER = environment.ROOT / "docs" / "figures"

# A block of a document: the command behind it, its section of a results file, who lays it out.
# Other sections (other labels, other dtypes) stay in the files.
Blocks = dict[str, tuple[str, Callable[[dict[str, Any]], str]]]
BLOCKS: Blocks = {
    "accuracy": (accuracy.KEY.format("integer"), accuracy.as_markdown),
    "speed": ("speed/integer", speed.as_markdown),
    "speed --op linear": (head.KEY, head.as_markdown),
    "memory": ("memory", memory.as_markdown),
}
MESH_BLOCKS: Blocks = {
    f"memory --mesh --shape {shape}": (sharding.KEY.format(shape), sharding.as_markdown)
    for shape in ("8192x1024x131072:bfloat16", "1048576x8192x1048576:bfloat16")
}
BENCHMARKS_BLOCKS: Blocks = {
    "accuracy": (accuracy.KEY.format("integer"), accuracy.in_all_dtypes),
    "overtraining": (overtraining.KEY, overtraining.as_markdown),
}

# A figure of the docs, by the stem of its files: its section of a results file, who draws it.
FIGURES: dict[str, tuple[str, Callable[[dict[str, Any]], Figure]]] = {
    "accuracy": (accuracy.KEY.format("integer"), accuracy.figure),
    "accuracy_offsets": (accuracy.KEY.format("integer"), accuracy.figure_of_offsets),
    "overtraining": (overtraining.KEY, overtraining.figure),
}


def command(
    *,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; exit with 1 if a document differs.")
    ] = False,
) -> None:
    """Write tables and figures of README and docs from the committed `bench/results/*.json`.

    Of a document, only what stands between the markers of a block is replaced.
    """
    documents = (
        (README, BLOCKS),
        (SHARDING, MESH_BLOCKS),
        (BENCHMARKS, BENCHMARKS_BLOCKS),
    )
    for path, blocks in documents:
        try:
            before = path.read_text(encoding="utf-8")
            after = render(before, committed(), blocks)
        except (OSError, ValueError) as error:
            terminal.notes.print(f"{error}", markup=False)
            raise typer.Exit(1) from None
        if before == after:
            terminal.notes.print(f"up to date: {path}")
        elif check:
            terminal.notes.print(f"differs from bench/results: {path}; run python -m bench report")
            raise typer.Exit(1)
        else:
            path.write_text(after, encoding="utf-8")
            terminal.notes.print(f"written: {path}")
    if not check:
        draw(committed())


def draw(files: Sequence[dict[str, Any]]) -> None:
    """Write every figure as PNG and SVG, from the first file that has its section."""
    for stem, (key, figure) in FIGURES.items():
        for section in [file[key] for file in files if key in file][:1]:
            drawn = figure(section)
            for kind in ("png", "svg"):
                path = FIGURES_FOLDER / f"{stem}.{kind}"
                # The same numbers make the same file.
                with matplotlib.rc_context({"svg.hashsalt": stem}):
                    drawn.savefig(path, dpi=110, metadata={"Date": None})
                terminal.notes.print(f"written: {path}")


def committed() -> list[dict[str, Any]]:
    """Read every device's results file, in the order of their names."""
    return [results.load(path) for path in sorted(results.RESULTS.glob("*.json"))]


def render(text: str, files: Sequence[dict[str, Any]], blocks: Blocks = BLOCKS) -> str:
    """Replace every block of a document.

    Args:
        text: of the document.
        files: the contents of results files, one a device.
        blocks: the document's.

    Returns:
        The new text. Each block shows every device that has its section.

    Raises:
        ValueError: no file has a block's section, or the markers are not there once each.
    """
    for name, (key, as_markdown) in blocks.items():
        sections = [file[key] for file in files if key in file]
        if not sections:
            raise ValueError(f"no {key} in bench/results: run python -m bench {name}")
        parts = []
        for section in sections:
            if len(sections) > 1:
                parts.append(f"**{section['environment']['device']}**")
            parts.append(as_markdown(section))
        text = replace(text, name, "\n\n".join(parts))
    return text


def replace(text: str, name: str, content: str) -> str:
    """Put `content` between a block's markers.

    Raises:
        ValueError: the markers are not there once each, in order.
    """
    begin, end = f"<!-- bench report: {name} -->", f"<!-- /bench report: {name} -->"
    before, _, rest = text.partition(begin)
    _, closed, after = rest.partition(end)
    if not closed or text.count(begin) > 1 or text.count(end) > 1:
        raise ValueError(f"expected once each, in this order: {begin} and {end}")
    return f"{before}{begin}\n{content}\n{end}{after}"
