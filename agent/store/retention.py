"""What leaves the ledger without having been delivered: expiry at the TTL (`lifetime`), eviction at a byte limit.

Eviction takes the least urgent records first and among these the oldest, only from the lane that is above its limit,
or from all lanes where the whole spool is. Every one is counted and audited. Both run inside a caller's transaction.
"""

from __future__ import annotations

import heapq
import itertools
import sqlite3
from collections.abc import Collection, Iterator, Mapping

from agent.clock import Moment
from agent.messages import Priority, State
from agent.store import lifetime, tally
from agent.store.entries import LedgerLimits
from agent.store.lanes import Gone, Lane
from agent.store.transaction import Transaction

LIMIT = "ledger.limit"
TTL = "ledger.ttl"
DAMAGED = "ledger.damaged"
EVICT_RECORDS = 10_000  # per transaction: more than one can add; only limits that were lowered need several

# `record_order` tells which are due: 100,000 records are looked through in 20 ms, so no index is kept for it.
_OLD = f"""SELECT key, id, lane, priority, class, size, file, {lifetime.UNDATED}, {lifetime.MADE_NS}
    FROM record INDEXED BY record_order WHERE {lifetime.DUE} LIMIT ?"""  # noqa: S608 - constants
_NAMED = "SELECT key, id, lane, priority, class, size, file FROM record WHERE key = ?"
_OLDEST = """SELECT key, id, lane, priority, class, size, file FROM record
    WHERE lane = ? AND priority = ? AND key > ? ORDER BY key LIMIT ?"""


def expire(connection: sqlite3.Connection, transaction: Transaction, now: Moment, limit: int) -> int:
    """End records whose time has come, and date those without a date; how many, up to `limit`."""
    arguments = lifetime.arguments(now)
    rows = connection.execute(_OLD, (*arguments, *arguments, limit)).fetchall()
    for row in rows:
        gone, (undated, made_ns) = row[:7], row[7:]
        if undated:
            transaction.date(gone, made_ns, now.time_ns)
        else:
            transaction.remove(gone, State.EXPIRED, TTL, now.time_ns)
    return len(rows)


def make_room(connection: sqlite3.Connection, transaction: Transaction, limits: LedgerLimits, time_ns: int) -> int:
    """Evict until every lane that has grown, and the spool, keep their limits; how many records went."""
    lanes = transaction.lanes()
    evicted = 0
    for regions in {name for _, dimension, name in transaction.delta.cells if dimension == tally.REGION}:
        excess = transaction.spooled_bytes(tally.REGION, regions) - limits.lane_bytes
        if excess > 0:
            own = {lane: number for lane, number in lanes.items() if lane[0] == regions}
            evicted += _evict(connection, transaction, own, excess, time_ns)
    excess = transaction.spooled_bytes() - limits.total_bytes
    if excess > 0:
        evicted += _evict(connection, transaction, lanes, excess, time_ns)
    return evicted


def drop_damaged(connection: sqlite3.Connection, transaction: Transaction, keys: Collection[int], time_ns: int) -> None:
    """Evict records whose envelopes are lost or altered on the disk."""
    for key in keys:
        for row in connection.execute(_NAMED, (key,)).fetchall():
            transaction.remove(row, State.EVICTED, DAMAGED, time_ns)


def _evict(
    connection: sqlite3.Connection, transaction: Transaction, lanes: Mapping[Lane, int], excess: int, time_ns: int
) -> int:
    evicted = 0
    for row in itertools.islice(_candidates(connection, lanes), EVICT_RECORDS):
        if excess <= 0:
            break
        excess -= transaction.remove(row, State.EVICTED, LIMIT, time_ns)
        evicted += 1
    return evicted


def _candidates(connection: sqlite3.Connection, lanes: Mapping[Lane, int]) -> Iterator[Gone]:
    """Records in the order in which they may be evicted."""
    for priority in sorted(Priority, reverse=True):
        yield from heapq.merge(*(_oldest(connection, lane, priority) for lane in lanes.values()))


def _oldest(connection: sqlite3.Connection, lane: int, priority: Priority, step: int = 64) -> Iterator[Gone]:
    after = 0
    while rows := connection.execute(_OLDEST, (lane, int(priority), after, step)).fetchall():
        yield from rows
        after = rows[-1][0]
