import asyncio
import urllib.request

import pytest
from harness import SHENZHEN, car

from agent.errors import AgentError
from agent.metrics import Exporter
from tools.brokers import free_port


def scrape(port):
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return answer.read().decode()


async def test_running_agent_serves_its_counters(tmp_path, patience):
    port = free_port()
    async with asyncio.timeout(3 * patience), car(tmp_path) as it:
        it.configure(agent=f"[metrics]\nport = {port}\n")
        await it.start()
        await it.at(SHENZHEN)
        it.telemetry(1)
        it.client.publish("vehicle/other/thing", b"{}")
        await it.until(lambda: it.counts()["delivered"] == 1 and it.counts()["refused"] == 1)

        async def served(line):
            while line not in await asyncio.to_thread(scrape, port):  # noqa: ASYNC110 - another process decides
                await asyncio.sleep(0.1)

        await served("residency_messages_delivered_total 1.0")
        await served('residency_refusals_total{reason="policy.no-rule"} 1.0')
        await served('residency_endpoint_up{endpoint="cn"} 1.0')
        await served('residency_records{state="pending"} 0.0')
        text = await asyncio.to_thread(scrape, port)
        assert "vehicle/" not in text
        assert "residency_conserved 1.0" in text


def test_metrics_are_never_served_beyond_the_vehicle():
    with pytest.raises(AgentError, match="loopback"):
        Exporter("0.0.0.0", 0)  # noqa: S104 - must be refused


def test_taken_port_is_a_clear_error():
    with Exporter("127.0.0.1", 0) as first, pytest.raises(AgentError, match=str(first.port)):
        Exporter("127.0.0.1", first.port).__enter__()


def test_nothing_is_served_before_the_first_status():
    with Exporter("127.0.0.1", 0) as exporter:
        assert scrape(exporter.port) == ""
