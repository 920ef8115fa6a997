# SPDX-License-Identifier: Apache-2.0
"""`python -m bench`: one command per question."""

import typer

from bench import accuracy, memory, report, speed

app = typer.Typer(
    name="python -m bench",
    help="What softmax cross-entropy costs on this device, and how exact it is: ours, optax and "
    "jax.nn side by side. A package that is not installed is left out, with a line saying so.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
COMMANDS = {
    "speed": speed.command,
    "memory": memory.command,
    "accuracy": accuracy.command,
    "report": report.command,
}
for name, command in COMMANDS.items():
    app.command(name)(command)

if __name__ == "__main__":
    app()
