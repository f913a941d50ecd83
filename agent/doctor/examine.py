"""`residency-agent doctor`: tries everything that the agent needs, and says what to do about each failure.

Nothing is published and nothing is subscribed to; the endpoints see a connection that says CONNECT and DISCONNECT.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from agent.assembly import Setup
from agent.doctor import machine, network
from agent.doctor.findings import Finding
from agent.doctor.model import try_model


async def examine(setup: Setup) -> AsyncIterator[Finding]:
    """Everything in turn; a failure does not stop the rest. Cancelling is safe."""
    yield machine.clock(setup)
    yield await asyncio.to_thread(machine.disk, setup)
    for finding in await asyncio.to_thread(lambda: list(machine.permissions(setup))):
        yield finding
    yield machine.extras(setup)
    yield await network.in_car(setup)
    for name in setup.policy.endpoints:
        yield await network.endpoint(setup, name)
    yield await try_model(setup)
