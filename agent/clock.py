"""What a moment is, and whether the wall clock means anything yet."""

from __future__ import annotations

from dataclasses import dataclass

IS_SET_NS = 1_750_000_000 * 10**9  # 2025-06-15: before this agent existed, so an earlier clock was never set


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Unix time and CLOCK_BOOTTIME, in nanoseconds; without a `boot_id` only the wall clock counts."""

    time_ns: int
    monotonic_ns: int = 0
    boot_id: str = ""


def is_set(now_ns: int) -> bool:
    """Whether Unix time `now_ns` can be right; a gateway without a battery starts in 1970 or at its build date."""
    return now_ns > IS_SET_NS
