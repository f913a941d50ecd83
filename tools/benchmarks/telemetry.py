"""Rows `telemetry` and `telemetry-memory`: how many messages a second go through, beside mosquitto's bridge.

Every message is flooded with a bounded number on the way, and counts when it has arrived at the regional broker's
subscriber. Contenders take turns on brokers that stay up.
"""

from __future__ import annotations

from contextlib import AsyncExitStack

from tools.benchmarks import stands
from tools.benchmarks.results import Goal, Row, ratios
from tools.benchmarks.settings import Settings

SIZE = 1024  # bytes of payload
FIRST = 64  # messages from which a contender's rate is guessed
DURABLE_GOAL = Goal(must=8, aim=20, at_least=True)
MEMORY_GOAL = Goal(must=0.15, aim=0.5, at_least=True)
WHAT = "1 kB telemetry through the whole agent, QoS 1, durable before its PUBACK"


async def measure(settings: Settings) -> list[Row]:
    """Both rows from the same rounds."""
    rates: dict[str, list[float]] = {}
    async with AsyncExitStack() as stack:
        contenders = [
            await stack.enter_async_context(stands.agent(settings.folder / "telemetry", SIZE)),
            await stack.enter_async_context(stands.bridge("bridge, autosave", SIZE, stands.DURABLE)),
            await stack.enter_async_context(stands.bridge("bridge, in memory", SIZE)),
        ]
        counts = {stand.name: FIRST for stand in contenders}
        for stand in contenders:  # the first guess warms up, the second is better
            for _ in range(2):
                counts[stand.name] = max(FIRST, int(await stand.rate(counts[stand.name]) * settings.seconds))
        for _ in range(settings.rounds):
            for stand in contenders:
                rates.setdefault(stand.name, []).append(await stand.rate(counts[stand.name]))
    agent, durable, memory = rates.values()
    return [
        Row(
            name="telemetry",
            what=WHAT,
            beside="mosquitto bridge, autosave_on_changes, autosave_interval 1",
            goal=DURABLE_GOAL,
            values=ratios(agent, durable),
        ),
        Row(
            name="telemetry-memory",
            what=WHAT,
            beside="mosquitto bridge without durability",
            goal=MEMORY_GOAL,
            values=ratios(agent, memory),
            parts={f"{name}, messages/s": found for name, found in rates.items()},
        ),
    ]
