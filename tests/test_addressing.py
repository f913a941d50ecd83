"""Topics on the regional brokers: what a template may hold and what may be filled in."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import EnvelopeError
from agent.messages import Basis
from agent.wire.addressing import DEFAULT_TEMPLATE, check_template, topic, vehicle_topic
from agent.wire.attributes import Attributes

RECORD = Attributes(
    id="1",
    source="urn:vehicle:a",
    type="t",
    subject="vehicle/camera/front",
    time_ns=0,
    datacontenttype="image/jpeg",
    dataregion=("cn", "hk"),
    regionbasis=Basis.GNSS,
    dataclassification="picture",
    policyversion="1",
    recordedtime_ns=0,
    sequence=0,
)


def test_a_topic_names_region_vehicle_and_the_topic_on_the_car():
    assert topic(DEFAULT_TEMPLATE, RECORD, "car-7") == "cn,hk/car-7/vehicle/camera/front"
    assert topic("v1/{class}/{region}", RECORD, "car-7") == "v1/picture/cn,hk"


def test_what_is_filled_in_is_not_filled_in_again():
    assert topic("{vehicle}/{topic}", RECORD, "{topic}") == "{topic}/vehicle/camera/front"


@pytest.mark.parametrize("vehicle", ["", "a/b", "+", "#", "a#", "a\0", "a\n"])
def test_a_vehicle_that_would_change_the_topics_shape_is_refused(vehicle):
    with pytest.raises(EnvelopeError, match="vehicle"):
        topic(DEFAULT_TEMPLATE, RECORD, vehicle)


@pytest.mark.parametrize("subject", ["a/+/b", "#", "$SYS/broker"])
def test_a_topic_that_would_become_a_wildcard_or_a_dollar_topic_is_refused(subject):
    with pytest.raises(EnvelopeError):
        topic("{topic}", dataclasses.replace(RECORD, subject=subject), "car-7")


def test_a_topic_longer_than_mqtt_allows_is_refused():
    with pytest.raises(EnvelopeError, match="65535"):
        topic("/".join(["{topic}"] * 9), dataclasses.replace(RECORD, subject="x" * 8000), "car-7")


@pytest.mark.parametrize(
    "template",
    ["", "$share/{topic}", "{topic", "topic}", "{}", "{0}", "{Topic}", "{colour}", "a/+/{topic}", "{topic}/#"],
)
def test_a_template_that_cannot_give_topics_is_named_a_mistake(template):
    assert check_template(template)


@given(
    st.lists(st.sampled_from(["{region}", "{vehicle}", "{topic}", "{class}", "a", "b/"]), min_size=1, max_size=5),
    st.text(min_size=1, max_size=20),
    st.text(min_size=1, max_size=20),
)
def test_every_topic_that_is_given_can_be_published_to(parts, vehicle, subject):
    template = "/".join(parts)
    assert check_template(template) is None
    try:
        name = topic(template, dataclasses.replace(RECORD, subject=subject), vehicle)
    except EnvelopeError:
        return
    assert not name.startswith("$")
    assert not set(name) & set("+#\0")


def test_a_vehicles_own_topic_holds_nothing_but_its_name():
    assert vehicle_topic("residency-agent/{vehicle}/presence", "car-7") == "residency-agent/car-7/presence"
    with pytest.raises(EnvelopeError):
        vehicle_topic("{region}/{vehicle}", "car-7")
