"""What a payload holds is told from its raw bytes, fast; pictures are put back where they were."""

import base64
import contextlib
import gzip
import json
import math
import os
import random
import struct
import time
import timeit
import zlib
from urllib.parse import quote

import msgpack
import pytest
from canary import saved, scene
from conftest import TIME_SCALE
from foxglove_schemas_protobuf.CompressedImage_pb2 import CompressedImage
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import RefusedError
from agent.payloads.inspection import PLAIN, InspectionLimits, inspect, rewrite
from agent.payloads.packed import msgpack_leaves, protobuf_leaves, varint
from agent.pictures.signatures import search

LIMITS = InspectionLimits()
PICTURE = saved(scene(), "JPEG", quality=80)
OTHER = saved(scene(mark=False), "JPEG", quality=60)
CODE = base64.b64encode(PICTURE).decode()


def swap(payload: bytes, limits: InspectionLimits = LIMITS) -> bytes:
    """The payload with every picture replaced by another one."""
    return rewrite(payload, lambda _: OTHER, limits)


def refusal(payload: bytes, limits: InspectionLimits = LIMITS, content_type: str | None = None) -> str:
    with pytest.raises(RefusedError) as caught:
        inspect(payload, limits, content_type)
    return caught.value.reason


def signed(data: bytes) -> list[int]:
    """As Java writes bytes."""
    return [value - 256 if value > 127 else value for value in data]


def in_lines(text: bytes, length: int) -> bytes:
    return b"\n".join(text[start : start + length] for start in range(0, len(text), length))


def in_msgpack(data: bytes, code: str) -> bytes:
    """A list of numbers, each of the width of a `struct` code: what a sender writes that has them in such an array."""
    tag = {"B": 0xCC, "H": 0xCD, "I": 0xCE, "Q": 0xCF, "b": 0xD0, "h": 0xD1, "i": 0xD2, "q": 0xD3}[code]
    values = signed(data) if code.islower() else data
    return b"\xdd" + struct.pack(">I", len(data)) + b"".join(struct.pack(f">B{code}", tag, value) for value in values)


def telemetry() -> bytes:
    """About 1 kB of JSON as a car sends it."""
    generator = random.Random(4)
    signals = {f"signal_{i}": generator.random() * 100 for i in range(20)}
    histogram = [generator.randint(0, 255) for _ in range(40)]
    document = {"ts": 1.7e9, "lat": 22.5, "lon": 114.1, "signals": signals, "vin": "LSV" + "A" * 14, "state": "driving"}
    return json.dumps({**document, "histogram": histogram, "tags": ["a", "b"]}).encode()


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"12.5",
        b"true",
        b"on",
        telemetry(),
        json.dumps({"text": 'Größe 漢字 "quoted" \\ back\nslash' * 5}).encode(),
        json.dumps(
            {"sha256": os.urandom(32).hex(), "jwt": base64.urlsafe_b64encode(os.urandom(600)).decode()}
        ).encode(),
        json.dumps({"path": "/sys/devices/pci0000:00/0000:00:1f.2/ata1/host0/target0:0:0/block/sda"}).encode(),
        json.dumps({"certificate": "-----BEGIN-----\n" + base64.encodebytes(os.urandom(700)).decode()}).encode(),
        b'{"a": 1}\n{"a": 2, "b": "x\\/y"}\n',
        b"$GNGGA,123519,4807.038,N,01131.000,E,1,08,0.9,545.4,M,46.9,M,,*47\r\n$GNRMC,1*00\r\n",
        b'\xef\xbb\xbf{"a": 1}',
        "<state>grün</state>".encode(),
        msgpack.packb({"ts": 1.5, "speed": [1, 2.5, None, True], "name": "x" * 100, "raw": os.urandom(900)}),
        msgpack.packb([random.Random(1).random() for _ in range(500)]),
        msgpack.packb(msgpack.Timestamp(1, 2)),
    ],
)
def test_data_that_parses_fully_is_plain(payload):
    contents = inspect(payload, LIMITS)
    assert (contents.pictures, contents.opaque) == (False, False)
    assert swap(payload) == payload


@pytest.mark.parametrize(
    "payload",
    [
        b"\x00\x01\x02\x03\xff",
        bytes(range(256)),
        b"\x01\x02caf\xe9" * 20,
        msgpack.packb({"raw": b"\xfe" * 2000}),
        json.dumps({"raw": base64.b64encode(random.Random(2).randbytes(2000)).decode()}).encode(),
        json.dumps({"pixels": [random.Random(3).randint(0, 255) for _ in range(2000)]}).encode(),
        json.dumps({"base85": base64.b85encode(PICTURE).decode()}).encode(),
    ],
)
def test_bytes_that_cannot_be_read_are_opaque(payload):
    contents = inspect(payload, LIMITS)
    assert (contents.pictures, contents.opaque) == (False, True)


def test_word_in_an_unknown_encoding_is_opaque_beside_a_picture_and_in_an_escaped_string():
    unknown = base64.b85encode(PICTURE).decode()
    for document in ({"i": CODE, "u": unknown}, {"u": unknown + '"\\'}, {"u": f'{unknown}"', "i": CODE}):
        contents = inspect(json.dumps(document).encode(), LIMITS)
        assert (contents.pictures, contents.opaque) == ("i" in document, True)


def test_word_in_an_unknown_encoding_is_opaque_whatever_it_escapes_and_whatever_is_read_twice():
    assert '"' in (escaping := base64.a85encode(PICTURE).decode())
    unknown = base64.b85encode(PICTURE).decode()
    assert inspect(json.dumps({"i": escaping}).encode(), LIMITS).opaque
    beside = inspect(json.dumps({"i": f"{CODE}|{unknown}"}).encode(), LIMITS)
    assert (beside.pictures, beside.opaque) == (True, True)


def test_word_in_an_unknown_encoding_is_opaque_behind_a_byte_order_mark_and_in_one_of_many_lines():
    line = json.dumps({"i": base64.b85encode(PICTURE).decode()}).encode()
    assert inspect(b"\xef\xbb\xbf" + line, LIMITS).opaque
    assert inspect(b'{"a":1}\n' + line + b'\r\n{"a":2}', LIMITS).opaque


def test_base64_with_the_escapes_of_a_url_is_refused():
    form = b"camera=front&image=" + quote(CODE, safe="").encode() + b"&n=1"
    assert refusal(form) == "picture.hidden"
    assert inspect(b"camera=front%2Fleft&load=50%25", LIMITS) == PLAIN


def test_long_minified_json_in_a_string_is_read():
    inner = json.dumps({"values": {f"signal_{i}": i for i in range(200)}}, separators=(",", ":"))
    assert not inspect(json.dumps({"body": inner}).encode(), LIMITS).opaque


def test_limit_of_unreadable_bytes_is_a_parameter():
    payload = msgpack.packb({"raw": b"\xfe" * 200})
    assert not inspect(payload, LIMITS).opaque
    assert inspect(payload, InspectionLimits(opaque_bytes=100)).opaque


def test_picture_is_a_picture_whatever_the_topic_or_type_says():
    for content_type in (None, "application/json", "image/jpeg"):
        contents = inspect(PICTURE, LIMITS, content_type)
        assert (contents.pictures, contents.whole) == (True, True)


@pytest.mark.parametrize("content_type", ["image/jpeg", " Image/HEIC", "video/mp4"])
def test_payload_declared_as_a_picture_that_is_none_is_refused(content_type):
    assert refusal(telemetry(), content_type=content_type) == "picture.format"


@pytest.mark.parametrize(
    ("before", "pick"),
    [
        ({"ts": 1.5, "image": CODE, "n": [1, 2]}, lambda d: d["image"]),
        ([[{"a": {"b": [CODE]}}]], lambda d: d[0][0]["a"]["b"][0]),
        ({"image": f"data:image/jpeg;base64,{CODE}"}, lambda d: d["image"].split(",")[1]),
        ({"body": json.dumps({"image": CODE})}, lambda d: json.loads(d["body"])["image"]),
    ],
)
def test_picture_in_json_is_replaced_and_nothing_else_changes(before, pick):
    text = json.dumps(before, indent=1).encode()
    after = swap(text)
    document = json.loads(after)
    assert base64.b64decode(pick(document)) == OTHER
    assert text.replace(CODE.encode(), b"?") == after.replace(base64.b64encode(OTHER), b"?")


def test_both_values_of_a_duplicate_key_are_replaced():
    after = swap(b'{"i":"' + CODE.encode() + b'","i":"' + CODE.encode() + b'"}')
    assert after.count(base64.b64encode(OTHER)) == 2


@pytest.mark.parametrize(
    ("encode", "decode"),
    [
        (lambda p: base64.urlsafe_b64encode(p).rstrip(b"="), lambda t: base64.urlsafe_b64decode(t + b"==")),
        (base64.encodebytes, base64.decodebytes),
        (lambda p: base64.encodebytes(p).replace(b"\n", b"\r\n"), base64.decodebytes),
        (lambda p: p.hex().encode(), lambda t: bytes.fromhex(t.decode())),
        (lambda p: b"0x" + p.hex().encode(), lambda t: bytes.fromhex(t[2:].decode())),
        (lambda p: b"\\x" + p.hex().upper().encode(), lambda t: bytes.fromhex(t[2:].decode())),
        (lambda p: in_lines(p.hex().encode(), 60), lambda t: bytes.fromhex(t.decode())),
        (lambda p: json.dumps(list(p)).encode(), lambda t: bytes(json.loads(t))),
        (lambda p: json.dumps(signed(p)).encode(), lambda t: bytes(value & 255 for value in json.loads(t))),
        (lambda p: json.dumps([float(value) for value in p]).encode(), lambda t: bytes(map(int, json.loads(t)))),
        (lambda p: json.dumps({"d": dict(enumerate(p))}).encode(), lambda t: bytes(json.loads(t)["d"].values())),
        (lambda p: json.dumps({"d": p.decode("latin-1")}).encode(), lambda t: json.loads(t)["d"].encode("latin-1")),
        (msgpack.packb, msgpack.unpackb),
        (lambda p: msgpack.packb(list(p)), lambda t: bytes(msgpack.unpackb(t))),
        (lambda p: msgpack.packb(signed(p)), lambda t: bytes(value & 255 for value in msgpack.unpackb(t))),
        *(
            (lambda p, code=code: in_msgpack(p, code), lambda t: bytes(value & 255 for value in msgpack.unpackb(t)))
            for code in "BHIQbhiq"
        ),
        (lambda p: msgpack.packb({"i": msgpack.ExtType(7, p)}), lambda t: msgpack.unpackb(t)["i"].data),
    ],
)
def test_each_encoding_is_written_as_it_was_read(encode, decode):
    assert decode(swap(encode(PICTURE))) == OTHER


@pytest.mark.parametrize(
    "numbers",
    [
        [0.0] * 3000,
        [-1, 1] * 3000,
        {str(key): key % 256 for key in range(3000)},
        [300, *PICTURE],
        [-1, *PICTURE],
    ],
)
def test_numbers_in_which_no_picture_shows_are_numbers(numbers):
    text, packed = json.dumps({"v": numbers}).encode(), msgpack.packb({"v": numbers})
    assert (inspect(text, LIMITS), inspect(packed, LIMITS)) == (PLAIN, PLAIN)


def test_lines_of_base64_keep_their_length():
    lines = swap(base64.encodebytes(PICTURE)).splitlines()
    assert {len(line) for line in lines[:-1]} == {76}


def test_msgpack_keeps_the_width_of_every_other_value():
    packer = msgpack.Packer(use_single_float=True)
    other = packer.pack({"f": 1.5, "n": [1, 300, -7]})
    payload = b"\x92" + other + msgpack.packb(PICTURE)
    assert swap(payload) == b"\x92" + other + msgpack.packb(OTHER)


def test_foxglove_compressed_image_is_redacted_in_its_field():
    message = CompressedImage(frame_id="front", format="jpeg", data=PICTURE)
    message.timestamp.FromNanoseconds(1_700_000_000_123_456_789)
    after = CompressedImage.FromString(swap(message.SerializeToString()))
    assert after.data == OTHER
    after.data = PICTURE
    assert after == message


def test_signature_between_the_fields_of_a_protobuf_message_refuses_it():
    field = b"\x12" + varint(len(PICTURE)) + PICTURE
    assert swap(b"\x09" + b"harmless" + field).endswith(OTHER)
    assert refusal(b"\x09" + b"\x89PNG\r\n\x1a\n" + field) == "picture.hidden"


def test_picture_next_to_unreadable_bytes_is_told_as_both():
    contents = inspect(msgpack.packb({"i": PICTURE, "raw": b"\xfe" * 2000}), LIMITS)
    assert (contents.pictures, contents.opaque) == (True, True)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"GIF89a" + b"\x00" * 60, "picture.format"),
        (msgpack.packb({"i": b"GIF89a" + b"\x00" * 60}), "picture.format"),
        (b"\x00\x00\x00\x18ftypheic" + b"\x00" * 60, "picture.format"),
        (b"\x00\x00\x00\x0cJXL \r\n\x87\n" + b"\x00" * 60, "picture.format"),
        (b"\x1aE\xdf\xa3" + b"\x00" * 60, "picture.format"),
        (b"RIFF\x00\x00\x00\x00AVI " + b"\x00" * 60, "picture.format"),
        (b"\x00\x00\x00\x01\x67\x42\x00\x1e" + b"\xfe" * 60, "picture.format"),
        (b"P6\n# c\n2 2\n255\n" + b"\xfe" * 60, "picture.format"),
        (b"P3 2 2 255 " + b"1 2 3 " * 20, "picture.format"),
        (b"BM" + b"\xff" * 4 + b"\x00" * 4 + b"\x36\x00\x00\x00\x28\x00\x00\x00" + b"\xff" * 60, "picture.format"),
        (b"II*\x00\x08\x00\x00\x00" + b"\xff" * 60, "picture.format"),
        (b"\xfe\xfe" + PICTURE, "picture.hidden"),
        (b"\xfe\xfe" + saved(scene(), "PNG"), "picture.hidden"),
        (b"\xfe\xfe" + saved(scene(), "WEBP"), "picture.hidden"),
        (b"\xfe\xfe" + saved(scene(), "GIF"), "picture.hidden"),
        (gzip.compress(telemetry()), "payload.compressed"),
        (zlib.compress(telemetry()), "payload.compressed"),
        (zlib.compress(telemetry(), 1), "payload.compressed"),
        (msgpack.packb([gzip.compress(telemetry())]), "payload.compressed"),
        (b"\x28\xb5\x2f\xfd" + b"\xfe" * 60, "payload.compressed"),
        (b"\x00" * 257 + b"ustar" + b"\x00" * 60, "payload.compressed"),
    ],
)
def test_what_cannot_be_opened_here_is_refused_with_its_reason(payload, reason):
    assert refusal(payload) == reason


def test_payload_over_the_limit_is_refused_unread():
    assert refusal(b"x" * 101, InspectionLimits(max_bytes=100)) == "payload.limit.bytes"


def test_nesting_beyond_the_limit_is_refused():
    payload = json.dumps({"i": CODE})
    for _ in range(3):
        payload = json.dumps({"i": payload})
    assert refusal(payload.encode(), InspectionLimits(max_depth=3)) == "payload.limit.depth"
    assert swap(payload.encode()) != payload.encode()


def test_deeply_nested_text_and_msgpack_end_in_an_answer():
    assert not inspect(b"[" * 100_000, LIMITS).pictures
    assert inspect(b"\x91" * 100_000, LIMITS).opaque


def test_random_bytes_show_no_picture_by_chance():
    generator = random.Random(7)
    assert not any(search(generator.randbytes(1 << 20)) for _ in range(4))
    for size in (8, 32, 48, 64, 200):
        for _ in range(300):
            data = generator.randbytes(size)
            inspect(json.dumps({"hash": data.hex(), "key": base64.b64encode(data).decode()}).encode(), LIMITS)


@given(st.binary(max_size=400))
def test_any_bytes_end_in_contents_or_a_refusal(data):
    try:
        inspect(data, LIMITS)
    except RefusedError:
        return
    rewrite(data, lambda picture: picture, LIMITS)


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(max_size=70),
    lambda inner: st.lists(inner, max_size=40) | st.dictionaries(st.text(max_size=5), inner, max_size=20),
    max_leaves=60,
)


@given(values)
def test_msgpack_walk_finds_every_leaf_that_the_library_finds(value):
    def leaves(item):
        if isinstance(item, str | bytes):
            yield item if isinstance(item, bytes) else item.encode()
        elif isinstance(item, list | dict):
            for part in [*item, *(item.values() if isinstance(item, dict) else ())]:
                yield from leaves(part)

    found = msgpack_leaves(msgpack.packb(value), 64)
    assert found is not None
    assert sorted(leaf.content for leaf in found if leaf.tag != 0xDD) == sorted(leaves(value))


@given(values, st.integers(0, 400))
def test_torn_msgpack_is_not_msgpack(value, cut):
    data = msgpack.packb(value)
    assert msgpack_leaves(data[: min(cut, len(data) - 1)], 64) is None
    assert msgpack_leaves(data + b"\x00", 64) is None


@given(st.integers(0, 2**35))
def test_length_of_a_protobuf_field_is_read_as_it_was_written(length):
    assert protobuf_leaves(b"\x08" + varint(length)) == []
    assert len(varint(length)) == max(1, math.ceil(length.bit_length() / 7))


def test_plain_kilobyte_of_json_costs_a_few_times_its_parsing():
    payload = telemetry()
    assert 900 < len(payload) < 1100

    def cost(work) -> float:
        return min(timeit.repeat(work, number=200, repeat=7)) / 200

    parsing, inspecting = cost(lambda: json.loads(payload)), cost(lambda: inspect(payload, LIMITS))
    assert inspecting < 6 * parsing


MANY = 1 << 19
SHORT_RUNS = ",".join(["A" * 44] * 25)
HEAVY = {
    "comments": b'<?xml version="1.0"?>' + b"<!-- note -->" * (MANY // 13) + b"<state/>",
    "unclosed comments": b"<!--" * (MANY // 4),
    "document types": b"<!DOCTYPE svg>\n" * (MANY // 15),
    "data URLs": b"data:image/" * (MANY // 11),
    "netpbm comments": b"P5\n" + b"#\n" * (MANY // 2),
    "white space": b" " * MANY + b"<s",
    "names": b"#define " + b"a_" * (MANY // 2),
    "runs of base64": json.dumps([SHORT_RUNS] * (MANY // len(SHORT_RUNS))).encode(),
    "a long run": b"A" * MANY,
    "lines of hex": b"\n".join([b"ab" * 30] * (MANY // 61)),
    "open lists": b"[1," * (MANY // 3),
    "open objects": b'{"0":1,' * (MANY // 7),
    "escapes": b'["' + b'\\"' * (MANY // 2) + b'"]',
    "escapes of URLs": b"%2B" * (MANY // 3),
    "JSON lines": b'{"a":1}\n' * (MANY // 8) + b"x",
    "lists of numbers": (b"\xdc\x00\x21" + b"\x01" * 32) * 60 + b"\x01",
    "numbers": b"\xdd" + (MANY).to_bytes(4, "big") + b"\x01" * MANY,
    "zeros": b"\x00" * MANY,
    "signatures": b"\xfeRIFF" * (MANY // 5),
}


@pytest.mark.parametrize("payload", HEAVY.values(), ids=HEAVY)
def test_no_payload_takes_time_that_grows_faster_than_its_size(payload):
    """Half a megabyte takes a second at most where time is linear, and minutes to years where it is not."""
    started = time.process_time()
    with contextlib.suppress(RefusedError):
        inspect(payload, LIMITS)
    assert time.process_time() - started < 5.0 * TIME_SCALE
