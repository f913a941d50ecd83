"""Power cuts: the ledger opens with everything that was acknowledged, whatever the disk had not synced."""

import os
import random
import shutil

import pytest
from faultdisk import CrashImage, FaultDisk
from ledger_samples import NOW, SECOND, delivered, in_memory, numbers, opened, record, store
from msgspec.structs import replace

from agent.messages import State
from agent.store.audit_cli import verify
from agent.store.entries import Released

LIMITS = {"inline_bytes": 2000, "total_bytes": 60_000, "audit_bytes": 4000, "intake_window": 8, "journal_bytes": 50_000}
CUTS = int(os.environ.get("RESIDENCY_SOAK_CUTS", "150"))


def facts(ledger):
    """Everything that a commit promises to keep, as one comparable value."""
    spooled = {item.record.id: item.record for item in ledger.spooled(limit=10_000, max_bytes=1 << 30)}
    return spooled, ledger.counts(), ledger.sequences(), ledger.recent_intake("telemetry"), ledger.last_key


def workload(ledger, disk, rng):
    """Commit all kinds of entries; note what stands after each commit, before and after the sweeps too."""
    disk.mark(facts(ledger))
    alive = []
    for n in range(60):
        entries = [store(2 * n, mid=n + 1, size=rng.choice((10, 900, 3000, 9000)), ttl=rng.choice((5, 50, 500)))]
        entries.append(store(2 * n + 1, size=50, route=(), regions=("cn", "hk")))
        present = [number for number in alive if ledger.find(f"id-{number}")]
        entries += [delivered(number) for number in rng.sample(present, min(len(present), rng.randrange(3)))]
        if n % 5 == 4 and (held := ledger.find(f"id-{2 * n - 1}")):
            pending = replace(held, state=State.PENDING, route=("hk",), regions=("hk",), envelope=b"n" * 2500)
            entries.append(Released(record=pending, time_ns=NOW))
        ledger.commit(entries)
        disk.mark(facts(ledger))
        alive.append(2 * n)
        if n % 9 == 8:
            ledger.sweep(NOW + n * SECOND)
            disk.mark(facts(ledger))


@pytest.fixture
def images():
    directory = in_memory()
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def journal(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source")
    disk = FaultDisk()
    with disk.mounted():
        ledger = opened(directory / "ledger.db", **LIMITS)
        workload(ledger, disk, random.Random(1))
        ledger.close()
    return directory, disk.journal


def test_every_acknowledged_commit_survives_a_power_cut_at_any_moment(journal, images):
    source, steps = journal
    marks = [index for index, step in enumerate(steps) if step.kind == "mark"]
    rng = random.Random(2)
    for _ in range(CUTS):
        cut = rng.randrange(marks[0] + 1, len(steps))
        before = max(index for index in marks if index < cut)
        after = [index for index in marks if index >= cut][:1]
        target = images / "cut"
        CrashImage(steps[:cut]).write_to(target, source, rng)
        ledger = opened(target / "ledger.db", **LIMITS)
        assert ledger.incidents == ()
        assert facts(ledger) in [steps[index].note for index in (before, *after)]
        assert ledger.counts().conserved
        for _ in range(2):
            ledger.sweep(None)
        stored = {item.record.id for item in ledger.spooled(limit=10_000) if len(item.record.envelope) > 2000}
        assert len(list((target / "ledger.db.files").glob("*"))) == len(stored)
        ledger.commit([store(100_000)])
        assert 100_000 in numbers(ledger.pending("cn", limit=10_000))
        ledger.close()
        assert verify(target / "ledger.db").intact
        shutil.rmtree(target)


def test_power_cut_while_the_ledger_is_created_leaves_one_that_opens(journal, images):
    source, steps = journal
    first = next(index for index, step in enumerate(steps) if step.kind == "mark")
    rng = random.Random(3)
    for cut in range(first):
        target = images / str(cut)
        CrashImage(steps[:cut]).write_to(target, source, rng)
        ledger = opened(target / "ledger.db", **LIMITS)
        ledger.commit([store(1)])
        assert ledger.counts().received == 1
        ledger.close()


def test_the_simulated_power_cut_would_find_a_journal_that_is_not_synced(journal, tmp_path):
    source, steps = journal
    unsynced = [step for step in steps if step.kind != "sync" or not step.path.endswith("-wal")]
    cut = len(unsynced) // 2
    promised = [step.note for step in unsynced[:cut] if step.kind == "mark"][-1]
    CrashImage(unsynced[:cut]).write_to(tmp_path, source, random.Random(4))
    ledger = opened(tmp_path / "ledger.db", **LIMITS)
    assert facts(ledger) != promised
    ledger.close()


def test_the_simulated_power_cut_would_find_a_file_that_is_not_synced(journal, tmp_path):
    source, steps = journal
    unsynced = [step for step in steps if step.kind != "sync" or ".files" not in step.path]
    cut = len(unsynced) * 2 // 3
    promised = [step.note for step in unsynced[:cut] if step.kind == "mark"][-1]
    CrashImage(unsynced[:cut]).write_to(tmp_path, source, random.Random(5))
    ledger = opened(tmp_path / "ledger.db", **LIMITS)
    assert facts(ledger)[0] != promised[0]
    ledger.close()


def test_record_made_larger_than_memory_of_the_journal_is_whole_after_a_cut(tmp_path):
    disk = FaultDisk()
    with disk.mounted():
        ledger = opened(tmp_path / "source" / "ledger.db", inline_bytes=1 << 30)
        ledger.commit([store(1, size=6 << 20)])
        steps = list(disk.journal)
        ledger.close()
    CrashImage(steps).write_to(tmp_path / "cut", tmp_path / "source", random.Random(6))
    ledger = opened(tmp_path / "cut" / "ledger.db")
    assert ledger.find("id-1") == record(1, size=6 << 20)
    ledger.close()
