"""What becomes of a record that was about to be sent, and must not go, or cannot.

It is written down beside the sending: a disk that takes nothing holds up neither the records that may go nor the watch
over the connection.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from agent.board import Board
from agent.clock import Moment
from agent.messages import Record
from agent.policy import Cleared
from agent.store.entries import Entry, Withdrawn
from agent.store.lifetime import overdue
from agent.uplink.settling import Settling


class Recall:
    """One endpoint's. `clear` is the policy's; `again` says what becomes of what it does not clear; None: withdrawn."""

    def __init__(
        self,
        settling: Settling,
        board: Board,
        *,
        clear: Callable[[Record], Cleared | None],
        again: Callable[[Record], Entry | None],
    ) -> None:
        self._settling = settling
        self._board = board
        self._clear = clear
        self._again = again

    def cleared(self, records: Iterable[Record], now: Moment) -> list[Cleared]:
        """Those that may go now. The others are decided again, or left to the sweep where their time is up."""
        found = []
        for record in records:
            if overdue(record, now):
                self._board.claimed.discard(record.id)
            elif (one := self._clear(record)) is None:
                self._settling.add(record, self._again(record) or _withdrawn(record, "policy.withdrawn"))
            else:
                found.append(one)
        return found

    def withdraw(self, record: Record, reason: str) -> None:
        """It is not sent at all, on record."""
        self._settling.add(record, _withdrawn(record, reason))


def _withdrawn(record: Record, reason: str) -> Withdrawn:
    return Withdrawn(id=record.id, reason=reason, time_ns=time.time_ns())
