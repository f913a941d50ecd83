"""The reading side of the ledger: records in order of delivery, each checked against its CRC-32.

The cost of a read grows with the number of lanes and of records read, not with the backlog.
"""

from __future__ import annotations

import heapq
import itertools
import sqlite3
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from operator import itemgetter
from typing import Any

from agent.clock import Moment
from agent.messages import Basis, Capture, Held, Priority, Record, State
from agent.store.blobs import Blobs
from agent.store.books import Books
from agent.store.entries import Spooled
from agent.store.lanes import Lane
from agent.store.lifetime import OVERDUE, arguments
from agent.store.storage import NonsenseError

_IN_LANE = f"""SELECT key, id, lane, priority, class, expires_ns, recorded_ns, sequence, basis, topic,
    time_ns, monotonic_ns, doubt_ns, boot, crc, file, envelope FROM record
    WHERE lane = ? AND priority IN ({{}}) AND key > ? AND key <= ? AND NOT ({OVERDUE}) ORDER BY priority, key"""  # noqa: S608 - a constant
_ALL = """SELECT key, id, lane, priority, class, expires_ns, recorded_ns, sequence, basis, topic,
    time_ns, monotonic_ns, doubt_ns, boot, crc, file, envelope FROM record
    WHERE key > ? AND key <= ? ORDER BY key"""
_KEYED = """SELECT key, id, lane, priority, class, expires_ns, recorded_ns, sequence, basis, topic,
    time_ns, monotonic_ns, doubt_ns, boot, crc, file, envelope FROM record
    WHERE key IN ({}) ORDER BY key"""
_HELD = """SELECT key, lane, basis, class, topic, time_ns, monotonic_ns, doubt_ns, boot FROM record
    WHERE lane = ? AND priority = ? AND key > ? AND boot = ? AND monotonic_ns >= ? ORDER BY key"""
_NAMED = """SELECT key, id, lane, priority, class, expires_ns, recorded_ns, sequence, basis, topic,
    time_ns, monotonic_ns, doubt_ns, boot, crc, file, envelope FROM record
    WHERE id = ?"""
_TYPES = (int, str, int, int, str, int, int, int, str, str, int, int, int, str, int)  # of the columns up to crc
_HELD_TYPES = (int, int, str, str, str, int, int, int, str)
_BASES = frozenset(Basis)
_PRIORITIES = frozenset(Priority)
_NO_LIMIT = (1 << 63) - 1

Rows = Iterator[tuple[Any, ...]]


_OLDEST = """SELECT route = '', min(first) FROM (
        SELECT route,
            (SELECT recorded_ns FROM record WHERE lane = lane.id AND priority = level ORDER BY key LIMIT 1) AS first
        FROM lane, (SELECT 0 AS level UNION SELECT 1 UNION SELECT 2)) WHERE first IS NOT NULL GROUP BY 1"""


def oldest(connection: sqlite3.Connection) -> dict[State, int]:
    """When (Unix nanoseconds) the oldest pending and the oldest held record were made; no key where there is none."""
    rows = connection.execute(_OLDEST).fetchall()
    return {State.HELD if held else State.PENDING: first for held, first in rows if isinstance(first, int)}


def serves(route: str, endpoint: str, down: Collection[str]) -> bool:
    """Whether a record with this route is for `endpoint` now: every endpoint before it is down."""
    for name in route.split("\n"):
        if name == endpoint:
            return bool(name)
        if name not in down:
            return False
    return False


def _parts(joined: str, by: str) -> tuple[str, ...]:
    return tuple(joined.split(by)) if joined else ()


class Spool:
    """Reads records; `damaged` collects the keys of those whose envelope is lost, for the caller to end.

    `cut`: the last `take` ended at one of its bounds, so there may be more.
    """

    def __init__(self, connection: sqlite3.Connection, books: Books, blobs: Blobs) -> None:
        self._connection = connection
        self._books = books
        self._blobs = blobs
        self.damaged: list[int] = []
        self.cut = False

    def pending(
        self,
        wanted: Callable[[str], bool],
        priorities: Iterable[Priority],
        *,
        after: int,
        until: int | None,
        now: Moment | None,
    ) -> Rows:
        """Rows of all wanted routes: by priority, then by arrival; keys in (`after`, `until`], none overdue `now`."""
        lanes = [number for (_, route), number in self._books.lanes.items() if wanted(route)]
        last = _NO_LIMIT if until is None else until
        return heapq.merge(*(self._rows(lane, priorities, after, last, now) for lane in lanes), key=itemgetter(3, 0))

    def _rows(self, lane: int, priorities: Iterable[Priority], after: int, last: int, now: Moment | None) -> Rows:
        """By priority and key, as the index has them: one statement, and no row is read before it is wanted."""
        levels = ", ".join(str(int(priority)) for priority in priorities)
        return self._connection.execute(_IN_LANE.format(levels), (lane, after, last, *arguments(now)))

    def held(self, boot_id: str, since_ns: int, after: int) -> Iterator[Held]:
        """Records without a route, by arrival, captured in this boot and not before `since_ns` (monotonic)."""
        lanes = {number: regions for (regions, route), number in self._books.lanes.items() if not route}
        rows = (
            self._connection.execute(_HELD, (lane, priority, after, boot_id, since_ns))
            for lane in lanes
            for priority in Priority
        )
        for row in heapq.merge(*rows, key=itemgetter(0)):
            key, lane, basis, data_class, topic, time_ns, monotonic_ns, doubt_ns, boot = row
            if tuple(map(type, row)) != _HELD_TYPES or basis not in _BASES:
                self.damaged.append(key)
                continue
            yield Held(
                key=key,
                regions=_parts(lanes[lane], ","),
                basis=Basis(basis),
                data_class=data_class,
                topic=topic,
                capture=Capture(time_ns=time_ns, monotonic_ns=monotonic_ns, doubt_ns=doubt_ns, boot_id=boot),
            )

    def keyed(self, keys: Iterable[int]) -> Rows:
        """The rows of these records, as far as they are here, by arrival."""
        return self._connection.execute(_KEYED.format(", ".join(map(str, keys))))

    def between(self, after: int, until: int = _NO_LIMIT) -> Rows:
        """All rows by arrival; keys in (`after`, `until`]."""
        return self._connection.execute(_ALL, (after, until))

    def named(self, name: str) -> Rows:
        """The row of one record, or none."""
        return self._connection.execute(_NAMED, (name,))

    def take(self, rows: Rows, limit: int, max_bytes: int, skip: Collection[str] = ()) -> list[Spooled]:
        """Up to `limit` records and `max_bytes` of envelopes, but one record at least."""
        self.cut, taken = True, list[Spooled]()
        lanes = {number: lane for lane, number in self._books.lanes.items()}
        for row in itertools.filterfalse(lambda row: row[1] in skip, rows):
            if taken and max_bytes <= 0:
                return taken
            if row[2] not in lanes:
                raise NonsenseError(f"record {row[0]} is in no lane")
            spooled = self._spooled(row, lanes[row[2]])
            if spooled is None:
                self.damaged.append(row[0])
                continue
            max_bytes -= len(spooled.record.envelope)
            if taken and max_bytes < 0:
                return taken
            taken.append(spooled)
            if len(taken) >= limit:
                return taken
        self.cut = False
        return taken

    def _spooled(self, row: tuple[Any, ...], lane: Lane) -> Spooled | None:
        regions, route = (_parts(part, by) for part, by in zip(lane, (",", "\n"), strict=True))
        (key, name, _, priority, data_class, expires, recorded, sequence, basis, topic, *moment, crc, file, data) = row
        envelope = data if file is None else self._read(file)
        if tuple(map(type, row[:15])) != _TYPES or basis not in _BASES or priority not in _PRIORITIES:
            return None
        if not isinstance(envelope, bytes) or zlib.crc32(envelope) != crc:
            return None
        time_ns, monotonic_ns, doubt_ns, boot = moment
        record = Record(
            id=name,
            state=State.PENDING if route else State.HELD,
            route=route,
            regions=regions,
            basis=Basis(basis),
            data_class=data_class,
            topic=topic,
            priority=Priority(priority),
            capture=Capture(time_ns=time_ns, monotonic_ns=monotonic_ns, doubt_ns=doubt_ns, boot_id=boot),
            recorded_ns=recorded,
            expires_ns=expires,
            sequence=sequence,
            envelope=envelope,
        )
        return Spooled(key=key, record=record)

    def _read(self, file: int) -> bytes | None:
        try:
            return self._blobs.read(file)
        except FileNotFoundError:
            return None
