"""An independent witness on a regional broker: what did really arrive there? Plain MQTT and msgpack, no agent code."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import msgpack  # type: ignore[import-untyped]  # it ships no annotations
import paho.mqtt.client as paho
import zstandard

from agent.errors import AgentError
from tools.client import Address, connected, from_paho, new_client
from tools.spool import Spool, Spooled

ABOUT_THE_AGENT = "residency-agent/"  # the agent's own presence and status, not records
BATCH = "application/vnd.residency-agent.batch+msgpack"  # the beginning of a batch's Content Type
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
BATCH_BYTES = 16 << 20  # of a batch at most; the agent's are far smaller


class WitnessError(AgentError, ValueError):
    """A publication on a regional broker that is not a record in the documented wire format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One record as a regional broker gave it to the witness; those of a batch have its topic and properties."""

    broker: str
    topic: str
    payload: Spooled
    time_ns: int
    properties: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A record taken out of its envelope: the attributes as text, and the data."""

    attributes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    data: bytes


class Witness:
    """Collects everything that one broker receives; append-only, so other threads may read at any time."""

    def __init__(self, broker: str, spool: Spool) -> None:
        self.broker = broker
        self._spool = spool
        self.records: list[Seen] = []
        self.others: list[Seen] = []

    def on_message(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        """Keep one publication; raises SpoolError."""
        properties, now_ns = from_paho(message.properties), time.time_ns()
        kept = self.others if message.topic.startswith(ABOUT_THE_AGENT) else self.records
        kept += [
            Seen(
                broker=self.broker,
                topic=message.topic,
                payload=self._spool.keep(payload),
                time_ns=now_ns,
                properties=properties.user,
            )
            for payload in unbatched(bytes(message.payload), properties.content_type)
        ]


@contextmanager
def witness(broker: str, address: Address, spool: Spool) -> Iterator[Witness]:
    """Subscribe to everything on the broker; raises EndpointError."""
    found = Witness(broker, spool)
    client = new_client(address, f"witness-{broker}-{os.getpid()}")
    client.on_message = found.on_message
    with connected(client, address, on_connected=lambda own: own.subscribe("#", qos=1)):
        yield found


def unbatched(payload: bytes, content_type: str | None) -> list[bytes]:
    """The records of a publication; it is one itself, if it is no batch, or none that can be read."""
    if content_type is not None and not content_type.startswith(BATCH):
        return [payload]
    try:
        whole = payload
        if payload.startswith(ZSTD_MAGIC):
            with zstandard.ZstdDecompressor().stream_reader(payload) as stream:
                whole = stream.read(BATCH_BYTES)
        found = msgpack.unpackb(whole)
    except (ValueError, msgpack.UnpackException, zstandard.ZstdError):
        return [payload]
    is_batch = isinstance(found, list) and all(isinstance(one, bytes) for one in found)
    return found if is_batch else [payload]


def opened(seen: Seen) -> Opened:
    """Take a record out of its msgpack envelope, else in CloudEvents binary mode; raises WitnessError, SpoolError.

    In binary mode the payload is the data, and the attributes are nowhere but in the user properties.
    """
    payload = seen.payload.read()
    try:
        outer: dict[str, Any] = msgpack.unpackb(payload)
        inner: dict[str, Any] = msgpack.unpackb(outer["payload"])
        data = inner.pop("data")
    except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException) as exc:
        attributes = dict(seen.properties)
        if "specversion" in attributes:
            return Opened(attributes=attributes, data=payload)
        message = f"not an envelope: {exc!r}"
        raise WitnessError(message) from exc
    return Opened(attributes={str(name): str(value) for name, value in inner.items()}, data=bytes(data))
