"""What goes into and comes out of an MQTT connection."""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

SUCCESS_CODES = frozenset({0x00, 0x10})  # MQTT 5.0, 3.4.2.1: Success; No matching subscribers


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """How to connect: who we are to the broker, and what it shall keep for us."""

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
    will: Will | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Will:
    """A message that the broker publishes, retained, when the connection is lost."""

    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """One PUBLISH from a broker, not yet acknowledged; `connection` tells which connection delivered it."""

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

    def property(self, name: str) -> str | None:
        """The first user property of this name."""
        return next((value for key, value in self.properties if key == name), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """One PUBLISH that we send. Content type, properties and expiry travel on MQTT 5 only."""

    topic: str
    payload: bytes
    retain: bool = False
    content_type: str | None = None
    properties: Sequence[tuple[str, str]] = ()
    expiry_s: int | None = None

    def packed(self) -> Properties:
        """The properties of an MQTT 5 PUBLISH."""
        packed = Properties(PacketTypes.PUBLISH)
        if self.content_type is not None:
            packed.ContentType = self.content_type
        if self.expiry_s is not None:
            packed.MessageExpiryInterval = self.expiry_s
        if self.properties:
            packed.UserProperty = list(self.properties)
        return packed


@dataclass(frozen=True, slots=True, kw_only=True)
class Puback:
    """What the endpoint said of one publish; `code` is 0 on MQTT 3.1.1."""

    code: int

    @property
    def accepted(self) -> bool:
        """Whether the endpoint took responsibility for the message."""
        return self.code in SUCCESS_CODES
