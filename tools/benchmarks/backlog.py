"""Rows `catch-up` and `start`: what a long queue in the ledger costs.

`catch-up`: records that had to wait in the ledger, from the first arrival to the last once the regional broker can be
reached, held against the rate at which live messages go through the same agent. `start`: from the start of the
process to the arrival of the first message that was published after it, with that ledger and with an empty one.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

from agent import assembly, wiring
from agent.boot import boot_ns
from agent.messages import Message
from agent.pipeline import Stamp
from agent.store.entries import Store
from agent.store.ledger import Ledger
from tools.agent_process import AgentProcess
from tools.benchmarks import stands
from tools.benchmarks.pumps import Numbers, PumpError, Sink, Source
from tools.benchmarks.results import Goal, Row, ratios
from tools.benchmarks.settings import Settings
from tools.benchmarks.stands import CAR_LINES, GNSS, TELEMETRY, Stand, fix
from tools.brokers import Broker, mosquitto

SIZE = 1024  # bytes of payload
COMMIT = 250  # records that are stored in one transaction
LIVE = 64  # messages from which the live rate is guessed
STORED = 10**9  # from here the stored messages are numbered
CONFIRMING = 2  # fixes before the agent believes its position
EVERY_S = 0.02  # between two messages while an agent starts
START_SECONDS = 120.0
CATCH_UP_GOAL = Goal(must=0.8, aim=1, at_least=True)
START_GOAL = Goal(must=1.2, aim=1, at_least=False)


async def measure(settings: Settings) -> list[Row]:
    """Both rows, on ledgers of `settings.backlog` records."""
    catch_up, live, starts = [], [], {"empty": list[float](), "full": list[float]()}
    async with AsyncExitStack() as stack:
        region = await stack.enter_async_context(mosquitto(config_lines=CAR_LINES))
        car = await stack.enter_async_context(mosquitto(config_lines=CAR_LINES))
        folders = {name: settings.folder / f"backlog-{name}" for name in starts}
        for folder in folders.values():
            stands.configure(folder, car.port, region.port)
        source, numbers = Source(), Numbers(SIZE)
        stack.callback(source.close)
        await source.open(car.port, "bench-source")
        for _ in range(max(settings.rounds // 2, 1)):
            await asyncio.to_thread(fill, folders["full"], settings.backlog)
            for name, folder in folders.items():
                for _ in range(2):
                    starts[name].append(await _start(folder, source, numbers, region))
            stored = Ledger.read_counts(folders["full"] / "state" / assembly.LEDGER_FILE).pending
            caught, lived = await _catch_up(folders["full"], source, numbers, region, stored, settings.seconds)
            catch_up.append(caught)
            live.append(lived)
    return [_catch_up_row(settings.backlog, catch_up, live), _start_row(settings.backlog, starts)]


def _catch_up_row(backlog: int, catch_up: list[float], live: list[float]) -> Row:
    return Row(
        name="catch-up",
        what=f"about {backlog} stored messages to a returned broker",
        beside="the rate of live messages through the same agent",
        goal=CATCH_UP_GOAL,
        values=ratios(catch_up, live),
        parts={"stored, messages/s": catch_up, "live, messages/s": live},
    )


def _start_row(backlog: int, starts: dict[str, list[float]]) -> Row:
    return Row(
        name="start",
        what=f"start to the first new message forwarded, about {backlog} records in the ledger",
        beside="the same with an empty ledger",
        goal=START_GOAL,
        values=ratios(starts["full"], starts["empty"]),
        parts={"full, s": starts["full"], "empty, s": starts["empty"]},
    )


async def _start(folder: Path, source: Source, numbers: Numbers, region: Broker) -> float:
    """Seconds until the first message that was published after the start arrives; the agent is killed then."""
    process, sink = AgentProcess(folder / "agent.toml", folder / "agent.log"), Sink()
    await sink.listen(region.port, "bench-sink")
    began = time.monotonic_ns()
    starting = asyncio.create_task(process.start(), name="start")
    try:
        async with asyncio.timeout(START_SECONDS):
            while not (new := [moment for number, moment in sink.arrived.items() if sink.due[number] >= began]):
                source.publish(GNSS, fix(0))
                source.publish(TELEMETRY, numbers(time.monotonic_ns()))
                await asyncio.sleep(EVERY_S)
            await starting
    finally:
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        await process.kill()
        sink.close()
    return (min(new) - began) / 1e9


async def _catch_up(  # noqa: PLR0913, PLR0917 - what stands around it
    folder: Path, source: Source, numbers: Numbers, region: Broker, stored: int, seconds: float
) -> tuple[float, float]:
    """Stored messages a second, then live ones. The sink listens before the agent may connect."""
    process, sink = AgentProcess(folder / "agent.toml", folder / "agent.log"), Sink()
    await sink.listen(region.port, "bench-sink")
    try:
        await process.start()
        while not sink.arrived:
            await sink.hear("nothing stored arrives")
        already, began = len(sink.arrived), time.monotonic()
        await sink.until(stored)
        caught = (stored - already) / (time.monotonic() - began)
        stand = Stand(name="", source=source, sink=sink, numbers=numbers, pids=(), region=region, agent=process)
        await stands.flows(stand)
        rate = await stand.rate(LIVE)
        return caught, await stand.rate(max(LIVE, int(rate * seconds)))
    finally:
        sink.close()
        await process.stop()


def fill(folder: Path, records: int) -> None:
    """Store so many pending records, made by the agent's own line, in the ledger of a configured folder."""
    setup = assembly.load(folder / "agent.toml")
    ledger = Ledger.open(setup.ledger_path, wiring.ledger_limits(setup), seal=wiring.audit_seal(wiring.signer(setup)))
    try:
        entries: list[Store] = []
        for entry in _entries(setup, records):
            entries.append(entry)
            if len(entries) == COMMIT:
                ledger.commit(entries)
                entries = []
        ledger.commit(entries)
    finally:
        ledger.close()


def _entries(setup: assembly.Setup, records: int) -> Iterator[Store]:
    pipeline = wiring.pipeline(setup, wiring.signer(setup))
    numbers = Numbers(SIZE, first=STORED)
    reader = wiring.fix_readers(setup)[0][1]
    for number in range(records):
        while number % COMMIT == 0 and len(pipeline.positions) <= number // COMMIT + CONFIRMING:
            found = reader.read(_message(GNSS, fix(0)))
            if found is None:
                raise PumpError("the fix of the benchmark is no fix")
            pipeline.positions.add(found)
        message = _message(TELEMETRY, numbers(0))
        stamp = Stamp(record_id=secrets.token_hex(16), sequence=number + 1, now_ns=message.received_ns)
        yield Store(record=pipeline.record(pipeline.examine(message), message.payload, None, stamp))


def _message(topic: str, payload: bytes) -> Message:
    return Message(topic=topic, payload=payload, received_ns=time.time_ns(), monotonic_ns=boot_ns())
