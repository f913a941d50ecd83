"""Topics on the regional brokers: a template with placeholders, filled from a record.

What is filled in cannot become a wildcard, a `$` topic or a further placeholder; where it would, EnvelopeError.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from agent.errors import EnvelopeError
from agent.topics import MAX_TOPIC_BYTES
from agent.wire.attributes import Attributes

DEFAULT_TEMPLATE = "{region}/{vehicle}/{topic}"
PRESENCE_TEMPLATE = "residency-agent/{vehicle}/presence"
STATUS_TEMPLATE = "residency-agent/{vehicle}/status"
PLACEHOLDERS = ("region", "vehicle", "topic", "class", "type")
_ATTRIBUTES = {"region": "dataregion", "topic": "subject", "class": "dataclassification", "type": "type"}

_PLACEHOLDER = re.compile(r"\{([a-z]+)\}")
_NOT_IN_A_NAME = re.compile("[+#\x00-\x1f\x7f-\x9f]")  # MQTT 5.0, 4.7.1 and 1.5.4


def check_template(template: str) -> str | None:
    """What is wrong with a topic template, or None."""
    unknown = [name for name in _PLACEHOLDER.findall(template) if name not in PLACEHOLDERS]
    rest = _PLACEHOLDER.sub("", template)
    if unknown:
        return f"only the placeholders {', '.join(f'{{{name}}}' for name in PLACEHOLDERS)}, not {{{unknown[0]}}}"
    if "{" in rest or "}" in rest:
        return "a topic template without stray braces"
    if not template or template.startswith("$") or _NOT_IN_A_NAME.search(rest):
        return "a topic template that is not empty, starts without $ and holds no + # or control character"
    return None


def topic(template: str, attributes: Attributes, vehicle: str) -> str:
    """Give the topic of a record, from a template that `check_template` accepts; raises EnvelopeError.

    `{region}` is the attribute `dataregion` (several candidates joined by commas), `{topic}` the topic on the car.
    """
    return topic_of(template, attributes.texts, vehicle)


def topic_of(template: str, found: Mapping[str, str], vehicle: str) -> str:
    """As `topic`, from the attributes as text."""
    return _topic_of(template, vehicle, *(found.get(name, "") for name in _ATTRIBUTES.values()))


@lru_cache(maxsize=256)
def _topic_of(template: str, vehicle: str, *found: str) -> str:
    """As `topic_of`, from the values in the order of `_ATTRIBUTES`: records come on few topics."""
    return _filled(template, {**dict(zip(_ATTRIBUTES, found, strict=True)), "vehicle": vehicle})


def vehicle_topic(template: str, vehicle: str) -> str:
    """Give the topic of the vehicle's own messages; the template may hold `{vehicle}` only. Raises EnvelopeError."""
    return _filled(template, {"vehicle": vehicle})


def _filled(template: str, values: dict[str, str]) -> str:
    for name in set(_PLACEHOLDER.findall(template)):
        _check(name, values.get(name, ""))
    name = _PLACEHOLDER.sub(lambda found: values[found[1]], template)
    if name.startswith("$") or len(name.encode()) > MAX_TOPIC_BYTES:
        message = f"topic: {name[:80]!r} starts with $, or is longer than {MAX_TOPIC_BYTES} bytes"
        raise EnvelopeError(message)
    return name


def _check(name: str, value: str) -> None:
    """A value is text that stands in a topic name; only `{topic}` may bring further levels along."""
    if not value or _NOT_IN_A_NAME.search(value) or ("/" in value and name != "topic"):
        message = f"topic: {{{name}}} cannot be {value[:80]!r}"
        raise EnvelopeError(message)
