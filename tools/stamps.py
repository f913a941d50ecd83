"""The capture time that a message states: reading it, and rewriting it so that an old drive seems to happen now.

A JSON payload carries it under one of the given top-level keys, in the unit of the original: Unix seconds,
milliseconds, microseconds or nanoseconds by magnitude, or RFC 3339 text. Any message may carry it in the user property
`time`, as Unix nanoseconds or RFC 3339 text.
"""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime

import msgspec

from tools.recording import Properties, Recorded
from tools.schemas import NANOSECONDS, json_object

TIME_PROPERTY = "time"
DEFAULT_KEYS = ("ts",)
# Unix times of the years 2001-2286 in each unit fall below exactly one of these.
MAX_TIME = 2**63  # what MCAP and most clocks can hold, in nanoseconds
MAX_DIGITS = 19  # of it
UNITS = ((1e11, 1), (1e14, 1_000), (1e17, 1_000_000))


def restamped(message: Recorded, capture_ns: int, keys: tuple[str, ...] = DEFAULT_KEYS) -> Recorded:
    """Give the message another capture time, in the payload, the properties and the value itself."""
    return replace(
        message,
        capture_ns=capture_ns,
        payload=_payload(message.payload, capture_ns, keys),
        properties=_properties(message.properties, capture_ns),
    )


def stated_ns(payload: bytes, properties: Properties, keys: tuple[str, ...] = DEFAULT_KEYS) -> int | None:
    """Read the capture time in Unix nanoseconds; the property comes before the payload, None where neither has one.

    A time before 1970 or after 2262, such as the zero time of many libraries, is none.
    """
    named = next((value for name, value in properties.user if name == TIME_PROPERTY), None)
    if named is not None:
        return _number_ns(named) if named.isdecimal() else _read(named)
    members = (json_object(payload) or {}) if payload[:1] == b"{" else {}
    return next((_read(members[key]) for key in keys if key in members), None)


def rfc3339(time_ns: int) -> str:
    """Write a Unix time as RFC 3339 in UTC with all nanoseconds."""
    seconds, fraction = divmod(time_ns, NANOSECONDS)
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%dT%H:%M:%S}.{fraction:09d}Z"


def read_rfc3339(text: str) -> int | None:
    """Read RFC 3339 as a Unix time in nanoseconds, to the microsecond; None where it is none or has no zone."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return None
    return None if moment.tzinfo is None else round(moment.timestamp() * 1_000_000) * 1000


def _payload(payload: bytes, capture_ns: int, keys: tuple[str, ...]) -> bytes:
    members = json_object(payload) if payload[:1] == b"{" else None
    found = [key for key in keys if members and key in members]
    if members is None or not found:
        return payload
    for key in found:
        members[key] = _value(members[key], capture_ns)
    return json.dumps(members, separators=(",", ":"), ensure_ascii=False).encode()


def _properties(properties: Properties, capture_ns: int) -> Properties:
    if all(name != TIME_PROPERTY for name, _ in properties.user):
        return properties
    user = tuple(
        (name, _text(value, capture_ns) if name == TIME_PROPERTY else value) for name, value in properties.user
    )
    return msgspec.structs.replace(properties, user=user)


def _text(original: str, capture_ns: int) -> str:
    return str(capture_ns) if original.isdecimal() else rfc3339(capture_ns)


def _number_ns(digits: str) -> int | None:
    return _in_range(int(digits)) if len(digits) <= MAX_DIGITS else None


def _in_range(time_ns: int | None) -> int | None:
    return time_ns if time_ns is not None and 0 <= time_ns < MAX_TIME else None


def _read(value: object) -> int | None:
    if isinstance(value, str):
        return _in_range(read_rfc3339(value))
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < MAX_TIME:
        return None
    return _in_range(round(value * (NANOSECONDS // _per_second(value))))


def _per_second(value: float) -> int:
    return next((unit for limit, unit in UNITS if abs(value) < limit), NANOSECONDS)


def _value(original: object, capture_ns: int) -> object:
    """Write the time as the original was written; a value that is no time stays as it is."""
    if isinstance(original, str):
        return rfc3339(capture_ns)
    if isinstance(original, bool) or not isinstance(original, int | float):
        return original
    per_second = _per_second(original)
    if isinstance(original, float):
        return capture_ns * per_second / NANOSECONDS
    return capture_ns * per_second // NANOSECONDS
