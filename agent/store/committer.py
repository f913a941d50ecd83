"""Group commit: many coroutines submit entries, one thread writes them, a few large transactions at a time.

Invariants
- `submit` returns only when its entry is durable. An entry whose `submit` raised an error is not in the ledger.
- Nothing is discarded: a full queue makes `submit` wait. Stores and endings of records have queues of their own, so
  that stores that wait for disk space never hold back the deliveries that make it.
- While the disk is full or failing, entries stay queued in their order and are tried again; nobody is told otherwise.
- All calls of the ledger, reads included, run on the one thread.
- Who asked to hear of stored records does so in their order, and before the result of any call that came after.
- Deliveries alone wait up to `company_s` for a transaction that is made anyway, such as the next store's. A crash
  meanwhile makes their records go out again, so they wait no longer, and not at all while somebody is in a hurry.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypeVar

from agent.alarm import rung
from agent.errors import LedgerCorruptError, LedgerEntryError, LedgerError, LedgerStalledError
from agent.messages import Record
from agent.store.entries import MIB, Delivered, Ending, Entry, Redecided, Released, Store, SweepResult
from agent.store.ledger import Ledger
from agent.store.queue import Queue, Submission, Waiting

ENTRY_BYTES = 256  # what an entry without an envelope counts
QUIET_SHARE = 5  # when nobody came for this part of the delay, nobody is expected: most wait for their own commit

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitOptions:
    """Bounds of one transaction (entries, bytes, delay) and of each queue (entries, bytes); pause before a retry.

    `company_s`: how long deliveries may wait for a transaction that something else needs.
    """

    max_entries: int = 256
    max_bytes: int = 4 * MIB
    max_delay_s: float = 0.01
    queue_entries: int = 1024
    queue_bytes: int = 16 * MIB
    retry_s: float = 1.0
    company_s: float = 1.0


def _size(entry: Entry) -> int:
    if isinstance(entry, Store | Released | Redecided):
        return len(entry.record.envelope) + ENTRY_BYTES
    return ENTRY_BYTES


class Committer:
    """`async with Committer(ledger, options)`: takes the ledger over until the block ends, then drains what waits."""

    def __init__(self, ledger: Ledger, options: CommitOptions) -> None:
        self._ledger = ledger
        self._options = options
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ledger")
        self._endings, self._stores = (Queue(options.queue_entries, options.queue_bytes) for _ in range(2))
        self._wake = asyncio.Event()
        self._alone_at = 0.0  # when the deliveries that wait have waited long enough for company
        self._hurried = 0
        self._closing = False
        self._sweep_stalled: str | None = None
        self._stored: Callable[[Record], None] = lambda _: None
        self._task: asyncio.Task[None] | None = None

    @property
    def ledger(self) -> Ledger:
        """For what the ledger allows on every thread: `recorded` and `last_key`."""
        return self._ledger

    def on_stored(self, tell: Callable[[Record], None]) -> None:
        """Call `tell` with each record that has become durable, from now on."""
        self._stored = tell

    @property
    def stalled(self) -> str | None:
        """Why entries or the sweep wait for the disk; None while it takes them."""
        return self._stores.stalled or self._endings.stalled or self._sweep_stalled

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._commit_loop(), name="ledger-commit")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing = True
        for queue in (self._endings, self._stores):
            queue.closed = queue.closed or LedgerError("the ledger is closing")
        self._wake.set()
        try:
            if self._task is not None:
                await self._task
        finally:
            self._thread.shutdown()

    async def submit(self, *entries: Entry) -> None:
        """Return when the entries are durable, which need not be in one transaction.

        LedgerError: an entry contradicts the ledger, or the ledger is damaged or closed; nothing of it was kept.
        Cancelling is safe: an entry that is not queued yet is forgotten, one that is queued may still be committed.
        """
        if not entries:
            return
        loop = asyncio.get_running_loop()
        submission = Submission(len(entries), loop.create_future())
        try:
            for entry in entries:
                queue = self._endings if isinstance(entry, Ending) else self._stores
                await queue.put(Waiting(entry, _size(entry), submission, queue, loop.time()))
                self._came(entry)
            await submission.done
        finally:
            submission.done.cancel()

    def _came(self, entry: Entry) -> None:
        """Wake the loop where an entry is due, or is the first to wait for company."""
        now = asyncio.get_running_loop().time()
        if isinstance(entry, Delivered):
            first = len(self._endings.waiting) == 1
            self._alone_at = now + self._options.company_s if first else self._alone_at
            if not first and self._patient():
                return
        elif isinstance(entry, Ending):
            self._alone_at = now
        self._wake.set()

    def _patient(self) -> bool:
        """Whether nothing waits but deliveries, which may wait on."""
        needed = self._stores.waiting or self._hurried or self._closing or self._full()
        return not needed and asyncio.get_running_loop().time() < self._alone_at

    @contextlib.contextmanager
    def hurried(self) -> Iterator[None]:
        """While the block runs, deliveries wait for no company."""
        self._hurried += 1
        self._wake.set()
        try:
            yield
        finally:
            self._hurried -= 1

    async def call(self, function: Callable[[Ledger], Result]) -> Result:
        """Run a function on the ledger's thread, after what was handed to it before. Cancelling does not stop it.

        LedgerCorruptError ends the committer: the ledger has to be opened again.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, function, self._ledger)
        except LedgerCorruptError as exc:
            await self._close(exc)
            raise

    async def sweep(self, now_ns: int | None, *, monotonic_ns: int = 0, boot_id: str = "") -> SweepResult:
        """`Ledger.sweep`; what a full or failing disk does not let it do shows in `stalled` and is done next time."""
        try:
            result = await self.call(lambda ledger: ledger.sweep(now_ns, monotonic_ns=monotonic_ns, boot_id=boot_id))
        except LedgerStalledError as exc:
            self._sweep_stalled = str(exc)
            return SweepResult()
        self._sweep_stalled = None
        return result

    async def _commit_loop(self) -> None:
        try:
            while await self._something():
                await self._gather()
                await self._write(self._take())
        finally:
            await self._close(LedgerError(f"the ledger was closed: {self.stalled}"))

    def _ready(self) -> list[Queue]:
        """Queues that may be tried now, endings first; none while all that waits is patient."""
        if self._patient():
            return []
        now = asyncio.get_running_loop().time()
        return [queue for queue in (self._endings, self._stores) if queue.waiting and queue.not_before <= now]

    async def _something(self) -> bool:
        """Wait for entries that may be tried now; False when the block has ended and no such entry is left."""
        while not self._ready():
            if self._closing:
                return False
            self._wake.clear()
            await rung(self._wake, self._next_at())
        return True

    def _next_at(self) -> float | None:
        """When time alone will make a queue ready; None: it will not."""
        moments = [queue.not_before for queue in (self._endings, self._stores) if queue.waiting]
        return max(min(moments), self._alone_at if self._patient() else 0.0) if moments else None

    async def _gather(self) -> None:
        """Let others join the transaction, up to its bounds, for as long as they keep coming.

        What came while another transaction was written has waited already: a long one, with a picture, is not waited
        for twice.
        """
        loop = asyncio.get_running_loop()
        since = self._stores.waiting[0].since if self._stores.waiting else loop.time()
        latest = since + self._options.max_delay_s
        while not self._closing and not self._full():
            self._wake.clear()
            if not await rung(self._wake, min(latest, loop.time() + self._options.max_delay_s / QUIET_SHARE)):
                break

    def _full(self) -> bool:
        entries = len(self._endings.waiting) + len(self._stores.waiting)
        size = self._endings.waiting_bytes + self._stores.waiting_bytes
        return entries >= self._options.max_entries or size >= self._options.max_bytes

    def _take(self) -> list[Waiting]:
        """The next transaction: at least one entry, within the bounds."""
        taken: list[Waiting] = []
        for queue in self._ready():
            room = self._options.max_bytes - sum(waiting.size for waiting in taken)
            entries = self._options.max_entries - len(taken)
            if not taken or (queue.waiting[0].size <= room and entries):
                taken += queue.take(room, entries)
        return taken

    async def _write(self, batch: list[Waiting]) -> None:
        """Write a transaction; an entry that contradicts the ledger fails alone, what stalls is put back."""
        while batch:
            entries = [waiting.entry for waiting in batch]
            try:
                arrived = await self.call(lambda ledger, entries=entries: ledger.commit(entries))  # type: ignore[misc]
            except LedgerEntryError as exc:
                wrong = batch.pop(exc.index)
                await wrong.queue.settle([wrong], exc)
            except LedgerStalledError as exc:
                batch = self._put_back(batch, str(exc))
            except LedgerError as exc:
                await self._settle(batch, exc)
                await self._close(exc)
                return
            except BaseException:
                await self._settle(batch, LedgerError("the ledger's thread failed"))
                raise
            else:
                for record in arrived:
                    self._stored(record)
                await self._settle(batch)
                return

    def _put_back(self, batch: list[Waiting], why: str) -> list[Waiting]:
        """Put the stores back, or the endings when they stalled alone; what to try at once."""
        not_before = asyncio.get_running_loop().time() + self._options.retry_s
        endings = [waiting for waiting in batch if waiting.queue is self._endings]
        stores = [waiting for waiting in batch if waiting.queue is self._stores]
        if stores:
            self._stores.put_back(stores, why, not_before)
            return endings
        self._endings.put_back(endings, why, not_before)
        return []

    async def _settle(self, batch: list[Waiting], error: LedgerError | None = None) -> None:
        for queue in (self._endings, self._stores):
            if own := [waiting for waiting in batch if waiting.queue is queue]:
                await queue.settle(own, error)

    async def _close(self, error: LedgerError) -> None:
        for queue in (self._endings, self._stores):
            await queue.close(error)
