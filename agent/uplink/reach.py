"""Giving up what is under way to an endpoint that must not be reached from where the vehicle is now."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

from agent.errors import EndpointError

LOOK_SECONDS = 1.0  # between two looks while a connection is being made


def check(reachable: Callable[[], bool]) -> None:
    """Raise EndpointError where the endpoint must not be reached."""
    if not reachable():
        raise EndpointError("not to be reached from where the vehicle is now")


@contextlib.asynccontextmanager
async def watched(reachable: Callable[[], bool]) -> AsyncIterator[None]:
    """Cancel the block once the endpoint must not be reached, and raise EndpointError. Cancelling is safe."""
    loop = asyncio.get_running_loop()
    timer: asyncio.TimerHandle

    def look() -> None:
        nonlocal timer
        if reachable():
            timer = loop.call_later(LOOK_SECONDS, look)
        else:
            limit.reschedule(loop.time())

    timer = loop.call_later(LOOK_SECONDS, look)
    try:
        async with asyncio.timeout(None) as limit:
            yield
    except TimeoutError:
        check(reachable)
        raise
    finally:
        timer.cancel()
