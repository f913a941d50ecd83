"""The uplinks that run, one for each endpoint of the policy; they come and go without the queue noticing."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Collection, Coroutine, Mapping
from typing import Any

from agent.board import Board
from agent.uplink.options import UplinkOptions
from agent.uplink.uplink import Uplink

DRAIN_SECONDS = 2.0  # for which the PUBACKs of an endpoint that goes are waited for

Start = Callable[[str, Coroutine[Any, Any, None]], asyncio.Task[None]]


class UplinkGroup:
    """`running` by endpoint. `make` builds an uplink, `start` runs a loop under a name until it is cancelled."""

    def __init__(self, board: Board, make: Callable[[UplinkOptions], Uplink]) -> None:
        self.running: dict[str, Uplink] = {}
        self._board = board
        self._make = make
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._ending = False

    async def apply(self, wanted: Mapping[str, UplinkOptions], start: Start) -> None:
        """Stop what is not wanted any more, or not like this; start what is missing; leave the rest as it is.

        Where other TLS files lie there than before, a connection is renewed. Afterwards no socket holds a record that
        its endpoint may not get.
        """
        before = dict(self.running)
        await self.stop([name for name, uplink in before.items() if wanted.get(name) != uplink.options])
        await asyncio.gather(*(uplink.comply(DRAIN_SECONDS) for uplink in self.running.values()))
        await asyncio.gather(*(uplink.renew() for uplink in self.running.values()))
        for name in () if self._ending else wanted.keys() - self.running.keys():
            self.running[name] = self._make(wanted[name])
            if name in before and before[name].options.peer.host == wanted[name].peer.host:
                self.running[name].shown = before[name].shown
                self.running[name].shown.ask()
            self._tasks[name] = start(f"uplink-{name}", self.running[name].run_loop())
        self._board.wake(self.running)

    async def stop(self, names: Collection[str]) -> None:
        """Publish nothing more to these endpoints from now on; return when nothing of theirs is in flight.

        What was in flight without PUBACK is pending again. Records that name such an endpoint first go to the next.
        """
        await asyncio.gather(*(self._stop(name) for name in names))

    async def _stop(self, name: str) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                await self.running[name].drain()
        task = self._tasks.pop(name)
        task.cancel()
        await asyncio.wait([task])
        del self.running[name]
        self._board.down.add(name)

    async def drain(self) -> None:
        """Publish nothing more, for good, and return when nothing is in flight. Cancelling is safe."""
        self._ending = True
        await asyncio.gather(*(uplink.drain() for uplink in self.running.values()))

    def cancel(self) -> None:
        """End all loops; who runs them waits for them."""
        for task in self._tasks.values():
            task.cancel()
