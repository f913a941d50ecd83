"""One transaction of the ledger: entries in, rows, counters and one audit block out.

Invariants
- Nothing in memory changes before the commit; a transaction that fails leaves no row and no file behind.
- Every state change writes its audit row and its counters in the same transaction.
- Regions of a record are never widened, its capture never changes.
"""

from __future__ import annotations

import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial

from agent.errors import LedgerEntryError
from agent.messages import Record, Redaction, State
from agent.store import audit, tally
from agent.store.blobs import Blobs
from agent.store.books import AUDIT_CELL, BASE, Books, Delta
from agent.store.entries import (
    Delivered,
    Ending,
    Entry,
    IntakeKey,
    LedgerLimits,
    Noted,
    Redecided,
    Refused,
    Rejected,
    Released,
    SessionReset,
    Store,
    Withdrawn,
)
from agent.store.lanes import Gone, Lane, Row, lane_of, subject_of
from agent.store.rows import ClashError, Rows, write_rows
from agent.store.storage import NonsenseError

AUDIT_OVERHEAD = 64  # bytes of an audit block beside its rows
TOO_LARGE = "ledger.too-large"

_SELECT = """SELECT key, id, lane, priority, class, size, file, time_ns, monotonic_ns, doubt_ns, boot
    FROM record WHERE id = ?"""
_DATE = "UPDATE record SET expires_ns = expires_ns - recorded_ns + ?, recorded_ns = ? WHERE key = ?"
_COUNTER = """INSERT INTO counter VALUES {}
    ON CONFLICT DO UPDATE SET number = number + excluded.number, bytes = bytes + excluded.bytes"""


class Transaction:
    """Collects and writes the changes of one BEGIN .. COMMIT, which the caller owns.

    `arrived`: the records, by id, that it brings into the car and leaves there as they came.
    """

    def __init__(self, connection: sqlite3.Connection, books: Books, blobs: Blobs, limits: LedgerLimits) -> None:
        self.delta = Delta()
        self.arrived: dict[str, Record] = {}
        self._execute = connection.execute
        self._connection = connection
        self._books = books
        self._blobs = blobs
        self._limits = limits
        self._rows = Rows(connection)
        self._index = -1
        self._names: dict[int, Lane] = {}
        self._freed_audit = 0

    def apply(self, entries: Sequence[Entry]) -> None:
        """Apply entries in order; a redelivery that is recorded already changes nothing.

        LedgerEntryError names the one that contradicts the ledger; after it, sqlite3.Error or OSError, the transaction
        is to be rolled back.
        """
        self._rows.take(list(_ended_first(entries)))
        try:
            for self._index, entry in enumerate(entries):
                self._apply(entry)
            self._rows.flush()
        except ClashError as exc:
            raise LedgerEntryError(exc.index, str(exc)) from exc
        except (ValueError, sqlite3.IntegrityError) as exc:
            raise LedgerEntryError(self._index, str(exc)) from exc

    def _apply(self, entry: Entry) -> None:
        match entry:
            case Store():
                self._store(entry)
            case Refused():
                self._refuse(entry)
            case Delivered():
                marks = {"endpoint": entry.endpoint}
                self._end(entry.id, State.DELIVERED, entry.time_ns, marks, code=entry.code)
            case Rejected():
                marks = {"endpoint": entry.endpoint, "reason": f"endpoint.rejected-{entry.code}"}
                self._end(entry.id, State.REFUSED, entry.time_ns, marks, code=entry.code)
            case Withdrawn():
                self._end(entry.id, State.REFUSED, entry.time_ns, {"reason": entry.reason})
            case Released():
                self._change(entry.record, "released", "", entry.time_ns)
            case Redecided():
                self._change(entry.record, "redecided", entry.reason, entry.time_ns)
            case Noted():
                self.delta.meta[f"note.{entry.name}"] = entry.value
                self._audit("noted", entry.time_ns, name=entry.name, value=entry.value)
            case SessionReset():
                self.delta.resets.append(entry.session)
                self.delta.intakes = [key for key in self.delta.intakes if key.session != entry.session]

    def _audit(self, what: str, time_ns: int, **fields: object) -> int:
        n = self._books.head.n + len(self.delta.rows) + 1
        row = {name: value for name, value in fields.items() if value not in (None, "")}
        self.delta.rows.append(audit.canonical({"n": n, "time_ns": time_ns, "what": what, **row}))
        return n

    def _known(self, intake: IntakeKey | None) -> bool:
        if intake is None or not intake.redelivered:
            return False
        for key in reversed(self.delta.intakes):
            if (key.session, key.mid) == (intake.session, intake.mid):
                return key.digest == intake.digest
        return intake.session not in self.delta.resets and self._books.recorded(intake)

    def _received(self, intake: IntakeKey | None) -> None:
        tally.add(self.delta.cells, (tally.RECEIVED, tally.TOTAL, ""), 1)
        if intake is not None:
            self.delta.intakes.append(intake)
            surplus = self._books.surplus_session(intake.session)
            if surplus is not None and surplus not in self.delta.resets:
                self.delta.resets.append(surplus)

    def _store(self, entry: Store) -> None:
        if self._known(entry.intake):
            return
        record, subject = entry.record, subject_of(entry.record)
        self._received(entry.intake)
        facts = {"reason": entry.reason, **_redaction(entry.redaction)}
        if subject.size > min(self._limits.lane_bytes, self._limits.total_bytes):
            self._audit_record("stored", record, record.recorded_ns, **facts)
            self._number(record)
            self._evicted(record.id, subject, TOO_LARGE, record.recorded_ns)
            return
        self.insert(record, "stored", **facts)

    def insert(self, record: Record, what: str, **facts: object) -> None:
        """Put a record into the spool; its key is the number of the audit row that says `what` happened."""
        key = self._audit_record(what, record, record.recorded_ns, **facts)
        self._number(record)
        self._rows.insert(self._index, (*self._columns(record, key), key))
        self.arrived[record.id] = record
        tally.step(self.delta.cells, record.state, subject_of(record))

    def _audit_record(self, what: str, record: Record, time_ns: int, **facts: object) -> int:
        candidates, route = ",".join(record.regions), ",".join(record.route)
        fixed = {"id": record.id, "class": record.data_class, "candidates": candidates, "route": route}
        return self._audit(what, time_ns, decision=str(record.state), **fixed, **facts)

    def _columns(self, record: Record, number: int) -> tuple[object, ...]:
        capture, data = record.capture, record.envelope
        file = number if len(data) > self._limits.inline_bytes else None
        if file is not None:
            self.delta.written.append(file)
            self._blobs.write(file, data)
        return (
            *(record.id, self._lane(lane_of(record)), int(record.priority), record.data_class, subject_of(record).size),
            *(record.expires_ns, record.recorded_ns, record.sequence, str(record.basis), record.topic),
            *(capture.time_ns, capture.monotonic_ns, capture.doubt_ns, capture.boot_id),
            *(zlib.crc32(data), file, data if file is None else None),
        )

    def _lane(self, lane: Lane) -> int:
        number = self._books.lanes.get(lane) or self.delta.lanes.get(lane)
        if number is None:
            number = self._execute("INSERT INTO lane(regions, route) VALUES (?, ?) RETURNING id", lane).fetchall()[0][0]
            self.delta.lanes[lane] = number
        return int(number)

    def _number(self, record: Record) -> None:
        """Keep the last sequence number of the record's regions."""
        regions = ",".join(record.regions)
        name, before = (tally.SEQUENCE, tally.REGION, regions), self._books.sequence(regions)
        last = max(before, 0) + self.delta.cells.get(name, (0, 0))[0]
        tally.add(self.delta.cells, name, max(0, record.sequence - last))

    def _refuse(self, entry: Refused) -> None:
        if self._known(entry.intake):
            return
        subject = tally.Subject(regions=",".join(entry.regions), data_class=entry.data_class or "")
        self._received(entry.intake)
        tally.step(self.delta.cells, State.REFUSED, subject, marks={"reason": entry.reason})
        facts: dict[str, object] = {"class": entry.data_class, "candidates": subject.regions, "reason": entry.reason}
        self._audit("refused", entry.time_ns, decision="refused", **facts, **_redaction(entry.redaction))

    def _row(self, fields: Gone) -> Row:
        key, name, lane, _, data_class, size, file = fields
        if lane not in self._names:
            self._names = {value: lane for lane, value in self.lanes().items()}
        if lane not in self._names or (type(name), type(data_class), type(size)) != (str, str, int):
            msg = f"record {key} holds {fields!r}"
            raise NonsenseError(msg)
        return Row(key=key, id=name, lane=self._names[lane], data_class=data_class, size=size, file=file)

    def _end(
        self, name: str, state: State, time_ns: int, counted: Mapping[str, str], *, code: int | None = None
    ) -> None:
        gone = self._rows.taken(name)
        if gone is None:
            tally.add(self.delta.cells, (tally.LATE, tally.TOTAL, ""), 1)
            self._audit("late", time_ns, id=name, decision=str(state), code=code, **counted)
            return
        self._left(self._row(gone), state, counted, time_ns, code)

    def _left(self, row: Row, state: State, counted: Mapping[str, str], time_ns: int, code: int | None = None) -> None:
        tally.step(self.delta.cells, row.state, row.subject, -1)
        tally.step(self.delta.cells, state, row.subject, marks=counted)
        self.arrived.pop(row.id, None)
        if row.file is not None:
            self.delta.unneeded.append(row.file)
        facts: dict[str, object] = {"class": row.data_class, "candidates": row.lane[0], "code": code, **counted}
        self._audit(str(state), time_ns, id=row.id, **facts)

    def _change(self, record: Record, what: str, reason: str, time_ns: int) -> None:
        self._rows.flush()
        found = self._execute(_SELECT, (record.id,)).fetchone()
        if found is None:
            tally.add(self.delta.cells, (tally.LATE, tally.TOTAL, ""), 1)
            self._audit("late", time_ns, id=record.id, decision=what)
            return
        row = self._row(found[:7])
        _check_change(record, row, found[7:])
        number = self._audit_record(what, record, time_ns, reason=reason)
        self._rows.update(row.key, self._columns(record, number))
        self.arrived.pop(record.id, None)
        if row.file is not None:
            self.delta.unneeded.append(row.file)
        self._number(record)
        tally.step(self.delta.cells, row.state, row.subject, -1)
        tally.step(self.delta.cells, record.state, subject_of(record))

    def remove(self, gone: Gone, state: State, reason: str, time_ns: int) -> int:
        """End one record, given its `GONE` columns, for a reason of the ledger's own; bytes that this frees."""
        row = self._row(gone)
        self._execute("DELETE FROM record WHERE key = ?", (row.key,))
        self._left(row, state, {"reason": reason}, time_ns)
        return row.size

    def date(self, gone: Gone, made_ns: int, time_ns: int) -> None:
        """Say when a record was made, given its `GONE` columns; its time to live is as long as before."""
        row = self._row(gone)
        self._execute(_DATE, (made_ns, made_ns, row.key))
        self._audit("dated", time_ns, id=row.id, value=str(made_ns))

    def drop_audit(self, base: audit.Head, freed: int, time_ns: int) -> None:
        """Drop the audit rows up to `base`, which take `freed` bytes, and say so in the chain."""
        n = self._books.head.n + len(self.delta.rows) + 1
        self.delta.rows.append(audit.canonical(audit.checkpoint(n, time_ns, base)))
        self._execute("DELETE FROM audit WHERE first <= ?", (base.n,))
        self.delta.meta[BASE] = f"{base.n} {base.digest.hex()}"
        self._freed_audit = freed

    def spooled_bytes(self, dimension: str = tally.TOTAL, name: str = "") -> int:
        """Bytes in the spool as this transaction leaves it."""
        committed = tally.spooled_bytes(self._books.cells, dimension, name)
        return committed + tally.spooled_bytes(self.delta.cells, dimension, name)

    def lanes(self) -> Mapping[Lane, int]:
        """All lanes as this transaction leaves them."""
        return self._books.lanes | self.delta.lanes

    def finish(self) -> audit.Head:
        """Write counters, numbering and the audit block; the new head."""
        self._rows.flush()
        head = self._books.head
        if self.delta.rows:
            block = audit.pack(head, self.delta.rows)
            head, size = audit.head_of(block), len(block.data) + AUDIT_OVERHEAD - self._freed_audit
            self._execute("INSERT INTO audit VALUES (?, ?, ?, ?)", (block.first, block.count, block.digest, block.data))
            tally.add(self.delta.cells, AUDIT_CELL, block.count, size)
        write = partial(write_rows, self._connection)
        write(_COUNTER, [(*name, *values) for name, values in self.delta.cells.items()])
        write("INSERT OR REPLACE INTO meta VALUES {}", [*self.delta.meta.items()])
        self._connection.executemany("DELETE FROM intake WHERE session = ?", ((name,) for name in self.delta.resets))
        write("INSERT OR REPLACE INTO intake VALUES {}", [*self._intake_rows()])
        if self.delta.written:
            self._blobs.sync_names()
        return head

    def _intake_rows(self) -> Iterator[tuple[str, int, int, int, bytes]]:
        taken = {name: ring.taken for name, ring in self._books.rings.items() if name not in self.delta.resets}
        for key in self.delta.intakes:
            n = taken[key.session] = taken.get(key.session, 0) + 1
            yield key.session, n % self._books.window, n, key.mid, key.digest

    def _evicted(self, name: str, subject: tally.Subject, reason: str, time_ns: int) -> None:
        tally.step(self.delta.cells, State.EVICTED, subject, marks={"reason": reason})
        facts: dict[str, object] = {"class": subject.data_class, "candidates": subject.regions, "reason": reason}
        self._audit("evicted", time_ns, id=name, **facts)


def _ended_first(entries: Iterable[Entry]) -> Iterator[str]:
    """The ids of the records that the entries end before they do anything else."""
    for entry in entries:
        if not isinstance(entry, Ending):
            return
        yield entry.id


def _check_change(record: Record, row: Row, moment: tuple[int, int, int, str]) -> None:
    """Raise ValueError where a change would move the capture or widen the regions."""
    capture = record.capture
    same = moment == (capture.time_ns, capture.monotonic_ns, capture.doubt_ns, capture.boot_id)
    if not same or not set(record.regions) <= set(row.lane[0].split(",")):
        msg = f"record {record.id}: its capture and regions {row.lane[0]} may not become those of {record.regions}"
        raise ValueError(msg)


def _redaction(redaction: Redaction | None) -> dict[str, object]:
    if redaction is None:
        return {}
    return {"model": redaction.model_digest, "pictures": redaction.pictures, "counts": redaction.summary()}
