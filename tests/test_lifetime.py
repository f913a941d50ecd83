"""The rule for a record's time to live: SQL and values say the same."""

import contextlib
import sqlite3

from hypothesis import given
from hypothesis import strategies as st
from ledger_samples import record
from msgspec.structs import replace

from agent.clock import IS_SET_NS, Moment, is_set
from agent.messages import Capture
from agent.store.lifetime import DUE, MADE_NS, OVERDUE, UNDATED, aged_ns, arguments, left_ns, overdue

SECOND = 10**9
TTL = 100 * SECOND
NOW = Moment(time_ns=IS_SET_NS + 10**6 * SECOND, monotonic_ns=1000 * SECOND, boot_id="this")


def kept(*, recorded_ns, boot_id="this", monotonic_ns=NOW.monotonic_ns, doubt_ns=0, ttl_ns=TTL):
    capture = Capture(time_ns=0, monotonic_ns=monotonic_ns, doubt_ns=doubt_ns, boot_id=boot_id)
    return replace(record(1), capture=capture, recorded_ns=recorded_ns, expires_ns=recorded_ns + ttl_ns)


def in_sql(expression, record, now):
    """What SQLite makes of an expression over the columns of a record."""
    capture = record.capture
    columns = {"expires_ns": record.expires_ns, "recorded_ns": record.recorded_ns, "boot": capture.boot_id}
    columns |= {"monotonic_ns": capture.monotonic_ns, "doubt_ns": capture.doubt_ns}
    row = ", ".join(f"? AS {name}" for name in columns)
    with contextlib.closing(sqlite3.connect(":memory:")) as connection:
        query = f"SELECT {expression} FROM (SELECT {row})"  # noqa: S608 - names from this file
        values = arguments(now) if "?" in expression else ()
        return connection.execute(query, (*values, *columns.values())).fetchone()[0]


small = st.integers(-5, 5)
records = st.builds(
    kept,
    recorded_ns=st.one_of(small.map(lambda n: IS_SET_NS + n), small.map(lambda n: NOW.time_ns - 5 + n)),
    boot_id=st.sampled_from(["this", "earlier"]),
    monotonic_ns=small.map(lambda n: NOW.monotonic_ns - 5 + n),
    doubt_ns=st.integers(0, 5),
    ttl_ns=st.integers(1, 10),
)
moments = st.builds(
    Moment,
    time_ns=st.one_of(small.map(lambda n: IS_SET_NS + n), small.map(lambda n: NOW.time_ns + n)),
    monotonic_ns=small.map(lambda n: NOW.monotonic_ns + n),
    boot_id=st.just("this"),
)


@given(records, moments)
def test_sql_and_values_agree_on_what_is_overdue(record, now):
    assert bool(in_sql(OVERDUE, record, now)) == overdue(record, now)
    assert left_ns(record, now) <= record.expires_ns - record.recorded_ns


@given(records, moments)
def test_sweep_ends_what_is_overdue_and_dates_what_has_no_date_and_nothing_else(record, now):
    due, undated = bool(in_sql(DUE, record, now)), bool(in_sql(UNDATED, record, now))
    assert undated != is_set(record.recorded_ns)
    assert (due and not undated) == overdue(record, now)
    assert not due or is_set(now.time_ns)


@given(records, moments.filter(lambda now: is_set(now.time_ns)))
def test_date_that_a_sweep_gives_is_one_and_keeps_the_time_that_is_left(record, now):
    made_ns = in_sql(MADE_NS, record, now)
    assert IS_SET_NS < made_ns <= now.time_ns
    dated = replace(record, recorded_ns=made_ns, expires_ns=made_ns + record.expires_ns - record.recorded_ns)
    if not is_set(record.recorded_ns) and made_ns > IS_SET_NS + 1:
        assert left_ns(dated, now) == left_ns(record, now)


def test_time_left_is_told_by_the_clocks_that_mean_something():
    unset = Moment(time_ns=5 * SECOND, monotonic_ns=NOW.monotonic_ns, boot_id=NOW.boot_id)
    ahead, behind = (
        Moment(time_ns=NOW.time_ns + step * SECOND, monotonic_ns=NOW.monotonic_ns, boot_id=NOW.boot_id)
        for step in (10**5, -(10**5))
    )
    age = 40 * SECOND
    here = {"monotonic_ns": NOW.monotonic_ns - age - 5, "doubt_ns": 5}
    for now, boot_id, recorded_ns, left in (
        (NOW, "this", NOW.time_ns - age, 60),
        (NOW, "earlier", NOW.time_ns - age, 60),
        (ahead, "this", NOW.time_ns - age, 60),
        (ahead, "earlier", NOW.time_ns - age, 60 - 10**5),
        (behind, "this", NOW.time_ns - age, 100),
        (behind, "earlier", NOW.time_ns - age, 100),
        (unset, "this", NOW.time_ns - age, 60),
        (unset, "earlier", NOW.time_ns - age, 100 - 1000),
        (NOW, "this", 3 * SECOND, 60),
        (NOW, "earlier", 3 * SECOND, 100 - 1000),
        (unset, "this", 3 * SECOND, 60),
        (unset, "earlier", 3 * SECOND, 100 - 1000),
    ):
        assert left_ns(kept(recorded_ns=recorded_ns, boot_id=boot_id, **here), now) == left * SECOND


def test_age_counts_from_the_latest_arrival_and_is_unknown_after_a_boot():
    arrived = NOW.monotonic_ns - 10 * SECOND
    assert aged_ns(kept(recorded_ns=1, monotonic_ns=arrived), NOW) == 10 * SECOND
    assert aged_ns(kept(recorded_ns=1, monotonic_ns=arrived, doubt_ns=3 * SECOND), NOW) == 7 * SECOND
    assert aged_ns(kept(recorded_ns=1, monotonic_ns=arrived, doubt_ns=30 * SECOND), NOW) == 0
    assert aged_ns(kept(recorded_ns=1, monotonic_ns=arrived, boot_id="earlier"), NOW) is None
