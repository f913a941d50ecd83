"""The tools' own MQTT client: addresses on the command line, a connection that is there or an error, properties."""

from __future__ import annotations

import argparse
import secrets
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import paho.mqtt.client as paho
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties as PahoProperties
from paho.mqtt.reasoncodes import ReasonCode

from agent.errors import EndpointError
from agent.mqtt.packets import PackedProperties
from tools.recording import NO_PROPERTIES, Properties

CONNECT_SECONDS = 10.0
KEEPALIVE_SECONDS = 30
SESSION_SECONDS = 0xFFFFFFFF  # MQTT 5.0, 3.1.2.11.2: the session does not expire
READ_BYTES = 1 << 16
REASON_AT, LEAST_FAILURE = 2, 0x80  # MQTT 5.0, 3.5.2 and 2.4: the reason code of a PUBREC behind its packet id
NO_LIMIT = 65_535  # MQTT 5.0, 3.2.2.3.3: the Receive Maximum of a broker that states none
REMEMBERED = 1024  # sets of properties
PROTOCOLS = {"5": paho.MQTTv5, "3.1.1": paho.MQTTv311}


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """A broker and how to speak to it."""

    host: str = "127.0.0.1"
    port: int = 1883
    protocol: Literal["5", "3.1.1"] = "5"
    username: str = ""
    password: str = ""
    ca_file: str = ""
    tls: bool = False


def add_address_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that name a broker."""
    group = parser.add_argument_group("broker")
    group.add_argument("--host", default="127.0.0.1", help="default: %(default)s")
    group.add_argument("--port", type=int, default=1883, help="default: %(default)s")
    group.add_argument("--protocol", choices=sorted(PROTOCOLS), default="5", help="MQTT version, default: %(default)s")
    group.add_argument("--username", default="")
    group.add_argument("--password-file", type=Path, help="file that holds the password")
    group.add_argument("--tls", action="store_true", help="use TLS with the system's roots")
    group.add_argument("--ca-file", default="", help="PEM file of trusted roots; implies --tls")


def address_of(arguments: argparse.Namespace) -> Address:
    """Read the options that `add_address_arguments` added."""
    password = arguments.password_file.read_text(encoding="utf-8").strip() if arguments.password_file else ""
    return Address(
        host=arguments.host,
        port=arguments.port,
        protocol=arguments.protocol,
        username=arguments.username,
        password=password,
        ca_file=arguments.ca_file,
        tls=arguments.tls or bool(arguments.ca_file),
    )


class _Buffered:
    """A socket that is read in large pieces: paho reads a PUBACK in three calls, each of which hands the GIL over."""

    def __init__(self, sock: Any) -> None:  # noqa: ANN401 - plain, TLS or websocket
        self._sock = sock
        self._data = b""
        self._place = 0

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever else a socket can
        return getattr(self._sock, name)

    def recv(self, size: int) -> bytes:
        """At most so many bytes, as a socket gives them."""
        if self._place == len(self._data):
            self._data, self._place = self._sock.recv(READ_BYTES), 0
        found = self._data[self._place : self._place + size]
        self._place += len(found)
        return found

    def pending(self) -> int:
        """What paho asks before it waits for the socket."""
        return len(self._data) - self._place + getattr(self._sock, "pending", int)()


class Client(paho.Client):
    """paho's client; whoever publishes keeps to `receive_maximum` publishes without PUBACK: the broker stated it."""

    receive_maximum = NO_LIMIT

    def _create_socket(self) -> Any:  # noqa: ANN401 - paho's own type is private
        return _Buffered(super()._create_socket())

    def _handle_pubrec(self) -> MQTTErrorCode:
        """A PUBREC with an error ends the delivery (MQTT 5.0, 4.3.3); paho alone takes every PUBREC for a good one."""
        packet = self._in_packet["packet"]
        refused = len(packet) > REASON_AT and packet[REASON_AT] >= LEAST_FAILURE
        return self._handle_pubackcomp("PUBACK") if refused else super()._handle_pubrec()


def own_id(command: str) -> str:
    """A client id that no other process has: in containers several have the same number, and a broker keeps one."""
    return f"residency-{command}-{secrets.token_hex(4)}"


def new_client(address: Address, client_id: str, *, keep_session: bool = False) -> Client:
    """Build an unconnected client for the address."""
    client = Client(
        CallbackAPIVersion.VERSION2,
        client_id=client_id,
        protocol=PROTOCOLS[address.protocol],
        clean_session=None if address.protocol == "5" else not keep_session,
    )
    client.max_inflight_messages_set(0)
    if address.username:
        client.username_pw_set(address.username, address.password)
    if address.tls:
        client.tls_set_context(ssl.create_default_context(cafile=address.ca_file or None))
    return client


@contextmanager
def connected(
    client: Client,
    address: Address,
    *,
    keep_session: bool = False,
    on_connected: Callable[[paho.Client], object] | None = None,
) -> Iterator[Client]:
    """Connect, run the client's network thread, and disconnect at the end; raises EndpointError.

    `on_connected` is called on the network thread after every successful CONNACK, also after a reconnect.
    """
    outcome: list[ReasonCode] = []
    decided = threading.Event()

    def on_connect(own: paho.Client, _data: object, _flags: object, reason: ReasonCode, properties: object) -> None:
        client.receive_maximum = getattr(properties, "ReceiveMaximum", NO_LIMIT)
        if on_connected is not None and not reason.is_failure:
            on_connected(own)
        outcome.append(reason)
        decided.set()

    client.on_connect = on_connect
    _open(client, address, keep_session=keep_session)
    client.loop_start()
    try:
        if not decided.wait(CONNECT_SECONDS) or outcome[0].is_failure:
            why = str(outcome[0]) if outcome else "no CONNACK"
            message = f"{address.host}:{address.port} does not let us in: {why}"
            raise EndpointError(message)
        yield client
    finally:
        client.disconnect()
        client.loop_stop()


@lru_cache(maxsize=REMEMBERED)
def to_paho(properties: Properties) -> PahoProperties | None:
    """Translate the properties of a recorded message into those of a PUBLISH; None where there are none.

    Most messages of a topic carry the same ones, and paho takes 50 us to build and to pack them: they are remembered.
    """
    if properties == NO_PROPERTIES:
        return None
    found = PahoProperties(PacketTypes.PUBLISH)
    values = {
        "PayloadFormatIndicator": properties.payload_format,
        "MessageExpiryInterval": properties.expiry_s,
        "ContentType": properties.content_type,
        "ResponseTopic": properties.response_topic,
        "CorrelationData": properties.correlation,
        "UserProperty": list(properties.user) or None,
    }
    for name, value in values.items():
        if value is not None:
            setattr(found, name, value)
    return PackedProperties(found.pack())


def from_paho(properties: PahoProperties | None) -> Properties:
    """Translate the properties of a received PUBLISH; MQTT 3.1.1 has none."""
    if properties is None:
        return NO_PROPERTIES
    found = vars(properties)
    return Properties(
        payload_format=found.get("PayloadFormatIndicator"),
        expiry_s=found.get("MessageExpiryInterval"),
        content_type=found.get("ContentType"),
        response_topic=found.get("ResponseTopic"),
        correlation=found.get("CorrelationData"),
        user=tuple((key, value) for key, value in found.get("UserProperty", ())),
    )


def _open(client: paho.Client, address: Address, *, keep_session: bool) -> None:
    try:
        if address.protocol == "5":
            wishes = PahoProperties(PacketTypes.CONNECT)
            wishes.SessionExpiryInterval = SESSION_SECONDS if keep_session else 0
            client.connect(
                address.host, address.port, KEEPALIVE_SECONDS, clean_start=not keep_session, properties=wishes
            )
        else:
            client.connect(address.host, address.port, KEEPALIVE_SECONDS)
    except OSError as exc:
        message = f"{address.host}:{address.port} cannot be reached: {exc}"
        raise EndpointError(message) from exc
