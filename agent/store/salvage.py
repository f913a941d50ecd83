"""What can still be read of a ledger that was set aside goes on in the new one.

Invariants
- Conservation holds across the loss: the old counters are carried over with every record that was in the car counted as
  evicted (`ledger.set-aside`), and each record that is read again moves back to where it was, in one transaction each.
- Only records whose CRC-32 fits are taken. The old files are only read, large envelopes copied, so that a salvage which
  was cut off can be made again from the beginning (`aside`).
- The new audit chain says which file the old one is in, before anything is carried over, and at the end how much was.
- The work ends at `SECONDS`, at a full disk, or when everything was tried: the new ledger opens in any case.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from agent.errors import LedgerError
from agent.messages import Record, State
from agent.store import tally
from agent.store.blobs import Blobs
from agent.store.books import Books, Delta, read_cells, read_lanes, read_meta, read_rings
from agent.store.entries import IntakeKey, Noted, Spooled
from agent.store.spool import Spool
from agent.store.storage import beside
from agent.store.transaction import Transaction

SECONDS = 20.0  # some 100,000 records of 1 kB
BATCH = 200  # records per transaction
BATCH_BYTES = 4 << 20
SET_ASIDE = "ledger.set-aside"

Begin = Callable[[], AbstractContextManager[Transaction]]


class Wreck:
    """A damaged ledger, read as far as it goes."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        self._deadline = time.monotonic() + SECONDS
        self.books = Books(window=1)
        for name, read in _PARTS.items():
            with contextlib.suppress(sqlite3.Error, ValueError):
                setattr(self.books, name, read(self._connection))
        self._spool = Spool(self._connection, self.books, Blobs(beside(path, ".files")))

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def batches(self) -> Iterator[list[Spooled]]:
        """Records by arrival; parts that cannot be read are narrowed down and left out."""
        last = self._last_key()
        ranges = [(0, last)] if last else []
        while ranges and time.monotonic() < self._deadline:
            after, until = ranges.pop()
            try:
                taken = self._spool.take(self._spool.between(after, until), BATCH, BATCH_BYTES)
            except (sqlite3.Error, ValueError, KeyError, OSError):
                middle = (after + until) // 2
                ranges += [(middle, until), (after, middle)] if after < middle < until else []
                continue
            if taken:
                ranges.append((taken[-1].key, until))
                yield taken

    def _last_key(self) -> int:
        for query in _LAST:
            with contextlib.suppress(sqlite3.Error, TypeError, ValueError):
                return int(self._connection.execute(query).fetchone()[0])
        return 0


def salvage(path: Path, begin: Begin) -> str:
    """Carry over what can be read of the ledger at `path`, in transactions that `begin` opens; what became of it."""
    _note(begin, path.name)
    try:
        wreck = Wreck(path)
    except sqlite3.Error as exc:
        return f"nothing of it could be read: {exc}"
    with contextlib.closing(wreck):
        carried, why = _carry_over(wreck, begin)
    _note(begin, f"{path.name}: {carried}")
    return carried + why


def _note(begin: Begin, value: str) -> None:
    """An audit row, where the disk takes it; what errors say is not for it, since they may quote what is damaged."""
    with contextlib.suppress(LedgerError), begin() as transaction:
        transaction.apply([Noted(name=SET_ASIDE, value=value, time_ns=time.time_ns())])


def _carry_over(wreck: Wreck, begin: Begin) -> tuple[str, str]:
    """How much was carried over, and what ended it early, if anything."""
    why = ""
    lost = sum(wreck.books.cells.get((state, tally.TOTAL, ""), (0, 0))[0] for state in (State.PENDING, State.HELD))
    saved: set[str] = set()
    try:
        with begin() as transaction:
            _carry_books(wreck.books, transaction.delta)
        for batch in wreck.batches():
            with begin() as transaction:
                for record in (spooled.record for spooled in batch if spooled.record.id not in saved):
                    _restore(transaction, record, counted=len(saved) < lost)
                    saved.add(record.id)
    except (LedgerError, ValueError, TypeError) as exc:  # nonsense that only shows when it is written
        why = f", then: {exc}"
    return f"{len(saved)} of {lost} records carried over", why


def _carry_books(books: Books, delta: Delta) -> None:
    """Counters, numbering, notes and packet identifiers; every record in the car counts as evicted for now."""
    for name, (number, size) in books.cells.items():
        state, dimension, _ = name
        if state in (State.PENDING, State.HELD):
            if dimension == tally.TOTAL:
                tally.step(delta.cells, State.EVICTED, _NOBODY, number, {tally.REASON: SET_ASIDE})
        elif state != tally.AUDIT:
            tally.add(delta.cells, name, number, size)
    delta.meta.update({name: value for name, value in books.meta.items() if name.startswith("note.")})
    for session, ring in books.rings.items():
        delta.intakes += [IntakeKey(session=session, mid=mid, digest=digest) for mid, digest in ring.digests().items()]


def _restore(transaction: Transaction, record: Record, *, counted: bool) -> None:
    cells = transaction.delta.cells
    if counted:
        tally.step(cells, State.EVICTED, _NOBODY, -1, {tally.REASON: SET_ASIDE})
    else:
        tally.add(cells, (tally.RECEIVED, tally.TOTAL, ""), 1)
    transaction.insert(record, "restored")


_NOBODY = tally.Subject(regions="", data_class="")
_LAST = (
    "SELECT max(key) FROM record",
    "SELECT number FROM counter WHERE state = 'audit'",
    "SELECT max(first) + 1000 FROM audit",
)
_PARTS: dict[str, Callable[[sqlite3.Connection], object]] = {
    "meta": read_meta,
    "lanes": read_lanes,
    "rings": lambda connection: read_rings(connection, 1 << 16),
    "cells": read_cells,
}
