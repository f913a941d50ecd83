"""Bringing records to their endpoints: one `Uplink` per endpoint, never re-pointed.

Invariants:
- A record is published only through an `Outlet`, which takes nothing but what `Policy.clear` made the moment before.
- A record leaves the ledger only after the endpoint's PUBACK. Without one it is simply pending again.
- At most the endpoint's window is in flight, in records and in bytes; no record is in flight at two endpoints.
- Urgent records go first; then live ones, with a share for the backlog, so that both always move (`shares`).
- An endpoint or a record that makes trouble gets patience; others do not wait for it (`patience`).
- No packet goes to an endpoint before a record is permitted for it, nor while the vehicle is where the policy's
  `reach` forbids it.
- Connected but nothing acknowledged is a failure: the connection is renewed, and others take over until a PUBACK comes.
- A ledger that is damaged ends the agent, so that it starts again with that file set aside.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from agent.board import Board
from agent.errors import AgentError, EndpointError, EnvelopeError, LedgerError, LedgerStalledError
from agent.histogram import WAIT_SECONDS, Histogram
from agent.messages import Record
from agent.mqtt.backoff import delays
from agent.mqtt.connection import Connection
from agent.mqtt.packets import Puback, Session
from agent.policy import Policy
from agent.store.committer import Committer
from agent.store.entries import Delivered, Ending, Entry, Redecided, Rejected, Withdrawn
from agent.uplink.egress import PeerRules, dial
from agent.uplink.flights import Flight, Flights
from agent.uplink.outlet import Outlet
from agent.uplink.patience import Patience
from agent.uplink.presence import Presence, PresenceOptions
from agent.uplink.settling import Settling
from agent.uplink.shares import Shares
from agent.uplink.supply import Supply
from agent.uplink.tls import Shown

log = logging.getLogger(__name__)

SECOND = 10**9
POLL_SECONDS = 1.0  # the longest that a stored record waits for a missed wake-up
STABLE_SECONDS = 30.0
UNSENT_BYTES = 64 << 10  # published but not yet taken by the socket; likewise
IN_FLIGHT_BYTES = 16 << 20  # without PUBACK: paho keeps them in memory
# MQTT 5.0, 3.4.2.1: Unspecified, Implementation specific, Not authorized, Packet identifier in use, Quota exceeded.
# An access list can be mended; a record that was thrown away because of it cannot.
RETRY_LATER = frozenset({0x80, 0x83, 0x87, 0x91, 0x97})


class _RenewalError(AgentError):
    """Nothing is wrong with the connection, but a new one is wanted."""


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
    backlog_bytes_per_s: int = 0
    presence: PresenceOptions | None = None


class Uplink:
    """One endpoint's publisher, for as long as the agent runs; `turned`: when its loop last came round (monotonic).

    `delivered`: from a record's making, just before its commit, until the endpoint's PUBACK; by the wall clock.
    """

    def __init__(  # noqa: PLR0913 - what every uplink shares, and one with its default
        self,
        options: UplinkOptions,
        policy: Callable[[], Policy],
        registration: str,
        committer: Committer,
        board: Board,
        *,
        again: Callable[[Record], Entry | None] = lambda _: None,
    ) -> None:
        """`again` says what becomes of a record that the policy no longer lets go here; None: it is withdrawn."""
        self.connected = False
        self.last_error = ""
        self.resent = 0
        self.turned = time.monotonic()
        self.delivered = Histogram(WAIT_SECONDS)
        self.options = options
        self.shown = Shown(options.name)
        self._again = again
        self._policy = policy
        self._registration = registration
        self._committer = committer
        self._board = board
        self._flights = Flights()
        self._patience = Patience(random.random)
        self._wake = board.stored.setdefault(options.name, asyncio.Event())
        self._settling = Settling(options.name, committer, board, self._wake.set)
        self._attempts = itertools.count()
        self._draining = False
        self._renewing = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def in_flight(self) -> int:
        """Publishes without PUBACK."""
        return len(self._flights)

    async def drain(self) -> None:
        """Publish nothing more, and return when nothing is in flight. Cancelling is safe."""
        self._draining = True
        await self._idle.wait()

    async def renew(self) -> None:
        """Connect anew once nothing is in flight, where other TLS files lie there now. Cancelling is safe."""
        if self.shown.error or await self.shown.differs(self.options.peer):
            self.shown.ask()
            self._renewing = True
            self._wake.set()

    async def run_loop(self) -> None:
        """Connect, publish, connect again; returns only by cancelling, after which nothing is in flight.

        Raises LedgerError where the ledger is damaged.
        """
        waits = delays(random.random)
        while True:
            started = self.turned = time.monotonic()
            try:
                await self._serve()
            except _RenewalError:
                continue
            except (AgentError, TimeoutError) as exc:
                if isinstance(exc, LedgerError) and not isinstance(exc, LedgerStalledError):
                    raise
                self._fail(str(exc) or type(exc).__name__)
            finally:
                self.connected = False
                await self._settling.finish()
            if time.monotonic() - started > STABLE_SECONDS:
                waits = delays(random.random)
            await asyncio.sleep(next(waits))

    def _fail(self, reason: str) -> None:
        if reason != self.last_error:
            log.warning("uplink.lost", extra={"endpoint": self.options.name, "reason": reason})
        self.last_error = reason
        self._board.down.add(self.options.name)
        self._board.wake(self._board.stored)

    async def _needed(self) -> None:
        """Return once a record waits for this endpoint, and it may be connected to from here."""
        name, board = self.options.name, self._board
        while True:
            self.turned = time.monotonic()
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
        self._renewing = False
        presence, session = self._presence(), self.options.session
        if presence is not None:
            session = replace(session, will=presence.will(time.time_ns()))
        connection = await dial(self.options.peer, session, next(self._attempts), self.shown)
        reason = "given up"
        try:
            self._up()
            if presence is not None:
                presence.born(connection, time.time_ns())
            await self._pump_loop(connection, presence)
        except (asyncio.CancelledError, _RenewalError):
            if presence is not None:
                await presence.dead(connection, time.time_ns())
            connection.close()
            raise
        except AgentError as exc:
            reason = str(exc)
            raise
        finally:
            connection.abort(reason)
            self._release()

    def _up(self) -> None:
        self.connected = True
        self.last_error = ""
        if not self._patience.doubted:
            self._board.down.discard(self.options.name)
        log.info("uplink.connected", extra={"endpoint": self.options.name})

    def _release(self) -> None:
        """What is still in flight on a lost connection is pending again."""
        records = [record.id for record in self._flights.clear()]
        self._patience.lost(records, time.monotonic())
        self._board.claimed.difference_update(records)
        self._board.doubt(records)
        self._idle.set()

    def _presence(self) -> Presence | None:
        asked = self.options.presence
        return None if asked is None else Presence(asked, self._policy().version, self._committer.ledger.counts)

    async def _pump_loop(self, connection: Connection, presence: Presence | None) -> None:
        options = self.options
        shares = Shares(options.backlog_bytes_per_s, time.monotonic())
        supply = Supply(options.name, self._committer, self._board, self._patience, shares)
        outlet = self._outlet(connection)
        connection.on_drained(self._wake.set)
        connection.closed.add_done_callback(lambda _: self._wake.set())
        try:
            while not connection.closed.done():
                self.turned = time.monotonic()
                self._wake.clear()
                self._renewing |= self.shown.due(time.monotonic())
                if not (self._draining or self._renewing):
                    await supply.refill(self._window(connection))
                while supply.ready and self._may_send(connection):
                    await self._send(connection, outlet, supply.ready.popleft())
                if not supply.ready or not self._may_send(connection):
                    await self._wait(shares)
                if presence is not None:
                    presence.tell(connection, time.time_ns(), time.monotonic())
                self._check(connection)
        finally:
            supply.give_back()
        raise EndpointError(connection.closed.result())

    def _window(self, connection: Connection) -> int:
        return self._patience.window(min(self.options.in_flight, connection.receive_maximum), time.monotonic())

    def _may_send(self, connection: Connection) -> bool:
        if (
            self._draining
            or self._renewing
            or connection.closed.done()
            or len(self._flights) >= self._window(connection)
        ):
            return False
        return not self._flights or (connection.unsent < UNSENT_BYTES and self._flights.bytes < IN_FLIGHT_BYTES)

    def _outlet(self, connection: Connection) -> Outlet:
        options = self.options
        return Outlet(
            connection, endpoint=options.name, vehicle=options.vehicle, topic=options.topic, wire=options.wire
        )

    async def _send(self, connection: Connection, outlet: Outlet, record: Record) -> None:
        cleared = self._policy().clear(record, self.options.name, self._registration)
        if cleared is None:
            await self._decide_again(record)
            return
        try:
            future = outlet.publish(cleared, time.time_ns())
        except EnvelopeError:
            await self._withdraw(record, "envelope.unusable")
            return
        self.resent += self._board.is_resent(record.id)
        self._flights.add(future, Flight(record=record, goal=connection.goal()), time.monotonic())
        self._idle.clear()
        future.add_done_callback(self._on_puback)

    async def _decide_again(self, record: Record) -> None:
        entry = self._again(record)
        if entry is None:
            await self._withdraw(record, "policy.withdrawn")
            return
        await self._committer.submit(entry)
        self._board.claimed.discard(record.id)
        self._board.wake(entry.record.route if isinstance(entry, Redecided) else ())

    async def _withdraw(self, record: Record, reason: str) -> None:
        await self._committer.submit(Withdrawn(id=record.id, reason=reason, time_ns=time.time_ns()))
        self._board.claimed.discard(record.id)

    def _on_puback(self, future: asyncio.Future[Puback]) -> None:
        if future.cancelled() or future.exception() is not None:
            return  # the connection is lost: `_release` does the rest
        if future not in self._flights:
            return  # it has done so already: the record is pending again
        record, puback = self._flights.landed(future, time.monotonic()), future.result()
        if not self._flights:
            self._idle.set()
        if puback.accepted:
            self._patience.accepted(record.id, self.options.in_flight)
            self._board.down.discard(self.options.name)
        elif puback.code in RETRY_LATER:
            self._patience.deferred(record.id, time.monotonic())
            self._board.down.add(self.options.name)
            self._board.wake(record.route)
        self._wake.set()
        self._settling.add(record.id, self._answer(record, puback))

    def _answer(self, record: Record, puback: Puback) -> Ending | None:
        """What the ledger is told; None: the record stays pending."""
        name, now_ns = self.options.name, time.time_ns()
        if puback.accepted:
            self.delivered.observe((now_ns - record.recorded_ns) / SECOND)
            return Delivered(id=record.id, endpoint=name, code=puback.code, time_ns=now_ns)
        if puback.code in RETRY_LATER:
            return None
        return Rejected(id=record.id, endpoint=name, code=puback.code, time_ns=now_ns)

    async def _wait(self, shares: Shares) -> None:
        """Wait for news, at most until the next thing that only time brings."""
        pause = self._patience.pause(time.monotonic()) or POLL_SECONDS
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(min(pause, shares.wait(), POLL_SECONDS), 0.001)):
                await self._wake.wait()

    def _check(self, connection: Connection) -> None:
        """Raise the reason to give the connection up, if there is one."""
        if self._renewing and not self._flights:
            raise _RenewalError("renewed")
        if self._settling.broken is not None:
            raise self._settling.broken
        stuck = self._flights.stuck(time.monotonic(), connection.acknowledged(), self.options.ack_timeout_s)
        if stuck is not None:
            raise EndpointError(stuck)
        if not self._board.reachable(self.options.name):
            raise EndpointError("not to be reached from where the vehicle is now")
