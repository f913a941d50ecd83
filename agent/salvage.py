"""What can still be read of a ledger that was set aside goes on in the new one.

Invariants
- Conservation holds across the loss: the old counters are carried over with every record that was in the car counted as
  evicted (`ledger.set-aside`), and each record that is read again moves back to where it was, in one transaction each.
- Only records whose CRC-32 fits are taken. The old files are only read.
- The work ends at `SECONDS`, at a full disk, or when everything was tried: the new ledger opens in any case.
"""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from agent import tally
from agent.blobs import Blobs
from agent.books import Books, Delta, load
from agent.entries import IntakeKey, Spooled
from agent.errors import LedgerError
from agent.messages import State
from agent.spool import Spool
from agent.storage import beside
from agent.transaction import Transaction

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
        with contextlib.suppress(sqlite3.Error, ValueError, TypeError):
            self.books = load(self._connection, 1 << 16)
        self._spool = Spool(self._connection, self.books, Blobs(beside(path, ".files")))

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def batches(self) -> Iterator[list[Spooled]]:
        """Records by arrival; parts that cannot be read are narrowed down and left out."""
        last = max(self.books.head.n, self._last_key())
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
        try:
            return int(self._connection.execute("SELECT coalesce(max(key), 0) FROM record").fetchone()[0])
        except sqlite3.Error:
            return 0


def salvage(path: Path, begin: Begin) -> str:
    """Carry over what can be read of the ledger at `path`, in transactions that `begin` opens; what became of it."""
    try:
        wreck = Wreck(path)
    except sqlite3.Error as exc:
        return f"nothing of it could be read: {exc}"
    with contextlib.closing(wreck):
        return _carry_over(wreck, begin)


def _carry_over(wreck: Wreck, begin: Begin) -> str:
    lost = sum(wreck.books.cells.get((state, tally.TOTAL, ""), (0, 0))[0] for state in (State.PENDING, State.HELD))
    saved = 0
    try:
        with begin() as transaction:
            _carry_books(wreck.books, transaction.delta)
        for batch in wreck.batches():
            with begin() as transaction:
                for spooled in batch:
                    _restore(transaction, spooled, counted=saved < lost)
                    saved += 1
    except LedgerError as exc:
        return f"{saved} of {lost} records carried over, then: {exc}"
    return f"{saved} of {lost} records carried over"


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


def _restore(transaction: Transaction, spooled: Spooled, *, counted: bool) -> None:
    cells = transaction.delta.cells
    if counted:
        tally.step(cells, State.EVICTED, _NOBODY, -1, {tally.REASON: SET_ASIDE})
    else:
        tally.add(cells, (tally.RECEIVED, tally.TOTAL, ""), 1)
    transaction.insert(spooled.record, "restored")


_NOBODY = tally.Subject(regions="", data_class="")
