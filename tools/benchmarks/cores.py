"""Row `cores`: pictures a second through redaction processes as the agent runs them, with two cores and with one.

With one core there is one process; with two there are two, and whoever is free takes the next picture.
"""

from __future__ import annotations

import asyncio
import os
import time

from agent.redaction.pool import RedactionPool
from agent.redaction.worker import WorkerOptions
from agent.settings.config import shipped_manifest
from tools.benchmarks.results import Goal, Row, ratios
from tools.benchmarks.settings import Settings

CORES = 2
GOAL = Goal(must=1.7, aim=1.95, at_least=True)


async def measure(settings: Settings) -> list[Row]:
    """The row; it is not run where there are fewer cores."""
    available = len(os.sched_getaffinity(0))
    rates: dict[int, list[float]] = {1: [], CORES: []}
    if available >= CORES:
        options = WorkerOptions(manifest=shipped_manifest())
        async with RedactionPool(options, 1) as one, RedactionPool(options, CORES) as two:
            for _ in range(settings.rounds):
                for count, pool in ((1, one), (CORES, two)):
                    rates[count].append(await _rate(pool, count, settings))
    return [
        Row(
            name="cores",
            what=f"pictures/s of 1080p with {CORES} cores and as many redaction processes",
            beside="one core and one process",
            goal=GOAL,
            values=ratios(rates[CORES], rates[1]),
            parts={f"{count}, pictures/s": found for count, found in rates.items()},
            why_not="" if available >= CORES else f"{available} core",
        )
    ]


async def _rate(pool: RedactionPool, count: int, settings: Settings) -> float:
    """Pictures a second while as many wait as there are processes, and one more."""
    started, done = time.monotonic(), 0

    async def work() -> None:
        nonlocal done
        while time.monotonic() - started < settings.seconds:
            await pool.redact(settings.picture)
            done += 1

    async with asyncio.TaskGroup() as group:
        for _ in range(count + 1):
            group.create_task(work())
    return done / (time.monotonic() - started)
