"""When a message was captured, as its own rule says where to find it."""

from __future__ import annotations

import json
import math
from datetime import datetime

from agent.errors import RefusedError
from agent.messages import Message
from agent.payloads.pointers import value_at
from agent.settings.policy_config import Rule

NS_PER_UNIT = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}


def stated_ns(rule: Rule, message: Message) -> int | None:
    """The capture time in Unix ns that the message states; None where the rule names no place for it.

    A message that should state it and does not is refused: its arrival may be long after its capture.
    """
    if not rule.capture_time:
        return None
    try:
        return _nanoseconds(_find(rule.capture_time, message), rule.capture_unit)
    except (ValueError, TypeError, LookupError, RecursionError, OverflowError) as exc:
        raise RefusedError("capture.unreadable", type(exc).__name__) from exc


def _find(place: str, message: Message) -> object:
    if place.startswith("property:"):
        value = message.property(place.removeprefix("property:"))
        if value is None:
            raise LookupError(place)
        return value
    return value_at(json.loads(message.payload), place)


def _nanoseconds(value: object, unit: str) -> int:
    if unit == "rfc3339":
        if not isinstance(value, str) or len(value) > len("2026-01-01T00:00:00.000000000+00:00"):
            raise ValueError(value)
        moment = datetime.fromisoformat(value)
        if moment.tzinfo is None:
            raise ValueError(value)
        return round(moment.timestamp() * 10**6) * 1000
    if isinstance(value, str):
        value = int(value) if value.lstrip("-").isdigit() else float(value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(value)
    return value * NS_PER_UNIT[unit] if isinstance(value, int) else round(value * NS_PER_UNIT[unit])
