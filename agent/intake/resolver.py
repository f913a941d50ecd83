"""Deciding again about held records when later fixes have narrowed the doubt."""

from __future__ import annotations

import asyncio
import logging
import time

from agent.errors import LedgerStalledError
from agent.intake.intake import Inward
from agent.messages import Hold, Publish
from agent.store.entries import Entry, Released, Spooled, Withdrawn

log = logging.getLogger(__name__)

PAUSE_SECONDS = 1.0  # between passes: a fix a second is the usual rate of a receiver
PAGE = 64  # held records read at a time


class Resolver:
    """Goes through the held records after new fixes."""

    def __init__(self, inward: Inward) -> None:
        self._inward = inward

    async def run_loop(self) -> None:
        """Returns only by cancelling, which is safe: an unfinished pass is begun again."""
        while True:
            await self._inward.fixes.arrived.wait()
            self._inward.fixes.arrived.clear()
            try:
                await self._pass()
            except LedgerStalledError:
                self._inward.fixes.arrived.set()  # the disk does not answer now: begin again later
            await asyncio.sleep(PAUSE_SECONDS)

    async def _pass(self) -> None:
        after = 0
        while rows := await self._page(after):
            after = rows[-1].key
            for row in rows:
                entry = self._entry(row)
                if entry is not None:
                    await self._inward.committer.submit(entry)
                    self._inward.board.wake(entry.record.route if isinstance(entry, Released) else ())

    async def _page(self, after: int) -> list[Spooled]:
        return await self._inward.committer.call(lambda ledger: ledger.held(limit=PAGE, after=after))

    def _entry(self, row: Spooled) -> Entry | None:
        """What becomes of a held record now; None: it waits on."""
        pipeline, record, now_ns = self._inward.line.pipeline, row.record, time.time_ns()
        whereabouts = pipeline.narrowed(record)
        if whereabouts is None:
            return None
        decision = pipeline.verdict(record, whereabouts)
        if isinstance(decision, Hold):
            return None
        if not isinstance(decision, Publish):
            return Withdrawn(id=record.id, reason=decision.reason, time_ns=now_ns)
        sequence = self._inward.line.numbering.next(whereabouts.regions)
        return Released(record=pipeline.release(record, whereabouts, decision.endpoints, sequence), time_ns=now_ns)
