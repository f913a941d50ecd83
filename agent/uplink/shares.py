"""How the link is divided between live records and the backlog.

While live records wait, the backlog gets a fixed share of the bytes, so that it always drains; when none wait, it gets
everything that its own rate limit allows. Pure: moments are arguments, monotonic seconds.
"""

from __future__ import annotations

import math

SHARE = 4  # one byte of so many belongs to the backlog
BURST_SECONDS = 1.0  # of the rate limit, that a quiet time saves up


class Shares:
    """The account of one connection. `bytes_per_s` limits the backlog; 0: no limit."""

    def __init__(self, bytes_per_s: int, now: float) -> None:
        self._rate = bytes_per_s
        self._credit = 1.0
        self._tokens = 1.0
        self._refilled = now

    def allowed(self, now: float, *, live: int) -> float:
        """Bytes of the backlog that may go beside so many bytes of live records that wait; one record may overdraw."""
        if self._rate:
            elapsed, self._refilled = now - self._refilled, now
            self._tokens = min(self._tokens + elapsed * self._rate, self._rate * BURST_SECONDS)
        if not live:
            self._credit = 1.0
        share = self._credit + live / (SHARE - 1) if live else math.inf
        return max(min(share, self._tokens if self._rate else math.inf), 0.0)

    def wait(self) -> float:
        """Seconds until the rate limit lets a record go; infinite where it is not what holds the backlog back."""
        return (1 - self._tokens) / self._rate if self._rate and self._tokens <= 0 else math.inf

    def live_sent(self, size: int) -> None:
        """Live records of so many bytes were sent."""
        self._credit += size / (SHARE - 1)

    def backlog_sent(self, size: int) -> None:
        """Records of the backlog of so many bytes were sent; they may overdraw the account."""
        self._credit -= size
        self._tokens -= size if self._rate else 0
