from __future__ import annotations

import json

import pytest
from foxglove_schemas_protobuf.LocationFix_pb2 import LocationFix
from hypothesis import given, settings
from hypothesis import strategies as st
from mcap.reader import make_reader
from mcap_protobuf.decoder import DecoderFactory

from tools.mcap_records import RecordingError
from tools.recording import PROVENANCE, Properties, Recorded, RecordingWriter, contents, messages

JPEG = b"\xff\xd8\xff\xe0 any bytes after the magic \xff\xd9"
MAGIC_BYTES = 8
START = 1_700_000_000_000_000_000


def example(index=0, **changes):
    values = {
        "topic": "vehicle/telemetry/speed",
        "payload": b'{"v": %d, "ts": 1.5}' % index,
        "capture_ns": START + index,
        "receipt_ns": START + index + 5,
    }
    return Recorded(**{**values, **changes})


def write(path, recorded, *, chunked=True):
    with path.open("wb") as stream, RecordingWriter(stream, chunked=chunked) as writer:
        for message in recorded:
            writer.write(message)
    return path


text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
properties = st.builds(
    Properties,
    payload_format=st.sampled_from([None, 0, 1]),
    expiry_s=st.none() | st.integers(0, 2**32 - 1),
    content_type=st.none() | text,
    response_topic=st.none() | text,
    correlation=st.none() | st.binary(max_size=20),
    user=st.lists(st.tuples(text, text), max_size=4).map(tuple),
)
payloads = st.binary(max_size=200) | st.builds(lambda tail: JPEG + tail, st.binary()) | st.just(b'{"lat": 1, "lon": 2}')
recorded = st.builds(
    Recorded,
    topic=st.sampled_from(["a", "a/b", "vehicle/camera/front"]),
    payload=payloads,
    capture_ns=st.integers(0, 2**63),
    receipt_ns=st.integers(0, 2**63),
    qos=st.integers(0, 2),
    retain=st.booleans(),
    properties=properties,
)


@settings(deadline=None, max_examples=50)
@given(st.lists(recorded, max_size=10), st.booleans())
def test_messages_come_back_exactly_as_they_were_written(tmp_path_factory, given_messages, chunked):
    path = write(tmp_path_factory.mktemp("r") / "r.mcap", given_messages, chunked=chunked)
    assert list(messages(path)) == given_messages


def test_file_cut_at_any_byte_reads_as_a_prefix(tmp_path):
    drive = [example(index, properties=Properties(user=(("n", str(index)),))) for index in range(6)]
    data = write(tmp_path / "whole.mcap", drive, chunked=False).read_bytes()
    cut = tmp_path / "cut.mcap"
    lengths = set()
    for size in range(100, len(data)):
        cut.write_bytes(data[:size])
        found = list(messages(cut))
        assert found == drive[: len(found)]
        lengths.add(len(found))
        assert contents(cut).complete == (size >= len(data) - MAGIC_BYTES)
    assert lengths == set(range(7))


def test_file_that_is_no_recording_is_an_error(tmp_path):
    path = tmp_path / "no.mcap"
    path.write_bytes(b"this is not MCAP at all, and long enough")
    with pytest.raises(RecordingError, match=r"no\.mcap"):
        list(messages(path))


def test_damaged_chunk_is_an_error_rather_than_wrong_messages(tmp_path):
    path = write(tmp_path / "r.mcap", [example(index) for index in range(500)])
    data = bytearray(path.read_bytes())
    data[2000:2100] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(RecordingError):
        list(messages(path))


@pytest.mark.parametrize("chunked", [True, False])
@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_damage_anywhere_is_an_error_with_the_name_of_the_file(tmp_path_factory, chunked, data):
    path = tmp_path_factory.mktemp("r") / "damaged.mcap"
    drive = [example(index, qos=0, properties=Properties(user=(("a", "b"),))) for index in range(3)]
    write(path, [*drive, example(payload=JPEG)], chunked=chunked)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    for read in (lambda: list(messages(path)), lambda: contents(path)):
        try:
            read()
        except RecordingError as exc:
            assert "damaged.mcap" in str(exc)  # noqa: PT017 - no error is as good


def test_metadata_and_attachments_come_back_and_composite_is_told(tmp_path):
    path = tmp_path / "r.mcap"
    with path.open("wb") as stream, RecordingWriter(stream) as writer:
        writer.write(example())
        writer.metadata(PROVENANCE, {"composite": "true", "track": "synthetic"})
        writer.attach("policy.toml", "application/toml", b"version = 1")
    found = contents(path)
    assert found.complete
    assert found.composite
    assert found.attachments == {"policy.toml": b"version = 1"}
    assert not contents(write(tmp_path / "plain.mcap", [example()])).composite


def test_viewers_get_pictures_positions_and_json_by_their_schemas(tmp_path):
    drive = [
        example(payload=JPEG, topic="vehicle/camera/front"),
        example(payload=b'{"lat": 22.5, "lon": 114.1, "acc": 24.477, "ts": 1.0}', topic="vehicle/gnss"),
        example(payload=b"\x00\x01", topic="vehicle/raw"),
    ]
    path = write(tmp_path / "r.mcap", drive)
    with path.open("rb") as stream:
        reader = make_reader(stream, decoder_factories=[DecoderFactory()])
        schemas = {channel.topic: schema for schema, channel, _ in reader.iter_messages()}
        shown = {
            channel.topic: decoded
            for _, channel, _, decoded in reader.iter_decoded_messages(["vehicle/camera/front", "/fix/vehicle/gnss"])
        }
    assert schemas["vehicle/camera/front"].name == "foxglove.CompressedImage"
    assert schemas["/fix/vehicle/gnss"].name == "foxglove.LocationFix"
    assert json.loads(schemas["vehicle/gnss"].data)["properties"]["lat"] == {"type": "number"}
    assert schemas["vehicle/raw"] is None
    assert shown["vehicle/camera/front"].data == JPEG
    assert shown["vehicle/camera/front"].format == "jpeg"
    fix = shown["/fix/vehicle/gnss"]
    assert (fix.latitude, fix.longitude) == (22.5, 114.1)
    assert fix.position_covariance[0] == pytest.approx(100.0)
    assert fix.position_covariance_type == LocationFix.APPROXIMATED
