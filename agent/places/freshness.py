"""How long ago a fix may have been measured, from its stated time and its arrival, without trusting the wall clock.

A receiver's time and monotonic time run alike, so stated time minus monotonic arrival is constant but for delays: the
largest value of late is the freshest message, and every other one is late by the difference. That says nothing before
the source has been heard for a while: until then a fix is as old as the wall clock and the broker make it, and without
a wall clock it may be of any age. A stated time that is wrong makes fixes late, never fresh, for at most two windows.
"""

from __future__ import annotations

from agent.messages import Message

SECOND_NS = 1_000_000_000
CLOCK_SET_NS = 1_420_070_400 * SECOND_NS  # 2015-01-01: an earlier time is a clock that was never set
ANY_AGE_NS = 366 * 86_400 * SECOND_NS
TOLERANCE_NS = SECOND_NS // 2  # rounding of stated times, and one clock against the other


class Freshness:
    """The lateness of one source's fixes; fixed memory."""

    def __init__(self, *, window_ns: int = 1_200 * SECOND_NS, settle_ns: int = 2 * SECOND_NS) -> None:
        self._window_ns = window_ns
        self._settle_ns = settle_ns
        self._highest: int | None = None  # of this window
        self._before: int | None = None  # of the window before
        self._window_start_ns = 0
        self._risen_ns = 0  # when the highest offset last rose: the source was late until then
        self._last_ns = 0

    def late_ns(self, stated_ns: int | None, message: Message) -> int:
        """The longest time in ns that the fix may have been under way before the message arrived."""
        if stated_ns is None:
            return message.wait_ns
        offset, now_ns = stated_ns - message.monotonic_ns, message.monotonic_ns
        self._turn(now_ns)
        highest = max((value for value in (self._highest, self._before) if value is not None), default=None)
        if highest is None or offset > highest + TOLERANCE_NS:
            self._risen_ns = now_ns
        self._highest = offset if self._highest is None else max(offset, self._highest)
        self._last_ns = now_ns
        late = max(0, max(offset, highest if highest is not None else offset) - offset)
        if now_ns - self._risen_ns >= self._settle_ns:
            return late if late > TOLERANCE_NS else 0
        return max(late, _age_ns(stated_ns, message), message.wait_ns)

    def _turn(self, now_ns: int) -> None:
        """Begin a new window, or begin anew after a silence of more than one."""
        if self._highest is None or now_ns - self._last_ns > self._window_ns:
            self._highest = self._before = None
            self._window_start_ns = now_ns
        elif now_ns - self._window_start_ns > self._window_ns:
            self._before, self._highest = self._highest, None
            self._window_start_ns = now_ns


def _age_ns(stated_ns: int, message: Message) -> int:
    """By the wall clock; any age where that was never set. A fix from the future is of any age too."""
    age = message.received_ns - stated_ns
    unset = min(message.received_ns, stated_ns) < CLOCK_SET_NS
    return ANY_AGE_NS if unset or age < -TOLERANCE_NS else (age if age > TOLERANCE_NS else 0)
