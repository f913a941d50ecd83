"""Row `telemetry-batch`: what an endpoint that takes batches saves, beside the same agent without them.

Bytes are those of MQTT that the regional broker has received; TLS, TCP and IP add to both. The payloads are readings
with noise, so that what zstd finds are the attributes and JSON's own characters, not one number repeated.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import replace
from types import MappingProxyType

from tools.benchmarks import machine, stands
from tools.benchmarks.pumps import Meter, Readings
from tools.benchmarks.results import Goal, Row, ratios
from tools.benchmarks.settings import Settings
from tools.benchmarks.stands import Stand

SIZE = 1024  # bytes of payload
FIRST = 256  # messages from which a contender's rate is guessed
PUBACK_BYTES = 4  # of each PUBLISH, from the subscriber: not the agent's
BATCHES = MappingProxyType({"batch_records": 64, "batch_compression": "zstd", "in_flight": 4})
GOAL = Goal(must=2, aim=3, at_least=True)


async def measure(settings: Settings) -> list[Row]:
    """One row: how many times fewer bytes go over the wire, and what else changes."""
    found: dict[str, list[dict[str, float]]] = {}
    async with AsyncExitStack() as stack:
        started = [
            await stack.enter_async_context(
                stands.agent(settings.folder / name.replace(" ", "-"), SIZE, name=name, endpoint=more)
            )
            for name, more in (("one by one", stands.NOTHING_ELSE), ("in batches", BATCHES))
        ]
        contenders = [replace(stand, numbers=Readings(SIZE, stand.numbers.made)) for stand in started]
        counts, meters = {}, {}
        for stand in contenders:
            meters[stand.name] = meter = Meter()
            stack.callback(meter.close)
            await meter.watch(stand.region.port, "bench-meter")
            rate = await stand.rate(FIRST)
            counts[stand.name] = max(FIRST, int(await stand.rate(int(rate)) * settings.seconds))
        for _ in range(settings.rounds):
            for stand in contenders:
                found.setdefault(stand.name, []).append(await _turn(stand, meters[stand.name], counts[stand.name]))
    plain, batched = found.values()
    parts = {f"{what}, {name}": [turn[what] for turn in turns] for what in plain[0] for name, turns in found.items()}
    return [
        Row(
            name="telemetry-batch",
            what=f"bytes of MQTT for 1 kB telemetry, up to {BATCHES['batch_records']} records a PUBLISH, zstd",
            beside="the agent without batches",
            goal=GOAL,
            values=ratios([turn["bytes a record"] for turn in plain], [turn["bytes a record"] for turn in batched]),
            parts=parts,
        )
    ]


async def _turn(stand: Stand, meter: Meter, count: int) -> dict[str, float]:
    before, cpu_s = await meter.read(), machine.cpu_s(stand.pids)
    rate = await stand.rate(count)
    used = machine.cpu_s(stand.pids) - cpu_s
    received = await meter.read() - before - PUBACK_BYTES * stand.sink.publishes
    return {
        "bytes a record": received / count,
        "records a PUBLISH": count / stand.sink.publishes,
        "messages/s": rate,
        "CPU ms a message": 1000 * used / count,
    }
