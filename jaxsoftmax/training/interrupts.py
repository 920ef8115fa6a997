# SPDX-License-Identifier: Apache-2.0
"""What Ctrl-C does at each step of a run; it never raises an exception that something may swallow.

The innermost handler decides: to wait for the end of the epoch, to do something first, to pass it
on to the handler around it. The outermost one ends the program (`jaxsoftmax_command`).
"""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def on_interrupt(handle: Callable[[Callable[[], object]], object]) -> Iterator[None]:
    """Calls `handle` on Ctrl-C, with a function that does what Ctrl-C would do otherwise.

    Where Ctrl-C is ignored, as in a background job of a shell, it stays ignored.
    """
    outer = signal.getsignal(signal.SIGINT)
    if not callable(outer):
        yield
        return
    signal.signal(signal.SIGINT, lambda *arguments: handle(lambda: outer(*arguments)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, outer)
