"""What becomes of a record that was about to be sent, and must not go, or cannot.

It is written down beside the sending: a disk that takes nothing holds up neither the records that may go nor the watch
over the connection. What waits for the disk is bounded: while it is `full`, no more records should be read.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from agent.board import Board
from agent.messages import Record
from agent.store.entries import Entry, Withdrawn
from agent.uplink.settling import Settling

MOST_BYTES = 1 << 20  # of envelopes that wait; beyond it are only those that were read before


class Recall:
    """One endpoint's. `again` says what becomes of a record that the policy no longer lets go here; None: withdrawn."""

    def __init__(self, settling: Settling, board: Board, again: Callable[[Record], Entry | None]) -> None:
        self._settling = settling
        self._board = board
        self._again = again
        self._waiting: dict[str, int] = {}

    @property
    def full(self) -> bool:
        """Whether as much waits for the disk as may."""
        claimed = self._board.claimed
        self._waiting = {record: size for record, size in self._waiting.items() if record in claimed}
        return sum(self._waiting.values()) > MOST_BYTES

    def decide_again(self, record: Record) -> None:
        """The policy does not permit it here any more."""
        self._end(record, self._again(record) or _withdrawn(record, "policy.withdrawn"))

    def withdraw(self, record: Record, reason: str) -> None:
        """It is not sent at all, on record."""
        self._end(record, _withdrawn(record, reason))

    def _end(self, record: Record, entry: Entry) -> None:
        self._waiting[record.id] = len(record.envelope)
        self._settling.add(record.id, entry)


def _withdrawn(record: Record, reason: str) -> Withdrawn:
    return Withdrawn(id=record.id, reason=reason, time_ns=time.time_ns())
