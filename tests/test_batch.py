"""Bytes of a batch: whole, torn, foreign and hostile."""

import tracemalloc

import msgpack
import pytest
import stream
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import EnvelopeError
from agent.wire import batch
from agent.wire.envelope import CONTENT_TYPE, pack

ENVELOPES = [pack(stream.record(number), stream.data_of(number), stream.SIGNER) for number in range(5)]
FORMS = {batch.CONTENT_TYPE: None, batch.ZSTD_CONTENT_TYPE: batch.compressor()}
forms = pytest.mark.parametrize("content_type", FORMS)
contents = st.lists(st.binary(max_size=300), min_size=2, max_size=batch.MAX_RECORDS)


def made(content_type, envelopes=ENVELOPES):
    return batch.pack(envelopes, FORMS[content_type])


def frame(data, **options):
    return zstandard.ZstdCompressor(**options).compress(data)


@forms
@given(envelopes=contents)
def test_what_is_packed_is_unpacked_byte_by_byte_and_in_order(content_type, envelopes):
    packed = made(content_type, envelopes)
    assert batch.is_batch(packed, content_type)
    assert batch.unpack(packed, content_type) == envelopes
    assert batch.is_batch(packed, None)
    assert batch.unpack(packed, None) == envelopes, "MQTT 3.1.1 has no Content Type"


@forms
@given(data=st.data())
def test_torn_batch_is_refused_wherever_it_is_torn(content_type, data):
    packed = made(content_type)
    length = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(EnvelopeError):
        batch.unpack(packed[:length], content_type)


@forms
@given(rest=st.binary(min_size=1, max_size=40))
def test_bytes_behind_a_batch_are_refused(content_type, rest):
    with pytest.raises(EnvelopeError):
        batch.unpack(made(content_type) + rest, content_type)


@forms
@given(payload=st.binary(max_size=200))
def test_anything_else_is_refused_and_never_another_error(content_type, payload):
    for bytes_ in (payload, b"\x92" + payload, b"\x28\xb5\x2f\xfd" + payload, frame(payload)):
        try:
            found = batch.unpack(bytes_, content_type)
        except EnvelopeError:
            continue
        assert made(batch.CONTENT_TYPE, found) in (bytes_, payload)


LONG = b"\xdd" + (5).to_bytes(4, "big")  # array 32 where a fixarray would do


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (msgpack.packb([]), "batch of 0 records"),
        (msgpack.packb(ENVELOPES[:1]), "batch of 1 records"),
        (msgpack.packb([b""] * (batch.MAX_RECORDS + 1)), "at most 256"),
        (b"\xdd\xff\xff\xff\xff", "at most 256"),
        (b"\x91" * 100_000, "not a msgpack"),
        (LONG + msgpack.packb(ENVELOPES)[1:], "not in the form"),
        (b"\x92\xc5\x00\x01a\xc4\x01b", "not in the form"),
        (msgpack.packb(["text", "text"]), "byte strings"),
        (msgpack.packb([ENVELOPES, ENVELOPES]), "byte strings"),
        (msgpack.packb({"a": 1}), "not a msgpack"),
        (ENVELOPES[0], "not a msgpack"),
        (msgpack.packb(ENVELOPES) + b"\0", "extra data"),
    ],
)
def test_what_pack_would_not_have_written_is_refused_with_its_reason(payload, reason):
    for content_type, bytes_ in ((batch.CONTENT_TYPE, payload), (batch.ZSTD_CONTENT_TYPE, frame(payload))):
        with pytest.raises(EnvelopeError, match=f"(?i){reason}"):
            batch.unpack(bytes_, content_type)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (made(batch.CONTENT_TYPE), "not a zstd frame"),
        (b"\x50\x2a\x4d\x18\x04\0\0\0abcd" + frame(made(batch.CONTENT_TYPE)), "not a zstd frame"),  # skippable frame
        (frame(made(batch.CONTENT_TYPE)) * 2, "unused data"),
        (frame(made(batch.CONTENT_TYPE), write_content_size=False), "does not say"),
        (frame(b""), "0 bytes"),
    ],
)
def test_what_is_not_one_frame_with_its_size_is_refused(payload, reason):
    with pytest.raises(EnvelopeError, match=reason):
        batch.unpack(payload, batch.ZSTD_CONTENT_TYPE)


def test_bomb_is_refused_before_anything_is_allocated():
    bomb = frame(bytes(1 << 26))
    assert len(bomb) < 10_000
    tracemalloc.start()
    with pytest.raises(EnvelopeError, match="the limit is 1000000"):
        batch.unpack(bomb, batch.ZSTD_CONTENT_TYPE, 1_000_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_frame_that_lies_about_its_size_is_refused():
    honest = frame(bytes(1 << 16))
    lying = honest.replace((1 << 16).to_bytes(4, "little"), (1000).to_bytes(4, "little"), 1)
    assert lying != honest
    with pytest.raises(EnvelopeError, match="zstd"):
        batch.unpack(lying, batch.ZSTD_CONTENT_TYPE)


def test_limit_holds_for_a_batch_that_is_not_compressed():
    packed = made(batch.CONTENT_TYPE)
    assert batch.unpack(packed, batch.CONTENT_TYPE, len(packed)) == ENVELOPES
    with pytest.raises(EnvelopeError, match="the limit"):
        batch.unpack(packed, batch.CONTENT_TYPE, len(packed) - 1)


def test_neither_a_lone_envelope_nor_other_data_is_taken_for_a_batch():
    assert not batch.is_batch(ENVELOPES[0], CONTENT_TYPE)
    assert not batch.is_batch(ENVELOPES[0], None)
    assert not batch.is_batch(b"", None)
    assert not batch.is_batch(msgpack.packb(ENVELOPES), "application/json"), "data of a record in binary mode"


def test_batch_of_one_or_of_too_many_is_not_made():
    for count in (0, 1, batch.MAX_RECORDS + 1):
        with pytest.raises(EnvelopeError, match=f"a batch of {count}"):
            batch.pack([b"x"] * count)
