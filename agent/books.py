"""The small part of the ledger that is kept in memory as well: counters, numbering, lanes, recent packet identifiers.

Invariant: what stands here is what the last committed transaction left on the disk. A transaction collects its changes
in a `Delta`, writes them, and hands them over with `adopt` only after the commit. Its size does not depend on the
backlog.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass, field

from agent import tally
from agent.audit import GENESIS, Head
from agent.entries import IntakeKey
from agent.lanes import Lane

MAX_SESSIONS = 16  # sessions whose packet identifiers are kept; the agent itself uses two
MAX_EMPTY_LANES = 256  # beyond it, lanes without records are forgotten at the start

BASE = "audit.base"  # meta: number and hash of the last dropped audit row
AUDIT_CELL = (tally.AUDIT, tally.TOTAL, "")


@dataclass(slots=True)
class Delta:
    """The changes of one transaction."""

    cells: tally.Cells = field(default_factory=dict)
    lanes: dict[Lane, int] = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)
    intakes: list[IntakeKey] = field(default_factory=list)
    resets: list[str] = field(default_factory=list)
    rows: list[bytes] = field(default_factory=list)
    written: list[int] = field(default_factory=list)
    unneeded: list[int] = field(default_factory=list)


@dataclass(slots=True)
class Ring:
    """The last PUBLISHes of one session: `mids` gives their number in the session and their digest, oldest first."""

    taken: int = 0
    mids: dict[int, tuple[int, bytes]] = field(default_factory=dict)

    def add(self, mid: int, digest: bytes, window: int) -> None:
        """Remember one more; what lies more than `window` PUBLISHes back is forgotten."""
        self.taken += 1
        self.mids.pop(mid, None)
        self.mids[mid] = (self.taken, digest)
        while self.mids[oldest := next(iter(self.mids))][0] <= self.taken - window:
            del self.mids[oldest]

    def digests(self) -> dict[int, bytes]:
        """Packet identifiers and digests."""
        return {mid: digest for mid, (_, digest) in self.mids.copy().items()}


@dataclass(slots=True)
class Books:
    """The committed state; `window` is the intake window of each session."""

    window: int
    cells: tally.Cells = field(default_factory=dict)
    lanes: dict[Lane, int] = field(default_factory=dict)
    meta: dict[str, str] = field(default_factory=dict)
    rings: dict[str, Ring] = field(default_factory=dict)
    head: Head = field(default_factory=Head)
    base: Head = field(default_factory=Head)

    def surplus_session(self, session: str) -> str | None:
        """The session to forget when this one is new and there are too many: the one that was heard of first."""
        if session in self.rings or len(self.rings) < MAX_SESSIONS:
            return None
        return next(iter(self.rings))

    def recorded(self, key: IntakeKey) -> bool:
        """Whether this very PUBLISH is durable already."""
        ring = self.rings.get(key.session)
        return ring is not None and ring.mids.get(key.mid, (0, b""))[1] == key.digest

    @property
    def audit_bytes(self) -> int:
        """Bytes that the audit rows take."""
        return self.cells.get(AUDIT_CELL, (0, 0))[1]

    def sequence(self, regions: str) -> int:
        """The last sequence number of a set of regions; -1 before the first."""
        return self.cells.get((tally.SEQUENCE, tally.REGION, regions), (-1, 0))[0]

    def adopt(self, delta: Delta, head: Head) -> None:
        """Take over the changes of a committed transaction."""
        tally.merge(self.cells, delta.cells)
        self.lanes.update(delta.lanes)
        self.meta.update(delta.meta)
        for session in delta.resets:
            self.rings.pop(session, None)
        for key in delta.intakes:
            self.rings.setdefault(key.session, Ring()).add(key.mid, key.digest, self.window)
        self.head = head
        self.base = read_base(self.meta)


def read_cells(connection: sqlite3.Connection) -> tally.Cells:
    """All counters."""
    rows = connection.execute("SELECT state, dimension, name, number, bytes FROM counter")
    return {(state, dimension, name): (number, size) for state, dimension, name, number, size in rows}


def forget_empty_lanes(connection: sqlite3.Connection) -> None:
    """Drop lanes without records where many have gathered: a car that crosses borders for years meets many."""
    (lanes,) = connection.execute("SELECT count(*) FROM lane").fetchone()
    if lanes > MAX_EMPTY_LANES:
        connection.execute("DELETE FROM lane WHERE NOT EXISTS (SELECT 1 FROM record WHERE record.lane = lane.id)")


def read_base(meta: Mapping[str, str]) -> Head:
    """The last audit row that was dropped."""
    n, _, digest = meta.get(BASE, f"0 {GENESIS.hex()}").partition(" ")
    return Head(n=int(n), digest=bytes.fromhex(digest))


def read_head(connection: sqlite3.Connection, cells: tally.Cells, base: Head) -> Head:
    """The head of the audit chain: how many rows were written stands apart from the rows, so that a cut shows."""
    last = connection.execute("SELECT digest FROM audit ORDER BY first DESC LIMIT 1").fetchone()
    return Head(n=cells.get(AUDIT_CELL, (0, 0))[0], digest=last[0] if last else base.digest)


def load(connection: sqlite3.Connection, window: int) -> Books:
    """Read the committed state; sqlite3.Error where the disk fails, ValueError where it holds nonsense."""
    meta = dict(connection.execute("SELECT name, value FROM meta"))
    cells, base = read_cells(connection), read_base(meta)
    books = Books(
        window=window,
        cells=cells,
        lanes={(regions, route): lane for lane, regions, route in connection.execute("SELECT * FROM lane")},
        meta=meta,
        head=read_head(connection, cells, base),
        base=base,
    )
    for session, n, mid, digest in connection.execute("SELECT session, n, mid, digest FROM intake ORDER BY n"):
        ring = books.rings.setdefault(session, Ring())
        ring.taken = n - 1
        ring.add(mid, digest, window)
    return books
