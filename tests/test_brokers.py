from __future__ import annotations

import asyncio
import os
import queue
import select
import signal
import subprocess
import sys
from pathlib import Path

import paho.mqtt.client as paho
import pytest

from tools import brokers
from tools.brokers import BrokerError, amqtt, free_port, give_back, installed, mosquitto, mosquitto_path

needs_mosquitto = pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
KINDS = [pytest.param(mosquitto, marks=needs_mosquitto), amqtt]
WAIT_SECONDS = 10


def round_trip(port, protocol=paho.MQTTv311):
    """Publish one message at QoS 1 and return what a subscriber of the same broker receives."""
    received = queue.Queue()
    subscribed = queue.Queue()
    client = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=protocol)
    client.on_message = lambda _client, _data, message: received.put(message.payload)
    client.on_subscribe = lambda *_: subscribed.put(None)
    client.on_connect = lambda *_: client.subscribe("vehicle/#", qos=1)
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        subscribed.get(timeout=WAIT_SECONDS)
        client.publish("vehicle/speed", b"50", qos=1)
        return received.get(timeout=WAIT_SECONDS)
    finally:
        client.disconnect()
        client.loop_stop()


def exists(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("start", KINDS)
async def test_broker_delivers_as_soon_as_it_is_entered_and_is_gone_afterwards(start, tmp_path):
    async with start(folder=tmp_path) as broker:
        pid = broker.pid
        assert await asyncio.to_thread(round_trip, broker.port) == b"50"
    assert broker.pid is None
    assert not exists(pid)


@pytest.mark.parametrize("start", KINDS)
async def test_killed_broker_restarts_on_the_same_port(start, tmp_path):
    async with start(folder=tmp_path) as broker:
        port, pid = broker.port, broker.pid
        await broker.kill()
        assert not exists(pid)
        await broker.restart()
        assert broker.port == port
        assert broker.pid != pid
        assert await asyncio.to_thread(round_trip, port) == b"50"


@needs_mosquitto
async def test_mosquitto_speaks_mqtt_5_and_is_the_installed_broker():
    async with installed() as broker:
        assert broker.kind == "mosquitto"
        assert await asyncio.to_thread(round_trip, broker.port, paho.MQTTv5) == b"50"
    assert not broker.folder.exists()


async def test_amqtt_is_the_installed_broker_where_mosquitto_is_missing(monkeypatch):
    monkeypatch.setattr(brokers, "mosquitto_path", lambda: None)
    async with installed() as broker:
        assert broker.kind == "amqtt"


@needs_mosquitto
async def test_configuration_line_replaces_the_default_with_its_key(tmp_path):
    async with mosquitto(folder=tmp_path, config_lines=["allow_anonymous false"]) as broker:
        assert "allow_anonymous true" not in (tmp_path / "mosquitto.conf").read_text()
        with pytest.raises(queue.Empty):
            await asyncio.to_thread(round_trip_quickly, broker.port)


def round_trip_quickly(port):
    refused = queue.Queue()
    client = paho.Client(paho.CallbackAPIVersion.VERSION2)
    client.on_connect = lambda _client, _data, _flags, reason, _properties: refused.put(reason)
    client.connect("127.0.0.1", port)
    client.loop_start()
    try:
        if refused.get(timeout=WAIT_SECONDS).is_failure:
            raise queue.Empty
    finally:
        client.disconnect()
        client.loop_stop()


def test_port_that_was_picked_is_no_other_process_s_until_it_is_given_back():
    port = free_port()
    again = f"from tools import brokers; brokers.FIRST_PORT = brokers.LAST_PORT = {port}; print(brokers.free_port())"

    def picked():
        root = Path(__file__).parents[1]
        return subprocess.run([sys.executable, "-c", again], cwd=root, capture_output=True, text=True, check=False)

    assert picked().stderr.strip().endswith(f"no free port in {port}-{port}")
    give_back(port)
    assert picked().stdout == f"{port}\n"


@needs_mosquitto
async def test_broker_that_cannot_start_is_an_error_with_the_end_of_its_log(tmp_path):
    with pytest.raises(BrokerError, match="no_such_option"):
        async with mosquitto(folder=tmp_path, config_lines=["no_such_option 1"], port=free_port()):
            pass


async def test_missing_mosquitto_is_an_error_that_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(brokers, "mosquitto_path", lambda: None)
    with pytest.raises(BrokerError, match="apt-get install mosquitto"):
        async with mosquitto():
            pass


@pytest.mark.parametrize("name", [pytest.param("mosquitto", marks=needs_mosquitto), "amqtt"])
def test_broker_ends_when_the_process_that_started_it_is_killed(name, tmp_path):
    program = f"""
import asyncio, pathlib
from tools.brokers import {name}
async def main():
    async with {name}(folder=pathlib.Path({str(tmp_path)!r})) as broker:
        print(broker.pid, flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""
    root = Path(__file__).parents[1]
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, cwd=root) as parent:
        pid = int(parent.stdout.readline())
        watched = os.pidfd_open(pid)
        parent.send_signal(signal.SIGKILL)
    try:
        assert wait_readable(watched, WAIT_SECONDS)
    finally:
        os.close(watched)


def wait_readable(descriptor, seconds):
    """A pidfd becomes readable when its process has ended."""
    return bool(select.select([descriptor], [], [], seconds)[0])
