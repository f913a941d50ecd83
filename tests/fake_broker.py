"""An MQTT broker for tests that does what mosquitto cannot: lie, stall, stammer, drop and answer anything.

It parses packets itself and shares no code with the agent or paho. A test changes the fields of `FakeBroker` or
replaces its `on_publish`, and looks at what the sessions received.
"""

import asyncio
import contextlib
import socket
import struct
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK = 1, 2, 3, 4, 8, 9, 10, 11
PINGREQ, PINGRESP, DISCONNECT = 12, 13, 14
RECEIVE_MAXIMUM, MAXIMUM_PACKET, SERVER_REFERENCE, MAXIMUM_QOS, SERVER_KEEP_ALIVE = 0x21, 0x27, 0x1C, 0x24, 0x13
SIZES = {0x01: 1, 0x02: 4, 0x11: 4, 0x13: 2, 0x21: 2, 0x22: 2, 0x23: 2, 0x24: 1, 0x27: 4}
TEXTS = (0x03, 0x08, 0x1C)


def varint(number):
    out = bytearray()
    while True:
        number, digit = divmod(number, 128)
        out.append(digit | (128 if number else 0))
        if not number:
            return bytes(out)


def text(value):
    data = value.encode()
    return struct.pack(">H", len(data)) + data


def properties(**values):
    """Named by the constants above, in small letters: receive_maximum, server_reference and so on."""
    packed = b""
    for name, value in values.items():
        number = globals()[name.upper()]
        packed += bytes([number])
        packed += text(value) if number in TEXTS else value.to_bytes(SIZES[number], "big")
    return varint(len(packed)) + packed


def packet(kind, body, flags=0):
    return bytes([kind << 4 | flags]) + varint(len(body)) + body


class Body:
    """Reads a packet's fields one after the other."""

    def __init__(self, data):
        self.data, self.at = data, 0

    def take(self, size):
        found = self.data[self.at : self.at + size]
        assert len(found) == size, "the client sent a torn packet"
        self.at += size
        return found

    def number(self, size):
        return int.from_bytes(self.take(size), "big")

    def text(self):
        return self.take(self.number(2))

    def varint(self):
        value = shift = 0
        while True:
            byte = self.number(1)
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    def properties(self):
        """{number: value}; user properties as a list of pairs under 0x26."""
        end, found = self.varint() + self.at, {0x26: []}
        while self.at < end:
            number = self.number(1)
            if number == 0x26:
                found[0x26].append((self.text().decode(), self.text().decode()))
            else:
                found[number] = self.text() if number in TEXTS else self.number(SIZES[number])
        return found

    @property
    def rest(self):
        return self.data[self.at :]


@dataclass
class Publish:
    """A PUBLISH as a client sent it."""

    session: int
    topic: str
    payload: bytes
    mid: int
    qos: int
    dup: bool
    properties: dict
    size: int


@dataclass
class Session:
    """One TCP connection of a client, from CONNECT to its end."""

    number: int
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    broker: "FakeBroker"
    client_id: str = ""
    version: int = 5
    keepalive: int = 0
    connect: dict = field(default_factory=dict)
    filters: list = field(default_factory=list)
    ended_filters: list = field(default_factory=list)
    published: list = field(default_factory=list)
    acked: list = field(default_factory=list)
    pings: int = 0
    farewell: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    _mid: int = 0

    def send(self, data):
        """Raw bytes, in segments where the broker stammers."""
        if self.broker.segment is None:
            self.writer.write(data)
        else:
            self.broker.group.append(asyncio.create_task(self._stammer(data)))

    async def _stammer(self, data):
        async with self.broker.stammering:
            for start in range(0, len(data), self.broker.segment):
                self.writer.write(data[start : start + self.broker.segment])
                await asyncio.sleep(0)

    def puback(self, mid, code=0):
        body = struct.pack(">H", mid)
        self.send(packet(PUBACK, body + bytes([code, 0]) if self.version == 5 and code else body))

    def deliver(self, topic, payload, *, mid=None, dup=False, retain=False, qos=1):
        """A PUBLISH to the client."""
        if mid is None:
            mid = self._mid = self._mid + 1
        head = text(topic) + (struct.pack(">H", mid) if qos else b"")
        body = head + (b"\0" if self.version == 5 else b"") + payload
        self.send(packet(PUBLISH, body, dup << 3 | qos << 1 | retain))
        return mid

    def disconnect(self, code, packed=b"\0"):
        """Send DISCONNECT; nothing that comes after it is looked at."""
        self.send(packet(DISCONNECT, bytes([code]) + packed))
        self.ended.set()
        self.writer.close()

    def abort(self):
        """A TCP reset."""
        self.writer.transport.abort()

    async def serve(self):
        with contextlib.suppress(OSError, EOFError):
            while not self.ended.is_set():
                await self.broker.reading.wait()
                head = (await self.reader.readexactly(1))[0]
                size = await self._remaining()
                data = await self._body(size)
                if self.ended.is_set():
                    break
                self._handle(head, Body(data), size + 1 + len(varint(size)))
        self.ended.set()

    async def _remaining(self):
        value = shift = 0
        while True:
            byte = (await self.reader.readexactly(1))[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    async def _body(self, size):
        rate, data = self.broker.bytes_per_s, b""
        if rate is None:
            return await self.reader.readexactly(size)
        while len(data) < size:
            await asyncio.sleep(0.02)
            data += await self.reader.readexactly(min(max(int(rate * 0.02), 1), size - len(data)))
        return data

    def _handle(self, head, body, size):
        kind = head >> 4
        if kind == CONNECT:
            self._on_connect(body)
        elif kind == PUBLISH:
            self._on_publish(head, body, size)
        elif kind == PUBACK:
            self.acked.append(body.number(2))
            self.broker.on_puback(self)
        elif kind == SUBSCRIBE:
            self._on_subscribe(body)
        elif kind == UNSUBSCRIBE:
            self._on_unsubscribe(body)
        elif kind == PINGREQ:
            self.pings += 1
            self.send(packet(PINGRESP, b""))
        elif kind == DISCONNECT:
            self.farewell = True
            self.ended.set()

    def _on_connect(self, body):
        body.text()
        self.version = body.number(1)
        body.number(1)
        self.keepalive = body.number(2)
        self.connect = body.properties() if self.version == 5 else {}
        self.client_id = body.text().decode()
        self.broker.sessions.append(self)
        if self.broker.connack is None:
            return
        tail = properties(**self.broker.connack_properties) if self.version == 5 else b""
        self.send(packet(CONNACK, bytes([self.broker.session_present, self.broker.connack]) + tail))
        self.broker.news.set()

    def _on_publish(self, head, body, size):
        topic, qos = body.text().decode(), head >> 1 & 3
        mid = body.number(2) if qos else 0
        found = body.properties() if self.version == 5 else {}
        made = Publish(self.number, topic, body.rest, mid, qos, bool(head & 8), found, size)
        self.published.append(made)
        self.broker.published.append(made)
        self.broker.news.set()
        self.broker.on_publish(self, made)

    def _on_subscribe(self, body):
        mid = body.take(2)
        if self.version == 5:
            body.properties()
        granted = b""
        while body.rest:
            self.filters.append(body.text().decode())
            body.number(1)
            granted += bytes([self.broker.suback])
        self.send(packet(SUBACK, mid + (b"\0" if self.version == 5 else b"") + granted))
        self.broker.news.set()

    def _on_unsubscribe(self, body):
        mid = body.take(2)
        if self.version == 5:
            body.properties()
        codes = b""
        while body.rest:
            self.ended_filters.append(body.text().decode())
            codes += bytes([self.broker.unsuback])
        self.send(packet(UNSUBACK, mid + (b"\0" + codes if self.version == 5 else b"")))


class FakeBroker:
    """Accepts everything, until a test says otherwise."""

    host = "127.0.0.1"

    def __init__(self):
        self.port = 0
        self.connack = 0
        self.connack_properties = {}
        self.suback = 1
        self.session_present = 0
        self.unsuback = 0
        self.segment = None
        self.bytes_per_s = None
        self.sessions = []
        self.published = []
        self.connections = 0
        self.on_publish = lambda session, publish: session.puback(publish.mid)
        self.on_puback = lambda _session: None
        self.news = asyncio.Event()
        self.reading = asyncio.Event()
        self.reading.set()
        self.stammering = asyncio.Lock()
        self.group = []

    @property
    def session(self):
        return self.sessions[-1]

    @property
    def payloads(self):
        return [publish.payload for publish in self.published]

    async def until(self, condition):
        """Wait for what must happen; the test's own timeout ends it."""
        while not condition():
            self.news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.news.wait(), 0.02)

    async def accept(self, reader, writer):
        self.connections += 1
        session = Session(self.connections, reader, writer, self)
        self.group.append(asyncio.current_task())
        try:
            await session.serve()
        finally:
            writer.transport.abort()


@asynccontextmanager
async def fake_broker(*, receive_buffer=None, port=0):
    """A listening FakeBroker; `receive_buffer` bytes of kernel memory for each connection."""
    broker = FakeBroker()
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if receive_buffer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    sock.bind((broker.host, port))
    limit = {"limit": receive_buffer} if receive_buffer else {}
    server = await asyncio.start_server(broker.accept, sock=sock, **limit)
    broker.port = sock.getsockname()[1]
    try:
        yield broker
    finally:
        server.close()
        for session in broker.sessions:
            session.writer.transport.abort()
        for task in broker.group:
            task.cancel()
        await asyncio.gather(*broker.group, return_exceptions=True)


def silent(_session, _publish):
    """An endpoint that takes everything and acknowledges nothing."""
