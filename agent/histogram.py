"""Durations in buckets: what an average would hide, in constant memory."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

WORK_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
WAIT_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0, 3600.0, 86_400.0)
"""Of work that somebody waits for, and of waiting in a queue that may last for days."""


class Histogram:
    """Counts durations by upper bounds in seconds, ascending; one more bucket takes what is above all of them."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, seconds: float) -> None:
        """Count one duration; a clock that was set back makes it 0."""
        self._counts[bisect_left(self._bounds, max(seconds, 0.0))] += 1
        self._sum += max(seconds, 0.0)

    def as_dict(self) -> dict[str, Any]:
        """`{"buckets": {upper bound: durations up to it}, "sum": seconds}`, last `+Inf`; empty without any."""
        if not any(self._counts):
            return {}
        names = [*map(str, self._bounds), "+Inf"]
        return {"buckets": dict(zip(names, accumulate(self._counts), strict=True)), "sum": self._sum}


def within(durations: Mapping[str, Any], share: float) -> str:
    """The bound that this share of the durations kept to, as text; empty without any. Takes what `as_dict` gives."""
    buckets = durations.get("buckets", {})
    if not buckets:
        return ""
    bounds = sorted((bound for bound in buckets if bound != "+Inf"), key=float)
    found = next((bound for bound in bounds if buckets[bound] >= share * buckets["+Inf"]), None)
    return f"{float(found):g}" if found is not None else f">{float(bounds[-1]):g}"
