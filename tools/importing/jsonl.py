"""Reads what `mosquitto_sub -F` writes, one JSON object a line.

Two formats: `%j`, and for payloads of any bytes
`{"tst":"%U","topic":"%t","qos":%q,"retain":%r,"hex":"%x"}`. With `%j` mosquitto leaves out payloads that are not UTF-8;
such a line is an error rather than an empty message. The capture time is the one that a message states, else that of
its receipt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import msgspec

from tools.importing.rows import BadRowError, Complain, carried, strict
from tools.recording import Properties, Recorded
from tools.schemas import NANOSECONDS
from tools.stamps import stated_ns

_UNIX = re.compile(r"(\d{1,10})(?:\.(\d{1,9}))?")
_ZONED = re.compile(r"Z(?=[+-]\d{4}$)")  # mosquitto 2.0 writes both: 2026-01-01T00:00:00.000000Z+0000


def read(path: Path, complain: Complain = strict) -> Iterator[Recorded]:
    """Yield the messages of the file; bad lines go to `complain`."""
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield _message(json.loads(line, object_pairs_hook=_pairs))
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError, msgspec.ValidationError) as exc:
                what = f"no {exc.args[0]!r}" if isinstance(exc, KeyError) else str(exc)
                complain(BadRowError(path, number, what))


class _Object(dict[str, Any]):
    """A JSON object that remembers repeated keys, as user properties may repeat them."""

    pairs: tuple[tuple[str, Any], ...] = ()


def _pairs(pairs: list[tuple[str, Any]]) -> _Object:
    found = _Object(pairs)
    found.pairs = tuple(pairs)
    return found


def _message(row: object) -> Recorded:
    if not isinstance(row, _Object):
        message = "not a JSON object"
        raise TypeError(message)
    receipt_ns = _time_ns(str(row["tst"]))
    payload, properties = _payload(row), _properties(row.get("properties", _Object()))
    capture_ns = stated_ns(payload, properties)
    return carried(
        Recorded(
            topic=msgspec.convert(row["topic"], str),
            payload=payload,
            capture_ns=receipt_ns if capture_ns is None else capture_ns,
            receipt_ns=receipt_ns,
            qos=int(row.get("qos", 1)),
            retain=bool(row.get("retain", 0)),
            properties=properties,
        )
    )


def _payload(row: _Object) -> bytes:
    if "hex" in row:
        return bytes.fromhex(row["hex"])
    found = row["payload"]
    exact = isinstance(found, str)
    payload = (found if exact else json.dumps(found, separators=(",", ":"), ensure_ascii=False)).encode()
    if exact and len(payload) != row.get("payloadlen", len(payload)):
        message = "the payload is not UTF-8, and mosquitto_sub left it out; record it with %x"
        raise ValueError(message)
    return payload


def _time_ns(text: str) -> int:
    unix = _UNIX.fullmatch(text)
    if unix:
        return int(unix[1]) * NANOSECONDS + int((unix[2] or "").ljust(9, "0"))
    try:
        moment = datetime.fromisoformat(_ZONED.sub("", text))
    except ValueError as exc:
        message = f"the time {text} is neither Unix seconds nor ISO 8601"
        raise ValueError(message) from exc
    if moment.tzinfo is None:
        message = f"the time {text} has no zone"
        raise ValueError(message)
    return round(moment.timestamp() * 1_000_000) * 1000


def _properties(found: object) -> Properties:
    user = found.get("user-properties", _Object()) if isinstance(found, _Object) else None
    if not isinstance(found, _Object) or not isinstance(user, _Object):
        message = "the properties, or the user properties, are not an object"
        raise TypeError(message)
    correlation = found.get("correlation-data")
    values = {
        "payload_format": found.get("payload-format-indicator"),
        "expiry_s": found.get("message-expiry-interval"),
        "content_type": found.get("content-type"),
        "response_topic": found.get("response-topic"),
        "correlation": None if correlation is None else str(correlation).encode(),
        "user": tuple((name, str(value)) for name, value in user.pairs),
    }
    return msgspec.convert(values, Properties, builtin_types=(bytes,))
