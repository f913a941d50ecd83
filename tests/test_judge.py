from __future__ import annotations

import base64
import errno
import io
import json
import struct
import time
import zlib
from dataclasses import replace

import msgpack
import numpy as np
import pytest
import zstandard
from canary import saved
from PIL import Image

from agent.pictures.containers import rebuild
from agent.pictures.formats import PictureLimits
from agent.wire import batch
from tools.demo import BUNDLED
from tools.importing.truth import ATTACHMENT, Truth
from tools.judge import STATES, Judge, Sent, claimed, judge_counts
from tools.leaves import Fields
from tools.pixels import (
    LIKELY,
    Shown,
    constant_share,
    covered,
    decode,
    hides_nothing,
    nearest,
    picture_format,
    thumbnail,
)
from tools.recording import contents, messages
from tools.scene import permitted
from tools.spool import Spool, SpoolError
from tools.stamps import rfc3339
from tools.witness import Seen, WitnessError, opened, unbatched

SPOOL = Spool(io.BytesIO())
SPEED = Sent(topic="vehicle/telemetry/speed", payload=SPOOL.keep(b'{"ts":1.0,"kmh":50}'), country="CN")
LOCATION = Sent(topic="vehicle/gnss", payload=SPOOL.keep(b'{"ts":1.0,"lat":22.4}'), country="HK")
FRONT = "vehicle/camera/front"
START = 1_790_000_000 * 10**9  # ns, 2026-09-21T14:13:20Z


@pytest.fixture(scope="module")
def street():
    """Front pictures of the bundled drive with their labelled objects: as many as hold every source once."""
    truth = Truth.decode(contents(BUNDLED).attachments[ATTACHMENT])
    objects = {one.capture_ns: one.objects for one in truth.pictures}
    front = [one for one in messages(BUNDLED) if one.topic == "vehicle/camera/front"]
    return [
        Sent(topic=one.topic, payload=SPOOL.keep(one.payload), country="CN", objects=objects[one.capture_ns])
        for one in front[:14]
    ]


def jpeg(pixels):
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=85)
    return out.getvalue()


def masked(sent, leave=()):
    """What a good agent delivers: every labelled object black, except those of the labels to leave."""
    pixels = decode(sent.payload.read()).copy()
    for label, x1, y1, x2, y2 in sent.objects:
        if label not in leave:
            pixels[max(y1 - 2, 0) : y2 + 2, max(x1 - 2, 0) : x2 + 2] = 0
    return jpeg(pixels)


def seen(data, broker="cn", number=0, **attributes):
    """A record as a broker got it; without a subject of its own, of the topic that has such data in these tests."""
    subject = FRONT if picture_format(data) else SPEED.topic
    stated = {"subject": subject, "redaction": "person=1", **attributes}
    inner = {"id": str(number), "source": "urn:test", **stated, "data": data}
    outer = {"payload": msgpack.packb(inner), "payloadType": "t", "signatures": []}
    return Seen(broker=broker, topic="cn/demo/x", payload=SPOOL.keep(msgpack.packb(outer)), time_ns=0)


def judged(sent, publications):
    return Judge(sent, permitted).judge(publications)


def test_permitted_record_is_counted_by_its_true_country_and_is_no_problem():
    verdict = judged([SPEED], [seen(SPEED.payload.read())])
    assert verdict.problems == []
    assert verdict.arrived == {("CN", "cn"): 1}


@pytest.mark.parametrize(("sent", "broker"), [(SPEED, "hk"), (LOCATION, "hk"), (LOCATION, "cn")])
def test_record_at_a_broker_that_its_true_country_does_not_permit_is_a_problem_whatever_its_tag_says(sent, broker):
    verdict = judged([sent], [seen(sent.payload.read(), broker, dataregion="hk", subject=sent.topic)])
    assert len(verdict.problems) == 1
    assert sent.country in verdict.problems[0]


def test_data_that_nobody_sent_and_publications_without_an_envelope_are_problems():
    strange = [seen(b"changed on the way"), Seen(broker="cn", topic="t", payload=SPOOL.keep(b"\xc1"), time_ns=0)]
    assert len(judged([SPEED], strange).problems) == 2


def test_repeated_delivery_of_one_record_is_counted_once():
    verdict = judged([SPEED], [seen(SPEED.payload.read()), seen(SPEED.payload.read())])
    assert (verdict.repeated, verdict.arrived["CN", "cn"]) == (1, 1)


def test_record_that_comes_again_elsewhere_or_with_other_data_is_judged_as_well():
    elsewhere = judged([SPEED], [seen(SPEED.payload.read()), seen(SPEED.payload.read(), "hk")])
    assert (elsewhere.repeated, len(elsewhere.problems)) == (1, 1)
    assert "nobody sent" in judged([SPEED], [seen(SPEED.payload.read()), seen(b"other")]).problems[0]


def test_masked_pictures_are_recognised_and_pass(street):
    verdict = judged(street, [seen(masked(sent), number=index) for index, sent in enumerate(street)])
    assert verdict.problems == []
    assert [picture.sent for picture in verdict.pictures] == street
    assert all(hits == total for hits, total in verdict.recall().values())
    assert set(verdict.recall()) == {"person", "plate"}
    assert verdict.masked["person"] == len(street)


def test_picture_that_arrives_as_it_was_sent_is_a_problem(street):
    verdict = judged(street, [seen(street[0].payload.read())])
    assert any("unredacted" in problem for problem in verdict.problems)


def test_picture_of_nothing_may_arrive_as_it_was_sent_but_not_say_that_it_was_masked(street):
    empty = [replace(street[0], objects=())]
    assert judged(empty, [seen(empty[0].payload.read(), redaction="none")]).problems == []
    assert any(
        "unredacted" in problem
        for problem in judged(empty, [seen(empty[0].payload.read(), redaction="plate=1")]).problems
    )


def test_picture_in_which_nothing_labelled_is_covered_is_a_problem_whatever_it_claims(street):
    untouched = jpeg(decode(street[0].payload.read()))
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
    trailing = masked(street[0]) + street[0].payload.read()
    hidden = judged(street, [seen(trailing)])
    assert any("hidden" in problem for problem in hidden.problems)
    silent = judged(street, [seen(masked(street[0]), redaction="")])
    assert any("does not say" in problem for problem in silent.problems)


def test_cabin_picture_is_permitted_nowhere(street):
    cabin = Sent(topic="vehicle/camera/cabin", payload=street[0].payload, country="CN")
    assert any(
        "permitted for [] only" in problem
        for problem in judged([cabin], [seen(masked(street[0]), subject=cabin.topic)]).problems
    )


def at(sent, second):
    return replace(sent, captured_ns=START + round(second * 10**9))


def told(second):
    """The `time` of a record that was captured then."""
    return rfc3339(START + round(second * 10**9))


ON = b'{"belt":"on"}'
BELT = Sent(topic="vehicle/telemetry/belt", payload=SPOOL.keep(ON), country="CN")
BOTH = [at(BELT, 10), at(replace(BELT, country="HK"), 4000)]


def test_leak_is_found_though_the_same_bytes_were_said_again_where_they_are_permitted():
    first, second = (
        seen(ON, "hk", number, subject=BELT.topic, time=told(when)) for number, when in enumerate((10, 4000))
    )
    for sent in (BOTH, BOTH[::-1]):
        assert "captured in CN is permitted for ['cn'] only" in judged(sent, [first]).problems[0]
        assert len(judged(sent, [second, first]).problems) == 1


def test_same_bytes_in_two_countries_are_told_apart_by_the_time_and_each_counts_for_its_own():
    records = [
        seen(ON, broker, number, subject=BELT.topic, time=told(when))
        for number, (broker, when) in enumerate([("hk", 4000.3), ("cn", 9.8)])
    ]
    for sent in (BOTH, BOTH[::-1]):
        verdict = judged(sent, records)
        assert verdict.problems == []
        assert verdict.arrived == {("CN", "cn"): 1, ("HK", "hk"): 1}
        assert {sent[one.sent].country: one.broker for one in verdict.deliveries} == {"CN": "cn", "HK": "hk"}


@pytest.mark.parametrize("stated", [{}, {"time": "yesterday"}, {"time": told(700)}], ids=str)
def test_all_equal_messages_that_a_record_may_be_have_to_permit_the_broker(stated):
    record = seen(ON, "hk", subject=BELT.topic, **stated)
    (problem,) = judged(BOTH, [record]).problems
    assert "an equal message was captured in HK" in problem
    assert judged([BOTH[1], at(BOTH[1], 5000)], [record]).problems == []


def test_time_that_two_records_state_is_that_of_one_message():
    records = [seen(ON, "hk", number, subject=BELT.topic, time=told(4000)) for number in range(2)]
    assert len(judged(BOTH, records).problems) == 1


def test_same_bytes_on_two_topics_are_two_messages_and_a_topic_that_nobody_sent_them_on_is_a_problem():
    refused = replace(BELT, topic="vehicle/camera/cabin")
    assert judged([BELT, refused], [seen(ON, subject=BELT.topic)]).problems == []
    assert "permitted for [] only" in judged([BELT, refused], [seen(ON, subject=refused.topic)]).problems[0]
    assert "nobody sent" in judged([BELT], [seen(ON, subject="vehicle/telemetry/door")]).problems[0]


def test_same_picture_in_two_countries_is_told_apart_by_the_time(street):
    both = [at(street[0], 10), at(replace(street[0], country="HK"), 4000)]
    for when, problems in ((10, 1), (4000, 0)):
        verdict = judged(both, [seen(masked(street[0]), "hk", time=told(when))])
        assert len(verdict.problems) == problems


RULES = {
    "keep": ["/ts", "/vin", "/where", "/list"],
    "drop": ["/where/altitude", "/list/*/secret"],
    "positions": [{"latitude": "/where/lat", "longitude": "/where/lon", "metres": 11057.4}],
    "times": [{"place": "/ts", "seconds": 60}],
    "pseudonymise": ["/vin"],
}
FULL = {
    "ts": 1790000042.5,
    "vin": "LSV1",
    "where": {"lat": 22.61, "lon": 114.051, "altitude": 3},
    "list": [{"n": 1, "secret": "x"}, {"n": 2}],
    "driver": "somebody",
}
LEFT = {
    "ts": 1790000040.0,
    "vin": "0123456789abcdef" * 2,
    "where": {"lat": 22.6, "lon": 114.06},
    "list": [{"n": 1}, {"n": 2}],
}


def with_fields(pack, *delivered):
    """Problems of a message FULL under RULES that was delivered as these."""
    sent = replace(at(BELT, 42.5), payload=SPOOL.keep(pack(FULL)))
    records = [seen(pack(one), number=number, subject=BELT.topic, time=told(0)) for number, one in enumerate(delivered)]
    return Judge([sent], permitted, lambda _topic: Fields.of(RULES)).judge(records).problems


def as_json(value):
    return json.dumps(value).encode()


@pytest.mark.parametrize("pack", [as_json, msgpack.packb])
def test_document_passes_as_the_field_rules_leave_it_and_not_with_anything_that_they_take_out(pack):
    assert with_fields(pack, LEFT) == []
    wrong = [
        FULL,
        LEFT | {"driver": "somebody"},
        LEFT | {"where": LEFT["where"] | {"altitude": 3}},
        LEFT | {"list": FULL["list"]},
        LEFT | {"vin": "LSV1"},
        LEFT | {"where": LEFT["where"] | {"lat": 22.61}},
        LEFT | {"ts": FULL["ts"]},
    ]
    for one in wrong:
        assert any("field rules" in problem for problem in with_fields(pack, one)), one
    for one in ({}, LEFT | {"list": [{"n": 1}, {"n": 3}]}, LEFT | {"list": [{"m": 1}, {"n": 2}]}):
        assert "nobody sent" in with_fields(pack, one)[0], one


def test_value_behind_a_second_key_of_the_same_name_is_seen():
    sent = replace(BELT, payload=SPOOL.keep(b'{"vin":"LSV1"}'))
    twice = b'{"vin":"LSV1","vin":"0123456789abcdef0123456789abcdef"}'
    assert Judge([sent], permitted, lambda _topic: Fields.of(RULES)).judge([seen(twice, subject=BELT.topic)]).problems


def test_record_whose_time_a_rule_made_coarse_may_be_any_message_of_that_step():
    def problems(*seconds):
        sent = [
            at(replace(BELT, country=country), second) for country, second in zip(("CN", "HK"), seconds, strict=True)
        ]
        fields = Fields.of({"times": [{"place": "/ts", "seconds": 60}]})
        record = seen(ON, "hk", subject=BELT.topic, time=told(60))
        return Judge(sent, permitted, lambda _topic: fields).judge([record]).problems

    assert problems(30, 90) == []
    assert "an equal message was captured in HK" in problems(70, 90)[0]


def turned(pixels):
    """A JPEG that is stored lying on its side, with EXIF that says so and nothing else."""
    return rebuild(jpeg(np.rot90(pixels)), PictureLimits(), 6)


def in_json(pixels):
    return as_json({"ts": 1.0, "img": base64.b64encode(jpeg(pixels)).decode(), "n": 1})


def in_data_url(pixels):
    return as_json(["x", {"img": f"data:image/png;base64,{base64.urlsafe_b64encode(png(pixels)).decode()}"}])


def in_msgpack(pixels):
    return msgpack.packb({"ts": 1.0, "img": webp(pixels)})


def png(pixels):
    return saved(pixels, "PNG")


def webp(pixels):
    return saved(pixels, "WEBP", quality=90)


@pytest.mark.parametrize("form", [turned, png, webp, in_json, in_data_url, in_msgpack])
def test_every_form_of_a_picture_passes_masked_and_is_caught_unredacted(street, form):
    pixels = decode(street[0].payload.read())
    sent = replace(street[0], payload=SPOOL.keep(form(pixels)))

    def problems(data, **attributes):
        return judged([sent], [seen(data, subject=FRONT, **attributes)]).problems

    assert problems(form(decode(masked(street[0])))) == []
    assert any("unredacted" in one for one in problems(sent.payload.read()))
    assert any("none of" in one for one in problems(sent.payload.read(), redaction="none"))
    assert any("none of" in one for one in problems(form(decode(jpeg(pixels)))))
    assert any("does not say" in one for one in problems(form(decode(masked(street[0]))), redaction=""))
    assert any("nobody sent" in one for one in problems(as_json({"ts": 1.0, "img": "", "n": 1})))


def test_picture_in_a_form_that_the_judge_cannot_read_is_no_pass(street):
    hexed = replace(street[0], payload=SPOOL.keep(as_json({"img": street[0].payload.read().hex()})))
    record = seen(as_json({"img": masked(street[0]).hex()}), subject=FRONT)
    assert "cannot be read" in judged([hexed], [record]).problems[0]


@pytest.mark.parametrize(
    ("payload", "rules"),
    [
        (as_json({"img": "/9j/é"}), {}),
        (as_json({"img": "/9j/A"}), {}),
        (
            b'{"lat":Infinity,"lon":1e999,"ts":1e999}',
            {"positions": [{"latitude": "/lat", "longitude": "/lon", "metres": 1}]},
        ),
        (b'{"ts":1e999}', {"times": [{"place": "/ts", "seconds": 60}]}),
        (b"[" * 100_000 + b'"/9j/"', {"drop": ["/a"]}),
        (b'{"a":"\\ud800"}', {"drop": ["/b"]}),
    ],
    ids=range(6),
)
def test_no_payload_ends_the_judge_with_an_error(payload, rules):
    sent = replace(BELT, payload=SPOOL.keep(payload))
    Judge([sent], permitted, lambda _topic: Fields.of(rules)).judge([seen(payload, subject=BELT.topic)])


def test_very_many_equal_messages_are_told_apart_in_little_time():
    sent = [at(BELT, second) for second in range(20_000)]
    records = [seen(ON, number=second, subject=BELT.topic, time=told(second)) for second in range(20_000)]
    begun = time.process_time()
    verdict = judged(sent, records)
    assert [one.sent for one in verdict.deliveries] == list(range(20_000))
    assert time.process_time() - begun < 10


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


GREY = np.full((40, 60, 3), 99, np.uint8)
LARGE_EXIF = Image.Exif()
LARGE_EXIF.update({0x0112: 6, 0x010F: "maker"})


@pytest.mark.parametrize(
    "data",
    [
        jpeg(GREY),
        saved(GREY, "JPEG", progressive=True),
        turned(GREY),
        png(GREY),
        rebuild(png(GREY), PictureLimits(), 3),
        webp(GREY),
        saved(GREY, "WEBP", lossless=True),
        rebuild(webp(GREY), PictureLimits(), 8),
    ],
)
def test_picture_with_nothing_but_its_orientation_hides_nothing(data):
    assert hides_nothing(data)


@pytest.mark.parametrize(
    "data",
    [
        jpeg(GREY) + b"x",
        jpeg(GREY)[:-2],
        saved(GREY, "JPEG", comment=b"x"),
        saved(GREY, "JPEG", exif=LARGE_EXIF),
        saved(GREY, "JPEG", progressive=True).replace(b"\xff\xda", b"\xff\xe5\x00\x03x\xff\xda"),
        jpeg(GREY).replace(b"\xff\xd9", b"\xff\xfe\x00\x03x\xff\xd9"),
        png(GREY) + b"x",
        png(GREY)[:33] + chunk(b"tEXt", b"a\x00b") + png(GREY)[33:],
        saved(GREY, "PNG", exif=LARGE_EXIF),
        saved(np.dstack([GREY, GREY[..., :1]]), "PNG"),
        webp(GREY) + b"x",
        saved(GREY, "WEBP", exif=LARGE_EXIF),
        saved(GREY, "WEBP", xmp=b"<x/>"),
        saved(np.dstack([GREY, GREY[..., :1]]), "WEBP"),
    ],
)
def test_picture_with_anything_more_may_hide_something(data):
    assert not hides_nothing(data)


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


class BadDisk(io.BytesIO):
    def read(self, _size=-1):
        raise OSError(errno.EIO, "Input/output error")


def test_record_that_the_disk_does_not_give_back_is_an_error_and_no_problem_of_the_run():
    record = replace(seen(ON), payload=Spool(BadDisk()).keep(ON))
    with pytest.raises(SpoolError, match="Input/output error"):
        judged([BELT], [record])


def test_claims_are_read_and_nonsense_is_an_error():
    assert claimed("none") == {}
    assert claimed("face=1,person=3") == {"face": 1, "person": 3}
    with pytest.raises(WitnessError):
        claimed("person")


@pytest.mark.parametrize("payload", [b"", b"\xc1", msgpack.packb([1]), msgpack.packb({"payload": b""}), b"\x00"])
def test_envelope_of_another_shape_is_a_testimony_error(payload):
    with pytest.raises(WitnessError):
        opened(Seen(broker="cn", topic="t", payload=SPOOL.keep(payload), time_ns=0))


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
    assert found.data == SPEED.payload.read()
    assert found.attributes["dataregion"] == "cn"


def test_constant_area_counts_as_covered_and_noise_does_not():
    noise = np.random.default_rng(1).integers(0, 255, (100, 100, 3), dtype=np.uint8)
    black = noise.copy()
    black[20:80, 20:80] = 0
    assert covered(noise, black, (25, 25, 75, 75))
    assert not covered(noise, noise, (25, 25, 75, 75))
    assert covered(black, black, (25, 25, 75, 75)) is None
    assert constant_share(black, (0, 20, 100, 80)) == pytest.approx(0.6, abs=0.01)


def test_all_pictures_that_look_the_same_are_found_however_many_they_are():
    shown = Shown()
    assert shown.like(png(GREY)) == []
    for index in range(3 * LIKELY):
        shown.add(index, png(GREY + np.uint8(index % 2 * 50)))
    shown.add(1000, b"no picture")
    assert shown.like(jpeg(GREY)) == list(range(0, 3 * LIKELY, 2))


def test_every_crop_is_told_from_every_other_one():
    thumbnails = np.array([thumbnail(one.payload) for one in messages(BUNDLED) if one.topic == "vehicle/camera/front"])
    assert [nearest(one, thumbnails) for one in thumbnails] == list(range(len(thumbnails)))
