import argparse
import math
import random
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from agent.messages import Capture, Message
from agent.places.geodesy import at_least_m, sphere_m
from agent.places.gnss import FixReader, FixSource
from agent.places.polygons import unpack_polygons
from agent.places.positions import PositionHistory, PositionLimits
from agent.places.regions import RegionMap
from tools import regions
from tools.crossings import BARE, PERIODS_S, ROUTES, Outcome, Rehearsal, fix_at, fixes, track
from tools.importing import comma, mdf
from tools.importing.rows import GNSS_TOPIC

S = 10**9
DRIVES = Path(__file__).parent.parent.parent / "shared" / "data" / "drives"
AARHUS = sorted((DRIVES / "aarhus-horsens").glob("*.MF4"))
COMMA = DRIVES / "comma2k19-example1"
FAST = [rate for rate, period in PERIODS_S.items() if period <= 60]


@cache
def polygons():
    return unpack_polygons(regions.SHIPPED.read_bytes())


@cache
def rehearsal():
    return Rehearsal(polygons())


@pytest.mark.parametrize("rate", FAST)
@pytest.mark.parametrize("name", ROUTES)
def test_a_crossing_misroutes_nothing_and_the_region_changes_once_each_way(name, rate):
    places = track(ROUTES[name][1:-1])
    outcome = rehearsal().drive(places, fixes(places, PERIODS_S[rate], random.Random(1)))
    assert outcome.misrouted == 0
    assert outcome.flips == 2
    assert outcome.held_s(1.0) <= 2 * PERIODS_S[rate]
    assert len(outcome.sent) + outcome.never_sent == outcome.records
    assert outcome.never_sent < outcome.records / 3


@pytest.mark.parametrize("name", ROUTES)
def test_one_fix_in_ten_minutes_holds_much_and_misroutes_nothing(name):
    places = track(ROUTES[name])
    outcome = rehearsal().drive(places, fixes(places, 600, random.Random(1)))
    assert outcome.misrouted == 0
    assert outcome.sent
    assert 0 < outcome.held_s(1.0) <= 600


def lies(places, rng):
    """What a broken or spoofed receiver adds: far places for a while, no place, repeats, late news, vague fixes."""
    true = list(fixes(places, 1, rng))
    told = [fix for fix in true if rng.random() > 0.2]
    for _ in range(8):
        start, city = rng.randrange(len(places)), rng.choice([(31.2, 121.5), (51.5, -0.1), (39.9, 116.4), (1.3, 103.8)])
        told += [fix_at(start + second + 0.5, city) for second in range(rng.choice([1, 5, 60]))]
    for _ in range(30):
        one = rng.choice(true)
        told.append(replace(one, monotonic_ns=one.monotonic_ns + rng.randrange(300) * S))
        told.append(replace(one, latitude=0.0, longitude=0.0, time_ns=one.time_ns + 1))
        told.append(replace(one, latitude=math.nan, time_ns=one.time_ns + 2))
        told.append(replace(one, accuracy_m=5_000.0, latitude=one.latitude + 0.03, time_ns=one.time_ns + 3))
    return told


@pytest.mark.parametrize("name", ["Shenzhen-Hong Kong", "Detroit-Windsor"])
@pytest.mark.parametrize("seed", range(2))
def test_a_lying_receiver_holds_records_back_and_misroutes_none(name, seed):
    places = track(ROUTES[name][1:-1])
    outcome = rehearsal().drive(places, lies(places, random.Random(seed)))
    assert outcome.misrouted == 0
    assert outcome.sent


def test_without_guard_distances_records_would_be_misrouted():
    places = track(ROUTES["Narva"][1:-1])
    bare = Rehearsal(polygons(), guards=BARE)
    assert bare.drive(places, fixes(places, 1, random.Random(1))).misrouted > 0


def test_if_discs_did_not_grow_with_the_age_of_fixes_records_would_be_misrouted():
    places = track(ROUTES["Shenzhen-Hong Kong"])
    frozen = Rehearsal(polygons(), limits=PositionLimits(max_speed_mps=0.1))
    seen = list(fixes(places, 600, random.Random(1)))
    first = [fix_at(fix.monotonic_ns / S + 1, (fix.latitude, fix.longitude)) for fix in seen]
    assert frozen.drive(places, seen + first).misrouted > 0


def test_the_table_has_a_line_for_every_crossing_and_rate(monkeypatch, capsys):
    monkeypatch.setattr(Rehearsal, "drive", lambda *_: Outcome(records=3, never_sent=1, holds_s=[5]))
    assert regions.run(parse("crossings", "--seed", "2")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(ROUTES) * len(PERIODS_S)
    assert all(line.split()[-1] == "0" and " 5 s " in line for line in lines[1:])


def parse(*arguments):
    parser = argparse.ArgumentParser()
    regions.add_parser(parser.add_subparsers(dest="command"))
    return parser.parse_args(["regions", *arguments])


def gnss_messages(rows):
    """Recorded GNSS messages in order, on a monotonic clock that starts with them."""
    ordered = sorted((row for row in rows if row.topic == GNSS_TOPIC), key=lambda row: row.capture_ns)
    start = ordered[0].capture_ns - 10 * S
    return [
        Message(topic=row.topic, payload=row.payload, received_ns=row.capture_ns, monotonic_ns=row.capture_ns - start)
        for row in ordered
    ]


def read_fixes(messages, **source):
    reader = FixReader(FixSource(**{"time": "/ts", **source}))
    return [reader.read(message) for message in messages]


@cache
def aarhus_fixes():
    messages = [m for log in AARHUS for m in gnss_messages(mdf.read(log, DRIVES / "aarhus-horsens/canmod-gps.dbc"))]
    start = messages[0].received_ns - 10 * S
    moved = [replace(message, monotonic_ns=message.received_ns - start) for message in messages]
    return read_fixes(moved, accuracy="/acc", default_accuracy_m=50.0)


def thinned(seen, period_s):
    kept, last = [], -math.inf
    for fix in seen:
        if fix.monotonic_ns - last >= period_s * S:
            kept.append(fix)
            last = fix.monotonic_ns
    return kept


def misses(seen, truth):
    """Discs of the truth's moments that do not hold it, and the moments that have discs."""
    history = PositionHistory()
    for fix in seen:
        history.add(fix)
    wrong = known = 0
    for moment_ns, place in truth:
        discs = history.discs(Capture(time_ns=0, monotonic_ns=moment_ns))
        known += bool(discs)
        wrong += sum(at_least_m((disc.latitude, disc.longitude), place) > disc.radius_m for disc in discs)
    return wrong, known


@pytest.mark.skipif(not AARHUS, reason="needs ../shared/data/drives/aarhus-horsens, which is not in the repository")
@pytest.mark.parametrize("rate", PERIODS_S)
def test_the_aarhus_drive_stays_in_its_discs_and_in_denmark(rate):
    seen = aarhus_fixes()
    truth = [(fix.monotonic_ns, (fix.latitude, fix.longitude)) for fix in seen[::5]]
    kept = thinned(seen, PERIODS_S[rate] * 0.9)
    wrong, known = misses(kept, truth)
    assert wrong == 0
    assert known > (0.6 if PERIODS_S[rate] > 60 else 0.95) * len(truth)
    borders = RegionMap(polygons())
    assert {c for _, place in truth for c in borders.countries_near(*place, 1_000.0)} == {"DK"}


def geodetic(x, y, z):
    """Latitude and longitude of an ECEF position: Bowring's formula on WGS84."""
    a, b = 6_378_137.0, 6_356_752.314245
    p = math.hypot(x, y)
    angle = math.atan2(z * a, p * b)
    north = z + (a * a - b * b) / b * math.sin(angle) ** 3
    return math.degrees(math.atan2(north, p - (a * a - b * b) / a * math.cos(angle) ** 3)), math.degrees(
        math.atan2(y, x)
    )


@pytest.mark.skipif(not COMMA.is_dir(), reason="needs ../shared/data/drives/comma2k19-example1, not in the repository")
@pytest.mark.parametrize("period_s", [0.1, 1, 10])
def test_the_san_francisco_drive_stays_in_the_discs_of_its_live_receiver(period_s):
    seen = read_fixes(gnss_messages(comma.read(COMMA)), accuracy="/acc")
    live_s = np.load(COMMA / "processed_log/GNSS/live_gnss_ublox/t")
    frames_s = np.load(COMMA / "global_pose/frame_times")
    poses = np.load(COMMA / "global_pose/frame_positions")
    shift_ns = seen[0].monotonic_ns - round(live_s[0] * S)
    truth = [(round(t * S) + shift_ns, geodetic(*xyz)) for t, xyz in zip(frames_s[::20], poses[::20], strict=True)]
    assert sphere_m(truth[0][1], (seen[0].latitude, seen[0].longitude)) < 1_000
    assert misses(thinned(seen, period_s * 0.9), truth) == (0, len(truth))
