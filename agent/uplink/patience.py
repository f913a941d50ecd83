"""How much an endpoint is entrusted with after what it did last, and which records must let others pass.

- Full trust: the whole window, and batches. After a lost PUBACK or a reason code that asks for patience: one record at
  a time, and a pause that doubles; each accepted PUBLISH doubles the window again.
- A record that was alone in flight when the connection was lost, or that the endpoint does not take now, is set aside
  for a time that doubles: it may be the reason, and the others must not wait for it. It is never given up.
- Records that were set aside, whose batch was rejected, or whose batch was first in flight when the connection was
  lost, go alone from then on: the trouble that one of them makes is not the others'.

Pure: moments are arguments, monotonic seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from agent.mqtt.backoff import delays

FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 60.0
LONGEST_ASIDE_SECONDS = 600.0
MOST_ASIDE = 1024  # records remembered; beyond it the first that was set aside, or apart, is forgotten


@dataclass(frozen=True, slots=True, kw_only=True)
class _Strike:
    count: int
    until: float


class Patience:
    """One endpoint. `draw` gives 0..1 for the jitter of the pauses."""

    def __init__(self, draw: Callable[[], float]) -> None:
        self.doubted = False
        self._draw = draw
        self._window: int | None = None
        self._pauses = delays(draw, first=FIRST_PAUSE_SECONDS, longest=LONGEST_PAUSE_SECONDS)
        self._not_before = 0.0
        self._strikes: dict[str, _Strike] = {}
        self._apart: dict[str, None] = {}

    @property
    def trusting(self) -> bool:
        """Whether the endpoint has full trust."""
        return self._window is None

    def window(self, largest: int, now: float) -> int:
        """How many PUBLISHes may be in flight now, of `largest`; 0 during a pause."""
        if now < self._not_before:
            return 0
        return largest if self._window is None else min(self._window, largest)

    def pause(self, now: float) -> float:
        """Seconds until records may be sent again."""
        return max(self._not_before - now, 0.0)

    def aside(self, now: float) -> frozenset[str]:
        """Records that let others pass."""
        return frozenset(name for name, strike in self._strikes.items() if strike.until > now)

    def alone(self, record: str) -> bool:
        """Whether a record shares no PUBLISH with others."""
        return record in self._strikes or record in self._apart

    def accepted(self, records: Collection[str], largest: int) -> None:
        """The endpoint has taken a PUBLISH with these records."""
        for record in records:
            self._strikes.pop(record, None)
            self._apart.pop(record, None)
        self.doubted = False
        if self._window is not None:
            self._window = self._window * 2 if self._window * 2 < largest else None
            self._pauses = delays(self._draw, first=FIRST_PAUSE_SECONDS, longest=LONGEST_PAUSE_SECONDS)

    def deferred(self, records: Collection[str], now: float) -> None:
        """The endpoint asks for patience with a PUBLISH of these records."""
        self._doubt()
        self._not_before = max(self._not_before, now + next(self._pauses))
        for record in records:
            self._strike(record, now)

    def rejected(self, records: Collection[str]) -> None:
        """The endpoint will not take a PUBLISH of these records: one of them may be the reason."""
        for record in records:
            self._apart[record] = None
        _forget_first(self._apart)

    def lost(self, publishes: Sequence[Collection[str]], now: float) -> None:
        """The connection was lost, or given up, while PUBLISHes of these records were in flight, oldest first."""
        if publishes:
            self._doubt()
            if len(publishes[0]) > 1:
                self.rejected(publishes[0])
            elif len(publishes) == 1:
                self._strike(next(iter(publishes[0])), now)

    def _doubt(self) -> None:
        self.doubted = True
        self._window = 1

    def _strike(self, record: str, now: float) -> None:
        before = self._strikes.pop(record, None)
        count = before.count + 1 if before is not None else 1
        until = now + min(2.0 ** (count - 1), LONGEST_ASIDE_SECONDS)
        self._strikes[record] = _Strike(count=count, until=until)
        _forget_first(self._strikes)


def _forget_first(remembered: dict[str, Any]) -> None:
    while len(remembered) > MOST_ASIDE:
        del remembered[next(iter(remembered))]
