"""Which records go out in one PUBLISH.

Invariants:
- Urgent records go first, each alone.
- A parcel holds records with equal addresses, in the order in which they were put here, and no more than its room:
  only a record that is larger than the room by itself goes all the same, alone.
- Addresses take turns, so a topic with many records holds up no other. Nothing waits for company.

Pure.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Iterable

import msgspec

from agent.messages import Record

BATCH_BYTES = 64 << 10  # of envelopes, before compression: on a slow link an urgent record waits behind no more


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """What one PUBLISH may hold: so many records, and so many bytes of envelopes."""

    records: int = 1
    bytes: int = BATCH_BYTES


class Parcels:
    """Records that wait to be sent, and the `bytes` of their envelopes.

    `address` is equal for records that may go together; None: this one goes alone.
    """

    def __init__(self, address: Callable[[Record], Hashable | None]) -> None:
        self._address = address
        self._urgent: deque[Record] = deque()
        self._queues: dict[Hashable, list[Record]] = {}
        self._count = 0
        self.bytes = 0

    def __len__(self) -> int:
        return self._count

    def put_first(self, urgent: Iterable[Record]) -> None:
        """These go before all others, behind urgent ones that wait already."""
        for record in urgent:
            self._urgent.append(record)
            self._count += 1
            self.bytes += len(record.envelope)

    def put(self, records: Iterable[Record]) -> None:
        """These go when it is their turn."""
        for record in records:
            address = self._address(record)
            key = (None, record.id) if address is None else (address,)
            self._queues.setdefault(key, []).append(record)
            self._count += 1
            self.bytes += len(record.envelope)

    def take(self, room: Room) -> list[Record]:
        """The next parcel, at least one record; IndexError where nothing waits."""
        parcel = [self._urgent.popleft()] if self._urgent else self._next(room)
        self._count -= len(parcel)
        self.bytes -= sum(len(record.envelope) for record in parcel)
        return parcel

    def clear(self) -> list[Record]:
        """All that waits, which does not any more."""
        waiting = [*self._urgent, *(record for queue in self._queues.values() for record in queue)]
        self._urgent.clear()
        self._queues.clear()
        self._count = self.bytes = 0
        return waiting

    def _next(self, room: Room) -> list[Record]:
        if not self._queues:
            raise IndexError("nothing waits")
        key = next(iter(self._queues))
        queue = self._queues.pop(key)
        count = _fitting(queue, room)
        if count < len(queue):
            self._queues[key] = queue[count:]  # at the end: the other addresses come first now
        return queue[:count]


def _fitting(queue: list[Record], room: Room) -> int:
    """How many of the first records fit; at least one."""
    size = 0
    for count, record in enumerate(queue[: room.records]):
        size += len(record.envelope)
        if count and size > room.bytes:
            return count
    return min(len(queue), max(room.records, 1))
