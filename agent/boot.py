"""Which boot this is, its clock, and the present moment in it."""

from __future__ import annotations

import functools
import time
from pathlib import Path

from agent.clock import Moment

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@functools.cache
def boot_id() -> str:
    """The name of this boot."""
    return _BOOT_ID.read_text(encoding="ascii").strip()


def boot_ns() -> int:
    """CLOCK_BOOTTIME: it counts while the machine sleeps, and nobody sets it."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def moment() -> Moment:
    """Now, on both clocks."""
    return Moment(time_ns=time.time_ns(), monotonic_ns=boot_ns(), boot_id=boot_id())
