"""The real agent's traffic, read by clients that share no code with it, and by the reference consumer."""

from __future__ import annotations

import asyncio
import json
import sys

import nodejs
import pytest
import stream
from consumers import consumer, judged_by_the_official_parser
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from harness import HONG_KONG, SHENZHEN, car

from agent.wire import asyncapi
from tools.brokers import mosquitto_path

pytestmark = pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
PLACES = {"cn": SHENZHEN, "hk": HONG_KONG}
WIRES = {"cn": "msgpack", "hk": "binary"}
NUMBERS = range(5)


@pytest.fixture
async def it(tmp_path):
    """A car with a key; Hong Kong's endpoint speaks CloudEvents binary mode, mainland China's msgpack."""
    key = tmp_path / "car.key.pem"
    key.write_bytes(stream.KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    key.chmod(0o600)
    (tmp_path / "car.pub.pem").write_bytes(stream.PUBLIC_PEM)
    async with car(tmp_path) as made:
        made.configure(agent=f'[signing]\nkey_file = "{key}"\n')
        policy, text = tmp_path / "policy.toml", (tmp_path / "policy.toml").read_text()
        for name, wire in WIRES.items():
            text = text.replace(f"[endpoints.{name}]\n", f'[endpoints.{name}]\nwire = "{wire}"\n')
        policy.write_text(text)
        yield made


async def _drive(it, place):
    await it.start()
    await it.at(place)
    for number in NUMBERS:
        it.telemetry(number)
    await it.until(lambda: len(it.received) == len(NUMBERS))


async def _listened(it, name, *until):
    """What `listen` says of one endpoint; it keeps its session between calls."""
    command = [sys.executable, "-m", "tools", "listen", "--port", it.outer[name].port, "--name", "archive", "--json"]
    trust = ["--keys", it.folder / "car.pub.pem", "--policy", it.folder / "policy.toml", "--endpoint", name]
    async with consumer(*command, *trust, "--out", it.folder / f"got-{name}", *until) as process:
        out, err = await process.communicate()
    return json.loads(out or b"{}"), process.returncode, err.decode()


async def _read_by_node(it, name, ready):
    key = (stream.SIGNER.key_id, it.folder / "car.pub.pem")
    command = nodejs.command("records.mjs", it.outer[name].port, f"{name}/#", len(NUMBERS), *key)
    async with consumer(*command) as process:
        await process.stdout.readline()
        ready.set()
        out, err = await process.communicate()
    assert process.returncode == 0, err.decode()
    return [json.loads(line) for line in out.splitlines()]


async def _judged_by_node(it, name, seen):
    document = it.folder / "asyncapi.json"
    document.write_text(asyncapi.text(), encoding="utf-8")
    assert [line["attributes"]["dataregion"] for line in seen] == [name] * len(NUMBERS)
    assert all(line["good"] for line in seen)
    verdict = await judged_by_the_official_parser(document, seen)
    message = "binary" if WIRES[name] == "binary" else "envelope"
    assert verdict["messages"] == [["records", message, []]] * len(NUMBERS)


@pytest.mark.parametrize("name", PLACES)
async def test_node_and_the_reference_consumer_find_every_record_of_the_agent_good_and_as_documented(
    it, patience, name
):
    if reason := nodejs.missing():
        pytest.skip(reason)
    async with asyncio.timeout(4 * patience), asyncio.TaskGroup() as group:
        ready = asyncio.Event()
        reading = group.create_task(_read_by_node(it, name, ready))
        await ready.wait()
        await _listened(it, name, "--idle", "0")  # from now on the broker keeps the records for it
        await _drive(it, PLACES[name])
        await _judged_by_node(it, name, await reading)
        await _found_good(it, name)


async def _found_good(it, name):
    """The reference consumer finds the same records good and stores each once."""
    figures, status, told = await _listened(it, name, "--count", len(NUMBERS))
    assert status == 0, told
    region = figures["regions"][name]
    assert (region["good"], region["duplicates"], region["missing"]) == (len(NUMBERS), 0, 0)
    files = (it.folder / f"got-{name}" / f"region={name}").rglob("*.jsonl")
    stored = [line for path in files for line in stream.lines(path)]
    # One that was held for a moment comes after those behind it: the guide promises no order of arrival.
    assert sorted(line["data"]["n"] for line in stored) == list(NUMBERS)
    assert {line["subject"] for line in stored} == {"vehicle/telemetry/speed"}
