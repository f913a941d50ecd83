import math
import random
from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from agent.intake.waiting import FOREVER_NS
from agent.messages import Capture, Fix, Message
from agent.places.geodesy import at_least_m, at_most_m, middle, sphere_m
from agent.places.positions import CaptureLimits, PositionHistory, PositionLimits, WallClock, capture_of
from agent.places.tracks import Sighting, Track

S = 10**9
NOW = 1_790_000_000 * S
HOME = (22.30, 114.10)
METRE = 1 / 111_195  # degrees of latitude


def fix(seconds, north_m=0.0, *, accuracy=5.0, place=HOME, doubt=0.0, **changes):
    values = {
        "latitude": place[0] + north_m * METRE,
        "longitude": place[1],
        "accuracy_m": accuracy,
        "time_ns": NOW + round(seconds * S),
        "monotonic_ns": round(seconds * S),
        "doubt_ns": round(doubt * S),
    }
    return Fix(**{**values, **changes})


def at(seconds, doubt=0.0, **changes):
    values = {"time_ns": 0, "monotonic_ns": round(seconds * S), "doubt_ns": round(doubt * S)}
    return Capture(**{**values, **changes})


def history(*fixes, **limits):
    made = PositionHistory(PositionLimits(**limits))
    for one in fixes:
        made.add(one)
    return made


def holds(disc, place):
    return at_least_m((disc.latitude, disc.longitude), place) <= disc.radius_m


def home(north_m=0.0):
    return HOME[0] + north_m * METRE, HOME[1]


def drive(start, end, speed=20.0, step=1):
    return [fix(t, t * speed) for t in range(start, end, step)]


def test_no_fix_gives_no_disc():
    assert history().discs(at(5)) == ()


def test_a_lone_fix_is_not_believed_until_another_one_confirms_it():
    made = history(fix(0))
    assert made.discs(at(0)) == ()
    made.add(fix(1))
    assert made.discs(at(0))


def test_a_steady_drive_gives_a_small_disc_before_and_one_after():
    before, after = history(*drive(0, 100)).discs(at(50.5))
    assert holds(before, home(50.5 * 20))
    assert holds(after, home(50.5 * 20))
    assert max(before.radius_m, after.radius_m) <= 100


def test_a_held_capture_is_narrowed_by_a_later_fix():
    made = history(fix(0), fix(1))
    (before,) = made.discs(at(100))
    made.add(fix(101, 2_000))
    assert min(disc.radius_m for disc in made.discs(at(100))) < 150 < before.radius_m


def test_a_fix_in_a_steady_drive_says_nothing_of_what_is_older_than_the_largest_age():
    made = history(*drive(0, 100), max_age_ns=60 * S)
    assert made.add(fix(100, 2_000)) == 40 * S
    assert made.add(fix(70.5, 1_410)) == 10.5 * S, "one that is late, of what is older than that"
    assert made.add(fix(100, 2_000)) is None


def test_a_fix_that_outvotes_a_lie_is_news_for_all_the_time_in_which_that_had_spoken():
    made = history(*drive(0, 60), fix(60, 100_000), max_age_ns=60 * S)
    (doubtful,) = made.discs(at(5))
    assert doubtful.radius_m > 40_000
    assert made.add(fix(118, 2_360)) == 0
    assert min(disc.radius_m for disc in made.discs(at(5))) < 150


news = st.tuples(
    st.sampled_from([0, 1, 2, 3, 5, 8, -4, -9, -25, 11, 30]),  # seconds since the fix before
    st.sampled_from([0, 0, 0, 0, 5_000, -9_000, 60_000]),  # metres to the north
    st.sampled_from([0, 0, 1, 4]),  # seconds of doubt
)
memories = st.fixed_dictionaries(
    {
        "outvote": st.sampled_from([2, 3, 10]),
        "fixes": st.sampled_from([9, 20, 4096]),
        "tracks": st.sampled_from([3, 32]),
        "horizon_ns": st.sampled_from([40 * S, 3600 * S]),
    }
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(news, min_size=1, max_size=40), memories)
def test_discs_of_captures_before_the_moment_that_a_fix_names_stay_as_they_are(told, limits):
    made, now, captures = PositionHistory(PositionLimits(max_age_ns=10 * S, **limits)), 100, []
    for number, (later, north_m, doubt) in enumerate(told):
        now += later
        captures += [(one, made.discs(one)) for one in (at(now - 5, 1), at(now), at(now + 12.5))]
        since_ns = made.add(fix(now + number / 1000, north_m, doubt=doubt))
        known = [(one, before, made.discs(one)) for one, before in captures]
        changed = [one.monotonic_ns for one, before, after in known if before != after]
        assert not changed or min(changed) >= since_ns
        captures = [(one, after) for one, _, after in known]


def test_a_disc_grows_with_the_time_since_the_fix_and_ends_at_the_largest_age():
    made = history(fix(0), fix(1), max_age_ns=60 * S)
    radii = [made.discs(at(t))[0].radius_m for t in (1, 10, 50)]
    assert radii == sorted(radii)
    assert radii[1] - radii[0] == pytest.approx(9 * 70)
    assert made.discs(at(61)) == ()


def test_doubt_about_the_moment_widens_the_disc_and_too_much_takes_it_away():
    made = history(fix(0), fix(1))
    sure, unsure = made.discs(at(1)), made.discs(at(1, doubt=10))
    assert unsure[0].radius_m - sure[0].radius_m == pytest.approx(700)
    assert made.discs(at(1, doubt=600)) == ()
    assert made.discs(at(1, doubt=-1)) == ()


def test_a_late_fix_has_a_wider_disc():
    fresh, late = history(fix(0), fix(1)), history(fix(0, doubt=8), fix(1, doubt=8))
    assert late.discs(at(1))[0].radius_m - fresh.discs(at(1))[0].radius_m == pytest.approx(8 * 70)


def test_the_car_may_be_told_to_be_slower():
    fast, slow = history(fix(0), fix(1)), history(fix(0), fix(1), max_speed_mps=10.0)
    assert slow.discs(at(100))[0].radius_m < fast.discs(at(100))[0].radius_m / 5


def test_another_boot_says_nothing():
    made = PositionHistory(boot_id="one")
    for one in drive(0, 5):
        made.add(one)
    assert made.discs(at(2, boot_id="one"))
    assert made.discs(at(2, boot_id="two")) == ()


@pytest.mark.parametrize(
    "bad",
    [
        {"latitude": 0.0, "longitude": 0.0},
        {"latitude": math.nan},
        {"longitude": math.inf},
        {"latitude": 90.5},
        {"longitude": 181.0},
        {"accuracy_m": 0.0},
        {"accuracy_m": -1.0},
        {"accuracy_m": math.nan},
        {"accuracy_m": 1e9},
        {"doubt_ns": -1},
    ],
)
def test_an_impossible_fix_says_nothing_and_is_counted(bad):
    made = history(*drive(0, 10))
    before = made.discs(at(9))
    made.add(fix(9.5, 190, **bad))
    assert made.discs(at(9)) == before
    assert made.rejected == 1


def test_a_repeated_fix_does_not_make_an_old_position_new():
    made = history(*drive(0, 10))
    made.add(fix(9, 180, monotonic_ns=60 * S))
    made.add(fix(5, 100, monotonic_ns=61 * S))
    assert made.rejected == 2
    assert made.discs(at(60))[0].radius_m > 50 * 70


def test_fixes_out_of_order_give_the_same_discs():
    fixes = drive(0, 60)
    shuffled = fixes.copy()
    random.Random(1).shuffle(shuffled)
    for t in (0.2, 30.5, 59.9):
        assert history(*shuffled).discs(at(t)) == history(*fixes).discs(at(t))


def test_a_wall_clock_that_is_not_set_or_jumps_changes_nothing():
    fixes = drive(0, 60)
    steady = history(*fixes).discs(at(30.5))
    for shift in (-NOW, 3600 * S, -3600 * S):
        jumping = [fix(t, t * 20, time_ns=NOW + t * S + (shift if t > 20 else 0)) for t in range(60)]
        assert history(*jumping).discs(at(30.5, time_ns=shift)) == steady


def test_after_a_teleport_the_disc_holds_both_places():
    made = history(*drive(0, 60))
    away = [fix(t, 100_000) for t in range(60, 90)]
    for one in away:
        made.add(one)
    for t in (55, 60, 75, 200):
        (disc,) = made.discs(at(t))
        assert holds(disc, home(100_000))
        assert holds(disc, home(min(t, 59) * 20))


def test_a_teleport_is_believed_once_the_old_place_is_too_old_to_matter():
    made = history(*drive(0, 60), max_age_ns=100 * S)
    for t in range(60, 300):
        made.add(fix(t, 100_000))
    assert len(made.discs(at(150))) == 1
    assert made.discs(at(150))[0].radius_m > 40_000
    assert max(disc.radius_m for disc in made.discs(at(250.5))) < 150


def test_a_single_wild_fix_in_a_steady_drive_is_outvoted():
    made = history(*drive(0, 60))
    made.add(fix(60, 500_000))
    assert made.discs(at(60.5))[0].radius_m > 200_000
    for one in drive(61, 90):
        made.add(one)
    assert max(disc.radius_m for disc in made.discs(at(60.5))) < 200


def test_as_many_wild_fixes_as_true_ones_are_not_outvoted():
    truth, wild = drive(0, 60), [fix(t + 0.5, 500_000) for t in range(5, 55)]
    (disc,) = history(*truth, *wild).discs(at(30))
    assert holds(disc, home(600))
    assert holds(disc, home(500_000))


def test_a_vague_fix_is_no_bridge_between_two_places():
    made = history(*drive(0, 60))
    made.add(fix(60, 50_000, accuracy=60_000.0))
    for t in range(61, 70):
        made.add(fix(t, 100_000))
    (disc,) = made.discs(at(65))
    assert holds(disc, home(1_200))


def test_places_around_the_whole_earth_give_no_disc():
    antipode = (-HOME[0], HOME[1] - 180)
    made = history(fix(0), fix(1), fix(2, place=antipode), fix(3, place=antipode))
    assert made.discs(at(2)) == ()


@pytest.mark.parametrize("outvote", [10, 10_000])
def test_two_tracks_that_meet_are_one_from_then_on(outvote):
    made = history(*drive(0, 60), outvote=outvote)
    made.add(fix(60, 60 * 20 + 1_000))  # a kilometre too far: could be driven back within half a minute
    for one in drive(61, 200):
        made.add(one)
    assert len(made) == 201  # the sighting in which they meet stands in both
    assert max(disc.radius_m for disc in made.discs(at(150.5))) < 150
    assert (max(disc.radius_m for disc in made.discs(at(60.5))) < 200) is (outvote == 10)


def test_a_fix_in_between_must_agree_with_what_comes_after_it_too():
    made = history(*(fix(t) for t in (*range(11), *range(20, 31))))
    made.add(fix(19, 600))  # nine seconds from the fix before, one second from the one after
    for t in (15, 19, 19.5):
        assert made.discs(at(t))
        assert all(holds(disc, HOME) for disc in made.discs(at(t)))


def test_two_sightings_of_one_track_that_contradict_each_other_give_one_disc_around_both():
    made = history(fix(0), fix(1))
    away = Sighting(place=home(10_000), radius_m=10.0, monotonic_ns=2 * S, late_ns=0)
    made._tracks[0].insert(away)
    (disc,) = made.discs(at(1.5))
    assert holds(disc, HOME)
    assert holds(disc, home(10_000))


def test_thinning_keeps_the_number_of_fixes_that_a_track_stands_for():
    sightings = [Sighting(place=HOME, radius_m=10.0, monotonic_ns=t * S, late_ns=0) for t in range(100)]
    track = Track(sightings[0])
    for sighting in sightings[1:]:
        track.insert(sighting)
    track.thin(100 * S)
    assert len(track) < 70
    assert track.weight(0, 100 * S) == 100
    assert (track.first_ns, track.last_ns) == (0, 99 * S)


@given(st.lists(st.integers(0, 400), min_size=1, max_size=60), st.integers(1, 200))
def test_thinning_opens_no_long_gap_and_loses_no_weight(moments, gap):
    moments = sorted(moments)
    track = Track(Sighting(place=HOME, radius_m=10.0, monotonic_ns=moments[0], late_ns=0))
    for moment in moments[1:]:
        track.insert(Sighting(place=HOME, radius_m=10.0, monotonic_ns=moment, late_ns=0))
    track.thin(gap)
    kept = [sighting.monotonic_ns for sighting in track._sightings]
    assert track.weight(0, 400) == len(moments)
    assert (kept[0], kept[-1]) == (moments[0], moments[-1])
    for one, other in pairwise(kept):
        assert other - one <= gap or not any(one < moment < other for moment in moments)


def test_thinning_opens_no_gap_in_which_a_true_track_would_fall_silent():
    made = history(*drive(0, 3_000, step=30), fixes=10, max_age_ns=160 * S)
    for t in range(0, 3_000, 50):
        made.add(fix(t, 200_000))  # a lie, long after
        assert all(holds(disc, home(20 * (t // 30 * 30))) for disc in made.discs(at(t)))


def test_forgetting_the_true_track_for_want_of_room_leaves_no_disc_of_the_false_one():
    made = history(*drive(0, 60), *(fix(t, 100_000) for t in range(60, 70)), tracks=1)
    assert made.discs(at(65)) == ()


def test_memory_is_bounded_and_thinning_only_widens():
    full, thin = history(*drive(0, 2_000)), history(*drive(0, 2_000), fixes=100)
    assert len(full) == 2_000
    assert len(thin) <= 100
    assert thin.discs(at(1_999)) == full.discs(at(1_999))
    for t in range(0, 2_000, 37):
        discs = thin.discs(at(t + 0.5))
        assert discs
        assert all(holds(disc, home((t + 0.5) * 20)) for disc in discs)


def test_what_was_forgotten_gives_no_disc_where_it_could_have_spoken():
    made = history(*drive(0, 5_000, step=5), horizon_ns=1_000 * S)
    assert len(made) < 600
    assert made.discs(at(100)) == ()
    assert made.discs(at(4_990))
    made.add(fix(50, 1_000))
    assert made.rejected == 1
    assert made.discs(at(50)) == ()


def test_a_receiver_that_never_agrees_with_itself_stays_bounded_and_gives_no_small_disc():
    rng = random.Random(4)
    made = PositionHistory(PositionLimits(tracks=8))
    for t in range(500):
        made.add(fix(t, place=(rng.uniform(-80, 80), rng.uniform(-180, 180))))
        assert all(disc.radius_m > 100_000 for disc in made.discs(at(t)))
    assert len(made._tracks) <= 8


speeds = st.floats(-70, 70)


@st.composite
def true_drives(draw):
    """A track with a speed for each second, and truthful fixes of it at random moments with random errors."""
    seconds = draw(st.integers(30, 400))
    rng = random.Random(draw(st.integers(0, 2**32)))
    limit = draw(st.sampled_from([5.0, 30.0, 70.0]))
    place, places = (draw(st.floats(1, 75)) * draw(st.sampled_from([-1, 1])), draw(st.floats(-179.9, 179.9))), []
    for _ in range(seconds + 1):
        places.append(place)
        place = moved(place, rng.uniform(0, math.tau), rng.uniform(0, limit) * 0.99)
    fixes = []
    for second in sorted(rng.sample(range(seconds + 1), draw(st.integers(2, min(60, seconds))))):
        accuracy = 10 ** rng.uniform(0, 3)
        seen = moved(places[second], rng.uniform(0, math.tau), rng.uniform(0, 1.9) * accuracy)
        fixes.append(
            Fix(latitude=seen[0], longitude=seen[1], accuracy_m=accuracy, time_ns=second, monotonic_ns=second * S)
        )
    return places, fixes, rng


def moved(place, bearing, metres):
    phi, lam, arc = math.radians(place[0]), math.radians(place[1]), metres / 6_371_008.8
    end = math.asin(math.sin(phi) * math.cos(arc) + math.cos(phi) * math.sin(arc) * math.cos(bearing))
    turn = math.atan2(math.sin(bearing) * math.sin(arc) * math.cos(phi), math.cos(arc) - math.sin(phi) * math.sin(end))
    return math.degrees(end), (math.degrees(lam + turn) + 180) % 360 - 180


relaxed = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@relaxed
@given(true_drives(), st.randoms(use_true_random=False), st.integers(4, 80))
def test_truthful_fixes_in_any_order_always_give_discs_that_hold_the_car(drive_of, order, memory):
    places, fixes, rng = drive_of
    order.shuffle(fixes)
    made = PositionHistory(PositionLimits(fixes=memory, max_age_ns=200 * S))
    for number, one in enumerate(fixes):
        made.add(one)
        if number % 7 == 0 or number == len(fixes) - 1:
            for second in rng.sample(range(len(places)), 12):
                assert all(holds(disc, places[second]) for disc in made.discs(at(second)))


@relaxed
@given(true_drives(), st.integers(1, 40))
def test_gross_lies_in_any_number_never_hide_the_car_while_one_truthful_fix_is_near(drive_of, lies):
    places, fixes, rng = drive_of
    limits = PositionLimits(max_age_ns=120 * S, outvote=10_000)
    told = list(fixes)
    clusters = [(rng.uniform(-80, 80), rng.uniform(-180, 180)) for _ in range(3)]
    for _ in range(lies):
        lie = moved(rng.choice(clusters), rng.uniform(0, math.tau), rng.uniform(0, 5_000))
        if at_least_m(lie, places[0]) > 100_000:  # cannot be driven to within 2 x 120 s and the errors
            moment = rng.uniform(0, len(places))
            told.append(fix(moment, place=lie))
    rng.shuffle(told)
    made = PositionHistory(limits)
    for one in told:
        made.add(one)
    for second in rng.sample(range(len(places)), 20):
        if any(abs(one.monotonic_ns - second * S) <= 119 * S for one in fixes):
            assert all(holds(disc, places[second]) for disc in made.discs(at(second)))


@given(st.floats(-90, 90), st.floats(-180, 180), st.floats(-90, 90), st.floats(-180, 180))
def test_the_bounds_of_a_distance_enclose_it(north, east, other_north, other_east):
    one, other = (north, east), (other_north, other_east)
    assert at_least_m(one, other) <= sphere_m(one, other) <= at_most_m(one, other)
    centre = middle([one, other])
    if centre is not None:
        assert sphere_m(centre, one) == pytest.approx(sphere_m(one, other) / 2, abs=1.0)


def message(received=NOW, monotonic=100 * S, **changes):
    return Message(topic="t", payload=b"", received_ns=received, monotonic_ns=monotonic, **changes)


def span(capture):
    return capture.monotonic_ns - capture.doubt_ns, capture.monotonic_ns + capture.doubt_ns


def test_a_stated_time_is_the_capture_time():
    capture = capture_of(message(), NOW - 5 * S, boot_id="b")
    assert capture == Capture(time_ns=NOW - 5 * S, monotonic_ns=95 * S, doubt_ns=1 * S, boot_id="b")


def test_without_a_statement_the_capture_was_shortly_before_arrival():
    assert span(capture_of(message(), None, boot_id="")) == (98 * S, 100 * S)
    assert span(capture_of(message(wait_ns=30 * S), None, boot_id="")) == (68 * S, 100 * S)


def test_message_that_waited_for_years_as_far_as_is_known_is_labelled_with_its_arrival():
    capture = capture_of(message(wait_ns=FOREVER_NS), None, boot_id="")
    assert 0 <= message().received_ns - capture.time_ns <= 2 * S
    assert span(capture)[0] <= 100 * S - FOREVER_NS


def test_a_statement_from_the_future_leaves_the_largest_delay_open():
    capture = capture_of(message(wait_ns=5 * S), NOW + 3600 * S, boot_id="")
    assert span(capture) == ((100 - 605) * S, 100 * S)
    assert capture.time_ns <= NOW


def test_a_statement_of_just_now_by_a_clock_slightly_fast_is_arrival():
    assert span(capture_of(message(), NOW + S // 2, boot_id="")) == (99 * S, 100 * S)


def test_an_old_statement_leaves_everything_since_then_open():
    low, high = span(capture_of(message(), NOW - 7200 * S, boot_id=""))
    assert low <= (100 - 7200) * S
    assert high >= 100 * S


@pytest.mark.parametrize(("received", "stated"), [(NOW, 12 * S), (12 * S, NOW), (12 * S, 10 * S)])
def test_a_clock_that_was_never_set_leaves_the_largest_delay_open(received, stated):
    capture = capture_of(message(received=received), stated, boot_id="", limits=CaptureLimits(max_delay_ns=60 * S))
    assert span(capture) == (40 * S, 100 * S)


@given(
    true_delay=st.integers(0, 500 * S),
    step=st.integers(-500 * S, 500 * S),
    skew=st.integers(-S, S),
    stated=st.booleans(),
)
def test_the_true_capture_lies_in_the_doubt_over_any_step_that_the_wall_clock_watch_saw(true_delay, step, skew, stated):
    clock = WallClock()
    arrival = 10_000 * S
    offset = NOW
    clock.observe(offset + arrival - true_delay - S, arrival - true_delay - S)
    capture_wall = offset + arrival - true_delay + skew
    seen = clock.observe(offset + step + arrival, arrival)
    received = message(received=offset + step + arrival, monotonic=arrival, wait_ns=true_delay)
    low, high = span(capture_of(received, capture_wall if stated else None, boot_id="", step_ns=seen))
    assert low <= arrival - true_delay <= high


def test_the_wall_clock_watch_forgets_steps_after_its_window():
    clock = WallClock(window_ns=160 * S)
    assert clock.observe(NOW, 0) == 0
    assert clock.observe(NOW + 10 * S + 3600 * S, 10 * S) == 3600 * S
    assert clock.observe(NOW + 100 * S + 3600 * S, 100 * S) == 3600 * S
    assert clock.observe(NOW + 400 * S + 3600 * S, 400 * S) == 0


def test_the_wall_clock_watch_remembers_its_window_however_late_readings_come():
    clock = WallClock(window_ns=160 * S)
    clock.observe(NOW, 0)
    assert clock.observe(NOW + 301 * S, S) == 300 * S
    for _ in range(20):  # a picture's readings, on the other side of a span's end
        for now in (20 * S, 20 * S - 1):
            assert clock.observe(NOW + 300 * S + now, now) == 300 * S


@given(seen=st.lists(st.tuples(st.integers(0, 40), st.sampled_from((0, 0, 1, 2, 50, -3))), min_size=1, max_size=40))
def test_the_wall_clock_watch_knows_the_widest_step_of_the_last_sixteen_spans(seen):
    clock, readings, now = WallClock(window_ns=160 * S), [], 0
    for later, offset in seen:
        now += later * S
        readings.append((now // (10 * S), offset * S))
        recent = [offset for span, offset in readings if span >= now // (10 * S) - 16]
        assert clock.observe(NOW + now + offset * S, now) == max(recent) - min(recent)
