"""Birth, death and status: what a backend can rely on, with the broker's Last Will."""

from __future__ import annotations

import asyncio
import json

import paho.mqtt.client as mqtt
import pytest
from paho.mqtt.enums import CallbackAPIVersion

from agent.wire.presence import Session, birth, death, status
from tools.brokers import mosquitto, mosquitto_path

SESSION = Session(id="s-1", source="urn:vehicle:a", vehicle="car-7")
LATER = Session(id="s-2", source="urn:vehicle:a", vehicle="car-7")


def test_birth_and_death_share_a_retained_topic_and_name_their_session():
    born = birth(SESSION, 10**18, version="0.1.0", policy_version="7", keyid="k")
    dead = death(SESSION, 10**18, "lost")
    assert born.topic == dead.topic == "residency-agent/car-7/presence"
    assert born.retain
    assert dead.retain
    assert json.loads(born.payload) == {
        "specversion": "1.0",
        "id": "s-1-birth-0",
        "source": "urn:vehicle:a",
        "type": "org.residencyagent.birth.v1",
        "time": "2001-09-09T01:46:40.000000000Z",
        "datacontenttype": "application/json",
        "data": {"session": "s-1", "state": "online", "agentversion": "0.1.0", "policyversion": "7", "keyid": "k"},
    }
    assert json.loads(dead.payload)["data"] == {"session": "s-1", "state": "offline", "reason": "lost"}


def test_every_message_of_a_session_has_its_own_id():
    made = [
        birth(SESSION, 0, version="0", policy_version="0", keyid=None),
        death(SESSION, 0, "stopped"),
        status(SESSION, 0, 1, {}),
        status(SESSION, 0, 2, {}),
        death(LATER, 0, "stopped"),
    ]
    assert len({json.loads(one.payload)["id"] for one in made}) == len(made)


def test_status_gives_the_counts_in_a_fixed_order():
    counts = json.loads(status(SESSION, 0, 3, {"received": 5, "delivered": 4}).payload)["data"]["counts"]
    assert list(counts.items()) == [("delivered", 4), ("received", 5)]


@pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
async def test_a_broker_announces_the_death_of_a_vehicle_that_vanishes():
    async with mosquitto() as broker:
        loop, seen = asyncio.get_running_loop(), asyncio.Queue[dict[str, object]]()
        watcher = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5)
        watcher.on_message = lambda _c, _u, m: loop.call_soon_threadsafe(seen.put_nowait, json.loads(m.payload))
        watcher.on_connect = lambda client, *_: client.subscribe("residency-agent/+/presence", qos=1)
        watcher.connect(broker.host, broker.port)
        watcher.loop_start()
        car, will = mqtt.Client(CallbackAPIVersion.VERSION2, protocol=mqtt.MQTTv5), death(SESSION, 0, "lost")
        born = birth(SESSION, 0, version="0", policy_version="0", keyid=None)
        car.will_set(will.topic, will.payload, qos=1, retain=will.retain)
        car.on_connect = lambda client, *_: client.publish(born.topic, born.payload, qos=1, retain=born.retain)
        car.connect(broker.host, broker.port)
        car.loop_start()
        async with asyncio.timeout(10):
            assert (await seen.get())["type"] == "org.residencyagent.birth.v1"
            car.loop_stop()
            car.socket().close()  # no DISCONNECT: the car is gone
            gone = await seen.get()
        watcher.disconnect()
        watcher.loop_stop()
    assert gone["type"] == "org.residencyagent.death.v1"
    assert gone["data"]["session"] == SESSION.id
