# SPDX-License-Identifier: Apache-2.0
"""How the program ends early on purpose."""

from collections.abc import Iterator
from contextlib import contextmanager


class ProgramError(Exception):
    """Something the user can put right: shown as one line on stderr, or not if it is empty.

    Attributes:
        exit_code: 2 for bad input (nothing was written), 1 for a failure while training.
    """

    def __init__(self, message: str, exit_code: int = 2) -> None:
        """Takes the line to show, without the program's name."""
        super().__init__(message)
        self.exit_code = exit_code


def in_words(error: OSError) -> str:
    """What to show of an error of the system: a folder that cannot be written, a full disk, …."""
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}"


def as_line(message: str) -> str:
    """One line, whatever a file name or another library's message contains; empty stays empty."""
    return "jaxsoftmax: " + " ".join(message.split()) if message else ""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, a compiler for one, or this machine had no more."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    )


@contextmanager
def out_of_memory_in_words(remedy: str) -> Iterator[None]:
    """Where memory is not enough, a `ProgramError` that names the remedy."""
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0]
        reason = f": {reason}" if reason else ""
        raise ProgramError(f"out of memory{reason}; {remedy}", exit_code=1) from error
