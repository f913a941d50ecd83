"""What all readers share: errors that name file and line, and messages made of values."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from agent.errors import AgentError
from agent.topics import MAX_TOPIC_BYTES
from tools.recording import Properties, Recorded
from tools.schemas import NANOSECONDS
from tools.stamps import TIME_PROPERTY

GNSS_TOPIC = "vehicle/gnss"
CAMERA_TOPIC = "vehicle/camera/front"
TELEMETRY_PREFIX = "vehicle/telemetry/"
METRES_PER_HDOP = 5.0  # user equivalent range error (1 sigma) of a single-frequency receiver, rounded up; times 2 below
LATEST_NS = 2**63 - 1
SHOWN = 100  # characters of a topic
EXPIRIES = range(1 << 32)  # seconds; MQTT 5.0, 3.3.2.3.3: four bytes
FORMATS = (None, 0, 1)  # MQTT 5.0, 3.3.2.3.2


class SourceError(AgentError, ValueError):
    """A source that cannot be read; the message names the file and, where there is one, the line."""


class BadRowError(SourceError):
    """One row that cannot be read, while the rows around it may be fine."""

    def __init__(self, file: Path, line: int, what: str) -> None:
        super().__init__(f"{file}:{line}: {what}")


Complain = Callable[[BadRowError], None]


def strict(error: BadRowError) -> None:
    """Stop at the first bad row."""
    raise error


def carried(message: Recorded) -> Recorded:
    """Give back a message that MQTT and a recording can carry; raises SourceError for any other."""
    if not all(0 <= time_ns <= LATEST_NS for time_ns in (message.capture_ns, message.receipt_ns)):
        what = "the time is not between 1970 and 2262"
    elif not message.topic or set("+#\0") & set(message.topic) or len(message.topic.encode()) > MAX_TOPIC_BYTES:
        what = f"{message.topic[:SHOWN]!r} is not a topic to publish to"
    elif message.qos not in {0, 1, 2}:
        what = f"there is no QoS {message.qos}"
    elif (message.properties.expiry_s or 0) not in EXPIRIES or message.properties.payload_format not in FORMATS:
        what = "the message expiry or the payload format is out of range"
    else:
        return message
    raise SourceError(what)


def json_message(topic: str, time_ns: int, members: Mapping[str, object]) -> Recorded:
    """Make a JSON message that states its capture time as `ts`, in Unix seconds; raises ValueError for what is none."""
    values = {"ts": time_ns / NANOSECONDS, **members}
    payload = json.dumps(values, separators=(",", ":"), allow_nan=False).encode()
    properties = Properties(content_type="application/json")
    return carried(
        Recorded(topic=topic, payload=payload, capture_ns=time_ns, receipt_ns=time_ns, properties=properties)
    )


def fix_message(time_ns: int, latitude: float, longitude: float, accuracy_m: float | None) -> Recorded:
    """Make a GNSS message; raises ValueError for a position that is none."""
    if not (-90 <= latitude <= 90 and -180 <= longitude <= 180):
        message = f"{latitude}, {longitude} is not a position"
        raise ValueError(message)
    accuracy = {} if accuracy_m is None else {"acc": round(accuracy_m, 2)}
    return json_message(GNSS_TOPIC, time_ns, {"lat": latitude, "lon": longitude, **accuracy})


def picture_message(topic: str, time_ns: int, picture: bytes) -> Recorded:
    """Make a camera message that states its capture time in the user property `time`, in Unix nanoseconds."""
    kind = "image/png" if picture.startswith(b"\x89PNG") else "image/jpeg"
    properties = Properties(content_type=kind, user=((TIME_PROPERTY, str(time_ns)),))
    return Recorded(topic=topic, payload=picture, capture_ns=time_ns, receipt_ns=time_ns, properties=properties)


def accuracy_of_hdop(hdop: float) -> float:
    """Estimate the 95 % radius in metres from the horizontal dilution of precision (two sigma)."""
    return 2 * METRES_PER_HDOP * hdop


def whole_ns(seconds: float) -> int:
    """Turn Unix seconds into nanoseconds; raises ValueError outside 1970-2262."""
    if not 0 <= seconds * NANOSECONDS <= LATEST_NS:
        message = f"{seconds} is not a time between 1970 and 2262"
        raise ValueError(message)
    return round(seconds * NANOSECONDS)
