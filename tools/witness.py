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

from agent.errors import AgentError
from tools.client import Address, connected, from_paho, new_client

ABOUT_THE_AGENT = "residency-agent/"  # the agent's own presence and status, not records


class WitnessError(AgentError, ValueError):
    """A publication on a regional broker that is not a record in the documented wire format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One publication as a regional broker gave it to the witness."""

    broker: str
    topic: str
    payload: bytes
    time_ns: int
    properties: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A record taken out of its envelope: the attributes as text, and the data."""

    attributes: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    data: bytes


class Witness:
    """Collects everything that one broker receives; append-only, so other threads may read at any time."""

    def __init__(self, broker: str) -> None:
        self.broker = broker
        self.records: list[Seen] = []
        self.others: list[Seen] = []

    def on_message(self, _client: paho.Client, _data: object, message: paho.MQTTMessage) -> None:
        """Keep one publication."""
        seen = Seen(
            broker=self.broker,
            topic=message.topic,
            payload=bytes(message.payload),
            time_ns=time.time_ns(),
            properties=from_paho(message.properties).user,
        )
        (self.others if message.topic.startswith(ABOUT_THE_AGENT) else self.records).append(seen)


@contextmanager
def witness(broker: str, address: Address) -> Iterator[Witness]:
    """Subscribe to everything on the broker; raises EndpointError."""
    found = Witness(broker)
    client = new_client(address, f"witness-{broker}-{os.getpid()}")
    client.on_message = found.on_message
    with connected(client, address, on_connected=lambda own: own.subscribe("#", qos=1)):
        yield found


def opened(seen: Seen) -> Opened:
    """Take a record apart: out of its msgpack envelope, else in CloudEvents binary mode; raises WitnessError.

    In binary mode the payload is the data, and the attributes are nowhere but in the user properties.
    """
    try:
        outer: dict[str, Any] = msgpack.unpackb(seen.payload)
        inner: dict[str, Any] = msgpack.unpackb(outer["payload"])
        data = inner.pop("data")
    except (ValueError, TypeError, KeyError, AttributeError, msgpack.UnpackException) as exc:
        attributes = dict(seen.properties)
        if "specversion" in attributes:
            return Opened(attributes=attributes, data=seen.payload)
        message = f"not an envelope: {exc!r}"
        raise WitnessError(message) from exc
    return Opened(attributes={str(name): str(value) for name, value in inner.items()}, data=bytes(data))
