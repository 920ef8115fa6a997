# SPDX-License-Identifier: Apache-2.0
"""The command `jaxsoftmax`, outside the package because importing the package imports JAX.

Before that, Ctrl-C needs a handler of ours: Python's raises KeyboardInterrupt wherever the program
is, and native modules that are being imported crash on it or swallow it.
"""

# What Python has loaded before any program starts; everything else is imported under the handler.
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

# What the commands need, by the extra that has it.
_LINE = ("rich", "typer")
_RUN = (*_LINE, "matplotlib", "optax", "orbax.checkpoint")
_CLASSIFIER = ("train", (*_RUN, "sklearn"))
_LANGUAGE_MODEL = ("lm", (*_RUN, "flax", "grain", "tokenizers"))
_NEEDED = {
    "train": _CLASSIFIER,
    "predict": _CLASSIFIER,
    "train-lm": _LANGUAGE_MODEL,
    "evaluate": _LANGUAGE_MODEL,
    "generate": _LANGUAGE_MODEL,
}


def main() -> int:
    """Runs the command line and returns its exit code."""
    try:
        import signal  # noqa: PLC0415

        # Ignored, as in a background job of a shell, it stays ignored.
        if callable(signal.getsignal(signal.SIGINT)):
            signal.signal(signal.SIGINT, lambda *_: leave("jaxsoftmax: interrupted"))
    except KeyboardInterrupt:
        leave("jaxsoftmax: interrupted")
    # Closed outside, as by `>&-`, they are None.
    sys.stdout, sys.stderr = (
        stream or open(os.devnull, "w")  # noqa: SIM115
        for stream in (sys.stdout, sys.stderr)
    )
    return _run(sys.argv[1:])


def leave(line: str) -> "NoReturn":
    """Ends the program on Ctrl-C, wherever it is: one line on stderr and the exit code 130."""
    try:
        import signal  # noqa: PLC0415

        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one line, however often it is pressed
        import select  # noqa: PLC0415

        # Not into a full pipe: whoever does not read keeps nobody.
        if sys.platform == "win32" or select.select([], [2], [], 0)[1]:
            os.write(2, f"{line}\n".encode())
    finally:
        os._exit(130)


def _run(arguments: list[str]) -> int:
    # Answered before anything of the extra is needed.
    if arguments == ["--version"]:
        from importlib.metadata import version  # noqa: PLC0415

        print(f"jaxsoftmax {version('jaxsoftmax')}")
        return 0
    extra, modules = _NEEDED.get(next(iter(arguments), ""), ("train", _LINE))
    missing = [module for module in modules if not _installed(module)]
    if missing:
        print(
            f"jaxsoftmax: the program needs {', '.join(missing)}; "
            f"install with: pip install 'jaxsoftmax[{extra}]'",
            file=sys.stderr,
        )
        return 2
    from jaxsoftmax.training.cli import run  # noqa: PLC0415

    code = run(arguments)
    if code:
        # JAX's own exit would wait for the other processes of a run, and they for this one.
        sys.stdout.flush()
        os._exit(code)
    return code


def _installed(module: str) -> bool:
    from importlib.util import find_spec  # noqa: PLC0415

    try:
        return find_spec(module) is not None
    except ImportError:  # the parent of a dotted name is absent
        return False
