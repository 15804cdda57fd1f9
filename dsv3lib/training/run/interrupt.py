"""Ctrl-C that waits for a good moment: what runs is finished first, then the caller is told."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ...errors import Dsv3Error

EXIT_INTERRUPTED = 130
"""What a shell reports for a program that Ctrl-C ended."""


class Interrupt:
    """Whether Ctrl-C was pressed (in Jupyter: whether the kernel was interrupted) while a block ran."""

    def __init__(self) -> None:
        self.requested = False


@contextmanager
def deferred_interrupt() -> Iterator[Interrupt]:
    """Hold back Ctrl-C until the block has ended; pressed a second time it interrupts at once.

    Outside the main thread Python delivers no signal, and the block runs as it is.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupt.requested:
            raise KeyboardInterrupt
        interrupt.requested = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before if before is not None else signal.default_int_handler)


def exit_code(work: Callable[[], bool]) -> int:
    """A command's end: 0 where its work was done, 130 where that was interrupted, 1 behind an error in words.

    Args:
        work: says whether it was done.
    """
    try:
        return 0 if work() else EXIT_INTERRUPTED
    except Dsv3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
