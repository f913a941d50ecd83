"""Tables as transactions write them: many rows a statement, since a statement costs more than a row.

Each step of a statement lets go of the interpreter lock, and may wait for the event loop to get it back. Rows of
`record` that were inserted wait for company until `flush`, which every read of the table needs before it.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import TypeVar

import msgspec

from agent.store.lanes import Gone

T = TypeVar("T")

MOST_ROWS = 32  # a statement: its parameters stay below SQLite's oldest limit of 999

_COLUMNS = """id, lane, priority, class, size, expires_ns, recorded_ns, sequence, basis, topic,
    time_ns, monotonic_ns, doubt_ns, boot, crc, file, envelope"""
_UPDATE = f"UPDATE record SET ({_COLUMNS}) = (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?) WHERE key = ?"  # noqa: S608 - constants
_INSERT = f"INSERT INTO record({_COLUMNS}, key) VALUES {{}}"  # noqa: S608 - likewise
_DELETE = """DELETE FROM record WHERE id IN (SELECT value FROM json_each(?))
    RETURNING key, id, lane, priority, class, size, file"""


class ClashError(sqlite3.IntegrityError):
    """A row contradicts the table; `index` is what it was inserted with."""

    def __init__(self, index: int, message: str) -> None:
        super().__init__(message)
        self.index = index


class Rows:
    """The rows of one transaction."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._waiting: list[tuple[int, tuple[object, ...]]] = []
        self._taken: dict[str, Gone] = {}

    def insert(self, index: int, columns: tuple[object, ...]) -> None:
        """A new row, its key last."""
        self._waiting.append((index, columns))
        if len(self._waiting) >= MOST_ROWS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait; ClashError for the first that contradicts the table."""
        waiting, self._waiting = self._waiting, []
        for part in _parts(waiting):
            self._write(part)

    def _write(self, rows: Sequence[tuple[int, tuple[object, ...]]]) -> None:
        try:
            write_rows(self._connection, _INSERT, [columns for _, columns in rows])
        except sqlite3.IntegrityError as exc:
            if len(rows) == 1:
                raise ClashError(rows[0][0], str(exc)) from exc
            for row in rows:  # nothing of the statement was kept: one by one they tell which it is
                self._write([row])

    def update(self, key: int, columns: tuple[object, ...]) -> None:
        """Replace a row."""
        self._connection.execute(_UPDATE, (*columns, key))

    def take(self, names: Sequence[str]) -> None:
        """Take the rows with these ids out of the table, for `taken` to give."""
        self.flush()
        if names:
            found: list[Gone] = self._connection.execute(_DELETE, (msgspec.json.encode(names).decode(),)).fetchall()
            self._taken.update((row[1], row) for row in found)

    def taken(self, name: str) -> Gone | None:
        """The row with this id, which is not in the table any more; None where there was none."""
        if name not in self._taken:
            self.take([name])
        return self._taken.pop(name, None)


def write_rows(connection: sqlite3.Connection, statement: str, rows: Sequence[tuple[object, ...]]) -> None:
    """Execute a statement in whose `VALUES {}` all rows stand, in as few parts as can be."""
    for part in _parts(rows):
        values = [value for row in part for value in row]
        connection.execute(_statement(statement, len(part), len(part[0])), values)


def _parts(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    """Consecutive parts whose lengths are powers of two: few different statements, which all stay prepared."""
    at = 0
    while at < len(rows):
        size = min(1 << (len(rows) - at).bit_length() - 1, MOST_ROWS)
        yield rows[at : at + size]
        at += size


@lru_cache
def _statement(text: str, rows: int, columns: int) -> str:
    row = f"({', '.join('?' * columns)})"
    return text.format(", ".join([row] * rows))
