"""Whether the wall clock means anything yet."""

from __future__ import annotations

IS_SET_NS = 1_750_000_000 * 10**9  # 2025-06-15: before this agent existed, so an earlier clock was never set


def is_set(now_ns: int) -> bool:
    """Whether Unix time `now_ns` can be right; a gateway without a battery starts in 1970 or at its build date."""
    return now_ns > IS_SET_NS
