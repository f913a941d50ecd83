"""The bytes of a record: what is written, what is refused, and that no changed byte goes unnoticed."""

from __future__ import annotations

import base64
import dataclasses

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.errors import EnvelopeError
from agent.messages import Basis
from agent.mqtt.packets import Outgoing
from agent.wire import envelope as wire
from agent.wire.attributes import from_texts, texts
from agent.wire.envelope import (
    Attributes,
    Signer,
    from_binary,
    pack,
    properties,
    received,
    repack,
    unpack,
    verify,
)
from agent.wire.signing import key_id_of, pre_authentication_encoding

KEY = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
SIGNER = Signer(key=KEY, key_id=key_id_of(KEY.public_key()))
KEYS = {SIGNER.key_id: KEY.public_key()}
SAMPLE = Attributes(
    id="0190a2f4-0000-7000-8000-000000000001",
    source="urn:vehicle:3f2a",
    type="org.residencyagent.telemetry.v1",
    subject="vehicle/telemetry/speed",
    time_ns=1_790_000_000_123_456_789,
    datacontenttype="application/json",
    dataregion=("cn", "hk"),
    regionbasis=Basis.GNSS,
    dataclassification="telemetry",
    policyversion="2026-09-1",
    recordedtime_ns=1_790_000_000_223_456_789,
    sequence=41,
)
PICTURE = dataclasses.replace(
    SAMPLE,
    id="0190a2f4-0000-7000-8000-000000000002",
    type="org.residencyagent.picture.v1",
    subject="vehicle/camera/front",
    datacontenttype="image/jpeg",
    dataregion=("eea",),
    dataclassification="picture",
    redaction="person=3,plate=1",
    modeldigest="ab" * 32,
    traceparent="00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
    dataschema="https://example.org/front.json",
)

_text = st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs", "Cn")), min_size=1, max_size=40)
_time = st.integers(0, 253_402_300_799 * 10**9)
_regions = st.sets(st.from_regex(r"[a-z]{2,5}", fullmatch=True), min_size=1, max_size=20).map(
    lambda found: tuple(sorted(found))
)
attributes = st.builds(
    Attributes,
    **dict.fromkeys(
        ("id", "source", "type", "subject", "datacontenttype", "dataclassification", "policyversion"), _text
    ),
    **dict.fromkeys(("dataschema", "redaction", "modeldigest", "traceparent"), st.none() | _text),
    time_ns=_time,
    recordedtime_ns=_time,
    dataregion=_regions,
    regionbasis=st.sampled_from(Basis),
    sequence=st.integers(0, 2**63 - 1),
    extensions=st.dictionaries(st.from_regex(r"x[a-z0-9]{0,19}", fullmatch=True), _text, max_size=4),
)
datas = st.binary(max_size=300) | st.sampled_from((255, 256, 65_535, 65_536)).map(bytes)


def _published(packed, mode):
    """What the uplink gives the client for a stored record."""
    opened = unpack(packed)
    if mode == "msgpack":
        return Outgoing(
            topic="t", payload=packed, content_type=wire.CONTENT_TYPE, properties=properties(opened.attributes)
        )
    pairs = properties(opened.attributes, opened.signature)
    return Outgoing(topic="t", payload=opened.data, content_type=opened.attributes.datacontenttype, properties=pairs)


@given(attributes, datas, st.sampled_from((None, SIGNER)))
def test_a_packed_record_unpacks_to_itself(given_attributes, data, signer):
    envelope = unpack(pack(given_attributes, data, signer))
    assert envelope.attributes == given_attributes
    assert envelope.data == data
    assert envelope.keyid == (signer and signer.key_id)


@given(attributes, datas)
def test_binary_mode_carries_the_same_signed_event(given_attributes, data):
    packed = unpack(pack(given_attributes, data, SIGNER))
    received = from_binary(
        data, given_attributes.datacontenttype, reversed(properties(given_attributes, packed.signature))
    )
    assert received == packed
    verify(received, KEYS)


@pytest.mark.parametrize("mode", ["msgpack", "binary"])
def test_a_stored_record_is_published_and_read_in_either_mode_without_the_key(mode):
    packed = pack(PICTURE, b"picture", SIGNER)
    sent = _published(packed, mode)
    envelope = received(sent.payload, sent.content_type, sent.properties)
    assert envelope == unpack(packed)
    assert ("datacontenttype" in dict(sent.properties), "signature" in dict(sent.properties)) == (
        False,
        mode == "binary",
    )


def test_an_envelope_is_read_without_any_property_of_mqtt_5():
    assert received(pack(SAMPLE, b"d", None), None, []).attributes == SAMPLE


def test_a_routing_property_that_contradicts_the_envelope_is_refused():
    sent = _published(pack(PICTURE, b"d", SIGNER), "msgpack")
    traced = [(name, "other" if name == "traceparent" else text) for name, text in sent.properties]
    assert received(sent.payload, sent.content_type, [*traced, ("hop", "1")]).attributes == PICTURE
    moved = [(name, "us" if name == "dataregion" else text) for name, text in sent.properties]
    with pytest.raises(EnvelopeError, match="dataregion"):
        received(sent.payload, sent.content_type, moved)


def test_a_record_over_the_limit_is_refused_in_either_mode():
    for mode in ("msgpack", "binary"):
        sent = _published(pack(SAMPLE, bytes(5000), SIGNER), mode)
        with pytest.raises(EnvelopeError, match="limit"):
            received(sent.payload, sent.content_type, sent.properties, max_bytes=4999)


@given(st.data())
@settings(max_examples=300)
def test_flipping_any_byte_of_an_envelope_is_detected(drawn):
    packed = pack(drawn.draw(st.sampled_from((SAMPLE, PICTURE))), b'{"v": 1}' * drawn.draw(st.integers(0, 40)), SIGNER)
    at = drawn.draw(st.integers(0, len(packed) - 1))
    changed = bytearray(packed)
    changed[at] ^= drawn.draw(st.integers(1, 255))
    with pytest.raises(EnvelopeError):
        verify(unpack(bytes(changed)), KEYS)


def test_every_single_bit_of_a_signed_envelope_counts():
    packed = pack(SAMPLE, b'{"v":1}', SIGNER)
    verify(unpack(packed), KEYS)
    for bit in range(len(packed) * 8):
        changed = bytearray(packed)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(EnvelopeError):
            verify(unpack(bytes(changed)), KEYS)


def test_a_cut_envelope_is_refused_at_every_length():
    packed = pack(SAMPLE, b"data", SIGNER)
    for length in range(len(packed)):
        with pytest.raises(EnvelopeError):
            unpack(packed[:length])
    with pytest.raises(EnvelopeError):
        unpack(packed + b"\0")


def _outer(payload, **changes):
    return {"payload": payload, "payloadType": wire.PAYLOAD_TYPE, "signatures": [], **changes}


def test_the_same_event_in_any_other_encoding_is_refused():
    plain = unpack(pack(SAMPLE, b"data", None))
    event = {**texts(SAMPLE), "data": b"data"}
    canonical = dict(sorted(event.items()))
    assert unpack(msgpack.packb(_outer(msgpack.packb(canonical)))) == plain
    long_form = plain.payload.replace(b"\xc4\x04data", b"\xc5\x00\x04data")
    assert msgpack.unpackb(long_form) == canonical
    for packed in (
        _outer(msgpack.packb(dict(sorted(event.items(), reverse=True)))),
        _outer(long_form),
        _outer(plain.payload, more=1),
        dict(reversed(_outer(plain.payload).items())),
    ):
        with pytest.raises(EnvelopeError, match="form"):
            unpack(msgpack.packb(packed))
    with pytest.raises(EnvelopeError, match="form"):
        unpack(pack(SAMPLE, bytes(200), None).replace(b"\x83\xa7payload", b"\xde\x00\x03\xa7payload"))


def test_an_unknown_payload_type_is_refused():
    with pytest.raises(EnvelopeError, match="payloadType"):
        unpack(msgpack.packb(_outer(b"", payloadType=wire.PAYLOAD_TYPE.replace("v1", "v2"))))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_but_an_envelope_error(junk):
    with pytest.raises(EnvelopeError):
        unpack(junk)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(0, 2**32) | st.text(max_size=5) | st.binary(max_size=5),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=8,
    )
)
def test_arbitrary_msgpack_raises_nothing_but_an_envelope_error(value):
    outer = {"payload": msgpack.packb(value), "payloadType": wire.PAYLOAD_TYPE, "signatures": []}
    for packed in (msgpack.packb(value), msgpack.packb(outer), msgpack.packb({**outer, "signatures": value})):
        with pytest.raises(EnvelopeError):
            unpack(packed)


@pytest.mark.parametrize("change", ["attribute", "drop", "add", "data", "type", "signature"])
def test_a_change_on_the_way_is_detected_in_binary_mode(change):
    signature = unpack(pack(PICTURE, b"picture", SIGNER)).signature
    pairs, data, content_type = dict(properties(PICTURE, signature)), b"picture", PICTURE.datacontenttype
    if change == "attribute":
        pairs["dataregion"] = "us"
    elif change == "drop":
        del pairs["redaction"]
    elif change == "add":
        pairs["newname"] = "x"
    elif change == "data":
        data = b"Picture"
    elif change == "type":
        content_type = "image/png"
    else:
        pairs["signature"] = base64.b64encode(bytes(64)).decode()
    with pytest.raises(EnvelopeError):
        verify(from_binary(data, content_type, pairs.items()), KEYS)


def test_properties_that_are_not_cloudevents_attributes_do_not_disturb_binary_mode():
    signature = unpack(pack(SAMPLE, b"d", SIGNER)).signature
    pairs = [("X-Broker", "node-3"), *properties(SAMPLE, signature), ("x-hop", "2")]
    verify(from_binary(b"d", SAMPLE.datacontenttype, pairs), KEYS)


def test_two_different_properties_of_one_name_are_refused():
    with pytest.raises(EnvelopeError, match="two different"):
        from_binary(b"d", "text/plain", [*properties(SAMPLE), ("dataregion", "us")])


@pytest.mark.parametrize("drop", ["keyid", "signature"])
def test_half_a_signature_is_refused(drop):
    pairs = properties(SAMPLE, unpack(pack(SAMPLE, b"d", SIGNER)).signature)
    with pytest.raises(EnvelopeError):
        from_binary(b"d", SAMPLE.datacontenttype, [pair for pair in pairs if pair[0] != drop])


def test_an_unsigned_record_never_verifies():
    with pytest.raises(EnvelopeError, match="unsigned"):
        verify(unpack(pack(SAMPLE, b"", None)), KEYS)
    with pytest.raises(EnvelopeError, match="unsigned"):
        verify(from_binary(b"", SAMPLE.datacontenttype, properties(SAMPLE)), KEYS)


def test_a_record_of_an_unknown_key_never_verifies():
    with pytest.raises(EnvelopeError, match="unknown key"):
        verify(unpack(pack(SAMPLE, b"", SIGNER)), {})


def test_a_key_under_anothers_name_never_verifies():
    stranger = Ed25519PrivateKey.from_private_bytes(bytes(32))
    with pytest.raises(EnvelopeError, match="wrong"):
        verify(unpack(pack(SAMPLE, b"", Signer(key=stranger, key_id=SIGNER.key_id))), KEYS)


def test_the_signature_is_over_the_dsse_encoding_of_the_carried_bytes():
    outer = msgpack.unpackb(pack(SAMPLE, b"data", SIGNER))
    assert pre_authentication_encoding("http://example.com/HelloWorld", b"hello world") == (
        b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    )
    signed = pre_authentication_encoding(outer["payloadType"], outer["payload"])
    KEY.public_key().verify(outer["signatures"][0]["sig"], signed)


def test_a_repacked_record_keeps_its_identity_and_data_and_is_signed_anew():
    before = pack(SAMPLE, b"data", SIGNER)
    after = unpack(repack(before, SIGNER, dataregion=("hk",), sequence=7))
    verify(after, KEYS)
    assert after.attributes == dataclasses.replace(SAMPLE, dataregion=("hk",), sequence=7)
    assert after.data == b"data"


def test_attributes_of_a_later_version_are_kept_and_stay_signed():
    later = dataclasses.replace(SAMPLE, extensions={"newthing": "1"})
    packed = pack(later, b"d", SIGNER)
    assert unpack(packed).attributes.extensions == {"newthing": "1"}
    assert repack(packed, SIGNER) == packed


@pytest.mark.parametrize(
    "wrong",
    [
        {"sequence": -1},
        {"sequence": 2**63},
        {"dataregion": ()},
        {"dataregion": ("hk", "cn")},
        {"dataregion": ("cn", "cn")},
        {"dataregion": ("c,n",)},
        {"dataregion": ("a/b",)},
        {"subject": "line\nbreak"},
        {"subject": ""},
        {"subject": "x" * 8193},
        {"subject": "\ud800"},
        {"subject": "vehicle/\ufeffspeed"},
        {"id": "\x7f"},
        {"type": "\ufffe"},
        {"time_ns": -1},
        {"recordedtime_ns": 253_402_300_800 * 10**9},
        {"extensions": {"data": "x"}},
        {"extensions": {"signature": "x"}},
        {"extensions": {"dataregion": "x"}},
        {"extensions": {"Upper": "x"}},
        {"extensions": {"x" * 21: "x"}},
        {"extensions": {f"x{number}": "x" for number in range(60)}},
    ],
)
def test_what_the_wire_cannot_carry_is_refused_when_it_is_built(wrong):
    with pytest.raises(EnvelopeError):
        dataclasses.replace(SAMPLE, **wrong)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("specversion", "1.1"),
        ("time", "2026-09-21T14:13:20Z"),
        ("time", "2026-09-21T14:13:20.123456789+00:00"),
        ("time", "2026-02-30T14:13:20.123456789Z"),
        ("time", "1969-12-31T23:59:59.000000000Z"),
        ("recordedtime", "now"),
        ("sequence", "41"),
        ("sequence", "-000000000000000041"),
        ("sequence", "9" * 19),
        ("regionbasis", "guess"),
        ("dataregion", "hk,cn"),
        ("dataregion", ""),
        ("id", ""),
    ],
)
def test_a_value_that_the_agent_does_not_write_is_refused(name, text):
    with pytest.raises(EnvelopeError):
        from_texts(texts(SAMPLE) | {name: text})


@pytest.mark.parametrize("name", ["id", "source", "dataregion", "time", "specversion", "sequence"])
def test_a_missing_attribute_is_refused(name):
    found = texts(SAMPLE)
    del found[name]
    with pytest.raises(EnvelopeError, match=name):
        from_texts(found)


def test_an_envelope_over_the_limit_is_refused_unread():
    packed = pack(SAMPLE, bytes(1000), None)
    assert unpack(packed, max_bytes=len(packed)).data == bytes(1000)
    with pytest.raises(EnvelopeError, match="limit"):
        unpack(packed, max_bytes=len(packed) - 1)


def test_sequences_sort_as_text_as_they_do_as_numbers():
    numbers = [0, 9, 10, 99, 100, 2**31, 2**63 - 1]
    written = [texts(dataclasses.replace(SAMPLE, sequence=number))["sequence"] for number in numbers]
    assert written == sorted(written)


def test_names_are_such_as_cloudevents_allows():
    for name in texts(PICTURE):
        assert name.isascii()
        assert name.isalnum()
        assert name == name.lower()
        assert len(name) <= 20


def test_the_envelope_costs_less_than_a_kilobyte_and_does_not_grow_with_the_data():
    small = len(pack(PICTURE, bytes(300), SIGNER)) - 300
    assert small < 1024
    assert len(pack(PICTURE, bytes(1 << 20), SIGNER)) - (1 << 20) <= small + 4


@pytest.mark.parametrize(
    ("given_text", "kept"),
    [
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", True),
        ("00-00000000000000000000000000000000-00f067aa0ba902b7-01", False),
        ("ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", False),
        ("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\n", False),
        ("junk", False),
        (None, False),
    ],
)
def test_only_a_valid_trace_context_is_passed_on(given_text, kept):
    assert wire.traceparent_or_none(given_text) == (given_text if kept else None)


@pytest.mark.parametrize("attributes", [SAMPLE, PICTURE])
def test_kept_record_is_read_as_it_was_written(attributes):
    opened = unpack(packed := pack(attributes, b"data", SIGNER))
    found = wire.kept(packed)
    assert (found.texts, found.data, found.signature) == (texts(attributes), b"data", opened.signature)
    assert list(found.texts) == sorted(found.texts)


@pytest.mark.parametrize("cut", [0, 1, 40, -1])
def test_kept_record_that_is_cut_is_refused(cut):
    with pytest.raises(EnvelopeError):
        wire.kept(pack(SAMPLE, b"data", None)[:cut])
