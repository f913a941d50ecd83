"""What an endpoint hears of the vehicle itself, on its way out."""

import asyncio
import json
import time

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
