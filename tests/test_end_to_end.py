import asyncio
import io
import json
import signal
import time

import numpy as np
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from harness import HONG_KONG, LOK_MA_CHAU, RULES, SHENZHEN, car
from PIL import Image

from agent.errors import EnvelopeError
from agent.wire.envelope import verify


def jpeg(seed=0, size=(320, 240), comment=b""):
    noise = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).resize(size).save(buffer, "JPEG", quality=90, comment=comment)
    return buffer.getvalue()


async def test_records_reach_only_the_region_in_which_they_were_captured(tmp_path, patience):
    async with asyncio.timeout(3 * patience), car(tmp_path) as it:
        await it.start()
        await it.at(SHENZHEN)
        for number in range(20):
            it.telemetry(number)
        it.client.publish("vehicle/camera/front", jpeg(), [("time", str(time.time_ns()))])
        await it.until(lambda: len(it.received) == 21)
        assert {row.region for row in it.received} == {"cn"}
        assert sorted(it.numbers("cn")) == list(range(20))
        attributes = it.received[0].attributes
        assert attributes.dataregion == ("cn",)
        assert attributes.policyversion == "test"
        assert await it.stop() == 0
        counts = it.counts()
        assert counts["conserved"]
        assert (counts["received"], counts["delivered"]) == (21, 21)
        assert "<4>" not in it.log, "a healthy run logs no warning"


async def test_each_region_numbers_its_stream_without_gaps(tmp_path, patience):
    async with asyncio.timeout(3 * patience), car(tmp_path) as it:
        await it.start()
        await it.at(SHENZHEN)
        for number in range(5):
            it.telemetry(number)
        await it.until(lambda: len(it.received) == 5)
        await it.stop()
        await it.start()
        await it.at(SHENZHEN)
        for number in range(5, 10):
            it.telemetry(number)
        await it.until(lambda: len(it.received) == 10)
        assert sorted(row.attributes.sequence for row in it.received) == list(range(1, 11))


async def test_record_captured_near_the_border_is_held_and_never_sent(tmp_path, patience):
    async with asyncio.timeout(3 * patience), car(tmp_path) as it:
        await it.start()
        await it.at(LOK_MA_CHAU)
        it.telemetry(1)
        await it.until(lambda: it.counts()["held"] == 1)
        assert it.received == []
        assert await it.stop() == 0
        assert it.counts()["conserved"]


async def test_held_record_is_delivered_when_a_later_fix_settles_the_region(tmp_path, patience):
    agent = "[motion]\nmax_speed_mps = 100.0\n"
    async with asyncio.timeout(3 * patience), car(tmp_path) as it:
        it.configure(agent=agent)
        await it.start()
        # No fix yet, so every region is a candidate; the fixes that follow say where the car must have been.
        it.telemetry(7)
        await it.until(lambda: it.counts()["held"] == 1)
        await it.at(HONG_KONG)
        await it.until(lambda: it.numbers("hk") == [7])
        assert it.numbers("cn") == []
        attributes = it.received[0].attributes
        assert (attributes.dataregion, attributes.sequence) == (("hk",), 1)
        counts = it.counts()
        assert (counts["held"], counts["conserved"]) == (0, True)


async def test_bad_input_is_refused_with_a_counted_reason_and_acknowledged(tmp_path, patience):
    async with asyncio.timeout(3 * patience), car(tmp_path) as it:
        await it.start()
        await it.at(SHENZHEN)
        now = [("time", str(time.time_ns()))]
        sent = [
            it.client.publish("vehicle/other/thing", b"{}"),
            it.client.publish("vehicle/camera/cabin", jpeg(), now),
            it.client.publish("vehicle/camera/front", b"\xff\xd8\xff\xe0 cut off", now),
            it.client.publish("vehicle/camera/front", jpeg(size=(2400, 2000)), now),
            it.client.publish("vehicle/camera/front", jpeg()),
            it.client.publish("vehicle/camera/front", b"plain text", now),
            it.client.publish("vehicle/telemetry/big", b"1" * 2_000_001),
            it.client.publish("vehicle/telemetry/speed", b"{not json"),
            it.client.publish("vehicle/telemetry/speed", b'{"ts": "yesterday"}'),
            it.client.publish("vehicle/telemetry/blob", bytes(range(256)) * 20),
        ]
        it.client.publish("vehicle/gnss", b"nonsense")
        it.client.publish("vehicle/gnss", b'{"lat": 0, "lon": 0, "acc": 1, "ts": 1}')
        await it.until(lambda: it.counts()["refused"] == len(sent))
        it.telemetry(1)
        await it.until(lambda: it.numbers("cn") == [1])
        await it.until(lambda: it.status()["fixes"]["malformed"] == 2)
        await it.until(lambda: it.counts()["delivered"])
        counts = it.counts()
        assert counts["conserved"]
        assert counts["pending"] == counts["held"] == 0
        reasons = counts["breakdown"]["refused"]["reason"]
        assert reasons["policy.no-rule"] == 1
        assert reasons["policy.refused"] == 1
        assert reasons["payload.limit.bytes"] == 1
        assert sum(reasons.values()) == len(sent)
        assert not any(name.startswith("internal") for name in reasons), reasons
        await it.stop()
        await it.start()  # nothing comes again: everything had been acknowledged
        await it.at(SHENZHEN)
        it.telemetry(2)
        await it.until(lambda: it.numbers("cn") == [1, 2])
        assert it.counts()["refused"] == len(sent)


async def test_killed_agent_loses_and_misroutes_nothing(tmp_path, patience):
    async with asyncio.timeout(4 * patience), car(tmp_path) as it:
        await it.start()
        await it.at(SHENZHEN)
        for kill in range(3):
            for number in range(100):
                it.telemetry(100 * kill + number)
                if number == 60:
                    await asyncio.sleep(0.05)
                    await it.stop(signal.SIGKILL)
            await it.start()
            await it.at(SHENZHEN)
        await it.until(lambda: set(it.numbers("cn")) == set(range(300)))
        assert it.numbers("hk") == []
        await it.until(lambda: it.counts()["pending"] == 0)
        counts = it.counts()
        assert counts["conserved"]
        assert counts["received"] == 300, "a redelivery after the kill was taken twice"


async def test_regional_broker_away_keeps_records_until_it_is_back(tmp_path, patience):
    async with asyncio.timeout(4 * patience), car(tmp_path) as it:
        await it.start()
        await it.at(SHENZHEN)
        await it.outer["cn"].kill()
        for number in range(50):
            it.telemetry(number)
        await it.until(lambda: it.counts()["pending"] == 50)
        await it.outer["cn"].start()
        await it.until(lambda: set(it.numbers("cn")) == set(range(50)))
        await it.until(lambda: it.counts()["pending"] == 0)
        assert it.counts()["delivered"] == 50


async def test_unredacted_picture_is_found_nowhere(tmp_path, patience):
    """A secret in the metadata of every picture; the coded pixels of those that must not leave at all."""
    secret = b"UNREDACTED-CANARY-" + bytes(range(48, 90))
    pictures = [jpeg(seed=seed, comment=secret) for seed in range(3)]
    cabin, broken = jpeg(seed=98, comment=secret), jpeg(seed=99, comment=secret)
    now = [("time", str(time.time_ns()))]
    async with asyncio.timeout(4 * patience), car(tmp_path) as it:
        await it.start()
        await it.at(SHENZHEN)
        for picture in pictures:
            it.client.publish("vehicle/camera/front", picture, now)
        it.client.publish("vehicle/camera/cabin", cabin, now)
        it.client.publish("vehicle/camera/front", broken[:-200] + secret, now)
        await it.until(lambda: it.counts()["received"] == 5 and it.counts()["pending"] == 0)
        await it.until(lambda: len(it.received) == it.counts()["delivered"])
        await it.stop(signal.SIGKILL)
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        places = {str(path): path.read_bytes() for path in files} | {
            f"received {index}": row.payload for index, row in enumerate(it.received)
        }
        assert len(it.received) == len(pictures)
        assert any("ledger" in name for name in places)
        assert any("broker-cn" in name for name in places)
        for name, content in places.items():
            assert secret not in content, name
            for picture in (cabin, broken):
                middle = len(picture) // 2
                assert picture[middle : middle + 64] not in content, name
        for row in it.received:
            assert row.attributes.redaction is not None
            assert row.attributes.modeldigest is not None
            assert row.attributes.datacontenttype == "image/jpeg"


async def test_fields_leave_only_as_the_rule_lets_them_and_the_signature_holds(tmp_path, patience):
    key = Ed25519PrivateKey.generate()
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "signing.pem").write_bytes(pem)
    (tmp_path / "pseudonym.key").write_bytes(bytes(range(32)))
    async with asyncio.timeout(3 * patience), car(tmp_path) as it:
        it.configure(
            agent='[signing]\nkey_file = "signing.pem"\nkey_id = "car-1"\npseudonym_key_file = "pseudonym.key"\n',
            rules=RULES
            + """[rules.fields]
drop = ["/driver"]
pseudonymise = ["/seat"]
positions = [{ latitude = "/lat", longitude = "/lon", metres = 5000.0 }]
times = [{ place = "/ts", seconds = 60 }]
""",
        )
        await it.start()
        await it.at(SHENZHEN)
        it.telemetry(1, driver="Li", seat="S-17", lat=SHENZHEN[0], lon=SHENZHEN[1])
        await it.until(lambda: len(it.received) == 1)
        data = json.loads(it.received[0].data)
        assert set(data) == {"n", "ts", "seat", "lat", "lon"}
        assert data["ts"] % 60 == 0
        assert data["seat"] != "S-17"
        assert data["lat"] != SHENZHEN[0]
        assert it.received[0].attributes.time_ns % (60 * 10**9) == 0
        verify(it.received[0].envelope, {"car-1": key.public_key()})
        with pytest.raises(EnvelopeError):
            verify(it.received[0].envelope, {"car-1": Ed25519PrivateKey.generate().public_key()})
        it.client.publish("vehicle/telemetry/speed", b"1.5")  # rules for fields that it does not have: refused
        await it.until(lambda: it.counts()["refused"] == 1)


async def test_endpoint_is_not_connected_to_without_need_nor_from_where_the_policy_forbids_it(tmp_path, patience):
    async with asyncio.timeout(3 * patience), car(tmp_path) as it:
        policy = (tmp_path / "policy.toml").read_text()
        (tmp_path / "policy.toml").write_text(
            policy.replace('countries = ["CN"]', 'countries = ["CN"]\nreach = ["cn"]').replace(
                '[permit.cn]\npicture = ["cn"]\ntelemetry = ["cn"]', '[permit.cn]\npicture = ["cn"]\ntelemetry = ["hk"]'
            )
        )
        await it.start()
        await it.at(SHENZHEN)
        it.telemetry(1)  # permitted for hk, but not from here
        it.client.publish("vehicle/camera/front", jpeg(), [("time", str(time.time_ns()))])
        await it.until(lambda: it.counts()["delivered"] == 1)
        await it.until(lambda: it.counts()["pending"] == 1 and len(it.received) == 1)
        assert [row.region for row in it.received] == ["cn"]
        assert 'uplink.connected endpoint="hk"' not in it.log
        assert (await it.stop()) == 0
        assert "agent-hk" not in it.outer["hk"].log_path.read_text()


async def test_presence_says_birth_counts_and_death_where_the_endpoint_asks_for_it(tmp_path, patience):
    async with asyncio.timeout(3 * patience), car(tmp_path) as it:
        policy = (tmp_path / "policy.toml").read_text()
        (tmp_path / "policy.toml").write_text(policy.replace("tls = false", "tls = false\npresence = true"))
        await it.start()
        await it.at(SHENZHEN)
        it.telemetry(1)

        def said(kind):
            rows = [json.loads(row.payload) for row in it.received if row.topic == f"residency-agent/car/{kind}"]
            return [row["data"] for row in rows]

        await it.until(lambda: said("presence") and said("status"))
        assert said("presence")[0]["state"] == "online"
        assert said("presence")[0]["policyversion"] == "test"
        assert said("status")[0]["counts"]["received"] >= 1
        await it.stop()
        await it.until(lambda: len(said("presence")) == 2)
        assert (said("presence")[1]["state"], said("presence")[1]["reason"]) == ("offline", "stopped")
        await it.start()
        await it.at(SHENZHEN)
        it.telemetry(2)
        await it.until(lambda: len(said("presence")) == 3)
        await it.stop(signal.SIGKILL)
        await it.until(lambda: len(said("presence")) == 4)
        assert said("presence")[3]["reason"] == "lost"
        assert {row.region for row in it.received} == {"cn"}


async def test_message_that_a_position_filter_matches_too_is_taken_once(tmp_path, patience):
    async with asyncio.timeout(2 * patience), car(tmp_path, regions=("cn",)) as it:
        it.configure(agent='[[position]]\ntopic = "vehicle/#"\n')
        await it.start()
        await it.at(SHENZHEN)
        for number in range(5):
            it.telemetry(number)
        it.drive(SHENZHEN)
        await it.until(lambda: it.counts()["delivered"] >= 5)
        await it.stop()
        assert it.numbers("cn") == list(range(5))
        assert it.counts()["received"] == 5
