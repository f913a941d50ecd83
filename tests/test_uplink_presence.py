"""What an endpoint hears of the vehicle itself, on its way out."""

import asyncio
import json
import time

import pytest
from endpoints import bench

from agent.uplink import presence
from agent.uplink.presence import PresenceOptions

ASKED = PresenceOptions(source="urn:test:car", vehicle="car")


def reason(publish):
    """Why a death says that the vehicle is gone; None for everything else."""
    return json.loads(publish.payload)["data"].get("reason") if publish.topic.endswith("/presence") else None


async def test_disconnect_follows_only_when_the_endpoint_has_acknowledged_the_death(endpoint, patience):
    deaths = []
    endpoint.on_publish = lambda session, publish: (
        deaths.append(publish) if reason(publish) else session.puback(publish.mid)
    )
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, presence=ASKED) as it:
        await it.store([1])
        it.start()
        await it.until(lambda: it.counts.delivered == 1)
        stopping = asyncio.create_task(it.stop())
        await endpoint.until(lambda: deaths)
        await asyncio.wait([asyncio.create_task(endpoint.session.ended.wait())], timeout=0.2)
        assert not endpoint.session.ended.is_set(), "a broker that cannot write its PUBACK publishes the Last Will too"
        endpoint.session.puback(deaths[0].mid)
        await stopping
        await endpoint.session.ended.wait()
        assert [reason(publish) for publish in deaths] == ["stopped"]
        assert endpoint.session.farewell, "the connection ended without a DISCONNECT"


async def test_endpoint_that_never_acknowledges_the_death_does_not_keep_the_agent(endpoint, patience, monkeypatch):
    monkeypatch.setattr(presence, "GOODBYE_SECONDS", 0.1)
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, presence=ASKED) as it:
        await it.store([1])
        it.start()
        await it.until(lambda: it.counts.delivered == 1)
        endpoint.on_publish = lambda _session, _publish: None
        started = time.monotonic()
        await it.stop()
        assert time.monotonic() - started < patience / 2
        await endpoint.session.ended.wait()
        assert endpoint.session.farewell


@pytest.mark.parametrize("maximum", [1, 3])
async def test_presence_keeps_to_the_receive_maximum_as_well(endpoint, patience, monkeypatch, maximum):
    monkeypatch.setattr(presence, "STATUS_SECONDS", 0.05)
    endpoint.connack_properties = {"receive_maximum": maximum}
    unanswered, most = set(), []

    def on_publish(session, publish):
        unanswered.add(publish.mid)
        most.append(len(unanswered))

        def answer():
            unanswered.discard(publish.mid)
            session.puback(publish.mid)

        asyncio.get_running_loop().call_later(0.02, answer)

    endpoint.on_publish = on_publish
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, presence=ASKED) as it:
        await it.store(range(30))
        it.start()
        await it.until(lambda: it.counts.delivered == 30)
        await it.stop()
        await endpoint.session.ended.wait()
    assert max(most) == maximum
    assert len(endpoint.sessions) == 1
    told = [publish.topic.rpartition("/")[2] for publish in endpoint.published]
    assert told[0] == "presence"
    assert told[told.index("speed") : -told[::-1].index("speed")].count("status"), "records must not hold it back"
    assert reason(endpoint.published[-1]) == "stopped"


async def test_last_will_speaks_where_there_is_no_room_for_the_death(endpoint, patience, monkeypatch):
    monkeypatch.setattr(presence, "GOODBYE_SECONDS", 0.1)
    monkeypatch.setattr(presence, "STATUS_SECONDS", 3600.0)
    endpoint.connack_properties = {"receive_maximum": 1}
    endpoint.on_publish = lambda session, publish: (
        session.puback(publish.mid) if publish.topic.endswith(("/presence", "/status")) else None
    )
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, presence=ASKED) as it:
        await it.store([1])
        it.start()
        await endpoint.until(lambda: any(publish.topic.endswith("speed") for publish in endpoint.published))
        await it.stop()
        await endpoint.session.ended.wait()
    assert not any(reason(publish) for publish in endpoint.published)
    assert not endpoint.session.farewell, "a DISCONNECT takes the Last Will back"


@pytest.mark.usefixtures("quick_uplinks")
async def test_presence_that_is_never_acknowledged_is_noticed(endpoint, patience):
    endpoint.connack_properties = {"receive_maximum": 1}
    endpoint.on_publish = lambda _session, _publish: None
    async with asyncio.timeout(patience), bench({"a": endpoint.port}, presence=ASKED, ack_timeout_s=0.1) as it:
        await it.store([1])
        it.start()
        await it.until(lambda: it.uplinks["a"].last_error)
        endpoint.on_publish = lambda session, publish: session.puback(publish.mid)
        await it.until(lambda: it.counts.delivered == 1)
