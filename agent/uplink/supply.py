"""What one connection sends next: claimed so that nobody else takes it, and no more of it than may soon go.

Invariants
- A record comes from memory, as it was stored, where all that the ledger held for the endpoint before it has been read
  or taken; otherwise from the ledger, in order. The committer tells of a stored record before it gives the result of a
  later read: so after a read to the end, all that was refused before is among what was read.
- Of each kind no more than READ_BYTES wait, or one record.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Any, NamedTuple

from agent import boot
from agent.board import Board
from agent.errors import LedgerStalledError
from agent.messages import Priority, Record
from agent.store.committer import Committer
from agent.store.ledger import Ledger
from agent.uplink.parcels import Parcels
from agent.uplink.patience import Patience
from agent.uplink.shares import Shares

READ_BYTES = 128 << 10  # of each kind at a time, so that an urgent record waits behind little
LOOK_SECONDS = 0.5  # after which the ledger is read again though nothing says that there is more


class _Found(NamedTuple):
    """What was read; `more`: not to the end."""

    urgent: list[Record]
    live: list[Record]
    backlog: list[Record]
    more: bool


async def waits(committer: Committer, endpoint: str, down: Collection[str]) -> bool:
    """Whether the ledger has a record for the endpoint now."""
    which: dict[str, Any] = {"limit": 1, "down": frozenset(down), "now": boot.moment()}
    return bool(await committer.call(lambda ledger: ledger.pending(endpoint, **which)))


class Supply:
    """The records for one connection: urgent ones, then live ones, then the backlog's share.

    The backlog is what was in the ledger when the connection began. What was read to its end is read again only after
    news; time alone frees some records (`Patience.aside`). From its making until `give_back` it is offered what is
    stored. `level`: nothing in the ledger waits to be read, as far as was told.
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
        self._wanted = 0
        self.level = False
        self._look_at = 0.0  # monotonic seconds
        board.takers[endpoint] = self._take

    async def refill(self, wanted: int) -> None:
        """Read and claim what may go next, when less than half of the wanted records are ready; 0: nothing may."""
        self._wanted = wanted
        if not wanted or len(self._ready) > wanted // 2:
            return
        if self.level and time.monotonic() < self._look_at and self._endpoint not in self._board.news:
            return
        try:
            found = await self._read(wanted - len(self._ready))
        except LedgerStalledError:
            self.level = False
            return  # the disk does not answer now; the ledger says so in the status
        self.level = not found.more
        self._look_at = time.monotonic() + LOOK_SECONDS
        urgent, live, backlog = (self._claim(records) for records in (found.urgent, found.live, found.backlog))
        self._shares.live_sent(sum(len(record.envelope) for record in live))
        self._shares.backlog_sent(sum(len(record.envelope) for record in backlog))
        self._ready.put_first(urgent)
        self._ready.put(live + backlog)

    def _take(self, record: Record) -> bool:
        """Whether a record that was just stored goes from here; if not, it is read when it is its turn."""
        size = len(record.envelope)
        room = len(self._ready) < self._wanted and (not self._ready or self._ready.bytes + size <= READ_BYTES)
        self.level = self.level and room
        if not self.level or record.id in self._board.claimed:
            return False
        self._board.claimed.add(record.id)
        self._shares.live_sent(size)
        if record.priority is Priority.URGENT:
            self._ready.put_first([record])
        else:
            self._ready.put([record])
        return True

    def give_back(self) -> None:
        """Nothing more is sent: what is ready is free for others."""
        self._board.takers.pop(self._endpoint, None)
        self._board.claimed.difference_update(record.id for record in self._ready.clear())

    async def _read(self, room: int) -> _Found:
        now, newest, shares = time.monotonic(), self._newest, self._shares
        self._board.news.discard(self._endpoint)
        skip = set(self._patience.aside(now) | self._board.claimed)
        down, moment = frozenset(self._board.down), boot.moment()

        def read(ledger: Ledger) -> _Found:
            more = False

            def pending(limit: int, most: int = READ_BYTES, **which: Any) -> list[Record]:  # noqa: ANN401 - the ledger's
                nonlocal more
                which |= {"limit": limit, "down": down, "skip": skip, "max_bytes": most, "now": moment}
                rows = ledger.pending(self._endpoint, **which)
                more |= ledger.cut
                skip.update(row.record.id for row in rows)
                return [row.record for row in rows]

            urgent = pending(room, priority=Priority.URGENT)
            if len(urgent) >= room:
                return _Found(urgent, [], [], more)
            live = pending(room, after=newest)
            allowed = min(shares.allowed(now, live=sum(len(record.envelope) for record in live)), READ_BYTES)
            backlog = pending(room, int(allowed), until=newest) if allowed > 0 else []
            return _Found(urgent, live, backlog, more or allowed <= 0)

        return await self._committer.call(read)

    def _claim(self, records: list[Record]) -> list[Record]:
        """Those that no other uplink has taken meanwhile; they are ours now."""
        free = [record for record in records if record.id not in self._board.claimed]
        self._board.claimed.update(record.id for record in free)
        return free
