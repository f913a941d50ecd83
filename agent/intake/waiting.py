"""How long a message may have waited in the in-car broker before we got it.

A broker holds messages back while we are away, while too many are unacknowledged (its limit is its own secret, and may
be one), and while our process stands still. None of that is visible in the message, and the vehicle may have crossed a
border meanwhile. So a marker, a message of our own, is sent through the broker now and then: when it comes back, all
that had been published before it has come too.

Invariant: `taken` never returns less than the message has waited since it was published, but for its transport.
Pure: moments are arguments, nanoseconds of CLOCK_BOOTTIME.
"""

from __future__ import annotations

from collections import deque

FOREVER_NS = 10 * 365 * 86_400 * 10**9
"""A wait that no fix history covers: the message may have been captured anywhere."""


class Waiting:
    """What is known of one session. `empty_ns`: all that was published before that moment has been delivered.

    What is unacknowledged comes again on the next connection: `kept_ns` is the moment that holds for it too.
    """

    def __init__(self, empty_ns: int | None) -> None:
        self.empty_ns = empty_ns
        self._flows = False
        self._unacknowledged: deque[int | None] = deque()  # the earliest that each may have been published
        self._marker = b""
        self._marked_ns = 0
        self._disturbed = False
        self._holding_ns: int | None = None  # since when the broker may wait for the PUBACK of a marker
        self._held_ns = 0  # for how long it did, the last time

    @property
    def flows(self) -> bool:
        """Whether the broker holds nothing back."""
        return self._flows

    @property
    def kept_ns(self) -> int | None:
        """All that was published before that moment has been delivered and acknowledged; None: it is not known."""
        return self._unacknowledged[0] if self._unacknowledged else self.empty_ns

    @property
    def marked(self) -> bool:
        """Whether a marker is under way."""
        return bool(self._marker)

    def begin(self, now_ns: int, *, resumed: bool) -> None:
        """A connection was made; a session that was not resumed holds only what is published from now on."""
        self.empty_ns = self.kept_ns if resumed else now_ns
        self._unacknowledged.clear()
        self._marker = b""
        self._holding_ns, self._held_ns = None, 0
        self._flows = not resumed

    def mark(self, marker: bytes, now_ns: int) -> None:
        """A marker is sent."""
        self._marker, self._marked_ns = marker, now_ns
        self._disturbed = bool(self._unacknowledged)

    def returned(self, marker: bytes) -> None:
        """A marker has come back; those of earlier connections say nothing."""
        if not self._marker or marker != self._marker:
            return
        self._marker, self._holding_ns = b"", self._marked_ns
        self._flows = not self._disturbed
        self.empty_ns = max(self._marked_ns, self.empty_ns or 0)

    def taken(self, now_ns: int, unseen_ns: int = 0) -> int:
        """A message has come, and is unacknowledged: the longest time that it may have waited."""
        if self._flows:
            held_ns = self._held_ns if self._holding_ns is None else now_ns - self._holding_ns
            wait_ns = max(unseen_ns, held_ns)
            self.empty_ns = now_ns - wait_ns
        else:
            wait_ns = FOREVER_NS if self.empty_ns is None else max(now_ns - self.empty_ns, unseen_ns)
        self._unacknowledged.append(self.empty_ns)
        self._flows, self._disturbed = False, True
        return wait_ns

    def marker_acknowledged(self, now_ns: int) -> None:
        """The PUBACK of a marker was sent."""
        if self._holding_ns is not None:
            self._held_ns = now_ns - self._holding_ns
            self._holding_ns = None

    def acknowledged(self) -> None:
        """The PUBACK of the first message that is unacknowledged was sent."""
        self._unacknowledged.popleft()
