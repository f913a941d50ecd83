"""Taking messages from the in-car broker.

Invariants:
- A PUBACK goes out only after the message's record, or its refusal, is durable; in the order of the PUBLISHes.
- A message that the broker sends again after a crash, and that is already durable, is acknowledged and not taken twice.
- How long a message may have waited in the broker counts as doubt about its capture: after a session was resumed,
  until a marker of our own has come back behind everything that had been waiting.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass

from agent import topics
from agent.backoff import delays
from agent.board import Board
from agent.committer import Committer
from agent.entries import IntakeKey, SessionReset, Store
from agent.errors import AgentError, PositionError
from agent.gnss import FixReader
from agent.line import Line
from agent.messages import Message, State
from agent.mqtt import Connection
from agent.packets import Delivery, Outgoing, Puback, Session
from agent.positions import PositionHistory

log = logging.getLogger(__name__)

_Unacked = asyncio.Queue[tuple[Delivery, asyncio.Task[None]]]

FOREVER_NS = 10 * 365 * 86_400 * 10**9
"""A wait that no fix history covers: the message may have been captured anywhere."""

STABLE_SECONDS = 30.0  # a session that lived so long starts again with the shortest delay


@dataclass(frozen=True, slots=True, kw_only=True)
class IntakeOptions:
    """One session with the in-car broker. `outgoing` is taken; `fixes` are only read for the position."""

    name: str
    session: Session
    outgoing: tuple[str, ...]
    fixes: tuple[str, ...] = ()
    queue_bytes: int = 32 << 20


class Fixes:
    """Feeds position messages into the fix history; counts those that are none."""

    def __init__(self, readers: Sequence[tuple[str, FixReader]], history: PositionHistory) -> None:
        self.malformed = 0
        self.accepted = 0
        self.arrived = asyncio.Event()
        self._readers = readers
        self._history = history

    def offer(self, message: Message) -> None:
        """Read a message with every reader of its topic; what is no fix is counted and otherwise ignored."""
        for topic_filter, reader in self._readers:
            if not topics.matches(topic_filter, message.topic):
                continue
            try:
                fix = reader.read(message)
            except PositionError:
                self.malformed += 1
                continue
            if fix is not None:
                self._history.add(fix)
                self.accepted += 1
                self.arrived.set()


@dataclass(frozen=True, slots=True, kw_only=True)
class Inward:
    """Where messages go: what every session shares."""

    line: Line
    committer: Committer
    fixes: Fixes
    board: Board


class Intake:
    """One session with the in-car broker, for as long as the agent runs."""

    def __init__(self, options: IntakeOptions, inward: Inward, last_alive_ns: int | None) -> None:
        """`last_alive_ns`: when (boot time) an earlier process of this boot had last emptied this session."""
        self.connected = False
        self.alive_ns = last_alive_ns
        self._options = options
        self._inward = inward
        self._caught_up = False
        self._working: set[asyncio.Task[None]] = set()
        self._marker_topic = f"residency-agent/{options.session.client_id}/marker"
        self._marker = b""

    async def run_loop(self) -> None:
        """Connect, take, connect again; returns only by cancelling, which loses nothing."""
        waits = delays(random.random)
        while True:
            started = time.monotonic()
            connection = Connection(
                self._options.session,
                queue_limit=self._options.session.receive_maximum,
                queue_bytes=self._options.queue_bytes,
            )
            try:
                await self._serve(connection)
            except (AgentError, TimeoutError) as exc:
                log.warning("intake.lost", extra={"session": self._options.name, "reason": str(exc)})
            except asyncio.CancelledError:
                for work in self._working:
                    work.cancel()
                raise
            finally:
                self.connected = False
                connection.close()
                await asyncio.gather(*self._working, return_exceptions=True)  # else a redelivery could overtake them
            if time.monotonic() - started > STABLE_SECONDS:
                waits = delays(random.random)
            await asyncio.sleep(next(waits))

    async def _serve(self, connection: Connection) -> None:
        session_present = await connection.open()
        if not session_present:
            await self._inward.committer.submit(SessionReset(session=self._options.name))
        self._caught_up = not session_present
        await connection.subscribe([*self._options.outgoing, *self._options.fixes, self._marker_topic])
        self._marker = uuid.uuid4().bytes
        connection.publish(Outgoing(topic=self._marker_topic, payload=self._marker)).add_done_callback(_consume)
        self.connected = True
        log.info("intake.connected", extra={"session": self._options.name, "resumed": session_present})
        await self._take(connection)

    async def _take(self, connection: Connection) -> None:
        """Receive and acknowledge until the connection is lost; what was started is finished first."""
        unacked: _Unacked = asyncio.Queue(self._options.session.receive_maximum)
        acker = asyncio.create_task(self._ack_loop(connection, unacked), name=f"ack-{self._options.name}")
        receiver = asyncio.create_task(self._receive_loop(connection, unacked), name=f"take-{self._options.name}")
        try:
            await asyncio.wait([acker, receiver], return_when=asyncio.FIRST_COMPLETED)
        finally:
            receiver.cancel()
            acker.cancel()
            results = await asyncio.gather(receiver, acker, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _receive_loop(self, connection: Connection, unacked: _Unacked) -> None:
        while True:
            delivery = await connection.receive()
            if delivery.topic == self._marker_topic:
                self._on_marker(delivery)
                connection.ack(delivery)
                continue
            work = asyncio.create_task(self._handle(delivery), name=f"message-{self._options.name}")
            self._working.add(work)
            work.add_done_callback(self._working.discard)
            await unacked.put((delivery, work))

    def _on_marker(self, delivery: Delivery) -> None:
        """Our own message has come back: all that had been waiting in the broker came before it."""
        if delivery.payload == self._marker:
            self._caught_up = True
            self.alive_ns = delivery.monotonic_ns

    async def _ack_loop(self, connection: Connection, unacked: _Unacked) -> None:
        while True:
            delivery, work = await unacked.get()
            await asyncio.wait([work])  # not awaited itself: cancelling us must not cancel it
            work.result()
            connection.ack(delivery)

    async def _handle(self, delivery: Delivery) -> None:
        """Return when the message is durable, refused on record, or known already; raises LedgerError."""
        message = self._message(delivery)
        self._inward.fixes.offer(message)
        if not any(topics.matches(topic_filter, message.topic) for topic_filter in self._options.outgoing):
            return
        key = self._key(delivery)
        if delivery.dup and key is not None and self._inward.committer.ledger.recorded(key):
            return
        entry = await self._inward.line.entry(message, key)
        await self._inward.committer.submit(entry)
        if isinstance(entry, Store):
            self._inward.board.wake(entry.record.route)
            if entry.record.state is State.HELD:
                self._inward.fixes.arrived.set()  # a fix may have come between the decision and the commit

    def _message(self, delivery: Delivery) -> Message:
        wait_ns = FOREVER_NS if delivery.retain else self._wait_ns(delivery.monotonic_ns)
        return Message(
            topic=delivery.topic,
            payload=delivery.payload,
            received_ns=delivery.received_ns,
            monotonic_ns=delivery.monotonic_ns,
            content_type=delivery.content_type,
            properties=delivery.properties,
            wait_ns=wait_ns,
        )

    def _wait_ns(self, now_ns: int) -> int:
        if self._caught_up:
            self.alive_ns = now_ns
            return 0
        return FOREVER_NS if self.alive_ns is None else max(now_ns - self.alive_ns, 0)

    def _key(self, delivery: Delivery) -> IntakeKey | None:
        if delivery.qos == 0:
            return None
        digest = hashlib.blake2b(delivery.payload, digest_size=16, person=b"intake")
        digest.update(delivery.topic.encode())
        return IntakeKey(session=self._options.name, mid=delivery.mid, digest=digest.digest())


def _consume(future: asyncio.Future[Puback]) -> None:
    if not future.cancelled():
        future.exception()
