"""What an uplink is told of its endpoint."""

from __future__ import annotations

from dataclasses import dataclass

from agent.mqtt.packets import Session
from agent.uplink.egress import PeerRules
from agent.uplink.presence import PresenceOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class UplinkOptions:
    """One endpoint. `topic` is its template; `wire` is `msgpack` or `binary`.

    `batch_records`: how many records go in one PUBLISH at most; `batch_compression` is `none` or `zstd`.
    """

    name: str
    vehicle: str
    session: Session
    peer: PeerRules
    topic: str
    wire: str = "msgpack"
    batch_records: int = 1
    batch_compression: str = "none"
    in_flight: int = 128
    ack_timeout_s: float = 20.0
    backlog_bytes_per_s: int = 0
    presence: PresenceOptions | None = None
