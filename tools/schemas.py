"""How one MQTT payload stands in an MCAP channel, so that Foxglove and Lichtblick show it and no byte is lost.

Pictures become `foxglove.CompressedImage` around the untouched bytes, JSON objects stay JSON with an inferred schema,
everything else is an opaque channel without a schema. A JSON position is additionally shown as a `foxglove.LocationFix`
on a derived channel, which readers of recordings skip.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import msgspec
from foxglove_schemas_protobuf.CompressedImage_pb2 import CompressedImage
from foxglove_schemas_protobuf.LocationFix_pb2 import LocationFix
from google.protobuf.message import DecodeError
from mcap_protobuf.schema import build_file_descriptor_set

NANOSECONDS = 1_000_000_000
SIGMA_OF_95_PERCENT_RADIUS = 1 / 2.4477  # circular normal distribution: R95 = sqrt(-2 ln 0.05) sigma
PICTURE_MAGIC = {b"\xff\xd8\xff": "jpeg", b"\x89PNG\r\n\x1a\n": "png"}
LATITUDE_KEYS = ("lat", "latitude")
LONGITUDE_KEYS = ("lon", "lng", "longitude")
ACCURACY_KEYS = ("acc", "accuracy", "accuracy_m")
LARGEST = 1e9  # degrees or metres; what is larger is no position and no accuracy


class Form(Enum):
    """How the payload of a channel is encoded in the recording; the value stands in the channel's metadata."""

    PICTURE = "picture"
    JSON = "json"
    OPAQUE = "opaque"

    @property
    def encoding(self) -> str:
        """The MCAP message encoding."""
        return {Form.PICTURE: "protobuf", Form.JSON: "json", Form.OPAQUE: "application/octet-stream"}[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelSchema:
    """An MCAP schema record; an empty name stands for a channel without one."""

    name: str = ""
    encoding: str = ""
    data: bytes = b""


def form_of(payload: bytes) -> Form:
    """Tell the form from the payload itself: content types are often absent, and MQTT 3.1.1 has none."""
    if picture_format(payload):
        return Form.PICTURE
    if payload[:1] == b"{" and json_object(payload) is not None:
        return Form.JSON
    return Form.OPAQUE


def picture_format(payload: bytes) -> str | None:
    """`jpeg` or `png` by the first bytes, None for anything else."""
    return next((name for magic, name in PICTURE_MAGIC.items() if payload.startswith(magic)), None)


def json_object(payload: bytes) -> dict[str, Any] | None:
    """Parse a JSON object; None for any other payload, and for one that is nested too deep."""
    try:
        return msgspec.json.decode(payload, type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def schema_of(form: Form, topic: str, payload: bytes) -> ChannelSchema:
    """Build the schema of a new channel from the first payload on it."""
    if form is Form.PICTURE:
        return _protobuf_schema(CompressedImage)
    if form is Form.JSON:
        schema = {"type": "object", "properties": {key: _type(value) for key, value in _members(payload)}}
        return ChannelSchema(name=f"mqtt.{topic}", encoding="jsonschema", data=json.dumps(schema).encode())
    return ChannelSchema()


def fix_schema() -> ChannelSchema:
    """Build the schema of the derived position channels."""
    return _protobuf_schema(LocationFix)


def wrap(form: Form, topic: str, payload: bytes, capture_ns: int) -> bytes:
    """Encode a payload as the data of an MCAP message of this form."""
    if form is not Form.PICTURE:
        return payload
    image = CompressedImage(frame_id=topic, data=payload, format=picture_format(payload) or "")
    image.timestamp.FromNanoseconds(capture_ns)
    return bytes(image.SerializeToString())


def unwrap(form: Form, data: bytes) -> bytes:
    """Give back exactly the payload that was wrapped; raises ValueError for data that is not of this form."""
    if form is not Form.PICTURE:
        return data
    try:
        return bytes(CompressedImage.FromString(data).data)
    except DecodeError as exc:
        message = "not a foxglove.CompressedImage"
        raise ValueError(message) from exc


def position_of(members: Mapping[str, Any]) -> tuple[float, float] | None:
    """Latitude and longitude of a JSON object in degrees; None where it holds no valid ones."""
    latitude, longitude = _number(members, LATITUDE_KEYS), _number(members, LONGITUDE_KEYS)
    if latitude is None or longitude is None or abs(latitude) > 90 or abs(longitude) > 180:
        return None
    return latitude, longitude


def fix_of(topic: str, payload: bytes, capture_ns: int) -> bytes | None:
    """Encode the position in a JSON payload as `foxglove.LocationFix`, or None where it holds no valid one."""
    members = json_object(payload) or {}
    position = position_of(members)
    if position is None:
        return None
    latitude, longitude = position
    fix = LocationFix(frame_id=topic, latitude=latitude, longitude=longitude)
    fix.timestamp.FromNanoseconds(capture_ns)
    accuracy = _number(members, ACCURACY_KEYS)
    if accuracy is not None:
        variance = (accuracy * SIGMA_OF_95_PERCENT_RADIUS) ** 2
        fix.position_covariance.extend([variance, 0, 0, 0, variance, 0, 0, 0, 0])
        fix.position_covariance_type = LocationFix.APPROXIMATED
    return bytes(fix.SerializeToString())


def _number(members: Mapping[str, Any], keys: tuple[str, ...]) -> float | None:
    value = next((members[key] for key in keys if key in members), None)
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > LARGEST:
        return None
    return float(value)


def _members(payload: bytes) -> list[tuple[str, Any]]:
    return list((json_object(payload) or {}).items())


def _type(value: object) -> dict[str, str]:
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "array", dict: "object"}
    return {"type": names[type(value)]} if type(value) in names else {}


def _protobuf_schema(message: Any) -> ChannelSchema:  # noqa: ANN401 - protobuf's generated classes share no typed base
    data = build_file_descriptor_set(message).SerializeToString()
    return ChannelSchema(name=message.DESCRIPTOR.full_name, encoding="protobuf", data=data)
