from __future__ import annotations

import base64
import io
import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from canary import saved
from PIL import Image

from agent import pipeline
from agent.pictures.containers import rebuild
from agent.pictures.formats import PictureLimits, RedactedPayload
from tools import offline
from tools.demo import BUNDLED
from tools.expectations import Expectations, Stretch
from tools.recording import Properties, Recorded, RecordingWriter, messages
from tools.run_file import keep, load
from tools.scene import agent_values, policy_values
from tools.schedule import Options
from tools.trial import Setting, TrialError, prepared
from tools.verification import judged

NOTHING = Expectations()
START = 1_790_000_000 * 10**9
SECOND = 10**9
PICTURES = 40  # of 750 kB each
SHENZHEN = {"lat": 22.60, "lon": 114.05, "acc": 5.0}
MODEL = Path(__file__).parents[1] / "models" / "detector.json"


def at(second, topic="vehicle/telemetry/speed", *, payload=None, **values):
    moment = START + round(second * SECOND)
    data = json.dumps({"ts": moment / SECOND, **values}).encode() if payload is None else payload
    properties = Properties(user=(("time", str(moment)),))
    return Recorded(topic=topic, payload=data, capture_ns=moment, receipt_ns=moment, properties=properties)


def fixes(*seconds):
    return [at(second, "vehicle/gnss", **SHENZHEN) for second in seconds]


def setting(tmp_path, drive, *, policy=None, **agent):
    path = tmp_path / "drive.mcap"
    with path.open("wb") as stream, RecordingWriter(stream) as writer:
        for message in sorted(drive, key=lambda one: one.receipt_ns):
            writer.write(message)
    return Setting(
        agent={**agent_values(1), **agent},
        policy=policy or policy_values(),
        recording=path,
        folder=tmp_path / "run",
        options=Options(),
    )


async def run(given, expected=NOTHING):
    with prepared(given.folder) as spool:
        return await judged(given, expected, offline.conduct, spool)


async def run_and_keep(given):
    with prepared(given.folder) as spool:
        done = await judged(given, NOTHING, offline.conduct, spool)
        keep(given.folder, given, done.sent, done.trial, done.verdict)
    return load(given.folder)


def counts(done):
    found = done.trial.status["counts"]
    return {state: found[state] for state in ("received", "delivered", "held", "refused", "expired") if found[state]}


async def test_held_record_is_delivered_when_later_fixes_settle_the_region(tmp_path):
    done = await run(setting(tmp_path, [at(0, v=1), *fixes(3, 4, 5)]))
    assert counts(done) == {"received": 4, "delivered": 4}
    speed = next(one for one in done.verdict.deliveries if done.sent[one.sent].topic == "vehicle/telemetry/speed")
    assert (speed.broker, speed.tag) == ("cn", "cn")
    assert 4 * SECOND <= speed.time_ns - START <= 5 * SECOND


async def test_record_that_nothing_settles_is_held_and_expires_by_the_time_of_the_recording(tmp_path):
    assert counts(await run(setting(tmp_path, [at(0, v=1), at(1, v=2)]))) == {"received": 2, "held": 2}
    policy = policy_values()
    policy["classes"]["telemetry"]["hold_s"] = 2.0
    late = setting(tmp_path, [at(0, v=1), at(0.1, v=2), *fixes(600, 601)], policy=policy)
    done = await run(Setting(**{**{name: getattr(late, name) for name in late.__slots__}, "folder": tmp_path / "late"}))
    assert counts(done) == {"received": 4, "delivered": 2, "expired": 2}


async def test_refusals_have_the_reasons_of_the_agent(tmp_path):
    drive = [
        *fixes(0, 1, 2),
        at(3, "vehicle/camera/cabin", payload=b"\xff\xd8\xff picture"),
        at(3, "vehicle/camera/front", payload=b"\xff\xd8\xff no picture"),
        at(3, "vehicle/telemetry/x", payload=b'{"no": "time"}'),
    ]
    reasons = (await run(setting(tmp_path, drive))).trial.status["counts"]["breakdown"]["refused"]["reason"]
    assert reasons["policy.refused"] == 1
    assert reasons["capture.unreadable"] == 1
    assert sum(reasons.values()) == 3


async def test_without_its_model_no_picture_leaves(tmp_path):
    picture = next(one.payload for one in messages(BUNDLED) if one.topic == "vehicle/camera/front")
    drive = [*fixes(0, 1, 2), at(3, "vehicle/camera/front", payload=picture)]
    done = await run(setting(tmp_path, drive, model={"manifest": str(tmp_path / "missing.json")}))
    assert done.trial.status["counts"]["breakdown"]["refused"]["reason"] == {"redaction.model": 1}
    assert not done.verdict.pictures


@pytest.mark.skipif(not MODEL.exists(), reason="no detector is committed under models/ yet")
async def test_pictures_of_the_bundled_drive_are_masked_by_the_shipped_model_and_judged_by_the_truth(tmp_path):
    given = setting(tmp_path, [])
    options = Options(end_s=40)
    done = await run(
        Setting(agent=given.agent, policy=given.policy, recording=BUNDLED, folder=tmp_path / "bundled", options=options)
    )
    assert done.verdict.problems == []
    assert done.verdict.pictures
    assert done.verdict.masked.total() > 0
    assert done.trial.status["model"]["digest"] == json.loads(MODEL.read_text())["sha256"]


def forms():
    """A street picture of the bundled drive, with people in it, in every form that is judged: topic -> payload."""
    street = next(one.payload for one in messages(BUNDLED) if one.topic == "vehicle/camera/front")
    pixels = np.asarray(Image.open(io.BytesIO(street)))
    return {
        "vehicle/camera/turned": rebuild(saved(np.rot90(pixels), "JPEG", quality=90), PictureLimits(), 6),
        "vehicle/camera/png": saved(pixels, "PNG"),
        "vehicle/camera/webp": saved(pixels, "WEBP", quality=90),
        "vehicle/camera/json": json.dumps({"img": base64.b64encode(street).decode(), "n": 1}).encode(),
    }


def picture_drive(tmp_path):
    rule = {"topic": "vehicle/camera/+", "class": "picture", "action": "redact"}
    taken = {"capture_time": "property:time", "capture_unit": "ns"}
    policy = {**policy_values(), "rules": [rule | taken, *policy_values()["rules"]]}
    drive = [*fixes(0, 1, 2), *(at(3, topic, payload=payload) for topic, payload in forms().items()), *fixes(4)]
    return setting(tmp_path, drive, policy=policy)


@pytest.mark.skipif(not MODEL.exists(), reason="no detector is committed under models/ yet")
async def test_pictures_of_every_form_pass_as_the_agent_redacts_them(tmp_path):
    done = await run(picture_drive(tmp_path))
    assert counts(done) == {"received": 8, "delivered": 8}
    assert done.verdict.problems == []
    assert {one.sent.topic for one in done.verdict.pictures} == set(forms())
    assert all(one.claimed["person"] for one in done.verdict.pictures)


async def test_picture_of_any_form_that_was_not_redacted_is_a_problem(tmp_path, monkeypatch):
    async def unredacted(_self, payload, _content_type=None):
        return RedactedPayload(payload=payload, counts={"person": 1}, pictures=1, model_digest="0" * 64)

    monkeypatch.setattr(offline.InProcess, "redact", unredacted)
    done = await run(picture_drive(tmp_path))
    assert counts(done) == {"received": 8, "delivered": 8}
    for topic in forms():
        assert any(topic in problem and "unredacted" in problem for problem in done.verdict.problems), topic


FIELDS = {
    "keep": ["/ts", "/vin", "/where", "/list"],
    "drop": ["/where/altitude", "/list/*/secret"],
    "positions": [{"latitude": "/where/lat", "longitude": "/where/lon", "metres": 500}],
    "times": [{"place": "/ts", "seconds": 60}],
    "pseudonymise": ["/vin"],
}


def personal(second):
    where = {"lat": 22.6012345 + second / 1e4, "lon": 114.0512345, "altitude": 3}
    return at(second, vin="LSV1", where=where, list=[{"n": second, "secret": "x"}, {"n": None}], driver="somebody")


def fields_drive(tmp_path):
    (tmp_path / "pseudonym.key").write_bytes(b"sixteen bytes or more")
    policy = policy_values()
    next(one for one in policy["rules"] if one["topic"] == "vehicle/telemetry/#")["fields"] = FIELDS
    drive = [*fixes(*range(5)), *(personal(second) for second in (1, 2, 3))]
    return setting(tmp_path, drive, policy=policy, signing={"pseudonym_key_file": str(tmp_path / "pseudonym.key")})


async def test_documents_pass_as_the_agent_leaves_them_by_the_field_rules_of_the_policy(tmp_path):
    done = await run(fields_drive(tmp_path))
    assert counts(done) == {"received": 8, "delivered": 8}
    assert done.verdict.problems == []
    assert {one.sent for one in done.verdict.deliveries} == set(range(8))


async def test_document_that_the_field_rules_were_not_applied_to_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "apply_field_rules", lambda payload, _rules, _media_type: payload)
    done = await run(fields_drive(tmp_path))
    assert len([one for one in done.verdict.problems if "field rules" in one]) == 3


async def test_gap_in_the_positions_and_a_place_in_words_are_no_part_of_the_track(tmp_path):
    gaps = [{"lat": None, "lon": None}, {"lat": "n/a", "lon": "n/a"}, {"lat": True, "lon": 114.05}, {"lat": 22.6}]
    gaps += [{"lat": 1e308, "lon": 114.05}, {"lat": 22.6, "lon": 429.5}]
    drive = [*fixes(0, 1), *(at(2, "vehicle/gnss", **gap) for gap in gaps), *fixes(3)]
    given = setting(tmp_path, drive)
    assert [second for second, _, _ in (await run_and_keep(given)).track] == [0, 1, 3]


async def test_text_of_a_result_which_asyncio_writes_holds_no_payloads(tmp_path):
    picture = saved(Image.new("RGB", (64, 64)), "JPEG")
    pictures = [at(second, "vehicle/camera/front", payload=picture) for second in (2, 3, 4)]
    done = await run(setting(tmp_path, [*fixes(0, 1), *pictures, *fixes(6, 7)]))
    assert len(done.verdict.pictures) == 3
    assert len(repr(done)) < 5_000
    assert "x00" not in repr(done)


async def test_memory_of_a_run_does_not_grow_with_its_payloads(tmp_path, monkeypatch):
    """Noisy pictures that are held at first, then delivered and judged."""
    random = np.random.default_rng(1)
    noise = [random.integers(0, 255, (500, 500, 3), dtype=np.uint8) for _ in range(2 * PICTURES)]

    async def another(_self, _payload, _content_type=None):
        data = saved(noise.pop(), "PNG", compress_level=0)
        return RedactedPayload(payload=data, counts={"person": 1}, pictures=1, model_digest="0" * 64)

    drive = [
        at(number / 10, "vehicle/camera/front", payload=saved(noise.pop(), "PNG", compress_level=0))
        for number in range(PICTURES)
    ]
    monkeypatch.setattr(offline.InProcess, "redact", another)
    given = setting(tmp_path, [*drive, *fixes(10, 11, 12)])
    size = sum(len(one.payload) for one in drive)
    del drive
    tracemalloc.start()
    kept = await run_and_keep(given)
    _now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(kept.pictures) == PICTURES
    assert peak < size / 2, "three times the pictures, were they all kept"


async def test_recording_in_which_nothing_is_judged_does_not_pass(tmp_path):
    with pytest.raises(TrialError, match=r"drive\.mcap: no message in it"):
        await run(setting(tmp_path, []))


@pytest.mark.parametrize("truth", [b"", b"{}", b'{"positions":[],"crossings":[],"pictures":[]}'])
async def test_ground_truth_that_is_none_is_named(tmp_path, truth):
    given = setting(tmp_path, fixes(0))
    with given.recording.open("wb") as stream, RecordingWriter(stream) as writer:
        writer.write(fixes(0)[0])
        writer.attach("ground_truth.json", "application/json", truth)
    with pytest.raises(TrialError, match=r"drive\.mcap: its ground_truth\.json is none"):
        await run(given)


async def test_stretch_counts_from_the_first_receipt_and_holds_what_was_captured_before(tmp_path):
    old = replace(at(-86_400), receipt_ns=START)
    expected = Expectations(stretch=(Stretch(country="CN", to_s=2), Stretch(country="HK", from_s=2)))
    done = await run(setting(tmp_path, [old, at(1), at(3)]), expected)
    assert [one.country for one in done.sent] == ["CN", "CN", "HK"]


async def test_message_of_another_time_stands_in_the_report_where_it_was_received(tmp_path):
    retained = replace(at(-86_400), receipt_ns=START)
    unset = replace(at(2, "vehicle/telemetry/battery"), capture_ns=5 * SECOND)
    given = setting(tmp_path, [retained, *fixes(1), unset, replace(at(3), capture_ns=START + 2 * SECOND)])
    assert [one.second for one in (await run_and_keep(given)).events] == [0, 1, 2, 2]


async def test_folder_of_an_earlier_run_is_not_used_again(tmp_path):
    given = setting(tmp_path, fixes(0))
    await run(given)
    with pytest.raises(TrialError, match="empty folder"):
        await run(given)
