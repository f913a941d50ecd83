import asyncio
import re
import shutil
import socket
import stat
import subprocess
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
        it.configure(agent=f'[metrics]\nport = {port}\nsocket = "metrics.sock"\n')
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
        await served('residency_delivery_seconds_count{endpoint="cn"} 1.0')
        text = await asyncio.to_thread(scrape, port)
        assert "vehicle/" not in text
        assert "residency_conserved 1.0" in text
        assert 'residency_intake_seconds_count{session="telemetry"} 2.0' in text
        assert 'residency_intake_unasked_total{session="telemetry"} 0.0' in text
        assert 'residency_intake_seconds_bucket{le="+Inf",session="telemetry"} 2.0' in text
        assert 'residency_oldest_record_age_seconds{state="pending"} 0.0' in text
        assert "residency_worker_start_seconds_count 1.0" in text
        assert 'policy="test"' in text
        emptied = re.search(r'^residency_intake_emptied_age_seconds{session="telemetry"} (\S+)$', text, re.MULTILINE)
        assert 0 <= float(emptied[1]) < patience
        turned = dict(re.findall(r'^residency_loop_turn_age_seconds{loop="(.+)"} (\S+)$', text, re.MULTILINE))
        assert set(turned) == {"intake-telemetry", "intake-pictures", "uplink-cn", "uplink-hk"}
        assert all(0 <= float(age) < patience for age in turned.values())
        assert "residency_conserved 1.0" in await asyncio.to_thread(ask, tmp_path / "metrics.sock")
        if shutil.which("promtool"):
            judged = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)  # noqa: ASYNC221, PLW1510
            assert (judged.returncode, judged.stdout, judged.stderr) == (0, "", "")


def test_metrics_are_never_served_beyond_the_vehicle():
    with pytest.raises(AgentError, match="loopback"):
        Exporter("0.0.0.0", 0)  # noqa: S104 - must be refused


def test_taken_port_is_a_clear_error():
    with Exporter("127.0.0.1", 0) as first, pytest.raises(AgentError, match=str(first.port)):
        Exporter("127.0.0.1", first.port).__enter__()


def test_nothing_of_the_agent_is_served_before_the_first_status():
    with Exporter("127.0.0.1", 0) as exporter:
        assert "residency_" not in scrape(exporter.port)
        assert "process_resident_memory_bytes" in scrape(exporter.port)


def ask(path):
    """The answer to a scrape over a unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        return b"".join(iter(lambda: client.recv(65_536), b"")).decode()


def test_metrics_are_served_on_a_unix_socket_for_owner_and_group_alone(tmp_path):
    path = tmp_path / "metrics.sock"
    with Exporter("127.0.0.1", 0, socket=str(path)) as exporter:
        assert exporter.port == 0, "no TCP port beside it"
        assert "process_resident_memory_bytes" in ask(path)
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
    assert not path.exists()


def test_socket_that_a_killed_agent_left_behind_is_replaced_and_a_file_is_not(tmp_path):
    path = tmp_path / "metrics.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with Exporter("127.0.0.1", 0, socket=str(path)):
        assert "process_" in ask(path)
    path.write_text("precious")
    with pytest.raises(AgentError, match=r"metrics\.sock"):
        Exporter("127.0.0.1", 0, socket=str(path)).__enter__()
    assert path.read_text() == "precious"


def test_client_that_says_nothing_is_hung_up_on_and_the_next_is_served(monkeypatch):
    monkeypatch.setattr("agent.metrics._Handler.timeout", 0.2)
    with Exporter("127.0.0.1", 0) as exporter, socket.create_connection(("127.0.0.1", exporter.port)):
        assert "process_" in scrape(exporter.port)
