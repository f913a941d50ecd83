import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import RefusedError
from agent.messages import Message
from agent.places.capture import stated_ns
from agent.settings.policy_config import Rule

SECOND = 10**9


def message(payload=b"", properties=()):
    return Message(topic="t", payload=payload, received_ns=0, monotonic_ns=0, properties=properties)


def rule(place, unit="s"):
    return Rule(topic="#", action="forward", data_class="x", capture_time=place, capture_unit=unit)


def test_rule_without_a_place_states_nothing():
    assert stated_ns(rule(""), message(b"whatever")) is None


@pytest.mark.parametrize(
    ("place", "unit", "payload", "expected"),
    [
        ("/ts", "s", b'{"ts": 1.5}', 1_500_000_000),
        ("/ts", "ms", b'{"ts": 1500}', 1_500_000_000),
        ("/ts", "us", b'{"ts": "1500000"}', 1_500_000_000),
        ("/a/1/t~1s", "ns", b'{"a": [0, {"t/s": 1700000000123456789}]}', 1_700_000_000_123_456_789),
        ("/ts", "rfc3339", b'{"ts": "1970-01-01T00:00:01.5Z"}', 1_500_000_000),
        ("/ts", "rfc3339", b'{"ts": "1970-01-01T01:00:01+01:00"}', 1_000_000_000),
    ],
)
def test_stated_time_is_read_where_the_rule_says(place, unit, payload, expected):
    assert stated_ns(rule(place, unit), message(payload)) == expected


def test_stated_time_is_read_from_a_user_property():
    sent = message(b"\xff\xd8", [("time", "1700000000123456789"), ("time", "1")])
    assert stated_ns(rule("property:time", "ns"), sent) == 1_700_000_000_123_456_789


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"{",
        b"[]",
        b"7",
        b'{"ts": null}',
        b'{"ts": true}',
        b'{"ts": "soon"}',
        b'{"ts": NaN}',
        b'{"ts": 1e999}',
        b'{"ts": {}}',
        b"[" * 100_000,
        b'{"ts": ' + b"9" * 5000 + b"}",
        b"\xff\xfe",
    ],
)
def test_message_that_should_state_its_time_and_does_not_is_refused(payload):
    with pytest.raises(RefusedError) as caught:
        stated_ns(rule("/ts"), message(payload))
    assert caught.value.reason == "capture.unreadable"


def test_time_without_a_zone_and_a_missing_property_are_refused():
    for given_rule, sent in [
        (rule("/ts", "rfc3339"), message(b'{"ts": "2026-01-01T00:00:00"}')),
        (rule("/ts", "rfc3339"), message(json.dumps({"ts": "2" * 10_000}).encode())),
        (rule("property:time"), message(b"")),
    ]:
        with pytest.raises(RefusedError):
            stated_ns(given_rule, sent)


@given(st.binary(max_size=60))
def test_no_payload_makes_it_raise_anything_else(payload):
    with contextlib.suppress(RefusedError):
        assert isinstance(stated_ns(rule("/ts"), message(payload)), int)
