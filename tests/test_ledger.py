import shutil
import sqlite3
import threading

import pytest
from ledger_samples import MODEL, NOW, SECOND, delivered, in_memory, numbers, opened, record, refused, store
from msgspec.structs import replace

from agent.clock import IS_SET_NS, Moment
from agent.errors import LedgerError
from agent.intake.intake import EVER_NS, NEVER_NS
from agent.messages import Capture, Priority, Redaction, State
from agent.store import books
from agent.store.audit_cli import export, verify
from agent.store.entries import (
    IntakeKey,
    Noted,
    Redecided,
    Rejected,
    Released,
    SessionReset,
    Store,
    SweepResult,
    Withdrawn,
)
from agent.store.ledger import Ledger


@pytest.fixture
def path():
    directory = in_memory()
    yield directory / "ledger.db"
    shutil.rmtree(directory)


@pytest.fixture
def ledger(path):
    ledger = opened(path)
    yield ledger
    ledger.close()


def test_new_ledger_is_empty_and_reports_no_incident(ledger):
    assert ledger.incidents == ()
    assert ledger.counts().received == 0
    assert ledger.counts().conserved
    assert ledger.pending("cn", limit=10) == []


def test_stored_record_comes_back_exactly_after_reopening(path):
    original = record(7, regions=("cn", "hk"), route=("a", "b"), size=300)
    ledger = opened(path)
    ledger.commit([Store(record=original)])
    ledger.close()
    ledger = opened(path)
    assert [spooled.record for spooled in ledger.pending("a", limit=5)] == [original]
    assert ledger.find(original.id) == original
    ledger.close()


def test_counts_are_of_one_moment_although_the_writer_goes_on(ledger, path, monkeypatch):
    ledger.commit([store(1)])
    typed = books._typed

    def overtaken(*arguments):
        yield from typed(*arguments)
        ledger.commit([delivered(1)])

    monkeypatch.setattr(books, "_typed", overtaken)
    assert Ledger.read_counts(path).pending == 1
    monkeypatch.undo()
    assert Ledger.read_counts(path).delivered == 1


def test_large_envelope_is_kept_in_a_file_that_goes_with_its_record(path):
    ledger = opened(path, inline_bytes=1000)
    ledger.commit([store(1, size=5000), store(2, size=1000)])
    files = path.with_name("ledger.db.files")
    assert [file.stat().st_size for file in files.iterdir()] == [5000]
    assert ledger.find("id-1") == record(1, size=5000)
    ledger.commit([delivered(1)])
    assert list(files.iterdir()) == []
    ledger.close()


def test_records_come_by_priority_then_by_arrival(ledger):
    ledger.commit([store(1, priority=Priority.BULK), store(2), store(3, priority=Priority.URGENT)])
    ledger.commit([store(4, priority=Priority.URGENT), store(5), store(6, priority=Priority.BULK)])
    assert numbers(ledger.pending("cn", limit=10)) == [3, 4, 2, 5, 1, 6]
    assert numbers(ledger.pending("cn", limit=10, priority=Priority.LIVE)) == [2, 5]
    assert numbers(ledger.pending("cn", limit=3)) == [3, 4, 2]


def test_arrival_order_holds_across_regions_of_one_route(ledger):
    ledger.commit([store(n, regions=(("cn",), ("hk",), ("cn", "hk"))[n % 3], route=("x",)) for n in range(1, 10)])
    assert numbers(ledger.pending("x", limit=100)) == list(range(1, 10))


def test_keys_split_backlog_from_live_records(ledger):
    ledger.commit([store(1), store(2)])
    boundary = ledger.last_key
    ledger.commit([store(3), store(4)])
    assert numbers(ledger.pending("cn", limit=10, after=boundary)) == [3, 4]
    assert numbers(ledger.pending("cn", limit=10, until=boundary)) == [1, 2]


def test_records_in_flight_are_skipped(ledger):
    ledger.commit([store(n) for n in range(5)])
    assert numbers(ledger.pending("cn", limit=2, skip={"id-0", "id-2"})) == [1, 3]


def test_read_is_bounded_by_bytes_but_never_empty(ledger):
    ledger.commit([store(n, size=1000) for n in range(5)])
    assert numbers(ledger.pending("cn", limit=10, max_bytes=2500)) == [0, 1]
    assert numbers(ledger.pending("cn", limit=10, max_bytes=10)) == [0]


def test_record_goes_to_the_first_endpoint_of_its_route_that_is_not_down(ledger):
    ledger.commit([store(1, route=("a", "b")), store(2, route=("b",)), store(3, route=("a",))])
    assert numbers(ledger.pending("a", limit=10)) == [1, 3]
    assert numbers(ledger.pending("b", limit=10)) == [2]
    assert numbers(ledger.pending("b", limit=10, down={"a"})) == [1, 2]
    assert ledger.pending("c", limit=10, down={"a", "b"}) == []


def test_every_message_is_in_exactly_one_state(ledger):
    ledger.commit([store(1), store(2), store(3), store(4, route=(), regions=("cn", "hk")), refused()])
    ledger.commit(
        [
            delivered(1, "cn"),
            Rejected(id="id-2", endpoint="cn", code=0x99, time_ns=NOW),
            Withdrawn(id="id-3", reason="policy.withdrawn", time_ns=NOW),
        ]
    )
    counts = ledger.counts()
    assert (counts.received, counts.delivered, counts.refused, counts.held, counts.pending) == (5, 1, 3, 1, 0)
    assert counts.conserved
    assert counts.breakdown["refused"]["reason"] == {
        "policy.no-rule": 1,
        "endpoint.rejected-153": 1,
        "policy.withdrawn": 1,
    }
    assert counts.breakdown["delivered"] == {"region": {"cn": 1}, "class": {"telemetry": 1}, "endpoint": {"cn": 1}}
    assert counts.breakdown["held"]["region"] == {"cn,hk": 1}


def test_oldest_record_of_each_state_is_known_to_writer_and_readers(path):
    ledger = opened(path)
    assert ledger.oldest() == {}
    ledger.commit([store(2), store(5), store(3, priority=Priority.URGENT)])
    assert ledger.oldest() == {State.PENDING: NOW + 2}
    ledger.commit([store(1, route=()), delivered(2)])
    assert ledger.oldest() == Ledger.read_oldest(path) == {State.PENDING: NOW + 3, State.HELD: NOW + 1}
    ledger.close()


def test_counters_survive_reopening_and_can_be_read_beside_the_writer(path):
    ledger = opened(path)
    ledger.commit([store(1), store(2), refused()])
    ledger.commit([delivered(1)])
    assert Ledger.read_counts(path) == ledger.counts()
    before = ledger.counts()
    ledger.close()
    assert Ledger.read_counts(path) == before
    ledger = opened(path)
    assert ledger.counts() == before
    ledger.close()


def test_answer_for_a_record_that_has_gone_is_counted_as_late_and_changes_nothing_else(ledger):
    ledger.commit([store(1)])
    ledger.commit([delivered(1), delivered(1)])
    counts = ledger.counts()
    assert (counts.delivered, counts.late, counts.conserved) == (1, 1, True)


def test_transaction_is_all_or_nothing(ledger, path):
    ledger.commit([store(1)])
    before = ledger.counts()
    with pytest.raises(LedgerError, match="UNIQUE"):
        ledger.commit([store(2, size=200_000), delivered(1), store(2)])
    assert ledger.counts() == before
    assert numbers(ledger.pending("cn", limit=10)) == [1]
    assert list(path.with_name("ledger.db.files").iterdir()) == []


def test_record_whose_state_contradicts_its_route_is_not_stored(ledger):
    with pytest.raises(LedgerError, match="id-1"):
        ledger.commit([Store(record=replace(record(1), state=State.HELD))])
    assert ledger.counts().received == 0


def test_held_records_of_another_boot_or_captured_before_a_moment_are_left_out(ledger):
    moments = (("boot", 50), ("boot", -9), ("another", 50), ("boot", 49))  # a capture may lie before the boot
    for number, (boot, moment_ns) in enumerate(moments, 1):
        capture = replace(record(number).capture, monotonic_ns=moment_ns, boot_id=boot)
        ledger.commit([Store(record=replace(record(number, route=()), capture=capture))])
    found = {
        since_ns: [held.capture.monotonic_ns for held in ledger.held(boot_id="boot", since_ns=since_ns, limit=5)]
        for since_ns in (EVER_NS, 49, 50, NEVER_NS)
    }
    assert found == {EVER_NS: [50, -9, 49], 49: [50, 49], 50: [50], NEVER_NS: []}


def test_keyed_records_are_read_up_to_a_number_of_bytes_but_one_at_least(ledger):
    ledger.commit([Store(record=record(number, size=100)) for number in (1, 2, 3)])
    keys = [row.key for row in ledger.spooled(limit=5)]
    assert numbers(ledger.keyed(keys, max_bytes=200)) == [1, 2]
    assert numbers(ledger.keyed(keys[1:], max_bytes=1)) == [2]
    ledger.commit([delivered(1)])
    assert numbers(ledger.keyed(keys)) == [2, 3]


def test_held_record_becomes_pending_with_narrowed_regions_and_a_new_envelope(ledger):
    held = record(1, route=(), regions=("cn", "hk"))
    ledger.commit([Store(record=held)])
    (found,) = ledger.held(boot_id=held.capture.boot_id, since_ns=0, limit=5)
    assert (found.regions, found.basis, found.capture) == (held.regions, held.basis, held.capture)
    assert (found.topic, found.data_class) == (held.topic, held.data_class)
    assert [row.record for row in ledger.keyed([found.key])] == [held]
    released = replace(held, state=State.PENDING, route=("hk",), regions=("hk",), envelope=b"new", sequence=9)
    ledger.commit([Released(record=released, time_ns=NOW)])
    assert ledger.held(boot_id=held.capture.boot_id, since_ns=0, limit=5) == []
    assert [item.record for item in ledger.pending("hk", limit=5)] == [released]
    assert ledger.counts().breakdown["pending"]["region"] == {"hk": 1}
    assert ledger.counts().conserved
    assert ledger.sequences() == {"cn,hk": 1, "hk": 9}


def test_commit_names_the_records_that_it_leaves_in_the_car_as_they_came(ledger):
    held, gone = store(1, route=()), store(2)
    settled = replace(held.record, state=State.PENDING, route=("cn",), envelope=b"new")
    stored = [held, gone, store(3), Released(record=settled, time_ns=NOW), delivered(2)]
    assert ledger.commit(stored) == [record(3)]


def test_regions_are_never_widened_and_the_capture_never_changes(ledger):
    original = record(1, route=(), regions=("cn", "hk"))
    ledger.commit([Store(record=original)])
    for changed in (
        replace(original, regions=("cn", "hk", "mo")),
        replace(original, regions=("mo",)),
        replace(original, capture=replace(original.capture, time_ns=0)),
    ):
        with pytest.raises(LedgerError, match="id-1"):
            ledger.commit([Redecided(record=changed, reason="policy", time_ns=NOW)])
    assert ledger.find("id-1") == original


def test_changed_record_with_a_large_envelope_leaves_no_old_file(path):
    ledger = opened(path, inline_bytes=100)
    held = record(1, size=500, route=())
    ledger.commit([Store(record=held)])
    pending = replace(held, state=State.PENDING, route=("cn",), envelope=b"n" * 700)
    ledger.commit([Released(record=pending, time_ns=NOW)])
    assert [file.stat().st_size for file in path.with_name("ledger.db.files").iterdir()] == [700]
    assert ledger.find("id-1") == pending
    ledger.close()


def test_redelivered_publish_is_recognised_after_a_crash_and_forgotten_with_its_session(path):
    ledger = opened(path)
    ledger.commit([store(1, mid=5), refused(intake=IntakeKey(session="pictures", mid=5, digest=b"other"))])
    del ledger._lock  # the descriptor goes with the process
    crashed = Ledger.read_counts(path)
    assert crashed.received == 2
    ledger._connection.close()
    ledger = reopened_after_crash(path)
    assert ledger.recorded(IntakeKey(session="telemetry", mid=5, digest=b"digest-1"))
    assert not ledger.recorded(IntakeKey(session="telemetry", mid=5, digest=b"another message, same packet id"))
    assert ledger.recent_intake("pictures") == {5: b"other"}
    ledger.commit([SessionReset(session="pictures")])
    assert ledger.recent_intake("pictures") == {}
    ledger.close()
    ledger = opened(path)
    assert ledger.recent_intake("pictures") == {}
    assert ledger.recent_intake("telemetry") == {5: b"digest-1"}
    ledger.close()


def reopened_after_crash(path):
    path.with_name("ledger.db.lock").unlink()
    return opened(path)


def test_redelivery_that_is_recorded_already_is_ignored_also_within_one_transaction(ledger):
    first = store(1, mid=5)
    again = replace(first, record=record(2), intake=replace(first.intake, redelivered=True))
    assert ledger.commit([first, again]) == [first.record]
    assert ledger.commit([again, refused(intake=again.intake)]) == []
    assert ledger.counts().received == 1
    other = replace(again, intake=replace(again.intake, digest=b"another message, same packet identifier"))
    ledger.commit([other])
    assert numbers(ledger.pending("cn", limit=10)) == [1, 2]
    ledger.commit([SessionReset(session="telemetry"), replace(other, record=record(3))])
    assert ledger.counts().received == 3


def test_publish_without_the_dup_flag_is_new_even_if_it_looks_the_same(ledger):
    first = store(1, mid=5)
    ledger.commit([first])
    ledger.commit([replace(first, record=record(2))])
    assert ledger.counts().received == 2


def test_only_the_last_packet_identifiers_of_a_session_are_kept(path):
    ledger = opened(path, intake_window=4)
    for n in range(10):
        ledger.commit([store(n, mid=n % 6 + 1)])
    expected = {n % 6 + 1: f"digest-{n}".encode() for n in range(6, 10)}
    assert ledger.recent_intake("telemetry") == expected
    ledger.close()
    ledger = opened(path, intake_window=4)
    assert ledger.recent_intake("telemetry") == expected
    ledger.close()


def test_numbering_goes_on_after_reopening(path):
    ledger = opened(path)
    ledger.commit([store(3), store(8), store(2, regions=("hk",))])
    key = ledger.last_key
    ledger.commit([delivered(3), delivered(8), delivered(2)])
    ledger.close()
    ledger = opened(path)
    assert ledger.sequences() == {"cn": 8, "hk": 2}
    ledger.commit([store(9)])
    assert ledger.pending("cn", limit=1)[0].key > key
    ledger.close()


def test_notes_are_kept(path):
    ledger = opened(path)
    ledger.commit(
        [Noted(name="policy", value="2026-1", time_ns=NOW), Noted(name="policy", value="2026-2", time_ns=NOW)]
    )
    ledger.close()
    ledger = opened(path)
    assert ledger.meta("policy") == "2026-2"
    assert ledger.meta("other") is None
    ledger.close()


def test_lane_above_its_limit_loses_least_urgent_then_oldest_and_other_lanes_lose_nothing(path):
    ledger = opened(path, lane_bytes=5 * (100 + 512))
    ledger.commit([store(100 + n, regions=("hk",), route=("hk",)) for n in range(5)])
    ledger.commit([store(1, priority=Priority.BULK), store(2), store(3, priority=Priority.URGENT)])
    ledger.commit([store(4), store(5, priority=Priority.BULK), store(6), store(7)])
    assert numbers(ledger.pending("cn", limit=10)) == [3, 2, 4, 6, 7]
    ledger.commit([store(8), store(9, priority=Priority.BULK)])
    assert numbers(ledger.pending("cn", limit=10)) == [3, 4, 6, 7, 8]
    assert len(ledger.pending("hk", limit=10)) == 5
    counts = ledger.counts()
    assert counts.breakdown["evicted"]["reason"] == {"ledger.limit": 4}
    assert counts.conserved
    ledger.close()


def test_whole_spool_keeps_its_limit_in_every_committed_state(path):
    ledger = opened(path, total_bytes=10_000, inline_bytes=600)
    for n in range(60):
        ledger.commit([store(n, size=100 + 37 * n % 900, regions=(("cn",), ("hk",), ("mo",))[n % 3])])
        counts = ledger.counts()
        assert counts.pending_bytes + counts.held_bytes <= 10_000
        assert counts.conserved
    assert ledger.counts().evicted > 30
    ledger.close()


@pytest.mark.parametrize("limit", ["lane_bytes", "total_bytes"])
def test_limit_that_is_reached_exactly_evicts_nothing(path, limit):
    ledger = opened(path, **{limit: 3 * (100 + 512)})
    ledger.commit([store(1), store(2), store(3)])
    assert ledger.counts().evicted == 0
    ledger.commit([delivered(3)])
    ledger.commit([store(4, size=101)])
    assert numbers(ledger.pending("cn", limit=10)) == [2, 4]
    ledger.close()


def test_record_that_can_never_fit_evicts_itself_only(path):
    ledger = opened(path, lane_bytes=10_000)
    ledger.commit([store(1, priority=Priority.BULK), store(2, size=20_000, priority=Priority.URGENT)])
    assert numbers(ledger.pending("cn", limit=10)) == [1]
    assert ledger.counts().breakdown["evicted"]["reason"] == {"ledger.too-large": 1}
    ledger.close()


def test_records_expire_at_their_time_and_not_while_the_clock_is_not_trusted(ledger):
    ledger.commit([store(1, ttl=10), store(2, ttl=20), store(3, ttl=10, route=())])
    assert ledger.sweep(None).expired == 0
    assert ledger.sweep(NOW + 10 * SECOND).expired == 0
    assert ledger.sweep(NOW + 10 * SECOND + 1).expired == 1
    assert ledger.sweep(NOW + 15 * SECOND).expired == 1
    assert numbers(ledger.pending("cn", limit=10)) == [2]
    assert ledger.counts().breakdown["expired"]["reason"] == {"ledger.ttl": 2}
    assert ledger.counts().conserved


def test_wall_clock_that_jumps_ahead_by_years_ends_nothing_of_this_boot(ledger):
    ledger.commit([store(1, ttl=10), store(2, ttl=1000)])
    later = NOW + 9 * 365 * 86_400 * SECOND
    assert ledger.sweep(later, monotonic_ns=10 * SECOND + 5, boot_id="boot").expired == 0
    assert ledger.sweep(later, monotonic_ns=10 * SECOND + 6, boot_id="boot").expired == 1
    assert ledger.sweep(later, monotonic_ns=11 * SECOND, boot_id="another boot").expired == 1
    assert ledger.counts().conserved


def test_what_a_sweep_would_expire_is_offered_to_no_endpoint(ledger):
    ledger.commit([store(1, ttl=10), store(2, ttl=1000), store(3, ttl=10, priority=Priority.URGENT)])
    for seconds, monotonic_ns, boot_id, offered in (
        (10, 0, "", [3, 1, 2]),
        (11, 0, "", [2]),
        (11, 10 * SECOND, "boot", [3, 1, 2]),
        (11, 10 * SECOND + 7, "boot", [3, 2]),
        (11, 10 * SECOND + 8, "boot", [2]),
    ):
        now = Moment(time_ns=NOW + seconds * SECOND, monotonic_ns=monotonic_ns, boot_id=boot_id)
        assert numbers(ledger.pending("cn", limit=10, now=now)) == offered
    assert ledger.sweep(now.time_ns, monotonic_ns=now.monotonic_ns, boot_id=now.boot_id).expired == 2


def undated(number, *, ttl=10, boot_id="boot", doubt_s=5, **fields):
    """A record of a message that arrived 100 s after the boot, while the clock said 1970."""
    capture = Capture(
        time_ns=60 * SECOND, monotonic_ns=(100 - doubt_s) * SECOND, doubt_ns=doubt_s * SECOND, boot_id=boot_id
    )
    times = {"recorded_ns": 61 * SECOND, "expires_ns": (61 + ttl) * SECOND, "capture": capture}
    return Store(record=replace(record(number, **fields), **times))


@pytest.mark.parametrize("doubt_s", [5, 366 * 86_400])
def test_record_made_before_the_clock_was_set_is_dated_by_its_age_when_it_is_set(ledger, doubt_s):
    made = undated(1, doubt_s=doubt_s)
    ledger.commit([made, undated(2, doubt_s=doubt_s, route=())])
    unset, then = 1000 * SECOND, {"monotonic_ns": 103 * SECOND, "boot_id": "boot"}
    for now_ns in (None, unset):
        assert ledger.sweep(now_ns, **then) == SweepResult()
    for now_ns in (unset, NOW):
        now = Moment(time_ns=now_ns, **then)
        assert [one.record for one in ledger.pending("cn", limit=10, now=now)] == [made.record]
    assert ledger.sweep(NOW, **then).expired == 0
    dated = replace(made.record, recorded_ns=NOW - 3 * SECOND, expires_ns=NOW + 7 * SECOND)
    assert [one.record for one in ledger.pending("cn", limit=10, now=now)] == [dated]
    assert ledger.sweep(NOW + 7 * SECOND - 1, monotonic_ns=200 * SECOND, boot_id="next").expired == 0
    assert ledger.sweep(NOW + 7 * SECOND, monotonic_ns=200 * SECOND, boot_id="next").expired == 2
    assert ledger.counts().conserved


def test_record_of_an_earlier_boot_without_a_date_lives_one_time_to_live_from_the_beginning_of_this_boot(ledger):
    made = undated(1)
    ledger.commit([made])
    now = Moment(time_ns=NOW, monotonic_ns=5 * SECOND, boot_id="next")
    assert [one.record for one in ledger.pending("cn", limit=10, now=now)] == [made.record]
    for seconds, expired in ((0, 0), (4, 0), (5, 1)):
        assert ledger.sweep(NOW + seconds * SECOND, monotonic_ns=5 * SECOND, boot_id="next").expired == expired
    assert ledger.counts().conserved


def test_record_past_its_time_to_live_when_the_clock_is_set_expires(ledger):
    ledger.commit([undated(1)])
    then = {"monotonic_ns": 110 * SECOND, "boot_id": "boot"}
    assert ledger.sweep(NOW, **then).expired == 0
    assert ledger.pending("cn", limit=10, now=Moment(time_ns=NOW, **then)) == []
    assert ledger.sweep(NOW, **then).expired == 1


def test_records_are_dated_a_bounded_number_at_a_time_and_each_once(path, monkeypatch):
    monkeypatch.setattr("agent.store.ledger.SWEEP_RECORDS", 2)
    ledger = opened(path)
    ledger.commit([undated(n) for n in range(5)])
    barely_set, then = IS_SET_NS + SECOND, {"monotonic_ns": 105 * SECOND, "boot_id": "boot"}
    assert [ledger.sweep(barely_set, **then).more for _ in range(4)] == [True, True, False, False]
    assert {one.record.recorded_ns for one in ledger.pending("cn", limit=10)} == {IS_SET_NS + 1}
    ledger.close()
    assert verify(path).intact
    assert [row["id"] for row in export(path) if row["what"] == "dated"] == [f"id-{n}" for n in range(5)]


def test_lanes_without_records_are_forgotten_when_many_have_gathered(path):
    ledger = opened(path)
    ledger.commit([store(n, regions=(f"r{n}",)) for n in range(300)])
    ledger.commit([delivered(n) for n in range(1, 300)])
    ledger.close()
    ledger = opened(path)
    assert len(ledger._books.lanes) == 1
    ledger.commit([store(1000, regions=("r5",))])
    assert numbers(ledger.pending("cn", limit=10)) == [0, 1000]
    ledger.close()


def test_sessions_are_bounded_and_the_first_heard_of_is_forgotten(path):
    ledger = opened(path)
    for n in range(20):
        key = IntakeKey(session=f"session-{n}", mid=1, digest=b"digest")
        ledger.commit([Store(record=record(n), intake=key)])
    kept = [n for n in range(20) if ledger.recent_intake(f"session-{n}")]
    assert kept == list(range(4, 20))
    ledger.close()
    ledger = opened(path)
    assert [n for n in range(20) if ledger.recent_intake(f"session-{n}")] == kept
    ledger.close()


def test_sweep_gives_disk_space_back(path):
    ledger = opened(path)
    ledger.commit([store(n, size=20_000) for n in range(400)])
    ledger.sweep(NOW)
    before = path.stat().st_size
    ledger.commit([delivered(n) for n in range(400)])
    for _ in range(4):
        ledger.sweep(NOW)
    assert before > 8_000_000
    assert path.stat().st_size < 1_500_000
    ledger.close()


def test_files_left_by_a_crash_are_removed(path):
    ledger = opened(path, inline_bytes=100)
    ledger.commit([store(1, size=500)])
    stray = path.with_name("ledger.db.files") / f"{999:016x}"
    stray.write_bytes(b"left over")
    for _ in range(2):
        ledger.sweep(NOW)
    assert not stray.exists()
    assert ledger.find("id-1") == record(1, size=500)
    ledger.close()


@pytest.mark.parametrize(("column", "noticed"), [("basis", 1), ("doubt_ns", 1), ("envelope", 2), ("crc", 2)])
def test_damaged_held_record_ends_as_soon_as_what_is_damaged_is_read(ledger, column, noticed):
    ledger.commit([store(1, route=()), store(2, route=())])
    ledger._connection.execute(f"UPDATE record SET {column} = 'nonsense' WHERE id = 'id-1'")  # noqa: S608 - a constant
    keys = [row.key for row in ledger.held(boot_id="boot", since_ns=EVER_NS, limit=5)]
    assert len(keys) == noticed
    assert numbers(ledger.keyed(keys)) == [2]
    assert ledger.counts().breakdown["evicted"]["reason"] == {"ledger.damaged": 1}
    assert (ledger.counts().held, ledger.counts().conserved) == (1, True)


@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_record_whose_file_is_lost_is_evicted_and_counted_and_blocks_nobody(path, damage):
    ledger = opened(path, inline_bytes=100)
    ledger.commit([store(1, size=500), store(2, size=500)])
    file = min(path.with_name("ledger.db.files").iterdir())
    if damage == "missing":
        file.unlink()
    else:
        file.write_bytes(b"x" * (499 if damage == "cut" else 500))
    assert numbers(ledger.pending("cn", limit=1)) == [2]
    assert ledger.counts().breakdown["evicted"]["reason"] == {"ledger.damaged": 1}
    assert ledger.counts().conserved
    ledger.close()


def test_files_can_be_read_by_their_owner_only(path):
    ledger = opened(path, inline_bytes=10)
    ledger.commit([store(1)])
    modes = {file.name: file.stat().st_mode & 0o077 for file in path.parent.iterdir() if file.suffix != ".seal"}
    assert {"ledger.db", "ledger.db-wal", "ledger.db.files", "ledger.db.reserve"} <= modes.keys()
    assert not any(modes.values())
    ledger.close()


def test_second_process_is_refused(path):
    ledger = opened(path)
    with pytest.raises(LedgerError, match="another process"):
        opened(path)
    ledger.close()


def test_ledger_works_on_another_thread_than_it_was_opened_on(ledger):
    thread = threading.Thread(target=ledger.commit, args=([store(1)],))
    thread.start()
    thread.join()
    assert ledger.counts().pending == 1


def test_envelope_never_reaches_the_audit_rows(path):
    ledger = opened(path)
    redaction = Redaction(counts={"person": 2}, pictures=1, model_digest=MODEL)
    ledger.commit([Store(record=replace(record(1), envelope=b"SECRET" * 10), redaction=redaction)])
    ledger.close()
    with sqlite3.connect(path) as connection:
        rows = connection.execute("SELECT data FROM audit").fetchall()
    connection.close()
    assert all(b"SECRET" not in data for (data,) in rows)
