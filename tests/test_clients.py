"""Clients that nobody here wrote read live traffic: Node, plain paho with msgpack, mosquitto_sub."""

from __future__ import annotations

import asyncio
import hashlib
import re
import shutil
import sys
from pathlib import Path

import msgpack
import msgspec
import nodejs
import pytest
import stream
import zstandard
from consumers import SECONDS, SUBSCRIPTIONS, consumer, read_by_node, subscribed

from agent.wire.attributes import texts
from agent.wire.envelope import CONTENT_TYPE, unpack, verify
from tools.brokers import mosquitto, mosquitto_path

pytestmark = pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
JPEG = b"\xff\xd8\xff\xe0" + bytes(range(256)) * 40 + b"\xff\xd9"
TELEMETRY = (stream.TELEMETRY, stream.data_of(0))
PICTURE = (stream.PICTURE, JPEG)
HERE = Path(__file__).parent
GUIDE = HERE.parent / "README.md"


@pytest.fixture
def node():
    if reason := nodejs.missing():
        pytest.skip(reason)


needs_node = pytest.mark.usefixtures("node")


@pytest.fixture
def public_key(tmp_path):
    path = tmp_path / "car.pub.pem"
    path.write_bytes(stream.PUBLIC_PEM)
    return path


def snippet(name):
    """The code block of the backends' guide that follows this marker."""
    text = GUIDE.read_text(encoding="utf-8")
    return re.search(rf"<!-- snippet: {re.escape(name)} -->\n```\w*\n(.*?)```", text, re.DOTALL)[1]


@needs_node
@pytest.mark.parametrize("wire", ["msgpack", "binary"])
async def test_node_reads_attributes_and_data_and_verifies_the_signature(public_key, wire):
    async with mosquitto() as broker:
        messages = [stream.outgoing(*record, wire=wire) for record in (TELEMETRY, PICTURE)]
        seen = await read_by_node(broker.port, public_key, messages)
    for found, (attributes, data), sent in zip(seen, (TELEMETRY, PICTURE), messages, strict=True):
        assert found["attributes"] == texts(attributes)
        assert found["digest"] == hashlib.sha256(data).hexdigest()
        assert found["topic"] == sent.topic
        assert found["good"] is True
        assert found["userProperties"] == dict(sent.properties)


@needs_node
async def test_the_cloudevents_sdk_reads_binary_mode_as_an_event(public_key):
    async with mosquitto() as broker:
        [found] = await read_by_node(broker.port, public_key, [stream.outgoing(*PICTURE, wire="binary")])
    wanted = texts(stream.PICTURE)
    assert found["sdk"] == {name: wanted[name] for name in ("id", "source", "type", "subject", "dataregion")}


@needs_node
async def test_node_finds_forged_unsigned_and_altered_records(public_key):
    good = stream.outgoing(*PICTURE, wire="binary")
    altered = msgspec.structs.replace(good, payload=good.payload[:-1] + b"\0")
    moved = [(name, "us" if name == "dataregion" else text) for name, text in good.properties]
    messages = [
        stream.outgoing(*TELEMETRY, signer=stream.STRANGER),
        stream.outgoing(*TELEMETRY, signer=None),
        stream.outgoing(*TELEMETRY, wire="binary", signer=stream.STRANGER),
        stream.outgoing(*TELEMETRY, wire="binary", signer=None),
        altered,
        msgspec.structs.replace(good, properties=moved),
    ]
    async with mosquitto() as broker:
        seen = await read_by_node(broker.port, public_key, messages)
    assert [found["good"] for found in seen] == [False] * len(messages)


async def _run_snippet(command, public_key):
    """Whether a snippet prints two good records, and that it ends at a forged third."""
    records = [stream.record(number) for number in range(2)]
    forged = stream.outgoing(*TELEMETRY, signer=stream.STRANGER)
    async with mosquitto(config_lines=SUBSCRIPTIONS) as broker, asyncio.timeout(SECONDS):
        arguments = (broker.host, broker.port, stream.SIGNER.key_id, public_key)
        async with consumer(*command, *arguments) as process:
            await subscribed(broker, "$share/archive/cn/#")
            for one in records:
                await asyncio.to_thread(stream.publish, broker.port, [stream.outgoing(one, b"{}")])
                assert one.id.encode() in await process.stdout.readuntil(one.id.encode())
            await asyncio.to_thread(stream.publish, broker.port, [forged])
            assert await process.wait() != 0
            assert stream.TELEMETRY.id.encode() not in await process.stdout.read()


async def test_the_readmes_python_consumer_prints_good_records_and_stops_at_a_forged_one(public_key, tmp_path):
    script = tmp_path / "consumer.py"
    script.write_text(snippet("consumer.py"), encoding="utf-8")
    await _run_snippet([sys.executable, "-I", script], public_key)


@needs_node
async def test_the_readmes_node_consumer_prints_good_records_and_stops_at_a_forged_one(public_key):
    script = nodejs.folder() / "consumer.mjs"  # beside its node_modules
    script.write_text(snippet("consumer.mjs"), encoding="utf-8")
    await _run_snippet(["node", script], public_key)


@pytest.mark.parametrize("compress", [False, True])
def test_printed_function_takes_a_batch_apart_and_leaves_a_lone_record_as_it_is(compress):
    found = {}
    exec(compile(snippet("members.py"), "members.py", "exec"), found)  # noqa: S102 - it is the guide's own
    alone = [stream.outgoing(stream.record(number), stream.data_of(number)) for number in range(5)]
    sent = stream.batched(alone, compress=compress)
    assert found["members"](sent.content_type, sent.payload) == [one.payload for one in alone]
    assert found["members"](alone[0].content_type, alone[0].payload) == [alone[0].payload]
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 21))
    with pytest.raises(ValueError, match="larger"):
        found["members"](f"{sent.content_type.removesuffix('+zstd')}+zstd", bomb)


@pytest.mark.parametrize("name", ["consumer.py", "consumer.mjs"])
def test_a_consumer_takes_no_more_than_fifteen_lines(name):
    assert len([line for line in snippet(name).splitlines() if line.strip()]) <= 15


@pytest.mark.skipif(shutil.which("mosquitto_sub") is None, reason="mosquitto_sub is not installed")
async def test_mosquitto_sub_shows_the_attributes_and_the_whole_envelope():
    sent = stream.outgoing(*PICTURE)
    async with mosquitto(config_lines=SUBSCRIPTIONS) as broker, asyncio.timeout(SECONDS):
        command = "mosquitto_sub", "-V", "5", "-p", broker.port, "-q", "1", "-C", "1", "-t", "+/+/#"
        async with consumer(*command, "-F", "%t\n%C\n%P\n%x") as process:
            await subscribed(broker, "+/+/#")
            await asyncio.to_thread(stream.publish, broker.port, [sent])
            out, _ = await process.communicate()
    topic, content_type, pairs, payload = out.decode().splitlines()
    assert topic == "cn,hk/car-7/vehicle/camera/front"
    assert content_type == CONTENT_TYPE
    assert "dataregion:cn,hk" in pairs
    assert "redaction:person=3,plate=1" in pairs
    verify(unpack(bytes.fromhex(payload)), {stream.SIGNER.key_id: stream.KEY.public_key()})


async def test_a_3_1_1_subscriber_reads_the_same_envelope():
    sent = stream.outgoing(*TELEMETRY)
    async with mosquitto(config_lines=SUBSCRIPTIONS) as broker, asyncio.timeout(SECONDS):
        command = "mosquitto_sub", "-V", "311", "-p", broker.port, "-q", "1", "-C", "1", "-t", "cn/#", "-F", "%x"
        async with consumer(*command) as process:
            await subscribed(broker, "cn/#")
            await asyncio.to_thread(stream.publish, broker.port, [sent])
            out, _ = await process.communicate()
    assert msgpack.unpackb(msgpack.unpackb(bytes.fromhex(out.decode().strip()))["payload"])["sequence"] == "0" * 19


@pytest.mark.skipif(shutil.which("mosquitto_sub") is None, reason="mosquitto_sub is not installed")
async def test_the_readmes_acl_keeps_regions_and_vehicles_apart(tmp_path):
    acl = tmp_path / "acl"
    acl.write_text(snippet("acl"), encoding="utf-8")
    both, own = stream.outgoing(*PICTURE), stream.outgoing(stream.record(1), b"{}")
    away = stream.outgoing(stream.record(2, regions=("hk",)), b"{}")
    strange = msgspec.structs.replace(own, topic="cn/car-8/vehicle/telemetry/speed")
    async with mosquitto(config_lines=(*SUBSCRIPTIONS, f"acl_file {acl}")) as broker, asyncio.timeout(SECONDS):
        command = "mosquitto_sub", "-V", "5", "-p", broker.port, "-q", "1", "-t", "#", "-F", "%t", "-C", "2"
        async with consumer(*command, "-u", "archive-cn") as mainland, consumer(*command, "-u", "archive-hk") as island:
            await subscribed(broker, "#", times=2)
            # alone: mosquitto 2.0.11 ends the connection of a denied PUBLISH, and a reset may swallow the PUBACK
            await asyncio.to_thread(stream.publish, broker.port, [strange], username="car-7")
            await asyncio.to_thread(stream.publish, broker.port, [both, own, away], username="car-7")
            seen = [(await process.communicate())[0].decode().split() for process in (mainland, island)]
    assert seen == [[both.topic, own.topic], [both.topic, away.topic]]
