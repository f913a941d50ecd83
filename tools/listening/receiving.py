"""The loop of a listener: receive, judge, keep, acknowledge, and now and then write files.

Invariants:
- A PUBACK goes out only after the record is in the inbox (fsync), or its refusal is counted and written down; that of
  a batch after all of its records.
- Refused messages are acknowledged too: sent again they would be no better. They never reach a file of records.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from agent.errors import EndpointError
from agent.mqtt.backoff import Retries
from agent.mqtt.connection import Connection
from agent.mqtt.packets import Delivery, Session
from tools.listening.board import Board
from tools.listening.files import store
from tools.listening.inbox import Arrival, Inbox
from tools.listening.judging import REFUSED, Expectations, Judgement, Verdict, judge_all

BATCH = 512  # messages at a time; records per transaction, or a batch of them more
GAP_SECONDS = 0.002  # a batch ends where nothing follows for so long: the broker may wait for our PUBACKs
TICK_SECONDS = 0.25  # how often an idle listener looks at its timers
QUEUE_BYTES = 64 << 20
REFUSALS_LOGGED = 10_000  # lines of one run; a flood of bad messages must not fill the disk


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Where records go: files of `form` with at most so many rows and bytes, at the latest after `roll_s`."""

    folder: Path
    form: str
    roll_rows: int = 5_000
    roll_bytes: int = 64 << 20
    roll_s: float = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """One listener. It ends after `count` good records, or `idle_s` without any message; None = never."""

    session: Session
    filters: tuple[str, ...]
    expectations: Expectations
    consumer: str
    output: Output | None = None
    count: int | None = None
    idle_s: float | None = None


@dataclass(slots=True, kw_only=True)
class Listener:
    """One consumer at work. `show` is called about once per tick, `tell` with why the connection is away."""

    options: Options
    inbox: Inbox
    board: Board
    show: Callable[[], None] = lambda: None
    tell: Callable[[str], None] = lambda _why: None
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    _rolled: float = field(default_factory=time.monotonic)
    _heard: float | None = None
    _shown: float = 0.0
    _spooled: int = 0
    _logged: int = 0

    async def run_loop(self) -> None:
        """Receive until `stop` is set or an end is reached, and reconnect meanwhile; then write what is left.

        Raises EndpointError where not even the first connection succeeds. Cancelling loses nothing that was
        acknowledged.
        """
        retries = Retries(random.random)
        ever = False
        self._spooled = self.inbox.spooled()
        while not self._over():
            started = time.monotonic()
            connection = Connection(self.options.session, queue_limit=BATCH, queue_bytes=QUEUE_BYTES)
            try:
                await self._serve(connection)
            except EndpointError as exc:
                if not (ever or self.board.connected):
                    raise
                self.board.trouble = str(exc)
                self.tell(self.board.trouble)
            finally:
                ever, self.board.connected = ever or self.board.connected, False
                connection.close()
            if not self._over():
                await self._pause(retries.after(time.monotonic() - started))
        self._roll_all()

    async def _serve(self, connection: Connection) -> None:
        """Serve one connection. Records of a kept session come before the SUBACK, so they are read meanwhile."""
        await connection.open()
        subscribing = asyncio.create_task(self._subscribe(connection), name="subscribe")
        try:
            while not self._over():
                self._take(connection, await self._batch(connection))
                if subscribing.done():
                    subscribing.result()
                self._roll_if_due()
                self._show_if_due()
        finally:
            subscribing.cancel()

    async def _subscribe(self, connection: Connection) -> None:
        try:
            await connection.subscribe(self.options.filters)
        except TimeoutError as exc:
            message = "no SUBACK in time"
            raise EndpointError(message) from exc
        self.board.connected = True
        self._heard = time.monotonic()

    def _take(self, connection: Connection, batch: list[Delivery]) -> None:
        if batch:
            self._keep(batch)
            for delivery in batch:
                connection.ack(delivery)
            self._heard = time.monotonic()

    async def _batch(self, connection: Connection) -> list[Delivery]:
        """What arrives until the batch is full or a gap follows; empty after a tick of silence."""
        batch: list[Delivery] = []
        try:
            async with asyncio.timeout(TICK_SECONDS):
                batch.append(await connection.receive())
            while len(batch) < BATCH:
                async with asyncio.timeout(GAP_SECONDS):
                    batch.append(await connection.receive())
        except TimeoutError:
            pass
        except EndpointError:
            if not batch:
                raise
        return batch

    def _keep(self, batch: list[Delivery]) -> None:
        """Keep all that is good; where batches came, in several transactions, so that memory stays bounded."""
        arrivals: list[Arrival] = []
        for delivery in batch:
            arrivals += self._judged(delivery)
            if len(arrivals) >= BATCH:
                self._keep_good(arrivals)
                arrivals = []
        self._keep_good(arrivals)

    def _judged(self, delivery: Delivery) -> Iterator[Arrival]:
        """The good records of a message; all others are counted and written down."""
        found = judge_all(
            delivery.topic, delivery.payload, delivery.content_type, delivery.properties, self.options.expectations
        )
        for judgement in found:
            self.board.judged(delivery.topic, judgement)
            if judgement.verdict in REFUSED:
                self._log(delivery, judgement)
            elif judgement.verdict is Verdict.GOOD and judgement.envelope is not None:
                yield Arrival(topic=delivery.topic, envelope=judgement.envelope)

    def _keep_good(self, arrivals: list[Arrival]) -> None:
        now_ns = time.time_ns()
        for arrival, fresh in zip(arrivals, self.inbox.take(arrivals), strict=True):
            self.board.took(arrival.envelope, fresh=fresh, now_ns=now_ns)
            self._spooled += fresh

    def _log(self, delivery: Delivery, judgement: Judgement) -> None:
        """Write a refusal down: what it claims and the digest of its message, never its data."""
        if self.options.output is None or self._logged >= REFUSALS_LOGGED:
            return
        self._logged += 1
        claims = judgement.envelope.attributes if judgement.envelope else None
        line = {
            "verdict": judgement.verdict.value,
            "topic": delivery.topic,
            "detail": judgement.detail,
            "source": claims.source if claims else None,
            "id": claims.id if claims else None,
            "dataregion": ",".join(claims.dataregion) if claims else None,
            "sha256": sha256(delivery.payload).hexdigest(),
            "receivedns": delivery.received_ns,
        }
        path = self.options.output.folder / f"refused-{self.options.consumer}.jsonl"
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def _roll_if_due(self) -> None:
        output = self.options.output
        if output is None:
            return
        if time.monotonic() - self._rolled >= output.roll_s or self._spooled >= output.roll_rows:
            self._roll_all()

    def _show_if_due(self) -> None:
        if time.monotonic() - self._shown >= TICK_SECONDS:
            self._shown = time.monotonic()
            self.show()

    def _roll_all(self) -> None:
        """Put everything that is spooled into files."""
        self._rolled = time.monotonic()
        output = self.options.output
        while output is not None and (roll := self.inbox.roll(output.roll_rows, output.roll_bytes)) is not None:
            store(output.folder, output.form, self.options.consumer, roll)
            self.inbox.written(roll)
        self._spooled = 0

    def _over(self) -> bool:
        options = self.options
        enough = options.count is not None and self.board.good >= options.count
        return self.stop.is_set() or enough or self._silent()

    def _silent(self) -> bool:
        """Whether nothing came for `idle_s` since the first connection."""
        limit = self.options.idle_s
        return limit is not None and self._heard is not None and time.monotonic() - self._heard > limit

    async def _pause(self, seconds: float) -> None:
        self.show()
        try:
            async with asyncio.timeout(seconds):
                await self.stop.wait()
        except TimeoutError:
            return
