"""The small part of the ledger that is kept in memory as well: counters, numbering, lanes, recent packet identifiers.

Invariant: what stands here is what the last committed transaction left on the disk. A transaction collects its changes
in a `Delta`, writes them, and hands them over with `adopt` only after the commit. Its size does not depend on the
backlog.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from agent.store import tally
from agent.store.audit import GENESIS, Head
from agent.store.entries import IntakeKey
from agent.store.lanes import Lane

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
            ring = self.rings.get(key.session) or self.rings.setdefault(key.session, Ring())
            ring.add(key.mid, key.digest, self.window)
        self.head = head
        self.base = read_base(self.meta)


def _typed(connection: sqlite3.Connection, query: str, *types: type) -> Iterator[tuple[Any, ...]]:
    """Rows whose values have these types; ValueError for any other: SQLite stores what it is given."""
    for row in connection.execute(query):
        if tuple(map(type, row)) != types:
            msg = f"{query}: {row!r} is nonsense"
            raise ValueError(msg)
        yield row


def read_cells(connection: sqlite3.Connection) -> tally.Cells:
    """All counters. ValueError where they contradict each other or the records."""
    rows = _typed(connection, "SELECT state, dimension, name, number, bytes FROM counter", str, str, str, int, int)
    cells = {(state, dimension, name): (number, size) for state, dimension, name, number, size in rows}
    counts = tally.counts(cells.items())
    some = connection.execute("SELECT EXISTS (SELECT 1 FROM record)").fetchone() == (1,)
    if not counts.conserved or some != (counts.pending + counts.held > 0) or min(cells.values(), default=(0, 0))[0] < 0:
        msg = "the counters contradict each other or the records"
        raise ValueError(msg)
    return cells


def read_lanes(connection: sqlite3.Connection) -> dict[Lane, int]:
    """All lanes."""
    rows = _typed(connection, "SELECT id, regions, route FROM lane", int, str, str)
    return {(regions, route): lane for lane, regions, route in rows}


def read_rings(connection: sqlite3.Connection, window: int) -> dict[str, Ring]:
    """The last PUBLISHes of each session."""
    rings: dict[str, Ring] = {}
    rows = _typed(connection, "SELECT session, n, mid, digest FROM intake ORDER BY n", str, int, int, bytes)
    for session, n, mid, digest in rows:
        ring = rings.setdefault(session, Ring())
        ring.taken = n - 1
        ring.add(mid, digest, window)
    return rings


def read_meta(connection: sqlite3.Connection) -> dict[str, str]:
    """Notes, and the base of the audit chain."""
    return dict(_typed(connection, "SELECT name, value FROM meta", str, str))


def forget_empty_lanes(connection: sqlite3.Connection) -> None:
    """Drop lanes without records where many have gathered: a car that crosses borders for years meets many."""
    (lanes,) = connection.execute("SELECT count(*) FROM lane").fetchone()
    if lanes > MAX_EMPTY_LANES:
        connection.execute("DELETE FROM lane WHERE NOT EXISTS (SELECT 1 FROM record WHERE record.lane = lane.id)")


def read_base(meta: Mapping[str, str]) -> Head:
    """The last audit row that was dropped."""
    n, _, digest = meta.get(BASE, f"0 {GENESIS.hex()}").partition(" ")
    return Head(n=int(n), digest=bytes.fromhex(digest))


def read_head(connection: sqlite3.Connection, meta: Mapping[str, str]) -> Head:
    """The head of the audit chain: how many rows were written stands apart from the rows, so that a cut shows.

    ValueError where the count is missing.
    """
    written = connection.execute("SELECT number FROM counter WHERE state = 'audit'").fetchone() or (0,)
    last = connection.execute("SELECT first + count - 1, digest FROM audit ORDER BY first DESC LIMIT 1").fetchone()
    base = read_base(meta)
    n, digest = last or (base.n, base.digest)
    if (type(written[0]), type(n), type(digest)) != (int, int, bytes) or max(n, base.n) > written[0]:
        msg = f"the audit chain ends at {n!r}, its count says {written[0]!r}"
        raise ValueError(msg)
    return Head(n=written[0], digest=digest)


def load(connection: sqlite3.Connection, window: int) -> Books:
    """Read the committed state; sqlite3.Error where the disk fails, ValueError where it holds nonsense."""
    meta = read_meta(connection)
    return Books(
        window=window,
        cells=read_cells(connection),
        lanes=read_lanes(connection),
        meta=meta,
        rings=read_rings(connection, window),
        head=read_head(connection, meta),
        base=read_base(meta),
    )
