"""The ledger's housekeeping between transactions: the audit seal and its bound, disk space given back, stray files.

Each call does a bounded amount of work, so that it can run beside delivery.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from pathlib import Path

import msgspec

from agent.audit import Head, Seal
from agent.blobs import Blobs, write_synced
from agent.books import Books
from agent.storage import beside
from agent.transaction import AUDIT_OVERHEAD, Transaction

VACUUM_PAGES = 2048  # 8 MiB at most per call
SPARE_PAGES = 256  # 1 MiB of free pages is kept for the next records: moving pages wears the flash
ORPHAN_FILES = 1000  # files looked at per call
AUDIT_KEPT = 7 / 8  # of the limit is left after pruning, so that it happens seldom


def write_seal(path: Path, head: Head, time_ns: int, sign: Callable[[bytes], bytes] | None) -> None:
    """Keep the head outside the database, signed where a key is configured."""
    seal = Seal(head=head, time_ns=time_ns)
    signature = sign(seal.signed_bytes()) if sign else b""
    fields = {"n": head.n, "hash": head.digest.hex(), "time_ns": time_ns, "signature": signature.hex()}
    write_synced(beside(path, ".seal"), msgspec.json.encode(fields, order="sorted") + b"\n")


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


def prune_audit(
    connection: sqlite3.Connection, transaction: Transaction, books: Books, limit: int, now_ns: int
) -> None:
    """Drop the oldest audit blocks while the rows take more than `limit` bytes; leave a checkpoint in the chain."""
    excess = books.audit_bytes - int(limit * AUDIT_KEPT)
    if books.audit_bytes <= limit:
        return
    rows = connection.execute("SELECT first, count, digest, length(data) FROM audit ORDER BY first")
    freed, base = 0, books.base
    for first, count, digest, size in rows:
        if freed >= excess or first + count > books.head.n:
            break
        freed += size + AUDIT_OVERHEAD
        base = Head(n=first + count - 1, digest=digest)
    transaction.drop_audit(base, freed, now_ns)


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
