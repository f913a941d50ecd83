"""Bringing records to their endpoints: one `Uplink` per endpoint, never re-pointed.

Invariants:
- A record is published only through an `Outlet`, which takes nothing but what `Policy.clear` made the moment before.
- A record leaves the ledger only after the endpoint's PUBACK. Without one it is simply pending again, and what the
  socket still holds of it goes to nobody, however the connection ends.
- A record whose time is up is not sent: the ledger gives none, and each is looked at again when its turn comes.
- At most the endpoint's window is in flight, in PUBLISHes and in bytes (`window`); no record is in flight at two
  endpoints. What is said of the vehicle's presence counts: an endpoint may hang up on one PUBLISH above its maximum.
- Urgent records go first; then live ones, with a share for the backlog, so that both always move (`shares`).
- Several records go in one PUBLISH only where the endpoint asks for it (`parcels`); each is cleared, settled and
  counted by itself, and none is refused because of another one's fault.
- An endpoint or a record that makes trouble gets patience; others do not wait for it (`patience`).
- No packet goes to an endpoint before a record is permitted for it, nor while the vehicle is where the policy's
  `reach` forbids it.
- Connected but nothing acknowledged is a failure: the connection is renewed, and others take over until a PUBACK comes.
- A ledger that is damaged ends the agent, so that it starts again with that file set aside.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

from agent import boot
from agent.alarm import rung
from agent.board import Board
from agent.clock import Moment, is_set
from agent.errors import AgentError, EndpointError, EnvelopeError, LedgerError, LedgerStalledError
from agent.histogram import WAIT_SECONDS, Histogram
from agent.messages import Record
from agent.mqtt.backoff import Retries
from agent.mqtt.connection import Connection
from agent.mqtt.packets import Puback
from agent.policy import Cleared, Policy
from agent.store.committer import Committer
from agent.store.entries import Entry
from agent.store.lifetime import aged_ns
from agent.uplink import reach
from agent.uplink.egress import dial
from agent.uplink.flights import Flight, Flights
from agent.uplink.loading import Loading
from agent.uplink.options import UplinkOptions
from agent.uplink.outlet import Outlet
from agent.uplink.patience import Patience
from agent.uplink.presence import Presence
from agent.uplink.recall import Recall
from agent.uplink.settling import RETRY_LATER, Settling, answer
from agent.uplink.shares import Shares
from agent.uplink.supply import Supply, waits
from agent.uplink.tls import Shown
from agent.uplink.window import Window

log = logging.getLogger(__name__)

SECOND = 10**9
POLL_SECONDS = 1.0  # an uplink looks around at least so often; a missed wake-up costs that and LOOK_SECONDS


class _RenewalError(AgentError):
    """Nothing is wrong with the connection, but a new one is wanted."""


class Uplink:
    """One endpoint's publisher, for as long as the agent runs; `turned`: when its loop last came round (monotonic).

    `delivered`: from a record's making, just before its commit, until the endpoint's PUBACK, by the wall clock. Where
    that was not set at one end, from its message's arrival by CLOCK_BOOTTIME; one of an earlier boot is left out then.
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
        self._policy = policy
        self._registration = registration
        self._committer = committer
        self._board = board
        self._reachable: Callable[[], bool] = lambda: board.reachable(options.name)
        self._connection: Connection | None = None
        self._flights = Flights()
        self._patience = Patience(random.random)
        self._loading = Loading(options.batch_records, self._patience)
        self._wake = board.stored.setdefault(options.name, asyncio.Event())
        self._settling = Settling(options.name, committer, board, self._wake.set)
        self._recall = Recall(self._settling, board, clear=self._clear, again=again)
        self._attempts = itertools.count()
        self._draining = False
        self._renewing = False
        self._pressed = False  # something waits for room in the window or in the socket

    @property
    def in_flight(self) -> int:
        """Publishes without PUBACK."""
        return len(self._flights)

    async def comply(self, patience_s: float) -> None:
        """Return once nothing forbidden is in flight; after `patience_s` that costs the connection. Safe to cancel."""
        gone = await self._flights.gone(lambda record: self._clear(record) is None, patience_s)
        if not gone and self._connection is not None:
            self._connection.abort("what is in flight may not go there any more")

    async def drain(self) -> None:
        """Publish nothing more, and return when nothing is in flight. Cancelling is safe."""
        self._draining = True
        await self._flights.idle.wait()

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
        retries = Retries(random.random)
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
            await asyncio.sleep(retries.after(time.monotonic() - started))

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
            if not self._reachable():
                board.down.add(name)
            elif await waits(self._committer, name, board.down):
                return
            await rung(self._wake, asyncio.get_running_loop().time() + POLL_SECONDS)

    async def _serve(self) -> None:
        await self._needed()
        self._renewing = False
        presence = Presence(self.options.presence, self._policy().version, self._committer.ledger.counts)
        session = replace(self.options.session, will=presence.will(time.time_ns()))
        async with reach.watched(self._reachable):
            connection = await dial(self.options.peer, session, next(self._attempts), self.shown)
        self._connection, reason = connection, "given up"
        try:
            self._check(connection)
            self._up()
            self._say(connection, presence.born(connection, time.time_ns()))
            await self._pump_loop(connection, presence)
        except (asyncio.CancelledError, _RenewalError):
            said = await presence.dead(connection, time.time_ns())
            if said and not self._flights.bytes:  # else the kernel would go on sending them
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
        """What is ready, or still in flight on a lost connection, is pending again."""
        self._board.claimed.difference_update(record.id for record in self._loading.ready.clear())
        publishes = [[record.id for record in records] for records in self._flights.clear() if records]
        self._patience.lost(publishes, time.monotonic())
        records = [*itertools.chain.from_iterable(publishes)]
        self._board.claimed.difference_update(records)
        self._board.doubt(records)

    async def _pump_loop(self, connection: Connection, presence: Presence) -> None:
        options = self.options
        shares = Shares(options.backlog_bytes_per_s, time.monotonic())
        loading = self._loading
        ready = loading.ready
        supply = Supply(options.name, self._committer, self._board, self._patience, shares=shares, ready=ready)
        outlet = loading.outlet = Outlet(connection, options)
        window = Window(connection, options.in_flight, self._flights, self._patience)
        connection.on_drained(self._go_on)
        connection.closed.add_done_callback(lambda _: self._wake.set())
        try:
            while not connection.closed.done():
                self.turned = time.monotonic()
                self._check(connection)
                self._wake.clear()
                self._renewing |= self.shown.due(time.monotonic())
                ending = self._draining or self._renewing or self._settling.full
                await supply.refill(0 if ending else loading.wanted(window.trusted()))
                while ready and self._may_send(connection, window):
                    self._send(connection, outlet, loading.next(connection.maximum_packet_size))
                if not ready or not self._may_send(connection, window):
                    self._pressed = bool(ready) or not supply.level
                    await self._wait(shares)
                if window.free_for_presence():
                    self._say(connection, presence.tell(connection, time.time_ns(), time.monotonic()))
        finally:
            supply.give_back()
        raise EndpointError(connection.closed.result())

    def _say(self, connection: Connection, said: asyncio.Future[Puback] | None) -> None:
        if said is not None:
            self._fly(connection, said)

    def _may_send(self, connection: Connection, window: Window) -> bool:
        return not (self._draining or self._renewing or connection.closed.done()) and window.free()

    def _send(self, connection: Connection, outlet: Outlet, records: Sequence[Record]) -> None:
        now = boot.moment()
        cleared = self._recall.cleared(records, now)
        if cleared:
            self._publish(connection, outlet, cleared, now)

    def _clear(self, record: Record) -> Cleared | None:
        return self._policy().clear(record, self.options.name, self._registration)

    def _publish(self, connection: Connection, outlet: Outlet, cleared: Sequence[Cleared], now: Moment) -> None:
        records = tuple(one.record for one in cleared)
        try:
            future = outlet.publish_batch(cleared, now) if len(cleared) > 1 else outlet.publish(cleared[0], now)
        except EnvelopeError:
            if len(records) > 1:
                self._loading.part(records)
            else:
                self._recall.withdraw(records[0], "envelope.unusable")
            return
        self.resent += sum(self._board.is_resent(record.id) for record in records)
        self._fly(connection, future, records)

    def _fly(self, connection: Connection, future: asyncio.Future[Puback], records: tuple[Record, ...] = ()) -> None:
        self._flights.add(future, Flight(records=records, goal=connection.goal()), time.monotonic())
        future.add_done_callback(self._on_puback)

    def _go_on(self) -> None:
        if self._pressed or self._renewing:
            self._wake.set()

    def _on_puback(self, future: asyncio.Future[Puback]) -> None:
        if future.cancelled() or future.exception() is not None:
            return  # the connection is lost: `_release` does the rest
        if future not in self._flights:
            return  # it has done so already: the records are pending again
        records, puback = self._flights.landed(future, time.monotonic()), future.result()
        self._go_on()
        if not records:
            return  # what was said of our presence: it tells nothing of how records fare
        if len(records) > 1 and not puback.accepted and puback.code not in RETRY_LATER:
            log.warning("uplink.batch-rejected", extra={"endpoint": self.options.name, "code": puback.code})
            self._loading.part(records)
            self._wake.set()
            return
        self._judge(records, puback)
        now_ns = time.time_ns()
        for record in records:
            if puback.accepted:
                self._observe(record, now_ns)
            self._settling.add(record, answer(record, self.options.name, puback, now_ns))

    def _observe(self, record: Record, now_ns: int) -> None:
        if is_set(record.recorded_ns) and is_set(now_ns):
            waited_ns: int | None = now_ns - record.recorded_ns
        else:
            waited_ns = aged_ns(record, boot.moment())
        if waited_ns is not None:
            self.delivered.observe(waited_ns / SECOND)

    def _judge(self, records: Sequence[Record], puback: Puback) -> None:
        """What the endpoint's answer says of the endpoint."""
        names = [record.id for record in records]
        if puback.accepted:
            self._patience.accepted(names, self.options.in_flight)
            self._board.down.discard(self.options.name)
        elif puback.code in RETRY_LATER:
            self._patience.deferred(names, time.monotonic())
            self._board.down.add(self.options.name)
            self._board.wake({endpoint for record in records for endpoint in record.route})

    async def _wait(self, shares: Shares) -> None:
        """Wait for news, at most until the next thing that only time brings."""
        pause = self._patience.pause(time.monotonic()) or POLL_SECONDS
        wait_s = max(min(pause, shares.wait(), POLL_SECONDS), 0.001)
        await rung(self._wake, asyncio.get_running_loop().time() + wait_s)

    def _check(self, connection: Connection) -> None:
        """Raise the reason to give the connection up, if there is one."""
        if self._renewing and not self._flights:
            raise _RenewalError("renewed")
        if self._settling.broken is not None:
            raise self._settling.broken
        stuck = self._flights.stuck(time.monotonic(), connection.acknowledged, self.options.ack_timeout_s)
        if stuck is not None:
            raise EndpointError(stuck)
        reach.check(self._reachable)
