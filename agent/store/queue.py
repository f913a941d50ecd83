"""What the committer has been given and has not written yet: entries, in order, and who waits for them."""

from __future__ import annotations

import asyncio
from collections import deque

import msgspec

from agent.errors import LedgerError
from agent.store.entries import Entry


class Queue:
    """Entries that wait or are being written, bounded by number and bytes; `closed`: no more, and why."""

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._entries = 0
        self._bytes = 0
        self._room = asyncio.Condition()
        self._asking = 0  # who waits for room
        self.waiting: deque[Waiting] = deque()
        self.waiting_bytes = 0
        self.stalled: str | None = None
        self.not_before = 0.0
        self.closed: LedgerError | None = None

    async def put(self, waiting: Waiting) -> None:
        """Append when there is room, in order; an entry above the bound on bytes waits until it is alone."""
        if not self._asking and not self.closed and self._has_room(waiting.size):
            self._append(waiting)
            return
        self._asking += 1
        try:
            async with self._room:
                await self._room.wait_for(lambda: self.closed or self._has_room(waiting.size))
                if self.closed:
                    raise self.closed
                self._append(waiting)
        finally:
            self._asking -= 1

    def _append(self, waiting: Waiting) -> None:
        self._entries += 1
        self._bytes += waiting.size
        self.waiting.append(waiting)
        self.waiting_bytes += waiting.size

    def _has_room(self, size: int) -> bool:
        return self._entries < self._max_entries and (not self._entries or self._bytes + size <= self._max_bytes)

    async def close(self, error: LedgerError) -> None:
        """Fail everything that waits, and everyone who waits for room."""
        self.closed = self.closed or error
        await self.settle(self.take(self.waiting_bytes, len(self.waiting)), error)

    def take(self, room: int, entries: int) -> list[Waiting]:
        """The next entries within `room` bytes, and at least one; at most `entries`."""
        taken: list[Waiting] = []
        while self.waiting and len(taken) < entries and (not taken or self.waiting[0].size <= room):
            taken.append(self.waiting.popleft())
            room -= taken[-1].size
            self.waiting_bytes -= taken[-1].size
        return taken

    def put_back(self, taken: list[Waiting], why: str, not_before: float) -> None:
        """Back to the head, in order, to be tried again later."""
        self.waiting.extendleft(reversed(taken))
        self.waiting_bytes += sum(waiting.size for waiting in taken)
        self.stalled, self.not_before = why, not_before

    async def settle(self, taken: list[Waiting], error: LedgerError | None = None) -> None:
        """Tell the submitters, make room for others."""
        for waiting in taken:
            waiting.submission.settled(error)
        if error is None:
            self.stalled = None
        self._entries -= len(taken)
        self._bytes -= sum(waiting.size for waiting in taken)
        if self._asking:
            async with self._room:
                self._room.notify_all()


class Submission(msgspec.Struct, eq=False):
    """What was submitted together: how many entries are not settled yet, the first error, and who waits."""

    left: int
    done: asyncio.Future[None]
    error: LedgerError | None = None

    def settled(self, error: LedgerError | None) -> None:
        """One entry is durable, or never will be."""
        self.left -= 1
        self.error = self.error or error
        if self.left or self.done.cancelled():
            return
        if self.error is None:
            self.done.set_result(None)
        else:
            self.done.set_exception(self.error)


class Waiting(msgspec.Struct, eq=False):
    """One entry, its size, what it was submitted with, and when (by the loop's clock)."""

    entry: Entry
    size: int
    submission: Submission
    queue: Queue
    since: float
