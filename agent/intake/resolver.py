"""Deciding again: about held records when later fixes have narrowed the doubt, about all records under a new policy.

Fixes cost what they settle: of what else is held no envelope is read, and what they say nothing about is not decided.
A record keeps the regions and the class that it carries; it may lose regions by later fixes, and it never gains any.
What an uplink has claimed is left to that uplink, which asks here when the policy no longer lets the record go.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractAsyncContextManager

from agent.errors import EnvelopeError, LedgerStalledError
from agent.intake.intake import Inward
from agent.messages import Held, Hold, Publish, Record, Refuse, State, Whereabouts
from agent.store.entries import Entry, Redecided, Released, Spooled, Withdrawn

log = logging.getLogger(__name__)

PAUSE_SECONDS = 1.0  # between passes: a fix a second is the usual rate of a receiver
PAGE = 64  # records read at a time
REASON = "policy.changed"


class Resolver:
    """Goes through the held records after new fixes, and through all records when it is asked to."""

    def __init__(self, inward: Inward) -> None:
        self._inward = inward

    async def run_loop(self) -> None:
        """Returns only by cancelling, which is safe: an unfinished pass is begun again."""
        while True:
            await self._inward.fixes.arrived.wait()
            with contextlib.suppress(LedgerStalledError):  # the disk does not answer now: begin again later
                await self._pass()
            await asyncio.sleep(PAUSE_SECONDS)

    async def _pass(self) -> None:
        fixes = self._inward.fixes
        since_ns, after = fixes.taken(), 0
        try:
            while rows := await self._held(since_ns, after):
                after = rows[-1].key
                await self._narrow([row.key for row in rows if self._settled(row)])
        except BaseException:
            fixes.look_again(since_ns)
            raise

    async def _held(self, since_ns: int, after: int) -> list[Held]:
        """The next of the held records that fixes may say something about, captured at `since_ns` or later."""
        boot_id = self._inward.line.pipeline.identity.boot_id
        return await self._inward.committer.call(
            lambda ledger: ledger.held(boot_id=boot_id, since_ns=since_ns, limit=PAGE, after=after)
        )

    def _settled(self, held: Held) -> bool:
        """Whether fixes have narrowed its doubt so far that it no longer has to wait."""
        pipeline = self._inward.line.pipeline
        whereabouts = pipeline.narrowed(held)
        return whereabouts is not None and not isinstance(pipeline.verdict(held, whereabouts), Hold)

    async def _narrow(self, keys: Sequence[int]) -> None:
        """Decide again about these held records."""
        while keys:
            async with self._inward.line.turns.deciding():
                rows = await self._inward.committer.call(lambda ledger: ledger.keyed(keys))  # noqa: B023 - awaited at once
                await self._change(rows, self._narrowed)
            keys = [key for key in keys if rows and key > rows[-1].key]

    async def review(self) -> tuple[int, int]:
        """Decide again about every record that is in the car now. Safe to cancel and repeat.

        How many changed, and how many would have to, or are about to, but are claimed.
        """
        return await self._all(self.again, self._inward.line.turns.deciding)

    async def give_up(self, regions: Collection[str]) -> int:
        """Refuse every record that carries one of these regions, whose names mean something else now; how many.

        To be called while nothing is decided and nothing is claimed.
        """

        def entry(record: Record) -> Entry | None:
            if set(regions).isdisjoint(record.regions):
                return None
            return Withdrawn(id=record.id, reason="region.redefined", time_ns=time.time_ns())

        changed, _ = await self._all(entry, contextlib.nullcontext)
        return changed

    async def _all(
        self, decide: Callable[[Record], Entry | None], turn: Callable[[], AbstractAsyncContextManager[None]]
    ) -> tuple[int, int]:
        """Page by page, up to the record that is the last one now: what comes later is decided as it comes."""
        after, last, changed, left = 0, self._inward.committer.ledger.last_key, 0, 0
        while after < last:
            async with turn():
                rows = await self._inward.committer.call(lambda ledger: ledger.spooled(limit=PAGE, after=after))  # noqa: B023 - as above
                free = [row for row in rows if row.record.id not in self._inward.board.claimed]
                claimed = (row.record for row in rows if row not in free)
                # a held one is being decided about elsewhere, and to release it here would use a sequence number up
                left += sum(record.state is State.HELD or decide(record) is not None for record in claimed)
                changed += await self._change(free, decide)
            after = rows[-1].key if rows else last
        return changed, left

    async def _change(self, rows: Sequence[Spooled], decide: Callable[[Record], Entry | None]) -> int:
        """Write down what becomes of these records, together; how many changed."""
        board = self._inward.board
        found = [(row.record, decide(row.record)) for row in rows if row.record.id not in board.claimed]
        changes = [(record, entry) for record, entry in found if entry is not None]
        claimed = {record.id for record, _ in changes}
        board.claimed.update(claimed)  # no uplink begins with a record whose decision is under way
        try:
            await self._inward.committer.submit(*(entry for _, entry in changes))
        finally:
            board.claimed.difference_update(claimed)
        for _, entry in changes:
            board.wake(entry.record.route if isinstance(entry, Released | Redecided) else ())
        return len(changes)

    def _narrowed(self, record: Record) -> Entry | None:
        """What becomes of a held record if later fixes have narrowed its doubt."""
        return self.again(record) if self._inward.line.pipeline.narrowed(record) is not None else None

    def again(self, record: Record) -> Entry | None:
        """What becomes of a stored record by all that is known and in force now; None: it stays as it is."""
        now_ns, pipeline = time.time_ns(), self._inward.line.pipeline
        own = Whereabouts(regions=record.regions, basis=record.basis)
        whereabouts = (pipeline.narrowed(record) if record.state is State.HELD else None) or own
        decision = pipeline.verdict(record, whereabouts)
        if isinstance(decision, Refuse):
            return Withdrawn(id=record.id, reason=decision.reason, time_ns=now_ns)
        try:
            if isinstance(decision, Publish) and record.state is State.HELD:
                with self._inward.line.numbering.next(whereabouts.regions) as sequence:
                    released = pipeline.release(record, whereabouts, decision.endpoints, sequence)
                return Released(record=released, time_ns=now_ns)
            changed = pipeline.rerouted(record, () if isinstance(decision, Hold) else decision.endpoints)
        except EnvelopeError:
            return Withdrawn(id=record.id, reason="envelope.unusable", time_ns=now_ns)
        return None if changed is record else Redecided(record=changed, reason=REASON, time_ns=now_ns)
