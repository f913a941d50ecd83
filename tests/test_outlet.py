import ast
import asyncio
import dataclasses
import functools
import types
from pathlib import Path

import msgspec
import pytest
from endpoints import bench
from endpoints import policy_of as policy_for
from fake_broker import fake_broker
from test_policy import policy_of, record

import agent
from agent.clock import Moment
from agent.errors import EnvelopeError
from agent.messages import Basis
from agent.mqtt.packets import Session
from agent.policy import Cleared
from agent.uplink.egress import PeerRules
from agent.uplink.options import UplinkOptions
from agent.uplink.outlet import Outlet
from agent.wire.envelope import Attributes, pack

NOW = Moment(time_ns=0)
TRANSPORT = {"packets", "connection", "client", "transport"}  # modules that carry a PUBLISH and make none


async def test_record_that_the_policy_permits_no_longer_is_withdrawn_and_never_sent(patience):
    async with asyncio.timeout(patience), fake_broker() as broker, bench({"a": broker.port}) as it:
        await it.store([1, 2])
        it.policy = policy_for("b")  # a new policy, in which their region permits another endpoint only
        it.start()
        await it.until(lambda: it.counts.pending == 0)
        assert it.counts.refused == 2
        it.policy = policy_for("a")
        await it.store([3])
        await it.until(lambda: it.counts.delivered == 1)
        assert len(broker.published) == 1


class Recorder:
    """A connection that keeps what is published."""

    maximum_packet_size = None

    def __init__(self):
        self.published = []

    def publish(self, outgoing):
        self.published.append(outgoing)


def stored_record(regions, subject="vehicle/data"):
    attributes = Attributes(
        id="1",
        source="urn:car",
        type="t",
        subject=subject,
        time_ns=1,
        datacontenttype="application/json",
        dataregion=regions,
        regionbasis=Basis.GNSS,
        dataclassification="data",
        policyversion="1",
        recordedtime_ns=1,
        sequence=1,
    )
    return msgspec.structs.replace(record(list(regions)), envelope=pack(attributes, b"{}", None))


def outlet(recorder, endpoint="a"):
    options = UplinkOptions(
        name=endpoint,
        vehicle="car",
        session=Session(host="127.0.0.1", port=1, client_id="car"),
        peer=PeerRules(host="127.0.0.1", port=1, tls=False),
        topic="{region}/{topic}",
    )
    return Outlet(recorder, options)


def test_outlet_takes_nothing_but_what_was_cleared_for_its_endpoint():
    policy, recorder = policy_of({"cn": {"data": ["a", "b"]}}), Recorder()
    cleared = policy.clear(record(["cn"]), "b")
    forged = types.SimpleNamespace(record=record(["cn"]), endpoint="a")
    for wrong in (record(["cn"]), cleared, forged, None):
        with pytest.raises(TypeError, match="not cleared for a"):
            outlet(recorder).publish(wrong, NOW)
    assert recorder.published == []


def test_outlet_takes_no_batch_with_a_record_that_was_not_cleared_for_its_endpoint():
    policy, recorder = policy_of({"cn": {"data": ["a", "b"]}}), Recorder()
    good = policy.clear(stored_record(regions=("cn",)), "a")
    forged = types.SimpleNamespace(record=record(["cn"]), endpoint="a")
    for wrong in (record(["cn"]), policy.clear(record(["cn"]), "b"), forged, None):
        with pytest.raises(TypeError, match="not cleared for a"):
            outlet(recorder).publish_batch([good, wrong], NOW)
    assert recorder.published == []


def test_batch_of_several_regions_or_topics_does_not_go_out():
    policy, recorder = policy_of({"cn": {"data": ["a"]}, "hk": {"data": ["a"]}}), Recorder()
    here, both = stored_record(regions=("cn",)), stored_record(regions=("cn", "hk"))
    altered = msgspec.structs.replace(here, regions=("cn", "hk"))
    elsewhere = stored_record(regions=("cn",), subject="vehicle/other")
    for records, reason in (
        ((here, both), "several"),
        ((here, elsewhere), "several"),
        ((here, altered), "other regions"),
    ):
        with pytest.raises(EnvelopeError, match=reason):
            outlet(recorder).publish_batch([policy.clear(one, "a") for one in records], NOW)
    assert recorder.published == []
    outlet(recorder).publish_batch([policy.clear(one, "a") for one in (both, both)], NOW)
    assert [(one.topic, one.properties) for one in recorder.published] == [
        ("cn,hk/vehicle/data", [("dataregion", "cn,hk")])
    ]


def test_record_whose_envelope_names_other_regions_than_the_ledger_does_not_go_out():
    honest = stored_record(regions=("cn",))
    altered = msgspec.structs.replace(honest, regions=("cn", "hk"))
    policy, recorder = policy_of({"cn": {"data": ["a"]}, "hk": {"data": ["a"]}}), Recorder()
    with pytest.raises(EnvelopeError, match="other regions"):
        outlet(recorder).publish(policy.clear(altered, "a"), NOW)
    assert recorder.published == []
    outlet(recorder).publish(policy.clear(honest, "a"), NOW)
    assert [one.topic for one in recorder.published] == ["cn/vehicle/data"]


def test_clearance_cannot_be_carried_over_to_another_record_or_endpoint():
    cleared = policy_of({"cn": {"data": ["a"]}}).clear(record(["cn"]), "a")
    for change in ({"endpoint": "b"}, {"record": record(["hk"])}, {"seal": object()}):
        with pytest.raises((TypeError, ValueError)):
            dataclasses.replace(cleared, **change)
    with pytest.raises(TypeError):
        Cleared(record=record(["hk"]), endpoint="a")
    with pytest.raises(dataclasses.FrozenInstanceError):
        cleared.endpoint = "b"
    assert not hasattr(cleared, "seal")


def test_only_the_outlet_the_intake_marker_the_beacon_and_the_presence_make_a_publish():
    users = {name for name, names in modules() if "Outgoing" in names}
    assert users - TRANSPORT == {"outlet", "intake", "presence", "beacon"}
    assert {name for name, names in modules() if "_SEAL" in names} == {"policy"}
    assert {name for name, names in modules() if "dial" in names} == {"egress", "uplink"}


@functools.cache
def modules():
    folder = Path(agent.__file__).parent
    return [(path.stem, identifiers(ast.parse(path.read_text()))) for path in folder.rglob("*.py")]


def identifiers(tree):
    """Names that a module imports, defines or uses."""
    found = set()
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.ClassDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.alias(name=name):
                found.add(name)
    return found
