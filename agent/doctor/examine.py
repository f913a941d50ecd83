"""`residency-agent doctor`: tries everything that the agent needs, and says what to do about each failure.

Nothing is published and nothing is subscribed to; the endpoints see a connection that says CONNECT and DISCONNECT. No
packet, a DNS question included, is for an endpoint that the policy's `reach` forbids from where the vehicle may be.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

from agent.assembly import Setup
from agent.doctor import machine, network
from agent.doctor.findings import Finding
from agent.doctor.model import try_model


async def examine(setup: Setup, regions: Sequence[str] = ()) -> AsyncIterator[Finding]:
    """Everything in turn; a failure does not stop the rest. Cancelling is safe.

    `regions`: where the vehicle may be now; none: anywhere.
    """
    here = regions or setup.policy.everywhere
    yield machine.clock(setup)
    yield await asyncio.to_thread(machine.disk, setup)
    for finding in await asyncio.to_thread(lambda: list(machine.permissions(setup))):
        yield finding
    yield await asyncio.to_thread(machine.borders, setup)
    yield machine.extras(setup)
    yield await network.in_car(setup)
    for name in setup.policy.endpoints:
        if setup.policy.reachable(here, name):
            yield await network.endpoint(setup, name)
        else:
            yield Finding(name=f"endpoint {name}", detail=f"not to be reached from {_place(regions)}", skipped=True)
    yield await try_model(setup)


def _place(regions: Sequence[str]) -> str:
    return " or ".join(regions) if regions else "everywhere; say with --in where the vehicle is"
