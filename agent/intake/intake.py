"""Taking messages from the in-car broker.

Invariants:
- A PUBACK goes out only after the message's record, or its refusal, is durable; in the order of the PUBLISHes.
- A message that the broker sends again after a crash, and that is already durable, is acknowledged and not taken twice.
- How long a message may have waited in the broker counts as doubt about its capture (`waiting`).
- A ledger that is damaged ends the agent, so that it starts again with that file set aside.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import random
import time
import uuid
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from agent import topics
from agent.alarm import rung
from agent.board import Board
from agent.boot import boot_ns
from agent.errors import AgentError, LedgerEntryError, LedgerError, PositionError
from agent.histogram import WORK_SECONDS, Histogram
from agent.intake.line import Line
from agent.intake.subscriptions import Subscriptions
from agent.intake.waiting import FOREVER_NS, Waiting
from agent.messages import Message, State
from agent.mqtt.backoff import Retries
from agent.mqtt.connection import Connection
from agent.mqtt.packets import Delivery, Outgoing, Session
from agent.places.gnss import FixReader
from agent.places.positions import PositionHistory
from agent.store.committer import Committer
from agent.store.entries import IntakeKey, Refused, SessionReset, Store

log = logging.getLogger(__name__)

_Unacked = asyncio.Queue[tuple[Delivery, asyncio.Task[None]]]

SECOND = 10**9
MARKER_SECONDS = 0.25  # between two markers while messages come
IDLE_SECONDS = 10.0  # between two markers while none come
MARKER_PATIENCE_SECONDS = 30.0  # a marker that is not back by then is sent again, and the broker's access list doubted
OLD_FIX_NS = 60 * 10**9  # a fix that may have waited longer would only blur the track that the next ones draw
EVER_NS, NEVER_NS = -(1 << 63), (1 << 63) - 1  # before, and after, every capture: SQLite's least and largest number


@dataclass(frozen=True, slots=True, kw_only=True)
class IntakeOptions:
    """One session with the in-car broker. `outgoing` is taken; `fixes` are only read for the position."""

    name: str
    session: Session
    outgoing: tuple[str, ...]
    fixes: tuple[str, ...] = ()
    queue_bytes: int = 32 << 20

    @property
    def subscribed(self) -> list[str]:
        """All filters but those that another one covers: a broker sends a message once for each that it matches."""
        filters = dict.fromkeys((*self.outgoing, *self.fixes))
        return [one for one in filters if not any(topics.covers(wide, one) for wide in filters if wide != one)]


class Fixes:
    """Feeds position messages into the fix history; counts those that are none, and those that say nothing.

    `arrived` is set while held records have to be looked at again (`look_again`, `taken`).
    """

    def __init__(self, readers: Sequence[tuple[str, FixReader]], history: PositionHistory) -> None:
        self.malformed = 0
        self.accepted = 0
        self.stale = 0
        self.arrived = asyncio.Event()
        self._since_ns = EVER_NS  # what an earlier process held has not been looked at
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
            if fix is None:
                continue
            self.accepted += 1
            if fix.doubt_ns > OLD_FIX_NS:
                self.stale += 1
                continue
            since_ns = self._history.add(fix)
            if since_ns is not None:
                self.look_again(since_ns)

    def look_again(self, since_ns: int = EVER_NS) -> None:
        """Have the held records looked at again whose capture is not before this moment (monotonic ns)."""
        self._since_ns = min(self._since_ns, since_ns)
        self.arrived.set()

    def taken(self) -> int:
        """Since when (monotonic ns) captures have to be looked at again: by the caller, from now on."""
        self.arrived.clear()
        since_ns, self._since_ns = self._since_ns, NEVER_NS
        return since_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class Inward:
    """Where messages go: what every session shares."""

    line: Line
    committer: Committer
    fixes: Fixes
    board: Board


class Intake:
    """One session with the in-car broker, for as long as the agent runs.

    `durable`: from the arrival of a message until its record, or its refusal, was durable. `turned`: when
    (monotonic seconds) its loop last came round, which takes some seconds while the broker is slow. `unasked` counts
    messages that no filter asks for, which are acknowledged and dropped: an old subscription's, or a mistaken broker's.
    """

    def __init__(self, options: IntakeOptions, inward: Inward, last_alive_ns: int | None) -> None:
        """`last_alive_ns`: when (boot time) an earlier process of this boot had last emptied this session."""
        self.connected = False
        self.durable = Histogram(WORK_SECONDS)
        self.turned = time.monotonic()
        self.unasked = 0
        self._unasked_before = 0  # when this connection began
        self._subscriptions = Subscriptions(options.name, inward.committer)
        self._waiting = Waiting(last_alive_ns)
        self._options = options
        self._inward = inward
        self._working: set[asyncio.Task[None]] = set()
        self._marker_topic = f"residency-agent/{options.session.client_id}/marker"
        self._news = asyncio.Event()

    @property
    def alive_ns(self) -> int | None:
        """When (boot time) this session was last known to be empty."""
        return self._waiting.kept_ns

    async def run_loop(self) -> None:
        """Connect, take, connect again; returns only by cancelling, which loses nothing. Raises LedgerError."""
        retries = Retries(random.random)
        while True:
            started = self.turned = time.monotonic()
            connection = Connection(
                self._options.session,
                queue_limit=self._options.session.receive_maximum,
                queue_bytes=self._options.queue_bytes,
                prompt=True,
            )
            try:
                await self._serve(connection)
            except LedgerError:
                raise
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
            await asyncio.sleep(retries.after(time.monotonic() - started))

    async def _serve(self, connection: Connection) -> None:
        session_present = await connection.open()
        if not session_present:
            await self._inward.committer.submit(SessionReset(session=self._options.name))
        self._waiting.begin(boot_ns(), resumed=session_present)
        log.info("intake.resumed" if session_present else "intake.begun", extra={"session": self._options.name})
        self._unasked_before = self.unasked
        await self._take(connection, resumed=session_present)

    async def _take(self, connection: Connection, *, resumed: bool) -> None:
        """Receive and acknowledge until the connection is lost; what was started is finished first."""
        unacked: _Unacked = asyncio.Queue(self._options.session.receive_maximum)
        name = self._options.name
        tasks = [
            asyncio.create_task(self._ack_loop(connection, unacked), name=f"ack-{name}"),
            asyncio.create_task(self._receive_loop(connection, unacked), name=f"take-{name}"),
            asyncio.create_task(self._marker_loop(connection, resumed=resumed), name=f"marker-{name}"),
        ]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            results = await asyncio.gather(*tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result

    async def _receive_loop(self, connection: Connection, unacked: _Unacked) -> None:
        while True:
            delivery = await connection.receive()
            work = asyncio.create_task(self._received(delivery), name=f"message-{self._options.name}")
            self._working.add(work)
            work.add_done_callback(self._working.discard)
            await unacked.put((delivery, work))

    def _received(self, delivery: Delivery) -> Coroutine[Any, Any, None]:
        """Note the arrival at once; what is left to be done before the PUBACK."""
        self._inward.line.observe(delivery.received_ns, delivery.monotonic_ns)
        if delivery.topic == self._marker_topic:
            self._waiting.returned(delivery.payload)
            self._news.set()
            return _nothing()
        wait_ns = self._waiting.taken(delivery.monotonic_ns, delivery.unseen_ns)
        self._news.set()
        return self._handle(delivery, FOREVER_NS if delivery.retain else wait_ns)

    async def _marker_loop(self, connection: Connection, *, resumed: bool) -> None:
        """Subscribe; then send a marker whenever the broker may have held something back, and from time to time.

        What a resumed session kept for us comes before the SUBACK, so it is taken meanwhile.
        """
        wanted = [*self._options.subscribed, self._marker_topic]
        await self._subscriptions.renew(connection, wanted, resumed=resumed)
        self.connected = True
        log.info("intake.connected", extra={"session": self._options.name})
        while True:
            self.turned = time.monotonic()
            marker = uuid.uuid4().bytes
            self._waiting.mark(marker, boot_ns())
            puback = await connection.publish(Outgoing(topic=self._marker_topic, payload=marker))
            if not (puback.accepted and await self._is_back()):
                log.warning("intake.marker-lost", extra={"session": self._options.name, "code": puback.code})
            await asyncio.sleep(MARKER_SECONDS)
            self._news.clear()
            if self._waiting.flows:
                await rung(self._news, asyncio.get_running_loop().time() + IDLE_SECONDS)

    async def _is_back(self) -> bool:
        """Wait for the marker while messages come; False when it stays away."""
        while self._waiting.marked:
            self._news.clear()
            if not await rung(self._news, asyncio.get_running_loop().time() + MARKER_PATIENCE_SECONDS):
                return False
        return True

    async def _ack_loop(self, connection: Connection, unacked: _Unacked) -> None:
        while True:
            delivery, work = await unacked.get()
            if not work.done():  # many are, after a commit
                await asyncio.wait([work])  # not awaited itself: cancelling us must not cancel it
            work.result()
            connection.ack(delivery)
            if delivery.topic == self._marker_topic:
                self._waiting.marker_acknowledged(boot_ns())
            else:
                self._waiting.acknowledged()

    async def _handle(self, delivery: Delivery, wait_ns: int) -> None:
        """Return when the message is durable, refused on record, or known already; raises LedgerError."""
        message = _message(delivery, wait_ns)
        if not delivery.malformed:
            self._inward.fixes.offer(message)
        if not _any_matches(self._options.outgoing, message.topic):
            if not _any_matches(self._options.fixes, message.topic):
                self._drop_unasked()
            return
        key = self._key(delivery)
        if delivery.dup and key is not None and self._inward.committer.ledger.recorded(key):
            return
        async with self._inward.line.turns.deciding():
            entry = await self._committed(message, key, malformed=delivery.malformed)
        self.durable.observe((boot_ns() - message.monotonic_ns) / SECOND)
        if isinstance(entry, Store) and entry.record.state is State.HELD:
            # a fix that came between the decision and the commit has not been looked at with it
            self._inward.fixes.look_again(entry.record.capture.monotonic_ns)

    def _drop_unasked(self) -> None:
        """Count it, and tell of it once a connection."""
        if self.unasked == self._unasked_before:
            log.warning("intake.unasked", extra={"session": self._options.name})
        self.unasked += 1

    async def _committed(self, message: Message, key: IntakeKey | None, *, malformed: bool) -> Store | Refused:
        """What has become of the message, durable."""
        entry: Store | Refused
        if malformed:
            entry = Refused(reason="message.malformed", time_ns=time.time_ns(), intake=key)
        else:
            entry = await self._inward.line.entry(message, key)
        try:
            await self._inward.committer.submit(entry)
        except LedgerEntryError:
            entry = Refused(reason="internal.error", time_ns=time.time_ns(), intake=key)
            await self._inward.committer.submit(entry)
        return entry

    def _key(self, delivery: Delivery) -> IntakeKey | None:
        if delivery.qos == 0:
            return None
        digest = hashlib.blake2b(delivery.payload, digest_size=16, person=b"intake")
        digest.update(delivery.topic.encode())
        return IntakeKey(session=self._options.name, mid=delivery.mid, digest=digest.digest(), redelivered=delivery.dup)


def _any_matches(filters: Sequence[str], topic: str) -> bool:
    return any(topics.matches(topic_filter, topic) for topic_filter in filters)


def _message(delivery: Delivery, wait_ns: int) -> Message:
    return Message(
        topic=delivery.topic,
        payload=delivery.payload,
        received_ns=delivery.received_ns,
        monotonic_ns=delivery.monotonic_ns,
        content_type=delivery.content_type,
        properties=delivery.properties,
        wait_ns=wait_ns,
    )


async def _nothing() -> None:
    """A message that needs nothing done."""
