"""How long a message may have waited in the in-car broker before we got it.

A broker holds messages back while we are away, while too many are unacknowledged (its limit is its own secret, and may
be one), and while our process stands still. None of that is visible in the message, and the vehicle may have crossed a
border meanwhile. So a marker, a message of our own, is sent through the broker now and then: when it comes back, all
that had been published before it has come too.

Invariant: `taken` never returns less than the message has waited since it was published, but for its transport.
Pure: moments are arguments, nanoseconds of CLOCK_BOOTTIME.
"""

from __future__ import annotations

FOREVER_NS = 10 * 365 * 86_400 * 10**9
"""A wait that no fix history covers: the message may have been captured anywhere."""


class Waiting:
    """What is known of one session. `empty_ns`: all that was published before that moment has been delivered."""

    def __init__(self, empty_ns: int | None) -> None:
        self.empty_ns = empty_ns
        self._flows = False
        self._unacknowledged = 0
        self._marker = b""
        self._marked_ns = 0
        self._disturbed = False

    @property
    def flows(self) -> bool:
        """Whether the broker holds nothing back."""
        return self._flows

    @property
    def marked(self) -> bool:
        """Whether a marker is under way."""
        return bool(self._marker)

    def begin(self, now_ns: int, *, resumed: bool) -> None:
        """A connection was made; a session that was not resumed holds only what is published from now on."""
        self._unacknowledged = 0
        self._marker = b""
        self._flows = not resumed
        if not resumed:
            self.empty_ns = now_ns

    def mark(self, marker: bytes, now_ns: int) -> None:
        """A marker is sent."""
        self._marker, self._marked_ns = marker, now_ns
        self._disturbed = self._unacknowledged > 0

    def returned(self, marker: bytes, now_ns: int, unseen_ns: int = 0) -> None:
        """A marker has come back; those of earlier connections say nothing."""
        if not self._marker or marker != self._marker:
            return
        self._marker = b""
        self._flows = not self._disturbed
        self.empty_ns = now_ns - unseen_ns if self._flows else max(self._marked_ns, self.empty_ns or 0)

    def taken(self, now_ns: int, unseen_ns: int = 0) -> int:
        """A message has come, and is unacknowledged: the longest time that it may have waited."""
        if self._flows:
            wait_ns, self.empty_ns = unseen_ns, now_ns - unseen_ns
        else:
            wait_ns = FOREVER_NS if self.empty_ns is None else max(now_ns - self.empty_ns, unseen_ns)
        self._unacknowledged += 1
        self._flows, self._disturbed = False, True
        return wait_ns

    def acknowledged(self) -> None:
        """The PUBACK of a message was sent."""
        self._unacknowledged -= 1
