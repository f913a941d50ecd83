from __future__ import annotations

import io
from dataclasses import replace

import msgpack
import numpy as np
import pytest
import zstandard
from PIL import Image

from agent.wire import batch
from tools.demo import BUNDLED
from tools.importing.truth import ATTACHMENT, Truth
from tools.judge import STATES, Judge, Sent, claimed, judge_counts
from tools.pixels import constant_share, covered, decode, nearest, thumbnail
from tools.recording import contents, messages
from tools.scene import permitted
from tools.witness import Seen, WitnessError, opened, unbatched

SPEED = Sent(topic="vehicle/telemetry/speed", payload=b'{"ts":1.0,"kmh":50}', country="CN")
LOCATION = Sent(topic="vehicle/gnss", payload=b'{"ts":1.0,"lat":22.4}', country="HK")


@pytest.fixture(scope="module")
def street():
    """Front pictures of the bundled drive with their labelled objects: as many as hold every source once."""
    truth = Truth.decode(contents(BUNDLED).attachments[ATTACHMENT])
    objects = {one.capture_ns: one.objects for one in truth.pictures}
    front = [one for one in messages(BUNDLED) if one.topic == "vehicle/camera/front"]
    return [
        Sent(topic=one.topic, payload=one.payload, country="CN", objects=objects[one.capture_ns]) for one in front[:14]
    ]


def jpeg(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=85)
    return out.getvalue()


def masked(sent, leave=()):
    """What a good agent delivers: every labelled object black, except those of the labels to leave."""
    pixels = decode(sent.payload).copy()
    for label, x1, y1, x2, y2 in sent.objects:
        if label not in leave:
            pixels[max(y1 - 2, 0) : y2 + 2, max(x1 - 2, 0) : x2 + 2] = 0
    return jpeg(pixels)


def seen(data, broker="cn", number=0, **attributes):
    inner = {"id": str(number), "source": "urn:test", "redaction": "person=1", **attributes, "data": data}
    outer = {"payload": msgpack.packb(inner), "payloadType": "t", "signatures": []}
    return Seen(broker=broker, topic="cn/demo/x", payload=msgpack.packb(outer), time_ns=0)


def judged(sent, publications):
    return Judge(sent, permitted).judge(publications)


def test_permitted_record_is_counted_by_its_true_country_and_is_no_problem():
    verdict = judged([SPEED], [seen(SPEED.payload)])
    assert verdict.problems == []
    assert verdict.arrived == {("CN", "cn"): 1}


@pytest.mark.parametrize(("sent", "broker"), [(SPEED, "hk"), (LOCATION, "hk"), (LOCATION, "cn")])
def test_record_at_a_broker_that_its_true_country_does_not_permit_is_a_problem_whatever_its_tag_says(sent, broker):
    verdict = judged([sent], [seen(sent.payload, broker, dataregion="hk")])
    assert len(verdict.problems) == 1
    assert sent.country in verdict.problems[0]


def test_data_that_nobody_sent_and_publications_without_an_envelope_are_problems():
    strange = [seen(b"changed on the way"), Seen(broker="cn", topic="t", payload=b"\xc1", time_ns=0)]
    assert len(judged([SPEED], strange).problems) == 2


def test_repeated_delivery_of_one_record_is_counted_once():
    verdict = judged([SPEED], [seen(SPEED.payload), seen(SPEED.payload)])
    assert (verdict.repeated, verdict.arrived["CN", "cn"]) == (1, 1)


def test_masked_pictures_are_recognised_and_pass(street):
    verdict = judged(street, [seen(masked(sent), number=index) for index, sent in enumerate(street)])
    assert verdict.problems == []
    assert [picture.sent for picture in verdict.pictures] == street
    assert all(hits == total for hits, total in verdict.recall().values())
    assert set(verdict.recall()) == {"person", "plate"}
    assert verdict.masked["person"] == len(street)


def test_picture_that_arrives_as_it_was_sent_is_a_problem(street):
    verdict = judged(street, [seen(street[0].payload)])
    assert any("unredacted" in problem for problem in verdict.problems)


def test_picture_of_nothing_may_arrive_as_it_was_sent_but_not_say_that_it_was_masked(street):
    empty = [replace(street[0], objects=())]
    assert judged(empty, [seen(empty[0].payload, redaction="none")]).problems == []
    assert any(
        "unredacted" in problem for problem in judged(empty, [seen(empty[0].payload, redaction="plate=1")]).problems
    )


def test_picture_in_which_nothing_labelled_is_covered_is_a_problem_whatever_it_claims(street):
    untouched = jpeg(decode(street[0].payload))
    problems = judged(street, [seen(untouched, redaction="person=4,plate=1")]).problems
    assert any("none of" in problem for problem in problems)


def test_run_in_which_few_labelled_objects_are_covered_is_a_problem_and_a_missed_plate_is_shown(street):
    def delivered(leave):
        return [seen(masked(sent, leave), number=index) for index, sent in enumerate(street)]

    few = judged(street, delivered({"person"}))
    assert any("labelled objects are covered" in problem for problem in few.problems)
    most = judged(street, delivered({"plate"}))
    assert not any("labelled objects are covered" in problem for problem in most.problems)
    assert most.recall()["plate"][0] == 0


def test_bytes_behind_the_picture_and_missing_claims_are_problems(street):
    trailing = masked(street[0]) + street[0].payload
    hidden = judged(street, [seen(trailing)])
    assert any("hidden" in problem for problem in hidden.problems)
    silent = judged(street, [seen(masked(street[0]), redaction="")])
    assert any("does not say" in problem for problem in silent.problems)


def test_cabin_picture_is_permitted_nowhere(street):
    cabin = Sent(topic="vehicle/camera/cabin", payload=street[0].payload, country="CN")
    assert any("permitted for [] only" in problem for problem in judged([cabin], [seen(masked(street[0]))]).problems)


def counts(**changes):
    return {"received": 10, **dict.fromkeys(STATES, 0), "delivered": 7, "held": 2, "refused": 1} | changes


@pytest.mark.parametrize(
    ("changes", "problem"),
    [({"held": 1}, "conservation"), ({"pending": 1, "held": 1}, "pending"), ({"delivered": 8, "held": 1}, "arrived")],
)
def test_counters_that_do_not_add_up_are_problems(changes, problem):
    assert judge_counts(counts(), sent=10, delivered=7) == []
    assert problem in judge_counts(counts(**changes), sent=10, delivered=7)[0]
    assert judge_counts(counts(), sent=11, delivered=7)


def test_claims_are_read_and_nonsense_is_an_error():
    assert claimed("none") == {}
    assert claimed("face=1,person=3") == {"face": 1, "person": 3}
    with pytest.raises(WitnessError):
        claimed("person")


@pytest.mark.parametrize("payload", [b"", b"\xc1", msgpack.packb([1]), msgpack.packb({"payload": b""}), b"\x00"])
def test_envelope_of_another_shape_is_a_testimony_error(payload):
    with pytest.raises(WitnessError):
        opened(Seen(broker="cn", topic="t", payload=payload, time_ns=0))


def test_batch_is_taken_apart_by_its_content_type_or_where_that_is_lost_by_its_bytes():
    members = [msgpack.packb({"n": number}) for number in range(3)]
    plain = msgpack.packb(members)
    small = zstandard.ZstdCompressor().compress(plain)
    for content_type, payload in ((batch.CONTENT_TYPE, plain), (batch.ZSTD_CONTENT_TYPE, small)):
        assert unbatched(payload, content_type) == members
        assert unbatched(payload, None) == members
        assert unbatched(payload, "application/octet-stream") == [payload], "data of a record in binary mode"
    for other in (b"", b"\xc1", members[0], msgpack.packb([1, 2]), small[:-1], b'{"n": 1}', b"\xff\xd8\xff\xe0"):
        assert unbatched(other, None) == [other]


def test_record_in_binary_mode_has_its_attributes_in_the_user_properties():
    properties = (("specversion", "1.0"), ("id", "1"), ("dataregion", "cn"))
    found = opened(Seen(broker="cn", topic="t", payload=SPEED.payload, time_ns=0, properties=properties))
    assert found.data == SPEED.payload
    assert found.attributes["dataregion"] == "cn"


def test_constant_area_counts_as_covered_and_noise_does_not():
    noise = np.random.default_rng(1).integers(0, 255, (100, 100, 3), dtype=np.uint8)
    black = noise.copy()
    black[20:80, 20:80] = 0
    assert covered(noise, black, (25, 25, 75, 75))
    assert not covered(noise, noise, (25, 25, 75, 75))
    assert covered(black, black, (25, 25, 75, 75)) is None
    assert constant_share(black, (0, 20, 100, 80)) == pytest.approx(0.6, abs=0.01)


def test_every_crop_is_told_from_every_other_one():
    thumbnails = np.array([thumbnail(one.payload) for one in messages(BUNDLED) if one.topic == "vehicle/camera/front"])
    assert [nearest(one, thumbnails) for one in thumbnails] == list(range(len(thumbnails)))
