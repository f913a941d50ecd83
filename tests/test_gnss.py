import contextlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.errors import PositionError
from agent.messages import Message
from agent.places.freshness import ANY_AGE_NS, Freshness
from agent.places.geodesy import gcj02_from_wgs84, sphere_m, wgs84_from_gcj02
from agent.places.gnss import FixReader, FixSource

S = 10**9
START = 1_790_000_000  # Unix seconds at monotonic 0


def message(payload, seconds=100.0, topic="vehicle/gnss", wall=START, wait=0):
    data = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
    monotonic = round(seconds * S)
    return Message(
        topic=topic, payload=data, received_ns=wall * S + monotonic, monotonic_ns=monotonic, wait_ns=wait * S
    )


def sentence(body):
    total = 0
    for byte in body.encode():
        total ^= byte
    return f"${body}*{total:02X}\r\n".encode()


FULL = FixSource(accuracy="/acc", time="/ts")
RMC = "GNRMC,101112.00,A,2218.0000,N,11406.0000,E,10.0,90.0,231126,,,A"
GGA = "GNGGA,101112.00,2218.0000,N,11406.0000,E,1,12,0.9,10.0,M,0.0,M,,"
GST = "GNGST,101112.00,5.0,4.0,3.0,45.0,3.0,4.0,6.0"
NMEA_NOON = 1_795_428_672  # 2026-11-23T10:11:12Z


def test_json_fields_are_found_by_their_pointers():
    source = FixSource(latitude="/pos/0", longitude="/pos/1", accuracy="/q/h~1acc", time="/when")
    document = {"pos": [22.3, 114.1], "q": {"h/acc": 4}, "when": START + 99.5}
    fix = FixReader(source).read(message(document))
    assert (fix.latitude, fix.longitude, fix.accuracy_m) == (22.3, 114.1, 4.0)
    assert (fix.time_ns, fix.monotonic_ns) == ((START * 10 + 995) * S // 10, 100 * S)


def test_without_accuracy_and_time_the_default_and_the_arrival_count():
    fix = FixReader(FixSource(default_accuracy_m=80.0)).read(message({"lat": 22.3, "lon": 114.1}))
    assert fix.accuracy_m == 80.0
    assert fix.time_ns == (START + 100) * S
    assert fix.doubt_ns == 0


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"22.3,114.1",
        b"[]",
        b"null",
        b"{",
        b'{"lat":22.3}',
        b'{"lat":"22.3","lon":114.1,"acc":5,"ts":1}',
        b'{"lat":true,"lon":114.1,"acc":5,"ts":1}',
        b'{"lat":null,"lon":114.1,"acc":5,"ts":1}',
        b'{"lat":NaN,"lon":114.1,"acc":5,"ts":1}',
        b'{"lat":22.3,"lon":Infinity,"acc":5,"ts":1}',
        b'{"lat":91,"lon":114.1,"acc":5,"ts":1}',
        b'{"lat":22.3,"lon":-180.5,"acc":5,"ts":1}',
        b'{"lat":0,"lon":0,"acc":5,"ts":1}',
        b'{"lat":0.0,"lon":-0.00001,"acc":5,"ts":1}',
        b'{"lat":22.3,"lon":114.1,"acc":0,"ts":1}',
        b'{"lat":22.3,"lon":114.1,"acc":-5,"ts":1}',
        b'{"lat":22.3,"lon":114.1,"acc":5,"ts":"now"}',
        b'{"lat":22.3,"lon":114.1,"acc":5,"ts":1e400}',
        b'{"lat":1' + b"0" * 5_000 + b',"lon":114.1,"acc":5,"ts":1}',
        b"[" * 60_000,
        b'{"lat":22.3,"lon":114.1,"acc":5,"ts":1}' + b" " * 70_000,
    ],
)
def test_what_does_not_say_where_the_car_is_raises(payload):
    with pytest.raises(PositionError):
        FixReader(FULL).read(message(payload))


@given(st.binary(max_size=200), st.sampled_from(["json", "vss", "nmea", "locationfix"]))
def test_any_bytes_give_a_fix_or_nothing_or_a_position_error(payload, form):
    reader = FixReader(FixSource(format=form, latitude="vehicle/gnss", longitude="other"))
    with contextlib.suppress(PositionError):
        assert reader.read(message(payload)) is None


def vss(**changes):
    return FixReader(FixSource(**{"format": "vss", "latitude": "v/Latitude", "longitude": "v/Longitude", **changes}))


@pytest.mark.parametrize("form", [b"%s", b'{"value": %s}', b'{"data": {"dp": {"value": "%s"}}}', b'"%s"'])
def test_a_latitude_and_a_longitude_topic_make_one_fix(form):
    reader = vss()
    assert reader.read(message(form % b"22.3", 1.0, "v/Latitude")) is None
    fix = reader.read(message(form % b"114.1", 1.25, "v/Longitude"))
    assert (fix.latitude, fix.longitude, fix.doubt_ns) == (22.3, 114.1, S // 4)


def test_each_half_is_used_once():
    reader = vss()
    reader.read(message(b"22.3", 1.0, "v/Latitude"))
    assert reader.read(message(b"114.1", 1.1, "v/Longitude"))
    assert reader.read(message(b"114.2", 1.2, "v/Longitude")) is None
    assert reader.read(message(b"22.4", 1.3, "v/Latitude"))


def test_halves_that_are_far_apart_are_no_pair():
    reader = vss()
    reader.read(message(b"22.3", 1.0, "v/Latitude"))
    assert reader.read(message(b"114.1", 3.5, "v/Longitude")) is None
    assert reader.read(message(b"22.4", 3.6, "v/Latitude")).latitude == 22.4


def test_a_vss_accuracy_counts_while_it_is_fresh():
    reader = vss(accuracy="v/HorizontalAccuracy", default_accuracy_m=50.0)

    def pair(seconds):
        reader.read(message(b"22.3", seconds, "v/Latitude"))
        return reader.read(message(b"114.1", seconds, "v/Longitude")).accuracy_m

    assert pair(1) == 50.0
    assert reader.read(message(b"3.0", 2, "v/HorizontalAccuracy")) is None
    assert pair(3) == 3.0
    assert pair(60) == 50.0


def test_a_topic_that_is_no_half_raises():
    with pytest.raises(PositionError):
        vss().read(message(b"1.0", 1, "v/Altitude"))


def nmea(**changes):
    return FixReader(FixSource(**{"format": "nmea", **changes}))


def test_an_rmc_sentence_gives_place_and_time():
    fix = nmea().read(message(sentence(RMC), wall=NMEA_NOON - 100))
    assert (fix.latitude, fix.longitude) == pytest.approx((22.3, 114.1))
    assert fix.time_ns == NMEA_NOON * S
    assert fix.accuracy_m == 50.0


def test_the_southern_and_western_hemispheres_are_negative():
    fix = nmea().read(message(sentence("GPGGA,101112,3352.5000,S,07030.0000,W,1,08,1.0,0,M,0,M,,")))
    assert (fix.latitude, fix.longitude) == pytest.approx((-33.875, -70.5))


def test_accuracy_is_the_worst_of_gst_and_hdop_while_they_are_fresh():
    reader = nmea()
    fix = reader.read(message(sentence(GST) + sentence(GGA), 1))
    assert fix.accuracy_m == pytest.approx(2.4477 * 5.0, rel=1e-3)
    worse = reader.read(message(sentence(GGA.replace(",0.9,", ",9.0,")), 2))
    assert worse.accuracy_m == pytest.approx(90.0)
    assert reader.read(message(sentence(RMC), 60)).accuracy_m == pytest.approx(90.0)


def test_a_gga_sentence_takes_its_day_from_the_last_rmc_also_over_midnight():
    reader = nmea()
    reader.read(message(sentence(RMC.replace("101112.00", "235959.00")), 1))
    fix = reader.read(message(sentence(GGA.replace("101112.00", "000000.50")), 2))
    assert fix.time_ns == (NMEA_NOON // 86_400 + 1) * 86_400 * S + S // 2


def test_a_place_stands_whatever_sentences_follow_it():
    assert nmea().read(message(sentence(RMC) + b"\r\n" + sentence("GPGSV,1,1,01,01,40,083,46"))) is not None


def test_sentences_without_a_place_give_nothing():
    assert nmea().read(message(sentence(GST) + sentence("GPGSV,1,1,01,01,40,083,46"))) is None


@pytest.mark.parametrize(
    "payload",
    [
        sentence(RMC.replace(",A,", ",V,", 1)),
        sentence(RMC[:-1] + "N"),
        sentence(RMC[:-1] + "E"),
        sentence(RMC[:-1] + "S"),
        sentence(GGA.replace(",E,1,", ",E,0,")),
        sentence(GGA.replace(",E,1,", ",E,6,")),
        sentence(GGA.replace(",E,1,", ",E,8,")),
        sentence(GGA.replace(",E,1,", ",E,,")),
        sentence(GGA.replace("2218.0000", "2260.0000")),
        sentence(GGA.replace("2218.0000", "")),
        sentence(GGA.replace("2218.0000", "9918.0000")),
        sentence(GGA.replace(",N,", ",E,")),
        sentence(GGA.replace("0.9", "nan")),
        sentence(GGA.replace("0.9", "0")),
        sentence(GST.replace(",3.0,4.0,6.0", ",0,0,6.0")),
        sentence(RMC.replace("231126", "311126")),
        sentence(RMC.replace("101112", "251112")),
        sentence("GNRMC,101112.00,A"),
        RMC.encode(),
        b"$" + RMC.encode(),
        sentence(RMC).replace(b"2218", b"2219"),
        sentence(RMC)[:-6],
        sentence(GST)[:-4] + sentence(RMC),
        "$GNRMC,é*00".encode(),
    ],
)
def test_a_sentence_without_a_fix_or_with_damage_raises(payload):
    with pytest.raises(PositionError):
        nmea().read(message(payload))


@given(st.integers(0, len(sentence(RMC)) - 3), st.integers(1, 255))
def test_one_changed_byte_never_gives_another_place(where, flip):
    damaged = bytearray(sentence(RMC))
    damaged[where] ^= flip
    try:
        fix = nmea().read(message(bytes(damaged)))
    except PositionError:
        return
    assert fix is None or (fix.latitude, fix.longitude) == pytest.approx((22.3, 114.1))


def location_fix(**changes):
    covariance = [9.0, 0.0, 0.0, 0.0, 16.0, 0.0, 0.0, 0.0, 100.0]
    values = {"latitude": 22.3, "longitude": 114.1, "position_covariance": covariance, "position_covariance_type": 2}
    return {"timestamp": {"sec": START + 99, "nsec": 500_000_000}, **values, **changes}


def test_a_locationfix_gives_the_longest_axis_of_its_covariance():
    fix = FixReader(FixSource(format="locationfix")).read(message(location_fix()))
    assert fix.accuracy_m == pytest.approx(2.4477 * 4.0, rel=1e-3)
    assert fix.time_ns == (START + 99) * S + S // 2
    turned = location_fix(position_covariance=[10.0, 6.0, 0, 6.0, 10.0, 0, 0, 0, 1.0])
    fix = FixReader(FixSource(format="locationfix")).read(message(turned))
    assert fix.accuracy_m == pytest.approx(2.4477 * 4.0, rel=1e-3)


@pytest.mark.parametrize("kind", [0, "UNKNOWN"])
def test_an_unknown_covariance_is_the_default(kind):
    payload = location_fix(position_covariance_type=kind, position_covariance=[0.0] * 9)
    assert FixReader(FixSource(format="locationfix")).read(message(payload)).accuracy_m == 50.0


@pytest.mark.parametrize(
    "changes",
    [
        {"position_covariance": [1.0] * 8},
        {"position_covariance": [0.0] * 9},
        {"position_covariance": [-1.0] * 9},
        {"position_covariance": ["a"] * 9},
        {"latitude": None},
        {"timestamp": {"sec": 1}},
        {"timestamp": "soon"},
    ],
)
def test_a_damaged_locationfix_raises(changes):
    with pytest.raises(PositionError):
        FixReader(FixSource(format="locationfix")).read(message(location_fix(**changes)))


@pytest.mark.parametrize(
    ("wgs84", "gcj02"),
    [((39.908823, 116.397470), (39.910225, 116.403714)), ((31.230416, 121.473701), (31.228475, 121.478232))],
    ids=["Beijing", "Shanghai"],
)
def test_gcj02_is_shifted_as_public_maps_are(wgs84, gcj02):
    assert sphere_m(gcj02_from_wgs84(wgs84), gcj02) < 5.0


@given(st.floats(3.0, 53.0), st.floats(73.0, 135.0))
def test_gcj02_is_converted_back_to_the_millimetre(latitude, longitude):
    assert sphere_m(wgs84_from_gcj02(gcj02_from_wgs84((latitude, longitude))), (latitude, longitude)) < 1e-3


def test_gcj02_is_wgs84_outside_china():
    assert gcj02_from_wgs84((48.0, 11.0)) == (48.0, 11.0) == wgs84_from_gcj02((48.0, 11.0))


def test_a_gcj02_source_gives_wgs84_and_leaves_both_readings_possible():
    stated = gcj02_from_wgs84((22.5333, 114.13))
    fix = FixReader(FixSource(datum="gcj02", default_accuracy_m=5.0)).read(
        message({"lat": stated[0], "lon": stated[1]})
    )
    place = (fix.latitude, fix.longitude)
    assert sphere_m(place, (22.5333, 114.13)) < 1.0
    assert 300 < sphere_m(place, stated) <= fix.accuracy_m < 1_500


def stream(reader, stated, arrivals, **changes):
    return [
        reader.read(message({"lat": 22.3, "lon": 114.1, "acc": 5, "ts": ts}, arrival, **changes)).doubt_ns / S
        for ts, arrival in zip(stated, arrivals, strict=True)
    ]


def test_a_live_source_has_no_doubt():
    assert stream(FixReader(FULL), [START + t for t in range(20)], range(20)) == [0] * 20


def test_a_retained_fix_is_as_old_as_it_says():
    doubts = stream(FixReader(FULL), [START - 10_800, START + 1, START + 2, START + 3], [0, 1, 2, 3])
    assert doubts[0] == pytest.approx(10_800)
    assert doubts[1:] == [0, 0, 0]


def test_a_first_fix_is_at_least_as_late_as_the_broker_may_have_made_it():
    assert stream(FixReader(FULL), [START], [0], wait=30) == [30]


def test_fixes_that_were_queued_are_late_until_the_source_is_live():
    stated = [START - 60 + t for t in range(60)] + [START + t for t in range(1, 6)]
    arrivals = [t * 0.001 for t in range(60)] + list(range(1, 6))
    doubts = stream(FixReader(FULL), stated, arrivals)
    assert all(doubt >= START + arrival - ts - 0.5 for ts, arrival, doubt in zip(stated, arrivals, doubts, strict=True))
    assert doubts[-1] == 0


def test_after_a_stall_the_fixes_that_come_late_say_so():
    stated = [START + t for t in range(30)]
    arrivals = [float(t) for t in range(10)] + [20 + t * 0.01 for t in range(10)] + [20.5 + t for t in range(10)]
    doubts = stream(FixReader(FULL), stated, arrivals)
    assert doubts[:10] == [0] * 10
    assert doubts[10] == pytest.approx(10, abs=0.6)


def test_a_fix_that_repeats_its_time_grows_older():
    doubts = stream(FixReader(FULL), [START, START + 1, START + 2, START + 3, *[START + 3] * 4], range(8))
    assert doubts[4:] == pytest.approx([1, 2, 3, 4])


def test_without_a_wall_clock_a_source_is_believed_once_it_runs_like_monotonic_time():
    doubts = stream(FixReader(FULL), [START + t for t in range(6)], range(6), wall=0)
    assert doubts[0] == ANY_AGE_NS / S
    assert doubts[-1] == 0


def test_a_wall_clock_that_is_wrong_does_not_make_a_live_source_late_for_long():
    assert stream(FixReader(FULL), [START + t for t in range(6)], range(6), wall=START + 300)[-1] == 0


def test_a_time_from_the_future_makes_later_fixes_late_and_heals():
    freshness = Freshness(window_ns=100 * S)
    for t in range(10):
        freshness.late_ns((START + t) * S, message(b"", t))
    freshness.late_ns((START + 3610) * S, message(b"", 10))
    assert freshness.late_ns((START + 11) * S, message(b"", 11)) >= 3599 * S
    lates = [freshness.late_ns((START + t) * S, message(b"", t)) for t in range(12, 260)]
    assert lates[-1] == 0


def test_after_a_long_silence_a_source_is_judged_anew():
    freshness = Freshness(window_ns=100 * S)
    for t in range(10):
        freshness.late_ns((START + t) * S, message(b"", t))
    assert freshness.late_ns((START + 5) * S, message(b"", 1_000)) == 995 * S


def test_after_a_long_silence_a_time_from_the_future_is_forgotten():
    freshness = Freshness(window_ns=100 * S)
    freshness.late_ns((START + 9_000) * S, message(b"", 1))
    assert freshness.late_ns((START + 1_000) * S, message(b"", 1_000)) == 0


def test_a_first_fix_from_the_future_is_of_any_age():
    assert (
        FixReader(FULL).read(message({"lat": 22.3, "lon": 114.1, "acc": 5, "ts": START + 200})).doubt_ns == ANY_AGE_NS
    )


def test_a_source_without_times_is_as_late_as_the_broker_made_it_wait():
    assert FixReader(FixSource()).read(message({"lat": 22.3, "lon": 114.1}, wait=30)).doubt_ns == 30 * S


@given(st.lists(st.tuples(st.floats(0, 30), st.floats(0, 40)), min_size=5, max_size=40))
def test_a_late_fix_never_claims_to_be_fresher_than_it_is_by_more_than_the_least_delay(steps):
    """Delays are arbitrary; the wall clock is right. Lateness + the least delay so far covers every delay."""
    freshness, now, arrived, least = Freshness(), 1_000.0, 0.0, math.inf
    for gap, delay in steps:
        now += gap + 0.01
        arrived = max(arrived, now + delay)
        true_delay = arrived - now
        least = min(least, true_delay)
        late = freshness.late_ns(round((START + now) * S), message(b"", arrived)) / S
        assert late + least + 0.5 >= true_delay - 1e-6


def test_makers_own_sentences_say_nothing_and_spoil_nothing():
    own = ("PUBX,00,101112.00", "PSTMCPU,31.41,-1,98", "PQTMEPE,2,5.0,4.0,3.0", "PMTK010,001", "PGRME,15.0,M")
    fix = nmea().read(message(b"".join(map(sentence, own)) + sentence(RMC), 1))
    assert fix is not None
    with pytest.raises(PositionError):
        nmea().read(message(sentence(own[0])[:-4] + b"FF\r\n" + sentence(RMC), 1))


@given(
    st.lists(st.tuples(st.floats(0, 5), st.floats(0, 60), st.floats(0, 60) | st.just(0.0)), min_size=3, max_size=60),
    st.integers(-500_000_000, 500_000_000),
)
def test_no_fix_is_fresher_than_the_broker_says_whatever_the_wall_clock_and_the_rate(steps, wall):
    """A broker holds fixes back and hands them over in order; how long each waited is known, with any surplus."""
    freshness, captured, arrived = Freshness(window_ns=100 * S), 1_000.0, 0.0
    for gap, held, surplus in steps:
        captured += gap
        arrived = max(arrived, captured + held)
        late = freshness.late_ns(
            round((START + captured) * S),
            Message(
                topic="",
                payload=b"",
                received_ns=round((START + wall + arrived) * S),
                monotonic_ns=round(arrived * S),
                wait_ns=round((arrived - captured + surplus) * S),
            ),
        )
        assert late / S + 0.5 >= arrived - captured - 1e-6


@pytest.mark.parametrize("rate_hz", [1, 2, 5, 10, 50])
@pytest.mark.parametrize("speed_up", [1.5, 10, 500])
@pytest.mark.parametrize("waits", [True, False], ids=["in the broker", "before it"])
def test_fixes_that_queued_are_as_old_as_they_are_until_the_queue_is_empty(rate_hz, speed_up, waits):
    """The agent was away, or the receiver was cut off from the broker; then fixes come faster than they are made."""
    freshness, queued_s = Freshness(), 600
    for number in range(queued_s * rate_hz * 3):
        captured = number / rate_hz - queued_s
        arrived = max(captured, number / rate_hz / speed_up)
        age = arrived - captured
        wait = age if waits else 0.0
        late = freshness.late_ns(
            round((START + captured) * S),
            Message(
                topic="",
                payload=b"",
                received_ns=round((START + arrived) * S),
                monotonic_ns=round((5_000 + arrived) * S),
                wait_ns=round(wait * S),
            ),
        )
        assert late / S >= age - 0.51
        assert late / S <= age + 0.51
