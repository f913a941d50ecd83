"""The reference consumer: what it counts as good, that it stores each record once, and that it tells what is wrong."""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import json
import signal
import sqlite3
import sys
from contextlib import AsyncExitStack, closing

import pytest
import stream
from consumers import SECONDS, SUBSCRIPTIONS, consumer, subscribed, until
from hypothesis import given, settings
from hypothesis import strategies as st

from agent import presence
from agent.attributes import texts
from agent.envelope import CONTENT_TYPE, unpack
from agent.packets import Outgoing, Session
from tools.brokers import free_port, mosquitto, mosquitto_path
from tools.listening import receiving
from tools.listening.board import Board
from tools.listening.files import StoreError, needed, partition, store
from tools.listening.inbox import Arrival, Inbox, Roll, Row
from tools.listening.judging import Expectations, Verdict, judge

needs_mosquitto = pytest.mark.skipif(mosquitto_path() is None, reason="mosquitto is not installed")
KEYS = {stream.SIGNER.key_id: stream.KEY.public_key()}
HERE = Expectations(keys=KEYS, may_hold=lambda regions, _class: {"cn", "hk"}.issuperset(regions))


def _judged(sent, expectations=HERE):
    return judge(sent.topic, sent.payload, sent.content_type, tuple(sent.properties), expectations)


@pytest.mark.parametrize("wire", ["msgpack", "binary"])
def test_only_a_signed_record_of_a_permitted_region_is_good(wire):
    def verdict(attributes, signer=stream.SIGNER):
        return _judged(stream.outgoing(attributes, b"{}", wire=wire, signer=signer)).verdict

    assert verdict(stream.TELEMETRY) is Verdict.GOOD
    assert verdict(stream.PICTURE) is Verdict.GOOD
    assert verdict(stream.TELEMETRY, None) is Verdict.UNSIGNED
    assert verdict(stream.TELEMETRY, stream.STRANGER) is Verdict.FORGED
    assert verdict(stream.record(1, regions=("us",))) is Verdict.MISPLACED
    assert verdict(stream.record(1, regions=("cn", "us"))) is Verdict.MISPLACED
    assert verdict(stream.record(1, regions=("us",)), None) is Verdict.UNSIGNED


@given(st.data())
@settings(max_examples=200)
def test_no_flipped_byte_makes_a_good_record(drawn):
    wire = drawn.draw(st.sampled_from(("msgpack", "binary")))
    sent = stream.outgoing(stream.PICTURE, b"picture", wire=wire)
    at = drawn.draw(st.integers(0, len(sent.payload) - 1))
    changed = bytearray(sent.payload)
    changed[at] ^= drawn.draw(st.integers(1, 255))
    assert _judged(dataclasses.replace(sent, payload=bytes(changed))).verdict in {Verdict.FORGED, Verdict.MALFORMED}


def test_junk_is_malformed_and_birth_is_a_notice():
    born = presence.birth(
        presence.Session(id="s", source="urn:v", vehicle="car-7"), 0, version="0", policy_version="0", keyid=None
    )
    assert _judged(Outgoing(topic="cn/a/b", payload=b"junk")).verdict is Verdict.MALFORMED
    assert _judged(Outgoing(topic="cn/a/b", payload=b"junk", content_type="text/plain")).verdict is Verdict.MALFORMED
    assert _judged(Outgoing(topic=born.topic, payload=born.payload)).verdict is Verdict.NOTICE
    for content_type in (None, CONTENT_TYPE, presence.CONTENT_TYPE):
        sent = Outgoing(topic="cn/a/b", payload=born.payload, content_type=content_type)
        assert _judged(sent).verdict is (Verdict.NOTICE if content_type == presence.CONTENT_TYPE else Verdict.MALFORMED)


def test_without_keys_the_signature_is_not_looked_at_but_the_region_is():
    blind = dataclasses.replace(HERE, keys=None)
    assert _judged(stream.outgoing(stream.TELEMETRY, b"", signer=None), blind).verdict is Verdict.GOOD
    assert _judged(stream.outgoing(stream.record(1, regions=("us",)), b""), blind).verdict is Verdict.MISPLACED


def _arrival(number, **changes):
    packed = stream.outgoing(stream.record(number, **changes), stream.data_of(number)).payload
    return Arrival(topic="cn/car-7/t", envelope=unpack(packed))


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 7))
def test_every_record_is_fresh_once_and_the_gaps_are_those_that_never_came(numbers, size):
    inbox = Inbox(None, "a")
    fresh = [
        number
        for at in range(0, len(numbers), size)
        for number, new in zip(
            numbers[at : at + size], inbox.take([_arrival(n) for n in numbers[at : at + size]]), strict=True
        )
        if new
    ]
    inbox.close()
    assert sorted(fresh) == sorted(set(numbers))


@given(st.sets(st.integers(0, 40), min_size=1).flatmap(lambda found: st.permutations(sorted(found))))
def test_gaps_are_counted_whatever_the_order_of_arrival(numbers):
    inbox = Inbox(None, "a")
    inbox.take([_arrival(number) for number in numbers])
    missing = inbox.missing()
    inbox.close()
    assert missing == {"cn": max(numbers) - min(numbers) + 1 - len(numbers)}


def test_gaps_are_counted_per_source_and_region():
    inbox = Inbox(None, "a")
    one = [_arrival(number, regions=("cn",)) for number in (0, 2)]
    other = [_arrival(number, regions=("hk",)) for number in (0, 1)]
    third = [_arrival(number, source="urn:vehicle:b") for number in (5, 9)]
    inbox.take([*one, *other, *third])
    assert inbox.missing() == {"cn": 1 + 3, "hk": 0}
    inbox.close()


def test_a_duplicate_is_known_to_every_consumer_of_the_folder_and_after_a_restart(tmp_path):
    path = tmp_path / "inbox"
    first, second = Inbox(path, "first"), Inbox(path, "second")
    assert first.take([_arrival(1)]) == [True]
    assert second.take([_arrival(1), _arrival(2), _arrival(2)]) == [False, True, False]
    first.close()
    second.close()
    again = Inbox(path, "third")
    assert again.take([_arrival(1), _arrival(2), _arrival(3)]) == [False, False, True]
    again.close()


def test_what_is_remembered_is_bounded():
    inbox = Inbox(None, "a", remember=3)
    inbox.take([_arrival(number) for number in range(5)])
    assert inbox.take([_arrival(4), _arrival(3), _arrival(2), _arrival(0)]) == [False, False, False, True]
    inbox.close()


def test_a_roll_that_was_cut_short_gives_the_same_files_again(tmp_path):
    inbox = Inbox(tmp_path / "inbox", "a")
    inbox.take([_arrival(number) for number in range(5)])
    roll = inbox.roll(3, 1 << 20)
    written = {path: path.read_bytes() for path in store(tmp_path, "jsonl", "a", roll)}
    inbox.close()  # killed before it could say that the files are there

    later = Inbox(tmp_path / "inbox", "a")
    later.take([_arrival(9)])
    again = later.roll(100, 1 << 20)
    assert again == roll
    assert {path: path.read_bytes() for path in store(tmp_path, "jsonl", "a", again)} == written
    later.written(again)
    rest = later.roll(100, 1 << 20)
    assert [row.fields["sequence"][-1] for row in rest.rows] == ["3", "4", "9"]
    later.written(rest)
    assert later.roll(100, 1 << 20) is None
    later.close()


def test_a_roll_keeps_to_its_bytes_but_is_never_empty(tmp_path):
    inbox = Inbox(tmp_path / "inbox", "a")
    inbox.take([_arrival(number) for number in range(4)])
    one = inbox.roll(100, 1)
    assert len(one.rows) == 1
    inbox.written(one)
    size = sum(len(json.dumps(row.fields)) + len(row.data) for row in one.rows)
    two = inbox.roll(100, int(size * 2.5))
    assert len(two.rows) == 2
    inbox.close()


def _row(number=1, data=b'{"a":\n1.0}', **changes):
    inbox_row = stream.record(number, **changes)
    packed = unpack(stream.outgoing(inbox_row, data).payload)
    return Row(fields={**texts(packed.attributes), "topic": "cn/car-7/t", "keyid": packed.keyid}, data=data)


def _lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_json_data_stands_in_a_line_as_it_came_and_all_else_in_base64(tmp_path):
    rows = [
        _row(1),
        _row(2, data=b'{"n": 12345678901234567890.10}'),
        _row(3, data=b"{broken"),
        _row(4, data=b"NaN"),
        _row(5, data=b"\xff"),
        _row(6, data=b"[" * 100_000),
        _row(7, data=JPEG, datacontenttype="image/jpeg"),
    ]
    [path] = store(tmp_path, "jsonl", "a", Roll(number=1, rows=rows))
    lines = _lines(path)
    assert lines[0]["data"] == {"a": 1.0}
    assert b'"data": {"n": 12345678901234567890.10}' in path.read_bytes()
    for line, row in zip(lines[2:], rows[2:], strict=True):
        assert base64.b64decode(line["data_base64"]) == row.data
    assert all(line["topic"] == "cn/car-7/t" and line["keyid"] == stream.SIGNER.key_id for line in lines)


JPEG = b"\xff\xd8\xff\xe0picture\xff\xd9"


def test_files_are_partitioned_by_region_date_and_class_and_no_name_leaves_the_folder(tmp_path):
    rows = [_row(1), _row(100_000), _row(2, regions=("cn", "hk")), _row(3, dataclassification="../../up")]
    paths = {
        str(path.parent.relative_to(tmp_path)) for path in store(tmp_path, "jsonl", "a", Roll(number=1, rows=rows))
    }
    assert paths == {
        "region=cn/date=2026-09-21/class=telemetry",
        "region=cn/date=2026-09-22/class=telemetry",
        "region=cn,hk/date=2026-09-21/class=telemetry",
        "region=cn/date=2026-09-21/class=..%2F..%2Fup",
    }
    assert partition(rows[0].fields).parts[0] == "region=cn"
    assert not list(tmp_path.rglob("*.tmp"))


def test_parquet_files_hold_the_same_with_types(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow (extra parquet) is not installed")
    rows = [_row(1, redaction="none"), _row(2, data=JPEG, extensions={"newthing": "1"})]
    [path] = store(tmp_path, "parquet", "a", Roll(number=1, rows=rows))
    table = parquet.read_table(path, partitioning=None).to_pylist()
    assert [row["data"] for row in table] == [rows[0].data, JPEG]
    assert [row["sequence"] for row in table] == [1, 2]
    assert [row["redaction"] for row in table] == ["none", None]
    assert [row["extensions"] for row in table] == [None, '{"newthing": "1"}']
    assert table[0]["dataregion"] == "cn"
    assert parquet.read_table(tmp_path).num_rows == 2


def test_without_pyarrow_the_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(StoreError, match=r"residency-agent\[parquet\]"):
        needed("pyarrow")


@pytest.fixture
def keys(tmp_path):
    path = tmp_path / "keys.pem"
    path.write_bytes(stream.PUBLIC_PEM)
    return path


def _command(port, keys, *more, allow="cn,hk"):
    common = ("--port", port, "--keys", keys, "--allow", allow, "--json")
    return [sys.executable, "-m", "tools", "listen", *common, *more]


def _stored(folder):
    return [line for path in sorted(folder.rglob("region=*/**/*.jsonl")) for line in _lines(path)]


async def _figures(process):
    """The figures and the exit status of a listener that ends."""
    out, err = await process.communicate()
    return json.loads(out or b"{}"), process.returncode, err.decode()


@needs_mosquitto
async def test_bad_records_are_reported_and_never_stored(keys, tmp_path):
    secret = b"\xff\xd8 a picture from elsewhere \xff\xd9"
    away = stream.record(1, regions=("us",), datacontenttype="image/jpeg")
    messages = [
        stream.outgoing(stream.record(0), stream.data_of(0)),
        stream.outgoing(stream.record(2), stream.data_of(2), wire="binary"),
        stream.outgoing(stream.record(2), stream.data_of(2)),
        stream.outgoing(stream.record(3), b"", signer=stream.STRANGER),
        stream.outgoing(stream.record(4), b"", signer=None),
        stream.outgoing(away, secret),
        Outgoing(topic="cn/car-7/x", payload=b"junk"),
        stream.outgoing(stream.record(5), b"{}"),
    ]
    out = tmp_path / "out"
    async with mosquitto(config_lines=SUBSCRIPTIONS) as broker, asyncio.timeout(SECONDS):
        listening = _listened(_command(broker.port, keys, "--name", "a", "--count", 3, "--out", out))
        ending = asyncio.create_task(listening)
        await subscribed(broker, "+/+/#")
        await asyncio.to_thread(stream.publish, broker.port, messages)
        figures, status, _ = await ending
    assert status == 1
    assert figures["verdicts"] == {
        "good": 4, "notice": 0, "malformed": 1, "unsigned": 1, "forged": 1, "misplaced": 1,
    }  # fmt: skip
    region = figures["regions"]["cn"]
    assert (region["good"], region["duplicates"], region["missing"]) == (3, 1, 3)
    assert [line["sequence"][-1] for line in _stored(out)] == ["0", "2", "5"]
    refusals = _lines(out / "refused-a.jsonl")
    assert sorted(line["verdict"] for line in refusals) == ["forged", "malformed", "misplaced", "unsigned"]
    assert not any(b"from elsewhere" in path.read_bytes() for path in out.rglob("*") if path.is_file())


def _seen(folder):
    """How many records the listeners of a folder have taken together."""
    path = folder / ".listen.sqlite"
    if not path.exists():
        return 0
    with closing(sqlite3.connect(path, timeout=SECONDS)) as db:
        return db.execute("SELECT count(*) FROM seen").fetchone()[0]


@needs_mosquitto
@pytest.mark.parametrize("listeners", [1, 2, 4])
async def test_listeners_share_a_stream_without_loss_and_without_double_output(keys, tmp_path, listeners):
    out, records = tmp_path / "out", [stream.record(number) for number in range(400)]
    messages = [stream.outgoing(one, stream.data_of(one.sequence)) for one in records]
    twice = [messages[at // 2] for at in range(2 * len(messages))]  # the two copies meet different listeners
    async with mosquitto(config_lines=SUBSCRIPTIONS) as broker, asyncio.timeout(SECONDS), AsyncExitStack() as stack:
        command = _command(broker.port, keys, "--group", "g", "--out", out, "--roll-rows", 90)
        processes = [
            await stack.enter_async_context(consumer(*command, "--name", f"l{number}")) for number in range(listeners)
        ]
        await subscribed(broker, "$share/g/+/+/#", times=listeners)
        await asyncio.to_thread(stream.publish, broker.port, twice)
        await until(lambda: _seen(out) == len(records))
        for process in processes:
            process.send_signal(signal.SIGTERM)
        ends = [await _figures(process) for process in processes]
    assert [status for _, status, _ in ends] == [0] * listeners
    ids = [line["id"] for line in _stored(out)]
    assert len(ids) == len(set(ids)) == len(records)
    assert all(figures["verdicts"]["good"] for figures, _, _ in ends)
    assert sum(figures["regions"]["cn"]["duplicates"] for figures, _, _ in ends) > 0
    assert ends[-1][0]["regions"]["cn"]["missing"] == 0


async def _listened(command):
    async with consumer(*command) as process:
        return await _figures(process)


@needs_mosquitto
async def test_a_killed_listener_loses_nothing_and_stores_nothing_twice(keys, tmp_path):
    out, records = tmp_path / "out", [stream.record(number) for number in range(300)]
    messages = [stream.outgoing(one, stream.data_of(one.sequence)) for one in records]
    async with mosquitto(config_lines=SUBSCRIPTIONS) as broker, asyncio.timeout(SECONDS):
        command = _command(broker.port, keys, "--name", "a", "--out", out, "--roll-rows", 20)
        async with consumer(*command) as process:
            await subscribed(broker, "+/+/#")
            sending = asyncio.create_task(asyncio.to_thread(stream.publish, broker.port, messages))
            await until(lambda: list(out.rglob("region=*/**/*.jsonl")))
            process.send_signal(signal.SIGKILL)
            await process.wait()
        await sending
        assert len(_stored(out)) < len(records)
        figures, status, _ = await _listened([*command, "--idle", "1"])
    assert status == 0
    assert figures["regions"]["cn"]["missing"] == 0
    ids = [line["id"] for line in _stored(out)]
    assert len(ids) == len(set(ids)) == len(records)


@needs_mosquitto
async def test_a_backlog_larger_than_the_queue_does_not_keep_a_listener_from_subscribing(monkeypatch):
    monkeypatch.setattr(receiving, "BATCH", 2)  # also the length of the queue in front of the SUBACK
    records = [stream.record(number) for number in range(40)]
    async with mosquitto() as broker, asyncio.timeout(SECONDS):
        session = Session(
            host=broker.host,
            port=broker.port,
            client_id="a",
            clean_start=False,
            session_expiry_s=60,
            receive_maximum=40,
        )
        options = receiving.Options(session=session, filters=("+/+/#",), expectations=HERE, consumer="a", idle_s=0)
        await _received(options)
        await asyncio.to_thread(stream.publish, broker.port, [stream.outgoing(one, b"{}") for one in records])
        board = await _received(dataclasses.replace(options, idle_s=None, count=len(records)))
    assert board.good == len(records)


async def _received(options):
    board, inbox = Board(started=0.0), Inbox(None, "a")
    await receiving.Listener(options=options, inbox=inbox, board=board).run_loop()
    inbox.close()
    return board


@needs_mosquitto
async def test_a_signal_ends_a_listener_in_order(keys, tmp_path):
    async with mosquitto(config_lines=SUBSCRIPTIONS) as broker, asyncio.timeout(SECONDS):
        command = _command(broker.port, keys, "--name", "a", "--out", tmp_path / "out", "--roll-seconds", 600)
        async with consumer(*command) as process:
            await subscribed(broker, "+/+/#")
            sent = [stream.outgoing(stream.record(number), b"{}") for number in (1, 2)]
            await asyncio.to_thread(stream.publish, broker.port, sent)
            process.send_signal(signal.SIGTERM)
            _, status, _ = await _figures(process)
        figures, _, _ = await _listened([*command, "--idle", "1"])
    assert status == 0
    assert len(_stored(tmp_path / "out")) == 2
    assert figures["refused"] == 0


async def test_what_cannot_run_ends_with_status_2_and_a_reason(keys, tmp_path):
    nowhere = free_port()
    policy = tmp_path / "policy.toml"
    for command, reason in (
        (_command(nowhere, keys), str(nowhere)),
        (_command(nowhere, tmp_path / "no.pem"), "no.pem"),
        (_command(nowhere, keys, "--name", "a/b"), "--name"),
        ([*_command(nowhere, keys)[:4], "--unverified", "--policy", policy, "--endpoint", "x"], "policy.toml"),
    ):
        async with asyncio.timeout(SECONDS), consumer(*command) as process:
            _, status, told = await _figures(process)
        assert status == 2
        assert reason in told
        assert "Traceback" not in told
