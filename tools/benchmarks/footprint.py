"""Row `footprint`: what the agent takes when idle and under the load of a car, without a goal of its own.

Memory, CPU and bytes written to the storage, of the agent's process and of its redaction process. The time from the
start to the first message forwarded is a figure of the row `start`.
"""

from __future__ import annotations

import asyncio

from tools.benchmarks import machine, stands
from tools.benchmarks.latency import MEBI, latencies_ms
from tools.benchmarks.machine import Usage
from tools.benchmarks.results import Row
from tools.benchmarks.settings import Settings
from tools.benchmarks.stands import Stand

SIZE = 1024  # bytes of payload
PER_S, CAMERAS = 200, 4
HOUR_S = 3600


async def measure(settings: Settings) -> list[Row]:
    """One row of many figures."""
    async with stands.agent(settings.folder / "footprint", SIZE) as stand:
        await asyncio.sleep(settings.seconds)
        first = _usage(stand)
        await asyncio.sleep(settings.seconds)
        idle = _usage(stand)
        latencies = await latencies_ms(stand, settings, PER_S, CAMERAS)
        loaded = _usage(stand)
    parts = _between("idle", first, idle, settings.seconds) | _between("under load", idle, loaded, settings.seconds)
    return [
        Row(
            name="footprint",
            what=f"idle, and with {PER_S} messages/s of 1 kB and {CAMERAS} cameras x 1 picture/s of 1080p",
            beside="-",
            parts=parts | {"latency under load, ms": latencies},
        )
    ]


def _usage(stand: Stand) -> list[Usage]:
    return [machine.usage(pid) for pid in stand.pids]


def _between(name: str, before: list[Usage], after: list[Usage], seconds: float) -> dict[str, list[float]]:
    """Of the agent's process, which stands first, and of all others together."""
    agent, others = after[0], after[1:]
    cpu = [(late.cpu_s - early.cpu_s) / seconds for early, late in zip(before, after, strict=True)]
    written = sum(late.written_bytes - early.written_bytes for early, late in zip(before, after, strict=True))
    return {
        f"resident, agent, {name}, MB": [agent.resident_bytes / MEBI],
        f"resident, redaction process, {name}, MB": [sum(one.resident_bytes for one in others) / MEBI],
        f"proportional, both, {name}, MB": [sum(one.proportional_bytes for one in after) / MEBI],
        f"share of a core, agent, {name}": [cpu[0]],
        f"share of a core, redaction process, {name}": [sum(cpu[1:])],
        f"written, {name}, MB an hour": [written / seconds * HOUR_S / MEBI],
    }
