"""What the agent says about itself to an endpoint: birth, death and status, as CloudEvents in JSON.

The birth is published, retained, after each CONNECT; the death is the Last Will of the same session, retained on the
same topic, or is published before an orderly DISCONNECT. So the retained message always says whether the vehicle is
connected, and `session` tells whether a death belongs to the latest birth. None of them says where the vehicle is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from agent.wire.addressing import PRESENCE_TEMPLATE, STATUS_TEMPLATE, vehicle_topic
from agent.wire.attributes import SPECVERSION, format_time

CONTENT_TYPE = "application/cloudevents+json"
TYPES = {
    "birth": "org.residencyagent.birth.v1",
    "death": "org.residencyagent.death.v1",
    "status": "org.residencyagent.status.v1",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """One connection to one endpoint: `id` is fresh for each CONNECT, `vehicle` stands in the topic."""

    id: str
    source: str
    vehicle: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Announcement:
    """One message to publish at QoS 1, ready for the client."""

    topic: str
    payload: bytes
    content_type: str = CONTENT_TYPE
    retain: bool = True


def birth(session: Session, now_ns: int, *, version: str, policy_version: str, keyid: str | None) -> Announcement:
    """Say: connected. `keyid` names the key that will sign."""
    data = {"state": "online", "agentversion": version, "policyversion": policy_version, "keyid": keyid}
    return _announcement(PRESENCE_TEMPLATE, session, "birth", now_ns, data)


def death(session: Session, now_ns: int, reason: Literal["lost", "stopped"]) -> Announcement:
    """Say: gone. As Last Will (`lost`) its time is that of the CONNECT, for the broker sends it unchanged."""
    return _announcement(PRESENCE_TEMPLATE, session, "death", now_ns, {"state": "offline", "reason": reason})


def status(session: Session, now_ns: int, number: int, counts: Mapping[str, int]) -> Announcement:
    """Give the conservation counts (received, delivered, pending, held, refused, expired, evicted), retained."""
    data = {"state": "online", "number": number, "counts": dict(sorted(counts.items()))}
    return _announcement(STATUS_TEMPLATE, session, "status", now_ns, data)


def _announcement(template: str, session: Session, kind: str, now_ns: int, data: Mapping[str, object]) -> Announcement:
    event = {
        "specversion": SPECVERSION,
        "id": f"{session.id}-{kind}-{data.get('number', 0)}",
        "source": session.source,
        "type": TYPES[kind],
        "time": format_time(now_ns),
        "datacontenttype": "application/json",
        "data": {"session": session.id, **data},
    }
    payload = json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()
    return Announcement(topic=vehicle_topic(template, session.vehicle), payload=payload)
