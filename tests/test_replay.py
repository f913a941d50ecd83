from __future__ import annotations

import asyncio
import json
import queue
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tools.brokers import amqtt, mosquitto, mosquitto_path
from tools.client import Address, connected, from_paho, new_client
from tools.faults import LINKS, FaultError, Faults, Window, parse_faults
from tools.recording import Properties, Recorded, RecordingWriter
from tools.schedule import Options, due, renamed
from tools.stamps import restamped, rfc3339

needs_mosquitto = pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
START = 1_700_000_000_000_000_000
SECOND = 1_000_000_000
ROOT = Path(__file__).parents[1]
WAIT_SECONDS = 20


def at(second, topic="vehicle/telemetry/speed", **changes):
    moment = START + round(second * SECOND)
    values = {"topic": topic, "payload": b"%f" % second, "capture_ns": moment, "receipt_ns": moment}
    return Recorded(**{**values, **changes})


def planned(recorded, **options):
    return list(due(lambda: recorded, Options(**options)))


def seconds(plan):
    return [round(one.at_s, 6) for one in plan]


def test_speed_divides_the_recorded_gaps():
    assert seconds(planned([at(0), at(1), at(10)], speed=10)) == [0, 0.1, 1.0]


def test_window_starts_the_replay_at_its_beginning_and_leaves_the_rest_out():
    plan = planned([at(second) for second in range(10)], start_s=3, end_s=6)
    assert seconds(plan) == [0, 1, 2]
    assert [one.message.payload[:1] for one in plan] == [b"3", b"4", b"5"]


def test_loops_follow_each_other_without_a_gap_or_an_overlap():
    assert seconds(planned([at(0), at(2)], loops=3)) == [0, 2, 2, 4, 4, 6]


def test_empty_recording_ends_even_when_it_loops_for_ever():
    assert planned([], loops=0) == []


@pytest.mark.parametrize("step", [-3600, -12, 90_000, 1_700_000])
def test_clock_that_was_set_while_it_was_recorded_takes_no_time_and_no_message(step):
    recorded = [at(0), at(1), at(2 + step), at(3 + step), at(4 + step)]
    assert seconds(planned(recorded)) == [0, 1, 1, 2, 3]


def test_receipts_in_disorder_and_a_pause_keep_their_places():
    assert seconds(planned([at(0), at(20), at(12), at(21), at(20_000)])) == [0, 20, 12, 21, 20_000]


def test_topics_are_filtered_and_renamed_by_whole_levels():
    recorded = [at(0, "vehicle/a"), at(1, "vehicle/b/c"), at(2, "vehicles/d"), at(3, "other")]
    plan = planned(recorded, only=("vehicle/#", "vehicles/#"), without=("vehicle/a",), rename=(("vehicle", "car"),))
    assert [one.message.topic for one in plan] == ["car/b/c", "vehicles/d"]
    assert renamed("vehicle", (("vehicle", "car"),)) == "car"


def test_same_seed_gives_the_same_faults_and_another_seed_others():
    recorded = [at(second) for second in range(200)]
    faults = Faults(drop=0.2, duplicate=0.2, reorder=0.2, delay=0.2)
    assert planned(recorded, faults=faults, seed=1) == planned(recorded, faults=faults, seed=1)
    assert planned(recorded, faults=faults, seed=1) != planned(recorded, faults=faults, seed=2)


def test_dropping_everything_sends_nothing_and_duplicating_everything_sends_all_twice():
    recorded = [at(second) for second in range(20)]
    assert planned(recorded, faults=Faults(drop=1.0)) == []
    assert len(planned(recorded, faults=Faults(duplicate=1.0))) == 40


def test_gnss_loss_takes_only_fixes_and_only_inside_its_window():
    recorded = [at(second, topic) for second in range(10) for topic in ("vehicle/gnss", "vehicle/speed")]
    plan = planned(recorded, faults=Faults(gnss_loss=(Window(start_s=3, end_s=6),)))
    fixes = [one.at_s for one in plan if one.message.topic == "vehicle/gnss"]
    assert fixes == [0, 1, 2, 6, 7, 8, 9]
    assert len(plan) - len(fixes) == 10


def test_reordering_changes_the_order_but_loses_nothing():
    recorded = [at(second / 10) for second in range(100)]
    sent = [one.message for one in planned(recorded, faults=Faults(reorder=0.5))]
    assert sent != recorded
    assert sorted(sent, key=lambda one: one.receipt_ns) == recorded


def test_tunnel_holds_messages_back_until_its_end_and_loses_none():
    plan = planned([at(second) for second in range(200)], faults=Faults(link=LINKS["tunnel"]))
    assert len(plan) == 200
    assert not [one for one in plan if 136 <= one.at_s < 180]


def test_slow_link_stretches_a_burst_to_its_bandwidth():
    burst = [at(0, payload=bytes(15_000)) for _ in range(10)]
    assert planned(burst, faults=Faults(link=LINKS["edge"]))[-1].at_s >= 10


@settings(deadline=None)
@given(
    st.lists(st.floats(0, 1000), min_size=1, max_size=30).map(sorted),
    st.floats(0.1, 100),
    st.builds(Faults, drop=st.floats(0, 1), duplicate=st.floats(0, 1), reorder=st.floats(0, 1), delay=st.floats(0, 1)),
)
def test_messages_come_in_the_order_of_their_sending_and_never_before_their_time(moments, speed, faults):
    plan = planned([at(moment) for moment in moments], speed=speed, faults=faults)
    assert seconds(plan) == sorted(seconds(plan))
    first = round(moments[0] * SECOND)
    assert all(one.at_s >= (one.message.receipt_ns - START - first) / SECOND / speed - 1e-6 for one in plan)


def test_fault_texts_are_read_and_mistakes_name_the_text():
    faults = parse_faults(["drop=0.5", "delay=0.1:2", "gnss-loss=60-120", "clock-jump=10:-5"], "3g", ("g",))
    assert (faults.drop, faults.delay, faults.delay_s) == (0.5, 0.1, 2)
    assert faults.gnss_loss == (Window(start_s=60, end_s=120),)
    assert faults.jumps == ((10, -5),)
    for wrong in ("drop=2", "delay=0.1", "nothing", "gnss-loss=x-y"):
        with pytest.raises(FaultError, match=wrong):
            parse_faults([wrong], "none", ())
    with pytest.raises(FaultError, match="tunnel"):
        parse_faults([], "5g", ())


@pytest.mark.parametrize(
    ("original", "stamped"),
    [
        (b'{"ts":1700000000.5,"v":1}', b'{"ts":1800000000.25,"v":1}'),
        (b'{"ts":1700000000,"v":1}', b'{"ts":1800000000,"v":1}'),
        (b'{"ts":1700000000500}', b'{"ts":1800000000250}'),
        (b'{"ts":1700000000500000000}', b'{"ts":1800000000250000000}'),
        (b'{"ts":"2023-11-14T22:13:20Z"}', b'{"ts":"2027-01-15T08:00:00.250000000Z"}'),
        (b'{"other":1}', b'{"other":1}'),
        (b"\xff\xd8\xff picture", b"\xff\xd8\xff picture"),
        (b'{"broken', b'{"broken'),
    ],
)
def test_fresh_time_is_written_in_the_unit_of_the_original(original, stamped):
    moment = 1_800_000_000_250_000_000
    assert restamped(at(0, payload=original), moment).payload == stamped


def test_fresh_time_replaces_the_time_property_and_no_other():
    moment = 1_800_000_000_250_000_000
    user = (("a", "1"), ("time", "2023-11-14T22:13:20Z"), ("time", "1700000000000000000"))
    stamped = restamped(at(0, properties=Properties(user=user)), moment)
    assert stamped.properties.user == (("a", "1"), ("time", rfc3339(moment)), ("time", str(moment)))
    assert rfc3339(moment) == "2027-01-15T08:00:00.250000000Z"


@contextmanager
def listening(port, protocol="5"):
    received = queue.Queue()
    subscribed = queue.Queue()
    address = Address(port=port, protocol=protocol)
    client = new_client(address, "listener")
    client.on_message = lambda _client, _data, message: received.put(message)
    client.on_subscribe = lambda *_: subscribed.put(None)
    with connected(client, address, on_connected=lambda own: own.subscribe("#", qos=1)):
        subscribed.get(timeout=WAIT_SECONDS)
        yield received


def write(path, recorded):
    with path.open("wb") as stream, RecordingWriter(stream) as writer:
        for message in recorded:
            writer.write(message)
    return path


def replay(path, port, *options):
    command = [sys.executable, "-m", "tools", "replay", str(path), "--port", str(port), "--quiet", "--json", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


@needs_mosquitto
async def test_broker_receives_payloads_and_properties_exactly_and_the_timing_is_reported(tmp_path):
    properties = Properties(
        content_type="image/jpeg", user=(("time", "1"), ("b", "2"), ("b", "3")), correlation=b"\x00\xff"
    )
    drive = [at(0, payload=b"\xff\xd8\xff\x00", properties=properties), at(0.2, payload=b"", retain=True), at(0.4)]
    path = write(tmp_path / "r.mcap", drive)
    async with mosquitto() as broker:
        with listening(broker.port) as received:
            done = replay(path, broker.port, "--speed", "2")
            got = [received.get(timeout=WAIT_SECONDS) for _ in drive]
    assert [(one.topic, one.payload) for one in got] == [(one.topic, one.payload) for one in drive]
    assert [from_paho(one.properties) for one in got] == [one.properties for one in drive]
    outcome = json.loads(done.stdout)
    assert (outcome["sent"], outcome["acknowledged"], outcome["stopped"]) == (3, 3, False)
    assert outcome["seconds"] >= 0.2
    assert 0 <= outcome["late_p50_ms"] <= outcome["late_p99_ms"] <= outcome["late_max_ms"]


@needs_mosquitto
async def test_no_more_is_in_flight_than_the_broker_takes(tmp_path):
    path = write(tmp_path / "r.mcap", [at(0, qos=2) for _ in range(200)])
    async with mosquitto(config_lines=["max_inflight_messages 3"]) as broker:
        done = replay(path, broker.port, "--fast")
        log = broker.log_path.read_text()
    assert json.loads(done.stdout)["acknowledged"] == 200
    assert "eceive maximum" not in log


@needs_mosquitto
async def test_message_that_the_broker_refuses_is_trouble(tmp_path):
    access = tmp_path / "access"
    access.write_text("topic readwrite vehicle/telemetry/#\n")
    access.chmod(0o644)
    refused = [at(1, topic="vehicle/gnss"), at(1, topic="vehicle/gnss", qos=2)]
    path = write(tmp_path / "r.mcap", [at(0), *refused, at(2, qos=2)])
    async with mosquitto(config_lines=[f"acl_file {access}"]) as broker:
        done = replay(path, broker.port, "--fast")
    assert done.returncode == 3
    outcome = json.loads(done.stdout)
    assert (outcome["sent"], outcome["acknowledged"], outcome["refused"]) == (4, 2, {"Not authorized": 2})
    assert "refused 2 messages: Not authorized" in done.stderr


@needs_mosquitto
async def test_broker_that_restarts_costs_only_what_was_on_its_way_at_qos_0(tmp_path):
    path = write(tmp_path / "r.mcap", [at(number / 50, qos=number % 2) for number in range(400)])
    async with mosquitto() as broker:
        with listening(broker.port) as received:
            command = [sys.executable, "-m", "tools", "replay", path, "--port", str(broker.port), "--quiet", "--json"]
            process = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=subprocess.PIPE)
            await asyncio.to_thread(received.get, timeout=WAIT_SECONDS)
            await broker.restart()
            output, _ = await process.communicate()
    outcome = json.loads(output)
    assert outcome["sent"] == 400
    assert outcome["lost"] > 0
    assert outcome["acknowledged"] + outcome["lost"] == 400
    assert process.returncode == 3


@needs_mosquitto
async def test_topic_that_nobody_may_publish_to_is_named(tmp_path):
    path = write(tmp_path / "r.mcap", [at(0), at(1, topic="vehicle/#")])
    async with mosquitto() as broker:
        done = replay(path, broker.port, "--fast")
    assert done.returncode == 3
    assert "'vehicle/#' cannot be published" in done.stderr


async def test_replay_reaches_an_mqtt_3_1_1_broker(tmp_path):
    path = write(tmp_path / "r.mcap", [at(0, properties=Properties(content_type="text/plain"))])
    async with amqtt() as broker:
        with listening(broker.port, "3.1.1") as received:
            assert replay(path, broker.port, "--protocol", "3.1.1").returncode == 0
            assert received.get(timeout=WAIT_SECONDS).payload == at(0).payload


def test_missing_broker_and_wrong_options_have_their_own_exit_status(tmp_path):
    path = write(tmp_path / "r.mcap", [at(0)])
    unreachable = replay(path, 1)
    assert unreachable.returncode == 3
    assert "127.0.0.1:1" in unreachable.stderr
    assert replay(path, 1, "--rename", "nothing").returncode == 2
    assert replay(path, 1, "--fault", "drop=2").returncode == 2
