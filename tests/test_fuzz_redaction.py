"""Damaged, spliced and invented input: no exception escapes but the agent's own, and no unredacted byte passes.

RESIDENCY_FUZZ_EXAMPLES sets how many inputs each property gets; the default suits a test run, a night suits 1000000.
"""

import base64
import io
import json
import os

import msgpack
import numpy as np
import pytest
from canary import saved, scene
from corpus import jpeg_vectors, payload_vectors, png_vectors, webp_vectors
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from agent.errors import EnvelopeError, PositionError, RefusedError
from agent.messages import Box, Message
from agent.payloads.inspection import InspectionLimits, inspect, rewrite
from agent.pictures.formats import Colour, PictureLimits, RedactedPayload, RedactionOptions
from agent.places.gnss import FixReader, FixSource
from agent.redaction.redaction import redact_payload
from agent.wire.envelope import unpack

EXAMPLES = int(os.environ.get("RESIDENCY_FUZZ_EXAMPLES", "150"))
LIMITS = InspectionLimits(picture=PictureLimits(max_pixels=100_000, max_bytes=1 << 20))
PICTURES = [vector.payload for vector in jpeg_vectors() + png_vectors() + webp_vectors()]
PAYLOADS = [vector.payload for vector in payload_vectors()]
fuzz = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def everything(picture: np.ndarray, _colour: Colour) -> list[Box]:
    """A detector for which the whole picture is one person: what leaves must be black."""
    return [Box(label="person", score=1.0, x1=0, y1=0, x2=picture.shape[1], y2=picture.shape[0])]


@st.composite
def damaged(draw, sources: list[bytes]) -> bytes:
    """A source with bytes changed, removed, repeated or joined with another one."""
    data = bytearray(draw(st.sampled_from(sources)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        match draw(st.sampled_from(("flip", "set", "cut", "tear", "double", "join"))):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "set":
                data[at : at + 4] = draw(
                    st.sampled_from((b"\x00\x00\x00\x00", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"))
                )
            case "cut":
                del data[at : at + draw(st.integers(1, 64))]
            case "tear":
                del data[at:]
            case "double":
                data[at:at] = data[at : at + draw(st.integers(1, 256))]
            case "join":
                data[at:at] = draw(st.sampled_from(sources))[: draw(st.integers(1, 4000))]
    return bytes(data)


def assert_black(picture: bytes) -> bytes:
    with Image.open(io.BytesIO(picture)) as image:
        assert np.asarray(image.convert("RGB")).max() <= 3
    return picture


def outcome(data: bytes) -> RedactedPayload | str:
    """What leaves, or the first word of the reason why nothing does."""
    try:
        return redact_payload(data, everything, RedactionOptions(), LIMITS)
    except RefusedError as refused:
        return refused.reason.split(".")[0]


@pytest.mark.usefixtures("codec")
@fuzz
@example(bytes(range(0x20, 0x7F)))  # what is left of a picture may be readable
@given(damaged(PICTURES))
def test_damaged_picture_is_refused_or_leaves_masked(data):
    done = outcome(data)
    if isinstance(done, str):
        assert done in {"picture", "payload"}
    elif done.pictures:
        rewrite(done.payload, assert_black, LIMITS)
    else:
        assert done.payload == data
        assert len(data) < 64 or inspect(data, LIMITS).opaque or data.decode("ascii").isprintable()


@pytest.mark.usefixtures("codec")
@fuzz
@given(damaged(PAYLOADS))
def test_damaged_payload_is_refused_or_every_picture_in_it_leaves_masked(data):
    done = outcome(data)
    if isinstance(done, str):
        assert done in {"picture", "payload"}
    else:
        rewrite(done.payload, assert_black, LIMITS)


FIRST, SECOND = (saved(scene(mark), "JPEG", quality=70) for mark in (True, False))
leaf = (
    st.none()
    | st.booleans()
    | st.integers(-(2**31), 2**31)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=30)
)


def trees(picture: bytes | str) -> st.SearchStrategy:
    return st.recursive(
        leaf | st.just(picture),
        lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8), inner, max_size=5),
        max_leaves=15,
    )


def exchanged(tree, old, new):
    match tree:
        case list():
            return [exchanged(item, old, new) for item in tree]
        case dict():
            return {key: exchanged(item, old, new) for key, item in tree.items()}
        case _:
            return new if type(tree) is type(old) and tree == old else tree


MANY = InspectionLimits(max_pictures=1000)


@fuzz
@given(trees(base64.b64encode(FIRST).decode()), st.booleans(), st.sampled_from((None, 1)))
def test_exactly_the_pictures_of_an_invented_json_tree_are_replaced(tree, ascii_only, indent):
    before = json.dumps(tree, ensure_ascii=ascii_only, indent=indent).encode()
    after = rewrite(before, lambda _: SECOND, MANY)
    old, new = (base64.b64encode(picture).decode() for picture in (FIRST, SECOND))
    assert json.loads(after) == exchanged(tree, old, new)


@fuzz
@given(trees(FIRST))
def test_exactly_the_pictures_of_an_invented_msgpack_tree_are_replaced(tree):
    after = rewrite(msgpack.packb(tree), lambda _: SECOND, MANY)
    assert msgpack.unpackb(after, strict_map_key=False) == exchanged(tree, FIRST, SECOND)


@pytest.mark.usefixtures("codec")
@fuzz
@given(st.binary(max_size=300) | st.text(max_size=200).map(str.encode))
def test_invented_bytes_are_answered_or_refused(data):
    done = outcome(data)
    assert isinstance(done, str) or done.pictures or done.payload == data


SENTENCES = [
    b"$GNGGA,123519.00,2231.1234,N,11406.5678,E,1,08,0.9,45.4,M,46.9,M,,*47",
    b"$GNRMC,123519.00,A,2231.1234,N,11406.5678,E,022.4,084.4,230394,003.1,W*6A",
    b'{"lat": 22.5, "lon": 114.1, "acc": 5, "ts": 1700000000.5}',
]


@pytest.mark.parametrize("form", ["json", "nmea", "vss", "locationfix"])
@fuzz
@given(data=damaged(SENTENCES) | st.binary(max_size=120))
def test_invented_position_is_a_fix_or_no_position(form, data):
    message = Message(topic="vehicle/gnss", payload=data, received_ns=1_700_000_000_000_000_000, monotonic_ns=1)
    try:
        FixReader(FixSource(format=form)).read(message)
    except PositionError:
        return


@fuzz
@given(damaged([msgpack.packb({"specversion": "1.0", "id": "1", "data": b"x" * 40})]) | st.binary(max_size=200))
def test_invented_envelope_is_an_envelope_or_none(data):
    try:
        unpack(data)
    except EnvelopeError:
        return
