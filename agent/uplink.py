"""Bringing records to their endpoints: one `Uplink` per endpoint, never re-pointed.

Invariants:
- A record is published only through an `Outlet`, which takes nothing but what `Policy.clear` made the moment before.
- A record leaves the ledger only after the endpoint's PUBACK. Without one it is simply pending again.
- At most the endpoint's window is in flight; no record is in flight at two endpoints at a time.
- Urgent records go first; then live ones, with a share for the backlog, so that both always move.
- No packet goes to an endpoint before a record is permitted for it, nor while the vehicle is where the policy's
  `reach` forbids it.
- Connected but nothing acknowledged is a failure: the connection is renewed and others may take over.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent.backoff import delays
from agent.board import Board
from agent.committer import Committer
from agent.egress import PeerRules, dial
from agent.entries import Delivered, Entry, Rejected, Spooled, Withdrawn
from agent.errors import AgentError, EndpointError
from agent.ledger import Ledger
from agent.messages import Priority, Record
from agent.mqtt import Connection
from agent.outlet import Outlet
from agent.packets import Puback, Session
from agent.policy import Policy

log = logging.getLogger(__name__)

POLL_SECONDS = 1.0  # the longest that a stored record waits for a missed wake-up
BACKLOG_SHARE = 4  # one of so many places in the window belongs to the backlog
STABLE_SECONDS = 30.0
RETRY_LATER = frozenset({0x80, 0x83, 0x97})  # MQTT 5.0, 3.4.2.1: Unspecified, Implementation specific, Quota exceeded


@dataclass(frozen=True, slots=True, kw_only=True)
class UplinkOptions:
    """One endpoint. `topic` is its template; `wire` is `msgpack` or `binary`."""

    name: str
    vehicle: str
    session: Session
    peer: PeerRules
    topic: str
    wire: str = "msgpack"
    in_flight: int = 128
    ack_timeout_s: float = 20.0


class Uplink:
    """One endpoint's publisher, for as long as the agent runs."""

    def __init__(
        self,
        options: UplinkOptions,
        policy: Callable[[], Policy],
        registration: str,
        committer: Committer,
        board: Board,
    ) -> None:
        self.connected = False
        self.last_error = ""
        self.published = 0
        self._options = options
        self._policy = policy
        self._registration = registration
        self._committer = committer
        self._board = board
        self._in_flight: dict[asyncio.Future[Puback], Record] = {}
        self._settling: set[asyncio.Task[None]] = set()
        self._wake = board.stored.setdefault(options.name, asyncio.Event())
        self._attempts = itertools.count()
        self._progress = time.monotonic()
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_flight(self) -> int:
        """Publishes without PUBACK."""
        return len(self._in_flight)

    async def drain(self) -> None:
        """Publish nothing more, and return when nothing is in flight. Cancelling is safe."""
        self._draining = True
        await self._idle.wait()

    async def run_loop(self) -> None:
        """Connect, publish, connect again; returns only by cancelling, after which nothing is in flight."""
        waits = delays(random.random)
        while True:
            started = time.monotonic()
            try:
                await self._serve()
            except (AgentError, TimeoutError) as exc:
                self._fail(str(exc) or type(exc).__name__)
            finally:
                self.connected = False
                await asyncio.gather(*self._settling, return_exceptions=True)
            if time.monotonic() - started > STABLE_SECONDS:
                waits = delays(random.random)
            await asyncio.sleep(next(waits))

    def _fail(self, reason: str) -> None:
        if reason != self.last_error:
            log.warning("uplink.lost", extra={"endpoint": self._options.name, "reason": reason})
        self.last_error = reason
        self._board.down.add(self._options.name)
        self._board.wake(self._board.stored)

    async def _needed(self) -> None:
        """Return once a record waits for this endpoint, and it may be connected to from here."""
        name, board = self._options.name, self._board
        while True:
            self._wake.clear()
            if not board.reachable(name):
                board.down.add(name)
            elif await self._committer.call(lambda ledger: bool(ledger.pending(name, limit=1, down=set(board.down)))):
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(POLL_SECONDS):
                    await self._wake.wait()

    async def _serve(self) -> None:
        await self._needed()
        connection = await dial(self._options.peer, self._options.session, next(self._attempts))
        try:
            self._up()
            await self._pump_loop(connection)
        finally:
            connection.close()
            self._release()

    def _up(self) -> None:
        self.connected = True
        self.last_error = ""
        self._board.down.discard(self._options.name)
        self._progress = time.monotonic()
        log.info("uplink.connected", extra={"endpoint": self._options.name})

    def _release(self) -> None:
        """What is still in flight on a lost connection is pending again."""
        for record in self._in_flight.values():
            self._board.claimed.discard(record.id)
        self._in_flight.clear()
        self._idle.set()

    async def _pump_loop(self, connection: Connection) -> None:
        window = min(self._options.in_flight, connection.receive_maximum)
        newest = self._committer.ledger.last_key
        ready: deque[Record] = deque()
        outlet = self._outlet(connection)
        try:
            while not connection.closed.done():
                self._wake.clear()
                if len(ready) <= window // 2 and not self._draining:
                    ready += await self._next(window - len(ready), newest)
                while ready and len(self._in_flight) < window and not self._draining:
                    await self._send(outlet, ready.popleft())
                if not ready or len(self._in_flight) >= window or self._draining:
                    await self._wait(connection)
                self._check_progress()
                if not self._board.reachable(self._options.name):
                    raise EndpointError("not to be reached from where the vehicle is now")
        finally:
            self._board.claimed.difference_update(record.id for record in ready)
        raise EndpointError(connection.closed.result())

    async def _next(self, room: int, newest: int) -> list[Record]:
        """Up to `room` records, claimed for this endpoint: urgent, then live with a share for the backlog."""
        name, down, claimed = self._options.name, frozenset(self._board.down), frozenset(self._board.claimed)
        shares = self._shares(room, newest)

        def read(ledger: Ledger) -> list[Spooled]:
            rows = ledger.pending(name, limit=room, priority=Priority.URGENT, down=down, skip=claimed)
            for limit, after, until in shares:
                free = min(limit, room - len(rows))
                skip = claimed.union(row.record.id for row in rows)
                if free > 0:
                    rows += ledger.pending(name, limit=free, after=after, until=until, down=down, skip=skip)
            return rows

        rows = [row.record for row in await self._committer.call(read) if row.record.id not in self._board.claimed]
        self._board.claimed.update(record.id for record in rows)
        return rows

    @staticmethod
    def _shares(room: int, newest: int) -> list[tuple[int, int, int | None]]:
        """(limit, after, until) of the live records, of the backlog's share, and of the live ones again."""
        return [(room - room // BACKLOG_SHARE, newest, None), (room, 0, newest), (room, newest, None)]

    def _outlet(self, connection: Connection) -> Outlet:
        options = self._options
        return Outlet(
            connection, endpoint=options.name, vehicle=options.vehicle, topic=options.topic, wire=options.wire
        )

    async def _send(self, outlet: Outlet, record: Record) -> None:
        cleared = self._policy().clear(record, self._options.name, self._registration)
        if cleared is None:
            await self._committer.submit(Withdrawn(id=record.id, reason="policy.withdrawn", time_ns=time.time_ns()))
            self._board.claimed.discard(record.id)
            return
        future = outlet.publish(cleared, time.time_ns())
        self._in_flight[future] = record
        self._idle.clear()
        future.add_done_callback(self._on_puback)

    def _on_puback(self, future: asyncio.Future[Puback]) -> None:
        record = self._in_flight.pop(future, None)
        if not self._in_flight:
            self._idle.set()
        if record is None or future.cancelled() or future.exception() is not None:
            return
        self._progress = time.monotonic()
        self._wake.set()
        task = asyncio.create_task(self._settle(record, future.result()), name=f"settle-{self._options.name}")
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def _settle(self, record: Record, puback: Puback) -> None:
        """Write down what the endpoint said; only then may another uplink look at the record."""
        name, now_ns = self._options.name, time.time_ns()
        entry: Entry | None = None
        if puback.accepted:
            self.published += 1
            entry = Delivered(id=record.id, endpoint=name, code=puback.code, time_ns=now_ns)
        elif puback.code not in RETRY_LATER:
            entry = Rejected(id=record.id, endpoint=name, code=puback.code, time_ns=now_ns)
        if entry is None:
            await asyncio.sleep(POLL_SECONDS)  # the endpoint asks for patience
        else:
            await self._committer.submit(entry)
        self._board.claimed.discard(record.id)

    async def _wait(self, connection: Connection) -> None:
        waker = asyncio.create_task(self._wake.wait(), name=f"wake-{self._options.name}")
        news: list[asyncio.Future[Any]] = [waker, connection.closed]
        try:
            await asyncio.wait(news, timeout=POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waker.cancel()

    def _check_progress(self) -> None:
        if not self._in_flight:
            self._progress = time.monotonic()
        elif time.monotonic() - self._progress > self._options.ack_timeout_s:
            raise EndpointError(f"no PUBACK within {self._options.ack_timeout_s} s")
