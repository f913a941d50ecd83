"""Waiting for an event, or for a moment, without raising anything when the moment comes.

`asyncio.timeout` cancels and catches, which costs a loop that waits once a message more than all else that it does.
"""

from __future__ import annotations

import asyncio


async def rung(event: asyncio.Event, at: float | None) -> bool:
    """Wait until the event is set: True, or until the loop's clock shows `at`: False, and the event is set too."""
    late = False

    def ring() -> None:
        nonlocal late
        late = not event.is_set()
        event.set()

    alarm = None if at is None else asyncio.get_running_loop().call_at(at, ring)
    try:
        await event.wait()
    finally:
        if alarm is not None:
            alarm.cancel()
    return not late
