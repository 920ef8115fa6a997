# SPDX-License-Identifier: Apache-2.0
"""Several processes that train as one: how they meet, agree, and end together.

Process 0 leads: it alone reads and writes the output folder and talks to the user. Whatever
takes more than one process goes through the functions here, which all of them call in the same
order; in a run of a single process they do nothing.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxsoftmax.training.errors import ProgramError, as_line, in_words, is_out_of_memory
from jaxsoftmax.training.interrupts import on_interrupt

# A process that does not answer for this long is taken for dead, and the others end.
_PATIENCE_SECONDS = 30
_LOST = "a process of the run stopped, or cannot be reached; start all of them again with --resume"
_SHOW_LAST_LINE = (
    "import sys; sys.stdin.reconfigure(encoding='utf-8'); "
    "sys.stderr.write(['', *sys.stdin][-1].lstrip('\\n'))"
)
_T = TypeVar("_T")


@contextmanager
def joined(coordinator: str, processes: int, process_id: int) -> Iterator[None]:
    """Makes this process one of several that share all their devices, until the run's end.

    Args:
        coordinator: `host:port` of process 0, where they meet.
        processes: how many there are.
        process_id: which one this is, from 0.

    Raises:
        ProgramError: the others were not met, or one of them stopped before the run's end.
    """
    place = (
        f"process {process_id} did not meet the other {processes - 1} at --coordinator "
        f"{coordinator}: that must be process 0's address, with a port that is free there, and "
        "every process must be started"
    )
    with _last_words() as prepare:
        prepare(place)
        try:
            # In a thread: JAX's waiting would keep Ctrl-C waiting too.
            ThreadPoolExecutor(1).submit(
                jax.distributed.initialize,
                coordinator,
                processes,
                process_id,
                heartbeat_timeout_seconds=_PATIENCE_SECONDS,
                shutdown_timeout_seconds=_PATIENCE_SECONDS,
            ).result()
        except RuntimeError as error:
            raise ProgramError(f"{place} ({error})") from error
        prepare(_LOST)
        try:
            _check_devices()
            yield
        except ProgramError as error:  # all processes raise it, so they part as after a success
            prepare(str(error))
            jax.distributed.shutdown()
            raise
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            if is_out_of_memory(error):  # it ends alone; the others find it gone
                raise
            # A collective that broke off; gloo's errors come as either.
            if isinstance(error, ValueError) and "Gloo" not in str(error):
                raise
            raise ProgramError(f"{_LOST} ({error})", exit_code=1) from error
        jax.distributed.shutdown()


def _check_devices() -> None:
    here, everywhere = jax.local_device_count(), jax.device_count()
    if everywhere != here * jax.process_count():
        raise ProgramError(
            f"every process must have the same number of devices; process {jax.process_index()} "
            f"has {here} of the {everywhere}"
        )


@contextmanager
def _last_words() -> Iterator[Callable[[str], None]]:
    """Gives a function that prepares the line to show if this process ends early.

    JAX aborts a process that has lost another one, at any moment, and no handler in the process
    survives that. So a child holds the line, and shows it once when it finds its pipe closed.
    """
    with subprocess.Popen(
        [sys.executable, "-ISc", _SHOW_LAST_LINE],
        stdin=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        errors="backslashreplace",
        start_new_session=True,  # Ctrl-C is not for it
    ) as child:
        assert child.stdin is not None
        pipe = child.stdin

        def prepare(message: str) -> None:
            pipe.write(as_line(message) + "\n")
            pipe.flush()

        def leave_silently(leave: Callable[[], object]) -> None:
            os.write(pipe.fileno(), b"\n")  # Ctrl-C shows a line of its own
            leave()

        with on_interrupt(leave_silently):
            try:
                yield prepare
            except ProgramError as error:
                prepare(str(error))
                raise ProgramError("", error.exit_code) from error  # the child shows the line
            except BaseException:  # which others report
                prepare("")
                raise
        prepare("")


def leads() -> bool:
    """Whether this is process 0, or the only one."""
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def together(work: Callable[[], _T]) -> _T:
    """What `work` gives in this process; an error in any process is raised in all."""
    if not jax.distributed.is_initialized():
        return work()
    result, failure = None, None
    try:
        result = work()
    except ProgramError as error:
        failure = (str(error), error.exit_code)
    except OSError as error:
        failure = (in_words(error), 2)
    for process, theirs in enumerate(exchanged(failure)):
        if theirs is not None:
            raise ProgramError(f"process {process}: {theirs[0]}", exit_code=theirs[1])
    return result  # pyright: ignore[reportReturnType] - without a failure it is a _T


def exchanged(value: Any) -> list[Any]:
    """Every process's value, by process; anything that JSON holds."""
    if not jax.distributed.is_initialized():
        return [value]
    ours = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.asarray(len(ours), np.int32)).reshape(-1)
    padded = np.pad(ours, (0, lengths.max() - len(ours)))
    everyones = multihost_utils.process_allgather(padded).reshape(len(lengths), -1)
    return [
        json.loads(theirs[:length].tobytes())
        for theirs, length in zip(everyones, lengths, strict=True)
    ]


def from_leader(work: Callable[[], Any]) -> Any:
    """What `work` gives in process 0, the only one that does it; anything that JSON holds."""
    return exchanged(together(lambda: work() if leads() else None))[0]
