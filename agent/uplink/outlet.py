"""The one way from the ledger to an endpoint.

Invariants:
- It takes a `Cleared`, which only `Policy.clear` makes, and only one for its own endpoint; TypeError for all else.
- What goes out names the regions for which it was cleared; EnvelopeError for all else.
- The records of a batch have one topic and the same regions; EnvelopeError for all else.
- No other module makes a PUBLISH out of a record: tests/test_outlet.py reads the imports.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

from agent.clock import Moment
from agent.errors import EnvelopeError
from agent.messages import Record
from agent.mqtt.connection import Connection
from agent.mqtt.packets import Outgoing, Puback
from agent.policy import Cleared
from agent.store.lifetime import left_ns
from agent.uplink.options import UplinkOptions
from agent.wire import addressing, batch, envelope
from agent.wire.envelope import Kept

SECOND = 10**9
LONGEST_EXPIRY = 0xFFFF_FFFF  # MQTT 5.0, 3.3.2.3.3


class Outlet:
    """One connection to one endpoint, for records that were cleared for it."""

    def __init__(self, connection: Connection, options: UplinkOptions) -> None:
        self._connection = connection
        self._endpoint = options.name
        self._vehicle = options.vehicle
        self._topic = options.topic
        self._binary = options.wire == "binary"
        self._compress = batch.compressor() if options.batch_compression == "zstd" else None

    def publish(self, cleared: Cleared, now: Moment) -> asyncio.Future[Puback]:
        """Publish at QoS 1; the future gives the PUBACK, or our own one for a record that the endpoint cannot take."""
        self._check(cleared)
        record = cleared.record
        kept = _opened(record)
        outgoing = Outgoing(
            topic=self._topic_of(kept),
            payload=kept.data if self._binary else record.envelope,
            content_type=kept.texts.get("datacontenttype") if self._binary else envelope.CONTENT_TYPE,
            properties=envelope.pairs(kept.texts, kept.signature if self._binary else None),
            expiry_s=_expiry_s([record], now),
        )
        return self._connection.publish(outgoing)

    def publish_batch(self, cleared: Sequence[Cleared], now: Moment) -> asyncio.Future[Puback]:
        """As `publish`, several records at once; the PUBACK is that of all of them."""
        for one in cleared:
            self._check(one)
        records = [one.record for one in cleared]
        addresses = {self.address(record) for record in records}
        if len(addresses) != 1:
            raise EnvelopeError("a batch with records of several topics or regions")
        [(topic, regions)] = addresses
        outgoing = Outgoing(
            topic=topic,
            payload=batch.pack([record.envelope for record in records], self._compress),
            content_type=batch.CONTENT_TYPE if self._compress is None else batch.ZSTD_CONTENT_TYPE,
            properties=[(batch.PROPERTY, regions)],
            expiry_s=_expiry_s(records, now),
        )
        return self._connection.publish(outgoing)

    def address(self, record: Record) -> tuple[str, str]:
        """The topic of a record here, and its regions: equal for records that may share a batch; EnvelopeError."""
        kept = _opened(record)
        return self._topic_of(kept), kept.texts["dataregion"]

    def _check(self, cleared: Cleared) -> None:
        if not isinstance(cleared, Cleared) or cleared.endpoint != self._endpoint:
            msg = f"not cleared for {self._endpoint}"
            raise TypeError(msg)

    def _topic_of(self, kept: Kept) -> str:
        return addressing.topic_of(self._topic, kept.texts, self._vehicle)


def _opened(record: Record) -> Kept:
    kept = envelope.kept(record.envelope)
    if kept.texts.get("dataregion") != ",".join(record.regions):
        msg = "the envelope names other regions than the ledger"
        raise EnvelopeError(msg)
    return kept


def _expiry_s(records: Iterable[Record], now: Moment) -> int:
    """Until the first of them expires."""
    first_ns = min(left_ns(record, now) for record in records)
    return min(max(first_ns // SECOND, 1), LONGEST_EXPIRY)
