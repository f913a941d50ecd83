"""How long ago a fix may have been measured, from its stated time and its arrival, without trusting the wall clock.

A receiver's time and monotonic time run alike, so stated time minus monotonic arrival is constant but for delays: the
largest value of late is the freshest message, and every other one is late by the difference. How fresh that one is says
the broker: no message has been under way for longer than it may have waited there, so none is later than that above the
least of all value + wait. Delays before the broker show as a value that rises, however slowly: until it has stood still
for a while a fix is as old as the wall clock and the broker make it, and without a wall clock it may be of any age. A
stated time that is wrong makes fixes late, never fresh, for at most two windows.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from agent.messages import Message

SECOND_NS = 1_000_000_000
CLOCK_SET_NS = 1_420_070_400 * SECOND_NS  # 2015-01-01: an earlier time is a clock that was never set
ANY_AGE_NS = 366 * 86_400 * SECOND_NS
TOLERANCE_NS = SECOND_NS // 2  # rounding of stated times, and one clock against the other


@dataclass(slots=True)
class _Window:
    """Offsets of a while: the largest seen, and the largest that a message without any delay can have."""

    start_ns: int
    highest: int
    ceiling: int


class Freshness:
    """The lateness of one source's fixes; fixed memory."""

    def __init__(self, *, window_ns: int = 1_200 * SECOND_NS, settle_ns: int = 2 * SECOND_NS) -> None:
        self._window_ns = window_ns
        self._settle_ns = settle_ns
        self._windows: deque[_Window] = deque(maxlen=2)
        self._risen_ns = 0  # when the highest offset last rose: the source was late until then
        self._risen_to = 0  # the offset to which it did: rises that are too small to see add up
        self._last_ns = 0

    def late_ns(self, stated_ns: int | None, message: Message) -> int:
        """The longest time in ns that the fix may have been under way before the message arrived."""
        if stated_ns is None:
            return message.wait_ns
        offset, now_ns = stated_ns - message.monotonic_ns, message.monotonic_ns
        if now_ns - self._last_ns > self._window_ns:
            self._windows.clear()  # a silence so long: it is judged anew
        if not self._windows or offset > min(self._highest, self._risen_to) + TOLERANCE_NS:
            self._risen_ns, self._risen_to = now_ns, offset
        self._learn(offset, message)
        self._last_ns = now_ns
        late = max(self._highest, min(window.ceiling for window in self._windows)) - offset
        if now_ns - self._risen_ns >= self._settle_ns:
            return late if late > TOLERANCE_NS else 0
        return max(late, _age_ns(stated_ns, message), message.wait_ns)

    @property
    def _highest(self) -> int:
        return max(window.highest for window in self._windows)

    def _learn(self, offset: int, message: Message) -> None:
        """Widen this window by a message, or begin a new one with it."""
        ceiling, now_ns = offset + message.wait_ns, message.monotonic_ns
        if not self._windows or now_ns - self._windows[-1].start_ns > self._window_ns:
            self._windows.append(_Window(now_ns, offset, ceiling))
            return
        window = self._windows[-1]
        window.highest, window.ceiling = max(window.highest, offset), min(window.ceiling, ceiling)


def _age_ns(stated_ns: int, message: Message) -> int:
    """By the wall clock; any age where that was never set. A fix from the future is of any age too."""
    age = message.received_ns - stated_ns
    unset = min(message.received_ns, stated_ns) < CLOCK_SET_NS
    return ANY_AGE_NS if unset or age < -TOLERANCE_NS else (age if age > TOLERANCE_NS else 0)
