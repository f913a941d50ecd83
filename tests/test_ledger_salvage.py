"""A salvage that is cut off: whatever step a kill ends, the next start ends where an undisturbed salvage does."""

import errno
import os
import random
import shutil
import signal
import sys

import pytest
from faultdisk import FaultDisk
from ledger_samples import NOW, delivered, in_memory, opened, refused, store

from agent.errors import LedgerStalledError
from agent.store import aside, ledger, salvage
from agent.store.audit_cli import export, verify
from agent.store.blobs import write_synced
from agent.store.entries import Noted

FILE_CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate"}


def nonsense(path):
    """What makes the next start set the ledger aside with all its records readable."""
    path.with_name("ledger.db.suspect").write_text("nonsense")


def no_header(path):
    for name in (path, path.with_name("ledger.db-wal")):
        with name.open("r+b") as file:
            file.write(random.Random(1).randbytes(100))


DAMAGES = {"nonsense": nonsense, "no header": no_header, "gone": lambda path: path.unlink()}


def fill(it, begin):
    """Commit records of all kinds, some of them in files."""
    for n in range(begin, begin + 6, 3):
        it.commit([store(n, mid=n + 1), store(n + 1, size=5000), store(n + 2, regions=("cn", "hk"), route=())])
    it.commit([delivered(begin), refused(), Noted(name="policy", value="7", time_ns=NOW)])
    it.sweep(None)


@pytest.fixture
def path(monkeypatch):
    """A ledger as a crash leaves it, with a journal, after an earlier one was set aside; damage it."""
    monkeypatch.setattr(salvage, "BATCH", 4)
    directory = in_memory()
    path = directory / "source" / "ledger.db"
    with_files(path, lambda it: fill(it, 0))
    nonsense(path)
    with_files(path, lambda it: fill(it, 100))
    it = opened(path, inline_bytes=2000)
    it.commit([store(200, size=3000), store(201)])
    shutil.copytree(path.parent, directory / "crashed", ignore=shutil.ignore_patterns("*-shm", "*.lock"))
    it.close()
    yield directory / "crashed" / "ledger.db"
    shutil.rmtree(directory)


def with_files(path, act):
    it = opened(path, inline_bytes=2000)
    act(it)
    it.close()


def copy_of(path):
    """The same files in another place."""
    target = path.parent.with_name("copy")
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(path.parent, target)
    return target / path.name


def end_of(path):
    """What a start leads to: its incidents; all that the ledger holds then, and what lies beside it."""
    it = opened(path, inline_bytes=2000)
    assert it.counts().conserved
    spooled = {item.key: item.record for item in it.spooled(limit=1000)}
    held = (it.counts(), spooled, it.sequences(), it.recent_intake("telemetry"), it.meta("policy"), it.last_key)
    assert it.meta("audit.rollback") is None
    incidents = it.incidents
    it.close()
    assert verify(path).intact
    files = [file for file in sorted(path.parent.rglob("*")) if not file.name.endswith(("-shm", ".lock"))]
    old = b"".join(file.read_bytes() for file in files if "corrupt" in str(file) and file.is_file())
    return incidents, (held, [str(file.relative_to(path.parent)) for file in files if "-wal" not in file.name], old)


def killed(act):
    """Whether SIGKILL ended `act`, which has a process of its own."""
    child = os.fork()
    if child == 0:
        try:
            act()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def killed_at(path, step):
    """Open the ledger and be killed before change `step` to the disk; whether there was so late a change."""
    left = step

    def change(*_):
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def audited(event, arguments):
        if event in FILE_CHANGES or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR)):
            change()

    def act():
        sys.addaudithook(audited)
        with FaultDisk(fails=change).mounted():
            opened(path, inline_bytes=2000)

    return killed(act)


@pytest.mark.parametrize("damage", DAMAGES)
def test_salvage_killed_at_each_step_and_once_more_ends_as_an_undisturbed_one(path, damage):
    DAMAGES[damage](path)
    (what, saved), whole = end_of(copy_of(path))
    assert "set aside as ledger.db.corrupt-2" in what
    step, rng = 1, random.Random(1)
    while killed_at(cut := copy_of(path), step):
        again = rng.randrange(1, 2 * step)
        killed_at(cut, again)
        said, end = end_of(cut)
        assert end == whole, f"killed at steps {step} and {again}"
        assert not said or ("set aside as ledger.db.corrupt-2" in said[0] and said[1] == saved)
        step += 1
    assert step > 50


def test_salvage_that_did_not_end_is_reported_and_loses_no_record(path):
    nonsense(path)
    whole = end_of(copy_of(path))[1]
    assert whole[0][0].evicted == 0
    assert killed(lambda: cut_off_after(path, 2))
    incidents, end = end_of(path)
    assert "set aside as ledger.db.corrupt-2" in incidents[0]
    assert "the one before did not end" in incidents[0]
    assert end == whole


def cut_off_after(path, batches):
    """Open the ledger and be killed when the salvage has carried over so many batches."""
    real = salvage.Wreck.batches

    def some(wreck):
        for number, batch in enumerate(real(wreck)):
            if number == batches:
                os.kill(os.getpid(), signal.SIGKILL)
            yield batch

    salvage.Wreck.batches = some
    opened(path, inline_bytes=2000)


def test_salvage_that_never_ends_does_not_keep_the_ledger_from_opening(path, monkeypatch):
    nonsense(path)
    before = end_of(copy_of(path))[1][0][0]
    for _ in range(aside.ATTEMPTS):
        assert killed(lambda: cut_off_after(path, 2))
    monkeypatch.setattr(ledger, "salvage", lambda *_: pytest.fail("tried again"))
    incidents, (held, beside, _) = end_of(path)
    assert "salvage of ledger.db.corrupt-2 given up" in incidents[0]
    counts = held[0]
    assert (counts.received, counts.delivered, counts.refused) == (before.received, before.delivered, before.refused)
    assert (counts.pending + counts.held, counts.evicted) == (8, before.pending + before.held - 8)
    assert "ledger.db.corrupt-2" in beside
    assert [row["value"] for row in export(path) if row.get("name") == "ledger.set-aside"] == ["ledger.db.corrupt-2"]
    assert end_of(path)[0] == ()


def test_ledger_that_cannot_be_opened_after_all_salvages_is_set_aside_in_its_turn(path):
    nonsense(path)
    for _ in range(aside.ATTEMPTS):
        assert killed(lambda: cut_off_after(path, 2))
    no_header(path)
    incidents, _ = end_of(path)
    assert "set aside as ledger.db.corrupt-3" in incidents[0]
    assert end_of(path)[0] == ()


def test_mark_that_is_nonsense_throws_nothing_away(path):
    whole = end_of(copy_of(path))[1][0]
    path.with_name("ledger.db.salvage").write_bytes(b"\0" * 50)
    incidents, (held, beside, _) = end_of(path)
    assert "not readable" in incidents[0]
    assert held == whole
    assert "ledger.db.salvage" not in beside


@pytest.mark.parametrize("number", [1, 2])
def test_disk_too_full_for_the_mark_takes_nothing_from_the_old_ledger(path, monkeypatch, number):
    nonsense(path)
    incidents, whole = end_of(copy_of(path))
    calls = []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) >= number:
            raise OSError(errno.ENOSPC, "full")
        write_synced(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(aside, "write_synced", full)
        for _ in range(aside.ATTEMPTS + 1):
            with pytest.raises(LedgerStalledError):
                opened(path, inline_bytes=2000)
    assert end_of(path) == (incidents, whole)


def test_ledger_whose_salvage_fails_takes_no_record_before_it_was_done(path, monkeypatch):
    nonsense(path)
    whole = end_of(copy_of(path))[1]
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "salvage", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            opened(path)
    assert path.with_name("ledger.db.salvage").exists()
    assert end_of(path)[1] == whole


def test_disk_that_takes_nothing_ends_a_salvage_without_an_error(path):
    def full():
        raise LedgerStalledError("full")

    assert salvage.salvage(path, full) == "0 of 12 records carried over, then: full"
