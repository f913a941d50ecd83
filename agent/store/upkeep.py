"""The ledger's housekeeping between transactions: the audit seal and its bound, disk space given back, stray files.

Each call does a bounded amount of work, so that it can run beside delivery.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from agent.store.audit import Head, Seal
from agent.store.blobs import Blobs, write_synced
from agent.store.books import Books
from agent.store.storage import beside
from agent.store.transaction import AUDIT_OVERHEAD

VACUUM_PAGES = 2048  # 8 MiB at most per call
SPARE_PAGES = 256  # 1 MiB of free pages is kept for the next records: moving pages wears the flash
ORPHAN_FILES = 1000  # files looked at per call
AUDIT_KEPT = 7 / 8  # of the limit is left after pruning, so that it happens seldom


class Sealer:
    """Keeps the audit head outside the database, signed where a key is configured; `sealed`: up to which row."""

    def __init__(self, path: Path, sign: Callable[[bytes], bytes] | None, interval_s: float) -> None:
        self._path = path
        self.sign = sign
        self._interval_s = interval_s
        self._due = 0.0
        self.sealed = 0

    def compare(self, head: Head) -> tuple[str, str]:
        """What is wrong with the seal that is there, and what the chain should remember of it; empty: nothing."""
        try:
            seal = read_seal(self._path)
        except ValueError as exc:
            return f"the seal is not readable: {exc}", ""
        self.sealed = min(seal.head.n, head.n) if seal else 0
        if seal is None or seal.head.n <= head.n:
            return "", ""
        what = f"sealed at {seal.head.n} {seal.head.digest.hex()}, found {head.n}"
        return f"{self._path.name} is older than its seal: {what}", what

    def seal(self, head: Head, *, now: bool) -> None:
        """Seal a head that moved, `now` or when it is due. OSError."""
        if head.n == self.sealed or not (now or time.monotonic() >= self._due):
            return
        seal = Seal(head=head, time_ns=time.time_ns())
        signature = self.sign(seal.signed_bytes()) if self.sign else b""
        fields = {"n": head.n, "hash": head.digest.hex(), "time_ns": seal.time_ns, "signature": signature.hex()}
        write_synced(beside(self._path, ".seal"), msgspec.json.encode(fields, order="sorted") + b"\n")
        self.sealed, self._due = head.n, time.monotonic() + self._interval_s


def read_seal(path: Path) -> Seal | None:
    """The seal of the ledger at `path`; None where there is none. ValueError where it is nonsense."""
    try:
        fields = msgspec.json.decode(beside(path, ".seal").read_bytes(), type=dict[str, str | int])
        head = Head(n=int(fields["n"]), digest=bytes.fromhex(str(fields["hash"])))
        return Seal(head=head, time_ns=int(fields["time_ns"]), signature=bytes.fromhex(str(fields["signature"])))
    except FileNotFoundError:
        return None
    except (msgspec.MsgspecError, KeyError) as exc:
        msg = f"{beside(path, '.seal')}: {exc}"
        raise ValueError(msg) from exc


def droppable_audit(connection: sqlite3.Connection, books: Books, limit: int, sealed: int) -> tuple[Head, int] | None:
    """The last row to drop and the bytes that this frees, where the audit rows take more than `limit` bytes.

    Only rows that a seal covers are dropped: the seal must name a row that is still there, or the last dropped one.
    """
    if books.audit_bytes <= limit:
        return None
    excess, freed, base = books.audit_bytes - int(limit * AUDIT_KEPT), 0, books.base
    rows = connection.execute("SELECT first, count, digest, length(data) FROM audit ORDER BY first")
    for first, count, digest, size in rows:
        if freed >= excess or first + count - 1 > sealed:
            break
        freed += size + AUDIT_OVERHEAD
        base = Head(n=first + count - 1, digest=digest)
    return (base, freed) if freed else None


def give_space_back(connection: sqlite3.Connection, path: Path) -> int:
    """Return free pages to the file system where they are many; bytes by which the file shrank."""
    free, pages = (int(connection.execute(f"PRAGMA {name}").fetchone()[0]) for name in ("freelist_count", "page_count"))
    if free <= max(SPARE_PAGES, pages // 4):
        return 0
    before = path.stat().st_size
    # A script, because `execute` steps the pragma once, which frees a single page.
    connection.executescript(f"PRAGMA incremental_vacuum({min(VACUUM_PAGES, free - SPARE_PAGES // 2)})")
    connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
    return max(0, before - path.stat().st_size)


def remove_strays(connection: sqlite3.Connection, blobs: Blobs) -> int:
    """Unlink files that no record names, left by a crash; how many."""
    numbers = blobs.numbers(ORPHAN_FILES)
    strays = [n for n in numbers if not connection.execute("SELECT 1 FROM record WHERE file = ?", (n,)).fetchone()]
    blobs.remove(strays)
    return len(strays)
