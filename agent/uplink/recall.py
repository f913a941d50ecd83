"""What becomes of a record that was about to be sent, and must not go, or cannot."""

from __future__ import annotations

import time
from collections.abc import Callable

from agent.board import Board
from agent.messages import Record
from agent.store.committer import Committer
from agent.store.entries import Entry, Redecided, Withdrawn


class Recall:
    """One endpoint's. `again` says what becomes of a record that the policy no longer lets go here; None: withdrawn."""

    def __init__(self, committer: Committer, board: Board, again: Callable[[Record], Entry | None]) -> None:
        self._committer = committer
        self._board = board
        self._again = again

    async def decide_again(self, record: Record) -> None:
        """The policy does not permit it here any more."""
        entry = self._again(record)
        if entry is None:
            await self.withdraw(record, "policy.withdrawn")
            return
        await self._committer.submit(entry)
        self._board.claimed.discard(record.id)
        self._board.wake(entry.record.route if isinstance(entry, Redecided) else ())

    async def withdraw(self, record: Record, reason: str) -> None:
        """It is not sent at all, on record."""
        await self._committer.submit(Withdrawn(id=record.id, reason=reason, time_ns=time.time_ns()))
        self._board.claimed.discard(record.id)
