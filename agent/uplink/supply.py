"""What one connection sends next: read from the ledger a little at a time, and claimed so that nobody else takes it."""

from __future__ import annotations

import time
from typing import Any

from agent.board import Board
from agent.errors import LedgerStalledError
from agent.messages import Priority, Record
from agent.store.committer import Committer
from agent.store.ledger import Ledger
from agent.uplink.parcels import Parcels
from agent.uplink.patience import Patience
from agent.uplink.shares import Shares

READ_BYTES = 128 << 10  # of each kind at a time, so that an urgent record waits behind little


class Supply:
    """The records for one connection: urgent ones, then live ones, then the backlog's share.

    The backlog is what was in the ledger when the connection began.
    """

    def __init__(  # noqa: PLR0913 - where records come from, where they go, and all that decides which
        self,
        endpoint: str,
        committer: Committer,
        board: Board,
        patience: Patience,
        *,
        shares: Shares,
        ready: Parcels,
    ) -> None:
        self._ready = ready
        self._endpoint = endpoint
        self._committer = committer
        self._board = board
        self._patience = patience
        self._shares = shares
        self._newest = committer.ledger.last_key

    async def refill(self, wanted: int) -> None:
        """Read and claim what may go next, when less than half of the wanted records are ready."""
        if not wanted or len(self._ready) > wanted // 2:
            return
        try:
            urgent, live, backlog = await self._read(wanted - len(self._ready))
        except LedgerStalledError:
            return  # the disk does not answer now; the ledger says so in the status
        self._shares.live_sent(sum(len(record.envelope) for record in live))
        self._shares.backlog_sent(sum(len(record.envelope) for record in backlog))
        self._ready.put_first(urgent)
        self._ready.put(live + backlog)

    def give_back(self) -> None:
        """Nothing more is sent: what is ready is free for others."""
        self._board.claimed.difference_update(record.id for record in self._ready.clear())

    async def _read(self, room: int) -> tuple[list[Record], list[Record], list[Record]]:
        now, newest, shares = time.monotonic(), self._newest, self._shares
        taken = self._patience.aside(now) | self._board.claimed
        down = frozenset(self._board.down)

        def read(ledger: Ledger) -> tuple[list[Record], list[Record], list[Record]]:
            def pending(limit: int, most: int = READ_BYTES, **which: Any) -> list[Record]:  # noqa: ANN401 - the ledger's
                rows = ledger.pending(self._endpoint, limit=limit, down=down, skip=skip, max_bytes=most, **which)
                skip.update(row.record.id for row in rows)
                return [row.record for row in rows]

            skip = set(taken)
            urgent = pending(room, priority=Priority.URGENT)
            live = pending(room, after=newest) if len(urgent) < room else []
            waiting = sum(len(record.envelope) for record in live)
            allowed = min(shares.allowed(now, live=waiting), READ_BYTES) if len(urgent) < room else 0
            backlog = pending(room, int(allowed), until=newest) if allowed > 0 else []
            return urgent, live, backlog

        urgent, live, backlog = await self._committer.call(read)
        return self._claim(urgent), self._claim(live), self._claim(backlog)

    def _claim(self, records: list[Record]) -> list[Record]:
        """Those that no other uplink has taken meanwhile; they are ours now."""
        free = [record for record in records if record.id not in self._board.claimed]
        self._board.claimed.update(record.id for record in free)
        return free
