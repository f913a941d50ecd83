"""Batches from the car to a listener's files, over real brokers."""

import asyncio
import json
import os
import signal
import sys
import time

import pytest
import stream
from consumers import consumer, subscribed
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from harness import SHENZHEN, car

from tools.brokers import mosquitto_path

pytestmark = pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
COUNT = 300
BATCHES = 'batch_records = 32\nbatch_compression = "zstd"\nin_flight = 2'


@pytest.fixture
def key(tmp_path):
    """The vehicle's private key; its public half lies beside it."""
    path = tmp_path / "key.pem"
    path.write_bytes(stream.KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    path.with_suffix(".pub").write_bytes(stream.PUBLIC_PEM)
    return path


async def test_signed_records_travel_in_batches_and_are_listened_to_verified_and_stored_one_by_one(
    tmp_path, key, patience
):
    async with asyncio.timeout(3 * patience), car(tmp_path, lines=["log_type subscribe"]) as it:
        it.configure(agent=f'[signing]\nkey_file = "{key}"\n', endpoint=BATCHES)
        await it.start()
        await it.at(SHENZHEN)
        out = tmp_path / "out"
        command = [
            sys.executable,
            "-m",
            "tools",
            "listen",
            "--port",
            it.outer["cn"].port,
            "--keys",
            key.with_suffix(".pub"),
        ]
        command += ["--allow", "cn", "--json", "--name", "a", "--out", out, "--count", COUNT]
        async with consumer(*command) as listener:
            await subscribed(it.outer["cn"], "+/+/#")
            for number in range(COUNT):
                it.telemetry(number)
            figures = json.loads((await listener.communicate())[0])
            assert listener.returncode == 0
        await it.until(lambda: it.counts()["delivered"] == COUNT)
        assert (figures["verdicts"]["good"], figures["refused"]) == (COUNT, 0)
        assert (figures["regions"]["cn"]["good"], figures["regions"]["cn"]["missing"]) == (COUNT, 0)
        stored = [line for path in out.rglob("region=cn/**/*.jsonl") for line in stream.lines(path)]
        assert len({line["id"] for line in stored}) == COUNT
        assert sorted(it.numbers("cn")) == [*range(COUNT)]
        assert max(row.company for row in it.received) > 4, "records came in batches"
        assert it.numbers("hk") == []
        assert "warning" not in it.log.lower()


async def test_batches_that_the_brokers_access_list_denies_stay_and_hold_up_no_other(tmp_path, patience):
    access = tmp_path / "access"
    access.write_text("topic read #\ntopic write cn/car/vehicle/telemetry/#\n")
    rules = '[[rules]]\ntopic = "vehicle/#"\naction = "forward"\nclass = "telemetry"\ncapture_time = "/ts"\n'
    # with max_queued_messages 0 (no limit), mosquitto 2.0.11 hangs up after a PUBLISH that it denies
    lines = [f"acl_file {access}", "max_queued_messages 100000"]
    async with asyncio.timeout(3 * patience), car(tmp_path, lines=lines) as it:
        it.configure(rules=rules, endpoint=BATCHES)
        await it.start()
        await it.at(SHENZHEN)
        for number in range(40):
            it.client.publish("vehicle/other/door", json.dumps({"open": number, "ts": time.time()}))
            it.telemetry(number)
        await it.until(lambda: it.counts()["delivered"] == 40)
        counts = it.counts()
        assert (counts["pending"], counts["refused"], counts["conserved"]) == (40, 0, True)
        access.write_text("topic readwrite #\n")
        os.kill(it.outer["cn"].pid, signal.SIGHUP)
        await it.until(lambda: it.counts()["delivered"] == 80)
        assert sorted(it.numbers("cn")) == [*range(40)]
        assert "uplink.lost" not in it.log
        assert await it.stop(signal.SIGTERM) == 0
