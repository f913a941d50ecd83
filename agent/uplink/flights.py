"""What is in flight on one connection, and whether the endpoint still makes progress with it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec

from agent.messages import Record
from agent.mqtt.packets import Puback


class Flight(msgspec.Struct, frozen=True, kw_only=True):
    """A PUBLISH under way: its records, none where it tells of the vehicle's presence.

    `goal`: the bytes of the connection at which the peer's TCP has all of it.
    """

    records: tuple[Record, ...]
    goal: int

    @property
    def bytes(self) -> int:
        """Of its records' envelopes."""
        return sum(len(record.envelope) for record in self.records)


class Flights:
    """Publishes without PUBACK in the order of sending; `idle` while there is none.

    Moments are arguments, monotonic seconds.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self._flights: dict[asyncio.Future[Puback], Flight] = {}
        self._progress = 0.0
        self._acknowledged = 0
        self._overtaken: tuple[asyncio.Future[Puback], float] | None = None

    def __len__(self) -> int:
        return len(self._flights)

    def __contains__(self, future: object) -> bool:
        return future in self._flights

    async def gone(self, matches: Callable[[Record], bool], patience_s: float) -> bool:
        """Whether no PUBLISH with such a record, of those now in flight, is so after `patience_s` at most."""
        those = [future for future, flight in self._flights.items() if any(map(matches, flight.records))]
        if those:
            await asyncio.wait(those, timeout=patience_s)
        return not any(future in self._flights for future in those)

    def add(self, future: asyncio.Future[Puback], flight: Flight, now: float) -> None:
        """A PUBLISH was made."""
        if not self._flights:
            self._progress = now
        self._flights[future] = flight
        self.bytes += flight.bytes
        self.idle.clear()

    def landed(self, future: asyncio.Future[Puback], now: float) -> tuple[Record, ...]:
        """Its PUBACK has come, which is that of all its records; KeyError for an unknown one."""
        self._progress = now
        first = next(iter(self._flights))
        if first is not future and (self._overtaken is None or self._overtaken[0] is not first):
            self._overtaken = (first, now)
        flight = self._flights.pop(future)
        self.bytes -= flight.bytes
        if not self._flights:
            self.idle.set()
        return flight.records

    def clear(self) -> list[tuple[Record, ...]]:
        """The records of each PUBLISH in flight, none of which is any more."""
        found = [flight.records for flight in self._flights.values()]
        self._flights.clear()
        self.bytes, self._overtaken = 0, None
        self.idle.set()
        return found

    def stuck(self, now: float, acknowledged: Callable[[], int], timeout_s: float) -> str | None:
        """Why the connection should be given up: for `timeout_s` no PUBACK came, or one was left out.

        While the oldest PUBLISH is still being taken by the peer's TCP (`acknowledged()` grows), the time does not run:
        on a slow link a large one may take minutes, and to begin it anew would never end.
        """
        if not self._flights:
            return None
        first, flight = next(iter(self._flights.items()))
        before, self._acknowledged = self._acknowledged, acknowledged()
        if before < self._acknowledged and before < flight.goal:
            self._progress = now
        if now - self._progress > timeout_s:
            return f"no PUBACK within {timeout_s} s"
        if self._overtaken is not None and self._overtaken[0] is first and now - self._overtaken[1] > timeout_s:
            return f"a PUBACK is missing for {timeout_s} s"
        return None
