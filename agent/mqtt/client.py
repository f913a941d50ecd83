"""paho clients as this agent uses them: built and connected here, driven by `mqtt`."""

from __future__ import annotations

from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.mqtt.packets import Session

CONNECT_SECONDS = 10.0  # TCP, TLS and CONNACK together


class DirectClient(Client):
    """A client that connects to the address it is given, whatever `mqtt_proxy` in the environment says."""

    def _get_proxy(self) -> None:
        """No proxy: its address was not judged, and it would see the traffic."""


def new_client(session: Session) -> Client:
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
