"""Position fixes from MQTT messages: JSON, VSS topics, NMEA 0183 sentences, foxglove LocationFix.

Whatever does not say clearly where the car is raises PositionError: a fix that is not used only makes doubt grow. A
fix that cannot be shown to be fresh carries the time that it may have waited as its doubt.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from agent.errors import PositionError
from agent.messages import Fix, Message
from agent.payloads.pointers import value_at
from agent.places.freshness import Freshness
from agent.places.geodesy import at_most_m, wgs84_from_gcj02
from agent.places.nmea import ACCURACY_AGE_NS, RAYLEIGH_95, NmeaReader

SECOND_NS = 1_000_000_000
MAX_PAYLOAD = 65_536  # bytes; a LocationFix in JSON has about 500


@dataclass(frozen=True, slots=True, kw_only=True)
class FixSource:
    """How one source of fixes speaks.

    `json`: `latitude`, `longitude`, `accuracy`, `time` are JSON pointers (RFC 6901); an empty `accuracy` means
    `default_accuracy_m`, an empty `time` means arrival. `vss`: `latitude`, `longitude` and, where not empty, `accuracy`
    are topics, one value each. `nmea` and `locationfix` use none of them.
    """

    format: Literal["json", "vss", "nmea", "locationfix"] = "json"
    latitude: str = "/lat"
    longitude: str = "/lon"
    accuracy: str = ""
    time: str = ""
    datum: Literal["wgs84", "gcj02"] = "wgs84"
    default_accuracy_m: float = 50.0
    pair_ns: int = 2 * SECOND_NS  # vss: a latitude and a longitude farther apart are no pair


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What one payload says: degrees in the source's datum, 95 % radius in metres, Unix ns where stated.

    `spread_ns` is how much older than the message a part of it may be.
    """

    latitude: float
    longitude: float
    accuracy_m: float
    time_ns: int | None = None
    spread_ns: int = 0


class FixReader:
    """Fixes of one source, message by message; remembers half pairs and how fresh the source has been."""

    def __init__(self, source: FixSource) -> None:
        self._source = source
        self._freshness = Freshness()
        self._parse = _PARSERS[source.format](source)

    def read(self, message: Message) -> Fix | None:
        """The fix of a message; None where it is only a part of one. Raises PositionError."""
        if len(message.payload) > MAX_PAYLOAD:
            detail = f"{len(message.payload)} bytes are no position"
            raise PositionError(detail)
        try:
            reading = self._parse(message)
        except PositionError:
            raise
        except (ValueError, TypeError, LookupError, OverflowError, RecursionError) as exc:
            detail = f"not a {self._source.format} position ({type(exc).__name__})"
            raise PositionError(detail) from exc
        return None if reading is None else self._fix(reading, message)

    def _fix(self, reading: Reading, message: Message) -> Fix:
        reading = checked(reading)
        latitude, longitude, accuracy_m = reading.latitude, reading.longitude, reading.accuracy_m
        if self._source.datum == "gcj02":
            stated = (latitude, longitude)
            latitude, longitude = wgs84_from_gcj02(stated)
            # Maps differ in whether they shift Hong Kong, Macau and Taiwan: both readings stay possible.
            accuracy_m += at_most_m(stated, (latitude, longitude))
        late_ns = self._freshness.late_ns(reading.time_ns, message)
        return Fix(
            latitude=latitude,
            longitude=longitude,
            accuracy_m=accuracy_m,
            time_ns=message.received_ns if reading.time_ns is None else reading.time_ns,
            monotonic_ns=message.monotonic_ns,
            doubt_ns=late_ns + reading.spread_ns,
        )


def checked(reading: Reading) -> Reading:
    """The reading itself; raises PositionError where it cannot be a place on Earth with an accuracy."""
    latitude, longitude, accuracy = reading.latitude, reading.longitude, reading.accuracy_m
    if not (abs(latitude) <= 90 and abs(longitude) <= 180):
        detail = "latitude or longitude is not on Earth"
        raise PositionError(detail)
    if max(abs(latitude), abs(longitude)) <= 1e-4:
        detail = "(0, 0) is what receivers say before they know"
        raise PositionError(detail)
    if not (0 < accuracy < math.inf):
        detail = "accuracy is not a positive number of metres"
        raise PositionError(detail)
    return reading


Parser = Callable[[Message], Reading | None]


def _json_parser(source: FixSource) -> Parser:
    def parse(message: Message) -> Reading:
        document = json.loads(message.payload)
        accuracy = _number(value_at(document, source.accuracy)) if source.accuracy else source.default_accuracy_m
        seconds = _number(value_at(document, source.time)) if source.time else None
        return Reading(
            latitude=_number(value_at(document, source.latitude)),
            longitude=_number(value_at(document, source.longitude)),
            accuracy_m=accuracy,
            time_ns=None if seconds is None else round(seconds * SECOND_NS),
        )

    return parse


def _vss_parser(source: FixSource) -> Parser:
    """Pairs of values from separate topics; each value is used for one fix only, so that no half goes stale."""
    waiting: dict[str, tuple[float, Message]] = {}
    accuracy = (source.default_accuracy_m, 0)

    def parse(message: Message) -> Reading | None:
        nonlocal accuracy
        value = _vss_value(json.loads(message.payload))
        if message.topic == source.accuracy:
            accuracy = (value, message.monotonic_ns)
            return None
        if message.topic not in {source.latitude, source.longitude}:
            detail = "a topic that is neither the latitude's nor the longitude's"
            raise PositionError(detail)
        waiting[message.topic] = (value, message)
        if len(waiting) < 2:
            return None
        (latitude, north), (longitude, east) = waiting[source.latitude], waiting[source.longitude]
        spread_ns = abs(north.monotonic_ns - east.monotonic_ns)
        if spread_ns > source.pair_ns:
            del waiting[source.longitude if message.topic == source.latitude else source.latitude]
            return None
        waiting.clear()
        accuracy_m, stated_ns = accuracy
        if message.monotonic_ns - stated_ns > ACCURACY_AGE_NS:
            accuracy_m = max(accuracy_m, source.default_accuracy_m)
        return Reading(latitude=latitude, longitude=longitude, accuracy_m=accuracy_m, spread_ns=spread_ns)

    return parse


def _vss_value(document: object) -> float:
    """A bare number, or the number under `value` as in VISS and Kuksa messages (`{"dp": {"value": ..}}` included)."""
    for key in ("data", "dp", "value"):
        if isinstance(document, Mapping) and key in document:
            document = document[key]
    return _number(float(document) if isinstance(document, str) else document)


def _locationfix_parser(source: FixSource) -> Parser:
    def parse(message: Message) -> Reading:
        document = json.loads(message.payload)
        return Reading(
            latitude=_number(document["latitude"]),
            longitude=_number(document["longitude"]),
            accuracy_m=_covariance_m(document, source.default_accuracy_m),
            time_ns=_timestamp_ns(document.get("timestamp")),
        )

    return parse


def _covariance_m(document: Mapping[str, Any], default_m: float) -> float:
    """95 % radius of the horizontal part of a row-major 3 x 3 covariance in square metres; type 0 says unknown."""
    kind = document.get("position_covariance_type", 0)
    if kind in {0, "UNKNOWN"}:
        return default_m
    matrix = [_number(value) for value in document["position_covariance"]]
    if len(matrix) != 9:
        detail = "position_covariance has not 9 numbers"
        raise PositionError(detail)
    east, north, both = matrix[0], matrix[4], (matrix[1] + matrix[3]) / 2
    largest = (east + north) / 2 + math.hypot((east - north) / 2, both)
    return RAYLEIGH_95 * math.sqrt(largest)


def _timestamp_ns(timestamp: object) -> int | None:
    """Unix ns of `{"sec", "nsec"}` (or nanosec) or of Unix seconds; None where nothing is stated."""
    if timestamp is None:
        return None
    if isinstance(timestamp, Mapping):
        fraction = timestamp["nsec"] if "nsec" in timestamp else timestamp["nanosec"]
        return round(_number(timestamp["sec"])) * SECOND_NS + round(_number(fraction))
    return round(_number(timestamp) * SECOND_NS)


def _nmea_parser(source: FixSource) -> Parser:
    reader = NmeaReader(default_accuracy_m=source.default_accuracy_m)

    def parse(message: Message) -> Reading | None:
        known = reader.read(message.payload, message.monotonic_ns)
        if known is None:
            return None
        return Reading(
            latitude=known.latitude, longitude=known.longitude, accuracy_m=known.accuracy_m, time_ns=known.time_ns
        )

    return parse


_PARSERS: Mapping[str, Callable[[FixSource], Parser]] = {
    "json": _json_parser,
    "vss": _vss_parser,
    "nmea": _nmea_parser,
    "locationfix": _locationfix_parser,
}


def _number(value: object) -> float:
    """A finite number that is not a boolean; raises PositionError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        detail = "a number was wanted"
        raise PositionError(detail)
    return float(value)
