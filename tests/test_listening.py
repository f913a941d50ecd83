"""What a listener counts as good, how it keeps each record once, and the files and figures that it makes of them."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import re
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import stream
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.console import Console

from agent.mqtt.packets import Outgoing
from agent.wire import batch, presence
from agent.wire.attributes import texts
from agent.wire.envelope import CONTENT_TYPE, unpack
from tools.listening.board import Board
from tools.listening.files import StoreError, needed, partition, store
from tools.listening.inbox import Arrival, Inbox, Roll, Row
from tools.listening.judging import Verdict, judge, judge_all

JPEG = b"\xff\xd8\xff\xe0picture\xff\xd9"


def _judged(sent, expectations=stream.HERE):
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
    assert _judged(replace(sent, payload=bytes(changed))).verdict in {Verdict.FORGED, Verdict.MALFORMED}


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


def _all_judged(sent, expectations=stream.HERE):
    return judge_all(sent.topic, sent.payload, sent.content_type, tuple(sent.properties), expectations)


@pytest.mark.parametrize("compress", [False, True])
def test_every_record_of_a_batch_is_judged_as_if_it_had_come_alone(compress):
    records = [
        stream.outgoing(stream.record(0), stream.data_of(0)),
        stream.outgoing(stream.record(1), b"", signer=stream.STRANGER),
        stream.outgoing(stream.record(2), b"", signer=None),
        Outgoing(topic="cn/car-7/x", payload=b"junk"),
        stream.outgoing(stream.record(3), stream.data_of(3)),
    ]
    sent = stream.batched(records, compress=compress)
    expected = [Verdict.GOOD, Verdict.FORGED, Verdict.UNSIGNED, Verdict.MALFORMED, Verdict.GOOD]
    for content_type in (sent.content_type, None):
        found = _all_judged(replace(sent, content_type=content_type))
        assert [one.verdict for one in found] == expected
        assert [one.envelope.data for one in found if one.verdict is Verdict.GOOD] == [
            stream.data_of(0),
            stream.data_of(3),
        ]
    [alone] = _all_judged(records[0])
    assert alone == _judged(records[0])


def test_record_whose_region_is_not_that_of_its_batch_is_refused_and_the_others_are_not():
    records = [
        stream.outgoing(stream.record(number, regions=(region,)), b"") for number, region in ((0, "cn"), (1, "hk"))
    ]
    first, second = _all_judged(stream.batched(records))
    assert first.verdict is Verdict.GOOD
    assert (second.verdict, second.detail) == (
        Verdict.MALFORMED,
        "dataregion: the user property is not what the envelope says",
    )


def test_batch_that_cannot_be_read_is_one_refusal():
    sent = stream.batched([stream.outgoing(stream.record(number), b"") for number in range(4)])
    cases = {
        "unused data": replace(sent, payload=sent.payload + b"\0"),
        "not a zstd frame": replace(sent, payload=b"junk"),
        "not a msgpack array": replace(sent, payload=b"junk", content_type=batch.CONTENT_TYPE),
    }
    for reason, changed in cases.items():
        [found] = _all_judged(changed)
        assert found.verdict is Verdict.MALFORMED
        assert reason in found.detail
    [found] = _all_judged(sent, dataclasses.replace(stream.HERE, max_bytes=len(sent.payload)))
    assert "the limit is" in found.detail


def test_without_keys_the_signature_is_not_looked_at_but_the_region_is():
    blind = dataclasses.replace(stream.HERE, keys=None)
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


def test_inboxes_that_are_opened_at_the_same_moment_all_open(tmp_path):
    def opened(path, barrier):
        barrier.wait()
        Inbox(path, threading.current_thread().name).close()

    with ThreadPoolExecutor(4) as pool:
        for number in range(20):
            barrier = threading.Barrier(4)
            for made in [pool.submit(opened, tmp_path / str(number), barrier) for _ in range(4)]:
                made.result()


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
    lines = stream.lines(path)
    assert lines[0]["data"] == {"a": 1.0}
    assert b'"data": {"n": 12345678901234567890.10}' in path.read_bytes()
    for line, row in zip(lines[2:], rows[2:], strict=True):
        assert base64.b64decode(line["data_base64"]) == row.data
    assert all(line["topic"] == "cn/car-7/t" and line["keyid"] == stream.SIGNER.key_id for line in lines)


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


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_names_of_any_length_and_times_of_any_year_are_stored(tmp_path, form):
    if form == "parquet":
        pytest.importorskip("pyarrow.parquet", reason="pyarrow (extra parquet) is not installed")
    many = tuple(sorted(f"country-{number}" for number in range(40)))
    rows = [
        _row(1, regions=many),
        _row(2, regions=many[:-1]),
        _row(3, dataclassification="ü" * 200),
        dataclasses.replace(_row(4), fields={**_row(4).fields, "time": "9999-12-31T23:59:59.999999999Z"}),
    ]
    paths = store(tmp_path, form, "a", Roll(number=1, rows=rows))
    assert len({path.parent for path in paths}) == len(rows)
    assert not any(re.search("%.?~", str(path)) for path in paths)


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


def test_the_table_shows_what_came_and_names_what_was_refused():
    board = Board(started=0.0)
    sent = [stream.outgoing(stream.TELEMETRY, b"{}"), stream.outgoing(stream.TELEMETRY, b"{}", signer=None)]
    for one in sent:
        judgement = _judged(one)
        board.judged(one.topic, judgement)
        if judgement.verdict is Verdict.GOOD:
            board.took(judgement.envelope, fresh=True, now_ns=stream.TELEMETRY.recordedtime_ns + 2 * 10**9)
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(board.table({"cn": 7}, 10.0))
    shown = console.export_text()
    assert re.search(r"cn\W+1\W+0\.1\W+0\W+7\W+0\.00\W+2\.0", shown)
    assert "refused 1 (malformed 0, unsigned 1, forged 0, misplaced 0, notice 0)" in shown
    assert "unsigned: 'cn/car-7/vehicle/telemetry/speed'" in shown
