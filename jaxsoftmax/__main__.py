# SPDX-License-Identifier: Apache-2.0
"""The command `jaxsoftmax`, also `python -m jaxsoftmax`."""

import importlib.util
import os
import signal
import sys

import jax

import jaxsoftmax

_EXTRA = ("matplotlib", "optax", "orbax.checkpoint", "rich", "sklearn", "typer")


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # the parent of a dotted name is absent
        return False


def _leave(*_: object) -> None:
    print("jaxsoftmax: interrupted before anything was written", file=sys.stderr, flush=True)
    os._exit(130)


def main() -> int:
    """Runs the command line and returns its exit code."""
    arguments = sys.argv[1:]
    # Answered before anything of the extra is needed.
    if arguments == ["--version"]:
        print(f"jaxsoftmax {jaxsoftmax.__version__}")
        return 0
    missing = [module for module in _EXTRA if not _installed(module)]
    if missing:
        print(
            f"jaxsoftmax: the program needs {', '.join(missing)}; "
            "install with: pip install 'jaxsoftmax[train]'",
            file=sys.stderr,
        )
        return 2
    # Some imports swallow a KeyboardInterrupt, and the program would go on; until training
    # starts (cli.train puts Python's own handler back) nothing needs cleaning up.
    signal.signal(signal.SIGINT, _leave)
    try:
        from jaxsoftmax.training.cli import run  # noqa: PLC0415 - needs the extra

        code = run(arguments)
        if code and jax.distributed.is_initialized():
            # JAX's own exit would wait for the other processes of the run, and they for this one.
            sys.stdout.flush()
            os._exit(code)
        return code
    except KeyboardInterrupt:
        print("jaxsoftmax: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
