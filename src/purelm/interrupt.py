"""Ctrl-C that waits until it does no harm."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_SAID = b"\npurelm: finishing this step to save a checkpoint; Ctrl-C again stops at once\n"


@contextmanager
def held_back() -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C is only noted, a second one interrupts at once.

    Yields a function that says whether the first has come. Where somebody else handles the signal,
    and outside of the main thread, nothing is changed and nothing noted.
    """
    noted = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal noted
        if noted:
            signal.default_int_handler(number, frame)
        noted = True
        # Not through sys.stderr, in the midst of whose work the signal may have come.
        os.write(2, _SAID)

    usual = signal.default_int_handler
    ours = threading.current_thread() is threading.main_thread()
    if not ours or signal.getsignal(signal.SIGINT) is not usual:
        yield lambda: False
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: noted
    finally:
        signal.signal(signal.SIGINT, usual)
