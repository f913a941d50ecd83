"""How the records of one endpoint are loaded into PUBLISHes: whether they may share one, and how much room it has."""

from __future__ import annotations

from collections.abc import Sequence

from agent.errors import EnvelopeError
from agent.messages import Record
from agent.uplink.outlet import Outlet
from agent.uplink.parcels import BATCH_BYTES, Parcels, Room
from agent.uplink.patience import Patience

READ_AHEAD = 4  # batches of records that are made ready, so that those of several topics are full
PACKET_ROOM = 1024  # bytes of a PUBLISH beside its records, about; where it is more, they go one by one


class Loading:
    """One endpoint's `ready` records. `outlet` is that of the connection for which they were read."""

    def __init__(self, batch_records: int, patience: Patience) -> None:
        self.outlet: Outlet | None = None
        self.ready = Parcels(self._address)
        self._batch_records = batch_records
        self._patience = patience

    def wanted(self, window: int) -> int:
        """How many records shall be ready where so many PUBLISHes may be in flight."""
        return max(window, READ_AHEAD * self._batch_records) if window and self._sharing else window

    def next(self, largest_packet: int | None) -> list[Record]:
        """The records of the next PUBLISH; IndexError where none is ready."""
        room = BATCH_BYTES if largest_packet is None else min(BATCH_BYTES, largest_packet - PACKET_ROOM)
        return self.ready.take(Room(records=self._batch_records if self._sharing else 1, bytes=room))

    def part(self, records: Sequence[Record]) -> None:
        """These cannot go in one PUBLISH: they go one by one, so that only the one at fault is refused."""
        self._patience.rejected([record.id for record in records])
        self.ready.put(records)

    @property
    def _sharing(self) -> bool:
        return self._batch_records > 1 and self._patience.trusting

    def _address(self, record: Record) -> tuple[str, str] | None:
        if self._batch_records == 1 or self.outlet is None or self._patience.alone(record.id):
            return None
        try:
            return self.outlet.address(record)
        except EnvelopeError:
            return None  # its fault is told when it is sent
