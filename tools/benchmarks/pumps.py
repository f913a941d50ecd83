"""The load: a source that publishes and a sink that receives, MQTT 3.1.1 at QoS 1, too cheap to be what is timed.

Both live in one process, so that their moments are of one clock (nanoseconds, CLOCK_MONOTONIC). A message's payload is
JSON that begins with its number and the moment at which it was due; the sink finds both in whatever the contender made
of the payload, as long as it left the bytes alone, or packed several of them into one zstd frame.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import zstandard

from agent.errors import AgentError

HOST = "127.0.0.1"
KEEPALIVE_S = 600
MAX_MID = 65_535
WINDOW = 512  # publishes without PUBACK that the source allows itself
CONNACK, PUBLISH, PUBACK, SUBACK = 0x20, 0x30, 0x40, 0x90
ANSWER_SECONDS = 30.0
STALL_SECONDS = 60.0  # without an arrival, nothing more is expected
STAMP = re.compile(rb'\{"n":(\d+),"due":(\d+)')
RECEIVED, SYS_SECONDS = "$SYS/broker/bytes/received", 1.0
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
DIFFERENT = 256  # signals, so that none comes twice in a batch
SAMPLE, LAST = b"17.25,", b"17.25]}"

Feed = Callable[[int], bytes]


class PumpError(AgentError):
    """A broker does not answer, or messages stay away."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stream:
    """So many messages a second on one topic; `payload` makes each from the moment at which it is due."""

    topic: str
    per_s: float
    payload: Feed


class _Client(asyncio.Protocol):
    """One connection; whole packets come to `_packet`."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._transport: asyncio.Transport | None = None
        self._answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)  # noqa: S101 - narrows the type
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._answered.done():
            self._answered.set_exception(PumpError(f"the broker hung up: {exc}"))
            self._answered.exception()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        buffer, at, end = self._buffer, 0, len(self._buffer)
        while (found := _span(buffer, at, end)) is not None:
            body, after = found
            self._packet(buffer[at], buffer[body:after])
            at = after
        del buffer[:at]
        self._handled()

    async def open(self, port: int, client_id: str) -> None:
        """Connect with a clean session; raises PumpError."""
        await asyncio.get_running_loop().create_connection(lambda: self, HOST, port)
        body = b"\0\4MQTT\4\2" + KEEPALIVE_S.to_bytes(2, "big") + _text(client_id)
        await self._ask(packet(0x10, body))

    async def _subscribe(self, topic_filter: str, qos: int) -> None:
        await self._ask(packet(0x82, b"\0\1" + _text(topic_filter) + bytes([qos])))

    async def _ask(self, data: bytes) -> None:
        self._answered = asyncio.get_running_loop().create_future()
        self.write(data)
        async with asyncio.timeout(ANSWER_SECONDS):
            await self._answered

    def write(self, data: bytes) -> None:
        """Send; on a lost connection nothing happens."""
        if self._transport is not None:
            self._transport.write(data)

    def close(self) -> None:
        """End the connection."""
        if self._transport is not None:
            self._transport.abort()

    def _packet(self, head: int, body: bytearray) -> None:
        if head & 0xF0 in {CONNACK, SUBACK} and not self._answered.done():
            if head & 0xF0 == CONNACK and body[1]:
                self._answered.set_exception(PumpError(f"CONNACK code {body[1]}"))
            else:
                self._answered.set_result(None)

    def _handled(self) -> None:
        """All packets of one read were handled."""


class Source(_Client):
    """Publishes numbered messages; the numbers of one source never repeat."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0
        self.unacked = 0
        self._room = asyncio.Event()

    def publish(self, topic: str, payload: bytes) -> None:
        """Publish at QoS 1."""
        self.sent += 1
        self.unacked += 1
        mid = (self.sent - 1) % MAX_MID + 1
        self.write(packet(PUBLISH | 2, b"".join((_text(topic), mid.to_bytes(2, "big"), payload))))

    async def room(self) -> None:
        """Return when the window has room."""
        while self.unacked >= WINDOW:
            self._room.clear()
            async with asyncio.timeout(ANSWER_SECONDS):
                await self._room.wait()

    def _packet(self, head: int, body: bytearray) -> None:
        if head & 0xF0 == PUBACK:
            self.unacked -= 1
        else:
            super()._packet(head, body)

    def _handled(self) -> None:
        self._room.set()


class Sink(_Client):
    """Receives everything of one broker. `due` and `arrived` by number; `others`: without a stamp, or late.

    `publishes` are all that came, each with one message or a batch of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.due: dict[int, int] = {}
        self.arrived: dict[int, int] = {}
        self.others = 0
        self.duplicates = 0
        self.publishes = 0
        self.news = asyncio.Event()
        self._zstd = zstandard.ZstdDecompressor()
        self._first = 0
        self._pubacks: list[bytes] = []

    async def listen(self, port: int, client_id: str, topic_filter: str = "#") -> None:
        """Connect and subscribe; raises PumpError."""
        await self.open(port, client_id)
        await self._subscribe(topic_filter, 1)

    async def until(self, count: int) -> None:
        """Return when so many stamped messages have arrived; raises PumpError when they stay away."""
        while len(self.arrived) < count:
            await self.hear(f"{count - len(self.arrived)} messages stay away")

    async def hear(self, what: str) -> None:
        """Return when anything has arrived; raises PumpError, saying what was expected."""
        self.news.clear()
        try:
            async with asyncio.timeout(STALL_SECONDS):
                await self.news.wait()
        except TimeoutError as exc:
            raise PumpError(what) from exc

    def forget(self, first: int = 0) -> None:
        """Begin a new measurement: of messages from the number `first`, those before it come late."""
        self._first = first
        self.due.clear()
        self.arrived.clear()
        self.others = self.duplicates = self.publishes = 0

    def latencies_ms(self) -> list[float]:
        """From the moment at which each was due to its arrival, in the order of the numbers."""
        return [(self.arrived[number] - due) / 1e6 for number, due in sorted(self.due.items())]

    def _packet(self, head: int, body: bytearray) -> None:
        if head & 0xF0 != PUBLISH:
            super()._packet(head, body)
            return
        now = time.monotonic_ns()
        start = 2 + int.from_bytes(body[:2], "big")
        if head & 6:
            self._pubacks.append(b"\x40\x02" + body[start : start + 2])
        stamps = self._stamps(body, start + 2)
        self.publishes += 1
        self.others += not stamps
        for number, due in stamps:
            if number < self._first:
                self.others += 1
            elif number in self.arrived:
                self.duplicates += 1
            else:
                self.due[number], self.arrived[number] = due, now

    def _stamps(self, body: bytearray, at: int) -> list[tuple[int, int]]:
        """The numbers and moments in a payload."""
        if body.startswith(ZSTD_MAGIC, at):
            body, at = bytearray(self._zstd.decompress(body[at:])), 0
        return [(int(stamp[1]), int(stamp[2])) for stamp in STAMP.finditer(body, at)]

    def _handled(self) -> None:
        if self._pubacks:
            self.write(b"".join(self._pubacks))
            self._pubacks.clear()
        self.news.set()


class Meter(_Client):
    """What a mosquitto with `sys_interval 1` has received of all its clients, in bytes of MQTT."""

    def __init__(self) -> None:
        super().__init__()
        self._told = asyncio.Event()
        self._bytes = 0

    async def watch(self, port: int, client_id: str) -> None:
        """Connect and subscribe; raises PumpError."""
        await self.open(port, client_id)
        await self._subscribe(RECEIVED, 0)

    async def read(self) -> int:
        """The count once the broker has told it again, which it does only where it has changed; takes seconds."""
        await asyncio.sleep(2 * SYS_SECONDS)
        self._told.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(2 * SYS_SECONDS):
                await self._told.wait()
        return self._bytes

    def _packet(self, head: int, body: bytearray) -> None:
        if head & 0xF0 != PUBLISH:
            super()._packet(head, body)
            return
        self._bytes = int(body[2 + int.from_bytes(body[:2], "big") :])
        self._told.set()


class Numbers:
    """Makes stamped payloads of one size, each with a number of its own, counted from `first`."""

    def __init__(self, size: int, first: int = 0) -> None:
        self.made = first
        self._size = size

    def __call__(self, due_ns: int) -> bytes:
        """A JSON payload of the wanted size, or as small as a stamp allows."""
        stamp = b'{"n":%d,"due":%d,"samples":[' % (self.made, due_ns)
        self.made += 1
        samples, rest = divmod(max(self._size - len(stamp) - len(LAST), 0), len(SAMPLE))
        return b"".join((stamp, SAMPLE * samples, b" " * rest, LAST))


class Readings(Numbers):
    """As `Numbers`, but the samples are those of a signal with noise: as hard to compress as a sensor's."""

    def __init__(self, size: int, first: int = 0) -> None:
        super().__init__(size, first)
        chance = random.Random(size)
        self._signals = [_signal(chance, size) for _ in range(DIFFERENT)]

    def __call__(self, due_ns: int) -> bytes:
        """A JSON payload of about the wanted size."""
        stamp = b'{"n":%d,"due":%d,"samples":[' % (self.made, due_ns)
        signal = self._signals[self.made % DIFFERENT]
        self.made += 1
        return b"".join((stamp, signal[signal.index(b",", len(stamp)) + 1 :], LAST))


def _signal(chance: random.Random, size: int) -> bytes:
    """A random walk in hundredths."""
    value, found = 1725.0, bytearray()
    while len(found) < size:
        value += chance.gauss(0, 4)
        found += b"%.2f," % (value / 100)
    return bytes(found)


async def pace(source: Source, streams: Sequence[Stream], seconds: float) -> None:
    """Publish every stream at its own rate for so long, evenly, each message when it is due or late, never early."""
    start = time.monotonic_ns()
    plan = sorted(
        (start + int(1e9 * (number + index / len(streams)) / stream.per_s), index)
        for index, stream in enumerate(streams)
        for number in range(int(seconds * stream.per_s))
    )
    for due, index in plan:
        wait = (due - time.monotonic_ns()) / 1e9
        if wait > 0:
            await asyncio.sleep(wait)
        stream = streams[index]
        source.publish(stream.topic, stream.payload(due))
    await asyncio.sleep(0)


def packet(head: int, body: bytes) -> bytes:
    """A whole packet: its first byte, its length (MQTT 3.1.1, 2.2.3), its rest."""
    length, size = bytearray(), len(body)
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return b"".join((bytes([head, *length, size]), body))


def _span(buffer: bytearray, at: int, end: int) -> tuple[int, int] | None:
    """Where the packet at `at` has its body and its end; None where it is not whole yet."""
    size, shift, place = 0, 0, at + 1
    while place < end:
        byte = buffer[place]
        size |= (byte & 127) << shift
        shift, place = shift + 7, place + 1
        if byte < 128:
            return (place, place + size) if place + size <= end else None
    return None


def _text(text: str) -> bytes:
    data = text.encode()
    return len(data).to_bytes(2, "big") + data
