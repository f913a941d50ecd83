"""The status message on the in-car broker, read by a client that shares no code with the agent."""

import asyncio
import json
import signal

import pytest
from harness import SHENZHEN, Client, car

from agent import assembly
from agent.beacon import Beacon, BeaconOptions, summary
from agent.errors import EndpointError, InvalidConfigError
from agent.mqtt import backoff
from agent.mqtt.packets import Session

TOPIC = "residency-agent/status"
MOST_BYTES = 1024


@pytest.fixture
async def it(tmp_path):
    async with car(tmp_path) as made:
        made.configure(agent=f'[status]\ntopic = "{TOPIC}"\ninterval_s = 1\n')
        yield made


class Dashboard:
    """A screen in the car: what it saw, and what it finds retained when it comes later."""

    def __init__(self, it, name):
        self.messages = []
        self._client = Client(it.inner.port, name, lambda *arguments: self.messages.append(arguments[-1]))

    async def __aenter__(self):
        await self._client.subscribe("residency-agent/+")
        return self

    async def __aexit__(self, *_):
        self._client.close()

    def states(self):
        return [json.loads(message.payload)["state"] for message in self.messages]

    def counted(self, state):
        return json.loads(self.messages[-1].payload)["counts"][state] if self.messages else None


async def test_status_is_retained_small_and_says_how_the_agent_is(it, patience):
    async with asyncio.timeout(3 * patience):
        await it.start()
        await it.at(SHENZHEN)
        it.telemetry(1)
        await it.until(lambda: it.counts()["delivered"] == 1)
        async with Dashboard(it, "early") as early:
            await it.until(lambda: early.counted("delivered") == 1)
        async with Dashboard(it, "late") as late:
            await it.until(lambda: late.counted("delivered") == 1)
            message, found = late.messages[0], json.loads(late.messages[0].payload)
        assert message.retain
        assert len(message.payload) < MOST_BYTES
        assert (found["state"], found["policy"], found["disk"], found["conserved"]) == ("running", "test", "ok", True)
        assert found["endpoints"] == {"known": 2, "connected": 1, "failing": 0}
        assert found["intake"] == {"telemetry": True, "pictures": True}
        assert found["queue"] == {"bytes": 0, "oldest_s": 0}
        assert it.counts()["received"] == 1, "the agent does not take its own status in"


async def test_last_will_tells_a_killed_agent_from_a_stopped_one(it, patience):
    async with asyncio.timeout(4 * patience), Dashboard(it, "screen") as screen:
        await it.start()
        await it.until(lambda: screen.states()[-1:] == ["running"])
        assert await it.stop() == 0
        await it.until(lambda: screen.states()[-1:] == ["stopped"])
        await it.start()
        await it.until(lambda: screen.states()[-1:] == ["running"])
        await it.stop(signal.SIGKILL)
        await it.until(lambda: screen.states()[-1:] == ["lost"])
        assert screen.states().count("lost") == 1


async def test_status_says_neither_where_the_vehicle_is_nor_who(it, patience):
    async with asyncio.timeout(3 * patience), Dashboard(it, "screen") as screen:
        await it.start()
        await it.at(SHENZHEN)
        it.telemetry(1)
        await it.until(lambda: screen.counted("delivered") == 1)
        for message in screen.messages:
            text = message.payload.decode()
            for secret in ("urn:test", '"car"', "cn", "hk", "vehicle/", "22.6", "114.0"):
                assert secret not in text


async def test_after_a_stable_connection_the_next_is_tried_without_the_delay_of_losses_before(patience, monkeypatch):
    monkeypatch.setattr(backoff, "STABLE_SECONDS", -1.0)
    monkeypatch.setattr(backoff, "delays", lambda *_, **__: iter([0.0, 1e6]))
    served = asyncio.Queue()

    class Losing(Beacon):
        async def _serve(self):
            served.put_nowait(None)
            raise EndpointError("lost")

    session = Session(host="127.0.0.1", port=1, client_id="x")
    losing = Losing(BeaconOptions(session=session, topic=TOPIC, interval_s=1.0))
    losing.update({})
    running = asyncio.create_task(losing.run_loop())
    async with asyncio.timeout(patience):
        for _ in range(4):
            await served.get()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


def test_status_topic_that_the_agent_would_take_in_again_is_a_mistake(tmp_path):
    (tmp_path / "policy.toml").write_text(
        'version = "1"\nrules = []\n[regions]\n[endpoints]\n[classes]\n[permit]\n', encoding="utf-8"
    )
    text = '[vehicle]\nsource = "urn:x"\nname = "x"\n[intake]\ntelemetry = ["car/#"]\n[[position]]\ntopic = "gnss/+"\n'
    for topic in ("car/status", "gnss/status"):
        (tmp_path / "agent.toml").write_text(f'{text}[status]\ntopic = "{topic}"\n', encoding="utf-8")
        with pytest.raises(InvalidConfigError, match=r"status\.topic: found 'c?g?"):
            assembly.load(tmp_path / "agent.toml")
    (tmp_path / "agent.toml").write_text(f'{text}[status]\ntopic = "cars/status"\n', encoding="utf-8")
    assert assembly.load(tmp_path / "agent.toml").config.status.topic == "cars/status"


def test_model_that_is_not_ready_is_named_by_its_constant_reason():
    content = {
        "version": "1",
        "policy": "p",
        "time_ns": 100 * 10**9,
        "counts": dict.fromkeys(("received", "delivered", "pending", "held", "refused", "expired", "evicted"), 0)
        | {"conserved": True, "pending_bytes": 5, "held_bytes": 7, "oldest_ns": {"held": 40 * 10**9}},
        "model": {"ready": False, "unloaded": False, "error": "redaction.model"},
        "reload": {"error": "policy.toml: version: a mistake"},
        "stalled": "/var/lib/somewhere: disk full",
        "sessions": {},
        "endpoints": {"cn": {"connected": False, "error": "mqtt.cn.example.com: refused"}},
    }
    found = json.loads(summary(content, "running"))
    assert (found["model"], found["disk"], found["endpoints"]["failing"]) == ("redaction.model", "stalled", 1)
    assert found["queue"] == {"bytes": 12, "oldest_s": 60}
    assert found["configuration"] == "refused"
    assert "policy.toml" not in json.dumps(found)
