"""Damaged files, full and failing disks, other releases' files: the ledger opens, loses nothing else and goes on."""

import asyncio
import contextlib
import errno
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faultdisk import FaultDisk
from ledger_samples import NOW, SECOND, delivered, in_memory, numbers, opened, record, refused, store

from agent.errors import LedgerCorruptError, LedgerError, LedgerStalledError
from agent.store.audit_cli import export, verify
from agent.store.committer import CommitOptions, Committer
from agent.store.entries import IntakeKey, Noted, Rejected
from agent.store.ledger import Ledger

KILLS = int(os.environ.get("RESIDENCY_SOAK_KILLS", "6"))


@pytest.fixture
def path():
    directory = in_memory()
    yield directory / "ledger.db"
    shutil.rmtree(directory)


def filled(path, number=60, **limits):
    """A closed ledger with records of all kinds."""
    ledger = opened(path, **limits)
    for n in range(0, number, 10):
        ledger.commit([store(k, mid=k + 1, size=700) for k in range(n, n + 10)])
    ledger.commit([delivered(0), refused(), store(1000, route=(), regions=("cn", "hk"), size=300)])
    ledger.commit([Noted(name="policy", value="7", time_ns=NOW), store(1001, size=300_000)])
    counts = ledger.counts()
    ledger.close()
    return counts


def overwrite(path, start, data):
    with path.open("r+b") as file:
        file.seek(start)
        file.write(data)


def garbage(size):
    return random.Random(size).randbytes(size)


DAMAGES = {
    "header": lambda path: overwrite(path, 0, garbage(100)),
    "schema": lambda path: overwrite(path, 100, garbage(900)),
    "everything": lambda path: path.write_bytes(garbage(50_000)),
    "text": lambda path: path.write_text("not a database at all\n" * 100),
    "half": lambda path: os.truncate(path, path.stat().st_size // 2048 * 1024),
    "one page": lambda path: os.truncate(path, 1024),
    "one byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "gone": lambda path: path.unlink(),
    "empty": lambda path: os.truncate(path, 0),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_file_is_set_aside_reported_and_never_a_reason_not_to_start(path, damage):
    filled(path)
    DAMAGES[damage](path)
    damaged = path.read_bytes() if path.exists() else b""
    ledger = opened(path)
    assert "set aside as ledger.db.corrupt-1" in ledger.incidents[0]
    assert path.with_name("ledger.db.corrupt-1").read_bytes() == damaged
    assert ledger.counts().conserved
    ledger.commit([store(5000)])
    assert 5000 in numbers(ledger.pending("cn", limit=1000))
    ledger.close()
    assert opened_again_without_incident(path)
    assert verify(path).intact
    assert set_aside(path)[0] == "ledger.db.corrupt-1", "the audit says so, before all else"


def set_aside(path):
    """What the audit says of it; none where it does not begin with it."""
    rows = [row for row in export(path) if row["what"] != "restored"]
    return [row["value"] for row in rows[:2] if row.get("name") == "ledger.set-aside"]


def opened_again_without_incident(path):
    ledger = opened(path)
    incidents = ledger.incidents
    ledger.close()
    return incidents == ()


@pytest.mark.parametrize("part", ["counter", "intake", "meta", "lane"])
def test_damage_to_a_small_table_is_found_at_the_start(path, part):
    filled(path)
    overwrite(path, page_of(path, part) * 1024, garbage(1024))
    ledger = opened(path)
    assert "set aside" in ledger.incidents[0]
    assert ledger.counts().conserved
    ledger.close()


def page_of(path, table):
    connection = sqlite3.connect(path)
    page = connection.execute("SELECT rootpage FROM sqlite_schema WHERE name = ?", (table,)).fetchone()[0]
    connection.close()
    return page - 1


def leaf_pages(path, table):
    connection = sqlite3.connect(path)
    rows = connection.execute("SELECT pageno FROM dbstat WHERE name = ? AND pagetype = 'leaf'", (table,)).fetchall()
    connection.close()
    return [page - 1 for (page,) in rows]


def test_records_that_can_still_be_read_are_carried_over_and_the_others_counted(path):
    before = filled(path)
    overwrite(path, leaf_pages(path, "record")[20] * 1024, garbage(1024))
    path.with_name("ledger.db.suspect").touch()
    ledger = opened(path)
    assert "carried over" in ledger.incidents[1]
    counts = ledger.counts()
    lost = counts.breakdown["evicted"]["reason"]["ledger.set-aside"]
    assert 1 <= lost <= 5
    assert (counts.received, counts.delivered, counts.refused) == (before.received, before.delivered, before.refused)
    assert counts.pending + counts.held == before.pending + before.held - lost
    assert counts.conserved
    assert ledger.find("id-1001") == record(1001, size=300_000)
    held = ledger.held(boot_id="boot", since_ns=0, limit=10)
    assert numbers(ledger.keyed([row.key for row in held])) == [1000]
    assert ledger.sequences() == {"cn": 1001, "cn,hk": 1000}
    assert ledger.meta("policy") == "7"
    assert ledger.recorded(IntakeKey(session="telemetry", mid=50, digest=b"digest-49"))
    ledger.close()
    told = f"ledger.db.corrupt-1: {61 - lost} of 61 records carried over"
    assert ledger.incidents[1] == told.partition(": ")[2]
    assert set_aside(path) == ["ledger.db.corrupt-1", told]


def crashed_copy(path):
    """The files as a SIGKILL would leave them, beside the ledger that goes on."""
    target = path.parent / "crashed"
    shutil.copytree(path.parent, target, ignore=shutil.ignore_patterns("*-shm", "*.lock", "crashed"))
    return target / path.name


def test_records_that_are_only_in_the_journal_are_carried_over_too(path):
    filled(path)
    ledger = opened(path)
    ledger.commit([store(n, size=100) for n in range(2000, 2010)])
    crashed = crashed_copy(path)
    ledger.close()
    assert crashed.with_name("ledger.db-wal").stat().st_size
    overwrite(crashed, leaf_pages(path, "record")[20] * 1024, garbage(1024))
    crashed.with_name("ledger.db.suspect").touch()
    ledger = opened(crashed)
    assert "carried over" in ledger.incidents[1]
    assert set(range(2000, 2010)) <= set(numbers(ledger.pending("cn", limit=1000)))
    assert ledger.counts().conserved
    ledger.close()


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE counter SET number = 'many'",
        "UPDATE counter SET number = number + 1 WHERE state = 'pending'",
        "UPDATE counter SET bytes = x'00'",
        "UPDATE meta SET value = 'nonsense'",
        "INSERT INTO meta VALUES ('audit.base', 'nonsense')",
        "UPDATE meta SET value = CAST(x'ff' AS TEXT)",
        "UPDATE lane SET route = x'ff'",
        "UPDATE lane SET route = CAST(x'ff' AS TEXT)",
        "UPDATE intake SET digest = NULL, mid = 'x'",
        "UPDATE record SET basis = 'nonsense', priority = 77",
        "UPDATE record SET topic = x'ff', size = 'x'",
        "UPDATE record SET topic = CAST(x'ff' AS TEXT)",
        "DELETE FROM lane",
        "DELETE FROM counter",
        "DROP TABLE intake",
        "DROP TABLE record",
    ],
)
@pytest.mark.parametrize("suspect", [False, True])
def test_nonsense_in_any_table_is_never_a_reason_not_to_start(path, statement, suspect):
    filled(path)
    connection = sqlite3.connect(path)
    with contextlib.suppress(sqlite3.IntegrityError):
        connection.execute(statement)
    connection.commit()
    connection.close()
    if suspect:
        overwrite(path, leaf_pages(path, "counter")[0] * 1024, garbage(1024))
    try:
        ledger = opened(path)
        ledger.spooled(limit=1000)
    except LedgerCorruptError:
        ledger.close()
        ledger = opened(path)
    ledger.commit([store(5000)])
    ledger.sweep(NOW)
    assert ledger.find("id-5000") == record(5000)
    assert ledger.counts().conserved
    ledger.close()


def test_damage_that_shows_later_is_reported_and_the_next_start_sets_the_file_aside(path):
    filled(path)
    for page in leaf_pages(path, "record")[10:14]:
        overwrite(path, page * 1024, garbage(1024))
    ledger = opened(path)
    assert ledger.incidents == ()
    with pytest.raises(LedgerCorruptError):
        ledger.pending("cn", limit=1000)
    ledger.close()
    ledger = opened(path)
    assert "set aside" in ledger.incidents[0]
    assert len(ledger.pending("cn", limit=1000)) > 40
    assert ledger.counts().conserved
    ledger.close()


def test_only_the_last_damaged_ledger_is_kept(path):
    for _ in range(3):
        filled(path)
        path.write_bytes(garbage(5000))
        opened(path).close()
    assert not path.with_name("ledger.db.corrupt-2").exists()
    assert not path.with_name("ledger.db.corrupt-2.files").exists()
    assert path.with_name("ledger.db.corrupt-3").exists()


@pytest.mark.parametrize("damage", ["cut", "garbage", "gone"])
def test_journal_lost_after_a_crash_is_noticed_by_the_seal(path, damage):
    ledger = opened(path)
    ledger.commit([store(n) for n in range(10)])
    ledger._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
    ledger.commit([store(n) for n in range(10, 20)])
    ledger.sweep(NOW)
    crashed = crashed_copy(path)
    ledger.close()
    journal = crashed.with_name("ledger.db-wal")
    if damage == "cut":
        os.truncate(journal, 500)
    elif damage == "garbage":
        journal.write_bytes(garbage(9000))
    else:
        journal.unlink()
    ledger = opened(crashed)
    assert "older than its seal" in ledger.incidents[0]
    assert ledger.counts().received == 10
    assert ledger.counts().conserved
    ledger.close()


def test_file_of_a_newer_release_is_refused_with_a_message_and_left_alone(path):
    filled(path)
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version=99")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(LedgerError, match="newer release"):
        opened(path)
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*corrupt*"))


SCHEMA_1 = """
PRAGMA auto_vacuum=INCREMENTAL;
PRAGMA journal_mode=WAL;
CREATE TABLE record(
    key INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, lane INTEGER NOT NULL, priority INTEGER NOT NULL,
    class TEXT NOT NULL, size INTEGER NOT NULL, expires_ns INTEGER NOT NULL, recorded_ns INTEGER NOT NULL,
    sequence INTEGER NOT NULL, basis TEXT NOT NULL, topic TEXT NOT NULL, time_ns INTEGER NOT NULL,
    monotonic_ns INTEGER NOT NULL, doubt_ns INTEGER NOT NULL, boot TEXT NOT NULL, crc INTEGER NOT NULL,
    file INTEGER, envelope BLOB);
CREATE INDEX record_order ON record(lane, priority);
CREATE INDEX record_expiry ON record(expires_ns);
CREATE INDEX record_file ON record(file) WHERE file IS NOT NULL;
CREATE TABLE lane(id INTEGER PRIMARY KEY, regions TEXT NOT NULL, route TEXT NOT NULL, UNIQUE(regions, route));
CREATE TABLE counter(
    state TEXT, dimension TEXT, name TEXT, number INTEGER NOT NULL, bytes INTEGER NOT NULL,
    PRIMARY KEY(state, dimension, name)) WITHOUT ROWID;
CREATE TABLE sequence(regions TEXT PRIMARY KEY, last INTEGER NOT NULL) WITHOUT ROWID;
CREATE TABLE intake(
    session TEXT, slot INTEGER, n INTEGER NOT NULL, mid INTEGER NOT NULL, digest BLOB NOT NULL,
    PRIMARY KEY(session, slot)) WITHOUT ROWID;
CREATE TABLE meta(name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE audit(first INTEGER PRIMARY KEY, count INTEGER NOT NULL, digest BLOB NOT NULL, data BLOB NOT NULL);
PRAGMA application_id=1383285095;
PRAGMA user_version=1;
"""


def as_schema_1(path):
    """Rewrite a closed ledger as the first release of the schema left it."""
    old = path.with_name("old.db")
    connection = sqlite3.connect(old, isolation_level=None)
    connection.executescript(SCHEMA_1)
    connection.execute("ATTACH ? AS new", (str(path),))
    for table in ("record", "lane", "intake", "meta", "audit"):
        connection.execute(f"INSERT INTO {table} SELECT * FROM new.{table}")  # noqa: S608 - names from this file
    connection.execute("INSERT INTO sequence SELECT name, number FROM new.counter WHERE state = 'sequence'")
    connection.execute("INSERT INTO counter SELECT * FROM new.counter WHERE state NOT IN ('sequence', 'audit')")
    n, size = connection.execute("SELECT number, bytes FROM new.counter WHERE state = 'audit'").fetchone()
    connection.execute("INSERT INTO meta VALUES ('audit.head', ?), ('audit.bytes', ?)", (f"{n} 00", str(size)))
    connection.close()
    old.replace(path)


def test_file_of_an_older_release_is_migrated_with_everything_in_it(path):
    filled(path)
    ledger = opened(path)
    before = (ledger.counts(), ledger.sequences(), ledger.last_key, ledger.spooled(limit=1000))
    ledger.close()
    as_schema_1(path)
    ledger = opened(path)
    assert ledger.incidents == ()
    assert (ledger.counts(), ledger.sequences(), ledger.last_key, ledger.spooled(limit=1000)) == before
    ledger.commit([store(5000, ttl=1)])
    assert ledger.sweep(NOW + 60 * SECOND).expired == 1
    ledger.close()
    assert verify(path).intact


def test_file_of_another_program_is_set_aside(path):
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE record(x)")
    connection.close()
    ledger = opened(path)
    assert "another program" in ledger.incidents[0]
    ledger.close()


class SmallDisk:
    """Reports ENOSPC when the directory would grow beyond `capacity` bytes."""

    def __init__(self, directory, capacity):
        self.directory, self.capacity = directory, capacity

    def __call__(self, kind, _path, growth):
        if kind == "write" and growth and self.used() + growth > self.capacity:
            return errno.ENOSPC
        return 0

    def used(self):
        return sum(file.stat().st_size for file in self.directory.rglob("*") if file.is_file())


def until_stalled(ledger):
    stored = []
    with contextlib.suppress(LedgerStalledError):
        for n in range(5000):
            ledger.commit([store(n, size=1000 if n % 2 else 5000, ttl=10 if n % 3 else 10_000)])
            stored.append(n)
    return stored


def test_full_disk_takes_no_record_but_lets_deliveries_and_expiry_through(path):
    disk = FaultDisk()
    with disk.mounted():
        ledger = opened(path, reserve_bytes=300_000, journal_bytes=60_000, inline_bytes=3000)
        disk.fails = SmallDisk(path.parent, 800_000)
        stored = until_stalled(ledger)
        assert 100 < len(stored) < 5000
        assert numbers(ledger.spooled(limit=10_000, max_bytes=1 << 30)) == stored
        assert ledger.counts().conserved
        for n in stored[:20]:
            ledger.commit([delivered(n)])
        ledger.commit([Rejected(id="id-21", endpoint="cn", code=0x99, time_ns=NOW)])
        assert ledger.sweep(NOW + 60 * SECOND).expired > 50
        assert ledger.counts().conserved
        ledger.commit([store(9000, size=5000)])
        assert path.with_name("ledger.db.reserve").stat().st_size == 300_000
        ledger.close()
    assert verify(path).intact


@pytest.mark.parametrize("ending", ["deliveries", "expiry"])
def test_ledger_opens_on_a_full_disk_and_its_reserve_lets_it_be_emptied(path, ending):
    disk = FaultDisk()
    reserve = path.with_name("ledger.db.reserve")
    with disk.mounted():
        small = SmallDisk(path.parent, 800_000)
        disk.fails = small
        ledger = opened(path, reserve_bytes=300_000, journal_bytes=60_000, inline_bytes=3000)
        stored = until_stalled(ledger)
        ledger.close()
        small.capacity = small.used()
        ledger = opened(path, reserve_bytes=300_000, journal_bytes=60_000, inline_bytes=3000)
        assert (ledger.incidents, reserve.stat().st_size) == ((), 300_000)
        if ending == "expiry":
            assert ledger.sweep(NOW + 20_000 * SECOND).expired == len(stored)
        else:
            ledger.commit([Noted(name="policy", value="8", time_ns=NOW)])
            ledger.commit([delivered(stored[0])])
            assert not reserve.exists()
            ledger.commit([delivered(n) for n in stored[1:]])
            ledger.sweep(NOW)
        counts = ledger.counts()
        assert (counts.pending, counts.conserved, reserve.stat().st_size) == (0, True, 300_000)
        ledger.close()


async def test_stores_that_waited_for_a_full_disk_go_through_when_deliveries_have_made_room(path):
    disk = FaultDisk()
    with disk.mounted():
        ledger = opened(path, reserve_bytes=300_000, journal_bytes=60_000, inline_bytes=3000)
        disk.fails = SmallDisk(path.parent, 800_000)
        stored = until_stalled(ledger)
        async with Committer(ledger, CommitOptions(max_delay_s=0.001, retry_s=0.01)) as committer:
            waiting = [asyncio.create_task(committer.submit(store(5000 + n, size=2500))) for n in range(40)]
            while committer.stalled is None:  # noqa: ASYNC110 - nothing announces a stall
                await asyncio.sleep(0)
            assert not any(task.done() for task in waiting)
            await asyncio.gather(*(committer.submit(delivered(n)) for n in stored))
            await committer.sweep(NOW)
            await asyncio.gather(*waiting)
            assert committer.stalled is None
        assert numbers(ledger.pending("cn", limit=100)) == list(range(5000, 5040))
        assert ledger.counts().conserved
        ledger.close()


def test_bit_that_flips_inside_a_small_record_costs_that_record_only(path):
    filled(path)
    content = path.read_bytes()
    overwrite(path, content.index(bytes([33]) * 300) + 100, b"x")
    ledger = opened(path)
    assert ledger.incidents == ()
    found = numbers(ledger.pending("cn", limit=1000))
    assert 33 not in found
    assert 32 in found
    assert 34 in found
    assert ledger.counts().breakdown["evicted"]["reason"] == {"ledger.damaged": 1}
    assert ledger.counts().conserved
    ledger.close()


def test_unreadable_seal_is_reported_and_no_reason_not_to_start(path):
    filled(path)
    path.with_name("ledger.db.seal").write_bytes(garbage(100))
    ledger = opened(path)
    assert "seal is not readable" in ledger.incidents[0]
    ledger.commit([store(5000)])
    ledger.close()
    assert opened_again_without_incident(path)


def test_ledger_that_could_not_be_opened_does_not_stay_locked(path):
    filled(path)
    disk = FaultDisk()
    with disk.mounted():
        path.with_name("ledger.db.seal").write_text('{"hash":"00","n":99999,"signature":"","time_ns":0}')
        disk.fails = lambda *_: errno.EIO
        with pytest.raises(LedgerStalledError):
            opened(path)
        disk.fails = None
        ledger = opened(path)
        assert "older than its seal" in ledger.incidents[0]
        ledger.close()


def test_failed_sync_acknowledges_nothing_and_the_next_one_works(path):
    disk = FaultDisk()
    with disk.mounted():
        ledger = opened(path, inline_bytes=1000)
        ledger.commit([store(1)])
        disk.fails = lambda kind, name, _growth: errno.EIO if kind == "sync" and name.endswith("-wal") else 0
        for n in (2, 3):
            with pytest.raises(LedgerStalledError):
                ledger.commit([store(n, size=2000)])
        assert ledger.counts().received == 1
        # After a crash now the journal may turn out to hold the commit: its file has to be there.
        assert len(list(path.with_name("ledger.db.files").iterdir())) == 1
        disk.fails = None
        ledger.commit([store(2, size=2000)])
        assert numbers(ledger.pending("cn", limit=10)) == [1, 2]
        ledger.sweep(NOW)
        ledger.sweep(NOW)
        assert len(list(path.with_name("ledger.db.files").iterdir())) == 1
        ledger.close()
    ledger = opened(path)
    assert numbers(ledger.pending("cn", limit=10)) == [1, 2]
    ledger.close()


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC, errno.EROFS])
def test_picture_file_that_cannot_be_written_leaves_nothing_behind(path, error):
    disk = FaultDisk()
    with disk.mounted():
        ledger = opened(path, inline_bytes=1000)
        disk.fails = lambda kind, name, _growth: error if kind == "write" and ".files" in name else 0
        with pytest.raises(LedgerStalledError):
            ledger.commit([store(1), store(2, size=5000)])
        assert ledger.counts().received == 0
        assert list(path.with_name("ledger.db.files").iterdir()) == []
        disk.fails = None
        ledger.commit([store(1), store(2, size=5000)])
        assert ledger.find("id-2") == record(2, size=5000)
        ledger.close()


def test_write_errors_at_random_leave_the_ledger_as_the_last_commit_left_it(path):
    disk, rng, acknowledged = FaultDisk(), random.Random(1), []
    with disk.mounted():
        ledger = opened(path, inline_bytes=2000, journal_bytes=30_000)
        disk.fails = lambda *_: errno.EIO if rng.random() < 0.02 else 0
        for n in range(300):
            try:
                ledger.commit([store(n, size=rng.choice((100, 3000)))])
            except LedgerStalledError:
                continue
            acknowledged.append(n)
        disk.fails = None
        assert 50 < len(acknowledged) < 300
        assert numbers(ledger.spooled(limit=1000)) == acknowledged
        ledger.close()
    ledger = opened(path)
    assert ledger.incidents == ()
    assert numbers(ledger.spooled(limit=1000)) == acknowledged
    assert ledger.counts().received == len(acknowledged)
    ledger.close()
    assert verify(path).intact


REAL_DISK = """
import subprocess, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from ledger_samples import NOW, delivered, numbers, opened, store
from agent.errors import LedgerError, LedgerStalledError
root = Path(sys.argv[1])
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", root], check=True)
path = root / "ledger.db"
ledger = opened(path, reserve_bytes=600_000, journal_bytes=200_000, inline_bytes=8000)
stored = []
try:
    for n in range(5000):
        ledger.commit([store(n, size=(1000, 20_000)[n % 2])])
        stored.append(n)
except LedgerStalledError as exc:
    print(exc)
assert len(stored) > 100
for n in stored[:60]:
    ledger.commit([delivered(n)])
ledger.sweep(NOW)
ledger.commit([store(9000)])
assert ledger.counts().conserved
assert numbers(ledger.spooled(limit=9999, max_bytes=1 << 30)) == [*stored[60:], 9000]
ledger.close()
with open(root / "log", "wb", buffering=0) as log:
    try:
        while True:
            log.write(bytes(4096))
    except OSError as exc:
        print(exc)
ledger = opened(path, reserve_bytes=600_000, journal_bytes=200_000, inline_bytes=8000)
assert ledger.incidents == ()
ledger.commit([delivered(9000)])
ledger.close()
(root / "log").unlink()
subprocess.run(["mount", "-o", "remount,ro", root], check=True)
try:
    opened(path)
    sys.exit("a ledger opened on a read-only disk")
except LedgerError as exc:
    print(exc)
print("DONE")
"""


def test_real_disk_that_is_full_lets_deliveries_through_and_a_read_only_one_is_an_error(tmp_path):
    namespace = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--map-root-user", "--mount"]
    probe = subprocess.run([*namespace, "mount", "-t", "tmpfs", "tmpfs", tmp_path], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("mounting in a namespace of its own is not allowed here")
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    script = [*namespace, sys.executable, "-c", REAL_DISK.format(paths=paths), str(tmp_path)]
    result = subprocess.run(script, capture_output=True, text=True, check=False, timeout=60)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.endswith("DONE\n")


KILLED = """
import sys
sys.path[:0] = {paths!r}
from pathlib import Path
from ledger_samples import delivered, opened, store
ledger = opened(Path(sys.argv[1]), inline_bytes=2000, journal_bytes=40_000)
first = ledger.counts().received
for n in range(first, first + 100_000, 4):
    ledger.commit([store(n + k, mid=(n + k) % 60_000 + 1, size=(100, 5000)[k % 2]) for k in range(4)])
    ledger.commit([delivered(n)])
    print(n, flush=True)
"""


def test_killed_process_loses_nothing_that_it_acknowledged_and_keeps_the_books_exact(path):
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    rng = random.Random(5)
    for _ in range(KILLS):
        script = [sys.executable, "-c", KILLED.format(paths=paths), str(path)]
        process = subprocess.Popen(script, stdout=subprocess.PIPE, text=True)
        for _ in range(rng.randrange(5, 40)):
            line = process.stdout.readline()
        time.sleep(rng.random() * 0.01)  # anywhere inside a transaction
        process.send_signal(signal.SIGKILL)
        last = int(([line, *process.communicate()[0].splitlines()])[-1])
        ledger = opened(path, inline_bytes=2000, journal_bytes=40_000)
        assert ledger.incidents == ()
        received = ledger.counts().received
        assert last + 4 <= received <= last + 8
        assert ledger.counts().conserved
        expected = [n for n in range(last + 4) if n % 4]
        assert numbers(ledger.spooled(limit=100_000, max_bytes=1 << 30))[: len(expected)] == expected
        ledger.commit([delivered(received - 4)])  # its answer may have been lost
        ledger.close()
        assert verify(path).intact


def test_reader_beside_the_writer_always_sees_conserved_counters(path):
    ledger = opened(path)
    for n in range(40):
        ledger.commit([store(2 * n), store(2 * n + 1), refused()])
        ledger.commit([delivered(2 * n)])
        seen = Ledger.read_counts(path)
        assert seen.conserved
        assert seen == ledger.counts()
    ledger.close()


def test_counts_of_something_that_is_no_ledger_are_an_error(path):
    with pytest.raises(LedgerError):
        Ledger.read_counts(path)
    path.write_text("not a database at all\n" * 100)
    with pytest.raises(LedgerError):
        Ledger.read_counts(path)


def with_backlog(path, number):
    """Multiply one record inside the file: only the size of the backlog matters here."""
    ledger = opened(path)
    ledger.commit([store(0, size=1000)])
    ledger.close()
    connection = sqlite3.connect(path)
    columns = [name for _, name, *_ in connection.execute("PRAGMA table_info(record)")][2:]
    connection.execute(
        "WITH RECURSIVE n(k) AS (SELECT 2 UNION ALL SELECT k + 1 FROM n WHERE k < ?) "  # noqa: S608 - own columns
        f"INSERT INTO record SELECT k, 'id-' || k, {', '.join(columns)} FROM n, record",
        (number,),
    )
    connection.execute("UPDATE counter SET number = ?, bytes = ? WHERE state = 'pending'", (number, number * 1512))
    connection.execute("UPDATE counter SET number = ? WHERE state IN ('received', 'audit')", (number,))
    connection.commit()
    connection.close()


def test_start_takes_less_than_a_second_with_a_backlog_of_100_000_records(tmp_path):
    path = tmp_path / "ledger.db"
    with_backlog(path, 100_000)
    assert path.stat().st_size > 100_000_000
    small = tmp_path / "small" / "ledger.db"
    with_backlog(small, 100)
    took = {}
    for name in (small, path):
        begin = time.perf_counter()
        ledger = opened(name)
        assert len(ledger.pending("cn", limit=64)) == 64
        took[name] = time.perf_counter() - begin
        assert ledger.counts().conserved
        ledger.close()
    assert took[path] < 1.0
    assert took[path] < 5 * took[small] + 0.2


def test_cost_of_reading_the_next_records_does_not_grow_with_the_backlog(path):
    steps = {}
    for number in (1000, 30_000):
        name = path.with_name(str(number)) / "ledger.db"
        with_backlog(name, number)
        ledger = opened(name)
        counted = []
        ledger._connection.set_progress_handler(lambda counted=counted: counted.append(1) or 0, 10)
        ledger.pending("cn", limit=64)
        ledger.pending("cn", limit=64, after=number // 2)
        ledger.held(boot_id="boot", since_ns=0, limit=64)
        ledger.find("id-500")
        ledger.commit([delivered(3)])
        steps[number] = len(counted)
        ledger.close()
    assert steps[30_000] <= steps[1000] * 1.2


def test_group_commit_costs_one_sync_for_all_its_entries(path):
    disk = FaultDisk()
    with disk.mounted():
        ledger = opened(path)
        ledger.commit([store(1000)])  # the first one also syncs the header of the journal
        begin = len(disk.journal)
        ledger.commit([store(n, mid=n + 1) for n in range(128)])
        assert [step.kind for step in disk.journal[begin:]].count("sync") == 1
        ledger.close()


@pytest.mark.parametrize(("inline_bytes", "lower", "upper"), [(128 * 1024, 1.0, 1.15), (1 << 30, 2.0, 2.3)])
def test_large_picture_is_written_to_the_disk_once(path, inline_bytes, lower, upper):
    disk = FaultDisk()
    with disk.mounted():
        ledger = opened(path, inline_bytes=inline_bytes)
        begin = len(disk.journal)
        for n in range(60):
            ledger.commit([store(n, size=200_000)])
        ledger.close()
    written = sum(len(step.data or b"") for step in disk.journal[begin:] if step.kind == "write")
    assert lower <= written / (60 * 200_000) <= upper
