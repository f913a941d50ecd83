import datetime as dt
import hashlib
import hmac
import json
import math

import msgpack
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent.errors import RefusedError
from agent.payloads.fields import CoarsePosition, CoarseTime, FieldRules, apply_field_rules, coarse_position
from agent.places.geodesy import sphere_m

KEY = b"0123456789abcdef"


def to_json(document):
    return json.dumps(document).encode()


def through_json(document, **rules):
    return json.loads(apply_field_rules(to_json(document), FieldRules(**rules)))


def through_msgpack(document, **rules):
    out = apply_field_rules(msgpack.packb(document), FieldRules(**rules))
    return msgpack.unpackb(out, strict_map_key=False, timestamp=0)


both = pytest.mark.parametrize("through", [through_json, through_msgpack])


@both
def test_a_dropped_field_is_gone_and_the_others_stay(through):
    document = {"vin": "V", "trip": {"driver": "D", "km": 3}, "n": [1, 2]}
    assert through(document, drop=("/vin", "/trip/driver")) == {"trip": {"km": 3}, "n": [1, 2]}


@both
def test_a_star_stands_for_every_element_and_every_member(through):
    document = {"trips": [{"vin": "V", "km": 1}, {"vin": "W", "km": 2}], "by": {"a": {"vin": "X"}, "b": {"vin": "Y"}}}
    assert through(document, drop=("/trips/*/vin", "/by/*/vin")) == {
        "trips": [{"km": 1}, {"km": 2}],
        "by": {"a": {}, "b": {}},
    }


@both
def test_dropping_every_element_leaves_an_empty_list(through):
    assert through({"a": [1, 2, 3]}, drop=("/a/*",)) == {"a": []}


@both
def test_keep_only_keeps_nothing_else(through):
    document = {"speed": 3, "gps": {"lat": 1, "lon": 2, "raw": "x"}, "vin": "V", "list": [{"a": 1, "b": 2}, 7]}
    kept = through(document, keep=("/speed", "/gps/lat", "/list/*/a", "/absent", "/vin/deeper"))
    assert kept == {"speed": 3, "gps": {"lat": 1}, "list": [{"a": 1}]}


@both
def test_keep_may_name_a_whole_branch(through):
    assert through({"a": {"b": [1, {"c": 2}]}, "d": 1}, keep=("/a",)) == {"a": {"b": [1, {"c": 2}]}}


@both
def test_an_absent_or_null_field_needs_nothing(through):
    rules = {
        "drop": ("/a/b",),
        "positions": (CoarsePosition(latitude="/p/lat", longitude="/p/lon", metres=100),),
        "times": (CoarseTime(place="/t", seconds=60),),
        "pseudonymise": ("/vin",),
        "key": KEY,
    }
    for document in ({}, {"a": None, "p": None, "t": None, "vin": None}, {"p": {"lat": None, "lon": None}}):
        assert through(document, **rules) == document


@both
def test_a_position_moves_by_no_more_than_its_cell(through):
    rule = CoarsePosition(latitude="/gps/lat", longitude="/gps/lon", metres=1_000)
    out = through({"gps": {"lat": 47.123456, "lon": 8.654321}}, positions=(rule,))
    moved = sphere_m((47.123456, 8.654321), (out["gps"]["lat"], out["gps"]["lon"]))
    assert 0 < moved <= 1_000 * math.sqrt(0.5) * 1.02


places = st.tuples(st.floats(-90, 90), st.floats(-180, 180))


@given(place=places, metres=st.floats(1, 1e7))
def test_a_coarse_position_gives_itself(place, metres):
    coarse = coarse_position(*place, metres)
    assert coarse_position(*coarse, metres) == coarse


@given(latitude=st.floats(-80, 80), longitude=st.floats(-179, 179), metres=st.floats(10, 50_000))
def test_a_coarse_position_is_within_half_a_diagonal(latitude, longitude, metres):
    coarse = coarse_position(latitude, longitude, metres)
    assert sphere_m((latitude, longitude), coarse) <= metres * math.sqrt(0.5) * 1.05


@example(place=(60.0, 10.0), metres=1_000.0, east=0.45, north=0.45)
@given(place=places, metres=st.floats(100, 10_000), east=st.floats(-0.49, 0.49), north=st.floats(-0.49, 0.49))
def test_a_cell_is_as_many_metres_wide_as_was_asked_for(place, metres, east, north):
    latitude, longitude = coarse_position(min(max(place[0], -80), 80), min(max(place[1], -170), 170), metres)
    inside = latitude + north * metres / 111_700  # metres per degree near a pole: no degree of latitude is longer
    eastward = longitude + east * metres / (111_320 * math.cos(math.radians(inside)))
    assert coarse_position(inside, eastward, metres) == (latitude, longitude)


def test_a_coarse_position_does_not_tell_the_side_of_the_equator():
    out = apply_field_rules(
        b'{"lat":-0.001,"lon":-0.001}',
        FieldRules(positions=(CoarsePosition(latitude="/lat", longitude="/lon", metres=10_000),)),
    )
    assert out == b'{"lat":0.0,"lon":0.0}'


@pytest.mark.parametrize(
    "gps",
    [
        {"lat": 1.0},
        {"lat": None, "lon": 1.0},
        {"lat": "1.0", "lon": 1.0},
        {"lat": True, "lon": 1.0},
        {"lat": 91, "lon": 1},
        [1.0, 2.0],
        "1,2",
    ],
)
@both
def test_a_position_of_another_shape_is_refused(through, gps):
    rule = CoarsePosition(latitude="/gps/lat", longitude="/gps/lon", metres=1_000)
    with pytest.raises(RefusedError) as refused:
        through({"gps": gps}, positions=(rule,))
    assert refused.value.reason == "fields.unfit"


@pytest.mark.parametrize(
    ("value", "unit", "coarse"),
    [
        (1_700_000_123, "s", 1_700_000_100),
        (1_700_000_123_999, "ms", 1_700_000_100_000),
        (1_700_000_123_999_999_999, "ns", 1_700_000_100_000_000_000),
        (-1, "s", -60),
        (-60, "s", -60),
        ("2026-11-23T17:45:31.123456Z", "rfc3339", "2026-11-23T17:45:00Z"),
        ("2026-11-23T17:45:31+01:00", "rfc3339", "2026-11-23T17:45:00+01:00"),
    ],
)
@both
def test_a_time_is_set_back_to_the_last_multiple(through, value, unit, coarse):
    assert through({"t": value}, times=(CoarseTime(place="/t", seconds=60, unit=unit),)) == {"t": coarse}


@both
def test_a_fractional_time_keeps_no_fraction(through):
    assert through({"t": 1_700_000_123.75}, times=(CoarseTime(place="/t", seconds=60),)) == {"t": 1_700_000_100.0}


def test_a_msgpack_timestamp_is_set_back_too():
    rule = CoarseTime(place="/t", seconds=60)
    assert through_msgpack({"t": msgpack.Timestamp(1_700_000_123, 5)}, times=(rule,)) == {
        "t": msgpack.Timestamp(1_700_000_100, 0)
    }


@pytest.mark.parametrize(
    ("value", "unit"),
    [("soon", "rfc3339"), ("2026-11-23T17:45:31", "rfc3339"), (5, "rfc3339"), ("5", "s"), (True, "s"), ([5], "s")],
)
@both
def test_a_time_of_another_shape_is_refused(through, value, unit):
    with pytest.raises(RefusedError):
        through({"t": value}, times=(CoarseTime(place="/t", seconds=60, unit=unit),))


@both
def test_a_pseudonym_is_the_keyed_digest_of_the_value(through):
    expected = hmac.new(KEY, b"sWVWZZZ", hashlib.sha256).hexdigest()[:32]
    assert through({"vin": "WVWZZZ"}, pseudonymise=("/vin",), key=KEY) == {"vin": expected}
    assert through({"vin": "WVWZZZ"}, pseudonymise=("/vin",), key=KEY[::-1]) != {"vin": expected}


@both
def test_numbers_of_equal_value_have_one_pseudonym_and_text_another(through):
    rules = {"pseudonymise": ("/*",), "key": KEY}
    out = through({"a": 12, "b": 12.0, "c": "12"}, **rules)
    assert out["a"] == out["b"] != out["c"]


@pytest.mark.parametrize("value", [True, [1], {"a": 1}])
@both
def test_what_has_no_single_value_gets_no_pseudonym_but_a_refusal(through, value):
    with pytest.raises(RefusedError):
        through({"vin": value}, pseudonymise=("/vin",), key=KEY)


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"hello",
        b"{",
        b'{"a":1}x',
        b'{"a":1,"a":2}',
        b'{"a":NaN}',
        b'{"a":1}\xff',
        '{"a":1}'.encode("utf-16"),
        b'\xef\xbb\xbf{"a":1}',
        b'"text"',
        b"[" * 100_000,
        b"\x81",
        b"\x81\xa1a\x01\x00",
        b"\x82\xa1a\x01\xa1a\x02",
        b"\x81\x90\x01",
        b"\xdd\xff\xff\xff\xff",
        b"\x91" * 5_000 + b"\x01",
        b"\xff\xd8\xff\xe0",
    ],
)
def test_a_payload_that_cannot_be_parsed_is_refused(payload):
    with pytest.raises(RefusedError) as refused:
        apply_field_rules(payload, FieldRules(drop=("/a",)))
    assert refused.value.reason == "fields.unreadable"


def test_a_payload_that_is_not_what_its_type_says_is_refused():
    with pytest.raises(RefusedError):
        apply_field_rules(msgpack.packb({"a": 1}), FieldRules(drop=("/a",)), "application/json; charset=utf-8")
    with pytest.raises(RefusedError):
        apply_field_rules(b'{"a":1}', FieldRules(drop=("/a",)), "application/msgpack")


@both
def test_a_batch_is_not_passed_over_by_a_rule_for_one_record(through):
    with pytest.raises(RefusedError) as refused:
        through([{"vin": "V"}], drop=("/vin",))
    assert refused.value.reason == "fields.unfit"
    assert through([{"vin": "V"}], drop=("/*/vin",)) == [{}]


def test_untouched_json_numbers_keep_every_digit():
    payload = b'{"a":1.10,"b":123456789012345678901234567890,"c":1E400,"d":-0.0,"vin":"x"}'
    assert apply_field_rules(payload, FieldRules(drop=("/vin",))) == payload[: payload.index(b',"vin"')] + b"}"


def test_untouched_text_keeps_its_meaning():
    document = {"snow": "雪", "lone": "\ud800", "quote": '"\\/\n', "vin": "x"}
    assert through_json(document, drop=("/vin",)) == {key: document[key] for key in ("snow", "lone", "quote")}


def test_untouched_msgpack_values_keep_their_types():
    document = {
        "bin": b"\x00\xff",
        "ext": msgpack.ExtType(5, b"abc"),
        "when": msgpack.Timestamp(1, 2),
        "big": 2**64 - 1,
        "nan": math.inf,
        7: None,
    }
    assert through_msgpack({**document, "vin": "x"}, drop=("/vin",)) == document


def test_msgpack_text_that_is_not_utf8_stays_as_it_is():
    payload = b"\x82\xa1a\xa2\xff\xfe\xa1b\x01"
    assert apply_field_rules(payload, FieldRules(drop=("/b",))) == b"\x81\xa1a\xa2\xff\xfe"


def test_a_msgpack_key_of_bytes_or_of_digits_is_found():
    assert through_msgpack({b"vin": 1, 7: 2, "a": 3}, drop=("/vin", "/7")) == {"a": 3}


def test_a_pointer_may_name_keys_with_slashes_and_tildes():
    assert through_json({"a/b": 1, "c~d": 2, "e": 3}, drop=("/a~1b", "/c~0d")) == {"e": 3}


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: FieldRules(drop=("vin",)),
        lambda: FieldRules(pseudonymise=("/vin",)),
        lambda: FieldRules(pseudonymise=("/vin",), key=b"short"),
        lambda: CoarsePosition(latitude="/a/lat", longitude="/b/lon", metres=1),
        lambda: CoarsePosition(latitude="/lat", longitude="/lon", metres=math.nan),
        lambda: CoarseTime(place="/t", seconds=0),
    ],
)
def test_rules_that_cannot_work_are_not_made(wrong):
    with pytest.raises(ValueError, match=r"."):
        wrong()


def test_a_key_does_not_show_in_a_log():
    assert "0123" not in repr(FieldRules(pseudonymise=("/vin",), key=KEY))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=20,
)


@given(document=st.dictionaries(st.text(), json_values, max_size=5))
def test_rules_that_match_nothing_change_no_value(document):
    rules = FieldRules(drop=("/ absent",))
    document.pop(" absent", None)
    assert json.loads(apply_field_rules(to_json(document), rules)) == document


@given(document=st.dictionaries(st.text(), json_values, max_size=5), secret=st.uuids())
def test_a_dropped_value_is_nowhere_in_the_result(document, secret):
    payload = to_json({**document, "vin": str(secret)})
    assert str(secret).encode() not in apply_field_rules(payload, FieldRules(drop=("/vin",)))


@given(st.integers(-(2 * 10**15), 2 * 10**15), st.integers(1, 100_000))
def test_a_coarse_time_is_a_multiple_and_not_in_the_future(microseconds, seconds):
    moment = dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(microseconds=microseconds)
    rule = CoarseTime(place="/t", seconds=seconds, unit="rfc3339")
    out = dt.datetime.fromisoformat(through_json({"t": moment.isoformat()}, times=(rule,))["t"])
    assert dt.timedelta(0) <= moment - out < dt.timedelta(seconds=seconds)
    assert (out - dt.datetime(1970, 1, 1, tzinfo=dt.UTC)) % dt.timedelta(seconds=seconds) == dt.timedelta(0)
