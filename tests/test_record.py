from __future__ import annotations

import asyncio
import json
import resource
import signal
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_broker import fake_broker

from tools.brokers import mosquitto, mosquitto_path
from tools.client import Address, connected, new_client, to_paho
from tools.recording import Properties, Recorded, contents, messages
from tools.stamps import rfc3339, stated_ns

pytestmark = pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
ROOT = Path(__file__).parents[1]
START = 1_700_000_000_000_000_000
WAIT_SECONDS = 20


def at(number, topic="vehicle/telemetry/speed", **changes):
    moment = START + number * 10_000_000
    payload = b'{"ts":%d,"n":%d}' % (moment, number)
    values = {"topic": topic, "payload": payload, "capture_ns": moment, "receipt_ns": moment, "qos": 1}
    return Recorded(**{**values, **changes})


DRIVE = [
    at(0, properties=Properties(content_type="application/json", payload_format=1, expiry_s=3600)),
    at(1, topic="vehicle/camera/front", payload=b"\xff\xd8\xff\x00\x01", properties=Properties(user=(("time", "1"),))),
    at(2, topic="vehicle/raw", payload=bytes(range(256)), properties=Properties(correlation=b"\x00\xff", user=())),
    at(3, topic="vehicle/retained", retain=True, qos=2, properties=Properties(response_topic="answer/here")),
    at(4, topic="vehicle/empty", payload=b"", qos=0),
    at(5, topic="vehicle/ünïcode", payload="größer".encode(), properties=Properties(user=(("b", "2"), ("a", "1")))),
]


@contextmanager
def tool(*arguments, **options):
    command = [sys.executable, "-m", "tools", *(str(argument) for argument in arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=ROOT, **pipes, **options) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def publish(port, recorded):
    """Publish until the first message was seen to reach a subscriber that asks for everything, then the rest."""
    address = Address(port=port)
    client = new_client(address, "publisher")
    with connected(client, address):
        sent = [
            client.publish(one.topic, one.payload, one.qos, one.retain, to_paho(one.properties)) for one in recorded
        ]
        for one in sent:
            one.wait_for_publish(WAIT_SECONDS)


def subscribed(broker, client_prefix="residency-record-", *, times=1):
    """Wait until mosquitto has logged the recorder's subscription so many times."""
    done = threading.Event()

    def look():
        while not done.wait(0.02):
            if broker.log_path.read_text().count(f"Sending SUBACK to {client_prefix}") >= times:
                return

    thread = threading.Thread(target=look)
    thread.start()
    thread.join(WAIT_SECONDS)
    done.set()


LOGGING = ["log_type all"]


def recorded_by_tool(broker, path, drive, *options, end=None):
    """Record what the callable `drive` publishes; ends by the options' limits, or by the signal."""
    with tool("record", path, "--port", broker.port, "--quiet", "--json", *options) as process:
        subscribed(broker)
        drive()
        if end is not None:
            process.send_signal(end)
        output, errors = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 0, errors
    return json.loads(output)


def essence(recorded):
    """What must survive, by topic: QoS 0, 1 and 2 overtake each other on the way."""
    return sorted(((one.topic, one.payload, one.qos, one.retain, one.properties) for one in recorded), key=str)


async def test_recorded_replayed_and_recorded_again_is_the_same_to_the_byte(tmp_path):
    first, second = tmp_path / "first.mcap", tmp_path / "second.mcap"
    limit = ("--max-messages", len(DRIVE))
    async with mosquitto(config_lines=LOGGING) as broker:
        recorded_by_tool(broker, first, lambda: publish(broker.port, DRIVE), *limit)
    async with mosquitto(config_lines=LOGGING) as broker:

        def replay():
            with tool("replay", first, "--port", broker.port, "--quiet") as process:
                assert process.wait(60) == 0

        recorded_by_tool(broker, second, replay, *limit)
    assert essence(messages(first)) == essence(DRIVE)
    assert essence(messages(second)) == essence(DRIVE)


async def test_capture_time_is_the_stated_one_and_else_that_of_receipt(tmp_path):
    path = tmp_path / "r.mcap"
    stated = [DRIVE[0], at(1, payload=b"\xff\xd8\xff", properties=Properties(user=(("time", rfc3339(START + 7000)),)))]
    async with mosquitto(config_lines=LOGGING) as broker:
        silent = at(2, payload=b"no time")
        summary = recorded_by_tool(broker, path, lambda: publish(broker.port, [*stated, silent]), "--max-messages", 3)
    found = list(messages(path))
    assert [one.capture_ns for one in found[:2]] == [START, START + 7000]
    assert found[2].capture_ns == found[2].receipt_ns
    assert summary["ended"] == "message limit"
    assert contents(path).complete
    assert not path.with_name("r.mcap.part").exists()


async def test_recording_ends_before_it_would_exceed_its_size_and_at_its_duration(tmp_path):
    drive = [at(number, payload=bytes(1000)) for number in range(10)]
    async with mosquitto(config_lines=LOGGING) as broker:
        summary = recorded_by_tool(broker, tmp_path / "r.mcap", lambda: publish(broker.port, drive), "--max-mb", 0.0045)
    assert (summary["count"], summary["ended"]) == (4, "size limit")
    async with mosquitto(config_lines=LOGGING) as broker:
        summary = recorded_by_tool(broker, tmp_path / "s.mcap", lambda: None, "--duration", 0.1)
    assert (summary["count"], summary["ended"]) == (0, "duration limit")


async def test_interrupted_recording_is_complete_and_killed_one_still_reads(tmp_path):
    path = tmp_path / "r.mcap"
    async with mosquitto(config_lines=LOGGING) as broker:
        summary = recorded_by_tool(broker, path, lambda: publish(broker.port, DRIVE), end=signal.SIGINT)
        assert summary["ended"] == "interrupted"
        assert contents(path).complete
    async with mosquitto(config_lines=LOGGING) as broker:
        with tool("record", path, "--port", broker.port, "--quiet") as process:
            subscribed(broker)
            publish(broker.port, DRIVE)
            part = path.with_name("r.mcap.part")
            wait_for_messages(part, len(DRIVE))
            process.kill()
            process.wait(WAIT_SECONDS)
        assert essence(messages(part)) == essence(DRIVE)


@pytest.mark.parametrize(
    "payload",
    [
        b'{"ts":"0001-01-01T00:00:00Z"}',
        b'{"ts":"9999-12-31T23:59:59Z","lat":1,"lon":2}',
        b'{"ts":50000000000}',
        b'{"lat":1,"lon":2,"acc":1e200}',
        b'{"lat":%s,"lon":2}' % (b"1" * 400),
        b'{"a":%s1%s}' % (b"[" * 100_000, b"]" * 100_000),
    ],
    ids=lambda payload: payload[:30].decode(),
)
async def test_message_that_states_nonsense_is_recorded_as_any_other(tmp_path, payload):
    path = tmp_path / "r.mcap"
    drive = [at(0, payload=payload), at(1)]
    async with mosquitto(config_lines=LOGGING) as broker:
        recorded_by_tool(broker, path, lambda: publish(broker.port, drive), "--max-messages", 2)
    found = list(messages(path))
    assert [one.payload for one in found] == [one.payload for one in drive]
    assert found[0].capture_ns == found[0].receipt_ns


def test_property_that_is_no_time_is_none():
    for text in ("1" * 5000, "0001-01-01T00:00:00Z", "9" * 19):
        assert stated_ns(b"", Properties(user=(("time", text),))) is None


async def test_connection_that_was_lost_meanwhile_is_told(tmp_path):
    path = tmp_path / "r.mcap"
    async with mosquitto(config_lines=LOGGING) as broker:
        with tool("record", path, "--port", broker.port, "--quiet", "--json") as process:
            subscribed(broker)
            publish(broker.port, DRIVE[:1])
            wait_for_messages(path.with_name("r.mcap.part"), 1)
            await broker.restart()
            subscribed(broker, times=2)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 3
    assert (json.loads(output)["lost"], json.loads(output)["count"]) == (1, 1)
    assert "messages may be missing" in errors
    assert contents(path).complete


async def test_subscription_that_is_refused_ends_the_recording(tmp_path):
    path = tmp_path / "r.mcap"
    async with fake_broker() as broker:
        broker.suback = 0x87
        with tool("record", path, "--port", broker.port, "--quiet") as process:
            _, errors = await asyncio.to_thread(process.communicate, timeout=WAIT_SECONDS)
    assert process.returncode == 3
    assert "Not authorized" in errors
    assert list(tmp_path.iterdir()) == []


async def test_full_disk_ends_the_recording_with_a_word_and_what_came_before_reads(tmp_path):
    path = tmp_path / "r.mcap"

    def small():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    async with mosquitto(config_lines=LOGGING) as broker:
        with tool("record", path, "--port", broker.port, "--quiet", preexec_fn=small) as process:
            subscribed(broker)
            publish(broker.port, [at(number, payload=bytes(30_000)) for number in range(8)])
            _, errors = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 3
    assert errors == "record: [Errno 27] File too large\n"
    assert len(list(messages(path.with_name("r.mcap.part")))) == 3


async def test_recording_that_was_cut_off_is_not_written_over(tmp_path):
    path = tmp_path / "r.mcap"
    part = path.with_name("r.mcap.part")
    part.write_bytes(b"what a power cut left")
    async with mosquitto() as broker:
        with tool("record", path, "--port", broker.port, "--quiet") as process:
            _, errors = process.communicate(timeout=WAIT_SECONDS)
    assert process.returncode == 3
    assert "r.mcap.part" in errors
    assert part.read_bytes() == b"what a power cut left"


def wait_for_messages(path, count):
    tick = threading.Event()
    for _ in range(WAIT_SECONDS * 20):
        if path.stat().st_size and sum(1 for _ in messages(path)) >= count:
            return
        tick.wait(0.05)
    pytest.fail("the messages did not reach the disk")


@pytest.mark.parametrize(
    ("payload", "stated"),
    [
        (b'{"ts":1700000000.5}', 1_700_000_000_500_000_000),
        (b'{"ts":1700000000500}', 1_700_000_000_500_000_000),
        (b'{"ts":"2023-11-14T22:13:20.5Z"}', 1_700_000_000_500_000_000),
        (b'{"ts":"yesterday"}', None),
        (b'{"ts":true}', None),
        (b'{"ts":-1}', None),
        (b'{"ts":1e40}', None),
        (b'{"other":1}', None),
        (b"\x00", None),
    ],
)
def test_stated_time_is_read_in_its_unit_and_nonsense_is_none(payload, stated):
    assert stated_ns(payload, Properties()) == stated
