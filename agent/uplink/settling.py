"""What an endpoint, or the policy, said of records, on its way into the ledger.

Invariants
- A record stays claimed until what was said of it is durable: no uplink sends it a second time meanwhile.
- All that is said in one turn of the loop is handed over at once; it waits in the committer for company.
- What ends records waits for nothing that needs room on the disk.
- What waits because of the policy, or for another endpoint, is bounded: no more should be read while it is `full`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from agent.board import Board
from agent.errors import LedgerError
from agent.messages import Record
from agent.mqtt.packets import Puback
from agent.store.committer import Committer
from agent.store.entries import Delivered, Ending, Entry, Redecided, Rejected

FINISH_SECONDS = 2.0  # for which the disk is waited for when a connection ends
# MQTT 5.0, 3.4.2.1: Unspecified, Implementation specific, Not authorized, Packet identifier in use, Quota exceeded.
# An access list can be mended; a record that was thrown away because of it cannot.
RETRY_LATER = frozenset({0x80, 0x83, 0x87, 0x91, 0x97})
MOST_BYTES = 1 << 20  # of envelopes that wait; beyond it come only those that were read before


def answer(record: Record, endpoint: str, puback: Puback, now_ns: int) -> Entry | None:
    """What the ledger is told of a record; None: it stays pending.

    What one endpoint will not take, the others of its route are still asked for.
    """
    if puback.accepted:
        return Delivered(id=record.id, endpoint=endpoint, code=puback.code, time_ns=now_ns)
    if puback.code in RETRY_LATER:
        return None
    others = tuple(name for name in record.route if name != endpoint)
    if others:
        changed = msgspec.structs.replace(record, route=others)
        return Redecided(record=changed, reason=f"endpoint.rejected-{puback.code}", time_ns=now_ns)
    return Rejected(id=record.id, endpoint=endpoint, code=puback.code, time_ns=now_ns)


class _Said(NamedTuple):
    """`weight`: bytes that count towards what may wait."""

    record: str
    entry: Entry | None
    weight: int

    @property
    def changes(self) -> bool:
        """Whether the record stays, but for another endpoint or until its region is known."""
        return self.entry is not None and not isinstance(self.entry, Ending)


class Settling:
    """One endpoint's answers. `told` is called where they stop the sending less, or for good (`broken`)."""

    def __init__(self, name: str, committer: Committer, board: Board, told: Callable[[], None]) -> None:
        self.broken: LedgerError | None = None
        self._name = name
        self._committer = committer
        self._board = board
        self._told = told
        self._said: list[_Said] = []
        self._waiting_bytes = 0
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def full(self) -> bool:
        """Whether as much waits for the disk as may, deliveries aside."""
        return self._waiting_bytes > MOST_BYTES

    def add(self, record: Record, entry: Entry | None) -> None:
        """Write down what becomes of a record; None: there is nothing to write down, the record is free."""
        if not self._said:
            asyncio.get_running_loop().call_soon(self._begin)
        weight = 0 if entry is None or isinstance(entry, Delivered) else len(record.envelope)
        self._waiting_bytes += weight
        self._said.append(_Said(record.id, entry, weight))

    async def finish(self) -> None:
        """Return when all that was said is durable, or failed, FINISH_SECONDS later at most; it waits for no company.

        What a disk that stalls has not taken by then is still on its way, and its records stay claimed. Where the agent
        ends before it is durable, they are sent again: at least once. Cancelling is safe.
        """
        self._begin()
        with self._committer.hurried():
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=FINISH_SECONDS)

    def _begin(self) -> None:
        said, self._said = self._said, []
        for some in ([one for one in said if not one.changes], [one for one in said if one.changes]):
            if some:
                task = asyncio.create_task(self._settle(some), name=f"settle-{self._name}")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _settle(self, said: list[_Said]) -> None:
        try:
            await self._committer.submit(*(one.entry for one in said if one.entry is not None))
        except LedgerError as exc:
            self.broken = exc
        else:
            self._board.claimed.difference_update(one.record for one in said)
            if any(one.entry is None or one.changes for one in said):  # some may go now, here or elsewhere
                self._board.wake(self._board.stored)
        stopped = self.full or self.broken is not None
        self._waiting_bytes -= sum(one.weight for one in said)
        if stopped:
            self._told()
