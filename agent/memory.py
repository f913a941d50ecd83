"""Memory that a burst has left behind, given back to the system: the C library keeps freed memory for later use."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

PAGE_BYTES = resource.getpagesize()
SLACK_BYTES = 16 << 20  # less is not worth the milliseconds that it takes
PAUSE_SECONDS = 20.0  # between two attempts: what is in use cannot be given back


def resident_bytes(process: int | str = "self") -> int | None:
    """Memory that a process has now: proc(5), the second number of statm is in pages. None where that is hidden."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text(encoding="ascii").split()[1]) * PAGE_BYTES
    except (OSError, IndexError):
        return None


def trim() -> None:
    """Give all free memory back; some milliseconds. Where the C library cannot (musl), nothing happens."""
    give = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if give is not None:
        give(0)


class Memory:
    """Trims this process while it is larger than it was at its start; `tidy` is to be called every few seconds."""

    def __init__(self) -> None:
        self._least = resident_bytes() or 0
        self._due = 0.0

    def tidy(self, now: float) -> bool:
        """Whether memory was asked for; blocks for some milliseconds then. `now` is in monotonic seconds."""
        if now < self._due or (resident_bytes() or 0) <= self._least + SLACK_BYTES:
            return False
        trim()
        self._least = min(self._least, resident_bytes() or 0)
        self._due = now + PAUSE_SECONDS
        return True
