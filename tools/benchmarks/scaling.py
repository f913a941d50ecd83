"""Row `load`: what the agent's processes cost as the load grows, in messages, in cameras and in bytes.

Each step's cost is held against the step before it: the factor by which the CPU time grew, over the factor by which the
load that arrived grew. The largest of one dimension is its value; the costs of all steps stand below.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from tools.benchmarks import machine, stands
from tools.benchmarks.pumps import Numbers, Stream, pace
from tools.benchmarks.results import Goal, Row
from tools.benchmarks.settings import Settings
from tools.benchmarks.stands import CAMERA, GNSS, TELEMETRY, Stand, fix

KB = 1000
RATES = (10.0, 100.0, 1000.0, 5000.0)  # messages/s of 1 kB
CAMERAS = (1, 2, 4, 8)  # pictures/s of 1080p
SIZES = (1 * KB, 10 * KB, 100 * KB, 1000 * KB)  # bytes of a message
SIZES_PER_S = 5.0
GOAL = Goal(must=1, aim=1, at_least=False)
POLL_SECONDS = 0.1
SETTLE_SECONDS = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One load: `size` is what the dimension counts, `messages` how many are expected to arrive."""

    size: float
    streams: list[Stream]
    messages: int


async def measure(settings: Settings) -> list[Row]:
    """One row a dimension."""
    async with stands.agent(settings.folder / "load", KB) as stand:
        seconds, picture = settings.seconds, settings.picture
        by_rate = [
            Step(
                size=rate,
                streams=[Stream(topic=TELEMETRY, per_s=rate, payload=stand.numbers)],
                messages=int(rate * seconds),
            )
            for rate in RATES
        ]
        by_camera = [
            Step(
                size=count,
                streams=[Stream(topic=CAMERA.format(n), per_s=1, payload=lambda _: picture) for n in range(count)],
                messages=count * int(seconds),
            )
            for count in CAMERAS
        ]
        by_size = [
            Step(
                size=size,
                streams=[Stream(topic=TELEMETRY, per_s=SIZES_PER_S, payload=Numbers(size, first=10**9 + size * KB))],
                messages=int(SIZES_PER_S * seconds),
            )
            for size in SIZES
        ]
        return [
            _row("load-messages", "messages/s", [(step.size, await _cost(stand, step, seconds)) for step in by_rate]),
            _row("load-cameras", "cameras", [(step.size, await _cost(stand, step, seconds)) for step in by_camera]),
            _row("load-bytes", "bytes a message", [(step.size, await _cost(stand, step, seconds)) for step in by_size]),
        ]


async def _cost(stand: Stand, step: Step, seconds: float) -> float:
    """CPU seconds until everything of the step has arrived, for each second of load."""
    stand.sink.forget()
    before = machine.cpu_s(stand.pids)
    await pace(stand.source, [*step.streams, Stream(topic=GNSS, per_s=1, payload=fix)], seconds)
    async with asyncio.timeout(SETTLE_SECONDS + seconds):
        while len(stand.sink.arrived) + stand.sink.others < step.messages:  # noqa: ASYNC110 - the sink counts
            await asyncio.sleep(POLL_SECONDS)
    return (machine.cpu_s(stand.pids) - before) / seconds


def _row(name: str, what: str, costs: Sequence[tuple[float, float]]) -> Row:
    growth = [
        (cost / before) / (size / smaller) for (smaller, before), (size, cost) in itertools.pairwise(costs) if before
    ]
    return Row(
        name=name,
        what=f"growth of CPU time over growth of {what}, largest step",
        beside="the load",
        goal=GOAL,
        values=(max(growth),) if growth else (),
        parts={f"CPU s/s at {size:g} {what}": [cost] for size, cost in costs},
        why_not="" if growth else "the phases are too short for the kernel's clock",
    )
