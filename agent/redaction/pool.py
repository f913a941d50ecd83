"""`RedactionPool`: as many redaction processes as the configuration asks for; whoever is free takes the next payload.

Each is a `RedactionWorker` with its own limits, and keeps every promise of one; a second one costs its memory again.
"""

from __future__ import annotations

import asyncio
import contextlib
from types import TracebackType
from typing import Self

from agent.histogram import WORK_SECONDS, Histogram
from agent.pictures.formats import RedactedPayload
from agent.redaction.worker import RedactionWorker, WorkerOptions


class RedactionPool:
    """`async with` starts and ends the processes. What is said of several: the worst of what each says.

    `made_of` are the options and the number of processes.
    """

    def __init__(self, options: WorkerOptions, processes: int) -> None:
        self.made_of = options, processes
        self.redactions, self.starts = Histogram(WORK_SECONDS), Histogram(WORK_SECONDS)
        self._workers = [RedactionWorker(options) for _ in range(processes)]
        for worker in self._workers:
            worker.redactions, worker.starts = self.redactions, self.starts
        self._free: asyncio.LifoQueue[RedactionWorker] = asyncio.LifoQueue()
        self._stack = contextlib.AsyncExitStack()

    @property
    def ready(self) -> bool:
        """Whether pictures are waited for: every process has a verified model, or was ended for want of pictures."""
        return all(worker.ready or worker.unloaded for worker in self._workers)

    @property
    def unloaded(self) -> bool:
        """Whether every process was ended because no pictures came."""
        return all(worker.unloaded for worker in self._workers)

    @property
    def resident_bytes(self) -> int:
        """Memory of all processes, as they said last."""
        return sum(worker.resident_bytes for worker in self._workers)

    @property
    def confined(self) -> bool:
        """Whether the kernel filters the system calls of every process."""
        return all(worker.confined for worker in self._workers)

    @property
    def restarts(self) -> int:
        """How many processes there were after the first ones."""
        return sum(worker.restarts for worker in self._workers)

    @property
    def digest(self) -> str:
        """SHA-256 of the open model; empty where none is open."""
        return next((worker.digest for worker in self._workers if worker.digest), "")

    @property
    def error(self) -> str:
        """Why the last start of one failed; empty where none did."""
        return next((worker.error for worker in self._workers if worker.error), "")

    @property
    def detail(self) -> str:
        """More about `error`."""
        return next((worker.detail for worker in self._workers if worker.error), "")

    async def __aenter__(self) -> Self:
        """Start all processes; a failure does not raise here, it refuses payloads."""
        try:
            for worker in self._workers:
                await self._stack.enter_async_context(worker)
                self._free.put_nowait(worker)
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End all processes."""
        await self.close()

    async def close(self) -> None:
        """End all processes; there are no others after them. Idempotent."""
        await self._stack.aclose()

    async def redact(self, payload: bytes, content_type: str | None = None) -> RedactedPayload:
        """As `RedactionWorker.redact`, in the process that was free last: the others may rest. Cancelling is safe."""
        worker = await self._free.get()
        try:
            return await worker.redact(payload, content_type)
        finally:
            self._free.put_nowait(worker)
