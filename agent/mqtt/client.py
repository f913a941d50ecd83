"""paho clients as this agent uses them: built and connected here, driven by `transport`.

paho asks the kernel for every byte of a header, sends every packet by a call of its own, makes a dozen objects of a
PUBLISH or a PUBACK, and refuses properties that MQTT allows. So these two, and nothing else of the protocol, are read
and written here: paho introduces itself, subscribes, keeps alive and disconnects. It gets a socket that is connected.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Container
from typing import TYPE_CHECKING, Any, NamedTuple

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.boot import boot_ns
from agent.mqtt.packets import Outgoing, Session
from agent.settings.config import LARGEST_PACKET

if TYPE_CHECKING:  # paho defines it for type checkers only
    from paho.mqtt.client import SocketLike

READ_BYTES = 64 << 10  # read at a time
SEND_BYTES = 64 << 10  # collected before they must be sent
PUBLISH, PUBACK, DISCONNECT = 0x30, 0x40, 0xE0  # MQTT 5.0, 2.1.2
PUBACK_CODES = frozenset({0x00, 0x10, 0x80, 0x83, 0x87, 0x90, 0x91, 0x97, 0x99})  # MQTT 5.0, 3.4.2.1
EXACTLY_ONCE = 2
CONTENT_TYPE, SUBSCRIPTION, USER_PROPERTY = 0x03, 0x0B, 0x26  # MQTT 5.0, 2.2.2.2, as the next two
FIXED_BYTES = {0x01: 1, 0x02: 4, 0x23: 2}  # Payload Format Indicator, Message Expiry Interval, Topic Alias
COUNTED = frozenset({0x08, 0x09})  # Response Topic, Correlation Data: two bytes of length, then so many


class Incoming(NamedTuple):
    """A PUBLISH as it came, with those of its properties that anybody here asks for.

    `malformed`: its properties make no sense, so nobody knows where they end: the payload begins with them.
    """

    topic: bytes
    payload: bytes
    mid: int
    qos: int
    dup: bool
    retain: bool
    content_type: str | None = None
    properties: tuple[tuple[str, str], ...] = ()
    malformed: bool = False


class DirectClient(Client):
    """A client of one connection, which is made elsewhere: `connected` is its socket.

    What it publishes is not in paho's books, so paho never sends it again. `on_incoming` gets each PUBLISH at QoS 0 or
    1, `on_puback` each PUBACK as its packet identifier and reason code. A DISCONNECT goes out at once. A packet of more
    than `largest` bytes makes no sense. Where it `only_publishes`, paho, which keeps each PUBLISH at QoS 2, gets none.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401 - paho's own
        super().__init__(*arguments, **options)
        self.on_incoming: Callable[[Incoming], None] = lambda _: None
        self.on_puback: Callable[[int, int], None] = lambda _mid, _code: None
        self._ahead, self._taken = bytearray(), 0
        self.connected: SocketLike | None = None
        self.emptied_ns: int | None = None  # when (boot time) all was read that the socket held; None: nobody knows
        self._unsent = bytearray()
        self.writes = 0  # to the socket so far
        self.largest = LARGEST_PACKET
        self.only_publishes = False

    @property
    def has_packet(self) -> bool:
        """Whether a whole packet, or one that makes no sense, has left the socket and nobody has seen it."""
        try:
            return _span(self._ahead, self._taken, self.largest) is not None
        except ValueError:
            return True

    def send(self, message: Outgoing, packed: bytes, busy: Container[int]) -> int:
        """Publish at QoS 1, with the properties as they are packed; the packet identifier, which is none of `busy`."""
        while (mid := self._mid_generate()) in busy:
            pass
        head = PUBLISH | 2 | message.retain
        self._packet_queue(head, message.packet(head, mid, packed), mid, 1)
        return mid

    def acknowledge(self, mid: int) -> None:
        """Send a PUBACK that says success."""
        self._packet_queue(PUBACK, b"\x40\x02" + mid.to_bytes(2, "big"), mid, 1)

    def want_write(self) -> bool:
        """Whether anything waits for the socket."""
        return bool(self._unsent) or super().want_write()

    def _create_socket(self) -> SocketLike:
        """No socket of paho's own, which might lead through the proxy that the environment names."""
        if self.connected is None:
            raise ConnectionError("no connection")
        return self.connected

    def _packet_read(self) -> MQTTErrorCode:
        """Take one packet; MQTT_ERR_AGAIN where none is whole yet. Raises for what makes no sense."""
        try:
            while (span := _span(self._ahead, self._taken, self.largest)) is None:
                if not self._fill():
                    return MQTTErrorCode.MQTT_ERR_CONN_LOST
        except BlockingIOError:
            return MQTTErrorCode.MQTT_ERR_AGAIN
        except OSError:
            return MQTTErrorCode.MQTT_ERR_CONN_LOST
        head, body = self._ahead[self._taken], bytes(memoryview(self._ahead)[span[0] : span[1]])
        self._taken = span[1]
        self._last_bytes_received = time.monotonic()
        kind = head & 0xF0
        if kind == PUBLISH and (self.only_publishes or head >> 1 & 3 != EXACTLY_ONCE):
            self.on_incoming(_incoming(head, body, has_properties=self._protocol == MQTTProtocolVersion.MQTTv5))
            return MQTTErrorCode.MQTT_ERR_SUCCESS
        if kind == PUBACK:
            self.on_puback(*_puback(body))
            return MQTTErrorCode.MQTT_ERR_SUCCESS
        return self._handle(head, body)

    def _handle(self, head: int, body: bytes) -> MQTTErrorCode:
        """Let paho handle a packet."""
        self._in_packet["command"] = head
        self._in_packet["packet"] = bytearray(body)
        self._in_packet["remaining_length"] = len(body)
        self._in_packet["pos"] = 0
        return self._packet_handle()

    def _fill(self) -> bool:
        """Read what has come; False at the end of the stream, BlockingIOError when nothing has."""
        if self._taken:
            del self._ahead[: self._taken]
            self._taken = 0
        self.emptied_ns, now_ns = None, boot_ns()
        data = super()._sock_recv(READ_BYTES)
        if len(data) < READ_BYTES and not isinstance(self._sock, ssl.SSLSocket):  # TLS gives one record at a time
            self.emptied_ns = now_ns
        self._ahead += data
        return bool(data)

    def _sock_send(self, buf: bytes | bytearray) -> int:
        """Take all, to be sent by `_packet_write`; BlockingIOError while too much waits."""
        last = buf[0] & 0xF0 == DISCONNECT
        if last or len(self._unsent) >= SEND_BYTES:
            self._flush()
        if last:
            return super()._sock_send(buf)
        self._unsent += buf
        return len(buf)

    def _packet_write(self) -> MQTTErrorCode:
        result = super()._packet_write()
        if result not in {MQTTErrorCode.MQTT_ERR_SUCCESS, MQTTErrorCode.MQTT_ERR_AGAIN}:
            return result
        try:
            self._flush()
        except BlockingIOError:
            return MQTTErrorCode.MQTT_ERR_AGAIN
        except OSError:
            return MQTTErrorCode.MQTT_ERR_CONN_LOST
        return result

    def _flush(self) -> None:
        while self._unsent:
            self.writes += 1
            sent = super()._sock_send(self._unsent)
            del self._unsent[:sent]


def _span(data: bytearray, at: int, largest: int) -> tuple[int, int] | None:
    """Where the rest of the packet at `at` begins and ends (MQTT 5.0, 2.1.4); None where it is not whole.

    ValueError where it is longer than `largest`, and before it is read.
    """
    size = shift = 0
    for place in range(at + 1, min(at + 5, len(data))):
        byte = data[place]
        size |= (byte & 127) << shift
        if byte < 128:
            if size > largest:
                raise ValueError("a packet that is too large")
            return (place + 1, place + 1 + size) if place + 1 + size <= len(data) else None
        shift += 7
    if shift == 28:
        raise ValueError("a length of more than four bytes")
    return None


def _incoming(head: int, body: bytes, *, has_properties: bool) -> Incoming:
    """MQTT 5.0, 3.3; raises where the packet is too short for a topic and a packet identifier.

    A broker sends a message of a kept session again and again, so one whose properties make no sense must be taken.
    """
    at = 2 + int.from_bytes(body[:2], "big")
    topic, mid, qos = body[2:at], 0, head >> 1 & 3
    if qos:
        mid = int.from_bytes(body[at : at + 2], "big")
        at += 2
    if at > len(body) or qos > EXACTLY_ONCE or (qos and not mid):
        raise ValueError("a PUBLISH that is too short")
    dup, retain = bool(head & 8), bool(head & 1)
    if not has_properties:
        return Incoming(topic, body[at:], mid, qos, dup, retain)
    if body[at : at + 1] == b"\0":
        return Incoming(topic, body[at + 1 :], mid, qos, dup, retain)
    try:
        content_type, properties, end = _properties(body, at)
    except ValueError:
        return Incoming(topic, body[at:], mid, qos, dup, retain, malformed=True)
    return Incoming(topic, body[end:], mid, qos, dup, retain, content_type, properties)


def _properties(body: bytes, at: int) -> tuple[str | None, tuple[tuple[str, str], ...], int]:
    """Content Type, User Properties, and where the payload begins (MQTT 5.0, 3.3.2.3); ValueError for nonsense.

    paho refuses texts with U+FEFF, which MQTT 5.0, 1.5.4 allows, and takes eight times as long.
    """
    content_type, user = None, []
    size, at = _number(body, at)
    end = at + size
    while at < end <= len(body):
        kind = body[at]
        at += 1
        if kind == USER_PROPERTY:
            name, at = _text(body, at)
            value, at = _text(body, at)
            user.append((name, value))
        elif kind == CONTENT_TYPE and content_type is None:
            content_type, at = _text(body, at)
        elif kind in FIXED_BYTES:
            at += FIXED_BYTES[kind]
        elif kind in COUNTED:
            at += 2 + int.from_bytes(body[at : at + 2], "big")
        elif kind == SUBSCRIPTION:
            _, at = _number(body, at)
        else:
            raise ValueError("a property that a PUBLISH does not have, or not twice")
    if at != end:
        raise ValueError("properties that do not end where they should")
    return content_type, tuple(user), end


def _text(body: bytes, at: int) -> tuple[str, int]:
    """A text and where it ends (MQTT 5.0, 1.5.4); bytes that are no UTF-8 are escaped."""
    begin = at + 2
    end = begin + int.from_bytes(body[at:begin], "big")
    return body[begin:end].decode("utf-8", "backslashreplace"), end


def _number(body: bytes, at: int) -> tuple[int, int]:
    """A variable byte integer and where it ends (MQTT 5.0, 1.5.5); ValueError where there is none."""
    value = 0
    for place, byte in enumerate(body[at : at + 4]):
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value, at + place + 1
    raise ValueError("no variable byte integer")


def _puback(body: bytes) -> tuple[int, int]:
    """Packet identifier and reason code (MQTT 5.0, 3.4.2); raises for a code that does not exist."""
    code = body[2] if len(body) > 2 else 0
    if len(body) < 2 or code not in PUBACK_CODES:
        raise ValueError("a PUBACK that is none")
    return int.from_bytes(body[:2], "big"), code


def new_client(session: Session) -> DirectClient:
    """An unconnected client that acknowledges, reconnects and limits its window only when told to."""
    is_v5 = session.protocol == "5"
    client = DirectClient(
        CallbackAPIVersion.VERSION2,
        client_id=session.client_id,
        protocol=MQTTProtocolVersion.MQTTv5 if is_v5 else MQTTProtocolVersion.MQTTv311,
        clean_session=None if is_v5 else session.clean_start,
        manual_ack=True,
        reconnect_on_failure=False,
    )
    if session.username:
        client.username_pw_set(session.username, session.password)
    if session.will is not None:
        client.will_set(session.will.topic, session.will.payload, qos=1, retain=True)
    return client


def connect(client: DirectClient, session: Session, connected: SocketLike) -> None:
    """Send CONNECT on a connected socket. Raises OSError, and whatever the client's socket callbacks raise.

    Then the socket is closed: nothing, not even a DISCONNECT, goes to a peer that is not the endpoint.
    """
    client.connected = connected
    options: dict[str, Any] = {}
    if session.protocol == "5":
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = session.session_expiry_s
        properties.ReceiveMaximum = session.receive_maximum
        properties.MaximumPacketSize = session.maximum_packet_bytes
        options = {"clean_start": session.clean_start, "properties": properties}
    try:
        client.connect(session.host, session.port, session.keepalive_s, **options)
    except BaseException:
        connected.close()
        raise
