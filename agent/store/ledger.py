"""The ledger: what was received and has not left the car yet, on disk, with its counters and its audit chain.

Invariants
- `commit` returns only when its entries are durable (fsync of SQLite's journal); all of them or none.
- A record leaves the disk only by an entry that ends it or by `sweep`, and every such step is counted and audited in
  the same transaction: received = delivered + pending + held + refused + expired + evicted in every committed state.
- Opening, counting and reading the next records cost the same whatever the backlog.
- Lanes and spool are within their limits in every committed state.
- The class is used by one thread at a time; `counts`, `recorded` and `last_key` may be read by any.

Layout: `record` holds a row per pending or held record, its envelope in the row or, when large, in a file (`blobs`).
`lane` names each pair of candidate regions and route; an empty route means held. `record_order` serves delivery,
eviction and the TTL. `counter` (also the sequence numbers), `intake` and `meta` are small and also in memory (`books`).
`audit` holds the chain (`audit`), one block per transaction. Files and pragmas: `storage`.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

from agent.clock import Moment
from agent.errors import LedgerStalledError
from agent.messages import Held, Priority, Record, State
from agent.store import retention, tally, upkeep
from agent.store.aside import Opened, begin_salvage, connect, end_salvage
from agent.store.blobs import Blobs
from agent.store.books import Books, forget_empty_lanes, load, read_cells
from agent.store.entries import (
    MIB,
    Counts,
    Ending,
    Entry,
    IntakeKey,
    LedgerLimits,
    Noted,
    Spooled,
    SweepResult,
    latest_ns,
)
from agent.store.reserve import Reserve
from agent.store.salvage import salvage
from agent.store.spool import Spool, oldest, serves
from agent.store.storage import beside, lock, read_only, translated
from agent.store.transaction import Transaction

Taken = TypeVar("Taken", Held, Spooled)

SWEEP_RECORDS = 1000  # records that one sweep ends or dates at most, so that it holds the thread for some 50 ms
READ_BYTES = 8 * MIB
DEFAULT_LIMITS = LedgerLimits()


class Ledger:
    """Open with `Ledger.open`; see the module for what it promises."""

    def __init__(self, path: Path, limits: LedgerLimits, seal: Callable[[bytes], bytes] | None) -> None:
        self._path = path
        self._limits = limits
        self._sealer = upkeep.Sealer(path, seal, limits.seal_seconds)
        self._blobs = Blobs(beside(path, ".files"))
        self._reserve = Reserve(path, limits.reserve_bytes)
        self._lock = lock(path)
        try:
            opened = self._connect()
        except BaseException:
            os.close(self._lock)
            raise
        self._connection, self._books, self._aside = opened.connection, opened.loaded, opened.aside
        self._spool = Spool(self._connection, self._books, self._blobs)
        self.incidents = opened.incidents

    def _connect(self) -> Opened[Books]:
        """Open the database; on a disk too full for the index of its journal, with the reserve given up."""
        try:
            with translated(self._path):
                return connect(self._path, self._limits.journal_bytes, self._load)
        except LedgerStalledError:
            if not self._reserve.give():
                raise
            return connect(self._path, self._limits.journal_bytes, self._load)

    def _load(self, connection: sqlite3.Connection) -> Books:
        forget_empty_lanes(connection)
        return load(connection, self._limits.intake_window)

    @staticmethod
    def open(
        path: Path, limits: LedgerLimits = DEFAULT_LIMITS, *, seal: Callable[[bytes], bytes] | None = None
    ) -> Ledger:
        """Open or create the ledger at `path`; `incidents` tells what had to be set aside.

        What can be read of damaged files is carried over. LedgerError: a newer schema, another process, a directory
        that cannot be written.
        """
        with translated(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            ledger = Ledger(path, limits, seal)
            try:
                ledger._recover()
            except BaseException:
                ledger._release()
                raise
            return ledger

    def _recover(self) -> None:
        """Carry over what can be read of damaged files; notice that the journal lost what the seal remembers."""
        if self._aside is not None:
            begin_salvage(self._path)
            self.incidents += (salvage(self._aside, self._transaction),)
        end_salvage(self._path)
        problem, remembered = self._sealer.compare(self._books.head)
        self.incidents += (problem,) if problem else ()
        if remembered:
            self.commit([Noted(name="audit.rollback", value=remembered, time_ns=time.time_ns())])
        self._reserve.take()

    def commit(self, entries: Sequence[Entry]) -> list[Record]:
        """Make entries durable in one transaction; the records that they brought into the car.

        LedgerStalledError: full or failing disk, try again later. LedgerEntryError: one contradicts the ledger.
        What ends records, and what is noted before deliveries can begin, takes the reserve when the disk is full.
        """
        try:
            return self._commit(entries)
        except LedgerStalledError:
            relieving = all(isinstance(entry, Ending | Noted) for entry in entries)
            if not relieving or not self._use_reserve():
                raise
            return self._commit(entries)

    def _commit(self, entries: Sequence[Entry]) -> list[Record]:
        with self._transaction() as transaction:
            transaction.apply(entries)
            retention.make_room(self._connection, transaction, self._limits, latest_ns(entries))
        return [*transaction.arrived.values()]

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Transaction]:
        """BEGIN .. COMMIT; memory follows the commit, files follow the outcome."""
        with translated(self._path):
            self._connection.execute("BEGIN IMMEDIATE")
            transaction = Transaction(self._connection, self._books, self._blobs, self._limits)
            try:
                yield transaction
                head = transaction.finish()
            except BaseException:
                self._roll_back()
                self._remove_files(transaction.delta.written)
                raise
            try:
                self._connection.execute("COMMIT")
            except BaseException:
                self._roll_back()  # the files stay: after a crash now, the journal may turn out to hold the commit
                raise
            self._books.adopt(transaction.delta, head)
            self._remove_files(transaction.delta.unneeded)

    def _roll_back(self) -> None:
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute("ROLLBACK")

    def _remove_files(self, numbers: list[int]) -> None:
        """Unlink what no record names; what cannot be unlinked now, a sweep finds."""
        with contextlib.suppress(OSError):
            self._blobs.remove(numbers)

    def _use_reserve(self) -> bool:
        """Free the reserve and move the journal into the database, so that deletes have room; False: no use."""
        if not self._reserve.give():
            return False
        with contextlib.suppress(sqlite3.Error):
            self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return True

    def pending(  # noqa: PLR0913 - keyword-only, each with its default
        self,
        endpoint: str,
        *,
        limit: int,
        priority: Priority | None = None,
        after: int = 0,
        until: int | None = None,
        down: Collection[str] = (),
        skip: Collection[str] = (),
        max_bytes: int = READ_BYTES,
        now: Moment | None = None,
    ) -> list[Spooled]:
        """The next records for an endpoint by priority, then arrival; keys in (`after`, `until`], ids not in `skip`.

        A record is for the endpoint when it stands first in the route or all before it are in `down`. One that a sweep
        would expire `now` is left out; None: also such are given.
        """
        priorities = Priority if priority is None else (priority,)
        with translated(self._path):
            rows = self._spool.pending(
                lambda route: serves(route, endpoint, down), priorities, after=after, until=until, now=now
            )
            return self._checked(self._spool.take(rows, limit, max_bytes, skip))

    @property
    def cut(self) -> bool:
        """Whether the last read of records ended at one of its bounds, so that there may be more."""
        return self._spool.cut

    def held(self, *, boot_id: str, since_ns: int, limit: int, after: int = 0) -> list[Held]:
        """What is held, by arrival, keys above `after`; no envelope is read.

        Only what was captured in the boot `boot_id`, and not before `since_ns` (CLOCK_BOOTTIME).
        """
        with translated(self._path):
            return self._checked(list(islice(self._spool.held(boot_id, since_ns, after), limit)))

    def keyed(self, keys: Collection[int], *, max_bytes: int = READ_BYTES) -> list[Spooled]:
        """The records with these keys that are pending or held, by arrival; one at least, others up to `max_bytes`."""
        with translated(self._path):
            return self._checked(self._spool.take(self._spool.keyed(keys), len(keys), max_bytes))

    def spooled(self, *, limit: int, after: int = 0, max_bytes: int = READ_BYTES) -> list[Spooled]:
        """Pending and held records by arrival, keys above `after`."""
        with translated(self._path):
            return self._checked(self._spool.take(self._spool.between(after), limit, max_bytes))

    def find(self, name: str) -> Record | None:
        """The record with this id, while it is pending or held."""
        with translated(self._path):
            found = self._checked(self._spool.take(self._spool.named(name), 1, READ_BYTES))
        return found[0].record if found else None

    def _checked(self, taken: list[Taken]) -> list[Taken]:
        """End the records whose envelopes turned out to be lost, so that nothing waits for them for ever."""
        damaged, self._spool.damaged = self._spool.damaged, []
        if damaged:
            with self._transaction() as transaction:
                retention.drop_damaged(self._connection, transaction, damaged, time.time_ns())
        return taken

    @property
    def last_key(self) -> int:
        """No record so far has a key above this one."""
        return self._books.head.n

    def counts(self) -> Counts:
        """Where all messages stand."""
        return tally.counts(self._books.cells.copy().items())

    def oldest(self) -> dict[State, int]:
        """When (Unix nanoseconds) the oldest pending and the oldest held record were made."""
        with translated(self._path):
            return oldest(self._connection)

    def sequences(self) -> dict[str, int]:
        """The last sequence number of each set of regions, joined by commas."""
        return tally.sequences(self._books.cells)

    def meta(self, name: str) -> str | None:
        """The value of the last `Noted` entry of this name."""
        return self._books.meta.get(f"note.{name}")

    def recorded(self, key: IntakeKey) -> bool:
        """Whether this PUBLISH is durable already: ask when it comes with the DUP flag."""
        return self._books.recorded(key)

    def recent_intake(self, session: str) -> dict[int, bytes]:
        """Packet identifiers and digests of the last PUBLISHes of a session."""
        ring = self._books.rings.get(session)
        return ring.digests() if ring else {}

    def sweep(self, now_ns: int | None, *, monotonic_ns: int = 0, boot_id: str = "") -> SweepResult:
        """Expire, seal and bound the audit chain, give space back; call it every few seconds. Works on a full disk.

        `now_ns` None, or a clock that is not set: nothing expires. With `boot_id` and `monotonic_ns` (CLOCK_BOOTTIME),
        a record of this boot expires only when it is as old as its TTL on that clock too, so that a wall clock that
        jumps ahead ends nothing. What was made before the clock was set is dated first (`lifetime`).
        """
        now = None
        if now_ns is not None:
            now = Moment(time_ns=now_ns, monotonic_ns=monotonic_ns, boot_id=boot_id)
        before = self.counts()
        try:
            due = self._end_old(now)
        except LedgerStalledError:
            if not self._use_reserve():
                raise
            due = self._end_old(now)
        with translated(self._path):
            upkeep.remove_strays(self._connection, self._blobs)
            freed = upkeep.give_space_back(self._connection, self._path)
            self._reserve.take()
            self._sealer.seal(self._books.head, now=False)
        after = self.counts()
        expired, evicted = after.expired - before.expired, after.evicted - before.evicted
        more = due >= SWEEP_RECORDS or evicted >= retention.EVICT_RECORDS
        return SweepResult(expired=expired, evicted=evicted, freed_bytes=freed, more=more)

    def _end_old(self, now: Moment | None) -> int:
        """How many records were due."""
        time_ns, due = (time.time_ns() if now is None else now.time_ns), 0
        with self._transaction() as transaction:
            if now is not None:
                due = retention.expire(self._connection, transaction, now, SWEEP_RECORDS)
            retention.make_room(self._connection, transaction, self._limits, time_ns)
            drop = upkeep.droppable_audit(self._connection, self._books, self._limits.audit_bytes, self._sealer.sealed)
            if drop is not None:
                transaction.drop_audit(*drop, time_ns)
        return due

    def seal_with(self, sign: Callable[[bytes], bytes] | None) -> None:
        """Sign the audit head with another key from now on."""
        self._sealer.sign = sign

    def close(self) -> None:
        """Seal the audit chain and close the files; the ledger is not used afterwards."""
        try:
            with contextlib.suppress(LedgerStalledError), translated(self._path):
                self._sealer.seal(self._books.head, now=True)
        finally:
            self._release()

    def _release(self) -> None:
        self._connection.close()
        os.close(self._lock)

    @staticmethod
    def read_counts(path: Path) -> Counts:
        """The counters of a ledger, also while another process writes it."""
        with read_only(path) as connection:
            connection.execute("BEGIN")  # one moment for all that is read
            return tally.counts(read_cells(connection).items())

    @staticmethod
    def read_oldest(path: Path) -> dict[State, int]:
        """`oldest` of a ledger, also while another process writes it."""
        with read_only(path) as connection:
            return oldest(connection)
