"""Rows `latency`, `picture-latency` and `memory`: what the agent adds under an ordinary load, and what it takes.

The load: telemetry at an even rate, a fix a second, and a picture a second from each camera. A message's latency is
from the moment at which it was due to its arrival at the regional broker's subscriber. The bare bridge gets the same
load, pictures included.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from tools.benchmarks import machine, stands
from tools.benchmarks.pumps import pace
from tools.benchmarks.results import Goal, Row, quantile, ratios
from tools.benchmarks.settings import Settings
from tools.benchmarks.stands import Stand

SIZE = 1024  # bytes of payload
PER_S, CAMERAS = 500, 4
MEBI = 1 << 20
SAMPLE_SECONDS = 0.5
LATENCY_GOAL = Goal(must=50, aim=15, at_least=False, unit=" ms")
PICTURE_GOAL = Goal(must=1.5, aim=1.1, at_least=False)
MEMORY_GOAL = Goal(must=180, aim=120, at_least=False, unit=" MB")
WHAT = f"{PER_S} messages/s of 1 kB with {CAMERAS} cameras x 1 picture/s of 1080p"


async def measure(settings: Settings) -> list[Row]:
    """The three rows from the same rounds."""
    p50: dict[str, list[float]] = {}
    p99: dict[str, list[float]] = {}
    async with AsyncExitStack() as stack:
        bridge = await stack.enter_async_context(stands.bridge("bridge", SIZE))
        agent = await stack.enter_async_context(stands.agent(settings.folder / "latency", SIZE))
        memory = await stack.enter_async_context(_watched(agent))
        for _ in range(settings.rounds):
            for name, stand, cameras in (
                ("bridge", bridge, CAMERAS),
                ("agent without pictures", agent, 0),
                ("agent", agent, CAMERAS),
            ):
                found = await latencies_ms(stand, settings, PER_S, cameras)
                p50.setdefault(name, []).append(quantile(found, 0.5))
                p99.setdefault(name, []).append(quantile(found, 0.99))
    return [_latency(p50, p99), _picture(p99), _memory(memory)]


async def latencies_ms(stand: Stand, settings: Settings, per_s: float, cameras: int) -> list[float]:
    """Of every telemetry message of one phase."""
    stand.sink.forget(stand.numbers.made)
    await pace(stand.source, stand.streams(per_s, cameras, settings.picture), settings.seconds)
    await stand.sink.until(int(settings.seconds * per_s))
    return stand.sink.latencies_ms()


def _latency(p50: dict[str, list[float]], p99: dict[str, list[float]]) -> Row:
    added = [ours - theirs for ours, theirs in zip(p99["agent"], p99["bridge"], strict=True)]
    middle = [ours - theirs for ours, theirs in zip(p50["agent"], p50["bridge"], strict=True)]
    return Row(
        name="latency",
        what=f"added latency, p99, {WHAT}",
        beside="bare mosquitto bridge with the same load",
        goal=LATENCY_GOAL,
        values=tuple(added),
        parts={
            "added, p50, ms": middle,
            "agent, p50, ms": p50["agent"],
            "agent, p99, ms": p99["agent"],
            "bridge, p50, ms": p50["bridge"],
            "bridge, p99, ms": p99["bridge"],
        },
    )


def _picture(p99: dict[str, list[float]]) -> Row:
    found = ratios(p99["agent"], p99["agent without pictures"])
    return Row(
        name="picture-latency",
        what=f"telemetry latency, p99, {WHAT}",
        beside="the same telemetry without pictures",
        goal=PICTURE_GOAL,
        values=found,
        parts={"without pictures, p99, ms": p99["agent without pictures"], "with, p99, ms": p99["agent"]},
    )


def _memory(found: dict[str, list[float]]) -> Row:
    return Row(
        name="memory",
        what=f"resident memory of the agent's process, {WHAT}",
        beside="-",
        goal=MEMORY_GOAL,
        values=tuple(found["agent"]),
        parts={name: values for name, values in found.items() if name != "agent"},
        note="judged: the agent's process alone; the redaction process stands below",
    )


@asynccontextmanager
async def _watched(stand: Stand) -> AsyncIterator[dict[str, list[float]]]:
    """Memory in MB of the agent, its redaction process and both, sampled until the block ends."""
    found: dict[str, list[float]] = {"agent": [], "redaction process, MB": [], "both, MB": [], "both, Pss, MB": []}
    task = asyncio.create_task(_sample_loop(stand, found), name="memory")
    try:
        yield found
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _sample_loop(stand: Stand, found: dict[str, list[float]]) -> None:
    while True:
        await asyncio.sleep(SAMPLE_SECONDS)
        with contextlib.suppress(OSError):
            used = [machine.usage(pid) for pid in stand.pids]
            resident = [one.resident_bytes / MEBI for one in used]
            found["agent"].append(resident[0])
            found["redaction process, MB"].append(sum(resident[1:]))
            found["both, MB"].append(sum(resident))
            found["both, Pss, MB"].append(sum(one.proportional_bytes for one in used) / MEBI)
