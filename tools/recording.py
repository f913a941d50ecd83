"""Recordings of MQTT traffic as MCAP files.

Layout: one channel per topic and form of payload; publish_time is the moment of capture, log_time that of receipt. The
properties of a message stand just before it on the channel `/mqtt/meta`, linked by channel id and sequence number.
Channels whose metadata says `derived` only help viewers. Provenance is a metadata record, a policy or a ground truth an
attachment. A file that was cut at any byte reads up to the last whole record.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

import msgspec
from mcap.records import Attachment, Channel, Footer, Message, Metadata
from mcap.writer import CompressionType, Writer

from tools.mcap_records import RecordingError, records
from tools.schemas import NANOSECONDS, ChannelSchema, Form, fix_of, fix_schema, form_of, schema_of, unwrap, wrap

META_TOPIC = "/mqtt/meta"
FIX_PREFIX = "/fix/"
PROVENANCE = "provenance"
PROFILE = "residency-mqtt"
CHUNK_BYTES = 1 << 20
FAR_NS = 3600 * NANOSECONDS
META_SCHEMA = {
    "type": "object",
    "properties": {
        "channel": {"type": "number"},
        "sequence": {"type": "number"},
        "qos": {"type": "number"},
        "retain": {"type": "boolean"},
        "payload_format": {"type": "number"},
        "expiry_s": {"type": "number"},
        "content_type": {"type": "string"},
        "response_topic": {"type": "string"},
        "correlation": {"type": "string", "contentEncoding": "base64"},
        "user": {"type": "array", "items": {"type": "array", "items": {"type": "string"}}},
    },
}


class Properties(msgspec.Struct, frozen=True, kw_only=True):
    """The MQTT 5 properties of a PUBLISH that survive a recording; the order of user properties is kept."""

    payload_format: int | None = None
    expiry_s: int | None = None
    content_type: str | None = None
    response_topic: str | None = None
    correlation: bytes | None = None
    user: tuple[tuple[str, str], ...] = ()


NO_PROPERTIES = Properties()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One MQTT message of a recording; times in Unix nanoseconds."""

    topic: str
    payload: bytes
    capture_ns: int
    receipt_ns: int
    qos: int = 1
    retain: bool = False
    properties: Properties = NO_PROPERTIES

    @property
    def moment_ns(self) -> int:
        """When it happened in the recording: its receipt where the stated capture is far from that.

        Retained messages of another day and clocks that nobody has set state such times.
        """
        return self.capture_ns if abs(self.receipt_ns - self.capture_ns) <= FAR_NS else self.receipt_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What a recording holds beside its messages. `complete` is False for a file that was cut."""

    metadata: Mapping[str, Mapping[str, str]]
    attachments: Mapping[str, bytes]
    complete: bool

    @property
    def composite(self) -> bool:
        """Whether the recording was put together from several drives."""
        return self.metadata.get(PROVENANCE, {}).get("composite") == "true"


@dataclass(slots=True, kw_only=True)
class _Channels:
    """What the writer has registered: channel ids by topic and form, and the next sequence number of each."""

    ids: dict[tuple[str, Form | None], int] = field(default_factory=dict)
    sequences: Counter[int] = field(default_factory=Counter)


class RecordingWriter:
    """Writes a recording; with `chunked=False` every message reaches the stream at once and no index is kept."""

    def __init__(self, stream: IO[bytes], *, chunked: bool = True) -> None:
        self._writer = Writer(stream, chunk_size=CHUNK_BYTES, compression=CompressionType.ZSTD, use_chunking=chunked)
        self._writer.start(profile=PROFILE, library="residency-tools")
        self._channels = _Channels()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def write(self, message: Recorded) -> None:
        """Append one message, its properties before it and its position, where it holds one, after it."""
        form = form_of(message.payload)
        channel = self._channel(message.topic, form, message.payload)
        sequence = self._next(channel)
        meta = _meta(message, channel, sequence)
        if meta:
            self._add(self._meta_channel(), message, msgspec.json.encode(meta))
        self._writer.add_message(
            channel_id=channel,
            log_time=message.receipt_ns,
            publish_time=message.capture_ns,
            data=wrap(form, message.topic, message.payload, message.capture_ns),
            sequence=sequence,
        )
        fix = fix_of(message.topic, message.payload, message.capture_ns) if form is Form.JSON else None
        if fix:
            self._add(self._fix_channel(message.topic), message, fix)

    def metadata(self, name: str, values: Mapping[str, str]) -> None:
        """Append a metadata record."""
        self._writer.add_metadata(name, dict(values))

    def attach(self, name: str, media_type: str, data: bytes, time_ns: int = 0) -> None:
        """Append an attachment."""
        self._writer.add_attachment(time_ns, time_ns, name, media_type, data)

    def finish(self) -> None:
        """Write the index; the stream stays open."""
        self._writer.finish()  # type: ignore[no-untyped-call]

    def _add(self, channel: int, message: Recorded, data: bytes) -> None:
        self._writer.add_message(
            channel_id=channel,
            log_time=message.receipt_ns,
            publish_time=message.capture_ns,
            data=data,
            sequence=self._next(channel),
        )

    def _next(self, channel: int) -> int:
        self._channels.sequences[channel] += 1
        return self._channels.sequences[channel]

    def _channel(self, topic: str, form: Form, payload: bytes) -> int:
        known = self._channels.ids.get((topic, form))
        if known is not None:
            return known
        return self._register((topic, form), schema_of(form, topic, payload), form.encoding, {"form": form.value})

    def _meta_channel(self) -> int:
        schema = ChannelSchema(name="mqtt.Meta", encoding="jsonschema", data=json.dumps(META_SCHEMA).encode())
        key = (META_TOPIC, None)
        return self._channels.ids.get(key) or self._register(key, schema, "json", {"derived": "meta"})

    def _fix_channel(self, topic: str) -> int:
        key = (FIX_PREFIX + topic, None)
        return self._channels.ids.get(key) or self._register(key, fix_schema(), "protobuf", {"derived": "fix"})

    def _register(
        self, key: tuple[str, Form | None], schema: ChannelSchema, encoding: str, metadata: dict[str, str]
    ) -> int:
        schema_id = self._writer.register_schema(schema.name, schema.encoding, schema.data) if schema.name else 0
        channel = self._writer.register_channel(key[0], encoding, schema_id, metadata)
        self._channels.ids[key] = channel
        return channel


def messages(path: Path) -> Iterator[Recorded]:
    """Read the messages in the order of the file, which is that of receipt; a cut file ends early without an error.

    Raises RecordingError for a damaged file, OSError.
    """
    try:
        yield from _messages(path)
    except RecordingError:
        raise
    except (KeyError, ValueError, msgspec.DecodeError) as exc:
        what = f"nothing tells of {exc}" if isinstance(exc, KeyError) else str(exc)
        message = f"{path}: not a readable recording: {what}"
        raise RecordingError(message) from exc


def _messages(path: Path) -> Iterator[Recorded]:
    channels: dict[int, _Known] = {}
    meta: dict[tuple[int, int], _Meta] = {}
    for record in records(path):
        if isinstance(record, Message):
            known = channels[record.channel_id]
            if known.meta:
                values = msgspec.json.decode(record.data, type=_Meta)
                meta[values.channel, values.sequence] = values
            elif not known.derived:
                yield _recorded(known, record, meta.pop((record.channel_id, record.sequence), DEFAULTS))
        elif isinstance(record, Channel):
            channels[record.id] = _Known(
                topic=record.topic,
                form=_form(record),
                meta=record.topic == META_TOPIC,
                derived="derived" in record.metadata,
            )


def contents(path: Path) -> Contents:
    """Read metadata and attachments; of several with one name the last counts."""
    metadata: dict[str, Mapping[str, str]] = {}
    attachments: dict[str, bytes] = {}
    complete = False
    for record in records(path, open_chunks=False):
        if isinstance(record, Metadata):
            metadata[record.name] = record.metadata
        elif isinstance(record, Attachment):
            attachments[record.name] = record.data
        complete = complete or isinstance(record, Footer)
    return Contents(metadata=metadata, attachments=attachments, complete=complete)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Known:
    """A channel that the reader has met."""

    topic: str
    form: Form
    meta: bool
    derived: bool


class _Meta(Properties, frozen=True, kw_only=True, omit_defaults=True):
    """What stands on the channel `/mqtt/meta` of the message with this channel and sequence; bytes are base64."""

    channel: int = 0
    sequence: int = 0
    qos: int = 1
    retain: bool = False


DEFAULTS = _Meta()  # of a message of which nothing is written there


def _recorded(channel: _Known, record: Message, meta: _Meta) -> Recorded:
    return Recorded(
        topic=channel.topic,
        payload=unwrap(channel.form, record.data),
        capture_ns=record.publish_time,
        receipt_ns=record.log_time,
        qos=meta.qos,
        retain=meta.retain,
        properties=NO_PROPERTIES if meta is DEFAULTS else Properties(**_properties_of(meta)),
    )


def _properties_of(one: Properties) -> dict[str, Any]:
    return {name: getattr(one, name) for name in Properties.__struct_fields__}


def _form(channel: Channel) -> Form:
    """Tell the form of a channel; files of other writers have no `form`, so the encoding stands in for it."""
    named = channel.metadata.get("form")
    if named in {form.value for form in Form}:
        return Form(named)
    return Form.JSON if channel.message_encoding == "json" else Form.OPAQUE


def _meta(message: Recorded, channel: int, sequence: int) -> _Meta | None:
    """What differs from the defaults, or None where nothing does."""
    if message.properties is NO_PROPERTIES and message.qos == DEFAULTS.qos and not message.retain:
        return None
    meta = _Meta(qos=message.qos, retain=message.retain, **_properties_of(message.properties))
    return None if meta == DEFAULTS else msgspec.structs.replace(meta, channel=channel, sequence=sequence)
