import asyncio
import contextlib
import threading
from types import SimpleNamespace

import pytest
from ledger_samples import NOW, delivered, numbers, opened, record, store
from msgspec.structs import replace

from agent import daemon
from agent.clock import IS_SET_NS
from agent.errors import LedgerCorruptError, LedgerEntryError, LedgerError, LedgerStalledError
from agent.store.committer import CommitOptions, Committer
from agent.store.entries import Rejected, SweepResult, Withdrawn

SET = IS_SET_NS + 1  # the clock was set, and long ago


@pytest.fixture
def ledger(tmp_path):
    ledger = opened(tmp_path / "ledger.db")
    yield ledger
    ledger.close()


class Disk:
    """Stands before a ledger's `commit`: tells of the first, counts transactions, stalls or fails on demand."""

    def __init__(self, ledger):
        self.loop = asyncio.get_running_loop()
        self.transactions = []
        self.error = None
        self.begun = asyncio.Event()
        self.refused = asyncio.Event()
        self.refuses = lambda _: True
        self.gate = threading.Event()
        self.gate.set()
        self._commit = ledger.commit
        ledger.commit = self.commit

    def commit(self, entries):
        self.loop.call_soon_threadsafe(self.begun.set)
        assert self.gate.wait(10)
        if (error := self.error) is not None and any(self.refuses(entry) for entry in entries):
            self.loop.call_soon_threadsafe(self.refused.set)
            raise error
        self.transactions.append(len(entries))
        return self._commit(entries)


async def test_submitted_entry_is_durable_when_submit_returns(ledger):
    async with Committer(ledger, CommitOptions()) as committer:
        await committer.submit(store(1))
        assert ledger.read_counts(ledger._path).pending == 1


async def test_entries_of_many_submitters_share_few_transactions_in_order(ledger):
    disk = Disk(ledger)
    async with Committer(ledger, CommitOptions(max_entries=50, max_delay_s=10)) as committer:
        await asyncio.gather(*(committer.submit(store(n)) for n in range(200)))
        assert disk.transactions == [50, 50, 50, 50]
        spooled = await committer.call(lambda ledger: ledger.pending("cn", limit=1000))
    assert numbers(spooled) == list(range(200))


async def test_stored_records_are_told_of_in_order_and_before_a_later_read_shows_them(ledger):
    told, reads = [], []

    async def read(committer):
        rows = await committer.call(lambda ledger: ledger.pending("cn", limit=1000))
        reads.append(numbers(rows))
        assert {row.record.id for row in rows} <= set(told)

    async with Committer(ledger, CommitOptions(max_entries=7, max_delay_s=0.001)) as committer:
        committer.on_stored(lambda record: told.append(record.id))
        async with asyncio.TaskGroup() as group:
            for number in range(100):
                group.create_task(committer.submit(store(number)))
                group.create_task(read(committer))
                await asyncio.sleep(0)
    assert told == [record(number).id for number in range(100)]
    assert any(0 < len(found) < 100 for found in reads)


async def test_lone_entry_waits_no_longer_than_the_delay(ledger):
    async with Committer(ledger, CommitOptions(max_delay_s=0.01)) as committer:
        async with asyncio.timeout(5):
            await committer.submit(store(1))


async def test_what_came_during_a_long_transaction_waits_for_no_more_company(ledger, monkeypatch):
    disk, loop = Disk(ledger), asyncio.get_running_loop()
    disk.gate.clear()
    async with Committer(ledger, CommitOptions(max_entries=2, max_delay_s=1000)) as committer:
        long = [asyncio.create_task(committer.submit(store(n))) for n in range(2)]
        await disk.begun.wait()
        late = asyncio.create_task(committer.submit(store(2)))
        await asyncio.sleep(0)
        assert committer._stores.waiting
        now = loop.time
        monkeypatch.setattr(loop, "time", lambda: now() + 1000)
        disk.gate.set()
        async with asyncio.timeout(10):
            await asyncio.gather(*long, late)
    assert disk.transactions == [2, 1]


async def test_transaction_is_bounded_by_bytes(ledger):
    disk = Disk(ledger)
    async with Committer(ledger, CommitOptions(max_bytes=25_000, max_delay_s=0.05)) as committer:
        await asyncio.gather(*(committer.submit(store(n, size=10_000)) for n in range(6)))
    assert disk.transactions == [2, 2, 2]


async def test_full_queue_makes_submitters_wait_and_discards_nothing(ledger):
    disk = Disk(ledger)
    disk.gate.clear()
    async with Committer(ledger, CommitOptions(queue_entries=4, max_entries=2, max_delay_s=0)) as committer:
        tasks = [asyncio.create_task(committer.submit(store(n))) for n in range(10)]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in tasks)
        assert len(committer._stores.waiting) <= 4
        disk.gate.set()
        await asyncio.gather(*tasks)
    assert ledger.counts().pending == 10


async def test_entry_that_contradicts_the_ledger_fails_alone(ledger):
    async with Committer(ledger, CommitOptions(max_delay_s=0.05)) as committer:
        entries = [store(1), store(2), store(1), store(3)]
        results = await asyncio.gather(*map(committer.submit, entries), return_exceptions=True)
    assert [type(result) for result in results[:2]] == [type(None)] * 2
    assert isinstance(results[2], LedgerError)
    assert results[3] is None
    assert ledger.counts().received == 3


async def test_stores_wait_for_a_full_disk_while_deliveries_go_on(ledger):
    ledger.commit([store(1)])
    disk = Disk(ledger)
    disk.error = LedgerStalledError("disk full")
    disk.refuses = lambda entry: hasattr(entry, "record")
    async with Committer(ledger, CommitOptions(max_delay_s=0.01, retry_s=0.02)) as committer:
        stores = [asyncio.create_task(committer.submit(store(n))) for n in range(2, 6)]
        await committer.submit(delivered(1))
        assert committer.stalled == "disk full"
        assert not any(task.done() for task in stores)
        disk.error = None
        await asyncio.gather(*stores)
        assert committer.stalled is None
        spooled = await committer.call(lambda ledger: ledger.pending("cn", limit=10))
    assert numbers(spooled) == [2, 3, 4, 5]
    assert ledger.counts().conserved


@contextlib.asynccontextmanager
async def waiting_for_company(committer, *entries):
    """Within it these entries are submitted, and nothing has been written for a while."""
    task = asyncio.create_task(committer.submit(*entries))
    await asyncio.sleep(0.05)
    assert not task.done()
    async with asyncio.timeout(5):
        yield task
        await task


async def test_deliveries_alone_wait_for_the_transaction_of_the_next_store(ledger):
    ledger.commit([store(1), store(2)])
    disk = Disk(ledger)
    async with Committer(ledger, CommitOptions(company_s=3600)) as committer:
        async with waiting_for_company(committer, delivered(1), delivered(2)):
            await committer.submit(store(3))
        assert disk.transactions == [3]
    assert (ledger.counts().delivered, ledger.counts().pending) == (2, 1)


async def test_deliveries_wait_for_company_no_longer_than_they_may(ledger):
    ledger.commit([store(1), store(2)])
    disk = Disk(ledger)
    async with Committer(ledger, CommitOptions(company_s=0.2)) as committer:
        async with waiting_for_company(committer, delivered(1)):
            await asyncio.sleep(0.1)
            await committer.submit(delivered(2))
        assert disk.transactions == [2]


@pytest.mark.parametrize(
    "ending",
    [Rejected(id="id-2", endpoint="cn", code=0x99, time_ns=NOW), Withdrawn(id="id-2", reason="policy", time_ns=NOW)],
)
async def test_other_ending_waits_for_nobody_and_takes_deliveries_along(ledger, ending):
    ledger.commit([store(1), store(2)])
    disk = Disk(ledger)
    async with Committer(ledger, CommitOptions(company_s=3600)) as committer:
        async with waiting_for_company(committer, delivered(1)):
            await committer.submit(ending)
        assert disk.transactions == [2]


async def test_no_delivery_waits_for_company_while_somebody_is_in_a_hurry(ledger):
    ledger.commit([store(1), store(2), store(3)])
    async with Committer(ledger, CommitOptions(company_s=3600)) as committer:
        async with waiting_for_company(committer, delivered(1)):
            with committer.hurried():
                await committer.submit(delivered(2))
        async with waiting_for_company(committer, delivered(3)) as task:
            with committer.hurried():
                await task


async def test_full_transaction_of_deliveries_waits_for_nobody(ledger):
    ledger.commit([store(n) for n in range(4)])
    disk = Disk(ledger)
    async with Committer(ledger, CommitOptions(max_entries=4, company_s=3600)) as committer, asyncio.timeout(5):
        await committer.submit(*(delivered(n) for n in range(4)))
    assert disk.transactions == [4]


async def test_deliveries_that_wait_for_company_are_written_when_the_block_ends(ledger):
    ledger.commit([store(1)])
    async with Committer(ledger, CommitOptions(company_s=3600)) as committer:
        task = asyncio.create_task(committer.submit(delivered(1)))
        await asyncio.sleep(0.05)
    await task
    assert ledger.counts().delivered == 1


async def test_deliveries_on_a_failing_disk_are_tried_again_without_company(ledger):
    ledger.commit([store(1)])
    disk = Disk(ledger)
    disk.error = LedgerStalledError("disk full")
    async with Committer(ledger, CommitOptions(company_s=0.02, retry_s=0.02)) as committer, asyncio.timeout(5):
        task = asyncio.create_task(committer.submit(delivered(1)))
        await disk.refused.wait()
        disk.error = None
        await task


async def test_submission_of_many_tells_the_first_error_once_all_are_settled(ledger):
    async with Committer(ledger, CommitOptions(max_entries=2)) as committer:
        with pytest.raises(LedgerEntryError):
            await committer.submit(store(1), store(1), store(2), store(3), store(4))
        assert ledger.counts().pending == 4
        await committer.submit()


async def test_damaged_ledger_fails_everyone_at_once_and_from_then_on(ledger):
    disk = Disk(ledger)
    disk.error = LedgerCorruptError("malformed")
    async with Committer(ledger, CommitOptions(queue_entries=2, max_delay_s=0.01)) as committer:
        results = await asyncio.gather(*(committer.submit(store(n)) for n in range(6)), return_exceptions=True)
        assert all(isinstance(result, LedgerCorruptError) for result in results)
        with pytest.raises(LedgerCorruptError):
            await committer.submit(store(9))


async def test_damage_seen_while_reading_ends_the_committer(ledger):
    def read(_):
        raise LedgerCorruptError("malformed")

    async with Committer(ledger, CommitOptions()) as committer:
        with pytest.raises(LedgerCorruptError):
            await committer.call(read)
        with pytest.raises(LedgerCorruptError):
            await committer.submit(store(1))


async def test_sweep_on_a_full_disk_is_no_error_and_shows_as_stalled(ledger):
    def sweep(*_, **__):
        raise LedgerStalledError("disk full")

    swept = ledger.sweep
    async with Committer(ledger, CommitOptions()) as committer:
        ledger.sweep = sweep
        assert await committer.sweep(None) == SweepResult()
        assert committer.stalled == "disk full"
        ledger.sweep = swept
        await committer.sweep(None)
        assert committer.stalled is None


async def test_sweeps_follow_each_other_until_nothing_is_overdue(ledger, patience):
    overdue = [replace(store(n), record=replace(record(n), recorded_ns=SET, expires_ns=SET + 1)) for n in range(2500)]
    async with asyncio.timeout(patience), Committer(ledger, CommitOptions()) as committer:
        await committer.submit(*overdue[:1000])
        await committer.submit(*overdue[1000:2000])
        await committer.submit(*overdue[2000:], store(3000))
        loop = asyncio.create_task(daemon._sweep_loop(SimpleNamespace(committer=committer)))
        async with asyncio.timeout(daemon.SWEEP_SECONDS * 0.9):
            while ledger.counts().expired < len(overdue):
                await committer.call(lambda ledger: ledger.last_key)
        loop.cancel()
        assert ledger.counts().pending == 1


async def test_unexpected_failure_of_the_thread_reaches_submitters_and_the_block(ledger):
    disk = Disk(ledger)
    disk.error = ZeroDivisionError("a defect")
    committer = Committer(ledger, CommitOptions())
    await committer.__aenter__()
    with pytest.raises(LedgerError):
        await committer.submit(store(1))
    with pytest.raises(ZeroDivisionError):
        await committer.__aexit__(None, None, None)


async def test_block_ends_only_when_everything_submitted_is_durable(ledger):
    async with Committer(ledger, CommitOptions(max_entries=3)) as committer:
        tasks = [asyncio.create_task(committer.submit(store(n))) for n in range(20)]
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert ledger.counts().pending == 20


async def test_block_ends_on_a_full_disk_and_tells_those_who_wait(ledger):
    disk = Disk(ledger)
    disk.error = LedgerStalledError("disk full")
    async with Committer(ledger, CommitOptions(max_delay_s=0, retry_s=60)) as committer:
        task = asyncio.create_task(committer.submit(store(1)))
        await disk.refused.wait()
    with pytest.raises(LedgerError, match="disk full"):
        await task
    with pytest.raises(LedgerError):
        await committer.submit(store(2))


async def test_cancelled_submitter_leaves_the_others_untouched(ledger):
    disk = Disk(ledger)
    disk.gate.clear()
    async with Committer(ledger, CommitOptions(max_delay_s=0)) as committer:
        tasks = [asyncio.create_task(committer.submit(store(n))) for n in range(4)]
        await asyncio.sleep(0.02)
        tasks[1].cancel()
        disk.gate.set()
        results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(result) for result in results] == [type(None), asyncio.CancelledError, type(None), type(None)]
    assert ledger.counts().conserved
