"""What the benchmark prints is what it measured, and its load is what it says."""

import asyncio
import json
import os
import time

import pytest

from tools.__main__ import main
from tools.benchmarks import backlog, machine, stands
from tools.benchmarks.pumps import Meter, Numbers, Readings, Sink, Source, Stream, pace
from tools.benchmarks.results import Goal, Row, quantile, ratios, table
from tools.brokers import mosquitto, mosquitto_path

needs_mosquitto = pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
FASTER = Goal(must=8, aim=20, at_least=True)
LOWER = Goal(must=50, aim=15, at_least=False, unit=" ms")


@pytest.mark.parametrize(
    ("goal", "value", "verdict"),
    [
        (FASTER, 20, "aim"),
        (FASTER, 19.9, "must"),
        (FASTER, 7.9, "missed"),
        (LOWER, 15, "aim"),
        (LOWER, 50, "must"),
        (LOWER, 50.1, "missed"),
    ],
)
def test_goal_judges_in_its_direction(goal, value, verdict):
    assert goal.judged(value) == verdict


def test_row_is_judged_by_its_median_and_shows_its_spread():
    row = Row(name="telemetry", what="a", beside="b", goal=FASTER, values=(7.0, 9.0, 100.0), parts={"x": [1.0, 3.0]})
    found = row.as_dict()
    assert (row.verdict, found["values"]["median"], found["values"]["min"], found["values"]["max"]) == (
        "must",
        9,
        7,
        100,
    )
    text = table([row])
    assert "9x" in text
    assert "7 - 100" in text
    assert "x: 2 (1 - 3)" in text


def test_peer_that_is_missing_is_told_with_the_reason():
    row = Row(name="picture", what="a", beside="b", goal=FASTER, why_not="deface cannot be run here: no such module")
    assert row.verdict == "not run"
    assert "no such module" in table([row])


def test_ratio_stands_between_the_figures_of_one_turn():
    assert ratios([10, 30], [5, 10]) == (2, 3)


@pytest.mark.parametrize(("share", "value"), [(0.5, 50), (0.99, 99), (1, 100), (0, 1)])
def test_quantile_is_a_value_that_so_many_do_not_exceed(share, value):
    assert quantile(range(1, 101), share) == value


def test_own_process_has_taken_time_and_memory():
    used = machine.usage(os.getpid())
    assert used.cpu_s > 0
    assert 0 < used.proportional_bytes <= used.resident_bytes


@pytest.mark.parametrize("size", [100, 1024, 100_000])
def test_payload_has_its_size_its_number_and_its_moment(size):
    numbers = Numbers(size)
    first, second = numbers(5), numbers(6)
    assert len(first) == size
    assert (json.loads(first)["n"], json.loads(second)["n"], json.loads(second)["due"]) == (0, 1, 6)


@needs_mosquitto
async def test_source_keeps_its_rate_and_the_sink_hears_each_message_once():
    numbers, started = Numbers(300), time.monotonic()
    async with mosquitto() as broker:
        source, sink = Source(), Sink()
        await source.open(broker.port, "source")
        await sink.listen(broker.port, "sink")
        streams = [Stream(topic="a", per_s=200, payload=numbers), Stream(topic="b", per_s=10, payload=lambda _: b"-")]
        await pace(source, streams, 0.5)
        await sink.until(100)
        while sink.others < 5:
            await sink.hear("messages without a stamp stay away")
        source.close()
        sink.close()
    assert sorted(sink.arrived) == list(range(100))
    assert (sink.duplicates, source.sent) == (0, 105)
    assert min(sink.latencies_ms()) > 0
    assert time.monotonic() - started >= 0.5


def test_readings_have_their_size_and_do_not_repeat_within_a_batch():
    readings = Readings(1024)
    payloads = [readings(5) for _ in range(256)]
    assert len({payload[60:] for payload in payloads}) == 256
    assert all(abs(len(payload) - 1024) < 16 for payload in payloads)
    found = json.loads(payloads[7])
    assert (found["n"], found["due"]) == (7, 5)
    assert len(found["samples"]) > 100


@needs_mosquitto
async def test_batched_and_lone_messages_are_each_heard_once_and_the_brokers_bytes_are_counted(tmp_path):
    batches = {"batch_records": 16, "batch_compression": "zstd", "in_flight": 1}
    async with stands.agent(tmp_path / "agent", 512, endpoint=batches) as stand:
        assert await stand.rate(200) > 0
        assert sorted(stand.sink.arrived) == [*range(stand.numbers.made - 200, stand.numbers.made)]
        assert stand.sink.duplicates == 0
        assert stand.sink.publishes < 200
        meter = Meter()
        await meter.watch(stand.region.port, "meter")
        before = await meter.read()
        await stand.rate(100)
        assert 2_000 < await meter.read() - before < 100 * 1000
        meter.close()


@needs_mosquitto
async def test_agent_on_its_stand_forwards_all_and_its_stored_records_are_real(tmp_path):
    async with stands.agent(tmp_path / "agent", 512) as stand:
        assert await stand.rate(50) > 0
        assert len(stand.sink.arrived) == 50
        assert len(stand.pids) == 2
        assert all(machine.usage(pid).resident_bytes for pid in stand.pids)
        status = await stand.agent.until(lambda found, _pid: not found["counts"]["pending"], 30)
        assert status["counts"]["delivered"] >= 50
    folder = tmp_path / "full"
    stands.configure(folder, 1, 2)
    await asyncio.to_thread(backlog.fill, folder, 20)
    counts = backlog.Ledger.read_counts(folder / "state" / "ledger.sqlite")
    assert (counts.pending, counts.held) == (20, 0)


def test_command_writes_its_figures_and_the_machine(tmp_path, capsys):
    target = tmp_path / "bench.json"
    assert main(["bench", "--only", "floor", "--rounds", "1", "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert found["machine"]["cores"] >= 1
    (row,) = found["rows"]
    assert row["row"] == "floor"
    assert row["values"]["n"] >= 1
    assert "one inference" in capsys.readouterr().out
