from __future__ import annotations

import io
import json
import subprocess
import sys
import tracemalloc
from datetime import UTC, datetime
from pathlib import Path
from random import Random

import numpy as np
import pytest
from PIL import Image

from tools.__main__ import main
from tools.importing import comma, frames, gpx, jsonl, mdf, nmea
from tools.importing.join import Drive, Waiting, joined
from tools.importing.rows import BadRowError, SourceError
from tools.progress import progress
from tools.recording import Properties, contents, messages
from tools.schemas import json_object
from tools.spool import Spool

ROOT = Path(__file__).parents[1]
SECOND = 1_000_000_000
NOON = 1_700_000_000  # 2023-11-14 22:13:20 UTC

# Written by mosquitto_sub 2.0.11 with -F %j.
PLAIN_LINE = (
    '{"tst":"2023-11-14T22:13:20.500000Z+0000","topic":"a/b","qos":1,"retain":0,"payloadlen":7,"mid":1,"properties":'
    '{"user-properties":{"k":"v","k":"w"},"content-type":"text/plain","correlation-data":"cc","response-topic":"r/t",'
    '"payload-format-indicator":1,"message-expiry-interval":100},"payload":"{\\"a\\":1}"}\n'
)
HEX_LINE = '{"tst":"1700000000.014697823","topic":"a/c","qos":0,"retain":1,"hex":"00ff01"}\n'


def put(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def positions(recorded):
    return [(one.capture_ns, *(json_object(one.payload)[key] for key in ("lat", "lon"))) for one in recorded]


def test_lines_of_mosquitto_sub_keep_topic_time_payload_and_repeated_user_properties(tmp_path):
    plain, binary = jsonl.read(put(tmp_path / "r.jsonl", PLAIN_LINE + "\n" + HEX_LINE))
    assert (plain.topic, plain.payload, plain.qos, plain.retain) == ("a/b", b'{"a":1}', 1, False)
    assert plain.receipt_ns == NOON * SECOND + SECOND // 2
    assert plain.properties == Properties(
        payload_format=1,
        expiry_s=100,
        content_type="text/plain",
        response_topic="r/t",
        correlation=b"cc",
        user=(("k", "v"), ("k", "w")),
    )
    assert (binary.topic, binary.payload, binary.qos, binary.retain) == ("a/c", b"\x00\xff\x01", 0, True)
    assert binary.receipt_ns == NOON * SECOND + 14_697_823


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{broken\n", "property name"),
        ("[]\n", "not a JSON object"),
        (HEX_LINE.replace('"topic":"a/c",', ""), "no 'topic'"),
        (HEX_LINE.replace("00ff01", "0"), "hex"),
        (HEX_LINE.replace("1700000000.014697823", "yesterday"), "yesterday"),
        (HEX_LINE.replace("1700000000.014697823", "2023-11-14T22:13:20"), "zone"),
        (PLAIN_LINE.replace('"{\\"a\\":1}"', '""'), "not UTF-8"),
        (HEX_LINE.replace("1700000000.014697823", "1700000000014"), "neither Unix seconds nor ISO 8601"),
        (HEX_LINE.replace("1700000000.014697823", "0001-01-01T00:00:00Z"), "not between 1970 and 2262"),
        (HEX_LINE.replace('"qos":0', '"qos":3'), "no QoS 3"),
        (HEX_LINE.replace("a/c", "a/#"), "not a topic to publish to"),
        (PLAIN_LINE.replace('"message-expiry-interval":100', '"message-expiry-interval":-1'), "expiry"),
        (PLAIN_LINE.replace('"payload-format-indicator":1', '"payload-format-indicator":"x"'), "payload_format"),
        (PLAIN_LINE.replace('{"k":"v","k":"w"}', '[{"k":"v"}]'), "not an object"),
        ("[" * 100_000 + "\n", "recursion"),
    ],
    ids=str,
)
def test_bad_line_is_an_error_that_names_file_and_line_and_the_others_are_read(line, what, tmp_path):
    path = put(tmp_path / "r.jsonl", HEX_LINE + line + HEX_LINE)
    with pytest.raises(BadRowError, match=rf"r\.jsonl:2: .*{what}"):
        list(jsonl.read(path))
    complaints = []
    assert len(list(jsonl.read(path, complaints.append))) == 2
    assert len(complaints) == 1


def test_capture_time_of_a_line_is_the_stated_one(tmp_path):
    line = HEX_LINE.replace("00ff01", b'{"ts":1699999990}'.hex())
    [found] = jsonl.read(put(tmp_path / "r.jsonl", line))
    assert (found.capture_ns, found.receipt_ns) == (1_699_999_990 * SECOND, NOON * SECOND + 14_697_823)


GPX = """<?xml version="1.0"?>
<gpx version="1.1" xmlns="http://www.topografix.com/GPX/1/1"><trk><trkseg>
<trkpt lat="22.5" lon="114.0"><ele>3</ele><time>2023-11-14T22:13:20Z</time><hdop>1.5</hdop></trkpt>
<trkpt lat="22.4" lon="114.1"><time>2023-11-14T22:13:21.25+00:00</time></trkpt>
</trkseg></trk></gpx>
"""


def test_track_points_become_fixes_with_their_time_and_accuracy(tmp_path):
    found = list(gpx.read(put(tmp_path / "t.gpx", GPX)))
    assert positions(found) == [(NOON * SECOND, 22.5, 114.0), (NOON * SECOND + 1_250_000_000, 22.4, 114.1)]
    assert [json_object(one.payload).get("acc") for one in found] == [15.0, None]


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("<time>2023-11-14T22:13:21.25+00:00</time>", "", "4: track point without time"),
        ('lat="22.4"', 'lat="95"', "4: 95.0, 114.1 is not a position"),
        ('lat="22.4"', "", "4: track point without lat"),
        ("<hdop>1.5", "<hdop>nan", "3: .*not JSON"),
        ("2023-11-14T22:13:20Z", "1969-11-14T22:13:20Z", "3: the time is not between 1970"),
        ("+00:00", "", "4: the time has no zone"),
        ("</trkseg>", "", "5: mismatched tag"),
        ("<gpx version", '<!DOCTYPE g [<!ENTITY a "b">]><gpx version', "2: entities"),
    ],
)
def test_bad_track_is_an_error_that_names_file_and_line(old, new, what, tmp_path):
    with pytest.raises(SourceError, match=rf"t\.gpx:{what}"):
        list(gpx.read(put(tmp_path / "t.gpx", GPX.replace(old, new))))


NMEA = """$GPGGA,221320.50,2230.0000,N,11400.0000,E,1,08,1.2,10.0,M,,M,,*60
$GPRMC,221320.50,A,2230.0000,N,11400.0000,E,10.0,90.0,141123,,,A*54
$GPRMC,221321.50,V,,,,,,,141123,,,N*7D
$GPGSV,1,1,00*79
$GPRMC,221322.50,A,3330.6000,S,07030.0000,W,10.0,90.0,141123,,,A*4D
"""


def checked(text):
    """Put right checksums on sentences."""
    lines = []
    for line in text.splitlines():
        body = line[1:].partition("*")[0]
        lines.append(f"${body}*{np.bitwise_xor.reduce(np.frombuffer(body.encode(), np.uint8)):02X}\n")
    return "".join(lines)


def test_valid_rmc_sentences_become_fixes_and_gga_gives_their_accuracy(tmp_path):
    found = list(nmea.read(put(tmp_path / "log.nmea", checked(NMEA))))
    half = SECOND // 2
    assert positions(found) == [
        (NOON * SECOND + half, 22.5, 114.0),
        ((NOON + 2) * SECOND + half, pytest.approx(-33.51), -70.5),
    ]
    assert json_object(found[0].payload)["acc"] == 12.0


def test_makers_own_sentences_are_skipped_also_where_they_end_as_a_standard_one(tmp_path):
    own = "$PUBX,00,221320.50\n$PMTK001,604,3\n$PGRMC,A,,A,,,,,,,,,\n$PXGGA,,,,,,,,nonsense\n!AIVDM,1,1,,A,1,0\n"
    found = list(nmea.read(put(tmp_path / "log.nmea", checked(own + NMEA).replace("$AIVDM", "!AIVDM"))))
    assert len(found) == 2


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("$GPRMC,221320.50,A,2230.0000,N,11400.0000,E,10.0,90.0,141123,,,A*00", "checksum"),
        ("noise", "not an NMEA sentence"),
        ("$GPRMC,221320.50,A,2230.0000,N", "fields are missing|out of range"),
        ("$GPRMC,996020.50,A,2230.0000,N,11400.0000,E,10.0,90.0,141123,,,A", "not a time"),
    ],
)
def test_damaged_sentence_is_an_error_that_names_file_and_line(line, what, tmp_path):
    with pytest.raises(BadRowError, match=rf"log\.nmea:2: .*({what})"):
        list(nmea.read(put(tmp_path / "log.nmea", checked(NMEA.splitlines()[0]) + line + "\n")))


def picture(value):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(out, "JPEG")
    return out.getvalue()


def test_frames_are_ordered_by_the_time_in_their_names_or_in_the_table(tmp_path):
    for name, value in (("frame_00010s.jpg", 10), ("frame_00002s.jpg", 2), ("frame_2500ms.jpg", 25)):
        (tmp_path / name).write_bytes(picture(value))
    found = list(frames.read(tmp_path))
    assert [one.capture_ns for one in found] == [2 * SECOND, 5 * SECOND // 2, 10 * SECOND]
    assert [one.payload for one in found] == [picture(2), picture(25), picture(10)]
    assert found[0].properties.user == (("time", "2000000000"),)
    put(tmp_path / "times.csv", "file,seconds\nframe_00010s.jpg,1\nframe_00002s.jpg,3\n")
    assert [one.payload for one in frames.read(tmp_path)] == [picture(10), picture(2)]
    put(tmp_path / "times.csv", "file,seconds\nmissing.jpg,1\n")
    with pytest.raises(BadRowError, match=r"times\.csv:2: no file missing\.jpg"):
        list(frames.read(tmp_path))


def test_picture_whose_time_is_none_is_a_bad_row(tmp_path):
    for name in ("1760000000000.jpg", "5s.jpg"):
        (tmp_path / name).write_bytes(picture(1))
    with pytest.raises(BadRowError, match=r"1760000000000\.jpg.*not a time between"):
        list(frames.read(tmp_path))
    complaints = []
    assert [one.capture_ns for one in frames.read(tmp_path, complaints.append)] == [5 * SECOND]
    put(tmp_path / "times.csv", "\ufefffile,seconds\n5s.jpg,nan\n5s.jpg,7\n")
    assert [one.capture_ns for one in frames.read(tmp_path, complaints.append)] == [7 * SECOND]
    assert len(complaints) == 2


def test_folder_without_timed_pictures_is_an_error(tmp_path):
    with pytest.raises(SourceError, match="no pictures"):
        list(frames.read(tmp_path))
    (tmp_path / "untimed.jpg").write_bytes(picture(1))
    with pytest.raises(BadRowError, match="does not end in a time"):
        list(frames.read(tmp_path))


def test_comma2k19_segment_gives_fixes_and_can_values_on_one_clock(tmp_path):
    def series(name, times, values):
        folder = tmp_path / "processed_log" / name
        folder.mkdir(parents=True)
        for kind, array in (("t", times), ("value", values)):
            with (folder / kind).open("wb") as stream:
                np.save(stream, np.array(array))

    series(
        "GNSS/live_gnss_ublox",
        [100.0, 101.0],
        [[37.7, -122.4, 8, NOON * 1000.0, 33, 2], [37.8, -122.5, 8, NOON * 1000.0 + 1000, 33, 2]],
    )
    series("CAN/speed", [100.5, 100.51, 101.5], [[7.5], [7.6], [8.5]])
    series("CAN/steering_angle", [100.5], [-0.4])
    found = list(comma.read(tmp_path))
    assert positions(found[:2]) == [(NOON * SECOND, 37.7, -122.4), ((NOON + 1) * SECOND, 37.8, -122.5)]
    assert [(one.topic, one.capture_ns) for one in found[2:]] == [
        ("vehicle/telemetry/speed", NOON * SECOND + SECOND // 2),
        ("vehicle/telemetry/speed", (NOON + 1) * SECOND + SECOND // 2),
        ("vehicle/telemetry/steering", NOON * SECOND + SECOND // 2),
    ]
    with pytest.raises(SourceError, match="not a readable series"):
        list(comma.read(tmp_path / "elsewhere"))
    with (tmp_path / "processed_log/GNSS/live_gnss_ublox/value").open("wb") as stream:
        np.save(stream, np.full((2, 6), np.nan))
    with pytest.raises(SourceError, match=r"processed_log: .*NaN"):
        list(comma.read(tmp_path))


DBC = """VERSION ""

BO_ 3 gnss_pos: 8 X
 SG_ PositionAccuracy : 58|6@1+ (1,0) [0|63] "m" X
 SG_ Latitude : 1|28@1+ (1e-06,-90) [-90|90] "deg" X
 SG_ Longitude : 29|29@1+ (1e-06,-180) [-180|180] "deg" X
 SG_ PositionValid : 0|1@1+ (1,0) [0|1] "" X

BO_ 7 gnss_speed: 2 X
 SG_ Speed : 0|16@1+ (0.01,0) [0|100] "m/s" X
"""


def bus_log(path, rows):
    """Write CAN frames (seconds, id, data) as an MDF4 bus log."""
    asammdf = pytest.importorskip("asammdf")
    from asammdf.blocks.v4_blocks import SourceInformation  # noqa: PLC0415 - an optional extra

    kinds = [("CAN_DataFrame.BusChannel", "u1"), ("CAN_DataFrame.ID", "<u4"), ("CAN_DataFrame.IDE", "u1")]
    kinds += [("CAN_DataFrame.DLC", "u1"), ("CAN_DataFrame.DataLength", "u1"), ("CAN_DataFrame.DataBytes", "(8,)u1")]
    samples = np.array(
        [(1, number, 0, 8, 8, list(data.ljust(8, b"\0"))) for _, number, data in rows], dtype=np.dtype(kinds)
    )
    source = SourceInformation(source_type=2, bus_type=2)
    signal = asammdf.Signal(samples, [row[0] for row in rows], name="CAN_DataFrame", source=source)
    with asammdf.MDF(version="4.10") as log:
        log.append([signal], acq_source=asammdf.blocks.source_utils.Source("CAN", "CAN", "", 2, 2))
        log.groups[0].channel_group.flags |= asammdf.blocks.v4_constants.FLAG_CG_BUS_EVENT
        log.header.start_time = datetime.fromtimestamp(NOON, UTC)
        log.save(path)


def position_bytes(latitude, longitude, accuracy, *, valid=True):
    word = int(valid) | round((latitude + 90) * 1e6) << 1 | round((longitude + 180) * 1e6) << 29 | accuracy << 58
    return word.to_bytes(8, "little")


def test_bus_log_gives_valid_positions_and_telemetry_by_the_dbc(tmp_path):
    dbc = put(tmp_path / "gps.dbc", DBC)
    rows = [
        (0.5, 3, position_bytes(56.1, 10.1, 3)),
        (1.0, 7, (1250).to_bytes(2, "little")),
        (1.5, 3, position_bytes(0.0, 0.0, 63, valid=False)),
    ]
    bus_log(tmp_path / "log.mf4", rows)
    found = {one.topic: one for one in mdf.read(tmp_path / "log.mf4", dbc)}
    assert positions([found["vehicle/gnss"]]) == [(NOON * SECOND + SECOND // 2, 56.1, 10.1)]
    assert json_object(found["vehicle/gnss"].payload)["acc"] == 3
    assert json_object(found["vehicle/telemetry/gnss_speed"].payload)["Speed"] == 12.5


def test_position_that_a_receiver_without_a_fix_gives_is_a_bad_row_of_the_bus_log(tmp_path):
    dbc = put(tmp_path / "gps.dbc", DBC)
    bus_log(tmp_path / "log.mf4", [(0.5, 3, position_bytes(150.0, 10.1, 3)), (1.5, 3, position_bytes(56.1, 10.1, 3))])
    with pytest.raises(BadRowError, match=r"log\.mf4:1: .*150\.0, 10\.1 is not a position"):
        list(mdf.read(tmp_path / "log.mf4", dbc))
    complaints = []
    assert len(list(mdf.read(tmp_path / "log.mf4", dbc, complaints.append))) == 1
    assert len(complaints) == 1


def test_file_that_is_no_bus_log_and_a_missing_dbc_are_errors(tmp_path):
    pytest.importorskip("asammdf")
    dbc = put(tmp_path / "gps.dbc", DBC)
    with pytest.raises(SourceError, match=r"log\.mf4"):
        list(mdf.read(put(tmp_path / "log.mf4", "no MDF"), dbc))
    with pytest.raises(SourceError, match=r"none\.dbc"):
        list(mdf.read(tmp_path / "log.mf4", tmp_path / "none.dbc"))


def drive(name, messages):
    spool = Spool(io.BytesIO())
    return Drive(name=name, messages=tuple(Waiting.of(one, spool) for one in messages))


def test_drives_joined_start_together_and_say_that_they_are_a_composite(tmp_path):
    track = tuple(gpx.read(put(tmp_path / "t.gpx", GPX)))
    pictures = tmp_path / "frames"
    pictures.mkdir()
    for second in (40, 41):
        (pictures / f"{second}s.jpg").write_bytes(picture(second))
    placed, provenance = joined([drive("t", track), drive("f", frames.read(pictures))])
    found = [one.read() for one in placed]
    assert provenance["composite"] == "true"
    assert [one.capture_ns - NOON * SECOND for one in found] == [0, 0, SECOND, 1_250_000_000]
    assert found[1].properties.user == (("time", str(NOON * SECOND)),)
    assert joined([drive("t", track)])[1]["composite"] == "false"


def test_car_of_a_composite_is_in_one_place_only(tmp_path):
    track = tuple(gpx.read(put(tmp_path / "t.gpx", GPX)))
    found, provenance = joined([drive("one", track), drive("two", track)])
    assert len(found) == len(track)
    assert "2 positions left out" in provenance["source 2"]
    early, _ = joined([drive("one", track)], start_ns=-SECOND)
    with pytest.raises(SourceError, match="1970"):
        early[0].read()


def imported(*arguments):
    command = [sys.executable, "-m", "tools", "import", "--quiet", *(str(one) for one in arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_command_writes_a_recording_with_its_provenance(tmp_path):
    out = tmp_path / "out.mcap"
    lines = put(tmp_path / "r.jsonl", HEX_LINE)
    track = put(tmp_path / "t.gpx", GPX)
    done = imported("-o", out, "--jsonl", lines, "--gpx", track, "--json", "--start", "2024-01-01T00:00:00+00:00")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["count"] == 3
    assert contents(out).composite
    assert [one.receipt_ns // SECOND for one in messages(out)] == [1_704_067_200, 1_704_067_200, 1_704_067_201]


def test_memory_of_an_import_does_not_grow_with_the_pictures(tmp_path):
    pictures, random = tmp_path / "frames", Random(1)
    pictures.mkdir()
    for second in range(40):
        (pictures / f"{second}s.jpg").write_bytes(b"\xff\xd8\xff" + random.randbytes(1_000_000))
    tracemalloc.start()
    status = main(["import", "--quiet", "-o", str(tmp_path / "out.mcap"), "--frames", str(pictures)])
    _now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert status == 0
    assert len(list(messages(tmp_path / "out.mcap"))) == 40
    assert peak < 20_000_000


def test_command_stops_at_a_bad_row_or_skips_it_when_told_to(tmp_path):
    out = tmp_path / "out.mcap"
    lines = put(tmp_path / "r.jsonl", HEX_LINE + "bad\n")
    stopped = imported("-o", out, "--jsonl", lines)
    assert stopped.returncode == 3
    assert "r.jsonl:2" in stopped.stderr
    assert not out.exists()
    skipped = imported("-o", out, "--jsonl", lines, "--skip-bad")
    assert skipped.returncode == 0
    assert "r.jsonl:2" in skipped.stderr
    assert len(list(messages(out))) == 1


def test_progress_shows_topics_with_brackets_as_they_are(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress("reading", 2) as advance:
        advance(1, "a/[left]/[/red]")
    assert "a/[left]/[/red]" in capsys.readouterr().err


def test_command_without_a_source_is_wrong_usage(tmp_path):
    assert imported("-o", tmp_path / "out.mcap").returncode == 2
    assert imported("-o", tmp_path / "out.mcap", "--mdf", "log.mf4").returncode == 2
