"""Lanes: the pair of candidate regions and route that records share, and what a record weighs in the spool."""

from __future__ import annotations

import msgspec

from agent.messages import Record, State
from agent.store.tally import Subject

RECORD_OVERHEAD = 512  # bytes that a record takes beside its envelope: row, index entries, audit row

Lane = tuple[str, str]  # regions joined by commas, endpoints joined by line feeds; no endpoint: held
Gone = tuple[int, str, int, int, str, int, int | None]  # key, id, lane, priority, class, size, file of a record


def lane_of(record: Record) -> Lane:
    """The lane of a record; ValueError where state and route contradict each other."""
    if record.state not in {State.PENDING, State.HELD} or (record.state is State.PENDING) != bool(record.route):
        msg = f"record {record.id}: state {record.state} with route {record.route}"
        raise ValueError(msg)
    return ",".join(record.regions), "\n".join(record.route)


def subject_of(record: Record) -> Subject:
    """What is counted about a record."""
    size = len(record.envelope) + RECORD_OVERHEAD
    return Subject(regions=",".join(record.regions), data_class=record.data_class, size=size)


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What is needed of a stored record to end or change it."""

    key: int
    id: str
    lane: Lane
    data_class: str
    size: int
    file: int | None

    @property
    def state(self) -> State:
        """A record without a route is held."""
        return State.PENDING if self.lane[1] else State.HELD

    @property
    def subject(self) -> Subject:
        """What is counted about it."""
        return Subject(regions=self.lane[0], data_class=self.data_class, size=self.size)
