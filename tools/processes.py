"""Ending the processes that the tools have started."""

from __future__ import annotations

import asyncio
import signal


async def end(process: asyncio.subprocess.Process, number: signal.Signals, seconds: float) -> None:
    """Send the signal and wait; SIGKILL where the process has not ended in time."""
    if process.returncode is None:
        process.send_signal(number)
    try:
        async with asyncio.timeout(seconds):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()
