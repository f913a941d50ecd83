"""What goes into and comes out of an MQTT connection."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import msgspec
from paho.mqtt.properties import Properties

SUCCESS_CODES = frozenset({0x00, 0x10})  # MQTT 5.0, 3.4.2.1: Success; No matching subscribers


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """How to connect: who we are to the broker, and what it shall keep for us.

    `server_name`: the name that the certificate of the broker must be for; empty: its host.
    """

    host: str
    port: int
    client_id: str
    protocol: Literal["5", "3.1.1"] = "5"
    username: str = ""
    password: str = ""
    keepalive_s: int = 30
    clean_start: bool = True
    session_expiry_s: int = 0
    receive_maximum: int = 256
    maximum_packet_bytes: int = 16 << 20
    tls: ssl.SSLContext | None = None
    server_name: str = ""
    will: Will | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Will:
    """A message that the broker publishes, retained, when the connection is lost."""

    topic: str
    payload: bytes


class Delivery(msgspec.Struct, frozen=True, kw_only=True):
    """One PUBLISH from a broker, not yet acknowledged; `connection` tells which connection delivered it.

    It may have lain in the socket for `unseen_ns` before it was read; 0 unless the process stood still.
    `malformed`: its properties make no sense, so its payload, which begins with them, makes none either.
    """

    connection: int
    topic: str
    payload: bytes
    mid: int
    qos: int
    dup: bool
    retain: bool
    content_type: str | None
    properties: tuple[tuple[str, str], ...]
    received_ns: int
    monotonic_ns: int
    unseen_ns: int = 0
    malformed: bool = False

    def property(self, name: str) -> str | None:
        """The first user property of this name."""
        return next((value for key, value in self.properties if key == name), None)


class Outgoing(msgspec.Struct, frozen=True, kw_only=True):
    """One PUBLISH that we send. Content type, properties and expiry travel on MQTT 5 only."""

    topic: str
    payload: bytes
    retain: bool = False
    content_type: str | None = None
    properties: Sequence[tuple[str, str]] = ()
    expiry_s: int | None = None

    def packed(self) -> bytes:
        """The properties of an MQTT 5 PUBLISH as they go over the wire."""
        parts: list[bytes] = []
        if self.expiry_s is not None:
            parts.append(b"\x02" + self.expiry_s.to_bytes(4, "big"))
        if self.content_type is not None:
            parts.append(b"\x03" + _text(self.content_type))
        for name, value in self.properties:
            parts += (b"\x26", _name(name), _text(value))
        body = b"".join(parts)
        return _varint(len(body)) + body

    def size(self, packed: bytes) -> int:
        """Bytes of the whole PUBLISH at QoS 1; `packed` is empty on MQTT 3.1.1."""
        remaining = 2 + len(self.topic.encode()) + 2 + len(packed) + len(self.payload)
        return 1 + len(_varint(remaining)) + remaining

    def packet(self, head: int, mid: int, packed: bytes) -> bytes:
        """The whole PUBLISH (MQTT 5.0, 3.3); ValueError for a topic that is a filter, or too long."""
        if "+" in self.topic or "#" in self.topic:
            raise ValueError("a topic with a wildcard")
        start = _text(self.topic) + mid.to_bytes(2, "big") + packed
        return b"".join((bytes([head]), _varint(len(start) + len(self.payload)), start, self.payload))


class PackedProperties(Properties):
    """Properties of a PUBLISH that are packed already: paho's own packing takes most of the time of a publish."""

    def __init__(self, packed: bytes) -> None:
        object.__setattr__(self, "_packed", packed)

    def pack(self) -> bytes:
        """What paho puts into the packet."""
        packed: bytes = vars(self)["_packed"]
        return packed


@lru_cache(maxsize=256)
def _name(value: str) -> bytes:
    """As `_text`: the names of user properties are few."""
    return _text(value)


def _text(value: str) -> bytes:
    """MQTT 5.0, 1.5.4: two bytes of length, then UTF-8."""
    data = value.encode()
    try:
        return len(data).to_bytes(2, "big") + data
    except OverflowError as exc:
        raise ValueError("a text of more than 65,535 bytes") from exc


def _varint(number: int) -> bytes:
    """MQTT 5.0, 1.5.5: seven bits a byte, the lowest first."""
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


class Puback(msgspec.Struct, frozen=True, kw_only=True):
    """What the endpoint said of one publish; `code` is 0 on MQTT 3.1.1."""

    code: int

    @property
    def accepted(self) -> bool:
        """Whether the endpoint took responsibility for the message."""
        return self.code in SUCCESS_CODES
