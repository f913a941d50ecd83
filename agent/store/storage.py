"""The ledger's files: opening, locking, migrating, and finding what is damaged (`aside` sets it aside).

Invariants
- One process at a time writes: an advisory lock on `<name>.lock` is held from opening to closing.
- A file of a newer schema is refused and left alone; one of an older schema is migrated in one transaction.
- What is checked at the start is bounded: file size against header, the schema, the small tables. Damage that shows
  later leaves a mark (`<name>.suspect`), and the next start checks the whole file.

Layout beside the database `<name>`: `<name>-wal` and `<name>-shm` (SQLite), `<name>.files/` (large envelopes),
`<name>.seal` (sealed audit head), `<name>.reserve` (`reserve`), `<name>.lock`, `<name>.suspect`; `<name>.salvage` and
`<name>.corrupt-<n>...` (`aside`).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from agent.errors import LedgerCorruptError, LedgerError, LedgerStalledError
from agent.store.blobs import sync_directory

APPLICATION_ID = 0x52734167  # "RsAg", so that `file` and we can tell whose database it is
SCHEMA_VERSION = 2
PAGE_BYTES = 1024  # a commit of one record touches about 10 pages: 19 kB on the device; with 4096, 44 kB

# Why each: NORMAL locking lets `status` read; FULL syncs the journal at every commit; secure_delete FAST clears deleted
# content where that costs no extra write; the cache bounds memory. The journal keeps its size, so that a sync need not
# write file system metadata; hot pages are written back once for the hundreds of commits that fit into it.
PRAGMAS = """
PRAGMA journal_mode=WAL;
PRAGMA synchronous=FULL;
PRAGMA cache_size=-2048;
PRAGMA secure_delete=FAST;
PRAGMA temp_store=MEMORY;
PRAGMA trusted_schema=OFF;
"""

SHAPE = f"""
PRAGMA page_size={PAGE_BYTES};
PRAGMA auto_vacuum=INCREMENTAL;
"""

SCHEMA = f"""
CREATE TABLE record(
    key INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, lane INTEGER NOT NULL, priority INTEGER NOT NULL,
    class TEXT NOT NULL, size INTEGER NOT NULL, expires_ns INTEGER NOT NULL, recorded_ns INTEGER NOT NULL,
    sequence INTEGER NOT NULL, basis TEXT NOT NULL, topic TEXT NOT NULL, time_ns INTEGER NOT NULL,
    monotonic_ns INTEGER NOT NULL, doubt_ns INTEGER NOT NULL, boot TEXT NOT NULL, crc INTEGER NOT NULL,
    file INTEGER, envelope BLOB);
CREATE INDEX record_order ON record(lane, priority, key, expires_ns);
CREATE INDEX record_file ON record(file) WHERE file IS NOT NULL;
CREATE TABLE lane(id INTEGER PRIMARY KEY, regions TEXT NOT NULL, route TEXT NOT NULL, UNIQUE(regions, route));
CREATE TABLE counter(
    state TEXT, dimension TEXT, name TEXT, number INTEGER NOT NULL, bytes INTEGER NOT NULL,
    PRIMARY KEY(state, dimension, name)) WITHOUT ROWID;
CREATE TABLE intake(
    session TEXT, slot INTEGER, n INTEGER NOT NULL, mid INTEGER NOT NULL, digest BLOB NOT NULL,
    PRIMARY KEY(session, slot)) WITHOUT ROWID;
CREATE TABLE meta(name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE audit(first INTEGER PRIMARY KEY, count INTEGER NOT NULL, digest BLOB NOT NULL, data BLOB NOT NULL);
PRAGMA application_id={APPLICATION_ID};
"""
SMALL_TABLES = ("lane", "counter", "intake", "meta")
NAMES = frozenset((*SMALL_TABLES, "record", "audit", "record_order", "record_file"))

# What leads from each older schema to the next.
MIGRATIONS = {
    1: """
    DROP INDEX record_expiry;
    DROP INDEX record_order;
    CREATE INDEX record_order ON record(lane, priority, key, expires_ns);
    INSERT INTO counter SELECT 'sequence', 'region', regions, last, 0 FROM sequence;
    DROP TABLE sequence;
    INSERT INTO counter SELECT 'audit', 'total', '', (SELECT coalesce(max(first + count) - 1, 0) FROM audit),
        (SELECT coalesce(max(CAST(value AS INTEGER)), 0) FROM meta WHERE name = 'audit.bytes');
    DELETE FROM meta WHERE name IN ('audit.head', 'audit.bytes');
    """,
}

NONSENSE = "nonsense"  # in the mark: what was found does not show in a check by SQLite
_DAMAGE = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_DISK = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN)
_DISK_ERRNO = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


Loaded = TypeVar("Loaded")


class NonsenseError(sqlite3.DatabaseError):
    """The file is a sound database that holds what no ledger writes."""


def beside(path: Path, suffix: str) -> Path:
    """A file of the ledger's family."""
    return path.with_name(path.name + suffix)


def is_damage(exc: sqlite3.Error) -> bool:
    """Whether the file is damaged, or holds nonsense."""
    return _code(exc) in _DAMAGE


def _code(exc: sqlite3.Error) -> int:
    return sqlite3.SQLITE_CORRUPT if _is_nonsense(exc) else getattr(exc, "sqlite_errorcode", 0) & 0xFF


def _is_nonsense(exc: sqlite3.Error) -> bool:
    """Whether a check by SQLite would not find it; text that is no UTF-8 is an error of Python's, without a code."""
    no_text = isinstance(exc, sqlite3.OperationalError) and not hasattr(exc, "sqlite_errorcode")
    return no_text or isinstance(exc, NonsenseError)


@contextlib.contextmanager
def translated(path: Path, *, mark: bool = True) -> Iterator[None]:
    """SQLite's and the system's errors become LedgerErrors; damage leaves its `mark` for the next start."""
    try:
        yield
    except sqlite3.Error as exc:
        if is_damage(exc):
            if mark:
                _mark(path, exc)
            msg = f"{path}: damaged: {exc}"
            raise LedgerCorruptError(msg) from exc
        kind = LedgerStalledError if _code(exc) in _DISK else LedgerError
        msg = f"{path}: {exc}"
        raise kind(msg) from exc
    except OSError as exc:
        kind = LedgerStalledError if exc.errno in _DISK_ERRNO else LedgerError
        msg = f"{path}: {exc}"
        raise kind(msg) from exc


def _mark(path: Path, exc: sqlite3.Error) -> None:
    with contextlib.suppress(OSError):
        beside(path, ".suspect").write_text(NONSENSE if _is_nonsense(exc) else "")


def lock(path: Path) -> int:
    """Take the lock of the ledger at `path`; the descriptor holds it. LedgerError where another process has it."""
    file = os.open(beside(path, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        os.close(file)
        msg = f"{path}: another process uses this ledger"
        raise LedgerError(msg) from exc
    return file


def check_size(path: Path) -> None:
    """Raise sqlite3.DatabaseError where the database is shorter than it says, before SQLite could pad it."""
    size = path.stat().st_size if path.exists() else 0
    if not size and beside(path, ".seal").exists():
        raise NonsenseError("the database is gone, its seal is not")
    journal = beside(path, "-wal")
    if not size or (journal.exists() and journal.stat().st_size):
        return  # new, or SQLite completes it from its journal
    with path.open("rb") as file:
        header = file.read(100)  # https://www.sqlite.org/fileformat2.html: page size at 16, pages at 28
    page, pages = int.from_bytes(header[16:18], "big"), int.from_bytes(header[28:32], "big")
    if size < page * pages:
        raise NonsenseError(f"{size} bytes where {pages} pages of {page} should be")


@contextlib.contextmanager
def read_only(path: Path) -> Iterator[sqlite3.Connection]:
    """A second connection that only reads, beside the writer or without one; it leaves no mark of damage.

    LedgerError where the file cannot be read.
    """
    with translated(path, mark=False):
        if not path.is_file():
            msg = f"{path}: there is no ledger"
            raise LedgerError(msg)
        connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
        with contextlib.closing(connection):
            connection.execute("PRAGMA query_only=ON")
            yield connection


def open_checked(
    path: Path, journal_bytes: int, load: Callable[[sqlite3.Connection], Loaded]
) -> tuple[sqlite3.Connection, Loaded]:
    """Open, create or migrate, check, and `load`. sqlite3.Error, NonsenseError, OSError, LedgerError (newer schema)."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # SQLite gives its other files the same mode
    connection = sqlite3.connect(path, timeout=1, isolation_level=None, check_same_thread=False, cached_statements=64)
    try:
        version = _schema_version(connection, path)
        connection.executescript(PRAGMAS if version else SHAPE + PRAGMAS)
        connection.execute(f"PRAGMA wal_autocheckpoint={max(1, journal_bytes // PAGE_BYTES)}")
        connection.execute(f"PRAGMA journal_size_limit={journal_bytes}")
        _prepare_schema(connection, version)
        sync_directory(path.parent)
        _check(connection, path)
        return connection, load(connection)
    except (ValueError, TypeError) as exc:
        connection.close()
        raise NonsenseError(str(exc)) from exc
    except BaseException:
        connection.close()
        raise


def _schema_version(connection: sqlite3.Connection, path: Path) -> int:
    """The schema of the file, 0 for a new one; read before anything could write to it. LedgerError: a newer one."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > SCHEMA_VERSION:
        msg = f"{path}: written by a newer release (schema {version}, this one knows {SCHEMA_VERSION}); left alone"
        raise LedgerError(msg)
    if version == 0 and connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()[0]:
        raise NonsenseError("it holds another program's tables")
    return version


def _prepare_schema(connection: sqlite3.Connection, version: int) -> None:
    """Create or migrate the tables, in one transaction."""
    if version == SCHEMA_VERSION:
        return
    steps = "".join(MIGRATIONS[step] for step in range(version, SCHEMA_VERSION)) if version else SCHEMA
    connection.executescript(f"BEGIN IMMEDIATE; {steps} PRAGMA user_version={SCHEMA_VERSION}; COMMIT;")


def _check(connection: sqlite3.Connection, path: Path) -> None:
    """Raise sqlite3.DatabaseError where the bounded check finds damage."""
    if connection.execute("PRAGMA application_id").fetchone()[0] != APPLICATION_ID:
        raise NonsenseError("it is not a ledger")
    names = {name for (name,) in connection.execute("SELECT name FROM sqlite_schema")}
    if not names >= NAMES:
        raise NonsenseError(f"it lacks {sorted(NAMES - names)}")
    suspect = beside(path, ".suspect")
    marked = suspect.read_text() if suspect.exists() else None
    if marked == NONSENSE:
        raise NonsenseError("it held nonsense")
    for check in (f"quick_check('{table}')" for table in SMALL_TABLES) if marked is None else ("integrity_check",):
        found = connection.execute(f"PRAGMA {check}").fetchone()[0]
        if found != "ok":
            raise NonsenseError(str(found))
    suspect.unlink(missing_ok=True)
