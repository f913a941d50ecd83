"""What an endpoint, or the policy, said of records, on its way into the ledger.

Invariants
- A record stays claimed until what was said of it is durable: no uplink sends it a second time meanwhile.
- All that is said in one turn of the loop is handed over at once; it waits in the committer for company.
- What ends records waits for nothing that needs room on the disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from agent.board import Board
from agent.errors import LedgerError
from agent.mqtt.packets import Puback
from agent.store.committer import Committer
from agent.store.entries import Delivered, Ending, Entry, Rejected

FINISH_SECONDS = 2.0  # for which the disk is waited for when a connection ends
# MQTT 5.0, 3.4.2.1: Unspecified, Implementation specific, Not authorized, Packet identifier in use, Quota exceeded.
# An access list can be mended; a record that was thrown away because of it cannot.
RETRY_LATER = frozenset({0x80, 0x83, 0x87, 0x91, 0x97})


def answer(record: str, endpoint: str, puback: Puback, now_ns: int) -> Ending | None:
    """What the ledger is told of a record; None: it stays pending."""
    if puback.accepted:
        return Delivered(id=record, endpoint=endpoint, code=puback.code, time_ns=now_ns)
    if puback.code in RETRY_LATER:
        return None
    return Rejected(id=record, endpoint=endpoint, code=puback.code, time_ns=now_ns)


class Settling:
    """One endpoint's answers. `told` is called whenever some are durable, or failed; `broken` says why they did."""

    def __init__(self, name: str, committer: Committer, board: Board, told: Callable[[], None]) -> None:
        self.broken: LedgerError | None = None
        self._name = name
        self._committer = committer
        self._board = board
        self._told = told
        self._answers: list[tuple[str, Entry | None]] = []
        self._tasks: set[asyncio.Task[None]] = set()

    def add(self, record: str, answer: Entry | None) -> None:
        """Write down an answer, or another entry; None: there is nothing to write down, the record is free."""
        if not self._answers:
            asyncio.get_running_loop().call_soon(self._begin)
        self._answers.append((record, answer))

    async def finish(self) -> None:
        """Return when all that was said is durable, or failed, FINISH_SECONDS later at most; it waits for no company.

        What a disk that stalls has not taken by then is still on its way, and its records stay claimed. Where the agent
        ends before it is durable, they are sent again: at least once. Cancelling is safe.
        """
        self._begin()
        with self._committer.hurried():
            if self._tasks:
                await asyncio.wait(self._tasks, timeout=FINISH_SECONDS)

    def _begin(self) -> None:
        answers, self._answers = self._answers, []
        changes = [one for one in answers if _changes(one[1])]
        for some in ([one for one in answers if not _changes(one[1])], changes):
            if some:
                task = asyncio.create_task(self._settle(some), name=f"settle-{self._name}")
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _settle(self, answers: list[tuple[str, Entry | None]]) -> None:
        try:
            await self._committer.submit(*(answer for _, answer in answers if answer is not None))
        except LedgerError as exc:
            self.broken = exc
        else:
            self._board.claimed.difference_update(record for record, _ in answers)
            if any(answer is None or _changes(answer) for _, answer in answers):  # some may go now, here or elsewhere
                self._board.wake(self._board.stored)
        self._told()


def _changes(answer: Entry | None) -> bool:
    """Whether the record stays, but for another endpoint or until its region is known."""
    return answer is not None and not isinstance(answer, Ending)
