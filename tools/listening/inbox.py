"""What has been received, in one SQLite file that all consumers of an output folder share.

Invariants:
- A record that `take` calls fresh is on the disk (fsync) when `take` returns, and no later call calls it fresh again
  as long as it is among the `remember` latest; so duplicates are dropped across processes and restarts.
- A row leaves the file only after `written`, when the output file that holds it has its final name. A roll that was
  cut short is given out again with the same number and the same rows, so its files get the same names and contents.

Layout: seen(key): the first 16 bytes of SHA-256 of source and id. streams: per source and region value the lowest and
highest sequence and how many came, from which gaps follow in any order of arrival. spool: rows not yet in a file.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from agent.wire.attributes import texts
from agent.wire.envelope import Envelope

KEY_BYTES = 16  # 128 bits of SHA-256: no accidental collision among 10^9 records
BUSY_SECONDS = 60.0  # how long one consumer waits for another's transaction
_SCHEMA = """
CREATE TABLE IF NOT EXISTS seen (n INTEGER PRIMARY KEY, key BLOB NOT NULL UNIQUE);
CREATE TABLE IF NOT EXISTS streams (source TEXT, region TEXT, first INTEGER, last INTEGER, received INTEGER,
                                    PRIMARY KEY (source, region)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spool (n INTEGER PRIMARY KEY AUTOINCREMENT, consumer TEXT NOT NULL, roll INTEGER,
                                  fields TEXT NOT NULL, data BLOB NOT NULL);
CREATE INDEX IF NOT EXISTS spool_of ON spool (consumer, roll);
"""
_STREAM = """
INSERT INTO streams VALUES (?1, ?2, ?3, ?3, 1) ON CONFLICT DO UPDATE SET
    first = min(first, ?3), last = max(last, ?3), received = received + 1
"""
_ROLL = """
UPDATE spool SET roll = (SELECT min(n) FROM spool WHERE consumer = ?1)
WHERE n IN (SELECT n FROM (SELECT n, sum(length(data) + length(fields)) OVER (ORDER BY n) AS bytes
                           FROM spool WHERE consumer = ?1 ORDER BY n LIMIT ?2) WHERE bytes <= ?3)
   OR n = (SELECT min(n) FROM spool WHERE consumer = ?1)
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A good record and the topic that it came on."""

    topic: str
    envelope: Envelope


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A record on its way into a file: the attributes by name, with `topic` and, where signed, `keyid`."""

    fields: dict[str, str]
    data: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Roll:
    """Rows of one consumer that go into files together."""

    number: int
    rows: list[Row]


@contextmanager
def _alone(path: Path | None) -> Iterator[None]:
    """No other process opens this file meanwhile: whoever finds it turning into WAL gets an error at once, no wait."""
    if path is None:
        yield
        return
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


class Inbox:
    """One consumer's view of the file; `path` None keeps everything in memory and spools nothing."""

    def __init__(self, path: Path | None, consumer: str, *, remember: int = 1_000_000) -> None:
        self._consumer = consumer
        self._remember = remember
        self._spools = path is not None
        with _alone(path):
            self._db = sqlite3.connect(path or ":memory:", timeout=BUSY_SECONDS, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file; what was taken stays in it."""
        self._db.close()

    def take(self, arrivals: Sequence[Arrival]) -> list[bool]:
        """Keep what is fresh, in one transaction; whether each arrival was fresh."""
        with self._transaction():
            fresh = [self._claim(arrival) for arrival in arrivals]
            self._db.execute("DELETE FROM seen WHERE n <= (SELECT max(n) FROM seen) - ?", (self._remember,))
        return fresh

    def roll(self, most_rows: int, most_bytes: int) -> Roll | None:
        """Give the rows for the next files: a roll that was cut short, else the oldest rows; None if there are none.

        At least one row, and no more than the limits allow beyond it.
        """
        number = self._open_roll()
        if number is None:
            with self._transaction():
                self._db.execute(_ROLL, (self._consumer, most_rows, most_bytes))
            number = self._open_roll()
        if number is None:
            return None
        found = self._db.execute(
            "SELECT fields, data FROM spool WHERE consumer = ? AND roll = ? ORDER BY n", (self._consumer, number)
        )
        return Roll(number=number, rows=[Row(fields=json.loads(fields), data=data) for fields, data in found])

    def written(self, roll: Roll) -> None:
        """Forget the rows of a roll whose files are in place."""
        with self._transaction():
            self._db.execute("DELETE FROM spool WHERE consumer = ? AND roll = ?", (self._consumer, roll.number))

    def spooled(self) -> int:
        """How many rows of this consumer are not in a file yet."""
        [[count]] = self._db.execute("SELECT count(*) FROM spool WHERE consumer = ?", (self._consumer,))
        return int(count)

    def missing(self) -> dict[str, int]:
        """Sequence numbers never seen between the lowest and the highest of each stream, by region value."""
        found = self._db.execute("SELECT region, sum(max(last - first + 1 - received, 0)) FROM streams GROUP BY region")
        return dict(found.fetchall())

    def _claim(self, arrival: Arrival) -> bool:
        attributes = arrival.envelope.attributes
        fields = texts(attributes)
        key = hashlib.sha256(f"{attributes.source}\0{attributes.id}".encode()).digest()[:KEY_BYTES]
        if self._db.execute("INSERT OR IGNORE INTO seen (key) VALUES (?)", (key,)).rowcount != 1:
            return False
        self._db.execute(_STREAM, (attributes.source, fields["dataregion"], attributes.sequence))
        if self._spools:
            fields["topic"] = arrival.topic
            if arrival.envelope.keyid is not None:
                fields["keyid"] = arrival.envelope.keyid
            row = (self._consumer, json.dumps(fields), arrival.envelope.data)
            self._db.execute("INSERT INTO spool (consumer, fields, data) VALUES (?, ?, ?)", row)
        return True

    def _open_roll(self) -> int | None:
        [[number]] = self._db.execute(
            "SELECT min(roll) FROM spool WHERE consumer = ? AND roll IS NOT NULL", (self._consumer,)
        )
        return None if number is None else int(number)

    def _transaction(self) -> _Transaction:
        return _Transaction(self._db)


class _Transaction:
    """BEGIN IMMEDIATE ... COMMIT, or ROLLBACK where the block fails."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: object, *_: object) -> None:
        self._db.execute("COMMIT" if kind is None else "ROLLBACK")
