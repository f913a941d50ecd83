"""The one way from the ledger to an endpoint.

Invariants:
- It takes a `Cleared`, which only `Policy.clear` makes, and only one for its own endpoint; TypeError for all else.
- What goes out names the regions for which it was cleared; EnvelopeError for all else.
- No other module makes a PUBLISH out of a record: tests/test_outlet.py reads the imports.
"""

from __future__ import annotations

import asyncio

from agent.errors import EnvelopeError
from agent.messages import Record
from agent.mqtt.connection import Connection
from agent.mqtt.packets import Outgoing, Puback
from agent.policy import Cleared
from agent.wire import addressing, envelope

SECOND = 10**9
LONGEST_EXPIRY = 0xFFFF_FFFF  # MQTT 5.0, 3.3.2.3.3


class Outlet:
    """One connection to one endpoint, for records that were cleared for it. `topic` is the endpoint's template."""

    def __init__(self, connection: Connection, *, endpoint: str, vehicle: str, topic: str, wire: str) -> None:
        self._connection = connection
        self._endpoint = endpoint
        self._vehicle = vehicle
        self._topic = topic
        self._binary = wire == "binary"

    def publish(self, cleared: Cleared, now_ns: int) -> asyncio.Future[Puback]:
        """Publish at QoS 1; the future gives the PUBACK, or our own one for a record that the endpoint cannot take."""
        if not isinstance(cleared, Cleared) or cleared.endpoint != self._endpoint:
            msg = f"not cleared for {self._endpoint}"
            raise TypeError(msg)
        return self._connection.publish(self._outgoing(cleared.record, now_ns))

    def _outgoing(self, record: Record, now_ns: int) -> Outgoing:
        kept = envelope.kept(record.envelope)
        if kept.texts.get("dataregion") != ",".join(record.regions):
            msg = "the envelope names other regions than the ledger"
            raise EnvelopeError(msg)
        return Outgoing(
            topic=addressing.topic_of(self._topic, kept.texts, self._vehicle),
            payload=kept.data if self._binary else record.envelope,
            content_type=kept.texts.get("datacontenttype") if self._binary else envelope.CONTENT_TYPE,
            properties=envelope.pairs(kept.texts, kept.signature if self._binary else None),
            expiry_s=min(max((record.expires_ns - now_ns) // SECOND, 1), LONGEST_EXPIRY),
        )
