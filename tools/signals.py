"""How the tools are told to end: Ctrl-C and SIGTERM mean the same, and what was started is ended by whoever started it.

A command that can be ended at any moment leaves it to `interruptible`; one that has something to finish, such as a
recording, asks `ended_by_signals`.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED_STATUS = 130  # 128 + SIGINT
ENDING = (signal.SIGINT, signal.SIGTERM)


def interruptible(command: str, work: Callable[[], int]) -> int:
    """The status of the work, or 130 where a signal ended it: KeyboardInterrupt unwinds it and ends its processes."""
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        return work()
    except KeyboardInterrupt:
        print(f"{command}: interrupted; everything that it started has ended", file=sys.stderr)
        return INTERRUPTED_STATUS
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def ended_by_signals(call: Callable[[], object] = lambda: None) -> Iterator[threading.Event]:
    """An event that the first signal sets, after `call`; a second one interrupts."""
    stopped = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        if stopped.is_set():
            _interrupt(number, frame)
        stopped.set()
        call()

    previous = {number: signal.signal(number, on_signal) for number in ENDING}
    try:
        yield stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
