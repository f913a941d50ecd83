"""Blocking calls beside the event loop that must never delay the end of the process."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


async def beside(function: Callable[[], Result], *, name: str) -> Result:
    """Run a function in a thread of its own, which the interpreter does not wait for when it ends.

    The loop's executor would: a name server or a peer that never answers would hold up the shutdown. Cancelling is
    safe: the function runs on and its result is forgotten.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Result] = loop.create_future()

    def run() -> None:
        try:
            result = function()
        except BaseException as exc:  # noqa: BLE001 - handed to the caller
            _hand_over(loop, future, functools.partial(future.set_exception, exc))
        else:
            _hand_over(loop, future, lambda: future.set_result(result))

    threading.Thread(target=run, name=name, daemon=True).start()
    return await future


def _hand_over(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Result], settle: Callable[[], None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits any more
        loop.call_soon_threadsafe(lambda: None if future.cancelled() else settle())
