"""What is measured, set up to be measured: a car's broker, a regional broker, what forwards between them, the load.

A contender is mosquitto's own bridge, in the car's broker, or the agent behind it. Both get the same brokers and the
same messages. The agent places by GNSS fixes, decides by a policy of two regions, signs, and keeps its ledger on disk.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from tools.agent_process import AgentProcess
from tools.benchmarks import machine
from tools.benchmarks.pumps import WINDOW, Numbers, Sink, Source, Stream
from tools.brokers import Broker, mosquitto
from tools.toml_text import toml_text

TELEMETRY, CAMERA, GNSS = "vehicle/telemetry/engine", "vehicle/camera/{}", "vehicle/gnss"
PLACE = {"lat": 30.59, "lon": 114.3, "acc": 5.0}  # Wuhan: far from every border
IN_FLIGHT = 256  # both contenders get as much at a time: mosquitto's default of 20 would slow both
CAR_LINES = (f"max_inflight_messages {IN_FLIGHT}",)
BRIDGE = "connection out\naddress 127.0.0.1:{port}\ntopic # out 1\nbridge_protocol_version mqttv50\ntry_private false"
DURABLE = ("persistence true", "autosave_on_changes true", "autosave_interval 1")  # as durable as mosquitto can be
AHEAD = 1000  # messages on the way in a flood
FIRST_SECONDS = 30.0
TRY_SECONDS = 0.2
NOTHING_ELSE: Mapping[str, object] = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Stand:
    """A running contender between `source` and `sink`. `pids`: the processes that forward."""

    name: str
    source: Source
    sink: Sink
    numbers: Numbers
    pids: tuple[int, ...]
    region: Broker
    agent: AgentProcess | None = None

    async def rate(self, count: int) -> float:
        """Messages a second, with at most `AHEAD` on the way, from the first publish to the last arrival."""
        source, sink, first = self.source, self.sink, self.numbers.made
        sink.forget(first)
        started = time.monotonic()
        while (left := count - (self.numbers.made - first)) > 0:
            await source.room()
            free = min(AHEAD - (self.numbers.made - first - len(sink.arrived)), WINDOW - source.unacked)
            for _ in range(min(free, left)):
                source.publish(TELEMETRY, self.numbers(time.monotonic_ns()))
            if free > 0:
                await asyncio.sleep(0)
            else:
                await sink.hear(f"{AHEAD} messages stay away")
        await sink.until(count)
        return count / (time.monotonic() - started)

    def streams(self, per_s: float, cameras: int = 0, picture: bytes = b"") -> list[Stream]:
        """Telemetry, a fix a second, and a picture a second from every camera."""
        pictures = [Stream(topic=CAMERA.format(n), per_s=1, payload=lambda _due: picture) for n in range(cameras)]
        return [
            Stream(topic=TELEMETRY, per_s=per_s, payload=self.numbers),
            Stream(topic=GNSS, per_s=1, payload=fix),
            *pictures,
        ]


def fix(_due_ns: int) -> bytes:
    """A GNSS fix of now."""
    return json.dumps({**PLACE, "ts": time.time()}).encode()


@asynccontextmanager
async def bridge(name: str, size: int, lines: Sequence[str] = ()) -> AsyncIterator[Stand]:
    """Mosquitto's bridge; `lines` are its persistence settings."""
    async with AsyncExitStack() as stack:
        region = await stack.enter_async_context(mosquitto(config_lines=CAR_LINES))
        settings = [*CAR_LINES, *lines, *BRIDGE.format(port=region.port).splitlines()]
        car = await stack.enter_async_context(mosquitto(config_lines=settings))
        source, sink = await _pumps(stack, car, region)
        pids = (car.pid,) if car.pid is not None else ()
        stand = Stand(name=name, source=source, sink=sink, numbers=Numbers(size), pids=pids, region=region)
        await flows(stand)
        yield stand


@asynccontextmanager
async def agent(
    folder: Path, size: int, *, name: str = "residency-agent", endpoint: Mapping[str, object] = NOTHING_ELSE
) -> AsyncIterator[Stand]:
    """The agent, with its files in a new folder; `endpoint` is more of the policy's table of its endpoint."""
    async with AsyncExitStack() as stack:
        region = await stack.enter_async_context(mosquitto(config_lines=[*CAR_LINES, "sys_interval 1"]))
        car = await stack.enter_async_context(mosquitto(config_lines=CAR_LINES))
        configure(folder, car.port, region.port, endpoint)
        process = AgentProcess(folder / "agent.toml", folder / "agent.log")
        stack.push_async_callback(process.stop)
        await process.start()
        source, sink = await _pumps(stack, car, region)
        stand = Stand(
            name=name,
            source=source,
            sink=sink,
            numbers=Numbers(size),
            pids=await pids_of(process),
            region=region,
            agent=process,
        )
        await flows(stand)
        yield stand


async def pids_of(process: AgentProcess) -> tuple[int, ...]:
    """The agent's process and its redaction processes."""
    pid = int((await process.status())["pid"])
    return (pid, *machine.children(pid))


def configure(folder: Path, car: int, region: int, more: Mapping[str, object] = NOTHING_ELSE) -> None:
    """Write a vehicle's and a fleet's configuration, and a signing key, into a new folder."""
    folder.mkdir(parents=True)
    key = Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (folder / "key.pem").write_bytes(key)
    endpoint = {"host": "127.0.0.1", "tls": False, "in_flight": IN_FLIGHT, **more}
    policy = {
        "version": "1",
        "regions": {"cn": {"countries": ["CN"]}, "eea": {"countries": ["DE", "FR"]}},
        "endpoints": {"cn": {**endpoint, "port": region}},
        "classes": {"telemetry": {}, "picture": {}},
        "permit": {"cn": {"telemetry": ["cn"], "picture": ["cn"]}},
        "rules": [
            {"topic": "vehicle/camera/#", "action": "redact", "class": "picture"},
            {"topic": "vehicle/#", "action": "forward", "class": "telemetry"},
        ],
    }
    vehicle = {
        "vehicle": {"source": "urn:bench:car", "name": "car"},
        "broker": {"port": car},
        "intake": {"telemetry": ["vehicle/telemetry/#"], "pictures": ["vehicle/camera/#"]},
        "position": [{"topic": GNSS, "accuracy": "/acc", "time": "/ts"}],
        "signing": {"key_file": str(folder / "key.pem")},
    }
    (folder / "policy.toml").write_text(toml_text(policy), encoding="utf-8")
    (folder / "agent.toml").write_text(toml_text(vehicle), encoding="utf-8")


async def _pumps(stack: AsyncExitStack, car: Broker, region: Broker) -> tuple[Source, Sink]:
    source, sink = Source(), Sink()
    stack.callback(source.close)
    stack.callback(sink.close)
    await source.open(car.port, "bench-source")
    await sink.listen(region.port, "bench-sink")
    return source, sink


async def flows(stand: Stand) -> None:
    """Return once messages go through; a bridge may not be connected yet, and the agent may know no position."""
    first = stand.numbers.made
    stand.sink.forget(first)
    async with asyncio.timeout(FIRST_SECONDS):
        while not stand.sink.arrived:
            stand.source.publish(GNSS, fix(0))
            await asyncio.sleep(TRY_SECONDS)
            stand.source.publish(TELEMETRY, stand.numbers(time.monotonic_ns()))
            await asyncio.sleep(TRY_SECONDS)
        await stand.sink.until(stand.numbers.made - first)
