"""A regional broker's stream for the tests: signed records, published as an endpoint gets them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path

import paho.mqtt.client as mqtt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from agent.messages import Basis
from agent.mqtt.packets import Outgoing
from agent.wire import batch, envelope
from agent.wire.addressing import DEFAULT_TEMPLATE, topic
from agent.wire.envelope import Attributes, Signer, pack, properties, unpack
from agent.wire.signing import key_id_of
from tools.listening.judging import Expectations

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(1, 33)))
SIGNER = Signer(key=KEY, key_id=key_id_of(KEY.public_key()))
PUBLIC_PEM = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
STRANGER = Signer(key=Ed25519PrivateKey.from_private_bytes(bytes(32)), key_id=SIGNER.key_id)
HERE = Expectations(
    keys={SIGNER.key_id: KEY.public_key()}, may_hold=lambda regions, _class: {"cn", "hk"}.issuperset(regions)
)
START_NS = 1_790_000_000 * 10**9

TELEMETRY = Attributes(
    id="t-0",
    source="urn:vehicle:car-7",
    type="org.residencyagent.telemetry.v1",
    subject="vehicle/telemetry/speed",
    time_ns=START_NS,
    datacontenttype="application/json",
    dataregion=("cn",),
    regionbasis=Basis.GNSS,
    dataclassification="telemetry",
    policyversion="1",
    recordedtime_ns=START_NS + 10**8,
    sequence=0,
)
PICTURE = dataclasses.replace(
    TELEMETRY,
    id="p-0",
    type="org.residencyagent.picture.v1",
    subject="vehicle/camera/front",
    datacontenttype="image/jpeg",
    dataregion=("cn", "hk"),
    dataclassification="picture",
    redaction="person=3,plate=1",
    modeldigest="ab" * 32,
    traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
)


def record(number: int, *, source: str = TELEMETRY.source, regions: tuple[str, ...] = ("cn",), **changes) -> Attributes:
    """The telemetry record with this number as sequence and in its id."""
    return dataclasses.replace(
        TELEMETRY,
        id=f"{source}-{'-'.join(regions)}-{number}",
        source=source,
        dataregion=regions,
        sequence=number,
        time_ns=START_NS + number * 10**9,
        **changes,
    )


def data_of(number: int) -> bytes:
    return json.dumps({"speed": number, "ts": 1_790_000_000 + number}).encode()


def outgoing(attributes: Attributes, data: bytes, *, wire: str = "msgpack", signer: Signer | None = SIGNER) -> Outgoing:
    """The PUBLISH of a record, as the agent's uplink makes it."""
    packed = pack(attributes, data, signer)
    return outgoing_packed(packed, wire=wire)


def outgoing_packed(packed: bytes, *, wire: str = "msgpack", vehicle: str = "car-7") -> Outgoing:
    opened = unpack(packed)
    binary = wire == "binary"
    return Outgoing(
        topic=topic(DEFAULT_TEMPLATE, opened.attributes, vehicle),
        payload=opened.data if binary else packed,
        content_type=opened.attributes.datacontenttype if binary else envelope.CONTENT_TYPE,
        properties=properties(opened.attributes, opened.signature if binary else None),
    )


def batched(records: Iterable[Outgoing], *, compress: bool = True) -> Outgoing:
    """The PUBLISH of a batch of these records, as the agent's uplink makes it."""
    found = list(records)
    opened = unpack(found[0].payload)
    return Outgoing(
        topic=found[0].topic,
        payload=batch.pack([one.payload for one in found], batch.compressor() if compress else None),
        content_type=batch.ZSTD_CONTENT_TYPE if compress else batch.CONTENT_TYPE,
        properties=[("dataregion", ",".join(opened.attributes.dataregion))],
    )


def _properties(message: Outgoing) -> Properties:
    found = Properties(PacketTypes.PUBLISH)
    if message.content_type is not None:
        found.ContentType = message.content_type
    if message.properties:
        found.UserProperty = list(message.properties)
    return found


def publish(port: int, messages: Iterable[Outgoing], *, username: str = "", ca_file: Path | None = None) -> None:
    """Publish at QoS 1 over MQTT 5 and return once every PUBACK is there."""
    client = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
    client.username_pw_set(username or None)
    if ca_file is not None:
        client.tls_set(str(ca_file))
    client.max_queued_messages_set(0)
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        sent = [
            client.publish(
                one.topic,
                one.payload,
                qos=1,
                retain=one.retain,
                properties=_properties(one),
            )
            for one in messages
        ]
        for info in sent:
            info.wait_for_publish(timeout=30)
            assert info.is_published()
    finally:
        client.disconnect()
        client.loop_stop()


def lines(path: Path) -> list[dict]:
    """The lines of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
