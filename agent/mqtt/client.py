"""paho clients as this agent uses them: built and connected here, driven by `mqtt`."""

from __future__ import annotations

from typing import Any

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTErrorCode, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.mqtt.packets import Session

READ_BYTES = 64 << 10  # read at a time
SEND_BYTES = 64 << 10  # collected before they must be sent
DISCONNECT = 0xE0  # MQTT 5.0, 3.14.1
CONNECT_SECONDS = 10.0  # TCP, TLS and CONNACK together


class DirectClient(Client):
    """A client that connects to the address it is given, whatever `mqtt_proxy` in the environment says.

    It reads and writes the socket in large pieces: paho asks for every byte of a header, and sends every packet, by a
    system call of its own. What was read ahead and not asked for yet is `read_ahead`; a DISCONNECT goes out at once.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:  # noqa: ANN401 - paho's own
        super().__init__(*arguments, **options)
        self._ahead, self._taken = b"", 0
        self._unsent = bytearray()

    @property
    def read_ahead(self) -> int:
        """Bytes that have left the socket and that nobody has seen."""
        return len(self._ahead) - self._taken

    def want_write(self) -> bool:
        """Whether anything waits for the socket."""
        return bool(self._unsent) or super().want_write()

    def _get_proxy(self) -> None:
        """No proxy: its address was not judged, and it would see the traffic."""

    def _sock_recv(self, bufsize: int) -> bytes:
        """Up to `bufsize` bytes, none at the end of the stream; BlockingIOError when nothing has come."""
        if not self.read_ahead:
            if bufsize >= READ_BYTES:
                return super()._sock_recv(bufsize)
            self._ahead, self._taken = super()._sock_recv(READ_BYTES), 0
        part = self._ahead[self._taken : self._taken + bufsize]
        self._taken += len(part)
        return part

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
            sent = super()._sock_send(self._unsent)
            del self._unsent[:sent]


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
    client.connect_timeout = CONNECT_SECONDS
    client.max_inflight_messages_set(0)  # the uplink keeps its own window
    if session.username:
        client.username_pw_set(session.username, session.password)
    if session.tls is not None:
        client.tls_set_context(session.tls)
    if session.will is not None:
        client.will_set(session.will.topic, session.will.payload, qos=1, retain=True)
    return client


def connect(client: Client, session: Session) -> None:
    """Connect and send CONNECT; blocks. Raises OSError, and whatever the client's socket callbacks raise."""
    if session.protocol == "5":
        properties = Properties(PacketTypes.CONNECT)
        properties.SessionExpiryInterval = session.session_expiry_s
        properties.ReceiveMaximum = session.receive_maximum
        properties.MaximumPacketSize = session.maximum_packet_bytes
        client.connect(
            session.host, session.port, session.keepalive_s, clean_start=session.clean_start, properties=properties
        )
    else:
        client.connect(session.host, session.port, session.keepalive_s)
